"""A pool of adapters of one frozen model, a different one for each row of a batch."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..._marks import POOLS
from .._config import AdapterConfig
from .._peft import BASE, check_adapter_name, plain_model
from ..curvature.config import CurvatureConfig
from ..jola.config import JolaConfig
from .curvature_sites import CurvatureSites
from .fences import Fences
from .jola_sites import JolaSites
from .selection import Current, Selection, Uncopyable
from .slots import BASE_SLOT, Slots
from .sources import Source, read_adapter


class _Sites(Protocol):
    """The sites of a method. `rows`: by table, the row without effect. `devices`: by table."""

    rows: dict[str, Tensor]
    devices: dict[str, torch.device]

    def read(self, source: Source, strength: float | None) -> dict[str, Tensor]: ...
    def attach(self, tables: dict[str, Tensor], current: Current) -> None: ...
    def detach(self) -> None: ...


_METHODS: dict[type[AdapterConfig], Any] = {JolaConfig: JolaSites, CurvatureConfig: CurvatureSites}


class AdapterPool(Uncopyable):
    """A pool of JoLA or curvature adapters of one model, which serves rows with different adapters in one forward.

    Each site has a table with a row per adapter, and computes a batch in one pass with the selected rows. Tables keep their
    addresses, and nothing synchronises with the device: a forward can be compiled, and captured in a CUDA graph. All
    methods are safe while other threads run the model; a batch keeps the versions that it started with.

    Args:
        model: the frozen base model, or a `PeftModel` with adapters of other methods, which stay in effect.
        config: selects the sites and the size of rows, as for a single adapter: use that of the adapter with the most
            edits, or `JolaConfig()`. Adapters may leave out sites, edits and heads.
        capacity: the number of adapters to allocate memory for.
        base: the base model's name in adapter configurations. Default: the name or path it was loaded from.

    Attributes:
        model: the plain base model.
        sites, current: what the pool edits, and the selection in this thread; for monitors.

    Raises:
        ValueError: there is no site, or the model already has adapters of this method, or a pool.
        MemoryError: there is no memory for the tables.

    Examples:
        >>> model.save_pretrained("adapters/law")
        >>> pool = AdapterPool(base, JolaConfig(), capacity=1000)
        >>> pool.load("law", "adapters/law")
        >>> inputs = tokenizer(prompts[:2], return_tensors="pt")
        >>> with pool.batch(["law", None]):  # None: the base model
        ...     tokens = base.generate(**inputs, max_new_tokens=2)
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, capacity: int, *, base: str | None = None) -> None:
        if type(config) not in _METHODS:
            raise ValueError(f"config: expected a JolaConfig or a CurvatureConfig, got {type(config).__name__}")
        if config.modules_to_save:  # type: ignore[attr-defined]
            raise ValueError(
                f"config: expected one without modules_to_save, which a pool has no place for, got {config.modules_to_save}"  # type: ignore[attr-defined]
            )
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity: expected a number of adapters, at least 1, got {capacity!r}")
        self.model: Any = plain_model(model)
        self._config_class = type(config)
        pools = self.model.__dict__.get(POOLS, {})
        if config.method in pools:
            raise ValueError(
                f"model: expected one without a pool of {config.method} adapters, got one; remove() it first"
            )
        self.base = base if base is not None else str(getattr(getattr(self.model, "config", None), "_name_or_path", ""))
        self.sites: _Sites = self._make_sites(config)
        self._tables = self._allocate(capacity)
        self._slots = Slots(capacity)
        self._fences = Fences(self.sites.devices.values())
        self._lock = threading.Lock()
        self.current = Current()
        self.sites.attach(self._tables, self.current)
        self.model.__dict__[POOLS] = {**pools, config.method: self}

    def _make_sites(self, config: AdapterConfig) -> _Sites:
        return _METHODS[type(config)](self.model, config)

    def _allocate(self, capacity: int) -> dict[str, Tensor]:
        rows = self.sites.rows
        needed = (capacity + 1) * self.bytes_per_adapter
        problem = (
            f"capacity={capacity}: {capacity} adapters of {self.bytes_per_adapter:,} bytes need {needed:,} bytes on "
            f"{', '.join(sorted({str(device) for device in self.sites.devices.values()}))}"
        )
        on_cpu = all(device.type == "cpu" for device in self.sites.devices.values())
        if on_cpu and needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise MemoryError(f"{problem}, more than this machine has")  # the system overcommits memory
        try:
            with torch.inference_mode(False):  # later loads may be outside inference mode
                return {
                    name: row.to(self.sites.devices[name]).repeat(capacity + 1, *[1] * row.dim())
                    for name, row in rows.items()
                }
        except RuntimeError as error:  # torch has no narrower class for both kinds of memory
            raise MemoryError(f"{problem}: {error}") from None

    # ---- contents ----

    @property
    def capacity(self) -> int:
        """The number of adapters that fit."""
        return self._slots.capacity

    @property
    def bytes_per_adapter(self) -> int:
        """The memory of one adapter, in bytes."""
        return sum(row.numel() * row.element_size() for row in self.sites.rows.values())

    @property
    def names(self) -> list[str]:
        """The adapters in the pool, least recently used first."""
        with self._lock:
            return self._slots.names

    @property
    def pinned(self) -> frozenset[str]:
        """The pinned adapters, which are not evicted."""
        with self._lock:
            return frozenset(self._slots.pinned)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._slots

    def __repr__(self) -> str:
        return f"AdapterPool({self._config_class.method}, {len(self)} of {self.capacity} adapters)"

    def load(
        self,
        name: str,
        source: Any,
        *,
        adapter: str | None = None,
        strength: float | None = None,
        pin: bool = False,
    ) -> str | None:
        """Loads an adapter, or a new version of it, for batches that start later.

        If the pool is full, evicts the least recently used adapter that is neither pinned nor in use.

        Args:
            name: the adapter's name in the pool.
            source: the folder of a saved adapter, or a `PeftModel`.
            adapter: the adapter of a `PeftModel`; None if it has only one.
            strength: how strongly it acts, see `set_strength`. None: as in the `PeftModel` now; from a folder, 1.
            pin: whether to pin it.

        Returns:
            The name of the evicted adapter, or None.

        Raises:
            ValueError: the adapter cannot be read, or belongs to another base model; or the strength is not finite, or with
                curvature not between 0 and 1. The pool is unchanged.
            PoolFullError: every adapter is pinned or in use. The pool is unchanged.

        Examples:
            >>> model.save_pretrained("adapters/law")
            >>> pool = AdapterPool(base, JolaConfig(), capacity=1000)
            >>> pool.load("law", "adapters/law")
            >>> pool.load("draft", model, adapter="default", pin=True)
        """
        check_adapter_name(name)
        if strength is not None and (
            isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength)
        ):
            raise ValueError(f"strength: expected a finite number, or None, got {strength!r}")
        loaded = read_adapter(source, adapter, self._config_class)
        self._check_base(loaded.config)
        read = self.sites.read(loaded, strength)
        rows = {
            table: read.get(table, row).to(table_rows.device)
            for (table, row), table_rows in zip(self.sites.rows.items(), self._tables.values())
        }
        with self._lock:
            slot, evicted = self._slots.reserve(name)
            try:
                self._write(slot, rows)
            except BaseException:
                self._slots.put_back(slot)
                raise
            self._slots.publish(name, slot)
            if pin:
                self._slots.pinned.add(name)
        return evicted

    @torch.no_grad()
    def _write(self, slot: int, rows: dict[str, Tensor]) -> None:
        self._fences.before_write(slot)
        for table, row in rows.items():
            self._tables[table][slot].copy_(row)
        self._fences.after_write()

    def _check_base(self, config: AdapterConfig) -> None:
        name = config.base_model_name_or_path
        if name and self.base and _last(name) != _last(self.base):
            raise ValueError(
                f"source: expected an adapter of {self.base}, got one of {name}; if that is the same model under another "
                f"name, make the pool with base={name!r}"
            )

    def adapters_in_use(self) -> dict[int, str]:
        """The names of the slots that are in use. Those of a new version and of the one before are the same."""
        with self._lock:
            return self._slots.adapters_in_use()

    def evict(self, name: str) -> None:
        """Removes an adapter from the pool. Batches that use it continue; then its slot is free.

        Raises:
            ValueError: there is none of this name, or it is pinned.
        """
        with self._lock:
            self._check_known([name])
            if name in self._slots.pinned:
                raise ValueError(f"name: {name!r} is pinned; unpin() it first")
            self._slots.evict(name)

    def pin(self, name: str) -> None:
        """Protects an adapter from eviction.

        Raises:
            ValueError: there is none of this name.
        """
        with self._lock:
            self._check_known([name])
            self._slots.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Allows an adapter to be evicted again.

        Raises:
            ValueError: there is none of this name.
        """
        with self._lock:
            self._check_known([name])
            self._slots.pinned.discard(name)

    # ---- serving ----

    @contextmanager
    def batch(self, names: Sequence[str | None], *, lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Context in which calls of the model use these adapters; enter it in the calling thread.

        Calls may have several adjacent rows per sample (beams, returned sequences). Until the block ends, the adapters are
        not evicted and keep their version.

        Args:
            names: an adapter per sample; None (or "__base__") for the base model.
            lengths: the number of tokens of each sample, if calls have them packed in a single row. None: calls have one or
                several rows per sample.

        Raises:
            ValueError: an unknown name, or `lengths` that do not match `names`.
            RuntimeError: at the end, if no call in this thread reached a site.

        Examples:
            >>> model.save_pretrained("adapters/law")
            >>> pool = AdapterPool(base, JolaConfig(), capacity=1000)
            >>> pool.load("law", "adapters/law")
            >>> with pool.batch(["law", None]):
            ...     logits = base(batch["input_ids"]).logits
        """
        if isinstance(names, str) or not names or not all(name is None or isinstance(name, str) for name in names):
            raise ValueError(f"names: expected a name or None for each sample, got {names!r}")
        if lengths is not None and (len(lengths) != len(names) or min(lengths) < 0):
            raise ValueError(f"lengths: expected a number of tokens for each of {len(names)} samples, got {lengths!r}")
        known = [BASE if name is None else name for name in names]
        slots = self._acquire_all([name for name in dict.fromkeys(known) if name != BASE])
        try:
            if not slots:
                with self._serve(None):
                    yield
                return
            rows = [slots.get(name, BASE_SLOT) for name in known]
            if lengths is not None:
                rows = [row for row, length in zip(rows, lengths) for _ in range(length)]
            selection = Selection(self._to_device(rows), lengths is not None)
            with self._serve(selection):
                yield
            if selection.last is None:
                raise RuntimeError(
                    "batch: no call of the model got to a site of the pool in this block. Enter it in the thread that calls "
                    "the model; where a CUDA graph is replayed, use acquire() and serve()"
                )
        finally:
            for slot in slots.values():
                self.release(slot)

    def _to_device(self, rows: list[int]) -> Tensor:
        device = next(iter(self._tables.values())).device
        index = torch.tensor(rows)
        return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)

    def acquire(self, name: str | None) -> int:
        """Returns an adapter's slot, which keeps this version until `release` is called as often.

        For servers whose batches change between calls of the model; `batch` includes it.

        Raises:
            ValueError: there is none of this name.

        Examples:
            >>> model.save_pretrained("adapters/law")
            >>> pool = AdapterPool(base, JolaConfig(), capacity=1000)
            >>> pool.load("law", "adapters/law")
            >>> index = torch.tensor([pool.acquire("law"), pool.acquire(None)])
        """
        return BASE_SLOT if name is None or name == BASE else self._acquire_all([name])[name]

    def _acquire_all(self, names: list[str]) -> dict[str, int]:
        with self._lock:
            self._check_known(names)
            return {name: self._slots.acquire(name) for name in names}

    def release(self, slot: int) -> None:
        """Releases a slot, after the last call of the model that reads it.

        Raises:
            ValueError: the slot is not in use.
        """
        if slot == BASE_SLOT:
            return
        with self._lock:
            if self._slots.in_use(slot):
                self._fences.after_read(slot)
            self._slots.release(slot)

    @contextmanager
    def serve(self, index: Tensor, *, packed: bool = False) -> Iterator[None]:
        """Context in which calls of the model use the slots in `index`, which is read on the device.

        A CUDA graph captured in it reads `index` in every replay.

        Args:
            index: (samples,) or, packed, (tokens,): slots, 0 for the base model; int64 or int32, on the model's device.
            packed: whether calls have the tokens of all samples in a single row.

        Raises:
            ValueError: `index` has another shape or dtype.

        Examples:
            >>> model.save_pretrained("adapters/law")
            >>> pool = AdapterPool(base, JolaConfig(), capacity=1000)
            >>> pool.load("law", "adapters/law")
            >>> index = torch.tensor([pool.acquire("law"), pool.acquire(None)])
            >>> with pool.serve(index):  # under a CUDA graph, write other slots into index and replay
            ...     logits = base(batch["input_ids"]).logits
        """
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            kind = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"index: expected a tensor of int64 or int32 with one dimension, got {kind}")
        if index.device.type == "cpu" and index.numel():
            low, high = (int(value) for value in index.aminmax())
            if not 0 <= low <= high <= self.capacity:
                raise ValueError(f"index must lie in 0..{self.capacity}, got values from {low} to {high}")
        with self._serve(Selection(index, packed)):
            yield

    @contextmanager
    def _serve(self, selection: Selection | None) -> Iterator[None]:
        self._fences.before_read()
        before, self.current.selection = self.current.selection, selection
        try:
            yield
            if self.current.selection is not selection:
                raise RuntimeError(
                    "blocks of a pool overlap in one thread, as where a task awaits inside of one; await outside"
                )
        finally:
            self.current.selection = before

    def _check_known(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self._slots]
        if unknown:
            known = self._slots.names
            listed = ", ".join(map(repr, known[:8])) + ", ..." * (len(known) > 8) if known else "none"
            raise ValueError(
                f"name: expected an adapter of the pool ({listed}), got {', '.join(map(repr, unknown))}; load() it"
            )

    def remove(self) -> None:
        """Detaches the pool and restores the model. Not safe while calls are running.

        Raises:
            ValueError: the pool is not on the model any more.
        """
        pools = self.model.__dict__.get(POOLS, {})
        if pools.get(self._config_class.method) is not self:
            raise ValueError("remove: the pool is not on the model any more")
        self.sites.detach()
        rest = {method: pool for method, pool in pools.items() if pool is not self}
        if rest:
            self.model.__dict__[POOLS] = rest
        else:
            del self.model.__dict__[POOLS]


def _last(name: str) -> str:
    """The last part of a model's name or path."""
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
