"""The base of all results: one JSON format, the versions behind the numbers, and aligned tables of text."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar

from .. import __version__
from .._files import write_text
from .report.section import SECTIONS, Section


class Result:
    """A result that is saved as JSON under a schema of its own, and shown in the report.

    A subclass gives ``SCHEMA``, :meth:`entries` and :meth:`section`, so the keys of a schema are written and read in
    one file. ``PACKAGES`` names packages whose versions matter beside the usual ones.
    """

    SCHEMA: ClassVar[str] = ""
    PACKAGES: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.SCHEMA:
            SECTIONS[cls.SCHEMA] = cls.section

    def entries(self) -> dict[str, Any]:
        """The result as plain values, without schema and versions."""
        raise NotImplementedError

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        """The report's section about a saved result."""
        raise NotImplementedError

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Everything as plain values for JSON, with ``extra`` entries (a command line, say) at the end."""
        return {"schema": self.SCHEMA, **self.entries(), "versions": versions(*self.PACKAGES), **extra}

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write :meth:`to_dict` as JSON through a temporary name; lists of objects have one object a line."""
        write_text(path, to_json(self.to_dict(**extra)))


@dataclass(frozen=True, kw_only=True)
class SteeringResult(Result):
    """The outcome of something that was done with a steered network.

    Attributes:
        sites: names of the activations that were steered.
        missed: selected activations that could not be, with the reason.
        sizes: images in ``train``, ``val`` and ``test``, and ``classes``.
        arguments: what the function was called with.
    """

    sites: tuple[str, ...]
    missed: tuple[str, ...]
    sizes: dict[str, int]
    arguments: dict[str, Any]

    def entries(self) -> dict[str, Any]:
        sites, missed = list(self.sites), list(self.missed)
        return {"sites": sites, "missed": missed, "sizes": self.sizes, "arguments": self.arguments}


def to_json(values: Mapping[str, Any]) -> str:
    """Values as JSON, indented but for the objects of lists, which stand on one line each."""
    entries = []
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        entries.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and of ``more``, where they are installed."""
    installed = {"python": platform.python_version(), "ctkernels": __version__}
    for package in ("torch", "numpy", "scikit-learn", "torchvision", "timm", *more):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def percent(share: float) -> str:
    """0.5 is ``"50.0 %"``."""
    return f"{100 * share:.1f} %"


def describe(setting: Mapping[str, Any]) -> str:
    """``{"lr": 0.1}`` is ``"lr 0.1"``."""
    return ", ".join(f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in setting.items()) or "–"
