# mypy: disable-error-code="no-untyped-def"
"""The gated residual of a transformer block, alone or with the layer norm and modulation that follow it.

Alone it is pointwise over tiles of 8 tokens by 256 columns: 6 bytes an element in bf16, 2 FLOPs. With what follows, a
program holds whole rows, and the sum is not read again: 8 bytes an element in place of 10.
Source: `diffusers` `FluxTransformerBlock`, `JointTransformerBlock`; as there, float16 saturates, since one Inf would
make the whole image NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from fastsd_kernels import modulate as following
from fastsd_kernels.launch import TYPES, Variant, check, jit, run, tl, use_kernel
from fastsd_kernels.modulate import normalise

CONFIGURATION = {"ROWS": 8, "BLOCK": 256}
WARPS = 4
MOST = torch.finfo(torch.float16).max


def reference(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`gate_residual` in plain torch, in at least float32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.addcmul(x.to(wide), gate.to(wide).unsqueeze(1), update.to(wide))
    return (total.clamp(-MOST, MOST) if x.dtype == torch.float16 else total).to(x.dtype)


def reference_modulate(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_offset: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`gate_residual_modulate` in plain torch."""
    total = reference(x, gate, update)
    return total, following.reference(total, shift, scale, eps, scale_offset)


@jit
def gated_sum(x, gate, update, SATURATE: tl.constexpr):
    """x + gate * update in float32, with SATURATE within float16; NaN stays."""
    total = x + gate * update
    if SATURATE:
        total = tl.where(total > 65504.0, 65504.0, tl.where(total < -65504.0, -65504.0, total))
    return total


@jit
def _gate_residual_kernel(
    x,
    gate,
    update,
    length,
    width,
    x_batch,
    x_row,
    gate_batch,
    update_batch,
    update_row,
    total_batch,
    total_row,
    total,
    SATURATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < length) & (columns < width)
    factor = tl.load(gate + image * gate_batch + columns, columns < width, 0.0).to(tl.float32)
    change = tl.load(update + image * update_batch + rows * update_row + columns, mask, 0.0).to(tl.float32)
    values = tl.load(x + image * x_batch + rows * x_row + columns, mask, 0.0).to(tl.float32)
    values = gated_sum(values, factor, change, SATURATE)
    tl.store(total + image * total_batch + rows * total_row + columns, values.to(total.dtype.element_ty), mask)


@jit
def _gate_residual_modulate_kernel(
    x,
    gate,
    update,
    shift,
    scale,
    length,
    width,
    x_batch,
    x_row,
    gate_batch,
    update_batch,
    update_row,
    shift_batch,
    scale_batch,
    total_batch,
    total_row,
    out_batch,
    out_row,
    eps,
    scale_offset,
    total,
    out,
    SATURATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    gates = tl.load(gate + image * gate_batch + columns, mask, 0.0).to(tl.float32)
    factor = tl.load(scale + image * scale_batch + columns, mask, 0.0).to(tl.float32) + scale_offset
    offset = tl.load(shift + image * shift_batch + columns, mask, 0.0).to(tl.float32)
    for row in range(first, tl.minimum(first + ROWS, length)):
        change = tl.load(update + image * update_batch + row * update_row + columns, mask, 0.0).to(tl.float32)
        values = tl.load(x + image * x_batch + row * x_row + columns, mask, 0.0).to(tl.float32)
        rounded = gated_sum(values, gates, change, SATURATE).to(total.dtype.element_ty)
        tl.store(total + image * total_batch + row * total_row + columns, rounded, mask)
        # Of the rounded sum, as the two operations one after the other.
        values = normalise(rounded.to(tl.float32), mask, width, eps) * factor + offset
        tl.store(out + image * out_batch + row * out_row + columns, values.to(out.dtype.element_ty), mask)


def launch(x: Tensor, gate: Tensor, update: Tensor, total: Tensor) -> None:
    """`gate_residual` into `total`, which may be x itself, or a slice of something larger."""
    batch, length, width = x.shape
    grid = (-(-length // CONFIGURATION["ROWS"]), -(-width // CONFIGURATION["BLOCK"]), batch)
    strides = (x.stride(0), x.stride(1), gate.stride(0), update.stride(0), update.stride(1))
    run(
        _gate_residual_kernel,
        grid,
        *(x, gate, update, length, width, *strides, total.stride(0), total.stride(1), total),
        num_warps=WARPS,
        SATURATE=x.dtype == torch.float16,
        **CONFIGURATION,
    )


def launch_modulate(
    x: Tensor,
    gate: Tensor,
    update: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    scale_offset: float,
    total: Tensor,
    out: Tensor,
) -> None:
    """`gate_residual_modulate` into `total`, which may be x itself, and `out`; both may be slices."""
    batch, length, width = x.shape
    constexprs, warps = following.configuration(batch * length, width)
    run(
        _gate_residual_modulate_kernel,
        (-(-length // constexprs["ROWS"]) if width else 0, batch),
        *(x, gate, update, shift, scale, length, width, x.stride(0), x.stride(1)),
        *(gate.stride(0), update.stride(0), update.stride(1), shift.stride(0), scale.stride(0)),
        *(total.stride(0), total.stride(1), out.stride(0), out.stride(1), eps, scale_offset, total, out),
        num_warps=warps,
        SATURATE=x.dtype == torch.float16,
        **constexprs,
    )


def check_arguments(x: Tensor, gate: Tensor, update: Tensor) -> None:
    """Refuse what `gate_residual` cannot take.

    Raises:
        ValueError: says what and what would be right.
    """
    following.check_arguments(x, gate=gate)
    check(update.shape == x.shape, f"update is {list(update.shape)}; it must be {list(x.shape)}, as x.")
    check(update.stride(2) == 1, f"update has stride {update.stride(2)} along its width; it must be 1.")
    check(update.device == x.device, f"update is on {update.device}; it must be on {x.device}, as x.")


@triton_op("fastsd::gate_residual", mutates_args={})
def gate_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`x + gate * update`, computed in float32; in float16 it saturates.

    Args:
        x: [batch, tokens, width], any strides whose last is 1.
        gate: [batch, width], may be columns of a packed row.
        update: as x, with strides of its own.

    Returns:
        As x, contiguous.

    Raises:
        ValueError: shapes, strides or devices do not fit.
    """
    check_arguments(x, gate, update)
    if not use_kernel(x):
        return reference(x, gate, update)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(x, gate, update, total)
    return total


@triton_op("fastsd::gate_residual_modulate", mutates_args={})
def gate_residual_modulate(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_offset: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`total = gate_residual(x, gate, update)` and `modulate(total, shift, scale, eps, scale_offset)`, bit for bit.

    Raises:
        ValueError: shapes, strides or devices do not fit.
    """
    check_arguments(x, gate, update)
    following.check_arguments(x, shift=shift, scale=scale)
    if not use_kernel(x):
        return reference_modulate(x, gate, update, shift, scale, eps, scale_offset)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    launch_modulate(x, gate, update, shift, scale, eps, scale_offset, total, out)
    return total, out


def _variants(dtype: torch.dtype) -> list[Variant]:
    kind, saturate = TYPES[dtype], {"SATURATE": dtype == torch.float16}
    pointers = dict.fromkeys(("x", "gate", "update", "total"), f"*{kind}")
    names = ("x_batch", "x_row", "gate_batch", "update_batch", "update_row", "total_batch", "total_row")
    strides = dict.fromkeys(names, "i32:16")
    signature = {**pointers, **strides, "length": "i32", "width": "i32:16"}
    more = {
        **dict.fromkeys(("shift", "scale", "out"), f"*{kind}"),
        **dict.fromkeys(("shift_batch", "scale_batch", "out_batch", "out_row"), "i32:16"),
        **dict.fromkeys(("eps", "scale_offset"), "fp32"),
    }
    alone = Variant(kind, _gate_residual_kernel, signature, {**CONFIGURATION, **saturate}, num_warps=WARPS)
    fused = []
    for tokens, width in following.SHAPES:
        constexprs, warps = following.configuration(tokens, width)
        name = f"modulate-{tokens}x{width}-{kind}"
        kernel = _gate_residual_modulate_kernel
        fused.append(Variant(name, kernel, {**signature, **more}, {**constexprs, **saturate}, num_warps=warps))
    return [alone, *fused]


VARIANTS = tuple(variant for dtype in (torch.bfloat16, torch.float16) for variant in _variants(dtype))
