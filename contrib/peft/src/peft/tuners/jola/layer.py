# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import math
import warnings
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import transpose

from .config import JolaConfig


class JolaLayer(BaseTunerLayer):
    # The vectors of the edits, (num_heads, head_dim), and the log alpha of their gates, (num_heads,)
    adapter_layer_names = ("jola_m", "jola_a", "jola_log_alpha_m", "jola_log_alpha_a")
    # The units of a, per head, and of log alpha: parameters are stored divided by these, as Adam changes every
    # parameter by about the learning rate
    other_param_names = ("jola_unit_a", "jola_unit_log_alpha", "jola_config")

    def __init__(self, base_layer: nn.Module, num_heads: int, **kwargs) -> None:
        self.base_layer = base_layer
        self.num_heads = num_heads
        self.jola_m = nn.ParameterDict({})
        self.jola_a = nn.ParameterDict({})
        self.jola_log_alpha_m = nn.ParameterDict({})
        self.jola_log_alpha_a = nn.ParameterDict({})
        self.jola_unit_a = BufferDict(persistent=True)
        self.jola_unit_log_alpha = BufferDict(persistent=True)
        self.jola_config: dict[str, JolaConfig] = {}
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []
        # The weight and bias to return to when unmerging: scaling cannot be undone exactly by dividing
        self._unmerged_weight: Optional[torch.Tensor] = None
        self._unmerged_bias: Optional[torch.Tensor] = None

        base_layer = self.get_base_layer()
        if isinstance(base_layer, nn.Linear):
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        elif isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = (
                base_layer.weight.ds_shape if hasattr(base_layer.weight, "ds_shape") else base_layer.weight.shape
            )
        else:
            raise TypeError(f"Unsupported layer type {type(base_layer)}")
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        if self.in_features % num_heads != 0:
            raise ValueError(f"An input of {self.in_features} features cannot be split into {num_heads} heads.")
        self.head_dim = self.in_features // num_heads

    def update_layer(self, adapter_name: str, config: JolaConfig, **kwargs) -> None:
        self.jola_config[adapter_name] = config
        for kind, vectors, log_alpha in self._parts():
            if config.edit not in ("both", kind):
                continue
            vectors[adapter_name] = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
            log_alpha[adapter_name] = nn.Parameter(
                torch.full((self.num_heads,), config.init_log_alpha / config.gate_rate)
            )
        if adapter_name in self.jola_a:
            self.jola_unit_a[adapter_name] = torch.ones(self.num_heads)
        self.jola_unit_log_alpha[adapter_name] = torch.tensor(float(config.gate_rate))
        self.reset_jola_parameters(adapter_name, config.init_weights)
        if config.freeze_gates:
            # a dict of this layer's own: the class has an empty default
            self.frozen_peft_weight_names = {
                **self.frozen_peft_weight_names,
                adapter_name: ("jola_log_alpha_m", "jola_log_alpha_a"),
            }
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_jola_parameters(self, adapter_name: str, init_weights: bool) -> None:
        for _, vectors, _ in self._parts():
            if adapter_name in vectors and not init_weights:
                nn.init.normal_(vectors[adapter_name], std=0.5)

    def _parts(self) -> tuple[tuple[str, nn.ParameterDict, nn.ParameterDict], ...]:
        return (
            ("multiplicative", self.jola_m, self.jola_log_alpha_m),
            ("additive", self.jola_a, self.jola_log_alpha_a),
        )

    def get_log_alphas(self, adapter_name: str) -> list[torch.Tensor]:
        """The log alphas of an adapter's gates, each (num_heads,); of m and a, as far as the adapter has them."""
        return [
            log_alpha[adapter_name] * self.jola_unit_log_alpha[adapter_name]
            for _, _, log_alpha in self._parts()
            if adapter_name in log_alpha
        ]

    def _gate(self, log_alpha: torch.Tensor, config: JolaConfig, sample: bool) -> torch.Tensor:
        if sample:
            tiny = torch.finfo(log_alpha.dtype).tiny
            noise = torch.rand_like(log_alpha).clamp_min(tiny)
            log_alpha = (torch.logit(noise) + log_alpha) / config.temperature
        low, high = config.stretch
        return (torch.sigmoid(log_alpha) * (high - low) + low).clamp(0, 1)

    def get_edit(
        self, adapter_name: str, sample: bool = False
    ) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """What an adapter multiplies its input by and then adds to it, each (in_features,), or None.

        Args:
            adapter_name (`str`):
                The name of the adapter.
            sample (`bool`):
                Whether to sample the gates, as in training, instead of using the deterministic ones.
        """
        config = self.jola_config[adapter_name]
        sample = sample and not config.freeze_gates
        gates = iter(self._gate(value, config, sample) for value in self.get_log_alphas(adapter_name))
        scale = shift = None
        if adapter_name in self.jola_m:
            scale = (1 + next(gates).unsqueeze(-1) * self.jola_m[adapter_name]).flatten()
        if adapter_name in self.jola_a:
            unit = next(gates) * self.jola_unit_a[adapter_name]
            shift = (unit.unsqueeze(-1) * self.jola_a[adapter_name]).flatten()
        return scale, shift


class Linear(nn.Module, JolaLayer):
    # JoLA implemented in a dense layer
    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: JolaConfig,
        num_heads: int,
        **kwargs,
    ) -> None:
        super().__init__()
        JolaLayer.__init__(self, base_layer, num_heads)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Merge the active adapter weights into the base weights

        Args:
            safe_merge (`bool`, *optional*):
                If True, it is checked before merging that the merged weights are finite. Defaults to `False`.
            adapter_names (`List[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged. Defaults
                to `None`.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in adapter_names or [] if name in self.jola_config]
        if not adapter_names:
            # no adapter to merge
            return

        base_layer = self.get_base_layer()
        if self.merged:
            weight, bias = self._unmerged_weight, self._unmerged_bias
        else:
            weight = base_layer.weight.data
            bias = None if base_layer.bias is None else base_layer.bias.data
        # edits do not commute: the adapters that are merged already are folded in again, before the new ones
        names = [*self.merged_adapters, *adapter_names]
        merged_weight, merged_bias = self._folded(weight, bias, names)
        if safe_merge and not all(
            torch.isfinite(value).all() for value in (merged_weight, merged_bias) if value is not None
        ):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )

        self._unmerged_weight, self._unmerged_bias = weight, bias
        self._set_base_parameters(merged_weight, merged_bias)
        self.merged_adapters = names

    def _folded(
        self, weight: torch.Tensor, bias: Optional[torch.Tensor], names: list[str]
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The weight and bias that do what the adapters and then `weight` and `bias` do: W diag(p), b + W q."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        p = torch.ones(self.in_features, dtype=dtype, device=weight.device)
        q = torch.zeros_like(p)
        has_shift = False
        for name in names:
            scale, shift = (None if value is None else value.detach().to(p) for value in self.get_edit(name))
            if scale is not None:
                p, q = p * scale, q * scale
            if shift is not None:
                q, has_shift = q + shift, True
        exact = transpose(weight.to(dtype), self.fan_in_fan_out)  # (out_features, in_features)
        merged_weight = transpose(exact * p, self.fan_in_fan_out).to(weight.dtype).contiguous()
        if not has_shift:
            return merged_weight, bias
        added = exact @ q
        if bias is None:
            return merged_weight, added.to(weight.dtype)
        return merged_weight, (bias.to(dtype) + added).to(bias.dtype)

    def _set_base_parameters(self, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> None:
        base_layer = self.get_base_layer()
        base_layer.weight.data = weight
        if bias is None:
            base_layer.bias = None
        elif base_layer.bias is None:
            base_layer.bias = nn.Parameter(bias, requires_grad=False)
        else:
            base_layer.bias.data = bias

    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return

        like = self.get_base_layer().weight  # the layer may have been moved since
        bias = self._unmerged_bias
        self._set_base_parameters(self._unmerged_weight.to(like), None if bias is None else bias.to(like))
        self._unmerged_weight = self._unmerged_bias = None
        self.merged_adapters = []

    def _check_forward_args(self, x, *args, **kwargs):
        """Check if the arguments are compatible with the configs and state of the model"""
        adapter_names = kwargs.get("adapter_names", None)
        if adapter_names is None:
            return

        if len(x) != len(adapter_names):
            msg = (
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
            raise ValueError(msg)

        if self.merged:
            # It is unclear what would be the right thing to do if users pass adapter_names and there are merged
            # adapters. Therefore, it is better to raise an error in this case.
            msg = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            raise ValueError(msg)

    def _edited(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        scale, shift = self.get_edit(adapter_name, sample=self.training)
        if scale is not None:
            x = x * scale
        if shift is not None:
            x = x + shift
        return x

    def _mixed_batch_edited(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        # This handles the case when users pass the argument `adapter_names`. This is an extra argument that allows
        # mixing different adapters in the same batch at inference time.
        result = x.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.jola_config:  # not "__base__", nor an adapter of other layers
                rows = [index for index, item in enumerate(adapter_names) if item == name]
                result[rows] = self._edited(x[rows], name).to(x.dtype)
        return result

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)

        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            x = self._mixed_batch_edited(x, adapter_names)
        elif not self.merged:
            dtype = x.dtype
            for active_adapter in self.active_adapters:
                if active_adapter in self.jola_config:
                    x = self._edited(x, active_adapter)
            x = x.to(dtype)
        return self.base_layer(x, *args, **kwargs)

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "jola." + rep


def expected_l0(log_alpha: torch.Tensor, config: JolaConfig) -> torch.Tensor:
    """The probability that a gate of the training is not zero."""
    low, high = config.stretch
    return torch.sigmoid(log_alpha - config.temperature * math.log(-low / high))
