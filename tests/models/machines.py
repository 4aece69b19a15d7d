"""What the rule-based state machines share: profiles, ways to write weights, and twins that are told apart by no output.

``CTKERNELS_MACHINES=long`` runs many more steps than CI does (``make fuzz``).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.nn.utils import parametrize

SEED = datetime.date.today().toordinal()
LONG = os.environ.get("CTKERNELS_MACHINES") == "long"


def profile(examples: int, steps: int) -> settings:
    """A few runs, or with ``CTKERNELS_MACHINES=long`` forty times as many."""
    return settings(
        max_examples=examples * (40 if LONG else 1),
        stateful_step_count=steps * (2 if LONG else 1),
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def dated(machine: type) -> type:
    """The machine with a seed that changes by the day, which pytest prints where it fails."""
    test = machine.TestCase.runTest  # type: ignore[attr-defined]
    machine.TestCase.runTest = hypothesis.seed(SEED)(test)  # type: ignore[attr-defined]
    return machine


def noise(like: Tensor, seed: int) -> Tensor:
    """Numbers of ``like``'s shape and dtype, the same for a model and its twin."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).mul_(0.2).to(like.dtype)


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 1.25 * weight


def _optimizer_step(layer: nn.Module, seed: int) -> None:
    wanted = layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    layer.weight.grad = noise(layer.weight, seed)
    torch.optim.SGD([layer.weight], lr=0.5).step()
    layer.weight.grad = None
    layer.weight.requires_grad_(wanted)


def _copy(layer: nn.Module, seed: int) -> None:
    with torch.no_grad():
        layer.weight.copy_(noise(layer.weight, seed))


def _in_place(layer: nn.Module, seed: int) -> None:
    with torch.no_grad():
        layer.weight.mul_(1 + (seed % 7) / 10)


def _data_in_place(layer: nn.Module, seed: int) -> None:
    layer.weight.data.add_(noise(layer.weight, seed))


def _data_replaced(layer: nn.Module, seed: int) -> None:
    layer.weight.data = noise(layer.weight, seed)


def _shared_with_numpy(layer: nn.Module, seed: int) -> None:
    array = layer.weight.detach().numpy()
    array += noise(layer.weight, seed).numpy()


def _load(layer: nn.Module, seed: int) -> None:
    layer.load_state_dict(
        {name: noise(t, seed) if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    )


def _assigned(layer: nn.Module, seed: int) -> None:
    state = {name: noise(t, seed) if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    wanted = layer.weight.requires_grad
    layer.load_state_dict(state, assign=True)
    layer.requires_grad_(wanted)


def _set(layer: nn.Module, seed: int) -> None:
    with torch.no_grad():
        layer.weight.set_(noise(layer.weight, seed))


def _initialised(layer: nn.Module, seed: int) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(seed))


def _new_parameter(layer: nn.Module, seed: int) -> None:
    layer.weight = nn.Parameter(noise(layer.weight, seed), requires_grad=layer.weight.requires_grad)


WRITES: dict[str, Callable[[nn.Module, int], None]] = {
    "optimizer step": _optimizer_step,
    "copy_": _copy,
    "in place": _in_place,
    ".data in place": _data_in_place,
    ".data replaced": _data_replaced,
    "through numpy": _shared_with_numpy,
    "load_state_dict": _load,
    "load_state_dict(assign=True)": _assigned,
    "set_": _set,
    "nn.init": _initialised,
    "a new Parameter": _new_parameter,
}


def parametrized(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer)


def toggle_parametrization(layer: nn.Module) -> None:
    if parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    else:
        parametrize.register_parametrization(layer, "weight", Scaled())


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """The same modules of the same classes, with the same attributes, and the same bits."""
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    assert list(ours) == list(theirs)
    for name, module in ours.items():
        assert type(module).__name__ == type(theirs[name]).__name__, name
        assert set(vars(module)) == set(vars(theirs[name])), (name, set(vars(module)) ^ set(vars(theirs[name])))
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert torch.equal(value.nan_to_num(), expected[name].nan_to_num()), name
