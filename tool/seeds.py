"""Class maps ("seeds") as other methods write them; docs/seeds.md lists whose.

A file holds the maps by class, ``{class: H x W}``, or stacked: ``keys``, the classes, beside an
array K x H x W under one of the names in ``STACKS``.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

# Names of stacked maps. A file may hold them in two sizes; those of full size come first here.
STACKS = ("high_res", "hr_cam", "attn_highres", "rw", "cam")
NORMALIZATIONS = ("max", "minmax")
EPSILON = 1e-5  # as CAMs are divided


def by_class(content: Mapping) -> dict:
    """The maps of a file's content by class: its own entries, or the stack and its keys.

    K + 1 keys that begin with 0 are labels, the background first: the classes are those minus one.
    Raises ValueError for keys without a stack that fits them.
    """
    if "keys" not in content:
        return dict(content)
    name = next((name for name in STACKS if name in content), None)
    if name is None:
        raise ValueError(f"beside keys are maps named {', '.join(STACKS)}, not {listed(content)}")
    keys, maps = np.asarray(content["keys"]), np.asarray(content[name])
    if keys.ndim != 1 or keys.dtype.kind not in "iu" or maps.ndim != 3:
        shapes = f"{keys.dtype} {keys.shape} and {maps.shape}"
        raise ValueError(f"keys and {name} must be K whole numbers and K x H x W, not {shapes}")
    classes = keys.tolist()
    if len(classes) == len(maps) + 1 and classes[0] == 0:
        classes = [label - 1 for label in classes[1:]]
    if len(classes) != len(maps) or len(set(classes)) < len(classes):
        raise ValueError(f"the {len(keys)} keys do not name the {len(maps)} maps of {name} once")
    return dict(zip(classes, maps, strict=True))


def listed(content: Mapping) -> str:
    """A content's keys for an error's sentence."""
    return ", ".join(repr(key) for key in content)[:200]


def resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map, float32 h x w, in an image's (H, W), bilinear (align_corners=False).

    It stays as it is where it has that size, and where it cannot be the image divided by a stride:
    if it is larger, or if the ratio of its sides differs by more than one cell.
    """
    (h, w), (height, width) = values.shape, size
    is_smaller = 0 < h <= height and 0 < w <= width and (h, w) != (height, width)
    if not is_smaller or abs(h * width - w * height) >= max(height, width):
        return values
    tensor = torch.from_numpy(values)[None, None]
    return F.interpolate(tensor, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def normalize(values: np.ndarray, how: str) -> np.ndarray:
    """One class's map, float32 H x W, in 0..1.

    ``max`` sets negative values to 0 and divides by the largest, as this project's CAMs are made;
    ``minmax`` maps the smallest value to 0 and the largest to 1.
    """
    values = values.clip(min=0) if how == "max" else values - values.min()
    return values / (values.max() + np.float32(EPSILON))
