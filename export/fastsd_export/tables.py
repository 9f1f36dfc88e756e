"""The step tables of a bundle: every sampler that fits a checkpoint, compiled for 1 to 50 steps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from fastsd.errors import InputError, MissingExtraError
from fastsd.sampling import flow
from fastsd.sampling.schedulers import SAMPLERS, is_flow, resolve_scheduler
from fastsd.sampling.table import StepTable

MAX_STEPS = 50


class Tables(NamedTuple):
    """What a bundle knows of samplers, by name.

    Attributes:
        tables: by number of steps, the table or the sentence why there is none.
        formulas: those that go by `flow.flow_euler` of the checkpoint's config, and need no table.
        left_out: the sentence why a sampler is in neither.
        sized: those whose tables are of one size of the image alone.
    """

    tables: dict[str, dict[int, StepTable | str]]
    formulas: list[str]
    left_out: dict[str, str]
    sized: set[str]


def fitting(config: Mapping[str, Any]) -> list[str]:
    """The class of a checkpoint's own scheduler, then the short names of all samplers that fit it."""
    return [str(config.get("_class_name")), *(name for name in SAMPLERS if name.startswith("flow_") == is_flow(config))]


def tables(
    config: Mapping[str, Any],
    family: ModuleType,
    samplers: Sequence[str] | None = None,
    max_steps: int = MAX_STEPS,
    *,
    tokens: int | None = None,
) -> Tables:
    """Compile samplers for 1 to `max_steps` steps.

    Args:
        config: the checkpoint's scheduler_config.json.
        family: module of `fastsd.families`.
        samplers: short names or class names, as `resolve_scheduler` takes them; None: all that fit.
        max_steps: the largest step count.
        tokens: of the image, where the bundle has one size; without, a sampler whose table shifts with the size is left
            out. Flow Euler is not: it goes by its formula for every size.

    Raises:
        InputError: `max_steps` is not from 1 to the checkpoint's training steps.
    """
    trained = config.get("num_train_timesteps", 1000)
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or not 1 <= max_steps <= trained:
        raise InputError(f"tables are made for 1 to at most {trained} steps (num_train_timesteps), not {max_steps!r}")
    made = Tables({}, [], {}, set())
    for name in fitting(config) if samplers is None else dict.fromkeys(samplers):
        try:
            scheduler = resolve_scheduler(name, config)
            if config.get("_class_name") == type(scheduler).__name__ == flow.CLASS and _by_formula(scheduler):
                made.formulas.append(name)
                continue
            small, large = (family.schedule(None, scheduler, 2, size)[1].get("mu") for size in (256, 1024))
        except (InputError, MissingExtraError) as error:
            made.left_out[name] = str(error)
            continue
        if small != large and tokens is None:
            made.left_out[name] = (
                f"the steps of {name!r} shift with the image's size: export one size, or use 'flow_euler'"
            )
            continue
        compiled = {steps: _compile(scheduler, family, steps, tokens or 0) for steps in range(1, max_steps + 1)}
        if any(isinstance(table, StepTable) for table in compiled.values()):
            made.tables[name] = compiled
            if small != large:
                made.sized.add(name)
        else:
            made.left_out[name] = str(compiled[max_steps])
    return made


def _compile(scheduler: Any, family: ModuleType, steps: int, tokens: int) -> StepTable | str:
    """The table of a number of steps, or the sentence why there is none."""
    try:
        count, arguments = family.schedule(None, scheduler, steps, tokens)
        return StepTable.from_scheduler(scheduler, count, **arguments)
    except InputError as error:
        return str(error)


def _by_formula(scheduler: Any) -> bool:
    try:
        flow.check_formula(scheduler.config)
    except InputError:
        return False
    return True


def pack(compiled: Mapping[int, StepTable | str]) -> bytes:
    """A sampler's tables as the file that `fastsd.bundle.unpack` reads: gzipped JSON lines, line n for n steps.

    The same tables give the same bytes.
    """
    lines = []
    for steps in range(1, max(compiled) + 1):
        table = compiled[steps]
        document = {"refused": table} if isinstance(table, str) else json.loads(table.to_json())
        lines.append(json.dumps(document, separators=(",", ":")))
    return gzip.compress("\n".join(lines).encode(), 9, mtime=0)
