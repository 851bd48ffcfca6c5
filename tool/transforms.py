"""Resizing, flips, crops and colour jitter; the caller's generator draws every random number."""

import zlib

import numpy as np
from PIL import Image

# Augmentation of both training stages (released code): range of brightness, contrast and
# saturation around 1, and of hue around 0.
JITTER_STRENGTH = 0.3
JITTER_HUE = 0.1


def sample_rng(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """The generator of one image's augmentation in one epoch.

    It depends on these three alone: the number of loader workers and the order of the images do
    not change what is drawn.
    """
    return np.random.default_rng([seed, epoch, zlib.crc32(image_id.encode())])


def resize_long_side(image: Image.Image, long_side: int) -> Image.Image:
    """The image with its longer side resized to ``long_side`` pixels, bicubic."""
    width, height = image.size
    longest = max(width, height)
    return resize(image, round(height * long_side / longest), round(width * long_side / longest))


def rescale(image: Image.Image, scale: float) -> Image.Image:
    """The image with both sides multiplied by ``scale``, bicubic."""
    width, height = image.size
    return resize(image, round(height * scale), round(width * scale))


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image at the given size in pixels, bicubic; each side has at least one pixel."""
    return image.resize((max(1, width), max(1, height)), resample=Image.Resampling.BICUBIC)


def random_resize_long_side(
    image: Image.Image, shortest: int, longest: int, rng: np.random.Generator
) -> Image.Image:
    """The image with its longer side resized to a uniform integer in shortest..longest."""
    return resize_long_side(image, int(rng.integers(shortest, longest + 1)))


def colour_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The RGB image with brightness, contrast, saturation and hue changed in random order."""
    # Imported here because the import is slow, and only training needs it.
    import torchvision.transforms.functional as F

    low, high = 1 - JITTER_STRENGTH, 1 + JITTER_STRENGTH
    changes = (
        (F.adjust_brightness, rng.uniform(low, high)),
        (F.adjust_contrast, rng.uniform(low, high)),
        (F.adjust_saturation, rng.uniform(low, high)),
        (F.adjust_hue, rng.uniform(-JITTER_HUE, JITTER_HUE)),
    )
    for index in rng.permutation(len(changes)):
        adjust, amount = changes[index]
        image = adjust(image, amount)
    return image


def flip(array: np.ndarray) -> np.ndarray:
    """H x W (x C) mirrored left to right, contiguous."""
    return np.ascontiguousarray(array[:, ::-1])


def crop_box(
    height: int, width: int, crop_size: int, rng: np.random.Generator
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """A random crop: its (rows, columns) in the image, and its (rows, columns) on the canvas.

    The canvas is crop_size x crop_size pixels. A longer side of the image is cut at a uniformly
    drawn position; a shorter one is put at a uniformly drawn position on the canvas.
    """
    rows_from, rows_to = _crop_side(height, crop_size, rng)
    columns_from, columns_to = _crop_side(width, crop_size, rng)
    return (rows_from, columns_from), (rows_to, columns_to)


def _crop_side(length: int, crop_size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    size = min(length, crop_size)
    slack = abs(length - crop_size)
    position = int(rng.integers(slack + 1))
    start, canvas_start = (position, 0) if length > crop_size else (0, position)
    return slice(start, start + size), slice(canvas_start, canvas_start + size)


def centre_box(
    height: int, width: int, crop_size: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Like ``crop_box``, with the image's centre on the canvas's centre."""
    rows_from, rows_to = _centre_side(height, crop_size)
    columns_from, columns_to = _centre_side(width, crop_size)
    return (rows_from, columns_from), (rows_to, columns_to)


def _centre_side(length: int, crop_size: int) -> tuple[slice, slice]:
    size = min(length, crop_size)
    start, canvas_start = max(0, length - crop_size) // 2, max(0, crop_size - length) // 2
    return slice(start, start + size), slice(canvas_start, canvas_start + size)


def crop_to_canvas(array: np.ndarray, box: tuple, crop_size: int) -> np.ndarray:
    """The box of H x W (x C) on a canvas of zeros, crop_size x crop_size (x C), of its dtype."""
    source, target = box
    canvas = np.zeros((crop_size, crop_size, *array.shape[2:]), array.dtype)
    canvas[target] = array[source]
    return canvas


def to_chw(array: np.ndarray) -> np.ndarray:
    """H x W x C -> C x H x W, contiguous."""
    return np.ascontiguousarray(array.transpose(2, 0, 1))
