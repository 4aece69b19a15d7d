"""Writing through a temporary name: never half a file, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ctkernels import _files


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    _files.write_text(target, "old")

    def fail():
        with _files.replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    _files.write_text(target, "new")
    assert target.read_text() == "new"


WRITER = """
import os, signal, sys
from ctkernels import _files

with _files.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    temporary.write_text("whole")
"""


def writer(target, end):
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), end], env=here, stdin=-1, stdout=-1, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="file locks are POSIX's")
def test_leftovers_of_killed_writers_are_deleted_and_those_at_work_are_not(tmp_path):
    target = tmp_path / "result.json"
    kept = [".result-final123.json", ".result-abcdefgh.tmp.txt", ".other-abcdefgh.tmp.json", "result-abcdefgh.tmp.json"]
    for name in kept:
        (tmp_path / name).write_text("somebody's own")
    dead, alive = writer(target, "die"), writer(target, "live")
    dead.communicate("\n")
    assert dead.returncode == -signal.SIGKILL
    assert len(set(names(tmp_path)) - set(kept)) == 2
    _files.write_text(target, "new")
    assert target.read_text() == "new"
    left = set(names(tmp_path)) - {*kept, "result.json"}
    assert [(tmp_path / name).read_text() for name in left] == ["half"]
    alive.communicate("\n")
    assert alive.returncode == 0
    assert target.read_text() == "whole"
    assert names(tmp_path) == sorted([*kept, "result.json"])


def test_a_file_taken_for_a_leftover_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    lock, taken = _files._lock, []

    def late(descriptor, wait=True):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return lock(descriptor, wait)

    monkeypatch.setattr(_files, "_lock", late)
    _files.write_text(tmp_path / "a.json", "text")
    assert (tmp_path / "a.json").read_text() == "text"
    assert len(taken) == 1
    assert names(tmp_path) == ["a.json"]
