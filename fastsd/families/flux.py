"""Flux.1 schnell and dev (Black Forest Labs 2024)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsd.errors import InputError
from fastsd.families import Components, sd3
from fastsd.text import Conditioning, Embedding, Encoder, Encoding

if TYPE_CHECKING:
    from torch import Tensor

    from fastsd.denoisers.flux import FluxTransformer
    from fastsd.denoisers.transformer import Constants


def build(config: Mapping[str, Any]) -> FluxTransformer:
    """The denoiser of a `transformer/config.json`."""
    from fastsd.denoisers.flux import FluxTransformer

    return FluxTransformer(config)


ENCODERS = (
    Encoder("tokenizer", "text_encoder", "CLIPTextModel"),
    Encoder("tokenizer_2", "text_encoder_2", "T5EncoderModel"),
)
DENOISER = ("transformer", build)
DEFAULTS: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 512},
}
ARGUMENTS = {
    "max_sequence_length",
    "true_cfg_scale",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "prompt_2",
    "negative_prompt_2",
}
PATCH = 2
SAMPLE_SIZE = 128
ZEROED = False


def combine(components: Components, encodings: Sequence[Encoding], max_sequence_length: int) -> Embedding:
    """T5's hidden states [1, tokens, 4096] and CLIP's pooled vector [1, 768]."""
    return Embedding(encodings[1].states, encodings[0].pooled)


def widths(components: Components) -> tuple[int, int | None]:
    """Dimensions of context and pooled vector."""
    config = components.denoiser.config
    return config.joint_attention_dim, config.pooled_projection_dim


def guidance(components: Components, guidance_scale: float, true_cfg_scale: float, negative: bool) -> float:
    """The scale of classifier-free guidance: `guidance_scale` is embedded, `true_cfg_scale` is the real one."""
    return true_cfg_scale if negative else 1.0


def schedule(
    components: Components, scheduler: Any, steps: int | None, tokens: int
) -> tuple[int | None, dict[str, Any]]:
    """Steps and other arguments of the scheduler: Flux's own sigmas, unless the scheduler or the caller has others.

    Raises:
        InputError: the scheduler knows no shift by the image's size.
    """
    if "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise InputError(
            f"{type(scheduler).__name__} has no shift by the image's size (mu), which Flux needs: use 'flow_euler'"
        )
    mu = {"mu": sd3.shift(scheduler.config, tokens, 1.15)}
    if steps is None or scheduler.config.get("use_flow_sigmas"):
        return steps, mu
    return None, {"sigmas": np.linspace(1.0, 1 / steps, steps), **mu}


def prepare(components: Components, timesteps: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Constants:
    """All that no step changes, computed once per image; see `FluxTransformer.prepare`."""
    height, width = size
    constants: Constants = components.denoiser.prepare(
        timesteps,
        conditioning.context,
        conditioning.pooled,
        height=height,
        width=width,
        guidance_scale=conditioning.guidance_scale if components.denoiser.config.guidance_embeds else None,
    )
    return constants
