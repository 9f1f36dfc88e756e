"""Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastsd.arrays import concatenate, zeros
from fastsd.families import Components
from fastsd.text import Conditioning, Embedding, Encoder, Encoding

if TYPE_CHECKING:
    from torch import Tensor

    from fastsd.denoisers.sd3 import SD3Transformer
    from fastsd.denoisers.transformer import Constants


def build(config: Mapping[str, Any]) -> SD3Transformer:
    """The denoiser of a `transformer/config.json`."""
    from fastsd.denoisers.sd3 import SD3Transformer

    return SD3Transformer(config)


ENCODERS = (
    Encoder("tokenizer", "text_encoder", "CLIPTextModelWithProjection", layer=-2),
    Encoder("tokenizer_2", "text_encoder_2", "CLIPTextModelWithProjection", layer=-2),
    Encoder("tokenizer_3", "text_encoder_3", "T5EncoderModel", optional=True),
)
DENOISER = ("transformer", build)
DEFAULTS: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": {"num_inference_steps": 28, "guidance_scale": 7.0, "max_sequence_length": 256},
}
ARGUMENTS = {
    "clip_skip",
    "long_prompt",
    "max_sequence_length",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "prompt_2",
    "prompt_3",
    "negative_prompt_2",
    "negative_prompt_3",
}
PATCH = 2
SAMPLE_SIZE = 128
ZEROED = False


def combine(components: Components, encodings: Sequence[Encoding | None], max_sequence_length: int) -> Embedding:
    """Both CLIPs side by side, padded to T5's width, then T5 (zeros without it) along the tokens; both pooled."""
    first, second, t5 = encodings
    assert first is not None and second is not None and first.pooled is not None and second.pooled is not None
    width, _ = widths(components)
    clip = [first.states, second.states]
    missing = width - sum(states.shape[-1] for states in clip)
    clip.append(zeros((1, first.states.shape[1], missing), first.states))
    longer = zeros((1, max_sequence_length, width), first.states) if t5 is None else t5.states
    context = concatenate([concatenate(clip, -1), longer], 1)
    return Embedding(context, concatenate([first.pooled, second.pooled], -1))


def widths(components: Components) -> tuple[int, int | None]:
    """Dimensions of context and pooled vector."""
    config = components.denoiser.config
    return config.joint_attention_dim, config.pooled_projection_dim


def guidance(components: Components, guidance_scale: float, true_cfg_scale: float, negative: bool) -> float:
    """The scale of classifier-free guidance."""
    return guidance_scale


def shift(config: Any, tokens: int, max_shift: float) -> float:
    """`mu`, a schedule's shift by the number of image tokens (`diffusers` `calculate_shift`)."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (most - least)
    return float(tokens * slope + (base - slope * least))


def schedule(
    components: Components, scheduler: Any, steps: int | None, tokens: int
) -> tuple[int | None, dict[str, Any]]:
    """Steps and other arguments of the scheduler: `mu` where it shifts by the image's size."""
    dynamic = scheduler.config.get("use_dynamic_shifting")
    return steps, {"mu": shift(scheduler.config, tokens, 1.16)} if dynamic else {}


def prepare(components: Components, timesteps: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Constants:
    """All that no step changes, computed once per image; see `SD3Transformer.prepare`."""
    height, width = size
    constants: Constants = components.denoiser.prepare(
        timesteps, conditioning.context, conditioning.pooled, height=height, width=width
    )
    return constants
