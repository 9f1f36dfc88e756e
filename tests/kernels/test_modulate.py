from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastsd_kernels.modulate import launch, modulate, reference

NAN, INF = float("nan"), float("inf")


def inputs(batch: int, length: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Tokens that are the last of longer ones, and shift and scale as columns of a packed row."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(batch, length + 3, width, generator=generator) * 2 + 1).to(dtype)
    packed = torch.randn(batch, 5 * width, generator=generator).to(dtype)
    return x[:, 3:], packed[:, width : 2 * width], packed[:, 3 * width : 4 * width]


def in_low_precision(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, scale_offset: float
) -> torch.Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (scale_offset + scale[:, None]) + shift[:, None]


SHAPES = [(2, 5, 24), (1, 1, 1), (1, 63, 96), (3, 4, 1536), (1, 77, 40), (2, 0, 16), (1, 2, 3072)]


@pytest.mark.parametrize("scale_offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(
    interpret: Any, output: Any, assert_exact: Any, shape: tuple[int, int, int], dtype: torch.dtype, scale_offset: float
) -> None:
    x, shift, scale = inputs(*shape, dtype)
    out = output(*shape, dtype=dtype)
    interpret(launch, x, shift, scale, 1e-6, scale_offset, out)
    exact = reference(x.double(), shift.double(), scale.double(), 1e-6, scale_offset)
    assert_exact(out, exact, in_low_precision(x, shift, scale, 1e-6, scale_offset))


def test_kernel_with_several_tokens_a_program(interpret: Any, output: Any, assert_exact: Any) -> None:
    x, shift, scale = inputs(1, 2051, 8, torch.float16)
    out = output(1, 2051, 8, dtype=torch.float16)
    interpret(launch, x, shift, scale, 1e-6, 1.0, out)
    exact = reference(x.double(), shift.double(), scale.double())
    assert_exact(out, exact, in_low_precision(x, shift, scale, 1e-6, 1.0))


def test_a_far_mean_costs_no_digits(interpret: Any, output: Any, assert_exact: Any) -> None:
    x, shift, scale = inputs(1, 4, 320, torch.float32)
    x = x + 1000
    out = output(1, 4, 320)
    interpret(launch, x, shift, scale, 1e-6, 1.0, out)
    assert_exact(out, reference(x.double(), shift.double(), scale.double()), reference(x, shift, scale))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_spoils_its_token_alone(interpret: Any, output: Any, value: float) -> None:
    x, shift, scale = inputs(2, 5, 24, torch.float32)
    x[0, 2, 7] = value
    out = output(2, 5, 24)
    interpret(launch, x, shift, scale, 1e-6, 1.0, out)
    torch.testing.assert_close(out, reference(x, shift, scale), equal_nan=True)
    assert out.isnan().sum() == 24


def test_reference_is_torch_and_rounds_once() -> None:
    x, shift, scale = inputs(2, 5, 24, torch.float64)
    torch.testing.assert_close(reference(x, shift, scale, 1e-5), in_low_precision(x, shift, scale, 1e-5, 1.0))
    low = [t.bfloat16() for t in (x, shift, scale)]
    assert torch.equal(reference(*low), reference(*(t.float() for t in low)).bfloat16())


def test_it_is_what_the_transformers_compute() -> None:
    from fastsd import ops

    x, shift, scale = inputs(2, 5, 24, torch.float32)
    (expected,) = ops.modulate(x, (shift[:, None], scale[:, None]))
    torch.testing.assert_close(modulate(x, shift, scale, scale_offset=0.0), expected)


def test_op(check_op: Any) -> None:
    check_op(modulate, *inputs(2, 5, 24, torch.float32), 1e-6, 0.0)


def test_launch_on_a_gpu(launches: Any) -> None:
    x, shift, scale = inputs(2, 333, 1536, torch.bfloat16)
    (call,) = launches(modulate, x, shift, scale)
    assert (call.kernel, call.grid, call.written) == ("_modulate_kernel", (333, 2, 1), {"out"})
    assert call.arguments["x_batch"] == 336 * 1536 and call.arguments["shift_batch"] == 5 * 1536


def test_dynamic_sizes_stay_dynamic_on_a_gpu(launches: Any) -> None:
    (call,) = launches(modulate, *inputs(2, 333, 1536, torch.bfloat16), dynamic=True)
    assert not any(type(call.arguments[name]) is int for name in ("length", "width", "x_batch", "out_row"))
    assert (call.arguments["BLOCK"], call.arguments["ROWS"]) == (2048, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, m: (x[0], m, m), r"x is \[5, 24\]; it must be \[batch, tokens, width\]"),
        (lambda x, m: (x, m[:1], m), r"shift is \[1, 24\]; it must be \[2, 24\]"),
        (lambda x, m: (x, m, m[:, :8]), r"scale is \[2, 8\]; it must be \[2, 24\]"),
        (lambda x, m: (x.transpose(1, 2), m[:, :5], m[:, :5]), r"x has stride 24 along its width; it must be 1"),
        (lambda x, m: (x, m, m[:, :1].expand(2, 24)), r"scale has stride 0 along its width"),
        (lambda x, m: (x, m.to("meta"), m), r"shift is on meta; it must be on cpu"),
    ],
)
def test_refusals(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modulate(*change(torch.randn(2, 5, 24), torch.randn(2, 24)))


def test_float64_has_no_kernel(launches: Any) -> None:
    with pytest.raises(ValueError, match=r"x is torch\.float64; on a GPU it must be"):
        launches(modulate, *inputs(1, 2, 8, torch.float64))
