"""Ids, classes, image-level labels, photographs and masks of a devkit."""

import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import noise_image, working_directory, write_annotation, write_image, write_mask
from PIL import Image

from tool.maps import save_npy_dict
from tool.run.errors import DataError
from voc12 import devkit as room
from voc12.devkit import Devkit

CLASSES = ("crack", "rust", "moss")


@pytest.fixture
def devkit(tmp_path):
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    return Devkit(tmp_path / "VOC", CLASSES)


# Id lists


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n", ["2007_000032"]),
        ("2007_000032\n2007_000039\n", ["2007_000032", "2007_000039"]),
        ("2007_000032", ["2007_000032"]),  # no newline at the end
        ("img.v2.01\n/JPEGImages/img.v2.02.jpg\n", ["img.v2.01", "img.v2.02"]),
        ("a.jpg\nb.JPG\nc.png\nd.tiff\ne.v2.WebP\n", ["a", "b", "c", "d", "e.v2"]),
        ("/JPEGImages/my photo.TIF /X/my photo.png\n/x/a.bmp 1\n", ["my photo", "a"]),
        ("\\JPEGImages\\a.v2.jpg \\X\\a.v2.png\nJPEGImages\\b\n", ["a.v2", "b"]),
        ("C:\\my VOC\\my b.PNG 1\n", ["my b"]),
        # As in VOC's Main lists: -1 absent, 1 there, 0 difficult
        ("a -1\nb  1\nc\t0\n/x/my d.jpg -1\r\n-1\ne-1\n", ["b", "c", "-1", "e-1"]),
        ("# all of them\n\n  a  \n\t\nb # blurred\n#c\n", ["a", "b"]),
        ("a\r\n\r\n/JPEGImages/b.jpg /X/b.png\r\n", ["a", "b"]),
        ("\ufeffa\nb\n", ["a", "b"]),
        ("b\na\nb\n", ["b", "a", "b"]),  # the list's order and its repetitions
        ("Größe_1\n7\n", ["Größe_1", "7"]),
    ],
)
def test_ids_of_a_list(text, ids, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode())
    assert room.read_ids(path) == ids


@pytest.mark.parametrize("field", ["..", ".", "/", "/JPEGImages/..", "a\\b", "a\0b", "\x1b[2J"])
def test_ids_that_name_no_file_are_refused(field, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"good\n{field}\n")
    with pytest.raises(DataError, match="cannot be an image id") as error:
        room.read_ids(path)
    assert str(path) in str(error.value)


# Class lists


def test_class_names_of_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufefftraffic light\r\n\r\n# gone\r\nzebra\r\nant\r\n".encode())
    assert room.read_class_names(path) == ("traffic light", "zebra", "ant")
    path.write_text("\n".join(f"c{k}" for k in range(254)))  # as many as index images hold
    assert len(room.read_class_names(path)) == 254


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no class names"),
        ("cat\ndog\ncat\n", "'cat' is there twice"),
        ("background\ncat\n", "leave out background"),
        ("\n".join(f"c{k}" for k in range(255)), "255 classes"),
    ],
)
def test_class_files_that_cannot_be_used(text, words, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        room.read_class_names(path)
    assert str(path) in str(error.value)


# Image-level labels


def test_label_from_the_annotation(devkit):
    path = write_annotation(devkit.root, "a", [])
    path.write_text(
        "<annotation><object><name> moss </name><difficult>1</difficult>"
        "<part><name>leaf</name></part></object>"
        "<object><name>crack</name></object><object><name>crack</name></object></annotation>"
    )
    label = devkit.image_label("a")
    assert label.dtype == np.float32
    assert label.tolist() == [1, 0, 1]
    path.unlink()
    assert devkit.image_label("a").tolist() == [1, 0, 1]  # read once


def test_label_file_comes_first_and_annotations_fill_in(devkit, tmp_path):
    save_npy_dict(tmp_path / "labels.npy", {"a": np.array([0, 1, 0], np.float32)})
    write_annotation(devkit.root, "a", ["moss"])
    write_annotation(devkit.root, "b", ["moss"])
    devkit = Devkit(devkit.root, CLASSES, tmp_path / "labels.npy")
    assert devkit.image_label("a").tolist() == [0, 1, 0]
    assert devkit.image_label("b").tolist() == [0, 0, 1]


TABLES = {
    "names": "a,crack;moss\n2007000032,rust\nc,\n",
    "names in columns": "# mine\na, moss ,crack\n2007000032,rust,\nc,,\n",
    "columns": "id,moss,rust,crack\na,1,0,1\n2007000032,0,1,0\nc,0,0,0\n",
    "part of the columns": "\ufeffimage,rust,crack,moss,wombat\r\na,0,1,1,0\r\n"
    "2007000032,1,0,0,0\r\nc,0,0,0,0\r\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_labels_of_a_table(text, devkit, tmp_path):
    (tmp_path / "labels.CSV").write_text(text, "utf-8", newline="")
    labelled = Devkit(devkit.root, CLASSES, tmp_path / "labels.CSV")
    expected = {"a": [1, 0, 1], "2007_000032": [0, 1, 0], "c": [0, 0, 0]}
    for image_id, label in expected.items():
        assert labelled.image_label(image_id).tolist() == label
        assert labelled.image_label(image_id).dtype == np.float32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,crack;wombat", "'wombat', of 'a', is not a known class; see --classes"),
        ("id,crack,rust\na,1,2", "'1', of 'a', is not a known class"),
        ('a,"crack\0', "labels.csv"),
    ],
)
def test_tables_that_are_no_labels(text, words, devkit, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        Devkit(devkit.root, CLASSES, tmp_path / "labels.csv")


def test_labels_of_other_repositories(devkit, tmp_path):
    path = tmp_path / "cls_labels_onehot.npy"
    np.save(path, {2007000032: np.array([1, 0, 1]), "2008_000001": torch.tensor([0.0, 1, 0])})
    labelled = Devkit(devkit.root, CLASSES, path)
    assert labelled.image_label("2007_000032").tolist() == [1, 0, 1]
    assert labelled.image_label("2008_000001").tolist() == [0, 1, 0]


def test_default_label_file_may_be_absent_another_may_not(devkit, tmp_path):
    write_annotation(devkit.root, "a", ["rust"])
    with working_directory(tmp_path):
        assert Devkit(devkit.root, CLASSES, room.LABEL_FILE).image_label("a").tolist() == [0, 1, 0]
        with pytest.raises(DataError, match=r"mine\.npy"):
            Devkit(devkit.root, CLASSES, "mine.npy")


BILLION_LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "crack"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


def test_annotations_with_entities_are_refused(devkit):
    write_annotation(devkit.root, "a", []).write_text(BILLION_LAUGHS)
    with pytest.raises(DataError, match=r"a\.xml: not a readable annotation"):
        devkit.image_label("a")


# Devkits and images


GRAY = np.arange(48, dtype=np.uint8).reshape(6, 8)
DEEP = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], np.uint16)
COLOURS = np.zeros((2, 2, 3), np.uint8)
COLOURS[0, 0], COLOURS[1, 1] = (255, 0, 0), (0, 0, 255)
CLEAR = noise_image(5, 7).convert("RGBA")
CLEAR.putalpha(40)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GRAY), GRAY[..., None]),
        (Image.fromarray(np.eye(4, dtype=bool)), 255 * np.eye(4)[..., None]),
        (Image.fromarray(DEEP), (DEEP >> 8)[..., None]),
        (Image.fromarray(COLOURS).quantize(8), COLOURS),
        (CLEAR, np.asarray(noise_image(5, 7))),
    ],
    ids=["gray", "1 bit", "16 bits", "palette", "transparent"],
)
def test_photograph_is_converted_to_rgb(image, expected, devkit):
    write_image(devkit.root, "a", image)
    loaded = devkit.load_image("a")
    assert loaded.mode == "RGB"
    assert (np.asarray(loaded) == expected).all()


def test_cmyk_photograph_shows_its_colours(devkit):
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    write_image(devkit.root, "a", flat.convert("CMYK"), "JPEG")
    image = np.asarray(devkit.load_image("a")).astype(int)
    assert image.shape == (16, 16, 3)
    assert abs(image - (200, 40, 90)).max() <= 6


DEPTHS = [("u2", 1), ("u2", 4), ("u2", 64), ("f4", 1 / 255), ("f4", 16)]


@pytest.mark.parametrize(("kind", "scale"), DEPTHS)
def test_deep_gray_is_scaled_by_the_range_that_it_shows(kind, scale, devkit):
    levels = np.array([[0, 1, 37], [100, 200, 255]])
    write_image(devkit.root, "a", Image.fromarray((levels * scale).astype(kind)), "TIFF")
    assert (np.asarray(devkit.load_image("a")) == levels[..., None]).all()


@pytest.mark.parametrize("values", [(0, 5.5), (-1, 1), (0, 1e6), (np.nan, 1)])
def test_gray_of_an_unknown_range_is_refused(values, devkit):
    write_image(devkit.root, "a", Image.fromarray(np.array([values], np.float32)), "TIFF")
    with pytest.raises(DataError, match=r"a\.jpg: .*\(values from .* 0\.\.1\)"):
        devkit.load_image("a")


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a colour, from H x W x 3; Pillow writes none."""
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    file = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file


def test_colours_of_which_only_the_upper_bits_are_read_are_not_black(devkit, rng):
    colours = rng.integers(0, 2**16, (4, 5, 3))
    (devkit.root / "JPEGImages" / "a.png").write_bytes(deep_png(colours))
    assert np.array_equal(devkit.load_image("a"), colours >> 8)
    (devkit.root / "JPEGImages" / "b.jpg").write_bytes(deep_png(colours >> 4))
    with pytest.raises(DataError, match=r"b\.jpg: .*8 bits"):
        devkit.load_image("b")


def test_photograph_is_found_by_its_id_with_any_ending(devkit):
    folder = devkit.root / "JPEGImages"
    for suffix in (".ppm", ".GIF", ".webp", ".TIFF", ".tif", ".PNG", ".jpeg", ".JPG", ".jpg"):
        (folder / f"a.b{suffix}").touch()
        assert devkit.image_path("a.b").name == f"a.b{suffix}"  # before those that were there
        devkit.require_images(["a.b"])
    assert devkit.image_path("c").name == "c.jpg"


@pytest.mark.parametrize(("kind", "orientation"), [("JPEG", 6), ("PNG", 5), ("PNG", 1)])
def test_label_of_another_size_than_a_turned_photograph(kind, orientation, devkit):
    image = noise_image(6, 8)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(devkit.root / "JPEGImages" / "a.jpg", kind, exif=exif)
    path = write_mask(devkit.root, "a", np.zeros((8, 6)))
    way = "EXIF" if orientation > 4 else "make it again"
    with pytest.raises(DataError, match=rf"a\.png is 8 x 6, .* is 6 x 8; .*{way}"):
        devkit.load_label(path, (6, 8))
