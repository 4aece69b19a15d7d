"""Where features are taken, and the probes that read them."""

import math

import pytest
import torch
from torch import nn

from ctkernels.lab import fit_probe
from ctkernels.lab.images.features import find_hook_point, pool

pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")
pytest.importorskip("tqdm", reason="the laboratory needs tqdm")

from test_search_beta import small_net


@pytest.mark.parametrize(
    ("model", "feature_layer", "place", "dim"),
    [
        (small_net(), None, "input of 4", 8),
        (small_net(), "1", "output of 1", 8),  # (b, 8, 4, 4), averaged over places
        (small_net()[:3], None, "output of the network", 8),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.ReLU(), nn.Unflatten(1, (2, 3))),
            None,
            "output of the network",
            3,
        ),
    ],
)
def test_where_features_are_taken(model, feature_layer, place, dim):
    model = model.eval()
    found = find_hook_point(model, torch.randn(1, 3, 6, 6), feature_layer)
    assert str(found) == place
    with found.capture(model) as features:
        assert features(torch.randn(5, 3, 6, 6)).shape == (5, dim)


def test_features_of_a_network_that_knows_its_classifier():
    class Timm(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(3, 5), nn.Conv1d(5, 2, 1), nn.Linear(2, 2)

        def get_classifier(self):
            return self.head

        def forward(self, x):
            return {"logits": self.extra(self.head(self.body(x).relu()[..., None])[..., 0])}

    assert str(find_hook_point(Timm(), torch.randn(1, 3))) == "input of head"


def test_pool():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(pool((x[..., 0, 0], 7)), x[..., 0, 0])
    assert torch.allclose(pool(x), x.mean((2, 3)))
    assert torch.allclose(pool({"tokens": x[:, 0]}), x[:, 0].mean(1))
    with pytest.raises(ValueError, match="at least two dimensions"):
        pool(x[0, 0, 0])


def test_logistic_probe_is_at_its_minimum_and_ignores_dead_units():
    torch.manual_seed(1)
    x, y = torch.randn(80, 4), torch.arange(80) % 3
    x[:, 0] += y
    x[:, 3] = 1e-18 * torch.randn(80)  # what smoothing makes of a dead unit
    probe = fit_probe(x, y, l2=0.05)
    assert probe.converged
    standard = torch.from_numpy((x.double().numpy() - probe.mean) / probe.scale)
    weight = torch.from_numpy(probe.weight).requires_grad_()
    bias = torch.from_numpy(probe.bias).requires_grad_()
    loss = nn.functional.cross_entropy(standard @ weight.T + bias, y) + 0.025 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(g.abs().max() for g in gradients) < 1e-3
    assert abs(probe.weight[:, 3]).max() < 1e-12


@pytest.mark.parametrize("kind", ["logistic", "adam"])
def test_probes_learn_and_repeat(kind):
    torch.manual_seed(1)
    y = torch.arange(600) % 2
    x = torch.randn(600, 8) + 4 * (y[:, None] - 0.5)
    probe = fit_probe(x, y, kind, seed=5)
    assert (probe.predict(x) == y).double().mean() > 0.9
    assert (fit_probe(x, y, kind, seed=5).weight == probe.weight).all()


def test_probe_refuses_features_that_say_nothing():
    with pytest.raises(ValueError, match="features must vary"):
        fit_probe(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="features must be finite, got 2"):
        fit_probe(torch.tensor([[math.nan], [math.inf], [0.0]]), torch.tensor([0, 1, 0]))
