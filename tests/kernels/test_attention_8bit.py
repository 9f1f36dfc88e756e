"""`attention_int8` and `attention_fp8`: what they lose, kernels as interpreted, ops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels import aot, attention_8bit, configs, qk_norm_rope
from fastsd_kernels.attention_8bit import (
    attention_fp8,
    attention_fp8_out,
    attention_int8,
    attention_int8_out,
    launch,
    reference_fp8,
    reference_int8,
)
from fastsd_kernels.quantize_qkv import quantize_qk, quantize_qkv

NONE = (None, None, None)
SPOILED = [f"{value} in {part}" for value in ("nan", "inf") for part in "qkv"]


def inputs(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys and values of normal numbers, slices of a packed buffer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype).unbind(2)


def with_outliers(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """As in real models: keys with a large offset in common, values of channels of several orders, a few large tokens.

    Offsets are of 5 deviations in all channels and of 20 in some; one token in 100 has values 10 times as large.
    """
    q, k, v = (x.float() for x in inputs(batch, tokens, heads, dim, torch.float32, seed))
    generator = torch.Generator().manual_seed(seed + 100)
    offset = 5 * torch.randn(heads, dim, generator=generator)
    offset[:, ::16] *= 4
    v = v * torch.logspace(-1.5, 1.5, dim)[torch.randperm(dim, generator=generator)]
    v[:, 7::100] *= 10
    return q.to(dtype), (k + offset).to(dtype), v.to(dtype)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by definition, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1) @ v).transpose(1, 2)


def in_low_precision(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, float8: bool) -> Tensor:
    """As torch would, from what the numbers say: exact scores, weights in float8 or the dtype, and their product."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if not float8:
        return (scores.softmax(-1).to(dtype) @ v.to(dtype)).transpose(1, 2)
    weights = 448 * (scores - scores.amax(-1, keepdim=True)).exp()
    out = weights.to(torch.float8_e4m3fn).double() @ v / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(dtype)


def numbers(quantized: tuple[Tensor, ...], v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, tokens, heads, head_dim] that the quantised ones stand for, in float64."""
    quantized = tuple(x if x.dtype in (torch.int8, torch.float8_e4m3fn) else x.double() for x in quantized)
    q, k = attention_8bit._dequantized(*quantized[:5], lengths)
    if len(quantized) > 5:
        v = attention_8bit._values(*quantized[5:], lengths).transpose(1, 2)
    return q.transpose(1, 2) * (math.log(2) * math.sqrt(v.shape[3])), k.transpose(1, 2), v


def assert_near(out: Tensor, right: Tensor, cosine: float, relative: float) -> None:
    out, right = out.double().flatten(), right.flatten()
    assert torch.cosine_similarity(out, right, 0) > cosine
    assert (out - right).abs().mean() < relative * right.abs().mean()


# int8: a step is 1/127 of a block's largest number, some 3.7 deviations, so rounding adds an error of 0.0084 deviations
# to queries and to keys, and 0.012 to a score, whose deviation here is 1. That is then the relative error of the
# result, and half of its square what the cosine lacks: 7e-5. float8: e4m3 has 4 digits, so its rounding is off by 0.026
# in the mean square, for values and for weights: together with the scores 0.039, and 8e-4. The bounds leave half as
# much again of the error, and so twice what the cosine lacks, for few queries or keys and for large tokens.
BOUNDS = {False: (0.9998, 0.02), True: (0.998, 0.06)}


@pytest.mark.parametrize("float8", [False, True], ids=["int8", "fp8"])
@pytest.mark.parametrize("make", [inputs, with_outliers])
@pytest.mark.parametrize(("tokens", "dim"), [(333, 64), (130, 128), (77, 40), (77, 80), (77, 160)], ids=str)
def test_kernel_is_near_attention(interpret: Any, output: Any, tokens: int, dim: int, make: Any, float8: bool) -> None:
    q, k, v = make(1, tokens, 2, dim, torch.float16, 0)
    out = output(*q.shape, dtype=q.dtype)
    if float8:
        *quantized, v8, v_exponent, channels = quantize_qkv(q, k, v, *NONE)
        interpret(launch, *quantized, None, v8, v_exponent, channels, None, out)
    else:
        interpret(launch, *quantize_qk(q, k, *NONE), None, v, None, None, None, out)
    assert_near(out, exact(q, k, v), *BOUNDS[float8])


@pytest.mark.parametrize("float8", [False, True], ids=["int8", "fp8"])
def test_kernel_joins_text_and_image(interpret: Any, output: Any, float8: bool) -> None:
    """Whose keys have other offsets, which are subtracted apart, and whose values are of other orders."""
    image, text = (with_outliers(1, n, 2, 64, torch.float16, seed) for n, seed in ((130, 0), (77, 1)))
    text = (*text[:2], 30 * text[2])
    out = output(1, 207, 2, 64, dtype=torch.float16)
    if float8:
        *quantized, v8, v_exponent, channels = quantize_qkv(*image, *NONE, *text)
        interpret(launch, *quantized, None, v8, v_exponent, channels, out[:, :77], out[:, 77:])
    else:
        quantized = quantize_qk(*image[:2], *NONE, *text[:2])
        interpret(launch, *quantized, text[2], image[2], None, None, out[:, :77], out[:, 77:])
    assert_near(out, exact(*(torch.cat(pair, 1) for pair in zip(text, image, strict=True))), *BOUNDS[float8])


@pytest.mark.parametrize("make", [inputs, with_outliers])
def test_references_are_near_attention_at_the_length_of_sd3(make: Any) -> None:
    q, k, v = make(1, 4429, 1, 64, torch.bfloat16, 0)
    few = slice(-64, None)  # whole blocks of queries are quantised alike wherever they begin
    q8, k8, q_scale, *others = quantize_qkv(q, k, v, *NONE)
    assert q8.shape[2] == 4480
    right = exact(q[:, few], k, v)
    everything = reference_fp8(q8, k8, q_scale, *others, 4429)
    # Without a rounding of the weights a third of the square is left.
    assert_near(everything[:, few], right, 0.998, 0.045)
    assert_near(reference_int8(q8, k8, q_scale, *others[:2], v)[:, few], right, *BOUNDS[False])


def test_smoothing_removes_what_all_keys_share() -> None:
    q, k, v = inputs(1, 333, 2, 64, torch.float32)
    v = v.bfloat16()
    offset = 20 * torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    without, smooth = (reference_int8(*quantize_qk(q, x, *NONE), v) for x in (k, k + offset))
    right = exact(q, k, v)
    assert_near(smooth, right, *BOUNDS[False])
    errors = [(out.double() - right).abs().mean() for out in (without, smooth)]
    assert errors[1] < 1.05 * errors[0]  # the same steps, but for the part of the offset that is left


@pytest.fixture
def check_kernel(interpret: Any, output: Any, assert_exact: Any) -> Any:
    """Run the kernel on quantised tensors, and compare it with float64 of what those say."""

    def check(float8: bool, image: tuple[Tensor, ...], text: tuple[Tensor, ...] | None = None) -> None:
        quantized = quantize_qkv(*image, *NONE, *(text or ()))
        streams = [image] if text is None else [text, image]
        lengths = [stream[2].shape[1] for stream in streams]
        out = output(image[0].shape[0], sum(lengths), *image[0].shape[2:], dtype=image[0].dtype)
        out_text = None if text is None else out[:, : lengths[0]]
        out_image = out[:, -lengths[-1] :]
        if float8:
            interpret(launch, *quantized[:5], None, *quantized[5:], out_text, out_image)
        else:
            quantized = quantized[:5]
            interpret(launch, *quantized, text and text[2], image[2], None, None, out_text, out_image)
        meant = numbers(quantized, torch.cat([stream[2] for stream in streams], 1), lengths)
        assert_exact(out, exact(*meant), in_low_precision(*meant, out.dtype, float8))

    return check


@pytest.mark.parametrize("float8", [False, True], ids=["int8", "fp8"])
@pytest.mark.parametrize(
    ("dim", "text", "image"),
    [
        *((64, 0, 1), (64, 0, 64), (64, 0, 200), (128, 0, 77), (40, 0, 65), (80, 0, 130), (160, 0, 65)),
        *((64, 77, 65), (64, 64, 70), (64, 5, 64), (128, 130, 9), (80, 3, 3)),
    ],
    ids=str,
)
def test_kernel(check_kernel: Any, dim: int, text: int, image: int, float8: bool) -> None:
    streams = [inputs(2 if dim == 64 else 1, n, 2, dim, torch.float16, n) for n in (image, text)]
    check_kernel(float8, streams[0], streams[1] if text else None)


@pytest.mark.full
@pytest.mark.parametrize("float8", [False, True], ids=["int8", "fp8"])
def test_kernel_on_the_keys_of_sd3(interpret: Any, output: Any, float8: bool) -> None:
    image, text = inputs(1, 4096, 1, 64, torch.float16), inputs(1, 333, 1, 64, torch.float16, 1)
    out, out_text = output(1, 4096, 1, 64, dtype=torch.float16), output(1, 333, 1, 64, dtype=torch.float16)
    quantized = quantize_qkv(*image, *NONE, *text)
    values = (None, *quantized[5:]) if float8 else (text[2], image[2], None, None)
    interpret(launch, *quantized[:5], *values, out_text, out)
    right = exact(*(torch.cat(pair, 1) for pair in zip(text, image, strict=True)))
    assert_near(torch.cat([out_text, out], 1), right, *BOUNDS[float8])


@pytest.mark.parametrize("float8", [False, True], ids=["int8", "fp8"])
def test_kernel_on_any_strides_and_nothing_beyond_them(interpret: Any, float8: bool) -> None:
    image, text = inputs(2, 70, 3, 64, torch.float16), inputs(2, 9, 3, 64, torch.float16, 1)
    quantized = quantize_qkv(*image, *NONE, *text)
    more = (torch.full((2, x[2].shape[1], 5), math.nan).half() for x in (image, text))
    padded = (torch.cat([x[2].flatten(2), nan], 2) for x, nan in zip((image, text), more, strict=True))
    v, v_text = (x[..., :-5].unflatten(2, (3, 64)) for x in padded)
    values = [(None, *quantized[5:])] * 2 if float8 else [(text[2], image[2], None, None), (v_text, v, None, None)]
    plain, text_plain = torch.empty(2, 70, 3, 64).half(), torch.empty(2, 9, 3, 64).half()
    interpret(launch, *quantized[:5], *values[0], text_plain, plain)
    wide = torch.full((2, 90, 203), 7.0).half()
    out, out_text = (wide[:, rows, 3:195].unflatten(2, (3, 64)) for rows in (slice(15, 85), slice(2, 11)))
    interpret(launch, *quantized[:5], *values[1], out_text, out)
    assert torch.equal(out, plain) and torch.equal(out_text, text_plain)
    out[:], out_text[:] = 7, 7
    assert (wide == 7).all()


@pytest.mark.parametrize("float8", [False, True], ids=["int8", "fp8"])
@pytest.mark.parametrize("case", ["zeros", "equal keys", "no values", *SPOILED])
def test_extreme_values(interpret: Any, output: Any, case: str, float8: bool) -> None:
    q, k, v = (x.contiguous() for x in inputs(1, 150, 2, 64, torch.float16))
    if case == "zeros":
        q[:], k[:] = 0, 0
    elif case == "equal keys":
        k[:] = k.round()[:, :1].clone()  # whole numbers, whose mean is exact
    elif case == "no values":
        v[:, 64:128] = 0  # of a block, whose weights count
    else:
        {"q": q, "k": k, "v": v}[case[-1]][0, 70, 1, 2] = math.nan if "nan" in case else math.inf
    quantized = quantize_qkv(q, k, v, *NONE)
    out = output(*q.shape, dtype=q.dtype)
    values = quantized[5:] if float8 else (v, None, None)
    interpret(launch, *quantized[:5], None, *values, None, out)
    spoiled = torch.zeros_like(v, dtype=torch.bool)
    if " in " in case:
        spoiled[:, slice(64, 128) if case[-1] == "q" else slice(None), 1] = True  # its block, or its head
        if case[-1] == "v" and not float8:
            spoiled[:, :, 1] = False
            spoiled[:, :, 1, 2] = True
    bad = ~out.isfinite()
    assert torch.equal(bad, spoiled)
    if case in ("zeros", "equal keys", "no values"):
        right = reference_fp8(*quantized, 150, dtype=torch.float16) if float8 else reference_int8(*quantized[:5], v)
        # Weights are equal, and so exact, in the first two.
        assert_near(out, right.double(), 0.998, 0.045)
        if case != "no values":
            torch.testing.assert_close(out, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64), (2, 5, 0, 64)], ids=str)
def test_nothing_to_attend(interpret: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).half()
    quantized = quantize_qkv(x, x, x, *NONE)
    assert attention_fp8(*quantized, shape[1]).shape == attention_int8(*quantized[:5], x).shape == shape
    interpret(launch, *quantized[:5], None, *quantized[5:], None, torch.empty(shape).half())


def test_ops(check_op: Any) -> None:
    image, text = (inputs(2, n, 2, 64, torch.bfloat16, n) for n in (70, 9))
    one, joint = quantize_qkv(*image, *NONE), quantize_qkv(*image, *NONE, *text)
    check_op(attention_fp8, *one, 70)
    check_op(attention_int8, *joint[:5], image[2], text[2])
    out = torch.zeros(2, 79, 4, 64, dtype=torch.bfloat16)[:, :, 1:3]
    check_op(attention_fp8_out, *joint, out[:, 9:].clone(), out[:, :9].clone())
    check_op(attention_int8_out, *joint[:5], image[2], out[:, 9:].clone(), text[2], out[:, :9].clone())


def test_one_stream_into_a_tensor() -> None:
    q, k, v = inputs(1, 70, 2, 64, torch.bfloat16)
    quantized = quantize_qkv(q, k, v, *NONE)
    out8, out = (torch.full_like(v, math.nan) for _ in range(2))
    attention_fp8_out(*quantized, out8, None)
    attention_int8_out(*quantized[:5], v, out, None, None)
    assert torch.equal(out8, attention_fp8(*quantized, 70)) and torch.equal(out, attention_int8(*quantized[:5], v))


def test_ops_are_the_joint_attention_of_flux() -> None:
    generator = torch.Generator().manual_seed(4)
    weights = (1 + torch.randn(4, 128, generator=generator) / 4).bfloat16()
    angle = 10 * torch.rand(77, 64, generator=generator)
    rotary = torch.stack([angle.cos(), angle.sin()])
    image, text = (inputs(1, n, 2, 128, torch.bfloat16, n) for n in (65, 12))
    image_too, text_too = ((*weights[:2], rotary[:, 12:]), (*weights[2:], rotary[:, :12]))
    whole = []
    for stream, arguments in ((text, text_too), (image, image_too)):
        normed = torch.stack(stream, 2).double()
        qk_norm_rope.reference(normed, *arguments)
        whole.append(normed)
    right = exact(*torch.cat(whole, 1).unbind(2))
    quantized = quantize_qkv(*image, *image_too, *text, *text_too)
    assert_near(attention_fp8(*quantized, 65, 12), right, 0.998, 0.045)
    assert_near(attention_int8(*quantized[:5], image[2], text[2]), right, *BOUNDS[False])


def test_launch_on_a_gpu(launches: Any) -> None:
    image, text = (inputs(2, n, 3, 128, torch.bfloat16) for n in (333, 77))
    quantized = quantize_qkv(*image, *NONE, *text)
    (call,) = launches(attention_fp8, *quantized, 333, 77)
    assert (call.kernel, call.grid) == ("_attention_8bit_kernel", (4 * 6, 1, 1))
    assert call.written == {"out_ptr", "out_text_ptr"} and call.arguments["FLOAT8"] and call.arguments["JOINT"]
    (call,) = launches(attention_int8, *quantize_qk(*image[:2], *NONE), image[2])
    assert not call.arguments["FLOAT8"] and not call.arguments["JOINT"] and call.arguments["TAIL"]
    assert (call.arguments["v_s"], call.arguments["o_s"]) == (9 * 16, 3 * 16)
    out, out_text = (torch.zeros(2, n, 500, dtype=torch.bfloat16)[..., :384].unflatten(-1, (3, 128)) for n in (333, 77))
    (call,) = launches(attention_fp8_out, *quantized, out, out_text)
    assert (call.arguments["o_s"], call.arguments["UNIT"]) == (500, 1)  # 500 is no multiple of 8
    # Of sizes unknown, as `torch.compile` traces them.
    assert len(launches(attention_fp8_out, *quantized, out, out_text, dynamic=True)) == 1
    assert len(launches(attention_int8, *quantized[:5], image[2], text[2], dynamic=True)) == 1


def test_float8_needs_a_chip_that_has_it(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "has_float8", lambda device: False)
    q, k, v = inputs(1, 70, 2, 64, torch.bfloat16)
    quantized = quantize_qkv(q, k, v, *NONE)
    with pytest.raises(ValueError, match=r"no float8, which needs compute capability 8\.9; use .*attention_int8"):
        launches(attention_fp8, *quantized, 70)
    with pytest.raises(ValueError, match="no float8"):
        launches(attention_fp8_out, *quantized, torch.empty_like(q), None)
    assert len(launches(attention_int8, *quantized[:5], v)) == 1


X = torch.zeros(2, 70, 3, 64).half()
Q = quantize_qkv(X, X, X, *NONE)
NO_TEXT = {"v_text": None, "out_text": None}
NAMES = ("q8", "k8", "q_scale", "k_scale", "means", "v8", "v_exponent", "channels")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q8": Q[0].half()}, "q8 is torch.float16; it must be torch.int8"),
        ({"k8": Q[1][:, :, :64]}, "k8 is [2, 3, 64, 64]; for streams of [70] tokens it must be [2, 3, 128, 64]"),
        ({"k_scale": Q[3].to("meta")}, "k_scale is on meta but q8 on cpu"),
        ({"q_scale": Q[2].mT.contiguous().mT}, "q_scale has strides [6, 1, 3]; it must be contiguous"),
        ({"means": Q[4][0]}, "means has 3 dimensions; it must be [batch, heads, streams, head_dim]"),
        ({"means": Q[4][..., :48]}, "means has the head dimension 48; it must be one of 40, 64, 80, 128, 160"),
        ({"v8": Q[5].half()}, "v8 is torch.float16; it must be torch.float8_e4m3fn"),
        ({"channels": Q[7].double()}, "channels is torch.float64; it must be torch.float32"),
        ({"tokens": 200}, "q8 is [2, 3, 128, 64]; for streams of [200] tokens it must be [2, 3, 256, 64]"),
        ({"text": 3}, "for streams of [3, 70] tokens"),
        ({"dtype": torch.float32}, "The dtype is torch.float32; it must be torch.bfloat16 or torch.float16"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_refusals_of_float8(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        attention_fp8(**{**dict(zip(NAMES, Q, strict=True)), "tokens": 70, **change})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": X[:, :9]}, "q8 is [2, 3, 128, 64]; for streams of [9] tokens it must be [2, 3, 64, 64]"),
        ({"v": X.float()}, "The dtype is torch.float32; it must be torch.bfloat16 or torch.float16"),
        ({"v": X.repeat(1, 1, 1, 2)[..., ::2]}, "v has stride 2 in its last dimension; it must be 1"),
        ({"v": X[:, :, :2]}, "v is [2, 70, 2, 64]; it must be [2, 70, 3, 64]"),
        ({"out": X[:, :9]}, "out is [2, 9, 3, 64]; it must be [2, 70, 3, 64]"),
        ({"out": X.bfloat16()}, "out is torch.bfloat16; it must be torch.float16"),
        ({"out": X.to("meta")}, "out is on meta but q8 on cpu"),
        ({"out_text": X}, "Only out_text is given; with a text it must be v_text and out_text"),
        ({"v_text": X}, "q8 is [2, 3, 128, 64]; for streams of [70, 70] tokens"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_refusals_of_int8(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        attention_int8_out(**{**dict(zip(NAMES, Q[:5], strict=False)), **NO_TEXT, "v": X, "out": X.clone(), **change})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("form", "arch", "units"),
    [
        ("int8-64-bf16-joint-tail", 80, {"IMMA", "HMMA"}),
        ("fp8-64-bf16-joint-tail", 89, {"IMMA", "QMMA"}),
        ("fp8-128-bf16", 90, {"IGMMA", "QGMMA", "HMMA"}),  # the last adds up the weights
    ],
)
def test_tensor_cores_of_eight_bits_compute_it(form: str, arch: int, units: set[str]) -> None:
    (variant,) = (v for v in attention_8bit.VARIANTS if v.name == form)
    report = aot.compile_variant("attention_8bit", variant, arch)
    assert not report.failures and set(report.mma) == units
