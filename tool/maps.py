"""Maps and index images on disk: written whole or not at all, read without executing anything.

*Maps* are what the stages hand on: a dict ``{class index: float32 H x W}``, one ``.npy`` file per
image. NumPy stores a dict as a pickle, and a pickle may run any code when it is read; so
``load_npy_dict`` reads it through an unpickler that admits NumPy arrays, plain containers, numbers
and strings, and nothing else.

An *index image* is a uint8 H x W array of class indices, stored as a palette PNG.
"""

import glob
import math
import os
import pickle
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from tool.errors import DataError

NUM_PALETTE_COLOURS = 256
# Where a file grows until it is complete, from its name and a random word.
TEMPORARY_NAME = ".{}.{}.tmp"
# The label of pixels that count for nothing, in every index image (VOC's "void").
VOID = 255


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` complete, when the block ends without an error.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed;
    so no reader ever sees half a file and an older file stays whole until then. Missing folders
    are created. Raises OSError as ``open`` does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY_NAME.format(path.name, secrets.token_hex(4)))
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what an ``atomic_write`` to that path left behind because its process was killed.

    Nobody may be writing there at the time.
    """
    path = Path(path)
    for leftover in path.parent.glob(TEMPORARY_NAME.format(glob.escape(path.name), "*")):
        leftover.unlink()


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
        with open(path, "rb") as file:
            content = _read_npy_object(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except _ForbiddenError as error:
        raise DataError(
            f"{path}: refused, because it wants to load {error}; "
            "a file of maps or labels holds arrays and numbers only."
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a readable .npy dict ({error}); write it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict.")
    return content


def save_maps(path: str | os.PathLike, maps: Mapping[int, np.ndarray]) -> None:
    """Write maps ``{class index: H x W}`` as float32."""
    save_npy_dict(path, {int(k): np.asarray(v, dtype=np.float32) for k, v in maps.items()})


def load_maps(path: str | os.PathLike, size: tuple[int, int] | None = None) -> dict:
    """Maps ``{class index: float32 H x W}``, sorted by class.

    ``size`` is the (height, width) that they must have, where the caller knows it. Raises
    DataError if the file cannot be read, or a key, a size or a value is not what maps have.
    """
    content = load_npy_dict(path)
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
        sizes = " and ".join(sorted(f"{h} x {w}" for h, w in shapes))
        raise DataError(f"{path}: maps and image differ in size ({sizes}); make the maps again.")
    for key, value in maps.items():
        if not np.isfinite(value).all():
            raise DataError(f"{path}: the map of class {key} has values that are not finite.")
    return maps


def stack_maps(maps: Mapping[int, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Maps of an image of the given (H, W) as one array, float32 K x H x W, also where K is 0."""
    return np.array([*maps.values()], np.float32).reshape(len(maps), *size)


def _class_index_or_refuse(path: str | os.PathLike):
    def class_index(key: Any) -> int:
        if isinstance(key, bool) or not isinstance(key, int | np.integer) or key < 0:
            raise DataError(f"{path}: {key!r} is not a class index; maps are keyed by class.")
        return int(key)

    return class_index


def voc_palette() -> list[int]:
    """PASCAL VOC's 256 colours as a flat list R, G, B, R, G, B, ...

    Bits 0, 3, 6, ... of an index are red's bits from the highest down; 1, 4, 7, ... are green's;
    2, 5, 8, ... are blue's (the VOC development kit's colour map).
    """
    index = np.arange(NUM_PALETTE_COLOURS)
    palette = np.zeros((NUM_PALETTE_COLOURS, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (index >> (3 * place + channel)) & 1
            palette[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return palette.ravel().tolist()


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
    """The image in a file, decoded to its end, in its own mode.

    Raises DataError if the file is missing, not an image, truncated, or larger than Pillow's limit
    for decompression bombs.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}).") from error


class _ForbiddenError(Exception):
    """Names what a pickle wanted to load."""


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds what ``numpy.save`` writes for dicts of arrays, under NumPy 1's and 2's names.

    A pickle gets at stand-ins only: NumPy's own constructors and ``__setstate__`` take a forged
    state at its word and then read memory that is not theirs.
    """

    def find_class(self, module: str, name: str) -> Any:
        numpy_core = ("numpy.core.multiarray", "numpy._core.multiarray")
        if module in numpy_core and name == "_reconstruct":
            return _PickledArray
        if module in numpy_core and name == "scalar":
            return _scalar
        if (module, name) == ("numpy", "ndarray"):
            return "numpy.ndarray"  # only ever an argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return _PickledType
        if (module, name) == ("_codecs", "encode"):  # bytes under pickle protocol 2
            return _encode_latin1
        raise _ForbiddenError(f"{module}.{name}")


class _PickledType:
    """Stands in for ``numpy.dtype``: numbers, strings and objects, in either byte order."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSUO" or self.dtype.fields or self.dtype.subdtype:
            raise pickle.UnpicklingError(f"an array of {code}")

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]  # the rest of the state repeats the code, or forges it
        if byte_order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(byte_order)


class _PickledArray:
    """Stands in for an array that is being rebuilt; ``value`` is the array then."""

    def __init__(self, *_: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, pickled_type, is_fortran, content = state
        dtype, cells = pickled_type.dtype, math.prod(shape)
        if any(side < 0 for side in shape):
            raise pickle.UnpicklingError(f"an array of shape {shape}")
        if not dtype.hasobject:
            flat = _numbers(dtype, content, cells)
        elif isinstance(content, list) and len(content) == cells:
            flat = np.empty(cells, dtype)
            flat[:] = [_finished(item) for item in content]
        else:
            raise pickle.UnpicklingError("an array without its objects")
        self.value = flat.reshape(shape, order="F" if is_fortran else "C")


def _scalar(pickled_type: _PickledType, content: bytes | str) -> np.generic:
    return _numbers(pickled_type.dtype, content, 1)[0]


def _numbers(dtype: np.dtype, content: Any, count: int) -> np.ndarray:
    """That many numbers or strings from their raw bytes, which must be there to the last one."""
    if isinstance(content, str):  # bytes that Python 2 wrote
        content = content.encode("latin1")
    if dtype.hasobject or not isinstance(content, bytes) or len(content) != count * dtype.itemsize:
        raise pickle.UnpicklingError("an array without its bytes")
    return np.frombuffer(content, dtype).copy()


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def _finished(content: Any) -> Any:
    """The content with arrays in place of their stand-ins; a dict's values, too."""
    if isinstance(content, _PickledArray):
        if content.value is None:
            raise pickle.UnpicklingError("an array without content")
        return content.value
    if isinstance(content, dict):
        return {key: _finished(value) for key, value in content.items()}
    return content


def _read_npy_object(file: IO[bytes]) -> Any:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"an .npy file of version {version}")
    shape, _, dtype = read_header(file)
    if dtype != np.dtype(object) or shape != ():
        raise ValueError(f"an array of {dtype} with shape {shape} instead of a dict")
    # encoding: files that Python 2 wrote hold byte strings.
    content = _finished(_ArrayUnpickler(file, encoding="latin1").load())
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else content
