"""Maps and index images on disk: written whole or not at all, read without executing anything.

*Maps* are what the stages hand on: a dict ``{class index: float32 H x W}``, one file per image, in
one of two forms. ``.npy`` is the field's: NumPy stores a dict as a pickle, and a pickle may run any
code when it is read; so ``load_npy_dict`` reads it through an unpickler that admits NumPy arrays,
plain containers, numbers and strings, and nothing else. ``.npz`` is compressed and has no pickle: a
zip archive of arrays named by class. What is said of ``<id>.npy`` holds for an ``<id>.npz`` in its
place (see ``maps_file``).

An *index image* is a uint8 H x W array of class indices, stored as a palette PNG.
"""

import math
import mmap
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tool.files import atomic_write
from tool.labels import VOID, voc_palette
from tool.pickles import Budget, Constructor, ForbiddenError, Pending, map_file, read_pickle
from tool.run.errors import DataError, reason

# The forms of maps, by file name ending.
MAP_FORMATS = {"npy": ".npy", "npz": ".npz"}
# Bytes of an array's header in an .npz file; NumPy writes 128.
MAX_HEADER_BYTES = 4096
# What photographs and masks come in. Pillow knows more, but for some starts other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
# How far scores may be from 0..1, and CRF scores from summing to one.
PROBABILITY_TOLERANCE = 1e-3
# Share of background by which the high alpha's scores must exceed the low one's to be told apart.
SWAPPED_MARGIN = 0.02


def save_npy_dict(path: str | os.PathLike, content: Mapping) -> None:
    """Write a dict of arrays in the form that ``numpy.load(...).item()`` gives back."""
    with atomic_write(path) as file:
        np.save(file, np.array(dict(content), dtype=object))


def load_npy_dict(path: str | os.PathLike) -> dict:
    """The dict in an ``.npy`` file, as ``save_npy_dict`` and NumPy 1 and 2 write it.

    Raises DataError if the file is missing, damaged, holds something else than a dict, or wants
    anything but arrays, plain containers, numbers and strings.
    """
    try:
        content = _read_npy_object(map_file(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ForbiddenError as error:
        raise DataError(
            f"{path}: refused, because it wants to load {error}; "
            "a file of maps or labels holds arrays and numbers only."
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(
            f"{path}: not a readable .npy dict ({reason(error)}); write it again."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict.")
    return content


def save_maps(
    path: str | os.PathLike, maps: Mapping[int, np.ndarray], dtype: str | type = np.float32
) -> None:
    """Write maps ``{class index: H x W}`` as float32, or float16, in the form of the path's ending.

    Maps of the same name in the other form are removed after that: they would contradict.
    """
    path = Path(path)
    content = {int(k): np.asarray(v, dtype=dtype) for k, v in maps.items()}
    if path.suffix == MAP_FORMATS["npz"]:
        with atomic_write(path) as file:
            np.savez_compressed(file, **{str(k): v for k, v in content.items()})
    else:
        save_npy_dict(path, content)
    for other in _other_forms(path):
        other.unlink(missing_ok=True)


def maps_file(path: str | os.PathLike) -> Path:
    """The file that has the maps of ``<id>.npy``: that one, or the ``<id>.npz`` in its place.

    Raises DataError if there are both.
    """
    path = Path(path)
    others = [other for other in _other_forms(path) if other.exists()]
    if not others:
        return path
    if path.exists():
        raise DataError(f"{path}: is there as {others[0].name}, too; remove the outdated one.")
    return others[0]


def _other_forms(path: Path) -> list[Path]:
    if path.suffix not in MAP_FORMATS.values():
        return []
    # Not with_suffix: an id may hold dots.
    stem = path.name.removesuffix(path.suffix)
    return [
        path.with_name(stem + ending) for ending in MAP_FORMATS.values() if ending != path.suffix
    ]


def load_maps(path: str | os.PathLike, size: tuple[int, int] | None = None) -> dict:
    """Maps ``{class index: float32 H x W}``, sorted by class, of ``maps_file(path)``.

    ``size`` is the (height, width) that they must have, where the caller knows it. Raises
    DataError if the file cannot be read, or a key, a size or a value is not what maps have.
    """
    path = maps_file(path)
    is_npz = path.suffix == MAP_FORMATS["npz"]
    content = _load_npz_maps(path, size) if is_npz else load_npy_dict(path)
    maps = {}
    for key in sorted(content, key=_class_index_or_refuse(path)):
        value = content[key]
        if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "fiu":
            raise DataError(
                f"{path}: the map of class {key} is not a two-dimensional number array."
            )
        maps[int(key)] = value.astype(np.float32, copy=False)
    shapes = {value.shape for value in maps.values()}
    if size is not None:
        shapes.add(tuple(size))
    if len(shapes) > 1:
        raise _sizes_differ(path, shapes)
    for key, value in maps.items():
        if not np.isfinite(value).all():
            raise DataError(f"{path}: the map of class {key} has values that are not finite.")
    return maps


def _sizes_differ(path: Path, shapes: Iterable[tuple[int, ...]]) -> DataError:
    sizes = " and ".join(sorted(" x ".join(map(str, shape)) for shape in shapes))
    return DataError(f"{path}: maps and image differ in size ({sizes}); make the maps again.")


def _load_npz_maps(path: Path, size: tuple[int, int] | None) -> dict[int, np.ndarray]:
    """The arrays of an ``.npz`` file by class, none of them larger than the image."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(members) > VOID or len(set(names)) < len(names):
                raise ValueError(f"it has {len(members)} arrays, of {len(set(names))} names")
            classes = [_class_of_member(name) for name in names]
            if len(set(classes)) < len(classes):
                raise ValueError("it has one class twice")
            return {
                key: _read_member(path, archive, member, size)
                for key, member in zip(classes, members, strict=True)
            }
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataError(
            f"{path}: not a readable .npz of maps ({error}); write it again."
        ) from error


def _class_of_member(name: str) -> int:
    digits = name.removesuffix(MAP_FORMATS["npy"])
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 3):
        raise ValueError(f"{name[:20]!r} is not named by a class index")
    return int(digits)


def _read_member(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: tuple[int, int] | None
) -> np.ndarray:
    """One array; memory is taken only for what an image of that size can have."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed in a way that NumPy does not use")
    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{member.filename} is no array of .npy version 1.0")
        header = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_HEADER_BYTES)
        shape, is_fortran, dtype = header
        if dtype.kind not in "fiu" or len(shape) != 2:
            raise ValueError(f"{member.filename} is an array of {dtype} with shape {shape}")
        if size is not None and shape != tuple(size):
            raise _sizes_differ(path, {shape, tuple(size)})
        cells, most = math.prod(shape), 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        if min(shape) < 0 or cells > most:
            raise ValueError(f"{member.filename} has the size {shape[0]} x {shape[1]}")
        num_bytes = cells * dtype.itemsize
        # One more, so that what is too long is noticed, and the check sum of the rest verified.
        content = file.read(num_bytes + 1)
    if len(content) != num_bytes:
        raise ValueError(f"{member.filename} has {len(content)} bytes instead of {num_bytes}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")


def stack_maps(maps: Mapping[int, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Maps of an image of the given (H, W) as one array, float32 K x H x W, also where K is 0."""
    return np.array([*maps.values()], np.float32).reshape(len(maps), *size)


def load_crf_scores(low_path: Path, high_path: Path, size: tuple[int, int]) -> tuple[dict, dict]:
    """CRF scores {0 background, k + 1 class k: float32 H x W} of an image with two alphas.

    Raises DataError as ``load_maps`` does, for values that are no probabilities, and where the two
    do not belong together.
    """
    low_path, high_path = maps_file(low_path), maps_file(high_path)
    low, high = load_maps(low_path, size), load_maps(high_path, size)
    for path, scores in ((low_path, low), (high_path, high)):
        require_scores(path, scores)
    if low.keys() != high.keys() or 0 not in low:
        raise DataError(
            f"{low_path} and {high_path}: must hold the background (0) and the same classes, "
            f"but hold {sorted(low)} and {sorted(high)}; make both again with infer_cls.py."
        )
    # A lower alpha means more background, whatever the image.
    if low[0].mean() < high[0].mean() - SWAPPED_MARGIN:
        raise DataError(
            f"{low_path}: has less background than {high_path}, so the folders are swapped; "
            "--la_crf_dir (--la) is what infer_cls.py wrote to --out_la_crf."
        )
    return low, high


def load_cams(path: str | os.PathLike, size: tuple[int, int], num_classes: int) -> dict:
    """Class activation maps {class: float32 H x W} of an image of the given (H, W).

    Raises DataError as ``load_maps`` does, and for CRF scores, in which each class stands one
    further, or a class that the class list does not have.
    """
    path = maps_file(path)
    maps = load_maps(path, size)
    # A single map of ones is the background of an image without objects, or a class all over it.
    several = 0 in maps and len(maps) > 1
    if several and np.allclose(sum(maps.values()), 1, atol=PROBABILITY_TOLERANCE):
        raise DataError(
            f"{path}: holds CRF scores (they sum to one, background first), not class activation "
            "maps; name the folder that infer_cls.py wrote to --out_cam."
        )
    if maps and max(maps) >= num_classes:
        raise DataError(
            f"{path}: has a map of class {max(maps)}, but there are {num_classes} classes "
            "(counted from 0); see --classes."
        )
    return maps


def require_scores(path: str | os.PathLike, maps: Mapping[int, np.ndarray]) -> None:
    """Raise DataError if a map of this file has values that are not in 0..1."""
    for key, values in maps.items():
        low, high = values.min(), values.max()
        if low < -PROBABILITY_TOLERANCE or high > 1 + PROBABILITY_TOLERANCE:
            raise DataError(
                f"{path}: the map of class {key} has values from {low:g} to {high:g}, but scores "
                "are in 0..1; make the maps again with infer_cls.py."
            )


def _class_index_or_refuse(path: str | os.PathLike):
    def class_index(key: Any) -> int:
        if isinstance(key, bool) or not isinstance(key, int | np.integer) or key < 0:
            raise DataError(f"{path}: {key!r} is not a class index; maps are keyed by class.")
        return int(key)

    return class_index


def save_index_png(path: str | os.PathLike, label: np.ndarray) -> None:
    """Write an index image, uint8 H x W, as a PNG with VOC's palette; the values are unchanged."""
    if label.dtype != np.uint8 or label.ndim != 2:
        raise ValueError(f"an index image is uint8 H x W, not {label.dtype} {label.shape}")
    image = Image.fromarray(label)
    image.putpalette(voc_palette())  # turns gray into palette mode, indices as they are
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def load_index_png(path: str | os.PathLike) -> np.ndarray:
    """The class indices of a palette or 8-bit gray image: uint8 H x W.

    Raises DataError if the file is missing, damaged or of another mode (then its values are
    colours, not classes).
    """
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise DataError(
            f"{path}: has mode {image.mode}, but an index image is palette or 8-bit gray."
        )
    return np.array(image)


def open_image(path: str | os.PathLike) -> Image.Image:
    """The (first) image in a file of one of IMAGE_FORMATS, decoded to its end, in its own mode.

    Raises DataError if the file is missing, not such an image, truncated, or has more pixels than
    ``PIL.Image.MAX_IMAGE_PIXELS``, Pillow's limit against decompression bombs.
    """
    try:
        with warnings.catch_warnings():
            # Above the limit, Pillow only warns; at twice the limit, it refuses.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                image.load()
                return image.copy()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: has more pixels than Pillow's limit against decompression bombs, "
            f"{Image.MAX_IMAGE_PIXELS}; make the image smaller."
        ) from error
    except Exception as error:  # a damaged image can raise nearly anything
        raise DataError(f"{path}: not a readable image ({error}).") from error


# Code characters of the types that maps and labels have: numbers, truth values, text, objects.
_TYPE_CODE = re.compile(r"[biufcSUO?]\d{0,9}")
MAX_DIMENSIONS = 32
# An array object, without its cells.
ARRAY_BYTES = 128


class _PickledType(Pending):
    """Stands in for ``numpy.dtype``: numbers, strings and objects, in either byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any):
        super().__init__()
        if not isinstance(code, str) or not _TYPE_CODE.fullmatch(code):
            raise ValueError(f"it has an array of {str(code)[:20]}")
        self.dtype = np.dtype(code)

    def build(self, state: tuple) -> np.dtype:
        byte_order = state[1]  # the rest of the state repeats the code, or forges it
        return self.dtype.newbyteorder(byte_order) if byte_order in ("<", ">") else self.dtype


class _PickledArray(Pending):
    """Stands in for an array that is being rebuilt.

    NumPy's own constructors take a forged state at its word and then read memory that is not
    theirs.
    """

    __slots__ = ("budget",)

    def __init__(self, budget: Budget):
        super().__init__()
        self.budget = budget

    def build(self, state: tuple) -> np.ndarray:
        _, shape, dtype, is_fortran, content = state
        if not (
            isinstance(shape, tuple)
            and len(shape) <= MAX_DIMENSIONS
            and all(isinstance(side, int) and 0 <= side <= sys.maxsize for side in shape)
        ):
            raise ValueError("it has an array of an impossible shape")
        cells, order = math.prod(shape), "F" if is_fortran else "C"
        if not dtype.hasobject:
            return _numbers(self.budget, dtype, content, cells).reshape(shape, order=order).copy()
        if not isinstance(content, list) or len(content) != cells:
            raise ValueError("it has an array without its objects")
        self.budget.charge(ARRAY_BYTES + cells * dtype.itemsize)
        flat = np.empty(cells, dtype)
        for index, item in enumerate(content):
            flat[index] = item
        return flat.reshape(shape, order=order)


def _numbers(budget: Budget, dtype: np.dtype, content: Any, count: int) -> np.ndarray:
    """That many numbers or strings, where their raw bytes stand, which must all be there."""
    if isinstance(content, str):  # bytes that Python 2 wrote
        budget.require(2 * len(content))
        content = memoryview(content.encode("latin1"))
    size = count * dtype.itemsize
    if dtype.hasobject or not isinstance(content, memoryview) or len(content) != size:
        raise ValueError("it has an array without its bytes")
    budget.require(ARRAY_BYTES + size)
    return np.frombuffer(content, dtype) if size else np.empty(count, dtype)


def _admitted_names(budget: Budget) -> dict[str, Any]:
    """What ``numpy.save`` names in a pickle of arrays, under NumPy 1's and 2's modules."""

    def scalar(dtype: np.dtype, content: memoryview | str) -> np.generic:
        return _numbers(budget, dtype, content, 1)[0]

    def encode_latin1(text: str, encoding: str) -> memoryview:
        if encoding != "latin1":
            raise ValueError(f"it has bytes in the encoding {encoding[:20]}")
        budget.charge(len(text))
        return memoryview(text.encode("latin1"))

    names = {
        "numpy.ndarray": "numpy.ndarray",  # only ever an argument of _reconstruct
        "numpy.dtype": Constructor(_PickledType),
        "_codecs.encode": Constructor(encode_latin1),  # bytes under pickle protocol 2
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names[f"{module}._reconstruct"] = Constructor(lambda *_: _PickledArray(budget))
        names[f"{module}.scalar"] = Constructor(scalar)
    return names


def _read_npy_object(data: mmap.mmap) -> Any:
    version = np.lib.format.read_magic(data)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"it is an .npy file of version {version}")
    shape, _, dtype = read_header(data)
    if dtype != np.dtype(object) or shape != ():
        raise ValueError(f"it is an array of {dtype} with shape {shape} instead of a dict")
    budget = Budget(len(data))
    content, _ = read_pickle(data, data.tell(), _admitted_names(budget), budget)
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else content
