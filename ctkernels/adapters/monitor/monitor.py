"""A monitor of edited heads in production: running statistics of edit sizes, unusual inputs, drift."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._files import read_json, write_text
from ..jola.edit_sizes import edit_operands, relative_sizes
from ..jola.gates import log_alphas, named_adapters
from ..jola.layer import JolaLayer
from ..jola.units import real_tokens
from .inputs import Inputs
from .reference import Reference, Window

_FORMATS = ("ctkernels.edit_monitor/1", "ctkernels.edit_monitor/2")
FILE = "edit_monitor.json"


@dataclass(frozen=True)
class Snapshot:
    """The statistics of a monitor as Python numbers; lists are over heads, in the order of :attr:`EditMonitor.heads`.

    Attributes:
        inputs, outside: number of completed rows, and of those outside the range.
        total, count: sum of edit sizes over tokens, and number of tokens.
        high: largest edit size.
        beyond: number of inputs in which the head was outside its range.
        windows, alarms: number of full windows, and of those above the threshold.
        drift: distance of the last full window; None before the first.
    """

    inputs: int
    outside: int
    total: list[float]
    count: list[float]
    high: list[float]
    beyond: list[float]
    windows: int
    alarms: int
    drift: list[float] | None


class EditMonitor:
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
        every: watch the first of every so many batches; a skipped batch costs two Python calls. Default 1: all.
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
        every: int = 1,
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
        self.model, self.adapter, self.margin = model, adapter, margin
        self.every, self.window, self.false_alarms = every, window, false_alarms
        self.layers: list[JolaLayer] = list({id(layer): layer for layer, *_ in log_alphas(model, adapter)}.values())
        if not self.layers:
            raise ValueError("expected a model with an active JoLA adapter, got none")
        self.adapter_names = named_adapters(model, adapter)
        self.name = name or _name(model)
        self.sites = {layer.site: layer.num_heads for layer in self.layers}
        self.heads = [(site, head) for site, heads in self.sites.items() for head in range(heads)]
        self.reference: Reference | None = None
        self.recent: deque[Inputs] = deque(maxlen=history)
        # rounding error of two norms of head_dim squares each, and a few more operations
        self._tolerance = (max(layer.head_dim for layer in self.layers) + 8) * torch.finfo(torch.float32).eps
        self._handles: list[Any] = []
        self._hooks: list[tuple[JolaLayer, Any]] = []
        self._pass = _Pass()
        self._free = threading.Lock()
        self._aside: int | None = None  # the thread
        self._calibrating = False
        self._calibration: list[Inputs] = []
        self._current: Inputs | None = None
        self._batch: int | None = None  # rows of the current inputs, watched or not
        self._watched = True
        self._number = 0  # number of batches
        self._seen = 0  # number of watched batches
        self.reset()

    # ---- attaching and calibration ----

    @property
    def on(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Add the hooks; call it again after gates or edits changed."""
        self.detach()
        for module in _holders(self.model, self.layers):
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._hooks = [(layer, self._hook(layer, *edit_operands(layer, self.adapter))) for layer in self.layers]

    def detach(self) -> None:
        """Remove the hooks; statistics and reference are kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooks = []

    def __enter__(self) -> EditMonitor:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Watch only the passes of this thread, regardless of ``every``, for :attr:`recent`, without counting them.

        It waits for a watched pass of another thread; unfinished inputs of that thread continue afterwards.
        """
        with self._free:
            kept = self._current, self._batch, self._watched
            self._current = self._batch = None
            self._aside = threading.get_ident()
            try:
                yield
            finally:
                self._aside = None
                self._current, self._batch, self._watched = kept

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
        self._place(Reference.of(means, lows, highs, self.margin, self.window, self.false_alarms, self._tolerance))
        if self.window is not None and len(means) < 2 * self.window:
            warnings.warn(
                f"calibration saw {len(means)} inputs, and drift over windows of {self.window} needs {2 * self.window}: "
                "only the range is known; give more inputs, a smaller window, or window=None",
                stacklevel=4,
            )

    # ---- statistics ----

    def begin(self) -> None:
        """Complete and count the current inputs; the next pass starts new ones."""
        if self._current is not None:
            with torch.no_grad():
                self._end(self._current)
        self._current = self._batch = None

    @property
    def flags(self) -> Tensor | None:
        """Whether each current row is outside the range, on the device; None before the first and for unwatched inputs."""
        if self._current is None or self._calibrating:
            return None
        return self.beyond(self._current).any(-1)

    @property
    def flagged(self) -> int:
        """The number of :attr:`rows` outside the range; synchronises with the device."""
        return int(self._outside)

    def reset(self) -> None:
        """Reset statistics, flags and history; the reference is kept."""
        self.rows = 0
        self._current = self._batch = None
        self.recent.clear()
        with torch.inference_mode(False):  # so that they can be updated outside of it too
            device = self._device
            kind = torch.float32 if device.type == "mps" else torch.float64
            heads = len(self.heads)
            self._sums = torch.zeros(2, heads, dtype=kind, device=device)
            self._low = torch.full((heads,), torch.inf, dtype=kind, device=device)
            self._high = -self._low
            self._beyond_by_head = torch.zeros(heads, dtype=torch.long, device=device)
            self._outside = torch.zeros((), dtype=torch.long, device=device)
            self._window = _new_window(self.reference)
            self._ended: torch.Event | None = None  # recorded after the last inputs were counted; None on a CPU

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Per site, lists over heads: mean, min and max of the relative edit size, and the number of tokens."""
        sums, low, high = self._sums, self._low, self._high
        if (now := self._current) is not None and not self._calibrating:
            sums = sums + torch.stack([now.total, now.count]).to(sums.dtype).sum(1)
            low, high = torch.minimum(low, now.low.amin(0)), torch.maximum(high, now.high.amax(0))
        parts = torch.stack([sums[0] / sums[1].clamp_min(1), low, high, sums[1]]).cpu().split([*self.sites.values()], 1)
        return {
            site: {**dict(zip(("mean", "min", "max"), part[:3].tolist())), "tokens": [float(part[3, 0])]}
            for site, part in zip(self.sites, parts)
            if part[3, 0] > 0
        }

    def snapshot(self) -> Snapshot:
        """Statistics of completed inputs, in one read from the device, which waits for their passes."""
        if self._ended is not None:
            self._ended.synchronize()
        window, heads = self._window, len(self.heads)
        parts = [*self._sums, self._high, self._beyond_by_head, self._outside.view(1)]
        parts += [] if window is None else [window.distances, window.alarms.view(1)]
        values = torch.cat([part.to(self._sums.dtype) for part in parts]).tolist()
        total, count, high, beyond = (values[i * heads : (i + 1) * heads] for i in range(4))
        seen = Snapshot(self.rows, int(values[4 * heads]), total, count, high, beyond, 0, 0, None)
        if window is not None and window.number:
            alarms, drift = int(values[-1]), values[4 * heads + 1 : -1]
            seen = replace(seen, windows=window.number, alarms=alarms, drift=drift)
        return seen

    @property
    def drift(self) -> float | None:
        """The largest distance of any head in the last full window, see :class:`Reference`; None before the first."""
        window = self._window
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
        file = _file(path)
        values = read_json(file)
        try:
            if values["format"] not in _FORMATS:
                raise ValueError(f"format {values['format']!r}")
            reference = Reference.from_dict(values, self.sites)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: expected what EditMonitor.save wrote for this model, got {error!r}") from None
        self._calibration.clear()
        self._place(reference)
        self.margin = reference.margin
        if reference.drift is not None:
            self.window, self.false_alarms = reference.drift.window, reference.drift.false_alarms

    def _place(self, reference: Reference) -> None:
        with torch.inference_mode(False):
            self.reference = reference.to(self._device)
            self._window = _new_window(self.reference)

    @property
    def _device(self) -> torch.device:
        return next(self.layers[0].parameters()).device

    def beyond(self, inputs: Inputs) -> Tensor:
        """Whether each head of each row is outside the range, (rows, heads), on the device."""
        if self.reference is None:
            return torch.zeros_like(inputs.low, dtype=torch.bool)
        return self.reference.beyond(inputs.low, inputs.high, self._tolerance)

    # ---- completed inputs ----

    def _end(self, inputs: Inputs) -> None:
        if self._calibrating:
            self._calibration.append(inputs)
            return
        self.rows += len(inputs)
        self._sums += torch.stack([inputs.total, inputs.count]).to(self._sums.dtype).sum(1)
        torch.minimum(self._low, inputs.low.amin(0), out=self._low)
        torch.maximum(self._high, inputs.high.amax(0), out=self._high)
        beyond = self.beyond(inputs)
        self._beyond_by_head += beyond.sum(0)
        self._outside += beyond.any(-1).sum()
        if self._window is not None:
            self._window.add(inputs.mean)
        if self._device.type != "cpu":
            self._ended = torch.Event(self._device)
            self._ended.record()

    # ---- hooks ----

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the modules around all layers."""
        now, thread = self._pass, threading.get_ident()
        if now.thread == thread:
            now.depth += 1
            now.mask = kwargs.get("attention_mask") if now.mask is None else now.mask
            return
        aside = self._aside == thread
        if not aside and not self._free.acquire(blocking=False):
            return  # a pass of another thread is being watched
        mask = kwargs.get("attention_mask")
        self._pass = now = _Pass(thread, 1, mask, *_shape(args, kwargs))
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers' newer and older name
        if now.rows != self._batch or not _continues(now.tokens, mask, cache):
            if aside:
                self._current = None
            else:
                self.begin()
            self._batch = now.rows
            self._watched = aside or self._calibrating or self._number % self.every == 0
            self._number += not (aside or self._calibrating)
        if self._watched:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if self.recent.maxlen and isinstance(ids, Tensor) and not ids.is_floating_point():
                now.ids = ids.detach().clone()
            now.handles = [layer.on_edited(hook) for layer, hook in self._hooks]

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also after errors, of the modules around all layers."""
        now = self._pass
        if now.thread != threading.get_ident():
            return
        now.depth -= 1
        if now.depth:
            return
        try:
            for handle in now.handles:
                handle.remove()
            if now.parts:
                with torch.no_grad():
                    self._take(now)
            elif self._watched and output is not None:
                warnings.warn(
                    "EditMonitor saw a forward pass and no edited head in it; a compiled model must be compiled after "
                    "the monitor is switched on",
                    stacklevel=2,
                )
        finally:
            self._pass = _Pass()
            if self._aside != now.thread:
                self._free.release()

    def _hook(self, layer: JolaLayer, scale: Tensor, offset: Tensor) -> Any:
        @torch.compiler.disable
        @torch.no_grad()
        def hook(z: Tensor) -> None:
            now = self._pass
            if now.thread != threading.get_ident():
                return
            if z.shape[-1] != scale.numel():
                raise ValueError(f"{layer.site}: EditMonitor needs all {len(scale)} heads on one device")
            sizes = relative_sizes(z, scale, offset)
            sizes = sizes.reshape(sizes.shape[0], -1, len(scale))
            real = None
            if now.mask is not None:
                real = real_tokens(now.mask, sizes.shape[0], sizes.shape[1], sizes.device)
            if len(sizes) != now.rows:  # several rows per sample, as in windowed attention
                if now.rows is None or len(sizes) % now.rows:
                    raise ValueError(
                        f"{layer.site}: expected a multiple of the batch's {now.rows} rows, got {len(sizes)}"
                    )
                sizes = sizes.reshape(now.rows, -1, len(scale))
                real = None if real is None else real.reshape(now.rows, -1)
            part = Inputs.of(sizes, real)
            if (known := now.parts.get(layer.site)) is not None:
                known.add(part)
            else:
                now.parts[layer.site] = part

        return hook

    def _take(self, now: _Pass) -> None:
        """Add a pass to the current inputs."""
        some = next(iter(now.parts.values()))
        parts = [
            now.parts.get(site) or Inputs.nothing(len(some), heads, some.total) for site, heads in self.sites.items()
        ]
        new = Inputs.joined(parts)
        if self._current is None:
            self._current = new
            if not self._calibrating:
                self._seen += 1
                new.number = self._seen
                self.recent.append(new)
        else:
            self._current.add(new)
        if now.ids is not None:
            real = real_tokens(now.mask, now.ids.shape[0], now.ids.shape[1], now.ids.device)
            self._current.ids.append((now.ids, real))


@dataclass
class _Pass:
    """A running forward pass: its thread, its depth in the modules around all layers, its inputs and its sites so far."""

    thread: int | None = None
    depth: int = 0
    mask: Any = None
    rows: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        self.ids: Tensor | None = None
        self.handles: list[Any] = []
        self.parts: dict[str, Inputs] = {}


def _holders(model: nn.Module, layers: list[JolaLayer]) -> list[nn.Module]:
    """The modules around all layers, outermost first; any of them may be the one that is called."""
    wanted, holders, module = {id(layer) for layer in layers}, [], model
    while not isinstance(module, (nn.ModuleList, nn.ModuleDict, JolaLayer)):
        holders.append(module)
        inner = [child for child in module.children() if wanted <= {id(part) for part in child.modules()}]
        if not inner:
            break
        module = inner[0]
    return holders


def _shape(args: Any, kwargs: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Numbers of rows and tokens of a pass's inputs; None if unknown."""
    named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tensors = [value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1]
    return (tensors[0].shape[0], tensors[0].shape[1]) if tensors else (None, None)


def _continues(tokens: int | None, mask: Any, cache: Any) -> bool:
    """Whether a pass continues the inputs in a cache; decided on the host."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return tokens is not None and mask.shape[1] > tokens
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    if isinstance(length, int):
        return length > 0
    return tokens == 1 and cache is not None


def _name(model: Any) -> str:
    config = getattr(model, "config", None)
    path = str(getattr(config, "_name_or_path", "") or "")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Path(path).name or type(base).__name__


def _new_window(reference: Reference | None) -> Window | None:
    return Window(reference.drift) if reference is not None and reference.drift is not None else None


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / FILE if Path(path).is_dir() else Path(path)
