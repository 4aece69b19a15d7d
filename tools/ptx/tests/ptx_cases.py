"""Cases of instructions: a form, the operands to draw, and the truth by Python integers, `struct` and exact rationals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

from ptx.oracle import from_float, to_float, to_int, wrap  # noqa: E402


@dataclass
class Case:
    """An instruction form, the types its operand bits are drawn from, its result types and the truth for one row."""

    form: str
    operands: list[str]
    results: list[str]
    truth: Callable[..., object]
    limit: list[tuple[int, int]] = field(default_factory=list)  # (operand, modulus): keep an operand small
    count: int = 512


CASES: list[Case] = []


def case(form: str, operands: str, results: str, truth: Callable[..., object], **more) -> None:
    CASES.append(Case(form, operands.split(), results.split(), truth, **more))


def ints(form: str, types: str, result: str, function: Callable[..., int], **more) -> None:
    """A case on integers: operands and result are numbers, not bits."""
    names = types.split()
    case(form, types, result, lambda *b: wrap(function(*[to_int(v, t) for v, t in zip(b, names)]), result), **more)


def floats(form: str, types: str, result: str, function: Callable[..., float], **more) -> None:
    """A case on floats: operands and result are Python floats."""
    names = types.split()

    def truth(*b: int) -> int:
        return from_float(function(*[to_float(v, t) for v, t in zip(b, names)]), result)

    case(form, types, result, truth, **more)
