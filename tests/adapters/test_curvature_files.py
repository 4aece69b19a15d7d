"""Curvature adapters on disk: saving, loading, foreign and damaged files, official checkpoints; and two processes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("safetensors")
import peft
import safetensors.torch as safetensors

from ctkernels import adapters
from ctkernels.adapters import CurvatureConfig, load_official, parameter_groups, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x):
        return self.head(self.relu(self.relu(self.conv(x)) - 0.1).mean((2, 3)))


def _net():
    torch.manual_seed(0)
    return Net().eval()


def _x():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _tuned(seed=2, **values):
    model = peft.get_peft_model(_net(), CurvatureConfig(**values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "curvature_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "values",
    [{}, {"share": "site"}, {"granularity": "layer"}, {"granularity": "shared"}, {"modules_to_save": ["head.2"]}],
)
def test_what_is_saved_is_what_is_loaded(values, tmp_path):
    model = _tuned(**values)
    expected = model(_x())
    save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", WEIGHTS]
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = peft.PeftModel.from_pretrained(_net(), tmp_path, **options).eval()
        assert torch.equal(again(_x()), expected)
        trained = [name for name, p in again.named_parameters() if p.requires_grad]
        assert bool(trained) == ("is_trainable" in options)


def test_a_saved_configuration_needs_no_search(tmp_path, monkeypatch):
    model = _tuned()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(adapters.curvature.model, "find_channels", None)
    again = peft.PeftModel.from_pretrained(_net(), tmp_path).eval()
    assert torch.equal(again(_x()), model(_x()))
    assert isinstance(again.peft_config["default"], CurvatureConfig)


def _opt():
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(config).eval()


def test_a_model_with_units_is_not_saved_as_a_plain_one(tmp_path):
    ids = torch.arange(5, 17).view(2, 6)
    net = _opt()
    expected = net(input_ids=ids).logits
    model = peft.get_peft_model(net, CurvatureConfig(task_type="CAUSAL_LM", init_beta=0.2)).eval()
    adapted = model(input_ids=ids).logits
    assert (adapted - expected).abs().max() > 1e-2
    refusal = "save_pretrained: a OPTForCausalLM with CT units cannot be saved as a plain one.*Save the adapter instead"
    with pytest.raises(ValueError, match=refusal):
        net.save_pretrained(tmp_path / "base")
    unfolded = r"model\.decoder\.layers\.0\.activation_fn: a CurvatureLayer cannot be folded into weights"
    with pytest.raises(ValueError, match=unfolded):  # with the site's name, before anything is merged
        adapters.save_merged(model, tmp_path / "merged")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(_opt(), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, adapted)

    with pytest.warns(UserWarning, match="To keep the result, save the adapter"):
        fixed = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(fixed(input_ids=ids).logits, adapted)
    for either in (fixed, copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        with pytest.raises(ValueError, match=refusal):
            either.save_pretrained(tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*raw_beta"):
        _opt().load_state_dict(fixed.state_dict())

    plain = model.unload()
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(type(plain).from_pretrained(tmp_path / "plain").eval()(input_ids=ids).logits, expected)


def test_an_adapter_of_another_method_below_saves_itself(tmp_path):
    ids = torch.arange(5, 17).view(2, 6)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["fc1"], init_lora_weights=False)
    below = peft.get_peft_model(_opt(), lora, adapter_name="below").eval()
    alone = below(input_ids=ids).logits
    with pytest.warns(UserWarning, match="multiple adapters in the model"):
        model = peft.get_peft_model(below, CurvatureConfig(task_type="CAUSAL_LM", init_beta=0.2), adapter_name="units")
    assert not torch.equal(model.eval()(input_ids=ids).logits, alone)
    below.save_pretrained(tmp_path / "adapters", selected_adapters=["below"])
    with pytest.raises(ValueError, match="save_pretrained: a OPTForCausalLM with CT units cannot be saved"):
        below.get_base_model().save_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(_opt(), tmp_path / "adapters" / "below", adapter_name="below").eval()
    assert torch.equal(again(input_ids=ids).logits, alone)


def test_a_transformers_model_saves_the_adapters_it_was_given(tmp_path):
    pytest.importorskip("transformers")
    net = _opt()
    try:
        net.add_adapter(CurvatureConfig(task_type="CAUSAL_LM", init_beta=0.2))
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(str(error))
    net.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_loading_beside_another_adapter(tmp_path):
    first, second = _tuned(), _tuned(seed=5, granularity="layer")
    second.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "loaded")
    first.set_adapter("loaded")
    assert torch.equal(first.eval()(_x()), second(_x()))


def test_foreign_and_damaged_files_are_refused(tmp_path):
    _tuned().save_pretrained(tmp_path)

    def load(model=None):
        return peft.PeftModel.from_pretrained(model or _net(), tmp_path)

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x))

    with pytest.raises(
        ValueError, match=r"layout: expected activations of this Other \(act\), got head.1, relu, relu#2"
    ):
        load(Other())
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="corrupt or cut short"):
        load()
    tensors = safetensors.load(whole)
    name = next(name for name in tensors if "raw_beta" in name)
    safetensors.save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"The adapter is incomplete: missing .*raw_beta"):
        load()
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        load()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "JOLA"}))
    with pytest.raises(ValueError, match="expected an adapter of type CURVATURE, got JOLA"):
        CurvatureConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["overwrites", "nan", "shape", "incomplete", "unknown"])
def test_a_failed_load_leaves_the_network_as_it_was(tmp_path, kind):
    _tuned().save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / WEIGHTS)
    name = next(key for key in sorted(tensors) if "raw_beta" in key)
    if kind == "overwrites":
        tensors["base_model.model.conv.weight"] = torch.zeros(6, 3, 3, 3)
    elif kind == "nan":
        tensors[name][0] = float("nan")
    elif kind == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif kind == "incomplete":
        del tensors[name]
    else:
        tensors[name.replace("relu", "later").replace("head", "later")] = tensors[name].clone()
    safetensors.save_file(tensors, tmp_path / WEIGHTS)
    message = {
        "overwrites": r"would overwrite conv\.weight of the base model",
        "nan": "got NaN or infinity in .*raw_beta",
        "shape": r"raw_beta: expected shape",
        "incomplete": "is incomplete: missing .*raw_beta",
        "unknown": "does not fit this model: unknown .*later",
    }[kind]
    net = _net()
    expected, state = net(_x()), list(net.state_dict())
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(net, tmp_path)
    assert list(net.state_dict()) == state
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(net(_x()), expected)
    model = _tuned(seed=5)
    before = model(_x())
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert not any("second" in key for key in model.state_dict())
    assert torch.equal(model(_x()), before)


def test_a_broken_adapter_is_refused_in_the_words_of_peft():
    model = _tuned()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "raw_beta" in name)[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)


# ------------------------------------------------------------------------------------------------- official checkpoints


class OfficialUnit(nn.Module):
    """The unit of the official code: its parameters' names and shapes, its expression and its 1e-6."""

    def __init__(self, shape):
        super().__init__()
        self._raw_beta, self._raw_coeff = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        beta, coeff = torch.sigmoid(self._raw_beta), torch.sigmoid(self._raw_coeff)
        s = 1 - beta + 1e-6
        return coeff * torch.sigmoid(beta * x / s) * x + (1 - coeff) * F.softplus(x / s, threshold=20) * s


def _official():
    net = _net()
    torch.manual_seed(4)
    net.relu, net.head[1] = OfficialUnit((1, 6, 1, 1)), OfficialUnit((1, 5))
    return net


def test_an_official_checkpoint_computes_the_same_here(tmp_path):
    official = _official()
    model = peft.get_peft_model(_net(), CurvatureConfig()).eval()
    load_official(model, official.state_dict())
    # The official 1 - beta is 1e-6 larger, here a relative change of a few 1e-6 in what the unit divides by.
    torch.testing.assert_close(model(_x()), official(_x()), rtol=1e-5, atol=1e-5)
    safetensors.save_file(official.state_dict(), tmp_path / "official.safetensors")
    again = peft.get_peft_model(_net(), CurvatureConfig()).eval()
    load_official(again, tmp_path / "official.safetensors")
    assert torch.equal(again(_x()), model(_x()))


def test_the_official_bottleneck_has_a_module_for_each_call():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = models.resnet50()
    config = CurvatureConfig()
    model = peft.get_peft_model(net, config)
    state = {}
    for index, (site, (_, size)) in enumerate(config.layout.items()):
        stem, _, number = site.partition("#")
        name = stem if stem == "relu" else f"{stem}{number or 1}"
        for kind in ("beta", "coeff"):
            state[f"{name}._raw_{kind}"] = torch.full((1, size, 1, 1), float(index), device="meta")
    assert "layer1.0.relu3._raw_beta" in state
    pairs = adapters.curvature.published.curvature_copies(model, state, None)
    assert len(pairs) == 2 * 49
    assert all(target.shape == value.shape for target, value in pairs)


def test_official_checkpoints_that_do_not_fit_change_nothing():
    model = _tuned()
    expected = model(_x())
    state = _official().state_dict()
    rows = copy.copy(state)
    rows["relu._raw_beta"] = torch.zeros(1, 56, 1, 1)
    named = {f"other.{name}" if "relu." in name else name: value for name, value in state.items()}
    part = {name: value for name, value in state.items() if "head" in name}
    cases = [
        (rows, r"relu._raw_beta: expected 6 channels, got shape \(1, 56, 1, 1\) .* a row of the image"),
        (named, "other.relu._raw_beta: adapter 'default' has no site for it"),
        (part, r"expected a checkpoint with every site of adapter 'default', got none for \['relu', 'relu#2'\]"),
        ({"conv.weight": torch.zeros(1)}, "expected tensors named <module>._raw_beta"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            load_official(model, source)
        assert torch.equal(model(_x()), expected)


# -------------------------------------------------------------------------------------------------------- two processes


def _train(model, x, y):
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, curvature_lr=1.0))
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return {n.removeprefix("module."): p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _data():
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    return x, torch.randn(8, 2, generator=torch.Generator().manual_seed(4))


def _worker(rank, port, folder, values):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_tuned(**values))
    x, y = _data()
    torch.save(_train(model, x[rank * 4 :][:4], y[rank * 4 :][:4]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("values", [{}, {"granularity": "shared", "modules_to_save": ["head.2"]}])
def test_two_processes_train_as_one(values, tmp_path):
    single = _train(_tuned(**values), *_data())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path), values), nprocs=2)
    for rank in range(2):
        double = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert double.keys() == single.keys()
        for name, value in single.items():
            # float32 sums in another order, three steps of them
            torch.testing.assert_close(double[name], value, rtol=1e-5, atol=1e-6, msg=name)


_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_PATCHES = {"image_size": 32, "patch_size": 16}
FAMILIES = {
    "gelu_tanh": ("GemmaForCausalLM", "GemmaConfig", _TINY | {"head_dim": 16, "num_key_value_heads": 2}),
    "gelu_tanh, composed": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "gelu_tanh, images": ("ViTModel", "ViTConfig", _TINY | _PATCHES | {"hidden_act": "gelu_pytorch_tanh"}),
    "quick_gelu": ("CLIPVisionModel", "CLIPVisionConfig", _TINY | _PATCHES),
    "relu, squared": ("NemotronForCausalLM", "NemotronConfig", _TINY | {"num_key_value_heads": 2}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers_train_and_come_back(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    cls, config, values = FAMILIES[name]
    images = "image_size" in values
    values = values if images else values | {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 2}

    def build():
        torch.manual_seed(0)
        return getattr(transformers, cls)(getattr(transformers, config)(**values)).eval()

    x = torch.randn(3, 3, 32, 32) if images else torch.arange(24).view(3, 8)
    model = peft.get_peft_model(build(), adapters.CurvatureConfig())
    sites = [site.activation for site in adapters.find_activations(build())]
    assert sites == [name.split(",")[0]] * 2
    tuned = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in tuned]
    optimizer = torch.optim.Adam(tuned, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(tuned, before))
    with torch.no_grad():
        expected = model.eval()(x)[0]
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
        assert torch.equal(again(x)[0], expected)
        assert not torch.equal(build()(x)[0], expected)
