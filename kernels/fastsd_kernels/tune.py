"""Measure the attention kernels on this GPU and write the winners to the table of configurations.

    python -m fastsd_kernels.tune [--op attention] [--minutes 9] [--again]

For each row of the table that stands for this chip, every candidate runs the shapes of real models that fall into it;
one whose result is not as exact as torch's is left out. What was measured on this GPU with these versions is kept, so
a run that was cut short goes on where it ended.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd_kernels import attention, configs, cross_attention, hopper, joint_attention
from fastsd_kernels.configs import Config, Row
from fastsd_kernels.launch import ARCHES, triton

# Our kernel is taken unless torch's is faster by more than this: a table that flips with noise helps nobody.
SHARE_OF_SDPA = 0.95


class Shape(NamedTuple):
    """One attention of a real model; `text` tokens are a stream of their own in a joint attention."""

    op: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    text: int = 0


SHAPES = (
    Shape("attention", 2, 8, 4096, 4096, 40),  # SD1.5 at 512x512
    Shape("attention", 2, 8, 1024, 1024, 80),
    Shape("attention", 2, 8, 256, 256, 160),
    Shape("attention", 2, 8, 64, 64, 160),
    Shape("attention", 2, 10, 4096, 4096, 64),  # SDXL at 1024x1024
    Shape("attention", 2, 20, 1024, 1024, 64),
    Shape("attention", 2, 20, 144, 144, 64),  # SD2.1 at 768x768, its innermost level
    Shape("attention", 2, 24, 4096, 4096, 64),  # SD3.5 medium
    Shape("attention", 2, 24, 4429, 4429, 64),
    Shape("attention", 1, 24, 4608, 4608, 128),  # Flux
    Shape("attention", 1, 24, 1280, 1280, 128),  # Flux schnell at 512x512
    Shape("joint_attention", 2, 24, 4429, 4429, 64, 333),  # SD3 medium
    Shape("joint_attention", 2, 38, 4429, 4429, 64, 333),  # SD3.5 large
    Shape("joint_attention", 2, 24, 1357, 1357, 64, 333),  # SD3 medium at 512x512
    Shape("joint_attention", 1, 24, 4608, 4608, 128, 512),  # Flux
    Shape("joint_attention", 1, 24, 1280, 1280, 128, 256),
    Shape("cross_attention", 2, 8, 4096, 77, 40),  # SD1.5
    Shape("cross_attention", 2, 8, 1024, 77, 80),
    Shape("cross_attention", 2, 8, 256, 77, 160),
    Shape("cross_attention", 2, 10, 4096, 77, 64),  # SDXL
    Shape("cross_attention", 2, 20, 1024, 77, 64),
    Shape("cross_attention", 2, 8, 4096, 154, 40),  # prompts of two windows
    Shape("cross_attention", 2, 8, 1024, 154, 80),
    Shape("cross_attention", 2, 8, 256, 154, 160),
    Shape("cross_attention", 2, 20, 1024, 154, 64),
)


def shapes_of(row: Row) -> list[Shape]:
    """The shapes that a row of the table serves."""
    return [
        shape
        for shape in SHAPES
        if (shape.op, shape.head_dim) == (row.op, row.head_dim)
        and configs.length_class(shape.op, shape.keys) == row.length
    ]


def candidates(row: Row) -> Iterator[Config]:
    """What may compute a row: torch, the portable kernel in the sizes that compile clean somewhere, Hopper's own.

    Compiling takes most of the time, one or two seconds each, so these are few.
    """
    yield row.config._replace(route="sdpa")
    if (row.op, row.length) == ("cross_attention", "resident"):
        for block_m, num_warps, tiles in product((64, 128), (4, 8), (1, 2, 4)):
            yield Config("kernel", block_m, 0, num_warps, 1, tiles)
        return
    narrow = row.op == "cross_attention" or row.head_dim == 160
    for block_m, block_n, num_warps, num_stages in product(
        (64, 128), (32, 64) if narrow else (64, 128), (4, 8), (2, 3)
    ):
        yield Config("kernel", block_m, block_n, num_warps, num_stages)
    if row.op == "attention" and row.arch == 90 and row.head_dim in hopper.HEAD_DIMS:
        for block_n, num_stages in hopper.TILES:
            yield Config("hopper", hopper.BLOCK_M, block_n, 4, num_stages)


def tensors(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """Random inputs as a model has them: slices of packed buffers (never zeros, which are faster)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(tokens: int, parts: int) -> tuple[Tensor, ...]:
        size = (shape.batch, tokens, parts, shape.heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).unbind(2)

    if shape.op == "joint_attention":
        return (*normal(shape.text, 3), *normal(shape.keys - shape.text, 3))
    if shape.op == "cross_attention":
        return (*normal(shape.queries, 1), *normal(shape.keys, 2))
    return normal(shape.queries, 3)


def compute(op: str, inputs: Sequence[Tensor], config: Config) -> tuple[Tensor, ...]:
    """Run an op as a configuration says, from inputs to new outputs."""
    module = {"attention": attention, "joint_attention": joint_attention, "cross_attention": cross_attention}[op]
    if config.route == "sdpa":
        result = module.reference(*inputs)
        return result if isinstance(result, tuple) else (result,)
    queries = inputs[::3]  # of the one stream, or of text and image
    outs = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for q in queries)
    module.launch(*inputs, *outs, config)
    return outs


def is_exact(op: str, inputs: Sequence[Tensor], config: Config) -> bool:
    """Whether no error against float32 is above twice torch's in the same precision and a rounding."""
    sdpa = config._replace(route="sdpa")
    exact = compute(op, [x.float() for x in inputs], sdpa)
    results = zip(compute(op, inputs, config), compute(op, inputs, sdpa), exact, strict=True)
    for result, low, high in results:
        error, of_torch = ((x.float() - high).abs().max().item() for x in (result, low))
        if not error <= 2 * of_torch + torch.finfo(result.dtype).eps / 2 * high.abs().max().item():
            return False
    return True


def measure(row: Row, device: torch.device, clock: Callable[[Callable[[], object]], float]) -> dict[Config, float]:
    """Seconds of every candidate that runs and is exact, over all the shapes of a row.

    Args:
        row: of the table.
        device: where to run.
        clock: a function's duration in seconds.
    """
    inputs = [tensors(shape, device) for shape in shapes_of(row)]
    seconds: dict[Config, float] = {}
    for config in candidates(row):
        try:
            if not all(is_exact(row.op, x, config) for x in inputs):
                print(f"{row.op} {row.head_dim} {row.length}: {config} is not exact, and left out.", file=sys.stderr)
            else:
                seconds[config] = sum(clock(lambda x=x, c=config: compute(row.op, x, c)) for x in inputs)  # type: ignore[misc]
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory or registers than the chip has
    return seconds


def best(seconds: Mapping[Config, float]) -> Config:
    """The fastest of our kernels, if it reaches `SHARE_OF_SDPA` of torch's speed; otherwise torch.

    The tiles of a row that goes to torch are those of the fastest portable kernel, so that it can be compared again.
    """
    ours = {config: time for config, time in seconds.items() if config.route != "sdpa"}
    torchs = next(time for config, time in seconds.items() if config.route == "sdpa")
    winner = min(ours, key=ours.__getitem__, default=None)
    if winner is not None and torchs >= SHARE_OF_SDPA * ours[winner]:
        return winner
    portable = {config: time for config, time in ours.items() if config.route == "kernel"}
    tiles = min(portable, key=portable.__getitem__, default=next(iter(seconds)))
    return tiles._replace(route="sdpa")


def clock(function: Callable[[], object]) -> float:
    """Median seconds of a function on the GPU, with a cold L2 cache."""
    milliseconds: float = triton.testing.do_bench(function, return_mode="median")
    return milliseconds / 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command; 2 if there is no GPU to measure on."""
    parser = argparse.ArgumentParser(prog="python -m fastsd_kernels.tune", description="Choose kernels on this GPU.")
    parser.add_argument("--op", choices=sorted(configs.LENGTHS), help="only this op's rows")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after this time")
    parser.add_argument("--again", action="store_true", help="measure what has been measured here, too")
    options = parser.parse_args(arguments)
    if triton is None or not torch.cuda.is_available():
        print("Tuning needs a CUDA GPU and Triton; the table stays as it is.", file=sys.stderr)
        return 2
    if not os.access(configs.TABLE.parent, os.W_OK):
        print(f"{configs.TABLE} cannot be written; run it where the package is yours.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    chip = 10 * major + minor
    if chip not in ARCHES:
        print(f"The table has rows for sm_{', sm_'.join(map(str, ARCHES))}, none for this sm_{chip}.", file=sys.stderr)
        return 2
    here = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    end = time.monotonic() + 60 * options.minutes
    table = configs.table()
    for key, row in table.items():
        known = row.measured is not None and here.items() <= row.measured.items()
        if row.arch != chip or options.op not in (None, row.op) or not shapes_of(row) or (known and not options.again):
            continue
        if time.monotonic() > end:
            print("Time is up; run it again for the other rows.")
            return 0
        seconds = measure(row, device, clock)
        config = best(seconds)
        routes = {
            route: round(1e6 * min(s for c, s in seconds.items() if c.route == route), 2)
            for route in sorted({c.route for c in seconds})
        }
        table[key] = row._replace(config=config, measured={**here, "microseconds": routes})
        configs.write(table.values(), configs.TABLE)
        print(f"{row.op} {row.head_dim} {row.length}: {config} of {routes} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
