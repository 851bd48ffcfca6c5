"""``tool.bench infer``: where an image's time goes in stages 2 and 4, on a synthetic photograph."""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tool import transforms
from tool.affinity import pair_affinity
from tool.bench.step import has_switches, photograph, print_table, without_switches
from tool.cam import multi_scale_cam
from tool.crf import background_and_maps, dense_crf
from tool.maps import MAP_FORMATS, save_index_png, save_maps
from tool.random_walk import (
    pad_to_multiple,
    propagate,
    transition_matrix,
    upsample_scores,
    walk_seeds,
)
from tool.run import cli
from tool.run.devices import autocast, configure_backends, to_device, wait_for

# The method's: scales and CRF alphas of stage 2; alpha, beta and log of the steps of stage 4.
SCALES, CRF_ALPHAS = (1, 0.5, 1.5, 2), (4, 32)
WALK_ALPHA, BETA, LOGT = 16, 8, 8


def add_infer_arguments(add: Callable) -> None:
    """The flags of the benchmark, besides those that all have."""
    add(
        "--network",
        type=cli.any_network,
        default="network.vgg16_cls",
        help="stage 2 with a classifier, stage 4 with an AffinityNet",
    )
    add("--height", type=cli.count, default=375, help="of the photograph, pixels")
    add("--width", type=cli.count, default=500, help="of the photograph, pixels")
    add("--maps", type=cli.count, default=2, help="classes that are present")
    add("--out_format", choices=MAP_FORMATS, default="npy", help="of the maps that are written")
    add(
        "--out_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the maps that are written",
    )


def infer(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """One image of stage 2 or 4, split into loading, forward, CRF or walk, and writing.

    Everything happens in one process, one part after the other, and the device is waited for after
    each; the programs load, and on a CPU also compute CRFs, while the network is busy. With --amp,
    --tf32 or --compile, images without them are the baseline, and ``max_rel_diff`` is the largest
    difference of the two CAMs, or features, relative to the largest value. The first image of each
    is not timed. Times are medians. The networks' weights are random, those of classes positive.
    """
    figures, result = time_images(args, device)
    difference = None
    if has_switches(args):
        baseline, expected = time_images(without_switches(args), device)
        figures |= {f"baseline_{name}": value for name, value in baseline.items()}
        figures["speedup"] = figures["baseline_image_s"] / figures["image_s"]
        difference = ((result - expected).abs().max() / expected.abs().max()).item()
    print(f"{args.network.__name__}, an image of {args.height} x {args.width}, {args.maps} classes")
    print_table(figures)
    if difference is None:
        return figures
    print(f"largest relative difference {difference:.1e}")
    return figures | {"max_rel_diff": difference}


def time_images(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """Seconds of an image and its parts, on CUDA peak memory in MB; and the network's result."""
    configure_backends(device, args, fixed_size=False)
    torch.manual_seed(args.seed)
    stage, method = stage_2, "forward_cam"
    if hasattr(args.network.Net, "forward_features"):
        stage, method = stage_4, "forward_features"
    net = to_device(args.network.Net(), device, args, method).eval()
    if stage is stage_2:
        with torch.no_grad():
            net.fc8.weight.abs_()  # with signs at random, nothing would be seen of most classes
    file = photograph(args.height, args.width)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + args.repeats):
            ends, values = [time.perf_counter()], []
            for value in stage(net, file, Path(folder), args, device):
                wait_for(device)
                ends.append(time.perf_counter())
                values.append(value)
            times.append(np.diff(ends))
    medians = np.median(times[1:], axis=0).tolist()
    figures = {f"{part}_s": median for part, median in zip(PARTS[stage], medians, strict=True)}
    figures["image_s"] = float(np.median(np.sum(times[1:], axis=1)))
    if device.type == "cuda":
        figures["peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures, values[1].float().cpu()


def stage_2(
    net: nn.Module, file: bytes, folder: Path, args: argparse.Namespace, device: torch.device
) -> Iterator[Tensor | None]:
    """What infer_cls.py does with an image; yields after each part, then the CAMs."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scaled = []
    for scale in SCALES:
        array = net.normalize(np.asarray(transforms.rescale(image, scale)))
        scaled.append(torch.from_numpy(transforms.to_chw(array)).to(device))
    yield None
    with autocast(device, args.amp):
        cam = multi_scale_cam(net, scaled, (args.height, args.width), range(args.maps))
    yield cam
    maps = cam.cpu().numpy()
    score_sets = [background_and_maps(maps, alpha) for alpha in CRF_ALPHAS]
    scores = dense_crf(np.array(image), score_sets, device=device)
    yield None
    suffix = MAP_FORMATS[args.out_format]
    for name, written in zip(("cam", "la", "ha"), (maps, *scores), strict=True):
        save_maps(folder / f"{name}{suffix}", dict(enumerate(written)), args.out_dtype)
    yield None


def stage_4(
    net: nn.Module, file: bytes, folder: Path, args: argparse.Namespace, device: torch.device
) -> Iterator[Tensor | None]:
    """What infer_aff.py does with an image; yields after each part, then the features."""
    array = net.normalize(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    image = pad_to_multiple(torch.from_numpy(transforms.to_chw(array)).to(device), net.stride)
    generator = torch.Generator().manual_seed(args.seed)
    maps = torch.rand(args.maps, args.height, args.width, generator=generator).to(device)
    yield None
    with autocast(device, args.amp):
        features = net.forward_features(image[None])
    yield features
    height, width = features.shape[-2:]
    affinity = pair_affinity(features, net.radius)[0]
    transition = transition_matrix(affinity, height, width, net.radius, BETA)
    scores = propagate(walk_seeds(maps, WALK_ALPHA, net.stride), transition, 2**LOGT)
    label = upsample_scores(scores, (args.height, args.width), net.stride).argmax(dim=0)
    yield None
    save_index_png(folder / "label.png", label.to(torch.uint8).cpu().numpy())
    yield None


PARTS = {
    stage_2: ("loading", "forward", "crf", "writing"),
    stage_4: ("loading", "forward", "walk", "writing"),
}
