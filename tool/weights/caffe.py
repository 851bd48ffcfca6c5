"""Caffe's ``.caffemodel``: the blobs of a protobuf NetParameter, old ``layers`` and new ``layer``.

A reader of protobuf's wire format is enough: it skips what it does not know.
"""

import math
from collections.abc import Iterator

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
# Fields of NetParameter that hold layers, each with its layer's fields of name and blobs.
LAYER_FIELDS = {100: (1, 7), 2: (4, 6)}
# Fields of BlobProto: the legacy sides, the numbers, and the shape.
LEGACY_SIDES = (1, 2, 3, 4)
FLOATS, DOUBLES, SHAPE = 5, 8, 7
_KINDS = {"0": "weight", "1": "bias"}


def read_caffemodel(data: bytes) -> dict[str, np.ndarray]:
    """The blobs in a ``.caffemodel``'s bytes: ``<layer>.0``, ``<layer>.1``, ...

    float32, or float64 where the file has doubles; of the stated shape, which old files fill up to
    four sides. Raises ValueError if they are no NetParameter, or damaged.
    """
    blobs = {}
    for number, value in _fields(memoryview(data)):
        if number in LAYER_FIELDS:
            name_field, blob_field = LAYER_FIELDS[number]
            parts = list(_fields(value))
            name = next((str(part, "utf-8", "replace") for n, part in parts if n == name_field), "")
            messages = [part for n, part in parts if n == blob_field]
            blobs.update({f"{name}.{index}": _blob(part) for index, part in enumerate(messages)})
    return blobs


def network_name(name: str) -> str:
    """The network's name of a blob: ``fc6.0`` is fc6.weight, ``fc6.1`` is fc6.bias."""
    layer, _, index = name.rpartition(".")
    return f"{layer}.{_KINDS.get(index, index)}"


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field in order: an integer for a varint, else its bytes."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
        elif wire_type == BYTES or wire_type in FIXED_SIZES:
            size = FIXED_SIZES.get(wire_type)
            if size is None:
                size, position = _varint(message, position)
            if size > len(message) - position:
                raise ValueError("a length points past its end")
            value, position = message[position : position + size], position + size
        else:
            raise ValueError(f"a field has the unknown type {wire_type}")
        yield number, value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number that begins there, seven bits a byte in up to ten, and the position behind it."""
    value = 0
    for index, byte in enumerate(message[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("it ends in the middle of a number, or a number has no end")


def _blob(message: memoryview) -> np.ndarray:
    """A BlobProto's numbers in its shape."""
    legacy_sides, sides = dict.fromkeys(LEGACY_SIDES, 0), None
    floats, doubles = [], []  # one packed piece; or a number each, which is legal
    for number, value in _fields(message):
        if number in LEGACY_SIDES:
            legacy_sides[number] = value
        elif number == SHAPE:
            sides = _sides(value)
        elif number == FLOATS:
            floats.append(value)
        elif number == DOUBLES:
            doubles.append(value)
    values = np.frombuffer(b"".join(doubles or floats), "<f8" if doubles else "<f4")
    if sides is None:
        sides = list(legacy_sides.values()) if any(legacy_sides.values()) else [values.size]
    if math.prod(sides) != values.size:
        raise ValueError(f"a blob of shape {tuple(sides[:8])} has {values.size} numbers")
    return values.reshape(sides)


def _sides(message: memoryview) -> list[int]:
    """A BlobShape's ``dim``, packed."""
    sides, position = [], 0
    packed = b"".join(value for number, value in _fields(message) if number == 1)
    while position < len(packed):
        side, position = _varint(packed, position)
        sides.append(side)
    return sides
