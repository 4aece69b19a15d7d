"""Networks that trainable Curvature Tuning is tested with, and what their tests have in common. Needs peft."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctkernels.adapters as adapters
from ctkernels.adapters import CurvatureConfig

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": lambda: nn.PReLU(6),
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class Block(nn.Module):
    """One activation called twice, as in a ResNet; `wide` makes the calls differ in channels."""

    def __init__(self, channels: int = 6, wide: int = 6, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide)
        self.relu = act or nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Net(nn.Module):
    def __init__(self, act=nn.ReLU, wide: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.act = act()
        self.block = Block(wide=wide)
        self.hidden = nn.Linear(wide, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = self.block(self.act(self.stem(x)))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))


def make_net(**values):
    torch.manual_seed(0)
    return Net(**values).eval()


def image(batch: int = 4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 8, generator=generator)


def tuned(net=None, **values):
    return peft.get_peft_model(net or make_net(), CurvatureConfig(**values)).eval()


def count_of(model):
    return sum(p.numel() for name, p in model.named_parameters() if "curvature_" in name)


def shaken(model):
    """Parameters unlike any others, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "curvature_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def layer_at(model, site):
    return adapters.curvature.model.attached_to(model.get_base_model()).layers[site]


def merged(model):
    with pytest.warns(UserWarning, match="A nonlinearity cannot be folded into the weights"):
        return model.merge_and_unload()


def reached(model):
    """The adapter parameters that a loss has a gradient in."""
    model.zero_grad()
    loss = model(image()).sum()
    if loss.requires_grad:
        loss.backward()
    return [name for name, p in model.named_parameters() if "curvature_" in name and p.grad is not None]
