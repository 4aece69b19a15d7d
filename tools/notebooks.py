"""A mkdocs hook that generates a Jupyter notebook from the page of every tutorial."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = "tutorials/"
# A block of Python, with its output, which is not part of the notebook.
CODE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)


def notebook(markdown: str) -> dict[str, Any]:
    """The notebook of a page, with its Python blocks as code cells and the rest as text cells."""
    parts = CODE.split(markdown)  # text, code, text, code, ..., text
    cells = [
        {"cell_type": "code", "execution_count": None, "outputs": []} if number % 2 else {"cell_type": "markdown"}
        for number in range(len(parts))
    ]
    for number, (cell, part) in enumerate(zip(cells, parts)):
        cell.update(id=f"cell-{number}", metadata={}, source=part.strip().splitlines(keepends=True))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": kernel},
        "cells": [cell for cell in cells if cell["source"]],
    }


def on_files(files: Any, config: Any) -> Any:
    """Adds a notebook beside every tutorial."""
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        if page.src_uri.startswith(FOLDER):
            content = json.dumps(notebook(Path(page.abs_src_path).read_text(encoding="utf-8")), indent=1)
            files.append(File.generated(config, page.src_uri.removesuffix(".md") + ".ipynb", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links the notebook at the end of its page."""
    name = Path(page.file.src_uri)
    return (
        f"{markdown}\n[This page as a notebook]({name.stem}.ipynb)\n"
        if name.parent.name == FOLDER.strip("/")
        else markdown
    )
