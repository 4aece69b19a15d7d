"""The memory format inside a fused network: channels last, in inference on the CPU, for large images.

Convolutions, poolings and units of large images are faster in channels last. A fused forward therefore converts contiguous
images on entry, and its results on exit. This requires code whose behaviour does not depend on the format: the modules and
functions listed here, other fused forwards of such code, and units.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..steering.runtime import SteeredCall
from .layers import is_unit
from .overrides import FusedForward, is_open
from .site import FusedCall

LEAST_PIXELS = 1 << 15  # per batch: with fewer, rearranging the weights of large kernels costs more than it gains
LEAST_SITES = 8  # with fewer, the conversions cost more than they gain

_MAKES_NEW = frozenset({
    nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Linear,
})  # fmt: skip
_MAY_PASS_ON = frozenset({
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.Flatten,
})  # fmt: skip
_FUNCTIONS_THAT_MAKE_NEW = frozenset({
    operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.mul, torch.cat, torch.sigmoid, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean, torch._C._nn.adaptive_avg_pool2d,
    torch._C._nn.avg_pool2d, torch.max_pool2d,
})  # fmt: skip
_METHODS_THAT_MAKE_NEW = frozenset({"add", "mul", "mean", "sigmoid", "size", "dim"})
# Results of these may share the memory of their arguments.
_FUNCTIONS = frozenset({torch.flatten, F.dropout, F.relu, F.relu6, F.silu, F.gelu, torch.relu, operator.iadd})
_METHODS = frozenset({"flatten", "relu", "relu_"})
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})


class Format(NamedTuple):
    """Whether a graph may run in another memory format: if ``why_not`` is "", and ``calls`` and ``modules`` may too."""

    why_not: str
    calls: tuple[FusedCall, ...] = ()
    modules: tuple[tuple[nn.Module, int], ...] = ()  # with the number of arguments


def of_graph(graph: torch.fx.Graph, modules: dict[str, Any]) -> Format:
    """The format of ``graph``. ``modules``: its modules, by path."""
    calls: list[FusedCall] = []
    called: list[tuple[nn.Module, int]] = []
    arguments = set()  # nodes whose value may share the memory of an argument
    for node in graph.nodes:
        operands = node.all_input_nodes
        shares = any(operand in arguments for operand in operands)
        if _flattens(node, modules) and len(operands[0].users) > 1:  # it may write to the tensor through the flat view
            return Format("it flattens a tensor that it reads again")
        if node.op == "placeholder":
            arguments.add(node)
        elif node.op == "output":
            if shares:
                return Format("it may return an argument")
        elif node.op == "call_function" and isinstance(node.target, FusedCall):
            calls.append(node.target)  # overwrites only results of its layer
        elif node.op == "call_module":
            module = modules[node.target]
            if shares and not makes_new(module):
                return Format(f"{node.target} may write over an argument")
            called.append((module, len(node.args)))
        elif node.target is getattr and node.op == "call_function":
            if node.args[1] not in _ATTRIBUTES:
                return Format(f"it reads {node.args[1]} of a tensor")
        elif not _is_known(node) or (shares and not _makes_new(node)):
            return Format(f"it calls {getattr(node.target, '__name__', node.target)}")
    return Format("", tuple(calls), tuple(called))


def makes_new(module: Any) -> bool:
    """True if a call of ``module`` only reads its arguments, and does not return them."""
    if type(module).forward is nn.Sequential.forward:
        return len(module) > 0 and makes_new(module[0])
    forward = vars(module).get("forward")
    return type(module) in _MAKES_NEW or isinstance(forward, FusedForward)  # whose Format requires it


def _flattens(node: torch.fx.Node, modules: dict[str, Any]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.Flatten
    return node.op in ("call_function", "call_method") and node.target in (torch.flatten, "flatten")


def _is_known(node: torch.fx.Node) -> bool:
    if _makes_new(node) or isinstance(node.target, SteeredCall):
        return True
    return node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS)


def _makes_new(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS_THAT_MAKE_NEW
    return node.op == "call_function" and node.target in _FUNCTIONS_THAT_MAKE_NEW


# ---- at a call -------------------------------------------------------------------------------------------------------


def why_not_now(args: Iterable[Any]) -> str:
    """Why a call with ``args`` is not an inference call on large, contiguous batches of images on the CPU; "" if it is."""
    if torch.is_grad_enabled():
        return "gradients may be recorded (torch.no_grad() says that none are)"
    pixels = 0
    for x in args:
        if type(x) is not Tensor or x.dim() != 4 or not x.is_cpu:
            return "not all arguments are batches of images on the CPU"
        if not x.is_contiguous():
            return "the arguments are not contiguous"
        pixels = max(pixels, x.numel() // max(x.shape[1], 1))
    return "" if pixels >= LEAST_PIXELS else f"{pixels} pixels are fewer than {LEAST_PIXELS}"


def obstacle(forward: Any, count: int) -> str:
    """Why the fused ``forward``, with ``count`` tensors as arguments, cannot run in channels last; "" if it can and should."""
    sites: list[FusedCall] = []
    reason = _obstacle(forward, count, sites)
    if not reason and len(sites) < LEAST_SITES:
        return f"{len(sites)} sites are too few to be worth the conversions"
    return reason


def _obstacle(forward: Any, count: int, sites: list[FusedCall]) -> str:
    kind: Format | None = forward.format(count)
    if kind is None:
        return f"a {type(forward.scopes[0]).__name__} has not been read with such arguments"
    if kind.why_not:
        return f"{type(forward.scopes[0]).__name__}: {kind.why_not}"
    for call in kind.calls:
        if not call.is_unchanged():
            return f"a layer, BatchNorm or unit of a {type(forward.scopes[0]).__name__} has code or hooks of its own"
    sites += kind.calls
    return _first(_module_obstacle(module, arguments, sites) for module, arguments in kind.modules)


def _module_obstacle(module: Any, count: int, sites: list[FusedCall]) -> str:
    if not is_open(module):
        return f"a {type(module).__name__} has hooks"
    forward = vars(module).get("forward")
    if hasattr(forward, "format"):
        return _obstacle(forward, count, sites)
    if type(module).forward is nn.Sequential.forward:
        return _first(_module_obstacle(m, 1, sites) for m in module)
    known = type(module) in _MAKES_NEW or type(module) in _MAY_PASS_ON or is_unit(module)
    return "" if known else f"what a {type(module).__name__} does is not known"


def _first(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")


def run(function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...]) -> Any:
    """``function(module, *args)`` in channels last, with contiguous results."""
    return _contiguous(function(module, *(x.contiguous(memory_format=torch.channels_last) for x in args)))


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dim() != 4:
            return value
        _, channels, rows, columns = value.shape
        contiguous = value.stride() == (channels * rows * columns, rows * columns, columns, 1)  # also at size 1
        return value if contiguous else value.clone(memory_format=torch.contiguous_format)
    if type(value) in (list, tuple):
        return type(value)(_contiguous(v) for v in value)
    if isinstance(value, dict):
        return type(value)((k, _contiguous(v)) for k, v in value.items())
    return value
