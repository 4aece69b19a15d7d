"""The order of accesses of different blocks by fences and strong accesses, per thread, as in the PTX memory model.

A strong access publishes accesses at its location: with release semantics, all that happened before it; otherwise those covered
by a fence of its thread, that is, the thread's own and those that a barrier ordered before the fence. Accesses of other threads
without such a barrier are not covered. A strong access reads the publications at its location; its thread knows them at once with
acquire semantics, otherwise after its next fence.

Barriers pass on the knowledge of threads. They also pass on the coverage of a fence.sc (membar.gl) and the publications read by
strong accesses: all fence.sc of a grid have a total order, so a fence, a barrier and another thread's atomic are equivalent to
that thread's own fence. A fence.acq_rel has no such order.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Row = np.ndarray  # for every thread of the grid, the time up to which its accesses are known


class Rows:
    """A row for every thread, stored as a common part per block and an individual part."""

    def __init__(self, blocks: int, lanes: int, grid_lanes: int):
        self.lanes = lanes
        self.common = np.zeros((blocks, grid_lanes), np.int64)
        self.alone: dict[int, Row] = {}

    def of(self, lane: int) -> Row:
        """The row of a thread; read-only."""
        common, alone = self.common[lane // self.lanes], self.alone.get(lane)
        return common if alone is None else np.maximum(common, alone)

    def add(self, lane: int, row: Row) -> None:
        if (row > self.common[lane // self.lanes]).any():
            alone = self.alone.get(lane)
            self.alone[lane] = row.copy() if alone is None else np.maximum(alone, row)

    def join(self, lanes: Iterable[int]) -> None:
        """Exchange the knowledge of these threads."""
        mine = [lane for lane in lanes if lane in self.alone]
        if mine:
            row = np.maximum.reduce([self.alone[lane] for lane in mine])
            for lane in lanes:
                self.add(lane, row)

    def join_block(self, block: int) -> None:
        mine = [lane for lane in self.alone if lane // self.lanes == block]
        for lane in mine:
            np.maximum(self.common[block], self.alone.pop(lane), out=self.common[block])


class BetweenBlocks:
    """The order between blocks. Lanes are numbered over the blocks that run together, threads over the grid."""

    def __init__(self, blocks: int, lanes: int, first_block: int, grid_blocks: int):
        self.lanes, self.first = lanes, first_block * lanes
        size = (blocks, lanes, grid_blocks * lanes)
        self.known = Rows(*size)
        self.covered, self.handed = (
            Rows(*size),
            Rows(*size),
        )  # by fences: of the thread itself, and such as barriers hand on
        self.read, self.heard = Rows(*size), Rows(*size)  # by strong accesses: the same

    def _before(self, lane: int, seen: np.ndarray, now: int) -> Row:
        """All accesses that happened before the current time of a thread. seen: times for every lane of its block."""
        row, begin = self.known.of(lane).copy(), self.first + lane // self.lanes * self.lanes
        row[begin : begin + self.lanes] = seen
        row[self.first + lane] = now
        return row

    def fence(self, lane: int, seen: np.ndarray, now: int, sequential: bool) -> None:
        """A fence of a thread. sequential: a fence.sc."""
        self.known.add(lane, self.read.of(lane))
        if sequential:
            self.known.add(lane, self.heard.of(lane))
        row = self._before(lane, seen, now)
        self.covered.add(lane, row)
        if sequential:
            self.handed.add(lane, row)

    def access(self, lane: int, seen: np.ndarray, now: int, published: Row, release: bool, acquire: bool) -> None:
        """A strong access to a location with the publications ``published``, which it updates."""
        if acquire:
            self.known.add(lane, published)
        self.read.add(lane, published)
        self.heard.add(lane, published)
        rows = [self._before(lane, seen, now)] if release else [self.covered.of(lane), self.handed.of(lane)]
        for row in rows:
            np.maximum(published, row, out=published)

    def barrier(self, blocks: Iterable[int]) -> None:
        """Whole blocks pass a barrier."""
        for block in blocks:
            for rows in (self.known, self.handed, self.heard):
                rows.join_block(block)

    def join(self, lanes: Iterable[int]) -> None:
        """Some threads of a block pass a barrier."""
        lanes = list(lanes)
        for rows in (self.known, self.handed, self.heard):
            rows.join(lanes)

    def knows(self, threads: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The time up to which each of ``threads`` knows the accesses of its thread in ``others``, both grid-wide."""
        lanes = threads - self.first
        out = self.known.common[lanes // self.lanes, others]
        for k in np.flatnonzero(np.isin(lanes, list(self.known.alone))) if self.known.alone else ():
            out[k] = max(out[k], self.known.alone[int(lanes[k])][others[k]])
        return out
