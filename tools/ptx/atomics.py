"""atom and red: read-modify-write. Lanes that hit the same place take turns in lane order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .data import hints, publish, space, width
from .decode import Instruction, Step, handles
from .floating import extreme
from .memory import gather, scatter
from .packed import halves, join
from .races import ATOMIC, BLOCK_ATOMIC
from .spaces import Place, locate, put
from .values import RAW, TYPES, canonical, flush, narrow, sum_odd, widen

Update = Callable[..., np.ndarray]


def half_add(fmt: str) -> Update:
    """One rounding for each half."""

    def add(old: np.ndarray, b: np.ndarray) -> np.ndarray:
        pairs = zip(halves(old, 2), halves(b, 2))
        return join([narrow(sum_odd(widen(x, fmt), widen(y, fmt)), fmt) for x, y in pairs])

    return add


def half_extreme(fmt: str, largest: bool) -> Update:
    """min/max of halves."""

    def pick(old: np.ndarray, b: np.ndarray) -> np.ndarray:
        pairs = zip(halves(old, 2), halves(b, 2))
        return join([narrow(extreme(largest, False, False, widen(x, fmt), widen(y, fmt)), fmt) for x, y in pairs])

    return pick


def updates(type_name: str, in_global: bool) -> dict[str, Update]:
    """The operations a type supports: new value from old value and operands."""
    t = TYPES[type_name]
    if type_name in ("f16", "bf16", "f16x2", "bf16x2"):
        fmt = type_name.removesuffix("x2")
        return {"add": half_add(fmt), "min": half_extreme(fmt, False), "max": half_extreme(fmt, True)}
    if t.kind == "f":

        def add(old: np.ndarray, b: np.ndarray) -> np.ndarray:
            if type_name == "f32" and in_global:  # subnormals are flushed in global memory, kept in shared
                return flush(canonical(flush(old) + flush(b)))
            return canonical(old + b)

        return {"add": add}
    if t.kind == "b":
        return {
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "exch": lambda old, b: b,
            "cas": lambda old, b, c: np.where(old == b, c, old),
        }
    out: dict[str, Update] = {"add": np.add, "min": np.minimum, "max": np.maximum}
    if type_name == "u32":
        one = np.uint32(1)
        out["inc"] = lambda old, b: np.where(old >= b, np.uint32(0), old + one)
        out["dec"] = lambda old, b: np.where((old == 0) | (old > b), b, old - one)
    return out


FLOATING = "f32 f64 f16 bf16 f16x2 bf16x2"


@handles("atom", "b16")
@handles("atom red", f"u32 s32 u64 s64 b32 b64 {FLOATING}")
def atomic(i: Instruction) -> Step:
    """atom returns the old value, red does not."""
    returns = i.opcode == "atom"
    k = 1 if returns else 0
    address, symbol_space = i.address(k)
    where = space(i, symbol_space)
    order = i.choice("relaxed", "acquire", "release", "acq_rel") or "relaxed"
    scope = i.choice("cta", "cluster", "gpu", "sys") or "gpu"
    hints(i)
    n, t = width(i), TYPES[i.type]
    if i.type in ("f16", "bf16", "f16x2", "bf16x2") and not i.flag("noftz"):
        raise i.unsupported("expects .noftz")
    # A generic address may be of either kind; which one decides about subnormals at run time.
    table = {flag: updates(i.type, flag) for flag in (False, True)}
    name = i.need(*table[True])
    if n > 1 and (name not in ("add", "min", "max") or i.type not in FLOATING.split()):
        raise i.unsupported("vector")
    if not returns and name in ("exch", "cas"):
        raise i.unsupported()
    if i.type == "b16" and name != "cas":
        raise i.unsupported()
    count = 2 if name == "cas" else 1
    if i.arity(k + 1 + count, k + 2 + count) == k + 2 + count:
        i.source(k + 1 + count, "b64")
    sources = [[i.source(s, i.type) for s in i.vector(k + 1 + j)] for j in range(count)]
    writes = [i.dest(d, i.type) for d in i.vector(0)] if returns else []
    if any(len(s) != n for s in sources) or (returns and len(writes) != n):
        raise i.unsupported("vector length")
    i.program.access(t.size * n)
    i.program.between_blocks |= order != "relaxed" and scope != "cta"
    kind = BLOCK_ATOMIC if scope == "cta" else ATOMIC

    def step(m) -> None:
        a = np.broadcast_to(address(m), (m.n,))
        operands = []
        for group in sources:
            columns = np.empty((m.n, n), RAW[t.size])
            for j, read in enumerate(group):
                columns[:, j] = read(m).view(RAW[t.size])
            operands.append(columns.view(t.dtype))
        publish(m, a, order)
        before = np.empty((m.n, n), t.dtype)
        for place in locate(m, where, a, t.size * n, read=True, write=True, strength=kind):
            update = table[place.flat is not m.shared][name]
            at = np.arange(m.n) if place.at is None else place.at
            if place.twice is not None and len(np.unique(m.local_block[m.ids[at[place.twice]]])) > 1:
                raise m.fault("race", "atomics of block scope from several blocks", m.ids[at[place.twice[0]]])
            take_turns(m, place, at, operands, update, before, t.size * n)
        for j, write in enumerate(writes):
            write(m, np.ascontiguousarray(before[:, j]))

    return step


def take_turns(
    m, place: Place, at: np.ndarray, operands: list[np.ndarray], update: Update, before: np.ndarray, size: int
) -> None:
    """Applies the updates in rounds; in each, a location is changed by at most one lane."""
    order = np.argsort(place.offset, kind="stable")
    sorted_offset = place.offset[order]
    starts = np.flatnonzero(np.concatenate([[True], sorted_offset[1:] != sorted_offset[:-1]]))
    turn = np.empty(len(order), np.int64)
    lengths = np.diff(np.append(starts, len(order)))
    turn[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    by_turn = np.argsort(turn, kind="stable")
    ends = np.cumsum(np.bincount(turn))
    for first, last in zip(np.concatenate([[0], ends[:-1]]), ends):
        k = by_turn[first:last]
        lanes = at[k]
        raw = gather(place.flat, place.offset[k], size, place.base)
        old = np.ascontiguousarray(raw).view(before.dtype).copy()
        before[lanes] = old
        with np.errstate(all="ignore"):
            new = np.asarray(update(old, *[o[lanes] for o in operands])).astype(before.dtype)
        data = np.ascontiguousarray(new).view(np.uint8)
        if first == 0:
            put(m, place._replace(offset=place.offset[k], at=lanes, twice=None), data)
        else:
            scatter(place.flat, place.offset[k], data, place.base)
