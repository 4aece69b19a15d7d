"""The model card of a saved adapter: method, base model, loading instructions, and a summary of the learned values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._card import counted, write_card
from ._files import WEIGHTS, safetensors_names

_LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_PREFIX = "base_model.model."  # of all tensor names in the file


def write_adapter_card(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Writes the model card of the adapter in a folder, from its weights and the values of its configuration."""
    if not (Path(folder) / WEIGHTS).is_file():
        return  # only the configuration is saved, or weights in another format
    tensors = _tensors(Path(folder) / WEIGHTS)
    parts = [part for part in (_heads(tensors, config), _curvature(tensors)) if part]
    write_card(folder, "\n\n".join([f"# {config['peft_type']} adapter", *parts, _loading(config)]))


def _tensors(file: Path) -> dict[str, Tensor]:
    """The methods' own tensors, without those of `modules_to_save`."""
    from safetensors import safe_open

    names = [n for n in safetensors_names(file) if n.rpartition(".")[2].startswith(("jola_", "curvature_"))]
    with safe_open(str(file), framework="pt") as opened:
        return {name.removeprefix(_PREFIX): opened.get_tensor(name).float() for name in names}


def _heads(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Describes JoLA's edits, with a map of their gates."""
    gates: dict[str, dict[str, Tensor]] = {}
    settings = config.get("jola", config)  # a joint adapter nests them
    for name, value in tensors.items():
        site, _, key = name.rpartition(".")
        if key.startswith("jola_log_alpha_"):
            unit = tensors.get(f"{site}.jola_unit_log_alpha", torch.ones(()))
            gates.setdefault(site, {})[key[-1]] = functional.hard_concrete(
                value * unit,
                training=False,
                temperature=settings["temperature"],
                stretch=tuple(settings["stretch"]),
                estimator=settings["gate_estimator"],
            )
    if not gates:
        return ""
    every = torch.cat([row for rows in gates.values() for row in rows.values()])
    learned = [name for name in tensors if ".jola_" in name and ".jola_unit_" not in name]
    count = sum(tensors[name].numel() for name in learned)
    width = max(map(len, gates))
    kinds = [kind for kind in "ma" if any(kind in rows for rows in gates.values())]
    lines = [
        f"{site:<{width}}  " + "  ".join(f"{kind} {_strip(rows[kind])}" for kind in kinds if kind in rows)
        for site, rows in gates.items()
    ]
    edited = {"mlp": "MLPs", "block": "blocks"}.get(settings.get("site", "head"), "attention heads")
    return (
        f"[JoLA](https://arxiv.org/abs/2502.01179): the outputs of {edited} are edited, `(1 + g_m m) z + g_a a`, with "
        f"gates g in [0, 1]. Of {len(every)} gates {int((every > 0).sum())} are open; {count} numbers are learned.\n\n"
        "Gates by module, one sign for each: `#` is open, `-` partly open, `.` closed.\n\n"
        "```text\n" + "\n".join(lines) + "\n```"
    )


def _strip(gates: Tensor) -> str:
    return "".join("#" if gate == 1 else "-" if gate > 0 else "." for gate in gates.tolist())


def _curvature(tensors: Mapping[str, Tensor]) -> str:
    """Describes the learned curvatures."""
    betas = [value.sigmoid().flatten() for name, value in tensors.items() if name.endswith(".curvature_raw_beta")]
    if not betas:
        return ""
    every = torch.cat(betas)
    count = sum(value.numel() for name, value in tensors.items() if ".curvature_raw_" in name)
    where = f"{counted(len(betas), 'module')}, {count} learned numbers"
    return (
        "[Curvature Tuning](https://arxiv.org/abs/2502.07783): activations have a learned curvature beta (1 is the plain "
        f"activation) and mixing coefficient. {where}; beta is {every.min():.3f} to {every.max():.3f}, its median "
        f"{every.median():.3f}."
    )


def _loading(config: Mapping[str, Any]) -> str:
    name, loader = config.get("base_model_name_or_path"), _LOADERS.get(config.get("task_type") or "")
    mapping = config.get("auto_mapping") or {}
    lines = ["import ctkernels.adapters  # makes the method known to peft", "from peft import PeftModel"]
    if name and loader:
        lines += [f"from transformers import {loader}", "", f"base = {loader}.from_pretrained({name!r})"]
    else:
        kind = " of ".join(part for part in (mapping.get("base_model_class"), mapping.get("parent_library")) if part)
        known = ", ".join(part for part in (kind, name) if part)
        lines += ["", f"base = ...  # the network that the adapter was trained on{f' ({known})' if known else ''}"]
    lines += ['model = PeftModel.from_pretrained(base, ".")  # the folder of this file']
    return (
        f"Base: {f'`{name}`' if name else 'not recorded'}. To load the adapter:\n\n"
        '```sh\npip install "ctkernels[adapters]"\n```\n\n```python\n' + "\n".join(lines) + "\n```"
    )
