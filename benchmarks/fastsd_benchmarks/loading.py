"""Host memory and time of loading weights, against `diffusers`: `python -m fastsd_benchmarks.loading [--gb 2]`.

A checkpoint of SD3's transformer (real widths, as many blocks as fill `--gb` on disk) is written three times: as one
safetensors file and as shards in the diffusers layout, and as a single file in the original layout, which needs its
tensors split and renamed. Each is loaded into the same `diffusers` class by fastsd and by `diffusers`
(`from_pretrained`, `from_single_file`), each time in a fresh process that had imported everything before.

Memory is the anonymous part of the resident set (`RssAnon` of /proc/PID/status), read every millisecond by the parent,
as a thread of the child could not while the interpreter is locked: what loading adds to it at most. Pages of the mapped
file are not in it: the kernel drops them when memory is short. Seconds are those of loading and of reading every
weight once, since mapped weights would else be counted as free; the file is in the page cache. Every row is checked:
both sides must give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import select
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

GOAL = 1.15  # times the size in the target dtype
DTYPES = {"F32": "float32", "F16": "float16"}
CASES = (("F32", "bfloat16"), ("F32", "float32"), ("F16", "bfloat16"))  # on disk, in memory
LAYOUTS = ("single", "sharded", "original")
SHARDS = 4
CONFIG = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 64,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 64,
}

Shapes = dict[str, list[int]]


# ------------------------------------------------------------------------------------------------------------
# The checkpoint


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def original_shapes(layers: int) -> Shapes:
    """SD3's transformer by the names of its original repository."""
    dim, prefix = 1536, "model.diffusion_model."
    shapes = {
        "pos_embed": [1, 64 * 64, dim],
        "x_embedder.proj.weight": [dim, 16, 2, 2],
        "x_embedder.proj.bias": [dim],
        **linear("t_embedder.mlp.0", dim, 256),
        **linear("t_embedder.mlp.2", dim, dim),
        **linear("y_embedder.mlp.0", dim, 2048),
        **linear("y_embedder.mlp.2", dim, dim),
        **linear("context_embedder", dim, 4096),
        **linear("final_layer.linear", 64, dim),
        **linear("final_layer.adaLN_modulation.1", 2 * dim, dim),
    }
    for i in range(layers):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{stream}"
            ends = i == layers - 1 and stream == "context_block"  # only its keys and values are used
            shapes |= linear(f"{block}.attn.qkv", 3 * dim, dim)
            shapes |= linear(f"{block}.adaLN_modulation.1", (2 if ends else 6) * dim, dim)
            if not ends:
                shapes |= linear(f"{block}.attn.proj", dim, dim)
                shapes |= linear(f"{block}.mlp.fc1", 4 * dim, dim)
                shapes |= linear(f"{block}.mlp.fc2", dim, 4 * dim)
    return {prefix + name: shape for name, shape in shapes.items()}


def build(layers: int) -> torch.nn.Module:
    """The module, without memory."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        module: torch.nn.Module = SD3Transformer2DModel.from_config({**CONFIG, "num_layers": layers})
    return module


def write(path: Path, shapes: Shapes, dtype: str) -> None:
    """A safetensors file of random numbers, written without holding it in memory."""
    torch_dtype: torch.dtype = getattr(torch, DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    # An odd length, so that no two tensors hold the same numbers.
    block = torch.randn(4_000_037, generator=generator).to(torch_dtype).view(torch.uint8).numpy().tobytes()
    header, end = {}, 0
    for name, shape in shapes.items():
        size = prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


def write_checkpoint(folder: Path, layout: str, dtype: str, layers: int) -> None:
    component = folder / "transformer"
    component.mkdir(parents=True)
    (component / "config.json").write_text(json.dumps({**CONFIG, "num_layers": layers}))
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", CONFIG["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))
    if layout == "original":
        write(folder / "model.safetensors", original_shapes(layers), dtype)
        return
    shapes = {name: list(tensor.shape) for name, tensor in build(layers).state_dict().items()}
    stem = "diffusion_pytorch_model"
    if layout == "single":
        write(component / f"{stem}.safetensors", shapes, dtype)
        return
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for i in range(SHARDS):
        part = names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS]
        file = f"{stem}-{i + 1:05}-of-{SHARDS:05}.safetensors"
        write(component / file, {name: shapes[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    document = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (component / f"{stem}.safetensors.index.json").write_text(json.dumps(document))


# ------------------------------------------------------------------------------------------------------------
# The fresh process


def load(side: str, folder: Path, layout: str, layers: int, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    from fastsd import checkpoint, single_file

    if side == "diffusers":
        module: torch.nn.Module
        if layout == "original":
            module = SD3Transformer2DModel.from_single_file(
                str(folder / "model.safetensors"),
                config=str(folder),
                subfolder="transformer",
                local_files_only=True,
                torch_dtype=dtype,
            )
        else:
            module = SD3Transformer2DModel.from_pretrained(str(folder / "transformer"), torch_dtype=dtype)
        return module
    source = (
        single_file.source(folder / "model.safetensors", config=folder)
        if layout == "original"
        else checkpoint.source(folder)
    )
    module = build(layers)
    source.load(module, "transformer", dtype, torch.device("cpu"))
    return module


def child(side: str, folder: Path, layout: str, layers: int, dtype: torch.dtype) -> None:
    """Import, wait for the parent, load, and say how long it took and what was loaded."""
    from diffusers.utils import logging

    import fastsd.single_file  # noqa: F401

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    build(1)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    module = load(side, folder, layout, layers, dtype)
    for tensor in module.state_dict().values():
        tensor.sum()
    seconds = time.perf_counter() - start
    print("loaded", flush=True)
    sys.stdin.readline()
    digest, size = 0, 0
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        digest, size = zlib.crc32(data, zlib.crc32(name.encode(), digest)), size + data.nbytes
    print(json.dumps({"seconds": seconds, "digest": digest, "bytes": size}), flush=True)


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def observe(side: str, folder: Path, layout: str, layers: int, dtype: str) -> dict[str, Any]:
    """One load in a fresh process: what the child says, and its anonymous memory before and at most."""
    here = [sys.executable, "-m", "fastsd_benchmarks.loading", "--child"]
    command = [*here, side, str(folder), layout, str(layers), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        lines = iter(process.stdout.readline, b"")
        await_line(lines, b"ready\n")
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.001)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
        await_line(lines, b"loaded\n")
        process.stdin.write(b"\n")
        process.stdin.flush()
        said: dict[str, Any] = json.loads(next(lines))
    return {**said, "before_bytes": before, "peak_bytes": peak - before, "ratio": (peak - before) / said["bytes"]}


def await_line(lines: Iterator[bytes], expected: bytes) -> None:
    if (line := next(lines, b"")) != expected:
        raise RuntimeError(f"the loading process said {line!r} instead of {expected!r}")


# ------------------------------------------------------------------------------------------------------------


def measure(gigabytes: float, scratch: Path) -> list[dict[str, Any]]:
    rows = []
    for layout in LAYOUTS:
        for stored, target in CASES:
            itemsize = getattr(torch, DTYPES[stored]).itemsize
            sizes = [sum(map(prod, original_shapes(layers).values())) * itemsize for layers in (2, 3)]
            layers = max(2, 2 + round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])))
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                write_checkpoint(Path(folder), layout, stored, layers)
                sides = {side: observe(side, Path(folder), layout, layers, target) for side in ("fastsd", "diffusers")}
            if sides["fastsd"]["digest"] != sides["diffusers"]["digest"]:
                raise RuntimeError(f"fastsd and diffusers loaded different weights ({layout}, {stored} to {target})")
            rows.append({"layout": layout, "stored": DTYPES[stored], "target": target, "layers": layers, **sides})
    return rows


def main() -> None:
    """Measure all layouts and dtypes, print a table, and write one JSON document with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint on disk, 10^9 bytes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, too")
    parser.add_argument("--scratch", type=Path, help="where checkpoints are written (default: the temporary folder)")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, folder, layout, layers, dtype = options.child
        child(side, Path(folder), layout, int(layers), getattr(torch, dtype))
        return
    rows = measure(options.gb, options.scratch or Path(tempfile.gettempdir()))
    document = {
        "benchmark": "loading",
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gigabytes_on_disk": options.gb,
        "goal_ratio": GOAL,
        "reached": all(row["fastsd"]["ratio"] <= GOAL for row in rows),
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(document) + "\n")
    table = Table(title=f"loading {options.gb:g} GB: peak of anonymous memory over the size in the target dtype")
    for column in ("layout", "stored", "target", "GB", "fastsd", "diffusers", "fastsd s", "diffusers s"):
        table.add_column(column, justify="left" if column in ("layout", "stored", "target") else "right")
    for row in rows:
        ours, theirs = row["fastsd"], row["diffusers"]
        table.add_row(
            *(row[key] for key in ("layout", "stored", "target")),
            *(f"{value:.2f}" for value in (ours["bytes"] / 1e9, ours["ratio"], theirs["ratio"])),
            *(f"{side['seconds']:.1f}" for side in (ours, theirs)),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
