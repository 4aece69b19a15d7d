"""Additive edits that heads with the same values share: training, units, gates, files, mixed batches, merging."""

from __future__ import annotations

import pytest
import torch
from jola_families import build, inputs, output
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama")
HEADS, GROUPS, SIZE = 4, 2, 8


def _config(**values):
    return adapters.JolaConfig(task_type="CAUSAL_LM", **({"additive": "kv_group", "init_std": 0.4} | values))


def _model(family="llama", seed=2, **values):
    torch.manual_seed(seed)
    return peft.get_peft_model(build(family).double(), _config(**values)).eval()


def _layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def _half_open(model):
    """Gates of all sizes, none of them 0 or 1."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_alpha" in name:
                parameter.uniform_(-0.1, 0.1)


def _near(got, expected, dtype=torch.float64):
    # the two differ by the order of a few hundred sums and products in two layers
    assert (got - expected).abs().max() <= 1e3 * torch.finfo(dtype).eps * expected.abs().max()


def _gate(log_alpha):
    return (1.2 * torch.sigmoid(10 * log_alpha) - 0.1).clamp(0, 1)


def test_a_group_shares_an_offset_and_a_gate_which_the_scale_of_each_head_applies_to():
    model = _model()
    _half_open(model)
    layer = _layers(model)[0]
    assert (layer.num_heads, layer.num_kv_heads) == (HEADS, GROUPS)
    assert layer.jola_a["default"].shape == (GROUPS, SIZE)
    assert layer.jola_m["default"].shape == (HEADS, SIZE)
    assert layer.jola_log_alpha_a["default"].shape == (GROUPS,)
    z = torch.randn(3, 5, HEADS * SIZE, dtype=torch.float64)
    expected = z.clone()
    for head in range(HEADS):
        part = slice(head * SIZE, head * SIZE + SIZE)
        m = _gate(layer.jola_log_alpha_m["default"][head]) * layer.jola_m["default"][head]
        a = _gate(layer.jola_log_alpha_a["default"][head // 2]) * layer.jola_a["default"][head // 2]
        expected[..., part] = (1 + m) * (z[..., part] + a)
    torch.testing.assert_close(layer.edit(z, "default").double(), expected, rtol=1e-6, atol=1e-6)
    for given in (layer.vectors("a", "default"), layer.gates("default", training=False)["a"]):
        assert len(given) == HEADS
        assert torch.equal(given[0::2], given[1::2])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi"])
def test_it_is_a_bias_of_the_values(family):
    """As exactly as attention weights sum to 1."""
    model, values = _model(family), inputs(family)
    _half_open(model)
    expected, untouched = output(model, values), output(build(family).double(), values)
    plain = build(family).double()
    for layer in _layers(model):
        attention = plain.get_submodule(layer.site.rsplit(".", 1)[0])
        p, _ = layer.factors(["default"])
        projection = plain.get_submodule(layer.site)
        projection.weight.data *= p
        offset = layer.offsets(["default"])
        assert offset.shape == (GROUPS, SIZE)
        bias = 0 if attention.v_proj.bias is None else attention.v_proj.bias.data
        attention.v_proj.bias = nn.Parameter(bias + offset.flatten())
    assert (expected - untouched).abs().max() > 1e-2 * untouched.abs().max()
    # its attention is computed in Python, where the softmax is one of float32
    _near(output(plain, values), expected, torch.float32 if family == "gemma2" else torch.float64)


def test_a_head_scaled_by_zero_is_no_obstacle_here_and_is_one_for_offsets_by_head():
    model = _model(gate_estimator="clip", init_log_alpha=10.0)
    with torch.no_grad():
        _layers(model)[0].jola_m["default"][1].fill_(-1)
    assert bool(_layers(model)[0].offsets(["default"]).isfinite().all())
    by_head = _model("opt", additive="head", init_log_alpha=10.0)
    layer = _layers(by_head)[0]
    assert layer.offsets(["default"]).shape == (HEADS, SIZE)
    with torch.no_grad():
        layer.jola_m["default"][2, 3] = -1
    with pytest.raises(ValueError, match="head 2 is scaled by 0 in dimension 3 and something is added there"):
        layer.offsets(["default"])
    with torch.no_grad():
        layer.jola_a["default"][2, 3] = 0
    assert float(layer.offsets(["default"])[2, 3]) == 0


def test_offsets_that_differ_within_a_group_are_none_of_the_values():
    layer = _layers(_model(additive="head"))[0]
    with pytest.raises(
        ValueError, match="2 heads share values, and their offsets differ; train with additive='kv_group'"
    ):
        layer.offsets(["default"])


@pytest.mark.parametrize("by", ["forward", "row"])
def test_training_moves_offsets_and_their_gates(by):
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), _config(init_std=0.01, gate_sampling=by))
    tokens = VALUES["input_ids"]
    optimizer = torch.optim.Adam(adapters.parameter_groups(model, lr=0.02))
    before = [
        parameter.clone() for layer in _layers(model) for parameter in layer.parameters() if parameter.requires_grad
    ]
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss + 0.01 * adapters.jola_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = [parameter for layer in _layers(model) for parameter in layer.parameters() if parameter.requires_grad]
    assert len(after) == 8
    assert all(not torch.equal(a, b) for a, b in zip(after, before))


def test_units_are_those_of_a_group():
    torch.manual_seed(2)
    model = peft.get_peft_model(build("llama"), _config()).eval()
    by_head = peft.get_peft_model(build("llama"), _config(additive="head")).eval()
    expected = output(model, VALUES)
    sizes = adapters.measure_units(model, [VALUES])
    adapters.measure_units(by_head, [VALUES])
    for layer, other in zip(_layers(model), _layers(by_head)):
        assert len(sizes[layer.site]) == HEADS
        squares = other.jola_unit_a["default"].square().view(GROUPS, -1)
        torch.testing.assert_close(layer.jola_unit_a["default"], squares.mean(1).sqrt())
    torch.testing.assert_close(output(model, VALUES), expected, rtol=1e-5, atol=1e-5)


def test_files_hold_a_row_for_each_group(tmp_path):
    model = _model()
    _half_open(model)
    expected = output(model, VALUES)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama").double(), tmp_path).eval()
    assert again.peft_config["default"].additive == "kv_group"
    assert torch.equal(output(again, VALUES), expected)
    config = adapters.JolaConfig.from_pretrained(tmp_path)
    config.additive = "head"
    with pytest.raises(ValueError, match=r"jola_a: expected shape \(4, 8\), got \(2, 8\)"):
        peft.get_peft_model(build("llama"), config)


def test_closed_groups_are_dropped(tmp_path):
    model = _model()
    with torch.no_grad():
        for layer in _layers(model):
            layer.jola_log_alpha_a["default"][0] = -1.0  # closed
            layer.jola_log_alpha_m["default"][1] = -1.0
    expected = output(model, VALUES)
    site = _layers(model)[0].site
    assert adapters.open_heads(model)[site] == {"m": [0, 2, 3], "a": [2, 3]}
    assert adapters.gate_map(model).a[0][:2] == (0.0, 0.0)
    assert adapters.drop_closed_heads(model) == 2 * (1 + 1)
    assert _layers(model)[0].jola_a["default"].shape == (1, SIZE)
    _near(output(model, VALUES), expected)
    adapters.save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama").double(), tmp_path).eval()
    assert torch.equal(output(again, VALUES), output(model, VALUES))


@pytest.mark.parametrize("other", ["head", "kv_group"])
def test_beside_another_adapter(other):
    """Merged one after the other, mixed in a batch, active together."""
    model = _model()
    torch.manual_seed(9)
    model.add_adapter("second", _config(additive=other))
    _half_open(model)
    single = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        single[name] = output(model, VALUES)
    with torch.no_grad():
        mixed = model(**VALUES, adapter_names=["default", "second"]).logits
    for row, name in enumerate(single):
        torch.testing.assert_close(mixed[row], single[name][row], rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    both = output(model, VALUES)
    model.merge_adapter()
    torch.testing.assert_close(output(model, VALUES), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, VALUES), both)


def test_inside_attention_it_is_the_same():
    model = _model(seed=4).float()
    expected = output(model, VALUES)
    handle = adapters.fuse_attention(model)
    torch.testing.assert_close(output(model, VALUES), expected, rtol=1e-4, atol=1e-5)
    handle.remove()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"additive must be one of \('head', 'kv_group'\), got 'group'"):
        adapters.JolaConfig(additive="group")
    with pytest.raises(
        ValueError, match=r"o_proj: with additive='kv_group', heads must be whole groups of 2 .* got \[0, 2, 3\]"
    ):
        _model(heads=[0, 2, 3])
    _model(heads={"0": {"m": [1], "a": [2, 3]}})
    with pytest.raises(
        ValueError, match="needs to know which heads share values, and no projection of values was found"
    ):
        _model("deepseek_v3")
    _model("deepseek_v3", edit="multiplicative")
