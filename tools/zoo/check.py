"""Checks of one architecture: steered, fused and adapted it computes the right result, and unchanged parts are reported.

Checks run in float64, where a network's amplification of rounding is far below the effect of any mistake. The amplification
is measured with several runs with weights and input perturbed by two ulps (``fused_models.rounded_anew``). With ``worst`` the
largest resulting change of an output or of the input's gradient, a model that computes the same in another order differs from
the original by at most

    3 * worst * (1 + error / 2 ulps)

that is, twice ``worst`` as in ``fused_models.assert_networks_agree``, and once more for the original's own error; ``error`` is
the kernels' (ctkernels/ops/ctu/README.md, "Precision"), where units compute.
"""

from __future__ import annotations

import copy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from fused_models import NORMS, observe, prepare, rounded_anew
from steered_models import assert_same, snapshot
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ctkernels
from ctkernels.steering.activations import RELU_FAMILY, SIGNATURES

from .choose import Architecture, build

Runs = list[dict[str, Tensor]]  # what ``rounded_anew`` gives
UNIT_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5}
# beta and coeff are float32; a unit at 1 - beta = 0.1 amplifies an ulp of beta by ten, in forward and again in the gradient.
KNOB_ERROR = 100 * torch.finfo(torch.float32).eps
# Near the neutral point; beta = 0.9 would nearly turn them into ReLUs.
OTHERS = {"*:silu": 0.45, "*:gelu": 0.45, "*:gelu_tanh": 0.45, "*:quick_gelu": 0.6}

# Models without a comparison of the input's gradient: their BatchNorms in evaluation get a transposed view of dy, for which
# torch 2.14 computes a wrong gradient on the CPU (a contiguous copy gives the one of finite differences).
WRONG_IN_TORCH = {"efficientvit_m0"}


@dataclass
class Finding:
    """The result for one architecture. ``failures``: a line per failure. ``skipped``: why it was skipped."""

    name: str
    module: str
    size: int
    sites: int = 0
    missed: int = 0
    fused: int = 0
    left: int = 0
    norms: int = 0
    adapted: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0


def check(architecture: Architecture) -> Finding:
    found = Finding(architecture.name, architecture.module, architecture.size)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = _model(architecture)
        runs = rounded_anew(model, x, range(2))
        for part in (_steer, _fuse_plain, _fuse_steered, _adapt):
            with _reported(found, part.__name__.strip("_").replace("_", " ")):
                part(model, x, runs, found)
    return found


@contextmanager
def _reported(found: Finding, where: str) -> Iterator[None]:
    """Turn an exception into a line of the finding, with its place in the library or the test."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(sys.exc_info()[2])
        own = next((f for f in reversed(frames) if "ctkernels" in f.filename or "/zoo/" in f.filename), frames[-1])
        at = f"{own.filename.rsplit('/', 1)[-1]}:{own.lineno}"
        lines = str(error).splitlines() or [""]
        found.failures.append(f"{where}: {type(error).__name__} ({at}): {lines[0][:400]}")


def _model(architecture: Architecture) -> tuple[nn.Module, Tensor]:
    """The architecture with non-trivial weights and statistics, and an input; in float64 if possible."""
    model = prepare(build(architecture.name, architecture.arguments)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(0, 0.02)
    x = torch.randn(1, 3, architecture.size, architecture.size)
    wide = copy.deepcopy(model).double()
    try:
        wide(x.double())
    except RuntimeError:  # the model creates float32 tensors
        return model, x
    return wide, x.double()


# ---- steer ------------------------------------------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Records plain activations called outside of units, as "file:line" of the calling code."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._inside = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = SIGNATURES.get(getattr(function, "__name__", "").rstrip("_"))
        if form is not None and form.activation in RELU_FAMILY and form.read(*args, **kwargs) is not None:
            frame = sys._getframe(1)
            while frame.f_back is not None and (
                "/torch/" in frame.f_code.co_filename or "zoo" in frame.f_code.co_filename
            ):
                frame = frame.f_back
            if "ctkernels" not in frame.f_code.co_filename:
                self.places.append(f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        return function(*args, **kwargs)


def _steer(model: nn.Module, x: Tensor, runs: Runs, found: Finding) -> None:
    before = snapshot(model)
    plain = model(x)
    with _Calls() as there, torch.no_grad():
        model(x)
    try:
        handle = ctkernels.steer(model, 1.0)
    except ValueError as error:
        if there.places:
            raise AssertionError(f"activations at {there.places[0]} ..., and steer finds none: {error}") from None
        return
    found.sites, found.missed = len(handle.sites), len(handle.missed)
    _expect_equal("steered at beta = 1", model(x), plain)
    with _Calls() as rest, torch.no_grad():
        model(x)
    if rest.places and not handle.missed:
        raise AssertionError(
            f"{len(rest.places)} activations are neither steered nor missed: {sorted(set(rest.places))}"
        )
    handle.beta = 0.9
    with mock.patch.object(ctkernels.functional, "ctu", wraps=ctkernels.functional.ctu) as unit:
        changed = model(x)
    if unit.call_count != len(there.places) - len(rest.places):
        calls = f"{len(there.places)} activations were called, {len(rest.places)} still are"
        raise AssertionError(f"{calls}, and {unit.call_count} units")
    if not changed.isfinite().all() and plain.isfinite().all():
        raise AssertionError("steered at beta = 0.9 the model's output is not finite")
    handle.remove()
    assert_same(before, snapshot(model))
    _expect_equal("no longer steered", model(x), plain)


# ---- fuse -------------------------------------------------------------------------------------------------------------


def _fuse_plain(model: nn.Module, x: Tensor, runs: Runs, found: Finding) -> None:
    _fuse(model, x, runs, found)


def _fuse_steered(model: nn.Module, x: Tensor, runs: Runs, found: Finding) -> None:
    try:
        handle = ctkernels.steer(model, {"*": 0.9} | _present(model, OTHERS), activations="all")
    except ValueError:  # nothing to steer, which _steer checks
        return
    try:
        _fuse(model, x, rounded_anew(model, x, range(2)), found)
    finally:
        handle.remove()


def _present(model: nn.Module, patterns: dict[str, float]) -> dict[str, float]:
    """The patterns that match a site; others would raise an error."""
    with ctkernels.steer(model, {}, {}, activations="all") as handle:
        kinds = {site.activation for site in handle.sites}
    return {pattern: value for pattern, value in patterns.items() if pattern.removeprefix("*:") in kinds}


def _fuse(model: nn.Module, x: Tensor, runs: Runs, found: Finding) -> None:
    before, plain = snapshot(model), model(x)
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    expected, *perturbed = runs
    try:
        handle = ctkernels.fuse(model)
    except ValueError as error:
        unnamed = [name for name in norms if name not in str(error)]
        if unnamed and "left alone" not in str(error):
            raise AssertionError(f"nothing is fused, and no reason for {len(unnamed)} BatchNorms: {error}") from None
        return
    try:
        _expect_close("fused", _compared(model, x, found), expected, perturbed, UNIT_ERROR[x.dtype])
        with torch.no_grad():
            _expect_close("fused, in inference", {"output": model(x)}, expected, perturbed, UNIT_ERROR[x.dtype])
        found.fused, found.left, found.norms = max(found.fused, len(handle.sites)), len(handle.left), len(norms)
        taken = {site.norm for site in handle.sites}
        unnamed = [name for name in norms if name not in taken and not _named(name, handle.left)]
        if unnamed:
            raise AssertionError(
                f"{len(unnamed)} of {len(norms)} BatchNorms are neither fused nor named: {unnamed[:3]}"
            )
    finally:
        handle.remove()
    assert_same(before, snapshot(model))
    _expect_equal("no longer fused", model(x), plain)
    model(torch.cat([x, x]))  # another size, to check that no traced value is cached
    _expect_equal("no longer fused, copied", copy.deepcopy(model)(x), plain)


def _named(name: str, left: dict[str, str]) -> bool:
    """Whether a module or a parent of it is in ``left``."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in left for end in range(len(parts) + 1))


# ---- adapt ------------------------------------------------------------------------------------------------------------


def _adapt(model: nn.Module, x: Tensor, runs: Runs, found: Finding) -> None:
    from peft import get_peft_model

    from ctkernels.adapters import CurvatureConfig

    plain, before = model(x), {name: type(module) for name, module in model.named_modules()}
    expected, *perturbed = runs
    try:
        with ctkernels.steer(copy.deepcopy(model), 0.9, activations="all") as handle:
            sites = {site.name for site in handle.sites}
            steered = observe(handle._model, x)
    except ValueError:
        return
    config = CurvatureConfig(input_shape=tuple(x.shape[1:]), share="site", init_beta=0.9, init_coeff=0.5)
    adapted = get_peft_model(model, config).eval()
    found.adapted = sum("curvature_raw_beta" in name for name, _ in adapted.named_parameters())
    perturbed = [{k: steered[k] + (run[k] - expected[k]) for k in ("output", "input")} for run in perturbed]
    _expect_close("adapted", _compared(adapted, x, found), steered, perturbed, KNOB_ERROR)
    if not sites:
        raise AssertionError("adapted without a site")
    with adapted.disable_adapter():
        _expect_equal("adapter disabled", adapted(x), plain)
    back = adapted.unload()
    _expect_equal("unloaded", back(x), plain)
    after = {name: type(module) for name, module in back.named_modules()}
    if after != before:
        changed = [name for name in before if after.get(name) is not before[name]]
        raise AssertionError(f"unloaded, modules are of other types: {changed[:3]}")


# ---- comparisons ------------------------------------------------------------------------------------------------------


def _compared(model: nn.Module, x: Tensor, found: Finding) -> dict[str, Tensor]:
    seen = observe(model, x)
    if found.name in WRONG_IN_TORCH:
        seen.pop("input", None)
    return seen


def _expect_equal(what: str, got: Tensor, expected: Tensor) -> None:
    if not torch.equal(got.nan_to_num(), expected.nan_to_num()) or not torch.equal(got.isnan(), expected.isnan()):
        worst = (got - expected).abs().max().item()
        raise AssertionError(f"{what}: other bits, by up to {worst:.3g} of {expected.abs().max().item():.3g}")


def _expect_close(
    what: str, got: dict[str, Tensor], expected: dict[str, Tensor], perturbed: Runs, error: float
) -> None:
    distance: Callable[[Tensor, Tensor], float] = lambda a, b: (a - b).abs().max().item()  # noqa: E731
    for name in ("output", "input"):
        if name not in got:
            continue
        scale, eps = expected[name].abs().max().item(), torch.finfo(got[name].dtype).eps
        worst = max(distance(run[name], expected[name]) for run in perturbed) + eps * scale
        off, bound = distance(got[name], expected[name]), 3 * worst * (1 + error / (2 * eps))
        if not off <= bound:
            quantity = "the input's gradient" if name == "input" else "the output"
            raise AssertionError(f"{what}: {quantity} is off by {off:.3g} of {scale:.3g}, allowed {bound:.3g}")
