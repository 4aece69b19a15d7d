"""Benchmark records as text."""

from __future__ import annotations

from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def timings(records: list[dict[str, Any]]) -> str:
    """Milliseconds of every contestant, forward and forward+backward, and ours relative to the baselines."""
    blocks = []
    for key, title, yardsticks in (
        ("forward_ms", "forward, ms", ("copy", "silu(g) * u")),
        ("forward_backward_ms", "forward + backward, ms", ("relu", "mul", "silu(g) * u")),
    ):
        names = list(records[0][key])
        yardstick = next(name for name in yardsticks if name in names)
        official = ["official/ours"] if "official" in names else []
        header = ["case", "dtype", "parameters", *names, f"ours/{yardstick}", *official]
        rows = []
        for r in records:
            ms = r[key]
            cells = [f"{ms[n]:.3g}" for n in names]
            ratios = [f"{ms['ours'] / ms[yardstick]:.2f}", *(f"{ms['official'] / ms['ours']:.1f}" for _ in official)]
            rows.append([r["case"], r["dtype"], r["parameters"], *cells, *ratios])
        blocks.append(f"{title}\n{table(header, rows)}")
    return "\n\n".join(blocks)


def bars(rows: list[dict[str, Any]]) -> str:
    """The bounds on the tuned shape, and whether this run meets them; empty if it did not measure that shape."""
    if not rows:
        return ""
    cells = [[r["what"], r["dtype"], f"{r['value']:.2f}", r["bound"], "yes" if r["met"] else "NO"] for r in rows]
    return table(["bound", "dtype", "measured", "must be", "met"], cells)
