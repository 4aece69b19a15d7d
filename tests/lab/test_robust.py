"""Robustness: attacks that must succeed at the analytic bound, seeded corruptions, a beta that must be found."""

import json
import math

import pytest
import torch
from torch import nn

from ctkernels.lab import ImageSet, Preprocess
from ctkernels.lab.images.features import find_hook_point
from ctkernels.lab.images.probe import fit_probe
from ctkernels.lab.robustness.attacks import Attacked, PixelClassifier, Threat, attack, check_attacks
from ctkernels.lab.robustness.corruptions import CORRUPTIONS, corrupt
from ctkernels.lab.robustness.evaluate import robustness
from ctkernels.lab.robustness.result import Outcome

pytest.importorskip("tqdm", reason="the laboratory needs tqdm")
needs_attacks = pytest.mark.skipif(
    pytest.importorskip("importlib.util").find_spec("pyautoattack") is None, reason="attacks need pyautoattack"
)
needs_corruptions = pytest.mark.skipif(
    pytest.importorskip("importlib.util").find_spec("imagecorruptions") is None,
    reason="corruptions need imagecorruptions-imaug",
)


class Linear(nn.Module):
    """Two classes, told apart by a linear function of the normalised image."""

    def __init__(self, shape, seed=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        score = (x * self.weight).flatten(1).sum(1)
        return torch.stack([-score / 2, score / 2], 1)


MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)


def linear_case(n=12):
    """Images near mid-grey, so that clamping to [0, 1] never binds, and each one's exact distances to the boundary."""
    model = Linear((3, 4, 4))
    pixels = 0.45 + 0.1 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    classifier = PixelClassifier(model, MEAN, STD)
    slope = (model.weight / torch.tensor(STD)[:, None, None]).double()
    with torch.no_grad():
        logits = classifier(pixels)
    margin = (logits[:, 1] - logits[:, 0]).double().abs()
    distances = {"linf": margin / slope.abs().sum(), "l2": margin / slope.norm()}
    return classifier, pixels, logits.argmax(1), {norm: d.detach() for norm, d in distances.items()}


@needs_attacks
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce", "fab"])
def test_an_attack_succeeds_on_a_linear_model_exactly_beyond_the_analytic_bound(norm, name):
    classifier, pixels, labels, distances = linear_case()
    for i, distance in enumerate(distances[norm].tolist()):
        image, label = pixels[i : i + 1], labels[i : i + 1]
        below = attack(classifier, image, label, Threat(norm, 0.99 * distance), attacks=[name], iterations=40)
        above = attack(classifier, image, label, Threat(norm, 1.01 * distance), attacks=[name], iterations=40)
        assert below.robust.all(), f"image {i} was fooled within its margin"
        assert not above.robust.any(), f"image {i} withstood {name} beyond its margin"
        found = above.adversarial
        assert found is not None
        assert Threat(norm, 1.01 * distance).allows(image, found).all()
        assert not Threat(norm, 1.01 * distance).allows(image, image + (found - image) * 1.02).any()
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1
        assert int(classifier(found).argmax(1)) != int(label)


@needs_attacks
def test_square_needs_no_gradient():
    class Blind(nn.Module):
        """A sign in front of the linear model: the gradient is zero everywhere."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.sign(self.inner(x))

    classifier, pixels, labels, distances = linear_case()
    threat = Threat("linf", 1.5 * float(distances["linf"].max()))
    blind = PixelClassifier(Blind(classifier.model), MEAN, STD)
    result = attack(blind, pixels, labels, threat, attacks=["apgd-ce", "square"], iterations=10, queries=400)
    steps = result.accuracies()
    assert list(steps) == ["clean", "apgd-ce", "square"]
    assert steps["square"] < steps["apgd-ce"] - 0.2
    assert Outcome(tuple(result.robust.double().tolist()), steps.pop("clean"), steps).masked


@needs_attacks
def test_attacks_repeat_and_leave_torch_and_the_model_alone():
    classifier, pixels, labels, distances = linear_case()
    threat = Threat("linf", float(distances["linf"].median()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = attack(classifier, pixels, labels, threat, iterations=10, queries=50, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again = attack(classifier, pixels, labels, threat, iterations=10, queries=50, seed=3, batch_size=64)
    assert torch.equal(first.robust, again.robust)
    assert torch.equal(first.adversarial, again.adversarial)
    assert classifier.model.weight.requires_grad
    # two classes: targeted APGD has no loss
    assert list(first.after) == ["apgd-ce", "fab-t", "square"]


def test_a_pixel_classifier_is_the_network_behind_its_normalisation_and_its_probe():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    ).eval()
    pixels = torch.rand(20, 3, 6, 6)
    images = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(PixelClassifier(network, MEAN, STD)(pixels), network(images), rtol=0, atol=0)
    pytest.importorskip("sklearn", reason="the probe needs scikit-learn")
    point = find_hook_point(network, images)
    with point.capture(network) as features:
        found = features(images)
    labels = torch.arange(20) % 3
    probe = fit_probe(found, labels)
    classifier = PixelClassifier(network, MEAN, STD, probe, point)
    logits = classifier(pixels)
    exact = (found.double().numpy() - probe.mean) / probe.scale @ probe.weight.T + probe.bias
    # float32 sums of d products: d + 2 roundings of the terms' magnitudes
    size = (
        torch.from_numpy(abs(found.double().numpy()) @ abs(probe.weight / probe.scale).T) + classifier.head.bias.abs()
    )
    error = (logits.double() - torch.from_numpy(exact)).abs()
    assert bool((error <= (found.shape[1] + 2) * torch.finfo(torch.float32).eps * size.double()).all())
    assert torch.autograd.grad(logits.sum(), [p := pixels.clone().requires_grad_()], allow_unused=True)[0] is None
    assert bool((torch.autograd.grad(classifier(p).sum(), p)[0] != 0).any())
    gray = PixelClassifier(network, MEAN, STD)
    torch.testing.assert_close(gray(pixels[:, :1]), gray(pixels[:, :1].expand(-1, 3, -1, -1)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Threat("l1", 1.0), "norm must be one of"),
        (lambda: Threat("linf", 0.0), "eps must be a positive number"),
        (lambda: Threat("l2", math.nan), "eps must be a positive number"),
        (lambda: check_attacks(["pgd"], 10), "attacks must be some of"),
        (lambda: check_attacks(["apgd-t"], 3), "needs at least 4 classes, got 3"),
        (lambda: attack(nn.Identity(), torch.rand(2, 3, 4, 4) * 2, torch.zeros(2), Threat("l2", 1)), "in \\[0, 1\\]"),
        (lambda: corrupt(torch.rand(1, 3, 40, 40), "rain", 1), "name must be one of gaussian_noise, .*, got 'rain'"),
        (
            lambda: corrupt(torch.rand(1, 3, 40, 40), "fog", 6),
            "severity must be a whole number .* at most 5, got 6",
        ),
        (lambda: corrupt(torch.rand(1, 3, 16, 40), "fog", 1), "at least 32 x 32"),
    ],
)
def test_bad_input_to_attacks_and_corruptions(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


def test_the_standard_ensemble_and_what_few_classes_leave_of_it():
    assert check_attacks(None, 10) == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert check_attacks(None, 2) == ("apgd-ce", "fab-t", "square")


def test_accuracies_are_what_each_attack_left():
    right = torch.tensor([True, True, False, True])
    left = torch.tensor([True, False, False, True])
    assert Attacked(right, {"a": left}).accuracies() == {"clean": 0.75, "a": 0.5}


@needs_corruptions
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_repeats_and_grows(name):
    import numpy as np

    smooth = torch.linspace(0, 1, 40)[None, None, :, None] * torch.ones(2, 3, 1, 36) * 0.8 + 0.1
    pixels = (smooth + 0.1 * (torch.rand(2, 3, 40, 36, generator=torch.Generator().manual_seed(0)) - 0.5)).clamp(0, 1)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - what the library draws from
    mild, again = corrupt(pixels, name, 1, seed=7), corrupt(pixels, name, 1, seed=7)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert torch.equal(mild, again)
    assert mild.shape == (2, 3, 40, 36)
    assert torch.equal((mild * 255).round() / 255, mild)
    assert 0 <= float(mild.min()) <= float(mild.max()) <= 1
    harsh = corrupt(pixels, name, 5, seed=7)
    assert (harsh - pixels).abs().mean() > (mild - pixels).abs().mean() > 1 / 255
    alone = corrupt(pixels[:1], name, 1, seed=7)
    assert torch.equal(alone, mild[:1]), "an image's noise must not depend on the images beside it"


class Planted(nn.Module):
    """Reads the class off the mean of all pixels at one beta, and off one pixel alone at any other.

    The one pixel differs by 0.02 between the classes and the mean by 0.2, so only the first withstands a change of
    8/255. The unit's value at 0, (1 - beta) ln(2) / 2 for c = 1/2, tells beta.
    """

    def __init__(self, beta):
        super().__init__()
        self.act = nn.ReLU()
        self.value = (1 - beta) * math.log(2) / 2

    def forward(self, x):
        at_zero = self.act(torch.zeros_like(x[:, 0, 0, 0]))
        gate = torch.exp(-(((at_zero - self.value) / 0.006) ** 2))
        sturdy, frail = x.mean((1, 2, 3)) - 0.5, 10 * (x[:, 0, 0, 0] - 0.5)
        score = 20 * (gate * sturdy + (1 - gate) * frail)
        return torch.stack([-score, score], 1)


def planted_images(n, size=4):
    labels = torch.arange(n) % 2
    sign = (2.0 * labels - 1)[:, None, None, None]
    pixels = 0.5 + 0.1 * sign * torch.ones(n, 1, size, size)
    pixels[:, :, 0, 0] = 0.5 + 0.01 * sign[:, :, 0, 0]
    return pixels, labels


OWN = {"head": "own", "progress": False, "betas": [0.7, 0.8, 0.9], "corruptions": (), "iterations": 20, "queries": 50}


@needs_attacks
def test_finds_the_planted_beta_and_shows_its_gain():
    result = robustness(
        Planted(0.8), None, planted_images(20), planted_images(40), threats=[Threat("linf", 8 / 255)], **OWN
    )
    name = "ℓ∞ 8/255"
    assert result.chosen == {name: 0.8}
    assert result.test[name]["plain"].accuracy == 0
    assert result.test[name]["plain"].clean == 1
    assert result.test[name]["s-ct"].accuracy == 1
    assert result.verdict().startswith(f"{name}, S-CT at beta = 0.8: it helped: 100.0 % against 0.0 %")
    assert [t.beta for t in result.validation[name]] == [0.7, 0.8, 0.9, 1.0]
    assert result.arguments["attacks"] == ["apgd-ce", "fab-t", "square"]


@needs_attacks
def test_a_beta_that_is_no_better_in_validation_is_the_plain_network():
    result = robustness(
        Planted(0.3), None, planted_images(20), planted_images(40), threats=[Threat("linf", 8 / 255)], **OWN
    )
    assert result.chosen == {"ℓ∞ 8/255": 1.0}
    assert "s-ct" not in result.test["ℓ∞ 8/255"]
    assert "no beta did better than the plain network in validation" in result.verdict()


@needs_attacks
def test_trained_networks_are_tested_beside_it_and_everything_is_saved(tmp_path):
    class Sturdy(Planted):
        def forward(self, x):
            score = 20 * (x.mean((1, 2, 3)) - 0.5)
            return torch.stack([-score, score], 1)

    model, other = Planted(0.8).train(), Sturdy(0.8).train()
    result = robustness(
        model,
        None,
        planted_images(20, size=6),
        planted_images(40, size=6),
        trained={"t-ct": other, "own pixels": PixelClassifier(other, (0.0,), (1.0,))},
        threats=[Threat("l2", 0.1)],
        **OWN,
    )
    assert result.test["ℓ2 0.1"]["t-ct"].accuracy == 1
    assert result.test["ℓ2 0.1"]["own pixels"] == result.test["ℓ2 0.1"]["t-ct"]
    assert result.gain("ℓ2 0.1", "t-ct").points == pytest.approx(1 - result.test["ℓ2 0.1"]["plain"].accuracy)
    assert model.training
    assert other.training
    assert model(torch.zeros(1, 1, 4, 4)).shape == (1, 2)
    result.save(tmp_path / "result.json", command="x")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["schema"] == "ctkernels.robust/1"
    assert [row["method"] for row in saved["conditions"][0]["test"]] == ["plain", "s-ct", "t-ct", "own pixels"]
    assert saved["command"] == "x"
    assert "T-CT" in result.table()


@needs_corruptions
def test_corruptions_with_a_probe_repeat_with_the_seed():
    pytest.importorskip("sklearn", reason="the probe needs scikit-learn")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    labels = torch.arange(24) % 3
    images = torch.rand(24, 36, 36, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25 * labels[:, None, None]
    data = ImageSet(images, labels, ("a", "b", "c"), Preprocess(size=32, resize=32))
    options = {
        "threats": (),
        "corruptions": ("impulse_noise", "fog"),
        "severities": (1, 3),
        "betas": [0.8],
        "progress": False,
    }
    first, again = (robustness(network, data, data, data, **options) for _ in range(2))
    assert first.test == again.test
    assert first.validation == again.validation
    outcome = first.test["corruptions"]["plain"]
    assert set(outcome.steps) == {"impulse_noise", "fog"}
    assert outcome.accuracy == pytest.approx(sum(outcome.steps.values()) / 2)
    assert set(outcome.right) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    other = robustness(network, data, data, data, seed=1, **options)
    assert other.test != first.test


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "none"}, "head must be one of"),
        ({"head": "probe"}, "train must be images for head='probe'"),
        ({"threats": ()}, "threats or corruptions must hold something"),
        ({"threats": (Threat("l2", 1), Threat("l2", 1))}, "threats must differ"),
        ({"betas": [2.0]}, r"betas must be START:STOP:STEP .*, all in \[0, 1\], got"),
        ({"coeff": 2.0}, r"coeff must be a number in \[0, 1\], got 2.0"),
        ({"attacks": ["pgd"]}, "attacks must be some of"),
        ({"attacks": ["apgd-t"]}, "apgd-t needs at least 4 classes, got 2"),
        ({"max_attacked": 0}, "max_attacked must be a whole number of at least 1, got 0"),
        ({"corruptions": ("fog",)}, "at least 32 x 32"),
        (
            {"val": (torch.full((2, 1, 4, 4), math.nan), torch.tensor([0, 1]))},
            "val: pixels must be in \\[0, 1\\] without NaN",
        ),
        ({"test": (torch.rand(2, 1, 4, 4), torch.tensor([0, 2]))}, "test: labels must be in \\[0, 2\\)"),
        ({"test": (torch.rand(2, 1, 4, 4), torch.tensor([0.0, 1.0]))}, "test: labels must be 2 integers"),
        ({"val": "photos"}, "val must be an ImageSet or a pair"),
    ],
)
def test_bad_input_to_the_recipe(change, message):
    arguments = {"train": None, "val": planted_images(4), "test": planted_images(4), **OWN, **change}
    train, val, test = (arguments.pop(name) for name in ("train", "val", "test"))
    with pytest.raises(ValueError, match=message):
        robustness(Planted(0.8), train, val, test, **arguments)
