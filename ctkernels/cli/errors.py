"""Errors of the command line: bad input becomes one line and exit code 2, here and nowhere else."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT, INTERRUPTED = 2, 130
PACKAGE = Path(__file__).absolute().parent.parent
OURS = (PACKAGE, PACKAGE.parent / "benchmarks")


class OptionError(ValueError):
    """A bad option; the message names it."""


class Parser(argparse.ArgumentParser):
    """A parser that raises :class:`OptionError` where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (.+?): (.*)", message, re.DOTALL)
        if match is None:
            raise OptionError(message)
        name, said = match.groups()
        bare = name.lstrip("-")
        if said.startswith((f"{bare} ", f"{bare}:")):  # it names the argument itself, as a function's
            raise OptionError(name + said[len(bare) :])
        raise OptionError(f"{name} {said}" if said.startswith("must ") else f"{name}: {said}")


def reported(run: Callable[[], int], show_traceback: bool = False) -> int:
    """Call ``run``; return its result, or the exit code for the error that it raised.

    Bad input is told in one line on standard error. Any other error is a fault of this library and is left alone, so
    that its traceback shows.
    """
    try:
        with _plain_warnings():
            return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_bad_input(error):
            raise
        if show_traceback:
            traceback.print_exc()
        print(f"ctkernels: error: {error}", file=sys.stderr)
        return BAD_INPUT


def is_bad_input(error: Exception) -> bool:
    """Tell an error of bad input, of the machine's state or of the user's own code from a fault of this library.

    A ValueError or an ImportError does that was raised by a line of this library, with a message of its own; one from
    within another library was not foreseen. Files that cannot be read or written, and too little memory, always do.
    """
    if isinstance(error, (OSError, MemoryError)):
        return True
    if not isinstance(error, (ValueError, ImportError)):
        torch = sys.modules.get("torch")  # not imported by the overview
        return torch is not None and isinstance(error, torch.OutOfMemoryError)
    if type(error).__module__.partition(".")[0] == "ctkernels":  # raised anew by a loader's worker, say
        return True
    if type(error).__module__.partition(".")[0] == "ray":  # bad input arrives from a worker as what it was
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and _is_ours(last.tb_frame.f_code.co_filename)


def _is_ours(file: str) -> bool:
    return any(Path(file).absolute().is_relative_to(folder) for folder in OURS)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """This library's warnings in one line, without the place in the code."""
    before = warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if _is_ours(filename):
            return f"ctkernels: warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before
