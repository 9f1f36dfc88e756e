"""Which kernel runs an attention, and with which tiles: a table in `configs.json` that `fastsd_kernels.tune` writes.

Nothing is tuned while images are made. A row holds for one op, chip, head dimension and class of key lengths; where a
row has no `measured` figures, it is the cautious choice that compiles clean, and no claim of speed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fastsd_kernels.launch import known

TABLE = Path(__file__).with_name("configs.json")

# Most keys of each class of lengths.
LENGTHS: dict[str, dict[str, int | None]] = {
    "attention": {"short": 512, "medium": 2048, "long": None},
    "joint_attention": {"short": 512, "medium": 2048, "long": None},
    "cross_attention": {"resident": 128, "looped": None},
}

Route = Literal["kernel", "hopper", "sdpa"]


class Config(NamedTuple):
    """How one attention is computed.

    Attributes:
        route: "kernel" (portable), "hopper" (copy engine and specialised warps) or "sdpa" (torch's best backend).
        block_m: queries of a tile.
        block_n: keys of a tile; 0 where all keys are one tile.
        num_warps: of a program of the portable kernel.
        num_stages: tiles in flight.
        tiles: of queries that one program computes.
    """

    route: Route
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tiles: int = 1


class Row(NamedTuple):
    """One line of the table: its key, its choice, and the measurement behind it, if there is one."""

    op: str
    arch: int
    head_dim: int
    length: str
    config: Config
    measured: dict[str, Any] | None


@cache
def table() -> dict[tuple[str, int, int, str], Row]:
    """All rows by (op, arch, head dimension, length class)."""
    entries = json.loads(TABLE.read_text())
    rows = [
        Row(**{**entry, "config": Config(*(entry["config"][name] for name in Config._fields))}) for entry in entries
    ]
    return {row[:4]: row for row in rows}


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the table, one line a row."""
    entries = [json.dumps({**row._asdict(), "config": row.config._asdict()}) for row in rows]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(entries) + "\n]\n")
    temporary.replace(path)


def length_class(op: str, keys: int) -> str:
    """The class of a number of keys; of one that is a symbol, the class that has room for all of its values."""
    return next(name for name, most in LENGTHS[op].items() if most is None or known(keys <= most))


def arch(device: torch.device) -> int | None:
    """The chip of the table that stands for a CUDA device; None for one without asynchronous copies.

    Chips with little shared memory (8.6, 8.9, 12.x) use Ada's tiles, other newer ones those of Hopper.
    Without a GPU, as when a model is compiled on another machine from fake tensors, it is Hopper.
    """
    major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)
    if major < 8:
        return None
    if (major, minor) in ((8, 0), (8, 7)):
        return 80
    return 89 if major in (8, 12) else 90


def has_float8(device: torch.device) -> bool:
    """Whether a CUDA device multiplies float8 (Ada and later); without a GPU as in `arch`."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 9)


def choose(op: str, chip: int, head_dim: int, keys: int) -> Config | None:
    """The configuration of an attention to `keys` keys; None where the table has no such head dimension."""
    row = table().get((op, chip, head_dim, length_class(op, keys)))
    return row.config if row else None


def by_config(op: str) -> dict[tuple[int, Config], tuple[int, ...]]:
    """The chips on which the portable kernel has rows of an op, by (head dimension, configuration).

    Rows that go to torch count: their tiles are what a comparison runs.
    """
    found: dict[tuple[int, Config], tuple[int, ...]] = {}
    for row in table().values():
        if row.op == op and row.config.route != "hopper":
            key = row.head_dim, row.config._replace(route="kernel")
            found[key] = tuple(sorted({*found.get(key, ()), row.arch}))
    return found
