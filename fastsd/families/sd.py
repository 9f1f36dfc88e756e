"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), v-prediction, Turbo and LCM-distilled checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd import checkpoint
from fastsd.denoisers.unet import Constants, UNet
from fastsd.errors import InputError

# By pipeline class, as in diffusers.
DEFAULTS = {
    "StableDiffusionPipeline": {"num_inference_steps": 50, "guidance_scale": 7.5},
    "LatentConsistencyModelPipeline": {"num_inference_steps": 4, "guidance_scale": 8.5},
}


@dataclass(frozen=True)
class Components:
    """The parts of a checkpoint, on their device and in their dtype."""

    tokenizer: Any  # transformers.CLIPTokenizer
    text_encoder: Any  # transformers.CLIPTextModel
    denoiser: UNet
    vae: Any  # diffusers.AutoencoderKL
    scheduler: Mapping[str, Any]  # scheduler_config.json


def load(folder: Path, *, variant: str | None, dtype: torch.dtype, device: torch.device) -> Components:
    """Read a checkpoint folder.

    Raises:
        InputError: a file is missing, broken or asks for what is not implemented.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def weights(module: Any, component: str) -> Any:
        checkpoint.load_weights(module, folder, component, dtype, device, variant)
        return module

    scheduler = checkpoint.read_config(folder, "scheduler", "scheduler_config.json")
    configs = {name: checkpoint.read_config(folder, name) for name in ("text_encoder", "unet", "vae")}
    with torch.device("meta"):
        denoiser = UNet(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    tokenizer_files = {path.name for path in (folder / "tokenizer").glob("*")}
    if not ({"vocab.json", "merges.txt"} <= tokenizer_files or "tokenizer.json" in tokenizer_files):
        raise InputError(
            f"{str(folder / 'tokenizer')!r} holds no tokenizer: it needs vocab.json and merges.txt, or tokenizer.json"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{str(folder / 'tokenizer')!r} is no CLIP tokenizer ({reason}): download the checkpoint again"
        ) from error
    return Components(
        tokenizer=tokenizer,
        text_encoder=weights(text_encoder, "text_encoder"),
        denoiser=weights(denoiser, "unet"),
        vae=weights(vae, "vae"),
        scheduler=scheduler,
    )


def adopt(pipeline: Any) -> Components:
    """The components of a `diffusers` pipeline; the weights are shared, not copied."""
    with torch.device("meta"):
        denoiser = UNet(pipeline.unet.config)
    denoiser.load_state_dict(pipeline.unet.state_dict(), assign=True)
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    return Components(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        denoiser=denoiser.eval().requires_grad_(False),
        vae=pipeline.vae,
        scheduler=scheduler,
    )


def guides(components: Components, guidance_scale: float) -> bool:
    """Whether an image needs the unconditional half: an LCM-distilled UNet embeds its guidance instead."""
    return guidance_scale > 1 and components.denoiser.config.time_cond_proj_dim is None


def prepare(components: Components, timesteps: Tensor, states: Tensor, guidance_scales: list[float]) -> Constants:
    """All that no step changes, computed once per image.

    Args:
        components: of this family.
        timesteps: [steps, batch].
        states: text hidden states [batch, tokens, dim].
        guidance_scales: one per batch entry; only an LCM-distilled UNet reads them.
    """
    scales = None
    if components.denoiser.config.time_cond_proj_dim is not None:
        scales = torch.tensor(guidance_scales, dtype=torch.float64, device=states.device)
    return components.denoiser.prepare(timesteps, states, guidance_scale=scales)
