"""The Python on the pages of the documentation runs, in the order in which it stands there, and prints what they say."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from namespaces import NAMESPACES, namespace

ROOT = Path(__file__).parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SLOW = {"docs/export.md"}  # compiles
SHORT = {  # what a page says, and what is run instead so that it takes no longer than a minute
    "docs/tutorials/jola.md": {"train=200, val=50, test=100": "train=16, val=4, test=8", "epochs=3": "epochs=1"},
}


class Block(NamedTuple):
    """A block of Python, where it stands, and the block of text that follows it: what it prints; None if none does."""

    line: int
    code: str
    output: str | None


def blocks(page, short=True):
    text = page.read_text(encoding="utf-8")
    for said, instead in SHORT.get(page.relative_to(ROOT).as_posix(), {}).items() if short else ():
        assert text.count(said) == 1, f"{page}: expected {said!r} once"
        text = text.replace(said, instead)
    found = re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL)
    return [Block(text[: match.start(1)].count("\n"), match[1], match[2]) for match in found]


def pages():
    paths = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "ctkernels").rglob("README.md")]
    return sorted(
        path.relative_to(ROOT).as_posix() for path in paths if "```python" in path.read_text(encoding="utf-8")
    )


PAGES = [
    pytest.param(page, marks=[pytest.mark.slow] if page in SLOW or page.startswith("docs/tutorials/") else [])
    for page in pages()
]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page share their names; one that `NAMESPACES` lists starts with those as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)  # as in a clone
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(ROOT / page)):
        if (start := f"{page}#{number}") in NAMESPACES:
            names |= namespace(start)
        code = compile("\n" * block.line + block.code, str(ROOT / page), "exec")  # so that errors have the page's lines
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if block.output is not None:
            said = printed.getvalue()
            assert doctest.OutputChecker().check_output(block.output, said, FLAGS), (
                f"line {block.line} printed:\n{said}"
            )


def test_every_page_is_read():
    assert {"README.md", "docs/export.md", "docs/jola.md"} <= set(pages())
    starts = {start for start in NAMESPACES if "#" in start}
    assert starts <= {f"{page}#{number}" for page in pages() for number in range(len(blocks(ROOT / page)))}
