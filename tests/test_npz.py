"""Maps as compressed archives: exact round trips, and bounded reading of whatever is in a file."""

import io
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tool.maps import load_maps, maps_file, save_maps
from tool.run.errors import DataError

SIZE = (2, 3)
LIMIT = 2 * 2**30  # bytes of address space, beside which a bomb must not matter


def npy(array, version=(1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def header(shape, descr="<f4") -> bytes:
    """That of an array which may not be there."""
    file = io.BytesIO()
    content = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, content)
    return file.getvalue()


def archive(path, members, compression=zipfile.ZIP_DEFLATED):
    """A zip archive of (name, bytes)."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)


@given(
    st.dictionaries(st.integers(0, 250), st.integers(0, 99), max_size=4),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
)
def test_maps_come_back_as_they_were_sorted_by_class(tmp_path_factory, seeds, shape):
    maps = {k: np.random.default_rng(seed).random(shape, np.float32) for k, seed in seeds.items()}
    path = tmp_path_factory.mktemp("maps") / "a.b.npz"
    save_maps(path, maps)
    for named in (path, path.with_name("a.b.npy")):
        loaded = load_maps(named, shape)
        assert list(loaded) == sorted(maps)
        for k, values in loaded.items():
            assert values.dtype == np.float32
            assert np.array_equal(values, maps[k])


def test_maps_are_what_numpy_reads_without_pickle(tmp_path):
    save_maps(tmp_path / "a.npz", {4: np.ones(SIZE), 14: np.zeros(SIZE)}, "float16")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert {name: values.dtype for name, values in read.items()} == {"4": "f2", "14": "f2"}


def test_what_numpy_compresses_or_not_is_read(tmp_path):
    maps = {"0": np.array([[1, 2]], ">f8"), "12": np.asfortranarray(np.array([[3, 4]], "u1"))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **maps)
        loaded = load_maps(tmp_path / "a.npz", (1, 2))
        assert {k: v.tolist() for k, v in loaded.items()} == {0: [[1, 2]], 12: [[3, 4]]}


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


def test_the_same_maps_are_the_same_bytes(tmp_path, rng):
    maps = {3: rng.random((20, 30), np.float32)}
    for name in ("a", "b"):
        save_maps(tmp_path / f"{name}.npz", maps)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


# Which file


def test_maps_file_is_the_form_that_is_there(tmp_path):
    assert maps_file(tmp_path / "a.npy") == tmp_path / "a.npy"
    save_maps(tmp_path / "a.npz", {})
    assert maps_file(tmp_path / "a.npy") == tmp_path / "a.npz"
    assert maps_file(tmp_path / "a.png") == tmp_path / "a.png"
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npz").read_bytes())
    with pytest.raises(DataError, match=r"a\.npy: is there as a\.npz, too"):
        maps_file(tmp_path / "a.npy")


def test_writing_one_form_removes_the_other(tmp_path):
    for suffix in (".npz", ".npy", ".npz"):
        save_maps(tmp_path / f"a.b{suffix}", {1: np.ones(SIZE)})
        assert [path.name for path in tmp_path.iterdir()] == [f"a.b{suffix}"]


# What is refused

GOOD = npy(np.ones(SIZE, np.float32))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("cat.npy", GOOD)], "'cat.npy' is not named by a class"),
        ([("-1.npy", GOOD)], "not named by a class"),
        ([("1/../2.npy", GOOD)], "not named by a class"),
        ([("²", GOOD)], "not named by a class"),
        ([("1", GOOD), ("1.npy", GOOD), ("1.npy", GOOD)], "3 arrays, of 2 names"),
        ([(f"{k}.npy", GOOD) for k in range(256)], "256 arrays"),
        ([("1.npy", npy(np.ones((3, 3), np.float32)))], "2 x 3 and 3 x 3"),
        ([("1.npy", npy(np.ones(6, np.float32)))], "shape (6,)"),
        ([("1.npy", npy(np.full(SIZE, np.nan)))], "class 1 has values that are not finite"),
        ([("1.npy", npy(np.full(SIZE, "a")))], "is an array of <U1"),
        ([("1.npy", npy(np.full(SIZE, None)))], "is an array of object"),
        ([("1.npy", npy(np.zeros(SIZE, "f4,f4")))], "is an array of"),
        ([("1.npy", npy(np.ones(SIZE), (2, 0)))], "version 1.0"),
        ([("1.npy", header(SIZE))], "0 bytes instead of 24"),
        ([("1.npy", GOOD + b"more")], "25 bytes instead of 24"),
        ([("1.npy", header((-2, -3)) + b"0" * 24)], "2 x 3"),
        ([("1.npy", b"")], "not"),
        ([("1.npy", b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535)], "readable"),
        ([("1.npy", header(SIZE).replace(b"'<f4'", b"f()  "))], "readable"),
    ],
)
def test_archives_that_hold_no_maps_are_a_data_error(members, message, tmp_path):
    archive(tmp_path / "a.npz", members)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_maps(tmp_path / "a.npz", SIZE)
    assert str(error.value).startswith(str(tmp_path / "a.npz"))


def test_one_class_twice_is_a_data_error(tmp_path):
    archive(tmp_path / "a.npz", [("1", GOOD), ("1.npy", GOOD)])
    with pytest.raises(DataError, match="one class twice"):
        load_maps(tmp_path / "a.npz", SIZE)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_numpys_compression_is_read(compression, tmp_path):
    archive(tmp_path / "a.npz", [("1.npy", GOOD)], compression)
    with pytest.raises(DataError, match="compressed in a way"):
        load_maps(tmp_path / "a.npz", SIZE)


def test_every_truncation_and_changed_byte_is_a_data_error_or_harmless(tmp_path):
    path = tmp_path / "a.npz"
    save_maps(path, {1: np.ones(SIZE)})
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            load_maps(path, SIZE)
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            maps = load_maps(path, SIZE)
        except DataError:
            refused += 1
        else:
            assert all(np.array_equal(values, np.ones(SIZE)) for values in maps.values())
    assert refused > len(whole) / 2


def test_missing_archive_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz: cannot be read"):
        load_maps(tmp_path / "none.npz")


READ = """
import resource, sys
from tool.run.errors import DataError
from tool.maps import load_maps
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
size = tuple(map(int, sys.argv[3:])) or None
try: load_maps(sys.argv[1], size)
except DataError as error: print("refused")
else: print("read", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no such limit")
@pytest.mark.parametrize("size", [SIZE, ()])
@pytest.mark.parametrize("claimed", [SIZE, (30_000, 30_000)])
def test_bombs_take_no_memory(size, claimed, tmp_path):
    # A gigabyte of zeros that was compressed to one megabyte.
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("1.npy", "w", force_zip64=True) as member,
    ):
        member.write(header(claimed))
        for _ in range(64):
            member.write(bytes(2**24))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "a.npz"), str(LIMIT), *map(str, size)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
