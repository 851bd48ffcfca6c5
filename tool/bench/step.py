"""``tool.bench step``: where the time of a training step goes, on synthetic photographs."""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from tool import transforms
from tool.affinity import affinity_label, affinity_loss, pair_labels
from tool.run import cli
from tool.run.devices import autocast, configure_backends, to_device, wait_for
from tool.run.loading import load
from tool.run.training import build_optimizer, check_crop_size

PARTS = ("loading", "forward", "backward", "optimizer")
# Height and width of most photographs in VOC, and of the blocks of colour and score in ours.
PHOTOGRAPH, BLOCK = (375, 500), 125
# Small enough that random weights stay finite for any number of steps.
LEARNING_RATE = 1e-6


def add_step_arguments(add: Callable) -> None:
    """The flags of the benchmark, besides those that all have."""
    add("--network", type=cli.any_network, default="network.vgg16_aff", help="what is trained")
    add("--batch", type=cli.count, default=8, help="images in a step")
    add("--crop_size", type=cli.count, default=448, help="side of a crop, pixels")
    add(
        "--num_workers",
        type=cli.number(int, 0),
        default=cli.default_num_workers(),
        help="processes that load images; 0 loads in the program itself",
    )


def photograph(height: int, width: int) -> bytes:
    """A JPEG file of blurred blocks of random colours."""
    rows, columns = (max(1, side // BLOCK) for side in (height, width))
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    file = io.BytesIO()
    transforms.resize(Image.fromarray(blocks), height, width).save(file, "JPEG")
    return file.getvalue()


class SyntheticTrainingSet(Dataset):
    """The work of both stages' training sets: decode, jitter, crop and normalize a photograph.

    Gives float32 3 x crop x crop, and with ``stride`` also the label of its cells, from CRF scores
    of one class, else a dummy.
    """

    def __init__(self, normalize: Callable, crop_size: int, stride: int | None):
        self.normalize, self.crop_size, self.stride = normalize, crop_size, stride
        self.photograph = photograph(*PHOTOGRAPH)
        rows, columns = (side // BLOCK for side in PHOTOGRAPH)
        scores = np.random.default_rng(0).random((rows, columns, 4), dtype=np.float32)
        self.scores = scores.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = transforms.sample_rng(0, 0, str(index))
        image = Image.open(io.BytesIO(self.photograph)).convert("RGB")
        array = np.asarray(transforms.colour_jitter(image, rng))
        box = transforms.crop_box(*array.shape[:2], self.crop_size, rng)
        array = self.normalize(transforms.crop_to_canvas(array, box, self.crop_size))
        label = torch.zeros(())
        if self.stride:
            scores = transforms.crop_to_canvas(self.scores, box, self.crop_size)
            low, high = torch.from_numpy(transforms.to_chw(scores)).chunk(2)
            label = affinity_label(low, high, self.stride)
        return torch.from_numpy(transforms.to_chw(array)), label


def step(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """A training step, split into loading (the wait for it), forward, backward and optimizer.

    With --amp, --tf32 or --compile, steps without them are the baseline. The first step of each is
    not timed. Times are medians; after each part, the device is waited for.
    """
    figures: dict[str, float] = {}
    if has_switches(args):
        baseline = time_steps(without_switches(args), device)
        figures |= {f"baseline_{name}": value for name, value in baseline.items()}
    figures |= time_steps(args, device)
    if "baseline_step_s" in figures:
        figures["speedup"] = figures["baseline_step_s"] / figures["step_s"]
    report(figures, args)
    return figures


def has_switches(args: argparse.Namespace) -> bool:
    """Whether a switch for speed is on, so that there is a baseline without."""
    return bool(args.amp or args.tf32 or args.compile)


def without_switches(args: argparse.Namespace) -> argparse.Namespace:
    """The same arguments, but all switches for speed off."""
    return argparse.Namespace(**{**vars(args), "amp": None, "tf32": False, "compile": False})


def time_steps(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of a step and of its parts, images a second, and on CUDA the peak memory in MB."""
    configure_backends(device, args)
    torch.manual_seed(args.seed)
    net = to_device(args.network.Net(), device, args)
    stride = None
    if hasattr(net, "forward_features"):
        stride = net.stride
        check_crop_size(args.crop_size, stride, net.radius)
    dataset = SyntheticTrainingSet(net.normalize, args.crop_size, stride)
    steps = 1 + args.repeats
    batches = load(dataset, range(steps * args.batch), args.batch, args.num_workers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = list(_timed_steps(net, batches, args, device))[1:]
    medians = {f"{part}_s": statistics.median(t[part] for t in times) for part in PARTS}
    step_s = statistics.median(sum(t.values()) for t in times)
    figures = {**medians, "step_s": step_s, "images_per_second": args.batch / step_s}
    if device.type == "cuda":
        figures["peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures


def _timed_steps(
    net: nn.Module, batches: Iterator, args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, float]]:
    optimizer = build_optimizer(net, LEARNING_RATE, weight_decay=0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    net.train()
    for _ in range(1 + args.repeats):
        ends = [time.perf_counter()]

        def end_part(ends: list[float] = ends) -> None:
            wait_for(device)
            ends.append(time.perf_counter())

        images, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        end_part()
        loss = _loss(net, images, labels, args, device)
        end_part()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        end_part()
        scaler.step(optimizer)
        scaler.update()
        end_part()
        yield dict(zip(PARTS, np.diff(ends).tolist(), strict=True))


def _loss(
    net: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, device: torch.device
) -> Tensor:
    with autocast(device, args.amp):
        output = net(images)
    if hasattr(net, "forward_features"):
        return affinity_loss(output, *pair_labels(labels, net.radius))["loss"]
    return F.multilabel_soft_margin_loss(output.float(), torch.zeros_like(output).float())


def report(figures: dict[str, float], args: argparse.Namespace) -> None:
    """Print the figures as a table for people."""
    print(f"{args.network.__name__}, {args.batch} images of {args.crop_size} x {args.crop_size}")
    print_table(figures)


def print_table(figures: dict[str, float]) -> None:
    """A row a figure, beside that of its baseline, if there is one, and last the speedup."""
    sides = ("baseline_", "") if "speedup" in figures else ("",)
    if len(sides) > 1:
        print(f"{'':<18}" + "".join(f"{side:>12}" for side in ("baseline", "ours")))
    for name in figures:
        if name == "speedup" or name.startswith("baseline_"):
            continue
        values = "".join(f"{figures[side + name]:12.4f}" for side in sides)
        title = name.removesuffix("_s").replace("_", " ")
        print(f"{title:<18}{values}{' s' if name.endswith('_s') else ''}")
    if "speedup" in figures:
        print(f"{'speedup':<18}{figures['speedup']:12.2f} x")
