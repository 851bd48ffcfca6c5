"""Pickles read as data: nothing is imported, and only what the caller admits is called.

The standard unpickler reserves memory for the numbers in a file before it looks whether the bytes
are there, and a few bytes can make it build or fetch without end. ``read_pickle`` knows the
operations that data needs, checks each length against the file, and keeps an account of what it
builds. So a forged or damaged file ends in an error, early and small.
"""

import codecs
import mmap
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tool.run.errors import printable

# Bytes that reading may take beyond the file's own size; operations in one pickle; values that
# wait on its stack (pickles are written in portions of 1,000).
ALLOWANCE = 48 * 2**20
MAX_OPERATIONS = 3_000_000
# Operations of state dicts have 3.3 bytes each and those of label files 5. A pickle of more
# operations than these may not be made of smaller ones, which take time and say little. Of a
# string, no more bytes count than these.
FREE_OPERATIONS = 300_000
LEAST_BYTES = 3
MOST_BYTES = 200
OPERATIONS_AT_ONCE = 10_000
MAX_STACK = 100_000
# No count, shape or label is an integer of more bytes or digits than this.
MAX_INTEGER_LENGTH = 255
MAX_NAME_LENGTH = 200
UNFOLDS = "it unfolds into far more than its size"
# Bytes that are searched at a time.
BLOCK_BYTES = 2**20
# Up to here, a memo index is one byte.
MAX_BYTE = 256
# What a place in a list and in a dict takes, as they grow.
ITEM_BYTES, ENTRY_BYTES = 12, 140


class ForbiddenError(Exception):
    """Names what a pickle wanted to load."""


class Budget:
    """How many bytes may still be built from a file of ``size`` bytes."""

    def __init__(self, size: int):
        self.left = size + ALLOWANCE

    def charge(self, size: int) -> None:
        """Raises ValueError when more is built than a file of that size can be about."""
        self.require(size)
        self.left -= size

    def require(self, size: int) -> None:
        """As ``charge``, for what is needed for a moment only."""
        if size > self.left:
            raise ValueError(UNFOLDS)


class Constructor(NamedTuple):
    """What the pickle may call under a name."""

    function: Callable


class Pending:
    """What a constructor returns for an object whose state is still to come.

    The pickle's BUILD operation puts ``build(state)`` in its place.
    """

    __slots__ = ("value",)

    def __init__(self):
        self.value: Any = None

    def build(self, state: Any) -> Any:
        raise NotImplementedError


def map_file(path: str | os.PathLike) -> mmap.mmap:
    """A file's bytes, mapped into memory; what is written to them stays out of the file.

    Raises OSError as ``open`` does, and ValueError if the file is empty.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def read_pickle(
    data: mmap.mmap | bytes,
    start: int,
    names: Mapping[str, Any],
    budget: Budget,
    persistent_load: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The value of the pickle that begins at ``start``, and where the pickle ends.

    ``names`` has what the pickle may name, as ``module.name``: a Constructor, or a plain value.
    Byte strings are memoryviews of ``data``; those of Python 2 are taken for Latin-1 text. Raises
    ForbiddenError for any other name, ValueError if the pickle is damaged or unfolds too far, and
    whatever a constructor raises.
    """
    try:
        return _Machine(data, names, budget, persistent_load).run(start)
    except (IndexError, struct.error) as error:
        raise ValueError("it ends too early or is damaged") from error


_BYTE, _UINT16, _INT32 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<i")
_UINT32, _UINT64, _DOUBLE = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct(">d")


class _Machine:
    """The stack machine that a pickle is a program for.

    A method ``op_...`` carries out the operation that the module ``pickle`` has under that name. It
    gets the position of the operand and returns that of the next operation.
    """

    def __init__(
        self,
        data: mmap.mmap | bytes,
        names: Mapping[str, Any],
        budget: Budget,
        persistent_load: Callable[[Any], Any] | None,
    ):
        self.data, self.view = data, memoryview(data)
        self.names, self.budget, self.persistent_load = names, budget, persistent_load
        self.stack: list[Any] = []
        self.marks: list[int] = []  # sizes of the stack where MARK stood
        self.memo: dict[int, Any] = {}
        self.num_memoized = 0
        self.surplus = 0  # bytes of strings that do not count
        self.may_be_fetched: np.ndarray | None = None

    def run(self, position: int) -> tuple[Any, int]:
        data, stack, marks, budget = self.data, self.stack, self.marks, self.budget
        start = position
        for count in range(MAX_OPERATIONS):
            if count % OPERATIONS_AT_ONCE == 0:
                _require_substance(count, position - start - self.surplus)
            code = data[position]
            if code == pickle.STOP[0]:
                if len(stack) != 1 or marks:
                    raise ValueError("it is not one value")
                return self._pop(), position + 1
            if code not in _OPERATIONS:
                raise ValueError(f"it has the unknown operation {code}")
            position = _OPERATIONS[code](self, position + 1)
            if budget.left < 0:
                raise ValueError(UNFOLDS)
            if len(stack) + len(marks) > MAX_STACK:
                raise ValueError(f"it has more than {MAX_STACK:,} values side by side")
        raise ValueError(f"it has more than {MAX_OPERATIONS:,} operations")

    # ---- the stack: all that is pushed has its size charged; what a call uses up is released ----

    def _push(self, value: Any) -> None:
        self.budget.left -= sys.getsizeof(value)
        self.stack.append(value)

    def _require_value(self) -> None:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("a value is missing")

    def _pop(self) -> Any:
        self._require_value()
        value = self.stack.pop()
        if isinstance(value, Pending):
            raise ValueError("an object has no content")
        return value

    def _pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("a mark is missing")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        if any(isinstance(item, Pending) for item in items):
            raise ValueError("an object has no content")
        return items

    def _top(self, kind: type) -> Any:
        self._require_value()
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {type(self.stack[-1]).__name__} stands where it cannot")
        return self.stack[-1]

    # ---- numbers and strings ----

    def _counted(self, count: struct.Struct, at: int) -> tuple[int, int]:
        """Where a string begins and ends whose length stands before it."""
        start = at + count.size
        end = start + count.unpack_from(self.data, at)[0]
        if not start <= end <= len(self.data):
            raise ValueError("a length points past its end")
        self.surplus += max(0, end - start - MOST_BYTES)
        return start, end

    def _line(self, at: int, longest: int | None = None) -> tuple[bytes, int]:
        """The text up to the end of the line, and where the next line begins."""
        end = self.data.find(b"\n", at, len(self.data) if longest is None else at + longest)
        if end < 0:
            raise ValueError("a line does not end")
        self.budget.require(5 * (end - at))  # it may become text of four bytes a character
        return self.data[at:end], end + 1

    def op_none(self, at: int) -> int:
        self.stack.append(None)
        return at

    def op_newtrue(self, at: int) -> int:
        self.stack.append(True)
        return at

    def op_newfalse(self, at: int) -> int:
        self.stack.append(False)
        return at

    def op_binint(self, at: int) -> int:
        self._push(_INT32.unpack_from(self.data, at)[0])
        return at + 4

    def op_binint1(self, at: int) -> int:
        self.stack.append(self.data[at])  # Python keeps these numbers anyway
        return at + 1

    def op_binint2(self, at: int) -> int:
        self._push(_UINT16.unpack_from(self.data, at)[0])
        return at + 2

    def op_binfloat(self, at: int) -> int:
        self._push(_DOUBLE.unpack_from(self.data, at)[0])
        return at + 8

    def op_long1(self, at: int) -> int:
        start, end = self._counted(_BYTE, at)
        self._push(int.from_bytes(self.data[start:end], "little", signed=True))
        return end

    def op_int(self, at: int) -> int:
        line, end = self._line(at, MAX_INTEGER_LENGTH)
        truth = {b"00": False, b"01": True}.get(line)
        self._push(int(line) if truth is None else truth)
        return end

    def op_long(self, at: int) -> int:
        line, end = self._line(at, MAX_INTEGER_LENGTH)
        self._push(int(line.removesuffix(b"L")))
        return end

    def op_float(self, at: int) -> int:
        line, end = self._line(at, MAX_INTEGER_LENGTH)
        self._push(float(line))
        return end

    def _push_bytes(self, count: struct.Struct, at: int) -> int:
        start, end = self._counted(count, at)
        self._push(self.view[start:end])
        return end

    def op_short_binbytes(self, at: int) -> int:
        return self._push_bytes(_BYTE, at)

    def op_binbytes(self, at: int) -> int:
        return self._push_bytes(_UINT32, at)

    def op_binbytes8(self, at: int) -> int:
        return self._push_bytes(_UINT64, at)

    def _push_utf8(self, count: struct.Struct, at: int) -> int:
        start, end = self._counted(count, at)
        text = self.view[start:end]
        if len(text) > MAX_NAME_LENGTH:
            # One character above U+FFFF makes all of them take four bytes.
            widest = np.frombuffer(text, np.uint8).max()
            self.budget.require(len(text) * (4 if widest >= 0xF0 else 2 if widest >= 0xC4 else 1))
        self._push(str(text, "utf-8", "surrogatepass"))
        return end

    def op_short_binunicode(self, at: int) -> int:
        return self._push_utf8(_BYTE, at)

    def op_binunicode(self, at: int) -> int:
        return self._push_utf8(_UINT32, at)

    def op_binunicode8(self, at: int) -> int:
        return self._push_utf8(_UINT64, at)

    def op_unicode(self, at: int) -> int:
        line, end = self._line(at)
        self._push(str(line, "raw-unicode-escape"))
        return end

    def _push_latin1(self, count: struct.Struct, at: int) -> int:
        start, end = self._counted(count, at)
        self.budget.require(end - start)
        self._push(str(self.view[start:end], "latin1"))
        return end

    def op_short_binstring(self, at: int) -> int:
        return self._push_latin1(_BYTE, at)

    def op_binstring(self, at: int) -> int:
        return self._push_latin1(_INT32, at)

    def op_string(self, at: int) -> int:
        line, end = self._line(at)
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise ValueError("a string has no quotes")
        self._push(str(codecs.escape_decode(line[1:-1])[0], "latin1"))
        return end

    # ---- containers ----

    def op_mark(self, at: int) -> int:
        self.marks.append(len(self.stack))
        return at

    def op_empty_tuple(self, at: int) -> int:
        self._push(())
        return at

    def op_tuple(self, at: int) -> int:
        self._push(tuple(self._pop_to_mark()))
        return at

    def op_tuple1(self, at: int) -> int:
        self._push((self._pop(),))
        return at

    def op_tuple2(self, at: int) -> int:
        second = self._pop()
        self._push((self._pop(), second))
        return at

    def op_tuple3(self, at: int) -> int:
        third, second = self._pop(), self._pop()
        self._push((self._pop(), second, third))
        return at

    def op_empty_list(self, at: int) -> int:
        self._push([])
        return at

    def op_list(self, at: int) -> int:
        self._push(self._pop_to_mark())
        return at

    def op_append(self, at: int) -> int:
        return self._extend([self._pop()], at)

    def op_appends(self, at: int) -> int:
        return self._extend(self._pop_to_mark(), at)

    def _extend(self, items: list[Any], at: int) -> int:
        self.budget.charge(ITEM_BYTES * len(items))
        self._top(list).extend(items)
        return at

    def op_empty_dict(self, at: int) -> int:
        self._push({})
        return at

    def op_dict(self, at: int) -> int:
        items = self._pop_to_mark()
        self._push({})
        return self._update(items, at)

    def op_setitem(self, at: int) -> int:
        value = self._pop()
        return self._update([self._pop(), value], at)

    def op_setitems(self, at: int) -> int:
        return self._update(self._pop_to_mark(), at)

    def _update(self, items: list[Any], at: int) -> int:
        """Put keys and values, in turn, into the dict on top."""
        if len(items) % 2:
            raise ValueError("a key has no value")
        self.budget.charge(ENTRY_BYTES * len(items) // 2)
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Long integers can be made to collide, and hashing a tuple may recurse without end.
            if isinstance(key, int) and key.bit_length() > 64:
                raise ValueError("a key is too long")
            if not isinstance(key, str | int | float | np.integer):
                raise ValueError(f"a {type(key).__name__} is a key")
            target[key] = value
        return at

    # ---- the memo: a pickle numbers nearly every value, but only what is fetched is kept ----

    def _put(self, index: int) -> None:
        self._require_value()
        self.num_memoized += 1
        if index >= MAX_BYTE and self.may_be_fetched is None:
            self.may_be_fetched = _may_be_fetched(self.data)
        if index < MAX_BYTE or self.may_be_fetched[min(index, len(self.may_be_fetched) - 1)]:
            value = self.stack[-1]
            self.budget.charge(ENTRY_BYTES + _passing_size(value))
            self.memo[index] = value

    def op_memoize(self, at: int) -> int:
        self._put(self.num_memoized)
        return at

    def op_binput(self, at: int) -> int:
        self._put(self.data[at])
        return at + 1

    def op_long_binput(self, at: int) -> int:
        self._put(_UINT32.unpack_from(self.data, at)[0])
        return at + 4

    def op_put(self, at: int) -> int:
        line, end = self._line(at, MAX_INTEGER_LENGTH)
        self._put(int(line))
        return end

    def _fetch(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("it fetches what it does not have")
        value = self.memo[index]
        if isinstance(value, Pending) and value.value is not None:
            value = value.value
        self.budget.left -= _passing_size(value)
        self.stack.append(value)

    def op_binget(self, at: int) -> int:
        self._fetch(self.data[at])
        return at + 1

    def op_long_binget(self, at: int) -> int:
        self._fetch(_UINT32.unpack_from(self.data, at)[0])
        return at + 4

    def op_get(self, at: int) -> int:
        line, end = self._line(at, MAX_INTEGER_LENGTH)
        self._fetch(int(line))
        return end

    # ---- names and calls ----

    def _push_name(self, module: Any, name: Any) -> None:
        wanted = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        if wanted not in self.names:
            raise ForbiddenError(printable(wanted[:MAX_NAME_LENGTH]) or "something without a name")
        self._push(self.names[wanted])

    def op_global(self, at: int) -> int:
        module, at = self._line(at, MAX_NAME_LENGTH)
        name, at = self._line(at, MAX_NAME_LENGTH)
        self._push_name(str(module, "utf-8"), str(name, "utf-8"))
        return at

    def op_stack_global(self, at: int) -> int:
        name = self._pop()
        self._push_name(self._pop(), name)
        return at

    def op_inst(self, at: int) -> int:
        module, at = self._line(at, MAX_NAME_LENGTH)
        name, _ = self._line(at, MAX_NAME_LENGTH)
        raise ForbiddenError(printable(f"{str(module, 'utf-8')}.{str(name, 'utf-8')}"))

    def op_reduce(self, at: int) -> int:
        arguments, constructor = self._pop(), self._pop()
        if not isinstance(constructor, Constructor) or not isinstance(arguments, tuple):
            raise ValueError("something is called that is no constructor")
        self.budget.left += _passing_size(arguments)
        self._push(constructor.function(*arguments))
        return at

    def op_build(self, at: int) -> int:
        state = self._pop()
        target = self._top(Pending | dict)
        if isinstance(target, Pending):
            target.value = target.build(state)
            self.stack.pop()
            self.budget.left += _passing_size(state) + sys.getsizeof(target)
            self._push(target.value)
        return at  # the attributes of an OrderedDict are no content

    def op_binpersid(self, at: int) -> int:
        if self.persistent_load is None:
            raise ForbiddenError("an object from outside")
        self._push(self.persistent_load(self._pop()))
        return at

    def op_proto(self, at: int) -> int:
        if self.data[at] > pickle.HIGHEST_PROTOCOL:
            raise ValueError(f"its protocol {self.data[at]} is unknown")
        return at + 1

    def op_frame(self, at: int) -> int:
        return at + 8  # how the bytes were grouped when they were written says nothing


_OPERATIONS = {
    getattr(pickle, name.removeprefix("op_").upper())[0]: function
    for name, function in vars(_Machine).items()
    if name.startswith("op_")
}
_PASSING = (tuple, memoryview, str)
_GET = re.compile(rb"%b(\d{1,7})\n" % pickle.GET)


def _require_substance(operations: int, size: int) -> None:
    """Raises ValueError where so many operations have so few bytes that they mean no good."""
    if operations > FREE_OPERATIONS + size // LEAST_BYTES:
        raise ValueError(f"it has {operations:,} operations in {size:,} bytes")


def _may_be_fetched(data: mmap.mmap | bytes) -> np.ndarray:
    """For each memo index, whether some bytes could be its fetching: perhaps too many, never too
    few."""
    found = np.zeros(min(len(data), MAX_OPERATIONS) + 1, bool)  # the last for all indices beyond
    for match in _GET.finditer(data):
        found[min(int(match[1]), len(found) - 1)] = True
    raw = np.frombuffer(data, np.uint8)
    for start in range(0, len(raw), BLOCK_BYTES):
        block = raw[start : start + BLOCK_BYTES + 4]
        at = np.flatnonzero(block[:-4] == pickle.LONG_BINGET[0])
        index = sum(block[at + 1 + place].astype(np.int64) << (8 * place) for place in range(4))
        found[index[index < len(found)]] = True
    return found


def _passing_size(value: Any) -> int:
    """What was charged for a string or a tuple and such items, which mostly pass away with a
    call."""
    if not isinstance(value, _PASSING):
        return 0
    size = sys.getsizeof(value)
    if isinstance(value, tuple):
        for item in value:
            if isinstance(item, _PASSING):
                size += sys.getsizeof(item)
    return size
