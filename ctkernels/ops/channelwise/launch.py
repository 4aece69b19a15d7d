"""Launches of the channelwise Triton kernels. Imported on the first CUDA call, never by ``import ctkernels``.

A plan holds everything that calls with tensors of the same sizes, strides, dtypes and devices have in common. It is made once;
a call allocates its results and launches. The partition depends on the tensor's shape alone, so that results are the same bits on
every device and in every run.
"""

from __future__ import annotations

import importlib
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import launcher, layout
from ..record import Attrs, Inputs, Kernels, Op
from .kernels import Math, reduce_shared_kernel
from .partition import Partition, partition_for

PARAMS = 5  # parameters of the kernels
LANES = 1024  # most lanes of a program that reduces
PLANS = 1024  # most plans per op, since a process can see any number of shapes

Strides = tuple[int, ...]


def _numbered(letter: str) -> tuple[str, ...]:
    return tuple(f"{letter}{i}" for i in range(PARAMS))


# The tensors of a call, by the kernels' names for them; results are in the order of the inputs. b: the gradients of shared
# parameters, per channel.
READ = ("x", "residual", "factor", "dy", *_numbered("p"))
RESULTS = ("out", *_numbered("d"), "dresidual", "dfactor")
SCRATCH = ("partial", *_numbered("b"))
ABSENT = "absent"
INDICES = {name: i for i, name in enumerate((*READ, *RESULTS, *SCRATCH, ABSENT))}
OUT = INDICES["out"]


class _Read(NamedTuple):
    """A tensor that kernels read. source: its index among the inputs and dy, which is last. strides: those of a copy, or None to
    read it as it is."""

    source: int
    strides: Strides | None


class _Result(NamedTuple):
    """A tensor that kernels write, with the dtype of tensor ``source`` of the inputs and dy. final: strides of the copy to
    return, or None to return it as it is."""

    source: int
    shape: tuple[int, ...]
    strides: Strides
    final: Strides | None


class _Scratch(NamedTuple):
    size: int
    dtype: torch.dtype


def _copy(t: Tensor, strides: Strides) -> Tensor:
    return t.new_empty_strided(t.shape, strides).copy_(t)


def _unless_equal(t: Tensor, strides: Strides) -> Strides | None:
    """``strides``, or None if ``t`` has them; strides of dimensions of size 1 do not matter."""
    return None if all(size == 1 or a == b for size, a, b in zip(t.shape, t.stride(), strides)) else strides


class _Operands:
    """The operands of a call as kernels take them: a dense x, its view, and how the parameters vary in it."""

    def __init__(self, op: Op, math: Math, inputs: Inputs, attrs: Attrs):
        count = len(op.elementwise_flags) - len(op.elementwise)
        x, self.second_index = inputs[0], 1 + count
        self.params = [*inputs[1 : 1 + count], *[None] * (PARAMS - count)]
        self.second = inputs[1 + count] if len(inputs) > 1 + count else None
        rows = [p.shape[0] if p is not None and p.dim() == 2 else 1 for p in self.params]
        values = [p.shape[-1] if p is not None and p.dim() else 1 for p in self.params]
        per_group = any(r > 1 for r in rows)
        shared = all(v == 1 for v in values)
        view: layout.View | None
        if math.factor and self.second is None:
            x = x.contiguous()
            view = layout.packed_view_of(x, attrs[0], shared, per_group)
        else:
            channel_dim = layout.NO_CHANNEL if shared else attrs[0]
            view = layout.view_of(x, channel_dim, per_group)
            if view is None:
                x = x.contiguous()
                view = layout.view_of(x, channel_dim, per_group)
                assert view is not None
        self.math, self.x, self.view, self.attrs = math, x, view, tuple(attrs[1:])
        # The numbers of a call, which are 0-d and on the CPU, are passed by value.
        self.numbers = [p is not None and p.dim() == 0 and p.is_cpu for p in self.params]
        self.rows = tuple(0 if 1 < r == view.groups else r for r in rows)
        self.runs = tuple(view.channels // v if v > 1 else 0 for v in values)
        self.precision = {torch.float32: 0, torch.float64: 2}.get(x.dtype, 1)

    def meta(self) -> dict[str, Any]:
        """The constexpr arguments of kernels that read parameters."""
        numbers = sum(1 << i for i, number in enumerate(self.numbers) if number)
        meta = {"ATTRS": self.attrs, "FALLBACKS": self.math.fallbacks, "NUMBERS": numbers}
        return meta | {"ROWS": self.rows, "RUNS": self.runs}


class _Plan:
    """The copies, results and launches of a call: of the op, or of the gradients in ``grad_mask`` if there is a ``dy``."""

    def __init__(
        self, op: Op, math: Math, inputs: Inputs, attrs: Attrs, dy: Tensor | None, grad_mask: int, inplace: bool
    ):
        operands = _Operands(op, math, inputs, attrs)
        x, view, params, second_index = operands.x, operands.view, operands.params, operands.second_index
        like = op.like(inputs, attrs)
        y = x.new_empty(like.shape) if view.packed else layout.result_like(x)
        second, dsecond = ("factor", "dfactor") if math.factor else ("residual", "dresidual")
        self._read: list[_Read | None] = [None] * len(READ)
        self._results: list[_Result | None] = [None] * len(RESULTS)
        self._scratch: list[_Scratch | None] = [None] * len(SCRATCH)
        self._launches: list[tuple[launcher.Repeated, itemgetter[Any], bool]] = []  # whether with numbers
        self._inplace, self._empty = inplace, x.numel() == 0
        self._numbers = [1 + i if number else 0 for i, number in enumerate(operands.numbers)]  # their indices, or 0

        self._reads("x", 0, inputs[0], x.stride())
        self._reads("dy", -1, dy, y.stride())
        self._reads(second, second_index, operands.second, x.stride())
        for i, p in enumerate(params):
            if p is not None and not operands.numbers[i]:
                self._reads(f"p{i}", 1 + i, p, layout.parameter_like(p).stride())
        if dy is None and not inplace:
            self._writes("out", 0, y, layout.result_like(like))
        for name, index in (("out", 0), (dsecond, second_index)):
            if grad_mask >> index & 1:
                self._writes(name, 0, layout.result_like(x), layout.result_like(inputs[0]))
        grads = [
            layout.parameter_like(p) if p is not None and grad_mask >> 1 + i & 1 else None for i, p in enumerate(params)
        ]
        for i, grad in enumerate(grads):
            if grad is not None:
                self._writes(f"d{i}", 1 + i, grad, grad)
        if not self._empty:
            self._plan_launches(operands, [None if g is None else g.numel() for g in grads])

    def _reads(self, name: str, index: int, t: Tensor | None, strides: Strides) -> None:
        if t is not None:
            self._read[READ.index(name)] = _Read(index, _unless_equal(t, strides))

    def _writes(self, name: str, index: int, t: Tensor, final: Tensor) -> None:
        """A result of the shape and strides of ``t``, returned with those of ``final``."""
        self._results[RESULTS.index(name)] = _Result(index, t.shape, t.stride(), _unless_equal(t, final.stride()))

    def _plan_launches(self, operands: _Operands, sizes: list[int | None]) -> None:
        """One pass over x; where it leaves partial sums, or parameters are shared, launches that reduce those. ``sizes``: of the
        gradients of parameters."""
        math, view, x = operands.math, operands.view, operands.x
        sum_mask = 0
        for i, size in enumerate(sizes):
            sum_mask |= math.sums[i] if size is not None else 0
        part = partition_for(view, x.element_size(), sums=sum_mask > 0)
        per_channel = view.groups * view.channels
        shared = [size is not None and size != per_channel for size in sizes]
        names = {f"d{i}": f"b{i}" for i, s in enumerate(shared) if s}
        for name in names.values():
            self._scratch[SCRATCH.index(name)] = _Scratch(per_channel, torch.float64)
        meta = operands.meta() | part.meta()
        meta |= {"PROLOGUE": math.prologue, "FACTOR": math.factor, "PACKED": view.packed}
        meta |= {"PRECISION": operands.precision, "SUM_MASK": sum_mask}
        if not sum_mask or part.one_pass:
            self._launch(math.channelwise_kernel, part.programs, part.args(view), meta, names)
        else:
            dtype = torch.float64 if operands.precision == 2 else torch.float32
            size = view.groups * part.slots * sum_mask.bit_count() * part.columns(view)
            self._scratch[SCRATCH.index("partial")] = _Scratch(size, dtype)
            absent = dict.fromkeys(_numbered("d"), ABSENT)
            self._launch(math.channelwise_kernel, part.programs, part.args(view), meta, absent)
            self._reduce_partials(operands, part, sum_mask, names)
        if names:
            self._reduce_shared(operands, [size if s else None for s, size in zip(shared, sizes)])

    def _reduce_partials(self, operands: _Operands, part: Partition, sum_mask: int, names: dict[str, str]) -> None:
        view = operands.view
        repeat, inner = (1, 1) if part.plane else (part.repeat, view.inner)
        channels = view.channels
        # with few channels: many programs of few channels each
        lanes = min(max(triton.next_power_of_2(triton.cdiv(channels, 256)), 4), 16, triton.next_power_of_2(channels))
        args = {
            "channels": channels,
            "inner": inner,
            "length": part.columns(view),
            "slots": part.slots,
            "repeat": repeat,
        }
        terms = min(LANES // lanes, triton.next_power_of_2(part.slots * repeat * inner))
        meta = operands.meta() | {"SUM_MASK": sum_mask, "TERMS": terms, "LANES": lanes, "num_warps": 4}
        grid = view.groups * triton.cdiv(channels, lanes)
        self._launch(operands.math.reduce_partials_kernel, grid, args, meta, names)

    def _reduce_shared(self, operands: _Operands, sizes: list[int | None]) -> None:
        view = operands.view
        counts = [size for size in sizes if size is not None]
        lanes = max(32, min(LANES, triton.next_power_of_2(view.groups * view.channels // min(counts))))
        meta = {"ROWS": operands.rows, "RUNS": operands.runs, "LANES": lanes, "num_warps": min(4, lanes // 32)}
        names = {f"d{i}": ABSENT for i, size in enumerate(sizes) if size is None}
        self._launch(reduce_shared_kernel, max(counts), {"groups": view.groups, "channels": view.channels}, meta, names)

    def _launch(
        self, kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any], names: dict[str, str]
    ) -> None:
        """A launch. ``names``: of the kernel's tensors that are others of the call's."""
        numbers = [name for name in _numbered("v") if name in kernel.arg_names]
        repeated = launcher.Repeated(kernel, grid, args, meta, numbers)
        select = itemgetter(*(INDICES[names.get(name, name)] for name in repeated.tensors))
        self._launches.append((repeated, select, bool(numbers)))

    def __call__(self, inputs: Inputs, dy: Tensor | None = None) -> list[Tensor]:
        """The results, gradients in the order of the inputs."""
        operands: tuple[Any, ...] = (*inputs, dy)
        tensors: list[Any] = [
            None if r is None else operands[r.source] if r.strides is None else _copy(operands[r.source], r.strides)
            for r in self._read
        ]
        x = tensors[0]
        results: list[Any] = [
            None if r is None else operands[r.source].new_empty_strided(r.shape, r.strides) for r in self._results
        ]
        scratch = [None if s is None else x.new_empty(s.size, dtype=s.dtype) for s in self._scratch]
        tensors += [*results, *scratch, None]
        if self._inplace:
            tensors[OUT] = x
        numbers = [operands[i].item() if i else 0.0 for i in self._numbers]
        with launcher.guard(x):
            for launch, select, with_numbers in self._launches:
                launch(select(tensors), numbers if with_numbers else ())
        if self._inplace and x is not inputs[0]:
            inputs[0].copy_(x)
        if self._empty:
            for grad in results[1 : 1 + PARAMS]:
                if grad is not None:
                    grad.zero_()
        return [t if r.final is None else _copy(t, r.final) for t, r in zip(results, self._results) if r is not None]


class _Plans:
    """The kernels of an op, with the plans of the calls so far."""

    def __init__(self, op: Op, math: Math):
        self.op, self.math = op, math
        self.count = len(op.elementwise_flags)
        self.plans: dict[tuple[Any, ...], _Plan] = {}

    def plan(self, args: tuple[Any, ...], dy: Tensor | None = None, grad_mask: int = 0, inplace: bool = False) -> _Plan:
        inputs, attrs = args[: self.count], args[self.count :]
        tensors = [None if t is None else (t.dtype, t.get_device(), t.shape, t.stride()) for t in (*inputs, dy)]
        key = (grad_mask, inplace, attrs, *tensors)
        plan = self.plans.get(key)
        if plan is None:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            plan = self.plans[key] = _Plan(self.op, self.math, inputs, attrs, dy, grad_mask, inplace)
        return plan

    def forward(self, *args: Any) -> Tensor:
        return self.plan(args)(args[: self.count])[0]

    def run_inplace(self, *args: Any) -> None:
        self.plan(args, inplace=True)(args[: self.count])

    def backward(self, dy: Tensor, *args: Any) -> list[Tensor]:
        return self.plan(args[:-1], dy, args[-1])(args[: self.count], dy)


@cache
def implementation(op: Op) -> Kernels:
    """The Triton kernels of ``op``, as functions with the dispatcher ops' signatures."""
    assert op.triton is not None
    module = importlib.import_module(op.triton)
    if not hasattr(module, "MATH"):  # the module launches its own kernels
        return Kernels(module.forward, None, module.backward)
    plans = _Plans(op, module.MATH)
    return Kernels(plans.forward, plans.run_inplace, plans.backward)
