"""Registers, spills and the main loop of a compiled kernel, from its disassembly."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_PIPES = {
    "mufu": ("MUFU",),
    "fp32": ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"),
    "fp64": ("DFMA", "DADD", "DMUL", "DSETP", "F2F"),
    "convert": ("F2FP", "I2F", "F2I", "I2FP"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDL", "STL"),
}


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        return next((pipe for pipe, names in _PIPES.items() if self.name in names), "other")

    @property
    def bytes(self) -> int:
        """Bytes per lane."""
        width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", self.opcode)
        return {None: 4, "128": 16, "64": 8, "U16": 2, "S16": 2}.get(width and width[1], 1)


@dataclass(frozen=True)
class Listing:
    """A kernel: registers per thread, bytes of stack, instructions, and ranges of its loops."""

    registers: int
    stack: int
    instructions: list[Instruction]
    loops: list[tuple[int, int]]

    def count(self, *names: str) -> int:
        return sum(i.name in names for i in self.instructions)

    def calls(self, body: list[Instruction]) -> int:
        """The number of subroutine calls, without a ``CALL`` of a local label, with which ptxas sometimes leaves a loop."""
        return sum(i.name == "CALL" and "`(.L" not in i.operands for i in body)

    def hot(self, outermost: bool) -> list[Instruction]:
        """The loop that loads from global memory, innermost or outermost; all instructions if there is none."""
        found = [self.instructions[a : b + 1] for a, b in self.loops]
        found = [body for body in found if any(i.name == "LDG" for i in body)]
        return sorted(found, key=len)[-1 if outermost else 0] if found else self.instructions


@lru_cache(maxsize=8)
def _dump(cubin: bytes) -> tuple[str, str]:
    """The output of NVIDIA's tools for a cubin: the resources of its kernels, and their code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, option: str) -> str:
            done = subprocess.run([_tool(tool), option, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        return run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")


def disassemble(cubin: bytes, function: str | None = None) -> Listing:
    """The listing of a kernel. ``function``: its name; None if there is only one."""
    usage, text = _dump(cubin)
    if function is not None:
        usage = re.search(rf"Function {function}:\s+(.*)", usage)[1]  # type: ignore[index]
        text = re.search(rf"^\.text\.{function}:$.*?(?=^\.text\.|\Z)", text, re.M | re.S)[0]  # type: ignore[index]
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", usage)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        label = _LABEL.match(line.strip())
        if label:
            labels[label[1]] = len(instructions)
        parts = _LINE.search(line)
        if parts and parts[3] != "NOP":
            target = re.search(r"`\((\.L\w+)\)", parts[4])
            if parts[3].startswith("BRA") and target:
                branches.append((len(instructions), target[1]))
            instructions.append(Instruction(parts[3], parts[4]))
    loops = [(labels[to], at) for at, to in branches if to in labels and labels[to] < at]
    return Listing(numbers["REG"], numbers["STACK"], instructions, loops)


def pipes(body: list[Instruction]) -> Counter[str]:
    """The number of operations per execution pipe. A packed instruction (FFMA2, sm_100) counts twice."""
    found: Counter[str] = Counter()
    for i in body:
        found[i.pipe] += 2 if i.pipe == "fp32" and i.name.endswith("2") else 1
    return found
