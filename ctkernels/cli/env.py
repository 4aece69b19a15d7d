"""python -m ctkernels env: what is installed, what was built, and which backend serves what, and why."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import torch

import ctkernels

from .._files import write_text
from ..ops import backends, eager
from ..ops.backends import BACKENDS, DTYPES
from ..ops.registration import OPS
from . import option_types as types
from .errors import Parser

OPTIONAL = (
    "triton",
    "torchvision",
    "timm",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "scikit-learn",
    "matplotlib",
)

_IMITATED = "not run; without float64, imitated on the CPU: tests/ops/test_devices.py"
# What serves each kind of hardware, and what shows that it is right; paths are the repository's.
HARDWARE = {
    "x86-64 CPUs": (
        "compiled kernels: baseline, AVX2, AVX-512",
        "run: every test; the other SIMD levels: tests/package/test_build.py",
    ),
    "ARM CPUs": (
        "compiled kernels: baseline",
        "not run; cross-compiled: tests/package/test_build.py; the same source is tested on x86-64",
    ),
    "NVIDIA GPUs from 8.0": (
        "compiled CUDA kernels, or Triton",
        "run on an H100: docs/gpu.md; code for sm_80, sm_90 and sm_100 executed on the CPU: docs/proof.md",
    ),
    "older NVIDIA GPUs": ("plain torch", "not run"),
    "AMD GPUs (HIP)": (
        "plain torch; Triton with CTKERNELS_TRITON_HIP=1",
        "not run; compiled for gfx90a, gfx942 and gfx1200, and what replaces PTX executed: tests/gpu_free/test_triton_amd.py",
    ),
    "Intel GPUs (XPU)": ("plain torch", _IMITATED),
    "Apple GPUs (MPS)": ("plain torch", _IMITATED),
}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = Parser(
        prog="python -m ctkernels env",
        description="Print versions, devices, what was built, which backend serves which op and dtype, and why, and what is "
        "proven of each kind of hardware.",
    )
    p.add_argument(
        "--json",
        nargs="?",
        const=Path("-"),
        type=types.OUT_FILE,
        metavar="FILE",
        help="as JSON, for scripts: to a file, or to standard output (default: of --json alone)",
    )
    return p


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    report = describe()
    if arguments.json is None:
        print(_text(report))
    elif arguments.json == Path("-"):
        print(json.dumps(report, indent=1))
    else:
        write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    return 0


def describe() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    versions: dict[str, str | None] = {
        "ctkernels": ctkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in OPTIONAL:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = [{"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                "simd": torch.backends.cpu.get_cpu_capability()}]  # fmt: skip
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "sms": p.multi_processor_count,
            }
        )
    return {
        "versions": versions,
        "devices": devices,
        "native": _native(),
        "cuda": _cuda(),
        "backends": {
            b.name: {"serves": b.device or "any device", "missing": b.missing, "unproven": b.unproven}
            for b in BACKENDS.values()
        },
        "dispatch": _dispatch([str(d["device"]) for d in devices]),
        "hardware": {name: {"served_by": served, "proven": proof} for name, (served, proof) in HARDWARE.items()},
    }


def _native() -> dict[str, Any]:
    """The compiled CPU kernels: their file, build settings, and instruction set on this machine."""
    if backends.NATIVE is None:
        return {"built": False, "why": BACKENDS["cpu"].missing}
    library = ctypes.CDLL(str(backends.NATIVE.__file__))
    return {
        "built": True,
        "library": str(backends.NATIVE.__file__),
        "compiler": _exported(library, "ctk_compiler"),
        "simd_levels": (_exported(library, "ctk_simd_levels") or "").split(),
        "simd_level_used": _exported(library, "ctk_simd_level"),
        "threads": torch.get_num_threads(),
        "eager_calls": eager.describe(),
    }


def _cuda() -> dict[str, Any]:
    """The compiled CUDA kernels: their file and architectures, also without a GPU."""
    path = backends.CUDA_KERNELS
    if not path.exists():
        return {"built": False, "why": BACKENDS["cuda"].missing}
    library = ctypes.CDLL(str(path))
    return {
        "built": True,
        "library": str(path),
        "architectures": (_exported(library, "ctk_cuda_architectures") or "").split(),
        "kernels": len(cuda_kernels()),
    }


def cuda_kernels() -> list[str]:
    """Names of the kernels in the compiled CUDA library."""
    library = ctypes.CDLL(str(backends.CUDA_KERNELS))
    named = (_exported(library, "ctk_cuda_kernel", i) for i in itertools.count())
    return list(itertools.takewhile(lambda name: name is not None, named))  # type: ignore[arg-type]


def _exported(library: ctypes.CDLL, function: str, *arguments: int) -> str | None:
    """Call an exported ``const char* function(int...)``; None for a null pointer."""
    call = getattr(library, function)
    call.restype, call.argtypes = ctypes.c_char_p, [ctypes.c_int] * len(arguments)
    text = call(*arguments)
    return None if text is None else text.decode()


def _dispatch(devices: list[str]) -> list[dict[str, Any]]:
    """The backend of every op, device type and dtype, with the reasons against other backends."""
    rows = []
    for op, device, dtype in itertools.product(OPS, dict.fromkeys(d.split(":")[0] for d in devices), DTYPES):
        x = torch.empty(1, dtype=dtype, device=device)
        passed: dict[str, str] = {}
        for backend in BACKENDS.values():
            refusal = backend.refusal(x)
            if refusal is None:
                name = str(dtype).removeprefix("torch.")
                rows.append({"op": op, "device": device, "dtype": name, "backend": backend.name, "passed_over": passed})
                break
            passed[backend.name] = refusal
    return rows


def _text(report: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {name:<13} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines.append("devices")
    lines += [
        f"  {d.pop('device'):<13} {', '.join(f'{k} {v}' for k, v in d.items())}" for d in map(dict, report["devices"])
    ]
    lines.append("native kernels")
    lines += [f"  {k:<15} {', '.join(v) if isinstance(v, list) else v}" for k, v in report["native"].items()]
    lines.append("CUDA kernels")
    lines += [f"  {k:<15} {', '.join(v) if isinstance(v, list) else v}" for k, v in report["cuda"].items()]
    lines.append("backends, in the order they are tried")
    lines += [
        f"  {n:<13} {b['serves']:<11} {b['missing'] or b['unproven'] or 'available'}"
        for n, b in report["backends"].items()
    ]
    lines.append("dispatch")
    for row in report["dispatch"]:
        why = "; ".join(f"not {name}: {reason}" for name, reason in row["passed_over"].items()) or "first choice"
        lines.append(f"  {row['op']:<13} {row['device']:<5} {row['dtype']:<9} {row['backend']:<10} {why}")
    lines.append("hardware, and what is proven of it")
    lines += [f"  {name:<21} {h['served_by']:<42} {h['proven']}" for name, h in report["hardware"].items()]
    return "\n".join(lines)
