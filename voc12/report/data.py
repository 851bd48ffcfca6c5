"""What the report shows: an image's outputs, scores over all images, the choice of images, logs."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tool.affinity import affinity_label
from tool.cam import BACKGROUND_SCORE, fixed_background_label
from tool.labels import VOID, index_image
from tool.maps import load_cams, load_crf_scores, stack_maps
from tool.metrics import confusion_matrix, intersection_over_union
from tool.run import cli
from tool.run.errors import DataError
from voc12.devkit import Devkit, load_label, require_files
from voc12.evaluate import figures

STRIDE = 8  # cells of the affinity labels, as in training
CAM, CONFIDENT = "CAM", "confident labels"
# Folders of index images, in the order of the stages, and what the report calls them.
INDEX_IMAGES = {"rw": "random walk"}
SUFFIXES = {"cam": ".npy", "la": ".npy", "ha": ".npy", "rw": ".png"}
# Columns of a training log that are not losses.
LOG_COLUMNS = ("step", "epoch", "lr", "images_per_second")


class Example(NamedTuple):
    """An image and what the stages made of it; labels are uint8 H x W, 255 where there is none."""

    image_id: str
    photograph: Image.Image
    mask: np.ndarray | None
    cams: dict[int, np.ndarray]  # {class: float32 H x W}
    predictions: dict[str, np.ndarray]  # labels by name, in the order of the stages

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The labels to show, the mask last; the CAMs' only where there is no other prediction."""
        later = {name: label for name, label in self.predictions.items() if name != CAM}
        mask = {} if self.mask is None else {"mask": self.mask}
        return (later or self.predictions) | mask


class Outputs(NamedTuple):
    """A devkit and the folders that the stages wrote to, by the keys of ``SUFFIXES``."""

    devkit: Devkit
    folders: dict[str, str]

    def require(self, ids: Sequence[str]) -> None:
        """Raise DataError if a photograph or a folder's file of an image is missing."""
        self.devkit.require_images(ids)
        for key, folder in self.folders.items():
            hint = f"--{key} is what infer_cls.py or infer_aff.py made of the images of --list"
            require_files(folder, ids, SUFFIXES[key], hint)

    def load(self, image_id: str) -> Example:
        """Read all there is of an image; raises DataError where it does not fit together."""
        photograph = self.devkit.load_image(image_id)
        size = photograph.height, photograph.width
        num_classes = len(self.devkit.class_names)
        path = {key: Path(self.folders[key], image_id + SUFFIXES[key]) for key in self.folders}
        mask_path = self.devkit.mask_path(image_id)
        mask = load_label(mask_path, size, num_classes) if mask_path.is_file() else None
        cams, predictions = {}, {}
        if "cam" in path:
            cams = load_cams(path["cam"], size, num_classes)
            label = fixed_background_label(stack_maps(cams, size), BACKGROUND_SCORE)
            predictions[CAM] = index_image(label, list(cams))
        if "la" in path:
            low, high = load_crf_scores(path["la"], path["ha"], size)
            if max(low) > num_classes:
                raise DataError(
                    f"{path['la']}: has scores of the label {max(low)}, but there are "
                    f"{num_classes} classes; see --classes."
                )
            predictions[CONFIDENT] = confident_label(low, high)
        for key, name in INDEX_IMAGES.items():
            if key in path:
                predictions[name] = load_label(path[key], size, num_classes)
        return Example(image_id, photograph, mask, cams, predictions)


def confident_label(low: dict[int, np.ndarray], high: dict[int, np.ndarray]) -> np.ndarray:
    """What AffinityNet learns of a whole image: uint8 H x W, 0 background, k class, 255 ignored.

    ``low`` and ``high`` are CRF scores {0 background, k class: float32 H x W} with the two alphas.
    Labels are those of whole cells; a border that does not fill a cell is ignored.
    """
    size = low[0].shape
    label = np.full(size, VOID, np.uint8)
    if min(size) >= STRIDE:
        scores = [torch.from_numpy(stack_maps(maps, size)) for maps in (low, high)]
        label_of_local = np.full(VOID + 1, VOID, np.uint8)
        label_of_local[: len(low)] = list(low)
        cells = label_of_local[affinity_label(*scores, STRIDE).numpy()]
        enlarged = cells.repeat(STRIDE, axis=0).repeat(STRIDE, axis=1)
        label[: enlarged.shape[0], : enlarged.shape[1]] = enlarged
    return label


def score(
    outputs: Outputs, ids: Sequence[str]
) -> tuple[dict[str, dict], dict[str, dict[str, np.ndarray]]]:
    """Score every prediction on images that have a mask.

    Returns the figures of voc12.evaluate by prediction, with "labelled", the pixels that it labels
    in per cent of those that the masks label (others do not count); and the IoU of each label by
    image and prediction, in 0..1, NaN where the label is absent.
    """
    pixels, confusion, iou = 0, {}, {}
    class_names = outputs.devkit.class_names
    for example in map(outputs.load, cli.progress(ids, "score")):
        pixels += np.count_nonzero(example.mask != VOID)
        iou[example.image_id] = {}
        for name, label in example.predictions.items():
            mask = np.where(label == VOID, VOID, example.mask)
            counts = confusion_matrix(mask, label, len(class_names) + 1)
            confusion[name] = confusion.get(name, 0) + counts
            iou[example.image_id][name] = intersection_over_union(counts)
    results = {
        name: figures(counts, len(ids), class_names) | {"labelled": 100 * counts.sum() / pixels}
        for name, counts in confusion.items()
        if counts.any()
    }
    return results, iou


def choose(iou: Mapping[str, float], count: int) -> list[str]:
    """``count`` images, worst first: a third the worst, a third the best, the rest evenly between.

    ``iou`` is by image id, in the order of the list. Images without a score (NaN) come last, evenly
    from the list, if there are too few others.
    """
    scored = sorted((image_id for image_id in iou if not math.isnan(iou[image_id])), key=iou.get)
    unscored = [image_id for image_id in iou if math.isnan(iou[image_id])]
    ends = min(count, len(scored)) // 3
    between = spread(scored[ends : len(scored) - ends], count - 2 * ends)
    chosen = [*scored[:ends], *between, *scored[len(scored) - ends :]]
    return chosen + spread(unscored, count - len(chosen))


def spread(items: Sequence[str], count: int) -> list[str]:
    """At most ``count`` items, evenly and in their order."""
    picks = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[pick] for pick in picks]


def read_log(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The losses in a training's CSV file: {column: finite points (step, loss), float64 N x 2}.

    A cell may be empty (a loss of some steps only). Raises DataError if the file holds no losses.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        losses = {}
        for name in [name for name in (rows or [{}])[0] if name not in LOG_COLUMNS]:
            points = np.array([(row["step"], row[name] or "nan") for row in rows], np.float64)
            losses[name] = points[np.isfinite(points).all(axis=1)]
    except (KeyError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a table of losses over a column step ({error}).") from error
    losses = {name: points for name, points in losses.items() if len(points)}
    if not losses:
        raise DataError(f"{path}: holds no loss; train_cls.py and train_aff.py write one a column.")
    return losses
