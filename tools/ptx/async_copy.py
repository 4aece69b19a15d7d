"""cp.async: copies from global to shared memory that are there once the issuing thread has waited.

The destination is pending from the start, so that any access before the wait is a fault; the source is read at once.
Bulk copies (TMA) and mbarrier completion are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .decode import Instruction, Step, handles
from .memory import WRITTEN, gather, scatter
from .spaces import PENDING, load, locate, store


@dataclass
class Copy:
    """Copies issued together: lanes, their shared addresses, the data, and the group each belongs to."""

    lanes: np.ndarray
    address: np.ndarray
    data: np.ndarray
    group: np.ndarray


@handles("cp")
def cp(i: Instruction) -> Step:
    """cp.async and its groups."""
    i.need("async")
    if i.flag("commit_group"):
        i.arity(0)
        return commit
    if i.flag("wait_all"):
        i.arity(0)
        return lambda m: wait(m, None)
    if i.flag("wait_group"):
        i.arity(1)
        left = i.constant(0)
        return lambda m: wait(m, left)
    return issue(i)


def issue(i: Instruction) -> Step:
    """One copy of 4, 8 or 16 bytes; bytes beyond the source size are zero."""
    level = i.need("ca", "cg")
    i.need("shared", "shared::cta")
    i.need("global")
    hint = i.flag("L2::cache_hint")
    i.choice("L2::64B", "L2::128B", "L2::256B")
    n = i.arity(3, 4, 5)
    size = i.constant(2)
    if size not in ((16,) if level == "cg" else (4, 8, 16)):
        raise i.unsupported(f"size {size}")
    target, _ = i.address(0)
    source, _ = i.address(1)
    if hint:
        i.source(n - 1, "b64")
        n -= 1
    amount = ignore = None
    if n == 4:
        text = i.operands[3]
        index = i.register(text.lstrip("!"))
        if index is not None and i.program.register_size[index] == 0:
            ignore = i.predicate(3)
        else:
            amount = i.source(3, "u32")
    elif n == 5:
        raise i.unsupported()
    i.program.access(size)

    def step(m) -> None:
        to = np.broadcast_to(target(m), (m.n,)).copy()
        come = np.broadcast_to(source(m), (m.n,))
        wanted = np.full(m.n, size) if amount is None else np.broadcast_to(amount(m), (m.n,)).astype(np.int64)
        if ignore is not None:
            wanted = np.where(ignore(m), 0, wanted)
        if (wanted > size).any():
            raise m.fault("async", f"source size {int(wanted.max())} of a {size}-byte copy", m.ids[wanted > size][0])
        data = np.zeros((m.n, size), np.uint8)
        ids = m.ids
        for amount_ in np.unique(wanted[wanted > 0]):
            at = np.flatnonzero(wanted == amount_)
            m.select(ids[at])
            data[at, :amount_] = load(m, "global", come[at], int(amount_))
        m.select(ids)
        for place in locate(m, "shared", to, size, read=False, write=True):
            state = gather(place.state, place.offset, size)
            if place.twice is not None:
                raise m.fault("race", "several lanes copy to one place at once", ids[place.twice[0]])
            scatter(place.state, place.offset, (state & np.uint8(~WRITTEN & 255)) | np.uint8(PENDING))
        m.copies.append(Copy(ids.copy(), to, data, m.groups[ids].copy()))

    return step


def commit(m) -> None:
    """Closes the current group of each active lane."""
    m.groups[m.lanes] += 1


def wait(m, left: int | None) -> None:
    """Completes copies of the active lanes, but not those of the latest `left` groups (None: all, open ones too)."""
    ids, active = m.ids, np.zeros(m.total, bool)
    active[ids] = True
    remaining = []
    for copy in m.copies:
        done = active[copy.lanes]
        if left is not None:
            done &= copy.group < m.groups[copy.lanes] - left
        if done.any():
            m.select(copy.lanes[done])
            offset = copy.address[done] + m.local_block[m.ids] * m.shared_row
            state = gather(m.shared_state, offset, copy.data.shape[1])
            scatter(m.shared_state, offset, state & np.uint8(~PENDING & 255))
            store(m, "shared", copy.address[done], copy.data[done])
        if not done.all():
            keep = ~done
            remaining.append(Copy(copy.lanes[keep], copy.address[keep], copy.data[keep], copy.group[keep]))
    m.copies = remaining
    m.select(ids)
