"""The scripts for completion: shells read them, and complete with them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ctkernels import cli
from ctkernels.cli import completion

pytest.importorskip("shtab", reason="completion needs ctkernels[completion]")
for needed in ("numpy", "sklearn", "tqdm", "torchvision"):
    pytest.importorskip(needed, reason="the commands of the laboratory need ctkernels[lab]")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The script of every shell, as a file."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (folder / shell).write_text(completion.script(shell))
    return folder


def test_the_command_prints_the_script(scripts, capsys):
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == (scripts / "bash").read_text() + "\n"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_shells_read_their_script(shell, scripts):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    done = subprocess.run([shell, "-n", scripts / shell], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# what is typed -> some of what is offered, and what is not
TYPED = {
    ("",): ({"steer", "env", "completion"}, {"--model"}),
    ("st",): ({"steer", "stream"}, {"env"}),
    ("steer", "--mo"): ({"--model"}, {"--out"}),
    ("tune", "--bn", ""): ({"eval", "train", "paper"}, {"--bn"}),
    ("gradcheck", "--dtype", "float"): ({"float16", "float32", "float64"}, {"bfloat16"}),
    ("jola", "photos/", "--schedule", ""): ({"constant"}, set()),
    ("report", "--out", "fol"): ({"folder"}, {"file.txt"}),
    ("report", "fi"): ({"file.txt"}, {"steer"}),
}


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_bash_completes(words, scripts, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    typed = " ".join(f"'{word}'" for word in ("ctkernels", *words))
    # as bash does it where Tab is hit at the end of the last word
    code = f"""
source "$1"
COMP_WORDS=({typed}); COMP_CWORD={len(words)}
function=$(complete -p ctkernels | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function ctkernels "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", code, "bash", scripts / "bash"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    offered = {word.strip().rstrip("/") for word in done.stdout.splitlines()}
    wanted, others = TYPED[words]
    assert wanted <= offered, done.stderr
    assert not others & offered


def test_every_shell_knows_every_command_and_every_long_option(scripts):
    import importlib

    for shell in completion.SHELLS:
        content = (scripts / shell).read_text()
        for name, (module, _) in cli.COMMANDS.items():
            assert name in content
            for option in importlib.import_module(module).parser()._option_string_actions:
                if option.startswith("--"):
                    assert option.removeprefix("--" if shell == "fish" else "") in content, (shell, name, option)


def test_without_the_package_the_error_names_the_extra(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert 'pip install "ctkernels[completion]"' in capsys.readouterr().err
