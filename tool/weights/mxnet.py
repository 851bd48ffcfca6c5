"""MXNet's ``.params``: a list of arrays and their names, in the forms legacy, V1, V2 and V3."""

import math
import re
import struct

import numpy as np

LIST_MAGIC = 0x112
V1_MAGIC, V2_MAGIC, V3_MAGIC = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
# MXNet's numbers of the types.
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
DENSE = 0
_KINDS = {
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
# conv1a_weight, bn7_gamma; res2a_branch1_weight, bn4b5_branch2b1_moving_mean.
_PLAIN = re.compile(r"(?:arg:|aux:)?(conv1a|bn7)_(\w+)")
_BLOCK = re.compile(r"(?:arg:|aux:)?(res|bn)(\d)(?:a|[b-z](\d+))_(branch[0-9a-z]+)_(\w+)")


def read_params(data: memoryview) -> dict[str, np.ndarray]:
    """The arrays in a ``.params`` file's bytes, by name; without names ``0``, ``1``, ...

    They are views of ``data``, in its byte order. Raises ValueError if the bytes are no such list,
    or damaged.
    """
    reader = _Reader(data)
    magic, _, count = reader.take("<3Q")
    if magic != LIST_MAGIC:
        raise ValueError("it does not begin as MXNet's files do")
    arrays = [_array(reader) for _ in range(count)]
    (num_names,) = reader.take("<Q")
    if num_names not in (0, count):
        raise ValueError(f"it has {count} arrays, but {num_names} names")
    names = [str(reader.take_bytes(*reader.take("<Q")), "utf-8") for _ in range(num_names)]
    if reader.position != len(data):
        raise ValueError("it has more bytes behind its end")
    return dict(zip(names or map(str, range(count)), arrays, strict=True))


def network_name(name: str) -> str:
    """ResNet-38's name of an array: block 2a is b2, 4b5 is b4_5; names of other layers stay."""
    if match := _PLAIN.fullmatch(name):
        layer, kind = match.groups()
    elif match := _BLOCK.fullmatch(name):
        layer_type, stage, index, branch, kind = match.groups()
        block = f"b{stage}_{index}" if index else f"b{stage}"
        layer = f"{block}.{'conv' if layer_type == 'res' else 'bn'}_{branch}"
    else:
        return name
    return f"{layer}.{_KINDS[kind]}" if kind in _KINDS else name


class _Reader:
    """Takes one thing after the other off the bytes."""

    def __init__(self, data: memoryview):
        self.data, self.position = data, 0

    def take_bytes(self, size: int) -> memoryview:
        if size > len(self.data) - self.position:
            raise ValueError("it ends too early, or a length is damaged")
        self.position += size
        return self.data[self.position - size : self.position]

    def take(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take_bytes(struct.calcsize(form)))


def _array(reader: _Reader) -> np.ndarray:
    (magic,) = reader.take("<I")
    if magic in (V2_MAGIC, V3_MAGIC) and reader.take("<i") != (DENSE,):
        raise ValueError("it has a sparse array; save it dense")
    num_sides = reader.take("<I")[0] if magic in (V1_MAGIC, V2_MAGIC, V3_MAGIC) else magic
    if num_sides == 0:
        return np.empty(0, np.float32)
    shape = reader.take(f"<{num_sides}{'I' if num_sides == magic else 'q'}")
    _, _, type_number = reader.take("<3i")  # device type and id, and the numbers' type
    if not 0 <= type_number < len(TYPES) or min(shape) < 0:
        raise ValueError(f"it has an array of shape {shape[:8]} and type {type_number}")
    dtype = np.dtype(TYPES[type_number])
    raw = reader.take_bytes(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)
