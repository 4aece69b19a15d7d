"""Checks of a call: values, gradients, shapes and strides, memory, version counters, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ctkernels
from ctkernels import functional
from ctkernels.ops import backends

from . import oracle
from .cases import Case
from .oracle import Exact, Values
from .tensors import Built, Spec, Subclass, build


class Wrong(AssertionError):
    """Raised for a call with a wrong result or side effect."""


def check(case: Case) -> None:
    """Raise Wrong, or the exception of a call that must not raise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(case)
    finally:
        torch.set_num_threads(threads)


def _check(case: Case) -> None:
    built = build(case.arguments)
    before, versions = built.contents(), _versions(built)
    try:
        with _context(case):
            y = _call(case, built)
    except (TypeError, ValueError, RuntimeError) as error:
        if not case.refused:
            raise
        _expect_named(case, error)
        _expect_untouched(case, built, before, versions, written=False)
        return
    if case.refused not in ("", "?"):
        raise Wrong(f"accepted, although {case.refused}")
    _expect_metadata(case, built, y)
    _expect_untouched(case, built, before, versions, written=bool(case.target))
    wants = [name for name, t in built.tensors.items() if t.requires_grad]
    differentiable = case.mode == "grad" and bool(wants)
    if y.requires_grad != (differentiable or (bool(case.target) and case.arguments[case.target].grad)):
        raise Wrong(f"requires_grad is {y.requires_grad}")
    dy, grads = None, {}
    if differentiable:
        dy = _upstream(case, y)
        with _context(case):
            found = torch.autograd.grad(y, [built.tensors[n] for n in wants], dy, allow_unused=True, retain_graph=True)
        grads = {f"d{name}": g for name, g in zip(wants, found) if g is not None}
        if missing := [n for n in wants if f"d{n}" not in grads and _used(case, n)]:
            raise Wrong(f"no gradient for {missing}")
        _expect_gradients(case, built, y, dy, grads)
        _expect_untouched(case, built, before, versions, written=False)
    _expect_values(case, built, y, dy, grads)
    _expect_same_again(case, y, dy, grads)
    # A fake operation takes a hundred times as long as a real one: check a part of the cases, and fewer for the reference,
    # which runs a dozen operations.
    first = next(iter(case.specs.values()))
    if first.seed % (4 if case.backend is None else 16) == 0:
        _expect_same_as_fake(case, y, dy, grads)


def _call(case: Case, built: Built) -> Tensor:
    arguments = {name: built.tensors.get(name, value) for name, value in case.arguments.items()}
    function = getattr(functional, case.op)
    return function(**arguments, **case.options)


@contextlib.contextmanager
def _context(case: Case) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if case.backend is not None:
            stack.enter_context(ctkernels.use_backend(case.backend))
        if case.mode == "inference":
            stack.enter_context(torch.inference_mode())
        elif case.mode == "no_grad":
            stack.enter_context(torch.no_grad())
        yield


def _used(case: Case, name: str) -> bool:
    """Whether the result depends on an argument at all."""
    return name != "negative_slope" or case.options.get("activation") in ("leaky_relu", "prelu")


def _upstream(case: Case, y: Tensor) -> Tensor:
    if case.upstream == "expanded":
        return torch.full((), 0.75, dtype=y.dtype).expand(y.shape)
    if case.upstream == "zero":
        return torch.zeros(y.shape, dtype=y.dtype)
    generator = torch.Generator().manual_seed(5)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return (dy + dy.sign() * 0.01).to(y.dtype)


# ---- memory -----------------------------------------------------------------------------------------------------------


def _versions(built: Built) -> dict[str, int]:
    return {name: t._version for name, t in built.tensors.items() if not t.is_inference()}


def _expect_untouched(
    case: Case, built: Built, before: dict[str, Tensor], versions: dict[str, int], written: bool
) -> None:
    """Check that only the elements of the target changed, and that its version increased by one."""
    target = case.target if written else ""
    shared = {n for n, s in case.specs.items() if target and (n == target or s.alias == target)}
    for name, version in versions.items():
        moved = built.tensors[name]._version - version
        if moved != (1 if name in shared else 0):
            raise Wrong(f"the version counter of {name} moved by {moved}")
    for name, buffer in built.buffers.items():
        now, then = buffer.detach().clone(), before[name]
        if name == target:
            spec = case.arguments[name]
            for whole in (now, then):
                if spec.count:
                    whole.as_strided(spec.shape, spec.strides, spec.offset).zero_()
        if not _same_bits(now, then):
            what = f"memory around {name}" if name == target else name
            raise Wrong(f"{what} was written to")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) and not a.is_floating_point():
        return True
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(*(t.reshape(-1, 1).view(integer) if t.numel() else t for t in (a, b)))


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.numel() else 0


def _plain(t: Tensor) -> Tensor:
    return t.detach().as_subclass(Tensor).resolve_neg()


def _expect_metadata(case: Case, built: Built, y: Tensor) -> None:
    first = built.tensors[next(iter(case.arguments))]
    if case.target:
        if y is not first:
            raise Wrong("written in place, the result is not the argument")
        return
    shape, dtype = tuple(first.shape), first.dtype
    if case.op in ("hard_concrete", "expected_l0") and dtype != torch.float64:
        dtype = torch.float32
    for second in ("residual", "up"):
        if second in built.tensors:
            dtype = torch.promote_types(dtype, built.tensors[second].dtype)
    if case.op == "ctu_and_mul" and case.arguments["up"] is None:
        shape = tuple(first.chunk(2, case.options.get("channel_dim", -1))[0].shape)
    if case.op == "attention_head_edit":
        shape = (*shape[:-1], built.tensors["v"].shape[-1])
    if (tuple(y.shape), y.dtype) != (shape, dtype):
        raise Wrong(f"the result is {tuple(y.shape)} {y.dtype}, expected {shape} {dtype}")
    if y.numel() and _storage(y) in {_storage(b) for b in built.buffers.values()}:
        raise Wrong("the result shares memory with an argument")
    if isinstance(first, Subclass) and not isinstance(y, Subclass):
        raise Wrong(f"the result is a {type(y).__name__}; torch's own functions keep a subclass")


# ---- errors -----------------------------------------------------------------------------------------------------------


def _expect_named(case: Case, error: Exception) -> None:
    """Check that the message names an argument, unless it is torch's own about inference tensors."""
    text = str(error)
    names = {*case.arguments, *case.options, "x", "z", "beta", "coeff", "channel_dim", "index", "m", "a", "residual"}
    if not text or not (
        any(name in text for name in names if len(name) > 1) or f"{case.op}:" in text or "nference" in text
    ):
        raise Wrong(f"{type(error).__name__} names no argument: {text[:200]!r}") from error


# ---- values -----------------------------------------------------------------------------------------------------------


def _expect_values(case: Case, built: Built, y: Tensor, dy: Tensor | None, grads: dict[str, Tensor]) -> None:
    if case.op == "attention_head_edit":
        _expect_attention(case, y, dy, grads)
        return
    fresh = build(case.arguments).tensors if case.target else built.tensors
    arrays = {name: oracle.wide(t) for name, t in fresh.items()}
    for name, value in case.arguments.items():
        if name not in arrays and value is not None:
            arrays[name] = np.asarray(np.float64(value), oracle.WIDE)
    plain = case.backend == "reference" or backends.NATIVE is None
    values = Values(arrays, {name: t.dtype for name, t in fresh.items()}, plain)
    with np.errstate(all="ignore"):
        exact = getattr(oracle, case.op)(values, case.options, None if dy is None else oracle.wide(dy))
        for name, got in {"y": y, **grads}.items():
            if name in exact:
                _expect(name, got, exact[name])


def _expect(name: str, got: Tensor, exact: Exact) -> None:
    """Check ``got`` to the allowed error plus the rounding of its dtype, and its NaN and infinities."""
    g, info = oracle.wide(got), torch.finfo(got.dtype)
    value, free = np.broadcast_to(exact.value, g.shape), np.broadcast_to(exact.free, g.shape)
    rounding = info.eps * np.abs(value) + info.tiny * info.eps
    error = np.where(np.isnan(value) | free, 0, np.broadcast_to(exact.error, g.shape))
    assert np.isfinite(error).all(), f"the oracle promises nothing of {name}, and does not say so"
    close = np.abs(g - value) <= error + rounding
    largest = oracle.WIDE(info.max)
    over = np.abs(value) + error >= largest * (1 - 2 * info.eps)  # may be rounded to infinity
    close |= over & (np.abs(g) >= largest * (1 - 4 * info.eps) - error) & (np.sign(g) == np.sign(value))
    wrong = ~(close | free | (g == value) | (np.isnan(g) & np.isnan(value)))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise Wrong(
            f"{name}: {int(wrong.sum())} of {g.size} values off, first at {at}: got {float(g[at]):.9g}, expected "
            f"{float(value[at]):.9g}, allowed {float((error + rounding)[at]):.3g}"
        )


def _expect_gradients(case: Case, built: Built, y: Tensor, dy: Tensor, grads: dict[str, Tensor]) -> None:
    """Check that gradients have their arguments' shapes and dtypes, and share no memory when stored in ``.grad``."""
    for name, grad in grads.items():
        t = built.tensors[name[1:]]
        if grad.shape != t.shape or grad.dtype != t.dtype:
            raise Wrong(f"{name} is {tuple(grad.shape)} {grad.dtype}, its argument {tuple(t.shape)} {t.dtype}")
    with _context(case):
        y.backward(dy, retain_graph=True)
    places: dict[int, str] = {}
    for name in grads:
        kept = built.tensors[name[1:]].grad
        assert kept is not None
        if not _same_bits(_plain(kept), _plain(grads[name])) and _unaliased(case, name[1:]):
            raise Wrong(f"{name} of backward() has other bits than of grad()")
        if kept.numel() and (other := places.setdefault(_storage(kept), name)) != name:
            raise Wrong(f"{name} and {other} share memory")


def _unaliased(case: Case, name: str) -> bool:
    return not any(s.alias == name or (n == name and s.alias) for n, s in case.specs.items())


def _expect_attention(case: Case, y: Tensor, dy: Tensor | None, grads: dict[str, Tensor]) -> None:
    """Check to twice the error of plain torch, plus an ulp of the largest value per term of a sum."""
    fresh = {name: _plain(t) for name, t in build(case.arguments).tensors.items()}
    q, k = fresh["q"], fresh["k"]
    wants = [name[1:] for name in grads]

    def run(dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Compute in ``dtype``, or in the tensors' own; 16-bit types are widened, as in the edit."""
        mask = {"attn_mask": q.dtype}
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {n: t.clone().to(dtype or mask.get(n, t.dtype)) for n, t in fresh.items()}
            for n in wants:
                leaves[n].requires_grad_()
            used = dtype or torch.promote_types(q.dtype, torch.float32)
            out = oracle.attention({n: t.to(used) for n, t in leaves.items()}, case.options)
            found = {"y": out.detach()}
            if dy is not None:
                back = torch.autograd.grad(out, [leaves[n] for n in wants], dy.to(out.dtype), allow_unused=True)
                found |= {f"d{n}": g for n, g in zip(wants, back) if g is not None}
        return found

    truth, plain = run(torch.float64), run(None)
    # A weight of 0 need not mask a NaN that the edit puts into the gradient: torch's attention does not either.
    poisoned = any(not fresh[n].isfinite().all() for n in ("m", "g_m") if n in fresh)
    terms = q.shape[2] * q.shape[1] + k.shape[2] + q.shape[-1] + fresh["v"].shape[-1]
    eps = torch.finfo(q.dtype).eps
    for name, got in {"y": y, **grads}.items():
        exact, g = truth[name].double(), _plain(got).double()
        if exact.numel() == 0:
            continue
        base = (plain[name].double() - exact).abs().nan_to_num().max()
        finite = exact[exact.isfinite()]
        largest = finite.abs().max() if finite.numel() else 0.0
        allowed = 2 * base + 4 * terms * eps * (1 + largest)
        bad = ~((g - exact).abs() <= allowed) & ~(g == exact) & ~(g.isnan() & exact.isnan())
        bad &= ~(exact.isinf() | (exact.abs() > 1e30))
        if poisoned and name in ("dq", "dk"):
            bad &= ~g.isnan()
        if bad.any():
            at = tuple(int(i) for i in bad.nonzero()[0])
            raise Wrong(
                f"{name}: at {at} got {g[at].item():.6g}, expected {exact[at].item():.6g}, allowed {float(allowed):.2g}"
            )


# ---- again, and as a fake ---------------------------------------------------------------------------------------------


def _run_again(case: Case, built: Built, dy: Tensor | None, names: list[str]) -> dict[str, Tensor]:
    with _context(case):
        y = _call(case, built)
        found = {"y": y}
        if dy is not None:
            grads = torch.autograd.grad(y, [built.tensors[n] for n in names], dy, allow_unused=True)
            found |= {f"d{n}": g for n, g in zip(names, grads) if g is not None}
    return found


def _expect_same_again(case: Case, y: Tensor, dy: Tensor | None, grads: dict[str, Tensor]) -> None:
    """Check that a second run with another number of threads gives the same bits."""
    names = [name[1:] for name in grads]
    compiled = case.backend is None and backends.NATIVE is not None  # torch's own kernels depend on the threads
    if compiled and max(s.count for s in case.specs.values()) > 4000:
        torch.set_num_threads(3 - min(case.threads, 2))
    try:
        again = _run_again(case, build(case.arguments), dy, names)
    finally:
        torch.set_num_threads(case.threads)
    for name, first in {"y": y, **grads}.items():
        if case.op == "attention_head_edit" and first.dtype not in (torch.float64,):
            continue  # torch's own kernels, which are not deterministic
        if not _same_bits(_plain(first), _plain(again[name])):
            raise Wrong(f"{name} has other bits in a second run")


def _expect_same_as_fake(case: Case, y: Tensor, dy: Tensor | None, grads: dict[str, Tensor]) -> None:
    """Check that fake tensors have the same shapes, dtypes and strides."""
    if any(s.subclass or s.inference or s.negative for s in case.specs.values()) or case.mode == "inference":
        return
    built = build(case.arguments)
    names = [name[1:] for name in grads]
    leaves = {name: t.detach() for name, t in built.tensors.items()}
    with FakeTensorMode() as mode:
        mode.cache_enabled = False  # cases rarely share operations, so caching costs more than it saves
        fakes = Built({name: mode.from_tensor(t) for name, t in leaves.items()})
        for name, t in built.tensors.items():
            fakes.tensors[name].requires_grad_(t.requires_grad)
        for name, spec in case.specs.items():
            if spec.alias and built.tensors[name] is built.tensors[spec.alias]:
                fakes.tensors[name] = fakes.tensors[spec.alias]
        found = _run_again(case, fakes, None if dy is None else mode.from_tensor(dy), names)
    for name, real in {"y": y, **grads}.items():
        fake = found[name]
        told, seen = _layout(fake), _layout(real)
        if told != seen:
            raise Wrong(f"{name}: a compiler is told shape, dtype and strides {told}, and gets {seen}")


def _layout(t: Tensor) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]:
    """Shape, dtype and the strides of dimensions with more than one element."""
    strides = tuple(s if n > 1 else 0 for s, n in zip(t.stride(), t.shape)) if t.numel() else ()
    return tuple(t.shape), t.dtype, strides


def replace(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


def respec(case: Case, name: str, **changes: Any) -> Case:
    spec = case.arguments[name]
    assert isinstance(spec, Spec)
    return replace(case, arguments={**case.arguments, name: dataclasses.replace(spec, **changes)})
