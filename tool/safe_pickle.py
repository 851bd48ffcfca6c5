"""Reads pickles of plain data, NumPy arrays and torch tensors; no code from the file runs.

A pickle is a program for a small stack machine: it may import any module and call any function.
This reader is the standard library's unpickler in its Python form, with most of its operations
taken away, and with stand-ins for the few names that NumPy 1 and 2 and torch write. (The C form
cannot check what becomes a dict's key, and reserves memory for whatever length or index a file
states.)
"""

import io
import math
import pickle
import pickletools
import re
import struct
from typing import Any, ClassVar

import numpy as np
import torch

from tool.run.errors import printable

# What pickles of protocol 2 to 5 need for numbers, text, bytes, tuples, lists, dicts and arrays.
OPERATIONS = """
    PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
"""


def read_pickle(data: bytes) -> Any:
    """The value of the pickle with which the bytes begin; arrays are of a subclass of ndarray.

    A tensor becomes an array, too. Raises ValueError, or what NumPy or torch raises, if it names
    anything but arrays, tensors, numbers and their types, has an operation that data does not need,
    or is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except KeyError as error:
        raise ValueError(f"it has the operation {error}, which data does not need") from error
    except (EOFError, IndexError, struct.error) as error:
        raise ValueError("it ends too early or is damaged") from error


class _DType:
    """Stands in for ``numpy.dtype``, which does not check a state."""

    def __init__(self, code: str, *_: Any):
        # Numbers, truth values, text and objects
        if not re.fullmatch(r"[biufcSUO?]\d{0,9}", code):
            raise ValueError(f"it has an array of type {code[:20]!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]  # the rest describes structures, or repeats the code
        if byte_order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Array(np.ndarray):
    """An array that checks its state, which NumPy does not do."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        if isinstance(content, str):  # bytes that Python 2 wrote
            content = content.encode("latin1")
        container, size = (list, 1) if kind.dtype.hasobject else (bytes, kind.dtype.itemsize)
        sides_are_valid = all(isinstance(side, int) and side >= 0 for side in shape)
        is_filled = isinstance(content, container) and len(content) == math.prod(shape) * size
        if not (sides_are_valid and is_filled):
            raise ValueError("it has an array whose shape and content do not fit")
        super().__setstate__((1, shape, kind.dtype, bool(is_fortran), content))


def _from_buffer(content: bytes | str, kind: _DType, shape: tuple, order: str) -> np.ndarray:
    array = _Array(0)
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def _array_of_tensor(
    storage: torch.TypedStorage, offset: int, shape: tuple, strides: tuple, *_: Any
) -> np.ndarray:
    numbers = torch.empty(0, dtype=storage.dtype).set_(storage)
    if math.prod(shape) > len(numbers):  # an expanded tensor: a few bytes of any size
        raise ValueError("it has a tensor whose shape and content do not fit")
    return numbers.as_strided(shape, strides, offset).numpy()  # checks the bounds


class _Dict(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, tuple):  # hashing recurses in C without a limit
            raise ValueError("a tuple is a key")
        super().__setitem__(key, value)


# What a pickle may name, and what it gets for it.
NAMES: dict[str, Any] = {
    "numpy.dtype": _DType,
    "numpy.ndarray": None,  # only ever an argument of _reconstruct
    # Bytes under protocol 2; the second where there are none.
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "__builtin__.bytes": lambda: b"",
    "torch._utils._rebuild_tensor_v2": _array_of_tensor,
    # A tensor's numbers, as a stream of torch.save.
    "torch.storage._load_from_bytes": lambda stream: torch.load(
        io.BytesIO(stream), map_location="cpu", weights_only=True
    ),
    "collections.OrderedDict": lambda: _Dict(),  # a tensor's hooks
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    NAMES[f"{_core}.multiarray._reconstruct"] = lambda *_: _Array(0)
    NAMES[f"{_core}.multiarray.scalar"] = lambda kind, data: _from_buffer(data, kind, (), "C")[()]
    NAMES[f"{_core}.numeric._frombuffer"] = _from_buffer  # under protocol 5


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if pickletools.code2op[chr(code)].name in OPERATIONS.split()
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in NAMES:
            wish = printable(f"{module}.{name}"[:100])
            raise ValueError(f"it wants to load {wish}, which data does not need")
        return NAMES[f"{module}.{name}"]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _DType):
            raise ValueError("a state is given to something that has none")
        super().load_build()

    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8  # reserves nothing
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Dict())
