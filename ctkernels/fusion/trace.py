"""A module's forward as a graph, and nothing where the graph might not be what the module does.

``torch.fx`` records the path that is taken with stand-ins for the tensors. It is silent about some things that a path may
depend on, or do beside its result; those are noticed here, and the module is then left alone.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn

KINDS = {torch.Tensor: "tensor", nn.Parameter: "tensor", list: "list", tuple: "tuple"}
_CLASS_OF = {"tensor": torch.Tensor, "list": list, "tuple": tuple}


class Untraceable(Exception):
    """Why a module is left alone."""


class Trace(NamedTuple):
    """scopes: {node: the modules whose forward it stands in, outermost first}. asked: whether the code asked for the
    type of an argument."""

    graph: torch.fx.Graph
    scopes: dict[torch.fx.Node, tuple[nn.Module, ...]]
    asked: bool


class _Value(torch.fx.Proxy):
    """A stand-in that answers ``isinstance`` as the argument it stands for, and that knows ``x += y`` from ``x + y``."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        return _Value if asking.split(".")[0] == "torch" else self.tracer.class_of(self.node)


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def record(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(torch.fx.Tracer):
    def __init__(self, inline: Collection[nn.Module] | None, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.inline, self.kinds, self.asked = inline, kinds, False
        self.stack: list[nn.Module] = []
        self.scopes: dict[torch.fx.Node, tuple[nn.Module, ...]] = {}
        self.arguments: list[torch.fx.Node] = []
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_hooks(m) or hasattr(type(m), "ctu_arguments"):
            return True
        if self.inline is not None:
            return m not in self.inline
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        leaf = self.is_leaf_module(m, "")
        if not leaf:
            self.stack.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            if not leaf:
                self.stack.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        if _modes() != self.modes:
            raise Untraceable("it changes the gradient or autocast mode on its way")
        self.scopes[node] = tuple(self.stack)
        if node.op == "placeholder":
            self.arguments.append(node)
        return node

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Value(node, self)

    def class_of(self, node: torch.fx.Node) -> type:
        if node not in self.arguments:
            raise Untraceable(f"it asks for the type of {node.name}")
        self.asked = True
        return _CLASS_OF[self.kinds[self.arguments.index(node)]]


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def has_hooks(module: nn.Module) -> bool:
    """Whether something of the user's runs when ``module`` is called, that has to see what it sees now."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def argument_count(module: nn.Module) -> int | None:
    """How many arguments ``module``'s forward takes, None if some are optional: those choose between paths."""
    try:
        _, *parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return None
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    return len(parameters) if plain and parameters else None


def trace(module: nn.Module, inline: Collection[nn.Module] | None, kinds: tuple[str, ...]) -> Trace:
    """The graph of ``module``'s forward.

    inline: the modules below it that are looked into; None: all that are not layers of torch. kinds: what the arguments
    are, "tensor", "list" or "tuple". Raises :class:`Untraceable`.
    """
    tracer = _Tracer(inline, kinds)
    before = _snapshot(module)
    try:
        graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:  # any code may run here, and any error means that it cannot be read this way
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Untraceable(f"torch.fx cannot trace it: {what}") from error
    finally:
        changed = _restore(before)
    if changed:
        raise Untraceable("it keeps values from one call to the next")
    modules = dict(module.named_modules(remove_duplicate=False))
    for node in list(graph.nodes):  # placeholders for layers that a configuration leaves out
        held: Any = modules[node.target] if node.op == "call_module" else None
        if (
            held is not None
            and type(held).forward is nn.Identity.forward
            and not has_hooks(held)
            and len(node.args) == 1
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return Trace(graph, tracer.scopes, tracer.asked)


_HELD = ("_parameters", "_buffers", "_modules")


def _snapshot(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]]:
    return [(m, dict(vars(m)), {name: dict(vars(m)[name]) for name in _HELD}) for m in module.modules()]


def _restore(before: list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]]) -> bool:
    """Undo what a trace did to the modules. Returns whether there was anything."""
    changed = False
    for module, attributes, held in before:
        for now, then in [(vars(module), attributes), *((vars(module)[name], held[name]) for name in _HELD)]:
            if list(now) != list(then) or any(now[key] is not then[key] for key in then):
                changed = True
                now.clear()
                now.update(then)
    return changed
