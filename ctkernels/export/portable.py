"""Export of programs that run without this library."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from ..ops.portable import aligned
from ..ops.registration import OPS
from .program import Editor, functional

_ATEN = torch.ops.aten
_LAYERS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.linear.default)
_NORM = _ATEN._native_batch_norm_legit_no_training.default


@torch.no_grad()
def portable(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Exports ``model`` for inference as a program of torch's operations, which runs without ctkernels.

    CT units (steered, fused, learned) and unmerged JoLA edits become a few operations each. Knobs, edits and gates are
    constants of the program, and parts that they switch off are omitted: a unit at coeff = 1 is x * sigmoid(k x). A
    BatchNorm after a convolution is folded into its weights. The program can be saved (``torch.export.save``), compiled ahead
    of time (``torch._inductor.aoti_compile_and_package``), and exported further, as :func:`ctkernels.export.onnx` does. It is
    not for training: its constants have no gradient.

    Args:
        model: a module in evaluation mode, or a program from ``torch.export.export``; not modified.
        args, kwargs: example inputs, as for ``torch.export.export``; None for a program.
        dynamic_shapes: as for ``torch.export.export``; or "batch": dimension 0 of every input tensor is dynamic, and equal
            in all of them.

    Returns:
        A ``torch.export.ExportedProgram``.

    Raises:
        TypeError: ``model`` is neither a module nor a program; example inputs are missing, or given with a program.
        ValueError: the model is in training mode; a knob or an edit is not finite; an op of this library has no portable
            form.

    Examples:
        >>> import ctkernels.export
        >>> handle = ctkernels.steer(model, beta=0.9)
        >>> program = ctkernels.export.portable(model, (x,), dynamic_shapes="batch")
        >>> torch.export.save(program, "model.pt2")
    """
    program = functional(_exported(model, args, kwargs, dynamic_shapes), _IN_PLACE)
    editor = Editor(program)
    for node in list(editor.graph.nodes):
        lower = _LOWERINGS.get(node.target) if node.op == "call_function" else None
        if lower is not None and editor.constant(node) is None:
            with editor.graph.inserting_before(node):
                lower(editor, node)
    editor.graph.eliminate_dead_code()
    for node in list(editor.graph.nodes):
        if getattr(node.target, "namespace", "") == "ctkernels":
            value = editor.constant(node)
            if value is None:
                raise ValueError(_no_form(node))
            node.replace_all_uses_with(editor.lift(value, node.name))
    return editor.finish()


def _exported(
    model: nn.Module | ExportedProgram, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        if args is not None or kwargs is not None or dynamic_shapes is not None:
            raise TypeError("args: expected none beside an ExportedProgram, whose inputs are known; got some")
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module or a torch.export.ExportedProgram, got {type(model).__name__}"
        )
    if not isinstance(args, tuple):
        raise TypeError(f"args: expected a tuple of example inputs, got {type(args).__name__}")
    if model.training:
        raise ValueError("model: expected one in evaluation mode, got one in training mode; call model.eval() first")
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != "batch":
            raise ValueError(f'dynamic_shapes: expected "batch" or what torch.export takes, got {dynamic_shapes!r}')
        args, kwargs, dynamic_shapes = _batch_of(args, kwargs)
    return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)


def _batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    """Example inputs with batches larger than 1, a size that export would take as fixed, and their dynamic shapes."""
    batch = torch.export.Dim("batch")

    def rows(value: Any) -> Any:
        single = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1
        return torch.cat([value, value]) if single else value

    def shape(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.dim() > 0 else None

    inputs = pytree.tree_map(rows, (args, dict(kwargs or {})))
    shapes = pytree.tree_map(shape, inputs)
    return *inputs, (*shapes[0], *shapes[1].values())


def _no_form(node: Node) -> str:
    reasons = {
        "attention_head_edit": "it is a kernel of a GPU; export the model on the CPU, where attention is torch's",
        "hard_concrete": "its gates depend on the inputs of the program",
    }
    name = node.target._opname  # type: ignore[union-attr]
    return f"model: expected ops with a portable form, got {node.target}: {reasons.get(name, 'it has none')}"


# ---- lowerings ---------------------------------------------------------------------------------------------------------


def _lower(editor: Editor, node: Node) -> None:
    """Replaces the call of an op by the op's portable form."""
    op = OPS[node.target._opname]  # type: ignore[union-attr]
    assert op.portable is not None
    count = len(op.inputs._fields)
    inputs, attrs = op.inputs(*node.args[:count]), op.attrs(*node.args[count:])
    operands = _Operands(editor, node, inputs[0].meta["val"], attrs.channel_dim)
    operands.replace(importlib.import_module(op.portable).lower(operands, inputs, attrs))


def _batch_norm(editor: Editor, node: Node) -> None:
    """Folds a BatchNorm into the layer before it, if nothing else uses that."""
    x: Any
    x, weight, bias, mean, variance, _, eps = node.args
    tensors = [editor.constant(t) for t in (weight, bias, mean, variance)]
    gain, offset, center, spread = (None if t is None else t.double() for t in tensors)
    if center is None or spread is None or (weight, bias).count(None) != (gain, offset).count(None):
        return
    scale = torch.rsqrt(spread + eps) if gain is None else gain * torch.rsqrt(spread + eps)  # type: ignore[operator]
    shift = -center * scale if offset is None else offset - center * scale
    if _fold(editor, x, scale, shift):
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                user.replace_all_uses_with(x)


def _copy(editor: Editor, node: Node) -> None:
    """Replaces the copy of a functionalised in-place op by the value written, if that needs no cast or expansion."""
    target, source = node.args[:2]
    before, after = target.meta["val"], source.meta["val"]  # type: ignore[union-attr]
    if before.dtype == after.dtype and before.shape == after.shape:
        node.replace_all_uses_with(source)  # type: ignore[arg-type]


def _fold(editor: Editor, layer: Node, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Folds ``scale`` and ``shift`` per channel into the weights of ``layer``, if it is a layer that nothing else uses."""
    if layer.op != "call_function" or layer.target not in _LAYERS or len(layer.users) != 1:
        return False
    _, weight_node, bias_node, *_ = (*layer.args, None)
    weight, bias = editor.constant(weight_node), editor.constant(bias_node)
    rank = 2 if layer.target is _ATEN.linear.default else 2 + len(weight.shape[2:]) if weight is not None else 0
    if weight is None or (bias is None) != (bias_node is None) or layer.meta["val"].dim() != rank:
        return False
    dtype, channels = weight.dtype, weight.shape[0]
    if any(t is not None and t.numel() not in (1, channels) for t in (scale, shift)):
        return False
    bias = weight.new_zeros(channels) if bias is None else bias
    if scale is not None:
        rows = scale.double().expand(channels)
        weight, bias = weight.double() * rows.reshape(-1, *[1] * (weight.dim() - 1)), bias.double() * rows
    if shift is not None:
        bias = bias.double() + shift.double()
    lifted = [editor.lift(t.to(dtype), f"{layer.name}_{name}") for name, t in (("weight", weight), ("bias", bias))]
    layer.args = (layer.args[0], *lifted, *layer.args[3:])
    return True


class _Operands:
    """The operands of a channelwise op at ``node`` as values, and its replacement. Records operations before ``node``."""

    def __init__(self, editor: Editor, node: Node, x: Tensor, channel_dim: int) -> None:
        self._editor, self._node, self._x, self._channel_dim = editor, node, x, channel_dim
        self._dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def wide(self, node: Node) -> Any:
        """A proxy of an elementwise operand, in the dtype of the arithmetic."""
        proxy = self._editor.proxy(node)
        return proxy if node.meta["val"].dtype == self._dtype else proxy.to(self._dtype)

    def parameter(self, node: Any, name: str) -> Any:
        """A per-channel parameter."""
        return self.computed(lambda param: (param,), [node], (name,))[0]

    def fold(self, node: Node, scale: Any, shift: Any) -> bool:
        """Folds constants per channel into the weights of the layer at ``node``, if it is one that nothing else uses."""
        scales, shifts = self._editor.constant(scale), self._editor.constant(shift)
        constant = (scale is None) == (scales is None) and (shift is None) == (shifts is None)
        return constant and (scale, shift) != (None, None) and _fold(self._editor, node, scales, shifts)

    def halves(self, node: Node) -> tuple[Node, Node]:
        """The halves of a packed operand's channels; the first is what parameters are aligned with from then on."""
        value = node.meta["val"]
        channels = value.shape[self._channel_dim] // 2
        halves = []
        for start in (0, channels):
            half = self._editor.graph.call_function(
                _ATEN.slice.Tensor, (node, self._channel_dim, start, start + channels)
            )
            half.meta["val"] = value.narrow(self._channel_dim, start, channels)
            halves.append(half)
        self._x = halves[0].meta["val"]
        return halves[0], halves[1]

    def computed(self, function: Callable[..., tuple[Any, ...]], nodes: list[Any], names: tuple[str, ...]) -> list[Any]:
        """Results of ``function`` on per-channel parameters: constants, computed in float64, if all of them are constant."""
        constants = [self._editor.constant(node) for node in nodes]
        if all((node is None) == (value is None) for node, value in zip(nodes, constants)):
            ready = [None if t is None else self._aligned(t.double(), t.shape) for t in constants]
            return [None if t is None else self._number(t, name) for t, name in zip(function(*ready), names)]
        proxies: list[Any] = []
        for node in nodes:
            proxy = None if node is None else self._editor.proxy(node)
            if proxy is not None:
                wide = torch.promote_types(node.meta["val"].dtype, torch.float32)
                proxy = self._aligned(proxy.to(wide), node.meta["val"].shape)
            proxies.append(proxy)
        return [None if result is None else result.to(self._dtype) for result in function(*proxies)]

    def _aligned(self, param: Any, shape: torch.Size) -> Any:
        return aligned(param, shape, self._x, self._channel_dim)

    def _number(self, value: Tensor, name: str) -> Any:
        """A float if all elements of ``value`` are equal, else a constant of the program."""
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"model: expected finite knobs and edits, got {name} with NaN or infinity at {self._node.name}"
            )
        if value.numel() and bool((value == value.flatten()[0]).all()):
            return float(value.flatten()[0])
        return self._editor.proxy(self._editor.lift(value.to(self._dtype), f"{self._node.name}_{name}"))

    def replace(self, result: Any) -> None:
        if result.node.meta.get("val", self._x).dtype != self._x.dtype or self._dtype != self._x.dtype:
            result = result.to(self._x.dtype)
        result.node.meta.setdefault("val", self._node.meta["val"])
        self._node.replace_all_uses_with(result.node)


_LOWERINGS: dict[Any, Callable[[Editor, Node], None]] = {
    **{op.overloads.forward: _lower for op in OPS.values() if op.portable is not None},
    _NORM: _batch_norm,
    _ATEN.copy.default: _copy,
}
_IN_PLACE = [op.overloads.inplace for op in OPS.values() if op.overloads.inplace is not None]
