"""Resizing, flips, crops and colour jitter; the caller's generator draws every random number."""

import zlib

import numpy as np
from PIL import Image

# (Rows, columns) in the image, and (rows, columns) on the canvas.
Box = tuple[tuple[slice, slice], tuple[slice, slice]]


def sample_rng(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """The generator of an image's augmentation in one epoch; depends on these three alone."""
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
    import torchvision.transforms.functional as F  # slow to import, and only training needs it

    changes = (  # as in the released code
        (F.adjust_brightness, rng.uniform(0.7, 1.3)),
        (F.adjust_contrast, rng.uniform(0.7, 1.3)),
        (F.adjust_saturation, rng.uniform(0.7, 1.3)),
        (F.adjust_hue, rng.uniform(-0.1, 0.1)),
    )
    for index in rng.permutation(len(changes)):
        adjust, amount = changes[index]
        image = adjust(image, amount)
    return image


def shift_hsv(image: Image.Image, limit: int, rng: np.random.Generator) -> Image.Image:
    """The RGB image with hue, saturation and value shifted by uniform integers up to ``limit``.

    Of 0..255 each; hue is cyclic.
    """
    shifted = np.asarray(image.convert("HSV")) + rng.integers(-limit, limit + 1, 3)
    hue, rest = shifted[..., :1] % 256, shifted[..., 1:].clip(0, 255)
    values = np.concatenate([hue, rest], axis=-1).astype(np.uint8)
    return Image.fromarray(values, "HSV").convert("RGB")


def flip(array: np.ndarray) -> np.ndarray:
    """H x W (x C) mirrored left to right, contiguous."""
    return np.ascontiguousarray(array[:, ::-1])


def crop_box(height: int, width: int, crop_size: int, rng: np.random.Generator) -> Box:
    """A random crop of an image for a canvas of crop_size x crop_size pixels.

    A longer side of the image is cut at a uniformly drawn position; a shorter one is put at a
    uniformly drawn position on the canvas.
    """
    rows = _overlap(height, crop_size, int(rng.integers(abs(height - crop_size) + 1)))
    columns = _overlap(width, crop_size, int(rng.integers(abs(width - crop_size) + 1)))
    return (rows[0], columns[0]), (rows[1], columns[1])


def centre_box(height: int, width: int, crop_size: int) -> Box:
    """Like ``crop_box``, with the image's centre on the canvas's centre."""
    rows = _overlap(height, crop_size, abs(height - crop_size) // 2)
    columns = _overlap(width, crop_size, abs(width - crop_size) // 2)
    return (rows[0], columns[0]), (rows[1], columns[1])


def _overlap(length: int, crop_size: int, position: int) -> tuple[slice, slice]:
    """One side's slices of image and canvas; that of the longer one starts at ``position``."""
    size = min(length, crop_size)
    start, canvas_start = (position, 0) if length > crop_size else (0, position)
    return slice(start, start + size), slice(canvas_start, canvas_start + size)


def crop_to_canvas(array: np.ndarray, box: Box, crop_size: int, fill: int = 0) -> np.ndarray:
    """The box of H x W (x C) on a canvas of ``fill``, crop_size x crop_size (x C), of its dtype."""
    source, target = box
    canvas = np.full((crop_size, crop_size, *array.shape[2:]), fill, array.dtype)
    canvas[target] = array[source]
    return canvas


def to_chw(array: np.ndarray) -> np.ndarray:
    """H x W x C -> C x H x W, contiguous."""
    return np.ascontiguousarray(array.transpose(2, 0, 1))
