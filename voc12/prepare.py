"""Writes the id lists and the image-level labels that the programs read.

    python3 -m voc12.prepare --voc12_root VOC2012
    python3 -m voc12.prepare --voc12_root VOC2012 --ids '2007_*'    a small part of VOC
    python3 -m voc12.prepare --image_folders DIR --out_dir OUT
    python3 -m voc12.prepare --labels table.csv --images DIR --out_dir OUT

From a devkit, into --out_dir (voc12/ by default)
    train.txt, val.txt, test.txt  from the devkit's ImageSets/Segmentation;
    train_aug.txt                 every id with a mask in SegmentationClassAug that is not in val,
                                  or, with --sbd_root, every id of SBD or VOC that is not in val;
    cls_labels.npy                a dict id -> float32 [classes], from the annotations of all these.
Prints which of them it cannot make, because the devkit lacks their source.

From a folder for each class (DIR/cat/1.png), or from a table of ids and class names (docs/data.md),
a devkit without masks: JPEGImages, links to the photographs; train.txt, val.txt, classes.txt and
cls_labels.npy. The same photograph in two folders has both classes; in DIR/background, none.
"""

import argparse
import filecmp
import fnmatch
import hashlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from tool.files import link_or_copy, write_bytes
from tool.maps import save_npy_dict
from tool.run import cli
from tool.run.errors import DataError, UsageError
from voc12.devkit import (
    BACKGROUND,
    Devkit,
    add_devkit_arguments,
    class_label,
    find_photographs,
    open_devkit,
    read_class_names,
    read_ids,
    read_table,
    require_ids,
)

SPLITS = ("train", "val", "test")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m voc12.prepare")
    add_devkit_arguments(parser, labels=False, required=False)
    add = parser.add_argument
    add("--image_folders", metavar="DIR", help="a folder of photographs for each class")
    add("--labels", metavar="FILE.csv", help="a table of ids and class names")
    add("--images", metavar="DIR", help="the photographs of --labels")
    add("--out_dir", default="voc12", help="folder for the lists and the labels")
    add("--sbd_root", help="SBD's folder benchmark_RELEASE, in place of SegmentationClassAug")
    add("--ids", metavar="PATTERN", help="only ids of this shell pattern, such as '2007_*'")
    text = "part of folders or a table that becomes val; the ids alone decide which"
    add("--val_share", type=cli.number(float, 0, 1, above=True), default=0.1, help=text)
    text = "copy photographs of folders or a table; for a file system without links"
    add("--copy", action="store_true", help=text)
    return parser


def augmented_ids(devkit: Devkit, splits: dict[str, list[str]], sbd_root: str | None) -> list[str]:
    """The ids with a mask of VOC or SBD that are not in val; empty if there are no masks."""
    # Names that begin with a dot are macOS's companions of files.
    if sbd_root:
        folder = Path(sbd_root)
        masked = {path.stem for path in folder.rglob("cls/[!.]*.mat")}
        if not masked:
            raise DataError(f"{sbd_root}: has no folder cls with SBD's masks; see --sbd_root.")
    else:
        folder = devkit.root / "SegmentationClassAug"
        masked = {path.stem for path in folder.glob("[!.]*.png")}
    require_ids(folder, sorted(masked))
    train = splits.get("train", []) if masked else []
    return sorted(masked.union(train).difference(splits.get("val", [])))


def write_list(path: Path, devkit: Devkit, ids: Sequence[str], with_masks: bool) -> None:
    """Write a line for each image: its path and, if asked, its mask's, below the devkit."""
    text = ""
    for image_id in ids:
        mask = f" /SegmentationClassAug/{image_id}.png" if with_masks else ""
        text += f"/JPEGImages/{devkit.image_path(image_id).name}{mask}\n"
    write_bytes(path, text.encode())
    print(f"{path}: {len(ids)} images")


def write_class_names(path: Path, names: Sequence[str]) -> None:
    """Write classes.txt; raises DataError for names that would not come back from it."""
    write_bytes(path, "\n".join([*names, ""]).encode())
    if changed := set(names).difference(read_class_names(path)):
        raise DataError(f"{path}: {min(changed)[:80]!r} cannot be a class name; rename it.")


def transfer_photographs(out: Path, photographs: Mapping[str, Path], copy: bool) -> None:
    """Link photographs by id into JPEGImages, or copy them; DataError if others are there."""
    folder = out / "JPEGImages"
    sources = {folder / (image_id + path.suffix): path for image_id, path in photographs.items()}
    if others := set(folder.glob("[!.]*")) - sources.keys():
        raise DataError(f"{min(others)}: is not of this data set; name another --out_dir.")
    for target, source in cli.progress(sources.items(), "photographs"):
        link_or_copy(source, target, copy)


def write_lists(
    out: Path,
    class_names: Sequence[str],
    lists: Mapping[str, Sequence[str]],
    names_of: Mapping[str, Container[str]],
) -> None:
    """Write a devkit's lists of ids by split, and its labels from the class names of each image.

    Prints the flags that name them.
    """
    devkit = Devkit(out, class_names)
    for split, ids in lists.items():
        write_list(out / f"{split}.txt", devkit, ids, with_masks=False)
    labels = {image_id: class_label(names, class_names) for image_id, names in names_of.items()}
    save_npy_dict(out / "cls_labels.npy", labels)
    negative = sum(not label.any() for label in labels.values())
    print(f"{out}/cls_labels.npy: labels of {len(labels)} images, {negative} of no class")
    data = f"--voc12_root {out} --classes {out}/classes.txt"
    print(
        f"train_cls.py {data} --label_file {out}/cls_labels.npy "
        f"--train_list {out}/train.txt --val_list {out}/val.txt ..."
    )
    print(f"python3 -m tool.pipeline {data} --list_dir {out} ...")


def read_folders(root: Path) -> tuple[list[str], dict[str, set[str]], dict[str, Path]]:
    """The class names, those of each image, and the photographs, of a folder for each class.

    Raises DataError if two photographs have the same id, but not the same name and content.
    """
    names_of: dict[str, set[str]] = {}
    photographs: dict[str, Path] = {}
    folders = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    for folder in folders:
        for image_id, path in find_photographs([folder]).items():
            other = photographs.setdefault(image_id, path)
            if path.name != other.name or not filecmp.cmp(path, other, shallow=False):
                raise DataError(f"{path}: is not the photograph {other}; rename one.")
            names_of.setdefault(image_id, set()).add(folder.name)
    class_names = [folder.name for folder in folders if folder.name != BACKGROUND]
    return class_names, names_of, photographs


def read_labelled(table: str, folder: str) -> tuple[list[str], dict[str, set[str]], dict]:
    """What ``read_folders`` gives, of a table and a folder of photographs."""
    class_names, names_of = read_table(table)
    photographs = find_photographs([folder])
    if missing := [image_id for image_id in names_of if image_id not in photographs]:
        problem = f"{missing[0][:80]!r} has no photograph in {folder}"
        raise DataError(f"{table}: {problem} ({len(missing)} of {len(names_of)} are missing).")
    print(f"{folder}: {len(photographs) - len(names_of)} photographs are not in {table}")
    return class_names, names_of, {image_id: photographs[image_id] for image_id in names_of}


def prepare_photographs(args: argparse.Namespace) -> None:
    """Make a devkit of photographs in folders, or in a table."""
    source = args.labels or args.image_folders
    found = read_labelled(source, args.images) if args.labels else read_folders(Path(source))
    class_names, names_of, photographs = found
    if args.classes:
        known = read_class_names(args.classes)
        if unknown := set(class_names).difference(known):
            raise DataError(f"{source}: {min(unknown)[:80]!r} is not in --classes {args.classes}.")
        class_names = known
    ids = sorted(photographs, key=lambda image_id: hashlib.sha256(image_id.encode()).digest())
    num_val = max(1, round(args.val_share * len(ids)))
    if num_val >= len(ids):
        raise DataError(f"{source}: {len(ids)} images are too few to split by --val_share.")
    out = Path(args.out_dir)
    transfer_photographs(out, photographs, args.copy)
    write_class_names(out / "classes.txt", class_names)
    lists = {"train": sorted(ids[num_val:]), "val": sorted(ids[:num_val])}
    write_lists(out, class_names, lists, names_of)


def prepare_devkit(args: argparse.Namespace) -> None:
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
    if args.ids:
        lists = {split: fnmatch.filter(members, args.ids) for split, members in lists.items()}
        lists = {split: members for split, members in lists.items() if members}
        if not lists:
            raise UsageError(f"--ids {args.ids}: no id of {devkit.root}'s lists matches.")
    ids = sorted(set().union(*lists.values()))
    labels = {}
    for image_id in cli.progress(ids, "annotations"):
        if devkit.annotation_path(image_id).is_file():
            labels[image_id] = devkit.annotated_label(image_id)
    for split, members in lists.items():
        write_list(out_dir / f"{split}.txt", devkit, members, with_masks=split != "test")
    save_npy_dict(out_dir / "cls_labels.npy", labels)
    print(f"{out_dir / 'cls_labels.npy'}: labels of {len(labels)} images")
    for split in SPLITS:
        if split not in lists:
            problem = "is missing, or has no id that matches --ids" if args.ids else "is missing"
            print(f"not made: {split}.txt, because ImageSets/Segmentation/{split}.txt {problem}.")
    for path in (out_dir / f"{split}.txt" for split in (*SPLITS, "train_aug")):
        if path.stem not in lists and path.exists():
            print(f"WARNING: {path} is of an earlier run, perhaps of other data.")
    if not augmented:
        print(
            "not made: train_aug.txt, because SegmentationClassAug has no masks. Put those of VOC "
            "and SBD there, name SBD with --sbd_root, or train on train.txt (--train_list)."
        )
    if unlabelled := len(ids) - len(labels):
        print(f"images without an annotation, hence without a label: {unlabelled} (as VOC's test).")


def main(args: argparse.Namespace) -> None:
    sources = [args.voc12_root, args.image_folders, args.labels]
    if sum(map(bool, sources)) != 1 or bool(args.labels) != bool(args.images):
        raise UsageError("name --voc12_root, or --image_folders, or --labels and --images.")
    if args.ids and not args.voc12_root:
        raise UsageError("--ids selects from a devkit's lists; name --voc12_root.")
    if args.voc12_root:
        prepare_devkit(args)
    else:
        prepare_photographs(args)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
