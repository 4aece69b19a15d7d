"""A linear layer with the edit of its input in its weights: against float64 and against the edit in a pass of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from linear_edit_cases import NAMES, PARTS, check, observed, tensors, upstream
from torch.library import opcheck

import ctkernels
from ctkernels.ops.head_edit_linear import cost_model
from ctkernels.ops.head_edit_linear.cost_model import FOLDED, SEPARATE
from ctkernels.ops.head_edit_linear.function import head_edit_linear


def _check(case, dtype):
    check(case, dtype, observed(head_edit_linear, *case))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_equals_the_edit_in_a_pass_of_its_own(parts, dtype, backend):
    _check(tensors(dtype, parts), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_that_nothing_can_be_divided_by(dtype):
    """p of 0, -0.0001, 0.3 and 200, one a head: the gradients of m do not go through them."""
    _check(tensors(dtype, m=[-1.0, -1.0001, -0.7]), dtype)
    _check(tensors(dtype, m=[199.0, -1.0, -1.0]), dtype)


@pytest.mark.parametrize(("rows", "bias"), [((), True), ((5,), False), ((2, 0), True), ((2, 3, 4), True)])
def test_shapes(rows, bias):
    _check(tensors(torch.float32, rows=rows, bias=bias), torch.float32)


def test_gradients_in_any_selection():
    z, weight, bias, edits = tensors()
    every = observed(head_edit_linear, z, weight, bias, edits)
    for wanted in ({"z"}, {"m"}, {"g_a"}, {"z", "a"}, {"g_m", "g_a"}, {"z", "m", "g_m"}):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in zip(("z", *NAMES), (z, *edits))}
        y = head_edit_linear(
            leaves.pop("z") if "z" not in wanted else leaves["z"], weight, bias, tuple(leaves[n] for n in NAMES)
        )
        found = torch.autograd.grad(y, [leaves[n] for n in sorted(wanted)], upstream(y))
        for name, value in zip(sorted(wanted), found):
            torch.testing.assert_close(value, every[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("parts", [NAMES, ("m",), ("a", "g_a")], ids="+".join)
def test_gradcheck(parts):
    z, weight, bias, edits = tensors(parts=parts, rows=(2, 2))
    inputs = [t.requires_grad_() for t in (z, *edits) if t is not None]

    def call(z, *given):
        values = iter(given)
        return head_edit_linear(z, weight, bias, tuple(None if t is None else next(values) for t in edits))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_the_dispatcher_op():
    z, weight, bias, edits = tensors(torch.float32)
    op, given = torch.ops.ctkernels.head_edit_linear.default, [t.requires_grad_() for t in (z, *edits)]
    assert set(opcheck(op, (given[0], weight, bias, *given[1:])).values()) == {"SUCCESS"}
    arguments = (
        upstream(op(z, weight, bias, *edits).detach()),
        z.detach(),
        weight,
        *(t.detach() for t in edits),
        0b11111,
    )
    assert set(opcheck(torch.ops.ctkernels.head_edit_linear_backward.default, arguments).values()) == {"SUCCESS"}


def test_compiled():
    case = tensors(torch.float32)
    torch._dynamo.reset()
    check(case, torch.float32, observed(torch.compile(head_edit_linear, fullgraph=True), *case))


def test_same_bits_on_every_run():
    case = tensors(torch.bfloat16, rows=(8, 40))
    first, again = (observed(head_edit_linear, *case) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_is_kept_for_the_backward_pass():
    z, weight, bias, edits = tensors(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        head_edit_linear(z.requires_grad_(), weight, bias, tuple(t.requires_grad_() for t in edits))
    assert set(kept) == {t.data_ptr() for t in (z, weight, *edits)}


# ---- the choice --------------------------------------------------------------------------------------------------------


def _choice(tokens, width=64, outputs=64, scales=True, learned=True, through=True, dtype=torch.float32):
    z = torch.empty(tokens, width, dtype=dtype, requires_grad=through)
    weight = torch.empty(outputs, width, dtype=dtype)
    return cost_model.choose(z, weight, None, scales, learned)


@pytest.fixture
def free_launches(monkeypatch):
    monkeypatch.setattr(cost_model, "LAUNCH", {"cpu": 0})


@pytest.mark.usefixtures("free_launches")
def test_from_how_many_tokens_on_it_pays():
    """Beside launches: a forward pass from as many tokens on as there are outputs, forward and backward from 4/3 of these on."""
    with torch.no_grad():
        assert (_choice(64), _choice(65)) == (SEPARATE, FOLDED)
        assert (_choice(128, outputs=256), _choice(257, outputs=256)) == (SEPARATE, FOLDED)
        assert (_choice(32, scales=False), _choice(33, scales=False)) == (SEPARATE, FOLDED)
    assert (_choice(85), _choice(86)) == (SEPARATE, FOLDED)
    assert (_choice(64, through=False), _choice(65, through=False)) == (SEPARATE, FOLDED)


def test_launches_are_counted(monkeypatch):
    monkeypatch.setattr(cost_model, "LAUNCH", {"cpu": 64 * 64 * 4})
    with torch.no_grad():
        assert _choice(65) == FOLDED  # as many launches
    assert (_choice(86 + 42), _choice(86 + 43)) == (SEPARATE, FOLDED)  # two more


def test_predictions_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs/jola.md").read_text()
    rows = re.findall(
        r"^\| (?:([\d,]+) tokens, ([\d,]+) wide|the same), (\S+).* \| (\d+) \| (\d+) \|$", text, re.MULTILINE
    )
    assert len(rows) == 4
    sizes = (0, 0)
    for tokens, width, kind, apart, in_weights in rows:
        sizes = (int(tokens.replace(",", "")), int(width.replace(",", ""))) if tokens else sizes
        z, training = 2 * sizes[0] * sizes[1], kind == "training"
        costs = (
            cost_model.separate(z, True, training, training),
            cost_model.folded(z, 2 * sizes[1] ** 2, True, training, training),
        )
        microseconds = [cost.total("cuda") / cost_model.LAUNCH["cuda"] * 4 for cost in costs]  # a launch takes 4
        assert [round(t) for t in microseconds] == [int(apart), int(in_weights)]


@pytest.mark.usefixtures("free_launches")
def test_refusals():
    z, weight = torch.empty(100, 8), torch.empty(8, 8)
    call = (z, weight, None, True, True)
    assert cost_model.choose(*call) == FOLDED
    with ctkernels.use_backend("reference"):
        assert "the backend 'reference' is forced" in cost_model.explain(*call)
    with torch.autocast("cpu", torch.bfloat16):
        assert "computed in bfloat16" in cost_model.explain(*call)
        assert cost_model.choose(z.bfloat16(), weight.bfloat16(), None, True, True) == FOLDED
    assert "the weights bfloat16" in cost_model.explain(z, weight.bfloat16(), None, True, True)
    assert "weights need a gradient" in cost_model.explain(z, weight.requires_grad_(), None, True, True)
    with torch.no_grad():
        assert cost_model.choose(*call) == FOLDED
    seen = []
    torch.func.vmap(lambda z: (seen.append(cost_model.refusal(z, weight.detach(), None)), z)[1])(z)
    assert "torch.func" in seen[0]
    assert "on meta the other way does not pay" in cost_model.explain(
        z.to("meta"), weight.detach().to("meta"), None, True, True
    )
