"""Draws what the stages made of some images, side by side, as one picture.

    python3 -m voc12.report --voc12_root VOC2012 --list voc12/val.txt --cam CAM --rw RW
        --la LA --ha HA --images 6 --out sheet.png

A row an image: the photograph, its CAMs as heat, the confident labels that AffinityNet learns from
(black where they are void), the random walk's label, and the mask. Columns whose folder is not
named are left out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tool import cli
from tool.affinity import affinity_label
from tool.errors import DataError, UsageError
from tool.maps import VOID, atomic_write, load_index_png, load_maps, voc_palette
from voc12.data import (
    Devkit,
    add_devkit_arguments,
    index_image,
    load_cams,
    open_devkit,
    read_ids,
)

HEAT_STRENGTH = 0.65  # of a CAM's maximum over the gray photograph
LABEL_STRENGTH = 0.65  # of a label's colour over the gray photograph
INCHES, DOTS_PER_INCH = 2.2, 90  # of a panel
STRIDE = 8  # cells of the affinity labels, as in training


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m voc12.report", description=__doc__, formatter_class=cli.help_formatter
    )
    add = parser.add_argument
    add_devkit_arguments(parser, labels=False)
    add("--list", required=True, help="images to choose from")
    add("--images", type=cli.positive_int, default=6, help="rows: this many, evenly from the list")
    add("--cam", metavar="DIR", help="class activation maps")
    add("--la", metavar="DIR", help="CRF scores with the low alpha; needs --ha")
    add("--ha", metavar="DIR", help="CRF scores with the high alpha; needs --la")
    add("--rw", metavar="DIR", help="the random walk's index images")
    add("--out", required=True, metavar="FILE.png", help="the picture")
    return parser


class Panel(NamedTuple):
    """A column: its title, and what draws an image's id and gray photograph (float H x W x 3)."""

    title: str
    draw: Callable[[str, np.ndarray], np.ndarray]


def paint_heat(gray: np.ndarray, maps: dict[int, np.ndarray]) -> np.ndarray:
    """Class maps over a gray photograph, each in its class's colour: float H x W x 3 in 0..1."""
    picture = gray.copy()
    for index, values in maps.items():
        strength = (HEAT_STRENGTH * values.clip(0, 1))[..., None]
        picture += (_colours()[index + 1] - picture) * strength
    return picture


def paint_label(gray: np.ndarray, label: np.ndarray) -> np.ndarray:
    """An index image over a gray photograph; background shows the photograph, void is black."""
    colours = _colours()
    colours[VOID] = 0
    strength = np.where(label == 0, 0, LABEL_STRENGTH)
    strength = np.where(label == VOID, 1, strength)[..., None]
    return gray + (colours[label] - gray) * strength


def _colours() -> np.ndarray:
    """VOC's palette, float 256 x 3 in 0..1."""
    return np.array(voc_palette()).reshape(-1, 3) / 255


def confident_label(low: dict[int, np.ndarray], high: dict[int, np.ndarray]) -> np.ndarray:
    """What AffinityNet learns of a whole image: uint8 H x W, 0 background, k class, 255 void."""
    low_scores, high_scores = (
        torch.from_numpy(np.stack(list(maps.values()))) for maps in (low, high)
    )
    cells = affinity_label(low_scores, high_scores, STRIDE).numpy()
    void = cells == VOID
    label = index_image(np.where(void, 0, cells), [label - 1 for label in low if label > 0])
    label[void] = VOID
    height, width = low_scores.shape[-2:]
    enlarged = label.repeat(STRIDE, axis=0).repeat(STRIDE, axis=1)
    # A border that does not fill a cell has no label.
    bottom, right = max(0, height - len(enlarged)), max(0, width - enlarged.shape[1])
    return np.pad(enlarged, ((0, bottom), (0, right)), constant_values=VOID)[:height, :width]


def panels(args: argparse.Namespace, devkit: Devkit) -> list[Panel]:
    """The columns between photograph and mask that the command line asks for."""

    def heat(image_id: str, gray: np.ndarray) -> np.ndarray:
        path = Path(args.cam, f"{image_id}.npy")
        return paint_heat(gray, load_cams(path, gray.shape[:2], len(devkit.class_names)))

    def confident(image_id: str, gray: np.ndarray) -> np.ndarray:
        low, high = (
            load_maps(Path(folder, f"{image_id}.npy"), gray.shape[:2])
            for folder in (args.la, args.ha)
        )
        return paint_label(gray, confident_label(low, high))

    def walked(image_id: str, gray: np.ndarray) -> np.ndarray:
        return paint_label(gray, load_index_png(Path(args.rw, f"{image_id}.png")))

    def mask(image_id: str, gray: np.ndarray) -> np.ndarray:
        return paint_label(gray, devkit.load_mask(image_id))

    chosen = [
        (args.cam, Panel("class activation maps", heat)),
        (args.la, Panel("confident labels", confident)),
        (args.rw, Panel("random walk", walked)),
        (True, Panel("mask", mask)),
    ]
    return [panel for wanted, panel in chosen if wanted]


def draw_sheet(devkit: Devkit, ids: list[str], columns: list[Panel]):
    """A matplotlib figure with a row an image."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("the report needs matplotlib: pip install matplotlib.") from error
    size = (INCHES * (len(columns) + 1), INCHES * len(ids))
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(len(ids), len(columns) + 1, squeeze=False)
    for row, image_id in zip(axes, ids, strict=True):
        photograph = devkit.load_image(image_id)
        gray = np.asarray(photograph.convert("L").convert("RGB")) / 255
        row[0].imshow(photograph)
        for axis, panel in zip(row[1:], columns, strict=True):
            axis.imshow(panel.draw(image_id, gray).clip(0, 1))
    for axis, title in zip(axes[0], ["image", *(panel.title for panel in columns)], strict=True):
        axis.set_title(title, fontsize="medium")
    for axis in axes.ravel():
        axis.set_axis_off()
    return figure


def main(args: argparse.Namespace) -> None:
    if bool(args.la) != bool(args.ha):
        raise UsageError("--la and --ha go together: a label takes both.")
    devkit = open_devkit(args)
    ids = read_ids(args.list)
    places = np.linspace(0, len(ids) - 1, min(args.images, len(ids))).round().astype(int)
    figure = draw_sheet(devkit, [ids[place] for place in places], panels(args, devkit))
    with atomic_write(args.out) as file:
        figure.savefig(file, format="png")
    print(f"written to {args.out}")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
