"""Hostile and damaged files: one clear error, and no more memory than the file's size + 64 MiB.

Every reader of files that others may have written gets each sample cut anywhere, with bytes
exchanged anywhere, and bytes at random.
"""

import io
import resource
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WEIGHT_SAMPLES
from helpers import dict_pickle, npy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from weight_files import CAFFE_FORMS, caffemodel, params

from tool.maps import load_npy_dict
from tool.run.errors import DataError
from tool.weights import read_weight_file

ALLOWED_BYTES = 64 * 2**20
PAGE = resource.getpagesize()


def _state_dict() -> OrderedDict:
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict(
        (f"layer{k}.weight", torch.randn(3, k + 1, 2, generator=generator)) for k in range(3)
    )
    state["counter"] = torch.tensor(3)
    state["half"] = torch.ones(5).half()
    state["tied"] = state["layer2.weight"].transpose(0, 1)
    return state


def _checkpoint(content, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _samples() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    blobs = {
        "conv1.0": rng.random((4, 3, 3, 3), np.float32),
        "conv1.1": rng.random(4, np.float32),
        "fc.0": rng.random((2, 5), np.float32),
    }
    arrays = {
        "arg:a_weight": rng.random((4, 3), np.float32),
        "aux:b_mean": rng.random(5),
        "arg:c": rng.integers(0, 9, (2, 2, 2)),
        "arg:none": np.empty(0, np.float32).reshape(0, 2),
    }
    maps = {k: rng.random((4, 5), np.float32) for k in (3, 14)}
    labels = {f"2007_{k:06}": rng.random(20).astype(np.float32) for k in range(30)}
    nested = {"checkpoint": 1, "state_dict": _state_dict(), "sizes": (1, [2.5, None], b"x")}
    return {
        "zip.pth": _checkpoint(_state_dict(), zipped=True),
        "legacy.pth": _checkpoint(_state_dict(), zipped=False),
        "nested.pth": _checkpoint(nested, zipped=True),
        "nested_legacy.pth": _checkpoint(nested, zipped=False),
        "a.safetensors": save_safetensors({k: torch.from_numpy(v) for k, v in blobs.items()}),
        **{
            f"{form} {generation}.caffemodel": caffemodel(blobs, generation == "layers", form)
            for form in CAFFE_FORMS
            for generation in ("layers", "layer")
        },
        **{f"{v}.params": params(arrays, v) for v in ("legacy", "V1", "V2", "V3")},
        "unnamed.params": params(arrays, named=False),
        "maps.npy": npy(dict_pickle(maps, 4)),
        "maps_of_protocol_2.npy": npy(dict_pickle(maps, 2, b"numpy.core")),
        "labels.npy": npy(dict_pickle(labels, 3, b"numpy.core")),
        "scalars.npy": npy(dict_pickle({"a": np.float64(1.5), "b": [1, 2.5, "c", None]}, 4)),
    }


SAMPLES = _samples()
REAL_SAMPLES = sorted(
    path.name for path in WEIGHT_SAMPLES.glob("*") if path.suffix in (".params", ".caffemodel")
)
REPLACEMENTS = st.one_of(
    st.binary(min_size=1, max_size=9),
    st.sampled_from([b"\xff" * 8, b"\xff" * 4 + b"\x7f", b"\x00" * 8, b"\x00" * 4 + b"\x10" * 4]),
)


def _read(path: Path) -> None:
    (load_npy_dict if path.suffix == ".npy" else read_weight_file)(path)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


def _read_within_bounds(path: Path) -> bool:
    """Whether the file was read; else it must have been a DataError that names it.

    What Python and NumPy allocate is measured. What PyTorch does is not seen there: so the
    process gets no more address space.
    """
    allowed = path.stat().st_size + ALLOWED_BYTES
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + allowed, limits[1]))
    tracemalloc.start()
    try:
        _read(path)
        return True
    except DataError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        cause = error.__cause__
        assert not isinstance(cause, MemoryError | RecursionError), cause
        assert "allocate" not in str(cause)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        assert peak < allowed, f"{peak} bytes were allocated for a file of {path.stat().st_size}"


@pytest.fixture(scope="module", autouse=True)
def _readers_loaded(tmp_path_factory):
    """Whatever the readers import or set up at their first call is no part of a file's bill."""
    folder = tmp_path_factory.mktemp("first")
    for name, content in SAMPLES.items():
        (folder / name).write_bytes(content)
        _read(folder / name)


def quick(examples: int):
    return settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_within_bounds(name, tmp_path):
    (tmp_path / name).write_bytes(SAMPLES[name])
    assert _read_within_bounds(tmp_path / name)


@pytest.mark.parametrize("name", SAMPLES)
@quick(35)
@given(data=st.data())
def test_cut_sample_is_a_data_error(name, data, tmp_path):
    whole = SAMPLES[name]
    (tmp_path / name).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    # Caffe's format has no end of its own: cut between two layers, it is a smaller model.
    assert not _read_within_bounds(tmp_path / name) or name.endswith(".caffemodel")


@pytest.mark.parametrize("name", SAMPLES)
@quick(65)
@given(data=st.data())
def test_sample_with_other_bytes_is_read_or_a_data_error(name, data, tmp_path):
    content = bytearray(SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(REPLACEMENTS)
        content[place : place + len(new)] = new
    (tmp_path / name).write_bytes(content)
    _read_within_bounds(tmp_path / name)


@pytest.mark.parametrize("name", REAL_SAMPLES)
@quick(20)
@given(data=st.data())
def test_damaged_real_file_is_read_or_a_data_error(name, data, tmp_path):
    content = bytearray((WEIGHT_SAMPLES / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(REPLACEMENTS)
    content[place : place + len(new)] = new
    end = data.draw(st.integers(0, len(content)))
    (tmp_path / name).write_bytes(content[:end])
    _read_within_bounds(tmp_path / name)


BEGINNINGS = [
    b"",
    b"PK\x03\x04",
    b"\x80\x02",
    SAMPLES["legacy.pth"][:25],
    SAMPLES["a.safetensors"][:10],
    SAMPLES["V2.params"][:24],
    SAMPLES["packed layer.caffemodel"][:12],
    SAMPLES["maps.npy"][:128],
    SAMPLES["maps.npy"][:140],
]


@pytest.mark.parametrize("start", BEGINNINGS)
@quick(60)
@given(noise=st.binary(max_size=400))
def test_random_bytes_are_a_data_error(start, noise, tmp_path):
    for name in ("a.npy", "a.pth"):
        (tmp_path / name).write_bytes(start + noise)
        _read_within_bounds(tmp_path / name)
