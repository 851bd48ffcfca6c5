"""Pictures of a random walk: the label after more and more steps."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from tool.files import atomic_write
from voc12.report.pictures import grid, label_layer, panel


def save_trace(path: Path, image: Image.Image, labels: Mapping[int, np.ndarray]) -> None:
    """Write ``<path>.png``, the photograph and the labels side by side, and ``<path>.gif``, a film.

    ``labels`` is {number of steps: uint8 H x W index image} of an RGB image H x W, ascending.
    """
    panels = [panel(image, "image")]
    for steps, label in labels.items():
        panels.append(panel(image, f"steps: {steps}", [label_layer(label)]))
    with atomic_write(f"{path}.png") as file:
        grid([panels]).save(file, "PNG")
    film = {"append_images": panels[1:], "duration": [600] * (len(panels) - 1) + [2000], "loop": 0}
    with atomic_write(f"{path}.gif") as file:
        panels[0].save(file, "GIF", save_all=True, **film)
