"""The kernel for the Kernel Hub: written, loaded as the Hub's library loads it, and compared with the package itself."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from kernel_hub import build
from torch import nn
from torch.nn import functional as F

import ctkernels
from ctkernels import functional, testing
from ctkernels.ops.registration import OPS

ROOT = Path(__file__).parents[2]
BACKEND = "cpu" if torch.version.cuda is None else "cuda"  # of this torch; a GPU is not needed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The repository of a kernel."""
    out = tmp_path_factory.mktemp("hub") / "kernel"
    build.write_kernel(out, "owner/ctkernels", version=1)
    return out


@pytest.fixture(scope="module")
def kernel(folder):
    return load(folder)


def load(folder):
    """The kernel in a folder, by the library that users load it with, or in the same way where that is not installed."""
    if importlib.util.find_spec("kernels") is not None:
        from kernels import get_local_kernel

        return get_local_kernel(folder)
    variant = folder / "build" / f"torch-{BACKEND}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what is written ---------------------------------------------------------------------------------------------------


def test_the_modules_are_those_of_the_package(folder):
    own = {"__init__.py", "layers.py"}
    for tree in (folder / "torch-ext/ctkernels", *(folder / "build").iterdir()):
        for path in tree.rglob("*.py"):
            name = path.relative_to(tree).as_posix()
            if name != "_ops.py":
                assert path.read_bytes() == ((build.OWN if name in own else build.PACKAGE) / name).read_bytes()
    assert not (folder / "torch-ext/ctkernels/_ops.py").exists()  # the builder writes it
    assert not list(folder.rglob("*.so"))


@pytest.mark.parametrize(
    ("name", "source", "missing"),
    [
        ("ops/a.py", "import numpy", "numpy"),
        ("ops/a.py", "import ctkernels.nn", "ctkernels.nn"),
        ("ops/a.py", "def f():\n    from ctkernels import nn", "ctkernels"),
        ("ops/a.py", "from ..steering import steer", "steering"),
        ("ops/a.py", "from .. import steering", "steering"),
        ("ops/ctu/a.py", "from . import samples", "ops/ctu/samples"),
    ],
)
def test_an_import_that_would_fail_is_refused(name, source, missing):
    with pytest.raises(
        ValueError, match=f"{name}:.: imports {missing}, which a kernel does not have|{name}:2: imports"
    ):
        build.check_imports({**build.sources(), name: source.encode()})


def test_the_revision_depends_on_every_file():
    files = build.sources()
    revisions = {build._revision({**files, name: data + b"\n"}) for name, data in files.items()}
    assert len(revisions | {build._revision(files)}) == len(files) + 1


def test_a_kernel_is_replaced_and_nothing_else(tmp_path):
    out = tmp_path / "new/kernel"
    first = build.write_kernel(out, "owner/ctkernels", version=1)
    (out / "stale.py").touch()
    assert build.write_kernel(out, "owner/ctkernels", version=1) == first
    assert not (out / "stale.py").exists()
    assert [path.name for path in out.parent.iterdir()] == ["kernel"]
    with pytest.raises(ValueError, match="out must be a new or empty folder, or hold a kernel"):
        build.write_kernel(out.parent, "owner/ctkernels", version=1)
    assert out.exists()
    with pytest.raises(ValueError, match="repo_id must be owner/name, got 'ctkernels'"):
        build.write_kernel(out, "ctkernels", version=1)
    with pytest.raises(ValueError, match="version must be 0 or more, got -1"):
        build.write_kernel(out, "owner/ctkernels", version=-1)


def test_the_command(tmp_path):
    command = [sys.executable, ROOT / "tools/kernel_hub", "--out", "kernel"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kernel: _ctkernels_cpu_")
    assert (tmp_path / "kernel/build/torch-cuda/metadata.json").exists()


def test_the_card_names_everything_public(folder, kernel):
    card = (folder / "README.md").read_text()
    assert (folder / "CARD.md").read_text() == (folder / "build/CARD.md").read_text() == card
    front = card.split("---\n")[1]
    assert "license: apache-2.0\n" in front
    assert "  - kernel\n" in front
    assert 'get_kernel("owner/ctkernels", version=1)' in card
    assert "$" not in card
    layers = [
        name
        for name, value in vars(kernel.layers).items()
        if isinstance(value, type) and value.__module__ == kernel.layers.__name__
    ]
    for name in {*kernel.__all__, *layers} - {"layers"}:
        assert f"`{name}`" in card


def test_the_oldest_torch_is_that_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    major, minor = ast.literal_eval((build.OWN / "__init__.py").read_text().split(" < ")[1].partition(":")[0])
    assert f'"torch>={major}.{minor}"' in project
    assert f"torch {major}.{minor}" in (build.OWN / "CARD.md").read_text()


# ---- the checks of the Hub's own library -------------------------------------------------------------------------------


def test_the_hub_reads_it(folder):
    pytest.importorskip("kernels")
    from kernels import _rust, get_loaded_kernels
    from kernels.cli.info import _local_kernel_info
    from kernels.validate import AllValidator, ArchValidator, default_metadata_validators

    parsed = _rust.Build.open(folder)
    assert [str(backend).lower() for backend in parsed.general.backends] == list(build.BACKENDS)
    for backend in build.BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        metadata = _rust.Metadata.read_from_file(variant / "metadata.json")
        assert metadata.digest is not None
        metadata.digest.validate(_rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, variant))
        validator = AllValidator([*default_metadata_validators(), ArchValidator()])
        validator.validate_metadata(metadata=metadata, variant=variant.name)
        assert metadata.id.isidentifier()
        assert str(metadata.backend.backend_type).lower() == backend
    info = _local_kernel_info(folder)
    assert (info["name"], info["version"], info["license"]) == ("ctkernels", 1, "apache-2.0")
    assert load(folder) in [loaded.module for loaded in get_loaded_kernels()]


# ---- what it computes --------------------------------------------------------------------------------------------------


def test_the_ops_are_in_a_namespace_of_the_build(kernel):
    name = kernel.__name__
    ours = {
        op._qualified_op_name for op in vars(getattr(torch.ops, name)).values() if hasattr(op, "_qualified_op_name")
    }
    assert {f"{name}::ctu", f"{name}::head_edit_backward", f"{name}::attention_head_edit"} <= ours
    x = torch.randn(4, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kernel.ctu(x, 0.9)
    names = [event.key for event in profile.key_averages()]
    assert f"{name}::ctu" in names
    assert "ctkernels::ctu" not in names


SAMPLES = list(testing.samples(torch.float32))


@pytest.mark.parametrize("sample", SAMPLES, ids=[f"{s.function.__name__}-{s.name}" for s in SAMPLES])
def test_values_and_gradients_are_those_of_the_package(kernel, sample):
    """The kernel's plain torch is the package's reference, bit for bit."""
    check_same_bits(kernel, sample, "reference")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_and_gradients_on_a_gpu(kernel):
    for sample in testing.samples(torch.float32, "cuda"):
        check_same_bits(kernel, sample, "triton")


def check_same_bits(kernel, sample, backend):
    with ctkernels.use_backend(backend):
        expected = evaluate(sample)
    function = getattr(kernel, sample.function.__name__)
    for mine, theirs in zip(evaluate(dataclasses.replace(sample, function=function)), expected):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def evaluate(sample):
    """The result and the gradients."""
    torch.manual_seed(0)  # random gates
    sample = sample.requiring_grad()
    y = sample()
    leaves = tuple(sample.tensors().values())
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)]


def test_the_triton_kernels_are_those_of_the_build(kernel):
    """They are imported on the first call on a GPU, by names that have to be right in any folder."""
    pytest.importorskip("triton")
    launch = importlib.import_module(f"{kernel.__name__}.ops.channelwise.launch")
    names = {op.name for op in kernel.ops.registration.OPS.values() if op.triton is not None}
    assert names == {op.name for op in OPS.values() if op.triton is not None}
    for op in kernel.ops.registration.OPS.values():
        assert op.triton.startswith(f"{kernel.__name__}.ops.")
        assert callable(launch.implementation(op).backward)
    importlib.import_module(f"{kernel.__name__}.ops.attention.triton.launch")


def test_attention(kernel):
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).requires_grad_()
    m, gates = torch.randn(4, 8, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    got, expected = (
        package.attention_head_edit(q, k, v, m, None, gates, is_causal=True) for package in (kernel, functional)
    )
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda q, k, v: kernel.attention_head_edit(q, k, v, m, None, gates), (q, k, v))


def test_two_versions_and_the_package_in_one_process(folder, kernel, tmp_path):
    build.write_kernel(tmp_path / "next", "owner/ctkernels", version=2)
    newer = load(tmp_path / "next")
    assert newer is not kernel
    assert newer.__name__ != kernel.__name__
    assert newer.ctu is not kernel.ctu
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    with kernel.use_backend("triton"):  # of one build only
        torch.testing.assert_close(newer.ctu(x, 0.9), functional.ctu(x, 0.9))
        with pytest.raises(RuntimeError, match="'triton' was forced"):
            kernel.ctu(x, 0.9)
    for package in (kernel, newer, functional):
        assert torch.autograd.gradcheck(lambda x, p=package: p.ctu(x, 0.9), (x,))
    assert load(folder) is kernel


# ---- layers ------------------------------------------------------------------------------------------------------------


class Llama(nn.Module):
    """The MLP of Llama."""

    def __init__(self, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Phi(nn.Module):
    """The MLP of Phi-3."""

    def __init__(self, activation_fn):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 32), nn.Linear(16, 8)
        self.activation_fn = activation_fn

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


class AndMul(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        gate, up = x.chunk(2, -1)
        return self.activation(gate) * up


class Edit(nn.Module):
    def __init__(self):
        super().__init__()
        self.m, self.a = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))
        self.g_m, self.g_a = torch.rand(2), None

    def forward(self, z):
        heads = z.unflatten(-1, (2, 4))
        return ((1 + self.g_m[:, None] * self.m) * heads + self.a).flatten(-2)


STANDS_IN_FOR: dict[str, list[nn.Module]] = {
    "ReLU": [nn.ReLU(), nn.ReLU(inplace=True)],
    "LeakyReLU": [nn.LeakyReLU(), nn.LeakyReLU(0.2)],
    "ReLU6": [nn.ReLU6()],
    "SiLU": [nn.SiLU()],
    "GELU": [nn.GELU(), nn.GELU(approximate="tanh")],
    "SiluAndMul": [AndMul(F.silu)],
    "GeluAndMul": [AndMul(F.gelu)],
    "GatedMLP": [Llama(nn.SiLU()), Llama(nn.GELU()), Llama(nn.GELU("tanh")), Llama(nn.ReLU())],
    "PackedGatedMLP": [Phi(nn.SiLU()), Phi(nn.GELU("tanh"))],
    "HeadEdit": [Edit()],
}
PAIRS = [(name, module) for name, modules in STANDS_IN_FOR.items() for module in modules]
IDS = [f"{name}-{i}" for name, modules in STANDS_IN_FOR.items() for i in range(len(modules))]


def stand_in(module, layer):
    """A copy of a module with the forward of a layer, as `kernelize` changes it."""
    changed = copy.deepcopy(module)
    changed.forward = MethodType(layer.forward, changed)
    return changed


@pytest.mark.parametrize(("name", "module"), PAIRS, ids=IDS)
def test_a_layer_computes_what_it_replaces(kernel, name, module):
    changed = stand_in(module.double(), getattr(kernel.layers, name))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for requires_grad in (False, True):
        expected, got = (m(x.clone().requires_grad_(requires_grad) * 1) for m in (module, changed))
        torch.testing.assert_close(got, expected)
    grads = [
        torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
        for m in (module, changed)
        if list(m.parameters())
    ]
    for mine, theirs in zip(*grads or [(), ()]):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("name", "module"), PAIRS, ids=IDS)
def test_a_layer_has_a_forward_and_nothing_else(kernel, name, module):
    """The Hub's own check."""
    layer = pytest.importorskip("kernels.layer.layer")
    cls = getattr(kernel.layers, name)
    layer._validate_layer(check_cls=type(module), cls=cls, repo="this kernel")
    mode = layer.Mode.TRAINING | layer.Mode.TORCH_COMPILE
    assert layer._validate_layer_has_mode(layer_name=name, module=cls, repo="this kernel", repo_mode=mode)


def test_every_layer_is_tested(kernel):
    tree = ast.parse((build.OWN / "layers.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes == {*STANDS_IN_FOR, "GELUTanh"}


@pytest.mark.parametrize("name", ["ReLU", "SiLU", "GELU"])
def test_knobs_of_an_activation(kernel, name):
    changed = stand_in(getattr(nn, name)(), getattr(kernel.layers, name))
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    changed.beta = 0.7
    coeff = 0.5 if name == "ReLU" else 1.0
    torch.testing.assert_close(changed(x), functional.ctu(x, 0.7, coeff, activation=name.lower()))
    changed.beta, changed.coeff, changed.channel_dim = nn.Parameter(torch.rand(6).double()), 0.3, 1
    y = changed(x)
    torch.testing.assert_close(y, functional.ctu(x, changed.beta, 0.3, channel_dim=1, activation=name.lower()))
    y.sum().backward()
    assert changed.beta.grad is not None
    del changed.channel_dim
    with pytest.raises(ValueError, match="channel_dim"):
        changed(x)


def test_knobs_of_a_gated_mlp(kernel):
    module, x = Llama(nn.SiLU()).double(), torch.randn(3, 8, dtype=torch.float64)
    changed = stand_in(module, kernel.layers.GatedMLP)
    changed.beta = nn.Parameter(torch.rand(16).double())
    expected = module.down_proj(
        functional.ctu(module.gate_proj(x), changed.beta, 1.0, channel_dim=-1, activation="silu") * module.up_proj(x)
    )
    torch.testing.assert_close(changed(x), expected)
    changed.act_fn = nn.Tanh()
    with pytest.raises(TypeError, match=r"its activation must be one of GELU, ReLU, .* got Tanh"):
        changed(x)


def test_an_in_place_activation_overwrites_its_input_where_no_gradient_is_needed(kernel):
    changed, x = stand_in(nn.ReLU(inplace=True), kernel.layers.ReLU), torch.tensor([-1.0, 2.0])
    assert changed(x) is x
    assert x.tolist() == [0.0, 2.0]
    x = torch.tensor([-1.0, 2.0], requires_grad=True) * 1
    assert changed(x) is not x
    assert x.tolist() == [-1.0, 2.0]


def test_layers_under_compile(kernel):
    activation = stand_in(nn.ReLU(inplace=True), kernel.layers.ReLU)
    mlp = stand_in(Llama(nn.SiLU()), kernel.layers.GatedMLP)
    activation.beta, mlp.beta, mlp.coeff = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.rand(16)), 0.5
    model = nn.Sequential(nn.Linear(8, 8), activation, mlp).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, parameters = torch.randn(3, 8, dtype=torch.float64), list(model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected)
    for mine, theirs in zip(*(torch.autograd.grad(t.sum(), parameters) for t in (y, expected))):
        torch.testing.assert_close(mine, theirs)


def test_kernelize(folder):
    kernels = pytest.importorskip("kernels")

    @kernels.use_kernel_forward_from_hub("TunableReLU")
    class TunableReLU(nn.ReLU):
        pass

    @kernels.use_kernel_forward_from_hub("MLP")
    class MLP(Llama):
        pass

    model, x = nn.Sequential(nn.Linear(8, 8), TunableReLU(), MLP(nn.SiLU())).double(), torch.randn(3, 8).double()
    expected = model(x)
    mapping = {
        "TunableReLU": {"cpu": kernels.LocalLayerRepository(folder, layer_name="ReLU")},
        "MLP": {"cpu": kernels.LocalLayerRepository(folder, layer_name="GatedMLP")},
    }
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    layers = load(folder).layers
    assert [model[i].forward.__func__ for i in (1, 2)] == [layers.ReLU.forward, layers.GatedMLP.forward]
    torch.testing.assert_close(model(x), expected)
    model[1].beta = 0.8
    torch.testing.assert_close(model(x), model[2](functional.ctu(model[0](x), 0.8)))


def test_models_of_transformers(kernel):
    """The MLPs that the card names, and the activations that transformers marks for the Hub."""
    pytest.importorskip("transformers")
    from transformers.activations import ACT2FN
    from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    modules = {
        "GatedMLP": [LlamaMLP(LlamaConfig(**sizes)), GemmaMLP(GemmaConfig(**sizes))],
        "PackedGatedMLP": [Phi3MLP(Phi3Config(**sizes, pad_token_id=0))],
        "SiLU": [ACT2FN["silu"]],
        "GELU": [ACT2FN["gelu"]],
        "GELUTanh": [ACT2FN["gelu_pytorch_tanh"], ACT2FN["gelu_new"]],
    }
    x = torch.randn(3, 8, dtype=torch.float64)
    for name, replaced in modules.items():
        for module in replaced:
            changed = stand_in(module.double(), getattr(kernel.layers, name))
            torch.testing.assert_close(changed(x), module(x))
