"""Pictures of an image's maps, labels and random walk: colours over its photograph.

A layer is a palette image (mode P) whose colours have an opacity.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tool.files import atomic_write
from tool.labels import VOID, voc_palette

CLASS_COLOURS = np.array(voc_palette(), np.uint8).reshape(-1, 3)
# How a prediction differs from the mask. The colours suit every colour vision (Okabe and Ito).
DIFFERENCES = {
    "right": (0, 158, 115),
    "missed": (86, 180, 233),
    "too much": (230, 159, 0),
    "wrong class": (204, 121, 167),
}
PANEL_WIDTH = 234  # pixels of a picture on a sheet; its height follows from the image
MARGIN, CAPTION_HEIGHT = 6, 20  # pixels beside it and above it


def label_layer(label: np.ndarray, colours: np.ndarray = CLASS_COLOURS) -> Image.Image:
    """An index image in the colours uint8 256 x 3, opaque to 70 %; 0 is invisible, void black."""
    rgba = np.insert(colours, 3, round(255 * 0.7), axis=1)
    rgba[0], rgba[VOID] = 0, (0, 0, 0, 255)
    layer = Image.fromarray(label)
    layer.putpalette(rgba.tobytes(), "RGBA")
    return layer


def difference_layer(mask: np.ndarray, prediction: np.ndarray) -> Image.Image:
    """How a prediction differs from its mask: 1, 2, ... are the ``DIFFERENCES``.

    Background that is right is 0; what the mask or the prediction leaves void is 255.
    """
    void = (mask == VOID) | (prediction == VOID)
    right, background = mask == prediction, mask == 0
    kinds = [void, right & background, right, prediction == 0, background]
    index = np.select(kinds, [VOID, 0, 1, 2, 3], default=4).astype(np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    colours[1 : 1 + len(DIFFERENCES)] = list(DIFFERENCES.values())
    return label_layer(index, colours)


def heat_layer(values: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A map, float H x W in 0..1, the more opaque the higher its values: from 0 to 85 %.

    ``colours`` is uint8 256 x 3, those from 0 to 1, or one RGB colour, uint8 3.
    """
    rgba = np.empty((256, 4), np.uint8)
    rgba[:, :3] = colours
    rgba[:, 3] = np.linspace(0, 255 * 0.85, 256).round()
    layer = Image.fromarray((255 * values.clip(0, 1)).round().astype(np.uint8))
    layer.putpalette(rgba.tobytes(), "RGBA")
    return layer


def image_uri(image: Image.Image) -> str:
    """A small JPEG of an RGB photograph, or a small PNG of a layer, as a data URI."""
    kind = "PNG" if image.mode == "P" else "JPEG"
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((320, 320))
    small.save(buffer, kind, optimize=True)
    return data_uri(f"image/{kind.lower()}", buffer.getvalue())


def data_uri(media_type: str, content: bytes) -> str:
    """The content as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def panel(picture: Image.Image, caption: str, layers: Iterable[Image.Image] = ()) -> Image.Image:
    """An RGB picture in the width of a panel, with layers over it and a caption above it."""
    for layer in layers:
        picture = Image.alpha_composite(picture.convert("RGBA"), layer.convert("RGBA"))
    height = max(1, PANEL_WIDTH * picture.height // picture.width)
    drawn = Image.new("RGB", (PANEL_WIDTH + MARGIN, CAPTION_HEIGHT + height + MARGIN), "white")
    drawn.paste(picture.resize((PANEL_WIDTH, height)), (0, CAPTION_HEIGHT))
    ImageDraw.Draw(drawn).text((4, 2), caption, fill="black", font_size=13)
    return drawn


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Panels side by side, the rows below each other."""
    size = max(map(len, rows)) * rows[0][0].width, sum(row[0].height for row in rows)
    drawn, top = Image.new("RGB", size, "white"), 0
    for row in rows:
        for column, picture in enumerate(row):
            drawn.paste(picture, (column * picture.width, top))
        top += row[0].height
    return drawn


def save_overlay(
    path: Path, photograph: Image.Image, label: np.ndarray, label_names: Sequence[str]
) -> None:
    """Write an index image's labels over its RGB photograph as a PNG, a legend below them."""
    picture = Image.alpha_composite(photograph.convert("RGBA"), label_layer(label).convert("RGBA"))
    present = [k for k in np.unique(label).tolist() if k not in (0, VOID)]
    size = (picture.width, picture.height + CAPTION_HEIGHT * len(present))
    drawn = Image.new("RGB", size, "white")
    drawn.paste(picture.convert("RGB"))
    pen = ImageDraw.Draw(drawn)
    for row, k in enumerate(present):
        top = picture.height + CAPTION_HEIGHT * row
        pen.rectangle((4, top + 4, 16, top + 16), fill=tuple(CLASS_COLOURS[k].tolist()))
        pen.text((22, top + 2), label_names[k], fill="black", font_size=13)
    with atomic_write(path) as file:
        drawn.save(file, "PNG")


def walk_heat_map(result: Mapping):
    """A matplotlib figure of a sweep of the walk: mIoU over beta and logt, at the best background.

    ``result`` is that of ``voc12.evaluate.sweep_figures`` over beta, logt and alpha or bg.
    """
    from matplotlib.figure import Figure  # slow to import, and few need it

    kind, best = result["sweep"].split()[-1], result["best"]
    at_best = [point for point in result["points"] if point[kind] == best[kind]]
    miou = {(point["beta"], point["logt"]): point["miou"] for point in at_best}
    betas, logts = (list(dict.fromkeys(values)) for values in zip(*miou, strict=True))
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    heat = [[miou[beta, logt] for logt in logts] for beta in betas]
    figure.colorbar(axis.imshow(heat, aspect="auto"), label="mIoU (%)")
    for (beta, logt), value in miou.items():
        frame = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        weight = "bold" if value == best["miou"] else "normal"
        place = {"ha": "center", "va": "center", "weight": weight, "bbox": frame}
        axis.text(logts.index(logt), betas.index(beta), f"{value:.1f}", **place)
    axis.set_xticks(range(len(logts)), logts)
    axis.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axis.set(xlabel="logt (2^logt steps)", ylabel="beta", title=f"{kind} {best[kind]:g}")
    return figure


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
