"""From a prompt to an image, in a straight line. Read this file first.

prompt ─ text.encode ─► Conditioning ┐
scheduler ─ compile ──► StepTable ───┤ prepare ─► Constants (rows by step)
seed ─ noise per image ─► latents ───┘      everything above this line: once per image
for each row:  prediction = denoiser(latents, constants[row]);  latents = step(latents, prediction, table[row])
latents ─ vae.decode ─► pixels ─► image with its own recipe
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
from PIL import Image

from fastsd import arrays, bundle, explain, families, image, lora, text, vae
from fastsd.arrays import Array
from fastsd.backends import FORMS, Engines, Functions, load_backend
from fastsd.errors import InputError, MissingExtraError, NumericError
from fastsd.explain import Explanation
from fastsd.request import Arguments, Request, check, check_size
from fastsd.sampling.loop import Step, initial_latents, stack_timesteps
from fastsd.sampling.table import StepTable
from fastsd.text import Conditioning

if TYPE_CHECKING:
    import torch

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class Timings:
    """Seconds that each stage of a call took, and what was saved."""

    text: float = 0.0
    prepare: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    steps: list[float] = field(default_factory=list)  # one per row of the table; on a GPU, of its launch
    reload: float = 0.0  # of `prepare`: bringing back the weights that only it reads, if they were released
    text_cache_hits: int = 0  # texts that no encoder had to read, as it had read them before
    compilations: int = 0  # of graphs, by the backend "compile": none where `Pipeline.warmup` was given what is asked


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
    def latents(self) -> Array:
        """A copy of the latents after this row, float32 [batch, C, H, W]."""
        return self._step.latents

    def preview(self) -> list[Image.Image]:
        """The images as they would be if the model's present estimate were final; decodes, so it takes a moment."""
        return image.to_pil(self._pipeline.decode(self._step.denoised()))


class Pipeline:
    """A checkpoint that makes images: `Pipeline.from_pretrained(...)`, then call it."""

    def __init__(
        self,
        components: families.Components,
        *,
        name: str,
        defaults: Mapping[str, Any] | None = None,
        release_prepare: bool = False,
        backend: str = "eager",
        engines: Engines | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        kind = components.index["_class_name"]
        self.family = family = families.family(kind)
        self.components = components
        self.name = name
        self.origin = dict(origin or {})  # arguments of the `fastsd export` of the same model; of a bundle its folder
        # Where a call leaves them out. A few-step checkpoint brings its own, so that it is not run for 50 steps.
        self.defaults = {**family.DEFAULTS[kind], **(defaults or {}), **components.index.get("_fastsd", {})}
        self.factor = vae.scale_factor(components.vae)  # pixels per latent
        self.encodings = text.Cache()
        self.tables: dict[Any, StepTable] = {}  # compiled schedulers
        if engines is None:
            chosen = explain.pick(family, components).backend if backend == "auto" else backend
            engines = load_backend(chosen).engines(family, components, **FORMS[chosen])
        self._engines = engines
        self.backend: str = engines.target
        self.device, self.dtype = engines.device, engines.precision
        self.functions: Functions = engines.functions
        self.compile_table: Callable[..., StepTable] = engines.table
        self._weights = threading.RLock()  # held while a LoRA is merged
        self._running = 0  # calls and streams that read the weights
        self._loras = lora.Loras(engines.modules)
        self._waiting = None
        if release_prepare:
            from fastsd import memory

            self._waiting = memory.Waiting(components.denoiser)

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
        weights: str = "checkpoint",
        release_prepare: bool = False,
        trust: bool = False,
    ) -> Pipeline:
        """Load a checkpoint in the diffusers layout, or a bundle of engines.

        Args:
            model: a preset (`fastsd.presets.PRESETS`), a folder (a checkpoint's or a bundle's), or a hub id
                (org/name[@revision]).
            revision: branch, tag or commit of a hub id.
            variant: which weight files, such as "fp16".
            dtype: "auto" (`device.pick_dtype`), "float32", "float16", "bfloat16" or a torch dtype; of a bundle one of
                the precisions it was exported in ("int8", too).
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
            backend: "auto"; for a checkpoint "eager", "compile" or "compile-whole"; for a bundle one of its targets,
                such as "aoti". `explain` says which can run.
            weights: "checkpoint", or "random": a preset's architecture with seeded random weights and no download, to
                measure latency and memory with.
            release_prepare: keep the weights that are read once per image (`memory`) in host memory meanwhile;
                `Timings.reload` says what that costs.
            trust: run a bundle's native engines though they were built on another machine.

        Raises:
            InputError: anything about the arguments or the files is not right; the sentence says what would be.
        """
        if not isinstance(model, str | Path) or not isinstance(variant, str | None):
            raise InputError(f"model and variant are names or paths, not {model!r} and {variant!r}")
        if bundle.is_bundle(model):
            if revision or variant or weights != "checkpoint" or release_prepare:
                raise InputError(
                    f"{str(model)!r} is a bundle, which has no revision, variant, weights or release_prepare"
                )
            loaded = bundle.load(Path(model), backend, str(dtype), str(device), trust=trust)
            return cls(**loaded._asdict(), origin={"model": str(Path(model).absolute()), "trust": trust})
        on, in_dtype = _place(device, dtype, backend)
        from fastsd import checkpoint, presets, random_weights  # a bundle needs none of these

        preset = presets.find(model)
        if weights == "random":
            if preset is None:
                raise InputError(
                    f"weights='random' needs a preset, not {str(model)!r}: use one of {', '.join(presets.PRESETS)}"
                )
            source = random_weights.source(preset)
        elif weights == "checkpoint":
            source = checkpoint.source(checkpoint.resolve(model, revision=revision, variant=variant), variant)
        else:
            raise InputError(f"weights {weights!r} is unknown: use 'checkpoint' or 'random'")
        return cls(
            families.load(source, in_dtype, on),
            name=str(model),
            defaults=preset.defaults if preset is not None else None,
            release_prepare=release_prepare,
            backend=backend,
            origin={
                "model": str(model),
                "revision": revision,
                "variant": variant,
                "weights": None if weights == "checkpoint" else weights,
            },
        )

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        backend: str = "auto",
        release_prepare: bool = False,
    ) -> Pipeline:
        """Load a checkpoint in one .safetensors file, in the layout of its authors.

        Args:
            path: the file.
            config: folder or hub id in the diffusers layout with the tokenizers and whatever the file lacks; None: the
                cached copy of the preset that the file is one of.
            dtype: as in `from_pretrained`.
            device: likewise.
            backend: likewise.
            release_prepare: likewise.

        Raises:
            InputError: anything about the arguments or the files is not right; the sentence says what would be.
        """
        on, in_dtype = _place(device, dtype, backend)
        from fastsd import single_file

        source = single_file.source(path, config=config)
        return cls(
            families.load(source, in_dtype, on),
            name=Path(path).stem,
            release_prepare=release_prepare,
            backend=backend,
            origin={"model": str(path), "config": config},
        )

    @classmethod
    def from_diffusers(cls, pipeline: Any, *, backend: str = "auto") -> Pipeline:
        """Adopt a `diffusers` pipeline: its weights are shared, its device and dtype stay.

        What is merged here by `load_lora` changes the other's images too, and adapters that are loaded there afterwards
        reach only what it shares as modules: load a LoRA on one side, and adopt a pipeline once.

        Raises:
            InputError: its class does not run here, or its weights are not plain (adapters, quantised).
        """
        _place(pipeline.device, pipeline.dtype, backend)
        name = pipeline.name_or_path
        return cls(families.adopt(pipeline), name=name or "diffusers", backend=backend, origin={"model": name})

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
        timings, compilations = Timings(), self._engines.compilations()
        for step in self._run(request, timings):
            if on_step is not None:
                on_step(PipelineStep(step, self))
        images: Any = step.latents
        started = time.perf_counter()
        if output_type != "latent":
            images = self.decode(images)
            if output_type != "pt":
                images = arrays.to_numpy(images)
            if output_type == "pil":
                images = image.to_pil(images)
        if output_type == "pt" and isinstance(images, np.ndarray):
            images = _torch().from_numpy(images)
        timings.decode = time.perf_counter() - started
        timings.compilations = self._engines.compilations() - compilations
        return Result(images, request.seeds, timings, request.recipes)

    def warmup(self, sizes: Sequence[tuple[int, int]] | None = None, batches: Sequence[int] = (1,)) -> int:
        """Compile, capture and load now what calls of these sizes and batches need, and keep what was compiled.

        It makes images of two steps. On a GPU one of every combination; on a CPU, where what is compiled differs only
        from a batch of 1 to a larger one and beyond some size, of the extremes, and of all where these differ.

        Args:
            sizes: (height, width) in pixels; None: the model's own.
            batches: images of a call.

        Returns:
            How many graphs were compiled.

        Raises:
            InputError: a size or a batch is not right, or the model cannot be compiled.
        """
        if not batches or (sizes is not None and not sizes):
            raise InputError("there is nothing to warm up: give at least one size and one batch")
        ordered = [(None, None)] if sizes is None else sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
        counts = sorted(set(batches))
        compilations = self._engines.compilations

        def run(size: tuple[int | None, int | None], batch: int) -> int:
            before = compilations()
            self([""] * batch, height=size[0], width=size[1], num_inference_steps=2, seed=0)
            return compilations() - before

        before = compilations()
        every = [(size, batch) for batch in counts for size in ordered]
        larger = next((batch for batch in counts if batch > 1), counts[-1])
        corners = [(size, batch) for batch in (counts[0], larger, counts[-1]) for size in (ordered[0], ordered[-1])]
        corners = list(dict.fromkeys(corners))
        on_gpu = str(self.device).startswith("cuda")
        compiled = {one: run(*one) for one in (every if on_gpu else corners)}
        differ = any(compiled[size, batch] for size, batch in corners if size != ordered[0] or batch > larger)
        if differ and not on_gpu:
            for one in every:
                if one not in compiled:
                    run(*one)
        if compilations() > before:
            self._engines.keep()
        return compilations() - before

    def stream(
        self, prompt: str | Sequence[str] | None = None, **arguments: Unpack[Arguments]
    ) -> Iterator[PipelineStep]:
        """Make images, yielding after every row; stop iterating to cancel.

        Arguments are checked at once; `decode` of the last step's latents gives the pixels.
        """
        request = check(self, prompt, **arguments)
        return (PipelineStep(step, self) for step in self._run(request, Timings()))

    def _run(self, request: Request, timings: Timings) -> Iterator[Step]:
        """`_steps`, counted among those that read the weights."""
        with self._weights:
            self._running += 1
        try:
            yield from self._steps(request, timings)
        finally:
            with self._weights:
                self._running -= 1

    def _steps(self, request: Request, timings: Timings) -> Iterator[Step]:
        """The straight line, from the prompt to the last latents."""
        started = time.perf_counter()
        guided = any(table.guided for table in request.tables)
        conditioning = self._condition(request, guided, timings)
        timings.text = time.perf_counter() - started

        started = time.perf_counter()
        halves = 2 if guided else 1  # both halves of guidance run in one batch, the unconditional one first
        timesteps = np.tile(stack_timesteps(request.tables), (1, halves))
        _, height, width = request.noise_shape
        with self._resident() as timings.reload:
            constants = self.functions.prepare(timesteps, conditioning, (height, width))
        if request.latents is not None:
            noise = self.functions.array(request.latents)
        else:
            noise = arrays.stack([self.functions.array(draw(request.noise_shape)) for draw in request.noise])
        latents = initial_latents(noise, request.tables)
        self.functions.synchronize()
        timings.prepare = time.perf_counter() - started

        started = last = time.perf_counter()
        rescale = request.guidance_rescale
        rows = self.functions.sample(latents, constants, request.tables, noise=request.noise, guidance_rescale=rescale)
        for step in rows:
            if step.index == step.total - 1:
                self.functions.synchronize()
                self._refuse_overflow(all(step.finite()), "the denoiser", "latents")
            now = time.perf_counter()
            timings.steps.append(now - last)
            timings.denoise = now - started
            yield step
            last = time.perf_counter()

    def _condition(self, request: Request, guided: bool, timings: Timings) -> Conditioning:
        """What the prompts say to the denoiser; with guidance the unconditional half comes first."""
        embeddings, timings.text_cache_hits = text.encode(
            self.components,
            self.family.ENCODERS,
            self.family.combine,
            request.prompts,
            request.negative_prompts if guided else [],
            clip_skip=request.clip_skip,
            max_sequence_length=request.max_sequence_length,
            long_prompt=request.long_prompt,
            read=self.functions.read,
            cache=self.encodings,
            adapters=self._loras.key,
        )
        contexts, pooled = zip(*embeddings, strict=True)
        if len({context.shape[1] for context in contexts}) > 1:
            lengths = " and ".join(str(n) for n in sorted({context.shape[1] for context in contexts}))
            raise InputError(f"the two halves of guidance have {lengths} tokens: give embeddings of one length")

        def join(parts: Sequence[Array]) -> Array:
            joined = arrays.concatenate([self.functions.cast(part) for part in parts])
            self._refuse_overflow(arrays.all_finite(joined), "the text encoder", "hidden states")
            return joined

        times = 2 if guided else 1
        time_ids = None
        if request.time_ids is not None:
            each = [ids for ids in request.time_ids[-times:] for _ in request.prompts]
            time_ids = self.functions.array(np.array(each))
        return Conditioning(
            context=join(contexts),
            pooled=None if pooled[0] is None else join(pooled),
            guidance_scale=np.array(request.guidance_scales * times, dtype=np.float64),
            time_ids=time_ids,
        )

    def decode(self, latents: Array) -> Array:
        """Latents [batch, C, H, W] to pixels, float32 [batch, 8H, 8W, 3] in 0..1.

        Raises:
            InputError: the shape is another.
            NumericError: the VAE produced NaN or Inf.
        """
        channels = self.components.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
            raise InputError(f"latents are {list(latents.shape)}; they must be [batch, {channels}, height, width]")
        pixels = self.functions.decode(self.functions.array(latents))
        self._refuse_overflow(arrays.all_finite(pixels), "the VAE", "image")
        return pixels

    def encode(self, images: Image.Image | Sequence[Image.Image] | Array) -> Array:
        """Images to latents, float32 [batch, C, height / 8, width / 8]: what `decode` turns back into them.

        Args:
            images: PIL images of one size, or pixels [batch, height, width, 3] in 0..1.

        Raises:
            InputError: they are neither, or a side is no multiple of 8 (SD3, Flux: 16).
            NumericError: the VAE produced NaN or Inf.
        """
        pixels: Array = images if arrays.is_array(images) else image.from_pil(images)
        if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
            raise InputError(f"pixels are {list(pixels.shape)}; they must be [batch, height, width, 3]")
        check_size(self, pixels.shape[1], pixels.shape[2])
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise InputError("pixels must be finite and from 0 to 1")
        latents = self.functions.encode(self.functions.array(pixels))
        self._refuse_overflow(arrays.all_finite(latents), "the VAE", "latents")
        return latents

    def load_lora(
        self,
        path_or_id: str | Path,
        weight: float = 1.0,
        name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Merge a LoRA into the weights, beside those that are there; they keep their addresses.

        Args:
            path_or_id: a .safetensors file, a folder with one, or a hub id; in any layout that `diffusers` converts.
            weight: its strength, any finite number.
            name: to unload it by; None: that of its file.
            weight_name: which file of a folder or hub id.
            revision: of a hub id.

        Returns:
            The name.

        Raises:
            InputError: it is none, or not for this model, or images are being made; the weights are as they were.
        """
        if not self._engines.modules:
            raise InputError(f"{self.name} is a bundle, whose weights are in its engines: export it with --lora")
        kind = self.family.__name__.rpartition(".")[2]
        adapter = lora.read(path_or_id, kind, weight_name=weight_name, revision=revision)
        with self._alone(), self._resident():
            return self._loras.load(adapter, weight, name)

    def unload_lora(self, name: str | None = None) -> None:
        """Take one LoRA out of the weights, or all of them (None): bit for bit what they were.

        Raises:
            InputError: there is none of that name, or images are being made.
        """
        with self._alone(), self._resident():
            self._loras.unload(name)

    @property
    def loras(self) -> dict[str, float]:
        """Name -> weight of the LoRAs in the weights."""
        return {**self._engines.loras, **self._loras.active}

    def explain(self) -> Explanation:
        """Which backends can run this model here, why the others cannot, what would change that, and what "auto" picks.

        Print it, or read its rows; nothing is loaded for it.
        """
        return explain.of_pipeline(self, self._loras.sources)

    def memory(self) -> dict[str, tuple[int, int]]:
        """Bytes of weights by component, and how many of them only `prepare` reads; of a bundle, of its files."""
        if self._engines.sizes:
            return {name: (size, 0) for name, size in self._engines.sizes.items()}
        from fastsd import memory

        return memory.report({**self._engines.modules, "vae": self.components.vae})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody reads the weights inside; a call that begins meanwhile waits."""
        with self._weights:
            if self._running:
                raise InputError(
                    f"{self._running} calls or streams read the weights: let them end, or close the stream, before "
                    "a LoRA changes them"
                )
            yield

    def _resident(self) -> AbstractContextManager[float]:
        """All weights of the denoiser are on the device inside; gives the seconds that this took."""
        return nullcontext(0.0) if self._waiting is None else self._waiting.resident()

    def _refuse_overflow(self, finite: bool, component: str, what: str) -> None:
        if not finite:
            exact = str(self.dtype).endswith("float32")
            better = "check the checkpoint's weights" if exact else "use dtype='float32'"
            raise NumericError(f"{component} produced NaN or Inf in the {what} in {self.dtype}: {better}")


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("checkpoints and tensors need torch: pip install 'fastsd[cpu]' (or [gpu])") from error
    return torch


def _place(device: str | torch.device, dtype: str | torch.dtype, backend: str) -> tuple[torch.device, torch.dtype]:
    """Where a checkpoint's modules go and in which dtype, if the backend can run them there."""
    if backend in bundle.TARGETS:
        raise InputError(
            f"the backend {backend!r} runs bundles: make one with `fastsd export MODEL --to {backend} -o DIR`, "
            "and load DIR"
        )
    if backend not in ("auto", *FORMS):
        known = ", ".join(("auto", *FORMS, *bundle.TARGETS))
        raise InputError(f"the backend {backend!r} is unknown: use one of {known}")
    _torch()
    from fastsd.device import pick_device, pick_dtype

    on = pick_device(device)
    if backend != "auto":  # before the weights are read
        explain.require(backend.removesuffix("-whole"), str(on))
    return on, pick_dtype(dtype, on)
