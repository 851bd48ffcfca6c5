"""Maps and index images on disk: exact round trips, whole files, and no code from a file."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import dict_pickle, npy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tool.files import atomic_write
from tool.labels import voc_palette
from tool.maps import (
    load_index_png,
    load_maps,
    load_npy_dict,
    open_image,
    save_index_png,
    save_maps,
    save_npy_dict,
)
from tool.run.errors import DataError


class _Calls:
    """Pickled as a call: reading it with pickle.load calls ``function(*arguments)``."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


# ---- round trips ----


@given(
    st.dictionaries(st.integers(0, 250), st.integers(0, 99), max_size=4),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
)
def test_maps_come_back_as_they_were_sorted_by_class(tmp_path_factory, seeds, shape):
    maps = {k: np.random.default_rng(seed).random(shape, np.float32) for k, seed in seeds.items()}
    path = tmp_path_factory.mktemp("maps") / "a.npy"
    save_maps(path, maps)
    loaded = load_maps(path, shape)
    assert list(loaded) == sorted(maps)
    for k, values in loaded.items():
        assert values.dtype == np.float32
        assert np.array_equal(values, maps[k])


def test_maps_are_what_numpy_reads(tmp_path):
    maps = {4: np.ones((2, 3), np.float32), 14: np.zeros((2, 3), np.float32)}
    save_maps(tmp_path / "a.npy", maps)
    read = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    assert list(read) == [4, 14]
    assert all(np.array_equal(read[k], maps[k]) for k in maps)


def test_maps_are_stored_as_float32(tmp_path):
    save_maps(tmp_path / "a.npy", {np.int64(3): np.full((2, 2), 0.1)})
    (values,) = load_npy_dict(tmp_path / "a.npy").values()
    assert values.dtype == np.float32


def test_label_dict_comes_back(tmp_path, rng):
    labels = {f"2007_{k:06}": rng.integers(0, 2, 20).astype(np.float32) for k in range(50)}
    save_npy_dict(tmp_path / "labels.npy", labels)
    loaded = load_npy_dict(tmp_path / "labels.npy")
    assert list(loaded) == list(labels)
    assert all(np.array_equal(loaded[k], labels[k]) for k in labels)


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol", [2, 3])
def test_files_of_numpy_1_and_2_and_of_python_2_are_read(core, protocol, tmp_path, rng):
    maps = {4: rng.random((3, 5), np.float32), np.int64(14): rng.random((3, 5), np.float32)}
    payload = dict_pickle(maps, protocol, core)
    assert core + b".multiarray" in payload
    (tmp_path / "a.npy").write_bytes(npy(payload))
    loaded = load_maps(tmp_path / "a.npy", (3, 5))
    assert list(loaded) == [4, 14]
    assert all(np.array_equal(loaded[k], values) for k, values in maps.items())


def test_maps_of_other_number_types_and_byte_orders_are_read(tmp_path):
    maps = {0: np.array([[1, 2]], ">f8"), 1: np.array([[3, 4]], "<f2"), 2: np.array([[5, 6]], "u1")}
    save_npy_dict(tmp_path / "a.npy", maps)
    loaded = load_maps(tmp_path / "a.npy")
    assert [values.tolist() for values in loaded.values()] == [[[1, 2]], [[3, 4]], [[5, 6]]]
    assert all(values.dtype == np.float32 for values in loaded.values())


# ---- what maps must be ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: np.ones((2, 3)), 2: np.ones((3, 2))}, "differ in size .*2 x 3 and 3 x 2"),
        ({1: np.full((2, 3), np.nan)}, "class 1 .*not finite"),
        ({1: np.ones((2, 3)), 7: np.full((2, 3), -np.inf)}, "class 7 .*not finite"),
        ({"cat": np.ones((2, 3))}, "'cat' is not a class index"),
        ({-1: np.ones((2, 3))}, "-1 is not a class index"),
        ({True: np.ones((2, 3))}, "True is not a class index"),
        ({1.0: np.ones((2, 3))}, "1.0 is not a class index"),
        ({1: np.ones(3)}, "class 1 is not a two-dimensional"),
        ({1: 0.5}, "class 1 is not a two-dimensional"),
        ({1: np.array([["a"]])}, "class 1 is not a two-dimensional"),
        ({1: np.array([[None]], dtype=object)}, "class 1 is not a two-dimensional"),
    ],
)
def test_maps_that_cannot_be_maps_are_a_data_error(content, message, tmp_path):
    save_npy_dict(tmp_path / "a.npy", content)
    with pytest.raises(DataError, match=message) as error:
        load_maps(tmp_path / "a.npy")
    assert str(tmp_path / "a.npy") in str(error.value)


def test_maps_of_another_size_than_the_image_are_a_data_error(tmp_path):
    save_maps(tmp_path / "a.npy", {1: np.ones((2, 3))})
    with pytest.raises(DataError, match="2 x 3 and 4 x 3"):
        load_maps(tmp_path / "a.npy", (4, 3))


def test_missing_file_is_a_data_error(tmp_path):
    for read in (load_maps, load_npy_dict, load_index_png, open_image):
        with pytest.raises(DataError, match="none"):
            read(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an npy file",
        b"\x93NUMPY\x09\x00",
        npy(b""),
        npy(pickle.dumps(np.array({0: 1}, dtype=object), 3)[:-5]),
        npy(pickle.dumps([1, 2], 3)),
        npy(np.ones(3).tobytes(), (3,), "<f8"),
        npy(pickle.dumps({0: 1}, 3), (1,)),
    ],
)
def test_damaged_file_or_other_content_is_a_data_error(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "a.npy"))):
        load_npy_dict(tmp_path / "a.npy")


def test_every_truncation_is_a_data_error(tmp_path):
    save_maps(tmp_path / "whole.npy", {1: np.ones((2, 3))})
    whole = (tmp_path / "whole.npy").read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "a.npy").write_bytes(whole[:length])
        with pytest.raises(DataError):
            load_npy_dict(tmp_path / "a.npy")


# ---- nothing is executed ----


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["instead", "key", "value", "in an array"])
@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (eval, "open({!r}, 'w')"),
        (exec, "open({!r}, 'w')"),
        (os.system, "touch {!r}"),
        (subprocess.call, ["touch", "{}"]),
        (os.mkdir, "{}"),
        (open, "{}"),
    ],
)
def test_pickle_that_calls_is_refused_and_not_executed(
    function, argument, place, protocol, tmp_path
):
    marker = str(tmp_path / "executed")
    if isinstance(argument, str):
        call = _Calls(function, argument.format(marker))
    else:
        call = _Calls(function, [part.format(marker) for part in argument])
    content = {
        "instead": call,
        "key": {call: np.ones((2, 3))},
        "value": {1: call},
        "in an array": {1: np.array([[call]], dtype=object)},
    }[place]
    (tmp_path / "a.npy").write_bytes(npy(pickle.dumps(content, protocol)))
    with pytest.raises(DataError, match="refused, because it wants to load"):
        load_maps(tmp_path / "a.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize(
    "function", [getattr, __import__, np.load, np.fromfile, pickle.loads, Path, bytearray, print]
)
def test_pickle_may_name_nothing_but_arrays(function, tmp_path):
    # Not even called: naming it is enough.
    (tmp_path / "a.npy").write_bytes(npy(pickle.dumps({0: function}, 3)))
    with pytest.raises(DataError, match="refused"):
        load_npy_dict(tmp_path / "a.npy")


_EMPTY_ARRAY = np.zeros(0).__reduce__()[0]
_OBJECT = np.dtype("O")
_UNDECLARED_OBJECT = _Calls(
    # A structured type that holds a pointer and does not say so.
    np.dtype,
    "V8",
    False,
    True,
    state=(3, "|", None, ("a",), {"a": (_OBJECT, 0)}, 8, 1, 0),
)


def _array(shape, dtype, data) -> _Calls:
    state = (1, shape, dtype, False, data)
    return _Calls(_EMPTY_ARRAY, np.ndarray, (0,), b"b", state=state)


@pytest.mark.parametrize(
    "forged",
    [
        _Calls(np.ndarray, (1,), _OBJECT, b"A" * 8),
        _Calls(_EMPTY_ARRAY, np.ndarray, (2**40,), b"b"),
        _array((3,), _OBJECT, [1]),
        _array((3,), _OBJECT, b"A" * 24),
        _array((20,), _UNDECLARED_OBJECT, b"A" * 160),
        _array((4000,), np.dtype("f4"), b"A" * 32),
        _array((-2, -4), np.dtype("f4"), b"A" * 32),
    ],
    ids=[
        "pointers as a buffer",
        "unbacked memory",
        "fewer objects than cells",
        "pointers as a state",
        "pointers in a structure",
        "fewer bytes than cells",
        "negative sides",
    ],
)
def test_pickle_that_forges_an_array_is_a_data_error_and_no_crash(forged, tmp_path):
    # In a process of its own: bytes that are taken for pointers would end this one.
    (tmp_path / "a.npy").write_bytes(npy(pickle.dumps({0: forged}, 3)))
    program = (
        "import sys; from tool.run.errors import DataError; from tool.maps import load_npy_dict\n"
        "try: load_npy_dict(sys.argv[1])\n"
        "except DataError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.npy")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


# ---- atomic writing ----


def test_block_that_ends_leaves_the_whole_file_only(tmp_path):
    with atomic_write(tmp_path / "new" / "folder" / "a.bin") as file:
        file.write(b"content")
        assert not (tmp_path / "new" / "folder" / "a.bin").exists()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a.bin"]
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"content"


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_exception_in_the_block_leaves_the_old_file_and_nothing_else(exception, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(exception), atomic_write(path) as file:
        file.write(b"half")
        raise exception
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_maps_leave_the_old_file(tmp_path):
    path = tmp_path / "a.npy"
    save_maps(path, {1: np.ones((2, 3))})
    old = path.read_bytes()
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_npy_dict(path, {1: lambda: None})  # cannot be pickled
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as first:
        first.write(b"first")
        with atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


# ---- index images ----


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_index_image_comes_back_as_it_was(tmp_path_factory, label):
    path = tmp_path_factory.mktemp("index") / "a.png"
    save_index_png(path, label)
    assert np.array_equal(load_index_png(path), label)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette()


def test_all_256_values_survive(tmp_path):
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save_index_png(tmp_path / "a.png", label)
    assert np.array_equal(load_index_png(tmp_path / "a.png"), label)


def test_palette_is_the_one_of_voc():
    palette = np.array(voc_palette()).reshape(256, 3).tolist()
    assert palette[:9] == [
        *([0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]),
        *([0, 128, 128], [128, 128, 128], [64, 0, 0]),
    ]
    assert palette[15] == [192, 128, 128]  # person
    assert palette[20] == [0, 64, 128]  # tvmonitor
    assert palette[255] == [224, 224, 192]  # void
    assert len({tuple(colour) for colour in palette}) == 256


def test_palette_is_the_one_in_real_masks(voc_mini):
    path = min((voc_mini / "SegmentationClass").glob("*.png"))
    with Image.open(path) as image:
        assert image.getpalette()[: 21 * 3] == voc_palette()[: 21 * 3]
    assert set(np.unique(load_index_png(path))) <= {*range(21), 255}


def test_gray_image_is_read_as_indices(tmp_path):
    label = np.array([[0, 15], [255, 20]], np.uint8)
    Image.fromarray(label).save(tmp_path / "gray.png")
    assert np.array_equal(load_index_png(tmp_path / "gray.png"), label)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_image_of_colours_is_no_index_image(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (3, 2)).save(path)
    with pytest.raises(DataError, match="mode"):
        load_index_png(path)


def test_truncated_image_is_a_data_error(tmp_path, rng):
    save_index_png(tmp_path / "whole.png", rng.integers(0, 20, (50, 50)).astype(np.uint8))
    whole = (tmp_path / "whole.png").read_bytes()
    for part in (whole[:10], whole[: len(whole) // 2], b"", b"GIF89a"):
        (tmp_path / "a.png").write_bytes(part)
        with pytest.raises(DataError, match="not a readable image"):
            load_index_png(tmp_path / "a.png")


@pytest.mark.parametrize("label", [np.zeros((2, 3), int), np.zeros((2, 3, 1), np.uint8)])
def test_index_image_must_be_uint8_and_flat(label, tmp_path):
    with pytest.raises(ValueError, match="uint8 H x W"):
        save_index_png(tmp_path / "a.png", label)
    assert not (tmp_path / "a.png").exists()
