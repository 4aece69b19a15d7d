"""GELU in every form that networks write it in, and the squared ReLU: found, told apart, and exact at the neutral point."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctkernels
from ctkernels import steer
from ctkernels.steering.activations import ACTIVATIONS

# sqrt(2 / pi) as the implementations round it; in float32 it is one number.
DIGITS = {"FastGELUActivation": 3e-11, "BloomGelu": 4e-9}


class Approximate(nn.Module):
    """F.gelu in the ways that code may choose the form."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.held = functools.partial(F.gelu, approximate="tanh")
        self.module, self.exact = nn.GELU(approximate="tanh"), nn.GELU()

    def forward(self, x):
        x = F.gelu(x, approximate="tanh") + nn.functional.gelu(x, approximate="none") + F.gelu(x)
        x = x + F.gelu(x, approximate=self.mode)
        partial = functools.partial(F.gelu, approximate="tanh")
        return partial(self.held(x)) + self.module(x) + self.exact(x)


def points(dtype):
    return torch.linspace(-12, 12, 2001, dtype=dtype)


@pytest.mark.parametrize("mode", ["tanh", "none"])
def test_functions_are_told_apart_by_their_arguments(mode):
    model, x = Approximate(mode).double(), points(torch.float64)
    expected = model(x)
    with steer(model, 0.5, 1.0, "all") as handle:
        found = [(site.name, site.activation) for site in handle.sites]
        assert found == [
            ("forward:gelu_tanh", "gelu_tanh"),
            ("forward#2:gelu", "gelu"),
            ("forward#3:gelu", "gelu"),
            ("forward#4:gelu", "gelu"),  # read when the call is made
            ("forward#5:gelu_tanh", "gelu_tanh"),
            ("held:gelu_tanh", "gelu_tanh"),
            ("module", "gelu_tanh"),
            ("exact", "gelu"),
        ]
        assert handle.missed == handle.skipped == ()
        error = (model(x) - expected).abs()
        assert (error <= 1e-13 * (1 + expected.abs())).all()
        handle.beta = 0.8
        assert (model(x) - expected).abs().max() > 0.1
    assert torch.equal(model(x), expected)


def test_one_form_is_selected_without_the_other():
    model, x = Approximate("none"), points(torch.float32)
    exact = {"forward#2:gelu", "forward#3:gelu", "forward#4:gelu", "exact"}
    with steer(model, 0.5, 1.0, "gelu_tanh") as handle:
        assert {site.activation for site in handle.sites} == {"gelu_tanh"}
        assert len(handle.skipped) == len(exact)
    with steer(model, {"*": 0.7}, 1.0, "gelu") as handle:
        assert len(handle.sites) == len(exact)
        held = model.held(x)
        assert torch.equal(held, F.gelu(x, approximate="tanh"))


def modules():
    names = [f"transformers.activations.{name}" for name in ("GELUTanh", "NewGELUActivation", "FastGELUActivation")]
    names += ["transformers.activations.AccurateGELUActivation", "transformers.models.bloom.modeling_bloom.BloomGelu"]
    return [*names, "transformers.activations.QuickGELUActivation", "timm.layers.activations.GELUTanh",
            "timm.layers.activations.QuickGELU"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", modules())
def test_modules_of_libraries_are_exact_at_the_neutral_point(path, dtype):
    """In float64 to the digits of the module's own constant; in float32 within its own distance from float64."""
    place, _, name = path.rpartition(".")
    activation = "quick_gelu" if "Quick" in name else "gelu_tanh"
    model = nn.Sequential(getattr(pytest.importorskip(place), name)()).eval()
    x = points(dtype)
    wide = x.double()
    rate = 1.702 if activation == "quick_gelu" else (8 / torch.pi) ** 0.5 * (1 + 0.044715 * wide**2)
    truth = wide * torch.sigmoid(rate * wide)
    plain = model(x).double()
    neutral = ACTIVATIONS[activation]
    with steer(model, neutral.beta, neutral.coeff, "all") as handle:
        assert [site.activation for site in handle.sites] == [activation]
        steered = model(x).double()
    own = (plain - truth).abs()
    allowed = 2 * own.max() if dtype == torch.float32 else DIGITS.get(name, 0.0)
    conditioning = 1 + 3 * (rate * wide).abs()  # of the tail by the rounding of its exponent, which is a cubic
    assert ((steered - truth).abs() <= allowed + 4 * torch.finfo(dtype).eps * conditioning * truth.abs()).all()
    # The constants apart, what torch computes is that function.
    assert own.max() <= DIGITS.get(name, 0.0) + 16 * torch.finfo(dtype).eps * 12


def test_a_squared_relu_is_the_square_of_the_unit():
    activations = pytest.importorskip("transformers.activations")
    model, x = nn.Sequential(activations.ReLUSquaredActivation()), points(torch.float32)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = steer(model, 1.0)
    assert [site.name for site in handle.sites] == ["0.forward:relu"]
    assert torch.equal(model(x), expected)
    handle.beta = 0.8
    assert torch.equal(model(x), ctkernels.functional.ctu(x, torch.tensor(0.8)).square())
