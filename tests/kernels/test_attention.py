"""`attention`: its reference, its kernel as interpreted, its op, its table of configurations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsd_kernels import aot, attention, configs, cross_attention, joint_attention
from fastsd_kernels.attention import launch, reference
from fastsd_kernels.configs import Config

TILES = Config("kernel", 64, 64, 4, 2)


def packed(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v [batch, tokens, heads, dim] as slices of one buffer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype).unbind(2)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def check_kernel(interpret: Any, output: Any, assert_exact: Any) -> Any:
    """Run the kernel on q, k, v and compare."""

    def check(q: Tensor, k: Tensor, v: Tensor, config: Config = TILES) -> None:
        out = output(*q.shape, dtype=q.dtype)
        interpret(launch, q, k, v, out, config)
        assert_exact(out, exact(q, k, v), reference(q, k, v))

    return check


@pytest.mark.parametrize("dim", [8, *attention.SPLITS])
def test_reference_is_attention(dim: int) -> None:
    q, k, v = (x.double() for x in packed(2, 77, 3, dim, torch.float32))
    result = reference(q[:, :13], k, v)
    # Two orders of summation in float64.
    torch.testing.assert_close(result, exact(q[:, :13], k, v), rtol=1e-12, atol=1e-12)
    assert result.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", attention.SPLITS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 65), (65, 77), (128, 64), (130, 333)], ids=str)
def test_kernel(check_kernel: Any, dtype: torch.dtype, dim: int, queries: int, keys: int) -> None:
    q, k, v = packed(2, max(queries, keys), 2, dim, dtype)
    check_kernel(q[:, :queries], k[:, :keys], v[:, :keys])


@pytest.mark.parametrize("keys", [4096, 4429, 4608], ids=["SD1 and SDXL", "SD3", "Flux"])
def test_kernel_on_the_key_lengths_of_real_models(check_kernel: Any, keys: int) -> None:
    q, k, v = packed(1, keys, 1, 64, torch.float16)
    check_kernel(q[:, -65:], k, v, Config("kernel", 128, 128, 8, 2))


@pytest.mark.full
@pytest.mark.parametrize(("dim", "tokens"), [(40, 4096), (64, 4429), (80, 1024), (128, 4608), (160, 256), (160, 64)])
def test_kernel_on_whole_images(check_kernel: Any, dim: int, tokens: int) -> None:
    check_kernel(*packed(1, tokens, 1, dim, torch.float16), Config("kernel", 128, 64, 8, 2))


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def off_by_three(x: Tensor) -> Tensor:
    storage = torch.full((x.numel() + 3,), math.nan, dtype=x.dtype)
    return storage[3:].view(x.shape).copy_(x)


def odd_row(x: Tensor) -> Tensor:
    batch, tokens, heads, dim = x.shape
    buffer = torch.full((batch, tokens, heads * dim + 5), math.nan, dtype=x.dtype)
    return buffer[:, :, 1 : 1 + heads * dim].unflatten(2, (heads, dim)).copy_(x)


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("layout", [heads_first, off_by_three, odd_row, every_other])
def test_kernel_on_any_strides(interpret: Any, assert_exact: Any, layout: Any) -> None:
    q, k, v = (layout(x) for x in packed(2, 70, 3, 40, torch.float16))
    out = layout(torch.full(q.shape, math.nan, dtype=q.dtype))
    interpret(launch, q, k, v, out, TILES)
    assert_exact(out, exact(q, k, v), reference(q, k, v))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (3, 1), (1, 3)])
def test_kernel_finds_every_head_of_every_image(check_kernel: Any, batch: int, heads: int) -> None:
    check_kernel(*packed(batch, 66, heads, 64, torch.float16))


def test_rows_beyond_the_keys_are_not_read(interpret: Any) -> None:
    q, k, v = (x.contiguous() for x in packed(1, 70, 2, 64, torch.float16))
    expected, result = (torch.full(q.shape, math.nan, dtype=q.dtype) for _ in range(2))
    interpret(launch, q, k, v, expected, TILES)
    poisoned = [torch.cat([x, torch.full((1, 58, 2, 64), math.nan, dtype=x.dtype)], 1)[:, :70] for x in (q, k, v)]
    interpret(launch, *poisoned, result, TILES)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("tail", [0, 6], ids=["whole tiles", "tail"])
@pytest.mark.parametrize(
    "case", ["large scores", "equal keys", "nan in q", "nan in k", "nan in v", "inf in k", "-inf scores", "inf in v"]
)
def test_kernel_on_extreme_values_is_as_torch(interpret: Any, case: str, tail: int) -> None:
    q, k, v = (x.contiguous() for x in packed(1, 128 + tail, 1, 64, torch.float16))
    if case == "large scores":
        q, k = q.sign(), k.sign() * 60 / 8  # scores up to +-60, after the division by sqrt(64)
    elif case == "equal keys":
        k = k[:, :1].expand_as(k)
    elif case == "-inf scores":  # for the whole first tile, in some rows: the others decide
        q[..., 0], k[:, :64, :, 0] = 1.0, -math.inf
        q[:, 3:, :, 0] = 0.5
    elif case == "inf in k":  # +inf and -inf scores by the sign of q
        k[0, 5, 0, 2] = math.inf
    else:
        {"q": q, "k": k, "v": v}[case[-1]][0, 5, 0, 2] = math.nan if "nan" in case else math.inf
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    interpret(launch, q, k, v, out, TILES)
    expected = reference(q.float(), k.float(), v.float())
    # One rounding of values up to 4 in float16, of weights and of the result; NaN where torch has it, and only there.
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "keys"), [((0, 5, 2, 64), 5), ((2, 0, 2, 64), 5), ((2, 5, 0, 64), 5), ((2, 5, 2, 64), 0)], ids=str
)
def test_nothing_to_attend(interpret: Any, shape: tuple[int, ...], keys: int) -> None:
    q = torch.randn(shape).half()
    k = torch.randn(shape[0], keys, *shape[2:]).half()
    out = torch.full(shape, math.nan, dtype=q.dtype)
    interpret(launch, q, k, k, out, TILES)
    assert torch.equal(out, reference(q, k, k))


def test_kernel_repeats_itself_bit_by_bit(interpret: Any) -> None:
    q, k, v = packed(1, 90, 2, 80, torch.float16)
    results = [torch.full(q.shape, math.nan, dtype=q.dtype) for _ in range(2)]
    for result in results:
        interpret(launch, q, k, v, result, TILES)
    assert torch.equal(*results)


@pytest.mark.parametrize("dim", [8, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ops(check_op: Any, dtype: torch.dtype, dim: int) -> None:
    q, k, v = packed(2, 9, 2, dim, dtype)
    check_op(attention.attention, q[:, :5], k, v)
    check_op(attention.attention_out, q[:, :5], k, v, torch.zeros(2, 5, 4, dim, dtype=dtype)[:, :, 1:3])


def test_writing_beside_something_else_in_a_compiled_graph() -> None:
    def single_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        buffer = torch.ones(2, 9, 64)
        attention.attention_out(q, k, v, buffer[..., :32].unflatten(-1, (2, 16)))
        return buffer + attention.attention(q, k, v).flatten(2).repeat(1, 1, 2)

    inputs = packed(2, 9, 2, 16, torch.float32)
    # The same operations, perhaps fused.
    torch.testing.assert_close(torch.compile(single_block, fullgraph=True)(*inputs), single_block(*inputs))


@pytest.mark.full
def test_ops_in_an_ahead_of_time_package(tmp_path: Any) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            buffer = torch.ones(2, 9, 64)
            attention.attention_out(q, k, v, buffer[..., :32].unflatten(-1, (2, 16)))
            streams = joint_attention.joint_attention(q[:, :3], k[:, :3], v[:, :3], q[:, 3:], k[:, 3:], v[:, 3:])
            return (
                buffer,
                attention.attention(q, k, v),
                *streams,
                cross_attention.cross_attention(q, k[:, :4], v[:, :4]),
            )

    inputs = packed(2, 9, 2, 16, torch.float32)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Model(), inputs), package_path=str(tmp_path / "model.pt2")
    )
    # The same operations, perhaps fused.
    torch.testing.assert_close(tuple(torch._inductor.aoti_load_package(package)(*inputs)), Model()(*inputs))


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(configs, "choose", lambda *key: config)


def test_launch_on_a_gpu(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Config("kernel", 128, 64, 4, 3))
    q, k, v = packed(2, 333, 3, 40, torch.bfloat16)
    (call,) = launches(attention.attention, q, k, v)
    assert (call.kernel, call.grid, call.written) == ("_attention_kernel", (3 * 6, 1, 1), {"out_ptr"})
    assert [call.arguments[name] * call.arguments["UNIT"] for name in ("q_b", "q_s", "q_h")] == [333 * 360, 360, 40]
    out = torch.zeros(2, 333, 500, dtype=q.dtype)[..., :120].unflatten(-1, (3, 40))
    (call,) = launches(attention.attention_out, q, k, v, out)
    assert (call.written, call.arguments["o_s"], call.arguments["UNIT"]) == ({"out_ptr"}, 500, 1)
    assert call.arguments["TAIL"] and not launches(attention.attention, q, k[:, :320], v[:, :320])[0].arguments["TAIL"]


@pytest.mark.parametrize(("dim", "dtype"), [(8, torch.bfloat16), (64, torch.float32)], ids=str)
def test_what_has_no_kernel_runs_in_torch(dim: int, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 3, 2, dim, dtype=dtype, device="cuda")
    assert attention.choose(q, 3, "attention") is None


Q = torch.zeros(2, 5, 3, 64)
K = torch.zeros(2, 7, 3, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], K, K), "q has 3 dimensions; it must be"),
        ((Q, K.half(), K), "k is torch.float16 but q is torch.float32"),
        ((Q, K, K.to("meta")), "v is on meta but q on cpu"),
        ((Q, K[:, :, :2], K), "k is [2, 7, 2, 64]; for q [2, 5, 3, 64] it must be [2, 7, 3, 64]"),
        ((Q, K, K[:, :6]), "v is [2, 6, 3, 64]; it must be [2, 7, 3, 64], as k"),
        ((Q.transpose(2, 3).contiguous().transpose(2, 3), K, K), "q has stride 3 in its last dimension"),
        ((Q, K, K, K), "out must be [2, 5, 3, 64], as q"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_refusals(arguments: tuple[Tensor, ...], message: str) -> None:
    op = attention.attention if len(arguments) == 3 else attention.attention_out
    with pytest.raises(ValueError) as error:
        op(*arguments)
    assert message in str(error.value)


def test_table_has_a_row_for_every_case_and_is_honest() -> None:
    dims = {"attention": attention.SPLITS, "cross_attention": attention.SPLITS, "joint_attention": (64, 128)}
    expected = {
        (op, arch, dim, length)
        for op, lengths in configs.LENGTHS.items()
        for arch in aot.ARCHES
        for dim in dims[op]
        for length in lengths
    }
    assert set(configs.table()) == expected
    for row in configs.table().values():
        assert row.config.route in ("kernel", "hopper", "sdpa")
        assert row.measured is None or {"gpu", "torch", "triton", "microseconds"} <= set(row.measured)
        # Nothing but a measurement on that chip may prefer the specialised kernel.
        assert row.config.route != "hopper" or (row.arch == 90 and row.op == "attention" and row.measured)


def test_table_survives_a_round_trip(tmp_path: Any) -> None:
    configs.write(configs.table().values(), tmp_path / "configs.json")
    assert (tmp_path / "configs.json").read_text() == configs.TABLE.read_text()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((7, 5), None), ((8, 0), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 0), 90), ((12, 0), 89)],
    ids=str,
)
def test_chips_without_rows_use_those_of_a_relative(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.arch(torch.device("cuda:0")) == arch


@pytest.mark.parametrize(("dim", "arch"), [(40, 80), (128, 89), (64, 90)])
def test_a_variant_compiles_clean(dim: int, arch: int) -> None:
    variants = (v for v in attention.VARIANTS if v.constexprs["D"] == dim and v.constexprs["TAIL"] and arch in v.arches)
    report = aot.compile_variant("attention", next(variants), arch)
    assert not report.failures
    assert ("HGMMA" in report.mma) == (arch == 90)
