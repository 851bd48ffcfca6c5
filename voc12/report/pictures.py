"""What voc12.report draws of an image: colours that lie over its photograph, and words for it."""

import base64
import io
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image

from tool.affinity import affinity_label
from tool.labels import VOID, index_image, voc_palette
from tool.maps import stack_maps

STRIDE = 8  # cells of the affinity labels, as in training
HEAT_COLOURS = "inferno"  # of matplotlib; perceptually even, also without colour vision
HEAT_OPACITY = 0.85  # of a map's maximum
LABEL_OPACITY = 0.7
PHOTOGRAPH_SIDE = 360  # pixels of a thumbnail's long side, also of labels
HEAT_SIDE = 128  # maps are smooth: they were enlarged eightfold
JPEG_QUALITY = 80
BLACK = (0, 0, 0, 255)

# How a prediction differs from the mask, and its colour: Okabe and Ito's, told apart by everybody.
RIGHT_BACKGROUND, RIGHT, MISSED, ADDED, CONFUSED = range(5)
DIFFERENCES = {
    RIGHT: ("right", (0, 158, 115)),
    MISSED: ("missed", (86, 180, 233)),
    ADDED: ("too much", (230, 159, 0)),
    CONFUSED: ("wrong class", (204, 121, 167)),
}


class Layer(NamedTuple):
    """Colours to lie over a photograph: uint8 H x W indices, and uint8 256 x 4 RGBA for them."""

    index: np.ndarray
    colours: np.ndarray


def heat_layer(values: np.ndarray, colour: np.ndarray | None = None) -> Layer:
    """A map, float H x W in 0..1, in matplotlib's heat colours or one RGB colour (uint8 3).

    The higher a value, the more opaque; 0 is invisible.
    """
    colours = heat_colours()
    if colour is not None:
        colours[:, :3] = colour
    return Layer((255 * values.clip(0, 1)).round().astype(np.uint8), colours)


def heat_colours() -> np.ndarray:
    """uint8 256 x 4 RGBA, from invisible to bright."""
    steps = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[HEAT_COLOURS](steps, bytes=True)
    colours[:, 3] = (255 * HEAT_OPACITY * steps).round()
    return colours


def label_layer(label: np.ndarray) -> Layer:
    """An index image in VOC's colours; background is invisible, void black."""
    colours = np.full((256, 4), round(255 * LABEL_OPACITY), np.uint8)
    colours[:, :3] = class_colours()
    colours[0] = 0
    colours[VOID] = BLACK
    return Layer(label, colours)


def difference_layer(difference: np.ndarray) -> Layer:
    """What ``differences`` gives, in the colours of ``DIFFERENCES``; right background stays."""
    colours = np.zeros((256, 4), np.uint8)
    for kind, (_, colour) in DIFFERENCES.items():
        colours[kind] = (*colour, round(255 * LABEL_OPACITY))
    colours[VOID] = BLACK
    return Layer(difference, colours)


def class_colours() -> np.ndarray:
    """VOC's palette, uint8 256 x 3."""
    return np.array(voc_palette(), np.uint8).reshape(-1, 3)


def laid_over(picture: np.ndarray, layer: Layer) -> np.ndarray:
    """The layer over a picture of its size, both float H x W x 3 in 0..1."""
    colours = layer.colours[layer.index] / 255
    return picture + (colours[..., :3] - picture) * colours[..., 3:]


def differences(mask: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """How a prediction differs from its mask at each pixel: uint8 H x W, the kinds named above,
    255 where the mask is void."""
    difference = np.full(mask.shape, RIGHT_BACKGROUND, np.uint8)
    difference[(mask != 0) & (prediction == mask)] = RIGHT
    difference[(mask != 0) & (prediction == 0)] = MISSED
    difference[(mask == 0) & (prediction != 0)] = ADDED
    difference[(mask != 0) & (prediction != 0) & (prediction != mask)] = CONFUSED
    difference[mask == VOID] = VOID
    return difference


def confident_label(low: dict[int, np.ndarray], high: dict[int, np.ndarray]) -> np.ndarray:
    """What AffinityNet learns of a whole image: uint8 H x W, 0 background, k class, 255 void."""
    height, width = low[0].shape
    if min(height, width) < STRIDE:
        return np.full((height, width), VOID, np.uint8)
    low_scores, high_scores = (
        torch.from_numpy(stack_maps(maps, (height, width))) for maps in (low, high)
    )
    cells = affinity_label(low_scores, high_scores, STRIDE).numpy()
    void = cells == VOID
    label = index_image(np.where(void, 0, cells), [label - 1 for label in low if label > 0])
    label[void] = VOID
    enlarged = label.repeat(STRIDE, axis=0).repeat(STRIDE, axis=1)
    # A border that does not fill a cell has no label.
    bottom, right = height - len(enlarged), width - enlarged.shape[1]
    return np.pad(enlarged, ((0, bottom), (0, right)), constant_values=VOID)


def shares(index: np.ndarray, names: dict[int, str]) -> str:
    """The named indices that occur, each with its share of the pixels: ``cat 12.5 %, dog 3.0 %``.

    Larger shares first; "nothing" where none occurs.
    """
    share = np.bincount(index.ravel(), minlength=256) / index.size
    present = sorted((key for key in names if share[key]), key=lambda key: -share[key])
    return ", ".join(f"{names[key]} {percents(share[key])}" for key in present) or "nothing"


def percents(share: float) -> str:
    """A share in 0..1 as per cent, which stay on the figure's line."""
    return f"{100 * share:.1f}\xa0%"


def photograph_uri(photograph: Image.Image) -> str:
    """A small JPEG of an RGB photograph as a data URI."""
    small = photograph.resize(_small(photograph.size, PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
    return _data_uri(small, "JPEG", quality=JPEG_QUALITY, optimize=True)


def layer_uri(layer: Layer, smooth: bool = False) -> str:
    """A small transparent PNG of a layer as a data URI; ``smooth`` is for heat, not for labels."""
    image = Image.fromarray(layer.index)
    side, resample = (
        (HEAT_SIDE, Image.Resampling.BOX) if smooth else (PHOTOGRAPH_SIDE, Image.Resampling.NEAREST)
    )
    image = image.resize(_small(image.size, side), resample)
    image.putpalette(layer.colours[:, :3].tobytes())
    return _data_uri(image, "PNG", transparency=layer.colours[:, 3].tobytes(), optimize=True)


def _small(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size scaled so that its long side is ``side``; a smaller one stays as it is."""
    scale = min(1, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _data_uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return data_uri(f"image/{kind.lower()}", buffer.getvalue())


def data_uri(media_type: str, content: bytes) -> str:
    """The content as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
