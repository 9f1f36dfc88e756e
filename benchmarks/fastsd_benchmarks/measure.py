"""Time, ceilings and surroundings of a device, for all benchmarks.

On CUDA a call is timed by events, with the L2 cache flushed before it (`triton.testing.do_bench`), and once more inside
a CUDA graph, without launch cost and with a warm cache. Functions that are compared run in turns, so that a drifting
clock hits all of them.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and the device's name."""
    versions: dict[str, str | None] = {}
    for name in ("fastsd", "torch", "triton", "diffusers", "transformers", "numpy", "fa3-fwd", "sageattention"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"versions": versions, "python": platform.python_version(), "machine": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        found |= {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return found


def medians(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int = 3, repeat_ms: int = 40
) -> dict[str, float]:
    """Median microseconds of each call over all rounds, the calls in turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += _samples(call, device, repeat_ms)
    return {name: statistics.median(values) for name, values in samples.items()}


def _samples(call: Call, device: torch.device, repeat_ms: int) -> list[float]:
    if device.type == "cuda":
        from triton.testing import do_bench  # type: ignore[import-untyped, unused-ignore]

        milliseconds: Any = do_bench(call, warmup=5, rep=repeat_ms, return_mode="all")
        return [1000 * value for value in milliseconds]
    call()
    seconds: list[float] = []
    started = time.perf_counter()
    while not seconds or (time.perf_counter() - started < repeat_ms / 1000 and len(seconds) < 100):
        before = time.perf_counter()
        call()
        seconds.append(1e6 * (time.perf_counter() - before))
    return seconds


def in_graph(call: Call, device: torch.device) -> float | None:
    """Median microseconds inside a CUDA graph; None without CUDA, or where the call cannot be captured."""
    if device.type != "cuda":
        return None
    from triton.testing import do_bench_cudagraph  # type: ignore[import-untyped, unused-ignore]

    try:
        milliseconds: float = do_bench_cudagraph(call, rep=20, return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return 1000 * milliseconds


def ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> dict[str, float]:
    """What the device can do: TFLOP/s of a large product of normal numbers, GB/s of a large copy (read and write)."""
    n, elements = (256, 2**20) if tiny else (8192, 2**29)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.randn(elements, device=device).to(dtype)
    target = torch.empty_like(source)
    times = medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device)
    return {
        "tflops": 2 * n**3 / times["product"] / 1e6,
        "gb_s": 2 * source.numel() * source.element_size() / times["copy"] / 1e3,
    }


def deviation(result: Any, exact: Any) -> float:
    """Largest absolute difference, in units of the largest exact number; NaN where either is not finite."""
    pairs = zip(result, exact, strict=True) if isinstance(exact, tuple) else [(result, exact)]
    worst = 0.0
    for one, other in pairs:
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        difference = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
        worst = max(worst, float(difference)) if bool(torch.isfinite(difference)) else float("nan")
    return worst
