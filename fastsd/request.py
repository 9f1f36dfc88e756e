"""A call's arguments, checked before anything is allocated or computed."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import numbers
import operator
import secrets
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from fastsd import text
from fastsd.arrays import Array, all_finite, is_array, is_floating
from fastsd.errors import InputError
from fastsd.image import Recipe
from fastsd.sampling.noise import MAX_SEED, check_seed, noise_source
from fastsd.sampling.table import StepTable

if TYPE_CHECKING:
    import torch

    from fastsd.pipeline import Pipeline

MAX_SIDE = 8192  # pixels; beyond it a typing error is likelier than a wish
MAX_IMAGES = 1024  # per call
MAX_TOKENS = 512  # of T5, as it was trained
MAX_TABLES = 128  # that a pipeline keeps

Noise = Callable[[tuple[int, ...]], Any]


class Arguments(TypedDict, total=False):
    """What a call takes besides the prompt; names follow `diffusers`.

    Lists of seeds, schedulers, step counts and guidance scales have one entry per image, and images of one batch may
    differ in all of them; images are ordered prompt by prompt. What only some families take is refused by the others.

    Attributes:
        negative_prompt: what to steer away from; one for all or one per prompt.
        prompt_2: text for the second encoder (SDXL, SD3, Flux); None: the prompt.
        prompt_3: text for SD3's T5; None: the prompt.
        negative_prompt_2: likewise for the negative prompt.
        negative_prompt_3: likewise.
        height: pixels, a multiple of 8 (SD3 and Flux: 16); None: the checkpoint's own size.
        width: likewise.
        num_inference_steps: None: the checkpoint's default.
        guidance_scale: classifier-free guidance (https://arxiv.org/abs/2207.12598), 1 or less means none; for Flux the
            scale that the model embeds.
        true_cfg_scale: Flux: classifier-free guidance with the negative prompt; 1 or less means none.
        guidance_rescale: https://arxiv.org/abs/2305.08891, 0 to 1.
        num_images_per_prompt: how many of each.
        seed: image i has the i-th seed of a list, or `seed` + i; None draws one.
        generator: `torch.Generator`s in place of seeds; as in `diffusers`, one draws for the whole batch, a list has
            one per image. Noise is drawn in float32.
        latents: initial noise [batch, C, height / 8, width / 8], standard normal, not yet scaled.
        scheduler: None (the checkpoint's), a short name (`fastsd.sampling.schedulers.SAMPLERS`), a `diffusers` class
            name or instance; or one per image.
        eta: DDIM's noise (0 to 1), passed to schedulers that take it.
        sigmas: a schedule of your own, for schedulers that take one.
        timesteps: likewise.
        prompt_embeds: context [prompts, tokens, dim] in place of the prompt.
        negative_prompt_embeds: context [prompts or 1, tokens, dim] in place of the negative prompt.
        pooled_prompt_embeds: [prompts, dim], with `prompt_embeds` (SDXL, SD3, Flux).
        negative_pooled_prompt_embeds: [prompts or 1, dim], with `negative_prompt_embeds`.
        clip_skip: layers of CLIP to skip, from the end (not Flux).
        max_sequence_length: tokens of T5 (SD3, Flux), 1 to 512.
        long_prompt: "cut" a prompt beyond CLIP's 77 tokens with a warning, or read it in "windows" of 77 (not Flux);
            all prompts of a batch are then read in as many windows as the longest.
        original_size: SDXL: (height, width) that the image is to look as if it was scaled from; None: its own.
        crops_coords_top_left: SDXL: (top, left) that it is to look as if it was cropped at; None: (0, 0).
        target_size: SDXL: (height, width); None: its own.
        negative_original_size: SDXL: likewise for the unconditional half, with `negative_target_size`; None: the same.
        negative_crops_coords_top_left: SDXL: likewise.
        negative_target_size: SDXL: likewise.
    """

    negative_prompt: str | Sequence[str | None] | None
    prompt_2: str | Sequence[str] | None
    prompt_3: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    negative_prompt_3: str | Sequence[str] | None
    height: int | None
    width: int | None
    num_inference_steps: int | Sequence[int] | None
    guidance_scale: float | Sequence[float] | None
    true_cfg_scale: float | Sequence[float] | None
    guidance_rescale: float
    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Array | None
    scheduler: Any
    eta: float
    sigmas: Sequence[float] | None
    timesteps: Sequence[int] | None
    prompt_embeds: Array | None
    negative_prompt_embeds: Array | None
    pooled_prompt_embeds: Array | None
    negative_pooled_prompt_embeds: Array | None
    clip_skip: int | None
    max_sequence_length: int | None
    long_prompt: text.LongPrompt | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None


# What every family takes; the rest of `Arguments` is in the `ARGUMENTS` of those that take it.
COMMON = {
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "num_images_per_prompt",
    "seed",
    "generator",
    "latents",
    "scheduler",
    "eta",
    "sigmas",
    "timesteps",
    "prompt_embeds",
    "negative_prompt_embeds",
}

# Arguments of `diffusers` for what stands between model and sampler there and is not implemented here.
NOT_IMPLEMENTED = {
    "skip_guidance_layers": "skip-layer guidance",
    "skip_layer_guidance_scale": "skip-layer guidance",
    "skip_layer_guidance_start": "skip-layer guidance",
    "skip_layer_guidance_stop": "skip-layer guidance",
    "ip_adapter_image": "IP-Adapter",
    "ip_adapter_image_embeds": "IP-Adapter",
    "negative_ip_adapter_image": "IP-Adapter",
    "negative_ip_adapter_image_embeds": "IP-Adapter",
    "denoising_end": "a run that ends early for a refiner",
    "cross_attention_kwargs": "attention processors (a LoRA has its weight in load_lora)",
    "joint_attention_kwargs": "attention processors (a LoRA has its weight in load_lora)",
    "mu": "a shift of one's own (it follows from the image's size)",
    "callback": "this callback (use on_step)",
    "callback_on_step_end": "this callback (use on_step)",
}


@dataclass(frozen=True)
class Request:
    """Checked arguments, one entry per image where images may differ."""

    prompts: list[text.Prompt | text.Embedding]
    negative_prompts: list[text.Prompt | text.Embedding | None]  # None: zeros
    clip_skip: int | None
    long_prompt: text.LongPrompt
    max_sequence_length: int
    tables: list[StepTable]
    guidance_scales: list[float]
    guidance_rescale: float
    time_ids: tuple[list[float], list[float]] | None  # SDXL: of the unconditional half, of the prompt
    noise_shape: tuple[int, ...]  # of one image's latents
    noise: list[Noise]
    latents: Array | None
    seeds: list[int | None]
    recipes: list[Recipe]


def check(pipeline: Pipeline, prompt: str | Sequence[str] | None = None, **arguments: Any) -> Request:
    """Check the arguments of a call (see `Arguments`) against a pipeline.

    Raises:
        InputError: one of them is not right; the sentence says what would be.
    """
    family, components = pipeline.family, pipeline.components
    given = {name: value for name, value in arguments.items() if value is not None}
    _check_names(pipeline, given)

    long_prompt = given.get("long_prompt", "cut")
    if long_prompt not in ("cut", "windows"):
        raise InputError(f"long_prompt {long_prompt!r} is unknown: use 'cut' or 'windows'")
    layers = min(one.config.num_hidden_layers for one in components.text_encoders if one is not None)
    clip_skip = _whole("clip_skip", given["clip_skip"], 0, layers - 1) if "clip_skip" in given else None
    most_tokens = given.get("max_sequence_length", pipeline.defaults.get("max_sequence_length", MAX_TOKENS))
    max_sequence_length = _whole("max_sequence_length", most_tokens, 1, MAX_TOKENS)
    images_each = _whole("num_images_per_prompt", given.get("num_images_per_prompt", 1), 1, MAX_IMAGES)
    guidance_rescale = _number("guidance_rescale", given.get("guidance_rescale", 0.0), 0, 1)
    eta = _number("eta", given.get("eta", 0.0), 0, 1)

    _check_either(prompt, given)
    widths = family.widths(components)
    embeds, negative_embeds = (_embeds(given, side, widths) for side in ("", "negative_"))
    count = len(embeds) if embeds is not None else 1 if isinstance(prompt, str) else len(prompt or [])
    if count == 0:
        raise InputError("the list of prompts is empty: give at least one")
    batch = count * images_each
    if batch > MAX_IMAGES:
        raise InputError(f"{batch} images are more than one call makes ({MAX_IMAGES}): split them over several")
    encoders = len(family.ENCODERS)
    prompts: list[Any] = embeds or _prompts({**given, "prompt": prompt}, "", encoders, count)
    # SDXL steers away from zeros, not from an empty text, where there is no negative prompt.
    zeroed = family.ZEROED and components.index.get("force_zeros_for_empty_prompt", True)
    negative: list[Any] = negative_embeds or _prompts(given, "negative_", encoders, count, None if zeroed else "")
    if len(negative) not in (1, count):
        raise InputError(f"negative_prompt_embeds has {len(negative)} entries: give 1 or {count}")

    noise_shape, (height, width) = check_size(pipeline, given.get("height"), given.get("width"))
    default = given.get("guidance_scale", pipeline.defaults["guidance_scale"])
    scales = [_number("guidance_scale", one, 0, math.inf) for one in _each("guidance_scale", default, batch)]
    true_scales = [
        _number("true_cfg_scale", one, 0, math.inf)
        for one in _each("true_cfg_scale", given.get("true_cfg_scale", 1.0), batch)
    ]
    steered = "negative_prompt" in given or negative_embeds is not None
    _warn_of_no_effect(family, given, true_scales, steered, zeroed)
    guidance = [
        family.guidance(components, scale, true_scale, steered)
        for scale, true_scale in zip(scales, true_scales, strict=True)
    ]
    schedulers = _each("scheduler", given.get("scheduler"), batch)
    counts, custom = _schedule(pipeline, given, batch)
    tokens = noise_shape[1] * noise_shape[2] // family.PATCH**2
    halves = 2 if max(guidance) > 1 else 1
    pipeline.functions.admit(batch, halves, (noise_shape[1], noise_shape[2]))
    tables = _tables(pipeline, schedulers, counts, guidance, {"eta": eta, **custom}, tokens)

    seeds, noise = _noise_sources(given.get("seed"), given.get("generator"), batch)
    latents = given.get("latents")
    if latents is not None:
        shape = [batch, *noise_shape]
        if not is_array(latents) or list(latents.shape) != shape:
            was = list(latents.shape) if is_array(latents) else type(latents).__name__
            raise InputError(f"latents are {was}; they must be a tensor {shape}")
        if not is_floating(latents) or not all_finite(latents):
            raise InputError("latents must be finite real numbers")
        if "seed" not in given:
            seeds = [None] * batch  # no seed makes this image again

    def per_image(values: Sequence[Any]) -> list[Any]:
        return [value for value in values for _ in range(batch // len(values))]

    prompts, negative = per_image(prompts), per_image(negative)
    device = str(pipeline.device).partition(":")[0]
    extra: dict[str, Any] = {"dtype": str(pipeline.dtype).removeprefix("torch."), "device": device}
    if pipeline.backend != "eager":
        extra["backend"] = pipeline.backend
    if pipeline.loras:
        extra["loras"] = pipeline.loras
    options = {"eta": eta, "guidance_rescale": guidance_rescale, **custom}
    special = {name: given[name] for name in sorted(family.ARGUMENTS & given.keys()) if _plain(given[name])}

    def own(image: int) -> dict[str, Any]:
        """What only this image's recipe holds."""
        values = {
            name: value[image * len(value) // batch] if isinstance(value, list) else value
            for name, value in special.items()
        }
        if hasattr(schedulers[image], "config"):
            values["scheduler_config"] = {
                key: value for key, value in schedulers[image].config.items() if _plain(value) or value is None
            }
        return {name: value for name, value in (options | values).items() if value}

    recipes = [
        Recipe(
            prompt=_first_text(prompts[i]) or "",
            negative_prompt=_first_text(negative[i]) if family.ZEROED else _first_text(negative[i]) or None,
            num_inference_steps=counts[i] or len(next(iter(custom.values()))),
            scheduler=schedulers[i] if isinstance(schedulers[i], str) else tables[i].sampler,
            guidance_scale=scales[i],
            seed=seeds[i],
            width=width,
            height=height,
            model=pipeline.name,
            extra=extra | own(i),
        )
        for i in range(batch)
    ]
    return Request(
        prompts=prompts,
        negative_prompts=negative,
        clip_skip=clip_skip,
        long_prompt=long_prompt,
        max_sequence_length=max_sequence_length,
        tables=tables,
        guidance_scales=scales,
        guidance_rescale=guidance_rescale,
        time_ids=_time_ids(given, (height, width)) if "original_size" in family.ARGUMENTS else None,
        noise_shape=noise_shape,
        noise=noise,
        latents=latents,
        seeds=seeds,
        recipes=recipes,
    )


def _check_either(prompt: Any, given: dict[str, Any]) -> None:
    """Refuse a text beside the embedding that stands for it."""
    if (prompt is None) == ("prompt_embeds" not in given):
        raise InputError("give either a prompt or prompt_embeds")
    if prompt is not None and (not isinstance(prompt, Sequence) or isinstance(prompt, bytes)):
        raise InputError(f"prompt must be text or a list of texts, not {type(prompt).__name__}")
    for side in ("", "negative_"):
        beside = [name for name in (f"{side}prompt", f"{side}prompt_2", f"{side}prompt_3") if name in given]
        if not side and "clip_skip" in given:
            beside.append("clip_skip")
        if f"{side}prompt_embeds" in given and beside:
            raise InputError(f"give either {beside[0]} or {side}prompt_embeds")


def _warn_of_no_effect(
    family: Any, given: dict[str, Any], true_scales: list[float], steered: bool, zeroed: bool
) -> None:
    """Warn of arguments that `diffusers` passes over in silence."""
    if "true_cfg_scale" in family.ARGUMENTS and (max(true_scales) > 1) != steered:
        lacks = "a true_cfg_scale above 1" if steered else "a negative_prompt"
        has = "the negative prompt" if steered else "true_cfg_scale"
        warnings.warn(f"{has} has no effect: Flux needs {lacks} beside it", stacklevel=4)
    if zeroed and "negative_prompt_2" in given and not steered:
        warnings.warn(
            "negative_prompt_2 has no effect: without a negative_prompt SDXL steers away from zeros", stacklevel=4
        )


def _check_names(pipeline: Pipeline, given: dict[str, Any]) -> None:
    """Refuse arguments that nothing here, or not this family, takes."""
    known = Arguments.__annotations__
    for name in given:
        if name in NOT_IMPLEMENTED:
            raise InputError(f"{name} is not implemented ({NOT_IMPLEMENTED[name]}): leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, COMMON | pipeline.family.ARGUMENTS, n=1, cutoff=0.5)
            raise InputError(f"a call takes no {name}" + (f": did you mean {near[0]}?" if near else ""))
        if name not in COMMON | pipeline.family.ARGUMENTS and given[name] != "cut":  # the default of long_prompt
            raise InputError(f"{pipeline.name} is a {pipeline.components.index['_class_name']}, which takes no {name}")


def check_size(pipeline: Pipeline, height: Any, width: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The shape of one image's latents, and its height and width in pixels; None is the checkpoint's own size.

    Raises:
        InputError: a side is no multiple of the pixels of a token, or too small or large.
    """
    config, factor = pipeline.components.denoiser.config, pipeline.factor
    unit = factor * pipeline.family.PATCH
    most = min(MAX_SIDE, unit * getattr(config, "pos_embed_max_size", MAX_SIDE))
    own = getattr(config, "sample_size", None) or pipeline.family.SAMPLE_SIZE
    own_sides = tuple(own) if isinstance(own, list | tuple) else (own, own)
    sides = []
    for name, value, side in (("height", height, own_sides[0]), ("width", width, own_sides[1])):
        pixels = side * factor if value is None else _whole(name, value, unit, most)
        if pixels % unit:
            near = max(unit, round(pixels / unit) * unit)
            raise InputError(f"{name} {pixels} is no multiple of {unit}: the nearest is {near}")
        sides.append(pixels)
    channels = pipeline.components.vae.config.latent_channels
    return (channels, sides[0] // factor, sides[1] // factor), (sides[0], sides[1])


def _prompts(
    given: dict[str, Any], side: str, encoders: int, count: int, absent: str | None = ""
) -> list[text.Prompt | None]:
    """A text for each encoder, by prompt; where the first is None, `absent` stands for it."""
    names = [f"{side}prompt", f"{side}prompt_2", f"{side}prompt_3"][:encoders]
    columns = [_each(name, given.get(name), count) for name in names]
    rows: list[text.Prompt | None] = []
    for first, *others in zip(*columns, strict=True):
        if side and first is None:
            first = absent
        if side and first is None:
            rows.append(None)
            continue
        # As in diffusers, an encoder without a text of its own reads the first one's.
        row = [
            first,
            *(
                first if other is None else text.check_prompt(other, name) or first
                for other, name in zip(others, names[1:], strict=True)
            ),
        ]
        rows.append(tuple(text.check_prompt(one, name) for one, name in zip(row, names, strict=True)))
    return rows


def _time_ids(given: dict[str, Any], size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """SDXL's six numbers, of the unconditional half and of the prompt."""

    def pair(name: str, default: tuple[int, int]) -> list[float]:
        value = given.get(name, default)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise InputError(f"{name} must be two whole numbers, (height, width) or (top, left), not {value!r}")
        return [float(_whole(name, one, 0, MAX_SIDE)) for one in value]

    names = ("original_size", "crops_coords_top_left", "target_size")
    positive = [pair(name, default) for name, default in zip(names, (size, (0, 0), size), strict=True)]
    both = [name for name in ("negative_original_size", "negative_target_size") if name in given]
    if len(both) == 1 or ("negative_crops_coords_top_left" in given and not both):
        raise InputError("negative_original_size and negative_target_size go together: give both")
    negative = positive
    if both:
        negative = [pair(f"negative_{name}", (0, 0)) for name in names]
    return [*itertools.chain(*negative)], [*itertools.chain(*positive)]


def _schedule(pipeline: Pipeline, given: dict[str, Any], batch: int) -> tuple[list[Any], dict[str, list[Any]]]:
    """Step counts by image, or a custom schedule for all."""
    trained = int(pipeline.components.scheduler.get("num_train_timesteps", 1000))
    custom = {name: _list(name, given[name]) for name in ("sigmas", "timesteps") if name in given}
    if len(custom) == 2:
        raise InputError("give either sigmas or timesteps")
    if custom:
        ((name, values),) = custom.items()
        if not values:
            raise InputError(f"{name} is empty: give at least one")
        if given.get("num_inference_steps", len(values)) != len(values):
            raise InputError(f"give either num_inference_steps or {name}, or as many {name} as steps")
        most = math.inf if name == "sigmas" else trained
        return [None] * batch, {name: [_number(name, value, 0, most) for value in values]}
    steps = given.get("num_inference_steps", pipeline.defaults["num_inference_steps"])
    counts = _each("num_inference_steps", steps, batch)
    return [_whole("num_inference_steps", one, 1, trained) for one in counts], {}


def _tables(
    pipeline: Pipeline,
    schedulers: list[Any],
    counts: list[Any],
    guidance: list[float],
    arguments: dict[str, Any],
    tokens: int,
) -> list[StepTable]:
    """One table per image; images that ask for the same share one, so that the loop updates them together."""
    made: dict[Any, StepTable] = {}
    tables = []
    for scheduler, count, scale in zip(schedulers, counts, guidance, strict=True):
        named = scheduler is None or isinstance(scheduler, str)
        plain = (scheduler if named else id(scheduler), count)
        if plain not in made:
            # An instance may be another at the next call; what a name means stays.
            key = (*plain, tokens, repr(arguments)) if named else None
            table = pipeline.tables.get(key)
            if table is None:
                table = pipeline.compile_table(scheduler, count, tokens, arguments)
            if key is not None:
                if len(pipeline.tables) >= MAX_TABLES:
                    pipeline.tables.clear()
                pipeline.tables[key] = table
            made[plain] = table
        if (*plain, scale) not in made:
            made[*plain, scale] = made[plain].with_guidance(scale)
        tables.append(made[*plain, scale])
    return tables


def _noise_sources(seed: Any, generator: Any, batch: int) -> tuple[list[int | None], list[Noise]]:
    if generator is not None:
        if seed is not None:
            raise InputError("give either seed or generator")
        if _is_generator(generator):
            return [None] * batch, _shared_noise(generator, batch)
        generators = _each("generator", _list("generator", generator), batch)
        for one in generators:
            if not _is_generator(one):
                raise InputError(f"generator must be a torch.Generator or a list of them, not {type(one).__name__}")
        return [None] * batch, [noise_source(one) for one in generators]
    if seed is None:
        seed = secrets.randbelow(2**32 - MAX_IMAGES)
    if not isinstance(seed, str | bytes) and (isinstance(seed, Sequence) or getattr(seed, "ndim", 0) == 1):
        seeds = [check_seed(one) for one in _each("seed", list(seed), batch)]
    else:
        seeds = [check_seed(seed) + i for i in range(batch)]
        if seeds[-1] > MAX_SEED:
            raise InputError(
                f"seed {seeds[0]} leaves no room for {batch} images: use one of at most {MAX_SEED - batch + 1}"
            )
    return list(seeds), [noise_source(one) for one in seeds]


def _is_generator(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Generator)


def _shared_noise(generator: torch.Generator, batch: int) -> list[Noise]:
    """One generator for a batch: it draws all images at once, as `diffusers` does, and each takes its part."""
    waiting: dict[int, Array] = {}
    draw_all = noise_source(generator)

    def source(image: int) -> Noise:
        def draw(shape: tuple[int, ...]) -> Array:
            if image not in waiting:
                waiting.update(enumerate(draw_all((batch, *shape))))
            return waiting.pop(image)

        return draw

    return [source(image) for image in range(batch)]


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all, or a sequence with one each."""
    if getattr(value, "ndim", 0) == 1 and hasattr(value, "tolist"):  # an array
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{name} has {len(value)} entries for {count}: give one for all or one each")
    return list(value)


def _list(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name} must be a list, not {type(values).__name__}") from None


def _embeds(given: dict[str, Any], side: str, widths: tuple[int, int | None]) -> list[text.Embedding] | None:
    """Context and pooled vector by prompt, where the caller gives them."""
    contexts = _matching(given, f"{side}prompt_embeds", 3, widths[0])
    pooled = _matching(given, f"{side}pooled_prompt_embeds", 2, widths[1] or 0)
    if (contexts is None) != (pooled is None) and (widths[1] is not None or contexts is None):
        raise InputError(f"{side}prompt_embeds and {side}pooled_prompt_embeds go together: give both")
    if contexts is None:
        return None
    if pooled is None:
        return [text.Embedding(contexts[i : i + 1], None) for i in range(len(contexts))]
    if len(pooled) != len(contexts):
        raise InputError(f"{side}pooled_prompt_embeds has {len(pooled)} entries for {len(contexts)}: give one each")
    return [text.Embedding(contexts[i : i + 1], pooled[i : i + 1]) for i in range(len(contexts))]


def _matching(given: dict[str, Any], name: str, axes: int, dim: int) -> Array | None:
    value = given.get(name)
    if value is None:
        return None
    if not is_array(value) or value.ndim != axes or 0 in value.shape or value.shape[-1] != dim:
        was = list(value.shape) if is_array(value) else type(value).__name__
        raise InputError(f"{name} is {was}; it must be a tensor [prompts, {'tokens, ' if axes == 3 else ''}{dim}]")
    if not is_floating(value) or not all_finite(value):
        raise InputError(f"{name} must be finite real numbers")
    return value


def _first_text(prompt: text.Prompt | text.Embedding | None) -> str | None:
    return None if prompt is None or isinstance(prompt, text.Embedding) else prompt[0]


def _plain(value: Any) -> bool:
    """Whether a recipe can hold the value."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, str | int | float)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
    return number


def _number(name: str, value: Any, least: float, most: float) -> float:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    with contextlib.suppress(OverflowError):
        value = float(value) if good else value
    if not isinstance(value, float) or not math.isfinite(value) or not least <= value <= most:
        range_ = f"from {least} to {most}" if math.isfinite(most) else f"finite and at least {least}"
        raise InputError(f"{name} must be {range_}, not {value!r}")
    return float(value)
