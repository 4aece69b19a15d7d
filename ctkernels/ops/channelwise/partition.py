"""Partition of a tensor into tiles, one per program: a function of its shape and element size alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..layout import View

# Channels with at least this many neighbouring values are planes, with scalar constants.
MIN_PLANE = 256
# Enough programs to fill every GPU several times over; larger tensors get longer programs. Fewer if each program leaves partial
# sums of its lanes.
PROGRAMS, SUMMING_PROGRAMS = 4096, 2048
# Accesses of 16 bytes per lane: at most; and at least, to amortise loading constants per lane, and storing partial sums.
MOST_STEPS = 32
LEAST_ROWS, LEAST_SUMMED_ROWS = 8, 16
# Up to this many steps, one program processes a whole channel and needs no partial sums; tensors of up to SMALL values are
# partitioned so that it can.
ALONE = 32
SMALL = 1 << 16
# Up to this many programs do not fill a GPU: the time of one is the time of all.
FEW_PROGRAMS = 1024
# Kernels count the columns of a period in 32 bits, and look past its end.
FURTHEST = 1 << 30


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Partition:
    """plane, lanes, warps, unit: as in the kernels; ``unit`` divides every length. cols_per (in units), rows_per: size of a tile;
    col_cuts, row_cuts: number of tiles along columns and rows. repeat: periods in a row."""

    plane: bool
    unit: int
    lanes: int
    warps: int
    repeat: int
    row_units: int
    rows: int
    cols_per: int
    col_cuts: int
    rows_per: int
    row_cuts: int
    programs: int
    one_pass: bool  # one program, or a lane of it, sees a whole channel

    @property
    def slots(self) -> int:
        """Partial sums per channel, or per column."""
        return self.row_cuts * self.col_cuts if self.plane else self.row_cuts

    def columns(self, view: View) -> int:
        """Columns of the partial sums."""
        return view.channels if self.plane else self.row_units * self.unit

    def args(self, view: View) -> dict[str, int]:
        return {
            "channels": view.channels,
            "inner": view.inner,
            "row_units": self.row_units,
            "rows": self.rows,
            "row_cuts": self.row_cuts,
            "rows_per": self.rows_per,
            "col_cuts": self.col_cuts,
            "cols_per": self.cols_per,
            "group_units": view.outer * view.channels * view.inner // self.unit,
        }

    def meta(self) -> dict[str, Any]:
        wrap = self.repeat > 1
        return {"PLANE": self.plane, "WRAP": wrap, "UNIT": self.unit, "LANES": self.lanes, "num_warps": self.warps}


def _lanes(width: int, vector: int, serial: bool) -> int:
    """Lanes per program: the size with the fewest idle lanes, at a small cost per step; ``serial``: with the fewest steps."""
    sizes = [32 * vector << i for i in range(3)]
    return min(sizes, key=lambda n: _ceil(width, n) * (1 if serial else n + 2 * vector))


def partition_for(view: View, itemsize: int, sums: bool) -> Partition:
    """The partition of a view. ``sums``: whether the kernel computes sums over channels."""
    vector = 16 // itemsize
    group = view.outer * view.channels * view.inner
    one_launch = sums and view.outer <= ALONE and group * view.groups <= SMALL
    plane = view.channels == 1 or view.inner >= MIN_PLANE or view.channels * view.inner >= FURTHEST
    plane = plane or (one_launch and view.inner > 1)
    repeat = 1
    if plane:
        width, length, rows = view.inner, view.channels * view.inner, view.outer
    else:
        period = view.channels * view.inner
        if (
            period < 32 * vector and view.outer > 1 and not one_launch and not view.packed
        ):  # several periods side by side, a whole number of vectors
            step = vector // math.gcd(period, vector)
            repeat = min(max(step, 64 * vector // period // step * step), view.outer)
        width = length = period * repeat
        rows = _ceil(view.outer, repeat)
    unit = math.gcd(math.gcd(width, group), vector)
    few = plane and view.channels * view.groups <= FEW_PROGRAMS
    lanes = _lanes(width, vector, sums and few and _ceil(width, 32 * vector) * rows <= ALONE)
    blocks = _ceil(width, lanes)
    if plane:
        total = blocks * rows * view.channels * view.groups
        steps = min(max(_ceil(total, PROGRAMS), 1), MOST_STEPS)
        if sums and blocks * rows <= ALONE:
            steps = ALONE
        cols = min(blocks, steps)
        rows_per = min(rows, max(1, steps // blocks))
        col_cuts, planes = _ceil(blocks, cols), view.channels
    else:
        cols, col_cuts, planes = 1, blocks, 1
        even = _ceil(rows * blocks * view.groups, SUMMING_PROGRAMS if sums else PROGRAMS)
        rows_per = min(max(even, LEAST_SUMMED_ROWS if sums else LEAST_ROWS), 2 * MOST_STEPS, rows)
        if sums and rows <= ALONE:
            rows_per = rows
    row_cuts = _ceil(rows, rows_per)
    one_pass = row_cuts * col_cuts == 1 if plane else row_cuts == 1 and repeat == 1 and view.inner == 1
    return Partition(
        plane=plane,
        unit=unit,
        lanes=lanes,
        warps=lanes // (32 * vector),
        repeat=repeat,
        row_units=length // unit,
        rows=rows,
        cols_per=cols * lanes // unit,
        col_cuts=col_cuts,
        rows_per=rows_per,
        row_cuts=row_cuts,
        programs=view.groups * planes * row_cuts * col_cuts,
        one_pass=one_pass,
    )
