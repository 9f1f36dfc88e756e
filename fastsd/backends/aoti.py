"""AOTInductor packages (.pt2): compiled by `fastsd export`, run by torch alone, with weights that lie beside them.

A package is code without weights. Those are in safetensors files, one for each component of the checkpoint, under the
names of its parameters; the engines of a component read the same tensors in memory. What a LoRA changes there is what
the next call computes with.

A call holds the interpreter's lock while it runs, as torch's bindings do not release it: on the CPU, where that is as
long as the computation, other Python threads wait.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastsd import machine, tensors
from fastsd.backends import base
from fastsd.bundle import Engine
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import few, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

Run = Callable[..., tuple[Any, ...]]

MODEL = "model"  # what torch calls the only model of a package
ROOT = "component."  # before the names of parameters, as the traced module holds the component under this name
WEIGHTS = ".safetensors"
# What an export writes into a package: torch's version, and the machine as `machine.describe` has it, in JSON.
TORCH, MACHINE = "FASTSD_TORCH", "FASTSD_MACHINE"
_SAME = {"os": "", "arch": "", "compute_capability": "compute capability "}  # facts of the machine, and their names

# torch reads the metadata of packages into a variable that all threads share.
_OPENING = threading.Lock()


def load(path: Path, engine: Engine, *, device: str, shared: dict[str, Any]) -> Run:
    """Load an engine; nothing is compiled.

    Args:
        path: the .pt2 file.
        engine: what the manifest says of it. Of its files those that end in .safetensors hold its constants, and one
            that ends in .so our attention on a CPU. Of its options "weights" is that file which holds the weights of
            its component; "channels_last", whether those with four axes are stored as [out, height, width, in]; and
            "tied" has the names of weights that are stored under another name.
        device: "cpu", "cuda" or "cuda:1".
        shared: what the engines of a pipeline share, here their weights (`weights`).

    Returns:
        The engine as a function of torch tensors by name, on its device. The results are the caller's own. Any thread
        may call it, and calls take turns. On CUDA it works on the caller's current stream, and a graph can capture it.

    Raises:
        InputError: the file is no such engine, was compiled by another torch or for another machine, or lacks weights.
        MissingExtraError: torch is not installed.
    """
    if reason := available(device, engine.target):
        raise (InputError if _has_torch() else MissingExtraError)(reason)
    import torch

    place = torch.device(device)
    on_cuda = place.type == "cuda"
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    _refuse_foreign(path, device)
    folder = path.parents[len(PurePosixPath(engine.path).parts) - 1]
    try:
        for kernel in (file for file in engine.files if file.endswith(".so")):
            from fastsd_kernels import cpu_attention

            cpu_attention.load(folder / kernel)
        with _OPENING:
            # With more than one thread allowed a call on CUDA would wait for the one before, which no graph can hold.
            package = loader(str(path), MODEL, on_cuda, 1, (place.index or 0) if on_cuda else -1)
        constants = _constants(package.get_constant_fqns(), folder, engine, device, shared)
        # It reads them where they are, so they must stay; and it would crash if one were missing.
        package.load_constants(constants, False, True, True)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"torch {torch.__version__} does not load {str(path)!r} ({one_line(error)}): export it again"
        ) from error
    return _Package(engine, place, package, constants)


class _Package:
    def __init__(self, engine: Engine, place: Any, package: Any, constants: Mapping[str, Tensor]) -> None:
        self._engine, self._place, self._package, self._constants = engine, place, package, constants
        self._lock = threading.Lock()

    def __call__(self, **arrays: Tensor) -> tuple[Tensor, ...]:
        base.check(self._engine, arrays)
        inputs = []
        for spec in self._engine.inputs:
            tensor = arrays[spec.name]
            if tensor.device.type != self._place.type:
                where = f"{spec.name} of the {self._engine.component} engine is on {tensor.device}"
                raise InputError(f"{where}: move it to {self._place}")
            # It reads any other layout as if it were this one.
            inputs.append(tensor.contiguous())
        with self._lock:
            return tuple(self._package.boxed_run(inputs))


def available(device: str = "cpu", target: str = "aoti") -> str | None:
    """None if packages run on a device here; else the sentence why not, and what would make it possible."""
    kind = "cuda" if device.startswith("cuda:") else device
    if kind not in ("cpu", "cuda"):
        return f"AOTInductor packages run here on 'cpu' and 'cuda', not on {device!r}: use one of these"
    if not _has_torch():
        return f"torch is not installed: pip install 'fastsd[{'cpu' if kind == 'cpu' else 'gpu'}]'"
    if kind == "cpu":
        return None
    try:
        machine.describe(device)  # first, as torch takes a second to import
    except InputError as error:
        return str(error)
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU: use device='cpu'"
    return None


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _refuse_foreign(path: Path, device: str) -> None:
    """Refuse, before any code of it is loaded, a package that another torch made, or one for another machine."""
    import torch

    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        with _OPENING:
            found = loader.load_metadata_from_package(str(path), MODEL)
        version, there = found[TORCH], json.loads(found[MACHINE])
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{str(path)!r} is no package of fastsd's ({one_line(error)}): export it again") from error
    if version != str(torch.__version__):
        raise InputError(
            f"{str(path)!r} was compiled by torch {version}, and this is torch {torch.__version__}: export it again, "
            "or install that version"
        )
    here = machine.describe(device)
    if there["device"] != here["device"]:
        raise InputError(f"{str(path)!r} was compiled for {there['device']!r}, not for {device!r}: export it for this")
    for fact, name in _SAME.items():
        if there.get(fact) != here.get(fact):
            raise InputError(
                f"{str(path)!r} was compiled for {name}{there.get(fact)}, and this is {name}{here.get(fact)}: "
                "export it on this machine"
            )
    if lacking := set(there.get("isa", ())) - set(here.get("isa", ())):
        raise InputError(
            f"{str(path)!r} was compiled for a CPU with {few(sorted(lacking))}, which this one has not: export it on "
            "this machine"
        )


def _constants(
    names: Sequence[str], folder: Path, engine: Engine, device: str, shared: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a package's constants, out of the engine's files."""
    stored: dict[str, Tensor] = {}
    for file in engine.files:
        if file.endswith(WEIGHTS):
            stored.update(weights(folder / file, engine, device, shared).named_parameters())
    tied = engine.options.get("tied", {})
    own = {name: name.removeprefix(ROOT) for name in names}
    places = {name: tied.get(plain, plain) for name, plain in own.items()}
    if missing := {place for place in places.values() if place not in stored}:
        raise InputError(
            f"the {engine.component} engine needs {few(sorted(missing))}, which its weights lack: export it again"
        )
    return {name: stored[place] for name, place in places.items()}


def weights(path: Path, engine: Engine, device: str, shared: dict[str, Any]) -> nn.Module:
    """The tensors of one of an engine's files as the parameters of a bare module, read once for all engines.

    On the CPU they are views of the mapped file, which stays as it is when they are written to.

    Raises:
        InputError: the file is no safetensors file, or cannot be read.
    """
    held, lock = shared.setdefault("aoti", ({}, threading.Lock()))
    with lock:
        if path not in held:
            is_main = path.as_posix().endswith(str(engine.options.get("weights")))
            held[path] = _as_module(path, device, is_main and bool(engine.options.get("channels_last")))
        module: nn.Module = held[path]
        return module


def _as_module(path: Path, device: str, channels_last: bool) -> nn.Module:
    from torch import nn

    root = nn.Module()
    for name, tensor in tensors.read_tensors(tensors.read_header(path)):
        module = root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        if channels_last and tensor.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2)
        module.register_parameter(last, nn.Parameter(tensor.to(device), requires_grad=False))
    return root
