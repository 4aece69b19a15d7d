"""Everything that is left on a user's modules has its name in ctkernels._marks and a row in docs/left_on_models.md."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctkernels
from ctkernels import _marks

HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
DOCUMENT = Path(__file__).parents[2] / "docs" / "left_on_models.md"
SHARED = nn.ReLU()
PEFTS = {"peft_config", "_hf_peft_config_loaded"}  # peft puts and takes them itself


class Block(nn.Module):
    """Every kind of site, a BatchNorm, a residual sum and a pooling."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.MaxPool2d(2)
        self.act, self.function, self.shared = nn.ReLU(), F.relu, SHARED

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)) + x)
        return F.relu(self.pool(self.function(self.shared(self.act(y)))))


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def snapshot(model):
    """{name: what may be left on a module}."""
    return {
        name: {
            "class": type(module),
            "attributes": dict.fromkeys(vars(module).keys() - PEFTS) | {"function": vars(module).get("function")},
            "children": list(module._modules),
            "hooks": {table: list(getattr(module, table)) for table in HOOKS if getattr(module, table, None)},
        }
        for name, module in model.named_modules(remove_duplicate=False)
    }


def check(before, model):
    """Every difference to ``before`` is a listed one; returns the names of the attributes that are new."""
    new: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in before:  # a unit, or a part of one
            assert any(part.split("_")[0] == _marks.CHILD for part in name.split(".")), name
            continue
        was, now = before[name], snapshot(module)[""]
        new |= now["attributes"].keys() - was["attributes"].keys()
        assert not was["attributes"].keys() - now["attributes"].keys()
        assert all(child.split("_")[0] == _marks.CHILD for child in set(now["children"]) - set(was["children"]))
        assert now["hooks"] == was["hooks"]
        if now["class"] is not was["class"]:
            added = vars(now["class"]).keys()
            assert vars(now["class"])[_marks.BASE] is was["class"]
            assert {_marks.BASE, _marks.RECIPE} <= added
            assert {n for n in added if n.startswith("_ctu")} <= {_marks.BASE, _marks.RECIPE}
    assert new <= _marks.ATTRIBUTES
    return new


@contextmanager
def steered(model):
    before = snapshot(model)
    with ctkernels.steer(model, 0.9):
        yield check(before, model)


@contextmanager
def fused(model):
    before = snapshot(model)
    with ctkernels.steer(model, 0.9), ctkernels.fuse(model) as handle:
        assert handle.poolings == ("0.pool", "1.pool")
        assert all(_marks.FORWARD in vars(model.get_submodule(name)) for name in handle.poolings)
        assert "0.pool: the pooling of compiled training steps" in repr(handle)
        yield check(before, model)


@contextmanager
def folded(model):
    before = snapshot(model)
    with ctkernels.fuse(model):
        yield check(before, model)


@contextmanager
def adapted(model):
    peft = pytest.importorskip("peft")
    from ctkernels.adapters import CurvatureConfig

    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pooled sites keep their activation: no call of the copy reaches them
        tuned = peft.get_peft_model(model, CurvatureConfig(granularity="layer"))
    yield check(before, model)
    tuned.unload()


STEERED = {_marks.UNITS, _marks.SPEC}
CHANGES = {
    steered: STEERED | {_marks.STEERING},
    fused: STEERED | {_marks.STEERING, _marks.FUSION, _marks.FORWARD},
    folded: {_marks.FUSION, _marks.FORWARD},
    adapted: STEERED | {_marks.CURVATURE},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_left_is_listed_and_goes(change):
    model = network()
    before, shared = snapshot(model), dict(vars(SHARED))
    with change(model) as new:
        assert new == CHANGES[change]
        model(torch.randn(2, 3, 4, 4))
        check(before, model)  # a call leaves nothing more
        check(before, copy.deepcopy(model))
        assert type(SHARED) is nn.ReLU
    assert snapshot(model) == before
    assert vars(SHARED) == shared


def test_a_merged_adapter_leaves_what_is_listed():
    peft = pytest.importorskip("peft")
    from ctkernels.adapters import CurvatureConfig

    model = network()
    before = snapshot(model)
    tuned = peft.get_peft_model(model, CurvatureConfig(granularity="layer"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging folds nothing away
        merged = tuned.merge_and_unload()
    assert check(before, merged) == STEERED


def test_attention_adapters_leave_what_is_listed():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from ctkernels.adapters import CurvatureConfig, JolaConfig, fuse_attention

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)).eval()
    before = snapshot(model)
    tuned = peft.get_peft_model(model, CurvatureConfig(activations="all", granularity="layer"))
    assert check(before, model) == STEERED | {_marks.CURVATURE, _marks.SAVE_PRETRAINED}
    tuned.unload()
    assert snapshot(model) == before

    tuned = peft.get_peft_model(model, JolaConfig())
    with_layers = snapshot(model)
    fusion = fuse_attention(model)
    new = {
        attribute
        for name, module in snapshot(model).items()
        for attribute in module["attributes"].keys() - with_layers[name]["attributes"].keys()
    }
    assert new == {_marks.ATTENTION_FUSION, _marks.FORWARD}
    fusion.remove()
    tuned.unload()
    assert snapshot(model) == before


def test_pools_leave_what_is_listed():
    pytest.importorskip("peft")
    from ctkernels.adapters import AdapterPool, CurvatureConfig, JolaConfig

    model = network()
    before = snapshot(model)
    pool = AdapterPool(model, CurvatureConfig(granularity="layer", target_modules=["act"]), 1)
    with pool.batch([None]):
        model(torch.randn(1, 3, 4, 4))
    assert check(before, model) == STEERED | {_marks.POOLS}
    pool.remove()
    assert snapshot(model) == before

    model = nn.Sequential(nn.Module())
    model[0].o_proj = nn.Linear(4, 4)
    before = snapshot(model)
    pool = AdapterPool(model, JolaConfig(target_modules=["o_proj"], head_dim=2), 1)
    hooks = {name: set(module["hooks"]) for name, module in snapshot(model).items() if module["hooks"]}
    assert hooks == {"0": {"_forward_hooks"}, "0.o_proj": {"_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"}}
    pool.remove()
    assert snapshot(model) == before


def test_every_name_has_a_row_in_the_document():
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in row.split("`")[1::2]} >= _marks.ATTRIBUTES | {_marks.CHILD}
    assert all(f"`{name}`" in DOCUMENT.read_text() for name in (_marks.BASE, _marks.RECIPE))
