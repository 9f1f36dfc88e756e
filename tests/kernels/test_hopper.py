"""The specialised attention of Hopper: interpreted, compiled for the chip, kept off where it does not fit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastsd_kernels import aot, attention, configs, hopper
from fastsd_kernels.configs import Config
from fastsd_kernels.hopper import launch, reference

TILES = Config("hopper", 128, 64, 4, 2)


def packed(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v [batch, tokens, heads, dim] as slices of one buffer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype).unbind(2)


@pytest.fixture
def check_kernel(interpret: Any, output: Any, assert_exact: Any) -> Any:
    """Run the kernel on q, k, v and compare."""

    def check(q: Tensor, k: Tensor, v: Tensor, config: Config = TILES) -> None:
        out = output(*q.shape, dtype=q.dtype)
        interpret(launch, q, k, v, out, config)
        assert_exact(out, reference(*(x.double() for x in (q, k, v))), reference(q, k, v))

    return check


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (63, 65), (128, 128), (130, 333)], ids=str)
def test_kernel(check_kernel: Any, dtype: torch.dtype, dim: int, queries: int, keys: int) -> None:
    q, k, v = packed(2, max(queries, keys), 2, dim, dtype)
    check_kernel(q[:, :queries], k[:, :keys], v[:, :keys])


@pytest.mark.parametrize("keys", [4429, 4608], ids=["SD3", "Flux"])
def test_kernel_on_the_key_lengths_of_real_models(check_kernel: Any, keys: int) -> None:
    q, k, v = packed(1, keys, 1, 64, torch.float16)
    check_kernel(q[:, -65:], k, v, TILES._replace(block_n=128))


def test_neither_the_next_image_nor_rows_beyond_are_read(interpret: Any, assert_exact: Any) -> None:
    q, k, v = packed(2, 70, 2, 64, torch.float16)
    poisoned = [torch.cat([x, torch.full_like(x, math.nan)], 1)[:, :70] for x in (q, k, v)]
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    interpret(launch, *poisoned, out, TILES)
    assert_exact(out, reference(*(x.double() for x in (q, k, v))), reference(q, k, v))


def test_it_agrees_with_the_portable_kernel(interpret: Any) -> None:
    q, k, v = packed(1, 200, 1, 128, torch.float32)
    outs = [torch.full(q.shape, math.nan) for _ in range(2)]
    interpret(launch, q, k, v, outs[0], TILES)
    interpret(attention.launch, q, k, v, outs[1], Config("kernel", 128, 64, 8, 2))
    # The same sums of the same tiles in float32.
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_op_off_the_gpu(dtype: torch.dtype) -> None:
    q, k, v = packed(2, 9, 2, 64, dtype)
    out = torch.full(q.shape, math.nan, dtype=dtype)
    torch.library.opcheck(hopper.attention_hopper, (q, k, v, out, 128, 2))
    hopper.attention_hopper(q, k, v, out, 128, 2)
    assert torch.equal(out, reference(q, k, v))


def test_attention_calls_it_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "choose", lambda *key: TILES)
    with FakeTensorMode():
        q, k, v = torch.empty(2, 4429, 3, 24, 64, dtype=torch.bfloat16, device="cuda").unbind(2)
        assert attention.choose(q, 4429, "attention") == TILES
        out = torch.empty(2, 4429, 24, 64, dtype=torch.bfloat16, device="cuda")
        graph = make_fx(lambda *tensors: attention.launch(*tensors, TILES))(q, k, v, out).graph
    assert "fastsd.attention_hopper.default" in [str(node.target) for node in graph.nodes]


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (torch.zeros(2, 9, 3, 64, dtype=torch.bfloat16), True),
        (torch.zeros(2, 9, 3, 192, dtype=torch.bfloat16)[..., 64:128], True),
        (torch.zeros(2, 9, 3, 68, dtype=torch.bfloat16)[..., :64], False),
        (torch.zeros(2, 9, 3, 128, dtype=torch.bfloat16)[..., 4:68], False),
        (torch.zeros(2, 1, 3, 64, dtype=torch.bfloat16), False),
        (torch.zeros(2, 1, 3, 64, dtype=torch.bfloat16).expand(2, 9, 3, 64), False),
    ],
    ids=["contiguous", "columns", "odd rows", "odd address", "one row", "one row repeated"],
)
def test_what_the_copy_engine_can_address(x: Tensor, fits: bool) -> None:
    assert hopper.fits(x) == fits


@pytest.mark.parametrize("dim", hopper.HEAD_DIMS)
def test_warps_are_specialised(dim: int) -> None:
    variant = next(v for v in hopper.VARIANTS if v.constexprs["D"] == dim and v.constexprs["TAIL"])
    report = aot.compile_variant("hopper", variant, 90)
    assert not report.failures
    # Two groups of four warps that compute and one that copies: what the compiler makes of `warp_specialize` and four
    # warps, unless it silently ignores the flag.
    assert report.warps == 12 and "HGMMA" in report.mma
