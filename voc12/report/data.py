"""What voc12.report shows: the stages' outputs, their scores, the images to show, the logs."""

import csv
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tool.cam import BACKGROUND_SCORE, fixed_background_label
from tool.labels import VOID, index_image
from tool.maps import load_cams, load_crf_scores, stack_maps
from tool.metrics import confusion_matrix, intersection_over_union
from tool.run import cli
from tool.run.errors import DataError
from voc12.devkit import Devkit, load_label, require_files
from voc12.evaluate import SWEEPS, Scorer, sweep, sweep_figures
from voc12.report.pictures import confident_label
from voc12.report.plots import Curve

CAM, WALK = "CAM", "random walk"
# Columns of a training log that are no losses.
LOG_COLUMNS = ("step", "epoch", "lr", "images_per_second")


@dataclass
class Outputs:
    """The folders that stages 2 and 4 wrote to, None where there is none, and what they hold.

    All labels are uint8 H x W; ``size`` is the photograph's (H, W), which they must have.
    """

    devkit: Devkit
    cam: str | None = None
    la: str | None = None
    ha: str | None = None
    rw: str | None = None

    def require(self, ids: Sequence[str]) -> None:
        """Raise DataError if a photograph or a folder's file of an image is missing."""
        self.devkit.require_images(ids)
        stage_2 = "infer_cls.py makes them, from the images of its --infer_list"
        for folder, suffix, hint in (
            (self.cam, ".npy", stage_2),
            (self.la, ".npy", stage_2),
            (self.ha, ".npy", stage_2),
            (self.rw, ".png", "infer_aff.py --out_rw makes them"),
        ):
            if folder:
                require_files(folder, ids, suffix, hint)

    def cams(self, image_id: str, size: tuple[int, int]) -> dict[int, np.ndarray]:
        """An image's class activation maps, {class: float32 H x W}."""
        return load_cams(Path(self.cam, f"{image_id}.npy"), size, len(self.devkit.class_names))

    def cam_label(self, image_id: str, size: tuple[int, int]) -> np.ndarray:
        """The label that the class activation maps alone give."""
        cams = self.cams(image_id, size)
        local = fixed_background_label(stack_maps(cams, size), BACKGROUND_SCORE)
        return index_image(local, list(cams))

    def confident(self, image_id: str, size: tuple[int, int]) -> np.ndarray:
        """What AffinityNet learns of an image, 255 where that is nothing."""
        low_path, high_path = (Path(folder, f"{image_id}.npy") for folder in (self.la, self.ha))
        low, high = load_crf_scores(low_path, high_path, size)
        if max(low) > len(self.devkit.class_names):
            raise DataError(
                f"{low_path}: has scores of the label {max(low)}, but there are "
                f"{len(self.devkit.class_names)} classes; see --classes."
            )
        return confident_label(low, high)

    def walk(self, image_id: str, size: tuple[int, int]) -> np.ndarray:
        """The random walk's label."""
        path = Path(self.rw, f"{image_id}.png")
        label = load_label(path, size, len(self.devkit.class_names))
        if (label == VOID).any():
            raise DataError(
                f"{path}: has pixels without a label ({VOID}); --rw is what infer_aff.py wrote to "
                "--out_rw."
            )
        return label

    def mask(self, image_id: str, size: tuple[int, int]) -> np.ndarray | None:
        """The mask, 255 where it is void, or None for an image without one."""
        path = self.devkit.mask_path(image_id)
        return load_label(path, size, len(self.devkit.class_names)) if path.is_file() else None

    def masked(self, ids: Sequence[str]) -> list[str]:
        """Those of the images that have a mask."""
        return [image_id for image_id in ids if self.devkit.mask_path(image_id).is_file()]

    def predictions(self) -> dict[str, Callable[[str, tuple[int, int]], np.ndarray]]:
        """What there is to score, the walk last: its name, and what gives an image's labels."""
        made = {CAM: (self.cam, self.cam_label), WALK: (self.rw, self.walk)}
        return {name: load for name, (folder, load) in made.items() if folder}

    def shown(self) -> str | None:
        """The prediction that the gallery shows and is sorted by: the walk's, or else the CAM's."""
        return next(reversed(self.predictions()), None)


@dataclass
class Scores:
    """What the tables are made of: counts of pixels over all images, and the IoU within each."""

    images: int = 0  # with a mask
    confusion: dict[str, np.ndarray] = field(default_factory=dict)  # by prediction
    # By image and prediction: the IoU of each label in 0..1, NaN where it does not occur.
    iou: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    # Of the confident labels: pixels by label, those that the masks label as well, and the equal.
    confident: np.ndarray = field(default_factory=lambda: np.zeros(VOID + 1, np.int64))
    compared: int = 0
    right: int = 0

    def of_image(self, image_id: str) -> dict[str, float]:
        """The mean IoU in per cent over the labels in an image, by prediction; NaN if none is."""
        return {
            name: math.nan if np.isnan(iou).all() else 100 * float(np.nanmean(iou))
            for name, iou in self.iou.get(image_id, {}).items()
        }


def score(outputs: Outputs, ids: Sequence[str]) -> Scores:
    """Score every prediction and the confident labels on those images that have a mask."""
    scores, predictions = Scores(), outputs.predictions()
    num_labels = len(outputs.devkit.class_names) + 1
    for image_id in cli.progress(ids if outputs.la else outputs.masked(ids), "score"):
        photograph = outputs.devkit.load_image(image_id)
        size = photograph.height, photograph.width
        mask = outputs.mask(image_id, size)
        if outputs.la:
            _count_confident(scores, outputs.confident(image_id, size), mask)
        if mask is None:
            continue
        scores.images += 1
        scores.iou[image_id] = {}
        for name, load in predictions.items():
            confusion = confusion_matrix(mask, load(image_id, size), num_labels)
            scores.confusion[name] = scores.confusion.get(name, 0) + confusion
            scores.iou[image_id][name] = intersection_over_union(confusion)
    # Masks that are void throughout score nothing.
    scores.confusion = {name: total for name, total in scores.confusion.items() if total.any()}
    return scores


def _count_confident(scores: Scores, label: np.ndarray, mask: np.ndarray | None) -> None:
    scores.confident += np.bincount(label.ravel(), minlength=VOID + 1)
    if mask is not None:
        both = (label != VOID) & (mask != VOID)
        scores.compared += np.count_nonzero(both)
        scores.right += np.count_nonzero(both & (label == mask))


def sweep_cams(outputs: Outputs, ids: Sequence[str]) -> dict[str, dict]:
    """What ``voc12.evaluate --sweep --json`` says of the CAMs, by the kind of background."""
    masks = outputs.devkit.mask_path(ids[0]).parent
    scorer = Scorer(outputs.devkit, masks, Path(outputs.cam))
    return {
        kind: sweep_figures(
            kind,
            sweep(scorer, ids, kind, cli.default_num_workers()),
            len(ids),
            outputs.devkit.class_names,
        )
        for kind in SWEEPS
    }


def choose(scores: Mapping[str, float], count: int) -> list[str]:
    """``count`` images, worst first: a third the worst, a third the best, the rest evenly between.

    ``scores`` are by image id, in the order of the list. Images without a score (NaN) come last,
    evenly from the list, if there are too few others.
    """
    scored = [image_id for image_id, value in scores.items() if not math.isnan(value)]
    unscored = [image_id for image_id, value in scores.items() if math.isnan(value)]
    scored.sort(key=scores.get)
    chosen = spread(scored, min(count, len(scored)), ends=count // 3)
    return chosen + spread(unscored, min(count - len(chosen), len(unscored)))


def spread(items: Sequence[str], count: int, ends: int = 0) -> list[str]:
    """``count`` items in their order: ``ends`` from either end, the others evenly from between."""
    ends = min(ends, count // 2)
    middle = np.linspace(ends, len(items) - ends - 1, count - 2 * ends).round().astype(int)
    last = range(len(items) - ends, len(items))
    return [items[place] for place in (*range(ends), *middle, *last)]


def read_log(path: str | os.PathLike) -> dict[str, Curve]:
    """The losses in a training's CSV file: each column that is one, over the step.

    A cell may be empty (a loss of some steps only). Raises DataError if the file is no such log.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file ({error}).") from error
    names = [name for name in columns if name not in LOG_COLUMNS]
    if "step" not in columns or not names:
        raise DataError(
            f"{path}: not a training's log, which has a column step and one for each loss; "
            "train_cls.py and train_aff.py write it as <session_name>.csv."
        )
    curves = {name: _column(path, rows, name) for name in names}
    curves = {name: curve for name, curve in curves.items() if len(curve.x)}
    if not curves:
        raise DataError(f"{path}: holds no loss yet; wait for the first steps of the training.")
    return curves


def _column(path: str | os.PathLike, rows: Sequence[Mapping[str, str]], name: str) -> Curve:
    """The finite values of a column over the step."""
    points = []
    for number, row in enumerate(rows, start=2):  # the first line holds the names
        if not row[name]:  # empty, or the line is short
            continue
        try:
            point = float(row["step"]), float(row[name])
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}: line {number} has no number for {name} or its step."
            ) from error
        if all(map(math.isfinite, point)):
            points.append(point)
    return Curve(*np.array(points).reshape(-1, 2).T)
