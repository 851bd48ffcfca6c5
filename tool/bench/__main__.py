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
import subprocess
import sys

import torch

from tool.bench.released import Contest, affinity, compare, crf, peak_megabytes, random_walk
from tool.bench.stages import infer, step
from tool.files import atomic_write
from tool.run import cli
from tool.run.devices import choose_device

# The benchmarks, with the sizes of their inputs.
SIZES = {
    random_walk: {"height": 47, "width": 63, "maps": 3},
    affinity: {"height": 56, "width": 56, "channels": 448, "batch": 8},
    crf: {"height": 375, "width": 500, "labels": 3},
    step: {"batch": 8, "crop_size": 448},
    infer: {},
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m tool.bench", description=__doc__, formatter_class=cli.help_formatter
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for benchmark, sizes in SIZES.items():
        name, text = benchmark.__name__, benchmark.__doc__
        form = {"description": text, "formatter_class": cli.help_formatter}
        subparser = benchmarks.add_parser(name, help=text.partition("\n")[0], **form)
        subparser.set_defaults(function=benchmark)
        add = subparser.add_argument
        for name, size in sizes.items():
            add(f"--{name}", type=cli.count, default=size, help="size of the inputs")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        add("--threads", type=cli.count, help="CPU threads (default: PyTorch's choice)")
        add("--repeats", type=cli.count, default=5, help="timed runs of each side")
        add("--seed", type=cli.random_seed, default=0, help="of the random inputs")
        add("--json", metavar="FILE", help="also write the figures to this file")
        add("--peak_of", choices=("baseline", "ours"), help=argparse.SUPPRESS)
    for name, default in (("step", "network.vgg16_aff"), ("infer", "network.vgg16_cls")):
        cli.add_network_argument(benchmarks.choices[name], cli.any_network, default)
        cli.add_speed_arguments(benchmarks.choices[name])
    benchmarks.choices["step"].add_argument(
        "--num_workers",
        type=cli.number(int, 0),
        default=cli.default_num_workers(),
        help="processes that load images; 0 loads in the program itself",
    )
    return parser


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


def peak_in_child(side: str) -> float:
    """The peak memory of one side of this command's comparison, in a fresh process."""
    command = [sys.executable, "-m", "tool.bench", *sys.argv[1:], "--peak_of", side]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


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
        figures |= {f"{side}_peak_mb": peak_in_child(side) for side in ("baseline", "ours")}
    print_figures(figures)
    if args.json:
        with atomic_write(args.json) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
