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
from tool.run.errors import DataError, UsageError, reason

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
BACKGROUND = "background"
LABEL_FILE = "voc12/cls_labels.npy"
# A file's name has 255 bytes at most; this leaves room for an ending and a temporary name's.
MAX_ID_BYTES = 220
# Names that leave a folder, or whose lines in a list would be cut at a comment or an image's name.
NO_ID = re.compile(r"^\.{0,2}$|[/\\]| #|\.(jpe?g|png) ", re.IGNORECASE)
# A devkit's folders, which no output may go to.
INPUT_FOLDERS = (
    *("JPEGImages", "Annotations", "ImageSets"),
    *("SegmentationClass", "SegmentationClassAug", "SegmentationObject"),
)


def read_lines(path: str | os.PathLike) -> list[str]:
    """A text file's lines without comments (``#``), surrounding space and empty lines."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable text file ({reason(error)}).") from error
    # A # within a name is part of it.
    lines = (re.split(r"(?:^|\s)#", line)[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """The classes of a file with a name a line, without background."""
    names = tuple(read_lines(path))
    if not names:
        raise DataError(f"{path}: holds no class names; write one a line.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: the class {repeated[0][:80]!r} is there twice.")
    if BACKGROUND in names:
        raise DataError(f"{path}: leave out {BACKGROUND}; it always is label 0.")
    if len(names) >= VOID:
        raise DataError(f"{path}: {len(names)} classes; index images hold {VOID - 1} at most.")
    return names


def read_ids(path: str | os.PathLike) -> list[str]:
    """The image ids of a list file: the file stem of each line's first field, or a bare id."""
    if not Path(path).is_file():
        raise DataError(f"{path}: not a list file; python3 -m voc12.prepare makes the lists.")
    ids = []
    for line in read_lines(path):
        name = line.split()[0]
        if "/" in name:
            # A path may hold spaces: it ends before the next path, or where an image's name does.
            first_path = re.split(r"\s+/", line)[0]
            image = re.match(r".*?\.(?:jpe?g|png)(?=\s|$)", first_path, re.IGNORECASE)
            name = Path(image[0] if image else name).stem
        elif name.lower().endswith((".jpg", ".jpeg", ".png")):  # a bare id may hold other dots
            name = Path(name).stem
        ids.append(name)
    if not ids:
        raise DataError(f"{path}: the list is empty; it needs one image a line.")
    require_ids(path, ids)
    return ids


def require_ids(source: str | os.PathLike, ids: Iterable[str]) -> None:
    """Raise DataError, naming the source, if a name cannot be an image id.

    An id can be printed, names files within a folder and comes back from a list as it was.
    """
    for name in ids:
        if not name.isprintable() or len(name.encode()) > MAX_ID_BYTES or NO_ID.search(name):
            raise DataError(f"{source}: {name[:80]!r} cannot be an image id; rename it.")


def add_devkit_arguments(parser: argparse.ArgumentParser, labels: bool = True) -> None:
    """The flags that name a data set; with ``labels``, those of its image-level labels, too."""
    add = parser.add_argument
    add("--voc12_root", required=True, help="the devkit's folder VOC2012, or one laid out like it")
    add("--classes", metavar="FILE", help="class names, one a line, by label (default: VOC's)")
    if labels:
        labels_help = "image-level labels of voc12.prepare; other ids' are read from annotations"
        add("--label_file", default=LABEL_FILE, help=labels_help)


def open_devkit(args: argparse.Namespace) -> "Devkit":
    """The devkit that a program's flags name."""
    class_names = VOC_CLASSES if args.classes is None else read_class_names(args.classes)
    return Devkit(args.voc12_root, class_names, getattr(args, "label_file", None))


class Devkit:
    """A data set in VOC's folder layout, with its class names and image-level labels.

    Labels that are not in ``label_file`` come from the annotations. Raises DataError if the folder
    is not a devkit, or if the label file cannot be read; only the default one may be missing.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        class_names: Sequence[str] = VOC_CLASSES,
        label_file: str | os.PathLike | None = None,
    ):
        self.root = Path(root)
        self.class_names = tuple(class_names)
        self.label_names = (BACKGROUND, *class_names)
        self.label_file = label_file
        if not (self.root / "JPEGImages").is_dir():
            raise DataError(
                f"{root}: has no folder JPEGImages; --voc12_root must name the devkit's VOC2012."
            )
        self._labels: dict = {}  # of the file, later also of annotations that were read
        if label_file is not None and (label_file != LABEL_FILE or Path(label_file).exists()):
            self._labels = load_npy_dict(label_file)
            if not all(isinstance(key, str) for key in self._labels):
                raise DataError(f"{label_file}: its keys are not image ids; see voc12.prepare.")

    def image_path(self, image_id: str) -> Path:
        return self.root / "JPEGImages" / f"{image_id}.jpg"

    def annotation_path(self, image_id: str) -> Path:
        return self.root / "Annotations" / f"{image_id}.xml"

    def mask_path(self, image_id: str) -> Path:
        return self.root / "SegmentationClass" / f"{image_id}.png"

    def require_images(self, ids: Sequence[str]) -> None:
        """Raise DataError if a photograph is missing."""
        hint = "--voc12_root and the list do not belong together"
        require_files(self.root / "JPEGImages", ids, ".jpg", hint)

    def require_labelled_images(self, ids: Sequence[str]) -> str:
        """Raise DataError if a photograph or label is missing; return where labels are from."""
        self.require_images(ids)
        from_file = sum(image_id in self._labels for image_id in ids)
        for image_id in ids:
            self.image_label(image_id)
        annotated = len(ids) - from_file
        return f"labels: {from_file} from {self.label_file}, {annotated} from annotations"

    def require_output(self, flag: str, folder: str | os.PathLike | None) -> None:
        """Raise UsageError if a flag's folder or file would lie among the inputs."""
        if folder is None:
            return
        inputs = {os.path.realpath(self.root / name) for name in INPUT_FOLDERS}
        output = Path(os.path.realpath(folder))
        if not inputs.isdisjoint(map(str, (output, *output.parents))):
            raise UsageError(f"{flag} {folder}: is among the devkit's inputs; name another.")

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

    def image_label(self, image_id: str) -> np.ndarray:
        """float32 [classes], 1 where the class is in the image; raises DataError without one."""
        if image_id not in self._labels:
            self._labels[image_id] = self.annotated_label(image_id)
        try:
            label = np.asarray(self._labels[image_id], np.float32)
        except (TypeError, ValueError):
            label = np.empty(0)
        if label.shape != (len(self.class_names),) or not np.isin(label, (0, 1)).all():
            wanted = f"0 or 1 for each of {len(self.class_names)} classes; see voc12.prepare"
            raise DataError(f"{self.label_file}: the label of {image_id} is not {wanted}.")
        return label

    def annotated_label(self, image_id: str) -> np.ndarray:
        """float32 [classes], 1 where the annotation has such an object, difficult or not."""
        path = self.annotation_path(image_id)
        if not path.is_file():
            raise DataError(f"{image_id}: has no label in {self.label_file}, and no {path}.")
        try:
            root = defusedxml.ElementTree.parse(path).getroot()
        except (ParseError, ValueError, LookupError, OSError, DefusedXmlException) as error:
            raise DataError(f"{path}: not a readable annotation ({error}).") from error
        if root.tag != "annotation":
            raise DataError(f"{path}: not a VOC annotation; its root is {root.tag[:80]!r}.")
        label = np.zeros(len(self.class_names), np.float32)
        for annotated in root.iterfind("object"):
            class_name = (annotated.findtext("name") or "").strip()
            if class_name not in self.class_names:
                raise DataError(f"{path}: {class_name[:80]!r} is not a known class; see --classes.")
            label[self.class_names.index(class_name)] = 1
        return label

    def load_label(self, path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
        """The index image of a photograph of the given (H, W): uint8 H x W, 255 void.

        Raises DataError as ``load_index_png`` does, and for another size or an unknown label.
        """
        label = load_index_png(path)
        if label.shape != size:
            own, wanted = (f"{height} x {width}" for height, width in (label.shape, size))
            raise DataError(f"{path}: is {own}, but its photograph is {wanted}; make it again.")
        unknown = label[(label >= len(self.label_names)) & (label != VOID)]
        if unknown.size:
            classes = f"but there are {len(self.class_names)} classes; see --classes"
            raise DataError(f"{path}: has the label {unknown[0]}, {classes}.")
        return label


def require_files(folder: str | os.PathLike, ids: Sequence[str], suffix: str, hint: str) -> None:
    """Raise DataError, which ends in ``hint``, if ``<folder>/<id><suffix>`` is missing for an id.

    Maps may be there in either form.
    """
    paths = [maps_file(Path(folder, image_id + suffix)) for image_id in ids]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        count = f"{len(missing)} of {len(ids)} are missing"
        raise DataError(f"{missing[0]}: no such file ({count}); {hint}.")
