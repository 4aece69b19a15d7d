"""Recognises layers, BatchNorms and units that run only known code, and can be replaced by equal code.

Checked when a model is fused and in every call: a forward, hook, class or parametrization may be put on a layer at any time.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import eager
from .overrides import is_open
from .shadow import Reads, Untraceable
from .trace import trace

_CONVOLUTIONS = {cls.forward: cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_LINEAR = nn.Linear.forward
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_BATCH_NORM_FORWARD = _BATCH_NORM.forward
_GETATTR, _GETATTRIBUTE = nn.Module.__getattr__, nn.Module.__getattribute__
# Entries of a layer's ``__dict__`` that would change what it computes.
_CODE = ("forward", "_conv_forward", "_check_input_dim", "weight", "bias", "running_mean", "running_var")


def is_layer(module: Any) -> bool:
    """True for a convolution or a linear layer that runs torch's code."""
    cls = type(module)
    convolution = _CONVOLUTIONS.get(cls.forward)
    if cls.forward is not _LINEAR if convolution is None else cls._conv_forward is not convolution:
        return False
    parameters = module._parameters
    return parameters.get("weight") is not None and "bias" in parameters and _has_plain_tensors(module)


def is_norm(module: Any) -> bool:
    """True for a BatchNorm that runs torch's code."""
    return type(module).forward is _BATCH_NORM_FORWARD and _has_norm_tensors(module)


def _has_norm_tensors(module: Any) -> bool:
    parameters, buffers = module._parameters, module._buffers
    return (
        "weight" in parameters
        and "bias" in parameters
        and "running_mean" in buffers
        and "running_var" in buffers
        and _has_plain_tensors(module)
    )


def _has_plain_tensors(module: Any) -> bool:
    """True if ``module`` runs its class's code, on registered plain tensors. Checked for every layer in every call."""
    cls, attributes = type(module), module.__dict__
    if cls.__getattr__ is not _GETATTR or cls.__getattribute__ is not _GETATTRIBUTE or not is_open(module):
        return False
    for name in _CODE:
        if name in attributes:
            return False
    for tensor in module._parameters.values():
        if tensor is not None and type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return False
    for tensor in module._buffers.values():  # noqa: SIM110 (a generator costs a frame per tensor)
        if tensor is not None and type(tensor) is not Tensor:
            return False
    return True


_UNCHANGED = eager.entry("unchanged")
_CLASS = ("forward", "__call__", "__getattr__", "__getattribute__", "_conv_forward", "ctu_arguments")
_TABLES = ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """Snapshot of everything that :func:`is_layer`, :func:`is_norm` and :func:`is_unit` check, of modules that pass them.
    Comparing it is faster than checking again."""

    def __init__(self, *modules: nn.Module) -> None:
        self.state = tuple(self._of(module) for module in modules)

    @staticmethod
    def _of(module: nn.Module) -> tuple[Any, ...]:
        cls, entries = type(module), module.__dict__
        names = [name for name in _CLASS if hasattr(cls, name)]
        dicts = [entries, *(entries[name] for name in _TABLES if name in entries)]
        attributes = tuple(part for name in names for part in (name, getattr(cls, name)))
        return module, cls, attributes, tuple((d, tuple(part for pair in d.items() for part in pair)) for d in dicts)

    def holds(self) -> bool:
        """Whether nothing has changed. False if the compiled comparison is unavailable."""
        return _UNCHANGED(self.state) is True


def why_not(module: Any) -> str:
    """The reason why a layer or a BatchNorm cannot be fused; "" if it can."""
    if isinstance(module, _BATCH_NORM):
        if is_norm(module) or norm_of(module) is not None:
            return ""
    elif is_layer(module):
        return ""
    if not is_open(module) or "forward" in vars(module):
        return "it has hooks, or a forward of its own"
    if not _has_plain_tensors(module) or module._parameters.get("weight", module) is None:
        return "its weights are computed, or of a class of their own"
    return f"its class {type(module).__name__} has code of its own, which does not read as torch's"


class Norm(NamedTuple):
    """A recognised BatchNorm. A subclass with its own forward may call a module after normalising: a ``unit`` or an ``other``."""

    module: Any
    unit: nn.Module | None = None
    other: nn.Module | None = None
    reads: tuple[Reads, ...] = ()

    def is_unchanged(self) -> bool:
        if not self.reads:
            return is_norm(self.module)
        if not _has_norm_tensors(self.module):
            return False
        for reads in self.reads:
            if not reads.hold():
                return False
            for module in reads.classes:
                if not is_open(module):
                    return False
        return True


def norm_of(module: nn.Module | None) -> Norm | None:
    """Recognises torch's BatchNorm, or a subclass whose forward computes the same and may call a module at the end, such as
    timm's ``BatchNormAct2d``."""
    if not isinstance(module, _BATCH_NORM) or not _has_norm_tensors(module):
        return None
    if is_norm(module):
        return Norm(module)
    if not module.track_running_stats or module.running_mean is None or module.momentum is None:
        return None
    try:
        traces = [trace(module, (), ("tensor",), {module: training}) for training in (False, True)]
    except Untraceable:
        return None
    ends = [_after_normalising(module, t.graph, training) for t, training in zip(traces, (False, True))]
    if ends[0] is None or ends[0] != ends[1]:
        return None
    after = module.get_submodule(ends[0]) if ends[0] else None
    unit = after if after is not None and is_unit(after) else None
    return Norm(module, unit, None if after is unit else after, tuple(t.reads for t in traces))


_SIGNATURE = inspect.signature(F.batch_norm)


def _after_normalising(module: Any, graph: torch.fx.Graph, training: bool) -> str | None:
    """The path of the module that ``graph`` calls after a batch_norm with ``module``'s tensors; "" if it calls none; None if the
    graph computes something else."""
    x, *nodes = graph.nodes
    known: dict[Any, Any] = {x: "x"}  # values of nodes, by name
    after = None
    for node in nodes:
        if node.op == "get_attr":
            known[node] = node.target
        elif node.op == "call_function" and node.target is F.batch_norm:
            call = _SIGNATURE.bind(*node.args, **node.kwargs)
            call.apply_defaults()
            values = {
                name: known.get(v, v) if isinstance(v, torch.fx.Node) else v for name, v in call.arguments.items()
            }
            affine = {name: name if module._parameters[name] is not None else None for name in ("weight", "bias")}
            expected: dict[str, Any] = {
                "input": "x",
                "running_mean": "running_mean",
                "running_var": "running_var",
                **affine,
            }
            expected |= {"training": training, "momentum": module.momentum if training else values["momentum"]}
            if "y" in known.values() or values != expected | {"eps": module.eps}:
                return None
            known[node] = "y"
        elif node.op == "call_module":
            if known.get(node.args[0] if node.args else None) != "y" or len(node.args) != 1 or node.kwargs or after:
                return None
            known[node], after = "z", str(node.target)
        elif node.op == "output":
            return (after or "") if known.get(node.args[0]) == ("z" if after else "y") else None
        elif not _is_bookkeeping(node, known, training):
            return None
    return None


def _is_bookkeeping(node: torch.fx.Node, known: dict[Any, Any], training: bool) -> bool:
    """True if ``node`` counts batches as BatchNorm does, or reads the input's shape."""
    operands = [known.get(a) for a in node.args if isinstance(a, torch.fx.Node)]
    if node.op == "call_method":
        counts = (node.target, *operands, *node.args[1:]) == ("add_", "num_batches_tracked", 1)
        return training and counts and not node.kwargs
    if node.op != "call_function":
        return False
    if node.target is getattr and operands == ["x"] and node.args[1] in ("ndim", "shape", "dtype"):
        known[node] = "shape"
        return True
    if operands == ["shape"] and getattr(node.target, "__name__", "") in ("eq", "_assert", "getitem"):
        known[node] = "shape"
        return True
    return False


def is_unit(module: Any) -> bool:
    """True if ``module`` has ``ctu_arguments``, and its forward computes exactly that unit."""
    for base in type(module).__mro__:
        members = base.__dict__
        if "ctu_arguments" in members or "forward" in members:
            # A subclass of a unit that overrides forward computes something else.
            both = "ctu_arguments" in members and "forward" in members
            return both and "forward" not in module.__dict__ and is_open(module)
    return False
