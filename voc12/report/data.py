"""What the report shows: outputs of an image, scores of all, the choice of images, losses."""

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
from voc12.devkit import Devkit
from voc12.evaluate import figures

STRIDE = 8  # cells of the affinity labels, as in training
CAM = "CAM"  # the name of the CAMs' prediction
SUFFIXES = {"cam": ".npy", "la": ".npy", "ha": ".npy", "rw": ".png", "seg": ".png"}


class Example(NamedTuple):
    """An image and what the stages made of it; labels are uint8 H x W, 255 where there is none."""

    image_id: str
    photograph: Image.Image
    mask: np.ndarray | None
    cams: dict[int, np.ndarray]  # {class: float32 H x W}
    predictions: dict[str, np.ndarray]  # labels by name, in the order of the stages
    labels: dict[str, np.ndarray]  # those to show, the mask last


class Outputs(NamedTuple):
    """A devkit and the folders that the stages wrote to, by the keys of ``SUFFIXES``."""

    devkit: Devkit
    folders: dict[str, str]
    normalization: str | None = None  # of the class maps, see tool.seeds

    def load(self, image_id: str) -> Example:
        """Read all there is of an image; raises DataError where it does not fit together."""
        photograph = self.devkit.load_image(image_id)
        size, num_classes = photograph.size[::-1], len(self.devkit.class_names)
        path = {key: Path(self.folders[key], image_id + SUFFIXES[key]) for key in self.folders}
        mask_path = self.devkit.mask_path(image_id)
        mask = self.devkit.load_label(mask_path, size) if mask_path.is_file() else None
        cams, predictions = {}, {}
        if "cam" in path:
            cams = load_cams(path["cam"], size, num_classes, self.normalization)
            label = fixed_background_label(stack_maps(cams, size), BACKGROUND_SCORE)
            predictions[CAM] = index_image(label, list(cams))
        if "la" in path:
            low, high = load_crf_scores(path["la"], path["ha"], size)
            if max(low) > num_classes:
                hint = f"but there are {num_classes} classes; see --classes"
                raise DataError(f"{path['la']}: has scores of the label {max(low)}, {hint}.")
            predictions["confident labels"] = confident_label(low, high)
        for key, name in (("rw", "random walk"), ("seg", "segmenter")):
            if key in path:
                predictions[name] = self.devkit.load_label(path[key], size)
        # The CAMs are shown as heat; their labels only where there is no other prediction.
        labels = {name: predictions[name] for name in predictions if name != CAM} or predictions
        labels = labels | ({} if mask is None else {"mask": mask})
        return Example(image_id, photograph, mask, cams, predictions, labels)


def confident_label(low: dict[int, np.ndarray], high: dict[int, np.ndarray]) -> np.ndarray:
    """What AffinityNet learns of a whole image: uint8 H x W, 0 background, k class, 255 ignored.

    ``low`` and ``high`` are CRF scores {0 background, k class: float32 H x W} with the two alphas.
    Labels are those of whole cells; a border that does not fill a cell is ignored.
    """
    label = np.full(low[0].shape, VOID, np.uint8)
    if min(label.shape) < STRIDE:  # not one cell
        return label
    scores = [torch.from_numpy(stack_maps(maps, label.shape)) for maps in (low, high)]
    label_of_local = np.full(VOID + 1, VOID, np.uint8)
    label_of_local[: len(low)] = list(low)
    cells = label_of_local[affinity_label(*scores, STRIDE).numpy()]
    enlarged = cells.repeat(STRIDE, axis=0).repeat(STRIDE, axis=1)
    label[: enlarged.shape[0], : enlarged.shape[1]] = enlarged
    return label


def score(outputs: Outputs, ids: Sequence[str]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Score every prediction on images that have a mask, on the pixels that both label.

    Returns the figures of voc12.evaluate by prediction, with "labelled", these pixels in per cent
    of the masks'; and each label's IoU in per cent by image and prediction, NaN if it is absent.
    """
    pixels, confusion, iou = 0, {}, {}
    label_names = outputs.devkit.label_names
    for example in map(outputs.load, cli.progress(ids, "score")):
        pixels += np.count_nonzero(example.mask != VOID)
        iou[example.image_id] = {}
        for name, label in example.predictions.items():
            mask = np.where(label == VOID, VOID, example.mask)
            counts = confusion_matrix(mask, label, len(label_names))
            confusion[name] = confusion.get(name, 0) + counts
            iou[example.image_id][name] = 100 * intersection_over_union(counts)
    results = {
        name: figures(counts, len(ids), label_names) | {"labelled": 100 * counts.sum() / pixels}
        for name, counts in confusion.items()
        if counts.any()
    }
    return results, iou


def choose(iou: Mapping[str, float], count: int) -> list[str]:
    """``count`` images, worst first: a third the worst, a third the best, the rest evenly between.

    Images without a score (NaN) come last, evenly from the list, if there are too few others.
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
        for name in rows[0] if rows else ():
            points = np.array([(row["step"], row[name] or "nan") for row in rows], np.float64)
            points = points[np.isfinite(points).all(axis=1)]
            if len(points) and name not in ("step", "epoch", "lr", "images_per_second"):
                losses[name] = points
    except (KeyError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a table of losses over a column step ({error}).") from error
    if not losses:
        raise DataError(f"{path}: holds no loss; train_cls.py and train_aff.py write one a column.")
    return losses
