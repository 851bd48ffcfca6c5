"""The random walk that spreads class maps along affinities (Sec. 3.3 of the paper, eq. 10 and 11).

The released code raises a dense N x N matrix to its 2^logt-th power. Only its product with a few
maps is wanted, and each column has at most 1 + 2 * offsets entries: so the matrix is kept sparse
and the maps take 2^logt steps, which costs N instead of N^3.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from tool.affinity import pair_indices

# Products of CSR matrices and vectors are all that is used of what PyTorch calls a beta state.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def background_map(maps: Tensor, alpha: float) -> Tensor:
    """(1 - the largest class score)^alpha, eq. (2): maps K x H x W -> H x W; ones where K = 0."""
    if maps.shape[0] == 0:
        return maps.new_ones(maps.shape[1:])
    return (1 - maps.amax(dim=0)) ** alpha


def transition_matrix(
    affinity: Tensor, height: int, width: int, radius: int, beta: float
) -> Tensor:
    """T of eq. (10), sparse: affinities to the power beta, each column divided by its sum.

    ``affinity`` is offsets x sources, of the pairs on a height x width grid; a pair counts in both
    directions and every cell has affinity 1 with itself. Cells that are in no pair keep only
    that. Returns N x N with N = height * width, CSR, on the affinity's device and of its dtype.
    """
    cells = height * width
    sources, targets = (index.to(affinity.device) for index in pair_indices(height, width, radius))
    sources = sources.expand_as(targets).reshape(-1)
    targets = targets.reshape(-1)
    diagonal = torch.arange(cells, device=affinity.device)
    weight = affinity.reshape(-1) ** beta

    rows = torch.cat([sources, targets, diagonal])
    columns = torch.cat([targets, sources, diagonal])
    values = torch.cat([weight, weight, weight.new_ones(cells)])
    column_sums = values.new_zeros(cells).index_add_(0, columns, values)
    entries = torch.sparse_coo_tensor(
        torch.stack([rows, columns]),
        values / column_sums[columns],
        (cells, cells),
        check_invariants=False,
    )
    return entries.coalesce().to_sparse_csr()


def propagate(maps: Tensor, transition: Tensor, steps: int) -> Tensor:
    """M T^steps: each map (a row of M) after that many steps of the walk, eq. (11).

    ``maps`` is K x h x w with h * w = N, ``transition`` is N x N; returns K x h x w.
    """
    transposed = transition.to_sparse_coo().t().coalesce().to_sparse_csr()
    vectors = maps.flatten(1).t().contiguous()
    for _ in range(steps):
        vectors = transposed @ vectors
    return vectors.t().reshape(maps.shape)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """... x H x W padded right and bottom with zeros so that both sides divide by ``multiple``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


def random_walk_label(
    maps: Tensor, transition: Tensor, alpha: float, steps: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Stage 4 after the network: class maps -> background, pooled, walked, upsampled, argmax.

    ``maps`` is K x H x W, float32, the classes that are present, in order. Returns the label, uint8
    H x W of *local* indices (0 background, k the k-th map), and the scores on the grid,
    (K + 1) x ceil(H/stride) x ceil(W/stride).
    """
    height, width = maps.shape[-2:]
    scores = torch.cat([background_map(maps, alpha)[None], maps])
    # Zeros are padded behind the background map, too, as the released code does.
    scores = F.avg_pool2d(pad_to_multiple(scores, stride)[None], stride)[0]
    scores = propagate(scores.to(transition.dtype), transition, steps)
    upsampled = F.interpolate(
        scores[None], scale_factor=stride, mode="bilinear", align_corners=False
    )[0]
    return upsampled.argmax(dim=0)[:height, :width].to(torch.uint8), scores
