"""Reasons why an undetected mutant can be equivalent. Each is checked by a second, stronger change of the same line, which has
to be undetected too. All of them require identical bits in every result first."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .mutants import Mutant

# Whether the kernel, with these lines in place of the mutated one, has the same bits in all its results, and no fault.
Same = Callable[[list[str]], bool]


@dataclass(frozen=True)
class Reason:
    """A reason. ``line``: a pattern for "kernel: instruction". ``stronger``: lines that replace the mutated one; if none,
    identical bits suffice. ``source``: a pattern for the instruction that computes the last operand."""

    operator: str
    line: str
    why: str
    stronger: Callable[[Mutant], list[str]] | None = None
    source: str = ""


def _guard(mutant: Mutant) -> tuple[str, str]:
    """The guard of an instruction, and the negated guard."""
    found = re.match(r"@(!?)(%p\d+)", mutant.before)
    assert found
    return f"@{found[1]}{found[2]}", f"@{'' if found[1] else '!'}{found[2]}"


def _poisoned(mutant: Mutant) -> list[str]:
    """The access, with NaN in the registers of masked-out lanes."""
    found = re.search(r"\.(?:v\d\.)?[a-z](\d+)\s*\{?([^}\[]*)\}?,\s*\[", mutant.before)
    assert found
    size, other = found[1], _guard(mutant)[1]
    word = {"16": "0x7FC0", "32": "0x7FC00000", "64": "0x7FF8000000000000"}[size]
    return [mutant.before, *(f"{other} mov.b{size} {register.strip()}, {word};" for register in found[2].split(","))]


def never_taken(mutant: Mutant) -> list[str]:
    """A fault instead of a taken branch."""
    return [f"{_guard(mutant)[0]} trap;"]


def _never_equal(mutant: Mutant) -> list[str]:
    """The comparison, with a fault if its operands are equal."""
    found = re.match(r"setp\.\w\w\.(\w+)\s+(%p\d+), (\S+), (\S+);", mutant.before)
    assert found
    return [f"setp.eq.{found[1]} {found[2]}, {found[3]}, {found[4]};", f"@{found[2]} trap;", mutant.before]


def _other_constant(mutant: Mutant) -> list[str]:
    """1e30 for one or a half, -1e30 for minus one."""
    line = mutant.before.replace("0f3F800000", "0f7149F2CA").replace("0fBF800000", "0fF149F2CA")
    line = line.replace("0d3FF0000000000000", "0d46293E5939A08CEA").replace("0dBFF0000000000000", "0dC6293E5939A08CEA")
    return [line.replace("0f3F000000", "0f7149F2CA").replace("0d3FE0000000000000", "0d46293E5939A08CEA")]


def _zero(mutant: Mutant) -> list[str]:
    """0 instead of the loaded value."""
    found = re.search(r"ld\.param\.u\d+\s+(%\w+),", mutant.before)
    assert found
    return [f"mov.u{64 if found[1].startswith('%rd') else 32} {found[1]}, 0;"]


def _never(mutant: Mutant) -> list[str]:
    """A comparison that is never true."""
    found = re.match(r"setp\.\w\w\.(\w+)\s+(%p\d+), (\S+), ", mutant.before)
    assert found
    return [f"setp.ne.{found[1]} {found[2]}, {found[3]}, {found[3]};"]


def _operands(mutant: Mutant) -> list[str]:
    return re.findall(r"[^\s,;]+", mutant.before.split(maxsplit=1)[1])


def _checked(mutant: Mutant, *condition: str) -> list[str]:
    """The instruction, with a fault first if the condition sets %fault."""
    return ["{", ".reg .pred %fault;", ".reg .b32 %rest;", *condition, "@%fault trap;", "}", mutant.before]


def _adds_zero(mutant: Mutant) -> list[str]:
    return _checked(mutant, f"setp.ne.s32 %fault, {_operands(mutant)[2]}, 0;")


def _no_multiple(mutant: Mutant) -> list[str]:
    """A fault if the value to round up is a multiple of 16."""
    return _checked(mutant, f"and.b32 %rest, {_operands(mutant)[1]}, 15;", "setp.eq.s32 %fault, %rest, 0;")


def _equals(mutant: Mutant) -> list[str]:
    _, a, b = _operands(mutant)
    return _checked(mutant, f"setp.ne.s32 %fault, {a}, {b};")


def _first(mutant: Mutant) -> list[str]:
    """A fault if the dividend is not 0."""
    return _checked(mutant, f"setp.ne.s32 %fault, {_operands(mutant)[1]}, 0;")


def _not_negative(mutant: Mutant) -> list[str]:
    return _checked(mutant, f"setp.lt.s32 %fault, {_operands(mutant)[1]}, 0;")


def _neither(mutant: Mutant) -> list[str]:
    """A fault if the compared value is the original constant or the mutant's."""
    first, second = (line.split(maxsplit=1)[1].split(", ", 1)[1] for line in (mutant.before, mutant.after))
    return _checked(mutant, f"setp.eq.f32 %fault, {first}", "@%fault trap;", f"setp.eq.f32 %fault, {second}")


def _further(mutant: Mutant) -> list[str]:
    """An offset a thousand times as large."""
    head, constant = mutant.before.rstrip(";").rsplit(" ", 1)
    return [f"{head} {int(constant) + 1000};"]


def _endless(mutant: Mutant) -> list[str]:
    """The length of a tensor instead of a program's part, far beyond the end."""
    return [f"mov.u64 {_operands(mutant)[0]}, 1099511627776;"]


def _any_number(mutant: Mutant) -> list[str]:
    return [f"mov.b32 {_operands(mutant)[0]}, 3;"]


SHORTCUT = "chooses a shortcut (one value a channel, plain parameters); the general way gives the same result"
REASONS = [
    Reason("wrong stride or displacement", r"ld\.param\.u32\s+%rd?\d+, .*\+(8|12)\]", SHORTCUT, _zero),
    Reason("missing mask", r"_lanes_\w+: @%p\d+ bra", SHORTCUT, source=r"not\.pred"),
    Reason("other comparison", r"setp\.eq\.s(16|32).*, [01];", SHORTCUT, _never),
    # Triton specialises kernels for lengths of 1 or multiples of 16, and for parameters with or without groups.
    Reason("other operator", r"sub\.s32", "leaves out the groups before, and there is one group", _adds_zero, r"mul\.lo\.s32"),
    Reason("other operator", r"add\.s32", "rounds negative numbers, and a length is none", _adds_zero, r"shr\.u32"),
    Reason("other operator", r"min\.s32", "the only program along a dimension ends where that does", _equals),
    Reason("other rounding of an index", r"div\.s32", "where a group is one row, any number of groups before leads there",
           _any_number),
    Reason("other rounding of an index", r"div\.s32", "number of the only program: all channels fit into one", _first,
           r"shr\.s32.*, [0-5];"),
    Reason("index constant off by one", r"add\.s32.*, (15|31|63);", "rounds up what is no multiple of 16", _no_multiple),
    Reason("index constant off by one", r"shr\.u32.*, 31;", "the sign of a length, which is not negative", _not_negative),
    Reason("index constant off by one", r"shr\.s32.*, 31;", "a shift by more bits than there are leaves the sign, as this one"),
    Reason("index constant off by one", r"mul\.hi\.s32", "last place of a reciprocal, of which few are used", _further),
    Reason("other comparison", r"reduce_shared_kernel: setp\.ge\.s32", "a program without a value, and there is none",
           _never_equal),
    Reason("constant a quarter off", r"gate_kernel: setp\.eq\.f32.*0f3F800000", "noise from a seed is an odd number of 2^-24",
           _neither),
    Reason("operands of a selection swapped", r"(gates_backward\w*|gate_kernel): selp\.f64.*, 0d0{16},",
           "an exponential of hundreds, 0 or infinite: a gate that far out has no slope"),
    Reason("operands of a selection swapped", r"reduce_partials_kernel: selp\.b32\s+\S+ 0, \d+,",
           "the halves of a sum change places, and a + b is b + a"),
    Reason("another tensor", r"forward\w*: ld\.param\.u64.*_param_0\+24\]", "a row's first block does all of it", _endless),
    Reason("index constant off by one", r"reduce_partials_kernel: add\.s32.*, 3;", "more blocks a group, and there is one group",
           _further),
    Reason("loop of one turn", r"bra", "the exponential's short way; the general one gives the same",
           source=r"setp\.lt\.f32.*, 0f4086232B;"),
    Reason("missing mask", r"ld\.global", "what the mask leaves out is loaded, and not used", _poisoned),
    Reason("other comparison", r"setp\.\w\w\.(f|bf)\d+", "two floats that are equal only by chance", _never_equal),
    Reason("other comparison", r"setp\.\w\w\.s32\s.*, -1;", "a number of a channel, which is not negative", _never_equal),
    Reason("other comparison", r"setp\.lt\.s(32|64)\s.*, 1;", "whether there are terms: there are two at least", _never_equal),
    Reason("other comparison", r"setp\.l[te]\.[su](32|64)\s.*, %r", "one more turn of a loop, with every lane masked"),
    Reason("constant a quarter off", r"selp.*0[fd](BF800000|BFF0000000000000)", "stands for any limit below 0", _other_constant),
    Reason("constant a quarter off", r"selp.*0[fd](3F800000|3FF0000000000000)", "stands in for a width of 0, and is not used",
           _other_constant),
    Reason("constant a quarter off", r"mov\.f.*0(f3F000000|d3FE0000000000000)", "stands in for noise where none is used",
           _other_constant),
    Reason("constant a quarter off", r"setp\.\w\w\.f(32|64).*0(f0380|d3870)", "any tiny width of a bump counts as none"),
    Reason("constant a quarter off", r"0f7F7FFFFF|0f7EFFFFFF|0d7FE", "a cap, where any huge number would do"),
]  # fmt: skip


def _any_bits(mutant: Mutant) -> list[str]:
    """Arbitrary bits instead of the value from another lane."""
    return [f"mov.b32 {_operands(mutant)[0].split('|')[0]}, 0x5A5A5A5A;"]


# Mutants that change a result by less than its bound; ``stronger`` has to stay within the bounds too.
BELOW_THE_BOUNDS = [
    Reason("wrong partner in a sum", r"reduce_partials_kernel: shfl",
           "the lower half of a double, of which a float32 shows nothing", _any_bits),
]  # fmt: skip


def _source(mutant: Mutant, text: str) -> str:
    """The instruction that computes the last operand of the mutated one, or a branch's guard."""
    before = text.splitlines()[: mutant.line]
    name = _guard(mutant)[0].lstrip("@!") if " bra" in mutant.before else _operands(mutant)[-1]
    made = re.compile(rf"\s*(?:@\S+\s+)?\S+\s+{re.escape(name)},")
    return next((line.strip() for line in reversed(before) if made.match(line)), "")


def reason(mutant: Mutant, text: str, same: Same, reasons: list[Reason] = REASONS) -> str | None:
    """Why a mutant of the kernel ``text`` that changes no bit is equivalent, or None."""
    for found in reasons:
        applies = mutant.operator == found.operator and re.search(found.line, f"{mutant.kernel}: {mutant.before}")
        applies = applies and (not found.source or re.match(found.source, _source(mutant, text)))
        if applies and (found.stronger is None or same(found.stronger(mutant))):
            return found.why
    return None
