"""The commands robust and curvature, from data to results, and what they say about bad input."""

import json

import pytest
import torch
from torch import nn

from ctkernels import cli
from ctkernels.cli import option_types as types
from ctkernels.lab.report.page import read_section

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")
pytest.importorskip("tqdm", reason="the progress bar needs tqdm")


def make_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


MODEL = f"{__name__}:make_net"


@pytest.fixture
def data(tmp_path):
    """60 grey images, 36 x 36: bright and dark."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = (rng.integers(0, 120, (60, 36, 36)) + 60 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    return tmp_path / "data.npz"


SMALL = ("--model", MODEL, "--size", 32, "--resize", 32)
QUICK = ("--betas", "0.8,1", "--iterations", 3, "--queries", 5, "--severities", "2", "--no-progress")


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.mark.parametrize("head", ["probe", "own"])
def test_robust_from_end_to_end(data, tmp_path, capsys, head):
    pytest.importorskip("pyautoattack", reason="attacks need pyautoattack")
    pytest.importorskip("imagecorruptions", reason="corruptions need imagecorruptions-imaug")
    out = tmp_path / "out"
    options = ("--corruptions", "fog,contrast", "--linf", "2/255", "--head", head, "--out", out)
    assert run("robust", data, *SMALL, *QUICK, *options) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "result.json").read_text())
    assert found["verdict"] in shown
    assert [c["name"] for c in found["conditions"]] == ["ℓ∞ 2/255", "ℓ2 0.5", "corruptions"]
    assert found["conditions"][0]["eps"] == 2 / 255
    assert found["command"].startswith(f"python -m ctkernels robust {data}")
    pytest.importorskip("matplotlib", reason="the report's pictures need matplotlib")
    assert read_section(out / "result.json").stage == "robust"


def test_robust_with_adapters(data, tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    pytest.importorskip("pyautoattack", reason="attacks need pyautoattack")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(make_net(), peft.LoraConfig(r=1, target_modules=["0"], modules_to_save=["4"]))
    adapted.save_pretrained(str(tmp_path / "lora"))
    options = ("--corruptions", "none", "--l2", "none", "--head", "own")
    adapter = ("--adapter", f"lora={tmp_path / 'lora'}", "--out", tmp_path / "out")
    assert run("robust", data, *SMALL, *QUICK, *options, *adapter) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "lora" in [row["method"] for row in found["conditions"][0]["test"]]
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert run("robust", data, *SMALL, *QUICK, *options, *adapter) == 2
    assert "adapter_model.safetensors: expected a .safetensors file" in capsys.readouterr().err
    weights.unlink()
    assert run("robust", data, *SMALL, *QUICK, *options, *adapter) == 2
    assert "expected adapter_model.safetensors" in capsys.readouterr().err


def test_robust_with_what_tune_left(data, tmp_path, capsys):
    """The network that tune tested, on the same test images, whatever the seed; refused on others."""
    for module in ("peft", "accelerate", "safetensors"):
        pytest.importorskip(module, reason=f"tune needs {module}")
    pytest.importorskip("pyautoattack", reason="attacks need pyautoattack")
    torch.manual_seed(0)
    torch.save(make_net().state_dict(), tmp_path / "net.pt")
    network = (
        "--model",
        f"{MODEL}={tmp_path / 'net.pt'}",
        "--size",
        32,
        "--resize",
        32,
        "--no-progress",
        "--device",
        "cpu",
    )
    assert (
        run("tune", data, *network, "--epochs", 3, "--head-lr", 0.3, "--betas", "0.8", "--out", tmp_path / "tune") == 0
    )
    tuned = json.loads((tmp_path / "tune/result.json").read_text())
    (cell,) = [c for c in tuned["cells"] if c["method"] == "tct"]
    assert cell["test"] > 0.5  # it is not one that knows one class only
    options = ("--model", f"{MODEL}={tmp_path / 'net.pt'}", "--corruptions", "none", "--l2", "none", "--seed", 3)
    adapter = ("--adapter", f"t-ct={tmp_path / 'tune'}", "--out", tmp_path / "out")
    assert run("robust", data, *SMALL[2:], *QUICK, *options, *adapter) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    (row,) = [row for row in found["conditions"][0]["test"] if row["method"] == "t-ct"]
    assert row["clean"] == cell["test"]
    assert run("robust", data, *SMALL[2:], *QUICK, *options, *adapter, "--test", 0.3) == 2
    assert "--test must be 0.2, as when" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", x=np.load(data)["x"], y=np.arange(60) % 3)
    assert run("robust", tmp_path / "other.npz", *SMALL[2:], *QUICK, *options, *adapter) == 2
    assert (
        "--adapter t-ct: expected one for the classes ['0', '1', '2'], got one for ['0', '1']"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--linf", "x"), "--linf must be a positive number, a fraction such as 8/255, or none, got 'x'"),
        (("--l2", "1/0"), "--l2 must be a positive number"),
        (("--corruptions", "rain"), "--corruptions must be some of gaussian_noise, "),
        (("--severities", "a"), "--severities must be whole numbers from 1 to 5 with commas"),
        (("--attacks", "pgd"), "--attacks must be some of"),
        (("--adapter", "x"), "--adapter must be NAME=FOLDER"),
        (("--adapter", "x=none"), "adapter_config.json or the result.json of tune in none"),
        (("--betas", "2"), "--betas must be START:STOP:STEP"),
        (("--linf", "none", "--l2", "none", "--corruptions", "none"), "threats or corruptions must hold something"),
    ],
)
def test_robust_refuses_bad_options(data, tmp_path, capsys, options, message):
    assert run("robust", data, *SMALL, "--no-progress", "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["coordinate", "bayesian"])
def test_search_from_end_to_end(data, tmp_path, capsys, strategy):
    if strategy == "bayesian":
        pytest.importorskip("optuna", reason="Bayesian search needs Optuna")
    options = ("--strategy", strategy, "--evaluations", 3, "--groups", 1, "--no-progress", "--out", tmp_path / "out")
    assert run("search", data, *SMALL, *options) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["verdict"] in capsys.readouterr().out
    assert found["evaluations"]["made"] == 3
    assert found["strategy"] == strategy
    assert run("search", data, *SMALL, "--groups", "layer", "--no-progress", "--out", tmp_path / "other") == 2
    assert "--groups must be shared, stage, site, or a number of groups" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", [b"no journal\n", b'{"op_code": 0, "worker_id"', b"\xff\xfe\0", b"[]\n"])
def test_search_names_a_storage_that_is_damaged(data, tmp_path, capsys, content):
    pytest.importorskip("optuna", reason="Bayesian search needs Optuna")
    (tmp_path / "trials.log").write_bytes(content)
    options = ("--strategy", "bayesian", "--evaluations", 2, "--no-progress", "--out", tmp_path / "out")
    assert run("search", data, *SMALL, *options, "--storage", tmp_path / "trials.log") == 2
    assert f"storage must be a file or database that Optuna can use, got '{tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bounds():
    assert types.BOUND("8/255") == 8 / 255
    assert types.BOUND("0.5") == 0.5
    assert types.BOUND("none") is None


def test_curvature_of_a_network(data, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--images", 6, "--directions", 1, "--betas", "0.5,1", "--out", out)
    assert run("curvature", data, *SMALL, *options) == 0
    found = json.loads((out / "result.json").read_text())
    assert [row["beta"] for row in found["rows"]] == [None, 0.5, 1.0]
    assert found["rows"][0]["data"]["mean"] == 0 < found["rows"][1]["data"]["mean"]
    assert "Lipschitz" in capsys.readouterr().out


def test_curvature_of_small_networks(tmp_path, capsys):
    pytest.importorskip("peft", reason="LoRA needs peft")
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    found = []
    for name in ("a", "b"):
        assert run("curvature", "--seeds", "3", "--steps", "8,8,8", "--out", tmp_path / name) == 0
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert found[0]["runs"] == found[1]["runs"]
    networks = found[0]["runs"][0]["circles"]["networks"]
    # width 7: LoRA of rank 1 on 2 x 7 and 7 x 1, T-CT one beta and one c per unit
    assert {n: networks[n]["parameters"] for n in networks} == {"trained": 29, "LoRA, rank 1": 17, "T-CT": 14}
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["circles-seed3.png", "curve-seed3.png", "result.json", "spirals-seed3.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet18"), "data and --model belong together"),
        (("--seeds", "x"), "--seeds must be whole numbers"),
        (("--steps", "1,2"), "--steps must be three whole numbers"),
        (("--betas", "2"), "--betas must be START:STOP:STEP"),
    ],
)
def test_curvature_refuses_bad_options(options, message, tmp_path, capsys):
    assert run("curvature", "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
