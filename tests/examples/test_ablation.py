"""The ablation: what a change sets, what the table says of it, and that a second call finds everything done."""

import json
from statistics import mean, stdev

import pytest

pytest.importorskip("numpy", reason="the laboratory needs numpy")
pytest.importorskip("transformers", reason="the laboratory needs transformers")
pytest.importorskip("peft", reason="the laboratory needs peft")

from test_study import result

from ctkernels.lab.jola import METHODS
from ctkernels.lab.jola.training import TrainingConfig
from examples import ablation


@pytest.mark.parametrize("name", ablation.CHANGES)
def test_every_change_differs_from_the_defaults_in_one_thing(name):
    change = ablation.CHANGES[name]
    setting = {**ablation.SETTING[change.method], **change.setting}
    assert METHODS[change.method].settings({key: [value] for key, value in setting.items()}) == [setting]
    training = TrainingConfig(**change.training)
    assert all(getattr(TrainingConfig(), field) != value for field, value in change.training.items())
    assert training.epochs == TrainingConfig().epochs
    differs = [change.method != "jola", *(k != "lr" or "units" not in setting for k in change.setting)]
    assert sum(differs) + len(change.training) == (name != "defaults")


def test_the_table_is_of_paired_differences(tmp_path, monkeypatch, capsys):
    scores = {"defaults": [[1, 0, 0, 1], [1, 1, 0, 1]], "by_row": [[1, 1, 1, 1], [1, 1, 0, 1]]}
    calls = []

    def compare(model, tokenizer, data, *, out, methods, grids, training, **options):
        calls.append((data, out.parent.name, methods, grids, training.epochs))
        return result({"jola": scores[out.parent.name]})

    monkeypatch.setattr(ablation, "load_language_model", lambda name, dtype: (name, dtype))
    monkeypatch.setattr(ablation, "compare_methods", compare)
    monkeypatch.setattr(ablation, "TASKS", {"a": lambda: "data of a"})
    out = str(tmp_path / "out")
    assert ablation.main(["--tasks", "a", "--changes", "defaults,by_row", "--seeds", "0,1", "--out", out]) == 0
    grid = {"lr": [0.05], "gate_lr": [0.5]}
    assert calls == [
        ("data of a", "defaults", ["jola"], {"jola": grid}, 3),
        ("data of a", "by_row", ["jola"], {"jola": {**grid, "by_row": [1]}}, 3),
    ]
    _, row = json.loads((tmp_path / "out/ablation.json").read_text())["table"]
    pairs = [0, 0.5, 0.5, 0]  # means over seeds: 1 1 .5 1 beside 1 .5 0 1
    assert row["difference"]["mean"] == pytest.approx(100 * mean(pairs))
    assert row["difference"]["standard_error"] == pytest.approx(100 * stdev(pairs) / 2)
    assert row["lowest"] == 75.0
    assert "| gates sampled for every row | 87.5 ± 17.7 |" in capsys.readouterr().out


def test_options_are_checked(capsys):
    with pytest.raises(SystemExit):
        ablation.options(["--changes", "magic"])
    assert "--changes must be among defaults,lora" in capsys.readouterr().err
