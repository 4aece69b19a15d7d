"""Is this gradient right? Compared with finite differences, and with the reference in float64; says where it is not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .nn import Knobs
from .ops._backend import use_backend
from .steering.surgery import Steered

Run = Callable[[dict[str, Tensor]], Any]  # from the leaves, by name, to whatever the call returns

# ulps of a term of a gradient: the unit's closed forms are within 1e-6 of the sum of their terms in float32
# (for |x| up to ten times 1 - beta).
GRADE = 16

DIFFERENCES = "finite differences"
DOUBLE = "reference, float64"
OWN = "reference, own dtype"


@dataclass(frozen=True)
class Finding:
    """One comparison. ``error`` and ``allowed`` are absolute, the largest over the tensor.

    Attributes:
        place: "model", or the site's or sample's name.
        what: "output 0", "gradient of layer1.weight".
        check: "finite differences"; "reference, float64"; "reference, own dtype" (the tensors' own, against the
            reference in float64, where plain torch's error in that dtype sets the scale).
        error: how far it is off.
        allowed: how far it may be.
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
    """What :func:`gradcheck_module` found. ``str(report)`` is a summary; ``ok`` says whether everything agrees."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def wrong(self) -> list[Finding]:
        """What does not agree, the worst first."""
        bad = [finding for finding in self.findings if not finding.ok]
        return sorted(bad, key=lambda f: -math.inf if math.isnan(f.error) else -f.error / max(f.allowed, 1e-300))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; not-a-number errors are None."""
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
    """Check the outputs and gradients of a model that uses this library: steered, tuned, edited, or with its layers.

    Three comparisons, of the model and of each of its units (whose inputs are recorded in a forward pass):

    - the gradient of every trainable parameter and floating-point input in float64 against central differences along
      random directions;
    - outputs and gradients in float64 against the same model on the reference backend;
    - outputs and gradients in the model's own dtype against the reference in float64: at most twice the error that
      plain torch makes there, with these parameters and with others an ulp away, plus one ulp.

    ``model`` itself is not changed: copies are run, each time from the same random state.

    Args:
        model: any module.
        inputs, kwargs: what it is called with; floating-point tensors are differentiated.
        backend: name of the backend to check; None takes what serves each call.
        directions: random directions for each tensor. Default: 3.
        sites: check each unit apart, too. Default: True.
        training: check the model in training mode. Default: False.
        seed: of the directions, and of whatever the model draws.

    Returns:
        GradientReport: ``report.ok``, ``str(report)``, ``report.wrong`` (where, and by how much).

    Raises:
        ValueError: nothing in the model or its inputs can be differentiated, or ``backend`` is unknown.
        RuntimeError: the backend cannot serve the model's tensors.

    Example::

        report = gradcheck_module(model, torch.randn(2, 3, 32, 32))
        assert report.ok, report
    """
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    narrow = copy.deepcopy(model).train(training)
    wide = _widened(narrow)
    values = {"": inputs, **kwargs}
    report = GradientReport()
    check = _Check(backend, directions, seed, report)
    check("model", _runner(wide, values), _runner(narrow, values), _leaves(narrow, values))
    if sites:
        for name, arguments in _record(wide, values, seed).items():
            site, own = wide.get_submodule(name), narrow.get_submodule(name)
            given = {"": arguments}
            leaves = _leaves(own, given)
            if leaves:
                check(name or "model", _runner(site, given), _runner(own, given), leaves)
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
    """Check ``run``, a function of ``leaves``, and add what is found to ``report``.

    ``accuracy``: how far two exact evaluations may differ, for a function that is defined by a quadrature.
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
        plain = self.gradients(narrow, leaves, "reference")
        nudged = self.gradients(narrow, self.nudged(leaves), "reference")
        terms = self.differences(wide, double, got)
        for what, exact in truth.items():
            baseline = max(_distance(plain[what], exact), _distance(nudged[what], exact))
            info = torch.finfo(plain[what].dtype)
            largest = float(exact.abs().max()) if exact.numel() else 0.0
            # A gradient may be a sum that nearly cancels; each of its terms carries some ulps (GRADE).
            sums = GRADE * terms.get(what, 0.0)
            allowed = 2 * baseline + info.eps * (largest + sums) + info.tiny + self.accuracy
            self.add(what, OWN, _distance(own[what], exact), allowed)
            # Rounding errors scale with the unit roundoff; here both sides make them.
            ulp = torch.finfo(torch.float64).eps
            scaled = 2 * baseline * ulp / info.eps
            self.add(what, DOUBLE, _distance(got[what], exact), 2 * scaled + 2 * ulp * (largest + sums) + self.accuracy)

    def add(self, what: str, check: str, error: float, allowed: float) -> None:
        self.report.findings.append(Finding(self.place, what, check, error, allowed))

    def nudged(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The leaves, half an ulp off at random: how a network carries rounding shows even where torch's own is lucky."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        result = {}
        for name, leaf in leaves.items():
            sign = torch.rand(leaf.shape, generator=generator).to(leaf.device) - 0.5
            result[name] = leaf * (1 + torch.finfo(leaf.dtype).eps * sign.sign()).to(leaf.dtype)
        return result

    def outputs(self, run: Run, leaves: dict[str, Tensor], backend: str | None) -> list[Tensor]:
        devices = {leaf.device for leaf in leaves.values() if leaf.is_cuda}
        with torch.random.fork_rng(devices=devices), nullcontext() if backend is None else use_backend(backend):
            torch.manual_seed(self.seed)
            found = list(_tensors(run(leaves)))
        if not found:
            raise ValueError(f"{self.place}: expected floating-point outputs, got none")
        return found

    def weights(self, outputs: list[Tensor]) -> list[Tensor]:
        """What a scalar is made of the outputs with; the same for all copies."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
            for out in outputs
        ]

    def gradients(self, run: Run, leaves: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
        """Outputs and gradients, by what they are."""
        names = list(leaves)
        values = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        outputs = self.outputs(run, values, backend)
        context = nullcontext() if backend is None else use_backend(backend)
        live = [(out, w) for out, w in zip(outputs, self.weights(outputs)) if out.requires_grad]
        with context:
            grads = torch.autograd.grad(
                [out for out, _ in live], [values[n] for n in names], [w for _, w in live], allow_unused=True
            )
        result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        for name, grad in zip(names, grads):
            result[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
        return result

    def differences(self, run: Run, leaves: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
        """Compare; returns how large the terms are whose sum a gradient's element is, on average over its elements."""
        terms: dict[str, float] = {}
        generator = torch.Generator().manual_seed(self.seed + 1)
        for name, leaf in leaves.items():
            worst = (0.0, math.inf)
            for _ in range(self.directions if leaf.numel() > 1 else min(leaf.numel(), 1)):
                direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
                direction /= direction.norm()
                slope = float((got[f"gradient of {name}"] * direction).sum())
                error, allowed, spread = self.difference(run, leaves, name, direction, slope)
                what = f"gradient of {name}"
                terms[what] = max(terms.get(what, 0.0), spread / math.sqrt(leaf.numel()))
                if not error / allowed <= worst[0] / worst[1]:
                    worst = (error, allowed)
            if leaf.numel():
                self.add(f"gradient of {name}", DIFFERENCES, *worst)
        return terms

    def difference(
        self, run: Run, leaves: dict[str, Tensor], name: str, direction: Tensor, slope: float
    ) -> tuple[float, float, float]:
        """|slope - central difference|, the difference's own error (truncation and rounding), and its terms' magnitudes.

        The change from a step to half of it bounds the truncation, three times over; where a kink lies between the
        points it is large, so that smaller steps are tried, and the one that is known best is taken.
        """
        eps = torch.finfo(torch.float64).eps
        scale = 1 + float(leaves[name].abs().max())
        best: tuple[float, float, float] | None = None
        for shrink in (1, 16, 256):
            step = eps ** (1 / 3) * scale / shrink
            values = []
            magnitude = 0.0
            for h in (step, step / 2):
                ends: list[list[Tensor]] = []
                for sign in (1, -1):
                    moved = leaves | {name: leaves[name] + sign * h * direction}
                    with torch.no_grad():
                        outputs = self.outputs(run, moved, self.backend)
                    terms = [(out * w).double() for out, w in zip(outputs, self.weights(outputs))]
                    magnitude = max(magnitude, sum(float(term.abs().sum()) for term in terms))
                    ends.append(terms)
                changes = [(a - b) / (2 * h) for a, b in zip(*ends)]
                values.append(sum(float(change.sum()) for change in changes))
            spread = sum(float(change.abs().sum()) for change in changes)
            # Each value carries the rounding of a whole network, tens of ulps; the difference divides it by the step.
            allowed = 4 * abs(values[0] - values[1]) + 64 * eps * magnitude / step
            if best is None or allowed < best[1]:
                best = (abs(slope - values[1]), allowed, spread)
        assert best is not None
        return best


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.nan
    difference = (a.double() - b.double()).abs()
    same = a.double() == b.double()  # infinities
    return float(difference.masked_fill(same, 0).max()) if difference.numel() else 0.0


def _widened(module: nn.Module) -> nn.Module:
    """A copy in float64, parameters that resist casting included."""
    wide = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.double()
    return wide


def _leaves(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is differentiated: trainable parameters, and floating-point inputs."""
    found = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for name, value in _named(values):
        if isinstance(value, Tensor) and value.is_floating_point():
            found[f"input {name}"] = value.detach().to(dtype if value.dtype == torch.float64 else value.dtype)
    return found


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
        given = {name: leaf for name, leaf in leaves.items() if name in parameters}
        return torch.func.functional_call(module, given, positional, keywords)

    return run


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for held in value.values():
            yield from _tensors(held)
    elif isinstance(value, (list, tuple)):
        for held in value:
            yield from _tensors(held)


def _record(model: nn.Module, values: Mapping[str, Any], seed: int) -> dict[str, tuple[Any, ...]]:
    """{name of a unit: the positional arguments of its first call}, for the innermost modules of this library."""
    ours = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, Steered) or type(module).__module__.startswith("ctkernels."))
        and not isinstance(module, Knobs)
    }
    inner = {n: m for n, m in ours.items() if not any(o != n and (not n or o.startswith(n + ".")) for o in ours)}
    seen: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            kept = (a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
            seen.setdefault(name, tuple(kept))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in inner.items()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), use_backend("reference"):
            torch.manual_seed(seed)
            double = {name: leaf.double() for name, leaf in _leaves(model, values).items()}
            _runner(model, values)(double)
    finally:
        for handle in handles:
            handle.remove()
    return seen
