"""Shared fixtures. Uninitialised memory is filled with NaN, so that unwritten values are detected."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers fill the cores already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import ctkernels
from ctkernels.ops import backends

# `make test` and CI name the required native kernels, so that these are not skipped by accident.
REQUIRED = [name for name in os.environ.get("CTKERNELS_TEST_REQUIRE", "").split(",") if name]


def pytest_sessionstart(session: pytest.Session) -> None:
    missing = {name: backends.BACKENDS[name].missing for name in REQUIRED if backends.BACKENDS[name].missing}
    if missing:
        raise pytest.UsageError(f"CTKERNELS_TEST_REQUIRE names backends that are not here: {missing}")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def memory_given_back() -> Iterator[None]:
    """A process that runs thousands of tests does not keep what each module compiled and freed."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    with suppress(OSError, AttributeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)


CPU_BACKENDS = [
    pytest.param(
        name,
        marks=[]
        if backends.BACKENDS[name].missing is None
        else pytest.mark.skip(reason=backends.BACKENDS[name].missing),
    )
    for name in ("cpu", "reference")
]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each available CPU backend, forced."""
    with ctkernels.use_backend(request.param):
        yield request.param
