"""`joint_attention`: text and image attend to both, against the attention of their concatenation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels import aot, attention, configs, joint_attention
from fastsd_kernels.configs import Config
from fastsd_kernels.joint_attention import launch, reference

TILES = Config("kernel", 64, 64, 4, 2)


def streams(batch: int, text: int, image: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v of the text and of the image, as slices of a buffer each."""
    generator = torch.Generator().manual_seed(0)
    buffers = (torch.randn(batch, n, 3, heads, dim, generator=generator).to(dtype) for n in (text, image))
    return tuple(x for buffer in buffers for x in buffer.unbind(2))


@pytest.mark.parametrize("image_first", [False, True], ids=["as Flux", "as SD3"])
def test_reference_is_the_attention_of_the_concatenation(image_first: bool) -> None:
    inputs = [x.double() for x in streams(2, 7, 13, 3, 16, torch.float32)]
    pairs = zip(inputs[:3], inputs[3:], strict=True)
    whole = attention.reference(*(torch.cat([b, a] if image_first else [a, b], 1) for a, b in pairs))
    text, image = reversed(whole.split([13, 7], 1)) if image_first else whole.split([7, 13], 1)
    results = reference(*inputs)
    # Two orders of summation in float64.
    torch.testing.assert_close(results, (text, image), rtol=1e-12, atol=1e-12)
    assert all(x.is_contiguous() for x in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(
    ("text", "image"), [(1, 1), (77, 65), (64, 128), (13, 150), (128, 63), (0, 70), (70, 0)], ids=str
)
def test_kernel(
    interpret: Any, output: Any, assert_exact: Any, dtype: torch.dtype, dim: int, text: int, image: int
) -> None:
    inputs = streams(2, text, image, 2, dim, dtype)
    outs = [output(2, n, 2, dim, dtype=dtype) for n in (text, image)]
    interpret(launch, *inputs, *outs, TILES)
    for out, exact, low in zip(outs, reference(*(x.double() for x in inputs)), reference(*inputs), strict=True):
        assert_exact(out, exact, low)


@pytest.mark.full
@pytest.mark.parametrize(("dim", "text", "image"), [(64, 333, 4096), (128, 512, 4096)], ids=["SD3", "Flux"])
def test_kernel_on_whole_images(
    interpret: Any, output: Any, assert_exact: Any, dim: int, text: int, image: int
) -> None:
    inputs = streams(1, text, image, 1, dim, torch.float16)
    outs = [output(1, n, 1, dim, dtype=torch.float16) for n in (text, image)]
    interpret(launch, *inputs, *outs, Config("kernel", 128, 128, 8, 2))
    for out, exact, low in zip(outs, reference(*(x.double() for x in inputs)), reference(*inputs), strict=True):
        assert_exact(out, exact, low)


def test_streams_may_lie_in_one_buffer_in_odd_places(interpret: Any, assert_exact: Any) -> None:
    tokens = streams(2, 10, 100, 2, 64, torch.float16)
    buffer = torch.full((2, 110, 3 * 2 * 64 + 3), math.nan, dtype=torch.float16)
    together = [buffer[..., 3 + i * 128 : 131 + i * 128].unflatten(2, (2, 64)) for i in range(3)]
    inputs = [part.copy_(x) for part, x in zip([x[:, 100:] for x in together], tokens[:3], strict=True)]
    inputs += [part.copy_(x) for part, x in zip([x[:, :100] for x in together], tokens[3:], strict=True)]
    out = torch.full((2, 110, 2, 64), math.nan, dtype=torch.float16)
    interpret(launch, *inputs, out[:, 100:], out[:, :100], TILES)  # image first, as SD3
    exact, low = reference(*(x.double() for x in tokens)), reference(*tokens)
    assert_exact(out, torch.cat(exact[::-1], 1), torch.cat(low[::-1], 1))


def test_every_tensor_has_its_own_strides(interpret: Any, assert_exact: Any) -> None:
    inputs = streams(2, 70, 90, 2, 64, torch.float16)
    spread = [
        torch.full((2, x.shape[1], 2 + i, 64 + 8 * i), math.nan, dtype=x.dtype)[:, :, :2, :64].copy_(x)
        for i, x in enumerate((*inputs, *(torch.full_like(x, math.nan) for x in (inputs[0], inputs[3]))))
    ]
    interpret(launch, *spread, TILES)
    for out, exact, low in zip(spread[6:], reference(*(x.double() for x in inputs)), reference(*inputs), strict=True):
        assert_exact(out, exact, low)


@pytest.mark.parametrize("stream", [0, 1], ids=["text", "image"])
def test_a_nan_of_either_stream_reaches_both(interpret: Any, stream: int) -> None:
    inputs = [x.contiguous() for x in streams(1, 10, 70, 1, 64, torch.float16)]
    inputs[3 * stream + 2][0, 3, 0, 5] = math.nan
    outs = [torch.zeros(1, n, 1, 64, dtype=torch.float16) for n in (10, 70)]
    interpret(launch, *inputs, *outs, TILES)
    for out, expected in zip(outs, reference(*inputs), strict=True):
        assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().sum() == out.shape[1]


def test_the_order_of_the_streams_changes_only_roundings(interpret: Any, assert_exact: Any) -> None:
    inputs = streams(1, 40, 90, 1, 64, torch.float16)
    outs = [torch.full((1, n, 1, 64), math.nan, dtype=torch.float16) for n in (90, 40)]
    interpret(launch, *inputs[3:], *inputs[:3], *outs, TILES)
    for out, exact, low in zip(outs[::-1], reference(*(x.double() for x in inputs)), reference(*inputs), strict=True):
        assert_exact(out, exact, low)


@pytest.mark.parametrize("batch", [1, 2])  # one image's tokens lie together: results must not share memory
def test_ops(check_op: Any, batch: int) -> None:
    inputs = streams(batch, 5, 9, 2, 16, torch.float32)
    check_op(joint_attention.joint_attention, *inputs)
    outs = [torch.zeros(batch, n, 4, 16)[:, :, 1:3] for n in (5, 9)]
    check_op(joint_attention.joint_attention_out, *inputs, *outs)


def test_launch_on_a_gpu(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "choose", lambda *key: Config("kernel", 128, 64, 4, 3))
    (call,) = launches(joint_attention.joint_attention, *streams(2, 333, 500, 3, 64, torch.bfloat16))
    assert (call.kernel, call.grid) == ("_joint_attention_kernel", ((3 + 4) * 6, 1, 1))
    assert call.written == {"out_text_ptr", "out_image_ptr"}
    assert (call.arguments["TAIL_TEXT"], call.arguments["TAIL_IMAGE"], call.arguments["UNIT"]) == (True, True, 8)


def test_a_head_dimension_without_rows_runs_in_torch() -> None:
    assert configs.choose("joint_attention", 90, 40, 4429) is None


TEXT = torch.zeros(2, 5, 3, 64)
IMAGE = torch.zeros(2, 7, 3, 64)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((TEXT, TEXT, IMAGE, IMAGE, IMAGE, IMAGE), "v is [2, 7, 3, 64]; it must be [2, 5, 3, 64]"),
        ((TEXT, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE), "q and k of the text are [2, 5, 3, 64] and [2, 7, 3, 64]"),
        ((TEXT[:1],) * 3 + (IMAGE,) * 3, "Text has (batch, heads, head_dim) [1, 3, 64]"),
        ((TEXT.half(),) * 3 + (IMAGE,) * 3, "in torch.float16 on cpu, image [2, 3, 64] in torch.float32"),
        ((TEXT,) * 3 + (IMAGE,) * 3 + (IMAGE, IMAGE), "out must be [2, 5, 3, 64], as q"),
    ],
    ids=range(5),
)
def test_refusals(inputs: tuple[Tensor, ...], message: str) -> None:
    op = joint_attention.joint_attention if len(inputs) == 6 else joint_attention.joint_attention_out
    with pytest.raises(ValueError) as error:
        op(*inputs)
    assert message in str(error.value)


@pytest.mark.parametrize(("dim", "arch"), [(64, 80), (128, 90)])
def test_a_variant_compiles_clean(dim: int, arch: int) -> None:
    variants = (v for v in joint_attention.VARIANTS if v.constexprs["D"] == dim and arch in v.arches)
    report = aot.compile_variant("joint_attention", next(variants), arch)
    assert not report.failures
