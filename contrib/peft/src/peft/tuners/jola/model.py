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

import warnings
from contextlib import contextmanager
from functools import partial
from typing import Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_JOLA_TARGET_MODULES_MAPPING

from .config import JolaConfig
from .layer import JolaLayer, Linear, expected_l0


def _adapter_names_pre_forward_hook(target, args, kwargs, adapter_names):
    # pre-forward hook to inject the adapter_names argument when using mixed adapter batches inference
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


class JolaModel(BaseTuner):
    """
    Edits the outputs of a pretrained model's attention heads, with gates that choose the heads to edit. The method is
    described in detail in https://huggingface.co/papers/2502.01179.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`JolaConfig`]): The configuration of the JoLA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The JoLA model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import JolaConfig, get_peft_model

        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
        >>> model = get_peft_model(model, JolaConfig(task_type="CAUSAL_LM"))
        >>> loss = model(**batch).loss + 0.1 * model.base_model.get_l0_penalty()
        ```

    **Attributes**:
        - **model** ([`torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`JolaConfig`]): The configuration of the JoLA model.
    """

    prefix: str = "jola_"
    tuner_layer_cls = JolaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_JOLA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        jola_config: JolaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, JolaLayer):
            if jola_config.head_dim not in (None, target.head_dim):
                raise ValueError(
                    f"{current_key} has heads of size {target.head_dim} for another adapter, got `head_dim` "
                    f"{jola_config.head_dim}."
                )
            target.update_layer(adapter_name, config=jola_config)
            return

        new_module = self._create_new_module(jola_config, adapter_name, target, parent, current_key)
        new_module.train(target.training)  # gates are sampled in training
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _create_new_module(self, jola_config, adapter_name, target, parent, current_key):
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base_layer, (nn.Linear, Conv1D)):
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` and `Conv1D` are supported."
            )
        in_features = base_layer.weight.shape[0] if isinstance(base_layer, Conv1D) else base_layer.in_features
        num_heads = self._get_num_heads(jola_config, parent, in_features, current_key)
        return Linear(target, adapter_name, config=jola_config, num_heads=num_heads)

    def _get_num_heads(self, config: JolaConfig, parent: nn.Module, in_features: int, current_key: str) -> int:
        if config.head_dim is not None:
            num_heads, remainder = divmod(in_features, config.head_dim)
            if remainder or not num_heads:
                raise ValueError(
                    f"`head_dim` {config.head_dim} does not divide the {in_features} input features of {current_key}."
                )
            return num_heads
        model_config = getattr(self.model, "config", None)
        if hasattr(model_config, "get_text_config"):
            model_config = model_config.get_text_config()
        for owner in (parent, model_config):
            for name in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
                num_heads = getattr(owner, name, None)
                if isinstance(num_heads, int) and num_heads > 0:
                    if in_features % num_heads:
                        raise ValueError(
                            f"The {in_features} input features of {current_key} cannot be split into {num_heads} heads; "
                            "please specify `head_dim` in `peft_config`."
                        )
                    return num_heads
        warnings.warn(
            f"Neither the attention around {current_key} nor the model's config declares a number of heads; its input "
            "is edited as one head. To split it, specify `head_dim` in `peft_config`."
        )
        return 1

    def get_l0_penalty(self, adapter_name: Optional[str] = None) -> torch.Tensor:
        """
        The mean probability of a gate not to be zero, to be added to the loss with a weight: it closes the gates of
        heads whose edits do not help.

        Args:
            adapter_name (`Optional[str]`):
                The name of the adapter. If this is not specified, the active adapters are taken.
        """
        names = self.active_adapters if adapter_name is None else [adapter_name]
        probabilities = [
            expected_l0(log_alpha, module.jola_config[name])
            for module in self.model.modules()
            if isinstance(module, JolaLayer)
            for name in names
            if name in module.jola_config
            for log_alpha in module.get_log_alphas(name)
        ]
        if not probabilities:
            raise ValueError(f"No JoLA layer has an adapter named {' or '.join(map(repr, names))}.")
        device = probabilities[0].device  # layers may be on several devices
        return torch.cat([probability.to(device) for probability in probabilities]).mean()

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs):
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, JolaLayer)}
        unbiased = [name for name, layer in layers.items() if not layer.merged and layer.get_base_layer().bias is None]
        unbiased += [name for name, layer in layers.items() if layer.merged and layer._unmerged_bias is None]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        created = [name for name in unbiased if merge and model.get_submodule(name).bias is not None]
        if created and hasattr(model, "save_pretrained"):
            warnings.warn(
                f"Merging has added a bias to {len(created)} layers that had none, such as {created[0]}. If the model's "
                "architecture has no such bias, it is lost when the merged model is saved and loaded again: keep the "
                "adapter, or train one with `edit='multiplicative'`."
            )
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # If adapter_names is passed as an argument, we inject it into the forward arguments.
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            # nothing to do
            yield
            return

        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")

        # Check that users only passed actually existing adapters.
        # Note: We cannot do this on the layer level, as each individual layer may not have each adapter. Still, we want
        # to check that there is at least one layer with the given name, or else something like typos can easily slip.
        layers = [module for module in self.modules() if isinstance(module, JolaLayer)]
        expected_adapters = {name for layer in layers for name in layer.jola_config}
        unique_adapters = {name for name in adapter_names if name != "__base__"}
        unexpected_adapters = unique_adapters - expected_adapters
        if unexpected_adapters:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected_adapters))}")

        hook_handles = []
        for layer in layers:
            pre_forward = partial(_adapter_names_pre_forward_hook, adapter_names=adapter_names)
            hook_handles.append(layer.register_forward_pre_hook(pre_forward, with_kwargs=True))
        try:
            yield
        finally:
            for handle in hook_handles:
                handle.remove()
