# mypy: disable-error-code="no-untyped-def"
"""Attention of image tokens to a prompt's few keys (77 of CLIP), all of them on the chip at once.

A program loads the keys and values of one head, up to 128, and walks over tiles of queries; with all scores of a row
there, its softmax is exact in one pass, without a running maximum. Keys come in two powers of two as head dimensions
do: 77 keys are 64+16 columns, not 128. Longer prompts (154, 231, ...) go through the loop of `attention`.

4 B H Sq Sk D floating-point operations on 2 B H D (Sq + Sk) elements: with 77 keys it is bound by memory, 2.6 us for
SDXL's 1024 queries at the copy bandwidth of an H200.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from fastsd_kernels import attention, configs
from fastsd_kernels.attention import (
    INTEGERS,
    POINTERS,
    check_attention,
    choose,
    constants,
    load_tile,
    reference,
    store_tile,
    strides,
)
from fastsd_kernels.configs import Config
from fastsd_kernels.launch import Variant, jit, known, run, tl

__all__ = ["VARIANTS", "cross_attention", "cross_attention_out", "launch", "reference"]

# Most keys -> the two parts they are cut into, powers of two of at least 16 (or none).
PARTS = {16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}


@jit
def scores(q0, q1, k0, k1, keys, D1: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr):
    """Products of a tile of queries with a part of the keys; -inf beyond the last."""
    s = tl.dot(q0, k0.T, input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q1, k1.T, acc=s, input_precision="ieee")
    if MASK:
        s = tl.where(tl.arange(0, N)[None, :] < keys, s, float("-inf"))
    return s


@jit
def _cross_attention_kernel(
    q_ptr, k_ptr, v_ptr,
    queries, keys, heads, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    out_ptr,
    SCALE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """TILES tiles of queries of one head; UNIT as in `attention`.

    Only the last part of the keys can be incomplete. What does not exist (a second part of the keys or of the head
    dimension) is a name for something that does, and never read.
    """
    programs = tl.cdiv(queries, BLOCK_M * TILES)
    first = tl.program_id(0) % programs * (BLOCK_M * TILES)
    head = tl.program_id(0) // programs
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q_ptr += (b * q_b + h * q_h + first.to(tl.int64) * q_s) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT
    v_ptr += (b * v_b + h * v_h) * UNIT
    out_ptr += (b * o_b + h * o_h + first.to(tl.int64) * o_s) * UNIT
    q_s = q_s * UNIT
    k_s = k_s * UNIT
    v_s = v_s * UNIT
    o_s = o_s * UNIT

    k00 = load_tile(k_ptr, k_s, keys, 0, D0, D, N0, N1 == 0)
    v00 = load_tile(v_ptr, v_s, keys, 0, D0, D, N0, N1 == 0)
    k01, k10, k11, v01, v10, v11 = k00, k00, k00, v00, v00, v00
    if D1 > 0:
        k01 = load_tile(k_ptr, k_s, keys, D0, D1, D, N0, N1 == 0)
        v01 = load_tile(v_ptr, v_s, keys, D0, D1, D, N0, N1 == 0)
    if N1 > 0:
        k10 = load_tile(k_ptr + N0 * k_s, k_s, keys - N0, 0, D0, D, N1, True)
        v10 = load_tile(v_ptr + N0 * v_s, v_s, keys - N0, 0, D0, D, N1, True)
    if N1 > 0 and D1 > 0:
        k11 = load_tile(k_ptr + N0 * k_s, k_s, keys - N0, D0, D1, D, N1, True)
        v11 = load_tile(v_ptr + N0 * v_s, v_s, keys - N0, D0, D1, D, N1, True)

    for _ in tl.range(0, tl.minimum(TILES, tl.cdiv(queries - first, BLOCK_M))):
        rows = queries - first
        q0 = load_tile(q_ptr, q_s, rows, 0, D0, D, BLOCK_M, True)
        q1 = q0
        if D1 > 0:
            q1 = load_tile(q_ptr, q_s, rows, D0, D1, D, BLOCK_M, True)
        s0 = scores(q0, q1, k00, k01, keys, D1, N0, N1 == 0)
        m = tl.max(s0, 1)
        if N1 > 0:
            s1 = scores(q0, q1, k10, k11, keys - N0, D1, N1, True)
            m = tl.maximum(m, tl.max(s1, 1))
        m = tl.maximum(m * SCALE, -3.4e38)[:, None]
        p0 = tl.exp2(s0 * SCALE - m)
        l = tl.sum(p0, 1)
        acc0 = tl.dot(p0.to(v00.dtype), v00, input_precision="ieee")
        if D1 > 0:
            acc1 = tl.dot(p0.to(v00.dtype), v01, input_precision="ieee")
        if N1 > 0:
            p1 = tl.exp2(s1 * SCALE - m)
            l += tl.sum(p1, 1)
            acc0 = tl.dot(p1.to(v00.dtype), v10, acc=acc0, input_precision="ieee")
        if N1 > 0 and D1 > 0:
            acc1 = tl.dot(p1.to(v00.dtype), v11, acc=acc1, input_precision="ieee")
        weight = (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
        store_tile(out_ptr, o_s, rows, acc0 * weight, 0, D0, D, BLOCK_M)
        if D1 > 0:
            store_tile(out_ptr, o_s, rows, acc1 * weight, D0, D1, D, BLOCK_M)
        first += BLOCK_M
        q_ptr += BLOCK_M * q_s
        out_ptr += BLOCK_M * o_s


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Config) -> None:
    """Run the kernel; arguments as `cross_attention_out`, head dimension in `SPLITS`, at most 128 keys.

    With `config.block_n` keys are walked over in tiles of it by the kernel of `attention`, and may be any number.
    """
    if config.block_n:
        attention.launch(q, k, v, out, config)
        return
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    # The first part is full, if there is a second.
    n0, n1 = next((n0, n1) for most, (n0, n1) in PARTS.items() if known(keys <= most) and (not n1 or known(keys >= n0)))
    unit, (q_strides, k_strides, v_strides, o_strides) = strides(q, k, v, out)
    run(
        _cross_attention_kernel,
        (-(-queries // (config.block_m * config.tiles)) * batch * heads,),
        q,
        k,
        v,
        queries,
        keys,
        heads,
        *q_strides,
        *k_strides,
        *v_strides,
        *o_strides,
        out,
        **constants(dim),
        N0=n0,
        N1=n1,
        BLOCK_M=config.block_m,
        TILES=config.tiles,
        UNIT=unit,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton_op("fastsd::cross_attention", mutates_args={})
def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attention`, for few keys: q [B, Sq, H, D], k and v [B, Sk, H, D] -> [B, Sq, H, D], contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or the last stride do not fit.
    """
    check_attention(q, k, v)
    config = choose(q, k.shape[1], "cross_attention")
    if config is None:
        return reference(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(q, k, v, out, config)
    return out


@triton_op("fastsd::cross_attention_out", mutates_args={"out"})
def cross_attention_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """As `cross_attention`, into `out` [B, Sq, H, D], which may be columns of a larger buffer.

    Raises:
        ValueError: shapes, dtypes, devices or the last stride do not fit.
    """
    check_attention(q, k, v, out)
    config = choose(q, k.shape[1], "cross_attention")
    if config is None:
        out.copy_(reference(q, k, v))
    else:
        launch(q, k, v, out, config)


# 77 keys with the tiles of every row of the table, and every other number of keys with those of one head dimension.
VARIANTS = (
    *(
        Variant(
            name=f"{dim} {config.block_m}x{keys} w{config.num_warps} s{config.num_stages} tiles {config.tiles} bf16",
            kernel=_cross_attention_kernel,
            signature={**dict.fromkeys(POINTERS, "*bf16"), **dict.fromkeys(INTEGERS, "i32")},
            constexprs={
                **{**constants(dim), "N0": parts[0], "N1": parts[1], "UNIT": 8},
                **{"BLOCK_M": config.block_m, "TILES": config.tiles},
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            arches=arches,
            mma=True,
            max_stack=64,
        )
        for (dim, config), arches in configs.by_config("cross_attention").items()
        if not config.block_n
        for keys, parts in PARTS.items()
        if keys == 80 or dim == 64
    ),
    *attention.variants("cross_attention", attention._attention_kernel, POINTERS, INTEGERS, ("TAIL",)),
)
