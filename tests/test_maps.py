"""Maps and index images on disk: exact round trips, whole files, and no code from a file."""

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from helpers import npy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tool.files import atomic_write
from tool.labels import voc_palette
from tool.maps import (
    load_index_png,
    load_maps,
    load_npy_dict,
    maps_file,
    open_image,
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


def test_maps_are_what_numpy_reads(tmp_path):
    maps = {4: np.ones(SIZE), np.int64(14): np.zeros(SIZE)}
    save_maps(tmp_path / "a.npy", maps)
    read = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    assert {k: v.dtype for k, v in read.items()} == {4: "f4", 14: "f4"}
    save_maps(tmp_path / "a.npz", maps, "float16")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert {name: values.dtype for name, values in read.items()} == {"4": "f2", "14": "f2"}


def test_the_same_maps_are_the_same_bytes(tmp_path, rng):
    maps = {3: rng.random((20, 30), np.float32)}
    for name in ("a", "b"):
        save_maps(tmp_path / f"{name}.npz", maps)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_float16_rounds_to_three_digits(suffix, tmp_path, rng):
    maps = {0: rng.random((50, 60), np.float32)}
    for dtype in ("float32", "float16"):
        save_maps(tmp_path / f"{dtype}{suffix}", maps, dtype)
    exact, rounded = (load_maps(tmp_path / f"{d}{suffix}")[0] for d in ("float32", "float16"))
    assert np.array_equal(exact, maps[0])
    assert 0 < np.abs(rounded - exact).max() <= 2**-12
    sizes = [(tmp_path / f"{d}{suffix}").stat().st_size for d in ("float32", "float16")]
    assert sizes[1] < 0.6 * sizes[0]


def test_label_dict_comes_back(tmp_path, rng):
    labels = {f"2007_{k:06}": rng.integers(0, 2, 20).astype(np.float32) for k in range(50)}
    save_npy_dict(tmp_path / "labels.npy", labels)
    loaded = load_npy_dict(tmp_path / "labels.npy")
    assert list(loaded) == list(labels)
    assert all(np.array_equal(loaded[k], labels[k]) for k in labels)


def test_maps_of_other_number_types_orders_and_compressions_are_read(tmp_path):
    maps = {0: np.array([[1, 2]], ">f8"), 1: np.array([[3, 4]], "<f2")}
    maps[12] = np.asfortranarray(np.array([[5, 6]], "u1"))
    save_npy_dict(tmp_path / "a.npy", maps)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / f"{save.__name__}.npz", **{str(k): v for k, v in maps.items()})
    for path in tmp_path.iterdir():
        loaded = load_maps(path, (1, 2))
        assert list(loaded) == [0, 1, 12]
        assert [values.tolist() for values in loaded.values()] == [[[1, 2]], [[3, 4]], [[5, 6]]]
        assert all(values.dtype == np.float32 for values in loaded.values())


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


def test_missing_file_is_a_data_error(tmp_path):
    for read in (load_maps, load_npy_dict, load_index_png, open_image):
        with pytest.raises(DataError, match="none"):
            read(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [
        b"not an npy file",
        b"\x93NUMPY\x09\x00",
        npy(pickle.dumps([1, 2], 3)),
        npy(np.ones(3).tobytes(), (3,), "<f8"),
        npy(pickle.dumps({0: 1}, 3), (1,)),
    ],
)
def test_damaged_file_or_other_content_is_a_data_error(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
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
        ({"cat.npy": GOOD}, "'cat' is not named by a class"),
        ({"-1.npy": GOOD}, "not named by a class"),
        ({"01.npy": GOOD}, "not named by a class"),
        ({"1/../2.npy": GOOD}, "not named by a class"),
        ({"²": GOOD}, "not named by a class"),
        ({"1.npy": _array_file(np.ones((3, 3)))}, "2 x 3 and 3 x 3"),
        ({"1.npy": _array_file(np.ones(6))}, "not a two-dimensional"),
        ({"1.npy": _array_file(np.full(SIZE, np.nan))}, "class 1 has values that are not finite"),
        ({"1.npy": _array_file(np.full(SIZE, "a"))}, "not a two-dimensional number array"),
        ({"1.npy": _array_file(np.full(SIZE, None))}, "not a readable .npz"),
        ({"1.npy": _array_file(np.zeros(SIZE, "f4,f4"))}, "not a two-dimensional number array"),
        ({"1.npy": b"no array"}, "not a two-dimensional number array"),
        ({"1.npy": GOOD[:-1]}, "not a readable .npz"),
        ({"1.npy": b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535}, "not a readable .npz"),
        ({"1.npy": GOOD.replace(b"'<f4'", b"f()  ")}, "not a readable .npz"),
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


class _Calls:
    """Pickled as a call of os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["instead", "key", "value"])
def test_file_that_calls_is_refused_and_not_executed(where, tmp_path):
    call = _Calls(tmp_path / "executed")
    content = {"instead": call, "key": {call: np.ones(SIZE)}, "value": {1: call}}[where]
    (tmp_path / "a.npy").write_bytes(npy(pickle.dumps(content, 4)))
    with pytest.raises(DataError, match=r"a\.npy: refused, because it wants to load posix\.mkdir"):
        load_maps(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", **{"1": np.array([[call]], dtype=object)})
    with pytest.raises(DataError, match=r"b\.npz: not a readable"):
        load_maps(tmp_path / "b.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npz"]


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


@pytest.mark.parametrize("label", [np.zeros((2, 3), int), np.zeros((2, 3, 1), np.uint8)])
def test_index_image_must_be_uint8_and_flat(label, tmp_path):
    with pytest.raises(ValueError, match="uint8 H x W"):
        save_index_png(tmp_path / "a.png", label)
    assert not (tmp_path / "a.png").exists()
