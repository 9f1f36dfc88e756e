"""The whole pipeline against `diffusers.StableDiffusionPipeline` on tiny random checkpoints, and its own promises.

Tolerances: 1e-4 of the latents' deviation is some hundred float32 roundings, room for sums in another order (which the
number of threads decides) over 8 steps; a trained model's latents have a deviation near 1, a random one's up to 22.
1/255 on images is one level, which rounding to 8 bits turns any difference into.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import fastsd
from fastsd.image import read_recipe
from fastsd.pipeline import Pipeline

PROMPT, NEGATIVE = "the red cat", "a blurry thing"
Make = Callable[..., Path]


def assert_same_latents(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=1e-4 * max(1.0, float(expected.std())), rtol=0)


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny, dtype="float32")


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    return load_reference(tiny)


def load_reference(folder: Path) -> Any:
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    # With clip_skip diffusers asks for `text_encoder.text_model`, which transformers 5 has no more: the same module.
    reference.text_encoder.__dict__.setdefault("text_model", reference.text_encoder)
    return reference


def run_reference(reference: Any, seeds: list[int], **arguments: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents: torch.Tensor = reference(
        PROMPT, generator=generators, num_images_per_prompt=len(seeds), output_type="latent", **arguments
    ).images
    return latents


@pytest.fixture
def restore_scheduler(reference: Any) -> Iterator[None]:
    before = reference.scheduler
    yield
    reference.scheduler = before


# Short name -> the class and options that mean the same in diffusers.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


@pytest.mark.usefixtures("restore_scheduler")
@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_equals_diffusers(pipe: Pipeline, reference: Any, name: str, guidance: float) -> None:
    cls, options = SCHEDULERS[name]
    reference.scheduler = getattr(diffusers, cls).from_config(reference.scheduler.config, **options)
    arguments = {
        "negative_prompt": NEGATIVE,
        "height": 64,
        "width": 104,
        "num_inference_steps": 8,
        "guidance_scale": guidance,
    }
    expected = run_reference(reference, [3, 4], **arguments)
    result = pipe(PROMPT, scheduler=name, seed=3, num_images_per_prompt=2, output_type="latent", **arguments)
    assert result.seeds == [3, 4]
    assert_same_latents(result.images, expected)
    images = pipe(PROMPT, scheduler=name, seed=3, num_images_per_prompt=2, output_type="np", **arguments).images
    decoded = reference.vae.decode(expected / reference.vae.config.scaling_factor).sample
    pixels = reference.image_processor.postprocess(decoded.detach(), output_type="np")
    np.testing.assert_allclose(images, pixels, atol=1 / 255, rtol=0)


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "v-prediction": {"scheduler": {"prediction_type": "v_prediction"}},
    "zero-terminal-snr": {
        "scheduler": {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    },
    "sd2-layout": {"unet": {"use_linear_projection": True, "attention_head_dim": (2, 4)}},
    "two-layers": {"unet": {"layers_per_block": 2}},
    "lcm-distilled": {"unet": {"time_cond_proj_dim": 16}},
}


@pytest.mark.parametrize("guidance", [4.0, 0.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_equal_diffusers(make_checkpoint: Make, kind: str, guidance: float) -> None:
    folder = make_checkpoint(**CHECKPOINTS[kind])
    arguments = {"height": 72, "width": 64, "num_inference_steps": 6, "guidance_scale": guidance}
    expected = run_reference(load_reference(folder), [11], **arguments)
    result = Pipeline.from_pretrained(folder, dtype="float32")(PROMPT, seed=11, output_type="latent", **arguments)
    assert_same_latents(result.images, expected)


def test_equals_the_latent_consistency_pipeline(make_checkpoint: Make) -> None:
    parts = load_reference(make_checkpoint(unet={"time_cond_proj_dim": 16})).components
    parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    reference = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    expected = reference(PROMPT, generator=torch.Generator().manual_seed(2), output_type="latent").images
    result = Pipeline.from_diffusers(reference)(PROMPT, seed=2, output_type="latent")
    assert len(result.timings.steps) == 4
    assert_same_latents(result.images, expected)


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, theirs where they differ
    "guidance-rescale": ({"guidance_rescale": 0.7}, {}),
    "clip-skip-0": ({"clip_skip": 0}, {}),
    "clip-skip-2": ({"clip_skip": 2}, {}),
    "eta": ({"eta": 0.6}, {}),
    "default-size-and-steps": ({"num_inference_steps": None}, {"num_inference_steps": 50}),
    "timesteps": (
        {"num_inference_steps": None, "timesteps": [900, 500, 200], "scheduler": "dpmpp_2m"},
        {"num_inference_steps": 3, "timesteps": [900, 500, 200], "scheduler": "DPMSolverMultistepScheduler"},
    ),
    "sigmas": (
        {"num_inference_steps": None, "sigmas": [14.0, 3.0, 0.5], "scheduler": "euler"},
        {"num_inference_steps": 3, "sigmas": [14.0, 3.0, 0.5], "scheduler": "EulerDiscreteScheduler"},
    ),
}


@pytest.mark.usefixtures("restore_scheduler")
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_mean_what_they_mean_in_diffusers(pipe: Pipeline, reference: Any, case: str) -> None:
    ours, theirs = ARGUMENTS[case]
    common = {"negative_prompt": NEGATIVE, "num_inference_steps": 4, "guidance_scale": 6.0}
    theirs = common | ours | theirs
    if cls := theirs.pop("scheduler", None):
        reference.scheduler = getattr(diffusers, cls).from_config(reference.scheduler.config)
    expected = run_reference(reference, [9], **theirs)
    result = pipe(PROMPT, seed=9, output_type="latent", **(common | ours))
    assert_same_latents(result.images, expected)


@pytest.mark.usefixtures("restore_scheduler")
@pytest.mark.parametrize("name", ["ddim", "euler_a"])
@pytest.mark.parametrize("width", [64, 104], ids=["even", "not a multiple of 16 values"])
def test_one_generator_draws_for_the_whole_batch(pipe: Pipeline, reference: Any, name: str, width: int) -> None:
    reference.scheduler = getattr(diffusers, SCHEDULERS[name][0]).from_config(reference.scheduler.config)
    arguments: dict[str, Any] = {
        "num_inference_steps": 4,
        "num_images_per_prompt": 2,
        "width": width,
        "height": 72,
    }
    expected = reference(PROMPT, generator=torch.Generator().manual_seed(1), output_type="latent", **arguments).images
    result = pipe(PROMPT, generator=torch.Generator().manual_seed(1), scheduler=name, output_type="latent", **arguments)
    assert result.seeds == [None, None]
    assert_same_latents(result.images, expected)


def test_generators_one_per_image_continue(pipe: Pipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    first = pipe([PROMPT, "x"], generator=generators, num_inference_steps=2, output_type="latent").images
    seeded = pipe([PROMPT, "x"], seed=[3, 4], num_inference_steps=2, output_type="latent").images
    assert_same_latents(first, seeded)
    again = pipe([PROMPT, "x"], generator=generators, num_inference_steps=2, output_type="latent").images
    assert not torch.allclose(first, again)


@pytest.mark.usefixtures("restore_scheduler")
def test_latents_are_scaled_as_in_diffusers(pipe: Pipeline, reference: Any) -> None:
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(reference.scheduler.config)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = latents.clone()
    expected = reference(PROMPT, latents=latents.clone(), num_inference_steps=4, output_type="latent").images
    result = pipe(PROMPT, latents=latents, num_inference_steps=4, scheduler="euler", output_type="latent")
    assert_same_latents(result.images, expected)
    assert torch.equal(latents, before)


def test_embeddings_stand_for_prompts(pipe: Pipeline, reference: Any) -> None:
    positive, negative = reference.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    expected = pipe(PROMPT, negative_prompt=NEGATIVE, seed=1, num_inference_steps=3, output_type="latent").images
    result = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        seed=1,
        num_inference_steps=3,
        output_type="latent",
    )
    torch.testing.assert_close(result.images, expected, atol=1e-5, rtol=0)


def test_adopts_a_diffusers_pipeline_without_copying(reference: Any, pipe: Pipeline) -> None:
    adopted = Pipeline.from_diffusers(reference)
    ours, theirs = adopted.components.denoiser.state_dict(), reference.unet.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in ours.items()} == {
        name: tensor.data_ptr() for name, tensor in theirs.items()
    }
    assert adopted.components.vae is reference.vae
    arguments: dict[str, Any] = {"seed": 5, "num_inference_steps": 3, "output_type": "latent"}
    assert_same_latents(adopted(PROMPT, **arguments).images, pipe(PROMPT, **arguments).images)


# Images of one batch may differ in everything but their size.
MIXED: list[dict[str, Any]] = [
    {"scheduler": "ddim", "num_inference_steps": 3, "guidance_scale": 5.0, "seed": 1},
    {"scheduler": "euler_a", "num_inference_steps": 6, "guidance_scale": 2.0, "seed": 2},
    {"scheduler": "unipc", "num_inference_steps": 5, "guidance_scale": 1.0, "seed": 3},
    {"scheduler": "heun", "num_inference_steps": 2, "guidance_scale": 9.0, "seed": 4},
]


def run_mixed(pipe: Pipeline, images: list[dict[str, Any]]) -> torch.Tensor:
    lists = {name: [one[name] for one in images] for name in images[0]}
    latents: torch.Tensor = pipe([PROMPT, "cat", "", "the"], output_type="latent", **lists).images  # type: ignore[arg-type]
    return latents


@pytest.mark.parametrize("slot", range(4))
def test_an_image_does_not_depend_on_its_neighbours(pipe: Pipeline, slot: int) -> None:
    together = run_mixed(pipe, MIXED)
    other = {"scheduler": "dpmpp_2m", "num_inference_steps": 8, "guidance_scale": 3.0, "seed": 77}
    alone = run_mixed(pipe, [MIXED[slot] if i == slot else other for i in range(4)])
    assert torch.equal(together[slot], alone[slot])
    assert not torch.equal(together[slot - 1], alone[slot - 1])


def test_a_seed_is_the_same_image_every_time(pipe: Pipeline) -> None:
    first, second = (pipe(PROMPT, seed=8, num_inference_steps=3, output_type="np").images for _ in range(2))
    assert np.array_equal(first, second)
    drawn = pipe(PROMPT, num_inference_steps=2)
    again = pipe(PROMPT, num_inference_steps=2, seed=drawn.seeds[0])
    assert np.array_equal(np.asarray(drawn.images[0]), np.asarray(again.images[0]))
    assert pipe(PROMPT, num_inference_steps=1).seeds != pipe(PROMPT, num_inference_steps=1).seeds


def test_the_largest_seed_and_its_neighbour(pipe: Pipeline) -> None:
    assert pipe(PROMPT, seed=2**63 - 1, num_inference_steps=1).seeds == [2**63 - 1]
    with pytest.raises(fastsd.InputError, match="leaves no room for 2 images"):
        pipe(PROMPT, seed=2**63 - 1, num_images_per_prompt=2, num_inference_steps=1)


def test_stream_shows_every_row_and_can_be_left(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"seed": 2, "num_inference_steps": 4, "scheduler": "dpmpp_2m"}
    seen = []
    for step in pipe.stream(PROMPT, **arguments):
        seen.append((step.index, step.total, step.latents))
        assert step.preview()[0].size == (64, 64)
    assert [(index, total) for index, total, _ in seen] == [(i, 4) for i in range(4)]
    final = pipe(PROMPT, output_type="latent", **arguments).images
    assert torch.equal(seen[-1][2], final)
    assert not torch.equal(seen[0][2], final)  # a copy, not a view of the state
    calls = []
    handle = pipe.components.denoiser.register_forward_hook(lambda *_: calls.append(1))
    for step in pipe.stream(PROMPT, **arguments):
        if step.index == 1:
            break
    handle.remove()
    assert len(calls) == 2


def test_the_last_preview_is_the_image(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"seed": 2, "num_inference_steps": 3}
    previews: list[Image.Image] = []
    result = pipe(PROMPT, on_step=lambda step: previews.append(step.preview()[0]), **arguments)
    # DDIM's last step still holds a trace of noise (set_alpha_to_one=False aside, the estimate is the image).
    assert np.abs(np.asarray(previews[-1], int) - np.asarray(result.images[0], int)).mean() < 2


def test_stream_checks_before_the_first_step(pipe: Pipeline) -> None:
    with pytest.raises(fastsd.InputError, match="multiple of 8"):
        pipe.stream(PROMPT, height=65)


def test_an_exception_in_on_step_ends_the_call(pipe: Pipeline) -> None:
    def leave(step: Any) -> None:
        raise KeyError(step.index)

    with pytest.raises(KeyError, match="0"):
        pipe(PROMPT, num_inference_steps=2, on_step=leave)
    assert len(pipe(PROMPT, num_inference_steps=2).images) == 1


def test_timings_cover_the_stages(pipe: Pipeline) -> None:
    timings = pipe(PROMPT, num_inference_steps=3, scheduler="heun").timings
    assert len(timings.steps) == 5  # Heun: two rows a step, one at the end
    assert min(timings.text, timings.prepare, timings.denoise, timings.decode, *timings.steps) > 0
    assert sum(timings.steps) <= timings.denoise


def test_output_types(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 2}
    pil, array, tensor, latent = (
        pipe(PROMPT, output_type=kind, **arguments).images
        for kind in ("pil", "np", "pt", "latent")  # type: ignore[arg-type]
    )
    assert array.shape == (1, 64, 64, 3) and array.dtype == np.float32
    assert np.array_equal(tensor.numpy(), array)
    assert np.array_equal((array[0] * 255).round().astype(np.uint8), np.asarray(pil[0]))
    assert np.array_equal(pipe.decode(latent).numpy(), array)


def test_round_trip_equals_the_vae(pipe: Pipeline, reference: Any) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(3)]
    latents = pipe.encode(pictures)
    pixels = reference.image_processor.preprocess(pictures)
    with torch.no_grad():
        expected = reference.vae.encode(pixels).latent_dist.mode() * reference.vae.config.scaling_factor
        decoded = reference.vae.decode(expected / reference.vae.config.scaling_factor).sample
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    restored = reference.image_processor.postprocess(decoded, output_type="np")
    np.testing.assert_allclose(pipe.decode(latents).numpy(), restored, atol=1e-4)
    assert torch.equal(pipe.encode(pictures[0]), latents[:1])


def test_a_result_saves_its_recipe(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe([PROMPT, "cat"], seed=6, num_inference_steps=2, scheduler="euler", guidance_scale=3.5)
    paths = result.save(tmp_path / "out.png")
    assert [path.name for path in paths] == ["out_0000.png", "out_0001.png"]
    recipe = read_recipe(paths[1])
    again = pipe(
        recipe["prompt"],
        **{name: recipe[name] for name in ("seed", "num_inference_steps", "scheduler", "guidance_scale", "width")},
    )
    # Another batch size may sum in another order: one level.
    difference = np.abs(np.asarray(again.images[0], int) - np.asarray(Image.open(paths[1]), int))
    assert difference.max() <= 1
    with pytest.raises(fastsd.InputError, match="exists already"):
        result.save(tmp_path / "out.png")
    with pytest.raises(fastsd.InputError, match="only PIL images"):
        pipe(PROMPT, num_inference_steps=1, output_type="np").save(tmp_path / "x.png")


LONG = "the red cat " * 40 + "unread ending"


def test_a_long_prompt_is_cut_with_a_warning(pipe: Pipeline, reference: Any) -> None:
    with pytest.warns(UserWarning, match="unread ending"):
        cut = pipe(LONG, seed=1, num_inference_steps=2, output_type="latent").images
    generator = torch.Generator().manual_seed(1)
    expected = reference(LONG, generator=generator, num_inference_steps=2, output_type="latent").images
    assert_same_latents(cut, expected)


def test_long_prompts_go_on_in_windows(pipe: Pipeline, reference: Any) -> None:
    tokenizer, encoder = reference.tokenizer, reference.text_encoder
    ids = tokenizer(LONG, add_special_tokens=False, verbose=False).input_ids
    assert 75 < len(ids) <= 150
    frames = [[tokenizer.bos_token_id, *ids[i : i + 75], tokenizer.eos_token_id] for i in (0, 75)]
    frames[1] += [tokenizer.pad_token_id] * (77 - len(frames[1]))
    with torch.no_grad():
        embeds = torch.cat([encoder(torch.tensor([frame])).last_hidden_state for frame in frames], dim=1)
        blank = encoder(torch.tensor([tokenizer("", padding="max_length").input_ids])).last_hidden_state
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pipe(LONG, long_prompt="windows", **arguments).images
    expected = pipe(prompt_embeds=embeds, negative_prompt_embeds=torch.cat([blank, blank], 1), **arguments).images
    assert_same_latents(result, expected)


@pytest.mark.parametrize(
    ("component", "named"),
    [("text_encoder", "the text encoder"), ("denoiser", "the denoiser"), ("vae", "the VAE")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_their_component(tiny: Path, component: str, named: str, value: float) -> None:
    broken = Pipeline.from_pretrained(tiny, dtype="float32")
    module = (
        broken.components.text_encoders[0] if component == "text_encoder" else getattr(broken.components, component)
    )
    list(module.parameters())[-1].data = torch.full_like(list(module.parameters())[-1], value)
    with pytest.raises(fastsd.NumericError, match=f"{named} produced NaN or Inf"):
        broken(PROMPT, num_inference_steps=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32(tiny: Path, pipe: Pipeline, dtype: str) -> None:
    low = Pipeline.from_pretrained(tiny, dtype=dtype)
    arguments: dict[str, Any] = {
        "seed": 1,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    result, exact = low(PROMPT, **arguments).images, pipe(PROMPT, **arguments).images
    assert result.dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4 % a rounding, some 50 layers deep, 4 steps.
    assert torch.linalg.norm(result - exact) < 0.05 * torch.linalg.norm(exact)


def test_defaults_of_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "few-step"
    shutil.copytree(tiny, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_fastsd"] = {"num_inference_steps": 2, "guidance_scale": 0.0}
    (folder / "model_index.json").write_text(json.dumps(index))
    result = Pipeline.from_pretrained(folder, dtype="float32")(PROMPT)
    assert len(result.timings.steps) == 2 and result.recipes[0].guidance_scale == 0.0
    assert load_reference(folder) is not None  # diffusers reads such an index too


def test_two_threads_give_the_images_of_one(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    expected = [pipe(PROMPT, seed=seed, **arguments).images for seed in range(4)]
    results: list[Any] = [None] * 4

    def work(seed: int) -> None:
        results[seed] = pipe(PROMPT, seed=seed, **arguments).images

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
