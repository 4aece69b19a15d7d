"""A few hundred calls of the fuzzer: the same ones every time, and others every day. ``make fuzz`` runs many more."""

from __future__ import annotations

import datetime
import math

import pytest
import torch

np = pytest.importorskip("numpy", reason="needs the test extra")
if np.finfo(np.longdouble).nmant < 63:
    pytest.skip("long double is no wider than double here", allow_module_level=True)
from fuzz.cases import BROKEN, OPS, Case, draw  # noqa: E402
from fuzz.check import check  # noqa: E402
from fuzz.report import Failure, hunt, script  # noqa: E402
from fuzz.tensors import Spec, build  # noqa: E402

import ctkernels  # noqa: E402
from ctkernels.ops import backends  # noqa: E402

TODAY = str(datetime.date.today().toordinal())
COUNTS = {
    "ctu": 150,
    "ctu_and_mul": 100,
    "head_edit": 80,
    "hard_concrete": 40,
    "expected_l0": 15,
    "attention_head_edit": 40,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", ["fixed", TODAY])
@pytest.mark.parametrize("op", OPS)
def test_random_calls(op, seed):
    found: list[Failure] = [f for f in hunt(seed, range(COUNTS[op]), op) if f is not None]
    assert not found, "\n".join(map(str, found))


def _values(dtype, *values, grad=False):
    return Spec((len(values),), dtype, (1,), special=tuple((i, str(v)) for i, v in enumerate(values)), grad=grad)


@pytest.mark.parametrize(
    "case",
    [
        Case(
            "ctu",
            {"x": _values("float64", 0.0), "beta": _values("float32", 0.88, grad=True), "coeff": 21.65},
            {"raw": True},
        ),
        Case(
            "ctu",
            {
                "x": _values("float16", -1.41, math.inf, -math.inf),
                "beta": 0.5,
                "coeff": _values("float32", 0.06, grad=True),
                "residual": _values("float16", -0.5, -0.8, -0.2),
            },
        ),
        Case(
            "ctu",
            {"x": _values("float32", -1.8692677021026611, grad=True), "beta": _values("float32", 1.5442906618118286)},
            {"raw": True, "activation": "gelu"},
            backend="reference",
        ),
        Case(
            "ctu",
            {
                "x": _values("float32", 1.25, -0.5),
                "beta": 0.5,
                "negative_slope": _values("float32", 1.0, grad=True),
            },
            {"activation": "prelu"},
        ),
        Case(
            "ctu",
            {"x": _values("bfloat16", -math.inf), "beta": 0.5, "negative_slope": _values("float64", 5e-309)},
            {"activation": "prelu"},
            backend="reference",
        ),
        Case(
            "ctu",
            {"x": _values("float32", math.inf), "beta": 0.5, "scale": _values("float64", 5e-309)},
            {"activation": "relu"},
            backend="reference",
        ),
    ],
    ids=[
        "1 - coeff of a logit",
        "an infinite sum of a prologue",
        "exponent that the reference rounds",
        "slope of 1",
        "slope that is no float",
        "scale that is no float",
    ],
)
def test_cases_that_failed_once(case):
    check(case)


def test_cases_are_the_same_everywhere():
    assert [draw("a", i) for i in range(50)] == [draw("a", i) for i in range(50)]
    assert draw("a", 1) != draw("b", 1)


def test_every_kind_of_case_is_drawn():
    """What the fuzzer is there for does come up."""
    cases = [draw("kinds", i) for i in range(1500)]
    specs = [spec for case in cases for spec in case.specs.values()]
    assert {case.op for case in cases} == set(OPS)
    assert {case.backend for case in cases} == {None, "reference"}
    assert {case.mode for case in cases} == {"grad", "no_grad", "inference"}
    for flag in ("negative", "inference", "subclass", "grad", "overlaps_itself", "alias", "special", "offset"):
        assert any(getattr(spec, flag) for spec in specs), flag
    for size in (0, 1):
        assert any(size in spec.shape for spec in specs)
    assert any(case.refused.startswith(BROKEN) for case in cases)
    assert any(case.refused == "x overlaps itself" for case in cases)
    assert any(case.target for case in cases)


@pytest.mark.skipif(backends.NATIVE is None, reason="no native kernels here")
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_kernel_is_found_and_made_small(monkeypatch):
    """A result that is off by a thousandth in one place, of large tensors alone."""
    right = ctkernels.functional.ctu

    def wrong(x, *args, **kwargs):  # type: ignore[no-untyped-def]
        y = right(x, *args, **kwargs)
        return y * 1.001 if x.numel() > 3 and not kwargs.get("inplace") else y

    monkeypatch.setattr(ctkernels.functional, "ctu", wrong)
    cases = ((number, draw("wrong", number, "ctu")) for number in range(300))
    plain = (
        n for n, c in cases if not (c.refused or c.target or any(s.special or s.inference for s in c.specs.values()))
    )
    failure = next(f for f in hunt("wrong", plain, "ctu") if f is not None)
    assert "y: " in failure.error
    assert "values off" in failure.error
    assert 3 < failure.case.specs["x"].count <= 8
    assert set(failure.case.arguments) <= {"x", "beta", "coeff"}
    namespace: dict[str, object] = {}
    exec(script(failure.case), namespace)
    assert namespace["y"].shape == failure.case.specs["x"].shape  # type: ignore[attr-defined]


def test_scripts_make_the_tensors_of_their_case():
    for number in range(60):
        case = draw("script", number)
        if case.refused.startswith(BROKEN):
            continue
        making = script(case).split("y = ctkernels")[0].splitlines()
        while (
            making[-1].startswith(("with", "torch.set", " "))
            and "_buffer" not in making[-1]
            and "copy_" not in making[-1]
        ):
            making.pop()
        namespace: dict[str, object] = {}
        exec("\n".join(making), namespace)
        for name, tensor in build(case.arguments).tensors.items():
            made = namespace[name]
            assert isinstance(made, torch.Tensor)
            assert (made.stride(), made.is_neg(), made.requires_grad) == (
                tensor.stride(),
                tensor.is_neg(),
                tensor.requires_grad,
            )
            if not case.specs[name].alias:
                assert torch.equal(*(t.detach().as_subclass(torch.Tensor).nan_to_num() for t in (made, tensor)))
