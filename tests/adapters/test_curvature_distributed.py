"""Learned curvature in two processes against one: DDP and FSDP2 over gloo."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import run_in_two

pytest.importorskip("peft")

STEPS, RATE = 3, 0.5


def _model(granularity="channel"):
    from curvature_networks import Net, shaken
    from peft import get_peft_model

    from ctkernels.adapters import CurvatureConfig

    torch.manual_seed(3)
    config = CurvatureConfig(input_shape=(3, 8, 8), granularity=granularity, modules_to_save=["fc"])
    return shaken(get_peft_model(Net(), config)).eval()  # statistics of a part of the batch would be others


def _batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 0])


def _train(model, x, labels):
    """The losses; every step averages over the images of all processes."""
    from ctkernels.adapters import parameter_groups

    optimizer = torch.optim.SGD([{"params": group["params"], "lr": RATE} for group in parameter_groups(model)])
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def _learned(model):
    return {
        name.removeprefix("module."): (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in model.state_dict().items()
        if "curvature_" in name or "modules_to_save" in name
    }


def _ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def _fsdp2(model):
    """Shards of the block, and of the rest: activations with their parameters are in both."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.base_model.model.block)
    return fully_shard(model)


WRAPS = {"ddp": _ddp, "fsdp2": _fsdp2}
CASES = [f"{wrap}, {granularity}" for wrap in WRAPS for granularity in ("channel", "layer", "shared")]


def _case(name, rank, folder, want):
    wrap, granularity = name.split(", ")
    model = WRAPS[wrap](_model(granularity))
    x, labels = _batch()
    mine = slice(2 * rank, 2 * rank + 2)
    losses = _train(model, x[mine], labels[mine])
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, want[granularity]["losses"], rtol=1e-5, atol=1e-6)
    if wrap == "fsdp2":
        parameters = [p for n, p in model.named_parameters() if "curvature_" in n]
        assert parameters
        assert all(hasattr(p, "device_mesh") and p.dtype == torch.float32 for p in parameters)
    got = _learned(model)
    assert got.keys() == want[granularity]["learned"].keys()
    for key, value in got.items():
        # sums over the batch in two parts, RATE * STEPS times: float32 rounding of sums whose terms are below 1
        torch.testing.assert_close(value, want[granularity]["learned"][key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run every case in two processes, started once; their error texts by case."""
    folder, want = tmp_path_factory.mktemp("distributed"), {}
    for granularity in ("channel", "layer", "shared"):
        model = _model(granularity)
        before = copy.deepcopy(_learned(model))
        losses = _train(model, *_batch())
        want[granularity] = {"losses": losses, "learned": _learned(model)}
        assert losses[-1] < losses[0]
        for name, value in want[granularity]["learned"].items():
            assert not torch.equal(value, before[name]), f"{name} was not trained"
    return run_in_two(_case, CASES, folder, want)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(results, case):
    assert [result[case] for result in results] == ["", ""]
