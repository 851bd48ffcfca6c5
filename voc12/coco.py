"""Writes COCO as a devkit that all programs read.

    python3 -m voc12.coco --coco_root COCO --out_dir COCO_VOC

COCO has annotations/instances_{train,val}2014.json and the photographs' folders train2014 and
val2014. Writes into --out_dir
    JPEGImages                         links to the photographs
    SegmentationClass                  masks: 0 background, k the k-th class, 255 crowds
    ImageSets/Segmentation             ids of train (without images that have no object) and of val
    train.txt, val.txt, classes.txt, cls_labels.npy        what the programs' flags name
Where objects overlap in a mask, the smaller one is on top. The classes are in the order of COCO's
category ids, and a crowd counts as its class in the image-level labels. A command that was killed
continues when it is repeated: masks that are complete are kept.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from tool.files import write_bytes
from tool.labels import VOID
from tool.maps import open_image, save_index_png
from tool.run import cli, provenance
from tool.run.errors import DataError, reason
from tool.run.loading import load
from voc12.devkit import require_files, require_ids
from voc12.prepare import transfer_photographs, write_class_names, write_lists

SPLITS = ("train", "val")
POINTS = 3  # fewer enclose nothing
MAX_COORDINATE = 1e5  # pixels; above, pycocotools would request memory without limit


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m voc12.coco")
    add = parser.add_argument
    add("--coco_root", required=True, metavar="DIR", help="folder of annotations and photographs")
    add("--out_dir", required=True, metavar="DIR", help="folder for the devkit")
    add("--year", choices=("2014", "2017"), default="2014", help="of the annotations")
    add("--crowd", action="store_true", help="draw crowds as their class, not as 255")
    add("--copy", action="store_true", help="copy photographs; for a file system without links")
    add("--overwrite", action="store_true", help="draw masks again that are complete")
    workers, text = cli.default_num_workers(), "processes that draw masks; 0: the program itself"
    add("--num_workers", type=cli.number(int, 0, cli.MAX_WORKERS), default=workers, help=text)
    return parser


class Picture(NamedTuple):
    """An image, and what is in it."""

    photograph: Path
    size: tuple[int, int]  # (H, W)
    # Label in the mask, area (0: unknown), and polygons (x, y, x, y, ...) or a run-length encoding.
    objects: list[tuple[int, float, list | dict]]
    classes: set[str]


def _compact(entry: dict) -> dict:
    """An entry of the file with its long lists of numbers as arrays, which take less memory."""
    entry.pop("bbox", None)
    if isinstance(entry.get("segmentation"), list):
        entry["segmentation"] = [np.array(points, float) for points in entry["segmentation"]]
    elif isinstance(entry.get("counts"), list):
        entry["counts"] = np.array(entry["counts"], np.uint32)
    return entry


def read_instances(path: Path, folder: Path, crowd: bool) -> tuple[list[str], dict[str, Picture]]:
    """The class names by category id, and the images by id, of a file of COCO's instances.

    Raises DataError if it is not such a file, or an object is of an unknown image or category.
    """
    try:
        content = json.loads(path.read_bytes(), object_hook=_compact)
        names = dict(sorted((entry["id"], entry["name"]) for entry in content["categories"]))
        labels = {category: k + 1 for k, category in enumerate(names)}
        pictures = {}
        for entry in content["images"]:
            size, photograph = (entry["height"], entry["width"]), folder / entry["file_name"]
            pictures[entry["id"]] = Picture(folder / photograph.name, size, [], set())
        for entry in content["annotations"]:
            image_id, category = entry["image_id"], entry["category_id"]
            if image_id not in pictures or category not in names:
                problem = f"an object of image {image_id} and category {category}"
                raise DataError(f"{path}: has {problem}, but does not describe both.")
            label = VOID if entry.get("iscrowd") and not crowd else labels[category]
            area = float(entry.get("area") or 0)
            pictures[image_id].objects.append((label, area, entry["segmentation"]))
            pictures[image_id].classes.add(names[category])
    except OSError as error:
        why = error.strerror or reason(error)
        raise DataError(f"{path}: cannot be read ({why}); see --coco_root and --year.") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        problem = f"not a file of COCO's instances ({type(error).__name__}: {reason(error)})"
        raise DataError(f"{path}: {problem}.") from error
    by_id = {picture.photograph.stem: picture for picture in pictures.values()}
    if len(by_id) < len(pictures):
        raise DataError(f"{path}: two images have the same file name; rename one.")
    require_ids(path, by_id)
    return [*names.values()], by_id


def draw_mask(size: tuple[int, int], objects: Sequence[tuple]) -> np.ndarray:
    """The mask uint8 H x W of objects (label, area, shape): the largest first, smaller ones on top.

    An area of 0 is counted in pixels; of equal areas, the later object is on top. Raises ValueError
    for a shape that cannot be drawn.
    """
    drawn = []
    for label, area, shape in objects:
        pixels = _pixels(shape, size)
        drawn.append((area or pixels.sum(), label, pixels))
    mask = np.zeros(size, np.uint8)
    for _, label, pixels in sorted(drawn, key=itemgetter(0), reverse=True):
        mask[pixels] = label
    return mask


def _pixels(shape: list[np.ndarray] | dict, size: tuple[int, int]) -> np.ndarray:
    """Where an object is: bool H x W."""
    from pycocotools import mask as coco  # few need it

    if isinstance(shape, list):
        if not all(
            points.ndim == 1 and points.size % 2 == 0 and (abs(points) < MAX_COORDINATE).all()
            for points in shape
        ):
            raise ValueError("a polygon is not x, y, x, y, ... in pixels")
        polygons = [points for points in shape if points.size >= 2 * POINTS]
        if not polygons:
            return np.zeros(size, bool)
        return coco.decode(coco.merge(coco.frPyObjects(polygons, *size))).astype(bool)
    if isinstance(shape["counts"], np.ndarray):
        shape = coco.frPyObjects(shape, *size)
    if tuple(shape["size"]) != size or _fits(shape, size[0] * size[1] - 1):
        raise ValueError("a run-length encoding has another size than the image")
    return coco.decode(shape).astype(bool)


def _fits(encoding: dict, pixels: int) -> bool:
    """Whether an encoding covers this many pixels at most; pycocotools refuses only more."""
    from pycocotools import mask as coco

    try:
        coco.decode(encoding | {"size": [1, pixels]})
    except ValueError:
        return False
    return True


@dataclass
class _Masks(Dataset):
    """Writes the mask of an image, asked for as (id, Picture)."""

    folder: Path

    def __getitem__(self, key: tuple[str, Picture]) -> str:
        image_id, picture = key
        try:
            size = open_image(picture.photograph).size[::-1]
            if size != picture.size:
                raise ValueError(f"the photograph's (H, W) is {size}, that in COCO {picture.size}")
            mask = draw_mask(size, picture.objects)
            save_index_png(self.folder / f"{image_id}.png", mask)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{image_id}: its mask cannot be drawn ({reason(error)}).") from error
        except OSError as error:
            raise DataError(cli.sentence(error)) from error
        return image_id


def write_masks(
    args: argparse.Namespace, pictures: dict[str, Picture], contents: dict[str, str]
) -> None:
    """Write the masks that are not there; raises UsageError if others' are in the folder."""
    path = Path(args.out_dir, "SegmentationClass")
    settings = contents | provenance.settings_of(args, ["crowd"])
    folder = provenance.OutputFolder("voc12.coco --out_dir", path, (".png",), settings)
    provenance.require_same_settings([folder], [*pictures], args.overwrite)
    provenance.prepare_folders([folder], [*pictures], args.overwrite)
    todo = provenance.unfinished([folder], pictures)
    # A process gets an image's own objects, not the whole set.
    keys = ([(image_id, pictures[image_id])] for image_id in todo)
    with load(_Masks(path), keys, args.num_workers, collate=len) as masks:
        for _ in cli.progress(masks, "masks", total=len(todo)):
            pass
    print(f"{path}: {len(todo)} masks drawn, {len(pictures) - len(todo)} were complete")


def main(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("pycocotools") is None:
        raise DataError("COCO's masks are drawn by pycocotools: pip install pycocotools.")
    out, class_names = Path(args.out_dir), []
    lists, pictures, contents = {}, {}, {}
    for split in SPLITS:
        path = Path(args.coco_root, "annotations", f"instances_{split}{args.year}.json")
        folder = Path(args.coco_root, f"{split}{args.year}")
        names, found = read_instances(path, folder, args.crowd)
        if names != (class_names or names) or found.keys() & pictures.keys():
            raise DataError(f"{path}: has other categories than train, or images of train.")
        if split == "train":
            count = len(found)
            found = {image_id: picture for image_id, picture in found.items() if picture.classes}
            print(f"train: {count - len(found)} images without any object are left out")
        files = [picture.photograph.name for picture in found.values()]
        require_files(folder, files, "", "the annotations name it")
        lists[split], contents[path.name] = sorted(found), provenance.digest_file(path)
        class_names, pictures = names, pictures | found
    transfer_photographs(out, {key: value.photograph for key, value in pictures.items()}, args.copy)
    write_class_names(out / "classes.txt", class_names)
    write_masks(args, pictures, contents)
    for split, ids in lists.items():
        path = out / "ImageSets" / "Segmentation" / f"{split}.txt"
        write_bytes(path, "\n".join([*ids, ""]).encode())
    write_lists(out, class_names, lists, {key: value.classes for key, value in pictures.items()})


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
