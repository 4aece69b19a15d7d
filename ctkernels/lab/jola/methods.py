"""The methods that are compared: how each is put on a model, what it trains, and which settings are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._extras import require
from .._restoring import kept_trainable
from ..experiment import Method, Setting

UNIT = ".jola_unit_"


@dataclass(frozen=True)
class Attached:
    """A model with a method on it: what to train, in groups for an optimizer, and the trainer's callbacks.

    ``measure``: is given batches of training prompts before training.
    """

    model: Any
    groups: list[dict[str, Any]]
    callbacks: list[Any] = field(default_factory=list)
    measure: Callable[[Iterable[Mapping[str, Any]]], Any] | None = None

    def _tensors(self) -> dict[str, Tensor]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return trained | {name: unit for name, unit in self.model.named_buffers() if UNIT in name}

    def state(self) -> dict[str, Tensor]:
        """A copy of what is trained, and of its units, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a copy from :meth:`state` back; one without units has its values in units of 1."""
        tensors = self._tensors()
        if set(state) not in (set(tensors), {name for name in tensors if UNIT not in name}):
            raise ValueError(f"saved weights do not fit: expected {sorted(tensors)[:2]}, got {sorted(state)[:2]}")
        for name, value in tensors.items():
            value.copy_(state[name]) if name in state else value.fill_(1)


@contextmanager
def _through_peft(model: nn.Module, config: Any) -> Iterator[Any]:
    """The model wrapped by peft; afterwards the wrappers are gone and ``requires_grad`` is as before."""
    peft = require("peft", "lab", "an adapter")
    with kept_trainable(model):
        wrapped = peft.get_peft_model(model, config)
        try:
            yield wrapped
        finally:
            wrapped.unload()
            model.__dict__.pop("peft_config", None)


def _trained(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


# What else a grid may name for methods with head edits; `by_row` and `units` are 0 or 1, `steady` is the share of the steps,
# the first ones, in which gates are not sampled.
EDIT_OPTIONS = ("init_std", "units")
GATE_OPTIONS = ("by_row", "init_log_alpha", "temperature", "steady")


def _jola_config(setting: Setting, **values: Any) -> Any:
    from ... import adapters

    for name in ("init_std", "init_log_alpha", "temperature"):
        if name in setting:
            values[name] = setting[name]
    if setting.get("by_row"):
        values["gate_sampling"] = "row"
    return adapters.JolaConfig(task_type="CAUSAL_LM", **values)


def _measure(model: Any, setting: Setting) -> Callable[[Iterable[Mapping[str, Any]]], Any] | None:
    from ... import adapters

    return partial(adapters.measure_units, model) if setting.get("units", 1) else None


def _steady_gates(model: nn.Module, share: float) -> Any:
    """A callback of the Trainer: gates are deterministic in the first ``share`` of the steps, and trained all the same."""
    import transformers

    class SteadyGates(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steady = state.global_step < share * state.max_steps
            for layer in model.modules():
                for config in getattr(layer, "jola_config", {}).values():
                    config.freeze_gates = steady

    return SteadyGates()


@contextmanager
def jola(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """Both edits of every head, gated; gates at a rate of their own."""
    from ... import adapters

    with _through_peft(model, _jola_config(setting)) as wrapped:
        groups = adapters.parameter_groups(wrapped, lr=setting["lr"], gate_lr=setting["gate_lr"])
        callbacks = [adapters.JolaPenaltyCallback(schedule, units=0)]
        if share := setting.get("steady"):
            callbacks.append(_steady_gates(wrapped, share))
        yield Attached(wrapped, groups, callbacks, _measure(wrapped, setting))


@contextmanager
def jola_tct(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """Gated edits of heads and curvature of activations as one adapter; curvature at a rate of its own."""
    from ... import adapters

    with _through_peft(model, adapters.JointConfig(task_type="CAUSAL_LM")) as wrapped:
        groups = adapters.parameter_groups(
            wrapped, lr=setting["lr"], gate_lr=setting["gate_lr"], curvature_lr=setting["curvature_lr"]
        )
        penalty = adapters.JolaPenaltyCallback(schedule, units=0)
        yield Attached(wrapped, groups, [penalty], partial(adapters.measure_units, wrapped))


@contextmanager
def lofit(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """The same edits without gates; what the JoLA paper reports as LoFiT and as "no gate"."""
    with _through_peft(model, _jola_config(setting, freeze_gates=True)) as wrapped:
        yield Attached(wrapped, _trained(wrapped, setting["lr"]), measure=_measure(wrapped, setting))


@contextmanager
def red(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """A scale and an offset of every MLP's output, ungated, from the identity: RED (arXiv:2402.15179)."""
    from ... import adapters

    config = adapters.JolaConfig(task_type="CAUSAL_LM", site="mlp", freeze_gates=True, init_std=0.0)
    with _through_peft(model, config) as wrapped:
        yield Attached(wrapped, _trained(wrapped, setting["lr"]))


@contextmanager
def tct(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """Trainable Curvature Tuning of the feed-forward layers: a beta and a coeff for every channel of their activations."""
    from ... import adapters

    with _through_peft(model, adapters.CurvatureConfig(task_type="CAUSAL_LM")) as wrapped:
        yield Attached(wrapped, _trained(wrapped, setting["lr"]))


@contextmanager
def lora(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """peft's LoRA on the projections it takes for the architecture (query and value for Llama), scale 2."""
    peft = require("peft", "lab", "an adapter")
    rank = int(setting["rank"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank)
    with _through_peft(model, config) as wrapped:
        yield Attached(wrapped, _trained(wrapped, setting["lr"]))


@contextmanager
def ia3(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """peft's (IA)3: learned scales of keys, values and the feed-forward layer."""
    peft = require("peft", "lab", "an adapter")
    with _through_peft(model, peft.IA3Config(task_type="CAUSAL_LM")) as wrapped:
        yield Attached(wrapped, _trained(wrapped, setting["lr"]))


@contextmanager
def bitfit(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """Biases alone; a linear layer that has none gets one of zeros (models like Llama have none at all)."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    bare: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is None and m is not head]
    kept = {
        owner: {
            key: value.detach().clone()
            for key, value in owner._parameters.items()
            if value is not None and _is_bias(key)
        }
        for owner in model.modules()
    }
    with kept_trainable(model):
        for module in bare:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
        try:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(_is_bias(name.rpartition(".")[2]))
            yield Attached(model, _trained(model, setting["lr"]))
        finally:
            for module in bare:
                module.bias = None
            with torch.no_grad():
                for owner, biases in kept.items():
                    for key, value in biases.items():
                        owner._parameters[key].copy_(value)  # type: ignore[union-attr]


def _is_bias(name: str) -> bool:
    return name == "bias" or name.endswith("_bias")


# ``attach(model, setting, schedule)`` is a context manager that gives an :class:`Attached` and leaves the model as it was.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("zero-shot", "the model as it is", {}, None),
        Method("lora", "LoRA, rank tuned", {"lr": (1e-3, 3e-3), "rank": (1, 8)}, lora),
        Method("bitfit", "biases only", {"lr": (3e-4, 1e-3, 3e-3, 1e-2)}, bitfit),
        Method("ia3", "(IA)3", {"lr": (1e-3, 3e-3, 1e-2, 3e-2)}, ia3),
        Method(
            "lofit",
            "head edits without gates",
            {"lr": (1e-2, 2e-2, 5e-2, 1e-1)},
            lofit,
            optional=EDIT_OPTIONS,
            nonnegative=("units",),
        ),
        Method("red", "edits of MLPs' outputs", {"lr": (1e-3, 3e-3, 1e-2, 3e-2)}, red),
        Method("tct", "curvature of activations", {"lr": (1e-2, 2e-2, 5e-2, 1e-1)}, tct),
        Method(
            "jola+tct",
            "both on one model",
            {"lr": (2e-2, 5e-2), "gate_lr": (5e-1,), "curvature_lr": (3e-2, 1e-1)},
            jola_tct,
        ),
        Method(
            "jola",
            "gated head edits",
            {"lr": (2e-2, 5e-2), "gate_lr": (2e-1, 5e-1)},
            jola,
            optional=(*EDIT_OPTIONS, *GATE_OPTIONS),
            nonnegative=("by_row", "units", "steady"),
        ),
    )
}


def find_method(name: str) -> Method:
    """The method of that name; ValueError for none."""
    if name not in METHODS:
        raise ValueError(f"methods must be among {list(METHODS)}, got {name!r}")
    return METHODS[name]
