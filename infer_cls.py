"""Stage 2: class activation maps of images, and the CRF scores that stage 3 learns from.

    python3 infer_cls.py --infer_list voc12/train_aug.txt --voc12_root VOC2012
        --network network.vgg16_cls --weights vgg16_cls.pth
        --out_cam CAM --out_la_crf LA --out_ha_crf HA
    python3 infer_cls.py --infer_list voc12/val.txt --voc12_root VOC2012
        --network network.resnet38_cls --weights resnet38_cls.pth --out_cam_pred PRED

Several GPUs of one machine, or of several that share the folders:
    torchrun --nproc_per_node=4 infer_cls.py --infer_list ...

Writes a file <id>.npy (maps) or <id>.png (index image) into each folder that is named. Images whose
files are all there are skipped, so a command that was killed goes on when it is repeated.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tool.cam import BACKGROUND_SCORE, fixed_background_label, multi_scale_cam
from tool.crf import background_and_maps, dense_crf
from tool.labels import index_image
from tool.maps import MAP_FORMATS, save_index_png, save_maps
from tool.run import cli
from tool.run.checkpoint import digest
from tool.run.devices import (
    StopSignals,
    autocast,
    choose_device,
    configure_backends,
    print_main,
    process_group,
    seed_generators,
    to_device,
)
from tool.run.errors import UsageError
from tool.run.inference import LONGEST_WAIT, Run, settings_of
from tool.run.loading import load_each
from tool.run.outputs import OutputFolder
from tool.weights import load_for_inference
from voc12.datasets import MultiScaleSet
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.help_formatter)
    add = parser.add_argument
    cli.add_network_argument(parser, cli.classifier, default="network.vgg16_cls")
    cli.add_inference_arguments(parser)
    add_devkit_arguments(parser)
    add("--low_alpha", type=cli.positive_float, default=4, help="background exponent, --out_la_crf")
    add("--high_alpha", type=cli.positive_float, default=32, help="the same of --out_ha_crf")
    add("--out_cam", metavar="DIR", help="folder for class activation maps")
    add("--out_la_crf", metavar="DIR", help="folder for CRF scores with the low alpha")
    add("--out_ha_crf", metavar="DIR", help="folder for CRF scores with the high alpha")
    add("--out_cam_pred", metavar="DIR", help="folder for index images, background score 0.2")
    add(
        "--out_format",
        choices=MAP_FORMATS,
        default="npy",
        help="of maps: the field's pickled dicts, or compressed archives without pickle; every "
        "program reads both",
    )
    add(
        "--out_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of maps; float16 takes half the space and rounds to three digits",
    )
    cli.add_crf_argument(parser)
    add(
        "--scales",
        nargs="+",
        type=cli.positive_float,
        default=(1, 0.5, 1.5, 2),
        help="sizes at which an image is seen, times its own; each also mirrored",
    )
    return parser


def output_folders(args: argparse.Namespace, devkit: Devkit) -> list[OutputFolder]:
    """The folders that were named, with what decides their content."""
    classes = {"classes": digest(*devkit.class_names)}
    common = settings_of(args, "scales") | classes
    stored = settings_of(args, "scales", "out_format", "out_dtype") | classes
    suffix = MAP_FORMATS[args.out_format]
    kinds = {
        "out_cam": (suffix, stored),
        "out_la_crf": (suffix, stored | settings_of(args, "low_alpha")),
        "out_ha_crf": (suffix, stored | settings_of(args, "high_alpha")),
        "out_cam_pred": (".png", common),
    }
    return [
        OutputFolder(f"infer_cls.py --{flag}", Path(getattr(args, flag)), (suffix,), settings)
        for flag, (suffix, settings) in kinds.items()
        if getattr(args, flag)
    ]


def crf_outputs(args: argparse.Namespace) -> list[tuple[str, float]]:
    """The folders for CRF scores that were named, each with its alpha."""
    outputs = ((args.out_la_crf, args.low_alpha), (args.out_ha_crf, args.high_alpha))
    return [(folder, alpha) for folder, alpha in outputs if folder]


class MapsForm(NamedTuple):
    """How maps are stored."""

    suffix: str
    dtype: str

    def write(self, folder: str, image_id: str, classes: Sequence[int], maps: np.ndarray) -> None:
        """Write one image's maps, classes x H x W."""
        path = Path(folder, image_id + self.suffix)
        save_maps(path, dict(zip(classes, maps, strict=True)), self.dtype)


def maps_form(args: argparse.Namespace) -> MapsForm:
    return MapsForm(MAP_FORMATS[args.out_format], args.out_dtype)


def write_cam(
    args: argparse.Namespace, image_id: str, classes: Sequence[int], maps: np.ndarray
) -> None:
    """Write one image's maps (present classes x H x W), and the labels that they give at once."""
    if args.out_cam:
        maps_form(args).write(args.out_cam, image_id, classes, maps)
    if args.out_cam_pred:
        label = index_image(fixed_background_label(maps, BACKGROUND_SCORE), classes)
        save_index_png(Path(args.out_cam_pred, f"{image_id}.png"), label)


def write_crf_scores(
    outputs: Sequence[tuple[str, float]],
    form: MapsForm,
    backend: str,
    device: torch.device,
    image_id: str,
    image: np.ndarray,
    classes: Sequence[int],
    maps: np.ndarray,
) -> None:
    """Write one image's CRF scores to each of the outputs, (folder, alpha)."""
    score_sets = [background_and_maps(maps, alpha) for _, alpha in outputs]
    results = dense_crf(image, score_sets, backend=backend, device=device)
    for (folder, _), scores in zip(outputs, results, strict=True):
        form.write(folder, image_id, [0, *(k + 1 for k in classes)], scores)


@torch.no_grad()
def infer(
    net: nn.Module,
    dataset: MultiScaleSet,
    args: argparse.Namespace,
    device: torch.device,
    run: Run,
) -> None:
    """Write the outputs of every image of the dataset, which are the run's."""
    outputs = crf_outputs(args)
    write_crf = partial(write_crf_scores, outputs, maps_form(args), args.crf_backend, device)
    for sample in run.each(load_each(dataset, args.num_workers)):
        classes = np.flatnonzero(sample.label).tolist()
        scaled = [image.to(device, non_blocking=True) for image in sample.scaled]
        with autocast(device, args.amp):
            cam = multi_scale_cam(net, scaled, sample.photograph.shape[:2], classes)
        maps = cam.cpu().numpy()
        write_cam(args, sample.image_id, classes, maps)
        if outputs:
            write_crf(sample.image_id, sample.photograph, classes, maps)


def check_output_folders(args: argparse.Namespace) -> None:
    """Raise UsageError if no folder is named, or one twice for files of the same name."""
    map_folders = [
        os.path.realpath(folder)
        for folder in (args.out_cam, args.out_la_crf, args.out_ha_crf)
        if folder
    ]
    if not (map_folders or args.out_cam_pred):
        raise UsageError(
            "name at least one of --out_cam, --out_la_crf, --out_ha_crf, --out_cam_pred."
        )
    if len(set(map_folders)) < len(map_folders):
        raise UsageError(
            "--out_cam, --out_la_crf and --out_ha_crf must be different folders: "
            "their files have the same names."
        )


def infer_list(args: argparse.Namespace, device: torch.device, stop: StopSignals) -> None:
    seed_generators(args.seed)
    devkit = open_devkit(args)
    for name in ("out_cam", "out_la_crf", "out_ha_crf", "out_cam_pred"):
        devkit.require_output(f"--{name}", getattr(args, name))
    ids = read_ids(args.infer_list)
    net = args.network.Net(num_classes=len(devkit.class_names))
    load_for_inference(net, args.weights, print_main)
    to_device(net, device, args, "forward_cam").eval()
    run = Run("infer_cls", args, ids, output_folders(args, devkit), stop)
    if not args.skip_bad:
        print_main(devkit.require_labelled_images(run.todo))
    dataset = MultiScaleSet(devkit, run.ids, net.normalize, args.scales)
    with run:
        infer(net, dataset, args, device, run)


def main(args: argparse.Namespace) -> None:
    check_output_folders(args)
    device = choose_device(args.device)
    configure_backends(device, args, fixed_size=False)
    with process_group(device, LONGEST_WAIT), StopSignals() as stop:
        infer_list(args, device, stop)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
