"""Stage 4: pixel-level pseudo labels, by a random walk of the class maps along affinities.

    python3 infer_aff.py --infer_list voc12/val.txt --voc12_root VOC2012
        --network network.vgg16_aff --weights vgg16_aff.pth --cam_dir CAM --out_rw RW

CAM is what infer_cls.py wrote to --out_cam. Writes an index image <id>.png into RW.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tool import cli
from tool.distributed import choose_device, seed_torch
from tool.loading import load, single
from tool.maps import save_index_png
from tool.random_walk import pad_to_multiple, random_walk_label, transition_matrix
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
    add("--logt", type=cli.non_negative_int, default=8, help="the walk takes 2^logt steps")
    cli.add_radius_argument(parser)
    return parser


def label_of(
    net: nn.Module, sample: AffinitySample, args: argparse.Namespace, device: torch.device
) -> np.ndarray:
    """The random walk's label of one image: uint8 H x W."""
    image = pad_to_multiple(sample.image.to(device), net.stride)
    height, width = (side // net.stride for side in image.shape[-2:])
    affinity = net(image[None])[0]
    transition = transition_matrix(affinity, height, width, args.radius, args.beta)
    maps = sample.maps.to(device)
    label, _ = random_walk_label(maps, transition, args.alpha, 2**args.logt, net.stride)
    return index_image(label.cpu().numpy(), sample.classes)


@torch.no_grad()
def infer(
    net: nn.Module, dataset: AffinityInferenceSet, args: argparse.Namespace, device: torch.device
) -> None:
    """Write every image's label."""
    samples = load(dataset, range(len(dataset)), 1, args.num_workers, collate=single)
    for sample in cli.progress(samples, "infer_aff", total=len(dataset)):
        label = label_of(net, sample, args, device)
        save_index_png(Path(args.out_rw, f"{sample.image_id}.png"), label)


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    seed_torch(args.seed)
    devkit = open_devkit(args)
    ids = read_ids(args.infer_list)
    devkit.require_images(ids)
    require_files(args.cam_dir, ids, ".npy", "infer_cls.py --out_cam makes them")
    net = args.network.Net(radius=args.radius)
    load_for_inference(net, args.weights, print)
    net.to(device).eval()
    infer(net, AffinityInferenceSet(devkit, ids, net.normalize, args.cam_dir), args, device)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
