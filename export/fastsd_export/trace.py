"""Components as modules with named inputs and outputs, ready for `torch.export`.

Each takes one component alone, so that a model larger than the memory is exported piece by piece. What they compute is
what `fastsd.text.read`, `prepare` of the family, the denoiser's `forward` and `fastsd.vae` compute; inputs and outputs
are float32 (ids int64) at every precision, except what `prepare` hands to the denoiser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsd import autoencoder
from fastsd.denoisers.flux import PATCH, POSITIONS, FluxTransformer
from fastsd.denoisers.layers import ROWS
from fastsd.denoisers.unet import UNet
from fastsd.families import Components
from fastsd.text import Conditioning, Encoder
from fastsd.vae import scale_factor

# Sizes of the examples. A batch of 1 would be taken for a constant, and of equal sizes one for the other. The latents
# of UNets are odd, so that no level of theirs is seen as twice the next.
BATCH, HEIGHT, WIDTH = 2, 17, 19
ROWS_COLUMNS = 3, 5  # of a transformer's tokens

Limits = dict[str, tuple[int, int]]


class Wrapper(nn.Module):
    """A component behind plain arguments."""

    def __init__(self, component: nn.Module) -> None:
        super().__init__()
        self.component: Any = component


@dataclass(frozen=True)
class Traced:
    """A component with plain named inputs, and what may vary.

    Attributes:
        component: "text_encoder" (or as the family's `ENCODERS` name it), "prepare", "denoiser", "vae_decoder" or
            "vae_encoder".
        module: takes `inputs` as keyword arguments and gives a tuple in the order of `outputs`; the component as it was
            loaded is `module.component`.
        inputs: examples by name.
        dims: of inputs and outputs, the axes that may vary: "batch", "height" and "width" (of the latents), "tokens",
            or an expression of these that `extent` reads.
        outputs: names.
        sizes: of the example, by the names in `dims`.
        limits: by such a name, what it must be a multiple of, and its largest value.
        low: inputs that have the precision of the graph; the others keep their dtype.
    """

    component: str
    module: Wrapper
    inputs: dict[str, Tensor]
    dims: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    sizes: dict[str, int]
    limits: Limits = field(default_factory=dict)
    low: tuple[str, ...] = ()


def shapes(traced: Traced, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Shapes of the inputs for sizes of the names in `traced.dims`."""
    given = {}
    for name, tensor in traced.inputs.items():
        given[name] = list(tensor.shape)
        for axis, dim in traced.dims.get(name, {}).items():
            given[name][axis] = extent(dim, sizes)
    return given


def extent(dim: str, sizes: Mapping[str, int]) -> int:
    """The length of an axis: a name, or a sum of products, each with a divisor, such as "tokens+height*width//4"."""
    total = 0
    for term in dim.split("+"):
        factors, _, divisor = term.partition("//")
        total += prod(int(f) if f.isdigit() else sizes[f] for f in factors.split("*")) // int(divisor or 1)
    return total


def names(dim: str) -> set[str]:
    """The names in an axis' expression."""
    return {part for part in dim.replace("+", "*").replace("//", "*").split("*") if not part.isdigit()}


def skeleton(
    module: Wrapper, dtype: torch.dtype, device: str = "cpu", *, layout: torch.memory_format = torch.contiguous_format
) -> Wrapper:
    """A copy of a module in another dtype whose weights have no data: it can be traced, and takes no memory.

    Of weights with four axes, those of convolutions, `layout` is that of their memory.

    In float16 the weights that `transformers` then keeps in float32 (T5's `wo`, whose products overflow) are float32.
    Buffers that are no weights keep their data.
    """
    kept = getattr(module.component, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None
    copies: dict[int, Any] = {} if device == "cpu" else {id(tensor): tensor.to(device) for tensor in module.buffers()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in module.state_dict(keep_vars=True).items():
            in_dtype = torch.float32 if any(part in (kept or ()) for part in name.split(".")) else dtype
            empty = torch.empty(
                tensor.shape,
                dtype=in_dtype if tensor.is_floating_point() else tensor.dtype,
                device=device,
                memory_format=layout if tensor.ndim == 4 else torch.contiguous_format,
            )
            parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(empty, requires_grad=False) if parameter else empty
    return copy.deepcopy(module, copies).eval()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def text_encoder(encoder: Encoder, module: Any, length: int, choices: int) -> Traced:
    """`fastsd.text.read` of one window: ids int64 [1, length] -> states [choices, length, dim], CLIP's pooled [1, dim].

    Args:
        encoder: of the family's `ENCODERS`.
        module: the `transformers` model.
        length: tokens; of T5 they may vary.
        choices: values of clip_skip, from 0, that an entry of the states is given for; 1 for T5.
    """
    ids = torch.arange(length).remainder(module.config.vocab_size).unsqueeze(0)
    wrapped = _TextEncoder(encoder, module, choices)
    if encoder.is_clip:
        return Traced(encoder.name, wrapped, {"ids": ids}, {}, ("states", "pooled"), {})
    dims = {"ids": {1: "tokens"}, "states": {1: "tokens"}}
    return Traced(encoder.name, wrapped, {"ids": ids}, dims, ("states",), {"tokens": length})


class _TextEncoder(Wrapper):
    def __init__(self, encoder: Encoder, module: nn.Module, choices: int) -> None:
        super().__init__(module)
        self.encoder, self.choices = encoder, choices

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        layer = self.encoder.layer
        if not self.encoder.is_clip:
            return (self.component(ids).last_hidden_state.float(),)
        output = self.component(ids, output_hidden_states=layer < -1 or self.choices > 1)
        states = [output.last_hidden_state] if layer == -1 else [output.hidden_states[layer]]
        for skip in range(1, self.choices):
            deeper = output.hidden_states[layer - skip]
            if layer == -1:  # as in `read`
                deeper = getattr(self.component, "text_model", self.component).final_layer_norm(deeper)
            states.append(deeper)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return torch.cat(states).float(), pooled.float()


def prepare(family: ModuleType, components: Components, tokens: int) -> Traced:
    """The family's `prepare` of `ROWS` steps.

    Args:
        family: of `fastsd.families`.
        components: only `denoiser` is read.
        tokens: of the text, in the example.
    """
    module = components.denoiser
    config = module.config
    unet, flux = isinstance(module, UNet), isinstance(module, FluxTransformer)
    context, pooled = family.widths(components)
    inputs = {"timesteps": _random(ROWS, BATCH).abs() * 300, "hidden_states": _random(BATCH, tokens, context)}
    if not unet or config.addition_embed_type is not None:
        inputs["pooled"] = _random(BATCH, pooled)
    if unet and config.addition_embed_type is not None:
        inputs["time_ids"] = _random(BATCH, 6).abs().mul(512).round()
    if (unet and config.time_cond_proj_dim is not None) or (flux and config.guidance_embeds):
        inputs["guidance_scale"] = _random(BATCH).abs() * 4
    dims = {name: {0: "batch"} for name in inputs} | {
        "timesteps": {1: "batch"},
        "hidden_states": {0: "batch", 1: "tokens"},
        "modulation": {1: "batch"},
        "context": {0: "batch", 1: "tokens"},
    }
    outputs: tuple[str, ...] = ("modulation", "context")
    sizes, limits = _sizes(module, tokens)
    if unet:
        sizes = {name: sizes[name] for name in ("batch", "tokens")}
        limits = {}
    else:
        channels = config.in_channels // 4 if flux else config.in_channels
        inputs["latents"] = _random(BATCH, channels, sizes["height"], sizes["width"])
        dims |= {"latents": {0: "batch", 2: "height", 3: "width"}, "position": {1: _positions(module)}}
        outputs = (*outputs, "position")
    return Traced("prepare", _Prepare(module, family.prepare), inputs, dims, outputs, sizes, limits)


class _Prepare(Wrapper):
    def __init__(self, denoiser: nn.Module, prepare: Callable[..., Any]) -> None:
        super().__init__(denoiser)
        self.prepare = prepare

    def forward(
        self,
        timesteps: Tensor,
        hidden_states: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        components = Components((), (), self.component, None, {}, {})
        conditioning = Conditioning(hidden_states, pooled, guidance_scale, time_ids)
        size = (0, 0) if latents is None else (latents.shape[2], latents.shape[3])  # a UNet reads none
        return tuple(self.prepare(components, timesteps, conditioning, size))


def denoiser(family: ModuleType, components: Components, tokens: int) -> Traced:
    """One step: latents [B, C, h, w] and the constants of `prepare` -> prediction [B, C, h, w].

    Args:
        family: of `fastsd.families`.
        components: only `denoiser` is read.
        tokens: of the text, in the example.
    """
    module = components.denoiser
    sizes, limits = _sizes(module, tokens)
    before = prepare(family, components, tokens)
    with torch.no_grad():
        constants = skeleton(before.module, torch.float32)(**before.inputs)
    channels = module.config.in_channels // 4 if isinstance(module, FluxTransformer) else module.config.in_channels
    inputs = {"latents": _random(BATCH, channels, sizes["height"], sizes["width"])}
    for name, constant in zip(before.outputs, constants, strict=True):
        inputs[name] = _random(*(constant.shape[1:] if name == "modulation" else constant.shape))
    dims = {name: before.dims[name] for name in before.outputs} | {
        "latents": {0: "batch", 2: "height", 3: "width"},
        "modulation": {0: "batch"},
        "prediction": {0: "batch", 2: "height", 3: "width"},
    }
    rotary = ("position",) if isinstance(module, FluxTransformer) else ()  # float32 always
    low = tuple(name for name in before.outputs if name not in rotary)
    return Traced("denoiser", _Denoiser(module), inputs, dims, ("prediction",), sizes, limits, low)


class _Denoiser(Wrapper):
    def forward(
        self, latents: Tensor, modulation: Tensor, context: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor]:
        constants = (modulation, context) if position is None else (modulation, context, position)
        return (self.component(latents.to(modulation.dtype), *constants).float(),)


def _sizes(denoiser: Any, tokens: int) -> tuple[dict[str, int], Limits]:
    """Sizes of the example, and the limits of the latents."""
    if isinstance(denoiser, UNet):
        return {"batch": BATCH, "height": HEIGHT, "width": WIDTH, "tokens": tokens}, {}
    flux = isinstance(denoiser, FluxTransformer)
    patch, positions = (PATCH, POSITIONS) if flux else (denoiser.config.patch_size, denoiser.config.pos_embed_max_size)
    rows, columns = ROWS_COLUMNS
    sizes = {"batch": BATCH, "height": patch * rows, "width": patch * columns, "tokens": tokens}
    return sizes, dict.fromkeys(("height", "width"), (patch, patch * positions))


def _positions(denoiser: Any) -> str:
    """The length of the table of positions: of Flux, text and image tokens, of SD3 image tokens."""
    if isinstance(denoiser, FluxTransformer):
        return f"tokens+height*width//{PATCH**2}"
    return f"height*width//{denoiser.config.patch_size**2}"


def vae_decoder(vae: Any) -> Traced:
    """`fastsd.vae.decode` of one image: latents [1, C, h, w] as the sampler leaves them -> pixels [1, 8h, 8w, 3]."""
    latents = _random(1, vae.config.latent_channels, HEIGHT, WIDTH)
    return _vae("vae_decoder", _Decoder(vae), {"latents": latents}, "pixels")


def vae_encoder(vae: Any) -> Traced:
    """`fastsd.vae.encode` of one image: pixels [1, 8h, 8w, 3] in 0..1 -> latents [1, C, h, w], the mean, scaled."""
    factor = scale_factor(vae)
    pixels = _random(1, HEIGHT * factor, WIDTH * factor, 3).sigmoid()
    return _vae("vae_encoder", _Encoder(vae), {"pixels": pixels}, "latents")


def _vae(component: str, module: Wrapper, inputs: dict[str, Tensor], output: str) -> Traced:
    factor = scale_factor(module.component)
    dims = {"latents": {2: "height", 3: "width"}, "pixels": {1: f"{factor}*height", 2: f"{factor}*width"}}
    return Traced(component, module, inputs, dims, (output,), {"height": HEIGHT, "width": WIDTH})


class _Decoder(Wrapper):
    def forward(self, latents: Tensor) -> tuple[Tensor]:
        vae = self.component
        latents = (latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(vae.dtype)
        # Nodes of a graph for another runtime name the modules that they come from; on CUDA our kernels go into it.
        image = autoencoder.decoder(vae, latents) if latents.is_cuda else vae.decode(latents, return_dict=False)[0]
        image = image.float()
        return ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1),)


class _Encoder(Wrapper):
    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        vae = self.component
        pixels = (pixels * 2 - 1).permute(0, 3, 1, 2).to(vae.dtype)
        if pixels.is_cuda:
            latents = autoencoder.encoder(vae, pixels).chunk(2, dim=1)[0].float()
        else:
            latents = vae.encode(pixels, return_dict=False)[0].mode().float()
        return ((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor,)
