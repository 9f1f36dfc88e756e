"""What the multimodal transformers of SD3 and Flux share (Esser et al. 2024).

Parameter names are those of `diffusers`, so that its checkpoints load without renaming.
A block has its arithmetic in `body`, which takes the block's own slices of the packed modulation: so blocks of the same
shapes are one compilation.
Shapes: B batch, C latent channels, H and W latent height and width, D width of the tokens, L image and text tokens
together, M packed modulation columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd import ops
from fastsd.denoisers.layers import (
    GELU,
    QKV,
    FeedForward,
    Packing,
    TimestepEmbedding,
    row_chunks,
    timestep_embedding,
)
from fastsd.errors import InputError


class Constants(NamedTuple):
    """All that a transformer needs besides the latents, in the dtype of the weights (a rotary table: float32)."""

    modulation: Tensor  # [steps, B, M], the vectors of all `Modulation`s
    context: Tensor  # [B, text tokens, D], the embedded text
    position: Tensor  # SD3: embedding [1, image tokens, D]; Flux: cosines and sines [2, L, head dim / 2]


class Modulation(nn.Module):
    """The vectors that shift, scale and gate the tokens of a block (adaLN-Zero, Peebles & Xie 2023).

    They depend on the timestep and the pooled text only, so `linear` serves only `prepare`, and `columns`, assigned by
    `assign_columns`, says where its result lies in the packed modulation. Sources, by the number of vectors:
    `diffusers` `AdaLayerNormContinuous` (2: scale, shift), `AdaLayerNormZeroSingle` (3: shift, scale, gate),
    `AdaLayerNormZero` (6: those of the attention, then of the perceptron), `SD35AdaLayerNormZeroX` (9: then of the
    second attention).
    """

    columns: slice

    def __init__(self, dim: int, vectors: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, vectors * dim)
        self.vectors = vectors
        self.scale = 0 if vectors == 2 else 1  # the first, of every three

    def rows(self, embedding: Tensor) -> Tensor:
        """[..., D] -> [..., vectors * D], every scale with its 1 added, so that no step has to."""
        vectors: Tensor = self.linear(embedding).unflatten(-1, (self.vectors, -1))
        # Ones and zeros are added, not 1 in place: a graph gets one addition, not a scatter.
        is_scale = torch.arange(self.vectors, device=vectors.device) % 3 == self.scale
        return (vectors + is_scale.to(vectors.dtype).unsqueeze(-1)).flatten(-2)

    def own(self, modulation: Tensor) -> Tensor:
        """[B, M] -> [B, 1, vectors * D]."""
        return modulation[:, None, self.columns]

    def forward(self, own: Tensor) -> tuple[Tensor, ...]:
        """[B, 1, vectors * D] -> `vectors` times [B, 1, D]."""
        return own.chunk(self.vectors, dim=-1)


def assign_columns(model: nn.Module) -> list[Modulation]:
    """Give each `Modulation` of the model its place in the packed rows; returns them in order."""
    modulations = [module for module in model.modules() if isinstance(module, Modulation)]
    end = 0
    for modulation in modulations:
        start, end = end, end + modulation.linear.out_features
        modulation.columns = slice(start, end)
    return modulations


def modulation_rows(modulations: Sequence[Modulation], embed: Callable[[Tensor], Tensor], timesteps: Tensor) -> Tensor:
    """All vectors of all steps, packed: [steps, B] -> [steps, B, M]; `embed` gives [rows, B] -> [rows, B, D].

    A row's bits do not depend on how many there are (`row_chunks`).
    """
    packed = []
    for padded, count in row_chunks(timesteps):
        embedding = F.silu(embed(padded))
        packed.append(torch.cat([modulation.rows(embedding)[:count] for modulation in modulations], dim=-1))
    return torch.cat(packed)


def patches(latents: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, H/size * W/size, C * size * size], a patch's numbers in the order channel, row, column."""
    x: Tensor = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, H/size, size, W/size, size]
    tokens: Tensor = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


class TimeTextEmbedding(nn.Module):
    """Timestep, pooled text and, where the model is distilled for it, guidance scale as one vector.

    Source: `diffusers` `CombinedTimestepTextProjEmbeddings`, `CombinedTimestepGuidanceTextProjEmbeddings`.
    """

    def __init__(self, dim: int, pooled_dim: int, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim)
        if guidance:
            self.guidance_embedder = TimestepEmbedding(256, dim)
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)

    def forward(self, timesteps: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """[rows, B], [B, pooled_dim], guidance scale times 1000 [B] -> [rows, B, D]."""
        dtype = self.text_embedder.linear_1.weight.dtype

        def sinusoids(values: Tensor) -> Tensor:
            return timestep_embedding(values, 256, flip_sin_to_cos=True, freq_shift=0).to(dtype)

        embedding: Tensor = self.timestep_embedder(sinusoids(timesteps))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoids(guidance))
        embedding = embedding + self.text_embedder(pooled.to(dtype))
        return embedding


class Projections(Packing):
    """What turns tokens into queries, keys and values."""

    PACKS: ClassVar[tuple[tuple[str, ...], ...]] = (QKV,)

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q, self.norm_k = self.norms(qk_norm)

    def norms(self, qk_norm: bool) -> list[nn.RMSNorm | None]:
        """For each head of the queries and of the keys."""
        return [nn.RMSNorm(self.head_dim, eps=ops.EPS) if qk_norm else None for _ in range(2)]

    def qkv(self, x: Tensor, rotary: Tensor | None) -> ops.QKV:
        """Of tokens [B, L, D], [B, L, heads, head dim] each."""
        return ops.qk_norm_rope(self.project(x, QKV, self.heads), self.norm_q, self.norm_k, rotary)


class SelfAttention(Projections):
    """Attention over one kind of tokens; without `out` the output projection is left to the block."""

    def __init__(self, dim: int, heads: int, qk_norm: bool, out: bool = True) -> None:
        super().__init__(dim, heads, qk_norm)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)] if out else [])

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = ops.attention(*self.qkv(x, rotary))
        for projection in self.to_out:
            x = projection(x)
        return x


TEXT_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


class JointAttention(Projections):
    """Attention over image and text together, each with its own projections and norms.

    Source: `diffusers` `JointAttnProcessor2_0` (image first), `FluxAttnProcessor` (text first).
    """

    PACKS = (QKV, TEXT_QKV)

    def __init__(self, dim: int, heads: int, qk_norm: bool, text_first: bool, text_out: bool) -> None:
        super().__init__(dim, heads, qk_norm)
        self.text_first = text_first
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.norm_added_q, self.norm_added_k = self.norms(qk_norm)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim) if text_out else None

    def text_qkv(self, x: Tensor, rotary: Tensor | None) -> ops.QKV:
        """`qkv` of the text."""
        return ops.qk_norm_rope(self.project(x, TEXT_QKV, self.heads), self.norm_added_q, self.norm_added_k, rotary)

    def forward(self, image: Tensor, text: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Image [B, image tokens, D] and text [B, text tokens, D] -> the same, no text without `text_out`."""
        kinds = [(image, self.qkv), (text, self.text_qkv)][:: -1 if self.text_first else 1]
        tables = (None, None) if rotary is None else rotary.split([x.shape[1] for x, _ in kinds], dim=1)
        first, second = (qkv(x, table) for (x, qkv), table in zip(kinds, tables, strict=True))
        image, text = ops.joint_attention(first, second)[:: -1 if self.text_first else 1]
        return self.to_out[0](image), None if self.to_add_out is None else self.to_add_out(text)


class JointBlock(nn.Module):
    """One layer over image and text (`diffusers` `JointTransformerBlock`, `FluxTransformerBlock`).

    Args:
        dim: D.
        heads: of all attentions.
        qk_norm: normalise queries and keys (RMS).
        text_first: the order of the tokens where both kinds are together.
        dual: a second attention, over the image alone (SD3.5-Medium).
        last: no later layer reads the text, so it is not updated.
    """

    def __init__(
        self, dim: int, heads: int, qk_norm: bool, *, text_first: bool, dual: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, heads, qk_norm, text_first, text_out=not last)
        self.attn2 = SelfAttention(dim, heads, qk_norm) if dual else None
        self.ff = FeedForward(dim, GELU)
        self.ff_context = None if last else FeedForward(dim, GELU)

    def forward(
        self, image: Tensor, text: Tensor, modulation: Tensor, rotary: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, image tokens, D], [B, text tokens, D], [B, M] -> image and text."""
        of_image, of_text = self.norm1.own(modulation), self.norm1_context.own(modulation)
        both: tuple[Tensor, Tensor] = self.body(image, text, of_image, of_text, rotary)
        return both

    def body(
        self, image: Tensor, text: Tensor, of_image: Tensor, of_text: Tensor, rotary: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[B, image tokens, D], [B, text tokens, D], `Modulation.own` of each -> image and text."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = self.norm1(of_image)
        if self.ff_context is None:
            text_scale, text_shift = self.norm1_context(of_text)
        else:
            text_shift, text_scale, text_gate, *text_ff = self.norm1_context(of_text)
        second = [(dual[0], dual[1])] if dual else []
        normed, *normed_again = ops.modulate(image, (shift, scale), *second)
        (normed_text,) = ops.modulate(text, (text_shift, text_scale))
        to_image, to_text = self.attn(normed, normed_text, rotary)

        if self.attn2 is not None:
            image = ops.gate_residual(image, gate, to_image)
            gate, to_image = dual[2], self.attn2(*normed_again)
        image, normed = ops.gate_residual_modulate(image, gate, to_image, shift_ff, scale_ff)
        image = ops.gate_residual(image, gate_ff, self.ff(normed))

        if self.ff_context is not None:
            shift_ff, scale_ff, gate_ff = text_ff
            text, normed = ops.gate_residual_modulate(text, text_gate, to_text, shift_ff, scale_ff)
            text = ops.gate_residual(text, gate_ff, self.ff_context(normed))
        return image, text


def prepare_only(model: nn.Module) -> list[str]:
    """Names of the submodules that `forward` never reads."""
    modulations = [name for name, module in model.named_modules() if isinstance(module, Modulation)]
    return ["time_text_embed", "context_embedder", *modulations]


def check_conditioning(timesteps: Tensor, context: Tensor, pooled: Tensor, context_dim: int, pooled_dim: int) -> None:
    """Refuse conditioning that does not fit; shapes only, so nothing waits for the device.

    Raises:
        InputError: a shape does not fit.
    """
    if context.ndim != 3 or 0 in context.shape or context.shape[2] != context_dim:
        raise InputError(f"context is {list(context.shape)}; it must be [batch, tokens, {context_dim}].")
    batch = context.shape[0]
    if timesteps.ndim != 2 or timesteps.shape[1] != batch or timesteps.shape[0] == 0:
        raise InputError(f"timesteps is {list(timesteps.shape)}; it must be [steps, {batch}].")
    if pooled.shape != (batch, pooled_dim):
        raise InputError(f"pooled is {list(pooled.shape)}; it must be [{batch}, {pooled_dim}].")


def check_size(height: int, width: int, multiple: int, most: int | None = None) -> None:
    """Refuse latents of a size that cannot be cut into patches (in a trace a size is a symbol).

    Raises:
        InputError: names the size, and what it must be a multiple of or must not exceed.
    """
    for size in (height, width):
        if type(size) not in (int, torch.SymInt) or size < multiple or size % multiple or size > (most or size):
            right = f"positive multiples of {multiple}" + ("" if most is None else f" up to {most}")
            raise InputError(f"The latents are {height!r} x {width!r}; both must be {right}.")


def read_config(model: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a diffusers `transformer/config.json` over its defaults; what defaults to an integer must be one.

    Raises:
        InputError: names the key that is unknown, or whose value is no positive integer.
    """
    for key, value in config.items():
        if key not in defaults and key[:1] != "_" and value is not None:
            raise InputError(f"The {model} configuration has {key} = {value!r}, which is not supported.")
    raw = {key: config.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        if type(default) is int and (type(raw[key]) is not int or raw[key] < 1):
            raise refusal(model, key, raw[key], "an integer of at least 1")
    return raw


def refusal(model: str, key: str, value: object, right: str) -> InputError:
    """The error about one key of a configuration."""
    return InputError(f"The {model} configuration has {key} = {value!r}; it must be {right}.")
