"""``steer`` and the handle it returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import _marks
from ..nn import unit_interval
from .activations import ACTIVATIONS, RELU_FAMILY, select
from .patch import apply_patches, revert_patches
from .scan import ScanResult, Site, Unsteered, is_steered, scan

Value = float | Tensor | Mapping[str, float | Tensor]


def steer(
    model: nn.Module,
    beta: Value,
    coeff: Value = 0.5,
    activations: str | Iterable[str] = RELU_FAMILY,
) -> Steering:
    """Replaces every activation of ``model`` by a CT unit, in place and reversibly.

    Finds activation modules wherever they are referenced, and functional calls (``F.relu``, ``torch.relu``,
    ``x.relu()``, also in helper functions) in the source of the model's methods, without running anything. Selected
    activations that cannot be steered are listed in ``handle.missed``, with a warning.

    The model stays the same object, with the same parameters, hooks and ``state_dict``. It can be compiled, cast,
    moved, copied and pickled; beta and coeff stay float32. A copy is steered independently: :func:`handle_of` returns
    its handle. Other models may share activations and other modules without weights (as a default argument, or a class
    attribute): until ``remove()`` the model holds its own copies, and other models are not steered. A shared module with
    weights is steered for all models.

    ``beta`` and ``coeff`` are numbers in [0, 1] for all sites, or mappings from patterns to numbers. Patterns are
    matched (as by ``fnmatch``) against site names, with and without the trailing ":activation": ``{"layer1.*": 0.9}``,
    ``{"*:gelu": 0.5}``. The last match counts. A site without a match in beta's mapping keeps its activation, bit for
    bit, unless a mapping for coeff matches it; a site matched by only one of two mappings has the other value at its
    neutral point.

    The meaning of the numbers depends on the activation. The ReLU family is neutral at beta = 1, with any coeff. SiLU
    and both GELUs are neutral at beta = 0.5, coeff = 1 (quick GELU at beta = 0.6299, coeff = 1); at beta = 1 they become
    ReLUs. For a model that mixes both, pass a mapping. In a squared ReLU, the ReLU is steered.

    Limits: a multi-head ``nn.TransformerEncoderLayer`` with a steered activation leaves its fused inference path, which
    would bypass the unit; its outputs then have the rounding of the ordinary path. Exported programs and captured graphs
    fix which sites are matched (``torch.compile`` recompiles). Activations chosen from containers at run time, or called
    by objects that are not modules, cannot be found in source code.

    Args:
        model: any module without steered parts.
        beta: curvature; 1 is the hardest unit, 0 the smoothest.
        coeff: 1 smooths the region selection, 0 the maximum. Default: 0.5, as in the paper.
        activations: "all", or some of "relu", "leaky_relu", "prelu", "relu6", "silu", "gelu" (exact), "gelu_tanh"
            (tanh approximation), "quick_gelu". A call whose ``approximate`` is not a literal counts as "gelu". Default: the
            first four.

    Returns:
        Steering: the handle. As a context manager, it removes itself on exit.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no site is found (near misses are listed), the model is already steered, a number is outside [0, 1],
            a pattern matches no site, or an activation is unknown. The model is unchanged.

    Examples:
        >>> handle = ctkernels.steer(model, beta=0.9)
        >>> handle.beta = 0.95
        >>> handle.remove()

    Source: Curvature Tuning paper, sections 3.2 and 4.1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    selection = select(activations)
    if _marks.FUSION in vars(model):
        raise ValueError("model: expected one that is not fused, got one that is; steer first, fuse then")
    if is_steered(model):
        raise ValueError(
            "model: expected one that is not steered, got one that is; set handle.beta, or handle.remove()"
        )
    result = scan(model, selection)
    if not result.sites:
        raise ValueError(nothing_found(model, selection, result))
    handle = Steering(model, result)
    points = handle._resolve(beta, coeff)
    apply_patches(result.swaps, result.edits)
    model.__dict__[_marks.STEERING] = handle
    if hasattr(model, "save_pretrained"):
        model.__dict__[_marks.SAVE_PRETRAINED] = partial(_refuse_to_save, model)
    handle._write(beta, coeff, points)
    if result.missed:
        missed = listed(result.missed, limit=10)
        warnings.warn(
            f"steer: {len(result.missed)} activations are not steered (handle.missed):\n{missed}", stacklevel=2
        )
    return handle


def handle_of(model: nn.Module) -> Steering:
    """Returns the handle of a steered model, also of a copied or unpickled one.

    Args:
        model: a module on which ``steer`` was called.

    Raises:
        ValueError: ``steer`` was not called on this module.

    Examples:
        >>> import copy
        >>> handle = ctkernels.steer(model, beta=0.9)
        >>> model_copy = copy.deepcopy(model)
        >>> ctkernels.handle_of(model_copy).beta = 0.8
    """
    handle = model.__dict__.get(_marks.STEERING)
    if handle is None:
        raise ValueError(
            f"model: expected one that steer() was called on, got a {type(model).__name__} without a handle"
        )
    return handle


class Steering:
    """Handle of a steered model, returned by :func:`steer`.

    Attributes:
        sites: the steered activations, a tuple of :class:`Site`.
        missed: selected activations that are not steered, a tuple of :class:`Unsteered` with reasons.
        skipped: activations outside the family or the selection, likewise.
    """

    def __init__(self, model: nn.Module, result: ScanResult) -> None:
        self._model, self._active = model, True
        # Not the scan's result itself: a handle is copied and pickled with its model, but the classes in the result cannot be.
        self._knobs, self._edits, self._copies = result.units, result.edits, result.copies
        self._modules = [swap.module for swap in result.swaps]
        self._settings: dict[str, Any] = {}
        self.sites: tuple[Site, ...] = tuple(result.sites)
        self.missed: tuple[Unsteered, ...] = tuple(result.missed)
        self.skipped: tuple[Unsteered, ...] = tuple(result.skipped)

    @property
    def beta(self) -> float | dict[str, float]:
        """The value last set: a number or a mapping, as in :func:`steer`. Setting it rebuilds nothing."""
        return self._settings["beta"]

    @beta.setter
    def beta(self, value: Value) -> None:
        self._write(value, self.coeff, self._resolve(value, self.coeff))

    @property
    def coeff(self) -> float | dict[str, float]:
        """As ``beta``."""
        return self._settings["coeff"]

    @coeff.setter
    def coeff(self, value: Value) -> None:
        self._write(self.beta, value, self._resolve(self.beta, value))

    def values(self) -> dict[str, tuple[float, float]]:
        """{site name: (beta, coeff)} of the units (float32)."""
        return {site.name: (k.beta.item(), k.coeff.item()) for site, k in zip(self.sites, self._knobs)}

    def neutralize(self) -> None:
        """Sets every site to its neutral point, where the model computes its original function."""
        self._write({}, {}, self._resolve({}, {}))

    def remove(self) -> None:
        """Restores the original model, bit for bit. A second call does nothing.

        Raises:
            RuntimeError: the model is fused, or its modules' classes have changed since.
        """
        if not self._active:
            return
        if _marks.FUSION in vars(self._model):
            raise RuntimeError(
                "model: expected one that is not fused any more, got one that is; remove the fusion first"
            )
        revert_patches(self._modules, self._edits, self._copies)
        for name in (_marks.STEERING, _marks.SAVE_PRETRAINED):
            self._model.__dict__.pop(name, None)
        self._active = False

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        kinds = [site.kind for site in self.sites]
        state = f"beta={self.beta}, coeff={self.coeff}" if self._active else "removed"
        lines = [
            f"Steering of {type(self._model).__name__}: {state}",
            f"  {len(kinds)} sites: {kinds.count('module')} modules, {kinds.count('functional')} functional calls",
            *(f"    {site.name}  ({site.activation}, {site.module_type})" for site in self.sites),
        ]
        for title, records in (("missed", self.missed), ("skipped", self.skipped)):
            if records:
                lines += [f"  {len(records)} {title}", listed(records)]
        return "\n".join(lines)

    def _resolve(self, beta: Value, coeff: Value) -> list[tuple[bool, float, float]]:
        """(whether the unit is active, its beta, its coeff) of every site. Raises errors before anything is written."""
        points = []
        for site, b, c in zip(self.sites, self._numbers("beta", beta), self._numbers("coeff", coeff)):
            neutral = ACTIVATIONS[site.activation]
            runs = b is not None or (isinstance(coeff, Mapping) and c is not None)
            points.append((runs, neutral.beta if b is None else b, neutral.coeff if c is None or not runs else c))
        return points

    def _numbers(self, name: str, value: Value) -> list[float | None]:
        """The number for each site; None for sites that a mapping does not match."""
        if not self._active:
            raise RuntimeError(f"{name}: expected a handle in use, got one that was removed")
        if not isinstance(value, Mapping):
            return [unit_interval(name, value)] * len(self.sites)
        numbers: list[float | None] = [None] * len(self.sites)
        for pattern, setting in value.items():
            number = unit_interval(f"{name}[{pattern!r}]", setting)
            hits = [i for i, site in enumerate(self.sites) if _matches(site, pattern)]
            if not hits:
                known = ", ".join(site.name for site in self.sites[:5])
                raise ValueError(f"{name}: expected patterns that match a site ({known}, ...), got {pattern!r}")
            for i in hits:
                numbers[i] = number
        return numbers

    def _write(self, beta: Value, coeff: Value, points: list[tuple[bool, float, float]]) -> None:
        for knobs, (runs, b, c) in zip(self._knobs, points):
            knobs.active, knobs.beta, knobs.coeff = runs, b, c
        for name, value in (("beta", beta), ("coeff", coeff)):
            self._settings[name] = (
                {k: float(v) for k, v in value.items()} if isinstance(value, Mapping) else float(value)
            )


def _refuse_to_save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces ``save_pretrained`` of a transformers model while it is steered."""
    if getattr(model, "_hf_peft_config_loaded", False):  # after `add_adapter`, it saves only the adapter
        return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[attr-defined]
    raise ValueError(
        f"save_pretrained: a steered {type(model).__name__} would be saved, and loaded, as the plain network; use "
        "ctkernels.save_pretrained, or remove() its handle first"
    )


def _matches(site: Site, pattern: str) -> bool:
    names = [name.removesuffix(f":{site.activation}") for name in (site.name, *site.aliases)]
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}:{site.activation}", pattern) for name in names)


def listed(records: Sequence[Unsteered], limit: int | None = None) -> str:
    lines = [f"    {r.name} ({r.activation}{', ' + r.where if r.where else ''}): {r.reason}" for r in records[:limit]]
    return "\n".join(lines + ([f"    and {len(records) - len(lines)} more"] if len(lines) < len(records) else []))


def nothing_found(model: nn.Module, selection: frozenset[str], result: ScanResult) -> str:
    names = ", ".join(name for name in ACTIVATIONS if name in selection)
    near = [*result.missed, *result.skipped]
    got = f"got these near misses:\n{listed(near, limit=20)}" if near else "got none, and no near miss"
    return f"model: expected {type(model).__name__} to have an activation among {names}; {got}"
