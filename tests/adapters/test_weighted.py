"""Adapters that are linear combinations of others."""

from __future__ import annotations

import pytest
import torch
from jola_families import build, inputs, output

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = [0.7, 0.25]


def _model(first, second):
    torch.manual_seed(2)
    model = peft.get_peft_model(build("llama"), first)
    model.add_adapter("second", second)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "jola_log_alpha" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)  # some gates closed, some half open
            elif "curvature_raw" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def _jola(**values):
    return adapters.JolaConfig(init_std=0.3, **values)


def test_edits_add_up():
    model = _model(_jola(), _jola(heads={"0": {"m": [1, 3], "a": [0]}}, gate_estimator="mean"))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum")
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in before} == before
    z = torch.randn(2, 3, 32)
    for layer in (module for module in model.modules() if isinstance(module, adapters.JolaLayer)):
        expected = z.clone()
        for name, weight in zip(("default", "second"), WEIGHTS):
            if name in layer.jola_config:
                expected += weight * (layer.edit(z, name) - z)
        torch.testing.assert_close(layer.edit(z, "sum"), expected)
    assert model.active_adapters == ["default"]


def test_it_is_saved_and_loaded_like_any_other(tmp_path):
    model, values = _model(_jola(), _jola(layers_to_transform=[1])), inputs("llama")
    model.add_weighted_adapter(["second"], [2.0], "sum")
    model.set_adapter("sum")
    expected = output(model, values)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "sum").eval()
    assert torch.equal(output(again, values), expected)
    assert len([m for m in again.modules() if isinstance(m, adapters.JolaLayer)]) == 1


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_betas_and_coeffs_add_up(granularity):
    second = adapters.CurvatureConfig(init_beta=0.6, init_coeff=0.7, target_modules=[r"layers.1.mlp.act_fn"])
    model = _model(adapters.CurvatureConfig(init_beta=0.4, init_coeff=0.8, granularity=granularity), second)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum")
    layers = [m for m in model.modules() if isinstance(m, adapters.CurvatureLayer)]
    for layer in layers:
        for knob, neutral in enumerate((0.5, 1.0)):  # SiLU is the unit at beta 0.5 and coeff 1
            value = {name: torch.sigmoid(layer.parameters_of(name)[knob]) for name in layer.curvature_config}
            expected = neutral + sum(
                w * (value[n] - neutral) for n, w in zip(("default", "second"), WEIGHTS) if n in value
            )
            torch.testing.assert_close(value["sum"], expected)
    assert [set(layer.curvature_config) for layer in layers] == [{"default", "sum"}, {"default", "second", "sum"}]


def test_the_digits_of_a_beta_near_one_are_kept():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    model = peft.get_peft_model(net, adapters.CurvatureConfig(granularity="layer"))
    layer = next(m for m in model.modules() if isinstance(m, adapters.CurvatureLayer))
    with torch.no_grad():
        layer.curvature_raw_beta["default"].fill_(20.0)  # 1 - beta = 2e-9: a float32 beta is 1
    model.add_weighted_adapter(["default"], [0.5], "halved")
    rest = torch.sigmoid(-torch.tensor([20.0], dtype=torch.float64))
    torch.testing.assert_close(torch.sigmoid(-layer.curvature_raw_beta["halved"].double()), rest / 2, rtol=2e-6, atol=0)


def test_a_joint_adapter_combines_both():
    values = inputs("llama")
    units = {"init_beta": 0.4, "init_coeff": 0.8}
    model = _model(*(adapters.JointConfig(jola=_jola(), curvature=adapters.CurvatureConfig(**units)) for _ in range(2)))
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "first")
    expected = output(model, values)
    model.set_adapter("first")
    torch.testing.assert_close(output(model, values), expected, rtol=1e-5, atol=1e-5)
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    for layer in (m for m in model.modules() if isinstance(m, adapters.CurvatureLayer)):
        one, two, mean = (torch.sigmoid(layer.parameters_of(name)[0]) for name in ("default", "second", "mean"))
        torch.testing.assert_close(mean, (one + two) / 2)


def test_what_cannot_be_combined_is_refused_and_adds_nothing():
    model = _model(*(adapters.JointConfig(jola=_jola(), lora=lora) for lora in (None, {"target_modules": ["q_proj"]})))
    keys = list(model.state_dict())
    for arguments, message in (
        ((["default", "third"], [1, 1], "sum"), r"adapters must be a list of some of \['default', 'second'\]"),
        ((["default"], [1, 2], "sum"), "weights must be a finite number for each"),
        ((["default"], [float("nan")], "sum"), "weights must be a finite number for each"),
        ((["default"], [1.0], "second"), "adapter_name must be one that is not there yet, got 'second'"),
        ((["default"], [1.0], "sum", "svd"), "combination_type must be 'linear', got 'svd'"),
        ((["second"], [1.0], "sum"), "adapters must have no LoRA"),
        ((["default"], [-3.0], "sum"), r"(beta|coeff): the weighted sum must lie strictly between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        assert list(model.state_dict()) == keys
        assert list(model.peft_config) == ["default", "second"]
