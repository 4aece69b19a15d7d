"""The layer with an adapter's edits, of the input or output of a projection that it wraps, or of a block's output."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from ..._marks import BLOCK_OUTPUT
from ...functional import hard_concrete, head_edit
from ...fusion.layers import is_layer, why_not
from ...nn import Unscriptable
from ...ops.head_edit_linear import cost_model
from ...ops.head_edit_linear.function import head_edit_linear
from ...ops.head_edit_linear.reference import Edits
from .._offload import fetched, home, keep_resident
from .._peft import merged_in_batch
from ..strength import Scaled, strengths
from .calls import take_edit
from .config import JolaConfig
from .fold import Kept, copied, folded, merge_from_inside, refuse_live, stack, to_merge
from .packing import packing
from .parallel import local_heads
from .reads import note_call, note_read, watch
from .sites import linear_shape

KINDS = ("m", "a")


class BlockOutput(nn.Identity):
    """The base layer of a `JolaLayer` that edits a block's output: an identity that knows the block's device."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not as a submodule

    @property
    def device(self) -> torch.device | None:
        """The device on which the block computes; None if unknown."""
        block: Any = self.__dict__["_block"]
        return next((device for module in block.modules() if (device := home(module)) is not None), None)


class JolaLayer(Unscriptable, Scaled, nn.Module, BaseTunerLayer):
    """Wraps a projection and applies `z' = (1 + g_m*m) * z + g_a*a` to its input (JoLA, eq. 2).

    With `edits="mlp"`, z is the projection's output. With `edits="block"`, the layer is a child of a block, wraps nothing,
    and edits the block's output.

    Active adapters apply in the order they were activated. In training, gates are sampled in the layer's forward from the
    default random generator. Activation checkpointing therefore recomputes the same sample (torch restores the generator),
    two forwards before one backward are independent, and sharded parameters are gathered when they are read. A layer
    applied several times in one forward samples each time.

    Args:
        base_layer: the projection: Linear, Conv1D or a quantised Linear; for a block, a `BlockOutput`.
        num_heads: heads in the full z; under tensor parallelism, over all ranks.
        head_dim: size of a head.
        site: the module's name in the model, for messages.
        num_kv_heads: number of value heads; None if unknown.
        edits: "head", "mlp" or "block", as in `JolaConfig.site`.

    Parameters of an adapter, in fp32 by default, K the number of edited heads: `jola_m`, `jola_a` (K, head_dim),
    `jola_log_alpha_m`, `jola_log_alpha_a` (K,). With `additive="kv_group"`, those of a have one row per group of heads
    that share values; `gates`, `vectors` and `log_alpha` return a row for every head. Adam's step size is the same for
    every parameter, so a and log alpha are stored in units: a is `jola_unit_a` (K,) times its parameter, log alpha is
    `jola_unit_log_alpha` () times its parameter. Units are buffers, saved with the adapter; without them in the file,
    they are 1.
    """

    jola_m: nn.ParameterDict
    jola_a: nn.ParameterDict
    jola_log_alpha_m: nn.ParameterDict
    jola_log_alpha_a: nn.ParameterDict
    jola_unit_a: Any
    jola_unit_log_alpha: Any

    adapter_layer_names = ("jola_m", "jola_a", "jola_log_alpha_m", "jola_log_alpha_a")
    unit_names = ("jola_unit_a", "jola_unit_log_alpha")
    other_param_names = (*unit_names, "strength", "jola_heads_m", "jola_heads_a", "jola_config")

    def __init__(
        self,
        base_layer: nn.Module,
        num_heads: int,
        head_dim: int,
        site: str,
        num_kv_heads: int | None = None,
        edits: str = "head",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.site = site
        self.num_kv_heads = num_kv_heads
        self.edits = edits
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.unit_names:
            setattr(self, name, BufferDict(persistent=True))
        self.strength = strengths()
        # The edited heads of an adapter that does not edit all. Not tensors: those would lose their values on the meta
        # device, and no checkpoint contains them.
        self.jola_heads_m: dict[str, tuple[int, ...]] = {}
        self.jola_heads_a: dict[str, tuple[int, ...]] = {}
        self.jola_config: dict[str, JolaConfig] = {}
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters: list[str] = []
        self._kept: Kept | None = None  # the parameters that merging replaced
        self.merge_error = 0.0  # relative error, in norm, of requantising the merged weight
        self._paused: list[str] = []  # adapters to merge again when adapters are enabled
        self._watches: list[RemovableHandle] = []

    # ---- adapters ----

    def update_layer(self, adapter_name: str, config: JolaConfig, init: bool = True) -> None:
        """Add the parameters of an adapter, initialised from the config; with `init=False`, m and a are left empty."""
        self.jola_config[adapter_name] = config
        for kind, heads in zip(KINDS, config.heads_of(self.site, self.num_heads, self.num_kv_heads)):
            count = (self.num_heads if heads is None else len(heads)) // self.shared(kind, adapter_name)
            if count == 0:
                continue
            vectors = torch.empty(count, self.head_dim)
            if init:
                nn.init.normal_(vectors, std=config.init_std)
            self._of(kind)[adapter_name] = nn.Parameter(vectors)
            logits = torch.full((count,), config.init_log_alpha / config.gate_rate)
            self._log_alpha(kind)[adapter_name] = nn.Parameter(logits)
            self.jola_unit_log_alpha[adapter_name] = torch.tensor(float(config.gate_rate))
            if kind == "a":
                self.jola_unit_a[adapter_name] = torch.ones(count)
            if heads is not None:
                self._heads(kind)[adapter_name] = tuple(heads)
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

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off. A forward unmerges switched-off adapters; switching on merges inactive ones again."""
        super().enable_adapters(enabled)
        self._keep_gates_frozen()
        if enabled and self._paused:
            self.merge(adapter_names=self._paused)
            self._paused = []

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Raises:
            ValueError: it is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"{self.site}: Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # not to the meta device, where the weights of an idle offloaded base layer are
        device = device or self._home()
        if device is not None:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def configs(self) -> dict[str, Any]:
        """The configurations of its adapters, by name."""
        return self.jola_config

    def _home(self) -> torch.device | None:
        base = self.get_base_layer()
        return base.device if isinstance(base, BlockOutput) else home(base)

    def keep_resident(self) -> None:
        """Move adapter parameters that accelerate has offloaded back to the device."""
        keep_resident([self._modules[name] for name in (*self.adapter_layer_names, *self.unit_names, "strength")])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JolaLayer:
        if self._kept is not None:
            self._kept.apply(fn)
        return super()._apply(fn, recurse)

    def _keep_gates_frozen(self) -> None:
        for name, config in self.jola_config.items():
            if config.freeze_gates:
                for kind in KINDS:
                    if name in self._log_alpha(kind):
                        self._log_alpha(kind)[name].requires_grad_(False)

    def keep_heads(self, adapter_name: str, kind: str, heads: list[int]) -> None:
        """Remove all heads but `heads` (indices among all heads; whole groups) from one edit of an adapter."""
        old, shared = self.heads(kind, adapter_name), self.shared(kind, adapter_name)
        rows = [old.index(head) // shared for head in heads[::shared]]
        self._heads(kind).pop(adapter_name, None)
        if kind == "a":
            unit = self.jola_unit_a[adapter_name]
            del self.jola_unit_a[adapter_name]
            if rows:
                self.jola_unit_a[adapter_name] = unit[rows]
        for table in (self._of(kind), self._log_alpha(kind)):
            parameter = table[adapter_name]
            del table[adapter_name]
            if rows:
                kept = parameter.detach()[rows].clone()
                table[adapter_name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        if rows:
            self._heads(kind)[adapter_name] = tuple(heads)
        elif not any(adapter_name in self._of(other) for other in KINDS):
            del self.jola_unit_log_alpha[adapter_name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # state dicts saved before units existed have units of 1
        for unit, names in (
            ("jola_unit_a", ("jola_a",)),
            ("jola_unit_log_alpha", ("jola_log_alpha_m", "jola_log_alpha_a")),
        ):
            for adapter_name, buffer in getattr(self, unit).items():
                saved = [state_dict.get(f"{prefix}{name}.{adapter_name}") for name in names]
                for value in saved:
                    if value is not None:
                        ones = torch.ones(buffer.shape, dtype=buffer.dtype, device=value.device)
                        state_dict.setdefault(f"{prefix}{unit}.{adapter_name}", ones)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _of(self, kind: str) -> nn.ParameterDict:
        return self.jola_m if kind == "m" else self.jola_a

    def _log_alpha(self, kind: str) -> nn.ParameterDict:
        return self.jola_log_alpha_m if kind == "m" else self.jola_log_alpha_a

    def _heads(self, kind: str) -> dict[str, tuple[int, ...]]:
        return self.jola_heads_m if kind == "m" else self.jola_heads_a

    def heads(self, kind: str, adapter_name: str) -> tuple[int, ...]:
        """The edited heads of an adapter, in the order of its parameters' rows."""
        return self._heads(kind).get(adapter_name, tuple(range(self.num_heads)))

    def shared(self, kind: str, adapter_name: str) -> int:
        """The number of consecutive heads that share a row of an adapter's parameters."""
        return self.jola_config[adapter_name].shared(kind, self.num_heads, self.num_kv_heads)

    def row_sizes(self, adapter_name: str, sizes: Tensor) -> Tensor:
        """The RMS for each row of an adapter's a, from the RMS of every head's output, (num_heads,)."""
        edited = sizes[list(self.heads("a", adapter_name))]
        return edited.view(-1, self.shared("a", adapter_name)).square().mean(-1).sqrt()

    def vectors(self, kind: str, adapter_name: str) -> Tensor:
        """The m or a of an adapter's edited heads, (heads, head_dim)."""
        value = self._of(kind)[adapter_name]
        if kind == "a":
            value = value * self.jola_unit_a[adapter_name].unsqueeze(-1)
        return self._by_head(value, adapter_name, kind, 0)

    def log_alpha(self, kind: str, adapter_name: str) -> Tensor:
        """log alpha of the gates of an adapter's m or a, (heads,)."""
        stored = self._log_alpha(kind)[adapter_name] * self.jola_unit_log_alpha[adapter_name]
        return self._by_head(stored, adapter_name, kind, 0)

    def _by_head(self, rows: Tensor, adapter_name: str, kind: str, dim: int) -> Tensor:
        shared = self.shared(kind, adapter_name)
        return rows if shared == 1 else rows.repeat_interleave(shared, dim)

    # ---- attributes of the projection ----

    @property
    def weight(self) -> Tensor:
        """The projection's weight. Using it without calling this layer raises an error while an adapter is active."""
        if self._edits():
            note_read(self)
        return super().weight

    @property
    def bias(self) -> Tensor:
        """The projection's bias, None if it has none; checked as `weight` is."""
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
        """Check, in each call of `block`, the module around this layer, that it does not use the weight directly."""
        self._watches += watch(block, self)

    def stand_beside(self, block: nn.Module) -> None:
        """Add this layer to `block` as a child that edits the block's output."""
        block.add_module(BLOCK_OUTPUT, self)
        # first, so that other hooks (transformers' for `output_hidden_states`) get what the next block gets
        self._watches.append(block.register_forward_hook(partial(_through, self), prepend=True))

    def leave(self, block: nn.Module) -> None:
        """Remove this layer from `block`."""
        self.unwatch()
        del block._modules[BLOCK_OUTPUT]

    def on_edited(self, function: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `function` with the z (..., heads * head_dim) of each forward, until the handle is removed.

        Raises:
            ValueError: the layer is merged into the projection whose output it edits, so there is no z.
        """
        if self.edits != "mlp":
            return self.register_forward_pre_hook(lambda _, inputs: function(inputs[0]))
        if self.merged:
            raise ValueError(
                f"{self.site}: reading what is edited needs unmerged adapters, got {self.merged_adapters} merged"
            )
        return self.base_layer.register_forward_hook(lambda _, inputs, output: function(output))

    def unwatch(self) -> None:
        """Remove all checks added by `watch`, and the edit of a block."""
        for handle in self._watches:
            handle.remove()
        self._watches.clear()

    def _edits(self) -> bool:
        active = any(name in self.jola_config for name in self.active_adapters)
        return active and not self.disable_adapters and not self.merged

    # ---- the edit ----

    def gates(self, adapter_name: str, *, training: bool | None = None, rows: int | None = None) -> dict[str, Tensor]:
        """The gates of an adapter's edited heads: a dict from "m" and "a" to (heads,), or (rows, heads) if sampled per row."""
        config = self.jola_config[adapter_name]
        log_alpha = {kind: self._log_alpha(kind)[adapter_name] for kind in KINDS if adapter_name in self._of(kind)}
        if not log_alpha:
            return {}
        if training is None:
            training = self.training and not config.freeze_gates
        flat = torch.cat(list(log_alpha.values())) * self.jola_unit_log_alpha[adapter_name]
        if training and rows is not None and config.gate_sampling == "row":
            flat = flat.expand(rows, -1)
        gates = hard_concrete(
            flat,
            training=training,
            temperature=config.temperature,
            stretch=config.stretch,
            estimator=config.gate_estimator,
        )
        parts = gates.split([value.shape[0] for value in log_alpha.values()], dim=-1)
        return {kind: self._by_head(part, adapter_name, kind, -1) for kind, part in zip(log_alpha, parts)}

    def _spread(self, value: Tensor, adapter_name: str, kind: str, dim: int) -> Tensor:
        """Scatter the rows of the edited heads into a tensor of all heads, zero elsewhere."""
        if adapter_name not in self._heads(kind):
            return value
        lengths, gaps = _runs(self._heads(kind)[adapter_name], self.num_heads)
        shape = list(value.shape)
        shape[dim] = max(gaps)
        zeros = value.new_zeros(shape)
        pieces = [zeros.narrow(dim, 0, gaps[0])]
        for piece, gap in zip(value.split(lengths, dim), gaps[1:]):
            pieces += [piece, zeros.narrow(dim, 0, gap)]
        return torch.cat(pieces, dim)

    def _operands(
        self, adapter_name: str, gates: dict[str, Tensor], like: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The m and a of all heads and their gates times the strength, as arguments of `head_edit`; converted to match `like`."""
        vectors = {kind: self._spread(self.vectors(kind, adapter_name), adapter_name, kind, 0) for kind in gates}
        gates = {kind: self._spread(gate, adapter_name, kind, -1) for kind, gate in gates.items()}
        if adapter_name in self.strength:
            gates = {kind: gate * self.strength[adapter_name] for kind, gate in gates.items()}
        if like is not None:
            vectors = {kind: value.to(like) for kind, value in vectors.items()}
            gates = {kind: gate.to(like) for kind, gate in gates.items()}
        if self.jola_config[adapter_name].additive == "kv_group" and len(gates) == 2:
            vectors["a"] = vectors["a"] * (1 + vectors["m"] * gates["m"].unsqueeze(-1))  # a is added before scaling
        return vectors, gates

    def folded_edit(self, adapter_name: str) -> dict[str, Tensor]:
        """g_m * m under "m" and g_a * a under "a", (heads, head_dim), with the deterministic gates."""
        vectors, gates = self._operands(adapter_name, self.gates(adapter_name, training=False))
        return {kind: vectors[kind] * gate.unsqueeze(-1) for kind, gate in gates.items()}

    def edit(self, z: Tensor, adapter_name: str) -> Tensor:
        """Apply one adapter's edit to `z` (..., heads * head_dim); under tensor parallelism, to the local heads."""
        gates = self.gates(adapter_name, rows=z.shape[0])
        if not gates:
            return z
        vectors, gates = self._operands(adapter_name, gates)
        local = z.shape[-1] // self.head_dim
        if local != self.num_heads:
            vectors = {kind: local_heads(value, self, local, -2) for kind, value in vectors.items()}
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

    def single_edit(self, heads: int, size: int) -> Edits | None:
        """Return (m, a, g_m, g_a) for a function that applies the edit and more; None where this layer has to apply it alone."""
        if self._why_not_single(heads, size) is not None:
            return None
        name = self._active_names()[0]
        vectors, gates = self._operands(name, self.gates(name))
        return vectors.get("m"), vectors.get("a"), gates.get("m"), gates.get("a")

    def _active_names(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.jola_config]

    def _why_not_single(self, heads: int, size: int) -> str | None:
        """Why the edit of ``heads`` heads of this size is not that of one adapter for all rows, or None."""
        names = self._active_names()
        if self.disable_adapters or self.merged or not names:
            return "no unmerged adapter is active"
        if len(names) > 1:
            return f"several adapters are active: {', '.join(names)}"
        if self._forward_pre_hooks:
            return "a hook, such as a monitor's, is on the layer"
        config = self.jola_config[names[0]]
        if self.training and not config.freeze_gates and config.gate_sampling == "row":
            return "gates are sampled for each row"
        if (heads, size) != (self.num_heads, self.head_dim):
            return f"the input has {heads} heads of {size}, of {self.num_heads} of {self.head_dim}"
        if not any(names[0] in self._of(kind) for kind in KINDS):
            return f"the adapter {names[0]} edits no head here"
        return None

    def _why_apart(self, z: Tensor) -> str | None:
        """Why the edit of ``z`` cannot be in the projection's weights, or None."""
        base: Any = self.base_layer
        if self.edits != "head":
            return f"the edit is of the {'projection' if self.edits == 'mlp' else 'block'}'s output"
        if not isinstance(base, nn.Linear):
            return f"the projection is a {type(base).__name__}"
        if not is_layer(base):
            return f"the projection is not a plain linear layer: {why_not(base)}"
        return self._why_not_single(z.shape[-1] // self.head_dim, self.head_dim)

    def _features(self) -> tuple[bool, bool]:
        """Whether the active adapter has an m, and whether a parameter of it needs a gradient."""
        name = self._active_names()[0]
        parameters = [
            table[name] for kind in KINDS for table in (self._of(kind), self._log_alpha(kind)) if name in table
        ]
        return name in self.jola_m, any(parameter.requires_grad for parameter in parameters)

    def explain(self, z: Tensor) -> str:
        """Says whether a call with the input ``z`` would edit it in a pass of its own or in the projection's weights, and why.

        Examples:
            >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
            >>> layer = next(module for module in model.modules() if isinstance(module, JolaLayer))
            >>> print(layer.explain(torch.randn(1, 5, layer.in_features)))
            model.layers.0.self_attn.o_proj: in a pass over its input: ...
        """
        base: Any = self.base_layer
        reason = self._why_apart(z)
        if reason is not None:
            return f"{self.site}: by itself: {reason}"
        return f"{self.site}: {cost_model.explain(z, base.weight, base.bias, *self._features())}"

    def _in_weights(self, z: Tensor) -> Tensor | None:
        """The projection of ``z`` with the edit in the weights; None where that is not possible or does not pay."""
        base: Any = self.base_layer
        if z.device.type not in cost_model.LAUNCH:  # spares calls on a CPU the other checks
            return None
        if self._why_apart(z) is not None:
            return None
        weight, bias = base.weight, base.bias
        if cost_model.choose(z, weight, bias, *self._features()) != cost_model.FOLDED:
            return None
        edit = self.single_edit(self.num_heads, self.head_dim)
        return None if edit is None else head_edit_linear(z, weight, bias, edit)

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
            edit = self.folded_edit(name)
            for kind in KINDS:
                value = edit.get(kind)
                if value is None:
                    value = torch.zeros(self.num_heads, self.head_dim, device=z.device)
                operands[kind].append(value if local == self.num_heads else local_heads(value, self, local, 0))
        if not used:
            return z
        stacks = {kind: torch.stack([torch.zeros_like(parts[0]), *parts]) for kind, parts in operands.items()}
        rows = [used.index(name) + 1 if name in used else 0 for name in adapter_names]
        index = torch.tensor(rows, device=z.device).repeat_interleave(z.shape[0] // len(rows))
        return head_edit(z, stacks["m"], stacks["a"], head_dim=self.head_dim, index=index)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Edit the heads in `x` (..., heads * head_dim) and project; of an MLP, project and edit."""
        note_call(self)
        adapter_names = kwargs.pop("adapter_names", None)
        self.keep_resident()
        if take_edit(self):
            return self.base_layer(x, *args, **kwargs)
        self._prepare(adapter_names)
        if self.edits == "mlp":
            return self._edited(self.base_layer(x, *args, **kwargs), adapter_names)
        if adapter_names is None and not args and not kwargs:
            y = self._in_weights(x)
            if y is not None:
                return y
        return self.base_layer(self._edited(x, adapter_names), *args, **kwargs)

    def _prepare(self, adapter_names: list[str] | None) -> None:
        """Unmerge if adapters are disabled; refuse what cannot be computed while others are merged."""
        if self.disable_adapters:
            if self.merged:
                if set(self.merged_adapters) != {name for name in self.active_adapters if name in self.jola_config}:
                    self._paused = self._merged_names()
                self.unmerge()
        elif adapter_names is not None:
            if self.merged:
                raise merged_in_batch(self.site, self.merged_adapters)
        elif self.merged and isinstance(self.base_layer, BaseTunerLayer):
            for layer in self._below():
                refuse_live(layer, [], "merged JolaLayer")

    def _edited(self, z: Tensor, adapter_names: list[str] | None) -> Tensor:
        """z with the edits that are in force."""
        if self.disable_adapters:
            return z
        if adapter_names is not None:
            return self._edit_mixed(z, list(adapter_names))
        if not self.merged:
            for name in self.active_adapters:
                if name in self.jola_config:
                    z = self.edit(z, name)
        return z

    # ---- merging ----

    @torch.no_grad()
    def factors(self, adapter_names: list[str]) -> tuple[Tensor, Tensor]:
        """Return p and q, both (heads * head_dim,), such that `p*z + q` applies the adapters in order; gates deterministic."""
        like = getattr(self.get_base_layer(), "weight", next(self.parameters(), torch.zeros(())))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        p = torch.ones(self.num_heads, self.head_dim, dtype=dtype, device=self._home() or like.device)
        q = torch.zeros_like(p)
        for name in adapter_names:
            vectors, gates = self._operands(name, self.gates(name, training=False), like=p)
            scale = 1 + vectors["m"] * gates["m"].unsqueeze(-1) if "m" in gates else torch.ones_like(p)
            p, q = p * scale, q * scale
            if "a" in gates:
                q = q + vectors["a"] * gates["a"].unsqueeze(-1)
        return p.flatten(), q.flatten()

    @torch.no_grad()
    def offsets(self, adapter_names: list[str]) -> Tensor:
        """Return b, (num_kv_heads, head_dim) in float64, such that `p*(z + b)` applies the adapters, p as in `factors`.

        Attention weights sum to 1, so b can be added to the values instead.

        Raises:
            ValueError: there is no such b: a head is scaled by 0 and has an offset, or heads that share values have
                different offsets.
        """
        base: Any = self.get_base_layer()
        p = torch.ones(self.num_heads, self.head_dim, dtype=torch.float64, device=home(base) or base.weight.device)
        b = torch.zeros_like(p)
        for name in adapter_names:
            vectors, gates = self._operands(name, self.gates(name, training=False), like=p)
            scale = 1 + vectors["m"] * gates["m"].unsqueeze(-1) if "m" in gates else torch.ones_like(p)
            if "a" in gates:
                added = self._spread(self.vectors("a", name), name, "a", 0).to(p) * gates["a"].unsqueeze(-1)
                before = p if self.jola_config[name].additive == "kv_group" else p * scale
                b = b + torch.where(added == 0, 0, added / before)
            p = p * scale
        return self._of_values(b)

    def _of_values(self, b: Tensor) -> Tensor:
        """Reduce offsets per head to offsets per value head."""
        zero = (~b.isfinite()).nonzero().tolist()
        if zero:
            raise ValueError(
                f"{self.site}: head {zero[0][0]} is scaled by 0 in dimension {zero[0][1]} and something is added there, "
                "which no offset of its values can do"
            )
        if self.num_kv_heads is None:
            raise ValueError(f"{self.site}: no projection of values was found beside it")
        groups = b.view(self.num_kv_heads, -1, self.head_dim)
        # a bias in the projection's dtype cannot represent smaller differences
        weight: Any = self.get_base_layer().weight
        eps = torch.finfo(weight.dtype if weight.is_floating_point() else torch.float32).eps
        if bool((groups - groups[:, :1]).abs().amax() > eps * groups.abs().amax()):
            raise ValueError(
                f"{self.site}: {groups.shape[1]} heads share values, and their offsets differ; train with "
                "additive='kv_group' to have one offset for all"
            )
        return groups[:, 0]

    def check_merge(self, adapter_names: list[str] | None = None) -> list[str]:
        """Check that adapters can be merged, without merging them.

        Returns:
            the names, among `adapter_names` or the active ones, that would be merged.

        Raises:
            ValueError: the layer edits a block's output, the projection is sharded or quantised in an unsupported way, or
                an active adapter below this layer would stay unmerged.
        """
        names = to_merge(self, adapter_names)
        if names and self.edits == "block":
            raise ValueError(
                f"{self.site}: cannot merge the adapters {names}, which edit a block's output: that is the sum of its layers "
                "and of its input, and no weight makes the sum. Keep the adapter, or train one with site='mlp'"
            )
        if names:
            quantised = packing(self.get_base_layer(), self.site).quantised
            for layer in self._below():
                refuse_live(layer, adapter_names, "JolaLayer")
                if quantised and to_merge(layer, adapter_names):
                    raise ValueError(
                        f"{self.site}: cannot merge a JolaLayer over a {type(layer).__name__} into a quantised projection, "
                        "which would be quantised twice; load the base model without quantisation and merge there"
                    )
        return names

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, additive: bool = True) -> None:
        """Fold adapters into the projection: `W <- W diag(p)`, `b <- b + W q`, computed in fp32 or wider.

        Edits of the projection's output instead give `W <- diag(p) W`, `b <- p*b + q`.

        Adapters of other methods below this layer are merged first. The original parameters are replaced and kept for
        `unmerge` (cast and moved with the layer); a weight tied to another module is untied. A bias is created only if q
        is not zero. Merging more adapters later restarts from the original parameters. With `additive=False`, q is
        left out, for a caller that adds `offsets` to the values. A quantised weight is requantised in the same format
        unless p is 1; `merge_error` is the relative error of that.

        Raises:
            ValueError: the projection is sharded or quantised in an unsupported way, an active adapter below this layer
                would stay unmerged, or `safe_merge` found a non-finite value. Nothing is changed then.
        """
        names = self.check_merge(adapter_names)
        if self.merged:
            check_adapters_to_merge(self, adapter_names)  # for peft's warning
        if not names:
            return
        before, jola = self._merged_names(), list(self.merged_adapters)
        wanted = None if adapter_names is None else [*before, *adapter_names]
        if self.merged:
            self.unmerge()
        try:
            self._fold([*jola, *names], wanted, safe_merge, additive)
        except BaseException:
            if jola:
                self._fold(jola, before, False)
            raise

    def _fold(self, names: list[str], below: list[str] | None, safe_merge: bool, additive: bool = True) -> None:
        """Fold the adapters `below` this layer (None: the active ones), then `names`, into the original parameters."""
        base: Any = self.get_base_layer()
        layers = self._below()
        kept = Kept(base, layers)
        try:
            with fetched(base):
                if any(to_merge(layer, below) for layer in layers):
                    copied(base)  # other methods merge in place
                    layers[0].merge(safe_merge=safe_merge, adapter_names=below)
                p, q = self.factors(names)
                stored = packing(base, self.site)
                old = stored.unpack()
                q = q if additive else torch.zeros_like(q)
                weight, bias = folded(base, old, base.bias, p, q, output=self.edits == "mlp")
                if safe_merge and not all(bool(v.isfinite().all()) for v in (weight, bias) if v is not None):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: "
                        f"{self.site} would get values that are not finite"
                    )
                if not stored.quantised or bool((p != 1).any()):
                    base.weight = stored.pack(weight)
                    if stored.quantised:
                        exact = weight.double()
                        self.merge_error = float((packing(base, self.site).unpack() - exact).norm() / exact.norm())
                base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        except BaseException:
            kept.restore(base, layers)
            raise
        self._kept = kept
        self.merged_adapters[:] = names

    def _below(self) -> list[Any]:
        """Tuner layers below this one on the same projection, outermost first."""
        return list(stack(self.base_layer))

    def _merged_names(self) -> list[str]:
        """The adapters that `merge` merged, here and below."""
        below = [] if self._kept is None else self._kept.merged_since(self._below())
        return [*self.merged_adapters, *(name for names in below for name in names)]

    def has_own_bias(self) -> bool:
        """Whether the projection had a bias before merging."""
        if self._kept is not None:
            return self._kept.has_bias
        return getattr(self.get_base_layer(), "bias", None) is not None

    def unmerge(self) -> None:
        """Restore the original parameters, the same objects and bits, on the layer's current device.

        Adapters merged over this layer are unmerged first.
        """
        if self._kept is None:
            warnings.warn(f"{self.site}: nothing is merged, so there is nothing to unmerge", UserWarning, stacklevel=2)
            return
        above = self.__dict__.get("_above")
        if above is not None and above.merged and any(layer is self for layer in stack(above)):
            above.unmerge()
        self._kept.restore(self.get_base_layer(), self._below())
        self._kept = None
        self.merged_adapters.clear()

    def extra_repr(self) -> str:
        """Kind of edit, head count and head size, shown when the model is printed."""
        return f"edits={self.edits!r}, num_heads={self.num_heads}, head_dim={self.head_dim}"


def _through(layer: JolaLayer, block: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that edits a block's output."""
    return edit_hidden(layer, output, layer.site)


def edit_hidden(edit: Callable[[Tensor], Tensor], output: Any, site: str) -> Any:
    """Edit the hidden states in the output of the module `site`: the tensor, or the first element of a tuple or list."""
    if isinstance(output, Tensor):
        return edit(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)((edit(output[0]), *output[1:]))
    raise ValueError(
        f"{site}: expected an output that is a tensor or a tuple that begins with one, got {type(output).__name__}; leave "
        "the module out with exclude_modules"
    )


def _runs(heads: tuple[int, ...], count: int) -> tuple[list[int], list[int]]:
    """The lengths of the runs of consecutive `heads`, and of the gaps before, between and after the runs."""
    lengths, gaps = [1], [heads[0]]
    for left, right in pairwise(heads):
        if right == left + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
            gaps.append(right - left - 1)
    return lengths, [*gaps, count - heads[-1] - 1]


def _covered(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    """Make a tuner layer put over a JoLA layer merge that first, and be unmerged before it.

    peft merges the outermost layer first, which is correct only if every method adds to the weight.
    """
    if name == "base_layer" and isinstance(owner, BaseTunerLayer) and not isinstance(owner, JolaLayer):
        for below in stack(module):
            if isinstance(below, JolaLayer):
                owner.merge = partial(merge_from_inside, owner)  # type: ignore[method-assign]
                below.__dict__["_above"] = owner  # not as a submodule


register_module_module_registration_hook(_covered)
