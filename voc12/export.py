"""Writes pseudo labels as a devkit that frameworks for segmentation read, to train a segmenter.

    python3 -m voc12.export --voc12_root VOC2012 --rw RW --list voc12/train_aug.txt --out OUT

RW is what infer_aff.py wrote to --out_rw for that list. Writes below OUT, where nothing may be yet,
    VOCdevkit/VOC2012/JPEGImages                    links to the photographs
    VOCdevkit/VOC2012/SegmentationClass             the pseudo labels of --list with VOC's palette;
                                                    links to the official masks of --val_list
    VOCdevkit/VOC2012/SegmentationClassAug          a link to SegmentationClass
    VOCdevkit/VOC2012/ImageSets/Segmentation        train.txt and aug.txt: the ids of --list;
                                                    val.txt: those of --val_list
torchvision's references read it with --dataset voc --data-path OUT, mmsegmentation's VOC configs
where OUT/VOCdevkit lies in data/. Those named voc12aug join train.txt and aug.txt: here they are
the same, so each image counts twice, all alike.
"""

import argparse
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tool.files import make_folder
from tool.maps import load_index_png, open_image, save_index_png
from tool.run import cli
from tool.run.errors import DataError
from voc12.devkit import (
    Devkit,
    add_devkit_arguments,
    load_label,
    open_devkit,
    read_ids,
    require_files,
)

DEVKIT, YEAR = "VOCdevkit", "VOC2012"
Place = Callable[[Path, Path], object]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m voc12.export", description=__doc__, formatter_class=cli.help_formatter
    )
    add = parser.add_argument
    add_devkit_arguments(parser, labels=False)
    add("--rw", required=True, metavar="DIR", help="pseudo labels <id>.png, index images")
    add("--list", default="voc12/train_aug.txt", help="images to train a segmenter with")
    add("--val_list", default="voc12/val.txt", help="images to validate it with")
    add("--out", required=True, metavar="DIR", help="folder for the tree VOCdevkit/VOC2012")
    add(
        "--copy",
        action="store_true",
        help="copy the photographs and official masks, so that the tree stands by itself (links "
        "that fail are copies anyhow)",
    )
    return parser


def check(devkit: Devkit, labels: Path, train_ids: Sequence[str], val_ids: Sequence[str]) -> None:
    """Raise DataError unless every image has its photograph and a label that fits it."""
    both = sorted(set(train_ids) & set(val_ids))
    if both:
        raise DataError(
            f"{both[0]}: is in --list and in --val_list ({len(both)} are), but what validates a "
            "segmenter must not train it."
        )
    devkit.require_images([*train_ids, *val_ids])
    require_files(labels, train_ids, ".png", "infer_aff.py --out_rw with the same list makes them")
    masks = devkit.root / "SegmentationClass"
    require_files(masks, val_ids, ".png", "a segmenter is validated with official masks")
    paths = [labels / f"{i}.png" for i in train_ids] + [devkit.mask_path(i) for i in val_ids]
    images = [devkit.image_path(image_id) for image_id in (*train_ids, *val_ids)]
    for path, image in cli.progress(list(zip(paths, images, strict=True)), "check"):
        width, height = open_image(image).size
        load_label(path, (height, width), len(devkit.class_names))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under ``path`` complete, when the block ends without an error.

    Raises DataError if there is something already.
    """
    if path.exists():
        raise DataError(f"{path}: is there already; remove it, or name another --out.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    make_folder(temporary)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """A link to a file, or a copy where the file system has no links."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def write_tree(
    root: Path,
    devkit: Devkit,
    labels: Path,
    train_ids: Sequence[str],
    val_ids: Sequence[str],
    place: Place,
) -> None:
    """Write the devkit below ``root``; ``place(source, target)`` links or copies a file."""
    images, masks, lists = (
        root / folder
        for folder in ("JPEGImages", "SegmentationClass", os.path.join("ImageSets", "Segmentation"))
    )
    for folder in (images, masks, lists):
        folder.mkdir(parents=True)
    for image_id in cli.progress([*train_ids, *val_ids], "photographs"):
        place(devkit.image_path(image_id), images / f"{image_id}.jpg")
    for image_id in cli.progress(train_ids, "labels"):
        save_index_png(masks / f"{image_id}.png", load_index_png(labels / f"{image_id}.png"))
    for image_id in val_ids:
        place(devkit.mask_path(image_id), masks / f"{image_id}.png")
    try:
        (root / "SegmentationClassAug").symlink_to(masks.name)
    except OSError:
        shutil.copytree(masks, root / "SegmentationClassAug", symlinks=True)
    for name, ids in (("train", train_ids), ("aug", train_ids), ("val", val_ids)):
        (lists / f"{name}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))


def main(args: argparse.Namespace) -> None:
    devkit = open_devkit(args)
    devkit.require_output("--out", args.out)
    train_ids, val_ids = (
        list(dict.fromkeys(read_ids(path))) for path in (args.list, args.val_list)
    )
    labels, out = Path(args.rw), Path(args.out, DEVKIT)
    with new_folder(out) as folder:
        check(devkit, labels, train_ids, val_ids)
        place = shutil.copyfile if args.copy else link_or_copy
        write_tree(folder / YEAR, devkit, labels, train_ids, val_ids, place)
    print(
        f"{out / YEAR}: {len(train_ids)} images with pseudo labels to train with, {len(val_ids)} "
        f"with official masks to validate with\ntorchvision: --dataset voc --data-path {args.out}\n"
        f"mmsegmentation: ln -s {out.resolve()} data/{DEVKIT}"
    )


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
