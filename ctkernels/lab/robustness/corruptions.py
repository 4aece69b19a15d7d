"""Common corruptions of images (noise, blur, weather, digital), with seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..._extras import require
from ...cli.option_types import LEVEL, choice

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
OWN_SEED = ("impulse_noise", "glass_blur")  # take a seed instead of NumPy's global state
LEAST_SIDE = 32


def corrupt(pixels: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupts images as in ImageNet-C and CIFAR-10-C.

    The randomness of an image depends only on ``seed``, ``name``, ``severity`` and its number.

    Args:
        pixels: floating point (n, 1 or 3, h, w) in [0, 1], at least 32 x 32.
        name: one of ``CORRUPTIONS``.
        severity: 1 (mild) to 5.
        seed: of the noise.

    Returns:
        float32 (n, 3, h, w): multiples of 1/255 in [0, 1], as in 8-bit images.

    Raises:
        ValueError: the name is unknown, the severity is out of range, or images are too small or out of range.
        ImportError: imagecorruptions-imaug is missing; the message names the extra.

    Examples:
        >>> foggy = corrupt(pixels, "fog", severity=3)

    Source: Hendrycks and Dietterich 2019.
    """
    choice(*CORRUPTIONS).check("name", name)
    LEVEL.check("severity", severity)
    if pixels.dim() != 4 or pixels.shape[1] not in (1, 3) or min(pixels.shape[2:]) < LEAST_SIDE:
        raise ValueError(
            f"corruptions need images (n, 1 or 3, h, w) of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, "
            f"got the shape {tuple(pixels.shape)}"
        )
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError(f"pixels must be in [0, 1], got values from {pixels.min():g} to {pixels.max():g}")
    numpy = require("numpy", "lab", "common corruptions")
    library = require("imagecorruptions", "lab", "common corruptions")
    images = (pixels * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    corrupted = []
    for number, image in enumerate(images):
        entropy = [seed, CORRUPTIONS.index(name), severity, number]
        image_seed = int(numpy.random.SeedSequence(entropy).generate_state(1)[0]) >> 1
        keywords = {"seed": image_seed} if name in OWN_SEED else {}
        with _seeded(numpy, image_seed):
            corrupted.append(library.corrupt(image, severity=severity, corruption_name=name, **keywords))
    return torch.from_numpy(numpy.stack(corrupted)).permute(0, 3, 1, 2).float() / 255


@contextmanager
def _seeded(numpy: Any, seed: int) -> Iterator[None]:
    """Seeds NumPy's global random state, which the library uses; restores it afterwards."""
    state = numpy.random.get_state()
    numpy.random.seed(seed)
    try:
        yield
    finally:
        numpy.random.set_state(state)
