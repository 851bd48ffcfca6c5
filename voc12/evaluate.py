"""Scores predictions or class maps against a devkit's masks by VOC's mean IoU.

    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --pred RW
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --cam CAM --bg 0.2
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --cam CAM --alpha 16

One confusion matrix over all pixels of all images whose mask is not 255; the mean is over the
labels that occur in masks or predictions (on VOC's full splits, all of them). Prints a table;
--json writes {"miou": %, "images": n, "per_class": {name: %}}.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tool import cli
from tool.cam import BACKGROUND_SCORE, fixed_background_label
from tool.crf import background_and_maps
from tool.errors import DataError, UsageError
from tool.maps import atomic_write, load_index_png, stack_maps
from tool.metrics import confusion_matrix, intersection_over_union, mean_iou
from voc12.data import (
    BACKGROUND,
    Devkit,
    add_devkit_arguments,
    index_image,
    load_cams,
    open_devkit,
    read_ids,
    require_files,
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m voc12.evaluate", description=__doc__, formatter_class=cli.help_formatter
    )
    add_devkit_arguments(parser, labels=False)
    parser.add_argument("--list", required=True, help="images to score")
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--pred", metavar="DIR", help="index images <id>.png")
    scored.add_argument("--cam", metavar="DIR", help="maps <id>.npy, made labels with a background")
    background = parser.add_mutually_exclusive_group()
    background.add_argument(
        "--bg", type=cli.fraction, help="constant background score for --cam (default: 0.2)"
    )
    background.add_argument(
        "--alpha", type=cli.positive_float, help="background (1 - max score)^alpha for --cam"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    return parser


def maps_to_label(
    maps: dict[int, np.ndarray], size: tuple[int, int], bg: float | None, alpha: float | None
) -> np.ndarray:
    """Class maps {class: H x W} of an image of that size -> uint8 H x W, by a background score."""
    stacked = stack_maps(maps, size)
    if alpha is not None:
        local = background_and_maps(stacked, alpha).argmax(axis=0)
    else:
        local = fixed_background_label(stacked, BACKGROUND_SCORE if bg is None else bg)
    return index_image(local, list(maps))


def prediction_loader(
    args: argparse.Namespace, num_classes: int
) -> Callable[[str, tuple[int, int]], np.ndarray]:
    """A function that gives an image's prediction, uint8 H x W, for its id and (H, W)."""

    def from_png(image_id: str, size: tuple[int, int]) -> np.ndarray:
        return load_index_png(Path(args.pred, f"{image_id}.png"))

    def from_maps(image_id: str, size: tuple[int, int]) -> np.ndarray:
        maps = load_cams(Path(args.cam, f"{image_id}.npy"), size, num_classes)
        return maps_to_label(maps, size, args.bg, args.alpha)

    return from_png if args.pred else from_maps


def evaluate(
    devkit: Devkit, ids: Sequence[str], load: Callable[[str, tuple[int, int]], np.ndarray]
) -> np.ndarray:
    """The confusion matrix of the images, int64 labels x labels, [true, predicted]."""
    num_labels = len(devkit.class_names) + 1
    total = np.zeros((num_labels, num_labels), np.int64)
    for image_id in cli.progress(ids, "evaluate"):
        mask = devkit.load_mask(image_id)
        prediction = load(image_id, mask.shape)
        try:
            total += confusion_matrix(mask, prediction, num_labels)
        except ValueError as error:
            raise DataError(f"{image_id}: {error}.") from error
    return total


def figures(confusion: np.ndarray, num_images: int, class_names: Sequence[str]) -> dict:
    """What --json holds: percentages, None for a label that does not occur."""
    iou = 100 * intersection_over_union(confusion)
    return {
        "miou": 100 * mean_iou(confusion),
        "images": num_images,
        "per_class": {
            name: None if math.isnan(value) else float(value)
            for name, value in zip((BACKGROUND, *class_names), iou, strict=True)
        },
    }


def table(result: dict) -> str:
    """The figures for people."""
    rows = [
        f"{name:<16}{'-' if value is None else format(value, '.1f'):>7}"
        for name, value in result["per_class"].items()
    ]
    rows.append(f"{'mIoU':<16}{result['miou']:>7.1f}   over {result['images']} images")
    return "\n".join(rows)


def main(args: argparse.Namespace) -> None:
    if args.pred and (args.bg is not None or args.alpha is not None):
        raise UsageError("--bg and --alpha make labels of --cam; --pred holds labels already.")
    devkit = open_devkit(args)
    ids = list(dict.fromkeys(read_ids(args.list)))  # an image counts once
    if args.pred:
        require_files(args.pred, ids, ".png", "infer_aff.py --out_rw makes them")
    else:
        require_files(args.cam, ids, ".npy", "infer_cls.py --out_cam makes them")
    confusion = evaluate(devkit, ids, prediction_loader(args, len(devkit.class_names)))
    if not confusion.any():
        raise DataError(f"{args.list}: not one pixel of its masks is labelled, nothing to score.")
    result = figures(confusion, len(ids), devkit.class_names)
    print(table(result))
    if args.json:
        with atomic_write(args.json) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
