"""LoRA in whole pipelines, against `load_lora_weights` of `diffusers`; the adapters themselves: test_lora.py.

Tolerance as in test_pipeline.py: 1e-4 of the latents' deviation.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

import fastsd
from fastsd.cli import main
from fastsd.image import read_recipe
from fastsd.pipeline import Pipeline

Make = Callable[..., Path]
CLASSES = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
}
RUN: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}


def load_reference(folder: Path, family: str) -> Any:
    reference = CLASSES[family].from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def make_lora(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random LoRA on attentions of denoiser and text encoders, as diffusers' training scripts save it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(9)
            pipeline = load_reference(make_checkpoint(family), family)
            name = "unet" if family in ("sd", "sdxl") else "transformer"
            targets = {name: ["to_q", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}
            if family in ("sdxl", "sd3"):
                targets["text_encoder_2"] = ["k_proj"]
            layers = {}
            for component, names in targets.items():
                module = getattr(pipeline, component)
                module.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=names))
                layers[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
            folder = tmp_path_factory.mktemp("lora")
            CLASSES[family].save_lora_weights(folder, **layers)
            made[family] = folder
        return made[family]

    return make


@pytest.mark.parametrize("weight", [1.0, -0.4])
@pytest.mark.parametrize("family", CLASSES)
def test_equals_diffusers(make_checkpoint: Make, make_lora: Any, family: str, weight: float) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint(family), dtype="float32")
    plain = pipe("the red cat", seed=1, **RUN).images
    assert pipe.load_lora(make_lora(family), weight, "style") == "style"
    assert pipe.loras == {"style": weight}
    merged = pipe("the red cat", seed=1, **RUN)
    # CLIP is another now; T5, which no LoRA touches, is not (SD3 reads it for both halves of guidance).
    assert merged.timings.text_cache_hits == {"sd3": 2, "flux": 1}.get(family, 0)

    reference = load_reference(make_checkpoint(family), family)
    reference.load_lora_weights(make_lora(family), adapter_name="style")
    reference.set_adapters("style", weight)
    expected = reference("the red cat", generator=torch.Generator().manual_seed(1), **RUN).images
    if family == "flux":
        expected = reference._unpack_latents(expected, 1024, 1024, reference.vae_scale_factor)
    torch.testing.assert_close(merged.images, expected, atol=1e-4 * max(1.0, float(expected.std())), rtol=0)
    assert not torch.allclose(merged.images, plain, atol=1e-3)

    pipe.unload_lora()
    again = pipe("the red cat", seed=1, **RUN)
    assert torch.equal(again.images, plain) and pipe.loras == {}
    assert again.timings.text_cache_hits > merged.timings.text_cache_hits  # and now the one that it was


@pytest.mark.parametrize("family", CLASSES)
def test_with_released_weights(make_checkpoint: Make, make_lora: Any, family: str) -> None:
    kept, released = (
        Pipeline.from_pretrained(make_checkpoint(family), dtype="float32", release_prepare=release)
        for release in (False, True)
    )
    plain = released("the red cat", seed=1, height=64, width=64, **RUN).images
    for pipe in (kept, released):
        pipe.load_lora(make_lora(family), 0.7)
    merged = released("the red cat", seed=1, height=64, width=64, **RUN).images
    assert torch.equal(merged, kept("the red cat", seed=1, height=64, width=64, **RUN).images)
    assert not torch.equal(merged, plain)
    released.unload_lora()
    assert torch.equal(released("the red cat", seed=1, height=64, width=64, **RUN).images, plain)


def test_adapters_of_diffusers_are_not_adopted(make_checkpoint: Make, make_lora: Any) -> None:
    reference = load_reference(make_checkpoint("sdxl"), "sdxl")
    reference.load_lora_weights(make_lora("sdxl"))
    with pytest.raises(fastsd.InputError, match="unet are not plain: unload its LoRAs"):
        Pipeline.from_diffusers(reference)
    reference.unload_lora_weights()
    assert len(Pipeline.from_diffusers(reference)("x", num_inference_steps=1, height=64, width=64).images) == 1


def test_weights_do_not_change_under_a_run(make_checkpoint: Make, make_lora: Any) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint("sd"), dtype="float32")
    plain = pipe("the red cat", seed=1, **RUN).images
    stream = pipe.stream("the red cat", seed=1, num_inference_steps=3)
    next(stream)
    for change in (lambda: pipe.load_lora(make_lora("sd")), pipe.unload_lora):
        with pytest.raises(fastsd.InputError, match="1 calls or streams read the weights"):
            change()
    assert torch.equal(list(stream)[-1].latents, plain)
    pipe.load_lora(make_lora("sd"))
    stream = pipe.stream("the red cat", seed=1, num_inference_steps=3)
    next(stream)
    stream.close()
    pipe.unload_lora()
    assert torch.equal(pipe("the red cat", seed=1, **RUN).images, plain)


def test_threads_that_load_and_make_images(make_checkpoint: Make, make_lora: Any) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint("sd"), dtype="float32")
    prompts = ["the red cat", "cat", "red"]
    arguments: dict[str, Any] = {"seed": 1, **RUN}
    plain = [pipe(prompt, **arguments).images for prompt in prompts]
    before = {name: tensor.clone() for name, tensor in pipe.components.denoiser.state_dict().items()}
    stop = threading.Event()

    def change(name: str) -> None:
        while not stop.is_set():
            with contextlib.suppress(fastsd.InputError):  # images are being made, or the other was faster
                pipe.load_lora(make_lora("sd"), 0.5, name)
            with contextlib.suppress(fastsd.InputError):
                pipe.unload_lora(name)

    threads = [threading.Thread(target=change, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for _ in range(5):
        for prompt in prompts:
            pipe(prompt, **arguments)
    stop.set()
    for thread in threads:
        thread.join()
    pipe.unload_lora()
    after = pipe.components.denoiser.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for prompt, expected in zip(prompts, plain, strict=True):  # also what the cache kept
        assert torch.equal(pipe(prompt, **arguments).images, expected)


def test_the_wrong_family_is_refused(make_checkpoint: Make, make_lora: Any) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint("sd"), dtype="float32")
    before = {name: tensor.clone() for name, tensor in pipe.components.denoiser.state_dict().items()}
    with pytest.raises(fastsd.InputError):
        pipe.load_lora(make_lora("sd3"))
    assert pipe.loras == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.components.denoiser.state_dict().items())


def test_on_the_command_line(
    make_checkpoint: Make, make_lora: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", "the red cat", "-m", str(make_checkpoint("sdxl")), "--steps", "2", "--seed", "1", "--json"]
    sized = [*common, "-W", "64", "-H", "64", "--dtype", "float32"]
    images = []
    for name, options in {
        "plain": [],
        "full": ["--lora", f"{make_lora('sdxl')}"],
        "half": ["--lora", f"{make_lora('sdxl')}:0.5"],
    }.items():
        assert main([*sized, "-o", str(tmp_path / f"{name}.png"), *options]) == 0
        images.append(json.loads(capsys.readouterr().out)["images"][0])
    recipe = read_recipe(tmp_path / "half.png")
    assert list(recipe["extra"]["loras"].values()) == [0.5]
    assert len({(tmp_path / f"{name}.png").read_bytes()[-400:] for name in ("plain", "full", "half")}) == 3
    assert main([*sized, "-o", str(tmp_path / "x.png"), "--lora", str(tmp_path / "none.safetensors")]) == 2
    assert re.search("none.safetensors", capsys.readouterr().err)
    assert not (tmp_path / "x.png").exists()
