"""ctkernels completion: a script with which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

from .._extras import require
from . import option_types as types
from .errors import Parser

# The shells, and where each reads the script from.
SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/ctkernels",
    "zsh": "a file _ctkernels in a folder of $fpath",
    "fish": "~/.config/fish/completions/ctkernels.fish",
}
# Options that take a path, and arguments that may be one.
_FOLDERS = (types.FOLDER, types.OUT)
_FILES = (types.EXISTING, types.OUT_FILE, types.STORAGE)
_MAYBE_FILES = ("data", "texts", "tasks", "--model", "--module", "--calibrate", "--adapter")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = Parser(
        prog="python -m ctkernels completion",
        description="Print the script with which a shell completes what follows the command ctkernels.",
        epilog="where the shells read it from:\n" + "\n".join(f"  {name:<5} {place}" for name, place in SHELLS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("shell", choices=SHELLS, help="the shell that is to read it")
    return p


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(script(arguments.shell))
    return 0


def script(shell: str) -> str:
    """The script for a shell, with the options of all commands whose packages are installed."""
    shtab: Any = require("shtab", "completion", "a script for completion")
    return shtab.complete(_everything(shtab), shell)


def _everything(shtab: Any) -> argparse.ArgumentParser:
    """One parser of all commands; the library's own are made one at a time, when they are used."""
    from . import COMMANDS

    whole = argparse.ArgumentParser(prog="ctkernels", description="Commands of ctkernels")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for name, (module, summary) in COMMANDS.items():
        try:
            parents = [importlib.import_module(module).parser()]
        except ImportError:  # of an extra that is not installed: the name alone is completed
            parents = []
        one = commands.add_parser(name, parents=parents, conflict_handler="resolve", help=summary)
        for action in one._actions:
            if action.choices is not None:
                action.choices = tuple(action.choices)  # shtab takes a dictionary for commands
            kind = _paths(action, shtab)
            if kind is not None:
                action.complete = kind  # type: ignore[attr-defined]
    return whole


def _paths(action: argparse.Action, shtab: Any) -> Mapping[str, str] | None:
    """What shtab completes an argument with: files, folders, or nothing but its choices."""
    if action.type in _FOLDERS:
        return shtab.DIRECTORY
    name = action.option_strings[0] if action.option_strings else action.dest
    return shtab.FILE if action.type in _FILES or name in _MAYBE_FILES else None
