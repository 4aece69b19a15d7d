"""TorchScript: tracing records the ops of this library, scripting is refused by name."""

import pytest
import torch
from test_portable import Net
from torch import nn

import ctkernels
from ctkernels import functional

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")


class Edited(nn.Module):
    def __init__(self):
        super().__init__()
        self.m, self.log_alpha = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))

    def forward(self, z):
        return functional.head_edit(z, self.m, None, functional.hard_concrete(self.log_alpha, training=False))


def steered(fused=False):
    model = Net(nn.ReLU(inplace=True)).eval()
    ctkernels.steer(model, 0.9)
    if fused:
        ctkernels.fuse(model)
    return model


MODELS = {
    "steered": (steered, (3, 6, 6)),
    "fused": (lambda: steered(fused=True), (3, 6, 6)),
    "trained": (lambda: ctkernels.nn.TrainableCTU(3), (3, 6)),
    "fixed": (lambda: ctkernels.nn.CTU(0.8, activation="gelu"), (3,)),
    "edited": (Edited, (5, 6)),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_saved_and_runs_on_another_batch(name, grad, tmp_path):
    make, shape = MODELS[name]
    model = make().eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (torch.randn(2, *shape),))
    traced.save(str(tmp_path / "model.pt"))
    loaded, x = torch.jit.load(tmp_path / "model.pt"), torch.randn(5, *shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


def test_a_trace_with_gradients_has_them():
    unit, x = ctkernels.nn.TrainableCTU(3), torch.randn(4, 3, requires_grad=True)
    traced = torch.jit.trace(unit, (x,))
    for got, want in zip(
        torch.autograd.grad(traced(x).sum(), [x, *traced.parameters()]),
        torch.autograd.grad(unit(x).sum(), [x, *unit.parameters()]),
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steered", "expected a model that is not steered, got a steered ReLU"),
        ("trained", "expected modules whose source TorchScript can read, got a TrainableCTU"),
        ("fixed", "expected modules whose source TorchScript can read, got a CTU"),
    ],
)
def test_scripting_is_refused_by_name(name, message):
    with pytest.raises(TypeError, match=f"torch.jit.script: {message}"):
        torch.jit.script(MODELS[name][0]())


def test_scripting_a_fused_model_is_refused_by_name():
    model = Net(nn.ReLU()).eval()
    handle = ctkernels.fuse(model)
    with pytest.raises(AttributeError, match=r"torch.jit.script: expected a model that is not fused, got a fused Net"):
        torch.jit.script(model)
    handle.remove()
    torch.jit.script(model)


def test_scripting_adapters_is_refused_by_name():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from ctkernels.adapters import JolaConfig

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), JolaConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"torch.jit.script: expected modules .* got a JolaLayer"):
        torch.jit.script(model)
