"""Stage 4: pixel-level pseudo labels, by a random walk of the class maps along affinities.

    python3 infer_aff.py --infer_list voc12/val.txt --voc12_root VOC2012
        --network network.vgg16_aff --weights vgg16_aff.pth --cam_dir CAM --out_rw RW
    python3 infer_aff.py ... --crf                                  sharpened by the dense CRF
    python3 infer_aff.py ... --trace WALKS --trace_ids 2007_000033  how the walk went, in pictures

CAM is what infer_cls.py wrote to --out_cam. Writes an index image <id>.png into RW.
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tool import cli
from tool.affinity import pair_affinity
from tool.crf import dense_crf
from tool.distributed import choose_device, seed_generators
from tool.errors import UsageError
from tool.loading import load, single
from tool.maps import save_index_png
from tool.random_walk import (
    TOLERANCE,
    pad_to_multiple,
    propagate_together,
    transition_matrix,
    upsample_scores,
    walk_seeds,
    walk_trace,
)
from tool.weights import load_for_inference
from voc12.data import (
    AffinityInferenceSet,
    AffinitySample,
    add_devkit_arguments,
    index_image,
    open_devkit,
    read_ids,
    require_files,
)
from voc12.trace import save_trace

# Walks of small grids leave a GPU waiting for launches; together they do not.
WALKS_AT_A_TIME = {"cpu": 1, "cuda": 8}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.help_formatter)
    add = parser.add_argument
    cli.add_network_argument(parser, cli.affinity_network, default="network.vgg16_aff")
    cli.add_inference_arguments(parser)
    add_devkit_arguments(parser, labels=False)
    add("--cam_dir", required=True, metavar="DIR", help="class activation maps of stage 2")
    add("--out_rw", required=True, metavar="DIR", help="folder for the labels, index images")
    add("--alpha", type=cli.positive_float, default=16, help="background: (1 - max score)^alpha")
    add("--beta", type=cli.positive_float, default=8, help="exponent of the affinities")
    add("--logt", type=cli.walk_exponent, default=8, help="the walk takes 2^logt steps")
    cli.add_radius_argument(parser)
    add(
        "--exact",
        action="store_true",
        help="take every step of the walk, instead of a series that gives the scores to "
        f"{TOLERANCE:g} of the largest in a third of the time",
    )
    add(
        "--full_graph",
        action="store_true",
        help="pairs for the cells at the border, too, which the released code leaves with fewer "
        "or none; departs from the published numbers",
    )
    add(
        "--crf",
        action="store_true",
        help="refine the walk's scores by the dense CRF, as the paper does for its final labels",
    )
    add("--trace", metavar="DIR", help="pictures of the walk: a strip <id>.png and a film <id>.gif")
    add("--trace_ids", nargs="+", metavar="ID", help="the images of --trace (default: the first)")
    return parser


class Walk(NamedTuple):
    """One image, ready to walk."""

    sample: AffinitySample
    transition: Tensor  # N x N
    seeds: Tensor  # (classes + 1) x h x w, N = h * w


def walk_of(
    net: nn.Module, sample: AffinitySample, args: argparse.Namespace, device: torch.device
) -> Walk:
    image = pad_to_multiple(sample.image.to(device, non_blocking=True), net.stride)
    height, width = (side // net.stride for side in image.shape[-2:])
    affinity = pair_affinity(net.forward_features(image[None]), args.radius, args.full_graph)[0]
    transition = transition_matrix(affinity, height, width, args.radius, args.beta, args.full_graph)
    seeds = walk_seeds(sample.maps.to(device, non_blocking=True), args.alpha, net.stride)
    return Walk(sample, transition, seeds)


def label_of(
    scores: Tensor, sample: AffinitySample, stride: int, dataset: AffinityInferenceSet, crf: bool
) -> np.ndarray:
    """The label that an image's scores on the grid, maps x h x w, give it: uint8 H x W."""
    upsampled = upsample_scores(scores, sample.maps.shape[-2:], stride)
    if crf:
        image = np.array(dataset.devkit.load_image(sample.image_id))
        upsampled = torch.from_numpy(dense_crf(image, [upsampled.cpu().numpy()])[0])
    return index_image(upsampled.argmax(dim=0).cpu().numpy(), sample.classes)


def groups(samples: Iterable[AffinitySample], size: int) -> Iterator[list[AffinitySample]]:
    """The samples, ``size`` at a time."""
    samples = iter(samples)
    while group := list(islice(samples, size)):
        yield group


@torch.no_grad()
def infer(
    net: nn.Module, dataset: AffinityInferenceSet, args: argparse.Namespace, device: torch.device
) -> None:
    """Write every image's label."""
    tolerance = 0 if args.exact else TOLERANCE
    samples = load(dataset, range(len(dataset)), 1, args.num_workers, collate=single)
    bar = cli.progress(samples, "infer_aff", total=len(dataset))
    for group in groups(bar, WALKS_AT_A_TIME[device.type]):
        walks = [walk_of(net, sample, args, device) for sample in group]
        seeds, transitions = [walk.seeds for walk in walks], [walk.transition for walk in walks]
        walked = propagate_together(seeds, transitions, 2**args.logt, tolerance)
        for walk, scores in zip(walks, walked, strict=True):
            label = label_of(scores, walk.sample, net.stride, dataset, args.crf)
            save_index_png(Path(args.out_rw, f"{walk.sample.image_id}.png"), label)
            if walk.sample.image_id in args.trace_ids:
                draw_walk(walk, net.stride, dataset, args)


def draw_walk(
    walk: Walk, stride: int, dataset: AffinityInferenceSet, args: argparse.Namespace
) -> None:
    """Write ``--trace``'s pictures of one image."""
    sample = walk.sample
    labels = {
        steps: label_of(scores, sample, stride, dataset, crf=False)
        for steps, scores in walk_trace(walk.seeds, walk.transition, args.logt).items()
    }
    save_trace(
        Path(args.trace, sample.image_id), dataset.devkit.load_image(sample.image_id), labels
    )


def choose_traced(args: argparse.Namespace, ids: list[str]) -> list[str]:
    """The images to draw the walk of; raises UsageError for ids that the list does not have."""
    if not args.trace:
        if args.trace_ids:
            raise UsageError("--trace_ids needs --trace, the folder for the pictures.")
        return []
    if Path(args.trace).resolve() == Path(args.out_rw).resolve():
        raise UsageError("--trace and --out_rw must be different folders: both get <id>.png.")
    unknown = [image_id for image_id in args.trace_ids or [] if image_id not in ids]
    if unknown:
        raise UsageError(f"--trace_ids: {unknown[0]} is not in {args.infer_list}.")
    return args.trace_ids or ids[:1]


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    seed_generators(args.seed)
    devkit = open_devkit(args)
    ids = read_ids(args.infer_list)
    args.trace_ids = choose_traced(args, ids)
    devkit.require_images(ids)
    require_files(args.cam_dir, ids, ".npy", "infer_cls.py --out_cam makes them")
    net = args.network.Net(radius=args.radius)
    load_for_inference(net, args.weights, print)
    net.to(device).eval()
    infer(net, AffinityInferenceSet(devkit, ids, net.normalize, args.cam_dir), args, device)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
