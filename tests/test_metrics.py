"""Confusion matrices and scores, computed by hand and compared with a naive count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tool.metrics import (
    confusion_matrix,
    intersection_over_union,
    mean_iou,
    pixel_accuracy,
    precision,
    recall,
    sweep_confusions,
)

VOID = 255
TRUTH = np.array([[0, 0, 1, 1], [2, 2, VOID, VOID]], np.uint8)
PREDICTION = np.array([[0, 1, 1, 1], [2, 0, 0, 2]], np.uint8)
CONFUSION = [[1, 1, 0], [0, 2, 0], [1, 0, 1]]

shapes = st.shared(hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), key="shape")
masks = hnp.arrays(np.uint8, shapes, elements=st.sampled_from([0, 1, 2, 3, VOID]))
predictions = hnp.arrays(np.uint8, shapes, elements=st.integers(0, 3))


@given(masks, predictions)
def test_confusion_matrix_equals_a_naive_count(truth, prediction):
    expected = np.zeros((4, 4), int)
    for true, predicted in zip(truth.flat, prediction.flat, strict=True):
        if true != VOID:
            expected[true, predicted] += 1
    confusion = confusion_matrix(truth, prediction, 4)
    assert confusion.dtype == np.int64
    assert np.array_equal(confusion, expected)


def test_void_pixels_count_nowhere_whatever_is_predicted_there():
    prediction = PREDICTION.copy()
    prediction[TRUTH == VOID] = VOID
    assert confusion_matrix(TRUTH, prediction, 3).tolist() == CONFUSION
    assert confusion_matrix(np.full((2, 2), VOID, np.uint8), PREDICTION[:, :2], 3).sum() == 0


def test_many_labels_of_large_counts_do_not_overflow():
    truth = np.full((300, 300), 200, np.uint8)
    confusion = confusion_matrix(truth, truth, 201)
    assert confusion[200, 200] == 90000
    assert confusion.sum() == 90000


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([[3]], [[0]], "mask has the label 3"),
        ([[0]], [[3]], "prediction has the label 3"),
        ([[0]], [[VOID]], "prediction has the label 255"),
        ([[0, 1]], [[0]], "differ in size"),
        ([[0, 1]], [[0], [1]], "differ in size"),
    ],
)
def test_labels_out_of_range_and_other_sizes_raise_a_value_error(truth, prediction, message):
    truth, prediction = np.array(truth, np.uint8), np.array(prediction, np.uint8)
    with pytest.raises(ValueError, match=message):
        confusion_matrix(truth, prediction, 3)
    with pytest.raises(ValueError, match=message):
        sweep_confusions(truth, prediction, np.ones(truth.shape), np.ones(1), 3)


@pytest.mark.parametrize(
    ("confusion", "iou", "mean"),
    [
        (CONFUSION, [1 / 3, 2 / 3, 1 / 2], 1 / 2),
        (
            [[2, 0, 0], [1, 1, 0], [0, 0, 0]],
            [2 / 3, 1 / 2, np.nan],
            7 / 12,
        ),  # never occurs: no part
        ([[3, 1], [0, 0]], [3 / 4, 0], 3 / 8),  # only predicted
    ],
)
def test_iou_equals_one_computed_by_hand(confusion, iou, mean):
    computed = intersection_over_union(np.array(confusion)).tolist()
    assert computed == pytest.approx(iou, nan_ok=True)
    assert mean_iou(np.array(confusion)) == pytest.approx(mean)


def test_precision_recall_and_accuracy_equal_those_computed_by_hand():
    confusion = np.array([[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert precision(confusion)[:2].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert recall(confusion)[:3].tolist() == pytest.approx([2 / 3, 1, 0])
    assert np.isnan(precision(confusion)[2:]).all()  # never predicted
    assert np.isnan(recall(confusion)[3])  # never there
    assert pixel_accuracy(confusion) == pytest.approx(3 / 5)


scores = hnp.arrays(np.float32, shapes, elements=st.sampled_from([0, 0.2, 0.25, 0.5, 1]))


@given(masks, predictions, scores)
def test_a_sweep_gives_the_confusion_matrix_of_each_threshold(truth, winner, score):
    winning_scores = np.array([0.25, 0.2, 0.75, 0.25, 0.5], np.float32)
    confusions = sweep_confusions(truth, winner, score, winning_scores, 4)
    for least, confusion in zip(winning_scores, confusions, strict=True):
        prediction = np.where(score >= least, winner, 0).astype(np.uint8)
        assert np.array_equal(confusion, confusion_matrix(truth, prediction, 4))
