"""Saving a JoLA adapter as a LoRA adapter, for runtimes that serve LoRA only."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._files import WEIGHTS, replacing_folder
from .._offload import fetched
from .gates import named_adapters
from .layer import JolaLayer
from .model import jola_layers
from .packing import packing


@torch.no_grad()
def save_as_lora(model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None) -> LoraConfig:
    """Save a JoLA adapter as a LoRA adapter that computes the same in evaluation, up to rounding.

    The multiplicative edit adds `W diag(g_m*m)` to the projection's weight W. The columns of closed heads are zero there,
    so this is `B A` with B the columns of W for the open heads and A their `g_m*m`: the rank is the number of open heads
    times the head size. The additive edit adds `W (g_a*a)` to the output, as the bias of LoRA's B (`lora_bias`). Runtimes
    without that bias need an adapter with `edit="multiplicative"`, or `save_merged`.

    Args:
        model: a model with a JoLA adapter, unmerged.
        path: folder to write to.
        adapter: its name; None takes the active one.

    Returns:
        the saved configuration.

    Raises:
        ValueError: several adapters are active and none is named, every gate is closed, the adapter is merged or edits no
            heads (`site`), a projection is sharded or quantised in an unsupported way, or there are adapters of other
            methods or modules_to_save, which would be left out.

    Examples:
        >>> config = save_as_lora(model, "lora")
        >>> model = PeftModel.from_pretrained(base, "lora")
    """
    names = named_adapters(model, adapter)
    if len(names) != 1:
        raise ValueError(f"adapter must be named where not one is active, got {names} active")
    jola_config: Any = next(
        layer.jola_config[names[0]] for layer in jola_layers(model) if names[0] in layer.jola_config
    )
    if jola_config.site != "head":
        raise ValueError(
            f"adapter: expected one with site='head', got site={jola_config.site!r}: scaling the output of a projection has its "
            "full rank; use save_merged (of an MLP), or serve the adapter itself"
        )
    _check_alone(model, jola_config)
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    transposed = False
    for layer in jola_layers(model):
        if names[0] not in layer.jola_config:
            continue
        if layer.merged:
            raise ValueError(f"{layer.site}: save_as_lora needs unmerged adapters, got {layer.merged_adapters} merged")
        down, up, bias = _matrices(layer, names[0])
        if not bool(down.any()) and not bool(bias.any()):
            continue
        transposed = transposed or type(layer.get_base_layer()).__name__ == "Conv1D"
        ranks[layer.site] = len(down)
        start = f"base_model.model.{layer.site}"
        tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
        biases[f"{start}.lora_B.bias"] = bias
    if not ranks:
        raise ValueError(f"adapter {names[0]!r}: every gate is closed, so nothing would be left; unload it instead")
    biased = any(bool(bias.any()) for bias in biases.values())
    rank = max(ranks.values())
    config = LoraConfig(
        task_type=jola_config.task_type,
        base_model_name_or_path=jola_config.base_model_name_or_path,
        r=rank,
        lora_alpha=rank,  # a factor of 1
        rank_pattern={site: own_rank for site, own_rank in ranks.items() if own_rank != rank},
        alpha_pattern={site: own_rank for site, own_rank in ranks.items() if own_rank != rank},
        target_modules=sorted(ranks),
        fan_in_fan_out=transposed,
        lora_bias=biased,
        inference_mode=True,
    )
    from safetensors.torch import save_file

    with replacing_folder(path) as folder:
        save_file(tensors | (biases if biased else {}), folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    return config


def _check_alone(model: nn.Module, config: Any) -> None:
    """Check that the model has no adapters of other methods and no saved modules."""
    tuners: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    others = [layer for layer in tuners if not isinstance(layer, JolaLayer) and layer._get_available_adapters()]
    if others:
        raise ValueError(
            f"model: expected no adapters but JoLA's, got a {type(others[0]).__name__} of another, which the LoRA adapter would "
            "leave out; save the adapters themselves"
        )
    if config.modules_to_save:
        raise ValueError(
            f"adapter: expected one without modules_to_save, which the LoRA adapter would leave out, got {config.modules_to_save}"
        )


def _matrices(layer: JolaLayer, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA's A (r, in), B (out, r) and the bias of B (out,), in float32 or wider; r is at least 1."""
    base: Any = layer.get_base_layer()
    _, q = layer.factors([name])
    vectors, gates = layer._operands(name, layer.gates(name, training=False))
    scale = (vectors["m"].to(q) * gates["m"].to(q).unsqueeze(-1)).flatten() if "m" in gates else torch.zeros_like(q)
    dims = scale.nonzero().flatten()
    if not len(dims):
        dims = dims.new_zeros(1)
    with fetched(base):
        weight = packing(base, layer.site).unpack().detach().to(q)
        weight = weight.T if type(base).__name__ == "Conv1D" else weight
        down = torch.zeros(len(dims), len(q), dtype=q.dtype, device=q.device)
        down[torch.arange(len(dims), device=q.device), dims] = scale[dims]
        return down.cpu(), weight[:, dims].cpu().contiguous(), (weight @ q).cpu()
