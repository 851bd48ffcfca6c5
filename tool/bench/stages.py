"""``tool.bench step`` and ``infer``: where the time of a training step and of an image goes.

They run the programs on a toy devkit, with random weights, and time what the programs call.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
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
from tool.run.devices import wait_for
from tool.run.training import Losses, Training, train_one_epoch
from voc12 import toy

LONG_SIDE = 500  # of a photograph in VOC, pixels
LEARNING_RATE = 1e-6  # so small that random weights stay finite
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

    def figures(self, *parts: str) -> dict[str, float]:
        """Median seconds of the parts and in total, without the first repetition."""
        times = np.diff(self.ends).reshape(-1, len(parts))[1:]
        figures = {f"{part}_s": float(np.median(times[:, i])) for i, part in enumerate(parts)}
        figures["total_s"] = float(np.median(times.sum(axis=1)))
        if self.device.type == "cuda":
            figures["peak_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return figures


def step(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, float]:
    """A training step of the network's program, in median seconds by parts.

    Loading is the wait for the images, forward includes the loss, and backward the optimizer. With
    --amp, --tf32 or --compile, a step without them is the baseline.
    """
    stopwatch = Stopwatch(device)

    def timed_epoch(training: Training, batches: Iterator[Any], losses_of: Losses) -> dict:
        next_batch = stopwatch.timed(lambda: next(batches), before=True)
        losses = train_one_epoch(training, iter(next_batch, None), stopwatch.timed(losses_of))
        stopwatch.end_part()
        return losses

    program, *_ = KINDS[args.network.__name__[-3:]]
    length = f"--max_iters {1 + args.repeats}" if program is train_seg else "--max_epoches 1"
    flags = f"{length} --lr {LEARNING_RATE} --batch_size {args.batch} "
    flags += f"--crop_size {args.crop_size} --num_workers {args.num_workers}"
    with mock.patch.object(program, "train_one_epoch", timed_epoch):
        run(program, args, folder, flags)
    return stopwatch.figures("loading", "forward", "backward")


def infer(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, float]:
    """An image of the network's program, 500 pixels long, in median seconds by parts.

    Network ends with the CAMs, the transition matrix, or the probabilities; output is the CRF, or
    the random walk, and on a CPU the writing. With --amp, --tf32 or --compile, an image without
    them is the baseline.
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
        run(program, args, folder, "--num_workers 0 --overwrite")
    return stopwatch.figures("loading", "network", "output")


def run(program: ModuleType, args: argparse.Namespace, folder: Path, flags: str) -> None:
    """Run a program with these flags, the benchmark's and those for files."""
    words = f"--network {args.network.__name__} --weights none --device {args.device} "
    words += f"--seed {args.seed} {flags}"
    words += "".join(f" --{name}" for name in ("tf32", "compile") if getattr(args, name))
    words += f" --amp {args.amp}" if args.amp else ""
    paths = [word for name in PATHS[program] for word in (f"--{name}", str(folder / name))]
    program.main(program.get_args_parser().parse_args([*words.split(), *paths]))


def time_program(
    benchmark: Callable, args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """The figures of ``step`` or ``infer``, and with speed switches also those without them."""
    plain = argparse.Namespace(**vars(args) | {"amp": None, "tf32": False, "compile": False})
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        make_inputs(Path(folder), args)
        baseline = benchmark(plain, device, Path(folder))
        if args == plain:
            return baseline
        figures = benchmark(args, device, Path(folder))
    figures["speedup"] = baseline["total_s"] / figures["total_s"]
    return figures | {f"baseline_{name}": value for name, value in baseline.items()}


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
