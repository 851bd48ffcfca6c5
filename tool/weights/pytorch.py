"""PyTorch's checkpoints, both forms: looked through first, then left to ``torch.load``.

``torch.load`` with ``weights_only=True`` executes nothing, but it believes the sizes that a file
states. So everything is read once as plain data, and each storage and tensor has to lie within the
bytes that are there, before PyTorch sees the file.
"""

import io
import math
import mmap
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import torch

from tool.files import atomic_write
from tool.pickles import ENTRY_BYTES, Budget, Constructor, ForbiddenError, map_file, read_pickle
from tool.run.errors import DataError, reason

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# A zip archive's closing records: of the directory, and of its 64-bit form and that one's place.
END_RECORD = struct.Struct("<4s4H2LH")
END_RECORD_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
STORAGE_ITEM_BYTES = {
    "DoubleStorage": 8,
    "LongStorage": 8,
    "FloatStorage": 4,
    "IntStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
# A state dict of 20,000 tensors has a directory of this size.
MAX_DIRECTORY_BYTES = 2 * 2**20


def load_tensors(path: str | os.PathLike, kind: str) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, plain containers, numbers and strings.

    Raises DataError, with the ``kind`` of file, if it is damaged or wants to execute anything.
    """
    with explained(path, kind):
        with open(path, "rb") as file:
            zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        return read_zip_checkpoint(path) if zipped else read_legacy_checkpoint(path)


def save_tensors(path: str | os.PathLike, content: Any) -> None:
    """Write what ``load_tensors`` reads, whole or not at all; raises OSError on a full disk."""
    buffer = io.BytesIO()  # torch.save's own error on a full disk would not say so
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def explained(path: str | os.PathLike, kind: str) -> Iterator[None]:
    """Turns what the reading of a file raises into a DataError of one sentence."""
    try:
        yield
    except DataError:
        raise
    except ForbiddenError as error:
        raise DataError(
            f"{path}: refused, because it wants to load {error}; a {kind} holds tensors only."
        ) from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: refused, because it is damaged or holds more than tensors "
            "(torch.load with weights_only=True does not read it)."
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(f"{path}: not a readable {kind} ({reason(error)}).") from error


def read_zip_checkpoint(path: str | os.PathLike) -> Any:
    """What ``torch.save`` wrote in its present form.

    Raises ForbiddenError if it wants more than tensors and plain values, and ValueError or what
    PyTorch raises if it is no checkpoint or is damaged.
    """
    data = map_file(path)
    _require_plain_end(data)
    with open(path, "rb") as file:
        with zipfile.ZipFile(file) as archive:
            root, pickled = _find_pickle(archive, len(data))
            sizes = {
                info.filename.removeprefix(f"{root}/data/"): info.file_size
                for info in archive.infolist()
                if info.filename.startswith(f"{root}/data/")
            }
        checked = _Checked(Budget(len(data)), sizes)
        read_pickle(pickled, 0, checked.names, checked.budget, checked.storage)
        return _load(file)


def read_legacy_checkpoint(path: str | os.PathLike) -> Any:
    """What PyTorch before 1.6 wrote: pickles in a row, then the storages.

    Raises as ``read_zip_checkpoint`` does.
    """
    data = map_file(path)
    budget = Budget(len(data))
    magic, end = read_pickle(data, 0, {}, budget)
    if magic != LEGACY_MAGIC:
        raise ValueError("it is a bare pickle, which torch.save did not write")
    for _ in ("protocol version", "system"):
        _, end = read_pickle(data, end, {}, budget)
    checked = _Checked(budget)
    _, end = read_pickle(data, end, checked.names, budget, checked.storage)
    keys, end = read_pickle(data, end, {}, budget)
    if not isinstance(keys, list) or set(keys) != checked.storages.keys():
        raise ValueError("its list of storages is damaged")
    for key in keys:
        storage = checked.storages[key]
        if len(data) - end < 8 or struct.unpack_from("<q", data, end) != (storage.numel,):
            raise ValueError("it ends too early or is damaged")
        end += 8 + storage.numel * storage.itemsize
    if end > len(data):
        raise ValueError("it ends too early")
    return _load(data)


def _load(file: IO[bytes] | mmap.mmap) -> Any:
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about PyTorch's own past; errors are what counts here
        return torch.load(file, map_location="cpu", weights_only=True)


def _require_plain_end(data: mmap.mmap) -> None:
    """Nothing behind the archive's directory, and one directory for every reader of zip files."""
    end = len(data) - END_RECORD.size
    if end < 0 or data[end : end + 4] != b"PK\x05\x06":
        raise ValueError("the archive ends too early or is damaged")
    *_, size, offset, comment_size = END_RECORD.unpack_from(data, end)
    at_64 = end - LOCATOR_64.size - END_RECORD_64.size
    directory_end = end
    if at_64 >= 0 and data[end - LOCATOR_64.size :][:4] == b"PK\x06\x07":
        _, _, stated_64, _ = LOCATOR_64.unpack_from(data, end - LOCATOR_64.size)
        *_, size, offset = END_RECORD_64.unpack_from(data, at_64)
        directory_end = at_64
        if stated_64 != at_64:
            raise ValueError("the archive's directory is damaged")
    if offset + size != directory_end or comment_size:
        raise ValueError("the archive's directory is damaged")
    if size > MAX_DIRECTORY_BYTES:
        raise ValueError("the archive has more files than a state dict has tensors")


def _find_pickle(archive: zipfile.ZipFile, size: int) -> tuple[str, bytes]:
    """The name of the checkpoint's folder in the archive of that size, and its pickle's bytes."""
    records = {info.filename: info for info in archive.infolist()}
    if len(records) != len(archive.infolist()):
        raise ValueError("the archive has two files of one name")
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") for name in records):
        raise ValueError("it is a TorchScript archive, a program; save the state dict instead")
    if any(name.endswith(".npy") for name in records):
        raise ValueError("it is NumPy's .npz, not a PyTorch checkpoint")
    if len(roots) != 1 or not all(name.startswith(f"{roots[0]}/") for name in records):
        raise ValueError("it is a zip archive, but no PyTorch checkpoint; unpack it first")
    for name, info in records.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{name} is compressed, which torch.save does not do")
    if sum(info.file_size for info in records.values()) > size:
        raise ValueError("files in the archive overlap or point past its end")
    return roots[0], archive.read(f"{roots[0]}/data.pkl")


class _Storage(NamedTuple):
    """The numbers behind tensors, as a checkpoint describes them."""

    numel: int
    itemsize: int


class _StorageType(NamedTuple):
    itemsize: int


class _Checked:
    """Stand-ins for what a checkpoint may name, that check sizes and build nothing.

    ``sizes`` are the bytes of each storage, where that is known before.
    """

    def __init__(self, budget: Budget, sizes: Mapping[str, int] | None = None):
        self.budget, self.sizes = budget, sizes
        self.storages: dict[str, _Storage] = {}
        self.names = {
            **_plain_names(),
            "collections.OrderedDict": Constructor(self.ordered_dict),
            "torch._utils._rebuild_tensor": Constructor(self.tensor),
            "torch._utils._rebuild_tensor_v2": Constructor(self.tensor),
            "torch._utils._rebuild_parameter": Constructor(lambda data, *_: data),
            "torch.Size": Constructor(tuple),
            "torch.device": Constructor(lambda *_: None),
            "_codecs.encode": Constructor(lambda *_: None),
        }

    def storage(self, pid: Any) -> _Storage:
        """The storage of a persistent id: "storage", type, key, location, numbers, view."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_count(numel):
            raise ValueError("a storage is damaged")
        stored = _Storage(numel, kind.itemsize)
        if self.storages.setdefault(key, stored) != stored and numel:
            raise ValueError("a storage has two sizes")
        if self.sizes is None:
            self.budget.require(numel * kind.itemsize)
        elif self.sizes.get(key) != numel * kind.itemsize:
            raise ValueError("a storage is missing or has another size than stated")
        self.budget.charge(ENTRY_BYTES)
        if not any(view):
            return stored
        _, offset, view_numel = view[0]  # files of PyTorch before 0.4
        if not _is_count(offset) or not _is_count(view_numel) or offset + view_numel > numel:
            raise ValueError("a storage ends before what is seen of it")
        return _Storage(view_numel, kind.itemsize)

    def tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> None:
        """A tensor whose numbers must lie within the storage."""
        counts = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or not all(map(_is_count, counts)):
            raise ValueError("a tensor is damaged")
        if len(size) != len(stride) or len(size) > 32:
            raise ValueError("a tensor's sides and strides do not fit")
        if math.prod(size) == 0:
            return
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if last >= storage.numel or math.prod(size) > storage.numel:
            raise ValueError(f"a tensor of size {tuple(size)} exceeds its storage")

    def ordered_dict(self, pairs: list | tuple = ()) -> dict:
        """An OrderedDict, from pairs as Python 2 wrote it."""
        self.budget.charge(ENTRY_BYTES * len(pairs))
        if not all(isinstance(pair, list | tuple) and isinstance(pair[0], str) for pair in pairs):
            raise ValueError("a dict is damaged")
        return dict(pairs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _plain_names() -> dict[str, Any]:
    """PyTorch's number types, and its storage types by the bytes of a number."""
    types = [name for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)]
    names: dict[str, Any] = {f"torch.{name}": name for name in types}
    for name, itemsize in STORAGE_ITEM_BYTES.items():
        names[f"torch.{name}"] = names[f"torch.cuda.{name}"] = _StorageType(itemsize)
    names["torch.storage.UntypedStorage"] = _StorageType(1)
    return names
