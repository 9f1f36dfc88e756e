from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels import modulate
from fastsd_kernels.gate_residual import (
    gate_residual,
    gate_residual_modulate,
    launch,
    launch_modulate,
    reference,
    reference_modulate,
)

SHAPES = [(2, 5, 24), (1, 1, 1), (1, 63, 320), (3, 9, 1536), (1, 0, 8), (1, 77, 20)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Tokens, gate, update, shift and scale: rows are columns of a packed one, the update is a slice of tokens."""
    torch.manual_seed(0)
    batch, length, width = shape
    x = torch.randn(shape).to(dtype)
    update = torch.randn(batch, length + 3, width).to(dtype)[:, 1:-2]
    packed = torch.randn(batch, 6 * width).to(dtype)
    return x, packed[:, 2 * width : 3 * width], update, packed[:, :width], packed[:, width : 2 * width]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(interpret: Any, output: Any, assert_exact: Any, shape: Any, dtype: torch.dtype) -> None:
    x, gate, update, *_ = inputs(shape, dtype)
    out, in_place = output(*shape, dtype=dtype), output(*shape, dtype=dtype)
    interpret(launch, x, gate, update, out)
    exact = reference(x.double(), gate.double(), update.double())
    assert_exact(out, exact, torch.addcmul(x, gate[:, None], update))
    in_place.copy_(x)
    interpret(launch, in_place, gate, update, in_place)
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_with_what_follows(
    interpret: Any, output: Any, assert_exact: Any, shape: Any, dtype: torch.dtype
) -> None:
    x, gate, update, shift, scale = inputs(shape, dtype)
    total, out = output(*shape, dtype=dtype), output(*shape, dtype=dtype)
    interpret(launch_modulate, x, gate, update, shift, scale, 1e-6, 1.0, total, out)
    exact = reference(x.double(), gate.double(), update.double())
    assert_exact(total, exact, torch.addcmul(x, gate[:, None], update))
    exact = modulate.reference(total.double(), shift.double(), scale.double())
    normed = torch.nn.functional.layer_norm(total, total.shape[-1:], eps=1e-6)
    assert_exact(out, exact, normed * (1 + scale[:, None]) + shift[:, None])


def test_float16_saturates_and_nan_stays(interpret: Any, output: Any) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([6e4, -6e4, inf, -inf, nan, 1.0, 6e4]).half().reshape(1, 1, 7)
    update = torch.tensor([6e4, -6e4, 1.0, 1.0, 1.0, nan, -inf]).half().reshape(1, 1, 7)
    gate, out = torch.ones(1, 7).half(), output(1, 1, 7, dtype=torch.float16)
    interpret(launch, x, gate, update, out)
    expected = torch.tensor([65504, -65504, 65504, -65504, nan, nan, -65504]).half().reshape(1, 1, 7)
    assert torch.equal(out.nan_to_num(7, inf, -inf), expected.nan_to_num(7))
    assert torch.equal(reference(x, gate, update).nan_to_num(7, inf, -inf), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_it_is_what_the_transformers_compute(dtype: torch.dtype) -> None:
    from fastsd import ops

    x, gate, update, *_ = inputs((2, 5, 24), dtype)
    x[0, 0, 0] = 1e6  # Inf in float16
    torch.testing.assert_close(gate_residual(x, gate, update), ops.gate_residual(x, gate[:, None], update))


def test_reference_of_both_is_one_after_the_other() -> None:
    x, gate, update, shift, scale = inputs((2, 5, 24), torch.bfloat16)
    expected = reference(x, gate, update)
    total, out = reference_modulate(x, gate, update, shift, scale)
    assert torch.equal(total, expected) and torch.equal(out, modulate.reference(expected, shift, scale))


def test_op(check_op: Any) -> None:
    x, gate, update, shift, scale = inputs((2, 5, 24), torch.float32)
    check_op(gate_residual, x, gate, update)
    check_op(gate_residual_modulate, x, gate, update, shift, scale, 1e-6, 0.0)


def test_launch_on_a_gpu(launches: Any) -> None:
    x, gate, update, shift, scale = inputs((2, 333, 1536), torch.bfloat16)
    (call,) = launches(gate_residual, x, gate, update)
    assert (call.kernel, call.grid, call.written) == ("_gate_residual_kernel", (42, 6, 2), {"total"})
    assert call.arguments["update_batch"] == 336 * 1536 and call.arguments["SATURATE"] is False
    (call,) = launches(gate_residual_modulate, x, gate, update, shift, scale)
    assert (call.kernel, call.grid, call.written) == ("_gate_residual_modulate_kernel", (333, 2, 1), {"total", "out"})
    (call,) = launches(gate_residual, x.half(), gate.half(), update.half())
    assert call.arguments["SATURATE"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, g: (x[0], g, x), r"x is \[5, 24\]; it must be"),
        (lambda x, g: (x, g[:, :3], x), r"gate is \[2, 3\]; it must be \[2, 24\]"),
        (lambda x, g: (x, g, x[:, :3]), r"update is \[2, 3, 24\]; it must be \[2, 5, 24\], as x"),
        (lambda x, g: (x, g, x.mT.contiguous().mT), r"update has stride 5 along its width"),
        (lambda x, g: (x, g, x.to("meta")), r"update is on meta; it must be on cpu"),
    ],
)
def test_refusals(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate_residual(*change(torch.randn(2, 5, 24), torch.randn(2, 24)))
