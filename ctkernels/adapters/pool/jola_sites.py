"""Sites of a pool of JoLA adapters: inputs of a model's output projections, outputs of its MLPs or of its blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...ops.head_edit.function import edit_rows
from .._offload import home
from .._peft import check_names
from ..jola.config import JolaConfig
from ..jola.layer import KINDS, BlockOutput, JolaLayer, edit_hidden
from ..jola.model import jola_layers, layer_name, parameter_shapes, planned_sites
from ..jola.sites import SiteHeads
from .selection import Current, Selection, Uncopyable
from .sources import Source

_ADAPTER = "adapter"


class JolaSites:
    """Edits each row's heads with its adapter, from tables of g_m * m and g_a * a per projection.

    Args:
        model: the base model.
        config: selects the modules, and the edits that have tables.

    Attributes:
        heads: the heads of each site, by its name.
    """

    def __init__(self, model: nn.Module, config: JolaConfig) -> None:
        if any(True for _ in jola_layers(model)):
            raise ValueError("model: expected one without JoLA layers, got one with; unload() them first")
        self._model = model
        self._config = config
        _, self.heads = planned_sites(model, config)
        self._handles: list[RemovableHandle] = []
        kinds = {"both": KINDS, "multiplicative": ("m",), "additive": ("a",)}[config.edit]
        self.rows = {
            f"{site}.{kind}": torch.zeros(heads.number, heads.dim, dtype=self._dtype(site))
            for site, heads in self.heads.items()
            for kind in kinds
        }
        self.devices = {table: self._device(table.rpartition(".")[0]) for table in self.rows}

    def _device(self, site: str) -> torch.device:
        module = self._model.get_submodule(site)
        device = BlockOutput(module).device if self._config.site == "block" else home(module)
        if device is None:
            raise ValueError(f"{site}: expected a module on a device, got one whose weight is on the meta device")
        return device

    def _dtype(self, site: str) -> torch.dtype:
        """The dtype in which edits of the site are computed."""
        wide = any(p.dtype == torch.float64 for p in self._model.get_submodule(site).parameters())
        return torch.float64 if wide else torch.float32

    def read(self, source: Source, strength: float | None) -> dict[str, Tensor]:
        """An adapter's rows by table, without tables that it has no edit for. `strength` None: the source's own.

        Raises:
            ValueError: the adapter does not fit this model, or has an edit without a table.
        """
        config: JolaConfig = source.config
        if config.site != self._config.site:
            raise ValueError(
                f"source: expected an adapter with site={self._config.site!r} as the pool's, got site={config.site!r}"
            )
        _, sites = planned_sites(self._model, config)
        check_names(parameter_shapes(config, sites), {name: value.shape for name, value in source.state.items()})
        rows = {}
        for site, heads in sites.items():
            scale = source.strengths.get(site, 1.0) if strength is None else strength
            for kind, row in _folded(site, heads, config, source.state, scale).items():
                table = f"{site}.{kind}"
                if table not in self.rows:
                    raise ValueError(
                        f"{table}: the adapter has an edit where the pool has none; make the pool with the configuration "
                        f"of the adapter that edits most, got edit={self._config.edit!r}, "
                        f"target_modules={self._config.target_modules!r}, "
                        f"layers_to_transform={self._config.layers_to_transform!r}"
                    )
                rows[table] = row.reshape(self.rows[table].shape)  # an edit is elementwise: head_dim may be another
        return rows

    def attach(self, tables: dict[str, Tensor], current: Current) -> None:
        """Attaches the edits to the model."""
        self._tables = tables
        for name in self.heads:
            site = _Site(name, tables.get(f"{name}.m"), tables.get(f"{name}.a"), current)
            module = self._model.get_submodule(name)
            if self._config.site == "head":
                self._handles.append(module.register_forward_pre_hook(site.edit_input, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(site.edit_output))
            if self._config.site != "block":
                parent = self._model.get_submodule(name.rpartition(".")[0])
                self._handles.append(parent.register_forward_hook(site.check))

    def edit_of_rows(self, site: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """s and t, (rows, heads, head_dim), of the edits z' = z + s * z + t that rows with the slots `index` have at a site."""
        tables = {kind: self._tables[f"{site}.{kind}"] for kind in KINDS if f"{site}.{kind}" in self._tables}
        rows = {kind: table[index] for kind, table in tables.items()}
        zeros = torch.zeros_like(next(iter(rows.values())))
        return rows.get("m", zeros), rows.get("a", zeros)

    def detach(self) -> None:
        """Detaches the edits."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Site(Uncopyable):
    """A site. `edit_input` is its forward pre-hook, `edit_output` its forward hook, `check` a forward hook of its parent."""

    def __init__(self, name: str, m: Tensor | None, a: Tensor | None, current: Current) -> None:
        self.name, self.m, self.a, self.current = name, m, a, current

    def edit_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        selection = self.current.selection
        if selection is None:
            return None
        if not args:
            raise ValueError(f"{self.name}: expected the heads as the first argument, got only {sorted(kwargs)}")
        return (self._edited(args[0], selection), *args[1:]), kwargs

    def edit_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        selection = self.current.selection
        return None if selection is None else edit_hidden(partial(self._edited, selection=selection), output, self.name)

    def _edited(self, x: Tensor, selection: Selection) -> Tensor:
        z, index = selection.align(x, self.name)
        if self.current.watch is not None:
            self.current.watch(self.name, z, index)
        edited = edit_rows(z, self.m, self.a, index)
        selection.last = self
        return edited if z is x else edited.transpose(0, 1)

    def check(self, module: nn.Module, args: Any, output: Any) -> None:
        selection = self.current.selection
        if selection is not None and selection.last is not self:
            raise ValueError(
                f"{self.name}: {type(module).__name__} did not call its projection, so the edit of its heads would be left "
                "out. Set the model to a way that calls it (Bloom: slow_but_exact=False), or leave the module out with "
                "exclude_modules"
            )


def _folded(
    site: str, heads: SiteHeads, config: JolaConfig, state: dict[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """`JolaLayer.folded_edit` of an adapter without a model."""
    start = f"{layer_name(config, site)}.jola_"
    values = {f"jola_{name[len(start) :]}.{_ADAPTER}": v for name, v in state.items() if name.startswith(start)}
    layer = JolaLayer(nn.Identity(), heads.number, heads.dim, site, heads.values)
    layer.update_layer(_ADAPTER, config, init=False)
    layer.load_state_dict(values, assign=True)
    layer.set_scale(_ADAPTER, strength)
    with torch.no_grad():
        return layer.folded_edit(_ADAPTER)
