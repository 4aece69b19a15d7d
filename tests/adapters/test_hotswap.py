"""A saved adapter in the place of one on a model: the same objects, no new graph, and all or nothing."""

from __future__ import annotations

import pytest
import torch
from jola_families import build, inputs, output

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from curvature_networks import image, make_net, shaken  # noqa: E402
from torch._dynamo.testing import CompileCounter  # noqa: E402

VALUES = inputs("llama")
JOLA = {"init_std": 0.5, "init_log_alpha": 0.5}
CONFIGS = {
    "jola": lambda: adapters.JolaConfig(task_type="CAUSAL_LM", **JOLA),
    "block": lambda: adapters.JolaConfig(task_type="CAUSAL_LM", site="block", **JOLA),
    "joint": lambda: adapters.JointConfig(
        task_type="CAUSAL_LM",
        jola=JOLA,
        curvature={"init_beta": 0.3},
        lora={"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False},
    ),
}


def made(kind, seed):
    base = build("llama")  # sets the seed
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, CONFIGS[kind]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("curvature" in name or "log_alpha" in name):
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_was_compiled_computes_the_other_adapter(kind, tmp_path):
    other = made(kind, 7)
    adapters.measure_units(other, [VALUES])  # units are swapped too
    want = output(other, VALUES)
    adapters.save_adapter(other, tmp_path)
    model = made(kind, 3)
    model.add_adapter("beside", CONFIGS[kind]())
    model.set_adapter("beside")
    beside = output(model, VALUES)
    model.set_adapter("default")
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    before = output(compiled, VALUES)
    graphs = counter.frame_count
    adapters.hotswap_adapter(compiled, tmp_path)
    after = output(compiled, VALUES)
    assert graphs > 0
    assert counter.frame_count == graphs
    torch.compiler.reset()
    torch.testing.assert_close(after, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)
    assert torch.equal(output(model, VALUES), want)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    model.set_adapter("beside")
    assert torch.equal(output(model, VALUES), beside)


def test_modules_trained_beside_it_are_swapped_too(tmp_path):
    def head(seed):
        torch.manual_seed(seed)
        config = adapters.CurvatureConfig(modules_to_save=["fc"])
        model = shaken(peft.get_peft_model(make_net(), config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        return model

    other, model = head(1), head(2)
    want = other(image())
    adapters.save_adapter(other, tmp_path)
    adapters.hotswap_adapter(model, tmp_path)
    assert torch.equal(model(image()), want)


def _saved(folder, config, family="llama"):
    torch.manual_seed(1)
    model = peft.get_peft_model(build(family), config)
    adapters.save_adapter(model, folder)
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"site": "mlp"}, r"expected site='head' as in adapter 'default', got 'mlp'; load it beside"),
        ({"temperature": 0.5}, r"expected temperature=0\.33"),
        ({"gate_estimator": "mean"}, "expected gate_estimator='clip'"),
        ({"heads": [0, 1]}, r"expected heads=None as in adapter 'default', got \[0, 1\]"),
        ({"edit": "additive"}, "expected edit='both'"),
        ({"layers_to_transform": [0]}, "The adapter is incomplete: missing"),
        ({"modules_to_save": ["lm_head"]}, "expected modules_to_save=None"),
    ],
)
def test_adapters_that_differ_are_refused_and_nothing_changes(values, message, tmp_path):
    _saved(tmp_path, adapters.JolaConfig(task_type="CAUSAL_LM", **JOLA | values))
    model = made("jola", 3)
    before = output(model, VALUES)
    with pytest.raises(ValueError, match=message):
        adapters.hotswap_adapter(model, tmp_path)
    assert torch.equal(output(model, VALUES), before)


def test_what_does_not_matter_may_differ(tmp_path):
    values = {"freeze_gates": True, "gate_sampling": "row", "target_modules": ["o_proj"], "gate_rate": 1.0}
    config = adapters.JolaConfig(task_type="CAUSAL_LM", **JOLA | values)
    adapters.hotswap_adapter(made("jola", 3), _saved(tmp_path, config))


def test_other_errors(tmp_path):
    model = made("jola", 3)
    _saved(tmp_path / "jola", CONFIGS["jola"]())
    with pytest.raises(ValueError, match=r"adapter: expected one of \['default'\], got 'x'"):
        adapters.hotswap_adapter(model, tmp_path / "jola", "x")
    with pytest.raises(ValueError, match="path: expected the folder of a saved adapter"):
        adapters.hotswap_adapter(model, tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"expected .*JOLA.*CURVATURE"):
        adapters.hotswap_adapter(model, _saved(tmp_path / "ct", adapters.CurvatureConfig(task_type="CAUSAL_LM")))
    lora = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected a JoLA, curvature or joint adapter, got a LoraConfig"):
        adapters.hotswap_adapter(lora, tmp_path / "jola")
    joint = _saved(tmp_path / "joint", CONFIGS["joint"]())
    other = made("joint", 1)
    other.peft_config["default"].lora.lora_alpha = 16
    with pytest.raises(ValueError, match=r"expected lora\.lora_alpha=16 as in adapter 'default', got 8"):
        adapters.hotswap_adapter(other, joint)
    model.merge_adapter()
    with pytest.raises(ValueError, match="o_proj: swapping needs an unmerged adapter, got 'default' merged"):
        adapters.hotswap_adapter(model, tmp_path / "jola")


def test_closed_gates_are_counted_apart():
    for values, width in (({}, 8), ({"additive": "kv_group"}, 8), ({"site": "mlp"}, 32)):
        torch.manual_seed(0)
        model = peft.get_peft_model(build("llama"), adapters.JolaConfig(task_type="CAUSAL_LM", **values))
        count = adapters.count_parameters(model)
        assert (count.trainable, count.total) == model.get_nb_trainable_parameters()
        assert count.behind_closed_gates == 0
        layers = [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]
        with torch.no_grad():
            layers[0].jola_log_alpha_m["default"][0] = -10
            layers[1].jola_log_alpha_a["default"][:] = -10
        rows = 1 + len(layers[1].jola_log_alpha_a["default"])
        closed = adapters.count_parameters(model)
        assert closed.behind_closed_gates == rows * (width + 1)
        assert f"effective: {closed.effective:,} ||" in str(closed)
        adapters.freeze_gates(model)  # log alphas are no longer trained
        assert adapters.count_parameters(model).behind_closed_gates == rows * width
        adapters.drop_closed_heads(model)
        smaller = adapters.count_parameters(model)
        assert (smaller.behind_closed_gates, smaller.trainable) == (
            0,
            count.trainable - closed_numbers(layers, rows, width),
        )
    assert adapters.count_parameters(build("llama")).trainable == sum(p.numel() for p in build("llama").parameters())


def closed_numbers(layers, rows, width):
    """What dropping closed heads takes, and what freezing gates does."""
    frozen = sum(
        p.numel()
        for layer in layers
        for table in (layer.jola_log_alpha_m, layer.jola_log_alpha_a)
        for p in table.values()
    )
    return rows * (width + 1) + frozen
