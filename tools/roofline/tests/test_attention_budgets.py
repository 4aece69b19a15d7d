"""Machine code for the fused attention: its machine code against its budget, and the price of the edit in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from roofline import attention

BUDGETS = json.loads((Path(attention.__file__).parent / "budgets_attention.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("sm", attention.FLOPS)
def test_every_kernel_keeps_its_budget_and_the_edit_is_free(sm):
    found = attention.costs([sm])
    assert {f"{c.variant}, {c.kernel} sm_{sm}" for c in found} == {n for n in BUDGETS if n.endswith(f"sm_{sm}")}
    for c in found:
        name = f"{c.variant}, {c.kernel} sm_{sm}"
        allowed, used = BUDGETS[name], attention.budget(c)
        assert c.spills <= allowed.get("spills", 0), name
        assert c.stack == 0 or c.spills > 0, name
        assert c.shared <= attention.SHARED_LIMIT, name
        assert (c.tensor > 0) == (c.kernel in attention.PRODUCTS), name
        assert used["registers"] <= allowed["registers"] + 8, name
        assert used["shared"] <= allowed["shared"], name
        assert used["share"] >= allowed["share"] - 0.03, name
        assert used["serial"] >= allowed["serial"] - 0.03, name
    ratios = attention.ratios(found, sm)
    # predicted time with the edit over that without, nothing overlapped
    assert ratios["forward"] <= 1.01
    assert ratios["backward"] <= 1.02


def test_the_edit_reads_nothing_more_and_writes_at_most_one_tensor_more():
    for backward in (False, True):  # z, dz
        edited, plain = attention.traffic(True, backward), attention.traffic(False, backward)
        assert edited["reads"] == plain["reads"]
        assert edited["writes"] == plain["writes"] + 1
