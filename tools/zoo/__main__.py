"""``python -m zoo``: steer, fuse and adapt the smallest model of every family of timm, and write a table."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import sys
from pathlib import Path

from .choose import families
from .guard import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("--sample", type=int, help="so many families instead of all")
    parser.add_argument(
        "--seed", type=int, default=datetime.date.today().toordinal(), help="of the sample; default: the date"
    )
    parser.add_argument("--only", help="families whose module file or a model's name contains this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="after which an architecture is given up")
    parser.add_argument("--json", type=Path, help="where the records go")
    options = parser.parse_args()
    groups = [(module, names) for (module, _), names in families().items()]
    if options.only:
        groups = [g for g in groups if options.only in g[0] or any(options.only == name for name in g[1])]
    if options.sample:
        print(f"seed {options.seed}")
        groups = random.Random(options.seed).sample(groups, min(options.sample, len(groups)))
    found = []
    for i, one in enumerate(run(groups, options.jobs, options.seconds)):
        found.append(one)
        counts = (
            f"{one.sites:4} steered {one.missed:3} missed {one.fused:4} fused {one.left:3} left {one.adapted:4} adapted"
        )
        print(f"{i + 1:3}/{len(groups)} {one.name:42} {one.size:4} {counts} {one.seconds:6.1f} s", flush=True)
        if one.skipped:
            print(f"        not looked at: {one.skipped}", flush=True)
        for line in one.failures:
            print(f"        {line}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([dataclasses.asdict(f) for f in found], indent=1) + "\n")
    failed = [one for one in found if one.failures]
    crashed = sum("interpreter ended" in line for one in failed for line in one.failures)
    print(f"{sum(not one.skipped for one in found)} architectures, {len(failed)} with findings, {crashed} crashes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
