"""Writes the id lists and the image-level labels that the four programs read, from a devkit.

    python3 -m voc12.prepare --voc12_root VOC2012

Writes into --out_dir (voc12/ by default)
    train.txt, val.txt, test.txt  from the devkit's ImageSets/Segmentation;
    train_aug.txt                 every id with a mask in SegmentationClassAug that is not in val,
                                  or, with --sbd_root, every id of SBD or VOC that is not in val;
    cls_labels.npy                a dict id -> float32 [classes], from the annotations of all these.
What a devkit does not hold is not written, and said.
"""

import argparse
from pathlib import Path

import numpy as np

from tool.files import atomic_write
from tool.maps import save_npy_dict
from tool.run import cli
from tool.run.errors import DataError
from voc12.devkit import Devkit, add_devkit_arguments, list_line, open_devkit, read_ids, require_ids

SPLITS = ("train", "val", "test")
AUGMENTED = "train_aug"
# Where the Semantic Boundaries Dataset keeps its masks, below its root or its benchmark_RELEASE.
SBD_MASK_FOLDERS = ("cls", "dataset/cls", "benchmark_RELEASE/dataset/cls")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m voc12.prepare", description=__doc__, formatter_class=cli.help_formatter
    )
    add_devkit_arguments(parser, labels=False)
    parser.add_argument("--out_dir", default="voc12", help="folder for the lists and the labels")
    parser.add_argument(
        "--sbd_root",
        help="the Semantic Boundaries Dataset (benchmark_RELEASE), if the devkit has no folder "
        "SegmentationClassAug",
    )
    return parser


def split_ids(devkit: Devkit) -> dict[str, list[str]]:
    """The ids of the devkit's own splits, those that it has."""
    folder = devkit.root / "ImageSets" / "Segmentation"
    return {
        split: read_ids(folder / f"{split}.txt")
        for split in SPLITS
        if (folder / f"{split}.txt").is_file()
    }


def augmented_ids(devkit: Devkit, splits: dict[str, list[str]], sbd_root: str | None) -> list[str]:
    """The ids with a mask, VOC's or SBD's, that are not in val; empty where there are no masks."""
    if sbd_root:
        folders = [Path(sbd_root, folder) for folder in SBD_MASK_FOLDERS]
        found = [folder for folder in folders if folder.is_dir()]
        if not found:
            raise DataError(f"{sbd_root}: has no folder cls with SBD's masks; see --sbd_root.")
        folder, ending, more = found[0], ".mat", splits.get("train", [])
    else:
        folder, ending, more = devkit.root / "SegmentationClassAug", ".png", []
    masked = {path.stem for path in folder.glob(f"*{ending}")}
    require_ids(folder, sorted(masked))
    ids = masked.union(more)
    return sorted(ids - set(splits.get("val", [])))


def write_list(path: Path, ids: list[str], masks: bool) -> None:
    """One line an image: its path and, with ``masks``, its mask's, below the devkit's root."""
    with atomic_write(path) as file:
        file.writelines(f"{list_line(image_id, masks)}\n".encode() for image_id in ids)


def labels_of(devkit: Devkit, ids: list[str]) -> dict[str, np.ndarray]:
    """id -> float32 [classes], of those ids that have an annotation."""
    labels = {}
    for image_id in cli.progress(ids, "annotations"):
        if devkit.annotation_path(image_id).is_file():
            labels[image_id] = devkit.annotated_label(image_id)
    return labels


def main(args: argparse.Namespace) -> None:
    devkit = open_devkit(args)
    devkit.require_output("--out_dir", args.out_dir)
    out_dir = Path(args.out_dir)
    lists = split_ids(devkit)
    augmented = augmented_ids(devkit, lists, args.sbd_root)
    if augmented:
        lists[AUGMENTED] = augmented
    if not lists:
        raise DataError(
            f"{devkit.root}: has neither lists in ImageSets/Segmentation nor masks in "
            "SegmentationClassAug; there is nothing to make lists of."
        )
    for split, ids in lists.items():
        write_list(out_dir / f"{split}.txt", ids, masks=split != "test")
        print(f"{out_dir / split}.txt: {len(ids)} images")

    ids = sorted({image_id for split_members in lists.values() for image_id in split_members})
    labels = labels_of(devkit, ids)
    save_npy_dict(out_dir / "cls_labels.npy", labels)
    print(f"{out_dir / 'cls_labels.npy'}: labels of {len(labels)} images")
    say_what_is_missing(devkit, lists, len(ids) - len(labels))


def say_what_is_missing(devkit: Devkit, lists: dict[str, list[str]], unlabelled: int) -> None:
    """Print which files could not be made, and how to supply what they are made of."""
    for split in SPLITS:
        if split not in lists:
            print(f"not made: {split}.txt, because ImageSets/Segmentation has no {split}.txt.")
    if AUGMENTED not in lists:
        print(
            f"not made: {AUGMENTED}.txt, because {devkit.root / 'SegmentationClassAug'} has no "
            "masks. Put the 12,031 masks of VOC and SBD there, or name SBD's folder with "
            "--sbd_root, or train on train.txt with --train_list."
        )
    if unlabelled:
        print(f"{unlabelled} images have no annotation and so no label (VOC's test images do not).")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
