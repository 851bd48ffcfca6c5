"""Ids, classes, image-level labels, photographs and masks of a devkit."""

import numpy as np
import pytest
from helpers import noise_image, working_directory, write_annotation, write_image, write_mask
from PIL import Image

from tool.labels import VOID
from tool.maps import save_npy_dict
from tool.run.errors import DataError
from voc12 import devkit as room
from voc12.devkit import Devkit

CLASSES = ("crack", "rust", "moss")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    return tmp_path / "VOC"


@pytest.fixture
def devkit(root):
    return Devkit(root, CLASSES)


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


def test_ids_cannot_leave_the_folder(devkit, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("../../secret.jpg\n/etc/passwd\n")
    for image_id in room.read_ids(path):
        assert devkit.image_path(image_id).parent == devkit.root / "JPEGImages"


# Class lists


def test_voc_classes_are_the_default():
    names = room.read_class_names(None)
    assert len(names) == 20
    assert names == tuple(sorted(names))
    assert (names[0], names[-1]) == ("aeroplane", "tvmonitor")


def test_class_names_of_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufefftraffic light\r\n\r\n# gone\r\nzebra\r\nant\r\n".encode())
    assert room.read_class_names(path) == ("traffic light", "zebra", "ant")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no class names"),
        ("cat\ndog\ncat\n", "'cat' is there twice"),
        ("background\ncat\n", "leave out background"),
        ("\n".join(f"c{k}" for k in range(255)), "255 classes"),
    ],
)
def test_class_files_that_cannot_be(text, words, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        room.read_class_names(path)
    assert str(path) in str(error.value)


def test_most_classes_that_index_images_hold(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(f"c{k}" for k in range(254)))
    assert len(room.read_class_names(path)) == 254


# Image-level labels


def test_label_from_the_annotation(root, devkit):
    path = write_annotation(root, "a", [])
    path.write_text(
        "<annotation><object><name> moss </name><difficult>1</difficult>"
        "<part><name>leaf</name></part></object>"
        "<object><name>crack</name></object><object><name>crack</name></object></annotation>"
    )
    label = devkit.image_label("a")
    assert label.dtype == np.float32
    assert label.tolist() == [1, 0, 1]


def test_no_object_no_class(root, devkit):
    write_annotation(root, "a", [])
    assert devkit.image_label("a").tolist() == [0, 0, 0]


def test_label_file_comes_first_and_annotations_fill_in(root, tmp_path):
    save_npy_dict(tmp_path / "labels.npy", {"a": np.array([0, 1, 0], np.float32)})
    write_annotation(root, "a", ["moss"])
    write_annotation(root, "b", ["moss"])
    devkit = Devkit(root, CLASSES, tmp_path / "labels.npy")
    assert devkit.image_label("a").tolist() == [0, 1, 0]
    assert devkit.image_label("b").tolist() == [0, 0, 1]


def test_default_label_file_may_be_absent_another_may_not(root, tmp_path):
    write_annotation(root, "a", ["rust"])
    with working_directory(tmp_path):
        assert Devkit(root, CLASSES, room.LABEL_FILE).image_label("a").tolist() == [0, 1, 0]
        with pytest.raises(DataError, match=r"mine\.npy"):
            Devkit(root, CLASSES, "mine.npy")


@pytest.mark.parametrize("label", [np.zeros(20, np.float32), np.zeros(()), np.array(["rust"] * 3)])
def test_label_that_is_not_a_number_for_each_class(label, root, tmp_path):
    save_npy_dict(tmp_path / "labels.npy", {"a": label})
    devkit = Devkit(root, CLASSES, tmp_path / "labels.npy")
    with pytest.raises(DataError, match=r"labels\.npy.* a .*3 classes"):
        devkit.image_label("a")


BILLION_LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "crack"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


@pytest.mark.parametrize(
    "text", [BILLION_LAUGHS, "", "<annotation><object>", "no markup", "\x00\x01"]
)
def test_annotations_that_cannot_be_read(text, root, devkit):
    write_annotation(root, "a", []).write_text(text)
    with pytest.raises(DataError, match=r"a\.xml: not a readable annotation"):
        devkit.image_label("a")


def test_external_entities_are_not_read(root, devkit, tmp_path):
    (tmp_path / "secret.txt").write_text("crack")
    write_annotation(root, "a", []).write_text(
        f'<!DOCTYPE annotation [<!ENTITY x SYSTEM "file://{tmp_path}/secret.txt">]>'
        "<annotation><object><name>&x;</name></object></annotation>"
    )
    with pytest.raises(DataError, match=r"a\.xml"):
        devkit.image_label("a")


# Devkits and images


def test_gray_photograph_has_three_equal_channels(root, devkit):
    gray = np.arange(48, dtype=np.uint8).reshape(6, 8)
    write_image(root, "a", Image.fromarray(gray))
    assert (np.asarray(devkit.load_image("a")) == gray[..., None]).all()


def test_palette_photograph_shows_its_colours(root, devkit):
    colours = np.zeros((2, 2, 3), np.uint8)
    colours[0, 0], colours[1, 1] = (255, 0, 0), (0, 0, 255)
    write_image(root, "a", Image.fromarray(colours).quantize(8))
    assert (np.asarray(devkit.load_image("a")) == colours).all()


def test_cmyk_photograph_shows_its_colours(root, devkit):
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    write_image(root, "a", flat.convert("CMYK"), "JPEG")
    image = np.asarray(devkit.load_image("a")).astype(int)
    assert image.shape == (16, 16, 3)
    assert abs(image - (200, 40, 90)).max() <= 6


def test_transparent_photograph_keeps_its_colours(root, devkit):
    image = noise_image(5, 7).convert("RGBA")
    image.putalpha(40)
    write_image(root, "a", image)
    loaded = devkit.load_image("a")
    assert loaded.mode == "RGB"
    assert (np.asarray(loaded) == np.asarray(noise_image(5, 7))).all()


def test_16_bit_photograph_keeps_its_high_bytes(root, devkit):
    values = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], np.uint16)
    write_image(root, "a", Image.fromarray(values))
    image = np.asarray(devkit.load_image("a"))
    assert (image == (values >> 8)[..., None]).all()


def test_bilevel_photograph(root, devkit):
    write_image(root, "a", Image.fromarray(np.eye(4, dtype=bool)))
    assert (np.asarray(devkit.load_image("a"))[..., 0] == 255 * np.eye(4)).all()


def test_masks_are_indices(root, devkit):
    mask = np.array([[0, 1], [2, VOID]], np.uint8)
    write_mask(root, "a", mask)
    assert (devkit.load_mask("a") == mask).all()
    noise_image(2, 2).save(devkit.mask_path("b"))
    with pytest.raises(DataError, match=r"b\.png: has mode RGB"):
        devkit.load_mask("b")
    with pytest.raises(DataError, match=r"c\.png: no such file"):
        devkit.load_mask("c")
