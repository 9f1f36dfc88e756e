from typing import Any

import pytest
import torch

from fastsd_kernels.geglu import geglu, launch, reference


def inputs(batch: int, length: int, inner: int, dtype: torch.dtype) -> torch.Tensor:
    """Both halves, as columns and rows of something larger."""
    torch.manual_seed(0)
    return (3 * torch.randn(batch, length + 2, 2 * inner + 8)).to(dtype)[:, 1:-1, : 2 * inner]


def in_low_precision(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


SHAPES = [(2, 5, 24), (1, 1, 1), (1, 77, 320), (2, 9, 1280), (1, 0, 8), (3, 63, 20)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(
    interpret: Any, output: Any, assert_exact: Any, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, out = inputs(*shape, dtype), output(*shape, dtype=dtype)
    interpret(launch, x, out)
    assert_exact(out, reference(x.double()), in_low_precision(x))


def test_values_at_the_ends_and_not_finite(interpret: Any, output: Any) -> None:
    special = torch.tensor([0.0, -0.0, 1e-30, 30.0, -30.0, 3e38, -3e38, float("inf"), -float("inf"), float("nan")])
    x = torch.cartesian_prod(special, special).t().reshape(1, 1, -1)  # every value with every gate
    out = output(1, 1, 100)
    interpret(launch, x, out)
    value, gate = x.double().chunk(2, dim=-1)  # torch's own gelu(inf) is NaN on some processors
    expected = (value * (0.5 * gate * (1 + torch.erf(gate / 2**0.5)))).float()
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


def test_reference_rounds_once() -> None:
    x = inputs(2, 5, 24, torch.bfloat16)
    assert torch.equal(reference(x), in_low_precision(x.float()).bfloat16())


def test_it_is_what_the_unet_computes() -> None:
    from fastsd.denoisers.layers import GEGLU

    layer = GEGLU(6, 8)
    tokens = torch.randn(2, 5, 6)
    torch.testing.assert_close(geglu(layer.proj(tokens)), layer(tokens))


def test_op(check_op: Any) -> None:
    check_op(geglu, inputs(2, 5, 24, torch.float32))


def test_launch_on_a_gpu(launches: Any) -> None:
    (call,) = launches(geglu, inputs(2, 333, 2560, torch.bfloat16))
    assert (call.kernel, call.grid, call.written) == ("_geglu_kernel", (42, 10, 2), {"out"})
    assert (call.arguments["inner"], call.arguments["x_row"], call.arguments["out_row"]) == (2560, 5128, 2560)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 8), r"x is \[2, 8\]; it must be \[batch, tokens, 2 \* inner\]"),
        (torch.randn(2, 3, 7), r"x is \[2, 3, 7\]"),
        (torch.randn(2, 4, 6).transpose(1, 2), "x has stride 6 along its last axis; it must be 1"),
    ],
)
def test_refusals(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geglu(x)
