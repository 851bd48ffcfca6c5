"""Whatever stands in an input file, reading it gives its content or one sentence, and no more."""

import io
from xml.sax.saxutils import escape

import numpy as np
import pytest
from helpers import noise_image
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tool.labels import VOID
from tool.maps import load_cams, load_index_png, open_image, save_maps, save_npy_dict
from tool.metrics import confusion_matrix
from tool.run.errors import DataError
from voc12.devkit import Devkit, list_line, read_class_names, read_ids, read_lines, require_ids

CLASSES = ("crack", "rust", "moss")
# Characters that have a meaning in a list, a path or markup, among any others.
names = st.text(st.one_of(st.sampled_from("./\\# \t\n\r\0ab~:%&<>\"'jpg-"), st.characters()))
names = st.one_of(names, st.builds("{}.jpg {}".format, names, names))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for one file at a time, with a devkit."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("JPEGImages", "Annotations", "SegmentationClass"):
        (folder / "VOC" / name).mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def devkit(place):
    return Devkit(place / "VOC", CLASSES)


def content_or_sentence(read, path):
    """What ``read(path)`` gives, or None where it refuses the file in one sentence that names it.

    Anything else that it raises fails the test.
    """
    try:
        return read(path)
    except DataError as error:
        assert str(path) in str(error)
        assert str(error).isprintable(), str(error)
        assert len(str(error)) < 500 + len(str(path))
        return None


# Lists


@given(st.lists(names))
def test_any_list_gives_ids_within_the_folders(place, devkit, lines):
    path = place / "list.txt"
    path.write_text("\n".join(lines), "utf-8", "surrogatepass")
    for image_id in content_or_sentence(read_ids, path) or []:
        for file in (devkit.image_path, devkit.annotation_path, devkit.mask_path):
            assert file(image_id).resolve().parent == file("x").resolve().parent
            assert not file(image_id).exists()  # a name that the system takes


@given(st.binary())
def test_any_bytes_are_a_list_or_refused(place, content):
    path = place / "list.txt"
    path.write_bytes(content)
    content_or_sentence(read_ids, path)


@given(names, st.booleans())
@example("my photo", True)
@example("a.jpg b", True)
@example("a /b", True)
@example("a#1", True)
@example("a #1", True)
def test_an_id_comes_back_from_a_list_or_is_refused(place, image_id, with_mask):
    try:
        require_ids("here", [image_id])
    except DataError:
        return
    path = place / "list.txt"
    path.write_text(f"{list_line('before')}\n{list_line(image_id, with_mask)}\n", "utf-8")
    assert read_ids(path) == ["before", image_id]


# Class files


@given(st.lists(names))
def test_any_class_file_gives_its_names_or_is_refused(place, lines):
    path = place / "classes.txt"
    path.write_text("\n".join(lines), "utf-8", "surrogatepass")
    classes = content_or_sentence(read_class_names, path)
    if classes is not None:
        assert list(classes) == read_lines(path)
        assert 0 < len(set(classes)) == len(classes) < VOID


# Annotations


@given(st.lists(st.sampled_from(CLASSES)), st.text(st.sampled_from(" \t\n")))
def test_annotated_classes_are_the_label(devkit, objects, space):
    parts = "".join(f"<object><name>{space}{name}</name></object>{space}" for name in objects)
    devkit.annotation_path("a").write_text(f"<annotation>{parts}</annotation>")
    label = devkit.annotated_label("a")
    assert label.tolist() == [name in objects for name in CLASSES]


@given(names)
def test_a_class_of_any_name_is_in_the_list_or_refused(place, name):
    path = place / "VOC" / "Annotations" / "a.xml"
    text = f"<annotation><object><name>{escape(name)}</name></object></annotation>"
    path.write_text(text, "utf-8", "surrogatepass")
    # As XML has it: other line ends become line feeds.
    wanted = name.replace("\r\n", "\n").replace("\r", "\n").strip()
    known = Devkit(place / "VOC", [wanted])
    label = content_or_sentence(lambda _: known.annotated_label("a"), path)
    assert label is None or label.tolist() == [1]
    label = content_or_sentence(lambda _: Devkit(place / "VOC", ["x"]).annotated_label("a"), path)
    assert label is None or wanted == "x"


@given(st.one_of(st.binary(), st.text(st.sampled_from("<>/&;![]\"'%= annotationobjectname"))))
def test_any_bytes_are_an_annotation_or_refused(devkit, content):
    path = devkit.annotation_path("a")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    content_or_sentence(lambda _: devkit.annotated_label("a"), path)


NAME = "<annotation><object><name>{}</name></object></annotation>"


@pytest.mark.parametrize(
    ("declaration", "name"),
    [
        ('<!ENTITY x "crack">', "&x;"),
        ('<!ENTITY x "crack">', "crack"),  # even where it is not used
        ('<!ENTITY x "a"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;&x;">', "&y;"),
        (f'<!ENTITY x "{"crack" * 10000}">', "&x;" * 1000),
        ('<!ENTITY x SYSTEM "file://{secret}">', "&x;"),
        ('<!ENTITY x PUBLIC "x" "file://{secret}">', "&x;"),
        ('<!ENTITY x SYSTEM "http://127.0.0.1:9/x">', "&x;"),
        ('<!ENTITY x SYSTEM "file://{secret}" NDATA gif>', "crack"),
        ('<!ENTITY % x SYSTEM "file://{secret}"> %x;', "crack"),
        ("<!ENTITY % x \"<!ENTITY y 'crack'>\"> %x;", "&y;"),
    ],
)
def test_entities_are_refused_and_not_expanded(place, devkit, declaration, name):
    secret = place / "secret.txt"
    secret.write_text("crack")
    declaration = declaration.replace("{secret}", str(secret))
    path = devkit.annotation_path("a")
    path.write_text(f"<!DOCTYPE annotation [{declaration}]>{NAME.format(name)}")
    with pytest.raises(DataError, match=r"a\.xml: not a readable annotation .*Entit"):
        devkit.annotated_label("a")


def test_an_external_document_type_is_not_read(place, devkit):
    definition = place / "annotation.dtd"
    definition.write_text('<!ENTITY x "crack">')
    document = f'<!DOCTYPE annotation SYSTEM "file://{definition}">' + NAME
    path = devkit.annotation_path("a")
    path.write_text(document.format("crack"))
    label = content_or_sentence(lambda _: devkit.annotated_label("a"), path)
    assert label is None or label.tolist() == [1, 0, 0]
    path.write_text(document.format("&x;"))
    with pytest.raises(DataError, match=r"a\.xml"):
        devkit.annotated_label("a")


# Maps and labels

keys = st.one_of(st.integers(-2, 4), st.sampled_from(["0", "cat", 1.5, None, True, (1, 2)]))
cells = st.one_of(st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0]))
arrays = hnp.arrays(np.float32, st.sampled_from([(2, 3), (3, 2), (0, 3), (6,)]), elements=cells)
values = st.one_of(arrays, st.sampled_from([None, 3, "map", [1, 2], np.zeros((2, 3), "U1")]))


@given(st.dictionaries(keys, values, max_size=3))
def test_any_dict_is_maps_of_the_image_or_refused(place, content):
    path = place / "a.npy"
    save_npy_dict(path, content)
    maps = content_or_sentence(lambda path: load_cams(path, (2, 3), len(CLASSES)), path)
    for key, array in (maps or {}).items():
        assert key in range(3)
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
        assert np.array_equal(array, content[key])


@given(hnp.arrays(np.float32, (2, 3), elements=st.floats(0, 1, width=32)))
def test_scores_of_one_class_are_maps(place, array):
    save_maps(place / "a.npy", {2: array})
    assert np.array_equal(load_cams(place / "a.npy", (2, 3), 3)[2], array)


def test_the_first_class_may_be_all_over_an_image(place):
    everywhere = np.ones((2, 3), np.float32)
    save_maps(place / "a.npy", {0: everywhere})
    assert np.array_equal(load_cams(place / "a.npy", (2, 3), 3)[0], everywhere)
    save_maps(place / "a.npy", {0: everywhere, 2: 0 * everywhere})
    with pytest.raises(DataError, match="CRF scores"):
        load_cams(place / "a.npy", (2, 3), 3)


@given(
    st.one_of(
        hnp.arrays(
            st.sampled_from([np.float32, np.int64, np.bool_, np.uint8]),
            st.sampled_from([(3,), (2,), (3, 1), ()]),
            elements=st.sampled_from([0, 1]),
        ),
        hnp.arrays(np.float64, 3, elements=st.floats()),
        st.lists(st.sampled_from([0, 1, 0.5, None, "1", [1]]), max_size=4),
        st.sampled_from(["crack", None, {}, 7]),
    )
)
def test_any_entry_is_a_label_or_refused(place, entry):
    path = place / "labels.npy"
    save_npy_dict(path, {"a": entry})
    devkit = Devkit(place / "VOC", CLASSES, path)
    label = content_or_sentence(lambda _: devkit.image_label("a"), path)
    if label is not None:
        assert (label.shape, label.dtype) == ((3,), np.float32)
        assert set(label.tolist()) <= {0, 1}
        assert label.tolist() == np.float32(entry).tolist()


# Masks and photographs


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)),
    st.integers(17, 256),  # with fewer, Pillow writes fewer bits
    st.integers(1, 255),
)
def test_any_mask_is_read_as_it_is_and_scored_or_refused(place, mask, colours, num_labels):
    image = Image.fromarray(mask)
    image.putpalette([0] * 3 * colours)  # values beyond the palette are values all the same
    path = place / "a.png"
    image.save(path)
    assert np.array_equal(load_index_png(path), mask)
    try:
        confusion = confusion_matrix(mask, np.zeros_like(mask), num_labels)
    except ValueError:
        assert (mask[mask != VOID] >= num_labels).any()
    else:
        assert confusion.sum() == (mask != VOID).sum()


def _file(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    image = noise_image(9, 11, 1).convert(mode if mode != "I;16" else "I")
    image.convert(mode).save(file, kind)
    return file.getvalue()


IMAGES = [
    _file(kind, mode)
    for kind, modes in {
        "JPEG": ("RGB", "L", "CMYK"),
        "PNG": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"),
        "TIFF": ("RGB", "CMYK", "F", "LAB", "I;16"),
        "BMP": ("RGB", "P"),
        "GIF": ("P",),
        "PPM": ("RGB", "L"),
        "WEBP": ("RGB",),
    }.items()
    for mode in modes
    if mode != "LAB"
]


@given(st.data())
def test_any_damage_leaves_an_image_or_a_sentence(devkit, data):
    content = bytearray(data.draw(st.sampled_from(IMAGES)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = devkit.image_path("a")
    path.write_bytes(content)
    image = content_or_sentence(lambda _: devkit.load_image("a"), path)
    assert image is None or image.mode == "RGB"


@pytest.mark.parametrize("kind", ["EPS", "PDF", "JPEG2000", "ICO", "TGA", "PCX", "SGI"])
def test_other_formats_than_those_of_photographs_are_refused(place, kind):
    # Pillow hands EPS to Ghostscript, which is a language.
    path = place / "a.jpg"
    try:
        noise_image(16, 16).save(path, kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {kind}")
    with pytest.raises(DataError, match=r"a\.jpg: not a readable image"):
        open_image(path)
