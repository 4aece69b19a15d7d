"""Editing of exported programs: finds constant values, adds new constants, removes unused ones."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Editor:
    """Edits the functional ``program`` in place; ``finish`` returns a valid program."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph
        self._tracer = GraphAppendingTracer(self.graph)
        self._specs = program.graph_signature.input_specs
        self._values: dict[Node, Tensor | None] = {}
        changing = set(program.graph_signature.buffers_to_mutate.values())
        for node, spec in zip(self._placeholders(), self._specs):
            value = None
            if spec.kind in _STORED and spec.target is not None and spec.target not in changing:
                value = program.state_dict.get(spec.target, program.constants.get(spec.target))
            self._values[node] = value.detach() if isinstance(value, Tensor) else None

    def constant(self, node: Any) -> Tensor | None:
        """The value of a node that depends only on parameters, buffers and constants; None for others."""
        if not isinstance(node, Node):
            return None
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    def _computed(self, node: Node) -> Tensor | None:
        if node.op != "call_function" or not _is_pure(node.target):
            return None
        if node.target is operator.getitem:  # of an op with several results
            source: Any = node.args[0]
            results = self._call(source) if source.op == "call_function" and _is_pure(source.target) else None
        else:
            results = (self._call(node),)
        index: Any = node.args[1] if node.target is operator.getitem else 0
        result = None if results is None else results[index]
        return result if isinstance(result, Tensor) else None

    def _call(self, node: Node) -> Any:
        values = {argument: self.constant(argument) for argument in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: values[argument])
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def proxy(self, node: Node) -> Proxy:
        """A proxy of ``node``; operations on it are recorded at the current insertion point."""
        return Proxy(node, self._tracer)

    def lift(self, value: Tensor, name: str) -> Node:
        """Adds a constant to the program, under ``name`` or a similar one."""
        value = value.detach().contiguous()
        after = self._placeholders()[: self._first_user_input()]
        with (
            self.graph.inserting_after(after[-1])
            if after
            else self.graph.inserting_before(next(iter(self.graph.nodes)))
        ):
            node = self.graph.placeholder(name)
        fake_mode = next(n.meta["val"].fake_mode for n in self._placeholders() if isinstance(n.meta.get("val"), Tensor))
        node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name)
        self._specs.insert(len(after), spec)
        self.program.constants[node.name] = value
        self._values[node] = value
        return node

    def _placeholders(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def _first_user_input(self) -> int:
        kinds = [spec.kind for spec in self._specs]
        return kinds.index(InputKind.USER_INPUT) if InputKind.USER_INPUT in kinds else len(kinds)

    def finish(self) -> ExportedProgram:
        """Removes dead code, unused parameters and unused constants, and returns the program."""
        self.graph.eliminate_dead_code()
        for node, spec in list(zip(self._placeholders(), self._specs)):
            if spec.kind in _STORED and not node.users:
                self.graph.erase_node(node)
                self._specs.remove(spec)
        read = {spec.target for spec in self._specs}
        for table in (self.program.state_dict, self.program.constants):
            for name in [name for name in table if name not in read]:
                del table[name]
        self.graph.lint()
        self.program.graph_module.recompile()
        return self.program.run_decompositions({})


def functional(program: ExportedProgram, in_place: Iterable[Any]) -> ExportedProgram:
    """A functionalised copy of ``program`` that shares its tensors. in_place: this library's in-place overloads."""
    tensors = (*program.state_dict.values(), *program.constants.values())
    program = copy.deepcopy(program, {id(t): t for t in tensors})
    targets = set(in_place)
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in targets:
            plain = getattr(torch.ops.ctkernels, node.target._opname.removesuffix("_")).default
            with program.graph.inserting_before(node):
                result = program.graph.call_function(plain, node.args, node.kwargs)
                program.graph.call_function(torch.ops.aten.copy_.default, (node.args[0], result))
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program.run_decompositions({})


def _is_pure(target: Any) -> bool:
    """Whether a call is deterministic and has no side effects."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
