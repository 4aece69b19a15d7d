"""Which code serves a call: chosen from the tensor, explainable, and forceable.

Every backend says why it cannot serve a tensor, or that it can; the first that can is used. Nothing is found out by
catching exceptions.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

OPS = ("ctu", "head_edit", "hard_concrete")  # served by a backend each call; attention makes its own choice
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def built(module: str) -> bool:
    """Whether a compiled module of this package is there, under any name that this Python imports: Windows has its own."""
    return any((Path(__file__).parent.parent / (module + suffix)).exists() for suffix in EXTENSION_SUFFIXES)


def _load_native() -> tuple[ModuleType | None, str | None]:
    """The compiled CPU kernels, or why they are not there. Loading them registers them with the dispatcher."""
    if not built("_C"):
        return None, "not built (CTKERNELS_BUILD=none, or no C++ compiler when the package was installed)"
    from ctkernels import _C  # type: ignore[attr-defined]

    return _C, None


CUDA_BINDING = Path(__file__).parent.parent / "_cuda.abi3.so"
CUDA_KERNELS = Path(__file__).parent.parent / "_cuda_kernels.abi3.so"


def _load_cuda() -> str | None:
    """Loads the compiled CUDA kernels and makes them the dispatcher's, or says why they are not there."""
    if not CUDA_KERNELS.exists() or not CUDA_BINDING.exists():
        return "not built (CTKERNELS_BUILD=cuda builds it, with nvcc and a CUDA build of torch)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    try:
        torchs = ctypes.CDLL("libtorch_cuda.so", os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError as error:
        return f"torch's CUDA library is not loaded ({error})"
    binding, kernels = ctypes.CDLL(str(CUDA_BINDING)), ctypes.CDLL(str(CUDA_KERNELS))
    for slot, function in (
        ("ctk_cuda_launcher", kernels.ctk_cuda_launch),
        ("ctk_cuda_current_stream", torchs.aoti_torch_get_current_cuda_stream),
    ):
        ctypes.c_void_p.in_dll(binding, slot).value = ctypes.cast(function, ctypes.c_void_p).value
    binding.ctk_cuda_register(b"ctkernels", b"CUDA")
    return None


def _triton_missing() -> str | None:
    """Why there are no Triton kernels, or None. Triton itself is imported on the first CUDA call."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "the kernels are for NVIDIA GPUs" if torch.version.hip else None


_CAPABILITIES: dict[int, tuple[int, int]] = {}


def _capability(device: int) -> tuple[int, int]:
    if device not in _CAPABILITIES:  # not an lru_cache, of which torch.compile warns
        # Without a device, a tensor on one is a fake: taken to be where everything runs.
        known = torch.cuda.is_available()
        _CAPABILITIES[device] = torch.cuda.get_device_capability(device) if known else (1 << 10, 0)
    return _CAPABILITIES[device]


@dataclass(frozen=True)
class Backend:
    """``missing``: why this backend is not available here at all, or None. ``device``: the type it serves, None for any.
    ``capability``: the least compute capability of a CUDA device."""

    name: str
    device: str | None
    missing: str | None
    capability: tuple[int, int] = (0, 0)

    def refusal(self, x: Tensor) -> str | None:
        """Why this backend cannot serve ``x``, or None."""
        if self.missing is not None:
            return self.missing
        if self.device is not None and x.device.type != self.device:
            return f"serves {self.device} tensors, got one on {x.device.type}"
        if x.is_cuda and self.capability > (0, 0) and (found := _capability(x.get_device())) < self.capability:
            return f"needs compute capability {self.capability[0]}.{self.capability[1]}, got {found[0]}.{found[1]}"
        if x.dtype not in DTYPES:
            return f"serves {', '.join(str(t).removeprefix('torch.') for t in DTYPES)}, got {x.dtype}"
        return None


NATIVE, _native_missing = _load_native()
BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "cpu", _native_missing),
        Backend("cuda", "cuda", _load_cuda(), (8, 0)),
        Backend("triton", "cuda", _triton_missing(), (8, 0)),
        Backend("reference", None, None),
    )
}

_forced: list[str] = []  # by `use_backend`, those of other threads among them; the last one counts


def forced() -> str | None:
    """The backend that is forced, or None."""
    last = _forced[-1:]  # another thread may take it off meanwhile
    return last[0] if last else None


def reference_forced() -> bool:
    return forced() == "reference"


def reference_wanted(x: Tensor) -> bool:
    """Whether the reference serves ``x`` although the dispatcher has another kernel: forced, or on a GPU that is too old
    for the compiled kernels."""
    if _forced or not x.is_cuda:
        return forced() == "reference"
    cuda = BACKENDS["cuda"]
    return cuda.missing is None and _capability(x.get_device()) < cuda.capability


def triton_forced() -> bool:
    return forced() == "triton"


def triton_wanted() -> bool:
    """Whether Triton is forced where the dispatcher has compiled kernels."""
    return forced() == "triton" and BACKENDS["cuda"].missing is None


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
    """What numbers become on a device: float64, so that 1 - beta keeps every digit, float32 where there is no such thing."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return torch.float32
    return torch.float64


def forced_refusal(x: Tensor) -> None:
    """Raises if a backend is forced that cannot serve ``x``. Costs nothing when none is forced."""
    if _forced:
        choose(x)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every ctkernels op in the process, while the context lasts.

    name: ``"cpu"`` or ``"cuda"`` (compiled), ``"triton"`` (on CUDA tensors) or ``"reference"`` (plain torch). Raises
    ValueError for an unknown name; an op whose tensor the backend cannot serve raises RuntimeError with the reason. Under
    ``torch.compile``, ops are opaque to the compiler, but it sees through those of ``"reference"`` and ``"triton"``:
    ctkernels/ops/README.md.

    >>> with ctkernels.use_backend("reference"):
    ...     y = ctkernels.functional.ctu(x, 0.9)
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:  # the last one of this name: contexts of two threads may end in any order
        del _forced[len(_forced) - 1 - _forced[::-1].index(name)]


def explain(x: Tensor, op: str = "ctu") -> str:
    """Which backend would serve ``op`` on ``x``, and why each of the others would not.

    op: ``"ctu"``, ``"head_edit"``, ``"hard_concrete"`` or ``"attention_head_edit"`` (then x is q, and the keys are as many).

    >>> print(ctkernels.explain(torch.randn(8)))
    """
    known = (*OPS, "attention_head_edit")
    if op not in known:
        raise ValueError(f"explain: op must be one of {', '.join(map(repr, known))}; got {op!r}")
    if op == "attention_head_edit":
        from .attention import cost_model

        return cost_model.explain(x)
    chosen, name = next(b for b in BACKENDS.values() if b.refusal(x) is None), forced()
    lines = [f"{op} on a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"]
    for backend in BACKENDS.values():
        refusal = backend.refusal(x)
        if backend is chosen:
            note = "used" if name in (None, backend.name) else "first choice"
        else:
            note = refusal or "could serve it, comes later"
        if backend.name == name:
            note = f"forced; {refusal}" if refusal else "forced: used"
        lines.append(f"  {backend.name:<10} {note}")
    return "\n".join(lines)
