"""Executed PTX: the fused attention's launch code and compiled PTX, executed on the CPU with race checks, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from attention_cases import Case, check, results
from attention_recorder import Recorder, fused_on_cpu

from ctkernels.functional import attention_head_edit
from ctkernels.ops.attention.triton import launch as triton_launch
from ctkernels.ops.attention.triton.launch import Tile

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
CAUSAL = {"is_causal": True}

# Lengths that no tile divides; between them every branch of every kernel. These run on small tiles, which compile fast.
CASES = [
    (Case("causal, grouped, fewer queries", (2, 2, 1, 70, 85, 32, 32), CAUSAL, layout="tokens first"), BRAIN),
    (Case("full, padded head sizes", (1, 2, 2, 67, 81, 40, 24)), HALF),
    (Case("causal, more queries than keys", (1, 1, 1, 90, 40, 32, 32), CAUSAL), HALF),
    (Case("window, causal", (1, 1, 1, 150, 160, 32, 32), CAUSAL | {"window": 70}), BRAIN),
    (Case("window both ways", (1, 1, 1, 130, 140, 32, 32), {"window": 40}), HALF),
    (Case("padding, causal", (2, 2, 2, 70, 70, 32, 32), CAUSAL, mask="padding"), BRAIN),
    (Case("mask with blind queries", (1, 2, 1, 70, 90, 32, 32), mask="random"), HALF),
    (Case("bias", (1, 2, 2, 68, 70, 32, 32), {"scale": 0.3}, mask="bias"), BRAIN),
    (Case("packed, causal", (3, 2, 1, 0, 0, 32, 32), CAUSAL, lengths=([70, 3, 20], [75, 40, 20])), BRAIN),
    (Case("packed, window", (2, 1, 1, 0, 0, 32, 32), CAUSAL | {"window": 9}, lengths=([30, 66], [30, 66])), HALF),
    (Case("scale alone", (1, 2, 2, 70, 40, 32, 32), absent=("a", "g_a", "g_m")), BRAIN),
    (Case("offset alone", (1, 2, 2, 70, 40, 32, 32), absent=("m", "g_m")), BRAIN),
]
# The tiles that a GPU gets, one case for each of their tables' columns.
REAL = [
    (Case("heads of 64, grouped", (2, 2, 1, 130, 150, 64, 64), CAUSAL, layout="tokens first"), BRAIN),
    (Case("heads of 128", (1, 1, 1, 140, 150, 128, 128), CAUSAL), BRAIN),
    (Case("heads of 192 and 128", (1, 1, 1, 66, 66, 192, 128), CAUSAL), HALF),
    (Case("float32", (1, 2, 1, 67, 70, 64, 64), CAUSAL), FLOAT),
    (Case("float32, heads of 128", (1, 1, 1, 67, 40, 128, 128)), FLOAT),
]
SMALL_TILES = {kernel: dict.fromkeys((64, 128, 256), Tile(32, 32, 2, 2)) for kernel in triton_launch._HALF}
DECODING = [
    (Case("one token", (2, 4, 2, 1, 700, 64, 64), CAUSAL, layout="tokens first"), BRAIN),
    (Case("three tokens, window", (1, 4, 2, 3, 600, 32, 32), CAUSAL | {"window": 290}), HALF),
    (Case("padded", (3, 2, 1, 1, 530, 32, 48), mask="padding"), BRAIN),
    (Case("float32, 20 rows", (1, 10, 1, 2, 300, 32, 32), CAUSAL), FLOAT),
    (Case("blind splits", (1, 1, 1, 2, 520, 32, 32), CAUSAL | {"window": 5}), BRAIN),
]


def _kernels(recorder):
    return [name for name, *_ in recorder.launches]


def _ids(value):
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_launch, "_HALF", SMALL_TILES)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=_ids)
def test_forward_and_backward(case, dtype):
    _check_all_kernels(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), REAL, ids=_ids)
def test_forward_and_backward_with_the_tiles_of_a_gpu(case, dtype):
    _check_all_kernels(case, dtype)


def _check_all_kernels(case, dtype):
    with fused_on_cpu(Recorder()) as recorder:
        found = results(attention_head_edit, case.tensors(dtype), upstream=dtype, **case.arguments())
    assert _kernels(recorder) == ["forward_kernel", "prepare_kernel", "edit_kernel", "keys_kernel", "queries_kernel"]
    check(case, dtype, found)


@pytest.mark.parametrize(("case", "dtype"), DECODING, ids=_ids)
def test_decoding(case, dtype):
    with fused_on_cpu(Recorder()) as recorder, torch.no_grad():
        y = attention_head_edit(**case.tensors(dtype), **case.arguments())
    assert _kernels(recorder) == ["split_kernel", "join_kernel"]
    assert recorder.launches[0].detail["splits"] > 1
    truth = case.plain(*(None if t is None else t.double() for t in case.tensors(dtype).values()))
    baseline = case.plain(*case.tensors(dtype).values())
    bound = 2 * (baseline.double() - truth).abs().max() + torch.finfo(dtype).eps * (truth.abs() + 4)
    assert ((y.double() - truth).abs() <= bound).all()


SMALL = Case("small", (2, 2, 1, 70, 75, 32, 32), CAUSAL)


def _small(recorder, case=SMALL):
    with fused_on_cpu(recorder):
        return results(attention_head_edit, case.tensors(BRAIN), upstream=BRAIN, **case.arguments())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("approx", [-1, 1])
def test_approximate_units_at_both_ends_of_their_error(approx):
    check(SMALL, BRAIN, _small(Recorder(approx=approx)))


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_on_every_run():
    first, again = (_small(Recorder()) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.usefixtures("small_tiles")
def test_what_the_edit_costs_in_memory_traffic():
    """Forward: z is written only if a gradient needs it. Backward: z and the upstream gradient are read by the kernel that
    reads them in attention's own backward pass; dz is all that is written, and only if there is a scale."""
    recorder = Recorder()
    _small(recorder)
    by_name = {
        name: {k for k, t in args.items() if isinstance(t, torch.Tensor)} for name, _, _, args in recorder.launches
    }
    size = SMALL.sizes[0] * SMALL.sizes[1] * SMALL.sizes[3] * SMALL.sizes[6]
    assert by_name["prepare_kernel"] >= {"z", "dy", "dz", "delta", "partial"}
    for name in ("keys_kernel", "queries_kernel"):
        assert not by_name[name] & {"z", "dy", "m", "g_m"}
    for name, _, _, args in recorder.launches[1:]:
        written = {
            n: args[n].numel() for n in ("delta", "partial") if args.get(n) is not None and name == "prepare_kernel"
        }
        assert all(count < size // 8 for count in written.values()), written

    tensors = SMALL.tensors(BRAIN)
    with fused_on_cpu(Recorder()) as recorder, torch.no_grad():
        attention_head_edit(**tensors, **SMALL.arguments())
    assert recorder.launches[0].detail["z"] is None
    assert recorder.launches[0].detail["lse"] is None


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [
        (("m", "g_a"), ["forward_kernel", "prepare_kernel", "edit_kernel"]),
        (("a",), ["forward_kernel", "prepare_kernel", "edit_kernel"]),
        (("q",), ["forward_kernel", "prepare_kernel", "queries_kernel"]),
        (("v",), ["forward_kernel", "prepare_kernel", "keys_kernel"]),
    ],
    ids=str,
)
def test_only_the_gradients_that_are_wanted(wanted, kernels):
    own = {n: t.requires_grad_(n in wanted) for n, t in SMALL.tensors(BRAIN).items()}
    full = _small(Recorder())
    generator = torch.Generator().manual_seed(99)
    with fused_on_cpu(Recorder()) as recorder:
        y = attention_head_edit(**own, **SMALL.arguments())
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(BRAIN))
    assert _kernels(recorder) == kernels
    for name in wanted:
        assert torch.equal(own[name].grad, full[f"d{name}"]), name


@pytest.mark.usefixtures("small_tiles")
def test_decoding_with_gradients_and_one_split():
    case = Case("short", (1, 2, 2, 2, 50, 32, 32), CAUSAL)
    recorder = Recorder()
    check(case, BRAIN, _small(recorder, case))
    assert _kernels(recorder)[:2] == ["split_kernel", "join_kernel"]
    assert recorder.launches[0].detail["splits"] == 1


@pytest.mark.usefixtures("small_tiles")
def test_unaligned_and_strided_inputs():
    """Heads inside a fused qkv projection, at an odd offset: the executor faults on a misaligned vector."""
    qkv = torch.randn(2 * 70 * 3 * 2 * 32 + 1).to(HALF)[1:].view(2, 70, 3, 2, 32)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    m = torch.randn(2, 32)
    expected = attention_head_edit(q, k, v, m, m)
    with fused_on_cpu(Recorder()):
        torch.testing.assert_close(attention_head_edit(q, k, v, m, m), expected, rtol=4e-3, atol=4e-3)


def test_splits_depend_on_the_shape_alone_and_cover_the_keys():
    q = torch.empty(1, 8, 1, 64, dtype=BRAIN)
    for keys in (1, 63, 64, 257, 4096, 100_000):
        k = torch.empty(1, 1, keys, 64, dtype=BRAIN)
        problem = triton_launch.Problem(q, k, k, None, None, None, None, None, None, None, 0, 0, 1.0, -1, 0)
        splits = triton_launch.splits_for(problem, 8, 1, keys)
        assert 1 <= splits <= triton_launch.PROGRAMS
        n = triton_launch.tile_for("split", problem).n
        assert splits == 1 or keys >= 4 * n * splits
