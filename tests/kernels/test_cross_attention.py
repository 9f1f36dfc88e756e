"""`cross_attention`: the kernel with all keys resident for up to 128, the loop for more."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels import aot, attention, configs, cross_attention
from fastsd_kernels.configs import Config
from fastsd_kernels.cross_attention import PARTS, launch, reference

RESIDENT = Config("kernel", 32, 0, 4, 1, 2)
LOOPED = Config("kernel", 32, 32, 4, 2)


def inputs(batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, and k and v as columns of the packed keys and values of several layers."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads, dim, generator=generator).to(dtype)
    context = torch.randn(batch, keys, 4, heads, dim, generator=generator).to(dtype)
    return q, context[:, :, 1], context[:, :, 2]


@pytest.fixture
def check_kernel(interpret: Any, output: Any, assert_exact: Any) -> Any:
    """Run the kernel on q, k, v and compare."""

    def check(q: Tensor, k: Tensor, v: Tensor, config: Config) -> None:
        out = output(*q.shape, dtype=q.dtype)
        interpret(launch, q, k, v, out, config)
        assert_exact(out, reference(*(x.double() for x in (q, k, v))), reference(q, k, v))

    return check


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", attention.SPLITS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 77), (64, 128), (130, 40)], ids=str)
def test_kernel(check_kernel: Any, dtype: torch.dtype, dim: int, queries: int, keys: int) -> None:
    check_kernel(*inputs(2, queries, keys, 2, dim, dtype), RESIDENT)


@pytest.mark.parametrize("keys", [15, 16, 17, 32, 33, 48, 49, 63, 64, 65, 80, 81, 96, 97, 127, 128])
def test_every_number_of_keys_has_its_parts(check_kernel: Any, keys: int) -> None:
    check_kernel(*inputs(1, 5, keys, 1, 40, torch.float16), RESIDENT)


@pytest.mark.parametrize("keys", [129, 154, 231])
def test_long_prompts_are_looped_over(check_kernel: Any, keys: int) -> None:
    check_kernel(*inputs(1, 40, keys, 2, 64, torch.float16), LOOPED)


@pytest.mark.full
@pytest.mark.parametrize("keys", range(1, 129))
def test_every_number_of_keys(check_kernel: Any, keys: int) -> None:
    check_kernel(*inputs(1, 3, keys, 1, 64, torch.float16), RESIDENT)


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("queries", [95, 96, 97])
def test_tiles_of_a_program(check_kernel: Any, queries: int, tiles: int) -> None:
    check_kernel(*inputs(2, queries, 20, 1, 40, torch.float16), RESIDENT._replace(tiles=tiles))


def test_rows_beyond_the_keys_are_not_read(interpret: Any, assert_exact: Any) -> None:
    q, k, v = inputs(1, 33, 77, 2, 64, torch.float16)
    longer = [torch.cat([x, torch.full((1, 51, 2, 64), math.nan, dtype=x.dtype)], 1)[:, :77] for x in (k, v)]
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    interpret(launch, q, *longer, out, RESIDENT)
    assert_exact(out, reference(*(x.double() for x in (q, k, v))), reference(q, k, v))


@pytest.mark.parametrize(
    "case", ["large scores", "largest last", "equal keys", "nan in q", "nan in k", "nan in v", "inf in k"]
)
def test_kernel_on_extreme_values_is_as_torch(interpret: Any, case: str) -> None:
    q, k, v = (x.contiguous() for x in inputs(1, 40, 77, 1, 64, torch.float16))
    if case == "large scores":
        q, k = q.sign(), k.sign() * 60 / 8  # scores up to +-60, after the division by sqrt(64)
    elif case == "largest last":  # in the second part of the keys, by more than an exponential can hold
        k[:, 70] *= 100
    elif case == "equal keys":
        k = k[:, :1].expand_as(k)
    else:
        {"q": q, "k": k, "v": v}[case[-1]][0, 5, 0, 2] = math.nan if "nan" in case else math.inf
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    interpret(launch, q, k, v, out, RESIDENT)
    expected = reference(q.float(), k.float(), v.float())
    # One rounding of values up to 4 in float16, of weights and of the result; NaN where torch has it, and only there.
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "keys"), [((0, 5, 2, 64), 5), ((2, 0, 2, 64), 5), ((2, 5, 0, 64), 5), ((2, 5, 2, 64), 0)], ids=str
)
def test_nothing_to_attend(interpret: Any, shape: tuple[int, ...], keys: int) -> None:
    q, k = torch.randn(shape).half(), torch.randn(shape[0], keys, *shape[2:]).half()
    out = torch.full(shape, math.nan, dtype=q.dtype)
    interpret(launch, q, k, k, out, RESIDENT)
    assert torch.equal(out, reference(q, k, k))


def test_ops(check_op: Any) -> None:
    q, k, v = inputs(2, 5, 9, 2, 16, torch.float32)
    check_op(cross_attention.cross_attention, q, k, v)
    check_op(cross_attention.cross_attention_out, q, k, v, torch.zeros(2, 5, 4, 16)[:, :, 1:3])


@pytest.mark.parametrize(
    ("keys", "kernel", "programs"), [(77, "_cross_attention_kernel", 2), (154, "_attention_kernel", 3)]
)
def test_launch_on_a_gpu(launches: Any, keys: int, kernel: str, programs: int) -> None:
    arguments = inputs(2, 300, keys, 3, 64, torch.bfloat16)
    (call,) = launches(cross_attention.cross_attention, *arguments)
    assert (call.kernel, call.grid, call.written) == (kernel, (programs * 6, 1, 1), {"out_ptr"})
    assert configs.choose("cross_attention", 90, 64, keys).route == "kernel"


def test_refusals() -> None:
    q, k = torch.zeros(2, 5, 3, 64), torch.zeros(2, 7, 3, 64)
    with pytest.raises(ValueError, match=r"k is torch\.float16 but q is torch\.float32"):
        cross_attention.cross_attention(q, k.half(), k)
    with pytest.raises(ValueError, match="out must be"):
        cross_attention.cross_attention_out(q, k, k, k)


def test_parts_are_what_the_tensor_cores_take() -> None:
    for most, parts in PARTS.items():
        assert sum(parts) == most and all(n == 0 or (n >= 16 and n & (n - 1) == 0) for n in parts)


@pytest.mark.parametrize(("dim", "arch"), [(40, 80), (64, 90)])
def test_a_variant_compiles_clean(dim: int, arch: int) -> None:
    variants = (v for v in cross_attention.VARIANTS if v.constexprs["D"] == dim and arch in v.arches)
    assert not aot.compile_variant("cross_attention", next(variants), arch).failures
