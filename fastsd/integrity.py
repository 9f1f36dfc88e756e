"""Whether files are those that a manifest or an entry of the store lists, and name no others.

Graphs of ONNX are data, but name the files that hold their tensors: those must be of the bundle, too.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath

from fastsd import protobuf
from fastsd.errors import InputError
from fastsd.files import one_line

Files = dict[str, tuple[int, str]]  # path relative to a folder, with slashes -> bytes, sha256 in hexadecimal


def hash_files(folder: Path) -> Files:
    """Bytes and sha256 of every file in a folder, by path relative to it; two files are read at a time.

    Raises:
        InputError: a file cannot be read, is a link that leads out of the folder, or no file at all (a device, a pipe).
    """
    found = _walk(folder)
    return {name: (found[name].stat().st_size, digest) for name, digest in _digests(found).items()}


def check_files(
    folder: Path,
    files: Mapping[str, tuple[int, str]],
    *,
    checksums: bool = True,
    besides: Collection[str] | None = (),
) -> None:
    """Check that a folder holds exactly `files`, unchanged.

    Args:
        folder: where they are.
        files: as `hash_files` gives them.
        checksums: read every byte; else compare only the sizes, which is enough for what is not run.
        besides: files that may be there too; None: any.

    Raises:
        InputError: a file is missing, too many, of another size or content, or its name leads out of the folder.
    """
    for name in files:
        _check_name(name, folder)
    found = _walk(folder)
    again = "build it again, or copy the whole folder again"
    for name, (size, _) in files.items():
        if name not in found:
            raise InputError(f"{str(folder / name)!r} is missing: {again}")
        if (actual := found[name].stat().st_size) != size:
            raise InputError(f"{str(folder / name)!r} has {actual} bytes where {size} belong: {again}")
    if besides is not None and (extra := found.keys() - files.keys() - set(besides)):
        raise InputError(f"{str(folder / min(extra))!r} belongs to no engine here: take it out of the folder")
    if checksums:
        for name, digest in _digests({name: found[name] for name in files}).items():
            if digest != files[name][1]:
                raise InputError(f"{str(folder / name)!r} is damaged (its sha256 is not the recorded one): {again}")


def _walk(folder: Path) -> dict[str, Path]:
    """The files under a folder by relative path, none of them outside it."""
    root = Path(os.path.realpath(folder))
    found = {}

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read the folder {error.filename!r} ({error.strerror}): make it readable") from error

    for where, folders, names in os.walk(root, onerror=refuse):
        for name in [*folders, *names]:
            path = Path(where, name)
            is_link = path.is_symlink()
            if is_link and not Path(os.path.realpath(path)).is_relative_to(root):
                raise InputError(f"{str(path)!r} is a link that leads out of its folder: replace it by the file")
            if name in folders and not is_link:
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                raise InputError(f"cannot read {str(path)!r} ({error.strerror}): restore the file") from error
            if not stat.S_ISREG(mode):  # reading a pipe would wait forever
                what = "a link to a folder" if is_link and stat.S_ISDIR(mode) else "no ordinary file"
                raise InputError(f"{str(path)!r} is {what}: take it out of the folder")
            found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def _digests(paths: Mapping[str, Path]) -> dict[str, str]:
    # hashlib releases the lock of the interpreter. Two threads: more gain little on the disks engines are on.
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(paths, pool.map(_sha256, paths.values()), strict=True))


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error


def _check_name(name: str, folder: Path) -> None:
    """Refuse a path that is not plainly inside its folder, on any system."""
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    plain = "/".join(parts) == name != "" and "\\" not in name and "\0" not in name
    if not plain or ".." in parts or windows.drive or windows.root:
        raise InputError(f"the file name {name!r} in {str(folder)!r} is not a plain relative path: get it elsewhere")


# ---------------------------------------------------------------------------------------------------------------------
# ONNX graphs
# ---------------------------------------------------------------------------------------------------------------------

# Message -> number of a field that may hold tensors -> the message it is (onnx/onnx.proto3 of ONNX).
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},  # external_data
}
_MAX_DEPTH = 100  # of messages in messages, the limit of protobuf itself
_MAX_MODEL = 1 << 31  # bytes, likewise
_MAX_FIELDS = 20_000_000  # 20 s; Flux.1, the largest graph here, has under 1,000,000


def external_files(onnx_path: Path) -> set[str]:
    """The files that an ONNX graph names as holding its tensors, as it names them, relative to its folder.

    Read from the file's protobuf messages without `onnx`: from initialisers, sparse ones and attributes, in the graph,
    its subgraphs, functions and training graphs. Tensors that name a file though their data is inside count too.

    Raises:
        InputError: the file cannot be read or is no ONNX model.
    """
    try:
        with open(onnx_path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size >= _MAX_MODEL:
                raise ValueError(f"{size} bytes, and no ONNX model has 2 GiB or more without external data")
            if size == 0:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _locations(content)
    except OSError as error:
        raise InputError(f"cannot read {str(onnx_path)!r} ({error.strerror}): make it readable") from error
    except (ValueError, LookupError) as error:
        raise InputError(
            f"{str(onnx_path)!r} is truncated or no ONNX model ({one_line(error)}): export it again"
        ) from None


def check_external(onnx_path: Path, folder: Path, files: Collection[str]) -> None:
    """Check that an ONNX graph takes its tensors only from files of its bundle.

    Args:
        onnx_path: the graph, in `folder`.
        folder: the bundle.
        files: those that its manifest lists, relative to `folder`.

    Raises:
        InputError: the graph names another file, or is no ONNX model.
    """
    below = onnx_path.parent.relative_to(folder)
    for name in sorted(external_files(onnx_path)):
        _check_name(name, onnx_path)
        if (below / name).as_posix() not in files:
            raise InputError(f"{str(onnx_path)!r} takes tensors from {name!r}, which its bundle does not list: refused")


def _locations(content: mmap.mmap) -> set[str]:
    found: set[str] = set()
    pending, fields = [("model", 0, len(content), 0)], 0
    while pending:
        kind, begin, end, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"its messages are nested more than {_MAX_DEPTH} deep")
        inside, names, is_external = _MESSAGES[kind], [], False
        for number, value, start, stop in protobuf.fields(content, begin, end):
            fields += 1
            if number in inside and value is None:
                if inside[number] == "entry":
                    name = _location(content, start, stop)
                    names += [name] if name is not None else []
                else:
                    pending.append((inside[number], start, stop, depth + 1))
            elif kind == "tensor" and number == 14:  # data_location
                is_external = value == 1
            elif kind == "node" and number == 4 and content[start:stop] == b"EPContext":  # op_type
                raise InputError(
                    "the ONNX graph holds a native engine (a node EPContext): use the graph that it was made of"
                )
        if fields > _MAX_FIELDS:
            raise ValueError(f"it has more than {_MAX_FIELDS} fields")
        if is_external and not names:
            raise ValueError("an external tensor names no file")
        found.update(names)
    return found


def _location(content: mmap.mmap, begin: int, end: int) -> str | None:
    """The file that an entry of external_data names; None if it says something else, such as the offset."""
    texts = ((number, value) for number, value in protobuf.values(content, begin, end) if isinstance(value, bytes))
    entry = dict(texts)
    return entry.get(2, b"").decode() if entry.get(1) == b"location" else None
