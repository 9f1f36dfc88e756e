"""The fused operations of the denoisers and the VAE: one plain function each, which its callers need not look into.

On a CUDA tensor in bfloat16, float16 or float32 with Triton installed (`fused`) a function calls the registered op of
`fastsd_kernels`; on every other tensor it is the plain torch expression, which is also what an export for another
runtime sees. The branch is Python's, so a trace holds one of the two. Within an op the kernel decides: attention runs
its Triton kernel in bfloat16 and float16 for head dimensions 40, 64, 80, 128 and 160, as the table of configurations
says, and torch's attention otherwise; the other ops take every size.

Shapes: B batch, L tokens, D width of the tokens, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of all norms in SD3 and Flux
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # that the kernels take
TRITON = find_spec("triton") is not None  # importing it takes longer than all else here, so only a tensor on CUDA does

QKV = tuple[Tensor, Tensor, Tensor]


def fused(x: Tensor) -> bool:
    """Whether a tensor (real or fake) goes to `fastsd_kernels`."""
    return x.is_cuda and x.dtype in FLOATS and TRITON


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, Lq, heads, head dim] to k and v [B, Lk, heads, head dim] -> [B, Lq, D].

    Any strides with adjacent elements in the last dimension: the three may be slices of one packed buffer.
    """
    if fused(q):
        from fastsd_kernels.attention import attention as op

        x: Tensor = op(q, k, v)
        return x.flatten(2)
    return _attend(q, k, v)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` to a prompt's few keys."""
    if fused(q):
        from fastsd_kernels.cross_attention import cross_attention as op

        x: Tensor = op(q, k, v)
        return x.flatten(2)
    return _attend(q, k, v)


def joint_attention(first: QKV, second: QKV) -> tuple[Tensor, Tensor]:
    """Attention over two kinds of tokens together, each given by q, k and v [B, L, heads, head dim] -> [B, L, D] each.

    On CUDA nothing is joined. In the plain expression they are by `torch.cat`, not by writing into slices of a buffer:
    uncompiled on a CPU both take the same time, but Inductor lets what it fuses write straight into the result, and a
    graph gets one node, not a scatter per slice.
    """
    if fused(first[0]):
        from fastsd_kernels.joint_attention import joint_attention as op

        x, y = op(*first, *second)
        return x.flatten(2), y.flatten(2)
    joined = _attend(*(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)))
    x, y = joined.split([first[0].shape[1], second[0].shape[1]], dim=1)
    return x, y


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x: Tensor = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return x.transpose(1, 2).flatten(2)


def unpacked(qkv: Tensor | Sequence[Tensor]) -> QKV:
    """q, k and v [B, L, heads, head dim] each, of a packed [B, L, 3, heads, head dim] or of three."""
    q, k, v = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
    return q, k, v


def qk_norm_rope(
    qkv: Tensor | Sequence[Tensor], norm_q: nn.RMSNorm | None, norm_k: nn.RMSNorm | None, rotary: Tensor | None
) -> QKV:
    """Queries and keys normalised (RMS of each head) and rotated; values as they are.

    Args:
        qkv: packed [B, L, 3, heads, head dim], or three [B, L, heads, head dim]; on CUDA overwritten.
        norm_q: of the queries, None for none.
        norm_k: of the keys.
        rotary: cosines and sines [2, L, head dim / 2] in float32, None for no rotation.

    Returns:
        q, k and v, [B, L, heads, head dim] each.
    """
    q, k, v = unpacked(qkv)
    if not fused(q):
        q, k = (x if norm is None else norm(x) for x, norm in ((q, norm_q), (k, norm_k)))
        return (q, k, v) if rotary is None else (rotate(q, rotary), rotate(k, rotary), v)
    if rotary is None and norm_q is None:
        return q, k, v
    from fastsd_kernels.qk_norm_rope import qk_norm_rope as op

    weights = [None if norm is None else norm.weight for norm in (norm_q, norm_k)]
    if isinstance(qkv, Tensor):
        op(qkv, *weights, rotary, EPS)
    else:
        for x, weight in zip((q, k), weights, strict=True):
            op(x.unsqueeze(2), weight, None, rotary, EPS)
    return q, k, v


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of [B, L, heads, head dim] by cosines and sines [2, L, head dim / 2] (Su et al. 2021).

    Computed in float32, the dtype of the table, and rounded once.
    """
    cos, sin = rotary.unsqueeze(2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def modulate(x: Tensor, *vectors: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Layer norm without parameters of [B, L, D], for every (shift, scale) scaled and shifted by them.

    Both are [B, 1, D], and 1 is in the scale.
    """
    if fused(x):
        from fastsd_kernels.modulate import modulate as op

        return [op(x, shift.squeeze(1), scale.squeeze(1), EPS, 0.0) for shift, scale in vectors]
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return [torch.addcmul(shift, normed, scale) for shift, scale in vectors]


def gate_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Tokens [B, L, D] plus an update of the same shape, gated by [B, 1, D].

    In float16 the sum saturates, as in `diffusers` `FluxTransformerBlock`: one Inf would make the whole image NaN.
    """
    if fused(x):
        from fastsd_kernels.gate_residual import gate_residual as op

        out: Tensor = op(x, gate.squeeze(1), update)
        return out
    x = torch.addcmul(x, gate, update)
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


def gate_residual_modulate(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`gate_residual`, and the `modulate` of its result."""
    if fused(x):
        from fastsd_kernels.gate_residual import gate_residual_modulate as op

        rows = (row.squeeze(1) for row in (shift, scale))
        both: tuple[Tensor, Tensor] = op(x, gate.squeeze(1), update, *rows, EPS, 0.0)
        return both
    x = gate_residual(x, gate, update)
    (modulated,) = modulate(x, (shift, scale))
    return x, modulated


def geglu(x: Tensor) -> Tensor:
    """Gated GELU (Shazeer 2020) of values and gates side by side: [B, L, 2 D] -> [B, L, D]."""
    if fused(x):
        from fastsd_kernels.geglu import geglu as op

        out: Tensor = op(x)
        return out
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    """SiLU of the group norm of a feature map [B, C, H, W], first shifted by [B, C]; without `silu` the norm alone.

    In either memory layout, which stays.
    """
    if fused(x):
        from fastsd_kernels.group_norm_silu import group_norm_silu as op

        out: Tensor = op(x, norm.num_groups, norm.weight, norm.bias, shift, norm.eps, silu)
        return out
    if shift is not None:
        x = x + shift[:, :, None, None]
    x = norm(x)
    return F.silu(x) if silu else x
