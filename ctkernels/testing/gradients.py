"""Gradient checks against finite differences and the reference in float64, with a report of what disagrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._copying import copy_module
from ..nn import Knobs
from ..ops.backends import use_backend
from ..steering.patch import Steered
from .differences import central_difference, rounding_noise
from .samples import Sample

Run = Callable[[dict[str, Tensor]], Any]  # maps leaves, by name, to the result of a call

DRAWS = 8  # of the baseline's rounding errors: another error is rarely twice the largest of these

DIFFERENCES = "finite differences"
DOUBLE = "reference, float64"
OWN = "reference, own dtype"


@dataclass(frozen=True)
class Finding:
    """One comparison. ``error`` and ``allowed`` are absolute, the largest over the tensor.

    Attributes:
        place: "model", or the name of a site or sample.
        what: "output 0", "gradient of layer1.weight".
        check: "finite differences"; "reference, float64"; "reference, own dtype" (in the tensors' dtype, against the
            reference in float64; the tolerance derives from plain torch's error in that dtype).
        error: the largest error.
        allowed: the tolerance.
    """

    place: str
    what: str
    check: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN


@dataclass
class GradientReport:
    """Result of :func:`gradcheck_module`: its ``findings``. ``str(report)`` is a summary; ``ok`` is True if all agree."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def wrong(self) -> list[Finding]:
        """The comparisons that disagree, the worst first."""
        bad = [finding for finding in self.findings if not finding.ok]
        return sorted(bad, key=lambda f: -math.inf if math.isnan(f.error) else -f.error / max(f.allowed, 1e-300))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values; errors that are NaN become None."""
        rows = [asdict(f) | {"ok": f.ok, "error": None if math.isnan(f.error) else f.error} for f in self.findings]
        return {"ok": self.ok, "checks": len(rows), "wrong": len(self.wrong), "findings": rows}

    def __str__(self) -> str:
        lines = []
        for check in dict.fromkeys(f.check for f in self.findings):
            rows = [f for f in self.findings if f.check == check]
            worst = max(rows, key=lambda f: math.inf if math.isnan(f.error) else f.error / max(f.allowed, 1e-300))
            lines.append(
                f"{check}: {sum(f.ok for f in rows)} of {len(rows)} agree; nearest to its bound: {_line(worst)}"
            )
        wrong = self.wrong
        lines += [f"WRONG  {_line(f)} [{f.check}]" for f in wrong[:20]]
        return "\n".join(lines + ([f"and {len(wrong) - 20} more"] if len(wrong) > 20 else []))


def _line(f: Finding) -> str:
    return f"{f.place}, {f.what}: off by {f.error:.3g}, allowed {f.allowed:.3g}"


def gradcheck_module(
    model: nn.Module,
    *inputs: Any,
    backend: str | None = None,
    directions: int = 3,
    sites: bool = True,
    training: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> GradientReport:
    """Checks the outputs and gradients of a model that uses this library: steered, adapted, or with its layers.

    Three comparisons, for the model and for each of its units (with inputs recorded in a forward pass):

    - gradients of all trainable parameters and floating-point inputs in float64 against central differences along random
      directions, within the error of the differences: truncation, kinks between their points, and measured rounding;
    - outputs and gradients in the model's own dtype against the reference in float64: at most twice the error of plain
      torch, plus one ulp of the result and of the sum of the magnitudes of its terms, as sums may have another order.
      torch's error is the largest of several draws: at these parameters and at others an ulp away, and with other signs of
      a gradient's terms;
    - outputs and gradients in float64 against the reference in float64, in the same way.

    ``model`` is not changed: the checks run copies, always from the same random state.

    Args:
        model: any module.
        inputs, kwargs: its arguments; floating-point tensors are differentiated.
        backend: the backend to check; None checks the one that serves each call.
        directions: random directions per tensor. Default: 3.
        sites: also check each unit separately. Default: True.
        training: check the model in training mode. Default: False.
        seed: of the directions, and of the model's random numbers.

    Returns:
        GradientReport: ``report.ok``, ``str(report)``, ``report.wrong`` (what disagrees, and by how much).

    Raises:
        ValueError: nothing in the model or its inputs can be differentiated, or ``backend`` is unknown.
        RuntimeError: the backend cannot serve the model's tensors.

    Examples:
        >>> report = gradcheck_module(model, x)
        >>> assert report.ok, report
    """
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    narrow = copy_module(model).train(training)
    wide = _widened(narrow)
    values = {"": inputs, **kwargs}
    report = GradientReport()
    check = _Check(backend, directions, seed, report)
    check("model", _runner(wide, values), _runner(narrow, values), _leaves(narrow, values))
    if sites:
        for name, arguments in _record(wide, values, seed).items():
            wide_site, narrow_site = wide.get_submodule(name), narrow.get_submodule(name)
            values = {"": arguments}
            leaves = _leaves(narrow_site, values)
            if leaves and name:  # "" is the model
                check(name, _runner(wide_site, values), _runner(narrow_site, values), leaves)
    return report


def check_call(
    name: str,
    run: Run,
    leaves: dict[str, Tensor],
    report: GradientReport,
    backend: str | None,
    directions: int = 3,
    accuracy: float = 0.0,
) -> None:
    """Checks ``run``, a function of ``leaves``, and adds the findings to ``report``.

    ``accuracy``: the possible difference of two exact evaluations, for a function defined by a quadrature.
    """
    _Check(backend, directions, 0, report, accuracy)(name, run, run, leaves)


class _Check:
    """The three comparisons of one call."""

    def __init__(
        self, backend: str | None, directions: int, seed: int, report: GradientReport, accuracy: float = 0.0
    ) -> None:
        self.backend, self.directions, self.seed, self.report = backend, directions, seed, report
        self.accuracy = accuracy

    def __call__(self, place: str, wide: Run, narrow: Run, leaves: dict[str, Tensor]) -> None:
        if not leaves:
            raise ValueError(f"{place}: expected parameters or inputs that can be differentiated, got none")
        self.place = place
        double = {name: leaf.detach().double() for name, leaf in leaves.items()}
        got = self.gradients(wide, double, self.backend)
        truth = self.gradients(wide, double, "reference")
        own = self.gradients(narrow, leaves, self.backend)
        errors, double_errors = self.baseline_errors(wide, narrow, leaves, double)
        terms = self.differences(wide, double, got)
        for what, exact in truth.items():
            size = terms.get(what, 0.0) + (float(exact.abs().max()) if exact.numel() else 0.0)
            # The truth is computed in float64, with an error of its own.
            truth_error = double_errors[what] + torch.finfo(torch.float64).eps * size + self.accuracy
            for check, value, error in ((OWN, own[what], errors[what]), (DOUBLE, got[what], double_errors[what])):
                info = torch.finfo(value.dtype)
                self.add(what, check, _distance(value, exact), 2 * error + info.eps * size + info.tiny + truth_error)

    def add(self, what: str, check: str, error: float, allowed: float) -> None:
        self.report.findings.append(Finding(self.place, what, check, error, allowed))

    def baseline_errors(
        self, wide: Run, narrow: Run, leaves: dict[str, Tensor], double: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Errors of plain torch, by result, in the leaves' dtypes and in float64: the largest of several draws.

        One draw says little about a gradient with one element, whose error may be anything from 0 to many ulps. All draws
        have the same magnitudes but other rounding errors: outputs are weighted with other signs, and leaves are perturbed
        by an ulp, which also shows how the network propagates errors of that size.
        """
        errors: dict[str, float] = {}
        double_errors: dict[str, float] = {}
        for draw in range(1, DRAWS + 1):
            exact = self.gradients(wide, double, "reference", draw)
            for largest, run, values in (
                (errors, narrow, leaves),
                (errors, narrow, self.perturbed(leaves, draw)),
                (double_errors, wide, self.perturbed(double, draw)),
            ):
                for what, value in self.gradients(run, values, "reference", draw).items():
                    largest[what] = max(largest.get(what, 0.0), _distance(value, exact[what]))
        return errors, double_errors

    def perturbed(self, leaves: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        """The leaves, each element an ulp up or down at random."""
        generator = torch.Generator().manual_seed(self.seed + 2 + draw)
        result = {}
        for name, leaf in leaves.items():
            up = torch.rand(leaf.shape, generator=generator).to(leaf.device) < 0.5
            away = torch.where(up, math.inf, -math.inf).to(leaf.dtype)
            result[name] = torch.nextafter(leaf, away)
        return result

    def outputs(self, run: Run, leaves: dict[str, Tensor], backend: str | None) -> list[Tensor]:
        devices = {leaf.device for leaf in leaves.values() if leaf.is_cuda}
        with torch.random.fork_rng(devices=devices), nullcontext() if backend is None else use_backend(backend):
            torch.manual_seed(self.seed)
            outputs = list(_tensors(run(leaves)))
        if not outputs:
            raise ValueError(f"{self.place}: expected floating-point outputs, got none")
        return outputs

    def weights(self, outputs: list[Tensor], draw: int = 0) -> list[Tensor]:
        """Weights of the outputs in a scalar: the same for all copies, with other signs in other draws."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
        if draw:
            generator.manual_seed(self.seed + 2 + draw)
            weights = [w * (torch.randint(0, 2, w.shape, generator=generator) * 2 - 1) for w in weights]
        return [w.to(out.device, out.dtype) for w, out in zip(weights, outputs)]

    def gradients(self, run: Run, leaves: dict[str, Tensor], backend: str | None, draw: int = 0) -> dict[str, Tensor]:
        """Outputs and gradients, by their description."""
        names = list(leaves)
        values = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        outputs = self.outputs(run, values, backend)
        context = nullcontext() if backend is None else use_backend(backend)
        live = [(out, w) for out, w in zip(outputs, self.weights(outputs, draw)) if out.requires_grad]
        with context:
            grads = torch.autograd.grad(
                [out for out, _ in live], [values[n] for n in names], [w for _, w in live], allow_unused=True
            )
        result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        for name, grad in zip(names, grads):
            result[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
        return result

    def terms(self, run: Run, leaves: dict[str, Tensor]) -> Tensor:
        """The terms of the scalar, one per element of the outputs."""
        with torch.no_grad():
            outputs = self.outputs(run, leaves, self.backend)
        return torch.cat([(out * w).double().flatten().cpu() for out, w in zip(outputs, self.weights(outputs))])

    def differences(self, run: Run, leaves: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
        """Compares the slopes along random directions with central differences.

        Returns, for every gradient, a lower estimate of the sum of the magnitudes of an element's terms. With t_ij the
        part of term i in element j, and n elements, the terms change by sum_j t_ij d_j along a direction d of length 1, of
        magnitude about (sum_j t_ij^2 / n)^(1/2). Summed over i and divided by n^(1/2), that is at most the mean over j of
        sum_i |t_ij|, and equal to it if every term belongs to one element, as those of a channel do.
        """
        sizes: dict[str, float] = {}
        generator = torch.Generator().manual_seed(self.seed + 1)

        def terms(at: dict[str, Tensor]) -> Tensor:
            return self.terms(run, at)

        here, noise = terms(leaves), rounding_noise(terms, leaves, self.seed)
        for name, leaf in leaves.items():
            worst = (0.0, 1.0)
            for _ in range(self.directions if leaf.numel() > 1 else min(leaf.numel(), 1)):
                direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
                direction /= direction.norm()
                slope = float((got[f"gradient of {name}"] * direction).sum())
                changes, allowed = central_difference(terms, leaves, name, direction, here, noise)
                error = abs(slope - float(changes.sum()))
                if not error / allowed <= worst[0] / worst[1]:
                    worst = (error, allowed)
                size = float(changes.abs().sum()) / math.sqrt(leaf.numel())
                sizes[f"gradient of {name}"] = max(sizes.get(f"gradient of {name}", 0.0), size)
            if leaf.numel():
                self.add(f"gradient of {name}", DIFFERENCES, *worst)
        return sizes


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.nan
    difference = (a.double() - b.double()).abs()
    same = a.double() == b.double()  # infinities
    return float(difference.masked_fill(same, 0).max()) if difference.numel() else 0.0


def _widened(module: nn.Module) -> nn.Module:
    """A float64 copy, including parameters that resist casting."""
    wide = copy_module(module).double()
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.double()
    return wide


def _leaves(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors to differentiate: trainable parameters and floating-point inputs."""
    leaves = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for name, value in _named(values):
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[f"input {name}"] = value.detach().to(dtype if value.dtype == torch.float64 else value.dtype)
    return leaves


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((str(i), value) for i, value in enumerate(values[""]))
    yield from ((name, value) for name, value in values.items() if name)


def _runner(module: nn.Module, values: Mapping[str, Any]) -> Run:
    parameters = {name for name, _ in module.named_parameters()}

    def run(leaves: dict[str, Tensor]) -> Any:
        def pick(name: str, value: Any) -> Any:
            leaf = leaves.get(f"input {name}")
            return value if leaf is None else leaf.clone()  # a module may work in place

        positional = tuple(pick(str(i), value) for i, value in enumerate(values[""]))
        keywords = {name: pick(name, value) for name, value in values.items() if name}
        weights = {name: leaf for name, leaf in leaves.items() if name in parameters}
        return torch.func.functional_call(module, weights, positional, keywords)

    return run


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _record(model: nn.Module, values: Mapping[str, Any], seed: int) -> dict[str, tuple[Any, ...]]:
    """{name of a unit: the positional arguments of its first call}, for the innermost modules of this library."""
    units = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, Steered) or type(module).__module__.startswith("ctkernels."))
        and not isinstance(module, Knobs)
    }
    inner = {n: m for n, m in units.items() if not any(o != n and (not n or o.startswith(n + ".")) for o in units)}
    recorded: dict[str, tuple[Any, ...]] = {}

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            copies = (a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
            recorded.setdefault(name, tuple(copies))

        return hook

    handles = [module.register_forward_pre_hook(recorder(name)) for name, module in inner.items()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), use_backend("reference"):
            torch.manual_seed(seed)
            double = {name: leaf.double() for name, leaf in _leaves(model, values).items()}
            _runner(model, values)(double)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def gradcheck(sample: Sample, *, second_order: bool = True) -> None:
    """Checks reverse and forward mode, batched, of a float64 sample against finite differences; and second order, reverse
    and forward mode over reverse, batched.

    Args:
        sample: a call with float64 tensors.
        second_order: check second-order gradients too. Default True.

    Raises:
        torch.autograd.gradcheck.GradcheckError: with the Jacobians that disagree.
    """
    leaves = sample.requiring_grad()
    names = list(leaves.tensors())
    inputs = tuple(leaves.tensors().values())

    def call(*values: Tensor) -> Tensor:
        by_name = dict(zip(names, values))
        return leaves.map(lambda k, _: by_name[k])()

    torch.autograd.gradcheck(
        call, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    if second_order:
        torch.autograd.gradgradcheck(call, inputs, check_fwd_over_rev=True, check_batched_grad=True)
