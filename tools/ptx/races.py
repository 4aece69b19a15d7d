"""Who touched which memory cell last, and whether anything orders the next access after it.

Time is a counter that steps at every synchronisation. `Order` keeps, for each pair of warps of a block, up to which
time the one has seen the other's accesses (a barrier, or `bar.warp.sync` for a warp and itself), and for blocks that
talk through fences and atomics, the same between threads (`between_blocks`). An access conflicts with an earlier one of
another thread unless it has seen that time. Only the order the program guarantees counts, never the order in which the
executor happened to run.
"""

from __future__ import annotations

import numpy as np

from .between_blocks import BetweenBlocks

NONE, SEVERAL, BLOCKS = -1, -2, -3  # a cell's reader: nobody, several threads of one block, several blocks

PLAIN, BLOCK_ATOMIC, ATOMIC = 0, 1, 2  # how strong an access is: atomics of .cta scope only count inside their block


class Order:
    """What has been synchronised with what, for the blocks that run together."""

    def __init__(self, blocks: int, warps: int, first_block: int, grid_blocks: int, between_blocks: bool):
        self.now = 1
        self.warps, self.first = warps, first_block
        self.seen = np.zeros((blocks, warps, warps), np.int64)  # [block, warp, other warp of the block]
        self.pairs: dict[int, np.ndarray] = {}  # per warp: [lane, other lane], for bar.warp.sync of a part
        self.between = BetweenBlocks(blocks, 32 * warps, first_block, grid_blocks) if between_blocks else None

    def tick(self) -> int:
        """A new moment."""
        self.now += 1
        return self.now

    def barrier(self, blocks: np.ndarray) -> None:
        """Whole blocks pass a barrier."""
        self.seen[blocks] = self.tick()
        if self.between is not None:
            self.between.barrier(int(b) for b in np.atleast_1d(blocks))

    def contribution(self, block: int, warp: int) -> np.ndarray:
        """What a warp brings to a barrier it arrives at: all it has seen and done so far."""
        row = self.seen[block, warp].copy()
        row[warp] = self.tick()
        return row

    def release(self, block: int, warp: int, joined: np.ndarray) -> None:
        """A warp leaves a barrier knowing what all arrivals brought."""
        np.maximum(self.seen[block, warp], joined, out=self.seen[block, warp])

    def warp_sync(self, warps: np.ndarray, members: np.ndarray) -> None:
        """bar.warp.sync: global warp numbers and, for each, the boolean [32] of lanes that take part."""
        now = self.tick()
        whole = members.all(1)
        w = warps[whole]
        self.seen[w // self.warps, w % self.warps, w % self.warps] = now
        for warp, lanes in zip(warps[~whole], members[~whole]):
            table = self.pairs.setdefault(int(warp), np.zeros((32, 32), np.int64))
            known = table[lanes].max(0)
            known[lanes] = now
            table[lanes] = np.maximum(table[lanes], known)
        if self.between is not None:
            for warp, lanes in zip(warps, members):
                self.between.join(int(warp) * 32 + int(lane) for lane in np.flatnonzero(lanes))

    # -- between blocks

    def _seen_by(self, lane: int) -> np.ndarray:
        """The time up to which a thread has seen the accesses of each lane of its block."""
        block, warp = lane // (32 * self.warps), lane // 32 % self.warps
        seen = np.repeat(self.seen[block, warp], 32)
        table = self.pairs.get(lane // 32)
        if table is not None:
            own = slice(32 * warp, 32 * warp + 32)
            seen[own] = np.maximum(seen[own], table[lane % 32])
        return seen

    def fence(self, lanes: np.ndarray, sequential: bool) -> None:
        """A fence, by each of these lanes."""
        if self.between is not None:
            now = self.tick()
            for lane in map(int, lanes):
                self.between.fence(lane, self._seen_by(lane), now, sequential)

    def strong(self, lane: int, published: np.ndarray, release: bool, acquire: bool) -> None:
        """A strong access of a lane to a location whose published knowledge is a row; updates that."""
        assert self.between is not None
        self.between.access(lane, self._seen_by(lane), self.tick(), published, release, acquire)


class Shadow:
    """Last writer and readers of each cell of one piece of memory. Threads are numbered over the whole grid."""

    def __init__(self, cells: int, lanes_per_block: int):
        self.lanes = lanes_per_block
        self.writer = np.full(cells, NONE, np.int32)
        self.wrote = np.zeros(cells, np.int32)
        self.strength = np.zeros(cells, np.int8)
        self.reader = np.full(cells, NONE, np.int32)
        self.read = np.zeros(cells, np.int32)
        self.read_block = np.zeros(cells, np.int32)
        self.read_warps = np.zeros(cells, np.uint32)

    def _unordered(self, order: Order, me: np.ndarray, other: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Whether accesses of single threads `other` at `time` are unordered with the access of `me` now."""
        block, other_block = me // self.lanes, other // self.lanes
        same = block == other_block
        out = np.ones(len(me), bool)
        if same.any():
            mine = me[same] % self.lanes
            theirs = other[same] % self.lanes
            b = block[same] - order.first
            late = order.seen[b, mine // 32, theirs // 32] <= time[same]
            if order.pairs and late.any():
                for k in np.flatnonzero(late & (mine // 32 == theirs // 32)):
                    table = order.pairs.get(int(b[k] * order.warps + mine[k] // 32))
                    if table is not None and table[mine[k] % 32, theirs[k] % 32] > time[same][k]:
                        late[k] = False
            out[same] = late
        if order.between is not None and not same.all():
            d = ~same
            out[d] = order.between.knows(me[d], other[d]) <= time[d]
        return out & (me != other)

    def _readers_unordered(self, order: Order, cells: np.ndarray, me: np.ndarray) -> np.ndarray:
        """Whether any recorded reader of the cells is another thread, unordered with `me`."""
        reader = self.reader[cells]
        out = np.zeros(len(cells), bool)
        single = np.flatnonzero((reader >= 0) & (reader != me))
        if single.size:
            out[single] = self._unordered(order, me[single], reader[single], self.read[cells[single]])
        several = np.flatnonzero(reader == SEVERAL)
        if several.size:
            c, t = cells[several], me[several]
            same = t // self.lanes == self.read_block[c]
            late = np.ones(len(c), bool)
            if same.any():
                b, w = t[same] // self.lanes - order.first, t[same] % self.lanes // 32
                stale = order.seen[b, w] <= self.read[c[same], None]
                bits = (stale * (np.uint32(1) << np.arange(order.warps, dtype=np.uint32))).sum(1).astype(np.uint32)
                late[same] = bits & self.read_warps[c[same]] != 0
            if order.between is not None and not same.all():
                for k in np.flatnonzero(~same):  # which lanes of a warp have read is not known: all of them
                    warps = np.flatnonzero(self.read_warps[c[k]] >> np.arange(order.warps, dtype=np.uint32) & 1)
                    lanes = (self.read_block[c[k]] * self.lanes + 32 * warps[:, None] + np.arange(32)).reshape(-1)
                    late[k] = (order.between.knows(np.repeat(t[k], len(lanes)), lanes) <= self.read[c[k]]).any()
            out[several] = late
        blocks = reader == BLOCKS
        for k in np.flatnonzero(blocks):  # nor which blocks: one of them
            row = None if order.between is None else order.between.known.of(int(me[k]) - order.between.first)
            out[k] = row is None or row.max() <= self.read[cells[k]]
        return out

    def check_writer(self, order: Order, cells: np.ndarray, me: np.ndarray, strength: int) -> np.ndarray | None:
        """Positions at which the last write conflicts with the access of `me`, or None."""
        writer = self.writer[cells]
        k = np.flatnonzero((writer != NONE) & (writer != me))
        if not k.size:
            return None
        if strength:  # two strong accesses never race, if each one's scope covers the other
            both = self.strength[cells[k]]
            same_block = writer[k] // self.lanes == me[k] // self.lanes
            k = k[~(((both == ATOMIC) & (strength == ATOMIC)) | (same_block & (both > 0)))]
        k = k[self._unordered(order, me[k], writer[k], self.wrote[cells[k]])]
        return k if k.size else None

    def on_read(self, order: Order, cells: np.ndarray, me: np.ndarray, strength: int = PLAIN) -> int | None:
        """Records reads. Returns the position of one that races with a write, or None."""
        bad = self.check_writer(order, cells, me, strength)
        if bad is not None:
            return int(bad[0])
        if strength:
            return None
        reader = self.reader[cells]
        fresh = (reader == NONE) | (reader == me)
        if not fresh.all():
            old = np.flatnonzero(~fresh)
            fresh[old] = ~self._readers_unordered(order, cells[old], me[old])
        block, warp = me // self.lanes, me % self.lanes // 32
        f = cells if fresh.all() else cells[fresh]
        b = block if fresh.all() else block[fresh]
        self.reader[f] = me if fresh.all() else me[fresh]
        self.read_block[f] = b
        self.read_warps[f] = 0
        self.read[cells] = order.now
        np.bitwise_or.at(self.read_warps, cells, np.uint32(1) << warp.astype(np.uint32))
        back = self.reader[cells]
        shared = np.flatnonzero((back != me) & (back != BLOCKS))
        if shared.size:
            c = cells[shared]
            other = self.read_block[c] != block[shared]
            self.reader[c] = SEVERAL
            self.reader[c[other]] = BLOCKS
        return None

    def on_write(
        self, order: Order, cells: np.ndarray, me: np.ndarray, strength: int = PLAIN
    ) -> tuple[int | None, np.ndarray | None]:
        """Records writes.

        Returns the position of one that races with an earlier access (or None), and the positions of writes that
        hit the same cell as another lane of this very instruction (or None).
        """
        bad = self.check_writer(order, cells, me, strength)
        if bad is None:
            late = self._readers_unordered(order, cells, me)
            if late.any():
                bad = np.flatnonzero(late)
        if bad is not None:
            return int(bad[0]), None
        self.writer[cells] = me
        self.wrote[cells] = order.now
        self.strength[cells] = strength
        self.reader[cells] = NONE
        back = self.writer[cells]
        if strength == ATOMIC:
            return None, None
        twice = np.flatnonzero(back != me)
        return None, twice if twice.size else None

    def describe(self, cell: int) -> str:
        """The last accesses of a cell, for a message."""

        def who(thread: int) -> str:
            return f"thread {thread % self.lanes} of block {thread // self.lanes}"

        parts = []
        if self.writer[cell] != NONE:
            parts.append(f"written by {who(int(self.writer[cell]))}")
        reader = int(self.reader[cell])
        if reader != NONE:
            parts.append("read by " + (who(reader) if reader >= 0 else "several threads"))
        return ", ".join(parts)
