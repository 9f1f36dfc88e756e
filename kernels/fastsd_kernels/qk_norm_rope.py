# mypy: disable-error-code="no-untyped-def"
"""RMS norm and rotation of queries and keys, in place in the packed result of their projection.

A program takes one token, all heads of which share the rotation, and walks over its queries and keys; the values are
not touched. Neighbouring numbers are rotated in registers. 4 bytes an element in bf16
(read and written once), about 10 FLOPs. Sources: Zhang & Sennrich 2019; Su et al. 2021; `diffusers`
`FluxAttnProcessor`, `JointAttnProcessor2_0` with `qk_norm="rms_norm"`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from fastsd_kernels.launch import TYPES, Variant, check, jit, next_power_of_2, run, tl, use_kernel

HEADS = 8  # that a program holds at a time


def reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None, eps: float = 1e-6
) -> None:
    """The same in plain torch, in at least float32, rounded once."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    for x, weight in zip(qkv.unbind(2), (q_weight, k_weight), strict=False):
        values = x.to(wide)
        if weight is not None:
            values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
        if rotary is not None:
            cos, sin = rotary.to(wide).unsqueeze(2)
            even, odd = values.unflatten(-1, (-1, 2)).unbind(-1)
            values = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        x.copy_(values)


@jit
def _qk_norm_rope_kernel(
    q_weight,
    k_weight,
    rotary,
    heads,
    rotary_part,
    rotary_row,
    batch_stride,
    token_stride,
    part_stride,
    head_stride,
    eps,
    qkv,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    start = qkv + tl.program_id(1).to(tl.int64) * batch_stride + token * token_stride
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < WIDTH
    if ROTATE:
        pairs = tl.arange(0, BLOCK // 2)[None, :]
        angle = rotary + token * rotary_row + pairs
        cos = tl.load(angle, pairs < WIDTH // 2, 0.0)
        sin = tl.load(angle + rotary_part, pairs < WIDTH // 2, 0.0)
    for part in tl.static_range(PARTS):
        if NORM:
            weight = tl.load((q_weight if part == 0 else k_weight) + columns, inside, 0.0).to(tl.float32)
        for first in range(0, heads, HEADS):
            head = first + tl.arange(0, HEADS)[:, None]
            mask = (head < heads) & inside
            place = start + part * part_stride + head * head_stride + columns
            x = tl.load(place, mask, 0.0).to(tl.float32)
            if NORM:
                x = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None] * weight
            if ROTATE:
                even, odd = tl.split(tl.reshape(x, [HEADS, BLOCK // 2, 2]))
                x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, BLOCK])
            tl.store(place, x.to(qkv.dtype.element_ty), mask)


def configuration(width: int) -> tuple[dict[str, int], int]:
    """Constexprs and warps for heads of that width, 8 numbers a thread."""
    block = max(next_power_of_2(width), 2)
    return {"WIDTH": width, "BLOCK": block, "HEADS": HEADS}, min(max(HEADS * block // 256, 1), 8)


def launch(q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None, eps: float, qkv: Tensor) -> None:
    """Arguments as in `qk_norm_rope`."""
    batch, length, parts, heads, width = qkv.shape
    # Where there is nothing, any pointer does: it is not read.
    first = qkv if q_weight is None else q_weight
    weights = (first, first if k_weight is None else k_weight)
    table = (qkv, heads, 0, 0) if rotary is None else (rotary, heads, rotary.stride(0), rotary.stride(1))
    constexprs, warps = configuration(width)
    run(
        _qk_norm_rope_kernel,
        (length if width else 0, batch),
        *(*weights, *table, *qkv.stride()[:4], eps, qkv),
        num_warps=warps,
        PARTS=min(parts, 2),
        NORM=q_weight is not None,
        ROTATE=rotary is not None,
        **constexprs,
    )


@triton_op("fastsd::qk_norm_rope", mutates_args={"qkv"})
def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None, eps: float = 1e-6
) -> None:
    """Normalise every head of the queries and keys and rotate neighbouring pairs, in place, computed in float32.

    Text and image, which have norms of their own, are two calls on slices of the tokens.

    Args:
        qkv: [batch, tokens, parts, heads, width], any strides whose last is 1; part 0 are the queries, part 1 the keys,
            what follows is not touched. One part alone (`q.unsqueeze(2)`) is normalised by `q_weight`.
        q_weight: [width], None for no norm.
        k_weight: [width], None for no norm, or with one part.
        rotary: cosines and sines [2, tokens, width / 2], float32, any strides whose last is 1; None for no rotation.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, strides or devices do not fit.
    """
    check(qkv.ndim == 5, f"qkv is {list(qkv.shape)}; it must be [batch, tokens, parts, heads, width].")
    check(qkv.stride(4) == 1, f"qkv has stride {qkv.stride(4)} along its width; it must be 1.")
    _, length, parts, _, width = qkv.shape
    alike = parts < 2 or (q_weight is None) == (k_weight is None)
    check(alike, "Only one of q_weight and k_weight is given; it must be both or none.")
    given: dict[str, tuple[Any, list[int]]] = {"q_weight": (q_weight, [width]), "k_weight": (k_weight, [width])}
    if rotary is not None:
        check(width % 2 == 0, f"qkv has the odd width {width}; to be rotated it must be even.")
        check(rotary.dtype == torch.float32, f"rotary is {rotary.dtype}; it must be torch.float32.")
        given["rotary"] = (rotary, [2, length, width // 2])
    for name, (tensor, right) in given.items():
        if tensor is not None:
            check(list(tensor.shape) == right, f"{name} is {list(tensor.shape)}; it must be {right}.")
            check(tensor.stride(-1) == 1, f"{name} has stride {tensor.stride(-1)} along its last axis; it must be 1.")
            check(tensor.device == qkv.device, f"{name} is on {tensor.device}; it must be on {qkv.device}, as qkv.")
    if use_kernel(qkv):
        launch(q_weight, k_weight, rotary, eps, qkv)
    else:
        reference(qkv, q_weight, k_weight, rotary, eps)


def _variant(model: str, width: int, rotate: bool, dtype: torch.dtype) -> Variant:
    kind = TYPES[dtype]
    pointers = {"q_weight": f"*{kind}", "k_weight": f"*{kind}", "rotary": "*fp32", "qkv": f"*{kind}"}
    strides = ("batch_stride", "token_stride", "part_stride", "head_stride", "rotary_part", "rotary_row")
    signature = {**pointers, **dict.fromkeys(strides, "i32:16"), "heads": "i32", "eps": "fp32"}
    constexprs, warps = configuration(width)
    constexprs |= {"PARTS": 2, "NORM": True, "ROTATE": rotate}
    return Variant(f"{model}-{kind}", _qk_norm_rope_kernel, signature, constexprs, num_warps=warps)


VARIANTS = tuple(
    _variant(model, width, rotate, dtype)
    for model, width, rotate in (("flux", 128, True), ("sd35", 64, False))
    for dtype in (torch.bfloat16, torch.float16)
)
