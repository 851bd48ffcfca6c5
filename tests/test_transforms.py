"""Resizes, crops, flips and jitter: positions of pixels, and reproducible random numbers."""

import functools
from collections import Counter
from itertools import product

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


def test_sample_rng_depends_on_seed_epoch_and_id_alone():
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 1, "b")]
    drawn = [transforms.sample_rng(*key).integers(2**60) for key in keys]
    assert [transforms.sample_rng(*key).integers(2**60) for key in reversed(keys)] == drawn[::-1]
    assert len(set(drawn)) == len(keys)


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
    assert np.array_equal(transforms.rescale(image, 1), image)


def test_random_long_side_covers_its_range(rng):
    image = Image.new("RGB", (40, 10))
    drawn = {max(transforms.random_resize_long_side(image, 30, 34, rng).size) for _ in range(200)}
    assert drawn == {30, 31, 32, 33, 34}


def test_colour_jitter_is_the_same_for_the_same_generator():
    generators = map(np.random.default_rng, (3, 3, 4))
    first, again, other = (transforms.colour_jitter(_image(), rng).tobytes() for rng in generators)
    assert first == again != other


def test_colour_jitter_draws_within_its_ranges_in_any_order(rng, monkeypatch):
    calls = []
    names = ("brightness", "contrast", "saturation", "hue")

    def record(name, image, amount):
        calls.append((name, amount))
        return image

    for name in names:
        monkeypatch.setattr(TF, f"adjust_{name}", functools.partial(record, name))
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


def test_flip_mirrors_columns_and_to_chw_moves_channels_first(rng):
    array = rng.normal(size=(4, 5, 3))
    flipped, moved = transforms.flip(array), transforms.to_chw(array)
    assert flipped.flags.c_contiguous
    assert moved.flags.c_contiguous
    assert np.array_equal(flipped, array[:, [4, 3, 2, 1, 0]])
    assert moved.shape == (3, 4, 5)
    assert moved[2, 1, 3] == array[1, 3, 2]


def _assert_pasted(array, canvas, box, crop_size):
    """The box's part of the image is on the canvas, unchanged; the rest of the canvas is zero."""
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
def test_random_crop_is_a_part_of_the_image_on_zeros(height, width, crop_size, seed):
    rng = np.random.default_rng(seed)
    array = rng.integers(1, 255, (height, width, 2), dtype=np.uint8)
    box = transforms.crop_box(height, width, crop_size, rng)
    _assert_pasted(array, transforms.crop_to_canvas(array, box, crop_size), box, crop_size)


@given(lengths, lengths, st.integers(1, 30))
def test_centre_crop_puts_the_centre_on_the_centre(height, width, crop_size):
    array = np.ones((height, width), np.float32)
    box = transforms.centre_box(height, width, crop_size)
    _assert_pasted(array, transforms.crop_to_canvas(array, box, crop_size), box, crop_size)
    for source, target, length in zip(*box, (height, width), strict=True):
        assert abs(source.start - (length - source.stop)) <= 1
        assert abs(target.start - (crop_size - target.stop)) <= 1


@pytest.mark.parametrize(
    ("length", "positions"),
    [(8, {(s, 0) for s in range(4)}), (3, {(0, t) for t in range(3)}), (5, {(0, 0)})],
)
def test_random_crop_is_uniform_and_draws_rows_and_columns_independently(length, positions, rng):
    drawn = Counter()
    for _ in range(1600):
        starts = [
            (source.start, target.start)
            for source, target in zip(*transforms.crop_box(length, length, 5, rng), strict=True)
        ]
        drawn[tuple(starts)] += 1
    assert set(drawn) == set(product(positions, repeat=2))
    expected = 1600 / len(positions) ** 2
    assert all(abs(count - expected) < 0.5 * expected for count in drawn.values())
