"""Blocks of a model and the last projections of their MLPs, the sites of edits of their outputs.

A block is the nearest numbered module around an attention that also contains the feed-forward layer. Its MLP is recognised
by its last projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from .sites import (
    Attention,
    SiteHeads,
    as_targets,
    declared_width,
    find_attention,
    linear_shape,
    near_misses,
    unused_sites,
    unwrapped,
)

# Suffixes of the names of the last projections of MLPs.
_MLP_OUTPUT = re.compile(
    r".*\.(down_proj|fc2|c_proj|w2|wo|Wo|lin2|linear2|linear_2|fc_out|dense_4h_to_h|output_dense|ffn_output|output\.dense)"
)
_EXPERTS = re.compile(r".*\.(shared_)?experts?")


class Block(NamedTuple):
    """A block of a model.

    Attributes:
        name: its name in the model.
        width: number of features of its output; None if unknown.
        mlp: the last projection of its MLP; None if none was recognised, and `reason` says why.
    """

    name: str
    width: int | None
    mlp: str | None
    reason: str = ""


def find_blocks(model: nn.Module) -> list[Block]:
    """Find a model's blocks and the last projection of each block's MLP by structure.

    A list with an attention block counts as a list of blocks, including blocks without attention. Blocks whose output the
    model does not use are left out (see `unused_sites`).
    """
    modules = dict(unwrapped(model))
    attentions = find_attention(model)
    lists = {name.rpartition(".")[0] for attention in attentions if (name := _around(attention, modules)) is not None}
    unused = [*unused_sites(model)]
    names = [name for name in modules if name.rpartition(".")[0] in lists and name.rpartition(".")[2].isdecimal()]
    names = [name for name in names if not any(site.startswith(f"{name}.") for site in unused)]
    return [_block(model, name, attentions, modules) for name in names]


def _around(attention: Attention, modules: Mapping[str, nn.Module]) -> str | None:
    """The nearest numbered module around an attention that contains other matrices too."""
    name = attention.name.rpartition(".")[0]
    while name:
        beside = (module for key, module in _inside(name, modules) if not _belongs(key, attention))
        if name.rpartition(".")[2].isdecimal() and any(_has_matrix(module) for module in beside):
            return name
        name = name.rpartition(".")[0]
    return None


def _inside(name: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    return ((key, module) for key, module in modules.items() if key.startswith(f"{name}."))


def _belongs(name: str, attention: Attention) -> bool:
    return name in (attention.name, attention.site) or name.startswith(f"{attention.name}.")


def _has_matrix(module: nn.Module) -> bool:
    return linear_shape(module) is not None or any(p.dim() > 1 for p in module.parameters(recurse=False))


def _block(model: nn.Module, name: str, attentions: list[Attention], modules: Mapping[str, nn.Module]) -> Block:
    inner = [attention for attention in attentions if attention.name.startswith(f"{name}.")]
    shapes = [linear_shape(modules[attention.site]) for attention in inner if attention.site is not None]
    width = next((shape[1] for shape in shapes if shape is not None), None) or declared_width(model, name)
    rest = {key: m for key, m in _inside(name, modules) if not any(_belongs(key, attention) for attention in inner)}
    if any(_EXPERTS.fullmatch(key) for key in rest):
        return Block(name, width, None, "its MLP is a mixture of experts, whose output is no projection's")
    ends = [key for key in rest if _MLP_OUTPUT.fullmatch(key) and (linear_shape(rest[key]) or (0, 0))[1] == width]
    if len(ends) == 1:
        return Block(name, width, ends[0])
    several = f"several projections may end its MLP: {', '.join(ends)}"
    return Block(name, width, None, several if ends else "no projection in it was recognised as the end of an MLP")


def default_outputs(model: nn.Module, site: str) -> list[str]:
    """The targets for `target_modules=None` with `site` "mlp" or "block".

    Raises:
        ValueError: none was found.
    """
    blocks = find_blocks(model)
    names = [block.name for block in blocks] if site == "block" else [block.mlp for block in blocks if block.mlp]
    if not names:
        kind = "block (a numbered module with an attention and more in it)" if site == "block" else "MLP"
        reasons = "; ".join(dict.fromkeys(block.reason for block in blocks)) if site == "mlp" and blocks else ""
        raise ValueError(
            f"no {kind} was recognised in this {type(model).__name__}{f': {reasons}' if reasons else ''}; pass target_modules"
            f"{', or site=' + repr('block') if reasons else ''}. {near_misses(model)}"
        )
    return as_targets(model, names) if site == "mlp" else names


def block_widths(model: nn.Module) -> dict[str, int | None]:
    """The number of output features of every block."""
    return {block.name: block.width for block in find_blocks(model)}


def output_heads(
    model: nn.Module, name: str, module: nn.Module, site: str, head_dim: int | None = None, width: int | None = None
) -> SiteHeads:
    """The heads into which the output of the module `name` is split: one, or heads of size `head_dim`.

    Args:
        model: the model that contains the module.
        name: the module's name in `model`.
        module: the module itself (unwrapped).
        site: "mlp" or "block".
        head_dim: size of a head; None: all features.
        width: number of output features; None reads it from the module or the nearest config.

    Raises:
        ValueError: `site` is "mlp" and the module is not a linear projection, or its output width is unknown or not a
            multiple of `head_dim`.
    """
    shape = linear_shape(module)
    if shape is None and site == "mlp":
        raise ValueError(f"{name}: expected a linear projection (Linear or Conv1D), got {type(module).__name__}")
    width = shape[1] if shape is not None else width or declared_width(model, name) or head_dim
    if width is None:
        raise ValueError(
            f"{name}: cannot read the width of its output from the model or its config; set head_dim in JolaConfig"
        )
    if width % (head_dim or width):
        raise ValueError(f"{name}: head_dim must divide the {width} features of its output, got {head_dim}")
    return SiteHeads(width // (head_dim or width), head_dim or width, None)
