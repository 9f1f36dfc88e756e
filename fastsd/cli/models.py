"""`fastsd models`: the presets, how large they are and how they are run by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastsd import checkpoint
from fastsd.errors import InputError
from fastsd.presets import PRESETS, Preset

# Heading -> whether it is a number, set to the right. With these a row fits into 80 characters.
COLUMNS = {
    "\npreset": False,
    "de-\nnoiser": True,
    "text\nencoders": True,
    "\nVAE": True,
    "GB\nfp16": True,
    "GB\nfp32": True,
    "native\npixels": True,
    "\nsteps": True,
    "guid-\nance": True,
    "\nlicence": False,
    "\ncached": False,
}
BREAKABLE = ("text\nencoders", "\nlicence")
WIDE = 160  # characters where the output is no terminal, so that no row is broken


def models(as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """List the presets: parameters by component, size on disk, native size, default steps and guidance, licence."""
    described = [_describe(preset) for preset in PRESETS.values()]
    if as_json:
        print(json.dumps({"models": described}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, is_number in COLUMNS.items():
        table.add_column(
            heading,
            justify="right" if is_number else "left",
            no_wrap=heading not in BREAKABLE,
            overflow="fold",
            min_width=8 if heading in BREAKABLE else None,
        )
    for one in described:
        table.add_row(*_row(one))
    console = Console(markup=False)  # a licence has brackets
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def _describe(preset: Preset) -> dict[str, Any]:
    height, width = preset.native
    return {
        "name": preset.name,
        "hub": preset.hub,
        "pipeline": preset.index["_class_name"],
        "parameters": {component: one.parameters for component, one in preset.weights.items()},
        "bytes": {
            name: {component: one.nbytes(itemsize) for component, one in preset.weights.items()}
            for name, itemsize in (("float16", 2), ("float32", 4))
        },
        "height": height,
        "width": width,
        "num_inference_steps": preset.steps,
        "guidance_scale": preset.guidance,
        "max_sequence_length": preset.max_sequence_length,
        "licence": preset.licence,
        "cached": _cached(preset),
    }


def _row(one: dict[str, Any]) -> list[str]:
    sizes: dict[str, int] = one["parameters"]
    texts = [_count(size) for component, size in sizes.items() if component.startswith("text_encoder")]
    return [
        one["name"],
        _count(sizes.get("unet") or sizes["transformer"]),
        " + ".join(texts),
        _count(sizes["vae"]),
        *(_gigabytes(sum(parts.values())) for parts in one["bytes"].values()),
        f"{one['width']}²" if one["width"] == one["height"] else f"{one['width']}x{one['height']}",
        str(one["num_inference_steps"]),
        f"{one['guidance_scale']:g}",
        one["licence"],
        "yes" if one["cached"] else "no",
    ]


def _count(parameters: int) -> str:
    """Three digits: 489 k, 83.7 M, 2.57 B."""
    scale, unit = next(pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if parameters >= pair[0])
    return f"{parameters / scale:.3g} {unit}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"


def _cached(preset: Preset) -> bool:
    """Whether a run needs no network: all weights are in the hub's cache, in some variant, or in the package."""
    if preset.hub is None:
        return True
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(preset.hub, "model_index.json")
    return isinstance(found, str) and any(_complete(Path(found).parent, preset, variant) for variant in (None, "fp16"))


def _complete(folder: Path, preset: Preset, variant: str | None) -> bool:
    try:
        for component in preset.weights:
            checkpoint.weight_files(folder, component, variant)
    except InputError:
        return False
    return True
