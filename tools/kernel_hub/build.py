"""Writes the repository of a kernel.

    build.toml, flake.nix, CARD.md    what the Hub's builder, ``kernel-builder``, reads
    torch-ext/ctkernels/              the sources
    README.md, LICENSE                the card, as the Hub shows it
    build/CARD.md                     the card again, where the builder's upload takes it from
    build/torch-BACKEND/              the same sources, with a namespace and metadata.json: what ``kernels`` loads

The sources are ``functional.py`` and ``ops/`` of the package as they are; ``kernel/`` adds ``__init__.py`` and ``layers.py``.
Nothing is compiled, so what the builder makes of them and ``build/`` differ only in the namespace of the ops, ``_ops.py``.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import string
import sys
from pathlib import Path
from typing import Any

from ctkernels._files import temporary_folder

ROOT = Path(__file__).parents[2]
PACKAGE, OWN = ROOT / "ctkernels", Path(__file__).parent / "kernel"
NAME = "ctkernels"
BACKENDS = ("cpu", "cuda")  # where the kernels have been run; elsewhere the ops are plain torch
LEFT_OUT = ("frozen_conv", "max_pool2d", "head_edit_linear", "samples.py", "sample.py")  # of fusion, adapters and tests
NAMESPACE = "_ops.py"
# Imported on some device, where installed, or only by type checkers; everything else has to be in the kernel, or in Python.
MAY_IMPORT = sys.stdlib_module_names | {"torch", "triton", "typing_extensions", "flash_attn"}

BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""


def write_kernel(out: Path, repo_id: str, version: int) -> list[str]:
    """Writes the repository and returns the identifiers of its builds.

    Args:
        out: a folder; a kernel in it is replaced.
        repo_id: "owner/name" on the Hub.
        version: of the kernel's API, 0 or more.

    Raises:
        ValueError: another form of ``repo_id``, a negative version, an ``out`` that holds something else, or a module with an
            import that would fail inside a kernel.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}")
    if version < 0:
        raise ValueError(f"version must be 0 or more, got {version}")
    if out.exists() and not (out.is_dir() and ((out / "build.toml").exists() or not any(out.iterdir()))):
        raise ValueError(f"out must be a new or empty folder, or hold a kernel (build.toml), got {out}")
    license = re.search(r'^license = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert license is not None
    values = {"name": NAME, "version": version, "license": license[1].lower(), "repo_id": repo_id}
    build = BUILD.format(**values, backends=", ".join(f'"{backend}"' for backend in BACKENDS))
    files = sources()
    check_imports(files)
    revision = _revision({**files, "build.toml": build.encode()})
    card = string.Template((OWN / "CARD.md").read_text(encoding="utf-8")).substitute(values)
    texts = {"build.toml": build, "README.md": card, "CARD.md": card, "build/CARD.md": card}
    for path in (OWN / "flake.nix", ROOT / "LICENSE"):
        texts[path.name] = path.read_text(encoding="utf-8")
    ids = []
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out.absolute().parent) as folder:
        repository = folder / "kernel"
        _write(repository, {name: text.encode() for name, text in texts.items()})
        _write(repository / "torch-ext" / NAME, files)
        for backend in BACKENDS:
            ids.append(f"_{NAME}_{backend}_{revision}")
            variant = {**files, NAMESPACE: namespace(ids[-1])}
            metadata: dict[str, Any] = {
                "name": NAME,
                "id": ids[-1],
                "version": version,
                "license": values["license"],
                "python-depends": [],
                "backend": {"type": backend},
                "digest": {"algorithm": "sha256", "files": {name: digest(data) for name, data in variant.items()}},
            }
            _write(repository / "build" / f"torch-{backend}", variant)
            _write(
                repository / "build" / f"torch-{backend}", {"metadata.json": json.dumps(metadata, indent=2).encode()}
            )
        if out.exists():
            shutil.rmtree(out)
        repository.rename(out)
    return ids


def sources() -> dict[str, bytes]:
    """The modules of the kernel, by their path in it, sorted; all but the namespace."""
    paths = {path.relative_to(OWN).as_posix(): path for path in OWN.glob("*.py")}
    for path in (PACKAGE / "functional.py", *(PACKAGE / "ops").rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if not set(LEFT_OUT) & set(relative.parts):
            paths[relative.as_posix()] = path
    return {name: paths[name].read_bytes() for name in sorted(paths)}


def namespace(identifier: str) -> bytes:
    """``_ops.py`` with another namespace."""
    text = (PACKAGE / NAMESPACE).read_text(encoding="utf-8")
    before, after = f"torch.ops.{NAME}\n", f"torch.ops.{identifier}\n"
    assert text.count(before) == 1
    return text.replace(before, after).encode()


def check_imports(files: dict[str, bytes]) -> None:
    """Raises ValueError for an import of another package, or of a module of this one that is not in the kernel.

    A kernel is loaded from any folder, under any name, and nothing is installed for it.
    """
    modules = {Path(name).with_suffix("") for name in (*files, NAMESPACE)}
    modules |= {module.parent for module in modules if module.name == "__init__"}
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                origin = Path(name).parents[node.level - 1] / (node.module or "").replace(".", "/")
                inside = {origin / alias.name for alias in node.names}  # modules, or names in the origin
                needed = {origin} | {path for path in inside if (PACKAGE / path).is_dir() or _file(path).exists()}
                wrong = {module.as_posix() for module in needed - modules}
            else:
                full = [str(node.module)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                wrong = {module for module in full if module.partition(".")[0] not in MAY_IMPORT}
            if wrong:
                raise ValueError(
                    f"{name}:{node.lineno}: imports {', '.join(sorted(wrong))}, which a kernel does not have"
                )


def _file(module: Path) -> Path:
    return (PACKAGE / module).with_suffix(".py")


def digest(data: bytes) -> str:
    """SHA-256 as metadata.json has it."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _revision(files: dict[str, bytes]) -> str:
    """A short name of the content: another for every change, so that two builds can be loaded into one process."""
    content = "".join(f"{name}:{digest(files[name])}\n" for name in sorted(files))
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
