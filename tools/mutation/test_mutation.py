"""Mutants of the compiled kernels are detected: a few here, all of them with `python -m mutation --json FILE`."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from ptx.toolchain import nvcc

from ctkernels.ops import backends
from mutation import equivalence, harness, mutants
from mutation.summary import STRUCTURAL, counts

CUDA = pytest.mark.skipif(
    nvcc() is None or not backends.CUDA_BINDING.exists(), reason="nvcc, or the host code, is not there"
)
NAMES = [
    "triton: prologue",
    "triton: gates from noise",
    pytest.param("cuda: gates from noise", marks=CUDA),
    pytest.param("cuda: tokens between heads", marks=CUDA),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_planted_bugs_are_noticed(name):
    """One structural mutant of each kind in every kernel of the case."""
    survivors: list[str] = []
    cases = [case for case in harness.CASES if case.name == name]
    records = harness.run(1, cases, STRUCTURAL, survivors.append)
    found = counts(records)
    assert found["planted"] >= 8
    assert all(r["caught_by"] or r["survives"] for r in records)
    assert found["share"] >= 0.95, "\n".join(survivors)
    assert found["caught"] >= 0.7 * found["planted"], "\n".join(survivors)  # the equivalent ones are the exception


def _calls():
    for case in harness.CASES:
        for variant in case.more:
            marks = [pytest.mark.slow, *([CUDA] if case.toolchain == "cuda" else [])]
            yield pytest.param(case, variant, marks=marks, id=f"{case.name}, {variant}")


@pytest.mark.parametrize(("case", "variant"), list(_calls()))
def test_sizes_that_were_missing_to_notice_a_bug(case, variant):
    case.expected(variant).check(case.run(variant))


LINES = {
    "dropped barrier": ("\tbar.sync \t0;", ""),
    "missing mask": ("\t@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];", "ld.global.b32 { %r1 }, [ %rd1 + 0 ];"),
    "wrong partner in a sum": (
        "\tshfl.sync.bfly.b32 \t%r2, %r1, 16, 31, -1;",
        "\tshfl.sync.bfly.b32 \t%r2, %r1, 8, 31, -1;",
    ),
    "constant a quarter off": ("\tmul.f32 %r1, %r2, 0f40000000;", "\tmul.f32 %r1, %r2, 0f3FC00000;"),
    "other operator": ("\tadd.f32 %r1, %r2, %r3;", "\tsub.f32 %r1, %r2, %r3;"),
    "another tensor": ("\tld.param.b64 %rd1, [k_param_2];", "\tld.param.b64 %rd1, [k_param_1];"),
    "loop of one turn": ("\t@%p3 bra \t$L__BB0_2;", ""),
    "index constant off by one": ("\tshl.b32 \t%r1, %r2, 4;", "\tshl.b32 \t%r1, %r2, 5;"),
}


def test_operators_change_what_they_say():
    for name, (before, after) in LINES.items():
        assert mutants.OPERATORS[name](before) == after
        assert mutants.OPERATORS[name]("\tret;") is None
    # nvcc has the tensors of a call in one structure
    pointer = mutants.OPERATORS["another tensor"]
    assert pointer("\tld.param.u64 \t%rd1, [k_param_0+136];") == "\tld.param.u64 \t%rd1, [k_param_0+128];"


def test_branches_forward_are_masks_and_backward_are_loops():
    text = "\t@%p1 bra $L1;\n$L0:\n\tadd.s32 %r1, %r1, 1;\n\t@%p2 bra $L0;\n$L1:\n\tret;\n"
    found = {(m.operator, m.line) for m in mutants.mutants("k", text) if "bra" in m.before}
    assert found == {("missing mask", 0), ("loop of one turn", 3)}


def test_a_reason_holds_only_where_its_stronger_change_shows_nothing_either():
    load = mutants.Mutant("k", "missing mask", 0, "@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", "")
    tried: list[list[str]] = []
    assert equivalence.reason(load, "", lambda lines: bool(tried.append(lines))) is None
    assert tried == [[load.before, "@!%p1 mov.b32 %r1, 0x7FC00000;", "@!%p1 mov.b32 %r2, 0x7FC00000;"]]
    assert equivalence.reason(load, "", lambda lines: True) == "what the mask leaves out is loaded, and not used"
    compare = mutants.Mutant("k", "other comparison", 0, "setp.gt.f32 \t%p8, %r90, %r10;", "")
    tried.clear()
    assert equivalence.reason(compare, "", lambda lines: bool(tried.append(lines))) is None
    assert tried == [["setp.eq.f32 %p8, %r90, %r10;", "@%p8 trap;", compare.before]]
    store = mutants.Mutant("k", "missing mask", 0, "@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };", "")
    assert equivalence.reason(store, "", lambda lines: True) is None
