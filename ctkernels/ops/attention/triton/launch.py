"""Launches of the attention kernels. Imported on the first CUDA call. Tiles and splits depend on the shape alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ... import launcher
from ..problem import KEEP_LSE, KEEP_Z, Problem, lse_for, result_for
from ..reference import LOG2E, UNBOUNDED
from .backward import edit_kernel, keys_kernel, prepare_kernel, queries_kernel
from .decode import join_kernel, split_kernel
from .forward import forward_kernel

PROGRAMS = 256  # enough to keep a GPU busy: with fewer, decoding splits the keys
FEW_ROWS = 64  # at most this many query rows per key head make a call decoding
PREPARED = 8192  # values per program of `prepare_kernel`, of at most 64 queries
# For sums of products across lanes: a product fused into the first addition would leave lanes with different roundings.
_SUMMING = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Tile:
    """Queries (m) and keys (n) per step, warps, and pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int

    def meta(self, *names: str) -> dict[str, int]:
        sizes = {"M": self.m, "N": self.n}
        return {n: sizes[n] for n in names} | {"num_warps": self.warps, "num_stages": self.stages}


# By the larger padded head size. Shared memory per block stays below 99 KiB, the limit of the smallest of NVIDIA's GPUs; as AMD's
# compiler lays them out, below its 64 KiB.
_HALF = {"forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
         "queries": {64: Tile(128, 64, 8, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
         "keys": {64: Tile(64, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 32, 4, 1)},
         "split": {64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 2), 256: Tile(16, 32, 4, 2)}}  # fmt: skip
_FLOAT = {"forward": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
          "queries": {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
          "keys": {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
          "split": {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 1)}}  # fmt: skip


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def tile_for(kernel: str, problem: Problem) -> Tile:
    width = max(64, padded(problem.q.shape[-1]), padded(problem.v.shape[-1]))
    tile = (_FLOAT if problem.q.dtype == torch.float32 else _HALF)[kernel][width]
    # a mask with a row per query is loaded value by value, unrolled: a large tile would bloat the code
    return replace(tile, m=min(tile.m, 64)) if problem.mask is not None and problem.mask.stride(2) != 0 else tile


def _strides(name: str, t: Tensor | None) -> dict[str, int]:
    """Strides of (B, H, T, D) or packed (T, H, D), as kernel arguments."""
    batch, head, row = (0, 0, 0) if t is None else (0, t.stride(1), t.stride(0)) if t.dim() == 3 else t.stride()[:3]
    return {f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": row}


def _lse_strides(t: Tensor | None) -> dict[str, int]:
    batch, head = (0, 0) if t is None else (0, t.stride(0)) if t.dim() == 2 else t.stride()[:2]
    return {"lse_batch": batch, "lse_head": head}


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


class _Operands:
    """A problem's tensors and sizes as kernel arguments."""

    def __init__(self, problem: Problem):
        q, k, v = (_dense_rows(t) for t in problem[:3])
        edits = [t if t is None else t.contiguous() for t in problem.edits]
        mask = problem.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        m, a, g_m, g_a = edits
        self.p = problem._replace(q=q, k=k, v=v, m=m, a=a, g_m=g_m, g_a=g_a)
        self.heads, self.group = q.shape[1], q.shape[1] // k.shape[1]
        packed = problem.packed
        if packed is not None:
            self.batch, self.tokens, self.keys = packed.starts_q.shape[0] - 1, packed.longest_q, packed.longest_k
        else:
            self.batch, self.tokens, self.keys = q.shape[0], q.shape[2], k.shape[2]
        self.edits = dict(zip(("m", "a", "g_m", "g_a"), edits))
        self.starts = {"starts_q": self.p.starts_q, "starts_k": self.p.starts_k}
        strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.mask = dict(zip(("mask_batch", "mask_head", "mask_row", "mask_col"), strides)) | {"mask": mask}
        self.device = launcher.guard(q)

    def inputs(self) -> dict[str, Any]:
        p = self.p
        args: dict[str, Any] = {"q": p.q, "k": p.k, "v": p.v, **self.mask, "factor": p.scale * LOG2E}
        args |= {"left": max(p.left, 0), "right": max(p.right, 0), "tokens": self.tokens, "keys": self.keys}
        args |= {"heads": self.heads, "group": self.group}
        return args | _strides("q", p.q) | _strides("k", p.k) | _strides("v", p.v)

    def sizes(self) -> dict[str, int]:
        size = self.p.v.shape[-1]
        return {"E": size, "BE": padded(size)}

    def meta(self) -> dict[str, Any]:
        p = self.p
        precision = "tf32x3" if p.q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"
        if torch.version.hip:  # AMD's matrix units multiply float32 as it is
            precision = "ieee"
        meta = {"LEFT": p.left != UNBOUNDED, "RIGHT": p.right != UNBOUNDED, "PRECISION": precision}
        meta["KIND"] = 0 if p.mask is None else (p.mask.dtype == torch.bool) + 2 * (p.mask.stride(2) != 0)
        return meta | {"D": p.q.shape[-1], "BD": padded(p.q.shape[-1])} | self.sizes()


def splits_for(problem: Problem, rows: int, programs: int, keys: int) -> int:
    """Number of programs that share the keys of a decoding call; 0 for other calls."""
    if problem.packed is not None or rows > FEW_ROWS:
        return 0
    return max(1, min(PROGRAMS // max(programs, 1), keys // (4 * tile_for("split", problem).n)))


def forward(problem: Problem, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ops = _Operands(problem)
    p = ops.p
    y = result_for(p.q, p.v.shape[-1])
    z = result_for(p.q, p.v.shape[-1]) if keep & KEEP_Z else None
    lse = lse_for(p.q) if keep & KEEP_LSE else None
    outputs = {"y": y, "z": z, "lse": lse} | ops.edits | _strides("y", y)
    rows = ops.tokens * ops.group
    tile = tile_for("split", problem)
    blocks = triton.cdiv(rows, tile.m)
    splits = splits_for(problem, rows, blocks * ops.batch * ops.heads // ops.group, ops.keys)
    with ops.device:
        if splits:
            _decode(ops, outputs, tile, blocks, splits)
        else:
            tile = tile_for("forward", problem)
            blocks = triton.cdiv(ops.tokens, tile.m)
            args = ops.inputs() | outputs | ops.starts | _lse_strides(lse) | {"blocks": blocks}
            launcher.launch(forward_kernel, blocks * ops.heads * ops.batch, args, ops.meta() | tile.meta("M", "N"))
    empty = y.new_empty((0,))
    return y, empty if z is None else z, lse_for(p.q).new_empty((0,)) if lse is None else lse


def _decode(ops: _Operands, outputs: dict[str, Any], tile: Tile, blocks: int, splits: int) -> None:
    p, rows = ops.p, ops.batch * ops.heads * ops.tokens
    per_split = triton.cdiv(triton.cdiv(ops.keys, tile.n), splits) * tile.n
    part = p.q.new_empty((splits, rows, p.v.shape[-1]), dtype=torch.float32)
    part_max, part_sum = (p.q.new_empty((splits, rows), dtype=torch.float32) for _ in range(2))
    parts = {"part": part, "part_max": part_max, "part_sum": part_sum, "splits": splits}
    args = ops.inputs() | parts | {"blocks": blocks, "per_split": per_split}
    grid = splits * blocks * ops.batch * ops.heads // ops.group
    launcher.launch(split_kernel, grid, args, ops.meta() | tile.meta("M", "N"))
    m = min(16, triton.next_power_of_2(ops.tokens))
    args = parts | outputs | {"heads": ops.heads, "tokens": ops.tokens, "rows": rows}
    grid = ops.batch * ops.heads * triton.cdiv(ops.tokens, m)
    launcher.launch(join_kernel, grid, args, ops.sizes() | {"M": m, "num_warps": 4})


def backward(dy: Tensor, z: Tensor, lse: Tensor, problem: Problem, grad_mask: int) -> list[Tensor]:
    ops = _Operands(problem)
    p = ops.p
    dy = _dense_rows(dy)
    inner = grad_mask & 0b111
    delta = lse_for(p.q) if inner else None
    dz = result_for(p.q, p.v.shape[-1]) if inner and p.m is not None else None
    grads: dict[int, Tensor] = {i: torch.empty_like(p[i]) for i in range(3, 7) if grad_mask >> i & 1}  # type: ignore[arg-type]
    with ops.device:
        _prepare(ops, dy, z, dz, delta, grads)
        if dz is None:
            dz = dy
        if grad_mask & 0b110:
            grads |= _key_gradients(ops, dz, lse, delta, grad_mask)
        if grad_mask & 0b001:
            grads[0] = _query_gradient(ops, dz, lse, delta)
    return [grads[i] for i in range(7) if grad_mask >> i & 1]


def _prepare(
    ops: _Operands, dy: Tensor, z: Tensor, dz: Tensor | None, delta: Tensor | None, grads: dict[int, Tensor]
) -> None:
    p = ops.p
    size = p.v.shape[-1]
    m = min(64, PREPARED // padded(size))
    blocks = triton.cdiv(ops.tokens, m)
    slots = ops.batch * blocks
    scaled = z.numel() > 0
    partial = p.q.new_empty((slots, ops.heads, 2, size), dtype=torch.float32) if grads else None
    args: dict[str, Any] = {"z": z if scaled else None, "dy": dy, "dz": dz, "delta": delta, "partial": partial}
    args |= {"m": p.m, "g_m": p.g_m, "starts_q": p.starts_q}
    args |= {"heads": ops.heads, "tokens": ops.tokens, "blocks": blocks}
    args |= _strides("z", z if scaled else None) | _strides("dy", dy) | _strides("dz", dz)
    args |= {name.replace("lse", "delta"): value for name, value in _lse_strides(delta).items()}
    launcher.launch(prepare_kernel, slots * ops.heads, args, ops.sizes() | {"M": m, **_SUMMING})
    if partial is not None:
        outputs = {name: grads.get(3 + i) for i, name in enumerate(("dm", "da", "dg_m", "dg_a"))}
        args = {"partial": partial} | ops.edits | outputs | {"heads": ops.heads, "slots": slots}
        rows = min(max(1, 4096 // padded(size)), triton.next_power_of_2(slots))
        launcher.launch(edit_kernel, ops.heads, args, ops.sizes() | {"SCALED": scaled, "ROWS": rows, **_SUMMING})


def _backward_args(ops: _Operands, dz: Tensor, lse: Tensor, delta: Tensor | None) -> dict[str, Any]:
    args = ops.inputs() | ops.starts | {"dz": dz, "lse": lse, "delta": delta}
    return args | {"scale": ops.p.scale} | _strides("dz", dz) | _lse_strides(lse)


def _key_gradients(ops: _Operands, dz: Tensor, lse: Tensor, delta: Tensor | None, grad_mask: int) -> dict[int, Tensor]:
    p, tile = ops.p, tile_for("keys", ops.p)
    like = (p.k, p.v)
    if ops.group == 1:
        dk, dv = (result_for(t, t.shape[-1]) for t in like)
    else:  # per query head; summed below
        shape = (p.k.shape[0], ops.heads) if p.packed is not None else (p.k.shape[0], ops.heads, p.k.shape[2])
        dk, dv = (result_for(p.k.new_empty((*shape, 1)), t.shape[-1], torch.float32) for t in like)
    blocks = triton.cdiv(ops.keys, tile.n)
    args = _backward_args(ops, dz, lse, delta) | {"dk": dk, "dv": dv, "blocks": blocks}
    args |= _strides("dk", dk) | _strides("dv", dv)
    launcher.launch(keys_kernel, blocks * ops.heads * ops.batch, args, ops.meta() | tile.meta("M", "N"))
    if ops.group > 1:
        sums = (t.unflatten(1, (-1, ops.group)).sum(2) for t in (dk, dv))
        dk, dv = (result_for(t, t.shape[-1]).copy_(s) for t, s in zip(like, sums))
    return {i: g for i, g in ((1, dk), (2, dv)) if grad_mask >> i & 1}


def _query_gradient(ops: _Operands, dz: Tensor, lse: Tensor, delta: Tensor | None) -> Tensor:
    tile = tile_for("queries", ops.p)
    dq = result_for(ops.p.q, ops.p.q.shape[-1])
    blocks = triton.cdiv(ops.tokens, tile.m)
    args = _backward_args(ops, dz, lse, delta) | {"dq": dq, "blocks": blocks} | _strides("dq", dq)
    launcher.launch(queries_kernel, blocks * ops.heads * ops.batch, args, ops.meta() | tile.meta("M", "N"))
    return dq
