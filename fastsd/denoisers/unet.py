"""The UNet of Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022, Podell et al. 2023).

    constants = unet.prepare(timesteps, text)                # once per image
    for i in range(steps):
        prediction = unet(latents, constants.modulation[i], constants.context)

Parameter names and shapes are those of `diffusers.UNet2DConditionModel`.
Shapes: B batch, C channels, H and W latent height and width, M packed modulation columns (the time
projections of all residual blocks), K packed key/value columns (of all attentions to the text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd import ops
from fastsd.denoisers.layers import (
    Attention,
    Downsample,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    Upsample,
    guidance_embedding,
    row_chunks,
    timestep_embedding,
)
from fastsd.errors import InputError


class Constants(NamedTuple):
    """All that the UNet needs besides the latents, in the dtype of the weights."""

    modulation: Tensor  # [steps, B, M]
    context: Tensor  # [B, text tokens, K]


class UNet(nn.Module):
    """Predict the noise (or velocity) in latents, given rows of `Constants`.

    Args:
        config: the keys of a diffusers `unet/config.json`; absent ones have diffusers' defaults.

    Raises:
        InputError: the configuration asks for something that is not implemented here, or contradicts itself.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = c = UNetConfig.from_diffusers(config)
        channels, groups, eps = c.block_out_channels, c.norm_num_groups, c.norm_eps
        time_dim = c.time_embedding_dim

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, out_channels, time_dim, groups, eps)

        def transformer(level: int, only_cross_attention: bool) -> SpatialTransformer:
            return SpatialTransformer(
                channels[level],
                c.attention_head_dim[level],
                c.transformer_layers_per_block[level],
                c.cross_attention_dim,
                groups,
                c.use_linear_projection,
                only_cross_attention,
            )

        def transformers(level: int, block_type: str, count: int) -> list[SpatialTransformer]:
            count = count if block_type.startswith("CrossAttn") else 0
            return [transformer(level, c.only_cross_attention[level]) for _ in range(count)]

        self.conv_in = nn.Conv2d(c.in_channels, channels[0], c.conv_in_kernel, padding=c.conv_in_kernel // 2)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, c.time_cond_proj_dim)
        if c.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(c.projection_class_embeddings_input_dim, time_dim)

        levels = range(len(channels))
        width = channels[0]
        skips = [width]  # channels of the skip connections, innermost last

        self.down_blocks = nn.ModuleList()
        for i in levels:
            resnets = []
            for _ in range(c.layers_per_block[i]):
                resnets.append(resnet(width, channels[i]))
                width = channels[i]
                skips.append(width)
            attentions = transformers(i, c.down_block_types[i], len(resnets))
            downsampler = None
            if i < levels[-1]:
                downsampler = Downsample(width)
                skips.append(width)
            self.down_blocks.append(DownBlock(resnets, attentions, downsampler))

        self.mid_block = None
        if c.mid_block_type is not None:
            self.mid_block = MidBlock(resnet(width, width), transformer(-1, False), resnet(width, width))

        self.up_blocks = nn.ModuleList()
        for i, block_type in zip(reversed(levels), c.up_block_types, strict=True):
            resnets = []
            for _ in range(c.layers_per_block[i] + 1):
                resnets.append(resnet(width + skips.pop(), channels[i]))
                width = channels[i]
            attentions = transformers(i, block_type, len(resnets))
            self.up_blocks.append(UpBlock(resnets, attentions, Upsample(width) if i > 0 else None))

        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps)
        self.conv_out = nn.Conv2d(channels[0], c.out_channels, c.conv_out_kernel, padding=c.conv_out_kernel // 2)
        self._assign_columns()

    def _assign_columns(self) -> None:
        """Give each residual block and each attention to the text its place in the packed constants."""
        end = 0
        self._resnets = [m for m in self.modules() if isinstance(m, ResnetBlock)]
        for resnet in self._resnets:
            start, end = end, end + resnet.time_emb_proj.out_features
            resnet.columns = slice(start, end)
        end = 0
        self._text_attentions = [m for m in self.modules() if isinstance(m, Attention) and m.is_cross]
        for attention in self._text_attentions:
            start, end = end, end + 2 * attention.to_k.out_features
            attention.columns = slice(start, end)

    def prepare_only(self) -> list[str]:
        """Names of the submodules that `forward` never reads: after `prepare` their memory can be released."""
        times = [name for name, _ in self.named_children() if name in ("time_embedding", "add_embedding")]
        shifts = [f"{name}.time_emb_proj" for name, module in self.named_modules() if isinstance(module, ResnetBlock)]
        attentions = [name for name, m in self.named_modules() if isinstance(m, Attention) and m.is_cross]
        return [*times, *shifts, *(f"{name}.{part}" for name in attentions for part in ("to_k", "to_v"))]

    def prepare(
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Constants:
        """Compute once per image what no step changes.

        A row's bits do not depend on how many there are (`row_chunks`).

        Args:
            timesteps: [steps, B], any real dtype, in training timesteps (may be fractional).
            encoder_hidden_states: [B, text tokens, cross_attention_dim], the text.
            text_embeds: [B, pooled dim], SDXL's pooled text.
            time_ids: [B, n], SDXL's original size, crop and target size in pixels (refiner: aesthetic score).
            guidance_scale: [B], for UNets distilled with `time_cond_proj_dim` (LCM) and only for these; give
                it in float64 to have the very embedding of diffusers, which subtracts 1 before rounding.

        Raises:
            InputError: a shape does not fit, or conditioning is missing or not this model's.
        """
        c = self.config
        self._check(timesteps, encoder_hidden_states, text_embeds, time_ids, guidance_scale)
        dtype = self.conv_in.weight.dtype

        def sinusoids(values: Tensor, dim: int) -> Tensor:
            return timestep_embedding(values, dim, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift).to(dtype)

        condition = None
        if guidance_scale is not None and c.time_cond_proj_dim is not None:
            condition = guidance_embedding(guidance_scale, c.time_cond_proj_dim).to(dtype)
        added: Tensor | float = 0.0
        if text_embeds is not None and time_ids is not None:
            sizes = sinusoids(time_ids, c.addition_time_embed_dim).flatten(1)
            added = self.add_embedding(torch.cat([text_embeds.to(dtype), sizes], -1))
        chunks = []
        for padded, count in row_chunks(timesteps):
            embedding = self.time_embedding(sinusoids(padded, c.block_out_channels[0]), condition)
            embedding = F.silu(embedding + added)  # [ROWS, B, time_dim]
            chunks.append(torch.cat([resnet.time_emb_proj(embedding)[:count] for resnet in self._resnets], dim=-1))
        modulation = torch.cat(chunks)

        text = encoder_hidden_states.to(dtype)
        context = torch.cat([t for attn in self._text_attentions for t in attn.keys_values(text)], dim=-1)
        return Constants(modulation, context)

    def _check(
        self,
        timesteps: Tensor,
        text: Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        guidance_scale: Tensor | None,
    ) -> None:
        """Refuse conditioning that does not fit; shapes only, so nothing waits for the device."""
        c = self.config
        if text.ndim != 3 or text.shape[2] != c.cross_attention_dim:
            raise InputError(
                f"encoder_hidden_states is {list(text.shape)}; it must be [batch, tokens, {c.cross_attention_dim}]."
            )
        batch = text.shape[0]
        if timesteps.ndim != 2 or timesteps.shape[1] != batch or timesteps.shape[0] == 0:
            raise InputError(f"timesteps is {list(timesteps.shape)}; it must be [steps, {batch}].")
        kind = c.addition_embed_type
        added = kind is not None
        if (text_embeds is not None, time_ids is not None) != (added, added):
            verb = "needs" if added else "takes no"
            raise InputError(f"This UNet {verb} text_embeds and time_ids (its addition_embed_type is {kind!r}).")
        if text_embeds is not None and time_ids is not None:
            dim = c.projection_class_embeddings_input_dim
            given = text_embeds.shape[-1] + time_ids.shape[-1] * c.addition_time_embed_dim
            if text_embeds.shape[:-1] != (batch,) or time_ids.shape[:-1] != (batch,) or given != dim:
                raise InputError(
                    f"text_embeds is {list(text_embeds.shape)} and time_ids {list(time_ids.shape)}; they "
                    f"must be [{batch}, p] and [{batch}, n] with p + {c.addition_time_embed_dim} n = {dim}."
                )
        if (guidance_scale is None) != (c.time_cond_proj_dim is None):
            verb = "needs" if c.time_cond_proj_dim else "takes no"
            raise InputError(f"This UNet {verb} guidance_scale (time_cond_proj_dim = {c.time_cond_proj_dim}).")
        if guidance_scale is not None and guidance_scale.shape != (batch,):
            raise InputError(f"guidance_scale is {list(guidance_scale.shape)}; it must be [{batch}].")

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        context: Tensor,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        """Predict, for one step; pure, with no host synchronisation, so it can be captured and exported.

        Args:
            latents: [B, in_channels, H, W], already scaled for the model; H and W may be odd.
            modulation: [B, M], one step's row of `Constants.modulation`.
            context: [B, text tokens, K], `Constants.context`.
            down_residuals: ControlNet's additions to the skip connections, outermost first.
            mid_residual: ControlNet's addition after the middle block.

        Returns:
            The prediction, [B, out_channels, H, W].
        """
        x = self.conv_in(latents)

        skips = [x]
        for down in self.down_blocks:
            x = down(x, modulation, context, skips)
        if down_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_residuals, strict=True)]

        if self.mid_block is not None:
            x = self.mid_block(x, modulation, context)
        if mid_residual is not None:
            x = x + mid_residual

        for up in self.up_blocks:
            x = up(x, modulation, context, skips)

        prediction: Tensor = self.conv_out(ops.group_norm_silu(x, self.conv_norm_out))
        return prediction


class DownBlock(nn.Module):
    """One level of the contracting path (`diffusers` `DownBlock2D`, `CrossAttnDownBlock2D`)."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[SpatialTransformer],
        downsampler: Downsample | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']; every layer's output is appended to `skips`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(x, modulation)
            if attention is not None:
                x = attention(x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The lowest level (`diffusers` `UNetMidBlock2DCrossAttn`): residual, attention, residual."""

    def __init__(self, first: ResnetBlock, attention: SpatialTransformer, last: ResnetBlock) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([first, last])
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.resnets[0](x, modulation)
        x = self.attentions[0](x, context)
        x = self.resnets[1](x, modulation)
        return x


class UpBlock(nn.Module):
    """One level of the expanding path (`diffusers` `UpBlock2D`, `CrossAttnUpBlock2D`)."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[SpatialTransformer],
        upsampler: Upsample | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']; every layer takes one skip connection off the end of `skips`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(torch.cat([x, skips.pop()], dim=1), modulation)
            if attention is not None:
                x = attention(x, context)
        for upsample in self.upsamplers:
            # To the size of the next skip connection, which is odd where the way down rounded up.
            x = upsample(x, skips[-1].shape[2:])
        return x


# What is implemented, with the defaults of diffusers.UNet2DConditionModel.
_DEFAULTS: dict[str, Any] = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 1280,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "sample_size": None,
    "time_cond_proj_dim": None,
    "time_embedding_dim": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "use_linear_projection": False,
}

# What is not implemented: the only values accepted, which are those that the published models have.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "attention_type": ("default",),
    "center_input_sample": (False, None),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False, None),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (False, None),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False, None),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    # The kinds of the blocks and the embedding among those implemented.
    "addition_embed_type": (None, "text_time"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "freq_shift": (0, 1),
}

# No effect on inference here: dropout; the heads of an embedding that is refused; upcast_attention, because
# scaled_dot_product_attention accumulates in float32 whatever the dtype (diffusers ignores the key too).
_IGNORED = {"dropout", "addition_embed_type_num_heads", "upcast_attention"}


@dataclass(frozen=True)
class UNetConfig:
    """The implemented keys of `diffusers.UNet2DConditionModel`, checked; a tuple has one value per level."""

    sample_size: int | tuple[int, int] | None
    in_channels: int
    out_channels: int
    flip_sin_to_cos: bool
    freq_shift: int
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    up_block_types: tuple[str, ...]
    only_cross_attention: tuple[bool, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    norm_num_groups: int
    norm_eps: float
    cross_attention_dim: int
    transformer_layers_per_block: tuple[int, ...]
    attention_head_dim: tuple[int, ...]  # in spite of its name, the number of heads
    use_linear_projection: bool
    addition_embed_type: str | None
    addition_time_embed_dim: int  # 0 without added conditioning
    projection_class_embeddings_input_dim: int  # 0 without added conditioning
    time_embedding_dim: int
    time_cond_proj_dim: int | None
    conv_in_kernel: int
    conv_out_kernel: int

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Check the keys of a diffusers `unet/config.json`; absent ones have its defaults.

        Raises:
            InputError: names the key whose value is not implemented, malformed or contradicts another's.
        """
        for key, value in config.items():
            if key in _MUST_BE:
                if not any(value == allowed for allowed in _MUST_BE[key]):
                    raise _refusal(key, value, " or ".join(repr(allowed) for allowed in _MUST_BE[key]))
            elif key not in _DEFAULTS and key not in _IGNORED and key[:1] != "_" and value is not None:
                raise InputError(f"The UNet configuration has {key} = {value!r}, which is not supported.")
        raw = _DEFAULTS | dict(config)
        if not isinstance(raw["block_out_channels"], list | tuple):
            raise _refusal("block_out_channels", raw["block_out_channels"], "a list of channels, one per level")
        levels = len(raw["block_out_channels"])

        def integer(key: str, least: int = 1) -> int:
            return _integer(key, raw[key], least)

        def per_level(key: str) -> tuple[Any, ...]:
            values = tuple(raw[key]) if isinstance(raw[key], list | tuple) else (raw[key],) * levels
            if len(values) != levels or not values:
                raise _refusal(key, raw[key], f"a list as long as block_out_channels ({levels})")
            return values

        def integers(key: str, least: int = 1) -> tuple[int, ...]:
            return tuple(_integer(key, value, least) for value in per_level(key))

        def block_types(key: str, plain: str) -> tuple[str, ...]:
            types = per_level(key)
            if any(block_type not in (plain, f"CrossAttn{plain}") for block_type in types):
                raise _refusal(key, raw[key], f"made of {plain} and CrossAttn{plain}")
            return types

        def kernel(key: str) -> int:
            if integer(key) % 2 == 0:
                raise _refusal(key, raw[key], "odd")
            return integer(key)

        groups, widths = integer("norm_num_groups"), integers("block_out_channels")
        if any(width % groups for width in widths):
            raise _refusal("norm_num_groups", groups, f"a divisor of all block_out_channels {list(widths)}")
        heads = integers("attention_head_dim")
        if any(width % n for width, n in zip(widths, heads, strict=True)):
            raise _refusal(
                "attention_head_dim",
                raw["attention_head_dim"],
                f"numbers of heads that divide the block_out_channels {list(widths)}",
            )
        down_types = block_types("down_block_types", "DownBlock2D")
        up_types = block_types("up_block_types", "UpBlock2D")
        if raw["mid_block_type"] is None and not any("CrossAttn" in kind for kind in down_types + up_types):
            raise _refusal("mid_block_type", None, "given where no other block attends to the text")
        if not isinstance(raw["norm_eps"], float) or not 0 < raw["norm_eps"] < 1:
            raise _refusal("norm_eps", raw["norm_eps"], "a number between 0 and 1")
        text_time = raw["addition_embed_type"] == "text_time"

        return cls(
            sample_size=raw["sample_size"],
            in_channels=integer("in_channels"),
            out_channels=integer("out_channels"),
            flip_sin_to_cos=_flag("flip_sin_to_cos", raw["flip_sin_to_cos"]),
            freq_shift=raw["freq_shift"],
            down_block_types=down_types,
            mid_block_type=raw["mid_block_type"],
            up_block_types=up_types,
            only_cross_attention=tuple(
                _flag("only_cross_attention", value) for value in per_level("only_cross_attention")
            ),
            block_out_channels=widths,
            layers_per_block=integers("layers_per_block"),
            norm_num_groups=groups,
            norm_eps=raw["norm_eps"],
            cross_attention_dim=integer("cross_attention_dim"),
            transformer_layers_per_block=integers("transformer_layers_per_block", 0),
            attention_head_dim=heads,
            use_linear_projection=_flag("use_linear_projection", raw["use_linear_projection"]),
            addition_embed_type=raw["addition_embed_type"],
            addition_time_embed_dim=integer("addition_time_embed_dim", 4) if text_time else 0,
            projection_class_embeddings_input_dim=(
                integer("projection_class_embeddings_input_dim") if text_time else 0
            ),
            time_embedding_dim=_integer("time_embedding_dim", raw["time_embedding_dim"] or 4 * widths[0]),
            # Below 4 the guidance embedding has no second frequency.
            time_cond_proj_dim=None if raw["time_cond_proj_dim"] is None else integer("time_cond_proj_dim", 4),
            conv_in_kernel=kernel("conv_in_kernel"),
            conv_out_kernel=kernel("conv_out_kernel"),
        )


def _refusal(key: str, value: object, right: str) -> InputError:
    return InputError(f"The UNet configuration has {key} = {value!r}; it must be {right}.")


def _integer(key: str, value: object, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise _refusal(key, value, f"an integer of at least {least}")
    return value


def _flag(key: str, value: object) -> bool:
    if value not in (True, False, None):
        raise _refusal(key, value, "true or false")
    return bool(value)
