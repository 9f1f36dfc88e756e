"""`fastsd export`: a checkpoint to a bundle of engines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastsd import lora
from fastsd.bundle import TARGETS, Manifest, Range
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import read_json

if TYPE_CHECKING:
    from fastsd.checkpoint import Source
    from fastsd.presets import Preset
    from fastsd_export.plan import Lane, Plan

REPOSITORY = "triton-repo"  # a target that is written from another one's bundle, beside it
SERVED = ("tensorrt", "onnx")  # what it is written from, the first that is exported


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset, folder, hub id or .safetensors file.")],
    to: Annotated[str, typer.Option("--to", help=f"Targets, by commas: {', '.join(TARGETS)}, {REPOSITORY}.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The bundle's folder; one that is there is added to.")
    ] = None,
    components: Annotated[str | None, typer.Option("--components", help="Only these, by commas.")] = None,
    height: Annotated[str | None, typer.Option("--height", "-H", help="Pixels: a number or min:opt:max.")] = None,
    width: Annotated[str | None, typer.Option("--width", "-W", help="Pixels: a number or min:opt:max.")] = None,
    batch: Annotated[str, typer.Option("--batch", help="Images: a number or min:opt:max.")] = "1",
    tokens: Annotated[str | None, typer.Option("--tokens", help="Of the text: a number or min:opt:max.")] = None,
    guidance: Annotated[
        str, typer.Option("--guidance", help="both | on | off: with classifier-free guidance, without.")
    ] = "both",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (each target's usual one) | float32 | float16 | bfloat16")
    ] = "auto",
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="int8: the denoiser of OpenVINO, as a variant of its own.")
    ] = None,
    calibration: Annotated[
        int, typer.Option("--calibration", help="Calls of the denoiser that int8 is calibrated with.")
    ] = 32,
    loras: Annotated[
        list[str] | None, typer.Option("--lora", metavar="PATH[:WEIGHT]", help="A LoRA to merge; may be repeated.")
    ] = None,
    samplers: Annotated[str | None, typer.Option("--samplers", help="By commas; all that fit if left out.")] = None,
    max_steps: Annotated[int, typer.Option("--max-steps", help="Steps that the samplers have tables for.")] = 50,
    verify_steps: Annotated[
        int, typer.Option("--verify-steps", help="Of the trajectories that engines are verified on.")
    ] = 8,
    weights: Annotated[
        str, typer.Option("--weights", help="checkpoint | random: a preset's size without its download.")
    ] = "checkpoint",
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="Weight files to take, such as fp16.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="For a .safetensors file: folder or hub id with its tokenizers.")
    ] = None,
    level: Annotated[int, typer.Option("--level", help="TensorRT: how long the builder may search, 0 to 5.")] = 3,
    refit: Annotated[
        str | None, typer.Option("--refit", help="TensorRT: refit | strip | identical: plans that take other weights.")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="TensorRT: weights may stay in host memory.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: later versions run it.")
    ] = False,
    hardware_compatibility: Annotated[
        str | None, typer.Option("--hardware-compatibility", help="TensorRT: ampere_plus | same_compute_capability.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built, its sizes and peak memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Build verified engines for this machine into a bundle that runs without torch, or (aoti) with torch alone."""
    # Before any work: torch takes seconds to import.
    targets = _words(to)
    ranges = {name: _range(name, value) for name, value in (("height", height), ("width", width), ("tokens", tokens))}
    images = _range("batch", batch)
    adapters = [lora.parse(one) for one in loras or []]
    if unknown := sorted(set(targets) - {*TARGETS, REPOSITORY}):
        raise InputError(f"the target {unknown[0]!r} is unknown: use {', '.join(TARGETS)} or {REPOSITORY}")
    if quantize not in (None, "int8"):
        raise InputError(f"--quantize {quantize!r} is unknown: use int8")
    if quantize and "openvino" not in targets:
        raise InputError("--quantize int8 is for the target openvino: add it to --to")
    if calibration != 32 and not quantize:
        raise InputError("--calibration is for int8: add --quantize int8, or leave it out")
    native: dict[str, Any] = {
        **({"level": level} if level != 3 else {}),
        **({"refit": refit} if refit else {}),
        **({"weight_streaming": True} if weight_streaming else {}),
        **({"version_compatible": True} if version_compatible else {}),
        **({"hardware_compatibility": hardware_compatibility} if hardware_compatibility else {}),
    }
    if native and not {"tensorrt", "tensorrt-rtx"} & set(targets):
        raise InputError(f"--{next(iter(native)).replace('_', '-')} is for TensorRT: add it to --to, or leave it out")
    if output is None and not dry_run:
        raise InputError("no folder is given: say where the bundle goes with -o DIR")
    for name, number in (("max-steps", max_steps), ("verify-steps", verify_steps), ("calibration", calibration)):
        if number < 1:
            raise InputError(f"--{name} must be at least 1, not {number}")
    if REPOSITORY in targets and not set(SERVED) & set(targets):
        raise InputError(
            f"{REPOSITORY} is written from engines of {' or '.join(SERVED)}: name their target too, such as "
            f"--to onnx,{REPOSITORY}"
        )
    folder = Path(os.path.abspath(os.path.expanduser(output or "")))
    repository = folder.with_name(f"{folder.name}-triton") if REPOSITORY in targets and not dry_run else None
    if repository is not None:
        _check_repository(repository)

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        from fastsd_export import build
        from fastsd_export.plan import Plan, Sizes
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"an export needs {error.name}: pip install 'fastsd[cpu]' (or [gpu])") from error

    lanes = _lanes([target for target in targets if target != REPOSITORY], dtype, quantize)
    source, preset = _source(model, revision, variant, weights, config)
    defaults = {} if preset is None else preset.defaults
    given = {
        "model": model,
        "weights": weights if weights != "checkpoint" else None,
        "lora": loras or None,
        "revision": revision,
        "variant": variant,
        "config": config,
    }
    sizes = Sizes(images or (1, 1, 1), guidance=guidance, **ranges)
    chosen = None if components is None else _words(components)
    if dry_run:
        plan = Plan(source, lanes, sizes, chosen, defaults)
        plan.check_loras([(lora.read(path, plan.kind), weight) for path, weight in adapters])
        _show(plan, as_json)
        return
    with _progress() as progress:
        manifest = build.export(
            source,
            model,
            folder,
            lanes=lanes,
            sizes=sizes,
            components=chosen,
            samplers=None if samplers is None else _words(samplers),
            max_steps=max_steps,
            loras=adapters,
            defaults=defaults,
            arguments={name: value for name, value in given.items() if value is not None},
            options=native,
            steps=verify_steps,
            calibration=calibration,
            progress=progress,
        )
    if repository is not None:
        from fastsd_export import triton_repo

        served = next(lane for target in SERVED for lane in lanes if lane.target == target)
        triton_repo.write(folder, repository, backend=served.target, precision=served.precision)
    _report(manifest, folder, lanes, repository, as_json)


def _check_repository(path: Path) -> None:
    """Refuse a path where other things are."""
    if path.is_dir() and not any(path.iterdir()):
        return
    marker = path / "manifest.json"
    if os.path.lexists(path) and not (marker.is_file() and read_json(marker).get("format") == "fastsd.triton"):
        raise InputError(
            f"{str(path)!r}, where the repository goes, is there and is none: move it, or give another folder with -o"
        )


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise InputError(f"{text!r} has an empty entry: separate names by single commas")
    return list(dict.fromkeys(words))


def _range(name: str, text: str | None) -> Range | None:
    """`"512"` or `"256:512:1024"`."""
    if text is None:
        return None
    try:
        values = [int(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not 1 <= values[0] <= values[len(values) // 2] <= values[-1]:
        raise InputError(f"--{name} {text!r} is no size: use a number such as 512, or min:opt:max such as 256:512:1024")
    return values[0], values[len(values) // 2], values[-1]


def _lanes(targets: list[str], dtype: str, quantize: str | None) -> list[Lane]:
    from fastsd_export.plan import Lane, usual_precision

    lanes = [Lane(target, usual_precision(target) if dtype == "auto" else dtype) for target in targets]
    return [*lanes, *([Lane("openvino", quantize)] if quantize else [])]


def _source(
    model: str, revision: str | None, variant: str | None, weights: str, config: str | None
) -> tuple[Source, Preset | None]:
    """The checkpoint, and the preset that it is, if it is one."""
    from fastsd import checkpoint, presets, random_weights, single_file

    if model.lower().endswith(".safetensors"):
        if revision or variant or weights != "checkpoint":
            raise InputError(
                f"{model!r} is a file: --revision, --variant and --weights are for checkpoints of other kinds"
            )
        return single_file.source(model, config=config), None
    if config is not None:
        raise InputError(f"--config is for a .safetensors file, and {model!r} is none: leave it out")
    preset = presets.find(model)
    if weights == "checkpoint":
        return checkpoint.source(checkpoint.resolve(model, revision=revision, variant=variant), variant), preset
    if weights != "random":
        raise InputError(f"weights {weights!r} is unknown: use 'checkpoint' or 'random'")
    if preset is None:
        raise InputError(f"weights='random' needs a preset, not {model!r}: use one of {', '.join(presets.PRESETS)}")
    return random_weights.source(preset), preset


def _show(plan: Plan, as_json: bool) -> None:
    """What would be built."""
    estimates = plan.estimates()
    rows = [
        {"component": one.component, "target": one.lane.target, "precision": one.lane.precision, "bytes": one.nbytes}
        for one in estimates
    ]
    total, peak = sum(one.nbytes for one in estimates), max(one.peak_bytes for one in estimates)
    if as_json:
        print(json.dumps({"engines": rows, "profile": plan.profile, "bytes": total, "peak_bytes": peak}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("component", "target", "precision", "MB", box=None)
    for one in estimates:
        table.add_row(one.component, *one.lane, f"{one.nbytes / 1e6:,.1f}")
    console = Console()
    console.print(table)
    sizes = ", ".join(f"{name} {low}" + f" to {high}" * (high > low) for name, (low, _, high) in plan.profile.items())
    console.print(f"denoiser: {sizes} (latents, both halves of guidance)")
    console.print(f"{total / 1e9:.2f} GB on the disk")
    console.print(
        f"at most {peak / 1e9:.1f} GB of memory while exporting: 2.5 times the largest component in float32, the bound "
        "that exports are held to"
    )


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr for each thing that is done."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda line: print(f"fastsd: {line}", file=sys.stderr, flush=True)
        return
    with console.status("reading") as status:

        def show(line: str) -> None:
            status.update(line)
            console.log(line)

        yield show


def _report(manifest: Manifest, folder: Path, lanes: list[Lane], repository: Path | None, as_json: bool) -> None:
    variants = [one for one in manifest.variants if (one.target, one.precision) in lanes]
    if as_json:
        print(
            json.dumps(
                {
                    "path": str(folder),
                    "triton_repository": None if repository is None else str(repository),
                    "variants": [
                        {
                            "target": one.target,
                            "precision": one.precision,
                            "verification": one.record.get("verification"),
                            "engines": [
                                {"component": engine.component, "path": engine.path, **engine.record}
                                for engine in one.engines
                            ],
                        }
                        for one in variants
                    ],
                }
            )
        )
        return
    for one in variants:
        listed = {path: nbytes for engine in one.engines for path, (nbytes, _) in engine.files.items()}
        size = sum(listed.values())  # engines may share a file
        held = one.record.get("verification")
        checked = "components alone verified"
        if held:
            checked = f"images verified, worst PSNR {held['worst']['psnr']:.1f} dB, SSIM {held['worst']['ssim']:.4f}"
        print(f"{folder}: {one.target} in {one.precision}, {len(one.engines)} engines, {size / 1e6:,.1f} MB; {checked}")
