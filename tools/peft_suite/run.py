"""Runs peft's own tests, from its source distribution, with this package's methods in place of peft's.

    python tools/peft_suite/run.py [--proposal] [--fast] [pytest arguments]

The source distribution of the installed peft is downloaded once into the cache folder, not into this repository. The hub
models of its tests are created there too: tiny, with random weights, under the same names. Intended failures are listed with
their reasons in `suite_exceptions.py`; a listed test that passes fails the run.

With --proposal, the method under test is `contrib/peft`, laid over the unpacked source distribution; nothing may fail.
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
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONTRIB = ROOT / "contrib" / "peft"
PACKAGE = "peft_tests"
CACHE = Path(tempfile.gettempdir()) / "ctkernels-peft-suite"
MODULES = ("custom_models", "decoder_models", "feature_extraction_models", "encoder_decoder_models")


class NotDownloaded(RuntimeError):
    """pip could not download the source distribution."""


def download(cache: Path) -> Path:
    """Return the source distribution of the installed peft; download it if it is missing.

    Raises:
        NotDownloaded: pip could not download it.
    """
    version = importlib.metadata.version("peft")
    archive = cache / f"peft-{version}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", "peft", "--dest", scratch, f"peft=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise NotDownloaded(f"peft {version}: its source distribution could not be downloaded\n{done.stderr}")
            (downloaded,) = Path(scratch).glob("peft-*.tar.gz")
            downloaded.replace(archive)
    return archive


def unpack(archive: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """Unpack a source distribution to `folder`, where it is not there, and apply `change` to the tree first.

    Raises:
        RuntimeError: the distribution contains no tests.
    """
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        (made,) = Path(scratch).iterdir()
        missing = [name for name in MODULES if not (made / "tests" / f"test_{name}.py").exists()]
        if missing:
            raise RuntimeError(f"{archive.name}: holds no tests of {missing}")
        (made / "tests" / "__init__.py").touch()
        change(made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _hub(folder: Path) -> Path:
    """The folder for the hub's models, which other recipes do not share."""
    recipe = hashlib.sha256((HERE / "suite_models.py").read_bytes()).hexdigest()[:12]
    hub = folder / f"hub-{recipe}"
    hub.mkdir(exist_ok=True)
    return hub


def command(cache: Path, arguments: list[str]) -> tuple[list[str], dict[str, str], Path]:
    """The pytest command over peft's tests with our methods, its environment, and the folder to run it in."""
    archive = download(cache)
    folder = unpack(archive, cache / f"{archive.name}-tests", lambda root: (root / "tests").rename(root / PACKAGE))
    return _command("suite_plugin", folder, [HERE, ROOT, folder], PACKAGE, MODULES, arguments)


def proposal(cache: Path, arguments: list[str]) -> tuple[list[str], dict[str, str], Path]:
    """The same over a source tree with `contrib/peft` in it, without this package."""
    archive = download(cache)
    sources = sorted(path for path in CONTRIB.rglob("*") if path.suffix in (".py", ".md"))
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    sys.path.insert(0, str(CONTRIB))
    import apply

    folder = unpack(archive, cache / f"{archive.name}-jola-{stamp}", apply.apply)
    return _command(
        "proposal_plugin", folder, [HERE, folder / "src", folder], "tests", (*MODULES, "config", "jola"), arguments
    )


def _command(
    plugin: str, folder: Path, paths: list[Path], package: str, modules: tuple[str, ...], arguments: list[str]
) -> tuple[list[str], dict[str, str], Path]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    pytest = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    pytest += ["-p", plugin, "-q", "--no-header", "-W", "ignore", "--tb=short", *arguments]
    if not any(argument.startswith(package) or ".py" in argument for argument in arguments):
        pytest += [str(folder / package / f"test_{name}.py") for name in modules]
    return pytest, environment, _hub(folder)


def main() -> int:
    """Run the suite; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the download is kept (default {CACHE})")
    parser.add_argument("--fast", action="store_true", help="a handful of tests on an MLP instead of all")
    parser.add_argument(
        "--proposal", action="store_true", help="contrib/peft laid over peft's source, instead of ctkernels"
    )
    options, arguments = parser.parse_known_args()
    if options.fast:
        arguments = ["--fast", *arguments]
    pytest, environment, hub = (proposal if options.proposal else command)(options.cache, arguments)
    return subprocess.run(pytest, env=environment, cwd=hub).returncode


if __name__ == "__main__":
    sys.exit(main())
