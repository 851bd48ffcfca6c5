"""Pairs, affinities, pair labels, loss and confident labels, against brute force and by hand."""

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

VOID = 255
radii = st.integers(2, 5)
label_grids = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12),
    elements=st.sampled_from([0, 1, 2, VOID]),
)


def _pairs_by_hand(height, width, radius):
    """(offset number, source number, source cell, target cell) of every pair, in SPEC's order."""
    reach = radius - 1
    sources = list(product(range(height - reach), range(reach, width - reach)))
    for o, (dy, dx) in enumerate(pair_offsets(radius)):
        for s, (y, x) in enumerate(sources):
            yield o, s, (y, x), (y + dy, x + dx)


# ---- which pairs ----


def test_radius_5_has_34_offsets_in_order():
    below = [(dy, dx) for dy in range(1, 5) for dx in range(-4, 5) if dy**2 + dx**2 < 25]
    assert pair_offsets(5) == [(0, 1), (0, 2), (0, 3), (0, 4), *below]
    assert len(pair_offsets(5)) == 34


@pytest.mark.parametrize("radius", range(1, 9))
def test_offsets_make_each_unordered_pair_in_the_disc_once(radius):
    offsets = pair_offsets(radius)
    both_ways = offsets + [(-dy, -dx) for dy, dx in offsets]
    reach = range(-radius, radius + 1)
    disc = {(dy, dx) for dy in reach for dx in reach if 0 < dy**2 + dx**2 < radius**2}
    assert len(both_ways) == len(set(both_ways))
    assert set(both_ways) == disc


@pytest.mark.parametrize(
    ("size", "sources"),
    [((14, 14), (10, 6)), ((5, 9), (1, 1)), ((4, 20), (0, 12)), ((9, 8), (5, 0))],
)
def test_source_grid_leaves_out_what_offsets_would_leave(size, sources):
    assert source_grid(*size, radius=5) == sources


@given(st.integers(1, 12), st.integers(1, 12), radii)
def test_pair_indices_equal_brute_force(height, width, radius):
    sources, targets = pair_indices(height, width, radius)
    rows, columns = source_grid(height, width, radius)
    assert targets.shape == (len(pair_offsets(radius)), rows * columns)
    found = {
        (o, s, int(sources[s]), int(targets[o, s]))
        for o, s in product(range(len(targets)), range(len(sources)))
    }
    assert found == {
        (o, s, y * width + x, ty * width + tx)
        for o, s, (y, x), (ty, tx) in _pairs_by_hand(height, width, radius)
    }


# ---- affinities ----


@given(st.integers(1, 10), st.integers(1, 10), radii, st.integers(0, 99))
def test_affinity_equals_the_formula_pair_by_pair(height, width, radius, seed):
    features = np.random.default_rng(seed).normal(size=(2, 3, height, width))
    affinity = pair_affinity(torch.from_numpy(features), radius)
    rows, columns = source_grid(height, width, radius)
    assert affinity.shape == (2, len(pair_offsets(radius)), rows * columns)
    for b, (o, s, (y, x), (ty, tx)) in product(range(2), _pairs_by_hand(height, width, radius)):
        distance = np.abs(features[b, :, y, x] - features[b, :, ty, tx]).mean()
        assert affinity[b, o, s].item() == pytest.approx(math.exp(-distance), rel=1e-12)


def test_affinity_of_equal_features_is_one():
    assert torch.equal(pair_affinity(torch.full((1, 4, 7, 11), 2.5), 5), torch.ones(1, 34, 9))


def _gathered(features, radius):
    """The released code's way: the features of both cells of all pairs, gathered."""
    sources, targets = pair_indices(*features.shape[-2:], radius)
    cells = features.flatten(2)
    return torch.exp(-(cells[..., targets] - cells[..., None, sources]).abs().mean(dim=1))


@given(st.integers(1, 11), st.integers(1, 12), radii, st.integers(1, 3), st.integers(0, 99))
def test_streamed_affinity_and_gradient_equal_the_gathered(height, width, radius, batch, seed):
    values = np.random.default_rng(seed).normal(size=(batch, 4, height, width))
    # Equal features too, where the distance has no derivative: both take 0.
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


@pytest.mark.parametrize("full_graph", [False, True])
def test_affinity_gradient_is_the_difference_quotient(full_graph):
    values = np.random.default_rng(5).normal(size=(2, 3, 5, 6))
    features = torch.from_numpy(values).requires_grad_()
    torch.autograd.gradcheck(lambda x: pair_affinity(x, 3, full_graph), features)


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
    # aot_eager traces forward and backward as a compiler would, and needs none installed.
    head = torch.compile(pair_affinity, backend="aot_eager", fullgraph=True)
    pair_affinity(straight, 3).sum().backward()
    head(compiled, 3).sum().backward()
    torch.testing.assert_close(compiled.grad, straight.grad)


def test_full_graph_holds_the_same_affinities_and_those_at_the_border():
    features = torch.randn(1, 6, 8, 13, generator=torch.Generator().manual_seed(0))
    rows, columns = source_grid(8, 13, 5)
    full = pair_affinity(features, 5, full_graph=True).view(1, 34, 8, 13)
    inner = full[..., :rows, 4 : 4 + columns].flatten(2)
    torch.testing.assert_close(inner, pair_affinity(features, 5))
    for o, (dy, dx) in enumerate(pair_offsets(5)):
        for y, x in product(range(8), range(13)):
            on_grid = y + dy < 8 and 0 <= x + dx < 13
            assert (full[0, o, y, x] > 0) == on_grid


def test_affinity_is_symmetric_under_mirroring():
    # Offsets (dy > 0, dx) have their mirror image among themselves, and so have their sources.
    features = torch.randn(1, 6, 8, 13, generator=torch.Generator().manual_seed(0))
    rows, columns = source_grid(8, 13, 5)
    straight = pair_affinity(features, 5).view(-1, rows, columns)
    mirrored = pair_affinity(features.flip(-1), 5).view(-1, rows, columns).flip(-1)
    offsets = pair_offsets(5)
    checked = 0
    for o, (dy, dx) in enumerate(offsets):
        if dy > 0:
            torch.testing.assert_close(straight[o], mirrored[offsets.index((dy, -dx))])
            checked += 1
    assert checked == 30


@given(st.integers(1, 11), st.integers(1, 12), radii, st.integers(0, 99))
def test_affinity_is_symmetric_in_its_pair(height, width, radius, seed):
    # A half turn exchanges the two cells of each pair: what was the target is the source.
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 4, height, width)))
    straight = pair_affinity(features, radius, full_graph=True)[0]
    turned = pair_affinity(features.flip(-2, -1), radius, full_graph=True)[0]
    for o, (dy, dx) in enumerate(pair_offsets(radius)):
        there, back = (affinity[o].view(height, width) for affinity in (straight, turned))
        rows, columns = slice(dy, height), slice(max(0, dx), max(0, width + min(0, dx)))
        ends = back.flip(-2, -1)[rows, columns]
        starts = slice(0, max(0, height - dy)), slice(max(0, -dx), max(0, width - max(0, dx)))
        assert torch.equal(there[starts], ends)


def test_affinity_depends_on_feature_differences_alone():
    features = torch.randn(1, 5, 9, 12, generator=torch.Generator().manual_seed(1))
    moved = features + torch.arange(5.0).view(1, 5, 1, 1)
    torch.testing.assert_close(pair_affinity(moved, 5), pair_affinity(features, 5))
    torch.testing.assert_close(pair_affinity(-features, 5), pair_affinity(features, 5))


def test_affinity_of_a_batch_equals_that_of_each():
    features = torch.randn(3, 5, 9, 12, generator=torch.Generator().manual_seed(2))
    each = torch.cat([pair_affinity(one[None], 4) for one in features])
    assert torch.equal(pair_affinity(features, 4), each)


# ---- pair labels ----


@given(label_grids, radii)
def test_pair_labels_equal_brute_force(label, radius):
    kinds = pair_labels(torch.from_numpy(label), radius)
    for b, (o, s, source, target) in product(
        range(len(label)), _pairs_by_hand(*label.shape[1:], radius)
    ):
        i, j = label[b][source], label[b][target]
        expected = (
            i == j == 0,
            i == j and i not in (0, VOID),
            i != j and VOID not in (i, j),
        )
        assert tuple(bool(kind[b, o, s]) for kind in kinds) == expected


@given(label_grids)
def test_pair_has_one_kind_at_most_and_none_with_void(label):
    kinds = torch.stack(pair_labels(torch.from_numpy(label), 5)).int().sum(dim=0)
    assert kinds.shape == (len(label), 34, math.prod(source_grid(*label.shape[1:], 5)))
    assert (kinds <= 1).all()
    without_void = torch.from_numpy(np.where(label == VOID, 0, label))
    assert (torch.stack(pair_labels(without_void, 5)).int().sum(dim=0) == 1).all()


@given(label_grids, radii)
def test_pairs_of_a_mirrored_label_are_the_mirrored_pairs(label, radius):
    grid = source_grid(*label.shape[1:], radius)
    offsets = pair_offsets(radius)
    straight, mirrored = (
        [kind.unflatten(2, grid) for kind in pair_labels(torch.from_numpy(array.copy()), radius)]
        for array in (label, label[..., ::-1])
    )
    for kind, mirror in zip(straight, mirrored, strict=True):
        for o, (dy, dx) in enumerate(offsets):
            if dy > 0:  # the mirror image of (0, dx) starts at the pair's other cell
                assert torch.equal(kind[:, o], mirror[:, offsets.index((dy, -dx))].flip(-1))


# ---- loss ----


def _kinds(background, foreground, negative):
    return [torch.tensor(kind, dtype=torch.bool) for kind in (background, foreground, negative)]


def test_loss_of_perfect_affinities_is_nearly_zero():
    affinity = torch.tensor([[[1.0, 1.0, 0.0, 0.5]]])
    kinds = _kinds([[[1, 0, 0, 0]]], [[[0, 1, 0, 0]]], [[[0, 0, 1, 0]]])
    assert all(abs(part.item()) < 2e-5 for part in affinity_loss(affinity, *kinds).values())


def test_loss_equals_the_hand_computed_one():
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


def test_loss_without_any_pair_of_a_kind_is_zero_there():
    affinity = torch.full((1, 2, 3), 0.4)
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    losses = affinity_loss(affinity, nothing, nothing, nothing)
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0)
    assert set(losses) == {"loss", "bg", "fg", "neg"}


def test_loss_and_its_gradient_stay_finite_at_the_extremes():
    affinity = torch.tensor([[[0.0, 0.0, 1.0]]], requires_grad=True)
    losses = affinity_loss(affinity, *_kinds([[[1, 0, 0]]], [[[0, 1, 0]]], [[[0, 0, 1]]]))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(-math.log(1e-5), rel=1e-3)
    assert torch.isfinite(affinity.grad).all()
    # Alike pairs pull their affinity up, unlike pairs push it down.
    assert (affinity.grad.sign() == torch.tensor([-1, -1, 1])).all()


# ---- confident labels ----


def _cell_scores(*winners, stride=8, maps=3):
    """Scores maps x stride x (stride * cells) whose cells have these winners."""
    scores = torch.full((maps, stride, stride * len(winners)), 0.1)
    for cell, winner in enumerate(winners):
        scores[winner, :, cell * stride : (cell + 1) * stride] = 0.8
    return scores


@pytest.mark.parametrize(
    ("low", "high", "label"),
    [(0, 0, 0), (0, 2, VOID), (1, 0, 0), (2, 2, 2), (1, 2, 1), (2, 1, 2)],
)
def test_label_of_a_cell_follows_both_winners(low, high, label):
    assert affinity_label(_cell_scores(low), _cell_scores(high), 8).tolist() == [[label]]


def test_label_is_uint8_with_a_value_a_cell():
    scores = torch.rand(4, 24, 40, generator=torch.Generator().manual_seed(0))
    label = affinity_label(scores, scores.flip(0), 8)
    assert label.dtype == torch.uint8
    assert label.shape == (3, 5)
    assert set(label.unique().tolist()) <= {0, 1, 2, 3, VOID}


def test_label_pools_scores_before_it_takes_the_winner():
    # Map 1 wins in most of the pixels, by little; map 2 wins in the average.
    low = torch.zeros(3, 8, 8)
    low[1], low[2, :2] = 0.2, 0.9
    low[1, :2] = 0
    assert low.argmax(dim=0).flatten().bincount().argmax() == 1
    assert affinity_label(low, low, 8).tolist() == [[2]]


def test_label_is_void_where_there_is_no_score_at_all():
    low, high = _cell_scores(1, 1, 0), _cell_scores(1, 0, 0)
    empty = torch.zeros(3, 8, 8)
    low, high = torch.cat([low, empty], dim=2), torch.cat([high, empty], dim=2)
    assert affinity_label(low, high, 8).tolist() == [[1, 0, 0, VOID]]


def test_label_is_kept_where_any_pooled_score_reaches_the_floor():
    low, high = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    low[1], high[1] = 2e-5, 2e-5
    assert affinity_label(low, high, 8).tolist() == [[1]]
    assert affinity_label(low / 4, high, 8).tolist() == [[1]]
    assert affinity_label(low, high / 4, 8).tolist() == [[1]]
    assert affinity_label(low / 4, high / 4, 8).tolist() == [[VOID]]


def test_label_of_an_image_without_classes_is_background():
    assert affinity_label(torch.ones(1, 16, 16), torch.ones(1, 16, 16), 8).eq(0).all()


def _random_scores(seed, rows, columns, stride=8, maps=3):
    """Scores of two alphas, maps x rows * stride x columns * stride, some cells without any."""
    generator = torch.Generator().manual_seed(seed)
    size = (maps, rows * stride, columns * stride)
    empty = torch.rand(rows, columns, generator=generator) < 0.2
    empty = empty.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    return [torch.rand(size, generator=generator).masked_fill(empty, 0) for _ in range(2)]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_label_of_mirrored_scores_is_the_mirrored_label(rows, columns, seed):
    low, high = _random_scores(seed, rows, columns)
    label = affinity_label(low, high, 8)
    assert torch.equal(affinity_label(low.flip(-1), high.flip(-1), 8), label.flip(-1))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.data())
def test_label_of_a_crop_is_the_cropped_label(rows, columns, seed, data):
    low, high = _random_scores(seed, rows, columns)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    cropped = (scores[:, 8 * top :, 8 * left :] for scores in (low, high))
    label = affinity_label(low, high, 8)
    assert torch.equal(affinity_label(*cropped, 8), label[top:, left:])
    # What a crop lays beyond the image has no label.
    padded = (torch.nn.functional.pad(scores, (8, 0, 0, 16)) for scores in (low, high))
    expected = torch.nn.functional.pad(label, (1, 0, 0, 2), value=VOID)
    assert torch.equal(affinity_label(*padded, 8), expected)


def test_label_leaves_its_arguments_alone():
    low, high = _cell_scores(0, 1), _cell_scores(2, 0)
    before = low.clone(), high.clone()
    affinity_label(low, high, 8)
    assert torch.equal(low, before[0])
    assert torch.equal(high, before[1])
