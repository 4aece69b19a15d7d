"""python -m mutation [--json FILE] [--summary FILE]: mutate the compiled kernels and count the detected mutants.

A mutant is the PTX of one kernel, from Triton or nvcc, with one changed line that the calls of `cases` reach. It runs with
the kernel's own launch code, and is detected if the executor faults or a result violates the bounds of the tests. A mutant is
equivalent, and does not count, if ptxas generates the same machine code, or if all its results have the same bits for a
reason that is itself checked (`equivalence`). All other survivors count against the tests; the report has their effect on the
results. A full run takes hours; ``--each`` limits the number of mutants of each kind in each kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import ptx.launch
import torch
from conformance import Expected
from ptx import Fault, Unsupported, parse
from ptx.runner import LANES
from ptx.toolchain import nvcc
from torch import Tensor

from ctkernels._files import write_text

from . import equivalence
from .cases import CASES, Case
from .mutants import OPERATORS, Mutant, mutants
from .summary import Record, counts, summary

# For survivors that change no bit of any result in any call, and are not known to be equivalent.
UNSEEN = "no call shows it, and no reason is known why none could"


class _Trace(list):
    """A program's code that records which instructions were read."""

    def __init__(self, code: list, reached: set[str]):
        super().__init__(code)
        self.reached = reached

    def __getitem__(self, at: int) -> object:
        op = super().__getitem__(at)
        self.reached.add(_plain(op.text))
        return op


def _plain(line: str) -> str:
    """An instruction without its guard and spaces."""
    return re.sub(r"^@!?%p\d+|\s", "", line.strip()).rstrip(";")


@dataclass(frozen=True)
class Call:
    """A call of a case. ``limit``: number of steps of a batch of blocks, beyond which it counts as an endless loop."""

    case: Case
    variant: str
    limit: int

    def __str__(self) -> str:
        return f"{self.case.name}, {self.variant}"


@lru_cache(maxsize=64)
def _results(call: Call, text: str, changed: str) -> dict[str, Tensor]:
    """The results of a call, with ``changed`` in place of the kernel ``text``."""
    return call.case.run(call.variant, lambda t: changed if t == text else t, max_steps=call.limit)


class Subject:
    """A kernel, all calls that launch it, and their expected results."""

    def __init__(self, case: Case, text: str, calls: list[Call]):
        self.case, self.text, self.own = case, text, calls
        (self.name,) = parse(text).entries

    @cached_property
    def others(self) -> list[Call]:
        """Other calls that launch the kernel: of the case with other sizes, and of other cases for the same target."""
        found = []
        for other in CASES if self.case.toolchain == "cuda" else [self.case]:  # Triton compiles for a case's constants
            if (other.toolchain, other.op, other.sm) == (self.case.toolchain, self.case.op, self.case.sm):
                for variant in (*other.variants, *other.more):
                    mine = other is self.case and variant in other.variants
                    if not mine and variant != "edges" and self.text in _launched(other, variant):
                        found.append(Call(other, variant, _traced(other, variant).limit))
        return found

    def calls(self) -> Iterator[Call]:
        yield from self.own
        yield from self.others

    def caught_by(self, changed: str) -> tuple[str, str] | None:
        """How the changed kernel is detected, and in which call; None if it is not."""
        for call in self.calls():
            try:
                _expected(call.case, call.variant).check(_results(call, self.text, changed))
            except Fault as fault:
                return f"executor: {fault.kind}", str(call)
            except AssertionError as error:
                return "unwritten output" if "unwritten" in str(error) else "result", str(call)
        return None

    def moved(self, changed: str) -> float | None:
        """The largest change of a result, in units of its bound; None if all bits are the same."""
        most = None
        for call in self.calls():
            expected, after = _expected(call.case, call.variant), _results(call, self.text, changed)
            for key, value in _traced(call.case, call.variant).results.items():
                if not torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)):
                    change = (after[key].double() - value.double()).abs() / expected.bound(key)
                    most = max(most or 0.0, change.nan_to_num().max().item())
        return most


@lru_cache(maxsize=64)
def _expected(case: Case, variant: str) -> Expected:
    return case.expected(variant)


@cache
def _launched(case: Case, variant: str) -> frozenset[str]:
    """The kernels that a call launches, without executing them."""
    found: set[str] = set()

    def noted(launch: ptx.launch.Launch, storages: dict) -> None:
        found.add(launch.ptx)

    with (
        mock.patch.object(ptx.launch, "_program", noted),
        mock.patch.object(ptx.launch, "Run"),
        mock.patch.object(ptx.Memory, "written"),
    ):
        case.run(variant)
    return frozenset(found)


class Trace(NamedTuple):
    """The trace of a call: the instructions reached in each kernel, a step limit, and the results."""

    reached: dict[str, set[str]]
    limit: int
    results: dict[str, Tensor]


@cache
def _traced(case: Case, variant: str) -> Trace:
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
        results = case.run(variant)
    _expected(case, variant).check(results)
    ptx.launch._PROGRAMS.clear()
    return Trace(found, 3 * max(steps), results)


def subjects(case: Case) -> Iterator[tuple[Subject, set[str]]]:
    """The kernels that a case launches, with the reached instructions."""
    traces = {variant: _traced(case, variant) for variant in case.variants}
    limit = max(trace.limit for trace in traces.values())
    for text in dict.fromkeys(text for trace in traces.values() for text in trace.reached):
        launching = [variant for variant, trace in traces.items() if text in trace.reached]
        reached = set().union(*(traces[variant].reached[text] for variant in launching))
        yield Subject(case, text, [Call(case, variant, limit) for variant in launching]), reached


def _code(text: str) -> str:
    """PTX without source locations."""
    return re.sub(r"^\s*\.(loc|file)\b.*$", "", text.split(".section")[0].replace(", debug", ""), flags=re.M)


@lru_cache(maxsize=8)
def _machine_code(text: str) -> bytes | None:
    """The machine code from ptxas; None if the PTX is invalid or there is no ptxas."""
    compiler = nvcc()
    ptxas = shutil.which("ptxas", path=str(Path(compiler).parent)) if compiler else None
    if ptxas is None:
        return None
    target = re.search(r"^\.target (\w+)", text, re.M)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(_code(text))
        command = [ptxas, f"-arch={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True)
        return (Path(folder) / "kernel.cubin").read_bytes() if done.returncode == 0 else None


def explain(subject: Subject, mutant: Mutant, changed: str) -> tuple[bool, str] | None:
    """Whether a survivor is equivalent, with the reason, or its effect. None for a branch that no call takes, since removing it
    is not a bug."""

    def with_lines(lines: list[str]) -> str:
        text = subject.text.splitlines()
        text[mutant.line : mutant.line + 1] = lines
        return "\n".join(text) + "\n"

    def same(lines: list[str]) -> bool:
        try:
            return subject.moved(with_lines(lines)) is None
        except (Fault, AssertionError, Unsupported):
            return False

    def within(lines: list[str]) -> bool:
        try:
            return subject.caught_by(with_lines(lines)) is None
        except (Unsupported, LookupError):
            return False

    if not mutant.after and "bra" in mutant.before and same(equivalence.never_taken(mutant)):
        return None
    code = _machine_code(changed)
    if code is not None and code == _machine_code(subject.text):
        return True, "ptxas makes the same machine code of it"
    moved = subject.moved(changed)
    if moved is not None:
        why = equivalence.reason(mutant, subject.text, within, equivalence.BELOW_THE_BOUNDS)
        if why is not None:
            return True, why
        return False, f"stays within the bounds: moves a result by {moved:.2g} of what is allowed"
    why = equivalence.reason(mutant, subject.text, same)
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
    cases: Collection[Case] = CASES,
    operators: Collection[str] = tuple(OPERATORS),
    log: Callable[[str], None] = lambda line: None,
    known: Collection[Record] = (),
) -> list[Record]:
    """Run ``each`` mutants of every kind of every kernel of the cases; return a record for each. Mutants of the same PTX that
    are detected or equivalent in the ``known`` records are not run again."""
    settled = {_key(r): r for r in known if r["caught_by"] or r["equivalent"]}
    records: list[Record] = []
    for case in cases:
        for subject, reached in list(subjects(case)):
            for mutant in chosen(subject, reached, each, operators):
                digest = hashlib.sha256(_code(subject.text).encode()).hexdigest()[:16]
                record = {"case": _label(case), "ptx": digest, **asdict(mutant)}
                if _key(record) in settled:
                    records.append(settled[_key(record)])
                    continue
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
                how, where = by or (None, None)
                record |= {"caught_by": how, "in": where, "equivalent": equivalent, "survives": why}
                records.append(record)
                if by is None:
                    log(f"survived: {case.name}: {subject.name}: {mutant.operator}: {mutant.before} -> {mutant.after}: "
                        f"{'equivalent: ' * equivalent}{why}")  # fmt: skip
    return records


def _label(case: Case) -> str:
    return f"{case.name}, sm_{case.sm}"


def _key(record: Record) -> tuple[object, ...]:
    return tuple(record[name] for name in ("case", "ptx", "operator", "line", "after"))


def _run_one(number: int, each: int, known: Collection[Record]) -> tuple[list[Record], list[str]]:
    """The records and log lines of a case of :data:`CASES`; runs in its own process."""
    torch.use_deterministic_algorithms(True)  # and with it, uninitialised memory is filled with NaN
    torch.set_num_threads(1)
    lines: list[str] = []
    start = time.monotonic()
    records = run(each, [CASES[number]], log=lines.append, known=known)
    found = counts(records)
    lines.append(f"{CASES[number].name}: {found['caught']} caught and {found['equivalent']} equivalent "
                 f"of {found['planted']}, in {time.monotonic() - start:.0f} s")  # fmt: skip
    return records, lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("--each", type=int, default=10_000, help="mutants of each kind of each kernel (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of every mutant there")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write counts and survivors there")
    parser.add_argument("--jobs", type=int, default=1, help="cases to work on at a time (default: 1)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="what FILE says was caught, or is equivalent, in the same PTX, is not tried again",
    )
    args = parser.parse_args(argv)
    if args.resume and not args.json:
        parser.error("--resume needs --json FILE")
    known = json.loads(args.json.read_text())["mutants"] if args.resume and args.json.exists() else []
    labels = [_label(case) for case in CASES]
    found: dict[str, list[Record]] = {label: [r for r in known if r["case"] == label] for label in labels}
    records = [r for label in labels for r in found[label]]
    # one process per case, which frees its memory at the end
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {
            pool.submit(_run_one, number, args.each, found[labels[number]]): labels[number]
            for number, case in enumerate(CASES)
            if args.only in case.name
        }
        for done in as_completed(running):
            found[running[done]], lines = done.result()
            print(*lines, sep="\n", flush=True)
            records = [r for label in labels for r in found[label]]
            if args.json:  # after every case, to resume an interrupted run
                write_text(args.json, json.dumps({"mutants": records}, indent=1) + "\n")
    total = summary(records, labels)
    text = json.dumps({"command": " ".join(["python -m mutation", *(argv or sys.argv[1:])]), **total}, indent=1)
    print(text)
    if args.summary:
        write_text(args.summary, text + "\n")
    return 0 if counts(records)["share"] >= 0.95 else 1
