"""The search over beta: that it finds a planted one, is honest with the test images, and repeats itself."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from ctkernels.lab import search_beta
from ctkernels.lab._distributed import Group, group
from ctkernels.lab.images.features import extract, passes
from ctkernels.lab.stats import best_beta

pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")
pytest.importorskip("tqdm", reason="the laboratory needs tqdm")

GRID = (0.7, 0.75, 0.8, 0.85, 0.9)


class Planted(nn.Module):
    """Lets the signal through only if the unit's value at 0, (1 - beta) ln(2) / 2 for c = 1/2, is that of one beta."""

    def __init__(self, beta=0.8):
        super().__init__()
        self.act = nn.ReLU()
        self.head = nn.Linear(1, 2)
        self.value = (1 - beta) * math.log(2) / 2

    def forward(self, x):
        at_zero = self.act(torch.zeros_like(x[:, :1]))
        gate = torch.exp(-(((at_zero - self.value) / 0.006) ** 2))
        return self.head(x[:, :1] * gate + x[:, 1:])


def planted_data(n=600, seed=0):
    """Two columns: the signal, +-2 by class, and noise of deviation 1."""
    labels = torch.arange(n) % 2
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return torch.stack([4.0 * labels - 2, noise], 1), labels


class Counting(Dataset):
    """Counts how often each image is read, and when."""

    def __init__(self, images, labels, log, name):
        self.images, self.labels, self.log, self.name = images, labels, log, name

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.log.append((self.name, i))
        return self.images[i], int(self.labels[i])


def small_net(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def small_data(n=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return torch.randn(n, 3, 6, 6, generator=generator) + 0.4 * (labels - 1.0)[:, None, None, None], labels


def search(model=None, data=None, **options):
    model = small_net() if model is None else model
    return search_beta(model, small_data() if data is None else data, **{"betas": GRID, "progress": False, **options})


def stable(result, *changing):
    """Everything of a result that must not change from run to run, less ``changing`` sizes."""
    found = result.to_dict()
    del found["seconds"], found["arguments"]
    for name in changing:
        del found["sizes"][name]
    return found


@pytest.mark.parametrize("beta", [0.75, 0.85])
def test_finds_the_planted_beta(beta):
    result = search(Planted(beta), planted_data())
    assert result.chosen == beta
    assert result.chosen_val_accuracy > 0.9 > result.plain_val_accuracy + 0.2
    assert result.test.gain > 0.2
    assert result.test.p_value < 1e-4
    assert result.verdict().startswith(f"Steering helped here: beta = {beta:g} scored ")
    assert result.sites


def test_plain_network_always_takes_part():
    result = search(betas=[0.8])
    assert result.betas == (0.8, 1.0)
    assert result.plain_is_beta_1
    assert result.plain_val_accuracy == result.val_accuracy[-1]


def test_streaming_gives_the_same_result():
    whole, streamed = search(), search(memory_limit=1)
    assert whole.sizes["passes"] == 1
    assert streamed.sizes["passes"] == len(whole.betas)
    assert stable(whole, "passes") == stable(streamed, "passes")


def test_passes():
    assert passes(samples=10, dim=5, settings=7, memory_limit=10**9) == [range(7)]
    assert passes(10, 5, 7, memory_limit=3 * 200) == [range(3), range(3, 6), range(6, 7)]
    assert passes(10, 5, 2, memory_limit=1) == [range(1), range(1, 2)]


def test_same_seed_same_result_and_other_seed_other_split():
    first, again, other = search(seed=3), search(seed=3), search(seed=4)
    assert stable(first) == stable(again)
    assert stable(first) != stable(other)


def test_each_image_is_read_once_and_test_images_last():
    log: list[tuple[str, int]] = []
    parts = {
        name: Counting(*small_data(n, s), log, name)
        for s, (name, n) in enumerate([("train", 60), ("val", 30), ("test", 45)])
    }
    result = search(data=parts["train"], val=parts["val"], test=parts["test"])
    assert log[0] == ("train", 0)  # to see whether the network takes it
    assert log[1:] == [("train", i) for i in range(60)] + [("val", i) for i in range(30)] + [
        ("test", i) for i in range(45)
    ]
    assert result.sizes["passes"] == 1


def test_ties_go_to_the_beta_nearest_one():
    def chosen(counts, margin=0.0):
        scores = {beta: (1,) * right + (0,) * (10 - right) for beta, right in counts.items()}
        return best_beta(scores, None if None in scores else 1.0, margin)

    assert chosen({0.7: 5, 1.0: 4, 0.9: 5, 0.8: 5}) == 0.9
    assert chosen({0.7: 5, 1.0: 5, 0.8: 4}) == 1.0
    assert chosen({None: 5, 0.9: 5}) is None
    assert chosen({None: 5, 0.9: 6}) == 0.9
    # one image of ten more is one standard error, which is not beyond it; two are
    assert chosen({None: 5, 0.9: 6}, margin=1.0) is None
    assert chosen({None: 5, 0.9: 7}, margin=1.0) == 0.9


def test_few_validation_images_are_made_more_by_folds():
    """Each beta is validated on five times as many images; what is tested is the first fold's probe, as without folds."""
    many, one = search(margin=0.0), search(folds=1, margin=0.0)
    assert (many.sizes["folds"], many.sizes["validated"]) == (4, 72)  # 18 to validate on, 54 to train on
    assert (one.sizes["folds"], one.sizes["validated"]) == (1, 18)
    assert all(72 * a == pytest.approx(round(72 * a)) for a in many.val_accuracy)
    only = search(betas=[1.0]), search(betas=[1.0], folds=1)
    assert only[0].test == only[1].test
    assert search(Planted(), planted_data(1000), betas=[0.8]).sizes["folds"] == 1
    own = search(data=small_data(60), val=small_data(30, 1), test=small_data(30, 2))
    assert own.sizes["folds"] == 1  # a validation set of the data's own is taken as it is
    with pytest.raises(ValueError, match="folds must be from 1 to 4 for 54 training and 18 validation, got 5"):
        search(folds=5)


def test_keeps_the_plain_network_when_beta_does_not_matter():
    class Deaf(Planted):
        def forward(self, x):
            return self.head((x + 0 * self.act(x))[:, :1] + x[:, 1:])

    result = search(Deaf(), planted_data())
    assert len(set(result.val_accuracy)) == 1
    assert result.chosen == 1.0
    assert result.kept_plain
    assert result.test.gain == 0
    assert "did not help" in result.verdict()


def test_network_whose_own_activation_is_not_beta_1():
    """A SiLU at beta = 1 is a ReLU: it is the network at its neutral point that steering must be compared with."""
    result = search(small_net(nn.SiLU), activations=["silu"])
    assert not result.plain_is_beta_1
    assert result.betas == GRID
    neutral = search(small_net(nn.SiLU), activations=["silu"], betas=[0.5], coeff=1.0)
    assert neutral.val_accuracy == (result.plain_val_accuracy,)
    assert neutral.chosen is None  # at beta = 1/2 and c = 1 nothing changes, and the plain network wins the tie
    assert neutral.kept_plain
    assert "plain" in neutral.table()


def test_network_is_left_as_it_was():
    model = small_net().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = small_data()[0]
    output = model(images)
    search(model)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(images), output)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_network_is_left_as_it_was_after_an_error():
    model = small_net()
    images, labels = small_data()
    bad = Counting(images.clone(), labels, [], "bad")
    bad.images[40] = math.nan
    with pytest.raises(ValueError, match=r"images must be finite, number \d+"):
        search(model, bad)
    assert [type(m) for m in model][1] is nn.ReLU
    assert not model[4]._forward_pre_hooks


def test_result_as_json(tmp_path):
    result = search()
    result.save(tmp_path / "deep/result.json", command="the command")
    found = json.loads((tmp_path / "deep/result.json").read_text())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["result.json"]
    assert found["schema"] == "ctkernels.search_beta/1"
    assert found["command"] == "the command"
    assert [row["beta"] for row in found["grid"]] == [*GRID, 1.0]
    assert found["chosen"]["beta"] == result.chosen
    assert found["plain"] == {"val_accuracy": result.plain_val_accuracy, "is_beta_1": True}
    assert found["sites"] == list(result.sites)
    assert found["sizes"] | {"train": 54, "val": 18, "test": 18, "classes": 3, "features": 8} == found["sizes"]
    test = found["test"]
    assert test["samples"] == test["both"] + test["neither"] + test["only_plain"] + test["only_steered"] == 18
    assert found["arguments"]["seed"] == 0
    assert found["arguments"]["val"] == 0.2
    assert {"python", "torch", "ctkernels", "scikit-learn"} <= set(found["versions"])
    assert set(found["seconds"]) == {"features", "probes", "test", "total"}


def search_and_extract(name):
    """What two processes must do as one does; saves it under ``name`` and the process's number."""
    torch.set_num_threads(1)
    result = search(batch_size=8)
    us = group(torch.device("cpu"))
    net = small_net()[:4].eval()
    with torch.inference_mode():
        found = extract(
            [TensorDataset(*small_data(50)), TensorDataset(*small_data(9))],
            [net, lambda x: 2 * net(x)],
            8,
            batch_size=8,
            workers=0,
            device=torch.device("cpu"),
            group=us,
            advance=lambda step: None,
        )
    torch.save(found, f"{name}-{us.rank}.pt")
    Path(f"{name}-{us.rank}.json").write_text(json.dumps(stable(result, "processes")))


def test_two_processes_give_the_same_result_as_one(tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(f"from test_search_beta import search_and_extract\nsearch_and_extract({str(tmp_path / 'two')!r})")
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    try:
        search_and_extract(str(tmp_path / "one"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "one-0.pt"), torch.load(tmp_path / "two-0.pt"))
    assert torch.load(tmp_path / "two-1.pt").shape == (2, 0, 8)  # rank 0 has it all
    one, *two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one-0", "two-0", "two-1"))
    assert two == [one, one]


def test_extract_keeps_the_order_and_reads_in_order():
    log: list[tuple[str, int]] = []
    images, labels = small_data(10)
    seen = []
    found = extract(
        [Counting(images[:7], labels[:7], log, "a"), Counting(images[7:], labels[7:], log, "b")],
        [lambda x: x.flatten(1)[:, :4], lambda x: -x.flatten(1)[:, :4]],
        4,
        batch_size=4,
        workers=0,
        device=torch.device("cpu"),
        group=Group(),
        advance=seen.append,
    )
    assert torch.equal(found[0], images.flatten(1)[:, :4])
    assert torch.equal(found[1], -found[0])
    assert len(log) == 10
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": []}, r"betas must be .*, got \(\)"),
        ({"betas": [0.5, 1.2]}, r"betas must be .*, all in \[0, 1\], got \(0.5, 1.2\)"),
        ({"betas": [math.nan]}, r"betas must be .*, all in \[0, 1\], got \(nan,\)"),
        ({"coeff": -1}, r"coeff must be a number in \[0, 1\], or mean-free, got -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"memory_limit": 0}, "memory_limit must be a size such as 500MB or 2GiB, got 0"),
        ({"probe": "svm"}, "probe must be one of .*, got 'svm'"),
        ({"l2": 0.0}, "l2 must be a positive number, got 0.0"),
        ({"val": 1.5}, r"fractions to split off must be in \(0, 1\)"),
        ({"val": 0.6, "test": 0.6}, "with a sum below 1"),
        ({"feature_layer": "nope"}, "feature_layer must be one of .*'0'.*, got 'nope'"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(108, 3))}, "(?i)activation"),
        (
            {"model": nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU())},
            r"images of shape \(1, 3, 6, 6\) do not fit Sequential",
        ),
        (
            {"data": (small_data()[0], torch.zeros(90, dtype=torch.int64))},
            "at least two classes, got 90 images, all of class 0",
        ),
        ({"data": (small_data()[0], small_data()[1] * 1.0)}, "labels must be 90 integers"),
        ({"data": (small_data()[0], small_data()[1] - 1)}, "labels must not be negative, got -1"),
        ({"data": (small_data()[0][:80], small_data()[1])}, "as many images as labels, got 80 and 90"),
        (
            {"data": ((small_data()[0] * 9).byte(), small_data()[1])},
            "images must be floating point, .* got torch.uint8",
        ),
        ({"data": (small_data()[0] * math.inf, small_data()[1])}, "images must be finite, 90 of 90"),
        ({"data": tuple(t[:5] for t in small_data())}, "class 0 has 2 images, too few to split into 3 parts"),
        ({"data": "folder"}, "train must be a data set with a length, .* got str"),
        ({"val": (small_data()[0], small_data()[1] + 1)}, r"val has classes \[3\] that train does not have"),
    ],
)
def test_bad_input_is_named_before_any_work(change, message):
    with pytest.raises(ValueError, match=message):
        search(**change)
