"""Searching several betas: each strategy must find a planted one, count what it needs, and repeat itself."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ctkernels.lab.search.strategies import search_betas

pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")
pytest.importorskip("tqdm", reason="the laboratory needs tqdm")

GRID = (0.7, 0.8, 0.9)


class Planted(nn.Module):
    """Lets the signal through by how near the two units' betas are to planted ones.

    A unit's value at 0, (1 - beta) ln(2) / 2 for c = 1/2, tells its beta. The pooling halves the resolution between them.
    """

    def __init__(self, first, second, width, scale):
        super().__init__()
        self.first, self.second, self.pool = nn.ReLU(), nn.ReLU(), nn.AvgPool2d(2)
        self.head = nn.Linear(1, 2)
        self.scale = scale
        self.values, self.width = [(1 - b) * math.log(2) / 2 for b in (first, second)], width * math.log(2) / 2

    def forward(self, x):
        zero = torch.zeros_like(x)
        one, two = self.first(zero), self.second(self.pool(zero))
        off = (one.mean((1, 2, 3)) - self.values[0]) ** 2 + (two.mean((1, 2, 3)) - self.values[1]) ** 2
        gate = torch.exp(-off / self.width**2)
        return self.head(self.scale * (x[:, 0, 0, 0] * gate + x[:, 0, 0, 1])[:, None])


def planted_data(n=400, seed=0):
    """The signal, +-2 by class, in one pixel, noise of deviation 1 in another."""
    labels = torch.arange(n) % 2
    images = torch.zeros(n, 1, 4, 4)
    images[:, 0, 0, 0] = 4.0 * labels - 2
    images[:, 0, 0, 1] = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return images, labels


def search(first=0.7, second=0.9, width=0.12, scale=1.0, **options):
    return search_betas(
        Planted(first, second, width, scale), planted_data(), **{"betas": GRID, "progress": False, **options}
    )


@pytest.mark.parametrize("strategy", ["grid", "coordinate"])
def test_finds_the_planted_betas_of_two_stages(strategy):
    result = search(strategy=strategy)
    assert list(result.chosen.values()) == [0.7, 0.9]
    assert result.betas == {"first": 0.7, "second": 0.9}
    assert result.history[0].betas == (1.0, 1.0)
    assert result.test.gain > 0.1
    assert result.test.p_value < 1e-3
    assert result.verdict().startswith("Steering helped here: ")
    assert len(result.history) == 16 if strategy == "grid" else len(result.history) < 16
    assert result.history[result.reached - 1].val_accuracy == max(e.val_accuracy for e in result.history)
    assert f"made {len(result.history)} evaluations and found its best after {result.reached}" in result.verdict()


def test_a_shared_beta_cannot_be_both():
    both, shared = search(strategy="grid"), search(strategy="grid", groups="shared")
    assert list(shared.groups) == ["all"]
    assert len(shared.history) == 4
    assert both.history[both.best].val_accuracy > shared.history[shared.best].val_accuracy


def test_bayesian_search_comes_near_the_planted_betas():
    pytest.importorskip("optuna", reason="Bayesian search needs Optuna")
    result = search(strategy="bayesian", evaluations=40, width=0.08)
    again = search(strategy="bayesian", evaluations=40, width=0.08)
    assert len(result.history) == 40
    assert [e.betas for e in again.history] == [e.betas for e in result.history]
    assert result.history[0].betas == (1.0, 1.0)
    near = [abs(beta - planted) for beta, planted in zip(result.chosen.values(), (0.7, 0.9))]
    assert max(near) < 0.06
    assert result.test.gain > 0.1


AT_ONCE = """
import sys, time
import optuna, test_strategies

create = optuna.create_study

def create_study(**options):
    study = create(**options)
    study.set_user_attr(f"here {time.time()}", True)
    while sum(name.startswith("here") for name in study.user_attrs) < 2:
        time.sleep(0.01)
    return study

optuna.create_study = create_study
test_strategies.search(strategy="bayesian", evaluations=8, width=0.1, storage=sys.argv[1])
"""


def test_workers_share_a_study_and_a_later_call_only_reports(tmp_path):
    pytest.importorskip("optuna", reason="Bayesian search needs Optuna")
    storage = str(tmp_path / "trials.log")
    here = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parent))),
    }
    processes = [subprocess.Popen([sys.executable, "-c", AT_ONCE, storage], env=here) for _ in range(2)]
    assert [p.wait(timeout=600) for p in processes] == [0, 0]
    result = search(strategy="bayesian", evaluations=8, width=0.1, storage=storage)
    assert [e.betas == (1.0, 1.0) for e in result.history] == [True] + [False] * (len(result.history) - 1)
    # a worker that began a trial before the eighth was done still ends it
    assert 8 <= len(result.history) <= 9
    again = search(strategy="bayesian", evaluations=8, width=0.1, storage=storage)
    assert again.history == result.history
    assert again.chosen == result.chosen
    for other in ({"seed": 1}, {"folds": 2}, {"l2": 3.0}, {"coeff": 0.25}, {"betas": "0.5:1:0.05"}, {"scale": 2.0}):
        names = {"folds": r"\['folds'\]", "scale": r"\['features'\]"}.get(next(iter(other)), f".*'{next(iter(other))}'")
        with pytest.raises(ValueError, match=r"other settings \(different: " + names):
            search(strategy="bayesian", evaluations=8, width=0.1, storage=storage, **other)


KILLED = """
import os, signal, sys
import test_strategies
from ctkernels.lab.search import probing

honest, left = probing.fit_probe, int(sys.argv[1])

def fit_probe(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*arguments)

probing.fit_probe = fit_probe
test_strategies.search(strategy="bayesian", evaluations=6, storage=sys.argv[2], folds=1, margin=0.0)
"""


@pytest.mark.parametrize("done", [0, 3])
def test_killed_and_resumed(done, tmp_path, monkeypatch):
    """SIGKILL in the middle of an evaluation: those before it count and are not repeated, the plain network is among all."""
    pytest.importorskip("optuna", reason="Bayesian search needs Optuna")
    from ctkernels.lab.search import probing

    storage = str(tmp_path / "trials.log")
    here = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]),
    }
    killed = subprocess.run([sys.executable, "-c", KILLED, str(done), storage], env=here, check=False)
    assert killed.returncode == -signal.SIGKILL
    fitted = []
    honest = probing.fit_probe
    monkeypatch.setattr(probing, "fit_probe", lambda *arguments: fitted.append(1) or honest(*arguments))
    result = search(strategy="bayesian", evaluations=6, storage=storage, folds=1, margin=0.0)
    assert len(result.history) == 6
    assert result.history[0].betas == (1.0, 1.0)
    assert len({e.betas for e in result.history}) == 6
    assert len(fitted) == 6 - done + (1 if result.kept_plain else 2)  # the last ones for the test images


def test_evaluations_are_a_limit():
    result = search(strategy="coordinate", evaluations=5)
    assert len(result.history) == 5
    assert result.history[result.best].val_accuracy == max(e.val_accuracy for e in result.history)


def test_the_plain_network_is_kept_where_nothing_is_better():
    result = search(first=0.2, second=0.2, width=0.01, strategy="coordinate")
    assert result.kept_plain
    assert result.test.gain == 0
    assert "none better than the plain network" in result.verdict()


def test_groups():
    assert list(search(groups="stage", evaluations=1).groups) == ["1: first", "2: second"]
    assert list(search(groups="site", evaluations=1).groups) == ["first", "second"]
    assert list(search(groups=1, evaluations=1).groups.values()) == [("first", "second")]


def test_stages_of_a_network_of_blocks():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, stride, 1)

        def forward(self, x):
            return nn.functional.relu(self.conv(x))

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        Block(1),
        Block(2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    labels = torch.arange(40) % 2
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.3 * labels[:, None, None, None]
    result = search_betas(model, (images, labels), evaluations=1, progress=False)
    # a functional call is counted to the resolution of what its module is given
    assert list(result.groups.values()) == [("1", "2.forward:relu", "3.forward:relu"), ("4",)]


def test_saved_as_json(tmp_path):
    result = search(strategy="coordinate", evaluations=3)
    result.save(tmp_path / "result.json", command="x")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["schema"] == "ctkernels.search_betas/1"
    assert saved["evaluations"] == {"made": 3, "reached": result.reached}
    assert len(saved["history"]) == 3
    assert saved["groups"] == {"1: first": ["first"], "2: second": ["second"]}
    assert "first" in result.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "random"}, "strategy must be one of"),
        ({"groups": "layer"}, "groups must be shared, stage, site, or a number of groups, got"),
        ({"groups": 0}, "groups must be shared, stage, site, or a number of groups, got"),
        ({"groups": 3}, "groups must be at most the number of activations, 2"),
        ({"evaluations": 0}, "evaluations must be a whole number of at least 1, got 0"),
        ({"strategy": "grid", "evaluations": 15}, "the grid has 4 \\*\\* 2 = 16 points"),
        ({"storage": "x.log"}, "storage is for strategy='bayesian'"),
        ({"betas": [1.5]}, r"betas must be START:STOP:STEP .*, all in \[0, 1\], got"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        search(**{"strategy": "coordinate", **change})


def test_a_network_with_another_neutral_point_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.SiLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="plain at beta = 1"):
        search_betas(model, planted_data(), activations=["silu"], progress=False)
