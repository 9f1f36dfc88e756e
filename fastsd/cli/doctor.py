"""`fastsd doctor`: what this machine is, what is installed on it, and what can run here."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fastsd import __version__, explain, machine, store
from fastsd.errors import InputError
from fastsd.files import one_line

# Library -> distributions that bring it, and modules of which the first that is there shows by its import whether it
# works; none where that takes seconds and only exports and LoRAs need it.
LIBRARIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{name: ((name,), (name,)) for name in ("numpy", "tokenizers", "safetensors", "huggingface_hub")},
    **{name: ((name,), (name,)) for name in ("torch", "triton", "diffusers", "transformers")},
    **{name: ((name,), ()) for name in ("peft", "onnx", "onnxscript", "nncf")},
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), ("onnxruntime",)),
    "openvino": (("openvino",), ("openvino",)),
    "tensorrt": (
        ("tensorrt", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
        ("tensorrt", "tensorrt_bindings"),
    ),
    "tensorrt-rtx": (
        ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    ),
}


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Preset, folder, bundle, hub id or .safetensors file.")
    ] = None,
    online: Annotated[bool, typer.Option("--online", help="Ask the hub whether it can be reached.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Say what this machine is, what is installed, which backends can run (a model) here and what others need.

    Exits with 1 if none can.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    explanation = explain.of_machine(explain.devices(), thorough=True) if model is None else explain.of_model(model)
    document = {
        "fastsd": __version__,
        "python": platform.python_version(),
        "machine": _machine(),
        "libraries": [_library(name) for name in LIBRARIES],
        "torch": _torch(),
        "folders": [_folder(name, find) for name, find in FOLDERS.items()],
        "hub": _hub(online),
        "model": model,
        "backends": [asdict(row) for row in explanation.rows],
        "auto": explanation.auto._asdict(),
    }
    if as_json:
        print(json.dumps(document))
    else:
        print("\n".join([*_lines(document), "", "Backends" + (f" for {model}" if model else ""), str(explanation)]))
    if not any(row.runs for row in explanation.rows):
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    from fastsd.backends.base import threads

    found = machine.describe("cpu")
    facts = {name: found[name] for name in ("os", "arch", "cpu", "isa")}
    try:
        gpus: list[dict[str, Any]] = machine.all_of("cuda")
        reason = "" if gpus else "CUDA shows no GPU (CUDA_VISIBLE_DEVICES?)"
    except InputError as error:
        gpus, reason = [], str(error).partition(": ")[0]
    return {**facts, "threads": threads(), "memory_bytes": _memory(), "gpus": gpus, "no_gpu": reason}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def _library(name: str) -> dict[str, Any]:
    """Which distributions bring a library, in which version, and what is wrong with it."""
    distributions, modules = LIBRARIES[name]
    installed = {}
    for one in distributions:
        try:
            installed[one] = metadata.version(one)
        except metadata.PackageNotFoundError:
            continue
    problem = ""
    if name == "onnxruntime" and len(installed) > 1:
        problem = "onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall both, and install one again"
    try:
        if there := next((module for module in modules if find_spec(module) is not None), None):
            import_module(there)
    except Exception as error:  # whatever a broken library raises
        problem = f"does not load ({type(error).__name__}: {one_line(error)[:200]})"
    return {"name": name, "installed": installed, "problem": problem}


def _torch() -> dict[str, Any]:
    """What torch was built for and sees, and which device and dtype "auto" is; empty if it does not load."""
    try:
        import torch

        from fastsd.device import pick_device, pick_dtype
    except Exception:  # its line among the libraries says why
        return {}
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        why = f"the GPU has compute capability {major}.{minor}"
    else:
        fast = [name for name in ("avx512_bf16", "amx_bf16") if name in machine.describe("cpu")["isa"]]
        why = f"the CPU computes in it ({', '.join(fast)})" if fast else "the CPU has neither AVX512-BF16 nor AMX"
    return {
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "gpus": [
            {"name": torch.cuda.get_device_name(i), "memory_bytes": torch.cuda.get_device_properties(i).total_memory}
            for i in range(torch.cuda.device_count())
        ],
        "mps": torch.backends.mps.is_available(),
        "device": device.type,
        "dtype": dtype,
        "why_dtype": why,
    }


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _inductor_cache() -> Path:
    """As torch's inductor chooses it."""
    user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{user}"))


def _triton_cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


FOLDERS: Mapping[str, Callable[[], Path]] = {
    "engines": lambda: store.home(),
    "models of the hub": _hub_cache,
    "compiled by torch": _inductor_cache,
    "compiled by Triton": _triton_cache,
}


def _folder(name: str, find: Callable[[], Path]) -> dict[str, Any]:
    """How large a folder is, and whether it can be written or made; nothing is."""
    try:
        path = find()
        existing = next((one for one in (path, *path.parents) if os.path.exists(one)), Path("/"))
        return {
            "name": name,
            "path": str(path),
            "bytes": store.nbytes(path),
            "free_bytes": shutil.disk_usage(existing).free,
            "writable": os.access(existing, os.W_OK | os.X_OK),
            "problem": "",
        }
    except (InputError, OSError, RuntimeError, KeyError) as error:  # KeyError, RuntimeError: of a user without a name
        return {"name": name, "path": None, "problem": one_line(error)}


def _hub(online: bool) -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE
    facts = {"endpoint": constants.ENDPOINT, "offline": offline, "token": get_token() is not None}
    return {**facts, "answer": _answer(constants.ENDPOINT) if online and not offline else None}


def _answer(endpoint: str) -> str:
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    from fastsd.hub import transport_errors

    try:
        return f"HTTP {get_session().head(endpoint, timeout=10).status_code}"
    except transport_errors() as error:
        return f"no answer ({type(error).__name__})"


# ---------------------------------------------------------------------------------------------------------------------
# How it is told
# ---------------------------------------------------------------------------------------------------------------------


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    here, torch, hub = document["machine"], document["torch"], document["hub"]
    yield f"fastsd {document['fastsd']}, Python {document['python']} ({sys.executable}), {here['os']} {here['arch']}"
    memory = f", {_gigabytes(here['memory_bytes'])} of memory" if here["memory_bytes"] else ""
    yield f"CPU: {here['cpu']}, {here['threads']} threads{memory}; {' '.join(here['isa'])}"
    for gpu in here["gpus"]:
        yield (
            f"GPU: {gpu['gpu']}, compute capability {gpu['compute_capability']}; driver {gpu['driver']}, "
            f"CUDA {gpu['cuda']}"
        )
    if not here["gpus"]:
        yield f"GPU: {here['no_gpu']}"
    if torch:
        kind = next((f"{name} {torch[key]}" for key, name in (("cuda", "CUDA"), ("rocm", "ROCm")) if torch[key]), "CPU")
        sees = ", ".join(f"{one['name']} with {_gigabytes(one['memory_bytes'])}" for one in torch["gpus"]) or "no GPU"
        yield f"torch: built for {kind}, sees {sees}{', and MPS, which is not used' if torch['mps'] else ''}"
        yield f'"auto": the device {torch["device"]}, the dtype {torch["dtype"]}: {torch["why_dtype"]}'
    yield ""
    yield "Libraries"
    for one in document["libraries"]:
        versions = ", ".join(
            version if name == one["name"] else f"{version} ({name})" for name, version in one["installed"].items()
        )
        yield "; ".join(filter(None, (f"  {one['name']:<16} {versions or 'not installed'}", one["problem"])))
    yield ""
    yield "Folders"
    for one in document["folders"]:
        if one["problem"]:
            yield f"  {one['name']:<18} {one['problem']}"
            continue
        state = f"{_gigabytes(one['bytes'])}, {_gigabytes(one['free_bytes'])} free"
        yield f"  {one['name']:<18} {one['path']}: {state}{'' if one['writable'] else ', cannot be written'}"
    yield ""
    state = "offline (HF_HUB_OFFLINE)" if hub["offline"] else hub["answer"] or "not asked (--online does)"
    yield f"Hub: {hub['endpoint']}, {state}, {'with a' if hub['token'] else 'no'} token"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
