"""What a family is: one module per family, found by the `_class_name` of a checkpoint's `model_index.json`.

A family's module has
    ENCODERS    its text encoders, in the checkpoint's order
    DENOISER    the denoiser's component name, and what builds it of its configuration
    DEFAULTS    steps and guidance by pipeline class, as in `diffusers`, and T5's tokens
    ARGUMENTS   what a call takes beside `request.Arguments`' common ones
    PATCH       latents that one token of the denoiser has on a side
    SAMPLE_SIZE latents on a side of the default image, where the configuration has none
    ZEROED      whether no negative prompt means zeros (else the empty text)
    combine     encodings of a prompt -> context and pooled vector
    widths      dimensions of context and pooled vector
    guidance    the scale of classifier-free guidance that an image needs
    schedule    steps and other arguments of the scheduler for an image's size
    prepare     all that no step changes -> the denoiser's constants
None of them imports torch: bundles run without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsd.errors import InputError
from fastsd.files import one_line

if TYPE_CHECKING:
    import torch

    from fastsd.checkpoint import Source
    from fastsd.sampling.table import StepTable

FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}


@dataclass(frozen=True)
class Components:
    """The parts of a checkpoint, on their device and in their dtype.

    Attributes:
        tokenizers: `fastsd.tokenizer.Tokenizer`s, one per text encoder.
        text_encoders: `transformers` modules; None for an optional one that the checkpoint leaves out.
        denoiser: one of `fastsd.denoisers`.
        vae: `diffusers.AutoencoderKL`.
        scheduler: scheduler_config.json.
        index: model_index.json.
    """

    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    denoiser: Any
    vae: Any
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]


def family(class_name: str) -> ModuleType:
    """The module of a pipeline class.

    Raises:
        InputError: the class is not among those that run here.
    """
    from importlib import import_module

    if class_name not in FAMILIES:
        raise InputError(
            f"this checkpoint is a {class_name}, which this version does not run: use one of {', '.join(FAMILIES)}"
        )
    return import_module(f"fastsd.families.{FAMILIES[class_name]}")


def load(source: Source, dtype: torch.dtype, device: torch.device, only: Collection[str] | None = None) -> Components:
    """Build the components of a checkpoint and read their weights.

    Args:
        source: the checkpoint.
        dtype: of the weights (SDXL's VAE: float32 in place of float16).
        device: where they go.
        only: names of the components whose weights are read; the others stay on the meta device. None: all.

    Raises:
        InputError: a file is missing, broken or asks for what is not implemented.
    """
    import torch
    import transformers
    from diffusers import AutoencoderKL

    from fastsd.denoisers import layout

    module = family(source.index["_class_name"])
    name, denoiser_class = module.DENOISER
    present = [encoder for encoder in module.ENCODERS if not _left_out(source, encoder)]
    if not isinstance(source.index.get("_fastsd", {}), Mapping):
        raise InputError(f'"_fastsd" in model_index.json must be an object, not {source.index["_fastsd"]!r}')

    def build(component: str, make: Callable[[dict[str, Any]], Any]) -> Any:
        config = source.config(component)
        try:
            with torch.device("meta"):
                return make(config)
        except InputError:
            raise
        except Exception as error:  # of the library whose class it is
            raise InputError(
                f"no {component} can be built of its configuration ({type(error).__name__}: {one_line(error)[:200]}): "
                "restore its config.json"
            ) from error

    denoiser = build(name, denoiser_class)
    vae = build("vae", AutoencoderKL.from_config)
    text_encoders = {}
    for encoder in present:
        kind = getattr(transformers, encoder.kind)
        text_encoders[encoder.name] = build(encoder.name, partial(_text_encoder, kind))
    _check_vae(module, denoiser, vae)
    components = Components(
        tokenizers=tuple(source.tokenizer(one.tokenizer) if one in present else None for one in module.ENCODERS),
        text_encoders=tuple(text_encoders.get(encoder.name) for encoder in module.ENCODERS),
        denoiser=denoiser,
        vae=vae,
        scheduler=source.config("scheduler"),
        index=source.index,
    )
    for component, part in {**text_encoders, name: denoiser, "vae": vae}.items():
        if only is None or component in only:
            source.load(part, component, _vae_dtype(module, dtype) if part is vae else dtype, device)
            if part is denoiser:
                layout(denoiser)
    return components


def compile_table(
    components: Components, scheduler: Any, steps: int | None, tokens: int, arguments: Mapping[str, Any]
) -> StepTable:
    """The table of a sampler for a checkpoint.

    Args:
        components: of the checkpoint.
        scheduler: see `schedulers.resolve_scheduler`.
        steps: None where `arguments` hold a schedule.
        tokens: of the image; some schedules shift with its size.
        arguments: eta, sigmas or timesteps.

    Raises:
        InputError: the scheduler is unknown, refuses its arguments or is no linear recurrence.
    """
    from fastsd.sampling.schedulers import resolve_scheduler
    from fastsd.sampling.table import StepTable

    resolved = resolve_scheduler(scheduler, components.scheduler)
    module = family(components.index["_class_name"])
    steps, sized = module.schedule(components, resolved, steps, tokens)
    given = {name: np.array(value) if name == "sigmas" else value for name, value in arguments.items()}
    return StepTable.from_scheduler(resolved, steps, **{**sized, **given})


def _text_encoder(kind: Any, config: dict[str, Any]) -> Any:
    return kind(kind.config_class(**config))


def adopt(pipeline: Any) -> Components:
    """The components of a `diffusers` pipeline; the weights are shared, not copied.

    Raises:
        InputError: a component is missing, or asks for what is not implemented.
    """
    import torch

    from fastsd import tokenizer

    module = family(type(pipeline).__name__)
    name, denoiser_class = module.DENOISER
    for needed in (name, "vae", "scheduler", *(one.name for one in module.ENCODERS if not one.optional)):
        if getattr(pipeline, needed, None) is None:
            raise InputError(f"the {type(pipeline).__name__} has no {needed}: load it with one")
    theirs, vae = getattr(pipeline, name), pipeline.vae
    with torch.device("meta"):
        denoiser = denoiser_class(theirs.config)
    _check_vae(module, denoiser, vae)
    try:
        denoiser.load_state_dict(theirs.state_dict(), assign=True)
    except RuntimeError as error:  # layers of a LoRA, quantised weights
        raise InputError(
            f"the weights of the {type(pipeline).__name__}'s {name} are not plain: unload its LoRAs, and adopt "
            "none that is quantised"
        ) from error
    if vae.dtype != (dtype := _vae_dtype(module, vae.dtype)):
        vae = copy.deepcopy(vae).to(dtype)  # the pipeline's own stays as it is
    encoders = [getattr(pipeline, encoder.name) for encoder in module.ENCODERS]
    for one, encoder in zip(module.ENCODERS, encoders, strict=True):
        if encoder is not None and any(".lora_" in key for key, _ in encoder.named_parameters()):
            raise InputError(
                f"the weights of the {type(pipeline).__name__}'s {one.name} are not plain: unload its LoRAs"
            )
    return Components(
        tokenizers=tuple(
            None if encoder is None else tokenizer.from_transformers(getattr(pipeline, one.tokenizer))
            for encoder, one in zip(encoders, module.ENCODERS, strict=True)
        ),
        text_encoders=tuple(encoders),
        denoiser=denoiser.eval().requires_grad_(False),
        vae=vae,
        scheduler={**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__},
        index={**pipeline.config, "_class_name": type(pipeline).__name__},
    )


def _left_out(source: Source, encoder: Any) -> bool:
    """Whether the checkpoint does without an optional encoder."""
    return encoder.optional and (source.index.get(encoder.name) or [None])[0] is None


def _vae_dtype(module: ModuleType, dtype: torch.dtype) -> torch.dtype:
    """SDXL's VAE overflows in float16; `diffusers` runs it in float32 then, too."""
    import torch

    return torch.float32 if dtype == torch.float16 and module.__name__.endswith("sdxl") else dtype


def _check_vae(module: ModuleType, denoiser: Any, vae: Any) -> None:
    channels, reads = vae.config.latent_channels, denoiser.config.in_channels
    if module.__name__.endswith("flux"):
        reads //= 4  # packed, 2x2 latents to a token
    if reads != channels:
        raise InputError(
            f"the denoiser reads {reads} channels and the VAE makes {channels}: inpainting, depth and editing models "
            "are not implemented, use a text-to-image checkpoint"
        )
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise InputError("the VAE's latents_mean and latents_std are not implemented: use another checkpoint")
