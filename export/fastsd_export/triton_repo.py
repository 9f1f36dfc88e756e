"""A bundle as a model repository of the Triton Inference Server.

    <out>/manifest.json                     what wrote it; Triton looks at folders alone
    <out>/<name>/config.pbtxt               the model that makes images, of the Python backend
    <out>/<name>/1/model.py                 `triton_model`: the loop
    <out>/<name>/1/bundle/                  manifest, tokenizers and samplers, checked as those of a bundle are
    <out>/<name>-denoiser-.../config.pbtxt  an engine, of the ONNX Runtime or TensorRT backend
    <out>/<name>-denoiser-.../1/model.onnx

The engines are models of their own, which the Python model calls: Triton places and loads them natively, shares them
among all instances of the Python model, measures them one by one, and that model needs neither torch nor a GPU library.
Its environment needs fastsd alone. Triton 23.10 or later, for engines in bfloat16 24.08; with numpy<2 up to 24.10.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import fastsd
from fastsd import bundle, integrity, store
from fastsd.backends import base
from fastsd.bundle import Engine, Manifest, TensorSpec, Variant
from fastsd.errors import InputError
from fastsd.families import family
from fastsd.files import few, one_line

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FORMAT, VERSION = "fastsd.triton", 1  # of the repository's manifest.json

PLATFORMS = {"tensorrt": ("tensorrt_plan", "model.plan"), "onnx": ("onnxruntime_onnx", "model.onnx")}
DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}

# Inputs and outputs of the Python model: name, type, dims.
INPUTS = (
    ("prompt", "TYPE_STRING", [-1]),  # an image for each; what follows may be left out, and has one value or one each
    ("negative_prompt", "TYPE_STRING", [-1]),
    ("seed", "TYPE_INT64", [-1]),
    ("steps", "TYPE_INT32", [-1]),
    ("guidance_scale", "TYPE_FP32", [-1]),
    ("scheduler", "TYPE_STRING", [-1]),
    ("height", "TYPE_INT32", [1]),
    ("width", "TYPE_INT32", [1]),
)
OUTPUTS = (("image", "TYPE_UINT8", [-1, -1, -1, 3]), ("seed", "TYPE_INT64", [-1]))


def write(
    folder: Path, out: Path, *, backend: str | None = None, precision: str | None = None, name: str = "fastsd"
) -> list[Path]:
    """Write a model repository of a bundle.

    Args:
        folder: of the bundle.
        out: becomes the repository, in the place of an older one if there is one. It shares the engines' files with
            the bundle where the file system can.
        backend: "tensorrt" or "onnx"; None: the first of them that the bundle has.
        precision: of a variant; None: the first one.
        name: of the model that makes images; those of the engines begin with it.

    Returns:
        The folders of its models, that of the Python model first.

    Raises:
        InputError: the bundle is damaged or has no engines that Triton runs, `out` holds other things or cannot be
            written, or the name is none.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"the name {name!r} is none of a model: use letters, digits, '-', '_' and '.'")
    out = Path(os.path.realpath(out))  # a link keeps pointing where it did
    if not out.parent.is_dir():
        raise InputError(f"the folder {str(out.parent)!r} does not exist: make it first, or choose another")
    if out.is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{str(out)!r} is in the bundle, where only its own files may be: choose another folder")
    manifest = bundle.read(folder)
    variant = _choose(manifest, folder, backend, precision)
    _check(folder, manifest, variant)
    models = _names(variant, name)
    staging = out.parent / f".{out.name}.staging-{secrets.token_hex(4)}"
    try:
        # A graph in float32 runs on either, all others were made for a GPU.
        kind = "KIND_AUTO" if (variant.target, variant.precision) == ("onnx", "float32") else "KIND_GPU"
        for model, engine in models.items():
            _write_engine(folder, staging / model, model, engine, kind)
        served = (replace(engine, options={**engine.options, "model": model}) for model, engine in models.items())
        _write_python(folder, staging / name, name, replace(manifest, variants=(_of(variant, served),)))
        marker = {"format": FORMAT, "version": VERSION, "exporter": fastsd.__version__, "bundle": manifest.name}
        marker |= {"target": variant.target, "precision": variant.precision, "models": [name, *models]}
        (staging / bundle.MANIFEST).write_text(json.dumps(marker, indent=1))
        store.publish(staging, out)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(
            f"cannot write the repository {str(out)!r} ({reason}): free space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [out / model for model in (name, *models)]


def _names(variant: Variant, name: str) -> dict[str, Engine]:
    """The engines by the names of their models."""
    models = {f"{name}-{Path(engine.path).parent.name}": engine for engine in variant.engines}
    odd = [model for model in models if not NAME.fullmatch(model)]
    if odd or len(models) < len(variant.engines):
        raise InputError(f"the bundle's engines have names that serve for no models ({few(odd)}): export it anew")
    return models


def _of(variant: Variant, engines: Iterable[Engine]) -> Variant:
    return replace(variant, engines=tuple(engines))


def _choose(manifest: Manifest, folder: Path, backend: str | None, precision: str | None) -> Variant:
    """The variant to serve, with the engines that a call needs."""
    if backend not in (None, *PLATFORMS):
        raise InputError(f"Triton runs engines of {' and '.join(PLATFORMS)} here, not of {backend!r}: use one of these")
    fitting = [
        variant
        for target in PLATFORMS
        for variant in manifest.variants
        if variant.target == target and backend in (None, target) and precision in (None, variant.precision)
    ]
    if not fitting:
        has = " and ".join(f"{variant.target} in {variant.precision}" for variant in manifest.variants)
        asked = f"{backend or ' or '.join(PLATFORMS)}{f' in {precision}' if precision else ''}"
        raise InputError(f"{str(folder)!r} has {has}, nothing for {asked}: export that, or ask for what it has")
    [variant, *_] = fitting
    kind = family(str(manifest.index.get("_class_name")))
    needed = [encoder.name for encoder in kind.ENCODERS if encoder.name in manifest.configs]
    needed += ["prepare", "denoiser", "vae_decoder"]
    if missing := sorted(set(needed) - {engine.component for engine in variant.engines}):
        raise InputError(f"{str(folder)!r} lacks {few(missing)} in {variant.target}: export the whole checkpoint")
    for engine in variant.engines:
        if strange := {spec.dtype for spec in (*engine.inputs, *engine.outputs)} - DTYPES.keys():
            raise InputError(f"{engine.path!r} has tensors of {few(sorted(strange))}, which none has: export it anew")
        if engine.options.get("weights"):
            raise InputError(
                f"{engine.path!r} is a plan without its weights, which Triton cannot give it: export without "
                f"--refit {engine.options.get('refit', 'strip')}"
            )
    return _of(variant, (engine for engine in variant.engines if engine.component in needed))


def _check(folder: Path, manifest: Manifest, variant: Variant) -> None:
    """Refuse a bundle of which a file that is served has changed."""
    listed = dict(manifest.files)
    for engine in variant.engines:
        listed |= engine.files
    integrity.check_files(folder, listed, besides=None)
    for engine in variant.engines:
        if engine.path.endswith(".onnx"):
            integrity.check_external(folder / engine.path, folder, engine.files)


# ------------------------------------------------------------------------------------------------------------
# Models


def _write_engine(folder: Path, where: Path, model: str, engine: Engine, kind: str) -> None:
    platform, filename = PLATFORMS[engine.target]
    version = where / "1"
    main = folder / engine.path
    _link(main, version / filename)
    for beside in integrity.external_files(main) if engine.target == "onnx" else ():  # the graph names it
        _link(main.with_name(beside), version / beside)
    lines = [f"platform: {_quoted(platform)}", *_tensors(engine), *_instances(kind)]
    if engine.target == "tensorrt" and engine.component == "denoiser" and not engine.options.get("weight_streaming"):
        lines += _graph(engine)
    (where / "config.pbtxt").write_text(_config(model, lines, _notes(engine)))


def _write_python(folder: Path, where: Path, name: str, manifest: Manifest) -> None:
    inside = where / "1" / "bundle"
    for path in manifest.files:
        (inside / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, inside / path)
    inside.mkdir(parents=True, exist_ok=True)
    (inside / bundle.MANIFEST).write_text(manifest.to_json())
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), where / "1" / "model.py")
    lines = ['backend: "python"']
    lines += _entries("input", ((*one, one[0] != "prompt") for one in INPUTS))
    lines += _entries("output", ((*one, False) for one in OUTPUTS))
    lines += _instances("KIND_CPU")
    notes = (f"Needs, in the Python that Triton runs: pip install fastsd=={fastsd.__version__}",)
    (where / "config.pbtxt").write_text(_config(name, lines, notes))


def _link(source: Path, target: Path) -> None:
    """The same file under another name where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ------------------------------------------------------------------------------------------------------------
# config.pbtxt: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto


def _config(name: str, lines: Iterable[str], notes: Iterable[str] = ()) -> str:
    comments = [f"# {note}" for note in notes]
    # 0: Triton joins no requests along a first axis, which in a denoiser is that of one request's own batch.
    return "\n".join([*comments, f"name: {_quoted(name)}", "max_batch_size: 0", *lines, ""])


def _notes(engine: Engine) -> list[str]:
    if engine.target != "tensorrt":
        return []
    if engine.options.get("version_compatible"):
        return ["Needs tritonserver --backend-config=tensorrt,version-compatible=true"]
    return ["Needs a Triton with the TensorRT that built the plan, on a GPU of its kind"]


def _tensors(engine: Engine) -> list[str]:
    def plain(specs: tuple[TensorSpec, ...]) -> Iterable[tuple[str, str, list[int], bool]]:
        for spec in specs:
            yield spec.name, DTYPES[spec.dtype], [dim if isinstance(dim, int) else -1 for dim in spec.shape], False

    return [*_entries("input", plain(engine.inputs)), *_entries("output", plain(engine.outputs))]


def _entries(field: str, tensors: Iterable[tuple[str, str, list[int], bool]]) -> list[str]:
    lines = []
    for name, kind, dims, optional in tensors:
        parts = [f"name: {_quoted(name)}", f"data_type: {kind}", f"dims: {dims}"]
        lines.append(f"{field} {{ {', '.join([*parts, 'optional: true'] if optional else parts)} }}")
    return lines


def _instances(kind: str) -> list[str]:
    return [f"instance_group {{ kind: {kind}, count: 1 }}"]


def _graph(engine: Engine) -> list[str]:
    """The CUDA graph of a denoiser, which runs once a step, at the size that it was tuned for."""
    sizes = {name: usual for name, (_, usual, _) in engine.profile.items()}
    shapes = [
        f"      input {{ key: {_quoted(spec.name)}, value {{ dim: {list(base.shape(spec, sizes))} }} }}"
        for spec in engine.inputs
    ]
    return ["optimization { cuda {", "    graphs: true", "    graph_spec {", "      batch_size: 0", *shapes, "} } }"]


def _quoted(text: str) -> str:
    return json.dumps(text)
