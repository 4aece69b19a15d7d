"""Warp instructions: shfl, vote, match, redux, elect, activemask."""

from __future__ import annotations

import numpy as np

from .decode import Collective, Instruction, Step, handles
from .floating import extreme
from .values import TYPES, U32, canonical

LANE = np.arange(32)
BIT = U32(1) << LANE.astype(U32)


def ballot(rows: np.ndarray) -> np.ndarray:
    """[warps, 32] booleans to one 32-bit number a warp."""
    return (rows * BIT).sum(1).astype(U32)


def group_masks(m, members) -> np.ndarray:
    """Lanes taking part with each lane, as [warps, 32, 32]: same warp, present, and the same mask."""
    present, masks = m.present(), m.rows(np.broadcast_to(members(m), (m.n,)))
    return present[:, :, None] & present[:, None, :] & (masks[:, :, None] == masks[:, None, :])


def together(m, members, full: bool) -> np.ndarray:
    """For each lane the 32-bit set of lanes that take part with it, [warps, 32]."""
    if full:
        return np.repeat(ballot(m.present())[:, None], 32, 1)
    return (group_masks(m, members) * BIT).sum(2).astype(U32)


def back(m, rows: np.ndarray) -> np.ndarray:
    """[warps, 32] to the active lanes."""
    return np.ascontiguousarray(rows).reshape(-1)[m.lanes]


@handles("shfl", "b32")
def shfl(i: Instruction) -> Collective:
    """Read a register of another lane. Reading a lane that does not take part is a fault."""
    i.need("sync")
    mode = i.need("up", "down", "bfly", "idx")
    i.arity(5)
    value, b, c = i.source(1, "b32"), i.source(2, "u32"), i.source(3, "u32")
    members, full = i.members(4)
    first, second = i.pair(0)
    write, write_pred = i.dest(first, "b32"), i.dest(second, "pred")

    def step(m) -> None:
        v = m.rows(np.broadcast_to(value(m), (m.n,)))
        lane_b = m.rows(np.broadcast_to(b(m), (m.n,))).astype(np.int64) & 31
        lane_c = m.rows(np.broadcast_to(c(m), (m.n,))).astype(np.int64)
        clamp, segment = lane_c & 31, lane_c >> 8 & 31
        top = (LANE & segment) | (clamp & ~segment)
        low = LANE & segment
        if mode == "up":
            source = LANE - lane_b
            ok = source >= top
        else:
            source = {"down": LANE + lane_b, "bfly": LANE ^ lane_b, "idx": low | (lane_b & ~segment)}[mode]
            ok = source <= top
        source = np.where(ok, source, LANE)
        present = m.present()
        sees = together(m, members, full) >> source.astype(U32) & U32(1) != 0
        bad = present & ~sees
        if bad.any():
            w, lane = np.argwhere(bad)[0]
            raise m.fault("collective", f"reads lane {int(source[w, lane])}, which takes no part", w * 32 + lane)
        out, flag = back(m, np.take_along_axis(v, source, 1)), back(m, ok)
        write(m, out)
        write_pred(m, flag)

    return Collective(step, members, full)


@handles("vote", "b32 pred")
def vote(i: Instruction) -> Collective:
    """ballot, all, any, uni."""
    i.need("sync")
    mode = i.need("ballot") if i.type == "b32" else i.need("all", "any", "uni")
    i.arity(3)
    value, write = i.predicate(1), i.dest(0, i.type)
    members, full = i.members(2)

    def step(m) -> None:
        yes = ballot(m.rows(np.broadcast_to(value(m), (m.n,))))[:, None]
        group = together(m, members, full)
        yes = yes & group
        result = {
            "ballot": lambda: yes,
            "all": lambda: yes == group,
            "any": lambda: yes != 0,
            "uni": lambda: (yes == 0) | (yes == group),
        }[mode]()
        write(m, back(m, result))

    return Collective(step, members, full)


@handles("activemask", "b32")
def activemask(i: Instruction) -> Step:
    """The lanes running right now: any answer that names the lane itself would be allowed."""
    i.arity(1)
    write = i.dest(0, "b32")
    return lambda m: write(m, back(m, np.repeat(ballot(m.present())[:, None], 32, 1)))


@handles("match", "b32 b64")
def match(i: Instruction) -> Collective:
    """Lanes that hold the same value."""
    i.need("sync")
    mode = i.need("any", "all")
    i.arity(3)
    value = i.source(1, i.type)
    members, full = i.members(2)
    first, second = i.pair(0)
    if mode == "any" and second != "_":
        raise i.unsupported()
    write, write_pred = i.dest(first, "b32"), i.dest(second, "pred")

    def step(m) -> None:
        v = m.rows(np.broadcast_to(value(m), (m.n,)))
        group = group_masks(m, members)
        equal = group & (v[:, :, None] == v[:, None, :])
        if mode == "any":
            write(m, back(m, (equal * BIT).sum(2).astype(U32)))
            return
        agree = (equal == group).all(2)
        out = np.where(agree, (group * BIT).sum(2).astype(U32), U32(0))
        write(m, back(m, out))
        write_pred(m, back(m, agree))

    return Collective(step, members, full)


@handles("redux", "u32 s32 b32 f32")
def redux(i: Instruction) -> Collective:
    """Reduce over the lanes of the mask."""
    i.need("sync")
    allowed = {"b32": ("and", "or", "xor"), "f32": ("min", "max")}.get(i.type, ("add", "min", "max"))
    name = i.need(*allowed)
    absolute, nan = (i.flag("abs"), i.flag("NaN")) if i.type == "f32" else (False, False)
    i.arity(3)
    value, write = i.source(1, i.type), i.dest(0, i.type)
    members, full = i.members(2)
    dtype = TYPES[i.type].dtype

    def fold(values: np.ndarray) -> np.ndarray:
        if i.type == "f32":
            out = np.abs(values[:1]) if absolute else values[:1]
            for v in values[1:]:
                out = extreme(name == "max", nan, False, out, np.abs(v) if absolute else v)
            return canonical(out)[0]
        function = {
            "add": np.add, "min": np.minimum, "max": np.maximum,
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        }[name]  # fmt: skip
        return function.reduce(values)

    def step(m) -> None:
        v = m.rows(np.broadcast_to(value(m), (m.n,)))
        groups = together(m, members, full)
        present = m.present()
        out = np.zeros(v.shape, dtype)
        for w in np.flatnonzero(present.any(1)):
            for mask in np.unique(groups[w][present[w]]):
                lanes = (U32(mask) & BIT) != 0
                out[w, lanes] = fold(v[w, lanes])
        write(m, back(m, out))

    return Collective(step, members, full)


@handles("elect")
def elect(i: Instruction) -> Collective:
    """One leader: the lowest lane of the mask."""
    i.need("sync")
    i.arity(2)
    members, full = i.members(1)
    first, second = i.pair(0)
    write, write_pred = i.dest(first, "b32"), i.dest(second, "pred")

    def step(m) -> None:
        group = together(m, members, full)
        lowest = group & (~group + U32(1))
        leader = np.bitwise_count(lowest - U32(1)).astype(U32)
        leads = leader == LANE
        write(m, back(m, leader))
        write_pred(m, back(m, leads))

    return Collective(step, members, full)
