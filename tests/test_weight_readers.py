"""The readers of Caffe's and MXNet's files: every generation and form, damage, and real samples."""

import struct

import numpy as np
import pytest
from weight_files import blob_message, bytes_field, caffemodel, number_field, params, varint

from tool.weights.caffe import read_caffemodel
from tool.weights.mxnet import read_params

# ---- Caffe ----

BLOBS = {"conv1.0": (4, 3, 3, 3), "conv1.1": (4,), "fc8.0": (5, 4), "norm.0": (4,)}


def _layer(*blob_messages: bytes, extra: bytes = b"") -> bytes:
    """A model of one layer "a" with these blobs."""
    fields = [bytes_field(7, message) for message in blob_messages]
    return bytes_field(100, bytes_field(1, b"a") + extra + b"".join(fields))


def _shape(*sides: int) -> bytes:
    return bytes_field(7, bytes_field(1, b"".join(map(varint, sides))))


@pytest.mark.parametrize("form", ["packed", "unpacked", "double", "unpacked double"])
@pytest.mark.parametrize("legacy", [True, False], ids=["layers", "layer"])
def test_blobs_come_back_exactly(legacy, form, rng):
    blobs = {name: rng.random(shape, np.float32) for name, shape in BLOBS.items()}
    found = read_caffemodel(caffemodel(blobs, legacy, form))
    assert list(found) == list(blobs)
    for name, blob in blobs.items():
        sides = (1,) * (4 - blob.ndim) if legacy else ()
        assert found[name].shape == sides + blob.shape
        assert found[name].dtype == (np.float64 if "double" in form else np.float32)
        assert np.array_equal(found[name].reshape(blob.shape), blob)


def test_unknown_fields_are_skipped():
    fixed = varint(40 << 3 | 5) + bytes(4) + varint(41 << 3 | 1) + bytes(8)
    extra = fixed + number_field(300, 2**63) + bytes_field(301, b"\xff" * 9)
    blob = blob_message(np.array([1.5, 2.5]), legacy=False)
    (found,) = read_caffemodel(extra + _layer(blob + extra, extra=extra) + extra).values()
    assert found.tolist() == [1.5, 2.5]


# ---- MXNet ----

SHAPES = [(4, 3, 3, 3), (5,), (1, 1, 2), (0, 3), ()]
TYPES = [np.float32, np.float64, np.float16, np.uint8, np.int32, np.int8, np.int64]


@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
@pytest.mark.parametrize("version", ("legacy", "V1", "V2", "V3"))
def test_arrays_come_back_exactly(version, named, rng):
    numbers = {shape: np.asarray(rng.integers(0, 99, shape)) for shape in SHAPES}
    arrays = {f"arg:{s} {t.__name__}": numbers[s].astype(t) for s in SHAPES for t in TYPES}
    found = read_params(params(arrays, version, named))
    assert list(found) == (list(arrays) if named else [str(k) for k in range(len(arrays))])
    for array, expected in zip(found.values(), arrays.values(), strict=True):
        expected = expected if expected.ndim else np.empty(0, np.float32)  # MXNet has no scalars
        assert array.dtype == expected.dtype
        assert array.shape == expected.shape
        assert np.array_equal(array, expected)


# ---- damaged files ----


def _one(*parts: tuple) -> bytes:
    """A list of one array, from (format, numbers ...)."""
    body = b"".join(struct.pack(form, *numbers) for form, *numbers in parts)
    return struct.pack("<3Q", 0x112, 0, 1) + body + struct.pack("<Q", 0)


V2 = 0xF993FAC9
DAMAGED = {
    read_caffemodel: [
        (b"\xa2\x06\x05abc", "length points past its end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "length points past its end"),
        (b"\x0d\x00\x00", "length points past its end"),
        (b"\xff" * 11, "number has no end"),
        (b"\x08\x80", "ends in the middle of a number"),
        (b"\x0e\x00", "unknown type 6"),
        (_layer(bytes_field(5, bytes(5))), "multiple of element size"),
        (_layer(number_field(1, 2) + bytes_field(5, bytes(4))), r"shape \(2, 0, 0, 0\) has 1 n"),
        (_layer(_shape(3) + bytes_field(5, bytes(4))), r"shape \(3,\) has 1 n"),
        (_layer(_shape(*[2**62] * 4) + bytes_field(5, b"")), "has 0 numbers"),
    ],
    read_params: [
        (struct.pack("<3Q", 0x112, 0, 2**60), "ends too early"),
        (struct.pack("<4Q", 0x112, 0, 0, 2**60), "0 arrays, but"),
        (struct.pack("<3Q", 0x112, 0, 0), "ends too early"),
        (params({"a": np.ones(2)}) + b"\0", "behind its end"),
        (_one(("<IiI2q", V2, 0, 2, 2**40, 2**40), ("<3i", 1, 0, 0)), "ends too early"),
        (_one(("<IiIq", V2, 0, 1, -4), ("<3i", 1, 0, 0)), r"shape \(-4,\)"),
        (_one(("<IiIq", V2, 0, 1, 1), ("<3i", 1, 0, 7)), "type 7"),
        (_one(("<IiIq", V2, 1, 1, 1), ("<3i", 1, 0, 0)), "sparse"),
        (_one(("<IiI", V2, 0, 2**31)), "ends too early"),
    ],
}


@pytest.mark.parametrize(
    ("read", "content", "message"), [(read, *row) for read, rows in DAMAGED.items() for row in rows]
)
def test_damaged_file_is_an_error_with_its_reason(read, content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


# ---- real files ----


def test_old_layers_of_a_real_file(weight_samples):
    blobs = read_caffemodel((weight_samples / "v1_layers_cifar10_quick.caffemodel").read_bytes())
    assert sum(blob.size for blob in blobs.values()) == 145_578  # what its README says
    assert blobs["conv1.0"].shape == (32, 3, 5, 5)
    assert blobs["conv1.1"].shape == (1, 1, 1, 32)


@pytest.mark.parametrize(
    ("name", "count"), [("legacy_unnamed.params", 6), ("v2_genderage-0000.params", 146)]
)
def test_real_files_are_read_to_the_last_byte(name, count, weight_samples):
    arrays = read_params((weight_samples / name).read_bytes())  # more bytes would be an error
    assert len(arrays) == count
    assert ("0" in arrays) == ("unnamed" in name)
    assert all(np.isfinite(array).all() for array in arrays.values())


@pytest.mark.parametrize("name", ["det1", "det2"])
def test_caffe_and_mxnet_agree_on_the_same_network(name, weight_samples):
    caffe_file = weight_samples / f"v2_layer_mtcnn_{name}.caffemodel"
    mxnet_file = weight_samples / f"legacy_mtcnn_{name}-0001.params"
    blobs, arrays = read_caffemodel(caffe_file.read_bytes()), read_params(mxnet_file.read_bytes())
    for array_name, array in arrays.items():
        layer, _, kind = array_name.removeprefix("arg:").rpartition("_")
        number = {"weight": 0, "gamma": 0, "bias": 1}[kind]
        layer = layer.replace("_", "-")
        blob = next(b for n, b in blobs.items() if n.lower() == f"{layer}.{number}")
        if array.ndim == 1:
            assert np.array_equal(blob, array), array_name
        else:  # the axes of kernels, and the features of inner products, are in another order
            assert np.array_equal(np.sort(blob, None), np.sort(array, None)), array_name
