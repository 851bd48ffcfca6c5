"""Writes a small synthetic PASCAL VOC devkit, to try the method in minutes without a download.

    python3 -m voc12.toy runs/toy --images 160 --size 192 --seed 0

Every object is one blob of two parts. Its *head*, a third of its area, has the colour and pattern
of its class; its *body* has only a trace of them, but differs clearly from the background. CAMs
therefore find the head and miss most of the body, which the random walk has to reach: the problem
that AffinityNet solves. (The shapes also differ slightly by class.)

The same arguments give the same files, byte for byte. An image depends on the seed and its index
only, so a larger devkit begins with the images of a smaller one.
"""

import argparse
import colorsys
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from tool.files import atomic_write, write_bytes
from tool.labels import VOID
from tool.maps import save_index_png
from tool.run import cli
from tool.run.errors import DataError
from voc12.devkit import VOC_CLASSES

# Lengths are fractions of an image's long side, so that a scene looks alike at every size.
SHORT_SIDE = (0.75, 1.0)


class Look(NamedTuple):
    """What distinguishes a class: its head's colour and pattern, and slightly its shape."""

    hsv: tuple[float, float, float]
    # (along, across) in pattern periods, H x W each -> a wave; the colour is where it is above 0
    pattern: Callable[[np.ndarray, np.ndarray], np.ndarray]
    aspect: float  # length / width
    squareness: float  # exponent of the superellipse: 2 is an ellipse, above is boxier
    lobes: int
    lobe_depth: float  # of the radius
    trace: float  # of colour and pattern on the body; larger if they are hard to see on tan


def _wave(phase: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * phase)


LOOKS = {
    "bird": Look((0.97, 1.00, 0.75), lambda u, v: _wave(u), 1.25, 2.0, 1, 0.18, 0.12),
    "boat": Look((0.62, 0.90, 0.80), lambda u, v: _wave(u) * _wave(v), 1.35, 2.2, 2, 0.10, 0.27),
    "bottle": Look((0.36, 0.90, 0.55), lambda u, v: _wave(v), 1.40, 2.6, 1, 0.10, 0.15),
    "cat": Look((0.79, 0.80, 0.65), lambda u, v: _wave(u + v), 1.15, 2.0, 3, 0.10, 0.22),
    "cow": Look((0.50, 0.95, 0.80), lambda u, v: _wave(np.hypot(u, v)), 1.25, 2.8, 4, 0.06, 0.20),
    "sheep": Look((0, 0, 1.00), lambda u, v: _wave(u) + _wave(v) - 0.4, 1.10, 2.0, 7, 0.07, 0.15),
}
TOY_CLASSES = tuple(LOOKS)


class _Blob(NamedTuple):
    """An object's geometry; all arrays are float H x W, the size of the image."""

    coverage: np.ndarray  # 0..1, soft at the edge
    head: np.ndarray  # 0..1, soft towards the body
    depth: np.ndarray  # 1 at the centre, 0 at the edge
    along: np.ndarray  # pixels from the centre towards the head
    across: np.ndarray


def make_devkit(out: str | Path, images: int, size: int, seed: int) -> None:
    """Write ``images`` scenes with a long side of ``size`` pixels as a devkit under ``out``.

    An interrupted call is completed by repeating it. Raises DataError if ``out`` holds anything
    but the devkit of these arguments.
    """
    out = Path(out)
    marker = out / "toy.json"  # written into a new folder before anything else
    content = (json.dumps({"images": images, "size": size, "seed": seed}) + "\n").encode()
    if not (marker.is_file() and marker.read_bytes() == content):
        if out.is_file() or (out.is_dir() and any(out.glob("[!.]*"))):
            raise DataError(f"{out}: is not a toy devkit of these arguments; name a new folder.")
        write_bytes(marker, content)

    ids = [f"toy_{index:06d}" for index in range(images)]
    for index, image_id in enumerate(cli.progress(ids, "toy devkit")):
        image, label, names = draw_scene(size, seed, index)
        with atomic_write(out / "JPEGImages" / f"{image_id}.jpg") as file:
            Image.fromarray(image).save(file, format="JPEG", quality=95)
        save_index_png(out / "SegmentationClassAug" / f"{image_id}.png", label)
        save_index_png(out / "SegmentationClass" / f"{image_id}.png", _with_void(label))
        objects = "".join(f"<object><name>{name}</name></object>\n" for name in names)
        annotation = f"<annotation>\n{objects}</annotation>\n".encode()
        write_bytes(out / "Annotations" / f"{image_id}.xml", annotation)

    val = ids[1::5]
    train = sorted(set(ids) - set(val))
    for split, members in {"train": train, "val": val}.items():
        lines = "".join(f"{image_id}\n" for image_id in members).encode()
        write_bytes(out / "ImageSets" / "Segmentation" / f"{split}.txt", lines)
    print(f"{out}: {images} images ({len(train)} train, {len(val)} val).")


def _with_void(label: np.ndarray) -> np.ndarray:
    """The uint8 H x W label with 255 wherever a 3 x 3 neighbourhood holds two values."""
    image = Image.fromarray(label)
    highest, lowest = image.filter(ImageFilter.MaxFilter(3)), image.filter(ImageFilter.MinFilter(3))
    return np.where(np.equal(highest, lowest), label, VOID).astype(np.uint8)


def draw_scene(size: int, seed: int, index: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Image ``index`` of the devkit with this seed; its long side is ``size`` pixels.

    Returns the image, uint8 H x W x 3 RGB; its label without void, uint8 H x W, 0 background and
    k + 1 class k; and the classes of its objects, the farthest first.
    """
    rng = np.random.default_rng([seed, index])
    short = round(size * rng.uniform(*SHORT_SIDE))
    height, width = (short, size) if rng.random() < 0.5 else (size, short)
    canvas = _background(rng, height, width)  # float H x W x 3
    # Each class is first in train and val: 6 classes and every 5th image have no common divisor.
    first = TOY_CLASSES[index % len(TOY_CLASSES)]
    others = [name for name in TOY_CLASSES if name != first]
    num_others = rng.choice((0, 1, 2), p=(0.6, 0.3, 0.1))
    blobs, names = [], []
    owner = np.full((height, width), -1)  # the blob visible at each pixel, -1 the background
    for name in [first, *rng.choice(others, num_others, replace=False).tolist()]:
        blob = _place(rng, LOOKS[name], size, blobs, owner)
        if blob is None:
            continue
        owner[blob.coverage > 0.5] = len(blobs)
        blobs.append(blob)
        names.append(name)
        colour = _colour(rng, LOOKS[name], blob, size)
        canvas += (colour - canvas) * blob.coverage[..., None]
    canvas += rng.normal(0, 0.015, (height, width, 1))  # sensor noise
    image = np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)
    labels = np.array([0] + [VOC_CLASSES.index(name) + 1 for name in names], np.uint8)
    return image, labels[owner + 1], names


def _place(
    rng: np.random.Generator, look: Look, size: int, blobs: list[_Blob], owner: np.ndarray
) -> _Blob | None:
    """A blob in front of the others; None if twenty tries all hide too much of them."""
    for _ in range(20):
        blob = _draw_blob(rng, look, size, *owner.shape)
        visible = np.where(blob.coverage > 0.5, -1, owner)
        # Half of an object and of its head must show: a hidden head would make a wrong label.
        if all(
            (visible[part > 0.5] == index).mean() >= 0.5
            for index, other in enumerate(blobs)
            for part in (other.coverage, np.minimum(other.coverage, other.head))
        ):
            return blob
    return None


def _draw_blob(rng: np.random.Generator, look: Look, size: int, height: int, width: int) -> _Blob:
    """A connected, star-shaped blob: a superellipse with the lobes of its class and a wobble."""
    diameter = size * rng.uniform(0.42, 0.58)
    length = diameter / 2 * np.sqrt(look.aspect) * rng.uniform(0.93, 1.07)
    breadth = diameter**2 / 4 / length
    centre_y, centre_x = rng.uniform(0.45 * diameter, np.array([height, width]) - 0.45 * diameter)
    y, x = np.mgrid[:height, :width]
    y, x = y - centre_y, x - centre_x
    turn = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)

    distance, angle = np.hypot(along, across) + 1e-6, np.arctan2(across, along)
    power = look.squareness
    ellipse = abs(along / length) ** power + abs(across / breadth) ** power  # 1 on the outline
    radius = distance / (ellipse + 1e-9) ** (1 / power)
    radius *= 1 - look.lobe_depth * np.cos(look.lobes * angle)
    for lobes in (2, 3, 5):
        radius *= 1 + rng.uniform(-0.035, 0.035) * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi))
    coverage = (radius - distance + 0.5).clip(0, 1)

    # The head, 0.28 to 0.4 of the area, ends at a slightly curved line across the blob.
    rank = along + rng.uniform(-0.25, 0.25) * across**2 / breadth
    start = np.quantile(rank[coverage > 0.5], 1 - rng.uniform(0.28, 0.4))
    head = ((rank - start) / (0.02 * size) + 0.5).clip(0, 1)
    return _Blob(coverage, head, (1 - distance / radius).clip(0, 1), along, across)


def _colour(rng: np.random.Generator, look: Look, blob: _Blob, size: int) -> np.ndarray:
    """The blob's surface, float H x W x 3: the pattern of its class, faint on the body.

    The head keeps some of the body's colour, so that both look like one object. A body without any
    trace of its class would get no activation at all and become confident background.
    """
    body = _rgb(rng.uniform(0.05, 0.13), rng.uniform(0.3, 0.6), rng.uniform(0.65, 0.92))
    hue, saturation, value = look.hsv
    ink = _rgb(hue + rng.uniform(-0.015, 0.015), saturation, value)
    body += look.trace * (ink - body)
    period = 0.045 * size * rng.uniform(0.9, 1.1)
    wave = look.pattern(blob.along / period, blob.across / period)
    strength = (look.trace + (1 - look.trace) * blob.head) * (1.0 + 1.5 * wave).clip(0.3, 1)
    surface = body + (ink - body) * strength[..., None]

    light = rng.uniform(0, 2 * np.pi)
    tilt = (blob.along * np.cos(light) + blob.across * np.sin(light)) / size
    shade = 0.72 + 0.3 * np.sqrt(1 - (1 - blob.depth) ** 2) + 0.25 * tilt
    shade += 0.04 * _smooth_noise(rng, *shade.shape, cells=12)
    return surface * shade[..., None]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two muted cool colours mixed by noise, with stripes or speckle: float H x W x 3."""
    first, second = (
        _rgb(rng.uniform(0.22, 0.7), rng.uniform(0.08, 0.3), value)
        for value in (rng.uniform(0.25, 0.45), rng.uniform(0.45, 0.65))
    )
    y, x = np.mgrid[:height, :width] / max(height, width)
    turn = rng.uniform(0, 2 * np.pi)
    slope = x * np.cos(turn) + y * np.sin(turn)
    octaves = sum(
        _smooth_noise(rng, height, width, cells) / weight
        for weight, cells in ((1, 3), (1.5, 7), (2.5, 15), (4, 31))
    )
    mix = 0.5 + 0.5 * (slope - slope.mean()) + 0.3 * octaves
    kind = rng.choice(["plain", "stripes", "speckle"])
    if kind == "stripes":
        mix += 0.16 * _wave(rng.uniform(6, 14) * slope + 0.3 * octaves)
    if kind == "speckle":
        mix += 0.45 * _smooth_noise(rng, height, width, cells=64)
    return first + (second - first) * mix.clip(0, 1)[..., None]


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Noise of about -1..1 with ``cells`` bumps a side: float H x W."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m voc12.toy")
    add = parser.add_argument
    add("out", metavar="OUT", help="folder of the devkit; created if missing")
    add("--images", default=160, type=cli.number(int, 2), help="images; one of five is for val")
    add("--size", default=192, type=cli.number(int, 64, 4096), help="long side of an image, pixels")
    add("--seed", default=0, type=cli.number(int, 0), help="another seed gives another data set")
    return parser


def main(args: argparse.Namespace) -> None:
    make_devkit(args.out, args.images, args.size, args.seed)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
