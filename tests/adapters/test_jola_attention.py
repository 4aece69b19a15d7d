"""JoLA inside transformers' attention, held to the edit in the projection: every family, training, caches, padding."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from jola_families import FAMILIES, build, inputs, output

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

attention = pytest.importorskip("ctkernels.adapters.jola.attention")

_LISTED = attention.FAMILIES
# Families whose attention, or whose mask, transformers took to its interface in version 5.
_LATE = """
    albert beit bert camembert distilbert electra ernie layoutlm modernbert nemotron olmoe phimoe qwen2_moe roberta
    stablelm swin xlm-roberta
"""
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_IS_OLD = _VERSION < (5,)
_OLD = (_LATE.split() if _IS_OLD else []) + (["codegen", "gptj"] if _VERSION < (5, 24) else [])
_OTHER_MASK = ["granitemoe", "persimmon"] if _IS_OLD else []

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:JoLA edits only a part:UserWarning"
)


def _attach(name, **values):
    torch.manual_seed(7)
    return peft.get_peft_model(build(name), adapters.JolaConfig(**({"init_std": 0.3} | values))).eval()


@pytest.fixture
def calls(monkeypatch):
    """The calls of the fused function."""
    seen: list[dict] = []
    function = attention.attention_head_edit

    def counted(*args, **kwargs):
        seen.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(attention, "attention_head_edit", counted)
    return seen


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_equals_the_edit_in_the_projection_or_is_refused(name, calls):
    """Also for a family that is refused only because it was not known: it does not go through the interface, or differs."""
    model, values = _attach(name), inputs(name)
    expected = output(model, values)
    if name not in attention.FAMILIES:
        with pytest.raises(ValueError, match=f"model_type must be one of .* got '{name}'"):
            adapters.fuse_attention(model)
        assert torch.equal(output(model, values), expected)
        return
    if name in _OLD:
        with pytest.raises(ValueError, match=r'of this version of transformers brings its own|must be "sdpa", got'):
            adapters.fuse_attention(model)
        assert torch.equal(output(model, values), expected)
        return
    handle = adapters.fuse_attention(model)
    assert len(handle.sites) == FAMILIES[name].sites
    if name in _OTHER_MASK:
        torch.testing.assert_close(output(model, values), expected)
    else:  # the same torch attention and the same edit, on CPU: the same bits
        assert torch.equal(output(model, values), expected)
    assert len(calls) >= FAMILIES[name].sites
    handle.remove()
    count = len(calls)
    assert torch.equal(output(model, values), expected)
    assert len(calls) == count


def test_no_family_is_left_out_that_would_do(monkeypatch, calls):
    """A family outside the table has another attention, does not ask the interface, or does more before it projects."""
    monkeypatch.setattr(attention, "FAMILIES", frozenset(FAMILIES))
    would_do = []
    for name in sorted(set(FAMILIES) - _LISTED):
        model, values = _attach(name), inputs(name)
        if {m.config._attn_implementation for m in model.modules() if isinstance(m, transformers.PreTrainedModel)} != {
            "sdpa"
        }:
            with pytest.raises(ValueError, match="the attention implementation must be"):
                adapters.fuse_attention(model)
            continue
        expected = output(model, values)
        if not all(attention._asks_interface(owner) for _, owner in attention._owners(model)):
            with pytest.raises(ValueError, match="brings its own"):
                adapters.fuse_attention(model)
            continue
        calls.clear()
        adapters.fuse_attention(model)
        if torch.equal(output(model, values), expected) and len(calls) >= FAMILIES[name].sites:
            would_do.append(name)
    assert would_do == []


LANGUAGE = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt", "cohere2", "deepseek_v3"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_padding_is_honoured(name, side, calls):
    """The failure this guards against: without a registered mask function padding is attended to."""
    model = _attach(name)
    tokens = inputs(name, batch=1)["input_ids"]
    padding = torch.zeros(1, 3, dtype=torch.long)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    mask = torch.cat([torch.full_like(part, int(part is tokens)) for part in parts], 1)
    values = {"input_ids": torch.cat(parts, 1), "attention_mask": mask}
    expected = output(model, values)
    adapters.fuse_attention(model)
    found = output(model, values)
    own = slice(3, None) if side == "left" else slice(None, tokens.shape[1])
    assert torch.equal(found[:, own], expected[:, own])
    assert any(call["attn_mask"] is not None for call in calls)


@pytest.mark.parametrize("name", [*LANGUAGE, "bart", "whisper"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache(name, beams, calls):
    model = _attach(name, init_std=2.0)
    if FAMILIES[name].kind == "audio":
        values = {"input_features": inputs(name)["input_features"]}
    else:
        mask = torch.ones(2, 6, dtype=torch.long)
        if FAMILIES[name].kind == "tokens":
            mask[1, :2] = 0
        values = {"input_ids": inputs(name)["input_ids"], "attention_mask": mask}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    expected = model.generate(**values, **options)
    adapters.fuse_attention(model)
    assert torch.equal(model.generate(**values, **options), expected)
    assert torch.equal(model.generate(**values, **options, use_cache=False), expected)
    assert calls


def test_a_static_cache():
    model = _attach("llama", init_std=2.0)
    values = {"input_ids": inputs("llama")["input_ids"], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    expected = model.generate(**values, **options)
    adapters.fuse_attention(model)
    assert torch.equal(model.generate(**values, **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [name for name in ("llama", "gpt2", "bert") if name not in _OLD])
def test_training(name, checkpointing, calls):
    """The same gates are sampled and the same gradients come out, with gradient checkpointing too."""
    model = _attach(name, init_log_alpha=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for rate in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        result = model(**inputs(name))
        loss = getattr(result, "logits", getattr(result, "last_hidden_state", None)).square().mean()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    loss, grads = step()
    adapters.fuse_attention(model)
    again, found = step()
    assert calls
    assert torch.equal(again, loss)
    assert found.keys() == grads.keys()
    assert all(any(p.abs().max() > 0 for n, p in found.items() if kind in n) for kind in ("jola_m", "log_alpha_a"))
    for n, g in grads.items():
        torch.testing.assert_close(found[n], g, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_fused_is_edited_in_the_projection(calls):
    model, values = _attach("llama"), inputs("llama")
    model.add_adapter("other", adapters.JolaConfig(init_std=0.5))

    def situations():
        model.base_model.set_adapter(["default", "other"])
        yield output(model, values)
        model.set_adapter("default")
        with model.disable_adapter():
            yield output(model, values)
        yield output(model, values | {"adapter_names": ["other", "__base__"]})
        model.merge_adapter(["default"])
        yield output(model, values)
        model.unmerge_adapter()
        with adapters.EditMonitor(model, every=1) as monitor:
            yield output(model, values)
        yield torch.tensor([site["mean"] for site in monitor.statistics().values()])

    expected = list(situations())
    adapters.fuse_attention(model)
    for ours, theirs in zip(situations(), expected):
        assert torch.equal(ours, theirs)
    assert not calls
    output(model, values)
    assert calls


def test_gates_sampled_by_row_stay_in_the_projection(calls):
    model = _attach("llama", gate_sampling="row").train()
    adapters.fuse_attention(model)
    output(model, inputs("llama"))
    assert not calls
    output(model.eval(), inputs("llama"))
    assert calls


def test_some_layers_and_heads(calls):
    for options in ({"layers_to_transform": [1]}, {"heads": {"0": [1, 3]}}, {"heads": {"1": {"m": [0], "a": []}}}):
        model, values = _attach("llama", **options), inputs("llama")
        expected = output(model, values)
        calls.clear()
        assert len(adapters.fuse_attention(model).sites) == 1
        assert torch.equal(output(model, values), expected)
        assert len(calls) == 1


def test_an_error_in_the_attention_leaves_nothing_behind(monkeypatch):
    model, values = _attach("llama"), inputs("llama")
    expected = output(model, values)
    adapters.fuse_attention(model)
    projection = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer)).base_layer
    handle = projection.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        output(model, values)
    handle.remove()
    assert torch.equal(output(model, values), expected)


def test_two_threads_in_one_model(calls, monkeypatch):
    """Both are between attention and projection at once: each edit is made once in each thread."""
    model = _attach("llama", init_std=0.5)
    batches = [inputs("llama"), {"input_ids": inputs("llama")["input_ids"].flip(1)}]
    expected = [output(model, values) for values in batches]
    adapters.fuse_attention(model)
    meet, forward = threading.Barrier(2), adapters.JolaLayer.forward

    def meeting(self, *args, **kwargs):
        meet.wait(timeout=60)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(adapters.JolaLayer, "forward", meeting)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda values: output(model, values), batches))
    assert len(calls) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


def test_one_thread_with_the_attention_and_one_without(monkeypatch):
    """The second calls the projections alone, while the first is between its attention and its projection."""
    model = _attach("llama", init_std=0.5)
    values = inputs("llama")
    expected = output(model, values)
    layers = [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]
    x = torch.randn(2, 3, 32)
    alone = [layer(x) for layer in layers]
    adapters.fuse_attention(model)
    seen, forward = [], adapters.JolaLayer.forward

    def meanwhile(self, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                seen.extend(pool.submit(lambda: [layer(x) for layer in layers]).result())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(adapters.JolaLayer, "forward", meanwhile)
    assert torch.equal(output(model, values), expected)
    assert len(seen) == 2 * len(layers)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, alone * 2))


def test_a_model_run_inside_its_own_attention(monkeypatch):
    """Between attention and projection the whole model runs once more: no edit is lost or made twice in either run."""
    model, values = _attach("llama", init_std=0.5), inputs("llama")
    expected = output(model, values)
    adapters.fuse_attention(model)
    inner: list[torch.Tensor] = []
    forward = adapters.JolaLayer.forward

    def again(self, *args, **kwargs):
        if not inner:
            inner.append(torch.empty(0))
            inner.append(output(model, values))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(adapters.JolaLayer, "forward", again)
    assert torch.equal(output(model, values), expected)
    assert torch.equal(inner[1], expected)


def test_an_implementation_set_later_keeps_the_edits(calls):
    """Our attention function is not asked then: the projections edit."""
    model, values = _attach("llama", init_std=0.5), inputs("llama")
    adapters.fuse_attention(model)
    model.get_base_model().set_attn_implementation("eager")
    found = output(model, values)
    assert not calls
    plain = _attach("llama", init_std=0.5)
    plain.get_base_model().set_attn_implementation("eager")
    assert torch.equal(found, output(plain, values))


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_taking_the_layers_out_ends_the_fusion(way, calls):
    """Also in a copy, whose handle nobody has."""
    values, plain = inputs("llama"), build("llama").eval()
    model = _attach("llama", init_std=0.5)
    before = {name: set(vars(module)) for name, module in plain.named_modules()}
    expected = output(plain, values) if way == "unload" else output(model, values)
    handle = adapters.fuse_attention(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        bare = getattr(twin, way)()
        count = len(calls)
        torch.testing.assert_close(output(bare, values), expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == count
        assert bare.config._attn_implementation == "sdpa"
        assert {name: set(vars(module)) for name, module in bare.named_modules()} == before
    handle.remove()
    assert bare.config._attn_implementation == "sdpa"


def test_a_handle_removes_its_own_fusion_only(calls):
    model, values = _attach("llama"), inputs("llama")
    expected = output(model, values)
    first = adapters.fuse_attention(model)
    first.remove()
    second = adapters.fuse_attention(model)
    first.remove()
    assert torch.equal(output(model, values), expected)
    assert calls
    model.get_base_model().set_attn_implementation("eager")
    second.remove()
    assert model.get_base_model().config._attn_implementation == "eager"


def test_an_interrupt_in_the_attention_leaves_nothing_behind(monkeypatch):
    """Not even for a projection that is called on its own afterwards."""
    model, values = _attach("llama", init_std=0.5), inputs("llama")
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    x = torch.randn(2, 3, 32)
    expected, alone = output(model, values), layer(x)
    adapters.fuse_attention(model)
    forward = adapters.JolaLayer.forward

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters.JolaLayer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output(model, values)
    monkeypatch.setattr(adapters.JolaLayer, "forward", forward)
    assert torch.equal(layer(x), alone)
    assert torch.equal(output(model, values), expected)


def test_state_dict_copies_and_files_do_not_change(tmp_path, calls):
    model, values = _attach("llama"), inputs("llama")
    keys, expected = list(model.state_dict()), output(model, values)
    adapters.fuse_attention(model)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        count = len(calls)
        assert torch.equal(output(twin, values), expected)
        assert len(calls) > count
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "jola_m" in name:
                    parameter.zero_()
        assert torch.equal(output(model, values), expected)
        assert not torch.equal(output(twin, values), expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(output(again, values), expected)


def test_compiled():
    model, values = _attach("llama"), inputs("llama")
    expected = output(model, values)
    adapters.fuse_attention(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, values), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(compiled, values), expected, rtol=1e-5, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="expected a model with JoLA layers"):
        adapters.fuse_attention(build("llama"))
    model = _attach("llama")
    model.get_base_model().set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attention implementation must be \"sdpa\", got \['eager'\]"):
        adapters.fuse_attention(model)
