"""The comparison: that it counts, chooses and repeats itself rightly, and refuses bad input at once."""

import json
import math
import shutil
import warnings
from dataclasses import replace

import compare_networks as made
import pytest
import torch
from torch import nn

from ctkernels.cli import main
from ctkernels.lab import ImageSet, Splits, load_data, search_beta
from ctkernels.lab.experiment import weights_path
from ctkernels.lab.images.backbone import coeff_at
from ctkernels.lab.transfer import (
    ImageOptions,
    RunResult,
    TrainingConfig,
    TransferComparison,
    compare_transfer,
    load_tuned,
    stages,
    tune,
    tune_curvature,
)
from ctkernels.lab.transfer.heads import fit_head, with_head
from ctkernels.lab.transfer.methods import lora_targets, method

for module in ("peft", "accelerate", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(module, reason="the comparison needs ctkernels[lab]")

IMAGES = ImageOptions(size=made.SIDE, resize=made.SIDE)
RATES = {"linear": {"head_lr": [0.05]}, "tct": {"lr": [0.1], "head_lr": [0.05]}}


def compare(methods, models=None, data=None, **options):
    defaults = {
        "methods": methods,
        "seeds": (0, 1),
        "betas": [0.8, 0.9],
        "training": TrainingConfig(epochs=3, batch_size=8),
        "images": IMAGES,
        "grids": {name: grid for name, grid in RATES.items() if name in methods},
        "folds": 1,
        "margin": 0.0,
        "cpu": True,
        "progress": False,
    }
    models, data = models or {"small": made.small}, data or {"patches": made.images()}
    return compare_transfer(models, data, **{**defaults, **options})


# --- what is trained --------------------------------------------------------------------------------------------------


def attach(name, network, side):
    example = torch.zeros(1, 3, side, side)
    network, head = with_head(network.eval(), example, classes=10)
    return network, head, method(name).attach(network, head, method(name).settings()[0], None, example)


def test_parameter_counts_of_a_resnet_18():
    models = pytest.importorskip("torchvision.models")
    *_, tct = attach("tct", models.resnet18(), 32)
    assert (tct.parameters, tct.head) == (3_968, 5_130)  # as published; the new head is 512 x 10 + 10
    *_, both = attach("tct+lora-r1", models.resnet18(), 32)
    *_, lora = attach("lora-r1", models.resnet18(), 32)
    *_, four = attach("lora-r4", models.resnet18(), 32)
    assert (lora.parameters, four.parameters) == (35_923, 4 * 35_923)  # as published for rank 1, and by its formula
    assert both.parameters == 35_923 + 3_968


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lora-r1", 3 * 9 + 8),  # rank 1 does not divide by the 8 groups of the depthwise convolution
        ("lora-r8", 8 * (3 * 9 + 8) + 8 * (8 * 9) + 8 * 1),  # peft's first factor is not grouped, the second one is
        ("tct", 2 * 8),  # one module used at two places with 8 channels: shared; beta and coeff
    ],
)
def test_parameter_counts_of_a_small_network(name, count):
    *_, attached = attach(name, made.small(), made.SIDE)
    assert attached.parameters == count
    trained = {n for n, p in attached.network.named_parameters() if p.requires_grad}
    assert sum(p.numel() for g in attached.groups for p in g["params"]) == count + attached.head
    assert all("modules_to_save" in n or "lora_" in n or "curvature_" in n for n in trained)


def test_lora_leaves_out_what_peft_cannot():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, groups=2))
    assert lora_targets(network, "", rank=1) == (["0"], ["1", "2"])
    assert lora_targets(network, "", rank=2) == (["0", "2"], ["1"])


def test_head_is_the_same_for_every_method():
    network, name = with_head(made.small().eval(), torch.zeros(1, 3, 8, 8), classes=4, seed=3)
    first = fit_head(
        torch.zeros(8, 8), torch.zeros(8).long(), torch.zeros(8, 8), torch.zeros(8).long(), 4,
        lr=1e-30, training=TrainingConfig(1), seed=3,
    )  # fmt: skip
    torch.testing.assert_close(network.get_submodule(name).weight.detach(), first.state["weight"])
    no_classifier = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    network, name = with_head(no_classifier, torch.zeros(1, 3, 8, 8), classes=4)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert network.get_submodule(name).in_features == 6


def test_schedule():
    training = TrainingConfig(epochs=20, batch_size=32)
    assert [training.factor(s, 4) for s in (0, 1, 3, 4, 39, 40, 79)] == [0.25, 0.5, 1, 1, 1, 0.1, 0.1]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_finds_the_planted_beta_for_every_seed():
    result = compare(
        ["linear", "sct"],
        {"planted": made.Planted},
        {"planted": made.planted()},
        betas=[0.7, 0.8, 0.9],
        grids={"linear": {"head_lr": [0.1]}, "sct": {"head_lr": [0.1]}},
        training=TrainingConfig(epochs=8, batch_size=8),
    )
    found = result.tested("planted", "planted", "sct")
    assert [c.detail["beta"] for c in found] == [0.8, 0.8]
    assert [s["beta"] for s in found[0].detail["search"]] == [0.7, 0.8, 0.9, 1.0]
    assert min(c.test for c in found) > 0.95
    assert max(c.test for c in result.tested("planted", "planted", "linear")) < 0.8
    gain = result.gain("planted", "sct")
    assert gain["better"] == gain["sets"] == 1
    assert "S-CT" in result.verdict()


def test_learned_curvature_is_told_by_site():
    result = compare(["tct"], seeds=(0,))
    (cell,) = result.runs
    sites = cell.detail["curvature"]
    assert set(sites) == {"2"}
    assert sum(sites["2"]["beta"]["histogram"]) == 8
    assert 0 < sites["2"]["beta"]["low"] <= sites["2"]["beta"]["mean"] <= sites["2"]["beta"]["high"] < 1
    assert sites["2"]["beta"]["mean"] != pytest.approx(0.8, abs=1e-6)  # it moved from where it started


def test_validation_chooses_and_test_images_are_read_once():
    reads = []

    class Watched:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            if isinstance(i, torch.Tensor):
                return Watched(self.images[i])
            reads.append(float(self.images[i].sum()))
            return self.images[i]

    data = made.images(60, test=30)
    test = ImageSet(Watched(data.test.images), data.test.labels, data.test.classes)
    data = Splits(data.train, None, test, "watched")
    grids = {"linear": {"head_lr": [1e-6, 0.05]}}
    result = compare(["linear"], data={"patches": data}, seeds=(0, 1), grids=grids, memory_limit=1)
    chosen = [c for c in result.runs if c.test is not None]
    assert {c.setting["head_lr"] for c in chosen} == {
        max(result.runs, key=lambda c: c.validation["accuracy"]).setting["head_lr"]
    }
    assert len(result.runs) == 3  # both settings on the first seed, the chosen one on the second
    checked = 1  # the first test image goes into the digest
    assert len(reads) == 2 * 30 + checked


def test_same_seed_same_table():
    methods, options = ["linear", "sct", "tct+lora-r1"], {"bn": "train", "training": TrainingConfig(1, 16)}
    first, again = compare(methods, **options), compare(methods, **options)
    assert made.stable(first.runs) == made.stable(again.runs)
    assert first.table() == again.table()
    assert [c.right for c in compare(["linear"]).runs] != [c.right for c in compare(["linear"], seeds=(5, 6)).runs]


def test_models_are_left_as_they_were():
    model = made.small().train()
    model[4].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    for bn in ("eval", "train"):
        compare(["linear", "sct", "tct"], {"small": model}, seeds=(0,), bn=bn)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batch_normalisation_modes():
    """On features shifted far from pretraining's, statistics of the new data matter; "paper" mixes the two."""
    found = {bn: compare(["linear", "tct"], seeds=(0,), bn=bn) for bn in ("eval", "train", "paper")}
    cells = {(bn, c.method): made.stable([c])[0][2:] for bn, r in found.items() for c in r.runs}
    assert cells["paper", "linear"] == cells["eval", "linear"] != cells["train", "linear"]
    assert cells["paper", "tct"] == cells["train", "tct"] != cells["eval", "tct"]


def test_more_can_be_added_and_nothing_is_repeated(tmp_path):
    first = compare(["linear"], seeds=(0,), out=tmp_path)
    stamp = {c.key: c.seconds for c in first.runs}
    more = compare(["linear", "sct"], {"small": made.small, "again": made.small}, seeds=(0, 1), out=tmp_path)
    assert {k: v for k, v in ((c.key, c.seconds) for c in more.runs) if k in stamp} == stamp
    assert len(more.runs) == 2 * 2 * 2
    assert TransferComparison.read(tmp_path / "result.json").runs == more.runs
    with pytest.raises(ValueError, match=r"another set-up.*budget"):
        compare(["linear"], out=tmp_path, training=TrainingConfig(4, 8))
    with pytest.raises(ValueError, match="the first seed"):
        compare(["linear"], seeds=(1, 0), out=tmp_path)
    with pytest.raises(ValueError, match="data: patches"):
        compare(["linear"], data={"patches": made.images(seed=9)}, seeds=(0, 1), out=tmp_path)


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def change(method, **values):
    """Make a function that changes the first run of a method in a result file."""

    def apply(folder):
        saved = json.loads((folder / "result.json").read_text())
        cell = next(c for c in saved["cells"] if c["method"] == method)
        for name, value in values.items():
            cell[name] = value(cell) if callable(value) else value
        (folder / "result.json").write_text(json.dumps(saved))

    return apply


def weights_of(method, damage):
    return lambda folder: damage(next((folder / "weights").glob(f"small_patches_{method}_0_*")))


DAMAGE = {
    "gone": (weights_of("tct", lambda file: file.unlink()), "tct, seed 0, .*: its weights, .*, are gone"),
    "cut short": (weights_of("linear", cut), "linear, seed 0, .*: its weights, .*, are not those that it left"),
    "changed": (weights_of("sct", flip), "sct, seed 0, .*: its weights, .*, are not those that it left"),
    "best": (change("tct", best=lambda c: c["best"] % 3 + 1), "it names epoch . as its best, which is epoch ."),
    "test": (
        change("linear", test=1.0, right=lambda c: "1" + c["right"][1:-1] + "0"),
        "its test accuracy, 1.0, is not",
    ),
    "images": (change("linear", right="1", test=1.0), "its test accuracy, 1.0, is not that of its 60 test images"),
    "beta": (change("sct", detail=lambda c: {**c["detail"], "beta": 0.123}), "it names beta 0.123 as its choice"),
    "epochs": (change("tct", epochs=[]), "its 0 epochs are not numbers"),
    "kinds": (change("tct", epochs=[{"accuracy": "high", "loss": 1}]), r"it is damaged \(TypeError"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, compare(["linear", "sct", "tct"], out=folder, seeds=(0,))


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_run_is_told_and_done_again(damage, message, finished, tmp_path):
    """And no other: the rest is as it was, and the end is what it would have been."""
    folder, before = finished
    shutil.copytree(folder, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.warns(UserWarning, match=f"{message}.*; this run is done again") as told:
        after = compare(["linear", "sct", "tct"], out=tmp_path / "out", seeds=(0,))
    assert len([w for w in told if "done again" in str(w.message)]) == 1
    assert made.stable(after.runs) == made.stable(before.runs)
    assert len({c.seconds for c in after.runs} & {c.seconds for c in before.runs}) == 2
    for file in (folder / "weights").iterdir():
        assert (tmp_path / "out/weights" / file.name).read_bytes() == file.read_bytes()


def test_a_finished_comparison_is_not_done_again_without_a_record_of_its_weights(finished, tmp_path, recwarn):
    """Results of before the record was kept: their weights have to be readable, which is all that can be known."""
    folder, before = finished
    shutil.copytree(folder, tmp_path / "out")
    saved = json.loads((tmp_path / "out/result.json").read_text())
    for cell in saved["cells"]:
        del cell["weights"]
    (tmp_path / "out/result.json").write_text(json.dumps(saved))
    after = compare(["linear", "sct", "tct"], out=tmp_path / "out", seeds=(0,))
    assert {c.seconds for c in after.runs} == {c.seconds for c in before.runs}
    assert not [w for w in recwarn if "done again" in str(w.message)]
    weights_of("tct", cut)(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"expected a .safetensors file: .*; this run is done again"):
        compare(["linear", "sct", "tct"], out=tmp_path / "out", seeds=(0,))


def test_a_choice_that_validation_does_not_make_is_taken_back(tmp_path):
    """The setting that was tested has to be the best of those that were tried."""
    options = {"out": tmp_path, "seeds": (0,), "grids": {"linear": {"head_lr": [0.05, 1e-6]}}}
    before = compare(["linear"], **options)
    good, poor = sorted(before.runs, key=lambda c: -c.validation["accuracy"])
    assert good.test is not None
    assert poor.test is None
    saved = json.loads((tmp_path / "result.json").read_text())
    for cell in saved["cells"]:  # as if the other one had been chosen
        cell["test"], cell["right"] = (None, "") if cell["test"] is not None else (good.test, good.right)
        cell["weights"] = good.weights
    (tmp_path / "result.json").write_text(json.dumps(saved))
    shutil.copy(weights_path(tmp_path, good), weights_path(tmp_path, poor))
    with pytest.warns(UserWarning, match="head_lr 1e-06: validation chooses head_lr 0.05; its test does not count"):
        after = compare(["linear"], **options)
    assert made.stable(after.runs) == made.stable(before.runs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "result.json: expected JSON"),
        ('{"schema": "ctkernels.compare_transfer/1", "cells": [', "result.json: expected JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": NaN}', "NaN is not a number of JSON"),
        ('{"schema": "ctkernels.compare_transfer/0", "cells": []}', "expected the schema"),
        ('{"schema": "SCHEMA", "cells": [{"model": "x"}], "setup": {}, "seconds": 0}', "is not a result"),
        ('{"schema": "SCHEMA", "cells": [], "setup": {"models": 3}, "seconds": 0}', "is not a result"),
    ],
)
def test_a_damaged_result_is_not_gone_on_from(text, message, tmp_path):
    (tmp_path / "result.json").write_text(text.replace("SCHEMA", TransferComparison.SCHEMA))
    with pytest.raises(ValueError, match=message):
        compare(["linear"], out=tmp_path)
    assert (tmp_path / "result.json").read_text() == text.replace("SCHEMA", TransferComparison.SCHEMA)


# --- few validation images --------------------------------------------------------------------------------------------


def test_folds_validate_every_image_once_and_keep_the_first_folds_weights(tmp_path):
    """Epochs go by all folds; what is kept is what the run without folds has at that epoch."""
    data, methods = {"patches": made.images(90)}, ["linear", "sct", "tct"]
    one = compare(methods, data=data, seeds=(0,), out=tmp_path / "one")
    five = compare(methods, data=data, seeds=(0,), out=tmp_path / "five", folds=None)
    assert five.setup["data"]["patches"]["folds"] == 5  # 18 of 90 are validated on, and 5 x 18 is all of them
    for before, run in zip(one.runs, five.runs):
        assert (len(before.validated), len(run.validated)) == (18, 90)
        assert run.validation["accuracy"] == run.validated.count("1") / 90
        assert five.contradiction(run) is None
        at = [b["loss"] for b in before.epochs]
        assert len(at) == len(run.epochs)
        assert at != [e["loss"] for e in run.epochs]
        if before.best == run.best and before.detail.get("beta") == run.detail.get("beta"):
            assert (before.right, before.weights) == (run.right, run.weights)
    assert any(before.right == run.right for before, run in zip(one.runs, five.runs))
    wrong = replace(five.runs[0], validated="1" + "0" * 89)
    assert "its validation accuracy" in five.contradiction(wrong)


def test_folds_are_stopped_where_they_diverge():
    result = compare(["lora-r1"], seeds=(0,), grids={"lora-r1": {"lr": [1e30]}}, folds=3)
    (run,) = result.runs
    assert run.diverged
    json.dumps(result.to_dict(), allow_nan=False)


def test_too_many_folds_are_refused():
    with pytest.raises(ValueError, match="data patches: folds must be at most 5 for 18 validation and 72 training"):
        compare(["linear"], folds=6)
    own = replace(made.images(), val=made.images(30, seed=5).train)
    assert compare(["linear"], data={"own": own}, seeds=(0,), folds=None).setup["data"]["own"]["folds"] == 1


def test_a_beta_within_one_standard_error_is_not_chosen():
    """The planted beta is far beyond it; at a margin as large as that nothing is."""
    options = {"models": {"planted": made.Planted}, "data": {"planted": made.planted()}, "seeds": (0,), "betas": [0.8]}
    options |= {"grids": {"sct": {"head_lr": [0.1]}}, "training": TrainingConfig(epochs=8, batch_size=8)}
    for margin, beta in ((1.0, 0.8), (1e3, 1.0)):
        (run,) = compare(["sct"], **options, margin=margin).runs
        assert run.detail["beta"] == beta
        assert run.detail["best"]["beta"] == 0.8
        assert run.detail["best"]["points"] > 3 * run.detail["best"]["standard_error"]


# --- tune -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", ["eval", "train", "paper"])
@pytest.mark.parametrize("kept", ["linear", "sct", "tct"])
def test_tune_saves_what_it_tested(tmp_path, bn, kept, monkeypatch):
    """Whichever stage is kept, what is loaded again classifies the test images as that stage did."""
    monkeypatch.setattr(tune, "kept_stage", lambda result: kept)
    options = {"betas": [0.8, 0.9], "training": TrainingConfig(3, 8), "images": IMAGES, "cpu": True, "progress": False}
    options["folds"] = 1
    data = made.images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that T-CT is below the probe, where it is
        result = tune_curvature(made.small, data, tmp_path, head_lr=[0.05], bn=bn, seed=0, **options)
    chosen = result.tested("model", "data", "sct")[0].detail["beta"]
    start = result.tested("model", "data", "tct")[0].setting
    assert (start.get("beta"), start.get("coeff")) == ((None, None) if chosen in (None, 1.0) else (chosen, 0.5))
    cell = result.tested("model", "data", kept)[0]
    network, preprocess, classes = load_tuned(made.small(), tmp_path)
    assert classes == data.train.classes
    with torch.no_grad():
        logits = network(torch.stack([preprocess(data.test.raw(i)) for i in range(len(data.test))]))
    right = "".join("1" if r else "0" for r in (logits.argmax(1) == data.test.labels).tolist())
    assert right == cell.right
    values = json.loads((tmp_path / "result.json").read_text())
    assert (values["kind"], values["tuned"]["kept"]) == ("tune", kept)
    assert (tmp_path / "adapter").exists() == (kept == "tct")
    assert stages(result).count("\n") == 3
    with pytest.raises(ValueError, match="must hold what tune_curvature left"):
        load_tuned(made.small(), tmp_path / "weights")
    cut(tmp_path / ("adapter/adapter_model.safetensors" if kept == "tct" else "head.safetensors"))
    with pytest.raises(ValueError, match=r"(adapter_model|head).safetensors: expected a .safetensors file"):
        load_tuned(made.small(), tmp_path)


def test_tune_keeps_the_best_stage_and_warns_of_a_curvature_that_learned_nothing(tmp_path):
    """A rate at which the knobs are thrown to their ends in the first steps."""
    options = {"betas": [0.9], "training": TrainingConfig(2, 8), "images": IMAGES, "cpu": True, "progress": False}
    options["folds"] = 1
    with pytest.warns(UserWarning, match=r"T-CT ended .* points below the linear probe .* is kept"):
        result = tune_curvature(made.small, made.images(), tmp_path, lr=[1e4], head_lr=[0.05], seed=0, **options)
    accuracy = {name: result.tested("model", "data", name)[0].validation["accuracy"] for name in tune.STAGES}
    assert accuracy["tct"] < accuracy["linear"]
    assert tune.kept_stage(result) == "linear"  # which S-CT is not beyond one standard error of
    assert not (tmp_path / "adapter").exists()


def test_tune_from_the_command_line(tmp_path, capsys):
    arguments = ["tune", "digits", "--model", "compare_networks:small", "--size", "8", "--resize", "8"]
    arguments += [
        "--max-train",
        "100",
        "--max-test",
        "60",
        "--betas",
        "0.9",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--no-progress",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "validation prefers" in capsys.readouterr().out
    kept = json.loads((tmp_path / "result.json").read_text())["tuned"]
    assert (tmp_path / kept.get("head", "adapter/adapter_model.safetensors")).is_file()
    assert main([*arguments, "--lr", "fast", "--out", str(tmp_path)]) == 2


# --- the result -------------------------------------------------------------------------------------------------------


def result_of(accuracies):
    """From the right answers of every (data, method), one string per seed."""
    cells = tuple(
        RunResult(
            model="net", data=data, method=name, seed=seed, setting={}, parameters=7, head=3,
            epochs=[{"loss": 1.0, "accuracy": 0.5}], best=1, seconds=1.0, test=right.count("1") / len(right), right=right,
        )
        for (data, name), rights in accuracies.items()
        for seed, right in enumerate(rights)
    )  # fmt: skip
    names = {"data": dict.fromkeys(d for d, _ in accuracies), "methods": dict.fromkeys(m for _, m in accuracies)}
    return TransferComparison(cells, {"models": {"net": {}}, "seeds": [0, 1], **names})


def test_gains_are_means_of_relative_gains_and_of_points():
    result = result_of(
        {
            ("a", "linear"): ["1100", "1100"],  # 0.5
            ("a", "tct"): ["1110", "1100"],  # 0.625: +25 %
            ("b", "linear"): ["1000", "1000"],  # 0.25
            ("b", "tct"): ["0000", "1000"],  # 0.125: -50 %
        }
    )
    gain = result.gain("net", "tct")
    assert (gain["points"], gain["relative"]) == (0.0, pytest.approx(-0.125))
    assert (gain["better"], gain["sets"]) == (1, 2)
    # differences per test image, averaged over seeds: 0, 0, 1/2, 0
    assert gain["each"][0]["standard_error"] == pytest.approx(
        math.sqrt(3 * (1 / 8) ** 2 + (3 / 8) ** 2) / math.sqrt(12)
    )
    assert "| b | **25.0 ± 0.0** | 12.5 ± 17.7 |" in result.markdown()
    assert "62.5 ± 17.7*" in result.table()
    json.dumps(result.to_dict(), allow_nan=False)


def test_unfinished_results_are_no_errors():
    result = result_of({("a", "linear"): ["11"], ("a", "tct"): ["10", "11"]})
    assert result.gain("net", "tct") is None  # one seed of the baseline is missing
    assert result.table()
    assert result.verdict() == "Nothing to compare yet."


def test_files_that_are_no_result(tmp_path):
    for name, text, message in (
        ("text", "hello", "expected JSON"),
        ("list", "[]", "is not a result"),
        ("other", '{"schema": "ctkernels.search_beta/1"}', "is not a result"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}:? {message}"):
            TransferComparison.read(tmp_path / name)
    assert TransferComparison((), {"models": {}}).resume(tmp_path / "none").runs == ()


# --- bad input --------------------------------------------------------------------------------------------------------


def with_nan():
    data = made.images()
    data.train.images[7, 0, 0, 0] = float("nan")
    return data


BAD = [
    ({"methods": ["ctt"]}, "methods must be linear, sct"),
    ({"methods": []}, "methods must hold at least one"),
    ({"seeds": ()}, "seeds must hold at least one"),
    ({"bn": "frozen"}, "bn must be one of"),
    ({"precision": "fp8"}, "precision must be one of"),
    ({"betas": [1.5]}, r"betas must be START:STOP:STEP .*, all in \[0, 1\], got"),
    ({"grids": {"tct": {"rank": [1]}}, "methods": ["tct"]}, "tct has the settings"),
    ({"grids": {"tct": {"lr": [-1]}}, "methods": ["tct"]}, "positive numbers"),
    ({"grids": {"lora-r1": {"lr": [1]}}}, "grids must be of methods that take part"),
    ({"models": {"plain": made.one_linear}, "methods": ["sct"]}, "model plain: .*to have an activation"),
    ({"models": {"plain": made.one_linear}, "methods": ["tct"]}, "model plain: .*activation"),
    (
        {"models": {"grey": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())}},
        "model grey: images of shape .* do not fit Sequential: RuntimeError",
    ),
    ({"data": {"nan": with_nan()}}, "data nan: images must be finite, 1 of 90"),
    ({"data": {"one": made.images(30, classes=1)}}, "data one: .*at least two classes"),
    ({"data": {"few": made.images(3)}}, "data few: .*too few to split"),
]


def test_options_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="max_test must be a whole number of at least 1, got 0"):
        ImageOptions(size=8, resize=8, max_test=0)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_input_is_named_before_any_training(change, message, monkeypatch):
    def trained(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr("ctkernels.lab.transfer.compare.TransferTask.train", trained)
    options = {"methods": ["linear"], "grids": {}, **change}
    with pytest.raises(ValueError, match=message):
        compare(options.pop("methods"), options.pop("models", None), options.pop("data", None), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing/", "--model", "resnet18"], "missing does not exist"),
        (["digits", "digits", "--model", "compare_networks:small"], "more than once"),
        (["digits", "--model", "compare_networks:small", "--seeds", "a"], "--seeds must be whole numbers"),
        (["digits", "--model", "compare_networks:small", "--grid", "tct.lr=a"], "--grid must be"),
        (["torchvision:Nothing", "--model", "resnet18"], "torchvision has no data set 'Nothing'"),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path, capsys):
    if "torchvision" in arguments[0]:
        pytest.importorskip("torchvision")
    assert main(["compare", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_unlabelled_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    with pytest.raises(ValueError, match=r"one subfolder of images per class, found none \(1 loose"):
        load_data(tmp_path / "photos")


def test_a_rate_that_is_too_high_is_told_and_does_not_stop_the_rest():
    result = compare(["lora-r1"], seeds=(0,), grids={"lora-r1": {"lr": [1e30, 0.01]}})
    diverged = {c.setting["lr"]: c.diverged for c in result.runs}
    assert diverged == {1e30: True, 0.01: False}
    json.dumps(result.to_dict(), allow_nan=False)


# --- the mean-shift-free coefficient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 0.7, 0.9, 0.99])
def test_mean_free_coefficient_has_no_mean_shift(beta):
    """The integral of unit - ReLU over all x, by a fine sum in float64; beyond |u| = 60 it is below e^-30."""
    from ctkernels.functional import ctu

    c = coeff_at("mean-free", beta)
    step = (1 - beta) / 1000
    x = torch.arange(-200_000, 200_001, dtype=torch.float64) * step
    shifts = [float((ctu(x, beta, k) - x.relu()).sum()) * step / (1 - beta) ** 2 for k in (c, 0.5)]
    # the trapezoidal sum misses the kink of the ReLU at 0, which lies on a point: at most step^2 / 12 of its slope's jump
    assert abs(shifts[0]) < 1e-5
    assert shifts[1] == pytest.approx(math.pi**2 / 6 * (0.5 - 0.5 / beta**2), rel=1e-4)


def test_search_with_the_mean_free_coefficient():
    data = made.images().train
    options = {"betas": [0.8, 0.9], "progress": False, "seed": 1}
    data = data.images, data.labels
    found = search_beta(made.small(), data, coeff="mean-free", **options)
    assert found.arguments["coeff"] == "mean-free"
    single = search_beta(made.small(), data, coeff=coeff_at("mean-free", 0.8), **options)
    assert found.val_accuracy[0] == single.val_accuracy[0]
    with pytest.raises(ValueError, match=r"coeff must be a number in \[0, 1\], or mean-free, got 'free'"):
        search_beta(made.small(), data, coeff="free", **options)
