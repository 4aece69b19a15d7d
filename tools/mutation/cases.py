"""Calls whose kernels are mutated. Together they cover all mutated code, with sizes for which every loop runs more than once,
every lane has work and every mask has an effect."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from conformance import Expected, outputs
from ptx.runner import MAX_STEPS
from recorder import Toolchain
from torch import Tensor

from ctkernels import functional
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.hard_concrete import SAMPLE
from ctkernels.ops.hard_concrete.reference import uniform
from ctkernels.testing import Sample

FLOAT, DOUBLE, BF16, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16

VARIANTS = ("plain", "edges", "groups")
# On a GPU, Triton's partition gives small tensors loops of a single iteration.
LONG_LOOPS = {"PROGRAMS": 6, "SUMMING_PROGRAMS": 6, "MOST_STEPS": 8, "LEAST_ROWS": 3, "LEAST_SUMMED_ROWS": 3}


@dataclass(frozen=True)
class Case:
    """A call. ``make`` returns the sample of a variant. "edges" has the ends of every range, and infinities and NaN in separate
    channels, which must not affect others. "groups" has parameters for every row of the first dimension. ``truth``: the sample
    with the expected results, if different. ``more``: variants of other sizes, for mutants that ``variants`` do not detect; one
    extra dimension means groups, two mean groups with cyclically used parameters."""

    name: str
    toolchain: str
    op: str
    sm: int
    make: Callable[[str], Sample]
    truth: Callable[[str], Sample] | None = None
    long_loops: bool = False
    variants: tuple[str, ...] = VARIANTS[:2]
    more: tuple[str, ...] = ()

    def expected(self, variant: str) -> Expected:
        expected = Expected((self.truth or self.make)(variant))
        given = {"y", *(f"d{name}" for name in self.make(variant).tensors())}
        expected.truth = {key: value for key, value in expected.truth.items() if key in given}
        return expected

    def run(self, variant: str, rewrite: Callable[[str], str] = str, max_steps: int = MAX_STEPS) -> dict[str, Tensor]:
        """The results of the kernels, with their PTX changed by ``rewrite``."""
        with ExitStack() as stack:
            if self.long_loops:
                stack.enter_context(mock.patch.multiple("ctkernels.ops.channelwise.partition", **LONG_LOOPS))
                stack.enter_context(mock.patch("ctkernels.ops.channelwise.launch.LANES", 64))
            stack.enter_context(Toolchain(self.toolchain)(self.sm, rewrite=rewrite, max_steps=max_steps))
            return outputs(self.make(variant))


def _generator(variant: str) -> torch.Generator:
    return torch.Generator().manual_seed(VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS))


Shape = tuple[int, ...]


def _named(shapes: tuple[Shape, ...]) -> dict[str, Shape]:
    """Variants of other sizes: "2x5x301"."""
    return {"x".join(map(str, shape)): shape for shape in shapes}


def _normal(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def _knob(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 + 0.9 * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)


def _wide_range(g: torch.Generator, x: Tensor, channel_dim: int) -> Tensor:
    """Magnitudes from 1e-6 to 300 times x's; infinities in the first channel, NaN in the last."""
    scale = 10 ** (8.5 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 6)
    x = (x.double() * scale).to(x.dtype)
    first, last = x.select(channel_dim, 0), x.select(channel_dim, -1)
    first[..., -1] = float("inf")
    last[..., -1] = float("nan")
    return x


ENDS = torch.tensor([0.9, 0.0, 1.0, 1 - 2.0**-24, 0.5, 0.99, 1e-20, 0.3], dtype=torch.float64)


def _ctu(
    name: str, toolchain: str, sm: int, dtype: torch.dtype, usual: Shape, channel_dim: int, prologue: bool = False,
    long_loops: bool = True, more: tuple[Shape, ...] = (), **options: Any,
) -> Case:  # fmt: skip
    sizes = _named(more)

    def make(variant: str) -> Sample:
        shape = sizes.get(variant, usual)
        levels, channel = len(shape) - len(usual), channel_dim - len(usual)
        g, count = _generator(variant), shape[channel]
        x, wide = _normal(g, dtype, *shape), torch.float64 if dtype == torch.float64 else torch.float32
        beta, coeff = _knob(g, count, dtype=wide), _knob(g, count, dtype=wide)
        kwargs: dict[str, Any] = {"channel_dim": channel_dim, **options}
        if prologue:
            kwargs |= {"scale": _normal(g, torch.float32, count), "shift": _normal(g, torch.float32, count)}
            kwargs["residual"] = _normal(g, dtype, *shape)
        if options.get("activation") == "prelu":
            kwargs["negative_slope"] = _knob(g, count) * 1.5
        if variant == "edges":
            x = _wide_range(g, x, channel_dim)
            beta = ENDS.repeat(-(-count // 8))[:count].to(wide)
            beta[-1] = 0.9  # not the plain activation, whose parameters have no gradient even for NaN
            coeff = ENDS.roll(3).repeat(-(-count // 8))[:count].to(wide)
            if options.get("raw"):
                beta, coeff = 30 * _normal(g, wide, count), 10 * _normal(g, wide, count)
        if variant == "groups" or levels:
            groups = shape[levels - 1 if levels else 0]
            beta, coeff = (_knob(g, groups, count, dtype=wide) for _ in (0, 1))
            each = torch.func.vmap(partial(functional.ctu, channel_dim=channel, **options))
            if levels == 2:
                each = torch.func.vmap(each, in_dims=(0, None, None))
            return Sample(f"{name}, {variant}", each, (x, beta, coeff))
        return Sample(f"{name}, {variant}", functional.ctu, (x, beta, coeff), kwargs)

    long_loops = long_loops and toolchain == "triton"
    variants = VARIANTS if len(usual) >= 3 and not prologue and "activation" not in options else VARIANTS[:2]
    return Case(f"{toolchain}: {name}", toolchain, "ctu", sm, make, None, long_loops, variants, tuple(sizes))


def _head_edit(
    name: str, toolchain: str, sm: int, dtype: torch.dtype, usual: Shape, heads: int, adapters: int = 0,
    more: tuple[Shape, ...] = (),
) -> Case:  # fmt: skip
    sizes = _named(more)

    def make(variant: str) -> Sample:
        shape = sizes.get(variant, usual)
        g, outside = _generator(variant), len(shape) == 4
        dim = shape[-1] if outside else shape[-1] // heads
        lead = (adapters,) if adapters else ()
        kwargs: dict[str, Any] = {"head_axis": 1} if outside else {}
        if adapters:
            kwargs["index"] = torch.randint(adapters, shape[:1], generator=g)
        z, edits = _normal(g, dtype, *shape), [_normal(g, torch.float32, *lead, heads, dim) for _ in (0, 1)]
        gates = [_knob(g, *lead, heads) for _ in (0, 1)]
        if variant == "edges":
            z = _wide_range(g, z if outside else z.unflatten(-1, (heads, dim)), 1 if outside else -2).reshape(shape)
            gates = [t.where(torch.arange(heads) % 3 != i + 1, torch.tensor(float(i))) for i, t in enumerate(gates)]
        return Sample(f"{name}, {variant}", functional.head_edit, (z, *edits, *gates), kwargs)

    long_loops = toolchain == "triton"
    return Case(f"{toolchain}: {name}", toolchain, "head_edit", sm, make, None, long_loops, more=tuple(sizes))


def _from_seed(log_alpha: Tensor, seed: Tensor) -> Tensor:
    """The call that the public function makes on a GPU; for CPU tensors, it computes the noise itself."""
    return GATES((log_alpha, seed), (-1, SAMPLE, 0.33, -0.1, 1.1))


# With this seed, the noise is within 2^-16 of 0 or 1 at an even and at an odd position (a thread computes two neighbours).
SEED = -0x123456789ABD3A7


def _gates(name: str, toolchain: str, sm: int, seed: int | None = None, **options: Any) -> Case:
    """A case of gates; without options, of the probabilities of being open."""

    def make(variant: str, seeded: bool = seed is not None) -> Sample:
        g = _generator(variant)
        logits = _normal(g, FLOAT, 13, 43)
        noise = torch.rand(13, 43, generator=g, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).to(FLOAT)
        if seed is not None:
            noise = uniform(torch.tensor([seed]), logits.shape, FLOAT)
        if variant == "edges":
            special = [0.0, -40.0, 40.0, -800.0, 800.0, float("inf"), -float("inf"), float("nan"), 1e-30]
            logits.view(-1)[: 3 * len(special)] = torch.tensor(special * 3)
            if seed is None:
                noise.view(-1)[-6:] = torch.tensor([1e-30, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24])
            ends = (noise.view(-1) - 0.5).abs().topk(24).indices
            for at in (slice(-6, None), ends):  # gates that are not clipped
                logits.view(-1)[at] = 0.1 - noise.view(-1)[at].logit()
            if seed is None:  # settled, whatever the logit
                noise.view(-1)[40:42] = torch.tensor([0.0, 1.0])
        label = f"{name}, {variant}"
        if seeded:
            return Sample(label, _from_seed, (logits,), {"seed": torch.tensor([seed])})
        if not options:
            return Sample(label, functional.expected_l0, (logits,))
        return Sample(
            label, functional.hard_concrete, (logits,), options | {"noise": noise} if options["training"] else options
        )

    truth = None if seed is None else lambda variant: make(variant, seeded=False)
    return Case(f"{toolchain}: {name}", toolchain, "gates", sm, make, truth)


CASES = [
    # scalar constants, a tree of sums, slots, a finishing launch
    _ctu("planes", "triton", 80, FLOAT, (2, 9, 2500), 1),
    _ctu("planes, a group each", "triton", 90, BF16, (3, 9, 1100), 1),
    _ctu("planes, groups of rows", "triton", 80, FLOAT, (4, 2, 3, 600), 2, more=((2, 4, 2, 4, 600),)),
    # constants per lane; several periods side by side
    _ctu("channels inside", "triton", 100, FLOAT, (70, 650), 1),
    _ctu("few channels inside", "triton", 90, BF16, (700, 19), 1),
    _ctu("one launch", "triton", 80, HALF, (7, 9, 70), 1, long_loops=False),
    _ctu("logits", "triton", 90, FLOAT, (3, 9, 1100), 1, raw=True),
    _ctu("prologue", "triton", 90, FLOAT, (70, 130), 1, prologue=True),
    _ctu("prelu", "triton", 80, FLOAT, (2, 9, 2100), 1, activation="prelu"),
    _ctu("relu6", "triton", 80, FLOAT, (2, 9, 2100), 1, activation="relu6"),
    _ctu("gelu", "triton", 90, HALF, (2, 9, 2100), 1, activation="gelu"),
    _ctu("gelu, float", "triton", 100, FLOAT, (2, 9, 2100), 1, activation="gelu"),
    _ctu("gelu by tanh", "triton", 80, FLOAT, (2, 9, 2100), 1, activation="gelu_tanh"),
    _ctu("float64", "triton", 80, DOUBLE, (2, 3, 700), 1),
    _head_edit("heads side by side", "triton", 80, FLOAT, (2, 70, 6 * 44), 6),
    _head_edit("tokens between heads", "triton", 90, BF16, (3, 4, 91, 64), 4),
    _head_edit("an edit for every sample", "triton", 100, FLOAT, (3, 70, 4 * 64), 4, adapters=5),
    _gates("gates from noise", "triton", 80, training=True),
    _gates("gates from a seed", "triton", 90, seed=SEED, training=True),
    _gates("mean gates", "triton", 100, training=False, estimator="mean"),
    _gates("clipped gates", "triton", 90, training=False),
    _gates("open gates", "triton", 80),
    _ctu("planes", "cuda", 80, FLOAT, (2, 5, 8704), 1),
    _ctu("planes, groups of rows", "cuda", 80, FLOAT, (3, 2, 2, 8704), 2),
    _ctu("planes, any start", "cuda", 90, FLOAT, (36, 5, 301), 1, more=((700, 19, 1), (2, 3, 5001))),
    _ctu("planes, sixteen bits", "cuda", 90, BF16, (36, 5, 1104), 1, more=((2, 3, 8704),)),
    _ctu("channels inside", "cuda", 100, FLOAT, (70, 652), 1, more=((70, 640), (700, 20), (3, 70, 640))),
    _ctu("few channels inside", "cuda", 80, FLOAT, (700, 19), 1, more=((70, 652),)),
    _ctu("logits", "cuda", 80, FLOAT, (3, 9, 1104), 1, raw=True, more=((2, 3, 2, 5, 320),)),
    _ctu("prologue", "cuda", 90, FLOAT, (70, 132), 1, prologue=True, more=((70, 652),)),
    _ctu("prelu", "cuda", 90, FLOAT, (36, 5, 304), 1, activation="prelu", more=((2, 3, 17408), (2, 3, 2, 5, 304))),
    _ctu("gelu", "cuda", 80, BF16, (36, 5, 304), 1, activation="gelu", more=((1, 2, 34816), (2, 3, 2, 5, 304))),
    _ctu(
        "gelu by tanh",
        "cuda",
        90,
        FLOAT,
        (36, 5, 304),
        1,
        activation="gelu_tanh",
        more=((2, 3, 17408), (2, 3, 2, 5, 304)),
    ),
    _head_edit("heads side by side", "cuda", 100, FLOAT, (2, 70, 6 * 44), 6),
    _head_edit("tokens between heads", "cuda", 90, BF16, (3, 2, 20, 1088), 2),
    _head_edit("an edit for every sample", "cuda", 100, FLOAT, (3, 70, 4 * 64), 4, adapters=5),
    _gates("gates from noise", "cuda", 90, training=True),
    _gates("gates from a seed", "cuda", 90, seed=SEED, training=True),
    _gates("mean gates", "cuda", 90, training=False, estimator="mean"),
    _gates("clipped gates", "cuda", 90, training=False),
    _gates("open gates", "cuda", 90),
]
