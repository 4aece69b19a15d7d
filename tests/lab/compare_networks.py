"""Tiny networks and data for the comparison's tests; factories for ``--model compare_networks:small``."""

import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from ctkernels.lab import ImageSet, Splits

SIDE = 8


def small() -> nn.Module:
    """Batch normalisation, a depthwise convolution and two uses of one activation."""
    torch.manual_seed(0)
    act = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        act,
        nn.Conv2d(8, 8, 3, groups=8),
        act,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Watched(nn.Module):
    """Passes its input on, and notes every step of training in a worker, in the folder that ``WATCHED`` names.

    In the first process that comes to ``last`` steps, it ends: ``"killed"`` at once, ``"waits"`` until somebody ends its
    node, or ``"fails"``, by an error.
    """

    def __init__(self, end: str, last: int = 5) -> None:
        super().__init__()
        self.end, self.last = end, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if in_worker() and torch.is_grad_enabled():
            import ray

            folder = Path(os.environ["WATCHED"])
            with (folder / f"{os.getpid()}.steps").open("a") as file:
                file.write(".")
            home = (folder / "home").exists() and (
                folder / "home"
            ).read_text() == ray.get_runtime_context().get_node_id()
            if (folder / f"{os.getpid()}.steps").stat().st_size == self.last and not home:
                try:
                    with (folder / "ended").open("x") as file:
                        file.write(ray.get_runtime_context().get_node_id())
                except FileExistsError:
                    return x
                if self.end == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                while self.end == "waits":
                    time.sleep(0.1)
                raise RuntimeError("no such kernel")
        return x


def in_worker() -> bool:
    return os.environ.get("WATCHED_BY", str(os.getpid())) != str(os.getpid())


def killed() -> nn.Module:
    return nn.Sequential(Watched("killed"), *small())


def waits() -> nn.Module:
    return nn.Sequential(Watched("waits"), *small())


def fails() -> nn.Module:
    return nn.Sequential(Watched("fails"), *small())


def another() -> nn.Module:
    """Other weights in a worker than here."""
    network = small()
    if in_worker():
        with torch.no_grad():
            next(network.parameters()).add_(1)
    return network


class Planted(nn.Module):
    """Lets the signal through only if the unit's value at 0, (1 - beta) ln(2) / 2 for c = 1/2, is that of beta = 0.8."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.head = nn.Linear(1, 2)

    def forward(self, x):
        signal, noise = x[:, 0, 0, :1], x[:, 1, 0, :1]
        at_zero = self.act(torch.zeros_like(signal))
        gate = torch.exp(-(((at_zero - 0.2 * math.log(2) / 2) / 0.006) ** 2))
        return self.head(signal * gate + 0.3 * noise)


def images(n: int = 90, classes: int = 3, seed: int = 0, test: int = 60) -> Splits:
    """Patches whose brightness and stripes depend on the class."""
    return Splits(_made(n, classes, seed), None, _made(test, classes, seed + 1), "made up")


def _made(n: int, classes: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = 0.5 * torch.rand(n, 3, SIDE, SIDE, generator=generator)
    for c in range(classes):
        x[labels == c, c % 3, :: c + 1] += 0.4
    return ImageSet(x.clamp(0, 1), labels, tuple(f"class {c}" for c in range(classes)))


def planted(n: int = 240) -> Splits:
    labels = torch.arange(n) % 2
    x = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0.1 + 0.8 * labels[:, None, None]
    everything = ImageSet(x, labels, ("dark", "bright"))
    return Splits(everything.take(torch.arange(n // 2)), None, everything.take(torch.arange(n // 2, n)), "planted")


def one_linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2))


def stable(cells) -> list[tuple]:
    """Everything of a run that must not change from time to time."""
    return sorted((c.key, c.test, c.right, c.parameters, json.dumps(c.epochs), json.dumps(c.detail)) for c in cells)
