# mypy: disable-error-code="no-untyped-def"
"""Group norm of feature maps in either memory layout, optionally shifted before and passed through SiLU.

Many programs share a group, since a map has only batch * groups of them (64 in SDXL). Three launches: sums of every
channel over chunks of the pixels; one small program per group that makes them a mean and a factor per channel;
both applied. x is read twice, the second time in the opposite order, so that what is still in the cache is met first:
6 bytes an element in bf16 (4 where the map fits the cache), about 10 FLOPs.

Sums are of the differences to the image's first pixel, so that a mean far from zero costs no digits; a shift per
channel (the UNet's time embedding) then only moves the mean. The sums' order depends on shapes alone: equal runs, equal
bits.
Sources: Wu & He 2018; `diffusers` `ResnetBlock2D`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from fastsd_kernels.launch import TYPES, Variant, check, jit, next_power_of_2, run, tl, use_kernel

TILE = 4096  # elements that a program holds at a time
CHANNELS = 64  # of a tile of a channels-last map: whole lines of memory
PROGRAMS = 2048  # to fill the chip
SPLITS = 128  # of the pixels, at most
WARPS = 8
FEW_WARPS = 4  # of the small programs in between


def reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """The same in plain torch, in at least float32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    if shift is not None:
        values = values + shift.to(wide)[:, :, None, None]
    values = F.group_norm(values, groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(values) if silu else values).to(x.dtype)


@jit
def _sums_kernel(
    x,
    pixels,
    channels,
    x_batch,
    x_pixel,
    x_channel,
    scratch_batch,
    steps,
    sums,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, split = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < channels
    source = x + image * x_batch + channel.to(tl.int64) * x_channel
    pivot = tl.load(source, inside, 0.0).to(tl.float32)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
    first = split * steps * PIXELS
    for step in range(steps):
        pixel = first + step * PIXELS + tl.arange(0, PIXELS)[:, None]
        mask = (pixel < pixels) & inside
        values = tl.where(mask, tl.load(source + pixel * x_pixel, mask, 0.0).to(tl.float32) - pivot, 0.0)
        total += values
        squares += values * values
    out = sums + image * scratch_batch + 2 * split * channels + channel
    tl.store(out, tl.sum(total, 0)[None, :], inside)
    tl.store(out + channels, tl.sum(squares, 0)[None, :], inside)


@jit
def _factors_kernel(
    x,
    weight,
    shift,
    pixels,
    channels,
    splits,
    width,
    x_batch,
    x_channel,
    shift_batch,
    scratch_batch,
    eps,
    sums,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    channel = tl.program_id(0) * width + column
    rows = tl.arange(0, ROWS)[:, None]
    totals = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    source = sums + image * scratch_batch + channel[None, :]
    for first in range(0, splits, ROWS):
        mask = (first + rows < splits) & inside[None, :]
        totals += tl.load(source + 2 * (first + rows) * channels, mask, 0.0)
        squares += tl.load(source + (2 * (first + rows) + 1) * channels, mask, 0.0)
    difference = tl.sum(totals, 0) / pixels
    of_channel = tl.sum(squares, 0) - difference * difference * pixels
    center = tl.load(x + image * x_batch + channel.to(tl.int64) * x_channel, inside, 0.0).to(tl.float32)
    if SHIFT:
        center += tl.load(shift + image * shift_batch + channel, inside, 0.0).to(tl.float32)
    center = tl.where(inside, center + difference, 0.0)
    mean = tl.sum(center, 0) / width
    between = tl.where(inside, center - mean, 0.0)
    variance = tl.sum(of_channel / pixels + between * between, 0) / width
    if SHIFT:
        mean -= tl.load(shift + image * shift_batch + channel, inside, 0.0).to(tl.float32)
    factor = tl.rsqrt(variance + eps) * tl.load(weight + channel, inside, 0.0).to(tl.float32)
    out = sums + image * scratch_batch + 2 * splits * channels + channel
    tl.store(out, tl.zeros([BLOCK], tl.float32) + mean, inside)
    tl.store(out + channels, factor, inside)


@jit
def _apply_kernel(
    x,
    bias,
    sums,
    pixels,
    channels,
    splits,
    x_batch,
    x_pixel,
    x_channel,
    out_batch,
    out_pixel,
    out_channel,
    scratch_batch,
    out,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # From the last pixels of the last image to the first: the opposite of the sums.
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64) * PIXELS
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]).to(tl.int64)
    inside = channel < channels
    pixel = first + tl.arange(0, PIXELS)[:, None]
    mask = (pixel < pixels) & inside
    of_channel = sums + image * scratch_batch + 2 * splits * channels + channel
    mean = tl.load(of_channel, inside, 0.0)
    factor = tl.load(of_channel + channels, inside, 0.0)
    offset = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    values = tl.load(x + image * x_batch + channel * x_channel + pixel * x_pixel, mask, 0.0).to(tl.float32)
    values = (values - mean) * factor + offset
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    place = out + image * out_batch + channel * out_channel + pixel * out_pixel
    tl.store(place, values.to(out.dtype.element_ty), mask)


def tile(shape: torch.Size | tuple[int, ...], channels_last: bool) -> dict[str, int]:
    """Pixels and channels that a program holds at a time, as much as possible of what lies side by side."""
    channels, pixels = next_power_of_2(shape[1]), shape[2] * shape[3]
    if channels_last:
        across = min(CHANNELS, channels)
        return {"PIXELS": TILE // across, "CHANNELS": across}
    along = TILE if pixels >= TILE else next_power_of_2(pixels)
    return {"PIXELS": along, "CHANNELS": min(TILE // along, channels)}


def splits(shape: torch.Size | tuple[int, ...], channels_last: bool) -> int:
    """Into how many chunks the pixels are cut for the sums."""
    batch, channels, height, width = shape
    sizes = tile(shape, channels_last)
    enough = -(-PROGRAMS // max(batch * -(-channels // sizes["CHANNELS"]), 1))
    return max(min(-(-height * width // sizes["PIXELS"]), enough, SPLITS), 1)


def combination(width: int) -> dict[str, int]:
    """Rows of partial sums and channels of a group that the middle kernel holds at a time."""
    block = next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(min(TILE // 2 // block, 32), 1)}


def scratch_size(shape: torch.Size | tuple[int, ...], channels_last: bool) -> tuple[int, int]:
    """Shape of the float32 scratch memory: for every image the partial sums, then means and factors."""
    return shape[0], 2 * (splits(shape, channels_last) + 1) * shape[1]


def launch(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    scratch: Tensor,
    out: Tensor,
) -> None:
    """Fill `out`, which may be a slice of something larger; `scratch` is of `scratch_size`, contents of no matter."""
    batch, channels, height, width = x.shape
    pixels, of_group = height * width, channels // groups
    channels_last = is_channels_last(x)
    sizes, parts = tile(x.shape, channels_last), splits(x.shape, channels_last)
    across, tiles = -(-channels // sizes["CHANNELS"]), -(-pixels // sizes["PIXELS"])
    if x.numel() == 0:
        return
    # One stride for all pixels: along the rows of a channels-first map, of whole pixels in a channels-last one.
    strides = (x.stride(0), x.stride(3), x.stride(1))
    run(
        _sums_kernel,
        (across, parts, batch),
        *(x, pixels, channels, *strides, scratch.stride(0), -(-tiles // parts), scratch),
        num_warps=WARPS,
        **sizes,
    )
    run(
        _factors_kernel,
        (groups, batch),
        *(x, weight, x if shift is None else shift, pixels, channels, parts, of_group, x.stride(0), x.stride(1)),
        *(0 if shift is None else shift.stride(0), scratch.stride(0), eps, scratch),
        num_warps=FEW_WARPS,
        SHIFT=shift is not None,
        **combination(of_group),
    )
    run(
        _apply_kernel,
        (across, tiles, batch),
        *(x, bias, scratch, pixels, channels, parts, *strides),
        *(out.stride(0), out.stride(3), out.stride(1), scratch.stride(0), out),
        num_warps=WARPS,
        SILU=silu,
        **sizes,
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the numbers of a pixel, not those of a channel, are neighbours."""
    return x.stride(1) == 1 and x.shape[1] > 1


def one_stride(x: Tensor) -> bool:
    """Whether the pixels of a map lie at equal distances."""
    return x.shape[2] < 2 or x.stride(2) == x.shape[3] * x.stride(3)


@triton_op("fastsd::group_norm_silu", mutates_args={})
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """`silu(group_norm(x + shift))`, computed in float32.

    Args:
        x: [batch, channels, height, width], channels first or last; a map may be a slice of channels or of a batch.
        groups: divides the channels.
        weight: [channels].
        bias: [channels].
        shift: [batch, channels], added to every pixel; may be columns of a packed row.
        eps: added to the variance.
        silu: False for the norm alone.

    Returns:
        As x, dense, in the memory layout of x.

    Raises:
        ValueError: shapes, strides or devices do not fit.
    """
    check(x.ndim == 4, f"x is {list(x.shape)}; it must be [batch, channels, height, width].")
    channels = x.shape[1]
    check(groups > 0 and channels % groups == 0, f"x has {channels} channels; {groups} groups must divide them.")
    near = (is_channels_last(x) or x.stride(3) == 1) and one_stride(x)
    check(near, f"x has strides {x.stride()}; its channels or its pixels must be dense.")
    for name, tensor, right in (
        ("weight", weight, [channels]),
        ("bias", bias, [channels]),
        ("shift", shift, [x.shape[0], channels]),
    ):
        if tensor is not None:
            check(list(tensor.shape) == right, f"{name} is {list(tensor.shape)}; it must be {right}.")
            check(tensor.stride(-1) == 1, f"{name} has stride {tensor.stride(-1)} along its channels; it must be 1.")
            check(tensor.device == x.device, f"{name} is on {tensor.device}; it must be on {x.device}, as x.")
    if not use_kernel(x):
        return reference(x, groups, weight, bias, shift, eps, silu)
    channels_last = is_channels_last(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    scratch = torch.empty(scratch_size(x.shape, channels_last), dtype=torch.float32, device=x.device)
    launch(x, groups, weight, bias, shift, eps, silu, scratch, out)
    return out


def _variants(dtype: torch.dtype) -> list[Variant]:
    kind, known = TYPES[dtype], "i32:16"
    sizes = dict.fromkeys(("pixels", "channels", "scratch_batch", "x_batch"), known)
    pointers = {"x": f"*{kind}", "sums": "*fp32"}
    made = []
    for layout, pixel, channel in (("last", known, "i32:1"), ("first", "i32:1", known)):
        held = tile((1, 128, 1024, 1024), layout == "last")
        common = {**pointers, **sizes, "x_pixel": pixel, "x_channel": channel}
        out = {"out": f"*{kind}", "out_batch": known, "out_pixel": pixel, "out_channel": channel}
        apply = {**common, **out, "bias": f"*{kind}", "splits": "i32"}
        made += [
            Variant(f"sums-{layout}-{kind}", _sums_kernel, {**common, "steps": "i32"}, held, WARPS),
            Variant(f"apply-{layout}-{kind}", _apply_kernel, apply, {"SILU": True, **held}, WARPS),
        ]
    rest = {"weight": f"*{kind}", "shift": f"*{kind}", "splits": "i32", "width": "i32", "eps": "fp32"}
    signature = {**pointers, **sizes, **rest, "shift_batch": known, "x_channel": "i32:1"}
    for width in (4, 10, 20, 40, 80):  # channels of a group: the VAE's least, the UNets' 320 to 2560 in 32 groups
        constexprs, name = {"SHIFT": True, **combination(width)}, f"factors-{width}-{kind}"
        made.append(Variant(name, _factors_kernel, signature, constexprs, FEW_WARPS, wide=False))
    return made


VARIANTS = tuple(variant for dtype in (torch.bfloat16, torch.float16) for variant in _variants(dtype))
