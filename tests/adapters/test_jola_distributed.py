"""Two processes against one: DDP, FSDP2 and tensor parallelism over gloo, of JoLA at each site and of joint adapters."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from two_processes import run_in_two

pytest.importorskip("peft")
pytest.importorskip("transformers")

STEPS = 3
WEIGHT = 0.5


def _model(kind="head", base=None):
    """A model with an adapter: JoLA at a site, "joint" with curvature, "lora" with LoRA too, "fused" with fused MLPs."""
    import peft
    from jola_families import build

    import ctkernels
    import ctkernels.adapters as adapters

    model = build("llama") if base is None else base
    config = adapters.JolaConfig(init_std=0.3, init_log_alpha=0.5)
    if kind in ("joint", "lora", "fused"):
        lora = {"r": 2, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False} if kind == "lora" else None
        config = adapters.JointConfig(jola=config, curvature={"init_beta": 0.3, "init_coeff": 0.4}, lora=lora)
    else:
        config.site = kind
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config)
    if kind == "fused":
        handle = ctkernels.fuse(model.get_base_model())
        assert [site.product for site in handle.sites] == [True, True]  # ctu_and_mul
    return model.train()


def _batch():
    torch.manual_seed(5)
    tokens = torch.randint(3, 64, (4, 6))
    return tokens


def _optimizer(model):
    import ctkernels.adapters as adapters

    return torch.optim.SGD(adapters.parameter_groups(model, lr=0.1, gate_lr=0.5))


def _train(model, tokens, optimizer, in_loss):
    """A few steps; the penalty is in the loss, or its gradient is added before the step."""
    import ctkernels.adapters as adapters

    torch.manual_seed(11)
    penalties = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        if in_loss:
            penalty = adapters.jola_penalty(model)
            loss = loss + WEIGHT * penalty
            penalties.append(penalty.detach().clone())
        loss.backward()
        if not in_loss:
            adapters.add_penalty_grad(model, WEIGHT)
        optimizer.step()
        optimizer.zero_grad()
    return penalties


def _adapter(model):
    return {
        name.replace("module.", ""): value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
        if any(f".{method}_" in name for method in ("jola", "curvature", "lora"))
    }


def _ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def _fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _same_training(rank, wrap, in_loss, want, kind="head"):
    model = wrap(_model(kind))
    penalties = _train(model, _batch()[2 * rank : 2 * rank + 2], _optimizer(model), in_loss)
    got = _adapter(model)
    assert got.keys() == want["adapter"].keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want["adapter"][name], rtol=1e-4, atol=1e-5)
    for one, two in zip(want["penalties"], penalties):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def _same_tensor_parallel(folder, want, kind="head"):
    from transformers import LlamaForCausalLM

    from ctkernels import functional

    base = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert hasattr(base.model.layers[0].self_attn.o_proj.weight, "device_mesh")
    model = _model(kind, base).eval()
    tokens = _batch()
    with mock.patch.object(functional, "ctu_and_mul", wraps=functional.ctu_and_mul) as fused:
        torch.testing.assert_close(model(tokens).logits, want["logits"], rtol=1e-4, atol=1e-4)
        model(tokens, labels=tokens).loss.backward()
    assert fused.call_count == (4 if kind == "fused" else 0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name: p.shape for name, p in trained.items()} == {name: g.shape for name, g in want["gradients"].items()}
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, want["gradients"][name], rtol=1e-3, atol=1e-5)
    if kind in ("head", "mlp"):
        with pytest.raises(ValueError, match="sharded over ranks"):
            model.merge_adapter()


CASES = {
    "ddp, penalty in the loss": lambda rank, folder, want: _same_training(rank, _ddp, True, want[True]),
    "ddp, penalty before the step": lambda rank, folder, want: _same_training(rank, _ddp, False, want[False]),
    "fsdp2, penalty in the loss": lambda rank, folder, want: _same_training(rank, _fsdp2, True, want[True]),
    "fsdp2, penalty before the step": lambda rank, folder, want: _same_training(rank, _fsdp2, False, want[False]),
    "joint, ddp": lambda rank, folder, want: _same_training(rank, _ddp, True, want["lora"], "lora"),
    "joint, fsdp2": lambda rank, folder, want: _same_training(rank, _fsdp2, True, want["lora"], "lora"),
    "joint and fused, fsdp2": lambda rank, folder, want: _same_training(rank, _fsdp2, True, want["fused"], "fused"),
    "mlp, fsdp2": lambda rank, folder, want: _same_training(rank, _fsdp2, True, want["mlp"], "mlp"),
    "block, fsdp2": lambda rank, folder, want: _same_training(rank, _fsdp2, True, want["block"], "block"),
    "tensor parallel": lambda rank, folder, want: _same_tensor_parallel(folder, want["tp"]["head"]),
    "joint, tensor parallel": lambda rank, folder, want: _same_tensor_parallel(folder, want["tp"]["joint"], "joint"),
    "joint and fused, tensor parallel": lambda rank, folder, want: _same_tensor_parallel(
        folder, want["tp"]["fused"], "fused"
    ),
    "mlp, tensor parallel": lambda rank, folder, want: _same_tensor_parallel(folder, want["tp"]["mlp"], "mlp"),
    "block, tensor parallel": lambda rank, folder, want: _same_tensor_parallel(folder, want["tp"]["block"], "block"),
}


def _case(name, rank, folder, want):
    CASES[name](rank, folder, want)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run every case in two processes, started once; their error texts by case."""
    from jola_families import build

    folder = tmp_path_factory.mktemp("distributed")
    want = {"tp": {}}
    for key, in_loss in ((True, True), (False, False), ("lora", True), ("fused", True), ("mlp", True), ("block", True)):
        model = _model(key if isinstance(key, str) else "head")
        penalties = _train(model, _batch(), _optimizer(model), in_loss)
        want[key] = {"adapter": _adapter(model), "penalties": penalties}
    build("llama").save_pretrained(folder)
    tokens = _batch()
    for kind in ("head", "joint", "fused", "mlp", "block"):
        model = _model(kind).eval()
        logits = model(tokens).logits
        model(tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        want["tp"][kind] = {"logits": logits.detach(), "gradients": gradients}
    return run_in_two(_case, CASES, folder, want)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(results, case):
    assert [result[case] for result in results] == ["", ""]
