"""Confusion matrices, the scores computed from them, and sweeps over many thresholds at once."""

import numpy as np

from tool.labels import VOID


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixel counts, int64 labels x labels, [true, predicted], over pixels whose truth is not void.

    Both images are uint8 H x W. Raises ValueError if their shapes differ, or if a counted pixel has
    a value above num_labels - 1.
    """
    _, pairs = _label_pairs(truth, prediction, num_labels)
    return np.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels)


def _label_pairs(
    truth: np.ndarray, prediction: np.ndarray, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the truth is not void, bool H x W; true * num_labels + predicted there, int64 N."""
    if truth.shape != prediction.shape:
        sizes = [" x ".join(map(str, image.shape)) for image in (truth, prediction)]
        raise ValueError(f"mask and prediction differ in size ({sizes[0]} and {sizes[1]})")
    counted = truth != VOID
    for name, values in (("mask", truth), ("prediction", prediction)):
        largest = values.max(where=counted, initial=0)
        if largest >= num_labels:
            raise ValueError(f"the {name} has the label {largest}; there are {num_labels} labels")
    return counted, truth[counted].astype(np.int64) * num_labels + prediction[counted]


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """IoU of each label, float64 in 0..1; NaN if a label is neither in masks nor predicted."""
    intersection = np.diag(confusion)
    return _ratio(intersection, confusion.sum(axis=0) + confusion.sum(axis=1) - intersection)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the labels that occur, in 0..1 (on VOC's full splits, all of them)."""
    return float(np.nanmean(intersection_over_union(confusion)))


def precision(confusion: np.ndarray) -> np.ndarray:
    """True positives / predicted pixels of each label, float64 in 0..1; NaN if never predicted."""
    return _ratio(np.diag(confusion), confusion.sum(axis=0))


def recall(confusion: np.ndarray) -> np.ndarray:
    """True positives / true pixels of each label, float64 in 0..1; NaN if in no mask."""
    return _ratio(np.diag(confusion), confusion.sum(axis=1))


def pixel_accuracy(confusion: np.ndarray) -> float:
    """The fraction of pixels whose predicted label is the true one."""
    return float(np.trace(confusion) / confusion.sum())


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """part / total as float64, NaN where the total is 0."""
    return np.divide(part, total, out=np.full(len(total), np.nan), where=total > 0)


def sweep_confusions(
    truth: np.ndarray, winner: np.ndarray, score: np.ndarray, lowest: np.ndarray, num_labels: int
) -> np.ndarray:
    """The confusion matrix at each of many thresholds: int64 thresholds x labels x labels.

    ``winner``, uint8 H x W, is the label that wins where the background, label 0, does not: where
    ``score``, float H x W, is at least the threshold's ``lowest``. Raises ValueError as
    ``confusion_matrix`` does.
    """
    counted, pairs = _label_pairs(truth, winner, num_labels)
    order, bins = np.argsort(lowest), len(lowest) + 1
    num_won = np.searchsorted(lowest, score[counted], side="right", sorter=order)
    # [true, winner, number of thresholds at which the winner wins]
    histogram = np.bincount(pairs * bins + num_won, minlength=num_labels**2 * bins)
    histogram = histogram.reshape(num_labels, num_labels, bins)
    # At threshold i win the pixels that win at more than i thresholds: sums from the last bin on.
    winners = histogram[..., :0:-1].cumsum(axis=-1)[..., ::-1]
    confusions = np.moveaxis(winners, -1, 0)[np.argsort(order)]
    confusions[..., 0] += histogram.sum(axis=(1, 2)) - confusions.sum(axis=-1)
    return confusions
