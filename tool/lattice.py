"""Gaussian filtering on the permutohedral lattice.

A. Adams, J. Baek and M. A. Davis, *Fast High-Dimensional Filtering Using the Permutohedral
Lattice*, Eurographics 2010. A pixel with d features lies in a simplex of the lattice. Its value is
distributed over the simplex' d + 1 vertices (splat), the lattice points exchange values with their
neighbours along d + 1 axes (blur), and the pixel interpolates between its vertices (slice). All
three are sparse matrices that depend on the features alone: the lattice is built once, and filters
any number of values together.

A pixel's simplex is the one that pydensecrf finds, to the last bit of float32, ties included: in a
flat area one bit moves thousands of pixels.
"""

import math
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Simplices are computed for this many pixels at a time: to fit in a CPU's cache, and in a GPU's
# memory (300 bytes each), where each part costs the time of launching its kernels.
PIXELS_IN_CACHE, PIXELS_ON_GPU = 2**16, 2**21
# A GPU splats this many values at a time: 512 MB.
VALUES_SPLAT = 2**27


class SparseRows(NamedTuple):
    """A sparse matrix by rows (CSR): row i has the entries offsets[i] to offsets[i + 1] - 1."""

    columns: Tensor  # int32
    weights: Tensor  # float32
    offsets: Tensor  # int32

    def __matmul__(self, values: Tensor) -> Tensor:
        """float32 columns x C -> rows x C."""
        # Mode 0 sums. Twice as fast as torch.sparse on a CPU, without MKL.
        columns, weights, offsets = self
        return torch.embedding_bag(
            values, columns, offsets, mode=0, per_sample_weights=weights, include_last_offset=True
        )[0]


class GaussianFilter:
    """D^-1/2 K D^-1/2, where K is the Gaussian kernel of pixels' features and D = diag(K 1).

    ``features`` is float32 d x N, in units of the kernel's standard deviation. Raises ValueError
    if they span more lattice points than an int64 can number.
    """

    def __init__(self, features: Tensor):
        dimension, pixels = features.shape
        # pydensecrf pads the pixels to a multiple of 4 with zero features. The vertices of the
        # padding's simplex become lattice points, too, and take part in the blur.
        padded = F.pad(features, (0, -pixels % 4))
        simplices, weights, strides = _enclosing_simplices(padded)
        keys, vertices = _lattice_points(simplices, strides)
        self._points = len(keys)
        offsets = _row_offsets(pixels, dimension + 1, features.device)
        self._slice = SparseRows(vertices[:pixels].flatten(), weights[:pixels].flatten(), offsets)
        # A lattice point has a few pixels or thousands: a GPU does better with atomic additions.
        self._splat = None if features.is_cuda else _transposed(self._slice, self._points + 1)
        self._blurs = _blurs(keys, strides)

        # So far, this filter is K. The weights on both of its sides are multiplied by D^-1/2, which
        # 1e-20 keeps finite (pydensecrf).
        kernel_sums = self(weights.new_ones(pixels, 1))[:, 0]
        norm = (kernel_sums.double() + 1e-20).rsqrt_().float()
        self._slice.weights.view(pixels, -1).mul_(norm[:, None])
        if self._splat is not None:
            self._splat.weights.mul_(norm.index_select(0, self._splat.columns))

    def __call__(self, values: Tensor) -> Tensor:
        """float32 N x C, contiguous -> N x C."""
        return self.read(self.spread(values), 0, len(values))

    def spread(self, values: Tensor) -> Tensor:
        """Splat and blur: float32 N x C, contiguous -> points x C, for ``read``."""
        points = self._splat_by_atomics(values) if self._splat is None else self._splat @ values
        for blur in self._blurs:
            points = blur @ points
        return points

    def read(self, points: Tensor, start: int, stop: int) -> Tensor:
        """Slice: the filtered values of pixels start to stop - 1, (stop - start) x C."""
        columns, weights, offsets = self._slice
        vertices = len(self._blurs)
        entries = slice(start * vertices, stop * vertices)
        return SparseRows(columns[entries], weights[entries], offsets[: stop - start + 1]) @ points

    def _splat_by_atomics(self, values: Tensor) -> Tensor:
        """``self._splat @ values``, by atomic additions."""
        pixels, channels = values.shape
        weights = self._slice.weights.view(pixels, -1, 1)
        columns = self._slice.columns.view(pixels, -1)
        points = values.new_zeros(self._points + 1, channels)
        pixels_at_once = max(1, VALUES_SPLAT // (channels * weights.shape[1]))
        for start in range(0, pixels, pixels_at_once):
            part = slice(start, start + pixels_at_once)
            added = weights[part] * values[part, None]
            points.index_add_(0, columns[part].flatten(), added.flatten(0, 1))
        return points


def _enclosing_simplices(features: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The simplex of each pixel, and the pixel's barycentric weights in it.

    Returns the simplices' numbers, int64 N; the weights, float32 N x (d + 1), ordered by the
    vertices' remainders; and the strides. A lattice point's *key* is the sum of strides[i] times
    its i-th coordinate minus the lowest one; the last coordinate follows from the others: stride 0.
    A simplex' number packs its vertex of remainder 0 and its order of coordinates.
    """
    dimension, pixels = features.shape
    lowest, spans = _bounds(features)
    if math.prod(spans) * (dimension + 1) ** dimension >= 2**63:
        raise ValueError(f"features span {spans} lattice cells, too many to number")
    strides = [math.prod(spans[i + 1 :]) for i in range(dimension)] + [0]
    simplices = features.new_zeros(pixels, dtype=torch.int64)
    weights = features.new_empty(pixels, dimension + 1)
    pixels_at_once = PIXELS_ON_GPU if features.is_cuda else PIXELS_IN_CACHE
    for start in range(0, pixels, pixels_at_once):
        part = slice(start, start + pixels_at_once)
        origins, ranks, barycentric = _locate(_elevated(features[:, part]))
        weights[part] = barycentric.t()
        numbers = simplices[part]
        for origin, low, stride in zip(origins[:-1], lowest, strides, strict=False):
            numbers += (origin - low).long() * stride
        for rank in ranks[:-1]:
            numbers.mul_(dimension + 1).add_(rank)
    return simplices, weights, strides


def _bounds(features: Tensor) -> tuple[list[int], list[int]]:
    """Lowest value and span of each coordinate, over the pixels' vertices and their neighbours."""
    dimension = len(features)
    low, high = features.aminmax(dim=1)
    elevation = _elevated(torch.eye(dimension, device=features.device))[:-1]
    rising, falling = elevation.clamp(min=0), elevation.clamp(max=0)
    # No matrix product: --tf32 would round it.
    lower, upper = rising * low + falling * high, rising * high + falling * low
    bounds = torch.stack([lower.sum(dim=1), upper.sum(dim=1)], dim=1)
    # An origin is at most 3/2 (d + 1) from its pixel, a vertex d from the origin, and its
    # neighbours d further.
    margin = 4 * (dimension + 1)
    bounds = bounds.round().long() + torch.tensor([-margin, margin], device=bounds.device)
    lowest, highest = bounds.t().tolist()
    return lowest, [last - first + 1 for first, last in zip(lowest, highest, strict=True)]


def _float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def _elevated(features: Tensor) -> Tensor:
    """Features on the plane of d + 1 coordinates that sum to zero (p. 5): d x N -> (d + 1) x N."""
    dimension = len(features)
    # Standard deviation 1 in the features, with the blur's own deviation included (p. 6).
    deviation = _float32(math.sqrt(2 / 3) * (dimension + 1))
    elevated = features.new_empty(dimension + 1, features.shape[1])
    total = torch.zeros_like(features[0])
    for i in range(dimension, 0, -1):
        scaled = features[i - 1] * _float32(1 / math.sqrt((i + 1) * i) * deviation)
        torch.sub(total, scaled * i, out=elevated[i])
        total += scaled
    elevated[0] = total
    return elevated


def _locate(elevated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex of each pixel, and the pixel's position in it (p. 5, p. 10).

    Returns three tensors (d + 1) x N: the simplex' vertex of remainder 0, float32, multiples of
    d + 1; the rank of each coordinate's distance from it, int8, 0 the largest; and the barycentric
    weight of the vertex of each remainder, float32.
    """
    dimension = len(elevated) - 1
    inverse = _float32(1 / (dimension + 1))
    origins = (elevated * inverse).round_()
    excess = origins.sum(dim=0).to(torch.int8)
    origins *= dimension + 1
    distances = elevated - origins
    ranks = torch.arange(dimension + 1, dtype=torch.int8, device=elevated.device)[:, None] + excess
    for i, j in combinations(range(dimension + 1), 2):
        less = (distances[i] < distances[j]).view(torch.int8)
        ranks[i] += less
        ranks[j] -= less
    # Coordinates that were rounded too far are shifted, so that the sum is zero again.
    shift = (ranks < 0).to(torch.int8) - (ranks > dimension).to(torch.int8)
    shift *= dimension + 1
    ranks += shift
    origins += shift

    distances = (elevated - origins) * inverse
    ascending = torch.empty_like(distances).scatter_(0, dimension - ranks.long(), distances)
    weights = torch.empty_like(ascending)
    torch.sub(ascending[1:], ascending[:-1], out=weights[1:])
    torch.add(ascending[0], 1 - ascending[-1], out=weights[0])
    return origins, ranks, weights


def _lattice_points(simplices: Tensor, strides: list[int]) -> tuple[Tensor, Tensor]:
    """The lattice points that are a vertex of some simplex.

    Returns their ascending keys, int64; and each pixel's vertices as indices into them, ordered by
    remainder, int32 N x (d + 1).
    """
    # Many pixels share a simplex.
    simplices, simplex_of_pixel = torch.unique(simplices, return_inverse=True)
    keys, vertices = torch.unique(_vertex_keys(simplices, strides), return_inverse=True)
    vertices = vertices.t().to(torch.int32, memory_format=torch.contiguous_format)
    return keys, vertices.index_select(0, simplex_of_pixel)


def _vertex_keys(simplices: Tensor, strides: list[int]) -> Tensor:
    """Keys of the simplices' vertices, int64 (d + 1) x simplices, ordered by remainder."""
    dimension = len(strides) - 1
    # From one remainder to the next, one coordinate decreases by d and all others increase by 1;
    # the coordinate of the smallest distance comes first.
    steps = simplices.new_full((dimension + 1, len(simplices)), sum(strides))
    keys = simplices
    for i in reversed(range(dimension)):
        remaining = keys // (dimension + 1)
        rank = keys - remaining * (dimension + 1)
        steps.scatter_(0, (dimension - rank)[None], sum(strides) - (dimension + 1) * strides[i])
        keys = remaining
    return torch.cat([keys[None], steps[:-1]]).cumsum_(0)


def _blurs(keys: Tensor, strides: list[int]) -> list[SparseRows]:
    """The blur along each axis: a point plus half of its two neighbours.

    A missing neighbour has the index after the last point; its value is zero.
    """
    points = len(keys)
    numbers = torch.arange(points + 1, dtype=torch.int32, device=keys.device)
    weights = torch.tensor([1, 0.5, 0.5], device=keys.device).repeat(points + 1)
    offsets = _row_offsets(points + 1, 3, keys.device)
    blurs = []
    for stride in strides:
        # Along an axis, its coordinate changes by d and every other by -1.
        wanted = keys + len(strides) * stride - sum(strides)
        found = torch.searchsorted(keys, wanted, out_int32=True).clamp_(max=points - 1)
        found = torch.where(keys[found] == wanted, found, points)
        columns = torch.full((points + 1, 3), points, dtype=torch.int32, device=keys.device)
        columns[:, 0] = numbers
        columns[:-1, 1] = found
        columns[:, 2].scatter_(0, found.long(), numbers[:-1])
        columns[-1] = points
        blurs.append(SparseRows(columns.view(-1), weights, offsets))
    # The kernel's factor (p. 10). The norm cancels it, but long float32 sums round as in pydensecrf
    # only at the same scale.
    blurs[-1] = blurs[-1]._replace(weights=weights / (1 + 2.0 ** (1 - len(strides))))
    return blurs


def _transposed(matrix: SparseRows, columns: int) -> SparseRows:
    """The transpose of a matrix with that many columns and equally many entries in each row."""
    entries_per_row = len(matrix.columns) // (len(matrix.offsets) - 1)
    # Stable: each sum runs over the pixels in their order, as pydensecrf's does.
    rows, order = torch.sort(matrix.columns, stable=True)
    starts = torch.arange(columns + 1, dtype=torch.int32, device=rows.device)
    offsets = torch.searchsorted(rows, starts, out_int32=True)
    weights = matrix.weights.index_select(0, order)
    return SparseRows((order // entries_per_row).int(), weights, offsets)


def _row_offsets(rows: int, entries: int, device: torch.device) -> Tensor:
    return torch.arange(0, rows * entries + 1, entries, dtype=torch.int32, device=device)
