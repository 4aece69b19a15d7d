"""python tests/mutation.py [--json FILE]: plants bugs in the compiled kernels and counts how many the tests notice.

A mutant is the PTX of one kernel with one line changed. It is run by the kernel's own launch code, and is caught if the
executor faults or a result leaves the bounds that the tests hold it to. What survives has to be explained: either the change
does nothing that a correct result would show (`EQUIVALENT`), or a test is missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # when run as a program

# ruff: noqa: E402
import test_triton_ctu
import torch
import truth
from conformance import check_against_float64, outputs
from ptx import Fault, Unsupported
from triton_recorder import Recorder, triton_on_cpu

from ctkernels import functional
from ctkernels.testing import Sample

truth.unit = functools.lru_cache(None)(truth.unit)  # forty digits take their time

STEPS = 40_000  # several times what the longest of these launches takes


@dataclass(frozen=True)
class Case:
    """A test, run on a recorder. Between them, the launches have the parts that bugs are planted in, and sizes that leave
    no lane idle and no mask without work."""

    name: str
    sm: int
    test: Callable[[Recorder], None]


def _conformance(make: Callable[[torch.Generator], Sample]) -> Callable[[Recorder], None]:
    def test(recorder: Recorder) -> None:
        sample = make(torch.Generator().manual_seed(0))
        with triton_on_cpu(recorder):
            found = outputs(sample)
        check_against_float64(sample, found)

    return test


def _forty_digits(activation: str) -> Callable[[Recorder], None]:
    def test(recorder: Recorder) -> None:
        with mock.patch.object(test_triton_ctu, "Recorder", return_value=recorder):
            test_triton_ctu.test_against_forty_digits(activation)

    return test


def _data(g: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def _knob(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.05 + 0.9 * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)


def _ctu(
    name: str,
    sm: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    channel_dim: int,
    prologue: bool = False,
    **options: Any,
) -> Case:
    def make(g: torch.Generator) -> Sample:
        count = shape[channel_dim]
        kwargs: dict[str, Any] = {"channel_dim": channel_dim, **options}
        if prologue:
            kwargs |= {"scale": _data(g, torch.float32, count), "shift": _data(g, torch.float32, count)}
            kwargs["residual"] = _data(g, dtype, *shape)
        if options.get("activation") == "prelu":
            kwargs["negative_slope"] = _knob(g, count) * 1.5
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        knobs = _knob(g, count, dtype=wide), _knob(g, count, dtype=wide)
        return Sample(name, functional.ctu, (_data(g, dtype, *shape), *knobs), kwargs)

    return Case(name, sm, _conformance(make))


def _head_edit(name: str, sm: int, dtype: torch.dtype, shape: tuple[int, ...], heads: int, adapters: int = 0) -> Case:
    def make(g: torch.Generator) -> Sample:
        dim = shape[-1] if len(shape) == 4 else shape[-1] // heads
        lead = (adapters,) if adapters else ()
        kwargs: dict[str, Any] = {"head_axis": 1} if len(shape) == 4 else {}
        if adapters:
            kwargs["index"] = torch.randint(adapters, shape[:1], generator=g)
        edits = [_data(g, torch.float32, *lead, heads, dim) for _ in (0, 1)]
        gates = [_knob(g, *lead, heads) for _ in (0, 1)]
        return Sample(name, functional.head_edit, (_data(g, dtype, *shape), *edits, *gates), kwargs)

    return Case(name, sm, _conformance(make))


CASES = [
    Case("ctu, sixteen bits", 90, lambda recorder: test_triton_ctu.check_sixteen_bits(torch.float16, "relu", recorder)),
    Case("ctu, forty digits", 80, _forty_digits("relu")),
    Case("gelu, forty digits", 100, _forty_digits("gelu")),
    # scalar constants, a tree of sums, slots, a finishing launch
    _ctu("ctu, planes", 80, torch.float32, (2, 3, 8500), 1),
    _ctu("ctu, planes, a group each", 90, torch.bfloat16, (3, 2, 1100), 1),
    # constants per lane; several periods side by side
    _ctu("ctu, channels inside", 100, torch.float32, (40, 650), 1),
    _ctu("ctu, few channels inside", 90, torch.bfloat16, (700, 19), 1),
    _ctu("prologue", 90, torch.float32, (70, 130), 1, prologue=True),
    _ctu("prelu", 80, torch.float32, (2, 3, 1100), 1, activation="prelu"),
    _ctu("relu6", 80, torch.float32, (2, 3, 1100), 1, activation="relu6"),
    _ctu("gelu", 90, torch.float16, (2, 3, 1100), 1, activation="gelu"),
    _ctu("ctu, float64", 80, torch.float64, (2, 3, 550), 1),
    _head_edit("heads side by side", 80, torch.float32, (2, 35, 6 * 44), 6),
    _head_edit("tokens between heads", 90, torch.bfloat16, (3, 4, 90, 66), 4),
    _head_edit("an edit for every sample", 100, torch.float32, (3, 70, 4 * 66), 4, adapters=5),
]


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    kernel: str
    operator: str
    line: int
    before: str
    after: str


# ---- what is changed -------------------------------------------------------------------------------------------------

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
    """A floating constant a quarter off, zeros and infinities left alone."""
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
    found = re.search(r"^(\s*(?:mul|mad|add|shl|shr|and|or)\.\S+ .*, )(-?\d+);", line)
    return f"{found[1]}{int(found[2]) + 1};{line[found.end() :]}" if found else None


def _displacement(line: str) -> str | None:
    """An access one element further."""
    found = re.search(r"\[ ?(%rd?\d+) ?\+ ?(\d+) ?\]", line)
    return line[: found.start()] + f"[{found[1]}+{int(found[2]) + 4}]" + line[found.end() :] if found else None


def _mask(line: str) -> str | None:
    found = re.match(r"\s*@!?%p\d+ (?=ld|st)", line)
    return line[found.end() :] if found else None


def _barrier(line: str) -> str | None:
    return "" if re.match(r"\s*(bar|barrier)\.", line) else None


def _shuffle(line: str) -> str | None:
    """A step of a tree of sums that takes the wrong partner."""
    found = re.search(r"(shfl\.sync\.\S+ .*, )(\d+)(, \d+, -1;)", line)
    return f"{line[: found.start()]}{found[1]}{int(found[2]) // 2}{found[3]}" if found else None


def _pointer(line: str) -> str | None:
    """The tensor before or after: another operand, the wrong residual."""
    found = re.search(r"(ld\.param\.[bu]64 .*_param_)(\d+)\]", line)
    return (
        f"{line[: found.start()]}{found[1]}{int(found[2]) + 1 if int(found[2]) == 0 else int(found[2]) - 1}];"
        if found
        else None
    )


def _select(line: str) -> str | None:
    found = re.search(r"(selp\.\S+ \S+ )(\S+), (\S+), (%p\d+;)", line)
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
    for number, line in enumerate(text.splitlines()):
        if re.match(r"\s*[.@/{}$]|^\S", line) and not re.match(r"\s*@!?%p\d+ ", line):
            continue
        for name, change in OPERATORS.items():
            after = change(line)
            if after is not None and after != line:
                yield Mutant(kernel, name, number, line.strip(), after.strip())


def _planted(text: str, mutant: Mutant) -> str:
    lines = text.splitlines()
    lines[mutant.line] = mutant.after
    return "\n".join(lines) + "\n"


# ---- whether it is noticed -------------------------------------------------------------------------------------------


def kernels(case: Case) -> dict[str, str]:
    """The PTX of the case's launches, by the kernel's name."""
    recorder = Recorder(case.sm)
    case.test(recorder)
    return {name: found.asm["ptx"] for name, _, _, found in recorder.launches}


def caught_by(case: Case, text: str, mutant: Mutant) -> str | None:
    """What noticed the mutant, or None."""
    changed = _planted(text, mutant)
    try:
        case.test(Recorder(case.sm, rewrite=lambda ptx: changed if ptx == text else ptx, max_steps=STEPS))
    except Fault as fault:
        return f"executor: {fault.kind}"
    except AssertionError as error:
        return "unwritten output" if "unwritten" in str(error) else "result"
    return None


# Changes that a correct result need not show, by operator and line.
EQUIVALENT = [
    (
        "missing mask",
        r"ld\.global",
        "a masked lane that reads inside the tensor all the same, and whose value is not stored",
    ),
    ("constant a quarter off", r"selp.*0fBF800000", "a limit of -1 stands for any below zero"),
    ("constant a quarter off", r"setp\.gt\.f(32|64).*0(f0380|d3870)", "any tiny width of a bump counts as none"),
    ("other comparison", r"setp\.[gl][te]\.f(32|64)", "two floats that are equal only by chance"),
    ("constant a quarter off", r"0f7F7FFFFF|0f7EFFFFFF", "a cap where any huge number would do"),
]


def explanation(mutant: Mutant) -> str | None:
    """Why a survivor is no missing test, or None."""
    return next(
        (why for operator, line, why in EQUIVALENT if mutant.operator == operator and re.search(line, mutant.before)),
        None,
    )


# The bugs that are made when kernels are written, rather than when their formulas are.
STRUCTURAL = (
    "dropped barrier",
    "missing mask",
    "wrong stride or displacement",
    "wrong partner in a sum",
    "another tensor",
    "other rounding of an index",
)


def run(
    per_kernel: int,
    cases: list[Case] = CASES,
    operators: Collection[str] = tuple(OPERATORS),
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, object]]:
    """``per_kernel`` mutants of every kernel, evenly spread over the operators; a record for each."""
    records: list[dict[str, object]] = []
    for case in cases:
        for kernel, text in kernels(case).items():
            every = sorted(
                (m for m in mutants(kernel, text) if m.operator in operators),
                key=lambda m: (list(OPERATORS).index(m.operator), m.line),
            )
            for mutant in every[:: max(1, len(every) // per_kernel)][: per_kernel + 1]:
                try:
                    by = caught_by(case, text, mutant)
                except (Unsupported, LookupError) as error:
                    log(f"not a program: {mutant}: {error}")
                    continue
                why = None if by else explanation(mutant)
                records.append(
                    {
                        "case": f"{case.name}, sm_{case.sm}",
                        **asdict(mutant),
                        "caught_by": by,
                        "equivalent": why,
                    }
                )
                if by is None:
                    log(
                        f"survived: {case.name}: {mutant.kernel}: {mutant.operator}: {mutant.before} -> {mutant.after} ({why})"
                    )
    return records


def summary(records: list[dict[str, object]]) -> dict[str, object]:
    """Counts, and the share caught of the mutants that are not equivalent."""
    caught = [r for r in records if r["caught_by"]]
    equivalent = [r for r in records if r["equivalent"]]
    return {
        "mutants": len(records),
        "caught": len(caught),
        "equivalent": len(equivalent),
        "share": len(caught) / max(1, len(records) - len(equivalent)),
        "share_of_all": len(caught) / max(1, len(records)),
        "caught_by": dict(Counter(str(r["caught_by"]) for r in caught)),
        "by_operator": {
            name: [
                sum(bool(r["caught_by"]) for r in records if r["operator"] == name),
                sum(r["operator"] == name for r in records),
            ]
            for name in OPERATORS
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutation.py", description=__doc__)
    parser.add_argument("--per-kernel", type=int, default=10_000, help="mutants of each kernel (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records and the summary there")
    args = parser.parse_args(argv)
    torch.use_deterministic_algorithms(True)  # and with it, uninitialised memory is filled with NaN
    records = run(args.per_kernel, [c for c in CASES if args.only in c.name], log=lambda line: print(line, flush=True))
    found = summary(records)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"summary": found, "mutants": records}, indent=1) + "\n")
    return 0 if found["share"] >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
