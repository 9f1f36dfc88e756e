"""Ahead of time: machine code of every kernel without a GPU, and ops in exported and compiled programs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd_kernels import aot, geglu, modulate
from fastsd_kernels.gate_residual import gate_residual, gate_residual_modulate
from fastsd_kernels.geglu import geglu as geglu_op
from fastsd_kernels.group_norm_silu import group_norm_silu
from fastsd_kernels.launch import ARCHES, Variant, jit, next_power_of_2, tl, triton
from fastsd_kernels.modulate import modulate as modulate_op
from fastsd_kernels.qk_norm_rope import qk_norm_rope
from fastsd_kernels.quantize import quantize_gelu, quantize_modulate, quantize_rowwise
from fastsd_kernels.step import step

OPS = {"gate_residual", "geglu", "group_norm_silu", "modulate", "qk_norm_rope", "quantize", "step"}


def module_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m fastsd_kernels.aot` in a process of its own."""
    command = [sys.executable, "-m", "fastsd_kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("arch", ARCHES)
def test_a_kernel_compiles_for_every_architecture(arch: int) -> None:
    report = aot.compile_variant("geglu", geglu.VARIANTS[0], arch)
    assert not report.failures
    assert (report.warps, report.stack, report.shared, report.mma) == (4, 0, 0, {})
    assert 16 <= report.registers <= 64 and report.wide and 0.5 <= report.occupancy <= 1


@jit
def _product_kernel(x, y, out, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inner = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, WIDTH)
    left = tl.load(x + row * WIDTH + inner[None, :])
    right = tl.load(y + inner[:, None] * SIZE + column)
    tl.store(out + row * SIZE + column, tl.dot(left, right))


@jit
def _strided_kernel(x, stride, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, SIZE)
    values = tl.load(x + index * stride)
    tl.store(out + index, tl.sort(values))


def product(size: int, width: int, kind: str = "fp16", **options: Any) -> Variant:
    signature = {"x": f"*{kind}", "y": f"*{kind}", "out": "*fp32"}
    return Variant("product", _product_kernel, signature, {"SIZE": size, "WIDTH": width}, **{"num_warps": 4, **options})


@pytest.mark.parametrize(("arch", "mnemonic"), [(80, "HMMA"), (89, "HMMA"), (90, "HGMMA")])
def test_tensor_cores_are_seen(arch: int, mnemonic: str) -> None:
    report = aot.compile_variant("test", product(64, 64, mma=True), arch)
    assert not report.failures and set(report.mma) == {mnemonic}


def test_what_is_wrong_is_found() -> None:
    plain = aot.compile_variant("test", geglu.VARIANTS[0]._replace(mma=True), 90)
    assert plain.failures == ("uses no tensor cores",)
    small = aot.compile_variant("test", product(16, 16, mma=True, num_warps=1, wide=False), 90)
    assert small.failures == ("uses no tensor cores",) and "HMMA" in small.mma  # the older ones, at half the speed
    spilling = aot.compile_variant("test", product(128, 128, num_warps=1), 80)
    assert any("bytes of local memory, more than 0" in failure for failure in spilling.failures)
    large = aot.compile_variant("test", product(128, 512, num_warps=8), 89)
    assert any("bytes of shared memory, more than sm_89's 101376" in failure for failure in large.failures)
    narrow = Variant("x", _strided_kernel, {"x": "*fp16", "stride": "i32", "out": "*fp16"}, {"SIZE": 32}, 1)
    assert aot.compile_variant("test", narrow, 90).failures == ("has no 16-byte loads",)
    broken = geglu.VARIANTS[0]._replace(constexprs={"ROWS": 8, "BLOCK": 100})
    (failure,) = aot.compile_variant("test", broken, 90).failures
    assert failure.startswith("does not compile: CompilationError:")
    forgotten = geglu.VARIANTS[0]._replace(constexprs={"ROWS": 8})
    (failure,) = aot.compile_variant("test", forgotten, 90).failures
    assert "missing or unknown arguments: BLOCK" in failure


def test_variants_are_named_once_and_are_of_every_module() -> None:
    found = list(aot.variants())
    assert {op for op, _ in found} >= OPS
    names = [(op, variant.name, arch) for op, variant in found for arch in variant.arches]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="There are no kernels in 'launch'; modules of fastsd_kernels are aot, "):
        list(aot.variants("launch"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    variants = modulate.VARIANTS[:1]
    monkeypatch.setattr(modulate, "VARIANTS", variants)
    assert aot.main(["--op", "modulate", "--arch", "90", "--arch", "89", "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == [
        "op",
        "variant",
        "sm",
        "warps",
        "regs",
        "stack",
        "shared",
        "occupancy",
        "mma",
        "wide",
    ]
    assert f"modulate {variants[0].name}" in out and out.splitlines()[-1] == "2 compiled, 0 failed"
    first, second = json.loads((tmp_path / "x.json").read_text())
    assert (first["arch"], second["arch"], first["failures"]) == (89, 90, [])
    monkeypatch.setattr(modulate, "VARIANTS", (variants[0]._replace(mma=True),))
    assert aot.main(["--op", "modulate", "--arch", "90"]) == 1
    assert "uses no tensor cores" in capsys.readouterr().out
    assert aot.main(["--op", "nothing"]) == 2
    assert "There are no kernels in 'nothing'" in capsys.readouterr().err


def test_it_does_not_pretend_to_compile_while_interpreting() -> None:
    run = module_run("--op", "geglu", TRITON_INTERPRET="1")
    assert run.returncode == 2 and "without TRITON_INTERPRET=1" in run.stderr


def test_without_triton_ops_run_their_references() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from fastsd_kernels import aot, attention, gate_residual, group_norm_silu, modulate, qk_norm_rope, quantize, step
from fastsd_kernels.geglu import geglu
print(torch.compile(geglu, backend="eager")(torch.ones(1, 2, 4)).shape, aot.main([]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "torch.Size([1, 2, 2]) 2\n" and "Compiling needs Triton" in run.stderr


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (2432, 4096)])
def test_next_power_of_2(n: int, power: int) -> None:
    assert next_power_of_2(n) == power


@pytest.mark.full
def test_every_variant_on_every_architecture(tmp_path: Path) -> None:
    run = module_run("--json", str(tmp_path / "reports.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    reports = json.loads((tmp_path / "reports.json").read_text())
    expected = [(op, variant.name, arch) for op, variant in aot.variants() for arch in variant.arches]
    assert [(report["op"], report["variant"], report["arch"]) for report in reports] == expected


@pytest.mark.full
def test_every_variant_by_the_triton_of_another_torch(install: Callable[..., Path], tmp_path: Path) -> None:
    """torch 2.11 comes with Triton 3.6.0, 2.13 with 3.7.1: the one that is not installed is, beside."""
    version = "3.7.1" if triton.__version__ == "3.6.0" else "3.6.0"
    target = install(f"triton=={version}")
    run = module_run(PYTHONPATH=str(target), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(f"Triton {version}\n")


class AllOps(torch.nn.Module):
    """Every functional and every in-place op of this folder, as a model would call them."""

    def forward(self, x: Tensor, rows: Tensor, rotary: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        shift, scale, gate = rows.chunk(3, dim=-1)
        normed = modulate_op(x, shift, scale)
        qkv = torch.cat([normed] * 3, dim=-1).unflatten(-1, (3, 2, -1))
        qk_norm_rope(qkv, torch.ones(qkv.shape[-1]), torch.ones(qkv.shape[-1]), rotary)
        update = geglu_op(torch.cat([normed, x], dim=-1)) + qkv.sum(2).flatten(2)
        total = gate_residual(x, gate, update)
        q, scales = quantize_rowwise(total)
        q_gelu, scales_gelu = quantize_gelu(total)
        channels = image.shape[1]
        features = group_norm_silu(image, 2, torch.ones(channels), torch.zeros(channels))
        total, following = gate_residual_modulate(total, gate, update, shift, scale)
        q_normed, scales_normed = quantize_modulate(total, shift, scale)

        latents = image.flatten(1)
        batch, size = latents.shape
        states, predictions = torch.stack([latents, latents]), latents.new_zeros(1, batch, size)
        coefficients = torch.tensor([[[2.0, 0.5, 1, 0, -0.1]]]).expand(1, batch, 5).contiguous()
        model_input = torch.cat([latents, latents])
        nonfinite = torch.zeros(batch, dtype=torch.bool)
        history = (latents.new_zeros(0, batch, size), states, predictions)
        step(
            torch.cat([latents, features.flatten(1)]),
            coefficients,
            torch.zeros(1).int(),
            *history,
            model_input,
            nonfinite,
        )

        quantized = (q.float() * scales, q_gelu.float() * scales_gelu, q_normed.float() * scales_normed)
        return total, following, features, *quantized, states, predictions, model_input, nonfinite


def model_inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 16), torch.randn(2, 48), torch.randn(2, 5, 4), torch.randn(2, 4, 6, 5)


def test_a_model_of_ops_compiles_and_exports() -> None:
    inputs = model_inputs()
    expected = AllOps()(*inputs)
    torch.testing.assert_close(torch.compile(AllOps(), fullgraph=True)(*inputs), expected)
    batch = torch.export.Dim("batch", min=2, max=16)
    shapes = tuple({0: batch} if i != 2 else None for i in range(4))
    program = torch.export.export(AllOps(), inputs, dynamic_shapes=shapes)
    larger = tuple(torch.cat([x, x]) if i != 2 else x for i, x in enumerate(inputs))
    torch.testing.assert_close(program.module()(*larger), AllOps()(*larger))


@pytest.mark.full
def test_a_model_of_ops_in_aotinductor(tmp_path: Path) -> None:
    inputs = model_inputs()
    program = torch.export.export(AllOps(), inputs)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "ops.pt2"))
    torch.testing.assert_close(tuple(torch._inductor.aoti_load_package(package)(*inputs)), AllOps()(*inputs))
