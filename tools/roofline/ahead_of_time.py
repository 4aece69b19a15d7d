"""Ahead-of-time compilation of Triton launches, without a GPU. Needs Triton."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import create_function_from_signature

_COMPILED: dict[Any, Any] = {}


def target_of(arch: int | str) -> GPUTarget:
    """The target of a compute capability, such as 90, or of an AMD architecture, such as ``gfx942``."""
    if isinstance(arch, int):
        return GPUTarget("cuda", arch, 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def specialized(
    kernel: Any, args: dict[str, Any], meta: dict[str, Any], arch: int | str
) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """The arguments by name, what Triton compiles the kernel for because of them (types, alignments, constants), and options."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target_of(arch)))
    found: tuple[dict[str, Any], list[Any], dict[str, Any]] = bind(**args, **meta)
    return found


def compiled(kernel: Any, args: dict[str, Any], meta: dict[str, Any], arch: int | str) -> tuple[Any, dict[str, Any]]:
    """The kernel that Triton would launch for these arguments on this architecture, and the arguments it would pass, with the
    types, alignments and constants that Triton derives from them."""
    target = target_of(arch)
    backend = make_backend(target)
    bound, specialization, options = specialized(kernel, args, meta, arch)
    key = (kernel.cache_key, arch, str(specialization), str(sorted(options.items())), str(meta))
    if key not in _COMPILED:
        options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
        source = ASTSource(kernel, signature, constants, attributes)
        with mock.patch.object(driver, "_active", SimpleNamespace(get_current_target=lambda: target)):
            _COMPILED[key] = (compile(source, target=target, options=options.__dict__), signature)
    found, signature = _COMPILED[key]
    return found, {name: value for name, value in bound.items() if signature[name] != "constexpr"}
