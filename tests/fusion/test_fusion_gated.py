"""Fusion of gated MLPs: the unit and the product it enters are one pass, with the same outputs and gradients."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fused_models import compare
from steered_models import assert_same, snapshot
from torch import nn

import ctkernels
from ctkernels import export
from ctkernels.fusion import gated


class Mlp(nn.Module):
    def __init__(self, activation=nn.SiLU, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 5)
        self.act = activation(inplace=True) if inplace else activation()

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(Mlp):
    def forward(self, x):
        return self.down_proj(self.up_proj(x) * self.act(self.gate_proj(x)))


class Function(Mlp):
    def forward(self, x):
        return self.down_proj(torch.mul(F.silu(self.gate_proj(x)), self.up_proj(x)))


class Multiplied(Mlp):
    def forward(self, x):
        y = self.act(self.gate_proj(x))
        y *= self.up_proj(x)
        return self.down_proj(y)


class NoLayer(Mlp):
    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x) + 1) * self.up_proj(x))


class Packed(nn.Module):
    def __init__(self, activation=nn.SiLU, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj, self.down_proj = nn.Linear(6, 40), nn.Linear(20, 5)
        self.act = activation(inplace=True) if inplace else activation()

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act(gate))


class PackedFunction(Packed):
    def forward(self, x):
        gate, up = torch.chunk(self.gate_up_proj(x), 2, -1)
        return self.down_proj(F.silu(gate) * up)


class Channels(nn.Module):
    """Halves of the channels of images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 8, 1), nn.SiLU()

    def forward(self, x):
        gate, up = self.conv(x).chunk(2, 1)
        return self.act(gate) * up


class ReadTwice(Mlp):
    def forward(self, x):
        y = self.act(self.gate_proj(x))
        return self.down_proj(y * self.up_proj(x) + y)


class UpReadTwice(Packed):
    """Of a packed projection, a half that something else reads: gate is fused, but not as a half."""

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up + up)


class Overwritten(Mlp):
    """up is overwritten after it is read: the product cannot wait."""

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(up.mul_(self.act(self.gate_proj(x))) + up)


class Scalars(Mlp):
    """A product with another shape."""

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x).mean(-1, keepdim=True))


FUSED = {
    Mlp: ["gate_proj -> act -> mul"],
    UpFirst: ["gate_proj -> act -> mul"],
    Function: ["gate_proj -> forward:silu -> mul"],
    Multiplied: ["gate_proj -> act -> mul"],
    NoLayer: ["act -> mul"],
    Packed: ["act -> mul"],
    PackedFunction: ["forward:silu -> mul"],
    Channels: ["act -> mul"],
}


def steered(model, beta=0.6, coeff=0.8):
    ctkernels.steer(model, beta=beta, coeff=coeff, activations=("silu", "gelu"))
    return model.eval()


def inputs(model):
    torch.manual_seed(1)
    return torch.randn(2, 3, 4, 4) if isinstance(model, Channels) else torch.randn(2, 7, 6)


def calls():
    """Counts the calls of the op."""
    return mock.patch.object(gated.functional, "ctu_and_mul", wraps=gated.functional.ctu_and_mul)


@pytest.mark.parametrize("mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_every_form(kind, mode):
    model = steered(kind())
    before, x = snapshot(model), inputs(model)
    with calls() as called:
        handle = compare(model, x, ctkernels.fuse, mode)
    assert called.call_count >= 1
    assert [str(site) for site in handle.sites] == FUSED[kind]
    assert all(site.product for site in handle.sites)
    handle.remove()
    model.requires_grad_().eval()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "model", [Mlp(inplace=True), Mlp(nn.GELU), Packed(nn.GELU)], ids=["in place", "gelu", "packed gelu"]
)
def test_in_place_activations_and_gelu(model):
    model = steered(model)
    with calls() as called:
        compare(model, inputs(model), ctkernels.fuse, "eval")
    assert called.call_count >= 1


@pytest.mark.parametrize("kind", [ReadTwice, Overwritten, Scalars, UpReadTwice], ids=lambda kind: kind.__name__)
def test_what_others_read_or_overwrite_stays_right(kind):
    model = steered(kind())
    x = inputs(model)
    if kind is Overwritten:
        with torch.no_grad():
            expected = model(x)
            ctkernels.fuse(model)
            assert torch.equal(model(x), expected)
        return
    handle = compare(model, x, ctkernels.fuse, "eval")
    halves = [site for site in handle.sites if site.product]
    assert bool(halves) == (kind is not ReadTwice)


def test_sixteen_bits_round_once():
    model = steered(Mlp()).bfloat16()
    x = inputs(model).bfloat16()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        plain = (model(x).double() - exact).abs().max()
        ctkernels.fuse(model)
        fused = (model(x).double() - exact).abs().max()
    assert fused <= 2 * plain


def test_in_inference_the_result_takes_the_place_of_the_gate():
    model = steered(Mlp())
    x = torch.randn(64, 40, 6)
    expected = model(x)
    ctkernels.fuse(model)
    with torch.no_grad(), calls() as called:
        torch.testing.assert_close(model(x), expected)
    assert called.call_args.kwargs["inplace"]


def test_hooks_and_changes_meanwhile():
    model = steered(Mlp())
    x = inputs(model)
    handle = ctkernels.fuse(model)
    seen = []
    hook = model.act.register_forward_hook(lambda *_: seen.append(1))
    with calls() as called:
        with_hook = model(x)
    assert seen
    assert called.call_count == 0
    hook.remove()
    with calls() as called:
        torch.testing.assert_close(model(x), with_hook)
    assert called.call_count == 1
    state = {k: v + 0.25 for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    fused = model(x)
    handle.remove()
    torch.testing.assert_close(fused, model(x))


@pytest.mark.parametrize("kind", [Mlp, Packed], ids=lambda kind: kind.__name__)
def test_transforms_compile_and_export(kind):
    model = steered(kind())
    x = inputs(model)
    expected = model(x)
    ctkernels.fuse(model)
    torch.testing.assert_close(torch.func.vmap(model)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(model, (x,), strict=True)
    assert "ctu_and_mul" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected)
    portable = export.portable(exported)
    assert "ctkernels" not in str(portable.graph)
    torch.testing.assert_close(portable.module()(x), expected)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), expected)


# ---- language models ---------------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Llama": "gate_proj -> {}.act_fn -> mul",
    "Qwen2": "gate_proj -> {}.act_fn -> mul",
    "Mistral": "gate_proj -> {}.act_fn -> mul",
    "Phi3": "act -> mul",
    "Glm": "act -> mul",
}


def language_model(family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SMALL, **({"head_dim": 8} if family == "Glm" else {}))
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models(family):
    model = steered(language_model(family))
    ids = torch.arange(22).view(2, 11)
    expected = logits(model, ids)
    handle = ctkernels.fuse(model)
    assert len(handle.sites) == 2
    assert all(site.product for site in handle.sites)
    with calls() as called:
        torch.testing.assert_close(logits(model, ids), expected)
    assert called.call_count == 2
    assert all((call.args[1] is None) == (family in ("Phi3", "Glm")) for call in called.call_args_list)


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_learned_curvature_of_a_language_model(family):
    """Gradients of the adapter as without fusion; it can be switched off, and taken away, while the model is fused."""
    peft = pytest.importorskip("peft")
    from ctkernels.adapters import CurvatureConfig

    plain = language_model(family)
    ids = torch.arange(22).view(2, 11)
    original = logits(plain, ids)
    config = CurvatureConfig(activations=["silu"])
    model = peft.get_peft_model(plain, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator)

    def step():
        model.zero_grad()
        found = logits(model, ids)
        found.square().mean().backward()
        return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    y, grads = step()
    ctkernels.fuse(model)
    with calls() as called:
        fused, fused_grads = step()
    assert called.call_count == 2
    assert grads.keys() == fused_grads.keys()
    torch.testing.assert_close(fused, y)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item(), msg=name)
    with model.disable_adapter(), calls() as called:
        torch.testing.assert_close(logits(model, ids), original)
    assert called.call_count == 0
