"""The backend that compiles the torch modules with TorchInductor.

Compiled are the repeated blocks of the denoiser and of the text encoders, and as a whole `prepare` and the VAE's
decoder. Blocks of one structure are one compilation, so that a model takes seconds where its whole graph takes minutes;
what lies between them runs as it is. `whole=True` compiles the denoiser as one graph instead.

Sizes are symbols: a region is compiled once for batch 1 and once for all others, whatever the image's height and width.
Weights are inputs, not constants: a LoRA that is merged into them needs no compiling, and neither does another
checkpoint of the same shapes. A graph that cannot be compiled whole, or would be compiled too often, is an error; the
uncompiled code never takes its place unseen.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastsd
from fastsd import autoencoder, machine, store
from fastsd.backends import Engines, eager
from fastsd.denoisers.layers import row_chunks
from fastsd.errors import InputError, MissingExtraError
from fastsd.families import Components
from fastsd.files import one_line
from fastsd.sampling import fused
from fastsd_kernels import cpu_attention, cpu_step

# The repeated blocks: class -> what is compiled of it. Not "forward" of ours: it slices what belongs to the block out
# of what all share, which would make each block a graph of its own.
REGIONS = {
    **dict.fromkeys(("ResnetBlock", "TransformerBlock", "JointBlock", "SingleBlock"), "body"),
    **dict.fromkeys(("CLIPEncoderLayer", "T5Block"), "forward"),
}
# Graphs of one region: for batch 1 and for more, and for layouts of memory. In float32 on a CPU torch chooses another
# convolution for maps of a batch of 1 with up to 20480 elements, so the decoder of a tiny VAE has one for many a size.
LIMIT = 16
OPTIONS: dict[str, Any] = {}  # of TorchInductor

Compiler = Callable[[Any, list[Any]], Callable[..., Any]]

_ARTIFACTS = "artifacts"  # name of the file

_counts = threading.local()


def engines(family: Any, components: Components, *, whole: bool = False, compiler: Compiler | None = None) -> Engines:
    """A checkpoint's modules, compiled at their first call for a batch of 1 and of more.

    Args:
        family: module of `fastsd.families`.
        components: on their device; they stay as they are, their weights are shared.
        whole: compile the denoiser as one graph, which takes longer and may run faster.
        compiler: in place of TorchInductor: (graph, example inputs) -> callable, as `torch.compile` takes.

    Raises:
        InputError: there is no C++ compiler, which the CPU needs.
        MissingExtraError: there is no Triton, which a GPU needs.
    """
    base = eager.engines(family, components)
    if reason := available(str(base.device)):
        raise (MissingExtraError if "pip install" in reason else InputError)(reason)
    if compiler is None:
        fields = _fields(family, components, whole)
        _load(fields)
        base = replace(base, keep=partial(_save, fields))
        if base.device.type == "cpu" and base.precision == torch.bfloat16 and cpu_attention.reason() is None:
            _native(cpu_attention)
    compiled, network = _compile(components, _Compiler(compiler or _inductor), whole)
    functions = eager.functions(family, compiled, decoder=network)
    if base.device.type == "cpu":  # on a GPU the sampler's step is in the captured graph
        functions = replace(functions, sample=fused.sampler(functions.denoise, _native(cpu_step)))
    return replace(base, target="compile", functions=functions, compilations=compilations)


def compilations() -> int:
    """Graphs that this thread has had compiled so far."""
    count: int = getattr(_counts, "value", 0)
    return count


def available(device: str = "cpu", target: str = "compile") -> str | None:
    """None if a checkpoint can be compiled for a device here; else why not, and what would make it possible."""
    if reason := eager.available(device):
        return reason
    if device == "cpu":
        compiler = os.environ.get("CXX", "g++")  # as TorchInductor looks for it
        if shutil.which(compiler) is None:
            return (
                f"there is no C++ compiler {compiler!r}, with which TorchInductor compiles for a CPU: apt install g++"
            )
        include = sysconfig.get_path("include")
        if not Path(include, "Python.h").is_file():
            return (
                f"Python's headers are missing ({include}/Python.h), which compiled code needs: apt install python3-dev"
            )
    elif importlib.util.find_spec("triton") is None:
        return "Triton is missing, with which TorchInductor compiles for a GPU: pip install triton"
    return None


def is_marked(
    family: Any, components: Components, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> bool:
    """Whether a warm-up has left what it compiled for this architecture, dtype, device and versions on this machine.

    Args:
        family: module of `fastsd.families`.
        components: their weights are not read, and may be on the meta device.
        dtype: in place of that of the weights.
        device: likewise.
    """
    try:
        fields = _fields(family, components, False, dtype, device)
        return (folder() / store.key(fields) / "entry.json").is_file()
    except (InputError, MissingExtraError, OSError):
        return False


def folder() -> Path:
    """Where compiled code is kept, one entry of the engine store for each architecture, dtype and device."""
    return store.home() / "engines"


# ---------------------------------------------------------------------------------------------------------------------
# Regions
# ---------------------------------------------------------------------------------------------------------------------


def _compile(components: Components, compiler: _Compiler, whole: bool) -> tuple[Components, Callable[[Tensor], Tensor]]:
    """The same components on the same weights, with compiled parts, and the VAE's decoder."""
    denoiser = _shell(components.denoiser)
    encoders = tuple(None if encoder is None else _shell(encoder) for encoder in components.text_encoders)
    for module in filter(None, (None if whole else denoiser, *encoders)):
        for block in module.modules():
            if name := REGIONS.get(type(block).__name__):
                setattr(block, name, _unheard(block, compiler.region(block, getattr(type(block), name))))
        module.forward = compiler.entry(module.forward)
    if whole:
        denoiser.forward = compiler.entry(compiler.region(denoiser, type(denoiser).forward))
    denoiser.prepare = compiler.entry(_by_rows(compiler.region(denoiser, type(denoiser).prepare, dynamic=True)))
    network = compiler.entry(compiler.region(components.vae, autoencoder.decoder))
    return replace(components, denoiser=denoiser, text_encoders=encoders), network


def _shell(module: Any) -> Any:
    """A copy of a module's structure on the same weights."""
    shell = copy.deepcopy(module, {id(one): one for one in (*module.parameters(), *module.buffers())})
    for mine, theirs in zip(shell.modules(), module.modules(), strict=True):
        if hasattr(theirs, "packed"):  # which a copy leaves behind
            mine.packed = theirs.packed
    return shell


def _unheard(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same without the hooks that `transformers` puts inside to record attentions: they cannot be compiled."""
    inside = [module for module in block.modules() if module is not block]

    def call(*given: Any, **options: Any) -> Any:
        for module in inside:
            module._forward_hooks.clear()
        return compiled(*given, **options)

    return call


def _by_rows(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`prepare` of any number of rows by one that always gets as many."""

    def call(timesteps: Tensor, *given: Any, **options: Any) -> Any:
        parts = [prepare(rows, *given, **options) for rows, _ in row_chunks(timesteps)]
        modulation = torch.cat([part.modulation for part in parts]) if len(parts) > 1 else parts[0].modulation
        return parts[0]._replace(modulation=modulation[: len(timesteps)])

    return call


class _Compiler:
    """What the compiled functions of a pipeline have in common."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._regions: dict[str, Callable[..., Any]] = {}
        self._lock = threading.RLock()
        self._known: set[Hashable] = set()
        self._thread = threading.local()

    def entry(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls regions. What comes in shapes that were not met yet may compile them, one at a time."""

        def call(*given: Any, **options: Any) -> Any:
            key = (id(function), _kind(given), _kind(tuple(options.items())))
            if key in self._known:
                with _refusing():
                    return function(*given, **options)
            with self._lock, self._tracing(), _refusing():
                result = function(*given, **options)
            self._known.add(key)
            return result

        return call

    def region(
        self, module: nn.Module, function: Callable[..., Any], dynamic: bool | None = None
    ) -> Callable[..., Any]:
        """`function(module, ...)`, compiled; modules of one structure share what is compiled.

        Args:
            module: whose weights the function reads.
            function: pure, of tensors.
            dynamic: whether all sizes and integers are symbols from the start; else those of `_mark`.
        """
        structure = f"{function.__qualname__} {module!r}"
        if structure not in self._regions:
            name = f"{type(module).__name__}_{hashlib.sha256(structure.encode()).hexdigest()[:8]}"
            self._regions[structure] = torch.compile(
                _own_code(function, name), fullgraph=True, dynamic=dynamic, backend=self._count
            )
        compiled = self._regions[structure]

        def call(*given: Any, **options: Any) -> Any:
            if getattr(self._thread, "traces", False):
                for one in (*given, *options.values()):
                    _mark(one)
            return compiled(module, *given, **options)

        return call

    def _count(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        _counts.value = compilations() + 1
        return self._compiler(graph, inputs)

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        from torch._dynamo import config

        symbols: Any = importlib.import_module("torch.fx.experimental._config")

        self._thread.traces = True
        try:
            # Sizes that are equal by chance, as of a square image, are no reason to compile for others again.
            with config.patch(recompile_limit=LIMIT), symbols.patch(use_duck_shape=False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*lru_cache.*")  # its constants are traced: as it should be
                yield
        finally:
            self._thread.traces = False


def _kind(value: Any) -> Hashable:
    """What compiled code depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_kind, value)) if isinstance(value, list | tuple) else value


def _mark(value: Any) -> None:
    """Let the sizes that differ between images be symbols: all but the channels."""
    if isinstance(value, Tensor):
        dims = (0, 2, 3) if value.ndim == 4 else range(value.ndim - 1)
        torch._dynamo.maybe_mark_dynamic(value, list(dims))


def _own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function with code of its own, by which `torch.compile` keeps what it compiled and counts.

    By the name of the code it remembers which sizes have differed: those of other blocks must not.
    """

    def region(*given: Any, **options: Any) -> Any:
        return function(*given, **options)

    return types.FunctionType(region.__code__.replace(co_name=name), region.__globals__, name, None, region.__closure__)


@contextmanager
def _refusing() -> Iterator[None]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise InputError(
            f"a block was compiled {LIMIT} times and would have to be once more ({_last_guard()}): warm the pipeline "
            "up for the sizes and batches that it gets, or use backend='eager'"
        ) from error
    except TorchDynamoException as error:
        raise InputError(f"this model cannot be compiled ({one_line(error)[:300]}): use backend='eager'") from error


def _last_guard() -> str:
    """Why the last compilation was asked for."""
    from torch._dynamo.utils import get_compilation_metrics

    reasons = [one.recompile_reason for one in get_compilation_metrics() if one.recompile_reason]
    return one_line(ValueError(reasons[-1])) if reasons else "no guard is known"


def _inductor(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    if cpu_attention.reason() is None:
        cpu_attention.substitute(graph)
    compiled: Any = compile_fx(graph, inputs, config_patches=OPTIONS)
    return cast(Callable[..., Any], compiled)


# ---------------------------------------------------------------------------------------------------------------------
# What was compiled, kept for the next process
# ---------------------------------------------------------------------------------------------------------------------


def _fields(
    family: Any,
    components: Components,
    whole: bool,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """All that compiled code depends on; not the weights."""
    weight = next(components.denoiser.parameters())
    configs = [dict(components.vae.config)]
    configs += [vars(encoder.config) for encoder in components.text_encoders if encoder is not None]
    # Not where a checkpoint came from and what wrote it.
    plain = [
        {name: value for name, value in one.items() if name[0] != "_" and not name.endswith("_version")}
        for one in configs
    ]
    return {
        "target": "compile",
        "component": family.__name__.rpartition(".")[2],
        "precision": str(dtype or weight.dtype).removeprefix("torch."),
        "profile": {},
        "whole": whole,
        "configs": hashlib.sha256(repr((components.denoiser.config, plain)).encode()).hexdigest(),
        "sources": _sources(),
        "exporter": fastsd.__version__,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "machine": machine.describe(str(device or weight.device)),
    }


@cache
def _sources() -> str:
    """Digest of the code that is compiled."""
    here = Path(fastsd.__file__).parent
    kernels = Path(cpu_attention.__file__).parent
    hashed = hashlib.sha256()
    for files in (
        here.glob("denoisers/*.py"),
        [here / "autoencoder.py", here / "ops.py", Path(__file__)],
        kernels.iterdir(),
    ):
        for path in sorted(files):
            if path.suffix in (".py", ".cpp"):
                hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _native(kernel: Any) -> Any:
    """What `load` gives of a kernel in C++, compiled once on this machine and signed like an engine.

    Raises:
        InputError: the compiler fails.
    """
    fields = {
        "target": "native",
        "component": kernel.__name__.rpartition(".")[2],
        "source": hashlib.sha256(kernel.SOURCE.read_bytes()).hexdigest(),
        "flags": list(kernel.FLAGS),
        "exporter": fastsd.__version__,
        "machine": machine.describe("cpu"),
    }

    def build(empty: Path) -> None:
        kernel.build(empty)

    try:
        try:
            return kernel.load(next(store.get(fields, build).glob("*.so")))
        except InputError:  # a store that cannot be written: what is loaded needs no file
            with tempfile.TemporaryDirectory() as folder:
                return kernel.load(kernel.build(Path(folder)))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{one_line(error)}: set CXX to a compiler that works, or use backend='eager'") from error


class _Absent(Exception):
    """Nothing that could be trusted is in the store."""


def _load(fields: Mapping[str, Any]) -> None:
    """Give TorchInductor what an earlier process compiled, if it was signed here; else it is compiled again."""
    if not (folder() / store.key(fields) / "entry.json").is_file():
        return

    def absent(_: Path) -> None:
        raise _Absent

    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        found = store.get(fields, absent)  # reads and checks every byte
        torch.compiler.load_cache_artifacts((found / _ARTIFACTS).read_bytes())
        for library in found.glob("*/*.so"):
            target = Path(cache_dir()) / library.relative_to(found)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                store.write_atomically(target, library.read_bytes(), mode=0o755)
    except (_Absent, InputError, OSError):
        return


def _save(fields: Mapping[str, Any]) -> None:
    """Keep what this process compiled; a store that cannot be written costs the next one its time, no more."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return
    # The kernels of a CPU are libraries, which torch's artifacts name by their source, but do not hold.
    libraries = [Path(key[1:3], f"{key}.main.so") for key in CppPythonBindingsCodeCache.cache]

    def write(empty: Path) -> None:
        (empty / _ARTIFACTS).write_bytes(saved[0])
        for library in libraries:
            if (compiled := cache_dir() / library).is_file():
                (empty / library).parent.mkdir(exist_ok=True)
                shutil.copyfile(compiled, empty / library)

    try:
        if (folder() / (key := store.key(fields))).is_dir():
            store.remove([key])
        store.get(fields, write)
    except (InputError, OSError) as error:
        warnings.warn(f"what was compiled is not kept: {one_line(error)}", stacklevel=3)
