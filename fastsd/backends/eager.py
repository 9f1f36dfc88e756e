"""The backend that runs the torch modules as they are; on a GPU a step of the sampler is one captured graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsd import autoencoder, text, vae
from fastsd.backends import Engines, Functions
from fastsd.device import pick_device
from fastsd.errors import InputError
from fastsd.families import Components, compile_table
from fastsd.sampling.loop import row_by_row
from fastsd.text import Conditioning, Encoding

if TYPE_CHECKING:
    from fastsd.sampling.graph import Graphs

Network = Callable[[Tensor], Tensor]  # one map of the VAE to the other


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


def functions(
    family: ModuleType, components: Components, graphs: Graphs | None = None, *, decoder: Network | None = None
) -> Functions:
    """The functions of a checkpoint's modules, on their device and in their dtype.

    Args:
        family: of `fastsd.families`.
        components: the checkpoint's.
        graphs: capture a step, the text encoders and the VAE; None: a GPU's own, and none on a CPU.
        decoder: stands for `autoencoder.decoder` of the VAE.
    """
    denoiser = components.denoiser
    weight = next(denoiser.parameters())
    device, dtype = weight.device, weight.dtype
    if graphs is None and device.type == "cuda":
        from fastsd.sampling.graph import Cuda, Graphs

        graphs = Graphs(Cuda(device))

    def read(place: int, ids: list[list[int]], clip_skip: int | None) -> Encoding:
        tokens = torch.tensor(ids, device=components.text_encoders[place].device)
        return readers[place](tokens, clip_skip=clip_skip)

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

    sample = row_by_row(denoise)
    encoders = list(zip(family.ENCODERS, components.text_encoders, strict=True))
    readers: list[Callable[..., Encoding]] = [partial(text.states, *each) for each in encoders]
    decoder = decoder or partial(autoencoder.decoder, components.vae)
    encoder: Network = partial(autoencoder.encoder, components.vae)
    if graphs is not None:
        from fastsd.sampling.graph import captured, sampler

        sample = sampler(denoise, graphs, _read_by_steps(denoiser))
        readers = [
            captured(read, graphs, [] if module is None else list(module.parameters()))
            for read, (_, module) in zip(readers, encoders, strict=True)
        ]
        decoder, encoder = (captured(net, graphs, list(components.vae.parameters())) for net in (decoder, encoder))

    def array(values: Any) -> Tensor:
        return torch.as_tensor(values).to(device, torch.float32)

    def cast(values: Any) -> Tensor:
        return torch.as_tensor(values).to(device, dtype)

    def synchronize() -> None:
        if device.type == "cuda":  # not the whole device: another thread may be capturing
            torch.cuda.current_stream(device).synchronize()

    return Functions(
        read=read,
        prepare=prepare,
        denoise=denoise,
        sample=sample,
        decode=lambda latents: vae.decode(components.vae, latents, network=decoder),
        encode=lambda pixels: vae.encode(components.vae, pixels, network=encoder),
        array=array,
        cast=cast,
        admit=lambda images, halves, size: None,
        synchronize=synchronize,
    )


def _read_by_steps(denoiser: Any) -> list[Tensor]:
    """The weights that a step reads: all but those of `prepare`, which may wait elsewhere meanwhile."""
    waiting = tuple(f"{name}." for name in denoiser.prepare_only())
    return [weight for name, weight in denoiser.named_parameters() if not name.startswith(waiting)]


def available(device: str = "cpu", target: str = "eager") -> str | None:
    """None if a checkpoint's modules run on a device here; else the sentence why not, and what would make it possible.

    Whether the libraries that read a checkpoint are installed is looked up, not tried: importing them takes seconds.
    """
    for library in ("diffusers", "transformers"):
        if find_spec(library) is None:
            return f"{library} is not installed: pip install 'fastsd[torch]'"
    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no CUDA GPU: install NVIDIA's driver and a torch that was built for CUDA"
        )
    try:
        pick_device(device)
    except InputError as error:
        return str(error)
    return None
