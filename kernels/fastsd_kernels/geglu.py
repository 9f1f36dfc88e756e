# mypy: disable-error-code="no-untyped-def"
"""The gated GELU of the UNet's perceptrons (Shazeer 2020), from one buffer that holds both halves.

Pointwise over tiles of 8 tokens by 256 columns, which divide every width in use: 6 bytes a result in bf16, about 30
FLOPs, most of them the error function. Source: `diffusers` `GEGLU`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from fastsd_kernels.launch import TYPES, Variant, check, jit, run, tl, use_kernel

CONFIGURATION = {"ROWS": 8, "BLOCK": 256}
WARPS = 4


def reference(x: Tensor) -> Tensor:
    """The same in plain torch, in at least float32, rounded once."""
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


@jit
def _geglu_kernel(x, length, inner, x_batch, x_row, out_batch, out_row, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < length) & (columns < inner)
    source = x + image * x_batch + rows * x_row + columns
    value = tl.load(source, mask, 0.0).to(tl.float32)
    gate = tl.load(source + inner, mask, 0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + image * out_batch + rows * out_row + columns, (value * gelu).to(out.dtype.element_ty), mask)


def launch(x: Tensor, out: Tensor) -> None:
    """Fill `out` [batch, tokens, inner], which may be a slice of something larger."""
    batch, length, inner = out.shape
    grid = (-(-length // CONFIGURATION["ROWS"]), -(-inner // CONFIGURATION["BLOCK"]), batch)
    strides = (x.stride(0), x.stride(1), out.stride(0), out.stride(1))
    run(_geglu_kernel, grid, x, length, inner, *strides, out, num_warps=WARPS, **CONFIGURATION)


@triton_op("fastsd::geglu", mutates_args={})
def geglu(x: Tensor) -> Tensor:
    """`value * gelu(gate)` with GELU by the error function, computed in float32.

    Args:
        x: [batch, tokens, 2 * inner], the values and then the gates; any strides whose last is 1.

    Returns:
        [batch, tokens, inner], contiguous.

    Raises:
        ValueError: the shape or the strides do not fit.
    """
    check(x.ndim == 3 and x.shape[2] % 2 == 0, f"x is {list(x.shape)}; it must be [batch, tokens, 2 * inner].")
    check(x.stride(2) == 1, f"x has stride {x.stride(2)} along its last axis; it must be 1.")
    if not use_kernel(x):
        return reference(x)
    out = torch.empty((x.shape[0], x.shape[1], x.shape[2] // 2), dtype=x.dtype, device=x.device)
    launch(x, out)
    return out


def _variant(dtype: torch.dtype) -> Variant:
    kind = TYPES[dtype]
    known = dict.fromkeys(("inner", "x_batch", "x_row", "out_batch", "out_row"), "i32:16")
    signature = {"x": f"*{kind}", "length": "i32", **known, "out": f"*{kind}"}
    return Variant(kind, _geglu_kernel, signature, CONFIGURATION, num_warps=WARPS)


VARIANTS = tuple(_variant(dtype) for dtype in (torch.bfloat16, torch.float16))
