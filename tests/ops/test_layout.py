"""Views of tensors as kernels see them: every element is visited once, and belongs to the channel it should."""

from __future__ import annotations

import itertools

import pytest
import torch

from ctkernels.ops.layout import NO_CHANNEL, View, view_of

SHAPES = [(4,), (1,), (2, 3), (2, 3, 4), (3, 1, 5), (1, 3, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_views_of_every_permutation(shape):
    for order in itertools.permutations(range(len(shape))):
        storage = torch.arange(torch.Size(shape).numel())
        x = storage.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
        for channel_dim in (NO_CHANNEL, *range(len(shape))):
            for per_group in (False, True):
                view = view_of(x, channel_dim, per_group)
                outermost = next((d for d in order if shape[d] != 1), 0)
                if per_group and shape[0] != 1 and outermost != 0:
                    assert view is None
                    continue
                assert view is not None
                if per_group and channel_dim == 0:
                    continue
                where = storage.view(view[:4])
                for channel in range(view.channels):
                    mine = x if channel_dim == NO_CHANNEL else x.select(channel_dim, channel)
                    assert torch.equal(where[:, :, channel].flatten().sort()[0], mine.flatten().sort()[0])


def test_what_has_to_be_copied():
    assert view_of(torch.empty(4, 6)[:, ::2], 1, False) is None
    assert view_of(torch.empty(1, 3).expand(4, 3), 1, False) is None
    assert view_of(torch.empty(0, 3), 1, False) == View(1, 0, 3, 1)
