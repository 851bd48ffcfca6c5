"""``tool.bench step`` and ``infer``: where the time of a training step and of an image goes.

They run the programs on a toy devkit, with random weights, and time what the programs call.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

import infer_aff
import infer_cls
import train_aff
import train_cls
from tool.maps import save_maps
from tool.run.devices import wait_for
from tool.run.training import Losses, Training, train_one_epoch
from voc12 import toy
from voc12.devkit import Devkit

LONG_SIDE = 500  # of a photograph in VOC, pixels
LEARNING_RATE = 1e-6  # so small that random weights stay finite


class Stopwatch:
    """Notes when the parts of repeated work end, and on CUDA the peak memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def end_part(self) -> None:
        wait_for(self.device)
        self.ends.append(time.perf_counter())

    def timed(self, function: Callable, before: bool = False) -> Callable:
        """The function, with the end of a part after each call, and perhaps ``before`` it."""

        def call(*args: Any) -> Any:
            if before:
                self.end_part()
            result = function(*args)
            self.end_part()
            return result

        return call

    def figures(self, *parts: str) -> dict[str, float]:
        """Median seconds of the parts and in total, without the first repetition."""
        times = np.diff(self.ends).reshape(-1, len(parts))[1:]
        figures = {f"{part}_s": float(np.median(times[:, i])) for i, part in enumerate(parts)}
        figures["total_s"] = float(np.median(times.sum(axis=1)))
        if self.device.type == "cuda":
            figures["peak_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return figures


def step(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """A training step of train_cls.py or train_aff.py, in median seconds by parts.

    Loading is the wait for the images, forward includes the loss, and backward the optimizer. With
    --amp, --tf32 or --compile, a step without them is the baseline.
    """
    program, paths = train_aff, ["train_list", "session_name", "la_crf_dir", "ha_crf_dir"]
    if hasattr(args.network.Net, "forward_cam"):
        program, paths = train_cls, ["train_list", "session_name", "val_list"]
    words = f"--max_epoches 1 --lr {LEARNING_RATE} --batch_size {args.batch} "
    words += f"--crop_size {args.crop_size} --num_workers {args.num_workers}"

    def time_steps(folder: Path, switches: list[str]) -> dict[str, float]:
        stopwatch = Stopwatch(device)

        def timed_epoch(training: Training, batches: Iterator[Any], losses_of: Losses) -> dict:
            def timed_batches() -> Iterator[Any]:
                stopwatch.end_part()
                for batch in batches:
                    stopwatch.end_part()
                    yield batch
                    stopwatch.end_part()

            means = train_one_epoch(training, timed_batches(), stopwatch.timed(losses_of))
            stopwatch.end_part()
            return means

        with mock.patch.object(program, "train_one_epoch", timed_epoch):
            run(program, args, folder, paths, words.split() + switches)
        return stopwatch.figures("loading", "forward", "backward")

    print(f"{args.network.__name__}, {args.batch} images of {args.crop_size} x {args.crop_size}")
    return beside_baseline(time_steps, args)


def infer(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """An image of infer_cls.py or infer_aff.py, in median seconds by parts.

    Network ends with the CAMs, or with the transition matrix; output is the CRF, or the random
    walk, and the writing. With --amp, --tf32 or --compile, an image without them is the baseline.
    """
    program, paths = infer_aff, ["infer_list", "cam_dir", "out_rw"]
    network, output = "make_walk", "write_labels"
    if hasattr(args.network.Net, "forward_cam"):
        program, paths = infer_cls, ["infer_list", "out_cam", "out_la_crf", "out_ha_crf"]
        network, output = "infer_image", "write_outputs"

    def time_images(folder: Path, switches: list[str]) -> dict[str, float]:
        stopwatch = Stopwatch(device)
        functions = {
            network: stopwatch.timed(getattr(program, network), before=True),
            output: stopwatch.timed(getattr(program, output)),
        }
        one_at_a_time = mock.patch.dict(infer_aff.WALKS_AT_A_TIME, cuda=1)
        with mock.patch.multiple(program, **functions), one_at_a_time:
            stopwatch.end_part()
            run(program, args, folder, paths, ["--num_workers", "0", "--overwrite", *switches])
        return stopwatch.figures("loading", "network", "output")

    print(f"{args.network.__name__}, photographs with a long side of {LONG_SIDE} pixels")
    return beside_baseline(time_images, args)


def run(
    program: ModuleType,
    args: argparse.Namespace,
    folder: Path,
    paths: Sequence[str],
    words: Sequence[str],
) -> None:
    """Run a program without its messages; ``paths`` are flags, and files in the folder."""
    flags = {name: folder / name for name in ["voc12_root", *paths]}
    flags |= {"network": args.network.__name__, "device": args.device, "seed": args.seed}
    common = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    parser = program.get_args_parser()
    with contextlib.redirect_stdout(io.StringIO()):
        program.main(parser.parse_args([*common, "--weights", "none", *words]))


def beside_baseline(time_program: Callable, args: argparse.Namespace) -> dict[str, float]:
    """The figures of ``time_program(folder, switches)``, and with switches also those without."""
    switches = [f"--{name}" for name in ("tf32", "compile") if getattr(args, name)]
    switches += ["--amp", args.amp] if args.amp else []
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args)
        baseline = time_program(folder, []) if switches else {}
        figures = time_program(folder, switches)
    figures |= {f"baseline_{name}": value for name, value in baseline.items()}
    if switches:
        figures["speedup"] = baseline["total_s"] / figures["total_s"]
    return figures


def make_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Write what flags of the programs name, under the flags' names."""
    num_images = 1 + args.repeats
    with contextlib.redirect_stdout(io.StringIO()):
        toy.make_devkit(folder / "voc12_root", num_images, LONG_SIDE, args.seed)
    devkit = Devkit(folder / "voc12_root")
    ids = sorted(path.stem for path in (devkit.root / "JPEGImages").iterdir())
    steps = islice(cycle(ids), num_images * getattr(args, "batch", 1))
    for name, members in (("infer_list", ids), ("val_list", ids[:1]), ("train_list", steps)):
        (folder / name).write_text("\n".join(members))
    for image_id in ids:
        width, height = devkit.load_image(image_id).size
        score = np.random.default_rng(0).random((height, width), dtype=np.float32)
        for kind, maps in (
            ("cam_dir", {0: score, 1: score[::-1]}),
            ("la_crf_dir", {0: 1 - score**2, 1: score**2}),
            ("ha_crf_dir", {0: 1 - score, 1: score}),
        ):
            save_maps(folder / kind / f"{image_id}.npy", maps)
