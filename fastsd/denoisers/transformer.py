"""What the multimodal transformers of SD3 and Flux share (Esser et al. 2024).

Parameter names are those of `diffusers`, so that its checkpoints load without renaming.
Shapes: B batch, C latent channels, H and W latent height and width, D width of the tokens, L image and text tokens
together, M packed modulation columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd.denoisers.layers import GELU, FeedForward, TimestepEmbedding, row_chunks, timestep_embedding
from fastsd.errors import InputError

EPS = 1e-6  # of all norms in both families


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

    def forward(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """[B, M] -> `vectors` times [B, 1, D]."""
        return modulation[:, None, self.columns].chunk(self.vectors, dim=-1)


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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[B, L, D] scaled (1 is in the scale) and shifted by [B, 1, D] each."""
    return torch.addcmul(shift, x, scale)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last dimension, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Tokens [B, L, D] plus an update of the same shape, gated by [B, 1, D].

    In float16 the sum saturates, as in `diffusers` `FluxTransformerBlock`: one Inf would make the whole image NaN.
    """
    x = torch.addcmul(x, gate, update)
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


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


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of [B, L, heads, head dim] by cosines and sines [2, L, head dim / 2] (Su et al. 2021).

    Computed in float32, the dtype of the table, and rounded once.
    """
    cos, sin = rotary.unsqueeze(2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, L, heads, head dim] each -> [B, L, D]."""
    x: Tensor = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return x.transpose(1, 2).flatten(2)


class Projections(nn.Module):
    """What turns tokens into queries, keys and values."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q, self.norm_k = self.norms(qk_norm)

    def norms(self, qk_norm: bool) -> list[nn.Module]:
        """For each head of the queries and of the keys."""
        return [nn.RMSNorm(self.head_dim, eps=EPS) if qk_norm else nn.Identity() for _ in range(2)]

    def heads(self, x: Tensor, projection: nn.Module, norm: nn.Module, rotary: Tensor | None) -> Tensor:
        """[B, L, D] -> [B, L, heads, head dim], projected, normalised and rotated."""
        x = norm(projection(x).unflatten(-1, (-1, self.head_dim)))
        return x if rotary is None else rotate(x, rotary)

    def qkv(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens [B, L, D], [B, L, heads, head dim] each."""
        q, k = self.heads(x, self.to_q, self.norm_q, rotary), self.heads(x, self.to_k, self.norm_k, rotary)
        return q, k, self.to_v(x).unflatten(-1, (-1, self.head_dim))


class SelfAttention(Projections):
    """Attention over one kind of tokens; without `out` the output projection is left to the block."""

    def __init__(self, dim: int, heads: int, qk_norm: bool, out: bool = True) -> None:
        super().__init__(dim, heads, qk_norm)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)] if out else [])

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = attend(*self.qkv(x, rotary))
        for projection in self.to_out:
            x = projection(x)
        return x


class JointAttention(Projections):
    """Attention over image and text together, each with its own projections and norms.

    Source: `diffusers` `JointAttnProcessor2_0` (image first), `FluxAttnProcessor` (text first).
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool, text_first: bool, text_out: bool) -> None:
        super().__init__(dim, heads, qk_norm)
        self.text_first = text_first
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.norm_added_q, self.norm_added_k = self.norms(qk_norm)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim) if text_out else None

    def text_qkv(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`qkv` of the text."""
        q = self.heads(x, self.add_q_proj, self.norm_added_q, rotary)
        k = self.heads(x, self.add_k_proj, self.norm_added_k, rotary)
        return q, k, self.add_v_proj(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, image: Tensor, text: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Image [B, image tokens, D] and text [B, text tokens, D] -> the same, no text without `text_out`.

        Joined by `torch.cat`, not by writing into slices of a buffer: uncompiled on a CPU both take the same time, but
        Inductor lets what it fuses write straight into the result, and a graph gets one node, not a scatter per slice.
        """
        kinds = [(image, self.qkv), (text, self.text_qkv)][:: -1 if self.text_first else 1]
        sizes = [x.shape[1] for x, _ in kinds]
        tables = (None, None) if rotary is None else rotary.split(sizes, dim=1)
        parts = [qkv(x, table) for (x, qkv), table in zip(kinds, tables, strict=True)]
        joined = attend(*(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)))
        image, text = joined.split(sizes, dim=1)[:: -1 if self.text_first else 1]
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
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = self.norm1(modulation)
        if self.ff_context is None:
            text_scale, text_shift = self.norm1_context(modulation)
        else:
            text_shift, text_scale, text_gate, *text_ff = self.norm1_context(modulation)
        normed = layer_norm(image)
        to_image, to_text = self.attn(
            modulate(normed, shift, scale), modulate(layer_norm(text), text_shift, text_scale), rotary
        )

        image = add(image, gate, to_image)
        if self.attn2 is not None:
            shift, scale, gate = dual
            image = add(image, gate, self.attn2(modulate(normed, shift, scale)))
        image = add(image, gate_ff, self.ff(modulate(layer_norm(image), shift_ff, scale_ff)))

        if self.ff_context is not None:
            shift_ff, scale_ff, gate_ff = text_ff
            text = add(text, text_gate, to_text)
            text = add(text, gate_ff, self.ff_context(modulate(layer_norm(text), shift_ff, scale_ff)))
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
