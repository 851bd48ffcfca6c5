"""What the programs iterate over: crops and their augmentation, whole images, and their maps."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import noise_image, write_annotation, write_image
from PIL import Image

from tool.labels import VOID
from tool.maps import save_maps
from voc12 import datasets as data
from voc12.devkit import Devkit

CLASSES = ("crack", "rust", "moss")


def as_float(image):
    """A normalization that leaves values readable; black is 1, so that zeros are padding."""
    return image.astype(np.float32) + 1


@pytest.fixture
def devkit(tmp_path):
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    return Devkit(tmp_path / "VOC", CLASSES)


# Stage 1


@pytest.fixture
def photographs(devkit):
    """Ids a, b (the same pixels) and c, 40 x 60."""
    for image_id, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_image(devkit.root, image_id, noise_image(40, 60, seed))
        write_annotation(devkit.root, image_id, ["rust"])
    return devkit


def training_item(devkit, ids, index, seed=0, epoch=0):
    return data.ClassifierTrainingSet(devkit, ids, as_float, 32, (30, 60), seed)[epoch, index][0]


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
    for epoch in range(30):
        image, label = dataset[epoch, 0]
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


def test_training_flips_half_of_the_images(devkit):
    halves = np.zeros((20, 40, 3), np.uint8)
    halves[:, 20:] = 200
    write_image(devkit.root, "a", Image.fromarray(halves))
    write_annotation(devkit.root, "a", [])
    dataset = data.ClassifierTrainingSet(devkit, "a", as_float, 40, (40, 40), seed=0)
    images = [dataset[epoch, 0][0] for epoch in range(60)]
    left_is_bright = [bool(image[..., :10].sum() > image[..., -10:].sum()) for image in images]
    assert 15 <= sum(left_is_bright) <= 45


def test_validation_is_a_centre_crop_with_zero_padding(devkit):
    pixels = np.arange(5 * 9 * 3, dtype=np.uint8).reshape(5, 9, 3)
    write_image(devkit.root, "a", Image.fromarray(pixels))
    write_annotation(devkit.root, "a", ["crack"])
    image, label = data.ClassifierValidationSet(devkit, ["a"], as_float, 7)[0]
    expected = np.zeros((7, 7, 3), np.float32)
    expected[1:6] = pixels[:, 1:8].astype(np.float32) + 1
    assert np.array_equal(image.numpy().transpose(1, 2, 0), expected)
    assert label.tolist() == [1, 0, 0]


# Stage 2


def test_an_image_at_several_scales(devkit):
    write_image(devkit.root, "a", noise_image(31, 21))
    write_annotation(devkit.root, "a", ["moss"])
    sample = data.MultiScaleSet(devkit, ["a"], as_float, (1, 0.5, 1.5, 2))[0]
    assert sample.image_id == "a"
    assert sample.label.tolist() == [0, 0, 1]
    assert sample.photograph.dtype == np.uint8
    assert np.array_equal(sample.photograph, np.asarray(noise_image(31, 21)))
    # Halves round to even numbers, as Python's round does.
    sizes = [(31, 21), (16, 10), (46, 32), (62, 42)]
    assert [tuple(image.shape) for image in sample.scaled] == [(3, *size) for size in sizes]
    assert {image.dtype for image in sample.scaled} == {torch.float32}
    first, half = (image.numpy().transpose(1, 2, 0) for image in sample.scaled[:2])
    assert np.array_equal(first, as_float(sample.photograph))
    bicubic = noise_image(31, 21).resize((10, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(half, as_float(np.asarray(bicubic)))


# Stage 3

CROP, STRIDE = 48, 8


@pytest.fixture
def affinity_set(devkit, tmp_path):
    """Of an image 32 x 64: its left half red and of class 0, its right half blue and of class 2."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (180, 30, 30), (30, 30, 180)
    write_image(devkit.root, "a", Image.fromarray(pixels))
    left = np.zeros((32, 64), np.float32)
    left[:, :32] = 1
    maps = {0: 0.1 * np.ones_like(left), 1: 0.9 * left, 3: 0.9 * (1 - left)}
    folders = tmp_path / "la", tmp_path / "ha"
    for folder in folders:
        save_maps(folder / "a.npy", maps)
    return partial(data.AffinityTrainingSet, devkit, ["a"], as_float, *folders, CROP, STRIDE)


def cells(pixels):
    """CROP x CROP bool -> the share of each cell's pixels that are set."""
    return torch.nn.functional.avg_pool2d(pixels.float()[None], STRIDE)[0]


def test_affinity_image_and_label_stay_aligned(affinity_set):
    dataset = affinity_set(seed=0)
    orientations = set()
    for epoch in range(24):
        image, label = dataset[epoch, 0]
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


def test_affinity_crops_depend_on_seed_epoch_and_id_only(affinity_set):
    first = affinity_set(seed=0)[0, 0]
    np.random.seed(7)  # noqa: NPY002 - the global state is what must not matter
    again, other = affinity_set(seed=0)[0, 0], affinity_set(seed=1)[0, 0]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


# Stage 4


def test_inference_gives_the_whole_image_and_its_maps(devkit, tmp_path):
    write_image(devkit.root, "a", noise_image(5, 7))
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
    assert np.array_equal(sample.maps, [maps[0], maps[2]])

    save_maps(tmp_path / "a.npy", {})
    sample = data.AffinityInferenceSet(devkit, ["a"], as_float, tmp_path)[0]
    assert sample.classes == []
    assert sample.maps.shape == (0, 5, 7)
