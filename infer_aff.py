"""Stage 4: pixel-level pseudo labels, by a random walk of the class maps along affinities.

    python3 infer_aff.py --infer_list voc12/val.txt --voc12_root VOC2012
        --network network.vgg16_aff --weights vgg16_aff.pth --cam_dir CAM --out_rw RW
    python3 infer_aff.py ... --crf                                  sharpened by the dense CRF
    python3 infer_aff.py ... --trace WALKS --trace_ids 2007_000033  how the walk went, in pictures
    python3 infer_aff.py ... --out_scores SCORES                    the walked class maps

Several GPUs of one machine, or of several that share the folders:
    torchrun --nproc_per_node=4 infer_aff.py --infer_list ...

CAM is what infer_cls.py wrote to --out_cam, or class maps of any method (docs/seeds.md). Writes an
index image <id>.png into RW. Images that are there are skipped, so a command that was killed
continues when it is repeated.

On images with masks, ... --sweep --plot sweep.png, in place of --out_rw, runs the network once and
scores every combination of --alphas (or --bgs), --betas and --logts; interrupted, it starts again.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tool import random_walk
from tool.affinity import pair_affinity
from tool.crf import dense_crf
from tool.labels import index_image
from tool.maps import save_index_png, save_maps
from tool.metrics import confusion_matrix
from tool.run import cli, devices
from tool.run.devices import StopSignals, Switches, autocast, print_main, to_device
from tool.run.errors import UsageError
from tool.run.inference import Run, join_ranks, require_finite
from tool.run.loading import load_each
from tool.run.provenance import OutputFolder, digest_maps, settings_of, weights_settings
from tool.weights import load_for_inference
from voc12.datasets import AffinityInferenceSet, AffinitySample
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids, require_files
from voc12.evaluate import add_figure_files, check_files, sweep_figures, sweep_table, write_files
from voc12.report.pictures import save_trace, walk_heat_map

# Walks of small grids leave a GPU waiting for launches; together they do not.
WALKS_AT_A_TIME = {"cpu": 1, "cuda": 8}
MAX_LOGT = 20  # a million steps


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_network_argument(parser, cli.affinity_network, default="network.vgg16_aff")
    cli.add_inference_arguments(parser)
    add_devkit_arguments(parser, labels=False)
    add("--cam_dir", required=True, metavar="DIR", help="class maps of stage 2, or of any method")
    cli.add_normalize_argument(parser)
    add("--out_rw", metavar="DIR", help="folder for the labels, index images")
    text = "folder for the walked class maps, archives <id>.npz of float16 in 0..1"
    add("--out_scores", metavar="DIR", help=text)
    score, logt = cli.number(float, 0, 1), cli.number(int, 0, MAX_LOGT)
    add("--alpha", type=cli.positive, default=16, help="background: (1 - max score)^alpha")
    add("--bg", type=score, help="constant background score, in place of --alpha's")
    add("--beta", type=cli.positive, default=8, help="exponent of the affinities")
    add("--logt", type=logt, default=8, help="the walk takes 2^logt steps")
    cli.add_radius_argument(parser)
    text = (
        "take every step, instead of a series that gives the scores to a millionth of the largest"
    )
    add("--exact", action="store_true", help=text)
    text = "pairs for cells at the border, too; departs from the published numbers"
    add("--full_graph", action="store_true", help=text)
    add("--crf", action="store_true", help="refine the scores by the dense CRF, as the paper does")
    cli.add_crf_argument(parser)
    add("--trace", metavar="DIR", help="pictures of the walk: a strip <id>.png and a film <id>.gif")
    add("--trace_ids", nargs="+", metavar="ID", help="the images of --trace (default: the first)")
    text = "score every combination of the following settings against the masks, instead"
    add("--sweep", action="store_true", help=text)
    add("--alphas", nargs="+", type=cli.positive, default=(4, 8, 16, 32), help="of --sweep")
    add("--bgs", nargs="+", type=score, help="of --sweep, in place of --alphas")
    add("--betas", nargs="+", type=cli.positive, default=(4, 8, 12, 16), help="of --sweep")
    add("--logts", nargs="+", type=logt, default=(0, 2, 4, 6, 8), help="of --sweep")
    add_figure_files(parser)
    return parser


class Walk(NamedTuple):
    """One image, ready to walk."""

    sample: AffinitySample
    transition: Tensor  # N x N
    seeds: Tensor  # (classes + 1) x h x w, N = h * w


@torch.no_grad()
def affinity_of(
    net: nn.Module, sample: AffinitySample, args: argparse.Namespace, device: torch.device
) -> tuple[Tensor, int, int]:
    """An image's affinities, offsets x sources, and the height and width of its feature grid."""
    image = random_walk.pad_to_multiple(sample.image.to(device, non_blocking=True), net.stride)
    height, width = (side // net.stride for side in image.shape[-2:])
    with autocast(device, args.amp):
        features = net.forward_features(image[None])
    require_finite(features, sample.image_id, args.amp)
    return pair_affinity(features, args.radius, args.full_graph)[0], height, width


def make_walk(
    net: nn.Module, sample: AffinitySample, args: argparse.Namespace, device: torch.device
) -> Walk:
    """The transition matrix of an image's affinities, and its maps with the background."""
    affinity = affinity_of(net, sample, args, device)
    walk = args.radius, args.beta, args.full_graph
    transition = random_walk.transition_matrix(*affinity, *walk)
    maps = sample.maps.to(device, non_blocking=True)
    kind, background = ("alpha", args.alpha) if args.bg is None else ("bg", args.bg)
    return Walk(sample, transition, random_walk.walk_seeds(maps, background, net.stride, kind))


def label_of(
    upsampled: Tensor, sample: AffinitySample, crf_backend: str | None = None
) -> np.ndarray:
    """The label that an image's scores, maps x H x W, give it: uint8 H x W.

    With a backend, they go through the dense CRF first.
    """
    if crf_backend:
        score_sets, device = [upsampled.cpu().numpy()], upsampled.device
        (refined,) = dense_crf(sample.photograph, score_sets, backend=crf_backend, device=device)
        upsampled = torch.from_numpy(refined)
    return index_image(upsampled.argmax(dim=0).cpu().numpy(), sample.classes)


def write_labels(walks: list[Walk], stride: int, args: argparse.Namespace, write: Callable) -> None:
    """Walk, and write (by ``Run.write``) what is asked for: labels, walked maps, pictures."""
    seeds, transitions = [walk.seeds for walk in walks], [walk.transition for walk in walks]
    tolerance = 0 if args.exact else random_walk.TOLERANCE
    walked = random_walk.propagate_together(seeds, transitions, 2**args.logt, tolerance)
    for walk, scores in zip(walks, walked, strict=True):
        sample = walk.sample
        upsampled = random_walk.upsample_scores(scores, sample.maps.shape[-2:], stride)
        if sample.image_id in args.trace_ids:
            draw_walk(walk, stride, args)
        if args.out_scores:
            maps = dict(zip(sample.classes, upsampled[1:].cpu().numpy(), strict=True))
            write(save_maps, Path(args.out_scores, f"{sample.image_id}.npz"), maps, "float16")
        if args.out_rw:
            label = label_of(upsampled, sample, args.crf_backend if args.crf else None)
            write(save_index_png, Path(args.out_rw, f"{sample.image_id}.png"), label)


def draw_walk(walk: Walk, stride: int, args: argparse.Namespace) -> None:
    """Write ``--trace``'s pictures of one image."""
    sample, size = walk.sample, walk.sample.maps.shape[-2:]
    labels = {
        steps: label_of(random_walk.upsample_scores(scores, size, stride), sample)
        for steps, scores in random_walk.walk_trace(walk.seeds, walk.transition, args.logt).items()
    }
    save_trace(Path(args.trace, sample.image_id), Image.fromarray(sample.photograph), labels)


def output_folders(args: argparse.Namespace, devkit: Devkit) -> list[OutputFolder]:
    """The folders that were named, with what decides their content."""
    background = "alpha" if args.bg is None else "bg"
    flags = ["radius", background, "beta", "logt", "exact", "full_graph"]
    flags += ["normalize"] if args.normalize else []
    scores = settings_of(args, ("network", "amp", "tf32", "compile", *flags))
    scores |= weights_settings(args.weights, args.seed) | {"cam_dir": digest_maps(args.cam_dir)}
    settings = scores | settings_of(args, ["crf"])
    folders = []
    for name, suffix, decisive in (("out_rw", ".png", settings), ("out_scores", ".npz", scores)):
        folder = getattr(args, name)
        devkit.require_output(f"--{name}", folder)
        if folder:
            origin = f"infer_aff.py --{name}"
            folders.append(OutputFolder(origin, Path(folder), (suffix,), decisive))
    if args.trace:
        devkit.require_output("--trace", args.trace)
        origin, suffixes = "infer_aff.py --trace", (".png", ".gif")
        traced = frozenset(args.trace_ids)
        folders.append(OutputFolder(origin, Path(args.trace), suffixes, settings, traced))
    return folders


def choose_traced(args: argparse.Namespace, ids: list[str]) -> list[str]:
    """The images to draw the walk of; raises UsageError for ids that the list does not have."""
    if not args.trace:
        if args.trace_ids:
            raise UsageError("--trace_ids needs --trace, the folder for the pictures.")
        return []
    unknown = [image_id for image_id in args.trace_ids or [] if image_id not in ids]
    if unknown:
        raise UsageError(f"--trace_ids: {unknown[0]} is not in {args.infer_list}.")
    return args.trace_ids or ids[:1]


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go together."""
    if not (args.out_rw or args.out_scores or args.sweep):
        raise UsageError("name --out_rw or --out_scores, or --sweep to choose the settings.")
    cli.require_distinct_folders(args, "cam_dir", "out_scores")
    cli.require_distinct_folders(args, "out_rw", "trace")  # both get <id>.png
    if args.sweep and (args.out_rw or args.out_scores or args.trace or args.crf or args.skip_bad):
        flags = "--out_rw, --out_scores, --trace, --crf and --skip_bad"
        raise UsageError(f"--sweep scores all images and writes no labels; leave out {flags}.")
    default = get_args_parser().get_default
    single = [n for n in ("alpha", "bg", "beta", "logt") if getattr(args, n) != default(n)]
    if args.sweep and single:
        raise UsageError(f"--{single[0]}: with --sweep, name a list with --{single[0]}s.")
    if not args.sweep and (args.json or args.csv or args.plot):
        raise UsageError("--json, --csv and --plot show the results of --sweep; add --sweep.")


def swept_labels(
    net: nn.Module,
    sample: AffinitySample,
    kind: str,
    backgrounds: Sequence[float],
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[np.ndarray]:
    """An image's labels for each beta, logt and background of --sweep, in this order."""
    affinity, maps = affinity_of(net, sample, args, device), sample.maps.to(device)
    # The walk is linear: all backgrounds and the class maps take it together.
    seeds = random_walk.walk_seeds(maps, backgrounds, net.stride, kind)
    steps, tolerance = [2**logt for logt in args.logts], 0 if args.exact else random_walk.TOLERANCE
    for beta in args.betas:
        walk = args.radius, beta, args.full_graph
        transition = random_walk.transition_matrix(*affinity, *walk)
        for walked in random_walk.propagate_to(seeds, transition, steps, tolerance):
            upsampled = random_walk.upsample_scores(walked, maps.shape[-2:], net.stride)
            for background in upsampled[: len(backgrounds)]:
                scores = torch.cat([background[None], upsampled[len(backgrounds) :]])
                yield label_of(scores, sample)


def sweep(
    net: nn.Module,
    dataset: AffinityInferenceSet,
    run: Run,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Score the labels of all walks of --sweep; print the table, and write the named files."""
    devkit, num_labels = dataset.devkit, len(dataset.devkit.label_names)
    kind, values = ("bg", args.bgs) if args.bgs else ("alpha", args.alphas)
    settings = product(args.betas, args.logts, values)
    points = [{"beta": beta, "logt": logt, kind: value} for beta, logt, value in settings]
    counts = np.zeros((len(points), num_labels, num_labels), np.int64)
    with run, load_each(dataset, args.num_workers, device.type == "cuda") as samples:
        for sample in run.each(samples):
            mask = devkit.load_label(devkit.mask_path(sample.image_id), sample.maps.shape[-2:])
            labels = swept_labels(net, sample, kind, values, args, device)
            for count, label in zip(counts, labels, strict=True):
                count += confusion_matrix(mask, label, num_labels)
    counts = devices.sum_over_ranks(torch.from_numpy(counts)).numpy()
    if devices.is_main():
        result = sweep_figures(points, counts, len(run.todo), devkit.label_names)
        write_files(args, result, walk_heat_map)
        print(sweep_table(result))


def infer_list(args: argparse.Namespace, device: torch.device, stop: StopSignals) -> None:
    torch.manual_seed(args.seed)
    devkit = open_devkit(args)
    ids = read_ids(args.infer_list)
    args.trace_ids = choose_traced(args, ids)
    net = args.network.Net(radius=args.radius)
    load_for_inference(net, args.weights, print_main)
    to_device(net, device, Switches(args.amp, args.tf32, args.compile), "forward_features").eval()
    folders = output_folders(args, devkit)
    run = Run("infer_aff", ids, folders, stop, device, args.overwrite, args.skip_bad)
    if not args.skip_bad:
        devkit.require_images(run.todo)
        require_files(args.cam_dir, run.todo, ".npy", "infer_cls.py --out_cam makes them")
    dataset = AffinityInferenceSet(devkit, run.ids, net.normalize, args.cam_dir, args.normalize)
    if args.sweep:
        check_files(args, "infer_list", devkit)
        masks, hint = devkit.root / "SegmentationClass", "--sweep scores labels against masks"
        require_files(masks, ids, ".png", hint)
        sweep(net, dataset, run, args, device)
        return

    def walks_of(samples: Iterable[AffinitySample]) -> Iterator[Walk]:
        for sample in run.each(samples):
            with run.attempt(sample.image_id):
                yield make_walk(net, sample, args, device)

    with run, load_each(dataset, args.num_workers, device.type == "cuda") as samples:
        walks = walks_of(samples)
        while group := list(islice(walks, WALKS_AT_A_TIME[device.type])):
            write_labels(group, net.stride, args, run.write)


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    with join_ranks(args.device) as (device, stop):
        infer_list(args, device, stop)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
