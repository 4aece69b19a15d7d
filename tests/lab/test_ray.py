"""Trials on a Ray cluster of two nodes: the result of one process, whoever dies meanwhile."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import compare_networks as made
import pytest
import torch

from ctkernels.cli import main
from ctkernels.lab import RayExecutor, compare_transfer
from ctkernels.lab.transfer import ImageOptions, TrainingConfig, TransferComparison

ray = pytest.importorskip("ray", reason="clusters need ctkernels[ray]")
for module in ("peft", "accelerate", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(module, reason="the comparison needs ctkernels[lab]")
from ray.cluster_utils import Cluster  # noqa: E402
from test_compare_processes import MODEL, run_and_kill, saved  # noqa: E402
from test_jola_recipe import DATA  # noqa: E402
from test_jola_recipe import folder as tiny_llama  # noqa: E402, F401

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one CPU each; their workers find this library and these tests, and what ``WATCHED`` names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        patch.setenv("WATCHED", str(tmp_path_factory.mktemp("watched")))
        patch.setenv("WATCHED_BY", str(os.getpid()))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else workers starve beside other work
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        node = {"num_cpus": 1, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            torch.set_num_threads(threads)


@pytest.fixture
def watched(cluster):
    """The folder in which :class:`made.Watched` notes its steps, empty."""
    folder = Path(os.environ["WATCHED"])
    for path in folder.iterdir():
        path.unlink()
    return folder


def compare(**options):
    defaults: dict[str, Any] = {
        "models": {"small": made.small, "again": made.small},
        "data": {"patches": made.images()},
        "methods": ["linear", "sct", "tct", "lora-r1"],
        "seeds": (0, 1),
        "betas": [0.8, 0.9],
        "grids": {"tct": {"lr": [0.03, 0.1]}, "lora-r1": {"lr": [0.01, 0.1]}},
        "training": TrainingConfig(epochs=2, batch_size=8),
        "images": ImageOptions(size=made.SIDE, resize=made.SIDE),
        "cpu": True,
        "folds": 1,
        "progress": False,
    }
    options = {**defaults, **options}
    options["grids"] = {name: grid for name, grid in options["grids"].items() if name in options["methods"]}
    return compare_transfer(options.pop("models"), options.pop("data"), **options)


def runs(result):
    """The runs in their order, without their times."""
    values = json.loads(json.dumps(result.to_dict()))
    return [{**run, "seconds": 0} for run in values["cells"]]


def same_files(one, other):
    names = sorted(path.name for path in (one / "weights").iterdir())
    assert names == sorted(path.name for path in (other / "weights").iterdir())
    for name in names:
        assert (one / "weights" / name).read_bytes() == (other / "weights" / name).read_bytes(), name


def steps(folder):
    """How many steps of training the workers have done."""
    return sum(path.stat().st_size for path in folder.glob("*.steps"))


def address(cluster):
    return {"executor": RayExecutor(cluster.address, progress=False)}


# --- the result of one process ------------------------------------------------------------------------------------------


def test_two_nodes_give_the_result_of_one_process(cluster, tmp_path):
    """Every number and every bit of the weights, in the same order, whichever trial ended first."""
    one = compare(out=tmp_path / "one", folds=2)
    two = compare(out=tmp_path / "two", folds=2, **address(cluster))
    assert runs(one) == runs(two)
    assert one.setup == two.setup
    same_files(tmp_path / "one", tmp_path / "two")
    assert TransferComparison.read(tmp_path / "two/result.json").runs == two.runs
    assert not ray.is_initialized()


def test_texts_and_models_loaded_by_name(cluster, tmp_path, tiny_llama):  # noqa: F811
    """The commands, whose workers load network and language model by name."""
    data = tmp_path / "texts"
    data.mkdir()
    for part, examples in (("train", DATA.train[:16]), ("val", DATA.train[16:24]), ("test", DATA.train[24:36])):
        rows = [{"prompt": e.prompt, "answer": e.answer, "choices": e.choices} for e in examples]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jola = [
        "jola",
        str(data),
        "--model",
        str(tiny_llama),
        "--methods",
        "zero-shot,lora,jola",
        "--seeds",
        "0,1",
        "--no-report",
    ]
    jola += ["--no-progress"]
    jola += ["--grid", "lora.rank=2", "--train", "16", "--val", "8", "--test", "12", "--epochs", "1", "--device", "cpu"]
    images = ["compare", saved(tmp_path), *MODEL, "--methods", "linear,tct", "--seeds", "0,1", "--epochs", "1"]
    tune = ["tune", saved(tmp_path), *MODEL, "--lr", "0.03,0.1", "--betas", "0.8,0.9", "--epochs", "1"]
    for command in (jola, images, tune):
        one, two = tmp_path / command[0] / "one", tmp_path / command[0] / "two"
        assert main([*command, "--out", str(one)]) == 0
        assert main([*command, "--out", str(two), "--ray", cluster.address]) == 0
        found = [json.loads((out / "result.json").read_text()) for out in (one, two)]
        assert [{**run, "seconds": 0} for run in found[0]["cells"]] == [
            {**run, "seconds": 0} for run in found[1]["cells"]
        ]
        assert found[0]["setup"] == found[1]["setup"]
        same_files(one, two)


def test_killed_and_resumed(cluster, tmp_path):
    """The process that runs the comparison is killed; what was finished is not done again."""
    command = ["compare", saved(tmp_path), *MODEL, "--methods", "linear,lora-r1", "--seeds", "0,1,2", "--epochs", "2"]
    command += ["--grid", "lora-r1.lr=0.01,0.1"]
    before = run_and_kill([*command, "--ray", cluster.address], tmp_path / "killed", writes=5)
    assert before
    assert main([*command, "--out", str(tmp_path / "killed"), "--ray", cluster.address]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    killed, whole = (TransferComparison.read(tmp_path / name / "result.json") for name in ("killed", "whole"))
    assert runs(killed) == runs(whole)
    assert {run.seconds for run in before.values()} <= {run.seconds for run in killed.runs}
    same_files(tmp_path / "killed", tmp_path / "whole")


# --- who dies meanwhile -------------------------------------------------------------------------------------------------


def test_a_killed_workers_trial_is_repeated(cluster, watched, tmp_path):
    options = {"models": {"small": made.killed}, "methods": ["tct"]}
    two = compare(out=tmp_path / "two", **options, **address(cluster))
    assert (watched / "ended").exists()
    assert runs(two) == runs(compare(out=tmp_path / "one", **options))
    same_files(tmp_path / "one", tmp_path / "two")
    of_one = 2 * 9  # epochs of 72 images in batches of 8
    assert steps(watched) == len(two.runs) * of_one + 5  # every trial once, and what the killed one had done


def test_a_lost_nodes_trial_is_repeated(cluster, watched):
    (watched / "home").write_text(cluster.head_node.node_id)
    options = {"models": {"small": made.waits}, "methods": ["tct"], "seeds": (0, 1, 2)}
    lost = []

    def lose():
        while not (watched / "ended").exists() or not (watched / "ended").read_text():
            time.sleep(0.1)
        (node,) = [node for node in cluster.worker_nodes if node.node_id == (watched / "ended").read_text()]
        lost.append(node.node_id)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    two = compare(**options, **address(cluster))
    thread.join()
    assert len(lost) == 1
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    assert runs(two) == runs(compare(**options))
    assert steps(watched) == len(two.runs) * 2 * 9 + 5


# --- what is told -------------------------------------------------------------------------------------------------------


def test_a_failing_trial_ends_the_comparison_by_its_error(cluster, watched, tmp_path):
    """What was finished before is kept, and the same call goes on with the rest."""
    options = {"models": {"small": made.fails}, "methods": ["linear", "tct"], "out": tmp_path}
    with pytest.raises(RuntimeError, match="no such kernel"):
        compare(**options, **address(cluster))
    before = {run.key for run in TransferComparison.read(tmp_path / "result.json").runs}
    assert before
    assert runs(compare(**options, **address(cluster))) == runs(compare(**{**options, "out": None}))


def test_bad_input_is_told_in_one_line(cluster, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"model small: machine .* loads another than the one that is compared"):
        compare(models={"small": made.another}, methods=["tct"], **address(cluster))
    options = ["compare", saved(tmp_path), *MODEL, "--methods", "linear", "--out", str(tmp_path)]
    options[options.index("compare_networks:small")] = "compare_networks:another"
    assert main([*options, "--ray", cluster.address]) == 2
    assert "loads another than the one that is compared" in capsys.readouterr().err.splitlines()[-1]
    assert main([*options, "--ray", "somewhere"]) == 2
    assert "--ray must be auto, local or HOST:PORT, got 'somewhere'" in capsys.readouterr().err


def test_a_trial_that_fits_no_machine_is_refused(cluster):
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match=r"a trial takes 2 CPUs.* got up to 1 CPUs"):
            compare(methods=["linear"], **address(cluster))
    finally:
        torch.set_num_threads(1)
