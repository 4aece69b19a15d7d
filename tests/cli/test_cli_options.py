"""Every option of every command with bad values: one line that names it, exit code 2, and no work done."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ctkernels import cli
from ctkernels.cli import errors as _errors
from ctkernels.cli import option_types as _types

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
for module in ("sklearn", "tqdm", "torchvision"):
    pytest.importorskip(module, reason="the commands need ctkernels[lab]")


def make_texts():
    from ctkernels.lab.jola import Example, TextData

    return TextData((Example("a", "b"),))


def make_net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


def make_misfit():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 2), nn.ReLU())


def make_nothing():
    return nn.Linear(2, int("seven"))


def make_end():
    sys.exit("I am a script")


MODEL = f"{__name__}:make_net"
TEXTS = f"{__name__}:make_texts"

# What each command cannot do without; the option that is tried takes the place of its own entry.
NEEDED: dict[str, dict[str, list[str]]] = {
    "env": {},
    "adapt": {"data": ["digits"]},
    "steer": {"data": ["digits"], "--model": ["--model", MODEL]},
    "compare": {"data": ["digits"], "--model": ["--model", MODEL]},
    "tune": {"data": ["digits"], "--model": ["--model", MODEL]},
    "jola": {"data": [TEXTS], "--model": ["--model", "some-model"]},
    "stream": {"tasks": [TEXTS], "--model": ["--model", "some-model"]},
    "watch": {"--model": ["--model", "some-model"], "--adapter": ["--adapter", "{folder}"]},
    "search": {"data": ["digits"], "--model": ["--model", MODEL]},
    "robust": {"data": ["digits"], "--model": ["--model", MODEL]},
    "curvature": {},
    "report": {"results": ["{folder}"]},
    "gradcheck": {},
    "bench": {},
    "completion": {"shell": ["bash"]},
}
BAD = [
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e309",
    "1e-400",
    "nowhere/at/all",
    "{folder}",
    "{file}",
    "{file}/below",
]
BAD += [
    "{locked}",
    ":",
    "a:",
    ":b",
    "..a:b",
    "a:b:c",
    "x\0y",
    "(",
    "1,,2",
    "1,1",
    "=",
    "a=b",
    "a.b=nan",
    "\u0661",
    "1_0",
]

ANY_NAME = {*BAD} - {"", " ", "x\0y", "-inf"}  # argparse takes -inf for an option
NEW_NAME = ANY_NAME - {"{file}", "{file}/below", "{locked}"}
HUB_NAME = {"nan", "inf", "0", "1e309", "1e-400", "1_0"}
GOOD: dict[str, set[str]] = {
    "--seed": {"0"},
    "--seeds": {"0"},
    "--input": {"1,1"},
    "--workers": {"0"},
    "--betas": {"0", "1e-400"},
    "--coeff": {"0", "1e-400"},
    "--margin": {"0", "1e-400"},
    "--warmup": {"0", "1e-400"},
    "--out": NEW_NAME,
    "-o": NEW_NAME,
    "--json": (ANY_NAME | {"{locked}"}) - {"{folder}", "{file}/below"},
    "--storage": ANY_NAME - {"{folder}", "{file}/below"},
    "--bertscore-model": {"{folder}"},
    "--extract": ANY_NAME - {"("},
    # free text, or names of which only the network or the study knows whether they are there
    "--feature-layer": ANY_NAME,
    "--study": ANY_NAME,
    "--title": {*BAD} - {"-inf"},
    "--separator": {*BAD} - {"-inf"},
    "--only": {*BAD} - {"-inf"},
    "data": {"{folder}"},  # what is in it is seen when it is read
    "results": {"{folder}", "{file}"},
    "watch --adapter": {"{folder}"},
    "--host": ANY_NAME,
    "--port": {"0"},
    "texts": {"{file}"},
    "adapt --model": HUB_NAME,
    "jola --model": HUB_NAME,  # the hub may have one of that name
    "stream --model": HUB_NAME,
    "watch --model": HUB_NAME,
    "jola data": set(),
}


class Reached(Exception):
    """The command's work was about to begin."""


def options(command):
    """The name of every option and argument that takes a value."""
    parser = importlib.import_module(cli.COMMANDS[command][0]).parser()
    return [
        (action.option_strings[0] if action.option_strings else action.dest, action)
        for action in parser._actions
        if action.nargs != 0
    ]


@pytest.fixture
def places(tmp_path):
    found = {name: str(tmp_path / name) for name in ("folder", "file", "locked")}
    Path(found["folder"]).mkdir()
    for name in ("file", "locked"):
        Path(found[name]).write_text("text")
    Path(found["locked"]).chmod(0)
    return found


@pytest.mark.parametrize("command", [c for c in cli.COMMANDS if options(c)])
def test_bad_values_are_refused_before_any_work(command, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_types, "PROBE", 1)
    module = importlib.import_module(cli.COMMANDS[command][0])

    def run(arguments):
        raise Reached

    monkeypatch.setattr(module, "run", run)
    wrong = []
    for name, action in options(command):
        good = GOOD.get(f"{command} {name}", GOOD.get(name, set()))
        for value in BAD:
            if value == "{locked}" and os.access(places["locked"], os.R_OK):
                continue  # nothing is locked for root
            text = value.format(**places) if value.startswith("{") else value
            needed = {k: v for k, v in NEEDED[command].items() if k != name}
            given = [part.format(**places) for parts in needed.values() for part in parts]
            own = [name, text] if action.option_strings else [text]
            try:
                code = cli.main([command, *own, *given] if not action.option_strings else [command, *given, *own])
            except Reached:
                code = 0
            said = capsys.readouterr().err
            if (code == 0) != (value in good):
                wrong.append(f"{name} {value!r}: {'taken' if code == 0 else said.strip()}")
            elif code and not (
                code == 2
                and said.startswith("ctkernels: error: ")
                and said.count("\n") == 1
                and (name in said or (value == "-inf" and "arguments" in said))
            ):
                wrong.append(f"{name} {value!r}: exit {code}, {said!r}")
    assert not wrong, "\n".join(wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "locked"]  # nothing was made


def test_every_option_has_a_type_of_its_own():
    """None takes a text as it is: free text is a type, too, or a list of what may be chosen."""
    free = {"--title", "--separator", "--only"}
    bare = [
        f"{command} {name}"
        for command in cli.COMMANDS
        for name, action in options(command)
        if action.type in (None, int, float, str, Path) and not action.choices and name not in free
    ]
    assert not bare


# --- the user's own code ----------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    labels = np.arange(60) % 2
    images = (np.random.default_rng(0).integers(0, 120, (60, 36, 36)) + 60 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    return tmp_path / "data.npz"


COMMANDS = {
    "steer": ["--no-plot", "--no-progress"],
    "search": ["--no-progress"],
    "robust": ["--no-progress", "--linf", "none", "--l2", "none"],
    "curvature": ["--images", "4"],
    "tune": ["--no-progress", "--device", "cpu"],
    "compare": ["--no-progress", "--device", "cpu"],
}


def said_of(command, model, data, capsys):
    """What a command says of a network that is not right, in one line."""
    if command in ("tune", "compare"):
        for needed in ("peft", "accelerate", "safetensors"):
            pytest.importorskip(needed, reason=f"{command} needs {needed}")
    if command == "robust":
        pytest.importorskip("imagecorruptions", reason="corruptions need imagecorruptions-imaug")
    out = data.parent / "out"
    sizes = ["--size", "32", "--resize", "32"]
    assert cli.main([command, str(data), "--model", model, *sizes, *COMMANDS[command], "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ctkernels: error: ")
    assert said.count("\n") == 1
    assert not (out / "result.json").exists()
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_factories_that_fail_are_named_with_their_error(command, data, capsys):
    said = said_of(command, f"{__name__}:make_nothing", data, capsys)
    assert f"model '{__name__}:make_nothing': the function raised ValueError: invalid literal for int()" in said
    said = said_of(command, f"{__name__}:make_end", data, capsys)
    assert f"model '{__name__}:make_end': the function raised SystemExit: I am a script" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_networks_that_do_not_take_the_images_are_named_with_their_error(command, data, capsys):
    said = said_of(command, f"{__name__}:make_misfit", data, capsys)
    assert "images of shape (1, 3, 32, 32) do not fit Sequential" in said.replace("(1, 1, 32", "(1, 3, 32")
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3072 and 7x2)" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise KeyError('colour')", "importing it raised KeyError: 'colour'"),
        ("import no_such_package", "importing it raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys; sys.exit(0)", "importing it raised SystemExit: 0"),
        ("def make(:", "importing it raised SyntaxError: "),
        ("make = 3", "has no function 'make'"),
        ("def make(size): return size", "the function raised TypeError: make() missing 1 required positional argument"),
        ("def make(): return None", "must return a torch.nn.Module, got NoneType"),
    ],
)
@pytest.mark.parametrize("command", ["steer", "gradcheck"])
def test_files_with_a_factory_that_fail_are_named(command, text, message, data, tmp_path, capsys):
    file = tmp_path / "networks_of_mine.py"
    file.write_text(f"{text}\n")
    options = [str(data), "--model"] if command == "steer" else ["--input", "2x3", "--module"]
    for _ in range(2):  # and a failed import leaves nothing that a second one would take for the module
        assert cli.main([command, *options, f"{file}:make"]) == 2
        said = capsys.readouterr().err
        assert f"model '{file}:make'" in said
        assert message in said
        assert said.count("\n") == 1
        assert "networks_of_mine" not in sys.modules or "make" in text
        sys.modules.pop("networks_of_mine", None)


def test_gradcheck_names_a_network_that_does_not_take_the_input(capsys):
    assert cli.main(["gradcheck", "--module", f"{__name__}:make_net", "--input", "2x4x9x9"]) == 2
    said = capsys.readouterr().err
    assert "--input: values of shape (2, 4, 9, 9) do not fit Sequential: RuntimeError: Given groups=1" in said
    assert said.count("\n") == 1


# --- faults, warnings, disks ------------------------------------------------------------------------------------------


def test_a_fault_of_the_library_keeps_its_traceback(data, tmp_path, monkeypatch):
    """A ValueError from within another library was not foreseen: it is no bad input of the user's."""

    def search(*_, **__):
        json.loads("{")

    monkeypatch.setattr("ctkernels.lab.search_beta", search)
    small = ["--size", "8", "--resize", "8", "--no-plot", "--no-progress", "--out", str(tmp_path / "out")]
    with pytest.raises(json.JSONDecodeError):
        cli.main(["steer", str(data), "--model", MODEL, *small])
    for error in (KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError("x")):
        assert not _errors.is_bad_input(error)
    for error in (OSError(errno.ENOSPC, "full"), MemoryError(), torch.OutOfMemoryError("x")):
        assert _errors.is_bad_input(error)


def test_warnings_of_the_library_are_one_line():
    from ctkernels.lab.images import data

    def shown():
        told.extend(
            warnings.formatwarning("so it is", UserWarning, file, 1) for file in (data.__file__, torch.__file__)
        )
        return 0

    told: list[str] = []
    before = warnings.formatwarning
    assert _errors.reported(shown) == 0
    assert warnings.formatwarning is before
    assert told == ["ctkernels: warning: so it is\n", before("so it is", UserWarning, torch.__file__, 1)]


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    for command, options in (("steer", ["digits", "--model", MODEL]), ("report", [str(tmp_path)])):
        assert cli.main([command, *options, "--out", str(tmp_path / "deep/er")]) == 2
        said = capsys.readouterr().err
        assert f"--out must be where files can be written, got '{tmp_path}/deep/er': {tmp_path}: No space left" in said
    assert list(tmp_path.iterdir()) == []


def test_the_range_of_a_grid_is_bounded(capsys):
    for text, message in (("0:1:1e-9", "which gives 1e+09"), ("0:1:1e-320", "which gives inf")):
        assert cli.main(["curvature", "--betas", text]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["steer", "digits", "--model", MODEL, "--size", "64", "--resize", "32"],
            "--resize must be at least --size, 64",
        ),
        (
            ["tune", "digits", "--model", MODEL, "--size", "64", "--resize", "32"],
            "--resize must be at least --size, 64",
        ),
        (["search", "digits", "--model", MODEL, "--storage", "x"], "--storage must go with --strategy bayesian"),
        (
            ["compare", "digits", "--model", MODEL, "--methods", "linear", "--grid", "tct.lr=1"],
            "--grid must be of methods",
        ),
        (
            ["jola", TEXTS, "--model", "m", "--grid", "lora.lr=1", "--grid", "lora.lr=2"],
            "--grid must name lora.lr once",
        ),
        (["curvature", "digits"], "data and --model belong together"),
        (["gradcheck", "--input", "2x3"], "--module and --input: expected both or neither"),
        (["bench", "--only", "x"], "--only: for --formats, and the ops"),
    ],
)
def test_options_that_do_not_go_together_are_told_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    def load(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.chdir(tmp_path)
    for name in ("load_data", "load_model"):
        monkeypatch.setattr(f"ctkernels.lab.{name}", load)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
