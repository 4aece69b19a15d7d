"""The units of a site: trainable while an adapter is attached, fixed after merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...nn import Unscriptable
from ...steering.activations import ACTIVATIONS
from ...steering.runtime import SiteUnit, call_ctu, ctu_arguments
from .._offload import keep_resident
from .._parallel import local_slice, mesh_around
from .._peft import merged_in_batch
from ..strength import Scaled, strengths
from .config import CurvatureConfig
from .layout import Channels
from .per_sample import combined_logit, index_of, logit, names_for, neutral_logits


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` without its cast: in bfloat16, a beta near 1 would become 1."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.detach().to(result.device)

    return moved


def _absent(layer: CurvatureLayer) -> Any:
    raise AttributeError("an activation has no weight")


class CurvatureLayer(Unscriptable, SiteUnit, Scaled, nn.Module, BaseTunerLayer):
    """The CT units of one site, with a (beta, coeff) per adapter. Without an active adapter, the original activation runs.

    Wraps no layer: unlike peft's other layers it has neither `weight` nor `bias`.

    Parameters of an adapter, float32 logits, C the number of channels (1 unless `granularity="channel"`):
    `curvature_raw_beta`, `curvature_raw_coeff` (C,). A site that shares another site's parameters has none.

    Args:
        site: the site's name in the model, for messages.
        activation: of the site.
        device: of its parameters.
    """

    curvature_raw_beta: nn.ParameterDict
    curvature_raw_coeff: nn.ParameterDict

    around: nn.Module | None
    weight = property(_absent)
    bias = property(_absent)

    adapter_layer_names = ("curvature_raw_beta", "curvature_raw_coeff")
    other_param_names = ("strength", "curvature_config", "curvature_channels", "curvature_source")

    def __init__(self, site: str, activation: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.site, self.activation, self.device = site, activation, device
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.strength = strengths()
        self.curvature_config: dict[str, CurvatureConfig] = {}
        self.curvature_channels: dict[str, Channels | None] = {}
        self.curvature_source: dict[str, CurvatureLayer] = {}  # the layer whose parameters are used, if another one
        self.__dict__["around"] = (
            None  # the module that holds the site, not a child: its weights say how they are sharded
        )
        self.samples_first: bool | None = None  # whether dimension 0 of the input holds the samples; None: unknown
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters: list[str] = []

    # ---- adapters ----

    def update_layer(self, adapter_name: str, config: CurvatureConfig, channels: Channels | None) -> None:
        """Adds the parameters of an adapter. `channels` None: one (beta, coeff) for all channels."""
        self.curvature_config[adapter_name] = config
        self.curvature_channels[adapter_name] = channels
        for table, value in zip((self.curvature_raw_beta, self.curvature_raw_coeff), config.start(self.activation)):
            raw = torch.full((1 if channels is None else channels.size,), logit(value), dtype=torch.float32)
            if self.device is not None and "meta" not in (raw.device.type, self.device.type):
                raw = raw.to(self.device)
            table[adapter_name] = nn.Parameter(raw)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def follow(self, adapter_name: str, config: CurvatureConfig, source: CurvatureLayer) -> None:
        """Uses the parameters of another site for an adapter."""
        self.curvature_config[adapter_name] = config
        self.curvature_channels[adapter_name] = source.curvature_channels[adapter_name]
        self.curvature_source[adapter_name] = source

    def parameters_of(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """raw beta and raw coeff of an adapter, its own or shared."""
        children = self.curvature_source.get(adapter_name, self)._modules  # faster than attributes of a module
        beta, coeff = children["curvature_raw_beta"], children["curvature_raw_coeff"]
        if "_hf_hook" in beta.__dict__ or "_hf_hook" in coeff.__dict__:
            self.keep_resident()
        return getattr(beta, adapter_name), getattr(coeff, adapter_name)

    def logits_of(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """raw beta and raw coeff with which an adapter computes the site, at its strength."""
        beta, coeff = self.parameters_of(adapter_name)
        if adapter_name not in self.strength:
            return beta, coeff
        neutral, strength = ACTIVATIONS[self.activation], self.strength[adapter_name]
        return (
            combined_logit(neutral.beta, [beta], [strength]),
            combined_logit(neutral.coeff, [coeff], [strength]),
        )

    def configs(self) -> dict[str, Any]:
        """The configurations of its adapters, by name."""
        return self.curvature_config

    def _home(self) -> torch.device | None:
        return None if self.device is None or self.device.type == "meta" else self.device

    def check_scale(self, adapter: str, scale: float) -> None:
        """Check that an adapter can be given a strength.

        Raises:
            ValueError: it is merged, or the strength is not between 0 and 1, beyond which beta has no meaning.
        """
        super().check_scale(adapter, scale)
        if not 0 <= scale <= 1:
            raise ValueError(f"{self.site}: scale must lie between 0 and 1 for curvatures, got {scale!r}")

    def adapter_in_use(self) -> str | None:
        """The adapter that computes this site, or None.

        Raises:
            ValueError: several are active; units cannot be combined.
        """
        if self._disable_adapters:
            return None
        names, known = self.merged_adapters or self._active_adapter, self.curvature_config
        if len(names) == 1 and not isinstance(names, str):
            return names[0] if names[0] in known else None
        names = [name for name in self.active_adapters if name in known] if names else []
        if len(names) > 1:
            raise ValueError(f"{self.site}: one adapter can be active at a time, got {names}")
        return names[0] if names else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for table in (self.curvature_raw_beta, self.curvature_raw_coeff):
            target = device or self.device
            known = target is not None and target.type != "meta"  # "meta": an offloaded model that does not run
            if known and adapter_name in table and table[adapter_name].device.type != "meta":
                table[adapter_name] = table[adapter_name].to(target)

    def keep_resident(self) -> None:
        """Makes parameters of adapters that accelerate has offloaded resident again."""
        for layer in (self, *self.curvature_source.values()):
            keep_resident((layer.curvature_raw_beta, layer.curvature_raw_coeff, layer.strength))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CurvatureLayer:
        device = fn(torch.empty(0, device=self.device)).device  # for adapters added later
        self.device = self.device if device.type == "meta" else device
        return super()._apply(_keeping_dtype(fn), recurse)

    # ---- the unit ----

    @property
    def active(self) -> bool:  # type: ignore[override]
        """True if an adapter, and not the original activation, computes the site."""
        names = names_for(self)
        if names is not None and not self._disable_adapters:
            return any(name in self.curvature_config for name in names)
        return self.adapter_in_use() is not None

    def forward(self, x: Tensor, activation: str, slope: float | Tensor | None, inplace: bool) -> Tensor:
        """Replaces `activation(x)`; inside `adapters_by_sample`, with each sample's adapter, in one pass."""
        names = names_for(self)
        if names is None:
            values, channels, index = *self._values(), None
        else:
            values, channels, index = self._values_by_sample(names, x)
        values, channels = self._local(x, values, channels)
        return call_unit(x, values, channels, activation, slope, inplace, self.site, index)

    def ctu_arguments(self, x: Tensor, activation: str, slope: float | Tensor | None) -> dict[str, Any] | None:
        """Keyword arguments for `ctkernels.functional.ctu`; None inside `adapters_by_sample`, where they depend on the call."""
        if names_for(self) is not None:
            return None
        return _fusible(x, *self._local(x, *self._values()), activation, slope)

    def _values_by_sample(self, names: list[str], x: Tensor) -> tuple[tuple[Tensor, Tensor], Channels | None, Tensor]:
        """Rows of raw beta and raw coeff, their channels, and each sample's row; row 0 is the neutral point."""
        if self.merged:
            raise merged_in_batch(self.site, self.merged_adapters)
        used = [name for name in dict.fromkeys(names) if name in self.curvature_config]
        placed = {self.curvature_channels[name] for name in used} - {None}
        if len(placed) > 1:
            raise ValueError(f"{self.site}: adapters in one batch must have their channels in one place, got {placed}")
        channels = next(iter(placed), None)
        size = 1 if channels is None else channels.size
        rows = [self.logits_of(name) for name in used]
        neutral = neutral_logits(self.activation, rows[0][0].detach())
        beta, coeff = (torch.stack([row.expand(size) for row in kind]) for kind in zip(neutral, *rows))
        return (beta, coeff), channels, index_of(names, used, x, self.site, self.samples_first)

    def _local(
        self, x: Tensor, values: tuple[Tensor, Tensor], channels: Channels | None
    ) -> tuple[tuple[Tensor, Tensor], Channels | None]:
        """The values of the channels that are on this rank: under tensor parallelism, x has a part of them."""
        if channels is None or not -x.dim() <= channels.dim < x.dim() or x.shape[channels.dim] == channels.size:
            return values, channels
        count, mesh = x.shape[channels.dim], None if self.around is None else mesh_around(self.around)
        if mesh is None or mesh.size() * count != channels.size:
            return values, channels
        beta, coeff = (
            local_slice(value, mesh.get_local_rank() * count, count, -1, mesh.get_group()) for value in values
        )
        return (beta, coeff), channels._replace(size=count)

    def _values(self) -> tuple[tuple[Tensor, Tensor], Channels | None]:
        name = self.adapter_in_use()
        assert name is not None
        beta, coeff = self.logits_of(name)
        values = (beta.detach(), coeff.detach()) if self.merged_adapters else (beta, coeff)
        return values, self.curvature_channels[name]

    # ---- merging ----

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fixes the adapter: it computes the site untrained, whatever is active. Nothing is folded into weights.

        Raises:
            ValueError: several adapters, or, with `safe_merge`, non-finite parameters.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.curvature_config]
        if len([*self.merged_adapters, *names]) > 1:
            raise ValueError(f"{self.site}: one adapter can be merged, got {[*self.merged_adapters, *names]}")
        for name in names:
            if safe_merge and not all(bool(raw.isfinite().all()) for raw in self.parameters_of(name)):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its parameters at "
                    f"{self.site} are not finite"
                )
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Reverts `merge`."""
        self.merged_adapters.clear()

    def extra_repr(self) -> str:
        """The site, its activation, and the channels of each adapter."""
        parts = [f"{self.site}, {self.activation}"]
        for name, channels in self.curvature_channels.items():
            parts.append(f"{name}: " + ("1" if channels is None else f"{channels.size} in dimension {channels.dim}"))
        return ", ".join(parts)


class FixedUnit(Unscriptable, SiteUnit, nn.Module):
    """A `CurvatureLayer` after `merge_and_unload`: a unit with fixed values, as buffers.

    Args:
        raw_beta, raw_coeff: logits, float32, (C,); they stay float32 when the model is cast.
        channels: that they belong to; None: one pair for all.
        site: the site's name, for messages.
    """

    raw_beta: Tensor
    raw_coeff: Tensor

    def __init__(self, raw_beta: Tensor, raw_coeff: Tensor, channels: Channels | None, site: str) -> None:
        super().__init__()
        self.channels, self.site = channels, site
        self.register_buffer("raw_beta", raw_beta.detach().clone())
        self.register_buffer("raw_coeff", raw_coeff.detach().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedUnit:
        return super()._apply(_keeping_dtype(fn), recurse)

    def forward(self, x: Tensor, activation: str, slope: float | Tensor | None, inplace: bool) -> Tensor:
        """Replaces `activation(x)`."""
        return call_unit(x, (self.raw_beta, self.raw_coeff), self.channels, activation, slope, inplace, self.site)

    def ctu_arguments(self, x: Tensor, activation: str, slope: float | Tensor | None) -> dict[str, Any] | None:
        """Keyword arguments for `ctkernels.functional.ctu`."""
        return _fusible(x, (self.raw_beta, self.raw_coeff), self.channels, activation, slope)


class Original(SiteUnit):
    """The unit of a site without an adapter in a merged model: the original activation runs."""

    active = False


def call_unit(
    x: Tensor,
    values: tuple[Tensor, Tensor],
    channels: Channels | None,
    activation: str,
    slope: Any,
    inplace: bool,
    site: str,
    index: Tensor | None = None,
) -> Tensor:
    """Replaces `activation(x)` by a unit with logits that belong to `channels`."""
    if channels is not None:
        dim = channels.dim
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != channels.size:
            raise ValueError(
                f"{site}: expected {channels.size} channels in dimension {dim}, got shape {tuple(x.shape)}"
            )
        if _by_channel(slope) and dim % x.dim() != 1:
            raise ValueError(f"{site}: the slopes of a PReLU are in dimension 1, so channels must be too, got {dim}")
    return call_ctu(x, {**_arguments(x.device, values, channels, activation, slope), "index": index}, inplace)


def _arguments(
    device: torch.device, values: tuple[Tensor, Tensor], channels: Channels | None, activation: str, slope: Any
) -> dict[str, Any]:
    beta, coeff = values
    if beta.device != device:  # one pair shared by a model that is spread over devices
        beta, coeff = beta.to(device), coeff.to(device)
    arguments = ctu_arguments(beta, coeff, activation, slope, None if channels is None else channels.dim)
    return arguments | {"raw": True, "eps": 0.0}  # a logit needs no correction


def _fusible(
    x: Tensor, values: tuple[Tensor, Tensor], channels: Channels | None, activation: str, slope: Any
) -> dict[str, Any] | None:
    """The arguments of a fused call; None if `channels` and a PReLU's slopes may be in different dimensions."""
    if channels is not None and channels.dim != 1 and _by_channel(slope):
        return None
    return _arguments(x.device, values, channels, activation, slope)


def _by_channel(slope: Any) -> bool:
    return isinstance(slope, Tensor) and slope.numel() > 1
