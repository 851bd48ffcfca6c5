"""Confusion matrix and what is read off it."""

import numpy as np

from tool.maps import VOID


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixel counts int64 labels x labels, [true, predicted], over pixels whose truth is not void.

    Both images are uint8 of one shape. Raises ValueError if a shape differs or a value is neither
    a label (0..num_labels-1) nor, in the truth, 255.
    """
    if truth.shape != prediction.shape:
        sizes = [" x ".join(map(str, image.shape)) for image in (truth, prediction)]
        raise ValueError(f"mask and prediction differ in size ({sizes[0]} and {sizes[1]})")
    counted = truth != VOID
    truth, prediction = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for name, values in (("mask", truth), ("prediction", prediction)):
        if values.size and values.max() >= num_labels:
            raise ValueError(
                f"the {name} has the label {values.max()}, but there are {num_labels} labels"
            )
    pairs = np.bincount(truth * num_labels + prediction, minlength=num_labels**2)
    return pairs.reshape(num_labels, num_labels)


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """IoU of each label, float64 in 0..1; NaN for one that is neither in masks nor predicted."""
    intersection = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    return np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the labels that occur, in 0..1 (on VOC's full splits, all of them)."""
    return float(np.nanmean(intersection_over_union(confusion)))
