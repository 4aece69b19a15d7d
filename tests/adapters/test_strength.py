"""Scaling adapters: strength 0 is the base model, 1 the adapter, in between what the documentation says."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from jola_families import build, inputs, output

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from curvature_networks import image, make_net, shaken, tuned  # noqa: E402
from torch._dynamo.testing import CompileCounter  # noqa: E402

from ctkernels.adapters import adapter_strength, set_strength  # noqa: E402
from ctkernels.steering.activations import ACTIVATIONS  # noqa: E402

VALUES = inputs("llama")
LORA = {"r": 2, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}


def edited(**values):
    torch.manual_seed(0)
    made = adapters.JolaConfig(**{"init_std": 0.5, "init_log_alpha": 0.5, "task_type": "CAUSAL_LM"} | values)
    return peft.get_peft_model(build("llama"), made).eval()


def joint():
    torch.manual_seed(0)
    made = adapters.JointConfig(task_type="CAUSAL_LM", jola={"init_std": 0.5}, curvature={"init_beta": 0.3}, lora=LORA)
    return peft.get_peft_model(build("llama"), made).eval()


def jola_layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def curvature_layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.CurvatureLayer)]


@pytest.mark.parametrize(
    "values", [{}, {"site": "mlp"}, {"site": "block"}, {"additive": "kv_group"}, {"heads": [1, 2]}], ids=str
)
def test_an_edit_is_scaled(values):
    model = edited(**values)
    whole = output(model, VALUES)
    factors = [[v.clone() for v in layer.factors(["default"])] for layer in jola_layers(model)]
    vectors = [{kind: v.clone() for kind, v in layer.folded_edit("default").items()} for layer in jola_layers(model)]
    set_strength(model, 0.25)
    for layer, (p, q), one in zip(jola_layers(model), factors, vectors):
        assert layer.get_scale("default") == 0.25
        scaled_p, scaled_q = layer.factors(["default"])
        torch.testing.assert_close(scaled_p, 1 + 0.25 * (p - 1))
        wanted = 0.25 * q
        if values.get("additive") == "kv_group":  # (1 + s*g_m*m) * (z + s*g_a*a)
            wanted = ((1 + 0.25 * one["m"]) * 0.25 * one["a"] / (1 + one["m"])).flatten()
        torch.testing.assert_close(scaled_q, wanted)
    quarter = output(model, VALUES)
    assert not torch.allclose(quarter, whole)
    set_strength(model, 0)
    assert torch.equal(output(model, VALUES), output(build("llama"), VALUES))
    set_strength(model, 1)
    assert torch.equal(output(model, VALUES), whole)
    assert not any("strength" in name for name in model.state_dict())
    with adapter_strength(model, 0.25):
        assert torch.equal(output(model, VALUES), quarter)
        if values.get("site") != "block":
            model.merge_adapter()
            torch.testing.assert_close(output(model, VALUES), quarter, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
    assert torch.equal(output(model, VALUES), whole)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_curvatures_go_a_part_of_the_way(activation):
    act = {"relu": torch.nn.ReLU, "silu": torch.nn.SiLU, "gelu": torch.nn.GELU}[activation]
    neutral = ACTIVATIONS[activation]
    values = {"init_beta": 0.3, "init_coeff": 0.6, "target_modules": ["act"]}
    net = make_net(act=act)
    plain = net(image())
    model = tuned(net, **values)
    whole = model(image())
    set_strength(model, 0.25)
    between = {
        "init_beta": neutral.beta + 0.25 * (0.3 - neutral.beta),
        "init_coeff": neutral.coeff + 0.25 * (0.6 - neutral.coeff),
    }
    expected = tuned(make_net(act=act), **values | between)(image())
    torch.testing.assert_close(model(image()), expected, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="cannot be folded"):
        model.merge_adapter()
    torch.testing.assert_close(model(image()), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"act: scaling needs unmerged adapters, got \['default'\] merged"):
        set_strength(model, 0.5)
    model.unmerge_adapter()
    set_strength(model, 0)
    torch.testing.assert_close(model(image()), plain, rtol=1e-5, atol=1e-5)
    set_strength(model, 1)
    torch.testing.assert_close(model(image()), whole, rtol=1e-5, atol=1e-5)
    set_strength(model, 0.25)
    with pytest.warns(UserWarning, match="cannot be folded"):
        fixed = model.merge_and_unload()
    torch.testing.assert_close(fixed(image()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_gradients_are_scaled_and_finite(strength):
    model = shaken(tuned())
    set_strength(model, strength)
    model(image()).square().sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "curvature_" in name]
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert any(bool(grad.any()) for grad in grads) is (strength > 0)


def test_each_sample_has_its_adapter_at_its_strength():
    model = tuned(init_beta=0.3)
    model.add_adapter("b", adapters.CurvatureConfig(init_beta=0.7))
    with torch.no_grad():
        set_strength(model, 0.5, "default")
        whole = model(image(), adapter_names=["default", "b", "__base__", "default"])
        one = model(image())
        model.set_adapter("b")
        two = model(image())
        set_strength(model, 0.0, "default")
        off = model(image(), adapter_names=["default", "b", "__base__", "default"])
        with model.disable_adapter():
            plain = model(image())
    torch.testing.assert_close(whole, torch.stack([one[0], two[1], plain[2], one[3]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(off, torch.stack([plain[0], two[1], plain[2], plain[3]]), rtol=1e-5, atol=1e-5)


def test_a_joint_adapter_is_scaled_in_all_its_methods():
    model = joint()
    whole, plain = output(model, VALUES), output(build("llama"), VALUES)
    with adapter_strength(model, 0):
        torch.testing.assert_close(output(model, VALUES), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(model, VALUES), whole)
    with adapter_strength(model, 0.5):
        assert not torch.allclose(output(model, VALUES), whole)
    with pytest.raises(ValueError, match="input_ids"), adapter_strength(model, 0.5):
        output(model, {"input_ids": None})
    assert torch.equal(output(model, VALUES), whole)


def test_layers_have_pefts_methods_of_scaling():
    model = joint()
    for layer in [*jola_layers(model), *curvature_layers(model)]:
        layer.scale_layer(0.5)
        layer.scale_layer(0.5)
        assert layer.get_scale("default") == 0.25
        layer.unscale_layer(0.5)
        assert layer.get_scale("default") == 0.5
        layer.unscale_layer()
        assert layer.get_scale("default") == 1
        layer.set_scale("unknown", 3)  # as in peft, a layer without the adapter ignores it
    model.delete_adapter("default")
    assert not any(name.endswith("strength.default") for name, _ in model.named_buffers())


def test_a_strength_goes_where_the_model_goes():
    model = edited()
    set_strength(model, 0.5)
    again = model.double()
    layer = jola_layers(again)[0]
    assert layer.strength["default"].dtype == torch.float64
    output(again, VALUES)


def test_errors_change_nothing():
    model = joint()
    whole = output(model, VALUES)
    for strength, adapter, message in (
        (0.5, "other", r"adapter: expected one of \['default'\], got 'other'"),
        (2.0, None, "scale must lie between 0 and 1 for curvatures, got 2.0"),
        (math.nan, None, "scale must be a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            set_strength(model, strength, adapter)
        assert torch.equal(output(model, VALUES), whole)
    with pytest.raises(ValueError, match="expected one with an active JoLA, curvature, joint or LoRA adapter"):
        set_strength(build("llama"), 0.5)
    merged = edited()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"o_proj: scaling needs unmerged adapters, got \['default'\] merged"):
        set_strength(merged, 0.5)


@pytest.mark.parametrize("kind", ["jola", "curvature"])
def test_another_strength_needs_no_new_graph(kind):
    model, values = (edited(), VALUES) if kind == "jola" else (shaken(tuned()), {"x": image()})
    set_strength(model, 0.5)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(**values)
        graphs = counter.frame_count
        for strength in (0.25, 0.75, 0.0, 1.0):
            set_strength(model, strength)
            got, want = compiled(**values), model(**values)
            got, want = (v if isinstance(v, torch.Tensor) else v.logits for v in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert graphs > 0
    assert counter.frame_count == graphs
    torch.compiler.reset()
