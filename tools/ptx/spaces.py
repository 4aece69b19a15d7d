"""Loads and stores in every state space, with all their checks: bounds, alignment, unwritten data, races.

Generic addresses are host addresses; the shared, local and parameter spaces of a thread appear in windows far above.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .memory import ALLOWED, WRITABLE, WRITTEN, gather, scatter
from .races import PLAIN, Shadow

if TYPE_CHECKING:
    from .machine import Machine

WINDOW_BITS = 56
WINDOWS = {"shared": 1, "local": 2, "param": 3}
PENDING = 8  # flag of shared bytes a cp.async will still write


class Place(NamedTuple):
    """Checked accesses: where in a flat array, which active positions (None: all), and the flags of those bytes."""

    flat: np.ndarray
    offset: np.ndarray
    base: int
    at: np.ndarray | None
    state: np.ndarray | None
    twice: np.ndarray | None  # positions that collide with another lane's write of the same instruction


def window(space: str) -> int:
    """The generic address of a space's offset 0."""
    return WINDOWS.get(space, 0) << WINDOW_BITS


def locate(
    m: Machine, space: str, address: np.ndarray, size: int, *, read: bool, write: bool, strength: int = PLAIN
) -> list[Place]:
    """Checks an access of the active lanes and says where it goes."""
    address = np.broadcast_to(address, (m.n,))
    if space == "generic":
        return _generic(m, address, size, read, write, strength)
    return _in_space(m, space, address, size, None, read, write, strength)


def _generic(m: Machine, address: np.ndarray, size: int, read: bool, write: bool, strength: int) -> list[Place]:
    top = address >> WINDOW_BITS
    out: list[Place] = []
    for k in np.unique(top):
        space = next((s for s, w in WINDOWS.items() if w == k), "global")
        at = None if (top == k).all() else np.flatnonzero(top == k)
        part = address if at is None else address[at]
        out += _in_space(m, space, part - window(space), size, at, read, write, strength)
    return out


def _ids(m: Machine, at: np.ndarray | None) -> np.ndarray:
    return m.ids if at is None else m.ids[at]


def _in_space(
    m: Machine,
    space: str,
    address: np.ndarray,
    size: int,
    at: np.ndarray | None,
    read: bool,
    write: bool,
    strength: int,
) -> list[Place]:
    verb = "store" if write and not read else "atomic" if write else "load"
    wrong = address % (size if size & (size - 1) == 0 else 1) != 0
    if wrong.any():
        k = int(np.flatnonzero(wrong)[0])
        raise m.fault("misaligned", f"{size}-byte {verb} at {space} address {int(address[k]):#x}", _ids(m, at)[k])
    if space in ("global", "const"):
        return _global(m, address, size, at, read, write, strength, verb)
    row, limit, flat, lead = {
        "shared": (m.shared_row, m.shared_size, m.shared, m.local_block),
        "local": (m.local_row, m.program.local, m.local, m.all),
        "param": (0, m.launch.params.size, m.launch.params, None),
    }[space]
    bad = (address < 0) | (address + size > limit)
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise m.fault(
            "out-of-bounds",
            f"{size}-byte {verb} at {space} offset {int(address[k])} of {limit} ({int(bad.sum())} threads)",
            _ids(m, at)[k],
        )
    if space == "param" and write:
        raise m.fault("read-only", "store to kernel parameters", _ids(m, at)[0])
    offset = address if lead is None else address + lead[_ids(m, at)] * row
    if space != "shared":
        return [Place(flat, offset, 0, at, None, None)]
    twice = _check_shared(m, offset, size, at, read, write, strength)
    return [Place(flat, offset, 0, at, m.shared_state, twice)]


def _check_shared(
    m: Machine, offset: np.ndarray, size: int, at: np.ndarray | None, read: bool, write: bool, strength: int
) -> np.ndarray | None:
    state = gather(m.shared_state, offset, size)
    pending = (state & PENDING).any(1)
    if pending.any():
        k = int(np.flatnonzero(pending)[0])
        raise m.fault("async", "touches shared memory a cp.async has not been waited for", _ids(m, at)[k])
    if read and not (state & WRITTEN).all():
        k = int(np.argwhere(state & WRITTEN == 0)[0][0])
        where = int(offset[k] % m.shared_row)
        raise m.fault("unwritten", f"reads shared offset {where}, which nothing wrote", _ids(m, at)[k])
    if m.shared_shadow is None:
        return None
    return _record(m, m.shared_shadow, offset, size, at, write, strength, "shared memory")


def _record(
    m: Machine,
    shadow: Shadow,
    offset: np.ndarray,
    size: int,
    at: np.ndarray | None,
    write: bool,
    strength: int,
    what: str,
    base: int = 0,
) -> np.ndarray | None:
    g = m.program.granule
    first = (offset + base) // g - base // g
    count = max(1, size // g)
    me = m.grid_lane[_ids(m, at)]
    cells = first
    if count > 1:
        cells = (first[:, None] + np.arange(count)).reshape(-1)
        me = np.repeat(me, count)
    twice = None
    if write:
        bad, twice = shadow.on_write(m.order, cells, me, strength)
    else:
        bad = shadow.on_read(m.order, cells, me, strength)
    if bad is not None:
        story = shadow.describe(int(cells[bad]))
        message = f"{'writes' if write else 'reads'} {what} {story}, with nothing in between to order the two"
        raise m.fault("race", message, _ids(m, at)[bad // count])
    return None if twice is None else np.unique(twice // count)


def _global(
    m: Machine,
    address: np.ndarray,
    size: int,
    at: np.ndarray | None,
    read: bool,
    write: bool,
    strength: int,
    verb: str,
) -> list[Place]:
    out = []
    for buffer, part in m.memory.groups(address):
        here = address if part is None else address[part]
        index = part if at is None else (at if part is None else at[part])
        if buffer is None:
            raise m.fault(
                "out-of-bounds",
                f"{size}-byte {verb} at {m.memory.near(int(here[0]))} ({len(here)} threads)",
                _ids(m, index)[0],
            )
        offset = here - buffer.base
        beyond = offset + size > buffer.size
        if not beyond.any():
            state = gather(buffer.state, offset, size, buffer.base)
            need = ALLOWED | (WRITTEN if read else 0) | (WRITABLE if write else 0)
            missing = (state & need) != need
            wrong = missing.any(1) if missing.any() else None
        else:
            state, wrong = None, beyond
        if wrong is not None:
            k = int(np.flatnonzero(wrong)[0])
            flags = 0 if state is None else int(np.bitwise_and.reduce(state[k]))
            kind = "unwritten" if read and not flags & WRITTEN else "read-only"
            kind = kind if flags & ALLOWED else "out-of-bounds"
            raise m.fault(
                kind,
                f"{size}-byte {verb} at byte {int(offset[k])} of {buffer!r} ({int(wrong.sum())} threads)",
                _ids(m, index)[k],
            )
        twice = None
        shadow = m.launch.shadow(buffer)
        if shadow is not None:
            twice = _record(m, shadow, offset, size, index, write, strength, buffer.name, buffer.base)
        out.append(Place(buffer.data, offset, buffer.base, index, buffer.state, twice))
    return out


def load(m: Machine, space: str, address: np.ndarray, size: int, strength: int = PLAIN) -> np.ndarray:
    """Bytes [active lanes, size]."""
    places = locate(m, space, address, size, read=True, write=False, strength=strength)
    if len(places) == 1:
        return gather(places[0].flat, places[0].offset, size, places[0].base)
    out = np.zeros((m.n, size), np.uint8)
    for p in places:
        out[p.at] = gather(p.flat, p.offset, size, p.base)
    return out


def store(m: Machine, space: str, address: np.ndarray, data: np.ndarray, strength: int = PLAIN) -> None:
    """Stores bytes [active lanes, size]."""
    size = data.shape[1]
    for p in locate(m, space, address, size, read=False, write=True, strength=strength):
        put(m, p, data if p.at is None else data[p.at])


def put(m: Machine, place: Place, data: np.ndarray) -> None:
    """Writes to a checked place. Lanes that write the same place at once must write the same."""
    scatter(place.flat, place.offset, data, place.base)
    if place.twice is not None:
        now = gather(place.flat, place.offset[place.twice], data.shape[1], place.base)
        differs = (now != data[place.twice]).any(1)
        if differs.any():
            k = int(place.twice[np.flatnonzero(differs)[0]])
            raise m.fault("race", "several lanes write different values to one place at once", _ids(m, place.at)[k])
        blocks = m.local_block[_ids(m, place.at)]
        if place.flat is not m.shared and len(np.unique(blocks[place.twice])) > 1:
            k = int(place.twice[0])
            raise m.fault("race", "several blocks write one place", _ids(m, place.at)[k])
    if place.state is not None:
        flags = np.full(data.shape, ALLOWED | WRITTEN | WRITABLE, np.uint8)
        scatter(place.state, place.offset, flags, place.base)
