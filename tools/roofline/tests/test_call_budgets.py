"""Whole calls: the launches that the host code makes, their predicted time, and what it is due to, against budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from roofline import cuda, latency
from roofline.calls import Code, Launch

FIT = json.loads(latency.FITTED.read_text())
Launches = list[tuple[Launch, Code]]


def test_the_model_is_as_far_off_as_its_file_says():
    found = latency.summary(latency.errors(latency.figures(), latency.fitted()))
    assert found == pytest.approx(FIT["error"], abs=2e-3)
    assert found["mean"] < 0.05
    assert found["worst"] < 0.2


def test_the_model_predicts_a_dtype_that_it_has_not_seen():
    """With a short search here; the file has the long one's."""
    figures = latency.figures()
    constants = latency.fit([f for f in figures if f.call.dtype == "fp32"], tries=1500)
    off = latency.summary(latency.errors([f for f in figures if f.call.dtype == "bf16"], constants))
    assert off["mean"] < 0.15
    assert FIT["left out: a dtype"]["mean"] < 0.07
    assert off["mean"] < FIT["bytes at the data sheet's bandwidth alone"]["mean"] / 3


@pytest.mark.slow
@pytest.mark.parametrize("backend", latency.BUDGETS)
def test_every_call_keeps_its_budget(backend):
    pytest.importorskip("triton", reason="triton is not installed (its disassembler is used)")
    pytest.importorskip("numpy", minversion="2.0", reason="the launches are those of the recorder, which needs numpy 2")
    from recorder import Toolchain

    if missing := Toolchain(backend).missing:
        pytest.skip(missing)
    found, allowed = latency.everything(90, backend), json.loads(latency.BUDGETS[backend].read_text())
    assert found.keys() == allowed.keys()
    assert not {name: lines for name, d in found.items() if (lines := latency.broken(d, allowed[name]))}


def _edited(launches, edit):
    """With another last pass over the tensor."""
    at = max(i for i, (launch, _) in enumerate(launches) if launch.role in ("forward", "backward"))
    return [edit(*pair) if i == at else pair for i, pair in enumerate(launches)]


PLANTED: dict[str, tuple[Callable[[Launches], Launches], set[str]]] = {
    "a launch more": (
        lambda found: [*found, found[0]],
        {"launches"},
    ),  # whose microsecond is less than the room there is
    "more registers, and fewer blocks": (
        lambda found: _edited(found, lambda launch, code: (launch, replace(code, registers=255))),
        {"us", "registers", "kilobytes_in_flight", "waves"},
    ),
    "narrower loads": (
        lambda found: _edited(
            found,
            lambda m, code: (replace(m, steps=4 * m.steps, asked=m.asked // 4, moved=m.moved // 4), code),
        ),
        {"us", "kilobytes_in_flight"},
    ),
    "twice the arithmetic": (
        lambda found: _edited(found, lambda m, c: (m, replace(c, instructions=2 * c.instructions, mufu=2 * c.mufu))),
        {"us", "instructions", "mufu"},
    ),
    "loads after the arithmetic": (
        lambda found: _edited(found, lambda launch, code: (replace(launch, ahead=False), code)),
        {"us"},
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_regression_is_noticed(name):
    """On the kernels that were measured: their machine code is in a file."""
    figure = next(
        f
        for f in latency.figures()
        if f.call.case == "ViT-B MLP (NLC)" and f.call.dtype == "bf16" and "back" in f.which
    )
    allowed = latency.described(figure.call, figure.which, figure.launches, 90)
    assert not latency.broken(allowed, allowed)
    plant, expected = PLANTED[name]
    lines = latency.broken(latency.described(figure.call, figure.which, plant(list(figure.launches)), 90), allowed)
    assert {line.partition(":")[0] for line in lines} == expected


def test_what_a_launch_does_to_a_small_call():
    """One token is launches and little else: half of them would nearly halve it."""
    one = next(f for f in latency.figures() if "token" in f.call.case and f.which == "forward_backward")
    machine = latency.Machine.of(90, latency.fitted())
    times = [latency.call_us(found, machine, one.call.op) for found in (one.launches, one.launches[::2])]
    assert 0.25 < times[1] / times[0] < 0.75


def test_other_gpus_are_scaled_by_their_data_sheets():
    h100, b200 = (latency.Machine.of(sm, latency.fitted()) for sm in (90, 100))
    assert b200.constants.bandwidth / h100.constants.bandwidth == pytest.approx(8000 / 3350)
    assert b200.constants.latency == h100.constants.latency


def test_nvcc_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    with pytest.raises(FileNotFoundError, match="nvcc"):
        cuda.listings(("ctk_reduce_shared",), 123)
