"""python tests/mutation.py [--json FILE]: plants bugs in the compiled kernels and counts how many the tests notice.

A mutant is the PTX of one kernel, by Triton or by nvcc, with one line changed that the calls of `mutation_cases` reach. It is
run by the kernel's own launch code, and is caught if the executor faults or a result leaves the bounds that the tests hold
it to. A mutant is equivalent, and does not count, if ptxas makes the same machine code of it, or if all its results have the
same bits and there is a reason why they must, itself checked (`equivalence`). Any other survivor counts against the tests; it
is said how far it moves the results. A full run takes hours; ``--each`` plants that many of every kind in every kernel.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # when run as a program

# ruff: noqa: E402
import equivalence
import ptx.launch
import torch
from conformance import Expected
from mutants import OPERATORS, Mutant, mutants
from mutation_cases import CASES, Case
from ptx import Fault, Unsupported, parse
from ptx.runner import LANES
from ptx.toolchain import nvcc
from torch import Tensor

# The bugs that are made when kernels are written, rather than when their formulas are.
STRUCTURAL = (
    "dropped barrier",
    "missing mask",
    "loop of one turn",
    "wrong stride or displacement",
    "index constant off by one",
    "wrong partner in a sum",
    "another tensor",
    "other rounding of an index",
)

# Of survivors that change no bit of any result in any call, and are not known to be equivalent.
UNSEEN = (
    "no call shows it: with one group, or lengths that a vector divides, the terms or bounds it changes do not matter"
)


class _Trace(list):
    """A program's code that remembers what was read of it."""

    def __init__(self, code: list, reached: set[str]):
        super().__init__(code)
        self.reached = reached

    def __getitem__(self, at: int) -> object:
        op = super().__getitem__(at)
        self.reached.add(_plain(op.text))
        return op


def _plain(line: str) -> str:
    """An instruction, without its guard and spaces."""
    return re.sub(r"^@!?%p\d+|\s", "", line.strip()).rstrip(";")


class Subject:
    """A kernel, all calls that launch it, and what its results have to be."""

    def __init__(self, case: Case, text: str):
        self.case, self.text = case, text
        (self.name,) = parse(text).entries
        self.limit = 0

    def caught_by(self, changed: str) -> str | None:
        """What notices that the kernel is changed, or None."""
        try:
            for variant in self.case.variants:
                _expected(self.case, variant).check(self.run(variant, changed))
        except Fault as fault:
            return f"executor: {fault.kind}"
        except AssertionError as error:
            return "unwritten output" if "unwritten" in str(error) else "result"
        return None

    def run(self, variant: str, changed: str) -> dict[str, Tensor]:
        return self.case.run(variant, lambda text: changed if text == self.text else text, max_steps=self.limit)

    def moved(self, changed: str) -> float | None:
        """The largest change of a result, in units of what its bound allows; None if every bit is the same."""
        most = None
        for variant in self.case.variants:
            expected, after = _expected(self.case, variant), self.run(variant, changed)
            for key, value in _unchanged(self.case, variant).items():
                if not torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)):
                    change = (after[key].double() - value.double()).abs() / expected.bound(key)
                    most = max(most or 0.0, change.nan_to_num().max().item())
        return most


@lru_cache(maxsize=4)
def _expected(case: Case, variant: str) -> Expected:
    return case.expected(variant)


@lru_cache(maxsize=4)
def _unchanged(case: Case, variant: str) -> dict[str, Tensor]:
    return case.run(variant)


def subjects(case: Case) -> Iterator[tuple[Subject, set[str]]]:
    """The kernels that a case launches, with the instructions that are reached."""
    found: dict[str, set[str]] = {}
    steps: list[int] = []
    load, run = ptx.launch._program, ptx.launch.Run

    def traced(launch: ptx.launch.Launch, storages: dict) -> object:
        program = load(launch, storages)
        program.code = _Trace(list(program.code), found.setdefault(launch.ptx, set()))
        return program

    class Counted(run):
        def execute(self) -> ptx.launch.Run:
            super().execute()
            batches = -(-self.grid_blocks // max(1, LANES // self.lanes_per_block))
            steps.append(self.steps // batches)
            return self

    with mock.patch.object(ptx.launch, "_program", traced), mock.patch.object(ptx.launch, "Run", Counted):
        for variant in case.variants:
            _expected(case, variant).check(case.run(variant))
    ptx.launch._PROGRAMS.clear()
    for text, reached in found.items():
        subject = Subject(case, text)
        subject.limit = 3 * max(steps)  # in a batch of blocks; more is an endless loop
        yield subject, reached


@lru_cache(maxsize=8)
def _machine_code(text: str) -> bytes | None:
    """What ptxas makes of it; None where it is no program, or there is no ptxas."""
    compiler = nvcc()
    ptxas = shutil.which("ptxas", path=str(Path(compiler).parent)) if compiler else None
    if ptxas is None:
        return None
    target = re.search(r"^\.target (\w+)", text, re.M)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        # without the lines that say where in the source an instruction comes from
        source.write_text(re.sub(r"^\s*\.loc.*$", "", text.split(".section")[0].replace(", debug", ""), flags=re.M))
        command = [ptxas, f"-arch={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True)
        return (Path(folder) / "kernel.cubin").read_bytes() if done.returncode == 0 else None


def explain(subject: Subject, mutant: Mutant, changed: str) -> tuple[bool, str] | None:
    """Of a survivor: whether it is equivalent, and why, or what it does. None for a branch that no call takes: there is no bug
    in leaving it out."""

    def same(lines: list[str]) -> bool:
        text = subject.text.splitlines()
        text[mutant.line : mutant.line + 1] = lines
        try:
            return subject.moved("\n".join(text) + "\n") is None
        except (Fault, AssertionError, Unsupported):
            return False

    if not mutant.after and "bra" in mutant.before and same(equivalence.never_taken(mutant)):
        return None
    code = _machine_code(changed)
    if code is not None and code == _machine_code(subject.text):
        return True, "ptxas makes the same machine code of it"
    moved = subject.moved(changed)
    if moved is not None:
        return False, f"stays within the bounds: moves a result by {moved:.2g} of what is allowed"
    why = equivalence.reason(mutant, same)
    return why is not None, why or UNSEEN


def chosen(subject: Subject, reached: set[str], each: int, operators: Collection[str]) -> Iterator[Mutant]:
    """Up to ``each`` mutants of every kind, evenly spread over the kernel."""
    for operator in operators:
        found = [
            m for m in mutants(subject.name, subject.text) if m.operator == operator and _plain(m.before) in reached
        ]
        count = min(each, len(found))
        yield from (found[at * len(found) // count] for at in range(count))


def run(
    each: int,
    cases: list[Case] = CASES,
    operators: Collection[str] = tuple(OPERATORS),
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, object]]:
    """``each`` mutants of every kind of every kernel of the cases; a record for each."""
    records: list[dict[str, object]] = []
    for case in cases:
        for subject, reached in list(subjects(case)):
            for mutant in chosen(subject, reached, each, operators):
                changed = mutant.planted(subject.text)
                try:
                    by = subject.caught_by(changed)
                except (Unsupported, LookupError) as error:
                    log(f"not a program: {mutant}: {error}")
                    continue
                explained = (False, None) if by else explain(subject, mutant, changed)
                if explained is None:
                    continue
                equivalent, why = explained
                record = {"case": f"{case.name}, sm_{case.sm}", **asdict(mutant), "caught_by": by}
                records.append(record | {"equivalent": equivalent, "survives": why})
                if by is None:
                    log(f"survived: {case.name}: {subject.name}: {mutant.operator}: {mutant.before} -> {mutant.after}: "
                        f"{'equivalent: ' * equivalent}{why}")  # fmt: skip
    return records


def summary(records: list[dict[str, object]]) -> dict[str, object]:
    """Counts, and the share caught of the mutants that are not equivalent."""

    def counts(chosen: list[dict[str, object]]) -> dict[str, object]:
        caught, equivalent = (sum(bool(r[key]) for r in chosen) for key in ("caught_by", "equivalent"))
        share = caught / max(1, len(chosen) - equivalent)
        return {"mutants": len(chosen), "caught": caught, "equivalent": equivalent, "share": round(share, 4)}

    return {
        **counts(records),
        "structural": counts([r for r in records if r["operator"] in STRUCTURAL]),
        "survivors": dict(
            Counter(re.sub(r"[\d.e+-]+ of", "part of", str(r["survives"])) for r in records if r["survives"])
        ),
        "caught_by": dict(Counter(str(r["caught_by"]) for r in records if r["caught_by"])),
        "by_toolchain": {t: counts([r for r in records if str(r["case"]).startswith(t)]) for t in ("triton", "cuda")},
        "by_operator": {name: counts([r for r in records if r["operator"] == name]) for name in OPERATORS},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutation.py", description=__doc__)
    parser.add_argument("--each", type=int, default=10_000, help="mutants of each kind of each kernel (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records and the summary there")
    args = parser.parse_args(argv)
    torch.use_deterministic_algorithms(True)  # and with it, uninitialised memory is filled with NaN
    cases = [c for c in CASES if args.only in c.name]
    records = run(args.each, cases, log=lambda line: print(line, flush=True))
    found = summary(records)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"summary": found, "mutants": records}, indent=1) + "\n")
    return 0 if found["share"] >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
