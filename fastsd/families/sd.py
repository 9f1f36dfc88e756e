"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), v-prediction, Turbo and LCM-distilled checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastsd.families import Components
from fastsd.text import Conditioning, Embedding, Encoder, Encoding

if TYPE_CHECKING:
    from torch import Tensor

    from fastsd.denoisers.unet import Constants, UNet


def build(config: Mapping[str, Any]) -> UNet:
    """The denoiser of a `unet/config.json`."""
    from fastsd.denoisers.unet import UNet

    return UNet(config)


ENCODERS = (Encoder("tokenizer", "text_encoder", "CLIPTextModel"),)
DENOISER = ("unet", build)
DEFAULTS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"num_inference_steps": 50, "guidance_scale": 7.5},
    "LatentConsistencyModelPipeline": {"num_inference_steps": 4, "guidance_scale": 8.5},
}
ARGUMENTS = {"clip_skip", "long_prompt"}
PATCH = 1
SAMPLE_SIZE = 64  # latents on a side, where the configuration has none
ZEROED = False  # whether no negative prompt means zeros


def combine(components: Components, encodings: Sequence[Encoding], max_sequence_length: int) -> Embedding:
    """CLIP's hidden states [1, tokens, dim]."""
    return Embedding(encodings[0].states, None)


def widths(components: Components) -> tuple[int, int | None]:
    """Dimensions of context and pooled vector."""
    return components.denoiser.config.cross_attention_dim, None


def guidance(components: Components, guidance_scale: float, true_cfg_scale: float, negative: bool) -> float:
    """The scale of classifier-free guidance: none for an LCM-distilled UNet, which embeds its guidance."""
    return guidance_scale if components.denoiser.config.time_cond_proj_dim is None else 1.0


def schedule(
    components: Components, scheduler: Any, steps: int | None, tokens: int
) -> tuple[int | None, dict[str, Any]]:
    """Steps and other arguments of the scheduler: the image's size does not matter."""
    return steps, {}


def prepare(components: Components, timesteps: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Constants:
    """All that no step changes, computed once per image; see `UNet.prepare`."""
    distilled = components.denoiser.config.time_cond_proj_dim is not None
    scales = conditioning.guidance_scale if distilled else None
    constants: Constants = components.denoiser.prepare(timesteps, conditioning.context, guidance_scale=scales)
    return constants
