"""python -m benchmarks: time the kernels against the alternatives a user has."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from ctkernels._files import write_text
from ctkernels.cli import option_types as types
from ctkernels.cli.errors import OptionError, Parser, reported

from . import ctu, ctu_and_mul, device, head_edit, measure, report

SUITES = {"ctu": ctu, "ctu_and_mul": ctu_and_mul, "head_edit": head_edit}


def main(argv: list[str] | None = None) -> int:
    return reported(lambda: run(parser().parse_args(argv)))


def parser(prog: str = "python -m benchmarks") -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--op", choices=SUITES, nargs="+", default=list(SUITES), help="which ops (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: needs a GPU (default: cpu)")
    whole = parser.add_mutually_exclusive_group()
    whole.add_argument("--networks", action="store_true", help="instead, a ResNet-50 (needs torchvision)")
    whole.add_argument(
        "--formats", action="store_true", help="instead, its inference in both memory formats and for small images"
    )
    whole.add_argument("--calls", action="store_true", help="instead, what calls on next to nothing cost the host")
    whole.add_argument("--jola", action="store_true", help="instead, a Llama (needs transformers and peft)")
    whole.add_argument("--pool", action="store_true", help="instead, 1000 adapters in a batch (as --jola)")
    whole.add_argument("--monitor", action="store_true", help="instead, what an EditMonitor costs (as --jola)")
    whole.add_argument("--attention", action="store_true", help="instead, attention with the edit (needs a GPU)")
    whole.add_argument(
        "--composed", action="store_true", help="instead, parts of both beside their composed reference, all compiled"
    )
    parser.add_argument(
        "--dtype", choices=ctu.DTYPES, nargs="+", default=list(ctu.DTYPES), help="which dtypes (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, without the compiled contestant")
    parser.add_argument("--tuned", action="store_true", help="only the shapes that have bounds to keep")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name contains it (with --device cuda or --formats)"
    )
    parser.add_argument("--seconds", type=types.POSITIVE, default=1.5, help="time spent on each row (default: 1.5)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="with --formats --threads 1: CPU time, where others use the machine too"
    )
    parser.add_argument("--threads", type=types.whole(1, 1024), help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=types.OUT_FILE, metavar="FILE", help="also write the records there")
    return parser


def run(args: argparse.Namespace) -> int:
    for name in ("composed", "formats", "calls"):
        if args.device == "cuda" and getattr(args, name):
            raise OptionError(f"--{name}: measured on a CPU; leave out --device")
    if args.cpu_time and not (args.formats and args.threads == 1):
        raise OptionError("--cpu-time: of one thread; give it with --formats and --threads 1")
    if (
        args.only
        and not args.formats
        and (args.device == "cpu" or args.networks or args.jola or args.pool or args.monitor)
    ):
        raise OptionError("--only: for --formats, and the ops and the attention of --device cuda")
    if args.device == "cuda":
        return _on_device(args)
    if args.attention:
        raise OptionError("--attention: on a CPU it is torch's attention; give --device cuda")
    if args.threads:
        torch.set_num_threads(args.threads)

    where = measure.provenance()
    isa = where["onednn_max_cpu_isa"]
    limit = f", ONEDNN_MAX_CPU_ISA={isa}" if isa else ""
    print(f"{where['cpu']} ({where['cpu_capability']}{limit}), {where['threads']} threads")
    print(f"torch {where['torch']}, commit {where['commit']}{' with changes' if where['dirty'] else ''}")
    print(measure.tune_allocator())
    print("medians of interleaved runs, the faster half of the rounds; copy is Tensor.copy_ into an existing tensor\n")
    result: dict[str, Any] = {"provenance": where, "records": [], "overhead_us": {}, "bars": []}
    networks = _networks(args)
    if networks is not None:
        records, rows, text = networks
        print(f"{text}\n\n{report.bars(rows)}")
        result |= {"records": records, "bars": rows}
    for name in args.op if networks is None else ():
        suite = SUITES[name]
        records = suite.run(args.dtype, args.quick, args.seconds, args.tuned)
        rows = suite.bars(records)
        overhead = suite.call_overhead()
        print(report.timings(records))
        print(
            "\n"
            + (report.bars(rows) + "\n\n" if rows else "")
            + "eager call on 16 elements: "
            + ", ".join(f"{k} {v:.1f} us" for k, v in overhead.items())
            + "\n"
        )
        result["records"] += records
        result["bars"] += rows
        result["overhead_us"] |= overhead
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    return 0


def _networks(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str] | None:
    """(records, bars, text) of whole networks, or None if they were not requested."""
    if args.jola:
        from . import jola_step

        record = jola_step.run(args.seconds, args.quick, args.device)
        return [record], jola_step.bars(record), jola_step.text(record)
    if args.pool:
        from . import pool

        record = pool.run(args.seconds, args.quick, args.device)
        return [record], pool.bars(record), pool.text(record)
    if args.monitor:
        from . import monitor

        record = monitor.run(args.seconds, args.quick, args.device)
        return [record], monitor.bars(record), monitor.text(record)
    if args.networks:
        from . import networks

        records = networks.run(args.dtype, args.seconds, args.quick, args.device)
        return records, networks.bars(records), networks.text(records)
    if args.formats:
        from . import formats

        records = formats.run(args.dtype, args.seconds, args.quick, args.cpu_time, args.only)
        return records, formats.bars(records), formats.text(records)
    if args.calls:
        from . import calls

        records = calls.run()
        return records, calls.bars(records), calls.text(records)
    if args.composed:
        from . import composed

        records = composed.run(args.dtype, args.seconds)
        return records, composed.bars(records), composed.text(records)
    return None


def _on_device(args: argparse.Namespace) -> int:
    why = device.missing()
    if why is not None:
        print(f"python -m benchmarks --device cuda: {why}", file=sys.stderr)
        return 1
    where = measure.provenance() | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    print(f"{where['device']}, CUDA {where['cuda']}, torch {where['torch']}, commit {where['commit']}\n")
    result: dict[str, Any] = {"provenance": where}
    if args.attention:
        from . import device_attention

        result["records"] = device_attention.run(args.dtype, args.quick, args.seconds, args.only)
        text = device_attention.text(result["records"])
    elif (networks := _networks(args)) is not None:
        result["records"], _, text = networks  # the bounds are a CPU's
    else:
        result["records"] = device.run(args.op, args.dtype, args.quick, args.seconds, args.only)
        result["overhead_us"] = device.call_overhead()
        text = device.text(result["records"], result["overhead_us"])
    print(text)
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
