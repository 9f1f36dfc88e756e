"""Everything that needs a GPU, in one command: `python -m fastsd_benchmarks.gpu [--minutes 9]`.

Steps: what the machine is, what it can do, every kernel at every real shape (right first, then its time and its
peers'), then whole models with random weights: right against their own float32, then their speed beside the denoiser
of `diffusers`; then the captured step, against the loop that is not; then whole images by every way of running them.
Each finished step is written to the results file at once: a call that runs out of time, or is killed, loses one step
at most, and the next call goes on. What was never measured comes first, then what was measured longest ago. Without
CUDA it is a dry run: every step at tiny size on the CPU, and nothing is measured.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from fastsd import families, random_weights
from fastsd.pipeline import Pipeline, Timings
from fastsd.presets import PRESETS, Preset
from fastsd.request import check
from fastsd.text import Conditioning
from fastsd_benchmarks import cells, kernels, replays
from fastsd_benchmarks.measure import ceilings, environment, medians
from fastsd_benchmarks.narrow import narrow
from fastsd_benchmarks.replays import PROMPT, relative

RESULTS = Path(__file__).parents[1] / "results"  # of a clone
# Preset -> steps of the timed run.
MODELS = {
    "sdxl": 20,
    "sd15": 20,
    "flux-schnell": 4,
    "sd3-medium": 20,
    "sd35-medium": 20,
    "flux-dev": 20,
    "sd35-large": 20,
}


class Step(NamedTuple):
    """One thing to measure; `run` gives what is written down, with "right": False where a gate failed."""

    name: str
    run: Callable[[], dict[str, Any]]


def steps(device: torch.device, dtype: torch.dtype, known: Mapping[str, Any], *, tiny: bool) -> Iterator[Step]:
    """All steps, those that were never run first, then the oldest."""

    def limits() -> dict[str, float]:
        return ceilings(device, dtype, tiny=tiny)

    def surroundings() -> dict[str, Any]:
        return environment(device) | {"sdpa": kernels.sdpa_backend(device, dtype)}

    def kernel(case: kernels.Case) -> dict[str, Any]:
        measured = known.get("ceilings", {}).get("result") or limits()
        return kernels.run(case, device, dtype, measured, tiny=tiny)

    all_ = [Step("environment", surroundings), Step("ceilings", limits)]
    all_ += [Step(f"kernel/{case.op}/{case.name}", partial(kernel, case)) for case in kernels.CASES]
    all_ += [Step(f"model/{name}", partial(model, name, device, dtype, tiny=tiny)) for name in MODELS]
    all_ += [Step(f"graph/{name}", partial(replays.replays, name, device, dtype, tiny=tiny)) for name in MODELS]
    all_ += [
        Step(f"cell/{name}/{way}", partial(cells.cell, name, way, device, dtype, tiny=tiny))
        for name, way in cells.ways()
    ]
    first, rest = all_[:2], all_[2:]  # a file's numbers are those of one machine: its name and ceilings are taken anew
    yield from first
    yield from sorted(rest, key=lambda step: known.get(step.name, {}).get("at", ""))


def model(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """A whole model with random weights.

    The gate: one prediction of the denoiser differs from that of the same weights in float32 at most twice as much as
    the one of diffusers' class in the same dtype does.
    """
    preset = narrow(name) if tiny else PRESETS[name]
    height, width = (64, 64) if tiny else preset.native

    def load(dtype: torch.dtype) -> Pipeline:
        components = families.load(random_weights.source(preset), dtype, device)
        return Pipeline(components, name=name, defaults=preset.defaults)

    pipe = load(dtype)
    arguments: Any = {"height": height, "width": width, "seed": 1}
    request = check(pipe, PROMPT, num_inference_steps=2, **arguments)
    guided = any(table.guided for table in request.tables)
    with torch.inference_mode():
        conditioning = pipe._condition(request, guided, Timings())
        batch = conditioning.context.shape[0]
        latents = kernels.normal(1, *request.noise_shape, device=device, dtype=dtype).expand(batch, -1, -1, -1)
        timesteps = torch.full((1, batch), float(request.tables[0].timestep[0]), device=device)

        def predict(pipe: Pipeline, wide: torch.dtype) -> Callable[[], Tensor]:
            pooled = None if conditioning.pooled is None else conditioning.pooled.to(wide)
            scales = torch.as_tensor(conditioning.guidance_scale).to(device)
            context = conditioning.context.to(wide)
            given = conditioning._replace(context=context, pooled=pooled, guidance_scale=scales)
            size = tuple(request.noise_shape[1:])
            modulation, *rest = pipe.family.prepare(pipe.components, timesteps, given, size)
            return lambda: pipe.components.denoiser(latents.to(wide), modulation[0], *rest)

        ours = predict(pipe, dtype)
        theirs = diffusers_denoiser(preset, pipe.components.denoiser, latents, timesteps[0], conditioning)
        results = ours(), theirs()
        row: dict[str, Any] = {"height": height, "width": width, "batch": batch, "dtype": str(dtype)}
        row["weights_gb"] = {key: total / 1e9 for key, (total, _) in pipe.memory().items()}
        times = {} if tiny else medians({"fastsd": ours, "diffusers": theirs}, device, repeat_ms=300)
    speed = whole(pipe, MODELS[name], arguments, device, tiny=tiny)
    if times:
        speed |= {"denoiser_us": times, "ratio": times["fastsd"] / times["diffusers"]}
    del pipe, ours, theirs
    collect()
    wide = load(torch.float32)
    with torch.inference_mode():
        exact = predict(wide, torch.float32)()
    row["error"], row["error_of_diffusers"] = (relative(one, exact) for one in results)
    row["right"] = row["error"] <= 2 * row["error_of_diffusers"] + 1e-6
    return row | speed if row["right"] else row


def diffusers_denoiser(
    preset: Preset, ours: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning
) -> Callable[[], Tensor]:
    """A call of diffusers' class over our weights, as its pipeline calls it; gives [B, C, H, W]."""
    import diffusers

    component = "unet" if "unet" in preset.configs else "transformer"
    with torch.device("meta"):
        theirs = getattr(diffusers, preset.index[component][1]).from_config(dict(preset.configs[component]))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.eval().requires_grad_(False)
    context, pooled, guidance_scale, time_ids = conditioning
    if component == "unet":
        added = None if time_ids is None else {"text_embeds": pooled, "time_ids": time_ids}
        return lambda: theirs(latents, timestep[0], context, added_cond_kwargs=added, return_dict=False)[0]
    if "SD3" in type(theirs).__name__:
        return lambda: theirs(latents, context, pooled, timestep, return_dict=False)[0]
    pipeline = diffusers.FluxPipeline
    batch, channels, height, width = latents.shape
    packed = pipeline._pack_latents(latents, batch, channels, height, width)
    image_ids = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype)
    text_ids = image_ids.new_zeros(context.shape[1], 3)
    scales = torch.as_tensor(guidance_scale).to(latents.device, torch.float32)
    guidance = scales if theirs.config.guidance_embeds else None

    def call() -> Tensor:
        out = theirs(
            hidden_states=packed,
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=context,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        result: Tensor = pipeline._unpack_latents(out, 8 * height, 8 * width, 8)
        return result

    return call


def whole(
    pipe: Pipeline, count: int, arguments: Mapping[str, Any], device: torch.device, *, tiny: bool
) -> dict[str, Any]:
    """Medians over three images, and the peak of the device's memory; in a dry run one image, and no numbers."""
    call: Any = {"num_inference_steps": 2 if tiny else count, "output_type": "pt", **arguments}
    pipe(PROMPT, **call)
    if tiny:
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        timings = pipe(PROMPT, **call).timings
        torch.cuda.synchronize(device)
        runs.append(
            {"seconds": time.perf_counter() - started, "ms_per_row": 1000 * timings.denoise / len(timings.steps)}
        )
        runs[-1] |= {"prepare_s": timings.prepare, "decode_s": timings.decode}
    row: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return row | {"steps": count, "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}


def collect() -> None:
    """Give memory back before the next model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------
# The run


def results_file(device: torch.device) -> Path:
    """One file per kind of machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    folder = RESULTS if RESULTS.is_dir() else Path()
    return folder / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file at once: a killed run leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump(document, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run steps until the time is over; 1 if any failed or was not right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no step after this many")
    parser.add_argument("--only", default="", help="steps whose name begins so, such as kernel/attention")
    parser.add_argument("--results", type=Path, help="the results file; by default one per device")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = device.type != "cuda"
    path = options.results or (None if tiny else results_file(device))
    known: dict[str, Any] = json.loads(path.read_text())["steps"] if path is not None and path.exists() else {}
    console = Console(stderr=True, highlight=False)
    if tiny:
        console.print("no CUDA device: a dry run at tiny size, nothing is measured")
    started, wrong, left = time.monotonic(), 0, 0
    for step in list(steps(device, getattr(torch, options.dtype), known, tiny=tiny)):
        if not step.name.startswith(options.only) and step.name not in ("environment", "ceilings"):
            continue
        if time.monotonic() - started > 60 * options.minutes:
            left += 1
            continue
        begun = time.monotonic()
        try:
            with torch.inference_mode():
                result = step.run()
        except Exception as error:  # one step's failure is its result; the others go on
            traceback.print_exc()
            result = {"right": False, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        collect()
        wrong += result.get("right") is False
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        known[step.name] = {"at": now, "took_s": round(time.monotonic() - begun, 1), "dry_run": tiny, "result": result}
        console.print(f"{step.name}: {summary(result)}")
        if path is not None:
            write(path, {"benchmark": "gpu", "dtype": options.dtype, "steps": known})
    console.print(f"{wrong} steps not right, {left} left for the next call")
    return 1 if wrong else 0


def summary(result: Mapping[str, Any]) -> str:
    """A step's result on one line."""
    if "failed" in result:
        return str(result["failed"])
    keys = (
        "right",
        "error",
        "us",
        "share_of_floor",
        "best_peer",
        "ratio",
        "ms_per_row",
        "seconds",
        "E_seconds",
        "tflops",
        "gb_s",
        "device",
        "sdpa",
    )
    shown = {key: result[key] for key in keys if key in result}
    parts = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
    if result.get("best_peer"):
        parts.append(f"ratio {result['peers'][result['best_peer']]['ratio']:.2f}")
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
