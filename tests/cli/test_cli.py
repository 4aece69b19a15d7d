"""The command line, from files to results, and what it says about bad input."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ctkernels import cli
from ctkernels.cli import option_types as types

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
pytest.importorskip("tqdm", reason="the progress bar needs tqdm")

ROOT = Path(__file__).parents[2]


def make_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


def make_linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


MODEL = f"{__name__}:make_net"


@pytest.fixture
def data(tmp_path):
    """60 images, 8 x 8: bright and dark."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = (rng.integers(0, 120, (60, 8, 8)) + 60 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    return tmp_path / "data.npz"


def steer(*arguments):
    return cli.main(["steer", *map(str, arguments)])


SMALL = ("--size", 8, "--resize", 8, "--betas", "0.8,0.9", "--no-progress")


def test_npz_from_end_to_end(data, tmp_path, capsys):
    assert steer(data, "--model", MODEL, *SMALL, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert found["verdict"] in shown
    assert f"file {data}: 38 train, 10 validation, 12 test images" in shown
    assert "1 activations steered; features: input of 4" in shown
    assert [row["beta"] for row in found["grid"]] == [0.8, 0.9, 1.0]
    assert found["command"].startswith(f"python -m ctkernels steer {data} --model {MODEL} --size 8")
    assert found["options"]["normalise"] == "target"
    assert found["data"]["classes"] == ["0", "1"]
    assert 0 < found["data"]["preprocess"]["mean"][0] < 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["accuracy_vs_beta.png", "result.json"]


def test_same_command_same_numbers(data, tmp_path):
    found = []
    for out in ("a", "b"):
        assert steer(data, "--model", MODEL, *SMALL, "--no-plot", "--out", tmp_path / out) == 0
        found.append(json.loads((tmp_path / out / "result.json").read_text()))
        assert not (tmp_path / out / "accuracy_vs_beta.png").exists()
    assert found[0]["grid"] == found[1]["grid"]
    assert found[0]["test"] == found[1]["test"]


def test_folder_from_end_to_end_as_a_process(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="image files need pillow")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, name in enumerate(("dark", "bright")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(10):
                pixels = (rng.integers(0, 120, (9, 11, 3)) + 100 * k).astype(np.uint8)
                image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "ctkernels", "steer", "photos", "--model", "test_cli:make_net", *map(str, SMALL)]
    done = subprocess.run(
        [*command, "--activations", "relu", "--normalise", "imagenet", "--max-test", "8", "--probe", "adam"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "folder photos: 16 train, 4 validation, 8 test images" in done.stdout
    assert (tmp_path / "out/steer/accuracy_vs_beta.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "or a factory module:function; nowhere does not exist"),
        (
            ["{data}", "--betas", "0.9:0.7:0.1"],
            "--betas must be START:STOP:STEP with both ends, or values with commas, all in [0, 1], got '0.9:0.7:0.1'",
        ),
        (["{data}", "--betas", "0.9,1.5"], "all in [0, 1], got '0.9,1.5'"),
        (["{data}", "--memory-limit", "lots"], "--memory-limit must be a size such as 500MB or 2GiB, got 'lots'"),
        (["{data}", "--device", "abacus"], "--device must be one that is here, got 'abacus'"),
        (["{data}", "--out", "{data}"], "--out must be a folder"),
        (["{data}", "--size", "0"], "--size must be a whole number of at least 1 and at most 16384, got '0'"),
        (["{data}", "--max-train", "0"], "--max-train must be a whole number of at least 1, got '0'"),
        (["{data}", "--max-train", "3"], "has 1 images, too few to split into 2 parts"),
        (["{data}", "--val", "2"], "--val must be a number between 0 and 1, got '2'"),
        (
            ["{data}", "--model", f"{MODEL}=gone.pth"],
            "--model: weights must be default, none, packaged or a file, got 'gone.pth'",
        ),
        (["{data}", "--model", "no_such:make"], "no module named 'no_such'"),
        (["{data}", "--feature-layer", "body"], "feature_layer must be one of"),
    ],
)
def test_bad_input_is_one_line_and_code_2(data, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    filled = [str(data) if a == "{data}" else a for a in arguments]
    assert steer("--model", MODEL, *SMALL, *filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctkernels: error: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out/steer/result.json").exists()


def test_network_without_activation(data, capsys, tmp_path):
    assert steer(data, "--model", f"{__name__}:make_linear", *SMALL, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("ctkernels: error: ")
    assert "activation" in error


def test_traceback_on_request(capsys):
    assert steer("nowhere", "--model", MODEL, "--traceback") == 2
    assert "Traceback" in capsys.readouterr().err


def test_overview_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "steer" in capsys.readouterr().out
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["ster"]) == 2
    assert capsys.readouterr().err == "ctkernels: error: unknown command 'ster'; did you mean steer?\n"
    assert cli.main(["--version"]) == 0


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["steer", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for word in ("examples:", "torchrun", "--memory-limit", "exit codes"):
        assert word in shown


def test_weights_are_drawn_from_the_seed(data, tmp_path):
    grids = []
    for seed in (1, 1, 2):
        torch.manual_seed(99)
        out = tmp_path / "out"
        assert steer(data, "--model", MODEL, *SMALL, "--no-plot", "--seed", seed, "--out", out) == 0
        grids.append(json.loads((out / "result.json").read_text())["test"])
    assert grids[0] == grids[1]


@pytest.mark.parametrize(
    ("text", "betas"),
    [
        ("0.7:1:0.1", [0.7, 0.8, 0.9, 1.0]),
        ("0.5", [0.5]),
        ("1,0.25", [1.0, 0.25]),
        ("0.9:1:0.03", [0.9, 0.93, 0.96, 0.99]),
    ],
)
def test_parse_betas(text, betas):
    assert types.BETAS(text) == betas
    assert types.BETAS("0.7:1:0.01") == [round(0.7 + 0.01 * i, 2) for i in range(31)]


@pytest.mark.parametrize(
    "text",
    ["", "a", "1:2", "0:1:0", "0:1:-1", "0:1:nan", "0.1,,0.2", "0:inf:1", "1.5", "-0.1", "0:2:0.5", "1_0", "0:1:1e-9"],
)
def test_bad_betas(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must (be START:STOP:STEP|give at most 10000 values)"):
        types.BETAS(text)


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2 << 30), ("500 MB", 500 * 10**6), ("1e3", 1000), ("7", 7)])
def test_parse_bytes(text, size):
    assert types.SIZE(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.2.3GB", "5 apples", "1e9999", "1e99"])
def test_bad_bytes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size such as 500MB or 2GiB, got "):
        types.SIZE(text)
