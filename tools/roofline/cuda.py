"""The CUDA kernels for ``python -m roofline``, compiled by nvcc without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from . import sass
from .gpus import GPUS, Cost

BUDGETS = Path(__file__).parent / "budgets_cuda.json"
CUDA = Path(__file__).parents[2] / "csrc/cuda"
ITEMSIZE = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8}
THREADS = 128


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def kernels() -> dict[str, list[str]]:
    """The kernels with 16-byte accesses, by storage type."""
    found: dict[str, list[str]] = {}
    for op, dtypes, tiles, form in (
        ("ctu_logistic", ("f32", "bf16", "f16"), ("plane", "lanes"), "plain"),
        *(
            (f"ctu_{variant}", ("f32", "bf16"), ("plane",), "vector")
            for variant in ("leaky", "relu6", "gaussian", "tanh")
        ),
        ("head_edit", tuple(ITEMSIZE), ("plane", "lanes"), "vector"),
    ):
        for t in dtypes:
            names = [f"ctk_{op}_{p}_{t}_{tile}_{form}" for p in ("forward", "backward") for tile in tiles]
            found.setdefault(t, []).extend(names)
    return found


@lru_cache(maxsize=32)
def _cubin(names: tuple[str, ...], file: Path, options: tuple[str, ...], sm: int) -> bytes:
    """The cubin of these kernels of a file."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc: install the CUDA toolkit, or set CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        command = [compiler, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", f"-arch=sm_{sm}", *options]
        command += [f'-DCTK_SELECT=" {" ".join(names)} "', str(file)]
        subprocess.run([*command, "-o", str(out)], check=True)
        return out.read_bytes()


def listings(names: tuple[str, ...], sm: int) -> dict[str, sass.Listing]:
    """The machine code of kernels, by name."""
    from cuda_recorder import source

    by_source: dict[tuple[Path, tuple[str, ...]], list[str]] = {}
    for name in names:
        file, options = source(name)
        by_source.setdefault((file, tuple(options)), []).append(name)
    return {
        name: sass.disassemble(_cubin(tuple(group), file, options, sm), name)
        for (file, options), group in by_source.items()
        for name in group
    }


def cost(dtype: str, kernel: str, sm: int) -> Cost:
    """The cost of the main loop, which moves the tensors."""
    cubin = _cubin(tuple(kernels()[dtype]), CUDA / "channelwise.cu", (f"-DCTK_DTYPE={dtype}",), sm)
    listing = sass.disassemble(cubin, kernel)
    loops = [
        (a, b)
        for a, b in listing.loops
        if any(i.name == "STG" and i.bytes == 16 for i in listing.instructions[a : b + 1])
    ]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    # The compiler can generate several versions of a loop, with and without sums: take the one with most work.
    body = max((listing.instructions[a : b + 1] for a, b in inner), key=len)
    backward, full = "_backward_" in kernel, kernel.endswith("_vector") and "head_edit" not in kernel
    # Kernels with a prologue also have accesses to the residual and its gradient, which are skipped where there is none.
    moves = [i for i in body if i.name in ("LDG", "STG") and i.bytes == 16]
    packs = sum(i.name == "STG" for i in moves) / (2 if backward and full else 1)
    elements = packs * 16 / ITEMSIZE[dtype]
    moved = float(ITEMSIZE[dtype] * (3 if backward else 2))
    pipes = {k: v / elements for k, v in sass.pipes(body).items()}
    narrowest = min(i.bytes for i in body if i.name in ("LDG", "STG"))
    resident = min(32, 2048 // THREADS, 65536 // (-(-listing.registers // 8) * 8 * THREADS)) * THREADS // 32
    calls = sum(
        i.name == "CALL" and "$" in i.operands for i in body
    )  # other calls leave a loop, as ptxas does on sm_80
    made = Cost(
        f"cuda {kernel.removeprefix('ctk_')}", sm, True, moved, len(body) / elements, pipes, narrowest, listing.registers,
        listing.stack, sum(i.name in ("LDL", "STL") for i in body), calls, resident, 0.0, "",
    )  # fmt: skip
    clocks = GPUS[sm].clocks(made)
    limit = max(clocks, key=lambda k: clocks[k])
    return replace(made, ratio=clocks[limit] / clocks["memory"], limit=limit)


def costs(archs: list[int], only: str = "") -> Iterator[Cost]:
    """Yield the costs of kernels with ``only`` in their name."""
    for dtype, names in kernels().items():
        for name in names:
            if only in name:
                for sm in archs:
                    yield cost(dtype, name, sm)
