"""Noise against its oracle, torch's CPU generator."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.errors import InputError
from fastsd.sampling.noise import NoiseStream, noise_source

# torch's vectorised log, sin and cos differ from numpy's in the last bits of values up to 6.
TOLERANCE = 1e-6

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**53 + 1, 2**63 - 1)
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 100, 468, 1000, 16384, 65537)


def torch_draws(seed: int, sizes: list[int]) -> list[Any]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(size, generator=generator).numpy() for size in sizes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch(seed: int, size: int) -> None:
    got = NoiseStream(seed).normal((size,))
    assert got.dtype == np.float32
    assert np.abs(got - torch_draws(seed, [size])[0]).max() <= TOLERANCE


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 70), min_size=1, max_size=30))
def test_draws_continue_the_stream(seed: int, sizes: list[int]) -> None:
    """Below 16 values torch keeps the second value of a pair, over draws of any size in between."""
    stream = NoiseStream(seed)
    for size, wanted in zip(sizes, torch_draws(seed, sizes), strict=True):
        got = stream.normal((size,))
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max(initial=0) <= TOLERANCE


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (4, 9, 13), (2, 3), (), (0,), (16, 1, 1)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(7)).numpy()
    got = NoiseStream(7).normal(shape)
    assert got.shape == shape
    assert np.abs(got - wanted).max(initial=0) <= TOLERANCE


def test_a_draw_is_the_callers_own() -> None:
    stream = NoiseStream(0)
    first = stream.normal((32,))
    kept = first.copy()
    stream.normal((32,))
    assert np.array_equal(first, kept)


def test_a_million_values_are_standard_normal() -> None:
    values = NoiseStream(3).normal((1_000_000,))
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 4e-3 and abs(values.std() - 1) < 4e-3  # four standard errors


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 1.0, "1", None, True, float("nan"), [1]], ids=repr)
def test_seeds_that_are_refused(seed: Any) -> None:
    for make in (NoiseStream, noise_source):
        with pytest.raises(InputError, match=r"from 0 to 2\*\*63 - 1") as error:
            make(seed)
        assert "\n" not in str(error.value)


def test_numpy_integers_are_seeds() -> None:
    for seed in (np.int64(5), np.uint8(5)):
        assert np.array_equal(noise_source(seed)((20,)), NoiseStream(5).normal((20,)))


def test_a_callers_generator_moves_on_as_in_diffusers() -> None:
    generator, same = (torch.Generator().manual_seed(9) for _ in range(2))
    source = noise_source(generator)
    for shape in ((4, 8, 8), (3,), (4, 8, 8)):
        got = source(shape)
        assert isinstance(got, torch.Tensor) and got.dtype == torch.float32
        assert torch.equal(got, torch.randn(shape, generator=same))
    assert torch.equal(generator.get_state(), same.get_state())


def test_a_run_with_numpy_imports_no_torch() -> None:
    program = """
import sys, numpy as np
from fastsd.sampling.loop import denoise, initial_latents
from fastsd.sampling.noise import noise_source
from fastsd.sampling.schedulers import SAMPLERS
from fastsd.sampling.table import StepTable
ones = [1.0, 1.0]
one, two = [[0.5]] * 2, [[1.0, -1.0]] * 2
table = StepTable("X", ones, ones, one, one, one, ones, ones, ones, two, ones, 1.0)
table = StepTable.from_json(table.to_json())
noise = noise_source(1)
latents = initial_latents(noise((4, 8, 8))[None], [table])
for step in denoise(lambda x, row: 0.1 * x, latents, [table], noise=[noise]):
    step.denoised()
assert step.latents.shape == (1, 4, 8, 8)
print(sorted({"torch", "diffusers", "transformers", "scipy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
