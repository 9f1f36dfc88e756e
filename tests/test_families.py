"""SDXL, SD3 and Flux: the whole pipelines against those of `diffusers` on tiny random checkpoints in the real layout.

Tolerances are those of test_pipeline.py: 1e-4 of the latents' deviation, one level of an image.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

import fastsd
from fastsd.pipeline import Pipeline
from fastsd.sampling.table import StepTable

Make = Callable[..., Path]
PROMPT, NEGATIVE = "the red cat", "a blurry thing"
CLASSES = {
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
}
LATENT = {"output_type": "latent"}


def assert_same_latents(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=1e-4 * max(1.0, float(expected.std())), rtol=0)


def load_reference(folder: Path, family: str) -> Any:
    options: dict[str, Any] = {"add_watermarker": False} if family == "sdxl" else {}
    index = json.loads((folder / "model_index.json").read_text())
    options |= {name: None for name, value in index.items() if value == [None, None] and name.endswith("_3")}
    reference = CLASSES[family].from_pretrained(folder, **options)
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def loaded(make_checkpoint: Make) -> Callable[[str], tuple[Pipeline, Any]]:
    """Our pipeline and diffusers' of a family's plain checkpoint."""
    made: dict[str, tuple[Pipeline, Any]] = {}

    def load(family: str) -> tuple[Pipeline, Any]:
        if family not in made:
            folder = make_checkpoint(family)
            made[family] = Pipeline.from_pretrained(folder, dtype="float32"), load_reference(folder, family)
        return made[family]

    return load


def run_reference(reference: Any, seeds: list[int], prompt: Any = PROMPT, **arguments: Any) -> torch.Tensor:
    """Final latents [batch, C, H, W]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    each = len(seeds) if isinstance(prompt, str) else 1
    if "prompt_embeds" in arguments:
        prompt = None
    latents: torch.Tensor = reference(
        prompt, generator=generators, num_images_per_prompt=each, **LATENT, **arguments
    ).images
    if isinstance(reference, diffusers.FluxPipeline):
        sides = [arguments.get(side, reference.default_sample_size * 8) for side in ("height", "width")]
        latents = reference._unpack_latents(latents, *sides, reference.vae_scale_factor)
    return latents


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
# Short name -> the class and options that mean the same in diffusers.
NOISE_SAMPLERS: dict[str | None, tuple[str, dict[str, Any]] | None] = {
    None: None,
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
FLOW_SAMPLERS: dict[str | None, tuple[str, dict[str, Any]] | None] = {
    None: None,
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW),
    "flow_unipc": ("UniPCMultistepScheduler", FLOW),
}
GUIDED = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}
GUIDANCE = {
    "sdxl": {"guided": GUIDED, "zeroed negative": {"guidance_scale": 5.0}, "unguided": {"guidance_scale": 1.0}},
    "sd3": {"guided": GUIDED, "empty negative": {"guidance_scale": 5.0}, "unguided": {"guidance_scale": 0.0}},
    "flux": {
        "embedded": {"guidance_scale": 3.5},
        "true guidance": {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "guidance_scale": 2.0},
    },
}
SIZES = {"sdxl": [(64, 104), (72, 64)], "sd3": [(64, 96), (80, 64)], "flux": [(64, 96), (80, 64)]}
CASES = [
    pytest.param(family, sampler, guidance, size, id=f"{family}-{sampler or 'own'}-{guidance}-{size[0]}x{size[1]}")
    for family in CLASSES
    for sampler in (NOISE_SAMPLERS if family == "sdxl" else FLOW_SAMPLERS)
    if (family, sampler) != ("flux", "flow_heun")
    for guidance in GUIDANCE[family]
    for size in SIZES[family]
]


@pytest.mark.parametrize(("family", "sampler", "guidance", "size"), CASES)
def test_equals_diffusers(loaded: Any, family: str, sampler: str | None, guidance: str, size: tuple[int, int]) -> None:
    pipe, reference = loaded(family)
    arguments = {"height": size[0], "width": size[1], "num_inference_steps": 6, **GUIDANCE[family][guidance]}
    before = reference.scheduler
    if theirs := {**NOISE_SAMPLERS, **FLOW_SAMPLERS}[sampler]:
        reference.scheduler = getattr(diffusers, theirs[0]).from_config(before.config, **theirs[1])
    try:
        expected = run_reference(reference, [3, 4], **arguments)
    finally:
        reference.scheduler = before
    result = pipe(PROMPT, scheduler=sampler, seed=3, num_images_per_prompt=2, **LATENT, **arguments)
    assert_same_latents(result.images, expected)
    if sampler is None:
        vae = reference.vae
        with torch.no_grad():
            decoded = vae.decode(expected / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
        pixels = reference.image_processor.postprocess(decoded, output_type="np")
        np.testing.assert_allclose(pipe.decode(result.images).numpy(), pixels, atol=1 / 255, rtol=0)


CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl-empty-text-negative": ("sdxl", {"force_zeros": False}),
    "sdxl-v-prediction": (
        "sdxl",
        {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
    ),
    "sdxl-lcm-distilled": ("sdxl", {"unet": {"time_cond_proj_dim": 16}}),
    "sdxl-turbo-schedule": ("sdxl", {"scheduler": {"timestep_spacing": "trailing", "steps_offset": 0}}),
    "sd3-without-t5": ("sd3", {"t5": False}),
    "sd3.5-large-rms-norm": ("sd3", {"transformer": {"qk_norm": "rms_norm"}}),
    "sd3.5-medium-dual-attention": (
        "sd3",
        {"transformer": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}},
    ),
    "sd3-dynamic-shift": ("sd3", {"scheduler": {"use_dynamic_shifting": True}}),
    "flux-schnell": (
        "flux",
        {"transformer": {"guidance_embeds": False}, "scheduler": {"use_dynamic_shifting": False, "shift": 1.0}},
    ),
    "flux-deeper": ("flux", {"transformer": {"num_layers": 1, "num_single_layers": 3}}),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_equal_diffusers(make_checkpoint: Make, kind: str) -> None:
    family, options = CHECKPOINTS[kind]
    folder = make_checkpoint(family, **options)
    arguments = {"height": 80, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0}
    expected = run_reference(load_reference(folder, family), [11], **arguments)
    result = Pipeline.from_pretrained(folder, dtype="float32")(PROMPT, seed=11, **LATENT, **arguments)
    assert_same_latents(result.images, expected)


ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl-second-prompt": ("sdxl", {"prompt_2": "ing er", "negative_prompt": NEGATIVE, "negative_prompt_2": "x"}),
    "sdxl-second-negative-alone": ("sdxl", {"negative_prompt_2": "x"}),
    "sdxl-sizes": ("sdxl", {"original_size": (40, 900), "crops_coords_top_left": (3, 7), "target_size": (64, 64)}),
    "sdxl-negative-sizes": (
        "sdxl",
        {
            "negative_original_size": (128, 96),
            "negative_crops_coords_top_left": (1, 2),
            "negative_target_size": (512, 512),
        },
    ),
    "sdxl-clip-skip": ("sdxl", {"clip_skip": 1, "negative_prompt": NEGATIVE}),
    "sdxl-rescale": ("sdxl", {"guidance_rescale": 0.6}),
    "sdxl-sigmas": ("sdxl", {"sigmas": [14.0, 3.0, 0.5], "num_inference_steps": None}),
    "sd3-three-prompts": (
        "sd3",
        {
            "prompt_2": "x",
            "prompt_3": "ing",
            "negative_prompt": "y",
            "negative_prompt_2": "z",
            "negative_prompt_3": "w",
        },
    ),
    "sd3-max-sequence-length": ("sd3", {"max_sequence_length": 19}),
    "sd3-clip-skip": ("sd3", {"clip_skip": 1}),
    "sd3-sigmas": ("sd3", {"sigmas": [1.0, 0.7, 0.2], "num_inference_steps": None}),
    "flux-second-prompt": ("flux", {"prompt_2": "ing er"}),
    "flux-max-sequence-length": ("flux", {"max_sequence_length": 256}),
    "flux-one-token": ("flux", {"max_sequence_length": 1}),
    "sd3-numpy-sigmas": ("sd3", {"sigmas": np.array([1.0, 0.6, 0.3], dtype=np.float32), "num_inference_steps": None}),
    "flux-sigmas": ("flux", {"sigmas": [1.0, 0.7, 0.2], "num_inference_steps": None}),
    "flux-negative-without-scale": ("flux", {"negative_prompt": NEGATIVE}),
    "default-size-sdxl": ("sdxl", {"height": None, "width": None}),
    "default-size-sd3": ("sd3", {"height": None, "width": None}),
}


@pytest.mark.filterwarnings("ignore:.*(has no effect|was cut off)")
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_mean_what_they_mean_in_diffusers(loaded: Any, case: str) -> None:
    family, special = ARGUMENTS[case]
    pipe, reference = loaded(family)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 6.0, **special}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    expected = run_reference(reference, [9], **arguments)
    assert_same_latents(pipe(PROMPT, seed=9, **LATENT, **arguments).images, expected)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_list_of_prompts(loaded: Any, family: str) -> None:
    pipe, reference = loaded(family)
    arguments: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3}
    prompts, negatives = ["the red cat", "ing"], ["the", "x"]
    expected = run_reference(reference, [1, 2], prompts, negative_prompt=negatives, **arguments)
    result = pipe(prompts, seed=1, negative_prompt=negatives, **LATENT, **arguments)
    assert_same_latents(result.images, expected)


@pytest.mark.parametrize("family", CLASSES)
def test_embeddings_stand_for_prompts(loaded: Any, family: str) -> None:
    pipe, reference = loaded(family)
    common: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3}
    common |= {"true_cfg_scale": 2.0} if family == "flux" else {"guidance_scale": 5.0}
    if family == "flux":
        embeds = {}
        for side, prompt in (("", PROMPT), ("negative_", NEGATIVE)):
            context, pooled, _ = reference.encode_prompt(prompt, None)
            embeds |= {f"{side}prompt_embeds": context, f"{side}pooled_prompt_embeds": pooled}
    else:
        texts = {"prompt": PROMPT, "prompt_2": None, "negative_prompt": NEGATIVE, "device": "cpu"}
        if family == "sd3":
            texts["prompt_3"] = None
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds = dict(zip(names, reference.encode_prompt(**texts), strict=True))
    expected = run_reference(reference, [5], **embeds, **common)
    assert_same_latents(pipe(seed=5, **embeds, **LATENT, **common).images, expected)
    same = pipe(PROMPT, seed=5, negative_prompt=NEGATIVE, **LATENT, **common).images
    assert_same_latents(same, expected)


@pytest.mark.parametrize("family", CLASSES)
def test_adopts_a_diffusers_pipeline_without_copying(loaded: Any, family: str) -> None:
    pipe, reference = loaded(family)
    adopted = Pipeline.from_diffusers(reference)
    theirs = (reference.unet if family == "sdxl" else reference.transformer).state_dict()
    ours = adopted.components.denoiser.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in ours.items()} == {
        name: tensor.data_ptr() for name, tensor in theirs.items()
    }
    assert adopted.components.vae is reference.vae
    assert adopted.components.text_encoders[0] is reference.text_encoder
    arguments: dict[str, Any] = {"seed": 5, "num_inference_steps": 3, "height": 64, "width": 64, **LATENT}
    assert_same_latents(adopted(PROMPT, **arguments).images, pipe(PROMPT, **arguments).images)


@pytest.mark.parametrize("family", CLASSES)
def test_an_image_does_not_depend_on_its_neighbours(loaded: Any, family: str) -> None:
    pipe, _ = loaded(family)
    common = {"height": 64, "width": 64, **LATENT}
    mixed = {
        "seed": [1, 2, 3],
        "num_inference_steps": [3, 5, 4],
        "guidance_scale": [5.0, 1.0, 2.0],
        "scheduler": ["flow_euler", "flow_dpmpp_2m", "flow_unipc"],
    }
    if family == "sdxl":
        mixed["scheduler"] = ["euler_a", "ddim", "unipc"]
    prompts = [PROMPT, "x", "the"]
    together = pipe(prompts, **mixed, **common).images
    for slot in range(3):
        others = {name: [values[slot] if i == slot else values[0] for i in range(3)] for name, values in mixed.items()}
        texts = [prompts[slot] if i == slot else "ing" for i in range(3)]
        assert torch.equal(pipe(texts, **others, **common).images[slot], together[slot])


@pytest.mark.parametrize("family", CLASSES)
def test_encodings_are_kept(loaded: Any, family: str) -> None:
    pipe, _ = loaded(family)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, "height": 64, "width": 64, **LATENT}
    prompt = f"a prompt that only this test has {family}"
    first = pipe(prompt, **arguments)
    again = pipe(prompt, **arguments)
    encoders = len(pipe.components.text_encoders)
    assert again.timings.text_cache_hits - first.timings.text_cache_hits == encoders
    assert torch.equal(first.images, again.images)
    # Another weight: nothing that was kept may come back.
    changed = Pipeline.from_diffusers(copy.deepcopy(load_again(loaded, family)))
    before = changed(prompt, **arguments)
    with torch.no_grad():
        for encoder in changed.components.text_encoders:
            for parameter in encoder.parameters():
                parameter.mul_(1.5)
    after = changed(prompt, **arguments)
    assert after.timings.text_cache_hits == 0
    assert not torch.equal(before.images, after.images)


def load_again(loaded: Any, family: str) -> Any:
    return loaded(family)[1]


def test_a_missing_t5_folder_is_a_missing_t5(make_checkpoint: Make, tmp_path: Path) -> None:
    whole = make_checkpoint("sd3")
    folder = tmp_path / "sd3"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "text_encoder_3")
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, **LATENT}
    pipe = Pipeline.from_pretrained(folder, dtype="float32")
    assert pipe.components.text_encoders[2] is None
    reference = diffusers.StableDiffusion3Pipeline.from_pretrained(whole, text_encoder_3=None, tokenizer_3=None)
    reference.set_progress_bar_config(disable=True)
    expected = run_reference(reference, [1], num_inference_steps=2)
    assert_same_latents(pipe(PROMPT, **arguments).images, expected)


LONG = "the red cat " * 40 + "unread ending"


@pytest.mark.parametrize("family", CLASSES)
def test_a_long_prompt_is_cut_with_a_warning(loaded: Any, family: str) -> None:
    pipe, reference = loaded(family)
    arguments: dict[str, Any] = {"num_inference_steps": 1, "height": 64, "width": 64}
    arguments |= {} if family == "sdxl" else {"max_sequence_length": 32}
    with pytest.warns(UserWarning, match="unread ending"):
        cut = pipe(LONG, seed=1, **arguments, **LATENT).images
    assert_same_latents(cut, run_reference(reference, [1], LONG, **arguments))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_long_prompts_go_on_in_windows(loaded: Any, family: str) -> None:
    pipe, _ = loaded(family)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, "height": 64, "width": 64, **LATENT}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        windows = pipe(LONG, long_prompt="windows", negative_prompt="x", **arguments).images
    assert bool(torch.isfinite(windows).all())
    with pytest.warns(UserWarning, match="cut off"):
        cut = pipe(LONG, negative_prompt="x", **arguments).images
    assert not torch.equal(windows, cut)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32(make_checkpoint: Make, loaded: Any, family: str, dtype: str) -> None:
    low = Pipeline.from_pretrained(make_checkpoint(family), dtype=dtype)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64}
    result = low(PROMPT, **arguments, **LATENT).images
    exact = loaded(family)[0](PROMPT, **arguments, **LATENT).images
    assert result.dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4 % a rounding, some 30 layers deep, 4 steps.
    assert torch.linalg.norm(result - exact) < 0.05 * torch.linalg.norm(exact)
    assert len(low(PROMPT, **arguments).images) == 1
    if family == "sdxl" and dtype == "float16":
        assert low.components.vae.dtype == torch.float32  # it overflows in float16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_t5_keeps_in_float32_what_transformers_keeps(make_checkpoint: Make, dtype: str) -> None:
    folder = make_checkpoint("flux")
    ours = Pipeline.from_pretrained(folder, dtype=dtype).components.text_encoders[1]
    theirs = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=getattr(torch, dtype))
    assert {name: p.dtype for name, p in ours.named_parameters()} == {
        name: p.dtype for name, p in theirs.named_parameters()
    }


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "euler on Flux": ("flux", {"scheduler": "euler"}, "use 'flow_euler'"),
    "euler on SD3": ("sd3", {"scheduler": "euler"}, "use 'flow_euler'"),
    "dpmpp_2m on SD3": ("sd3", {"scheduler": "dpmpp_2m"}, "use 'flow_dpmpp_2m'"),
    "flow_euler on SDXL": ("sdxl", {"scheduler": "flow_euler"}, "use 'euler'"),
    "flow_heun on Flux": ("flux", {"scheduler": "flow_heun"}, "which Flux needs: use 'flow_euler'"),
    "a size between tokens on Flux": ("flux", {"height": 72}, "no multiple of 16: the nearest is 64"),
    "a size between tokens on SD3": ("sd3", {"width": 88}, "no multiple of 16: the nearest is"),
    "a size between latents on SDXL": ("sdxl", {"width": 100}, "no multiple of 8"),
    "beyond SD3's positions": ("sd3", {"width": 208}, "from 16 to 192, not 208"),
    "a third prompt on SDXL": ("sdxl", {"prompt_3": "x"}, "takes no prompt_3"),
    "sizes on Flux": ("flux", {"original_size": (64, 64)}, "takes no original_size"),
    "true guidance on SD3": ("sd3", {"true_cfg_scale": 2.0}, "takes no true_cfg_scale"),
    "clip_skip on Flux": ("flux", {"clip_skip": 1}, "takes no clip_skip"),
    "windows on Flux": ("flux", {"long_prompt": "windows"}, "takes no long_prompt"),
    "clip_skip too deep": ("sdxl", {"clip_skip": 2}, "clip_skip must be from 0 to 1 for this encoder, not 2"),
    "skip-layer guidance": ("sd3", {"skip_guidance_layers": [1]}, r"not implemented \(skip-layer guidance\)"),
    "an IP-Adapter": ("sdxl", {"ip_adapter_image": object()}, r"not implemented \(IP-Adapter\)"),
    "a run that ends early": ("sdxl", {"denoising_end": 0.8}, "not implemented"),
    "an unknown argument": ("sd3", {"guidance": 2.0}, "takes no guidance: did you mean guidance_scale"),
    "too many tokens": ("flux", {"max_sequence_length": 513}, "from 1 to 512, not 513"),
    "no tokens": ("flux", {"max_sequence_length": 0}, "from 1 to 512, not 0"),
    "a size of one number": ("sdxl", {"original_size": 64}, "original_size must be two whole numbers"),
    "a size below zero": ("sdxl", {"target_size": (-1, 64)}, "target_size must be a whole number"),
    "half of the negative sizes": ("sdxl", {"negative_target_size": (64, 64)}, "go together: give both"),
    "embeddings without pooled": (
        "sdxl",
        {"negative_prompt_embeds": torch.zeros(1, 77, 40)},
        "negative_pooled_prompt_embeds go together",
    ),
    "embeddings of another width": (
        "flux",
        {"negative_prompt_embeds": torch.zeros(1, 77, 40), "negative_pooled_prompt_embeds": torch.zeros(1, 24)},
        r"negative_prompt_embeds is \[1, 77, 40\]; it must be a tensor \[prompts, tokens, 32\]",
    ),
    "a pooled vector of another width": (
        "flux",
        {"negative_prompt_embeds": torch.zeros(1, 77, 32), "negative_pooled_prompt_embeds": torch.zeros(1, 25)},
        r"negative_pooled_prompt_embeds is \[1, 25\]; it must be a tensor \[prompts, 24\]",
    ),
    "a second prompt beside an embedding": (
        "sdxl",
        {"negative_prompt_embeds": torch.zeros(1, 77, 40), "negative_prompt_2": "x"},
        "give either negative_prompt_2 or negative_prompt_embeds",
    ),
    "NaN in an embedding": (
        "flux",
        {
            "negative_prompt_embeds": torch.full((1, 77, 32), float("nan")),
            "negative_pooled_prompt_embeds": torch.zeros(1, 24),
        },
        "negative_prompt_embeds must be finite",
    ),
    "complex latents": ("flux", {"latents": torch.zeros(1, 16, 8, 8, dtype=torch.complex64)}, "finite real numbers"),
    "a number as sigmas": ("sd3", {"sigmas": 0.5, "num_inference_steps": None}, "sigmas must be a list, not float"),
    "bytes as a seed": ("sd3", {"seed": b"x"}, "the seed must be"),
    "a vast guidance": ("sd3", {"guidance_scale": 10**400}, "guidance_scale must be finite"),
    "a timestep beyond training": ("sdxl", {"timesteps": [5000, 1], "num_inference_steps": None}, "from 0 to 1000"),
    "a class as scheduler": ("sdxl", {"scheduler": diffusers.DDIMScheduler}, "a name or a diffusers scheduler"),
    "steps that are not those of the sigmas": ("sd3", {"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "as many"),
    "eta on flow": ("sd3", {"eta": 0.5}, "has no eta"),
    "a NUL in the second prompt": ("flux", {"prompt_2": "a\0b"}, "prompt_2 holds a NUL"),
    "a number as third prompt": ("sd3", {"prompt_3": 3}, "prompt_3 must be text, not int"),
    "latents of another shape": ("flux", {"latents": torch.zeros(1, 16, 7, 8)}, r"must be a tensor \[1, 16, 8, 8\]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(loaded: Any, case: str) -> None:
    family, arguments, message = REFUSALS[case]
    pipe, _ = loaded(family)
    called = []
    handle = pipe.components.denoiser.register_forward_hook(lambda *_: called.append(1))
    with pytest.raises(fastsd.InputError, match=message) as caught:
        pipe(PROMPT, **{"num_inference_steps": 2, "height": 64, "width": 64, **arguments})
    handle.remove()
    assert not called and "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [5, None, [None], ["x", 3], b"x"])
def test_prompts_that_are_none(loaded: Any, prompt: Any) -> None:
    with pytest.raises(fastsd.InputError):
        loaded("sdxl")[0](prompt, num_inference_steps=1)


WITHOUT_EFFECT: dict[str, tuple[str, dict[str, Any], str]] = {
    "sdxl second negative": ("sdxl", {"negative_prompt_2": "x"}, "negative_prompt_2 has no effect"),
    "flux negative": ("flux", {"negative_prompt": "x"}, "the negative prompt has no effect"),
    "flux scale": ("flux", {"true_cfg_scale": 4.0}, "true_cfg_scale has no effect"),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_what_has_no_effect_is_said(loaded: Any, case: str) -> None:
    family, arguments, message = WITHOUT_EFFECT[case]
    with pytest.warns(UserWarning, match=message):
        loaded(family)[0](PROMPT, num_inference_steps=1, height=64, width=64, **LATENT, **arguments)


def test_recipes_are_those_of_their_images(loaded: Any) -> None:
    pipe, reference = loaded("sdxl")
    common: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64}
    recipes = pipe(["a", "b"], prompt_2=["x", "y"], num_images_per_prompt=2, seed=5, **common).recipes
    assert [recipe.extra["prompt_2"] for recipe in recipes] == ["x", "x", "y", "y"]
    empty = pipe(PROMPT, negative_prompt="", seed=1, **common).recipes[0]
    zeroed = pipe(PROMPT, seed=1, **common).recipes[0]
    assert (empty.negative_prompt, zeroed.negative_prompt) == ("", None)
    given = pipe(PROMPT, latents=torch.zeros(1, 4, 8, 8), **common)
    assert given.seeds == [None] and given.recipes[0].seed is None
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(reference.scheduler.config, use_karras_sigmas=True)
    recipe = pipe(PROMPT, scheduler=scheduler, seed=1, **common).recipes[0]
    assert recipe.scheduler == "DPMSolverMultistepScheduler"
    assert recipe.extra["scheduler_config"]["use_karras_sigmas"] is True
    sigmas = pipe(PROMPT, sigmas=[9.0, 1.0], seed=1, height=64, width=64).recipes[0]
    again = pipe(
        PROMPT, sigmas=sigmas.extra["sigmas"], seed=1, num_inference_steps=sigmas.num_inference_steps, height=64
    )
    assert len(again.images) == 1


def test_a_table_is_compiled_once(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reference = loaded("sdxl")
    arguments: dict[str, Any] = {"num_inference_steps": 7, "height": 64, "width": 64, "seed": 1, **LATENT}
    first = pipe(PROMPT, scheduler="dpmpp_2m", **arguments).images
    compiled: list[Any] = []
    make = StepTable.from_scheduler
    monkeypatch.setattr(StepTable, "from_scheduler", lambda *a, **k: compiled.append(a) or make(*a, **k))  # type: ignore[func-returns-value]
    assert torch.equal(pipe(PROMPT, scheduler="dpmpp_2m", **arguments).images, first)
    assert not compiled
    pipe(PROMPT, scheduler="dpmpp_2m", **{**arguments, "num_inference_steps": 6})
    scheduler = diffusers.EulerDiscreteScheduler.from_config(reference.scheduler.config)
    for _ in range(2):  # an instance may have been changed in between
        pipe([PROMPT] * 2, scheduler=scheduler, **arguments)
    assert len(compiled) == 3


def test_a_stream_ends_on_nan(loaded: Any) -> None:
    with pytest.raises(fastsd.NumericError, match="the denoiser produced NaN or Inf"):
        list(loaded("sdxl")[0].stream(PROMPT, guidance_scale=1e38, num_inference_steps=3, height=64, width=64))


def test_an_unknown_family_is_named(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(make_checkpoint("sdxl"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLInpaintPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(fastsd.InputError, match="is a StableDiffusionXLInpaintPipeline, which this version does not"):
        Pipeline.from_pretrained(folder)


def test_inpainting_checkpoints_are_refused(make_checkpoint: Make) -> None:
    folder = make_checkpoint("sdxl", unet={"in_channels": 9})
    with pytest.raises(fastsd.InputError, match="reads 9 channels and the VAE makes 4"):
        Pipeline.from_pretrained(folder)
