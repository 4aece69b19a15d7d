"""Linear probes: linear classifiers on frozen features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._extras import require

PROBES = ("logistic", "adam")
FLOOR = 0.05  # of the mean deviation, so that features of dead units, which vary by 1e-18, are not scaled up
ITERATIONS = 2000  # at most, see Probe.converged


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier: class = argmax of ((x - mean) / scale) @ weight.T + bias. float64 NumPy arrays."""

    mean: Any
    scale: Any
    weight: Any
    bias: Any
    converged: bool

    def predict(self, features: Tensor) -> Tensor:
        """Classes, int64 (n,), of features (n, d)."""
        logits = ((features.double().numpy() - self.mean) / self.scale) @ self.weight.T + self.bias
        return torch.from_numpy(logits.argmax(1))


def fit_probe(features: Tensor, labels: Tensor, kind: str = "logistic", l2: float = 0.01, seed: int = 0) -> Probe:
    """Fits a linear classifier to frozen features.

    Args:
        features: float (n, d).
        labels: int64 (n,), in [0, classes).
        kind: ``"logistic"``: scikit-learn's logistic regression on standardised features (each divided by its deviation
            plus 5 % of the mean deviation), minimising mean cross-entropy + l2/2 * |weight|^2. ``"adam"``: the paper's
            layer on unscaled features: Adam, batches of 32, 20 epochs, rate 1e-3 after one epoch of warm-up, a tenth of it
            after epoch 10; ``l2`` is ignored.
        l2: the penalty, > 0.
        seed: of initial weights and batch order (``"adam"``; ``"logistic"`` is deterministic).

    Raises:
        ValueError: features are not finite or do not vary, the kind is unknown, or l2 is not positive.
        ImportError: NumPy or scikit-learn is missing; the message names the extra.

    Examples:
        >>> probe = fit_probe(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
        >>> probe.predict(torch.tensor([[-1.0], [2.0]])).tolist()
        [0, 1]

    Source: Curvature Tuning paper, appendix B (``"adam"``) and its first version's scripts (``"logistic"``).
    """
    check_probe(kind, l2)
    numpy = require("numpy", "lab", "a linear probe")
    x = features.double().numpy()  # NumPy, not torch: its sums do not depend on the number of threads
    if not numpy.isfinite(x).all():
        raise ValueError(f"features must be finite, got {int((~numpy.isfinite(x)).sum())} values that are not")
    deviation = x.std(0)
    if not deviation.max() > 0:
        raise ValueError("features must vary, all of them are constant: is this layer the right one?")
    if kind == "adam":
        return _adam(features, labels, seed)
    mean, scale = x.mean(0), deviation + FLOOR * deviation.mean()
    return _logistic(mean, scale, (x - mean) / scale, labels.numpy(), l2)


def check_probe(kind: str, l2: float) -> None:
    """Checks arguments of :func:`fit_probe`, and its packages, before features are computed."""
    if kind not in PROBES:
        raise ValueError(f"probe must be one of {list(PROBES)}, got {kind!r}")
    if not (math.isfinite(l2) and l2 > 0):
        raise ValueError(f"l2 must be a positive number, got {l2}")
    for module in ("numpy", "threadpoolctl"):
        require(module, "lab", "a linear probe")
    if kind == "logistic":
        require("sklearn.linear_model", "lab", "the logistic probe")


def _logistic(mean: Any, scale: Any, x: Any, labels: Any, l2: float) -> Probe:
    numpy = require("numpy", "lab", "the logistic probe")
    linear_model = require("sklearn.linear_model", "lab", "the logistic probe")
    regression = linear_model.LogisticRegression(C=1 / (l2 * len(x)), max_iter=ITERATIONS).fit(x, labels)
    converged = bool(regression.n_iter_.max() < ITERATIONS)
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(coefficients) == 1:  # of two classes, scikit-learn has a row for the second only
        coefficients = numpy.concatenate([-coefficients, coefficients])
        intercepts = numpy.concatenate([-intercepts, intercepts])
    classes = regression.classes_
    weight = numpy.zeros((classes.max() + 1, x.shape[1]))
    bias = numpy.full(len(weight), -math.inf)
    weight[classes], bias[classes] = coefficients, intercepts
    return Probe(mean, scale, weight, bias, converged)


def _adam(features: Tensor, labels: Tensor, seed: int) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    bound = features.shape[1] ** -0.5
    classes = int(labels.max()) + 1
    weight = torch.empty(classes, features.shape[1]).uniform_(-bound, bound, generator=generator).requires_grad_()
    bias = torch.empty(classes).uniform_(-bound, bound, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([weight, bias], lr=1e-3)
    inputs, step, steps = features.float(), 0, -(-len(features) // 32)
    for epoch in range(20):
        for batch in torch.randperm(len(inputs), generator=generator).split(32):
            step += 1
            optimiser.param_groups[0]["lr"] = 1e-3 * min(1, step / steps) * (0.1 if epoch >= 10 else 1)
            loss = torch.nn.functional.cross_entropy(inputs[batch] @ weight.T + bias, labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    weights, biases = weight.detach().double().numpy(), bias.detach().double().numpy()
    return Probe(0.0, 1.0, weights, biases, True)
