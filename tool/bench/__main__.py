"""Measurements of time and memory, each beside a baseline.

    python3 -m tool.bench random_walk --height 47 --width 63
    python3 -m tool.bench affinity --height 56 --width 56 --channels 448 --batch 8 --json aff.json
    python3 -m tool.bench crf --height 375 --width 500 --labels 3 --threads 2
    python3 -m tool.bench step --network vgg16_aff --batch 8 --amp bf16
    python3 -m tool.bench infer --network vgg16_cls --amp bf16
    python3 -m tool.bench all --device cuda --json gpu.json

random_walk, affinity and crf compare with what the released code does, in turns in one process;
times are medians. Memory is by how much the peak of a fresh process exceeds that of its inputs.
``max_rel_diff`` is the largest difference of the results, relative to the largest value of the
baseline; random_walk compares both sides with double precision.

step and infer show where the time of a training step and of an image goes. all runs everything in
turn, with every network, without and with --amp bf16.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tool.bench.released import affinity, compare, crf, peak_megabytes, random_walk
from tool.bench.stages import infer, step
from tool.files import write_json
from tool.run import cli
from tool.run.devices import choose_device
from tool.run.errors import DataError
from tool.run.log import describe_run

# Every size of ``all``, and the batches that the networks are trained with.
ALL = ("random_walk", "random_walk --height 94 --width 126", "affinity", "crf --threads 1")
BACKBONES = ("vgg16", "resnet38", "resnet50")
BATCHES = {"cls": 16, "aff": 8, "seg": 10}


def all_(args: argparse.Namespace) -> None:
    """Every benchmark in a process of its own, at the sizes of the method."""
    programs = [
        f"{program} --network {backbone}_{kind}{amp}"
        for backbone in BACKBONES
        for kind, batch in BATCHES.items()
        for program in (f"step --batch {batch}", "infer")
        for amp in ("", " --amp bf16")
    ]
    results: dict[str, dict] = {}
    with TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        flags = ["--device", args.device, "--repeats", str(args.repeats), "--seed", str(args.seed)]
        for command in (*ALL, *programs):
            print(f"{command}:", flush=True)
            words = [sys.executable, "-m", "tool.bench", *command.split(), *flags, "--json", file]
            code = subprocess.run(words, stdout=subprocess.DEVNULL).returncode
            results[command] = {} if code else json.loads(file.read_text())
            print_figures(results[command])
            if args.json:  # after each, in case that the time is up
                write_json(args.json, results)
    failed = [command for command, figures in results.items() if not figures]
    if failed:
        raise DataError(f"{len(failed)} of {len(results)} failed, see above: {'; '.join(failed)}.")


# The benchmarks, with the sizes of their inputs.
SIZES = {
    random_walk: {"height": 47, "width": 63, "maps": 3},
    affinity: {"height": 56, "width": 56, "channels": 448, "batch": 8},
    crf: {"height": 375, "width": 500, "labels": 3},
    step: {"batch": 8, "crop_size": 448},
    infer: {},
    all_: {},
}
DEFAULT_NETWORKS = {step: "network.vgg16_aff", infer: "network.vgg16_cls"}


def get_args_parser() -> argparse.ArgumentParser:
    form = {"formatter_class": cli.help_formatter}
    parser = argparse.ArgumentParser("python3 -m tool.bench", description=__doc__, **form)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for benchmark, sizes in SIZES.items():
        name, text = benchmark.__name__.strip("_"), benchmark.__doc__
        line = text.partition("\n")[0]
        subparser = benchmarks.add_parser(name, help=line, description=text, **form)
        subparser.set_defaults(function=benchmark)
        add = subparser.add_argument
        for size, default in sizes.items():
            add(f"--{size}", type=cli.count, default=default, help="size of the inputs")
        add("--threads", type=cli.count, help="CPU threads (default: PyTorch's choice)")
        add("--repeats", type=cli.count, default=5, help="timed runs of each side")
        add("--json", metavar="FILE", help="also write the figures to this file")
        add("--peak_of", choices=("baseline", "ours"), help=argparse.SUPPRESS)
        cli.add_run_arguments(subparser)
        if benchmark in DEFAULT_NETWORKS:
            cli.add_network_argument(subparser, cli.any_network, DEFAULT_NETWORKS[benchmark])
            cli.add_speed_arguments(subparser)
    return parser


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
        print(peak_megabytes(args.function(args, device)[args.peak_of], device))
        return
    print(*describe_run(args.seed, device), sep="\n")
    if args.function is all_:
        all_(args)
        return
    if args.function in DEFAULT_NETWORKS:
        figures = args.function(args, device)
    else:
        figures = compare(args.function(args, device), args.repeats, device)
        figures |= {f"{side}_peak_mb": peak_in_child(side) for side in ("baseline", "ours")}
    if args.json:
        write_json(args.json, figures)
    print_figures(figures)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
