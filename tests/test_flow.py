"""The formula of flow Euler against the `diffusers` scheduler, compiled: bit for bit the same table."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsd.errors import InputError
from fastsd.families import flux, sd3
from fastsd.sampling.flow import CLASS, check_formula, flow_euler
from fastsd.sampling.table import StepTable

DYNAMIC = {"use_dynamic_shifting": True}
SD3, FLUX = {"shift": 3.0}, {"shift": 3.0, **DYNAMIC, "base_shift": 0.5, "max_shift": 1.15}


def both(config: dict[str, Any], steps: int | None, **arguments: Any) -> list[StepTable | None]:
    """The compiled table and the formula's; None where it is refused."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    found: list[StepTable | None] = []
    for make in (
        lambda: StepTable.from_scheduler(scheduler, steps, **arguments),
        lambda: flow_euler(config, steps, **arguments),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy's, where diffusers divides by zero
                found.append(make())
        except InputError as error:
            assert "\n" not in str(error)
            found.append(None)
    return found


def same(table: StepTable, formula: StepTable) -> None:
    for field in fields(StepTable):
        wanted, got = getattr(table, field.name), getattr(formula, field.name)
        assert np.array_equal(wanted, got) and np.shape(wanted) == np.shape(got), field.name
    assert table == formula and formula.to_json() == table.to_json()


CONFIGS = [
    {},
    SD3,
    {"shift": 1.15},
    {"shift": 0.5},
    {"shift": 13.3, "num_train_timesteps": 500},
    {**SD3, "shift_terminal": 0.02},
    {"shift": 1, "shift_terminal": 0.1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_constant_shift(config: dict[str, Any]) -> None:
    for steps in range(1, 51):
        table, formula = both(config, steps)
        if config.get("shift_terminal") and steps == 1:  # stretched from nothing
            assert table is None and formula is None
        else:
            assert table is not None and formula is not None
            same(table, formula)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("own_sigmas", [False, True], ids=["steps", "sigmas"])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 10_000])
def test_a_shift_by_the_images_size(tokens: int, own_sigmas: bool, kind: str) -> None:
    config = {**FLUX, "time_shift_type": kind}
    for steps in (1, 2, 3, 4, 20, 28, 49, 50):
        given = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if own_sigmas else {}
        table, formula = both(config, None if own_sigmas else steps, mu=sd3.shift(config, tokens, 1.15), **given)
        assert table is not None and formula is not None and len(formula) == steps
        same(table, formula)


@pytest.mark.parametrize("config", [SD3, FLUX, {**SD3, "shift_terminal": 0.02}], ids=str)
def test_a_thousand_steps(config: dict[str, Any]) -> None:
    table, formula = both(config, 1000, **({"mu": 1.15} if config.get("use_dynamic_shifting") else {}))
    assert table is not None and formula is not None
    same(table, formula)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(1, 40),
    shift=st.floats(0.01, 100),
    mu=st.floats(0.01, 10),
    trained=st.integers(1, 2000),
    terminal=st.none() | st.floats(-0.5, 0.99),
    kind=st.sampled_from(["exponential", "linear"]),
    dynamic=st.booleans(),
    sigmas=st.none() | st.lists(st.floats(0.001, 1), min_size=1, max_size=12, unique=True),
)
def test_any_numbers(
    steps: int, shift: float, mu: float, trained: int, terminal: Any, kind: str, dynamic: bool, sigmas: Any
) -> None:
    config = {
        "shift": shift,
        "num_train_timesteps": trained,
        "shift_terminal": terminal,
        "time_shift_type": kind,
        "use_dynamic_shifting": dynamic,
    }
    given: dict[str, Any] = {"mu": mu} if dynamic else {}
    if sigmas is not None:
        given["sigmas"] = sorted(sigmas, reverse=True)
    table, formula = both(config, None if sigmas is not None else steps, **given)
    assert (table is None) == (formula is None)
    if table is not None and formula is not None:
        same(table, formula)


@pytest.mark.parametrize(
    ("family", "config", "tokens"),
    [(sd3, SD3, 1024), (sd3, {**SD3, **DYNAMIC}, 4096), (flux, FLUX, 4096), (flux, FLUX, 144)],
    ids=["sd3", "sd3-dynamic", "flux", "flux-small"],
)
def test_it_takes_what_a_familys_schedule_gives(family: Any, config: dict[str, Any], tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    steps, arguments = family.schedule(None, scheduler, 12, tokens)
    same(StepTable.from_scheduler(scheduler, steps, **arguments), flow_euler(scheduler.config, steps, **arguments))


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("karras", {"use_karras_sigmas": True}, {}, "use_karras_sigmas=True goes by no formula"),
    ("exponential", {"use_exponential_sigmas": True}, {}, "no formula"),
    ("beta", {"use_beta_sigmas": True}, {}, "no formula"),
    ("inverted", {"invert_sigmas": True}, {}, "no formula"),
    ("stochastic", {"stochastic_sampling": True}, {}, "no formula"),
    ("shift-type", {"time_shift_type": "cubic"}, {}, "'exponential' or 'linear'"),
    ("shift-zero", {"shift": 0.0}, {}, "shift must be"),
    ("shift-text", {"shift": "3"}, {}, "shift must be"),
    ("shift-nan", {"shift": math.nan}, {}, "shift must be"),
    ("trained", {"num_train_timesteps": 0}, {}, "num_train_timesteps must be"),
    ("terminal", {"shift_terminal": 1.0}, {}, "below 1"),
    ("no-mu", DYNAMIC, {}, "pass mu"),
    ("mu-nan", DYNAMIC, {"mu": math.nan}, "mu must be"),
    ("mu-huge", DYNAMIC, {"mu": 1e6}, "mu must be"),
    ("mu-linear", {**DYNAMIC, "time_shift_type": "linear"}, {"mu": -1.0}, "above 0"),
    ("no-steps", {}, {"num_inference_steps": 0}, "from 1 to 1000"),
    ("many-steps", {}, {"num_inference_steps": 1001}, "from 1 to 1000"),
    ("half-steps", {}, {"num_inference_steps": 2.5}, "whole number"),
    ("bool-steps", {}, {"num_inference_steps": True}, "whole number"),
    ("neither", {}, {"num_inference_steps": None}, "whole number"),
    ("no-sigmas", {}, {"num_inference_steps": None, "sigmas": []}, "finite numbers"),
    ("text-sigmas", {}, {"num_inference_steps": None, "sigmas": ["a"]}, "finite numbers"),
    ("nan-sigmas", {}, {"num_inference_steps": None, "sigmas": [1.0, math.nan]}, "finite numbers"),
    ("other-sigmas", {}, {"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "2 sigmas are not one for each of 3"),
    ("stretched", {"shift_terminal": 0.5}, {"num_inference_steps": 1}, "divides by zero"),
]


@pytest.mark.parametrize(("config", "arguments", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_refused(config: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        flow_euler(config, **{"num_inference_steps": 4, **arguments})
    assert "\n" not in str(error.value)


def test_keys_of_other_classes_do_not_count() -> None:
    config = {**SD3, "_class_name": CLASS, "beta_start": 0.1, "use_flow_sigmas": True, "prediction_type": "epsilon"}
    check_formula(config)
    assert flow_euler(config, 7) == flow_euler(SD3, 7)


def test_torch_is_not_needed() -> None:
    code = "import sys; from fastsd.sampling.flow import flow_euler; flow_euler({}, 50)"
    check = "; assert not {'torch', 'diffusers', 'scipy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True)
