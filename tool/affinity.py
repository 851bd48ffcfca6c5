"""Pairs of nearby cells on a feature grid, and their affinities, labels and loss (Sec. 3.2).

A pair is (source, source + offset). Pair tensors are B x offsets x sources, offsets in the order of
``pair_offsets`` and sources row by row. Sources are clipped so that every offset stays on the grid:
the last ``radius - 1`` rows and the first and last ``radius - 1`` columns are not sources.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tool.labels import VOID

# Keeps logarithms finite and divisions defined (released code).
EPSILON = 1e-5


def pair_offsets(radius: int) -> list[tuple[int, int]]:
    """The offsets (dy, dx) that give each unordered pair nearer than ``radius`` cells once.

    First (0, 1..radius-1), then each dy from 1 with dx ascending (Sec. 3.2.2, gamma).
    """
    same_row = [(0, dx) for dx in range(1, radius)]
    below = [(dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius)]
    return same_row + [(dy, dx) for dy, dx in below if dy * dy + dx * dx < radius * radius]


def source_grid(height: int, width: int, radius: int) -> tuple[int, int]:
    """(Rows, columns) of the sources on a height x width grid; 0 where the grid is too small."""
    reach = radius - 1
    return max(0, height - reach), max(0, width - 2 * reach)


def shifted_view(grid: Tensor, offset: tuple[int, int], radius: int) -> Tensor:
    """The targets of all sources for one offset, or the sources themselves for (0, 0).

    ``grid`` is ... x h x w, the result ... x source rows x source columns, a view.
    """
    rows, columns = source_grid(*grid.shape[-2:], radius)
    top, left = offset[0], radius - 1 + offset[1]
    return grid[..., top : top + rows, left : left + columns]


def pair_indices(height: int, width: int, radius: int) -> tuple[Tensor, Tensor]:
    """Row-major cell numbers of the pairs: sources, int64 [S], and targets, int64 offsets x S."""
    cells = torch.arange(height * width).view(height, width)
    sources = shifted_view(cells, (0, 0), radius).reshape(-1)
    targets = [shifted_view(cells, offset, radius).reshape(-1) for offset in pair_offsets(radius)]
    return sources, torch.stack(targets) if targets else sources.new_empty(0, len(sources))


def pair_affinity(features: Tensor, radius: int, full_graph: bool = False) -> Tensor:
    """exp(-mean over channels of |f_i - f_j|) for every pair (eq. 5).

    Features B x C x h x w -> affinities B x offsets x sources, in 0..1, float32 (float64 where the
    features are). With ``full_graph`` every cell is a source, h * w of them, and the affinity of a
    pair that leaves the grid is 0. Differentiable once.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()  # for the mean over hundreds of channels
    # A network may use channels-last memory; shifted views are faster with whole rows.
    features = features.contiguous()
    if not full_graph:
        return _PairAffinity.apply(features, radius)
    reach = radius - 1
    around = (reach, reach, 0, reach)
    grid = F.pad(features.new_ones(features.shape[-2:]), around)
    inside = [shifted_view(grid, offset, radius).flatten() for offset in pair_offsets(radius)]
    return _PairAffinity.apply(F.pad(features, around), radius) * torch.stack(inside)


class _PairAffinity(torch.autograd.Function):
    """One offset at a time, so that the features of all pairs are never in memory together."""

    @staticmethod
    def forward(features: Tensor, radius: int) -> Tensor:
        offsets = pair_offsets(radius)
        grid = source_grid(*features.shape[-2:], radius)
        distance = features.new_empty(len(features), len(offsets), *grid)
        for images in _portions(features):
            part = features[images]
            source = shifted_view(part, (0, 0), radius)
            difference = torch.empty_like(source, memory_format=torch.contiguous_format)
            for index, offset in enumerate(offsets):
                torch.sub(shifted_view(part, offset, radius), source, out=difference)
                distance[images, index] = difference.abs_().mean(dim=1)
        return distance.neg_().exp_().flatten(2)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int], output: Tensor) -> None:
        features, ctx.radius = inputs
        ctx.save_for_backward(features, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_affinity: Tensor) -> tuple[Tensor, None]:
        features, affinity = ctx.saved_tensors
        radius, offsets = ctx.radius, pair_offsets(ctx.radius)
        # The derivative of exp(-mean |f_j - f_i|) by f_j is -exp(...) sign(f_j - f_i) / channels;
        # by f_i it is the negative of that.
        slope = (grad_affinity * affinity).div_(-features.shape[1])
        slope = slope.unflatten(2, source_grid(*features.shape[-2:], radius)).unsqueeze(2)
        gradient = torch.zeros_like(features, memory_format=torch.contiguous_format)
        for images in _portions(features):
            part, part_gradient = features[images], gradient[images]
            source = shifted_view(part, (0, 0), radius)
            source_gradient = shifted_view(part_gradient, (0, 0), radius)
            by_target = torch.empty_like(source, memory_format=torch.contiguous_format)
            for index, offset in enumerate(offsets):
                torch.sub(shifted_view(part, offset, radius), source, out=by_target)
                by_target.sign_().mul_(slope[images, index])
                shifted_view(part_gradient, offset, radius).add_(by_target)
                source_gradient.sub_(by_target)
        return gradient, None


def _portions(features: Tensor) -> list[slice]:
    """The images to process at a time: one on a CPU, to stay in its cache; all on a GPU."""
    if features.device.type == "cpu":
        return [slice(image, image + 1) for image in range(len(features))]
    return [slice(None)]


def pair_labels(label: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """The background, foreground and negative pairs (Sec. 3.2.1).

    ``label`` is B x h x w: 0 background, 255 void. Returns three bool tensors, B x offsets x
    sources: both background; equal, neither background nor void; different, neither void.
    """
    source = shifted_view(label, (0, 0), radius).flatten(1).unsqueeze(1)
    targets = [shifted_view(label, offset, radius).flatten(1) for offset in pair_offsets(radius)]
    target = torch.stack(targets, dim=1)
    valid = (source != VOID) & (target != VOID)
    equal = source == target
    return valid & equal & (source == 0), valid & equal & (source != 0), valid & ~equal


def affinity_loss(
    affinity: Tensor,
    background: Tensor,
    foreground: Tensor,
    negative: Tensor,
    sum_over_shards: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> dict[str, Tensor]:
    """Cross entropy, averaged over each kind of pairs in the whole batch (eq. 6 to 9).

    The four tensors are B x offsets x sources, the kinds bool. Returns the scalars ``loss``,
    ``bg``, ``fg``, ``neg``; loss = bg / 4 + fg / 4 + neg / 2. If the B images are one shard of the
    batch, ``sum_over_shards`` maps the shard's counts of pairs (int64 [3]) to the whole batch's;
    the scalars of all shards then sum to those of the whole batch.
    """
    kinds = (background, foreground, negative)
    counts = sum_over_shards(torch.stack([kind.sum() for kind in kinds]))
    alike = -torch.log(affinity + EPSILON)
    unlike = -torch.log(1 + EPSILON - affinity)
    bg, fg, neg = (
        (kind.to(values.dtype) * values).sum() / (count.to(values.dtype) + EPSILON)
        for kind, values, count in zip(kinds, (alike, alike, unlike), counts, strict=True)
    )
    return {"loss": bg / 4 + fg / 4 + neg / 2, "bg": bg, "fg": fg, "neg": neg}


def affinity_label(low_alpha_scores: Tensor, high_alpha_scores: Tensor, stride: int) -> Tensor:
    """Confident labels of one image's cells, from CRF scores with two alphas (Sec. 3.2.1).

    Both scores are float maps x H x W, the background first, and are mean-pooled by ``stride``.
    A cell is void if all its scores are below 1e-5; else background if the high-alpha argmax is;
    else the low-alpha argmax if that is a class; else void. Returns uint8 H/stride x W/stride of
    *local* indices (0 background, k the k-th map), 255 void.
    """
    low = F.avg_pool2d(low_alpha_scores[None], stride)[0]
    high = F.avg_pool2d(high_alpha_scores[None], stride)[0]
    label = low.argmax(dim=0)
    label[label == 0] = VOID
    label[high.argmax(dim=0) == 0] = 0
    label[torch.cat([low, high]).amax(dim=0) < 1e-5] = VOID
    return label.to(torch.uint8)
