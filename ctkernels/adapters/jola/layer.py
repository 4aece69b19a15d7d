"""The wrapper around an attention output projection that edits the heads in its input."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...functional import hard_concrete, head_edit
from ..merge import folded, mergeable
from ..parallel import local_heads
from ..sites import linear_shape
from .calls import take_edit
from .config import JolaConfig
from .reads import note_call, note_read, watch

KINDS = ("m", "a")


class JolaLayer(nn.Module, BaseTunerLayer):
    """Wraps a projection and applies `z' = (1 + g_m*m) * z + g_a*a` to its input (JoLA, eq. 2).

    Several active adapters apply one after the other, in the order they were activated. In training, gates are
    sampled in the layer's own forward from the process's random generator: so a checkpointed layer sees the same
    sample when it is computed again (torch restores the generator there), two forwards before one backward do not
    mix, and a sharded parameter is whole when it is read. A layer applied several times in one forward draws anew.

    Args:
        base_layer: the projection: Linear, Conv1D or a quantised Linear.
        num_heads: heads in the whole (not the tensor-parallel local) input.
        head_dim: size of a head.
        site: the module's name in the model, for messages.

    Parameters of an adapter, in fp32 by default, K the number of edited heads: `jola_m`, `jola_a` (K, head_dim),
    `jola_log_alpha_m`, `jola_log_alpha_a` (K,).
    """

    jola_m: nn.ParameterDict
    jola_a: nn.ParameterDict
    jola_log_alpha_m: nn.ParameterDict
    jola_log_alpha_a: nn.ParameterDict

    adapter_layer_names = ("jola_m", "jola_a", "jola_log_alpha_m", "jola_log_alpha_a")
    other_param_names = ("jola_heads_m", "jola_heads_a", "jola_config")

    def __init__(self, base_layer: nn.Module, num_heads: int, head_dim: int, site: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.site = site
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.jola_heads_m = BufferDict(persistent=False)
        self.jola_heads_a = BufferDict(persistent=False)
        self.jola_config: dict[str, JolaConfig] = {}
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters: list[str] = []
        self._originals: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self._watches: list[RemovableHandle] = []

    # ---- adapters ----

    def update_layer(self, adapter_name: str, config: JolaConfig) -> None:
        """Add the parameters of an adapter, initialised as the config says."""
        self.jola_config[adapter_name] = config
        for kind, heads in zip(KINDS, config.heads_of(self.site, self.num_heads)):
            count = self.num_heads if heads is None else len(heads)
            if count == 0:
                continue
            vectors = torch.empty(count, self.head_dim)
            self._of(kind)[adapter_name] = nn.Parameter(nn.init.normal_(vectors, std=config.init_std))
            self._log_alpha(kind)[adapter_name] = nn.Parameter(torch.full((count,), float(config.init_log_alpha)))
            if heads is not None:
                self._heads(kind)[adapter_name] = torch.tensor(heads, dtype=torch.long)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; their parameters become trainable, but frozen gates stay frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_gates_frozen()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Turn gradients of adapters on or off; frozen gates stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_gates_frozen()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # some peft versions cast every buffer to the base layer's dtype, which would round head indices
        heads = {kind: self._heads(kind)[adapter_name] for kind in KINDS if adapter_name in self._heads(kind)}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for kind, index in heads.items():
            self._heads(kind)[adapter_name] = index.to(self._heads(kind)[adapter_name].device)

    def _keep_gates_frozen(self) -> None:
        for name, config in self.jola_config.items():
            if config.freeze_gates:
                for kind in KINDS:
                    if name in self._log_alpha(kind):
                        self._log_alpha(kind)[name].requires_grad_(False)

    def keep_heads(self, adapter_name: str, kind: str, heads: list[int]) -> None:
        """Drop every head but `heads` (indices among all heads) from one edit of an adapter."""
        old = self._heads(kind)[adapter_name].tolist() if adapter_name in self._heads(kind) else range(self.num_heads)
        rows = [list(old).index(head) for head in heads]
        if adapter_name in self._heads(kind):
            del self._heads(kind)[adapter_name]
        for table in (self._of(kind), self._log_alpha(kind)):
            parameter = table[adapter_name]
            del table[adapter_name]
            if rows:
                kept = parameter.detach()[rows].clone()
                table[adapter_name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        if rows:
            self._heads(kind)[adapter_name] = torch.tensor(heads, dtype=torch.long, device=kept.device)

    def _of(self, kind: str) -> nn.ParameterDict:
        return self.jola_m if kind == "m" else self.jola_a

    def _log_alpha(self, kind: str) -> nn.ParameterDict:
        return self.jola_log_alpha_m if kind == "m" else self.jola_log_alpha_a

    def _heads(self, kind: str) -> BufferDict:
        return self.jola_heads_m if kind == "m" else self.jola_heads_a

    # ---- what others read of a projection ----

    @property
    def weight(self) -> Tensor:
        """The projection's weight. A model that multiplies by it instead of calling this layer gets an error."""
        if self._edits():
            note_read(self)
        return super().weight

    @property
    def bias(self) -> Tensor:
        """The projection's bias (None if it has none); as `weight`."""
        if self._edits():
            note_read(self)
        return super().bias

    @property
    def in_features(self) -> int:
        """Width of the projection's input."""
        return self._shape()[0]

    @property
    def out_features(self) -> int:
        """Width of the projection's output."""
        return self._shape()[1]

    def _shape(self) -> tuple[int, int]:
        shape = linear_shape(self.get_base_layer())
        if shape is None:
            raise AttributeError(f"{self.site}: {type(self.get_base_layer()).__name__} does not say how wide it is")
        return shape

    def watch(self, block: nn.Module) -> None:
        """Have `block`, the module that holds this layer, checked: it may not use the weight without calling the layer."""
        self._watches += watch(block, self)

    def unwatch(self) -> None:
        """End all checks begun by `watch`."""
        for handle in self._watches:
            handle.remove()
        self._watches.clear()

    def _edits(self) -> bool:
        active = any(name in self.jola_config for name in self.active_adapters)
        return active and not self.disable_adapters and not self.merged

    # ---- the edit ----

    def gates(self, adapter_name: str, *, training: bool | None = None, rows: int | None = None) -> dict[str, Tensor]:
        """The gates of an adapter's edited heads: a dict from "m" and "a" to (K,), or (rows, K) when sampled by row."""
        config = self.jola_config[adapter_name]
        log_alpha = {kind: self._log_alpha(kind)[adapter_name] for kind in KINDS if adapter_name in self._of(kind)}
        if not log_alpha:
            return {}
        if training is None:
            training = self.training and not config.freeze_gates
        flat = torch.cat(list(log_alpha.values()))
        if training and rows is not None and config.gate_sampling == "row":
            flat = flat.expand(rows, -1)
        gates = hard_concrete(
            flat,
            training=training,
            temperature=config.temperature,
            stretch=config.stretch,
            estimator=config.gate_estimator,
        )
        return dict(zip(log_alpha, gates.split([value.shape[0] for value in log_alpha.values()], dim=-1)))

    def _spread(self, value: Tensor, adapter_name: str, kind: str, dim: int) -> Tensor:
        """Place the rows of the edited heads among all heads, zeros elsewhere."""
        if adapter_name not in self._heads(kind):
            return value
        shape = list(value.shape)
        shape[dim] = self.num_heads
        return value.new_zeros(shape).index_copy(dim, self._heads(kind)[adapter_name], value)

    def _operands(self, adapter_name: str, gates: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        vectors = {kind: self._spread(self._of(kind)[adapter_name], adapter_name, kind, 0) for kind in gates}
        return vectors, {kind: self._spread(gate, adapter_name, kind, -1) for kind, gate in gates.items()}

    def edit(self, z: Tensor, adapter_name: str) -> Tensor:
        """Apply one adapter's edit to `z` (..., heads * head_dim); under tensor parallelism, to the local heads."""
        gates = self.gates(adapter_name, rows=z.shape[0])
        if not gates:
            return z
        vectors, gates = self._operands(adapter_name, gates)
        local = z.shape[-1] // self.head_dim
        if local != self.num_heads:
            vectors = {kind: local_heads(value, self, local, 0) for kind, value in vectors.items()}
            gates = {kind: local_heads(value, self, local, -1) for kind, value in gates.items()}
        index = None
        if any(gate.dim() == 2 for gate in gates.values()):
            index = torch.arange(z.shape[0], device=z.device)
            vectors = {kind: value.expand(z.shape[0], -1, -1) for kind, value in vectors.items()}
        return head_edit(
            z,
            vectors.get("m"),
            vectors.get("a"),
            gates.get("m"),
            gates.get("a"),
            head_dim=self.head_dim,
            index=index,
        )

    def attention_edit(self, heads: int, size: int) -> tuple[Tensor | None, ...] | None:
        """(m, a, g_m, g_a) for an attention function that applies the edit to its own output and records it.

        None where the edit has to happen here: no adapter or several, gates by row, local heads, a hook that looks at
        what comes in or brings an adapter for each row.
        """
        names = [name for name in self.active_adapters if name in self.jola_config]
        if self.disable_adapters or self.merged or len(names) != 1 or self._forward_pre_hooks:
            return None
        config = self.jola_config[names[0]]
        by_row = self.training and not config.freeze_gates and config.gate_sampling == "row"
        if by_row or (heads, size) != (self.num_heads, self.head_dim):
            return None
        gates = self.gates(names[0])
        if not gates:
            return None
        vectors, gates = self._operands(names[0], gates)
        return vectors.get("m"), vectors.get("a"), gates.get("m"), gates.get("a")

    def _edit_mixed(self, z: Tensor, adapter_names: list[str]) -> Tensor:
        """Apply a different adapter to each row of the batch; "__base__" and adapters absent here edit nothing."""
        if z.shape[0] % len(adapter_names) != 0:
            raise ValueError(
                f"{self.site}: Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {z.shape[0]} respectively."
            )
        used = [name for name in dict.fromkeys(adapter_names) if name in self.jola_config]
        local = z.shape[-1] // self.head_dim
        operands: dict[str, list[Tensor]] = {"m": [], "a": []}
        for name in used:
            gates = self.gates(name, training=False)
            vectors, gates = self._operands(name, gates)
            for kind in KINDS:
                if kind in gates:
                    folded_in = vectors[kind] * gates[kind].unsqueeze(-1)
                else:
                    folded_in = torch.zeros(self.num_heads, self.head_dim, device=z.device)
                operands[kind].append(folded_in if local == self.num_heads else local_heads(folded_in, self, local, 0))
        if not used:
            return z
        stacks = {kind: torch.stack([torch.zeros_like(parts[0]), *parts]) for kind, parts in operands.items()}
        rows = [used.index(name) + 1 if name in used else 0 for name in adapter_names]
        index = torch.tensor(rows, device=z.device).repeat_interleave(z.shape[0] // len(rows))
        return head_edit(z, stacks["m"], stacks["a"], head_dim=self.head_dim, index=index)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Edit the heads in `x` (..., heads * head_dim) and project."""
        note_call(self)
        adapter_names = kwargs.pop("adapter_names", None)
        if take_edit(self):
            pass
        elif self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            if self.merged:
                raise ValueError(
                    f"{self.site}: Cannot pass `adapter_names` when there are merged adapters, please call "
                    f"`unmerge_adapter` first. Merged: {self.merged_adapters}"
                )
            x = self._edit_mixed(x, list(adapter_names))
        elif not self.merged:
            for name in self.active_adapters:
                if name in self.jola_config:
                    x = self.edit(x, name)
        return self.base_layer(x, *args, **kwargs)

    # ---- merging ----

    @torch.no_grad()
    def factors(self, adapter_names: list[str]) -> tuple[Tensor, Tensor]:
        """p and q, both (heads * head_dim,), with `p*z + q` the edit of the adapters in order, gates deterministic."""
        base: Any = self.get_base_layer()
        weight = base.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        p = torch.ones(self.num_heads, self.head_dim, dtype=dtype, device=weight.device)
        q = torch.zeros_like(p)
        for name in adapter_names:
            vectors, gates = self._operands(name, self.gates(name, training=False))
            scale = 1 + vectors["m"].to(p) * gates["m"].to(p).unsqueeze(-1) if "m" in gates else torch.ones_like(p)
            p, q = p * scale, q * scale
            if "a" in gates:
                q = q + vectors["a"].to(p) * gates["a"].to(p).unsqueeze(-1)
        return p.flatten(), q.flatten()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the projection: `W <- W diag(p)`, `b <- b + W q`, computed in fp32 or wider.

        New parameters take the place of the old ones, which are kept for `unmerge`; a weight tied to another module
        is untied here. A bias is created only if q is not zero.

        Raises:
            ValueError: the projection is quantised or sharded, or `safe_merge` met a non-finite value. Nothing is
                changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.jola_config]
        if not names:
            return
        base: Any = self.get_base_layer()
        mergeable(base, self.site)
        originals = self._originals or (base.weight, base.bias)
        p, q = self.factors([*self.merged_adapters, *names])
        weight, bias = folded(base, originals[0], originals[1], p, q)
        if safe_merge and not all(bool(value.isfinite().all()) for value in (weight, bias) if value is not None):
            raise ValueError(f"{self.site}: merging {names} gives values that are not finite")
        self._originals = originals
        base.weight = nn.Parameter(weight, requires_grad=False)
        base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.merged_adapters.extend(names)

    def had_bias(self) -> bool:
        """Whether the projection has a bias of its own, not made by merging."""
        bias = getattr(self.get_base_layer(), "bias", None) if self._originals is None else self._originals[1]
        return bias is not None

    def unmerge(self) -> None:
        """Put the original parameters back, the same objects with the same bits."""
        if self._originals is not None:
            base: Any = self.get_base_layer()
            base.weight, base.bias = self._originals
            self._originals = None
        self.merged_adapters.clear()

    def extra_repr(self) -> str:
        """Heads and head size, shown when the model is printed."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
