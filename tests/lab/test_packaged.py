"""Data sets of libraries and of functions, and classifiers of transformers."""

import pytest
import torch

from ctkernels.lab import load_data, load_model, stratified_split

numpy = pytest.importorskip("numpy", reason="the laboratory needs numpy")


def test_digits():
    pytest.importorskip("sklearn")
    splits = load_data("digits")
    assert splits.train.images.shape == (1797, 8, 8)
    assert splits.train.images.min() == 0
    assert splits.train.images.max() == 1
    assert (splits.val, splits.test) == (None, None)
    assert sorted(splits.train.labels.unique().tolist()) == list(range(10))


def test_data_from_a_function(tmp_path):
    (tmp_path / "my_images.py").write_text(
        "import torch\n"
        "from ctkernels.lab import ImageSet, Splits\n"
        "def make():\n"
        "    return Splits(ImageSet(torch.zeros(2, 4, 4), torch.arange(2), ('a', 'b')), None, None, 'mine')\n"
        "def other():\n"
        "    return 3\n"
    )
    assert load_data(f"{tmp_path / 'my_images.py'}:make").source == "mine"
    with pytest.raises(ValueError, match="must return a Splits or TextData, got int"):
        load_data(f"{tmp_path / 'my_images.py'}:other")
    with pytest.raises(ValueError, match=r"has no function 'gone'"):
        load_data(f"{tmp_path / 'my_images.py'}:gone")


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist-5k", "emoji"])
def test_names_that_became_functions_are_told(name):
    with pytest.raises(ValueError, match=f"data: {name} is now examples.data:{name.replace('-', '_')}"):
        load_data(name)


def write_idx(path, array):
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
    attached = method("tct").attach(network, head, {"lr": 0.1, "head_lr": 1e-3}, ("gelu",), torch.zeros(1, 3, 16, 16))
    assert attached.parameters == 2 * 12  # a beta and a coeff for each of the hidden channels
    assert logits_of(attached.network, torch.zeros(2, 3, 16, 16)).shape == (2, 5)
