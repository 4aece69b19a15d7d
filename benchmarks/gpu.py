"""All measurements on a GPU, in eight minutes: ``make gpu``, or ``python -m benchmarks.gpu``.

From a clean checkout, on a machine with a GPU, torch, Triton and nvcc, without a network: builds for its architecture, checks the
ops against float64, times them against the alternatives and against another revision, and compares with the predictions.

Stages are ordered by importance; each runs in its own process with a time limit. Results are written after every record
(``STAGE.json``) and combined after every stage (``gpu.json``, ``gpu.txt``), so an interrupted run has usable results.
``--dry-run`` runs everything without a GPU, with tiny tensors on the CPU and the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctkernels._files import write_text
from ctkernels.cli import option_types as types
from ctkernels.cli.errors import OptionError, Parser, reported

from . import contestants, ctu, ctu_and_mul, device, head_edit, measure
from .report import table

ROOT = Path(__file__).parents[1]
OURS, DTYPES = device.OURS, ("bf16", "fp32")
Records = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Context:
    """The settings of a stage. seconds: time for each row of a table."""

    out: Path
    dry: bool
    before: str
    seconds: float

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtypes(self) -> tuple[str, ...]:
        return DTYPES[:1] if self.dry else DTYPES

    def shape(self, *sizes: int) -> tuple[int, ...]:
        """The sizes, or small ones in a dry run."""
        return tuple(min(n, 8) for n in sizes) if self.dry else sizes


# ---- stages: each yields records ---------------------------------------------------------------------------------------


BUILD = {"CTKERNELS_BUILD": "cuda", "CTKERNELS_CUDA_ARCHS": "native"}
SETUP = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]


def build(context: Context) -> Records:
    """Build the extensions for this GPU, and start to build those of the other revision, which are awaited later."""
    source = context.out / "before/source"
    shutil.rmtree(source.parent, ignore_errors=True)
    source.mkdir(parents=True)
    archive = shutil.which("git") and subprocess.run(
        ["git", "archive", context.before], cwd=ROOT, capture_output=True, check=False
    )
    if archive and archive.returncode == 0:
        subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
        command = ["true"] if context.dry else ["nice", *SETUP]
        script = 'if "$@" > log 2>&1; then touch built; else touch failed; fi'
        process = subprocess.Popen(
            ["sh", "-c", script, "sh", *command], cwd=source, env=os.environ | BUILD, start_new_session=True
        )
        (source / "group").write_text(str(process.pid))
    else:
        why = archive.stderr.decode().strip() if archive else "git is not installed"
        (source / "log").write_text(f"git has no revision {context.before!r} here: {why}")
        (source / "failed").touch()
    start = time.perf_counter()
    if not context.dry:
        done = subprocess.run(SETUP, cwd=ROOT, env=os.environ | BUILD, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the build failed: {done.stderr.strip()[-2000:]}")
    command_line = " ".join([*(f"{k}={v}" for k, v in BUILD.items()), "python", *SETUP[1:]])
    yield {"command": command_line, "built": not context.dry, "seconds": round(time.perf_counter() - start, 1)}


def check(context: Context) -> Records:
    """Check every op on every backend against float64, on a few samples."""
    sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "tools")]
    from conformance import check_against_float64, outputs

    import ctkernels
    from ctkernels.ops import backends
    from ctkernels.testing import samples

    names = [b.name for b in backends.BACKENDS.values() if b.device == context.device and b.missing is None]
    for dtype in context.dtypes:
        seen: dict[str, int] = {}
        for sample in samples(device.DTYPES[dtype]):
            op = sample.function.__name__
            seen[op] = seen.get(op, 0) + 1
            if seen[op] > (1 if context.dry else 4):
                continue
            moved = sample.map(lambda _, t: t.to(context.device))
            moved.kwargs |= {k: v.to(context.device) for k, v in moved.kwargs.items() if isinstance(v, Tensor)}
            for name in names:
                record = {"op": op, "sample": sample.name, "dtype": dtype, "backend": name, "right": True, "why": ""}
                try:
                    with ctkernels.use_backend(name):
                        found = {key: value.cpu() for key, value in outputs(moved).items()}
                    check_against_float64(sample, found)
                except Exception as error:  # the next one may be right
                    record |= {"right": False, "why": f"{type(error).__name__}: {str(error)[:500]}"}
                yield record


def ops(context: Context) -> Records:
    """The tables of docs/gpu.md, without compiled contestants."""
    yield from _rows(context, inductor=False)


def inductor(context: Context) -> Records:
    """The same tables with Inductor as a contestant."""
    yield from _rows(context, inductor=True)


def _rows(context: Context, inductor: bool) -> Records:
    units = [replace(case, shape=context.shape(*case.shape)) for case in ctu.CASES]
    edits = [(name, (min(lead[0], 2), min(lead[1], 4)) if context.dry else lead) for name, lead in head_edit.CASES]
    for dtype in context.dtypes:
        more = (dtype, context.seconds, inductor)
        for op, cases in (("ctu", [(c.name, partial(device.ctu_row, c, *more)) for c in units]),
                          ("head_edit", [(n, partial(device.head_edit_row, n, lead, *more)) for n, lead in edits])):  # fmt: skip
            for name, row in cases:
                try:
                    yield row()
                except Exception as error:  # a wrong result or a fault; go on with the next row
                    yield {
                        "op": op,
                        "case": name,
                        "dtype": dtype,
                        "failed": f"{type(error).__name__}: {str(error)[:500]}",
                    }


def predicted(context: Context) -> Records:
    """Predictions of tools/roofline for the timed calls."""
    sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "tools")]
    from roofline import latency
    from roofline.calls import PASSES, measured
    from roofline.gpus import GPUS

    records = {f"{r['op']} {r['case']} {r['dtype']}": r for r in _read(context.out, "ops")["records"]}
    if context.dry:  # no compiler: use the kernels with machine code in a file
        sm, known = 90, {(f.call.name, f.which): f.launches for f in latency.figures()}
    else:
        major, minor = torch.cuda.get_device_capability()
        sm = 10 * major + minor
        if sm not in GPUS:
            raise RuntimeError(f"there are no data sheets of sm_{sm}; known are {', '.join(map(str, GPUS))}")
        known = latency.current("cuda", sm)
    machine = latency.Machine.of(sm, latency.fitted())
    for call, _ in measured():
        for which in PASSES:
            found = known[call.name, which]
            described = latency.described(call, which, found, sm)
            launches = [
                {"role": launch.role, "us": round(latency.launch_us(launch, code, machine, call.op), 2)}
                for launch, code in found
            ]
            ms = records.get(call.name, {}).get(f"{which}_ms", {}).get(OURS)
            yield {"call": call.name, "pass": which, "seen_us": ms and 1e3 * ms, **described, "each_launch": launches}


def before(context: Context) -> Records:
    """The same table with another revision's kernels and this revision's benchmark."""
    folder = context.out / "before"
    source, path = folder / "source", folder / "path"
    while not (source / "built").exists():
        if (source / "failed").exists():
            raise RuntimeError((source / "log").read_text()[-2000:])
        time.sleep(0.2)
    path.mkdir()
    (path / "ctkernels").symlink_to(source / "ctkernels")
    (path / "benchmarks").symlink_to(ROOT / "benchmarks")
    command = [*_command("ops", context), "--out", str(folder)]
    process = subprocess.Popen(command, cwd=path, env=os.environ | {"PYTHONPATH": str(path)}, stdout=subprocess.DEVNULL)
    given = 0
    while True:  # on with each record, as it comes
        running = process.poll() is None
        records = _read(folder, "ops")["records"]
        yield from records[given:]
        given = len(records)
        if not running:
            break
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"the benchmark of {context.before} ended with status {process.returncode}")


def gated(context: Context) -> Records:
    """The gated product of an MLP against Liger's, and in inference with the projection before it, against quack's."""
    for dtype in context.dtypes:
        for case, sizes in ctu_and_mul.CASES.items():
            shape = context.shape(*sizes)
            gate, up, dy = (torch.randn(shape, device=context.device).to(device.DTYPES[dtype]) for _ in range(3))
            knobs = [torch.rand(shape[-1], device=context.device) for _ in range(2)]
            ctu_and_mul._gate(gate, up, knobs)
            functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
                OURS: lambda g, u, k=knobs: ctu_and_mul.ours(g, u, *k),
                "ctu, then mul": lambda g, u, k=knobs: ctu_and_mul.two_passes(g, u, *k),
                "silu(g) * u": ctu_and_mul.plain,
                "silu(g) * u compiled": device.compiled(ctu_and_mul.plain),
            }
            liger, absent = contestants.liger(context.dry)
            yield {"op": "ctu_and_mul", "case": case, "shape": list(shape), "dtype": dtype, "absent": absent} | _times(
                functions | liger, [gate, up], dy, context
            )
            width = shape[-1] // 4
            x, weight = (
                torch.randn(s, device=context.device).to(gate.dtype)
                for s in ((*shape[:-1], width), (2 * shape[-1], width))
            )
            projected: dict[str, Callable[..., Tensor]] = {
                OURS: lambda x, w=weight, k=knobs: ctu_and_mul.packed(F.linear(x, w), x, *k),
                "silu(g) * u": lambda x, w=weight: ctu_and_mul.plain(*F.linear(x, w).chunk(2, -1)),
            }
            quack, absent = contestants.quack(context.dry, weight)
            yield {
                "op": "projection, ctu_and_mul",
                "case": case,
                "shape": list(x.shape),
                "dtype": dtype,
                "absent": absent,
            } | _times(projected | quack, [x], None, context)


def convolutions(context: Context) -> Records:
    """A convolution with its activation, and with a sum before that, as in a fused network, against cuDNN's."""
    for dtype in context.dtypes:
        for name, channels, size in (("stage 1", 64, 56), ("stage 3", 256, 14)):
            batch, channels, size, _ = context.shape(128, channels, size, size)
            options = {"device": context.device, "dtype": device.DTYPES[dtype]}
            x, z = (
                torch.randn(batch, channels, size, size, **options).to(memory_format=torch.channels_last)
                for _ in range(2)
            )
            w = torch.randn(channels, channels, 3, 3, **options).mul(0.05).to(memory_format=torch.channels_last)
            b = torch.randn(channels, **options)
            beta, shift = torch.full((channels,), 0.9, device=context.device), b.float()

            def ours(
                x: Tensor, z: Tensor | None = None, w: Tensor = w, beta: Tensor = beta, shift: Tensor = shift
            ) -> Tensor:
                from ctkernels.functional import ctu

                return ctu(F.conv2d(x, w, padding=1), beta, channel_dim=1, shift=shift, residual=z)

            cudnn, absent = contestants.cudnn(context.dry, w, b)
            plain: dict[str, Callable[..., Tensor]] = {
                OURS: ours,
                "convolution": lambda x, w=w, b=b: F.conv2d(x, w, b, padding=1),
                "convolution, then ReLU": lambda x, w=w, b=b: F.relu(F.conv2d(x, w, b, padding=1)),
            }
            summed: dict[str, Callable[..., Tensor]] = {
                OURS: ours,
                "convolution, then sum and ReLU": lambda x, z, w=w, b=b: F.relu(F.conv2d(x, w, b, padding=1) + z),
            }
            for op, functions, tensors in (("convolution", plain, [x]), ("convolution, sum", summed, [x, z])):
                functions |= {n: f for n, f in cudnn.items() if ("add" in n) == (len(tensors) > 1)}
                yield {
                    "op": op,
                    "case": f"ResNet-50 {name}",
                    "shape": list(x.shape),
                    "dtype": dtype,
                    "absent": absent,
                } | _times(functions, tensors, None, context)


def attention(context: Context) -> Records:
    """Attention with the edit, against torch's kernels, flex_attention and FlashAttention-4."""
    from ctkernels.functional import attention_head_edit
    from ctkernels.functional import head_edit as edit

    for name, sizes, window, packed in (
        ("4 x 2048, 16 heads of 128", (4, 16, 2048, 128), None, False),
        ("1 x 8192, 16 heads of 128, window 1024", (1, 16, 8192, 128), 1024, False),
        ("packed, 4 x 2048, 16 heads of 128", (1, 16, 8192, 128), None, True),
    ):
        batch, heads, tokens, dim = (1, 2, 32, 16) if context.dry else sizes
        window = min(window, tokens // 2) if window else None
        options: dict[str, Any] = {"device": context.device}
        shape = (tokens, heads, dim) if packed else (batch, heads, tokens, dim)
        q, k, v, dy = (torch.randn(shape, **options, dtype=torch.bfloat16) for _ in range(4))
        edits = [torch.randn(s, **options) for s in ((heads, dim), (heads, dim), (heads,), (heads,))]
        extra: dict[str, Any] = {"window": window} if window else {}
        if packed:
            starts = torch.arange(5, device=context.device, dtype=torch.int32) * (tokens // 4)
            extra |= {"cu_seqlens": starts, "max_seqlen": tokens // 4}
        functions: dict[str, Callable[..., Tensor]] = {
            OURS: lambda q, k, v, e=edits, x=extra: attention_head_edit(q, k, v, *e, is_causal=True, **x),
        }
        others, absent = contestants.attention(context.dry, q, window, extra.get("cu_seqlens"))
        functions |= others
        if "flex_attention" in others:
            functions["flex_attention, then the edit"] = lambda q, k, v, e=edits, f=others["flex_attention"]: edit(
                f(q, k, v), *e, head_axis=1
            )
        if not extra:
            functions["torch"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        yield {
            "op": "attention_head_edit",
            "case": name,
            "shape": list(q.shape),
            "dtype": "bf16",
            "absent": absent,
        } | _times(functions, [q, k, v], dy, context)


def _times(
    functions: dict[str, Callable[..., Tensor]], tensors: list[Tensor], dy: Tensor | None, context: Context
) -> dict[str, Any]:
    """Milliseconds of forward, or with ``dy`` of forward and backward in all ``tensors``; and errors of failed ones."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    forward = {name: measure.without_grad(f, *tensors) for name, f in functions.items()}
    both = {} if dy is None else {name: measure.with_gradients(f, leaves, leaves, dy) for name, f in functions.items()}
    times: dict[str, Any] = {"failed": {}}
    for key, runs in (("forward_ms", forward), ("forward_backward_ms", both)):
        able = {}
        for name, run in runs.items():
            try:
                call = lambda _, run=run: run()  # noqa: E731
                device.interleaved_graphs({name: call}, 1, 0.0, least=1)
                able[name] = call
            except Exception as error:  # not supported by this torch or GPU
                times["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
        if able:
            times[key] = device.interleaved_graphs(able, 4, context.seconds)
    return times


def sanitize(context: Context) -> Records:
    """Run compute-sanitizer on a few calls."""
    tool = shutil.which("compute-sanitizer")
    command = ["--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "--handful"]
    for name in ("memcheck", "racecheck"):
        record: dict[str, Any] = {
            "tool": name,
            "command": " ".join(["compute-sanitizer", "--tool", name, *command[:2], "..."]),
        }
        if context.dry or tool is None:
            yield record | {"clean": None, "why": "a rehearsal" if context.dry else "compute-sanitizer is not on PATH"}
            continue
        # torch's caching allocator would hide accesses past the end of a tensor
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            [tool, "--tool", name, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        yield record | {"clean": done.returncode == 0, "why": done.stdout[-1000:] if done.returncode else ""}


def handful(where: str) -> None:
    """Calls that launch every kind of kernel."""
    from ctkernels.functional import ctu, hard_concrete
    from ctkernels.functional import head_edit as edit

    for dtype in (torch.float32, torch.bfloat16):
        for shape, dim in (((3, 8, 300), 1), ((70, 96), 1), ((5, 7), 1)):
            x = torch.randn(shape, device=where, dtype=dtype, requires_grad=True)
            knobs = [torch.rand(shape[dim], device=where, requires_grad=True) for _ in range(2)]
            torch.autograd.grad(ctu(x, *knobs, channel_dim=dim, raw=True).sum(), (x, *knobs))
            ctu(x.detach(), 0.9, inplace=True)
        z = torch.randn(40, 128, device=where, dtype=dtype, requires_grad=True)
        parts = [torch.randn(s, device=where, requires_grad=True) for s in ((2, 64), (2, 64), (2,), (2,))]
        torch.autograd.grad(edit(z, *parts).sum(), (z, *parts))
    logits = torch.zeros(300, device=where, requires_grad=True)
    torch.autograd.grad(hard_concrete(logits, training=True).sum(), logits)


def host(context: Context) -> Records:
    """Host time of an eager call on a tiny tensor."""
    yield {"overhead_us": device.call_overhead()}


@dataclass(frozen=True)
class Stage:
    """A function with its time limit in seconds."""

    run: Callable[[Context], Records]
    limit: float

    @property
    def name(self) -> str:
        return self.run.__name__


STAGES = [
    Stage(build, 150), Stage(check, 60), Stage(ops, 60), Stage(predicted, 60), Stage(before, 90), Stage(inductor, 110),
    Stage(sanitize, 60), Stage(convolutions, 40), Stage(gated, 60), Stage(attention, 90), Stage(host, 30),
]  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}


# ---- the run ---------------------------------------------------------------------------------------------------------


def _read(out: Path, stage: str) -> dict[str, Any]:
    file = out / f"{stage}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"records": []}
    return found


def run_stage(name: str, context: Context) -> int:
    """Run a stage in this process; its file is complete after every record."""
    if context.dry:
        device.rehearse()
    records: list[dict[str, Any]] = []
    for record in BY_NAME[name].run(context):
        records.append(record)
        write_text(context.out / f"{name}.json", json.dumps({"records": records}, indent=1) + "\n")
        print(f"{name}: {len(records)}", flush=True)
    return 0


def _command(stage: str, context: Context) -> list[str]:
    options = ["--stage", stage, "--before", context.before, "--seconds", str(context.seconds)]
    return [sys.executable, "-m", "benchmarks.gpu", *options, *(["--dry-run"] if context.dry else [])]


def run(context: Context, limit: float, only: list[str]) -> dict[str, Any]:
    """Run the stages one after another, in at most ``limit`` seconds."""
    context.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        (context.out / f"{stage.name}.json").unlink(missing_ok=True)
    begin = time.monotonic()
    where = measure.provenance() | {
        "device": "cpu, a rehearsal" if context.dry else torch.cuda.get_device_name(), "cuda": torch.version.cuda
    }  # fmt: skip
    result: dict[str, Any] = {"provenance": where, "stages": {}}
    try:
        for stage in STAGES:
            if only and stage.name not in only:
                continue
            left = limit - (time.monotonic() - begin)
            allowed = left if context.dry else min(stage.limit, left)  # a rehearsal shares its CPU with others
            result["stages"][stage.name] = _limited(stage, context, allowed)
            write_text(context.out / "gpu.json", json.dumps(result, indent=1) + "\n")
            write_text(context.out / "gpu.txt", text(result) + "\n")
            print(
                f"{stage.name}: {result['stages'][stage.name]['status']}, {time.monotonic() - begin:.0f} s", flush=True
            )
    finally:
        source = context.out / "before/source"
        if (source / "group").exists() and not any((source / name).exists() for name in ("built", "failed")):
            os.killpg(int((source / "group").read_text()), signal.SIGKILL)
    return result


def _limited(stage: Stage, context: Context, seconds: float) -> dict[str, Any]:
    """Run a stage in its own process group, killed at the time limit; the records written before that count."""
    if seconds <= 0:
        return {"status": "no time left", "seconds": 0.0, "why": "", "records": []}
    start, log = time.monotonic(), context.out / f"{stage.name}.log"
    command = [*_command(stage.name, context), "--out", str(context.out)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "cut off"
    why = "" if status == "done" else "\n".join(log.read_text().splitlines()[-8:])
    taken = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": taken, "why": why, "records": _read(context.out, stage.name)["records"]}


# ---- the text --------------------------------------------------------------------------------------------------------


def text(result: dict[str, Any]) -> str:
    """The current results as tables."""
    where, stages = result["provenance"], result["stages"]
    found = {name: stage["records"] for name, stage in stages.items()}
    blocks = [
        f"{where['device']}, torch {where['torch']}, commit {where['commit']}{', with changes' if where['dirty'] else ''}"
    ]
    rows = [
        [name, s["status"], f"{s['seconds']:.0f}", str(len(s["records"])), s["why"][-60:].replace("\n", " ")]
        for name, s in stages.items()
    ]
    blocks.append(table(["stage", "", "seconds", "records", ""], rows))
    if wrong := [r for r in found.get("check", []) if not r["right"]]:
        blocks.append(
            "WRONG:\n"
            + table(
                ["op", "sample", "dtype", "backend", "why"],
                [list(map(str, [r["op"], r["sample"], r["dtype"], r["backend"], r["why"][:80]])) for r in wrong],
            )
        )
    failed = [
        [*_key(r), r["failed"][:80]]
        for name in ("ops", "inductor", "before")
        for r in found.get(name, [])
        if "failed" in r
    ]
    if failed:
        blocks.append("FAILED:\n" + table(["op", "case", "dtype", "why"], failed))
    reasons = {(n, why): None for name in stages for r in found[name] for n, why in r.get("absent", {}).items()}
    if reasons:
        blocks.append(table(["absent", ""], [list(pair) for pair in reasons]))
    old = {_key(r): r for r in found.get("before", [])}
    for key in ("forward_ms", "forward_backward_ms"):
        rows = []
        # A row with Inductor replaces the one without.
        rivals = {
            _key(r): r
            for name in ("ops", "inductor", "convolutions", "gated", "attention")
            for r in found.get(name, [])
            if key in r
        }
        rows += [_row(r, key, old.get(_key(r))) for r in rivals.values()]
        if rows:
            head = ["us", "dtype", OURS, "before", "fastest of the others", "", "ours / it"]
            blocks.append(f"{key.removesuffix('_ms').replace('_', ' + ')}\n{table(head, rows)}")
    rows = [
        [
            r["call"],
            r["pass"],
            f"{r['us']:.1f}",
            f"{r['seen_us']:.1f}",
            f"{r['us'] / r['seen_us'] - 1:+.0%}",
            f"{r['over_floor']:.2f}",
            str(r["launches"]),
        ]
        for r in found.get("predicted", [])
        if r["seen_us"]
    ]
    if rows:
        off = math.fsum(abs(r["us"] / r["seen_us"] - 1) for r in found["predicted"] if r["seen_us"]) / len(rows)
        head = ["us", "pass", "predicted", "seen", "off", "predicted / floor", "launches"]
        blocks.append(f"{table(head, rows)}\nmean error {off:.1%}")
    rows = [
        [r["tool"], {True: "clean", False: "REPORTS", None: r["why"]}[r["clean"]]] for r in found.get("sanitize", [])
    ]
    if rows:
        blocks.append(table(["compute-sanitizer", ""], rows))
    rows = [[name, f"{us:.1f}"] for r in found.get("host", []) for name, us in r["overhead_us"].items()]
    if rows:
        blocks.append(table(["a call on next to nothing", "us of the host"], rows))
    return "\n\n".join(blocks)


def _key(record: dict[str, Any]) -> tuple[str, str, str]:
    return record["op"], record["case"], record["dtype"]


def _row(record: dict[str, Any], key: str, old: dict[str, Any] | None) -> list[str]:
    times = {n: ms for n, ms in record[key].items() if not n.startswith(OURS) and n != "copy"}
    best = min(times, key=lambda n: times[n]) if times else ""
    mine, past = record[key].get(OURS), (old or {}).get(key, {}).get(OURS)
    cells = [f"{1e3 * v:.1f}" if v else "" for v in (mine, past, times.get(best))]
    ratio = f"{mine / times[best]:.2f}" if mine and best else ""
    return [f"{record['op']} {record['case']}", record["dtype"], *cells, best, ratio]


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="folder of the results (default: out/gpu)")
    parser.add_argument("--limit", type=types.POSITIVE, default=480.0, help="seconds for everything (default: 480)")
    parser.add_argument("--seconds", type=types.POSITIVE, default=0.05, help="of each row of a table (default: 0.05)")
    parser.add_argument("--before", default="HEAD~", help="the revision to compare with (default: HEAD~)")
    parser.add_argument("--only", nargs="+", choices=BY_NAME, default=[], help="these stages")
    parser.add_argument("--dry-run", action="store_true", help="a rehearsal, without a GPU")
    parser.add_argument("--stage", choices=BY_NAME, help=argparse.SUPPRESS)
    parser.add_argument("--handful", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    return reported(lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    if args.handful:
        handful("cuda")
        return 0
    context = Context(args.out.resolve(), args.dry_run, args.before, args.seconds)
    if args.stage:
        try:
            return run_stage(args.stage, context)
        except Exception:
            traceback.print_exc()
            return 1
    if not args.dry_run and (why := device.missing()):
        raise OptionError(f"{why}; --dry-run rehearses without one")
    result = run(context, args.limit, args.only)
    print("\n" + text(result))
    records = [r for stage in result["stages"].values() for r in stage["records"]]
    wrong = any(not r.get("right", True) or isinstance(r.get("failed"), str) for r in records)
    return 1 if wrong or any(stage["status"] != "done" for stage in result["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
