"""The dense CRF: properties of each backend, and their agreement."""

import sys

import numpy as np
import pytest
import torch
from golden import recipe
from helpers import needs_pydensecrf
from PIL import Image

import tool.crf
import tool.lattice
from tool.crf import BACKENDS, background_and_maps, dense_crf

HEIGHT, WIDTH = 24, 33
TOLERANCE = 1e-4  # of probabilities, against pydensecrf
EQUAL_LABELS = 0.9999


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf")
    return request.param


@pytest.fixture
def image():
    return recipe.synthetic_image(HEIGHT, WIDTH, 3)


@pytest.fixture
def maps():
    cam = recipe.synthetic_cam(HEIGHT, WIDTH, (4, 14), 3)
    return np.stack([cam[4], cam[14]])


@pytest.fixture
def crf(backend):
    """``crf(image, scores)``: the probabilities of one score set."""

    def run(image, scores, **parameters) -> np.ndarray:
        (result,) = dense_crf(image, [scores], backend=backend, **parameters)
        return result

    return run


def test_background_comes_first_and_scores_are_not_normalized():
    maps = np.array([[[0, 0.5]], [[0.2, 0.9]]], np.float32)
    scores = background_and_maps(maps, 4)
    np.testing.assert_allclose(scores[0], [[0.8**4, 0.1**4]], rtol=1e-5)
    assert np.array_equal(scores[1:], maps)
    assert scores.dtype == np.float32
    without_maps = background_and_maps(np.empty((0, 2, 3), np.float32), 4)
    assert np.array_equal(without_maps, np.ones((1, 2, 3)))


def test_probabilities_sum_to_one_in_the_shape_of_the_scores(crf, image, maps):
    probabilities = crf(image, background_and_maps(maps, 4))
    assert probabilities.shape == (3, HEIGHT, WIDTH)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert (probabilities >= 0).all()


@pytest.mark.parametrize(
    "parameters", [{"steps": 0}, {"gaussian_compat": 0, "bilateral_compat": 0}]
)
def test_without_pairwise_terms_the_scores_are_normalized(crf, parameters, image, maps):
    scores = np.clip(background_and_maps(maps, 4), 1e-5, 1)
    probabilities = crf(image, scores, **parameters)
    np.testing.assert_allclose(probabilities, scores / scores.sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_labels_of_equal_scores_have_equal_probabilities(crf, score, image):
    scores = np.full((2, HEIGHT, WIDTH), score, np.float32)
    np.testing.assert_allclose(crf(image, scores), 0.5, atol=1e-6)


def test_permuted_labels_give_permuted_probabilities(crf, image, maps):
    scores = background_and_maps(maps, 4)
    order = [2, 0, 1]
    np.testing.assert_allclose(crf(image, scores[order]), crf(image, scores)[order], atol=1e-5)


def test_label_boundary_moves_to_the_edge_in_the_image(crf):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    scores = np.full((2, 32, 32), 0.4, np.float32)
    scores[0, :, :13] = scores[1, :, 13:] = 0.6  # three columns beside the edge
    label = crf(image, scores).argmax(axis=0)
    assert (label[:, :16] == 0).all()
    assert (label[:, 16:] == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (1, 40)])
def test_image_one_pixel_wide_or_high_works(crf, size):
    image = recipe.synthetic_image(*size, seed=1)
    probabilities = crf(image, np.random.default_rng(0).uniform(size=(3, *size)))
    np.testing.assert_allclose(probabilities.sum(axis=0), np.ones(size), atol=1e-5)


def test_views_are_accepted_and_arguments_do_not_change(crf, image, maps):
    mirrored, scores = image[:, ::-1], background_and_maps(maps, 4)[:, :, ::-1]
    copies = mirrored.copy(), scores.copy()
    assert np.array_equal(crf(mirrored, scores), crf(*copies))
    assert np.array_equal(mirrored, copies[0])
    assert np.array_equal(scores, copies[1])


@pytest.mark.parametrize(
    "shapes",
    [[(2, WIDTH, HEIGHT)], [(2, HEIGHT, WIDTH + 1)], [(2, HEIGHT, WIDTH), (3, HEIGHT, WIDTH)], []],
)
def test_scores_that_do_not_fit_are_a_value_error(shapes, image, backend):
    with pytest.raises(ValueError, match=f"{HEIGHT} x {WIDTH}"):
        dense_crf(image, [np.zeros(shape) for shape in shapes], backend=backend)


def test_only_the_backend_pydensecrf_needs_its_module(image, maps, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    scores = [background_and_maps(maps, 4)]
    dense_crf(image, scores)
    with pytest.raises(ImportError, match="pydensecrf"):
        dense_crf(image, scores, backend="pydensecrf")


# Agreement with pydensecrf


def _smooth_maps(classes: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """Smooth random maps that resemble CAMs: classes x H x W in 0..1."""
    maps = np.empty((classes, *size), np.float32)
    rng = np.random.default_rng(seed)
    coarse = rng.random((classes, max(2, size[0] // 30), max(2, size[1] // 30)), np.float32) ** 2
    for full, plane in zip(maps, coarse, strict=True):
        full[:] = Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR)
    return maps


def _assert_backends_agree(image: np.ndarray, classes: int, alphas=(4, 24, 32)) -> None:
    maps = _smooth_maps(classes, image.shape[:2], seed=classes)
    score_sets = [background_and_maps(maps, alpha) for alpha in alphas]
    results = [np.stack(dense_crf(image, score_sets, backend=backend)) for backend in BACKENDS]
    np.testing.assert_allclose(*results, rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(*results, strict=True):
        assert (ours.argmax(axis=0) == theirs.argmax(axis=0)).mean() >= EQUAL_LABELS


@needs_pydensecrf
@pytest.mark.parametrize(("photograph", "classes"), [(0, 1), (75, 2), (225, 5)])
def test_backends_agree_on_photographs(photograph, classes, voc_mini):
    path = sorted((voc_mini / "JPEGImages").iterdir())[photograph]
    _assert_backends_agree(np.array(Image.open(path))[:250, :350], classes)


# Some numbers of pixels are no multiple of 4: pydensecrf then adds lattice points.
@needs_pydensecrf
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 3), (1, 301), (302, 1), (37, 53), (61, 64)])
@pytest.mark.parametrize("classes", [0, 2, 20])
def test_backends_agree_on_images_of_any_size(classes, size):
    _assert_backends_agree(recipe.synthetic_image(*size, seed=1), classes)


@needs_pydensecrf
@pytest.mark.parametrize(("size", "level"), [((20, 30), 0), ((375, 500), 128)])
def test_backends_agree_on_flat_images(size, level):
    """Sums run over thousands of pixels, where the order of float32 additions matters."""
    _assert_backends_agree(np.full((*size, 3), level, np.uint8), 2, alphas=(4,))


@needs_pydensecrf
@pytest.mark.parametrize("parameters", [{"bilateral_sxy": 20, "bilateral_srgb": 5}, {"steps": 3}])
def test_backends_agree_on_other_parameters(parameters, image, maps):
    scores = [background_and_maps(maps, 4)]
    ours, theirs = (dense_crf(image, scores, backend=name, **parameters) for name in BACKENDS)
    np.testing.assert_allclose(ours[0], theirs[0], atol=TOLERANCE)


@pytest.mark.cuda
def test_cuda_gives_the_cpus_numbers():
    image = recipe.synthetic_image(97, 130, seed=2)
    scores = [background_and_maps(_smooth_maps(2, (97, 130), seed=0), alpha) for alpha in (4, 32)]
    for cpu, cuda in zip(
        dense_crf(image, scores), dense_crf(image, scores, device="cuda"), strict=True
    ):
        np.testing.assert_allclose(cuda, cpu, atol=1e-3)  # sums in another order
        assert (cuda.argmax(axis=0) == cpu.argmax(axis=0)).mean() >= EQUAL_LABELS


@pytest.mark.parametrize("classes", [2, 20])
def test_parts_threads_and_other_score_sets_do_not_change_a_bit(classes, image, monkeypatch):
    maps = _smooth_maps(classes, (HEIGHT, WIDTH), seed=0)
    scores = [background_and_maps(maps, alpha) for alpha in (4, 32)]
    expected = np.stack(dense_crf(image, scores))
    assert np.array_equal(dense_crf(image, scores[1:])[0], expected[1])
    assert not np.array_equal(expected[0], expected[1])
    monkeypatch.setattr(tool.crf, "VALUES_AT_ONCE", 17 * 2 * (classes + 1))
    monkeypatch.setattr(tool.lattice, "PIXELS_IN_CACHE", 100)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tool.crf._position_filter.cache_clear()
            assert np.array_equal(np.stack(dense_crf(image, scores)), expected)
    finally:
        torch.set_num_threads(before)
