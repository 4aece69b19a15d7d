"""The CUDA host code (csrc/cuda/partition.h, as a pybind11 module) partitions tensors as the Triton launches do."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from ctkernels.ops.channelwise.partition import partition_for
from ctkernels.ops.layout import View

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
HEADERS = [Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))]  # torch brings pybind11 along
MISSING = [name for name, there in {
    "a C++ compiler": COMPILER is not None,
    "pybind11": (HEADERS[0] / "pybind11/pybind11.h").exists(),
    "the headers of Python": (HEADERS[1] / "Python.h").exists(),
}.items() if not there]  # fmt: skip
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")

Shape = tuple[int, int, int, int]  # groups, outer, channels, inner


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    library = tmp_path_factory.mktemp("partition") / "partition_module.so"
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *HEADERS)]
    source = Path(__file__).parent / "partition_module.cpp"
    assert COMPILER is not None
    subprocess.run(
        [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", *includes, str(source), "-o", str(library)], check=True
    )
    spec = importlib.util.spec_from_file_location("partition_module", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes():
    """The kinds of layout at sizes around every threshold, and far beyond what fits a memory."""
    draw = random.Random(7)
    sizes = [
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        12,
        16,
        31,
        32,
        33,
        49,
        64,
        100,
        128,
        196,
        255,
        256,
        257,
        512,
        768,
        1000,
        3072,
        4096,
        65536,
    ]
    found = {(draw.choice((1, 1, 2, 8)), *(draw.choice(sizes) for _ in range(3))) for _ in range(4000)}
    found |= {(1, 1, c, i) for c in (1, 2, 2**15) for i in (1, 2**14, 2**15, 2**15 + 8, 2**16)}
    return sorted(found)


def triton(shape, itemsize, sums):
    """The partition of a Triton launch, lengths in values, in the words of the C++ one."""
    view = View(*shape)
    p = partition_for(view, itemsize, sums)
    return {
        "plane": p.plane,
        "vector": p.unit == 16 // itemsize,
        "one_pass": p.one_pass,
        "threads": 32 * p.warps,
        "repeat": p.repeat,
        "blocks": p.programs,
        "group": view.outer * view.channels * view.inner,
        "row": p.row_units * p.unit,
        "cols_per": p.cols_per * p.unit,
        "rows": p.rows,
        "rows_per": p.rows_per,
        "row_cuts": p.row_cuts,
        "col_cuts": p.col_cuts,
        "slots": p.slots,
        "columns": p.columns(view),
    }


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_both_make_the_same_partition(cuda, itemsize, sums):
    for shape in shapes():
        assert cuda.partition_with(*shape, 16 // itemsize, sums) == triton(shape, itemsize, sums), shape


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_single_values_where_vectors_do_not_fit(cuda, itemsize, sums):
    """Lengths that no vector divides, storage that starts anywhere, and blocks that finish the sums of their own columns."""
    kinds = set()
    for shape in shapes():
        vectors, single = (cuda.partition_with(*shape, n, sums) for n in (16 // itemsize, 1))
        finishes = sums and vectors["one_pass"] and not vectors["plane"]
        expected = vectors if vectors["vector"] and not finishes else single
        assert cuda.partition_for(*shape, itemsize, sums, True) == expected, shape
        assert cuda.partition_for(*shape, itemsize, sums, False) == single, shape
        kinds.add((vectors["vector"], finishes))
    assert kinds == {(True, False), (False, False)} | ({(True, True), (False, True)} if sums else set())


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_value_is_in_one_block(cuda, itemsize):
    for shape in shapes():
        groups, _, channels, _ = shape
        p = cuda.partition_with(*shape, 16 // itemsize, True)
        width = shape[3] if p["plane"] else p["row"]
        assert (p["row_cuts"] - 1) * p["rows_per"] < p["rows"] <= p["row_cuts"] * p["rows_per"], shape
        assert (p["col_cuts"] - 1) * p["cols_per"] < width <= p["col_cuts"] * p["cols_per"], shape
        assert p["blocks"] == groups * (channels if p["plane"] else 1) * p["row_cuts"] * p["col_cuts"], shape


@pytest.mark.parametrize(("itemsize", "steps"), [(2, 4), (4, 7)])
def test_few_blocks_that_see_all_of_a_channel_take_few_steps(cuda, itemsize, steps):
    """One image's channels: a block each, all at once, so that its steps are the time of the call."""
    values = 16 // itemsize
    for channels, threads in ((256, 128), (4096, 32)):
        p = cuda.partition_with(1, 1, channels, 3136, values, True)
        assert (p["one_pass"], p["blocks"], p["threads"]) == (True, channels, threads)
    assert -(-3136 // (128 * values)) == steps
    forward = cuda.partition_with(1, 1, 256, 3136, values, False)  # leaves no sums: many blocks
    assert forward["blocks"] > 1024
