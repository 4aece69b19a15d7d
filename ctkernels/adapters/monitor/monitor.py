"""A monitor of edited heads in production: running statistics of edit sizes, unusual inputs, drift."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._files import read_json, write_text
from ..jola.edit_sizes import edit_operands
from ..jola.gates import log_alphas, named_adapters
from ..jola.layer import JolaLayer
from .inputs import Inputs
from .passes import Part, PassMonitor, Site
from .reference import Reference
from .statistics import Snapshot, Statistics

_FORMATS = ("ctkernels.edit_monitor/1", "ctkernels.edit_monitor/2")
FILE = "edit_monitor.json"


class EditMonitor(PassMonitor):
    """Running statistics of ``|z' - z| / |z|`` for every edited head and token, and alarms for unusual inputs and drift.

    A detached monitor has no hooks on the model and costs nothing. An attached one accumulates on the device, without host
    synchronisation until a method or attribute reads values. It uses the gates and edits at the time of attaching. Padding
    is ignored if the model is called with a 2-D ``attention_mask``.

    A forward pass starts new inputs, one per row, unless it continues the previous ones: if its attention mask is wider than
    its tokens, or, without a mask, if its cache is not empty (or of unknown length, with one token per row). Beam search,
    which reorders rows, is not supported. While a pass of one thread is watched, passes of other threads are not. Compile a
    model after attaching: compiled code ignores hooks added later.

    Args:
        model: a model with a JoLA adapter, merged or not.
        adapter: its name; None takes the active ones.
        margin: tolerated excess beyond the calibrated range, as a fraction of its width. Default 0.5: with hundreds of
            heads, some token of any new text is slightly outside the range of a few calibration texts.
        every: watch the first of every so many batches; a skipped batch costs two Python calls. Default 8, which costs less
            than 1 % of the model's time; 1 watches all, which costs several.
        window: inputs per window that is compared with the calibration, see :attr:`drift`; calibration needs twice as many.
            Default 64. None: do not measure drift.
        false_alarms: expected fraction of windows above the threshold for inputs like those of the calibration. Default 0.001.
        history: number of batches to keep, with their tokens, for :attr:`recent`. Default 0.
        name: name of the model in exported metrics. Default: the name it was loaded from, or its class.

    Attributes:
        heads: (site, head) of every column of the statistics.
        rows: number of completed inputs, in watched batches.
        reference: the result of calibration; None before.
        recent: the last watched batches, the current one last.

    Raises:
        ValueError: there is no JoLA adapter, or an argument is out of range.

    Examples:
        >>> monitor = EditMonitor(model, window=2)
        >>> monitor.calibrate([batch, batch])  # inputs like those of training
        >>> model.save_pretrained("adapter")
        >>> monitor.save("adapter")  # beside the adapter: adapter/edit_monitor.json
        >>> with monitor:
        ...     output = model(**batch)
        >>> monitor.flags
        tensor([False, False])
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | None = None,
        *,
        margin: float = 0.5,
        every: int = 8,
        window: int | None = 64,
        false_alarms: float = 0.001,
        history: int = 0,
        name: str = "",
    ) -> None:
        if not margin >= 0:
            raise ValueError(f"margin must not be negative, got {margin!r}")
        if every < 1 or history < 0 or (window is not None and window < 1):
            raise ValueError(
                f"every and window must be 1 or more and history 0 or more, got {every}, {window} and {history}"
            )
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms must be between 0 and 1, got {false_alarms!r}")
        self.layers: list[JolaLayer] = list({id(layer): layer for layer, *_ in log_alphas(model, adapter)}.values())
        if not self.layers:
            raise ValueError("expected a model with an active JoLA adapter, got none")
        sites = [Site(layer.site, layer.num_heads, layer.head_dim) for layer in self.layers]
        super().__init__(model, sites, every, history, name)
        self.adapter, self.margin, self.window, self.false_alarms = adapter, margin, window, false_alarms
        self.adapter_names = named_adapters(model, adapter)
        self.label: str = "+".join(self.adapter_names)
        self._edits: list[tuple[Tensor, Tensor]] = []  # by site, scale and offset
        self._stacked: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # of several sites
        self._hooks: list[Any] = []
        self._recording: list[Any] = []
        self._calibration: list[Inputs] = []
        self._statistics = Statistics(len(self.heads), next(self.layers[0].parameters()).device, self._tolerance)

    # ---- attaching and calibration ----

    def attach(self) -> None:
        """Add the hooks; call it again after gates or edits changed."""
        super().attach()
        self._edits = [edit_operands(layer, self.adapter) for layer in self.layers]
        self._stacked.clear()
        self._hooks = [self._hook(number, layer) for number, layer in enumerate(self.layers)]

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Attach, and compute the reference from all inputs of such blocks. They are not flagged or counted."""
        before, known = self.on, list(self._calibration)
        self.begin()
        self.attach()
        self._calibrating = True
        try:
            yield
            self.begin()
            self._set_reference()
        except BaseException:
            self._calibration = known
            raise
        finally:
            self._current = self._batch = None
            self._calibrating = False
            if not before:
                self.detach()

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Run the model on batches in evaluation mode and compute the reference from their edits.

        Raises:
            ValueError: there are no batches, or no token reaches an edited projection.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with self.calibrating(), torch.no_grad():
                for batch in batches:
                    self.model(**batch)
        finally:
            for module, training in modes.items():
                module.training = training

    def _set_reference(self) -> None:
        if not self._calibration:
            raise ValueError("calibration must see one or more inputs, got none: the model was not called")
        means, lows, highs = (
            torch.cat([getattr(inputs, part) for inputs in self._calibration]).cpu() for part in ("mean", "low", "high")
        )
        if not bool(highs.isfinite().all()):
            missed = sorted({site for (site, _), fine in zip(self.heads, highs.isfinite().all(0).tolist()) if not fine})
            raise ValueError(
                f"calibration must reach every edited projection with every input, got no token to {missed}"
            )
        self._statistics.place(
            Reference.of(means, lows, highs, self.margin, self.window, self.false_alarms, self._tolerance)
        )
        if self.window is not None and len(means) < 2 * self.window:
            warnings.warn(
                f"calibration saw {len(means)} inputs, and drift over windows of {self.window} needs {2 * self.window}: "
                "only the range is known; give more inputs, a smaller window, or window=None",
                stacklevel=4,
            )

    # ---- statistics ----

    @property
    def reference(self) -> Reference | None:
        """The result of calibration; None before."""
        return self._statistics.reference

    @property
    def rows(self) -> int:
        """The number of completed inputs, in watched batches."""
        return self._statistics.rows

    @property
    def flags(self) -> Tensor | None:
        """Whether each current row is outside the range, on the device; None before the first and for unwatched inputs."""
        if self._current is None or self._calibrating:
            return None
        return self.beyond(self._current).any(-1)

    @property
    def flagged(self) -> int:
        """The number of :attr:`rows` outside the range; synchronises with the device."""
        return self._statistics.outside

    def reset(self) -> None:
        """Reset statistics, flags and history; the reference is kept."""
        self._current = self._batch = None
        self.recent.clear()
        self._statistics.reset()

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Per site, lists over heads: mean, min and max of the relative edit size, and the number of tokens."""
        sums, low, high = self._statistics.sums, self._statistics.low, self._statistics.high
        if (now := self._current) is not None and not self._calibrating:
            sums = sums + torch.stack([now.total, now.count]).to(sums.dtype).sum(1)
            low, high = torch.minimum(low, now.low.amin(0)), torch.maximum(high, now.high.amax(0))
        parts = torch.stack([sums[0] / sums[1].clamp_min(1), low, high, sums[1]]).cpu().split([*self.sites.values()], 1)
        return {
            site: {**dict(zip(("mean", "min", "max"), part[:3].tolist())), "tokens": [float(part[3, 0])]}
            for site, part in zip(self.sites, parts)
            if part[3, 0] > 0
        }

    def statistics_by_adapter(self) -> Iterator[tuple[str, Statistics]]:
        """The statistics, with the label of the adapters in metrics."""
        yield self.label, self._statistics

    def snapshot(self) -> Snapshot:
        """Statistics of completed inputs, in one read from the device, which waits for their passes."""
        return self._statistics.snapshot()

    @property
    def drift(self) -> float | None:
        """The largest distance of any head in the last full window, see :class:`Reference`; None before the first."""
        window = self._statistics.window
        return float(window.distances.amax()) if window is not None and window.number else None

    # ---- the reference ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the reference as JSON; in a folder, such as the adapter's, as ``edit_monitor.json``.

        Raises:
            ValueError: there is no reference.
        """
        if self.reference is None:
            raise ValueError("there is nothing to save before calibration")
        values = {"format": _FORMATS[-1], **self.reference.to_dict(self.sites)}
        write_text(_file(path), json.dumps(values, sort_keys=True, indent=1) + "\n")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a saved reference, with its margin, window and false-alarm rate.

        Raises:
            ValueError: the file has another format, or is for another model or adapter.
        """
        reference = read_reference(path, self.sites)
        self._calibration.clear()
        self._statistics.place(reference)
        self.margin = reference.margin
        if reference.drift is not None:
            self.window, self.false_alarms = reference.drift.window, reference.drift.false_alarms

    def beyond(self, inputs: Inputs) -> Tensor:
        """Whether each head of each row is outside the range, (rows, heads), on the device."""
        return self._statistics.beyond(inputs)

    # ---- passes ----

    def _end(self, inputs: Inputs) -> None:
        if self._calibrating:
            self._calibration.append(inputs)
        else:
            self._statistics.add(inputs)

    def _modules(self) -> list[nn.Module]:
        return list(self.layers)

    def _begin_recording(self) -> None:
        self._recording = [layer.on_edited(hook) for layer, hook in zip(self.layers, self._hooks)]

    def _end_recording(self) -> None:
        for handle in self._recording:
            handle.remove()
        self._recording = []

    def _hook(self, number: int, layer: JolaLayer) -> Any:
        @torch.compiler.disable
        def hook(z: Tensor) -> None:
            if z.shape[-1] != layer.num_heads * layer.head_dim:
                raise ValueError(f"{layer.site}: EditMonitor needs all {layer.num_heads} heads on one device")
            self._record(Part(number, z, None))

        return hook

    def _operands(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        sites = tuple(part.site for part in parts)
        if sites not in self._stacked:
            scales, offsets = (torch.stack(values)[:, None, None] for values in zip(*(self._edits[n] for n in sites)))
            self._stacked[sites] = scales, offsets
        return self._stacked[sites]


def read_reference(path: str | os.PathLike[str], sites: Mapping[str, int]) -> Reference:
    """Reads a reference that :meth:`EditMonitor.save` wrote, for ``sites``, a mapping from site names to head counts.

    Raises:
        ValueError: the file has another format, or is for another model or adapter.
    """
    file = _file(path)
    values = read_json(file)
    try:
        if values["format"] not in _FORMATS:
            raise ValueError(f"format {values['format']!r}")
        return Reference.from_dict(values, sites)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected what EditMonitor.save wrote for this model, got {error!r}") from None


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / FILE if Path(path).is_dir() else Path(path)
