"""The head edit: against a per-head loop, in place, adapters mixed in a batch, under compile, and bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from ctkernels.functional import head_edit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

H, D = 4, 6


def _by_head(z, m, a, g_m, g_a):
    """One head after the other, as the method is published. z: (..., H * D)."""
    heads = [(1 + g_m[h] * m[h]) * z[..., h * D : (h + 1) * D] + g_a[h] * a[h] for h in range(H)]
    return torch.cat(heads, -1)


def _parameters(*lead):
    return [torch.randn(*lead, H, D), torch.randn(*lead, H, D), torch.rand(*lead, H), torch.rand(*lead, H)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_loop_over_heads(backend, dtype):
    z, parameters = torch.randn(3, 7, H * D).to(dtype), _parameters()
    found = head_edit(z, *parameters)
    expected = _by_head(z.double(), *(p.double() for p in parameters))
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= torch.finfo(dtype).eps * (4 + 4 * z.double().abs())).all()


def test_closed_gates_are_the_identity(backend):
    z, (m, a, _, _) = torch.randn(2, 5, H * D), _parameters()
    closed = torch.zeros(H)
    assert torch.equal(head_edit(z, m, a, closed, closed), z)
    huge = torch.full_like(m, 1e300, dtype=torch.float64)  # infinite in the precision of z
    assert torch.equal(head_edit(z, huge, -huge, closed.double(), closed), z)


def test_all_layouts_agree(backend):
    z, parameters = torch.randn(2, 5, H * D), _parameters()
    flat = head_edit(z, *parameters)
    split = head_edit(z.unflatten(-1, (H, D)), *parameters)
    assert torch.equal(split.flatten(-2), flat)
    heads_first = z.unflatten(-1, (H, D)).transpose(1, 2)
    assert torch.equal(head_edit(heads_first, *parameters, head_axis=1).transpose(1, 2).flatten(-2), flat)
    contiguous = head_edit(heads_first.contiguous(), *parameters, head_axis=1)
    assert contiguous.is_contiguous()
    assert torch.equal(contiguous.transpose(1, 2).flatten(-2), flat)


def test_several_adapters_in_one_batch(backend):
    z, adapters = torch.randn(4, 5, H * D), _parameters(3)
    index = torch.tensor([2, 0, 0, 1])
    together = head_edit(z, *adapters, index=index)
    for b, adapter in enumerate(index.tolist()):
        assert torch.equal(together[b], head_edit(z[b], *(p[adapter] for p in adapters)))
    leaves = [p.clone().requires_grad_() for p in adapters]
    dy = torch.randn_like(z)
    grads = torch.autograd.grad(head_edit(z, *leaves, index=index), leaves, dy)
    expected = torch.autograd.grad(
        torch.stack([_by_head(z[b], *(p[i] for p in leaves)) for b, i in enumerate(index.tolist())]), leaves, dy
    )
    for g, e in zip(grads, expected):
        assert torch.allclose(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edits", ["both", "m", "a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_that_torch_edits(dtype, edits):
    """Without a backend that was asked for, and without gradients, torch computes batches with adapters by row."""
    tables = torch.randn(2, 3, H, D, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    m, a = (table if edits in ("both", name) else None for name, table in zip("ma", tables))
    index = torch.tensor([2, 0, 0, 1])
    for shape in ((4, H * D), (4, 1, H * D), (4, 5, H * D), (4, 2, 3, H * D), (4, 0, H * D), (0, 5, H * D)):
        z, rows = torch.randn(shape).to(dtype), index[: shape[0]]
        parameters = [None if t is None else t.clone() for t in (m, a)]
        with torch.no_grad():
            y = head_edit(z, *parameters, index=rows)
            alone = [head_edit(z[b : b + 1], *parameters, index=rows[b : b + 1]) for b in range(len(rows))]
        assert (y.dtype, y.shape) == (dtype, z.shape)
        assert torch.equal(y, torch.cat(alone) if alone else y)
        by_row = [torch.zeros(H * D) if t is None else t.flatten(1)[rows].double() for t in (m, a)]
        scale, offset = (t.view(-1, *[1] * (z.dim() - 2), H * D) if t.dim() > 1 else t for t in by_row)
        expected = (1 + scale) * z.double() + offset
        terms = 1 + ((1 + scale) * z.double()).abs() + offset.abs()
        assert ((y.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * terms).all()
        assert all(t is None or torch.equal(t, p) for t, p in zip((m, a), parameters))  # tables stay
    with pytest.raises(ValueError, match=r"index must lie in 0\.\.2"):
        head_edit(torch.randn(2, H * D, dtype=dtype), m, a, index=torch.tensor([0, 3]))


def test_one_head_of_one_sample_with_an_adapter_of_its_own(backend):
    """(1, D) could be one head as well: then it would be no batch."""
    m, z = torch.randn(3, 1, D), torch.randn(1, D)
    index = torch.tensor([2])
    for batch in (z, z.view(1, 1, D)):
        assert torch.equal(head_edit(batch, m, index=index).view(1, D), head_edit(z, m[2]))


def test_an_empty_batch_with_adapters(backend):
    m, g = (p.requires_grad_() for p in (torch.randn(3, H, D), torch.randn(3, H)))
    z = torch.randn(0, 5, H * D, requires_grad=True)
    y = head_edit(z, m, g_m=g, index=torch.zeros(0, dtype=torch.int64))
    grads = torch.autograd.grad(y, [z, m, g], torch.zeros_like(y))
    assert all(torch.equal(grad, torch.zeros_like(t)) for grad, t in zip(grads, (z, m, g)))


def test_inplace(backend):
    parameters = _parameters()
    for z, kwargs in (
        (torch.randn(2, 5, H * D), {}),
        (torch.randn(2, H, 5, D), {"head_axis": 1}),
        (torch.randn(2, 5, H, D).transpose(1, 2), {"head_axis": 1}),
        (torch.randn(2, 5, 2 * H * D)[..., : H * D], {}),
        (torch.randn(2, H, 10, D)[:, :, ::2], {"head_axis": 1}),
    ):
        expected = head_edit(z, *parameters, **kwargs)
        assert head_edit(z, *parameters, inplace=True, **kwargs) is z
        assert torch.equal(z, expected)


def test_saves_the_input_alone(backend):
    z, parameters = torch.randn(2, 50, H * D, requires_grad=True), _parameters()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        head_edit(z, *(p.requires_grad_() for p in parameters))
    assert {t.data_ptr() for t in saved if t.numel() >= z.numel()} == {z.data_ptr()}


@pytest.mark.parametrize("z_shape", [(2, 5, H * D), (2, H, 5, D)])
def test_opcheck_and_compile(z_shape):
    z = torch.randn(z_shape, requires_grad=True)
    kwargs = {"head_axis": 1} if len(z_shape) == 4 else {}
    leaves = [p.requires_grad_() for p in _parameters()]
    flat = [leaves[0].detach().reshape(-1), leaves[1].detach().reshape(-1), leaves[2].detach(), leaves[3].detach()]
    if len(z_shape) == 3:
        args = (z, *(p.requires_grad_() for p in flat), 2)
        assert set(opcheck(torch.ops.ctkernels.head_edit.default, args).values()) == {"SUCCESS"}
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, *p: head_edit(z * 1.5, *p, **kwargs).square().sum(), fullgraph=True)
    found = compiled(z, *leaves)
    grads = torch.autograd.grad(found, [z, *leaves])
    expected = head_edit(z * 1.5, *leaves, **kwargs).square().sum()
    torch.testing.assert_close(found, expected)
    for g, e in zip(grads, torch.autograd.grad(expected, [z, *leaves])):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-4)


def test_vmap_over_adapters(backend):
    z, adapters = torch.randn(3, H * D), _parameters(5)
    together = torch.func.vmap(head_edit, in_dims=(None, 0, 0, 0, 0))(z, *adapters)
    for i in range(5):
        assert torch.allclose(together[i], head_edit(z, *(p[i] for p in adapters)), atol=1e-6)


Z, (M, A, G_M, G_A) = torch.randn(2, 5, H * D), _parameters()
BAD = {
    "z type": (([1.0], M), {}, TypeError, "head_edit: z must be a tensor, got list"),
    "nothing to do": ((Z,), {}, ValueError, "at least one of m and a is needed"),
    "gate without edit": ((Z, M, None, G_M, G_A), {}, ValueError, "g_a gates a, which is None"),
    "m shape": ((Z, M[0]), {}, ValueError, r"must both be \(heads, head_dim\), got m of shape \(6,\)"),
    "m and a differ": ((Z, M, A[:, :3]), {}, ValueError, r"got a of shape \(4, 3\)"),
    "gate shape": ((Z, M, A, G_M[:2]), {}, ValueError, r"g_m must have shape \(4,\), got \(2,\)"),
    "head_dim": ((Z, M), {"head_dim": 8}, ValueError, "head_dim is 8, but m and a have 6"),
    "z width": ((Z[..., :-1], M), {}, ValueError, r"z must end in .* = \(24,\) or .* got z of shape \(2, 5, 23\)"),
    "head_axis": (
        (Z.unflatten(-1, (H, D)), M),
        {"head_axis": 1},
        ValueError,
        "with head_axis=1, z must have 4 heads there",
    ),
    "index type": (
        (Z, M[None], A[None]),
        {"index": torch.zeros(2)},
        TypeError,
        "index must be an int64 or int32 tensor",
    ),
    "index shape": (
        (Z, M[None], A[None]),
        {"index": torch.zeros(3, dtype=torch.long)},
        ValueError,
        r"one entry per sample, shape \(2,\)",
    ),
    "index without adapters": (
        (Z, M, A),
        {"index": torch.zeros(2, dtype=torch.long)},
        ValueError,
        r"\(adapters, heads, head_dim\)",
    ),
    "device": ((Z, M.to("meta")), {}, ValueError, "m must be on z's device cpu, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_message(case):
    args, kwargs, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        head_edit(*args, **kwargs)


def test_inplace_where_a_gradient_is_needed():
    z = torch.randn(2, H * D)
    before = z.clone()
    with pytest.raises(RuntimeError, match="inplace=True would overwrite z"):
        head_edit(z, M.clone().requires_grad_(), inplace=True)
    assert torch.equal(z, before)
