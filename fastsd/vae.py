"""Latents to pixels and back, through `diffusers.AutoencoderKL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def scale_factor(vae: Any) -> int:
    """Pixels per latent along a side: 2 for every level but the first (8 for Stable Diffusion)."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents [batch, C, H, W] as the sampler leaves them to pixels, float32 [batch, 8H, 8W, 3] in 0..1.

    One image at a time: memory does not grow with the batch, and no other image changes an image's bits.
    """
    import torch

    with torch.inference_mode():
        latents = (latents / vae.config.scaling_factor + _shift(vae)).to(vae.dtype)
        images = [vae.decode(one, return_dict=False)[0].float() for one in latents.split(1)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [batch, height, width, 3] in 0..1 to latents, float32 [batch, C, H, W]: the posterior's mean, scaled."""
    import torch

    with torch.inference_mode():
        pixels = (pixels * 2 - 1).permute(0, 3, 1, 2).to(vae.device, vae.dtype)
        latents = [vae.encode(one, return_dict=False)[0].mode().float() for one in pixels.split(1)]
        scaled: Tensor = (torch.cat(latents) - _shift(vae)) * vae.config.scaling_factor
        return scaled


def _shift(vae: Any) -> float:
    """The mean of the latents; SD3 and Flux have one."""
    return float(vae.config.shift_factor or 0.0)
