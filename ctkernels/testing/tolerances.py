"""Tolerances derived from the error of plain torch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(
    name: str, got: Tensor, truth: Tensor, baseline: Tensor, terms: Tensor | float = 0.0, grade: float = 0.0
) -> None:
    """Asserts that ``got`` is as accurate as the same computation in plain torch: its error against the float64 ``truth`` is at
    most twice that of ``baseline`` (largest over the tensor), plus one ulp of the result, plus ``grade`` times ``terms``.

    Args:
        name: name of the result, for the message.
        got: the result to check.
        truth: the float64 result.
        baseline: the result of plain torch in the dtype of ``got``.
        terms: sum of the magnitudes of the summands, for results that nearly cancel. Default 0.
        grade: allowed error relative to ``terms``. Default 0.

    Raises:
        AssertionError: the error is larger.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    if got.numel() == 0:
        return
    truth, exact = truth.double(), got.double()
    baseline_error = (baseline.double() - truth).abs().nan_to_num().max()
    info = torch.finfo(got.dtype)
    bound = 2 * baseline_error + info.eps * truth.abs() + info.tiny + grade * terms
    error = (exact - truth).abs()
    wrong = ~(error <= bound) & ~(exact == truth) & ~(exact.isnan() & truth.isnan())
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values off, first at {at}: got {exact[at].item():.9g}, "
            f"expected {truth[at].item():.9g}, error {error[at].item():.3g}, allowed "
            f"{(bound if bound.dim() == 0 else bound[at]).item():.3g}"
        )
