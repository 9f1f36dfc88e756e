# mypy: disable-error-code="no-untyped-def"
"""Attention of every query to every key: softmax(Q K^T / sqrt(D)) V, without mask, dropout or causality.

The idea is FlashAttention (Dao et al. 2022; Dao 2023): a program keeps a tile of queries and walks over tiles of keys
and values with a running maximum `m` and sum `l`, so the scores never leave the chip. What is particular here:

- Head dimensions 40, 80 and 160 (Stable Diffusion 1) are cut into two powers of two, 32+16, 64+16 and 128+32, where
  padding to the next power of two would do 1.6 times the work (1.2 times remains for 40).
- The last tile of keys is peeled off the loop, so only it is masked: SD3 has 4429 tokens.
- The softmax is in base two with the scale folded into one multiply-add; the division is one reciprocal a row.
- Any strides but that of the last dimension: queries, keys and values may lie in one packed buffer, and the output in
  columns of a larger one.

4 B H Sq Sk D floating-point operations; read q, k, v once and write the output once if the keys and values of a head
stay in L2, as they do for every image model here (2.4 MB in Flux).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from fastsd_kernels import configs
from fastsd_kernels.configs import Config
from fastsd_kernels.launch import Variant, check, jit, known, run, tl, use_kernel

# Head dimension -> its two parts, powers of two of at least 16 (or none); the second of 40 is half empty.
SPLITS = {40: (32, 16), 64: (64, 0), 80: (64, 16), 128: (128, 0), 160: (128, 32)}


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of q [B, Sq, H, D], k and v [B, Sk, H, D]: [B, Sq, H, D], contiguous."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@jit
def load_tile(
    ptr, stride, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MASK: tl.constexpr
):
    """Columns FIRST.. of a [ROWS, D] tile, WIDTH of them; zero beyond D, and with MASK beyond `rows`."""
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = ptr + row * stride + column
    if MASK:
        return tl.load(pointers, mask=(row < rows) & (column < D), other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(pointers, mask=column < D, other=0.0)
    else:
        return tl.load(pointers)


@jit
def store_tile(ptr, stride, rows, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Write columns FIRST.. of a [ROWS, D] tile, as far as there are `rows` and columns."""
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr + row * stride + column, tile.to(ptr.dtype.element_ty), mask=(row < rows) & (column < D))


@jit
def attend_tile(
    q0, q1, k_ptr, v_ptr, k_s, v_s, keys, m, l, acc0, acc1,
    SCALE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values: the running maximum, sum and numerator after it."""
    k0 = load_tile(k_ptr, k_s, keys, 0, D0, D, BLOCK_N, MASK)
    s = tl.dot(q0, k0.T, input_precision="ieee")
    if D1 > 0:
        k1 = load_tile(k_ptr, k_s, keys, D0, D1, D, BLOCK_N, MASK)
        s = tl.dot(q1, k1.T, acc=s, input_precision="ieee")
    if MASK:
        s = tl.where(tl.arange(0, BLOCK_N)[None, :] < keys, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * SCALE)
    p = tl.exp2(s * SCALE - m_new[:, None])
    correction = tl.exp2(m - m_new)
    l = l * correction + tl.sum(p, 1)
    v0 = load_tile(v_ptr, v_s, keys, 0, D0, D, BLOCK_N, MASK)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc=acc0 * correction[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = load_tile(v_ptr, v_s, keys, D0, D1, D, BLOCK_N, MASK)
        acc1 = tl.dot(p, v1, acc=acc1 * correction[:, None], input_precision="ieee")
    return m_new, l, acc0, acc1


@jit
def attend(
    q0, q1, k_ptr, v_ptr, k_s, v_s, keys, m, l, acc0, acc1,
    SCALE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """All keys and values of one head of one source: the running maximum, sum and numerator after them."""
    for _ in tl.range(0, keys // BLOCK_N):
        m, l, acc0, acc1 = attend_tile(
            q0, q1, k_ptr, v_ptr, k_s, v_s, BLOCK_N, m, l, acc0, acc1, SCALE, D, D0, D1, BLOCK_N, False
        )  # fmt: skip
        k_ptr += BLOCK_N * k_s
        v_ptr += BLOCK_N * v_s
    if TAIL:
        m, l, acc0, acc1 = attend_tile(
            q0, q1, k_ptr, v_ptr, k_s, v_s, keys % BLOCK_N, m, l, acc0, acc1, SCALE, D, D0, D1, BLOCK_N, True
        )  # fmt: skip
    return m, l, acc0, acc1


@jit
def start(q_ptr, q_s, rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile of queries in two parts, and the running values before any key.

    The maximum starts finite, so that a tile whose scores are all -inf leaves it so and adds nothing. With one part,
    the second is a name for something that is there, and never read.
    """
    q0 = load_tile(q_ptr, q_s, rows, 0, D0, D, BLOCK_M, True)
    m = tl.full([BLOCK_M], -3.4e38, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    q1 = q0
    acc1 = l
    if D1 > 0:
        q1 = load_tile(q_ptr, q_s, rows, D0, D1, D, BLOCK_M, True)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    return q0, q1, m, l, acc0, acc1


@jit
def finish(
    out_ptr, o_s, rows, l, acc0, acc1,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Divide by the sum and write; a row without any weight (no keys, or all scores -inf) is zero, as in torch."""
    weight = (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
    store_tile(out_ptr, o_s, rows, acc0 * weight, 0, D0, D, BLOCK_M)
    if D1 > 0:
        store_tile(out_ptr, o_s, rows, acc1 * weight, D0, D1, D, BLOCK_M)


@jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr,
    queries, keys, heads, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    out_ptr,
    SCALE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; neighbours share the head, so its keys and values are in L2.

    Strides are in units of UNIT elements: a stride of 40 is not divisible by 16, and the
    compiler has to know that it is by 8 to move 16 bytes at a time.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q_ptr += (b * q_b + h * q_h + first.to(tl.int64) * q_s) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT
    v_ptr += (b * v_b + h * v_h) * UNIT
    out_ptr += (b * o_b + h * o_h + first.to(tl.int64) * o_s) * UNIT
    q0, q1, m, l, acc0, acc1 = start(q_ptr, q_s * UNIT, queries - first, D, D0, D1, BLOCK_M)
    m, l, acc0, acc1 = attend(
        q0, q1, k_ptr, v_ptr, k_s * UNIT, v_s * UNIT, keys, m, l, acc0, acc1, SCALE, D, D0, D1, BLOCK_N, TAIL
    )  # fmt: skip
    finish(out_ptr, o_s * UNIT, queries - first, l, acc0, acc1, D, D0, D1, BLOCK_M)


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Config) -> None:
    """Run the kernel that `config` names; arguments as `attention_out`, head dimension in `SPLITS`."""
    if config.route == "hopper":
        from fastsd_kernels.hopper import attention_hopper  # which builds on this module

        attention_hopper(q, k, v, out, config.block_n, config.num_stages)
        return
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    unit, (q_strides, k_strides, v_strides, o_strides) = strides(q, k, v, out)
    run(
        _attention_kernel,
        (-(-queries // config.block_m) * batch * heads,),
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
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL=not known(keys % config.block_n == 0),
        UNIT=unit,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def constants(dim: int) -> dict[str, float | int]:
    """What kernels know about the head dimension; the scale is in base two."""
    return {"SCALE": math.log2(math.e) / math.sqrt(dim), "D": dim, "D0": SPLITS[dim][0], "D1": SPLITS[dim][1]}


def strides(*tensors: Tensor) -> tuple[int, list[list[int]]]:
    """The unit of the strides, 8 elements or 1, and the first three strides of each tensor in it.

    The stride of a dimension of size one is arbitrary, and taken as zero.
    """
    found = [[0 if x.shape[i] == 1 else x.stride(i) for i in range(3)] for x in tensors]
    unit = 1 if any(stride % 8 for of_tensor in found for stride in of_tensor) else 8
    return unit, [[stride // unit for stride in of_tensor] for of_tensor in found]


def check_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> None:
    """Refuse what is no attention.

    Raises:
        ValueError: shapes, dtypes, devices or the last stride do not fit.
    """
    for name, x in {"q": q, "k": k, "v": v, **({} if out is None else {"out": out})}.items():
        check(x.dim() == 4, f"{name} has {x.dim()} dimensions; it must be [batch, tokens, heads, head_dim].")
        check(x.dtype == q.dtype, f"{name} is {x.dtype} but q is {q.dtype}; all must have one dtype.")
        check(x.device == q.device, f"{name} is on {x.device} but q on {q.device}; all must be on one device.")
        check(
            x.shape[3] <= 1 or x.stride(3) == 1,
            f"{name} has stride {x.stride(3)} in its last dimension; its elements must be adjacent (stride 1).",
        )
    expected = (q.shape[0], k.shape[1], *q.shape[2:])
    check(k.shape == expected, f"k is {list(k.shape)}; for q {list(q.shape)} it must be {list(expected)}.")
    check(v.shape == expected, f"v is {list(v.shape)}; it must be {list(expected)}, as k.")
    check(out is None or out.shape == q.shape, f"out must be {list(q.shape)}, as q.")


def choose(q: Tensor, keys: int, op: str) -> Config | None:
    """How to compute an attention of these queries: the table's configuration, or None for torch (the reference)."""
    chip = configs.arch(q.device) if use_kernel(q) else None
    if chip is None or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    config = configs.choose(op, chip, q.shape[3], keys)
    return None if config is None or config.route == "sdpa" else config


@triton_op("fastsd::attention", mutates_args={})
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, Sq, H, D] to k and v [B, Sk, H, D]: [B, Sq, H, D], contiguous.

    Any strides with adjacent elements in the last dimension; one dtype and device. On CUDA bfloat16 and float16 with a
    head dimension of 40, 64, 80, 128 or 160 run as the table of configurations says, everything else by torch's SDPA.

    Raises:
        ValueError: shapes, dtypes, devices or the last stride do not fit.
    """
    check_attention(q, k, v)
    config = choose(q, k.shape[1], "attention")
    if config is None:
        return reference(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(q, k, v, out, config)
    return out


@triton_op("fastsd::attention_out", mutates_args={"out"})
def attention_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """As `attention`, into `out` [B, Sq, H, D], which may be columns of a larger buffer.

    Raises:
        ValueError: shapes, dtypes, devices or the last stride do not fit.
    """
    check_attention(q, k, v, out)
    config = choose(q, k.shape[1], "attention")
    if config is None:
        out.copy_(reference(q, k, v))
    else:
        launch(q, k, v, out, config)


POINTERS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
INTEGERS = ("queries", "keys", "heads", *(f"{x}_{dim}" for x in "qkvo" for dim in "bsh"))


def variants(
    op: str, of_kernel: object, pointers: Sequence[str], integers: Sequence[str], tails: Sequence[str]
) -> tuple[Variant, ...]:
    """Compiled forms of a kernel that walks over keys, with tiles from the table.

    With and without tails in bfloat16; on one chip in float16, which differs in nothing but its instructions' names.
    """
    return tuple(
        Variant(
            name=f"{dim} {config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages} {dtype}"
            + " tail" * tail,
            kernel=of_kernel,
            signature={**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(integers, "i32")},
            constexprs={
                **{**constants(dim), "UNIT": 8, **dict.fromkeys(tails, tail)},
                **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            arches=arches if dtype == "bf16" else arches[-1:],
            mma=True,
            max_stack=64,
        )
        for (dim, config), arches in configs.by_config(op).items()
        if config.block_n
        for dtype, tail in (("bf16", False), ("bf16", True), ("fp16", True))
    )


VARIANTS = variants("attention", _attention_kernel, POINTERS, INTEGERS, ("TAIL",))
