"""In-place checks, the same as torch's own, and the version counter.

Autograd detects an overwritten saved tensor by the version counter of its memory. In-place operations increment it once
per call, and refuse tensors without one: inference tensors outside inference mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Terms = Iterable[tuple[int, int]]  # (step, count): any of 0, step, ... (count - 1) * step
SEARCH_LIMIT = 10_000  # partial sums that a search visits before it gives up


def count_write(op: str, name: str, x: Tensor) -> None:
    """Increments the version of ``x``, argument ``name`` of ``op``, before a write. RuntimeError if it has no version."""
    refuse_inference(op, name, x)
    torch._C._increment_version([x])


def refuse_inference(op: str, name: str, x: Tensor) -> None:
    """Raises RuntimeError if ``x``, about to be overwritten, is an inference tensor outside inference mode.

    Called before anything is written; torch's own operations refuse such a tensor only after writing to it.
    """
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: Inplace update to inference tensor outside InferenceMode is not allowed; {name} is one: use inplace=False, "
            f"give {name}.clone(), or call inside of torch.inference_mode()"
        )


def refuse_self_overlap(op: str, name: str, x: Tensor) -> None:
    """Raises ValueError if elements of ``x``, about to be overwritten, share memory with each other."""
    if not x.is_contiguous() and overlaps_itself(x.shape, x.stride()):
        raise ValueError(
            f"{op}: inplace=True needs {name} without overlapping elements, got shape {tuple(x.shape)} with strides "
            f"{tuple(x.stride())}; use inplace=False, or give {name}.clone()"
        )


def refuse_sharing(op: str, names: Sequence[str], tensors: Sequence[Any], elementwise: Sequence[bool]) -> None:
    """Raises ValueError if overwriting the first tensor would change another that is still to be read. An elementwise
    tensor may be the very same one: each value is read before it is written."""
    x = tensors[0]
    if not _has_memory(x):
        return
    begin = x.data_ptr()
    end = begin + _extent(x)
    for i in range(1, len(tensors)):
        t = tensors[i]
        if t is None or not _has_memory(t):
            continue
        first = t.data_ptr()
        if first >= end or (first < begin and first + _extent(t) <= begin) or t.device != x.device:
            continue
        if (elementwise[i] and _same(x, t)) or not _share(x, t, first - begin):
            continue
        raise ValueError(
            f"{op}: {names[i]} must not share memory with {names[0]} when inplace=True, which writes over it; use "
            f"inplace=False, or give {names[i]}.clone()"
        )


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a strided tensor share memory."""
    if 0 in shape:
        return False
    dims = sorted((stride, size) for size, stride in zip(shape, strides) if size != 1)
    extent = 0  # largest offset within the dimensions so far: if every stride exceeds it, no elements overlap
    disjoint = True
    for stride, size in dims:
        if stride == 0:
            return True
        disjoint = disjoint and stride > extent
        extent += stride * (size - 1)
    if disjoint:
        return False
    # Two elements first differ in dimension i, by at least 1, and then by any number of steps either way in later dimensions.
    for i, (stride, size) in enumerate(dims):
        later = [(s, 2 * n - 1) for s, n in dims[i + 1 :]]
        if _reachable(sum(s * (n - 1) for s, n in dims[i + 1 :]) - stride, [(stride, size - 1), *later]):
            return True
    return False


def _has_memory(t: Tensor) -> bool:
    """Whether a tensor has real memory: no meta or fake tensor, and no wrapper subclass."""
    plain = type(t).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    return plain and not t.is_meta and t.numel() > 0


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if t.is_contiguous():
        return t.nbytes
    return t.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())))


def _same(x: Tensor, t: Tensor) -> bool:
    return t.data_ptr() == x.data_ptr() and t.dtype == x.dtype and all(
        a == b or size == 1 for size, a, b in zip(x.shape, x.stride(), t.stride())
    )  # fmt: skip


def _share(x: Tensor, t: Tensor, offset: int) -> bool:
    """Whether ``x`` and ``t``, which starts ``offset`` bytes behind it, have a byte in common."""
    terms = [(stride * x.element_size(), size) for size, stride in zip(x.shape, x.stride())]
    terms += [(-stride * t.element_size(), size) for size, stride in zip(t.shape, t.stride())]
    # the last two terms: byte i of an element of x is byte j of an element of t
    return _reachable(offset, [*terms, (1, x.element_size()), (-1, t.element_size())])


def _reachable(target: int, terms: Terms) -> bool:
    """Whether ``target`` is a sum of one number from each of ``terms``; True if the search takes too long."""
    counts: dict[int, int] = {}
    for step, count in terms:
        if step < 0:  # counted from the other end
            step, target = -step, target - step * (count - 1)
        if step and count > 1:
            counts[step] = counts.get(step, 1) + count - 1
    steps = sorted(counts, reverse=True)
    largest = [0]  # largest[i]: the largest sum of steps i and up
    for step in reversed(steps):
        largest.append(largest[-1] + step * (counts[step] - 1))
    largest.reverse()
    divisors = [math.gcd(*steps[i:]) for i in range(len(steps))]
    stack, left = [(0, target)], SEARCH_LIMIT
    while stack and left:
        left -= 1
        i, rest = stack.pop()
        if not 0 <= rest <= largest[i]:
            continue
        if i == len(steps):
            return True
        if rest % divisors[i]:
            continue
        step = steps[i]
        low, high = max(0, -(-(rest - largest[i + 1]) // step)), min(counts[step] - 1, rest // step)
        stack.extend((i + 1, rest - k * step) for k in range(low, high + 1))
    return bool(stack)
