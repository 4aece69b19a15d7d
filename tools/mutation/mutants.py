"""Mutation operators: changes of one line of a kernel's PTX, from Triton or nvcc."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    kernel: str
    operator: str
    line: int
    before: str
    after: str

    def planted(self, text: str) -> str:
        """The kernel with the mutation."""
        lines = text.splitlines()
        lines[self.line] = self.after
        return "\n".join(lines) + "\n"


_SWAPS = {
    "other comparison": [("setp.lt", "setp.le"), ("setp.gt", "setp.ge"), ("setp.le", "setp.lt"), ("setp.ge", "setp.gt"),
                         ("setp.eq", "setp.ne"), ("setp.ne", "setp.eq")],
    "other operator": [("add.f", "sub.f"), ("sub.f", "add.f"), ("mul.f", "add.f"), ("add.rn.f", "sub.rn.f"),
                       ("mul.rn.f", "add.rn.f"), ("min.", "max."), ("max.", "min."), ("and.pred", "or.pred"),
                       ("or.pred", "and.pred"), ("add.s", "sub.s"), ("sub.s", "add.s"), ("shl.", "shr."),
                       ("neg.f", "abs.f"), ("abs.f", "neg.f")],
    "other rounding of an index": [("div.s", "rem.s"), ("rem.s", "div.s"), ("div.u", "rem.u"), ("rem.u", "div.u")],
}  # fmt: skip


def _constant(line: str) -> str | None:
    """A floating-point constant changed by a quarter, except zeros and infinities."""
    for found in re.finditer(r"\b0([fd])([0-9A-Fa-f]{8,16})\b", line):
        single = found[1] == "f"
        code, size = ("f", 4) if single else ("d", 8)
        (value,) = struct.unpack(f">{code}", bytes.fromhex(found[2].rjust(2 * size, "0")))
        if value not in (0.0, float("inf"), -float("inf")) and value == value:
            word = struct.pack(f">{code}", value * 0.75).hex().upper()
            return line[: found.start()] + f"0{found[1]}{word}" + line[found.end() :]
    return None


def _index(line: str) -> str | None:
    """An integer constant of address arithmetic off by one."""
    found = re.search(r"^(\s*(?:@!?%p\d+ )?(?:mul|mad|add|shl|shr|and|or)\.\S+\s.*, )(-?\d+);", line)
    return f"{found[1]}{int(found[2]) + 1};{line[found.end() :]}" if found else None


def _displacement(line: str) -> str | None:
    """An access one element further."""
    found = re.search(r"\[ ?(%rd?\d+) ?\+ ?(\d+) ?\]", line)
    return line[: found.start()] + f"[{found[1]}+{int(found[2]) + 4}]" + line[found.end() :] if found else None


_BRANCH = re.compile(r"\s*@!?%p\d+ bra(?:\.uni)?\s+(\$\w+);")


def _mask(line: str) -> str | None:
    """An access without its mask; where masks are branches, a branch that is never taken."""
    found = re.match(r"\s*@!?%p\d+ (?=ld|st)", line)
    return line[found.end() :] if found else _branch(line)


def _branch(line: str) -> str | None:
    return "" if _BRANCH.match(line) else None


def _barrier(line: str) -> str | None:
    return "" if re.match(r"\s*(bar|barrier)\.", line) else None


def _shuffle(line: str) -> str | None:
    """A step of a tree reduction with the wrong partner."""
    found = re.search(r"(shfl\.sync\.\S+\s.*, )(\d+)(, \d+, -1;)", line)
    return f"{line[: found.start()]}{found[1]}{int(found[2]) // 2}{found[3]}" if found else None


def _pointer(line: str) -> str | None:
    """The previous or next tensor argument. nvcc's kernels have all tensors in one structure."""
    found = re.search(r"(ld\.param\.[bu]64 .*_param_)(\d+)\]", line)
    if found:
        other = int(found[2]) + (1 if int(found[2]) == 0 else -1)
        return f"{line[: found.start()]}{found[1]}{other}];"
    found = re.search(r"(ld\.param\.[bu]64 .*_param_\d+\+)(\d+)\]", line)
    return f"{line[: found.start()]}{found[1]}{abs(int(found[2]) - 8)}];" if found else None


def _select(line: str) -> str | None:
    found = re.search(r"(selp\.\S+\s+\S+ )(\S+), (\S+), (%p\d+;)", line)
    return f"{line[: found.start()]}{found[1]}{found[3]}, {found[2]}, {found[4]}" if found else None


def _swap(pairs: list[tuple[str, str]]) -> Callable[[str], str | None]:
    def change(line: str) -> str | None:
        body = re.sub(r"^\s*@!?%p\d+ ", "", line).strip()
        for old, new in pairs:
            if body.startswith(old):
                return line.replace(old, new, 1)
        return None

    return change


OPERATORS: dict[str, Callable[[str], str | None]] = {
    "dropped barrier": _barrier,
    "missing mask": _mask,
    "loop of one turn": _branch,
    "wrong stride or displacement": _displacement,
    "index constant off by one": _index,
    "wrong partner in a sum": _shuffle,
    "another tensor": _pointer,
    "constant a quarter off": _constant,
    "operands of a selection swapped": _select,
    **{name: _swap(pairs) for name, pairs in _SWAPS.items()},
}


def mutants(kernel: str, text: str) -> Iterator[Mutant]:
    """Every change of every line of code."""
    lines = text.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith("$")}
    for number, line in enumerate(lines):
        if re.match(r"\s*[.@/{}$]|^\S", line) and not re.match(r"\s*@!?%p\d+ ", line):
            continue
        for name, change in OPERATORS.items():
            after, branch = change(line), _BRANCH.match(line)
            if branch and name != ("loop of one turn" if labels[branch[1]] < number else "missing mask"):
                continue
            if after is not None and after != line:
                yield Mutant(kernel, name, number, line.strip(), after.strip())
