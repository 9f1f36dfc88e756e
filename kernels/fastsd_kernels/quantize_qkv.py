# mypy: disable-error-code="no-untyped-def"
"""Queries and keys as int8, and values as float8, behind the norm and the rotation: what `attention_8bit` multiplies.

One launch for the tokens that share norms: a single stream, or each of text and image, which then write side by side
into the same buffers. Nothing is rounded in between. A program takes 64 tokens of a head:

- Queries and keys have one scale for them all, so a tile of scores is an integer product times one number a row
  (SageAttention, Zhang et al. 2024, https://arxiv.org/abs/2410.02367).
- Keys share a large offset in some channels, which would use up the steps of int8. Their mean is subtracted first:
  it adds one number to all scores of a query, which softmax does not see. Any vector does, if it is the same for all
  keys, so it is the mean of 64 keys spread over the tokens, which every program computes for itself: no pass over all
  keys precedes, and what is left of the offset is an eighth of the keys' deviation. Text and image each have their own;
  the difference of the two is what the attention adds again.
- Values have a scale for each channel (SageAttention2, Zhang et al. 2024, https://arxiv.org/abs/2411.10958), from the
  same spread tokens: e4m3 is as precise far below its largest number, so channels need only be of one order. What
  keeps every value in range is a second scale, a power of two for the 64 tokens, which costs the attention nothing.
  They are written transposed, in the order in which tensor cores hold the weights that they multiply.

In bf16 6 bytes an element of q, k, v are read and 3 written, where norm and rotation in place move 8. float8 needs
compute capability 8.9; queries and keys alone do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from fastsd_kernels import configs, qk_norm_rope
from fastsd_kernels.attention import SPLITS, strides
from fastsd_kernels.launch import TYPES, Variant, check, jit, next_power_of_2, run, tl, use_kernel

BLOCK = 64  # tokens that share scales
MOST = 127
MOST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max  # 448
LEAST = 1e-35  # magnitude of what shares a scale; what is below has no reciprocal in float32
FLOOR = 1.0  # magnitude of a block of values, as that of all tokens: float8 needs no smaller scale for smaller ones
HALVES = (torch.bfloat16, torch.float16)

# Head dimension -> its two parts, powers of two. Integer products are over multiples of 32 columns: the rest are zeros.
COLUMNS = {40: (64, 0), 64: (64, 0), 80: (64, 32), 128: (128, 0), 160: (128, 32)}
ROWS = SPLITS  # of transposed values

# The tensor cores give scores to a thread by pairs of columns and take weights in float8 by fours. In this order of 16
# values both are the same thread's, and no weight has to move.
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """`quantize_qkv` (or without values `quantize_qk`) of one stream in plain torch, in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(wide, copy=True) for x in (q, k))
    for x, weight in ((q, q_weight), (k, k_weight)):
        qk_norm_rope.reference(x.unsqueeze(2), weight, None, rotary, eps)
    mean = k[:, spread(k.shape[1]).to(k.device)].mean(1, keepdim=True)
    q8, q_scale = quantize_blocks(q)
    k8, k_scale = quantize_blocks(k - mean)
    results = q8, k8, q_scale * _factor(q.shape[3]), k_scale, mean.transpose(1, 2).float()
    if v is None:
        return results
    v = v.to(wide)
    channels = channel_scales(v)
    return *results, *quantize_values(v / channels), channels.transpose(1, 2).float()


def spread(tokens: int) -> Tensor:
    """Numbers of 64 tokens whose mean is subtracted: one of each 64th, at a place that differs from one to the next.

    Of an image of 64 rows they are in 64 columns, since rotations make a column's mean its own.
    """
    i = torch.arange(BLOCK if tokens else 0)
    return (i * BLOCK + i * 39 % BLOCK) * tokens // BLOCK**2


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, S, H, D] as int8 [B, H, T, columns], T tokens in whole blocks, and float32 scales [B, H, blocks].

    Halves round away from zero.
    """
    width = sum(COLUMNS[int(x.shape[3])])
    blocks = _in_blocks(x, width)
    largest = blocks.abs().amax((3, 4), keepdim=True)
    scale = torch.where(largest < LEAST, 1.0, largest / MOST)
    scale = torch.where(scale.isfinite(), scale, math.nan)
    scaled = (blocks * (1 / scale)).nan_to_num()
    numbers = (scaled + torch.where(scaled < 0, -0.5, 0.5)).to(torch.int8).flatten(2, 3)
    return numbers.contiguous(), scale[..., 0, 0].contiguous().float()


def channel_scales(v: Tensor) -> Tensor:
    """The order of each channel of v [B, S, H, D], [B, 1, H, D]: at least 1/256 of that of the largest."""
    some = v[:, spread(v.shape[1]).to(v.device)].abs()
    of_channel = F.pad(torch.where(some.isfinite(), some, 0.0), (0, 0, 0, 0, 0, 1)).amax(1, keepdim=True)
    largest = of_channel.amax(3, keepdim=True)
    return torch.where(largest < LEAST, 1.0, torch.maximum(of_channel, largest / 256))


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """v [B, S, H, D] as float8 [B, H, rows, T], in `ORDER`, and exponents of scales [B, H, blocks] in float32."""
    blocks = _in_blocks(v, sum(ROWS[int(v.shape[3])]))
    largest = blocks.abs().amax((3, 4), keepdim=True)
    exponent = torch.where(largest.isfinite(), (largest.clamp_min(FLOOR) / MOST_FLOAT8).log2().ceil(), math.nan)
    scaled = (blocks * (-exponent).exp2()).nan_to_num().clamp(-MOST_FLOAT8, MOST_FLOAT8)
    ordered = scaled.unflatten(3, (-1, 16))[:, :, :, :, list(ORDER)].flatten(2, 4)
    return ordered.transpose(2, 3).to(torch.float8_e4m3fn).contiguous(), exponent[..., 0, 0].contiguous().float()


def _in_blocks(x: Tensor, width: int) -> Tensor:
    """x [B, S, H, D] as [B, H, blocks, 64, width], with zeros beyond tokens and channels."""
    tokens, dim = x.shape[1], x.shape[3]
    padded = F.pad(x.transpose(1, 2), (0, width - dim, 0, -tokens % BLOCK))
    blocks: Tensor = padded.unflatten(2, (-(-tokens // BLOCK), BLOCK))
    return blocks


def _factor(dim: int) -> float:
    """Of the scores, for a softmax in base two."""
    return math.log2(math.e) / math.sqrt(dim)


@jit
def load_tokens(ptr, stride, index, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens of a head by their numbers, in float32; zero outside."""
    column = tl.arange(0, WIDTH)[None, :]
    pointers = ptr + index[:, None].to(tl.int64) * stride + column
    return tl.load(pointers, mask=inside[:, None] & (column < D), other=0.0).to(tl.float32)


@jit
def normed_tokens(
    ptr, stride, index, inside, weight, rotary, rotary_part, rotary_row, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Tokens of a head, normalised and rotated."""
    x = load_tokens(ptr, stride, index, inside, D, WIDTH)
    if NORM:
        column = tl.arange(0, WIDTH)
        factor = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * factor[None, :]
    if ROTATE:
        cos = load_tokens(rotary, rotary_row, index, inside, D // 2, WIDTH // 2)
        sin = load_tokens(rotary + rotary_part, rotary_row, index, inside, D // 2, WIDTH // 2)
        even, odd = tl.split(tl.reshape(x, [BLOCK, WIDTH // 2, 2]))
        x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [BLOCK, WIDTH])
    return x


@jit
def largest_of(x):
    """The largest magnitude, Inf where there is NaN: the maximum passes NaN over, a comparison does not."""
    magnitude = tl.abs(x)
    return tl.max(tl.max(tl.where(magnitude <= 3.4028234e38, magnitude, float("inf")), 1), 0)


@jit
def store_int8(x, factor, out, scale_ptr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """64 tokens, and their scale times a factor; zeros and NaN where they are not finite."""
    largest = largest_of(x)
    finite = largest < float("inf")
    scale = tl.where(largest < 1e-35, 1.0, largest / 127.0)
    scaled = tl.where(finite, x * (1.0 / scale), 0.0)
    column = tl.arange(0, WIDTH)[None, :]
    numbers = (scaled + tl.where(scaled < 0.0, -0.5, 0.5)).to(tl.int8)
    tl.store(out + tl.arange(0, BLOCK)[:, None] * COLUMNS + column, numbers, mask=column < COLUMNS)
    tl.store(scale_ptr, tl.where(finite, scale * factor, float("nan")))


@jit
def _quantize_kernel(
    q_ptr, k_ptr, v_ptr, q_weight, k_weight, rotary,
    tokens, heads, first, blocks, side, sides, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, rotary_part, rotary_row,
    eps,
    q8, k8, q_scale, k_scale, means, v8, v_exponent, channels,
    FACTOR: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """64 tokens of a head, into block `first` + program of `blocks`. Strides are in units of UNIT elements."""
    head = tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    block = head.to(tl.int64) * blocks + first + tl.program_id(0)
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    index = tl.program_id(0) * BLOCK + row
    inside = index < tokens
    q_ptr += (b * q_b + h * q_h) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT

    q = normed_tokens(
        q_ptr, q_s * UNIT, index, inside, q_weight, rotary, rotary_part, rotary_row, eps,
        D, WIDTH, BLOCK, NORM, ROTATE,
    )  # fmt: skip
    store_int8(q, FACTOR, q8 + block * BLOCK * COLUMNS, q_scale + block, WIDTH, COLUMNS, BLOCK)

    spread = ((row * BLOCK + row * 39 % BLOCK).to(tl.int64) * tokens) // (BLOCK * BLOCK)
    some = normed_tokens(
        k_ptr, k_s * UNIT, spread, row < BLOCK, k_weight, rotary, rotary_part, rotary_row, eps,
        D, WIDTH, BLOCK, NORM, ROTATE,
    )  # fmt: skip
    mean = tl.sum(some, 0) / BLOCK
    of_stream = (head.to(tl.int64) * sides + side) * D + column
    if tl.program_id(0) == 0:
        tl.store(means + of_stream, mean, mask=column < D)
    k = normed_tokens(
        k_ptr, k_s * UNIT, index, inside, k_weight, rotary, rotary_part, rotary_row, eps,
        D, WIDTH, BLOCK, NORM, ROTATE,
    )  # fmt: skip
    k = tl.where(inside[:, None], k - mean[None, :], 0.0)
    store_int8(k, 1.0, k8 + block * BLOCK * COLUMNS, k_scale + block, WIDTH, COLUMNS, BLOCK)

    if VALUES:
        v_ptr += (b * v_b + h * v_h) * UNIT
        some = tl.abs(load_tokens(v_ptr, v_s * UNIT, spread, row < BLOCK, D, WIDTH))
        channel = tl.max(tl.where(some <= 3.4028234e38, some, 0.0), 0)
        largest = tl.max(channel, 0)
        channel = tl.where(largest < 1e-35, 1.0, tl.maximum(channel, largest / 256.0))
        if tl.program_id(0) == 0:
            tl.store(channels + of_stream, channel, mask=column < D)
        v = load_tokens(v_ptr, v_s * UNIT, index, inside, D, WIDTH) / channel[None, :]
        largest = largest_of(v)
        finite = largest < float("inf")
        exponent = tl.ceil(tl.log2(tl.maximum(largest, 1.0) / 448.0))  # FLOOR
        tl.store(v_exponent + block, tl.where(finite, exponent, float("nan")))
        scaled = tl.where(finite, v * tl.exp2(-exponent), 0.0)
        # The pairs of both halves of 16 tokens take turns: `ORDER`.
        pairs = tl.permute(tl.reshape(scaled, [BLOCK // 16, 2, 4, 2, WIDTH]), [0, 2, 1, 3, 4])
        numbers = tl.trans(tl.reshape(pairs, [BLOCK, WIDTH])).to(v8.dtype.element_ty)
        all_tokens = tl.cast(blocks, tl.int64) * BLOCK  # no method: to torch 2.11's tracer sizes are constants
        place = head.to(tl.int64) * ROWS * all_tokens + (first + tl.program_id(0)).to(tl.int64) * BLOCK
        pointers = v8 + place + column[:, None] * all_tokens + row[None, :]
        tl.store(pointers, numbers, mask=column[:, None] < ROWS)


def launch(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None,
    eps: float, first: int, side: int, results: Sequence[Tensor],
) -> None:  # fmt: skip
    """One stream into its part of the results of `quantize_qkv` or `quantize_qk`, from block `first` on."""
    batch, tokens, heads, dim = q.shape
    constexprs, warps = configuration(int(dim))
    q8, _, q_scale, _, means = results[:5]
    # Where there is nothing, any pointer does: it is not read.
    of_values = (q8, q_scale, q_scale) if v is None else results[5:]
    weights = (q if q_weight is None else q_weight, k if k_weight is None else k_weight)
    angles = (q, 0, 0) if rotary is None else (rotary, rotary.stride(0), rotary.stride(1))
    unit, in_unit = strides(q, k, q if v is None else v)
    run(
        _quantize_kernel,
        (-(-tokens // BLOCK), batch * heads),
        *(q, k, q if v is None else v, *weights, angles[0]),
        *(tokens, heads, first, q_scale.shape[2], side, means.shape[2]),
        *(stride for of_tensor in in_unit for stride in of_tensor),
        *(*angles[1:], eps, *results[:5], *of_values),
        num_warps=warps,
        UNIT=unit,
        NORM=q_weight is not None,
        ROTATE=rotary is not None,
        VALUES=v is not None,
        **constexprs,
    )


def configuration(dim: int) -> tuple[dict[str, Any], int]:
    """Constexprs and warps for heads of that dimension: 32 numbers a thread."""
    width = next_power_of_2(dim)
    sizes = {"D": dim, "WIDTH": width, "COLUMNS": sum(COLUMNS[dim]), "ROWS": sum(ROWS[dim]), "BLOCK": BLOCK}
    return {"FACTOR": _factor(dim), **sizes}, width // 16


@triton_op("fastsd::quantize_qk", mutates_args={})
def quantize_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: Tensor | None,
    q_text: Tensor | None = None,
    k_text: Tensor | None = None,
    q_text_weight: Tensor | None = None,
    k_text_weight: Tensor | None = None,
    rotary_text: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`quantize_qkv` without values, for `attention_int8`.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    image = (q, k, None, q_weight, k_weight, rotary)
    text = (q_text, k_text, None, q_text_weight, k_text_weight, rotary_text)
    q8, k8, q_scale, k_scale, means = _quantize(image, text, eps)
    return q8, k8, q_scale, k_scale, means


@triton_op("fastsd::quantize_qkv", mutates_args={})
def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: Tensor | None,
    q_text: Tensor | None = None,
    k_text: Tensor | None = None,
    v_text: Tensor | None = None,
    q_text_weight: Tensor | None = None,
    k_text_weight: Tensor | None = None,
    rotary_text: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values for `attention_fp8`: normalised and rotated as by `qk_norm_rope`, and then quantised.

    Text, where there is any, has norms and angles of its own, and comes first in the results. Both streams fill whole
    blocks of 64 tokens, T together. A block below 1e-35 in magnitude becomes zeros with the scale of 1, one with NaN or
    Inf zeros with the scale NaN; such a key may do so to all keys of its head, all of whose results it spoils anyway.

    Args:
        q: [batch, tokens, heads, head_dim], any strides whose last is 1; head_dim is 40, 64, 80, 128 or 160.
        k: so too.
        v: so too.
        q_weight: [head_dim], None for no norm.
        k_weight: [head_dim], None for no norm.
        rotary: cosines and sines [2, tokens, head_dim / 2], float32, any strides whose last is 1; None for no rotation.
        q_text: [batch, text tokens, heads, head_dim]; None for one stream only, and then all of the text.
        k_text: so too.
        v_text: so too.
        q_text_weight: as q_weight.
        k_text_weight: as k_weight.
        rotary_text: as rotary.
        eps: added to the mean square.

    Returns:
        All contiguous. Queries and keys, int8 [batch, heads, T, columns], in -127..127 and with zeros beyond tokens and
        head_dim (`COLUMNS`); their scales, float32 [batch, heads, T / 64], with log2(e) / sqrt(head_dim) in those of
        the queries; what was subtracted from the keys of each stream, float32 [batch, heads, streams, head_dim];
        values, float8_e4m3fn [batch, heads, rows, T] (`ROWS`), every 16 tokens in `ORDER`; their scales, as exponents
        of two, float32 [batch, heads, T / 64], times those of the channels in each stream, float32 [batch, heads,
        streams, head_dim].

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or the GPU has no float8.
    """
    image = (q, k, v, q_weight, k_weight, rotary)
    text = (q_text, k_text, v_text, q_text_weight, k_text_weight, rotary_text)
    q8, k8, q_scale, k_scale, means, v8, v_exponent, channels = _quantize(image, text, eps)
    return q8, k8, q_scale, k_scale, means, v8, v_exponent, channels


Stream = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _quantize(image: Stream, text: Stream, eps: float) -> tuple[Tensor, ...]:
    q, _, v = image[:3]
    assert q is not None
    _check_stream("", image, v is not None)
    streams = [image]
    if text[0] is None:
        check(all(x is None for x in text), "There is no q_text; then there must be nothing else of the text.")
    else:
        _check_stream("_text", text, v is not None)
        check(text[0].shape[1] > 0, "q_text has no tokens; without a text it must be None.")
        check(q.shape[1] > 0, "q has no tokens; beside a text it must have some.")
        shapes = [[x.shape[i] for i in (0, 2, 3)] for x in (text[0], q)]
        check(
            shapes[0] == shapes[1], f"q_text has (batch, heads, head_dim) {shapes[0]}; they must be {shapes[1]}, as q."
        )
        check(text[0].dtype == q.dtype, f"q_text is {text[0].dtype}; it must be {q.dtype}, as q.")
        check(text[0].device == q.device, f"q_text is on {text[0].device}; it must be on {q.device}, as q.")
        streams.insert(0, text)
    if not use_kernel(q):
        of_streams = [reference(*stream, eps) for stream in streams]  # type: ignore[arg-type]
        # All have their tokens, or blocks of them, third, but the transposed values.
        return tuple(
            torch.cat(parts, 3 if i == 5 else 2).contiguous() for i, parts in enumerate(zip(*of_streams, strict=True))
        )
    if v is not None:
        check_float8(q.device)
    batch, heads, dim = q.shape[0], q.shape[2], int(q.shape[3])
    counts = [-(-stream[0].shape[1] // BLOCK) for stream in streams]  # type: ignore[union-attr]
    blocks = sum(counts)
    numbers, scales = (batch, heads, blocks * BLOCK, sum(COLUMNS[dim])), (batch, heads, blocks)
    of_stream = (batch, heads, len(streams), dim)
    sizes: list[tuple[int, ...]] = [numbers, numbers, scales, scales, of_stream]
    dtypes = [torch.int8] * 2 + [torch.float32] * 3
    if v is not None:
        sizes += [(batch, heads, sum(ROWS[dim]), blocks * BLOCK), scales, of_stream]
        dtypes += [torch.float8_e4m3fn, torch.float32, torch.float32]
    results = tuple(torch.empty(size, dtype=t, device=q.device) for size, t in zip(sizes, dtypes, strict=True))
    for side, stream in enumerate(streams):
        launch(*stream, eps, sum(counts[:side]), side, results)  # type: ignore[arg-type]
    return results


def check_float8(device: torch.device) -> None:
    """Refuse a GPU without float8.

    Raises:
        ValueError: it has none.
    """
    check(
        configs.has_float8(device),
        "This GPU has no float8, which needs compute capability 8.9; use quantize_qk and attention_int8.",
    )


def _check_stream(suffix: str, stream: Stream, values: bool) -> None:
    """Refuse what is not queries, keys and values of the same tokens and heads, with weights and angles that fit."""
    q, k, v, q_weight, k_weight, rotary = stream
    assert q is not None
    check(q.dim() == 4, f"q{suffix} has {q.dim()} dimensions; it must be [batch, tokens, heads, head_dim].")
    length, dim = q.shape[1], int(q.shape[3])
    check(dim in COLUMNS, f"q{suffix} has the head dimension {dim}; it must be one of {', '.join(map(str, COLUMNS))}.")
    alike = (q_weight is None) == (k_weight is None)
    check(alike, f"Only one of q{suffix}_weight and k{suffix}_weight is given; it must be both or none.")
    shape, halves, angles = list(q.shape), [dim], [2, length, dim // 2]
    check(k is not None, f"k{suffix} is missing; it must be {shape}.")
    check(v is not None or not values, f"v{suffix} is missing; it must be {shape}.")
    for name, x, right, dtype in (
        (f"q{suffix}", q, shape, q.dtype),
        (f"k{suffix}", k, shape, q.dtype),
        (f"v{suffix}", v, shape, q.dtype),
        (f"q{suffix}_weight", q_weight, halves, None),
        (f"k{suffix}_weight", k_weight, halves, None),
        (f"rotary{suffix}", rotary, angles, torch.float32),
    ):
        if x is None:
            continue
        check(list(x.shape) == right, f"{name} is {list(x.shape)}; it must be {right}.")
        check(dtype in (None, x.dtype), f"{name} is {x.dtype}; it must be {dtype}.")
        check(x.stride(-1) == 1, f"{name} has stride {x.stride(-1)} in its last dimension; it must be 1.")
        check(x.device == q.device, f"{name} is on {x.device} but q{suffix} on {q.device}; all must be on one device.")


def _variant(model: str, dim: int, rotate: bool, dtype: torch.dtype, values: bool) -> Variant:
    kind = TYPES[dtype]
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight", "k_weight"), f"*{kind}") | {"rotary": "*fp32"}
    integers = (
        "tokens",
        "heads",
        "first",
        "blocks",
        "side",
        "sides",
        *(f"{x}_{axis}" for x in "qkv" for axis in "bsh"),
    )
    angles = {"rotary_part": "i32:16", "rotary_row": "i32:16", "eps": "fp32"}
    results = {"q8": "*i8", "k8": "*i8", "v8": "*fp8e4nv" if values else "*i8"}
    results |= dict.fromkeys(("q_scale", "k_scale", "means", "v_exponent", "channels"), "*fp32")
    constexprs, warps = configuration(dim)
    return Variant(
        f"{'qkv' if values else 'qk'}-{model}-{dim}-{kind}",
        _quantize_kernel,
        {**pointers, **dict.fromkeys(integers, "i32"), **angles, **results},
        {**constexprs, "UNIT": 8, "NORM": dim in (64, 128), "ROTATE": rotate, "VALUES": values},
        warps,
        arches=(89, 90) if values else (80, 89, 90),
    )


VARIANTS = tuple(
    _variant(model, dim, rotate, dtype, values)
    for model, dim, rotate in (
        ("sd35", 64, False),
        ("flux", 128, True),
        *(("sd15", dim, False) for dim in (40, 80, 160)),
    )
    for dtype in HALVES
    for values in (False, True)
)
