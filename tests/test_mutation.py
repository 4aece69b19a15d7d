"""Bugs planted in the compiled kernels are noticed. `python tests/mutation.py` plants all of them, this a few."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")
pytest.importorskip("mpmath", reason="needs the test extra")

import mutation


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prologue", "tokens between heads", "ctu, planes, a group each"])
def test_planted_bugs_are_noticed(name: str) -> None:
    survivors: list[str] = []
    cases = [case for case in mutation.CASES if case.name == name]
    records = mutation.run(10, cases, mutation.STRUCTURAL, survivors.append)
    found = mutation.summary(records)
    assert found["mutants"] >= 20
    # Not every survivor has been explained yet: two of these are about one in twenty.
    assert found["share"] >= 0.9, "\n".join(survivors)
    for operator in ("dropped barrier", "another tensor"):
        caught, planted = found["by_operator"][operator]
        assert caught == planted, operator


def test_operators_change_what_they_say() -> None:
    lines = {
        "dropped barrier": ("\tbar.sync \t0;", ""),
        "missing mask": ("\t@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];", "ld.global.b32 { %r1 }, [ %rd1 + 0 ];"),
        "wrong partner in a sum": ("\tshfl.sync.bfly.b32 \t%r2, %r1, 16, 31, -1;", "\tshfl.sync.bfly.b32 \t%r2, %r1, 8, 31, -1;"),
        "constant a quarter off": ("\tmul.f32 %r1, %r2, 0f40000000;", "\tmul.f32 %r1, %r2, 0f3FC00000;"),
        "other operator": ("\tadd.f32 %r1, %r2, %r3;", "\tsub.f32 %r1, %r2, %r3;"),
        "another tensor": ("\tld.param.b64 %rd1, [k_param_2];", "\tld.param.b64 %rd1, [k_param_1];"),
    }  # fmt: skip
    for name, (before, after) in lines.items():
        assert mutation.OPERATORS[name](before) == after
        assert mutation.OPERATORS[name]("\tret;") is None
