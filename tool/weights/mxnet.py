"""MXNet's ``.params``: a list of arrays and their names, in the forms legacy, V1, V2 and V3."""

import io
import math
import re
import struct

import numpy as np

V1_MAGIC, V2_MAGIC, V3_MAGIC = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")  # by their numbers in a file
_KINDS = {
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
# conv1a_weight, bn7_gamma; res2a_branch1_weight, bn4b5_branch2b1_moving_mean.
_NAME = re.compile(
    r"(?:arg:|aux:)?(conv1a|bn7|(res|bn)(\d)(?:a|[b-z](\d+))_(branch[0-9a-z]+))_(\w+)"
)


def read_params(data: bytes) -> dict[str, np.ndarray]:
    """The arrays in a ``.params`` file's bytes, by name; ValueError if they are damaged."""
    file, names = io.BytesIO(data), []
    _, _, count = _take(file, "3Q")  # 0x112, a reserved number, and how many arrays follow
    arrays = [_array(file) for _ in range(count)]
    (num_names,) = _take(file, "Q")
    if num_names not in (0, count):
        raise ValueError(f"it has {count} arrays, but {num_names} names")
    for _ in range(num_names):
        (size,) = _take(file, "Q")
        (name,) = _take(file, f"{size}s")
        names.append(name.decode())
    if file.read(1):
        raise ValueError("it has more bytes behind its end")
    return dict(zip(names or map(str, range(count)), arrays, strict=True))


def network_name(name: str) -> str:
    """ResNet-38's name of an array: block 2a is b2, 4b5 is b4_5; names of other layers stay."""
    match = _NAME.fullmatch(name)
    if not match or match[6] not in _KINDS:
        return name
    layer, layer_type, stage, index, branch, kind = match.groups()
    if branch:
        block = f"b{stage}_{index}" if index else f"b{stage}"
        layer = f"{block}.{'conv' if layer_type == 'res' else 'bn'}_{branch}"
    return f"{layer}.{_KINDS[kind]}"


def _take(file: io.BytesIO, form: str) -> tuple:
    """The next values of the file, little-endian, in struct's form."""
    try:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
    except struct.error as error:
        raise ValueError("it ends too early, or a length is damaged") from error


def _array(file: io.BytesIO) -> np.ndarray:
    (magic,) = _take(file, "I")
    if magic in (V2_MAGIC, V3_MAGIC) and _take(file, "i") != (0,):  # dense
        raise ValueError("it has a sparse array; save it dense")
    num_sides = _take(file, "I")[0] if magic in (V1_MAGIC, V2_MAGIC, V3_MAGIC) else magic
    if num_sides == 0:
        return np.empty(0, np.float32)
    shape = _take(file, f"{num_sides}{'I' if num_sides == magic else 'q'}")
    _, _, type_number = _take(file, "3i")  # device type and id, and the numbers' type
    if not 0 <= type_number < len(TYPES) or min(shape) < 0:
        raise ValueError(f"it has an array of shape {shape[:8]} and type {type_number}")
    dtype = np.dtype(TYPES[type_number])
    (raw,) = _take(file, f"{math.prod(shape) * dtype.itemsize}s")
    return np.frombuffer(raw, dtype).reshape(shape)
