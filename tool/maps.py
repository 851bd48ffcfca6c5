"""Maps and index images on disk: written whole or not at all, read without running any code.

*Maps* are what the stages pass on: a dict ``{class index: float32 H x W}``, one file per image, in
one of two forms. ``.npy`` is the field's: NumPy stores a dict as a pickle, which is read by
``tool.safe_pickle``. ``.npz`` is compressed and has no pickle: a zip archive of arrays named by
class. Wherever ``<id>.npy`` is expected, an ``<id>.npz`` may take its place (see ``maps_file``).

An *index image* is a uint8 H x W array of class indices, stored as a palette PNG.
"""

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tool.files import atomic_write
from tool.labels import voc_palette
from tool.run.errors import DataError, reason
from tool.safe_pickle import ForbiddenError, read_pickle

# The forms of maps, by file name ending.
MAP_FORMATS = {"npy": ".npy", "npz": ".npz"}
# What photographs and masks come in. Pillow knows more, but for some starts other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
# How far scores may be from 0..1, and CRF scores from summing to one.
PROBABILITY_TOLERANCE = 1e-3
# By how much more background must the high alpha have on average to count as swapped with the low.
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
    with _data_errors(path, ".npy dict"):
        content = _read_npy_object(Path(path).read_bytes())
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict.")
    return {k: np.asarray(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}


def _read_npy_object(data: bytes) -> Any:
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its version is not 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.dtype(object) or shape != ():
        raise ValueError(f"it is an array of {dtype} with shape {shape} instead of a dict")
    content = read_pickle(file.read())
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else content


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
    if other := _other_form(path):
        other.unlink(missing_ok=True)


def maps_file(path: str | os.PathLike) -> Path:
    """The file that has the maps of ``<id>.npy``: that one, or the ``<id>.npz`` in its place.

    Raises DataError if both exist.
    """
    path = Path(path)
    other = _other_form(path)
    if other is None or not other.exists():
        return path
    if path.exists():
        raise DataError(f"{path}: exists as {other.name}, too; remove the outdated one.")
    return other


def _other_form(path: Path) -> Path | None:
    suffix = {".npy": ".npz", ".npz": ".npy"}.get(path.suffix)
    return path.with_suffix(suffix) if suffix else None


def load_maps(path: str | os.PathLike, size: tuple[int, int] | None = None) -> dict:
    """Maps ``{class index: float32 H x W}``, sorted by class, of ``maps_file(path)``.

    ``size`` is the (height, width) that they must have, where the caller knows it. Raises
    DataError if the file cannot be read, or a key, a size or a value is not what maps have.
    """
    path = maps_file(path)
    is_npz = path.suffix == MAP_FORMATS["npz"]
    content = _load_npz(path) if is_npz else load_npy_dict(path)
    maps: dict[int, np.ndarray] = {}
    for key, value in content.items():
        if isinstance(key, bool) or not isinstance(key, int | np.integer) or key < 0:
            raise DataError(f"{path}: {key!r} is not a class index; maps are keyed by class.")
        if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "fiu":
            raise DataError(
                f"{path}: the map of class {key} is not a two-dimensional number array."
            )
        maps[int(key)] = value.astype(np.float32, copy=False)
        if not np.isfinite(maps[int(key)]).all():
            raise DataError(f"{path}: the map of class {key} has values that are not finite.")
    shapes = {value.shape for value in maps.values()} | ({tuple(size)} if size else set())
    if len(shapes) > 1:
        sizes = " and ".join(sorted(" x ".join(map(str, shape)) for shape in shapes))
        raise DataError(f"{path}: maps and image differ in size ({sizes}); make the maps again.")
    return dict(sorted(maps.items()))


def _load_npz(path: Path) -> dict[int, Any]:
    """The arrays of an ``.npz`` file by class; anything else in it as bytes."""
    with _data_errors(path, ".npz of maps"), np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            if not name.isdecimal() or str(int(name)) != name:
                raise ValueError(f"{name[:20]!r} is not named by a class index")
        return {int(name): archive[name] for name in archive.files}


@contextmanager
def _data_errors(path: str | os.PathLike, kind: str) -> Iterator[None]:
    """Turns whatever reading such a file raises into a DataError of one sentence."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ForbiddenError as error:
        raise DataError(
            f"{path}: refused, because it wants to load {error}; "
            "a file of maps or labels holds arrays and numbers only."
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(
            f"{path}: not a readable {kind} ({reason(error)}); write it again."
        ) from error


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

    Raises DataError as ``load_maps`` does, and for CRF scores, whose class indices are one
    higher, or a class that the class list does not have.
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
