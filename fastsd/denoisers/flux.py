"""The transformer of Flux.1 (Black Forest Labs 2024).

    modulation, *rest = transformer.prepare(timesteps, context, pooled, height=128, width=128)    # once per image
    for i in range(steps):
        prediction = transformer(latents, modulation[i], *rest)

Parameter names and shapes are those of `diffusers.FluxTransformer2DModel`, but latents are [B, C, H, W] as in all
families: patches are taken apart and put together here.
Shapes: B batch, C latent channels, H and W latent height and width, D width of the tokens, L text and image tokens
together, M packed modulation columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd import ops
from fastsd.denoisers.transformer import (
    Constants,
    JointBlock,
    Modulation,
    SelfAttention,
    TimeTextEmbedding,
    assign_columns,
    check_conditioning,
    check_size,
    modulation_rows,
    patches,
    prepare_only,
    read_config,
    refusal,
)
from fastsd.errors import InputError

PATCH = 2  # latents per token and side
POSITIONS = 512  # on an axis: those of 8192 pixels


class FluxTransformer(nn.Module):
    """Predict the velocity in latents, given rows of `Constants`.

    Over a quarter of the parameters serves only `prepare`: the timestep, guidance and text embeddings and the
    modulations of all blocks, listed by `prepare_only`.

    Args:
        config: the keys of a diffusers `transformer/config.json`; absent ones have diffusers' defaults.

    Raises:
        InputError: the configuration asks for something that is not implemented here, or contradicts itself.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = c = FluxConfig.from_diffusers(config)
        dim, heads = c.inner_dim, c.num_attention_heads
        self.time_text_embed = TimeTextEmbedding(dim, c.pooled_projection_dim, c.guidance_embeds)
        self.context_embedder = nn.Linear(c.joint_attention_dim, dim)
        self.x_embedder = nn.Linear(c.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(dim, heads, qk_norm=True, text_first=True) for _ in range(c.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(dim, heads) for _ in range(c.num_single_layers))
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, c.out_channels)
        self._modulations = assign_columns(self)

    def prepare_only(self) -> list[str]:
        """Names of the submodules that `forward` never reads: after `prepare` their memory can be released."""
        return prepare_only(self)

    def prepare(
        self,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        height: int,
        width: int,
        guidance_scale: Tensor | None = None,
    ) -> Constants:
        """Compute once per image what no step changes.

        Args:
            timesteps: [steps, B], any real dtype, in training timesteps (0 to 1000, may be fractional).
            context: [B, text tokens, joint_attention_dim], hidden states of T5.
            pooled: [B, pooled_projection_dim], pooled text of CLIP.
            height: of the latents, even, up to 1024.
            width: of the latents, even, up to 1024.
            guidance_scale: [B], read by models with `guidance_embeds` only, which need it.

        Raises:
            InputError: a shape does not fit, or the guidance scale is missing.
        """
        c = self.config
        check_conditioning(timesteps, context, pooled, c.joint_attention_dim, c.pooled_projection_dim)
        check_size(height, width, PATCH, PATCH * POSITIONS)
        guidance = None
        if c.guidance_embeds:
            if guidance_scale is None or guidance_scale.shape != timesteps.shape[1:]:
                given = None if guidance_scale is None else list(guidance_scale.shape)
                raise InputError(
                    f"guidance_scale is {given}; this model embeds it, so it must be [{timesteps.shape[1]}]."
                )
            guidance = guidance_scale.float() * 1000

        def embed(rows: Tensor) -> Tensor:
            # diffusers' pipeline divides and its model multiplies again, which is not always the same timestep.
            embedding: Tensor = self.time_text_embed(rows.float() / 1000 * 1000, pooled, guidance)
            return embedding

        return Constants(
            modulation_rows(self._modulations, embed, timesteps),
            self.context_embedder(context.to(self.proj_out.weight.dtype)),
            rotary_table(c.axes_dims_rope, context.shape[1], height // PATCH, width // PATCH, context.device),
        )

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        context: Tensor,
        position: Tensor,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict, for one step; pure, with no host synchronisation, so it can be captured and exported.

        Args:
            latents: [B, in_channels / 4, H, W], of the size given to `prepare`.
            modulation: [B, M], one step's row of `Constants.modulation`.
            context: [B, text tokens, D], `Constants.context`.
            position: [2, L, head dim / 2], `Constants.position`.
            controlnet_block_samples: ControlNet's additions to the image tokens [B, image tokens, D] after the blocks
                of both kinds of tokens, each for an equal share of the blocks.
            controlnet_single_block_samples: likewise after the single blocks.

        Returns:
            The prediction, [B, out_channels / 4, H, W].
        """
        image, text = self.x_embedder(patches(latents, PATCH)), context
        for i, block in enumerate(self.transformer_blocks):
            image, text = block(image, text, modulation, position)
            if controlnet_block_samples:
                interval = ceil(len(self.transformer_blocks) / len(controlnet_block_samples))
                image = image + controlnet_block_samples[i // interval]

        x = torch.cat([text, image], dim=1)
        for i, single in enumerate(self.single_transformer_blocks):
            x = single(x, modulation, position)
            if controlnet_single_block_samples:
                interval = ceil(len(self.single_transformer_blocks) / len(controlnet_single_block_samples))
                x = x + F.pad(controlnet_single_block_samples[i // interval], (0, 0, text.shape[1], 0))

        scale, shift = self.norm_out(self.norm_out.own(modulation))
        (image,) = ops.modulate(x[:, text.shape[1] :], (shift, scale))
        image = self.proj_out(image)
        # The numbers of a patch are in the order channel, row, column.
        image = image.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (-1, latents.shape[3] // PATCH))
        prediction: Tensor = image.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return prediction


class SingleBlock(nn.Module):
    """Attention and perceptron side by side, over all tokens alike (`diffusers` `FluxSingleTransformerBlock`)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = SelfAttention(dim, heads, qk_norm=True, out=False)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x: Tensor, modulation: Tensor, rotary: Tensor) -> Tensor:
        """[B, L, D], [B, M] -> [B, L, D]."""
        out: Tensor = self.body(x, self.norm.own(modulation), rotary)
        return out

    def body(self, x: Tensor, own: Tensor, rotary: Tensor) -> Tensor:
        """[B, L, D], `Modulation.own` -> [B, L, D]."""
        shift, scale, gate = self.norm(own)
        (normed,) = ops.modulate(x, (shift, scale))
        perceptron = F.gelu(self.proj_mlp(normed), approximate="tanh")
        # proj_out of both side by side is the sum of two products, the second accumulated into the first: the
        # concatenation, 5 times the size of x, is never made, and a trace holds two plain products.
        of_attention, of_perceptron = self.proj_out.weight.split([x.shape[2], perceptron.shape[2]], dim=1)
        out = F.linear(self.attn(normed, rotary), of_attention, self.proj_out.bias)
        out = torch.addmm(out.flatten(0, 1), perceptron.flatten(0, 1), of_perceptron.t()).view_as(x)
        return ops.gate_residual(x, gate, out)


def rotary_table(
    axes: Sequence[int], text_tokens: int, rows: int, columns: int, device: torch.device | None = None
) -> Tensor:
    """Cosines and sines of the angles of all tokens, [2, text_tokens + rows * columns, sum(axes) / 2] in float32.

    Text lies at the origin, an image token at (0, row, column). Put together of the axes' own tables, so that sizes may
    be symbols of a trace.
    """
    first, row, column = (torch.from_numpy(axis_table(dim)).to(device) for dim in axes)
    image = torch.cat(
        [
            first[:, :1, None].expand(-1, rows, columns, -1),
            row[:, :rows, None].expand(-1, -1, columns, -1),
            column[:, None, :columns].expand(-1, rows, -1, -1),
        ],
        dim=3,
    )
    text = torch.cat([table[:, :1] for table in (first, row, column)], dim=2).expand(-1, text_tokens, -1)
    return torch.cat([text, image.flatten(1, 2)], dim=1)


@lru_cache(maxsize=16)  # axes
def axis_table(dim: int) -> NDArray[np.float32]:
    """Cosines and sines of the angles of all `POSITIONS` on an axis, [2, POSITIONS, dim / 2]: treat it as read-only.

    Computed in float64 as `diffusers` `FluxPosEmbed` does, and in numpy, so that a trace sees constants.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    angles = np.outer(np.arange(POSITIONS, dtype=np.float64), 1.0 / 10000.0**exponents)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


_DEFAULTS: dict[str, Any] = {  # those of diffusers.FluxTransformer2DModel
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


@dataclass(frozen=True)
class FluxConfig:
    """The keys of `diffusers.FluxTransformer2DModel`, checked; channels are those of packed 2 x 2 latents."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    axes_dims_rope: tuple[int, int, int]

    @property
    def inner_dim(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> FluxConfig:
        """Check the keys of a diffusers `transformer/config.json`; absent ones have its defaults.

        Raises:
            InputError: names the key whose value is not implemented, malformed or contradicts another's.
        """
        raw = read_config("Flux", config, _DEFAULTS)
        if raw["out_channels"] is None:
            raw["out_channels"] = raw["in_channels"]
        for key in ("in_channels", "out_channels"):
            if type(raw[key]) is not int or raw[key] < 1 or raw[key] % PATCH**2:
                raise refusal("Flux", key, raw[key], f"a positive multiple of {PATCH**2}, the latents of a patch")
        if raw["patch_size"] != 1:
            raise refusal("Flux", "patch_size", raw["patch_size"], "1")
        if type(raw["guidance_embeds"]) is not bool:
            raise refusal("Flux", "guidance_embeds", raw["guidance_embeds"], "true or false")
        axes, head_dim = raw["axes_dims_rope"], raw["attention_head_dim"]
        listed = isinstance(axes, list | tuple) and len(axes) == 3 and all(type(dim) is int for dim in axes)
        if not listed or any(dim < 2 or dim % 2 for dim in axes) or sum(axes) != head_dim:
            raise refusal("Flux", "axes_dims_rope", axes, f"three even numbers with the sum {head_dim}")
        return cls(**{**raw, "axes_dims_rope": tuple(axes)})
