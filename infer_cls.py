"""Stage 2: class activation maps of images, and the CRF scores that stage 3 learns from.

    python3 infer_cls.py --infer_list voc12/train_aug.txt --voc12_root VOC2012
        --network network.vgg16_cls --weights vgg16_cls.pth
        --out_cam CAM --out_la_crf LA --out_ha_crf HA
    python3 infer_cls.py --infer_list voc12/val.txt --voc12_root VOC2012
        --network network.resnet38_cls --weights resnet38_cls.pth --out_cam_pred PRED
    python3 infer_cls.py --infer_list voc12/train_aug.txt --voc12_root VOC2012
        --cam_dir SEEDS --out_la_crf LA --out_ha_crf HA     from class maps of any method

Several GPUs of one machine, or of several that share the folders:
    torchrun --nproc_per_node=4 infer_cls.py --infer_list ...

Writes a file <id>.npy (maps) or <id>.png (index image) into each folder that is named. Images whose
files are all there are skipped, so a command that was killed continues when it is repeated.

With --cam_dir, the present classes are those that have a map; a --label_file that is named leaves
out those that an image does not have there. docs/seeds.md lists the forms of maps.
"""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tool.cam import BACKGROUND_SCORE, fixed_background_label, multi_scale_cam
from tool.crf import background_and_maps, dense_crf
from tool.labels import index_image
from tool.maps import MAP_FORMATS, save_index_png, save_maps
from tool.run import cli
from tool.run.devices import StopSignals, Switches, autocast, print_main, to_device
from tool.run.errors import DataError, UsageError
from tool.run.inference import Run, join_ranks, require_finite
from tool.run.loading import load_each
from tool.run.provenance import OutputFolder, digest, digest_maps, settings_of, weights_settings
from tool.weights import load_for_inference
from voc12.datasets import AffinityInferenceSet, AffinitySample, MultiScaleSample, MultiScaleSet
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids, require_files

MAP_FOLDERS = ("out_cam", "out_la_crf", "out_ha_crf")
OUTPUT_FOLDERS = (*MAP_FOLDERS, "out_cam_pred")
# Bytes that a pixel of a CAM and of a CRF score take on a disk, by --out_format and --out_dtype:
# measured on photographs of VOC, see docs/data.md.
BYTES_OF_MAPS = {
    ("npy", "float32"): (4, 4),
    ("npy", "float16"): (2, 2),
    ("npz", "float32"): (3, 2.6),
    ("npz", "float16"): (1.4, 0.5),
}
IMAGES_ESTIMATED = 8


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_network_argument(parser, cli.classifier, default="network.vgg16_cls")
    cli.add_inference_arguments(parser, weights_required=False)
    text = "class maps of any method, in place of --weights; --network, --scales ... do nothing"
    add("--cam_dir", metavar="DIR", help=text)
    cli.add_normalize_argument(parser)
    add_devkit_arguments(parser)
    add("--low_alpha", type=cli.positive, default=4, help="background exponent of --out_la_crf")
    add("--high_alpha", type=cli.positive, default=32, help="background exponent of --out_ha_crf")
    add("--out_cam", metavar="DIR", help="folder for class activation maps")
    add("--out_la_crf", metavar="DIR", help="folder for CRF scores with the low alpha")
    add("--out_ha_crf", metavar="DIR", help="folder for CRF scores with the high alpha")
    add("--out_cam_pred", metavar="DIR", help="folder for index images, background score 0.2")
    text = "of maps: pickled dicts, or compressed archives without pickle; all programs read both"
    add("--out_format", choices=MAP_FORMATS, default="npy", help=text)
    text = "of maps; float16 takes half the space and rounds to three digits"
    add("--out_dtype", choices=("float32", "float16"), default="float32", help=text)
    cli.add_crf_argument(parser)
    text = "sizes at which the network sees an image, times its own; each also mirrored"
    add("--scales", nargs="+", type=cli.positive, default=(1, 0.5, 1.5, 2), help=text)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError if no folder is named, or one twice for files of the same name."""
    if bool(args.weights) == bool(args.cam_dir):
        raise UsageError("name either --weights of the network, or --cam_dir with class maps.")
    if args.normalize and not args.cam_dir:
        raise UsageError("--normalize scales the class maps of --cam_dir; name their folder.")
    named = [name for name in OUTPUT_FOLDERS if getattr(args, name)]
    if not named:
        raise UsageError(f"name at least one of {', '.join(f'--{n}' for n in OUTPUT_FOLDERS)}.")
    cli.require_distinct_folders(args, "cam_dir", *MAP_FOLDERS)


def source_settings(args: argparse.Namespace) -> dict[str, str]:
    """What decides the class maps: the network, or the files of --cam_dir."""
    if not args.cam_dir:
        settings = settings_of(args, ("network", "amp", "tf32", "compile", "scales"))
        return settings | weights_settings(args.weights, args.seed)
    labels = Path(args.label_file).read_bytes() if args.label_file else b""
    settings = {"cam_dir": digest_maps(args.cam_dir), "label_file": digest(labels)}
    return settings | settings_of(args, ["normalize"])


def output_folders(args: argparse.Namespace, devkit: Devkit) -> list[OutputFolder]:
    """The folders that were named, with what decides their content."""
    pictures = source_settings(args) | {"classes": digest(*devkit.class_names)}
    maps = pictures | settings_of(args, ("out_format", "out_dtype"))
    settings = {
        "out_cam": maps,
        "out_la_crf": maps | settings_of(args, ["low_alpha"]),
        "out_ha_crf": maps | settings_of(args, ["high_alpha"]),
        "out_cam_pred": pictures,
    }
    folders = []
    for name in OUTPUT_FOLDERS:
        devkit.require_output(f"--{name}", getattr(args, name))
        if getattr(args, name):
            suffix = MAP_FORMATS[args.out_format] if name in MAP_FOLDERS else ".png"
            path = Path(getattr(args, name))
            folders.append(OutputFolder(f"infer_cls.py --{name}", path, (suffix,), settings[name]))
    return folders


def write_outputs(
    sample: MultiScaleSample | AffinitySample,
    classes: Sequence[int],
    maps: np.ndarray,
    args: argparse.Namespace,
    device: torch.device,
    write: Callable,
) -> None:
    """Write (by ``Run.write``) an image's maps, float32 classes x H x W, and what they give."""

    def write_maps(folder: str, keys: Sequence[int], values: np.ndarray) -> None:
        path = Path(folder, sample.image_id + MAP_FORMATS[args.out_format])
        write(save_maps, path, dict(zip(keys, values, strict=True)), args.out_dtype)

    if args.out_cam:
        write_maps(args.out_cam, classes, maps)
    if args.out_cam_pred:
        label = index_image(fixed_background_label(maps, BACKGROUND_SCORE), classes)
        write(save_index_png, Path(args.out_cam_pred, f"{sample.image_id}.png"), label)
    crf_outputs = ((args.out_la_crf, args.low_alpha), (args.out_ha_crf, args.high_alpha))
    crf_outputs = [(folder, alpha) for folder, alpha in crf_outputs if folder]
    if crf_outputs:
        score_sets = [background_and_maps(maps, alpha) for _, alpha in crf_outputs]
        refined = dense_crf(sample.photograph, score_sets, backend=args.crf_backend, device=device)
        for (folder, _), scores in zip(crf_outputs, refined, strict=True):
            write_maps(folder, [0, *(k + 1 for k in classes)], scores)


@torch.no_grad()
def infer_image(
    net: nn.Module, sample: MultiScaleSample, device: torch.device, amp: str | None
) -> tuple[list[int], np.ndarray]:
    """The classes that are present, and their maps float32 classes x H x W in 0..1."""
    classes = np.flatnonzero(sample.label).tolist()
    scaled = [image.to(device, non_blocking=True) for image in sample.scaled]
    with autocast(device, amp):
        cam = multi_scale_cam(net, scaled, sample.photograph.shape[:2], classes)
    maps = cam.cpu().numpy()
    require_finite(maps, sample.image_id, amp)
    return classes, maps


def warn_of_full_disk(
    args: argparse.Namespace, dataset: MultiScaleSet | AffinityInferenceSet, num_images: int
) -> None:
    """Print a warning if the maps, by an estimate from a few images, do not fit on a disk."""
    cam, crf = BYTES_OF_MAPS[args.out_format, args.out_dtype]
    folders = {n: Path(getattr(args, n)).absolute() for n in MAP_FOLDERS if getattr(args, n)}
    sizes = []  # of an image's files
    for index in range(0, len(dataset), max(1, len(dataset) // IMAGES_ESTIMATED)):
        with contextlib.suppress(DataError):  # reported when it is its turn
            sample = dataset[index]
            classes = len(sample.classes) if args.cam_dir else sample.label.sum()
            pixels = sample.photograph.size / 3
            of_pixel = [cam * classes if n == "out_cam" else crf * (classes + 1) for n in folders]
            sizes.append(pixels * sum(of_pixel))
    if not sizes or not folders:
        return
    needed = num_images * np.mean(sizes)
    there = (next(filter(Path.exists, (path, *path.parents))) for path in folders.values())
    free = min(shutil.disk_usage(path).free for path in there)
    if needed > free:
        figures = f"about {needed / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free"
        print_main(f"WARNING: the maps need {figures}; see --out_format and --out_dtype.")


def infer_list(args: argparse.Namespace, device: torch.device, stop: StopSignals) -> None:
    torch.manual_seed(args.seed)
    devkit = open_devkit(args)
    ids = read_ids(args.infer_list)
    if not args.cam_dir:
        net = args.network.Net(num_classes=len(devkit.class_names))
        load_for_inference(net, args.weights, print_main)
        switches = Switches(args.amp, args.tf32, args.compile)
        to_device(net, device, switches, "forward_cam").eval()
    folders = output_folders(args, devkit)
    run = Run("infer_cls", ids, folders, stop, device, args.overwrite, args.skip_bad)
    if not args.skip_bad:
        devkit.require_images(run.todo)
        if args.cam_dir:
            require_files(args.cam_dir, run.todo, ".npy", "--cam_dir needs maps of all images")
        if args.label_file or not args.cam_dir:
            print_main(devkit.require_labelled_images(run.todo))
    if args.cam_dir:  # no network, hence no normalization of its images
        maps = args.cam_dir, args.normalize, args.label_file is not None
        dataset = AffinityInferenceSet(devkit, run.ids, np.asarray, *maps)
    else:
        dataset = MultiScaleSet(devkit, run.ids, net.normalize, args.scales)
    warn_of_full_disk(args, dataset, len(run.todo))
    pinned = device.type == "cuda"
    with run, load_each(dataset, args.num_workers, pinned) as samples:
        for sample in run.each(samples):
            with run.attempt(sample.image_id):
                if args.cam_dir:
                    classes, maps = sample.classes, sample.maps.numpy()
                else:
                    classes, maps = infer_image(net, sample, device, args.amp)
                write_outputs(sample, classes, maps, args, device, run.write)


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    with join_ranks(args.device) as (device, stop):
        infer_list(args, device, stop)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
