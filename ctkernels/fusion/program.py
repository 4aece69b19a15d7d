"""The generated forward of a module with fused sites, in which each site is one call."""

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
    """One path through the modules. ``run``: its generated code, None without a site. ``reads``: what it depends on."""

    run: Callable[..., Any] | None
    reads: Reads
    matches: list[Match]
    format: Format | None = None


class Program(FusedForward):
    """The ``forward`` in a module's ``__dict__``.

    A graph is specialised to the ``training`` flags, the types of the arguments, and the submodules and plain attributes
    read while tracing. Each specialisation has its own function, generated when first needed; calls without one run the
    original forward.

    Args:
        module: the module.
        inline: submodules whose code is traced with it.
    """

    def __init__(self, module: nn.Module, inline: Sequence[nn.Module]) -> None:
        self.scopes = [module, *inline]
        self.paths: dict[Key, Path] = {}

    @property
    def __code__(self) -> Any:
        """The original forward's code: ``torch.export`` reads its name and line."""
        return type(self.scopes[0]).forward.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        """Read by ``torch.jit.script``, which cannot compile a fused forward."""
        raise AttributeError(  # others treat it as absent
            f"torch.jit.script: expected a model that is not fused, got a fused {type(self.scopes[0]).__name__}; use "
            "torch.export, torch.compile, torch.jit.trace or ctkernels.export, or remove() first"
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.scopes[0]).forward.__get__(self.scopes[0]))

    def __getstate__(self) -> dict[str, Any]:
        return {"scopes": self.scopes}  # a copy traces its own modules

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
        """True if a call with the contiguous ``args`` runs in channels last."""
        if torch.is_grad_enabled() or torch.jit.is_tracing() or memory_format.why_not_now(args) or in_transform():
            return False
        return not memory_format.obstacle(self, len(args))

    def format(self, count: int) -> Format | None:
        """The format of the path with ``count`` tensors as arguments; None if it is not traced, or has no site."""
        path = self.paths.get((tuple([module.training for module in self.scopes]), ("tensor",) * count))
        return path.format if path is not None and path.reads.hold() else None

    def path(self, args: tuple[Any, ...]) -> Path | None:
        """The path of a call, traced again if it is out of date; None if the original forward must run."""
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
        if torch.compiler.is_compiling():  # tracing cannot be compiled
            return None
        path = self.paths[key] = self.trace(key, Norms())
        return path

    def prepare(self, norms: Norms) -> list[Match]:
        """Generates the functions of both modes, so that a compiler finds them. Returns the sites."""
        arguments = argument_count(self.scopes[0])
        assert arguments is not None
        now = self.scopes[0].training
        for training in (now, not now):
            key = (training,) * len(self.scopes), ("tensor",) * arguments
            self.paths[key] = self.trace(key, norms)
        return next((path.matches for path in self.paths.values() if path.matches), [])

    def trace(self, key: Key, norms: Norms) -> Path:
        module, (training, kinds) = self.scopes[0], key
        unfused = Path(None, Reads(), [])
        if None in kinds:
            return unfused
        try:
            traced = trace(module, self.scopes[1:], kinds, dict(zip(self.scopes, training)))  # type: ignore[arg-type]
        except Untraceable:
            return unfused
        matches = find(module, traced.graph, norms)
        if not matches:
            return Path(None, traced.reads, [])
        modules = dict(module.named_modules(remove_duplicate=False))
        for match in matches:
            _replace(traced, match, modules, norms)
        format = memory_format.of_graph(traced.graph, modules)
        return Path(_function(traced.graph, type(module).__name__), traced.reads, matches, format)


def _replace(traced: Trace, match: Match, modules: dict[str, nn.Module], norms: Norms) -> None:
    """Replaces the nodes of ``match`` by one call."""

    def target(node: Any) -> Any:
        return None if node is None else modules[node.target] if node.op == "call_module" else node.target

    norm = norms(target(match.norm))
    inside = norm is not None and norm.unit is not None
    unit = norm.unit if norm is not None and inside else target(match.unit)
    last = match.nodes[-1]
    others, kwargs = (match.unit.args[1:], match.unit.kwargs) if match.unit is not None and not inside else ((), {})
    call: FusedCall | GatedCall
    if match.product is not None:
        dim = _chunked_dim(match.halving[0]) if match.halving else None
        call, second = GatedCall(target(match.source), unit, dim), match.up
    else:
        call, second = FusedCall(target(match.source), norm, unit), match.residual
    with traced.graph.inserting_before(last):
        fused = traced.graph.call_function(call, (match.input, second, *others), dict(kwargs))
    fused.meta["line"] = last.meta.get("line")
    last.replace_all_uses_with(fused)
    for node in reversed(match.nodes):
        traced.graph.erase_node(node)


def _chunked_dim(chunk: torch.fx.Node) -> Any:
    """The dimension of a call of ``torch.chunk``."""
    return chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)


def _function(graph: torch.fx.Graph, name: str) -> Callable[..., Any]:
    """``graph`` as a function. Tracebacks show its source, with the original line behind each line."""
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
