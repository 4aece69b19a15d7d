"""Families of transformers: their activations are found, and units at the neutral point compute what the model does."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from jola_families import FAMILIES, build, inputs, output

from ctkernels import steer
from ctkernels.steering.activations import ACTIVATIONS

# Gates written out in their models' own code, in no form that is one of the family.
REFUSED = {"esm", "gpt_oss"}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", FAMILIES)
def test_units_at_the_neutral_point_compute_what_the_family_does(name):
    model, x = build(name), inputs(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=r"expected \w+ to have an activation among"):
            steer(model, {}, {}, activations="all")
        return
    expected = output(model, x)
    handle = steer(model, {}, {}, activations="all")
    assert torch.equal(output(model, x), expected)
    found = {site.activation for site in handle.sites}
    handle.beta, handle.coeff = (
        {f"*:{activation}": getattr(ACTIVATIONS[activation], knob) for activation in found}
        for knob in ("beta", "coeff")
    )
    bound = 32 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    assert (output(model, x) - expected).abs().max() <= bound
    assert handle.missed == ()
