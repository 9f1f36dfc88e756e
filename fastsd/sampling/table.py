"""A sampler as a table: any linear `diffusers` scheduler compiled into plain numbers.

The samplers people use are linear recurrences: the next state is a weighted sum of the current and a few
earlier states, the current and a few earlier predictions, and noise. `StepTable.from_scheduler` finds the
weights by running the scheduler's own `step()` once on one-hot vectors: no scheduler code is rewritten, none
runs in the loop.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import InputError

if TYPE_CHECKING:
    import torch

Float64 = NDArray[np.float64]

FORMAT = "fastsd.StepTable"
VERSION = 1

# LMS, PLMS, iPNDM and third-order UniPC need a history of 4, nothing in diffusers 0.42 more than that.
MAX_HISTORY = 4

# A weight below this share of its row's largest is rounding of the float64 trace, six digits under float32's.
NEGLIGIBLE = 1e-13

# What schedulers raise for arguments and options that they cannot serve.
FAILURES = (ValueError, TypeError, LookupError, AssertionError, ArithmeticError, RuntimeError)

# Options with the values that make a step no weighted sum, and the remedy.
NOT_LINEAR: dict[str, tuple[tuple[Any, ...], str]] = {
    "clip_sample": ((True,), "the estimate is clipped; clip_sample=False would do"),
    "thresholding": ((True,), "the estimate is clipped by its quantiles; thresholding=False would do"),
    "skip_prk_steps": ((False,), "it starts with Runge-Kutta steps; skip_prk_steps=True would do"),
    "variance_type": (("learned", "learned_range"), "the model gives the variance; 'fixed_small' would do"),
}


@dataclass(frozen=True, eq=False)
class StepTable:
    """One sampler run as numbers; a row is one model call, and rows of different tables can share a batch.

    With `states[k]`, `predictions[k]` and `noises[k]` those of k rows ago, row i says: the model is called on
    `input_scale[i] * states[0]` at `timestep[i]`, and the next state is
    `state[i] @ states + prediction[i] @ predictions + noise[i] @ noises`. Weights of what was before the
    first row are zero. All arrays are float64 and read-only.

    Attributes:
        sampler: class name of the `diffusers` scheduler.
        timestep: [rows], what the model is told.
        input_scale: [rows], factor of the state in the model's input.
        state: [rows, H], weights of the states, newest first.
        prediction: [rows, H'], weights of the (guided) predictions, newest first.
        noise: [rows, H''], weights of the noises, newest first; H'' is 0 for a sampler without noise.
        draws: [rows], 0 or 1 noises drawn in the row.
        signal, noise_level: [rows], a clean image x0 noised to the row: `signal * x0 + noise_level * noise`.
        denoised: [rows, 2], weights of state and prediction in the estimate of x0.
        guidance: [rows], classifier-free guidance scale; 1 or less is none.
        initial_scale: factor of the standard normal noise that a run without an image starts from.

    Raises:
        InputError: shapes do not fit each other, or a value is not finite.
    """

    sampler: str
    timestep: Float64
    input_scale: Float64
    state: Float64
    prediction: Float64
    noise: Float64
    draws: Float64
    signal: Float64
    noise_level: Float64
    denoised: Float64
    guidance: Float64
    initial_scale: float

    def __post_init__(self) -> None:
        rows = np.size(self.timestep)
        for name in _ARRAYS:
            try:
                array = np.array(getattr(self, name))
            except ValueError:  # rows of different lengths
                array = np.array(None)
            if array.dtype.kind not in "fiu":
                raise InputError(f"table.{name} must be an array of numbers")
            array = array.astype(np.float64)
            two = name in _MATRICES
            if rows == 0 or array.ndim != 1 + two or len(array) != rows:
                raise InputError(
                    f"table.{name} has shape {list(array.shape)}; {'two axes' if two else 'one axis'} "
                    f"with one row per timestep ({rows}, at least 1) would be right"
                )
            if not np.isfinite(array).all():
                raise InputError(f"table.{name} has values that are not finite")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not np.isin(self.draws, (0.0, 1.0)).all():
            raise InputError("table.draws must be 0 or 1 in every row")
        if self.denoised.shape[1] != 2 or 0 in (self.state.shape[1], self.prediction.shape[1]):
            raise InputError("table.denoised needs 2 columns, table.state and table.prediction at least 1")
        if any(np.triu(weights, 1).any() for weights in (self.state, self.prediction, self.noise)):
            raise InputError("table.state, table.prediction and table.noise must not weigh what was before row 0")
        if not isinstance(self.sampler, str) or not self.sampler:
            raise InputError("table.sampler must be the scheduler's class name")
        if not isinstance(self.initial_scale, int | float) or not math.isfinite(self.initial_scale):
            raise InputError("table.initial_scale must be a finite number")

    def __len__(self) -> int:
        """Model calls; more than `num_inference_steps` for second-order samplers."""
        return len(self.timestep)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepTable):
            return NotImplemented
        return self._plain() == other._plain()

    def __hash__(self) -> int:
        return hash((self.sampler, self.timestep.tobytes(), self.state.tobytes(), self.guidance.tobytes()))

    @property
    def guided(self) -> bool:
        """Whether any row needs an unconditional prediction."""
        return bool((self.guidance > 1).any())

    def with_guidance(self, scale: float | Sequence[float]) -> StepTable:
        """The same table with another classifier-free guidance scale, one for all rows or one per row.

        Raises:
            InputError: a scale is negative or not finite, or their number is not that of the rows.
        """
        guidance = np.asarray(scale, dtype=np.float64)
        if not np.isfinite(guidance).all() or (guidance < 0).any():
            raise InputError(f"guidance must be a finite number of at least 0, not {scale}")
        if guidance.ndim == 0:
            guidance = np.full(len(self), guidance)
        return replace(self, guidance=guidance)

    def to_json(self) -> str:
        """JSON text from which `from_json` gives back the same table, bit for bit."""
        return json.dumps({"format": FORMAT, "version": VERSION, **self._plain()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> StepTable:
        """The table that `to_json` wrote.

        Raises:
            InputError: the text is no JSON, no table, one of another version, or a damaged one.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the step table is no valid JSON ({error})") from None
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise InputError(f'the JSON is no step table: it lacks "format": "{FORMAT}"')
        if (version := document.pop("version", None)) != VERSION:
            raise InputError(f"the step table has version {version!r}; this fastsd reads version {VERSION}")
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ document.keys()):
            raise InputError(f"the step table's fields are wrong: missing or unknown {', '.join(wrong)}")
        # A matrix without columns is a list of empty lists, which numpy already reads as [rows, 0].
        return cls(**document)

    def _plain(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int | None = None,
        *,
        begin: int = 0,
        eta: float = 0.0,
        **set_timesteps_arguments: Any,
    ) -> StepTable:
        """Compile a `diffusers` scheduler, which is left as it was.

        Args:
            scheduler: an instance of a `diffusers` scheduler.
            num_inference_steps: as in `set_timesteps`; None when `sigmas` or `timesteps` say it.
            begin: first row of a run that starts later (image to image), as an index into
                `scheduler.timesteps`, which is what `set_begin_index(begin)` means.
            eta: passed to `step()`; 0 is deterministic for DDIM and TCD. Other samplers have no eta.
            set_timesteps_arguments: passed to `set_timesteps` (`sigmas`, `timesteps`, `mu`, ...).

        Raises:
            InputError: the scheduler with these options is no linear recurrence, or refuses its arguments.
        """
        name = type(scheduler).__name__
        _refuse_nonlinear(scheduler)
        _check_steps(scheduler, num_inference_steps, set_timesteps_arguments)
        step_arguments: dict[str, Any] = {}
        if "eta" in inspect.signature(scheduler.step).parameters:
            if not (math.isfinite(eta) and eta >= 0):
                raise InputError(f"eta must be a finite number of at least 0, not {eta}")
            step_arguments["eta"] = float(eta)
        elif eta != 0:
            raise InputError(f"{name} has no eta; only DDIM and TCD take one")
        run = copy.deepcopy(scheduler)
        for key, value in vars(run).items():  # `add_noise` on a GPU leaves the scheduler's buffers there
            if hasattr(value, "cpu"):
                setattr(run, key, value.cpu())
        arguments = {key: value for key, value in set_timesteps_arguments.items() if value is not None}
        if num_inference_steps is not None:
            arguments["num_inference_steps"] = int(num_inference_steps)
        try:
            run.set_timesteps(**arguments)
        except FAILURES as error:
            detail = " ".join(str(error).split()) or f"{type(error).__name__} with {', '.join(arguments)}"
            raise InputError(f"{name}.set_timesteps refuses its arguments: {detail}") from None
        if not isinstance(begin, int | np.integer) or not 0 <= begin < len(run.timesteps):
            raise InputError(f"begin must be a whole number from 0 to {len(run.timesteps) - 1}, not {begin!r}")
        if begin % (order := getattr(run, "order", 1)):
            raise InputError(f"begin must be a multiple of {order}, the model calls of a step of {name}, not {begin}")
        still = copy.deepcopy(run)
        traced = _trace(run, begin, step_arguments)
        signal, noise_level = _levels(still, begin, traced["estimate"])
        return cls(
            sampler=name,
            timestep=_float64(run.timesteps[begin:]),
            signal=signal,
            noise_level=noise_level,
            denoised=_denoised(still, traced.pop("estimate"), signal, noise_level),
            guidance=np.ones(len(signal)),
            initial_scale=float(getattr(still, "init_noise_sigma", 1.0)),
            **traced,
        )


_MATRICES = ("state", "prediction", "noise", "denoised")
_ARRAYS = ("timestep", "input_scale", *_MATRICES, "draws", "signal", "noise_level", "guidance")


def _float64(tensor: torch.Tensor) -> Float64:
    return tensor.detach().cpu().double().numpy()


def _refuse_nonlinear(scheduler: Any) -> None:
    name = type(scheduler).__name__
    parts = ("step", "set_timesteps", "config")
    if isinstance(scheduler, type) or not all(hasattr(scheduler, part) for part in parts):
        raise InputError(f"a table is made from a diffusers scheduler, not from {name}")
    # A config may carry options of the class that the checkpoint was saved with; only the class's own count.
    own = inspect.signature(type(scheduler).__init__).parameters
    for option, (refused, reason) in NOT_LINEAR.items():
        if option in own and (value := scheduler.config.get(option)) in refused:
            raise InputError(f"{name} with {option}={value!r} is no linear recurrence: {reason}")


def _check_steps(scheduler: Any, steps: int | None, arguments: dict[str, Any]) -> None:
    name = type(scheduler).__name__
    known = inspect.signature(scheduler.set_timesteps).parameters
    if unknown := sorted(key for key, value in arguments.items() if value is not None and key not in known):
        raise InputError(f"{name}.set_timesteps takes no {', '.join(unknown)}")
    if steps is None:
        if arguments.get("sigmas") is None and arguments.get("timesteps") is None:
            raise InputError("pass num_inference_steps, sigmas or timesteps")
        return
    limit, reason = scheduler.config.get("num_train_timesteps", 1000), "num_train_timesteps"
    if "original_inference_steps" in known:  # LCM and TCD choose from the steps they were distilled on
        key = "original_inference_steps"
        limit, reason = arguments.get(key) or scheduler.config.get(key) or limit, key
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or not 1 <= steps <= limit:
        wanted = f"a whole number from 1 to {limit} ({reason})"
        raise InputError(f"num_inference_steps of {name} must be {wanted}, not {steps!r}")


def _trace(scheduler: Any, begin: int, step_arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the scheduler's loop once on one-hot vectors and read every row's weights.

    Components 3j, 3j+1 and 3j+2 of a vector stand for the state, the prediction and the noise of row j. Every
    row is given a fresh one-hot state instead of the last row's result, so that most schedulers' weights can
    be read off as they are. A few more components ("lanes") carry a real run with random numbers: they show
    whether the weights, and the assumption that there are weights, reproduce the scheduler.
    """
    import torch

    name = type(scheduler).__name__
    timesteps = scheduler.timesteps[begin:]
    rows, lanes = len(timesteps), 4
    # Ten times unit variance, so that a clamp somewhere cannot pass unseen.
    run = 10 * np.random.default_rng(0).standard_normal((3 * rows, lanes))

    def one_hot(component: int) -> torch.Tensor:
        vector = torch.zeros(1, 3 * rows + lanes, dtype=torch.float64, device="cpu")
        vector[0, component] = 1
        vector[0, 3 * rows :] = torch.from_numpy(run[component])
        return vector

    noises: list[torch.Tensor] = []  # of the current row

    def draw() -> torch.Tensor:
        noises.append(one_hot(3 * i + 2))
        return noises[-1]

    # Where timesteps repeat, the index makes the run start at the first of them.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = _brownian(draw)
    input_scale, estimate, draws = np.ones(rows), np.full((rows, 2), np.nan), np.zeros(rows)
    results: list[Float64] = []
    weights: list[Float64] = []
    with _tracing(draw):
        for i, t in enumerate(timesteps):
            noises.clear()
            state, prediction = one_hot(3 * i), one_hot(3 * i + 1)
            try:
                if hasattr(scheduler, "scale_model_input"):
                    input_scale[i] = scheduler.scale_model_input(state, t)[0, 3 * i]
                output = scheduler.step(prediction, t, state, **step_arguments)
            except FAILURES as error:
                detail = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"{name} itself fails at step {i + 1} of {rows}: {detail}") from None
            if len(noises) > 1:
                raise InputError(f"{name} draws {len(noises)} noises in one step; at most one can be compiled")
            draws[i] = len(noises)
            result = _float64(output.prev_sample)[0]
            if not np.isfinite(result).all():
                raise InputError(
                    f"{name} divides by zero at step {i + 1} of {rows} with these options; "
                    "another number of steps, timestep_spacing or prediction_type would do"
                )
            if getattr(output, "pred_original_sample", None) is not None:
                estimate[i] = _float64(output.pred_original_sample)[0, 3 * i : 3 * i + 2]
            results = [*results[-MAX_HISTORY:], result[: 3 * (i + 1)]]
            weights.append(_solve(results, name))
            history = run[: 3 * (i + 1)][-len(weights[i]) :]
            # A scheduler that computes in float32 whatever it is given leaves rounding of 1e-7, a clip 1e-1.
            off, size = weights[i] @ history - result[3 * rows :], np.abs(weights[i]) @ np.abs(history)
            if (np.abs(off) > 1e-5 * size).any():
                raise InputError(f"{name} with these options is no linear recurrence")
            if i + 1 < rows:
                run[3 * (i + 1)] = result[3 * rows :]
    columns = {kind: _columns(weights, k) for k, kind in enumerate(("state", "prediction", "noise"))}
    return {"input_scale": input_scale, "draws": draws, "estimate": estimate, **columns}


def _solve(results: list[Float64], name: str) -> Float64:
    """The fewest weights that reproduce the latest row, oldest row of the history first: [3 * history].

    UniPC and SA-Solver keep a corrected state that depends on all earlier rows, so their latest result has
    components of every row. But the state given to a row is the result of the row before, that is
    `state[j + 1] - results[j] = 0`: adding a few such zeros cancels the old components.
    """
    latest = results[-1]
    rows = len(latest) // 3
    tolerance = 1e-9 * np.abs(latest).max()
    best: Float64 | None = None
    for zeros in range(min(rows, MAX_HISTORY)):
        longest = min(rows, MAX_HISTORY) if best is None else len(best) // 3 - 1
        for history in range(max(zeros, 1), longest + 1):
            old = 3 * (rows - history)
            row = latest.copy()
            if zeros:
                earlier = np.zeros((zeros, len(latest)))
                for k in range(zeros):
                    earlier[k, : 3 * (rows - 1 - k)] = results[-2 - k]
                share = np.linalg.lstsq(earlier[:, :old].T, latest[:old], rcond=None)[0]
                row -= share @ earlier
                row[3 * (rows - 1 - np.arange(zeros))] += share
            if np.abs(row[:old]).max(initial=0) > tolerance:
                continue
            row[np.abs(row) < NEGLIGIBLE * np.abs(row).max()] = 0
            if best is None or np.count_nonzero(row[old:]) < np.count_nonzero(best):
                best = row[old:]
            break
    if best is None:
        raise InputError(f"{name} with these options depends on more than {MAX_HISTORY} earlier steps")
    return best


def _columns(weights: Iterable[Float64], offset: int) -> Float64:
    """Every third of the rows' weights, newest first, as one matrix as narrow as its last used column."""
    rows = [row[offset::3][::-1] for row in weights]
    matrix = np.zeros((len(rows), max(map(len, rows))))
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    used = np.flatnonzero(np.abs(matrix).any(axis=0))
    return matrix[:, : (used[-1] + 1 if len(used) else 0 if offset == 2 else 1)]


def _tracing(draw: Callable[[], torch.Tensor]) -> AbstractContextManager[Any]:
    """A context, of this thread alone, where random noise is `draw()` and traced vectors stay in float64."""
    import torch
    from torch.overrides import TorchFunctionMode

    lower = (torch.float32, torch.float16, torch.bfloat16)

    class Tracing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.randn or func is torch.randn_like:
                return draw()
            if func is torch.Tensor.to and args[0].ndim == 2 and any(v in lower for v in (*args, *kwargs.values())[1:]):
                return args[0]
            return func(*args, **kwargs)

    return Tracing()


def _brownian(draw: Callable[[], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    """A Brownian path of traced noises in place of `torchsde`'s tree: the same law, one draw a row.

    DPM-Solver++ SDE asks for increments that overlap (to the midpoint, then over the whole step), so that a
    row's noise is a sum of its own draw and the last row's.
    """
    path: dict[float, Any] = {}

    def increment(sigma: Any, sigma_next: Any) -> torch.Tensor:
        start, end = float(sigma), float(sigma_next)
        if start not in path:
            path.clear()
            path[start] = 0.0
        if end not in path:
            last, value = next(reversed(path.items()))
            path[end] = value + math.sqrt(abs(end - last)) * draw()
        return (path[end] - path[start]) / math.sqrt(abs(end - start))  # type: ignore[no-any-return]

    return increment


def _levels(scheduler: Any, begin: int, estimate: Float64) -> tuple[Float64, Float64]:
    """How much of a clean image and of noise each row's state holds, from the scheduler's own `add_noise`."""
    import torch

    timesteps = scheduler.timesteps
    if type(scheduler).__name__ == "IPNDMScheduler":  # the one without an add_noise
        return _float64(scheduler.alphas)[begin:-1], _float64(scheduler.betas)[begin:-1]
    image, noise = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64, device="cpu")
    levels = np.empty((len(timesteps) - begin, 2))
    for i in range(begin, len(timesteps)):
        # The index, where the scheduler keeps one: timesteps can repeat (Heun, rounded Karras sigmas).
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)
            scheduler._step_index = None
        t = timesteps[i : i + 1]
        if hasattr(scheduler, "scale_noise"):
            levels[i - begin] = _float64(scheduler.scale_noise(image, t, noise))[0]
        else:
            levels[i - begin] = _float64(scheduler.add_noise(image, noise, t))[0]
    signal, noise_level = levels[:, 0], levels[:, 1]
    if hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "mid_point_sigma"):
        # `add_noise` of KDPM2 and DPM-Solver++ SDE knows whole steps only, their estimate the midpoints too.
        # Its weights are (1, -sigma) for epsilon, (1 / (sigma**2 + 1), -sigma / (sigma**2 + 1)**0.5) for v.
        noise_level = -estimate[:, 1] / np.sqrt(estimate[:, 0])
    return signal, noise_level


def _denoised(scheduler: Any, estimate: Float64, signal: Float64, noise_level: Float64) -> Float64:
    """Weights of state and prediction in the scheduler's estimate of the clean image, else by definition."""
    kind = scheduler.config.get("prediction_type")
    if type(scheduler).__name__ == "IPNDMScheduler":
        kind = "v_prediction"
    elif hasattr(scheduler, "scale_noise"):
        kind = "flow_prediction"
    norm = np.hypot(signal, noise_level)
    with np.errstate(divide="ignore", invalid="ignore"):
        defined = {
            "epsilon": np.stack([1 / signal, -noise_level / signal], axis=1),
            "sample": np.stack([0 * signal, 1 + 0 * signal], axis=1),
            "v_prediction": np.stack([signal / norm**2, -noise_level / norm], axis=1),
            "flow_prediction": np.stack([1 + 0 * signal, -noise_level], axis=1),
        }.get(kind or "epsilon", np.full_like(estimate, np.nan))
    if hasattr(scheduler, "precondition_outputs"):  # the EDM family scales the model's output by sigma
        import torch

        state, prediction = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64, device="cpu")
        defined = np.concatenate(
            [_float64(scheduler.precondition_outputs(state, prediction, sigma)) for sigma in torch.tensor(noise_level)]
        )
    weights = np.where(np.isfinite(estimate).all(axis=1, keepdims=True), estimate, defined)
    if not np.isfinite(weights).all():
        raise InputError(
            f"{type(scheduler).__name__} with prediction_type={kind!r} gives no estimate of the image at a "
            "step of pure noise; prediction_type='v_prediction' would do"
        )
    return weights
