"""`fastsd generate`: prompts to PNG files."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fastsd import image, lora
from fastsd.errors import InputError


def generate(
    words: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="One or several prompts.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Preset, folder, bundle, hub id or .safetensors file.")
    ] = "demo",
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "-n", help="What to steer away from.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", "-W", help="Pixels, a multiple of 8 (SD3, Flux: 16).")] = None,
    height: Annotated[
        int | None, typer.Option("--height", "-H", help="Pixels, a multiple of 8 (SD3, Flux: 16).")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--num-inference-steps", help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg-scale", help="1 or less: no guidance.")
    ] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option("--true-cfg-scale", help="Flux: guidance with the negative prompt.")
    ] = None,
    guidance_rescale: Annotated[float, typer.Option("--guidance-rescale", help="0 to 1.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Image i has seed + i; random if left out.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", help="Images per prompt.")] = 1,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="Short name or diffusers class.")] = None,
    eta: Annotated[float, typer.Option("--eta", help="DDIM's noise, 0 to 1.")] = 0.0,
    clip_skip: Annotated[int | None, typer.Option("--clip-skip", help="Text encoder layers to skip.")] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option("--max-sequence-length", help="Tokens of T5 (SD3, Flux), at most 512.")
    ] = None,
    long_prompt: Annotated[str, typer.Option("--long-prompt", help="cut | windows: prompts over 77 tokens.")] = "cut",
    output: Annotated[str, typer.Option("--output", "-o", help="A .png, or a folder for numbered files.")] = "out.png",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Leave the recipe out of the PNG.")] = False,
    backend: Annotated[
        str, typer.Option("--backend", help="auto | eager | compile, or a bundle's: onnx | openvino | aoti | ...")
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto | float32 | bfloat16 | float16 | int8")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto | cpu | cuda")] = "auto",
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="Weight files to take, such as fp16.")] = None,
    weights: Annotated[
        str, typer.Option("--weights", help="checkpoint | random: a preset's size without its download.")
    ] = "checkpoint",
    config: Annotated[
        str | None, typer.Option("--config", help="For a .safetensors file: folder or hub id with its tokenizers.")
    ] = None,
    loras: Annotated[
        list[str] | None, typer.Option("--lora", metavar="PATH[:WEIGHT]", help="A LoRA; may be repeated.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run a bundle's native engines that another machine built.")
    ] = False,
    release_prepare: Annotated[
        bool, typer.Option("--release-prepare", help="Keep weights read once per image in host memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make images from prompts."""
    prompts = [*(words or []), *(prompt or [])]
    if not prompts:
        raise InputError('no prompt: give one, such as fastsd generate "a red circle on a blue background"')
    if num_images < 1:
        raise InputError(f"--num-images must be 1 or more, not {num_images}")
    # Before any work: torch takes seconds to import.
    adapters = [lora.parse(one) for one in loras or []]
    paths = image.output_paths(output, len(prompts) * num_images)
    for path in paths:
        image.check_output(path, overwrite)
    single = model.lower().endswith(".safetensors")
    if single and (revision or variant or weights != "checkpoint"):
        raise InputError(f"{model!r} is a file: --revision, --variant and --weights are for checkpoints of other kinds")
    if config is not None and not single:
        raise InputError(f"--config is for a .safetensors file, and {model!r} is none: leave it out")

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import fastsd

    place: Any = {"dtype": dtype, "device": device, "backend": backend, "release_prepare": release_prepare}
    if single:
        pipe = fastsd.Pipeline.from_single_file(model, config=config, **place)
    else:
        pipe = fastsd.Pipeline.from_pretrained(
            model, revision=revision, variant=variant, weights=weights, trust=trust, **place
        )
    for path_or_id, weight in adapters:
        pipe.load_lora(path_or_id, weight)
    with _progress() as on_step:
        result = pipe(
            prompts,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            guidance_rescale=guidance_rescale,
            seed=seed,
            num_images_per_prompt=num_images,
            scheduler=scheduler,
            eta=eta,
            clip_skip=clip_skip,
            max_sequence_length=max_sequence_length,
            long_prompt=long_prompt,  # type: ignore[arg-type]  # checked there
            on_step=on_step,
        )
    for one, path, recipe in zip(result.images, paths, result.recipes, strict=True):
        image.save_png(one, path, recipe, overwrite=overwrite, metadata=not no_metadata)
    _report(result, paths, as_json)


def _report(result: Any, paths: list[Path], as_json: bool) -> None:
    timings = asdict(result.timings)
    if as_json:
        images = [
            {"path": str(path), **json.loads(recipe.to_json())}
            for path, recipe in zip(paths, result.recipes, strict=True)
        ]
        print(json.dumps({"images": images, "timings": timings}))
        return
    steps = timings.pop("steps")
    del timings["text_cache_hits"], timings["compilations"]
    if not timings["reload"]:
        del timings["reload"]
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in timings.items())
    names = str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name} ({len(paths)} images)"
    print(f"{names}: {stages} ({len(steps)} steps of {1000 * sum(steps) / len(steps):.1f} ms)")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Any], None] | None]:
    """A bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("denoise", total=None)
        yield lambda step: progress.update(task, completed=step.index + 1, total=step.total)
