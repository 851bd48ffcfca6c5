"""Measurements, always beside a baseline that does what the released code does.

    python3 -m tool.bench random_walk --height 47 --width 63
    python3 -m tool.bench affinity --height 56 --width 56 --channels 448 --batch 8 --json aff.json
    python3 -m tool.bench step --network vgg16_aff --batch 8 --amp bf16
    python3 -m tool.bench crf --height 375 --width 500 --labels 3 --threads 2
    python3 -m tool.bench infer --network vgg16_cls --amp bf16

``step`` says where the time of a training step goes, ``infer`` that of an image in inference. In
the others, baseline and ours take turns in one process; the times are medians. The peak memory of
each is that of a fresh child process, above what it held when its inputs were ready.
``max_rel_diff`` is the largest difference of the two results, relative to the largest value of the
baseline's; where the baseline's own rounding would hide ours, both are compared with the same
computation in double precision, and ``baseline_rel_diff`` is the baseline's difference.
"""

import argparse
import json
import os
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
from tool.bench.infer import add_infer_arguments, infer
from tool.bench.step import add_step_arguments, step
from tool.crf import background_and_maps, dense_crf
from tool.files import atomic_write
from tool.random_walk import propagate, transition_matrix
from tool.run import cli
from tool.run.devices import choose_device, wait_for

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


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m tool.bench", description=__doc__, formatter_class=cli.help_formatter
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")

    add = _benchmark(benchmarks, "random_walk", random_walk, "stage 4 after the network")
    add("--height", type=cli.count, default=47, help="rows of the grid")
    add("--width", type=cli.count, default=63, help="columns of the grid")
    add("--maps", type=cli.count, default=3, help="maps that walk, with the background")
    add(
        "--estimate_baseline",
        action="store_true",
        help="time one of the baseline's squarings and multiply; for grids from about 100 x 80",
    )

    add = _benchmark(benchmarks, "affinity", affinity, "AffinityNet's head, forward and backward")
    add("--height", type=cli.count, default=56, help="rows of the feature grid")
    add("--width", type=cli.count, default=56, help="columns of the feature grid")
    add("--channels", type=cli.count, default=448, help="channels of the features")
    add("--batch", type=cli.count, default=8, help="images")

    add = _benchmark(benchmarks, "step", step, "a training step of a network, by parts")
    add_step_arguments(add)
    cli.add_speed_arguments(benchmarks.choices["step"])

    add = _benchmark(benchmarks, "crf", crf, "the dense CRF of one image, two alphas")
    add("--height", type=cli.count, default=375, help="rows of the image")
    add("--width", type=cli.count, default=500, help="columns of the image")
    add("--labels", type=cli.count, default=3, help="labels, with the background")

    add = _benchmark(benchmarks, "infer", infer, "an image in stage 2 or 4, by parts")
    add_infer_arguments(add)
    cli.add_speed_arguments(benchmarks.choices["infer"])
    return parser


def _benchmark(benchmarks, name: str, function: Callable, text: str) -> Callable:
    """Add a benchmark's parser with the flags that all have; returns its ``add_argument``.

    ``function(args, device)`` gives a Contest, or measures by itself and gives the figures.
    """
    parser = benchmarks.add_parser(
        name, help=text, description=function.__doc__, formatter_class=cli.help_formatter
    )
    parser.set_defaults(function=function)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--threads", type=cli.count, help="CPU threads (default: PyTorch's choice)")
    add("--repeats", type=cli.count, default=5, help="timed runs of each side")
    add("--seed", type=cli.random_seed, default=0, help="of the random inputs")
    add("--json", metavar="FILE", help="write the figures there, too")
    add("--peak_of", choices=("baseline", "ours"), help=argparse.SUPPRESS)
    return add


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


def measure(contest: Contest, repeats: int, device: torch.device) -> dict[str, float]:
    """Times in seconds of both sides, taking turns after a first run each, and their difference."""
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
    figures["max_rel_diff"] = _largest_difference(results["ours"], expected)
    if contest.reference and contest.baseline_parts == 1:
        figures["baseline_rel_diff"] = _largest_difference(results["baseline"], expected)
    return figures


def _largest_difference(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
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


def _peak_in_child(side: str) -> float:
    command = [sys.executable, "-m", "tool.bench", *sys.argv[1:], "--peak_of", side]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(child.stdout)


def describe_machine(device: torch.device) -> str:
    """One line: where the figures were measured."""
    what = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {what}"
    return f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {what}"


def report(figures: dict[str, float], contest: Contest) -> None:
    """Print the comparison as a table for people."""
    note = ""
    if contest.baseline_parts > 1:
        note = f"  (estimated: one of {contest.baseline_parts} equal parts was run)"
    print(f"baseline  {figures['baseline_s']:10.4f} s  {figures['baseline_peak_mb']:8.0f} MB{note}")
    print(f"ours      {figures['ours_s']:10.4f} s  {figures['ours_peak_mb']:8.0f} MB")
    print(f"speedup   {figures['speedup']:10.1f} x")
    print(f"largest relative difference {figures['max_rel_diff']:.1e}")
    if "baseline_rel_diff" in figures:
        print(f"the baseline's own, from double precision {figures['baseline_rel_diff']:.1e}")


def hold(contest: Contest, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Times, difference and peak memory of a contest, also printed."""
    figures = measure(contest, args.repeats, device)
    figures["baseline_peak_mb"] = _peak_in_child("baseline")
    figures["ours_peak_mb"] = _peak_in_child("ours")
    report(figures, contest)
    return figures


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if not args.peak_of:
        print(describe_machine(device))
    result = args.function(args, device)
    if args.peak_of:
        print(peak_megabytes(getattr(result, args.peak_of), device))
        return
    figures = hold(result, args, device) if isinstance(result, Contest) else result
    if args.json:
        with atomic_write(args.json) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
