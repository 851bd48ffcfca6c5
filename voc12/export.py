"""Writes pseudo labels as a devkit that segmentation frameworks can train on.

    python3 -m voc12.export --voc12_root VOC2012 --rw RW --list voc12/train_aug.txt --out OUT

RW is what infer_aff.py wrote to --out_rw for that list. Writes below OUT, which must not hold a
VOCdevkit,
    VOCdevkit/VOC2012/JPEGImages                    links to the photographs
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
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tool.files import make_folder
from tool.maps import open_image, save_index_png
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
    add("--copy", action="store_true", help="copy files; for a file system without links")
    return parser


def check(devkit: Devkit, labels: Path, train_ids: Sequence[str], val_ids: Sequence[str]) -> None:
    """Raise DataError if an image is in both lists, or a file is missing."""
    both = sorted(set(train_ids) & set(val_ids))
    if both:
        raise DataError(
            f"{both[0]}: is in --list and in --val_list ({len(both)} images are); remove it from "
            "one, as images that validate a segmenter must not train it."
        )
    devkit.require_images([*train_ids, *val_ids])
    require_files(labels, train_ids, ".png", "infer_aff.py --out_rw with the same list makes them")
    masks = devkit.root / "SegmentationClass"
    require_files(masks, val_ids, ".png", "a segmenter is validated with official masks")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under ``path`` complete, when the block ends without an error.

    Raises DataError if something exists there.
    """
    if path.exists():
        raise DataError(f"{path}: already exists; remove it, or name another --out.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    make_folder(temporary)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tree(
    root: Path,
    devkit: Devkit,
    labels: Path,
    train_ids: Sequence[str],
    val_ids: Sequence[str],
    copy: bool,
) -> None:
    """Write the devkit below ``root`` with links to images and masks, or copies of them.

    Raises DataError for an image that cannot be read, or a label that does not fit it.
    """

    def transfer(source: Path, target: Path) -> None:
        if copy:
            shutil.copyfile(source, target)
        else:
            target.symlink_to(source.resolve())

    images, masks, lists = (
        root / folder for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    )
    for folder in (images, masks, lists):
        folder.mkdir(parents=True)
    label_paths = {image_id: labels / f"{image_id}.png" for image_id in train_ids}
    mask_paths = {image_id: devkit.mask_path(image_id) for image_id in val_ids}
    for image_id, path in cli.progress((label_paths | mask_paths).items(), "export"):
        photograph, target = devkit.image_path(image_id), masks / f"{image_id}.png"
        width, height = open_image(photograph).size
        label = load_label(path, (height, width), len(devkit.class_names))
        transfer(photograph, images / f"{image_id}.jpg")
        if image_id in label_paths:
            save_index_png(target, label)
        else:
            transfer(path, target)
    if copy:
        shutil.copytree(masks, root / "SegmentationClassAug")
    else:
        (root / "SegmentationClassAug").symlink_to(masks.name)
    for name, ids in (("train", train_ids), ("aug", train_ids), ("val", val_ids)):
        (lists / f"{name}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))


def main(args: argparse.Namespace) -> None:
    devkit = open_devkit(args)
    devkit.require_output("--out", args.out)
    train_ids, val_ids = (
        list(dict.fromkeys(read_ids(path))) for path in (args.list, args.val_list)
    )
    labels, out = Path(args.rw), Path(args.out, "VOCdevkit")
    check(devkit, labels, train_ids, val_ids)
    with new_folder(out) as folder:
        write_tree(folder / "VOC2012", devkit, labels, train_ids, val_ids, args.copy)
    print(
        f"{out / 'VOC2012'}: {len(train_ids)} images with pseudo labels to train with, "
        f"{len(val_ids)} with official masks to validate with\n"
        f"torchvision: --dataset voc --data-path {args.out}\n"
        f"mmsegmentation: ln -s {out.resolve()} data/VOCdevkit"
    )


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
