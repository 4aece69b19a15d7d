"""Labelled images in memory or on disk, how they are made ready for a network, and how they are split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset, TensorDataset

from ..._extras import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, crop the centre, make three channels, normalise. Each image on its own.

    Args:
        size: side of the square that the network sees, in pixels. Default 224.
        resize: length of the shorter side before the crop. Default ``size * 256 / 224``, so 256 for 224.
        mean, std: of each channel, of values in [0, 1]. Default ImageNet's; :func:`normalised_like` gives a data set's
            own.

    Takes uint8, or floating point in [0, 1], of shape (H, W), (1, H, W) or (3, H, W); gives float32 (3, size, size).

    Raises:
        ValueError: a size below 1, a standard deviation that is not positive.

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

    def __call__(self, image: Tensor) -> Tensor:
        return (self.pixels(image) - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Labelled images; item ``i`` is the preprocessed image, float32 (3, size, size), and its label.

    Args:
        images: a tensor (n, H, W) or (n, C, H, W), C = 1 or 3, uint8 or floating point in [0, 1]; or n file paths;
            or anything of length n that gives such a tensor for a number, and a part of itself for int64 numbers.
        labels: int64 (n,), each an index into ``classes``.
        classes: the names.
        preprocess: default :class:`Preprocess`'s defaults.
    """

    images: Tensor | Sequence[Path] | Any
    labels: Tensor
    classes: tuple[str, ...]
    preprocess: Preprocess = field(default_factory=Preprocess)

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, index: int) -> Tensor:
        """The image as stored: uint8 or floating point, (H, W) or (C, H, W)."""
        image = self.images[index]
        return image if isinstance(image, Tensor) else read_image(image)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.preprocess(self.raw(index)), int(self.labels[index])

    def take(self, indices: Tensor) -> ImageSet:
        """The images at ``indices``, int64, in that order."""
        images: Any = self.images  # a list of paths, or something that takes a tensor of indices
        images = [images[i] for i in indices.tolist()] if isinstance(images, (list, tuple)) else images[indices]
        return dataclasses.replace(self, images=images, labels=self.labels[indices])

    def sample(self, limit: int | None, seed: int) -> ImageSet:
        """Take at most ``limit`` of the images, classes in proportion; all of them for None."""
        if limit is None or limit >= len(self):
            return self
        return self.take(stratified_order(self.labels, seed)[:limit].sort().values)

    def prepared(self, preprocess: Preprocess) -> ImageSet:
        """The same images with another preprocessing."""
        return dataclasses.replace(self, preprocess=preprocess)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images as a data set ships them, ``None`` where it does not, and its ``source``."""

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    source: str

    def complete(
        self,
        *,
        val: float,
        test: float,
        seed: int,
        max_train: int | None = None,
        max_test: int | None = None,
        test_seed: int | None = None,
    ) -> tuple[ImageSet, ImageSet, ImageSet]:
        """Training, validation and test images; what the data lacks is cut off the training images, class by class.

        Args:
            val, test: fractions to cut, used only where there is no such split.
            seed: of the cuts and samples.
            test_seed: of those of the test images. Default: ``seed``.
            max_train: the most images for training and for the validation that is cut off them.
            max_test: the most images for test.

        Raises:
            ValueError: a fraction or limit out of range, or too few images of a class.
        """
        for name, limit in (("max_train", max_train), ("max_test", max_test)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        train, tested = self.train, self.test
        test_seed = seed if test_seed is None else test_seed
        if tested is None:
            rest, part = stratified_split(train.labels, [test], test_seed, "test")
            train, tested = train.take(rest), train.take(part)
        train, tested = train.sample(max_train, seed), tested.sample(max_test, test_seed)
        if self.val is not None:
            return train, self.val, tested
        rest, part = stratified_split(train.labels, [val], seed, "val")
        return train.take(rest), train.take(part), tested


class UnreadableImage(ValueError):
    """An image file that cannot be decoded, or not without guessing what its values mean; the message names the file."""

    def __init__(self, message: str) -> None:
        # A loader's worker process hands its error on with the text of a traceback before the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_image(path: Path) -> Tensor:
    """Decode a file to uint8 (3, H, W), turned as its EXIF orientation asks; see :func:`decoded` for the modes.

    Raises:
        UnreadableImage: the file is no image, is cut short, too large, or one that :func:`decoded` refuses.
    """
    with opened_image(path) as image:
        return decoded(image)


@contextmanager
def opened_image(path: Path) -> Iterator[Any]:
    """A Pillow image of which only the header has been read. Whatever goes wrong with it names the file.

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
    ) as error:  # damaged files make Pillow raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(f"cannot read image {path}: {error or type(error).__name__}") from error


EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "YCbCr", "CMYK", "HSV")  # what Pillow converts to RGB rightly
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I holds 16 bits; elsewhere it may hold 32, of which any part is used
STILL = ("MPO",)  # photographs of telephones: the picture, then previews of it
PHOTOMETRIC, BITS = 262, 258  # tags of TIFF: what is white, and how many of the bits are used


def check_mode(image: Any) -> None:
    """Refuse an image of several frames, or of a mode whose range is not known.

    Raises:
        ValueError: the message says what to do about it.
    """
    frames = getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 1
    if frames > 1 and image.format not in STILL:
        raise ValueError(f"expected one image, it has {frames} frames: save the one that is meant as a file of its own")
    beyond = image.mode == "F" or _highest(image) is not None
    if not (image.mode in (*EIGHT_BITS, *TRANSPARENT) or (beyond and _tags(image).get(PHOTOMETRIC) != 0)):
        raise ValueError(
            f"expected 8 or 16 bits, or floating point in [0, 1], it has the mode {image.mode} in a way "
            f"that leaves open what is black and what is white: save it as one of these"
        )


def decoded(image: Any) -> Tensor:
    """The pixels of a Pillow image as uint8 (3, H, W), turned as its EXIF orientation asks.

    Grey values are repeated. More than 8 bits are scaled by their highest value (65535 for 16), floating point by 1.
    What is transparent is laid on white.

    Raises:
        ValueError: several frames, a mode whose range is not known, or floating point outside of [0, 1].
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
    """The value of white where an image holds integers of more than 8 bits; None where it does not, or may not."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return 2 ** int(_tags(image).get(BITS, (16,))[0]) - 1
    return None


def _tags(image: Any) -> Any:
    return getattr(image, "tag_v2", {})


def normalised_like(preprocess: Preprocess, images: ImageSet, limit: int = 1000) -> Preprocess:
    """``preprocess`` with the mean and deviation of ``images`` (at most ``limit`` of them, evenly spaced).

    Raises:
        ValueError: the images have a channel that never varies.
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


def labels_of(dataset: Any, name: str) -> Tensor:
    """The labels of a data set, int64 (n,): its ``labels`` or ``targets`` if it has them, else item by item."""
    if isinstance(dataset, TensorDataset):
        values: Any = dataset.tensors[1]
    elif isinstance(dataset, Subset):
        return labels_of(dataset.dataset, name)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    else:
        values = next((v for a in ("labels", "targets") if (v := getattr(dataset, a, None)) is not None), None)
        if values is None:
            values = [int(dataset[i][1]) for i in range(len(dataset))]
    labels = torch.as_tensor(values)
    if labels.dim() != 1 or len(labels) != len(dataset) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}: labels must be {len(dataset)} integers, one per image, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return labels.to(torch.int64)


def check_classes(labels: Tensor, name: str) -> None:
    """ValueError unless ``labels`` is not empty and has at least two classes."""
    classes = labels.unique()
    if len(classes) < 2:
        detail = f"{len(labels)} images, all of class {classes[0].item()}" if len(classes) else "no images"
        raise ValueError(f"{name}: expected at least two classes, got {detail}")


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int, name: str = "data") -> list[Tensor]:
    """Cut the indices of ``labels`` into a rest and one part per fraction, class by class.

    Args:
        labels: int64 (n,).
        fractions: of the whole, each in (0, 1), with a sum below 1. Every part gets at least one image of each class.
        seed: the same seed gives the same parts.

    Returns:
        int64 index tensors, ascending: the rest first, then one per fraction.

    Raises:
        ValueError: a fraction out of range, or a class too small to give every part an image.

    Examples:
        >>> rest, val = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), [0.25], seed=0)
        >>> len(rest), len(val)
        (6, 2)
    """
    if any(not 0 < f < 1 for f in fractions) or sum(fractions) >= 1:
        raise ValueError(f"{name}: fractions to split off must be in (0, 1) with a sum below 1, got {list(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        counts = [max(1, round(f * len(members))) for f in fractions]
        if sum(counts) >= len(members):
            raise ValueError(
                f"{name}: class {label.item()} has {len(members)} images, too few to split into {len(parts)} parts "
                f"(fractions {list(fractions)}); expected at least {len(parts)}"
            )
        for part, piece in zip(parts, members.split([len(members) - sum(counts), *counts])):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def validation_folds(train: Tensor, val: Tensor, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Cut training and validation images into training and validation parts again, in ``count`` ways.

    The first way is the one given. The validation part of each other is a stretch of the training images as large as
    ``val``, classes in proportion; no image is in two of them.

    Args:
        train, val: labels, int64 (n,) and (m,).
        count: at most ``(n + m) // m``.
        seed: of the order of the training images.

    Returns:
        pairs of int64 indices into the training images followed by the validation images.

    Raises:
        ValueError: a count out of range.

    Examples:
        >>> first, second = validation_folds(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), 2, seed=0)
        >>> first[0].tolist(), first[1].tolist(), len(second[0])
        ([0, 1, 2, 3], [4, 5], 4)
    """
    n, m = len(train), len(val)
    if not 1 <= count <= max(1, (n + m) // m):
        raise ValueError(
            f"folds must be from 1 to {max(1, (n + m) // m)} for {n} training and {m} validation, got {count}"
        )
    everything = torch.arange(n + m)
    order = stratified_order(train, seed)
    parts = [everything[n:], *(order[i * m : (i + 1) * m].sort().values for i in range(count - 1))]
    return [(everything[~torch.isin(everything, part)], part) for part in parts]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded order of the indices of ``labels`` in which every stretch has the classes in proportion.

    So the first n are a fair sample of n, and the next n another one that shares no image with it.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero()[:, 0]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[position.argsort(stable=True)]
