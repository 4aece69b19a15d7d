"""Running cases, shrinking failures, and printing them as scripts."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .cases import BROKEN, Case, draw, judged
from .check import check, replace, respec
from .tensors import Spec


@dataclass
class Failure:
    seed: str
    number: int
    op: str | None
    case: Case
    error: str

    def __str__(self) -> str:
        options = f"--seed {self.seed} --case {self.number}" + (f" --op {self.op}" if self.op else "")
        again = f'make fuzz FUZZ_ARGS="{options}"'
        return f"{'-' * 100}\n{again}\n{self.error}\n\n{script(self.case)}"


def outcome(case: Case) -> str:
    """The error of a case, "" if it passes."""
    try:
        check(case)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = next((f for f in reversed(frames) if "ctkernels" in f.filename and "fuzz" not in f.filename), frames[-1])
        where = "" if type(error).__name__ == "Wrong" else f" ({at.filename.rsplit('/', 1)[-1]}:{at.lineno})"
        return f"{type(error).__name__}{where}: {str(error)[:500]}"
    return ""


def kind(error: str) -> str:
    """An error message without numbers, to report failures of one kind once."""
    return re.sub(r"\(?-?\d[\d.,e+-]*\)?|\b(nan|inf)\b|torch\.\w+", "#", error)[:70]


def hunt(seed: str, numbers: Iterable[int], op: str | None = None) -> Iterator[Failure | None]:
    """Yield a shrunk failure for the first case of every kind of error, None for all other cases."""
    known: set[str] = set()
    for number in numbers:
        case = draw(seed, number, op)
        error = outcome(case)
        key = f"{case.op} {case.backend} {kind(error)}"
        if not error or key in known:
            yield None
            continue
        known.add(key)
        small = shrink(case, kind(error))
        yield Failure(seed, number, op, small, outcome(small))


# ---- shrinking --------------------------------------------------------------------------------------------------------


def shrink(case: Case, wanted: str, tries: int = 400) -> Case:
    """A simpler case that fails in the same way."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in map(judged, _simpler(case)):
            tries -= 1
            if tries < 0:
                return case
            try:
                same = kind(outcome(candidate)) == wanted
            except Exception:
                continue
            if same:
                case, smaller = candidate, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Cases with one simplification, the most effective ones first."""
    first = next(iter(case.arguments))
    needed = {
        "ctu": {"x", "beta"},
        "ctu_and_mul": {"gate", "up", "beta"},
        "head_edit": {"z"},
        "attention_head_edit": {"q", "k", "v"},
    }.get(case.op, {first, "noise"})
    broken = case.refused.startswith(BROKEN)  # the broken argument has to stay
    for name in [] if broken else list(case.arguments):
        if name not in needed:
            yield replace(case, arguments={k: v for k, v in case.arguments.items() if k != name})
    for name in [] if broken else list(case.options):
        if name not in ("training", "channel_dim", "activation", "raw"):
            yield replace(case, options={k: v for k, v in case.options.items() if k != name})
    if not broken and case.options.get("activation") not in (None, "relu"):
        yield replace(case, options={**case.options, "activation": "relu"})
    for changes in ({"threads": 1}, {"upstream": "normal"}, {"mode": "grad"}):
        if any(getattr(case, k) != v for k, v in changes.items()):
            yield replace(case, **changes)
    for name, spec in case.specs.items():
        for flag in ("negative", "inference", "subclass", "grad"):
            if getattr(spec, flag):
                yield respec(case, name, **{flag: False})
        if spec.special:
            for i in range(len(spec.special)):
                yield respec(case, name, special=spec.special[:i] + spec.special[i + 1 :])
        if spec.offset and not spec.alias:
            yield respec(case, name, offset=0)
        plain = _contiguous(spec.shape)
        if spec.strides != plain and not spec.alias:
            yield respec(case, name, strides=plain)
        if spec.scale not in (1.0,) and spec.values == "normal":
            yield respec(case, name, scale=1.0)
    yield from _fewer_values(case, first)
    for name, spec in case.specs.items():
        if spec.count == 1 and spec.values == "unit" and name in ("beta", "coeff"):
            yield replace(case, arguments={**case.arguments, name: 0.5})


def _fewer_values(case: Case, first: str) -> Iterator[Case]:
    """For ctu and gates: halve a dimension, or set it to 1, in all arguments that have it."""
    whole = case.arguments[first]
    if case.op == "ctu_and_mul" and case.arguments.get("up") is None:  # packed
        return
    if case.op not in ("ctu", "ctu_and_mul", "hard_concrete", "expected_l0") or not isinstance(whole, Spec):
        return
    channel = case.options.get("channel_dim")
    channel = None if channel is None else channel % max(len(whole.shape), 1)
    for d, size in enumerate(whole.shape):
        for new in {1, size // 2, size - 1}:
            if not 0 < new < size:
                continue
            arguments: dict[str, Any] = {}
            for name, value in case.arguments.items():
                if (
                    isinstance(value, Spec)
                    and value.shape == whole.shape
                    and name in (first, "residual", "up", "noise")
                ):
                    value = dataclasses.replace(value, shape=(*whole.shape[:d], new, *whole.shape[d + 1 :]))
                elif isinstance(value, Spec) and d == channel and value.shape == (size,):
                    value = dataclasses.replace(value, shape=(new,))
                arguments[name] = value
            yield replace(case, arguments=arguments)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


# ---- printing ---------------------------------------------------------------------------------------------------------


def script(case: Case) -> str:
    """The case as a standalone script."""
    lines = ["import math, torch, ctkernels", "nan, inf = math.nan, math.inf"]
    for name, spec in case.specs.items():
        lines += _tensor_lines(name, spec)
    arguments = [f"{name}={name if isinstance(value, Spec) else repr(value)}" for name, value in case.arguments.items()]
    arguments += [f"{name}={value!r}" for name, value in case.options.items()]
    contexts = [f"ctkernels.use_backend({case.backend!r})"] if case.backend else []
    contexts += {"no_grad": ["torch.no_grad()"], "inference": ["torch.inference_mode()"]}.get(case.mode, [])
    indent = ""
    if case.threads > 1:
        lines.append(f"torch.set_num_threads({case.threads})")
    if contexts:
        lines.append(f"with {', '.join(contexts)}:")
        indent = "    "
    lines.append(f"{indent}y = ctkernels.functional.{case.op}({', '.join(arguments)})")
    lines.append(f"{indent}print(y)")
    wants = [name for name, spec in case.specs.items() if spec.grad]
    if case.mode == "grad" and wants and not case.target:
        upstream = {"zero": "torch.zeros_like(y)", "expanded": "torch.full((), 0.75, dtype=y.dtype).expand(y.shape)"}
        dy = upstream.get(case.upstream, "torch.ones_like(y)")
        lines.append(f"{indent}print(torch.autograd.grad(y, [{', '.join(wants)}], {dy}, allow_unused=True))")
    return "\n".join(lines)


def _tensor_lines(name: str, spec: Spec) -> list[str]:
    where = f"as_strided({spec.shape}, {spec.strides}, {spec.offset})"
    if spec.alias:
        return [f"{name} = {spec.alias}_buffer.{where}"]
    dtype, lines = f"torch.{spec.dtype}", []
    if spec.count <= 40:
        numbers = spec.numbers()
        values = f"torch.tensor({numbers.tolist()}, dtype={dtype})"
    else:
        draw = {"unit": "rand", "normal": "randn"}.get(spec.values)
        generator = f"torch.Generator().manual_seed({spec.seed})"
        if draw is None:
            values = f"torch.randint(0, {int(spec.scale)}, {spec.shape}, generator={generator}).to({dtype})"
        else:
            values = (
                f"(torch.{draw}({spec.count}, generator={generator}, dtype=torch.float64) * {spec.scale}).to({dtype})"
            )
            lines = [f"values = {values}"]
            for position, value in spec.special:
                number = torch.tensor(float(_special(value, spec)), dtype=getattr(torch, spec.dtype)).item()
                lines.append(f"values[{position % spec.count}] = {number}")
            values = f"values.view({spec.shape})"
    sign = "-" if spec.negative else ""
    lines += [f"{name}_buffer = torch.zeros({spec.length}, dtype={dtype})", f"{name} = {name}_buffer.{where}"]
    if spec.count and spec.overlaps_itself:  # which copy_ refuses
        lines.append(f"places = torch.arange({spec.length}).{where}.reshape(-1)")
        lines.append(f"for place, value in zip(places, ({sign}{values}).reshape(-1)): {name}_buffer[place] = value")
    elif spec.count:
        lines.append(f"{name}.copy_({sign}{values})")
    if spec.inference:
        lines = ["with torch.inference_mode():", *(f"    {line}" for line in lines)]
    if spec.negative:
        lines.append(f"{name} = torch._neg_view({name})")
    if spec.subclass:
        lines.append(f"{name} = {name}.as_subclass(type('Subclass', (torch.Tensor,), {{}}))")
    if spec.grad:
        lines.append(f"{name} = {name}.detach().requires_grad_()")
    return lines


def _special(value: str, spec: Spec) -> float:
    from .tensors import special

    return special(value, getattr(torch, spec.dtype))
