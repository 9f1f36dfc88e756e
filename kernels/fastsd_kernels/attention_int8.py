# mypy: disable-error-code="no-untyped-def"
"""Attention with scores from int8 queries and keys, and their quantisation behind the norm and the rotation.

The idea is SageAttention's (Zhang et al. 2024, https://arxiv.org/abs/2410.02367): queries and keys have one scale per
64 tokens of a head, so a tile of scores is an integer product times one number a row. Keys share a large offset in
some channels; their mean over the tokens is subtracted first, which adds one number to all scores of a query and so
changes nothing under the softmax. Values and weights stay in bfloat16 or float16. What is particular here:

- Norm, rotation, smoothing and quantisation are two launches that read queries once and keys twice, 8 bytes for an
  element of both in bf16, as the norm in place moves.
- The scale of the scores and log2(e), for a softmax in base two, are in the scales of the queries.
- A block with NaN or Inf has NaN as its scale, so what attends to it is NaN.

It is an approximation that a caller has to ask for: no other op dispatches to it. 2 B H Sq Sk D integer operations and
as many floating-point ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsd_kernels import configs, qk_norm_rope
from fastsd_kernels.attention import finish, load_tile, start
from fastsd_kernels.launch import TYPES, Variant, check, jit, run, tl, use_kernel

BLOCK = 64  # tokens that share a scale, and keys of a tile
CHUNK = 4  # blocks of keys that one program adds up
MOST = 127
LEAST = 1e-35  # magnitude of a block; what is below has no reciprocal in float32
DIMS = (64, 128)
HALVES = (torch.bfloat16, torch.float16)

# Queries of a tile, warps, tiles in flight: what compiles without spills on all chips, and no claim of speed.
BLOCK_M, WARPS, STAGES = 128, 8, 3


def reference_quantize(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_qk` in plain torch, in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(wide, copy=True) for x in (q, k))
    for x, weight in ((q, q_weight), (k, k_weight)):
        qk_norm_rope.reference(x.unsqueeze(2), weight, None, rotary, eps)
    q8, q_scale = quantize_blocks(q)
    k8, k_scale = quantize_blocks(k - k.mean(1, keepdim=True))
    return q8, k8, q_scale * _factor(q.shape[3]), k_scale


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, S, H, D] as int8 and float32 scales [B, H, blocks] of 64 tokens of a head; halves round away from zero."""
    tokens = x.shape[1]
    blocks = F.pad(x, (0, 0, 0, 0, 0, -tokens % BLOCK)).unflatten(1, (-(-tokens // BLOCK), BLOCK))
    largest = blocks.abs().amax((2, 4), keepdim=True)
    scale = torch.where(largest < LEAST, 1.0, largest / MOST)
    scale = torch.where(scale.isfinite(), scale, math.nan)
    scaled = (blocks * (1 / scale)).nan_to_num()
    numbers = (scaled + torch.where(scaled < 0, -0.5, 0.5)).to(torch.int8).flatten(1, 2)[:, :tokens]
    return numbers.contiguous(), scale[:, :, 0, :, 0].transpose(1, 2).contiguous().float()


def reference(q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor) -> Tensor:
    """`attention_int8` in plain torch, in at least float32."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = (
        x.transpose(1, 2).to(wide) * scale.to(wide).repeat_interleave(BLOCK, 2)[:, :, : x.shape[1], None]
        for x, scale in ((q8, q_scale), (k8, k_scale))
    )
    out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2).to(wide), scale=math.log(2))
    return out.transpose(1, 2).contiguous().to(v.dtype)


def _factor(dim: int) -> float:
    """Of the scores, for a softmax in base two."""
    return math.log2(math.e) / math.sqrt(dim)


@jit
def normed_tile(
    ptr, stride, rows, weight, rotary, rotary_part, rotary_row, eps,
    D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Normalised and rotated tokens of a head, in float32; zero beyond `rows`."""
    x = load_tile(ptr, stride, rows, 0, D, D, ROWS, True).to(tl.float32)
    if NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * tl.load(weight + tl.arange(0, D)).to(tl.float32)
    if ROTATE:
        cos = load_tile(rotary, rotary_row, rows, 0, D // 2, D // 2, ROWS, True)
        sin = load_tile(rotary + rotary_part, rotary_row, rows, 0, D // 2, D // 2, ROWS, True)
        even, odd = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
        x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [ROWS, D])
    return x


@jit
def _sum_kernel(
    k_ptr, weight, rotary,
    keys, heads, k_b, k_s, k_h, rotary_part, rotary_row, eps,
    sums,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Sum of the normalised and rotated keys of a head over one chunk of tokens."""
    first = tl.program_id(0) * BLOCK * CHUNK
    head = tl.program_id(1)
    k_ptr += (head // heads).to(tl.int64) * k_b + (head % heads).to(tl.int64) * k_h + first.to(tl.int64) * k_s
    rotary += first.to(tl.int64) * rotary_row
    total = tl.zeros([D], tl.float32)
    for _ in tl.range(0, CHUNK):
        x = normed_tile(
            k_ptr, k_s, keys - first, weight, rotary, rotary_part, rotary_row, eps, D, BLOCK, NORM, ROTATE
        )  # fmt: skip
        total += tl.sum(x, 0)
        first += BLOCK
        k_ptr += BLOCK * k_s
        rotary += BLOCK * rotary_row
    place = head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + place * D + tl.arange(0, D), total)


@jit
def _quantize_kernel(
    q_ptr, k_ptr, q_weight, k_weight, rotary, sums,
    queries, keys, heads, chunks, q_b, q_s, q_h, k_b, k_s, k_h, rotary_part, rotary_row, eps,
    q8, k8, q_scale, k_scale,
    FACTOR: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One block of queries or, after those, of keys."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK)
    mean = tl.zeros([D], tl.float32)
    factor = FACTOR
    if block < blocks:
        ptr, weight, stride, tokens = q_ptr + b * q_b + h * q_h, q_weight, q_s, queries
        out, scale_ptr = q8, q_scale
    else:
        block -= blocks
        blocks = tl.cdiv(keys, BLOCK)
        ptr, weight, stride, tokens = k_ptr + b * k_b + h * k_h, k_weight, k_s, keys
        out, scale_ptr = k8, k_scale
        factor = 1.0
        of_head = sums + head.to(tl.int64) * chunks * D + tl.arange(0, D)
        for chunk in tl.range(0, chunks):
            mean += tl.load(of_head + chunk * D)
        mean = mean / keys
    first = block.to(tl.int64) * BLOCK
    rows = tokens - block * BLOCK
    x = normed_tile(
        ptr + first * stride, stride, rows, weight, rotary + first * rotary_row, rotary_part, rotary_row, eps,
        D, BLOCK, NORM, ROTATE,
    )  # fmt: skip
    x = tl.where(tl.arange(0, BLOCK)[:, None] < rows, x - mean[None, :], 0.0)
    magnitude = tl.abs(x)
    # The maximum passes NaN over, a comparison does not.
    largest = tl.max(tl.max(tl.where(magnitude <= 3.4028234e38, magnitude, float("inf")), 1), 0)
    finite = largest < float("inf")
    scale = tl.where(largest < 1e-35, 1.0, largest / 127.0)
    scaled = tl.where(finite, x * (1.0 / scale), 0.0)
    numbers = (scaled + tl.where(scaled < 0.0, -0.5, 0.5)).to(tl.int8)
    place = (b * tokens + first) * heads + h
    row = tl.arange(0, BLOCK)[:, None]
    tl.store(out + place * D + row * (heads * D) + tl.arange(0, D)[None, :], numbers, mask=row < rows)
    tl.store(scale_ptr + head.to(tl.int64) * blocks + block, tl.where(finite, scale * factor, float("nan")))


@jit
def attend_tile_int8(
    q, q_scale, k_ptr, k_scale, v_ptr, k_s, v_s, keys, m, l, acc,
    D: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values: the running maximum, sum and numerator after it."""
    k = load_tile(k_ptr, k_s, keys, 0, D, D, BLOCK, MASK)
    s = tl.dot(q, k.T).to(tl.float32)
    if MASK:
        s = tl.where(tl.arange(0, BLOCK)[None, :] < keys, s, float("-inf"))
    scale = q_scale * tl.load(k_scale)
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale[:, None] - m_new[:, None])
    correction = tl.exp2(m - m_new)
    l = l * correction + tl.sum(p, 1)
    v = load_tile(v_ptr, v_s, keys, 0, D, D, BLOCK, MASK)
    acc = tl.dot(p.to(v.dtype), v, acc=acc * correction[:, None])
    return m_new, l, acc


@jit
def _attention_int8_kernel(
    q_ptr, k_ptr, q_scale, k_scale, v_ptr,
    queries, keys, heads, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    out_ptr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; neighbours share the head, so its keys and values are in L2."""
    tiles = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q_ptr += b * q_b + h * q_h + first.to(tl.int64) * q_s
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    out_ptr += b * o_b + h * o_h + first.to(tl.int64) * o_s
    blocks = tl.cdiv(queries, BLOCK)
    block = (first + tl.arange(0, BLOCK_M)) // BLOCK
    scale = tl.load(q_scale + head.to(tl.int64) * blocks + block, mask=block < blocks, other=0.0)
    k_scale += head.to(tl.int64) * tl.cdiv(keys, BLOCK)
    q, _, m, l, acc, _ = start(q_ptr, q_s, queries - first, D, D, 0, BLOCK_M)
    for _ in tl.range(0, keys // BLOCK):
        m, l, acc = attend_tile_int8(q, scale, k_ptr, k_scale, v_ptr, k_s, v_s, BLOCK, m, l, acc, D, BLOCK, False)
        k_ptr += BLOCK * k_s
        v_ptr += BLOCK * v_s
        k_scale += 1
    if TAIL:
        m, l, acc = attend_tile_int8(
            q, scale, k_ptr, k_scale, v_ptr, k_s, v_s, keys % BLOCK, m, l, acc, D, BLOCK, True
        )  # fmt: skip
    finish(out_ptr, o_s, queries - first, l, acc, l, D, D, 0, BLOCK_M)


def _strides(x: Tensor) -> list[int]:
    """The first three; that of a dimension of size one is arbitrary, and taken as zero."""
    return [0 if x.shape[i] == 1 else x.stride(i) for i in range(3)]


def launch_quantize(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None, eps: float,
    sums: Tensor, q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor,
) -> None:  # fmt: skip
    """`quantize_qk` into contiguous outputs; `sums` [B, H, chunks of 256 keys, D] in float32 is room to work in."""
    batch, queries, heads, dim = q.shape
    keys, chunks = k.shape[1], sums.shape[2]
    # Where there is nothing, any pointer does: it is not read.
    weights = (q if q_weight is None else q_weight, k if k_weight is None else k_weight)
    angles = (q, 0, 0) if rotary is None else (rotary, rotary.stride(0), rotary.stride(1))
    form = {"D": dim, "BLOCK": BLOCK, "NORM": q_weight is not None, "ROTATE": rotary is not None}
    warps = dim // 16
    run(
        _sum_kernel,
        (chunks, batch * heads),
        *(k, weights[1], angles[0], keys, heads, *_strides(k), *angles[1:], eps, sums),
        num_warps=warps,
        CHUNK=CHUNK,
        **form,
    )
    run(
        _quantize_kernel,
        (q_scale.shape[2] + k_scale.shape[2], batch * heads),
        *(q, k, *weights, angles[0], sums, queries, keys, heads, chunks, *_strides(q), *_strides(k), *angles[1:], eps),
        *(q8, k8, q_scale, k_scale),
        num_warps=warps,
        FACTOR=_factor(dim),
        **form,
    )


def launch(q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor, out: Tensor) -> None:
    """Run the kernel; arguments as `attention_int8_out`."""
    batch, queries, heads, dim = q8.shape
    keys = k8.shape[1]
    run(
        _attention_int8_kernel,
        (-(-queries // BLOCK_M) * batch * heads,),
        *(q8, k8, q_scale, k_scale, v, queries, keys, heads),
        *(stride for x in (q8, k8, v, out) for stride in _strides(x)),
        out,
        D=dim,
        BLOCK_M=BLOCK_M,
        BLOCK=BLOCK,
        TAIL=keys % BLOCK != 0,
        num_warps=WARPS,
        num_stages=STAGES,
    )


@torch.library.triton_op("fastsd::quantize_qk", mutates_args={})
def quantize_qk(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys for `attention_int8`: normalised and rotated as by `qk_norm_rope`, smoothed, and then quantised.

    The keys of an attention have to come at once, since their mean is that of all. So where text and image have norms
    of their own, two `qk_norm_rope` precede, and this gets neither weights nor rotary. A block below 1e-35 in magnitude
    becomes zeros with the scale of 1; one with NaN or Inf becomes zeros with the scale NaN, and, as the mean is
    spoiled, one such key does so to all keys of its head.

    Args:
        q: [batch, queries, heads, head_dim], any strides whose last is 1; head_dim is 64 or 128.
        k: [batch, keys, heads, head_dim], so too.
        q_weight: [head_dim], None for no norm.
        k_weight: [head_dim], None for no norm.
        rotary: cosines and sines [2, tokens, head_dim / 2], float32, any strides whose last is 1, of as many queries as
            keys; None for no rotation.
        eps: added to the mean square.

    Returns:
        int8 queries and keys of the shapes given, in -127..127, and their scales [batch, heads, blocks of 64 tokens] in
        float32, all contiguous. The scales of the queries have log2(e) / sqrt(head_dim) in them.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    _check_four(q=q, k=k)
    check(k.dtype == q.dtype, f"k is {k.dtype} but q is {q.dtype}; both must have one dtype.")
    expected = [q.shape[0], k.shape[1], *q.shape[2:]]
    check(list(k.shape) == expected, f"k is {list(k.shape)}; for q {list(q.shape)} it must be {expected}.")
    alike = (q_weight is None) == (k_weight is None)
    check(alike, "Only one of q_weight and k_weight is given; it must be both or none.")
    dim = q.shape[3]
    given = {
        "q_weight": (q_weight, [dim]),
        "k_weight": (k_weight, [dim]),
        "rotary": (rotary, [2, q.shape[1], dim // 2]),
    }
    if rotary is not None:
        check(q.shape[1] == k.shape[1], f"k has {k.shape[1]} tokens; to be rotated as q it must have {q.shape[1]}.")
        check(rotary.dtype == torch.float32, f"rotary is {rotary.dtype}; it must be torch.float32.")
    for name, (tensor, right) in given.items():
        if tensor is not None:
            check(list(tensor.shape) == right, f"{name} is {list(tensor.shape)}; it must be {right}.")
            check(tensor.stride(-1) == 1, f"{name} has stride {tensor.stride(-1)} along its last axis; it must be 1.")
            check(tensor.device == q.device, f"{name} is on {tensor.device}; it must be on {q.device}, as q.")
    if not use_kernel(q):
        return reference_quantize(q, k, q_weight, k_weight, rotary, eps)
    q8, k8 = (torch.empty(x.shape, dtype=torch.int8, device=q.device) for x in (q, k))
    sums, q_scale, k_scale = (
        torch.empty(shape, dtype=torch.float32, device=q.device)
        for shape in ((*_blocks(k, CHUNK * BLOCK), dim), _blocks(q), _blocks(k))
    )
    launch_quantize(q, k, q_weight, k_weight, rotary, eps, sums, q8, k8, q_scale, k_scale)
    return q8, k8, q_scale, k_scale


@torch.library.triton_op("fastsd::attention_int8", mutates_args={})
def attention_int8(q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor) -> Tensor:
    """Attention of what `quantize_qk` gives to v: [batch, queries, heads, head_dim] as v, contiguous.

    Args:
        q8: int8 [batch, queries, heads, head_dim], any strides whose last is 1; head_dim is 64 or 128.
        k8: int8 [batch, keys, heads, head_dim], so too.
        q_scale: float32 [batch, heads, blocks of 64 queries], contiguous.
        k_scale: float32 [batch, heads, blocks of 64 keys], contiguous.
        v: bfloat16 or float16 [batch, keys, heads, head_dim], any strides whose last is 1.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    check_attention_int8(q8, k8, q_scale, k_scale, v)
    if not _has_kernel(v):
        return reference(q8, k8, q_scale, k_scale, v)
    out = torch.empty(q8.shape, dtype=v.dtype, device=v.device)
    launch(q8, k8, q_scale, k_scale, v, out)
    return out


@torch.library.triton_op("fastsd::attention_int8_out", mutates_args={"out"})
def attention_int8_out(q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor, out: Tensor) -> None:
    """As `attention_int8`, into `out` [batch, queries, heads, head_dim], which may be columns of a larger buffer.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    check_attention_int8(q8, k8, q_scale, k_scale, v, out)
    if _has_kernel(v):
        launch(q8, k8, q_scale, k_scale, v, out)
    else:
        out.copy_(reference(q8, k8, q_scale, k_scale, v))


def check_attention_int8(
    q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor, out: Tensor | None = None
) -> None:
    """Refuse what is no attention with int8 scores.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    results = {} if out is None else {"out": out}
    _check_four(q8=q8, k8=k8, v=v, **results)
    check(v.dtype in HALVES, f"v is {v.dtype}; it must be torch.bfloat16 or torch.float16.")
    expected = [q8.shape[0], k8.shape[1], *q8.shape[2:]]
    for name, x, dtype, shape in (
        ("q8", q8, torch.int8, list(q8.shape)),
        ("k8", k8, torch.int8, expected),
        ("v", v, v.dtype, expected),
        ("q_scale", q_scale, torch.float32, _blocks(q8)),
        ("k_scale", k_scale, torch.float32, _blocks(k8)),
        *((name, x, v.dtype, list(q8.shape)) for name, x in results.items()),
    ):
        check(x.dtype == dtype, f"{name} is {x.dtype}; it must be {dtype}.")
        check(x.device == q8.device, f"{name} is on {x.device} but q8 on {q8.device}; all must be on one device.")
        check(list(x.shape) == shape, f"{name} is {list(x.shape)}; for q8 {list(q8.shape)} it must be {shape}.")
    for name, x in (("q_scale", q_scale), ("k_scale", k_scale)):
        check(x.is_contiguous(), f"{name} has strides {list(x.stride())}; it must be contiguous.")


def _check_four(**tensors: Tensor) -> None:
    """Refuse what has not four dimensions, a head dimension of the kernels, adjacent elements, and one device."""
    (first, device), *_ = ((name, x.device) for name, x in tensors.items())
    for name, x in tensors.items():
        check(x.dim() == 4, f"{name} has {x.dim()} dimensions; it must be [batch, tokens, heads, head_dim].")
        check(x.shape[3] in DIMS, f"{name} has the head dimension {x.shape[3]}; it must be 64 or 128.")
        check(x.stride(3) == 1, f"{name} has stride {x.stride(3)} in its last dimension; it must be 1.")
        check(x.device == device, f"{name} is on {x.device} but {first} on {device}; all must be on one device.")


def _blocks(x: Tensor, size: int = BLOCK) -> list[int]:
    """[batch, heads, blocks] of x [batch, tokens, heads, head_dim]."""
    return [x.shape[0], x.shape[2], -(-x.shape[1] // size)]


def _has_kernel(v: Tensor) -> bool:
    return use_kernel(v) and configs.arch(v.device) is not None


def _variants(dim: int, dtype: torch.dtype) -> tuple[Variant, ...]:
    kind, known = TYPES[dtype], "i32:16"
    model = {64: "sd3", 128: "flux"}[dim]
    form = {"D": dim, "BLOCK": BLOCK}
    norm = {**form, "NORM": True, "ROTATE": dim == 128}

    def signature(pointers: dict[str, str], integers: tuple[str, ...], strided: str) -> dict[str, str]:
        strides = (f"{x}_{axis}" for x in strided for axis in "bsh")
        return {**pointers, **dict.fromkeys(integers, "i32"), **dict.fromkeys(strides, known)}

    angles = {"rotary": "*fp32", "rotary_part": known, "rotary_row": known, "eps": "fp32"}
    numbers = {"q8": "*i8", "k8": "*i8", "q_scale": "*fp32", "k_scale": "*fp32", "sums": "*fp32"}
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "q_weight", "k_weight"), f"*{kind}")
    of_sum = {"k_ptr": f"*{kind}", "weight": f"*{kind}", "sums": "*fp32", **angles}
    of_attention = {"q_ptr": "*i8", "k_ptr": "*i8", "q_scale": "*fp32", "k_scale": "*fp32"}
    of_attention |= {"v_ptr": f"*{kind}", "out_ptr": f"*{kind}"}
    return (
        Variant(
            f"sum-{model}-{kind}",
            _sum_kernel,
            signature(of_sum, ("keys", "heads"), "k"),
            {**norm, "CHUNK": CHUNK},
            dim // 16,
        ),
        Variant(
            f"quantize-{model}-{kind}",
            _quantize_kernel,
            signature({**inputs, **angles, **numbers}, ("queries", "keys", "heads", "chunks"), "qk"),
            {**norm, "FACTOR": _factor(dim)},
            dim // 16,
        ),
        *(
            Variant(
                f"attention-{dim}-{kind}" + "-tail" * tail,
                _attention_int8_kernel,
                signature(of_attention, ("queries", "keys", "heads"), "qkvo"),
                {**form, "BLOCK_M": BLOCK_M, "TAIL": tail},
                WARPS,
                STAGES,
                mma=True,
            )
            for tail in (False, True)
        ),
    )


VARIANTS = tuple(variant for dim in DIMS for dtype in HALVES for variant in _variants(dim, dtype))
