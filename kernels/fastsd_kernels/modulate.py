# mypy: disable-error-code="no-untyped-def"
"""Layer norm without parameters, scaled and shifted per image (adaLN, Peebles & Xie 2023).

A program holds whole rows in registers, so x is read once and the result written once: 4 bytes an element in bf16,
about 12 FLOPs. Scale and shift, slices of a packed row, are read once for `ROWS` tokens.
Source: `diffusers` `AdaLayerNormZero`, `AdaLayerNormContinuous`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from fastsd_kernels.launch import TYPES, Variant, check, jit, known, next_power_of_2, run, tl, use_kernel

ROWS = 4  # tokens of a program, where there are enough of them to fill the chip
MANY = 2048  # tokens
SHAPES = ((4096, 1536), (4096, 2432), (4096, 3072), (512, 3072))  # tokens and widths of SD3, SD3.5-Large and Flux


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_offset: float = 1.0) -> Tensor:
    """The same in plain torch, in at least float32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    scale, shift = scale.to(wide).unsqueeze(1), shift.to(wide).unsqueeze(1)
    return (normed * (scale + scale_offset) + shift).to(x.dtype)


@jit
def normalise(x, mask, width, eps):
    """Rows [.., BLOCK] in float32, zero where masked, to mean 0 and variance 1."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(mask, x - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)


@jit
def _modulate_kernel(
    x,
    shift,
    scale,
    length,
    width,
    x_batch,
    x_row,
    shift_batch,
    scale_batch,
    out_batch,
    out_row,
    eps,
    scale_offset,
    out,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    factor = tl.load(scale + image * scale_batch + columns, mask, 0.0).to(tl.float32) + scale_offset
    offset = tl.load(shift + image * shift_batch + columns, mask, 0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, length)):
        values = tl.load(x + image * x_batch + row * x_row + columns, mask, 0.0).to(tl.float32)
        values = normalise(values, mask, width, eps) * factor + offset
        tl.store(out + image * out_batch + row * out_row + columns, values.to(out.dtype.element_ty), mask)


def configuration(tokens: int, width: int) -> tuple[dict[str, int], int]:
    """Constexprs and warps for that many tokens of that width."""
    block = next_power_of_2(width)
    return {"BLOCK": block, "ROWS": 1 if known(tokens < MANY) else ROWS}, min(max(block // 512, 1), 16)


def launch(x: Tensor, shift: Tensor, scale: Tensor, eps: float, scale_offset: float, out: Tensor) -> None:
    """Fill `out`; arguments as in `modulate`, `out` may be a slice of something larger."""
    batch, length, width = x.shape
    constexprs, warps = configuration(batch * length, width)
    run(
        _modulate_kernel,
        (-(-length // constexprs["ROWS"]) if width else 0, batch),
        *(x, shift, scale, length, width, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0)),
        *(out.stride(0), out.stride(1), eps, scale_offset, out),
        num_warps=warps,
        **constexprs,
    )


def check_arguments(x: Tensor, **rows: Tensor) -> None:
    """Refuse tokens x and rows (shift, scale, gate) that do not fit.

    Raises:
        ValueError: says what and what would be right.
    """
    check(x.ndim == 3, f"x is {list(x.shape)}; it must be [batch, tokens, width].")
    check(x.stride(2) == 1, f"x has stride {x.stride(2)} along its width; it must be 1.")
    for name, row in rows.items():
        right = [x.shape[0], x.shape[2]]
        check(list(row.shape) == right, f"{name} is {list(row.shape)}; it must be {right}.")
        check(row.stride(1) == 1, f"{name} has stride {row.stride(1)} along its width; it must be 1.")
        check(row.device == x.device, f"{name} is on {row.device}; it must be on {x.device}, as x.")


@triton_op("fastsd::modulate", mutates_args={})
def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_offset: float = 1.0) -> Tensor:
    """`layer_norm(x) * (scale + scale_offset) + shift`, computed in float32.

    Args:
        x: [batch, tokens, width], any strides whose last is 1.
        shift: [batch, width], may be columns of a packed row, as `scale`.
        scale: [batch, width].
        eps: added to the variance.
        scale_offset: 1, or 0 where `scale` has it already.

    Returns:
        As x, contiguous.

    Raises:
        ValueError: shapes, strides or devices do not fit.
    """
    check_arguments(x, shift=shift, scale=scale)
    if not use_kernel(x):
        return reference(x, shift, scale, eps, scale_offset)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(x, shift, scale, eps, scale_offset, out)
    return out


def _variant(tokens: int, width: int, dtype: torch.dtype) -> Variant:
    constexprs, warps = configuration(tokens, width)
    kind = TYPES[dtype]
    pointers = dict.fromkeys(("x", "shift", "scale", "out"), f"*{kind}")
    strides = dict.fromkeys(("x_batch", "x_row", "shift_batch", "scale_batch", "out_batch", "out_row"), "i32:16")
    sizes = {"length": "i32", "width": "i32:16", "eps": "fp32", "scale_offset": "fp32"}
    signature, name = {**pointers, **strides, **sizes}, f"{tokens}x{width}-{kind}"
    # For 1536 columns ptxas stops at 56 registers and puts one word aside, once a program.
    return Variant(name, _modulate_kernel, signature, constexprs, num_warps=warps, max_stack=8)


VARIANTS = tuple(
    _variant(tokens, width, dtype) for tokens, width in SHAPES for dtype in (torch.bfloat16, torch.float16)
)
