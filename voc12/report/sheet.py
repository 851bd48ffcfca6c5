"""The sheet of voc12.report: pictures of some images as one PNG, a row an image."""

import io
from collections.abc import Sequence
from functools import reduce

import numpy as np
from matplotlib.figure import Figure

from voc12.report.data import Outputs
from voc12.report.pictures import Layer, class_colours, heat_layer, label_layer, laid_over

INCHES, DOTS_PER_INCH = 2.2, 90  # of a panel


def sheet(outputs: Outputs, ids: Sequence[str]) -> bytes:
    """The sheet of these images as a PNG file."""
    with_masks = bool(outputs.masked(ids))
    rows = [panels(outputs, image_id, with_masks) for image_id in ids]
    columns = len(rows[0])
    size = (INCHES * columns, INCHES * len(ids))
    figure = Figure(size, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(len(ids), columns, squeeze=False)
    for axis, title in zip(axes[0], rows[0], strict=True):
        axis.set_title(title, fontsize="medium")
    for row, pictures in zip(axes, rows, strict=True):
        for axis, picture in zip(row, pictures.values(), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def panels(outputs: Outputs, image_id: str, with_mask: bool) -> dict[str, np.ndarray]:
    """The pictures of an image by title, float H x W x 3 in 0..1."""
    photograph = outputs.devkit.load_image(image_id)
    size = photograph.height, photograph.width
    layers: dict[str, list[Layer]] = {}
    if outputs.cam:
        cams, colours = outputs.cams(image_id, size), class_colours()
        heat = [heat_layer(values, colours[index + 1]) for index, values in cams.items()]
        layers["class activation maps"] = heat
    if outputs.la:
        layers["confident labels"] = [label_layer(outputs.confident(image_id, size))]
    if outputs.rw:
        layers["random walk"] = [label_layer(outputs.walk(image_id, size))]
    if with_mask:
        mask = outputs.mask(image_id, size)
        layers["mask"] = [] if mask is None else [label_layer(mask)]

    gray = np.asarray(photograph.convert("L").convert("RGB")) / 255
    pictures = {title: reduce(laid_over, over, gray) for title, over in layers.items()}
    return {"image": np.asarray(photograph) / 255, **pictures}
