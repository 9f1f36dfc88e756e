"""Files and folders: reading them, and naming them in a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastsd.errors import InputError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")  # suffixes


def existing(path: Path) -> Path:
    """`path`, if it is a file; else an `InputError`."""
    if not path.is_file():
        reason = "is a broken link" if path.is_symlink() else "is not a file"
        raise InputError(f"{str(path)!r} {reason}: download it again")
    return path


def list_folder(folder: Path) -> list[str]:
    """Names in a folder, sorted; `InputError` if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder {str(folder)!r} ({error.strerror}): make it readable") from error


def few(names: Iterable[str], limit: int = 5) -> str:
    """The first names for a sentence, and how many more there are."""
    names = list(names)
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{shown}{more}" if names else "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `InputError` if it cannot be read or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not valid JSON ({one_line(error)}): restore the file") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{str(path)!r} holds a JSON {type(value).__name__} where an object is needed: restore the file"
        )
    return value


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())
