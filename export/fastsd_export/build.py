"""From a checkpoint to a bundle, one component in memory at a time; what is not verified is not written.

text encoders   graphs, samples ──────────────────────────────────┐
denoiser        graphs of `prepare` and of a step, trajectories ──┤ last latents
VAE             graphs, samples, reference images ────────────────┘
each engine     built once (the store) and held against its samples
the bundle      run whole and held against the reference images; then published
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import gzip
import hashlib
import json
import math
import os
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import onnx as onnx_
import torch

import fastsd
import fastsd_export
import fastsd_kernels
from fastsd import bundle, families, integrity, lora, presets, store
from fastsd.backends import load_backend
from fastsd.bundle import Engine, Manifest, Range, Variant
from fastsd.checkpoint import Source
from fastsd.errors import InputError, NumericError
from fastsd.families import Components
from fastsd.pipeline import Pipeline
from fastsd.sampling.schedulers import SIGMAS, is_flow, resolve_scheduler
from fastsd_export import aoti, onnx, openvino, reference, tables, tensorrt, trace, verify
from fastsd_export.plan import Lane, Plan, Sizes
from fastsd_export.trace import Traced
from fastsd_export.verify import Sample

CALIBRATION = 32  # calls of the denoiser whose inputs an int8 engine is calibrated with
STEPS = 8  # of the longest trajectory that engines are verified on
CPU = torch.device("cpu")
# What leaves the range of float16 in the published checkpoints: SDXL's VAE, and T5.
OVERFLOW = {"sdxl": ("vae_decoder", "vae_encoder"), "sd3": ("text_encoder_3",), "flux": ("text_encoder_2",)}
ENGINE, GRAPH = "engine.json", "graph.json"  # in the store, beside the files of an engine or a graph: what it is
ENGINES = "engines"  # folder of a bundle; what belongs to no engine lies in other folders
# Components of a checkpoint whose convolutions are fastest so, by what `denoisers.layout` and `vae` have measured.
CHANNELS_LAST = ("unet", "vae")
# Keys of configurations that no component reads; a fine-tune may have others there.
UNREAD = ("architectures", "dtype", "torch_dtype", "transformers_version")
WEIGHTS = "weights.json"  # beside an ONNX graph: of which parameters each initialiser is made, and how

Progress = Callable[[str], None]


class Written(NamedTuple):
    """A graph on the disk, its precision and the digest of what it is without its weights."""

    graph: onnx.Graph
    precision: str
    digest: str


class Bare(NamedTuple):
    """A component without data, the file and layout of its weights, its precision, and its digest without them."""

    traced: Traced
    weights: aoti.Weights
    layout: torch.memory_format
    precision: str
    digest: str


@dataclass(frozen=True)
class Part:
    """A component as graphs on the disk, and what they must compute; its weights are let go."""

    component: str
    ranges: Mapping[str, Range]
    graphs: Mapping[str, Written]  # by what lanes share
    bare: Mapping[Lane, Bare]  # of lanes whose engines have their weights outside
    samples: Sequence[Sample]
    weights: str  # their digest
    calibration: Sequence[Mapping[str, Any]] = ()


def export(
    source: Source,
    name: str,
    folder: Path,
    *,
    lanes: Sequence[Lane],
    sizes: Sizes | None = None,
    components: Sequence[str] | None = None,
    samplers: Sequence[str] | None = None,
    max_steps: int = tables.MAX_STEPS,
    loras: Sequence[tuple[str, float]] = (),
    defaults: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int = STEPS,
    calibration: int = CALIBRATION,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Build, verify and publish a bundle, or add engines to the one that is in `folder`.

    Args:
        source: the checkpoint.
        name: what the user calls it.
        folder: becomes the bundle.
        lanes: what it is to run on.
        sizes: what it is to hold; None: one image of the checkpoint's own size.
        components: names of those to build; None: all.
        samplers: as `tables.tables`; None: all that fit.
        max_steps: of the samplers.
        loras: path or hub id and weight of each that is merged.
        defaults: steps and guidance of the checkpoint where its own index has none.
        arguments: what the user gave to name the checkpoint, for the manifest.
        options: of the TensorRT builder, see `tensorrt.build`.
        steps: of the longest trajectory that engines are verified on.
        calibration: calls of the denoiser whose inputs an int8 engine is calibrated with.
        progress: told what is being done, a line at a time.

    Raises:
        InputError: an argument, the checkpoint or the folder is not right.
        MissingExtraError: a target's library is not installed.
        NumericError: an engine strays from the float32 component; nothing is written.
    """
    plan = Plan(source, lanes, sizes or Sizes(), components, defaults)
    before = existing(folder)
    if before is not None:
        _check_origin(before, folder)
    adapters = [(lora.read(path, plan.kind), weight) for path, weight in loras]
    plan.check_loras(adapters)
    for lane in plan.lanes:
        reason = load_backend(lane.target).available(lane.device, lane.target)
        if reason is not None:
            raise InputError(f"{lane} is verified on the machine that builds it, and does not run here: {reason}")
    with _temporary(folder, "staging") as staging, _temporary(folder, "work") as work:
        progress("samplers")
        manifest = _manifest(plan, name, adapters, arguments or {}, samplers, max_steps, staging)
        if before is not None:
            _check_same(before, manifest, folder)
        line = Line(plan, adapters, steps, calibration if plan.quantised else 0, work, progress)
        engines: dict[Lane, list[Engine]] = {lane: [] for lane in plan.lanes}
        for parts in line.stages():
            _let_go()
            for part in parts:
                for lane in plan.lanes:
                    if lane in part.bare:
                        engines[lane].append(_package(lane, part, staging, progress))
                    else:
                        engines[lane].append(_engine(lane, part, staging, options or {}, steps, progress))

        variants = tuple(Variant(*lane, tuple(made)) for lane, made in engines.items())
        manifest = replace(manifest, weights=line.weights, variants=variants)
        if before is not None:
            manifest = _join(before, manifest, folder, staging, progress)
        manifest = _write(staging, manifest)
        joined = {(one.target, one.precision): one for one in manifest.variants}
        if whole := [lane for lane in plan.lanes if _is_whole(plan, joined[lane])]:
            reports: dict[tuple[str, str], dict[str, Any]] = {}
            for lane in whole:
                progress(f"{lane}: the whole bundle")
                kind = "quantised" if lane.precision == "int8" else "lossless"
                reports[lane] = {"lane": kind, "verification": _end_to_end(staging, lane, line)}
            done = (
                replace(one, record=reports.get((one.target, one.precision), one.record)) for one in manifest.variants
            )
            manifest = replace(manifest, variants=tuple(done))
            manifest = _write(staging, manifest)
        store.publish(staging, folder)
    return manifest


class Line:
    """The straight line in float32, with one component in memory at a time.

    Attributes:
        weights: by component, the digest of its weights.
        cases: the trajectories.
        latents: the last ones of each case.
        images: decoded of them.
    """

    def __init__(
        self,
        plan: Plan,
        adapters: Sequence[tuple[lora.Adapter, float]],
        steps: int,
        calibration: int,
        work: Path,
        progress: Progress,
    ) -> None:
        self._plan, self._adapters, self._calibration = plan, adapters, calibration
        self._work, self._progress = work, progress
        self.weights: dict[str, str] = {}
        self.latents: list[Any] = []
        self.images: list[Any] = []
        plain = reference.pipeline(plan.bare, {}, defaults=plan.defaults)
        self.cases = reference.cases(plain, plan.profile, steps=steps, calibration=calibration)

    def stages(self) -> Iterator[list[Part]]:
        """The components' parts; what was in memory for them is let go before the next ones."""
        texts: dict[str, list[Sample]] = {}
        for encoder in self._plan.encoders:
            yield self._text(encoder, texts)
        yield self._denoiser(texts)
        yield self._vae()

    def _text(self, encoder: Any, texts: dict[str, list[Sample]]) -> list[Part]:
        plan = self._plan
        module = plan.family.ENCODERS.index(encoder)
        loaded = self._load(encoder.name).text_encoders[module]
        inputs = reference.text_inputs(plan.bare, self.cases)[encoder.name]
        choices = 1
        if encoder.is_clip and "clip_skip" in plan.family.ARGUMENTS:
            choices = loaded.config.num_hidden_layers + encoder.layer + 1
        traced = trace.text_encoder(encoder, loaded, inputs[0]["ids"].shape[1], choices)
        self._progress(f"{encoder.name}: samples")
        texts[encoder.name] = reference.samples(traced, inputs)
        return self._parts(encoder.name, (traced, texts[encoder.name], ()))

    def _denoiser(self, texts: Mapping[str, Sequence[Sample]]) -> list[Part]:
        plan, name = self._plan, self._plan.family.DENOISER[0]
        loaded, tokens = self._load(name), plan.profile["tokens"][1]
        prepare, step = trace.prepare(plan.family, loaded, tokens), trace.denoiser(plan.family, loaded, tokens)
        self._progress("denoiser: trajectories")
        denoised = reference.denoise(plan.bare, self.cases, texts, prepare, step, calibrate=plan.quantised)
        self.latents = denoised.latents
        calibration = reference.spread(denoised.inputs, self._calibration)
        return self._parts(name, (prepare, denoised.prepare, ()), (step, denoised.denoiser, calibration))

    def _vae(self) -> list[Part]:
        loaded = self._load("vae").vae
        decoder, encoder = trace.vae_decoder(loaded), trace.vae_encoder(loaded)
        self._progress("vae: samples")
        decoded = reference.samples(decoder, reference.vae_inputs(self.latents))
        self.images = reference.decoded(decoded, self.latents)
        pixels = [{"pixels": sample.outputs["pixels"]} for sample in decoded]
        encoded = reference.samples(encoder, pixels)
        return self._parts("vae", (decoder, decoded, ()), (encoder, encoded, ()))

    def _load(self, component: str) -> Components:
        """The components, one of them with its weights, in float32 and with the LoRAs in them."""
        self._progress(f"{component}: weights")
        plan = self._plan
        loaded = families.load(plan.source, torch.float32, CPU, only=(component,))
        named = dict(zip((one.name for one in plan.family.ENCODERS), loaded.text_encoders, strict=True))
        module = {**named, plan.family.DENOISER[0]: loaded.denoiser, "vae": loaded.vae}[component]
        merged = lora.Loras({component: module})
        for i, (adapter, weight) in enumerate(self._adapters):
            if component in adapter.deltas:
                merged.load(replace(adapter, deltas={component: adapter.deltas[component]}), weight, str(i))
        self.weights[component] = digest(module)
        return loaded

    def _parts(self, name: str, *traces: tuple[Traced, Sequence[Sample], Sequence[Any]]) -> list[Part]:
        """What engines of those that are asked for are made of, written while the weights are there."""
        plan, parts = self._plan, []
        stored: dict[Lane, aoti.Weights] = {}  # of all these traces
        for traced, samples, calibration in traces:
            if traced.component not in plan.components:
                continue
            ranges, config = plan.ranges(traced), plan.source.config(name)
            graphs: dict[str, Written] = {}
            bare: dict[Lane, Bare] = {}
            for lane in plan.lanes:
                key, precision = _graph_key(lane), _graph_precision(lane, plan.kind, traced.component)
                where = self._work / key
                where.mkdir(exist_ok=True)
                if lane.target in bundle.TENSORS:
                    layout = torch.channels_last if name in CHANNELS_LAST else torch.contiguous_format
                    empty = replace(traced, module=trace.skeleton(traced.module, getattr(torch, precision)))
                    if lane not in stored:
                        self._progress(f"{name}: weights for {lane}")
                        path = where / f"{name}.safetensors"
                        component = traced.module.component
                        stored[lane] = aoti.write_weights(component, empty.module.component, path, layout)
                    found = store.key(_identity(empty, plan.kind, config, ranges, precision, TRACERS))
                    bare[lane] = Bare(empty, stored[lane], layout, precision, found)
                elif key not in graphs:
                    self._progress(f"{traced.component}: graph for {lane}")
                    opset = onnx.opset_of(lane.target, traced.component, precision)
                    graphs[key] = _graph(traced, plan.kind, config, ranges, where, precision, opset)
            parts.append(Part(traced.component, ranges, graphs, bare, samples, self.weights[name], calibration))
        return parts


def _graph_key(lane: Lane) -> str:
    """Lanes of one key read the same graphs."""
    return "cpu" if lane.in_float32 else f"{lane.target}-{lane.precision}"


def _graph(
    traced: Traced,
    kind: str,
    config: Mapping[str, Any],
    ranges: Mapping[str, Range],
    folder: Path,
    precision: str,
    opset: int,
) -> Written:
    """The component's ONNX file: traced once for an architecture, then filled with the weights of each checkpoint."""
    fields = {
        **_identity(traced, kind, config, ranges, precision, (*TRACERS, *WRITERS)),
        "target": "graph",
        "opset": opset,
    }

    def build(empty: Path) -> None:
        graph = onnx.write(traced, ranges, folder, precision=precision, opset=opset)
        onnx.strip(graph.path, graph.weights, empty / graph.path.name)
        (empty / GRAPH).write_text(
            json.dumps({**asdict(graph), "path": graph.path.name, "weights": _plain(graph.weights)})
        )
        for path in _files_of(graph):
            path.unlink()

    found = store.get(fields, build)
    plain = json.loads((found / GRAPH).read_text())
    path = folder / plain["path"]
    shutil.copyfile(found / path.name, path)
    weights = {name: None if one is None else _weight(one) for name, one in plain["weights"].items()}
    onnx.fill(path, weights, traced.module.component.state_dict())
    data = path.with_name(path.name + ".data")
    if data.stat().st_size <= onnx.EXTERNAL:  # small enough for one file
        onnx_.save(onnx_.load(path), path)
        data.unlink()
    sides = {side: bundle.read_specs(plain[side]) for side in ("inputs", "outputs")}
    graph = onnx.Graph(path=path, weights=weights, opset=plain["opset"], nodes=plain["nodes"], **sides)
    return Written(graph, precision, hashlib.sha256((found / path.name).read_bytes()).hexdigest())


def _identity(
    traced: Traced,
    kind: str,
    config: Mapping[str, Any],
    ranges: Mapping[str, Range],
    precision: str,
    libraries: Sequence[str],
) -> dict[str, Any]:
    """Everything that a component's graph depends on, which is all but its weights."""
    module: Any = traced.module
    plain = {name: value for name, value in config.items() if not name.startswith("_") and name not in UNREAD}
    return {
        "component": traced.component,
        # Families read other layers of the same text encoder.
        "family": kind,
        "module": [type(module).__name__, type(module.component).__name__],
        "encoder": [repr(getattr(module, "encoder", None)), getattr(module, "choices", 1)],
        "precision": precision,
        "profile": ranges,
        "config": json.loads(json.dumps(plain, default=str)),
        "inputs": {name: [str(tensor.dtype), *tensor.shape] for name, tensor in traced.inputs.items()},
        "outputs": traced.outputs,
        "versions": versions(libraries),
        "sources": _sources(),
    }


def _weight(plain: Mapping[str, Any]) -> onnx.Weight:
    steps = tuple((step, tuple(numbers)) for step, numbers in plain["steps"])
    return onnx.Weight(plain["parameter"], tuple(plain["shape"]), plain["dtype"], steps)


def _plain(weights: Mapping[str, onnx.Weight | None]) -> dict[str, Any]:
    """How initialisers are made, as JSON."""
    return {name: None if one is None else one._asdict() for name, one in weights.items()}


def _graph_precision(lane: Lane, kind: str, component: str) -> str:
    if lane.in_float32:
        return "float32"
    overflows = component in OVERFLOW.get(kind, ())
    return "float32" if lane.precision == "float16" and overflows else lane.precision


def _engine_precision(lane: Lane, graph_precision: str, component: str) -> str:
    if lane.target != "openvino":
        return graph_precision
    if component == "prepare":
        return "float32"  # OpenVINO would round the angles of the timesteps to 8 bits; it runs once an image
    return lane.precision if lane.precision != "int8" or component == "denoiser" else "bfloat16"


# ------------------------------------------------------------------------------------------------------------
# Engines


def _engine(
    lane: Lane, part: Part, staging: Path, options: Mapping[str, Any], steps: int, progress: Progress
) -> Engine:
    """An engine of the store, built and verified if it is not there, as files of the bundle."""
    graph, written, graph_digest = part.graphs[_graph_key(lane)]
    precision = _engine_precision(lane, written, part.component)
    calibration = part.calibration if precision == "int8" else ()
    recipe: dict[str, Any] = dict(options) if lane.target.startswith("tensorrt") else {}
    if calibration:
        recipe["calibration"] = _digest_arrays(calibration)
    # An engine that was verified on less is built anew.
    recipe["verification"] = {"samples": len(part.samples), "steps": steps}
    refits = recipe.get("refit") == "refit"  # fine-tunes share the plan
    device = lane.device
    fields = store.fields_for(
        lane.target,
        part.component,
        precision=precision,
        profile=part.ranges,
        graph=graph_digest,
        weights="refit" if refits else part.weights,
        device=device,
        options={**recipe, "sources": _sources()},
    )

    def check(main: Path, engine: Engine) -> dict[str, Any]:
        run = load_backend(lane.target).load(main, engine, device=device, shared={})
        try:
            fed = verify.feed(run, engine.inputs, device)
            return verify.check_component(part.component, fed, part.samples, precision)
        except verify.Strayed as error:
            raise NumericError(f"{error}; {_first_stray(error, graph.path, main, lane, precision)}") from None

    def build(folder: Path) -> None:
        progress(f"{part.component}: {lane}")
        started = time.perf_counter()
        needs: Mapping[str, Any] = {}
        said: dict[str, Any] = {}
        if lane.target == "onnx":
            main = graph.path.name
            for path in _files_of(graph):
                shutil.copyfile(path, folder / path.name)
        elif lane.target == "openvino":
            made = openvino.build(graph.path, part.ranges, folder, precision=precision, calibration=calibration)
            main, needs = made.path, made.options
        else:
            rtx = lane.target == "tensorrt-rtx"
            timings = None if rtx else store.home() / "timing"
            plan = tensorrt.build(
                graph.path, part.ranges, folder, precision=written, rtx=rtx, timing_cache=timings, **options
            )
            main, needs = plan.files[0].name, plan.options
            said = {"versions": {**versions(), **plan.versions}, "warnings": list(plan.warnings)}
        if lane.target != "openvino":
            (folder / WEIGHTS).write_text(json.dumps(_plain(graph.weights)))
        engine = Engine(
            part.component, lane.target, main, precision, graph.inputs, graph.outputs, part.ranges, options=needs
        )
        seconds = time.perf_counter() - started
        report = check(folder / main, engine)
        record = {
            "versions": versions(),
            "machine": fields["machine"],
            "weights": part.weights,
            "build_seconds": round(seconds, 3),
            "peak_bytes": peak_bytes(),
            "verification": report,
            **said,
        }
        (folder / ENGINE).write_text(json.dumps(asdict(replace(engine, record=record))))

    found = store.get(fields, build, needed=sum(path.stat().st_size for path in _files_of(graph)))
    where, engine = _take(found, lane, part, staging)
    if refits and engine.record["weights"] != part.weights:
        progress(f"{part.component}: {lane}, new weights in its plan")
        main = staging / where / engine.path
        plan = tensorrt.refit(found / engine.path, graph.path, rtx=lane.target == "tensorrt-rtx")
        store.write_atomically(main, plan)  # a new file: the store's, which this is a name of, stays as it is
        record = {**engine.record, "weights": part.weights, "verification": check(main, engine)}
        engine = replace(engine, record=record)
    files = {f"{where.as_posix()}/{path}": value for path, value in integrity.hash_files(staging / where).items()}
    return replace(engine, path=f"{where.as_posix()}/{engine.path}", files=files)


def _package(lane: Lane, part: Part, staging: Path, progress: Progress) -> Engine:
    """An engine whose code is that of the store, compiled if it is not there, and whose weights lie beside it.

    It is verified with these weights, whoever's it was compiled for.
    """
    bare, device = part.bare[lane], lane.device
    fields = store.fields_for(
        lane.target,
        part.component,
        precision=bare.precision,
        profile=part.ranges,
        graph=bare.digest,
        weights="outside",
        device=device,
        options=aoti.OPTIONS[device],
    )
    fresh = False

    def build(folder: Path) -> None:
        nonlocal fresh
        fresh = True
        progress(f"{part.component}: {lane}")
        started = time.perf_counter()
        made = aoti.build(bare.traced, part.ranges, folder, precision=bare.precision, device=device, layout=bare.layout)
        record = {
            "versions": versions(),
            "machine": fields["machine"],
            "build_seconds": round(time.perf_counter() - started, 3),
            "peak_bytes": peak_bytes(),
        }
        engine = Engine(
            part.component,
            lane.target,
            made.path,
            bare.precision,
            made.inputs,
            made.outputs,
            part.ranges,
            record=record,
        )
        (folder / ENGINE).write_text(json.dumps(asdict(engine)))

    found = store.get(fields, build)
    where, engine = _take(found, lane, part, staging)
    weights = f"{where.parent.as_posix()}/{bare.weights.path.name}"
    _link(bare.weights.path, staging / weights)
    files = {f"{where.as_posix()}/{path}": value for path, value in integrity.hash_files(staging / where).items()}
    files[weights] = bare.weights.size, bare.weights.digest
    options = {"weights": weights, **bare.weights.options}
    engine = replace(engine, path=f"{where.as_posix()}/{engine.path}", files=files, options=options)
    try:
        run = load_backend(lane.target).load(staging / engine.path, engine, device=device, shared={})
        fed = verify.feed(run, engine.inputs, device, tensors=lane.target in bundle.TENSORS)
        report = verify.check_component(part.component, fed, part.samples, bare.precision)
    except NumericError:
        if fresh:
            store.remove([store.key(fields)])
        raise
    return replace(engine, record={**engine.record, "weights": part.weights, "verification": report})


def _take(found: Path, lane: Lane, part: Part, staging: Path) -> tuple[Path, Engine]:
    """Put an engine of the store into the bundle: its folder there, and what the store says of it."""
    tag = "".join(f"-{name[0]}{low}" + f"-{high}" * (high > low) for name, (low, _, high) in part.ranges.items())
    where = Path(ENGINES, f"{lane.target}-{lane.precision}", f"{part.component}{tag}")
    for path in sorted(found.rglob("*")):
        if path.is_file() and path.name != ENGINE:
            _link(path, staging / where / path.relative_to(found))
    return where, bundle.read_engine(json.loads((found / ENGINE).read_text()))


def _files_of(graph: onnx.Graph) -> list[Path]:
    """The graph's file, and that of its weights if there is one."""
    return [path for path in (graph.path, graph.path.with_name(graph.path.name + ".data")) if path.exists()]


def _end_to_end(staging: Path, lane: Lane, line: Line) -> dict[str, Any]:
    """The report of whole runs of the bundle, from the same noise as the float32 ones."""

    def opened() -> Pipeline:
        _let_go()  # of the engines of an earlier one
        return Pipeline.from_pretrained(staging, backend=lane.target, dtype=lane.precision, trust=True)

    # One after the other, so that the largest engine is alone in memory: the texts, the denoiser, the VAE.
    cases = [case for case in line.cases if not case.only_prepare]
    pipe = opened()
    for case in cases:
        reference.read(pipe, case)
    encodings = pipe.encodings
    del pipe
    pipe = opened()
    pipe.encodings = encodings
    latents = [reference.run(pipe, case) for case in cases]
    del pipe
    pipe = opened()
    images = [pipe.decode(one) for one in latents]
    return verify.check_images(
        list(zip(line.latents, latents, strict=True)), list(zip(line.images, images, strict=True)), lane.precision
    )


def _let_go() -> None:
    """Give the memory of what is gone back to the system, which the allocator would keep for later."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


# ------------------------------------------------------------------------------------------------------------
# The folder


def existing(folder: Path) -> Manifest | None:
    """The manifest of the bundle that is there; None where there is nothing.

    Raises:
        InputError: something else is there, or its parent is no folder.
    """
    if not folder.parent.is_dir():
        raise InputError(f"the folder {str(folder.parent)!r} does not exist: make it first, or choose another")
    if bundle.is_bundle(folder):
        return bundle.read(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} is there and is no bundle: choose another name")
    return None


def _check_origin(before: Manifest, folder: Path) -> None:
    """Refuse to add to, and so to sign, native engines of another machine."""
    engines = [engine for variant in before.variants for engine in variant.engines]
    if any(map(bundle.is_native, engines)) and not bundle.made_here(folder):
        raise InputError(
            f"{str(folder)!r} holds native engines that were not built on this machine, which adding to it would vouch "
            "for: choose another folder"
        )


@contextlib.contextmanager
def _temporary(folder: Path, purpose: str) -> Iterator[Path]:
    """A folder beside `folder`, gone afterwards if it is still there."""
    path = folder.parent / f".{folder.name}.{purpose}-{secrets.token_hex(4)}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _manifest(
    plan: Plan,
    name: str,
    adapters: Sequence[tuple[lora.Adapter, float]],
    arguments: Mapping[str, Any],
    samplers: Sequence[str] | None,
    max_steps: int,
    staging: Path,
) -> Manifest:
    """The manifest without engines and weights; tokenizers, samplers and licences are written."""
    tokenizers: dict[str, Any] = {}
    licences: list[Path] = []
    for encoder, tokenizer in zip(plan.family.ENCODERS, plan.meta.tokenizers, strict=True):
        if tokenizer is None:
            continue
        if not isinstance(tokenizer.origin, Path):
            tokenizers[encoder.tokenizer] = tokenizer.origin
            continue
        tokenizers[encoder.tokenizer] = encoder.tokenizer
        for path in sorted(one for one in tokenizer.origin.iterdir() if one.is_file()):
            _place(path, staging / encoder.tokenizer / path.name)
        around = tokenizer.origin.parent
        licences += [path for pattern in ("LICEN[CS]E*", "NOTICE*", "README.md") for path in around.glob(pattern)]
        if around.is_relative_to(Path(fastsd.__file__).parent):  # the demo's is that of the package
            found = metadata.files("fastsd") or []
            licences += [Path(str(path.locate())) for path in found if path.match("*.dist-info/licenses/*")]
    for path in dict.fromkeys(licences):
        if path.is_file():
            _place(path, staging / "licences" / path.name)
    if (preset := presets.find(arguments.get("model"))) is not None:
        (staging / "licences").mkdir(exist_ok=True)
        (staging / "licences" / "weights.txt").write_text(f"weights of {preset.name}: {preset.licence}\n")
    modules = plan.modules()
    configs = {"denoiser": asdict(plan.meta.denoiser.config), "vae": _some(plan.meta.vae.config, VAE_KEYS)}
    for encoder in plan.encoders:
        configs[encoder.name] = _some(modules[encoder.name].config, TEXT_KEYS)
    return Manifest(
        name=name,
        exporter=fastsd.__version__,
        index={key: value for key, value in plan.source.index.items() if key != "_fastsd"},  # in the defaults
        scheduler=_finite(plan.meta.scheduler),
        configs=json.loads(json.dumps(configs)),
        defaults=plan.defaults | plan.text_default,
        tokenizers=tokenizers,
        samplers=_samplers(plan, samplers, max_steps, staging),
        weights={},
        loras={adapter.source: weight for adapter, weight in adapters},
        arguments=dict(arguments),
        files={},
        variants=(),
    )


# What of their configurations a call is checked against.
VAE_KEYS = ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor")
TEXT_KEYS = ("num_hidden_layers", "max_position_embeddings")


def _finite(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration without infinities, which JSON lacks and no option of ours reads."""
    return {key: value for key, value in config.items() if not isinstance(value, float) or math.isfinite(value)}


def _some(config: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


def _samplers(plan: Plan, samplers: Sequence[str] | None, max_steps: int, staging: Path) -> dict[str, Any]:
    """The samplers of the manifest, their tables written; those that cannot be made though asked for are refused."""
    low, _, high = plan.profile["height"]
    wide, _, widest = plan.profile["width"]
    fixed = low == high and wide == widest
    tokens = low * wide // plan.family.PATCH**2 if fixed else None
    # The checkpoint's own is always there, and the one that stands in where that makes no table.
    own = (str(plan.meta.scheduler.get("_class_name")), "flow_euler" if is_flow(plan.meta.scheduler) else "euler")
    wanted = None if samplers is None else list(dict.fromkeys([*own, *samplers]))
    made = tables.tables(plan.meta.scheduler, plan.family, wanted, max_steps, tokens=tokens)
    if refused := [why for name, why in made.left_out.items() if name in (samplers or ())]:
        raise InputError(f"no tables can be made: {'; '.join(refused)}")
    found: dict[str, Any] = {}
    for name in made.formulas:
        # With the defaults of its class, which are read in the same way where torch runs.
        resolved = dict(resolve_scheduler(name, plan.meta.scheduler).config)
        resolved.pop("_use_default_values", None)
        found[name] = {**_finite(resolved), **(SIGMAS if name == "flow_euler" else {})}
    (staging / "samplers").mkdir()
    for name, compiled in made.tables.items():
        path = f"samplers/{name}.jsonl.gz"
        found[name] = {"file": path, "tokens": tokens} if name in made.sized else path
        (staging / path).write_bytes(tables.pack(compiled))
    return found


def _check_same(before: Manifest, now: Manifest, folder: Path) -> None:
    """Refuse a bundle of another checkpoint, as far as it shows without the weights."""
    for what in ("index", "scheduler", "configs", "loras"):
        if getattr(before, what) != getattr(now, what):
            raise InputError(
                f"{str(folder)!r} is a bundle of another checkpoint ({what} differ): choose another folder"
            )


def _join(before: Manifest, now: Manifest, folder: Path, staging: Path, progress: Progress) -> Manifest:
    """A bundle with new engines beside those that it has; the same component at the same sizes is replaced."""
    for component in before.weights.keys() & now.weights.keys():
        if before.weights[component] != now.weights[component]:
            raise InputError(
                f"{str(folder)!r} is a bundle of other weights (those of {component} differ): choose another folder"
            )
    variants = {(one.target, one.precision): one for one in before.variants}
    for one in now.variants:
        made = {engine.path for engine in one.engines}
        old = variants.get((one.target, one.precision))
        kept = [engine for engine in old.engines if engine.path not in made] if old is not None else []
        # The weights that they share with new ones are the same, but the file may be written in another order.
        new = {path: value for engine in one.engines for path, value in engine.files.items()}
        kept = [
            replace(engine, files={path: new.get(path, value) for path, value in engine.files.items()})
            for engine in kept
        ]
        record = old.record if old is not None else {}
        variants[one.target, one.precision] = replace(one, engines=(*kept, *one.engines), record=record)
    files = {path for variant in variants.values() for engine in variant.engines for path in engine.files}
    tabled = {path for one in before.samplers.values() if (path := _table_file(one)) is not None}
    kept_files = {path for path in files if not (staging / path).exists()} | tabled
    integrity.check_files(folder, {path: before.everything()[path] for path in kept_files}, besides=None)
    samplers = {**before.samplers, **now.samplers}
    for name in before.samplers.keys() & now.samplers.keys():
        path = _table_file(before.samplers[name])
        if path is None or _table_file(now.samplers[name]) != path:
            continue
        other = before.samplers[name] != now.samplers[name]
        if other:
            progress(f"the sampler {name} stays as it was made for another size: export this size to its own folder")
        if other or _lines(folder / path) > _lines(staging / path):
            samplers[name] = before.samplers[name]
            (staging / path).unlink()
    files |= {path for one in samplers.values() if (path := _table_file(one)) is not None}
    for path in files:
        if not (staging / path).exists():
            _link(folder / path, staging / path)
    weights = {**before.weights, **now.weights}
    # A call without arguments goes on finding the engines that it found.
    defaults = {**now.defaults, **before.defaults}
    joined = tuple(variants.values())
    return replace(now, variants=joined, samplers=samplers, weights=weights, defaults=defaults)


def _table_file(sampler: Any) -> str | None:
    """The file of a sampler of the manifest; None if it goes by its formula."""
    return sampler if isinstance(sampler, str) else sampler.get("file")


def _lines(path: Path) -> int:
    """Steps that there are tables for."""
    return gzip.decompress(path.read_bytes()).count(b"\n") + 1


def _is_whole(plan: Plan, variant: Variant) -> bool:
    """Whether a variant makes images of all sizes of the plan."""

    def holds(engine: Engine) -> bool:
        clip = plan.clip_tokens if plan.kind == "sd3" and engine.component.startswith("text_encoder") else 0
        return all(
            low + clip <= plan.profile[name][0] and plan.profile[name][2] <= high + clip
            for name, (low, _, high) in engine.profile.items()
        )

    held = {engine.component for engine in variant.engines if holds(engine)}
    return set(plan.parts) - {"vae_encoder"} <= held


def _write(staging: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, with what belongs to no engine listed in it, and its signature."""
    found = {
        f"{part.name}/{path}": value
        for part in staging.iterdir()
        if part.is_dir() and part.name != ENGINES
        for path, value in integrity.hash_files(part).items()
    }
    manifest = replace(manifest, files=found)
    text = manifest.to_json()
    store.write_atomically(staging / bundle.MANIFEST, text)
    store.write_atomically(staging / bundle.SIGNATURE, store.sign(text.encode()))
    return manifest


def _place(source: Path, target: Path) -> None:
    """Copy a small file, following links: the hub's cache is made of them."""
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)


def _link(source: Path, target: Path) -> None:
    """The same file under another name where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    # onnx refuses external data that has a second name.
    with contextlib.suppress(OSError):
        if source.suffix != ".data":
            os.link(source, target)
            return
    shutil.copyfile(source, target)


# ------------------------------------------------------------------------------------------------------------
# Digests and records


def digest(module: Any) -> str:
    """sha256 of a module's parameters and buffers: names, dtypes, shapes and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        hashed.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


@functools.cache
def _sources() -> str:
    """Digest of the code that graphs are made by."""
    hashed = hashlib.sha256()
    for package in (fastsd, fastsd_export, fastsd_kernels):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*")):
            if path.suffix in (".py", ".cpp"):
                hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _digest_arrays(calls: Sequence[Mapping[str, Any]]) -> str:
    hashed = hashlib.sha256()
    for call in calls:
        for name, array in sorted(call.items()):
            hashed.update(f"{name} {array.dtype} {array.shape};".encode())
            hashed.update(array.tobytes())
    return hashed.hexdigest()


# Libraries that make an engine what it is: those that trace a component, and those that write graphs and engines.
TRACERS = ("torch", "diffusers", "transformers", "triton")
WRITERS = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt-rtx")


def versions(names: Sequence[str] = (*TRACERS, *WRITERS)) -> dict[str, str]:
    """Of fastsd and the libraries that are installed."""
    found = {"fastsd": fastsd.__version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def peak_bytes() -> int:
    """The most host memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _first_stray(error: verify.Strayed, graph: Path, main: Path, lane: Lane, precision: str) -> str:
    """Which tensor of the graph strays first, as far as the target can be asked."""
    if lane.target not in ("onnx", "openvino"):
        return "the target shows no tensors inside its engines"
    target = (
        verify.onnxruntime_probe(main, optimised=True)
        if lane.target == "onnx"
        else verify.openvino_probe(main, precision)
    )
    try:
        found = verify.first_stray(
            graph,
            verify.onnxruntime_probe(graph),
            target,
            error.sample.inputs,
            error.floor,
            output=error.output,
        )
    except InputError:
        return "the graph itself differs from the component, before the target reads it"
    return str(found)
