"""A monitor of the edits in an adapter pool, by adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..pool import AdapterPool
from ..pool.jola_sites import JolaSites
from ..pool.slots import BASE_SLOT
from .inputs import Inputs
from .metrics import OTHERS
from .monitor import read_reference
from .passes import Part, PassMonitor, Site
from .statistics import Snapshot, Statistics


class _Rows(NamedTuple):
    """The slots of the samples of an input, on the host once `copied`, and the adapters of slots that were in use then."""

    slots: Tensor
    copied: torch.Event | None
    names: dict[int, str]

    def read(self) -> list[str | None]:
        """The adapter of each sample; None for the base model."""
        if self.copied is not None:
            self.copied.synchronize()
        return [None if slot == BASE_SLOT else self.names.get(slot, OTHERS) for slot in self.slots.tolist()]


class PoolMonitor(PassMonitor):
    """Running statistics of the edits in a pool of JoLA adapters, for each adapter by name, and alarms as of an `EditMonitor`.

    Inputs are told apart as by an `EditMonitor`, and watched while the pool serves them; rows of the base model do not count. An
    adapter has a reference, for its range and drift, once `load` has read it from where the adapter's `EditMonitor` saved it.

    A name is a label of metrics, so their number is bounded: the adapters that `load` named, then the first that are served, have
    statistics of their own until there are `adapters` of them. All others share those of `"__others__"`. Metrics by head are
    sums, or the largest, over the heads of an adapter.

    Args:
        pool: a pool of JoLA adapters. Calls with packed tokens (`lengths`, `packed=True`), which do not say where an input ends,
            are not watched; nor are replayed CUDA graphs, which run no Python.
        adapters: the number of adapters with statistics of their own. Default 20.
        every: watch the first of every so many batches that have adapters. Default 8.
        name: name of the model in exported metrics. Default: the name it was loaded from, or its class.

    Attributes:
        sites: number of heads by site.
        heads: (site, head) of every column of the statistics.

    Raises:
        ValueError: the pool has curvature adapters, or an argument is out of range.

    Examples:
        >>> model.save_pretrained("adapters/law")
        >>> pool = AdapterPool(base, JolaConfig(), capacity=1000)
        >>> pool.load("law", "adapters/law")
        >>> with PoolMonitor(pool) as monitor, pool.batch(["law", None]):
        ...     output = base(**batch)
        >>> monitor.begin()  # the inputs are complete
        >>> monitor.snapshot("law").inputs
        1
    """

    by_head = False

    def __init__(self, pool: AdapterPool, *, adapters: int = 20, every: int = 8, name: str = "") -> None:
        if not isinstance(pool, AdapterPool) or not isinstance(pool.sites, JolaSites):
            kind = repr(pool) if isinstance(pool, AdapterPool) else type(pool).__name__
            raise ValueError(f"pool: expected an AdapterPool of JoLA adapters, got {kind}")
        for argument, value in (("adapters", adapters), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument}: expected a number of at least 1, got {value!r}")
        self._edits: JolaSites = pool.sites
        sites = [Site(site, heads.number, heads.dim) for site, heads in self._edits.heads.items()]
        super().__init__(pool.model, sites, every, 0, name)
        self.pool, self.adapters = pool, adapters
        self._device = next(iter(self._edits.devices.values()))
        self._by_adapter: dict[str, Statistics] = {}
        self._others = self._new_statistics()

    # ---- statistics ----

    def load(self, adapter: str, path: str | os.PathLike[str]) -> None:
        """Load the reference of an adapter, saved by its `EditMonitor`, and give the adapter statistics of its own.

        Call it again after another version of the adapter was loaded into the pool.

        Args:
            adapter: its name in the pool.
            path: the file, or the folder with `edit_monitor.json`.

        Raises:
            ValueError: the file has another format, or is for other sites; or no more adapters can have their own statistics.
        """
        reference = read_reference(path, self.sites)
        statistics = self._of(adapter)
        if statistics is self._others:
            raise ValueError(
                f"adapter: {self.adapters} adapters have statistics of their own, so {adapter!r} cannot; make the monitor with a "
                "larger number of adapters, and load references before serving"
            )
        statistics.place(reference)

    def snapshot(self, adapter: str) -> Snapshot:
        """The statistics of an adapter's completed inputs, in one read from the device; "__others__" for those without own ones.

        Raises:
            ValueError: the adapter has no statistics of its own.
        """
        known = dict(self.statistics_by_adapter())
        if adapter not in known:
            raise ValueError(f"adapter: expected one with statistics, of {list(known)}, got {adapter!r}")
        return known[adapter].snapshot()

    def statistics_by_adapter(self) -> Iterator[tuple[str, Statistics]]:
        """The statistics, each with the name of its adapter."""
        yield from list(self._by_adapter.items())
        if self._others.rows:
            yield OTHERS, self._others

    def reset(self) -> None:
        """Forget inputs; adapters keep their statistics, empty, and their references."""
        self._current = self._batch = None
        for statistics in (*self._by_adapter.values(), self._others):
            statistics.reset()

    def _new_statistics(self) -> Statistics:
        return Statistics(len(self.heads), self._device, self._tolerance)

    def _of(self, adapter: str) -> Statistics:
        if adapter not in self._by_adapter:
            if adapter == OTHERS or len(self._by_adapter) >= self.adapters:
                return self._others
            self._by_adapter[adapter] = self._new_statistics()
        return self._by_adapter[adapter]

    # ---- passes ----

    def _serves(self) -> bool:
        selection = self.pool.current.selection
        return selection is not None and not selection.packed

    def _adapters(self) -> _Rows:
        selection = self.pool.current.selection
        assert selection is not None  # as `_serves` says
        index = selection.index
        slots = torch.empty(index.shape, dtype=index.dtype, pin_memory=index.device.type == "cuda")
        slots.copy_(index, non_blocking=True)
        copied = None
        if index.device.type != "cpu":
            copied = torch.Event(index.device)
            copied.record()
        return _Rows(slots, copied, self.pool.adapters_in_use())

    def _end(self, inputs: Inputs) -> None:
        names = inputs.adapters.read()
        repeated = len(inputs) // len(names)
        by_statistics: dict[int, tuple[Statistics, list[int]]] = {}
        for row in range(len(inputs)):
            name = names[row // repeated]
            if name is not None:
                statistics = self._of(name)
                by_statistics.setdefault(id(statistics), (statistics, []))[1].append(row)
        for statistics, rows in by_statistics.values():
            statistics.add(inputs.of_rows(rows))

    def _modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(site) for site in self.sites]

    def _begin_recording(self) -> None:
        self.pool.current.watch = self._see

    def _end_recording(self) -> None:
        self.pool.current.watch = None

    @torch.compiler.disable
    def _see(self, site: str, z: Tensor, index: Tensor) -> None:
        self._record(Part(self._numbers[site], z, index))

    def _operands(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        edits = [
            self._edits.edit_of_rows(self._sites[part.site].name, part.slots)
            for part in parts
            if part.slots is not None  # every part of a pool has one
        ]
        scales, offsets = (torch.stack(values).unsqueeze(2) for values in zip(*edits))
        return scales, offsets
