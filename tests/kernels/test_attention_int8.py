"""`attention_int8` and the quantisation in front of it: references, kernels as interpreted, ops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels import aot, attention_int8, qk_norm_rope
from fastsd_kernels.attention_int8 import (
    BLOCK,
    CHUNK,
    MOST,
    attention_int8_out,
    launch,
    launch_quantize,
    quantize_blocks,
    quantize_qk,
    reference,
    reference_quantize,
)

NONE = (None, None, None)


def inputs(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, offset: float = 2.0) -> Tensor:
    """Packed queries, keys and values, whose channels have offsets in common, as those of real models."""
    generator = torch.Generator().manual_seed(0)
    common = offset * torch.randn(3, heads, dim, generator=generator)
    common[2] = 0
    return (torch.randn(batch, tokens, 3, heads, dim, generator=generator) + common).to(dtype)


def prologue(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the norms, and the rotations of some of more tokens."""
    generator = torch.Generator().manual_seed(1)
    q_weight, k_weight = (1 + torch.randn(2, dim, generator=generator) / 4).to(dtype)
    angle = 10 * torch.rand(tokens + 5, dim // 2, generator=generator)
    return q_weight, k_weight, torch.stack([angle.cos(), angle.sin()])[:, 3 : 3 + tokens]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by definition, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1) @ v).transpose(1, 2)


def error(q: Tensor, k: Tensor, v: Tensor, smooth: bool = True) -> tuple[float, float]:
    """Cosine to the exact attention, and mean error relative to its mean magnitude."""
    q8, k8, q_scale, k_scale = reference_quantize(q, k, *NONE)
    if not smooth:
        k8, k_scale = quantize_blocks(k.double())
    out, right = reference(q8, k8, q_scale, k_scale, v.double()).flatten(), exact(q, k, v).flatten()
    return torch.cosine_similarity(out, right, 0).item(), ((out - right).abs().mean() / right.abs().mean()).item()


def dequantized(numbers: Tensor, scale: Tensor) -> Tensor:
    per_token = scale.double().repeat_interleave(BLOCK, 2)[:, :, : numbers.shape[1]]
    return numbers.double() * per_token.transpose(1, 2)[..., None]


# A step is 1/127 of a block's largest number, some 3.7 deviations, so rounding adds an error of 0.0084 deviations to
# queries and to keys, and 0.012 to a score, whose deviation here is 1. That is then the relative error of the result,
# and half of its square what the cosine lacks: 7e-5. The bounds leave twice as much, for few queries or keys.
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(333, 333), (65, 1109), (77, 5)], ids=str)
def test_reference_is_near_attention(dim: int, queries: int, keys: int) -> None:
    q, k, v = inputs(1, max(queries, keys), 2, dim, torch.float32, offset=0).unbind(2)
    cosine, relative = error(q[:, :queries], k[:, :keys], v[:, :keys])
    assert cosine > 0.9997 and relative < 0.025


@pytest.mark.parametrize("dim", [64, 128])
def test_smoothing_removes_what_all_keys_share(dim: int) -> None:
    q, k, v = inputs(1, 333, 2, dim, torch.float32, offset=0).unbind(2)
    without = error(q, k, v)
    k = k + 20 * torch.randn(1, 1, 2, dim, generator=torch.Generator().manual_seed(2))
    smooth, rough = error(q, k, v), error(q, k, v, smooth=False)
    assert smooth[0] > 0.9997 and smooth[1] < 0.025
    # float32 differs by roundings of the larger numbers: a few boundaries of int8 are crossed.
    assert smooth[1] == pytest.approx(without[1], rel=0.02)
    assert rough[1] > 5 * smooth[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_reference_quantizes_what_the_norm_gives(dtype: torch.dtype) -> None:
    qkv, (q_weight, k_weight, rotary) = inputs(2, 130, 3, 64, dtype), prologue(130, 64, dtype)
    q8, k8, q_scale, k_scale = reference_quantize(qkv[:, :, 0], qkv[:, :, 1], q_weight, k_weight, rotary)
    normed = qkv.double()
    qk_norm_rope.reference(normed, q_weight.double(), k_weight.double(), rotary)
    q, k, _ = normed.unbind(2)
    k = k - k.mean(1, keepdim=True)
    for numbers, scale, right in ((q8, q_scale * (math.sqrt(64) / math.log2(math.e)), q), (k8, k_scale, k)):
        assert numbers.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (2, 3, 3)
        assert numbers.is_contiguous() and scale.is_contiguous()
        for first in range(0, 130, BLOCK):  # the largest number of a block is 127 steps
            assert (numbers[:, first : first + BLOCK].int().abs().amax((1, 3)) == MOST).all()
        # Half a step; a thousandth more since float32 differs from float64.
        step = dequantized(torch.ones_like(numbers), scale)
        assert ((dequantized(numbers, scale) - right).abs() <= 0.5005 * step).all()


def quantized(
    interpret: Any, output: Any, q: Tensor, k: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels give, into guarded contiguous outputs."""

    def guarded(shape: Any, dtype: torch.dtype) -> Tensor:
        out: Tensor = output(math.prod(shape), dtype=dtype)
        return out.view(shape)

    sums = guarded((*attention_int8._blocks(k, BLOCK * CHUNK), k.shape[3]), torch.float32)
    q8, k8 = (guarded(x.shape, torch.int8) for x in (q, k))
    q_scale, k_scale = (guarded(attention_int8._blocks(x), torch.float32) for x in (q, k))
    interpret(launch_quantize, q, k, *arguments, 1e-6, sums, q8, k8, q_scale, k_scale)
    return q8, k8, q_scale, k_scale


def assert_same_quantization(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Integers differ by at most one, where float32 in another order of summation falls on the other side of a half."""
    for result, right in zip(results[:2], expected[:2], strict=True):
        difference = (result.int() - right.int()).abs()
        assert difference.numel() == 0 or (difference.max() <= 1 and difference.double().mean() < 1e-3)
    # Sums of 64 or 128 squares and of some hundred keys in float32.
    torch.testing.assert_close(results[2:], expected[2:], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["norm and rotation", "norm", "rotation", "neither"])
@pytest.mark.parametrize(("tokens", "dim"), [(333, 64), (77, 128)], ids=str)
def test_quantization_kernel(interpret: Any, output: Any, tokens: int, dim: int, form: str, dtype: torch.dtype) -> None:
    qkv, (q_weight, k_weight, rotary) = inputs(2, tokens, 2, dim, dtype), prologue(tokens, dim, dtype)
    weights = (q_weight, k_weight) if "norm" in form else (None, None)
    arguments = (*qkv.unbind(2)[:2], *weights, rotary if "rotation" in form else None)
    assert_same_quantization(quantized(interpret, output, *arguments), reference_quantize(*arguments))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 200), (200, 1), (64, 128)], ids=str)
def test_quantization_kernel_on_lengths_of_their_own(interpret: Any, output: Any, queries: int, keys: int) -> None:
    qkv = inputs(1, 200, 3, 64, torch.float16)
    q, k = qkv[:, :queries, 0], qkv[:, :keys, 1]
    assert_same_quantization(quantized(interpret, output, q, k, *NONE), reference_quantize(q, k, *NONE))


def test_quantization_does_not_read_beyond_the_tokens(interpret: Any, output: Any) -> None:
    qkv, arguments = inputs(1, 70, 2, 64, torch.float16), prologue(70, 64, torch.float16)
    poisoned = torch.cat([qkv, torch.full((1, 58, 3, 2, 64), math.nan).half()], 1)[:, :70]
    first, second = (quantized(interpret, output, *x.unbind(2)[:2], *arguments) for x in (qkv, poisoned))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def in_low_precision(q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor) -> Tensor:
    """As torch would: the same scores, and then weights and their product in the dtype of the values."""
    q, k = (dequantized(*x).transpose(1, 2) for x in ((q8, q_scale), (k8, k_scale)))
    weights = (q @ k.transpose(2, 3) * math.log(2)).softmax(-1).to(v.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


@pytest.fixture
def check_kernel(interpret: Any, output: Any, assert_exact: Any) -> Any:
    """Run the attention kernel on quantised q and k, and compare."""

    def check(q: Tensor, k: Tensor, v: Tensor) -> None:
        arguments = (*reference_quantize(q, k, *NONE), v)
        out = output(*q.shape, dtype=v.dtype)
        interpret(launch, *arguments, out)
        assert_exact(out, reference(*arguments[:4], v.double()), in_low_precision(*arguments))

    return check


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (77, 333), (333, 77), (130, 65), (64, 128), (200, 64)], ids=str)
def test_kernel(check_kernel: Any, dim: int, queries: int, keys: int) -> None:
    q, k, v = inputs(2, max(queries, keys), 2, dim, torch.float16).unbind(2)
    check_kernel(q[:, :queries], k[:, :keys], v[:, :keys])


def test_kernel_on_the_keys_of_sd3(check_kernel: Any) -> None:
    q, k, v = inputs(1, 4429, 2, 64, torch.float16).unbind(2)
    check_kernel(q[:, -65:], k, v)


def test_kernel_on_any_strides(interpret: Any, assert_exact: Any) -> None:
    q, k, v = inputs(2, 70, 3, 64, torch.float16).unbind(2)
    q8, k8, q_scale, k_scale = reference_quantize(q, k, *NONE)
    q8 = q8.transpose(1, 2).contiguous().transpose(1, 2)
    k8 = k8.repeat_interleave(2, 1)[:, ::2]
    v = torch.cat([v.flatten(2), torch.full((2, 70, 5), math.nan).half()], 2)[..., :-5].unflatten(2, (3, 64))
    out = torch.full((2, 70, 203), math.nan).half()[..., 3:195].unflatten(2, (3, 64))
    numbers = (q8, k8, q_scale, k_scale)
    interpret(launch, *numbers, v, out)
    assert_exact(out, reference(*numbers, v.double()), in_low_precision(*numbers, v))


def test_kernel_does_not_read_beyond_the_tokens(interpret: Any) -> None:
    q, k, v = inputs(1, 70, 2, 64, torch.float16).unbind(2)
    q8, k8, *scales = reference_quantize(q, k, *NONE)
    results = [torch.full(q.shape, math.nan).half() for _ in range(2)]
    interpret(launch, q8, k8, *scales, v, results[0])
    longer = [torch.cat([x, torch.full((1, 58, 2, 64), 99, dtype=torch.int8)], 1)[:, :70] for x in (q8, k8)]
    poisoned = torch.cat([v, torch.full((1, 58, 2, 64), math.nan).half()], 1)[:, :70]
    interpret(launch, *longer, *scales, poisoned, results[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ["zeros", "equal keys", "tiny", "nan in q", "nan in k", "inf in q", "inf in k"])
def test_extreme_values(interpret: Any, output: Any, case: str) -> None:
    q, k, v = (x.contiguous() for x in inputs(1, 150, 2, 64, torch.float32).unbind(2))
    v = v.half()
    if case in ("zeros", "tiny"):
        q[:], k[:] = 0.0, 0.0
        q[..., 0], k[:, ::2, :, 0] = (1e-36, 1e-36) if case == "tiny" else (0.0, 0.0)
    elif case == "equal keys":
        k = k.round()[:, :1].expand_as(k)  # whole numbers, whose mean is exact
    else:
        {"q": q, "k": k}[case[-1]][0, 70, 1, 2] = math.nan if "nan" in case else math.inf
    expected = reference_quantize(q, k, *NONE)
    results = quantized(interpret, output, q, k, *NONE)
    assert_same_quantization(results, expected)
    out = output(*q.shape, dtype=v.dtype)
    interpret(launch, *results, v, out)
    right = reference(*expected, v.float())
    # One rounding of values up to 4 in float16, of weights and of the result; NaN where the reference has it.
    torch.testing.assert_close(out.float(), right, rtol=2e-3, atol=2e-3, equal_nan=True)
    spoiled = torch.zeros_like(v, dtype=torch.bool)
    if case[-1] in "qk" and "in" in case:
        spoiled[:, slice(64, 128) if case[-1] == "q" else slice(None), 1] = True  # its block, or its head
    assert torch.equal(right.isnan(), spoiled)
    if case in ("zeros", "tiny", "equal keys"):
        assert (results[1] == 0).all() and (results[3] == 1).all()
        torch.testing.assert_close(right, v.float().mean(1, keepdim=True).expand_as(right))


@pytest.mark.parametrize(
    ("shape", "keys"), [((0, 5, 2, 64), 5), ((2, 0, 2, 64), 5), ((2, 5, 0, 64), 5), ((2, 5, 2, 64), 0)], ids=str
)
def test_nothing_to_attend(interpret: Any, output: Any, shape: tuple[int, ...], keys: int) -> None:
    q, k = torch.randn(shape).half(), torch.randn(shape[0], keys, *shape[2:]).half()
    results = quantized(interpret, output, q, k, *NONE)
    assert_same_quantization(results, reference_quantize(q, k, *NONE))
    out = torch.full(shape, math.nan, dtype=q.dtype)
    interpret(launch, *results, k, out)
    # Both are zero without keys; float16 results are a rounding apart with them.
    torch.testing.assert_close(out, reference(*results, k), rtol=1e-3, atol=1e-3)


def test_ops(check_op: Any) -> None:
    qkv, arguments = inputs(2, 70, 2, 64, torch.bfloat16), prologue(70, 64, torch.bfloat16)
    q, k, v = qkv.unbind(2)
    check_op(quantize_qk, q, k, *arguments)
    check_op(quantize_qk, q[:, :5], k, *NONE)
    numbers = quantize_qk(q, k, *arguments)
    check_op(attention_int8.attention_int8, *numbers, v)
    check_op(attention_int8_out, *numbers, v, torch.zeros(2, 70, 4, 64, dtype=v.dtype)[:, :, 1:3])


def test_ops_are_the_attention_of_flux() -> None:
    qkv, arguments = inputs(1, 77, 2, 128, torch.bfloat16), prologue(77, 128, torch.bfloat16)
    out = attention_int8.attention_int8(*quantize_qk(*qkv.unbind(2)[:2], *arguments), qkv[:, :, 2])
    normed = qkv.double()
    qk_norm_rope.reference(normed, *arguments)
    right = exact(*normed.unbind(2)).flatten()
    assert out.dtype == torch.bfloat16 and torch.cosine_similarity(out.double().flatten(), right, 0) > 0.999


def test_launch_on_a_gpu(launches: Any) -> None:
    qkv, arguments = inputs(2, 333, 3, 128, torch.bfloat16), prologue(333, 128, torch.bfloat16)
    q, k, v = qkv.unbind(2)
    sums, quantize = launches(quantize_qk, q, k, *arguments)
    assert (sums.kernel, sums.grid, sums.written) == ("_sum_kernel", (2, 6, 1), {"sums"})
    assert (quantize.kernel, quantize.grid) == ("_quantize_kernel", (12, 6, 1))
    assert quantize.written == {"q8", "k8", "q_scale", "k_scale"}
    assert [quantize.arguments[name] for name in ("q_s", "k_h", "NORM", "ROTATE")] == [9 * 128, 128, True, True]
    numbers = reference_quantize(q, k, *arguments)
    (call,) = launches(attention_int8.attention_int8, *numbers, v)
    assert (call.kernel, call.grid, call.written) == ("_attention_int8_kernel", (3 * 6, 1, 1), {"out_ptr"})
    assert call.arguments["TAIL"] and (call.arguments["q_s"], call.arguments["v_s"]) == (3 * 128, 9 * 128)
    out = torch.zeros(2, 333, 500, dtype=v.dtype)[..., :384].unflatten(-1, (3, 128))
    (call,) = launches(attention_int8_out, *numbers, v, out)
    assert (call.written, call.arguments["o_s"]) == ({"out_ptr"}, 500)
    # Of sizes unknown, as `torch.compile` traces them.
    assert len(launches(quantize_qk, q, k, *arguments, dynamic=True)) == 2
    assert len(launches(attention_int8.attention_int8, *numbers, v, dynamic=True)) == 1


X = torch.zeros(2, 70, 3, 64).half()
N = torch.zeros(2, 70, 3, 64, dtype=torch.int8)
S = torch.ones(2, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], X, *NONE), "q has 3 dimensions; it must be [batch, tokens, heads, head_dim]"),
        ((X[..., :40], X, *NONE), "q has the head dimension 40; it must be 64 or 128"),
        ((X, X.mT.contiguous().mT, *NONE), "k has stride 3 in its last dimension; it must be 1"),
        ((X, X.float(), *NONE), "k is torch.float32 but q is torch.float16"),
        ((X, X[:, :, :2], *NONE), "k is [2, 70, 2, 64]; for q [2, 70, 3, 64] it must be [2, 70, 3, 64]"),
        ((X, X.to("meta"), *NONE), "k is on meta but q on cpu"),
        ((X, X, torch.ones(64), None, None), "Only one of q_weight and k_weight is given"),
        ((X, X, torch.ones(8), torch.ones(64), None), "q_weight is [8]; it must be [64]"),
        ((X, X[:, :9], None, None, torch.ones(2, 70, 32)), "k has 9 tokens; to be rotated as q it must have 70"),
        ((X, X, None, None, torch.ones(2, 70, 32).half()), "rotary is torch.float16; it must be torch.float32"),
        ((X, X, None, None, torch.ones(2, 70, 64)), "rotary is [2, 70, 64]; it must be [2, 70, 32]"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_refusals_of_the_quantization(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        quantize_qk(*arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q8": X}, "q8 is torch.float16; it must be torch.int8"),
        ({"k8": N[:, :9]}, "v is [2, 70, 3, 64]; for q8 [2, 70, 3, 64] it must be [2, 9, 3, 64]"),
        ({"v": X.float()}, "v is torch.float32; it must be torch.bfloat16 or torch.float16"),
        ({"v": X.repeat(1, 1, 1, 2)[..., ::2]}, "v has stride 2 in its last dimension; it must be 1"),
        ({"q_scale": S[..., :1]}, "q_scale is [2, 3, 1]; for q8 [2, 70, 3, 64] it must be [2, 3, 2]"),
        ({"k_scale": S.double()}, "k_scale is torch.float64; it must be torch.float32"),
        ({"k_scale": S.to("meta")}, "k_scale is on meta but q8 on cpu"),
        ({"k_scale": S.mT.contiguous().mT}, "k_scale has strides [6, 1, 3]; it must be contiguous"),
        ({"out": X[:, :9]}, "out is [2, 9, 3, 64]; for q8 [2, 70, 3, 64] it must be [2, 70, 3, 64]"),
        ({"out": X.bfloat16()}, "out is torch.bfloat16; it must be torch.float16"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_refusals_of_the_attention(change: dict[str, Tensor], message: str) -> None:
    right = {"q8": N, "k8": N, "q_scale": S, "k_scale": S, "v": X}
    op = attention_int8_out if "out" in change else attention_int8.attention_int8
    with pytest.raises(ValueError) as raised:
        op(**{**right, **change})
    assert message in str(raised.value)


@pytest.mark.parametrize(("arch", "integer", "half"), [(80, "IMMA", "HMMA"), (90, "IGMMA", "HGMMA")])
def test_integer_tensor_cores_compute_the_scores(arch: int, integer: str, half: str) -> None:
    (variant,) = (v for v in attention_int8.VARIANTS if v.name == "attention-64-bf16-tail")
    report = aot.compile_variant("attention_int8", variant, arch)
    assert not report.failures and set(report.mma) == {integer, half}
