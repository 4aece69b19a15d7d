"""Architectures of timm, drawn anew every day: steered, fused and adapted. ``make zoo`` runs all of them."""

from __future__ import annotations

import datetime
import random

import pytest

pytest.importorskip("timm", reason="needs timm")
pytest.importorskip("peft", reason="needs the adapters extra")
from zoo.choose import families
from zoo.guard import run

SEED = datetime.date.today().toordinal()
GROUPS = random.Random(SEED).sample([(module, names) for (module, _), names in families().items()], 5)


def test_two_hundred_architectures_to_draw_from():
    assert len(families()) >= 200


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=[f"{module}-{names[0]}" for module, names in GROUPS])
def test_architecture(group, record_property):
    record_property("seed", SEED)
    (found,) = run([group], seconds=300)
    assert not found.failures, f"seed {SEED}: {found.name}: " + "; ".join(found.failures)
