"""Pictures of a random walk: the label after more and more steps."""

import os
from collections.abc import Mapping

import numpy as np
from PIL import Image

from tool.files import atomic_write
from voc12.report.pictures import grid, label_layer, panel

FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 600, 2000


def save_trace(
    path: str | os.PathLike, image: Image.Image, labels: Mapping[int, np.ndarray]
) -> None:
    """Write ``<path>.png``, the photograph and the labels side by side, and ``<path>.gif``, a film.

    ``labels`` is {number of steps: uint8 H x W index image} of an RGB image H x W, in the order to
    show. Raises OSError as ``atomic_write`` does.
    """
    panels = [panel(image, "image")]
    for steps, label in labels.items():
        caption = "1 step" if steps == 1 else f"{steps} steps"
        panels.append(panel(image, caption, [label_layer(label)]))
    with atomic_write(f"{path}.png") as file:
        grid([panels]).save(file, "PNG")
    durations = [FRAME_MILLISECONDS] * (len(panels) - 1) + [LAST_FRAME_MILLISECONDS]
    with atomic_write(f"{path}.gif") as file:
        panels[0].save(
            file, "GIF", save_all=True, append_images=panels[1:], duration=durations, loop=0
        )
