"""The commands on the pages of the documentation exist, and so do their options."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ctkernels.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# In code: a line of a block, or what stands between backticks.
COMMAND = re.compile(r"(?:^ {4}|`|-m )ctkernels ([a-z]\w*)((?: [^`\n#]*)?)", re.MULTILINE)


def uses():
    """(page, command, arguments) of every use."""
    return [
        (page.relative_to(ROOT).as_posix(), *match)
        for page in PAGES
        for match in COMMAND.findall(page.read_text(encoding="utf-8"))
    ]


def test_every_command_of_the_pages_exists():
    assert len(uses()) >= 10
    unknown = [(page, command) for page, command, _ in uses() if command not in COMMANDS]
    assert not unknown


@pytest.mark.parametrize("command", sorted({command for _, command, _ in uses()} & set(COMMANDS)))
def test_every_option_of_the_pages_exists(command):
    module = COMMANDS[command][0]
    for needed in ("numpy", "sklearn", "tqdm", "torchvision") if ".lab." in module else ():
        pytest.importorskip(needed, reason="the command needs ctkernels[lab]")
    parser = importlib.import_module(module).parser()
    known = set(parser._option_string_actions)
    used = {
        (page, option)
        for page, name, arguments in uses()
        if name == command
        for option in re.findall(r"--[a-z][\w-]*", arguments)
    }
    assert not {(page, option) for page, option in used if option not in known}
