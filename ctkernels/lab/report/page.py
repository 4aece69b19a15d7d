"""One self-contained HTML page from result files: runs, their results, and the commands to repeat them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ... import __version__
from ..._extras import require
from ..._files import read_json, write_text
from . import kernels  # noqa: F401  (adds its section)
from .section import SECTIONS, STAGES, Section, Table


def find_results(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files among ``paths``, and every ``result.json``, at any depth, of the folders among them.

    Raises:
        ValueError: a path does not exist, or a folder has no results.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("result.json") if p.is_file())
            if not inside:
                raise ValueError(f"{path}: expected result.json files in the folder, found none")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    if not files:
        raise ValueError("results must be at least one file or folder, got none")
    return list(dict.fromkeys(files))


def read_section(path: Path) -> Section:
    """Reads a result file as a section.

    Raises:
        ValueError: the file is no JSON, has an unknown schema, or lacks entries; the message names the file.
    """
    values = read_json(path)
    kind = _kind(values)
    if kind not in SECTIONS:
        description = f"schema {kind!r}" if isinstance(kind, str) else f"a {type(values).__name__} without a schema"
        raise ValueError(f"{path}: expected a result of {', '.join(sorted(SECTIONS))}, got {description}")
    try:
        section = SECTIONS[kind](values)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: calls itself {kind} but is damaged: {type(error).__name__}: {error}") from error
    section.source = str(path)
    section.command = section.command or _command(values)
    settings = {k: values[k] for k in ("arguments", "options", "setup", "provenance", "versions") if k in values}
    section.settings = json.dumps(settings, indent=1, ensure_ascii=False, default=str)
    return section


def build(paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], title: str = "") -> Path:
    """Writes ``out/index.html`` from result files. The page is self-contained.

    Args:
        paths: result files of any kind, or folders of them.
        out: folder of the page.
        title: of the page. Default: "Curvature report".

    Returns:
        the path of the page.

    Raises:
        ValueError: a file is missing, no JSON, of an unknown schema, or damaged; nothing is written.
        ImportError: Jinja2 or matplotlib is missing; the message names the extra.

    Examples:
        >>> build(["out/steer"], "report")
        PosixPath('report/index.html')
    """
    target = Path(out)
    if target.exists() and not target.is_dir():
        raise ValueError(f"out must be a folder, {target} is a file")
    require("jinja2", "lab", "the report")
    require("matplotlib", "lab", "the report")
    page = render([read_section(path) for path in find_results(paths)], title or "Curvature report")
    write_text(target / "index.html", page)
    return target / "index.html"


def render(sections: Sequence[Section], title: str) -> str:
    """The page with these sections. All text is escaped; pictures are data URIs."""
    stages = [
        {"key": key, "name": name, "about": about, "sections": [s for s in sections if s.stage == key]}
        for key, (name, about) in STAGES.items()
    ]
    return template("page.html").render(
        title=title,
        stages=[stage for stage in stages if stage["sections"]],
        not_helped=list(dict.fromkeys(line for s in sections for line in s.not_helped)),
        version=__version__,
        is_table=lambda part: isinstance(part, Table),
    )


def template(name: str, package: str | None = None) -> Any:
    """A template of ``package``, or of this one, with escaping; it may include templates of both packages."""
    jinja = require("jinja2", "lab", "the report")
    folders = [resources.files(p) for p in (package, __package__) if p]

    def read(part: str) -> str | None:
        files = (folder.joinpath(part) for folder in folders)
        return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)

    environment = jinja.Environment(
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja.FunctionLoader(read),
    )
    return environment.get_template(name)


def _kind(values: Any) -> Any:
    if not isinstance(values, dict):
        return None
    if "schema" in values:
        return values["schema"] if isinstance(values["schema"], str) else None
    if "draws" in values:
        return "draws"
    return "benchmarks" if "records" in values and "provenance" in values else None


def _command(values: Mapping[str, Any]) -> str:
    command = values.get("command", values.get("provenance", {}).get("command", ""))
    return " ".join(["python", *map(str, command)]) if isinstance(command, list) else str(command)
