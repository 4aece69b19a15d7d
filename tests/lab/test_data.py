"""Loading images, networks and weights: what is accepted, and what is said about the rest."""

import subprocess
import sys

import pytest
import torch

from ctkernels._extras import require
from ctkernels.lab import (
    ImageSet,
    Preprocess,
    load_data,
    normalised_like,
    read_npz,
    stratified_order,
    stratified_split,
)

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")

# --- folders ---


@pytest.fixture
def photos(tmp_path):
    """Two classes of three PNG files, and a hidden file that does not count."""
    image = pytest.importorskip("PIL.Image", reason="image files need pillow")
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((5, 7, 3), 40 * i + 10 * k, np.uint8)
            image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos/cat/.hidden.png").write_text("")
    return tmp_path / "photos"


def test_folder(photos):
    splits = load_data(photos)
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (splits.val, splits.test) == (None, None)
    image, label = splits.train.prepared(Preprocess(4, mean=(0, 0, 0), std=(1, 1, 1)))[5]
    assert image.shape == (3, 4, 4)
    assert image.dtype == torch.float32
    assert label == 1
    assert torch.allclose(image, torch.tensor(90 / 255))


def test_folder_with_splits(photos, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    photos.rename(root / "train")
    (root / "validation/dog").mkdir(parents=True)
    (root / "train/dog/0.png").rename(root / "validation/dog/0.png")
    with pytest.raises(ValueError, match="expected at least two classes, got 1 images, all of class 1"):
        load_data(root)
    (root / "validation/cat").mkdir()
    (root / "train/cat/0.png").rename(root / "validation/cat/0.png")
    splits = load_data(root)
    assert len(splits.train) == 4
    assert splits.val.labels.tolist() == [0, 1]
    assert splits.test is None
    (root / "validation/cat").rename(root / "validation/cow")
    with pytest.raises(ValueError, match=r"classes \['cow'\] are not among those of the training images"):
        load_data(root)
    (root / "train").rename(root / "other")
    with pytest.raises(ValueError, match="expected a folder train beside"):
        load_data(root)


def test_bad_folders(photos, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        load_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected one subfolder of images per class, found none \(3 loose images\)"):
        load_data(photos / "dog")
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected images \(.png, "):
        load_data(photos)
    (photos / "empty").rmdir()
    (photos / "cat/1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read image .*1.png"):
        load_data(photos)
    for file in (photos / "cat").iterdir():
        file.unlink()
    (photos / "cat").rmdir()
    with pytest.raises(ValueError, match="at least two classes, got 3 images, all of class 0"):
        load_data(photos)


def test_file_cut_short_is_named_when_read(photos):
    file = photos / "cat/2.png"
    file.write_bytes(file.read_bytes()[:-35])
    with pytest.raises(ValueError, match=r"cannot read image .*2.png"):
        load_data(photos).train[2]


# --- .npz ---

IMAGES = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
LABELS = np.array([3, 3, 3, 8, 8, 8])


@pytest.mark.parametrize(
    ("arrays", "shape"),
    [
        ({"x": IMAGES, "y": LABELS}, (4, 4)),
        ({"images": IMAGES[..., None], "labels": LABELS[:, None]}, (1, 4, 4)),
        ({"x_train": np.stack([IMAGES] * 3, 1) / 255, "y_train": LABELS.astype(str)}, (3, 4, 4)),
        ({"train_images": np.stack([IMAGES] * 3, 3), "train_labels": LABELS}, (3, 4, 4)),
    ],
)
def test_npz(tmp_path, arrays, shape):
    np.savez(tmp_path / "a.npz", **arrays)
    train = load_data(tmp_path / "a.npz").train
    assert train.classes == ("3", "8")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.raw(0).shape == shape
    image = train.prepared(Preprocess(4, 4, mean=(0, 0, 0), std=(1, 1, 1)))[5][0]
    assert torch.allclose(image, torch.from_numpy(IMAGES[5] / 255).float().expand(3, 4, 4))


def test_npz_with_splits(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[2:4], y_test=LABELS[2:4])
    splits = load_data(tmp_path / "a.npz")
    assert splits.val is None
    assert splits.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, r"expected one of \('x', .* found \['x'\]"),
        ({"a": IMAGES}, r"found \['a'\]"),
        ({"x": IMAGES, "y": LABELS, "x_val": IMAGES}, r"expected one of \('x_val', 'val_images'\) with one of"),
        ({"x": IMAGES[0], "y": LABELS}, r"x must have the shape .* got \(4, 4\)"),
        ({"x": IMAGES[..., None, None], "y": LABELS}, r"x must have the shape"),
        ({"x": IMAGES.astype("int64"), "y": LABELS}, "x must be uint8, or floating point in .* got int64"),
        (
            {"x": IMAGES.astype("float32"), "y": LABELS},
            r"x must be in \[0, 1\] without NaN: 6 images are not, .* from 0 to 15",
        ),
        ({"x": np.where(IMAGES == 20, np.nan, 0.5), "y": LABELS}, "1 images are not, the first is number 1,"),
        ({"x": IMAGES, "images": IMAGES, "y": LABELS}, r"found \['images', 'x', 'y'\]"),
        ({"x": IMAGES, "y": LABELS[:5]}, r"x has 6 images, expected one per label \(5\)"),
        ({"x": IMAGES, "y": LABELS * 1.0}, r"y must be integers or strings of shape \(n,\), got float64"),
        ({"x": IMAGES, "y": np.stack([LABELS] * 2, 1)}, r"got int64 of shape \(6, 2\)"),
        ({"x": IMAGES, "y": LABELS * 0}, "y: expected at least two classes, got 6 images, all of class 0"),
        ({"x": IMAGES, "y": np.array([object()] * 6)}, "expected an .npz file of plain arrays: Object arrays"),
        (
            {"x": IMAGES, "y": LABELS, "x_test": IMAGES, "y_test": LABELS + 5},
            r"y_test has classes \[13\] that y does not",
        ),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("order", ["<", ">"])
def test_npz_of_either_byte_order_and_layout(tmp_path, order):
    """Arrays that are not needed are not read: they may hold objects, which would have to be unpickled."""
    images = np.asfortranarray((IMAGES / 255).astype(f"{order}f4"))
    labels = LABELS.astype(f"{order}i8")
    with (tmp_path / "A.NPZ").open("wb") as file:
        np.savez(file, x=images, y=labels, notes=np.array([object()]))
    train = load_data(tmp_path / "A.NPZ").train
    assert torch.equal(train.images, torch.from_numpy((IMAGES / 255).astype(np.float32)))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.classes == ("3", "8")


def test_files_that_are_no_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"expected an .npz file of plain arrays"):
        load_data(tmp_path / "a.npz")
    (tmp_path / "a.doc").write_text("1,2")
    with pytest.raises(
        ValueError, match=r"must be a folder of images, an .npz file or one of digits, .*texts \(.jsonl.*, got the file"
    ):
        load_data(tmp_path / "a.doc")


# --- preprocessing and splits ---


def test_preprocess():
    image = torch.arange(8 * 12, dtype=torch.uint8).reshape(8, 12)
    whole = Preprocess(8, 8, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert torch.allclose(whole, (image[:, 2:10] / 255).expand(3, 8, 8))  # the centre, in three equal channels
    assert Preprocess()(image).shape == (3, 224, 224)
    assert Preprocess(7)(torch.rand(3, 30, 9)).shape == (3, 7, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"size": 9, "resize": 8}, r"resize must be at least size \(9\), got 8"),
        ({"std": (1, 0, 1)}, "std must be positive"),
        ({"mean": (1,)}, "three values"),
    ],
)
def test_bad_preprocess(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


def test_normalised_like_the_images():
    images = ImageSet(torch.rand(40, 3, 6, 6), torch.arange(40) % 2, ("a", "b"))
    fitted = normalised_like(Preprocess(6, 6), images)
    seen = torch.stack([images.prepared(fitted)[i][0] for i in range(40)])
    assert torch.allclose(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(seen.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    with pytest.raises(ValueError, match="images must vary"):
        normalised_like(Preprocess(6, 6), ImageSet(torch.ones(4, 6, 6), torch.arange(4) % 2, ("a", "b")))


def test_stratified_split():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    parts = stratified_split(labels, [0.2, 0.2], seed=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(63))
    assert [labels[p].bincount().tolist() for p in parts] == [[30, 6, 1], [10, 2, 1], [10, 2, 1]]
    assert all(torch.equal(a, b) for a, b in zip(parts, stratified_split(labels, [0.2, 0.2], seed=1)))
    assert not torch.equal(parts[1], stratified_split(labels, [0.2, 0.2], seed=2)[1])
    with pytest.raises(ValueError, match=r"photos: class 1 has 2 images, too few to split into 3 parts"):
        stratified_split(torch.tensor([0, 0, 0, 1, 1]), [0.2, 0.2], seed=0, name="photos")


def test_stratified_order_is_in_proportion_everywhere():
    labels = torch.tensor([0] * 60 + [1] * 30)
    order = stratified_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(90))
    assert [labels[order[i : i + 9]].sum().item() for i in range(0, 90, 9)] == [3] * 10


def test_completing_splits(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((100, 4, 4), np.uint8), y=np.arange(100) % 2)
    splits = load_data(tmp_path / "a.npz")
    parts = splits.complete(val=0.25, test=0.2, seed=0)
    assert [len(p) for p in parts] == [60, 20, 20]
    parts = splits.complete(val=0.25, test=0.2, seed=0, max_train=40, max_test=10)
    assert [p.labels.bincount().tolist() for p in parts] == [[15, 15], [5, 5], [5, 5]]
    with pytest.raises(ValueError, match="max_test must be at least 1, got 0"):
        splits.complete(val=0.25, test=0.2, seed=0, max_test=0)


# --- optional packages ---


def test_require(monkeypatch):
    assert require("json", "lab", "this") is __import__("json")
    with pytest.raises(ImportError, match=r'the picture needs no_such, .* pip install "ctkernels\[lab\]"'):
        require("no_such.thing", "lab", "the picture")


def test_the_core_imports_without_the_extras():
    """The laboratory can be imported, and their help read, with torch alone."""
    blocked = ("numpy", "sklearn", "matplotlib", "tqdm", "PIL", "torchvision", "timm", "safetensors", "threadpoolctl")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import ctkernels.lab\n"
        "from ctkernels import cli\n"
        "sys.exit(cli.main(['steer', 'digits', '--model', 'torch.nn:Identity']))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert "the plot needs matplotlib" in done.stderr
    assert 'pip install "ctkernels[lab]"' in done.stderr
