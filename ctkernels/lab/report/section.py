"""The sections of the report, with facts, tables and pictures, and the functions that make them, by schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A table for the report or as text.

    Attributes:
        words: indices of columns of words, besides the first; the others have numbers.
        folded: shown only on demand.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()
    folded: bool = False

    @classmethod
    def of(
        cls, caption: str, items: Iterable[T], columns: Mapping[str, Callable[[T], str]], words: Sequence[int] = ()
    ) -> Table:
        """A table with a row per item. ``columns``: header -> function from an item to its cell."""
        return cls(caption, list(columns), [[cell(item) for cell in columns.values()] for item in items], words)

    def text(self) -> str:
        """The table as aligned text without its caption, words to the left and numbers to the right."""
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
    """A picture as a data URI, with its alternative text."""

    source: str
    alt: str
    caption: str = ""


@dataclass
class Section:
    """A section about one result. ``stage``: a key of ``STAGES``. ``not_helped``: sentences for the summary."""

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
"""Schema of a result file -> the function that makes a section from its values. Result classes register themselves."""


def subject(values: Mapping[str, Any]) -> str:
    """The network and the data in a result of the command line, for a title."""
    options = values.get("options") or {}
    model, data = options.get("model"), options.get("data")
    return f": {model} on {Path(str(data)).name}" if model and isinstance(data, (str, Path)) else ""


def images(sizes: Mapping[str, Any]) -> tuple[str, str]:
    """The fact about the numbers of images."""
    purposes = (("train", "to train the probe"), ("val", "validation"), ("test", "test"))
    counts = ", ".join(f"{sizes[name]} {purpose}" for name, purpose in purposes if name in sizes)
    return "Images", f"{counts}; {sizes['classes']} classes"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def gain(row: Mapping[str, Any]) -> str:
    """A gain in points with its standard error."""
    return f"{100 * row['gain']:+.1f} ± {100 * row['standard_error']:.1f}"


def beta_name(beta: float | None) -> str:
    return "plain" if beta is None else f"{beta:g}"
