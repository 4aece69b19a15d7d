"""A pool of adapters: what rows compute, loading and evicting while requests run, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from jola_families import VOCAB, build, inputs, output
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import ctkernels

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = import_module("ctkernels.adapters")
AdapterPool, JolaConfig, CurvatureConfig = adapters.AdapterPool, adapters.JolaConfig, adapters.CurvatureConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama", batch=3)
NAMES = ["second", None, "default"]
PEFT_NAMES = ["second", "__base__", "default"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def trained(seed=2, names=("default", "second"), family="llama", **values):
    """A PeftModel with adapters unlike each other: gates open, half open and closed, units of their own."""
    model = None
    for name in names:
        config = JolaConfig(task_type="CAUSAL_LM" if family == "llama" else None, **values)
        if model is None:
            model = peft.get_peft_model(build(family), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "jola_log_alpha" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            elif "jola_unit_a" in name:
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif "jola_" in name and "unit" not in name:
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model.eval()


def pool_of(model=None, capacity=4, **values):
    return AdapterPool(build("llama") if model is None else model, JolaConfig(**values), capacity)


def filled(model, capacity=4):
    pool = pool_of(capacity=capacity)
    for name in model.peft_config:
        pool.load(name, model, adapter=name)
    return pool


def served(pool, names, values=VALUES, **how):
    with pool.batch(names, **how):
        return output(pool.model, values)


# ---- what rows compute ----


def test_rows_are_bit_for_bit_those_of_peft():
    model = trained()
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=PEFT_NAMES).logits
    pool = filled(model)
    plain = output(pool.model, VALUES)
    got = served(pool, NAMES)
    assert torch.equal(got, expected)
    assert torch.equal(got[1], plain[1])
    assert (got[0] - plain[0]).abs().max() > 1e-3
    assert torch.equal(served(pool, [None] * 3), plain)
    assert torch.equal(served(pool, PEFT_NAMES), expected)
    assert torch.equal(output(pool.model, VALUES), plain)


CONFIGS = {
    "one layer": {"layers_to_transform": [1]},
    "some heads": {"heads": {"0": [1, 3], "1": {"m": [0], "a": [2]}}},
    "additive": {"edit": "additive"},
    "multiplicative": {"edit": "multiplicative"},
    "mean gates": {"gate_estimator": "mean", "temperature": 0.5, "stretch": (-0.2, 1.3)},
    "offsets of the values": {"additive": "kv_group"},
    "gates frozen": {"freeze_gates": True},
}


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("from_folder", [False, True], ids=["model", "folder"])
def test_every_kind_of_adapter(values, from_folder, tmp_path):
    model = trained(names=("default",), **values)
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=["default"] * 3).logits
    pool = pool_of()
    state = torch.get_rng_state()
    if from_folder:
        adapters.save_adapter(model, tmp_path)
        pool.load("it", tmp_path)
    else:
        pool.load("it", model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(served(pool, ["it"] * 3), expected)


@pytest.mark.parametrize("values", [{}, {"additive": "kv_group"}, {"site": "mlp"}, {"site": "block"}], ids=str)
def test_strengths_are_those_of_the_model(values, tmp_path):
    """Every layer has its own strength, as after peft's scale_layer; a folder has none."""
    model = trained(**values)
    adapters.set_strength(model, 0.4, "second")
    adapters.set_strength(model, -1.5, "default")
    layers = [layer for layer in model.modules() if isinstance(layer, adapters.JolaLayer)]
    layers[0].set_scale("second", 2.5)
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=PEFT_NAMES).logits
        adapters.set_strength(model, 1.0)
        whole = model(**VALUES, adapter_names=["default"] * 3).logits
        adapters.set_strength(model, 0.25)
        part = model(**VALUES, adapter_names=["default"] * 3).logits
    assert (expected[2] - whole[2]).abs().max() > 1e-3
    pool = pool_of(**({"site": values["site"]} if "site" in values else {}))
    adapters.set_strength(model, -1.5, "default")
    for name in model.peft_config:
        pool.load(name, model, adapter=name)
    assert torch.equal(served(pool, NAMES), expected)
    pool.load("default", model, adapter="default", strength=0.25)
    assert torch.equal(served(pool, ["default"] * 3), part)
    model.save_pretrained(tmp_path)
    pool.load("folder", tmp_path)
    assert torch.equal(served(pool, ["folder"] * 3), whole)
    pool.load("folder", tmp_path, strength=0.25)
    assert torch.equal(served(pool, ["folder"] * 3), part)
    pool.load("folder", tmp_path, strength=0)
    assert torch.equal(served(pool, ["folder"] * 3), served(pool, [None] * 3))


def test_outputs_split_into_heads_of_another_size():
    """An edit is elementwise, so heads matter to gates alone, which are in the pool's rows."""
    model = trained(names=("default",), site="mlp", head_dim=8)
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=["default"] * 3).logits
    for head_dim in (None, 16):
        pool = pool_of(site="mlp", head_dim=head_dim)
        pool.load("it", model)
        torch.testing.assert_close(served(pool, ["it"] * 3), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_tables_have_the_dtype_of_the_arithmetic(default):
    """Whatever the default dtype is; in float64 where the model is."""
    model = trained(names=("default",)).double()
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=["default"] * 3).logits
    models = build("llama").double(), build("llama")
    torch.set_default_dtype(default)
    try:
        wide, narrow = (pool_of(model) for model in models)
        units = AdapterPool(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), CurvatureConfig(input_shape=(4,)), 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {table.dtype for table in narrow._tables.values()} == {torch.float32}
    assert {table.dtype for table in units._tables.values()} == {torch.float32}
    wide.load("it", model)
    assert torch.equal(served(wide, ["it"] * 3), expected)


def test_an_adapter_that_is_called_as_a_layer_is():
    model = trained(names=("0", "1"))
    pool = filled(model)
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=["1", "0", "__base__"]).logits
    assert torch.equal(served(pool, ["1", "0", None]), expected)


def test_an_adapter_of_the_open_heads_alone(tmp_path):
    model = trained(names=("default",))
    assert adapters.drop_closed_heads(model) > 0
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=["default"] * 3).logits
    adapters.save_adapter(model, tmp_path)
    pool = pool_of()
    pool.load("small", tmp_path)
    assert torch.equal(served(pool, ["small"] * 3), expected)


def test_a_file_without_units(tmp_path):
    from safetensors.torch import load_file, save_file

    model = trained(names=("default",), gate_rate=1.0)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if "jola_unit" in name:
                value.fill_(1)
        expected = model(**VALUES, adapter_names=["default"] * 3).logits
    adapters.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "unit" not in name}, file)
    pool = pool_of()
    pool.load("old", tmp_path)
    assert torch.equal(served(pool, ["old"] * 3), expected)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "qwen2"])
def test_other_families(family):
    values = inputs(family, batch=3)
    model = trained(family=family)
    with torch.no_grad():
        expected = model(**values, adapter_names=PEFT_NAMES)[0]
    pool = AdapterPool(build(family), JolaConfig(), 2)
    for name in model.peft_config:
        pool.load(name, model, adapter=name)
    assert torch.equal(served(pool, NAMES, values), expected)


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned sequences": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_generation(options):
    model = trained()
    pool = filled(model)
    values = dict(VALUES)
    values["attention_mask"] = torch.ones_like(values["input_ids"])
    values["attention_mask"][0, :2] = 0  # padded on the left
    with pool.batch(NAMES):
        got = pool.model.generate(**values, **GREEDY, **options)
    assert torch.equal(got, model.generate(**values, adapter_names=PEFT_NAMES, **GREEDY, **options))


def test_packed_tokens_of_several_samples():
    pool = filled(trained())
    lengths = [4, 3, 5]
    torch.manual_seed(4)
    rows = [torch.randint(3, VOCAB, (1, length)) for length in lengths]
    expected = torch.cat([served(pool, [name], {"input_ids": ids}) for name, ids in zip(NAMES, rows)], 1)
    packed = {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "use_cache": False,
    }
    got = served(pool, NAMES, packed, lengths=lengths)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"o_proj: the pool has an adapter for each of 11 packed tokens.*\(1, 12, 32\)"
    ):
        served(pool, NAMES, packed, lengths=[4, 3, 4])


def test_made_and_used_in_inference_mode():
    model = trained()
    with torch.inference_mode():
        pool = filled(model)
        expected = served(pool, NAMES)
    pool.load("default", model, adapter="default")
    assert torch.equal(served(pool, NAMES), expected)
    with torch.inference_mode():
        pool.load("default", model, adapter="default")
    assert torch.equal(served(pool, NAMES), expected)


def test_gradients_pass_through():
    pool = filled(trained())
    embedded = pool.model.get_input_embeddings()(VALUES["input_ids"]).detach().requires_grad_()
    with pool.batch(NAMES):
        (got,) = torch.autograd.grad(pool.model(inputs_embeds=embedded).logits.square().sum(), embedded)
    assert got.abs().sum() > 0


# ---- compilers and graphs ----


def test_one_compiled_graph_serves_every_batch():
    pool = filled(trained())
    expected = {
        names: served(pool, list(names)) for names in [tuple(NAMES), ("default",) * 3, ("second", "default", None)]
    }
    torch.compiler.reset()
    counter = CompileCounter()
    run = torch.compile(pool.model, backend=counter, fullgraph=True)
    for names, value in expected.items():
        with torch.no_grad(), pool.batch(names):
            torch.testing.assert_close(run(**VALUES).logits, value, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    pool.load("default", trained(seed=7, names=("default",)))
    newer = served(pool, NAMES)
    with torch.no_grad(), pool.batch(NAMES):
        torch.testing.assert_close(run(**VALUES).logits, newer, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert (newer[2] - expected[tuple(NAMES)][2]).abs().max() > 1e-3
    torch.compiler.reset()


class Attention(nn.Module):
    """As little as has heads."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        heads = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return self.o_proj(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))


def test_a_recorded_forward_reads_index_and_tables_anew():
    """As a replayed CUDA graph does: operators on the same tensors, and no Python."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    config = JolaConfig(target_modules=["o_proj"], head_dim=4, init_std=0.5)
    pool = AdapterPool(model, config, 2)
    for name in "ab":
        pool.load(name, peft.get_peft_model(copy.deepcopy(nn.Sequential(Attention(), Attention())), config))
    x = torch.randn(3, 5, 8)

    def run(names):
        with torch.no_grad(), pool.batch(names):
            return model(x)

    slots = {name: pool.acquire(name) for name in ("a", "b", None)}
    index = torch.tensor([slots["a"], slots["b"], slots[None]])
    with torch.no_grad(), pool.serve(index):
        replay = make_fx(lambda x: model(x))(x)
    assert not {"item", "_local_scalar_dense", "cpu"} & set(replay.code.replace("(", " ").replace(".", " ").split())
    assert torch.equal(replay(x), run(["a", "b", None]))
    index.copy_(torch.tensor([slots[None], slots["a"], slots["a"]]))
    assert torch.equal(replay(x), run([None, "a", "a"]))


# ---- what is in the pool ----


def test_the_least_recently_used_one_goes():
    model = trained(names=("default",))
    pool = pool_of(capacity=3)
    for name in "abc":
        assert pool.load(name, model) is None
    served(pool, ["a"] * 3)
    assert pool.names == ["b", "c", "a"]
    assert pool.load("d", model) == "b"
    pool.pin("c")
    assert pool.load("e", model) == "a"
    assert pool.names == ["c", "d", "e"]
    assert "a" not in pool
    assert len(pool) == 3
    assert repr(pool) == "AdapterPool(JOLA, 3 of 3 adapters)"
    assert pool.pinned == {"c"}
    with pytest.raises(ValueError, match="'c' is pinned; unpin"):
        pool.evict("c")
    pool.unpin("c")
    pool.evict("c")
    assert pool.load("f", model, pin=True) is None
    assert pool.pinned == {"f"}


def test_a_new_version_takes_its_own_place_in_a_full_pool():
    pool = pool_of(capacity=2)
    first, newer = trained(names=("default",)), trained(seed=7, names=("default",))
    pool.load("a", first, pin=True)
    pool.load("b", first)
    before = served(pool, ["a", "b", None])
    assert pool.load("a", newer) is None
    after = served(pool, ["a", "b", None])
    assert (after[0] - before[0]).abs().max() > 1e-3
    assert torch.equal(after[1:], before[1:])
    assert pool.pinned == {"a"}


def test_all_pinned_or_in_use_changes_nothing():
    model = trained(names=("default",))
    pool = pool_of(capacity=2)
    pool.load("a", model, pin=True)
    pool.load("b", model)
    before = served(pool, ["a", "b", None])
    with pool.batch(["b", "b", "b"]), torch.no_grad():
        with pytest.raises(adapters.PoolFullError, match="'c': of 2 adapters, 1 are pinned and 1 in use"):
            pool.load("c", model)
        pool.model(**VALUES)
    assert pool.names == ["a", "b"]
    assert torch.equal(served(pool, ["a", "b", None]), before)


def test_a_batch_keeps_the_version_it_began_with():
    first, newer = trained(names=("default",)), trained(seed=7, names=("default",))
    pool = pool_of(capacity=2)
    pool.load("a", first)
    before = served(pool, ["a"] * 3)
    with pool.batch(["a"] * 3):
        pool.load("a", newer)
        assert torch.equal(output(pool.model, VALUES), before)
        assert (served(pool, ["a"] * 3) - before).abs().max() > 1e-3
        pool.evict("a")
        pool.load("b", newer)  # into the slot that is free, not the one that is in use
        assert torch.equal(output(pool.model, VALUES), before)
        with pytest.raises(ValueError, match=r"expected an adapter of the pool \('b'\), got 'a'; load\(\) it"):
            served(pool, ["a"] * 3)
    assert pool.load("c", first) is None  # the slot is free again
    assert torch.equal(served(pool, ["c"] * 3), before)


def test_acquired_slots_are_kept_until_released():
    model = trained()
    pool = filled(model, capacity=2)
    expected = served(pool, NAMES)
    slots = [pool.acquire(name) for name in NAMES]
    pool.evict("default")
    with pytest.raises(adapters.PoolFullError):
        pool.load("x", model, adapter="second")
    with pool.serve(torch.tensor(slots, dtype=torch.int32)):
        assert torch.equal(output(pool.model, VALUES), expected)
    for slot in slots:
        pool.release(slot)
    with pytest.raises(ValueError, match="slot: expected one that was acquired and not released since, got"):
        pool.release(slots[2])
    pool.load("x", model, adapter="second")


def test_threads_load_and_serve_at_once():
    """Each thread has its own batch, and adapter "k" is always whole: all of version k or all of version -k."""
    versions = {seed: trained(seed=seed, names=("default",)) for seed in (1, 2, 3, 4)}
    pool = pool_of(capacity=5)  # "fixed", a version of "moving" in each thread, and the one being loaded
    expected = {}
    for seed, model in versions.items():
        pool.load("probe", model)
        expected[seed] = served(pool, ["probe"] * 3)
    pool.evict("probe")
    pool.load("fixed", versions[1])
    pool.load("moving", versions[2])
    done = threading.Event()

    def swap():
        count = 0
        while not done.is_set():
            for seed in (3, 4, 2):
                pool.load("moving", versions[seed])
                count += 1
        return count

    def serve(_):
        seen = set()
        for _ in range(15):
            got = served(pool, ["fixed", "moving", None])
            assert torch.equal(got[0], expected[1][0])
            matches = [seed for seed in (2, 3, 4) if torch.equal(got[1], expected[seed][1])]
            assert len(matches) == 1
            seen.add(matches[0])
        return seen

    with ThreadPoolExecutor(4) as threads:
        swapping = threads.submit(swap)
        try:
            seen = set().union(*threads.map(serve, range(3)))
        finally:
            done.set()
        assert swapping.result() > 3
    assert len(seen) > 1


# ---- curvature ----


def curvature_pool(net, capacity=3, **values):
    return AdapterPool(net, CurvatureConfig(**values), capacity)


def test_units_of_every_sample():
    from curvature_networks import image, make_net, shaken, tuned

    values = [{}, {"granularity": "layer"}, {"granularity": "shared"}, {"target_modules": ["act"]}, {"share": "site"}]
    x = image(2 * len(values) + 2)
    pool = curvature_pool(make_net(), len(values))
    plain = pool.model(x)
    expected, names = [plain[:2]], [None, None]
    for number, value in enumerate(values):
        model = shaken(tuned(**value)).eval()
        pool.load(f"a{number}", model)
        names += [f"a{number}"] * 2
        expected.append(model(x[2 * number + 2 : 2 * number + 4]))
    with pool.batch(names):
        got = pool.model(x)
    torch.testing.assert_close(got, torch.cat(expected))
    assert (got[2:] - plain[2:]).abs().amax(1).min() > 1e-3
    assert torch.equal(pool.model(x), plain)
    pool.remove()
    assert type(pool.model.act) is torch.nn.ReLU
    assert torch.equal(pool.model(x), plain)


def test_strengths_of_units():
    from curvature_networks import image, make_net, shaken, tuned

    x, model = image(2), shaken(tuned()).eval()
    pool = curvature_pool(make_net())
    whole = model(x)
    adapters.set_strength(model, 0.3)
    expected = model(x)
    pool.load("part", model)
    pool.load("whole", model, strength=1)
    pool.load("nothing", model, strength=0.0)
    for name, value in (("part", expected), ("whole", whole), ("nothing", make_net()(x))):
        with pool.batch([name] * 2):
            torch.testing.assert_close(pool.model(x), value)
    assert (expected - whole).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"strength: expected one from 0 to 1 for curvatures, got 1.5"):
        pool.load("part", model, strength=1.5)


def test_units_from_a_folder_in_a_language_model(tmp_path):
    torch.manual_seed(3)
    model = peft.get_peft_model(build("llama"), CurvatureConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "curvature_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapters.save_adapter(model.eval(), tmp_path)
    pool = curvature_pool(build("llama"))
    pool.load("it", tmp_path)
    with torch.no_grad():
        expected = model(**VALUES, adapter_names=["default", "__base__", "default"]).logits
    assert torch.equal(served(pool, ["it", None, "it"]), expected)
    with pool.batch(["it", None, "it"]):
        got = pool.model.generate(**VALUES, **GREEDY, num_beams=2)
    again = model.generate(**VALUES, adapter_names=["default", "__base__", "default"], **GREEDY, num_beams=2)
    assert torch.equal(got, again)
    ids = VALUES["input_ids"]
    packed = {"input_ids": ids[:2].reshape(1, -1), "position_ids": torch.arange(ids.shape[1]).repeat(2)[None]}
    packed["use_cache"] = False
    torch.testing.assert_close(
        served(pool, ["it", None], packed, lengths=[ids.shape[1]] * 2)[0].reshape(2, ids.shape[1], -1),
        served(pool, ["it", None], {"input_ids": ids[:2]}),
        rtol=1e-5,
        atol=1e-5,
    )


def test_both_methods_on_one_model():
    jola = trained()
    units = peft.get_peft_model(build("llama"), CurvatureConfig(init_beta=0.3))
    model = build("llama")
    curves = AdapterPool(model, CurvatureConfig(), 2)
    curves.load("it", units)
    edits = AdapterPool(model, JolaConfig(), 2)
    edits.load("second", jola, adapter="second")
    with edits.batch(["second", None, "second"]), curves.batch([None, "it", "it"]):
        got = output(model, VALUES)
    torch.testing.assert_close(got[0], served(edits, ["second"] * 3)[0])
    torch.testing.assert_close(got[1], served(curves, ["it"] * 3)[1])
    assert (got[2] - got[0]).abs().max() > 1e-3
    edits.remove()
    curves.remove()
    assert torch.equal(output(model, VALUES), output(build("llama"), VALUES))


# ---- what is refused ----


def refused(pool, match, *args, error=ValueError, **values):
    """Loading fails, and the pool is as it was."""
    names, before = pool.names, served(pool, pool.names[-1:] * 3)
    with pytest.raises(error, match=match):
        pool.load("new", *args, **values)
    assert pool.names == names
    assert torch.equal(served(pool, names[-1:] * 3), before)


def test_adapters_that_do_not_fit(tmp_path):
    model = trained()
    pool = filled(model, capacity=3)
    refused(pool, "expected a PeftModel or the folder of a saved adapter, got Linear", nn.Linear(2, 2))
    refused(pool, "expected a PeftModel or the folder of a saved adapter, got '.*nowhere'", tmp_path / "nowhere")
    refused(pool, r"adapter: the model has several, so expected one of \['default', 'second'\], got None", model)
    refused(pool, r"adapter: expected one of \['default', 'second'\], got 'third'", model, adapter="third")
    adapters.save_adapter(trained(names=("default",)), tmp_path / "good")
    refused(pool, "adapter: a folder holds one adapter, so expected None, got 'x'", tmp_path / "good", adapter="x")
    units = peft.get_peft_model(build("llama"), CurvatureConfig())
    refused(pool, "expected an adapter of type JOLA, got CURVATURE", units)
    adapters.save_adapter(units, tmp_path / "units")
    refused(pool, "expected an adapter of type JOLA, got CURVATURE", tmp_path / "units")
    head = peft.get_peft_model(build("llama"), JolaConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    refused(pool, r"got one with modules_to_save=\['lm_head'\], which a pool has no place for", head)
    for strength in (float("nan"), True, "half"):
        refused(pool, "strength: expected a finite number, or None, got", model, adapter="second", strength=strength)
    broken = trained(names=("default",))
    with torch.no_grad():
        broken.base_model.model.model.layers[1].self_attn.o_proj.jola_a["default"][0, 0] = torch.nan
    refused(pool, "expected finite values, got NaN or infinity in .*layers.1.*jola_a", broken)
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"cut short")
    refused(pool, "corrupt or cut short", tmp_path / "good")
    with pytest.raises(ValueError, match="adapter_name must not contain '/'"):
        pool.load("a/b", model, adapter="second")


def test_adapters_of_another_model(tmp_path):
    import transformers

    pool = filled(trained(), capacity=3)
    wide = transformers.AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    other = peft.get_peft_model(transformers.LlamaForCausalLM(wide), JolaConfig(task_type="CAUSAL_LM"))
    refused(pool, r"o_proj.jola_m: expected shape \(4, 8\), got \(4, 16\)", other)
    wide.num_hidden_layers = 3
    adapters.save_adapter(peft.get_peft_model(transformers.LlamaForCausalLM(wide), JolaConfig()), tmp_path)
    refused(pool, "does not fit this model: unknown .*layers.2", tmp_path)
    refused(pool, "does not fit this model|matched no module", trained(names=("default",), family="gpt2"))
    named = trained(names=("default",))
    named.peft_config["default"].base_model_name_or_path = "hub/llama-large"
    pool.base = "/data/llama-small/"
    refused(
        pool, "expected an adapter of /data/llama-small/, got one of hub/llama-large; .* base='hub/llama-large'", named
    )
    pool.base = "/data/Llama-Large"
    pool.load("same", named)


def test_edits_that_the_pool_has_no_table_for():
    both = trained(names=("default",))
    for values, match in (
        ({"edit": "additive"}, r"layers.0.self_attn.o_proj.m: .* got edit='additive'"),
        ({"layers_to_transform": [0]}, r"layers.1.self_attn.o_proj.m: .* layers_to_transform=\[0\]"),
    ):
        pool = pool_of(**values)
        pool.load("part", trained(names=("default",), **values))
        refused(pool, match, both)
    from curvature_networks import make_net, shaken, tuned

    pool = curvature_pool(make_net(), granularity="layer")
    with pytest.raises(
        ValueError, match=r"expected one value for the whole site, as the pool was made for, got Channels"
    ):
        pool.load("it", shaken(tuned()))
    pool.remove()
    pool = curvature_pool(make_net(), target_modules=["act"])
    with pytest.raises(ValueError, match="the adapter has a unit where the pool has none"):
        pool.load("it", shaken(tuned()))

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 6, 3), nn.ReLU()

        def forward(self, x):
            return self.other(self.conv(x))

    with pytest.raises(ValueError, match=r"layout: expected activations of this Net .*, got other"):
        pool.load("it", tuned(Other()))
    assert pool.names == []


def test_bad_arguments():
    model = build("llama")
    with pytest.raises(ValueError, match="config: expected a JolaConfig or a CurvatureConfig, got LoraConfig"):
        AdapterPool(model, peft.LoraConfig(), 2)
    with pytest.raises(ValueError, match=r"config: expected one without modules_to_save, .* got \['lm_head'\]"):
        AdapterPool(model, JolaConfig(modules_to_save=["lm_head"]), 2)
    for capacity in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"capacity: expected a number of adapters, at least 1, got {capacity}"):
            AdapterPool(model, JolaConfig(), capacity)
    with pytest.raises(
        MemoryError, match=r"capacity=1000000000000: .* adapters of 512 bytes need .* on cpu, more than"
    ):
        AdapterPool(model, JolaConfig(), 10**12)
    with pytest.raises(ValueError, match="matched no module"):
        AdapterPool(model, JolaConfig(target_modules=["nothing"]), 2)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    pool = AdapterPool(model, JolaConfig(), 2)
    with pytest.raises(ValueError, match="expected one without a pool of JOLA adapters, got one; remove"):
        AdapterPool(model, JolaConfig(), 2)
    with pytest.raises(ValueError, match="make the pool of curvature adapters first"):
        AdapterPool(model, CurvatureConfig(), 2)
    for names in ("a", [], [3]):
        with pytest.raises(ValueError, match=r"names: expected a name or None for each sample, got"):
            served(pool, names)
    with pytest.raises(ValueError, match=r"expected an adapter of the pool \(none\), got 'a'; load\(\) it"):
        served(pool, ["a"])
    for action in (pool.evict, pool.pin, pool.unpin, pool.acquire):
        with pytest.raises(ValueError, match="got 'a'"):
            action("a")
    with pytest.raises(ValueError, match="lengths: expected a number of tokens for each of 2 samples, got"):
        served(pool, [None, None], lengths=[3])
    with pytest.raises(
        ValueError, match=r"index: expected a tensor of int64 or int32 .*, got torch.float32 of shape \(2,\)"
    ):
        pool.serve(torch.zeros(2)).__enter__()
    pool.load("a", trained(names=("default",)))
    with pytest.raises(ValueError, match=r"each of 2 samples, .* got shape \(3, 6, 32\)"):
        served(pool, ["a", None])
    with pytest.raises(ValueError, match=r"index must lie in 0..2"), pool.serve(torch.tensor([0, 3, 1])):
        output(model, VALUES)
    pool.remove()
    with pytest.raises(ValueError, match="the pool is not on the model any more"):
        pool.remove()
    with pytest.raises(ValueError, match="expected one without JoLA layers, got one with"):
        AdapterPool(trained(), JolaConfig(), 2)
    steered = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    ctkernels.steer(steered, 0.9)
    with pytest.raises(ValueError, match="expected plain activations, got CT units"):
        AdapterPool(steered, CurvatureConfig(), 2)


def test_names_that_reach_no_site_are_an_error():
    """A block that is entered in another thread than the calls would leave every edit out."""
    pool = filled(trained())
    elsewhere = ThreadPoolExecutor(1).submit
    with pytest.raises(RuntimeError, match="no call of the model got to a site"), pool.batch(NAMES):
        elsewhere(output, pool.model, VALUES).result()
    with pool.batch([None] * 3):  # which leaves out nothing
        pass


def test_blocks_of_two_tasks_that_overlap_are_an_error():
    pool = filled(trained())
    first, second = pool.batch(NAMES), pool.batch(NAMES[::-1])
    first.__enter__()
    second.__enter__()
    output(pool.model, VALUES)
    with pytest.raises(RuntimeError, match="blocks of a pool overlap in one thread"):
        first.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="blocks of a pool overlap in one thread"):
        second.__exit__(None, None, None)


def test_a_projection_that_is_not_called_is_an_error():
    class Reads(Attention):
        def forward(self, x):
            return nn.functional.linear(x, self.o_proj.weight)

    model = nn.Sequential(Reads())
    pool = AdapterPool(model, JolaConfig(target_modules=["o_proj"], head_dim=4), 1)
    config = JolaConfig(target_modules=["o_proj"], head_dim=4)
    pool.load("a", peft.get_peft_model(nn.Sequential(Attention()), config))
    with pytest.raises(ValueError, match=r"0.o_proj: Reads did not call its projection"), pool.batch(["a"]):
        model(torch.randn(1, 2, 8))


def test_samples_that_an_activation_does_not_see_first():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.act(self.layer(x).transpose(0, 1)).transpose(0, 1)

    pool = AdapterPool(Moves(), CurvatureConfig(input_shape=(4, 4)), 1)
    model = peft.get_peft_model(Moves(), CurvatureConfig(input_shape=(4, 4)))
    pool.load("a", model)
    wrong = r"act: .* each of 4 samples, .* does not grow with the batch"
    with pytest.raises(ValueError, match=wrong), pool.batch(["a"] * 4):
        pool.model(torch.randn(4, 4, 4))


# ---- on the model ----


def test_nothing_stays_on_the_model():
    model = build("llama")
    before = output(model, VALUES)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pool = pool_of(model)
    pool.load("a", trained(names=("default",)))
    served(pool, ["a"] * 3)
    assert model.state_dict().keys() == state.keys()
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="with an AdapterPool on it cannot be copied or pickled"):
            duplicate(model)
    pool.remove()
    assert "_ctu_pools" not in vars(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(output(copy.deepcopy(model), VALUES), before)


def test_a_lora_adapter_below():
    torch.manual_seed(5)
    lora = peft.get_peft_model(
        build("llama"), peft.LoraConfig(target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    )
    jola = trained(names=("default",))
    pool = AdapterPool(lora, JolaConfig(), 2)
    pool.load("a", jola)
    with pool.batch(["a", None, "a"]):
        got = output(lora, VALUES)
    pool.remove()
    assert torch.equal(got[1], output(lora, VALUES)[1])
    assert (got[0] - output(lora, VALUES)[0]).abs().max() > 1e-3


def test_streams_of_a_gpu_are_ordered(monkeypatch):
    """A write waits for the streams that read the slot, a read for all writes; while capturing, nothing is recorded."""
    from ctkernels.adapters.pool import fences

    log, capturing = [], []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            log.append(f"{self.name} records")
            return f"event {len(log)}"

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

    streams = {"now": Stream("a")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["now"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    order = fences.Fences([torch.device("cuda:0"), torch.device("cpu"), torch.device("cuda:0")])
    order.before_write(1)
    order.after_write()  # event 1, on a
    streams["now"] = Stream("b")
    order.before_read()
    order.after_read(1)  # event 3, on b
    order.after_read(1)  # event 4, which covers it
    streams["now"] = Stream("a2")
    order.before_write(2)
    order.before_write(1)
    order.before_write(1)
    capturing.append(True)
    order.before_read()
    order.after_read(1)
    assert log == ["a records", "b waits for event 1", "b records", "b records", "a2 waits for event 4"]
    log.clear()
    capturing.clear()
    only_cpu = fences.Fences([torch.device("cpu")])
    only_cpu.before_read()
    only_cpu.after_write()
    assert log == []
