"""Watching edited heads in production: running statistics of the edits' size, and inputs unlike those of training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._files import write_text
from .edit_sizes import relative_sizes
from .gates import log_alphas
from .layer import JolaLayer
from .units import real_tokens

_FORMAT = "ctkernels.edit_monitor/1"


class EditMonitor:
    """Running statistics of ``|z' - z| / |z|`` for every edited head and token, and a flag for unusual inputs.

    While it is off, there is no hook on the model: off costs nothing. While it is on, everything stays on the device:
    nothing is read back until :meth:`statistics` or :attr:`flags` is read. Gates and edits are taken as they are when
    it is switched on. Padding does not count if the model is called with a 2-D ``attention_mask``.

    Args:
        model: a model with a JoLA adapter, merged or not (unmerged if it edits MLPs).
        adapter: its name; None takes the active ones.
        margin: how far beyond the calibrated range a head may go, as a part of the range's width. Default 0.5: with
            hundreds of heads, some token of any new text lies a little beyond what a few texts showed.

    Attributes:
        flags: a bool for every row of the batch: whether one of its tokens was outside the range, since
            :meth:`begin` or since a batch with another number of rows began. Beam search reorders rows; not
            followed here.
        rows, flagged: how many rows were begun and how many of them flagged, before the current batch.

    Raises:
        ValueError: no JoLA adapter, or a negative margin.

    Examples:
        >>> monitor = EditMonitor(model)
        >>> with monitor.calibrating():  # on texts like those of training
        ...     output = model(**batch)
        >>> with monitor:
        ...     output = model(**batch)
        >>> monitor.flags
        tensor([False, False])
    """

    def __init__(self, model: nn.Module, adapter: str | None = None, *, margin: float = 0.5) -> None:
        if not margin >= 0:
            raise ValueError(f"margin must not be negative, got {margin!r}")
        self.model = model
        self.adapter = adapter
        self.margin = margin
        self.layers: list[JolaLayer] = list({id(layer): layer for layer, *_ in log_alphas(model, adapter)}.values())
        if not self.layers:
            raise ValueError("expected a model with an active JoLA adapter, got none")
        self.rows = 0
        self._flagged: Any = 0
        self._flags: Tensor | None = None
        self._mask: Any = None
        self._handles: list[Any] = []
        self._calibrating = False
        self._range: dict[str, Tensor] = {}
        self.reset()

    # ---- on and off ----

    @property
    def on(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Switch on; a second call takes up changed gates and edits."""
        self.detach()
        self._handles.append(self.model.register_forward_pre_hook(self._take_mask, with_kwargs=True))
        for layer in self.layers:
            names = [self.adapter] if self.adapter else [n for n in layer.active_adapters if n in layer.jola_config]
            p, q = (part.view(layer.num_heads, layer.head_dim) for part in layer.factors(names))
            self._handles.append(layer.on_edited(self._hook(layer.site, p, q)))

    def detach(self) -> None:
        """Switch off; statistics and range stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._mask = None

    def __enter__(self) -> EditMonitor:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Switch on, and widen the range to whatever passes; nothing is flagged meanwhile."""
        before = self.on
        self.attach()
        self._calibrating = True
        try:
            yield
        finally:
            self._calibrating = False
            if not before:
                self.detach()

    # ---- what it saw ----

    def begin(self) -> None:
        """Begin new inputs: put the current flags into the counts, and clear them."""
        if self._flags is not None:
            self.rows += len(self._flags)
            self._flagged = self._flagged + self._flags.sum()
        self._flags = None

    @property
    def flags(self) -> Tensor | None:
        """The current rows' flags, on the device; None before the first forward."""
        return self._flags

    @property
    def flagged(self) -> int:
        """How many of :attr:`rows` were flagged; reads from the device."""
        return int(self._flagged)

    def reset(self) -> None:
        """Forget statistics and flags; the range stays."""
        self.rows, self._flagged, self._flags = 0, 0, None
        self._seen: dict[str, dict[str, Tensor]] = {}

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Per site, lists over heads: mean, min and max of the relative edit size, and the number of tokens."""
        found = {}
        for site, seen in self._seen.items():
            total = seen["count"].clamp_min(1)
            found[site] = {
                "mean": (seen["sum"] / total).tolist(),
                "min": seen["min"].tolist(),
                "max": seen["max"].tolist(),
                "tokens": [float(seen["count"])],
            }
        return found

    # ---- the range ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibrated range as JSON."""
        sites = {site: {"low": r[0].tolist(), "high": r[1].tolist()} for site, r in self._range.items()}
        values = {"format": _FORMAT, "margin": self.margin, "sites": sites}
        write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a range written by :meth:`save`, and its margin.

        Raises:
            ValueError: another file, or the range of another model or adapter.
        """
        try:
            values = json.loads(Path(path).read_text())
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']!r}")
            ranges = {site: torch.tensor([r["low"], r["high"]]) for site, r in values["sites"].items()}
            margin = float(values["margin"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a range that EditMonitor.save wrote, got {error!r}") from None
        fits = {layer.site: torch.Size((2, layer.num_heads)) for layer in self.layers}
        if {site: r.shape for site, r in ranges.items()} != fits:
            raise ValueError(f"{path}: expected the sites {sorted(fits)[:2]}..., got {sorted(ranges)[:2]}...")
        devices = {layer.site: next(layer.parameters()).device for layer in self.layers}
        self._range = {site: r.to(devices[site]) for site, r in ranges.items()}
        self.margin = margin

    # ---- hooks ----

    def _take_mask(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._mask = kwargs.get("attention_mask")

    def _hook(self, site: str, p: Tensor, q: Tensor) -> Any:
        def hook(z: Tensor) -> None:
            if z.shape[-1] != p.numel():
                raise ValueError(f"{site}: EditMonitor needs all {p.shape[0]} heads on one device")
            with torch.no_grad():
                sizes = relative_sizes(z, p, q)
                self._take(site, sizes.reshape(sizes.shape[0], -1, p.shape[0]))

        return hook

    def _take(self, site: str, sizes: Tensor) -> None:
        """``sizes`` (rows, tokens, heads)."""
        rows, tokens = sizes.shape[:2]
        real = real_tokens(self._mask, rows, tokens, sizes.device).unsqueeze(-1)
        low = sizes.masked_fill(~real, torch.inf).amin(1)
        high = sizes.masked_fill(~real, -torch.inf).amax(1)
        if self._calibrating:
            own = torch.stack([low.amin(0), high.amax(0)])
            old = self._range.get(site)
            self._range[site] = (
                own if old is None else torch.stack([torch.minimum(old[0], own[0]), torch.maximum(old[1], own[1])])
            )
            return
        self._add(site, sizes, real, low, high)
        if self._flags is not None and len(self._flags) != rows:
            self.begin()
        if self._flags is None:
            self._flags = torch.zeros(rows, dtype=torch.bool, device=sizes.device)
        if site in self._range:
            bound = self._range[site]
            slack = self.margin * (bound[1] - bound[0])
            outside = ((low < bound[0] - slack) | (high > bound[1] + slack)).any(-1)
            self._flags = self._flags | outside.to(self._flags.device)

    def _add(self, site: str, sizes: Tensor, real: Tensor, low: Tensor, high: Tensor) -> None:
        new = {
            "sum": sizes.masked_fill(~real, 0).sum((0, 1), dtype=torch.float64 if sizes.is_cpu else torch.float32),
            "count": real.sum(),
            "min": low.amin(0),
            "max": high.amax(0),
        }
        old = self._seen.get(site)
        if old is not None:
            new = {
                "sum": old["sum"] + new["sum"],
                "count": old["count"] + new["count"],
                "min": torch.minimum(old["min"], new["min"]),
                "max": torch.maximum(old["max"], new["max"]),
            }
        self._seen[site] = new
