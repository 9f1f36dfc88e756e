"""Kernels in C++ for the CPU, made by the system's compiler on the machine that runs them."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

NONE = "there is no C++ compiler: install g++ or clang++, or name one in CXX"


def compiler() -> str | None:
    """The path of a C++ compiler, `CXX` first."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(source: Path, flags: Sequence[str], folder: Path) -> Path:
    """Compile a file into a library in a folder, unless it is there; its name tells source, compiler and processor.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(NONE)
    key = hashlib.sha256(f"{_version(command)} {flags} {_processor()}".encode() + source.read_bytes()).hexdigest()
    path = folder / f"{source.stem}-{key[:24]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # a killed compiler leaves nothing under the name
            made = Path(work, path.name)
            line = [command, *flags, str(source), "-o", str(made)]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{command} failed on {source.name}: {done.stderr.strip()[-500:]}")
            with open(made, "rb") as file:  # a crash of the machine leaves no half of it either
                os.fsync(file.fileno())
            os.replace(made, path)
    return path


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]


@functools.cache
def _processor() -> str:
    """What `-march=native` goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return " ".join(sorted({line for line in lines if line.startswith(("flags", "model", "vendor_id"))}))
