"""The figures of the front page and of the results are written by a generator, from files of results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the generator reads results with the laboratory")
pytest.importorskip("sklearn", reason="the generator reads results with the laboratory")

ROOT = Path(__file__).parents[2]
# What a number with a unit, or with a decimal point, looks like in a sentence.
FIGURE = re.compile(r"(?<![\w.-])(?:\d+(?:\.\d+)? ?%|\d+\.\d+|[\d.]+ (?:ms|µs|times|×|points))(?!\w)")
# A version, and what the test that is named beside it shows.
OTHERS = {"README.md": {"2.14"}, "docs/results.md": {"0.9999", "15%"}}


def _prose(text):
    """The text without code, links, and what is generated."""
    text = re.sub(r"<!-- table .*?<!-- end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"[-+]?\d[\d.,]*<!-- = \S+ -->( ?%| ×| points| times)?", "", text)
    text = re.sub(r"^```.*?^```|^    .*?$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    return text


@pytest.mark.parametrize("page", OTHERS)
def test_figures_are_generated(page):
    assert set(FIGURE.findall(_prose((ROOT / page).read_text(encoding="utf-8")))) == OTHERS[page]


def test_a_figure_that_is_not_what_the_results_say_is_written_anew(tmp_path, monkeypatch, capsys):
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tmp_path / "page.md"
    page.write_text("It takes 7.5<!-- = cpu/ctu/ours/relu --> of a ReLU, or 1.5 of two.\n")
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert "page.md: not what benchmarks/results says" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    found = re.fullmatch(
        r"It takes ([\d.]+)<!-- = cpu/ctu/ours/relu --> of a ReLU, or 1\.5 of two\.\n", page.read_text()
    )
    assert found is not None
    assert found[1] == tables.figure("cpu/ctu/ours/relu") != "7.5"
