"""Safetensors files: their headers, checked, and their tensors, mapped and read one by one."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastsd.errors import InputError
from fastsd.files import one_line

if TYPE_CHECKING:
    import torch

_MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format


class Stored(NamedTuple):
    """Where a tensor is and what its file's header says of it."""

    path: Path
    shape: list[int]
    dtype: str  # as the format names it, such as "BF16"
    begin: int  # its first byte in the file


def read_header(path: Path) -> dict[str, Stored]:
    """The header of a safetensors file, checked against the file's size.

    Format: 8 bytes with the header's length (little-endian), a JSON object of
    `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the data, on which the offsets count.
    """
    again = "download it again"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise InputError(f"{str(path)!r} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
            if size < 8 or length > size - 8:
                # A wild length is no truncation: the file is something else.
                if size < 8 or length <= _MAX_HEADER:
                    least = 8 + (length if size >= 8 else 2)
                    raise InputError(
                        f"{str(path)!r} is truncated: expected at least {least} bytes, found {size}: {again}"
                    )
                raise InputError(
                    f"{str(path)!r} is not a safetensors file: its first 8 bytes promise a header of "
                    f"{length} bytes, and the file has {size}: {again}"
                )
            header = json.loads(file.read(length))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            end = max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
            stored = {
                name: Stored(
                    path,
                    [int(n) for n in value["shape"]],
                    str(value["dtype"]),
                    8 + length + int(value["data_offsets"][0]),
                )
                for name, value in tensors.items()
            }
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error
    except InputError:
        raise
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError, OverflowError):
        raise InputError(f"the header of {str(path)!r} is corrupt: {again}") from None
    if size != 8 + length + end:
        what = "is truncated" if size < 8 + length + end else "has bytes after its data"
        raise InputError(f"{str(path)!r} {what}: expected {8 + length + end} bytes, found {size}: {again}")
    return stored


def read_tensors(places: Mapping[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors one by one, file by file, as views of the mapped files."""
    for path in dict.fromkeys(place.path for place in places.values()):
        tensor = open_file(path)
        for name in (name for name, place in places.items() if place.path == path):
            yield name, tensor(places[name])


# The format's dtypes -> torch's.
_DTYPES = {
    **{"BOOL": "bool", "C64": "complex64", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


def open_file(path: Path) -> Callable[[Stored], torch.Tensor]:
    """Map a safetensors file; the function gives the tensor of a place in it, a view that can be written to."""
    # Views run as fast as copies, though their addresses are no multiples of 64: float32 on one AVX-512 core,
    # best of 8, a linear layer of 77x4096x4096 takes 28 ms on both, a 3x3 convolution 320 to 320 8.3 ms.
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks sizes, holes and overlaps; its torch mapping is not used:
            pass
        with open(path, "rb") as file:
            if sys.platform == "linux":
                # a file larger than the memory can be mapped privately only if no room for copies is reserved.
                flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                content = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
            else:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is corrupt ({one_line(error)}): download it again") from error
    except OSError as error:
        raise InputError(
            f"cannot map {str(path)!r} into memory ({error.strerror}): use a checkpoint in smaller shards"
        ) from error

    def tensor(place: Stored) -> torch.Tensor:
        if place.dtype not in _DTYPES:
            raise InputError(
                f"{str(path)!r} holds {place.dtype} numbers, which are not read here: use {', '.join(_DTYPES)}"
            )
        dtype: torch.dtype = getattr(torch, _DTYPES[place.dtype])
        size = math.prod(place.shape) * dtype.itemsize
        if size == 0:
            return torch.empty(place.shape, dtype=dtype)
        data = torch.frombuffer(content, dtype=torch.uint8, count=size, offset=place.begin)
        return data.view(dtype).view(place.shape)

    return tensor
