"""Why a bug that nothing notices may be none. A reason holds where its check does: a second, stronger change of the same line
that must not show either. All of them ask for the same bits in every result first."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mutants import Mutant

# Whether the kernel, with these lines in place of the mutated one, has the same bits in all its results, and no fault.
Same = Callable[[list[str]], bool]


@dataclass(frozen=True)
class Reason:
    """``stronger``: lines to put in place of the mutated one; none: the same bits are enough."""

    operator: str
    line: str
    why: str
    stronger: Callable[[Mutant], list[str]] | None = None


def _guard(mutant: Mutant) -> tuple[str, str]:
    """The guard of an instruction, and its opposite."""
    found = re.match(r"@(!?)(%p\d+)", mutant.before)
    assert found
    return f"@{found[1]}{found[2]}", f"@{'' if found[1] else '!'}{found[2]}"


def _poisoned(mutant: Mutant) -> list[str]:
    """The access, and NaN in the registers of the lanes that its mask leaves out."""
    found = re.search(r"\.(?:v\d\.)?[a-z](\d+)\s*\{?([^}\[]*)\}?,\s*\[", mutant.before)
    assert found
    size, other = found[1], _guard(mutant)[1]
    word = {"16": "0x7FC0", "32": "0x7FC00000", "64": "0x7FF8000000000000"}[size]
    return [mutant.before, *(f"{other} mov.b{size} {register.strip()}, {word};" for register in found[2].split(","))]


def never_taken(mutant: Mutant) -> list[str]:
    """In place of a branch: a fault where it would be taken."""
    return [f"{_guard(mutant)[0]} trap;"]


def _never_equal(mutant: Mutant) -> list[str]:
    """A fault where the two are equal, then the comparison."""
    found = re.match(r"setp\.\w\w\.(\w+)\s+(%p\d+), (\S+), (\S+);", mutant.before)
    assert found
    return [f"setp.eq.{found[1]} {found[2]}, {found[3]}, {found[4]};", f"@{found[2]} trap;", mutant.before]


def _other_constant(mutant: Mutant) -> list[str]:
    """1e30 for one, -1e30 for minus one."""
    line = mutant.before.replace("0f3F800000", "0f7149F2CA").replace("0fBF800000", "0fF149F2CA")
    line = line.replace("0d3FF0000000000000", "0d46293E5939A08CEA").replace("0dBFF0000000000000", "0dC6293E5939A08CEA")
    return [line]


def _zero(mutant: Mutant) -> list[str]:
    """0 in place of what is loaded."""
    found = re.search(r"ld\.param\.u(\d+)\s+(%\w+),", mutant.before)
    assert found
    return [f"mov.u{found[1]} {found[2]}, 0;"]


def _never(mutant: Mutant) -> list[str]:
    """The comparison is never true."""
    found = re.match(r"setp\.\w\w\.(\w+)\s+(%p\d+), (\S+), ", mutant.before)
    assert found
    return [f"setp.ne.{found[1]} {found[2]}, {found[3]}, {found[3]};"]


SHORTCUT = "chooses a shortcut (one value a channel, plain parameters); the general way gives the same result"
REASONS = [
    Reason("wrong stride or displacement", r"ld\.param\.u32\s+%r\d+, .*\+12\]", SHORTCUT, _zero),
    Reason("other comparison", r"setp\.eq\.s(16|32).*, [01];", SHORTCUT, _never),
    Reason("missing mask", r"ld\.global", "what the mask leaves out is loaded, and not used", _poisoned),
    Reason("other comparison", r"setp\.\w\w\.(f|bf)\d+", "two floats that are equal only by chance", _never_equal),
    Reason("other comparison", r"setp\.\w\w\.s32\s.*, -1;", "a number of a channel, which is not negative", _never_equal),
    Reason("other comparison", r"setp\.lt\.s(32|64)\s.*, 1;", "whether there are terms: there are two at least", _never_equal),
    Reason("other comparison", r"setp\.l[te]\.[su](32|64)\s.*, %r", "one more turn of a loop, with every lane masked"),
    Reason("constant a quarter off", r"selp.*0[fd](BF800000|BFF0000000000000)", "stands for any limit below 0", _other_constant),
    Reason("constant a quarter off", r"selp.*0[fd](3F800000|3FF0000000000000)", "stands in for a width of 0, and is not used",
           _other_constant),
    Reason("constant a quarter off", r"setp\.\w\w\.f(32|64).*0(f0380|d3870)", "any tiny width of a bump counts as none"),
    Reason("constant a quarter off", r"0f7F7FFFFF|0f7EFFFFFF|0d7FE", "a cap, where any huge number would do"),
]  # fmt: skip


def reason(mutant: Mutant, same: Same) -> str | None:
    """Why a mutant that changes no bit is equivalent, or None."""
    for found in REASONS:
        applies = mutant.operator == found.operator and re.search(found.line, mutant.before)
        if applies and (found.stronger is None or same(found.stronger(mutant))):
            return found.why
    return None
