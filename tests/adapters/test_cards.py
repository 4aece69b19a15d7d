"""Model cards: what a saved adapter or network says of itself, and that its own lines load it."""

from __future__ import annotations

import re

import pytest
import torch
from jola_families import build, inputs
from torch import nn

import ctkernels
from ctkernels import _card

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def _adapted(folder, **values):
    build("llama").save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.get_peft_model(base, adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.3, **values)).eval()
    return model


def _code(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def test_the_lines_of_the_card_load_the_adapter(tmp_path, monkeypatch):
    model = _adapted(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert f"Base: `{tmp_path / 'base'}`" in card
    assert 'pip install "ctkernels[adapters]"' in card
    monkeypatch.chdir(tmp_path / "adapter")
    names = {}
    exec(_code(card), names)
    tokens = inputs("llama")["input_ids"]
    assert torch.equal(names["model"].eval()(tokens).logits, model(tokens).logits)


def test_the_map_has_the_gates(tmp_path):
    model = _adapted(tmp_path)
    first, second = adapters.gate_map(model).sites
    layer = model.get_submodule(f"base_model.model.{first}")
    with torch.no_grad():
        layer.jola_log_alpha_m["default"].copy_(torch.tensor([-10.0, 10.0, 0.0, 10.0]))
        layer.jola_log_alpha_a["default"].fill_(-10.0)
    adapters.save_adapter(model, tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert f"{first}  m .#-#  a ....\n{second}  m ####  a ####\n" in card
    gates = adapters.gate_map(model)
    open_gates = sum(gate > 0 for kind in (gates.m, gates.a) for row in kind for gate in row)
    assert f"Of 16 gates {open_gates} are open; {gates.parameters} numbers are learned." in card


def test_saving_again_replaces_its_own_part_alone(tmp_path):
    model = _adapted(tmp_path)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    assert "[More Information Needed]" in text.partition(_card.END)[2]
    (folder / "README.md").write_bytes(text.encode() + b"\r\nmine, in Latin-1: \xe9\r\n")
    adapters.freeze_gates(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "jola_log_alpha" in name:
                parameter.fill_(-10.0)
    model.base_model.peft_config["default"].save_pretrained(str(folder))  # of the old weights: nothing changes
    assert (folder / "README.md").read_bytes() == text.encode() + b"\r\nmine, in Latin-1: \xe9\r\n"
    (folder / "README.md").write_text(text + "\nmine\n")
    adapters.save_adapter(model, folder)
    again = (folder / "README.md").read_text()
    assert again.count(_card.START) == again.count(_card.END) == 1
    assert "mine" in again.partition(_card.END)[2].splitlines()
    assert "Of 16 gates 0 are open" in again
    assert again.partition(_card.START)[0].split() == text.partition(_card.START)[0].split()


def test_each_of_several_adapters_has_its_own(tmp_path):
    model = _adapted(tmp_path)
    model.add_adapter("other", adapters.JolaConfig(task_type="CAUSAL_LM", heads=[0], edit="additive"))
    model.save_pretrained(tmp_path / "out")
    assert "  m ####  a ####\n" in (tmp_path / "out/README.md").read_text()
    card = tmp_path / "out/other/README.md"
    assert "o_proj  a #\n" in card.read_text()
    card.write_text(f"mine\n{card.read_text()}")
    adapters.save_adapter(model, tmp_path / "out")
    assert card.read_text().startswith(f"mine\n{_card.START}")


def test_a_configuration_alone_has_none(tmp_path):
    adapters.JolaConfig().save_pretrained(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]


def test_curvature(tmp_path):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    config = adapters.CurvatureConfig(granularity="layer", init_beta=0.75, modules_to_save=["2"])
    peft.get_peft_model(network, config).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "1 module, 2 learned numbers; beta is 0.750 to 0.750, its median 0.750." in card
    assert "Base: not recorded." in card
    assert (
        "base = ...  # the network that the adapter was trained on (Sequential of torch.nn.modules.container)" in card
    )
    compile(_code(card), "card", "exec")


def test_a_steered_network(tmp_path, monkeypatch):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ctkernels.steer(network, beta=0.9)
    ctkernels.save_pretrained(network, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "The curvature of 1 activation was set: beta is 0.9 (1 is plain)" in card
    assert "`torch.nn.modules.container.Sequential`" in card
    code = _code(card)
    assert "base = ..." in code
    monkeypatch.chdir(tmp_path)
    names = {"plain": plain}
    exec(code.replace("base = ...", "base = plain"), names)
    x = torch.randn(3, 4)
    assert torch.equal(names["model"](x), network(x))
