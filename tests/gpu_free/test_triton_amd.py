"""The Triton kernels on AMD's GPUs, which nobody has run: they compile for each architecture that the backend serves; and what
they have instead of inline PTX, compiled for a GPU whose machine code can be executed here, keeps the bounds of the other."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from attention_cases import Case, results
from conformance import check_against_float64, outputs, sample_named
from ctu_checks import (
    check_extremes,
    check_forty_digits,
    check_nan_at_beta_one,
    check_plain_at_beta_one,
    check_sixteen_bits,
)
from recorder import through_kernels
from roofline import ahead_of_time
from roofline.ahead_of_time import compiled, target_of
from triton.language import target_info
from triton_recorder import Recorder, triton_on_cpu

import ctkernels
from ctkernels.functional import attention_head_edit, ctu, hard_concrete
from ctkernels.ops import backends, launcher
from ctkernels.ops.attention import cost_model, function, op
from ctkernels.ops.attention.triton import launch as attention_launch
from ctkernels.ops.channelwise.launch import implementation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FLOAT, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOCAL_MEMORY = 64 * 1024  # of a workgroup, on every one of these architectures
ARCHITECTURES = backends.HIP_ARCHITECTURES


# ---- compiled ahead of time ----------------------------------------------------------------------------------------------


class Compiler:
    """Replaces ``launcher.launch``: compiles each kernel for an AMD architecture, and runs nothing."""

    def __init__(self, arch):
        self.arch, self.kernels = arch, {}

    def __call__(self, kernel, grid, args, meta):
        threads = target_of(self.arch).warp_size
        found, _ = compiled(kernel, args, launcher.with_waves(meta, threads), self.arch)
        self.kernels[found.metadata.name] = found
        assert found.metadata.warp_size == threads
        assert 32 * meta["num_warps"] <= found.metadata.num_warps * threads <= 1024
        assert found.metadata.shared <= LOCAL_MEMORY
        assert "elementwise_inline_asm" not in found.asm["ttir"]
        assert f"amdgcn-amd-amdhsa--{self.arch}" in found.asm["amdgcn"]
        assert found.asm["hsaco"].startswith(b"\x7fELF")


@pytest.fixture(params=ARCHITECTURES)
def compiler(request, monkeypatch):
    """Every launch is compiled for this architecture."""
    found = Compiler(request.param)
    monkeypatch.setattr(launcher, "launch", found)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(op, "kernels", lambda q: attention_launch)
    monkeypatch.setattr(function, "choose", lambda *args: cost_model.FUSED)
    with through_kernels(implementation):
        yield found


def test_a_launch_of_every_kind(compiler):
    """Rows of a channel with one launch each way; the others are slow."""
    outputs(sample_named("NCHW, long runs", FLOAT))
    assert set(compiler.kernels) == {"ctu_forward_channelwise_kernel", "ctu_backward_channelwise_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, dtype) for name in ("NCHW, long runs", "NLC, odd channels") for dtype in (BRAIN, HALF, DOUBLE)],
        *[(name, FLOAT) for name in ("logits", "gelu", "prologue, inner channels", "shared beta, coeff per channel")],
        *[(name, BRAIN) for name in ("gelu", "gelu_tanh", "relu6", "learned slopes, some above 1")],
        *[("gated packed, runs", dtype) for dtype in (FLOAT, BRAIN)],
        *[(name, dtype) for name in ("head edit (B, H, T, D)", "head edit per sample") for dtype in (FLOAT, HALF, DOUBLE)],
    ],
    ids=str,
)  # fmt: skip
def test_every_op_and_dtype(compiler, name, dtype):
    outputs(sample_named(name, dtype))
    assert len(compiler.kernels) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_gates(compiler, dtype):
    logits = torch.randn(12, 12, dtype=dtype)
    for options in ({"training": True}, {"training": False}, {"training": False, "estimator": "mean"}):
        hard_concrete(logits.clone().requires_grad_(), **options).sum().backward()
    ctkernels.functional.expected_l0(logits)
    assert set(compiler.kernels) == {"gate_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_attention(compiler, size, dtype):
    """The tiles that a GPU gets: most of a block's memory is theirs."""
    case = Case("causal", (1, 2, 1, 130, 150, size, size), {"is_causal": True})
    results(attention_head_edit, case.tensors(dtype), upstream=dtype, **case.arguments())
    with torch.no_grad():
        token = Case("one token", (1, 2, 1, 1, 700, size, size), {"is_causal": True})
        attention_head_edit(**token.tensors(dtype), **token.arguments())
    assert {"forward_kernel", "keys_kernel", "queries_kernel", "split_kernel", "join_kernel"} <= set(compiler.kernels)


# ---- plain Triton instead of inline PTX ------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """``plain(approx)``: the code that AMD's GPUs get, compiled for sm_80 and executed on the CPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # its keys do not tell the two apart
    monkeypatch.setattr(ahead_of_time, "_COMPILED", {})
    monkeypatch.setattr(target_info, "current_target", lambda: target_of("gfx942"))

    @contextmanager
    def run(approx=0):
        recorder = Recorder(80, approx)
        with triton_on_cpu(recorder):
            yield recorder
        for launched in recorder.launches:
            assert "elementwise_inline_asm" not in launched.detail.asm["ttir"]

    return run


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NCHW, long runs", FLOAT),
        ("gelu_tanh", BRAIN),
        pytest.param("NLC, odd channels", BRAIN, marks=pytest.mark.slow),
        pytest.param("gelu", FLOAT, marks=pytest.mark.slow),
        pytest.param("gelu", DOUBLE, marks=pytest.mark.slow),
        pytest.param("logits", DOUBLE, marks=pytest.mark.slow),
        pytest.param("logits", FLOAT, marks=pytest.mark.slow),
        pytest.param("relu6", HALF, marks=pytest.mark.slow),
        pytest.param("learned slopes, some above 1", FLOAT, marks=pytest.mark.slow),
        pytest.param("gated packed, runs", BRAIN, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_plain_helpers_against_float64(plain, name, dtype):
    for approx in (-1, 1):
        with plain(approx):
            found = outputs(sample_named(name, dtype))
        check_against_float64(sample_named(name, dtype), found)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_plain_helpers_to_forty_digits(plain, activation):
    pytest.importorskip("mpmath")
    check_forty_digits(activation, plain)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_plain_helpers_in_sixteen_bits(plain, activation):
    check_sixteen_bits(BRAIN, activation, plain, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, DOUBLE], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu"])
def test_plain_helpers_at_the_edges(plain, activation, dtype):
    check_extremes(dtype, activation, plain)
    check_nan_at_beta_one(dtype, activation, plain)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, DOUBLE], ids=str)
def test_plain_helpers_at_beta_one(plain, dtype):
    check_plain_at_beta_one(dtype, plain)


def test_plain_helpers_of_gates(plain):
    logits = torch.cat([torch.tensor([0.0, -40.0, 40.0, -800.0, 800.0]), torch.randn(59)]).double()
    for options in ({"estimator": "mean"}, {}):
        with plain():
            gates = hard_concrete(logits, training=False, **options)
        with ctkernels.use_backend("reference"):
            expected = hard_concrete(logits, training=False, **options)
        torch.testing.assert_close(gates, expected, rtol=2e-11, atol=2e-11)


# ---- waves, the flag, and what is said of it -------------------------------------------------------------------------------


@pytest.mark.parametrize(("warps", "threads", "waves"), [(1, 64, 1), (4, 64, 2), (8, 64, 4), (4, 32, 4)])
def test_a_launch_has_as_many_threads_in_waves_of_any_size(monkeypatch, warps, threads, waves):
    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: given.update(arguments, grid=grid)

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=threads))
    launcher.launch(Kernel(), 7, {"x": 1}, {"num_warps": warps, "LANES": 3})
    assert given == {"x": 1, "LANES": 3, "num_warps": waves, "grid": (7,)}


def _on_amd(monkeypatch, arch, allowed):
    """What the Triton backend says of a tensor on an AMD GPU."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(backends, "_ARCHITECTURES", {0: arch})
    monkeypatch.setenv(backends.ALLOW_HIP, "1") if allowed else monkeypatch.delenv(backends.ALLOW_HIP, raising=False)
    backend = backends.Backend("triton", "cuda", backends._triton_missing(), (8, 0), "never run on an AMD GPU")
    monkeypatch.setitem(backends.BACKENDS, "triton", backend)
    x = mock.Mock(spec=torch.Tensor, dtype=FLOAT, device=torch.device("cuda", 0), is_cuda=True, shape=(3,))
    x.get_device.return_value = 0
    return x, backend.refusal(x)


def test_declined_without_the_flag(monkeypatch):
    _, refusal = _on_amd(monkeypatch, "gfx942", allowed=False)
    assert refusal == "compiled for AMD GPUs but never run on one; CTKERNELS_TRITON_HIP=1 allows it"


def test_served_with_the_flag_and_said_to_be_unproven(monkeypatch):
    x, refusal = _on_amd(monkeypatch, "gfx942", allowed=True)
    assert refusal is None
    monkeypatch.setitem(backends.BACKENDS, "cuda", backends.Backend("cuda", "cuda", "not built", (8, 0)))
    assert "used; never run on an AMD GPU: compare with use_backend('reference')" in ctkernels.explain(x)


def test_other_architectures_are_declined(monkeypatch):
    _, refusal = _on_amd(monkeypatch, "gfx906", allowed=True)
    assert refusal == "compiled for gfx90a, gfx942, gfx1200, got gfx906"


def test_nvidia_is_as_before(monkeypatch):
    monkeypatch.setattr(backends, "_CAPABILITIES", {0: (7, 5)})
    backend = backends.Backend("triton", "cuda", None, (8, 0))
    x = mock.Mock(spec=torch.Tensor, dtype=FLOAT, device=torch.device("cuda", 0), is_cuda=True)
    x.get_device.return_value = 0
    assert backend.refusal(x) == "needs compute capability 8.0, got 7.5"
    assert ctu(torch.zeros(3), 0.9).shape == (3,)
