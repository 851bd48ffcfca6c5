"""Stage 4: pixel-level pseudo labels, by a random walk of the class maps along affinities.

    python3 infer_aff.py --infer_list voc12/val.txt --voc12_root VOC2012
        --network network.vgg16_aff --weights vgg16_aff.pth --cam_dir CAM --out_rw RW
    python3 infer_aff.py ... --crf                                  sharpened by the dense CRF
    python3 infer_aff.py ... --trace WALKS --trace_ids 2007_000033  how the walk went, in pictures

Several GPUs of one machine, or of several that share the folders:
    torchrun --nproc_per_node=4 infer_aff.py --infer_list ...

CAM is what infer_cls.py wrote to --out_cam. Writes an index image <id>.png into RW. Images that are
there are skipped, so a command that was killed continues when it is repeated.
"""

import argparse
import os
from itertools import islice
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
from tool.maps import save_index_png
from tool.run import cli
from tool.run.devices import StopSignals, Switches, autocast, print_main, to_device
from tool.run.errors import UsageError
from tool.run.inference import Run, join_ranks
from tool.run.loading import load_each
from tool.run.provenance import OutputFolder, digest_maps, settings_of, weights_settings
from tool.weights import load_for_inference
from voc12.datasets import AffinityInferenceSet, AffinitySample
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids, require_files
from voc12.report.pictures import save_trace

# Walks of small grids leave a GPU waiting for launches; together they do not.
WALKS_AT_A_TIME = {"cpu": 1, "cuda": 8}
MAX_LOGT = 20  # a million steps


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_network_argument(parser, cli.affinity_network, default="network.vgg16_aff")
    cli.add_inference_arguments(parser)
    add_devkit_arguments(parser, labels=False)
    add("--cam_dir", required=True, metavar="DIR", help="class activation maps of stage 2")
    add("--out_rw", required=True, metavar="DIR", help="folder for the labels, index images")
    add("--alpha", type=cli.positive, default=16, help="background: (1 - max score)^alpha")
    add("--beta", type=cli.positive, default=8, help="exponent of the affinities")
    add("--logt", type=cli.number(int, 0, MAX_LOGT), default=8, help="the walk takes 2^logt steps")
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
    return parser


class Walk(NamedTuple):
    """One image, ready to walk."""

    sample: AffinitySample
    transition: Tensor  # N x N
    seeds: Tensor  # (classes + 1) x h x w, N = h * w


@torch.no_grad()
def make_walk(
    net: nn.Module, sample: AffinitySample, args: argparse.Namespace, device: torch.device
) -> Walk:
    """The transition matrix of an image's affinities, and its maps with the background."""
    image = random_walk.pad_to_multiple(sample.image.to(device, non_blocking=True), net.stride)
    height, width = (side // net.stride for side in image.shape[-2:])
    with autocast(device, args.amp):
        features = net.forward_features(image[None])
    affinity = pair_affinity(features, args.radius, args.full_graph)[0]
    transition = random_walk.transition_matrix(
        affinity, height, width, args.radius, args.beta, args.full_graph
    )
    seeds = random_walk.walk_seeds(
        sample.maps.to(device, non_blocking=True), args.alpha, net.stride
    )
    return Walk(sample, transition, seeds)


def label_of(
    scores: Tensor, sample: AffinitySample, stride: int, crf_backend: str | None = None
) -> np.ndarray:
    """The label that an image's scores on the grid, maps x h x w, give it: uint8 H x W.

    With a backend, they go through the dense CRF first.
    """
    upsampled = random_walk.upsample_scores(scores, sample.maps.shape[-2:], stride)
    if crf_backend:
        score_sets, device = [upsampled.cpu().numpy()], scores.device
        (refined,) = dense_crf(sample.photograph, score_sets, backend=crf_backend, device=device)
        upsampled = torch.from_numpy(refined)
    return index_image(upsampled.argmax(dim=0).cpu().numpy(), sample.classes)


def write_labels(walks: list[Walk], stride: int, args: argparse.Namespace) -> None:
    """Walk, and write each image's label and, where asked for, the pictures of its walk."""
    seeds, transitions = [walk.seeds for walk in walks], [walk.transition for walk in walks]
    tolerance = 0 if args.exact else random_walk.TOLERANCE
    walked = random_walk.propagate_together(seeds, transitions, 2**args.logt, tolerance)
    for walk, scores in zip(walks, walked, strict=True):
        label = label_of(scores, walk.sample, stride, args.crf_backend if args.crf else None)
        if walk.sample.image_id in args.trace_ids:
            draw_walk(walk, stride, args)
        save_index_png(Path(args.out_rw, f"{walk.sample.image_id}.png"), label)


def draw_walk(walk: Walk, stride: int, args: argparse.Namespace) -> None:
    """Write ``--trace``'s pictures of one image."""
    sample = walk.sample
    labels = {
        steps: label_of(scores, sample, stride)
        for steps, scores in random_walk.walk_trace(walk.seeds, walk.transition, args.logt).items()
    }
    save_trace(Path(args.trace, sample.image_id), Image.fromarray(sample.photograph), labels)


def output_folders(args: argparse.Namespace, devkit: Devkit) -> list[OutputFolder]:
    """The folders that were named, with what decides their content."""
    flags = ("radius", "alpha", "beta", "logt", "exact", "full_graph", "crf")
    settings = settings_of(args, ("network", "amp", "tf32", "compile", *flags))
    settings |= weights_settings(args.weights, args.seed) | {"cam_dir": digest_maps(args.cam_dir)}
    devkit.require_output("--out_rw", args.out_rw)
    folders = [OutputFolder("infer_aff.py --out_rw", Path(args.out_rw), (".png",), settings)]
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
    if os.path.realpath(args.trace) == os.path.realpath(args.out_rw):
        raise UsageError("--trace and --out_rw must be different folders: both get <id>.png.")
    unknown = [image_id for image_id in args.trace_ids or [] if image_id not in ids]
    if unknown:
        raise UsageError(f"--trace_ids: {unknown[0]} is not in {args.infer_list}.")
    return args.trace_ids or ids[:1]


def infer_list(args: argparse.Namespace, device: torch.device, stop: StopSignals) -> None:
    torch.manual_seed(args.seed)
    devkit = open_devkit(args)
    ids = read_ids(args.infer_list)
    args.trace_ids = choose_traced(args, ids)
    net = args.network.Net(radius=args.radius)
    load_for_inference(net, args.weights, print_main)
    to_device(net, device, Switches(args.amp, args.tf32, args.compile), "forward_features").eval()
    folders = output_folders(args, devkit)
    run = Run("infer_aff", ids, folders, stop, args.overwrite, args.skip_bad)
    if not args.skip_bad:
        devkit.require_images(run.todo)
        require_files(args.cam_dir, run.todo, ".npy", "infer_cls.py --out_cam makes them")
    dataset = AffinityInferenceSet(devkit, run.ids, net.normalize, args.cam_dir)
    with run, load_each(dataset, args.num_workers, device.type == "cuda") as samples:
        walks = (make_walk(net, sample, args, device) for sample in run.each(samples))
        while group := list(islice(walks, WALKS_AT_A_TIME[device.type])):
            write_labels(group, net.stride, args)


def main(args: argparse.Namespace) -> None:
    with join_ranks(args.device) as (device, stop):
        infer_list(args, device, stop)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
