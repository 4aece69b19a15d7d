"""Writing over a tensor: autograd hears of it once a call, and what torch's own in-place operations refuse is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import ctkernels
from ctkernels.functional import ctu, head_edit
from ctkernels.ops import memory
from ctkernels.ops.record import Kernels, Op
from ctkernels.ops.registration import OPS

M = torch.full((2, 3), 0.5)
CALLS: dict[str, Callable[[Tensor], object]] = {
    "ctu": lambda t: ctu(t, 0.5, inplace=True),
    "ctu, a knob per channel": lambda t: ctu(t, torch.full((t.shape[-1],), 0.5), channel_dim=-1, inplace=True),
    "head_edit": lambda t: head_edit(t, M, inplace=True),
    "head_edit, heads apart": lambda t: head_edit(t.view(4, 2, 3).transpose(0, 1), M, head_axis=0, inplace=True),
    "head_edit, by way of a copy": lambda t: head_edit(t.view(4, 3, 2).transpose(1, 2), M, inplace=True),
    "head_edit, an edit per sample": lambda t: head_edit(
        t, torch.stack([M, -M]), index=torch.tensor([0, 1, 1, 0]), inplace=True
    ),
}
# The dispatcher ops by themselves, as compiled graphs call them.
HALF = torch.tensor(0.5, dtype=torch.float64)
OVERLOADS: dict[str, Callable[[Tensor], object]] = {
    "ctkernels::ctu_": lambda t: torch.ops.ctkernels.ctu_(t, HALF, HALF, None, None, None, None, -1, 0, False, 0.0),
    "ctkernels::ctu_and_mul_": lambda t: torch.ops.ctkernels.ctu_and_mul_(
        t, HALF, HALF, None, torch.full_like(t, 2.0), -1, 0, False, 0.0
    ),
    "ctkernels::head_edit_": lambda t: torch.ops.ctkernels.head_edit_(t, M.view(-1), None, None, None, 1),
}
EVERY = CALLS | OVERLOADS


@pytest.fixture(params=[True, False], ids=["with autograd", "no_grad"])
def grad_mode(request):
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.parametrize("name", EVERY)
def test_the_version_goes_up_by_one_as_with_relu_(backend, grad_mode, name):
    for write in (torch.relu_, EVERY[name]):
        base = torch.randn(2, 4, 6)
        views = [base, base[0], base[1], base.view(-1), base.detach()]
        write(base[0])
        assert [t._version for t in views] == [1] * len(views)


def test_every_op_that_writes_is_tested():
    assert {f"ctkernels::{op.name}_" for op in OPS.values() if op.overloads.inplace is not None} == set(OVERLOADS)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "head_edit, heads apart"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_the_version_goes_up_by_one_where_the_kernel_works_on_a_copy(backend, layout, name):
    x = {"contiguous": torch.randn(4, 6), "sliced": torch.randn(4, 12)[:, ::2], "transposed": torch.randn(6, 4).T}[
        layout
    ]
    EVERY[name](x)
    assert x._version == 1


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_tensor_that_is_overwritten_stops_the_backward_pass(backend, name):
    leaf = torch.randn(4, 6, requires_grad=True)
    y = leaf.exp()  # saves its result
    EVERY[name](y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", EVERY)
def test_inference_tensors(backend, name):
    with torch.inference_mode():
        x, expected = torch.ones(4, 6), torch.ones(4, 6)
        EVERY[name](x)  # nobody counts there
        EVERY[name](expected)
    before = x.clone()
    for write in (torch.relu_, EVERY[name]):
        with pytest.raises(
            RuntimeError, match="Inplace update to inference tensor outside InferenceMode is not allowed"
        ):
            write(x)
    assert torch.equal(x, before)
    normal = torch.ones(4, 6)
    version = normal._version
    with torch.inference_mode():
        EVERY[name](normal)
    assert normal._version == version + 1
    assert torch.equal(normal, expected)


@pytest.mark.parametrize("name", ["ctu", "head_edit"])
def test_vmap(backend, name):
    x = torch.randn(3, 4, 6)
    out_of_place = {"ctu": lambda t: ctu(t, 0.5), "head_edit": lambda t: head_edit(t, M)}[name]
    expected = torch.func.vmap(out_of_place)(x)

    def written(part):
        CALLS[name](part)
        return part.clone()

    assert torch.equal(torch.func.vmap(written)(x), expected)
    assert torch.equal(x, expected)
    assert x._version == 1


def test_forward_mode(backend):
    x, tangent = torch.randn(4, 6), torch.randn(4, 6)
    expected = torch.func.jvp(lambda t: ctu(t, 0.5), (x,), (tangent,))
    found = torch.func.jvp(lambda t: ctu(t.clone(), 0.5, inplace=True), (x,), (tangent,))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("name", OVERLOADS)
def test_the_bare_op_refuses_what_has_a_gradient(name):
    x = torch.randn(4, 6, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match=r"inplace=True would overwrite (x|z|gate), which the backward pass needs"):
        OVERLOADS[name](x)
    assert torch.equal(x, before)
    with torch.no_grad():
        OVERLOADS[name](x)
    assert x._version == 1


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["ctu", "head_edit", "head_edit, heads apart"])
@pytest.mark.parametrize("forced", [None, "reference"])
def test_compiled_programs(forced, name, compiler):
    """A compiled program tells autograd of what it wrote. How often is its own affair: torch's own ``relu_`` counts twice."""
    torch._dynamo.reset()

    def write(t):
        CALLS[name](t)

    with ctkernels.use_backend(forced or ctkernels.ops.backends.choose(M).name):
        compiled = torch.compile(write, backend=compiler, fullgraph=True)
        x = torch.randn(4, 6)
        expected = x.clone()
        write(expected)
        compiled(x)
        assert x._version >= 1
        torch.testing.assert_close(x, expected)
        leaf = torch.randn(4, 6, requires_grad=True)
        y = leaf.exp()
        compiled(y.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Overwriting(nn.Module):
    """The layer beside the activation saves what that writes over."""

    def __init__(self):
        super().__init__()
        self.side, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1.0
        return self.side(x) + self.act(x)


@pytest.mark.parametrize("beta", [1.0, 0.9])
def test_a_steered_inplace_activation_does_not_hide_what_it_overwrites(beta):
    x = torch.randn(5, 4)
    plain, steered = Overwriting(), Overwriting()
    ctkernels.steer(steered, beta)
    for net in (plain, steered):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            net(x).sum().backward()


# ---- memory that several elements share --------------------------------------------------------------------------------


def _addresses(t):
    where = torch.arange(t.untyped_storage().nbytes() // t.element_size()).as_strided(
        t.shape, t.stride(), t.storage_offset()
    )
    return where.flatten().tolist()


def test_overlap_with_itself_is_found_exactly():
    shapes = [(1,), (3,), (2, 3), (4, 2), (2, 1, 3), (2, 2, 2), (0, 3)]
    for shape in shapes:
        for strides in itertools.product((0, 1, 2, 3, 4, 6), repeat=len(shape)):
            storage = torch.empty(64)
            places = _addresses(storage.as_strided(shape, strides))
            assert memory.overlaps_itself(shape, strides) == (len(set(places)) < len(places)), (shape, strides)


def test_sharing_is_found_exactly():
    storage = torch.empty(96)
    views = [
        storage.as_strided(shape, strides, offset)
        for shape, strides in (((6,), (1,)), ((3, 2), (4, 1)), ((3, 2), (1, 4)), ((2, 3), (7, 2)), ((1, 1), (9, 9)))
        for offset in (0, 1, 2, 3, 5, 8)
    ]
    for x, t in itertools.product(views, views):
        expected = bool(set(_addresses(x)) & set(_addresses(t)))
        assert memory._share(x, t, t.data_ptr() - x.data_ptr()) == expected, (
            x.stride(),
            t.stride(),
            t.storage_offset(),
        )


def _shifted():
    memory = torch.randn(101)
    return memory[1:], {"beta": 0.5, "residual": memory[:-1]}


def _same_memory(name, at=0):
    def make():
        x = torch.rand(3, 4)
        arguments = {"beta": 0.5, "channel_dim": 1, name: x[at]}
        return x, arguments | ({"activation": "prelu"} if name == "negative_slope" else {})

    return make


SHARED = {
    "residual, shifted": ("residual", _shifted),
    "residual, turned": ("residual", lambda: (lambda x: (x, {"beta": 0.5, "residual": x.T}))(torch.randn(5, 5))),
    "beta is x": ("beta", lambda: (lambda x: (x, {"beta": x, "channel_dim": 0}))(torch.rand(8))),
    "beta, one value of x": ("beta", lambda: (lambda x: (x, {"beta": x[3]}))(torch.rand(8))),
    **{name: (name, _same_memory(name, 1)) for name in ("beta", "coeff", "negative_slope", "scale", "shift")},
}


@pytest.mark.parametrize("case", SHARED)
def test_an_argument_that_x_writes_over_is_refused(backend, case):
    name, make = SHARED[case]
    x, arguments = make()
    before = x.clone()
    name = "slope" if name == "negative_slope" else name
    with pytest.raises(
        ValueError, match=rf"ctu: {name} must not share memory with x when inplace=True.* {name}\.clone\(\)"
    ):
        ctu(x, inplace=True, **arguments)
    assert torch.equal(x, before)
    assert x._version == 0


@pytest.mark.parametrize("name", ["m", "a", "g_m", "g_a"])
def test_an_edit_that_z_writes_over_is_refused(backend, name):
    z = torch.rand(4, 6)
    arguments = {"m": torch.rand(2, 3), "a": torch.rand(2, 3), "g_m": torch.rand(2), "g_a": torch.rand(2)}
    arguments[name] = z[1].view(2, 3) if arguments[name].dim() == 2 else z[1, :2]
    before = z.clone()
    with pytest.raises(ValueError, match=f"head_edit: {name} must not share memory with z when inplace=True"):
        head_edit(z, **arguments, inplace=True)
    assert torch.equal(z, before)


def test_memory_of_one_array_behind_two_tensors(backend):
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    memory = numpy.random.default_rng(0).normal(size=101).astype("float32")
    x, residual = torch.from_numpy(memory[1:]), torch.from_numpy(memory[:-1])
    with pytest.raises(ValueError, match="residual must not share memory with x"):
        ctu(x, 0.5, residual=residual, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_neighbours_in_memory_are_no_overlap(backend, dtype):
    memory = torch.randn(4, 3000).to(dtype)
    for x, residual in (
        (memory[:, :1500], memory[:, 1500:]),
        (memory[:, ::2], memory[:, 1::2]),
        (memory[:2], memory[2:]),
        (memory[0], memory[1]),
    ):
        expected, kept = ctu(x, 0.8, residual=residual), residual.clone()
        assert torch.equal(ctu(x, 0.8, residual=residual, inplace=True), expected)
        assert torch.equal(residual, kept)
    z = torch.randn(5, 12)[:, :6]
    m = z._base[0, 6:].view(2, 3)
    expected = head_edit(z, m)
    assert torch.equal(head_edit(z, m, inplace=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_residual_that_is_x(backend, dtype):
    for make in (lambda: torch.randn(40, 70), lambda: torch.randn(70, 40).T, lambda: torch.randn(40, 140)[:, ::2]):
        x = make().to(dtype)
        expected = ctu(x, 0.8, residual=x)
        ctu(x, 0.8, residual=x, inplace=True)
        assert torch.equal(x, expected)


def test_x_that_overlaps_itself_is_refused(backend):
    for x in (
        torch.randn(1, 6).expand(4, 6),
        torch.randn(30).as_strided((4, 6), (3, 1)),
        torch.randn(9).unfold(0, 6, 1),
    ):
        before = x.clone()
        with pytest.raises(
            ValueError, match=r"ctu: inplace=True needs x without overlapping elements, got shape .*\.clone\(\)"
        ):
            ctu(x, 0.5, inplace=True)
        with pytest.raises(ValueError, match="head_edit: inplace=True needs z without overlapping elements"):
            head_edit(x, M, inplace=True)
        assert torch.equal(x, before)
    # strides that cross without meeting
    x = torch.randn(12).as_strided((3, 2), (2, 3))
    expected = ctu(x, 0.5)
    assert torch.equal(ctu(x, 0.5, inplace=True), expected)


def test_empty_and_meta_tensors(backend):
    empty = torch.empty(4, 3, 0, 5, 2).contiguous(memory_format=torch.channels_last_3d)
    assert 0 in empty.stride()
    assert ctu(empty, 0.5, inplace=True) is empty
    assert ctu(empty[:, :, :, ::2], 0.5, inplace=True).shape == (4, 3, 0, 3, 2)
    assert head_edit(torch.empty(0, 6), M, inplace=True).shape == (0, 6)
    if backend == "reference":
        meta = torch.empty(4, 6, device="meta")
        assert ctu(meta, 0.5, residual=meta[:, :], inplace=True) is meta
        assert meta._version == 1


class Sub(torch.Tensor):
    pass


def test_subclasses(backend):
    x = torch.randn(4, 6)
    expected = ctu(x, 0.5)
    sub = x.clone().as_subclass(Sub)
    assert type(ctu(sub, 0.5)) is type(torch.relu(sub)) is Sub
    assert ctu(sub, 0.5, inplace=True) is sub
    assert torch.equal(sub, expected)
    assert sub._version == 1
    for z in (torch.ones(4, 2, 3), torch.ones(4, 3, 2).transpose(1, 2)):  # in place, and by way of a copy
        edited = head_edit(z, M)
        assert head_edit(z, M.as_subclass(Sub), inplace=True) is z
        assert torch.equal(z, edited)
    parameter = nn.Parameter(x.clone())
    with torch.no_grad():
        assert ctu(parameter, 0.5, inplace=True) is parameter
    assert torch.equal(parameter, expected)
    assert parameter._version == 1


def test_lazy_negation(backend):
    view = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    expected = ctu(view.clone(), 0.5)
    ctu(view, 0.5, inplace=True)
    assert torch.equal(view, expected)
    assert view._version == 1


def test_a_forced_kernel_beside_the_dispatcher_counts_too(monkeypatch):
    """Triton, where it is forced and the dispatcher has compiled kernels, is called past the dispatcher."""
    called = []
    kernels = Kernels(*(partial(lambda name, *args: called.append(name), name) for name in Kernels._fields))
    monkeypatch.setattr(Op, "kernels", lambda self: kernels)
    x = torch.randn(4)
    OPS["ctu"].call_((x, HALF, HALF, None, None, None, None), (-1, 0, False, 0.0))
    assert called == ["inplace"]
    assert x._version == 1
