"""Gradient checks for users: what is right passes, and a wrong gradient is found where it is; the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ctkernels
from ctkernels import cli, functional
from ctkernels.testing import gradcheck_module
from ctkernels.testing.differences import central_difference, rounding_noise

ROOT = Path(__file__).parents[2]


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), ctkernels.nn.TrainableCTU(4), nn.Flatten(), nn.Linear(64, 3)
    )
    ctkernels.steer(net, 0.9)
    return net


def make_text():
    return "no module"


class Off(nn.Module):
    """The unit with a gradient of beta that is one part in a thousand off."""

    def __init__(self):
        super().__init__()
        self.raw_beta = nn.Parameter(torch.linspace(-1, 2, 4))

    def forward(self, x):
        raw = self.raw_beta + 1e-3 * (self.raw_beta - self.raw_beta.detach())
        return functional.ctu(x, raw, 0.5, raw=True, channel_dim=1)


class Rounded(nn.Module):
    """The unit in too few digits; its gradient is right to that many."""

    def forward(self, x):
        return functional.ctu(x.half().to(x.dtype), 0.9)


def _x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_right_model_passes_and_is_left_alone():
    net = make_net()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    report = gradcheck_module(net, _x(2, 3, 6, 6))
    assert report.ok, report
    assert {f.place for f in report.findings} == {"model", "1", "2"}
    assert {f.check for f in report.findings} == {"finite differences", "reference, float64", "reference, own dtype"}
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    assert "finite differences: 11 of 11 agree" in str(report)


def test_a_wrong_gradient_is_found_in_its_parameter():
    report = gradcheck_module(nn.Sequential(nn.Conv2d(3, 4, 1), Off()), _x(2, 3, 5, 5))
    wrong = {(f.what, f.check) for f in report.wrong}
    assert wrong == {("gradient of 1.raw_beta", "finite differences")}
    assert "WRONG  model, gradient of 1.raw_beta: off by" in str(report)
    assert not report.as_dict()["ok"]


def test_a_backend_that_is_wrong_is_found_in_its_site(monkeypatch):
    from ctkernels.ops import backends

    honest = functional.ctu

    def skewed(x, *args, **kwargs):
        y = honest(x, *args, **kwargs)
        return y if backends.forced() == "reference" or kwargs.get("channel_dim") is None else y * (1 + 1e-5)

    monkeypatch.setattr(functional, "ctu", skewed)
    report = gradcheck_module(make_net(), _x(2, 3, 6, 6))
    places = {f.place for f in report.wrong}
    assert "2" in places  # the unit with a knob per channel
    assert "1" not in places


def test_float16_inside_is_found_against_the_reference_only_by_differences():
    report = gradcheck_module(Rounded(), _x(3, 7))
    assert {f.check for f in report.wrong} == {"finite differences"}


def test_a_kink_between_the_points_is_no_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.zero_()
    report = gradcheck_module(net, torch.tensor([[1e-6, 1.0], [-1e-6, -1.0]]))
    assert report.ok, report


# ------------------------------------------------------------------------------------------------------- the tolerances


class Planted(nn.Module):
    """The unit with one beta, whose gradient is off by a given part."""

    def __init__(self, part):
        super().__init__()
        self.raw_beta, self.part = nn.Parameter(torch.tensor([0.7])), part

    def forward(self, x):
        raw = self.raw_beta + self.part * (self.raw_beta - self.raw_beta.detach())
        return functional.ctu(x, raw, 0.5, raw=True, channel_dim=1)


def _finding(report, check, what):
    (found,) = [f for f in report.findings if (f.place, f.check, f.what) == ("model", check, what)]
    return found


def test_finite_differences_find_an_error_just_beyond_their_bound():
    def found(part):
        return _finding(gradcheck_module(Planted(part), _x(2, 3, 5)), "finite differences", "gradient of raw_beta")

    honest, one_more = found(0.0), found(1e-3)
    gradient = (one_more.error - honest.error) / 1e-3
    assert honest.allowed < 1e-8 * gradient
    assert not found(1.01 * (honest.allowed + honest.error) / gradient).ok
    assert found(0.99 * (honest.allowed - honest.error) / gradient).ok


@pytest.mark.parametrize(
    ("check", "dtype"),
    [
        ("reference, float64", torch.float32),
        ("reference, own dtype", torch.float32),
        ("reference, own dtype", torch.bfloat16),
        ("reference, own dtype", torch.float16),
    ],
)
def test_comparisons_with_the_reference_find_an_error_just_beyond_their_bound(check, dtype, monkeypatch):
    """Every output of the unit is moved by as much, in the dtype that is compared; the reference is left alone."""
    from ctkernels.ops import backends

    honest, offset = functional.ctu, 0.0
    compared = torch.float64 if check == "reference, float64" else dtype

    def moved(x, *args, **kwargs):
        y = honest(x, *args, **kwargs)
        return y if backends.forced() == "reference" or y.dtype != compared else y + offset

    monkeypatch.setattr(functional, "ctu", moved)

    def found():
        return _finding(gradcheck_module(ctkernels.nn.CTU(0.9), _x(2, 30).to(dtype)), check, "output 0")

    before, ulp = found(), torch.finfo(compared).eps * float(_x(2, 30).abs().max())
    assert before.error <= 0.75 * before.allowed
    offset = before.allowed + before.error + ulp  # the sum with the offset is rounded, too
    assert not found().ok
    offset = before.allowed - before.error - ulp
    assert found().ok


@pytest.mark.parametrize("jump", [1.0, -3.0])
def test_differences_know_what_a_kink_does_to_them(jump):
    step = torch.finfo(torch.float64).eps ** (1 / 3)
    for part in torch.linspace(-1.3, 1.3, 131, dtype=torch.float64):

        def terms(at, place=part * step):
            x = at["x"]
            return torch.stack([x.sin() + jump * (x - place).relu(), x.exp()])

        leaves = {"x": torch.zeros((), dtype=torch.float64)}
        one = torch.ones((), dtype=torch.float64)
        changes, allowed = central_difference(terms, leaves, "x", one, terms(leaves), rounding_noise(terms, leaves))
        slope = 2 + jump * (part < 0)
        assert abs(changes.sum() - slope) <= allowed
        assert abs(part) < 0.01 or allowed < 1e-5  # a smaller step was found, unless the kink is where we stand


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("lost", [0.0, 1e3, 1e7])
def test_differences_know_their_truncation_and_their_rounding(scale, lost):
    """sin(x / scale) at many x; added to a large number and taken away again it has few digits left."""
    for place in torch.linspace(-2, 2, 41, dtype=torch.float64):

        def terms(at):
            return ((at["x"] / scale).sin() + lost - lost)[None]

        leaves, one = {"x": place}, torch.ones((), dtype=torch.float64)
        changes, allowed = central_difference(terms, leaves, "x", one, terms(leaves), rounding_noise(terms, leaves))
        assert abs(changes.sum() - (place / scale).cos() / scale) <= allowed
        assert allowed <= (1e-8 + 1e-8 * lost) / scale**2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="model: expected parameters or inputs that can be differentiated, got none"):
        gradcheck_module(nn.Embedding(3, 2).requires_grad_(False), torch.tensor([1]))
    with pytest.raises(ValueError, match="directions: expected at least 1, got 0"):
        gradcheck_module(nn.ReLU(), _x(2), directions=0)
    with pytest.raises(ValueError, match="name must be one of"):
        gradcheck_module(nn.ReLU(), _x(2), backend="abacus")


def test_an_adapter_is_checked_site_by_site():
    peft = pytest.importorskip("peft")
    from ctkernels.adapters import CurvatureConfig

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model = peft.get_peft_model(net, CurvatureConfig())
    report = gradcheck_module(model, _x(2, 3, 6, 6))
    assert report.ok, report
    names = {f.what for f in report.findings if f.place == "base_model.model.1.ctu"}
    assert "gradient of curvature_raw_beta.default" in names


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("op", ["ctu", "head_edit", "hard_concrete"])
def test_the_ops_pass_on_this_machine_with_room(op, dtype, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert cli.main(["gradcheck", "--op", op, "--dtype", dtype, "--directions", "1", "--json", str(file)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("all agree")
    (report,) = json.loads(file.read_text())["reports"].values()
    for found in report["findings"]:
        assert found["error"] <= 0.75 * found["allowed"], found


def test_the_command_checks_a_model_and_writes_json(tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["--input", "2x3x6x6", "--backend", "reference", "--json", str(file), "--directions", "1"]
    assert cli.main(["gradcheck", "--module", f"{__name__}:make_net", *arguments]) == 0
    found = json.loads(file.read_text())
    (report,) = found["reports"].values()
    assert found["ok"]
    assert report["checks"] == len(report["findings"]) > 20
    capsys.readouterr()
    wrong = tmp_path / "model_with_a_slip.py"
    wrong.write_text("import sys\nfrom torch import nn\nfrom test_gradcheck import Off\ndef make(): return Off()\n")
    assert cli.main(["gradcheck", "--module", f"{wrong}:make", "--input", "2x4x5", "--json", "-"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "2x3"], "--module and --input: expected both or neither"),
        (["--module", "nowhere", "--input", "2"], "--module: model must be package.module:function"),
        (
            ["--module", "no_such_module:make", "--input", "2"],
            "--module: model 'no_such_module:make': no module named",
        ),
        (
            ["--module", "no_such_file.py:make", "--input", "2"],
            "--module: model 'no_such_file.py:make': expected a file",
        ),
        (["--module", f"{__name__}:nothing", "--input", "2"], "has no function 'nothing'"),
        (["--module", f"{__name__}:make_text", "--input", "2"], "must return a torch.nn.Module, got str"),
        (["--module", f"{__name__}:make_net", "--input", "2x-3"], "--input must be positive sizes"),
        (["--device", "moon"], "--device must be one that is here, got 'moon'"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, message, capsys):
    assert cli.main(["gradcheck", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.strip().splitlines()) == 1


@pytest.mark.slow
def test_an_installed_wheel_checks_gradients_and_runs_the_benchmarks(tmp_path):
    pytest.importorskip("wheel", reason="building a wheel needs it")
    environment = {**os.environ, "CTKERNELS_BUILD": "none"}
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ctkernels", "benchmarks", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(build, env=environment, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    assert (tmp_path / "site/ctkernels/benchmarks/__main__.py").exists()

    def run(*arguments):
        clean = {k: v for k, v in environment.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-m", "ctkernels", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)

    timed = run("bench", "--op", "head_edit", "--quick", "--seconds", "0.05", "--dtype", "fp32", "--json", "bench.json")
    assert timed.returncode == 0, timed.stderr
    assert json.loads((tmp_path / "bench.json").read_text())["records"]
    checked = run("gradcheck", "--op", "hard_concrete")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_benchmarks_run_from_a_clone_too(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--help"])
    assert stopped.value.code == 0
    assert "--quick" in capsys.readouterr().out
