"""Finds the sites in a graph: layer -> BatchNorm -> (+ residual) -> CT unit, and parts of it that are worth fusing; and
layer -> CT unit -> * up, the gated product of a language model's MLP.

Nodes are classified by the module or function that they call: layers by their forward, CT units by ``ctu_arguments``.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from ..steering.runtime import SteeredCall
from .layers import Norm, is_layer, is_unit, norm_of
from .overrides import is_open, is_sharded

_ADDS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_CHUNKS = (torch.chunk, "chunk")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


class Match(NamedTuple):
    """The nodes of one site. ``main``: index of the operand of ``add`` that comes from the layer or the norm.

    ``norm`` and ``unit`` are the same node if a BatchNorm calls the unit. ``product`` multiplies the unit's result by
    ``up``. If both are halves of one tensor, ``halving`` has the nodes of the ``chunk`` and of its two items.
    """

    source: Node | None
    norm: Node | None
    add: Node | None
    main: int
    unit: Node | None
    product: Node | None = None
    up: Node | None = None
    halving: tuple[Node, ...] = ()

    @property
    def nodes(self) -> list[Node]:
        parts = (*self.halving, self.source, self.norm, self.add, self.unit, self.product)
        return list(dict.fromkeys(node for node in parts if node is not None))

    @property
    def input(self) -> Node:
        firsts = (*self.halving[:1], self.source, self.norm, None if self.product is None else self.unit)
        first = next((node for node in firsts if node is not None), None)
        if first is not None:
            return first.args[0]  # type: ignore[return-value]
        assert self.add is not None
        return self.add.args[self.main]  # type: ignore[return-value]

    @property
    def residual(self) -> Node | None:
        return None if self.add is None else self.add.args[1 - self.main]  # type: ignore[return-value]


class Norms:
    """Cache of :func:`norm_of`."""

    def __init__(self) -> None:
        self.known: dict[nn.Module, Norm | None] = {}

    def __call__(self, module: nn.Module | None) -> Norm | None:
        if module is None:
            return None
        if module not in self.known:
            self.known[module] = norm_of(module)
        return self.known[module]


def find(root: nn.Module, graph: torch.fx.Graph, norms: Norms) -> list[Match]:
    """The sites of ``root``'s ``graph``, in order, without common nodes."""
    reader = _Reader(root, graph, norms)
    taken: set[Node] = set()
    matches = []
    ends = (  # products before units, and units before norms: they extend the others
        (reader.is_product, reader.match_product),
        (reader.is_unit, reader.match),
        (reader.ends_with_norm, reader.match),
    )
    for is_end, match_at in ends:
        for node in graph.nodes:
            if node not in taken and is_end(node):
                match = match_at(node, taken)
                if match is not None:
                    matches.append(match)
                    taken.update(match.nodes)
    return sorted(matches, key=lambda match: reader.order[match.nodes[-1]])


class _Reader:
    def __init__(self, root: nn.Module, graph: torch.fx.Graph, norms: Norms) -> None:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)
        self.norms = norms

    def module(self, node: Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def norm(self, node: Node) -> Norm | None:
        return self.norms(self.module(node)) if _takes_one(node) else None

    def is_source(self, node: Node) -> bool:
        return node.op == "call_module" and is_layer(self.module(node)) and _takes_one(node)

    def is_norm(self, node: Node) -> bool:
        norm = self.norm(node)
        return norm is not None and norm.unit is None and norm.other is None

    def ends_with_norm(self, node: Node) -> bool:
        """True for a BatchNorm that calls no unit."""
        norm = self.norm(node)
        return norm is not None and norm.unit is None

    def is_norm_and_unit(self, node: Node) -> bool:
        norm = self.norm(node)
        return norm is not None and norm.unit is not None

    def is_unit(self, node: Node) -> bool:
        if self.is_norm_and_unit(node):
            return True
        module = self.module(node)
        steered = isinstance(node.target, SteeredCall) or (module is not None and is_unit(module))
        return steered and bool(node.args)

    def is_add(self, node: Node) -> bool:
        return _combines_two(node, _ADDS, ("add", "add_"))

    def is_product(self, node: Node) -> bool:
        return _combines_two(node, _PRODUCTS, ("mul", "mul_"))

    # -- sites

    def match(self, end: Node, taken: set[Node]) -> Match | None:
        """The longest site that ends at ``end``, if it is worth fusing."""
        if not self.is_unit(end):
            match = Match(self.normalised(end, taken)[1], end, None, 0, None)
            return match if match.source is not None and self.is_undisturbed(match) else None
        if self.is_norm_and_unit(end):
            match = Match(self.normalised(end, taken)[1], end, None, 0, end)
            return match if self.is_undisturbed(match) else None
        before = end.args[0]
        candidates = []
        if isinstance(before, Node) and self.is_add(before) and self.feeds(before, end, taken):
            later_first = sorted((0, 1), key=lambda i: -self.order[before.args[i]])
            for main in later_first:  # fewer nodes lie in between
                norm, source = self.before(before.args[main], before, taken)
                if self.mutates(before) in (None, before.args[main]) or self.is_private(before.args[0], before):
                    candidates.append(Match(source, norm, before, main, end))
            candidates.sort(key=lambda match: -len(match.nodes))
            candidates = [match for match in candidates if match.source or match.norm or self.is_sum(match)]
        else:
            norm, source = self.before(before, end, taken)
            candidates = [Match(source, norm, None, 0, end)] if norm is not None or source is not None else []
        return next((match for match in candidates if self.is_undisturbed(match)), None)

    def match_product(self, product: Node, taken: set[Node]) -> Match | None:
        """The site of a unit whose result ``product`` multiplies, unless the unit is fused with a norm or a sum."""
        for unit, up in (product.args, product.args[::-1]):
            assert isinstance(unit, Node)  # is_product
            assert isinstance(up, Node)
            if not self.is_unit(unit) or self.is_norm_and_unit(unit) or not self.feeds(unit, product, taken):
                continue
            alone, gate = self.match(unit, taken), unit.args[0]
            if (alone is not None and (alone.norm or alone.add)) or not isinstance(gate, Node):
                continue
            source = None if alone is None else alone.source
            halving = self.halving(gate, up, unit, product, taken)
            if halving:
                match = Match(None, None, None, 0, unit, product, None, halving)
            else:
                match = Match(source, None, None, 0, unit, product, up)
            private = self.is_private(halving[0].args[0], halving[0]) if halving else self.is_private(gate, unit)
            writes = self.mutates(unit) is not None and not private
            if not writes and self.mutates(product) in (None, unit) and self.is_undisturbed(match):
                return match
        return None

    def halving(self, gate: Node, up: Node, unit: Node, product: Node, taken: set[Node]) -> tuple[Node, ...]:
        """The chunk of one tensor into gate and up, and its two items, if nothing else uses them."""
        chunk = gate.args[0] if gate.args else None
        halves = [node.op == "call_function" and node.target is operator.getitem for node in (gate, up)]
        if not all(halves) or not isinstance(chunk, Node) or (gate.args, up.args) != ((chunk, 0), (chunk, 1)):
            return ()
        if chunk.target not in _CHUNKS or chunk.args[1:2] != (2,) or not isinstance(chunk.args[0], Node):
            return ()
        private = self.feeds(gate, unit, taken) and self.feeds(up, product, taken) and set(chunk.users) == {gate, up}
        return (chunk, gate, up) if private and chunk not in taken else ()

    def is_sum(self, match: Match) -> bool:
        """True if a sum without a layer before it can be fused: it must not write to its operands."""
        assert match.add is not None
        return self.mutates(match.add) is None

    def before(self, node: Any, user: Node, taken: set[Node]) -> tuple[Node | None, Node | None]:
        """The (norm, layer) that end at ``node``, if only ``user`` uses them."""
        if not isinstance(node, Node) or not self.feeds(node, user, taken):
            return None, None
        if self.is_source(node):
            return None, node
        return self.normalised(node, taken) if self.is_norm(node) else (None, None)

    def normalised(self, norm: Node, taken: set[Node]) -> tuple[Node, Node | None]:
        source = norm.args[0]
        assert isinstance(source, Node)  # _takes_one
        return norm, source if self.is_source(source) and self.feeds(source, norm, taken) else None

    def feeds(self, node: Node, user: Node, taken: set[Node]) -> bool:
        return node not in taken and list(node.users) == [user]

    # -- what happens in between

    def is_undisturbed(self, match: Match) -> bool:
        """True if all nodes can run at the position of the last one: no tensor is overwritten in between."""
        positions = [self.order[node] for node in match.nodes]
        return not any(
            self.overwrites(node) for node in self.nodes[min(positions) : max(positions)] if node not in match.nodes
        )

    def overwrites(self, node: Node) -> bool:
        target = self.mutates(node)
        return target is not None and not self.is_private(target, node)

    def mutates(self, node: Node) -> Any:
        """The argument that ``node`` may write to, or None."""
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if node.op == "call_method":
            return first if str(node.target).endswith("_") and not str(node.target).endswith("__") else None
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            inplace = True in node.args[1:] or node.kwargs.get("inplace") or "out" in node.kwargs
            steered = isinstance(node.target, SteeredCall) and node.target.name.endswith("_")
            return first if node.target in _IN_PLACE or name.endswith("_") or inplace or steered else None
        module = self.module(node)
        return first if module is not None and any(map(_may_write, module.modules())) else None

    def is_private(self, value: Any, user: Node) -> bool:
        """True if ``value`` has its own memory, and only ``user`` reads it."""
        if not isinstance(value, Node) or list(value.users) != [user]:
            return False
        written = self.mutates(value)
        if written is not None:
            return self.is_private(written, value)
        fresh = value.op == "call_function" and value.target in (operator.add, torch.add, torch.cat)
        module = self.module(value)
        sharded = isinstance(module, nn.Linear) and is_sharded(module)
        return fresh or sharded or self.is_source(value) or self.is_norm(value)


def _may_write(module: nn.Module) -> bool:
    """True if ``module``'s own code, without its submodules', may overwrite its argument."""
    layer = type(module).__module__.startswith(("torch.nn.", "ctkernels.nn"))
    return getattr(module, "inplace", False) or not layer or not (is_open(module) or is_sharded(module))


def _combines_two(node: Node, functions: tuple[Any, ...], methods: tuple[str, ...]) -> bool:
    """True if ``node`` calls one of these on two different values."""
    calls = node.target in functions if node.op == "call_function" else node.target in methods
    operands = calls and node.op in ("call_function", "call_method") and not node.kwargs and len(node.args) == 2
    return operands and all(isinstance(a, Node) for a in node.args) and node.args[0] is not node.args[1]


def _takes_one(node: Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs
