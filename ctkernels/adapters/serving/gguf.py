"""Saves merged models as GGUF files for llama.cpp: the base model's file with changed projections and biases."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._extras import require
from ..._files import replacing
from .._peft import plain_model
from ..jola.layer import JolaLayer
from ..jola.runtimes import reads
from ..jola.sites import unwrapped
from . import engines
from .verify import Merged, expect

_FLOATS = ("F32", "F16", "BF16")


class _Site(NamedTuple):
    """An edited projection: its names in the model and in the file (without ".weight"), its layer, the adapters to merge."""

    site: str
    name: str
    layer: JolaLayer
    adapters: list[str]


def save_gguf(
    model: Any,
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    verify: bool = True,
    inputs: Mapping[str, Any] | None = None,
) -> Merged:
    """Saves a model with its active JoLA adapters merged as a GGUF file for llama.cpp.

    The file is the base model's, in any quantisation, with changed output projections, and with the biases that additive
    edits need: of the output projections if llama.cpp reads them for the family (Llama, Mistral, Granite), else of the value
    projections, if heads that share values share an offset (`additive="kv_group"`). Vocabulary, templates and all other
    tensors are copied. Projections are requantised in their type, or in Q8_0 if the gguf package cannot write that (K
    quantisations).

    If xllamacpp is installed, llama.cpp runs the new file and the base model's before the new file gets its name: the error
    of the next token's log-probabilities may be that of rounding plus twice that of the base.

    Args:
        model: a `PeftModel` with JoLA adapters only, unmerged.
        path: file to write; an existing one is replaced when the new one is complete.
        base: the GGUF file of the base model.
        verify: run both files, if llama.cpp is installed.
        inputs: keyword arguments of a forward, with `input_ids`; None: random tokens.

    Returns:
        A printable record of what was saved, and its error.

    Raises:
        ValueError: base is not a GGUF file of this model; there are adapters of other methods; llama.cpp reads no bias for
            the additive edits, or computes something else. Nothing is written.
        ImportError: gguf is missing.

    Examples:
        >>> print(save_gguf(model, "tuned.gguf", base="Qwen3-0.6B-Q8_0.gguf"))  # doctest: +SKIP
    """
    gguf = require("gguf", "serving", "a GGUF file")
    source, target = Path(base), Path(path)
    if not source.is_file():
        raise ValueError(f"base: expected a GGUF file of the base model, got {source}, which is none")
    if target.exists() and target.samefile(source):
        raise ValueError(f"path: expected another file than base, got {target}")
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"base: expected a GGUF file, got {source}, which does not read ({error})") from error
    bare = plain_model(model)
    sites = _sites(bare, reader, gguf)
    family = getattr(bare.config, "model_type", "")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_base(sites, tensors, source, gguf)
    place, changed = _changes(sites, tensors, family, gguf)
    can_run = verify and engines.installed("llama.cpp")
    if place != "the weights alone" and reads(family, "llama.cpp", place.split()[2]) is None and not can_run:
        raise ValueError(
            f"model: nothing is known of the biases that llama.cpp reads of {family!r} models, and it is not installed here to "
            "be tried: pip install xllamacpp"
        )
    expected = expect(bare, inputs) if can_run else None
    with replacing(target) as temporary:
        _write(reader, changed, temporary, gguf)
        result = Merged(os.fspath(path), ("llama.cpp",), place)
        if expected is None:
            return result
        tokens = expected.inputs["input_ids"]
        off = engines.error("llama.cpp", temporary, tokens, expected.output)
        of_base = engines.error("llama.cpp", source, tokens, expected.unedited)
        result = result._replace(checked_in="llama.cpp", error=off)
        if 0 < expected.edit < 2 * of_base:
            raise ValueError(
                f"base: llama.cpp's outputs of {source} are off by {of_base:.2g} without any adapter, and the adapters do "
                f"{expected.edit:.2g}: too little to see whether they are there. Take a base of higher precision, or verify=False"
            )
        # log-probabilities change at most twice as much as logits
        return result.judged(expected, 2 * expected.tolerance + 2 * of_base)


def _sites(model: Any, reader: Any, gguf: Any) -> list[_Site]:
    """The edited projections. Raises for adapters of other methods, and for projections that the file lacks."""
    architecture = _value(reader, gguf.Keys.General.ARCHITECTURE)
    blocks = _value(reader, f"{architecture}.block_count")
    key = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if key is None or blocks is None:
        raise ValueError(f"base: the gguf package knows no architecture {architecture!r}")
    names = gguf.get_tensor_name_map(key, blocks)
    sites = []
    for name, module in unwrapped(model):
        if isinstance(module, JolaLayer) and not hasattr(module.base_layer, "base_layer"):
            adapters = module.check_merge()
            if module.merged:
                raise ValueError(f"{name}: save_gguf needs unmerged adapters, got {module.merged_adapters} merged")
            if not adapters:
                continue
            if module.edits != "head":
                raise ValueError(
                    f"{name}: save_gguf folds edits of heads alone, got site={module.edits!r}; use save_merged(target="
                    "'llama.cpp') and llama.cpp's convert_hf_to_gguf.py"
                )
            new = names.get_name(name)
            if new is None or not any(tensor.name == f"{new}.weight" for tensor in reader.tensors):
                raise ValueError(f"base: expected the file of a model with {name}, got an {architecture!r} without it")
            sites.append(_Site(name, new, module, adapters))
        elif hasattr(module, "get_base_layer") or hasattr(module, "modules_to_save"):
            raise ValueError(
                f"{name}: save_gguf folds JoLA's edits alone, got a {type(module).__name__}; use save_merged(target="
                "'llama.cpp') and llama.cpp's convert_hf_to_gguf.py"
            )
    if not sites:
        raise ValueError("model: expected one with an active JoLA adapter, got one without")
    return sites


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _tensor(stored: Any, gguf: Any) -> Tensor:
    """The values of a stored tensor, in float64."""
    return torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy()).double()


def _check_base(sites: list[_Site], tensors: dict[str, Any], source: Path, gguf: Any) -> None:
    """Raises if the file's output projections, quantised or not, are not those of the model."""
    for site in sites:
        layer: Any = site.layer.get_base_layer()
        weight = layer.weight.detach().double().cpu()
        weight = weight.t() if type(layer).__name__ == "Conv1D" else weight
        stored = tensors[f"{site.name}.weight"]
        values = _tensor(stored, gguf)
        # the relative distance of unrelated weights is 1.4
        allowed = 2**-7 if stored.tensor_type.name in _FLOATS else 0.5
        if values.shape != weight.shape or float((values - weight).norm() / weight.norm()) > allowed:
            raise ValueError(
                f"base: expected the file of this base model, but {site.name} in {source} is not {site.site}"
            )


def _changes(
    sites: list[_Site], tensors: dict[str, Any], family: str, gguf: Any
) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The placement of additive edits, in words, and the changed tensors by name: data and type."""
    lacking = [s for s in sites if f"{s.name}.bias" not in tensors and bool(s.layer.factors(s.adapters)[1].any())]
    by_value = bool(lacking) and reads(family, "llama.cpp", "output") is not True
    place = "biases of the output projections" if lacking else "the weights alone"
    changed: dict[str, tuple[Any, Any]] = {}
    if by_value:
        place = "biases of the value projections"
        for site in lacking:
            try:
                offset = site.layer.offsets(site.adapters).flatten().cpu()
            except ValueError as error:
                raise ValueError(
                    f"llama.cpp has no place for these additive edits: of {family!r} models it reads no bias of the output "
                    f"projections, and none of the value projections does it: {error}"
                ) from error
            name, bias = _value_bias(site, tensors, offset, gguf)
            changed[name] = _stored(bias, "F32", gguf)
    for site in sites:
        stored = tensors[f"{site.name}.weight"]
        p, q = (part.double().cpu() for part in site.layer.factors(site.adapters))
        if by_value and any(site is other for other in lacking):
            q = torch.zeros_like(q)
        weight = _tensor(stored, gguf)
        changed[f"{site.name}.weight"] = _stored(weight * p, stored.tensor_type.name, gguf)
        if bool(q.any()):
            name = f"{site.name}.bias"
            before = _tensor(tensors[name], gguf) if name in tensors else 0
            changed[name] = _stored(before + weight @ q, "F32", gguf)
    return place, changed


def _value_bias(site: _Site, tensors: dict[str, Any], offset: Tensor, gguf: Any) -> tuple[str, Tensor]:
    """The name and the values of the bias of a site's value projection, with the offset added."""
    block = site.name.rsplit(".", 1)[0]
    for part in ("attn_v", "attn_qkv"):
        if f"{block}.{part}.weight" in tensors:
            name = f"{block}.{part}.bias"
            width = int(tensors[f"{block}.{part}.weight"].shape[-1])
            bias = _tensor(tensors[name], gguf) if name in tensors else torch.zeros(width, dtype=torch.float64)
            bias[-len(offset) :] += offset  # in attn_qkv, values are last
            return name, bias
    raise ValueError(f"base: expected a projection of values beside {site.name}, got none")


def _stored(value: Tensor, kind: str, gguf: Any) -> tuple[Any, Any]:
    """Data and type of a tensor for the file: in type `kind`, or in Q8_0 if the package cannot write that."""
    array = value.float().numpy()
    for name in (kind, "Q8_0", "F16"):
        dtype = gguf.GGMLQuantizationType[name]
        try:
            return gguf.quants.quantize(array, dtype), dtype
        except (NotImplementedError, gguf.quants.QuantError):
            continue
    raise ValueError(f"base: the gguf package writes no tensor of {tuple(value.shape)} as {kind}")


def _write(reader: Any, changed: dict[str, tuple[Any, Any]], path: Path, gguf: Any) -> None:
    """Copies a file, with changed tensors replaced and new ones at the end."""
    writer = gguf.GGUFWriter(path, _value(reader, gguf.Keys.General.ARCHITECTURE), endianess=reader.endianess)
    alignment = _value(reader, gguf.Keys.General.ALIGNMENT)
    if alignment is not None:
        writer.data_alignment = alignment
    for field in reader.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            kind = field.types[0]
            within = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=within)
    for name, data, dtype in _tensors(reader, changed):
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in _tensors(reader, changed):
        writer.write_tensor_data(data)
    writer.close()


def _tensors(reader: Any, changed: dict[str, tuple[Any, Any]]) -> Iterator[tuple[str, Any, Any]]:
    present = set()
    for tensor in reader.tensors:
        present.add(tensor.name)
        yield (tensor.name, *changed.get(tensor.name, (tensor.data, tensor.tensor_type)))
    for name, (data, dtype) in changed.items():
        if name not in present:
            yield name, data, dtype
