"""Which `diffusers` scheduler a name means: one table of short names, the same for every checkpoint."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from fastsd.errors import InputError, MissingExtraError

# Options are fixed so that a checkpoint's config, made for another sampler, never changes what a name means.
# What belongs to the checkpoint (betas, prediction type, spacing and offset of timesteps, shift) stays.
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
UNCLIPPED = {"clip_sample": False, "thresholding": False}
DPMPP_2M = {
    **SIGMAS,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "variance_type": None,
}
UNIPC = {
    **SIGMAS,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "use_flow_sigmas": False,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", UNCLIPPED),
    "ddpm": ("DDPMScheduler", {**UNCLIPPED, "variance_type": "fixed_small"}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", SIGMAS),
    "heun": ("HeunDiscreteScheduler", {**SIGMAS, "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {**SIGMAS, "final_sigmas_type": "zero"}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", DPMPP_2M),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {**DPMPP_2M, "use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**DPMPP_2M, "algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", SIGMAS),
    "dpm2": ("KDPM2DiscreteScheduler", SIGMAS),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", SIGMAS),
    "deis": (
        "DEISMultistepScheduler",
        {
            **SIGMAS,
            "algorithm_type": "deis",
            "solver_order": 2,
            "solver_type": "logrho",
            "lower_order_final": True,
            "thresholding": False,
            "use_flow_sigmas": False,
        },
    ),
    "unipc": ("UniPCMultistepScheduler", UNIPC),
    "lcm": ("LCMScheduler", UNCLIPPED),
    "tcd": ("TCDScheduler", UNCLIPPED),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", SIGMAS),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_dpmpp_2m": ("DPMSolverMultistepScheduler", {**DPMPP_2M, **FLOW}),
    "flow_unipc": ("UniPCMultistepScheduler", {**UNIPC, **FLOW}),
}


def resolve_scheduler(scheduler: Any, config: Mapping[str, Any]) -> Any:
    """The `diffusers` scheduler that a user's word means for a checkpoint.

    Args:
        scheduler: None (the checkpoint's own), a short name of `SAMPLERS`, a `diffusers` class name (with the
            checkpoint's config), or a scheduler instance, which is returned as it is.
        config: the checkpoint's `scheduler_config.json`.

    Raises:
        InputError: the name is unknown, or a flow-matching sampler meets another checkpoint or the reverse.
        MissingExtraError: the sampler needs a library that is not installed.
    """
    if scheduler is None:
        name = config.get("_class_name")
        if not isinstance(name, str):
            raise InputError('the checkpoint\'s scheduler config names no class ("_class_name")')
        return _build(_class(name), config, {})
    if not isinstance(scheduler, str):
        instance = (
            not isinstance(scheduler, type) and hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "config")
        )
        if not instance:
            raise InputError(f"scheduler must be a name or a diffusers scheduler, not {type(scheduler).__name__}")
        name = type(scheduler).__name__
        _check_flow(name, is_flow({**scheduler.config, "_class_name": name}), config)
        return scheduler
    if scheduler in SAMPLERS:
        name, options = SAMPLERS[scheduler]
        flow = scheduler.startswith("flow_")
        _check_flow(scheduler, flow, config)
        if flow:
            shift = config.get("shift", config.get("flow_shift", 1.0))
            options = {**options, ("flow_shift" if "use_flow_sigmas" in options else "shift"): shift}
        return _build(_class(name), config, options)
    cls = _class(scheduler)
    _check_flow(scheduler, is_flow({**config, "_class_name": scheduler}), config)
    return _build(cls, config, {})


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config is for flow matching (SD3, Flux) and not for noise prediction (SD, SDXL)."""
    return (
        str(config.get("_class_name", "")).startswith("FlowMatch")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def _check_flow(name: str, flow: bool, config: Mapping[str, Any]) -> None:
    checkpoint_flow = is_flow(config)
    if flow == checkpoint_flow:
        return
    # A class name is looked up by the short name that stands for it.
    short = next((key for key, (cls, _) in SAMPLERS.items() if cls == name), name)
    stem = short.removeprefix("flow_").removesuffix("_karras").removesuffix("_sde")
    fitting = stem if flow else f"flow_{stem}"
    if fitting not in SAMPLERS:
        fitting = "flow_euler" if checkpoint_flow else "euler"
    kinds = ("noise prediction", "flow matching")
    raise InputError(
        f"scheduler {name!r} is for {kinds[flow]}, the checkpoint was trained with {kinds[checkpoint_flow]}; "
        f"use {fitting!r}"
    )


def _class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("schedulers need diffusers: pip install 'fastsd[torch]'") from error
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if cls is None:
        classes = sorted({class_name for class_name, _ in SAMPLERS.values()})
        near = difflib.get_close_matches(name.lower(), SAMPLERS, cutoff=0.5)
        near += difflib.get_close_matches(name, classes, cutoff=0.7)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"unknown scheduler {name!r}; {hint}known: {', '.join(SAMPLERS)}, or a diffusers class name")
    return cls


def _build(cls: Any, config: Mapping[str, Any], options: dict[str, Any]) -> Any:
    # Keys of other classes would only be warned of.
    own = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in config.items() if key in own or key.startswith("_")}
    try:
        return cls.from_config(config, **options)
    except ImportError as error:
        library = "torchsde" if cls.__name__ == "DPMSolverSDEScheduler" else "scipy"
        raise MissingExtraError(f"{cls.__name__} needs {library}: pip install {library}") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{cls.__name__} refuses the checkpoint's scheduler config: {error}") from None
