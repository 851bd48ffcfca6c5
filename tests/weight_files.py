"""Writers of files that readers are tested with: Caffe's and MXNet's, forged and damaged ones."""

import struct

import numpy as np
from hypothesis import strategies as st

MAGICS = {"V1": 0xF993FAC8, "V2": 0xF993FAC9, "V3": 0xF993FACA}
TYPE_NUMBERS = {"f4": 0, "f8": 1, "f2": 2, "u1": 3, "i4": 4, "i1": 5, "i8": 6}


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def bytes_field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob_message(array: np.ndarray, legacy: bool, form: str = "packed") -> bytes:
    """A BlobProto of (un)packed floats or doubles, with the old generation's four sides or not."""
    if legacy:
        sides = (1,) * (4 - array.ndim) + array.shape
        shape = b"".join(number_field(index, side) for index, side in enumerate(sides, start=1))
    else:
        shape = bytes_field(7, bytes_field(1, b"".join(map(varint, array.shape))))
    field, dtype, wire_type = (8, "<f8", 1) if "double" in form else (5, "<f4", 5)
    values = array.astype(dtype)
    if "unpacked" not in form:
        return shape + bytes_field(field, values.tobytes())
    raw = values.reshape(-1, 1).view(np.uint8)
    tags = np.full((len(raw), 1), field << 3 | wire_type, np.uint8)
    return shape + np.concatenate([tags, raw], axis=1).tobytes()


def caffemodel(blobs: dict[str, np.ndarray], legacy: bool, form: str = "packed") -> bytes:
    """A NetParameter with the blobs ``<layer>.0``, ``<layer>.1``, in either generation."""
    layer_field, name_field, type_field, blob_field = (2, 4, None, 6) if legacy else (100, 1, 2, 7)
    layers: dict[str, list[np.ndarray]] = {}
    for name, array in blobs.items():
        layers.setdefault(name.rpartition(".")[0], []).append(array)
    parts = [bytes_field(1, b"net")]
    for name, arrays in layers.items():
        kind = number_field(5, 4) if type_field is None else bytes_field(type_field, b"Convolution")
        messages = [bytes_field(blob_field, blob_message(a, legacy, form)) for a in arrays]
        layer = b"".join([bytes_field(name_field, name.encode()), kind, *messages])
        parts.append(bytes_field(layer_field, layer))
    return b"".join(parts)


def params(arrays: dict[str, np.ndarray], version: str = "V2", named: bool = True) -> bytes:
    """An MXNet list of arrays; ``version`` is legacy, V1, V2 or V3."""
    parts = [struct.pack("<3Q", 0x112, 0, len(arrays))]
    for array in arrays.values():
        if version != "legacy":
            parts.append(struct.pack("<I", MAGICS[version]))
        if version in ("V2", "V3"):
            parts.append(struct.pack("<i", 0))  # dense
        side = "I" if version == "legacy" else "q"
        parts.append(struct.pack(f"<I{array.ndim}{side}", array.ndim, *array.shape))
        if array.ndim:
            parts.append(struct.pack("<3i", 1, 0, TYPE_NUMBERS[array.dtype.str[1:]]))
            parts.append(array.tobytes())
    names = list(arrays) if named else []
    parts.append(struct.pack("<Q", len(names)))
    parts += [struct.pack("<Q", len(name)) + name.encode() for name in names]
    return b"".join(parts)


class Calls:
    """Pickled as a call: reading it with pickle.load calls ``function(*arguments)``."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """The bytes with up to three changed places."""
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(changed) - 1))
        extremes = st.sampled_from([bytes(8), b"\xff" * 8])
        new = draw(st.one_of(st.binary(min_size=1, max_size=5), extremes))
        changed[start : start + len(new)] = new
    return bytes(changed)
