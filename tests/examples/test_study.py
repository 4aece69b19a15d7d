"""The study over several tasks: its options, its averages, and what it says about a difference."""

import json
from statistics import mean, stdev

import pytest

pytest.importorskip("numpy", reason="the laboratory needs numpy")
pytest.importorskip("transformers", reason="the laboratory needs transformers")
pytest.importorskip("peft", reason="the laboratory needs peft")

from ctkernels.lab.jola import MethodComparison
from ctkernels.lab.jola.result import RunResult
from examples import study


def result(scores):
    """A comparison with the scores of each test example: {method: [[...] for every seed]}."""
    runs = [
        RunResult(
            method=name,
            seed=seed,
            setting={} if name == "zero-shot" else {"lr": 0.1},
            parameters=0 if name == "zero-shot" else 7,
            test={"accuracy": 100 * mean(each)},
            each=each,
        )
        for name, seeds in scores.items()
        for seed, each in enumerate(seeds)
    ]
    return MethodComparison(tuple(runs), {"methods": dict.fromkeys(scores), "seeds": [0, 1], "sizes": {"test": 4}})


def test_averages_over_tasks_and_differences_of_pairs():
    results = {
        "a": result({"lora": [[1, 0, 0, 1], [1, 1, 0, 1]], "jola": [[1, 1, 1, 1], [1, 1, 0, 1]]}),
        "b": result({"lora": [[0, 0, 0, 1], [1, 1, 0, 0]], "jola": [[1, 0, 0, 1], [0, 1, 0, 1]]}),
    }
    lora, jola = study.summarise(results)
    assert (lora["method"], jola["method"]) == ("lora", "jola")
    assert lora["mean"]["values"] == [37.5, 62.5]
    assert jola["mean"]["values"] == [75.0, 62.5]
    assert jola["mean"]["deviation"] == pytest.approx(stdev([75.0, 62.5]))
    assert "difference" not in lora
    # means over seeds of each example: a: jola 1 1 .5 1 beside lora 1 .5 0 1, b: .5 .5 0 1 beside .5 .5 0 .5
    pairs = [[0, 0.5, 0.5, 0], [0, 0, 0, 0.5]]
    assert jola["difference"]["mean"] == pytest.approx(100 * mean([0.25, 0.125]))
    error = (stdev(pairs[0]) ** 2 / 4 + stdev(pairs[1]) ** 2 / 4) ** 0.5 / 2
    assert jola["difference"]["standard_error"] == pytest.approx(100 * error)
    text = study.table([lora, jola], ["a", "b"]).splitlines()
    assert text[0] == "| method | a | b | mean | beside lora | trained |"
    assert text[3].startswith("| jola | 87.5 ± 17.7 | 50.0 ± 0.0 | 68.8 ± 8.8 | +18.8 ±")


def test_a_method_that_is_tested_once_counts_once():
    results = {"a": result({"zero-shot": [[1, 0, 0, 0]], "lora": [[1, 0, 0, 1], [1, 1, 0, 1]]})}
    zero, lora = study.summarise(results)
    assert zero["mean"] == {"mean": 25.0, "deviation": None, "values": [25.0]}
    assert len(lora["mean"]["values"]) == 2


def test_methods_that_lack_a_task_are_left_out():
    results = {"a": result({"lora": [[1, 0, 0, 1]], "jola": [[1, 0, 0, 1]]}), "b": result({"lora": [[1, 0, 0, 1]]})}
    assert [row["method"] for row in study.summarise(results)] == ["lora"]


def test_options_are_checked(capsys):
    for arguments, message in (
        (["--tasks", "poetry"], "--tasks must be among"),
        (["--methods", "x"], "--methods must"),
    ):
        with pytest.raises(SystemExit):
            study.options(arguments)
        assert message in capsys.readouterr().err
    assert study.grids_of(["jola.lr=0.02,0.05", "jola.gate_lr=1"]) == {"jola": {"lr": [0.02, 0.05], "gate_lr": [1.0]}}


def test_a_run_of_two_tasks(tmp_path, monkeypatch, capsys):
    """The tasks one after the other, a summary in a file; the second call finds everything done."""
    calls = []

    def compare(model, tokenizer, data, *, out, methods, seeds, **options):
        calls.append((data, out.name, options["choose_on"]))
        return result({"lora": [[1, 0, 0, 1], [1, 1, 0, 1]], "jola": [[1, 1, 1, 1], [1, 1, 0, 1]]})

    monkeypatch.setattr(study, "load_language_model", lambda name, dtype: (name, dtype))
    monkeypatch.setattr(study, "compare_methods", compare)
    monkeypatch.setattr(study, "TASKS", {"a": lambda: "data of a", "b": lambda: "data of b"})
    code = study.main(["--tasks", "a,b", "--methods", "lora,jola", "--seeds", "0", "--out", str(tmp_path / "out")])
    assert code == 0
    assert calls == [("data of a", "a", 1), ("data of b", "b", 1)]
    saved = json.loads((tmp_path / "out/study.json").read_text())
    assert [row["method"] for row in saved["table"]] == ["lora", "jola"]
    assert "| jola |" in capsys.readouterr().out
