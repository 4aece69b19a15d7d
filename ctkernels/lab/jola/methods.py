"""The methods of the comparison on texts: their attachment to a model, trained parameters, and settings to try."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
    """A model with a method attached.

    Attributes:
        model: frozen except for the parameters of the method.
        groups: parameter groups for an optimizer.
        callbacks: of the Trainer.
        measure: called with batches of training examples before training.
    """

    model: Any
    groups: list[dict[str, Any]]
    callbacks: list[Any] = field(default_factory=list)
    measure: Callable[[Iterable[Mapping[str, Any]]], Any] | None = None

    def _tensors(self) -> dict[str, Tensor]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return trained | {name: unit for name, unit in self.model.named_buffers() if UNIT in name}

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained parameters and their units, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state from :meth:`state`; without units in it, units are 1."""
        tensors = self._tensors()
        if set(state) not in (set(tensors), {name for name in tensors if UNIT not in name}):
            raise ValueError(f"saved weights do not fit: expected {sorted(tensors)[:2]}, got {sorted(state)[:2]}")
        for name, value in tensors.items():
            value.copy_(state[name]) if name in state else value.fill_(1)


Attach = Callable[..., AbstractContextManager[Attached]]  # of a model, a setting and a schedule of the gate penalty


@contextmanager
def _through_peft(model: nn.Module, config: Any) -> Iterator[Any]:
    """Wraps the model by peft; removes the wrappers and restores ``requires_grad`` afterwards."""
    peft = require("peft", "lab", "an adapter")
    with kept_trainable(model):
        wrapped = peft.get_peft_model(model, config)
        try:
            yield wrapped
        finally:
            wrapped.unload()
            model.__dict__.pop("peft_config", None)


def _trainable(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


def _ungated(config_of: Callable[[Setting], Any], measured: bool = False) -> Attach:
    """Attaches an adapter of peft that is trained with one rate; ``measured``: in units of the heads."""

    @contextmanager
    def attach(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
        with _through_peft(model, config_of(setting)) as wrapped:
            measure = _measure(wrapped, setting) if measured else None
            yield Attached(wrapped, _trainable(wrapped, setting["lr"]), measure=measure)

    return attach


def _gated(config_of: Callable[[Setting], Any]) -> Attach:
    """Attaches an adapter with gated head edits; gates, and curvature if it has any, have rates of their own."""

    @contextmanager
    def attach(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
        from ... import adapters

        with _through_peft(model, config_of(setting)) as wrapped:
            rates = {name: setting[name] for name in ("lr", "gate_lr", "curvature_lr") if name in setting}
            callbacks = [adapters.JolaPenaltyCallback(schedule, units=0)]
            if share := setting.get("steady"):
                callbacks.append(_steady_gates(wrapped, share))
            groups = adapters.parameter_groups(wrapped, **rates)
            yield Attached(wrapped, groups, callbacks, _measure(wrapped, setting))

    return attach


def _measure(model: Any, setting: Setting) -> Callable[[Iterable[Mapping[str, Any]]], Any] | None:
    from ... import adapters

    return partial(adapters.measure_units, model) if setting.get("units", 1) else None


def _steady_gates(model: nn.Module, share: float) -> Any:
    """A callback of the Trainer: gates are trained but not sampled in the first ``share`` of the steps."""
    import transformers

    class SteadyGates(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steady = state.global_step < share * state.max_steps
            for layer in model.modules():
                for config in getattr(layer, "jola_config", {}).values():
                    config.freeze_gates = steady

    return SteadyGates()


# Optional settings of methods with head edits; `by_row` and `units` are 0 or 1, `steady` is the part of the steps, from the
# first, in which gates are not sampled.
EDIT_OPTIONS = ("init_std", "units")
GATE_OPTIONS = ("by_row", "init_log_alpha", "temperature", "steady")


def _jola(setting: Setting, **values: Any) -> Any:
    """Both edits of every head."""
    from ... import adapters

    values |= {name: setting[name] for name in ("init_std", "init_log_alpha", "temperature") if name in setting}
    if setting.get("by_row"):
        values["gate_sampling"] = "row"
    return adapters.JolaConfig(task_type="CAUSAL_LM", **values)


def _jola_tct(setting: Setting) -> Any:
    """Head edits and curvature of activations as one adapter."""
    from ... import adapters

    return adapters.JointConfig(task_type="CAUSAL_LM")


def _lofit(setting: Setting) -> Any:
    """Head edits without gates: "LoFiT" and "no gate" in the JoLA paper."""
    return _jola(setting, freeze_gates=True)


def _red(setting: Setting) -> Any:
    """Scale and offset of every MLP's output, ungated, starting at the identity: RED (arXiv:2402.15179)."""
    return _jola({}, site="mlp", freeze_gates=True, init_std=0.0)


def _tct(setting: Setting) -> Any:
    """Trainable Curvature Tuning: beta and coeff per channel of the activations of the feed-forward layers."""
    from ... import adapters

    return adapters.CurvatureConfig(task_type="CAUSAL_LM")


def _lora(setting: Setting) -> Any:
    """LoRA on peft's default projections of the architecture (query and value for Llama), scale 2."""
    rank = int(setting["rank"])
    return require("peft", "lab", "an adapter").LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank)


def _ia3(setting: Setting) -> Any:
    """(IA)3: learned scales of keys, values and the feed-forward layer."""
    return require("peft", "lab", "an adapter").IA3Config(task_type="CAUSAL_LM")


@contextmanager
def _bitfit(model: nn.Module, setting: Setting, schedule: str = "exponential") -> Iterator[Attached]:
    """Biases only; linear layers without a bias get one of zeros (Llama has no biases)."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    bare: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is None and m is not head]
    saved = {
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
            yield Attached(model, _trainable(model, setting["lr"]))
        finally:
            for module in bare:
                module.bias = None
            with torch.no_grad():
                for owner, biases in saved.items():
                    for key, value in biases.items():
                        owner._parameters[key].copy_(value)  # type: ignore[union-attr]


def _is_bias(name: str) -> bool:
    return name == "bias" or name.endswith("_bias")


# ``attach(model, setting, schedule)`` is a context manager that yields an :class:`Attached` and restores the model.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("zero-shot", "the model as it is", {}, None),
        Method("lora", "LoRA, rank tuned", {"lr": (1e-3, 3e-3), "rank": (1, 8)}, _ungated(_lora)),
        Method("bitfit", "biases only", {"lr": (3e-4, 1e-3, 3e-3, 1e-2)}, _bitfit),
        Method("ia3", "(IA)3", {"lr": (1e-3, 3e-3, 1e-2, 3e-2)}, _ungated(_ia3)),
        Method(
            "lofit",
            "head edits without gates",
            {"lr": (1e-2, 2e-2, 5e-2, 1e-1)},
            _ungated(_lofit, measured=True),
            optional=EDIT_OPTIONS,
            nonnegative=("units",),
        ),
        Method("red", "edits of MLPs' outputs", {"lr": (1e-3, 3e-3, 1e-2, 3e-2)}, _ungated(_red)),
        Method("tct", "curvature of activations", {"lr": (1e-2, 2e-2, 5e-2, 1e-1)}, _ungated(_tct)),
        Method(
            "jola+tct",
            "both on one model",
            {"lr": (2e-2, 5e-2), "gate_lr": (5e-1,), "curvature_lr": (3e-2, 1e-1)},
            _gated(_jola_tct),
        ),
        Method(
            "jola",
            "gated head edits",
            {"lr": (2e-2, 5e-2), "gate_lr": (2e-1, 5e-1)},
            _gated(_jola),
            optional=(*EDIT_OPTIONS, *GATE_OPTIONS),
            nonnegative=("by_row", "units", "steady"),
        ),
    )
}


def find_method(name: str) -> Method:
    """The method of that name; ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(f"methods must be among {list(METHODS)}, got {name!r}")
    return METHODS[name]
