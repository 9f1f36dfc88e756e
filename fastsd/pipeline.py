"""From a prompt to an image, in a straight line. Read this file first.

prompt ─ text.encode ─► hidden states ┐
scheduler ─ compile ──► StepTable ────┤ prepare ─► Constants (rows by step)
seed ─ noise per image ─► latents ────┘      everything above this line: once per image
for each row:  prediction = denoiser(latents, constants[row]);  latents = step(latents, prediction, table[row])
latents ─ vae.decode ─► pixels ─► image with its own recipe
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Unpack

import torch
from PIL import Image
from torch import Tensor

from fastsd import checkpoint, families, image, text, vae
from fastsd.device import pick_device, pick_dtype
from fastsd.errors import InputError, NumericError
from fastsd.request import Arguments, Request, check, check_size
from fastsd.sampling.loop import Step, denoise, initial_latents, stack_timesteps

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class Timings:
    """Seconds that each stage of a call took."""

    text: float = 0.0
    prepare: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    steps: list[float] = field(default_factory=list)  # one per row of the table; on a GPU, of its launch


@dataclass(frozen=True)
class Result:
    """What a call returns.

    Attributes:
        images: PIL images ("pil"), float32 [batch, height, width, 3] in 0..1 ("np" as numpy, "pt" as torch), or the
            latents [batch, C, H, W] ("latent").
        seeds: one per image; None where the caller's generator took its place.
        timings: seconds by stage.
        recipes: one per image, all that is needed to make it again.
    """

    images: Any
    seeds: list[int | None]
    timings: Timings
    recipes: list[image.Recipe]

    def save(self, path: str | Path, *, overwrite: bool = False, metadata: bool = True) -> list[Path]:
        """Write PIL images as PNG files (`image.output_paths` names several), each with its recipe."""
        if not (isinstance(self.images, list) and all(isinstance(one, Image.Image) for one in self.images)):
            raise InputError("only PIL images can be saved: ask the pipeline for output_type='pil'")
        paths = image.output_paths(path, len(self.images))
        for target in paths:
            image.check_output(target, overwrite)
        for one, target, recipe in zip(self.images, paths, self.recipes, strict=True):
            image.save_png(one, target, recipe, overwrite=overwrite, metadata=metadata)
        return paths


class PipelineStep:
    """One finished row of a running call; read it before asking for the next.

    Attributes:
        index: row number, from 0.
        total: rows of the longest table in the batch (a second-order sampler has about two a step).
    """

    def __init__(self, step: Step, pipeline: Pipeline) -> None:
        self._step, self._pipeline = step, pipeline
        self.index, self.total = step.index, step.total

    @property
    def latents(self) -> Tensor:
        """A copy of the latents after this row, float32 [batch, C, H, W]."""
        latents: Tensor = self._step.latents
        return latents

    def preview(self) -> list[Image.Image]:
        """The images as they would be if the model's present estimate were final; decodes, so it takes a moment."""
        return image.to_pil(self._pipeline.decode(self._step.denoised()))


class Pipeline:
    """A checkpoint that makes images: `Pipeline.from_pretrained(...)`, then call it."""

    def __init__(self, family: ModuleType, components: Any, *, name: str, defaults: dict[str, Any]) -> None:
        self.family = family
        self.components = components
        self.name = name
        self.defaults = defaults  # num_inference_steps and guidance_scale where a call leaves them out
        self.factor = vae.scale_factor(components.vae)  # pixels per latent
        weight = components.denoiser.conv_in.weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "demo",
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        backend: str = "auto",
    ) -> Pipeline:
        """Load a checkpoint in the diffusers layout.

        Args:
            model: a preset (`fastsd.checkpoint.PRESETS`), a folder, or a hub id (org/name[@revision]).
            revision: branch, tag or commit of a hub id.
            variant: which weight files, such as "fp16".
            dtype: "auto" (`device.pick_dtype`), "float32", "float16", "bfloat16" or a torch dtype.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
            backend: "auto" or "eager".

        Raises:
            InputError: anything about the arguments or the files is not right; the sentence says what would be.
        """
        if backend not in ("auto", "eager"):
            raise InputError(f"the backend {backend!r} is unknown: use 'auto' or 'eager'")
        on = pick_device(device)
        in_dtype = pick_dtype(dtype, on)
        folder = checkpoint.resolve(model, revision=revision, variant=variant)
        index = checkpoint.read_index(folder)
        family = families.family(index["_class_name"])
        components = family.load(folder, variant=variant, dtype=in_dtype, device=on)
        # A checkpoint may bring its own defaults, so that a few-step model is not run 50 steps.
        defaults = {**family.DEFAULTS[index["_class_name"]], **index.get("_fastsd", {})}
        return cls(family, components, name=str(model), defaults=defaults)

    @classmethod
    def from_diffusers(cls, pipeline: Any) -> Pipeline:
        """Adopt a `diffusers` pipeline: its weights are shared, its device and dtype stay."""
        kind = type(pipeline).__name__
        family = families.family(kind)
        name = pipeline.name_or_path or "diffusers"
        return cls(family, family.adopt(pipeline), name=name, defaults=family.DEFAULTS[kind])

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: OutputType = "pil",
        on_step: Callable[[PipelineStep], object] | None = None,
        **arguments: Unpack[Arguments],
    ) -> Result:
        """Make images.

        Args:
            prompt: text, or one text per image.
            output_type: see `Result.images`.
            on_step: called after each row; an exception it raises ends the call.
            **arguments: see `request.Arguments`.

        Raises:
            InputError: an argument is not right; nothing was computed.
            NumericError: a component produced NaN or Inf.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type {output_type!r} is unknown: use 'pil', 'np', 'pt' or 'latent'")
        request = check(self, prompt, **arguments)
        timings = Timings()
        for step in self._run(request, timings):
            if on_step is not None:
                on_step(PipelineStep(step, self))
        images: Any = step.latents
        self._refuse_overflow(images, "the denoiser", "latents")
        started = time.perf_counter()
        if output_type != "latent":
            images = self.decode(images)
            if output_type != "pt":
                images = images.cpu().numpy()
            if output_type == "pil":
                images = image.to_pil(images)
        timings.decode = time.perf_counter() - started
        return Result(images, request.seeds, timings, request.recipes)

    def stream(
        self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[Arguments]
    ) -> Iterator[PipelineStep]:
        """Make images, yielding after every row; stop iterating to cancel.

        Arguments are checked at once; `decode` of the last step's latents gives the pixels.
        """
        request = check(self, prompt, **arguments)
        return (PipelineStep(step, self) for step in self._run(request, Timings()))

    def _run(self, request: Request, timings: Timings) -> Iterator[Step]:
        """The straight line, from the prompt to the last latents."""
        started = time.perf_counter()
        guided = any(table.guided for table in request.tables)
        states = self._encode_text(request, guided)
        timings.text = time.perf_counter() - started

        started = time.perf_counter()
        halves = 2 if guided else 1  # both halves of guidance run in one batch, the unconditional one first
        timesteps = torch.from_numpy(stack_timesteps(request.tables)).repeat(1, halves)
        with torch.inference_mode():
            constants = self.family.prepare(
                self.components, timesteps.to(self.device), states, request.guidance_scales * halves
            )
        noise = request.latents
        if noise is None:
            noise = torch.stack([torch.as_tensor(draw(request.noise_shape)) for draw in request.noise])
        latents = initial_latents(noise.to(self.device, torch.float32), request.tables)
        self._synchronize()
        timings.prepare = time.perf_counter() - started

        @torch.inference_mode()
        def denoiser(model_input: Tensor, row: int) -> Tensor:
            prediction: Tensor = self.components.denoiser(
                model_input.to(self.dtype), constants.modulation[row], constants.context
            )
            return prediction

        started = last = time.perf_counter()
        rescale = request.guidance_rescale
        for step in denoise(denoiser, latents, request.tables, noise=request.noise, guidance_rescale=rescale):
            if step.index == step.total - 1:
                self._synchronize()
            now = time.perf_counter()
            timings.steps.append(now - last)
            timings.denoise = now - started
            yield step
            last = time.perf_counter()

    def _encode_text(self, request: Request, guided: bool) -> Tensor:
        """Hidden states [batch, tokens, dim], or [2 * batch, ...] with the unconditional half first."""
        tokenizer, encoder = self.components.tokenizer, self.components.text_encoder
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        # As in diffusers, clip_skip is for the prompt alone.
        halves = [(request.prompts, request.prompt_embeds, request.clip_skip)]
        if guided:
            halves.insert(0, (request.negative_prompts, request.negative_prompt_embeds, None))
        windows = {
            prompt: text.windows(tokenizer, prompt, length, request.long_prompt)
            for prompts, embeds, _ in halves
            if embeds is None
            for prompt in prompts
        }
        # All prompts of a batch have as many windows as the longest: an empty window says nothing.
        blank = text.windows(tokenizer, "", length, request.long_prompt)
        most = max(map(len, windows.values()), default=1)
        parts = []
        for prompts, embeds, clip_skip in halves:
            if embeds is None:
                states = {
                    prompt: text.encode(encoder, windows[prompt] + blank * (most - len(windows[prompt])), clip_skip)
                    for prompt in dict.fromkeys(prompts)
                }
                embeds = torch.cat([states[prompt] for prompt in prompts])
            parts.append(embeds.to(self.device, self.dtype))
        if len({part.shape[1] for part in parts}) > 1:
            lengths = " and ".join(str(part.shape[1]) for part in parts)
            raise InputError(f"the two halves of guidance have {lengths} tokens: give embeddings of one length")
        joined = torch.cat(parts)
        self._refuse_overflow(joined, "the text encoder", "hidden states")
        return joined

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [batch, C, H, W] to pixels, float32 [batch, 8H, 8W, 3] in 0..1.

        Raises:
            InputError: the shape is another.
            NumericError: the VAE produced NaN or Inf.
        """
        channels = self.components.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
            raise InputError(f"latents are {list(latents.shape)}; they must be [batch, {channels}, height, width]")
        pixels = vae.decode(self.components.vae, latents.to(self.device))
        self._refuse_overflow(pixels, "the VAE", "image")
        return pixels

    def encode(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """Images to latents, float32 [batch, C, height / 8, width / 8]: what `decode` turns back into them.

        Args:
            images: PIL images of one size, or pixels [batch, height, width, 3] in 0..1.

        Raises:
            InputError: they are neither, or a side is no multiple of 8.
            NumericError: the VAE produced NaN or Inf.
        """
        pixels = images if isinstance(images, Tensor) else image.from_pil(images)
        if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
            raise InputError(f"pixels are {list(pixels.shape)}; they must be [batch, height, width, 3]")
        check_size(self, pixels.shape[1], pixels.shape[2])
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise InputError("pixels must be finite and from 0 to 1")
        latents = vae.encode(self.components.vae, pixels)
        self._refuse_overflow(latents, "the VAE", "latents")
        return latents

    def _refuse_overflow(self, values: Tensor, component: str, what: str) -> None:
        if not bool(torch.isfinite(values).all()):
            better = "check the checkpoint's weights" if self.dtype == torch.float32 else "use dtype='float32'"
            raise NumericError(f"{component} produced NaN or Inf in the {what} in {self.dtype}: {better}")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
