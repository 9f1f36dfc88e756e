"""The layers of the UNet: sinusoidal embeddings, residual blocks, spatial transformers, resampling.

The transformers of SD3 and Flux share the embeddings and the perceptron; their own layers are in `transformer.py`.
A repeated block has its arithmetic in `body`, which takes the block's own slices of the packed constants: so blocks of
the same shapes are one compilation.

Parameter names are those of `diffusers`, so that its checkpoints load without renaming.
Shapes: B batch, C channels, H and W latent height and width, L tokens, M packed modulation columns,
K packed key/value columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd import ops

ROWS = 64  # rows that `prepare` computes at a time
QKV = ("to_q", "to_k", "to_v")


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
        out: Tensor = self.body(x, modulation[:, self.columns])
        return out

    def body(self, x: Tensor, shift: Tensor) -> Tensor:
        """[B, C, H, W], [B, out_channels] -> [B, out_channels, H, W]."""
        h = self.conv1(ops.group_norm_silu(x, self.norm1))
        h = self.conv2(ops.group_norm_silu(h, self.norm2, shift))
        x = self.conv_shortcut(x) + h
        return x


class Packing(nn.Module):
    """A module with linear layers that read the same tokens, and after `pack` are one matrix product.

    The layers' own weights are then views of a packed one, so a state dict is what it was, what is merged into the
    weights in place reaches it, and nothing is held twice. What replaces the weights (another dtype or device, a state
    dict that is assigned) is packed again; a copy (`deepcopy`, pickle) is not packed.
    """

    PACKS: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.register_load_state_dict_post_hook(_pack_again)  # type: ignore[no-untyped-call]

    def pack(self) -> None:
        """Make one weight, and one bias, of the layers of each of `PACKS`."""
        for names in self.PACKS:
            layers: list[Any] = [getattr(self, name) for name in names]
            has_bias = layers[0].bias is not None
            self.packed[names[0]] = _packed(layers, "weight"), _packed(layers, "bias") if has_bias else None

    def project(self, x: Tensor, names: tuple[str, ...], heads: int) -> Tensor | tuple[Tensor, ...]:
        """Tokens [B, L, dim] through layers of `PACKS`.

        Returns:
            Packed [B, L, layers, heads, head dim], or for each layer [B, L, heads, head dim].
        """
        if names[0] in self.packed:
            packed: Tensor = F.linear(x, *self.packed[names[0]]).unflatten(-1, (len(names), heads, -1))
            return packed
        return tuple(getattr(self, name)(x).unflatten(-1, (heads, -1)) for name in names)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _pack_again(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": {}}


def _packed(layers: list[Any], name: str) -> Tensor:
    """One tensor of the layers' parameters of a name, which become views of it."""
    parameters = [getattr(layer, name) for layer in layers]
    with torch.no_grad():
        packed = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, packed.chunk(len(parameters)), strict=True):
            parameter.data = part
    # To a compiler the sizes of a parameter are constants; those of another tensor may become symbols.
    return nn.Parameter(packed, requires_grad=False)


def _pack_again(module: Any, *_: Any) -> None:
    """Pack once more where a parameter is no longer the view that it was."""
    for names in module.PACKS:
        if names[0] in module.packed:
            for kind, packed in zip(("weight", "bias"), module.packed[names[0]], strict=True):
                parts = () if packed is None else zip(names, packed.chunk(len(names)), strict=True)
                if any(getattr(getattr(module, name), kind).data_ptr() != part.data_ptr() for name, part in parts):
                    module.pack()
                    break


class Attention(Packing):
    """Multi-head attention; over its own tokens, or over the text when `context_dim` is given.

    For text, `keys_values` runs once per image and `columns`, assigned by `UNet`, says where its result lies
    in the packed context.
    """

    PACKS = (QKV,)
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

    def pack(self) -> None:
        """Attention to its own tokens: one product for queries, keys and values."""
        if not self.is_cross:
            super().pack()

    def text(self, context: Tensor) -> Tensor | None:
        """Its own keys and values of the text [B, text tokens, K]: [B, text tokens, 2 dim], None without `columns`."""
        return None if self.columns is None else context[..., self.columns]

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """[B, L, dim], `text` of the context -> [B, L, dim]."""
        if text is None:
            x = ops.attention(*ops.unpacked(self.project(x, QKV, self.heads)))
        else:
            q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.to_q(x), *text.chunk(2, dim=-1)))
            x = ops.cross_attention(q, k, v)
        x = self.to_out[0](x)
        return x


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., inner_dim]."""
        return ops.geglu(self.proj(x))


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
        out: Tensor = self.body(x, self.attn1.text(context), self.attn2.text(context))
        return out

    def body(self, x: Tensor, text1: Tensor | None, text2: Tensor | None) -> Tensor:
        """[B, L, dim], `Attention.text` of both attentions -> [B, L, dim]."""
        x = x + self.attn1(self.norm1(x), text1)
        x = x + self.attn2(self.norm2(x), text2)
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
        h = ops.group_norm_silu(x, self.norm, silu=False)
        h = self.proj_in(h.permute(0, 2, 3, 1).flatten(1, 2))  # [B, H*W, C]
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
