"""Maps and index images on disk: exact round trips, whole files, and no code from a file."""

import io
import os
import pickle
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
from helpers import npy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from weight_files import Calls

from tool.files import atomic_write
from tool.labels import voc_palette
from tool.maps import (
    load_index_png,
    load_maps,
    load_npy_dict,
    maps_file,
    save_index_png,
    save_maps,
    save_npy_dict,
)
from tool.run.errors import DataError

SIZE = (2, 3)


# ---- round trips ----


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@settings(max_examples=10)
@given(
    st.dictionaries(st.integers(0, 250), st.integers(0, 99), max_size=4),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
)
def test_maps_come_back_as_they_were_sorted_by_class(tmp_path_factory, suffix, seeds, shape):
    maps = {k: np.random.default_rng(seed).random(shape, np.float32) for k, seed in seeds.items()}
    path = tmp_path_factory.mktemp("maps") / f"a.b{suffix}"
    save_maps(path, maps)
    for named in (path, path.with_name("a.b.npy")):
        loaded = load_maps(named, shape)
        assert list(loaded) == sorted(maps)
        for k, values in loaded.items():
            assert type(values) is np.ndarray
            assert values.dtype == np.float32
            assert np.array_equal(values, maps[k])


def test_maps_are_what_numpy_reads_and_the_same_bytes_each_time(tmp_path):
    maps = {4: np.ones(SIZE), np.int64(14): np.zeros(SIZE)}
    save_maps(tmp_path / "a.npy", maps)
    read = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    assert {k: v.dtype for k, v in read.items()} == {4: "f4", 14: "f4"}
    for name in ("b.npz", "c.npz"):
        save_maps(tmp_path / name, maps, "float16")
    with np.load(tmp_path / "b.npz", allow_pickle=False) as read:
        assert {name: values.dtype for name, values in read.items()} == {"4": "f2", "14": "f2"}
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()


# ---- which file ----


def test_maps_file_is_the_form_that_exists(tmp_path):
    assert maps_file(tmp_path / "a.npy") == tmp_path / "a.npy"
    save_maps(tmp_path / "a.npz", {})
    assert maps_file(tmp_path / "a.npy") == tmp_path / "a.npz"
    assert maps_file(tmp_path / "a.png") == tmp_path / "a.png"
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npz").read_bytes())
    with pytest.raises(DataError, match=r"a\.npy: exists as a\.npz, too"):
        maps_file(tmp_path / "a.npy")


def test_writing_one_form_removes_the_other(tmp_path):
    for suffix in (".npz", ".npy", ".npz"):
        save_maps(tmp_path / f"a.b{suffix}", {1: np.ones(SIZE)})
        assert [path.name for path in tmp_path.iterdir()] == [f"a.b{suffix}"]


# ---- what maps must be ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: np.ones((2, 3)), 2: np.ones((3, 2))}, "differ in size .*2 x 3 and 3 x 2"),
        ({1: np.full((2, 3), np.nan)}, "class 1 .*not finite"),
        ({"cat": np.ones((2, 3))}, "'cat' is not a class index"),
        ({1: np.ones(3)}, "class 1 is not a two-dimensional"),
        ({1: 0.5}, "class 1 is not a two-dimensional"),
        ({1: np.array([[None]], dtype=object)}, "class 1 is not a two-dimensional"),
    ],
)
def test_maps_that_cannot_be_maps_are_a_data_error(content, message, tmp_path):
    save_npy_dict(tmp_path / "a.npy", content)
    with pytest.raises(DataError, match=message) as error:
        load_maps(tmp_path / "a.npy")
    assert str(tmp_path / "a.npy") in str(error.value)


@pytest.mark.parametrize("content", [np.ones(3), np.array([1, None]), np.array(None), "text"])
def test_file_of_something_else_is_a_data_error(content, tmp_path):
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "a.npy"))):
        load_npy_dict(tmp_path / "a.npy")


def _array_file(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = _array_file(np.ones(SIZE, np.float32))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cat.npy": GOOD}, "'cat' is not a class index"),
        ({"1.npy": _array_file(np.ones((3, 3)))}, "2 x 3 and 3 x 3"),
        ({"1.npy": _array_file(np.full(SIZE, None))}, "cannot be read"),
        ({"1.npy": _array_file(np.zeros(SIZE, "f4,f4"))}, "not a two-dimensional number array"),
        ({"1.npy": b"no array"}, "not a two-dimensional number array"),
        ({"1.npy": GOOD[:-1]}, "cannot be read"),
        ({"1.npy": b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535}, "cannot be read"),
    ],
)
def test_archives_that_hold_no_maps_are_a_data_error(members, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_maps(tmp_path / "a.npz", SIZE)
    assert str(error.value).startswith(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_every_truncation_and_changed_byte_is_a_data_error_or_harmless(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    save_maps(path, {1: np.ones(SIZE)})
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            load_maps(path, SIZE)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            maps = load_maps(path, SIZE)
        except DataError as error:
            assert str(path) in str(error)
            assert str(error).isprintable()
        else:  # only the archive has a check sum
            assert suffix == ".npy" or np.array_equal(maps[1], np.ones(SIZE))


# ---- nothing is executed ----


@pytest.mark.parametrize("where", ["instead", "key", "value"])
def test_file_that_calls_is_refused_and_not_executed(where, tmp_path):
    call = Calls(os.mkdir, str(tmp_path / "executed"))
    content = {"instead": call, "key": {call: np.ones(SIZE)}, "value": {1: call}}[where]
    (tmp_path / "a.npy").write_bytes(npy(pickle.dumps(content, 4)))
    with pytest.raises(DataError, match=r"a\.npy: cannot be read \(it wants to load posix\.mkdir"):
        load_maps(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", **{"1": np.array([[call]], dtype=object)})
    with pytest.raises(DataError, match=r"b\.npz: cannot be read"):
        load_maps(tmp_path / "b.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npz"]


# ---- atomic writing ----


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_exception_in_the_block_leaves_the_old_file_and_nothing_else(exception, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(exception), atomic_write(path) as file:
        file.write(b"half")
        raise exception
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_two_writers_appear_whole_one_after_the_other(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_write(path) as first:
        first.write(b"first")
        assert not path.exists()
        with atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


# ---- index images ----


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_index_image_comes_back_as_it_was(tmp_path_factory, label):
    path = tmp_path_factory.mktemp("index") / "a.png"
    save_index_png(path, label)
    assert np.array_equal(load_index_png(path), label)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette()
    Image.fromarray(label).save(path)  # gray
    assert np.array_equal(load_index_png(path), label)


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_of_few_bits_is_read_as_it_was_written(bits, tmp_path):
    packed = {2: b"\0\x1b\0\xe4", 4: b"\0\x01\x23\0\x32\x10"}  # 0 1 2 3 and 3 2 1 0
    header = struct.pack(">2I5B", 4, 2, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(packed[bits])), (b"IEND", b"")):
        size, check = len(data), zlib.crc32(kind + data)
        content += struct.pack(">I", size) + kind + data + struct.pack(">I", check)
    (tmp_path / "a.png").write_bytes(content)
    assert load_index_png(tmp_path / "a.png").tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]


def test_palette_is_the_one_of_voc():
    palette = np.array(voc_palette()).reshape(256, 3).tolist()
    assert palette[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[15] == [192, 128, 128]  # person
    assert palette[20] == [0, 64, 128]  # tvmonitor
    assert palette[255] == [224, 224, 192]  # void
    assert len({tuple(colour) for colour in palette}) == 256


@pytest.mark.parametrize("mode", ["RGB", "LA", "1", "I;16"])
def test_image_of_colours_is_no_index_image(mode, tmp_path):
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="mode"):
        load_index_png(tmp_path / "a.png")


VOC = np.array(voc_palette(), np.uint8).reshape(256, 3)
OTHER_ORDER = VOC[[255, 15, 0, 9]]  # void, person, background, chair


@pytest.mark.parametrize(
    ("palette", "indices", "labels", "said"),
    [
        (OTHER_ORDER, [0, 1, 2, 3, 1], [255, 15, 0, 9, 15], "colours"),
        (VOC[::-1], [255, 240, 235], [0, 15, 20], "colours"),
        (np.vstack([OTHER_ORDER, np.full((99, 3), 7)]), [2, 2], [0, 0], "colours"),
        (np.vstack([VOC[:16], np.full((240, 3), 9)]), [0, 15], [0, 15], ""),  # differs where unused
        (np.repeat(np.arange(256), 3), [0, 3, 128], [0, 3, 128], ""),  # gray levels
        (OTHER_ORDER + np.uint8([[0], [0], [0], [1]]), [0, 1, 2, 3], [0, 1, 2, 3], "indices"),
        (VOC[[0, 0, 15]], [0, 1, 2], [0, 1, 2], "indices"),  # two indices of one colour
        (VOC[[0, 21, 1]], [0, 1, 2], [0, 1, 2], "indices"),  # 21 is no label
    ],
)
def test_reordered_palette_is_read_by_colour(palette, indices, labels, said, tmp_path, capsys):
    image = Image.fromarray(np.array([indices], np.uint8))
    image.putpalette(palette.astype(np.uint8).tobytes())
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
        assert load_index_png(tmp_path / name, 21).tolist() == [labels]
    err = capsys.readouterr().err  # a line for the folder
    assert f"{said} are the labels" in err or not said
    assert err.count("\n") == err.count(str(tmp_path)) == bool(said)
