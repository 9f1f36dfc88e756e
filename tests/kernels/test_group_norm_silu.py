from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsd_kernels.group_norm_silu import group_norm_silu, launch, reference, scratch_size

LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}
NAN, INF = float("nan"), float("inf")


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, mean: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A map of which channels differ in mean and size, weight, bias, and a shift as columns of a packed row."""
    torch.manual_seed(0)
    channels = shape[1]
    x = torch.randn(shape) * torch.logspace(-1, 1, channels)[:, None, None]
    x = x + mean * torch.randn(channels)[:, None, None]
    weight, bias = torch.randn(2, channels).to(dtype)
    shift = torch.randn(shape[0], 3 * channels).to(dtype)[:, channels : 2 * channels]
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout]), weight, bias, shift


def run(interpret: Any, x: Tensor, groups: int, *arguments: Any, out: Tensor | None = None) -> Tensor:
    """The kernels' result, scratch memory and output full of NaN before."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    scratch = torch.full(scratch_size(x.shape, channels_last), NAN)
    out = torch.full_like(x, NAN) if out is None else out
    interpret(launch, x, groups, *arguments, scratch, out)
    return out


def in_low_precision(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Any, eps: float, silu: bool
) -> Tensor:
    x = x if shift is None else x + shift[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


def exactly(x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Any, eps: float, silu: bool) -> Tensor:
    wide = (None if t is None else t.double() for t in (weight, bias, shift))
    return in_low_precision(x.double(), groups, *wide, eps, silu)


CASES = [  # shape, groups
    ((2, 8, 5, 5), 4),
    ((1, 160, 9, 7), 32),
    ((2, 6, 3, 4), 1),
    ((1, 6, 3, 4), 6),
    ((1, 12, 1, 1), 3),
    ((2, 40, 13, 11), 8),
    ((1, 128, 33, 21), 32),
    ((1, 1, 9, 9), 1),
    ((1, 8, 0, 3), 2),
    ((0, 8, 3, 3), 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_kernel(
    interpret: Any, assert_exact: Any, shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype, layout: str
) -> None:
    x, weight, bias, _ = inputs(shape, dtype, layout)
    arguments = (weight, bias, None, 1e-5, True)
    out = run(interpret, x, groups, *arguments)
    assert out.stride() == x.stride()
    assert_exact(out, exactly(x, groups, *arguments), in_low_precision(x, groups, *arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
def test_kernel_with_shift(interpret: Any, assert_exact: Any, layout: str, silu: bool) -> None:
    x, weight, bias, shift = inputs((2, 40, 13, 11), torch.float16, layout)
    arguments = (weight, bias, shift, 1e-5, silu)
    out = run(interpret, x, 8, *arguments)
    assert_exact(out, exactly(x, 8, *arguments), in_low_precision(x, 8, *arguments))


def test_a_map_of_more_tiles_than_programs(interpret: Any, assert_exact: Any) -> None:
    x, weight, bias, _ = inputs((1, 64, 97, 87), torch.float32, "last")
    arguments = (weight, bias, None, 1e-6, True)
    out = run(interpret, x, 32, *arguments)
    assert_exact(out, exactly(x, 32, *arguments), in_low_precision(x, 32, *arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_far_mean_costs_no_digits(interpret: Any, layout: str) -> None:
    x, weight, bias, shift = inputs((1, 8, 20, 20), torch.float32, layout, mean=0)
    x, shift = x + 1e4, shift - 1e4
    out = run(interpret, x, 4, weight, bias, shift, 1e-6, False)
    exact = exactly(x, 4, weight, bias, shift, 1e-6, False)
    # x - mean is exact to an ulp of 1e4, 1e-3, if the mean is; but the mean's own ulp is in it, over a deviation of 4.
    # Sums of squares around zero would lose it all: 1e8 has an ulp of 8.
    assert (out - exact).abs().max() < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_larger_buffers(interpret: Any, layout: str) -> None:
    whole, weight, bias, _ = inputs((4, 48, 6, 5), torch.float32, layout)
    x = whole[::2, 16:32]
    memory = torch.full((4, 48, 6, 5), NAN).contiguous(memory_format=LAYOUTS[layout])
    out = memory[1:3, 16:32]
    run(interpret, x, 4, weight[:16], bias[:16], None, 1e-5, True, out=out)
    torch.testing.assert_close(out, reference(x, 4, weight[:16], bias[:16]))
    assert memory.isnan().sum() == memory.numel() - out.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 1, 2, 3)], ids=["first pixel", "another"])
def test_what_is_not_finite_spoils_its_group_alone(interpret: Any, layout: str, value: float, place: Any) -> None:
    x, weight, bias, _ = inputs((2, 8, 5, 5), torch.float32, layout)
    x[place] = value
    out = run(interpret, x, 4, weight, bias, None, 1e-5, False)
    torch.testing.assert_close(out, reference(x, 4, weight, bias, silu=False), equal_nan=True)
    assert out[0, :2].isnan().all() and out.isnan().sum() == 2 * 25


def test_silu_at_the_ends(interpret: Any) -> None:
    x = torch.randn(1, 4, 3, 3)
    bias = torch.tensor([300.0, -300.0, INF, -INF])
    out = run(interpret, x, 2, torch.ones(4), bias, None, 1e-5, True)
    expected = reference(x, 2, torch.ones(4), bias)
    torch.testing.assert_close(out, expected, equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_maps_give_the_bias(interpret: Any, layout: str) -> None:
    _, weight, bias, _ = inputs((1, 8, 5, 5), torch.float32, layout)
    x = torch.full((1, 8, 5, 5), 3.0).contiguous(memory_format=LAYOUTS[layout])
    out = run(interpret, x, 4, weight, bias, None, 1e-5, False)
    torch.testing.assert_close(out, bias[:, None, None].expand(1, 8, 5, 5), atol=1e-6, rtol=0)


def test_runs_are_equal_bit_for_bit(interpret: Any) -> None:
    x, weight, bias, shift = inputs((1, 64, 33, 21), torch.float16, "last")
    first, second = (run(interpret, x, 32, weight, bias, shift, 1e-5, True) for _ in range(2))
    assert torch.equal(first, second)


def test_reference_is_torch_and_rounds_once() -> None:
    x, weight, bias, shift = inputs((2, 8, 5, 5), torch.bfloat16, "first")
    wide = in_low_precision(x.float(), 4, weight.float(), bias.float(), shift.float(), 1e-5, True)
    assert torch.equal(reference(x, 4, weight, bias, shift), wide.bfloat16())


def test_it_is_what_the_unet_computes() -> None:
    from fastsd.denoisers.layers import ResnetBlock

    block = ResnetBlock(8, 8, 4, 4, 1e-5)
    block.columns = slice(2, 10)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
    x, modulation = torch.randn(2, 8, 6, 5), torch.randn(2, 12)
    h = block.conv1(group_norm_silu(x, 4, block.norm1.weight, block.norm1.bias))
    h = block.conv2(group_norm_silu(h, 4, block.norm2.weight, block.norm2.bias, modulation[:, block.columns]))
    torch.testing.assert_close(x + h, block(x, modulation))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_op(check_op: Any, layout: str) -> None:
    x, weight, bias, shift = inputs((2, 8, 5, 5), torch.float32, layout)
    check_op(group_norm_silu, x, 4, weight, bias)
    check_op(group_norm_silu, x, 4, weight, bias, shift, 1e-6, False)


def test_launch_on_a_gpu(launches: Any) -> None:
    x, weight, bias, shift = inputs((2, 320, 32, 32), torch.bfloat16, "last")
    sums, factors, apply = launches(group_norm_silu, x, 32, weight, bias, shift)
    assert (sums.kernel, sums.grid, sums.written) == ("_sums_kernel", (5, 16, 2), {"sums"})
    assert (factors.kernel, factors.grid, factors.written) == ("_factors_kernel", (32, 2, 1), {"sums"})
    assert (apply.kernel, apply.grid, apply.written) == ("_apply_kernel", (5, 16, 2), {"out"})
    assert (sums.arguments["x_channel"], sums.arguments["x_pixel"], apply.arguments["out_pixel"]) == (1, 320, 320)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamic_sizes_stay_dynamic_on_a_gpu(launches: Any, layout: str) -> None:
    x, weight, bias, shift = inputs((2, 320, 65, 64), torch.bfloat16, layout)
    calls = launches(group_norm_silu, x, 32, weight, bias, shift, dynamic=True)
    assert [type(call.arguments["pixels"]) for call in calls] != [int] * 3
    assert (calls[2].arguments["PIXELS"], calls[2].arguments["CHANNELS"]) == (
        (64, 64) if layout == "last" else (4096, 1)
    )


@pytest.mark.parametrize(("layout", "programs", "steps"), [("last", 2 * 128, 128), ("first", 128 * 16, 16)])
def test_the_largest_map_is_shared_by_many_programs(launches: Any, layout: str, programs: int, steps: int) -> None:
    x = torch.empty(1, 128, 1024, 1024, device="meta").to(memory_format=LAYOUTS[layout])
    sums, *_ = launches(group_norm_silu, x, 32, torch.ones(128), torch.ones(128))
    assert (sums.grid[0] * sums.grid[1], sums.arguments["steps"]) == (programs, steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 8, 5)}, r"x is \[2, 8, 5\]; it must be \[batch, channels, height, width\]"),
        ({"groups": 3}, "x has 8 channels; 3 groups must divide them"),
        ({"groups": 0}, "0 groups must divide them"),
        ({"x": torch.randn(2, 8, 5, 9)[..., ::2]}, r"x has strides \(360, 45, 9, 2\); its channels or its pixels"),
        ({"x": torch.randn(2, 8, 5, 9)[..., :5]}, "its channels or its pixels must be dense"),
        ({"weight": torch.ones(4)}, r"weight is \[4\]; it must be \[8\]"),
        ({"bias": torch.ones(16)[::2]}, "bias has stride 2 along its channels; it must be 1"),
        ({"shift": torch.ones(1, 8)}, r"shift is \[1, 8\]; it must be \[2, 8\]"),
        ({"shift": torch.ones(2, 8, device="meta")}, "shift is on meta; it must be on cpu"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    right = {"x": torch.randn(2, 8, 5, 5), "groups": 4, "weight": torch.ones(8), "bias": torch.ones(8)}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**right, **change})
