"""Runs a single instruction over many operands: a kernel around it that loads, executes and stores."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence

import numpy as np

from . import load, run
from .decode import HANDLERS
from .oracle import FLOATS, bits_of
from .values import TYPES

THREADS = 256


def handler_key(text: str) -> tuple[str, str]:
    """The registry entry an instruction belongs to."""
    opcode, *modifiers = re.match(r"(?:@!?%\w+\s+)?(\S+)", text)[1].rstrip(";").split(".")
    typed = [m for m in modifiers if m in TYPES]
    key = (opcode, typed[-1] if typed else "")
    assert key in HANDLERS, f"{text}: no handler {key}"
    return key


def kernel(body: str, params: int, registers: str = "", module: str = "", target: int = 100) -> str:
    """A PTX file with one kernel `k` of that many pointer parameters, already in %in0, %in1, ...; %i is the thread."""
    loads = "\n".join(f"  ld.param.u64 %in{n}, [p{n}];" for n in range(params))
    return f"""
.version 8.7
.target sm_{target}
.address_size 64
{module}
.visible .entry k({", ".join(f".param .u64 p{n}" for n in range(params))})
{{
  .reg .b64 %in<{params}>;
  .reg .pred %p<16>;
  .reg .b16 %h<64>;
  .reg .b32 %r<64>;
  .reg .f32 %f<64>;
  .reg .b64 %d<64>;
  .reg .b32 %i;
  .reg .b64 %at;
  {registers}
{loads}
  mov.u32 %i, %tid.x;
  mov.u32 %r60, %ctaid.x;
  mov.u32 %r61, %ntid.x;
  mad.lo.u32 %i, %r60, %r61, %i;
{body}
  ret;
}}
"""


def evaluate(
    form: str, operands: Sequence[tuple[str, Sequence[int]]], results: Sequence[str], approx: int = 0
) -> list[list[int]]:
    """Executes `form`, whose `{d}`, `{e}` are results and `{a}`, `{b}`, ... operands, for each row of operand bits.

    Types are widths such as b32, or pred. Returns the bits of each result.
    """
    count = len(operands[0][1]) if operands else THREADS
    padded = -(-count // THREADS) * THREADS
    arrays, lines, registers, names = [], [], [], {}
    for n, (t, values) in enumerate(operands):
        size = 1 if t == "pred" else bits_of(t) // 8
        column = [int(v) for v in values] + [int(values[0])] * (padded - count)
        arrays.append(np.array(column, f"u{size}"))
        names["abcxyz"[n]] = f"%s{n}"
        lines.append(f"mad.wide.u32 %at, %i, {size}, %in{n};")
        if t == "pred":
            registers.append(f".reg .pred %s{n};")
            lines += [f"ld.global.u8 %h{n}, [%at];", f"setp.ne.u16 %s{n}, %h{n}, 0;"]
        else:
            registers.append(f".reg .b{max(16, 8 * size)} %s{n};")
            lines.append(f"ld.global.b{8 * size} %s{n}, [%at];")
    after = []
    for n, t in enumerate(results):
        size = 1 if t == "pred" else bits_of(t) // 8
        arrays.append(np.zeros(padded, f"u{size}"))
        names["de"[n]] = f"%t{n}"
        after.append(f"mad.wide.u32 %at, %i, {size}, %in{len(operands) + n};")
        if t == "pred":
            registers.append(f".reg .pred %t{n};")
            after += [f"selp.u16 %h{8 + n}, 1, 0, %t{n};", f"st.global.u8 [%at], %h{8 + n};"]
        else:
            registers.append(f".reg .b{max(16, 8 * size)} %t{n};")
            after.append(f"st.global.b{8 * size} [%at], %t{n};")
    text = re.sub(r"\{([abcdexyz])\}", lambda m: names[m[1]], form)
    body = "\n".join("  " + line for line in [*lines, text, *after])
    program = load(kernel(body, len(arrays), "\n  ".join(registers)))
    run(program, arrays, (padded // THREADS,), (THREADS,), races=False, approx=approx)
    return [a[:count].tolist() for a in arrays[len(operands) :]]


def int_edges(bits: int) -> list[int]:
    """Interesting integers of a width."""
    top = 1 << bits
    return [0, 1, 2, 3, 7, bits - 1, bits, top - 1, top - 2, top >> 1, (top >> 1) - 1, 0x5A5A5A5A5A5A5A5A % top]


def float_edges(fmt: str) -> list[int]:
    """Interesting bit patterns of a float format: zeros, ones, infinities, NaN, ends of the ranges, subnormals."""
    precision, emin, _, bits = FLOATS[fmt]
    mantissa = precision - 1
    one = (-emin + 1 - 1) << mantissa
    inf = ((1 << (bits - 1)) - 1) >> mantissa << mantissa
    positive = [0, 1, (1 << mantissa) - 1, 1 << mantissa, one, one + 1, one - 1, inf - 1, inf, one + (1 << mantissa)]
    positive += [one + (1 << (mantissa - 1)), 3]
    return positive + [v | (1 << (bits - 1)) for v in positive] + [inf | (1 << (mantissa - 1))]


def samples(types: Sequence[str], seed: int, count: int = 512) -> list[list[int]]:
    """Columns of operand bits: combinations of edges, then random numbers, floats with related exponents too."""
    rng = random.Random(seed)
    pools = [
        [0, 1] if t == "pred" else float_edges(t) if t in FLOATS else int_edges(bits_of(t)) for t in types
    ]  # fmt: skip
    if math.prod(len(p) for p in pools) <= count // 2:
        rows = list(itertools.product(*pools))
    else:
        rows = [tuple(rng.choice(p) for p in pools) for _ in range(count // 2)]
    while len(rows) < count:
        row = []
        for t in types:
            bits = 1 if t == "pred" else bits_of(t)
            value = rng.getrandbits(bits)
            if t in FLOATS and rng.random() < 0.8:  # a number near one, often with few bits set: ties and cancellation
                precision, emin, _, _ = FLOATS[t]
                mantissa = precision - 1
                fraction = rng.getrandbits(mantissa)
                if rng.random() < 0.5:
                    fraction = (fraction >> (mantissa * 2 // 3)) << (mantissa * 2 // 3)
                value = (rng.getrandbits(1) << (bits - 1)) | ((-emin + rng.randint(-6, 6)) << mantissa) | fraction
            row.append(value)
        rows.append(tuple(row))
    return [list(c) for c in zip(*rows)]
