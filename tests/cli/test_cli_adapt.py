"""`ctkernels adapt`: what it sees in data, what it runs, and the page that it leaves."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise

import pytest
from torch import nn

from ctkernels import cli

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
for module in ("sklearn", "tqdm", "jinja2", "matplotlib", "peft", "accelerate"):
    pytest.importorskip(module, reason="the command needs ctkernels[lab]")


def make_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


def make_number():
    return 7


MODEL = f"{__name__}:make_net"


@pytest.fixture
def images(tmp_path):
    labels = np.repeat([0, 1, 2], [30, 27, 3])
    np.savez(tmp_path / "images.npz", images=np.zeros((60, 40, 50), np.uint8) + 50 * labels[:, None, None].astype("u1"),
             labels=labels)  # fmt: skip
    return str(tmp_path / "images.npz")


def _texts(path, count, answers):
    rows = [{"prompt": f"question {i}", "answer": answers[i % len(answers)]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _command(said):
    (line,) = (line for line in said.splitlines() if line.startswith("  python -m ctkernels "))
    return shlex.split(line)[3:]


def _values(command):
    return {name: value for name, value in pairwise(command) if name.startswith("--")}


def test_small_images_are_run_small(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["adapt", images, "--model", MODEL, "--dry-run", "--device", "cpu", "--options", "--epochs 3"]) == 0
    said = capsys.readouterr().out
    assert "60 images of 3 classes (0 30, 1 27, 2 3); validation and test examples are set apart" in said
    assert "40 pixels high or wide: they are run at 64 pixels" in said
    assert "Too few to learn from, and to be tested on: 2 3." in said
    command = _command(said)
    assert command[:2] == ["tune", images]
    assert _values(command) | {"--size": "64", "--resize": "64", "--out": "out/adapt"} == _values(command)
    assert command[-2:] == ["--epochs", "3"]  # the user's comes last, and counts
    assert not (tmp_path / "out").exists()


def test_it_runs_and_leaves_a_page(tmp_path, capsys):
    out = tmp_path / "out"
    options = "--epochs 1 --max-train 60 --max-test 40 --betas 0.9,1"
    command = ["adapt", "digits", "--model", f"{MODEL}=none", "--device", "cpu", "--no-progress", "--out", str(out)]
    assert cli.main([*command, "--options", options]) == 0
    assert (out / "result.json").is_file()
    assert "T-CT" in (out / "report" / "index.html").read_text()
    assert f"read {out / 'report' / 'index.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "answers", "kind", "sizes"),
    [
        (60, ["yes", "no"], "2 answers that repeat (yes 30, no 30)", ("30", "12", "18")),
        (3000, [f"text {i}" for i in range(3000)], "answers in their own words", ("200", "100", "300")),
    ],
)
def test_texts_are_dealt_to_training_validation_and_test(tmp_path, capsys, count, answers, kind, sizes):
    from ctkernels.lab.jola import draw, read_texts

    path = _texts(tmp_path / "texts.jsonl", count, answers)
    assert cli.main(["adapt", path, "--model", "some-model", "--dry-run", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    command = _command(said)
    assert f"{count:,} examples of about " in said
    assert kind in said
    assert command[:2] == ["jola", path]
    values = _values(command)
    assert tuple(values[name] for name in ("--train", "--val", "--test")) == sizes
    assert values["--device"] == "cpu"
    train, val, test = map(int, sizes)
    assert len(draw(read_texts(path), 0, train=train, val=val, test=test).train) == train


def test_what_it_cannot_adapt_to_is_named(tmp_path, capsys):
    assert cli.main(["adapt", _texts(tmp_path / "t.jsonl", 9, ["a"]), "--dry-run"]) == 2
    assert "--model: expected a language model" in capsys.readouterr().err
    assert cli.main(["adapt", f"{__name__}:make_number", "--dry-run"]) == 2
    assert "must return" in capsys.readouterr().err
    assert cli.main(["adapt", "digits", "--options", "quickly"]) == 2
    assert "--options" in capsys.readouterr().err
