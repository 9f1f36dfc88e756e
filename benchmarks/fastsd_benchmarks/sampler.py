"""The sampler's own cost a step, against `diffusers`: `python -m fastsd_benchmarks.sampler [--json]`.

Ours is everything of `fastsd.sampling.loop.denoise` around the denoiser: input scale, guidance, history and
update; "compiled" is the same by `fastsd.sampling.fused`, as the backend "compile" runs it on a CPU. Theirs is what a
`diffusers` pipeline does there: `scale_model_input`, guidance, `scheduler.step()`. All get the same predictions and
noise, drawn in advance, as drawing costs all the same, and run in turns in one process, so that a busy machine slows
all of them.

The floor is the bytes that a step must move (the model's input, the prediction it keeps, the history that it
reads, the state it writes) at the bandwidth of a plain copy of as many bytes, measured in the same process.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastsd.sampling import fused
from fastsd.sampling.loop import denoise
from fastsd.sampling.schedulers import resolve_scheduler
from fastsd.sampling.table import StepTable
from fastsd_kernels import cpu_step

MULTISTEP = ("pndm", "lms", "dpmpp_2m", "dpmpp_2m_sde", "deis", "unipc", "flow_dpmpp_2m", "flow_unipc")
OTHERS = ("ddim", "euler", "euler_a", "heun", "dpm2_a", "flow_euler")
SHAPES = ((1, 4, 64, 64), (8, 4, 64, 64), (1, 16, 128, 128), (8, 16, 128, 128))
STEPS = 10

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def ours(
    table: StepTable, latents: Any, predictions: list[Any], noise: Any, kernel: Callable[..., None] | None = None
) -> list[float]:
    """Seconds of each step without the denoiser, the first left out."""
    inside = 0.0

    def denoiser(model_input: Any, row: int) -> Any:
        nonlocal inside
        start = time.perf_counter()
        prediction = predictions[row % len(predictions)]
        inside = time.perf_counter() - start
        return prediction

    batch = latents.shape[0]
    noises = [lambda shape: noise[0]] * batch
    if kernel is None:
        steps = denoise(denoiser, latents, [table] * batch, noise=noises)
    else:
        steps = fused.sampler(denoiser, kernel)(latents, [range(len(table))], [table] * batch, noise=noises)
    next(steps)
    seconds = []
    for _ in range(len(table) - 1):
        start = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - start - inside)
    return seconds


def theirs(scheduler: Any, latents: Any, predictions: list[Any], noise: Any, guidance: float) -> list[float]:
    """The same of a `diffusers` pipeline's loop."""
    scheduler.set_timesteps(STEPS)
    arguments = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    seconds = []
    with predrawn(scheduler, noise):
        for i, t in enumerate(scheduler.timesteps):
            prediction = predictions[i % len(predictions)]
            start = time.perf_counter()
            model_input = torch.cat([latents] * 2) if guidance > 1 else latents
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(model_input, t)
            if guidance > 1:
                negative, positive = prediction.chunk(2)
                prediction = negative + guidance * (positive - negative)
            latents = scheduler.step(prediction, t, latents, **arguments, return_dict=False)[0]
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


@contextmanager
def predrawn(scheduler: Any, noise: Any) -> Iterator[None]:
    """Let the scheduler's module take noise drawn in advance."""
    module = sys.modules[type(scheduler).__module__]
    drawing: Callable[..., Any] | None = getattr(module, "randn_tensor", None)
    if drawing is None:
        yield
        return
    module.randn_tensor = lambda *args, **kwargs: noise  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = drawing  # type: ignore[attr-defined]


def moved_bytes(table: StepTable, elements: int, guided: bool) -> float:
    """Bytes that a step must read and write, mean over the rows after the first."""
    read = sum(np.count_nonzero(m[1:]) for m in (table.state, table.prediction, table.noise)) / (len(table) - 1)
    scaled = 2 if guided or (table.input_scale != 1).any() else 0  # the model's input
    return 4 * elements * (read + 1 + (2 if not guided else 3) + scaled * (1.5 if guided else 1))


def copy_seconds(nbytes: float) -> float:
    """Time of a plain copy that reads and writes as many bytes in all."""
    a = torch.zeros(max(1, int(nbytes / 8)))
    b = torch.empty_like(a)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        b.copy_(a)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(
    name: str, shape: tuple[int, ...], guidance: float, repeats: int, kernel: Callable[..., None]
) -> dict[str, Any]:
    """Medians over all steps of interleaved runs, microseconds."""
    scheduler = resolve_scheduler(name, SD3 if name.startswith("flow_") else SD)
    table = StepTable.from_scheduler(scheduler, STEPS).with_guidance(guidance)
    generator = torch.Generator().manual_seed(0)
    double = (shape[0] * (2 if guidance > 1 else 1), *shape[1:])
    latents = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    predictions = [torch.randn(double, generator=generator) for _ in range(5)]
    arrays = latents.numpy(), [p.numpy() for p in predictions], noise.numpy()
    times: dict[str, list[float]] = {"compiled": [], "torch": [], "numpy": [], "diffusers": []}
    for _ in range(repeats):
        times["compiled"] += ours(table, latents, predictions, noise, kernel)
        times["torch"] += ours(table, latents, predictions, noise)
        times["diffusers"] += theirs(scheduler, latents, predictions, noise, guidance)
        times["numpy"] += ours(table, *arrays)
    micro = {key: statistics.median(values) * 1e6 for key, values in times.items()}
    floor = copy_seconds(moved_bytes(table, latents.numel(), guidance > 1)) * 1e6
    return {
        "sampler": name,
        "multistep": name in MULTISTEP,
        "shape": list(shape),
        "guidance": guidance,
        "floor_us": floor,
        **{f"{key}_us": value for key, value in micro.items()},
        "ratio": micro["torch"] / micro["diffusers"],
        "ratio_compiled": micro["compiled"] / micro["diffusers"],
        "ratio_numpy": micro["numpy"] / micro["diffusers"],
    }


def main() -> None:
    """Measure all samplers and shapes and print a table, or one JSON document with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    parser.add_argument("--samplers", default=",".join((*MULTISTEP, *OTHERS)), help="short names, comma-separated")
    parser.add_argument("--guidance", type=float, default=1.0, help="above 1: the guided batch is combined too")
    parser.add_argument("--repeats", type=int, default=12, help="runs of each side, in turns")
    options = parser.parse_args()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        kernel = cpu_step.load(cpu_step.build(Path(folder)))
        rows = [
            measure(name, shape, options.guidance, options.repeats, kernel)
            for name in options.samplers.split(",")
            for shape in SHAPES
        ]
    document = {
        "benchmark": "sampler",
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": STEPS,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(document))
        return
    table = Table(title=f"sampler's own cost a step, {torch.get_num_threads()} threads, guidance {options.guidance:g}")
    for column in (
        "sampler",
        "latents",
        "floor us",
        "compiled us",
        "torch us",
        "numpy us",
        "diffusers us",
        "compiled ratio",
        "ratio",
        "numpy ratio",
    ):
        table.add_column(column, justify="left" if column in ("sampler", "latents") else "right")
    for row in rows:
        table.add_row(
            row["sampler"],
            "x".join(map(str, row["shape"])),
            *(f"{row[key]:.0f}" for key in ("floor_us", "compiled_us", "torch_us", "numpy_us", "diffusers_us")),
            *(f"{row[key]:.2f}" for key in ("ratio_compiled", "ratio", "ratio_numpy")),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
