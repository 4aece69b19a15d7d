"""The forward of a module with fused sites: its own, as generated code in which each site is one call."""

from __future__ import annotations

import inspect
import linecache
import os
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.autograd import in_transform
from . import memory_format
from .gated import GatedCall
from .match import Match, Norms, find
from .memory_format import Format
from .overrides import FusedForward, is_open
from .shadow import Reads, Untraceable
from .site import FusedCall
from .trace import Kind, Trace, argument_count, kind_of, trace

Key = tuple[tuple[bool, ...], tuple[Kind | None, ...]]
_NUMBERS = count()


class Path(NamedTuple):
    """One path through the modules. ``run``: its code, None where it has no site; ``reads``: what it depends on."""

    run: Callable[..., Any] | None
    reads: Reads
    matches: list[Match]
    format: Format | None = None


class Program(FusedForward):
    """Stands in a module's ``__dict__`` as its ``forward``.

    A graph is of one path: of one setting of the ``training`` flags and one choice of argument types, and of the
    submodules and plain attributes as they were. Each choice has a function of its own, made when it is first met; calls
    that have none go to the original forward.

    Args:
        module: whose forward this is.
        inline: the modules below it whose code is part of it.
    """

    def __init__(self, module: nn.Module, inline: Sequence[nn.Module]) -> None:
        self.scopes = [module, *inline]
        self.paths: dict[Key, Path] = {}

    @property
    def __code__(self) -> Any:
        """The original forward's: ``torch.export`` asks for its name and line."""
        return type(self.scopes[0]).forward.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        """Is what ``torch.jit.script`` asks for, which cannot read a fused forward."""
        raise AttributeError(  # for others that ask, it has none
            f"torch.jit.script: expected a model that is not fused, got a fused {type(self.scopes[0]).__name__}; use "
            "torch.export, torch.compile, torch.jit.trace or ctkernels.export, or remove() first"
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.scopes[0]).forward.__get__(self.scopes[0]))

    def __getstate__(self) -> dict[str, Any]:
        return {"scopes": self.scopes}  # a copy reads its own modules

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.scopes, self.paths = state["scopes"], {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.scopes[0]
        if not kwargs and not _has_any_global_hook():
            path = self.path(args)
            if path is not None and path.run is not None:
                if not torch.compiler.is_compiling() and self.converts(args):
                    return memory_format.run(path.run, module, args)
                return path.run(module, *args)
        return type(module).forward(module, *args, **kwargs)

    def converts(self, args: tuple[Any, ...]) -> bool:
        """True if a call with ``args`` runs in channels last, although they are contiguous."""
        if torch.is_grad_enabled() or torch.jit.is_tracing() or memory_format.why_not_now(args) or in_transform():
            return False
        return not memory_format.obstacle(self, len(args))

    def format(self, count: int) -> Format | None:
        """That of the path with ``count`` tensors as arguments; None if it has not been read, or has no site."""
        path = self.paths.get((tuple([module.training for module in self.scopes]), ("tensor",) * count))
        return path.format if path is not None and path.reads.hold() else None

    def path(self, args: tuple[Any, ...]) -> Path | None:
        """The path of a call, read anew where it does not hold; None where the original forward is to run."""
        training, kinds = [], []
        for module in self.scopes:
            training.append(module.training)
            if module is not self.scopes[0] and not is_open(module):
                return None
        for argument in args:
            kinds.append("tensor" if type(argument) is Tensor else kind_of(argument))
        key = tuple(training), tuple(kinds)
        path = self.paths.get(key)
        if path is not None and path.reads.hold():
            return path
        if torch.compiler.is_compiling():  # a compiler cannot follow the reading
            return None
        path = self.paths[key] = self.read(key, Norms())
        return path

    def prepare(self, norms: Norms) -> list[Match]:
        """Make the functions that are likely to be called, so that a compiler finds them. Returns the sites."""
        arguments = argument_count(self.scopes[0])
        assert arguments is not None
        now = self.scopes[0].training
        for training in (now, not now):
            key = (training,) * len(self.scopes), ("tensor",) * arguments
            self.paths[key] = self.read(key, norms)
        return next((path.matches for path in self.paths.values() if path.matches), [])

    def read(self, key: Key, norms: Norms) -> Path:
        module, (training, kinds) = self.scopes[0], key
        nothing = Path(None, Reads(), [])
        if None in kinds:
            return nothing
        try:
            read = trace(module, self.scopes[1:], kinds, dict(zip(self.scopes, training)))  # type: ignore[arg-type]
        except Untraceable:
            return nothing
        matches = find(module, read.graph, norms)
        if not matches:
            return Path(None, read.reads, [])
        modules = dict(module.named_modules(remove_duplicate=False))
        for match in matches:
            _replace(read, match, modules, norms)
        format = memory_format.of_graph(read.graph, modules)
        return Path(_function(read.graph, type(module).__name__), read.reads, matches, format)


def _replace(read: Trace, match: Match, modules: dict[str, nn.Module], norms: Norms) -> None:
    """Put one call in the place of the nodes of ``match``."""

    def held(node: Any) -> Any:
        return None if node is None else modules[node.target] if node.op == "call_module" else node.target

    norm = norms(held(match.norm))
    inside = norm is not None and norm.unit is not None
    unit = norm.unit if norm is not None and inside else held(match.unit)
    last = match.nodes[-1]
    others, kwargs = (match.unit.args[1:], match.unit.kwargs) if match.unit is not None and not inside else ((), {})
    call: FusedCall | GatedCall
    if match.product is not None:
        dim = _chunked_dim(match.halving[0]) if match.halving else None
        call, second = GatedCall(held(match.source), unit, dim), match.up
    else:
        call, second = FusedCall(held(match.source), norm, unit), match.residual
    with read.graph.inserting_before(last):
        fused = read.graph.call_function(call, (match.input, second, *others), dict(kwargs))
    fused.meta["line"] = last.meta.get("line")
    last.replace_all_uses_with(fused)
    for node in reversed(match.nodes):
        read.graph.erase_node(node)


def _chunked_dim(chunk: torch.fx.Node) -> Any:
    """The dimension that a call of ``torch.chunk`` cuts."""
    return chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)


def _function(graph: torch.fx.Graph, name: str) -> Callable[..., Any]:
    """``graph`` as a function whose source tracebacks can show, with the line of the original that each line stands for."""
    code = graph.python_code("self")
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    lines = code.src.splitlines()
    where = {f"{node.name} = ": node.meta.get("line") for node in nodes}
    for i, line in enumerate(lines):
        location = next((p for start, p in where.items() if line.strip().startswith(start)), None)
        if location is not None:
            file, number = location
            original = linecache.getline(file, number).strip()
            lines[i] = f"{line}  # {os.path.basename(file)}:{number}: {original}"
    source = "\n".join(lines) + "\n"
    file = f"<fused {name} {next(_NUMBERS)}>"
    namespace = dict(code.globals)
    exec(compile(source, file, "exec"), namespace)
    run: Callable[..., Any] = namespace["forward"]
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    weakref.finalize(run, linecache.cache.pop, file, None)
    return run
