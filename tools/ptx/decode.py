"""From a parsed statement to a Python closure: operands, modifiers and the registry of instructions.

A handler is registered for an opcode and the types it knows. It takes the modifiers it understands from an
`Instruction`; whatever is left over makes the instruction `Unsupported`, so nothing is ever half understood.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Unsupported
from .parser import Statement
from .values import RAW, SIGNED, TYPES, U32

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Program

Source = Callable[["Machine"], np.ndarray]
Dest = Callable[["Machine", np.ndarray], None]
Step = Callable[["Machine"], None]


@dataclass
class Control:
    """An instruction that decides where its lanes go next: `run(machine, pc)` over the lanes whose guard holds."""

    run: Callable[[Machine, int], None]


@dataclass
class Collective:
    """A warp instruction. `members` reads the lane mask; None means the whole warp.

    Lanes of the mask must all come. One that has left the kernel, or that the block never had, is a fault too, although
    the instruction set lets it count as present: it is how missing lanes usually come about. `lenient` allows it.
    """

    run: Step
    members: Source | None
    full: bool = False  # the mask is a literal naming all lanes
    lenient: bool = False


HANDLERS: dict[tuple[str, str], Callable[[Instruction], Step | Control | Collective]] = {}

SPECIAL = {
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%dynamic_smem_size", "%total_smem_size"),
    *(f"%lanemask_{c}" for c in ("eq", "lt", "le", "gt", "ge")),
}


def handles(opcodes: str, types: str = "") -> Callable:
    """Registers a handler for each opcode with each type (`""`: an instruction without a type)."""

    def register(function: Callable[[Instruction], Step]) -> Callable[[Instruction], Step]:
        for opcode in opcodes.split():
            for name in types.split() or [""]:
                assert (opcode, name) not in HANDLERS, (opcode, name)
                HANDLERS[opcode, name] = function
        return function

    return register


def literal(text: str, type_name: str) -> np.ndarray:
    """A literal operand as a one-element array of the type."""
    t = TYPES[type_name]
    dtype = np.dtype(t.dtype)
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text)
    if m := re.match(r"^0([fFdD])([0-9a-fA-F]+)$", body):
        single = m[1] in "fF"
        raw = np.array([int(m[2], 16)], U32 if single else np.uint64)
        if t.kind != "f" and t.size == raw.itemsize and sign > 0:
            return raw.view(dtype)
        if type_name not in ("f32", "f64"):
            raise Unsupported(f"float literal {text} as .{type_name}")
        value = raw.view(np.float32 if single else np.float64)
        return (-value if sign < 0 else value).astype(dtype)
    if type_name in ("f32", "f64"):
        try:
            return np.array([sign * float(body)], dtype)
        except ValueError as e:
            raise Unsupported(f"operand {text!r}") from e
    try:
        digits = body.rstrip("U")
        octal = re.match(r"^0[0-7]+$", digits)
        value = 32 if digits == "WARP_SZ" else sign * int(digits, 8 if octal else 0)
    except ValueError as e:
        raise Unsupported(f"operand {text!r}") from e
    bits = 8 * (t.size or 1)
    return np.array([value & ((1 << bits) - 1)], RAW[t.size or 1]).view(dtype if t.size else np.uint8)


def literal_bytes(text: str, type_name: str) -> bytes:
    """A literal of an initialiser as little-endian bytes."""
    if type_name in ("f32", "f64") and re.match(r"^0[fFdD]", text):
        return literal(text, type_name).tobytes()
    if type_name in ("f32", "f64"):
        return struct.pack("<f" if type_name == "f32" else "<d", float(text))
    return literal(text, type_name).tobytes()


class Instruction:
    """A statement being decoded. Handlers consume its modifiers and turn its operands into closures."""

    def __init__(self, statement: Statement, program: Program, scope: str):
        self.statement, self.program, self.scope = statement, program, scope
        self.opcode, self.operands = statement.opcode, statement.operands
        self.modifiers = list(statement.modifiers)
        typed = [m for m in self.modifiers if m in TYPES]
        self.type = typed[-1] if typed else ""
        if typed:  # the last one; earlier ones (cvt) stay for the handler
            del self.modifiers[len(self.modifiers) - 1 - self.modifiers[::-1].index(self.type)]

    def unsupported(self, why: str = "") -> Unsupported:
        """The refusal, naming the instruction."""
        return Unsupported(f"{self.statement.line}: {self.statement.text}" + (f": {why}" if why else ""))

    # -- modifiers

    def flag(self, *names: str) -> bool:
        """Whether one of the modifiers is present; consumes it."""
        return self.choice(*names) is not None

    def choice(self, *names: str) -> str | None:
        """The one of these modifiers that is present; consumes it."""
        for name in names:
            if name in self.modifiers:
                self.modifiers.remove(name)
                return name
        return None

    def need(self, *names: str) -> str:
        """Like `choice`, but one must be there."""
        found = self.choice(*names)
        if found is None:
            raise self.unsupported(f"expects one of {', '.join(names)}")
        return found

    def arity(self, *counts: int) -> int:
        """Checks the number of operands and returns it."""
        if len(self.operands) not in counts:
            raise self.unsupported(f"{len(self.operands)} operands")
        return len(self.operands)

    # -- operands

    def register(self, text: str) -> int | None:
        """Index of a register, or None for anything else."""
        return self.program.register_index.get(text)

    def constant(self, k: int) -> int:
        """An operand that must be an integer literal."""
        if re.match(r"^-?\d", self.operands[k]):
            return int(literal(self.operands[k], "s64")[0])
        raise self.unsupported(f"operand {self.operands[k]!r} is no literal")

    def source(self, k: int | str, type_name: str, wider: bool = False) -> Source:
        """Reads an operand (position or text) over the active lanes; literals come as one-element arrays."""
        text = self.operands[k] if isinstance(k, int) else k
        t = TYPES[type_name]
        index = self.register(text)
        if index is not None:
            size = self.program.register_size[index]
            dtype, raw = t.dtype, RAW.get(t.size)
            if size == t.size:
                if size == 0:
                    return lambda m: m.regs[index][m.lanes]
                return lambda m: m.regs[index].view(dtype)[m.lanes]
            if wider and size > t.size > 0:
                return lambda m: m.regs[index][m.lanes].astype(raw).view(dtype)
            raise self.unsupported(f"{text} has {8 * size} bits, .{type_name} needs {8 * t.size}")
        if text in SPECIAL:
            if t.size != 4:
                if t.size == 8 and self.opcode == "mov":
                    return lambda m: m.special(text)[m.lanes].astype(t.dtype)
                raise self.unsupported(f"{text} as .{type_name}")
            return lambda m: m.special(text)[m.lanes].view(t.dtype)
        if text.startswith("%"):
            raise self.unsupported(f"register {text}")
        m = re.match(r"^([A-Za-z_$][\w$:]*?)\s*(?:\+\s*(-?\w+))?$", text)
        if m and m[1] != "WARP_SZ" and self.program.has_symbol(m[1]):
            value = self.program.symbol(m[1]).address + int(m[2] or "0", 0)
            if t.size not in (4, 8) or t.kind not in "usb" or value >> (8 * t.size):
                raise self.unsupported(f"address of {m[1]} as .{type_name}")
            fixed = np.array([value], RAW[t.size]).view(t.dtype)
            return lambda m: fixed
        value = literal(text, type_name)
        return lambda m: value

    def dest(self, k: int | str, type_name: str, wider: bool = False) -> Dest:
        """Writes an operand over the active lanes; `_` discards. `wider` registers are sign- or zero-extended."""
        text = self.operands[k] if isinstance(k, int) else k
        if text == "_":
            return lambda m, v: None
        t = TYPES[type_name]
        index = self.register(text)
        if index is None:
            raise self.unsupported(f"destination {text!r}")
        size = self.program.register_size[index]
        if size == t.size:
            raw = RAW[size] if size else np.bool_

            def write(m: Machine, v: np.ndarray) -> None:
                m.regs[index][m.lanes] = v.view(raw)

            return write
        if not wider or size < t.size or not t.size:
            raise self.unsupported(f"{text} has {8 * size} bits, .{type_name} needs {8 * t.size}")
        big = SIGNED[size] if t.kind == "s" else RAW[size]
        view = t.dtype if t.kind == "s" else RAW[t.size]

        def extend(m: Machine, v: np.ndarray) -> None:
            m.regs[index][m.lanes] = v.view(view).astype(big).view(RAW[size])

        return extend

    def predicate(self, k: int | str) -> Source:
        """A predicate operand, possibly negated, possibly a literal."""
        text = self.operands[k] if isinstance(k, int) else k
        if text in ("0", "1", "-1"):  # LLVM writes a true predicate as -1
            fixed = np.array([text != "0"])
            return lambda m: fixed
        negated = text.startswith("!")
        index = self.register(text.lstrip("! "))
        if index is None or self.program.register_size[index]:
            raise self.unsupported(f"predicate {text!r}")
        if negated:
            return lambda m: ~m.regs[index][m.lanes]
        return lambda m: m.regs[index][m.lanes]

    def pair(self, k: int) -> tuple[str, str]:
        """Splits a `d|p` destination; a missing part is `_`."""
        first, _, second = self.operands[k].partition("|")
        return first.strip(), second.strip() or "_"

    def members(self, k: int) -> tuple[Source, bool]:
        """A lane mask operand, and whether it is a literal naming all lanes."""
        full = self.register(self.operands[k]) is None and int(literal(self.operands[k], "u32")[0]) == 0xFFFFFFFF
        return self.source(k, "b32"), full

    def vector(self, k: int) -> list[str]:
        """The elements of `{a, b}`, or the operand itself."""
        text = self.operands[k].strip()
        return [x.strip() for x in text[1:-1].split(",")] if text.startswith("{") else [text]

    def address(self, k: int | str) -> tuple[Source, str | None]:
        """A `[base+offset]` operand: its addresses as int64, and the state space if a symbol fixes it."""
        text = self.operands[k] if isinstance(k, int) else k
        m = re.match(r"^\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]$", text)
        if not m:
            raise self.unsupported(f"address {text!r}")
        offset = int(m[2] or "0", 0)
        index = self.register(m[1])
        if index is not None:
            if self.program.register_size[index] not in (4, 8):
                raise self.unsupported(f"address register {m[1]}")
            return lambda m: m.regs[index][m.lanes].astype(np.int64) + offset, None
        if self.program.has_symbol(m[1]):
            symbol = self.program.symbol(m[1])
            fixed = np.array([symbol.address + offset], np.int64)
            return lambda m: fixed, symbol.space
        fixed = literal(m[1], "s64") + offset
        return lambda m: fixed, None


def decode(statement: Statement, program: Program, scope: str) -> Step | Control | Collective:
    """The closure of a statement, or `Unsupported`."""
    instruction = Instruction(statement, program, scope)
    handler = HANDLERS.get((instruction.opcode, instruction.type))
    if handler is None:
        raise instruction.unsupported()
    try:
        step = handler(instruction)
    except IndexError as e:
        raise instruction.unsupported("too few operands") from e
    except Unsupported as e:
        if statement.text in str(e):
            raise
        raise instruction.unsupported(str(e)) from e
    if instruction.modifiers:
        raise instruction.unsupported("modifier " + ", ".join("." + m for m in instruction.modifiers))
    return step


def elementwise(instruction: Instruction, function: Callable[..., Any], *types: str, result: str | None = None) -> Step:
    """The closure of `d = function(a, b, ...)` with the given operand types (the instruction's own by default)."""
    types = types or (instruction.type,) * (len(instruction.operands) - 1)
    if len(types) != len(instruction.operands) - 1:
        raise instruction.unsupported(f"{len(instruction.operands)} operands")
    write = instruction.dest(0, result or instruction.type)
    reads = [instruction.source(k + 1, t) for k, t in enumerate(types)]
    if len(reads) == 1:
        (a,) = reads
        return lambda m: write(m, function(a(m)))
    if len(reads) == 2:
        a, b = reads
        return lambda m: write(m, function(a(m), b(m)))
    return lambda m: write(m, function(*[r(m) for r in reads]))
