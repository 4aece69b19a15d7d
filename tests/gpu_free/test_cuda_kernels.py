"""Which of the CUDA kernels a call takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from recorder import Toolchain

from ctkernels.functional import ctu, head_edit

CUDA = Toolchain("cuda")
pytestmark = pytest.mark.skipif(bool(CUDA.missing), reason=CUDA.missing)


def test_sixteen_bytes_at_a_time_where_the_layout_allows():
    cases = {
        (4, 8, 16, 16): (1, "plane_plain"),  # NCHW
        (4, 8, 7, 7): (1, "lanes_plain"),  # 49 values a channel, 392 a sample
        (4, 33, 64): (2, "lanes_plain"),
        (4, 8, 17, 17): (1, "plane_scalar"),  # 289 values a channel: rows start anywhere
        (5, 19): (1, "lanes_scalar"),
    }
    for shape, (channel_dim, expected) in cases.items():
        with CUDA() as recorder:
            ctu(torch.randn(shape), torch.rand(shape[channel_dim]), channel_dim=channel_dim)
        assert recorder.launches[0].kernel.endswith(expected), shape
    for axis in (None, 1):
        z = torch.randn((3, 70, 128) if axis is None else (3, 2, 70, 64))
        with CUDA() as recorder:
            head_edit(z, torch.randn(2, 64), head_axis=axis)
        assert recorder.launches[0].kernel.endswith("_lanes_vector")


def test_a_unit_without_a_prologue_takes_the_plain_kernel():
    x = torch.randn(300, 128, requires_grad=True)
    with CUDA() as recorder:
        ctu(x, 0.9).sum().backward()
    assert [launched.kernel for launched in recorder.launches] == [
        "ctk_ctu_logistic_forward_f32_plane_plain",
        "ctk_ctu_logistic_backward_f32_plane_plain",
    ]
