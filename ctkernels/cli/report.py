"""``python -m ctkernels report``: one HTML page from results."""

from __future__ import annotations

import argparse

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
  OUT/index.html

exit codes: 0 done, 2 bad input, 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ctkernels report",
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("results", nargs="+", help="result files, or folders in which every result.json counts")
    p.add_argument("-o", "--out", default="report", help="folder for the page (default: %(default)s)")
    p.add_argument("--title", default="", help="of the page (default: Curvature report)")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..report.page import build

    print(f"saved {build(arguments.results, arguments.out, arguments.title)}")
    return 0
