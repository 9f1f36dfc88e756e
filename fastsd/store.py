"""The engine store: built engines under `FASTSD_HOME`, found again by everything that must match.

    <home>/secret                        32 bytes that sign what was made here
    <home>/engines/<key>/entry.json      the fields of the key, sizes and sha256 of the files, signed
    <home>/engines/<key>/files/          what the builder wrote
    <home>/engines/<key>.lock            held by the process that builds
    <home>/engines/<key>.tmp-*           being built, or left by a process that was killed
    <home>/engines/<key>.bad             set aside, because a file was damaged

The key is the sha256 of the fields, and the entry repeats them: a wrong hit is impossible. What is under `<key>` is
complete: it was written elsewhere, synced to the disk and renamed.

Native engines (TensorRT plans, AOTInductor packages, OpenVINO blobs) are programs, so that a folder of them is trusted
only with the signature of this machine.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import fastsd
from fastsd import machine
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import one_line, read_json
from fastsd.integrity import Files, check_files, hash_files

SCHEMA = 1  # of entries and their keys: another one finds none of the older entries
_KEY = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A library that does not look whether its writes succeeded (C++ streams) leaves a truncated file behind on a full
# disk; so a build that ends with fewer bytes free than this counts as failed.
_SPARE = 64 * 1024


def home() -> Path:
    """The folder of all that fastsd keeps: `FASTSD_HOME`, by default `fastsd` in the user's cache. It may not exist.

    Raises:
        InputError: `FASTSD_HOME` is a relative path, a file, or the home of an unknown user.
    """
    text = os.environ.get("FASTSD_HOME", "")
    try:
        path = Path(text).expanduser() if text else _user_cache() / "fastsd"
    except RuntimeError:
        raise InputError(f"FASTSD_HOME is {text!r}, but there is no such home: give an absolute path") from None
    if not path.is_absolute():
        raise InputError(f"FASTSD_HOME is the relative path {text!r}: give an absolute one")
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"FASTSD_HOME is {str(path)!r}, which is not a folder: name a folder, it need not exist")
    return path


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return cache if cache.is_absolute() else Path.home() / ".cache"  # the specification ignores relative ones


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes | memoryview | str, *, mode: int = 0o666) -> None:
    """Write a file that is there whole or, if anything fails, as it was before; text is UTF-8.

    Raises:
        InputError: it cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error, len(content)) from error


def publish(staging: Path, target: Path) -> None:
    """Make the finished folder `staging` the bundle `target`, in the place of an older bundle if there is one.

    Both must be on one disk. On Linux old and new are exchanged in one step, and whoever looks sees one of them; where
    the system cannot do that, `target` is absent for an instant, and whoever is killed just then leaves the old one
    beside it as `<target>.old-*`.

    Raises:
        InputError: `target` is a file or a folder of other things (its manifest.json is of another format, or there is
            none), or cannot be replaced.
    """
    target = Path(os.path.realpath(target))  # a link keeps pointing where it did
    if os.path.lexists(target) and not target.is_dir():
        raise InputError(f"the output {str(target)!r} is a file: name a folder")
    try:
        is_other = _format(target) is None or _format(target) != _format(staging)
        if target.is_dir() and any(target.iterdir()) and is_other:
            raise InputError(
                f"the output {str(target)!r} holds other things than a bundle: name a new or an empty folder"
            )
        _sync_tree(staging)
        if not target.exists():
            os.rename(staging, target)
        elif _exchange(staging, target):
            shutil.rmtree(staging, ignore_errors=True)
        else:
            old = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
            os.rename(target, old)
            try:
                os.rename(staging, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise _cannot_write(target, error) from error


def _format(folder: Path) -> Any:
    try:
        return read_json(folder / "manifest.json").get("format")
    except InputError:
        return None


def _sync_tree(folder: Path) -> None:
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            handle = os.open(os.path.join(where, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(where))


def _sync_folder(folder: Path) -> None:
    # A new name reaches the disk with its folder; some systems can neither open nor sync a folder.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    # Many file systems, old kernels and sandboxes refuse it, each with another code: all of them mean "not so".
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _cannot_write(path: Path, error: OSError, size: int = 0) -> InputError:
    if error.errno in _FULL:
        return _full(path, size)
    what = "they are on two disks" if error.errno == errno.EXDEV else error.strerror or one_line(error)
    return InputError(f"cannot write {str(path)!r} ({what}): choose another place or change its mode")


def _full(path: Path, size: int) -> InputError:
    free = _free(path)
    needed = f"at least {size} bytes are needed" if size else "more bytes are needed"
    if free > size + _SPARE:
        return InputError(
            f"{str(path)!r} cannot grow ({needed}, and {free} are free on the disk): raise the limit that stops it, "
            "a quota, one on the size of files (ulimit -f) or on their number"
        )
    return InputError(
        f"the disk is full at {str(path)!r} ({needed}, {free} are free): make room, for example with "
        "`fastsd engines prune`, or choose another disk (FASTSD_HOME is that of the engine store)"
    )


def _free(path: Path) -> int:
    existing = next(one for one in (path, *path.parents) if one.exists())
    return shutil.disk_usage(existing).free


# ---------------------------------------------------------------------------------------------------------------------
# Trust
# ---------------------------------------------------------------------------------------------------------------------


def sign(data: bytes) -> str:
    """The signature of this machine, under `home()`: HMAC-SHA256 in hexadecimal.

    Raises:
        InputError: there is no secret yet and none can be written, or others may read it.
    """
    path = home() / "secret"
    if not path.exists():
        _make(path.parent)
        with _locked(path.with_name("secret.lock")):
            if not path.exists():  # another process may have been first
                write_atomically(path, secrets.token_bytes(32), mode=0o600)
    return hmac.digest(_secret(path), data, "sha256").hex()


def made_here(data: bytes, signature: str) -> bool:
    """Whether `signature` is what `sign` gives for `data` on this machine."""
    path = home() / "secret"
    if not path.exists():
        return False
    expected = hmac.digest(_secret(path), data, "sha256").hex()
    return hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace"))


def _secret(path: Path) -> bytes:
    remedy = "delete it, and engines are built again"
    try:
        secret, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error
    if os.name == "posix" and mode & 0o077:
        raise InputError(f"others may read {str(path)!r}, which signs the engines of this machine: {remedy}")
    if len(secret) != 32:
        raise InputError(f"{str(path)!r} has {len(secret)} bytes where 32 belong: {remedy}")
    return secret


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """An engine in the store.

    Attributes:
        key: of its fields.
        folder: of its files.
        fields: everything that must match; empty if `problem`.
        files: size and sha256 of each.
        seconds: that its build took.
        created: when, in seconds since 1970.
        used: when it was last asked for.
        problem: why it is not loaded, a sentence; "" as far as its entry.json tells.
    """

    key: str
    folder: Path
    fields: Mapping[str, Any]
    files: Files
    seconds: float
    created: float
    used: float
    problem: str

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(size for size, _ in self.files.values())


def key(fields: Mapping[str, Any]) -> str:
    """The sha256 of the fields' canonical JSON (sorted names, no spaces, tuples as lists), in hexadecimal.

    Raises:
        InputError: a value is no plain JSON.
    """
    return hashlib.sha256(_canonical(_plain(fields)).encode()).hexdigest()


def get(
    fields: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    root: Path | None = None,
    needed: int = 0,
    checksums: bool = True,
) -> Path:
    """The folder of the engine with these fields, built if it is not there.

    However many threads and processes ask, one builds and the others wait for it; if it dies, the next takes over. An
    entry whose files are damaged is set aside and built again.

    Args:
        fields: everything that must match (`fields_for`).
        build: writes the files into the empty folder that it is given.
        root: the store; None: `engines` under `home()`.
        needed: bytes that the build is known to need on the disk.
        checksums: read every byte of a found entry, as must be before native code is loaded; else compare sizes only.

    Raises:
        InputError: the disk is full, or the store cannot be written. What `build` raises is passed on.
    """
    plain = _plain(fields)
    name = key(plain)
    root = _root(root)
    folder = root / name
    if _is_hit(folder, plain, checksums):
        return folder / "files"
    _make(root)
    sign(b"")  # where nothing can be signed, it must not turn out after the build
    with _locked(root / f"{name}.lock"):
        if not _is_hit(folder, plain, checksums):  # by now another process may have built it
            _build(root, name, plain, build, needed)
    return folder / "files"


def entries(root: Path | None = None) -> list[Entry]:
    """All engines in the store, the last used first."""
    root = _root(root)
    names = [name for name in os.listdir(root) if _KEY.fullmatch(name)] if root.is_dir() else []
    found = [entry for name in names if (entry := _read(root / name)) is not None]
    return sorted(found, key=lambda entry: (-entry.used, entry.key))


def verify(entry: Entry) -> str:
    """Why an entry would not be loaded, a sentence; "" if every byte of it is as it was built."""
    if entry.problem:
        return entry.problem
    try:
        check_files(entry.folder, entry.files)
    except InputError as error:
        return str(error)
    return ""


def remove(keys: Collection[str], root: Path | None = None) -> None:
    """Delete engines; each disappears in one step.

    Raises:
        InputError: there is no such key, it is being built, or cannot be deleted.
    """
    root = _root(root)
    for name in keys:
        if not _KEY.fullmatch(name) or not (root / name).is_dir():
            raise InputError(f"there is no engine {name!r} in {str(root)!r}: `fastsd engines list` shows what is there")
    for name in keys:
        if not _remove(root, name):
            raise InputError(f"the engine {name!r} is being built by another process: wait until it has finished")


class Pruned(NamedTuple):
    """What `prune` removed: engines, and the bytes of what killed builds left and of what was set aside as damaged."""

    entries: list[Entry]
    leftover_bytes: int


def prune(
    *,
    max_bytes: int | None = None,
    older_than: float | None = None,
    stale: Callable[[Mapping[str, Any]], bool] | None = None,
    dry_run: bool = False,
    root: Path | None = None,
) -> Pruned:
    """Delete engines that are not worth their place; and always damaged ones, and what killed builds left.

    An engine that is being built again just now stays.

    Args:
        max_bytes: the last used engines stay that fit into so many bytes.
        older_than: engines go that were not used for so many seconds.
        stale: engines go for whose fields it is true, such as `is_stale`.
        dry_run: delete nothing, only tell.
        root: the store; None: `engines` under `home()`.

    Raises:
        InputError: an engine cannot be deleted.
    """
    root = _root(root)
    now, kept_bytes, gone = time.time(), 0, []
    for entry in entries(root):
        too_old = older_than is not None and now - entry.used > older_than
        too_many = max_bytes is not None and kept_bytes + entry.nbytes > max_bytes
        unwanted = entry.problem or too_old or too_many or (stale is not None and stale(entry.fields))
        if unwanted and (dry_run or _remove(root, entry.key)):
            gone.append(entry)
        else:
            kept_bytes += entry.nbytes
    return Pruned(gone, _clear_leftovers(root, dry_run))


def _root(root: Path | None) -> Path:
    return home() / "engines" if root is None else root


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _is_hit(folder: Path, fields: Mapping[str, Any], checksums: bool) -> bool:
    entry = _read(folder)
    if entry is None or entry.problem or entry.fields != fields:
        return False
    try:
        check_files(entry.folder, entry.files, checksums=checksums)
    except InputError:
        return False
    with suppress(OSError):  # a store may be read-only
        os.utime(folder / "entry.json")
    return True


def _read(folder: Path) -> Entry | None:
    """The entry in a folder as its entry.json tells, without a look at its files; None: there is none."""
    path = folder / "entry.json"
    try:
        text, used = path.read_bytes(), path.stat().st_mtime
        document = json.loads(text)
        entry, signature = document["entry"], document["signature"]
        # Of one content there is one text, so that no byte of it can change unseen.
        if _document(entry, signature) != text or not made_here(_canonical(entry).encode(), signature):
            raise ValueError("it is not what was written on this machine")
        if entry["schema"] != SCHEMA or key(entry["fields"]) != folder.name:
            raise ValueError("it belongs to another engine")
        files = {name: (size, digest) for name, (size, digest) in entry["files"].items()}
        return Entry(
            folder.name, folder / "files", entry["fields"], files, entry["seconds"], entry["created"], used, ""
        )
    except InputError:  # of the secret: nothing is wrong with the entry
        raise
    except FileNotFoundError:
        if not folder.exists():
            return None
        reason = "is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"is damaged ({one_line(error)})"
    problem = f"{str(path)!r} {reason}: the engine is built again when it is asked for"
    return Entry(folder.name, folder / "files", {}, {}, 0.0, 0.0, 0.0, problem)


def _document(entry: Mapping[str, Any], signature: str) -> bytes:
    return (json.dumps({"entry": entry, "signature": signature}, indent=1, sort_keys=True) + "\n").encode()


def _build(root: Path, name: str, fields: Mapping[str, Any], build: Callable[[Path], None], needed: int) -> None:
    """Build an entry; the caller holds its lock."""
    folder, temporary = root / name, root / f"{name}.tmp-{secrets.token_hex(8)}"
    files = temporary / "files"
    try:
        try:
            for leftover in root.glob(f"{name}.tmp-*"):
                shutil.rmtree(leftover)
            if os.path.lexists(folder):
                shutil.rmtree(root / f"{name}.bad", ignore_errors=True)
                os.rename(folder, root / f"{name}.bad")
            temporary.mkdir()
            files.mkdir()
        except OSError as error:
            raise _cannot_write(root, error) from error
        if needed > _free(root):
            raise _full(root, needed)
        started = time.monotonic()
        build(files)
        _finish(temporary, folder, fields, time.monotonic() - started)
    except Exception as error:
        is_full, written = _is_full(error, root), nbytes(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if is_full:
            raise _full(root, max(needed, written + 1)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(temporary: Path, folder: Path, fields: Mapping[str, Any], seconds: float) -> None:
    """Describe what was built and give it its name."""
    entry = {
        "schema": SCHEMA,
        "fields": fields,
        "files": hash_files(temporary / "files"),
        "seconds": round(seconds, 3),
        "created": round(time.time(), 3),
    }
    entry = _plain(entry)
    write_atomically(temporary / "entry.json", _document(entry, sign(_canonical(entry).encode())))
    try:
        if _free(folder.parent) < _SPARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _sync_tree(temporary)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _is_full(error: BaseException | None, root: Path) -> bool:
    """Whether the disk is why a build failed; libraries wrap the system's error, or tell only its text."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return _free(root) < _SPARE


def nbytes(folder: Path) -> int:
    """Bytes of all files under a folder, links as such; what cannot be read does not count, and no folder is 0."""
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(where, name)).st_size
    return size


def _remove(root: Path, name: str) -> bool:
    """Delete an entry and its lock; False if another process is building it."""
    with _locked(root / f"{name}.lock", wait=False) as lock:
        if lock is None:
            return False
        gone = root / f"{name}.tmp-{secrets.token_hex(8)}"
        try:
            with suppress(FileNotFoundError):  # somebody else removed it
                os.rename(root / name, gone)
                shutil.rmtree(gone)
            os.unlink(lock.name)
        except OSError as error:
            raise _cannot_write(root / name, error) from error
    return True


def _clear_leftovers(root: Path, dry_run: bool) -> int:
    """Delete what belongs to no entry and is not being built; its bytes."""
    names = {name.partition(".")[0] for name in os.listdir(root) if "." in name} if root.is_dir() else set()
    size = 0
    for name in sorted(filter(_KEY.fullmatch, names)):
        with _locked(root / f"{name}.lock", wait=False) as lock:
            if lock is None:
                continue
            for leftover in [*root.glob(f"{name}.tmp-*"), *root.glob(f"{name}.bad")]:
                size += nbytes(leftover)
                if not dry_run:
                    shutil.rmtree(leftover, ignore_errors=True)
            if not (root / name).exists() and not dry_run:
                os.unlink(lock.name)
    return size


_HELD: set[IO[bytes]] = set()  # the locks of this process


def _after_fork() -> None:
    # A forked child would keep its parent's locks for as long as it lives, even after the parent has died.
    for lock in _HELD:
        lock.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes] | None]:
    """Hold a lock file, which the system lets go of when the process dies, however it does.

    None without `wait`, if another has it.
    """
    lock = _acquire(path, wait)
    while lock is not None and not _is_same(lock, path):  # whoever held it until now deleted it with the entry
        _release(lock)
        lock = _acquire(path, wait)
    try:
        yield lock
    finally:
        if lock is not None:
            _release(lock)


def _acquire(path: Path, wait: bool) -> IO[bytes] | None:
    if sys.platform == "win32":
        raise InputError("the engine store needs the file locks of POSIX, which Windows has not: run a bundle instead")
    import fcntl

    try:
        lock = open(path, "wb")  # noqa: SIM115
    except OSError as error:
        raise _cannot_write(path, error) from error
    _HELD.add(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _release(lock)
        return None
    except BaseException as error:
        _release(lock)
        if isinstance(error, OSError):
            raise InputError(f"{str(path)!r} cannot be locked ({error.strerror}): use another disk") from error
        raise
    return lock


def _release(lock: IO[bytes]) -> None:
    _HELD.discard(lock)
    lock.close()


def _is_same(lock: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# The key
# ---------------------------------------------------------------------------------------------------------------------

# What runs the engines of a target: a distribution under one of these names must be installed.
_ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_LIBRARIES: Mapping[str, tuple[tuple[str, ...], str]] = {  # target -> names, the extra that brings one
    "onnx": (_ONNX_RUNTIMES, "cpu] or fastsd[gpu"),
    "openvino": (("openvino",), "cpu"),
    "tensorrt": (("tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt"), "tensorrt"),
    "tensorrt-rtx": (("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx"), "tensorrt-rtx"),
    "aoti": (("torch",), "torch"),
}
# Option `hardware_compatibility` of TensorRT -> facts of the machine that then need not match.
_COMPATIBLE = {"ampere_plus": {"gpu", "compute_capability"}, "same_compute_capability": {"gpu"}}


def fields_for(
    target: str,
    component: str,
    *,
    precision: str,
    profile: Mapping[str, tuple[int, int, int]],
    graph: str,
    weights: str,
    device: str = "cpu",
    loras: Collection[tuple[str, float]] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that must match for an engine to be the right one.

    | a change of                          | builds anew                                                            |
    |--------------------------------------|------------------------------------------------------------------------|
    | component, precision, profile, graph | always                                                                 |
    | options, exporter (fastsd)           | always                                                                 |
    | weights, LoRAs                       | always, unless the plan is refitted (`weights="refit"`)                |
    | library, all numbers of its version  | always; "aoti" on CUDA: Triton's too                                   |
    | operating system, architecture       | always                                                                 |
    | model and instruction set of the CPU | on the CPU, except "tensorrt-rtx"                                      |
    | GPU, compute capability              | on CUDA, except as the option `hardware_compatibility` of TensorRT says |
    | driver and CUDA, major numbers       | on CUDA                                                                |

    TensorRT for RTX builds ahead of time without a GPU (`device="cpu"`) for the compute capabilities that its options
    name. The bytes of an engine differ from build to build and are no part of it.

    Args:
        target: "onnx", "openvino", "tensorrt", "tensorrt-rtx" or "aoti".
        component: as the bundle calls it.
        precision: of its arithmetic, with the recipe of the quantisation if there is one.
        profile: min, opt and max of each dimension.
        graph: digest of the graph without its weights.
        weights: digest of the weights; or how they come later, such as "refit".
        device: it is built for, "cpu", "cuda" or "cuda:1".
        loras: digest and scale of each that is in the weights, in order.
        options: all others of the builder and of the graph: level, calibration, weight streaming, opset, ...

    Raises:
        InputError: an unknown target or device, or options that are no JSON.
        MissingExtraError: the target's library is not installed.
    """
    if target not in _LIBRARIES:
        raise InputError(f"the target {target!r} is unknown: use {', '.join(map(repr, _LIBRARIES))}")
    options = dict(options or {})
    fields = {
        "target": target,
        "component": component,
        "precision": precision,
        "profile": profile,
        "graph": graph,
        "weights": weights,
        "loras": list(loras),
        "options": options,
        "exporter": fastsd.__version__,
        "versions": _versions(target, device),
        "machine": _facts(target, machine.describe(device), options),
    }
    plain: dict[str, Any] = _plain(fields)
    return plain


def is_stale(fields: Mapping[str, Any]) -> bool:
    """Whether an engine was built by another exporter, for another machine or for other libraries than are here."""
    target, options = fields.get("target", ""), fields.get("options", {})
    if target not in _LIBRARIES:  # no engine, such as a graph: no machine matters, and its libraries are those it names
        recorded = {"fastsd": fields.get("exporter", fastsd.__version__), **fields.get("versions", {})}
        return any(
            version != (fastsd.__version__ if name == "fastsd" else _version(name))
            for name, version in recorded.items()
        )
    device = fields.get("machine", {}).get("device", "cpu")
    try:
        versions = _versions(target, device)
        here = [_facts(target, facts, options) for facts in machine.all_of(device)]
    except (InputError, MissingExtraError):
        return True
    same = (fields.get("exporter"), fields.get("versions")) == (fastsd.__version__, versions)
    return not same or fields.get("machine") not in here


def _versions(target: str, device: str) -> dict[str, str]:
    names, extra = _LIBRARIES[target]
    installed = {name: version for name in names if (version := _version(name))}
    if not installed:
        raise MissingExtraError(f"the target {target!r} needs {names[0]}: pip install 'fastsd[{extra}]'")
    first = next(iter(installed))
    triton = {"triton": _version("triton")} if target == "aoti" and device != "cpu" else {}
    return {first: installed[first], **triton}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _facts(target: str, facts: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those facts of the machine that an engine depends on."""
    free = _COMPATIBLE.get(options.get("hardware_compatibility", ""), set())
    if target == "tensorrt-rtx":
        free = free | {"cpu", "isa"}
    return {name: value for name, value in facts.items() if name not in free}


def _plain(value: Any) -> Any:
    """A copy of what JSON can hold, tuples as lists; `InputError` for all else."""
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(type(name) is str for name in value):
        return {name: _plain(item) for name, item in value.items()}
    raise InputError(
        f"{value!r} ({type(value).__name__}) cannot be part of an engine's key: use what JSON can hold, names as texts"
    )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
