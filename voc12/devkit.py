"""A devkit's folders: ids, classes, image-level labels, photographs, masks.

A devkit is a folder with ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png``,
``Annotations/<id>.xml`` and ``ImageSets/Segmentation/*.txt``. EXIF orientation is not applied, in
any stage: maps, predictions and masks lie on the pixels as they are stored.
"""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import ParseError

import defusedxml.ElementTree
import numpy as np
from defusedxml.common import DefusedXmlException
from PIL import Image

from tool.labels import VOID
from tool.maps import load_index_png, load_npy_dict, maps_file, open_image
from tool.run.errors import DataError, UsageError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
BACKGROUND = "background"
LABEL_FILE = "voc12/cls_labels.npy"
# How many of the missing files an error names.
NAMED_MISSING = 4
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# A file's name has 255 bytes at most; this leaves room for an ending and a temporary name's.
MAX_ID_BYTES = 220
# How much of a name from a file stands in an error message.
SHOWN_CHARACTERS = 80
# A devkit's folders, which no output may go to.
INPUT_FOLDERS = (
    *("JPEGImages", "Annotations", "ImageSets"),
    *("SegmentationClass", "SegmentationClassAug", "SegmentationObject"),
)


def read_lines(path: str | os.PathLike) -> list[str]:
    """A text file's lines without comments (``#``), surrounding space and empty lines."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file in UTF-8.") from error
    lines = map(_without_comment, text.splitlines())
    return [line for line in lines if line]


def _without_comment(line: str) -> str:
    # A # within a name is part of it.
    return re.split(r"(?:^|\s)#", line)[0].strip()


def read_class_names(path: str | os.PathLike | None) -> tuple[str, ...]:
    """The classes of a file with a name a line, without background; VOC's, where path is None."""
    if path is None:
        return VOC_CLASSES
    names = tuple(read_lines(path))
    if not names:
        raise DataError(f"{path}: holds no class names; write one a line.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: the class {_shortened(repeated[0])} is there twice.")
    if BACKGROUND in names:
        raise DataError(f"{path}: leave out {BACKGROUND}; it always is label 0.")
    if len(names) >= VOID:
        raise DataError(f"{path}: {len(names)} classes; index images hold {VOID - 1} at most.")
    return names


def read_ids(path: str | os.PathLike) -> list[str]:
    """The image ids of a list file: the file stem of each line's first field, or a bare id."""
    if not Path(path).is_file():
        raise DataError(
            f"{path}: no such list; make the lists with "
            "python3 -m voc12.prepare --voc12_root VOC2012, or name another list."
        )
    ids = [_image_id(line) for line in read_lines(path)]
    if not ids:
        raise DataError(f"{path}: the list is empty; it needs one image a line.")
    require_ids(path, ids)
    return ids


def require_ids(source: str | os.PathLike, ids: Iterable[str]) -> None:
    """Raise DataError, naming the source, if a name cannot be an image id.

    An id names files within a folder and nowhere else, can be printed, and comes back from a list
    as it was.
    """
    for image_id in ids:
        if (
            image_id in ("", ".", "..")
            or "/" in image_id
            or "\\" in image_id
            or not image_id.isprintable()
            or len(image_id.encode()) > MAX_ID_BYTES
            or _image_id(_without_comment(list_line(image_id))) != image_id
        ):
            raise DataError(f"{source}: {_shortened(image_id)} cannot be an image id; rename it.")


def list_line(image_id: str, with_mask: bool = False) -> str:
    """An image's line in a list file: its path and, if asked, its mask's, below the devkit."""
    line = f"/JPEGImages/{image_id}.jpg"
    return f"{line} /SegmentationClassAug/{image_id}.png" if with_mask else line


def _image_id(line: str) -> str:
    field = line.split()[0]
    if "/" in field:
        # A path may hold spaces: it ends before the next path, or where an image's name does.
        path = re.split(r"\s+/", line)[0]
        named = re.match(r".*?(?:\.jpg|\.jpeg|\.png)(?=\s|$)", path, re.IGNORECASE)
        return Path(named[0] if named else field).stem
    # An id may hold dots; only an image file's ending is none of its own.
    return Path(field).stem if field.lower().endswith(IMAGE_SUFFIXES) else field


def _shortened(name: str) -> str:
    return repr(name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "...")


def add_devkit_arguments(parser: argparse.ArgumentParser, labels: bool = True) -> None:
    """The flags that name a data set; with ``labels``, those of its image-level labels, too."""
    parser.add_argument(
        "--voc12_root", required=True, help="the devkit's folder VOC2012 (or one laid out like it)"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="class names of another data set, one a line, in the order of their labels from 1 on "
        "(default: VOC's 20)",
    )
    if labels:
        parser.add_argument(
            "--label_file",
            default=LABEL_FILE,
            help="image-level labels made by voc12.prepare; ids that it lacks, or all where the "
            "default does not exist, are read from the annotations",
        )


def open_devkit(args: argparse.Namespace) -> "Devkit":
    """The devkit that a program's flags name."""
    label_file = getattr(args, "label_file", None)
    return Devkit(args.voc12_root, read_class_names(args.classes), label_file)


class Devkit:
    """A data set in VOC's folder layout, with its class names and image-level labels.

    ``label_file`` None: labels come from the annotations. A label file that does not exist is an
    error, unless it is the default one.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        class_names: Sequence[str] = VOC_CLASSES,
        label_file: str | os.PathLike | None = None,
    ):
        self.root = Path(root)
        self.class_names = tuple(class_names)
        self.label_file = label_file
        if not (self.root / "JPEGImages").is_dir():
            raise DataError(
                f"{root}: not a devkit, because it has no folder JPEGImages; "
                "--voc12_root is the folder VOC2012 of the VOC 2012 devkit."
            )
        self._labels: dict = {}
        if label_file is not None and (label_file != LABEL_FILE or Path(label_file).exists()):
            self._labels = load_npy_dict(label_file)
            strange = next((key for key in self._labels if not isinstance(key, str)), None)
            if strange is not None:
                raise DataError(
                    f"{label_file}: holds no image-level labels, because {strange!r} is no image "
                    "id; make the file with voc12.prepare."
                )

    def image_path(self, image_id: str) -> Path:
        return self.root / "JPEGImages" / f"{image_id}.jpg"

    def annotation_path(self, image_id: str) -> Path:
        return self.root / "Annotations" / f"{image_id}.xml"

    def mask_path(self, image_id: str) -> Path:
        return self.root / "SegmentationClass" / f"{image_id}.png"

    def require_images(self, ids: Sequence[str]) -> None:
        """Raise DataError if a photograph is missing: better now than after hours."""
        folder = self.root / "JPEGImages"
        require_files(folder, ids, ".jpg", "--voc12_root and the list do not belong together")

    def require_labelled_images(self, ids: Sequence[str]) -> str:
        """Raise DataError if a photograph or label is missing; says where the labels are from."""
        self.require_images(ids)
        for image_id in ids:
            self.image_label(image_id)
        from_file = sum(image_id in self._labels for image_id in ids)
        return (
            f"labels: {from_file} from {self.label_file}, {len(ids) - from_file} from annotations"
        )

    def require_output(self, flag: str, folder: str | os.PathLike | None) -> None:
        """Raise UsageError if a flag's folder or file would lie among the inputs."""
        if folder is None:
            return
        inputs = {os.path.realpath(self.root / name) for name in INPUT_FOLDERS}
        output = Path(os.path.realpath(folder))
        if not inputs.isdisjoint(map(str, (output, *output.parents))):
            raise UsageError(
                f"{flag} {folder}: lies in a folder of the devkit's own, whose files it could "
                "replace; name another place."
            )

    def load_image(self, image_id: str) -> Image.Image:
        """The photograph as RGB; gray, palette, CMYK, 16-bit and transparent ones are converted."""
        image = open_image(self.image_path(image_id))
        if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255
            high_byte = np.array(image).astype(np.int64) >> 8
            image = Image.fromarray(np.clip(high_byte, 0, 255).astype(np.uint8))
        try:
            return image.convert("RGB")
        except ValueError as error:
            path = self.image_path(image_id)
            raise DataError(f"{path}: its colours cannot be made RGB ({error}).") from error

    def load_mask(self, image_id: str) -> np.ndarray:
        """The segmentation mask: uint8 H x W, 0 background, k+1 for class k, 255 void."""
        return load_index_png(self.mask_path(image_id))

    def image_label(self, image_id: str) -> np.ndarray:
        """float32 [classes], 1 where the class is in the image.

        From the label file where it has the id, else from the annotation.
        """
        if image_id not in self._labels:
            return self.annotated_label(image_id)
        try:
            with np.errstate(over="ignore"):  # too large is not 0 or 1, either
                label = np.asarray(self._labels[image_id], np.float32)
        except (TypeError, ValueError):
            label = np.empty(0)
        if label.shape != (len(self.class_names),) or not np.isin(label, (0, 1)).all():
            raise DataError(
                f"{self.label_file}: the label of {image_id} is not a 0 or 1 for each of the "
                f"{len(self.class_names)} classes; make the file again with voc12.prepare."
            )
        return label

    def annotated_label(self, image_id: str) -> np.ndarray:
        """float32 [classes], 1 where the annotation has such an object, difficult or not."""
        path = self.annotation_path(image_id)
        if not path.is_file():
            raise DataError(
                f"{image_id}: has no image-level label, as {path} does not exist"
                + (f" and {self.label_file} lacks it." if self._labels else ".")
            )
        try:
            tree = defusedxml.ElementTree.parse(path)
        except (ParseError, ValueError, LookupError, OSError, DefusedXmlException) as error:
            raise DataError(f"{path}: not a readable annotation ({error}).") from error
        if tree.getroot().tag != "annotation":
            raise DataError(
                f"{path}: not a VOC annotation, whose root is <annotation>, but "
                f"{_shortened(tree.getroot().tag)}."
            )
        label = np.zeros(len(self.class_names), np.float32)
        for annotated in tree.getroot().iterfind("object"):
            class_name = (annotated.findtext("name") or "").strip()
            if class_name not in self.class_names:
                raise DataError(
                    f"{path}: the class {_shortened(class_name)} is not in the class list; "
                    "see --classes for data sets other than VOC."
                )
            label[self.class_names.index(class_name)] = 1
        return label


def load_label(path: str | os.PathLike, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """The index image of a photograph of the given (H, W): uint8 H x W, 255 void.

    Raises DataError as ``load_index_png`` does, and for another size or a label that the class list
    does not have.
    """
    label = load_index_png(path)
    if label.shape != size:
        own, wanted = (f"{height} x {width}" for height, width in (label.shape, size))
        raise DataError(f"{path}: is {own}, but its photograph is {wanted}; make the label again.")
    unknown = np.setdiff1d(label, [*range(num_classes + 1), VOID])
    if unknown.size:
        raise DataError(
            f"{path}: has the label {unknown[0]}, but there are {num_classes} classes; see "
            "--classes."
        )
    return label


def require_files(folder: str | os.PathLike, ids: Sequence[str], suffix: str, hint: str) -> None:
    """Raise DataError if ``<folder>/<id><suffix>`` is missing for an id.

    Maps may be there in either form. The message names the first few and ends in ``hint``.
    """
    paths = [maps_file(Path(folder, image_id + suffix)) for image_id in ids]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        others = ", ".join(path.name for path in missing[1:NAMED_MISSING])
        raise DataError(
            f"{missing[0]}: no such file ({len(missing)} of {len(ids)} are missing)"
            f"{', nor ' + others if others else ''}; {hint}."
        )
