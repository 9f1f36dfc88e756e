from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsd_kernels.quantize import (
    launch,
    launch_modulate,
    quantize_gelu,
    quantize_modulate,
    quantize_rowwise,
    reference,
    reference_gelu,
    reference_modulate,
)

F8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(2, 5, 24), (1, 1, 1), (1, 9, 1536), (1, 77, 40), (1, 0, 16)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    batch, length, width = shape
    # Rows of very different sizes, and one of zeros.
    x = torch.randn(batch, length + 2, width) * torch.logspace(-3, 3, length + 2)[:, None]
    x[:, 1:2] = 0
    packed = torch.randn(batch, 3 * width).to(dtype)
    return x.to(dtype)[:, 1:-1], packed[:, :width], packed[:, width : 2 * width]


def poisoned(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Outputs full of NaN."""
    return torch.full(shape, float("nan")).to(F8), torch.full((*shape[:2], 1), float("nan"))


def check(q: Tensor, scales: Tensor, exact: Tensor) -> None:
    """The largest of a row becomes 448 and everything lies within float8's rounding of it."""
    assert q.dtype == F8 and scales.dtype == torch.float32 and scales.shape == (*q.shape[:-1], 1)
    if not q.numel():
        return
    largest = exact.abs().amax(-1, keepdim=True)
    expected = torch.where(largest == 0, 1, largest / 448)
    torch.testing.assert_close(scales.double(), expected, rtol=2e-6, atol=1e-38)
    assert torch.equal((q.float().abs().amax(-1, keepdim=True) == 448) | (largest == 0), torch.ones_like(scales) > 0)
    # e4m3 has 3 bits behind the leading one, so half a step is 1/16 of a value; below 2^-6 a step is 2^-9. float32
    # inputs of the rounding differ in their last digits from the exact ones: a thousandth more.
    bound = 1.001 * torch.maximum(exact.abs() / 16, expected * 2.0**-10)
    assert ((q.double() * scales - exact).abs() <= bound).all()


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(interpret: Any, shape: Any, dtype: torch.dtype, gelu: bool) -> None:
    x, *_ = inputs(shape, dtype)
    q, scales = poisoned(shape)
    interpret(launch, x, gelu, q, scales)
    exact = x.double()
    # tanh(u) = 1 - 2 / (1 + exp(2 u)) keeps its digits where torch's float64 GELU rounds 1 + tanh to 0.
    check(q, scales, exact * torch.sigmoid(1.5957691216057308 * (exact + 0.044715 * exact**3)) if gelu else exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_behind_modulate(interpret: Any, shape: Any, dtype: torch.dtype) -> None:
    x, shift, scale = inputs(shape, dtype)
    q, scales = poisoned(shape)
    interpret(launch_modulate, x, shift, scale, 1e-6, 1.0, q, scales)
    wide, factor, offset = x.double(), 1 + scale.double()[:, None], shift.double()[:, None]
    check(q, scales, F.layer_norm(wide, wide.shape[-1:], eps=1e-6) * factor + offset)


def test_float8_numbers_stay_as_they_are_and_within_their_memory(interpret: Any) -> None:
    numbers = torch.arange(1, 127, dtype=torch.uint8).view(F8).float()[torch.randperm(126)[:24]]
    x = (numbers * (-1) ** torch.arange(24)).expand(2, 5, 24).clone()
    x[..., 3] = 448
    memory = torch.full((64 + 2 * 5 * 24 + 64,), 0x7F, dtype=torch.uint8)
    scales = torch.full((3 + 10 + 3,), float("nan"))
    q = memory[64:-64].view(F8).view(2, 5, 24)
    interpret(launch, x, False, q, scales[3:-3].view(2, 5, 1))
    assert torch.equal(q.float(), x) and (scales[3:-3] == 1).all()
    assert (memory[:64] == 0x7F).all() and (memory[-64:] == 0x7F).all()
    assert scales[:3].isnan().all() and scales[-3:].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
def test_extremes_come_back_as_from_the_reference(interpret: Any, value: float, gelu: bool) -> None:
    x, *_ = inputs((1, 3, 24), torch.float32)
    x[0, 0] = 0
    x[0, 0, 5] = value
    q, scales = poisoned((1, 3, 24))
    interpret(launch, x, gelu, q, scales)
    expected, expected_scales = (reference_gelu if gelu else reference)(x)
    torch.testing.assert_close(scales, expected_scales, equal_nan=True)
    torch.testing.assert_close(q.float() * scales, expected.float() * expected_scales, equal_nan=True)


@pytest.mark.parametrize("function", [reference, reference_gelu], ids=["plain", "gelu"])
def test_reference(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    x, *_ = inputs((2, 5, 24), torch.float64)
    check(*function(x), F.gelu(x, approximate="tanh") if function is reference_gelu else x)


def test_product_in_float8(assert_exact: Any) -> None:
    x = torch.randn(1, 32, 64)
    weight = torch.randn(1, 48, 64)
    (a, a_scale), (b, b_scale) = quantize_rowwise(x), quantize_rowwise(weight)
    product = torch._scaled_mm(
        a[0], b[0].t(), scale_a=a_scale[0], scale_b=b_scale[0].t().contiguous(), out_dtype=torch.bfloat16
    )
    exact = (a[0].double() * a_scale[0]) @ (b[0].double() * b_scale[0]).t()
    assert_exact(product, exact, exact.bfloat16())
    error = (product.float() - x[0] @ weight[0].t()).norm() / (x[0] @ weight[0].t()).norm()
    assert error < 0.04  # two operands with a relative error of about 2^-4 / sqrt(3) / 2 each, measured 0.035


@pytest.mark.parametrize("op", [quantize_rowwise, quantize_gelu], ids=["plain", "gelu"])
def test_op(check_op: Any, op: Any) -> None:
    check_op(op, inputs((2, 5, 24), torch.float32)[0])


def test_op_behind_modulate(check_op: Any) -> None:
    x, shift, scale = inputs((2, 5, 24), torch.float32)
    check_op(quantize_modulate, x, shift, scale, 1e-6, 0.0)
    q, scales = quantize_modulate(x, shift, scale)
    expected, expected_scales = reference_modulate(x, shift, scale)
    assert torch.equal(q.float(), expected.float()) and torch.equal(scales, expected_scales)


def test_launch_on_a_gpu(launches: Any) -> None:
    x, shift, scale = inputs((2, 333, 1536), torch.bfloat16)
    (call,) = launches(quantize_rowwise, x)
    assert (call.kernel, call.grid, call.written) == ("_rowwise_kernel", (333, 2, 1), {"out", "scales"})
    assert call.arguments["GELU"] is False and call.arguments["x_batch"] == 335 * 1536
    (call,) = launches(quantize_gelu, x)
    assert call.arguments["GELU"] is True
    (call,) = launches(quantize_modulate, x, shift, scale)
    assert (call.kernel, call.written) == ("_modulate_kernel", {"out", "scales"})


@pytest.mark.parametrize("op", [quantize_rowwise, quantize_gelu], ids=["plain", "gelu"])
def test_refusals(op: Any) -> None:
    with pytest.raises(ValueError, match=r"x is \[5, 24\]; it must be \[batch, tokens, width\]"):
        op(torch.randn(5, 24))
    with pytest.raises(ValueError, match="x has stride 5 along its width; it must be 1"):
        op(torch.randn(2, 24, 5).mT)
