"""The transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024).

    modulation, *rest = transformer.prepare(timesteps, context, pooled, height=128, width=128)    # once per image
    for i in range(steps):
        prediction = transformer(latents, modulation[i], *rest)

Parameter names and shapes are those of `diffusers.SD3Transformer2DModel`.
Shapes: B batch, C latent channels, H and W latent height and width, D width of the tokens, M packed modulation columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd import ops
from fastsd.denoisers.transformer import (
    Constants,
    JointBlock,
    Modulation,
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


class SD3Transformer(nn.Module):
    """Predict the velocity in latents, given rows of `Constants`.

    A third of the parameters serves only `prepare`: the timestep and text embeddings and the modulations of all blocks,
    listed by `prepare_only`; besides them the buffer `pos_embed.pos_embed`.

    Args:
        config: the keys of a diffusers `transformer/config.json`; absent ones have diffusers' defaults.

    Raises:
        InputError: the configuration asks for something that is not implemented here, or contradicts itself.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = c = SD3Config.from_diffusers(config)
        dim, heads, qk_norm = c.inner_dim, c.num_attention_heads, c.qk_norm is not None
        self.pos_embed = PatchEmbed(c)
        self.time_text_embed = TimeTextEmbedding(dim, c.pooled_projection_dim)
        self.context_embedder = nn.Linear(c.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                dim,
                heads,
                qk_norm,
                text_first=False,
                dual=i in c.dual_attention_layers,
                last=i == c.num_layers - 1,
            )
            for i in range(c.num_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, c.patch_size**2 * c.out_channels)
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
            context: [B, text tokens, joint_attention_dim], hidden states of the text encoders.
            pooled: [B, pooled_projection_dim], pooled text.
            height: of the latents.
            width: of the latents.
            guidance_scale: not read; no SD3 is distilled for it.

        Raises:
            InputError: a shape does not fit, or the latents exceed the table of positions.
        """
        c = self.config
        check_conditioning(timesteps, context, pooled, c.joint_attention_dim, c.pooled_projection_dim)
        check_size(height, width, c.patch_size, c.patch_size * c.pos_embed_max_size)
        dtype = self.proj_out.weight.dtype
        modulation = modulation_rows(self._modulations, lambda rows: self.time_text_embed(rows, pooled), timesteps)
        position = self.pos_embed.crop(height // c.patch_size, width // c.patch_size).to(dtype)
        return Constants(modulation, self.context_embedder(context.to(dtype)), position)

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        context: Tensor,
        position: Tensor,
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict, for one step; pure, with no host synchronisation, so it can be captured and exported.

        Args:
            latents: [B, in_channels, H, W], of the size given to `prepare`.
            modulation: [B, M], one step's row of `Constants.modulation`.
            context: [B, text tokens, D], `Constants.context`.
            position: [1, image tokens, D], `Constants.position`.
            block_controlnet_hidden_states: ControlNet's additions to the image tokens [B, image tokens, D], each for an
                equal share of the blocks.

        Returns:
            The prediction, [B, out_channels, H, W].
        """
        image, text = self.pos_embed(latents) + position, context
        for i, block in enumerate(self.transformer_blocks):
            image, text = block(image, text, modulation)
            if block_controlnet_hidden_states and i < len(self.transformer_blocks) - 1:
                interval = len(self.transformer_blocks) / len(block_controlnet_hidden_states)
                image = image + block_controlnet_hidden_states[int(i / interval)]

        scale, shift = self.norm_out(self.norm_out.own(modulation))
        (image,) = ops.modulate(image, (shift, scale))
        image = self.proj_out(image)
        # The numbers of a patch are in the order row, column, channel.
        size = self.config.patch_size
        image = image.unflatten(2, (size, size, -1)).unflatten(1, (-1, latents.shape[3] // size))
        prediction: Tensor = image.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return prediction


class PatchEmbed(nn.Module):
    """Patches as tokens, and the table of their positions (`diffusers` `PatchEmbed`)."""

    pos_embed: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.size, self.table_size = config.patch_size, config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.inner_dim, self.size, stride=self.size)
        table = position_table(config.inner_dim, self.table_size, config.sample_size // self.size)
        self.register_buffer("pos_embed", table.flatten(0, 1).unsqueeze(0))  # in the checkpoint, so persistent

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, image tokens, D]; the convolution is a matrix product, since its windows are disjoint."""
        return F.linear(patches(latents, self.size), self.proj.weight.flatten(1), self.proj.bias)

    def crop(self, rows: int, columns: int) -> Tensor:
        """The middle of the table, [1, rows * columns, D]."""
        top, left = (self.table_size - rows) // 2, (self.table_size - columns) // 2
        table = self.pos_embed.unflatten(1, (self.table_size, self.table_size))
        middle: Tensor = table[:, top : top + rows, left : left + columns].flatten(1, 2)
        return middle


def position_table(
    dim: int, size: int, base_size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Sinusoids of column and row [size, size, dim], scaled as if the grid had `base_size` positions.

    Half of the channels depend on the column alone and half on the row, so only one side is computed (in float64).
    Source: `diffusers` `get_2d_sincos_pos_embed`.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.outer(torch.arange(size, dtype=torch.float32) / (size / base_size), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1).to(device, dtype)  # [size, dim / 2]
    table = torch.empty(size, size, dim, dtype=dtype, device=device)
    table[..., : dim // 2] = axis
    table[..., dim // 2 :] = axis[:, None]
    return table


_DEFAULTS: dict[str, Any] = {  # those of diffusers.SD3Transformer2DModel
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}


@dataclass(frozen=True)
class SD3Config:
    """The keys of `diffusers.SD3Transformer2DModel`, checked."""

    sample_size: int
    patch_size: int
    in_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    out_channels: int
    pos_embed_max_size: int
    dual_attention_layers: tuple[int, ...]
    qk_norm: str | None

    @property
    def inner_dim(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> SD3Config:
        """Check the keys of a diffusers `transformer/config.json`; absent ones have its defaults.

        Raises:
            InputError: names the key whose value is not implemented, malformed or contradicts another's.
        """
        raw = read_config("SD3", config, _DEFAULTS)
        dual, last = raw["dual_attention_layers"], raw["num_layers"] - 1
        if not isinstance(dual, list | tuple) or any(type(i) is not int or not 0 <= i <= last for i in dual):
            raise refusal("SD3", "dual_attention_layers", dual, f"a list of layers, 0 to {last}")
        if raw["qk_norm"] not in (None, "rms_norm"):
            raise refusal("SD3", "qk_norm", raw["qk_norm"], "None or 'rms_norm'")
        if raw["sample_size"] < raw["patch_size"]:
            raise refusal("SD3", "sample_size", raw["sample_size"], f"at least the patch_size {raw['patch_size']}")
        checked = cls(**{**raw, "dual_attention_layers": tuple(dual)})
        if checked.inner_dim % 4:
            raise refusal("SD3", "attention_head_dim", checked.attention_head_dim, "such that all heads are 4 n wide")
        if checked.caption_projection_dim != checked.inner_dim:
            right = f"num_attention_heads * attention_head_dim = {checked.inner_dim}"
            raise refusal("SD3", "caption_projection_dim", checked.caption_projection_dim, right)
        return checked
