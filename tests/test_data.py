"""Ids, classes, labels, images and data sets of a devkit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import noise_image, working_directory, write_annotation, write_image, write_mask
from PIL import Image

from tool.labels import VOID
from tool.maps import save_maps, save_npy_dict
from tool.run.errors import DataError
from voc12 import data
from voc12.devkit import Devkit

CLASSES = ("crack", "rust", "moss")


def as_float(image):
    """A normalization that leaves values readable; black is 1, so that zeros are padding."""
    return image.astype(np.float32) + 1


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
    assert data.read_ids(path) == ids


@pytest.mark.parametrize("field", ["..", ".", "/", "/JPEGImages/..", "a\\b", "a\0b", "\x1b[2J"])
def test_ids_that_name_no_file_are_refused(field, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"good\n{field}\n")
    with pytest.raises(DataError, match="cannot be an image id") as error:
        data.read_ids(path)
    assert str(path) in str(error.value)


def test_ids_cannot_leave_the_folder(devkit, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("../../secret.jpg\n/etc/passwd\n")
    for image_id in data.read_ids(path):
        assert devkit.image_path(image_id).parent == devkit.root / "JPEGImages"


def test_missing_list_names_the_command_that_makes_it(tmp_path):
    for path in (tmp_path / "train.txt", tmp_path):
        with pytest.raises(DataError, match=r"voc12\.prepare --voc12_root") as error:
            data.read_ids(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"# nothing\n"])
def test_empty_list_is_an_error(content, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match="empty") as error:
        data.read_ids(path)
    assert str(path) in str(error.value)


def test_list_that_is_no_text_is_an_error(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(DataError, match=r"list\.txt.*UTF-8"):
        data.read_ids(path)


# Class lists


def test_voc_classes_are_the_default():
    names = data.read_class_names(None)
    assert len(names) == 20
    assert names == tuple(sorted(names))
    assert (names[0], names[-1]) == ("aeroplane", "tvmonitor")


def test_class_names_of_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufefftraffic light\r\n\r\n# gone\r\nzebra\r\nant\r\n".encode())
    assert data.read_class_names(path) == ("traffic light", "zebra", "ant")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no class names"),
        ("cat\ndog\ncat\n", "'cat' stands there twice"),
        ("background\ncat\n", "leave out background"),
        ("\n".join(f"c{k}" for k in range(255)), "255 classes"),
    ],
)
def test_class_files_that_cannot_be(text, words, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        data.read_class_names(path)
    assert str(path) in str(error.value)


def test_most_classes_that_index_images_hold(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(f"c{k}" for k in range(254)))
    assert len(data.read_class_names(path)) == 254


def test_missing_class_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        data.read_class_names(tmp_path / "nowhere.txt")


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
        assert Devkit(root, CLASSES, data.LABEL_FILE).image_label("a").tolist() == [0, 1, 0]
        with pytest.raises(DataError, match=r"mine\.npy"):
            Devkit(root, CLASSES, "mine.npy")


@pytest.mark.parametrize("label", [np.zeros(20, np.float32), np.zeros(()), np.array(["rust"] * 3)])
def test_label_that_is_not_a_number_for_each_class(label, root, tmp_path):
    save_npy_dict(tmp_path / "labels.npy", {"a": label})
    devkit = Devkit(root, CLASSES, tmp_path / "labels.npy")
    with pytest.raises(DataError, match=r"labels\.npy.* a .*3 classes"):
        devkit.image_label("a")


def test_id_without_label(root, tmp_path):
    save_npy_dict(tmp_path / "labels.npy", {"other": np.zeros(3, np.float32)})
    devkit = Devkit(root, CLASSES, tmp_path / "labels.npy")
    with pytest.raises(DataError, match="2007_01: has no image-level label") as error:
        devkit.image_label("2007_01")
    assert "labels.npy" in str(error.value)
    assert "2007_01.xml" in str(error.value)


def test_unknown_class_is_named(root, devkit):
    write_annotation(root, "a", ["crack", "unicorn"])
    with pytest.raises(DataError, match=r"a\.xml: the class 'unicorn'.*--classes"):
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


def test_a_root_without_images_is_no_devkit(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="--voc12_root") as error:
            Devkit(path)
        assert str(path) in str(error.value)


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


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_photograph_one_pixel_wide(size, root, devkit):
    write_image(root, "a", noise_image(*size), "JPEG")
    write_annotation(root, "a", ["rust"])
    assert np.asarray(devkit.load_image("a")).shape == (*size, 3)
    train = data.ClassifierTrainingSet(devkit, ["a"], as_float, 24, (8, 32), seed=0)
    assert train[0][0].shape == (3, 24, 24)
    scaled = data.MultiScaleSet(devkit, ["a"], as_float, (1, 0.5, 2))[0].scaled
    assert all(min(pair.shape[2:]) >= 1 for pair in scaled)
    assert scaled[2].shape == (2, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.95])
def test_truncated_jpeg_is_named(keep, root, devkit):
    path = write_image(root, "a", noise_image(64, 64), "JPEG")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(DataError, match="not a readable image") as error:
        devkit.load_image("a")
    assert str(path) in str(error.value)


def test_corrupt_and_missing_images_are_named(root, devkit):
    path = root / "JPEGImages" / "a.jpg"
    path.write_bytes(b"<html>404</html>" * 20)
    with pytest.raises(DataError, match=r"a\.jpg: not a readable image"):
        devkit.load_image("a")
    with pytest.raises(DataError, match=r"b\.jpg: no such file"):
        devkit.load_image("b")


def test_masks_are_indices(root, devkit):
    mask = np.array([[0, 1], [2, VOID]], np.uint8)
    write_mask(root, "a", mask)
    assert (devkit.load_mask("a") == mask).all()
    noise_image(2, 2).save(devkit.mask_path("b"))
    with pytest.raises(DataError, match=r"b\.png: has mode RGB"):
        devkit.load_mask("b")
    with pytest.raises(DataError, match=r"c\.png: no such file"):
        devkit.load_mask("c")


# Stage 1


@pytest.fixture
def photographs(root, devkit):
    """Ids a, b (the same pixels) and c, 40 x 60."""
    for image_id, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_image(root, image_id, noise_image(40, 60, seed))
        write_annotation(root, image_id, ["rust"])
    return devkit


def training_item(devkit, ids, index, seed=0, epoch=0):
    dataset = data.ClassifierTrainingSet(devkit, ids, as_float, 32, (30, 60), seed)
    dataset.epoch = epoch
    return dataset[index][0]


def test_augmentation_depends_on_seed_epoch_and_id_only(photographs):
    first = training_item(photographs, "abc", 0)
    np.random.seed(7)  # noqa: NPY002 - the global state is what must not matter
    torch.manual_seed(7)
    assert torch.equal(first, training_item(photographs, "ca", 1))
    assert not torch.equal(first, training_item(photographs, "abc", 1))  # the same pixels
    assert not torch.equal(first, training_item(photographs, "abc", 0, seed=1))
    assert not torch.equal(first, training_item(photographs, "abc", 0, epoch=1))


def test_training_crops_are_padded_with_zeros_after_normalization(photographs):
    dataset = data.ClassifierTrainingSet(photographs, "a", as_float, 64, (30, 48), seed=0)
    lengths, places = set(), set()
    for dataset.epoch in range(30):
        image, label = dataset[0]
        assert image.shape == (3, 64, 64)
        assert image.dtype == label.dtype == torch.float32
        assert label.tolist() == [0, 1, 0]
        inside = (image != 0).all(0)
        assert torch.equal(inside, (image != 0).any(0))  # normalized images have no zeros here
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        height, width = len(rows), len(columns)
        assert inside.sum() == height * width  # one rectangle
        assert height == round(40 * width / 60)
        lengths.add(width)
        places.add((rows[0].item(), columns[0].item()))
    assert {min(lengths), max(lengths)} <= set(range(30, 49))
    assert len(lengths) > 8
    assert len(places) > 15


def test_training_flips_half_of_the_images(root, devkit):
    halves = np.zeros((20, 40, 3), np.uint8)
    halves[:, 20:] = 200
    write_image(root, "a", Image.fromarray(halves))
    write_annotation(root, "a", [])
    dataset = data.ClassifierTrainingSet(devkit, "a", as_float, 40, (40, 40), seed=0)
    left_is_bright = []
    for dataset.epoch in range(60):
        image = dataset[0][0]
        left_is_bright.append(bool(image[..., :10].sum() > image[..., -10:].sum()))
    assert 15 <= sum(left_is_bright) <= 45


def test_validation_is_a_centre_crop_with_zero_padding(root, devkit):
    pixels = np.arange(5 * 9 * 3, dtype=np.uint8).reshape(5, 9, 3)
    write_image(root, "a", Image.fromarray(pixels))
    write_annotation(root, "a", ["crack"])
    image, label = data.ClassifierValidationSet(devkit, ["a"], as_float, 7)[0]
    expected = np.zeros((7, 7, 3), np.float32)
    expected[1:6] = pixels[:, 1:8].astype(np.float32) + 1
    assert np.array_equal(image.numpy().transpose(1, 2, 0), expected)
    assert label.tolist() == [1, 0, 0]


# Stage 2


def test_scales_and_mirror_images(root, devkit):
    write_image(root, "a", noise_image(31, 21))
    write_annotation(root, "a", ["moss"])
    scales = (1, 0.5, 1.5, 2)
    sample = data.MultiScaleSet(devkit, ["a"], as_float, scales)[0]
    assert sample.image_id == "a"
    assert sample.label.tolist() == [0, 0, 1]
    assert sample.image.dtype == np.uint8
    assert np.array_equal(sample.image, np.asarray(noise_image(31, 21)))
    # Halves round to even numbers, as Python's round does.
    sizes = [(31, 21), (16, 10), (46, 32), (62, 42)]
    assert [tuple(pair.shape) for pair in sample.scaled] == [(2, 3, *size) for size in sizes]
    for pair in sample.scaled:
        assert pair.dtype == torch.float32
        assert torch.equal(pair[1], pair[0].flip(-1))
    assert np.array_equal(sample.scaled[0][0].numpy().transpose(1, 2, 0), as_float(sample.image))
    bicubic = noise_image(31, 21).resize((10, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(
        sample.scaled[1][0].numpy().transpose(1, 2, 0), as_float(np.asarray(bicubic))
    )


# Stage 3

CROP, STRIDE = 48, 8


@pytest.fixture
def affinity_world(root, devkit, tmp_path):
    """One image 32 x 64: its left half red and of class 0, its right half blue and of class 2."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (180, 30, 30), (30, 30, 180)
    write_image(root, "a", Image.fromarray(pixels))
    left = np.zeros((32, 64), np.float32)
    left[:, :32] = 1
    maps = {0: 0.1 * np.ones_like(left), 1: 0.9 * left, 3: 0.9 * (1 - left)}
    for folder in ("la", "ha"):
        save_maps(tmp_path / folder / "a.npy", maps)
    return SimpleNamespace(devkit=devkit, low=tmp_path / "la", high=tmp_path / "ha", maps=maps)


def affinity_set(world, seed=0):
    return data.AffinityTrainingSet(
        world.devkit, ["a"], as_float, world.low, world.high, CROP, STRIDE, seed
    )


def cells(pixels):
    """CROP x CROP bool -> the share of each cell's pixels that are set."""
    return torch.nn.functional.avg_pool2d(pixels.float()[None], STRIDE)[0]


def test_affinity_image_and_label_stay_aligned(affinity_world):
    dataset = affinity_set(affinity_world)
    orientations = set()
    for dataset.epoch in range(24):
        image, label = dataset[0]
        assert image.shape == (3, CROP, CROP)
        assert image.dtype == torch.float32
        assert label.shape == (CROP // STRIDE, CROP // STRIDE)
        assert label.dtype == torch.uint8
        padding = (image == 1).all(0)  # black, then normalized: nothing is zero
        assert (image >= 1).all()
        assert padding.sum() == (CROP - 32) * CROP
        red, blue = image[0] > image[2], image[0] < image[2]
        assert (label[cells(red) == 1] == 1).all()  # local indices: the first map, the second
        assert (label[cells(blue) == 1] == 2).all()
        assert (label[cells(padding) == 1] == VOID).all()
        assert set(label.unique().tolist()) <= {1, 2, VOID}
        if red.any() and blue.any():
            orientations.add(bool(red.nonzero()[:, 1].min() < blue.nonzero()[:, 1].min()))
    assert orientations == {True, False}


def test_affinity_crops_depend_on_seed_epoch_and_id_only(affinity_world):
    first = affinity_set(affinity_world)[0]
    np.random.seed(7)  # noqa: NPY002 - the global state is what must not matter
    again, other = affinity_set(affinity_world)[0], affinity_set(affinity_world, seed=1)[0]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("folder", ["la", "ha"])
def test_affinity_scores_of_another_size(folder, affinity_world, tmp_path):
    save_maps(tmp_path / folder / "a.npy", {k: v[:, :-1] for k, v in affinity_world.maps.items()})
    with pytest.raises(DataError, match=r"differ in size.*32 x 63.*32 x 64") as error:
        affinity_set(affinity_world)[0]
    assert str(tmp_path / folder / "a.npy") in str(error.value)


@pytest.mark.parametrize("keys", [(0, 1), (1, 3)])
def test_affinity_scores_of_other_classes(keys, affinity_world, tmp_path):
    kept = {key: affinity_world.maps[key] for key in keys}
    save_maps(tmp_path / "ha" / "a.npy", kept)
    if 0 not in keys:
        save_maps(tmp_path / "la" / "a.npy", kept)
    with pytest.raises(DataError, match=r"la.a\.npy and .*ha.a\.npy: must hold the background"):
        affinity_set(affinity_world)[0]


def test_missing_affinity_scores_are_named(affinity_world, tmp_path):
    (tmp_path / "ha" / "a.npy").unlink()
    with pytest.raises(DataError, match=r"ha.a\.npy"):
        affinity_set(affinity_world)[0]


# Stage 4


def test_inference_gives_the_whole_image_and_its_maps(root, devkit, tmp_path):
    write_image(root, "a", noise_image(5, 7))
    maps = {2: np.full((5, 7), 0.5), 0: np.ones((5, 7))}
    save_maps(tmp_path / "a.npy", maps)
    sample = data.AffinityInferenceSet(devkit, ["a"], as_float, tmp_path)[0]
    assert sample.image_id == "a"
    assert sample.image.dtype == torch.float32
    expected = as_float(np.asarray(noise_image(5, 7)))
    assert np.array_equal(sample.image.numpy().transpose(1, 2, 0), expected)
    assert np.array_equal(sample.photograph, np.asarray(noise_image(5, 7)))
    assert sample.classes == [0, 2]
    assert sample.maps.dtype == torch.float32
    assert sample.maps.shape == (2, 5, 7)
    assert (sample.maps[0] == 1).all()
    assert (sample.maps[1] == 0.5).all()


def test_inference_of_an_image_without_maps(root, devkit, tmp_path):
    write_image(root, "a", noise_image(5, 7))
    save_maps(tmp_path / "a.npy", {})
    sample = data.AffinityInferenceSet(devkit, ["a"], as_float, tmp_path)[0]
    assert sample.classes == []
    assert sample.maps.shape == (0, 5, 7)


def test_inference_refuses_maps_that_do_not_fit(root, devkit, tmp_path):
    write_image(root, "a", noise_image(5, 7))
    dataset = data.AffinityInferenceSet(devkit, ["a"], as_float, tmp_path)
    save_maps(tmp_path / "a.npy", {0: np.zeros((7, 5))})
    with pytest.raises(DataError, match=r"a\.npy: .*differ in size \(5 x 7 and 7 x 5\)"):
        dataset[0]
    save_maps(tmp_path / "a.npy", {3: np.zeros((5, 7))})
    with pytest.raises(DataError, match=r"a\.npy: has a map of class 3.*3 classes.*--classes"):
        dataset[0]


def test_index_image_gives_labels_back():
    local = np.array([[0, 1], [2, 1]])
    label = data.index_image(local, [4, 19])
    assert label.dtype == np.uint8
    assert label.tolist() == [[0, 5], [20, 5]]
    assert data.index_image(np.zeros((2, 2), int), []).tolist() == [[0, 0], [0, 0]]
