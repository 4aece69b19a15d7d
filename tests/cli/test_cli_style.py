"""All commands are spoken to alike: the same options under the same names, defaults that are told, errors that suggest."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from ctkernels import cli

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
for needed in ("sklearn", "tqdm", "torchvision"):
    pytest.importorskip(needed, reason="the commands need ctkernels[lab]")

ROOT = Path(__file__).parents[2]
PARSERS = {name: importlib.import_module(module).parser() for name, (module, _) in cli.COMMANDS.items()}
# Those that compute something of a model, and may take long.
RUNS = ("adapt", "steer", "compare", "tune", "jola", "stream", "search", "robust")
NETWORKS = ("steer", "compare", "tune", "search", "robust", "curvature")


def make_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


MODEL = f"{__name__}:make_net"


def actions():
    """(command, option) of every option and argument."""
    return [(command, action) for command, parser in PARSERS.items() for action in parser._actions]


def named(command, option):
    return PARSERS[command]._option_string_actions[option]


def test_every_run_has_the_options_of_runs():
    for command in RUNS:
        options = set(PARSERS[command]._option_string_actions)
        assert options >= {"--model", "--device", "--out", "--no-progress"}, command
        assert options & {"--seed", "--seeds"}, command


def test_a_network_is_named_with_its_weights():
    assert {named(command, "--model").metavar for command in NETWORKS} == {"NAME[=WEIGHTS]"}
    for command in ("steer", "curvature"):
        model = named(command, "--model").type("resnet18=none")
        assert (model.name, model.weights, str(model)) == ("resnet18", "none", "resnet18=none")
        assert str(named(command, "--model").type("resnet18")) == "resnet18"


# Options that take something else in some command, and why.
DIFFER = {
    "--model": "a network and its weights, or a language model",
    "--device": "the benchmark suite knows cpu and cuda",
    "--coeff": "steer can make it depend on beta",
    "--val": "a share of images, a number of texts",
    "--test": "a share of images, a number of texts",
    "--l2": "of robust, a bound of attacks",
    "--methods": "each comparison has its own",
    "--grid": "stream has one method, which is not named again",
    "--dtype": "of a language model's weights; of ops, where the benchmark suite takes several",
    "--adapter": "of robust, several that are named",
    "--directions": "of gradcheck, a number within bounds",
}


def test_a_name_means_the_same_in_every_command():
    takes = defaultdict(set)
    for _, action in actions():
        kind = getattr(action.type, "expected", getattr(action.type, "__name__", None))
        for option in action.option_strings:
            takes[option].add((action.nargs == 0, str(kind)))
    assert {option for option, kinds in takes.items() if len(kinds) > 1} == set(DIFFER)


def test_names_are_words_with_hyphens_and_none_is_short():
    for command, action in actions():
        for option in action.option_strings:
            assert re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*", option) or option in ("-h", "-o"), (command, option)


def test_every_option_says_what_it_is_in_one_way():
    for command, action in actions():
        if isinstance(action, argparse._HelpAction):
            continue
        where = f"{command} {'/'.join(action.option_strings) or action.dest}"
        assert action.help, where
        assert not action.help.endswith("."), f"{where}: {action.help}"
        assert not re.search(r"(?<!%)\(default(?!: )|[Dd]efaults? (is|to)\b", action.help), f"{where}: {action.help}"
        assert "GPUs alone" not in action.help


@pytest.mark.parametrize("command", RUNS)
def test_flags_say_no_to_what_is_done_by_default(command):
    """A flag that turns something off is called --no-..., and there is none that turns off a flag."""
    for action in PARSERS[command]._actions:
        if action.nargs == 0 and action.option_strings[0].startswith("--no-"):
            assert action.default is False


@pytest.fixture
def data(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=np.arange(20) % 2)
    return tmp_path / "data.npz"


SMALL = ("--size", "8", "--resize", "8", "--betas", "0.9", "--no-progress", "--no-plot")


def test_old_spellings_work_and_tell_the_new_one(data, tmp_path, recwarn):
    torch.save(make_net().state_dict(), tmp_path / "net.pt")
    run = ["steer", str(data), "--model", MODEL, *SMALL, "--out", str(tmp_path / "out")]
    assert cli.main([*run, "--weights", str(tmp_path / "net.pt")]) == 0
    told = [str(warning.message) for warning in recwarn if "--weights" in str(warning.message)]
    assert told == [f"--weights is a part of --model now: --model {MODEL}={tmp_path / 'net.pt'}"]
    recwarn.clear()
    parsed = PARSERS["compare"].parse_args(["digits", "--model", MODEL, "--cpu"])
    assert parsed.device == "cpu"
    assert [str(warning.message) for warning in recwarn] == ["--cpu is --device cpu now"]
    recwarn.clear()
    parsed = PARSERS["steer"].parse_args(["digits", "--weights=none", f"--model={MODEL}"])
    assert (parsed.model.name, parsed.model.weights) == (MODEL, "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["steer", "digits", "--model", MODEL, "--modle", "x"],
            "unrecognized arguments: --modle x; did you mean --model?",
        ),
        (["env", "--jsn"], "unrecognized arguments: --jsn; did you mean --json?"),
        (["env", "--xyzzy"], "unrecognized arguments: --xyzzy\n"),
        (["tune", "digits", "--model", MODEL, "--bn", "tran"], "got 'tran'; did you mean train?"),
        (["steer", "digits", "--model", "resnet81"], "resnet18"),
        (["steer", "digits", "--model", f"{MODEL}=best.pt"], "weights must be default, none, packaged or a file"),
    ],
)
def test_errors_suggest(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_nothing_but_the_command_speaks_at_its_start(command):
    done = subprocess.run(
        [sys.executable, "-m", "ctkernels", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"usage: python -m ctkernels {command} ")
