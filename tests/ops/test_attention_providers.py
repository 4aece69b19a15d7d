"""Attention kernels of other packages: when they are chosen, and how they are called.

Without a GPU: they are chosen for fake tensors, and stand-ins with the packages' signatures answer the calls.
"""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode

import ctkernels
from ctkernels.functional import attention_head_edit
from ctkernels.ops.attention import cost_model, providers, reference
from ctkernels.ops.attention.problem import Packed
from ctkernels.ops.attention.providers import FLASH4, FLEX, PROVIDERS, Call
from ctkernels.ops.attention.reference import UNBOUNDED

FUSED, SEPARATE = cost_model.FUSED, cost_model.SEPARATE


@pytest.fixture
def gpu(monkeypatch):
    """A function that says what is chosen for fake tensors, by the GPU's compute capability and whether flash-attn-4 is there."""
    monkeypatch.setattr(cost_model, "torch_attention", lambda *args: "cudnn")
    triton = types.SimpleNamespace(missing=None, refusal=lambda q: None)
    monkeypatch.setitem(providers.backends.BACKENDS, "triton", triton)

    def chosen(flash4=True, major=9, dtype=torch.bfloat16, tokens=4096, dim=128, left=UNBOUNDED, right=0, mask=False,
               training=True, packed=False, forced=None):  # fmt: skip
        monkeypatch.setattr(providers, "_flash4_version", lambda: "4.0" if flash4 else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (major, 0))
        shape = (4 * tokens, 16, dim) if packed else (4, 16, tokens, dim)
        with FakeTensorMode():
            q = torch.empty(shape, dtype=dtype, device="cuda")
            seen = torch.empty(4, 16, tokens, tokens, dtype=torch.bool, device="cuda") if mask else None
            return cost_model.choose(q, q, q, seen, 1.0, left, right, training, 4 if packed else None, forced)

    return chosen


def test_where_torch_has_a_fast_kernel(gpu):
    """cuDNN's on Hopper; on Blackwell FlashAttention-4 is faster."""
    assert gpu(flash4=False) == gpu() == SEPARATE
    assert gpu(major=10) == FLASH4
    assert gpu(major=10, flash4=False) == SEPARATE


def test_windows_and_packed_sequences(gpu):
    for case in ({"left": 511}, {"packed": True}, {"packed": True, "left": 511, "right": 511}):
        assert gpu(**case) == gpu(**case, training=False) == FLASH4
        assert gpu(**case, flash4=False) == FLEX
        assert gpu(**case, flash4=False, training=False) == FUSED
        assert gpu(**case, flash4=False, dtype=torch.float32) == gpu(**case, dtype=torch.float32) == FUSED
        assert gpu(**case, major=8) == FLEX
    assert gpu(packed=True, flash4=False, tokens=64) == FUSED  # flex_attention's mask would take longer


def test_what_only_the_fused_kernels_serve(gpu):
    assert gpu(mask=True) == FUSED
    assert gpu(left=511, dim=68) == FUSED
    assert gpu(left=511, dim=96, flash4=False) == FUSED


def test_a_forced_one_says_why_not(gpu):
    assert gpu(forced=FLASH4) == FLASH4
    assert gpu(forced=FLEX, left=511) == FLEX
    for case, reason in (
        ({"forced": FLASH4, "flash4": False}, "flash4 was forced .* flash-attn-4 is not installed"),
        ({"forced": FLASH4, "major": 8}, "compute capability 9 and 10, got 8"),
        ({"forced": FLASH4, "dim": 68}, "heads of 68 and 68 values"),
        ({"forced": FLASH4, "dtype": torch.float32}, "serves bfloat16 and float16, got float32"),
        ({"forced": FLASH4, "mask": True}, "serves no attn_mask"),
        ({"forced": FLEX}, "for windows and packed sequences"),
        ({"forced": FLEX, "left": 3, "dim": 96}, "got 96"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            gpu(**case)


def test_on_a_cpu():
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(RuntimeError, match=r"flex was forced .*(got a tensor on cpu|triton is not installed)"):
        attention_head_edit(q, q, q, torch.ones(2, 16), window=2, implementation="flex")
    text = ctkernels.explain(q, "attention_head_edit")
    assert "flash4" in text
    assert "flex" in text
    assert "separate   used" in text


# ---- FlashAttention-4 --------------------------------------------------------------------------------------------------


def _attention(q, k, v, scale, left, right):
    """q (B, T, H, D): FlashAttention's layout and positions."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen = reference.visible(q.shape[2], k.shape[2], *(UNBOUNDED if n is None else n for n in (left, right)), q.device)
    return reference.attention(q, k, v, seen, scale)[0].transpose(1, 2)


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
    aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
):  # fmt: skip
    """Of flash-attn-4, in float64."""
    left, right = (None, 0) if causal else window_size
    return _attention(q, k, v, softmax_scale, left, right), None


def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
):  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == tuple(int(s.diff().max()) for s in (cu_seqlens_q, cu_seqlens_k))
    left, right = (None, 0) if causal else window_size
    parts, bounds = [], zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:])
    for q0, q1, k0, k1 in bounds:
        parts.append(_attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], softmax_scale, left, right)[0])
    return torch.cat(parts), None


@pytest.fixture
def served(monkeypatch):
    """Every call is served by a provider of this name; a stand-in takes the place of flash-attn-4."""
    package = types.ModuleType("flash_attn")
    package.cute = types.ModuleType("flash_attn.cute")
    package.cute.flash_attn_func, package.cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package.cute)
    return lambda name: monkeypatch.setattr("ctkernels.ops.attention.function.choose", lambda *args: name)


CALLS = {
    "causal": {"is_causal": True},
    "full": {},
    "scaled": {"is_causal": True, "scale": 0.3},
    "window": {"is_causal": True, "window": 3},
    "window both ways": {"window": 2},
    "packed": {"is_causal": True, "cu_seqlens": ([0, 4, 5, 11], [0, 6, 7, 13])},
    "packed, window": {"window": 2, "cu_seqlens": ([0, 4, 5, 11], [0, 6, 7, 13])},
}


def _arguments(name):
    options = dict(CALLS[name])
    generator = torch.Generator().manual_seed(0)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = tuple(torch.tensor(s, dtype=torch.int32) for s in options["cu_seqlens"])
        shapes = ((11, 4, 16), (13, 2, 16), (13, 2, 16))
    else:
        shapes = ((2, 4, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16))
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (*shapes, (4, 16), (4, 16), (4,), (4,))
    ]
    return [t.requires_grad_() for t in tensors], options | {"enable_gqa": True}


@pytest.mark.parametrize("name", CALLS)
def test_flash_attention_4(name, served):
    tensors, options = _arguments(name)
    expected = attention_head_edit(*tensors, **options)
    served(FLASH4)
    found = attention_head_edit(*tensors, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    up = torch.randn_like(found)
    grads = (torch.autograd.grad(y, tensors, up) for y in (found, expected))
    for grad, other in zip(*grads):
        torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(attention_head_edit(*tensors, **options), expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused(served):
    served(FLASH4)
    tensors, options = _arguments("causal")
    y = attention_head_edit(*tensors, **options)
    torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; pass implementation='fused'"):
        torch.autograd.grad(y.sum(), tensors, create_graph=True)


def test_deterministic_algorithms_are_asked_for(served, monkeypatch):
    asked = []
    call = sys.modules["flash_attn.cute"].flash_attn_func

    def noted(*args, **kwargs):
        asked.append(inspect.signature(call).bind(*args, **kwargs).arguments["deterministic"])
        return call(*args, **kwargs)

    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_func", noted)
    served(FLASH4)
    tensors, options = _arguments("causal")
    for on in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=on: on)
        attention_head_edit(*tensors, **options)
    assert asked == [False, True]


# ---- flex_attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if "window" in name or "packed" in name])
def test_flex_attention(name, served, monkeypatch):
    """Uncompiled, which has no backward pass."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(providers, "_compiled", lambda name: getattr(flex, name))
    providers._window_mask.cache_clear()
    tensors, options = _arguments(name)
    tensors = [t.detach() for t in tensors]
    with torch.no_grad():
        expected = attention_head_edit(*tensors, **options)
        served(FLEX)
        torch.testing.assert_close(attention_head_edit(*tensors, **options), expected, rtol=1e-6, atol=1e-6)
    providers._window_mask.cache_clear()


def test_visibility_of_packed_sequences():
    starts_q, starts_k = (torch.tensor(s, dtype=torch.int32) for s in ([0, 3, 3, 5], [0, 4, 6, 9]))
    for left, right in ((UNBOUNDED, 0), (1, 0), (1, 1), (UNBOUNDED, UNBOUNDED)):
        rule = providers.packed_rule(Packed(starts_q, starts_k, 3, 4), 5, 9, left, right)
        found = rule(None, None, torch.arange(5)[:, None], torch.arange(9))
        expected = torch.zeros(5, 9, dtype=torch.bool)
        for q0, q1, k0, k1 in ((0, 3, 0, 4), (3, 3, 4, 6), (3, 5, 6, 9)):
            seen = reference.visible(q1 - q0, k1 - k0, left, right, torch.device("cpu"))
            expected[q0:q1, k0:k1] = True if seen is None else seen
        assert torch.equal(found, expected)


def test_nothing_is_imported_for_a_provider_that_is_not_chosen():
    q = torch.randn(1, 2, 4, 16)
    call = Call(q, q, q, None, UNBOUNDED, 0, False)
    before = set(sys.modules)
    assert all(provider.refusal(call) is not None for provider in PROVIDERS.values())
    assert not {name for name in set(sys.modules) - before if name.startswith(("flash_attn", "triton"))}
