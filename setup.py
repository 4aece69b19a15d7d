"""Builds the native kernels. CTKERNELS_BUILD = auto (default) | none | cpu | cuda decides what.

auto   the CPU kernels if there is a C++ compiler; a pure-Python install, and one line that says so, if not
none   pure Python: the reference backend (and Triton on a GPU)
cpu    the CPU kernels; an error without a compiler
cuda   the CPU kernels, and those in csrc/cuda; an error without nvcc and a CUDA build of torch

CTKERNELS_SANITIZE="address undefined" builds with those sanitizers, for the tests.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
TARGET = "0x020b000000000000"  # the oldest LibTorch the binary must load in: 2.11

# The block kernels are compiled once per SIMD level; the widest one that the machine has is picked at run time.
LEVELS = {
    "x86_64": {
        "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mbmi2",
                   "-mprefer-vector-width=512"],
    },
}  # fmt: skip
# None of these changes what is computed for any value but the sign of a zero. Jump threading would turn the selects into
# branches, and the loops into scalar code.
KERNEL_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fno-thread-jumps",
                "-fno-split-paths"]  # fmt: skip
COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]


def wanted() -> str:
    mode = os.environ.get("CTKERNELS_BUILD", "auto")
    if mode not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"CTKERNELS_BUILD must be auto, none, cpu or cuda; got {mode!r}")
    if mode == "none":
        return "none"
    compiler = os.environ.get("CXX", "c++")
    problem = None
    if shutil.which(compiler.split()[0]) is None:
        problem = f"no C++ compiler ({compiler}); install g++ or set CXX"
    else:
        try:
            import pybind11  # noqa: F401
            import torch  # noqa: F401
        except ImportError as error:
            problem = f"{error.name} is not installed; pip install {error.name}, then build with --no-build-isolation"
    if problem is None and mode == "cuda":
        problem = cuda_problem()
    if problem is None:
        return "cpu" if mode == "auto" else mode
    if mode == "auto":
        print(f"ctkernels: building without native kernels: {problem}", file=sys.stderr)
        return "none"
    sys.exit(f"CTKERNELS_BUILD={mode}: {problem}")


def cuda_problem() -> str | None:
    """Why CUDA kernels cannot be built here, and what to do about it."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin/nvcc").exists():
        return "no nvcc; install the CUDA toolkit and set CUDA_HOME, or use CTKERNELS_BUILD=cpu"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install a CUDA build of torch, or use CTKERNELS_BUILD=cpu"
    if not list((ROOT / "csrc").glob("cuda/*.cu")):
        return "this version has no CUDA C++ kernels (GPU tensors are served by Triton); use CTKERNELS_BUILD=cpu"
    return None


def native_extensions() -> tuple[list[Extension], dict]:
    import pybind11
    from torch.utils import cpp_extension

    arch = platform.machine()
    levels = LEVELS.get(arch, {"baseline": []})
    sanitize = os.environ.get("CTKERNELS_SANITIZE", "").split()
    # Recovering from undefined behaviour would let a test pass that printed a report nobody reads.
    extra = [f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    extra = extra if sanitize else []

    class Build(cpp_extension.BuildExtension.with_options(use_ninja=True)):
        """Adds the objects of the SIMD levels, each with its own flags, to the extension that needs them."""

        def build_extension(self, ext: Extension) -> None:
            if ext.name == "ctkernels._C":
                directory = Path(self.build_temp)
                directory.mkdir(parents=True, exist_ok=True)
                for level, flags in levels.items():
                    target = directory / f"kernels_{level}.o"
                    source = ROOT / "csrc/cpu/block_kernels.cpp"
                    command = [*self.compiler.compiler_so, *COMMON_FLAGS, *KERNEL_FLAGS, *flags, *extra]
                    self.spawn([*command, f"-DCTK_LEVEL={level}", "-c", str(source), "-o", str(target)])
                    ext.extra_objects.append(str(target))
            super().build_extension(ext)

    flags = [*COMMON_FLAGS, "-O2", f"-DTORCH_TARGET_VERSION={TARGET}", *extra]
    kernels = cpp_extension.CppExtension(
        "ctkernels._C",
        ["csrc/module.cpp", "csrc/cpu/bind.cpp", "csrc/cpu/channelwise.cpp", "csrc/cpu/simd.cpp"],
        extra_compile_args={"cxx": [*flags, "-DPy_LIMITED_API=0x030A0000"]},
        extra_link_args=extra,
        py_limited_api=True,
        depends=[str(p) for p in (ROOT / "csrc").rglob("*.h")],
    )
    introspection = cpp_extension.CppExtension(
        "ctkernels._introspect",
        ["csrc/introspect.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": flags},
        extra_link_args=extra,
    )
    for extension in (kernels, introspection):
        # The stable ABI is all the code uses; linking libtorch_python would tie it to one Python and one torch.
        extension.libraries = [lib for lib in extension.libraries if lib != "torch_python"]
    return [kernels, introspection], {"build_ext": Build}


mode = wanted()
extensions, commands = ([], {}) if mode == "none" else native_extensions()
setup(ext_modules=extensions, cmdclass=commands, options={"bdist_wheel": {"py_limited_api": False}})
