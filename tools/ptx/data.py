"""Moving data: mov, ld, st, address conversions, prefetches and cache policies."""

from __future__ import annotations

import re

import numpy as np

from .decode import Instruction, Step, elementwise, handles
from .races import ATOMIC, BLOCK_ATOMIC, PLAIN
from .spaces import WINDOW_BITS, WINDOWS, load, store, window
from .values import RAW, TYPES, U64

ALL = "b8 u8 s8 b16 u16 s16 b32 u32 s32 b64 u64 s64 f32 f64"


@handles("mov", "b16 u16 s16 b32 u32 s32 b64 u64 s64 f32 f64")
def mov(i: Instruction) -> Step:
    """Copy a register, literal, special register or address; pack and unpack `{a, b}`."""
    i.arity(2)
    parts, pieces = i.vector(0), i.vector(1)
    size = TYPES[i.type].size
    if len(pieces) > 1:
        small = size // len(pieces)
        if small * len(pieces) != size or small not in RAW:
            raise i.unsupported()
        reads, write = [i.source(p, f"b{8 * small}") for p in pieces], i.dest(0, f"b{8 * size}")

        def pack(m) -> None:
            columns = np.broadcast_arrays(*[r(m) for r in reads])
            write(m, np.stack(columns, -1).view(RAW[size])[..., 0])

        return pack
    if len(parts) > 1:
        small = size // len(parts)
        if small * len(parts) != size or small not in RAW:
            raise i.unsupported()
        read, writes = i.source(1, f"b{8 * size}"), [i.dest(p, f"b{8 * small}") for p in parts]

        def unpack(m) -> None:
            columns = np.array(read(m), copy=True, ndmin=1).view(RAW[small]).reshape(-1, len(parts))
            for k, w in enumerate(writes):
                w(m, columns[:, k])

        return unpack
    return elementwise(i, lambda a: a)


@handles("mov", "pred")
def mov_pred(i: Instruction) -> Step:
    """Copy a predicate."""
    i.arity(2)
    a, write = i.predicate(1), i.dest(0, "pred")
    return lambda m: write(m, a(m))


def hints(i: Instruction) -> None:
    """Consumes cache hints, which change no result."""
    i.choice("ca", "cg", "cs", "lu", "cv", "wb", "wt")
    for name in list(i.modifiers):
        if re.match(r"^L[12]::(evict_\w+|no_allocate|cache_hint|\d+B)$", name):
            i.modifiers.remove(name)


def strength(i: Instruction, orders: tuple[str, ...]) -> tuple[int, str]:
    """How strong an access is, and its ordering: plain, or relaxed, acquire, ... with a scope."""
    order = i.choice("weak", *orders)
    if order in (None, "weak"):
        return PLAIN, ""
    scope = None if order == "volatile" else i.need("cta", "cluster", "gpu", "sys")
    return (BLOCK_ATOMIC if scope == "cta" else ATOMIC), order


def space(i: Instruction, symbol_space: str | None) -> str:
    """The state space of an access, `generic` if unnamed."""
    found = i.choice("global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func")
    name = (found or "generic").split("::")[0]
    if name == "param":  # call parameters live in the local frame
        return symbol_space or ("param" if i.scope == i.program.name else "local")
    if name == "generic" and symbol_space not in (None, "global", "const"):
        raise i.unsupported(f"generic access to a {symbol_space} symbol")
    return name


def width(i: Instruction) -> int:
    """1, 2, 4 or 8 elements."""
    return int((i.choice("v2", "v4", "v8") or "v1")[1:])


def publish(m, places: np.ndarray, order: str) -> None:
    """Tells the order between blocks about strong accesses to these locations."""
    if m.order.between is None:
        return
    acquire, release = order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
    for lane, where in zip(m.ids, np.broadcast_to(places, (m.n,))):
        m.order.strong(int(lane), m.launch.location(int(where)), release, acquire)


@handles("ld ldu", ALL)
def ld(i: Instruction) -> Step:
    """Load 1 to 8 elements; narrow ones are extended to the register."""
    i.arity(2, 3)
    address, symbol_space = i.address(1)
    where = space(i, symbol_space)
    kind, order = strength(i, ("volatile", "relaxed", "acquire"))
    i.flag("nc")
    hints(i)
    n, t = width(i), TYPES[i.type]
    names = i.vector(0)
    if len(names) != n or n * t.size > 32:
        raise i.unsupported(f"{len(names)} destinations")
    if len(i.operands) == 3:
        i.source(2, "b64")
    writes, size = [i.dest(d, i.type, wider=True) for d in names], n * t.size
    i.program.access(size)
    i.program.between_blocks |= order == "acquire" and kind == ATOMIC

    def step(m) -> None:
        a = address(m)
        if order:
            publish(m, a, order)
        data = load(m, where, a, size, kind)
        columns = np.ascontiguousarray(data).view(t.dtype)
        for k, write in enumerate(writes):
            write(m, columns[:, k])

    return step


@handles("st", ALL)
def st(i: Instruction) -> Step:
    """Store 1 to 8 elements."""
    i.arity(2, 3)
    address, symbol_space = i.address(0)
    where = space(i, symbol_space)
    kind, order = strength(i, ("volatile", "relaxed", "release"))
    hints(i)
    n, t = width(i), TYPES[i.type]
    names = i.vector(1)
    if len(names) != n or n * t.size > 32 or where == "const":
        raise i.unsupported(f"{len(names)} sources")
    if len(i.operands) == 3:
        i.source(2, "b64")
    reads, size = [i.source(s, i.type, wider=True) for s in names], n * t.size
    i.program.access(size)
    i.program.between_blocks |= order == "release" and kind == ATOMIC

    def step(m) -> None:
        data = np.empty((m.n, n), RAW[t.size])
        for k, read in enumerate(reads):
            data[:, k] = read(m).view(RAW[t.size])
        a = address(m)
        store(m, where, a, data.view(np.uint8), kind)
        if order:
            publish(m, a, order)

    return step


@handles("cvta", "u64")
def cvta(i: Instruction) -> Step:
    """To and from generic addresses."""
    i.arity(2)
    back = i.flag("to")
    where = i.need("global", "shared", "shared::cta", "local", "const", "param", "param::entry").split("::")[0]
    shift = U64(window(where))
    return elementwise(i, (lambda a: a - shift) if back else (lambda a: a + shift))


@handles("isspacep")
def isspacep(i: Instruction) -> Step:
    """Whether a generic address lies in a space."""
    i.arity(2)
    where = i.need("global", "shared", "shared::cta", "local", "param", "param::entry").split("::")[0]
    a, write = i.source(1, "u64"), i.dest(0, "pred")
    windows = {np.uint64(w) for w in WINDOWS.values()}

    def step(m) -> None:
        top = a(m) >> U64(WINDOW_BITS)
        inside = top == WINDOWS[where] if where != "global" else ~np.isin(top, list(windows))
        write(m, inside)

    return step


@handles("prefetch prefetchu applypriority discard")
def prefetch(i: Instruction) -> Step:
    """Cache control; nothing to do, but discard would lose data."""
    if i.opcode == "discard":
        raise i.unsupported()
    i.choice("global", "local")
    i.choice("L1", "L2")
    hints(i)
    i.address(0)
    return lambda m: None


@handles("createpolicy", "b64")
def createpolicy(i: Instruction) -> Step:
    """A cache policy: an opaque number."""
    i.need("fractional", "range")
    for name in list(i.modifiers):
        if re.match(r"^(L2::evict_\w+|global)$", name):
            i.modifiers.remove(name)
    write = i.dest(0, "b64")
    return lambda m: write(m, np.zeros(1, U64))
