"""Which backends can run a model here, why the others cannot and what would change that, and what "auto" picks.

Nothing of a model is loaded for it: each backend is asked whether its libraries and the device are there
(`available(device, target)`: None, or "what is wrong: what would make it possible"), a bundle what it holds.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsd import bundle, machine
from fastsd.backends import MODULES, load_backend
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import existing, few, one_line

if TYPE_CHECKING:
    import torch

    from fastsd.families import Components
    from fastsd.pipeline import Pipeline

# Backend -> the devices that it runs on, the likelier one first.
BACKENDS: Mapping[str, tuple[str, ...]] = {**dict.fromkeys(MODULES, ("cuda", "cpu")), **bundle.TARGETS}

_READERS = {"torch": "Tensor", "diffusers": "AutoencoderKL", "transformers": "CLIPTextModel"}  # of checkpoints
_WRITERS = ("onnx", "onnxscript")  # of the graphs that all targets but aoti are made of
_EXTRAS = {"openvino": "cpu", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}  # all others: of the device
_UNCOMPILED = 'nothing is compiled for this model yet: `warmup` of a pipeline with backend="compile" does that'
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"  # vendor of a PCI device


@dataclass(frozen=True)
class Row:
    """One backend on one device.

    Attributes:
        backend: as the argument of that name.
        device: "cpu", "cuda" or "cuda:1".
        runs: whether it can, as things are.
        why: why it cannot, or what is to be known of it where it can.
        remedy: what would make it possible: commands where there are any; "" where nothing is needed.
    """

    backend: str
    device: str
    runs: bool
    why: str
    remedy: str = ""


class Pick(NamedTuple):
    """The backend that "auto" means, "" where that depends on the model or nothing runs; and why."""

    backend: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """What can run; `print` it.

    Attributes:
        rows: of every backend, on each of the devices in question that it supports.
        auto: what "auto" picks.
    """

    rows: tuple[Row, ...]
    auto: Pick

    def __str__(self) -> str:
        names, places = (max(len(getattr(row, name)) for row in self.rows) for name in ("backend", "device"))
        lines = []
        for row in self.rows:
            lines.append(f"{row.backend:<{names}}  {row.device:<{places}}  {'runs' if row.runs else 'no'}: {row.why}")
            if row.remedy:
                lines.append(" " * (names + places + 8) + row.remedy)
        picks = f" picks {self.auto.backend}" if self.auto.backend else ""
        return "\n".join([*lines, f'"auto"{picks}: {self.auto.why}'])


def problem(backend: str, device: str, *, thorough: bool = False) -> str | None:
    """None if a backend runs on a device here; else why not, and what would make it possible.

    Args:
        backend: of `BACKENDS`.
        device: "cpu", "cuda" or "cuda:1".
        thorough: import what reads checkpoints, too, which takes seconds, and not only see whether it is installed.
    """
    if device.partition(":")[0] == "cuda" and backend not in MODULES and (reason := _no_gpu()):
        return reason
    extra = _EXTRAS.get(backend, "cpu" if device == "cpu" else "gpu")
    try:
        for library, part in _READERS.items() if thorough and backend in MODULES else ():
            getattr(import_module(library), part)
        # What compiles modules needs first of all what runs them.
        asked = dict.fromkeys(("eager", backend) if backend in MODULES else (backend,))
        reasons = (load_backend(one).available(device, one) for one in asked)
        return next((str(reason) for reason in reasons if reason is not None), None)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: pip install 'fastsd[{extra}]'"
    except Exception as error:  # whatever a broken library raises when it is imported
        said = f"{type(error).__name__}: {one_line(error)[:200]}"
        return f"its libraries do not load ({said}): pip install --force-reinstall 'fastsd[{extra}]'"


def require(backend: str, device: str) -> None:
    """Raise `MissingExtraError` or `InputError` if a backend does not run on a device here."""
    if reason := problem(backend, device):
        raise (MissingExtraError if "pip install" in reason else InputError)(reason)


def _no_gpu() -> str | None:
    """Why CUDA has no GPU here, and what would change that."""
    try:
        machine.describe("cuda")
    except InputError as error:
        if _NVIDIA not in (path.read_text().strip() for path in _PCI.glob("*/vendor")):
            return "there is no NVIDIA GPU in this machine: use one that has one"
        remedy = "install NVIDIA's driver, until nvidia-smi shows the GPU (in a container, with --gpus all)"
        return f"{_split(str(error))[0]}: {remedy}"
    return None


def _split(reason: str) -> tuple[str, str]:
    """What is wrong, and what would be right."""
    wrong, colon, right = reason.rpartition(": ")
    return (wrong, right) if colon else (right, "")


def pick(
    family: ModuleType, components: Components, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Pick:
    """What "auto" means for a checkpoint: compile, where what it compiled before is kept; else eager.

    Args:
        family: module of `fastsd.families`.
        components: of the checkpoint.
        dtype: in place of that of the components, if these are on the meta device.
        device: likewise.
    """
    if reason := problem("compile", str(device or next(components.denoiser.parameters()).device)):
        return Pick("eager", f"compile does not run here ({_split(reason)[0]})")
    if load_backend("compile").is_marked(family, components, dtype, device):
        return Pick("compile", "it has compiled this architecture here before, for this device and dtype")
    return Pick("eager", _UNCOMPILED)


def of_machine(devices: Sequence[str], *, thorough: bool = False) -> Explanation:
    """What can run on some devices of this machine, whatever the model; `thorough` as of `problem`."""
    rows = []
    for backend, device in _places(devices):
        reason = problem(backend, device, thorough=thorough)
        if reason is not None:
            rows.append(Row(backend, device, False, *_split(reason)))
        elif backend in MODULES:
            rows.append(Row(backend, device, True, "checkpoints" + ", which it compiles first" * (backend != "eager")))
        else:
            rows.append(Row(backend, device, True, "bundles", _export({}, backend, device)[-1]))
    able = list(dict.fromkeys(row.backend for row in rows if row.runs))
    bundles = [target for target in bundle.TARGETS if target in able]
    modules = "compile, once `warmup` of a pipeline has compiled it, else eager" if "compile" in able else "eager"
    whys = [f"for a checkpoint {modules}"] if set(able) & set(MODULES) else []
    whys += [f"for a bundle the first that it has of {', '.join(bundles)}"] if bundles else []
    return Explanation(tuple(rows), Pick("", "; ".join(whys) or "nothing runs here"))


def of_checkpoint(
    arguments: Mapping[str, Any],
    devices: Sequence[str],
    auto: Pick,
    *,
    broken: str | None = None,
    note: str = "",
    thorough: bool = False,
) -> Explanation:
    """What can run a checkpoint on some devices of this machine.

    Args:
        arguments: of the `fastsd export` that makes engines of it; of "model" none: it has no name.
        devices: "cpu", "cuda", ...
        auto: what "auto" picks.
        broken: why the checkpoint itself cannot be loaded, a sentence; None: nothing is known against it.
        note: what is to be known where it runs.
        thorough: as of `problem`.
    """

    def row(backend: str, device: str) -> Row:
        reason = problem(backend, device, thorough=thorough)
        if backend not in MODULES:
            commands = _export(arguments, backend, device)
            return _lacking(backend, device, reason, "the checkpoint is not exported for it", commands)
        if reason := reason or broken:
            return Row(backend, device, False, *_split(reason))
        kept = "traced at the first call, which then takes the code that was compiled here before"
        compiles = kept if auto.backend == backend else "compiles at the first call"
        why = "nothing needs to be built" if backend == "eager" else compiles
        return Row(backend, device, True, "; ".join(filter(None, (why, note))))

    return Explanation(tuple(row(*place) for place in _places(devices)), auto)


def of_bundle(folder: Path, devices: Sequence[str], *, trust: bool = False, loras: Sequence[str] = ()) -> Explanation:
    """What can run a bundle on some devices of this machine.

    Args:
        folder: of the bundle.
        devices: "cpu", "cuda", ...
        trust: see `bundle.load`.
        loras: PATH:WEIGHT of those that were merged after it was loaded.

    Raises:
        InputError: its manifest cannot be read, or is damaged.
    """
    manifest = bundle.read(folder)
    has: dict[str, list[str]] = {}
    for variant in manifest.variants:
        has.setdefault(variant.target, []).append(variant.precision)

    arguments = {"model": manifest.name, **manifest.arguments}
    arguments["lora"] = [*(arguments.get("lora") or ()), *loras]

    def row(backend: str, device: str) -> Row:
        if backend in MODULES:  # what torch says of it does not matter: to ask it takes seconds
            absent = _absent(*_READERS)
            reason = f"{absent[0]} is not installed: pip install 'fastsd[torch]'" if absent else None
            commands = _generate(arguments, backend)
            return _lacking(backend, device, reason, "a bundle holds engines, not the checkpoint's modules", commands)
        reason = problem(backend, device)
        if backend not in has:
            commands = _export(arguments, backend, device, str(folder))
            return _lacking(backend, device, reason, "the bundle has no engines for it", commands)
        if reason is None:
            try:
                bundle.load(folder, backend, "auto", device, trust=trust)
            except InputError as error:
                reason = str(error)
        if reason is not None:
            return Row(backend, device, False, *_split(reason))
        return Row(backend, device, True, f"in {few(has[backend])}")

    rows = tuple(row(*place) for place in _places(devices))
    best = [
        row.backend
        for kind in ("cuda", "cpu")  # as `bundle.choose` goes through them
        for row in rows
        if row.runs and row.device in devices and row.device.partition(":")[0] == kind
    ]
    if not best:
        return Explanation(rows, Pick("", "nothing of it runs here"))
    return Explanation(rows, Pick(best[0], f"of {few(has)} in the bundle the likeliest to be the fastest that runs"))


def of_pipeline(pipe: Pipeline, loras: Mapping[str, float]) -> Explanation:
    """What can run a pipeline's model, with the LoRAs that were merged into it, on its device."""
    devices, origin = [str(pipe.device)], pipe.origin
    merged = [f"{source}:{weight}" for source, weight in loras.items()]
    if pipe.backend not in bundle.TARGETS:
        auto = pick(pipe.family, pipe.components)
        found = of_checkpoint({**origin, "lora": merged}, devices, auto)
    elif "model" in origin:
        found = of_bundle(Path(origin["model"]), devices, trust=origin["trust"], loras=merged)
    else:  # its engines are in another process
        return of_machine(devices)
    rows = (replace(row, why="this pipeline") if row.backend == pipe.backend else row for row in found.rows)
    return replace(found, rows=tuple(rows))


def of_model(model: str) -> Explanation:
    """What can run a model on this machine: a preset, a folder, a bundle, a hub id or a .safetensors file.

    Raises:
        InputError: there is no such model.
    """
    if bundle.is_bundle(model):
        return of_bundle(Path(model), devices())
    found = _find(model)
    here = devices()
    auto = _pick_unloaded(found.folder, here)
    return of_checkpoint({"model": model}, here, auto, broken=found.broken, note=found.note, thorough=True)


def devices() -> tuple[str, ...]:
    """The kinds of devices here, CUDA before the CPU; ROCm is CUDA to torch."""
    try:
        has_cuda = bool(import_module("torch").cuda.is_available())
    except Exception:  # it is absent or broken, which the rows say
        has_cuda = False
    return ("cuda", "cpu") if has_cuda or _no_gpu() is None else ("cpu",)


def _places(devices: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The backends, each on those of the devices that it supports; on its own if it supports none."""
    for backend, kinds in BACKENDS.items():
        supported = [device for device in devices if device.partition(":")[0] in kinds]
        yield from ((backend, device) for device in supported or kinds[:1])


def _absent(*libraries: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in libraries if find_spec(name) is None]


def _lacking(backend: str, device: str, reason: str | None, otherwise: str, commands: Sequence[str]) -> Row:
    """What does not run, for the machine's reason or another one; the commands come after what the machine needs."""
    wrong, right = _split(reason) if reason else (otherwise, "")
    if reason and not right.startswith("pip install"):
        return Row(backend, device, False, wrong, right)
    return Row(backend, device, False, wrong, " && ".join(dict.fromkeys(filter(None, (right, *commands)))))


def _export(arguments: Mapping[str, Any], target: str, device: str, output: str = "DIR") -> list[str]:
    """The commands that export a model: what it takes, if that is not installed, and the export."""
    extra = f"fastsd[{'cpu' if device == 'cpu' else 'gpu'}]"
    install = [f"pip install '{extra}'"] if _absent(*_READERS, *(() if target == "aoti" else _WRITERS)) else []
    model, flags = _flags(arguments)
    return [*install, shlex.join(["fastsd", "export", model, "--to", target, *flags, "-o", output])]


def _generate(arguments: Mapping[str, Any], backend: str) -> list[str]:
    """The command that runs the checkpoint itself."""
    model, flags = _flags(arguments)
    return [shlex.join(["fastsd", "generate", "PROMPT", "-m", model, "--backend", backend, *flags])]


def _flags(arguments: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The model, and the other arguments as the command line takes them."""
    flags = []
    for name, value in arguments.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            if name != "model" and one is not None:
                flags += [f"--{name}", str(one)]
    return str(arguments.get("model") or "MODEL"), flags


class _Found(NamedTuple):
    """A checkpoint: its folder if that is known without the network, why it cannot be had, and what is to be known."""

    folder: Path | None
    broken: str | None = None
    note: str = ""


def _find(model: str) -> _Found:
    """Look for a checkpoint without asking the network.

    Raises:
        InputError: there is no such model.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    from fastsd import checkpoint, presets

    path, (name, _, revision) = Path(model).expanduser(), model.partition("@")
    if model.lower().endswith(".safetensors"):
        existing(path)
        return _Found(None)
    preset = presets.find(model)
    repository = preset.hub if preset else name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
    if repository is None or (
        name not in presets.PRESETS and os.path.lexists(path)
    ):  # as `checkpoint.resolve` takes it
        folder = checkpoint.resolve(model)
        checkpoint.read_index(folder)
        return _Found(folder)
    if constants.HF_HUB_OFFLINE:
        try:
            return _Found(checkpoint.resolve(model))
        except InputError as error:
            return _Found(None, str(error))
    index = try_to_load_from_cache(repository, "model_index.json", revision=revision or None)
    if isinstance(index, str):
        return _Found(Path(index).parent)
    return _Found(None, note="its files are downloaded at the first use")


def _pick_unloaded(folder: Path | None, here: Sequence[str]) -> Pick:
    """What "auto" means for a checkpoint that is not loaded, on the first of the devices."""
    from fastsd import store

    if reason := problem("eager", here[0], thorough=True):
        return Pick("", f"nothing that is here runs a checkpoint ({_split(reason)[0]})")
    try:
        compiled = any(entry.fields.get("target") == "compile" for entry in store.entries())
    except InputError:  # there is no store that can be read
        compiled = False
    if not compiled:
        return Pick("eager", _UNCOMPILED)
    if folder is None:
        return Pick("", "compile, if it has compiled this architecture here before; else eager")
    from fastsd import checkpoint, families
    from fastsd.device import pick_device, pick_dtype

    device = pick_device(here[0])
    dtype = pick_dtype("auto", device)
    components = families.load(checkpoint.source(folder), dtype, device, only=())
    return pick(families.family(str(components.index["_class_name"])), components, dtype, device)
