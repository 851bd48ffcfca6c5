"""Confusion matrix, what is read off it, and the confusion matrices of many thresholds at once."""

import numpy as np

from tool.labels import VOID


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixel counts int64 labels x labels, [true, predicted], over pixels whose truth is not void.

    Both images are uint8 of one shape. Raises ValueError if a shape differs or a value is neither
    a label (0..num_labels-1) nor, in the truth, 255.
    """
    codes = _label_codes(truth, prediction, num_labels)
    pairs = np.bincount(codes[truth != VOID], minlength=num_labels**2)
    return pairs.reshape(num_labels, num_labels)


def _label_codes(truth: np.ndarray, prediction: np.ndarray, num_labels: int) -> np.ndarray:
    """true * num_labels + predicted, int64 H x W; meaningless where the truth is void."""
    if truth.shape != prediction.shape:
        sizes = [" x ".join(map(str, image.shape)) for image in (truth, prediction)]
        raise ValueError(f"mask and prediction differ in size ({sizes[0]} and {sizes[1]})")
    counted = truth != VOID
    for name, values in (("mask", truth), ("prediction", prediction)):
        largest = values.max(where=counted, initial=0)
        if largest >= num_labels:
            raise ValueError(
                f"the {name} has the label {largest}, but there are {num_labels} labels"
            )
    return truth.astype(np.int64) * num_labels + prediction


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """IoU of each label, float64 in 0..1; NaN for one that is neither in masks nor predicted."""
    intersection = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    return _share_of(union, intersection)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the labels that occur, in 0..1 (on VOC's full splits, all of them)."""
    return float(np.nanmean(intersection_over_union(confusion)))


def precision(confusion: np.ndarray) -> np.ndarray:
    """Of the pixels given a label, the share that has it: float64 in 0..1; NaN if none is given."""
    return _share_of(confusion.sum(axis=0), np.diag(confusion))


def recall(confusion: np.ndarray) -> np.ndarray:
    """Of the pixels that have a label, the share given it: float64 in 0..1; NaN if none has it."""
    return _share_of(confusion.sum(axis=1), np.diag(confusion))


def pixel_accuracy(confusion: np.ndarray) -> float:
    """The share of pixels that are given their label, in 0..1."""
    return float(np.trace(confusion) / confusion.sum())


def _share_of(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """part / total as float64, NaN where the total is 0."""
    return np.divide(part, total, out=np.full(len(total), np.nan), where=total > 0)


def sweep_histogram(
    truth: np.ndarray,
    winner: np.ndarray,
    score: np.ndarray,
    winning_scores: np.ndarray,
    num_labels: int,
) -> np.ndarray:
    """What the confusion matrices of all thresholds are made of, from one look at each pixel.

    ``truth`` and ``winner`` are uint8 H x W: the mask, and the label that a pixel has where the
    background loses; ``score`` is float H x W, the winner's. The background loses at a threshold
    from its winning score on: ``winning_scores`` holds these, ascending. Returns int64 labels x
    labels x (thresholds + 1), [true, winner, number of thresholds at which the background loses].
    Raises ValueError as ``confusion_matrix`` does.
    """
    codes = _label_codes(truth, winner, num_labels)
    counted = truth != VOID
    bins = len(winning_scores) + 1
    lost = np.searchsorted(winning_scores, score[counted], side="right")
    counts = np.bincount(codes[counted] * bins + lost, minlength=num_labels**2 * bins)
    return counts.reshape(num_labels, num_labels, bins)


def confusions_of_sweep(histogram: np.ndarray) -> np.ndarray:
    """The confusion matrix of each threshold: int64 thresholds x labels x labels.

    In the order of ``sweep_histogram``'s ``winning_scores``; label 0 is the background.
    """
    # From the last bin on: the pixels whose background loses at more than i thresholds.
    winners = histogram[..., :0:-1].cumsum(axis=-1)[..., ::-1]
    background = histogram.sum(axis=(1, 2))[:, None] - winners.sum(axis=1)
    confusions = np.moveaxis(winners, -1, 0).copy()
    confusions[:, :, 0] += background.T
    return confusions
