"""A call's arguments, checked before anything is allocated or computed."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from fastsd import text
from fastsd.errors import InputError
from fastsd.image import Recipe
from fastsd.sampling.noise import MAX_SEED, check_seed, noise_source
from fastsd.sampling.schedulers import resolve_scheduler
from fastsd.sampling.table import StepTable

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

MAX_SIDE = 8192  # pixels; beyond it a typing error is likelier than a wish
MAX_IMAGES = 1024  # per call

Noise = Callable[[tuple[int, ...]], Any]


class Arguments(TypedDict, total=False):
    """What a call takes besides the prompt; names follow `diffusers`.

    Lists of seeds, schedulers, step counts and guidance scales have one entry per image, and images of one batch may
    differ in all of them; images are ordered prompt by prompt.

    Attributes:
        negative_prompt: what to steer away from; one for all or one per prompt.
        height: pixels, a multiple of the VAE's factor (8); None: the checkpoint's own size.
        width: likewise.
        num_inference_steps: None: the checkpoint's default.
        guidance_scale: classifier-free guidance (https://arxiv.org/abs/2207.12598); 1 or less means none.
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
        prompt_embeds: hidden states [prompts, tokens, dim] in place of the prompt.
        negative_prompt_embeds: hidden states [prompts or 1, tokens, dim] in place of the negative prompt.
        clip_skip: layers of the text encoder to skip, from the end.
        long_prompt: "cut" a prompt beyond the encoder's 77 tokens with a warning, or read it in "windows" of 77.
    """

    negative_prompt: str | Sequence[str] | None
    height: int | None
    width: int | None
    num_inference_steps: int | Sequence[int] | None
    guidance_scale: float | Sequence[float] | None
    guidance_rescale: float
    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    scheduler: Any
    eta: float
    sigmas: Sequence[float] | None
    timesteps: Sequence[int] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    clip_skip: int | None
    long_prompt: text.LongPrompt


@dataclass(frozen=True)
class Request:
    """Checked arguments, one entry per image where images may differ."""

    prompts: list[str]
    negative_prompts: list[str]
    prompt_embeds: Tensor | None  # [batch, tokens, dim]
    negative_prompt_embeds: Tensor | None  # [batch, tokens, dim]
    clip_skip: int | None
    long_prompt: text.LongPrompt
    tables: list[StepTable]
    guidance_scales: list[float]
    guidance_rescale: float
    noise_shape: tuple[int, ...]  # of one image's latents
    noise: list[Noise]
    latents: Tensor | None
    seeds: list[int | None]
    recipes: list[Recipe]


def check(
    pipeline: Pipeline,
    prompt: str | Sequence[str] | None = None,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
    scheduler: Any = None,
    eta: float = 0.0,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[int] | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    clip_skip: int | None = None,
    long_prompt: text.LongPrompt = "cut",
) -> Request:
    """Check the arguments of a call (see `Arguments`) against a pipeline.

    Raises:
        InputError: one of them is not right; the sentence says what would be.
    """
    if long_prompt not in ("cut", "windows"):
        raise InputError(f"long_prompt {long_prompt!r} is unknown: use 'cut' or 'windows'")
    layers = pipeline.components.text_encoder.config.num_hidden_layers
    if clip_skip is not None:
        clip_skip = _whole("clip_skip", clip_skip, 0, layers - 1)
    images_each = _whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    guidance_rescale = _number("guidance_rescale", guidance_rescale, 0, 1)
    eta = _number("eta", eta, 0, 1)

    if (prompt is None) == (prompt_embeds is None):
        raise InputError("give either a prompt or prompt_embeds")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise InputError("give either a negative_prompt or negative_prompt_embeds")
    width_of_text = pipeline.components.denoiser.config.cross_attention_dim
    embeds = _embeds("prompt_embeds", prompt_embeds, width_of_text)
    negative_embeds = _embeds("negative_prompt_embeds", negative_prompt_embeds, width_of_text)
    count = len(embeds) if embeds is not None else 1 if isinstance(prompt, str) else len(list(prompt or []))
    if count == 0:
        raise InputError("the list of prompts is empty: give at least one")
    batch = count * images_each
    if batch > MAX_IMAGES:
        raise InputError(f"{batch} images are more than one call makes ({MAX_IMAGES}): split them over several")
    prompts = [text.check_prompt(one) for one in _each("prompt", prompt or "", count)]
    negative = [
        text.check_prompt(one, "negative_prompt") for one in _each("negative_prompt", negative_prompt or "", count)
    ]
    if negative_embeds is not None and len(negative_embeds) not in (1, count):
        raise InputError(f"negative_prompt_embeds has {len(negative_embeds)} entries: give 1 or {count}")

    noise_shape, (height, width) = check_size(pipeline, height, width)
    default = pipeline.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    scales = [_number("guidance_scale", one, 0, math.inf) for one in _each("guidance_scale", default, batch)]
    schedulers = _each("scheduler", scheduler, batch)
    counts, custom = _schedule(pipeline, num_inference_steps, sigmas, timesteps, batch)
    tables = _tables(pipeline, schedulers, counts, scales, {"eta": eta, **custom})

    seeds, noise = _noise_sources(seed, generator, batch)
    if latents is not None:
        shape = [batch, *noise_shape]
        if not isinstance(latents, Tensor) or list(latents.shape) != shape:
            given = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise InputError(f"latents are {given}; they must be a tensor {shape}")
        if not bool(torch.isfinite(latents).all()):
            raise InputError("latents hold NaN or Inf: they must be finite")

    def per_image(values: Sequence[Any]) -> list[Any]:
        return [value for value in values for _ in range(batch // len(values))]

    prompts, negative = per_image(prompts), per_image(negative)
    options = {"eta": eta, "guidance_rescale": guidance_rescale, "clip_skip": clip_skip, **custom}
    extra = {"dtype": str(pipeline.dtype).removeprefix("torch."), "device": pipeline.device.type}
    recipes = [
        Recipe(
            prompt=prompts[i],
            negative_prompt=negative[i] or None,
            num_inference_steps=counts[i] or len(next(iter(custom.values()))),
            scheduler=schedulers[i] if isinstance(schedulers[i], str) else tables[i].sampler,
            guidance_scale=scales[i],
            seed=seeds[i],
            width=width,
            height=height,
            model=pipeline.name,
            extra=extra | {name: value for name, value in options.items() if value},
        )
        for i in range(batch)
    ]
    return Request(
        prompts=prompts,
        negative_prompts=negative,
        prompt_embeds=None if embeds is None else torch.stack(per_image(list(embeds))),
        negative_prompt_embeds=None if negative_embeds is None else torch.stack(per_image(list(negative_embeds))),
        clip_skip=clip_skip,
        long_prompt=long_prompt,
        tables=tables,
        guidance_scales=scales,
        guidance_rescale=guidance_rescale,
        noise_shape=noise_shape,
        noise=noise,
        latents=latents,
        seeds=seeds,
        recipes=recipes,
    )


def check_size(pipeline: Pipeline, height: Any, width: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The shape of one image's latents, and its height and width in pixels; None is the checkpoint's own size.

    Raises:
        InputError: a side is no multiple of the VAE's factor, or too small or large.
    """
    config, factor = pipeline.components.denoiser.config, pipeline.factor
    own = config.sample_size or 64
    own_sides = tuple(own) if isinstance(own, list | tuple) else (own, own)
    sides = []
    for name, value, side in (("height", height, own_sides[0]), ("width", width, own_sides[1])):
        pixels = side * factor if value is None else _whole(name, value, factor, MAX_SIDE)
        if pixels % factor:
            near = max(factor, round(pixels / factor) * factor)
            raise InputError(f"{name} {pixels} is no multiple of {factor}: the nearest is {near}")
        sides.append(pixels)
    return (config.in_channels, sides[0] // factor, sides[1] // factor), (sides[0], sides[1])


def _schedule(
    pipeline: Pipeline,
    steps: Any,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[int] | None,
    batch: int,
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Step counts by image, or a custom schedule for all."""
    custom = {
        name: list(values) for name, values in (("sigmas", sigmas), ("timesteps", timesteps)) if values is not None
    }
    if len(custom) == 2:
        raise InputError("give either sigmas or timesteps")
    if custom:
        ((name, values),) = custom.items()
        if steps is not None:
            raise InputError(f"give either num_inference_steps or {name}")
        if not values:
            raise InputError(f"{name} is empty: give at least one")
        return [None] * batch, {name: [_number(name, value, 0, math.inf) for value in values]}
    counts = _each("num_inference_steps", pipeline.defaults["num_inference_steps"] if steps is None else steps, batch)
    trained = int(pipeline.components.scheduler.get("num_train_timesteps", 1000))
    return [_whole("num_inference_steps", one, 1, trained) for one in counts], {}


def _tables(
    pipeline: Pipeline,
    schedulers: list[Any],
    counts: list[Any],
    scales: list[float],
    arguments: dict[str, Any],
) -> list[StepTable]:
    """One table per image; images that ask for the same share one, so that the loop updates them together."""
    made: dict[Any, StepTable] = {}
    tables = []
    for scheduler, steps, scale in zip(schedulers, counts, scales, strict=True):
        name = scheduler if isinstance(scheduler, str | None) else id(scheduler)
        plain = (name, steps)
        if plain not in made:
            resolved = resolve_scheduler(scheduler, pipeline.components.scheduler)
            made[plain] = StepTable.from_scheduler(resolved, steps, **arguments)
        guidance = scale if pipeline.family.guides(pipeline.components, scale) else 1.0
        key = (*plain, guidance)
        if key not in made:
            made[key] = made[plain].with_guidance(guidance)
        tables.append(made[key])
    return tables


def _noise_sources(seed: Any, generator: Any, batch: int) -> tuple[list[int | None], list[Noise]]:
    if generator is not None:
        if seed is not None:
            raise InputError("give either seed or generator")
        if isinstance(generator, torch.Generator):
            return [None] * batch, _shared_noise(generator, batch)
        generators = _each("generator", list(generator), batch)
        for one in generators:
            if not isinstance(one, torch.Generator):
                raise InputError(f"generator must be a torch.Generator or a list of them, not {type(one).__name__}")
        return [None] * batch, [noise_source(one) for one in generators]
    if seed is None:
        seed = secrets.randbelow(2**32 - MAX_IMAGES)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = [check_seed(one) for one in _each("seed", list(seed), batch)]
    else:
        seeds = [check_seed(seed) + i for i in range(batch)]
        if seeds[-1] > MAX_SEED:
            raise InputError(
                f"seed {seed} leaves no room for {batch} images: use one of at most {MAX_SEED - batch + 1}"
            )
    return list(seeds), [noise_source(one) for one in seeds]


def _shared_noise(generator: torch.Generator, batch: int) -> list[Noise]:
    """One generator for a batch: it draws all images at once, as `diffusers` does, and each takes its part."""
    waiting: dict[int, Tensor] = {}
    draw_all = noise_source(generator)

    def source(image: int) -> Noise:
        def draw(shape: tuple[int, ...]) -> Tensor:
            if image not in waiting:
                waiting.update(enumerate(draw_all((batch, *shape))))
            return waiting.pop(image)

        return draw

    return [source(image) for image in range(batch)]


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all, or a sequence with one each."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{name} has {len(value)} entries for {count}: give one for all or one each")
    return list(value)


def _embeds(name: str, value: Tensor | None, dim: int) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.ndim != 3 or 0 in value.shape or value.shape[2] != dim:
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} is {given}; it must be a tensor [prompts, tokens, {dim}]")
    return value


def _whole(name: str, value: Any, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
    return number


def _number(name: str, value: Any, least: float, most: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not least <= value <= most:
        range_ = f"from {least} to {most}" if math.isfinite(most) else f"finite and at least {least}"
        raise InputError(f"{name} must be {range_}, not {value!r}")
    return float(value)
