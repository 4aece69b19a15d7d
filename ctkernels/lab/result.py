"""The base of all results: their JSON format, and the versions of packages behind the numbers."""

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
    """A result that is saved as JSON, and shown in the report.

    Each subclass defines its ``SCHEMA``, :meth:`entries`, which writes the schema, and :meth:`section`, which reads it.
    ``PACKAGES`` names further packages whose versions are recorded.
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
        """The section of the report for a saved result."""
        raise NotImplementedError

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Plain values for JSON, with ``extra`` entries (such as the command line) at the end."""
        return {"schema": self.SCHEMA, **self.entries(), "versions": versions(*self.PACKAGES), **extra}

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Writes :meth:`to_dict` as JSON, to a temporary file that is then renamed."""
        write_text(path, to_json(self.to_dict(**extra)))


@dataclass(frozen=True, kw_only=True)
class SteeringResult(Result):
    """The base of results about steered networks.

    Attributes:
        sites: names of the steered activations.
        missed: selected activations that cannot be steered, with the reason.
        sizes: numbers of ``train``, ``val`` and ``test`` images, and of ``classes``.
        arguments: of the function that made the result.
    """

    sites: tuple[str, ...]
    missed: tuple[str, ...]
    sizes: dict[str, int]
    arguments: dict[str, Any]

    def entries(self) -> dict[str, Any]:
        sites, missed = list(self.sites), list(self.missed)
        return {"sites": sites, "missed": missed, "sizes": self.sizes, "arguments": self.arguments}


def to_json(values: Mapping[str, Any]) -> str:
    """Values as indented JSON, with one line for each object of a list."""
    entries = []
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        entries.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def versions(*more: str) -> dict[str, str]:
    """The versions of Python, of the packages that results depend on, and of ``more`` packages, if installed."""
    installed = {"python": platform.python_version(), "ctkernels": __version__}
    for package in ("torch", "numpy", "scikit-learn", "torchvision", "timm", *more):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def percent(share: float) -> str:
    """Formats a share: 0.5 is ``"50.0 %"``."""
    return f"{100 * share:.1f} %"


def describe(setting: Mapping[str, Any]) -> str:
    """Formats a setting: ``{"lr": 0.1}`` is ``"lr 0.1"``."""
    return ", ".join(f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in setting.items()) or "–"
