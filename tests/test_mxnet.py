"""MXNet's files: every generation, named or not, and the real samples against Caffe's."""

import itertools
import struct

import numpy as np
import pytest
from weight_files import params

from tool.weights.caffe import read_caffemodel
from tool.weights.mxnet import read_params

VERSIONS = ("legacy", "V1", "V2", "V3")


def _read(content: bytes) -> dict[str, np.ndarray]:
    return read_params(memoryview(content))


@pytest.fixture
def arrays(rng):
    return {
        "arg:conv_weight": rng.random((4, 3, 3, 3), np.float32),
        "aux:bn_moving_mean": rng.random(5),
        "half": rng.random((2, 3)).astype(np.float16),
        "bytes": rng.integers(0, 255, (2, 2), np.uint8),
        "signed": rng.integers(-9, 9, 3, np.int8),
        "int": rng.integers(-9, 9, (1, 2), np.int32),
        "long": rng.integers(-9, 9, (1, 1, 2), np.int64),
        "no cells": np.empty((0, 3), np.float32),
        "nothing": np.float32(0).reshape(()),
        "last": rng.random(2, np.float32),
    }


@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
@pytest.mark.parametrize("version", VERSIONS)
def test_arrays_come_back_exactly(version, named, arrays):
    found = _read(params(arrays, version, named))
    assert list(found) == (list(arrays) if named else [str(k) for k in range(len(arrays))])
    for array, expected in zip(found.values(), arrays.values(), strict=True):
        expected = expected if expected.ndim else np.empty(0, np.float32)  # as MXNet has it
        assert array.dtype == expected.dtype
        assert array.shape == expected.shape
        assert np.array_equal(array, expected)


def test_numbers_are_not_copied(arrays):
    content = params({"a": arrays["arg:conv_weight"]})
    assert np.shares_memory(_read(content)["a"], np.frombuffer(content, np.uint8))


def _one(*parts: tuple) -> bytes:
    """A list of one array, from (format, numbers ...)."""
    body = b"".join(struct.pack(form, *numbers) for form, *numbers in parts)
    return struct.pack("<3Q", 0x112, 0, 1) + body + struct.pack("<Q", 0)


V2 = 0xF993FAC9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<3Q", 0x113, 0, 0), "does not begin"),
        (struct.pack("<3Q", 0x112, 0, 2**60), "ends too early"),
        (struct.pack("<4Q", 0x112, 0, 0, 2**60), "0 arrays, but"),
        (struct.pack("<3Q", 0x112, 0, 0), "ends too early"),
        (params({"a": np.ones(2)}) + b"\0", "behind its end"),
        (_one(("<IiI2q", V2, 0, 2, 2**40, 2**40), ("<3i", 1, 0, 0)), "ends too early"),
        (_one(("<IiI4q", V2, 0, 4, *[2**62] * 4), ("<3i", 1, 0, 0)), "ends too early"),
        (_one(("<IiIq", V2, 0, 1, -4), ("<3i", 1, 0, 0)), r"shape \(-4,\)"),
        (_one(("<IiIq", V2, 0, 1, 1), ("<3i", 1, 0, 7)), "type 7"),
        (_one(("<IiIq", V2, 0, 1, 1), ("<3i", 1, 0, -1)), "type -1"),
        (_one(("<IiIq", V2, 1, 1, 1), ("<3i", 1, 0, 0)), "sparse"),
        (_one(("<IiI", V2, 0, 2**31)), "ends too early"),
        (_one(("<I", 33)), "ends too early"),
    ],
)
def test_damaged_file_is_an_error_with_its_reason(content, message):
    with pytest.raises(ValueError, match=message):
        _read(content)


# ---- real files ----


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("legacy_mtcnn_det1-0001.params", 13),
        ("legacy_mtcnn_det2-0001.params", 16),
        ("legacy_unnamed.params", 6),
        ("v2_genderage-0000.params", 146),
    ],
)
def test_real_files_are_read_to_the_last_byte(name, count, weight_samples):
    arrays = _read((weight_samples / name).read_bytes())  # more bytes would be an error
    assert len(arrays) == count
    assert ("0" in arrays) == ("unnamed" in name)
    assert all(np.isfinite(array).all() for array in arrays.values())


def _is_permutation(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether an order of the axes, and of the input channels, makes the kernels equal."""
    channels = first.shape[1]
    orders = itertools.permutations(range(channels)) if channels == 3 else [range(channels)]
    return any(
        np.array_equal(first[:, list(order)].transpose(axes), second)
        for order in orders
        for axes in itertools.permutations(range(4))
        if tuple(first.shape[axis] for axis in axes) == second.shape
    )


@pytest.mark.parametrize("name", ["det1", "det2"])
def test_caffe_and_mxnet_agree_on_the_same_network(name, weight_samples):
    blobs = read_caffemodel(
        memoryview((weight_samples / f"v2_layer_mtcnn_{name}.caffemodel").read_bytes())
    )
    arrays = _read((weight_samples / f"legacy_mtcnn_{name}-0001.params").read_bytes())
    kernels = 0
    for array_name, array in arrays.items():
        layer, _, kind = array_name.removeprefix("arg:").rpartition("_")
        number = {"weight": 0, "gamma": 0, "bias": 1}[kind]
        layer = layer.replace("_", "-")
        blob = next(b for n, b in blobs.items() if n.lower() == f"{layer}.{number}")
        if array.ndim == 4:
            assert _is_permutation(blob, array), array_name
            kernels += 1
        elif array.ndim == 1:
            assert np.array_equal(blob, array), array_name
        else:  # an inner product, over features whose axes are permuted as well
            assert np.array_equal(np.sort(blob, axis=1), np.sort(array, axis=1)), array_name
    assert kernels == {"det1": 5, "det2": 3}[name]
