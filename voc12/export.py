"""Writes pseudo labels as a devkit that segmentation frameworks can train on.

    python3 -m voc12.export --voc12_root VOC2012 --rw RW --list voc12/train_aug.txt --out OUT

RW is what infer_aff.py wrote to --out_rw for that list. Writes below OUT, which must not hold a
VOCdevkit,
    VOCdevkit/VOC2012/JPEGImages                    links to the photographs, as <id>.jpg
    VOCdevkit/VOC2012/SegmentationClass             the pseudo labels of --list with VOC's palette;
                                                    links to the official masks of --val_list
    VOCdevkit/VOC2012/SegmentationClassAug          a link to SegmentationClass
    VOCdevkit/VOC2012/ImageSets/Segmentation        train.txt and aug.txt: the ids of --list;
                                                    val.txt: those of --val_list
torchvision's references read it with --dataset voc --data-path OUT, mmsegmentation's VOC configs
with OUT/VOCdevkit in data/. The configs named voc12aug join train.txt and aug.txt; these are equal
here, so that every image counts twice.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from tool.files import link_or_copy, make_folder, write_bytes
from tool.maps import open_image, save_index_png
from tool.run import cli
from tool.run.errors import DataError
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids, require_files


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m voc12.export")
    add = parser.add_argument
    add_devkit_arguments(parser, labels=False)
    add("--rw", required=True, metavar="DIR", help="pseudo labels <id>.png, index images")
    add("--list", default="voc12/train_aug.txt", help="images to train a segmenter with")
    add("--val_list", default="voc12/val.txt", help="images to validate it with")
    add("--out", required=True, metavar="DIR", help="folder for the tree VOCdevkit/VOC2012")
    add("--copy", action="store_true", help="copy files; for a file system without links")
    return parser


def write_tree(
    root: Path, devkit: Devkit, labels: dict[str, Path], masks: dict[str, Path], copy: bool
) -> None:
    """Write the devkit below ``root`` with links to images and masks, or copies of them.

    ``labels`` and ``masks`` are by image id, to train and to validate with. Raises DataError for an
    image that cannot be read, or a label that does not fit it.
    """
    for image_id, path in cli.progress((labels | masks).items(), "export"):
        photograph = devkit.image_path(image_id)
        width, height = open_image(photograph).size
        label = devkit.load_label(path, (height, width))
        link_or_copy(photograph, root / "JPEGImages" / f"{image_id}.jpg", copy)
        target = root / "SegmentationClass" / f"{image_id}.png"
        if image_id in labels or open_image(path).tobytes() != label.tobytes():  # reordered indices
            save_index_png(target, label)
        else:
            link_or_copy(path, target, copy)
    for paths in (labels, masks):
        devkit.require_classes(paths.values())
    if copy:
        shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    else:
        (root / "SegmentationClassAug").symlink_to("SegmentationClass")
    for name, ids in (("train", labels), ("aug", labels), ("val", masks)):
        text = "".join(f"{image_id}\n" for image_id in ids)
        write_bytes(root / "ImageSets" / "Segmentation" / f"{name}.txt", text.encode())


def main(args: argparse.Namespace) -> None:
    devkit = open_devkit(args)
    devkit.require_output("--out", args.out)
    labels = {image_id: Path(args.rw, f"{image_id}.png") for image_id in read_ids(args.list)}
    masks = {image_id: devkit.mask_path(image_id) for image_id in read_ids(args.val_list)}
    if both := labels.keys() & masks.keys():
        raise DataError(f"{min(both)}: is in --list and --val_list; remove it from one.")
    devkit.require_images([*labels, *masks])
    hint = "infer_aff.py --out_rw with the same list makes them"
    require_files(args.rw, list(labels), ".png", hint)
    hint = "a segmenter is validated with official masks"
    require_files(devkit.root / "SegmentationClass", list(masks), ".png", hint)
    out = Path(args.out, "VOCdevkit")
    if out.exists():
        raise DataError(f"{out}: already exists; remove it, or name another --out.")
    make_folder(out.parent)
    # The tree appears complete or not at all.
    with TemporaryDirectory(prefix=".VOCdevkit.", dir=out.parent) as temporary:
        write_tree(Path(temporary, "VOCdevkit", "VOC2012"), devkit, labels, masks, args.copy)
        Path(temporary, "VOCdevkit").rename(out)
    print(
        f"{out / 'VOC2012'}: {len(labels)} images with pseudo labels to train with, "
        f"{len(masks)} with official masks to validate with\n"
        f"torchvision: --dataset voc --data-path {args.out}\n"
        f"mmsegmentation: ln -s {out.resolve()} data/VOCdevkit"
    )


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
