"""Random calls of the public functions, as plain data. A case is determined by (seed, number) on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from ctkernels.ops.ctu.op import ACTIVATIONS

from .tensors import SPECIAL, Spec

DTYPES = ("float32", "float32", "float64", "bfloat16", "float16")
MEMBERS = tuple(ACTIVATIONS)
OPTIONS = ("channel_dim", "activation", "eps", "head_dim", "head_axis", "window", "scale")
OPTIONS += ("implementation", "temperature", "stretch", "estimator")
BROKEN = "an argument is wrong: "
OPS = ("ctu", "ctu_and_mul", "head_edit", "hard_concrete", "expected_l0", "attention_head_edit")


@dataclass(frozen=True)
class Case:
    """A call ``op(**arguments, **options)``; specs are replaced by tensors.

    backend: forced backend, or None. mode: "grad", "no_grad" or "inference". upstream: kind of upstream gradient, "normal",
    "zero" or "expanded". refused: why the call has to raise, "" if it must not, "?" if it may.
    """

    op: str
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None
    mode: str = "grad"
    upstream: str = "normal"
    threads: int = 1
    refused: str = ""

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: a for name, a in self.arguments.items() if isinstance(a, Spec)}

    @property
    def target(self) -> str:
        """The argument that the call overwrites, or ""."""
        return next(iter(self.arguments)) if self.options.get("inplace") else ""


def draw(
    seed: int | str, number: int, op: str | None = None, backends: tuple[str | None, ...] = (None, "reference")
) -> Case:
    """Case ``number`` of ``seed``."""
    random = Random(f"{seed}:{number}:{op}")
    op = op or random.choices(OPS, (10, 5, 5, 2, 1, 2))[0]
    case: Case = {
        "ctu": _ctu,
        "ctu_and_mul": _ctu_and_mul,
        "head_edit": _head_edit,
        "hard_concrete": _hard_concrete,
        "expected_l0": _expected_l0,
        "attention_head_edit": _attention,
    }[op](random)
    # torch itself takes no gradient of an inference tensor
    arguments = {
        name: replace(value, grad=False) if isinstance(value, Spec) and value.inference else value
        for name, value in case.arguments.items()
    }
    case = Case(case.op, arguments, case.options)
    mode = random.choices(("grad", "no_grad", "inference"), (6, 3, 1))[0]
    specs = case.specs.values()
    if case.options.get("inplace") and mode == "grad" and any(s.grad for s in specs):
        mode = "no_grad"
    case = Case(
        case.op,
        case.arguments,
        case.options,
        random.choice(backends),
        mode,
        random.choices(("normal", "zero", "expanded"), (8, 1, 1))[0],
        random.choices((1, 2, 3), (8, 1, 1))[0] if max(s.count for s in specs) > 4000 else 1,
    )
    return _broken(random, case) if random.random() < 0.08 else judged(case)


def _broken(random: Random, case: Case) -> Case:
    """The call with one invalid argument."""
    first = next(iter(case.arguments))
    spec = case.arguments[first]
    arguments, options = dict(case.arguments), dict(case.options)
    ways: dict[str, tuple[str, Any]] = {
        "no tensor": (first, random.choice((None, 1.0, [1.0], "x"))),
        "of integers": (first, Spec(spec.shape, "int64", spec.strides, spec.offset, "index", 3)),
    }
    if case.op in ("ctu", "ctu_and_mul"):
        long = (*spec.shape, 2)
        ways |= {
            "beta above 1": ("beta", 1.5),
            "beta below 0": ("beta", -0.1),
            "beta no number": ("beta", random.choice((float("nan"), "0.5", None, True))),
            "coeff of two dimensions": ("coeff", Spec((2, 2), "float32", (2, 1))),
            "coeff of other length": (
                "coeff",
                Spec((sum(spec.shape) + 2,), "float32", (1,)),
            ),  # longer than any dimension
            "channel_dim out of range": ("channel_dim", random.choice((len(spec.shape), -len(spec.shape) - 1))),
            "channel_dim no int": ("channel_dim", random.choice((0.0, "1", True))),
            "activation unknown": ("activation", random.choice(("tanh", "", None, "ReLU"))),
            "eps negative": ("eps", random.choice((-1e-6, float("nan"), "0"))),
        }
        second = "residual" if case.op == "ctu" else "up"
        ways[f"{second} of other shape"] = (second, Spec(long, spec.dtype, tuple([0] * len(long))))
        if case.op == "ctu":
            ways["shift of two dimensions"] = ("shift", Spec((1, 1), "float32", (1, 1)))
        if options.get("raw"):  # any number is a logit, NaN too
            for name in ("beta above 1", "beta below 0"):
                del ways[name]
            ways["beta no number"] = ("beta", random.choice(("0.5", None, True)))
    elif case.op == "head_edit":
        heads, dim = case.arguments.get("m", case.arguments.get("a")).shape[-2:]
        ways |= {
            "m of other heads": ("m", Spec((heads + 1, dim), "float32", (dim, 1))),
            "a of one dimension": ("a", Spec((heads * dim,), "float32", (1,))),
            "g_m of other length": ("g_m", Spec((heads + 1,), "float32", (1,))),
            "head_dim of another size": ("head_dim", dim + 1),
            "head_axis out of range": ("head_axis", len(spec.shape)),
            "index of floats": ("index", Spec(spec.shape[:1], "float32", (1,) * len(spec.shape[:1]))),
        }
        if "index" in arguments and spec.shape[0]:  # an empty index is never past
            ways |= {"index past the adapters": ("index", Spec(spec.shape[:1], "int64", (1,), 0, "index", 1e6, 3))}
    elif case.op == "attention_head_edit":
        ways |= {
            "window of 0": ("window", random.choice((0, -1, 1.5, True))),
            "mask of other shape": ("attn_mask", Spec((3, 3, 3, 3, 3), spec.dtype, (0,) * 5)),
            "scale no number": ("scale", "1"),
            "implementation unknown": ("implementation", "fastest"),
            "k of another width": (
                "k",
                Spec((*case.arguments["k"].shape[:-1], spec.shape[-1] + 1), spec.dtype, (0,) * 4),
            ),
        }
    else:
        ways |= {
            "temperature not positive": ("temperature", random.choice((0.0, -1.0, float("nan"), "1"))),
            "stretch reversed": ("stretch", random.choice(((1.1, -0.1), (0.1, 1.1), (-0.1, 0.9), (float("nan"), 1.1)))),
            "stretch no pair": ("stretch", random.choice(((-0.1, 0.5, 1.1), 1.1, None))),
        }
        if case.op == "hard_concrete":
            ways |= {"estimator unknown": ("estimator", random.choice(("median", None)))}
            if options.get("training"):
                ways |= {
                    "noise of other shape": ("noise", Spec((*spec.shape, 2), "float32", (0,) * (len(spec.shape) + 1)))
                }
    what, (name, value) = random.choice(sorted(ways.items()))
    for other, spec in case.specs.items():
        if spec.alias == name:  # the memory of the replaced argument does not exist any more
            arguments[other] = None
    (options if name in options or name in OPTIONS else arguments)[name] = value
    return replace(case, arguments=arguments, options=options, refused=f"{BROKEN}{what}")


def judged(case: Case) -> Case:
    """Mark the case as refused where torch refuses in-place functions: on overlapping tensors, and on inference tensors outside
    of inference mode. torch itself refuses to save these for backward."""
    refused = case.refused if case.refused.startswith(BROKEN) else ""
    target = case.arguments.get(case.target)
    if isinstance(target, Spec):
        others = [s for s in case.specs.values() if s.alias == case.target]
        # A parameter that lies in x is read before x is written, or refused; a second x is written while it is read.
        partial = any((s.shape, s.strides, s.offset) != (target.shape, target.strides, target.offset) for s in others)
        if target.overlaps_itself:
            refused = "x overlaps itself"
        elif partial:
            refused = "?"
        elif target.inference and case.mode != "inference":
            refused = "x is an inference tensor"
    specs = case.specs.values()
    if not refused and case.mode == "grad" and any(s.grad for s in specs) and any(s.inference for s in specs):
        refused = "?"
    return replace(case, refused=refused)


# ---- shapes and layouts -----------------------------------------------------------------------------------------------


def shape_of(random: Random, least: int = 0, most: int = 5, values: int = 600) -> tuple[int, ...]:
    """Mostly small; some with 0 or 1 in them, few with thousands of values."""
    rank = random.randint(least, most)
    if random.random() < 0.03:
        values = 40000
    shape: list[int] = []
    for _ in range(rank):
        top = max(int(values / max(math.prod(shape), 1)), 1)
        size = random.choice((1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 100, 257, 1031))
        shape.append(0 if random.random() < 0.015 else min(size, top))
    random.shuffle(shape)
    return tuple(shape)


def spec_of(random: Random, shape: tuple[int, ...], dtype: str, writable: bool = False, **rest: Any) -> Spec:
    """A random layout of ``shape``: permuted, with gaps, an offset, expanded dimensions, arbitrary strides of dimensions of 1."""
    rank = len(shape)
    order = list(range(rank))
    kind = random.choices(
        ("plain", "permuted", "channels last", "gaps", "expanded", "overlapping"), (8, 4, 2, 4, 2, 0.3)
    )[0]
    if kind in ("permuted", "gaps", "overlapping"):
        random.shuffle(order)
    if kind == "channels last" and rank >= 3:
        order = [0, *range(2, rank), 1]
    strides, step = [0] * rank, 1
    for d in reversed(order):
        if kind == "gaps" and random.random() < 0.5:
            step *= random.choice((1, 2, 3))
        strides[d] = step
        step *= max(shape[d], 1)
        if kind == "gaps" and random.random() < 0.3:
            step += random.randint(1, 5)
    if kind == "expanded" and rank and not (writable and random.random() < 0.8):
        for d in random.sample(range(rank), random.randint(1, rank)):
            strides[d] = 0
    if kind == "overlapping" and rank and not (writable and random.random() < 0.5):
        strides[random.randrange(rank)] = 1
    for d in range(rank):
        if shape[d] == 1 and random.random() < 0.3:
            strides[d] = random.choice((0, 1, 5, 1000))
    return Spec(
        shape,
        dtype,
        tuple(strides),
        offset=random.choice((0, 0, 0, 1, 2, 3, 7)),
        seed=random.randrange(10**6),
        negative=random.random() < 0.04,
        inference=random.random() < 0.03,
        subclass=random.random() < 0.03,
        **rest,
    )


def specials(random: Random, count: int, chance: float = 0.25) -> tuple[tuple[int, str], ...]:
    if count == 0 or random.random() > chance:
        return ()
    return tuple((random.randrange(count), random.choice(SPECIAL)) for _ in range(random.randint(1, 3)))


def _aliased(random: Random, other: str, target: Spec, spec: Spec) -> Spec:
    """``spec`` in the buffer of ``target``: the same elements, others of them, or overlapping ones."""
    if spec.shape != target.shape or spec.dtype != target.dtype or target.negative or target.subclass or target.grad:
        return spec
    changes: dict[str, Any] = {"alias": other, "grad": False, "negative": False, "subclass": False, "special": ()}
    changes |= {"inference": target.inference, "strides": target.strides, "offset": target.offset}
    how = random.choice(("same", "shifted", "transposed"))
    if how == "shifted" and target.offset > 0:
        changes["offset"] = target.offset - 1
    if how == "transposed" and len(target.shape) == 2 and target.shape[0] == target.shape[1]:
        changes["strides"] = target.strides[::-1]
    return replace(spec, **changes)


# ---- ctu --------------------------------------------------------------------------------------------------------------


def _knob(random: Random, x: Spec, channel: int | None, raw: bool) -> Any:
    """A number, or a tensor: 0-d, of size 1, or with a value per channel."""
    if random.random() < 0.35:
        number = random.choice((0.0, 1.0, 0.5, 0.9, random.random(), 1 - 2.0**-24, 1e-20))
        return random.choice((number, random.gauss(0, 20), -200.0, 88.5, 700.0)) if raw else number
    shapes: list[tuple[int, ...]] = [(), (1,)]
    if channel is not None:
        shapes += 4 * [(x.shape[channel],)]
    shape = random.choice(shapes)
    dtype = random.choice(("float32", "float32", "float64", "bfloat16"))
    spec = spec_of(random, shape, dtype, grad=random.random() < 0.4)
    scale = random.choice((1.0, 5.0, 40.0)) if raw else 1.0
    chosen: list[str] = ["nan", "inf", "-inf"] if raw else ["nan", "0.0", "1.0", "1.0", "1e-20"]
    marks = tuple((p, random.choice(chosen)) for p, _ in specials(random, spec.count, 0.2))
    return replace(spec, values="normal" if raw else "unit", scale=scale, special=marks)


def _affine(random: Random, x: Spec, channel: int | None, scale: float = 1.0, chance: float = 0.1) -> Spec:
    shapes: list[tuple[int, ...]] = [(), (1,)] + ([] if channel is None else 4 * [(x.shape[channel],)])
    shape = random.choice(shapes)
    spec = spec_of(
        random, shape, random.choice(("float32", "float64", "bfloat16")), grad=random.random() < 0.4, scale=scale
    )
    return replace(spec, special=specials(random, spec.count, chance))


def _ctu(random: Random) -> Case:
    inplace = random.random() < 0.25
    shape, dtype = shape_of(random), random.choice(DTYPES)
    x = spec_of(random, shape, dtype, writable=inplace, scale=random.choice((1e-3, 1.0, 1.0, 4.0, 30.0, 1e4)))
    x = replace(x, special=specials(random, x.count), grad=random.random() < 0.5)
    options: dict[str, Any] = {}
    channel = None
    if shape and random.random() < 0.7:
        channel = random.randrange(len(shape))
        options["channel_dim"] = channel - len(shape) if random.random() < 0.3 else channel
    raw = random.random() < 0.25
    arguments: dict[str, Any] = {"x": x, "beta": _knob(random, x, channel, raw)}
    if random.random() < 0.8:
        arguments["coeff"] = _knob(random, x, channel, raw)
    if raw:
        options["raw"] = True
        arguments.setdefault("coeff", 0.3)
    options["activation"] = random.choice(MEMBERS)
    if random.random() < 0.15:
        options["eps"] = random.choice((1e-6, 1e-3, 1e-30, 0.0))
    if options["activation"] in ("leaky_relu", "prelu") and random.random() < 0.8:
        number = random.choice((0.01, 0.2, 0.0, 1.0, 1.5, -0.3))
        arguments["negative_slope"] = random.choice((number, _affine(random, x, channel, 0.7)))
    for name in ("scale", "shift"):
        if random.random() < 0.25:
            arguments[name] = _affine(random, x, channel)
    if random.random() < 0.25:
        kind = x.dtype if inplace or random.random() < 0.8 else random.choice(DTYPES)
        residual = spec_of(random, shape, kind, grad=random.random() < 0.5)
        residual = replace(residual, special=specials(random, residual.count, 0.1))
        if random.random() < 0.15:
            residual = _aliased(random, "x", x, residual)
        arguments["residual"] = residual
    if inplace:
        options["inplace"] = True
    return Case("ctu", arguments, options)


def _ctu_and_mul(random: Random) -> Case:
    unit = _ctu(random)
    arguments = {n: v for n, v in unit.arguments.items() if n not in ("x", "scale", "shift", "residual")}
    gate, options, up = unit.arguments["x"], dict(unit.options), None
    inplace = "inplace" in options
    if gate.shape and not inplace and random.random() < 0.4:  # packed
        shape = list(gate.shape)
        shape[options.get("channel_dim", -1)] *= 2
        wide = spec_of(random, tuple(shape), gate.dtype, scale=gate.scale)
        gate = replace(wide, special=specials(random, wide.count), grad=gate.grad)
    else:
        kind = gate.dtype if inplace or random.random() < 0.8 else random.choice(DTYPES)
        up = spec_of(random, gate.shape, kind, grad=random.random() < 0.5, scale=random.choice((1e-3, 1.0, 1.0, 30.0)))
        up = replace(up, special=specials(random, up.count, 0.1))
        if random.random() < 0.15:
            up = _aliased(random, "gate", gate, up)
    return Case("ctu_and_mul", {"gate": gate, "up": up, **arguments}, options)


# ---- head_edit --------------------------------------------------------------------------------------------------------


def _head_edit(random: Random) -> Case:
    inplace = random.random() < 0.25
    heads, dim = random.choice((1, 2, 3, 4, 7)), random.choice((1, 2, 5, 8, 16, 33))
    lead = list(shape_of(random, 0, 3, 60))
    options: dict[str, Any] = {}
    layout = random.choice(("flat", "split", "axis"))
    if layout == "flat":
        shape = [*lead, heads * dim]
    elif layout == "split":
        shape = [*lead, heads, dim]
    else:
        axis = random.randint(0, len(lead))
        shape = [*lead[:axis], heads, *lead[axis:], dim]
        options["head_axis"] = axis - len(shape) if random.random() < 0.3 else axis
    z = spec_of(
        random, tuple(shape), random.choice(DTYPES), writable=inplace, scale=random.choice((1e-3, 1.0, 1.0, 30.0))
    )
    z = replace(z, special=specials(random, z.count), grad=random.random() < 0.5)
    adapters = 0
    if random.random() < 0.35 and lead and options.get("head_axis") not in (0, -len(shape)):
        adapters = random.randint(1, 4)
    rows = (adapters,) if adapters else ()
    which = random.choice((("m",), ("a",), ("m", "a"), ("m", "a")))
    arguments: dict[str, Any] = {"z": z}
    wide = random.choice(("float32", "float32", "float64", "bfloat16"))
    for name in which:
        t = spec_of(random, (*rows, heads, dim), wide, grad=random.random() < 0.5)
        arguments[name] = replace(t, special=specials(random, t.count, 0.1))
    for name in which:
        if random.random() < 0.6:
            t = spec_of(random, (*rows, heads), random.choice((wide, "float32")), grad=random.random() < 0.5)
            arguments["g_" + name] = replace(t, special=specials(random, t.count, 0.1))
    if adapters:
        t = spec_of(random, (shape[0],), random.choice(("int64", "int32")), values="index", scale=adapters)
        arguments["index"] = replace(t, negative=False, subclass=False, inference=False)
    if inplace:
        options["inplace"] = True
    return Case("head_edit", arguments, options)


# ---- gates ------------------------------------------------------------------------------------------------------------


def _logits(random: Random) -> Spec:
    shape = shape_of(random, 0, 4)
    t = spec_of(random, shape, random.choice(DTYPES), scale=random.choice((0.5, 3.0, 20.0)))
    return replace(t, special=specials(random, t.count), grad=random.random() < 0.6)


def _distribution(random: Random) -> dict[str, Any]:
    if random.random() < 0.6:
        return {}
    stretch = random.choice(((-0.1, 1.1), (-0.05, 1.2), (-0.5, 1.5), (-0.01, 1.01)))
    return {"temperature": random.choice((0.33, 2 / 3, 1.0)), "stretch": stretch}


def _hard_concrete(random: Random) -> Case:
    logits = _logits(random)
    options = _distribution(random)
    options["training"] = random.random() < 0.5
    arguments: dict[str, Any] = {"log_alpha": logits}
    if options["training"]:
        noise = spec_of(random, logits.shape, random.choice((logits.dtype, "float32", "float64")), values="unit")
        noise = replace(noise, grad=random.random() < 0.3)
        arguments["noise"] = noise
    else:
        options["estimator"] = random.choice(("clip", "mean"))
    return Case("hard_concrete", arguments, options)


def _expected_l0(random: Random) -> Case:
    return Case("expected_l0", {"log_alpha": _logits(random)}, _distribution(random))


# ---- attention --------------------------------------------------------------------------------------------------------


def _attention(random: Random) -> Case:
    batch, groups, dim, out = (
        random.randint(1, 2),
        random.choice((1, 2)),
        random.choice((1, 4, 8)),
        random.choice((1, 4, 7)),
    )
    heads = groups * random.choice((1, 1, 2))
    tokens, keys = random.choice((1, 2, 5, 9)), random.choice((1, 3, 5, 9))
    dtype = random.choice(("float32", "float64", "bfloat16"))
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for name, shape in (
        ("q", (batch, heads, tokens, dim)),
        ("k", (batch, groups, keys, dim)),
        ("v", (batch, groups, keys, out)),
    ):
        arguments[name] = spec_of(random, shape, dtype, grad=random.random() < 0.5)
    for name in random.choice((("m",), ("a",), ("m", "a"))):
        t = spec_of(random, (heads, out), random.choice(("float32", "float64")), grad=random.random() < 0.5)
        arguments[name] = replace(t, special=tuple((p, "nan") for p, _ in specials(random, t.count, 0.05)))
        if random.random() < 0.5:
            arguments["g_" + name] = spec_of(random, (heads,), "float32", grad=random.random() < 0.5)
    if heads != groups:
        options["enable_gqa"] = True
    if random.random() < 0.5:
        options["is_causal"] = True
    if random.random() < 0.3:
        options["window"] = random.randint(1, 6)
    if random.random() < 0.3:
        options["scale"] = random.choice((0.1, 1.0, 3.0))
    if random.random() < 0.3:
        shape = (random.choice((1, batch)), random.choice((1, heads)), random.choice((1, tokens)), keys)
        mask = spec_of(random, shape, random.choice((dtype, "float32")))
        hidden = tuple((p, "-inf") for p, _ in specials(random, mask.count, 0.8))
        arguments["attn_mask"] = replace(mask, special=hidden)
    return Case("attention_head_edit", arguments, options)
