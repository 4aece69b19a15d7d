"""The parts of the report's page: sections with facts, tables and pictures, and who makes them from which schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table, for the report's page or as text: its first column names the rows, the others are numbers unless ``words``
    has their index.

    A ``folded`` one is shown when it is asked for.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()
    folded: bool = False

    def text(self) -> str:
        """The table in columns, without its caption: words start together, numbers end together."""
        lines, left = [self.header, *self.rows], (0, *self.words)
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths))).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """The table as Markdown."""
        rule = [":--" if i in (0, *self.words) else "--:" for i in range(len(self.header))]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.rows))


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with the text that stands for it where it cannot be seen."""

    source: str
    alt: str
    caption: str = ""


@dataclass
class Section:
    """One result. ``stage`` is a key of ``STAGES``; ``not_helped`` are sentences for the summary."""

    stage: str
    title: str
    verdict: Sequence[str] = ()
    facts: list[tuple[str, str]] = field(default_factory=list)
    parts: list[Table | Picture] = field(default_factory=list)
    command: str = ""
    source: str = ""
    not_helped: list[str] = field(default_factory=list)
    settings: str = ""


STAGES = {
    "pilot": (
        "Pilot: a fixed β, nothing trained",
        "Was it worth trying? A frozen network, its curvature turned by hand.",
    ),
    "trained": ("Trained", "Then the curvature, or the edits, were learned, beside other ways of adapting."),
    "robust": ("Robustness", "The same knob under attack and under corrupted images."),
    "understand": ("What the knob does", "Curvature, slope and decision boundaries."),
    "speed": ("Speed of the kernels", "What the operations cost."),
}

SECTIONS: dict[str, Callable[[Mapping[str, Any]], Section]] = {}
"""Schema of a result file -> what makes a section of its values. Classes of results add themselves."""


def subject(values: Mapping[str, Any]) -> str:
    """The network and the data of a result of the command line, for a title."""
    options = values.get("options") or {}
    model, data = options.get("model"), options.get("data")
    return f": {model} on {Path(str(data)).name}" if model and isinstance(data, (str, Path)) else ""


def images(sizes: Mapping[str, Any]) -> tuple[str, str]:
    """The fact that says how many images took part."""
    words = (("train", "to train the probe"), ("val", "validation"), ("test", "test"))
    shown = ", ".join(f"{sizes[name]} {word}" for name, word in words if name in sizes)
    return "Images", f"{shown}; {sizes['classes']} classes"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def gain(row: Mapping[str, Any]) -> str:
    """A gain in points with its standard error."""
    return f"{100 * row['gain']:+.1f} ± {100 * row['standard_error']:.1f}"


def beta_name(beta: float | None) -> str:
    return "plain" if beta is None else f"{beta:g}"
