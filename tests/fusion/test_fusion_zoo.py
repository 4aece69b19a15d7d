"""Real architectures, fused: outputs, all gradients and running statistics, and how much of them is fused."""

from __future__ import annotations

import pytest
import torch
from fused_models import NORMS, compare, prepare, rounded_anew
from steered_models import assert_same, snapshot
from torch import nn

import ctkernels


def vision(name, **kwargs):
    def build():
        models = pytest.importorskip("torchvision", reason="needs torchvision").models
        model = getattr(models, name)(num_classes=10, **kwargs)
        if name.startswith("vgg"):  # 120 million weights that prove nothing here
            model.avgpool = nn.AdaptiveAvgPool2d(1)
            model.classifier = nn.Sequential(nn.Linear(512, 32), nn.ReLU(True), nn.Linear(32, 10))
        return model

    return build


def transformer(cls, config, **sizes):
    def build():
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        return getattr(transformers, cls)(getattr(transformers, config)(**sizes))

    return build


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}
# name: (model, sites with a unit, sites without)
ZOO = {
    "resnet18": (vision("resnet18"), 17, 3),
    "resnet50": (vision("resnet50"), 49, 4),
    "resnext50_32x4d": (vision("resnext50_32x4d"), 49, 4),
    "regnet_x_400mf": (vision("regnet_x_400mf"), 67, 4),
    "regnet_y_400mf": (vision("regnet_y_400mf"), 65, 4),
    "densenet121": (vision("densenet121"), 121, 0),
    "vgg11_bn": (vision("vgg11_bn"), 9, 0),
    "mobilenet_v2": (vision("mobilenet_v2"), 35, 17),
    "mobilenet_v3_small": (vision("mobilenet_v3_small"), 14, 29),  # the others are followed by a Hardswish
    "efficientnet_b0": (vision("efficientnet_b0"), 49, 16),
    "transformers ResNet": (transformer("ResNetForImageClassification", "ResNetConfig", **RESNET), 13, 1),
    "transformers basic ResNet": (
        transformer("ResNetForImageClassification", "ResNetConfig", layer_type="basic", **RESNET),
        9,
        1,
    ),
    "transformers ConvNext": (transformer("ConvNextForImageClassification", "ConvNextConfig", **CONVNEXT), 3, 0),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["frozen", "train"])
@pytest.mark.parametrize("name", ZOO)
def test_network(name, mode):
    build, units, folds = ZOO[name]
    torch.manual_seed(0)
    model, x = prepare(build()).eval(), torch.randn(2, 3, 64, 64)
    kinds = {"silu", "gelu"} if name.endswith(("ConvNext", "b0")) else None
    ctkernels.steer(model, 0.7, activations=kinds or ("relu", "relu6"))
    before = snapshot(model)
    handle = compare(model, x, ctkernels.fuse, mode, runs=lambda plain, x: rounded_anew(plain, x, range(3)))
    with_unit = [site for site in handle.sites if site.unit]
    assert (len(with_unit), len(handle.sites) - len(with_unit)) == (units, folds)
    norms = {n for n, m in model.named_modules() if isinstance(m, NORMS)}
    assert norms == {site.norm for site in handle.sites if site.norm}
    handle.remove()
    if mode == "frozen":
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize(("name", "units"), [("test_efficientnet", 11), ("mobilenetv3_small_050", 14)])
def test_norms_that_call_the_activation_themselves(name, units, mode):
    """timm's ``BatchNormAct2d``: with a CT unit inside, with another activation (a Hardswish), with none."""
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    model = prepare(timm.create_model(name, num_classes=10)).eval()
    ctkernels.steer(model, 0.7, activations="all")
    before = snapshot(model)
    handle = compare(model, torch.randn(2, 3, 64, 64), ctkernels.fuse, mode, lambda m, x: rounded_anew(m, x, range(3)))
    assert {n for n, m in model.named_modules() if isinstance(m, NORMS)} == {s.norm for s in handle.sites if s.norm}
    assert sum(bool(site.unit) for site in handle.sites) == units
    handle.remove()
    if mode != "train":
        assert_same(before, snapshot(model))
