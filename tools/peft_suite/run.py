"""Runs peft's own tests, from its source distribution, with this package's methods in place of peft's.

    python tools/peft_suite/run.py [--fast] [pytest arguments]

The source distribution of the installed peft is downloaded once into the cache folder, not into this repository. The hub
models of its tests are created there too: tiny, with random weights, under the same names. Intended failures are listed with
their reasons in `suite_exceptions.py`; a listed test that passes fails the run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "peft_tests"
CACHE = Path(tempfile.gettempdir()) / "ctkernels-peft-suite"
MODULES = ("custom_models", "decoder_models", "feature_extraction_models", "encoder_decoder_models")


class NotDownloaded(RuntimeError):
    """pip could not download the source distribution."""


def unpack_tests(cache: Path) -> Path:
    """Return the folder with peft's tests as the package `peft_tests`; download them if they are missing.

    Raises:
        NotDownloaded: pip could not download the source distribution.
        RuntimeError: the distribution contains no tests.
    """
    version = importlib.metadata.version("peft")
    folder = cache / f"peft-{version}"
    if (folder / PACKAGE).is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "peft", "--dest", scratch, f"peft=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise NotDownloaded(f"peft {version}: its source distribution could not be downloaded\n{done.stderr}")
        (archive,) = Path(scratch).glob("peft-*.tar.gz")
        made = Path(scratch) / "made"
        (made / PACKAGE).mkdir(parents=True)
        (made / PACKAGE / "__init__.py").touch()
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and parts[1:2] == ("tests",) and len(parts) == 3 and parts[2].endswith(".py"):
                    source = tar.extractfile(member)
                    assert source is not None
                    (made / PACKAGE / parts[2]).write_bytes(source.read())
        missing = [name for name in MODULES if not (made / PACKAGE / f"test_{name}.py").exists()]
        if missing:
            raise RuntimeError(f"peft {version}: its source distribution holds no tests of {missing}")
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / PACKAGE).is_dir():
                raise
    return folder


def command(cache: Path, arguments: list[str]) -> tuple[list[str], dict[str, str], Path]:
    """The pytest command over peft's tests, its environment, and the folder to run it in."""
    folder = unpack_tests(cache)
    recipe = hashlib.sha256((HERE / "suite_models.py").read_bytes()).hexdigest()[:12]
    hub = folder / f"hub-{recipe}"  # other recipes have their own folders
    hub.mkdir(exist_ok=True)
    paths = [str(HERE), str(HERE.parents[1]), str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    pytest = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    pytest += ["-p", "suite_plugin", "-q", "--no-header", "-W", "ignore", "--tb=short", *arguments]
    if not any(argument.startswith(PACKAGE) or ".py" in argument for argument in arguments):
        pytest += [str(folder / PACKAGE / f"test_{name}.py") for name in MODULES]
    return pytest, environment, hub


def main() -> int:
    """Run the suite; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the download is kept (default {CACHE})")
    parser.add_argument("--fast", action="store_true", help="a handful of tests on an MLP instead of all")
    options, arguments = parser.parse_known_args()
    if options.fast:
        arguments = ["--fast", *arguments]
    pytest, environment, hub = command(options.cache, arguments)
    return subprocess.run(pytest, env=environment, cwd=hub).returncode


if __name__ == "__main__":
    sys.exit(main())
