"""The CUDA build: what setup.py makes of csrc/cuda, which machines it loads on, and the ops on tensors that claim a GPU."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import outputs, sample_named
from recorder import through_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

import ctkernels
from ctkernels.cli import env as environment
from ctkernels.functional import ctu, expected_l0, hard_concrete
from ctkernels.ops import backends
from ctkernels.ops.record import Kernels
from ctkernels.ops.registration import OPS
from ctkernels.testing import samples

ROOT = Path(__file__).parents[2]
BUILT = backends.CUDA_KERNELS.exists()
needs_build = pytest.mark.skipif(not BUILT, reason="the CUDA kernels are not built (make build-cuda)")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


# ---- fake tensors: schema and meta ----------------------------------------------------------------------------------


def _calls(function):
    """The dispatcher ops that a function calls: (name, arguments, result)."""
    found = []

    def kernels(op):
        def recorded(name):
            def call(*args):
                result = getattr(torch.ops.ctkernels, name).default(*args)
                found.append((name, args, result))
                return result

            return call

        return Kernels(*(recorded(op.name + suffix) for suffix in ("", "_", "_backward")))

    with through_kernels(kernels):
        function()
    return found


def _on_fake_cuda(name, args):
    with FakeTensorMode():
        fakes = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") if isinstance(a, torch.Tensor) else a
            for a in args
        ]
        return getattr(torch.ops.ctkernels, name).default(*fakes)


def _check_fakes(calls):
    for name, args, result in calls:
        found, expected = (r if isinstance(r, list) else [r] for r in (_on_fake_cuda(name, args), result))
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            assert ours.device.type == "cuda"
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride()), name


@pytest.mark.parametrize("name", [s.name for s in samples()])
def test_fake_cuda_tensors(name):
    """Shapes, dtypes and strides of results and gradients are those of the CPU."""
    calls = _calls(lambda: outputs(sample_named(name, torch.bfloat16)))
    assert len(calls) >= 2 or "plain" in name
    _check_fakes(calls)


def test_fake_cuda_gates():
    def step():
        log_alpha, noise = (torch.rand(3, 4).requires_grad_() for _ in range(2))
        hard_concrete(log_alpha, training=True, noise=noise).sum().backward()
        hard_concrete(log_alpha, training=False).sum().backward()
        expected_l0(log_alpha).sum().backward()

    calls = _calls(step)
    assert len(calls) == 6
    _check_fakes(calls)


# ---- what is built --------------------------------------------------------------------------------------------------


def _kernel_names():
    """Every name that the host code can ask for."""
    names = {"ctk_reduce_shared", "ctk_ctu_precompute", "ctk_ctu_and_mul_precompute"}
    names |= {f"ctk_{op}_reduce_partials_{t}" for op in ("ctu", "ctu_and_mul", "head_edit") for t in ("f32", "f64")}
    names |= {f"ctk_gates_{p}_{t}" for p in ("forward", "backward") for t in ("f32", "f64")}
    members = ("logistic", "leaky", "relu6", "gaussian", "tanh")
    ops = (*(f"{op}_{member}" for op in ("ctu", "ctu_and_mul") for member in members), "head_edit")
    for op, dtype, form in itertools.product(ops, ("f32", "f64", "bf16", "f16"), ("scalar", "vector", "plain")):
        if (form == "plain" and op != "ctu_logistic") or (form != "scalar" and dtype == "f64" and op != "head_edit"):
            continue
        names |= {f"ctk_{op}_{p}_{dtype}_{t}_{form}" for p in ("forward", "backward") for t in ("plane", "lanes")}
    return names


@needs_build
def test_every_kernel_and_architecture_is_there():
    assert set(environment.cuda_kernels()) == _kernel_names()
    found = environment.describe()["cuda"]
    wanted = os.environ.get("CTKERNELS_CUDA_ARCHS", "80 86 89 90 100 120").split()
    assert found["architectures"][:-1] == [f"sm_{a}" for a in wanted]
    assert found["architectures"][-1].startswith("compute_")
    assert found["kernels"] == len(_kernel_names())


@needs_build
@linux
def test_the_library_needs_neither_torch_nor_a_driver():
    listed = subprocess.run(["readelf", "-d", str(backends.CUDA_KERNELS)], capture_output=True, text=True, check=True)
    needed = [line for line in listed.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if any(name in line for name in ("torch", "c10", "cuda", "python"))], needed


@needs_build
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
def test_the_compiled_kernels_come_first():
    assert backends.BACKENDS["cuda"].missing is None
    assert list(backends.BACKENDS).index("cuda") < list(backends.BACKENDS).index("triton")
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        for op in OPS:
            assert "cuda       used" in ctkernels.explain(x, op)
    for op in OPS.values():
        for overload in filter(None, op.overloads):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(overload._schema.name, "CUDA")


@needs_build
@linux
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
def test_a_launch_finds_what_it_needs():
    """On a GPU: torch's library with the current stream is not among those that an extension's symbols are looked up in."""
    binding, torchs = ctypes.CDLL(str(backends.CUDA_BINDING)), ctypes.CDLL("libtorch_cuda.so", os.RTLD_NOLOAD)
    expected = ctypes.cast(torchs.aoti_torch_get_current_cuda_stream, ctypes.c_void_p).value
    assert ctypes.c_void_p.in_dll(binding, "ctk_cuda_current_stream").value == expected
    assert ctypes.c_void_p.in_dll(binding, "ctk_cuda_launcher").value
    listed = subprocess.run(["nm", "-D", str(backends.CUDA_BINDING)], capture_output=True, text=True, check=True)
    assert not [
        line for line in listed.stdout.splitlines() if line.split()[-2:-1] in (["w"], ["v"]) and "torch" in line
    ]


@needs_build
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_a_cpu_build_of_torch_leaves_them_alone():
    assert "is not a CUDA build" in str(backends.BACKENDS["cuda"].missing)
    assert torch.isfinite(ctu(torch.randn(5), 0.9)).all()


def test_a_forced_backend_that_cannot_serve_says_why():
    reason = backends.BACKENDS["cuda"].missing or "serves cuda tensors, got one on cpu"
    with ctkernels.use_backend("cuda"), pytest.raises(RuntimeError) as error:
        ctu(torch.ones(2), 0.9)
    assert "backend 'cuda' was forced but cannot serve this tensor" in str(error.value)
    assert reason in str(error.value)


@needs_nvcc
@linux
def test_a_library_of_kernels_compiles_loads_and_reports_a_missing_device(tmp_path):
    """The smallest files, for one architecture, warnings as errors; `make build-cuda` builds all of it."""
    target = tmp_path / "kernels.so"
    sources = [str(ROOT / "csrc/cuda" / name) for name in ("launch.cu", "reduce.cu", "gates.cu")]
    command = [
        "nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-arch=sm_80", "-shared", "-cudart=static",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Werror", '-DCTK_ARCHITECTURES="sm_80"',
        '-DCTK_SELECT=" ctk_reduce_shared ctk_gates_forward_f32 "', *sources, "-o", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    code = f"""
import ctypes
from ctypes import c_char_p, c_int32, c_uint32, c_uint64, c_void_p
class Launch(ctypes.Structure):
    _fields_ = [("kernel", c_char_p), ("grid", c_uint32), ("block_x", c_uint32), ("block_y", c_uint32), ("shared", c_uint32),
                ("args", c_void_p), ("args_size", c_uint64), ("stream", c_void_p), ("scratch", c_void_p), ("count", c_int32)]
library = ctypes.CDLL({str(target)!r})
library.ctk_cuda_launch.restype = library.ctk_cuda_architectures.restype = ctypes.c_char_p
print(library.ctk_cuda_architectures().decode())
args = ctypes.create_string_buffer(4096)
for name in (b"no_such", b"ctk_reduce_shared"):
    print(library.ctk_cuda_launch(ctypes.byref(Launch(name, 1, 128, 1, 1024, ctypes.addressof(args), 4096, None, None, 0))))
"""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=hidden)
    archs, unknown, missing = done.stdout.splitlines()
    assert archs == "sm_80"
    assert unknown == "b'no such kernel'"
    assert "device" in missing or "driver" in missing
