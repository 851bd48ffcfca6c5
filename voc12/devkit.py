"""A devkit's folders: ids, classes, image-level labels, photographs, masks.

A devkit is a folder with ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png``,
``Annotations/<id>.xml`` and ``ImageSets/Segmentation/*.txt``. EXIF orientation is not applied, in
any stage: maps, predictions and masks lie on the pixels as they are stored.
"""

import argparse
import contextlib
import csv
import os
import re
from collections.abc import Container, Iterable, Sequence
from itertools import compress
from pathlib import Path
from xml.etree.ElementTree import ParseError

import defusedxml.ElementTree
import numpy as np
from defusedxml.common import DefusedXmlException
from PIL import ExifTags, Image, ImageOps

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
# Endings of photographs, in lower or upper case; of several files of an id, the first counts.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
IMAGE_ENDING = rf"\.(?:{'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})"
# Names that leave a folder, or whose lines in a list would be cut at a comment or an image's name.
NO_ID = re.compile(rf"^\.{{0,2}}$|[/\\]| #|{IMAGE_ENDING} ", re.IGNORECASE)
# The backslashes of a path; those of a mere name are not replaced but refused.
SEPARATOR = re.compile(rf"(?<=JPEGImages)\\|\\(?=.*{IMAGE_ENDING})", re.IGNORECASE)
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
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: the class {min(repeated)[:80]!r} is there twice.")
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
    # VOC's Main lists, each of a class, mark by -1 the images without it.
    lines = (line for line in read_lines(path) if line.split()[1:][-1:] != ["-1"])
    for line in (SEPARATOR.sub("/", line) for line in lines):
        name = line.split()[0]
        if "/" in name:
            # A path may hold spaces: it ends before the next path, or where an image's name does.
            first_path = re.split(r"\s+/", line)[0]
            image = re.match(rf".*?{IMAGE_ENDING}(?=\s|$)", first_path, re.IGNORECASE)
            name = Path(image[0] if image else name).stem
        elif name.lower().endswith(IMAGE_SUFFIXES):  # a bare id may hold other dots
            name = Path(name).stem
        ids.append(name)
    if not ids:
        raise DataError(f"{path}: the list is empty; it needs one image a line.")
    require_ids(path, ids)
    return ids


def read_labels(path: str | os.PathLike, class_names: Sequence[str]) -> dict:
    """The image-level labels by id of a ``.csv`` table, or of an ``.npy`` dict.

    Other repositories write the id 2007_000032 as the integer 2007000032: it is found as well.
    """
    if Path(path).suffix.lower() == ".csv":
        names_of = read_table(path)[1]
        for image_id, names in names_of.items():
            if unknown := sorted(names.difference(class_names)):
                problem = f"{unknown[0][:80]!r}, of {image_id[:80]!r}, is not a known class"
                raise DataError(f"{path}: {problem}; see --classes.")
        labels = {image_id: class_label(names_of[image_id], class_names) for image_id in names_of}
    else:
        labels = load_npy_dict(path)
    if not all(isinstance(key, str) or re.fullmatch(r"\d{10}", str(key)) for key in labels):
        raise DataError(f"{path}: its keys are not image ids; see voc12.prepare.")
    by_voc_id = {re.sub(r"^(\d{4})(\d{6})$", r"\1_\2", str(key)): labels[key] for key in labels}
    return by_voc_id | labels


def read_table(path: str | os.PathLike) -> tuple[list[str], dict[str, set[str]]]:
    """The class names in a ``.csv`` table, and those of each image, whose id is the first column.

    The second holds the names of the image's classes, separated by ``;``. Or the first line names a
    class for each further column, and the other lines hold 0 or 1 there. Several lines of an id add
    up. The ids may be file names.
    """
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(read_lines(path))]
    except csv.Error as error:
        raise DataError(f"{path}: not a readable table ({error}).") from error
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{path}: has a line without a comma; write id,class;class.")
    columns = []
    if rows[1:] and all({*row[1:]} <= {"0", "1"} for row in rows[1:]):
        columns = rows[0][1:]
        if {*columns} <= {"0", "1"}:
            raise DataError(f"{path}: its first line does not name the classes of the columns.")
        rows = [[row[0], *compress(columns, map(int, row[1:]))] for row in rows[1:]]
    names_of: dict[str, set[str]] = {}
    for image_id, *cells in rows:
        image_id = Path(image_id).stem if image_id.lower().endswith(IMAGE_SUFFIXES) else image_id
        names = {name.strip() for name in ";".join(cells).split(";")} - {""}
        names_of[image_id] = names_of.get(image_id, set()) | names
    return columns or sorted(set().union(*names_of.values())), names_of


def class_label(present: Container[str], class_names: Sequence[str]) -> np.ndarray:
    """float32 [classes], 1 where the class is among the present ones."""
    return np.array([name in present for name in class_names], np.float32)


def require_ids(source: str | os.PathLike, ids: Iterable[str]) -> None:
    """Raise DataError, naming the source, if a name cannot be an image id.

    An id can be printed, names files within a folder and comes back from a list as it was.
    """
    for name in ids:
        if not name.isprintable() or len(name.encode()) > MAX_ID_BYTES or NO_ID.search(name):
            raise DataError(f"{source}: {name[:80]!r} cannot be an image id; rename it.")


def add_devkit_arguments(
    parser: argparse.ArgumentParser, labels: bool = True, required: bool = True
) -> None:
    """The flags that name a data set; with ``labels``, those of its image-level labels, too."""
    add = parser.add_argument
    text = "the devkit's folder VOC2012, or one laid out like it"
    add("--voc12_root", required=required, help=text)
    add("--classes", metavar="FILE", help="class names, one a line, by label (default: VOC's)")
    if labels:
        text = "image-level labels, .npy or .csv; other ids' are read from annotations"
        add("--label_file", help=f"{text} (default: {LABEL_FILE}, if it is there)")


def open_devkit(args: argparse.Namespace) -> "Devkit":
    """The devkit that a program's flags name."""
    label_file = (args.label_file or LABEL_FILE) if "label_file" in args else None
    return Devkit(args.voc12_root, class_names_of(args), label_file)


def class_names_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The classes that a program's flags name, without background."""
    return VOC_CLASSES if args.classes is None else read_class_names(args.classes)


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
            self._labels = read_labels(label_file, self.class_names)

    def image_path(self, image_id: str) -> Path:
        """The photograph, by the first of IMAGE_SUFFIXES that is there; without one, <id>.jpg."""
        folder = self.root / "JPEGImages"
        cases = (case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper()))
        paths = (folder / (image_id + suffix) for suffix in cases)
        return next(filter(Path.exists, paths), folder / f"{image_id}.jpg")

    def annotation_path(self, image_id: str) -> Path:
        return self.root / "Annotations" / f"{image_id}.xml"

    def mask_path(self, image_id: str) -> Path:
        return self.root / "SegmentationClass" / f"{image_id}.png"

    def require_images(self, ids: Sequence[str]) -> None:
        """Raise DataError if a photograph is missing."""
        hint = "--voc12_root and the list do not belong together"
        names = [self.image_path(image_id).name for image_id in ids]
        require_files(self.root / "JPEGImages", names, "", hint)

    def require_labelled_images(self, ids: Sequence[str]) -> str:
        """Raise DataError if a photograph or label is missing; return where labels are from."""
        self.require_images(ids)
        from_file = sum(image_id in self._labels for image_id in ids)
        negative = sum(not self.image_label(image_id).any() for image_id in ids)
        annotated = len(ids) - from_file
        text = f"labels: {from_file} from {self.label_file}, {annotated} from annotations"
        return f"{text}, {negative} of no class" if negative else text

    def require_output(self, flag: str, folder: str | os.PathLike | None) -> None:
        """Raise UsageError if a flag's folder or file would lie among the inputs."""
        if folder is None:
            return
        inputs = {os.path.realpath(self.root / name) for name in INPUT_FOLDERS}
        output = Path(os.path.realpath(folder))
        if not inputs.isdisjoint(map(str, (output, *output.parents))):
            raise UsageError(f"{flag} {folder}: is among the devkit's inputs; name another.")

    def load_image(self, image_id: str) -> Image.Image:
        """The photograph as RGB; raises DataError as ``load_photograph`` does."""
        return load_photograph(self.image_path(image_id))

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
        names = [(entry.findtext("name") or "").strip() for entry in root.iterfind("object")]
        if unknown := set(names).difference(self.class_names):
            raise DataError(f"{path}: {min(unknown)[:80]!r} is not a known class; see --classes.")
        return class_label(names, self.class_names)

    def load_label(self, path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
        """The index image of a photograph of the given (H, W): uint8 H x W, 255 void.

        Raises DataError as ``load_index_png`` does, and for another size or an unknown label.
        """
        label = load_index_png(path, len(self.label_names))
        self.require_size(Path(path), label.shape, "its photograph", size)
        unknown = label[(label >= len(self.label_names)) & (label != VOID)]
        if unknown.size:
            classes = f"but there are {len(self.class_names)} classes; see --classes"
            raise DataError(f"{path}: has the label {unknown[0]}, {classes}.")
        return label

    def require_size(self, path: Path, size: tuple, other: str, other_size: tuple) -> None:
        """Raise DataError if the (H, W) of a file <id>.* and of another of the image differ."""
        if size == other_size:
            return
        way = "make it again"
        with contextlib.suppress(Exception):  # damaged EXIF can raise nearly anything
            exif = open_image(self.image_path(path.stem)).getexif()
            if exif.get(ExifTags.Base.Orientation, 1) > 4:  # swaps height and width
                way = "EXIF turns the photograph, which is not applied here: save it as it is shown"
        own, wanted = (f"{height} x {width}" for height, width in (size, other_size))
        raise DataError(f"{path.stem}: {path} is {own}, but {other} is {wanted}; {way}.")

    def require_classes(self, mask_paths: Iterable[Path]) -> None:
        """Raise DataError if masks hold background and void only: 255 is an editor's object."""
        seen = set()
        for path in mask_paths:
            seen |= set(np.unique(load_index_png(path, len(self.label_names))).tolist())
            if seen - {0, VOID}:
                return
        if seen == {0, VOID}:
            problem = "the masks of the list hold 0 and 255 (void), but no class"
            raise DataError(f"{path.parent}: {problem}; write the k-th class as k.")


def load_photograph(path: Path, upright: bool = False) -> Image.Image:
    """A photograph as RGB; gray, palette, CMYK, 16-bit and transparent ones are converted.

    With ``upright``, it is turned as its EXIF orientation says and viewers show it.
    """
    image = open_image(path)
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # gray; Pillow's own conversion clips at 255
            image = Image.fromarray(_eight_bits(np.array(image)))
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{path}: its colours cannot be made RGB ({error}).") from error


def find_photographs(paths: Iterable[str]) -> dict[str, Path]:
    """Photographs by id, the name without its ending: files, and all photographs in folders.

    Raises DataError for what is missing, a folder without any, or two of the same id.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            visible = sorted(path.glob("[!.]*"))
            files = [file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise DataError(f"{path}: has no photographs ({', '.join(IMAGE_SUFFIXES)}).")
        for file in files:
            if not file.is_file():
                raise DataError(f"{file}: no such file or folder.")
            require_ids(file.parent, [file.stem])
            if found.setdefault(file.stem, file) != file:
                raise DataError(f"{file}: has the name of {found[file.stem]}; rename one.")
    return found


def require_files(folder: str | os.PathLike, ids: Sequence[str], suffix: str, hint: str) -> None:
    """Raise DataError, which ends in ``hint``, if ``<folder>/<id><suffix>`` is missing for an id.

    Maps may be there in either form.
    """
    paths = [maps_file(Path(folder, image_id + suffix)) for image_id in ids]
    if missing := [path for path in paths if not path.is_file()]:
        count = f"{len(missing)} of {len(ids)} are missing"
        raise DataError(f"{missing[0]}: no such file ({count}); {hint}.")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Gray as uint8, scaled by the range that the values show: 0..1, or 8 to 14 or 16 bits."""
    low, high = values.min(), values.max()
    if not 0 <= low <= high < 2**16 or 1 < high < 128:
        raise ValueError(f"values from {low:g} to {high:g} are not of 8 to 16 bits, nor in 0..1")
    if high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    bits = int(high).bit_length()
    return (values.astype(np.int64) >> (bits - 8 if bits <= 14 else 8)).astype(np.uint8)
