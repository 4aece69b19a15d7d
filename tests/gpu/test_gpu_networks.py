"""On a GPU, whole networks on a real GPU: fused ones against themselves, JoLA against the same model on the CPU in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_models import Residual, compare, prepare

import ctkernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def whole_float32():
    """Convolutions and products of float32 as exact as the bounds expect; what torch does by default is tf32."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


@pytest.mark.parametrize("mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize("name", ["blocks", "resnet18"])
def test_a_fused_network_equals_itself(name, mode):
    torch.manual_seed(0)
    if name == "blocks":
        model = Residual(["basic", "residual first", "projected"])
    else:
        model = pytest.importorskip("torchvision").models.resnet18(num_classes=10)
    model = prepare(model).cuda()
    torch.use_deterministic_algorithms(False)  # resnet's max pooling has a backward pass of atomic additions
    ctkernels.steer(model, 0.9)
    handle = compare(model, torch.randn(4, 3, 64, 64).cuda(), ctkernels.fuse, mode)
    assert handle.sites


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_compiled_training_step_of_learned_units(layout):
    torch.manual_seed(0)
    model = prepare(Residual(["basic", "projected"], channels=8)).eval().requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(parent, name, ctkernels.nn.TrainableCTU(8))
    ctkernels.fuse(model.cuda())
    x = torch.randn(4, 3, 32, 32).cuda().to(memory_format=layout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(model, fullgraph=True)(x).square().sum(), parameters)
    for ours, eager in zip(found, expected):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


def _llama(heads=4):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from ctkernels.adapters import JolaConfig

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16 * heads, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return peft.get_peft_model(model, JolaConfig(task_type="CAUSAL_LM", init_std=0.3)).eval()


def _loss_and_gradients(model, ids, mask):
    output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(output.loss, parameters)
    own = {"logits": output.logits * mask[..., None], "loss": output.loss, **dict(zip(names, grads))}
    return {name: value.detach().double().cpu() for name, value in own.items()}


@pytest.mark.parametrize("inside", [False, True], ids=["in the projection", "in the attention"])
def test_jola_equals_float64_on_the_cpu(inside):
    from ctkernels.adapters import fuse_attention

    model = _llama()
    ids = torch.randint(1, 64, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) >= torch.tensor([0, 5, 11])[:, None]).long()
    truth = _loss_and_gradients(copy.deepcopy(model).double(), ids, mask)
    baseline = _loss_and_gradients(model, ids, mask)
    model.cuda()
    if inside:
        fuse_attention(model)
    found = _loss_and_gradients(model, ids.cuda(), mask.cuda())
    again = _loss_and_gradients(model, ids.cuda(), mask.cuda())
    for name, exact in truth.items():
        scale = exact.abs().max().clamp_min(1e-30)  # gates that are open get none
        error, theirs = (found[name] - exact).abs().max() / scale, (baseline[name] - exact).abs().max() / scale
        assert error <= 4 * theirs + 16 * torch.finfo(torch.float32).eps, name
        assert torch.equal(found[name], again[name]), name


def test_generation_is_the_same_inside_the_attention():
    from ctkernels.adapters import fuse_attention

    model = _llama().cuda()
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1)).cuda()
    mask = (torch.arange(12) >= torch.tensor([0, 4])[:, None]).long().cuda()
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**given)
    handle = fuse_attention(model)
    assert torch.equal(model.generate(**given), expected)
    handle.remove()
    assert torch.equal(model.generate(**given), expected)
