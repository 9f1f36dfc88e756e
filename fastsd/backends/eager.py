"""The backend that runs the torch modules as they are."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsd import text, vae
from fastsd.backends import Engines, Functions
from fastsd.families import Components, compile_table
from fastsd.sampling.loop import row_by_row
from fastsd.text import Conditioning, Encoding


def engines(family: ModuleType, components: Components) -> Engines:
    """A checkpoint's modules, as they are."""
    named = zip((encoder.name for encoder in family.ENCODERS), components.text_encoders, strict=True)
    modules = {name: module for name, module in named if module is not None}
    weight = next(components.denoiser.parameters())
    return Engines(
        target="eager",
        precision=weight.dtype,
        device=weight.device,
        functions=functions(family, components),
        table=partial(compile_table, components),
        modules={**modules, family.DENOISER[0]: components.denoiser},
    )


def functions(family: ModuleType, components: Components) -> Functions:
    """The functions of a checkpoint's modules, on their device and in their dtype."""
    denoiser = components.denoiser
    weight = next(denoiser.parameters())
    device, dtype = weight.device, weight.dtype

    def read(place: int, ids: list[list[int]], clip_skip: int | None) -> Encoding:
        return text.read(family.ENCODERS[place], components.text_encoders[place], ids, clip_skip)

    @torch.inference_mode()
    def prepare(timesteps: Any, conditioning: Conditioning, size: tuple[int, int]) -> tuple[Tensor, ...]:
        scales = torch.as_tensor(conditioning.guidance_scale).to(device)
        constants: tuple[Tensor, ...] = family.prepare(
            components, torch.as_tensor(timesteps).to(device), conditioning._replace(guidance_scale=scales), size
        )
        return constants

    @torch.inference_mode()
    def denoise(latents: Tensor, modulation: Tensor, *constants: Tensor) -> Tensor:
        prediction: Tensor = denoiser(latents.to(dtype), modulation, *constants)
        return prediction

    def array(values: Any) -> Tensor:
        return torch.as_tensor(values).to(device, torch.float32)

    def cast(values: Any) -> Tensor:
        return torch.as_tensor(values).to(device, dtype)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return Functions(
        read=read,
        prepare=prepare,
        denoise=denoise,
        sample=row_by_row(denoise),
        decode=lambda latents: vae.decode(components.vae, latents),
        encode=lambda pixels: vae.encode(components.vae, pixels),
        array=array,
        cast=cast,
        admit=lambda images, halves, size: None,
        synchronize=synchronize,
    )
