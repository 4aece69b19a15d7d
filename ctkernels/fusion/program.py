"""The forward that a module gets when something in it is fused: its own, read as a graph, with the sites as single calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from .match import Match, find
from .site import FusedCall
from .trace import KINDS, Trace, Untraceable, argument_count, has_hooks, trace

Key = tuple[tuple[bool, ...], tuple[str, ...]]
_SIMPLE = (bool, int, float, str, type(None))
_NOT_READ = ("training", "_is_torch_compile")  # part of the key; set by torch.compile on the modules it sees


class Program:
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
        self.calls: dict[tuple[int, ...], FusedCall] = {}
        self.forget()

    def forget(self) -> None:
        self.functions: dict[Key, Callable[..., Any] | None] = {}
        self.known = _condition(self.scopes)

    @property
    def __code__(self) -> Any:
        """Of the original forward: ``torch.export`` asks for its name and place."""
        return type(self.scopes[0]).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.scopes[0]).forward.__get__(self.scopes[0]))

    def __getstate__(self) -> dict[str, Any]:
        return {"scopes": self.scopes}  # a copy reads its own modules

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.scopes, self.calls, self.functions, self.known = state["scopes"], {}, {}, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.scopes[0]
        compiling = torch.compiler.is_compiling()
        if not kwargs and not any(has_hooks(m) for m in self.scopes[1:]):
            if not compiling and _condition(self.scopes) != self.known:
                self.forget()
            key = tuple(m.training for m in self.scopes), tuple(KINDS.get(type(a), "") for a in args)
            if key not in self.functions and not compiling:
                self.functions[key] = self.function(key)
            function = self.functions.get(key)
            if function is not None:
                return function(module, *args)
        return type(module).forward(module, *args, **kwargs)

    def prepare(self) -> list[Match]:
        """Make the functions that are likely to be called, so that a compiler finds them. Returns the sites."""
        count = argument_count(self.scopes[0])
        assert count is not None
        found: list[Match] = []
        for training, kind in product((self.scopes[0].training, not self.scopes[0].training), ("tensor", "list")):
            key = (training,) * len(self.scopes), (kind,) * count
            if kind == "list" and not self.asked:
                continue
            before = [m.training for m in self.scopes]
            try:
                for m in self.scopes:
                    m.training = training
                self.functions[key] = self.function(key)
            finally:
                for m, flag in zip(self.scopes, before):
                    m.training = flag
            found = found or self.matches
        self.known = _condition(self.scopes)
        return found

    def function(self, key: Key) -> Callable[..., Any] | None:
        module, self.asked, self.matches = self.scopes[0], False, []
        if "" in key[1]:
            return None
        try:
            read = trace(module, self.scopes[1:], key[1])
        except Untraceable:
            return None
        self.asked, self.matches = read.asked, find(module, read.graph)
        if not self.matches:
            return None
        modules = dict(module.named_modules(remove_duplicate=False))
        for match in self.matches:
            self.replace(read, match, modules)
        code = read.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<fused {type(module).__name__}>", "exec"), namespace)
        return namespace["forward"]

    def replace(self, read: Trace, match: Match, modules: dict[str, nn.Module]) -> None:
        def held(node: Any) -> Any:
            return None if node is None else modules[node.target] if node.op == "call_module" else node.target

        parts = held(match.source), held(match.norm), held(match.unit)
        call = self.calls.setdefault(tuple(id(part) for part in parts), FusedCall(*parts))
        last = match.nodes[-1]
        others, kwargs = (last.args[1:], last.kwargs) if match.unit is not None else ((), {})
        with read.graph.inserting_before(last):
            fused = read.graph.call_function(call, (match.input, match.residual, *others), dict(kwargs))
        last.replace_all_uses_with(fused)
        for node in reversed(match.nodes):
            read.graph.erase_node(node)


def _condition(scopes: list[nn.Module]) -> list[Any]:
    """What a path through the modules may depend on, beside their training flags and arguments."""
    return [
        (
            type(m),
            dict(m._modules),
            {k: v for k, v in vars(m).items() if isinstance(v, _SIMPLE) and k not in _NOT_READ},
        )
        for m in scopes
    ]
