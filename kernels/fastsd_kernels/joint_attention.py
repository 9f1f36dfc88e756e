# mypy: disable-error-code="no-untyped-def"
"""Attention of text and image tokens to text and image tokens, each of the two in its own buffers.

SD3 and Flux concatenate the queries, keys and values of both streams, attend, and split the result. Here a program
takes a tile of one stream's queries and walks over the text's keys and then the image's with one running maximum and
sum, as in `attention`; nothing is concatenated or split. Softmax does not depend on the order of the keys, so the
orders of the two families ([text, image] in Flux, [image, text] in SD3) are one.

4 B H (St + Si)^2 D floating-point operations. Three concatenations and a split, of 170 MB in a Flux block, are saved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from fastsd_kernels.attention import (
    attend,
    check_attention,
    choose,
    constants,
    finish,
    start,
    strides,
    variants,
)
from fastsd_kernels.attention import reference as attention_reference
from fastsd_kernels.configs import Config
from fastsd_kernels.launch import check, jit, known, run, tl

STREAMS = ("text", "image")


def reference(
    q_text: Tensor, k_text: Tensor, v_text: Tensor, q_image: Tensor, k_image: Tensor, v_image: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of text and image together: [B, St, H, D] and [B, Si, H, D], contiguous."""
    k, v = torch.cat([k_text, k_image], dim=1), torch.cat([v_text, v_image], dim=1)
    return attention_reference(q_text, k, v), attention_reference(q_image, k, v)


@jit
def _joint_attention_kernel(
    q_text_ptr, k_text_ptr, v_text_ptr, q_image_ptr, k_image_ptr, v_image_ptr,
    text, image, heads,
    q_text_b, q_text_s, q_text_h, k_text_b, k_text_s, k_text_h, v_text_b, v_text_s, v_text_h,
    q_image_b, q_image_s, q_image_h, k_image_b, k_image_s, k_image_h, v_image_b, v_image_s, v_image_h,
    o_text_b, o_text_s, o_text_h, o_image_b, o_image_s, o_image_h,
    out_text_ptr, out_image_ptr,
    SCALE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL_TEXT: tl.constexpr, TAIL_IMAGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries, of text or image, of one head; UNIT and the order as in `attention`."""
    text_tiles = tl.cdiv(text, BLOCK_M)
    tiles = text_tiles + tl.cdiv(image, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    k_text_ptr += (b * k_text_b + h * k_text_h) * UNIT
    v_text_ptr += (b * v_text_b + h * v_text_h) * UNIT
    k_image_ptr += (b * k_image_b + h * k_image_h) * UNIT
    v_image_ptr += (b * v_image_b + h * v_image_h) * UNIT

    is_text = tile < text_tiles
    first = tl.where(is_text, tile, tile - text_tiles) * BLOCK_M
    rows = tl.where(is_text, text, image) - first
    q_s = tl.where(is_text, q_text_s, q_image_s) * UNIT
    o_s = tl.where(is_text, o_text_s, o_image_s) * UNIT
    q_text_ptr += (b * q_text_b + h * q_text_h) * UNIT
    q_image_ptr += (b * q_image_b + h * q_image_h) * UNIT
    out_text_ptr += (b * o_text_b + h * o_text_h) * UNIT
    out_image_ptr += (b * o_image_b + h * o_image_h) * UNIT
    q_ptr = tl.where(is_text, q_text_ptr, q_image_ptr) + first.to(tl.int64) * q_s
    out_ptr = tl.where(is_text, out_text_ptr, out_image_ptr) + first.to(tl.int64) * o_s

    q0, q1, m, l, acc0, acc1 = start(q_ptr, q_s, rows, D, D0, D1, BLOCK_M)
    m, l, acc0, acc1 = attend(
        q0, q1, k_text_ptr, v_text_ptr, k_text_s * UNIT, v_text_s * UNIT, text, m, l, acc0, acc1,
        SCALE, D, D0, D1, BLOCK_N, TAIL_TEXT,
    )  # fmt: skip
    m, l, acc0, acc1 = attend(
        q0, q1, k_image_ptr, v_image_ptr, k_image_s * UNIT, v_image_s * UNIT, image, m, l, acc0, acc1,
        SCALE, D, D0, D1, BLOCK_N, TAIL_IMAGE,
    )  # fmt: skip
    finish(out_ptr, o_s, rows, l, acc0, acc1, D, D0, D1, BLOCK_M)


def launch(
    q_text: Tensor, k_text: Tensor, v_text: Tensor, q_image: Tensor, k_image: Tensor, v_image: Tensor,
    out_text: Tensor, out_image: Tensor, config: Config,
) -> None:  # fmt: skip
    """Run the kernel; arguments as `joint_attention_out`, head dimension in `SPLITS`."""
    batch, text, heads, dim = q_text.shape
    image = q_image.shape[1]
    inputs = (q_text, k_text, v_text, q_image, k_image, v_image)
    unit, in_unit = strides(*inputs, out_text, out_image)
    tiles = -(-text // config.block_m) + -(-image // config.block_m)
    run(
        _joint_attention_kernel,
        (tiles * batch * heads,),
        *inputs,
        text,
        image,
        heads,
        *(stride for of_tensor in in_unit for stride in of_tensor),
        out_text,
        out_image,
        **constants(dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL_TEXT=not known(text % config.block_n == 0),
        TAIL_IMAGE=not known(image % config.block_n == 0),
        UNIT=unit,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def check_joint(inputs: tuple[Tensor, ...], outs: tuple[Tensor, ...] = ()) -> None:
    """Refuse what is no joint attention.

    Raises:
        ValueError: shapes, dtypes, devices or a last stride do not fit.
    """
    text, image = inputs[:3], inputs[3:]
    check_attention(*text, *outs[:1])
    check_attention(*image, *outs[1:])
    for name, (q, k, *_) in (("text", text), ("image", image)):
        check(q.shape == k.shape, f"q and k of the {name} are {list(q.shape)} and {list(k.shape)}; they must be alike.")
    shapes = [[x[0].shape[i] for i in (0, 2, 3)] for x in (text, image)]
    check(
        shapes[0] == shapes[1] and text[0].dtype == image[0].dtype and text[0].device == image[0].device,
        f"Text has (batch, heads, head_dim) {shapes[0]} in {text[0].dtype} on {text[0].device}, image {shapes[1]} in "
        f"{image[0].dtype} on {image[0].device}; they must be the same.",
    )


@triton_op("fastsd::joint_attention", mutates_args={})
def joint_attention(
    q_text: Tensor, k_text: Tensor, v_text: Tensor, q_image: Tensor, k_image: Tensor, v_image: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of text and image together, without concatenation, in either order of the two.

    q, k and v of the text are [B, St, H, D], those of the image [B, Si, H, D], with any strides whose last is one; the
    results are [B, St, H, D] and [B, Si, H, D], contiguous. On CUDA as `attention`, by its own rows of the table.

    Raises:
        ValueError: shapes, dtypes, devices or a last stride do not fit.
    """
    inputs = (q_text, k_text, v_text, q_image, k_image, v_image)
    check_joint(inputs)
    config = choose(q_image, k_text.shape[1] + k_image.shape[1], "joint_attention")
    if config is None:
        return reference(*inputs)
    text, image = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for q in (q_text, q_image))
    launch(*inputs, text, image, config)
    return text, image


@triton_op("fastsd::joint_attention_out", mutates_args={"out_text", "out_image"})
def joint_attention_out(
    q_text: Tensor, k_text: Tensor, v_text: Tensor, q_image: Tensor, k_image: Tensor, v_image: Tensor,
    out_text: Tensor, out_image: Tensor,
) -> None:  # fmt: skip
    """As `joint_attention`, into `out_text` [B, St, H, D] and `out_image` [B, Si, H, D], which may be strided.

    Raises:
        ValueError: shapes, dtypes, devices or a last stride do not fit.
    """
    inputs = (q_text, k_text, v_text, q_image, k_image, v_image)
    check_joint(inputs, (out_text, out_image))
    config = choose(q_image, k_text.shape[1] + k_image.shape[1], "joint_attention")
    if config is None:
        text, image = reference(*inputs)
        out_text.copy_(text)
        out_image.copy_(image)
    else:
        launch(*inputs, out_text, out_image, config)


VARIANTS = variants(
    "joint_attention",
    _joint_attention_kernel,
    tuple(f"{x}_{stream}_ptr" for stream in STREAMS for x in ("q", "k", "v", "out")),
    (*STREAMS, "heads", *(f"{x}_{stream}_{dim}" for stream in STREAMS for x in "qkvo" for dim in "bsh")),
    ("TAIL_TEXT", "TAIL_IMAGE"),
)
