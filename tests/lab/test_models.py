"""Networks by name, and their weights: what is read, and how bad files and names are refused."""

import sys

import pytest
import torch
from torch import nn

from ctkernels.lab import (
    load_model,
)
from ctkernels.lab.images.models import read_checkpoint

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")


def make_net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def make_nothing():
    return None


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrap", [False, True])
def test_factory_with_a_checkpoint(tmp_path, suffix, wrap):
    net, file = make_net(), tmp_path / f"net{suffix}"
    state = {("module." if wrap else "") + k: v for k, v in net.state_dict().items()}
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3} if wrap else state, file)
    else:
        pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file(state, file)
    loaded = load_model(f"{__name__}:make_net", file)
    assert not loaded.training
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())


class Evil:
    def __reduce__(self):
        return (print, ("unpickled!",))


def test_bad_checkpoints(tmp_path, capsys):
    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth: expected a torch.save file of tensors only"):
        read_checkpoint(tmp_path / "evil.pth")
    assert "unpickled" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict of tensors, got list"):
        read_checkpoint(tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="expected a torch\\.save file"):
        read_checkpoint(tmp_path / "text.pth")
    torch.save({"0.weight": torch.zeros(9, 3), "new": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"do not fit Sequential: 3 missing .*; 1 unexpected \(new\); 1 of another shape"
    ):
        load_model(f"{__name__}:make_net", tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("no_such_module:make", "default", "no module named 'no_such_module'"),
        (f"{__name__}:make_nett", "default", "has no function 'make_nett'"),
        (f"{__name__}:make_nothing", "default", "must return a torch.nn.Module, got NoneType"),
        (f"{__name__}:make_net", "gone.pth", "'gone.pth' does not exist"),
        ("resnet18", "packaged", r"known for \['mobilenet_v2'\], got model 'resnet18'"),
    ],
)
def test_bad_models(name, weights, message):
    with pytest.raises(ValueError, match=message):
        load_model(name, weights)


def test_torchvision_model():
    pytest.importorskip("torchvision", reason="needs torchvision")
    assert isinstance(load_model("torchvision:squeezenet1_1", "none"), nn.Module)
    with pytest.raises(ValueError, match=r"unknown model 'resnet1'; near matches: torchvision:resnet1"):
        load_model("torchvision:resnet1")


def test_timm_model():
    pytest.importorskip("timm", reason="needs timm")
    assert load_model("timm:test_resnet.r160_in1k", "none").get_classifier().out_features > 1
    with pytest.raises(ValueError, match=r"near matches: timm:test_resnet"):
        load_model("timm:test_resnett")


def test_missing_libraries_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("resnet18", "timm:resnet18"):
        with pytest.raises(ImportError, match=r"needs .*, which is not installed.*pip install \"ctkernels\[lab\]\""):
            load_model(name)
