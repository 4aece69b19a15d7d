"""The generated section of a model card (README.md), which describes the files and how to load them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ._files import replacing

CARD = "README.md"
START, END = "<!-- ctkernels: written anew on saving -->", "<!-- ctkernels: end -->"


def write_card(folder: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` to the folder's model card: replaces the section of an earlier call, or inserts one at the beginning.

    Metadata (YAML between lines of ``---``) stays at the top. Bytes that are not UTF-8 are preserved.
    """
    path = Path(folder) / CARD
    card = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
    section = f"{START}\n{text.strip()}\n{END}"
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        metadata = re.match(r"---\r?\n.*?\r?\n---\r?\n\s*", card, re.DOTALL)
        before, after = card[: metadata.end()] if metadata else "", card[metadata.end() if metadata else 0 :]
        after = f"\n\n{after}" if after else "\n"
    with replacing(path) as temporary:
        temporary.write_bytes(f"{before}{section}{after}".encode("utf-8", "surrogateescape"))


def counted(number: int, thing: str) -> str:
    """A count with its noun: "1 module", "2 modules"."""
    return f"{number} {thing}{'s' * (number != 1)}"
