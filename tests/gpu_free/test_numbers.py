"""A call's numbers reach the GPU as arguments of the kernel: no tensor is filled for them, and no kernel compiled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from ctkernels.functional import ctu, ctu_and_mul
from ctkernels.ops import checks
from ctkernels.ops.ctu import OP as CTU

if TYPE_CHECKING:
    pass

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CALLS: list[dict[str, Any]] = [
    {"beta": 0.9},
    {"beta": 1.0, "coeff": 0.0},
    {"beta": 0.7, "coeff": 0.3, "activation": "leaky_relu", "negative_slope": 0.2},
    {"beta": 0.7, "activation": "gelu", "eps": 1e-6},
    {"beta": 0.7, "scale": 1.5, "shift": -0.25},  # the prologue must not be taken for absent
]


def _as_tensors(call):
    """The same numbers in memory, where a kernel loads them."""
    full = {"coeff": 0.5} | call
    return {
        k: torch.tensor([v], dtype=torch.float64) if type(v) is float and k != "eps" else v for k, v in full.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: ", ".join(call))
def test_one_launch_with_the_bits_of_numbers_in_memory(toolchain, call, dtype):
    x = torch.linspace(-4, 4, 3 * 40).view(3, 40).to(dtype).requires_grad_()
    results = []
    for arguments in (call, _as_tensors(call)):
        with toolchain() as recorder:
            y = ctu(x, **arguments)
            (dx,) = torch.autograd.grad(y.sum(), x)
        assert recorder.roles == ["forward", "backward"]
        results.append((y, dx))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_unit_with_numbers_for_parameters_beside_tensors(toolchain):
    x, beta = torch.randn(300, 24, requires_grad=True), torch.rand(24, requires_grad=True)
    results = []
    for coeff in (0.3, torch.tensor([0.3], dtype=torch.float64)):
        with toolchain() as recorder:
            y = ctu(x, beta, coeff, channel_dim=1)
            grads = torch.autograd.grad(y.sum(), (x, beta))
        assert recorder.roles == ["forward", "backward", "reduce_partials"]
        results.append((y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_gated_unit(toolchain):
    gate, up = torch.randn(2, 6, 32)
    with toolchain() as recorder:
        found = ctu_and_mul(gate, up, 0.8)
    assert recorder.roles == ["forward"]
    with toolchain():
        expected = ctu_and_mul(gate, up, torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.5]))
    assert torch.equal(found, expected)


def test_no_kernel_is_compiled_for_a_value(toolchain):
    x = torch.randn(64)
    with toolchain() as recorder:
        for beta in (0.0, 0.25, 0.9, 1.0):
            ctu(x, beta, 1.0 - beta)
    if toolchain.name == "triton":
        assert len({id(launched.detail) for launched in recorder.launches}) == 1
    else:
        assert len({launched.kernel for launched in recorder.launches}) == 1


def test_eager_numbers_stay_on_the_host():
    """Of a tensor on a GPU too: a number of its own there would be a launch."""
    on_gpu: Any = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda"))
    number = checks.scalar_tensor(0.9, on_gpu)
    assert (number.device.type, number.dtype, number.dim(), number.item()) == ("cpu", torch.float64, 0, 0.9)


def test_the_reference_takes_numbers_of_the_host_for_tensors_of_a_gpu():
    with FakeTensorMode():
        x, residual = torch.empty(2, 3, 4, device="cuda"), torch.empty(2, 3, 4, device="cuda")
        number = torch.tensor(0.9, dtype=torch.float64)
        inputs, attrs = CTU.inputs(x, number, number, number, number, number, residual), CTU.attrs(1, 1, False, 0.0)
        y = CTU.strided_forward(inputs, attrs)
        dx, dresidual = CTU.strided_backward(torch.empty_like(x), inputs, attrs, 0b1000001)
        tangent = CTU.reference_jvp(inputs, attrs, CTU.inputs(x, *[None] * 6))
    assert {t.device.type for t in (y, dx, dresidual, tangent)} == {"cuda"}
