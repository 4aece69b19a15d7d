"""Image files of every kind that Pillow reads: their values and their turn, or the reason why they are refused."""

import struct
import zlib

import pytest
import torch
from torch.utils.data import DataLoader

from ctkernels.lab import load_data
from ctkernels.lab.images.sets import UnreadableImage, read_image

np = pytest.importorskip("numpy", reason="the laboratory needs numpy")
Image = pytest.importorskip("PIL.Image", reason="image files need pillow")

RAMP = np.linspace(0, 1, 6 * 4).reshape(4, 6)
GREY = torch.from_numpy(np.rint(255 * RAMP).astype(np.uint8))


def saved(image, path, **options):
    try:
        image.save(path, **options)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow cannot write {path.suffix}: {error}")
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_sixteen_bits_are_scaled_by_their_range(name, tmp_path):
    path = saved(Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16)), tmp_path / name)
    found = read_image(path)
    assert found.shape == (3, 4, 6)
    assert torch.equal(found[0], found[2])
    assert (found[0].int() - GREY.int()).abs().max() <= 1  # 65535 = 257 * 255: another rounding at most


def test_twelve_bits_of_a_tiff_are_scaled_by_their_range(tmp_path):
    """Two pixels, 0 and 4095, packed into three bytes; Pillow cannot write them."""
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 3, 1), (279, 4, 3)]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    content = struct.pack("<2sHI", b"II", 42, 12) + bytes((0, 15, 255, 0))
    (tmp_path / "a.tif").write_bytes(content + struct.pack("<H", len(entries)) + table + bytes(4))
    assert read_image(tmp_path / "a.tif")[0].tolist() == [[0, 255]]


def test_floating_point_is_read_in_its_range_and_refused_outside(tmp_path):
    path = saved(Image.fromarray(RAMP.astype(np.float32)), tmp_path / "a.tif")
    assert torch.equal(read_image(path)[1], GREY)
    for value, shown in ((1.5, "from 0 to 1.5"), (float("nan"), "from nan to nan")):
        bad = RAMP.astype(np.float32)
        bad[-1, -1] = value
        with pytest.raises(UnreadableImage, match=rf"a.tif: expected floating point in \[0, 1\], .* {shown}"):
            read_image(saved(Image.fromarray(bad), tmp_path / "a.tif"))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
def test_the_turn_of_a_camera_is_applied_once(name, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the top is on the right: to be turned by 90 degrees clockwise
    lying = Image.new("RGB", (24, 16), "black")
    lying.paste("white", (0, 0, 12, 16))  # the left half
    found = read_image(saved(lying, tmp_path / name, exif=exif)).float()
    assert found.shape == (3, 24, 16)
    assert found[:, :11].mean() > 230  # the left half has come to the top
    assert found[:, 13:].mean() < 25


PALETTE = Image.new("P", (3, 2), 7)
PALETTE.putpalette([*[50] * 21, 10, 20, 30])  # entry 7


@pytest.mark.parametrize(
    ("name", "image", "options", "colour"),
    [
        ("palette.png", PALETTE, {}, (10, 20, 30)),
        ("palette-clear.png", PALETTE, {"transparency": 7}, (255, 255, 255)),
        ("palette-half.png", PALETTE, {"transparency": bytes([255] * 7 + [51])}, (206, 208, 210)),
        ("palette-clear.gif", PALETTE, {"transparency": 7}, (255, 255, 255)),
        ("grey-clear.png", Image.new("LA", (3, 2), (9, 0)), {}, (255, 255, 255)),
        ("grey-opaque.png", Image.new("LA", (3, 2), (9, 255)), {}, (9, 9, 9)),
        ("colour-half.png", Image.new("RGBA", (3, 2), (10, 20, 30, 51)), {}, (206, 208, 210)),
        ("colour-key.png", Image.new("RGB", (3, 2), (10, 20, 30)), {"transparency": (10, 20, 30)}, (255, 255, 255)),
        ("deep-key.png", Image.fromarray(np.full((2, 3), 700, np.uint16)), {"transparency": 700}, (255, 255, 255)),
        ("ink.tif", Image.new("CMYK", (3, 2), (0, 255, 255, 0)), {}, (255, 0, 0)),
        ("bits.png", Image.new("1", (3, 2), 1), {}, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_the_colour_it_stands_for(name, image, options, colour, tmp_path):
    """A fifth of (10, 20, 30) on white is (206, 208, 210)."""
    found = read_image(saved(image, tmp_path / name, **options))
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 2, 3))


GREYS = [Image.new("L", (5, 4), 60), Image.new("L", (5, 4), 200)]


@pytest.mark.parametrize(
    ("name", "image", "options", "message"),
    [
        ("wide.tif", Image.new("I", (5, 4), 70000), {}, "it has the mode I in a way that leaves open"),
        ("lab.tif", Image.new("LAB", (5, 4)), {}, "it has the mode LAB"),
        ("inverse.tif", Image.fromarray(np.ones((4, 5), np.uint16)), {"tiffinfo": {262: 0}}, "it has the mode I;16"),
        ("moves.gif", GREYS[0], {"save_all": True, "append_images": GREYS[1:]}, "expected one image, it has 2 frames"),
        ("moves.png", GREYS[0], {"save_all": True, "append_images": GREYS[1:]}, "it has 2 frames"),
        ("pages.tif", GREYS[0], {"save_all": True, "append_images": GREYS[1:]}, "it has 2 frames"),
        ("moves.webp", GREYS[0], {"save_all": True, "append_images": GREYS[1:]}, "it has 2 frames"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused_before_any_work(name, image, options, message, tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        GREYS[0].save(tmp_path / label / "0.png")
    path = saved(image, tmp_path / "b" / name, **options)
    with pytest.raises(UnreadableImage, match=rf"cannot read image .*{name}: .*{message}"):
        read_image(path)
    with pytest.raises(ValueError, match=rf"cannot read image .*{name}: .*{message}"):
        load_data(tmp_path)


def test_a_photograph_with_previews_is_its_first_picture(tmp_path):
    colours = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    path = saved(colours[0], tmp_path / "a.jpg", format="MPO", save_all=True, append_images=colours[1:])
    assert read_image(path)[0].float().mean() > 240


def test_an_image_that_claims_to_be_huge_is_named(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        GREYS[0].save(tmp_path / label / "0.png")
    (tmp_path / "a" / "9.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"9.png: Image size \(3600000000 pixels\) exceeds limit .* Scale it down"):
        load_data(tmp_path)


def test_a_bad_image_is_told_in_one_line_by_a_worker_process(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        GREYS[0].save(tmp_path / label / "0.png")
    images = load_data(tmp_path).train
    (tmp_path / "b" / "0.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:50])
    with pytest.raises(UnreadableImage) as caught:
        list(DataLoader(images, num_workers=1))
    assert str(caught.value).startswith(f"cannot read image {tmp_path / 'b' / '0.png'}: ")
    assert "\n" not in str(caught.value)


def test_every_file_is_read_or_named(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label / "more").mkdir(parents=True)
        GREYS[0].save(tmp_path / label / "0.png")
    for name in ("1.JFIF", "2.jpe", "more/3.webp", "folder.png/4.png"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        GREYS[1].save(tmp_path / "a" / name, format="PNG")
    for name in ("a/notes.txt", "a/more/raw.cr2", "loose.png", "README.md", "a/Thumbs.db", "a/.hidden.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="not read") as told:
        train = load_data(tmp_path).train
    assert [p.name for p in train.images] == ["0.png", "1.JFIF", "2.jpe", "4.png", "3.webp", "0.png"]
    messages = [str(w.message) for w in told]
    assert len(messages) == 2
    assert messages[0] == f"{tmp_path}: 1 images not read (they are in no class): loose.png"
    assert messages[1].startswith(f"{tmp_path}: 2 files not read (images end in .png, ")
    assert messages[1].endswith("): a/more/raw.cr2, a/notes.txt")


def test_folders_beside_the_splits_are_named(tmp_path):
    for split in ("train", "val", "valid", "extra"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            GREYS[0].save(tmp_path / split / label / "0.png")
    with pytest.warns(UserWarning, match=r"2 folders not read \(the splits are train, val\): extra, valid"):
        load_data(tmp_path)
