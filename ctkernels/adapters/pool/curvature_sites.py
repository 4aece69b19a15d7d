"""Sites of a pool of curvature adapters: a model's activations."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..._marks import POOLS
from ...steering.activations import ACTIVATIONS
from ...steering.patch import apply_patches, revert_patches
from ...steering.runtime import SiteUnit
from ...steering.scan import Site, cached_class_code, is_steered, scan
from .._peft import check_names
from ..curvature.config import CurvatureConfig
from ..curvature.layer import CurvatureLayer, call_unit
from ..curvature.layout import Channels, find_samples
from ..curvature.model import attached_to, child_name, settle_layout, sharing_groups
from ..curvature.per_sample import combined_logit, neutral_logits
from .selection import Current, Uncopyable
from .sources import Source

TABLES = CurvatureLayer.adapter_layer_names  # raw beta and raw coeff


class CurvatureSites:
    """Computes each row's activations with its adapter, from tables of raw beta and raw coeff per site.

    Args:
        model: the base model.
        config: selects the sites, and whether their tables are per channel.
    """

    @cached_class_code()
    def __init__(self, model: nn.Module, config: CurvatureConfig) -> None:
        if POOLS in model.__dict__:
            raise ValueError("model: expected one without a pool, got one; make the pool of curvature adapters first")
        if attached_to(model) is not None or is_steered(model):
            raise ValueError("model: expected plain activations, got CT units; unload() or remove() them first")
        self._model = model
        self._scan = scan(model, frozenset(ACTIVATIONS), split=True, make_unit=_Unit)
        config = copy.copy(config)
        settle_layout(model, config, self._scan)
        samples = find_samples(model, None if config.input_shape is None else tuple(config.input_shape))
        self._units: dict[str, _Unit] = {unit.site: unit for unit in self._scan.units}
        self._paths: dict[str, str] = {}  # by site, the prefix of its parameters in adapter files
        self.rows: dict[str, Tensor] = {}
        self.devices: dict[str, torch.device] = {}
        for names, channels in sharing_groups(model, config, self._scan.sites):
            for name in names:
                unit = self._units[name]
                unit.channels, unit.samples_first = channels, samples.get(name)
                neutral = neutral_logits(unit.activation, torch.empty((), dtype=torch.float32))
                for table, value in zip(TABLES, neutral):
                    self.rows[f"{name}.{table}"] = value.expand(1 if channels is None else channels.size)
                    self.devices[f"{name}.{table}"] = unit.device

    def read(self, source: Source, strength: float | None) -> dict[str, Tensor]:
        """An adapter's rows by table, without tables of sites that it does not adapt. `strength` None: the source's own.

        Raises:
            ValueError: the adapter does not fit this model, or adapts a site without a table; or the strength is out of range.
        """
        config, state = source.config, source.state
        if strength is not None and not 0 <= strength <= 1:
            raise ValueError(f"strength: expected one from 0 to 1 for curvatures, got {strength!r}")
        if config.layout is None:
            raise ValueError("source: expected a configuration with a layout, which every saved adapter has, got None")
        groups = sharing_groups(self._model, config, self._scan.sites)
        shapes, rows = {}, {}
        for names, channels in groups:
            for table in TABLES:
                size = 1 if channels is None else channels.size
                shapes[f"{self._paths[names[0]]}.{table}"] = torch.Size((size,))
        check_names(shapes, {name: value.shape for name, value in state.items()})
        for names, channels in groups:
            for name in names:
                self._check_channels(name, channels)
                scale = source.strengths.get(name, 1.0) if strength is None else strength
                neutral = ACTIVATIONS[self._units[name].activation]
                for table, point in zip(TABLES, (neutral.beta, neutral.coeff)):
                    value = state[f"{self._paths[names[0]]}.{table}"].float()
                    value = value if scale == 1 else combined_logit(point, [value], [scale])
                    rows[f"{name}.{table}"] = value.expand(self.rows[f"{name}.{table}"].shape)
        return rows

    def _check_channels(self, site: str, channels: Channels | None) -> None:
        unit = self._units[site]
        if f"{site}.{TABLES[0]}" not in self.rows:
            raise ValueError(
                f"{site}: the adapter has a unit where the pool has none; make the pool with the configuration of the adapter "
                "that adapts most"
            )
        if channels is not None and channels != unit.channels:
            expected = "one value for the whole site" if unit.channels is None else str(unit.channels)
            raise ValueError(f"{site}: expected {expected}, as the pool was made for, got {channels} in the adapter")

    def attach(self, tables: dict[str, Tensor], current: Current) -> None:
        """Attaches the units to the model."""
        for unit in self._units.values():
            if f"{unit.site}.{TABLES[0]}" in tables:
                unit.beta, unit.coeff = (tables[f"{unit.site}.{table}"] for table in TABLES)
                unit.current = current
        apply_patches(self._scan.swaps, self._scan.edits)
        names = {module: name for name, module in self._model.named_modules()}
        for swap in self._scan.swaps:
            swapped: Any
            for key, swapped in swap.units.items():
                self._paths[swapped.site] = f"{names[swap.module]}.{child_name(key)}".removeprefix(".")

    def detach(self) -> None:
        """Detaches the units."""
        revert_patches([swap.module for swap in self._scan.swaps], self._scan.edits, self._scan.copies)


class _Unit(Uncopyable, SiteUnit):
    """The unit of a site; without selected adapters the original activation runs."""

    channels: Channels | None = None
    samples_first: bool | None = None
    current: Current | None = None
    beta: Tensor
    coeff: Tensor

    def __init__(self, site: Site, device: torch.device | None) -> None:
        self.site, self.activation = site.name, site.activation
        self.device = device or torch.device("cpu")

    @property
    def active(self) -> bool:  # type: ignore[override]
        """True if adapters are selected."""
        return self.current is not None and self.current.selection is not None

    def __call__(self, x: Tensor, activation: str, slope: float | Tensor | None, inplace: bool) -> Tensor:
        assert self.current is not None
        selection = self.current.selection
        assert selection is not None
        rows, index = selection.align(x, self.site, self.samples_first)
        selection.last = self
        y = call_unit(rows, (self.beta, self.coeff), self.channels, activation, slope, inplace, self.site, index)
        return y if rows is x else y.transpose(0, 1)
