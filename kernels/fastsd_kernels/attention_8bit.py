# mypy: disable-error-code="no-untyped-def"
"""Attention in eight bits: scores from int8 queries and keys, and values in float8 or as they are.

The ideas are SageAttention's (Zhang et al. 2024, https://arxiv.org/abs/2410.02367 and https://arxiv.org/abs/2411.10958);
`quantize_qkv` writes what is multiplied here. A tile of scores is an integer product times one number a row. What is
particular:

- In the float8 form (e4m3) weights are times the scale of their tile's values, and a row's largest so far becomes 224
  to 448: both are summands of the exponent. They differ from tile to tile by powers of two only, and the sum is that of
  the rounded weights, so equal weights are rounded alike and nothing is lost where all are. The product of a tile
  starts at zero, since float8 products add up in fewer digits than float32 has, and is added in float32.
- Weights go from the scores' product to the values' without leaving their thread: the keys' order is that of the
  registers (`quantize_qkv.ORDER`).
- Text and image lie side by side in the same buffers. Each has had another vector subtracted from its keys; what the
  difference adds to the scores of the text is one number for each query, and part of its running maximum.

It is an approximation that a caller has to ask for: no other op dispatches to it. 2 B H Sq Sk D integer operations and
as many floating-point ones. The float8 form needs compute capability 8.9, the other one 8.0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from fastsd_kernels import configs
from fastsd_kernels.attention import finish, load_tile, strides
from fastsd_kernels.launch import TYPES, Variant, check, jit, known, run, tl, use_kernel
from fastsd_kernels.quantize_qkv import BLOCK, COLUMNS, HALVES, ORDER, ROWS, check_float8

PLACES = sorted(range(16), key=ORDER.__getitem__)  # of 16 tokens

# Queries of a tile, warps, tiles in flight: what compiles without spills on all chips, and no claim of speed.
BLOCK_M, WARPS, STAGES = 128, 8, 3


def reference_int8(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor, v: Tensor, v_text: Tensor | None = None
) -> Tensor:
    """`attention_int8` in plain torch, in at least float32."""
    values = v if v_text is None else torch.cat([v_text, v], 1)
    q, k = _dequantized(q8, k8, q_scale, k_scale, means, _lengths(v, v_text))
    out = F.scaled_dot_product_attention(q, k, values.transpose(1, 2).to(q.dtype), scale=math.log(2))
    return out.transpose(1, 2).contiguous().to(v.dtype)


def reference_fp8(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor, v8: Tensor, v_exponent: Tensor,
    channels: Tensor, tokens: int, text: int = 0, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`attention_fp8` in plain torch, in at least float32, with weights that are not rounded."""
    lengths = [text, tokens][2 - means.shape[2] :]
    q, k = _dequantized(q8, k8, q_scale, k_scale, means, lengths)
    values = _values(v8, v_exponent, channels, lengths)
    return F.scaled_dot_product_attention(q, k, values, scale=math.log(2)).transpose(1, 2).contiguous().to(dtype)


def _dequantized(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Queries and keys [batch, heads, tokens, head_dim], those of the text first, with what was subtracted."""
    q, k = (
        _tokens_of(x * scale.repeat_interleave(BLOCK, 2).unsqueeze(3), lengths)[..., : means.shape[3]]
        for x, scale in ((q8, q_scale), (k8, k_scale))
    )
    return q, k + _of_tokens(means, lengths)


def _values(v8: Tensor, v_exponent: Tensor, channels: Tensor, lengths: list[int]) -> Tensor:
    """Values [batch, heads, tokens, head_dim], those of the text first."""
    in_order = v8.to(channels.dtype).unflatten(3, (-1, 4, 16))[..., PLACES].flatten(4)
    blocks = in_order.permute(0, 1, 3, 4, 2) * v_exponent.exp2()[..., None, None]
    return _tokens_of(blocks.flatten(2, 3), lengths)[..., : channels.shape[3]] * _of_tokens(channels, lengths)


def _tokens_of(x: Tensor, lengths: list[int]) -> Tensor:
    """x [batch, heads, T, ...] without what fills the last block of each stream."""
    filled = [-(-n // BLOCK) * BLOCK for n in lengths]
    return torch.cat([part[:, :, :n] for part, n in zip(x.split(filled, 2), lengths, strict=True)], 2)


def _of_tokens(x: Tensor, lengths: list[int]) -> Tensor:
    """x [batch, heads, streams, head_dim] for every token."""
    return torch.cat([x[:, :, i : i + 1].expand(-1, -1, n, -1) for i, n in enumerate(lengths)], 2)


def _lengths(x: Tensor, x_text: Tensor | None) -> list[int]:
    return [x.shape[1]] if x_text is None else [x_text.shape[1], x.shape[1]]


@jit
def attend_tile_8bit(
    q0, q1, q_scale, shift, k_ptr, k_scale, v_ptr, v_stride, v_exponent, keys, m, l, acc0, acc1,
    D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, FLOAT8: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values: the running maximum, sum and numerator after it."""
    row = tl.arange(0, BLOCK)
    k_ptr += row[:, None] * (Q0 + Q1)
    s = tl.dot(q0, tl.load(k_ptr + tl.arange(0, Q0)[None, :]).T)
    if Q1 > 0:
        s = tl.dot(q1, tl.load(k_ptr + Q0 + tl.arange(0, Q1)[None, :]).T, acc=s, out_dtype=tl.int32)
    s = s.to(tl.float32)
    if MASK:
        s = tl.where(row[None, :] < keys, s, float("-inf"))
    scale = q_scale * tl.load(k_scale)
    if FLOAT8:
        exponent = tl.load(v_exponent)
        shift += exponent
    largest = tl.max(s, 1) * scale + shift
    if FLOAT8:
        largest = tl.ceil(largest)
    m_new = tl.maximum(m, largest)
    correction = tl.exp2(m - m_new)
    if FLOAT8:
        p = tl.exp2(s * scale[:, None] + (shift - m_new + 8.807354922057604)[:, None])  # log2(448)
        pairs = tl.reshape(p.to(tl.float8e4nv), [BLOCK_M, BLOCK // 16, 2, 4, 2])
        p = tl.reshape(tl.permute(pairs, [0, 1, 3, 2, 4]), [BLOCK_M, BLOCK])
        # The tensor cores add up the weights as well: a thread would have to turn them into float32 again.
        ones = tl.full([BLOCK, 8], 1.0, tl.float32).to(tl.float8e4nv)
        l = l * correction[:, None] + tl.dot(p, ones, max_num_imprecise_acc=BLOCK) * tl.exp2(-exponent)
        v_ptr += row[None, :]
        v0 = tl.load(v_ptr + tl.arange(0, V0)[:, None] * v_stride)
        acc0 = acc0 * correction[:, None] + tl.dot(p, v0.T, max_num_imprecise_acc=BLOCK)
        if V1 > 0:
            v1 = tl.load(v_ptr + (V0 + tl.arange(0, V1))[:, None] * v_stride)
            acc1 = acc1 * correction[:, None] + tl.dot(p, v1.T, max_num_imprecise_acc=BLOCK)
    else:
        p = tl.exp2(s * scale[:, None] + (shift - m_new)[:, None])
        l = l * correction + tl.sum(p, 1)
        v0 = load_tile(v_ptr, v_stride, keys, 0, V0, D, BLOCK, MASK)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc=acc0 * correction[:, None])
        if V1 > 0:
            v1 = load_tile(v_ptr, v_stride, keys, V0, V1, D, BLOCK, MASK)
            acc1 = tl.dot(p, v1, acc=acc1 * correction[:, None])
    return m_new, l, acc0, acc1


@jit
def in_stream(ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST.. of D numbers of a stream, as a row; 1 beyond them."""
    column = FIRST + tl.arange(0, WIDTH)
    return tl.load(ptr + column, mask=column < D, other=1.0)[None, :]


@jit
def _attention_8bit_kernel(
    q_ptr, k_ptr, q_scale, k_scale, means, v_text_ptr, v_ptr, v_exponent, channels,
    text, image, heads, vt_b, vt_s, vt_h, v_b, v_s, v_h, ot_b, ot_s, ot_h, o_b, o_s, o_h,
    out_text_ptr, out_ptr,
    D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    FLOAT8: tl.constexpr, JOINT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of one stream's queries of one head; neighbours share the head, so its keys and values are in L2.

    Strides are in units of UNIT elements.
    """
    tiles = tl.cdiv(image, BLOCK_M)
    blocks = tl.cdiv(image, BLOCK)
    if JOINT:
        text_tiles = tl.cdiv(text, BLOCK_M)
        text_blocks = tl.cdiv(text, BLOCK)
        tiles += text_tiles
        blocks += text_blocks
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b = head // heads
    h = head % heads
    out_ptr += (b * o_b + h * o_h) * UNIT
    v_exponent += head * blocks
    channels += head * D
    if FLOAT8:
        v_ptr += head * (V0 + V1) * blocks * BLOCK
    else:
        v_ptr += (b * v_b + h * v_h) * UNIT
        if JOINT:
            v_text_ptr += (b * vt_b + h * vt_h) * UNIT
    first = tile * BLOCK_M
    rows = image - first
    block = tile * (BLOCK_M // BLOCK)
    o_stride = o_s * UNIT
    if JOINT:
        is_text = tile < text_tiles
        first = tl.where(is_text, tile, tile - text_tiles) * BLOCK_M
        rows = tl.where(is_text, text, image) - first
        block = first // BLOCK + tl.where(is_text, 0, text_blocks)
        o_stride = tl.where(is_text, ot_s, o_s) * UNIT
        out_ptr = tl.where(is_text, out_text_ptr + (b * ot_b + h * ot_h) * UNIT, out_ptr)

    row = tl.arange(0, BLOCK_M)
    block += head * blocks
    scale = tl.load(q_scale + block + row // BLOCK, mask=row < rows, other=0.0)
    q_ptr += block * BLOCK * (Q0 + Q1)
    q0 = load_tile(q_ptr, Q0 + Q1, rows, 0, Q0, Q0 + Q1, BLOCK_M, True)
    m = tl.full([BLOCK_M], -3.4e38, tl.float32)
    l = tl.zeros([BLOCK_M, 8] if FLOAT8 else [BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    # Without a second part its name is for something that is there, and never read.
    q1 = q0
    acc1 = l
    if Q1 > 0:
        q1 = load_tile(q_ptr, Q0 + Q1, rows, Q0, Q1, Q0 + Q1, BLOCK_M, True)
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    k_ptr += head * blocks * BLOCK * (Q0 + Q1)
    k_scale += head * blocks
    shift = tl.zeros([BLOCK_M], tl.float32)
    if JOINT:
        channels += head * D  # of two streams
        means += head * 2 * D
        apart = in_stream(means, 0, Q0, D) - in_stream(means + D, 0, Q0, D)
        shift += tl.sum(q0.to(tl.float32) * apart, 1) * scale
        if Q1 > 0:
            apart = in_stream(means, Q0, Q1, D) - in_stream(means + D, Q0, Q1, D)
            shift += tl.sum(q1.to(tl.float32) * apart, 1) * scale
    # The text, where there is one, and then the image. Two copies of the loop would take more registers.
    for stream in tl.range(0, 2 if JOINT else 1, num_stages=1):
        keys = image
        if JOINT:
            keys = tl.where(stream == 0, text, image)
        of_v = v_ptr
        v_stride = v_s * UNIT
        if FLOAT8:
            v_stride = blocks * BLOCK
        elif JOINT:
            of_v = tl.where(stream == 0, v_text_ptr, v_ptr)
            v_stride = tl.where(stream == 0, vt_s, v_s) * UNIT
        for _ in tl.range(0, keys // BLOCK):
            m, l, acc0, acc1 = attend_tile_8bit(
                q0, q1, scale, shift, k_ptr, k_scale, of_v, v_stride, v_exponent, BLOCK, m, l, acc0, acc1,
                D, Q0, Q1, V0, V1, BLOCK_M, BLOCK, FLOAT8, False,
            )  # fmt: skip
            k_ptr += BLOCK * (Q0 + Q1)
            k_scale += 1
            if FLOAT8:
                of_v += BLOCK
                v_exponent += 1
            else:
                of_v += BLOCK * v_stride
        if TAIL:  # noqa: SIM102  (known to the compiler, what follows is not)
            if keys % BLOCK > 0:
                m, l, acc0, acc1 = attend_tile_8bit(
                    q0, q1, scale, shift, k_ptr, k_scale, of_v, v_stride, v_exponent, keys % BLOCK, m, l, acc0, acc1,
                    D, Q0, Q1, V0, V1, BLOCK_M, BLOCK, FLOAT8, True,
                )  # fmt: skip
                k_ptr += BLOCK * (Q0 + Q1)
                k_scale += 1
                if FLOAT8:
                    of_v += BLOCK
                    v_exponent += 1
        if FLOAT8:
            v_ptr = of_v
            factor0 = in_stream(channels, 0, V0, D)
            if JOINT:
                factor0 /= tl.where(stream == 0, in_stream(channels + D, 0, V0, D), 1.0)
            acc0 *= factor0
            if V1 > 0:
                factor1 = in_stream(channels, V0, V1, D)
                if JOINT:
                    factor1 /= tl.where(stream == 0, in_stream(channels + D, V0, V1, D), 1.0)
                acc1 *= factor1
            channels += D
        if JOINT:
            shift = tl.zeros([BLOCK_M], tl.float32)
    if FLOAT8:
        l = tl.sum(l, 1) / 8
    finish(out_ptr + first.to(tl.int64) * o_stride, o_stride, rows, l, acc0, acc1, D, V0, V1, BLOCK_M)


def launch(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor,
    v_text: Tensor | None, v: Tensor, v_exponent: Tensor | None, channels: Tensor | None,
    out_text: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Run the kernel; arguments as in the ops. Values are those of `quantize_qkv` where they have scales."""
    batch, image, heads, dim = out.shape
    text = 0 if out_text is None else out_text.shape[1]
    # Where there is no text, or values that have no strides, others do: they are not read.
    out_text = out if out_text is None else out_text
    values = (out, out) if v_exponent is not None else (v if v_text is None else v_text, v)
    unit, in_unit = strides(*values, out_text, out)
    run(
        _attention_8bit_kernel,
        ((-(-text // BLOCK_M) + -(-image // BLOCK_M)) * batch * heads,),
        *(q8, k8, q_scale, k_scale, means, v if v_text is None else v_text, v),
        *(q_scale if v_exponent is None else v_exponent, means if channels is None else channels),
        *(text, image, heads),
        *(stride for of_tensor in in_unit for stride in of_tensor),
        *(out_text, out),
        **constants(int(dim)),
        UNIT=unit,
        FLOAT8=v_exponent is not None,
        JOINT=means.shape[2] == 2,
        TAIL=not (known(text % BLOCK == 0) and known(image % BLOCK == 0)),
        num_warps=WARPS,
        num_stages=STAGES,
    )


def constants(dim: int) -> dict[str, int]:
    """What the kernel knows about the head dimension."""
    names = ("D", "Q0", "Q1", "V0", "V1", "BLOCK_M", "BLOCK")
    return dict(zip(names, (dim, *COLUMNS[dim], *ROWS[dim], BLOCK_M, BLOCK), strict=True))


@triton_op("fastsd::attention_int8", mutates_args={})
def attention_int8(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor, v: Tensor, v_text: Tensor | None = None
) -> Tensor:
    """Attention of what `quantize_qk` gives to values that are not quantised.

    Args:
        q8: the results of `quantize_qk`, in their order, for the tokens of v_text and v.
        k8: so too.
        q_scale: so too.
        k_scale: so too.
        means: so too.
        v: bfloat16 or float16 [batch, tokens, heads, head_dim], any strides whose last is 1.
        v_text: the values of the text, where the queries and keys have one.

    Returns:
        [batch, text and other tokens, heads, head_dim], contiguous, as v.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    check_attention((q8, k8, q_scale, k_scale, means), _lengths(v, v_text), v.dtype, v=v, v_text=v_text)
    if not _has_kernel(v):
        return reference_int8(q8, k8, q_scale, k_scale, means, v, v_text)
    text = 0 if v_text is None else v_text.shape[1]
    out = torch.empty((v.shape[0], text + v.shape[1], *v.shape[2:]), dtype=v.dtype, device=v.device)
    out_text = None if v_text is None else out.narrow(1, 0, text)
    launch(q8, k8, q_scale, k_scale, means, v_text, v, None, None, out_text, out.narrow(1, text, v.shape[1]))
    return out


@triton_op("fastsd::attention_int8_out", mutates_args={"out", "out_text"})
def attention_int8_out(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor, v: Tensor, out: Tensor,
    v_text: Tensor | None, out_text: Tensor | None,
) -> None:  # fmt: skip
    """As `attention_int8`, into `out` and, where there is a text, `out_text`, both as the values and of any strides.

    There are no defaults: torch 2.11 has no ops that write to an argument which was left out.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    lengths = _lengths(v, v_text)
    tensors = {"v": v, "v_text": v_text, "out": out, "out_text": out_text}
    check_attention((q8, k8, q_scale, k_scale, means), lengths, v.dtype, **tensors)
    if _has_kernel(out):
        launch(q8, k8, q_scale, k_scale, means, v_text, v, None, None, out_text, out)
    else:
        _split(reference_int8(q8, k8, q_scale, k_scale, means, v, v_text), out, out_text)


@triton_op("fastsd::attention_fp8", mutates_args={})
def attention_fp8(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor, v8: Tensor, v_exponent: Tensor,
    channels: Tensor, tokens: int, text: int = 0, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Attention of what `quantize_qkv` gives, with weights and values in float8.

    Args:
        q8: the results of `quantize_qkv`, in their order.
        k8: so too.
        q_scale: so too.
        k_scale: so too.
        means: so too.
        v8: so too.
        v_exponent: so too.
        channels: so too.
        tokens: how many there are beside those of the text.
        text: how many tokens the text has; 0 without one.
        dtype: of the result, bfloat16 or float16.

    Returns:
        [batch, text + tokens, heads, head_dim], contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or the GPU has no float8.
    """
    check_attention((q8, k8, q_scale, k_scale, means, v8, v_exponent, channels), _pair(means, text, tokens), dtype)
    if not _has_kernel(q_scale, float8=True):
        return reference_fp8(q8, k8, q_scale, k_scale, means, v8, v_exponent, channels, tokens, text, dtype)
    batch, heads, streams, dim = means.shape
    out = torch.empty((batch, text + tokens, heads, dim), dtype=dtype, device=q8.device)
    out_text = out.narrow(1, 0, text) if streams == 2 else None
    launch(q8, k8, q_scale, k_scale, means, None, v8, v_exponent, channels, out_text, out.narrow(1, text, tokens))
    return out


@triton_op("fastsd::attention_fp8_out", mutates_args={"out", "out_text"})
def attention_fp8_out(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, means: Tensor, v8: Tensor, v_exponent: Tensor,
    channels: Tensor, out: Tensor, out_text: Tensor | None,
) -> None:  # fmt: skip
    """As `attention_fp8`, into `out` and, where there is a text, `out_text`: [batch, tokens, heads, head_dim], strided.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or the GPU has no float8.
    """
    lengths, quantized = _lengths(out, out_text), (q8, k8, q_scale, k_scale, means, v8, v_exponent, channels)
    check_attention(quantized, lengths, out.dtype, out=out, out_text=out_text)
    if _has_kernel(out, float8=True):
        launch(q8, k8, q_scale, k_scale, means, None, v8, v_exponent, channels, out_text, out)
    else:
        _split(reference_fp8(*quantized, lengths[-1], sum(lengths[:-1]), out.dtype), out, out_text)


def _pair(means: Tensor, text: int, tokens: int) -> list[int]:
    """The lengths of the streams, for there are as many of the means; a text without one is refused by them."""
    return [text, tokens] if text or (means.dim() == 4 and means.shape[2] == 2) else [tokens]


def _split(result: Tensor, out: Tensor, out_text: Tensor | None) -> None:
    text = 0 if out_text is None else out_text.shape[1]
    out.copy_(result[:, text:])
    if out_text is not None:
        out_text.copy_(result[:, :text])


def check_attention(
    quantized: tuple[Tensor, ...], lengths: list[int], dtype: torch.dtype, **halves: Tensor | None
) -> None:
    """Refuse what are no results of a quantisation for streams of these lengths, and values and outputs that differ.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    q8, means = quantized[0], quantized[4]
    names = ("q8", "k8", "q_scale", "k_scale", "means", "v8", "v_exponent", "channels")
    check(means.dim() == 4, f"means has {means.dim()} dimensions; it must be [batch, heads, streams, head_dim].")
    batch, heads, dim = means.shape[0], means.shape[1], int(means.shape[3])
    check(dim in COLUMNS, f"means has the head dimension {dim}; it must be one of {', '.join(map(str, COLUMNS))}.")
    check(dtype in HALVES, f"The dtype is {dtype}; it must be torch.bfloat16 or torch.float16.")
    blocks = sum(-(-n // BLOCK) for n in lengths)
    numbers, scales = [batch, heads, blocks * BLOCK, sum(COLUMNS[dim])], [batch, heads, blocks]
    values, of_stream = [batch, heads, sum(ROWS[dim]), blocks * BLOCK], [batch, heads, len(lengths), dim]
    shapes = (numbers, numbers, scales, scales, of_stream, values, scales, of_stream)
    dtypes = (torch.int8,) * 2 + (torch.float32,) * 3 + (torch.float8_e4m3fn,) + (torch.float32,) * 2
    for name, x, shape, of_it in zip(names, quantized, shapes, dtypes, strict=False):
        check(list(x.shape) == shape, f"{name} is {list(x.shape)}; for streams of {lengths} tokens it must be {shape}.")
        check(x.dtype == of_it, f"{name} is {x.dtype}; it must be {of_it}.")
        check(x.device == q8.device, f"{name} is on {x.device} but q8 on {q8.device}; all must be on one device.")
        check(x.is_contiguous(), f"{name} has strides {list(x.stride())}; it must be contiguous.")
    texts = [name for name in halves if name.endswith("_text")]
    given = [name for name in texts if halves[name] is not None]
    check(given in ([], texts), f"Only {', '.join(given)} is given; with a text it must be {' and '.join(texts)}.")
    for name, y in halves.items():
        if y is None:
            continue
        shape = [batch, lengths[0 if name.endswith("_text") else -1], heads, dim]
        check(list(y.shape) == shape, f"{name} is {list(y.shape)}; it must be {shape}.")
        check(y.dtype == dtype, f"{name} is {y.dtype}; it must be {dtype}.")
        check(y.stride(3) == 1, f"{name} has stride {y.stride(3)} in its last dimension; it must be 1.")
        check(y.device == q8.device, f"{name} is on {y.device} but q8 on {q8.device}; all must be on one device.")


def _has_kernel(x: Tensor, float8: bool = False) -> bool:
    if not use_kernel(x) or configs.arch(x.device) is None:
        return False
    if float8:
        check_float8(x.device)
    return True


def _variants(dim: int, dtype: torch.dtype, float8: bool) -> tuple[Variant, ...]:
    kind = TYPES[dtype]
    values = "*fp8e4nv" if float8 else f"*{kind}"
    pointers = {"q_ptr": "*i8", "k_ptr": "*i8", "v_text_ptr": values, "v_ptr": values}
    pointers |= dict.fromkeys(("q_scale", "k_scale", "means", "v_exponent", "channels"), "*fp32")
    pointers |= dict.fromkeys(("out_text_ptr", "out_ptr"), f"*{kind}")
    integers = ("text", "image", "heads", *(f"{x}_{axis}" for x in ("vt", "v", "ot", "o") for axis in "bsh"))
    return tuple(
        Variant(
            f"{'fp8' if float8 else 'int8'}-{dim}-{kind}" + "-joint" * joint + "-tail" * tail,
            _attention_8bit_kernel,
            {**pointers, **dict.fromkeys(integers, "i32")},
            constants(dim) | {"UNIT": 8, "FLOAT8": float8, "JOINT": joint, "TAIL": tail},
            WARPS,
            STAGES,
            arches=(90,) if dtype == torch.float16 else (89, 90) if float8 else (80, 89, 90),
            mma=True,
            max_stack=64,
        )
        for joint in (False, True)
        for tail in (False, True)
        if dim in (64, 128) or not joint  # the other head dimensions are those of models without a stream of text
    )


# In float16 on one chip: it differs in nothing but its instructions' names.
VARIANTS = tuple(
    variant
    for float8 in (True, False)
    for dim in COLUMNS
    for dtype in HALVES
    if dtype == torch.bfloat16 or dim in (64, 128)
    for variant in _variants(dim, dtype, float8)
)
