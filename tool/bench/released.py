"""The comparisons with what the released code does: two ways to compute the same tensors."""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tool.affinity import pair_affinity, pair_indices, pair_offsets, source_grid
from tool.crf import background_and_maps, dense_crf
from tool.random_walk import propagate, transition_matrix
from tool.run.devices import wait_for

# The released code's radius, exponent of the affinities, and number of squarings.
RADIUS, BETA, LOGT = 5, 8, 8
ALPHAS = (4, 32)  # its exponents of the background

# Ways to compute the same tensors on inputs that are ready: "baseline", "ours", and "exact" where
# the baseline's rounding would hide the difference.
Sides = dict[str, Callable[[], Sequence[Tensor]]]


def random_walk(args: argparse.Namespace, device: torch.device) -> Sides:
    """Stage 4 after the network: affinities of a grid's cells, maps -> walked maps.

    The baseline fills a dense N x N matrix and squares it 8 times.
    """
    height, width = args.height, args.width
    rows, columns = source_grid(height, width, RADIUS)
    pairs = (len(pair_offsets(RADIUS)), rows * columns)
    # Affinities of trained networks lie all over 0..1.
    affinities = torch.rand(pairs).to(device)
    maps = torch.rand(args.maps, height, width).to(device)

    def baseline() -> list[Tensor]:
        sources, targets = (cells.to(device) for cells in pair_indices(height, width, RADIUS))
        matrix = torch.eye(height * width, device=device)
        matrix[sources.expand_as(targets), targets] = affinities
        matrix[targets, sources.expand_as(targets)] = affinities
        matrix = matrix**BETA
        matrix /= matrix.sum(dim=0)
        for _ in range(LOGT):
            matrix = matrix @ matrix
        return [(maps.flatten(1) @ matrix).view_as(maps)]

    def ours() -> list[Tensor]:
        matrix = transition_matrix(affinities, height, width, RADIUS, BETA)
        return [propagate(maps, matrix, 2**LOGT)]

    def exact() -> list[Tensor]:
        matrix = transition_matrix(affinities.double(), height, width, RADIUS, BETA)
        return [propagate(maps, matrix, 2**LOGT, tolerance=0)]

    return {"baseline": baseline, "ours": ours, "exact": exact}


def affinity(args: argparse.Namespace, device: torch.device) -> Sides:
    """AffinityNet's head: features -> pair affinities, and the gradient of a weighted sum of them.

    The baseline gathers the features of both cells of every pair.
    """
    features = torch.randn(args.batch, args.channels, args.height, args.width).to(device)
    features.requires_grad_()
    rows, columns = source_grid(args.height, args.width, RADIUS)
    weights = torch.rand(args.batch, len(pair_offsets(RADIUS)), rows * columns).to(device)
    sources, targets = (cells.to(device) for cells in pair_indices(args.height, args.width, RADIUS))

    def gather(features: Tensor) -> Tensor:
        cells = features.flatten(2)
        source = cells.index_select(2, sources).unsqueeze(2)
        target = cells.index_select(2, targets.flatten()).unflatten(2, targets.shape)
        return torch.exp(-(target - source).abs().mean(dim=1))

    def with_gradient(head: Callable[[Tensor], Tensor]) -> list[Tensor]:
        affinities = head(features)
        (gradient,) = torch.autograd.grad((affinities * weights).sum(), features)
        return [affinities.detach(), gradient]

    return {
        "baseline": lambda: with_gradient(gather),
        "ours": lambda: with_gradient(lambda features: pair_affinity(features, RADIUS)),
    }


def crf(args: argparse.Namespace, device: torch.device) -> Sides:
    """The dense CRF of one image with two alphas: labels' scores -> probabilities.

    The baseline is pydensecrf, which takes one core and one alpha after the other.
    """
    image = photograph_like(args.height, args.width)
    maps = _noise(args.labels - 1, 64, args.height, args.width).sigmoid().numpy()
    score_sets = [background_and_maps(maps, alpha) for alpha in ALPHAS]

    def probabilities(backend: str) -> list[Tensor]:
        results = dense_crf(image, score_sets, backend=backend, device=device)
        return [torch.from_numpy(result) for result in results]

    return {
        "baseline": lambda: probabilities("pydensecrf"),
        "ours": lambda: probabilities("torch"),
    }


def photograph_like(height: int, width: int) -> np.ndarray:
    """Gray and coloured noise of all scales: uint8 height x width x 3.

    The amplitudes grow with the scale's root. So an image of 500 x 375 has 0.07 points of the CRF's
    colour lattice a pixel, which is the median of VOC 2012's photographs.
    """
    image = torch.full((3, height, width), 128.0)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        gray, colour = _noise(4, scale, height, width).split([1, 3])
        image += (scale / 128) ** 0.5 * (40 * gray + 12 * colour)
    return image.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _noise(channels: int, scale: int, height: int, width: int) -> Tensor:
    """Normal noise that changes over ``scale`` pixels: channels x H x W."""
    coarse = torch.randn(1, channels, height // scale + 2, width // scale + 2)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]


def compare(sides: Sides, repeats: int, device: torch.device) -> dict[str, float]:
    """Times of both sides, in turns after a first run each, and the difference of their results."""
    results, times = {}, {"baseline": [], "ours": []}
    for _ in range(1 + repeats):
        for side, seconds in times.items():
            start = time.perf_counter()
            results[side] = sides[side]()
            wait_for(device)
            seconds.append(time.perf_counter() - start)
    figures = {f"{side}_s": statistics.median(seconds[1:]) for side, seconds in times.items()}
    figures["speedup"] = figures["baseline_s"] / figures["ours_s"]
    expected = sides["exact"]() if "exact" in sides else results["baseline"]
    figures["max_rel_diff"] = largest_difference(results["ours"], expected)
    figures["baseline_max_rel_diff"] = largest_difference(results["baseline"], expected)
    return figures


def largest_difference(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the largest value of the expected tensor."""
    pairs = zip(tensors, expected, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def peak_megabytes(run: Callable[[], object], device: torch.device) -> float:
    """By how much a call raises the peak memory of this process, or of its CUDA device."""

    def peak() -> float:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        status = Path("/proc/self/status").read_text()  # getrusage's figure is the parent's, too
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**10

    before = peak()
    run()
    return peak() - before
