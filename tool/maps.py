"""Maps and index images on disk: written whole or not at all, read without running any code.

*Maps* are what the stages pass on: a dict ``{class index: float32 H x W}``, one file per image, in
one of two forms. ``.npy`` is the field's: NumPy stores a dict as a pickle (see
``tool.safe_pickle``). ``.npz`` is a compressed archive of arrays named by class. Wherever
``<id>.npy`` is expected, an ``<id>.npz`` may take its place. Class maps are also read in the forms
of ``tool.seeds``.

An *index image* is a uint8 H x W array of class indices, stored as a palette PNG.
"""

import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from tool import seeds
from tool.files import atomic_write
from tool.labels import VOID, voc_palette
from tool.run.errors import DataError, reason
from tool.safe_pickle import read_pickle

MAP_FORMATS = {"npy": ".npy", "npz": ".npz"}
# What photographs and masks come in. Pillow knows more, but for some starts other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
# How far scores may be from 0..1, and CRF scores from summing to one.
PROBABILITY_TOLERANCE = 1e-3
VOC_PALETTE = bytes(voc_palette())


def save_npy_dict(path: str | os.PathLike, content: Mapping) -> None:
    """Write a dict of arrays in the form that ``numpy.load(...).item()`` gives back."""
    with atomic_write(path) as file:
        np.save(file, np.array(dict(content), dtype=object))


def load_npy_dict(path: str | os.PathLike) -> dict:
    """The dict in an ``.npy`` file, as NumPy 1 and 2 write it; or in an ``.npz`` of maps, by class.

    Raises DataError if the file is missing, damaged, or more than arrays and plain data.
    """
    path = Path(path)
    try:
        return _read_npz(path) if path.suffix == MAP_FORMATS["npz"] else _read_npy(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or reason(error)}).") from error
    except Exception as error:  # a damaged file can raise nearly anything
        way = "remove it, and repeat the command that makes it"
        raise DataError(f"{path}: cannot be read ({reason(error)}); {way}.") from error


def _read_npy(path: Path) -> dict:
    file = io.BytesIO(path.read_bytes())
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if not dtype.hasobject:
        raise ValueError(f"it is an array of {dtype} with shape {shape}, not a dict")
    content = read_pickle(file.read()).item()
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return {k: np.asarray(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}


def _read_npz(path: Path) -> dict[int | str, np.ndarray | bytes]:
    with np.load(path, allow_pickle=False) as archive:
        return {int(name) if name.isdecimal() else name: archive[name] for name in archive.files}


def save_maps(
    path: str | os.PathLike, maps: Mapping[int, np.ndarray], dtype: str | type = np.float32
) -> None:
    """Write maps ``{class index: H x W}`` in the form of the path's ending.

    Maps of the same name in the other form are removed after that: they are outdated.
    """
    path = Path(path)
    content = {int(k): np.asarray(v, dtype=dtype) for k, v in maps.items()}
    if path.suffix == MAP_FORMATS["npz"]:
        with atomic_write(path) as file:
            np.savez_compressed(file, **{str(k): v for k, v in content.items()})
    else:
        save_npy_dict(path, content)
    for suffix in set(MAP_FORMATS.values()) - {path.suffix}:
        path.with_suffix(suffix).unlink(missing_ok=True)


def maps_file(path: str | os.PathLike) -> Path:
    """That ``<id>.npy``, or the ``<id>.npz`` in its place; raises DataError if both exist."""
    path = Path(path)
    other = path.with_suffix(MAP_FORMATS["npz"])
    if path.suffix != MAP_FORMATS["npy"] or not other.exists():
        return path
    if path.exists():
        raise DataError(f"{path}: exists as {other.name}, too; remove the outdated one.")
    return other


def load_maps(path: str | os.PathLike, size: tuple[int, int] | None = None) -> dict:
    """Maps ``{class index: float32 H x W}``, sorted by class, of ``maps_file(path)``.

    Raises DataError if the file cannot be read, holds no maps, or their (H, W) is not ``size``.
    """
    path = maps_file(path)
    maps = _checked_maps(path, load_npy_dict(path))
    _require_one_size(path, maps, size)
    return maps


def _checked_maps(path: Path, content: Mapping) -> dict:
    """A file's content as maps {class index: finite float32 array of two dimensions}, sorted."""
    maps: dict[int, np.ndarray] = {}
    for key, value in content.items():
        if isinstance(key, bool) or not isinstance(key, int | np.integer) or key < 0:
            problem = f"{key!r} is not a class index; maps are keyed by class"
            raise DataError(f"{path}: {problem} (its keys: {seeds.listed(content)}).")
        if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "fiu":
            raise DataError(f"{path}: map of class {key} is not a two-dimensional number array.")
        maps[int(key)] = value.astype(np.float32, copy=False)
        if not np.isfinite(maps[int(key)]).all():
            raise DataError(f"{path}: the map of class {key} has values that are not finite.")
    return dict(sorted(maps.items()))


class SizeError(DataError):
    """Maps differ in size from each other, or from their image; ``size`` is the first one's."""

    def __init__(self, message: str, size: tuple[int, int]):
        super().__init__(message)
        self.size = size


def _require_one_size(path: Path, maps: Mapping, size: tuple[int, int] | None) -> None:
    """Raise DataError if maps differ in (H, W), or from the image's, if that is known."""
    shapes = {value.shape for value in maps.values()} | ({tuple(size)} if size else set())
    if len(shapes) > 1:
        sizes = " and ".join(sorted(" x ".join(map(str, shape)) for shape in shapes))
        problem = f"maps and image differ in size ({sizes}); make the maps again"
        raise SizeError(f"{path}: {problem}.", next(iter(maps.values())).shape)


def stack_maps(maps: Mapping[int, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Maps of an image of the given (H, W) as one array, float32 K x H x W, also where K is 0."""
    return np.array([*maps.values()], np.float32).reshape(len(maps), *size)


def load_crf_scores(low_path: Path, high_path: Path, size: tuple[int, int]) -> tuple[dict, dict]:
    """CRF scores {0 background, k + 1 class k: float32 H x W} of an image with two alphas.

    Raises DataError as ``load_maps`` does, for values outside 0..1, and if the two do not fit.
    """
    low_path, high_path = maps_file(low_path), maps_file(high_path)
    low, high = load_maps(low_path, size), load_maps(high_path, size)
    for path, maps in ((low_path, low), (high_path, high)):
        _require_scores(path, maps, "make the maps again with infer_cls.py")
    if low.keys() != high.keys() or 0 not in low:
        problem = f"need background (0) and the same classes, not {sorted(low)} and {sorted(high)}"
        way = "name the folders of infer_cls.py's --out_la_crf and --out_ha_crf"
        raise DataError(f"{low_path} and {high_path}: {problem}; {way}.")
    # A lower alpha means more background, whatever the image; a difference below 0.02 is no sign.
    if low[0].mean() < high[0].mean() - 0.02:
        problem = f"has less background than {high_path}, so the folders are swapped"
        raise DataError(f"{low_path}: {problem}; --la_crf_dir (--la) is for --out_la_crf's files.")
    return low, high


def load_cams(
    path: str | os.PathLike,
    size: tuple[int, int],
    num_classes: int,
    normalization: str | None = None,
) -> dict:
    """Class maps {class: float32 H x W in 0..1} of an image of the given (H, W), from any form.

    Maps of a smaller size are resized, and then scaled by a ``normalization`` of ``tool.seeds``.
    Raises DataError as ``load_maps`` does, for CRF scores, for a class that does not exist, and for
    values outside 0..1.
    """
    path = maps_file(path)
    try:
        content = seeds.by_class(load_npy_dict(path))
    except ValueError as error:
        raise DataError(f"{path}: {error}; docs/seeds.md lists the forms.") from error
    maps = {k: seeds.resize(v, size) for k, v in _checked_maps(path, content).items()}
    _require_one_size(path, maps, size)
    # A single map of ones is the background of an image without objects, or a class all over it.
    several = 0 in maps and len(maps) > 1
    if several and np.allclose(sum(maps.values()), 1, atol=PROBABILITY_TOLERANCE):
        problem = "holds CRF scores (they sum to one, background first), not class activation maps"
        raise DataError(f"{path}: {problem}; name the folder of infer_cls.py's --out_cam.")
    if maps and max(maps) >= num_classes:
        problem = f"has a map of class {max(maps)}, but classes are 0 to {num_classes - 1}"
        raise DataError(f"{path}: {problem}; see --classes.")
    if normalization:
        maps = {k: seeds.normalize(values, normalization) for k, values in maps.items()}
    _require_scores(path, maps, "a background (--alpha, --bg) needs --normalize max or minmax")
    return maps


def _require_scores(path: Path, maps: Mapping[int, np.ndarray], way: str) -> None:
    """Raise DataError, with a way out, if a map of this file has values that are not in 0..1."""
    for key, values in maps.items():
        low, high = values.min(), values.max()
        if low < -PROBABILITY_TOLERANCE or high > 1 + PROBABILITY_TOLERANCE:
            problem = f"class {key} has scores from {low:g} to {high:g}, not in 0..1"
            raise DataError(f"{path}: {problem}; {way}.")


def save_index_png(path: str | os.PathLike, label: np.ndarray) -> None:
    """Write an index image, uint8 H x W, as a PNG with VOC's palette; the values are unchanged."""
    image = Image.fromarray(label)
    image.putpalette(voc_palette())  # turns gray into palette mode, indices as they are
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def load_index_png(path: str | os.PathLike, num_labels: int = VOID) -> np.ndarray:
    """The class indices, uint8 H x W, of a palette or 8-bit gray image; else DataError.

    Editors reorder palettes. Where all colours of an image are VOC's of labels below ``num_labels``
    or void, but at other indices, the colours count.
    """
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise DataError(f"{path}: has mode {image.mode}; an index image is palette or 8-bit gray.")
    # Pillow spreads gray of 2 or 4 bits over 0..255.
    label = np.array(image) // np.uint8(255 // (2 ** image.info["gray_bits"] - 1))
    palette = bytes(image.getpalette() or ())
    if VOC_PALETTE.startswith(palette):  # a gray image has none
        return label
    used = np.flatnonzero(np.bincount(label.ravel())).tolist()
    colours = [palette[3 * k : 3 * k + 3] for k in used]
    label_of = {VOC_PALETTE[3 * k : 3 * k + 3]: k for k in (*range(num_labels), VOID)}
    labels = [label_of.get(colour) for colour in colours]
    if labels == used or colours == [bytes([k] * 3) for k in used]:  # VOC's, or gray levels
        return label
    if None in labels or len(set(labels)) < len(labels):
        _warn_of_palette(Path(path).parent, "other colours than VOC's: indices are the labels")
        return label
    _warn_of_palette(Path(path).parent, "VOC's colours at other indices: colours are the labels")
    table = np.zeros(VOID + 1, np.uint8)
    table[used] = labels
    return table[label]


@functools.cache  # so that a process says it once
def _warn_of_palette(folder: Path, text: str) -> None:
    print(f"WARNING: {folder} has index images with {text}.", file=sys.stderr)


def open_image(path: str | os.PathLike) -> Image.Image:
    """The (first) image in a file of one of IMAGE_FORMATS, decoded to its end, in its own mode.

    Raises DataError if it is missing, damaged or too large.
    """
    try:
        with warnings.catch_warnings():
            # Above the limit, Pillow only warns; at twice the limit, it refuses.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                # Of 16 bits a colour, Pillow keeps the upper 8. After loading, no tile names them.
                is_deep = re.search("(RGB|A|X);16", str(image.tile))
                few_bits = re.search("'L;([24])'", str(image.tile))
                image.info["gray_bits"] = int(few_bits[1]) if few_bits else 8
                image.load()
                if is_deep and max(high for _, high in image.convert("RGB").getextrema()) < 64:
                    raise ValueError("of 16 bits a colour, it uses 14 or less; save it with 8 bits")
                return image.copy()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"Pillow's limit against decompression bombs, {Image.MAX_IMAGE_PIXELS}"
        raise DataError(f"{path}: has more pixels than {limit}; make the image smaller.") from error
    except Exception as error:  # a damaged image can raise nearly anything
        raise DataError(f"{path}: not a readable image ({error}).") from error
