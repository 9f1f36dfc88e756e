from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels.qk_norm_rope import launch, qk_norm_rope, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype, rotate: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Packed queries, keys and values, weights of their norms, and the rotations of some of more tokens."""
    torch.manual_seed(0)
    qkv = (2 * torch.randn(batch, length, 3, heads, width)).to(dtype)
    q_weight, k_weight = (1 + torch.randn(2, width) / 4).to(dtype)
    angle = 10 * torch.rand(length + 5, max(width // 2, 1))
    rotary = torch.stack([angle.cos(), angle.sin()])[:, 3 : 3 + length] if rotate else None
    return qkv, q_weight, k_weight, rotary


def changed(qkv: Tensor, *arguments: Any) -> Tensor:
    out = qkv.clone()
    reference(out, *arguments)
    return out


def in_low_precision(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Tensor | None) -> Tensor:
    """As the models run it: the norm rounds, then diffusers rotates in float32."""
    from diffusers.models.embeddings import apply_rotary_emb

    q, k, v = qkv.unbind(2)
    parts = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
        if rotary is not None:
            cos, sin = rotary.repeat_interleave(2, dim=-1)
            x = apply_rotary_emb(x, (cos, sin), sequence_dim=1)
        parts.append(x)
    return torch.stack([*parts, v], dim=2)


@pytest.mark.parametrize("rotate", [True, False], ids=["flux", "sd35"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 16), (1, 1, 1, 2), (1, 33, 9, 64), (1, 3, 24, 128), (1, 4, 2, 40)], ids=str
)
def test_kernel(
    interpret: Any, output: Any, assert_exact: Any, shape: tuple[int, ...], dtype: torch.dtype, rotate: bool
) -> None:
    qkv, q_weight, k_weight, rotary = inputs(*shape, dtype=dtype, rotate=rotate)
    out = output(*qkv.shape, dtype=dtype)
    out.copy_(qkv)
    interpret(launch, q_weight, k_weight, rotary, 1e-6, out)
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])  # the values
    exact = changed(qkv.double(), q_weight.double(), k_weight.double(), rotary)
    assert_exact(out, exact, in_low_precision(qkv, q_weight, k_weight, rotary))


@pytest.mark.parametrize("rotate", [True, False])
def test_text_and_image_are_two_calls_on_one_buffer(interpret: Any, rotate: bool) -> None:
    qkv, q_weight, k_weight, rotary = inputs(2, 12, 2, 8, torch.float32, rotate)
    expected = qkv.clone()
    for tokens, weights in ((slice(0, 5), (q_weight, k_weight)), (slice(5, 12), (k_weight, q_weight))):
        table = None if rotary is None else rotary[:, tokens]
        reference(expected[:, tokens], *weights, table)
        interpret(launch, *weights, table, 1e-6, qkv[:, tokens])
    torch.testing.assert_close(qkv, expected)


@pytest.mark.parametrize("part", [0, 1])
def test_queries_or_keys_alone(interpret: Any, part: int) -> None:
    qkv, q_weight, k_weight, rotary = inputs(2, 5, 3, 8, torch.float32)
    expected = changed(qkv, q_weight, k_weight, rotary)[:, :, part].clone()
    before = qkv.clone()
    interpret(launch, (q_weight, k_weight)[part], None, rotary, 1e-6, qkv[:, :, part : part + 1])
    torch.testing.assert_close(qkv[:, :, part], expected)
    others = [i for i in range(3) if i != part]
    assert torch.equal(qkv[:, :, others], before[:, :, others])


def test_rotation_alone(interpret: Any) -> None:
    qkv, _, _, rotary = inputs(1, 5, 3, 8, torch.float32)
    expected = changed(qkv, None, None, rotary)
    interpret(launch, None, None, rotary, 1e-6, qkv)
    torch.testing.assert_close(qkv, expected)


def test_no_tokens(interpret: Any) -> None:
    qkv, q_weight, k_weight, rotary = inputs(1, 0, 3, 8, torch.float32)
    interpret(launch, q_weight, k_weight, rotary, 1e-6, qkv)
    qk_norm_rope(qkv, q_weight, k_weight, rotary)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_spoils_its_head_alone(interpret: Any, value: float) -> None:
    qkv, q_weight, k_weight, rotary = inputs(1, 5, 3, 8, torch.float32)
    qkv[0, 2, 1, 1, 3] = value
    expected = changed(qkv, q_weight, k_weight, rotary)
    interpret(launch, q_weight, k_weight, rotary, 1e-6, qkv)
    torch.testing.assert_close(qkv, expected, equal_nan=True)


def test_reference_is_torch_and_diffusers() -> None:
    qkv, q_weight, k_weight, rotary = inputs(2, 5, 3, 16, torch.float32)
    expected = in_low_precision(qkv, q_weight, k_weight, rotary)
    torch.testing.assert_close(changed(qkv, q_weight, k_weight, rotary), expected)


@pytest.mark.parametrize("rotate", [True, False], ids=["flux", "sd35"])
def test_it_is_what_the_transformers_compute(rotate: bool) -> None:
    from fastsd.denoisers.transformer import SelfAttention

    layer = SelfAttention(48, 3, qk_norm=True)
    torch.nn.init.normal_(layer.norm_q.weight)  # type: ignore[arg-type]
    x, rotary = torch.randn(2, 5, 48), inputs(2, 5, 3, 16, torch.float32, rotate)[3]
    expected = torch.stack(layer.qkv(x, rotary), dim=2)
    weight = torch.cat([p.weight for p in (layer.to_q, layer.to_k, layer.to_v)])
    bias = torch.cat([p.bias for p in (layer.to_q, layer.to_k, layer.to_v)])
    with torch.no_grad():
        qkv = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (3, 3, 16))
        qk_norm_rope(qkv, layer.norm_q.weight, layer.norm_k.weight, rotary)  # type: ignore[arg-type]
    torch.testing.assert_close(qkv, expected)


def test_op(check_op: Any) -> None:
    qkv, *rest = inputs(2, 5, 3, 16, torch.float32)
    check_op(qk_norm_rope, qkv, *rest)
    check_op(qk_norm_rope, qkv, None, None, rest[-1])


def test_launch_on_a_gpu(launches: Any) -> None:
    (call,) = launches(qk_norm_rope, *inputs(2, 77, 24, 128, torch.bfloat16))
    assert (call.kernel, call.grid, call.written) == ("_qk_norm_rope_kernel", (77, 2, 1), {"qkv"})
    assert call.arguments["part_stride"] == 24 * 128 and call.arguments["rotary_part"] == 82 * 64
    (call,) = launches(qk_norm_rope, *inputs(2, 77, 24, 64, torch.bfloat16, rotate=False))
    assert (call.arguments["ROTATE"], call.arguments["NORM"], call.arguments["PARTS"]) == (False, True, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.randn(2, 5, 8)}, r"qkv is \[2, 5, 8\]; it must be \[batch, tokens, parts, heads, width\]"),
        ({"qkv": torch.randn(2, 5, 3, 3, 8).mT}, r"qkv has stride 8 along its width"),
        ({"k_weight": None}, "Only one of q_weight and k_weight is given; it must be both or none"),
        ({"q_weight": torch.ones(4)}, r"q_weight is \[4\]; it must be \[8\]"),
        ({"rotary": torch.ones(2, 4, 4)}, r"rotary is \[2, 4, 4\]; it must be \[2, 5, 4\]"),
        ({"rotary": torch.ones(2, 5, 4).half()}, r"rotary is torch\.float16; it must be torch\.float32"),
        ({"rotary": torch.ones(2, 5, 4, device="meta")}, r"rotary is on meta"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    right = dict(zip(("qkv", "q_weight", "k_weight", "rotary"), inputs(2, 5, 3, 8, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**right, **change})


def test_an_odd_width_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="qkv has the odd width 7; to be rotated it must be even"):
        qk_norm_rope(torch.randn(1, 5, 3, 2, 7), None, None, torch.ones(2, 5, 3))
