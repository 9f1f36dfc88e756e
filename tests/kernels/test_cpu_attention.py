"""The attention kernel of the CPU: its results, its op, and how it comes into graphs."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F

from fastsd_kernels import cpu_attention
from fastsd_kernels.cpu_attention import reference, substitute

# A processor's feature, as a GPU is: elsewhere there is no kernel, and graphs keep torch's attention.
needs_avx512_bf16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="the kernel is for CPUs with AVX512-BF16"
)
kernel = torch.ops.fastsd.cpu_attention.default


@pytest.fixture(scope="session", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    if not torch.cpu._is_avx512_bf16_supported():
        assert "AVX512-BF16" in str(cpu_attention.reason())
        return folder
    assert cpu_attention.reason() is None
    path = cpu_attention.build(folder)
    cpu_attention.load(path)
    return path


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1) @ v).transpose(1, 2)


@needs_avx512_bf16
@pytest.mark.parametrize("dim", [2, 16, 34, 40, 64, 80, 96, 112, 128, 144, 160])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (23, 63), (24, 64), (65, 77), (49, 257), (100, 1333)], ids=str)
def test_kernel(assert_exact: Any, dim: int, queries: int, keys: int) -> None:
    q, k, v = random(2, queries, 3, dim), random(2, keys, 3, dim, seed=1), random(2, keys, 3, dim, seed=2)
    assert_exact(kernel(q, k, v), exact(q, k, v), reference(q, k, v))


@needs_avx512_bf16
@pytest.mark.parametrize("keys", [4096, 4429, 4608], ids=["SD1 and SDXL", "SD3", "Flux"])
def test_kernel_on_the_key_lengths_of_real_models(assert_exact: Any, keys: int) -> None:
    q, k, v = random(1, 30, 2, 64), random(1, keys, 2, 64, seed=1), random(1, keys, 2, 64, seed=2)
    assert_exact(kernel(q, k, v), exact(q, k, v), reference(q, k, v))


@needs_avx512_bf16
def test_slices_of_one_buffer_and_other_strides(assert_exact: Any) -> None:
    packed = random(2, 50, 3, 4, 40)
    q, k, v = packed.unbind(2)
    assert_exact(kernel(q, k, v), exact(q, k, v), reference(q, k, v))
    heads_first = [random(2, 4, 50, 40, seed=seed).transpose(1, 2) for seed in range(3)]
    assert_exact(kernel(*heads_first), exact(*heads_first), reference(*heads_first))
    columns_apart = [random(2, 50, 4, 80, seed=seed)[..., ::2] for seed in range(3)]
    assert_exact(kernel(*columns_apart), exact(*columns_apart), reference(*columns_apart))


@needs_avx512_bf16
def test_one_prompt_for_all_images() -> None:
    q, k, v = random(3, 20, 2, 16), random(1, 7, 2, 16, seed=1), random(1, 7, 2, 16, seed=2)
    assert torch.equal(kernel(q, k, v), kernel(q, *(x.expand(3, -1, -1, -1).contiguous() for x in (k, v))))


@needs_avx512_bf16
def test_scores_far_apart_neither_overflow_nor_vanish(assert_exact: Any) -> None:
    q, k, v = random(1, 30, 1, 64) * 30, random(1, 300, 1, 64, seed=1) * 30, random(1, 300, 1, 64, seed=2)
    assert_exact(kernel(q, k, v), exact(q, k, v), reference(q, k, v))
    rising = k * torch.linspace(0, 1, 300).bfloat16()[:, None, None]  # the maximum is found again in every block
    assert_exact(kernel(q, rising, v), exact(q, rising, v), reference(q, rising, v))


@needs_avx512_bf16
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_what_is_not_finite_spreads_as_in_torch(value: float, place: int) -> None:
    given = [random(1, 40, 2, 32, seed=seed) for seed in range(3)]
    given[place][0, 7, 1, 3] = value
    ours, theirs = kernel(*given), reference(*(x.float() for x in given))
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.isfinite(ours[:, :, 0]).all()  # the other head


@needs_avx512_bf16
def test_bits_depend_on_neither_neighbours_nor_threads() -> None:
    q, k, v = (random(3, 200, 5, 40, seed=seed) for seed in range(3))
    whole, threads = kernel(q, k, v), torch.get_num_threads()
    alone = [kernel(*(x[i : i + 1, :, j : j + 1] for x in (q, k, v))) for i in range(3) for j in range(5)]
    assert torch.equal(whole, torch.cat([torch.cat(alone[5 * i : 5 * i + 5], 2) for i in range(3)]))
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, kernel(q, k, v))
    finally:
        torch.set_num_threads(threads)


@needs_avx512_bf16
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (1, 0, 2, 8), (1, 5, 0, 8)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    q = random(*shape)
    k = random(shape[0], 3, *shape[2:])
    assert kernel(q, k, k).shape == shape


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        (random(1, 4, 2, 8).float(), random(1, 4, 2, 8), random(1, 4, 2, 8)),
        (random(1, 4, 2, 7), random(1, 4, 2, 7), random(1, 4, 2, 7)),
        (random(1, 4, 2, 162), random(1, 4, 2, 162), random(1, 4, 2, 162)),
        (random(1, 4, 2, 8), random(1, 4, 3, 8), random(1, 4, 3, 8)),
        (random(1, 4, 2, 8), random(1, 4, 2, 8), random(1, 5, 2, 8)),
        (random(1, 4, 2, 8), random(1, 0, 2, 8), random(1, 0, 2, 8)),
    ],
    ids=["dtype", "odd", "wide", "heads", "keys", "no keys"],
)
def test_other_shapes_are_refused(q: Tensor, k: Tensor, v: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        kernel(q, k, v)


@needs_avx512_bf16
def test_op() -> None:
    torch.library.opcheck(kernel, tuple(random(2, 9, 3, 16, seed=seed) for seed in range(3)))


class Model(nn.Module):
    """One attention that fits, and those that do not."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
        plain = F.scaled_dot_product_attention(q, k, v)
        others = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            F.scaled_dot_product_attention(q, k, v, scale=1.0),
            F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
            F.scaled_dot_product_attention(q[..., :7], k[..., :7], v[..., :7]),
        )
        return (plain.transpose(1, 2).flatten(2), *others)


@needs_avx512_bf16
def test_substitution_in_a_compiled_graph() -> None:
    x, mask, counts = random(2, 30, 3, 4, 16), random(30, 30), []

    def compiler(graph: Any, inputs: Any) -> Any:
        counts.append(substitute(graph))
        return compile_fx(graph, inputs)

    with torch.inference_mode():
        results = torch.compile(Model(), backend=compiler, fullgraph=True)(x, mask)
        expected = Model()(x, mask)
    assert counts == [1]
    assert torch.equal(results[0], kernel(*x.unbind(2)).flatten(2))
    for result, other in zip(results[1:], expected[1:], strict=True):  # torch's own attention, compiled and not
        torch.testing.assert_close(result, other, rtol=2e-2, atol=2e-2)


@needs_avx512_bf16
def test_substitution_in_an_exported_graph() -> None:
    x, mask = random(2, 30, 3, 4, 16), random(30, 30)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    dynamic = ({1: tokens}, {0: tokens, 1: tokens})
    program = torch.export.export(Model(), (x, mask), dynamic_shapes=dynamic)
    assert substitute(program.graph_module) == 1
    assert substitute(program.graph_module) == 0  # there is nothing left
    longer, mask = random(2, 77, 3, 4, 16), random(77, 77)
    for result, expected in zip(program.module()(longer, mask), Model()(longer, mask), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


@needs_avx512_bf16
def test_compiled_once_and_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cpu_attention.build(tmp_path / "made")
    stamp = first.stat().st_mtime_ns
    assert cpu_attention.build(tmp_path / "made") == first and first.stat().st_mtime_ns == stamp
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++")
    monkeypatch.setattr(cpu_attention, "SOURCE", broken)
    with pytest.raises(RuntimeError, match=r"failed on broken\.cpp: .*error"):
        cpu_attention.build(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_no_compiler_is_said(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from fastsd_kernels import cpu_attention as c; import torch\n"
        "torch.cpu._is_avx512_bf16_supported = lambda: True\n"
        "print(c.reason())\n"
        "try: c.build(Path('nowhere'))\n"
        "except RuntimeError as error: print(error)\n"
        "x = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)\n"
        "try: c.cpu_attention(x, x, x)\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert first == second == "there is no C++ compiler: install g++ or clang++, or name one in CXX"
    assert "not loaded" in third
