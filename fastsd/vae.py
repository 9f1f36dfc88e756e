"""Latents to pixels and back, through `diffusers.AutoencoderKL`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from fastsd.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tiled = bool | Literal["auto"]
Part = Literal["decoder", "encoder"]
Network = Callable[["Tensor"], "Tensor"]

# VAEs that overflowed in float16, and in which dtype they run since.
_WIDER: MutableMapping[Any, torch.dtype] = WeakKeyDictionary()


def scale_factor(vae: Any) -> int:
    """Pixels per latent along a side: 2 for every level but the first (8 for Stable Diffusion)."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def decode(vae: Any, latents: Tensor, *, tiled: Tiled = "auto", network: Network | None = None) -> Tensor:
    """Latents [batch, C, H, W] as the sampler leaves them to pixels, float32 [batch, 8H, 8W, 3] in 0..1.

    One image at a time: memory does not grow with the batch, and no other image changes an image's bits.

    Args:
        vae: `diffusers.AutoencoderKL`; it is only read.
        latents: on its device.
        tiled: whether to go over an image in strips, which gives the same image up to rounding (see `autoencoder`);
            "auto" where the device lacks the memory for it whole.
        network: `autoencoder.decoder` of this VAE, compiled or captured: takes latents of one image in the VAE's dtype.
            None: as it is.

    Raises:
        InputError: `tiled` is something else.
    """
    import torch

    with torch.inference_mode():
        latents = latents / vae.config.scaling_factor + _shift(vae)
        images = _run(vae, "decoder", latents, tiled, network)
        return images.div_(2).add_(0.5).clamp_(0, 1).permute(0, 2, 3, 1)


def encode(vae: Any, pixels: Tensor, *, tiled: Tiled = "auto", network: Network | None = None) -> Tensor:
    """Pixels [batch, height, width, 3] in 0..1 to latents, float32 [batch, C, H, W]: the posterior's mean, scaled.

    Args:
        vae: as in `decode`.
        pixels: anywhere.
        tiled: as in `decode`.
        network: `autoencoder.encoder` of this VAE, likewise.

    Raises:
        InputError: `tiled` is something else.
    """
    import torch

    with torch.inference_mode():
        pixels = (pixels * 2 - 1).permute(0, 3, 1, 2).to(vae.device)
        moments = _run(vae, "encoder", pixels, tiled, network)
        scaled: Tensor = (moments.chunk(2, dim=1)[0] - _shift(vae)) * vae.config.scaling_factor
        return scaled


def _shift(vae: Any) -> float:
    """The mean of the latents; SD3 and Flux have one."""
    return float(vae.config.shift_factor or 0.0)


def _run(vae: Any, part: Part, maps: Tensor, tiled: Tiled, network: Network | None) -> Tensor:
    """The network's outputs for a batch of maps, in a dtype that holds them."""
    import torch

    half = vae.dtype == torch.float16
    dtype = _WIDER.get(vae, vae.dtype) if half else vae.dtype
    striped = _striped(vae, part, maps, dtype, tiled)
    outputs = in_dtype(vae, part, maps, dtype, striped, network)
    if half and dtype == vae.dtype and not outputs.isfinite().all() and maps.isfinite().all():
        _WIDER[vae] = dtype = _wider(maps.device)
        warnings.warn(
            f"the VAE overflows in float16, so it runs in {str(dtype).removeprefix('torch.')} from now on: load the "
            "checkpoint with dtype='bfloat16' or 'float32', or with a VAE that was made for float16",
            stacklevel=4,
        )
        outputs = in_dtype(vae, part, maps, dtype, _striped(vae, part, maps, dtype, tiled), network)
    return outputs


def in_dtype(
    vae: Any, part: Part, maps: Tensor, dtype: torch.dtype, striped: bool = False, network: Network | None = None
) -> Tensor:
    """Float32 outputs of `autoencoder.decoder` or `encoder` for a batch of maps, one by one.

    Args:
        vae: see `decode`.
        part: which of the two.
        maps: [batch, channels, height, width].
        dtype: to compute in.
        striped: see `autoencoder`.
        network: see `decode`; it is left aside where it does not fit.
    """
    import torch

    from fastsd import autoencoder

    if network is None or striped or dtype != vae.dtype:
        network = partial(getattr(autoencoder, part), vae, striped=striped)
    # With the channels of a pixel side by side convolutions are faster on GPUs in half precision, and on the CPU: a
    # decode with Stable Diffusion's VAE takes 0.86 of the time in bfloat16 and in float32.
    return torch.cat([network(one.to(dtype, memory_format=torch.channels_last)).float() for one in maps.split(1)])


def _striped(vae: Any, part: Part, maps: Tensor, dtype: torch.dtype, tiled: Tiled) -> bool:
    if tiled != "auto":
        if not isinstance(tiled, bool):
            raise InputError(f"tiled is {tiled!r}; it must be True, False or 'auto'")
        return tiled
    from fastsd import memory

    needed = memory.of_vae(vae, part, (maps.shape[2], maps.shape[3]), dtype, maps.device)
    return needed > memory.free(maps.device)


def _wider(device: torch.device) -> torch.dtype:
    """The dtype with the exponents of float32 in which a device computes fastest."""
    import torch

    from fastsd.device import pick_dtype

    picked = pick_dtype("auto", device)
    return torch.float32 if picked == torch.float16 else picked
