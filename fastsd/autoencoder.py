"""The network of `diffusers.AutoencoderKL`, walked layer by layer: whole, or in strips where memory is short.

The modules stay as `diffusers` made them and are only read, so whoever else holds them notices nothing.

In strips every result is that of the whole map up to rounding, so there are no seams to blend. A convolution of some
rows needs one more on either side. Only group norm and attention look at the whole map: mean and variance of a norm are
taken in a pass over the strips before it is applied, and attention runs at the size of the latents, where it is small.
Of maps at full size only the sums of the residual blocks are held: of Stable Diffusion's decoder one of 128 channels,
where the whole network holds 5 x 128. What lies in between is computed again, strip by strip, whenever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd import ops

STRIP = 2**22  # elements of a map that are computed at a time
ROWS = 16  # that a strip has at least: each convolution computes two more

Layer = tuple[Callable[[Any, Tensor], Tensor], Any]  # and its module


def decoder(vae: Any, latents: Tensor, *, striped: bool = False) -> Tensor:
    """Latents of one image [1, C, h, w], as the network takes them, to pixels [1, 3, 8h, 8w] in -1..1.

    Computes in the dtype of `latents`, whatever that of the weights is.
    """
    net = vae.decoder
    x = latents if vae.post_quant_conv is None else _conv(vae.post_quant_conv, latents)
    x = _walk(_mid(net.mid_block), _conv(net.conv_in, x))
    layers = [layer for block in net.up_blocks for layer in _level(block)]
    if not striped:
        return _end(net, _walk(layers, x))
    scale = 2 ** sum(layer is _up for layer, _ in layers)
    size = x.shape[2] * x.shape[3] * scale**2 * net.conv_out.in_channels
    rows = _walk_strips(layers, _held(x), most=size // 2)
    return _collect(_convolved(net.conv_out, _activated_rows(rows, net.conv_norm_out, net.conv_act)))


def encoder(vae: Any, pixels: Tensor, *, striped: bool = False) -> Tensor:
    """Pixels of one image [1, 3, H, W] in -1..1 to mean and log variance of its latents [1, 2C, H / 8, W / 8].

    Computes in the dtype of `pixels`, whatever that of the weights is.
    """
    net = vae.encoder
    layers = [layer for block in net.down_blocks for layer in _level(block)]
    if striped:
        rows = _convolved(net.conv_in, _held(pixels))
        size = rows.channels * rows.height * rows.width
        x = _collect(_walk_strips(layers, rows, most=size // 2))
    else:
        x = _walk(layers, _conv(net.conv_in, pixels))
    x = _end(net, _walk(_mid(net.mid_block), x))
    return x if vae.quant_conv is None else _conv(vae.quant_conv, x)


def _mid(block: Any) -> Iterator[Layer]:
    yield _resnet, block.resnets[0]
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            yield _attention, attention
        yield _resnet, resnet


def _level(block: Any) -> Iterator[Layer]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        yield _resnet, resnet
        if attention is not None:
            yield _attention, attention
    for module in getattr(block, "upsamplers", None) or ():
        yield _up, module
    for module in getattr(block, "downsamplers", None) or ():
        yield _down, module


def _walk(layers: Iterable[Layer], x: Tensor) -> Tensor:
    for layer, module in layers:
        x = layer(module, x)
    return x


def _end(net: Any, x: Tensor) -> Tensor:
    return _conv(net.conv_out, _activated(x, net.conv_norm_out, net.conv_act))


def _resnet(block: Any, x: Tensor) -> Tensor:
    activation = block.nonlinearity
    # The maps in between have no names: each is let go of as soon as it is read.
    hidden = _conv(
        block.conv2, _activated(_conv(block.conv1, _activated(x, block.norm1, activation)), block.norm2, activation)
    )
    return _shortcut(block, x) + hidden


def _shortcut(block: Any, x: Tensor) -> Tensor:
    return x if block.conv_shortcut is None else _conv(block.conv_shortcut, x)


def _attention(module: Any, x: Tensor) -> Tensor:
    norm, (batch, _, height, width) = module.group_norm, x.shape
    tokens = F.group_norm(x.flatten(2), norm.num_groups, *_weights(norm, x), norm.eps).transpose(1, 2)
    shape = (batch, height * width, module.heads, -1)
    linears = (module.to_q, module.to_k, module.to_v)
    q, k, v = (F.linear(tokens, *_weights(one, x)).view(shape).transpose(1, 2) for one in linears)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(mixed, *_weights(module.to_out[0], x)).transpose(1, 2).reshape(x.shape) + x


def _up(module: Any, x: Tensor) -> Tensor:
    if 4 * x.numel() > 2**31:  # pytorch #141831: wrong in channels-last maps of that size
        x = x.contiguous()
    return _conv(module.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _down(module: Any, x: Tensor) -> Tensor:
    return _conv(module.conv, F.pad(x, (0, 1, 0, 1)))


def _activated(x: Tensor, norm: Any, activation: nn.Module) -> Tensor:
    if ops.fused(x) and isinstance(activation, nn.SiLU):
        return ops.group_norm_silu(x, norm)
    return _activate(activation, F.group_norm(x, norm.num_groups, *_weights(norm, x), norm.eps))


def _activate(activation: nn.Module, fresh: Tensor) -> Tensor:
    """Of a map that nobody else holds."""
    activated: Tensor = F.silu(fresh, inplace=True) if isinstance(activation, nn.SiLU) else activation(fresh)
    return activated


def _conv(conv: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, *_weights(conv, x), conv.stride, conv.padding)


def _weights(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)


@dataclass(frozen=True)
class Rows:
    """A map [1, channels, height, width] that is read some rows at a time.

    Attributes:
        read: (first, end) -> [1, channels, end - first, width]; computed, or of `held`.
        held: the whole map, if it is in memory.
        widest: channels of the widest map that reading goes through.
    """

    channels: int
    height: int
    width: int
    read: Callable[[int, int], Tensor]
    held: Tensor | None = None
    widest: int = 0


def _held(x: Tensor) -> Rows:
    _, channels, height, width = x.shape
    return Rows(channels, height, width, lambda first, end: x[:, :, first:end], held=x)


def _collect(rows: Rows) -> Tensor:
    """The whole map."""
    if rows.held is not None:
        return rows.held
    x = None
    for first, end in _strips(rows):
        strip = rows.read(first, end)
        if x is None:
            x = _empty(strip, rows.height)
        x[:, :, first:end] = strip
    assert x is not None
    return x


def _empty(strip: Tensor, height: int) -> Tensor:
    """Memory for the map that a strip is of."""
    layout = torch.channels_last if strip.stride(1) == 1 else torch.contiguous_format
    shape = (*strip.shape[:2], height, strip.shape[3])
    return torch.empty(shape, dtype=strip.dtype, device=strip.device, memory_format=layout)


def _strips(rows: Rows) -> Iterator[tuple[int, int]]:
    step = max(STRIP // (max(rows.channels, rows.widest) * rows.width), ROWS)
    for first in range(0, rows.height, step):
        yield first, min(first + step, rows.height)


def _walk_strips(layers: Iterable[Layer], rows: Rows, most: int) -> Rows:
    """`_walk`; of what can be computed again no more than `most` elements are held."""
    for layer, module in layers:
        rows = _held_if(rows, most)  # what it was computed of is let go of
        rows = _STRIPED[layer](module, rows, most)
    return rows


def _held_if(rows: Rows, most: int) -> Rows:
    return rows if rows.channels * rows.height * rows.width > most else _held(_collect(rows))


def _striped_resnet(block: Any, rows: Rows, most: int) -> Rows:
    """Overwrites `rows` if they are held and the result has as many channels."""
    hidden = _convolved(block.conv1, _activated_rows(rows, block.norm1, block.nonlinearity))
    branch = _convolved(block.conv2, _activated_rows(_held_if(hidden, most), block.norm2, block.nonlinearity))
    result = rows.held if block.conv_shortcut is None else None
    before: tuple[slice, Tensor] | None = None  # written late: the next strip reads its last rows as they were
    for first, end in _strips(branch):
        strip = branch.read(first, end)
        strip += _shortcut(block, rows.read(first, end))
        if result is None:
            result = _empty(strip, rows.height)
        if before is not None:
            result[:, :, before[0]] = before[1]
        before = slice(first, end), strip
    assert result is not None and before is not None
    result[:, :, before[0]] = before[1]
    return _held(result)


def _striped_attention(module: Any, rows: Rows, most: int) -> Rows:
    return _held(_attention(module, _collect(rows)))


def _striped_up(module: Any, rows: Rows, most: int) -> Rows:
    def read(first: int, end: int) -> Tensor:
        low = first // 2
        x = F.interpolate(rows.read(low, -(-end // 2)), scale_factor=2.0, mode="nearest")
        return x[:, :, first - 2 * low : end - 2 * low]

    doubled = replace(rows, height=2 * rows.height, width=2 * rows.width, read=read, held=None)
    return _remembered(_convolved(module.conv, doubled))


def _striped_down(module: Any, rows: Rows, most: int) -> Rows:
    def read(first: int, end: int) -> Tensor:
        last = 2 * end + 1
        x = F.pad(rows.read(2 * first, min(last, rows.height)), (0, 1, 0, max(last - rows.height, 0)))
        return _conv(module.conv, x)

    widest = max(rows.channels, rows.widest)
    return Rows(module.conv.out_channels, rows.height // 2, rows.width // 2, read, widest=widest)


def _remembered(rows: Rows) -> Rows:
    """What was read last need not be computed again."""
    last: tuple[int, int, Tensor] | None = None

    def read(first: int, end: int) -> Tensor:
        nonlocal last
        if last is None or first < last[0] or end > last[1]:
            last = None  # let go of before the next is made
            last = first, end, rows.read(first, end)
        return last[2][:, :, first - last[0] : end - last[0]]

    return replace(rows, read=read, held=None)


_STRIPED: dict[Any, Callable[[Any, Rows, int], Rows]] = {
    _resnet: _striped_resnet,
    _attention: _striped_attention,
    _up: _striped_up,
    _down: _striped_down,
}


def _convolved(conv: Any, rows: Rows) -> Rows:
    """A 3x3 convolution with a border of zeros."""

    def read(first: int, end: int) -> Tensor:
        low, high = max(first - 1, 0), min(end + 1, rows.height)
        return _strip_conv(conv, _padded(rows.read(low, high), low - (first - 1), end + 1 - high))

    widest = max(rows.channels, rows.widest)
    return Rows(conv.out_channels, rows.height, rows.width, read, widest=widest)


def _strip_conv(conv: Any, x: Tensor) -> Tensor:
    """Of rows that bring the one above and the one below."""
    return F.conv2d(x, *_weights(conv, x), padding=(0, 1))


def _padded(x: Tensor, above: int, below: int) -> Tensor:
    return F.pad(x, (0, 0, above, below)) if above or below else x


def _activated_rows(rows: Rows, norm: Any, activation: nn.Module) -> Rows:
    statistics = _statistics(rows, norm)

    def read(first: int, end: int) -> Tensor:
        return _normed(rows.read(first, end), norm, activation, statistics)

    return replace(rows, read=read, held=None)


def _normed(x: Tensor, norm: Any, activation: nn.Module, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """Group norm of one image with known statistics is batch norm; it computes in float32, as theirs are."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return _activate(activation, F.batch_norm(x, *statistics, weight, bias, eps=norm.eps))


def _statistics(rows: Rows, norm: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the group of every channel, float32 [channels].

    Of a strip in float32, of strips and channels together in float64 (Chan, Golub & LeVeque 1979).
    """
    counts, means, variances = [], [], []
    for first, end in _strips(rows):
        x = rows.read(first, end).to(torch.float32, copy=True)
        center = x.mean((0, 2, 3), keepdim=True)
        variance = x.sub_(center).square_().mean((0, 2, 3))
        counts.append(end - first)
        means.append(center.flatten().double())
        variances.append(variance.double())
    # [strips, groups, channels of a group]
    center, variance = (torch.stack(each).unflatten(1, (norm.num_groups, -1)) for each in (means, variances))
    share = torch.tensor(counts, dtype=torch.float64, device=center.device)[:, None, None] / rows.height
    mean = (share * center).sum(0).mean(-1, keepdim=True)
    spread = (share * (variance + (center - mean) ** 2)).sum(0).mean(-1, keepdim=True)
    return tuple(each.expand(-1, rows.channels // norm.num_groups).flatten().float() for each in (mean, spread))
