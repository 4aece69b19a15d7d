"""Reading features from a fused network: the same within rounding, and the network as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_models import Residual, assert_networks_agree, observe, prepare, rounded_anew
from steered_models import assert_same, snapshot
from torch import nn

import ctkernels
from ctkernels.lab import search_beta
from ctkernels.lab.images import backbone as backbones

pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")
pytest.importorskip("tqdm", reason="the laboratory needs tqdm")


def network():
    torch.manual_seed(0)
    found = prepare(Residual(["basic", "projected"])).eval()
    found.head = nn.Identity()  # so that its output is what is read
    return found


def images(n=12):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def is_fused(model):
    try:
        ctkernels.fuse(model).remove()
    except ValueError as error:
        return "expected one that is not fused" in str(error)
    return False


@pytest.mark.parametrize("beta", [0.7, 1.0])
def test_fused_features_are_the_unfused_ones(beta):
    model, x = network(), images()
    steered = copy.deepcopy(model)
    ctkernels.steer(steered, beta)
    runs = [{"output": run["output"]} for run in rounded_anew(steered, x)]
    truth = {"output": observe(steered.double(), x.double())["output"]}
    before = snapshot(model)
    with backbones.steered_backbone(model, x[:1], None, fast=True) as backbone:
        assert is_fused(model)
        assert_networks_agree({"output": backbone.features(beta)(x)}, runs, truth)
    assert_same(before, snapshot(model))


def test_the_network_is_given_back_after_an_error():
    model, x = network(), images()
    before, expected = snapshot(model), model(x)

    def stopped():
        with backbones.steered_backbone(model, x[:1], None, fast=True) as backbone:
            backbone.features(0.9)(x)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        stopped()
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("model", [network(), nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(192, 5))])
def test_a_search_chooses_what_it_would_choose_unfused(model, monkeypatch):
    """The second network has nothing to fuse."""
    labels = torch.arange(90) % 3
    data = images(90) + 0.3 * (labels - 1.0)[:, None, None, None], labels
    found = search_beta(model, data, betas=[0.6, 0.8], progress=False)

    def nothing(_):
        raise ValueError("nothing to fuse")

    monkeypatch.setattr(backbones, "fuse", nothing)
    unfused = search_beta(model, data, betas=[0.6, 0.8], progress=False)
    assert (found.chosen, found.val_accuracy, found.test) == (unfused.chosen, unfused.val_accuracy, unfused.test)
