"""The JoLA recipe on a tiny random Llama: scores, protocol, resuming, command line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from tiny_language_model import save_tiny_llama

from ctkernels import cli
from ctkernels.lab.experiment import weights_path
from ctkernels.lab.jola import METHODS, Answering, Example, RunResult, TextData, compare_methods, draw
from ctkernels.lab.jola import metrics as scores

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("tokenizers")

from ctkernels.lab.jola import load_language_model, restored, save_report, scoring  # noqa: E402
from ctkernels.lab.jola.training import TrainingConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ROOT = Path(__file__).parents[2]
WORDS = ["red", "blue", "is", "a", "colour", "fruit", "apple", "pear", "sky", "sea", "grass", "leaf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny Llama with a tokenizer of words."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), WORDS)


@pytest.fixture
def tiny(folder):
    return load_language_model(folder)


def _examples(count, choices=("fruit", "colour")):
    """Whether the first word names a fruit: learnable."""
    made = []
    for i in range(count):
        word = ("apple", "red", "pear", "blue")[i % 4]
        rest = " ".join(WORDS[(i * k) % len(WORDS)] for k in (1, 3, 5))[: 4 + i % 9]
        made.append(Example(f"{rest} {word} is a", ("fruit", "colour")[i % 2], choices))
    return tuple(made)


DATA = TextData(_examples(80))
SMALL = {"train": 16, "val": 8, "test": 12, "training": TrainingConfig(epochs=2, batch_size=4), "progress": False}
GRIDS = {"jola": {"lr": [0.05], "gate_lr": [0.05, 0.5]}, "lora": {"lr": [0.01, 0.03], "rank": [2]}}


def _without_times(result):
    values = result if isinstance(result, dict) else result.to_dict()
    cells = sorted(values["cells"], key=lambda c: (c["method"], c["seed"], json.dumps(c["setting"])))
    return [{k: v for k, v in cell.items() if k != "seconds"} for cell in cells]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_answers_are_found_in_generated_text():
    assert scores.extracted(" The answer is (B) or C.", r"\b([A-J])\b") == "B"
    assert scores.extracted("no letter", r"\d+") == ""
    assert scores.extracted("  Paris \n", None) == "Paris"
    assert scores.exact_matches(["Paris.", "a  b", "x"], ["paris", "A b", "y"]) == [1.0, 1.0, 0.0]


def test_rouge_l_by_hand():
    pytest.importorskip("rouge_score")
    # longest common subsequence "the cat mat": precision 3/4, recall 3/6
    value = scores.rouge_l(["the cat a mat"], ["the cat sat on the mat"])[0]
    assert value == pytest.approx(2 * 0.75 * 0.5 / 1.25)


def test_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    # 5 tokens against 6: n-gram precisions 5/5, 4/4, 3/3, 2/2 and a brevity penalty exp(1 - 6/5)
    value = scores.bleu(["the cat sat on the"], ["the cat sat on the mat"])
    assert value == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_probabilities_by_hand_and_padding_changes_nothing(tiny):
    model, tokenizer = tiny
    how = Answering()
    rows = [
        scoring.encode(p, a, tokenizer, how, end=False)
        for p in ("sky is a", "red")
        for a in ("red", "sea apple", "pear")
    ]
    found = scoring.log_probabilities(model, rows, 0, batch_size=4)
    for (before, after), value in zip(rows, found):
        logs = model(torch.tensor([before + after])).logits[0].detach().log_softmax(-1)
        expected = sum(float(logs[len(before) + i - 1, token]) for i, token in enumerate(after))
        assert value == pytest.approx(expected, abs=1e-4)
    batch = scoring.collate(rows, 0)
    tokens = sum(len(after) for _, after in rows)
    assert float(scoring.answer_loss(model, batch).detach()) == pytest.approx(-sum(found) / tokens, abs=1e-4)


def test_the_vocabulary_is_multiplied_with_contiguous_rows(tiny):
    """Those of a slice would make the product copy the vocabulary's weight in every step."""
    model, _ = tiny
    seen = []
    with model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        scoring.answer_loss(model, scoring.collate([((4, 5, 6), (7,)), ((4,), (5, 6))], 0))
    assert [(tuple(x.shape[:2]), x.is_contiguous()) for x in seen] == [((2, 3), True)]


def test_long_prompts_lose_their_beginning(tiny):
    before, after = scoring.encode("sky sea red is a", "blue", tiny[1], Answering(max_length=3), end=True)
    assert tiny[1].decode(before) == "a"
    assert tiny[1].convert_ids_to_tokens(list(after)) == ["blue", "</s>"]
    with pytest.raises(ValueError, match="max_length must leave room for a prompt"):
        scoring.encode("sky", "blue red", tiny[1], Answering(max_length=2), end=False)


def test_generation_in_a_batch_is_that_of_each_prompt(tiny):
    model, tokenizer = tiny
    prompts = ["sky", "red apple is a", "sea is"]
    how = Answering(max_new_tokens=5)
    alone = [scoring.generate(model, tokenizer, [p], how)[0] for p in prompts]
    assert scoring.generate(model, tokenizer, prompts, how) == alone


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.attach])
def test_methods_leave_the_model_as_it_was(tiny, name):
    model, _ = tiny
    ids = torch.tensor([[4, 5, 6]])
    before = {k: (v.clone(), v.requires_grad) for k, v in model.named_parameters()}
    logits = model(ids).logits
    with METHODS[name].attach(model, METHODS[name].settings()[0]) as attached:
        trained = [p for group in attached.groups for p in group["params"]]
        assert trained
        assert {id(p) for p in trained} == {id(p) for p in attached.model.parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.3)
        assert not torch.equal(attached.model(ids).logits, logits)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) and after[k].requires_grad == grad for k, (v, grad) in before.items())
    assert torch.equal(model(ids).logits, logits)


def test_a_grid_may_name_what_an_ablation_changes(tiny):
    model, _ = tiny
    values = {"by_row": 1.0, "units": 0.0, "init_std": 0.01, "init_log_alpha": 1.0, "temperature": 0.5}
    (setting,) = METHODS["jola"].settings(
        {name: (value,) for name, value in values.items()} | {"lr": [0.1], "gate_lr": [0.1]}
    )
    with METHODS["jola"].attach(model, setting) as attached:
        config = attached.model.peft_config["default"]
        assert (config.gate_sampling, config.init_std, config.init_log_alpha) == ("row", 0.01, 1.0)
        assert (config.temperature, attached.measure) == (0.5, None)
    with METHODS["lofit"].attach(model, {"lr": 0.1, "init_std": 0.02}) as attached:
        assert attached.model.peft_config["default"].init_std == 0.02
        assert attached.measure is not None
    with pytest.raises(ValueError, match=r"lofit has the settings .*, got \['by_row'\]"):
        METHODS["lofit"].settings({"by_row": (1,)})


def test_gates_are_steady_in_the_first_steps(tiny):
    """They are not sampled there, but trained."""
    model, _ = tiny
    (setting,) = METHODS["jola"].settings({"lr": [0.1], "gate_lr": [0.1], "steady": [0.5]})
    with METHODS["jola"].attach(model, setting) as attached:
        _, steady = attached.callbacks
        config = attached.model.peft_config["default"]
        frozen = []
        for step in range(6):
            steady.on_step_begin(None, types.SimpleNamespace(global_step=step, max_steps=6), None)
            layers = [m for m in attached.model.modules() if hasattr(m, "jola_config")]
            frozen.append({layer.jola_config["default"].freeze_gates for layer in layers})
            assert all(p.requires_grad for n, p in attached.model.named_parameters() if "log_alpha" in n)
        assert layers
        assert frozen == [{True}] * 3 + [{False}] * 3
        assert config is layers[0].jola_config["default"]


def test_the_last_steps_of_an_epoch_are_averaged(tiny):
    """Validation and what is kept see the mean, training goes on from the weights themselves."""
    from ctkernels.lab.jola.training import Logs, train

    model, tokenizer = tiny
    rows = [scoring.answer_row(e, tokenizer, Answering()) for e in _examples(16)]
    states, seen = [], []

    def trained(average):
        with METHODS["lofit"].attach(model, {"lr": 0.05}) as attached:
            torch.manual_seed(0)
            for parameter in attached.groups[0]["params"]:
                torch.nn.init.zeros_(parameter)

            def validate():
                seen.append(attached.state())
                return {"loss": 1.0 / len(seen)}

            def advance(_):
                states.append(attached.state())

            training = TrainingConfig(epochs=2, batch_size=4, average=average)
            log = train(attached, rows, 0, training, 0, validate, (("loss", -1.0),), advance, Logs())
            return log.state

    trained(0.0)
    plain = [states.copy(), seen.copy()]
    states.clear(), seen.clear()
    kept = trained(0.5)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(plain[0], states) for k in a)
    assert all(torch.equal(plain[1][i][k], states[4 * i + 3][k]) for i in range(2) for k in kept)
    for i in range(2):
        for k, value in seen[i].items():
            expected = (states[4 * i + 2][k].double() + states[4 * i + 3][k].double()) / 2
            assert torch.equal(value, expected.to(value.dtype))
    assert all(torch.equal(kept[k], seen[1][k]) for k in kept)


def test_gradients_are_clipped_as_asked(tiny, tmp_path):
    model, tokenizer = tiny
    losses = [
        compare_methods(
            model, tokenizer, DATA, methods=["lofit"], seeds=[0], grids={"lofit": {"lr": [0.05]}},
            **{**SMALL, "training": TrainingConfig(epochs=1, batch_size=4, clip=clip)},
        ).runs[-1].validation["loss"]
        for clip in (1.0, 1e-9, 0.0)
    ]  # fmt: skip
    assert len(set(losses)) == 3


def test_the_protocol_from_end_to_end(tiny, tmp_path):
    model, tokenizer = tiny
    options = {**SMALL, "methods": ["zero-shot", "lora", "jola"], "seeds": [0, 1], "grids": GRIDS}
    result = compare_methods(model, tokenizer, DATA, out=tmp_path, **options)
    assert result.methods == ["zero-shot", "lora", "jola"]
    for name in ("lora", "jola"):
        cells = [c for c in result.runs if c.method == name]
        assert [(c.seed, c.test is not None) for c in cells].count((0, True)) == 1  # the test is for the chosen alone
        assert len(cells) == 3  # two settings on the first seed, the chosen one on the second
        chosen = result.tested(name)
        assert [c.seed for c in chosen] == [0, 1]
        tried = [c for c in cells if c.seed == 0]
        best = max(tried, key=lambda c: (c.validation["accuracy"], -c.validation["loss"]))
        assert chosen[0] == best
        for cell in cells:
            ranks = [(e["accuracy"], -e["loss"]) for e in cell.epochs]
            assert ranks[cell.best - 1] == max(ranks)
    rows = {row["method"]: row for row in result.rows()}
    values = rows["jola"]["metrics"]["accuracy"]["values"]
    assert rows["jola"]["metrics"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert rows["jola"]["metrics"]["accuracy"]["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert rows["jola"]["parameters"] == 2 * 4 * (2 * 8 + 2)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["verdict"] == result.verdict()
    assert len(result.tested("jola")[0].gates) == 1 + len(result.tested("jola")[0].epochs)
    assert len(list((tmp_path / "weights").iterdir())) == 4
    # the same seeds give the same table, and a finished comparison is not run again
    again = compare_methods(model, tokenizer, DATA, **options)
    assert _without_times(again) == _without_times(result)
    third = compare_methods(model, tokenizer, DATA, out=tmp_path, **options)
    assert third.runs == result.runs
    with pytest.raises(ValueError, match=r"another set-up \(different: sizes\)"):
        compare_methods(model, tokenizer, DATA, out=tmp_path, **{**options, "train": 17})
    # the tested weights come back, and the report is written
    tested = draw(DATA, 0, train=16, val=8, test=12).test
    with restored(result.tested("jola")[0], model, tmp_path) as adapted:
        own = scoring.score_choices(adapted, tokenizer, tested, Answering())
    assert [right for right, _ in own] == result.tested("jola")[0].each
    pytest.importorskip("matplotlib")
    save_report(result, model, tokenizer, [e.prompt for e in tested], tmp_path)
    assert (tmp_path / "gates.png").stat().st_size > 5000
    assert "of 8 heads edited" in (tmp_path / "edits.txt").read_text()


def test_loggers_get_the_loss_and_the_validation_of_every_run(tiny, tmp_path, monkeypatch):
    """A logger of the Trainer by name, as TensorBoard's is."""
    from transformers.integrations import integration_utils

    from ctkernels.lab.jola import training

    said = []

    class Recorder(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            said.append((args.run_name, set(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["recorder"])
    options = {**SMALL, "methods": ["lora"], "seeds": [0], "grids": {"lora": {"lr": [0.01], "rank": [2]}}}
    logged = compare_methods(*tiny, DATA, out=tmp_path, report_to=["recorder"], **options)
    assert {name for name, _ in said} == {"lora-0-lr=0.01-rank=2"}
    assert sum("loss" in keys for _, keys in said) == 2 * 4  # a step of four examples out of sixteen, twice
    assert sum({"eval_loss", "eval_accuracy"} <= keys for _, keys in said) == 2
    assert _without_times(logged) == _without_times(compare_methods(*tiny, DATA, **options))


def test_tensorboard_writes_beside_the_result(tiny, tmp_path):
    if "tensorboard" not in transformers.integrations.get_available_reporting_integrations():
        pytest.skip("no TensorBoard is installed")
    options = {**SMALL, "methods": ["lora"], "seeds": [0], "grids": {"lora": {"lr": [0.01], "rank": [2]}}}
    compare_methods(*tiny, DATA, out=tmp_path, report_to=["tensorboard"], **options)
    (events,) = (tmp_path / "logs/lora-0-lr=0.01-rank=2").rglob("events.out.tfevents*")
    assert events.stat().st_size > 500
    assert b"eval/accuracy" in events.read_bytes()


def test_several_seeds_choose_settings_together(tiny, tmp_path):
    options = {**SMALL, "methods": ["jola"], "seeds": [0, 1, 2], "grids": {"jola": GRIDS["jola"]}, "choose_on": 2}
    result = compare_methods(*tiny, DATA, out=tmp_path, **options)
    assert len(result.runs) == 5  # two settings on two seeds, the chosen one on the third
    losses = {}
    for cell in result.runs:
        if cell.seed < 2:
            losses.setdefault(cell.setting["gate_lr"], []).append(cell.validation)
    ranks = {
        rate: (sum(v["accuracy"] for v in both) / 2, -sum(v["loss"] for v in both) / 2) for rate, both in losses.items()
    }
    assert {c.setting["gate_lr"] for c in result.tested("jola")} == {max(ranks, key=ranks.get)}
    assert len(list((tmp_path / "weights").iterdir())) == 3
    assert result.tuning().count(", seed 1") == 2
    assert compare_methods(*tiny, DATA, out=tmp_path, **options).runs == result.runs
    with pytest.raises(ValueError, match=r"another set-up \(different: choose_on\)"):
        compare_methods(*tiny, DATA, out=tmp_path, **{**options, "choose_on": 1})
    with pytest.raises(ValueError, match="choose_on must be 1 to 3, the number of seeds, got 4"):
        compare_methods(*tiny, DATA, **{**options, "choose_on": 4})


def test_head_edits_are_trained_and_kept_in_measured_units(tiny, tmp_path):
    model, tokenizer = tiny
    options = {
        **SMALL,
        "methods": ["jola", "lofit"],
        "seeds": [0],
        "grids": {"jola": GRIDS["jola"], "lofit": {"lr": [0.05]}},
    }
    result = compare_methods(model, tokenizer, DATA, out=tmp_path, **options)
    for name in ("jola", "lofit"):
        with restored(result.tested(name)[0], model, tmp_path) as adapted:
            units = [unit for key, unit in adapted.named_buffers() if ".jola_unit_a." in key]
            assert len(units) == 2
            assert all(unit.std() > 0 for unit in units)
    # weights of a run from before there were units
    with METHODS["jola"].attach(model, {"lr": 1.0, "gate_lr": 1.0}) as attached:
        old = {key: value + 0.1 for key, value in attached.state().items() if "jola_unit" not in key}
        attached.load(old)
        after = attached.state()
        assert all(torch.equal(after[key], value) for key, value in old.items())
        assert all(bool((value == 1).all()) for key, value in after.items() if "jola_unit" in key)
        with pytest.raises(ValueError, match="saved weights do not fit"):
            attached.load(dict(list(old.items())[1:]))


def test_an_untrained_model_chooses_among_answers_that_repeat(tiny):
    model, tokenizer = tiny
    data, how = TextData(_examples(80, None)), Answering(max_new_tokens=2)
    result = compare_methods(
        model, tokenizer, data, **{**SMALL, "methods": ["zero-shot"], "seeds": [0], "answering": how}
    )
    tested = draw(data, 0, train=16, val=8, test=12).test
    rows = [Example(e.prompt, e.answer, ("fruit", "colour")) for e in tested]
    right = [r for r, _ in scoring.score_choices(model, tokenizer, rows, how)]
    (cell,) = result.tested("zero-shot")
    assert cell.test["exact_match"] == pytest.approx(100 * sum(right) / len(right))
    assert sum(right) > 0
    assert "bleu" not in cell.test  # one-word answers
    assert sorted(result.setup["zero-shot chooses among"]) == ["colour", "fruit"]


def test_what_counts_as_labels():
    rows = [Example(f"{i}", word) for i, word in enumerate(["a", "b", "a", "b"])]
    assert scoring.labels(rows, Answering()) == ("a", "b")
    assert scoring.labels(rows[:3], Answering()) == ()  # not twice each
    assert scoring.labels([Example(f"{i}", "yes") for i in range(9)], Answering()) == ()
    assert scoring.labels(rows, Answering(extract=r"answer (\w)")) == ()  # would not be found in the label alone
    assert scoring.labels(rows, Answering(extract=r"\b([ab])\b")) == ("a", "b")
    assert scoring.labels([Example("q", word, ("a", "b")) for word in "abab"], Answering()) == ()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, compare_methods(*load_language_model(folder), DATA, out=out, **FINISHED)


FINISHED = {
    **SMALL,
    "methods": ["zero-shot", "lora"],
    "seeds": [0],
    "grids": {"lora": {"lr": [0.01, 1e-9], "rank": [2]}},
}


def _change(name, value):
    def apply(out, saved, cell):
        cell[name] = value(cell) if callable(value) else value
        (out / "result.json").write_text(json.dumps(saved))

    return apply


def _cut(out, saved, cell):
    (file,) = (out / "weights").iterdir()
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out, *_: next((out / "weights").iterdir()).unlink(), "its weights, .*, are gone"),
        (_cut, "its weights, .*, are not those that it left"),
        (_change("best", lambda cell: 3 - cell["best"]), "it names epoch . as its best, which is epoch ."),
        (_change("test", {"accuracy": 99.0}), "its accuracy, 99.0, is not that of its 12 test examples"),
        (_change("epochs", None), "it is damaged"),
    ],
    ids=["gone", "cut short", "best", "test", "kinds"],
)
def test_a_damaged_run_is_told_and_done_again(tiny, finished, damage, message, tmp_path):
    before, out = finished[1], tmp_path / "out"
    shutil.copytree(finished[0], out)
    saved = json.loads((out / "result.json").read_text())
    damage(out, saved, next(c for c in saved["cells"] if c["method"] == "lora" and c["test"]))
    with pytest.warns(UserWarning, match=f"lora, seed 0, lr 0.01, rank 2: {message}.*; this run is done again"):
        after = compare_methods(*tiny, DATA, out=out, **FINISHED)
    assert _without_times(after) == _without_times(before)
    (file,) = (out / "weights").iterdir()
    assert file.read_bytes() == (finished[0] / "weights" / file.name).read_bytes()


def test_damaged_weights_are_not_put_back(tiny, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    _cut(tmp_path / "out", None, None)
    (cell,) = finished[1].tested("lora")
    with (
        pytest.raises(ValueError, match=r"lora, seed 0: its weights, .*, are not those"),
        restored(cell, tiny[0], tmp_path / "out"),
    ):
        pass


def test_settings_that_agree_to_six_digits_have_files_of_their_own(tmp_path):
    cells = [
        RunResult(method="lora", seed=0, setting={"lr": lr, "rank": 2}, parameters=1) for lr in (0.01, 0.0100000001)
    ]
    names = [weights_path(tmp_path, cell).name for cell in cells]
    assert names == ["lora-0-lr=0.01-rank=2.safetensors", "lora-0-lr=0.0100000001-rank=2.safetensors"]


def test_free_text_is_generated_and_scored(tiny):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    data = TextData(_examples(40, choices=None))
    grids = {"lofit": {"lr": [0.05]}}
    options = {**SMALL, "seeds": [3], "grids": grids, "answering": Answering(max_new_tokens=3)}
    result = compare_methods(*tiny, data, methods=["zero-shot", "lofit"], **options)
    assert result.primary == "rouge_l"
    for row in result.rows():
        assert set(row["metrics"]) == {"exact_match", "rouge_l"}  # answers of one word have no BLEU
    assert "ROUGE-L" in result.table()
    assert len(result.tested("lofit")[0].each) == 12
    assert not result.tested("lofit")[0].gates


def test_the_verdict_is_honest():
    from ctkernels.lab.jola import MethodComparison

    def made(own, other):
        runs = tuple(
            RunResult(method=name, seed=0, setting={}, test={"accuracy": 100 * sum(each) / len(each)}, each=each)
            for name, each in (("jola", own), ("lora", other))
        )
        return MethodComparison(runs, {"methods": {"lora": {}, "jola": {}}, "seeds": [0]}).verdict()

    assert made([1.0] * 50, [1.0, 0.0] * 25).startswith(
        "jola was better than every other method here: 100.0 against 50.0"
    )
    assert made([1.0, 0.0] * 25, [1.0] * 50).startswith("jola was worse than lora here")
    assert made([1.0, 0.0] * 25, [0.0, 1.0] * 25).startswith("No difference beyond chance")
    assert made([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]).startswith("No difference beyond chance")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lorra"]}, r"methods must be among .*, got \['lorra'\]"),
        ({"methods": []}, "got none"),
        ({"seeds": []}, "seeds must be one or more numbers"),
        ({"schedule": "falling"}, "schedule must be one of"),
        ({"grids": {"jola": {"rank": [1]}}}, r"grids: jola has the settings \['lr', 'gate_lr', .*\], got \['rank'\]"),
        ({"grids": {"jola": {"lr": [-1]}}}, r"grids: jola.lr must be one or more positive numbers, got \[-1\]"),
        ({"report_to": ["a notebook"]}, r"report_to must be some of the loggers .*, got \['a notebook'\]"),
        ({"train": 500}, "500 training and 8 validation examples were asked for"),
    ],
)
def test_bad_arguments_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        compare_methods(*tiny, DATA, **{**SMALL, **options})


def test_bertscore_goes_through_its_package(tiny, monkeypatch):
    """The package is not among the tests' own: a stand-in shows what it is asked."""
    asked = {}

    def score(predictions, references, **options):
        asked.update(options, predictions=predictions, references=references)
        return torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]), torch.tensor([0.25, 0.75])

    module = types.ModuleType("bert_score")
    module.score = score
    monkeypatch.setitem(sys.modules, "bert_score", module)
    how = Answering(bertscore_model="encoder", bertscore_layer=4)
    found = scoring.score_texts([" a", "b "], [Example("p", " a"), Example("p", "c")], how)
    assert found.metrics["bertscore"] == pytest.approx(50)
    assert found.metrics["exact_match"] == 50
    assert asked == {"predictions": ["a", "b"], "references": ["a", "c"], "model_type": "encoder", "num_layers": 4}


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": e.prompt, "answer": e.answer, "choices": list(e.choices)} for e in DATA.train]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ARGUMENTS = [
    *("--train", "16", "--val", "8", "--test", "12", "--epochs", "2", "--batch-size", "4", "--device", "cpu"),
    *("--grid", "jola.gate_lr=0.05", "--no-progress"),
]


def test_the_command_from_end_to_end(folder, file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = ["jola", str(file), "--model", str(folder), "--methods", "zero-shot,jola", "--seeds", "0", *ARGUMENTS]
    assert cli.main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "result.json").read_text())
    assert found["verdict"] in shown
    assert found["command"].startswith("python -m ctkernels jola")
    assert sorted(p.name for p in out.iterdir()) == ["edits.txt", "gates.png", "result.json", "weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl"], "gone.jsonl does not exist"),
        (["{file}", "--seeds", "a"], "--seeds must be whole numbers from 0 to 4294967295 with commas, got 'a'"),
        (
            ["{file}", "--grid", "jola.lr=x"],
            "--grid must be METHOD.NAME=VALUE,VALUE with finite numbers, got 'jola.lr=x'",
        ),
        (["{file}", "--out", "{file}"], "--out must be a folder"),
        (["{file}", "--train", "100"], "100 training and 100 validation examples were asked for"),
        (
            ["{file}", "--train", "8", "--val", "8", "--test", "8", "--model", "{here}"],
            "expected a folder with config.json",
        ),
        (["{file}", "--beams", "0"], "--beams must be a whole number of at least 1, got '0'"),
    ],
)
def test_bad_input_is_one_line(folder, file, tmp_path, capsys, arguments, message):
    pytest.importorskip("matplotlib")
    given = [a.format(file=file, here=tmp_path) for a in arguments]
    assert cli.main(["jola", "--model", str(folder), "--out", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_without_losing_or_repeating(folder, file, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ctkernels", "jola", str(file), "--model", str(folder), "--methods", "lora,jola"]
    command += ["--grid", "lora.rank=2"]
    command += ["--seeds", "0,1", "--no-report", *ARGUMENTS]
    result = tmp_path / "killed/result.json"
    process = subprocess.Popen([*command, "--out", str(result.parent)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if result.exists() and len(json.loads(result.read_text())["cells"]) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads(result.read_text())["cells"]
    assert 2 <= len(before) < 6
    assert cli.main([*command[3:], "--out", str(result.parent)]) == 0
    after = json.loads(result.read_text())
    assert len(after["cells"]) == 6
    seconds = {(c["method"], c["seed"], json.dumps(c["setting"])): c["seconds"] for c in after["cells"]}
    assert all(seconds[c["method"], c["seed"], json.dumps(c["setting"])] == c["seconds"] for c in before)
    assert cli.main([*command[3:], "--out", str(tmp_path / "whole")]) == 0
    assert _without_times(after) == _without_times(json.loads((tmp_path / "whole/result.json").read_text()))


@pytest.mark.slow
def test_two_processes_share_the_work(folder, file, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "ctkernels", "jola", str(file), "--model", str(folder), "--methods", "zero-shot,jola"]
    command += ["--seeds", "0", "--no-report", *ARGUMENTS]
    found = []
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        run = [sys.executable, *launcher, *command, "--out", str(tmp_path / name)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("jola ") >= 1
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    cells = [{c["method"]: c for c in values["cells"] if c["test"]} for values in found]
    assert cells[0]["zero-shot"]["each"] == cells[1]["zero-shot"]["each"]
    assert len(cells[1]["jola"]["each"]) == 12
    assert found[1]["setup"]["processes"] == 2
