"""The L0 penalty on gates, its schedules, and a Trainer callback."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from ...functional import expected_l0
from .gates import log_alphas
from .units import has_units, measure_units


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _over_shards(local: Tensor, parameter: Any) -> Tensor:
    """The sum over a parameter's shards; its gradient goes to the local shard."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return local
    total = local.detach().clone()
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            dist.all_reduce(total, group=mesh.get_group(dim))
    return local + (total - local.detach())


def _sums(model: nn.Module, adapter: str | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The sum of P(g != 0) and the number of gates, for "m" and "a"; one `expected_l0` call per distribution and device."""
    groups: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
    counts = {"m": 0, "a": 0}
    for layer, name, kind, parameter in log_alphas(model, adapter):
        config = layer.jola_config[name]
        unit = layer.jola_unit_log_alpha[name]
        groups.setdefault((config.temperature, config.stretch, parameter.device), []).append((kind, parameter, unit))
        counts[kind] += parameter.numel()
    totals: dict[str, Tensor] = {}
    home: Any = None
    for (temperature, stretch, device), members in groups.items():
        home = home or device
        local = [_local(parameter) for _, parameter, _ in members]
        units = torch.cat([unit.expand(values.shape) for values, (_, _, unit) in zip(local, members)])
        probability = expected_l0(torch.cat(local) * units, temperature=temperature, stretch=stretch)
        parts = probability.split([values.numel() for values in local])
        for kind in counts:
            sums = [part.sum() for part, (other, *_) in zip(parts, members) if other == kind]
            if sums:
                share = _over_shards(torch.stack(sums).sum(), members[0][1]).to(home)
                totals[kind] = totals[kind] + share if kind in totals else share
    return totals, counts


def jola_penalty(model: nn.Module, adapter: str | None = None, *, reduction: str = "mean") -> Tensor:
    """The L0 penalty on gates, to add to a loss: the sum of `P(g != 0)` over all gates (JoLA, eq. 4 and 5).

    Args:
        model: a model with a JoLA adapter, bare or inside DDP or FSDP2.
        adapter: its name; None takes the active ones.
        reduction: "mean" (default) divides by the number of gates, so that a weight means the same for every model;
            "sum" is the paper's formula.

    Returns:
        a scalar with gradient, in the dtype of log alpha, computed without host synchronisation. Under FSDP2 it is the
        full sum on every rank, and its gradient goes to the rank's own shard.

    Raises:
        ValueError: `reduction` is unknown, or the model has no JoLA adapter.

    Source: JoLA, arXiv 2502.01179, eq. 4 and 5.

    Examples:
        >>> loss = model(**batch).loss + 0.1 * jola_penalty(model)
        >>> loss.backward()
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    totals, counts = _sums(model, adapter)
    total = torch.stack(list(totals.values())).sum()
    return total / sum(counts.values()) if reduction == "mean" else total


def official_penalty(model: nn.Module, weight: float, adapter: str | None = None) -> Tensor:
    """The penalty of the authors' released code, with two weights; it differs from the paper's formula.

    Additive gates have the weight `weight`, multiplicative gates `1 - weight`; each sum of `P(g != 0)` is divided by the
    number of heads and by the number of gates of its kind. With 32 layers of 32 heads, the penalty on multiplicative gates
    is at least nine times stronger, and as the weight decays, the one on additive gates vanishes.

    Args:
        model: a model with a JoLA adapter whose layers all have the same number of heads.
        weight: the released code's lambda, including the schedule.
        adapter: its name; None takes the active ones.

    Returns:
        a scalar with gradient, to add to the loss without another factor.

    Raises:
        ValueError: the model has no JoLA adapter, or none of this name.

    Source: the code released with JoLA, arXiv 2502.01179.

    Examples:
        >>> step = 10
        >>> loss = model(**batch).loss + official_penalty(model, ExponentialSchedule()(step))
    """
    totals, counts = _sums(model, adapter)
    heads = next(layer.num_heads for layer, *_ in log_alphas(model, adapter))
    scaled = [
        totals[kind] * (factor / (counts[kind] * heads))
        for kind, factor in (("a", weight), ("m", 1 - weight))
        if kind in totals
    ]
    return torch.stack(scaled).sum()


class ConstantSchedule:
    """A constant weight, 0.1 by default."""

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def __call__(self, step: int, total: int = 1) -> float:
        """The weight at `step` of `total` optimizer steps."""
        return self.weight


class LinearSchedule:
    """Linear from `start` to `end` over the run (released code: 0 to 0.2)."""

    def __init__(self, start: float = 0.0, end: float = 0.2) -> None:
        self.start, self.end = start, end

    def __call__(self, step: int, total: int = 1) -> float:
        """The weight at `step` of `total` optimizer steps."""
        return self.start + (self.end - self.start) * min(step / max(total, 1), 1.0)


class CyclicSchedule:
    """`centre + amplitude * sin(2 pi step / period)` (released code: 0.5, 0.5, 20 steps)."""

    def __init__(self, centre: float = 0.5, amplitude: float = 0.5, period: int = 20) -> None:
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        self.centre, self.amplitude, self.period = centre, amplitude, period

    def __call__(self, step: int, total: int = 1) -> float:
        """The weight at `step` of `total` optimizer steps."""
        return self.centre + self.amplitude * math.sin(2 * math.pi * step / self.period)


class ExponentialSchedule:
    """`start * exp(-rate * step)` (the paper's best and the released default: 0.1, 0.01)."""

    def __init__(self, start: float = 0.1, rate: float = 0.01) -> None:
        self.start, self.rate = start, rate

    def __call__(self, step: int, total: int = 1) -> float:
        """The weight at `step` of `total` optimizer steps."""
        return self.start * math.exp(-self.rate * step)


class AdaptiveSchedule:
    """Changes the weight by `change` after each evaluation: up if the metric improved, down if it got worse.

    In the released code, the adaptive schedule gets the change of the training loss at every step, so the weight rises
    with the loss.

    Args:
        start: initial weight. Default 0.1.
        change: step up or down. Default 0.01.
        low, high: bounds of the weight. Default 0 and 1.
        metric: key of the evaluation metric that the callback reads. Default "eval_loss".
        greater_is_better: whether a larger metric is better. Default False.
    """

    def __init__(
        self,
        start: float = 0.1,
        change: float = 0.01,
        low: float = 0.0,
        high: float = 1.0,
        metric: str = "eval_loss",
        greater_is_better: bool = False,
    ) -> None:
        self.weight, self.change, self.low, self.high = start, change, low, high
        self.metric, self.greater_is_better = metric, greater_is_better
        self.last: float | None = None

    def __call__(self, step: int, total: int = 1) -> float:
        """The current weight."""
        return self.weight

    def update(self, value: float) -> None:
        """Change the weight for a new value of the metric."""
        if self.last is not None and value != self.last:
            better = (value > self.last) == self.greater_is_better
            self.weight = min(max(self.weight + (self.change if better else -self.change), self.low), self.high)
        self.last = value


SCHEDULES: dict[str, Callable[[], Any]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cyclic": CyclicSchedule,
    "adaptive": AdaptiveSchedule,
    "exponential": ExponentialSchedule,
}


class JolaPenaltyCallback(TrainerCallback):
    """Trains JoLA in a `transformers.Trainer` with measured units and the penalty on gates.

    At the start of training, unless resumed, `measure_units` measures units that have not been measured, on examples
    spread over the training set. The penalty's gradient is added to the gates before each optimizer step: once per step,
    independent of gradient accumulation, after gradient clipping, and without host synchronisation. The losses that the
    Trainer reports do not contain the penalty, and evaluation does not advance the schedule.

    Args:
        schedule: a function of (step, total steps) that returns the weight, or one of "constant", "linear", "cyclic",
            "adaptive", "exponential" with its defaults. Default "exponential".
        adapter: name of the adapter; None takes the active ones.
        penalty: "paper" (`jola_penalty`, default) or "official" (`official_penalty`, two weights).
        units: number of examples to measure units on. Default 64; 0 leaves the units unchanged.

    Raises:
        ValueError: the schedule or penalty is unknown, or `units` is negative; at the start of training, if fp16 is used
            without clipping (gradients would still be scaled when the callback runs), and under DeepSpeed (which has
            stepped by then).

    Examples:
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[JolaPenaltyCallback("exponential")])
        >>> output = trainer.train()
        {'train_runtime': ...}
    """

    def __init__(
        self,
        schedule: str | Callable[[int, int], float] = "exponential",
        adapter: str | None = None,
        penalty: str = "paper",
        units: int = 64,
    ) -> None:
        if units < 0:
            raise ValueError(f"units must be a number of examples, 0 or more, got {units}")
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {sorted(SCHEDULES)} or a function, got {schedule!r}")
        if penalty not in ("paper", "official"):
            raise ValueError(f"penalty must be 'paper' or 'official', got {penalty!r}")
        self.schedule: Any = SCHEDULES[schedule]() if isinstance(schedule, str) else schedule
        self.adapter = adapter
        self.penalty = penalty
        self.units = units

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Check the gradient scale and measure the units."""
        if args.fp16 and not args.max_grad_norm:
            raise ValueError("JolaPenaltyCallback: fp16 needs max_grad_norm > 0, got 0 (gradients would stay scaled)")
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "JolaPenaltyCallback cannot add a gradient under DeepSpeed, which steps within its backward pass: add "
                "weight * jola_penalty(model) to the loss, as examples/trainers/deepspeed_zero.py does"
            )
        if self.units and not state.global_step and not has_units(model, self.adapter):
            try:
                measure_units(model, _sample_batches(train_dataloader, self.units), self.adapter)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"JolaPenaltyCallback: the units of additive edits cannot be measured on the training set: {error}. "
                    "Call measure_units(model, batches) before training, or pass units=0 to train without"
                ) from error

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Add the gradient of the weighted penalty."""
        add_penalty_grad(model, self.schedule(state.global_step, state.max_steps), self.adapter, self.penalty)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Pass the metric to an adaptive schedule."""
        if hasattr(self.schedule, "update"):
            if self.schedule.metric not in (metrics or {}):
                raise ValueError(
                    f"AdaptiveSchedule: metric must be among {sorted(metrics or {})}, got {self.schedule.metric!r}"
                )
            self.schedule.update(float(metrics[self.schedule.metric]))


def _sample_batches(loader: Any, count: int) -> Iterator[Any]:
    """Batches of `count` examples evenly spaced over a data loader's data set, without using a random generator."""
    data, size = loader.dataset, loader.batch_size or 8
    examples: Iterator[Any]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        count = min(count, len(data))
        examples = (data[i * len(data) // count] for i in range(count))
    else:
        examples = itertools.islice(iter(data), count)
    while batch := list(itertools.islice(examples, size)):
        yield loader.collate_fn(batch)


@torch.enable_grad()
def add_penalty_grad(model: nn.Module, weight: float, adapter: str | None = None, penalty: str = "paper") -> None:
    """Add the gradient of the weighted penalty to `.grad` of the trainable gates, without a backward pass.

    For custom training loops: call it once between `backward` and `step`, after unscaling and clipping. DDP and FSDP
    hooks do not run; every rank adds the same gradient.

    Args:
        model: a model with a JoLA adapter.
        weight: the penalty's weight.
        adapter: its name; None takes the active ones.
        penalty: "paper" (default) or "official".

    Raises:
        ValueError: the model has no JoLA adapter, or none of this name.

    Examples:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model))
        >>> model(**batch).loss.backward()
        >>> add_penalty_grad(model, 0.1)
        >>> optimizer.step()
    """
    parameters = [parameter for *_, parameter in log_alphas(model, adapter) if parameter.requires_grad]
    if not parameters:
        return
    value = official_penalty(model, weight, adapter) if penalty == "official" else weight * jola_penalty(model, adapter)
    for parameter, grad in zip(parameters, torch.autograd.grad(value, parameters)):
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
