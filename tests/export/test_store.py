"""The engine store: one build per key, nothing half-made or damaged is loaded, however it came to be.

Run as a program (`python test_store.py NAME FOLDER`), the file is a process that forks builders, kills them, lets them
race or takes their disk away.
"""

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refusal

from fastsd import integrity, machine, store
from fastsd.errors import InputError, MissingExtraError

FIELDS: dict[str, Any] = {"target": "onnx", "component": "denoiser", "profile": {"batch": [1, 2, 4]}}
CONTENT = {"model.onnx": b"graph" * 40, "weights/0.bin": bytes(range(256)) * 4, "weights/empty": b""}


def build(folder: Path) -> None:
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def never(folder: Path) -> None:
    raise AssertionError("it was built again")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left(root: Path) -> list[str]:
    """What is in the store beside entries and locks, by kind."""
    return sorted(path.name.partition(".")[2].partition("-")[0] for path in root.iterdir() if path.suffix != ".lock")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def root(home: Path) -> Path:
    return home / "engines"


# ---------------------------------------------------------------------------------------------------------------------
# Where it is
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FASTSD_HOME": "/data/engines"}, "/data/engines"),
        ({"FASTSD_HOME": "~/engines", "HOME": "/users/me"}, "/users/me/engines"),
        ({"FASTSD_HOME": "", "XDG_CACHE_HOME": "/cache"}, "/cache/fastsd"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/users/me"}, "/users/me/.cache/fastsd"),
        ({"HOME": "/users/me"}, "/users/me/.cache/fastsd"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_home(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("FASTSD_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert store.home() == Path(expected)
    assert not store.home().exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [("engines", "relative path"), ("~nobody-of-this-name/x", "no such home"), ("{file}", "not a folder")],
)
def test_a_home_that_is_none(value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSD_HOME", value.format(file=tmp_path / "file"))
    assert says in refusal(store.home)


def test_a_store_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path / "file" / "below"))
    assert "cannot write" in refusal(lambda: store.get(FIELDS, build))


# ---------------------------------------------------------------------------------------------------------------------
# The key
# ---------------------------------------------------------------------------------------------------------------------


def test_the_key_is_the_sha256_of_canonical_json() -> None:
    fields = {"b": (1, 2.5, None, True), "a": {"ü": "x"}}
    text = b'{"a":{"\\u00fc":"x"},"b":[1,2.5,null,true]}'
    assert store.key(fields) == hashlib.sha256(text).hexdigest()
    assert store.key({"a": {"ü": "x"}, "b": [1, 2.5, None, True]}) == store.key(fields)
    assert store.key({"a": types.MappingProxyType({"ü": "x"}), "b": (1, 2.5, None, True)}) == store.key(fields)


def test_values_that_python_holds_equal_have_other_keys() -> None:
    values: list[Any] = [1, 1.0, True, "1", [1], {"1": 1}, None, 0, 0.0, False, "", [], {}]
    assert len({store.key({"a": value}) for value in values}) == len(values)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), b"x", {1}, {1: "x"}, Path("x"), errno, signal.SIGKILL],
    ids=lambda value: type(value).__name__,
)
def test_what_json_cannot_hold_is_no_key(value: Any) -> None:
    assert "cannot be part of an engine's key" in refusal(lambda: store.key({"a": [value]}))


GPU = {
    "device": "cuda",
    "os": "Linux",
    "arch": "x86_64",
    "gpu": "NVIDIA H200",
    "compute_capability": "9.0",
    "driver": 580,
    "cuda": 13,
}
CPU = {"device": "cpu", "os": "Linux", "arch": "x86_64", "cpu": "AMD EPYC", "isa": ["avx2", "avx512_bf16"]}
VERSIONS = {
    "onnxruntime": "1.31.1",
    "openvino": "2026.4.1",
    "tensorrt": "11.4.0.106",
    "tensorrt-rtx": "1.7.1.116",
    "torch": "2.13.0",
    "triton": "3.7.0",
}
ASKED: dict[str, Any] = {
    "component": "denoiser",
    "precision": "float16",
    "profile": {"batch": (1, 2, 4), "height": (64, 64, 128)},
    "graph": "0a",
    "weights": "0b",
    "loras": [("0c", 0.5)],
    "options": {"level": 3},
}
CHANGED: dict[str, Any] = {
    "component": "vae_decoder",
    "precision": "bfloat16",
    "profile": {"batch": (1, 2, 8), "height": (64, 64, 128)},
    "graph": "1a",
    "weights": "1b",
    "loras": [("0c", 0.75)],
    "options": {"level": 5},
}
OTHER_GPU = {
    "os": "Windows",
    "arch": "aarch64",
    "gpu": "NVIDIA H100",
    "compute_capability": "8.9",
    "driver": 575,
    "cuda": 12,
}
OTHER_CPU = {"os": "Darwin", "arch": "aarch64", "cpu": "AMD EPYC 2", "isa": ["avx2"]}
TARGETS = ["onnx", "openvino", "tensorrt", "tensorrt-rtx", "aoti"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A machine with one GPU and all libraries, to be changed."""
    now = types.SimpleNamespace(cpu=dict(CPU), cuda=dict(GPU), versions=dict(VERSIONS), exporter="0.1.0")
    monkeypatch.setattr(machine, "describe", lambda device: dict(getattr(now, device)))
    monkeypatch.setattr(machine, "all_of", lambda device: [dict(getattr(now, device))])
    monkeypatch.setattr(store, "_version", lambda name: now.versions.get(name, ""))
    return now


def fields_of(target: str, device: str, **changes: Any) -> dict[str, Any]:
    return store.fields_for(target, **{**ASKED, **changes}, device=device)


LIBRARY = {"onnx": "onnxruntime", "aoti": "torch"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_changes_builds_another_engine(
    target: str, device: str, here: types.SimpleNamespace, root: Path
) -> None:
    original = fields_of(target, device)
    store.get(original, build)
    assert store.get(fields_of(target, device), never)
    others = [fields_of(target, device, **{name: value}) for name, value in CHANGED.items()]
    names = [LIBRARY.get(target, target), *(["triton"] if (target, device) == ("aoti", "cuda") else [])]
    for name in names:
        here.versions[name] += ".1"
        others.append(fields_of(target, device))
        assert store.is_stale(original)
        here.versions = dict(VERSIONS)
    facts = OTHER_GPU if device == "cuda" else {name: OTHER_CPU[name] for name in _facts_of(target)}
    for name, value in facts.items():
        setattr(here, device, {**getattr(here, device), name: value})
        others.append(fields_of(target, device))
        assert store.is_stale(original)
        setattr(here, device, dict(GPU if device == "cuda" else CPU))
    keys = {store.key(fields) for fields in (original, *others)}
    assert len(keys) == 1 + len(CHANGED) + len(names) + len(facts)
    assert not store.is_stale(original)
    assert {store.key(fields_of(other, device)) for other in TARGETS} & keys == {store.key(original)}


def _facts_of(target: str) -> list[str]:
    return ["os", "arch"] if target == "tensorrt-rtx" else list(OTHER_CPU)  # it builds for listed GPUs


def test_another_exporter_builds_another_engine(here: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = fields_of("onnx", "cpu")
    monkeypatch.setattr("fastsd.__version__", "9.0")
    assert store.is_stale(fields)
    assert store.key(fields_of("onnx", "cpu")) != store.key(fields)


@pytest.mark.parametrize(
    ("level", "free"),
    [("ampere_plus", {"gpu", "compute_capability"}), ("same_compute_capability", {"gpu"}), ("none", set())],
)
def test_a_hardware_compatible_plan_serves_other_gpus(level: str, free: set[str], here: types.SimpleNamespace) -> None:
    options = {"hardware_compatibility": level}
    fields = fields_of("tensorrt", "cuda", options=options)
    for name, value in OTHER_GPU.items():
        here.cuda = {**GPU, name: value}
        same = store.key(fields_of("tensorrt", "cuda", options=options)) == store.key(fields)
        assert same == (name in free), name
        assert store.is_stale(fields) == (not same)


def test_a_rtx_engine_built_ahead_serves_every_cpu(here: types.SimpleNamespace) -> None:
    fields = fields_of("tensorrt-rtx", "cpu")
    here.cpu |= {"cpu": "another", "isa": []}
    assert fields_of("tensorrt-rtx", "cpu") == fields


def test_what_is_asked_for_wrongly(here: types.SimpleNamespace) -> None:
    assert "the target 'tflite' is unknown" in refusal(lambda: fields_of("tflite", "cpu"))
    here.versions.clear()
    for target in TARGETS:
        with pytest.raises(MissingExtraError, match=r"pip install 'fastsd\["):
            fields_of(target, "cpu")
        assert store.is_stale({**ASKED, "target": target, "machine": CPU})


def test_on_this_machine() -> None:
    fields = fields_of("onnx", "cpu")
    assert fields["machine"] == machine.describe("cpu")
    assert not store.is_stale(fields)


# ---------------------------------------------------------------------------------------------------------------------
# Hits, misses, damage
# ---------------------------------------------------------------------------------------------------------------------


def test_built_once_and_found_again(root: Path) -> None:
    folder = store.get(FIELDS, build)
    assert folder == root / store.key(FIELDS) / "files"
    assert content(folder) == CONTENT
    assert store.get(dict(reversed(FIELDS.items())), never) == folder
    assert store.get(FIELDS, never, checksums=False) == folder
    [entry] = store.entries()
    assert (entry.key, entry.folder, entry.fields) == (store.key(FIELDS), folder, FIELDS)
    assert entry.nbytes == sum(map(len, CONTENT.values()))
    assert entry.problem == "" and store.verify(entry) == ""
    assert left(root) == [""]
    assert store.get({**FIELDS, "component": "vae_decoder"}, build) != folder


def test_a_store_elsewhere(tmp_path: Path, home: Path) -> None:
    folder = store.get(FIELDS, build, root=tmp_path / "elsewhere")
    assert folder.is_relative_to(tmp_path / "elsewhere")
    assert store.entries() == [] and len(store.entries(tmp_path / "elsewhere")) == 1


def test_what_the_builder_raises_is_passed_on_and_leaves_nothing(root: Path) -> None:
    for error in (RuntimeError("no kernel"), KeyboardInterrupt(), FileNotFoundError(2, "no file", "x")):

        def fail(folder: Path, error: BaseException = error) -> None:
            build(folder)
            raise error

        with pytest.raises(type(error)) as caught:
            store.get(FIELDS, fail)
        assert caught.value is error
        assert left(root) == []
    assert store.get(FIELDS, build)


def flip(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def replace_fields(entry: Path) -> None:
    text = entry.read_text()
    entry.write_text(text.replace('"denoiser"', '"vae_decoder"'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped byte": lambda entry: flip(entry / "files/weights/0.bin", 100),
    "truncated": lambda entry: (entry / "files/model.onnx").write_bytes(CONTENT["model.onnx"][:-1]),
    "longer": lambda entry: (entry / "files/weights/empty").write_bytes(b"x"),
    "missing file": lambda entry: (entry / "files/weights/empty").unlink(),
    "extra file": lambda entry: (entry / "files/more").write_bytes(b""),
    "linked file": lambda entry: (entry / "files/more").symlink_to("/etc/passwd"),
    "no files": lambda entry: shutil.rmtree(entry / "files"),
    "no entry.json": lambda entry: (entry / "entry.json").unlink(),
    "empty entry.json": lambda entry: (entry / "entry.json").write_text(""),
    "list for entry.json": lambda entry: (entry / "entry.json").write_text("[]"),
    "deep entry.json": lambda entry: (entry / "entry.json").write_text("[" * 100_000),
    "other text of the same entry": lambda entry: (entry / "entry.json").write_text(
        (entry / "entry.json").read_text().replace(" ", "  ", 1)
    ),
    "other fields": lambda entry: replace_fields(entry / "entry.json"),
    "a file": lambda entry: (shutil.rmtree(entry), entry.write_text("")),
    "foreign": lambda entry: (entry.parent.parent / "secret").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_set_aside_and_built_again(damage: Callable[[Path], object], root: Path) -> None:
    entry = store.get(FIELDS, build).parent
    for _ in range(2):  # the second time, there is one set aside already
        damage(entry)
        assert all(store.verify(one) for one in store.entries())
        assert content(store.get(FIELDS, build)) == CONTENT
        assert left(root) == ["", "bad"]
        assert [store.verify(one) for one in store.entries()] == [""]
        assert store.get(FIELDS, never)


def test_an_entry_under_the_name_of_another_is_no_hit(root: Path) -> None:
    other = {**FIELDS, "component": "vae_decoder"}
    folder = store.get(FIELDS, build).parent
    shutil.copytree(folder, root / store.key(other))
    built = []
    store.get(other, lambda folder: (built.append(1), build(folder)))  # type: ignore[func-returns-value]
    assert built == [1]


def test_sizes_alone_find_no_flipped_byte_and_all_else(root: Path) -> None:
    folder = store.get(FIELDS, build)
    flip(folder / "model.onnx", 7)
    assert store.get(FIELDS, never, checksums=False) == folder
    (folder / "model.onnx").write_bytes(b"")
    assert content(store.get(FIELDS, build, checksums=False)) == CONTENT


def flip_bits(root: Path, count: int, found: Callable[[], bool]) -> None:
    rng = random.Random(0)
    entry = store.get(FIELDS, build).parent
    files = [path for path in entry.rglob("*") if path.is_file() and path.stat().st_size]
    assert sorted(path.name for path in files) == ["0.bin", "entry.json", "model.onnx"]
    for _ in range(count):
        path = rng.choice(files)
        before = path.read_bytes()
        flip(path, rng.randrange(len(before)), 1 << rng.randrange(8))
        assert found(), path
        path.write_bytes(before)
    assert store.get(FIELDS, never)


def test_1000_flipped_bits_are_found(root: Path) -> None:
    flip_bits(root, 1000, lambda: [bool(store.verify(entry)) for entry in store.entries()] == [True])


def is_built_anew(root: Path) -> bool:
    class Loaded(Exception):
        pass

    def builder(folder: Path) -> None:
        raise Loaded

    with pytest.raises(Loaded):
        store.get(FIELDS, builder)
    (root / f"{store.key(FIELDS)}.bad").rename(root / store.key(FIELDS))
    return True


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.full)])
def test_flipped_bits_are_never_loaded(count: int, root: Path) -> None:
    flip_bits(root, count, lambda: is_built_anew(root))


def test_a_store_that_is_read_only_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.get(FIELDS, build)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "mkdir", "rename", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert store.get(FIELDS, never) == folder
    assert "Read-only file system" in refusal(lambda: store.get({**FIELDS, "more": 1}, build))


# ---------------------------------------------------------------------------------------------------------------------
# Listing, removing, pruning
# ---------------------------------------------------------------------------------------------------------------------


def fill(root: Path, used: dict[int, float]) -> dict[int, str]:
    """Entries of 10 kB each, last used so many seconds ago."""
    for number, seconds in used.items():
        folder = store.get({"number": number}, lambda folder: (folder / "plan").write_bytes(bytes(10_000)) and None)
        then = time.time() - seconds
        os.utime(folder.parent / "entry.json", (then, then))
    return {number: store.key({"number": number}) for number in used}


def numbers(found: list[store.Entry]) -> list[int]:
    return [entry.fields["number"] for entry in found]


def test_entries_come_last_used_first(root: Path) -> None:
    fill(root, {0: 30, 1: 10, 2: 20})
    (root / "notes.txt").write_text("not ours")
    assert numbers(store.entries()) == [1, 2, 0]
    store.get({"number": 0}, never)
    assert numbers(store.entries()) == [0, 1, 2]
    assert store.entries(root / "nothing") == []


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, []),
        ({"max_bytes": 30_000}, []),
        ({"max_bytes": 29_999}, [0]),
        ({"max_bytes": 10_000}, [2, 0]),
        ({"max_bytes": 0}, [1, 2, 0]),
        ({"older_than": 25}, [0]),
        ({"older_than": 15}, [2, 0]),
        ({"older_than": 15, "max_bytes": 9_999}, [1, 2, 0]),
        ({"stale": lambda fields: fields["number"] == 2}, [2]),
        ({"stale": lambda fields: fields["number"] == 1, "max_bytes": 20_000}, [1]),
    ],
    ids=lambda value: " ".join(map(str, value)) or "none",
)
def test_prune(options: dict[str, Any], gone: list[int], root: Path) -> None:
    fill(root, {0: 30, 1: 10, 2: 20})
    assert numbers(store.prune(**options, dry_run=True).entries) == gone
    assert len(store.entries()) == 3
    assert numbers(store.prune(**options).entries) == gone
    assert numbers(store.entries()) == [number for number in (1, 2, 0) if number not in gone]
    assert left(root) == [""] * (3 - len(gone))
    assert len(list(root.glob("*.lock"))) == 3 - len(gone)


def test_prune_takes_what_is_damaged_and_what_was_left(root: Path) -> None:
    keys = fill(root, {0: 30, 1: 10})
    (root / keys[0] / "entry.json").unlink()
    for name in (f"{keys[0]}.bad", f"{keys[1]}.tmp-0123", f"{'0' * 64}.tmp-4567"):
        (root / name).mkdir()
        (root / name / "plan").write_bytes(bytes(500))
    (root / "other").mkdir()
    pruned = store.prune(dry_run=True)
    assert ([one.key for one in pruned.entries], pruned.leftover_bytes) == ([keys[0]], 1500)
    assert store.prune() == pruned
    assert sorted(path.name for path in root.iterdir()) == sorted(["other", keys[1], f"{keys[1]}.lock"])
    assert store.prune(max_bytes=0, root=root / "nothing") == ([], 0)


def test_what_is_being_built_is_left_alone(root: Path) -> None:
    inside, finish = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        build(folder)
        inside.set()
        assert finish.wait(30)

    (root / store.key(FIELDS)).mkdir(parents=True)  # a damaged one, which is being replaced
    thread = threading.Thread(target=store.get, args=(FIELDS, slow))
    thread.start()
    assert inside.wait(30)
    (root / store.key(FIELDS)).mkdir()
    assert store.prune(max_bytes=0) == ([], 0)
    assert "being built by another process" in refusal(lambda: store.remove([store.key(FIELDS)]))
    (root / store.key(FIELDS)).rmdir()
    finish.set()
    thread.join()
    assert content(store.get(FIELDS, never)) == CONTENT


def test_remove(root: Path) -> None:
    keys = fill(root, {0: 0, 1: 0})
    for name in ("0" * 64, "notes", "../home", keys[0][:10]):
        assert "there is no engine" in refusal(lambda name=name: store.remove([keys[0], name]))  # type: ignore[misc]
    assert len(store.entries()) == 2  # nothing is removed if one of them is wrong
    store.remove([keys[0]])
    assert numbers(store.entries()) == [1]
    store.remove([keys[1]])
    assert list(root.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders
# ---------------------------------------------------------------------------------------------------------------------


def test_hash_files_is_what_sha256sum_says(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "large").write_bytes(random.Random(3).randbytes(3_000_001))
    (tmp_path / "linked").symlink_to("weights/0.bin")
    found = integrity.hash_files(tmp_path)
    assert list(found) == sorted([*CONTENT, "large", "linked"])
    listed = subprocess.run(["sha256sum", *found], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert {name: digest for digest, name in map(str.split, listed.splitlines())} == {
        name: digest for name, (_, digest) in found.items()
    }
    assert {name: size for name, (size, _) in found.items()} == {
        name: (tmp_path / name).stat().st_size for name in found
    }
    integrity.check_files(tmp_path, found)
    (tmp_path.parent / "alias").symlink_to(tmp_path)
    assert integrity.hash_files(tmp_path.parent / "alias") == found


def _link_out(folder: Path) -> None:
    (folder.parent / "outside").write_bytes(CONTENT["model.onnx"])
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("../outside")


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda folder: (folder / "model.onnx").unlink(), "model.onnx", "is missing"),
    "extra": (lambda folder: (folder / "weights/1.bin").write_bytes(b""), "weights/1.bin", "belongs to no engine"),
    "shorter": (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "model.onnx", "1 bytes where 200"),
    "flipped": (lambda folder: flip(folder / "weights/0.bin", 5), "weights/0.bin", "is damaged"),
    "linked out": (_link_out, "model.onnx", "leads out"),
    "folder linked out": (lambda folder: (folder / "sub").symlink_to("/tmp"), "sub", "leads out"),
    "folder linked inside": (lambda folder: (folder / "sub").symlink_to("weights"), "sub", "a link to a folder"),
    "broken link": (lambda folder: (folder / "sub").symlink_to("nothing"), "sub", "No such file"),
    "endless link": (lambda folder: (folder / "sub").symlink_to("sub"), "sub", "symbolic links"),
    "pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe", "no ordinary file"),
    "folder for a file": (
        lambda folder: ((folder / "model.onnx").unlink(), (folder / "model.onnx").mkdir()),
        "model.onnx",
        "is missing",
    ),
}


@pytest.mark.parametrize(("change", "name", "says"), WRONG.values(), ids=WRONG)
def test_check_files_names_the_file(change: Callable[[Path], object], name: str, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    build(folder)
    files = integrity.hash_files(folder)
    change(folder)
    message = refusal(lambda: integrity.check_files(folder, files))
    assert repr(str(folder / name)) in message and says in message


def test_check_files_may_let_others_be(tmp_path: Path) -> None:
    build(tmp_path)
    files = integrity.hash_files(tmp_path)
    some = {"model.onnx": files["model.onnx"]}
    integrity.check_files(tmp_path, some, besides=["weights/0.bin", "weights/empty", "absent"])
    integrity.check_files(tmp_path, some, besides=None)
    assert "weights/0.bin" in refusal(lambda: integrity.check_files(tmp_path, some))
    flip(tmp_path / "model.onnx", 0)
    integrity.check_files(tmp_path, files, checksums=False)
    assert "cannot read the folder" in refusal(lambda: integrity.check_files(tmp_path / "nothing", files))


NAMES_OUTSIDE = ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "C:x", "C:/x", "a\0b"]


@pytest.mark.parametrize("name", NAMES_OUTSIDE, ids=repr)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    assert "no plain relative path" in refusal(lambda: integrity.check_files(tmp_path, {name: (0, "")})).replace(
        "not a plain", "no plain"
    )


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    store.write_atomically(path, "ü")
    assert path.read_bytes() == "ü".encode()
    store.write_atomically(path, b"\0\1", mode=0o600)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"\0\1", 0o600)
    for call in ("fsync", "replace", "write"):
        with monkeypatch.context() as patch:
            fail_at(patch, call, 0, errno.ENOSPC)
            assert "at least 4 bytes are needed" in refusal(lambda: store.write_atomically(path, "new!"))
        assert content(tmp_path) == {"manifest.json": b"\0\1"}
    assert "cannot write" in refusal(lambda: store.write_atomically(tmp_path / "none" / "x", ""))
    assert "cannot write" in refusal(lambda: store.write_atomically(tmp_path, ""))


def whole(number: int) -> dict[str, bytes]:
    """The files of a bundle."""
    return {"manifest.json": b'{"format": "fastsd.bundle", "number": %d}' % number, "plan": b"%d" % number}


def bundle(folder: Path, number: int) -> Path:
    folder.mkdir()
    for name, data in whole(number).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a bundle", "a link to a bundle"])
def test_publish(before: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    target = tmp_path / "bundle"
    if before == "an empty folder":
        target.mkdir()
    elif before == "a bundle":
        bundle(target, 0)
    elif before == "a link to a bundle":
        target.symlink_to(bundle(tmp_path / "elsewhere", 0).name)
    store.publish(bundle(tmp_path / "staging", 1), target)
    assert content(target) == whole(1)
    names = {"bundle", "elsewhere"} if before == "a link to a bundle" else {"bundle"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert target.is_symlink() == (before == "a link to a bundle")


def test_publish_syncs_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda one, other: (events.append("rename"), rename(one, other)))
    store.publish(bundle(tmp_path / "staging", 1), tmp_path / "bundle")
    staging = str(tmp_path / "staging")
    assert sorted(events[:3]) == [staging, f"{staging}/manifest.json", f"{staging}/plan"]
    assert events[2:] == [staging, "rename", str(tmp_path)]


def test_publish_leaves_what_is_no_bundle(tmp_path: Path) -> None:
    staging = bundle(tmp_path / "staging", 1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_text("mine")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}')
    assert "is a file" in refusal(lambda: store.publish(staging, tmp_path / "file"))
    assert "holds other things" in refusal(lambda: store.publish(staging, tmp_path / "photos"))
    assert "holds other things" in refusal(lambda: store.publish(staging, tmp_path / "extension"))
    assert "cannot write" in refusal(lambda: store.publish(staging, tmp_path / "none" / "bundle"))
    assert "cannot write" in refusal(lambda: store.publish(tmp_path / "none", tmp_path / "bundle"))
    assert content(staging) and (tmp_path / "photos" / "one.png").exists()


@pytest.mark.parametrize("at", [0, 1])
def test_publish_by_two_renames_puts_the_old_one_back(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    target, staging = bundle(tmp_path / "bundle", 0), bundle(tmp_path / "staging", 1)
    with monkeypatch.context() as patch:
        fail_at(patch, "rename", at, errno.EXDEV)
        assert "they are on two disks" in refusal(lambda: store.publish(staging, target))
    assert content(target) == whole(0)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "staging"}


# ---------------------------------------------------------------------------------------------------------------------
# Trust
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_signed_here_is_known_here_alone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not store.made_here(b"manifest", "0" * 64)
    assert not home.exists()  # asking leaves nothing
    signature = store.sign(b"manifest")
    assert store.made_here(b"manifest", signature) and store.sign(b"manifest") == signature
    assert not store.made_here(b"manifesu", signature)
    for wrong in ("", "x", "ü", signature[:-1], signature.upper(), signature + "0"):
        assert not store.made_here(b"manifest", wrong)
    assert [path.name for path in home.iterdir() if path.suffix != ".lock"] == ["secret"]
    assert stat.S_IMODE((home / "secret").stat().st_mode) == 0o600
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path / "another machine"))
    store.sign(b"")
    assert not store.made_here(b"manifest", signature)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda secret: secret.chmod(0o644), "others may read"),
        (lambda secret: secret.write_bytes(b"short"), "has 5 bytes where 32 belong"),
        (lambda secret: (secret.unlink(), secret.mkdir()), "cannot read"),
    ],
    ids=["readable", "short", "folder"],
)
def test_a_secret_that_is_none(damage: Callable[[Path], object], says: str, root: Path, home: Path) -> None:
    store.get(FIELDS, build)
    damage(home / "secret")
    calls = (
        lambda: store.sign(b""),
        lambda: store.made_here(b"", ""),
        lambda: store.get(FIELDS, never),
        lambda: store.get({**FIELDS, "more": 1}, never),
    )
    for call in calls:
        assert says in refusal(call)
    assert left(root) == [""]  # it is not the entry that is wrong


# ---------------------------------------------------------------------------------------------------------------------
# ONNX graphs
# ---------------------------------------------------------------------------------------------------------------------


def tensors_of(message: Any) -> Iterator[Any]:
    """All TensorProtos in a message of protobuf, by its own description of itself."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for one in value if hasattr(value, "__len__") else [value]:
                yield from tensors_of(one)


def named_by(model: Any) -> set[str]:
    from onnx.external_data_helper import uses_external_data

    tensors = [tensor for tensor in tensors_of(model) if uses_external_data(tensor)]
    # Not onnx's ExternalDataInfo, which wants numbers for the offsets and the lengths of mutated models.
    return {{entry.key: entry.value for entry in tensor.external_data}.get("location", "") for tensor in tensors}


def test_every_message_that_holds_tensors_is_read() -> None:
    """The table of fields against ONNX's own description of its format."""
    import onnx

    kinds = {
        "ModelProto": "model",
        "TrainingInfoProto": "training",
        "GraphProto": "graph",
        "FunctionProto": "function",
        "NodeProto": "node",
        "AttributeProto": "attribute",
        "SparseTensorProto": "sparse",
        "TensorProto": "tensor",
        "StringStringEntryProto": "entry",
    }

    def leads_to_tensors(descriptor: Any, seen: frozenset[str]) -> bool:
        below = [f.message_type for f in descriptor.fields if f.message_type and f.message_type.name not in seen]
        seen |= {descriptor.name}
        return descriptor.name == "TensorProto" or any(leads_to_tensors(one, seen) for one in below)

    table: dict[str, dict[int, str]] = {}
    pending = [onnx.ModelProto.DESCRIPTOR]
    while pending:
        descriptor = pending.pop()
        if kinds[descriptor.name] not in table and descriptor.name != "TensorProto":
            below = {f.number: f.message_type for f in descriptor.fields if f.message_type}
            below = {number: one for number, one in below.items() if leads_to_tensors(one, frozenset())}
            table[kinds[descriptor.name]] = {number: kinds[one.name] for number, one in below.items()}
            pending += below.values()
    assert {**table, "tensor": {onnx.TensorProto.EXTERNAL_DATA_FIELD_NUMBER: "entry"}} == integrity._MESSAGES
    assert onnx.TensorProto.DATA_LOCATION_FIELD_NUMBER == 14 and onnx.TensorProto.EXTERNAL == 1


TEXTS = st.text(min_size=1, max_size=8)


@st.composite
def tensor(draw: st.DrawFn) -> Any:
    import onnx

    made = onnx.TensorProto(name=draw(TEXTS), data_type=1, dims=draw(st.lists(st.integers(0, 2**40), max_size=3)))
    match draw(st.integers(0, 3)):
        case 0:
            made.raw_data = draw(st.binary(max_size=40))
        case 1:
            made.float_data.extend(draw(st.lists(st.floats(width=32), max_size=5)))
        case _:
            made.data_location = onnx.TensorProto.EXTERNAL
            entries = [("location", draw(TEXTS)), ("offset", "4096"), ("length", "12"), ("checksum", draw(TEXTS))]
            for key, value in draw(st.permutations(entries)):
                made.external_data.add(key=key, value=value)
    return made


@st.composite
def graph(draw: st.DrawFn, depth: int = 3) -> Any:
    import onnx

    made = onnx.GraphProto(name=draw(TEXTS), doc_string=draw(st.text(max_size=200)))
    made.initializer.extend(draw(st.lists(tensor(), max_size=2)))
    for one in draw(st.lists(tensor(), max_size=1)):
        made.sparse_initializer.add(values=one, indices=draw(tensor()))
    made.node.extend(draw(st.lists(node(depth), max_size=2)))
    return made


@st.composite
def node(draw: st.DrawFn, depth: int) -> Any:
    import onnx

    made = onnx.NodeProto(op_type=draw(TEXTS), name=draw(TEXTS), input=draw(st.lists(TEXTS, max_size=2)))
    attribute = made.attribute.add(name=draw(TEXTS))
    match draw(st.integers(0, 7 if depth else 4)):
        case 0:
            attribute.t.CopyFrom(draw(tensor()))
        case 1:
            attribute.tensors.extend([draw(tensor()), draw(tensor())])
        case 2:
            attribute.sparse_tensor.values.CopyFrom(draw(tensor()))
        case 3:
            attribute.sparse_tensors.add(indices=draw(tensor()))
        case 4:
            attribute.ints.extend(draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)))
        case 5 | 6:
            attribute.g.CopyFrom(draw(graph(depth - 1)))
        case 7:
            attribute.graphs.extend([draw(graph(depth - 1)), draw(graph(depth - 1))])
    return made


@st.composite
def model(draw: st.DrawFn) -> Any:
    import onnx

    made = onnx.ModelProto(ir_version=10, producer_name=draw(TEXTS), graph=draw(graph()))
    for _ in range(draw(st.integers(0, 1))):
        function = made.functions.add(name=draw(TEXTS))
        function.node.extend(draw(st.lists(node(1), max_size=2)))
        function.attribute_proto.add(name="a", t=draw(tensor()))
    for _ in range(draw(st.integers(0, 1))):
        made.training_info.add(initialization=draw(graph(1)), algorithm=draw(graph(1)))
    return made


QUICK = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=1000)


def as_protobuf_reads(made: Any, path: Path) -> None:
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    path.write_bytes(made.SerializeToString())
    found = integrity.external_files(path)
    assert found == named_by(made)
    assert any(map(uses_external_data, _get_all_tensors(made))) <= bool(found)


def no_mutation_hides_a_file(made: Any, data: st.DataObject, path: Path) -> None:
    import onnx
    from google.protobuf.message import DecodeError

    content = bytearray(made.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "cut", "double"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=6))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 6))]
            case "cut":
                del content[at:]
            case "double":
                content += content[at:]
    path.write_bytes(content)
    try:
        found = integrity.external_files(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    try:
        read = onnx.ModelProto.FromString(bytes(content))
    except DecodeError:
        return
    assert named_by(read) <= found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx") / "model.onnx"


@QUICK
@given(made=model())
def test_external_files_are_those_that_onnx_finds(made: Any, scratch: Path) -> None:
    as_protobuf_reads(made, scratch)


@QUICK
@given(made=model(), data=st.data())
def test_no_mutation_hides_a_file(made: Any, data: st.DataObject, scratch: Path) -> None:
    no_mutation_hides_a_file(made, data, scratch)


@pytest.mark.full
@LONG
@given(made=model())
def test_external_files_are_those_that_onnx_finds_in_1000(made: Any, scratch: Path) -> None:
    as_protobuf_reads(made, scratch)


@pytest.mark.full
@LONG
@given(made=model(), data=st.data())
def test_no_mutation_of_1000_hides_a_file(made: Any, data: st.DataObject, scratch: Path) -> None:
    no_mutation_hides_a_file(made, data, scratch)


def number(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + number(value >> 7) if value > 0x7F else bytes([value])


def nested(*path: int, inside: bytes = b"") -> bytes:
    """Messages in each other, by the numbers of their fields."""
    for field in reversed(path):
        inside = number(field << 3 | 2) + number(len(inside)) + inside
    return inside


LOCATION = nested(13, inside=nested(1, inside=b"location") + nested(2, inside=b"w.bin"))
TENSOR = (7, 5)  # an initialiser of the graph
ENDLESS = nested(7, inside=nested(*[1, 5, 6] * 40, inside=nested(5, inside=LOCATION)))

MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "text": (b"not a model at all", "wire type"),
    "cut": (nested(*TENSOR, inside=LOCATION)[:-1], "1 bytes are missing"),
    "no end of a number": (b"\xff" * 20, "a number has no end"),
    "field 0": (b"\x02\x00", "no field 0"),
    "high bits": (b"\xba\x80\x80\x80\x10\x00", "there is no field"),
    "group": (b"\x0b\x0c", "wire type 3"),
    "external without a file": (nested(*TENSOR, inside=b"\x70\x01"), "names no file"),
    "file name that is no text": (
        nested(*TENSOR, inside=nested(13, inside=nested(1, inside=b"location") + nested(2, inside=b"\xff"))),
        "utf-8",
    ),
    "too deep": (ENDLESS, "more than 100 deep"),
}


@pytest.mark.parametrize(("data", "says"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_onnx_model(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    assert says in refusal(lambda: integrity.external_files(tmp_path / "model.onnx"))


def test_what_is_no_file_at_all(tmp_path: Path) -> None:
    assert "cannot read" in refusal(lambda: integrity.external_files(tmp_path))
    assert "cannot read" in refusal(lambda: integrity.external_files(tmp_path / "nothing"))
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 31)  # a hole: nothing is on the disk
    assert "2 GiB" in refusal(lambda: integrity.external_files(tmp_path / "large"))


def test_a_file_counts_though_the_data_is_inside(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(nested(*TENSOR, inside=LOCATION))
    assert integrity.external_files(tmp_path / "model.onnx") == {"w.bin"}


def test_an_engine_in_a_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(nested(7, 1, 4, inside=b"EPContext"))
    assert "a native engine" in refusal(lambda: integrity.external_files(tmp_path / "model.onnx"))


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("weights.bin", ""),
        ("more/weights.bin", ""),
        ("other.bin", "does not list"),
        ("*/_ORT_MEM_ADDR_/*", "does not list"),
        *((name, "not a plain relative path") for name in NAMES_OUTSIDE if name),
    ],
    ids=repr,
)
def test_external_data_stays_in_the_bundle(location: str, says: str, tmp_path: Path) -> None:
    import onnx

    weights = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=location)
    path = tmp_path / "denoiser" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(onnx.ModelProto(graph=onnx.GraphProto(initializer=[weights])).SerializeToString())
    files = ["denoiser/model.onnx", "denoiser/weights.bin", "denoiser/more/weights.bin", "weights.bin", "x", "a/b"]

    def check() -> None:
        integrity.check_external(path, tmp_path, files)

    assert says in refusal(check) if says else check() is None  # type: ignore[func-returns-value]


# ---------------------------------------------------------------------------------------------------------------------
# Torture
# ---------------------------------------------------------------------------------------------------------------------


def in_a_child(work: Callable[[], object]) -> int:
    """Fork; the child does the work and leaves, with 1 if it failed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def race(folder: Path, rounds: int = 20, processes: int = 8) -> None:
    """All ask at once. In every second round the first builder kills itself, and the next must take over at once."""
    for number in range(rounds):
        built, dies = folder / f"built{number}", number % 2 == 1
        start, begin = os.pipe()

        def builder(where: Path, built: Path = built, dies: bool = dies) -> None:
            with open(built, "ab", buffering=0) as log:
                log.write(b"x")
            build(where)
            if dies and built.stat().st_size == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)

        def ask(number: int = number, start: int = start, begin: int = begin, builder: Any = builder) -> None:
            os.close(begin)
            os.read(start, 1)
            assert content(store.get({"number": number}, builder)) == CONTENT

        children = [in_a_child(ask) for _ in range(processes)]
        os.close(begin)
        codes = sorted(map(exit_code, children))
        os.close(start)
        assert codes == ([-signal.SIGKILL] if dies else [0]) + [0] * (processes - 1), codes
        assert built.stat().st_size == 1 + dies
    assert [store.verify(entry) for entry in store.entries()] == [""] * rounds
    assert left(folder / "home/engines") == [""] * rounds


def after_a_kill(folder: Path, fields: dict[str, Any]) -> None:
    """Whatever is there is whole; the next build succeeds at once and clears up."""
    assert [entry for entry in store.entries() if store.verify(entry)] == []
    assert content(store.get(fields, build)) == CONTENT
    assert set(left(folder / "home/engines")) == {""}


def kill_at_random(folder: Path, kills: int = 50) -> None:
    """SIGKILL at random moments of a build, from before its start to after its end."""
    rng, finished = random.Random(1), 0

    def slow(where: Path) -> None:
        for name, data in CONTENT.items():
            (where / name).parent.mkdir(exist_ok=True)
            with open(where / name, "wb", buffering=0) as file:
                for at in range(0, len(data), 256):
                    file.write(data[at : at + 256])
                    time.sleep(0.001)

    for number in range(kills):
        fields = {"number": number}
        child = in_a_child(lambda fields=fields: store.get(fields, slow))  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        finished += exit_code(child) == 0
        after_a_kill(folder, fields)
    assert finished < kills


SYSTEM_CALLS = ("open", "mkdir", "rename", "replace", "unlink", "fsync", "close", "utime")


def trap(at: int, spring: Callable[[], object]) -> list[str]:
    """Make the at-th call to the file system spring the trap instead; the names of all calls so far."""
    calls: list[str] = []

    def wrapped(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == at + 1:
                spring()
            return original(*arguments, **options)

        return call

    for name in SYSTEM_CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    return calls


def kill_at_every_call(folder: Path) -> None:
    """SIGKILL before each call to the file system, from the making of the secret to the last sync."""
    for at in range(1000):
        shutil.rmtree(folder / "home", ignore_errors=True)

        def work(at: int = at) -> None:
            trap(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            store.get(FIELDS, build)

        code = exit_code(in_a_child(work))
        after_a_kill(folder, FIELDS)
        if code == 0:
            break
    assert at > 30, at


def limited(folder: Path) -> None:
    """The system itself stops a file from growing."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    message = refusal(lambda: store.get(FIELDS, lambda where: (where / "plan").write_bytes(bytes(1_000_000)) and None))
    assert "at least 100001 bytes are needed" in message and "ulimit -f" in message, message
    assert left(folder / "home/engines") == []


def forked(folder: Path) -> None:
    """A process that the builder forked does not keep the lock when the builder is killed."""
    ready, tell = os.pipe()

    def builder(where: Path) -> None:
        in_a_child(lambda: (os.write(tell, b"x"), signal.pause()))
        signal.pause()

    child = in_a_child(lambda: (os.setpgid(0, 0), store.get(FIELDS, builder)))
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    try:
        after_a_kill(folder, FIELDS)
    finally:
        os.killpg(child, signal.SIGKILL)


def signed_by_many(folder: Path) -> None:
    """Processes that sign first, at once, all come to have one secret."""
    for number in range(5):
        shutil.rmtree(folder / "home", ignore_errors=True)
        children = [
            in_a_child(lambda n=n: (folder / f"{number}-{n}").write_text(store.sign(b"data")))  # type: ignore[misc]  # noqa: B023
            for n in range(8)
        ]
        assert [exit_code(child) for child in children] == [0] * 8
        assert len({(folder / f"{number}-{n}").read_text() for n in range(8)}) == 1


def published(folder: Path, looks: int = 4000) -> None:
    """Whoever looks while bundles replace each other, and after a kill, sees a whole one."""
    target = folder / "bundle"

    def replace_for_ever() -> None:
        for number in range(1, 1_000_000):
            store.publish(bundle(folder / f"staging{os.getpid()}-{number}", number), target)

    store.publish(bundle(folder / "staging", 0), target)
    for _ in range(10):
        child = in_a_child(replace_for_ever)
        for _ in range(looks // 10):
            where = os.open(target, os.O_RDONLY)  # what is there at this moment, whatever its name is later
            if sorted(os.listdir(where)) != ["manifest.json", "plan"]:  # by now it is the older one, being deleted
                assert os.fstat(where).st_ino != target.stat().st_ino
            os.close(where)
        os.kill(child, signal.SIGKILL)
        exit_code(child)
        assert content(target) == whole(int((target / "plan").read_bytes()))


def published_at_every_call(folder: Path) -> None:
    """SIGKILL before each call to the file system leaves the old or the new bundle."""
    target = bundle(folder / "bundle", 0)
    for at in range(1000):

        def work(at: int = at) -> None:
            staging = bundle(folder / f"staging{at}", at + 1)
            trap(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            store.publish(staging, target)

        before, code = content(target), exit_code(in_a_child(work))
        assert content(target) in (before, whole(at + 1))
        if code == 0:
            break
    assert at > 5, at


def torture(name: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "name",
    [
        "race",
        "kill_at_random",
        "kill_at_every_call",
        "limited",
        "forked",
        "signed_by_many",
        "published",
        "published_at_every_call",
    ],
)
def test_in_processes_of_their_own(name: str, tmp_path: Path) -> None:
    torture(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", ["race_long", "kill_at_random_long", "published_long"])
def test_for_long_in_processes_of_their_own(name: str, tmp_path: Path) -> None:
    torture(name, tmp_path)


def test_threads_build_once(root: Path) -> None:
    built, found = [], []

    def slow(folder: Path) -> None:
        built.append(1)
        time.sleep(0.05)
        build(folder)

    threads = [threading.Thread(target=lambda: found.append(store.get(FIELDS, slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(set(found)) == 1 and len(found) == 8


@pytest.mark.parametrize("call", ["open", "mkdir", "rename", "replace", "fsync", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_moment(
    call: str, code: int, root: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(folder: Path) -> None:
        (folder / "plan").write_bytes(b"plan")

    messages = []
    for at in range(100):
        shutil.rmtree(home, ignore_errors=True)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, call, at, code)
            try:
                assert content(store.get(FIELDS, flat)) == {"plan": b"plan"}
            except InputError as error:
                messages.append(str(error))
        if len(calls) <= at:
            break
        assert not root.exists() or set(left(root)) <= {""}
        assert [entry for entry in store.entries() if store.verify(entry)] == []
        assert content(store.get(FIELDS, flat)) == {"plan": b"plan"}
    assert messages
    for message in messages:
        assert "\n" not in message
        assert (os.strerror(code) in message) if code == errno.EIO else ("needed" in message and "free" in message)


def fail_at(patch: pytest.MonkeyPatch, call: str, at: int, code: int) -> list[str]:
    """Let the at-th such call of the store fail; all calls so far."""
    calls: list[str] = []

    def count() -> None:
        calls.append(call)
        if len(calls) == at + 1:
            raise OSError(code, os.strerror(code))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if call != "open" or arguments[1] != os.O_RDONLY:
            count()
        return original(*arguments, **options)

    def opened(*arguments: Any) -> Any:
        file = open(*arguments)  # noqa: SIM115
        write = file.write
        return _Writer(file, lambda data: (count(), write(data)))

    if call == "write":
        patch.setattr(store, "open", opened, raising=False)
    else:
        original = getattr(os, call)
        patch.setattr(os, call, wrapped)
    return calls


def test_a_full_disk_is_told_with_the_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(lambda: store.get(FIELDS, never, needed=10**18))
    assert f"at least {10**18} bytes are needed" in message and "the disk is full" in message

    def fails_like_a_library(folder: Path) -> None:
        build(folder)
        raise RuntimeError("basic_ios::clear: No space left on device")

    message = refusal(lambda: store.get(FIELDS, fails_like_a_library))
    assert f"at least {sum(map(len, CONTENT.values())) + 1} bytes are needed" in message
    # A library that looks at no error leaves a truncated file, and nothing free.
    usage = types.SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refusal(lambda: store.get(FIELDS, build))
    assert "the disk is full" in message and "100 are free" in message
    assert left(root) == []


class _Writer:
    """A file whose `write` is another."""

    def __init__(self, file: Any, write: Callable[[bytes], object]) -> None:
        self._file, self.write = file, write

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


if __name__ == "__main__":
    where = Path(sys.argv[2])
    signal.alarm(600)  # what waits for ever fails
    os.environ["FASTSD_HOME"] = str(where / "home")
    long = {
        "race_long": lambda folder: race(folder, rounds=200),
        "kill_at_random_long": lambda folder: kill_at_random(folder, kills=200),
        "published_long": lambda folder: published(folder, looks=100_000),
    }
    ({**globals(), **long})[sys.argv[1]](where)
