"""Measurements of time and memory, each beside a baseline.

    python3 -m tool.bench random_walk --height 47 --width 63
    python3 -m tool.bench affinity --height 56 --width 56 --channels 448 --batch 8 --json aff.json
    python3 -m tool.bench crf --height 375 --width 500 --labels 3 --threads 2
    python3 -m tool.bench step --network vgg16_aff --batch 8 --amp bf16
    python3 -m tool.bench infer --network vgg16_cls --amp bf16

random_walk, affinity and crf compare with what the released code does. Both sides are run in turns
in one process; times are medians. Memory is the peak of a fresh process, minus what it held when
the inputs were ready. ``max_rel_diff`` is the largest difference of the results, relative to the
largest value of the baseline. Where the baseline's rounding would hide ours, both are compared with
double precision, and ``baseline_max_rel_diff`` is the baseline's difference.

step and infer show where the time of a training step and of an image goes, and with --amp, --tf32
or --compile also compare with what is computed without them.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable

import torch

from tool.bench.released import Contest, affinity, compare, crf, peak_megabytes, random_walk
from tool.bench.stages import infer, step
from tool.files import atomic_write
from tool.run import cli
from tool.run.devices import choose_device


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m tool.bench", description=__doc__, formatter_class=cli.help_formatter
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    count = cli.number(int, 1)

    add = _benchmark(benchmarks, "random_walk", random_walk, "stage 4 after the network")
    add("--height", type=count, default=47, help="rows of the grid")
    add("--width", type=count, default=63, help="columns of the grid")
    add("--maps", type=count, default=3, help="maps that walk, with the background")
    add(
        "--estimate_baseline",
        action="store_true",
        help="time one of the baseline's squarings and multiply; for grids from about 100 x 80",
    )

    add = _benchmark(benchmarks, "affinity", affinity, "AffinityNet's head, forward and backward")
    add("--height", type=count, default=56, help="rows of the feature grid")
    add("--width", type=count, default=56, help="columns of the feature grid")
    add("--channels", type=count, default=448, help="channels of the features")
    add("--batch", type=count, default=8, help="images")

    add = _benchmark(benchmarks, "crf", crf, "the dense CRF of one image, two alphas")
    add("--height", type=count, default=375, help="rows of the image")
    add("--width", type=count, default=500, help="columns of the image")
    add("--labels", type=count, default=3, help="labels, with the background")

    add = _benchmark(benchmarks, "step", step, "a training step of a network, by parts")
    add("--network", type=cli.any_network, default="network.vgg16_aff", help="what is trained")
    add("--batch", type=count, default=8, help="images in a step")
    add("--crop_size", type=cli.side_length, default=448, help="side of a crop, pixels")
    add("--num_workers", type=cli.number(int, 0), default=cli.default_num_workers(), help="loaders")
    cli.add_speed_arguments(benchmarks.choices["step"])

    add = _benchmark(benchmarks, "infer", infer, "an image in stage 2 or 4, by parts")
    add("--network", type=cli.any_network, default="network.vgg16_cls", help="decides the stage")
    cli.add_speed_arguments(benchmarks.choices["infer"])
    return parser


def _benchmark(benchmarks, name: str, function: Callable, text: str) -> Callable:
    """Add a benchmark's parser with the flags that all have; returns its ``add_argument``.

    ``function(args, device)`` gives a Contest, or figures by name.
    """
    parser = benchmarks.add_parser(
        name, help=text, description=function.__doc__, formatter_class=cli.help_formatter
    )
    parser.set_defaults(function=function)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--threads", type=cli.number(int, 1), help="CPU threads (default: PyTorch's choice)")
    add("--repeats", type=cli.number(int, 1), default=5, help="timed runs of each side")
    add("--seed", type=cli.random_seed, default=0, help="of the random inputs")
    add("--json", metavar="FILE", help="write the figures there, too")
    add("--peak_of", choices=("baseline", "ours"), help=argparse.SUPPRESS)
    return add


def describe_machine(device: torch.device) -> str:
    """One line: where the figures were measured."""
    what = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {what}"
    return f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {what}"


def print_figures(figures: dict[str, float]) -> None:
    """A row for each figure, beside that of its baseline if there is one."""
    for name, value in figures.items():
        if not name.startswith("baseline_"):
            baseline = figures.get(f"baseline_{name.removeprefix('ours_')}")
            beside = "" if baseline is None else f"   baseline {baseline:10.4g}"
            print(f"{name:<14}{value:10.4g}{beside}")


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.peak_of:
        contest = args.function(args, device)
        print(peak_megabytes(getattr(contest, args.peak_of), device))
        return
    print(describe_machine(device))
    figures = args.function(args, device)
    if isinstance(figures, Contest):
        figures = compare(figures, args.repeats, device)
    print_figures(figures)
    if args.json:
        with atomic_write(args.json) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
