"""Calls of attention_head_edit that together cover every path, with independently written expected results."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctkernels.testing import assert_no_worse

NAMES = ("q", "k", "v", "m", "a", "g_m", "g_a")


@dataclass
class Case:
    """A call: sizes (B, H, G, T, S, D, E), options of the function, and the additional mask."""

    name: str
    sizes: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    mask: str | None = None
    lengths: tuple[list[int], list[int]] | None = None
    absent: tuple[str, ...] = ()
    layout: str = "heads first"
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        batch, heads, groups, tokens, keys, dim, size = self.sizes
        generator = torch.Generator().manual_seed(self.seed)

        def data(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        if self.lengths:
            q, k, v = (data(sum(n), h, d) for n, h, d in zip(
                (self.lengths[0], self.lengths[1], self.lengths[1]), (heads, groups, groups), (dim, dim, size)
            ))  # fmt: skip
        elif self.layout == "tokens first":
            shapes = ((tokens, heads, dim), (keys, groups, dim), (keys, groups, size))
            q, k, v = (data(batch, *s).transpose(1, 2) for s in shapes)
        else:
            q, k, v = data(batch, heads, tokens, dim), data(batch, groups, keys, dim), data(batch, groups, keys, size)
        edits = {"m": data(heads, size), "a": data(heads, size), "g_m": data(heads), "g_a": data(heads)}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found: dict[str, Tensor | None] = {n: t.to(dtype) for n, t in zip("qkv", (q, k, v))}
        return found | {n: None if n in self.absent else t.to(wide) for n, t in edits.items()}

    def attn_mask(self) -> Tensor | None:
        batch, heads, _, tokens, keys = self.sizes[:5]
        generator = torch.Generator().manual_seed(self.seed + 1)
        if self.mask == "padding":  # all sequences but the first are left-padded
            lengths = torch.tensor([keys, *(max(1, keys - 3 * b) for b in range(1, batch))])
            return (torch.arange(keys) >= keys - lengths[:, None])[:, None, None, :]
        if self.mask == "random":  # some queries have no keys
            mask = torch.rand(batch, heads, tokens, keys, generator=generator) < 0.6
            mask[:, :, 0] = False
            return mask
        if self.mask == "bias":
            return torch.randn(1, heads, tokens, keys, generator=generator)
        return None

    def arguments(self) -> dict[str, Any]:
        found = dict(self.options)
        if self.lengths:
            starts = tuple(torch.tensor([0, *n]).cumsum(0).int() for n in self.lengths)
            found |= {"cu_seqlens": starts, "max_seqlen": tuple(max(n) for n in self.lengths)}
        if self.mask:
            found["attn_mask"] = self.attn_mask()
        if self.sizes[1] != self.sizes[2]:
            found["enable_gqa"] = True
        return found

    def plain(self, q: Tensor, k: Tensor, v: Tensor, m: Any, a: Any, g_m: Any, g_a: Any) -> Tensor:
        """The definition, with an explicit mask, for tensors of any dtype; the edit in float32 or wider."""
        if self.lengths:
            parts, at_q, at_k = [], 0, 0
            for tokens, keys in zip(*self.lengths):
                one = (t[s][None].transpose(1, 2) for t, s in (
                    (q, slice(at_q, at_q + tokens)), (k, slice(at_k, at_k + keys)), (v, slice(at_k, at_k + keys))
                ))  # fmt: skip
                parts.append(self._attention(*one)[0].transpose(0, 1))
                at_q, at_k = at_q + tokens, at_k + keys
            z = torch.cat(parts).transpose(0, 1)
        else:
            z = self._attention(q, k, v)
        gate = {"m": 1.0 if g_m is None else g_m[:, None, None], "a": 1.0 if g_a is None else g_a[:, None, None]}
        p = 1.0 if m is None else 1 + gate["m"] * m[:, None, :]
        y = z.to(torch.float64 if q.dtype == torch.float64 else torch.float32) * p
        y = (y if a is None else y + gate["a"] * a[:, None, :]).to(q.dtype)
        return y.transpose(0, 1) if self.lengths else y

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, tokens, keys = q.shape[1], q.shape[2], k.shape[2]
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        causal, window = self.options.get("is_causal", False), self.options.get("window")
        seen = torch.zeros(tokens, keys, dtype=torch.bool)
        for i in range(tokens):
            for j in range(keys):
                d = j - (i + keys - tokens)
                seen[i, j] = not (causal and d > 0) and not (window and abs(d) >= window)
        scale = self.options.get("scale", 1 / math.sqrt(q.shape[-1]))
        s = scale * (q @ k.mT)
        mask = self.attn_mask()
        if mask is not None and mask.dtype != torch.bool:
            s, mask = s + mask.to(s.dtype), None
        seen = seen if mask is None else seen & mask
        weights = s.masked_fill(~seen, -math.inf).softmax(-1)
        return weights.masked_fill(~seen, 0.0).nan_to_num() @ v


def leaves(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}


def results(
    function: Any, tensors: dict[str, Tensor | None], *, upstream: torch.dtype, **arguments: Any
) -> dict[str, Tensor]:
    """The result and the gradient of every tensor, for a fixed upstream gradient, rounded to dtype ``upstream`` first."""
    own = leaves(tensors)
    y = function(**own, **arguments)
    generator = torch.Generator().manual_seed(99)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(upstream).to(y.dtype)
    given = {n: t for n, t in own.items() if t is not None}
    grads = torch.autograd.grad(y, list(given.values()), dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(given, grads)}}


def check(case: Case, dtype: torch.dtype, found: dict[str, Tensor]) -> None:
    """Compare ``found``, from :func:`results`, with float64, allowing for the error of the definition in ``dtype``."""
    wide = {n: None if t is None else t.double() for n, t in case.tensors(dtype).items()}
    truth = results(case.plain, wide, upstream=dtype)
    baseline = results(case.plain, case.tensors(dtype), upstream=dtype)
    assert found.keys() == truth.keys()
    for key, value in found.items():
        # Sums of many terms can cancel: allow an ulp of the largest value for each of the four successive sums (scores,
        # weights, output, edit), where nothing coarser than the sums is rounded.
        terms = 1 + truth[key].abs().max().item()
        grade = (1 if dtype in (torch.bfloat16, torch.float16) else 4) * torch.finfo(dtype).eps
        assert_no_worse(f"{case.name}: {key}", value, truth[key], baseline[key], terms, grade)
