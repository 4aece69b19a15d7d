"""Builds the native kernels. CTKERNELS_BUILD = auto (default) | none | cpu | cuda decides what.

auto   the CPU kernels if there are torch and a C++ compiler that can build them, and the CUDA kernels too where there is a GPU to
       run them, nvcc, and a CUDA build of torch; else a pure-Python install, and one line that says why
none   pure Python: the reference backend (and Triton on a GPU)
cpu    the CPU kernels; an error without a compiler
cuda   the CPU kernels, and those in csrc/cuda; needs no GPU; an error without nvcc and a CUDA build of torch

CTKERNELS_CUDA_ARCHS="80 90" builds for those compute capabilities only; "native" for this machine's. Default: all.

CTKERNELS_SANITIZE="address undefined" builds with those sanitizers, for the tests.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
TARGET = "0x020b000000000000"  # the oldest LibTorch the binary must load in: 2.11

# The CPU kernels are compiled once per SIMD level; the widest one that the machine has is picked at run time.
LEVELS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mbmi2",
                   "-mprefer-vector-width=512"],
    },
}  # fmt: skip
# None of these changes what is computed for any value but the sign of a zero. Jump threading would turn the selects into
# branches, and the loops into scalar code.
KERNEL_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fno-thread-jumps",
                "-fno-split-paths"]  # fmt: skip
# Every current architecture, each from the PTX of the newest of three that is not newer than itself. The tests execute that
# PTX; the newest goes into the library too, for architectures to come.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
PTX_ARCHS = ("80", "90", "100")
CUDA_DTYPES = ("f32", "f64", "bf16", "f16")  # channelwise.cu is compiled for each
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xcompiler",
              "-fPIC,-fvisibility=hidden,-Wall,-Werror"]  # fmt: skip
# Warnings are errors, -Wswitch of -Wall among them: a variant or dtype that is not handled somewhere does not compile.
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
            import torch  # noqa: F401
        except ImportError:
            problem = (
                "torch is not visible to the build; pip install torch ninja, then install with --no-build-isolation"
            )
    if problem is None and mode == "cuda":
        problem = cuda_problem()
    if problem is None and mode == "auto":
        return "cuda" if cuda_problem() is None and has_gpu() else "cpu"
    if problem is None:
        return mode
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
    return None


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def cuda_archs() -> list[str]:
    given = os.environ.get("CTKERNELS_CUDA_ARCHS", "").split()
    if given == ["native"]:
        import torch

        found = {"".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())}
        archs = sorted((a for a in found if int(a) >= int(PTX_ARCHS[0])), key=int)
        return archs or sys.exit(
            f"CTKERNELS_CUDA_ARCHS=native: no GPU of compute capability 8.0 or more here; found {found}"
        )
    unknown = [a for a in given if a not in CUDA_ARCHS]
    if unknown:
        sys.exit(f"CTKERNELS_CUDA_ARCHS must be of {' '.join(CUDA_ARCHS)}, or native; got {' '.join(unknown)}")
    return given or list(CUDA_ARCHS)


def build_cuda_kernels(directory: Path, target: Path) -> None:
    """Compiles csrc/cuda/*.cu into one library, which needs the CUDA driver when a kernel is launched, and nothing else."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc, archs = str(Path(CUDA_HOME) / "bin/nvcc"), cuda_archs()
    ptx = {a: max((p for p in PTX_ARCHS if int(p) <= int(a)), key=int) for a in archs}
    newest = max(ptx.values(), key=int)
    code = [f"-gencode=arch=compute_{ptx[a]},code=sm_{a}" for a in archs]
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    define = f'-DCTK_ARCHITECTURES="{" ".join(f"sm_{a}" for a in archs)} compute_{newest}"'
    directory.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    units = [(source, []) for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if source.stem != "channelwise"]
    units += [(ROOT / "csrc/cuda/channelwise.cu", [f"-DCTK_DTYPE={dtype}"]) for dtype in CUDA_DTYPES]
    objects = [str(directory / f"cuda_{number}.o") for number in range(len(units))]

    def compile_one(unit: tuple[Path, list[str]], to: str) -> None:
        source, options = unit
        subprocess.run([nvcc, *CUDA_FLAGS, *code, define, *options, "-c", str(source), "-o", to], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, units, objects))
    subprocess.run([nvcc, "-shared", "-cudart=static", *objects, "-o", str(target)], check=True)


def native_extensions(mode: str, fall_back: bool) -> tuple[list[Extension], dict[str, type[Command]]]:
    """The extensions of ``mode``, cpu or cuda, and the commands that build them.

    fall_back: whether a compile error leaves an install without native kernels.
    """
    from torch.utils import cpp_extension

    arch = platform.machine()
    levels = LEVELS.get(arch, {"baseline": []})
    sanitize = os.environ.get("CTKERNELS_SANITIZE", "").split()
    # Recovering from undefined behaviour would let a test pass that printed a report nobody reads.
    extra = [f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    extra = extra if sanitize else []

    class Build(cpp_extension.BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)):
        """Adds the objects of the SIMD levels, each with its own flags, to the extension that needs them."""

        def run(self) -> None:
            if not fall_back:
                return super().run()
            try:
                super().run()
            except Exception as error:  # whatever the toolchain says: an install without kernels is what auto promises
                for ext in self.extensions:
                    for built in {self.get_ext_fullpath(ext.name), f"{ext.name.replace('.', os.sep)}.abi3.so"}:
                        Path(built).unlink(missing_ok=True)
                self.extensions = self.distribution.ext_modules = []
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"ctkernels: building without native kernels: the compiler failed ({first}); "
                      "CTKERNELS_BUILD=cpu makes this an error", file=sys.stderr)  # fmt: skip

        def build_extension(self, ext: Extension) -> None:
            if ext.name == "ctkernels._cuda_kernels":
                build_cuda_kernels(Path(self.build_temp), Path(self.get_ext_fullpath(ext.name)))
                return
            if ext.name == "ctkernels._C":
                directory = Path(self.build_temp)
                directory.mkdir(parents=True, exist_ok=True)
                for level, flags in levels.items():
                    target = directory / f"kernels_{level}.o"
                    source = ROOT / "csrc/cpu/kernels.cpp"
                    command = [*self.compiler.compiler_so, *COMMON_FLAGS, *KERNEL_FLAGS, *flags, *extra]
                    self.spawn([*command, f"-DCTK_LEVEL={level}", "-c", str(source), "-o", str(target)])
                    ext.extra_objects.append(str(target))
            super().build_extension(ext)

    class Wheel(bdist_wheel):
        """Builds first, then tags: what a failed compile left out makes the wheel a pure one."""

        def run(self) -> None:
            self.run_command("build")
            self.skip_build = True
            self.root_is_pure = not self.distribution.ext_modules
            super().run()

    flags = [*COMMON_FLAGS, "-O3", f"-DTORCH_TARGET_VERSION={TARGET}", *extra]
    headers = [str(p.relative_to(ROOT)) for pattern in ("*.h", "*.def") for p in (ROOT / "csrc").rglob(pattern)]

    def extension(name: str, *sources: str) -> Extension:
        ext = cpp_extension.CppExtension(
            f"ctkernels.{name}",
            [f"csrc/{source}" for source in sources],
            extra_compile_args={"cxx": flags},
            extra_link_args=extra,
            py_limited_api=True,
            depends=headers,
        )
        # The stable ABI is all the code uses; linking libtorch_python would tie it to one Python and one torch.
        ext.libraries = [library for library in ext.libraries if library != "torch_python"]
        return ext

    extensions = [
        extension("_C", "module.cpp", "cpu/bind.cpp", "cpu/eager.cpp", "cpu/driver.cpp", "cpu/dispatch.cpp"),
        # The host code of the CUDA kernels needs no CUDA; without the library of kernels, the tests run it.
        extension("_cuda", "cuda/bind.cpp", "cuda/driver.cpp"),
    ]
    if mode == "cuda":
        cuda_sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        headers += [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cuh")]
        extensions.append(Extension("ctkernels._cuda_kernels", cuda_sources, py_limited_api=True, depends=headers))
    return extensions, {"build_ext": Build, "bdist_wheel": Wheel}


mode = wanted()
automatic = os.environ.get("CTKERNELS_BUILD", "auto") == "auto"
extensions, commands = ([], {}) if mode == "none" else native_extensions(mode, fall_back=automatic)
setup(
    # The wheel has the benchmarks inside the package, for `python -m ctkernels bench`.
    packages=[*find_packages(include=["ctkernels*"]), "ctkernels.benchmarks"],
    package_dir={"ctkernels.benchmarks": "benchmarks"},
    ext_modules=extensions,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
