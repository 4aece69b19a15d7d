"""Recognition of a model's inputs in its forward passes, and the sizes of the edits in them."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..jola.edit_sizes import relative_sizes
from ..jola.units import real_tokens
from .inputs import Inputs
from .statistics import Statistics

TOGETHER = 1 << 18  # numbers in the outputs of sites that are measured in one go; more would not fit in a cache


class Site(NamedTuple):
    """An edited projection, MLP or block: its name in the model, and its heads."""

    name: str
    heads: int
    head_dim: int


class Part(NamedTuple):
    """What came to a site in a call: the site's number, z (rows, ..., heads * head_dim), and, in a pool, each row's slot."""

    site: int
    z: Tensor
    slots: Tensor | None


class PassMonitor:
    """Base class of monitors: finds out which forward passes make up an input, and sums up the edits of watched ones.

    Attributes:
        sites: number of heads by site.
        heads: (site, head) of every column of the statistics.
        by_head: whether metrics are exported for every head.
        label: the label of its adapters in metrics; None if there are several.
        recent: the last watched batches, the current one last.
    """

    by_head = True
    label: str | None = None

    def __init__(self, model: nn.Module, sites: Sequence[Site], every: int, history: int, name: str) -> None:
        self.model, self.every = model, every
        self.name = name or _name(model)
        self.sites = {site.name: site.heads for site in sites}
        self.heads = [(site, head) for site, heads in self.sites.items() for head in range(heads)]
        self.recent: deque[Inputs] = deque(maxlen=history)
        self._sites = list(sites)
        self._numbers = {site.name: number for number, site in enumerate(sites)}
        # rounding error of two norms of head_dim squares each, and a few more operations
        self._tolerance = (max(site.head_dim for site in sites) + 8) * torch.finfo(torch.float32).eps
        self._handles: list[Any] = []
        self._pass = _Pass()
        self._free = threading.Lock()
        self._aside: int | None = None  # the thread
        self._calibrating = False
        self._current: Inputs | None = None
        self._batch: int | None = None  # rows of the current inputs, watched or not
        self._watched = True
        self._number = 0  # number of batches
        self._seen = 0  # number of watched batches

    # ---- of a method ----

    def statistics_by_adapter(self) -> Iterator[tuple[str, Statistics]]:
        """The statistics, each with the label of its adapters."""
        raise NotImplementedError

    def _modules(self) -> list[nn.Module]:
        """The modules of the sites."""
        raise NotImplementedError

    def _begin_recording(self) -> None:
        """Has `_record` called with what comes to the sites in this thread."""
        raise NotImplementedError

    def _end_recording(self) -> None:
        raise NotImplementedError

    def _operands(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Scales and offsets of edits z' = z + scale * z + offset, that broadcast to (parts, rows, tokens, heads, head_dim)."""
        raise NotImplementedError

    def _end(self, inputs: Inputs) -> None:
        """Counts completed inputs."""
        raise NotImplementedError

    def _adapters(self) -> Any:
        """The adapters of the rows of a pass, for new inputs."""
        return None

    def _serves(self) -> bool:
        """Whether a pass has edits to watch."""
        return True

    # ---- attaching ----

    @property
    def on(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Add the hooks."""
        self.detach()
        for module in _holders(self.model, self._modules()):
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Remove the hooks; statistics and references are kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Any:
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

    def begin(self) -> None:
        """Complete and count the current inputs; the next pass starts new ones."""
        if self._current is not None:
            with torch.no_grad():
                self._end(self._current)
        self._current = self._batch = None

    # ---- passes ----

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the modules around all sites."""
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
        serves = self._serves()
        if now.rows != self._batch or not _continues(now.tokens, mask, cache):
            if aside:
                self._current = None
            else:
                self.begin()
            self._batch = now.rows
            self._watched = serves and (aside or self._calibrating or self._number % self.every == 0)
            self._number += serves and not (aside or self._calibrating)
        if self._watched and serves:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if self.recent.maxlen and isinstance(ids, Tensor) and not ids.is_floating_point():
                now.ids = ids.detach().clone()
            if self._current is None:
                now.adapters = self._adapters()
            now.watched = True
            self._begin_recording()

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also after errors, of the modules around all sites."""
        now = self._pass
        if now.thread != threading.get_ident():
            return
        now.depth -= 1
        if now.depth:
            return
        try:
            if now.watched:
                self._end_recording()
                with torch.no_grad():
                    self._measure(now)
                    if now.measured:
                        self._take(now)
                    elif output is not None:
                        warnings.warn(
                            f"{type(self).__name__} saw a forward pass and no edited head in it; a compiled model must be "
                            "compiled after the monitor is switched on",
                            stacklevel=2,
                        )
        finally:
            self._pass = _Pass()
            if self._aside != now.thread:
                self._free.release()

    def _record(self, part: Part) -> None:
        """Keeps what came to a site, to be measured together with what comes to others."""
        now = self._pass
        if now.thread == threading.get_ident():
            now.parts.append(part)
            now.size += part.z.numel()
            if now.size >= TOGETHER:
                with torch.no_grad():
                    self._measure(now)

    def _measure(self, now: _Pass) -> None:
        """Measure the edits of the parts that wait."""
        parts, now.parts, now.size = now.parts, [], 0

        def alike(part: Part) -> Any:
            return part.z.shape, part.z.dtype, part.z.device, self._sites[part.site][1:]

        for _, group in groupby(parts, alike):
            now.measured.append(self._measured(now, list(group)))

    def _measured(self, now: _Pass, parts: list[Part]) -> tuple[list[int], Inputs]:
        """The numbers of sites, and the edits there, for parts of the same shape."""
        site = self._sites[parts[0].site]
        zs = [part.z.detach() for part in parts]
        z = torch.stack(zs) if len(zs) > 1 else zs[0].unsqueeze(0)
        z = z.reshape(len(zs), z.shape[1], -1, site.heads, site.head_dim)
        sizes = relative_sizes(z, *self._operands(parts))
        rows, tokens = sizes.shape[1:3]
        real = None if now.mask is None else real_tokens(now.mask, rows, tokens, sizes.device)
        if rows != now.rows:  # several rows per sample, as in windowed attention
            if now.rows is None or rows % now.rows:
                raise ValueError(f"{site.name}: expected a multiple of the batch's {now.rows} rows, got {rows}")
            sizes = sizes.reshape(len(zs), now.rows, -1, site.heads)
            real = None if real is None else real.reshape(now.rows, -1)
        return [part.site for part in parts], Inputs.of(sizes, real)

    def _take(self, now: _Pass) -> None:
        """Add a pass to the current inputs."""
        new = Inputs.joined(now.measured, [site.heads for site in self._sites])
        if self._current is None:
            self._current = new
            new.adapters = now.adapters
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
    """A running forward pass: its thread, its depth in the modules around all sites, its inputs and its edits so far."""

    thread: int | None = None
    depth: int = 0
    mask: Any = None
    rows: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        self.watched = False
        self.adapters: Any = None
        self.ids: Tensor | None = None
        self.parts: list[Part] = []
        self.size = 0  # of the parts
        self.measured: list[tuple[list[int], Inputs]] = []


def _holders(model: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules around all of `modules`, outermost first; any of them may be the one that is called."""
    wanted, holders, module = {id(module) for module in modules}, [], model
    while not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and id(module) not in wanted:
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
