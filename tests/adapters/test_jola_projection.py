"""JoLA's edit in the weights of the projection: the same as before it, in training and inference, or a reason why not."""

from __future__ import annotations

import pytest
import torch
from jola_families import build
from torch import nn

from ctkernels.ops.head_edit_linear import cost_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
layers = pytest.importorskip("ctkernels.adapters.jola.layer")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TOKENS = torch.arange(96).view(6, 16) * 7 % 31 + 1  # more than the 32 outputs of a projection
EXACT = {"rtol": 1e-11, "atol": 1e-13}


@pytest.fixture(autouse=True)
def free_launches(monkeypatch):
    """The cost model chooses on the CPU as it does on a GPU, where launches are free."""
    monkeypatch.setattr(cost_model, "LAUNCH", {"cpu": 0})


@pytest.fixture
def folded(monkeypatch):
    """The sites of the calls with the edit in the weights."""
    seen = []
    in_weights = layers.JolaLayer._in_weights

    def noted(layer, z):
        y = in_weights(layer, z)
        seen.extend([layer.site] * (y is not None))
        return y

    monkeypatch.setattr(layers.JolaLayer, "_in_weights", noted)
    return seen


def _model(name="llama", dtype=torch.float64, **values):
    model = build(name).to(dtype)
    torch.manual_seed(2)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", **({"init_std": 0.3, "init_log_alpha": 0.5} | values))
    return peft.get_peft_model(model, config).train()


def _layer(model):
    return next(module for module in model.modules() if isinstance(module, adapters.JolaLayer))


def _step(model):
    """Logits and gradients of a training step."""
    model.zero_grad()
    torch.manual_seed(9)  # gates are sampled
    result = model(input_ids=TOKENS, labels=TOKENS)
    result.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": result.logits.detach()} | grads


def _apart(monkeypatch):
    return monkeypatch.setattr(cost_model, "choose", lambda *args: cost_model.SEPARATE)


VARIANTS = {
    "sampled gates": {},
    "frozen gates": {"freeze_gates": True},
    "multiplicative": {"edit": "multiplicative"},
    "additive": {"edit": "additive"},
    "offsets of value heads": {"additive": "kv_group"},
    "some heads": {"heads": {"model.layers.0.self_attn.o_proj": [1], "model.layers.1.self_attn.o_proj": [0, 2, 3]}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training(variant, folded, monkeypatch):
    model = _model(**VARIANTS[variant])
    found = _step(model)
    assert len(folded) == 2
    again = _step(model)
    assert all(torch.equal(again[name], value) for name, value in found.items())
    _apart(monkeypatch)
    expected = _step(model)
    assert len(folded) == 4
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


def test_inference_and_strength(folded, monkeypatch):
    model = _model().eval()
    adapters.set_strength(model, 0.5)
    with torch.no_grad():
        found = model(TOKENS).logits
        assert len(folded) == 2
        assert len(model(TOKENS[:1]).logits) == 1  # 16 tokens
        assert len(folded) == 2
        _apart(monkeypatch)
        torch.testing.assert_close(found, model(TOKENS).logits, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, folded):
    model = _model()
    expected = _step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    folded.clear()
    found = _step(model)
    assert len(folded) == 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


def test_autocast(folded):
    """Where the model is in the dtype of autocast; float32 weights would be rounded twice."""
    for dtype, calls in ((torch.bfloat16, 2), (torch.float32, 0)):
        model = _model(dtype=dtype).eval()
        folded.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = model(TOKENS).logits.double()
        assert len(folded) == calls
        exact = model.double()(TOKENS).logits
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_compiled(folded):
    layer = _layer(_model(dtype=torch.float32))
    z = torch.randn(6, 16, 32, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        torch.manual_seed(4)
        y = module(z)
        results.append(
            [y.detach(), *torch.autograd.grad(y.sum(), [z, *(p for p in layer.parameters() if p.requires_grad)])]
        )
    assert len(folded) == 2
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_for_every_size(strict):
    layer, z = _layer(_model().eval()), torch.randn(6, 16, 32, dtype=torch.float64)
    program = torch.export.export(layer, (z,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict).module()
    for rows in (2, 6):
        torch.testing.assert_close(program(z[:rows]), layer(z[:rows]), **EXACT)


def _reason(layer, z=None):
    z = torch.randn(6, 16, 32, dtype=layer.get_base_layer().weight.dtype) if z is None else z
    return layer.explain(z).removeprefix(f"{layer.site}: ")


def test_what_a_site_says(monkeypatch):
    model = _model()
    layer = _layer(model)
    assert _reason(layer) == (
        "in the projection's weights: that costs as much as moving 0.0655 MB, a pass over its input 0.0983 MB"
    )  # fmt: skip
    assert _reason(layer, torch.randn(3, 32, dtype=torch.float64)).startswith("in a pass over its input: that costs")
    with torch.no_grad():
        assert _reason(layer, torch.randn(33, 32, dtype=torch.float64)).startswith("in the projection's weights")
    handle = layer.on_edited(lambda z: None)
    assert _reason(layer) == "by itself: a hook, such as a monitor's, is on the layer"
    handle.remove()
    model.add_adapter("second", adapters.JolaConfig(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    assert _reason(layer) == "by itself: several adapters are active: default, second"
    model.set_adapter("second")
    assert _reason(layer).startswith("in the projection's weights")
    layer.base_layer.weight.requires_grad_()
    assert _reason(layer) == "in a pass over its input: the projection's weights need a gradient"
    layer.base_layer.weight.requires_grad_(False)
    handle = layer.base_layer.register_forward_hook(lambda *args: None)
    assert _reason(layer).endswith("it has hooks, or a forward of its own")
    handle.remove()
    with model.disable_adapter():
        assert _reason(layer) == "by itself: no unmerged adapter is active"
    model.merge_adapter()
    assert _reason(layer) == "by itself: no unmerged adapter is active"


def test_on_a_cpu_it_is_not_chosen(monkeypatch):
    monkeypatch.undo()
    assert _reason(_layer(_model())) == "in a pass over its input: on cpu the other way does not pay"


def test_rows_and_other_kinds():
    assert _reason(_layer(_model(gate_sampling="row"))) == "by itself: gates are sampled for each row"
    assert _reason(_layer(_model(gate_sampling="row").eval())).startswith("in the projection's weights")
    assert _reason(_layer(_model(site="mlp"))) == "by itself: the edit is of the projection's output"
    assert _reason(_layer(_model("gpt2"))) == "by itself: the projection is a Conv1D"


def test_a_mixed_batch_is_edited_before_the_projection(folded):
    model = _model().eval()
    model.add_adapter("second", adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.5))
    with torch.no_grad():
        mixed = model(TOKENS, adapter_names=["default", "second", "__base__"] * 2).logits
        assert folded == []
        torch.testing.assert_close(mixed[::3], model(TOKENS[::3].repeat(2, 1)).logits[:2], **EXACT)
    assert len(folded) == 2


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
@pytest.mark.parametrize("over", [True, False])
def test_another_adapter_on_the_same_projection(over, folded):
    base = build("llama").double()
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    jola = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.3)
    first, second = (jola, lora) if over else (lora, jola)
    model = peft.get_peft_model(peft.get_peft_model(base, first).base_model.model, second)
    model(TOKENS)
    assert bool(folded) is over  # below a LoRA, the projection of the JoLA layer is the plain one
    if not over:
        assert _reason(_layer(model), torch.randn(96, 32)) == "by itself: the projection is a Linear"


def test_a_projection_of_another_class(folded):
    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x.round())

    model = _model()
    layer = _layer(model)
    layer.base_layer.__class__ = Quantised
    model(TOKENS)
    assert len(folded) == 1
    assert "the projection is not a plain linear layer" in _reason(layer)
