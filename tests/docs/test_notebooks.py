"""The notebooks of the tutorials hold what their pages do."""

from __future__ import annotations

import json
from pathlib import Path

import notebooks
import pytest
from test_snippets import blocks

TUTORIALS = sorted((Path(__file__).parents[2] / "docs/tutorials").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_cells_are_the_blocks_of_the_page(page):
    text = page.read_text(encoding="utf-8")
    made = json.loads(json.dumps(notebooks.notebook(text)))
    code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert len(code) == text.count("```python")
    assert all(cell == block.code.strip() for cell, block in zip(code, blocks(page, short=False), strict=True))
    prose = "\n".join("".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "markdown")
    assert "```python" not in prose
    assert "```text" not in prose
    assert prose.startswith("# ")


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_notebooks_are_valid(page):
    nbformat = pytest.importorskip("nbformat", reason="validating a notebook needs nbformat")
    nbformat.validate(nbformat.from_dict(notebooks.notebook(page.read_text(encoding="utf-8"))))
