"""What orders the accesses of different blocks: fences and strong accesses, thread by thread, as the PTX memory model has it.

A strong access publishes at its location what its thread has made ready: with release semantics, all that happened before it;
otherwise what a fence of its thread covers, which is the thread's own accesses and those that a barrier had ordered before the
fence. A fence of one thread covers nothing of another that no barrier has ordered before it. A strong access that finds something
at its location has read it; with acquire semantics its thread knows it then, otherwise from its next fence on.

Barriers hand on what threads know. They also hand on what a fence.sc (membar.gl) has covered and what a strong access has
read: all fence.sc of a grid are in one order, which makes a fence, a barrier and another thread's atomic as good as that
thread's own fence. Of a fence.acq_rel no such order is promised.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Row = np.ndarray  # for every thread of the grid, up to which time its accesses are known


class Rows:
    """A row for every thread: what all threads of its block have in common, and what it has alone."""

    def __init__(self, blocks: int, lanes: int, grid_lanes: int):
        self.lanes = lanes
        self.common = np.zeros((blocks, grid_lanes), np.int64)
        self.alone: dict[int, Row] = {}

    def of(self, lane: int) -> Row:
        """Not to be changed."""
        common, alone = self.common[lane // self.lanes], self.alone.get(lane)
        return common if alone is None else np.maximum(common, alone)

    def add(self, lane: int, row: Row) -> None:
        if (row > self.common[lane // self.lanes]).any():
            alone = self.alone.get(lane)
            self.alone[lane] = row.copy() if alone is None else np.maximum(alone, row)

    def join(self, lanes: Iterable[int]) -> None:
        """These threads tell each other."""
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
    """Of the blocks that run together; lanes are numbered over those, threads over the grid."""

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
        """All that has happened before the present moment of a thread. seen: of its own block, for every lane."""
        row, begin = self.known.of(lane).copy(), self.first + lane // self.lanes * self.lanes
        row[begin : begin + self.lanes] = seen
        row[self.first + lane] = now
        return row

    def fence(self, lane: int, seen: np.ndarray, now: int, sequential: bool) -> None:
        """sequential: a fence.sc."""
        self.known.add(lane, self.read.of(lane))
        if sequential:
            self.known.add(lane, self.heard.of(lane))
        row = self._before(lane, seen, now)
        self.covered.add(lane, row)
        if sequential:
            self.handed.add(lane, row)

    def access(self, lane: int, seen: np.ndarray, now: int, published: Row, release: bool, acquire: bool) -> None:
        """A strong access to a location at which ``published`` is known; updates that."""
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
        """Some threads of a block pass a barrier of theirs."""
        lanes = list(lanes)
        for rows in (self.known, self.handed, self.heard):
            rows.join(lanes)

    def knows(self, threads: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Up to which time each of ``threads`` knows the accesses of the thread of ``others``; both of the whole grid."""
        lanes = threads - self.first
        out = self.known.common[lanes // self.lanes, others]
        for k in np.flatnonzero(np.isin(lanes, list(self.known.alone))) if self.known.alone else ():
            out[k] = max(out[k], self.known.alone[int(lanes[k])][others[k]])
        return out
