"""Errors of the command line: turns bad input into one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
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


Renamed = Callable[[list[str]], list[str]]


def renamed(old: str, *new: str) -> Renamed:
    """A function that puts the words ``new`` in place of the flag ``old``, for :attr:`Parser.renamed`."""

    def change(words: list[str]) -> list[str]:
        if old not in words:
            return words
        warnings.warn(f"{old} is {' '.join(new)} now", FutureWarning, stacklevel=2)
        return [part for word in words for part in (new if word == old else (word,))]

    return change


class Parser(argparse.ArgumentParser):
    """A parser that raises :class:`OptionError` instead of printing its usage and exiting.

    Attributes:
        renamed: functions that put new spellings in place of old ones, with a warning.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.renamed: list[Renamed] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for spelled_anew in self.renamed:
            words = spelled_anew(words)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            near = [
                difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.7) for word in unknown[:1]
            ]
            raise OptionError(message + "".join(f"; did you mean {names[0]}?" for names in near if names))
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

    Bad input is reported in one line on standard error. Any other error is a bug of this library and propagates with its
    traceback.
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
    """Whether an error comes from bad input, the machine's state or the user's code, and not from a bug of this library.

    True for a ValueError or ImportError raised by this library itself (one raised inside another library is unexpected), and for
    failed file access and lack of memory.
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
    """Print this library's warnings in one line, without the source location."""
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
