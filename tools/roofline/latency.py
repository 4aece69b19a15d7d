"""Predicted times of whole calls from launches, waves, latency, issue and memory traffic: ``python -m roofline.latency``.

``python -m roofline`` predicts a kernel's loop with hidden latency. On an H100, calls took 1.2 to 5 times that, because latency
was not hidden: too few bytes in flight, nearly empty last waves, successive launches. This model includes them:

    call   = sum over its launches of: launch + setup + sum over waves of (steps x step)
    step   = (own^p + issue^p + memory^p)^(1/p)

own: a warp's round trip to memory and its dependent instructions; issue: the time of all warps of an SM to issue instructions,
or of its MUFU; memory: the traffic of all SMs at the reached bandwidth. A reduction has latencies and the levels of its tree.

The launches come from the host code and the instructions from the compiler (:mod:`.calls`), so predictions follow changes of
either. The constants are fitted to ``benchmarks/results/h100.json``, with the launches and machine code of the measured revision
(``h100_launches.json``). Where the model and a measurement disagree, the measurement is right.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ctkernels._files import write_text

from .calls import PASSES, UNROLLED, Call, Code, Launch, codes, launches, measured
from .gpus import GPUS

FOLDER = Path(__file__).parent
FITTED, LAUNCHES = (FOLDER / f"{name}.json" for name in ("latency_h100", "h100_launches"))
BUDGETS = {"cuda": FOLDER / "budgets_calls.json", "triton": FOLDER / "budgets_calls_triton.json"}
# Of every architecture since sm_80, per SM: registers, warps and blocks that fit; schedulers; lanes of MUFU.
REGISTERS, WARPS, BLOCKS, SCHEDULERS, MUFU = 65536, 64, 32, 4, 16
SHUFFLE = 60  # clocks per level: two halves of a double, and the addition


@dataclass(frozen=True)
class Constants:
    """The fitted constants.

    bandwidth: memory bandwidth in GB/s.
    latency: ns from a load to its use, on a busy GPU.
    launch: us from one launch to the next in a CUDA graph, including an empty kernel.
    setup, setup_edit: latencies before a block's first step, of a unit and of a head edit.
    once: executions of an instruction before the loop.
    flow: fraction of the waves without waiting, since a block starts when another ends.
    issue: scheduler cycles per instruction.
    alone: clocks between instructions of a warp without other warps.
    blend: p.
    barrier: ns per level of a tree with barriers.
    reduce: us of a reduction in addition to its terms and tree.
    finish: us to compute a unit's gradients from sums, with logits.
    table: us of the kernel that computes a unit's constants from logits.
    """

    bandwidth: float = 2950.0
    latency: float = 700.0
    launch: float = 1.2
    setup: float = 2.0
    setup_edit: float = 3.0
    once: float = 0.5
    flow: float = 0.5
    issue: float = 1.1
    alone: float = 1.5
    blend: float = 3.0
    barrier: float = 60.0
    reduce: float = 1.0
    finish: float = 1.0
    table: float = 0.8


LEAST = Constants(2800, 300, 0.5, 0.3, 0.3, 0.05, 0.01, 1, 0.5, 1.2, 10, 0.05, 0.1, 0.1)
LIMITS = Constants(3200, 1200, 2.5, 6, 8, 3, 1, 1.6, 8, 12, 600, 15, 8, 3)


@dataclass(frozen=True)
class Machine:
    """A GPU, and the constants of the model."""

    sms: int
    ghz: float
    constants: Constants

    @staticmethod
    def of(sm: int, constants: Constants) -> Machine:
        """The constants for a GPU: those fitted on the H100, with bandwidth scaled by the data sheets, and the same latency and
        launch times."""
        gpu, fitted = GPUS[sm], GPUS[90]
        scaled = replace(constants, bandwidth=constants.bandwidth * gpu.gigabytes / fitted.gigabytes)
        return Machine(gpu.sms, gpu.ghz, scaled)


def resident(launch: Launch, code: Code) -> int:
    """Resident blocks per SM; registers are allocated in units of 256 per warp."""
    warps = launch.threads // 32 or 1
    per_warp = -(-code.registers * 32 // 256) * 256
    return max(1, min(BLOCKS, WARPS // warps, REGISTERS // (per_warp * warps)))


def waves(launch: Launch, code: Code, machine: Machine) -> float:
    return launch.blocks / (resident(launch, code) * machine.sms)


def in_flight(launch: Launch, code: Code, machine: Machine) -> float:
    """Bytes in flight per SM if every thread waits for a step's loads."""
    blocks = min(resident(launch, code), -(-launch.blocks // machine.sms))
    return blocks * launch.threads * launch.asked * launch.used


def over_tensor_us(launch: Launch, code: Code, machine: Machine, op: str) -> float:
    """Microseconds of a kernel over the tensor, without the launch."""
    c, clock = machine.constants, 1e-3 / machine.ghz
    latency, warps, slots = 1e-3 * c.latency, max(launch.threads // 32, 1), resident(launch, code) * machine.sms
    alone = code.instructions * c.alone * clock
    own = max(latency, alone) if launch.ahead else latency + alone
    first = c.setup_edit if op == "head_edit" else c.setup

    def wave(blocks: int) -> tuple[float, float]:
        """Times of the setup and of the steps."""
        busy = -(-blocks // machine.sms) * warps  # warps of the fullest SM
        issue = busy * c.issue * max(code.instructions / SCHEDULERS, code.mufu * 32 / MUFU) * clock
        memory = blocks * launch.threads * launch.moved / (1e3 * c.bandwidth)
        step = sum(v**c.blend for v in (own, launch.used * issue, launch.used * memory)) ** (1 / c.blend)
        setup = first * latency + c.once * code.before * max(busy / SCHEDULERS, c.alone) * clock
        return setup, launch.steps * step

    if launch.blocks <= slots:
        return sum(wave(launch.blocks))
    whole, rest = divmod(launch.blocks, slots)
    setup, steps = wave(slots)
    in_waves = whole * (setup + steps) + (sum(wave(rest)) if rest else 0.0)
    return (1 - c.flow) * in_waves + c.flow * (setup + steps * launch.blocks / slots)


def reduction_us(launch: Launch, code: Code, machine: Machine) -> float:
    """Microseconds of a reduction kernel."""
    c, clock = machine.constants, 1e-3 / machine.ghz
    busy = -(-launch.blocks // machine.sms) * max(launch.threads // 32, 1)
    instructions = launch.steps * code.instructions * max(busy / SCHEDULERS, c.alone) * clock
    rounds = -(-launch.steps // UNROLLED)
    tree = launch.barriers * c.barrier + launch.shuffles * SHUFFLE / machine.ghz
    return c.reduce + rounds * 1e-3 * c.latency + instructions + 1e-3 * tree


def launch_us(launch: Launch, code: Code, machine: Machine, op: str) -> float:
    """Microseconds of one launch, in a CUDA graph."""
    c = machine.constants
    if launch.role == "precompute":
        return c.launch + c.table
    reduces = launch.role.startswith("reduce")
    time = reduction_us(launch, code, machine) if reduces else over_tensor_us(launch, code, machine, op)
    return c.launch + time + (c.finish if launch.finishes and op != "head_edit" else 0.0)


def call_us(found: Sequence[tuple[Launch, Code]], machine: Machine, op: str) -> float:
    """Microseconds of a call."""
    return sum(launch_us(launch, code, machine, op) for launch, code in found)


def floor_us(call: Call, which: str, sm: int) -> float:
    """Microseconds for the traffic at the bandwidth of a large copy: two tensors, or five with the backward pass."""
    copy = max(record["copy_gb_s"] for _, record in measured()) * GPUS[sm].gigabytes / GPUS[90].gigabytes
    return call.nbytes * (2 if which == "forward" else 5) / (1e3 * copy)


def current(backend: str, sm: int) -> dict[tuple[str, str], list[tuple[Launch, Code]]]:
    """The launches that this revision makes of every call of the table, and their machine code, by the call's name and pass."""
    found = {(call.name, which): launches(call, backend, which) for call, _ in measured() for which in PASSES}
    together = [launch for made in found.values() for launch in made]  # all kernels of a file are compiled at once
    machine_code = iter(codes(together, backend, sm))
    return {key: [(launch, next(machine_code)) for launch in made] for key, made in found.items()}


# ---- the fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A measured time, in microseconds, and its launches."""

    call: Call
    which: str
    seen: float
    launches: tuple[tuple[Launch, Code], ...]


def figures() -> list[Figure]:
    """The measured times of the CUDA kernels on an H100."""
    table = json.loads(LAUNCHES.read_text())
    machine_code = {name: Code(**code) for name, code in table["kernels"].items()}
    made = {(f["call"], f["pass"]): [Launch(**launch) for launch in f["launches"]] for f in table["figures"]}
    return [
        Figure(
            call, which, 1e3 * record[f"{which}_ms"]["ours"],
            tuple((launch, machine_code[launch.key]) for launch in made[call.name, which]),
        )
        for call, record in measured()
        for which in PASSES
    ]  # fmt: skip


def errors(found: Sequence[Figure], constants: Constants) -> list[float]:
    """Relative errors, predicted / measured - 1."""
    machine = Machine.of(90, constants)
    return [call_us(f.launches, machine, f.call.op) / f.seen - 1 for f in found]


def fit(found: Sequence[Figure], tries: int = 10000, seed: int = 0) -> Constants:
    """Fit the constants by random search with shrinking steps, with a robust loss of the logarithms of the ratios."""
    draw, names = random.Random(seed), [f.name for f in fields(Constants)]

    def cost(constants: Constants) -> float:
        return statistics.fmean(abs(math.log1p(e)) ** 1.5 for e in errors(found, constants))

    best, step = Constants(), 0.3
    least = cost(best)
    for turn in range(1, tries + 1):
        moved = {n: getattr(best, n) * math.exp(draw.gauss(0, step)) for n in names if draw.random() < 0.3}
        moved = {n: min(max(v, getattr(LEAST, n)), getattr(LIMITS, n)) for n, v in moved.items()}
        candidate = replace(best, **moved)
        if (value := cost(candidate)) < least:
            best, least = candidate, value
        if turn % (tries // 6 or 1) == 0:
            step *= 0.6
    return best


def held_out(found: Sequence[Figure], group: Callable[[Figure], Any], tries: int = 4000) -> dict[str, float]:
    """Cross-validation errors, with each group left out in turn."""
    total: list[float] = []
    for key in dict.fromkeys(group(f) for f in found):
        constants = fit([f for f in found if group(f) != key], tries)
        total += errors([f for f in found if group(f) == key], constants)
    return summary(total)


def summary(found: Sequence[float]) -> dict[str, float]:
    sizes = [abs(e) for e in found]
    values = {"mean": statistics.fmean(sizes), "median": statistics.median(sizes), "worst": max(sizes)}
    return {k: round(v, 4) for k, v in values.items()}


def fitted() -> Constants:
    """The constants in use."""
    return Constants(**json.loads(FITTED.read_text())["constants"])


def write_fit() -> None:
    """Fit the constants, and write them with the errors on the fitted and on held-out figures."""
    found = figures()
    constants = fit(found)
    table = {
        "constants": {k: float(f"{v:.4g}") for k, v in asdict(constants).items()},
        "figures": len(found),
        "error": summary(errors(found, constants)),
        "left out: a dtype": held_out(found, lambda f: f.call.dtype),
        "left out: a case": held_out(found, lambda f: (f.call.op, f.call.case)),
        "bytes at the data sheet's bandwidth alone": summary(
            [
                f.call.nbytes * (2 if f.which == "forward" else 5) / (1e3 * GPUS[90].gigabytes) / f.seen - 1
                for f in found
            ]
        ),
    }
    write_text(FITTED, json.dumps(table, indent=1) + "\n")


# ---- budgets ---------------------------------------------------------------------------------------------------------


def described(call: Call, which: str, found: Sequence[tuple[Launch, Code]], sm: int) -> dict[str, float]:
    """The budget of a call: its time and launches, and the resources of its last launch over the tensor."""
    machine = Machine.of(sm, fitted())
    launch, code = [(launch, code) for launch, code in found if launch.role in ("forward", "backward")][-1]
    us = call_us(found, machine, call.op)
    return {
        "us": round(us, 2),
        "over_floor": round(us / floor_us(call, which, sm), 2),
        "launches": len(found),
        "waves": round(waves(launch, code, machine), 2),
        "kilobytes_in_flight": round(in_flight(launch, code, machine) / 1024, 1),
        "registers": code.registers,
        "instructions": round(code.instructions, 1),
        "mufu": round(code.mufu, 1),
    }


def broken(found: dict[str, float], allowed: dict[str, float]) -> list[str]:
    """The violated lines of a call's budget, with tolerance for another compiler's scheduling, but not for more work."""
    bounds = {
        "us": 1.03 * allowed["us"] + 0.05,
        "launches": allowed["launches"],
        "registers": allowed["registers"] + 8,
        "instructions": 1.03 * allowed["instructions"] + 4,
        "mufu": allowed["mufu"],
    }
    lines = [f"{k}: {found[k]} > {bound:.2f}" for k, bound in bounds.items() if found[k] > bound]
    if found["kilobytes_in_flight"] < 0.9 * allowed["kilobytes_in_flight"]:
        lines.append(f"kilobytes_in_flight: {found['kilobytes_in_flight']} < 0.9 x {allowed['kilobytes_in_flight']}")
    if math.ceil(found["waves"]) > math.ceil(allowed["waves"]):
        lines.append(f"waves: {found['waves']} > {math.ceil(allowed['waves'])}")
    return lines


def everything(sm: int, backend: str = "cuda") -> dict[str, dict[str, float]]:
    """The description of every call of the table, by its name and pass."""
    found = current(backend, sm)
    return {
        f"{call.name}, {which}": described(call, which, found[call.name, which], sm)
        for call, _ in measured()
        for which in PASSES
    }


# ---- the table -------------------------------------------------------------------------------------------------------


def table(sm: int, backend: str) -> list[str]:
    """Lines with times measured on the H100, predictions for the measured kernels, and predictions for the current kernels. For
    Triton, which is not part of the fit, the current kernels stand for both."""
    now = everything(sm, backend)
    fit_machine, found = Machine.of(90, fitted()), figures()
    models = {f"{f.call.name}, {f.which}": call_us(f.launches, fit_machine, f.call.op) for f in found}
    if backend == "triton":
        models = {name: d["us"] for name, d in (now if sm == 90 else everything(90, backend)).items()}
    contestant = "ours" if backend == "cuda" else "ours, triton"
    lines = [
        f"{'us':<62} {'seen':>7} {'model':>7} {'off':>5}  {'now':>7} {'/floor':>6} launches waves KB/SM regs instr mufu"
    ]
    off = []
    for call, record in measured():
        for which in PASSES:
            name = f"{call.name}, {which}"
            d, seen, model = now[name], 1e3 * record[f"{which}_ms"][contestant], models[name]
            off.append(model / seen - 1)
            lines.append(
                f"{name:<62} {seen:7.1f} {model:7.1f} {off[-1]:+5.0%}  {d['us']:7.1f} {d['over_floor']:6.2f} "
                f"{d['launches']:8} {d['waves']:5.2f} {d['kilobytes_in_flight']:5.1f} {d['registers']:4} "
                f"{d['instructions']:5.0f} {d['mufu']:4.0f}"
            )
    return [*lines, f"error here: {_percent(summary(off))}"]


def _percent(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.1%}" for k, v in values.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m roofline.latency", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, choices=GPUS, default=90, help="the GPU of the prediction (default: 90)")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="whose launches (default: cuda)")
    parser.add_argument("--fit", action="store_true", help=f"fit the constants again: {FITTED.name}")
    parser.add_argument(
        "--write-budgets", action="store_true", help="write what is found as the budgets of the backend's calls"
    )
    args = parser.parse_args(argv)
    if args.fit:
        write_fit()
        print(FITTED.read_text())
        return 0
    if args.write_budgets:
        write_text(BUDGETS[args.backend], json.dumps(everything(90, args.backend), indent=1) + "\n")
        return 0
    print("\n".join(table(args.arch, args.backend)))
    print(
        f"\nseen, model: the revision that was measured on an H100; now: this one, predicted for a {GPUS[args.arch].name}"
    )
    fit_file = json.loads(FITTED.read_text())
    for key in ("error", "left out: a dtype", "left out: a case", "bytes at the data sheet's bandwidth alone"):
        print(f"fit, {key}: {_percent(fit_file[key])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
