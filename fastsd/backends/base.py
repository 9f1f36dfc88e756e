"""What backends share: arguments are checked before native code sees them, what it compiles is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from fastsd import store
from fastsd.bundle import Engine, TensorSpec
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import few

Native = TypeVar("Native")

# Bytes of an engine up to which what is compiled of it is kept. Reading and checking it takes as long as the weights
# are large, compiling as long as the graph is: of the UNet of SD1.5 (3.3 GB, 3.4 s to compile) neither is faster.
LARGEST = 2**29


def check(engine: Engine, arrays: Mapping[str, Any]) -> dict[str, int]:
    """Refuse what the engine was not built for; reads shapes and dtypes only, so nothing waits for a device.

    Args:
        engine: its inputs and its profile say what it takes.
        arrays: numpy's or torch's, by name.

    Returns:
        The sizes of its named dimensions.

    Raises:
        InputError: a name, a dtype or a shape is another, or a size outside the profile.
    """
    if arrays.keys() != {spec.name for spec in engine.inputs}:
        names = few((spec.name for spec in engine.inputs), 9)
        raise InputError(f"the {engine.component} engine takes {names}, not {few(arrays, 9)}: pass just these")
    sizes: dict[str, int] = {}
    fits = {spec: _bind(spec, arrays[spec.name], sizes) for spec in engine.inputs}
    for spec in sorted(fits, key=lambda spec: fits[spec]):  # first those that did not tell their sizes
        array = arrays[spec.name]
        if not fits[spec] or array.shape != shape(spec, sizes):
            is_array = hasattr(array, "shape") and hasattr(array, "dtype")
            given = f"{_dtype(array)} {list(array.shape)}" if is_array else f"a {type(array).__name__}"
            known = [f"{name} {size}" for name, size in sizes.items() if any(name in str(dim) for dim in spec.shape)]
            dims = f"[{', '.join(map(str, spec.shape))}]{' with ' if known else ''}{', '.join(known)}"
            raise InputError(f"{spec.name} of the {engine.component} engine is {given}: pass {spec.dtype} {dims}")
    for name, size in sizes.items():
        least, _, most = engine.profile.get(name, (size, size, size))
        if not least <= size <= most:
            raise InputError(
                f"the {engine.component} engine was built for {name} {least} to {most}, not {size}: export one for it"
            )
    return sizes


def _bind(spec: TensorSpec, array: Any, sizes: dict[str, int]) -> bool:
    """Whether an array is of a spec's dtype and rank; sizes that are not known yet are read off its shape."""
    if _dtype(array) != spec.dtype or len(array.shape) != len(spec.shape):
        return False
    for dim, size in zip(spec.shape, array.shape, strict=True):
        if isinstance(dim, str):
            factor, _, name = dim.rpartition("*")  # height, 8*height; a sum names what other inputs have
            if name.isidentifier() and (not factor or factor.isdigit()):
                sizes.setdefault(name, size // int(factor or 1))
    return True


def _dtype(array: Any) -> str:
    return str(getattr(array, "dtype", "")).removeprefix("torch.")


def shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input or output for the sizes of the named dimensions."""
    return tuple(dim if isinstance(dim, int) else extent(dim, sizes) for dim in spec.shape)


def extent(dim: str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension: a name, or a sum of products with divisors, such as "tokens+height*width//4"."""
    total = 0
    for term in dim.split("+"):
        factors, _, divisor = term.partition("//")
        total += prod(int(one) if one.isdigit() else sizes[one] for one in factors.split("*")) // int(divisor or 1)
    return total


def cached(
    engine: Engine,
    shared: Mapping[str, Any],
    options: Mapping[str, Any],
    build: Callable[[Path | None], Native],
    read: Callable[[Path], Native],
) -> Native:
    """What a library makes of an engine on this machine, kept in the store at `shared["cache"]`.

    Args:
        engine: its files' digests are part of the key; without them, or above `LARGEST`, nothing is kept.
        shared: of the pipeline; no "cache", or one that cannot be written, and it is built every time.
        options: all else that must match.
        build: makes it, and writes it into the folder if there is one.
        read: makes it of what was written.
    """
    nbytes = sum(size for size, _ in engine.files.values())
    if shared.get("cache") is None or not 0 < nbytes <= LARGEST:
        return build(None)
    made: list[Native] = []
    try:
        fields = store.fields_for(
            engine.target,
            engine.component,
            precision=engine.precision,
            profile=engine.profile,
            graph=engine.files[engine.path][1],
            weights=" ".join(sorted(digest for _, digest in engine.files.values())),
            options=options,
        )
        folder = store.get(fields, lambda folder: made.append(build(folder)), root=shared["cache"])
    except (InputError, MissingExtraError):  # one that was built from source has no version that could be a key
        return made[0] if made else build(None)
    return made[0] if made else read(folder)


def threads() -> int:
    """Physical cores that this process may use: those of its affinity, within its container's quota of CPU time."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    allowed = int(quota) // int(period) if quota.isdigit() else len(cores)
    return max(1, min(len(cores), allowed))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
