"""TensorRT and TensorRT for RTX: plans that `fastsd_export.tensorrt` built, run on torch's CUDA tensors.

One stream and one block of device memory serve all engines of a pipeline, which run one after another. Each combination
of input shapes has an execution context of its own with fixed buffers, so that its launches can be captured in a CUDA
graph, which is valid for one context, its shapes and its addresses.
"""

from __future__ import annotations

import importlib
import math
import mmap
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from weakref import WeakSet

from fastsd import integrity, store
from fastsd.backends import base
from fastsd.bundle import Engine
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import few, one_line

if TYPE_CHECKING:
    import tensorrt as trt
    import torch
    from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]  # of the inputs, in the engine's order


class Flavour(NamedTuple):
    """What sets the two libraries apart where engines run."""

    title: str
    modules: tuple[str, ...]  # to import, the first that is installed
    oldest: int  # major version
    graphs: bool  # it captures its launches itself: a capture of ours would freeze kernels that it specialises later
    cache: bool  # kernels are compiled where they run, and kept in a cache


FLAVOURS = {  # by target; a wheel without its front package has only the second module
    "tensorrt": Flavour("TensorRT", ("tensorrt", "tensorrt_bindings"), 11, graphs=False, cache=False),
    "tensorrt-rtx": Flavour("TensorRT for RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"), 1, graphs=True, cache=True),
}

# Those of the engines' inputs, outputs and weights; the library's own `nptype` knows no bfloat16.
DTYPES = {
    **{"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"},
    **{"INT8": "int8", "UINT8": "uint8", "BOOL": "bool"},
}

# Which weights a plan holds and takes, by the option `refit`.
STRIPPED = ("strip", "identical")  # it holds none
OPEN = ("refit", "strip")  # it takes any; "identical" only those that it was built with

_SHAPES = 8  # combinations of shapes that one engine keeps ready
_RESERVE = 256 * 2**20  # bytes that a budget for streamed weights leaves to torch and the driver


def library(target: str) -> ModuleType:
    """The Python module of a target, imported.

    Raises:
        MissingExtraError: it is not installed, or its shared libraries are not.
        InputError: it is too old.
    """
    flavour = FLAVOURS[target]
    reasons = []
    for name in flavour.modules:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError, FileNotFoundError on Windows: a library cannot be loaded
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                reasons.append(f" ({one_line(error)})")
            continue
        version: str = getattr(module, "__version__", "")
        major = version.partition(".")[0]
        if not major.isdigit() or int(major) < flavour.oldest:
            raise InputError(
                f"{flavour.title} {version or 'of unknown version'} is too old: install {flavour.oldest} or later"
            )
        return module
    raise MissingExtraError(
        f"{flavour.title} is not installed or does not load{''.join(reasons)}: pip install 'fastsd[{target}]'"
    )


def available(device: str = "cuda", target: str = "tensorrt") -> str | None:
    """None if engines of a target can run on a device; else the sentence why not, and what would make it possible."""
    title = FLAVOURS[target].title
    if device.partition(":")[0] != "cuda":
        return f"{title} runs on NVIDIA GPUs only, not on {device!r}: use device='cuda'"
    try:
        library(target)
        import torch
    except (InputError, MissingExtraError) as error:
        return str(error)
    except ImportError:
        return f"{title} shares torch's CUDA memory, and torch is not installed: pip install 'fastsd[torch]'"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU: {title} needs one and a torch that was built for CUDA"
    return None


class Log:
    """What a library said; it reports failures by returning None or False, and the reason only here."""

    def __init__(self, trt: ModuleType, target: str) -> None:
        self.name = f"{FLAVOURS[target].title} {trt.__version__}"
        self.messages: deque[tuple[int, str]] = deque(maxlen=64)
        messages = self.messages

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity <= trt.ILogger.Severity.WARNING:
                    messages.append((int(severity), one_line(Exception(msg))))

        self._errors = int(trt.ILogger.Severity.ERROR)
        self.logger = Logger()

    def take(self) -> tuple[list[str], list[str]]:
        """The errors and the warnings since the last time, each once."""
        messages = [self.messages.popleft() for _ in range(len(self.messages))]
        wrong = dict.fromkeys(text for severity, text in messages if severity <= self._errors)
        rest = dict.fromkeys(text for severity, text in messages if severity > self._errors)
        return list(wrong), list(rest)

    def said(self) -> str:
        """The errors since the last time, or the warnings if there were none; in brackets, for a sentence."""
        wrong, rest = self.take()
        return f" ({few(wrong or rest, 3)})" if wrong or rest else ""

    def refuse(self, what: str, remedy: str) -> NoReturn:
        """Raise an `InputError` of what failed, what the library said of it, and the remedy."""
        raise InputError(f"{what}{self.said()}: {remedy}")


def deserialize(trt: ModuleType, log: Log, path: Path, *, host_code: bool) -> tuple[trt.ICudaEngine, trt.Runtime]:
    """The engine of a plan file on the current CUDA device, and its runtime, which must outlive it.

    `host_code` allows what a version-compatible plan brings: code for the CPU.
    """
    again = "build it again on this machine"
    try:
        runtime = trt.Runtime(log.logger)
    except TypeError:  # the bindings' way to say that the library gave none
        log.refuse(f"{log.name} does not start", "see which driver and version of CUDA it needs")
    if host_code:
        runtime.engine_host_code_allowed = True
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise InputError(f"cannot read the plan {str(path)!r} ({one_line(error)}): {again}") from error
    if engine is None:
        log.refuse(f"the plan {str(path)!r} does not load in {log.name}", again)
    return engine, runtime


def refitter(trt: ModuleType, log: Log, engine: trt.ICudaEngine) -> trt.Refitter:
    """What sets an engine's weights; `InputError` if it takes none."""
    if not engine.refittable:
        raise InputError("this engine was not built to take other weights: build it with refit='refit' or 'strip'")
    try:
        return trt.Refitter(engine, log.logger)
    except TypeError:
        log.refuse(f"{log.name} gave no refitter", "build the engine again with these weights")


def set_weights(
    trt: ModuleType, log: Log, refitter: trt.Refitter, weights: Mapping[str, Any], names: Collection[str] | None = None
) -> list[Any]:
    """Hand over weights by the names of their initialisers; `refitter.refit_cuda_engine()` then takes them.

    Args:
        trt: the library.
        log: the refitter's.
        refitter: of the engine.
        weights: host arrays in the dtype of the graph; numpy's (bfloat16 of ml_dtypes) or torch's. What an engine has
            combined it takes only whole, so all initialisers should be here; only those needed are read.
        names: those that changed; None: all of `weights`. What is not named and not combined with them stays.

    Returns:
        The arrays, to be kept until the refit is done.

    Raises:
        InputError: a name is none of the engine's, a weight is absent, or of another size or dtype.
    """
    wanted = list(weights if names is None else names)
    if strange := sorted(set(wanted) - set(refitter.get_all_weights())):
        raise InputError(
            f"the engine has no weights {few(strange)} that can be replaced: build it again with the new weights"
        )
    kept = []
    while wanted:
        if absent := [name for name in wanted if name not in weights]:
            raise InputError(f"the weights {few(absent)} are needed too, and not given: give all of the component's")
        for name in wanted:
            array, pointer, dtype = _host(weights[name])
            kept.append(array)
            prototype = refitter.get_weights_prototype(name)
            if (DTYPES.get(prototype.dtype.name), prototype.size) != (dtype, math.prod(array.shape)):
                raise InputError(
                    f"the weights {name!r} are {math.prod(array.shape)} numbers of {dtype}, and the engine takes "
                    f"{prototype.size} of {DTYPES.get(prototype.dtype.name)}: give those of its own graph"
                )
            if not refitter.set_named_weights(name, trt.Weights(prototype.dtype, pointer, prototype.size)):
                log.refuse(f"the engine does not take the weights {name!r}", "build it again with the new weights")
        wanted = [name for name in refitter.get_missing_weights() if name not in wanted]
    return kept


def _host(array: Any) -> tuple[Any, int, str]:
    """A contiguous array, its address and the name of its dtype."""
    if hasattr(array, "data_ptr"):
        array = array.detach().contiguous()
        if array.device.type != "cpu":
            array = array.cpu()
        return array, array.data_ptr(), str(array.dtype).removeprefix("torch.")
    import numpy as np

    array = np.ascontiguousarray(array)
    return array, array.ctypes.data, array.dtype.name


def set_weights_from_onnx(trt: ModuleType, log: Log, refitter: trt.Refitter, path: Path) -> None:
    """Hand over all weights of an ONNX file, and of the file beside it that holds its data; an `InputError` on failure.

    `refitter.refit_cuda_engine()` then takes them.
    """
    try:
        parser = trt.OnnxParserRefitter(refitter, log.logger)
    except TypeError:
        log.refuse(f"{log.name} gave no parser", "install it anew")
    if not parser.refit_from_file(str(path)):
        log.refuse(
            f"the weights of {str(path)!r} do not fit the engine{errors(parser)}", "give the graph it was built from"
        )


def apply_weights(log: Log, refitter: trt.Refitter) -> None:
    """Put the weights that were handed over into the engine, which must not be running; `InputError` on failure."""
    if not refitter.refit_cuda_engine():
        missing = refitter.get_missing_weights()
        reason = f", which lacks {few(missing)}" if missing else ""
        log.refuse(f"the weights could not be put into the engine{reason}", "build it again with them")


def errors(parser: trt.OnnxParser | trt.OnnxParserRefitter) -> str:
    """All that a parser complains of, with the nodes' names; empty or led by a colon, for a sentence."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
        found.append(f"{node or 'the file'}: {one_line(Exception(error.desc()))}")
    return f": {few(dict.fromkeys(found), 20)}" if found else ""


@dataclass(eq=False)
class _Bound:
    """An execution context with its shapes and buffers, and the graph of its launches once it is captured."""

    context: trt.IExecutionContext
    inputs: list[Tensor]
    outputs: list[Tensor]
    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None


@dataclass(eq=False)
class Arena:
    """Device memory for the activations of all engines of a pipeline; it grows to what the largest needs.

    They run one after another: on one stream, and enqueued under one lock.
    """

    device: torch.device
    stream: torch.cuda.Stream
    need: int = 1  # bytes
    memory: Tensor | None = None
    bound: WeakSet[_Bound] = field(default_factory=WeakSet)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fit(self) -> None:
        """Allocate what is needed, if it is not there; contexts get the new address, and their graphs are dropped."""
        import torch

        if self.memory is not None and self.memory.numel() >= self.need:
            return
        self.stream.synchronize()
        for bound in self.bound:
            bound.graph = None
        self.memory = None  # freed first: two blocks may not fit
        try:
            with torch.cuda.stream(self.stream):
                self.memory = torch.empty(self.need, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{self.need} bytes of GPU memory are needed for activations and not free: use a smaller image or "
                "batch, or engines with a narrower profile"
            ) from error
        for bound in self.bound:
            bound.context.set_device_memory(self.memory.data_ptr(), self.memory.numel())


def load(path: Path, engine: Engine, *, device: str, shared: dict[str, Any]) -> Loaded:
    """Load a plan; the file must have been checked, for it holds native code.

    Args:
        path: the plan.
        engine: its entry in the manifest. Options read: `refit`, `version_compatible`, `weight_streaming`,
            `weight_streaming_budget` (bytes of weights to keep on the GPU; absent: as many as fit), and `weights`, the
            name of the ONNX file beside a stripped plan.
        device: "cuda" or "cuda:1".
        shared: of the pipeline. "stream", a CUDA stream that is not the default one, and "arena" are made if absent;
            "cache", a folder or None, is where TensorRT for RTX keeps the kernels that it compiles.

    Raises:
        InputError: it cannot run here, or it is not what the manifest says.
        MissingExtraError: the library is not installed.
    """
    trt = library(engine.target)
    if reason := available(device, engine.target):
        raise InputError(reason)
    import torch

    place = torch.device(device)
    if place.index is None and place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    if "arena" not in shared:
        stream = shared.setdefault("stream", torch.cuda.Stream(place))
        shared["arena"] = Arena(place, stream)
    with shared["arena"].lock, torch.cuda.device(place):
        return Loaded(trt, path, engine, shared)


def _beside(path: Path, engine: Engine, weights: str) -> Path:
    """The ONNX file with an engine's weights; `InputError` unless it and the files that it names are the engine's."""
    if engine.files:
        inside, listed = PurePosixPath(engine.path), set(engine.files)
    else:  # it was just built, and is in no bundle yet
        inside, listed = PurePosixPath(path.name), {one.name for one in path.parent.iterdir()}
    name = (inside.parent / weights).as_posix()
    if name not in listed:
        raise InputError(f"the weights {weights!r} are not among the files of the {engine.component} engine: refused")
    folder = path.parents[len(inside.parts) - 1]
    integrity.check_external(folder / name, folder, listed)
    return folder / name


class Loaded:
    """An engine in GPU memory: a function of CUDA tensors by name, whose results are new tensors.

    Two threads may call it. What they pass, and get, is ordered on their own current streams.
    """

    def __init__(self, trt: ModuleType, path: Path, engine: Engine, shared: dict[str, Any]) -> None:
        self._trt, self._engine, self._shared = trt, engine, shared
        self._arena: Arena = shared["arena"]
        self._log = Log(trt, engine.target)
        self._flavour = FLAVOURS[engine.target]
        self._bound: OrderedDict[Shapes, _Bound] = OrderedDict()
        self._streams_weights = bool(engine.options.get("weight_streaming"))
        # Launches with streamed weights wait for copies from the host, which no graph can hold.
        self._captures = not self._flavour.graphs and not self._streams_weights
        self._plan, self._runtime = deserialize(
            trt, self._log, path, host_code=bool(engine.options.get("version_compatible"))
        )
        self._check_tensors(path)
        self._unfit: str | None = None  # why it cannot be called
        if engine.options.get("refit") in STRIPPED:
            self._unfit = "holds no weights: refit it first"
            if weights := engine.options.get("weights"):
                self.refit_from_onnx(_beside(path, engine, str(weights)))
        if self._streams_weights:
            self._set_budget()
        self._arena.need = max(self._arena.need, self._plan.device_memory_size_v2)
        self._cache = self._runtime_cache() if self._flavour.cache else None

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it.

        Args:
            **inputs: the engine's inputs by name, in the dtypes of the manifest; from the host they are copied.

        Returns:
            The outputs in the order of the manifest.

        Raises:
            InputError: names, shapes or dtypes are not the engine's, or it failed to run.
        """
        import torch

        base.check(self._engine, inputs)
        tensors = [inputs[spec.name] for spec in self._engine.inputs]
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        arena = self._arena
        with arena.lock, torch.cuda.device(arena.device), torch.inference_mode():
            if self._unfit:
                raise InputError(f"the {self._engine.component} engine {self._unfit}")
            bound = self._bind(shapes)
            arena.fit()
            # The results belong to the caller's stream, which waits for ours before it or its next call uses them,
            # and before memory of the inputs can be given to anything else there.
            results = tuple(torch.empty_like(buffer) for buffer in bound.outputs)
            caller = torch.cuda.current_stream(arena.device)
            arena.stream.wait_stream(caller)
            with torch.cuda.stream(arena.stream):
                # Copies, as a graph is of fixed addresses: 51 MB for the text of SDXL, 0.03 ms of HBM3's bandwidth.
                for buffer, tensor in zip(bound.inputs, tensors, strict=True):
                    buffer.copy_(tensor)
                self._run(bound)
                for result, buffer in zip(results, bound.outputs, strict=True):
                    result.copy_(buffer)
            caller.wait_stream(arena.stream)
        return results

    def refit(self, weights: Mapping[str, Any], names: Collection[str] | None = None) -> None:
        """Replace weights by the names of their initialisers, as `set_weights` takes them; running calls end first.

        Raises:
            InputError: the engine takes no weights, or not these. Where it says that they could not be put into the
                engine, some were: until a later refit succeeds it cannot be called.
        """
        if self._engine.options.get("refit") not in OPEN:
            raise InputError(
                f"this {self._engine.component} engine takes no other weights: build it with refit='refit' or 'strip'"
            )
        import torch

        with self._arena.lock, torch.cuda.device(self._arena.device):
            worker = refitter(self._trt, self._log, self._plan)
            kept = set_weights(self._trt, self._log, worker, weights, names)
            self._apply(worker)
            del kept

    def refit_from_onnx(self, path: Path) -> None:
        """Give it all weights of an ONNX file: of the graph it was built from, or of the same graph with others."""
        import torch

        with self._arena.lock, torch.cuda.device(self._arena.device):
            worker = refitter(self._trt, self._log, self._plan)
            set_weights_from_onnx(self._trt, self._log, worker, path)
            self._apply(worker)

    def _apply(self, worker: trt.Refitter) -> None:
        self._arena.stream.synchronize()  # a refit must not meet a running launch
        for bound in self._bound.values():
            bound.graph = None
        self._unfit = "was refitted only in part: load it again"
        apply_weights(self._log, worker)
        self._unfit = None

    def _check_tensors(self, path: Path) -> None:
        """Refuse a plan whose inputs and outputs are not those of the manifest."""
        trt, plan = self._trt, self._plan
        modes = {trt.TensorIOMode.INPUT: self._engine.inputs, trt.TensorIOMode.OUTPUT: self._engine.outputs}
        names = [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]
        for mode, specs in modes.items():
            found = {
                name: DTYPES.get(plan.get_tensor_dtype(name).name)
                for name in names
                if plan.get_tensor_mode(name) == mode
            }
            if found != {spec.name: spec.dtype for spec in specs}:
                raise InputError(
                    f"the plan {str(path)!r} has {few(f'{name} ({dtype})' for name, dtype in found.items())} where its "
                    f"manifest has {few(f'{spec.name} ({spec.dtype})' for spec in specs)}: build it again"
                )
        if host := [name for name in names if plan.get_tensor_location(name) != trt.TensorLocation.DEVICE]:
            raise InputError(f"the plan {str(path)!r} wants {few(host)} in host memory: build it again with fastsd")

    def _set_budget(self) -> None:
        """Keep as many of the weights on the GPU as fit, or as many as the manifest says."""
        import torch

        plan = self._plan
        budget = self._engine.options.get("weight_streaming_budget")
        if budget is None:
            plan.weight_streaming_budget_v2 = 0  # for the sizes with streaming, which are the larger ones
            free, _ = torch.cuda.mem_get_info(self._arena.device)
            memory = self._arena.memory
            held = memory.numel() if memory is not None else 0
            activations = max(plan.device_memory_size_v2, self._arena.need) - held
            budget = streaming_budget(free, plan.streamable_weights_size, activations)
        # The library computes one too, but its Python bindings cut that to 32 bits.
        budget = min(int(budget), plan.streamable_weights_size)
        plan.weight_streaming_budget_v2 = budget
        if plan.weight_streaming_budget_v2 != budget:  # the setter's own result is lost in Python
            self._log.refuse(f"a budget of {budget} bytes for weights was not taken", "choose another one")

    def _bind(self, shapes: Shapes) -> _Bound:
        """The context of these shapes, made at their first call; of many shapes the last are kept."""
        if shapes in self._bound:
            self._bound.move_to_end(shapes)
            return self._bound[shapes]
        import torch

        self._arena.fit()
        assert self._arena.memory is not None
        trt, plan, log = self._trt, self._plan, self._log
        what = f"the {self._engine.component} engine"
        profile = self._profile(shapes)
        # A context for each combination of shapes: a captured graph is undefined once its context has changed.
        config = self._configuration()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._cache is not None and not config.set_runtime_cache(self._cache):
            log.refuse(f"{what} takes no kernel cache", "load it again without one")
        if self._flavour.graphs and not self._streams_weights:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = plan.create_execution_context(runtime_config=config)
        if context is None:
            log.refuse(f"{what} gave no execution context", "free memory of the GPU and load it again")
        context.set_device_memory(self._arena.memory.data_ptr(), self._arena.memory.numel())
        if not context.set_optimization_profile_async(profile, self._arena.stream.cuda_stream):
            log.refuse(f"{what} did not take its profile {profile}", "build it again on this machine")
        inputs, outputs = self._engine.inputs, self._engine.outputs
        for spec, shape in zip(inputs, shapes, strict=True):
            if not context.set_input_shape(spec.name, shape):
                log.refuse(f"{what} did not take {spec.name} of shape {list(shape)}", "build it for this shape")
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:
            log.refuse(f"{what} cannot work with these shapes ({one_line(error)})", "build it for them")
        if unknown:
            log.refuse(f"{what} cannot tell its shapes without {few(unknown)}", "build it again with fastsd")
        sizes = [*shapes, *(tuple(context.get_tensor_shape(spec.name)) for spec in outputs)]
        if any(size < 0 for shape in sizes for size in shape):
            log.refuse(f"{what} has outputs of shapes that depend on data", "build it again with fastsd")
        with torch.cuda.stream(self._arena.stream):
            buffers = [
                torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=self._arena.device)
                for spec, shape in zip((*inputs, *outputs), sizes, strict=True)
            ]
        for spec, buffer in zip((*inputs, *outputs), buffers, strict=True):
            if not context.set_tensor_address(spec.name, buffer.data_ptr()):
                log.refuse(f"{what} did not take the address of {spec.name}", "load it again")
        if len(self._bound) >= _SHAPES:
            self._arena.stream.synchronize()
            self._bound.popitem(last=False)
        bound = self._bound[shapes] = _Bound(context, buffers[: len(inputs)], buffers[len(inputs) :])
        self._arena.bound.add(bound)
        return bound

    def _configuration(self) -> trt.IRuntimeConfig:
        config = self._plan.create_runtime_config()
        if config is None:
            self._log.refuse(f"the {self._engine.component} engine gave no runtime configuration", "load it again")
        return config

    def _profile(self, shapes: Shapes) -> int:
        """The tightest of the plan's profiles that holds these shapes."""
        held = {}
        for index in range(self._plan.num_optimization_profiles):
            limits = [self._plan.get_tensor_profile_shape(spec.name, index) for spec in self._engine.inputs]
            if all(
                least <= size <= most
                for shape, (low, _, high) in zip(shapes, limits, strict=True)
                for size, least, most in zip(shape, low, high, strict=True)
            ):
                held[index] = sum(math.prod(high) for _, _, high in limits)
        if not held:
            given = ", ".join(
                f"{spec.name} {list(shape)}" for spec, shape in zip(self._engine.inputs, shapes, strict=True)
            )
            raise InputError(
                f"no profile of the {self._engine.component} engine holds {given}: export one for this size"
            )
        return min(held, key=lambda index: held[index])

    def _run(self, bound: _Bound) -> None:
        """Enqueue; the first call as it is, as it does work that no graph may hold, the second captures a graph."""
        bound.calls += 1
        if bound.graph is None and self._captures and bound.calls > 1:
            bound.graph = self._capture(bound)
        if bound.graph is not None:
            bound.graph.replay()
            return
        self._enqueue(bound)
        if self._cache is not None and bound.calls == 2:  # by now the kernels for these shapes are compiled
            self._save_cache()

    def _enqueue(self, bound: _Bound) -> None:
        if not bound.context.execute_async_v3(self._arena.stream.cuda_stream):
            self._log.refuse(
                f"the {self._engine.component} engine failed to run", "build it again on this machine with fastsd"
            )

    def _capture(self, bound: _Bound) -> torch.cuda.CUDAGraph | None:
        """The launches as a graph; None, with a warning, if they cannot be captured, and they are not tried again."""
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, stream=self._arena.stream, capture_error_mode="thread_local"):
                self._enqueue(bound)
        except (InputError, RuntimeError) as error:
            self._captures = False
            warnings.warn(
                f"the {self._engine.component} engine runs without a CUDA graph, and slower: {one_line(error)}",
                stacklevel=4,
            )
            return None
        return graph

    def _runtime_cache(self) -> Any:
        """The pipeline's cache of compiled kernels, filled from its file; of no effect where the file is another's."""
        if "runtime_cache" not in self._shared:
            cache = self._configuration().create_runtime_cache()
            if cache is None:
                self._log.refuse(f"{self._log.name} gave no kernel cache", "load the engine again")
            path = self._cache_file()
            if path is not None and path.is_file():
                cache.deserialize(path.read_bytes())
            self._shared["runtime_cache"] = cache
        return self._shared["runtime_cache"]

    def _cache_file(self) -> Path | None:
        import torch

        folder = self._shared.get("cache")
        if folder is None:
            return None
        return Path(folder) / cache_name(torch.cuda.get_device_name(self._arena.device), self._trt.__version__, "rtx")

    def _save_cache(self) -> None:
        """Keep what was compiled; a folder that cannot be written costs the next start its time, no more."""
        path = self._cache_file()
        data = self._cache.serialize() if path is not None and self._cache is not None else None
        if path is not None and data is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                store.write_atomically(path, memoryview(data))
            except (OSError, InputError) as error:
                warnings.warn(f"the kernel cache {str(path)!r} is not written: {one_line(error)}", stacklevel=5)


def streaming_budget(free: int, streamable: int, activations: int) -> int:
    """Bytes of weights to keep on the GPU.

    Args:
        free: bytes that are free.
        streamable: bytes of weights that could be streamed; the result is at most this, which means all stay.
        activations: bytes that the engine needs beside them, with what streaming itself takes.

    Raises:
        InputError: not even the activations fit.
    """
    room = free - activations - _RESERVE
    if room < 0:
        raise InputError(
            f"{free} bytes of GPU memory are free, and {activations + _RESERVE} are needed beside the weights: use an "
            "engine with a narrower profile or free memory"
        )
    return min(room, streamable)


def cache_name(gpu: str, version: str, suffix: str) -> str:
    """A file name for what is valid on one model of GPU with one version of the library."""
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{gpu} {version}")
    return f"{name}.{suffix}"
