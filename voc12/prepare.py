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
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids, require_ids

SPLITS = ("train", "val", "test")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m voc12.prepare")
    add_devkit_arguments(parser, labels=False)
    add = parser.add_argument
    add("--out_dir", default="voc12", help="folder for the lists and the labels")
    add("--sbd_root", help="SBD's folder benchmark_RELEASE, in place of SegmentationClassAug")
    return parser


def list_line(image_id: str, with_mask: bool, suffix: str = ".jpg") -> str:
    """An image's line in a list: its path and, if asked, its mask's, below the devkit."""
    line = f"/JPEGImages/{image_id}{suffix}"
    return f"{line} /SegmentationClassAug/{image_id}.png" if with_mask else line


def augmented_ids(devkit: Devkit, splits: dict[str, list[str]], sbd_root: str | None) -> list[str]:
    """The ids with a mask of VOC or SBD that are not in val; empty if there are no masks."""
    # Names that begin with a dot are macOS's companions of files.
    if sbd_root:
        folder, more = Path(sbd_root), splits.get("train", [])
        masked = {path.stem for path in folder.rglob("cls/[!.]*.mat")}
        if not masked:
            raise DataError(f"{sbd_root}: has no folder cls with SBD's masks; see --sbd_root.")
    else:
        folder, more = devkit.root / "SegmentationClassAug", []
        masked = {path.stem for path in folder.glob("[!.]*.png")}
    require_ids(folder, sorted(masked))
    return sorted(masked.union(more).difference(splits.get("val", [])))


def main(args: argparse.Namespace) -> None:
    devkit = open_devkit(args)
    devkit.require_output("--out_dir", args.out_dir)
    out_dir = Path(args.out_dir)
    files = {split: devkit.root / f"ImageSets/Segmentation/{split}.txt" for split in SPLITS}
    lists = {split: read_ids(file) for split, file in files.items() if file.is_file()}
    augmented = augmented_ids(devkit, lists, args.sbd_root)
    if augmented:
        lists["train_aug"] = augmented
    if not lists:
        folders = "lists in ImageSets/Segmentation nor masks in SegmentationClassAug"
        raise DataError(f"{devkit.root}: has neither {folders}.")
    ids = sorted(set().union(*lists.values()))
    labels = {}
    for image_id in cli.progress(ids, "annotations"):
        if devkit.annotation_path(image_id).is_file():
            labels[image_id] = devkit.annotated_label(image_id)
    for split, members in lists.items():
        path = out_dir / f"{split}.txt"
        with atomic_write(path) as file:
            for image_id in members:
                suffix = devkit.image_path(image_id).suffix
                file.write(f"{list_line(image_id, split != 'test', suffix)}\n".encode())
        print(f"{path}: {len(members)} images")
    save_npy_dict(out_dir / "cls_labels.npy", labels)
    print(f"{out_dir / 'cls_labels.npy'}: labels of {len(labels)} images")
    for split in SPLITS:
        if split not in lists:
            print(f"not made: {split}.txt, because ImageSets/Segmentation has no {split}.txt.")
    for path in (out_dir / f"{split}.txt" for split in (*SPLITS, "train_aug")):
        if path.stem not in lists and path.exists():
            print(f"WARNING: {path} is of an earlier run, perhaps of other data.")
    if not augmented:
        print(
            "not made: train_aug.txt, because SegmentationClassAug has no masks. Put those of VOC "
            "and SBD there, name SBD with --sbd_root, or train on train.txt (--train_list)."
        )
    unlabelled = len(ids) - len(labels)
    if unlabelled:
        print(f"images without an annotation, hence without a label: {unlabelled} (as VOC's test).")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
