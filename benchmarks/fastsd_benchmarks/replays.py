"""The captured step of a model: right, without waiting, shared by streams and threads; a part of the GPU runbook."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsd import families, random_weights
from fastsd.backends import eager
from fastsd.pipeline import Pipeline
from fastsd.presets import PRESETS
from fastsd.sampling.graph import Cuda, Graphs
from fastsd.sampling.loop import row_by_row
from fastsd_benchmarks.narrow import narrow

PROMPT = "a red circle on a blue background"


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Whatever makes the host wait for a GPU raises inside."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def replays(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """Captured steps of a model with random weights.

    The gate: the latents are those of the loop row by row up to the rounding of its inputs to the dtype; nothing waits
    between the first replay and the last; another prompt, seed, sampler, scale or number of steps captures nothing; and
    streams that take turns, and threads with streams of their own, give the very latents of one call after the other.
    """
    preset = narrow(name) if tiny else PRESETS[name]
    height, width = (64, 64) if tiny else preset.native
    components = families.load(random_weights.source(preset), dtype, device)
    kind = families.family(components.index["_class_name"])
    captures = 0

    class Counted(Cuda):
        def capture(self, body: Any) -> Any:
            nonlocal captures
            captures += 1
            return super().capture(body)

    graphs = Graphs(Counted(device)) if device.type == "cuda" else None
    engines = eager.engines(kind, components)
    engines = replace(engines, functions=eager.functions(kind, components, graphs))
    plain = replace(engines, functions=replace(engines.functions, sample=row_by_row(engines.functions.denoise)))
    pipe, slow = (Pipeline(components, name=name, defaults=preset.defaults, engines=one) for one in (engines, plain))
    flow = "FlowMatch" in str(pipe.components.scheduler.get("_class_name", ""))
    samplers = ("flow_euler", "flow_euler") if flow else ("euler_a", "dpmpp_2m")
    common: dict[str, Any] = {"height": height, "width": width}
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 1, "num_inference_steps": 6, "scheduler": samplers[0], **common},
        {"prompt": PROMPT + ", again", "seed": 2, "num_inference_steps": 8, "scheduler": samplers[1], **common},
    ]

    def latents(pipeline: Pipeline, call: dict[str, Any]) -> Tensor:
        return torch.as_tensor(pipeline(**call, output_type="latent").images)

    expected = [latents(pipe, calls[0])]
    once = captures
    expected.append(latents(pipe, calls[1]))
    row: dict[str, Any] = {"captures": once, "captured_anew": captures - once}
    row["error"] = max(relative(one, latents(slow, call)) for one, call in zip(expected, calls, strict=True))

    # Two streams that take turns on one graph; the first row of each copies from the host.
    streams = [pipe.stream(**call) for call in calls]
    ends: list[Any] = [next(stream) for stream in streams]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with waiting_is_an_error(device):
        for _ in range(calls[0]["num_inference_steps"] - 2):  # all but the last, after which a pipeline looks at it
            ends = [next(stream) for stream in streams]
            _ = [one.latents for one in ends]
    for i, stream in enumerate(streams):
        for one in stream:
            ends[i] = one
    same = [torch.equal(one.latents, want) for one, want in zip(ends, expected, strict=True)]

    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        own = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
        with own:
            for _ in range(3):
                results[i] = latents(pipe, calls[i % 2])
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same += [torch.equal(results[i], expected[i % 2]) for i in range(4)]
    row |= {"same": all(same), "captured_by_threads": captures - once}
    bound = 1e-4 if dtype == torch.float32 else 5e-2  # an input that rounds the other way, through eight random steps
    row["right"] = row["error"] <= bound and row["same"] and not row["captured_by_threads"]
    if tiny or device.type != "cuda" or not row["right"]:
        return row

    def ms_per_row(pipeline: Pipeline) -> float:
        timings = [pipeline(PROMPT, seed=1, num_inference_steps=20, **common).timings for _ in range(3)]
        return statistics.median(1000 * one.denoise / len(one.steps) for one in timings)

    row |= {"ms_per_row": ms_per_row(pipe), "ms_per_row_uncaptured": ms_per_row(slow)}
    started = time.perf_counter()
    pipe(PROMPT, seed=1, num_inference_steps=2, height=height + 64, width=width)
    row["first_call_of_a_shape_s"] = time.perf_counter() - started
    row["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return row
