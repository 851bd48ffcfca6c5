"""PyTorch's files: what they state is checked against their bytes before anything is allocated."""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

from tool.pickles import ForbiddenError
from tool.weights.pytorch import read_legacy_checkpoint, read_zip_checkpoint

TENSOR = torch.arange(6, dtype=torch.float32).reshape(2, 3)
# Offset 0, sides 2 and 3, steps 3 and 1, as a pickle states them.
STATED = re.compile(rb"K\x00K\x02K\x03\x86q.K\x03K\x01\x86q.", re.DOTALL)


def _saved(content, path, zipped: bool = True) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def _read(path):
    zipped = path.read_bytes()[:2] == b"PK"
    return (read_zip_checkpoint if zipped else read_legacy_checkpoint)(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@pytest.fixture
def repacked(path):
    """``repacked(change)`` writes the archive of a tensor with its records changed."""

    def repack(change, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(io.BytesIO(_saved({"a": TENSOR}, path))) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in change(records).items():
                archive.writestr(name, content)
        return path

    return repack


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor_comes_back(zipped, path):
    state = OrderedDict(
        plain=TENSOR,
        transposed=TENSOR.t(),
        part=TENSOR[1:, ::2],
        scalar=torch.tensor(3),
        empty=torch.empty(0, 4),
        half=TENSOR.half(),
        bfloat=TENSOR.bfloat16(),
        truth=TENSOR > 2,
        parameter=torch.nn.Parameter(TENSOR),
    )
    optimizer = {"state": {0: {"momentum_buffer": TENSOR}}, "param_groups": [{"lr": 0.1}]}
    content = {"state_dict": state, "optimizer": optimizer, "epoch": 3, "size": TENSOR.shape}
    _saved(content, path, zipped)
    found = _read(path)
    assert found["epoch"] == 3
    assert found["size"] == (2, 3)
    assert list(found["state_dict"]) == list(state)
    for name, value in state.items():
        assert found["state_dict"][name].dtype == value.dtype
        assert torch.equal(found["state_dict"][name], value)
    assert torch.equal(found["optimizer"]["state"][0]["momentum_buffer"], TENSOR)


def test_unchanged_archive_is_read_after_repacking(repacked):
    assert torch.equal(_read(repacked(lambda records: records))["a"], TENSOR)


FORGED_TENSORS = {
    "sides beyond the storage": b"K\x00J\xff\xff\xff\x7fK\x03\x86K\x03K\x01\x86",
    "offset beyond the storage": b"K\x01K\x02K\x03\x86K\x03K\x01\x86",
    "sides without steps": b"K\x00J\xff\xff\xff\x7fK\x03\x86K\x00K\x00\x86",
    "negative steps": b"K\x00K\x02K\x03\x86J\xff\xff\xff\xffK\x01\x86",
    "overflowing product": b"K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x0fK\x03\x86K\x03K\x01\x86",
    "sides and steps of other lengths": b"K\x00K\x06\x85K\x03K\x01\x86",
}


@pytest.mark.parametrize("forged", FORGED_TENSORS.values(), ids=FORGED_TENSORS)
def test_tensor_beyond_its_storage_is_an_error(forged, repacked, path):
    def forge(content: bytes) -> bytes:
        changed, count = STATED.subn(lambda _: forged, content)
        assert count == 1
        return changed

    name = "weights/data.pkl"
    with pytest.raises(ValueError, match=r"tensor"):
        _read(repacked(lambda records: {**records, name: forge(records[name])}))
    path.write_bytes(forge(_saved({"a": TENSOR}, path, zipped=False)))
    with pytest.raises(ValueError, match=r"tensor"):
        _read(path)


def test_storage_of_another_size_than_stated_is_an_error(repacked, path):
    with pytest.raises(ValueError, match="another size than stated"):
        _read(repacked(lambda records: {**records, "weights/data/0": bytes(20)}))
    with pytest.raises(ValueError, match="another size than stated"):
        _read(repacked(lambda r: {k: v for k, v in r.items() if k != "weights/data/0"}))
    legacy = _saved({"a": TENSOR}, path, zipped=False)
    numel = struct.pack("<q", 6)
    assert legacy.count(numel) == 1
    path.write_bytes(legacy.replace(numel, struct.pack("<q", 2**40)))
    with pytest.raises(ValueError, match="early or is damaged"):
        _read(path)


def test_legacy_storage_larger_than_the_file_is_an_error(path):
    legacy = _saved({"a": TENSOR}, path, zipped=False)
    stated = b"K\x06Nt"  # 6 numbers, seen as a whole
    assert legacy.count(stated) == 1
    path.write_bytes(legacy.replace(stated, b"\x8a\x06" + b"\xff" * 5 + b"\x0fNt"))
    with pytest.raises(ValueError, match="unfolds"):
        _read(path)


class _Wants:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_allocations_that_torch_itself_admits_are_forbidden(zipped, path):
    _saved({"a": _Wants(bytearray, 2**40)}, path, zipped)
    with pytest.raises(ForbiddenError, match=r"builtin.*bytearray"):
        _read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {**r, "weights/constants.pkl": b""}, "TorchScript"),
        (lambda r: {"a.npy": b""}, "npz"),
        (lambda r: {"model.bin": b""}, "no PyTorch checkpoint"),
        (lambda r: {**r, "other/data.pkl": b""}, "no PyTorch checkpoint"),
        (lambda r: {**r, "other/data/0": b""}, "no PyTorch checkpoint"),
        (lambda r: r | {f"weights/data/{k:0200}": b"" for k in range(9000)}, "more files"),
    ],
)
def test_other_archives_are_told_apart(change, message, repacked):
    with pytest.raises(ValueError, match=message):
        _read(repacked(change))


def test_compressed_archive_is_an_error(repacked):
    with pytest.raises(ValueError, match="compressed"):
        _read(repacked(lambda records: records, zipfile.ZIP_DEFLATED))


def test_archive_with_something_behind_it_is_an_error(path):
    whole = _saved({"a": TENSOR}, path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="archive"):
        _read(path)


def test_bare_pickle_is_told_apart(path):
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match="bare pickle"):
        _read(path)
