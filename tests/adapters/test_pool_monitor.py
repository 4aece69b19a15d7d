"""The monitor of a pool: statistics by adapter are those of a monitor of each adapter alone, under a bounded number of names."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from jola_families import build, inputs

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = import_module("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TOKENS = inputs("llama", batch=3)["input_ids"]
MASK = torch.ones_like(TOKENS)
MASK[1, 4:] = 0  # padding on the right
VALUES = {"input_ids": TOKENS, "attention_mask": MASK}
NAMES = ["a", None, "b"]
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def models(**values):
    """A model with an adapter of its own, by name."""
    found = {}
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        found[name] = peft.get_peft_model(build("llama"), adapters.JolaConfig(**{"init_std": 0.3, **values})).eval()
    return found


def pool_of(some, **values):
    pool = adapters.AdapterPool(build("llama"), adapters.JolaConfig(**values), 4)
    for name, model in some.items():
        pool.load(name, model)
    return pool


def alone(model, values, rows, **how):
    """The snapshot of an `EditMonitor` of one adapter that sees some of the rows."""
    monitor = adapters.EditMonitor(model, every=1, **how)
    with monitor, torch.no_grad():
        model(**{name: value[rows] for name, value in values.items()})
    monitor.begin()
    return monitor.snapshot()


def assert_same(seen, expected):
    assert (seen.inputs, seen.count, seen.outside) == (expected.inputs, expected.count, expected.outside)
    for part in ("total", "high"):
        torch.testing.assert_close(
            torch.tensor(getattr(seen, part)), torch.tensor(getattr(expected, part)), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "values",
    [{}, {"edit": "multiplicative"}, {"edit": "additive"}, {"heads": [1, 2]}, {"site": "mlp"}, {"site": "block"}],
    ids=str,
)
def test_statistics_are_those_of_every_adapter_alone(values):
    some = models(**values)
    pool = pool_of(some, **{name: value for name, value in values.items() if name != "heads"})
    with pool.batch(NAMES), torch.no_grad():
        plain = pool.model(**VALUES).logits
    monitor = adapters.PoolMonitor(pool, every=1)
    with monitor, pool.batch(NAMES), torch.no_grad():
        assert torch.equal(pool.model(**VALUES).logits, plain)
    monitor.begin()
    assert_same(monitor.snapshot("a"), alone(some["a"], VALUES, [0]))
    assert_same(monitor.snapshot("b"), alone(some["b"], VALUES, [2]))
    assert [name for name, _ in monitor.statistics_by_adapter()] == ["a", "b"]
    assert not any(module._forward_hooks for name, module in pool.model.named_modules() if not name)
    with pytest.raises(ValueError, match=r"adapter: expected one with statistics, of \['a', 'b'\], got 'c'"):
        monitor.snapshot("c")


def test_generation_with_several_rows_of_a_sample():
    some = models()
    pool = pool_of(some)
    monitor = adapters.PoolMonitor(pool, every=1)
    with monitor, pool.batch(NAMES):
        pool.model.generate(**{**VALUES, "attention_mask": torch.ones_like(TOKENS)}, **GREEDY)
    with monitor, pool.batch(NAMES):
        rows = TOKENS.repeat_interleave(2, 0)
        pool.model(input_ids=rows)
    monitor.begin()
    seen = monitor.snapshot("b")
    assert seen.inputs == 1 + 2
    assert set(seen.count) == {TOKENS.shape[1] + 2 + 2 * TOKENS.shape[1]}


def test_names_are_bounded():
    some = models()
    pool = pool_of(some)
    with adapters.PoolMonitor(pool, every=1, adapters=1) as monitor, torch.no_grad():
        for names in (["b", "b", None], ["a", "c", "b"], ["c", "c", "c"]):
            with pool.batch(names):
                pool.model(**VALUES)
    monitor.begin()
    found = {name: statistics.rows for name, statistics in monitor.statistics_by_adapter()}
    assert found == {"b": 3, "__others__": 5}
    monitor.reset()
    assert {name: statistics.rows for name, statistics in monitor.statistics_by_adapter()} == {"b": 0}


def test_a_new_version_counts_under_its_name_and_an_evicted_one_too():
    some = models()
    pool = pool_of(some)
    with adapters.PoolMonitor(pool, every=1) as monitor, torch.no_grad():
        with pool.batch(["a", "a", None]):
            pool.load("a", some["c"])
            pool.evict("a")
            pool.load("d", some["c"])
            pool.model(**VALUES)
        with pool.batch(["d"] * 3):
            pool.model(**VALUES)
        index = torch.tensor([pool.acquire("d"), 0, 0])
        with pool.serve(index):
            pool.model(**VALUES)
    monitor.begin()
    assert {name: statistics.rows for name, statistics in monitor.statistics_by_adapter()} == {"a": 2, "d": 4}


def test_ranges_and_drift_of_every_adapter(tmp_path):
    some = models()
    batches = [{"input_ids": (TOKENS + i) % 60} for i in range(4)]
    for name in "ab":
        single = adapters.EditMonitor(some[name], window=2, margin=0.01)
        single.calibrate(batches)
        single.save(tmp_path / name)
    pool = pool_of(some)
    monitor = adapters.PoolMonitor(pool, every=1, adapters=2)
    monitor.load("b", tmp_path / "b")
    strange = {"inputs_embeds": pool.model.get_input_embeddings()(TOKENS).detach() * torch.linspace(-3, 3, 32)}
    with monitor, torch.no_grad():
        for values in (batches[1], batches[2], strange):
            with pool.batch(["a", "b", "b"]):
                pool.model(**values)
    monitor.begin()
    seen, unknown = monitor.snapshot("b"), monitor.snapshot("a")
    single = adapters.EditMonitor(some["b"], every=1)
    single.load(tmp_path / "b")
    with single, torch.no_grad():
        for values in (batches[1], batches[2], strange):
            some["b"](**{name: value[1:] for name, value in values.items()})
    single.begin()
    expected = single.snapshot()
    assert (seen.inputs, seen.outside, seen.windows) == (6, 2, 3)
    assert (seen.outside, seen.windows, seen.alarms) == (expected.outside, expected.windows, expected.alarms)
    assert seen.drift == pytest.approx(expected.drift)
    assert (unknown.inputs, unknown.outside, unknown.drift) == (3, 0, None)
    with pytest.raises(ValueError, match="adapter: 2 adapters have statistics of their own, so 'c' cannot"):
        monitor.load("c", tmp_path / "a")
    (tmp_path / "bad").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match=r"expected what EditMonitor\.save wrote"):
        monitor.load("a", tmp_path / "bad")


def test_what_is_not_watched():
    pool = pool_of(models())
    packed = {"input_ids": TOKENS[:2].reshape(1, -1), "use_cache": False}
    packed["position_ids"] = torch.arange(TOKENS.shape[1]).repeat(2)[None]
    with adapters.PoolMonitor(pool, every=2) as monitor, torch.no_grad():
        pool.model(**VALUES)  # no adapters
        with pool.batch([None] * 3):
            pool.model(**VALUES)
        with pool.batch(["a", "b"], lengths=[TOKENS.shape[1]] * 2):
            pool.model(**packed)
        for _ in range(4):
            with pool.batch(NAMES):
                pool.model(**VALUES)
    monitor.begin()
    assert {name: statistics.rows for name, statistics in monitor.statistics_by_adapter()} == {"a": 2, "b": 2}


def test_a_compiled_model():
    pool = pool_of(models())
    with pool.batch(NAMES), torch.no_grad():
        expected = pool.model(**VALUES).logits
    torch.compiler.reset()
    with adapters.PoolMonitor(pool, every=1) as monitor, torch.no_grad():
        run = torch.compile(pool.model, backend="eager")
        with pool.batch(NAMES):
            torch.testing.assert_close(run(**VALUES).logits, expected, rtol=1e-5, atol=1e-5)
    monitor.begin()
    assert monitor.snapshot("a").inputs == 1
    torch.compiler.reset()


def test_metrics_have_the_name_of_the_adapter():
    client = pytest.importorskip("prometheus_client", reason="exporting needs prometheus-client")
    some = models()
    pool = pool_of(some)
    monitor = adapters.PoolMonitor(pool, every=1, adapters=1, name="tiny")
    with monitor, pool.batch(NAMES), torch.no_grad():
        pool.model(**VALUES)
    monitor.begin()
    registry = client.CollectorRegistry()
    beside = adapters.EditMonitor(some["a"], name="other")
    adapters.export_prometheus(monitor, beside, registry=registry)
    found = {
        (sample.name, *sample.labels.values()): (sample.value, list(sample.labels))
        for family in registry.collect()
        for sample in family.samples
        if sample.labels["model"] == "tiny"
    }
    seen = monitor.snapshot("a")
    labels = ["model", "adapter"]
    assert found[("ctkernels_inputs_total", "tiny", "a")] == (1, labels)
    assert found[("ctkernels_inputs_total", "tiny", "__others__")] == (1, labels)
    assert found[("ctkernels_edit_size_total", "tiny", "a")] == (pytest.approx(sum(seen.total)), labels)
    assert found[("ctkernels_edit_tokens_total", "tiny", "a")] == (sum(seen.count), labels)
    assert found[("ctkernels_edit_size_max", "tiny", "a")] == (pytest.approx(max(seen.high)), labels)
    with pytest.raises(ValueError, match="each with its own name"):
        adapters.export_prometheus(monitor, adapters.EditMonitor(some["a"], name="tiny"), registry=registry)
    exposition = client.generate_latest(registry).decode()
    assert 'ctkernels_edit_size_total{adapter="a",model="tiny"}' in exposition.replace(", ", ",")


def test_bad_arguments():
    pool = pool_of(models())
    for argument in ({"adapters": 0}, {"every": True}, {"adapters": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))}: expected a number of at least 1, got"):
            adapters.PoolMonitor(pool, **argument)
    with pytest.raises(ValueError, match="pool: expected an AdapterPool of JoLA adapters, got Linear"):
        adapters.PoolMonitor(torch.nn.Linear(2, 2))
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    units = adapters.AdapterPool(net, adapters.CurvatureConfig(input_shape=(4,)), 1)
    with pytest.raises(ValueError, match=r"of JoLA adapters, got AdapterPool\(CURVATURE"):
        adapters.PoolMonitor(units)
