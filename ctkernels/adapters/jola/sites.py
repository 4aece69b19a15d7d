"""Sites, the attention output projections of a model: a table of model families, and a search for other models.

The input of a site is `(..., heads * head_dim)`. `LAYOUTS` maps the regular expression that a site's name ends with
to model families. Head count and size are read from the model.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

LAYOUTS: dict[str, str] = {
    # decoders in the style of Llama
    r"self_attn\.o_proj": """
        llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3_text phi3 phimoe cohere
        cohere2 olmo olmo2 olmoe granite granitemoe glm glm4 gpt_oss deepseek_v3 starcoder2 stablelm nemotron helium
        smollm3 exaone4 ernie4_5 seed_oss arcee""",
    # vision transformers; the second name is that of transformers 4
    r"attention\.(o_proj|output\.dense)": """
        vit deit beit dinov2 dinov2_with_registers dinov3_vit swin swinv2 vit_msn yolos data2vec-vision""",
    r"(self_attn|encoder_attn)\.out_proj": """
        opt clip siglip bart mbart pegasus blenderbot marian m2m_100 whisper xglm biogpt""",
    r"attention\.out_proj": "wav2vec2 hubert",
    r"attn\.out_proj": "gptj codegen mpt",
    r"attn\.attention\.out_proj": "gpt_neo",
    r"self_attn\.dense": "phi persimmon",
    r"attention\.dense": "gpt_neox gpt_neox_japanese albert",
    r"self_attention\.dense": "falcon bloom",
    r"attention\.output\.dense": """
        bert roberta electra deberta deberta-v2 camembert xlm-roberta ernie layoutlm esm rembert roformer""",
    r"attn\.c_proj": "gpt2 gpt_bigcode openai-gpt",
    r"(SelfAttention|EncDecAttention)\.o": "t5 mt5 umt5",
    r"(attention|attentions\.\d+)\.out_lin": "distilbert xlm flaubert",
    r"attn\.Wo": "modernbert",
    r"attention\.attn\.o": "mpnet",
}

PATTERNS: dict[str, str] = {family: pattern for pattern, row in LAYOUTS.items() for family in row.split()}

UNSUPPORTED: dict[str, str] = {
    "xlnet": "its output projection is an einsum over a raw parameter",
    "wavlm": "its attention uses the projection's weight without calling the module",
    "mamba": "it has no attention heads",
    "mamba2": "it has no attention heads",
    "fnet": "it has no attention heads",
    "rwkv": "it has no attention heads",
    "xlstm": "its heads are those of an LSTM, not of attention",
}

_DIM_NAMES = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head")
_COUNT_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head")
# Names of an attention module's children and parameters that compute queries, keys or values, separately or fused.
_ALL = r"qkvz?|wqkv|c_attn|query_key_value|in_proj"
_ONE = r"(linear_|project_|to_|w)?({})(_global)?(_[ab])?"
_END = r"(_?(proj|projection|lin|linear|attn|layer))?(_with_mqa)?(_weight)?"
_FUSED = re.compile(rf"(to_)?({_ALL}){_END}", re.IGNORECASE)
_QUERY, _KEY, _VALUE = (
    re.compile(_ONE.format(name) + _END, re.IGNORECASE) for name in ("q|query", "k|key|kv", "v|value|kv")
)
_VALUE_ALONE = re.compile(_ONE.format("v|value") + _END, re.IGNORECASE)
_OUTPUT_NAMES = {
    *(
        "o_proj",
        "out_proj",
        "output_proj",
        "out_lin",
        "linear_out",
        "dense",
        "c_proj",
        "wo",
        "Wo",
        "o",
        "out",
        "output",
    ),
    *("proj", "projection", "attention_out"),
}
_NAMED_ATTENTION = re.compile(r"atte?nt?ion|attn", re.IGNORECASE)


@dataclass(frozen=True)
class Attention:
    """An attention module: its name in the model, its class's name, and its output projection.

    `site` is None where no output projection was found; `reason` says why.
    """

    name: str
    kind: str
    site: str | None
    reason: str = ""


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of a linear-like module (Linear, quantised Linear, GPT-2's Conv1D), else None."""
    layer: Any = module
    if isinstance(getattr(layer, "in_features", None), int) and isinstance(getattr(layer, "out_features", None), int):
        return layer.in_features, layer.out_features
    if isinstance(getattr(layer, "input_size", None), int) and isinstance(getattr(layer, "output_size", None), int):
        return layer.input_size, layer.output_size  # vLLM's
    if type(layer).__name__ == "Conv1D" and isinstance(getattr(layer, "nf", None), int):
        return layer.weight.shape[0], layer.nf
    return None


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around `name`, nearest first, the root last."""
    parts = name.split(".")[:-1]
    while parts:
        yield model.get_submodule(".".join(parts))
        parts.pop()
    yield model


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _declared(model: nn.Module, name: str) -> tuple[int | None, int | None]:
    """Head count and head size from the attention module, else from the nearest config."""
    count = size = None
    for level, owner in enumerate(_ancestors(model, name)):
        if level > 2:
            break
        for candidate in (owner, *owner.children()):
            if linear_shape(candidate) is None:
                count = count or _number(candidate, _COUNT_NAMES)
                size = size or _number(candidate, _DIM_NAMES)
        if count or size:
            break
    for owner in _ancestors(model, name):
        config = getattr(owner, "config", None)
        if config is not None:
            count = count or _number(config, _COUNT_NAMES)
            break
    return count, size


def declared_width(model: nn.Module, name: str) -> int | None:
    """The size of the hidden states around `name`, from the nearest config that declares it."""
    configs = (getattr(owner, "config", None) for owner in _ancestors(model, name))
    widths = (_number(config, ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")) for config in configs)
    return next((width for width in widths if width is not None), None)


def _gives_weights_away(attention: nn.Module) -> bool:
    """Whether the class calls `F.multi_head_attention_forward`, as `nn.MultiheadAttention` and WavLM's attention do."""
    functions = (value for cls in type(attention).__mro__ if cls is not nn.Module for value in vars(cls).values())
    codes = (getattr(inspect.unwrap(value), "__code__", None) for value in functions if callable(value))
    return any(code is not None and "multi_head_attention_forward" in code.co_names for code in codes)


def head_layout(model: nn.Module, name: str, module: nn.Module, head_dim: int | None = None) -> tuple[int, int]:
    """Read the head layout `(heads, head_dim)` of the site `name`.

    Args:
        model: the model that holds the site.
        name: the site's module name in `model`.
        module: the projection itself (unwrapped).
        head_dim: overrides the head size that the model declares.

    Raises:
        ValueError: the module is not a linear projection, is never called as a module (`nn.MultiheadAttention`), is an
            input projection, or its input is not `heads * head_dim` wide (a fused layout).

    Examples:
        >>> head_layout(base, "model.layers.0.self_attn.o_proj", base.model.layers[0].self_attn.o_proj)
        (4, 8)
    """
    shape = linear_shape(module)
    if shape is None:
        raise ValueError(f"{name}: expected a linear projection (Linear or Conv1D), got {type(module).__name__}")
    parent = next(_ancestors(model, name))
    if _gives_weights_away(parent):
        raise ValueError(
            f"{name}: {type(parent).__name__} gives its weights to F.multi_head_attention_forward and never calls its "
            "output projection, so its heads cannot be edited there; exclude it with exclude_modules"
        )
    if _is_input(name.rsplit(".", 1)[-1]):
        raise ValueError(f"{name}: expected an attention output projection, got an input projection")
    width = shape[0]
    count, size = _declared(model, name)
    if head_dim is not None:
        count, size = None, head_dim
    if size is None and count is not None and width % count == 0:
        size = width // count
    if size is None:
        raise ValueError(f"{name}: cannot read the head size from the model or its config; set head_dim in JolaConfig")
    if width % size != 0 or (count is not None and count * size != width):
        heads = "heads" if count is None else f"{count} heads"
        raise ValueError(
            f"{name}: expected an input of {heads} of size {size}, got {width} features; "
            "a fused projection cannot be edited per head (set head_dim in JolaConfig if the size is misread)"
        )
    return width // size, size


def value_projection(model: nn.Module, name: str) -> str | None:
    """The separate value projection of the attention around the site `name`; None where there is none."""
    for depth in (1, 2):
        around = ".".join(name.split(".")[:-depth])
        owner = model.get_submodule(around)
        names = [key for key, _ in unwrapped(owner) if _VALUE_ALONE.fullmatch(key.rsplit(".", 1)[-1])]
        if names and len(name.split(".")) > depth:
            return f"{around}.{names[0]}".lstrip(".") if len(names) == 1 else None
    return None


class SiteHeads(NamedTuple):
    """The heads in the input of a projection.

    Attributes:
        number, dim: head count and head size.
        values: number of value heads (see :func:`value_heads`); None if unknown.
    """

    number: int
    dim: int
    values: int | None


def site_heads(model: nn.Module, name: str, module: nn.Module, head_dim: int | None = None) -> SiteHeads:
    """The results of :func:`head_layout` and :func:`value_heads` for a site."""
    count, dim = head_layout(model, name, module, head_dim)
    return SiteHeads(count, dim, value_heads(model, name, count, dim))


def value_heads(model: nn.Module, name: str, heads: int, size: int) -> int | None:
    """The number of value heads at the site `name` with `heads` heads; None if unknown.

    Head h uses value head `h // (heads // value_heads)`.
    """
    value = value_projection(model, name)
    if value is not None:
        width = linear_shape(model.get_submodule(value))
        count = 0 if width is None or width[1] % size else width[1] // size
    else:  # queries, keys and values in one projection
        parent = next(_ancestors(model, name))
        widths = [linear_shape(child) for leaf, child in parent.named_children() if _FUSED.fullmatch(leaf)]
        total = widths[0][1] if len(widths) == 1 and widths[0] is not None else 0
        count = 0 if total % (2 * size) != heads * size % (2 * size) else (total // size - heads) // 2
    return count if count > 0 and heads % count == 0 else None


def _is_input(leaf: str) -> bool:
    return any(pattern.fullmatch(leaf) for pattern in (_FUSED, _QUERY, _KEY, _VALUE))


def unwrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by name, without the submodules of adapter layers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if name and hasattr(type(module), "get_base_layer"):
            inside = (*inside, f"{name}.")
        yield name, module


def _attends(module: nn.Module) -> bool:
    """Whether the module computes queries and keys itself (only some of them if its class is named attention)."""
    if hasattr(type(module), "get_base_layer"):
        return False
    leaves = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    fused, query, key, value = (
        any(pattern.fullmatch(leaf) for leaf in leaves) for pattern in (_FUSED, _QUERY, _KEY, _VALUE)
    )
    if _NAMED_ATTENTION.search(type(module).__name__):
        return fused or query or (key and value)  # a layer may share another's keys and values
    return (fused and "in_proj" not in leaves) or (query and key)  # a state-space mixer has an in_proj too


def _planned(model: nn.Module) -> re.Pattern[str] | None:
    """A pattern of the projections that transformers shards row-wise under tensor parallelism, as output projections are."""
    patterns = set()
    for prefix, owner in model.named_modules():
        plan = vars(owner).get("_tp_plan")
        for name, style in (plan if isinstance(plan, dict) else {}).items():
            if "rowwise" in str(style):
                whole = f"{prefix}.{name}" if prefix else name
                patterns.add(r"[^.]+".join(map(re.escape, whole.split("*"))))
    return re.compile("|".join(sorted(patterns))) if patterns else None


def find_attention(model: nn.Module) -> list[Attention]:
    """Find a model's attention modules and their output projections, without the table.

    Attention modules are recognised by the names of their query, key and value projections. The output projection is the
    one that the model's tensor-parallel plan shards row-wise; without a plan, the one linear module with a usual name, in
    the module or in the attention module around it (as in BERT). Its input has to be a whole number of heads wide.
    """
    planned = _planned(model)
    modules = dict(unwrapped(model))
    by_site: dict[str, Attention] = {}
    for name, module in modules.items():
        if not _attends(module):
            continue
        around = name.rpartition(".")[0]
        names = [name]
        if around in modules and _NAMED_ATTENTION.search(type(modules[around]).__name__):
            names.append(around)
        attention = Attention(name, type(module).__name__, None, "it has no output projection of its own")
        for owner in names:
            inside = [key for key in modules if key.startswith(f"{owner}.") or not owner]
            outputs = [key for key in inside if key.rsplit(".", 1)[-1] in _OUTPUT_NAMES and key != name]
            by_plan = [key for key in inside if planned is not None and planned.fullmatch(key)]
            chosen = _choose(model, owner, modules, by_plan)
            if chosen is None or chosen.site is None:
                chosen = _choose(model, owner, modules, outputs)
            attention = chosen or attention
            if attention.site is not None:
                break
        by_site.setdefault(attention.site or attention.name, attention)
    return list(by_site.values())


def _choose(model: nn.Module, owner: str, modules: dict[str, nn.Module], names: list[str]) -> Attention | None:
    """The attention module `owner` with the one of `names` whose width fits its heads; None without names."""
    fits, reasons = [], []
    for name in names:
        try:
            head_layout(model, name, modules[name])
            fits.append(name)
        except ValueError as error:
            reasons.append(str(error))
    kind = type(modules[owner]).__name__
    if len(fits) == 1:
        return Attention(owner, kind, fits[0])
    if len(fits) > 1:
        return Attention(owner, kind, None, f"several modules may be its output projection: {', '.join(fits)}")
    return Attention(owner, kind, None, reasons[0]) if reasons else None


def find_sites(model: nn.Module) -> list[str]:
    """Find the attention output projections of a model without the table, by their names and shapes.

    Use it to inspect an unknown model before passing `target_modules`; see also `print_coverage`.

    Args:
        model: any model.

    Returns:
        module names, in the model's order; empty if there is none.

    Examples:
        >>> find_sites(base)
        ['model.layers.0.self_attn.o_proj', 'model.layers.1.self_attn.o_proj']
    """
    sites = {attention.site for attention in find_attention(model)}
    return [name for name, _ in unwrapped(model) if name in sites]


def unused_sites(model: nn.Module) -> dict[str, str]:
    """The sites whose output the model never uses, so that an edit gets no gradient, with the reason.

    Models like LLaVA take image features from a layer before the vision tower's last (`vision_feature_layer` of the
    config, -2 in LLaVA itself); later layers are unused.
    """
    reasons: dict[str, str] = {}
    for prefix, owner in model.named_modules():
        config, tower = getattr(owner, "config", None), owner._modules.get("vision_tower")
        taken = getattr(config, "vision_feature_layer", None)
        if tower is None or taken is None:
            continue
        layers: dict[str, int] = {}
        for site in find_sites(tower):
            number = re.search(r"(?:^|\.)(\d+)\.", site)
            if number:
                layers[site] = int(number.group(1))
        depth = max(layers.values(), default=-1) + 1
        # hidden state 0 is the input of layer 0
        needed = max(int(state) % (depth + 1) for state in ([taken] if isinstance(taken, int) else taken))
        for site, layer in layers.items():
            if layer >= needed:
                name = f"{prefix}.vision_tower.{site}" if prefix else f"vision_tower.{site}"
                reasons[name] = f"the model does not use its output (vision_feature_layer={taken})"
    return reasons


def default_targets(model: nn.Module) -> str | list[str]:
    """The targets for `target_modules=None`: the table's pattern, or the used sites that `find_sites` finds.

    Raises:
        ValueError: the family has no editable projection, or none was found.
    """
    config = getattr(model, "config", None)
    family = str(getattr(config, "model_type", "") or "")
    if family in UNSUPPORTED:
        raise ValueError(f"model_type {family!r} cannot be edited per head: {UNSUPPORTED[family]}")
    if family in PATTERNS:
        return r"(.*\.)?" + PATTERNS[family]
    unused = unused_sites(model)
    sites = [site for site in find_sites(model) if site not in unused]
    if not sites:
        raise ValueError(
            f"model_type {family!r} is not in the table of families and no attention output projection was "
            f"recognised; pass target_modules. {near_misses(model)}"
        )
    return as_targets(model, sites)


def as_targets(model: nn.Module, sites: list[str]) -> list[str]:
    """`target_modules` for exactly these sites: suffixes of their names if these are unambiguous, else full names."""
    suffixes = sorted({re.split(r"\.\d+\.", name)[-1] for name in sites})
    matched = [
        name
        for name, module in model.named_modules()
        if linear_shape(module) and any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)
    ]
    return suffixes if set(matched) == set(sites) else sites


def near_misses(model: nn.Module, limit: int = 8) -> str:
    """A sentence listing the model's distinct linear module names, for error messages."""
    linear = (name for name, module in model.named_modules() if linear_shape(module) is not None)
    names = dict.fromkeys(re.sub(r"\d+", "*", name) for name in linear)
    shown = ", ".join(list(names)[:limit]) or "none"
    return f"Linear modules of this model: {shown}" + (", ..." if len(names) > limit else "")
