# mypy: disable-error-code="no-untyped-def"
"""Rows to float8 (e4m3) with a scale each, alone or of what a layer norm with modulation or a GELU gives.

For matrix products in float8 (`torch._scaled_mm` with row-wise scales). A program holds a whole row: its largest
magnitude and then its float8 numbers come from registers, so the fused forms read what they are computed from and
write half of what the bfloat16 result would be: 3 bytes an element, 4 to 30 FLOPs.
float8 needs sm_89 or newer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from fastsd_kernels import modulate as preceding
from fastsd_kernels.launch import TYPES, Variant, jit, next_power_of_2, run, tl, use_kernel
from fastsd_kernels.modulate import normalise

MOST = torch.finfo(torch.float8_e4m3fn).max  # 448
LEAST = 1e-35  # magnitude of a row; what is below has no reciprocal in float32
ARCHES = (89, 90)


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rowwise` in plain torch, in at least float32."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = values.abs().amax(-1, keepdim=True) if x.shape[-1] else values.new_zeros(*x.shape[:-1], 1)
    scale = torch.where(largest < LEAST, 1.0, largest / MOST)
    return (values * (1 / scale)).clamp(-MOST, MOST).to(torch.float8_e4m3fn), scale.float()


def reference_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_offset: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`quantize_modulate` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return reference(preceding.reference(x.to(wide), shift, scale, eps, scale_offset))


def reference_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_gelu` in plain torch."""
    return reference(F.gelu(x.to(torch.promote_types(x.dtype, torch.float32)), approximate="tanh"))


@jit
def store_quantized(values, mask, row, out, scales):
    """Store one row, in float8 or what the output is, and its scale."""
    magnitude = tl.where(mask, tl.abs(values), 0.0)
    largest = tl.max(magnitude, 0)
    # The maximum passes NaN over, the row's scale must not.
    largest = tl.where(tl.max((magnitude != magnitude).to(tl.int32), 0) > 0, float("nan"), largest)
    scale = tl.where(largest < 1e-35, 1.0, largest / 448.0)
    scaled = values * (1.0 / scale)
    clamped = tl.where(scaled > 448.0, 448.0, tl.where(scaled < -448.0, -448.0, scaled))
    tl.store(out, clamped.to(out.dtype.element_ty), mask)
    tl.store(scales + row, scale)


@jit
def _rowwise_kernel(x, length, width, x_batch, x_row, out, scales, GELU: tl.constexpr, BLOCK: tl.constexpr):
    image, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    row = image * length + token
    values = tl.load(x + image * x_batch + token * x_row + columns, mask, 0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * values * (1.0 + 0.044715 * values * values)
        # 1 + tanh(u) = 2 / (1 + exp(-2 u)), exact at both ends.
        values = values / (1.0 + tl.exp(-2.0 * inner))
    store_quantized(values, mask, row, out + row * width + columns, scales)


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
    eps,
    scale_offset,
    out,
    scales,
    BLOCK: tl.constexpr,
):
    image, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    row = image * length + token
    values = tl.load(x + image * x_batch + token * x_row + columns, mask, 0.0).to(tl.float32)
    factor = tl.load(scale + image * scale_batch + columns, mask, 0.0).to(tl.float32) + scale_offset
    offset = tl.load(shift + image * shift_batch + columns, mask, 0.0).to(tl.float32)
    values = normalise(values, mask, width, eps) * factor + offset
    store_quantized(values, mask, row, out + row * width + columns, scales)


def configuration(width: int) -> tuple[int, int]:
    """Columns and warps of a program for rows of that width."""
    block = next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def launch(x: Tensor, gelu: bool, out: Tensor, scales: Tensor) -> None:
    """`quantize_rowwise` or `quantize_gelu` into contiguous `out` (of any float dtype) and `scales`."""
    batch, length, width = x.shape
    block, warps = configuration(width)
    arguments = (x, length, width, x.stride(0), x.stride(1), out, scales)
    run(_rowwise_kernel, (length, batch), *arguments, num_warps=warps, GELU=gelu, BLOCK=block)


def launch_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, scale_offset: float, out: Tensor, scales: Tensor
) -> None:
    """`quantize_modulate` into contiguous `out` (of any float dtype) and `scales`."""
    batch, length, width = x.shape
    block, warps = configuration(width)
    strides = (x.stride(0), x.stride(1), shift.stride(0), scale.stride(0))
    arguments = (x, shift, scale, length, width, *strides, eps, scale_offset, out, scales)
    run(_modulate_kernel, (length, batch), *arguments, num_warps=warps, BLOCK=block)


def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised float8 numbers and scales for x."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return out, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@triton_op("fastsd::quantize_rowwise", mutates_args={})
def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every row as float8 times a scale, the largest magnitude being 448, float8's largest.

    A row below 1e-35 in magnitude becomes zeros with the scale 1; one with NaN or Inf has that as its scale, and so
    comes back as NaN.

    Args:
        x: [batch, tokens, width], any strides whose last is 1.

    Returns:
        Numbers [batch, tokens, width] in float8_e4m3fn and scales [batch, tokens, 1] in float32, contiguous; their
        product is x.

    Raises:
        ValueError: the shape or the strides do not fit.
    """
    preceding.check_arguments(x)
    if not use_kernel(x):
        return reference(x)
    out, scales = outputs(x)
    launch(x, False, out, scales)
    return out, scales


@triton_op("fastsd::quantize_gelu", mutates_args={})
def quantize_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rowwise(gelu(x))`, GELU in its tanh form and not rounded in between.

    Raises:
        ValueError: the shape or the strides do not fit.
    """
    preceding.check_arguments(x)
    if not use_kernel(x):
        return reference_gelu(x)
    out, scales = outputs(x)
    launch(x, True, out, scales)
    return out, scales


@triton_op("fastsd::quantize_modulate", mutates_args={})
def quantize_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_offset: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`quantize_rowwise(modulate(x, shift, scale, eps, scale_offset))`, not rounded in between.

    Raises:
        ValueError: shapes, strides or devices do not fit.
    """
    preceding.check_arguments(x, shift=shift, scale=scale)
    if not use_kernel(x):
        return reference_modulate(x, shift, scale, eps, scale_offset)
    out, scales = outputs(x)
    launch_modulate(x, shift, scale, eps, scale_offset, out, scales)
    return out, scales


def _variant(form: str, width: int, dtype: torch.dtype) -> Variant:
    kind, known = TYPES[dtype], "i32:16"
    block, warps = configuration(width)
    signature = {"x": f"*{kind}", "out": "*fp8e4nv", "scales": "*fp32", "length": "i32"}
    signature |= dict.fromkeys(("width", "x_batch", "x_row"), known)
    name = f"{form}-{width}-{kind}"
    if form != "modulate":
        constexprs = {"GELU": form == "gelu", "BLOCK": block}
        return Variant(name, _rowwise_kernel, signature, constexprs, warps, arches=ARCHES)
    signature |= dict.fromkeys(("shift", "scale"), f"*{kind}") | dict.fromkeys(("shift_batch", "scale_batch"), known)
    signature |= dict.fromkeys(("eps", "scale_offset"), "fp32")
    return Variant(name, _modulate_kernel, signature, {"BLOCK": block}, warps, arches=ARCHES)


# The inputs of the linear layers in SD3, SD3.5-Large and Flux: of attention and perceptron, of their second layers, and
# of Flux's joined output projection.
VARIANTS = tuple(
    _variant(form, width, dtype)
    for form, widths in (
        ("modulate", (1536, 2432, 3072)),
        ("gelu", (6144, 9728, 12288)),
        ("plain", (1536, 2432, 3072, 15360)),
    )
    for width in widths
    for dtype in (torch.bfloat16, torch.float16)
)
