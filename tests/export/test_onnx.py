"""ONNX files, in ONNX Runtime and in OpenVINO, against the model."""

from __future__ import annotations

import collections
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ctkernels
from ctkernels import export, functional

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from test_portable import Net  # noqa: E402

Run = Callable[[Path, list[torch.Tensor]], list[torch.Tensor]]


def in_onnxruntime(path, inputs):
    import onnxruntime as runtime

    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def in_openvino(path, inputs):
    import openvino

    core = openvino.Core()
    # its default is bfloat16 where the CPU has that
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled([x.numpy() for x in inputs])
    return [torch.from_numpy(results[i].copy()) for i in range(len(results))]


RUNTIMES: dict[str, Run] = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def runtimes():
    """Those that are installed, of which there has to be one."""
    found = [run for name, run in RUNTIMES.items() if importlib.util.find_spec(name) is not None]
    if not found:
        pytest.skip(f"needs one of {', '.join(RUNTIMES)}")
    return found


def check(path, inputs, want):
    for run in runtimes():
        excess = (run(path, inputs)[0] - want).abs() - 1e-5 * (1 + want.abs())
        assert excess.max() <= 0, run.__name__


class Units(nn.Module):
    """One member of the family at many settings."""

    SETTINGS = ((0.0, 0.5), (0.1, 0.5), (0.1, 1.0), (0.5, 1.0), (0.9, 0.0), (0.999, 0.3), (1 - 1e-6, 0.5), (1.0, 0.5))

    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        options: dict[str, Any] = {"activation": self.activation, "negative_slope": 0.2}
        return tuple(functional.ctu(x, beta, coeff, **options) for beta, coeff in self.SETTINGS)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "gelu", "gelu_tanh"])
def test_units_are_equal_up_to_ten_thousand(activation, tmp_path):
    sizes = torch.logspace(-6, 4, 150)
    x = torch.cat([sizes, -sizes, torch.linspace(-8, 14, 300), torch.zeros(1)])[None]
    path = export.onnx(Units(activation).eval(), (x,), tmp_path / "units.onnx")
    for run in runtimes():
        for (beta, coeff), got, want in zip(Units.SETTINGS, run(path, [x]), Units(activation)(x.double())):
            excess = (got - want).abs() - 1e-5 * (1 + want.abs())
            assert excess.max() <= 0, (run.__name__, beta, coeff, x.flatten()[excess.argmax()].item())


def test_a_steered_network_is_equal_for_every_batch(tmp_path):
    model = Net(nn.ReLU(inplace=True)).eval()
    ctkernels.steer(model, {"activation": 0.9})
    path = export.onnx(model, (torch.randn(1, 3, 6, 6),), tmp_path / "new" / "model.onnx")
    assert path == tmp_path / "new" / "model.onnx"
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    for batch in (1, 5):
        x = torch.randn(batch, 3, 6, 6)
        with torch.no_grad():
            check(path, [x], model(x))


def test_a_fused_network_is_as_small_as_the_plain_one(tmp_path):
    """Convolutions have their BatchNorms inside, and a unit at coeff = 1 is three operations."""
    x = torch.randn(2, 3, 6, 6)
    counts = []
    for beta in (None, 0.9):
        model = Net(nn.ReLU(inplace=True)).eval()
        if beta is not None:
            ctkernels.steer(model, beta, 1.0)
            ctkernels.fuse(model)
        path = export.onnx(model, (x,), tmp_path / "model.onnx")
        counts.append(collections.Counter(node.op_type for node in onnx.load(path).graph.node))
        with torch.no_grad():
            check(path, [x], model(x))
    plain, steered = counts
    assert "BatchNormalization" not in steered
    assert steered - plain == {"Mul": 4, "Sigmoid": 2}
    assert plain - steered == {"Relu": 2}


@pytest.mark.parametrize("granularity", ["channel", "layer"])
@pytest.mark.parametrize("merged", [False, True])
def test_trained_curvature_is_equal(granularity, merged, tmp_path):
    peft = pytest.importorskip("peft")
    from ctkernels.adapters import CurvatureConfig

    config = CurvatureConfig(granularity=granularity, input_shape=(3, 6, 6))
    model: Any = peft.get_peft_model(Net(nn.ReLU(inplace=True)), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "curvature" in name:
                parameter += torch.randn_like(parameter)
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        want = model(x)
    if merged:
        with pytest.warns(UserWarning, match="nonlinearity cannot be folded"):
            model = model.merge_and_unload()
    else:
        model = model.base_model.model
    path = export.onnx(model, (x,), tmp_path / "model.onnx")
    check(path, [x], want)


def test_a_language_model_with_an_adapter_is_equal(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from ctkernels.adapters import JolaConfig

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 32, (2, 6))
    with torch.no_grad():
        plain = base(tokens).logits
        model = peft.get_peft_model(base, JolaConfig(task_type="CAUSAL_LM", init_std=0.5)).eval()
        want = model(tokens).logits
    assert (want - plain).abs().max() > 1e-3

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids).logits

    path = export.onnx(Logits().eval(), (tokens,), tmp_path / "model.onnx", output_names=["logits"])
    check(path, [tokens], want)
    graph = onnx.load(path).graph
    assert [given.name for given in graph.input] == ["input_ids"]
    assert [result.name for result in graph.output] == ["logits"]


def test_nothing_is_written_where_the_export_fails(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match="opset_version: expected an integer of at least 18, got 17"):
        export.onnx(Net(nn.ReLU()).eval(), (x,), path, opset_version=17)
    with pytest.raises(ValueError, match="model: expected one in evaluation mode"):
        export.onnx(Net(nn.ReLU()), (x,), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
