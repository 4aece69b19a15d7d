"""The example that serves adapters by continuous batching: tokens are those of one request at a time."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
serving, adapters = import_module("examples.serve_adapters"), import_module("ctkernels.adapters")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.skipif(
        not hasattr(transformers, "ContinuousBatchingConfig"), reason="continuous batching came with transformers 5"
    ),
]


def test_every_request_gets_the_tokens_of_its_adapter(tmp_path):
    names = ["a", "b", "c"]
    serving.tiny_adapters(tmp_path, names)
    plain, model = serving.tiny_model(), serving.tiny_model()
    alone = adapters.AdapterPool(plain, adapters.JolaConfig(), 3)
    pool = adapters.AdapterPool(model, adapters.JolaConfig(), 4)
    for name in names:
        pool.load(name, tmp_path / name)
        alone.load(name, tmp_path / name)
    torch.manual_seed(3)
    requests = {}
    for number in range(9):
        tokens = torch.randint(3, 128, (4 + 3 * (number % 4),)).tolist()
        requests[f"r{number}"] = (tokens, [*names, None][number % 4], 3 + number % 3)
    shared = requests["r0"][0]
    requests |= {"same": (shared, "b", 5), "again": (shared, None, 5)}
    expected = {}
    for key, (tokens, name, count) in requests.items():
        ids = torch.tensor([tokens])
        with alone.batch([name]):
            found = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        expected[key] = found[0, len(tokens) :].tolist()
    assert expected["same"] != expected["again"]
    manager = model.init_continuous_batching(continuous_batching_config=serving.without_sharing())
    batching = serving.AdapterBatching(pool, manager)
    manager.start()
    for key, (tokens, name, count) in requests.items():
        batching.add(key, tokens, name, max_new_tokens=count)
    pool.load("a", tmp_path / "b")  # requests that are there keep the version they came with
    pool.evict("b")
    with pytest.raises(ValueError, match="got 'b'; load"):
        batching.add("late", shared, "b")
    assert serving.answers(manager, len(requests)) == expected
    tokens, name, count = requests["r1"]
    batching.add("new", tokens, "a", max_new_tokens=count)
    assert serving.answers(manager, 1) == {"new": expected["r1"]}
    batching.add("unwanted", tokens, "a", max_new_tokens=1000)
    manager.cancel_request("unwanted")
    manager.stop(block=True)
    assert not batching._slots  # every adapter has been released
    with pytest.raises(RuntimeError, match="late: the manager takes no requests"):
        batching.add("late", tokens, "a")
    assert not batching._slots


def test_blocks_that_requests_share_are_refused(tmp_path):
    model = serving.tiny_model()
    config = serving.without_sharing()
    config.allow_block_sharing = True
    manager = model.init_continuous_batching(continuous_batching_config=config)
    with pytest.raises(ValueError, match=r"expected allow_block_sharing=False, .* got True, False, False"):
        serving.AdapterBatching(adapters.AdapterPool(model, adapters.JolaConfig(), 1), manager)


def test_the_example_runs(capsys):
    assert serving.main() == 0
    lines = capsys.readouterr().out.splitlines()
    answers = {
        kind: [line.split(maxsplit=1)[1] for line in lines if line.startswith(kind)]
        for kind in ("generate", "continuous")
    }
    assert sorted(answers["generate"]) == sorted(answers["continuous"])
    assert len(set(answers["generate"])) == 4
