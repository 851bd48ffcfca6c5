"""Pictures of a random walk: the label after more and more steps."""

import os
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from tool.files import atomic_write
from tool.labels import voc_palette

PANEL_WIDTH = 240  # pixels of a panel; its height follows from the image,
MAX_PANEL_HEIGHT = 720  # up to this: a narrow image is shown wider than it is
CAPTION_HEIGHT = 18  # pixels
LABEL_STRENGTH = 0.65  # of a label's colour over the photograph
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 600, 2000


def save_trace(
    path: str | os.PathLike, image: Image.Image, labels: Mapping[int, np.ndarray]
) -> None:
    """Write ``<path>.png``, the photograph and the labels side by side, and ``<path>.gif``, a film.

    ``labels`` is {number of steps: uint8 H x W index image} of an RGB image H x W, in the order to
    show. Raises OSError as ``atomic_write`` does.
    """
    panels = [_panel(image, None, "image")]
    for steps, label in labels.items():
        panels.append(_panel(image, label, f"{steps} step" + "s" * (steps != 1)))
    width, height = panels[0].size
    strip = Image.new("RGB", (width * len(panels), height))
    for index, panel in enumerate(panels):
        strip.paste(panel, (index * width, 0))
    with atomic_write(f"{path}.png") as file:
        strip.save(file, "PNG")
    durations = [FRAME_MILLISECONDS] * (len(panels) - 1) + [LAST_FRAME_MILLISECONDS]
    with atomic_write(f"{path}.gif") as file:
        panels[0].save(
            file, "GIF", save_all=True, append_images=panels[1:], duration=durations, loop=0
        )


def _panel(image: Image.Image, label: np.ndarray | None, caption: str) -> Image.Image:
    """The photograph, with the label in VOC's colours over it where there is one, and a caption."""
    picture = image
    if label is not None:
        pixels = np.asarray(image, np.float32)
        colours = np.asarray(voc_palette(), np.float32).reshape(-1, 3)[label]
        strength = np.where(label == 0, 0, LABEL_STRENGTH)[..., None]
        picture = Image.fromarray((pixels + (colours - pixels) * strength).astype(np.uint8))
    height = round(PANEL_WIDTH * image.height / image.width)
    height = min(max(1, height), MAX_PANEL_HEIGHT)
    panel = Image.new("RGB", (PANEL_WIDTH, CAPTION_HEIGHT + height), "white")
    panel.paste(picture.resize((PANEL_WIDTH, height)), (0, CAPTION_HEIGHT))
    ImageDraw.Draw(panel).text((4, 3), caption, fill="black")
    return panel
