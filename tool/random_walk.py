"""The random walk that propagates class maps along affinities (Sec. 3.3, eq. 10 and 11).

The released code raises a dense N x N matrix T to the 2^logt-th power. Only the product of that
power with a few maps is needed, so T stays sparse (at most 1 + 2 * offsets entries per column), and
the power takes far fewer products than its exponent: T is similar to a symmetric matrix with
eigenvalues in [-1, 1], where a short series of Chebyshev polynomials approximates x^n to any
accuracy (Sachdeva and Vishnoi, "Faster algorithms via approximation theory", 2014, theorem 3.3).

All is computed in float64. In float32, the rounding of T's entries, the same in every step, adds up
over 256 steps to a few 1e-5, also in the dense form; float64 is no slower here.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tool.affinity import pair_offsets, source_grid

# Only products of CSR matrices and vectors are used, and no invariant needs a check (PyTorch 2.11
# warns although that is said).
warnings.filterwarnings("ignore", message="Sparse (CSR|CSC) tensor support is in beta")
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")

# The part of the series' coefficients that may be left out (they sum to one); 256 steps then take
# 90 products. It bounds the error in the norm in which T is symmetric; the error of a single score,
# relative to the largest, is up to about 20 times as much.
TOLERANCE = 1e-8


def background_map(maps: Tensor, alpha: float) -> Tensor:
    """(1 - the largest class score)^alpha, eq. (2): maps K x H x W -> H x W; ones if K = 0.

    Scores above 1, from rounding, are clamped: the base must not be negative.
    """
    if maps.shape[0] == 0:
        return maps.new_ones(maps.shape[1:])
    return (1 - maps.amax(dim=0)).clamp_(min=0) ** alpha


def transition_matrix(
    affinity: Tensor, height: int, width: int, radius: int, beta: float, full_graph: bool = False
) -> Tensor:
    """T of eq. (10), sparse: affinities to the power beta, each column divided by its sum.

    ``affinity`` is offsets x sources, as ``tool.affinity.pair_affinity`` returns it with the same
    ``full_graph``. A pair counts in both directions, and every cell has affinity 1 with itself.
    Returns N x N with N = height * width, CSC, float64, on the affinity's device.
    """
    offsets = pair_offsets(radius)
    weights = affinity.double() ** beta
    if not full_graph:
        rows, columns = source_grid(height, width, radius)
        left = min(radius - 1, width)
        margins = (left, width - columns - left, 0, height - rows)
        weights = F.pad(weights.view(len(offsets), rows, columns), margins)
    return _column_stochastic(weights.view(len(offsets), height, width), offsets)


def _column_stochastic(weights: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
    """Symmetric weights, offsets x h x w at each pair's source, zero where there is no pair -> T.

    Entries are built as cells x neighbours, both in row-major order: CSC needs no sorting then.
    """
    height, width = weights.shape[-2:]
    device = weights.device
    cells = torch.arange(height * width, device=device)
    dy, dx = torch.tensor(offsets, device=device, dtype=torch.long).view(-1, 2, 1).unbind(1)
    shift = dy * width + dx
    # The weight of a pair that ends in a cell is stored at its source, one offset before.
    row, column = cells // width - dy, cells % width - dx
    starts_on_grid = (row >= 0) & (column >= 0) & (column < width)
    forward = weights.flatten(1)
    backward = forward.gather(1, (cells - shift).clamp(0, len(cells) - 1)) * starts_on_grid

    itself = forward.new_ones(1, len(cells))
    entries = torch.cat([backward.flip(0), itself, forward]).t()
    neighbours = cells + torch.cat([-shift.flip(0), torch.zeros_like(shift[:1]), shift])
    present = entries != 0
    ends = F.pad(present.sum(dim=1).cumsum(0), (1, 0))
    entries = entries / entries.sum(dim=1, keepdim=True)
    # The sparse libraries compute with int32 indices and would convert others in every product.
    return _square_csc(ends.int(), neighbours.t()[present].int(), entries[present])


def _square_csc(ends: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
    size = (len(ends) - 1, len(ends) - 1)
    return torch.sparse_csc_tensor(ends, rows, entries, size, check_invariants=False)


def chebyshev_coefficients(steps: int, tolerance: float) -> list[float]:
    """c_0, c_1, ... with x^steps = sum of c_k T_k(x) on [-1, 1], up to ``tolerance``.

    The coefficients of x^n are 2^(1-n) binomial(n, (n-k)/2) for k of n's parity, half of that for
    k = 0, and zero otherwise. They are positive and sum to one, so the sum of those left out
    bounds the error; those kept are scaled to sum to one again.
    """
    degrees = np.arange(steps % 2, steps + 1, 2)
    # Each coefficient by the one before. Products from the middle binomial on do not overflow.
    ratios = (steps - degrees[:-1]) / (steps + degrees[:-1] + 2)
    kept = np.concatenate([[1.0], np.cumprod(ratios)])
    if steps % 2 == 0:
        kept[0] /= 2
    kept /= kept.sum()
    left_out = np.cumsum(kept[::-1])[::-1]
    kept = kept[: max(1, np.count_nonzero(left_out > tolerance))]
    coefficients = np.zeros(degrees[len(kept) - 1] + 1)
    coefficients[degrees[: len(kept)]] = kept / kept.sum()
    return coefficients.tolist()


def propagate(maps: Tensor, transition: Tensor, steps: int, tolerance: float = TOLERANCE) -> Tensor:
    """M T^steps: each map (a row of M) after that many steps of the walk, eq. (11).

    ``maps`` is K x h x w with h * w = N, ``transition`` is N x N; returns K x h x w, float64.
    ``tolerance`` is that of ``chebyshev_coefficients``; 0 computes every step.
    """
    return propagate_together([maps], [transition], steps, tolerance)[0]


def propagate_together(
    map_sets: list[Tensor], transitions: list[Tensor], steps: int, tolerance: float = TOLERANCE
) -> list[Tensor]:
    """``propagate`` for images of any sizes as one system: small products are slow on CUDA."""
    columns = max(len(maps) for maps in map_sets)
    vectors = [F.pad(maps.flatten(1).t(), (0, columns - len(maps))) for maps in map_sets]
    # A step replaces each cell by a weighted mean: the rows of the transpose sum to one.
    averaging = _block_diagonal(transitions).t()
    (walked,) = _powers(averaging, torch.cat(vectors).to(averaging.dtype), [steps], tolerance)
    parts = walked.split([len(part) for part in vectors])
    return [
        part[:, : len(maps)].t().reshape(maps.shape)
        for part, maps in zip(parts, map_sets, strict=True)
    ]


def _block_diagonal(matrices: list[Tensor]) -> Tensor:
    """CSC matrices -> the CSC matrix with these on its diagonal."""
    if len(matrices) == 1:
        return matrices[0]
    ends, rows, entries, first_cell = [matrices[0].ccol_indices()[:1]], [], [], 0
    for matrix in matrices:
        ends.append(matrix.ccol_indices()[1:] + sum(len(part) for part in entries))
        rows.append(matrix.row_indices() + first_cell)
        entries.append(matrix.values())
        first_cell += len(matrix)
    return _square_csc(torch.cat(ends), torch.cat(rows), torch.cat(entries))


def propagate_to(
    maps: Tensor, transition: Tensor, step_counts: Sequence[int], tolerance: float = TOLERANCE
) -> list[Tensor]:
    """``propagate`` for each number of steps, from the products that the largest one takes."""
    vectors = maps.flatten(1).t().to(transition.dtype)
    walked = _powers(transition.t(), vectors, step_counts, tolerance)
    return [scores.t().reshape(maps.shape) for scores in walked]


def _powers(
    matrix: Tensor, vectors: Tensor, exponents: Sequence[int], tolerance: float
) -> list[Tensor]:
    """matrix^n @ vectors, N x K, for each exponent n."""
    if tolerance == 0:
        results = {0: vectors}
        for steps in range(max(exponents)):
            vectors = matrix @ vectors
            if steps + 1 in exponents:
                results[steps + 1] = vectors
        return [results[steps] for steps in exponents]
    series = [chebyshev_coefficients(steps, tolerance) for steps in exponents]
    results = [coefficients[0] * vectors for coefficients in series]
    # T_0(x) = 1, T_1(x) = x, T_(k+1)(x) = 2 x T_k(x) - T_(k-1)(x)
    previous, current = vectors, matrix @ vectors
    for degree in range(1, max(map(len, series))):
        if degree > 1:
            previous, current = current, torch.addmm(previous, matrix, current, beta=-1, alpha=2)
        for result, coefficients in zip(results, series, strict=True):
            if degree < len(coefficients) and coefficients[degree]:
                result.add_(current, alpha=coefficients[degree])
    return results


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """... x H x W, padded with zeros on the right and bottom to multiples of ``multiple``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


def walk_trace(seeds: Tensor, transition: Tensor, logt: int) -> dict[int, Tensor]:
    """{steps: scores, of the seeds' shape K x h x w} after 0, 1, 2, 4, ... 2^logt steps."""
    counts = [2**power for power in range(logt + 1)]
    return {0: seeds} | dict(zip(counts, propagate_to(seeds, transition, counts), strict=True))


def walk_seeds(
    maps: Tensor, background: float | Sequence[float], stride: int, kind: str = "alpha"
) -> Tensor:
    """The walk's initial scores: backgrounds and class maps, pooled to the feature grid.

    ``background`` is eq. (2)'s exponent, or with the ``kind`` "bg" a constant score; several give a
    map each, for walks that go together. ``maps`` is K x H x W; returns (backgrounds + K) x
    ceil(H/stride) x ceil(W/stride), the backgrounds first.
    """
    values = np.atleast_1d(background).tolist()
    if kind == "bg":
        backgrounds = [maps.new_full(maps.shape[1:], value) for value in values]
    else:
        backgrounds = [background_map(maps, value) for value in values]
    scores = torch.cat([torch.stack(backgrounds), maps])
    # The background map is padded with zeros, too (released code).
    return F.avg_pool2d(pad_to_multiple(scores, stride)[None], stride)[0]


def upsample_scores(scores: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Scores on the grid, K x h x w -> float32 K x H x W, with (H, W) = ``size``; bilinear."""
    upsampled = F.interpolate(scores.float()[None], scale_factor=stride, mode="bilinear")[0]
    return upsampled[:, : size[0], : size[1]]
