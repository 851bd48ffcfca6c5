"""Pickles as data: what is written comes back, and nothing unfolds beyond its account."""

import pickle
import pickletools
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tool import pickles
from tool.pickles import (
    MAX_STACK,
    Budget,
    Constructor,
    ForbiddenError,
    Pending,
    read_pickle,
)

ALLOWANCE = 2**20
KEYS = st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def _read(data: bytes, names=None):
    value, end = read_pickle(data, 0, names or {}, Budget(len(data)))
    assert end == len(data)
    return value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@given(content=PLAIN)
def test_plain_values_come_back(protocol, content):
    assert _read(pickle.dumps(content, protocol)) == content


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_stands_in_several_places_is_one_object(protocol):
    # More than 256 of them: from there on, the memo's indices take four bytes.
    lists = [[k, "text"] for k in range(400)]
    first, second = _read(pickle.dumps((lists, lists[::-1]), protocol))
    assert all(a is b for a, b in zip(first, second[::-1], strict=True))


def test_pickles_are_read_one_behind_the_other():
    data = pickle.dumps([1], 2) + pickle.dumps("two", 4)
    first, end = read_pickle(data, 0, {}, Budget(len(data)))
    assert first == [1]
    assert read_pickle(data, end, {}, Budget(len(data))) == ("two", len(data))


class _Point(Pending):
    __slots__ = ("x",)

    def __init__(self, x):
        super().__init__()
        self.x = x

    def build(self, state):
        return ("point", self.x, state)


def test_constructors_are_called_and_states_put_in_place():
    data = b"\x80\x02cmodule\nPoint\nK\x01\x85Rq\x00K\x02bh\x00\x86."
    names = {"module.Point": Constructor(_Point)}
    first, second = _read(data, names)
    assert first == ("point", 1, 2)
    assert second is first


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cmodule\nname\n.",
        b"\x80\x04\x8c\x06module\x8c\x04name\x93.",
        b"(imodule\nname\n.",
    ],
)
def test_names_that_are_not_admitted_are_forbidden(data):
    with pytest.raises(ForbiddenError, match=r"^module\.name$"):
        _read(data)


def _counted(operation: bytes, form: str, length: int) -> bytes:
    return operation + struct.pack(form, length) + b"abc."


BOMBS = {
    "bytes beyond the end": _counted(pickle.BINBYTES8, "<Q", 2**62),
    "bytes array beyond the end": _counted(pickle.BYTEARRAY8, "<Q", 2**40),
    "text beyond the end": _counted(pickle.BINUNICODE8, "<Q", 2**63 + 5),
    "string of negative length": _counted(pickle.BINSTRING, "<i", -2),
    "integer beyond the end": _counted(pickle.LONG1, "<B", 255),
    "integer of a megabyte": _counted(pickle.LONG4, "<i", 2**20) + bytes(2**20),
    "frame without bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60),
    "far memo index": b"]r\xff\xff\xff\xff",
    "far memo index, fetched": b"]r\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86.",
    "fetched before it is there": b"h\x05.",
    "lists in lists": b"]" * 50_000 + b"a" * 49_999 + b".",
    "marks": b"(" * (MAX_STACK + 1),
    "tuples in tuples": b")" + b"\x85" * 50_000,
    "dicts in a list": b"]" + (b"(" + b"}" * 1000 + b"e") * 50 + b".",
    "one tuple, again and again": b"(" + b"N" * 50 + b"tq\x00]" + b"h\x00a" * 50_000 + b"\x86.",
    "one list in lists": b"]q\x00" + (b"(" + b"h\x00" * 1000 + b"l") * 100 + b".",
    "tuple as a key": b"}))\x86s.",
    "more values than one": b"NN.",
    "value missing": b"\x85.",
    "value below a mark": b"N(a.",
    "list item without a list": b"NNa.",
    "key without a value": b"}(Nu.",
    "call of a value": b"N)R.",
    "state of a value": b"NNb.",
    "unknown operation": b"\xf0.",
    "protocol of the future": b"\x80\x63N.",
    "no end": b"N",
    "nothing": b"",
    "text that is none": b"X\x02\x00\x00\x00\xff\xfe.",
    "integer that is none": b"Ione\n.",
    "string without quotes": b"Sabc\n.",
    "integer without end": b"I" + b"1" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_forged_pickle_is_an_error_and_small(name, monkeypatch):
    # With a small allowance, small files show what large ones would do.
    monkeypatch.setattr(pickles, "ALLOWANCE", ALLOWANCE)
    data = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"."):
            _read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(data) + ALLOWANCE * 4 / 3


def test_keys_that_were_made_to_collide_are_refused():
    keys = [k * (2**61 - 1) for k in range(1, 200_000)]
    with pytest.raises(ValueError, match="a key is too long"):
        _read(pickle.dumps(dict.fromkeys(keys[8:20])))


def test_account_ends_a_pickle_that_unfolds():
    data = pickle.dumps([[k] for k in range(5000)])
    budget = Budget(len(data))
    budget.left = 100_000
    with pytest.raises(ValueError, match="unfolds"):
        read_pickle(data, 0, {}, budget)


@pytest.mark.parametrize("operation", [b"\x80\x02", b"Na", b"h\x00a", b"]a", b"(e", b"K\x01a"])
def test_millions_of_tiny_operations_are_given_up_early(operation):
    filling = b"B" + struct.pack("<I", 5_000_000) + bytes(5_000_000) + b"a"  # gives no licence
    data = b"]]q\x00a" + filling + operation * 2_000_000 + b"."
    with pytest.raises(ValueError, match=r"it has (\d+),000 operations") as caught:
        _read(data)
    done = int(str(caught.value).split()[2].replace(",", ""))
    assert done < 1_000_000


def test_as_many_operations_as_labels_need_are_read():
    labels = {f"2007_{k:06}": [0.0, 1.0] * 10 for k in range(20_000)}
    data = pickle.dumps(labels, 4)
    operations = sum(1 for _ in pickletools.genops(data))
    assert operations > pickles.FREE_OPERATIONS
    assert _read(data) == labels


def test_operations_are_counted(monkeypatch):
    # Without a limit, an operation that leaves nothing behind could be repeated for hours.
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 1000)
    data = b"N" + b"\x80\x02" * 1001 + b"."
    with pytest.raises(ValueError, match="operations"):
        _read(data)
