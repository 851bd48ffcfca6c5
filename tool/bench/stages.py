"""``tool.bench step`` and ``infer``: where the time of a training step and of an image goes.

They run the programs on a toy devkit, with random weights, and time what the programs call.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import infer_aff
import infer_cls
import infer_seg
import train_aff
import train_cls
import train_seg
from tool.maps import save_index_png, save_maps
from tool.run import training
from tool.run.devices import wait_for
from voc12 import toy

LONG_SIDE = 500  # of a photograph in VOC, pixels
LEARNING_RATE = 1e-6  # so small that random weights stay finite
TRAIN_AUG = 10_582  # images
# By the ending of a network's name: its programs, and the two functions that process an image.
KINDS = {
    "cls": (train_cls, infer_cls, "infer_image", "write_outputs"),
    "aff": (train_aff, infer_aff, "make_walk", "write_labels"),
    "seg": (train_seg, infer_seg, "segment", "write_outputs"),
}
# The programs' flags for files, which are in one folder under the flags' names.
PATHS = {
    train_cls: ("voc12_root", "train_list", "val_list", "session_name"),
    train_aff: ("voc12_root", "train_list", "la_crf_dir", "ha_crf_dir", "session_name"),
    train_seg: ("voc12_root", "train_list", "label_dir", "session_name"),
    infer_cls: ("voc12_root", "infer_list", "out_cam", "out_la_crf", "out_ha_crf"),
    infer_aff: ("voc12_root", "infer_list", "cam_dir", "out_rw"),
    infer_seg: ("voc12_root", "infer_list", "out_seg"),
}


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

    def figures(self, parts: Sequence[str], images: int) -> dict[str, float]:
        """Median seconds of the parts, which process so many images, without the first time.

        Also the images per second, and the minutes that train_aug's 10,582 images would take.
        """
        times = np.diff(self.ends).reshape(-1, len(parts))[1:]
        figures = {f"{part}_s": float(np.median(times[:, i])) for i, part in enumerate(parts)}
        figures["total_s"] = float(np.median(times.sum(axis=1)))
        figures["images_per_s"] = images / figures["total_s"]
        figures["train_aug_min"] = TRAIN_AUG / figures["images_per_s"] / 60
        if self.device.type == "cuda":
            figures["peak_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return figures


def step(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """A training step of the network's program, in median seconds by parts.

    Loading is the wait for the images, forward includes the loss, and backward the optimizer.
    """
    stopwatch, train_one_epoch = Stopwatch(device), training.train_one_epoch

    def timed_epoch(run: training.Training, batches: Iterator[Any], losses_of: Callable) -> dict:
        next_batch = stopwatch.timed(lambda: next(batches), before=True)
        losses = train_one_epoch(run, iter(next_batch, None), stopwatch.timed(losses_of))
        stopwatch.end_part()
        return losses

    program, *_ = KINDS[args.network.__name__[-3:]]
    flags = f"--lr {LEARNING_RATE} --batch_size {args.batch} --crop_size {args.crop_size} "
    flags += f"--num_workers {args.num_workers} "
    flags += f"--max_iters {1 + args.repeats}" if program is train_seg else "--max_epoches 1"
    with mock.patch.object(training, "train_one_epoch", timed_epoch):
        run_program(program, args, flags)
    return stopwatch.figures(("loading", "forward", "backward"), args.batch)


def infer(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """An image of the network's program, 500 pixels long, in median seconds by parts.

    Network ends with the CAMs, the transition matrix, or the probabilities; output is the CRF, or
    the random walk, and on a CPU the writing.
    """
    stopwatch = Stopwatch(device)
    _, program, network, output = KINDS[args.network.__name__[-3:]]
    functions = {
        network: stopwatch.timed(getattr(program, network), before=True),
        output: stopwatch.timed(getattr(program, output)),
    }
    one_at_a_time = mock.patch.dict(infer_aff.WALKS_AT_A_TIME, cuda=1)
    with mock.patch.multiple(program, **functions), one_at_a_time:
        stopwatch.end_part()
        run_program(program, args, "--num_workers 0")
    return stopwatch.figures(("loading", "network", "output"), 1)


def run_program(program: Any, args: argparse.Namespace, flags: str) -> None:
    """Run a program with these flags, the benchmark's and those for files."""
    words = f"--network {args.network.__name__} --weights none --device {args.device} "
    words += f"--seed {args.seed} {flags}"
    words += "".join(f" --{name}" for name in ("tf32", "compile") if getattr(args, name))
    words += f" --amp {args.amp}" if args.amp else ""
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        make_inputs(Path(folder), args)
        paths = [part for name in PATHS[program] for part in (f"--{name}", f"{folder}/{name}")]
        program.main(program.get_args_parser().parse_args([*words.split(), *paths]))


def make_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Photographs, lists, and random maps."""
    toy.make_devkit(folder / "voc12_root", 1 + args.repeats, LONG_SIDE, args.seed)
    photographs = sorted((folder / "voc12_root" / "JPEGImages").iterdir())
    ids = [path.stem for path in photographs]
    steps = ids * getattr(args, "batch", 1)  # one more than is timed
    for name, members in (("infer_list", ids), ("val_list", ids[:1]), ("train_list", steps)):
        (folder / name).write_text("\n".join(members))
    for path in photographs:
        width, height = Image.open(path).size
        score = np.random.default_rng(0).random((height, width), dtype=np.float32)
        save_maps(folder / "cam_dir" / f"{path.stem}.npy", {0: score, 1: score[::-1]})
        save_index_png(folder / "label_dir" / f"{path.stem}.png", (score > 0.5).astype(np.uint8))
        for name, object_score in (("la_crf_dir", score**2), ("ha_crf_dir", score)):
            save_maps(folder / name / f"{path.stem}.npy", {0: 1 - object_score, 1: object_score})
