"""The layers of the UNet: sinusoidal embeddings, residual blocks, spatial transformers, resampling.

The transformers of SD3 and Flux share the embeddings and the perceptron; their own layers are in `transformer.py`.

Parameter names are those of `diffusers`, so that its checkpoints load without renaming.
Shapes: B batch, C channels, H and W latent height and width, L tokens, M packed modulation columns,
K packed key/value columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 64  # rows that `prepare` computes at a time


def row_chunks(timesteps: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Timesteps [steps, B] in chunks [ROWS, B], the last one padded, each with the number of its own rows.

    Matrix products of different shapes may sum in different orders: so a row has the same bits in a run of 4 steps and
    in one of 50.
    """
    for start in range(0, len(timesteps), ROWS):
        chunk = timesteps[start : start + ROWS]
        missing = ROWS - len(chunk)
        yield torch.cat([chunk, chunk[-1:].expand(missing, -1)]) if missing else chunk, len(chunk)


def timestep_embedding(timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of `timesteps` [...] in float32, [..., dim] (Ho et al. 2020; `diffusers` `Timesteps`)."""
    half = dim // 2
    # diffusers' order of operations in float32: at timestep 1000 one ulp of a frequency is 6e-5 in the sine.
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) * -math.log(10000)
    angles = timesteps.float().unsqueeze(-1) * torch.exp(exponent / (half - freq_shift))
    sin, cos = torch.sin(angles), torch.cos(angles)
    embedding = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def guidance_embedding(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sinusoids of the guidance scale [B] in float32, [B, dim], for guidance-distilled (LCM) UNets.

    Source: `get_guidance_scale_embedding(guidance_scale - 1)` of `diffusers.StableDiffusionPipeline`.
    """
    half = dim // 2
    # As in diffusers, whose frequencies differ from those of the timesteps in their last bits.
    rate = torch.full((), 10000.0, device=guidance_scale.device).log() / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=guidance_scale.device) * -rate)
    angles = ((guidance_scale - 1).float() * 1000.0).unsqueeze(-1) * frequencies
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron over an embedding [..., in_channels] -> [..., out_channels].

    With `condition_dim`, a second embedding [..., condition_dim] is projected and added to the input.
    """

    def __init__(self, in_channels: int, out_channels: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        if condition_dim is not None:
            self.cond_proj = nn.Linear(condition_dim, in_channels, bias=False)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        """[..., in_channels] -> [..., out_channels]."""
        if condition is not None:
            embedding = embedding + self.cond_proj(condition)
        embedding = self.linear_2(F.silu(self.linear_1(embedding)))
        return embedding


class ResnetBlock(nn.Module):
    """Two convolutions around a shift by the time embedding (`diffusers` `ResnetBlock2D`).

    `columns` says where this block's shift lies in the packed modulation; `UNet` assigns it.
    """

    columns: slice

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """[B, C, H, W], [B, M] -> [B, out_channels, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + modulation[:, self.columns, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        x = self.conv_shortcut(x) + h
        return x


class Attention(nn.Module):
    """Multi-head attention; over its own tokens, or over the text when `context_dim` is given.

    For text, `keys_values` runs once per image and `columns`, assigned by `UNet`, says where its result lies
    in the packed context.
    """

    columns: slice | None = None

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.is_cross = context_dim is not None
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, context_dim or dim] -> keys and values, [B, L, dim] each."""
        return self.to_k(tokens), self.to_v(tokens)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, L, dim], [B, text tokens, K] -> [B, L, dim]."""
        k, v = self.keys_values(x) if self.columns is None else context[..., self.columns].chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), k, v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, L, dim]
        x = self.to_out[0](x)
        return x


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., inner_dim]."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class GELU(nn.Module):
    """GELU in its tanh form (Hendrycks & Gimpel 2016)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., inner_dim]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Perceptron with four times the width; index 1 of `net` was a dropout at training time."""

    def __init__(self, dim: int, activation: type[GEGLU] | type[GELU] = GEGLU) -> None:
        super().__init__()
        self.net = nn.Sequential(activation(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        x = self.net(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, perceptron (`diffusers` `BasicTransformerBlock`)."""

    def __init__(self, dim: int, heads: int, context_dim: int, only_cross_attention: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context_dim if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, L, dim], [B, text tokens, K] -> [B, L, dim]."""
        x = x + self.attn1(self.norm1(x), context)
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution by its weight's shape, applied as the matrix product over tokens that it is."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, in_channels] -> [B, L, out_channels]."""
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (`diffusers` `Transformer2DModel`).

    `linear_projection` only decides the shape of the projections' weights.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_dim: int,
        groups: int,
        linear_projection: bool,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        projection = nn.Linear if linear_projection else PointwiseConv
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, only_cross_attention) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W], [B, text tokens, K] -> [B, C, H, W]."""
        # In the channels-last layout both permutations are views: the tokens are the pixels where they lie.
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # [B, H*W, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        x = x + self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return x


class Downsample(nn.Module):
    """Halve height and width (rounded up) with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""
        x = self.conv(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, H, W] -> [B, C, *size]."""
        x = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return x
