"""Programs of torch's operations only: what every unit, edit and gate becomes, and where it runs."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import ctkernels
from ctkernels import functional
from ctkernels.export import portable
from ctkernels.ops.ctu import portable as lowering

MEMBERS = {"logistic": "relu", "leaky": "leaky_relu", "relu6": "relu6", "gaussian": "gelu", "tanh": "gelu_tanh"}
BETAS = (0.0, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0)
COEFFS = (0.0, 0.25, 0.5, 1.0)


def inputs(dtype):
    """Both signs of 1e-6 to 1e30, the neighbourhood of the bends, and 0."""
    sizes = torch.logspace(-6, 30, 200, dtype=dtype)
    return torch.cat([sizes, -sizes, torch.linspace(-8, 14, 400, dtype=dtype), torch.zeros(1, dtype=dtype)])


def error_bound(x, dtype):
    """A few roundings of intermediate values, none of which is above 1.5 |x| + 1."""
    return 8 * torch.finfo(dtype).eps * (1.5 * x.abs() + 1)


def knobs_at(beta, coeff):
    c, s, sharpness, eta = lowering.derive(torch.tensor(beta, dtype=torch.float64), coeff, False, 0.0)
    return lowering.Knobs(float(c), float(s), float(sharpness), float(eta), float(eta))


class Net(nn.Module):
    """What occurs in residual networks: BatchNorms after convolutions, activations in place, a sum before one."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.activation, self.head = activation, nn.Linear(8, 5)
        for norm in (self.norm, self.other):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        x = self.activation(self.other(self.second(x)) + x)
        return self.head(x.mean((2, 3)))


def names(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MEMBERS)
def test_a_lowered_unit_is_the_unit(kind, dtype):
    x = inputs(dtype)
    for beta in BETAS:
        for coeff in COEFFS:
            got = lowering.unit(x, 0.2, knobs_at(beta, coeff), kind)
            want = functional.ctu(x.double(), beta, coeff, activation=MEMBERS[kind], negative_slope=0.2)
            assert got.isfinite().all()
            excess = (got.double() - want).abs() - error_bound(x, dtype).double()
            assert excess.max() <= 0, (beta, coeff, x[excess.argmax()].item())


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 3.0])
def test_a_lowered_leaky_unit_takes_every_slope(slope):
    x = inputs(torch.float64)
    knobs = knobs_at(0.9, 0.5)
    want = functional.ctu(x, 0.9, 0.5, activation="leaky_relu", negative_slope=slope)
    bound = error_bound(x * max(1, slope), torch.float64)
    for given in (slope, torch.tensor(slope, dtype=torch.float64)):
        assert ((lowering.unit(x, given, knobs, "leaky") - want).abs() <= bound).all()


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(8)], ids=lambda a: type(a).__name__)
def test_a_steered_network_needs_no_op_of_ours(activation):
    model = Net(activation).eval()
    ctkernels.steer(model, 0.9, activations="all")
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        want = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = portable(model, (x[:1],), dynamic_shapes="batch")
    assert not [name for name in names(program) if not name.startswith("aten.")]
    assert "aten.copy.default" not in names(program)
    assert not [name for name in names(program) if "batch_norm" in name]  # folded
    torch.testing.assert_close(program.module()(x), want)
    assert set(program.state_dict) == {"head.weight", "head.bias"}  # the others are folded
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_knobs_switch_parts_off():
    class Units(nn.Module):
        def forward(self, x):
            return functional.ctu(x, 0.5, 1.0), functional.ctu(x, 0.9, 0.0)

    found = names(portable(Units().eval(), (torch.randn(4),)))
    assert found.count("aten.sigmoid.default") == found.count("aten.exp.default") == 1
    assert len(found) == 2 + 6  # x * sigmoid(x); scale, cap, exp, log1p, scale, maximum


def test_knobs_per_channel_and_from_the_input():
    """Constants become one tensor; knobs that the program computes are derived in it."""

    class Units(nn.Module):
        def __init__(self):
            super().__init__()
            self.trained = ctkernels.nn.TrainableCTU(4, beta=0.7)
            nn.init.normal_(self.trained.raw_beta, std=3)
            nn.init.normal_(self.trained.raw_coeff)

        def forward(self, x, beta, rows):
            mixed = functional.ctu(
                x, beta, 0.3, channel_dim=1, scale=self.trained.raw_beta, shift=beta, residual=x, activation="gelu"
            )
            by_row = functional.ctu(
                x, rows, rows, index=torch.arange(x.shape[0]), channel_dim=1, activation="relu6", eps=1e-3
            )
            return self.trained(x), mixed, by_row

    model = Units().eval()
    x, beta, rows = torch.randn(3, 4, 5) * 4, torch.tensor([0.0, 0.5, 0.9, 1.0]), torch.rand(3, 4)
    program = portable(model, (x, beta, rows))
    for got, want in zip(program.module()(x, beta, rows), model(x, beta, rows)):
        assert ((got - want).abs() <= error_bound(x * 4, torch.float32)).all()
    assert not [name for name in names(program) if "ctkernels" in name]
    lifted = [value for name, value in program.constants.items() if name.endswith("eta")]
    assert [tuple(value.shape) for value in lifted] == [(1, 4, 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_arithmetic_is_at_least_float32(dtype):
    class Unit(nn.Module):
        def forward(self, x):
            return functional.ctu(x, 0.999, 0.4)

    x = torch.randn(64).to(dtype)
    got, want = portable(Unit().eval(), (x,)).module()(x), functional.ctu(x, 0.999, 0.4)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps * 2, atol=torch.finfo(dtype).eps)


def test_head_edits_become_a_product_and_a_sum():
    class Edits(nn.Module):
        def __init__(self):
            super().__init__()
            for name, shape in (("m", (2, 3)), ("a", (2, 3)), ("log_alpha", (4,))):
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))

        def forward(self, z, m):
            g_m, g_a = functional.hard_concrete(self.log_alpha, training=False).split([2, 2])
            constant = functional.head_edit(z, self.m, self.a, g_m, g_a)
            return constant, functional.head_edit(z, m, None, g_m), functional.head_edit(z, None, self.a), g_m + z.sum()

    model = Edits().eval()
    z, m = torch.randn(2, 5, 6), torch.randn(2, 3)
    program = portable(model, (z, m))
    for got, want in zip(program.module()(z, m), model(z, m)):
        torch.testing.assert_close(got, want)
    assert not [name for name in names(program) if "ctkernels" in name]


def test_a_program_can_be_given_and_stays():
    model = Net(nn.ReLU(inplace=True)).eval()
    ctkernels.steer(model, 0.8)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        want = program.module()(x)
    before = [str(node) for node in program.graph.nodes], set(program.state_dict)
    torch.testing.assert_close(portable(program).module()(x), want)
    assert ([str(node) for node in program.graph.nodes], set(program.state_dict)) == before
    assert any("ctkernels" in str(node.target) for node in program.graph.nodes)


def test_what_cannot_be_exported_is_refused():
    x = torch.randn(2, 3, 6, 6)
    model = Net(nn.ReLU())
    with pytest.raises(ValueError, match="model: expected one in evaluation mode, got one in training mode"):
        portable(model, (x,))
    with pytest.raises(
        TypeError, match=r"model: expected a torch.nn.Module or a torch.export.ExportedProgram, got int"
    ):
        portable(3, (x,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="args: expected a tuple of example inputs, got Tensor"):
        portable(model.eval(), x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dynamic_shapes: expected \"batch\" or what torch.export takes, got 'rows'"):
        portable(model, (x,), dynamic_shapes="rows")

    class Sampled(nn.Module):
        def forward(self, x):
            return functional.hard_concrete(x, training=False)

    with pytest.raises(ValueError, match=r"hard_concrete.*its gates depend on the inputs of the program"):
        portable(Sampled().eval(), (torch.randn(3),))
    unit = ctkernels.nn.TrainableCTU(3)
    with torch.no_grad():
        unit.raw_beta.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"expected finite knobs and edits, got .* with NaN or infinity"):
        portable(unit.eval(), (x,))
    program = torch.export.export(model, (x,))
    with pytest.raises(TypeError, match="args: expected none beside an ExportedProgram"):
        portable(program, (x,))


_ELSEWHERE = """
import sys
sys.modules["ctkernels"] = None  # as if it were not installed
import torch
program = torch.export.load(sys.argv[1])
x, want = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(program.module()(x), want)
"""


def test_a_saved_program_runs_without_this_library(tmp_path):
    model = Net(nn.ReLU(inplace=True)).eval()
    ctkernels.steer(model, 0.9)
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "expected.pt")
    torch.export.save(portable(model, (x,), dynamic_shapes="batch"), tmp_path / "model.pt2")
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "model.pt2"), str(tmp_path / "expected.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
