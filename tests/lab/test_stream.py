"""Tasks one after the other on a tiny random Llama: nothing forgotten, forgetting measured, routing, going on."""

import json
import shutil

import pytest
import torch
from tiny_language_model import save_tiny_llama

from ctkernels import cli
from ctkernels.lab.experiment import weights_path

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("tokenizers")
peft = pytest.importorskip("peft")

from ctkernels.adapters import EditMonitor  # noqa: E402
from ctkernels.lab import Router, stream  # noqa: E402
from ctkernels.lab._weights import read_weights, save_weights  # noqa: E402
from ctkernels.lab.cli import stream as stream_command  # noqa: E402
from ctkernels.lab.jola import Answering, Example, RunResult, TextData, TrainingConfig, draw, load_language_model  # noqa: E402
from ctkernels.lab.jola.compare import TextTask  # noqa: E402
from ctkernels.lab.jola.scoring import score_choices  # noqa: E402
from ctkernels.lab.streaming import run as streaming  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WORDS = ["red", "blue", "is", "a", "colour", "fruit", "apple", "pear", "sky", "sea", "grass", "leaf", "the", "of"]
SMALL = {
    "train": 16,
    "val": 8,
    "test": 12,
    "suite": 3,
    "training": TrainingConfig(epochs=3, batch_size=4),
    "grid": {"lr": [0.05], "gate_lr": [0.5]},
    "progress": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), WORDS)


@pytest.fixture
def tiny(folder):
    return load_language_model(folder)


def _task(start, answer):
    """One answer to everything, after a beginning of its own."""
    prompts = [f"{start} {WORDS[(i * 5) % 14]} {WORDS[i % 13]} is a" for i in range(60)]
    return TextData(tuple(Example(prompt, answer, ("fruit", "colour")) for prompt in prompts), source=start)


# The second asks what the first asks and wants the other answer: what is trained on it forgets the first.
TASKS = {"first": _task("the", "fruit"), "second": _task("of", "colour"), "third": _task("leaf grass", "colour")}


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("stream")
    model, tokenizer = load_language_model(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = stream(model, tokenizer, TASKS, out=out, **SMALL)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return result, out


def test_no_output_changes_when_later_tasks_are_learned(learned):
    result, _ = learned
    assert [task.changed for task in result.tasks] == [[0, 0, 0], [0, 0], [0]]
    assert [task.outputs for task in result.tasks] == [3, 3, 3]
    assert result.verdict().startswith("Nothing was forgotten by adapters of their own: all 18 outputs stayed bitwise")


def test_one_adapter_trained_in_sequence_forgets(learned):
    result, _ = learned
    first, second, third = result.tasks
    assert [len(task.sequence) for task in result.tasks] == [3, 2, 1]
    assert first.sequence[0] == first.own  # it starts as the first task's own
    assert first.forgotten > 20
    assert (
        f"lost {(first.forgotten + second.forgotten) / 2:.1f} points on average on the 2 earlier tasks"
        in result.verdict()
    )
    assert third.forgotten == 0


def test_the_router_finds_the_task_and_its_score(learned):
    result, _ = learned
    for task in result.tasks:
        assert task.router == 1  # their first words differ
        assert task.routed == task.own


def test_adapters_on_disk_are_those_that_were_scored(learned, tiny, folder):
    """As peft loads them, without this library's laboratory."""
    result, out = learned
    for task in result.tasks:
        loaded = peft.PeftModel.from_pretrained(load_language_model(folder)[0], out / "adapters" / task.name).eval()
        run = json.loads((out / task.name / "result.json").read_text())["cells"][-1]
        assert run["test"] == {"accuracy": task.own}
        examples = draw(TASKS[task.name], 0, train=16, val=8, test=12).test
        right = [right for right, _ in score_choices(loaded, tiny[1], examples, Answering())]
        assert right == run["each"]
        monitor = EditMonitor(loaded, every=1)
        monitor.load(out / "adapters" / task.name)  # calibrated on the training examples
        assert (monitor.reference.inputs, monitor.window) == (16, 4)


def test_a_changed_adapter_is_noticed(tiny, tmp_path):
    """The suite reads files: a number that changes in one after its task changes outputs."""
    model, tokenizer = tiny
    learn = streaming._Stream.learn

    def tampering(self, number, known):
        learn(self, number, known)
        if number == 0:
            path = weights_path(self.folder / "first", self.runs["first"])
            state = read_weights(path)
            name = next(name for name in state if ".jola_a." in name)
            save_weights(path, {**state, name: state[name] + 1})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming._Stream, "learn", tampering)
        two = {name: TASKS[name] for name in ("first", "third")}
        result = stream(model, tokenizer, two, out=tmp_path, **SMALL)
    assert [task.changed for task in result.tasks] == [[0, 3], [0]]
    assert result.verdict().startswith("6 of 9 outputs of the tasks' own adapters stayed bitwise the same")


def test_one_more_task_trains_nothing_again(learned, tiny, tmp_path, monkeypatch):
    result, out = learned
    shutil.copytree(out, tmp_path / "out")
    trained, train = [], TextTask.train
    monkeypatch.setattr(
        TextTask,
        "train",
        lambda self, method, run, *start: trained.append(bool(start)) or train(self, method, run, *start),
    )
    more = {**TASKS, "fourth": _task("sea of", "fruit")}
    longer = stream(*tiny, more, out=tmp_path / "out", **SMALL)
    assert trained == [False, True]  # its own adapter, and the one trained in sequence
    for old, new in zip(result.tasks, longer.tasks):
        assert (old.own, old.sequence) == (new.own, new.sequence[:-1])
    with pytest.raises(ValueError, match=r"it is of another set-up \(different: suite\); delete it to start anew"):
        stream(*tiny, TASKS, out=tmp_path / "out", **{**SMALL, "suite": 2})
    swapped = {name: TASKS[name] for name in ("second", "first")}
    with pytest.raises(ValueError, match=r"it is of another set-up \(different: tasks\)"):
        stream(*tiny, swapped, out=tmp_path / "out", **SMALL)


def test_routing_sends_wrong_inputs_to_the_wrong_adapter(tiny, tmp_path, monkeypatch):
    """The routed score is that of the adapters that were chosen, not of those that should have been."""
    two = {name: TASKS[name] for name in ("first", "second")}
    monkeypatch.setattr(Router, "route", lambda self, prompts: ["second"] * len(prompts))
    first, second = stream(*tiny, two, out=tmp_path, **SMALL).tasks
    assert (first.router, second.router) == (0, 1)
    assert second.routed == second.own
    assert first.routed < first.own  # the other answer is wanted there


def test_the_router_does_not_depend_on_batches_and_is_saved(tiny):
    router = Router(*tiny)
    prompts = {name: [example.prompt for example in data.train] for name, data in TASKS.items()}
    with pytest.raises(ValueError, match="expected one or more learned tasks, got none"):
        router.route(["the sky"])
    for name, some in prompts.items():
        router.learn(name, some[:20])
    mixed = [text for some in prompts.values() for text in some[20:30]]
    assert router.route(mixed) == [name for name in prompts for _ in range(10)]
    assert [router.route([text])[0] for text in mixed[:5]] == ["first"] * 5
    again = Router(*tiny)
    again.load(router.names, router.state())
    assert again.route(mixed) == router.route(mixed)
    with pytest.raises(ValueError, match="expected the state of a router of 1 tasks"):
        again.load(["first"], router.state())
    with pytest.raises(ValueError, match="expected two or more prompts of a new task, got 20 of 'first'"):
        router.learn("first", prompts["first"][:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {}}, "tasks must be one or more"),
        ({"tasks": {"a/b": TASKS["first"]}}, r"with names of letters, .*got \['a/b'\]"),
        ({"method": "zero-shot"}, "method must be one that trains something, got 'zero-shot'"),
        ({"suite": 0}, "suite must be at least 1, got 0"),
        ({"train": 500}, "500 training and 8 validation examples were asked for"),
        ({"grid": {"rank": [2.0]}}, r"jola has the settings \['lr', 'gate_lr'.*got \['rank'\]"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(tiny, tmp_path, options, message):
    options = {**SMALL, "tasks": TASKS, **options}
    with pytest.raises(ValueError, match=message):
        stream(*tiny, options.pop("tasks"), out=tmp_path / "out", **options)
    assert not list(tmp_path.rglob("result.json"))


def test_the_command_line(folder, tmp_path, capsys):
    for name, data in list(TASKS.items())[:2]:
        rows = [{"prompt": e.prompt, "answer": e.answer, "choices": list(e.choices)} for e in data.train]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = str(tmp_path / "first.jsonl"), f"other={tmp_path / 'second.jsonl'}"
    sizes = {"train": 16, "val": 8, "test": 12, "suite": 2, "epochs": 1, "batch-size": 4}
    sizes = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    sizes += ["--grid", "lr=0.05", "--grid", "gate_lr=0.5"]
    rest = ["--model", str(folder), "--out", str(tmp_path / "out"), "--no-progress", *sizes]
    assert cli.main(["stream", first, second, *rest]) == 0
    said = capsys.readouterr().out
    assert "first " in said
    assert "other " in said
    assert "Nothing was forgotten by adapters of their own: all 6 outputs" in said
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (saved["schema"], saved["options"]["suite"]) == ("ctkernels.stream/1", 2)
    assert cli.main(["stream", first, first, *rest]) == 2
    assert "tasks must have different names, got first more than once" in capsys.readouterr().err
    assert cli.main(["stream", first, *rest, "--grid", "lr"]) == 2
    assert "--grid must be NAME=VALUE,VALUE with finite numbers, got 'lr'" in capsys.readouterr().err


def test_tasks_are_called_as_their_file_or_function_is(tmp_path):
    (tmp_path / "law.v2.jsonl").write_text('{"prompt": "sky is", "answer": "blue"}')
    assert stream_command._task(f"{tmp_path}/law.v2.jsonl") == ("law.v2", f"{tmp_path}/law.v2.jsonl")
    assert stream_command._task(f"tax={tmp_path}/law.v2.jsonl") == ("tax", f"{tmp_path}/law.v2.jsonl")
    (tmp_path / "made.py").write_text("def questions():\n    raise NotImplementedError\n")
    assert stream_command._task(f"{tmp_path}/made.py:questions")[0] == "questions"


def test_runs_are_those_of_the_engine(learned):
    """The first task's adapter is the run that a comparison of this method makes."""
    _, out = learned
    cells = json.loads((out / "first" / "result.json").read_text())["cells"]
    assert [RunResult(**cell).method for cell in cells] == ["zero-shot", "jola"]
