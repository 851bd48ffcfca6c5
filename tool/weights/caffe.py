"""Caffe's ``.caffemodel``: the blobs of a protobuf NetParameter, old ``layers`` and new ``layer``.

A reader of protobuf's wire format suffices: it steps over what it does not know, and the numbers,
which are nearly all of the file, stay where they are.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32 = range(6)
# Fields of NetParameter that hold layers, each with its layer's fields of name and blobs.
LAYER_FIELDS = {100: (1, 7), 2: (4, 6)}
# Fields of BlobProto: the legacy sides, and the numbers with their wire type and format.
LEGACY_SIDES = (1, 2, 3, 4)
DATA, SHAPE, DOUBLE_DATA = 5, 7, 8
NUMBERS = {DATA: (FIXED32, np.dtype("<f4")), DOUBLE_DATA: (FIXED64, np.dtype("<f8"))}
MAX_SIDES = 32  # Caffe's own limit
MAX_FIELDS = 100_000  # some 5,000 layers
MAX_DEPTH = 100  # of groups in groups, protobuf's own limit
VARINT_BYTES = 10


def read_caffemodel(data: memoryview) -> dict[str, np.ndarray]:
    """The blobs in a ``.caffemodel``'s bytes: ``<layer>.0``, ``<layer>.1``, ...

    float32, or float64 where the file has doubles; of the stated shape, which the old generation
    fills up to four sides. They are views of ``data`` wherever the numbers lie in one piece there.
    Raises ValueError if the bytes are no NetParameter, or damaged.
    """
    blobs = {}
    budget = _FieldBudget()
    for field in _fields(data, budget):
        if field.number in LAYER_FIELDS and field.wire_type == BYTES:
            name_field, blob_field = LAYER_FIELDS[field.number]
            name, layer_blobs = "", []
            for part in _fields(field.value, budget):
                if part.number == name_field and part.wire_type == BYTES:
                    name = str(part.value, "utf-8", "replace")
                elif part.number == blob_field and part.wire_type == BYTES:
                    layer_blobs.append(_blob(part.value, budget))
            blobs.update({f"{name}.{index}": blob for index, blob in enumerate(layer_blobs)})
    return blobs


class _Field(NamedTuple):
    number: int
    wire_type: int
    value: int | memoryview  # a varint's value; the bytes of every other field


class _FieldBudget:
    """Counts the fields of a file, so that one of nothing but fields ends soon."""

    left = MAX_FIELDS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_FIELDS:,} fields")


def _fields(message: memoryview, budget: _FieldBudget) -> Iterator[_Field]:
    """The fields of a message in order, groups left out; repeated fixed numbers come as one."""
    position, depth = 0, 0
    while position < len(message):
        budget.take()
        start = position
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("a field has the number 0")
        if wire_type in (GROUP, END_GROUP):
            depth += 1 if wire_type == GROUP else -1
            if not 0 <= depth <= MAX_DEPTH:
                raise ValueError("its groups do not match")
            continue
        if wire_type == VARINT:
            value, position = _varint(message, position)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
            value, position = _repeated(message, start, position, size)
        elif wire_type == BYTES:
            length, position = _varint(message, position)
            if length > len(message) - position:
                raise ValueError("a length points past its end")
            value, position = message[position : position + length], position + length
        else:
            raise ValueError(f"a field has the unknown type {wire_type}")
        if depth == 0:
            yield _Field(number, wire_type, value)
    if depth:
        raise ValueError("a group does not end")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number that begins there, seven bits a byte, and where the next thing begins."""
    value = 0
    for index in range(VARINT_BYTES):
        if position + index >= len(message):
            raise ValueError("it ends in the middle of a number")
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + index + 1
    raise ValueError("a number has no end")


def _repeated(message: memoryview, start: int, position: int, size: int) -> tuple[memoryview, int]:
    """The fixed numbers that follow each other under one tag, without the tags; and their end.

    The first tag stands from ``start`` to ``position``. Numbers that are not packed repeat the tag
    before each, a million times for a million numbers.
    """
    record = position - start + size
    if message[start + record : position + record] != message[start:position]:
        if position + size > len(message):
            raise ValueError("it ends in the middle of a number")
        return message[position : position + size], position + size  # one, as nearly always
    tag = np.frombuffer(message[start:position], np.uint8)
    count, ahead = 0, 1
    while True:
        rest = (len(message) - start) // record - count
        ahead = min(ahead, rest)
        first = start + count * record
        records = np.frombuffer(message[first : first + ahead * record], np.uint8)
        same = (records.reshape(ahead, record)[:, : len(tag)] == tag).all(axis=1)
        count += ahead if same.all() else int(same.argmin())
        if ahead == rest or not same.all():
            break
        ahead *= 8
    end = start + count * record
    records = np.frombuffer(message[start:end], np.uint8).reshape(count, record)
    return memoryview(records[:, len(tag) :].reshape(-1)), end


def _blob(message: memoryview, budget: _FieldBudget) -> np.ndarray:
    """A BlobProto's numbers in its shape."""
    legacy_sides, sides = dict.fromkeys(LEGACY_SIDES, 0), []
    has_legacy_shape = has_shape = False
    pieces: dict[int, list[np.ndarray]] = {DATA: [], DOUBLE_DATA: []}
    for field in _fields(message, budget):
        if field.number in LEGACY_SIDES and field.wire_type == VARINT:
            legacy_sides[field.number] = field.value
            has_legacy_shape = True
        elif field.number == SHAPE and field.wire_type == BYTES:
            sides += _sides(field.value, budget)
            has_shape = True
        elif field.number in NUMBERS and field.wire_type in (BYTES, NUMBERS[field.number][0]):
            dtype = NUMBERS[field.number][1]
            if len(field.value) % dtype.itemsize:
                raise ValueError("a blob ends in the middle of a number")
            pieces[field.number].append(np.frombuffer(field.value, dtype))
    found = pieces[DOUBLE_DATA] or pieces[DATA]
    values = found[0] if len(found) == 1 else np.concatenate([np.empty(0, "<f4"), *found])
    if not has_shape:
        sides = list(legacy_sides.values()) if has_legacy_shape else [values.size]
    if len(sides) > MAX_SIDES or math.prod(sides) != values.size:
        raise ValueError(f"a blob of shape {tuple(sides[:MAX_SIDES])} has {values.size} numbers")
    return values.reshape(sides)


def _sides(message: memoryview, budget: _FieldBudget) -> list[int]:
    """A BlobShape's ``dim``, packed or not."""
    sides = []
    for field in _fields(message, budget):
        if field.number == 1 and field.wire_type == VARINT:
            sides.append(field.value)
        elif field.number == 1 and field.wire_type == BYTES:
            position = 0
            while position < len(field.value) and len(sides) <= MAX_SIDES:
                side, position = _varint(field.value, position)
                sides.append(side)
    return sides
