"""Run by test_peft_proposal.py in a process whose peft has JoLA of its own: exchanges adapters between both implementations."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import peft
import torch
from jola_families import build, inputs

import ctkernels.adapters as ours
from ctkernels.testing import assert_no_worse

FOLDER = Path(sys.argv[1])
VALUES = inputs("llama")


def base(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(3)
    return build("llama").to(dtype).eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**VALUES).logits


def own(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(
        base(dtype), folder, config=ours.JolaConfig.from_pretrained(folder), autocast_adapter_dtype=False
    )


def pefts(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    with warnings.catch_warnings():  # of this package's fields that the proposal lacks, all at their defaults
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")
        return peft.PeftModel.from_pretrained(base(dtype), folder, autocast_adapter_dtype=False)


def scatter(model: torch.nn.Module) -> None:
    """Give every tensor of the adapter other values, so that some gates are closed, some open and some between."""
    generator = torch.Generator().manual_seed(7)
    for name, value in model.state_dict().items():
        if "jola_unit" in name:
            value.mul_(torch.rand(value.shape, generator=generator) + 0.5)
        elif "jola_log_alpha" in name:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.4)
        elif "jola_" in name:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)


def compare(what: str, folder: Path) -> None:
    """Both implementations read the folder and compute the same."""
    loaded, plain = own(folder, torch.float32), pefts(folder, torch.float32)
    assert type(loaded.base_model) is ours.JolaModel
    assert type(plain.base_model) is peft.JolaModel
    truth, baseline = output(own(folder, torch.float64)), output(loaded)
    assert not torch.equal(baseline, output(base(torch.float32)))
    assert_no_worse(f"{what}: outputs", output(plain), truth, baseline)
    plain.merge_adapter()
    loaded.merge_adapter()
    assert_no_worse(f"{what}: merged", output(plain), truth, output(loaded))


# peft's own method is left alone, under its own name
assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["JOLA"] is peft.JolaConfig
assert peft.PEFT_TYPE_TO_TUNER_MAPPING["JOLA"] is peft.JolaModel
assert peft.JolaConfig is not ours.JolaConfig

made = peft.get_peft_model(base(torch.float32), ours.JolaConfig(task_type="CAUSAL_LM"))
assert type(made.base_model) is ours.JolaModel
ours.measure_units(made, [VALUES])
scatter(made)
made.save_pretrained(FOLDER / "ours")
assert '"peft_type": "JOLA"' in (FOLDER / "ours/adapter_config.json").read_text()
compare("written here", FOLDER / "ours")

made = peft.get_peft_model(
    base(torch.float32), peft.JolaConfig(task_type="CAUSAL_LM", gate_rate=4.0, stretch=(-0.3, 1.2))
)
assert type(made.base_model) is peft.JolaModel
scatter(made)
made.save_pretrained(FOLDER / "peft's")
compare("written by peft", FOLDER / "peft's")

penalty, expected = (model(FOLDER / "peft's", torch.float32) for model in (pefts, own))
torch.testing.assert_close(penalty.base_model.get_l0_penalty(), ours.jola_penalty(expected))
print("exchanged")
