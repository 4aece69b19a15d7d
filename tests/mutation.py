"""python tests/mutation.py [--json FILE]: plants bugs in the compiled kernels and counts how many the tests notice.

A mutant is the PTX of one kernel with one line changed. It is run by the kernel's own launch code on a conformance sample,
and is caught if the executor faults or a result leaves the sample's bounds. What survives has to be explained: either the
change does nothing that a correct result would show (`EQUIVALENT`), or a test is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from conformance import check_against_float64, outputs, sample_named
from ptx import Fault, Unsupported
from triton_recorder import Recorder, triton_on_cpu

STEPS = 40_000  # several times what the longest of these launches takes


@dataclass(frozen=True)
class Case:
    """A sample whose launches between them have the parts that bugs are planted in."""

    sample: str
    dtype: torch.dtype
    sm: int


CASES = [
    Case("NCHW, long runs", torch.float32, 80),  # scalar constants, a tree of sums, slots, a finishing launch
    Case("NLC, odd channels", torch.float32, 90),  # several periods side by side
    Case("NLC, more channels than a block", torch.bfloat16, 90),  # constants per lane
    Case("prologue, inner channels", torch.float32, 100),
    Case("relu6", torch.float32, 80),
    Case("gelu", torch.float16, 90),
    Case("learned slopes, some above 1", torch.float32, 80),
    Case("logits", torch.float64, 80),
    Case("head edit (B, T, H D)", torch.bfloat16, 100),
    Case("head edit (B, H, T, D)", torch.float32, 80),
    Case("head edit per sample", torch.float64, 90),
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
            word = struct.pack(f">{code}", value * 1.25).hex().upper()
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
    with triton_on_cpu(Recorder(case.sm)) as recorder:
        check_against_float64(sample_named(case.sample, case.dtype), outputs(sample_named(case.sample, case.dtype)))
    return {name: found.asm["ptx"] for name, _, _, found in recorder.launches}


def caught_by(case: Case, text: str, mutant: Mutant) -> str | None:
    """What noticed the mutant, or None."""
    changed, sample = _planted(text, mutant), sample_named(case.sample, case.dtype)
    recorder = Recorder(case.sm, rewrite=lambda ptx: changed if ptx == text else ptx, max_steps=STEPS)
    try:
        with triton_on_cpu(recorder):
            found = outputs(sample)
        check_against_float64(sample, found)
    except Fault as fault:
        return f"executor: {fault.kind}"
    except AssertionError as error:
        return "unwritten output" if "unwritten" in str(error) else "result"
    return None


# Changes that a correct result need not show, by operator and line.
EQUIVALENT: list[tuple[str, str, str]] = []


def explanation(mutant: Mutant) -> str | None:
    """Why a survivor is no missing test, or None."""
    return next(
        (why for operator, line, why in EQUIVALENT if mutant.operator == operator and re.search(line, mutant.before)),
        None,
    )


def run(
    per_kernel: int, cases: list[Case] = CASES, log: Callable[[str], None] = lambda line: None
) -> list[dict[str, object]]:
    """``per_kernel`` mutants of every kernel, evenly spread over the operators; a record for each."""
    records: list[dict[str, object]] = []
    for case in cases:
        for kernel, text in kernels(case).items():
            every = sorted(mutants(kernel, text), key=lambda m: (list(OPERATORS).index(m.operator), m.line))
            for mutant in every[:: max(1, len(every) // per_kernel)][: per_kernel + 1]:
                try:
                    by = caught_by(case, text, mutant)
                except (Unsupported, LookupError) as error:
                    log(f"not a program: {mutant}: {error}")
                    continue
                why = None if by else explanation(mutant)
                records.append(
                    {
                        "case": f"{case.sample} {case.dtype} sm_{case.sm}",
                        **asdict(mutant),
                        "caught_by": by,
                        "equivalent": why,
                    }
                )
                if by is None:
                    log(
                        f"survived: {case.sample}: {mutant.kernel}: {mutant.operator}: {mutant.before} -> {mutant.after} ({why})"
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
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose sample contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records and the summary there")
    args = parser.parse_args(argv)
    torch.use_deterministic_algorithms(True)  # and with it, uninitialised memory is filled with NaN
    records = run(args.per_kernel, [c for c in CASES if args.only in c.sample], lambda line: print(line, flush=True))
    found = summary(records)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"summary": found, "mutants": records}, indent=1) + "\n")
    return 0 if found["share"] >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
