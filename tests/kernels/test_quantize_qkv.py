"""`quantize_qkv` and `quantize_qk`: references, the kernel as interpreted, ops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels import configs, qk_norm_rope
from fastsd_kernels.quantize_qkv import (
    BLOCK,
    COLUMNS,
    MOST,
    ORDER,
    ROWS,
    launch,
    quantize_qk,
    quantize_qkv,
    reference,
    spread,
)

NONE = (None, None, None)
SPOILED = [f"{value} in {part}" for value in ("nan", "inf") for part in "qkv"]
F8 = torch.float8_e4m3fn
LAYOUTS = (torch.int8, torch.int8, torch.float32, torch.float32, torch.float32, F8, torch.float32, torch.float32)


def inputs(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Packed queries, keys and values: channels of keys with offsets, and values of channels of several orders."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
    x[:, :, 1] += 2 * torch.randn(heads, dim, generator=generator)
    x[:, :, 2] *= torch.logspace(-1, 1, dim)
    return x.to(dtype)


def prologue(tokens: int, dim: int, dtype: torch.dtype, form: str = "norm and rotation") -> tuple[Tensor | None, ...]:
    """Weights of the norms, and the rotations of some of more tokens."""
    generator = torch.Generator().manual_seed(1)
    q_weight, k_weight = (1 + torch.randn(2, dim, generator=generator) / 4).to(dtype)
    angle = 10 * torch.rand(tokens + 5, dim // 2, generator=generator)
    rotary = torch.stack([angle.cos(), angle.sin()])[:, 3 : 3 + tokens]
    weights = (q_weight, k_weight) if "norm" in form else (None, None)
    return *weights, rotary if "rotation" in form else None


def dequantized(results: tuple[Tensor, ...], tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, S, H, D] of one stream as their numbers say, and the steps of the former two."""
    q8, k8, q_scale, k_scale, means, v8, v_exponent, channels = (x.double() for x in results)
    q_scale = q_scale * (math.sqrt(dim) / math.log2(math.e))
    q_step, k_step = (x.repeat_interleave(BLOCK, 2)[..., None].expand_as(q8) for x in (q_scale, k_scale))
    v = torch.empty_like(v8)
    for place, token in enumerate(ORDER):  # of every 16
        v[..., token::16] = v8[..., place::16]
    v = v.transpose(2, 3)[..., :dim] * v_exponent.exp2().repeat_interleave(BLOCK, 2)[..., None] * channels
    parts = (q8 * q_step, k8 * k_step + torch.nn.functional.pad(means, (0, q8.shape[3] - dim)), v, q_step, k_step)
    return tuple(x[:, :, :tokens, :dim].transpose(1, 2) for x in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", COLUMNS)
def test_reference_quantizes_what_the_norm_gives(dim: int, dtype: torch.dtype) -> None:
    qkv, (q_weight, k_weight, rotary) = inputs(2, 130, 3, dim, dtype), prologue(130, dim, dtype)
    results = reference(*qkv.unbind(2), q_weight, k_weight, rotary)
    assert tuple(x.dtype for x in results) == LAYOUTS and all(x.is_contiguous() for x in results)
    assert results[0].shape == (2, 3, 192, sum(COLUMNS[dim])) and results[5].shape == (2, 3, sum(ROWS[dim]), 192)
    normed = qkv.double()
    assert q_weight is not None and k_weight is not None
    qk_norm_rope.reference(normed, q_weight.double(), k_weight.double(), rotary)
    *found, q_step, k_step = dequantized(results, 130, dim)
    q, k, v = normed.unbind(2)
    for numbers in results[:2]:  # the largest number of a block is 127 steps; beyond tokens and channels are zeros
        assert (numbers.unflatten(2, (3, BLOCK)).int().abs().amax((3, 4)) == MOST).all()
        assert not numbers[:, :, 130:].any() and not numbers[..., dim:].any()
    # Half a step; a thousandth more since float32 differs from float64.
    assert ((found[0] - q).abs() <= 0.5005 * q_step).all() and ((found[1] - k).abs() <= 0.5005 * k_step).all()
    # e4m3 rounds to 4 digits, so by a 16th at most; 2^-10 of a scale where numbers are subnormal.
    scale = (results[6].double().exp2().amax(2)[:, :, None] * results[7][:, :, 0].double())[:, None]
    assert ((found[2] - v).abs() <= 1.001 * torch.maximum(v.abs() / 16, scale * 2.0**-10)).all()


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 333, 4096, 4429, 100_000])
def test_spread_tokens(tokens: int) -> None:
    some = spread(tokens)
    assert len(some) == BLOCK and some.min() >= 0 and some.max() < tokens and (some.diff() >= 0).all()
    distinct = len(some.unique())
    assert distinct == BLOCK if tokens >= 2 * BLOCK else distinct >= 2 / 3 * min(tokens, BLOCK)
    if tokens == 4096:  # of an image of 64 by 64, one of every row and of every column
        assert len((some // 64).unique()) == len((some % 64).unique()) == 64


def test_what_is_subtracted_is_nearly_the_mean() -> None:
    qkv = inputs(1, 4096, 2, 64, torch.float32)
    k = qkv[:, :, 1] + 20 * torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    means = reference(qkv[:, :, 0], k, None, *NONE)[4]
    # The mean of 64 keys is off by 1/8 of their deviation; 5 times that for the worst of 128 channels.
    assert (means[:, :, 0] - k.mean(1)).abs().max() < 5 / 8


def test_channels_of_all_orders_and_dead_ones() -> None:
    v = torch.randn(1, 333, 1, 64, generator=torch.Generator().manual_seed(3)).double()
    v *= torch.logspace(-6, 6, 64)
    v[..., 7] = 0
    v[0, 100, :, 7] = 1000.0  # a channel of which the spread tokens know nothing
    v[0, 200] *= 300  # a token that is far beyond all others
    results = reference(v, v, v, *NONE)
    channels, exponents = results[7][0, 0, 0].double(), results[6][0, 0].double()
    # Channels below 2^-8 of the largest share its scale, the others have their own.
    assert channels.min() == channels.max() / 256 and (channels > channels.min()).sum() > 10
    # The token has its block scaled down: 300 / 448 times a few deviations, so by some powers of two and no more.
    assert (exponents.diff().abs() > 4).sum() == 2 and exponents.argmax() == 200 // BLOCK
    step = exponents.exp2().repeat_interleave(BLOCK)[:333, None] * channels * 2.0**-10  # where numbers are subnormal
    error = (dequantized(results, 333, 64)[2] - v)[0, :, 0].abs()
    assert (error <= 1.001 * torch.maximum(v[0, :, 0].abs() / 16, step)).all()


Stream = tuple[Tensor | None, ...]


def quantized(interpret: Any, output: Any, *streams: Stream) -> tuple[Tensor, ...]:
    """What the kernel gives, into guarded contiguous outputs that were NaN."""
    blocks = [-(-stream[0].shape[1] // BLOCK) for stream in streams]  # type: ignore[union-attr]
    batch, _, heads, dim = streams[0][0].shape  # type: ignore[union-attr]
    numbers, scales = (batch, heads, sum(blocks) * BLOCK, sum(COLUMNS[dim])), (batch, heads, sum(blocks))
    of_stream = (batch, heads, len(streams), dim)
    shapes = [numbers, numbers, scales, scales, of_stream]
    if streams[0][2] is not None:
        shapes += [(batch, heads, sum(ROWS[dim]), sum(blocks) * BLOCK), scales, of_stream]
    results = tuple(output(math.prod(s), dtype=t).view(s) for s, t in zip(shapes, LAYOUTS, strict=False))
    for side, stream in enumerate(streams):
        interpret(launch, *stream, 1e-6, sum(blocks[:side]), side, results)
    return results


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Integers differ by one at most, where float32 in another order of summation falls beyond a half; float8 too."""
    assert len(results) == len(expected)
    for result, right in zip(results, expected, strict=True):
        if result.dtype == torch.float32:
            # Sums of up to 160 squares and 64 keys in float32; means are those of numbers of both signs.
            torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-5, equal_nan=True)
        elif result.numel():
            steps = [x.view(torch.int8).int() for x in (result, right)]
            difference = (steps[0] - steps[1]).abs()
            assert difference.max() <= 1 and difference.double().mean() < 1e-3


@pytest.mark.parametrize(
    ("tokens", "dim", "form", "dtype"),
    [
        (333, 64, "norm", torch.bfloat16),
        (130, 128, "norm and rotation", torch.bfloat16),
        (77, 128, "norm and rotation", torch.float16),
        (64, 64, "rotation", torch.float32),
        (1, 64, "neither", torch.float16),
        (65, 40, "neither", torch.float16),
        (5, 80, "norm and rotation", torch.float16),
        (77, 160, "norm and rotation", torch.bfloat16),
    ],
    ids=str,
)
def test_kernel(interpret: Any, output: Any, tokens: int, dim: int, form: str, dtype: torch.dtype) -> None:
    stream = (*inputs(1, tokens, 2, dim, dtype).unbind(2), *prologue(tokens, dim, dtype, form))
    results = quantized(interpret, output, stream)
    assert_same(results, reference(*stream))
    without = quantized(interpret, output, (*stream[:2], None, *stream[3:]))
    assert all(torch.equal(*pair) for pair in zip(without, results, strict=False))


def test_kernel_for_text_and_image(interpret: Any, output: Any) -> None:
    """Each with norms of its own, into the same buffers: as one after the other."""
    image = (*inputs(2, 70, 2, 64, torch.float16).unbind(2), *prologue(70, 64, torch.float16, "norm"))
    text = (*inputs(2, 9, 2, 64, torch.float16, seed=5).unbind(2), *prologue(9, 64, torch.float16)[1::-1], None)
    joint = quantized(interpret, output, text, image)
    apart = [quantized(interpret, output, stream) for stream in (text, image)]
    for i, (result, *parts) in enumerate(zip(joint, *apart, strict=True)):
        assert torch.equal(result.view(torch.uint8), torch.cat(parts, 3 if i == 5 else 2).view(torch.uint8))
    assert_same(joint, quantize_qkv(*image, *text))


def test_kernel_reads_any_strides_and_nothing_beyond_the_tokens(interpret: Any, output: Any) -> None:
    qkv, arguments = inputs(2, 70, 2, 64, torch.float16), prologue(70, 64, torch.float16)
    first = quantized(interpret, output, (*qkv.unbind(2), *arguments))
    poisoned = torch.cat([qkv, torch.full((2, 58, 3, 2, 64), math.nan).half()], 1)[:, :70]
    odd = torch.cat([poisoned.flatten(2), torch.full((2, 70, 5), math.nan).half()], 2)[..., :-5]
    for q, k, v in (poisoned.unbind(2), odd.unflatten(2, (3, 2, 64)).unbind(2)):
        again = quantized(interpret, output, (q, k, v, *arguments))
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("case", ["zeros", "equal", "tiny", "huge", *SPOILED])
def test_extreme_values(interpret: Any, output: Any, case: str) -> None:
    q, k, v = (x.contiguous() for x in inputs(1, 150, 2, 64, torch.float32).unbind(2))
    parts = {"q": q, "k": k, "v": v}
    if case in ("zeros", "tiny", "huge"):
        for x in parts.values():
            x[:] = 0
            x[:, ::2, :, 0] = {"zeros": 0.0, "tiny": 1e-36, "huge": 1e30}[case]
    elif case == "equal":
        k[:] = k.round()[:, :1].clone()  # whole numbers, whose mean is exact
    else:
        parts[case[-1]][0, 70, 1, 2] = math.nan if "nan" in case else -math.inf
    expected = reference(q, k, v, *NONE)
    results = quantized(interpret, output, (q, k, v, *NONE))
    assert_same(results, expected)
    for name, scale in zip("qkv", (results[2], results[3], results[6]), strict=True):
        spoiled = torch.zeros_like(scale, dtype=torch.bool)
        spoiled[0, 1, 1] = case[-2:] == f" {name}"  # its block
        if name == "k" and spoiled.any():  # and all of its head where it is one of the spread tokens
            spoiled[0, 1] = True
        assert torch.equal(scale.isnan(), spoiled)
    if case in ("zeros", "equal", "tiny"):
        assert not results[1].any() and (results[3] == 1).all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64), (2, 5, 0, 64)], ids=str)
def test_nothing_to_quantize(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).half()
    assert [y.numel() for y in quantize_qkv(x, x, x, *NONE)[:4]] == [0, 0, 0, 0]


def test_ops(check_op: Any) -> None:
    image = (*inputs(2, 70, 2, 64, torch.bfloat16).unbind(2), *prologue(70, 64, torch.bfloat16))
    text = (*inputs(2, 9, 2, 64, torch.bfloat16).unbind(2), *prologue(9, 64, torch.bfloat16, "norm"))
    check_op(quantize_qkv, *image, *text)
    check_op(quantize_qk, *image[:2], *image[3:])


def test_launch_on_a_gpu(launches: Any) -> None:
    image = (*inputs(2, 333, 3, 128, torch.bfloat16).unbind(2), *prologue(333, 128, torch.bfloat16))
    text = (*inputs(2, 77, 3, 128, torch.bfloat16).unbind(2), *prologue(77, 128, torch.bfloat16, "norm"))
    (call,) = launches(quantize_qk, *image[:2], *image[3:])
    assert (call.kernel, call.grid) == ("_quantize_kernel", (6, 6, 1))
    assert call.written == {"q8", "k8", "q_scale", "k_scale", "means"} and not call.arguments["VALUES"]
    assert (call.arguments["UNIT"], call.arguments["q_s"], call.arguments["k_h"]) == (8, 9 * 16, 16)
    first, second = launches(quantize_qkv, *image, *text)  # one pass for each stream
    assert (first.grid, second.grid) == ((2, 6, 1), (6, 6, 1))
    assert first.written == {"q8", "k8", "q_scale", "k_scale", "means", "v8", "v_exponent", "channels"}
    assert [call.arguments["first"] for call in (first, second)] == [0, 2] and first.arguments["blocks"] == 8
    assert [call.arguments["ROTATE"] for call in (first, second)] == [False, True]
    # Of sizes unknown, as `torch.compile` traces them.
    assert len(launches(quantize_qkv, *image, *text, dynamic=True)) == 2


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)], ids=str)
def test_float8_needs_a_chip_that_has_it(
    launches: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(configs, "has_float8", lambda device: capability >= (8, 9))
    q, k, v = inputs(1, 70, 2, 64, torch.bfloat16).unbind(2)
    assert len(launches(quantize_qk, q, k, *NONE)) == 1
    if capability >= (8, 9):
        assert len(launches(quantize_qkv, q, k, v, *NONE)) == 1
    else:
        with pytest.raises(ValueError, match=r"no float8, which needs compute capability 8\.9; use quantize_qk"):
            launches(quantize_qkv, q, k, v, *NONE)


X = torch.zeros(2, 70, 3, 64).half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X[0]}, "q has 3 dimensions; it must be [batch, tokens, heads, head_dim]"),
        ({"q": X[..., :48]}, "q has the head dimension 48; it must be one of 40, 64, 80, 128, 160"),
        ({"k": X.mT.contiguous().mT}, "k has stride 3 in its last dimension; it must be 1"),
        ({"k": X.float()}, "k is torch.float32; it must be torch.float16"),
        ({"v": X[:, :9]}, "v is [2, 9, 3, 64]; it must be [2, 70, 3, 64]"),
        ({"v": X.to("meta")}, "v is on meta but q on cpu"),
        ({"q_weight": torch.ones(64)}, "Only one of q_weight and k_weight is given; it must be both or none"),
        ({"q_weight": torch.ones(8), "k_weight": torch.ones(64)}, "q_weight is [8]; it must be [64]"),
        ({"rotary": torch.ones(2, 70, 32).half()}, "rotary is torch.float16; it must be torch.float32"),
        ({"rotary": torch.ones(2, 70, 64)}, "rotary is [2, 70, 64]; it must be [2, 70, 32]"),
        ({"k_text": X}, "There is no q_text; then there must be nothing else of the text"),
        ({"q_text": X}, "k_text is missing; it must be [2, 70, 3, 64]"),
        ({"q_text": X, "k_text": X}, "v_text is missing; it must be [2, 70, 3, 64]"),
        ({"q_text": X, "k_text": X, "v_text": X[:, :9]}, "v_text is [2, 9, 3, 64]; it must be [2, 70, 3, 64]"),
        (dict.fromkeys(("q_text", "k_text", "v_text"), X[:, :, :2]), "q_text has (batch, heads, head_dim) [2, 2, 64]"),
        (dict.fromkeys(("q_text", "k_text", "v_text"), X.float()), "q_text is torch.float32; it must be torch.float16"),
        (dict.fromkeys(("q_text", "k_text", "v_text"), X[:, :0]), "q_text has no tokens; without a text it must"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_refusals(change: dict[str, Any], message: str) -> None:
    right = {"q": X, "k": X, "v": X, "q_weight": None, "k_weight": None, "rotary": None}
    with pytest.raises(ValueError) as raised:
        quantize_qkv(**{**right, **change})
    assert message in str(raised.value)
