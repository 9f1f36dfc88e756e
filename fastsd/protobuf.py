"""The wire format of protobuf, as far as the files of models need it: read without `protobuf` or a schema.

Source: https://protobuf.dev/programming-guides/encoding. Groups, which are deprecated, are refused.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any


def fields(
    content: bytes | mmap.mmap, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, int | None, int, int]]:
    """The fields of a message: number and value of integers; number, None, begin and end of all else.

    Args:
        content: holds the message.
        begin: of the message.
        end: likewise; None: that of the content.

    Raises:
        ValueError: it is no message, or cut.
    """
    at, end = begin, len(content) if end is None else end
    while at < end:
        tag, at = _varint(content, at, end)
        number, wire_type = tag >> 3, tag & 7
        if tag >> 32 or number == 0:  # some readers would cut off the high bits, and see another field
            raise ValueError(f"there is no field {number}")
        if wire_type == 0:
            value, at = _varint(content, at, end)
            yield number, value, at, at
            continue
        if wire_type == 2:
            size, at = _varint(content, at, end)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if at + size > end:
            raise ValueError(f"{at + size - end} bytes are missing")
        yield number, None, at, at + size
        at += size


def values(content: bytes | mmap.mmap, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Any]]:
    """Numbers and values of the fields: int for integers, bytes for all else; arguments and errors as of `fields`."""
    for number, value, start, stop in fields(content, begin, end):
        yield number, content[start:stop] if value is None else value


def _varint(content: bytes | mmap.mmap, begin: int, end: int) -> tuple[int, int]:
    """The variable-length integer at `begin`, and where it ends."""
    if begin < end and content[begin] < 0x80:  # nearly always: there are 130,000 in T5's file
        return content[begin], begin + 1
    value = 0
    for at in range(begin, min(begin + 10, end)):
        byte = content[at]
        value |= (byte & 0x7F) << 7 * (at - begin)
        if byte < 0x80:
            return value, at + 1
    raise ValueError("a number has no end")
