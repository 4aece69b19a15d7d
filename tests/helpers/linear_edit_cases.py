"""Calls of `head_edit_linear`, and the check of their results."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ctkernels.functional import head_edit
from ctkernels.ops.head_edit_linear import reference

NAMES = ("m", "a", "g_m", "g_a")
PARTS = [NAMES, ("m", "a"), ("m", "g_m"), ("m",), ("a", "g_a"), ("a",), ("m", "a", "g_m"), ("m", "a", "g_a")]
HEADS = 3


def tensors(dtype=torch.float64, parts=NAMES, rows=(2, 7), bias=True, m=None, size=8, outputs=10):
    """(z, weight, bias, edits); float32 edits for dtypes of 16 bits, as a layer has them. m: of the first value of each head."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"m": (HEADS, size), "a": (HEADS, size), "g_m": (HEADS,), "g_a": (HEADS,)}
    made = {name: 0.3 * values(*shape) for name, shape in shapes.items()}
    if m is not None:
        made["m"][:, 0], made["g_m"] = torch.tensor(m, dtype=torch.float64), torch.ones(HEADS, dtype=torch.float64)
    edits = tuple(made[name].to(wide) if name in parts else None for name in NAMES)
    z, weight, offset = values(*rows, HEADS * size), values(outputs, HEADS * size), values(outputs)
    return z.to(dtype), weight.to(dtype), offset.to(dtype) if bias else None, edits


def separate(z, weight, bias, edits):
    return F.linear(head_edit(z, *edits), weight, bias)


def observed(function, z, weight, bias, edits):
    """Result and gradients by name."""
    leaves = {"z": z, **dict(zip(NAMES, edits))}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items() if t is not None}
    y = function(leaves["z"], weight, bias, tuple(leaves.get(name) for name in NAMES))
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream(y))))


def upstream(y):
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


def _wide(case):
    z, weight, bias, edits = case
    return (
        *(t if t is None else t.double() for t in (z, weight, bias)),
        tuple(t if t is None else t.double() for t in edits),
    )


def _bounds(case, dtype):
    """{name: bound of the error}. A term is rounded to ``dtype`` at most four times: the weights scaled by p or q, their product
    or the sum over them, a correction, the result. Sums are in float32 or wider, with a rounding for each term of each sum."""
    z, weight, bias, edits = _wide(case)
    z, weight, bias, *edits = (t if t is None else t.abs() for t in (z, weight, bias, *edits))
    y = reference.forward(z, weight, bias, edits)
    magnitudes = {"y": y, **dict(zip(("z", *NAMES), reference.backward(upstream(y).abs(), z, weight, edits)))}
    terms = z.numel() // z.shape[-1] + z.shape[-1] + weight.shape[0]
    unit, sums = (torch.finfo(t).eps / 2 for t in (dtype, torch.promote_types(dtype, torch.float32)))
    return {name: (4 * unit + terms * sums) * value for name, value in magnitudes.items() if value is not None}


def check(case, dtype, found):
    """Compare results and gradients with the edit in a pass of its own, in float64."""
    truth, bounds = observed(separate, *_wide(case)), _bounds(case, dtype)
    assert list(found) == list(truth)
    for name, value in found.items():
        assert value.dtype == (dtype if name in "yz" else torch.promote_types(dtype, torch.float32))
        error = (value.double() - truth[name]).abs()
        assert (error <= bounds[name]).all(), (name, (error / bounds[name]).max())
