"""Writes the id lists and the image-level labels that the four programs read, from a devkit.

    python3 -m voc12.prepare --voc12_root VOC2012

Writes into --out_dir (voc12/ by default)
    train.txt, val.txt, test.txt  from the devkit's ImageSets/Segmentation;
    train_aug.txt                 every id with a mask in SegmentationClassAug that is not in val,
                                  or, with --sbd_root, every id of SBD or VOC that is not in val;
    cls_labels.npy                a dict id -> float32 [classes], from the annotations of all these.
Prints which of them it cannot make, because the devkit lacks their source.
"""

import argparse
from pathlib import Path

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
    """The ids of each split that the devkit has."""
    folder = devkit.root / "ImageSets" / "Segmentation"
    files = {split: folder / f"{split}.txt" for split in SPLITS}
    return {split: read_ids(file) for split, file in files.items() if file.is_file()}


def augmented_ids(devkit: Devkit, splits: dict[str, list[str]], sbd_root: str | None) -> list[str]:
    """The ids with a mask of VOC or SBD that are not in val; empty if there are no masks."""
    if sbd_root:
        folders = [Path(sbd_root, folder) for folder in SBD_MASK_FOLDERS]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise DataError(f"{sbd_root}: has no folder cls with SBD's masks; see --sbd_root.")
        suffix, more = ".mat", splits.get("train", [])
    else:
        folder, suffix, more = devkit.root / "SegmentationClassAug", ".png", []
    masked = {path.stem for path in folder.glob(f"*{suffix}")}
    require_ids(folder, sorted(masked))
    return sorted(masked.union(more).difference(splits.get("val", [])))


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
            "SegmentationClassAug, from which lists are made."
        )
    for split, ids in lists.items():
        path = out_dir / f"{split}.txt"
        with atomic_write(path) as file:
            lines = (list_line(image_id, with_mask=split != "test") for image_id in ids)
            file.writelines(f"{line}\n".encode() for line in lines)
        print(f"{path}: {len(ids)} images")

    ids = sorted(set().union(*lists.values()))
    labels = {}
    for image_id in cli.progress(ids, "annotations"):
        if devkit.annotation_path(image_id).is_file():
            labels[image_id] = devkit.annotated_label(image_id)
    save_npy_dict(out_dir / "cls_labels.npy", labels)
    print(f"{out_dir / 'cls_labels.npy'}: labels of {len(labels)} images")
    print_missing(devkit, lists, len(ids) - len(labels))


def print_missing(devkit: Devkit, lists: dict[str, list[str]], unlabelled: int) -> None:
    """Print which files were not made, and what they need."""
    for split in SPLITS:
        if split not in lists:
            print(f"not made: {split}.txt, because ImageSets/Segmentation has no {split}.txt.")
    if AUGMENTED not in lists:
        print(
            f"not made: {AUGMENTED}.txt, because {devkit.root / 'SegmentationClassAug'} has no "
            "masks. Put the 12,031 masks of VOC and SBD there, name SBD's folder with --sbd_root, "
            "or train on train.txt with --train_list."
        )
    if unlabelled:
        print(f"{unlabelled} images have no annotation and so no label (VOC's test images do not).")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
