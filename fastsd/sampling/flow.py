"""Flow-matching Euler by its formula, in numpy: its table follows the image's size, so a bundle cannot store it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastsd.errors import InputError
from fastsd.sampling.table import StepTable

CLASS = "FlowMatchEulerDiscreteScheduler"

# Options that leave the formula, whatever their value means to the scheduler.
_OTHER = (
    "invert_sigmas",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)


def flow_euler(
    config: Mapping[str, Any],
    num_inference_steps: int | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> StepTable:
    """The table of `diffusers.FlowMatchEulerDiscreteScheduler`, bit for bit `StepTable.from_scheduler`'s.

    A latent is `(1 - sigma) * image + sigma * noise` and the prediction `noise - image`, so a step from one sigma to
    the next adds `(next - sigma) * prediction`. The sigmas are evenly spaced, then shifted towards noise by a constant
    (SD3; https://arxiv.org/abs/2403.03206, section 5.3.2) or by `mu`, which follows the number of image tokens (Flux).

    Args:
        config: the scheduler's; keys of other classes do not count.
        num_inference_steps: as in `set_timesteps`; None where `sigmas` say it.
        sigmas: a schedule of the caller's, before the shift.
        mu: the shift's logarithm, or with `time_shift_type="linear"` the shift, where `use_dynamic_shifting` is set.

    Raises:
        InputError: an option is not the plain formula, or a number is not right.
    """
    trained, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    dynamic, terminal = config.get("use_dynamic_shifting", False), config.get("shift_terminal")
    linear = config.get("time_shift_type") == "linear"
    check_formula(config)
    if dynamic and mu is None:
        raise InputError("with use_dynamic_shifting the shift follows the image's size: pass mu")
    if mu is not None and not (_is_number(mu) and (mu > 0 or not linear) and abs(mu) < 700):  # exp(mu) is finite
        raise InputError(f"mu must be a finite number{' above 0' if linear else ''} below 700, not {mu!r}")

    # Like the scheduler: in float64 from a number of steps, in float32 from sigmas, and float32 in the end.
    if sigmas is not None:
        schedule = _sigmas(sigmas, num_inference_steps)
    else:
        whole = isinstance(num_inference_steps, int | np.integer) and not isinstance(num_inference_steps, bool)
        if not (whole and num_inference_steps is not None and 1 <= num_inference_steps <= trained):
            raise InputError(
                f"num_inference_steps of {CLASS} must be a whole number from 1 to {trained} (num_train_timesteps), "
                f"not {num_inference_steps!r}"
            )
        # The ends of the trained schedule; a constant shift is in them already, and is applied once more.
        ends = np.array([trained, 1], dtype=np.float32) / np.float32(trained)
        if not dynamic:
            ends = shift * ends / (1 + (shift - 1) * ends)
        first, last = ends.tolist()
        schedule = np.linspace(first * trained, last * trained, num_inference_steps) / trained
    with np.errstate(divide="ignore", invalid="ignore"):
        if dynamic:
            assert mu is not None
            factor = mu if linear else math.exp(mu)
            schedule = factor / (factor + (1 / schedule - 1) ** 1.0)
        else:
            schedule = shift * schedule / (1 + (shift - 1) * schedule)
        if terminal:
            rest = 1 - schedule
            schedule = 1 - rest / (rest[-1] / (1 - terminal))
    noise_level = np.append(schedule.astype(np.float32), np.float32(0))
    if not np.isfinite(noise_level).all():
        raise InputError(
            f"{CLASS} divides by zero with these options (shift {shift}, mu {mu}, shift_terminal {terminal}): "
            "another number of steps or shift would do"
        )
    rows = len(schedule)
    sigma = noise_level[:-1].astype(np.float64)
    return StepTable(
        sampler=CLASS,
        timestep=noise_level[:-1] * np.float32(trained),
        input_scale=np.ones(rows),
        state=np.ones((rows, 1)),
        prediction=np.diff(noise_level)[:, None],
        noise=np.zeros((rows, 0)),
        draws=np.zeros(rows),
        signal=1 - sigma,
        noise_level=sigma,
        denoised=np.stack([np.ones(rows), -sigma], axis=1),
        guidance=np.ones(rows),
        initial_scale=1.0,
    )


def check_formula(config: Mapping[str, Any]) -> None:
    """Check that a config of `FlowMatchEulerDiscreteScheduler` is the plain formula.

    Raises:
        InputError: it is not, or a number in it is not right.
    """
    if used := [option for option in _OTHER if config.get(option)]:
        raise InputError(f"{CLASS} with {used[0]}={config[used[0]]!r} goes by no formula: use it without that option")
    trained, kind = config.get("num_train_timesteps", 1000), config.get("time_shift_type", "exponential")
    if not isinstance(trained, int) or isinstance(trained, bool) or trained < 1:
        raise InputError(f"num_train_timesteps must be a whole number of at least 1, not {trained!r}")
    if kind not in ("exponential", "linear"):
        raise InputError(f"time_shift_type must be 'exponential' or 'linear', not {kind!r}")
    if not (_is_number(shift := config.get("shift", 1.0)) and shift > 0):
        raise InputError(f"shift must be a finite number above 0, not {shift!r}")
    if (terminal := config.get("shift_terminal")) is not None and not (_is_number(terminal) and terminal < 1):
        raise InputError(f"shift_terminal must be a number below 1, not {terminal!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _sigmas(sigmas: Sequence[float], steps: int | None) -> Any:
    """The caller's schedule in float32, checked."""
    try:
        schedule = np.array(sigmas).astype(np.float32)
    except (ValueError, TypeError):
        schedule = np.zeros(0, dtype=np.float32)
    if schedule.ndim != 1 or not len(schedule) or not np.isfinite(schedule).all():
        raise InputError("sigmas must be finite numbers, one for each step")
    if steps is not None and len(schedule) != steps:
        raise InputError(f"{len(schedule)} sigmas are not one for each of {steps} steps: give the same number")
    return schedule
