"""Every backend of a checkpoint, in every dtype, against float32 modules on the same weights: one call, and whole runs.

The packages of AOTInductor are held against float32 by `fastsd export` itself (`tests/export/test_aoti.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsd.checkpoint import resolve
from fastsd.pipeline import Pipeline, Timings
from fastsd.request import check

CALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 4, "seed": 3}
PROMPT = "a red cat"
# Of a call the least cosine, and of the last latents the least ratio of their peak to the error, in dB. Rounding to p
# bits after every operation leaves about 2^-p of a value, random from value to value: 4e-3 in bfloat16, whose cosine is
# 1 - 8e-6 for one rounding and falls with the square of what many add up to; 5e-4 in float16. A run of 4 steps adds
# four calls' errors, and guidance multiplies the difference of two.
BOUNDS = {torch.float32: (1 - 1e-9, 90.0), torch.float16: (1 - 2e-6, 50.0), torch.bfloat16: (1 - 1e-4, 35.0)}
FAMILIES = ("sd", "sdxl", "sd3", "flux", "demo")


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(scope="module")
def reference(make_checkpoint: Callable[..., Path]) -> Callable[[str, torch.dtype], tuple[Path, Pipeline]]:
    """The folder of a family, and the float32 pipeline on its weights rounded to a dtype."""
    made: dict[tuple[str, torch.dtype], tuple[Path, Pipeline]] = {}

    def make(family: str, dtype: torch.dtype) -> tuple[Path, Pipeline]:
        if (family, dtype) not in made:
            folder = resolve("demo") if family == "demo" else make_checkpoint(family)
            exact = Pipeline.from_pretrained(folder, dtype="float32", device="cpu", backend="eager")
            parts = exact.components
            for module in (parts.denoiser, parts.vae, *filter(None, parts.text_encoders)):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype).float()
            made[family, dtype] = folder, exact
        return made[family, dtype]

    return make


def calls(pipe: Pipeline, exact: Pipeline) -> Iterator[tuple[Tensor, Tensor]]:
    """Predictions of both at four steps, from the same latents and text."""
    request = check(exact, PROMPT, **CALL)
    guided = any(table.guided for table in request.tables)
    batch = 2 if guided else 1
    latents = torch.randn(1, *request.noise_shape, generator=torch.Generator().manual_seed(0)).expand(batch, -1, -1, -1)
    timesteps = np.repeat(request.tables[0].timestep[:, None], batch, axis=1)
    size = request.noise_shape[1:]
    constants = [
        one.functions.prepare(timesteps, one._condition(request, guided, Timings()), size) for one in (pipe, exact)
    ]
    for row in range(len(timesteps)):
        results = [
            one.functions.denoise(latents.float(), modulation[row], *others)
            for one, (modulation, *others) in zip((pipe, exact), constants, strict=True)
        ]
        yield results[0].double().flatten(), results[1].double().flatten()


CASES = [
    *(pytest.param("eager", dtype, id=f"eager-{str(dtype)[6:]}") for dtype in BOUNDS),
    *(
        pytest.param("compile", dtype, id=f"compile-{str(dtype)[6:]}", marks=pytest.mark.full)
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_float32(reference: Any, family: str, backend: str, dtype: torch.dtype) -> None:
    folder, exact = reference(family, dtype)
    pipe = Pipeline.from_pretrained(folder, dtype=dtype, device="cpu", backend=backend)
    assert pipe.backend == backend
    cosine, decibels = BOUNDS[dtype]
    for result, expected in calls(pipe, exact):
        assert torch.cosine_similarity(result, expected, dim=0) >= cosine
        if dtype == torch.float32:
            assert (result - expected).norm() <= 1e-5 * expected.norm()
    latents, want = (one(PROMPT, output_type="latent", **CALL).images for one in (pipe, exact))
    psnr = 10 * torch.log10(want.abs().max() ** 2 / (latents - want).square().mean().clamp(min=1e-30))
    assert psnr >= decibels, f"{psnr:.1f} dB"
