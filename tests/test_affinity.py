"""Pairs, affinities, pair labels, loss and confident labels, against brute force."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tool.affinity import (
    affinity_label,
    affinity_loss,
    pair_affinity,
    pair_indices,
    pair_labels,
    pair_offsets,
    source_grid,
)
from tool.labels import VOID

radii = st.integers(2, 5)
label_grids = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12),
    elements=st.sampled_from([0, 1, 2, VOID]),
)


def _all_pairs(height, width, radius):
    """(offset number, source number, source cell, target cell) of every pair, in SPEC's order."""
    reach = radius - 1
    sources = list(product(range(height - reach), range(reach, width - reach)))
    for o, (dy, dx) in enumerate(pair_offsets(radius)):
        for s, (y, x) in enumerate(sources):
            yield o, s, (y, x), (y + dy, x + dx)


@pytest.mark.parametrize(("radius", "count"), [(1, 0), (2, 4), (3, 12), (5, 34)])
def test_offsets_are_half_of_the_disc_in_order(radius, count):
    # The other half, below (0, 0), has the same pairs with source and target exchanged.
    reach = range(-radius, radius + 1)
    disc = [(dy, dx) for dy in reach for dx in reach if dy**2 + dx**2 < radius**2]
    assert pair_offsets(radius) == [offset for offset in disc if offset > (0, 0)]
    assert len(pair_offsets(radius)) == count


@given(st.integers(1, 12), st.integers(1, 12), radii)
def test_pair_indices_equal_brute_force(height, width, radius):
    sources, targets = pair_indices(height, width, radius)
    rows, columns = source_grid(height, width, radius)
    assert targets.shape == (len(pair_offsets(radius)), rows * columns)
    for o, s, source, target in _all_pairs(height, width, radius):
        assert divmod(int(sources[s]), width) == source
        assert divmod(int(targets[o, s]), width) == target


def _gathered(features, radius):
    """The released code's formula: the features of both cells of all pairs, gathered."""
    sources, targets = pair_indices(*features.shape[-2:], radius)
    cells = features.flatten(2)
    return torch.exp(-(cells[..., targets] - cells[..., None, sources]).abs().mean(dim=1))


@given(st.integers(1, 11), st.integers(1, 12), radii, st.integers(1, 3), st.integers(0, 99))
def test_streamed_affinity_and_gradient_equal_the_gathered(height, width, radius, batch, seed):
    values = np.random.default_rng(seed).normal(size=(batch, 4, height, width))
    # Some features are equal: the distance has no derivative there, both take 0.
    features = torch.from_numpy(values.round(1)).requires_grad_()
    weights = torch.from_numpy(
        np.random.default_rng(seed).normal(size=_gathered(features, radius).shape)
    )
    results = []
    for head in (pair_affinity, _gathered):
        affinity = head(features, radius)
        (gradient,) = torch.autograd.grad((affinity * weights).sum(), features)
        results.append((affinity.detach(), gradient))
    torch.testing.assert_close(results[0], results[1])


def test_affinity_gradient_on_the_full_graph_is_the_difference_quotient():
    values = np.random.default_rng(5).normal(size=(2, 3, 4, 5))
    features = torch.from_numpy(values).requires_grad_()
    torch.autograd.gradcheck(lambda x: pair_affinity(x, 3, full_graph=True), features)


def test_affinity_under_autocast_is_computed_in_single_precision():
    features = torch.randn(1, 64, 6, 10, generator=torch.Generator().manual_seed(3))
    half = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        affinity = pair_affinity(half, 4)
    torch.testing.assert_close(affinity, pair_affinity(half.float(), 4))
    assert affinity.dtype == torch.float32
    affinity.sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.isfinite().all()


def test_affinity_can_be_compiled():
    features = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(3))
    straight, compiled = features.clone().requires_grad_(), features.clone().requires_grad_()
    # aot_eager traces forward and backward like a compiler, but needs no C++ compiler.
    head = torch.compile(pair_affinity, backend="aot_eager", fullgraph=True)
    pair_affinity(straight, 3).sum().backward()
    head(compiled, 3).sum().backward()
    torch.testing.assert_close(compiled.grad, straight.grad)


def test_full_graph_has_the_same_affinities_and_those_at_the_border():
    features = torch.randn(1, 6, 8, 13, generator=torch.Generator().manual_seed(0))
    rows, columns = source_grid(8, 13, 5)
    full = pair_affinity(features, 5, full_graph=True).view(1, 34, 8, 13)
    inner = full[..., :rows, 4 : 4 + columns].flatten(2)
    torch.testing.assert_close(inner, pair_affinity(features, 5))
    for o, (dy, dx) in enumerate(pair_offsets(5)):
        for y, x in product(range(8), range(13)):
            on_grid = y + dy < 8 and 0 <= x + dx < 13
            assert (full[0, o, y, x] > 0) == on_grid


@given(label_grids, radii)
def test_pair_labels_equal_brute_force(label, radius):
    kinds = pair_labels(torch.from_numpy(label), radius)
    for b, (o, s, source, target) in product(
        range(len(label)), _all_pairs(*label.shape[1:], radius)
    ):
        i, j = label[b][source], label[b][target]
        expected = i == j == 0, i == j and i not in (0, VOID), i != j and VOID not in (i, j)
        assert tuple(bool(kind[b, o, s]) for kind in kinds) == expected


def _kinds(background, foreground, negative):
    return [torch.tensor(kind, dtype=torch.bool) for kind in (background, foreground, negative)]


def test_loss_follows_equations_6_to_9():
    affinity = torch.tensor([[[0.9, 0.6, 0.3, 0.2, 0.7, 0.5]]], dtype=torch.float64)
    kinds = _kinds([[[1, 1, 0, 0, 0, 0]]], [[[0, 0, 1, 0, 0, 0]]], [[[0, 0, 0, 1, 1, 0]]])
    bg = -(math.log(0.9 + 1e-5) + math.log(0.6 + 1e-5)) / (2 + 1e-5)
    fg = -math.log(0.3 + 1e-5) / (1 + 1e-5)
    neg = -(math.log(1 + 1e-5 - 0.2) + math.log(1 + 1e-5 - 0.7)) / (2 + 1e-5)
    losses = {name: value.item() for name, value in affinity_loss(affinity, *kinds).items()}
    assert losses == pytest.approx(
        {"bg": bg, "fg": fg, "neg": neg, "loss": bg / 4 + fg / 4 + neg / 2}, rel=1e-12
    )


def test_loss_averages_over_the_whole_batch_not_image_by_image():
    affinity = torch.tensor([[[0.1, 0.1, 0.1]], [[0.8, 0.5, 0.5]]], dtype=torch.float64)
    background = [[[1, 1, 1]], [[1, 0, 0]]]
    none = [[[0, 0, 0]], [[0, 0, 0]]]
    losses = affinity_loss(affinity, *_kinds(background, none, none))
    expected = -(3 * math.log(0.1 + 1e-5) + math.log(0.8 + 1e-5)) / (4 + 1e-5)
    assert losses["bg"].item() == pytest.approx(expected, rel=1e-12)


def test_loss_without_any_pair_is_zero():
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    losses = affinity_loss(torch.full((1, 2, 3), 0.4), nothing, nothing, nothing)
    assert losses == {"loss": 0, "bg": 0, "fg": 0, "neg": 0}


def test_loss_and_its_gradient_stay_finite_at_the_extremes():
    affinity = torch.tensor([[[0.0, 0.0, 1.0]]], requires_grad=True)
    losses = affinity_loss(affinity, *_kinds([[[1, 0, 0]]], [[[0, 1, 0]]], [[[0, 0, 1]]]))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(-math.log(1e-5), rel=1e-3)
    assert torch.isfinite(affinity.grad).all()
    # Descent raises the affinity of equal pairs and lowers that of different pairs.
    assert (affinity.grad.sign() == torch.tensor([-1, -1, 1])).all()


def _cell_scores(winner):
    """Scores of one cell, 3 x 8 x 8, whose argmax is ``winner``."""
    scores = torch.full((3, 8, 8), 0.1)
    scores[winner] = 0.8
    return scores


@pytest.mark.parametrize(
    ("low", "high", "label"),
    [(0, 0, 0), (0, 2, VOID), (1, 0, 0), (2, 2, 2), (1, 2, 1), (2, 1, 2)],
)
def test_label_of_a_cell_follows_both_argmaxes(low, high, label):
    assert affinity_label(_cell_scores(low), _cell_scores(high), 8).tolist() == [[label]]


def test_label_pools_scores_before_the_argmax():
    # Map 1 is the largest in most pixels, by little; map 2 has the largest mean.
    low = torch.zeros(3, 8, 8)
    low[1], low[2, :2] = 0.2, 0.9
    low[1, :2] = 0
    assert low.argmax(dim=0).flatten().bincount().argmax() == 1
    assert affinity_label(low, low, 8).tolist() == [[2]]


@pytest.mark.parametrize(
    ("low_scale", "high_scale", "label"),
    [(1, 1, 1), (0.25, 1, 1), (1, 0.25, 1), (0.25, 0.25, VOID)],
)
def test_label_is_void_only_where_no_pooled_score_reaches_the_floor(low_scale, high_scale, label):
    scores = torch.zeros(2, 8, 8)
    scores[1] = 2e-5
    assert affinity_label(low_scale * scores, high_scale * scores, 8).tolist() == [[label]]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.data())
def test_label_of_a_crop_is_the_cropped_label(rows, columns, seed, data):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.rand(2, 3, 8 * rows, 8 * columns, generator=generator)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    cropped = (scores[:, 8 * top :, 8 * left :] for scores in (low, high))
    label = affinity_label(low, high, 8)
    assert label.dtype == torch.uint8
    assert label.shape == (rows, columns)
    assert torch.equal(affinity_label(*cropped, 8), label[top:, left:])
    # The part of a crop outside the image is void.
    padded = (torch.nn.functional.pad(scores, (8, 0, 0, 16)) for scores in (low, high))
    expected = torch.nn.functional.pad(label, (1, 0, 0, 2), value=VOID)
    assert torch.equal(affinity_label(*padded, 8), expected)
