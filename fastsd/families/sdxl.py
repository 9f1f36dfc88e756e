"""Stable Diffusion XL (Podell et al. 2023) and SDXL Turbo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastsd.arrays import concatenate
from fastsd.families import Components, sd
from fastsd.text import Conditioning, Embedding, Encoder, Encoding

if TYPE_CHECKING:
    from torch import Tensor

    from fastsd.denoisers.unet import Constants

ENCODERS = (
    Encoder("tokenizer", "text_encoder", "CLIPTextModel", layer=-2),
    Encoder("tokenizer_2", "text_encoder_2", "CLIPTextModelWithProjection", layer=-2),
)
DENOISER = sd.DENOISER
DEFAULTS: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {"num_inference_steps": 50, "guidance_scale": 5.0},
}
ARGUMENTS = sd.ARGUMENTS | {
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "prompt_2",
    "negative_prompt_2",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
}
PATCH = 1
SAMPLE_SIZE = 128
ZEROED = True
guidance, schedule = sd.guidance, sd.schedule


def combine(components: Components, encodings: Sequence[Encoding], max_sequence_length: int) -> Embedding:
    """Hidden states of both CLIPs side by side [1, tokens, 768 + 1280], the second's pooled vector [1, 1280]."""
    return Embedding(concatenate([encoding.states for encoding in encodings], -1), encodings[1].pooled)


def widths(components: Components) -> tuple[int, int | None]:
    """Dimensions of context and pooled vector."""
    config = components.denoiser.config
    return config.cross_attention_dim, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


def prepare(components: Components, timesteps: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Constants:
    """All that no step changes, computed once per image; see `UNet.prepare`."""
    distilled = components.denoiser.config.time_cond_proj_dim is not None
    constants: Constants = components.denoiser.prepare(
        timesteps,
        conditioning.context,
        text_embeds=conditioning.pooled,
        time_ids=conditioning.time_ids,
        guidance_scale=conditioning.guidance_scale if distilled else None,
    )
    return constants
