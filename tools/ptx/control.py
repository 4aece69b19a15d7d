"""Branches, calls, exits, and the barriers of a block."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .decode import Collective, Control, Instruction, Step, handles
from .machine import BLOCKED

if TYPE_CHECKING:
    from .machine import Machine

NO_BARRIER = -1


@handles("bra")
def bra(i: Instruction) -> Control:
    """Jump."""
    i.arity(1)
    i.flag("uni")
    label, scopes, program = i.operands[0], i.statement.scopes, i.program
    program.target(label, scopes)

    def run(m: Machine, p: int) -> None:
        m.key[m.ids] = program.target(label, scopes)

    return Control(run)


@handles("brx")
def brx(i: Instruction) -> Control:
    """Jump through a table."""
    i.arity(2)
    i.need("idx")
    i.flag("uni")
    index, label, scopes, program = i.source(0, "u32"), i.operands[1], i.statement.scopes, i.program

    def run(m: Machine, p: int) -> None:
        table = np.array(program.table(label, scopes), np.int32)
        k = np.broadcast_to(index(m), (m.n,)).astype(np.int64)
        if (k >= len(table)).any():
            raise m.fault("out-of-bounds", f"branch table has {len(table)} entries", m.ids[k >= len(table)][0])
        m.key[m.ids] = table[k]

    return Control(run)


def depart(m: Machine, p: int) -> None:
    """The lanes leave the kernel."""
    m.alive[m.ids] = False
    m.key[m.ids] = BLOCKED


def leave(m: Machine, p: int) -> None:
    """ret: back to the caller, or out of the kernel."""
    if m.stack is None:
        return depart(m, p)
    ids, inside = m.ids, m.depth[m.ids] > 0
    if not inside.all():
        m.select(ids[~inside])
        depart(m, p)
    ids = ids[inside]
    if not ids.size:
        return None
    m.depth[ids] -= 1
    back = m.stack[ids, m.depth[ids]]
    local = m.local.reshape(m.total, -1)
    for site in np.unique(back):
        at = ids[back == site]
        for target, source, size in m.launch.program.code[site].results:
            local[at, target : target + size] = local[at, source : source + size]
        m.key[at] = site + 1
    return None


@handles("ret")
def ret(i: Instruction) -> Control:
    """Return."""
    i.arity(0)
    i.flag("uni")
    return Control(leave)


@handles("exit")
def exit_(i: Instruction) -> Control:
    """End the thread."""
    i.arity(0)
    return Control(depart)


@handles("trap")
def trap(i: Instruction) -> Step:
    """Abort the kernel."""
    i.arity(0)

    def step(m: Machine) -> None:
        raise m.fault("trap", "the kernel gave up", m.ids[0])

    return step


@handles("call")
def call(i: Instruction) -> Control:
    """Call a function of the module; parameters are copied between the frames. A failed assertion is a fault."""
    i.flag("uni")
    operands = list(i.operands)
    results = _names(operands.pop(0)) if operands[0].startswith("(") else []
    name = operands.pop(0)
    arguments = _names(operands.pop(0)) if operands else []
    if operands or i.register(name) is not None:
        raise i.unsupported("indirect call")
    if name == "__assertfail":

        def fail(m: Machine, p: int) -> None:
            raise m.fault("trap", "device assertion failed", m.ids[0])

        return Control(fail)
    function, program = i.program.function(name), i.program
    if function.declared or len(arguments) != len(function.params) or len(results) != len(function.results):
        raise i.unsupported(f"function {name}")
    copies = [
        (program.symbol(formal.name).address, program.symbol(actual).address, formal.size)
        for formal, actual in zip(function.params, arguments)
    ]
    back = [
        (program.symbol(actual).address, program.symbol(formal.name).address, formal.size)
        for formal, actual in zip(function.results, results)
    ]

    def run(m: Machine, p: int) -> None:
        local = m.local.reshape(m.total, -1)
        for target, source, size in copies:
            local[m.ids, target : target + size] = local[m.ids, source : source + size]
        if (m.depth[m.ids] >= m.stack.shape[1]).any():
            raise m.fault("steps", "calls nest too deeply", m.ids[0])
        m.launch.program.code[p].results = back
        m.stack[m.ids, m.depth[m.ids]] = p
        m.depth[m.ids] += 1
        m.key[m.ids] = program.starts[name]

    return Control(run)


def _names(text: str) -> list[str]:
    return [n.strip() for n in re.sub(r"[()]", " ", text).split(",") if n.strip()]


# -- barriers


def _wait(m: Machine, p: int, ids: np.ndarray, number: np.ndarray) -> None:
    if ((number < 0) | (number > 15)).any():
        raise m.fault("barrier", f"there is no barrier {int(number.max())}", ids[0])
    m.barrier[ids] = number
    m.waits[ids] = p
    m.key[ids] = BLOCKED


def _release(m: Machine, ids: np.ndarray) -> None:
    """The lanes pass their barrier; .red instructions receive their result."""
    for p in np.unique(m.waits[ids]):
        at = ids[m.waits[ids] == p]
        finish = getattr(m.program.code[p].control, "finish", None)
        if finish:
            m.select(at)
            finish(m)
    m.key[ids] = m.waits[ids] + 1
    m.waits[ids] = -1
    m.barrier[ids] = NO_BARRIER


def _complete_blocks(m: Machine, blocks: np.ndarray) -> None:
    """Barriers of the whole block: every thread must be here, at the same instruction."""
    shape = (m.blocks, m.block_lanes)
    waits, alive = m.waits.reshape(shape)[blocks], m.alive.reshape(shape)[blocks]
    number = m.barrier.reshape(shape)[blocks]
    lowest = np.where(alive, number, 127).min(1)
    full = (lowest >= 0) & (lowest < 127) & (np.where(alive, number, NO_BARRIER).max(1) == lowest)
    if not full.any():
        return
    exists = m.exists.reshape(shape)[blocks]
    for bad, why in (
        (full & (exists & ~alive).any(1), "threads of the block left without reaching it"),
        (
            full & (np.where(alive, waits, BLOCKED).min(1) != np.where(alive, waits, -1).max(1)),
            "threads of the block wait at different barriers",
        ),
    ):
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            lane = int(blocks[k]) * m.block_lanes + int(np.flatnonzero(alive[k])[0])
            raise m.fault("barrier", why, lane, int(m.waits[lane]))
    m.order.barrier(blocks[full])
    done = np.zeros(shape, bool)
    done[blocks[full]] = alive[full]
    _release(m, np.flatnonzero(done.reshape(-1)))


def _complete_counted(m: Machine, block: int, number: int, count: int) -> None:
    lanes = np.flatnonzero((m.barrier == number) & (m.local_block == block))
    arrived, joined = m.arrived.get((block, number), (0, np.zeros(m.warps, np.int64)))
    if len(lanes) + arrived > count:
        raise m.fault("barrier", f"more than {count} threads arrive at barrier {number}")
    if len(lanes) + arrived < count:
        return
    warps = np.unique(m.thread[lanes] // 32)
    for w in warps:
        joined = np.maximum(joined, m.order.contribution(block, int(w)))
    for w in warps:
        m.order.release(block, int(w), joined)
    if m.order.between is not None:
        m.order.between.join(map(int, lanes))
    m.arrived.pop((block, number), None)
    _release(m, lanes)


def _arrive(m: Machine, number: np.ndarray, count: np.ndarray) -> None:
    for block, k in {(int(b), int(k)) for b, k in zip(m.local_block[m.ids], number)}:
        here = m.ids[(m.local_block[m.ids] == block) & (number == k)]
        arrived, joined = m.arrived.get((block, k), (0, np.zeros(m.warps, np.int64)))
        for w in np.unique(m.thread[here] // 32):
            joined = np.maximum(joined, m.order.contribution(block, int(w)))
        m.arrived[block, k] = (arrived + len(here), joined)


@handles("bar barrier")
@handles("bar barrier", "u32 pred")
def barrier(i: Instruction) -> Control | Collective:
    """bar.sync, bar.arrive, bar.red, bar.warp.sync and their barrier{.cta} spellings."""
    if i.flag("warp"):
        i.need("sync")
        return warp_barrier(i)
    i.flag("cta")
    i.flag("aligned")
    kind = i.need("sync", "arrive", "red")
    reduce = i.need("popc", "and", "or") if kind == "red" else None
    if (reduce == "popc") != (i.type == "u32") or (reduce in ("and", "or")) != (i.type == "pred"):
        raise i.unsupported()
    first = 1 if reduce else 0
    extra = 1 if reduce else 0
    n = i.arity(*{"sync": (1, 2), "arrive": (2,), "red": (3, 4)}[kind])
    number = i.source(first, "u32")
    count = i.source(first + 1, "u32") if n - 2 * extra > 1 else None
    value = i.predicate(n - 1) if reduce else None
    write = i.dest(0, i.type) if reduce else None

    def run(m: Machine, p: int) -> None:
        ids = m.ids
        k = np.broadcast_to(number(m), ids.shape).astype(np.int64)
        total = None if count is None else np.broadcast_to(count(m), ids.shape).astype(np.int64)
        if total is not None and (total % 32).any():
            raise m.fault("barrier", f"thread count {int(total[total % 32 != 0][0])} is no multiple of 32", ids[0])
        if reduce:
            m.votes[ids] = value(m)
        if kind == "arrive":
            _arrive(m, k, total)
            m.key[ids] = p + 1
        else:
            _wait(m, p, ids, k)
        if total is None:
            _complete_blocks(m, np.unique(m.local_block[ids]))
        else:
            for block, number_, need in {(int(b), int(a), int(c)) for b, a, c in zip(m.local_block[ids], k, total)}:
                _complete_counted(m, block, number_, need)

    def finish(m: Machine) -> None:
        votes = m.votes[m.ids]
        block = m.local_block[m.ids]
        yes = np.bincount(block, votes, m.blocks).astype(np.uint32)
        everyone = np.bincount(block, minlength=m.blocks)
        result = {"popc": yes, "and": yes == everyone, "or": yes > 0}[reduce]
        write(m, result[block])

    control = Control(run)
    if reduce:
        control.finish = finish
    return control


def warp_barrier(i: Instruction) -> Collective:
    """bar.warp.sync: orders the memory accesses of the lanes it names."""
    i.arity(1)
    members, full = i.members(0)

    def step(m: Machine) -> None:
        present = m.present()
        warps = np.flatnonzero(present.any(1))
        masks = m.rows(np.broadcast_to(members(m), (m.n,)))[warps]
        present = present[warps]
        for value in np.unique(masks[present]):
            rows = present & (masks == value)
            some = rows.any(1)
            m.order.warp_sync(warps[some], rows[some])

    return Collective(step, members, full, lenient=True)


@handles("membar fence")
def fence(i: Instruction) -> Step:
    """Memory fences: they order what their thread has done and seen for what other blocks see."""
    i.arity(0)
    if i.flag("proxy"):
        i.need("alias", "async", "async.global", "async.shared::cta")
        i.choice("global", "shared::cta")
    elif i.opcode == "membar":
        i.need("cta", "gl", "sys")
    else:
        i.choice("sc", "acq_rel")
        i.need("cta", "gpu", "sys", "cluster")
    narrow, sequential = "cta" in i.statement.modifiers, i.opcode == "membar" or "sc" in i.statement.modifiers
    i.program.between_blocks |= not narrow

    def step(m: Machine) -> None:
        if not narrow:
            m.order.fence(m.ids, sequential)

    return step


@handles("griddepcontrol")
def griddepcontrol(i: Instruction) -> Step:
    """Dependent launches: kernels run one after the other here, so there is nothing to wait for."""
    i.arity(0)
    i.need("wait", "launch_dependents")
    return lambda m: None


@handles("nanosleep", "u32")
def nanosleep(i: Instruction) -> Step:
    """Timing is not modelled."""
    i.arity(1)
    i.source(0, "u32")
    return lambda m: None
