"""Caffe's files: both generations, every legal spelling of a blob, and the real samples."""

import numpy as np
import pytest
from weight_files import CAFFE_FORMS, blob_message, bytes_field, caffemodel, number_field, varint

from tool.weights.caffe import read_caffemodel


def _read(content: bytes) -> dict[str, np.ndarray]:
    return read_caffemodel(memoryview(content))


@pytest.fixture
def blobs(rng):
    return {
        "conv1.0": rng.random((4, 3, 3, 3), np.float32),
        "conv1.1": rng.random(4, np.float32),
        "fc8.0": rng.random((5, 4), np.float32),
        "norm.0": rng.random(4, np.float32),
        "norm.1": rng.random(4, np.float32),
        "norm.2": rng.random(1, np.float32),
    }


def _layer(*blob_messages: bytes, extra: bytes = b"") -> bytes:
    """A model of one layer "a" with these blobs."""
    fields = [bytes_field(7, message) for message in blob_messages]
    return bytes_field(100, bytes_field(1, b"a") + extra + b"".join(fields))


@pytest.mark.parametrize("form", CAFFE_FORMS)
@pytest.mark.parametrize("legacy", [True, False], ids=["layers", "layer"])
def test_blobs_come_back_exactly(legacy, form, blobs):
    found = _read(caffemodel(blobs, legacy, form))
    assert list(found) == list(blobs)
    for name, blob in blobs.items():
        sides = (1,) * (4 - blob.ndim) if legacy else ()
        assert found[name].shape == sides + blob.shape
        assert found[name].dtype == (np.float64 if "double" in form else np.float32)
        assert np.array_equal(found[name].reshape(blob.shape), blob)


def test_packed_numbers_are_not_copied(blobs):
    content = caffemodel(blobs, legacy=False)
    for blob in _read(content).values():
        assert np.shares_memory(blob, np.frombuffer(content, np.uint8))


@pytest.mark.parametrize("count", [0, 1, 2, 9, 75])
def test_numbers_in_pieces_are_joined_in_order(count, rng):
    values = rng.random(count, np.float32)
    parts = np.array_split(values, 3)
    spellings = [bytes_field(5, parts[0].tobytes())]
    spellings += [b"".join(b"\x2d" + v.tobytes() for v in parts[1]), number_field(9, 7)]
    spellings += [bytes_field(5, parts[2].tobytes())]
    shape = bytes_field(7, bytes_field(1, varint(count)))
    (found,) = _read(_layer(shape + b"".join(spellings))).values()
    assert np.array_equal(found, values)


@pytest.mark.parametrize(
    "shape",
    [
        bytes_field(7, bytes_field(1, varint(2) + varint(3))),
        bytes_field(7, number_field(1, 2) + number_field(1, 3)),
        bytes_field(7, number_field(1, 2)) + bytes_field(7, number_field(1, 3)),
    ],
    ids=["packed", "not packed", "in two messages"],
)
def test_shape_is_read_in_every_spelling(shape, rng):
    values = rng.random((2, 3), np.float32)
    (found,) = _read(_layer(bytes_field(5, values.tobytes()) + shape)).values()
    assert np.array_equal(found, values)


def test_doubles_are_preferred_to_floats():
    # As Caffe itself reads a blob that has both.
    both = blob_message(np.ones(3), False, "double") + bytes_field(5, bytes(12))
    (found,) = _read(_layer(both)).values()
    assert found.tolist() == [1, 1, 1]


def test_unknown_fields_are_skipped():
    fixed = varint(40 << 3 | 5) + bytes(4) + varint(41 << 3 | 1) + bytes(8)
    extra = fixed + number_field(300, 2**63) + bytes_field(301, b"\xff" * 9)
    blob = blob_message(np.array([1.5, 2.5]), legacy=False)
    (found,) = _read(extra + _layer(blob + extra, extra=extra) + extra).values()
    assert found.tolist() == [1.5, 2.5]


def test_layers_without_blobs_have_none():
    assert _read(_layer() + bytes_field(1, b"net")) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xa2\x06\x05abc", "length points past its end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "length points past its end"),
        (b"\x0d\x00\x00", "length points past its end"),
        (b"\xff" * 11, "number has no end"),
        (b"\x08\x80", "ends in the middle of a number"),
        (b"\x0e\x00", "unknown type 6"),
        (_layer(bytes_field(5, bytes(5))), "middle of a number"),
        (_layer(number_field(1, 2) + bytes_field(5, bytes(4))), r"shape \(2, 0, 0, 0\) has 1 n"),
        (_layer(bytes_field(7, b"\x08\x03") + bytes_field(5, bytes(4))), r"shape \(3,\) has 1 n"),
        (_layer(bytes_field(7, b"\x0a\x46" + b"\x01" * 70) + bytes_field(5, bytes(4))), "dim"),
        (
            _layer(bytes_field(7, bytes_field(1, varint(2**62) * 4)) + bytes_field(5, b"")),
            "has 0 numbers",
        ),
    ],
)
def test_damaged_file_is_an_error_with_its_reason(content, message):
    with pytest.raises(ValueError, match=message):
        _read(content)


# ---- real files ----


def test_old_layers_of_a_real_file(weight_samples):
    blobs = _read((weight_samples / "v1_layers_cifar10_quick.caffemodel").read_bytes())
    assert sum(blob.size for blob in blobs.values()) == 145_578  # what its README says
    assert blobs["conv1.0"].shape == (32, 3, 5, 5)
    assert blobs["conv1.1"].shape == (1, 1, 1, 32)


@pytest.mark.parametrize("name", ["det1", "det2"])
def test_real_files_hold_little_but_their_numbers(name, weight_samples):
    content = (weight_samples / f"v2_layer_mtcnn_{name}.caffemodel").read_bytes()
    blobs = _read(content)
    assert 4 * sum(blob.size for blob in blobs.values()) > 0.9 * len(content)
    assert all(np.isfinite(blob).all() and np.abs(blob).max() < 100 for blob in blobs.values())
