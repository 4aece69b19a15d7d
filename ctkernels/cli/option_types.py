"""Types of command-line options, which parse a text or raise an error with the expected form.

They also annotate fields of configurations, which have the same ranges (see :mod:`ctkernels.lab.config`).
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MOST_VALUES = 10_000  # of a grid; more are probably a typo in the step
PROBE = 1 << 20  # bytes that must fit into a folder for results


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A type of option.

    Attributes:
        expected: the expected form, as a continuation of "must be".
        parse: converts the text to a value; raises ValueError, or ArgumentTypeError with a more specific message.
        fits: whether a value, parsed or not, is in range.
        choices: the allowed texts, if there are few.
        show: converts a value to text, for the help.
    """

    expected: str
    parse: Callable[[str], T]
    fits: Callable[[Any], bool] = lambda value: True
    choices: tuple[str, ...] = ()
    show: Callable[[Any], str] = str

    def check(self, name: str, value: object) -> None:
        """Raise ValueError unless ``value`` fits."""
        if not self.fits(value):
            raise ValueError(f"{name} must be {self.expected}, got {value!r}")

    def read(self, text: str) -> T:
        """The value; raises the errors of ``parse``, and ValueError if the value does not fit."""
        value = self.parse(text)
        _check(self.fits(value))
        return value

    def __call__(self, text: str) -> T:
        try:
            return self.read(text)
        except (ValueError, OverflowError):
            near = difflib.get_close_matches(text, self.choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"must be {self.expected}, got {text!r}{hint}") from None


def _check(fits: bool) -> None:
    if not fits:
        raise ValueError


# --- numbers ----------------------------------------------------------------------------------------------------------


def _whole(text: str) -> int:
    _check(re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()) is not None)
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    _check(math.isfinite(value) and text.isascii() and "_" not in text)
    return value


def whole(least: int, most: int = 2**31 - 1) -> Kind[int]:
    """A whole number in a range."""

    def fits(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most

    upper = f" and at most {most}" if most < 2**31 - 1 else ""
    return Kind(f"a whole number of at least {least}{upper}", _whole, fits)


def real(expected: str, in_range: Callable[[float], bool]) -> Kind[float]:
    """A finite number in a range."""

    def fits(value: Any) -> bool:
        return isinstance(value, Real) and math.isfinite(value) and in_range(float(value))

    return Kind(expected, _real, fits, show="{:g}".format)


def choice(*names: str) -> Kind[str]:
    """One of a few names."""

    return Kind(f"one of {', '.join(names)}", str, lambda value: value in names, names)


COUNT = whole(1)
SEED = whole(0, 2**32 - 1)  # what NumPy takes
WORKERS = whole(0, 1024)
PIXELS = whole(1, 1 << 14)
POSITIVE = real("a positive number", lambda x: x > 0)
MARGIN = real("a number of at least 0", lambda x: x >= 0)
SHARE = real("a number in [0, 1]", lambda x: 0 <= x <= 1)
FRACTION = real("a number between 0 and 1", lambda x: 0 < x < 1)


def several(one: Kind[T], plural: str) -> Kind[list[T]]:
    """Different values separated by commas."""

    def parse(text: str) -> list[T]:
        try:
            values = [one(part.strip()) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            raise ValueError from None
        _check_different(values, text)
        return values

    def fits(values: Any) -> bool:
        return isinstance(values, Iterable) and not isinstance(values, str) and all(map(one.fits, values))

    return Kind(f"{plural} with commas", parse, fits, show=lambda values: ",".join(map(one.show, values)))


def _check_different(values: Sequence[object], text: str) -> None:
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"must name each value once, got {text!r}")


SEEDS = several(SEED, "whole numbers from 0 to 4294967295")
RATES = several(POSITIVE, "positive numbers")
LEVEL = whole(1, 5)
LEVELS = several(LEVEL, "whole numbers from 1 to 5")


def _betas(text: str) -> list[float]:
    if ":" not in text:
        betas = [_real(part) for part in text.split(",")]
    else:
        start, stop, step = (_real(part) for part in text.split(":"))
        _check(step > 0 and stop >= start)
        count = (stop - start) / step + 1e-9
        if not count < MOST_VALUES:
            raise argparse.ArgumentTypeError(
                f"must give at most {MOST_VALUES} values, got {text!r}, which gives {count:.3g}"
            )
        betas = [round(start + i * step, 10) for i in range(int(count) + 1)]
    _check_different(betas, text)
    return betas


BETAS = Kind(
    "START:STOP:STEP with both ends, or values with commas, all in [0, 1]",
    _betas,
    lambda betas: len(betas) > 0 and all(map(SHARE.fits, betas)),
)


def either(names: Sequence[str], other: Kind[T], expected: str) -> Kind[str | T]:
    """One of some names, or a value of another type."""
    return Kind(
        expected,
        lambda text: text if text in names else other.read(text),
        lambda value: value in names if isinstance(value, str) else other.fits(value),
    )


COEFF = either(("mean-free",), SHARE, "a number in [0, 1], or mean-free")


def _bytes(text: str) -> int:
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    _check(match is not None and match[2] in units)
    assert match is not None
    size = float(match[1]) * units[match[2]]
    _check(1 <= size < 2**63)
    return int(size)


SIZE = Kind("a size such as 500MB or 2GiB", _bytes, whole(1, 2**63 - 1).fits, show=lambda size: f"{size / 2**30:g}GiB")


def _bound(text: str) -> float | None:
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/(\d+))?", text, re.ASCII)
    _check(match is not None)
    assert match is not None
    return POSITIVE.read(str(float(match[1]) / (int(match[2]) or math.inf if match[2] else 1)))


BOUND = Kind("a positive number, a fraction such as 8/255, or none", _bound)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(COUNT.read(part) for part in text.replace(",", "x").split("x"))
    _check(math.prod(sizes) < 2**31)
    return sizes


SHAPE = Kind("positive sizes as in 2x3x32x32, fewer than 2**31 values in all", _shape)


# --- names ------------------------------------------------------------------------------------------------------------


def names(known: Sequence[str]) -> Kind[list[str]]:
    """Some of the known names, each once."""
    return several(choice(*known), f"some of {', '.join(known)}")


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Accept any text for which ``check`` raises no error."""

    def read(text: str) -> str:
        try:
            check(text)
        except (ValueError, ImportError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return read


def _text(text: str) -> str:
    _check(bool(text.strip()) and "\0" not in text)
    return text


TEXT = Kind("some text", _text)
CLUSTER = Kind(
    "auto, local or HOST:PORT",
    str,
    lambda value: isinstance(value, str) and re.fullmatch(r"auto|local|[\w.-]+:\d+", value, re.ASCII) is not None,
)


def _pattern(text: str) -> str:
    try:
        re.compile(_text(text))
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None
    return text


PATTERN = Kind("a regular expression", _pattern)


def device(text: str) -> str:
    """The name of an available device."""
    from .._devices import existing_device

    return checked(existing_device)(text)


def _grid(text: str) -> tuple[str, str, list[float]]:
    name, equals, values = text.partition("=")
    method, point, setting = name.rpartition(".")
    _check(bool(equals and point and method and setting))
    return method, setting, several(real("", lambda x: True), "").read(values)


GRID = Kind("METHOD.NAME=VALUE,VALUE with finite numbers", _grid)


# --- files ------------------------------------------------------------------------------------------------------------


def _check_readable(path: Path, expected: str) -> None:
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be {expected}, got {str(path)!r}: {error.strerror}") from None


def _existing(text: str) -> str:
    _check_readable(Path(_text(text)), "a file or folder that can be read")
    return text


EXISTING = Kind("a file or folder", _existing)


def _folder(text: str) -> str:
    _check(Path(_text(text)).is_dir())
    return _existing(text)


FOLDER = Kind("a folder that is there", _folder)


def _out(text: str) -> Path:
    out = Path(_text(text))
    if out.exists() and not out.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, {out} is a file")
    _check_room(out, text)
    return out


OUT = Kind("a folder for the results", _out)


def _out_file(text: str) -> Path:
    path = Path(_text(text))
    if text != "-":
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"must be a file, {path} is a folder")
        _check_room(path.absolute().parent, text)
    return path


OUT_FILE = Kind("a file to write", _out_file)


def _storage(text: str) -> str:
    if "://" not in _text(text):
        _out_file(text)
    return text


STORAGE = Kind("a file or the URL of a database", _storage)


def _check_room(folder: Path, text: str) -> None:
    """Raise an error for a folder that cannot be written to, before there are results; leaves no file in it."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(PROBE))
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"must be where files can be written, got {text!r}: {there}: {error.strerror or error}"
        ) from None


def _weights(text: str) -> str:
    if text not in ("default", "none", "packaged"):
        path = Path(_text(text))
        _check(not path.is_dir())
        _check_readable(path, WEIGHTS.expected)
    return text


WEIGHTS = Kind("default, none, packaged or a file", _weights)
