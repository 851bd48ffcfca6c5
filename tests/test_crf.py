"""The dense CRF around pydensecrf: scores in, probabilities out, and what may never happen."""

import numpy as np
import pytest
from golden import recipe

from tool.crf import background_and_maps, dense_crf

HEIGHT, WIDTH = 24, 33


@pytest.fixture
def image():
    return recipe.synthetic_image(HEIGHT, WIDTH, 3)


@pytest.fixture
def maps():
    cam = recipe.synthetic_cam(HEIGHT, WIDTH, (4, 14), 3)
    return np.stack([cam[4], cam[14]])


def _crf(image, scores, **parameters) -> np.ndarray:
    (result,) = dense_crf(image, [scores], **parameters)
    return result


def test_background_comes_first_and_nothing_is_renormalized():
    maps = np.array([[[0, 0.5]], [[0.2, 0.9]]], np.float32)
    scores = background_and_maps(maps, 4)
    np.testing.assert_allclose(scores[0], [[0.8**4, 0.1**4]], rtol=1e-5)
    assert np.array_equal(scores[1:], maps)
    assert scores.dtype == np.float32


def test_background_without_maps_is_one():
    scores = background_and_maps(np.empty((0, 2, 3), np.float32), 4)
    assert np.array_equal(scores, np.ones((1, 2, 3)))


def test_probabilities_sum_to_one_in_the_shape_of_the_scores(image, maps):
    probabilities = _crf(image, background_and_maps(maps, 4))
    assert probabilities.shape == (3, HEIGHT, WIDTH)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert (probabilities >= 0).all()


def test_several_score_sets_equal_separate_calls(image, maps):
    score_sets = [background_and_maps(maps, alpha) for alpha in (4, 32, 4)]
    together = dense_crf(image, score_sets)
    assert len(together) == 3
    for scores, result in zip(score_sets, together, strict=True):
        assert np.array_equal(result, _crf(image, scores))
    assert not np.array_equal(together[0], together[1])


def test_no_steps_give_the_scores_back_normalized(image, maps):
    scores = np.clip(background_and_maps(maps, 4), 1e-5, 1)
    probabilities = _crf(image, scores, steps=0)
    np.testing.assert_allclose(probabilities, scores / scores.sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("score", [0.0, 1e-9, 0.3, 1.0])
def test_two_labels_of_equal_scores_stay_equal(score, image):
    scores = np.full((2, HEIGHT, WIDTH), score, np.float32)
    np.testing.assert_allclose(_crf(image, scores), 0.5, atol=1e-6)


def test_single_label_is_certain(image):
    assert np.array_equal(_crf(image, np.full((1, HEIGHT, WIDTH), 0.2)), np.ones((1, 24, 33)))


def test_labels_in_another_order_give_the_same_in_that_order(image, maps):
    scores = background_and_maps(maps, 4)
    order = [2, 0, 1]
    np.testing.assert_allclose(_crf(image, scores[order]), _crf(image, scores)[order], atol=1e-5)


def test_label_moves_to_the_edge_of_the_image():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    scores = np.full((2, 32, 32), 0.4, np.float32)
    scores[0, :, :13] = scores[1, :, 13:] = 0.6  # three columns beside the edge
    label = _crf(image, scores).argmax(axis=0)
    assert (label[:, :16] == 0).all()
    assert (label[:, 16:] == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (1, 40)])
def test_image_one_pixel_wide_or_high_works(size):
    image = recipe.synthetic_image(*size, seed=1)
    scores = np.random.default_rng(0).uniform(size=(3, *size)).astype(np.float32)
    probabilities = _crf(image, scores)
    assert probabilities.shape == scores.shape
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)


def test_views_give_the_same_as_copies(image, maps):
    mirrored, scores = image[:, ::-1], background_and_maps(maps, 4)[:, :, ::-1]
    assert not mirrored.flags.c_contiguous
    copies = _crf(mirrored.copy(), scores.copy())
    assert np.array_equal(_crf(mirrored, scores), copies)


def test_arguments_are_left_alone(image, maps):
    scores = background_and_maps(maps, 4)
    before = image.copy(), scores.copy()
    _crf(image, scores)
    assert np.array_equal(image, before[0])
    assert np.array_equal(scores, before[1])


@pytest.mark.parametrize(
    "shapes",
    [[(2, WIDTH, HEIGHT)], [(2, HEIGHT, WIDTH + 1)], [(2, HEIGHT, WIDTH), (3, HEIGHT, WIDTH)], []],
)
def test_scores_that_do_not_fit_are_a_value_error(shapes, image):
    with pytest.raises(ValueError, match=f"{HEIGHT} x {WIDTH}"):
        dense_crf(image, [np.zeros(shape, np.float32) for shape in shapes])
