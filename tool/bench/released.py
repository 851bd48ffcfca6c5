"""The comparisons with what the released code does: two ways to compute the same tensors."""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tool.affinity import pair_affinity, pair_indices, pair_offsets, source_grid
from tool.crf import background_and_maps, dense_crf
from tool.random_walk import propagate, transition_matrix
from tool.run.devices import wait_for

# The released code's radius, exponent of the affinities, number of squarings, and exponents of the
# background.
RADIUS, BETA, LOGT = 5, 8, 8
LOW_ALPHA, HIGH_ALPHA = 4, 32


@dataclass
class Contest:
    """Two ways to compute the same tensors on inputs that are ready.

    ``baseline`` may do only a part of the work where all of it would take too long: then
    ``baseline_parts`` says how many such parts there are. ``reference`` gives the exact tensors
    where the baseline's are not exact enough to compare with.
    """

    baseline: Callable[[], Sequence[Tensor]]
    ours: Callable[[], Sequence[Tensor]]
    baseline_parts: int = 1
    reference: Callable[[], Sequence[Tensor]] | None = None


def random_walk(args: argparse.Namespace, device: torch.device) -> Contest:
    """Affinities of a grid and maps -> walked maps, with the building of the transition matrix.

    The baseline fills a dense N x N matrix and squares it 8 times.
    """
    height, width = args.height, args.width
    rows, columns = source_grid(height, width, RADIUS)
    pairs = (len(pair_offsets(RADIUS)), rows * columns)
    # Affinities of trained networks lie all over 0..1.
    affinities = torch.rand(pairs).to(device)
    maps = torch.rand(args.maps, height, width).to(device)

    def dense_transition() -> Tensor:
        sources, targets = (cells.to(device) for cells in pair_indices(height, width, RADIUS))
        matrix = torch.eye(height * width, device=device)
        matrix[sources.expand_as(targets), targets] = affinities
        matrix[targets, sources.expand_as(targets)] = affinities
        matrix = matrix**BETA
        return matrix / matrix.sum(dim=0)

    def baseline() -> list[Tensor]:
        matrix = dense_transition()
        for _ in range(LOGT):
            matrix = matrix @ matrix
        return [(maps.flatten(1) @ matrix).view_as(maps)]

    def ours() -> list[Tensor]:
        matrix = transition_matrix(affinities, height, width, RADIUS, BETA)
        return [propagate(maps, matrix, 2**LOGT)]

    def exact() -> list[Tensor]:
        matrix = transition_matrix(affinities.double(), height, width, RADIUS, BETA)
        return [propagate(maps, matrix, 2**LOGT, tolerance=0)]

    if not args.estimate_baseline:
        return Contest(baseline, ours, reference=exact)

    # Built in the untimed first run: the other side's memory must not hold it.
    matrix = cache(dense_transition)
    return Contest(lambda: [matrix() @ matrix()], ours, LOGT, exact)


def affinity(args: argparse.Namespace, device: torch.device) -> Contest:
    """Features -> pair affinities, and the gradient of a weighted sum of them.

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

    return Contest(
        lambda: with_gradient(gather),
        lambda: with_gradient(lambda features: pair_affinity(features, RADIUS)),
    )


def crf(args: argparse.Namespace, device: torch.device) -> Contest:
    """A photograph-like image and two sets of scores -> label probabilities, filters and all.

    The baseline is pydensecrf, which takes one core and the sets one after the other.
    """
    size = (args.height, args.width)
    image = photograph_like(*size)
    maps = _noise(args.labels, 64, size)[1:].sigmoid().numpy()
    score_sets = [background_and_maps(maps, alpha) for alpha in (LOW_ALPHA, HIGH_ALPHA)]

    def probabilities(backend: str) -> list[Tensor]:
        results = dense_crf(image, score_sets, backend=backend, device=device)
        return [torch.from_numpy(result) for result in results]

    return Contest(lambda: probabilities("pydensecrf"), lambda: probabilities("torch"))


def photograph_like(height: int, width: int) -> np.ndarray:
    """Gray and coloured noise of all scales: uint8 height x width x 3.

    The amplitudes grow with the scale's root. So an image of 500 x 375 has 0.07 points of the CRF's
    colour lattice a pixel, which is the median of VOC 2012's photographs.
    """
    image = torch.full((3, height, width), 128.0)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        amplitude = (scale / 128) ** 0.5
        gray, colour = _noise(4, scale, (height, width)).split([1, 3])
        image += amplitude * (40 * gray + 12 * colour)
    return image.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _noise(channels: int, scale: int, size: tuple[int, int]) -> Tensor:
    """Normal noise that changes over ``scale`` pixels: channels x H x W."""
    grid = [side // scale + 2 for side in size]
    coarse = torch.randn(1, channels, *grid)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)[0]


def compare(contest: Contest, repeats: int, device: torch.device) -> dict[str, float]:
    """Times in seconds, peak memory in MB and difference of the command's two sides."""
    if contest.baseline_parts > 1:
        print(f"the baseline is estimated: one of {contest.baseline_parts} equal parts is run")
    figures = measure(contest, repeats, device)
    peaks = {f"{side}_peak_mb": peak_in_child(side) for side in ("baseline", "ours")}
    return figures | peaks


def measure(contest: Contest, repeats: int, device: torch.device) -> dict[str, float]:
    """Times of both sides, in turns after a first run each, and the difference of their results."""
    results = {}
    times: dict[str, list[float]] = {"baseline": [], "ours": []}
    for turn in range(repeats + 1):
        for side, seconds in times.items():
            start = time.perf_counter()
            results[side] = getattr(contest, side)()
            wait_for(device)
            if turn:
                seconds.append(time.perf_counter() - start)
    baseline_s = statistics.median(times["baseline"]) * contest.baseline_parts
    ours_s = statistics.median(times["ours"])
    figures = {"baseline_s": baseline_s, "ours_s": ours_s, "speedup": baseline_s / ours_s}
    expected = contest.reference() if contest.reference else results["baseline"]
    figures["max_rel_diff"] = largest_difference(results["ours"], expected)
    if contest.reference and contest.baseline_parts == 1:
        figures["baseline_max_rel_diff"] = largest_difference(results["baseline"], expected)
    return figures


def largest_difference(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the largest value of the expected tensor."""
    return max(
        ((tensor - wanted).abs().max() / wanted.abs().max()).item()
        for tensor, wanted in zip(tensors, expected, strict=True)
    )


def peak_megabytes(run: Callable[[], object], device: torch.device) -> float:
    """How far one call of ``run`` raises this process's (or the CUDA device's) largest memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        floor = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - floor) / 2**20
    floor = _largest_resident_bytes()
    run()
    return (_largest_resident_bytes() - floor) / 2**20


def _largest_resident_bytes() -> int:
    # On Linux, getrusage's figure would be inherited from the parent process.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_in_child(side: str) -> float:
    """The same in a fresh process, of one side of the command's comparison."""
    command = [sys.executable, "-m", "tool.bench", *sys.argv[1:], "--peak_of", side]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(child.stdout)
