"""Whole images on a GPU, with random weights: ours beside `diffusers`, from the prompt to pixels on the host.

A cell is a model at the size and the steps that others publish. Of each cell every way of running it is a step of the
GPU runbook of its own, measured in turns with E, `diffusers` uncompiled in the same dtype on the same weights: so a
call that ends early loses one way at most, and any two ways compare by their ratios to E. The text is encoded anew for
every image, by the same modules on both sides. An image that is another than E's has no time. Peaks are what the
allocator holds while a way runs, with the pools of captured graphs, which both sides' count has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsd import families, random_weights, text
from fastsd.backends import compile as compiled
from fastsd.pipeline import Pipeline, Timings
from fastsd.presets import PRESETS
from fastsd.request import check
from fastsd_benchmarks.narrow import narrow
from fastsd_benchmarks.replays import PROMPT


class Cell(NamedTuple):
    """Steps, pixels on a side, and seconds an image: the goal and the stretch goal on an H200."""

    steps: int
    size: int
    goal: float
    stretch: float


CELLS = {
    "sd15": Cell(50, 512, 0.33, 0.25),
    "sdxl": Cell(30, 1024, 1.0, 0.80),
    "sd3-medium": Cell(28, 1024, 0.92, 0.80),
    "flux-schnell": Cell(4, 1024, 0.47, 0.43),
    "flux-dev": Cell(28, 1024, 3.2, 3.0),
}
# Ways of running a cell: ours, then how users of diffusers compile it.
OURS = ("eager", "compile", "compile whole")
PEERS: dict[str, dict[str, Any]] = {
    "diffusers regional": {"regional": True},
    "diffusers compiled": {},
    "diffusers max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "diffusers graphs": {"mode": "max-autotune"},
}
SECONDS, IMAGES = 100.0, 20  # of each side: as many images as fit into the time, 20 at most
# Of a way's image against E's, both rounded to 16 bits in another order through all steps; another image has 5 to 10.
LEAST_DB = 15.0

Call = Callable[[], Any]


def ways() -> list[tuple[str, str]]:
    """Cells and what they are run by, the quickest to have an answer first."""
    # diffusers names no repeated blocks for SD3.
    return [
        (name, way) for way in (*OURS, *PEERS) for name in CELLS if (name[:3], way) != ("sd3", "diffusers regional")
    ]


def cell(name: str, way: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """One way of running a cell beside E; in a dry run one image of each, at tiny size, without a compiler behind."""
    preset, goal = (narrow(name) if tiny else PRESETS[name]), CELLS[name]
    components = families.load(random_weights.source(preset), dtype, device)
    arguments: dict[str, Any] = {
        "num_inference_steps": 2 if tiny else goal.steps,
        "height": 64 if tiny else goal.size,
        "width": 64 if tiny else goal.size,
        "seed": 1,
    }
    plain = Pipeline(components, name=name, defaults=preset.defaults, backend="eager")
    theirs = diffusers_pipeline(preset, components)
    calls = {"E": _diffusers(plain, theirs, arguments)}
    if way in OURS:
        calls[way] = _ours(plain if way == "eager" else _compiled(plain, preset.defaults, way, tiny), arguments)
    else:
        calls[way] = _diffusers(plain, _compile(theirs, tiny=tiny, **PEERS[way]), arguments)
    row: dict[str, Any] = {"steps": arguments["num_inference_steps"], "size": arguments["height"], "way": way}
    first: dict[str, float] = {}
    images: dict[str, Any] = {}
    for side, call in calls.items():
        started = time.perf_counter()
        images[side] = np.asarray(call()[0], dtype=np.float64)
        first[side] = time.perf_counter() - started
    error = float(np.mean((images[way] - images["E"]) ** 2))
    row["psnr"] = 10 * np.log10(255**2 / max(error, 1e-9))
    row["right"] = bool(row["psnr"] >= LEAST_DB)
    if tiny or not row["right"]:
        return row
    row["first_image_s"] = first[way]
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    peaks = dict.fromkeys(calls, 0.0)
    while len(seconds["E"]) < IMAGES and sum(seconds["E"]) < SECONDS:
        for side, call in calls.items():
            torch.cuda.empty_cache()  # what is reserved is then what this side needs, and graphs hold for good
            torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()
            call()
            seconds[side].append(time.perf_counter() - started)
            peaks[side] = max(peaks[side], torch.cuda.max_memory_reserved(device) / 1e9)
    median = {side: statistics.median(values) for side, values in seconds.items()}
    row |= {"images": len(seconds["E"]), "seconds": median[way], "E_seconds": median["E"]}
    row |= {"ratio": statistics.median(a / b for a, b in zip(seconds[way], seconds["E"], strict=True))}
    row |= {"worst_seconds": max(seconds[way]), "peak_gb": peaks[way], "E_peak_gb": peaks["E"]}
    if way in OURS:
        row |= {"goal_s": goal.goal, "stretch_s": goal.stretch}
    return row


def diffusers_pipeline(preset: Any, components: families.Components) -> Any:
    """`diffusers`' pipeline on our modules; its denoiser holds the same weights."""
    import diffusers

    family = families.family(preset.index["_class_name"])
    name = family.DENOISER[0]
    with torch.device("meta"):
        denoiser = getattr(diffusers, preset.index[name][1]).from_config(dict(preset.configs[name]))
    denoiser.load_state_dict(components.denoiser.state_dict(), assign=True)
    scheduler = getattr(diffusers, components.scheduler["_class_name"]).from_config(dict(components.scheduler))
    encoders = {one.name: part for one, part in zip(family.ENCODERS, components.text_encoders, strict=True)}
    parts: dict[str, Any] = {name: denoiser.eval().requires_grad_(False), "vae": components.vae, **encoders}
    parts |= {one.tokenizer: None for one in family.ENCODERS} | {"scheduler": scheduler}
    if preset.index["_class_name"] == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, preset.index["_class_name"])(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ours(pipe: Pipeline, arguments: Mapping[str, Any]) -> Call:
    def call() -> Any:
        pipe.encodings = text.Cache()  # every image's text is read
        return pipe(PROMPT, **arguments).images

    return call


def _diffusers(plain: Pipeline, pipeline: Any, arguments: Mapping[str, Any]) -> Call:
    request = check(plain, PROMPT, **arguments)
    guided = any(table.guided for table in request.tables)
    others = {key: value for key, value in arguments.items() if key != "seed"}
    default = plain.defaults.get("guidance_scale")
    if default is not None:
        others["guidance_scale"] = default

    def call() -> Any:
        plain.encodings = text.Cache()
        conditioning = plain._condition(request, guided, Timings())
        embeddings = {"prompt_embeds": conditioning.context[-1:]}
        if guided:
            embeddings["negative_prompt_embeds"] = conditioning.context[:1]
        if conditioning.pooled is not None:
            embeddings["pooled_prompt_embeds"] = conditioning.pooled[-1:]
            if guided:
                embeddings["negative_pooled_prompt_embeds"] = conditioning.pooled[:1]
        generator = torch.Generator().manual_seed(1)
        return pipeline(**embeddings, **others, generator=generator).images

    return call


def _compiled(plain: Pipeline, defaults: Mapping[str, Any], way: str, tiny: bool) -> Pipeline:
    compiler = (lambda graph, inputs: graph) if tiny else None
    whole = way == "compile whole"
    engines = compiled.engines(plain.family, plain.components, whole=whole, compiler=compiler)
    return Pipeline(plain.components, name=plain.name, defaults=defaults, engines=engines)


def _compile(pipeline: Any, *, regional: bool = False, mode: str | None = None, tiny: bool) -> Any:
    """As diffusers' own guides do: denoiser and decoder, UNets in channels last."""
    backend: dict[str, Any] = {"backend": "eager"} if tiny else {"mode": mode} if mode else {}
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, name)
    if name == "unet":
        denoiser.to(memory_format=torch.channels_last)
    if regional:
        denoiser.compile_repeated_blocks(fullgraph=True, **backend)
    else:
        setattr(pipeline, name, torch.compile(denoiser, fullgraph=True, **backend))
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True, **backend)
    return pipeline
