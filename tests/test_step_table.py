"""Step tables against their oracle, the `diffusers` scheduler's own loop: same predictions, same noise."""

from __future__ import annotations

import copy
import inspect
import json
import math
import threading
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from fastsd.errors import InputError
from fastsd.sampling.loop import denoise, initial_latents
from fastsd.sampling.table import StepTable

# Of diffusers, about itself and about numpy 2.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("FutureWarning", "DeprecationWarning")]

SHAPE = (1, 4, 3, 5)
STEPS = (1, 2, 3, 4, 10, 20, 50)

# Float32 rounding of a run (1e-7 a step, some cancellation) against a wrong weight, which shows at 1e-2.
TOLERANCE = 1e-5

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_BETAS = ("FlowMatch", "IPNDM", "EDM")

KARRAS, EXPONENTIAL, BETA = ({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **TRAILING, **V}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SIGMAS, SPACINGS = (KARRAS, EXPONENTIAL, BETA), (LEADING, TRAILING, LINSPACE)

Options = dict[str, Any]
CASES: dict[str, tuple[Options, ...]] = {
    "DDIMScheduler": (
        {},
        *({"clip_sample": False, **o} for o in (*SPACINGS, V, SAMPLE, ZERO_SNR, {"set_alpha_to_one": False})),
    ),
    "DDPMScheduler": (
        {},
        *SPACINGS,
        V,
        SAMPLE,
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        ZERO_SNR,
    ),
    "PNDMScheduler": ({}, *SPACINGS, V, {**V, **LEADING}, {"set_alpha_to_one": True}),
    "LMSDiscreteScheduler": ({}, KARRAS, BETA, LEADING, TRAILING, V, SAMPLE),
    "HeunDiscreteScheduler": ({}, *SIGMAS, *SPACINGS, V, SAMPLE),
    "EulerDiscreteScheduler": (
        {},
        *SIGMAS,
        *SPACINGS,
        V,
        SAMPLE,
        SIGMA_MIN,
        ZERO_SNR,
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, **V, **KARRAS},
    ),
    "EulerAncestralDiscreteScheduler": ({}, *SPACINGS, V, ZERO_SNR),
    "DPMSolverMultistepScheduler": (
        {},
        *SIGMAS,
        {"use_lu_lambdas": True},
        *SPACINGS,
        V,
        SAMPLE,
        SIGMA_MIN,
        ZERO_SNR,
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, **KARRAS, **V},
        {"solver_type": "heun"},
        {"euler_at_final": True},
        {"lower_order_final": False, **SIGMA_MIN},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", **KARRAS},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, **V},
        {"algorithm_type": "dpmsolver", **SIGMA_MIN},
        {"algorithm_type": "dpmsolver", "solver_order": 3, **SIGMA_MIN, **SAMPLE},
        {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN},
        FLOW,
        {**FLOW, "solver_order": 3},
    ),
    "DPMSolverSinglestepScheduler": (
        {},
        *SIGMAS,
        V,
        SAMPLE,
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"},
        FLOW,
    ),
    "DPMSolverSDEScheduler": ({}, *SIGMAS, *SPACINGS, V),
    "KDPM2DiscreteScheduler": ({}, *SIGMAS, *SPACINGS, V),
    "KDPM2AncestralDiscreteScheduler": ({}, *SIGMAS, *SPACINGS, V),
    "DEISMultistepScheduler": (
        {},
        *SIGMAS,
        *SPACINGS,
        V,
        SAMPLE,
        {"solver_order": 1},
        {"solver_order": 3},
        FLOW,
    ),
    "UniPCMultistepScheduler": (
        {},
        *SIGMAS,
        *SPACINGS,
        V,
        SAMPLE,
        SIGMA_MIN,
        ZERO_SNR,
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "solver_type": "bh1", **KARRAS, **SIGMA_MIN},
        {"predict_x0": False, **V, **SIGMA_MIN},
        {"disable_corrector": [0, 1]},
        {"lower_order_final": False, **SIGMA_MIN},
        FLOW,
        {**FLOW, "solver_order": 3},
    ),
    "SASolverScheduler": ({}, KARRAS, TRAILING, V, {"predictor_order": 3, "corrector_order": 1}),
    "LCMScheduler": ({}, V, SAMPLE, {"timestep_scaling": 5.0}),
    "TCDScheduler": ({}, V, SAMPLE),
    "IPNDMScheduler": ({},),
    "EDMEulerScheduler": ({}, {**V, "sigma_schedule": "exponential"}),
    "EDMDPMSolverMultistepScheduler": ({}, {"solver_order": 3, **V}),
    "FlowMatchEulerDiscreteScheduler": (
        {},
        {"shift": 3.0},
        *SIGMAS,
        {"shift": 3.0, "stochastic_sampling": True},
        {"shift_terminal": 0.1},
    ),
    "FlowMatchHeunDiscreteScheduler": ({}, {"shift": 3.0}),
    "FlowMatchLCMScheduler": ({"shift": 3.0},),
}
LINEAR = {"clip_sample": False, "thresholding": False, "skip_prk_steps": True}


def make(name: str, options: Options) -> Any:
    cls = getattr(diffusers, name)
    own = inspect.signature(cls.__init__).parameters
    base = {**({} if name.startswith(NO_BETAS) else BETAS), **LINEAR}
    return cls(**{key: value for key, value in {**base, **options}.items() if key in own})


def label(options: Options) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


def predict(x: Any, t: float) -> Any:
    """A model whose output depends on all of its input and on the timestep, tamely (slope about 1)."""
    array = x.numpy() if isinstance(x, torch.Tensor) else x
    mixed = 0.6 * np.roll(array, 1, -1) + 0.3 * np.roll(array, 1, -3) - 0.2 * array
    result = (np.tanh(mixed) + 0.3 * np.cos(array) + 0.2 * math.sin(0.01 * t)).astype(array.dtype)
    return torch.from_numpy(result) if isinstance(x, torch.Tensor) else result


def noises(count: int) -> list[np.ndarray[Any, Any]]:
    return list(np.random.default_rng(1).standard_normal((count, *SHAPE), dtype=np.float32))


class Given(TorchFunctionMode):
    """Noise from a list; in a float64 run no cast to float32 either."""

    def __init__(self, noise: list[Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.noise, self.dtype = iter(noise), dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return torch.from_numpy(next(self.noise)).to(self.dtype)
        if func is torch.Tensor.to and self.dtype == torch.float64 and args[0].ndim > 1 and torch.float32 in args:
            return args[0]
        return func(*args, **(kwargs or {}))


class BrownianPath:
    """What `torchsde` gives DPM-Solver++ SDE, along one walk through the sigmas in the order they are met."""

    def __init__(self, noise: list[Any], dtype: torch.dtype) -> None:
        self.noise, self.dtype, self.walk = iter(noise), dtype, []

    def at(self, sigma: float) -> Any:
        for known, value in self.walk:
            if known == sigma:
                return value
        if not self.walk:
            value = torch.zeros(SHAPE, dtype=self.dtype)
        else:
            last, value = self.walk[-1]
            value = value + math.sqrt(last - sigma) * torch.from_numpy(next(self.noise)).to(self.dtype)
        self.walk.append((sigma, value))
        return value

    def __call__(self, sigma: Any, sigma_next: Any) -> Any:
        start, end = self.at(float(sigma)), self.at(float(sigma_next))
        return (end - start) / math.sqrt(float(sigma) - float(sigma_next))


def oracle(
    scheduler: Any,
    latents: Any,
    *,
    begin: int = 0,
    dtype: torch.dtype = torch.float32,
    step: Options | None = None,
    **arguments: Any,
) -> tuple[Any, list[Any]]:
    """The final latents of the scheduler's own loop, and all `pred_original_sample` that it gives."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(**arguments)
    timesteps = scheduler.timesteps[begin:]
    # Without an index the loop would start at the first timestep's second occurrence and run beyond the end.
    repeated = bool((timesteps[1:] == timesteps[0]).any())
    if (begin or repeated) and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    noise = noises(len(timesteps))
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = BrownianPath(noise, dtype)
    x, estimates = latents.to(dtype), []
    with Given(noise, dtype):
        for t in timesteps:
            model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = scheduler.step(predict(model_input, float(t)), t, x, **(step or {}))
            x = output.prev_sample
            estimates.append(getattr(output, "pred_original_sample", None))
    return x, estimates


def run(table: StepTable, latents: Any, noise: list[Any] | None = None) -> Any:
    given = iter(noise if noise is not None else noises(len(table)))
    steps = denoise(
        lambda x, row: predict(x, float(table.timestep[row])),
        latents,
        [table],
        noise=[lambda shape: next(given)[0]],
    )
    *_, step = steps
    return step.latents


def start(table: StepTable) -> Any:
    return initial_latents(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), [table])


def deviation(got: Any, wanted: Any) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-20))


def check(
    scheduler: Any,
    *,
    begin: int = 0,
    eta: float | None = None,
    ill_conditioned: bool = False,
    **arguments: Any,
) -> StepTable | None:
    """Compare a compiled run with the scheduler's in float32; where that is coarse, its float64 run.

    Random options can be so ill-conditioned that no float32 run is good (weights of 1e4 that cancel): there
    ours must be no worse than the scheduler's own, and right in float64.
    """
    step = {"eta": eta or 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    guess = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = oracle(scheduler, guess, begin=begin, step=step, **arguments)[0]
        fails = not bool(wanted.isfinite().all())
    except (ValueError, IndexError, AssertionError, RuntimeError):
        fails = True
    if fails:
        with pytest.raises(InputError):
            StepTable.from_scheduler(scheduler, begin=begin, eta=eta or 0.0, **arguments)
        return None
    table = StepTable.from_scheduler(scheduler, begin=begin, eta=eta or 0.0, **arguments)
    latents = start(table)
    got = run(table, latents)
    theirs = oracle(scheduler, latents, begin=begin, step=step, **arguments)[0]
    if deviation(got, theirs) > TOLERANCE:
        exact = oracle(scheduler, latents, begin=begin, step=step, dtype=torch.float64, **arguments)[0]
        coarse = deviation(theirs, exact) if ill_conditioned else 0
        assert deviation(got, exact) <= max(TOLERANCE, coarse)
        assert deviation(run(table, latents.double()), exact) <= 1e-7
    assert max(table.state.shape[1], table.prediction.shape[1], table.noise.shape[1]) <= 4
    return table


ALL = [pytest.param(name, o, id=f"{name[:-9]}-{label(o)}") for name, options in CASES.items() for o in options]


@pytest.mark.parametrize(("name", "options"), ALL)
def test_equals_the_schedulers_own_loop(name: str, options: Options) -> None:
    scheduler = make(name, options)
    compiled = [check(scheduler, num_inference_steps=steps) for steps in STEPS]
    assert compiled[-2] is not None  # no scheduler of the list may fail at 20 steps
    assert sum(table is None for table in compiled) <= 2


@pytest.mark.parametrize("step", [1, 4, 9])
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_starts_later(name: str, step: int) -> None:
    scheduler = make(name, {})
    assert check(scheduler, begin=step * scheduler.order, num_inference_steps=10) is not None


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler"])
def test_eta(name: str, eta: float) -> None:
    for steps in (1, 4, 20):
        table = check(make(name, {}), eta=eta, num_inference_steps=steps)
        assert table is not None and bool(table.draws.any()) == (eta > 0 and (steps > 1 or name[0] == "D"))


ARGUMENTS: list[tuple[str, Options, Options]] = [
    ("EulerDiscreteScheduler", {}, {"sigmas": [14.6, 6.0, 2.0, 0.5, 0.0]}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [999, 700, 300, 10]}),
    ("HeunDiscreteScheduler", {}, {"timesteps": [999, 700, 300, 10]}),
    ("DDPMScheduler", {}, {"timesteps": [999, 700, 300, 10]}),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [999, 700, 300, 10]}),
    ("LCMScheduler", {}, {"timesteps": [999, 759, 499, 259]}),
    ("LCMScheduler", {}, {"num_inference_steps": 80, "original_inference_steps": 100}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        {"num_inference_steps": 7, "mu": 0.8},
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"sigmas": np.linspace(1, 0.1, 10), "mu": 1.15},
    ),
    (
        "UniPCMultistepScheduler",
        {**FLOW, "use_dynamic_shifting": True},
        {"num_inference_steps": 9, "mu": 0.8},
    ),
    ("UniPCMultistepScheduler", FLOW, {"sigmas": np.linspace(1, 0.1, 10)}),
    (
        "DPMSolverMultistepScheduler",
        {**FLOW, "use_dynamic_shifting": True},
        {"num_inference_steps": 9, "mu": 0.8},
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "arguments"), ARGUMENTS, ids=[f"{n[:-9]}-{','.join(a)}" for n, _, a in ARGUMENTS]
)
def test_arguments_of_set_timesteps(name: str, options: Options, arguments: Options) -> None:
    assert check(make(name, options), **arguments) is not None


MANY = [
    ("DDIMScheduler", {}, 1000),
    ("EulerDiscreteScheduler", {}, 1000),
    ("DPMSolverMultistepScheduler", {}, 999),
    ("DPMSolverMultistepScheduler", KARRAS, 1000),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1000),
]


@pytest.mark.parametrize(("name", "options", "steps"), MANY, ids=[f"{n[:-9]}-{s}" for n, _, s in MANY])
def test_as_many_steps_as_training(name: str, options: Options, steps: int) -> None:
    assert check(make(name, options), num_inference_steps=steps) is not None


@pytest.mark.full
@pytest.mark.parametrize("steps", [250, 999, 1000])
@pytest.mark.parametrize("name", CASES)
def test_as_many_steps_as_training_for_all(name: str, steps: int) -> None:
    check(make(name, {}), num_inference_steps=steps)


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, Options, Options]:
    name = draw(st.sampled_from(sorted(set(CASES) - {"LMSDiscreteScheduler"})))
    own = inspect.signature(getattr(diffusers, name).__init__).parameters
    options = {
        **draw(st.sampled_from(({}, *SIGMAS))),
        **draw(st.sampled_from(({}, *SPACINGS))),
        **draw(st.sampled_from(({}, V, SAMPLE, FLOW))),
        **draw(st.sampled_from(({}, SIGMA_MIN))),
        "solver_order": draw(st.integers(1, 3)),
        "steps_offset": draw(st.integers(0, 1)),
        "rescale_betas_zero_snr": draw(st.booleans()),
        "lower_order_final": draw(st.booleans()),
        "beta_schedule": draw(st.sampled_from(("linear", "scaled_linear", "squaredcos_cap_v2"))),
        "shift": draw(st.floats(0.5, 8)),
    }
    steps, order = draw(st.integers(1, 40)), getattr(diffusers, name).order
    eta = draw(st.sampled_from((0.0, 0.5, 1.0))) if name in ("DDIMScheduler", "TCDScheduler") else 0.0
    return (
        name,
        {key: value for key, value in options.items() if key in own},
        {"num_inference_steps": steps, "begin": order * draw(st.integers(0, steps - 1)), "eta": eta},
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(runs())
def test_random_configurations(case: tuple[str, Options, Options]) -> None:
    name, options, arguments = case
    try:
        scheduler = make(name, options)
    except (ValueError, NotImplementedError):
        return  # a combination that diffusers itself refuses
    check(scheduler, ill_conditioned=True, **arguments)


REFUSED: list[tuple[str, str, Options, Options, str]] = [
    ("clip", "DDIMScheduler", {"clip_sample": True}, {}, "clip_sample=True"),
    ("clip-ddpm", "DDPMScheduler", {"clip_sample": True}, {}, "clip_sample=True"),
    ("clip-lcm", "LCMScheduler", {"clip_sample": True}, {}, "clip_sample=True"),
    ("clip-heun", "HeunDiscreteScheduler", {"clip_sample": True}, {}, "clip_sample=True"),
    ("thresholding", "DPMSolverMultistepScheduler", {"thresholding": True}, {}, "thresholding=True"),
    ("thresholding-unipc", "UniPCMultistepScheduler", {"thresholding": True}, {}, "thresholding=True"),
    ("runge-kutta", "PNDMScheduler", {"skip_prk_steps": False}, {}, "skip_prk_steps=False"),
    ("learned", "DDPMScheduler", {"variance_type": "learned_range"}, {}, "variance_type='learned_range'"),
    ("lcm-51", "LCMScheduler", {}, {"num_inference_steps": 51}, "1 to 50 (original_inference_steps)"),
    ("tcd-51", "TCDScheduler", {}, {"num_inference_steps": 51}, "1 to 50 (original_inference_steps)"),
    (
        "zero",
        "EulerDiscreteScheduler",
        {},
        {"num_inference_steps": 0},
        "1 to 1000 (num_train_timesteps), not 0",
    ),
    ("negative", "DDIMScheduler", {}, {"num_inference_steps": -3}, "not -3"),
    ("above", "EulerDiscreteScheduler", {}, {"num_inference_steps": 1001}, "not 1001"),
    ("fraction", "EulerDiscreteScheduler", {}, {"num_inference_steps": 2.5}, "not 2.5"),
    ("bool", "EulerDiscreteScheduler", {}, {"num_inference_steps": True}, "not True"),
    ("no-steps", "EulerDiscreteScheduler", {}, {"num_inference_steps": None}, "sigmas or timesteps"),
    ("no-sigmas", "DDIMScheduler", {}, {"sigmas": [1.0, 0.5]}, "takes no sigmas"),
    ("no-mu", "EulerDiscreteScheduler", {}, {"mu": 1.0}, "takes no mu"),
    ("mu-missing", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {}, "mu"),
    ("both", "EulerDiscreteScheduler", {}, {"timesteps": [999, 1]}, "refuses"),
    ("begin", "EulerDiscreteScheduler", {}, {"begin": 10}, "from 0 to 9, not 10"),
    ("begin-negative", "EulerDiscreteScheduler", {}, {"begin": -1}, "not -1"),
    ("begin-between", "HeunDiscreteScheduler", {}, {"begin": 3}, "multiple of 2"),
    ("eta", "EulerDiscreteScheduler", {}, {"eta": 0.5}, "no eta"),
    ("eta-nan", "DDIMScheduler", {}, {"eta": math.nan}, "eta must be"),
    ("eta-negative", "DDIMScheduler", {}, {"eta": -1.0}, "eta must be"),
    ("eta-large", "DDIMScheduler", {}, {"eta": 30.0}, "step 1 of 10"),
    ("offset", "DDIMScheduler", {"steps_offset": 1}, {"num_inference_steps": 1000}, "step 1 of 1000"),
    ("repeated", "DPMSolverMultistepScheduler", {}, {"num_inference_steps": 1000}, "divides by zero"),
    ("sample", "EulerAncestralDiscreteScheduler", SAMPLE, {}, "itself fails at step 1"),
    ("zero-snr", "DDIMScheduler", {**ZERO_SNR, "prediction_type": "epsilon"}, {}, "divides by zero"),
]


@pytest.mark.parametrize(
    ("name", "options", "arguments", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refusals_are_one_sentence(name: str, options: Options, arguments: Options, message: str) -> None:
    with pytest.raises(InputError) as error:
        StepTable.from_scheduler(make(name, options), **{"num_inference_steps": 10, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Clipping(diffusers.EulerDiscreteScheduler):
    """Not linear, and no option says so."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(model_output.clamp(-1, 1), timestep, sample, **kwargs)


class Momentum(diffusers.EulerDiscreteScheduler):
    """Keeps a sum over all predictions, which two states show: `memory = (state - state before) / step`."""

    memory: Any = 0

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        self.memory = 0.9 * self.memory + model_output
        return super().step(self.memory, timestep, sample, **kwargs)


class Greedy(diffusers.EulerDiscreteScheduler):
    """Draws two noises in a step."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        output = super().step(model_output, timestep, sample, **kwargs)
        output.prev_sample = output.prev_sample + torch.randn(sample.shape) - torch.randn(sample.shape)
        return output


class Forgetting(diffusers.DDIMScheduler):
    """Depends on a prediction of six steps ago."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        self.all = [*getattr(self, "all", []), model_output]
        return super().step(model_output + (self.all[-7] if len(self.all) > 6 else 0), timestep, sample, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Clipping(**BETAS), "no linear recurrence"),
        (Greedy(**BETAS), "draws 2 noises"),
        (Forgetting(**BETAS, clip_sample=False), "more than 4 earlier steps"),
        ("euler", "not from str"),
        (diffusers.DDIMScheduler, "type"),
    ],
    ids=["clipping", "greedy", "forgetting", "str", "class"],
)
def test_schedulers_that_cannot_be_compiled(scheduler: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        StepTable.from_scheduler(scheduler, 10)


def test_a_hidden_memory_is_expressed_by_the_states_it_shows_in() -> None:
    table = check(Momentum(**BETAS), num_inference_steps=20)
    assert table is not None and table.state.shape == (20, 2)
    assert not table.prediction[2:, 1:].any()


def test_options_of_other_classes_in_a_config_do_not_count() -> None:
    pndm = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)
    euler = diffusers.EulerDiscreteScheduler.from_config({**pndm.config, "clip_sample": True})
    assert len(StepTable.from_scheduler(euler, 5)) == 5


@pytest.mark.parametrize("name", CASES)
def test_the_callers_scheduler_is_left_as_it_was(name: str) -> None:
    scheduler = make(name, {})
    scheduler.set_timesteps(7)
    before = {key: copy.deepcopy(value) for key, value in vars(scheduler).items()}
    StepTable.from_scheduler(scheduler, 4)
    assert vars(scheduler).keys() == before.keys()
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):  # KDPM2 has NaNs behind its last sigma
            assert torch.equal(value.nan_to_num(-1), before[key].nan_to_num(-1)), key
    assert scheduler.config == before["_internal_dict"]


def test_a_used_scheduler_gives_the_same_table() -> None:
    for name in ("PNDMScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"):
        scheduler = make(name, {})
        fresh = StepTable.from_scheduler(scheduler, 6)
        scheduler.set_timesteps(9)
        x = torch.randn(SHAPE)
        for t in scheduler.timesteps[:5]:
            x = scheduler.step(x, t, scheduler.scale_model_input(x, t)).prev_sample
        assert StepTable.from_scheduler(scheduler, 6) == fresh


def test_compiling_disturbs_no_other_thread() -> None:
    scheduler = make("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
    alone, tables, draws = StepTable.from_scheduler(scheduler, 40), [], []

    def draw() -> None:
        generator = torch.Generator().manual_seed(3)
        draws.append(torch.cat([torch.randn(64, generator=generator) for _ in range(300)]))

    threads = [threading.Thread(target=draw) for _ in range(2)]
    threads += [
        threading.Thread(target=lambda: tables.append(StepTable.from_scheduler(scheduler, 40))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    generator = torch.Generator().manual_seed(3)
    wanted = torch.cat([torch.randn(64, generator=generator) for _ in range(300)])
    assert all(table == alone for table in tables) and len(tables) == 3
    assert all(torch.equal(values, wanted) for values in draws) and len(draws) == 2


MIDPOINTS = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in CASES), ("DEISMultistepScheduler", FLOW), ("KDPM2DiscreteScheduler", V)],
    ids=lambda value: value[:-9] if isinstance(value, str) else label(value),
)
def test_levels_are_those_of_add_noise(name: str, options: Options, begin: int) -> None:
    scheduler = make(name, options)
    table = StepTable.from_scheduler(scheduler, 8, begin=begin)
    scheduler.set_timesteps(8)
    image, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()
    for row in range(len(table)):
        t = scheduler.timesteps[begin + row].reshape(1)
        if name == "IPNDMScheduler":  # the one without an add_noise; its alphas and betas say the same
            i = begin + row
            wanted = scheduler.alphas[i] * image + scheduler.betas[i] * noise
        else:
            used = copy.deepcopy(scheduler)
            if hasattr(used, "set_begin_index"):
                used.set_begin_index(begin + row)
            flow = hasattr(used, "scale_noise")
            wanted = used.scale_noise(image, t, noise) if flow else used.add_noise(image, noise, t)
        got = float(table.signal[row]) * image + float(table.noise_level[row]) * noise
        if name in MIDPOINTS and row % 2:
            # add_noise knows only whole steps; the input is scaled to the midpoint, 1 + sigma**2 in float32.
            assert table.noise_level[row] ** 2 == pytest.approx(1 / table.input_scale[row] ** 2 - 1, rel=1e-5, abs=3e-7)
            continue
        assert deviation(got, wanted) <= 1e-6  # two roundings to float32


def test_midpoint_levels_lie_between_the_whole_steps() -> None:
    for name in MIDPOINTS:
        table = StepTable.from_scheduler(make(name, {}), 8)
        # KDPM2's ancestral midpoint is the next sigma itself.
        assert (np.diff(table.noise_level) < (1e-5 if "Ancestral" in name else 0)).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, V, SAMPLE], ids=label)
def test_denoised_is_the_schedulers_own_estimate(name: str, options: Options) -> None:
    scheduler = make(name, options)
    try:
        table = StepTable.from_scheduler(scheduler, 6)
    except InputError:
        assert options == SAMPLE  # not known to PNDM, EulerAncestral, KDPM2, ...
        return
    latents = start(table)
    estimates = oracle(scheduler, latents, num_inference_steps=6, step={})[1]
    given = iter(noises(len(table)))
    steps = denoise(
        lambda x, row: predict(x, float(table.timestep[row])),
        latents,
        [table],
        noise=[lambda shape: next(given)[0]],
    )
    for step, estimate in zip(steps, estimates, strict=True):
        got = step.denoised()
        if estimate is not None and name != "TCDScheduler":
            assert deviation(got, estimate) <= TOLERANCE
        assert got.isfinite().all()


def test_denoised_finds_the_image_of_a_perfect_model() -> None:
    """A model that knows the image and the noise: every row's estimate is the image, whatever the sampler."""
    image, noise = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    for name in CASES:
        for kind in ("epsilon", "v_prediction", "sample"):
            scheduler = make(name, {"prediction_type": kind})
            try:
                table = StepTable.from_scheduler(scheduler, 5)
            except InputError:
                continue
            if name.startswith("FlowMatch"):
                kind = "flow"
            if name == "IPNDMScheduler":
                kind = "v_prediction"
            if name.startswith("EDM"):
                continue  # its prediction is preconditioned; compared with pred_original_sample above
            for row in range(5):
                signal, level = float(table.signal[row]), float(table.noise_level[row])
                norm = math.hypot(signal, level)
                prediction = {
                    "epsilon": noise,
                    "sample": image,
                    "flow": noise - image,
                    "v_prediction": (signal * noise - level * image) / norm,
                }[kind]
                a, b = table.denoised[row].tolist()
                got = a * (signal * image + level * noise) + b * prediction
                assert deviation(got, image) <= 1e-5, (name, kind, row)


def test_timesteps_scales_and_draws() -> None:
    for name in CASES:
        scheduler = make(name, {})
        table = StepTable.from_scheduler(scheduler, 9)
        scheduler.set_timesteps(9)
        assert table.sampler == name
        assert len(table) == len(scheduler.timesteps)
        assert np.array_equal(table.timestep, scheduler.timesteps.double().numpy())
        assert table.initial_scale == float(getattr(scheduler, "init_noise_sigma", 1.0))
        assert (table.guidance == 1).all() and not table.guided
    ancestral = StepTable.from_scheduler(make("KDPM2AncestralDiscreteScheduler", {}), 3)
    assert ancestral.draws.tolist() == [0, 1, 0, 1, 0]
    assert StepTable.from_scheduler(make("DPMSolverMultistepScheduler", {}), 20).state.shape == (20, 2)


def test_tables_are_immutable() -> None:
    table = StepTable.from_scheduler(make("PNDMScheduler", {}), 5)
    with pytest.raises(ValueError, match="read-only"):
        table.state[0, 0] = 2
    with pytest.raises(AttributeError):
        table.sampler = "other"  # type: ignore[misc]
    guided = table.with_guidance(7.5)
    assert guided.guided and (guided.guidance == 7.5).all() and not table.guided
    assert table.with_guidance([1, 2, 2, 2, 1, 1]).guidance.tolist() == [1, 2, 2, 2, 1, 1]
    assert guided != table and guided.with_guidance(1) == table and hash(guided.with_guidance(1)) == hash(table)


@pytest.mark.parametrize("scale", [-1, math.nan, math.inf, [1.0, 2.0], [[1.0]]], ids=str)
def test_guidance_that_is_refused(scale: Any) -> None:
    with pytest.raises(InputError, match="guidance"):
        StepTable.from_scheduler(make("DDIMScheduler", {}), 5).with_guidance(scale)


@pytest.mark.parametrize("name", CASES)
def test_json_is_exact(name: str) -> None:
    table = StepTable.from_scheduler(make(name, {}), 6).with_guidance(0.1 + 0.2)
    again = StepTable.from_json(table.to_json())
    assert again == table and again.noise.shape == table.noise.shape
    assert all(
        getattr(again, f).tobytes() == getattr(table, f).tobytes() for f in ("state", "prediction", "noise", "signal")
    )
    assert again.initial_scale == table.initial_scale and not again.state.flags.writeable
    assert StepTable.from_json(table.to_json().encode()) == table


def damaged(**changes: Any) -> str:
    document = json.loads(StepTable.from_scheduler(make("DPMSolverMultistepScheduler", {}), 3).to_json())
    document.update(changes)
    return json.dumps({key: value for key, value in document.items() if value != "missing"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "no valid JSON", id="empty"),
        pytest.param("{", "no valid JSON", id="cut"),
        pytest.param(b"\xff\xfe\x00", "no valid JSON", id="bytes"),
        pytest.param("[" * 100_000, "no valid JSON", id="deep"),
        pytest.param("[]", "no step table", id="list"),
        pytest.param("{}", "no step table", id="other"),
        pytest.param(damaged(version=2), "version 2", id="version"),
        pytest.param(damaged(version="missing"), "version None", id="no-version"),
        pytest.param(damaged(state="missing"), "missing or unknown state", id="missing"),
        pytest.param(damaged(extra=1), "missing or unknown extra", id="unknown"),
        pytest.param(damaged(timestep=[]), "shape", id="no-rows"),
        pytest.param(damaged(timestep=[1.0, 2.0]), "shape", id="rows"),
        pytest.param(damaged(state=[1.0, 1.0, 1.0]), "two axes", id="axes"),
        pytest.param(damaged(state=[[1.0], [1.0, 2.0], [1.0]]), "array of numbers", id="ragged"),
        pytest.param(damaged(state=[["a"], ["b"], ["c"]]), "array of numbers", id="strings"),
        pytest.param(damaged(state=[["1.0"]] * 3), "array of numbers", id="quoted"),
        pytest.param(damaged(state=None), "array of numbers", id="null"),
        pytest.param(damaged(state=[[10**400]] * 3), "array of numbers", id="huge"),
        pytest.param(damaged(state=[[]] * 3), "at least 1", id="no-columns"),
        pytest.param(damaged(denoised=[[1.0]] * 3), "2 columns", id="denoised"),
        pytest.param(damaged(signal=[1.0, math.nan, 1.0]), "not finite", id="nan"),
        pytest.param(damaged(draws=[0, 2, 0]), "0 or 1", id="draws"),
        pytest.param(damaged(state=[[1.0, 1.0]] * 3), "before row 0", id="before-the-first-row"),
        pytest.param(damaged(sampler=3), "class name", id="sampler"),
        pytest.param(damaged(initial_scale="1"), "finite number", id="initial-scale"),
        pytest.param(damaged(initial_scale=math.inf), "finite number", id="initial-scale-infinite"),
    ],
)
def test_json_that_is_refused(text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        StepTable.from_json(text)
