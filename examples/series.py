"""A small 1-D network for time series, pretrained on one set to be moved to others: a factory for ``--model``.

    python -m ctkernels tune aeon:ArrowHead --model examples.series:leaf_fcn

Outlines of leaves (OSULeaf, 442 of six kinds) are what it learns first; the weights are then kept in
``$XDG_CACHE_HOME/ctkernels/series``. Needs: pip install "ctkernels[lab]" and pip install --no-deps aeon
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctkernels._files import replacing
from ctkernels.lab import load_data

EPOCHS, BATCH, RATE = 40, 32, 2e-3


class SeriesFCN(nn.Module):
    """Three convolutions with batch normalisation and ReLU, a mean over time and a linear layer; series of any length.

    Source: Wang, Yan and Oates 2017, "Time series classification from scratch", at a quarter of its width.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (32, 64, 32)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel in zip((channels, *widths), widths, (7, 5, 3)):
            convolution = nn.Conv1d(before, after, kernel, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm1d(after), nn.ReLU()]
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, series: Tensor) -> Tensor:
        return self.classifier(self.features(series).mean(2))


def leaf_fcn() -> nn.Module:
    """The network with what it learned on OSULeaf: about a minute the first time, read from the cache after that."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctkernels/series"
    path, model = root / "leaf_fcn.safetensors", SeriesFCN(1, 6)
    if not path.is_file():
        _pretrain(model)
        with replacing(path) as temporary:
            save_file(model.state_dict(), temporary)
    model.load_state_dict(load_file(path))
    return model.eval()


def _pretrain(model: nn.Module) -> None:
    splits = load_data("aeon:OSULeaf")
    series = torch.cat([splits.train.series, splits.test.series])
    labels = torch.cat([splits.train.labels, splits.test.labels])
    series = (series - series.mean()) / series.std()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                module.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(series), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(model(series[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
