"""Resizes, crops, flips and jitter: where pixels go, and that chance is reproducible."""

import numpy as np
import pytest
import torchvision.transforms.functional as TF
from golden import recipe
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tool import transforms

lengths = st.integers(1, 30)
seeds = st.integers(0, 2**32)


def _image(height=30, width=45) -> Image.Image:
    return Image.fromarray(recipe.synthetic_image(height, width, 1))


# ---- the generator of a sample ----


def test_sample_rng_depends_on_seed_epoch_and_id_alone():
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 1, "b")]
    drawn = [transforms.sample_rng(*key).integers(2**60) for key in keys]
    np.random.default_rng(5).random(100)  # other generators do not interfere
    assert [transforms.sample_rng(*key).integers(2**60) for key in reversed(keys)] == drawn[::-1]
    assert len(set(drawn)) == len(keys)


# ---- resizes ----


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_long_side_is_exact_and_the_other_keeps_the_ratio(height, width, long_side):
    resized = transforms.resize_long_side(Image.new("RGB", (width, height)), long_side)
    assert max(resized.size) == long_side
    short = min(height, width) * long_side / max(height, width)
    assert min(resized.size) == max(1, round(short))
    assert (resized.width >= resized.height) == (width >= height) or short > long_side - 1


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((97, 130), 0.5, (48, 65)),  # banker's rounding: 48.5 -> 48
        ((75, 101), 0.5, (38, 50)),  # 37.5 -> 38, 50.5 -> 50
        ((75, 101), 1.5, (112, 152)),  # 112.5 -> 112, 151.5 -> 152
        ((75, 101), 2, (150, 202)),
        ((1, 400), 0.25, (1, 100)),  # a side never vanishes
    ],
)
def test_rescale_rounds_each_side_as_python_does(size, scale, expected):
    image = transforms.rescale(Image.new("RGB", size[::-1]), scale)
    assert image.size == expected[::-1]


def test_resize_is_bicubic():
    image = _image()
    expected = image.resize((60, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(transforms.resize(image, 20, 60), expected)


def test_scale_one_changes_nothing():
    image = _image()
    assert np.array_equal(transforms.rescale(image, 1), image)


def test_random_long_side_takes_every_length_of_its_range(rng):
    image = Image.new("RGB", (40, 10))
    drawn = {max(transforms.random_resize_long_side(image, 30, 34, rng).size) for _ in range(200)}
    assert drawn == {30, 31, 32, 33, 34}


# ---- colour ----


def test_colour_jitter_keeps_size_and_mode_and_changes_colours(rng):
    image = _image()
    jittered = transforms.colour_jitter(image, rng)
    assert (jittered.size, jittered.mode) == (image.size, "RGB")
    assert not np.array_equal(jittered, image)


def test_colour_jitter_is_the_same_for_the_same_generator():
    image = _image()
    first, again, other = (
        np.array(transforms.colour_jitter(image, np.random.default_rng(seed))) for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_colour_jitter_draws_within_its_ranges_in_any_order(rng, monkeypatch):
    calls = []
    names = ("brightness", "contrast", "saturation", "hue")
    for name in names:

        def record(image, amount, name=name):
            calls.append((name, amount))
            return image

        monkeypatch.setattr(TF, f"adjust_{name}", record)

    orders = set()
    for _ in range(400):
        calls.clear()
        transforms.colour_jitter(_image(2, 2), rng)
        orders.add(tuple(name for name, _ in calls))
        assert sorted(name for name, _ in calls) == sorted(names)
        for name, amount in calls:
            low, high = (-0.1, 0.1) if name == "hue" else (0.7, 1.3)
            assert low <= amount <= high
    assert len(orders) == 24


# ---- flip and layout ----


def test_flip_mirrors_columns_and_twice_is_nothing(rng):
    array = rng.integers(0, 255, (4, 5, 3))
    flipped = transforms.flip(array)
    assert np.array_equal(flipped[:, 0], array[:, 4])
    assert np.array_equal(transforms.flip(flipped), array)
    assert flipped.flags.c_contiguous
    assert transforms.flip(np.array([[1, 2, 3]])).tolist() == [[3, 2, 1]]


def test_to_chw_moves_channels_first(rng):
    array = rng.normal(size=(4, 5, 3))
    moved = transforms.to_chw(array)
    assert moved.shape == (3, 4, 5)
    assert moved.flags.c_contiguous
    assert moved[2, 1, 3] == array[1, 3, 2]


# ---- crops ----


def _assert_lies_intact(array, canvas, box, crop_size):
    """The box's part of the image is on the canvas once, as it was, and zeros are around it."""
    for source, target, length in zip(*box, array.shape[:2], strict=True):
        assert 0 <= source.start < source.stop <= length
        assert 0 <= target.start < target.stop <= crop_size
        size = min(length, crop_size)
        assert source.stop - source.start == target.stop - target.start == size
    assert canvas.shape == (crop_size, crop_size, *array.shape[2:])
    assert canvas.dtype == array.dtype
    source, target = box
    part = array[source]
    assert np.array_equal(canvas[target], part)
    assert np.count_nonzero(canvas) == np.count_nonzero(part)


@given(lengths, lengths, st.integers(1, 30), seeds)
def test_random_crop_lays_content_intact_on_zeros(height, width, crop_size, seed):
    rng = np.random.default_rng(seed)
    array = rng.integers(1, 255, (height, width, 2), dtype=np.uint8)
    box = transforms.crop_box(height, width, crop_size, rng)
    _assert_lies_intact(array, transforms.crop_to_canvas(array, box, crop_size), box, crop_size)


@given(lengths, lengths, st.integers(1, 30))
def test_centre_crop_lays_the_centre_on_the_centre(height, width, crop_size):
    array = np.ones((height, width), np.float32)
    box = transforms.centre_box(height, width, crop_size)
    _assert_lies_intact(array, transforms.crop_to_canvas(array, box, crop_size), box, crop_size)
    for source, target, length in zip(*box, (height, width), strict=True):
        assert abs(source.start - (length - source.stop)) <= 1
        assert abs(target.start - (crop_size - target.stop)) <= 1


@pytest.mark.parametrize(
    ("length", "places"),
    [(8, {(s, 0) for s in range(4)}), (3, {(0, t) for t in range(3)}), (5, {(0, 0)})],
)
def test_random_crop_of_5_takes_every_place(length, places, rng):
    rows, columns = set(), set()
    for _ in range(200):
        source, target = transforms.crop_box(length, length, 5, rng)
        rows.add((source[0].start, target[0].start))
        columns.add((source[1].start, target[1].start))
    assert rows == columns == places


def test_random_crop_draws_rows_and_columns_apart(rng):
    boxes = [transforms.crop_box(9, 9, 8, rng)[0] for _ in range(50)]
    assert len({(rows.start, columns.start) for rows, columns in boxes}) == 4


def test_random_crop_is_uniform(rng):
    counts = np.bincount(
        [transforms.crop_box(13, 4, 10, rng)[0][0].start for _ in range(4000)], minlength=4
    )
    assert len(counts) == 4
    assert (abs(counts - 1000) < 150).all()
