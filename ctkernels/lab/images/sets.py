"""Labelled images in memory or on disk, their decoding and preprocessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._extras import require
from ..labelled import InputOptions, LabelledSet, check_finite

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """Resizes the shorter side, crops the centre, expands to three channels, and normalises one image.

    Args:
        size: side of the square that the network sees, in pixels. Default 224.
        resize: length of the shorter side before the crop. Default ``size * 256 / 224``, so 256 for 224.
        mean, std: of each channel, of values in [0, 1]. Default ImageNet's; :func:`normalised_like` computes those of a
            data set.

    Images are uint8, or floating point in [0, 1], of shape (H, W), (1, H, W) or (3, H, W); the result is float32
    (3, size, size).

    Raises:
        ValueError: a size is below 1, or a standard deviation is not positive.

    Examples:
        >>> Preprocess(size=64, resize=64)(torch.zeros(28, 28, dtype=torch.uint8)).shape
        torch.Size([3, 64, 64])

    Source: Curvature Tuning paper, section 4.1 and appendix B (resize 256, crop 224, the target set's statistics).
    """

    size: int = 224
    resize: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize must be at least size ({self.size}), got {self.resize}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std must have three values each, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def pixels(self, image: Tensor) -> Tensor:
        """The resized and cropped image in [0, 1], float32 (3, size, size), before normalisation."""
        x = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        x = x[None] if x.dim() == 2 else x
        height, width = x.shape[-2:]
        shorter = self.resize or round(self.size * 256 / 224)
        scale = shorter / min(height, width)
        shape = (max(shorter, round(height * scale)), max(shorter, round(width * scale)))
        if shape != (height, width):
            x = functional.interpolate(x[None], size=shape, mode="bilinear", align_corners=False, antialias=True)[0]
        top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
        x = x[:, top : top + self.size, left : left + self.size].clamp(0, 1)
        return x.expand(3, -1, -1)

    def blank(self) -> Tensor:
        """A batch of one image of zeros, in the network's size."""
        return torch.zeros(1, 3, self.size, self.size)

    def entries(self) -> dict[str, Any]:
        """The arguments as plain values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def restored(cls, values: Mapping[str, Any], network: nn.Module) -> Preprocess:
        """Constructs it from :meth:`entries`."""
        return cls(values["size"], values["resize"], tuple(values["mean"]), tuple(values["std"]))

    def __call__(self, image: Tensor) -> Tensor:
        return (self.pixels(image) - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class ImageSet(LabelledSet):
    """Labelled images; item ``i`` is the preprocessed image, float32 (3, size, size), and its label.

    Args:
        images: a tensor (n, H, W) or (n, C, H, W), C = 1 or 3, uint8 or floating point in [0, 1]; or n file paths; or an
            object of length n that returns such an image for an integer, and a subset of itself for an int64 tensor.
        labels: int64 (n,), each an index into ``classes``.
        classes: names of the classes.
        preprocess: default: the defaults of :class:`Preprocess`.
    """

    KIND: ClassVar[str] = "images"
    EXAMPLES: ClassVar[str] = "images"

    images: Tensor | Sequence[Path] | Any
    labels: Tensor
    classes: tuple[str, ...]
    preprocess: Preprocess = field(default_factory=Preprocess)

    def raw(self, index: int) -> Tensor:
        """The stored image: uint8 or floating point, (H, W) or (C, H, W)."""
        image = self.images[index]
        return image if isinstance(image, Tensor) else read_image(image)

    def preparation(self, options: InputOptions, network: nn.Module, fitted: bool = True) -> Preprocess:
        preprocess = Preprocess(options.size, options.resize)
        return normalised_like(preprocess, self) if fitted and options.normalise == "target" else preprocess

    def check(self) -> None:
        if isinstance(self.images, Tensor) and self.images.is_floating_point():
            check_finite(self.images, "images")


class UnreadableImage(ValueError):
    """An image file that cannot be decoded, or whose values have no defined range; the message names the file."""

    def __init__(self, message: str) -> None:
        # worker processes of a loader put the text of a traceback before the message
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_image(path: Path) -> Tensor:
    """Decodes a file to uint8 (3, H, W), in its EXIF orientation; see :func:`decoded` for the modes.

    Raises:
        UnreadableImage: the file is no image, is truncated or too large, or is refused by :func:`decoded`.
    """
    with opened_image(path) as image:
        return decoded(image)


@contextmanager
def opened_image(path: Path) -> Iterator[Any]:
    """Opens an image with Pillow, which reads only its header. Errors within the context name the file.

    Raises:
        UnreadableImage: as :func:`read_image`.
    """
    image_module = require("PIL.Image", "lab", "reading image files")
    require("numpy", "lab", "reading image files")
    try:
        with image_module.open(path) as image:
            check_mode(image)
            yield image
    except image_module.DecompressionBombError as error:
        raise UnreadableImage(
            f"cannot read image {path}: {error} Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except (
        Exception
    ) as error:  # Pillow raises nearly anything for damaged files: OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(f"cannot read image {path}: {error or type(error).__name__}") from error


EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "YCbCr", "CMYK", "HSV")  # Pillow converts them to RGB correctly
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I has 16 bits; in others it may have 32, used in part
STILL = ("MPO",)  # photographs of telephones: a picture, followed by previews of it
PHOTOMETRIC, BITS = 262, 258  # tags of TIFF: whether 0 is white, and the number of bits per sample


def check_mode(image: Any) -> None:
    """Refuses an image of several frames, or of a mode with an unknown range.

    Raises:
        ValueError: the message names a way out.
    """
    frames = getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 1
    if frames > 1 and image.format not in STILL:
        raise ValueError(f"expected one image, it has {frames} frames: save the one that is meant as a file of its own")
    deep = image.mode == "F" or _highest(image) is not None
    if not (image.mode in (*EIGHT_BITS, *TRANSPARENT) or (deep and _tags(image).get(PHOTOMETRIC) != 0)):
        raise ValueError(
            f"expected 8 or 16 bits, or floating point in [0, 1], it has the mode {image.mode} in a way "
            f"that leaves open what is black and what is white: save it as one of these"
        )


def decoded(image: Any) -> Tensor:
    """The pixels of a Pillow image as uint8 (3, H, W), in its EXIF orientation.

    Grey values are repeated. Values of more than 8 bits are scaled by their maximum (65535 for 16 bits), floating point by
    1. Transparent images are composed over white.

    Raises:
        ValueError: the image has several frames, a mode with an unknown range, or floating point outside of [0, 1].
    """
    image_module, operations = (require(f"PIL.{n}", "lab", "reading image files") for n in ("Image", "ImageOps"))
    numpy = require("numpy", "lab", "reading image files")
    check_mode(image)
    highest = _highest(image)
    image = operations.exif_transpose(image)
    clear = image.info.get("transparency")
    if highest is not None or image.mode == "F":
        values = numpy.asarray(image, dtype=numpy.float64)
        if highest is None and not ((values >= 0) & (values <= 1)).all():  # NaN compares false
            raise ValueError(
                f"expected floating point in [0, 1], it has values from {values.min():g} to {values.max():g}: scale it"
            )
        grey = numpy.rint(values * (255 / (highest or 1))).astype(numpy.uint8)
        grey[values == clear] = 255
        return torch.from_numpy(grey).expand(3, -1, -1)
    if image.mode in TRANSPARENT or clear is not None:
        image = image.convert("RGBA")
        image = image_module.alpha_composite(image_module.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def _highest(image: Any) -> int | None:
    """The value of white, for an image with integers of 16 bits or fewer but more than 8; None for other images."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return 2 ** int(_tags(image).get(BITS, (16,))[0]) - 1
    return None


def _tags(image: Any) -> Any:
    return getattr(image, "tag_v2", {})


def normalised_like(preprocess: Preprocess, images: ImageSet, limit: int = 1000) -> Preprocess:
    """``preprocess`` with the mean and deviation of ``images`` (of at most ``limit`` of them, evenly spaced).

    Raises:
        ValueError: a channel does not vary.
    """
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    indices = range(0, len(images), -(-len(images) // limit))
    for i in indices:
        x = preprocess.pixels(images.raw(i)).double()
        total += x.mean((1, 2))
        squares += x.square().mean((1, 2))
    mean = total / len(indices)
    std = (squares / len(indices) - mean.square()).clamp(min=0).sqrt()
    if std.min() < 1e-6:
        raise ValueError(f"images must vary, got the deviations {std.tolist()} of the three channels")
    return dataclasses.replace(preprocess, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
