"""Measuring the size of each head's output, the unit in which additive edits are trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gates import named_adapters
from .layer import JolaLayer
from .model import jola_layers
from .parallel import first_head

SMALLEST = 1e-3  # smallest unit, relative to the median head's: with a smaller one, an edit could hardly change


@torch.no_grad()
def measure_units(model: nn.Module, batches: Iterable[Any], adapter: str | None = None) -> dict[str, list[float]]:
    """Set the units of a JoLA adapter's additive edits to the RMS of each head's output, measured in one pass.

    The outputs of heads differ in size by more than ten times between layers, while Adam moves every parameter by about
    the learning rate: a rate that suits most heads is too high for the small ones. With units, a step is relative to the
    head's own output. The adapter computes the same before and after (a is divided by its new unit), so this can be
    called at any time; it is useful before training. Create the optimizer anew if it has taken steps. Measuring again on
    the same batches changes nothing.

    The model runs in evaluation mode without JoLA's edits. Padding is ignored where a batch has a 2-D
    ``attention_mask``. In a distributed run every process calls this, with its own batches or the same ones; all get the
    same units. No unit is smaller than a thousandth of the median head's.

    Args:
        model: a model with a JoLA adapter, unmerged; it may be wrapped by DDP or FSDP2.
        batches: inputs as in training, a few dozen examples: mappings (passed as keywords), sequences (as arguments) or
            single tensors.
        adapter: its name; None takes the active ones.

    Returns:
        module name -> the unit of every head; empty if there are no additive edits.

    Raises:
        ValueError: no batch reached an edited layer, every output is zero, an output is not finite, or the adapter is
            merged. Nothing is changed then.

    Examples:
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
        >>> units = measure_units(model, [tokenizer(prompts[:64], padding=True, return_tensors="pt")])
    """
    names = named_adapters(model, adapter)
    for layer in jola_layers(model):
        if layer.merged:
            raise ValueError(
                f"{layer.site}: measuring units needs unmerged adapters, got {layer.merged_adapters} merged"
            )
    layers = [layer for layer in jola_layers(model) if any(name in layer.jola_a for name in names)]
    if not layers:
        return {}
    sizes = _sizes(model, layers, batches)
    by_site: dict[str, list[float]] = {}
    for layer, size in zip(layers, sizes):
        if size is None:
            continue
        by_site[layer.site] = size.tolist()
        for name in names:
            if name in layer.jola_a:
                _set_unit(layer.jola_a[name], layer.jola_unit_a[name], layer.row_sizes(name, size))
    return by_site


def has_units(model: nn.Module, adapter: str | None = None) -> bool:
    """Whether the units of an adapter's additive edits have been measured; True without such edits."""
    names = named_adapters(model, adapter)
    units = [layer.jola_unit_a[name] for layer in jola_layers(model) for name in names if name in layer.jola_a]
    return not units or any(bool((unit != 1).any()) for unit in units)


def real_tokens(mask: Any, rows: int, tokens: int, device: torch.device) -> Tensor:
    """A mask of the tokens that are not padding, (rows, tokens): a matching 2-D attention mask, else all ones."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= tokens:
        return mask[:, -tokens:].to(device, torch.bool)
    return torch.ones(rows, tokens, dtype=torch.bool, device=device)


def _set_unit(parameter: Any, unit: Tensor, size: Tensor) -> None:
    """Set `unit` to `size` and rescale the parameter so that their product stays the same."""
    before = unit.clone()
    unit.copy_(size)
    factors = (before / unit).unsqueeze(-1).expand(parameter.shape)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        factors = distribute_tensor(factors.contiguous(), parameter.device_mesh, parameter.placements)
    parameter.mul_(factors)


def _sizes(model: nn.Module, layers: list[JolaLayer], batches: Iterable[Any]) -> list[Tensor | None]:
    """The RMS of every head's output, by layer; None for a layer that no batch reached."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # the wrapper would synchronise in every call
    totals = [torch.zeros(2, layer.num_heads, dtype=torch.float64) for layer in layers]  # sums of squares, tokens
    mask: Any = None

    def accumulate(layer: JolaLayer, total: Tensor, z: Tensor) -> None:
        z = z.detach()
        heads = z.shape[-1] // layer.head_dim
        start = 0 if heads == layer.num_heads else first_head(layer, heads, layer.num_heads)[0]
        squares = z.reshape(z.shape[0], -1, heads, layer.head_dim).float().square().mean(-1)
        real = real_tokens(mask, squares.shape[0], squares.shape[1], squares.device)
        summed = squares.where(real.unsqueeze(-1), 0).sum((0, 1))  # padding can be NaN
        total[:, start : start + heads] += torch.stack([summed, real.sum().expand(heads)]).cpu()

    modes = {module: module.training for module in model.modules()}
    editing = [layer for layer in jola_layers(model) if not layer.disable_adapters]
    handles = [layer.on_edited(partial(accumulate, layer, total)) for layer, total in zip(layers, totals)]
    try:
        model.eval()
        for layer in editing:
            layer._disable_adapters = True
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for layer in editing:
            layer._disable_adapters = False
        for module, mode in modes.items():
            module.training = mode
    return _rms(layers, _over_processes(model, totals))


def _call(model: nn.Module, batch: Any) -> None:
    device = next(model.parameters()).device

    def moved(value: Any) -> Any:
        return value if device.type == "meta" or not isinstance(value, Tensor) else value.to(device)

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    else:
        model(*map(moved, batch if isinstance(batch, (list, tuple)) else [batch]))


def _over_processes(model: nn.Module, totals: list[Tensor]) -> list[Tensor]:
    """Sum over all processes; under tensor parallelism, each process has its own heads."""
    if not (dist.is_available() and dist.is_initialized()):
        return totals
    flat = torch.cat([total.flatten() for total in totals]).to(next(model.parameters()).device)
    dist.all_reduce(flat)
    parts = flat.cpu().split([total.numel() for total in totals])
    return [part.view_as(total) for part, total in zip(parts, totals)]


def _rms(layers: list[JolaLayer], totals: list[Tensor]) -> list[Tensor | None]:
    means = [total[0] / total[1] if bool(total[1].all()) else None for total in totals]
    measured = [mean for mean in means if mean is not None]
    if not measured:
        raise ValueError("batches must hold at least one token that gets to an edited layer, got none")
    for layer, mean in zip(layers, means):
        if mean is not None and not bool(mean.isfinite().all()):
            raise ValueError(
                f"{layer.site}: expected finite outputs of heads, got NaN or infinity; measure on inputs that the model "
                "can take, in a dtype wide enough for it"
            )
    sizes = torch.cat(measured).sqrt()
    if not bool(sizes.any()):
        raise ValueError("expected a model whose heads put something out, got zeros from all of them")
    unseen = [layer.site for layer, mean in zip(layers, means) if mean is None]
    if unseen:
        warnings.warn(
            f"no batch got to {unseen[0]} and {len(unseen) - 1} others: their units stay as they are",
            UserWarning,
            stacklevel=4,
        )
    smallest = SMALLEST * float(sizes[sizes > 0].median())
    return [None if mean is None else mean.sqrt().clamp_min(smallest).float() for mean in means]
