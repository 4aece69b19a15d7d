"""Import of checkpoints of the official code of JoLA and trainable Curvature Tuning."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import safetensors_names
from .curvature.layer import CurvatureLayer
from .curvature.published import NAME, curvature_copies
from .jola.gates import named_adapters
from .jola.model import jola_layers

_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(attn_A|attn_v|log_g1|log_g2)(?:\.(\d+))?$")


def _from_file(path: Path, wanted: re.Pattern[str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    names = [name for name in safetensors_names(path) if wanted.search(name)]
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor], wanted: re.Pattern[str]) -> dict[str, Tensor]:
    """Reads only the tensors of the method from a state dict, a safetensors file, or a folder of them."""
    if isinstance(source, Mapping):
        return {name: value for name, value in source.items() if wanted.search(name)}
    path = Path(source)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            files = [path / shard for shard in sorted(shards)]
        else:
            files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path}: expected safetensors files, found none (pickled checkpoints are not loaded)")
        return {name: value for file in files for name, value in _from_file(file, wanted).items()}
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file, got {path.suffix!r} (pickled files are not loaded)")
    return _from_file(path, wanted)


@torch.no_grad()
def load_official(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor], adapter: str | None = None
) -> None:
    """Copies the parameters of an official checkpoint into a JoLA or a curvature adapter of `model`.

    JoLA: the official code has a tensor per head: `layers.N.self_attn.attn_A.H` is m, `attn_v.H` is a, `log_g2` (heads, 1)
    gates m and `log_g1` gates a. Its test-time gate is the "clip" estimator. The adapter's units become 1.

    Curvature Tuning: `<module>._raw_beta` and `._raw_coeff`, in a state dict of the whole model. The head and the BatchNorm
    statistics, which the official code trains too, are not read: use `load_state_dict`. The official unit adds 1e-6 to
    1 - beta, this one does not.

    Args:
        model: a Llama- or Qwen2-like model with a JoLA adapter on all heads of the layers to fill, or a model with a
            curvature adapter (per channel) on the sites to fill. A joint adapter receives the tensors of both.
        source: a state dict, a safetensors file, or a folder with safetensors files.
        adapter: name of the adapter; None is the active one.

    Raises:
        ValueError: no such tensors, layers or heads that do not match, wrong shapes, or a pickled file. Nothing is
            changed.

    Examples:
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
        >>> load_official(model, "official_checkpoint")
    """
    copies: list[tuple[Tensor, Tensor]] = []
    units = any(isinstance(module, CurvatureLayer) for module in model.modules())
    jola = any(True for _ in jola_layers(model))
    tensors = _read(source, NAME) if units else {}
    if tensors:
        copies += curvature_copies(model, tensors, adapter)
    elif units and not jola:
        raise ValueError("expected tensors named <module>._raw_beta and <module>._raw_coeff; got none")
    edits = _read(source, _NAME) if jola or not units else {}
    if edits or not copies:
        copies += _jola_copies(model, edits, adapter)
    for target, value in copies:
        target.copy_(value.to(target))


def _jola_copies(model: nn.Module, tensors: dict[str, Tensor], adapter: str | None) -> list[tuple[Tensor, Tensor]]:
    if not tensors:
        raise ValueError("expected tensors named layers.N.self_attn.attn_A, attn_v, log_g1, log_g2; got none")
    by_layer: dict[tuple[int, str], dict[int, Tensor]] = {}
    for name, value in tensors.items():
        match = _NAME.search(name)
        if match:
            layer_index, part, head = match.groups()
            by_layer.setdefault((int(layer_index), part), {})[int(head or 0)] = value
    (name,) = named_adapters(model, adapter)[:1]
    copies: list[tuple[Tensor, Tensor]] = []
    filled: set[int] = set()
    for layer in jola_layers(model):
        if name not in layer.jola_config:
            continue
        if layer.edits != "head":
            raise ValueError(f"{layer.site}: the checkpoint edits heads, and adapter {name!r} has site={layer.edits!r}")
        index: Any = layer.jola_config[name].layer_index(layer.site)
        filled.add(index)
        for part, table, shape in (
            ("attn_A", layer.jola_m, (layer.num_heads, layer.head_dim)),
            ("attn_v", layer.jola_a, (layer.num_heads, layer.head_dim)),
            ("log_g2", layer.jola_log_alpha_m, (layer.num_heads,)),
            ("log_g1", layer.jola_log_alpha_a, (layer.num_heads,)),
        ):
            pieces = by_layer.get((index, part), {})
            if sorted(pieces) != list(range(shape[0] if part.startswith("attn_") else 1)):
                raise ValueError(f"{layer.site}: expected {part} of {shape[0]} heads, got {len(pieces)} tensors")
            ordered = [pieces[head].flatten() for head in sorted(pieces)]
            if any(piece.shape != ordered[0].shape for piece in ordered):
                raise ValueError(f"{layer.site}: expected {part} of equal shapes, got {[p.shape[0] for p in ordered]}")
            value = torch.stack(ordered).reshape(-1, ordered[0].shape[0]) if len(shape) == 2 else ordered[0]
            target = dict(table).get(name)
            if target is None or tuple(value.shape) != shape or target.shape != value.shape:
                expected = None if target is None else tuple(target.shape)
                raise ValueError(f"{layer.site}: expected {part} of shape {expected}, got {tuple(value.shape)}")
            copies.append((target, value))
        for unit in (layer.jola_unit_a[name], layer.jola_unit_log_alpha[name]):
            copies.append((unit, torch.ones_like(unit)))
    missing = sorted({index for index, _ in by_layer} - filled)
    if missing:
        raise ValueError(f"the checkpoint edits layers {missing}, which adapter {name!r} does not")
    return copies
