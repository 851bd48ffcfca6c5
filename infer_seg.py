"""Stage 5: segment images by a trained segmenter, with no image-level labels.

The images of a list, as published for ResNet-38; for VGG-16, --scales 1 --crf_steps 10
--crf_bilateral 4 121 5:
    python3 infer_seg.py --network network.resnet38_seg --weights resnet38_seg.pth --crf
        --voc12_root VOC2012 --infer_list voc12/val.txt --out_seg SEG
Any photographs, drawn over:
    python3 infer_seg.py --network network.resnet38_seg --weights resnet38_seg.pth
        --images FOLDER more/photo.jpg --out_seg SEG --out_overlay OVERLAY
For VOC's test server:
    python3 infer_seg.py ... --infer_list voc12/test.txt --out_seg SEG --voc_submission results.tar

Several GPUs of one machine, or of several that share the folders:
    torchrun --nproc_per_node=4 infer_seg.py ...

Writes an index image <id>.png into SEG; the id of a photograph is its name without the ending.
With --images, photographs are turned as their EXIF orientation says.
Images that are there are skipped, so a command that was killed continues when it is repeated.
"""

import argparse
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tool.crf import dense_crf
from tool.files import atomic_write
from tool.maps import save_index_png, save_maps
from tool.run import cli, devices
from tool.run.devices import StopSignals, Switches, autocast, print_main, to_device
from tool.run.errors import UsageError
from tool.run.inference import Run, join_ranks, require_finite
from tool.run.loading import load_each
from tool.run.provenance import OutputFolder, digest, settings_of, weights_settings
from tool.segmentation import multi_scale_scores
from tool.weights import load_for_inference
from voc12.datasets import PhotographSample, PhotographSet
from voc12.devkit import (
    BACKGROUND,
    add_devkit_arguments,
    class_names_of,
    find_photographs,
    open_devkit,
    read_ids,
)
from voc12.report.pictures import save_overlay

OUTPUT_FOLDERS = {"out_seg": ".png", "out_overlay": ".png", "out_scores": ".npz"}
# Where VOC's test server looks for the labels of a method trained on other data.
SUBMISSION_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_network_argument(parser, cli.segmenter, default="network.resnet38_seg")
    cli.add_inference_arguments(parser)
    add_devkit_arguments(parser, labels=False, required=False)
    text = "photographs, or folders of them, in place of --voc12_root and --infer_list"
    add("--images", nargs="+", metavar="PATH", help=text)
    add("--out_seg", required=True, metavar="DIR", help="folder for the labels, index images")
    text = "folder for the labels drawn over the photographs, with a legend"
    add("--out_overlay", metavar="DIR", help=text)
    text = "folder for the labels' probabilities, maps {0: background, 1: first class, ...}"
    add("--out_scores", metavar="DIR", help=text)
    text = "archive of all labels, as VOC's test server takes it"
    add("--voc_submission", metavar="FILE.tar", help=text)
    text = "sizes at which the network sees an image, times its own; each also mirrored"
    scales = (0.5, 0.75, 1, 1.25, 1.5, 1.75)
    add("--scales", nargs="+", type=cli.positive, default=scales, help=text)
    add("--crf", action="store_true", help="refine the probabilities by the dense CRF")
    add("--crf_steps", type=cli.count, default=1, help="mean-field steps of --crf")
    add(
        "--crf_bilateral",
        nargs=3,
        type=cli.positive,
        default=(10, 32, 13),
        metavar=("WEIGHT", "SXY", "SRGB"),
        help="the bilateral term of --crf; the Gaussian term has weight 3 and sxy 3",
    )
    cli.add_crf_argument(parser)
    return parser


def choose_photographs(args: argparse.Namespace) -> dict[str, Path]:
    """The photographs that the flags name, by id."""
    if (args.images is None) == (args.voc12_root is None):
        raise UsageError("name --voc12_root and --infer_list, or --images.")
    if args.images:
        return find_photographs(args.images)
    devkit, ids = open_devkit(args), read_ids(args.infer_list)
    if not args.skip_bad:
        devkit.require_images(ids)
    for name in (*OUTPUT_FOLDERS, "voc_submission"):
        devkit.require_output(f"--{name}", getattr(args, name))
    return {image_id: devkit.image_path(image_id) for image_id in ids}


def output_folders(
    args: argparse.Namespace, photographs: dict[str, Path], class_names: Sequence[str]
) -> list[OutputFolder]:
    """The folders that were named, with what decides their content."""
    named = {name: Path(getattr(args, name)) for name in OUTPUT_FOLDERS if getattr(args, name)}
    inputs = {os.path.realpath(path.parent) for path in photographs.values()}
    for name, folder in named.items():
        if os.path.realpath(folder) in inputs:
            raise UsageError(f"--{name} {folder}: has photographs to segment; name another folder.")
    flags = ("network", "amp", "tf32", "compile", "scales", "crf", "crf_steps", "crf_bilateral")
    settings = settings_of(args, flags) | weights_settings(args.weights, args.seed)
    settings |= {"classes": digest(*class_names)}
    if args.images:  # other photographs may have the same names
        settings["images"] = " ".join(sorted(inputs))
    return [
        OutputFolder(f"infer_seg.py --{name}", folder, (OUTPUT_FOLDERS[name],), settings)
        for name, folder in named.items()
    ]


@torch.no_grad()
def segment(
    net: nn.Module, sample: PhotographSample, args: argparse.Namespace, device: torch.device
) -> np.ndarray:
    """The labels' probabilities in an image, float32 labels x H x W."""
    scaled = [image.to(device, non_blocking=True) for image in sample.scaled]
    with autocast(device, args.amp):
        scores = multi_scale_scores(net, scaled, sample.photograph.shape[:2]).cpu().numpy()
    require_finite(scores, sample.image_id, args.amp)
    if args.crf:
        weight, sxy, srgb = args.crf_bilateral
        (scores,) = dense_crf(
            sample.photograph,
            [scores],
            steps=args.crf_steps,
            bilateral_compat=weight,
            bilateral_sxy=sxy,
            bilateral_srgb=srgb,
            backend=args.crf_backend,
            device=device,
        )
    return scores


def write_outputs(
    sample: PhotographSample,
    scores: np.ndarray,
    label_names: Sequence[str],
    args: argparse.Namespace,
    write: Callable,
) -> None:
    """Write what an image's probabilities are asked for; ``write`` is ``Run.write``."""
    label = scores.argmax(axis=0).astype(np.uint8)
    if args.out_scores:
        path = Path(args.out_scores, f"{sample.image_id}.npz")
        write(save_maps, path, dict(enumerate(scores)), "float16")
    if args.out_overlay:
        path = Path(args.out_overlay, f"{sample.image_id}.png")
        write(save_overlay, path, Image.fromarray(sample.photograph), label, label_names)
    write(save_index_png, Path(args.out_seg, f"{sample.image_id}.png"), label)


def write_submission(path: str, folder: str, ids: Sequence[str]) -> None:
    """An archive of the labels in a folder, as VOC's test server takes it."""
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for image_id in ids:
            archive.add(Path(folder, f"{image_id}.png"), f"{SUBMISSION_FOLDER}/{image_id}.png")
    print(f"{path}: the labels of {len(ids)} images")


def infer_all(args: argparse.Namespace, device: torch.device, stop: StopSignals) -> None:
    torch.manual_seed(args.seed)
    class_names = class_names_of(args)
    photographs = choose_photographs(args)
    net = args.network.Net(num_classes=len(class_names))
    load_for_inference(net, args.weights, print_main)
    to_device(net, device, Switches(args.amp, args.tf32, args.compile), "forward").eval()
    folders = output_folders(args, photographs, class_names)
    run = Run("infer_seg", list(photographs), folders, stop, device, args.overwrite, args.skip_bad)
    own = [(image_id, photographs[image_id]) for image_id in run.ids]
    dataset = PhotographSet(own, net.normalize, args.scales, upright=bool(args.images))
    with run, load_each(dataset, args.num_workers, device.type == "cuda") as samples:
        for sample in run.each(samples):
            with run.attempt(sample.image_id):
                scores = segment(net, sample, args, device)
                write_outputs(sample, scores, (BACKGROUND, *class_names), args, run.write)
    if args.voc_submission and devices.is_main():
        write_submission(args.voc_submission, args.out_seg, run.all_ids)


def main(args: argparse.Namespace) -> None:
    if args.voc_submission and not args.voc_submission.endswith(".tar"):
        raise UsageError(f"--voc_submission {args.voc_submission}: must end in .tar.")
    cli.require_distinct_folders(args, *OUTPUT_FOLDERS)
    with join_ranks(args.device) as (device, stop):
        infer_all(args, device, stop)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
