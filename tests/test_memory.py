"""Weights that only `prepare` reads: which they are, and that letting go of them changes no image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsd
from fastsd import families, memory
from fastsd.pipeline import Pipeline
from fastsd.presets import PRESETS

Make = Callable[..., Path]
FAMILIES = ["sd", "sdxl", "sd3", "flux"]


@pytest.mark.parametrize("family", FAMILIES)
def test_releasing_changes_no_image(make_checkpoint: Make, family: str) -> None:
    folder = make_checkpoint(family)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"}
    kept = Pipeline.from_pretrained(folder, dtype="float32")
    released = Pipeline.from_pretrained(folder, dtype="float32", release_prepare=True)
    expected = kept("the red cat", **arguments)
    assert expected.timings.reload == 0
    for _ in range(2):  # the second run has to bring them back
        result = released("the red cat", **arguments)
        assert torch.equal(result.images, expected.images)
    assert 0 < result.timings.reload <= result.timings.prepare
    assert released.memory() == kept.memory()
    # They are not on the device: one value stands for each whole tensor.
    for name in released.components.denoiser.prepare_only():
        for parameter in released.components.denoiser.get_submodule(name).parameters():
            assert parameter.untyped_storage().nbytes() == parameter.element_size()


@pytest.mark.parametrize("family", FAMILIES)
def test_prepare_only_is_what_the_steps_never_read(make_checkpoint: Make, family: str) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint(family), dtype="float32")
    denoiser = pipe.components.denoiser
    listed = set(memory._prepare_only(denoiser))
    read: set[str] = set()

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            flat, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
            read.update(names[id(one)] for one in flat if id(one) in names)
            return func(*args, **(kwargs or {}))

    names = {id(parameter): name for name, parameter in denoiser.named_parameters()}
    constants: list[Any] = []
    denoiser.register_forward_pre_hook(lambda _, inputs: constants.append(inputs))
    pipe("the red cat", seed=1, num_inference_steps=1, output_type="latent")
    with torch.inference_mode(), Spy():
        denoiser(*constants[0])
    assert read.isdisjoint(listed)
    assert read | listed == set(names.values())


# Shares of the denoiser's parameters, as kernels and memory plans count on them.
SHARES = {"sdxl": 0.14, "sd3-medium": 0.333, "sd35-large": 0.333, "flux-schnell": 0.28, "flux-dev": 0.28}


@pytest.mark.parametrize("preset", SHARES)
def test_shares_at_full_size(preset: str) -> None:
    name, denoiser_class = families.family(PRESETS[preset].index["_class_name"]).DENOISER
    with torch.device("meta"):
        denoiser = denoiser_class(PRESETS[preset].configs[name])
    total, waiting = memory.report({name: denoiser})[name]
    assert waiting / total == pytest.approx(SHARES[preset], abs=0.005)


def test_what_is_not_there_is_nan(make_checkpoint: Make) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint("flux"), dtype="float32", release_prepare=True)
    pipe("the red cat", seed=1, num_inference_steps=1, output_type="latent")
    pipe._waiting = None  # whoever forgets to bring them back
    with pytest.raises(fastsd.NumericError, match="the denoiser produced NaN"):
        pipe("the red cat", seed=1, num_inference_steps=1, output_type="latent")
