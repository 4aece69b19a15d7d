"""The command line: ``python -m ctkernels COMMAND ...``. One module per command, imported when its command is used."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import shlex
import sys
from collections.abc import Sequence

from .errors import BAD_INPUT, OptionError, reported

# command -> (module with parser() -> ArgumentParser and run(arguments) -> int, one line of help)
COMMANDS = {
    "env": ("ctkernels.cli.env", "print versions, devices, what was built, and which backend serves what, and why"),
    "adapt": (
        "ctkernels.lab.cli.adapt",
        "the first thing to try: look at your images or texts, run what is worth trying on them, and write a report",
    ),
    "steer": (
        "ctkernels.lab.cli.steer",
        "find the curvature at which a pretrained network fits new data best, without training it",
    ),
    "compare": (
        "ctkernels.lab.cli.compare",
        "compare a linear probe, S-CT, LoRA and T-CT on image classifiers and data sets: the paper's tables",
    ),
    "tune": (
        "ctkernels.lab.cli.tune",
        "learn the curvature of a network on new data (T-CT), from the best fixed one, and save the adapter",
    ),
    "jola": (
        "ctkernels.lab.cli.jola",
        "adapt a language model with a few examples by editing attention heads, beside LoRA and others",
    ),
    "stream": (
        "ctkernels.lab.cli.stream",
        "learn tasks one after the other, an adapter for each, without forgetting any, and route between them",
    ),
    "watch": ("ctkernels.lab.cli.watch", "serve a live page of an adapter's edits on the texts that come in"),
    "search": ("ctkernels.lab.cli.search", "as steer, with a beta per stage or activation, by coordinates or Optuna"),
    "robust": (
        "ctkernels.lab.cli.robust",
        "accuracy under attack and under corruptions, with beta chosen in validation",
    ),
    "curvature": ("ctkernels.lab.cli.curvature", "measure and draw what the knob does to a network"),
    "report": ("ctkernels.lab.cli.report", "one HTML page from results"),
    "gradcheck": (
        "ctkernels.cli.gradcheck",
        "check gradients on this machine: of the ops, and of a model of yours, against finite differences and float64",
    ),
    "bench": ("ctkernels.cli.bench", "time the kernels on this machine; the options are those of the benchmark suite"),
    "completion": (
        "ctkernels.cli.completion",
        "print the script with which bash, zsh or fish completes these commands",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0: done; 1: a check failed; 2: bad input (with one line on standard error); 130: interrupted. Any other error is a bug of this
    library and is raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    return reported(lambda: _run(argv), "--traceback" in argv)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else BAD_INPUT
    if argv[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of: {', '.join(COMMANDS)}"
        raise OptionError(f"unknown command {argv[0]!r}; {hint}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for factories in modules of the current folder
    from .. import _public  # noqa: F401  # registers the ops, as in any process that imports ctkernels

    module = importlib.import_module(COMMANDS[argv[0]][0])
    parser: argparse.ArgumentParser = module.parser()
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv[1:])
    arguments.command = shlex.join(["python", "-m", "ctkernels", *argv])
    return module.run(arguments)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: python -m ctkernels COMMAND [options]\n\n"
        f"commands:\n{commands}\n\n"
        "python -m ctkernels COMMAND --help tells about one; --version prints the version."
    )
