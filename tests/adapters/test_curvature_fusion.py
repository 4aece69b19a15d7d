"""Fusion of models with learned curvature: the same outputs and gradients, whatever is done to the adapter meanwhile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import ctkernels

pytest.importorskip("peft")
import peft

pytest.importorskip("ctkernels.adapters")
from curvature_networks import merged, shaken
from fused_models import (
    BLOCKS,
    Residual,
    assert_networks_agree,
    assert_one_activation_a_unit,
    observe,
    prepare,
    rounded_anew,
)
from steered_models import assert_same, snapshot

from ctkernels.adapters import CurvatureConfig, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def residual(blocks, seed=0):
    torch.manual_seed(seed)
    return prepare(Residual(blocks), seed).eval()


def tuned(network, **config):
    return shaken(peft.get_peft_model(network, CurvatureConfig(input_shape=(3, 8, 8), **config))).eval()


def image(batch=3, size=8):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_fusion_changes_nothing(model, x):
    """Output, input's and all learned gradients, statistics: as good as the unfused model's by float64. Returns the handle."""
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    handle = ctkernels.fuse(model)
    fused = observe(model, x)
    # Many runs: in so small a network the worst of a few is often right by luck.
    assert_networks_agree(fused, rounded_anew(plain, x, range(40)), observe(exact, x.double()))
    assert sum("curvature_raw" in name for name in fused if name.startswith("grad")) > 0
    return handle


@pytest.mark.parametrize("learned", ["adapter", "everything", "everything, batch statistics"])
@pytest.mark.parametrize("block", sorted(BLOCKS.keys() - {"strange"}))  # whose channels cannot be found
def test_every_block(block, learned):
    model = tuned(residual([block]))
    if learned != "adapter":
        model.requires_grad_().train("batch" in learned)
    handle = assert_fusion_changes_nothing(model, image())
    steered = residual([block])
    ctkernels.steer(steered, 0.8)
    sites = [str(site).replace("base_model.model.", "") for site in handle.sites]
    assert sites == [str(site) for site in ctkernels.fuse(steered).sites]


@pytest.mark.parametrize("config", [{"granularity": "layer"}, {"granularity": "shared"}, {"share": "site"}])
def test_granularities(config):
    assert_fusion_changes_nothing(tuned(residual(["basic", "projected"]), **config), image())


@pytest.mark.slow
def test_resnet_18():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = tuned(prepare(models.resnet18(num_classes=5)), modules_to_save=["fc"])
    with assert_fusion_changes_nothing(model, image(2, 32)) as handle:
        assert sum(bool(site.norm and site.unit) for site in handle.sites) == 17
        assert sum(site.residual for site in handle.sites) == 8


def test_one_activation_a_unit_is_kept():
    """Frozen BatchNorms are folded into frozen convolutions, whose inputs are not kept."""
    model = tuned(residual(["basic"] * 3))
    ctkernels.fuse(model)
    assert_one_activation_a_unit(model, image(4, 16))


def test_the_adapter_stays_an_adapter(tmp_path):
    """Switched, disabled, saved, merged and unloaded while the model is fused: as without fusion; and back bit for bit."""
    model = tuned(residual(["basic", "projected"]))
    model.add_adapter("other", CurvatureConfig(input_shape=(3, 8, 8), init_beta=0.6, target_modules=r"blocks.*"))
    plain, x = copy.deepcopy(model), image()
    handle = ctkernels.fuse(model)

    def same():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)

    default = model(x)
    for net in (model, plain):
        net.set_adapter("other")
    same()
    assert not torch.allclose(model(x), default, atol=1e-3)
    with model.disable_adapter(), plain.disable_adapter():
        same()
    for net, name in ((model, "fused"), (plain, "plain")):
        net.set_adapter("default")
        save_adapter(net, tmp_path / name)
    for file in (tmp_path / "plain").rglob("*.safetensors"):
        assert (tmp_path / "fused" / file.relative_to(tmp_path / "plain")).read_bytes() == file.read_bytes()
    handle.remove()
    assert torch.equal(model(x), plain(x))
    before = snapshot(model)
    with ctkernels.fuse(model):
        same()
    assert_same(before, snapshot(model))
    handle = ctkernels.fuse(model)
    fixed = merged(copy.deepcopy(model))
    torch.testing.assert_close(fixed(x), plain(x), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in fixed.parameters())
    for net in (model, plain):
        with pytest.warns(UserWarning, match="cannot be folded"):
            net.merge_adapter()
        net.unmerge_adapter()
    same()
    original, unfused = model.unload(), residual(["basic", "projected"])
    torch.testing.assert_close(original(x), unfused(x), rtol=1e-5, atol=1e-5)
    handle.remove()
    assert torch.equal(original(x), unfused(x))


def test_fixed_units_are_fused():
    model = merged(tuned(residual(["basic", "two branches"])))
    plain, x = copy.deepcopy(model), image()
    handle = ctkernels.fuse(model)
    assert sum(bool(site.unit) for site in handle.sites) == 4
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model = tuned(residual(["basic"]))
    x, plain = image(), copy.deepcopy(model)
    ctkernels.fuse(model)
    ours, theirs = observe(torch.compile(model, fullgraph=True, backend="aot_eager"), x), observe(plain, x)
    for name, value in theirs.items():
        found = ours[name] if name in ours else ours[name.replace(" ", " _orig_mod.", 1)]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize(("targets", "layers"), [(("conv1",), 3), (("conv1", "conv2", "stem.0"), 0)])
def test_beside_lora(targets, layers, batch_statistics):
    """A convolution with LoRA stays as it is, and the unit takes the BatchNorm after it; one without is folded."""
    network = residual(["basic", "two branches"])
    lora = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)  # random, so that both parts act
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT|Already found a `peft_config`")
        model = tuned(peft.get_peft_model(network, lora))
    trained = ("lora_", "curvature_raw")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(batch_statistics)
    x = image()
    with torch.no_grad():
        unfused = copy.deepcopy(model)(x)
    before = snapshot(model)
    handle = assert_fusion_changes_nothing(model, x)
    units = [site for site in handle.sites if site.unit]
    assert len(units) == 4
    assert all(site.norm for site in units)
    assert not any(site.layer.endswith(targets) for site in units)
    assert sum(bool(site.layer) for site in units) == layers
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(any(part in name for name, p in model.named_parameters() if p.requires_grad) for part in trained)
    handle.remove()
    model.zero_grad()
    if not batch_statistics:  # else the running statistics have moved on, as they do without fusion
        assert_same(before, snapshot(model))
        with torch.no_grad():
            assert torch.equal(model(x), unfused)
