"""Fusion: weights that change in any way, and what is kept for the backward pass."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from fused_models import (
    Residual,
    assert_networks_agree,
    assert_one_activation_a_unit,
    observe,
    prepare,
    rounded_anew,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctkernels
from ctkernels.fusion import fold
from ctkernels.fusion.recompute import normalised, recomputed


def steered(blocks=("basic", "projected"), **kwargs):
    torch.manual_seed(0)
    model = prepare(Residual(blocks, **kwargs), 0).eval()
    ctkernels.steer(model, 0.8)
    return model


def image(batch=3, size=6, dtype=torch.float32):
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------------- frozen_conv


def arguments(cls=nn.Conv2d, dtype=torch.float64, norm=True, bias=True, **kwargs):
    torch.manual_seed(0)
    conv = cls(4, 6, 3, bias=bias, **kwargs).to(dtype).requires_grad_(False)
    bn = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}[cls](6)
    prepare(bn).to(dtype).eval().requires_grad_(False)
    bias, scale = conv.bias, None
    if norm:
        scale, shift = fold.affine(bn, conv.weight)
        bias = (shift if conv.bias is None else shift + scale * conv.bias).to(dtype)
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    return conv, bn if norm else nn.Identity(), (conv.weight, bias, scale, *geometry)


CASES = {
    "plain": {},
    "strided, no bias": {"stride": 2, "padding": 1, "bias": False},
    "groups, dilation": {"groups": 2, "dilation": 2, "padding": 2},
    "no norm": {"norm": False},
    "1d": {"cls": nn.Conv1d},
    "3d": {"cls": nn.Conv3d, "padding": 1},
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_frozen_conv(case, last):
    conv, norm, args = arguments(**CASES[case])
    x = torch.randn(2, 4, *[7] * (conv.weight.dim() - 2), dtype=torch.float64)
    if last and x.dim() > 3:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    y = torch.ops.ctkernels.frozen_conv(x, *args)
    torch.testing.assert_close(y, norm(conv(x)), rtol=1e-12, atol=1e-12)
    given = x.clone().requires_grad_()

    def op(v):
        return torch.ops.ctkernels.frozen_conv(v, *args)

    assert torch.autograd.gradcheck(op, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, given, fast_mode=True)
    (ours,) = torch.autograd.grad(op(given).square().sum(), given)
    (theirs,) = torch.autograd.grad(norm(conv(given)).square().sum(), given)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours.stride() == given.stride()
    torch.library.opcheck(torch.ops.ctkernels.frozen_conv.default, (given, *args))
    shape = list(x.shape)
    dy = torch.randn_like(y, requires_grad=True)
    channels_last = last and x.dim() > 3
    weight, _, scale, *geometry = args
    more = weight, scale, shape, channels_last, *geometry
    torch.library.opcheck(torch.ops.ctkernels.frozen_conv_backward.default, (dy, *more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_weights_round_no_worse(dtype):
    conv, norm, args = arguments(dtype=dtype, padding=1)
    x = torch.randn(2, 4, 9, 8).to(dtype)
    truth = copy.deepcopy(norm).double()(copy.deepcopy(conv).double()(x.double()))
    ours, theirs = torch.ops.ctkernels.frozen_conv(x, *args), norm(conv(x))
    error, allowed = ((y.double() - truth).abs().max() for y in (ours, theirs))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max()


# --------------------------------------------------------------------------------------------------- weights that change

WRITES = {
    "in place": lambda m: m.weight.mul_(2),
    "through .data": lambda m: m.weight.data.copy_(torch.linspace(-1, 1, m.weight.numel()).view_as(m.weight)),
    "through numpy": lambda m: m.weight.detach().numpy().__imul__(2.0),
    "through a view of .data": lambda m: m.weight.data.view(-1)[1:3].fill_(3.0),
    "another tensor as .data": lambda m: setattr(m.weight, "data", m.weight.data.flip(0)),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 3, requires_grad=False)),
    "a buffer through .data": lambda m: [b.data.mul_(4) for b in m.buffers() if b.is_floating_point()],
    "inside a storage": lambda m: m.weight.untyped_storage().copy_((m.weight * 2).untyped_storage()),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("write", WRITES)
def test_every_write_to_a_weight_is_seen(write, compiled):
    """With and without a unit after the BatchNorm, in inference and where a gradient flows through."""
    torch._dynamo.reset()
    model, x = steered(("projected",)).requires_grad_(False), image(size=12)
    plain = copy.deepcopy(model)
    ctkernels.fuse(model)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(x), run(x.clone().requires_grad_())
    for name in ("stem.0", "stem.1", "blocks.0.skip.0", "blocks.0.skip.1", "blocks.0.norm2"):
        for net in (model, plain):
            with torch.no_grad():
                WRITES[write](net.get_submodule(name))
        with torch.no_grad():
            torch.testing.assert_close(run(x), plain(x), rtol=1e-4, atol=1e-5)
        ours, theirs = observe(run, x), observe(plain, x)
        for kind in ("output", "input"):
            torch.testing.assert_close(ours[kind], theirs[kind], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ compiled


def test_compiled_code_follows_the_weights():
    torch._dynamo.reset()
    model, x = steered().requires_grad_(False), image()
    plain = copy.deepcopy(model)
    ctkernels.fuse(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for change in (lambda net: None, lambda net: net.stem[0].weight.mul_(2), lambda net: net.train()(x)):
            for net in (model, plain):
                change(net)
                net.eval()
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", [False, True])
def test_what_the_compiler_sees(gradient):
    torch._dynamo.reset()
    model, x, seen = steered().requires_grad_(False), image().requires_grad_(gradient), []
    ctkernels.fuse(model)

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
    assert any("frozen_conv" in target for target in seen) == gradient


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_need_only_torch_for_their_convolutions(strict):
    model, x = steered().requires_grad_(False), image()
    ctkernels.fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,), strict=strict)
    assert not any("frozen_conv" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


# ------------------------------------------------------------------------------------------------ the backward pass


def test_nothing_is_kept_but_the_units_input():
    model = steered(("basic",) * 3).requires_grad_(False)
    ctkernels.fuse(model)
    assert_one_activation_a_unit(model, image(4, 16).requires_grad_())


def peak(model, x):
    """Bytes alive after the forward pass, by torch's own account."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = model(x)
    total = sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    y.sum().backward()
    return total


def test_a_normalised_branch_is_not_kept():
    plain = prepare(Residual(("projected", "projected"), inplace=True)).train()
    model, x = copy.deepcopy(plain), image(4, 32)
    ctkernels.steer(model, 0.8)
    ctkernels.fuse(model)
    activation = 4 * 4 * 32 * 32 * 4
    assert peak(model, x) < peak(plain, x) + activation / 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_branch_computed_anew_gives_the_same_gradients(checkpointed):
    model, x = steered(("projected", "two branches")).train(), image()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    expected, exact = rounded_anew(plain, x), observe(exact, x.double())
    ctkernels.fuse(model)
    if checkpointed:
        blocks = model.blocks
        model.blocks.forward = lambda v: checkpoint(type(blocks).forward, blocks, v, use_reentrant=False)
    assert_networks_agree(observe(model, x), expected, exact)


def test_a_branch_that_was_overwritten_is_noticed():
    model, x = steered(("projected",)).train(), image()
    ctkernels.fuse(model)
    y = model(x)
    with torch.no_grad():
        model.blocks[0].skip[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    norm, z, branch = nn.BatchNorm2d(2), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4, requires_grad=True)
    residual = normalised(norm, branch)
    with recomputed(residual):
        y = ctkernels.functional.ctu(z, 0.8, residual=residual)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="at version 1; expected 0"):
        y.sum().backward()


def test_where_nothing_can_be_fused_the_error_names_what_was_left():
    """BatchNorms that no layer stands before, as in ConvMixer, where they follow activations."""
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.BatchNorm2d(3)) for _ in range(10))).eval()
    with pytest.raises(ValueError, match="got none that can be fused") as caught:
        ctkernels.fuse(model)
    message = str(caught.value)
    assert message.count("was left alone: no layer before it") == 8
    assert "0.2 was left alone" in message
    assert message.endswith("and 2 more")
