"""The scheduler: all threads of several blocks as numpy lanes.

The lanes at the lowest program position run together until they branch or meet others, which reconverges them. Warp
instructions wait for the lanes they name, barriers for the block; when nothing can run, something is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import Fault
from .races import Order
from .values import RAW, U8, U32

if TYPE_CHECKING:
    from .program import Op
    from .runner import Run

BLOCKED = np.iinfo(np.int32).max


class Machine:
    """The state of a batch of blocks."""

    def __init__(self, run: Run, first: int, blocks: int):
        self.launch, self.program, self.memory = run, run.program, run.memory
        self.approx = run.approx
        self.first, self.blocks = first, blocks
        threads = int(np.prod(run.block))
        self.threads = threads
        self.warps = -(-threads // 32)  # of a block; the last one may have lanes without a thread
        self.block_lanes = 32 * self.warps
        n = self.total = blocks * self.block_lanes
        self.all = np.arange(n)
        self.thread = self.all % self.block_lanes
        self.local_block = self.all // self.block_lanes
        self.exists = self.thread < threads
        self.grid_lane = (self.all + first * self.block_lanes).astype(np.int32)
        self.alive = self.exists.copy()
        self.key = np.where(self.exists, self.program.start, BLOCKED).astype(np.int32)
        self.waits = np.full(n, -1, np.int32)  # position of the collective or barrier a lane waits at
        self.masks = np.zeros(n, U32)  # lane mask of that collective
        self.barrier = np.full(n, -1, np.int8)  # id of that barrier
        self.arrived: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self.regs = [np.zeros(n, RAW.get(size, np.bool_)) for size in self.program.register_size]
        self.carry = np.zeros(n, bool)
        self.votes = np.zeros(n, bool)  # operands of bar.red
        self.depth = np.zeros(n, np.int8)
        self.stack = np.zeros((n, 8), np.int32) if len(self.program.starts) > 1 else None
        # Rows are padded so that every block (thread) starts aligned; bounds are checked against the true size.
        self.shared_size = run.shared_size
        self.shared_row = -(-self.shared_size // 128) * 128
        self.shared = np.zeros(blocks * self.shared_row, U8)
        self.shared_state = np.zeros(blocks * self.shared_row, U8)
        self.local_row = -(-self.program.local // 32) * 32
        self.local = np.zeros(n * self.local_row, U8)
        self.shared_shadow = run.new_shadow(blocks * self.shared_row) if run.races else None
        self.order = Order(blocks, self.warps, first, run.grid_blocks, self.program.between_blocks)
        self.copies: list = []  # cp.async in flight
        self.groups = np.zeros(n, np.int32)  # committed groups of each lane
        self._special: dict[str, np.ndarray] = {}
        self.pc = self.steps = 0
        self.select(None)

    # -- lanes

    def select(self, ids: np.ndarray | None) -> None:
        """Makes these lanes (None: all) the active ones."""
        if ids is None or len(ids) == self.total:
            self.lanes: slice | np.ndarray = slice(None)
            self.ids = self.all
        else:
            self.lanes = self.ids = ids
        self.n = len(self.ids)

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Values of the active lanes as [warps, 32] over all warps, zero elsewhere."""
        full = np.zeros(self.total, values.dtype)
        full[self.lanes] = values
        return full.reshape(-1, 32)

    def present(self) -> np.ndarray:
        """Active lanes as [warps, 32] booleans."""
        return self.rows(np.ones(self.n, bool))

    def special(self, name: str) -> np.ndarray:
        """A special register over all lanes."""
        if name not in self._special:
            self._special[name] = self._compute_special(name).astype(U32)
        return self._special[name]

    def _compute_special(self, name: str) -> np.ndarray:
        base, _, axis = name[1:].partition(".")
        k = "xyz".find(axis) if axis else 0
        run, lane = self.launch, self.thread % 32
        if base in ("tid", "ctaid"):
            shape = run.block if base == "tid" else run.grid
            flat = self.thread if base == "tid" else self.local_block + self.first
            return flat // int(np.prod(shape[:k])) % shape[k]
        values = {
            "ntid": run.block[k],
            "nctaid": run.grid[k],
            "laneid": lane,
            "warpid": self.thread // 32,
            "nwarpid": self.warps,
            "dynamic_smem_size": run.shared,
            "total_smem_size": run.shared_size,
            "lanemask_eq": 1 << lane,
            "lanemask_lt": (1 << lane) - 1,
            "lanemask_le": (2 << lane) - 1,
            "lanemask_gt": 0xFFFFFFFF & ~((2 << lane) - 1),
            "lanemask_ge": 0xFFFFFFFF & ~((1 << lane) - 1),
        }
        return np.broadcast_to(values[base], (self.total,))

    # -- faults

    def where(self, lane: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Block and thread coordinates of a lane."""

        def coordinates(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
            return flat % shape[0], flat // shape[0] % shape[1], flat // (shape[0] * shape[1])

        block = coordinates(int(self.local_block[lane]) + self.first, self.launch.grid)
        return block, coordinates(int(self.thread[lane]), self.launch.block)

    def fault(self, kind: str, message: str, lane: int | None = None, pc: int | None = None) -> Fault:
        """A fault of the current instruction; `lane` is a lane number, not a position among the active ones."""
        op = self.program.code[self.pc if pc is None else pc]
        cta, thread = (None, None) if lane is None else self.where(int(lane))
        return Fault(kind, message, instruction=op.text, line=op.line, cta=cta, thread=thread)

    # -- running

    def run(self) -> None:
        """Runs all blocks of the batch to the end."""
        code, key, limit = self.program.code, self.key, self.launch.max_steps
        while True:
            p = int(key.min())
            if p == BLOCKED:
                if not self.alive.any():
                    return
                self._stuck()
                continue
            at = key == p
            count = int(np.count_nonzero(at))
            if count == self.total:
                self.select(None)
                join = BLOCKED
            else:
                self.select(np.flatnonzero(at))
                join = int(key[~at].min())
            while True:
                op = code[p]
                self.pc = p
                self.steps += 1
                if self.steps > limit:
                    raise self.fault("steps", f"more than {limit} steps; an endless loop?", self.ids[0])
                if op.control is not None:
                    self._control(op, p)
                    break
                if op.collective is not None:
                    if not (op.guard is None and self._simple(op)):
                        self._collect(op, p)
                        break
                    op.collective.run(self)
                elif op.guard is None:
                    op.step(self)
                else:
                    self._guarded(op)
                p += 1
                if p >= join:
                    key[self.lanes] = p
                    break

    def _taken(self, op: Op) -> np.ndarray:
        index, negated = op.guard
        taken = self.regs[index][self.lanes]
        return ~taken if negated else taken

    def _guarded(self, op: Op) -> None:
        taken = self._taken(op)
        if taken.all():
            op.step(self)
        elif taken.any():
            ids = self.ids
            self.select(ids[taken])
            op.step(self)
            self.select(ids)

    def _control(self, op: Op, p: int) -> None:
        if op.guard is not None:
            taken = self._taken(op)
            self.key[self.ids[~taken]] = p + 1
            self.select(self.ids[taken])
            if not self.n:
                return
        op.control.run(self, p)

    # -- warp instructions

    def _simple(self, op: Op) -> bool:
        """Whole warps are here and the instruction means all lanes: the usual case."""
        if not (op.collective.full or op.collective.members is None):
            return False
        if self.n == self.total:
            return True
        counts = np.bincount(self.ids >> 5)
        return bool(((counts == 0) | (counts == 32)).all())

    def _collect(self, op: Op, p: int) -> None:
        if op.guard is not None:
            taken = self._taken(op)
            self.key[self.ids[~taken]] = p + 1
            self.select(self.ids[taken])
        if self.n:
            members = op.collective.members
            self.masks[self.ids] = members(self) if members else U32(0xFFFFFFFF)
            outside = (self.masks[self.ids] >> (self.ids % 32).astype(U32)) & U32(1) == 0
            if outside.any():
                raise self.fault("collective", "a lane that its mask does not name", self.ids[outside][0])
            self.waits[self.ids] = p
            self.key[self.ids] = BLOCKED
        self._try(p)

    def _try(self, p: int) -> bool:
        """Runs the collective at p for every group of lanes that is complete; whether there was one."""
        op = self.program.code[p]
        bit = U32(1) << np.arange(32, dtype=U32)
        here = (self.waits == p).reshape(-1, 32)
        rows = np.flatnonzero(here.any(1))
        here, mask = here[rows], self.masks.reshape(-1, 32)[rows]
        alive = self.alive.reshape(-1, 32)[rows]
        same = here[:, None, :] & (mask[:, :, None] == mask[:, None, :])
        together = (same * bit).sum(2).astype(U32)
        living = (alive * bit).sum(1).astype(U32)[:, None]
        needed = mask & living
        gone = here & (mask & ~living != 0)
        if gone.any() and not op.collective.lenient:
            row, lane = np.argwhere(gone)[0]
            self.pc = p
            lost = np.flatnonzero(mask[row, lane] & ~living[row] & bit).tolist()
            raise self.fault("collective", f"lanes {lost} have left or never were", rows[row] * 32 + lane)
        ready = here & (needed & ~together == 0)
        if not ready.any():
            return False
        ids = (rows[:, None] * 32 + np.arange(32))[ready]
        self.waits[ids] = -1
        self.key[ids] = p + 1
        self.pc = p
        self.select(ids)
        op.collective.run(self)
        return True

    def _stuck(self) -> None:
        """Nothing can run: exits may have completed a collective; otherwise somebody waits in vain."""
        for p in np.unique(self.waits[(self.waits >= 0) & (self.barrier < 0)]):
            if self._try(int(p)):
                return
        waiting = np.flatnonzero((self.waits >= 0) & (self.barrier < 0))
        if waiting.size:
            lane = int(waiting[0])
            mates = np.arange(lane // 32 * 32, lane // 32 * 32 + 32)
            named = (self.masks[lane] >> (mates % 32).astype(U32)) & U32(1) != 0
            missing = mates[named & self.alive[mates] & (self.waits[mates] != self.waits[lane])] % 32
            raise self.fault("collective", f"lanes {missing.tolist()} never come", lane, int(self.waits[lane]))
        lane = int(np.flatnonzero(self.barrier >= 0)[0])
        block = self.local_block[lane]
        mates = self.exists & (self.local_block == block)
        elsewhere = np.unique(self.waits[mates & (self.waits >= 0)])
        gone = int((mates & ~self.alive).sum())
        why = f"{gone} threads of the block have left" if gone else "threads of the block wait at different barriers: "
        if not gone:
            why += "; ".join(f"{self.program.code[p].line} {self.program.code[p].text}" for p in elsewhere)
        raise self.fault("barrier", why, lane, int(self.waits[lane]))
