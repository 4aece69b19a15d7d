"""The toolchains that make GPU kernels, as a fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    pass


@pytest.fixture(params=["triton", "cuda"])
def toolchain(request):
    """Each of them, skipped where it is not here."""
    pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")
    from recorder import Toolchain

    found = Toolchain(request.param)
    if found.missing:
        pytest.skip(found.missing)
    return found
