"""Repeated Triton launches: later calls use the kernel that Triton found for the first, if it would find it for them too."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the recorder needs numpy 2")

from conformance import outputs
from recorder import through_kernels
from roofline.ahead_of_time import specialized
from torch import Tensor

from ctkernels.functional import ctu, head_edit
from ctkernels.ops import launcher
from ctkernels.ops.channelwise.launch import PLANS, implementation
from ctkernels.ops.ctu import OP
from ctkernels.testing import SAMPLES

NAMES = [(op, sample.name) for op in ("ctu", "head_edit", "ctu_and_mul") for sample in SAMPLES[op]()]


class Compiled:
    """A kernel that Triton has found for some arguments. Its launches must have arguments for which it would find it again."""

    def __init__(self, launches, kernel, args, meta):
        self.launches, self.kernel, self.meta = launches, kernel, meta
        self.specialization = self.specialize(args)

    def specialize(self, args):
        _, specialization, options = specialized(self.kernel, args, self.meta, 90)
        return str(specialization), options

    def __getitem__(self, grid):
        assert grid[1:] == (1, 1)

        def run(*values):
            named = dict(zip(self.kernel.arg_names, values, strict=True))
            assert {
                name: named.pop(name) for name in self.kernel.arg_names if name in self.meta
            }.items() <= self.meta.items()
            for name, value in named.items():  # pointers
                if name in self.launches.tensors:
                    named[name] = self.launches.tensors[name]
                    assert value == (0 if named[name] is None else named[name].data_ptr())
            assert self.specialize(named) == self.specialization
            self.launches.repeated.append((self.kernel.__name__, grid[0], named))

        return run


class Launches:
    """Replaces ``launcher.launch``. Nothing runs: tensors that kernels write stay uninitialised."""

    def __init__(self):
        self.first, self.repeated = [], []
        self.tensors = {}  # of the launch in progress, by the kernel's names

    def __call__(self, kernel, grid, args, meta):
        self.first.append((kernel.__name__, grid, args))
        return Compiled(self, kernel, args, meta)

    def take(self):
        """The launches since the last call: (through Triton, repeated)."""
        found = self.first, self.repeated
        self.first, self.repeated = [], []
        return found


@pytest.fixture
def launches(monkeypatch):
    found, repeat = Launches(), launcher.Repeated.__call__

    def call(self, tensors, numbers=()):
        found.tensors = dict(zip(self.tensors, tensors, strict=True))
        repeat(self, tensors, numbers)

    monkeypatch.setattr(launcher, "launch", found)
    monkeypatch.setattr(launcher.Repeated, "__call__", call)
    implementation.cache_clear()
    with through_kernels(implementation):
        yield found
    implementation.cache_clear()  # plans with these launches


def elsewhere(_, t):
    """Equal values with the same strides, in other memory."""
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())


def described(launches):
    """Launches, with tensors by their sizes, strides and dtypes."""

    def value(v):
        return (v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v

    return [(name, grid, {k: value(v) for k, v in args.items()}) for name, grid, args in launches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "name"), NAMES)
def test_a_repeated_call_launches_what_the_first_did(launches, op, name, dtype):
    sample = next(s for s in SAMPLES[op](dtype) if s.name == name)
    outputs(sample)
    first, repeated = launches.take()
    assert bool(first) == (sample.args[0].numel() > 0)
    assert not repeated
    outputs(sample.map(elsewhere))
    none, repeated = launches.take()
    assert not none
    assert described(repeated) == described(first)


CALLS = {
    "a number": lambda x: ctu(x, 0.9),
    "another": lambda x: ctu(x, 1.0, 0.0),
    "three": lambda x: ctu(x, 0.9, 1.0, activation="leaky_relu", negative_slope=1.0),
    "logits": lambda x: ctu(x, 3.0, raw=True),
    "per channel": lambda x: ctu(x, torch.rand(16), torch.rand(16), channel_dim=1),
    "in double": lambda x: ctu(x, torch.rand(16).double(), channel_dim=1),
    "every second": lambda x: ctu(x, torch.rand(32)[::2], channel_dim=1),
    "unaligned": lambda x: ctu(x, torch.rand(17)[1:], channel_dim=1),
    "a residual": lambda x: ctu(x, 0.9, residual=x),
    "another one": lambda x: ctu(
        x, 0.9, residual=torch.rand(x.shape[::-1]).to(x.dtype).t() if x.dim() == 2 else x.clone()
    ),
    "an edit": lambda x: head_edit(x, torch.rand(4, 4)) if x.dim() == 2 else ctu(x, 0.5),
    "in place": lambda x: ctu(x.clone(), 0.9, inplace=True),
}
TENSORS = {
    "dense": lambda: torch.randn(12, 16),
    "one row": lambda: torch.randn(1, 16),
    "sixteen bits": lambda: torch.randn(12, 16).bfloat16(),
    "unaligned": lambda: torch.randn(12 * 16 + 1)[1:].view(12, 16),
    "unaligned, sixteen bits": lambda: torch.randn(12 * 16 + 1).half()[1:].view(12, 16),
    "transposed": lambda: torch.randn(16, 12).t(),
    "every second": lambda: torch.randn(12, 32)[:, ::2],
    "channels last": lambda: torch.randn(2, 16, 3, 3).to(memory_format=torch.channels_last),
    "one channels last": lambda: torch.randn(1, 16, 3, 3).to(memory_format=torch.channels_last),
    "empty": lambda: torch.randn(0, 16),
}


def test_calls_in_any_order_launch_what_they_would_alone(launches):
    """Kernels that one call has found are not taken for another that differs in anything that a kernel is compiled for."""
    alone = {}
    for call, function in CALLS.items():
        for kind, make in TENSORS.items():
            implementation.cache_clear()
            function(make())
            alone[call, kind] = described(launches.take()[0])
    implementation.cache_clear()
    for _ in range(2):
        for (call, kind), expected in alone.items():
            CALLS[call](TENSORS[kind]())
            first, repeated = launches.take()
            assert described(first or repeated) == expected, (call, kind)
    first, repeated = launches.take()
    for (call, kind), expected in alone.items():
        CALLS[call](TENSORS[kind]())
        first, repeated = launches.take()
        assert not first, (call, kind)
        assert described(repeated) == expected, (call, kind)


def test_numbers_are_those_of_the_call(launches):
    x = torch.randn(64)
    for beta, coeff in ((0.9, 0.5), (1.0, 0.25), (0.0, 1.0)):
        ctu(x, beta, coeff)
    _, repeated = launches.take()
    assert [(args["v0"], args["v1"]) for _, _, args in repeated] == [(1.0, 0.25), (0.0, 1.0)]


def test_a_process_that_sees_many_shapes_keeps_a_bounded_number_of_plans(launches):
    x = torch.empty(PLANS + 10)
    plans = implementation(OP).forward.__self__.plans
    for n in range(1, PLANS + 10):
        ctu(x[:n], 0.9)
        assert len(plans) <= PLANS


def test_without_a_compiled_kernel_every_launch_is_tritons(launches, monkeypatch):
    """Triton's interpreter compiles nothing."""
    count = []
    monkeypatch.setattr(launcher, "launch", lambda *args: count.append(args))
    for _ in range(3):
        ctu(torch.randn(8), 0.9)
    assert len(count) == 3


def test_a_launch_that_triton_refuses_is_not_remembered(launches, monkeypatch):
    def refuse(*args):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "launch", refuse)
        for _ in range(2):
            with pytest.raises(ValueError, match="cpu tensor"):
                ctu(torch.randn(8), 0.9)
    ctu(torch.randn(8), 0.9)
    assert len(launches.take()[0]) == 1
