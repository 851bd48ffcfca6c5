"""Whatever an input file holds, reading it gives its content or one sentence with its name."""

import io

import numpy as np
import pytest
from helpers import noise_image
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tool.maps import load_cams, save_maps, save_npy_dict
from tool.run.errors import DataError
from voc12.devkit import Devkit, read_class_names, read_ids, require_ids
from voc12.prepare import write_list

CLASSES = ("crack", "rust", "moss")
# Characters that have a meaning in a list, a path or markup, among any others.
names = st.text(st.one_of(st.sampled_from("./\\# \t\n\r\0ab~:%&<>\"'jpg-"), st.characters()))
names = st.one_of(names, st.builds("{}.jpg {}".format, names, names))


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for name in ("JPEGImages", "Annotations", "SegmentationClass"):
        (root / name).mkdir()
    return Devkit(root, CLASSES)


def read_or_refused(read, path):
    """What ``read(path)`` gives, or None where it refuses the file in one sentence.

    Anything else that it raises fails the test.
    """
    try:
        return read(path)
    except DataError as error:
        assert str(path) in str(error)
        assert str(error).isprintable(), str(error)
        assert len(str(error)) < 500 + len(str(path))
        return None


# Lists, classes and labels


@given(st.one_of(st.binary(), st.lists(names).map("\n".join)))
def test_any_list_holds_ids_of_files_in_the_folders_or_is_refused(devkit, content):
    path = devkit.root / "list.txt"
    is_text = isinstance(content, str)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if is_text else content)
    for image_id in read_or_refused(read_ids, path) or []:
        for file in (devkit.image_path, devkit.annotation_path, devkit.mask_path):
            assert file(image_id).resolve().parent == file("x").resolve().parent
            assert not file(image_id).exists()  # the system accepts the name
    read_or_refused(read_class_names, path)


@given(names, st.booleans())
@example("my photo", True)
@example("Größe 写真.2", True)
@example("a#1", True)
@example("a.jpg b", True)
@example("a #1", True)
def test_an_id_comes_back_from_a_list_or_is_refused(devkit, image_id, with_mask):
    try:
        require_ids("here", [image_id])
    except DataError:
        assert image_id not in ("my photo", "Größe 写真.2", "a#1")
        return
    path = devkit.root / "list.txt"
    write_list(path, devkit, ["before", image_id], with_mask)
    assert read_ids(path) == ["before", image_id]


@given(st.one_of(st.binary(), st.text(st.sampled_from("<>/&;![]\"'%= annotationobjectname"))))
def test_any_bytes_are_an_annotation_or_refused(devkit, content):
    path = devkit.annotation_path("a")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    read_or_refused(lambda _: devkit.annotated_label("a"), path)


@given(
    st.one_of(
        hnp.arrays(np.float64, 3, elements=st.sampled_from([0, 1, 2, 0.5, np.nan, np.inf])),
        st.lists(st.sampled_from([0, 1, True, None, "1", [1]]), max_size=4),
        st.sampled_from(["crack", None, {}, 7]),
    )
)
def test_any_entry_of_a_label_file_is_a_label_or_refused(devkit, entry):
    path = devkit.root / "labels.npy"
    save_npy_dict(path, {"a": entry})
    labelled = Devkit(devkit.root, CLASSES, path)
    label = read_or_refused(lambda _: labelled.image_label("a"), path)
    if label is not None:
        assert (label.shape, label.dtype) == ((3,), np.float32)
        assert set(label.tolist()) <= {0, 1}
        assert label.tolist() == np.float32(entry).tolist()


# Maps

keys = st.one_of(st.integers(-2, 4), st.sampled_from(["0", "cat", 1.5, None, True, (1, 2)]))
cells = st.one_of(st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0]))
arrays = hnp.arrays(np.float32, st.sampled_from([(2, 3), (3, 2), (0, 3), (6,)]), elements=cells)
values = st.one_of(arrays, st.sampled_from([None, 3, "map", [1, 2], np.zeros((2, 3), "U1")]))


@given(st.dictionaries(keys, values, max_size=3))
def test_any_dict_is_maps_of_the_image_or_refused(devkit, content):
    path = devkit.root / "a.npy"
    save_npy_dict(path, content)
    maps = read_or_refused(lambda path: load_cams(path, (2, 3), len(CLASSES)), path)
    for key, array in (maps or {}).items():
        assert key in range(3)
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
        assert np.array_equal(array, content[key])


def test_a_map_of_the_first_class_may_cover_the_image(devkit):
    everywhere = np.ones((2, 3), np.float32)
    save_maps(devkit.root / "a.npy", {0: everywhere})
    assert np.array_equal(load_cams(devkit.root / "a.npy", (2, 3), 3)[0], everywhere)


# Photographs


def encoded(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    noise_image(9, 11, 1).convert(mode).save(file, kind)
    return file.getvalue()


MODES = {"JPEG": "RGB L CMYK", "PNG": "RGB L P RGBA LA 1", "TIFF": "RGB CMYK F", "GIF": "P"}
PHOTOGRAPHS = [encoded(kind, mode) for kind, modes in MODES.items() for mode in modes.split()]


@given(st.data())
def test_any_damage_leaves_an_image_or_one_sentence(devkit, data):
    content = bytearray(data.draw(st.sampled_from(PHOTOGRAPHS)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = devkit.image_path("a")
    path.write_bytes(content)
    image = read_or_refused(lambda _: devkit.load_image("a"), path)
    assert image is None or image.mode == "RGB"


def test_orientation_in_exif_is_not_applied(devkit):
    image = noise_image(40, 50)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(devkit.image_path("a"), "PNG", exif=exif)
    assert np.array_equal(devkit.load_image("a"), image)
