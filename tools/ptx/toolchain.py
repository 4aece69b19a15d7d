"""CUDA and Triton sources to PTX, without a GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .launch import Launch
from .parser import parse

TARGETS = (80, 90, 100)


@lru_cache(maxsize=1)
def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    found = shutil.which("nvcc")
    if found:
        return found
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            return str(Path(home) / "bin" / "nvcc")
    return None


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def _nvcc_version() -> str:
    return subprocess.run([nvcc() or "nvcc", "--version"], check=True, capture_output=True, text=True).stdout


def cache_directory() -> Path:
    """Where compiled PTX is kept: $CTK_PTX_CACHE, or a directory of this user under the temporary one."""
    path = os.environ.get("CTK_PTX_CACHE") or str(Path(tempfile.gettempdir()) / f"ctk-ptx-{os.getuid()}")
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def compile_cuda(
    source: str | Path, sm: int, *, options: Sequence[str] = (), include: Sequence[str | Path] = ()
) -> str:
    """PTX of a CUDA source (text, or the path of a file), with line information.

    The result is kept by content: the source, all headers under the include directories, the options and the compiler.
    """
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc")
    directories = [Path(p) for p in include]
    if isinstance(source, Path):
        directories.append(source.parent)
    digest = hashlib.sha256()
    text = source.read_text() if isinstance(source, Path) else source
    for part in (_nvcc_version(), str(sm), *options, text, *map(str, directories)):
        digest.update(part.encode() + b"\0")
    for directory in directories:
        for path in sorted(p for p in directory.rglob("*") if p.suffix in (".h", ".cuh", ".hpp", ".cu")):
            digest.update(str(path).encode() + b"\0" + path.read_bytes())
    cached = cache_directory() / f"{digest.hexdigest()[:32]}.ptx"
    if not cached.exists():
        with tempfile.TemporaryDirectory() as folder:
            path = source if isinstance(source, Path) else Path(folder) / "source.cu"
            if not isinstance(source, Path):
                path.write_text(source)
            out = Path(folder) / "out.ptx"
            command = [compiler, "-std=c++17", "-O3", "-lineinfo", "-ptx", f"-arch=sm_{sm}", "-o", str(out), str(path)]
            command += [*options, *(f"-I{d}" for d in directories)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc failed:\n{done.stderr}")
            partial = cached.with_suffix(f".{os.getpid()}")
            partial.write_text(out.read_text())
            partial.replace(cached)
    return cached.read_text()


@dataclass
class TritonKernel:
    """A Triton kernel compiled ahead of time.

    `params` names the arguments the PTX takes, in order; `hidden` more follow, which Triton appends for scratch memory.
    """

    ptx: str
    entry: str
    shared: int
    num_warps: int
    params: list[str]
    hidden: int

    def launch(self, grid: Sequence[int], **arguments: Any) -> Launch:
        """A launch with the arguments by name."""
        if set(arguments) != set(self.params):
            raise TypeError(f"arguments {sorted(arguments)} for parameters {self.params}")
        args = [arguments[p] for p in self.params] + [0] * self.hidden
        return Launch(self.ptx, self.entry, grid, (32 * self.num_warps, 1, 1), self.shared, args)


def compile_triton(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    sm: int,
    *,
    divisible: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    options: Mapping[str, Any] | None = None,
) -> TritonKernel:
    """Compiles a @triton.jit function for a GPU that need not be there.

    `signature` gives the Triton type of each non-constant argument (`*fp32`, `i32`, ...), `constants` the values of the
    constexpr ones, `divisible` names the arguments known to be multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = [p.name for p in function.params]
    full = {name: "constexpr" if name in constants else signature[name] for name in order}
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in divisible}
    values = {(order.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=function, signature=full, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
    )
    if getattr(compiled.metadata, "global_scratch_size", 0):
        raise NotImplementedError("Triton kernels with global scratch memory")
    text = compiled.asm["ptx"]
    (entry,) = parse(text).entries
    params = [name for name in order if name not in constants]
    hidden = len(parse(text).functions[entry].params) - len(params)
    return TritonKernel(text, entry, compiled.metadata.shared, compiled.metadata.num_warps, params, hidden)


@lru_cache(maxsize=1024)
def demangle(name: str) -> str:
    """A C++ symbol in source form; the name itself where no demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return name
    return subprocess.run([tool, name], check=True, capture_output=True, text=True).stdout.strip()


def find_entry(ptx: str, *parts: str) -> str:
    """The one kernel whose demangled (or raw) name contains all the parts."""
    found = [n for n in parse(ptx).entries if all(p in demangle(n) or p in n for p in parts)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} kernels match {parts}: {[demangle(n) for n in parse(ptx).entries]}")
    return found[0]
