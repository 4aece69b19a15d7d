"""Builds the release files and tests each in fresh environments: ``make wheels``.

    dist/ctkernels-V.tar.gz                       source
    dist/ctkernels-V-py3-none-any.whl             pure Python
    dist/ctkernels-V-cp310-abi3-manylinux*.whl    with the CPU kernels, for every Python from 3.10 and every torch from 2.11

The native wheel is built from the source distribution, to detect files missing there; auditwheel determines the oldest glibc
it supports, and abi3audit checks that it uses only Python's limited API. Then every wheel is installed with a torch into an
empty environment of every available Python, and runs ``SMOKE`` in an empty folder.

    python tools/wheels.py --python 3.10 3.12 --torch 2.11.0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

SMOKE = """
import sys, warnings, torch
warnings.simplefilter("error")
import ctkernels
from ctkernels import functional as F
x = torch.linspace(-4, 4, 4099, dtype=torch.float64, requires_grad=True)
beta = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
y = F.ctu(x, beta)
s = 1 - beta
w = 0.5 * x * torch.sigmoid(beta * x / s) + 0.5 * s * torch.nn.functional.softplus(x / s, threshold=1e3)
assert torch.allclose(y, w, rtol=1e-12, atol=1e-12), (y - w).abs().max()
for got, want in zip(torch.autograd.grad(y.sum(), (x, beta)), torch.autograd.grad(w.sum(), (x, beta))):
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9), (got - want).abs().max()
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
handle = ctkernels.steer(net, 0.9); handle.remove()
backend = "cpu" if ctkernels.ops.backends.NATIVE is not None else "reference"
assert backend == sys.argv[1], f"served by {backend}, expected {sys.argv[1]}: {ctkernels.explain(x)}"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {backend}, right")
"""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command; its output is shown only if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done


def build(out: Path) -> list[Path]:
    """Build the source distribution, the pure wheel and the native wheel; return the wheels."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT,
        env={**os.environ, "CTKERNELS_BUILD": "none"})  # fmt: skip
    (source,) = out.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        for mode in ("none", "cpu"):
            print(f"building, CTKERNELS_BUILD={mode}", flush=True)
            run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", Path(folder) / "wheels", unpacked,
                env={**os.environ, "CTKERNELS_BUILD": mode})  # fmt: skip
        (pure,) = (Path(folder) / "wheels").glob("*-py3-none-any.whl")
        (native,) = (Path(folder) / "wheels").glob("*-abi3-linux_*.whl")
        shutil.copy(pure, out)
        # torch ships these libraries and loads them before ours.
        excluded = [f"--exclude={name}" for name in ("libc10.so", "libtorch.so", "libtorch_cpu.so")]
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, native)
    (repaired,) = out.glob("*manylinux*.whl")
    audit = json.loads(run(sys.executable, "-m", "abi3audit", "--report", repaired).stdout)
    print(f"abi3audit: {json.dumps(audit)[:400]}")
    return [out / pure.name, repaired]


def interpreters(wanted: list[str]) -> dict[str, str]:
    """Map versions to the interpreters available on PATH or from pyenv."""
    found = {}
    for version in wanted:
        places = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        place = shutil.which(f"python{version}") if not places else str(places[-1])
        if (
            place
            and subprocess.run([place, "-c", "import venv, ssl"], capture_output=True, check=False).returncode == 0
        ):
            found[version] = place
        else:
            print(f"Python {version}: not on this machine, not tried")
    return found


def try_wheels(wheels: list[Path], python: str, torch: str) -> None:
    """Install torch and each wheel in turn into a new environment, and run :data:`SMOKE` in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment, empty = Path(folder) / "venv", Path(folder) / "empty"
        run(python, "-m", "venv", environment)
        empty.mkdir()
        inside = environment / "bin/python"
        run(inside, "-m", "pip", "install", "--quiet", f"torch=={torch}")
        for wheel in wheels:
            began = time.perf_counter()
            run(inside, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
            took = time.perf_counter() - began
            expected = "reference" if "py3-none-any" in wheel.name else "cpu"
            said = run(inside, "-c", SMOKE, expected, cwd=empty).stdout.strip()
            run(environment / "bin/ctkernels", "--version", cwd=empty)
            print(f"{wheel.name}: installed in {took:.1f} s; {said}", flush=True)


def main() -> None:
    """Build, then test."""
    parser = argparse.ArgumentParser(description="Build the release files and try each in fresh environments.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the files (default: dist)")
    parser.add_argument(
        "--python", nargs="*", default=list(PYTHONS), metavar="V", help="versions to try (default: all)"
    )
    parser.add_argument("--only-try", action="store_true", help="try the wheels that are there; build none")
    parser.add_argument("--torch", nargs="*", default=["2.13.0"], metavar="V", help="versions of torch to try")
    arguments = parser.parse_args()
    if arguments.only_try:
        wheels = sorted(arguments.out.glob("*.whl"))
    else:
        shutil.rmtree(arguments.out, ignore_errors=True)
        wheels = build(arguments.out)
    for path in sorted(arguments.out.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    for place in interpreters(arguments.python).values():
        for torch in arguments.torch:
            try_wheels(wheels, place, torch)


if __name__ == "__main__":
    main()
