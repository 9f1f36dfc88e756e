"""The demo checkpoint end to end: `python -m fastsd_benchmarks.demo [--json]`.

What importing costs, how long a cold process takes to its first image, and a warm call's stages beside
`diffusers.StableDiffusionPipeline` on the same weights, seed and sampler. Both pipelines run in turns in one process,
so that a busy machine slows both; a row's speed is shown beside its images' distance from diffusers in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PROMPT = "a red circle on a blue background"
STEPS, SCHEDULER, SEED = 20, "dpmpp_2m", 7


def import_cost(repeats: int) -> dict[str, float]:
    """Median CPU seconds of a process that imports numpy and Pillow, and of one that imports fastsd besides."""
    costs: dict[str, list[float]] = {"numpy, PIL": [], "numpy, PIL, fastsd": []}
    for _ in range(repeats):
        for modules, seconds in costs.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {modules: statistics.median(seconds) for modules, seconds in costs.items()}


def cold_start(repeats: int) -> float:
    """Median seconds from the start of `fastsd generate` to its end, the image written."""
    seconds = []
    command = "import sys, fastsd.cli; sys.exit(fastsd.cli.main())"
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            arguments = ["generate", PROMPT, "-o", str(Path(folder) / f"{i}.png")]
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", command, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def warm(dtype: str, batch: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a call, ours and theirs in turns, and the largest distance of our images from theirs."""
    import diffusers
    import torch

    from fastsd.checkpoint import resolve
    from fastsd.pipeline import Pipeline

    folder = resolve("demo")
    pipe = Pipeline.from_pretrained("demo", dtype=dtype)
    peer: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    peer.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    guidance = pipe.defaults["guidance_scale"]
    prompts = [PROMPT] * batch
    seeds = [SEED + i for i in range(batch)]

    def ours() -> Any:
        return pipe(prompts, seed=seeds, num_inference_steps=STEPS, scheduler=SCHEDULER, output_type="np")

    def theirs() -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return peer(
            prompts, num_inference_steps=STEPS, guidance_scale=guidance, generator=generators, output_type="np"
        ).images

    distance = float(np.abs(ours().images - theirs()).max())  # the warm-up as well
    mine: list[float] = []
    other: list[float] = []
    stages: dict[str, list[float]] = {name: [] for name in ("text", "prepare", "denoise", "decode")}
    for _ in range(repeats):
        started = time.perf_counter()
        timings = ours().timings
        mine.append(time.perf_counter() - started)
        for name, seconds in stages.items():
            seconds.append(getattr(timings, name))
        started = time.perf_counter()
        theirs()
        other.append(time.perf_counter() - started)
    return {
        "dtype": dtype,
        "batch": batch,
        "seconds": statistics.median(mine),
        "step_ms": 1000 * statistics.median(stages["denoise"]) / STEPS,
        **{f"{name}_ms": 1000 * statistics.median(seconds) for name, seconds in stages.items()},
        "diffusers_seconds": statistics.median(other),
        "ratio": statistics.median(a / b for a, b in zip(mine, other, strict=True)),
        "largest_pixel_difference": distance,
    }


def main() -> None:
    """Measure, print a table, and with `--json` one document on stdout instead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import torch

    report: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("fastsd", "torch", "diffusers", "transformers", "numpy")},
        "prompt": PROMPT,
        "scheduler": SCHEDULER,
        "steps": STEPS,
        "import_cpu_seconds": import_cost(args.repeats),
        "cold_start_seconds": cold_start(3),
        "rows": [warm(dtype, batch, args.repeats) for dtype in ("float32", "bfloat16") for batch in (1, 4)],
    }
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title=f"demo, 128x128, {SCHEDULER}, {STEPS} steps, {report['machine']['threads']} threads")
    for name in ("dtype", "batch", "s", "ms/step", "decode ms", "diffusers s", "ratio", "largest difference"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        keys = ("seconds", "step_ms", "decode_ms", "diffusers_seconds", "ratio", "largest_pixel_difference")
        table.add_row(row["dtype"], str(row["batch"]), *(f"{row[key]:.3g}" for key in keys))
    console = Console()
    console.print(table)
    costs = report["import_cpu_seconds"]
    console.print(", ".join(f"import {modules}: {seconds:.3f} s of CPU" for modules, seconds in costs.items()))
    console.print(f"process start to image on disk: {report['cold_start_seconds']:.2f} s")


if __name__ == "__main__":
    main()
