"""What a scheduler's name means for a checkpoint."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
import pytest

from fastsd.errors import InputError, MissingExtraError
from fastsd.sampling.schedulers import SAMPLERS, is_flow, resolve_scheduler
from fastsd.sampling.table import StepTable

pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("FutureWarning", "DeprecationWarning")]

# The published scheduler_config.json files.
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
TURBO = {**SDXL, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
LCM = {**SD15, "_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SANA = {
    "_class_name": "DPMSolverMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
}
NOISE = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "turbo": TURBO, "lcm": LCM}
FLOW = {"sd3": SD3, "flux": FLUX, "sana": SANA}

# A checkpoint whose config asks for the opposite of everything that a short name fixes.
CONTRARY = {
    **SD15,
    "clip_sample": True,
    "thresholding": True,
    "skip_prk_steps": False,
    "use_karras_sigmas": True,
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 3,
    "variance_type": "learned_range",
    "final_sigmas_type": "sigma_min",
}

FITTING = [
    (name, checkpoint, config)
    for name in SAMPLERS
    for checkpoint, config in (FLOW if name.startswith("flow_") else NOISE).items()
]


@pytest.mark.parametrize(("name", "checkpoint", "config"), FITTING, ids=[f"{n}-{c}" for n, c, _ in FITTING])
def test_every_short_name_compiles_for_every_fitting_checkpoint(
    name: str, checkpoint: str, config: dict[str, Any]
) -> None:
    scheduler = resolve_scheduler(name, config)
    assert type(scheduler).__name__ == SAMPLERS[name][0]
    dynamic = config.get("use_dynamic_shifting") and name != "flow_heun"
    table = StepTable.from_scheduler(scheduler, 4, **({"mu": 0.9} if dynamic else {}))
    assert table.sampler == SAMPLERS[name][0]
    if "prediction_type" in scheduler.config and not name.startswith(("flow_euler", "flow_heun")):
        flow = name.startswith("flow_")
        wanted = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
        assert scheduler.config.prediction_type == wanted


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("flow_")])
def test_a_checkpoints_config_does_not_change_what_a_name_means(name: str) -> None:
    assert StepTable.from_scheduler(resolve_scheduler(name, CONTRARY), 5) == StepTable.from_scheduler(
        resolve_scheduler(name, SD15), 5
    )


def test_names_differ_where_they_should() -> None:
    tables = {}
    for name in SAMPLERS:
        config = SD3 if name.startswith("flow_") else SD15
        tables[name] = StepTable.from_scheduler(resolve_scheduler(name, config), 6)
    names = list(tables)
    same = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if tables[a] == tables[b]]
    assert same == []


@pytest.mark.parametrize("checkpoint", [*NOISE, *FLOW])
def test_none_is_the_checkpoints_own(checkpoint: str) -> None:
    config = {**NOISE, **FLOW}[checkpoint]
    got = resolve_scheduler(None, config)
    wanted = getattr(diffusers, config["_class_name"]).from_config(config)
    assert type(got) is type(wanted)
    mu = {"mu": 0.9} if config.get("use_dynamic_shifting") else {}
    assert StepTable.from_scheduler(got, 5, **mu) == StepTable.from_scheduler(wanted, 5, **mu)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("HeunDiscreteScheduler", SDXL),
        ("DPMSolverSinglestepScheduler", SD21),
        ("FlowMatchHeunDiscreteScheduler", FLUX),
    ],
    ids=["heun", "singlestep", "flow-heun"],
)
def test_a_class_name_takes_the_checkpoints_config(name: str, config: dict[str, Any]) -> None:
    wanted = getattr(diffusers, name).from_config(config)
    assert StepTable.from_scheduler(resolve_scheduler(name, config), 5) == StepTable.from_scheduler(wanted, 5)


def test_an_instance_passes_through() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    assert resolve_scheduler(scheduler, SD15) is scheduler


def test_the_static_shift_of_a_flow_checkpoint_is_kept() -> None:
    for config, shift in ((SD3, 3.0), (SANA, 3.0), ({**SD3, "shift": 1.5}, 1.5)):
        assert resolve_scheduler("flow_euler", config).config.shift == shift
        assert resolve_scheduler("flow_dpmpp_2m", config).config.flow_shift == shift
        assert resolve_scheduler("flow_unipc", config).config.flow_shift == shift


@pytest.mark.parametrize(("config", "flow"), [(SD15, False), (SDXL, False), (SD3, True), (SANA, True), ({}, False)])
def test_is_flow(config: dict[str, Any], flow: bool) -> None:
    assert is_flow(config) is flow


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("misspelt", "eular", SD15, "did you mean euler"),
    ("upper-case", "DDIM", SD15, "did you mean ddim"),
    ("with-spaces", "DPM++ 2M", SD15, "dpmpp_2m"),
    ("class-misspelt", "EulerDiscretScheduler", SD15, "did you mean EulerDiscreteScheduler"),
    ("nothing-near", "qqqqqqqq", SD15, "known: ddim, ddpm"),
    ("no-scheduler", "UNet2DConditionModel", SD15, "unknown scheduler"),
    ("empty", "", SD15, "unknown scheduler ''"),
    ("number", 3, SD15, "not int"),
    ("euler-for-flow", "euler", SD3, "use 'flow_euler'"),
    ("heun-for-flow", "heun", FLUX, "use 'flow_heun'"),
    ("dpmpp-for-flow", "dpmpp_2m", SD3, "use 'flow_dpmpp_2m'"),
    ("karras-for-flow", "dpmpp_2m_karras", SD3, "use 'flow_dpmpp_2m'"),
    ("unipc-for-flow", "unipc", SANA, "use 'flow_unipc'"),
    ("lcm-for-flow", "lcm", SD3, "use 'flow_euler'"),
    ("flow-euler", "flow_euler", SD15, "use 'euler'"),
    ("flow-unipc", "flow_unipc", SDXL, "use 'unipc'"),
    ("class-for-flow", "EulerDiscreteScheduler", SD3, "use 'flow_euler'"),
    ("flow-class", "FlowMatchHeunDiscreteScheduler", SD21, "use 'heun'"),
    ("flow-class-without-name", "FlowMatchLCMScheduler", SD15, "use 'euler'"),
    ("instance-for-flow", diffusers.DDIMScheduler(), SD3, "use 'flow_euler'"),
    ("flow-instance", diffusers.FlowMatchEulerDiscreteScheduler(), SD15, "use 'euler'"),
    ("config-without-class", None, {"beta_start": 0.1}, "names no class"),
    ("config-of-unknown-class", None, {"_class_name": "MyScheduler"}, "unknown scheduler 'MyScheduler'"),
    ("config-of-no-scheduler", None, {"_class_name": "AutoencoderKL"}, "unknown scheduler"),
    ("bad-betas", "ddim", {**SD15, "beta_schedule": "cubic"}, "refuses the checkpoint's scheduler config"),
    ("betas-of-text", "ddim", {**SD15, "beta_start": "a"}, "refuses the checkpoint's scheduler config"),
]


@pytest.mark.parametrize(("scheduler", "config", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals_are_one_sentence(scheduler: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        resolve_scheduler(scheduler, config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_dpmpp_sde_without_torchsde_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.utils import import_utils
    from diffusers.utils.dummy_torch_and_torchsde_objects import DPMSolverSDEScheduler

    monkeypatch.setattr(import_utils, "_torchsde_available", False)
    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", DPMSolverSDEScheduler)
    with pytest.raises(MissingExtraError, match="pip install torchsde"):
        resolve_scheduler("dpmpp_sde", SD15)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"fastsd\[torch\]"):
        resolve_scheduler("ddim", SD15)
