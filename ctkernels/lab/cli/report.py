"""``python -m ctkernels report``: one HTML page from results."""

from __future__ import annotations

import argparse

from ...cli import option_types as types
from . import options

SUMMARY = """\
Write one self-contained HTML page from results: what was run, tables and pictures, a verdict per stage in plain words, and
the commands to repeat it. The page loads nothing and opens from disk."""

EXAMPLES = """\
examples:
  # everything that was run so far
  python -m ctkernels report out/ -o report/

  # some results, with the kernel benchmarks of a clone
  python -m ctkernels report out/steer/result.json out/compare benchmarks/results/cpu.json -o report/

results:
  OUT/index.html"""


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("report", SUMMARY, EXAMPLES)
    p.add_argument(
        "results", nargs="+", type=types.EXISTING, help="result files, or folders in which every result.json counts"
    )
    p.add_argument("-o", "--out", type=types.OUT, default="report", help="folder for the page (default: %(default)s)")
    p.add_argument("--title", default="", help="of the page (default: Curvature report)")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..report.page import build

    print(f"saved {build(arguments.results, arguments.out, arguments.title)}")
    return 0
