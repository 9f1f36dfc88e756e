"""The reader of protobuf messages against protobuf itself."""

import mmap
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import struct_pb2, type_pb2
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsd import protobuf

QUICK = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def theirs(message: bytes) -> list[tuple[int, Any]]:
    """The fields as protobuf reads them, of a message of whose schema it knows nothing."""
    empty = struct_pb2.ListValue()  # knows field 1 alone
    empty.ParseFromString(message)
    width = {1: 8, 5: 4}
    return [
        (one.field_number, one.data.to_bytes(width[one.wire_type], "little") if one.wire_type in width else one.data)
        for one in UnknownFieldSet(empty)
    ]


def number(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + number(value >> 7) if value > 0x7F else bytes([value])


@st.composite
def field(draw: st.DrawFn) -> bytes:
    tag = draw(st.integers(2, 2**29 - 1)) << 3
    match draw(st.integers(0, 3)):
        case 0:
            return number(tag) + number(draw(st.integers(0, 2**64 - 1)))
        case 1:
            return number(tag | 1) + draw(st.binary(min_size=8, max_size=8))
        case 2:
            content = draw(st.binary(max_size=300))
            return number(tag | 2) + number(len(content)) + content
    return number(tag | 5) + draw(st.binary(min_size=4, max_size=4))


@QUICK
@given(message=st.lists(field(), max_size=6).map(b"".join), before=st.binary(max_size=3), after=st.binary(max_size=3))
def test_fields_are_those_that_protobuf_reads(message: bytes, before: bytes, after: bytes) -> None:
    assert list(protobuf.values(message)) == theirs(message)
    begin, end = len(before), len(before) + len(message)
    assert list(protobuf.values(before + message + after, begin, end)) == theirs(message)


def test_a_mapped_file_is_read_in_place(tmp_path: Path) -> None:
    made = type_pb2.Enum(name="name", enumvalue=[type_pb2.EnumValue(name="one", number=300)])
    (tmp_path / "message").write_bytes(made.SerializeToString())
    with open(tmp_path / "message", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        (_, _, *_), (place, value, start, stop) = protobuf.fields(content)
        assert (place, value) == (2, None)
        assert list(protobuf.values(content, start, stop)) == [(1, b"one"), (2, 300)]


BROKEN: dict[str, tuple[bytes, str]] = {
    "no end of a number": (b"\x08" + b"\xff" * 10, "a number has no end"),
    "cut in a number": (b"\x08\xff", "a number has no end"),
    "a tag alone": (b"\x08", "a number has no end"),
    "cut bytes": (b"\x0a\x05abc", "2 bytes are missing"),
    "cut fixed": (b"\x09abc", "5 bytes are missing"),
    "longer than anything": (b"\x0a" + b"\xff" * 9 + b"\x01", "bytes are missing"),
    "a group": (b"\x0b\x0c", "wire type 3"),
    "field 0": (b"\x02\x00", "no field 0"),
    "high bits of a tag": (b"\xba\x80\x80\x80\x10\x00", "there is no field"),
}


@pytest.mark.parametrize(("message", "says"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_message(message: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        list(protobuf.values(message))


def test_nothing_is_a_message() -> None:
    assert list(protobuf.fields(b"")) == []


def test_an_end_inside_the_content_holds() -> None:
    with pytest.raises(ValueError, match="1 bytes are missing"):
        list(protobuf.fields(b"\x0a\x03abc", 0, 4))
