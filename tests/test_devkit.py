"""Ids, classes, image-level labels, photographs and masks of a devkit."""

import numpy as np
import pytest
from helpers import noise_image, working_directory, write_annotation, write_image
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
        ("a.jpg\nb.JPG\nc.png\n", ["a", "b", "c"]),
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


def test_voc_has_20_classes_in_alphabetical_order():
    assert len(room.VOC_CLASSES) == 20
    assert [*room.VOC_CLASSES] == sorted(room.VOC_CLASSES)


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


def test_default_label_file_may_be_absent_another_may_not(devkit, tmp_path):
    write_annotation(devkit.root, "a", ["rust"])
    with working_directory(tmp_path):
        assert Devkit(devkit.root, CLASSES, room.LABEL_FILE).image_label("a").tolist() == [0, 1, 0]
        with pytest.raises(DataError, match=r"mine\.npy"):
            Devkit(devkit.root, CLASSES, "mine.npy")


BILLION_LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "crack"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


EXTERNAL = """<!DOCTYPE annotation [<!ENTITY x SYSTEM "file:///etc/hostname">]>
<annotation><object><name>&x;</name></object></annotation>"""


@pytest.mark.parametrize("text", [BILLION_LAUGHS, EXTERNAL, "", "<annotation><object>"])
def test_annotations_with_entities_or_without_an_end_are_refused(text, devkit):
    write_annotation(devkit.root, "a", []).write_text(text)
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
