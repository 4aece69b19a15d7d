"""``python -m fuzz``: run random calls of the ops; shrink and print those that fail."""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import sys
import time

import torch

from .cases import OPS
from .report import Failure, hunt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=50000)
    parser.add_argument("--seed", default=str(datetime.date.today().toordinal()), help="default: the date")
    parser.add_argument("--op", choices=OPS, help="only this one")
    parser.add_argument("--case", type=int, help="only this number")
    parser.add_argument("--minutes", type=float, help="stop then")
    parser.add_argument("--failures", type=int, default=20, help="kinds of failures after which to stop")
    options = parser.parse_args()
    faulthandler.enable()
    torch.utils.deterministic.fill_uninitialized_memory = True
    numbers = range(options.cases) if options.case is None else [options.case]
    print(f"seed {options.seed}, {len(numbers)} cases")
    started, found, done = time.perf_counter(), list[Failure](), 0
    for failure in hunt(options.seed, numbers, options.op):
        done += 1
        if failure is not None:
            found.append(failure)
            print(f"\n{failure}", flush=True)
        seconds = time.perf_counter() - started
        if done % 5000 == 0:
            print(f"{done} cases, {seconds:.0f} s", flush=True)
        if len(found) >= options.failures or (options.minutes and seconds > 60 * options.minutes):
            break
    print(f"{done} cases in {time.perf_counter() - started:.0f} s: {len(found)} kinds of failures")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
