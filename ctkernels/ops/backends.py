"""Backends, and the choice between them: by tensor, or forced by the user.

Each backend states why it cannot serve a tensor; the first without a reason is used. Exceptions never decide.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def built(module: str) -> bool:
    """Whether a compiled module of this package exists, under any suffix this Python imports (Windows has its own)."""
    return any((Path(__file__).parent.parent / (module + suffix)).exists() for suffix in EXTENSION_SUFFIXES)


def _load_native() -> tuple[ModuleType | None, str | None]:
    """The extension module with the CPU kernels, or why it is missing. Loading registers the kernels."""
    if not built("_C"):
        return None, "not built (CTKERNELS_BUILD=none, or no C++ compiler when the package was installed)"
    return importlib.import_module("ctkernels._C"), None


CUDA_BINDING = Path(__file__).parent.parent / "_cuda.abi3.so"
CUDA_KERNELS = Path(__file__).parent.parent / "_cuda_kernels.abi3.so"


def _load_cuda() -> str | None:
    """Loads and registers the compiled CUDA kernels, or returns why they are missing."""
    if not CUDA_KERNELS.exists() or not CUDA_BINDING.exists():
        return "not built (CTKERNELS_BUILD=cuda builds it, with nvcc and a CUDA build of torch)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    try:
        libtorch = ctypes.CDLL("libtorch_cuda.so", os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError as error:
        return f"torch's CUDA library is not loaded ({error})"
    binding, kernels = ctypes.CDLL(str(CUDA_BINDING)), ctypes.CDLL(str(CUDA_KERNELS))
    for slot, function in (
        ("ctk_cuda_launcher", kernels.ctk_cuda_launch),
        ("ctk_cuda_current_stream", libtorch.aoti_torch_get_current_cuda_stream),
    ):
        ctypes.c_void_p.in_dll(binding, slot).value = ctypes.cast(function, ctypes.c_void_p).value
    binding.ctk_cuda_register(b"ctkernels", b"CUDA")
    return None


# Nobody has run the Triton kernels on AMD's GPUs; the tests compile them for these, and this variable allows them.
HIP_ARCHITECTURES = ("gfx90a", "gfx942", "gfx1200")
ALLOW_HIP = "CTKERNELS_TRITON_HIP"


def _triton_missing() -> str | None:
    """Why the Triton kernels are missing, or None. Triton itself is imported on the first CUDA call."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip and os.environ.get(ALLOW_HIP) != "1":
        return f"compiled for AMD GPUs but never run on one; {ALLOW_HIP}=1 allows it"
    return None


_CAPABILITIES: dict[int, tuple[int, int]] = {}
_ARCHITECTURES: dict[int, str] = {}


def _capability(device: int) -> tuple[int, int]:
    if device not in _CAPABILITIES:  # torch.compile warns about an lru_cache
        # Without a GPU the tensor is fake: assume a device that runs everything.
        real = torch.cuda.is_available()
        _CAPABILITIES[device] = torch.cuda.get_device_capability(device) if real else (1 << 10, 0)
    return _CAPABILITIES[device]


def _architecture(device: int) -> str:
    """The architecture of an AMD GPU, such as ``gfx942``."""
    if device not in _ARCHITECTURES:
        real = torch.cuda.is_available()  # otherwise as above
        name = torch.cuda.get_device_properties(device).gcnArchName if real else HIP_ARCHITECTURES[0]
        _ARCHITECTURES[device] = name.partition(":")[0]
    return _ARCHITECTURES[device]


def _gpu_refusal(device: int, capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on a GPU, or None."""
    if torch.version.hip:
        name = _architecture(device)
        return None if name in HIP_ARCHITECTURES else f"compiled for {', '.join(HIP_ARCHITECTURES)}, got {name}"
    if (got := _capability(device)) < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}, got {got[0]}.{got[1]}"
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops.

    device: the device type it serves; None for any. missing: why it is unavailable in this process, or None.
    capability: lowest compute capability it serves, on CUDA. unproven: what nobody has tried of it in this process, or None.
    """

    name: str
    device: str | None
    missing: str | None
    capability: tuple[int, int] = (0, 0)
    unproven: str | None = None

    def refusal(self, x: Tensor) -> str | None:
        """Why this backend cannot serve ``x``, or None."""
        if self.missing is not None:
            return self.missing
        if self.device is not None and x.device.type != self.device:
            return f"serves {self.device} tensors, got one on {x.device.type}"
        if self.device == "cuda" and (reason := _gpu_refusal(x.get_device(), self.capability)) is not None:
            return reason
        if x.dtype not in DTYPES:
            return f"serves {', '.join(str(t).removeprefix('torch.') for t in DTYPES)}, got {x.dtype}"
        return None


NATIVE, _native_missing = _load_native()
BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "cpu", _native_missing),
        Backend("cuda", "cuda", _load_cuda(), (8, 0)),
        Backend("triton", "cuda", _triton_missing(), (8, 0), "never run on an AMD GPU" if torch.version.hip else None),
        Backend("reference", None, None),
    )
}

FORCED: list[str] = []  # names forced by `use_backend`, in any thread; the last one counts


def forced() -> str | None:
    """The forced backend, or None."""
    last = FORCED[-1:]  # a slice: another thread may empty the list meanwhile
    return last[0] if last else None


def uses_reference(x: Tensor) -> bool:
    """Whether the reference overrides the dispatcher's kernel for ``x``: if forced, or on a GPU too old for the kernels."""
    if FORCED:
        return forced() == "reference"
    if not x.is_cuda:
        return False
    cuda = BACKENDS["cuda"]
    return cuda.missing is None and _capability(x.get_device()) < cuda.capability


def choose(x: Tensor) -> Backend:
    """The backend that serves ``x``; RuntimeError if the forced one cannot."""
    name = forced()
    if name is not None:
        refusal = BACKENDS[name].refusal(x)
        if refusal is not None:
            raise RuntimeError(f"backend {name!r} was forced but cannot serve this tensor: {refusal}")
        return BACKENDS[name]
    return next(b for b in BACKENDS.values() if b.refusal(x) is None)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Dtype of a call's Python numbers: float64, so that 1 - beta keeps every digit; float32 on devices without float64."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return torch.float32
    return torch.float64


def check_forced_backend(x: Tensor) -> None:
    """Raises RuntimeError if the forced backend cannot serve ``x``."""
    if FORCED:
        choose(x)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every ctkernels op in the process, for the duration of the context.

    Args:
        name: ``"cpu"`` or ``"cuda"`` (compiled), ``"triton"`` (on CUDA tensors) or ``"reference"`` (plain torch). Under
            ``torch.compile``, ops are opaque to the compiler, except those of ``"reference"``: ctkernels/ops/README.md.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: from an op called with a tensor that the backend cannot serve; the message has the reason.

    Examples:
        >>> with ctkernels.use_backend("reference"):
        ...     y = ctkernels.functional.ctu(torch.randn(8), 0.9)
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    FORCED.append(name)
    try:
        yield
    finally:  # remove the last of this name: contexts of two threads may end in any order
        del FORCED[len(FORCED) - 1 - FORCED[::-1].index(name)]
