"""`fastsd engines`: what is in the engine store or in a bundle, whether it is whole, and clearing up."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from fastsd import bundle, integrity, store
from fastsd.errors import InputError
from fastsd.files import few

SHOWN = 12  # characters of a key
SHORTEST = 4  # characters that may stand for a key
WIDE = 160  # characters where the output is no terminal, so that no row is broken
DAY = 24 * 60 * 60  # seconds
SUMMARY = ("path", "target", "component", "precision", "profile")  # what is shown of every engine in any case
COLUMNS = ("engine", "target", "component", "precision", "profile", ">size", "last used", "")  # ">": set to the right


class Action(StrEnum):
    """What to do."""

    list = "list"
    show = "show"
    verify = "verify"
    remove = "remove"
    prune = "prune"


class Item(NamedTuple):
    """An engine of the store or of a bundle, as it is shown.

    Attributes:
        name: the key, or the path in the bundle.
        target: "onnx", "openvino", ...
        component: "denoiser", ...
        precision: of its arithmetic.
        profile: min, opt and max by dimension.
        nbytes: of its files.
        used: when it was last asked for, in seconds since 1970; 0 in a bundle.
        problem: why it is not loaded; "" if nothing is known against it.
        check: reads every byte; the problem, or "".
        details: everything that is recorded of it.
    """

    name: str
    target: str
    component: str
    precision: str
    profile: Mapping[str, Sequence[int]]
    nbytes: int
    used: float
    problem: str
    check: Callable[[], str]
    details: Mapping[str, Any]


def engines(
    action: Annotated[Action, typer.Argument(help="What to do.", show_default=False)],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Engines by the first characters of their keys; or the folder of a bundle, then paths in it."
        ),
    ] = None,
    max_gb: Annotated[
        float | None, typer.Option("--max-gb", min=0, help="prune: keep the last used engines, so many GB.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, help="prune: remove what was not used for so many days.")
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="prune: remove what other hardware, drivers or libraries built.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="remove, prune: only tell what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List, show, verify, remove or prune the engines that are kept under FASTSD_HOME, or list those of a bundle.

    `verify` reads every byte and exits with 1 if anything is damaged. `prune` always removes damaged engines and what
    killed builds left.
    """
    names = names or []
    if action is not Action.prune and (max_gb is not None or older_than is not None or stale):
        raise InputError("--max-gb, --older-than and --stale choose what `prune` removes: leave them out here")
    if action is Action.prune:
        if names:
            raise InputError(f"`prune` takes no names, and found {names[0]!r}: use `remove`")
        if not math.isfinite((max_gb or 0) + (older_than or 0)):
            raise InputError("--max-gb and --older-than are no numbers: give GB and days")
        _prune(max_gb, older_than, stale, dry_run, as_json)
        return
    folder = Path(names[0]) if names and _is_path(names[0]) else None
    if action is Action.remove:
        if folder is not None:
            raise InputError(f"{str(folder)!r} is a bundle, not in the store: delete the folder itself")
        if not names:
            raise InputError("nothing is named that should be removed: give keys, or use `prune`")
        _remove(names, dry_run, as_json)
        return
    if dry_run:
        raise InputError(f"--dry-run is for `remove` and `prune`: `{action.value}` changes nothing")
    items = _of_store(names) if folder is None else _of_bundle(folder, names[1:])
    where = str(store.home() / "engines" if folder is None else folder)
    if action is Action.verify:
        _verify(items, where, folder, as_json)
    elif action is Action.show:
        if not names:
            raise InputError("nothing is named that should be shown: give a key, or the folder of a bundle")
        _show(items, where, as_json)
    else:
        _list(items, where, as_json)


def _is_path(name: str) -> bool:
    return bundle.is_bundle(name) or "/" in name or "\\" in name or name.startswith(".")


# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


def _of_store(names: Sequence[str]) -> list[Item]:
    return [_item(entry) for entry in _chosen(names)]


def _chosen(names: Sequence[str]) -> list[store.Entry]:
    """The entries whose keys begin so; all, if nothing is named."""
    entries = store.entries()
    chosen = {}
    for name in names:
        found = [entry for entry in entries if entry.key.startswith(name)]
        if len(name) < SHORTEST:
            raise InputError(f"{name!r} is too short for a key: give at least {SHORTEST} characters of it")
        if not found:
            raise InputError(f"there is no engine {name!r}: there are {few(entry.key[:SHOWN] for entry in entries)}")
        if len(found) > 1:
            raise InputError(
                f"{name!r} is the beginning of {few(entry.key for entry in found)}: give more characters of it"
            )
        chosen[found[0].key] = found[0]
    return list(chosen.values()) if names else entries


def _item(entry: store.Entry) -> Item:
    fields = entry.fields
    details = {
        "key": entry.key,
        "folder": str(entry.folder),
        "created": entry.created,
        "used": entry.used,
        "seconds": entry.seconds,
        "files": {name: list(value) for name, value in entry.files.items()},
        "fields": fields,
    }
    return Item(
        name=entry.key,
        target=fields.get("target", ""),
        component=fields.get("component", ""),
        precision=fields.get("precision", ""),
        profile=fields.get("profile", {}),
        nbytes=entry.nbytes,
        used=entry.used,
        problem=entry.problem,
        check=partial(store.verify, entry),
        details=details,
    )


def _of_bundle(folder: Path, paths: Sequence[str]) -> list[Item]:
    if not bundle.is_bundle(folder):
        raise InputError(f"{str(folder)!r} is no bundle (it has no manifest.json): name the folder that was exported")
    items = [
        Item(
            name=engine.path,
            target=engine.target,
            component=engine.component,
            precision=engine.precision,
            profile=engine.profile,
            nbytes=sum(size for size, _ in engine.files.values()),
            used=0.0,
            problem="",
            check=partial(_problem, folder, engine),
            details={name: value for name, value in asdict(engine).items() if name not in SUMMARY},
        )
        for variant in bundle.read(folder).variants
        for engine in variant.engines
    ]
    for path in paths:
        if path not in [item.name for item in items]:
            raise InputError(f"the bundle has no engine {path!r}: it has {few(item.name for item in items)}")
    return [item for item in items if not paths or item.name in paths]


# ---------------------------------------------------------------------------------------------------------------------
# What is done
# ---------------------------------------------------------------------------------------------------------------------


def _list(items: Sequence[Item], where: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"folder": where, "engines": [_plain(item) for item in items]}))
        return
    if not items:
        print(f"no engines in {where}")
        return
    _table(COLUMNS, map(_row, items))
    print(f"{len(items)} engines, {_bytes(sum(item.nbytes for item in items))} in {where}")


def _row(item: Item) -> list[str]:
    return [
        _name(item),
        item.target,
        item.component,
        item.precision,
        ", ".join(f"{name} {_range(values)}" for name, values in item.profile.items()),
        _bytes(item.nbytes),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used)) if item.used else "",
        "damaged" if item.problem else "",
    ]


def _show(items: Sequence[Item], where: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"folder": where, "engines": [{**_plain(item), **item.details} for item in items]}))
        return
    for item in items:
        rows = [("engine", item.name), ("target", item.target), ("component", item.component)]
        rows += [("precision", item.precision), ("size", _bytes(item.nbytes)), ("problem", item.problem)]
        rows += list(_flat("profile", {name: _range(values) for name, values in item.profile.items()}))
        for name, value in item.details.items():
            rows += [] if name == "key" else list(_flat(name, value))
        _table(["", ""], [[name, value] for name, value in rows if value])
        print()


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """A nested value as rows, such as ("fields machine gpu", "NVIDIA H200")."""
    if isinstance(value, Mapping):
        return [row for key, one in value.items() for row in _flat(f"{name} {key}", one)]
    if name in ("created", "used"):
        return [(name, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)))]
    if isinstance(value, list):
        return [(name, ", ".join(one if isinstance(one, str) else json.dumps(one) for one in value))]
    return [(name, value if isinstance(value, str) else json.dumps(value))]


def _verify(items: Sequence[Item], where: str, folder: Path | None, as_json: bool) -> None:
    checked = [item._replace(problem=item.check()) for item in items]
    problems = [item.problem for item in checked if item.problem]
    if folder is not None and (rest := _rest_problem(folder)):
        problems.append(rest)
    if as_json:
        plain = [_plain(item) for item in checked]
        print(json.dumps({"folder": where, "ok": not problems, "problems": problems, "engines": plain}))
    else:
        _table(
            ["engine", "component", ">size", ""],
            (
                [_name(item), item.component, _bytes(item.nbytes), "damaged" if item.problem else "ok"]
                for item in checked
            ),
        )
        for problem in problems:
            print(problem)
        verdict = f"{len(problems)} damaged" if problems else "all as they were built"
        print(f"{len(checked)} engines in {where}: {verdict}")
    if problems:
        raise typer.Exit(1)


def _problem(folder: Path, engine: bundle.Engine) -> str:
    """What is wrong with an engine of a bundle, a sentence, or nothing."""
    try:
        integrity.check_files(folder, engine.files, besides=None)
        if engine.path.endswith(".onnx"):
            integrity.check_external(folder / engine.path, folder, engine.files)
    except InputError as error:
        return str(error)
    return ""


def _rest_problem(folder: Path) -> str:
    """What is wrong with the files of a bundle that are no engines, and with those that are not listed."""
    manifest = bundle.read(folder)
    engines = [engine for variant in manifest.variants for engine in variant.engines]
    others = {name for engine in engines for name in engine.files} | {bundle.MANIFEST, bundle.SIGNATURE}
    try:
        integrity.check_files(folder, manifest.files, besides=others)
    except InputError as error:
        return str(error)
    return ""


def _remove(names: Sequence[str], dry_run: bool, as_json: bool) -> None:
    gone = _chosen(names)
    if not dry_run:
        store.remove([entry.key for entry in gone])
    _tell_gone(gone, 0, dry_run, as_json)


def _prune(max_gb: float | None, older_than: float | None, stale: bool, dry_run: bool, as_json: bool) -> None:
    pruned = store.prune(
        max_bytes=None if max_gb is None else int(max_gb * 1e9),
        older_than=None if older_than is None else older_than * DAY,
        stale=store.is_stale if stale else None,
        dry_run=dry_run,
    )
    _tell_gone(pruned.entries, pruned.leftover_bytes, dry_run, as_json)


def _tell_gone(gone: Sequence[store.Entry], leftover_bytes: int, dry_run: bool, as_json: bool) -> None:
    if as_json:
        plain = [_plain(_item(entry)) for entry in gone]
        print(json.dumps({"removed": plain, "leftover_bytes": leftover_bytes, "dry_run": dry_run}))
        return
    if gone:
        _table(
            ["engine", "target", "component", "precision", "profile", ">size", "last used", ""],
            map(_row, map(_item, gone)),
        )
    leftovers = f" and {_bytes(leftover_bytes)} of unfinished or damaged builds" if leftover_bytes else ""
    freed = sum(entry.nbytes for entry in gone)
    print(f"{'would remove' if dry_run else 'removed'} {len(gone)} engines, {_bytes(freed)}{leftovers}")


# ---------------------------------------------------------------------------------------------------------------------
# How it is shown
# ---------------------------------------------------------------------------------------------------------------------


def _plain(item: Item) -> dict[str, Any]:
    return {name: value for name, value in item._asdict().items() if name not in ("check", "details")}


def _name(item: Item) -> str:
    return item.name[:SHOWN] if "key" in item.details else item.name


def _range(values: Sequence[int]) -> str:
    least, usual, most = values
    return str(usual) if least == most else f"{least}:{usual}:{most}"


def _bytes(size: int) -> str:
    """Three digits: 4.12 GB, 35.1 MB, 820 kB, 0 kB."""
    scale, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if size >= pair[0]), (1e3, "kB"))
    return f"{size / scale:.3g} {unit}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(headings))
    for heading in headings:
        table.add_column(heading.lstrip(">"), justify="right" if heading.startswith(">") else "left", overflow="fold")
    for row in rows:
        # A manifest may come from anywhere: no control characters for the terminal.
        table.add_row(*(cell if cell.isprintable() else repr(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
