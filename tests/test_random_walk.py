"""The random walk: series and sparse matrices against the dense definition, and properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tool.affinity import pair_affinity, pair_offsets, source_grid
from tool.random_walk import (
    TOLERANCE,
    background_map,
    chebyshev_coefficients,
    pad_to_multiple,
    propagate,
    propagate_together,
    transition_matrix,
    upsample_scores,
    walk_seeds,
    walk_trace,
)

RADIUS = 5
sides = st.integers(1, 13)
walks = {"height": sides, "width": sides, "radius": st.integers(2, 5), "seed": st.integers(0, 99)}


def _affinity(height, width, radius, seed, low=0.2) -> torch.Tensor:
    rows, columns = source_grid(height, width, radius)
    shape = (len(pair_offsets(radius)), rows * columns)
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, 1, shape))


def _maps(count, height, width, seed=0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(size=(count, height, width)))


def _dense_transition(affinity, height, width, radius, beta) -> np.ndarray:
    """The definition: symmetric affinities, ones on the diagonal, power, columns normalized."""
    matrix = np.eye(height * width)
    reach = radius - 1
    for o, (dy, dx) in enumerate(pair_offsets(radius)):
        s = 0
        for y in range(height - reach):
            for x in range(reach, width - reach):
                i, j = y * width + x, (y + dy) * width + x + dx
                matrix[i, j] = matrix[j, i] = affinity[o, s]
                s += 1
    matrix = matrix**beta
    return matrix / matrix.sum(axis=0)


def test_background_map_is_a_power_of_one_minus_the_largest_score():
    maps = torch.tensor([[[0.0, 0.5, 0.25, 1.0005]], [[0.0, 0.1, 1.0, 0.0]]])
    assert background_map(maps, 2).tolist() == [[1, 0.25, 0, 0]]
    assert background_map(maps, 2.5)[0, 3] == 0
    assert torch.equal(background_map(maps[:0], 16), torch.ones(1, 4))


@given(**walks, beta=st.sampled_from([1, 2, 8]))
def test_transition_matrix_equals_the_dense_definition(height, width, radius, seed, beta):
    affinity = _affinity(height, width, radius, seed)
    actual = transition_matrix(affinity, height, width, radius, beta).to_dense().numpy()
    expected = _dense_transition(affinity.numpy(), height, width, radius, beta)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)


def test_transition_is_sparse_and_double():
    transition = transition_matrix(_affinity(30, 40, RADIUS, 0).float(), 30, 40, RADIUS, 8)
    assert transition.layout == torch.sparse_csc
    assert transition.dtype == torch.float64
    # The cell itself and 34 offsets in both directions.
    assert transition.ccol_indices().diff().max() == 69
    # Entries are built in CSC's order, not sorted: let PyTorch check it.
    parts = transition.ccol_indices(), transition.row_indices(), transition.values()
    torch.sparse_csc_tensor(*parts, transition.shape, check_invariants=True)


@given(**walks, beta=st.sampled_from([1, 8]))
def test_full_graph_connects_all_cells_within_the_radius(height, width, radius, seed, beta):
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 3, height, width)))
    affinity = pair_affinity(features, radius, full_graph=True)
    transition = transition_matrix(affinity[0], height, width, radius, beta, full_graph=True)

    y, x = np.divmod(np.arange(height * width), width)
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    vectors = features.flatten(2)[0].numpy().T
    distance = np.abs(vectors[:, None] - vectors).mean(axis=2)
    matrix = np.where(near, np.exp(-distance) ** beta, 0)
    np.testing.assert_allclose(transition.to_dense().numpy(), matrix / matrix.sum(axis=0))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 8, 64])
def test_chebyshev_series_is_the_power(steps):
    expected = np.polynomial.chebyshev.poly2cheb([0] * steps + [1])
    np.testing.assert_allclose(chebyshev_coefficients(steps, 0), expected, rtol=1e-9)


@given(st.integers(0, 20), st.sampled_from([1e-2, 1e-4, TOLERANCE]))
def test_truncated_series_is_within_the_tolerance_on_the_whole_interval(logt, tolerance):
    coefficients = chebyshev_coefficients(2**logt, tolerance)
    x = np.cos(np.linspace(0, np.pi, 999))
    series = np.polynomial.chebyshev.chebval(x, coefficients)
    # The coefficients left out, and as much again for scaling the others to sum to one.
    assert np.abs(series - x ** (2**logt)).max() <= 2 * tolerance
    assert sum(coefficients) == pytest.approx(1, abs=1e-12)
    assert len(coefficients) <= 2**logt + 1
    assert len(coefficients) <= np.sqrt(2 * 2**logt * np.log(2 / tolerance)) + 2


@given(
    **walks,
    beta=st.sampled_from([0.5, 1, 4, 8, 50]),
    logt=st.integers(0, 10),
    low=st.sampled_from([0, 0.2, 0.99]),
    spike=st.booleans(),
)
def test_walk_equals_the_power_of_the_dense_matrix(
    height, width, radius, seed, beta, logt, low, spike
):
    affinity = _affinity(height, width, radius, seed, low).float()
    maps = _maps(3, height, width, seed)
    if spike:
        maps[0] = 0
        maps[0, height // 2, width // 2] = 1
    transition = transition_matrix(affinity, height, width, radius, beta)
    dense = _dense_transition(affinity.double().numpy(), height, width, radius, beta)
    dense = np.linalg.matrix_power(dense, 2**logt)
    expected = maps.flatten(1).numpy() @ dense

    walked = propagate(maps.float(), transition, 2**logt).flatten(1).numpy()
    difference = np.abs(walked - maps.float().flatten(1).double().numpy() @ dense).max(axis=1)
    assert (difference <= 1e-6 * expected.max(axis=1)).all()
    exact = propagate(maps, transition, 2**logt, tolerance=0).flatten(1).numpy()
    np.testing.assert_allclose(exact, expected, rtol=1e-9, atol=1e-12)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4)), min_size=1))
def test_walk_of_several_images_equals_the_walk_of_each(images):
    transitions = [transition_matrix(_affinity(h, w, 4, h), h, w, 4, 8) for h, w, _ in images]
    seeds = [_maps(count, h, w, count) for h, w, count in images]
    together = propagate_together(seeds, transitions, 32)
    for walked, maps, transition in zip(together, seeds, transitions, strict=True):
        torch.testing.assert_close(walked, propagate(maps, transition, 32))


def test_trace_has_the_scores_after_powers_of_two_steps():
    transition = transition_matrix(_affinity(9, 12, RADIUS, 2), 9, 12, RADIUS, 8)
    seeds = _maps(2, 9, 12)
    trace = walk_trace(seeds, transition, 4)
    assert list(trace) == [0, 1, 2, 4, 8, 16]
    for steps, scores in trace.items():
        exact = propagate(seeds, transition, steps, tolerance=0)
        torch.testing.assert_close(scores, exact, atol=1e-5, rtol=0)


@given(st.integers(1, 20), st.integers(1, 20))
def test_padding_adds_zeros_right_and_bottom_only(height, width):
    padded = pad_to_multiple(torch.ones(2, height, width), 8)
    assert padded.shape == (2, 8 * math.ceil(height / 8), 8 * math.ceil(width / 8))
    assert (padded[:, :height, :width] == 1).all()
    assert padded.sum() == 2 * height * width


def _bilinear_weights(cells, stride) -> np.ndarray:
    """Pixels x cells: a pixel's weights of the cells whose centres it lies between."""
    centres = np.clip((np.arange(cells * stride) + 0.5) / stride - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(cells)))


def test_label_follows_its_definition_from_seeds_to_upsampling():
    height, width, grid = 51, 75, (7, 10)
    maps = 0.5 * _maps(2, height, width).float()
    affinity = _affinity(*grid, RADIUS, 5)
    transition = transition_matrix(affinity, *grid, RADIUS, 8)
    scores = propagate(walk_seeds(maps, 4, 8), transition, 4)
    label = upsample_scores(scores, (height, width), 8).argmax(dim=0)

    stacked = np.zeros((3, 56, 80))  # padded with zeros, the background, too
    stacked[1:, :height, :width] = maps
    stacked[0, :height, :width] = (1 - maps.numpy().max(axis=0)) ** 4
    pooled = stacked.reshape(3, 7, 8, 10, 8).mean(axis=(2, 4))
    dense = _dense_transition(affinity.numpy(), *grid, RADIUS, 8)
    expected = pooled.reshape(3, -1) @ np.linalg.matrix_power(dense, 4)
    np.testing.assert_allclose(scores.flatten(1).numpy(), expected, atol=1e-6)

    rows, columns = (_bilinear_weights(cells, 8) for cells in grid)
    upsampled = np.einsum("yi,kij,xj->kyx", rows, expected.reshape(3, 7, 10), columns)
    assert (label.numpy() == upsampled.argmax(axis=0)[:height, :width]).mean() > 0.999
    assert label.shape == (height, width)
    assert label.unique().tolist() == [0, 1, 2]
