# mypy: disable-error-code="no-untyped-def"
"""`attention` for Hopper: tiles come through the copy engine, and warps are specialised.

One warp group only orders copies (TMA) and gives its registers away; two others each own half of the queries, so that
one computes its softmax while the tensor cores work for the other (FlashAttention-3, Shah et al. 2024). Triton divides
the work itself, but only in this form: 4 warps, 128 queries, every tile through a descriptor made in the kernel, all
of the loop's work inside it. So the last keys are masked in every iteration, where `attention` peels them off, and a
length that is a multiple of the tile has a kernel without masks.

A descriptor covers one head, so its bounds are the sequence's: rows beyond are read as zeros, never the next image's.
It needs addresses and strides divisible by 16 bytes, and more than one row; anything else goes to torch's SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastsd_kernels.attention import check_attention, constants, reference, strides
from fastsd_kernels.configs import Config
from fastsd_kernels.launch import Variant, jit, run, tl, triton, use_kernel

BLOCK_M = 128  # the only height that two warp groups share
HEAD_DIMS = (64, 128)
TILES = ((128, 2), (64, 3))  # keys of a tile and stages: those that the tuner tries


@jit
def _attention_hopper_kernel(
    q_ptr, k_ptr, v_ptr,
    queries, keys, heads, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    out_ptr,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; the order of programs and UNIT as in `attention`."""
    tiles = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q_ptr += (b * q_b + h * q_h) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT
    v_ptr += (b * v_b + h * v_h) * UNIT
    out_ptr += (b * o_b + h * o_h + first.to(tl.int64) * o_s) * UNIT
    q_tiles = tl.make_tensor_descriptor(q_ptr, [queries, D], [q_s * UNIT, 1], [BLOCK_M, D])
    k_tiles = tl.make_tensor_descriptor(k_ptr, [keys, D], [k_s * UNIT, 1], [BLOCK_N, D])
    v_tiles = tl.make_tensor_descriptor(v_ptr, [keys, D], [v_s * UNIT, 1], [BLOCK_N, D])
    q = q_tiles.load([first, 0])
    m = tl.full([BLOCK_M], -3.4e38, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for key in tl.range(0, keys, BLOCK_N, warp_specialize=True):
        k = k_tiles.load([key, 0])
        s = tl.dot(q, k.T, input_precision="ieee")
        if TAIL:
            s = tl.where(key + tl.arange(0, BLOCK_N)[None, :] < keys, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - m_new[:, None])
        correction = tl.exp2(m - m_new)
        l = l * correction + tl.sum(p, 1)
        v = v_tiles.load([key, 0])
        acc = tl.dot(p.to(v.dtype), v, acc=acc * correction[:, None], input_precision="ieee")
        m = m_new
    out = acc * (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
    row = tl.arange(0, BLOCK_M)[:, None]
    # By pointers: a descriptor would cost shared memory, and scratch for itself.
    pointers = out_ptr + row * (o_s * UNIT) + tl.arange(0, D)[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=row < queries - first)


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Config) -> None:
    """Run the kernel; arguments as `attention_hopper`, head dimension in `HEAD_DIMS`, all aligned to 16 bytes."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    unit, (q_strides, k_strides, v_strides, o_strides) = strides(q, k, v, out)
    # Descriptors are written to scratch memory, which Triton asks for at every launch; torch's allocator reuses it in
    # the order of the stream, and keeps it for a CUDA graph that captures the launch.
    triton.set_allocator(_scratch)
    run(
        _attention_hopper_kernel,
        (-(-queries // BLOCK_M) * batch * heads,),
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
        SCALE=constants(dim)["SCALE"],
        D=dim,
        BLOCK_M=BLOCK_M,
        BLOCK_N=config.block_n,
        TAIL=keys % config.block_n != 0,
        UNIT=unit,
        num_warps=4,
        num_stages=config.num_stages,
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Any:
    del alignment, stream  # torch's blocks are aligned to 512 bytes and belong to the current stream
    return torch.empty(size, dtype=torch.int8, device="cuda")


def fits(*tensors: Tensor) -> bool:
    """Whether the copy engine can address these tensors: by multiples of 16 bytes, and not one row again and again."""
    unit, in_unit = strides(*tensors)
    return unit == 8 and all(row > 0 for _, row, _ in in_unit) and all(x.data_ptr() % 16 == 0 for x in tensors)


@custom_op("fastsd::attention_hopper", mutates_args={"out"})
def attention_hopper(q: Tensor, k: Tensor, v: Tensor, out: Tensor, block_n: int, num_stages: int) -> None:
    """As `attention_out`, with a head dimension of 64 or 128, in tiles of `block_n` keys; torch's SDPA off Hopper.

    `attention` calls it where the table says so. Opaque to compilers, which do not know the scratch memory it needs.

    Raises:
        ValueError: shapes, dtypes, devices or the last stride do not fit.
    """
    check_attention(q, k, v, out)
    if use_kernel(q) and torch.cuda.get_device_capability(q.device)[0] == 9 and fits(q, k, v):
        launch(q, k, v, out, Config("hopper", BLOCK_M, block_n, 4, num_stages))
    else:
        out.copy_(reference(q, k, v))


@attention_hopper.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, block_n: int, num_stages: int) -> None:
    check_attention(q, k, v, out)


VARIANTS = tuple(
    Variant(
        name=f"{dim} {BLOCK_M}x{block_n} s{num_stages} {dtype}{'+tail' * tail}",
        kernel=_attention_hopper_kernel,
        signature={
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"),
            **dict.fromkeys(("queries", "keys", "heads", *(f"{x}_{d}" for x in "qkvo" for d in "bsh")), "i32"),
        },
        constexprs={
            **{"SCALE": constants(dim)["SCALE"], "D": dim, "UNIT": 8, "TAIL": tail},
            **{"BLOCK_M": BLOCK_M, "BLOCK_N": block_n},
        },
        num_warps=4,
        num_stages=num_stages,
        arches=(90,),
        mma=True,
    )
    for dim in HEAD_DIMS
    for block_n, num_stages in TILES
    for dtype, tail in (("bf16", False), ("bf16", True), ("fp16", True))
)
