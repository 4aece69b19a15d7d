"""The error bound of every backend: relative to float64, from the error of the same computation in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

import ctkernels
from ctkernels.ops.record import Op
from ctkernels.testing import Sample, assert_no_worse, samples


def sample_named(name: str, dtype: torch.dtype = torch.float32) -> Sample:
    """The sample with this name, of :func:`ctkernels.testing.samples`."""
    return next(s for s in samples(dtype) if s.name == name)


def upstream(y: Tensor) -> Tensor:
    """A gradient for ``y``, the same on every device."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


def outputs(sample: Sample, dy: Tensor | None = None) -> dict[str, Tensor]:
    """The result and the gradient of every tensor argument."""
    leaves = sample.requiring_grad()
    y = leaves()
    dy = upstream(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.tensors().values()), dy, allow_unused=True)
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(leaves.tensors(), grads) if g is not None}}


class Expected:
    """The expected :func:`outputs` of a sample, computed once to check many results.

    The bound is that of :func:`ctkernels.testing.assert_no_worse`, with these sums of magnitudes as ``terms``:

        y                             |y| and, for every argument t, |t dy/dt|, the effect of rounding the arguments
        elementwise gradient          the upstream gradient times the largest slope; of a packed tensor, for each half
        gradient of a parameter       the sum of the same magnitudes over its terms: |upstream| (|J| + |t dJ/dt|)

    J = dy/dt comes from forward mode: a value of y depends on one value of each parameter, so one tangent of ones suffices.
    """

    def __init__(self, sample: Sample):
        self.sample, self.dtype = sample, sample.args[0].dtype
        self.grade = 2e-4 if self.dtype in (torch.bfloat16, torch.float16) else 4 * torch.finfo(self.dtype).eps
        self.least = 1e-303 if self.dtype == torch.float64 else 0.0  # e^-700, where exponentials are flushed to zero
        wide = sample.map(lambda _, t: t.double())
        with ctkernels.use_backend("reference"):
            dy = upstream(sample())
            self.truth, self.baseline = outputs(wide, dy), outputs(sample, dy)
            dy = dy.double()
            arguments = {name: t.clone() for name, t in wide.tensors().items()}

            def call(t: dict[str, Tensor]) -> Tensor:
                return wide.map(lambda name, _: t[name])()

            def slope(name: str, t: dict[str, Tensor]) -> Tensor:
                return _tangent(call, t, name, torch.ones_like(t[name]))

            def steepest(name: str, direction: Tensor) -> Tensor:
                slopes = _tangent(call, arguments, name, direction)
                return dy.abs() * slopes.abs().nan_to_num().max() if slopes.numel() else dy

            self.terms = {"y": call(arguments).abs() + _moved(call, arguments)}
            for key in self.truth.keys() - {"y"}:
                argument = arguments[key[1:]]
                packed = _packed_dim(argument, dy)
                if argument.shape == dy.shape:
                    self.terms[key] = steepest(key[1:], torch.ones_like(argument))
                elif packed is not None:
                    one, none = torch.ones_like(dy), torch.zeros_like(dy)
                    directions = (torch.cat(pair, packed) for pair in ((one, none), (none, one)))
                    self.terms[key] = torch.cat([steepest(key[1:], d) for d in directions], packed)
                else:
                    slopes = slope(key[1:], arguments)
                    with mock.patch.object(Op, "__call__", Op.strided_forward):  # nested forward mode: plain torch
                        moved = _moved(partial(slope, key[1:]), arguments)
                    times = 1 + (moved / slopes.abs()).nan_to_num(0, 0, 0)
                    self.terms[key] = outputs(wide, dy.abs() * times * slopes.sign())[key].abs()

    def bound(self, key: str) -> Tensor:
        """The allowed error of a result, without the ulp of its own dtype."""
        error = (
            (self.baseline[key].double() - self.truth[key]).abs().nan_to_num().max() if self.truth[key].numel() else 0.0
        )
        return 2 * error + self.grade * self.terms[key] + self.least + torch.finfo(torch.float32).tiny

    def check(self, found: dict[str, Tensor]) -> None:
        """Raise AssertionError with the first value out of bounds."""
        assert found.keys() == self.truth.keys()
        for key, value in found.items():
            argument = self.sample.tensors().get(key[1:])
            assert value.dtype == (self.dtype if key == "y" else argument.dtype)
            name, terms = f"{self.sample.name}: {key}", self.terms[key] + self.least / self.grade
            assert_no_worse(name, value.cpu(), self.truth[key], self.baseline[key], terms, self.grade)


Function = Callable[[dict[str, Tensor]], Tensor]


def _packed_dim(t: Tensor, y: Tensor) -> int | None:
    """The dimension along which ``t`` packs two tensors of y's shape, or None."""
    if t.dim() != y.dim():
        return None
    longer = [d for d in range(y.dim()) if t.shape[d] != y.shape[d]]
    return longer[0] if len(longer) == 1 and t.shape[longer[0]] == 2 * y.shape[longer[0]] else None


def _tangent(function: Function, t: dict[str, Tensor], name: str, direction: Tensor) -> Tensor:
    """The derivative of ``function(t)`` in a direction of one argument."""
    return torch.func.jvp(lambda value: function(t | {name: value}), (t[name],), (direction,))[1]


def _moved(function: Function, t: dict[str, Tensor]) -> Tensor:
    """|t dy/dt| summed over arguments: with the result's own magnitude, the natural unit of its error."""
    return sum((_tangent(function, t, name, t[name]).abs().nan_to_num(0, 0, 0) for name in t), torch.zeros(()))


def check_against_float64(sample: Sample, found: dict[str, Tensor]) -> None:
    """Check ``found``, the :func:`outputs` of the sample, on any device."""
    Expected(sample).check(found)
