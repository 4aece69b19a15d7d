"""Models for tests of fusion, and the comparison: the error, against float64, is no worse than the unfused model's."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

NORMS = nn.modules.batchnorm._BatchNorm


def prepare(model, seed=0):
    """Give BatchNorms non-trivial statistics and weights, and remove randomness from training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.2, generator=generator)
                module.bias.data.normal_(0, 0.2, generator=generator)
        elif isinstance(getattr(module, "p", None), float):  # dropout, stochastic depth
            module.p = 0.0
    return model


def first_tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    return first_tensor(next(iter(output.values() if isinstance(output, dict) else output)))


def observe(model, x):
    """Outputs, all gradients and the buffers after one step: {name: tensor}."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = first_tensor(model(x))
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    (y * weights).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def rounded_anew(model, x, seeds=range(6)):
    """Results of ``observe`` for the unfused model, and for copies with weights and input perturbed by two ulps.

    Two ulps, because a folded weight is rounded four times, by half an ulp each: var + eps, its reciprocal root, times the
    norm's weight, times the convolution's. Several copies, because a single run of a small network can be accurate by chance;
    the worst one measures the amplification of rounding.
    """
    found = [observe(model, x)]
    for seed in seeds:
        generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
        with torch.no_grad():
            for value in (*other.parameters(), moved := x.clone()):
                signs = (
                    (torch.rand(value.shape, generator=generator) - 0.5).sign().to(value)
                )  # in this dtype, which has to represent 1 + eps
                value *= 1 + 2 * torch.finfo(value.dtype).eps * signs
        found.append(observe(other, moved))
    return found


def assert_networks_agree(fused, plain, truth):
    """Check that the fused model's error is at most twice the worst of the ``plain`` runs, plus an ulp, relative to a tensor's
    largest value and over the tensors of a kind."""
    assert all(list(fused) == list(run) for run in plain)
    largest = {}
    for name, exact in truth.items():
        kind = name.split()[0]
        largest[kind] = max(largest.get(kind, 0.0), exact.abs().max().item())

    def errors(found):
        worst = {}
        for name, value in found.items():
            exact, kind = truth[name], name.split()[0]
            scale = exact.abs().max().item()
            if scale <= 1e-9 * largest[kind]:  # 0 except for rounding, as the gradient of a bias before a BatchNorm is
                scale = largest[kind] or 1.0
            worst[kind] = max(worst.get(kind, 0.0), ((value.double() - exact).abs().max() / scale).item())
        return worst

    theirs = [errors(run) for run in plain]
    for kind, error in errors(fused).items():
        worst, eps = max(run[kind] for run in theirs), torch.finfo(fused["output"].dtype).eps
        assert error <= 2 * worst + eps, f"{kind}: {error:.3g}, unfused {worst:.3g}"


def compare(model, x, fuse, mode, runs=rounded_anew):
    """Compare ``model`` fused and unfused in ``mode``: "frozen", "eval" (trained weights) or "train". Returns the handle."""
    model = model.train(mode == "train").requires_grad_(mode != "frozen")
    exact = copy.deepcopy(model).double()
    expected = runs(copy.deepcopy(model), x)
    handle = fuse(model)
    assert_networks_agree(observe(model, x), expected, observe(exact, x.double()))
    if mode != "train":
        with torch.no_grad():
            inferred = {"output": first_tensor(model(x))}
            expected = [{"output": run["output"]} for run in expected]
            assert_networks_agree(inferred, expected, {"output": first_tensor(exact(x.double()))})
    return handle


def assert_one_activation_a_unit(model, x):
    """Check that a fused model of three "basic" blocks of four channels saves one activation per unit; ``x`` (4, 3, 16, 16)."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    activation = 4 * 4 * 16 * 16 * 4
    # seven units; a block's input is also its second unit's residual
    assert sum(size for size in kept.values() if size == activation) == (7 + 3) * activation


class Residual(nn.Module):
    """A network from a list of block descriptions; see ``BLOCKS``."""

    def __init__(self, blocks, channels=4, inplace=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace))
        self.blocks = nn.Sequential(*(BLOCKS[block](channels, inplace) for block in blocks))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, channels, inplace):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace)


class Basic(_Block):
    def forward(self, x):
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x
        return self.relu(out)


class ResidualFirst(_Block):
    def forward(self, x):
        out = F.relu(self.norm1(self.conv1(x)))
        return torch.relu(torch.add(x, self.norm2(self.conv2(out))))


class TwoBranches(_Block):
    def forward(self, x):
        return self.relu(self.norm1(self.conv1(x)) + self.norm2(self.conv2(x)))


class PreActivation(_Block):
    def forward(self, x):
        out = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(self.relu(self.norm2(out)))


class NoNorm(_Block):
    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


class Projected(_Block):
    """The sum is in this module, its terms in others."""

    def __init__(self, channels, inplace):
        super().__init__(channels, inplace)
        self.body = nn.Sequential(self.conv1, self.norm1, nn.ReLU(inplace), self.conv2, self.norm2)
        self.skip = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        return self.relu(self.skip(x) + self.body(x))


class Overwritten(_Block):
    """Values that others read or overwrite, so that fusion must not move anything."""

    def forward(self, x):
        out, skip = self.norm1(self.conv1(x)), x + 1
        kept = out * 2
        total = self.norm2(self.conv2(x)) + skip
        skip *= 0.5
        return self.relu(total) + kept + self.relu(out) + skip


class Strange(_Block):
    """Control flow that depends on a value."""

    def forward(self, x):
        out = self.norm1(self.conv1(x))
        return self.relu(out) if out.mean() < 1e9 else out


BLOCKS = {
    "basic": Basic,
    "residual first": ResidualFirst,
    "two branches": TwoBranches,
    "pre-activation": PreActivation,
    "no norm": NoNorm,
    "projected": Projected,
    "overwritten": Overwritten,
    "strange": Strange,
}
