"""A stand-in for TensorRT 11 and TensorRT for RTX on a CPU: the part of their Python surface that fastsd uses.

It parses with onnx, "builds" a plan that is the graph itself, and runs it with onnxruntime on host addresses. It
behaves as the bindings do, also where they fail: None or False and a message to the logger. Where the documentation
calls something undefined, it raises AssertionError. `test_bindings.py` compares all that is public here with the real
bindings. `faults` makes a method fail on purpose; `calls` records what was called.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

faults: dict[str, str] = {}  # "Class.method" -> what it says when it fails
calls: list[str] = []
capturing: list[Graph] = []  # at most one

MAGIC = b"fake plan 11.4"
SCRATCH = 1 << 12  # bytes of device memory for each layer


def fallible(result: Any) -> Callable[[Any], Any]:
    """A method that can be told to fail, by giving `result`; of a constructor: by the bindings' TypeError."""

    def wrap(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = f"{method.__qualname__}"
            calls.append(name)
            if name not in faults:
                return method(self, *args, **kwargs)
            # A constructor's logger is its last argument.
            logger = args[-1] if method.__name__ == "__init__" else self._logger
            logger.log(ILogger.Severity.ERROR, faults[name])
            if method.__name__ == "__init__":
                raise TypeError("pybind11::init(): factory function returned nullptr")
            return result

        return call

    return wrap


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None: ...

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
_TYPES = {
    getattr(onnx.TensorProto, {"HALF": "FLOAT16", "BF16": "BFLOAT16"}.get(t.name, t.name), None): t for t in DataType
}


class BuilderFlag(IntEnum):
    REFIT, TF32, VERSION_COMPATIBLE, STRIP_PLAN, REFIT_IDENTICAL, WEIGHT_STREAMING = 4, 6, 12, 18, 19, 20


class HardwareCompatibilityLevel(IntEnum):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class SerializationFlag(IntEnum):
    EXCLUDE_WEIGHTS, EXCLUDE_LEAN_RUNTIME, INCLUDE_REFIT = range(3)


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(IntEnum):
    DEVICE, HOST = range(2)


class LayerType(IntEnum):
    CAST, ATTENTION_INPUT = 1, 51


class Dims(tuple[int, ...]):
    def __new__(cls, shape: Any = ()) -> Dims:
        made = super().__new__(cls, (int(size) for size in shape))
        assert len(made) <= 8
        return made


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Weights:
    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        self._dtype, self._pointer, self._size = type, ptr, count

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def size(self) -> int:
        return self._size


class ITensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self._value = value

    @property
    def name(self) -> str:
        return self._value.name

    @property
    def shape(self) -> Dims:
        return Dims(d.dim_value if d.HasField("dim_value") else -1 for d in self._value.type.tensor_type.shape.dim)

    def get_dimension_name(self, index: int) -> str | None:
        return self._value.type.tensor_type.shape.dim[index].dim_param or None


class ILayer:
    def __init__(self, node: onnx.NodeProto, types: dict[str, DataType]) -> None:
        self._node, self._types = node, types
        self._attention = IAttention()

    @property
    def type(self) -> LayerType:
        return LayerType.ATTENTION_INPUT if self._node.op_type == "Attention" else LayerType.CAST

    @property
    def num_outputs(self) -> int:
        return len(self._node.output)

    def get_output_type(self, index: int) -> DataType:
        return self._types.get(self._node.output[index], DataType.FLOAT)


class IAttentionInputLayer(ILayer):
    @property
    def attention(self) -> IAttention:
        return self._attention


class IAttention:
    decomposable = False


class INetworkDefinition:
    def __init__(self, logger: ILogger) -> None:
        self._logger, self._model = logger, onnx.ModelProto()
        self._layers: list[ILayer] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self._model.graph.output)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._model.graph.input[index])


class ParserError:
    def __init__(self, node: str, operator: str, text: str) -> None:
        self._node, self._operator, self._text = node, operator, text

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return self._node

    def node_operator(self) -> str:
        return self._operator


class OnnxParser:
    @fallible(None)
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    @fallible(False)
    def parse_from_file(self, model: str) -> bool:
        try:
            proto = onnx.load(model)
            inferred = onnx.shape_inference.infer_shapes(proto)
        except Exception:
            self._errors.append(ParserError("", "", "Failed to parse ONNX model from file: " + model))
            return False
        for node in proto.graph.node:
            if node.domain not in ("", "ai.onnx"):
                self._errors.append(
                    ParserError(node.name, node.op_type, f"No importer registered for op: {node.op_type}")
                )
        values = [*inferred.graph.value_info, *inferred.graph.output]
        types = {value.name: _TYPES[value.type.tensor_type.elem_type] for value in values}
        self._network._model = proto
        self._network._layers = [ILayer(node, types) for node in proto.graph.node]
        return not self._errors


class IOptimizationProfile:
    def __init__(self, model: onnx.ModelProto | None = None) -> None:
        self._shapes: dict[str, list[Dims]] = {}

    def __bool__(self) -> bool:
        return all(
            a <= b <= c for low, best, high in self._shapes.values() for a, b, c in zip(low, best, high, strict=True)
        )

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        if not len(min) == len(opt) == len(max):
            raise RuntimeError("set_shape failed")
        self._shapes[input] = [min, opt, max]

    def get_shape(self, input: str) -> list[Dims]:
        return self._shapes.get(input, [])


class ITimingCache:
    def __init__(self, entries: set[str]) -> None:
        self._entries = entries

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._entries |= input_cache._entries
        return True

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps(sorted(self._entries)).encode())


class IBuilderConfig:
    builder_optimization_level = 3
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE
    max_aux_streams = 0
    progress_monitor: IProgressMonitor | None = None

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._pools: dict[MemoryPoolType, int] = {}
        self._cache: Callable[[], ITimingCache | None] | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._pools[pool] = pool_size

    @fallible(-1)
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        assert profile, "the documentation asks for bool(profile)"
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @fallible(None)
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        try:
            return ITimingCache(set(json.loads(serialized_timing_cache or b"[]")))
        except ValueError:  # the library warns, and gives an empty one
            self._logger.log(
                ILogger.Severity.WARNING, "Failed to deserialize timing cache. Returning an empty timing cache."
            )
            return ITimingCache(set())

    @fallible(False)
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if "another GPU" in cache._entries and not ignore_mismatch:
            return False
        self._cache = weakref.ref(cache)  # "The cache must not be destroyed until after the engine is built."
        return True


class IProgressMonitor:
    def __init__(self) -> None: ...

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError


class Builder:
    @fallible(None)
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    @fallible(None)
    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(self._logger)

    @fallible(None)
    def create_builder_config(self) -> IBuilderConfig:
        return _flavour(self)["IBuilderConfig"](self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    @fallible(None)
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        if len(config._flags & {BuilderFlag.REFIT, BuilderFlag.REFIT_IDENTICAL}) > 1:
            return self._fail("REFIT and REFIT_IDENTICAL exclude each other")
        for layer in network._layers:
            if layer.type == LayerType.ATTENTION_INPUT and not layer._attention.decomposable:
                return self._fail(f"No fused kernel for attention {layer._node.name}")
        dynamic = any(-1 in network.get_input(index).shape for index in range(network.num_inputs))
        if dynamic and not config._profiles:
            return self._fail("Network has dynamic or shape inputs, but no optimization profile has been defined.")
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("Building engine", None, 3)
            for step in range(3):
                if not config.progress_monitor.step_complete("Building engine", step):
                    return self._fail("stopped by the progress monitor")
            config.progress_monitor.phase_finish("Building engine")
        if config.builder_optimization_level > 0 and config._cache is not None:
            cache = config._cache()
            assert cache is not None, "the timing cache was destroyed"
            cache._entries |= {node.op_type for node in network._model.graph.node}
        header = {
            "profiles": [profile._shapes for profile in config._profiles] or [{}],
            "flags": [flag.name for flag in config._flags],
        }
        model = onnx.ModelProto()
        model.CopyFrom(network._model)
        if BuilderFlag.STRIP_PLAN in config._flags:
            _strip(model)
        return _plan(header, model)

    def _fail(self, text: str) -> None:
        self._logger.log(ILogger.Severity.ERROR, text)


def _flavour(thing: Any) -> dict[str, Any]:
    return RTX if thing._logger.__class__.__mro__[1].__module__ == "rtx" else ENTERPRISE


def _floats(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The weights that can be refitted."""
    return {one.name: one for one in model.graph.initializer if _TYPES[one.data_type].name in ("FLOAT", "HALF", "BF16")}


def _strip(model: onnx.ModelProto) -> None:
    for one in _floats(model).values():
        one.ClearField("raw_data")


def _plan(header: dict[str, Any], model: onnx.ModelProto) -> IHostMemory:
    text = json.dumps(header).encode()
    return IHostMemory(MAGIC + len(text).to_bytes(8, "little") + text + model.SerializeToString())


class Runtime:
    engine_host_code_allowed = False

    @fallible(None)
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._alive = True

    @fallible(None)
    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        plan = bytes(serialized_engine)
        if not plan.startswith(MAGIC):
            self._logger.log(
                ILogger.Severity.ERROR, "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed."
            )
            return None
        start = len(MAGIC) + 8
        length = int.from_bytes(plan[len(MAGIC) : start], "little")
        header = json.loads(plan[start : start + length])
        if "VERSION_COMPATIBLE" in header["flags"] and not self.engine_host_code_allowed:
            self._logger.log(ILogger.Severity.ERROR, "Cannot deserialize engine with lean runtime.")
            return None
        return ICudaEngine(self, header, onnx.ModelProto.FromString(plan[start + length :]))


class ICudaEngine:
    def __init__(self, runtime: Runtime, header: dict[str, Any], model: onnx.ModelProto) -> None:
        self._runtime, self._header, self._model, self._logger = runtime, header, model, runtime._logger
        self._given = {name for name, one in _floats(model).items() if one.raw_data or one.float_data}
        self._budget = self.streamable_weights_size
        self._contexts = 0
        self._running = Counter[str]()

    @property
    def refittable(self) -> bool:
        return any("REFIT" in flag for flag in self._header["flags"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._model.graph.input) + len(self._model.graph.output)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    @property
    def device_memory_size_v2(self) -> int:
        streamed = self.streamable_weights_size - min(self._budget, self.streamable_weights_size)
        return SCRATCH * len(self._model.graph.node) + streamed // 2

    @property
    def streamable_weights_size(self) -> int:
        if "WEIGHT_STREAMING" not in self._header["flags"]:
            return 0
        return sum(_numbers(one) * 4 for one in _floats(self._model).values())

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self._contexts == 0 and budget >= 0 and "ICudaEngine.weight_streaming_budget_v2" not in faults:
            self._budget = budget

    def get_tensor_name(self, index: int) -> str:
        return [*self._model.graph.input, *self._model.graph.output][index].name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs, outputs = (
            {value.name for value in values} for values in (self._model.graph.input, self._model.graph.output)
        )
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT if name in outputs else TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        values = [*self._model.graph.input, *self._model.graph.output]
        return next(_TYPES[value.type.tensor_type.elem_type] for value in values if value.name == name)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if f"ICudaEngine.get_tensor_location {name}" in faults else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(shape) for shape in self._header["profiles"][profile_index].get(name, [])]

    @fallible(None)
    def create_runtime_config(self) -> IRuntimeConfig:
        return _flavour(self)["IRuntimeConfig"](self._logger)

    @fallible(None)
    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None:
        if missing := set(_floats(self._model)) - self._given:
            self._logger.log(ILogger.Severity.ERROR, f"Weights are missing: {sorted(missing)}")
            return None
        return IExecutionContext(self, runtime_config)

    def create_serialization_config(self) -> ISerializationConfig:
        return ISerializationConfig(self._logger)

    @fallible(None)
    def serialize_with_config(self, arg0: ISerializationConfig) -> IHostMemory:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        if SerializationFlag.EXCLUDE_WEIGHTS in arg0._flags:
            _strip(model)
        flags = [
            flag
            for flag in self._header["flags"]
            if SerializationFlag.INCLUDE_REFIT in arg0._flags or "REFIT" not in flag
        ]
        return _plan({**self._header, "flags": flags}, model)


def _numbers(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


class ISerializationConfig:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    @fallible(False)
    def clear_flag(self, flag: SerializationFlag) -> bool:
        self._flags.discard(flag)
        return True

    @fallible(False)
    def set_flag(self, flag: SerializationFlag) -> bool:
        self._flags.add(flag)
        return True


class IRuntimeConfig:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy


class IExecutionContext:
    """Addresses are of the host; an execution spoils the memory that it was given."""

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        assert config._strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine, self._logger, self._config = engine, engine._logger, config
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._flushed = False  # the deferred work after a change of shapes is done
        self._changes = 0
        self._outputs: dict[str, tuple[int, ...]] = {}
        engine._contexts += 1

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)
        self._changes += 1

    @fallible(False)
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile, self._flushed, self._shapes = profile_index, False, {}
        self._changes += 1
        return profile_index < self._engine.num_optimization_profiles

    @fallible(False)
    def set_input_shape(self, name: str, shape: Any) -> bool:
        limits = self._engine.get_tensor_profile_shape(name, self._profile)
        if not limits or not all(a <= s <= c for a, s, c in zip(limits[0], shape, limits[2], strict=True)):
            self._logger.log(
                ILogger.Severity.ERROR, f"Set dimension {list(shape)} for tensor {name} does not satisfy any profile."
            )
            return False
        self._shapes[name], self._flushed = tuple(shape), False
        self._changes += 1
        return True

    def infer_shapes(self) -> list[str]:
        inputs = [value.name for value in self._engine._model.graph.input]
        if missing := [name for name in inputs if name not in self._shapes]:
            return missing
        if "IExecutionContext.infer_shapes" in faults:
            return inputs
        zeros = {
            name: np.zeros(self._shapes[name], _NUMPY[self._engine.get_tensor_dtype(name).name]) for name in inputs
        }
        self._outputs = {name: array.shape for name, array in _run(self._engine._model, zeros).items()}
        return []

    def get_tensor_shape(self, name: str) -> Dims:
        if "IExecutionContext.get_tensor_shape" in faults:
            return Dims([-1])
        return Dims({**self._shapes, **self._outputs}[name])

    @fallible(False)
    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        self._changes += 1
        return self._engine.get_tensor_mode(name) != TensorIOMode.NONE

    @fallible(False)
    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle > 2, "a stream that is not the default one"
        if not (self._memory[0] and self._memory[1] >= self._engine.device_memory_size_v2):
            return self._fail("no device memory, or too little")
        if set(self._addresses) != {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}:
            return self._fail("Neither address or allocator is set for some tensor")
        streams_weights = self._engine._budget < self._engine.streamable_weights_size
        if capturing:
            if streams_weights:
                return self._fail("operation not permitted when stream is capturing")
            assert self._flushed, "captured with work deferred"
            capturing[0]._launches.append((self, self._changes))
            return True
        self._flushed = True
        self._launch()
        return True

    def _launch(self) -> None:
        assert _gpu.acquire(blocking=False), "two engines run at once in one arena"
        try:
            ctypes.memset(*self._memory[:1], 0xFF, self._memory[1])
            arrays = {}
            for value in self._engine._model.graph.input:
                kind = np.dtype(_NUMPY[self._engine.get_tensor_dtype(value.name).name])
                shape = self._shapes[value.name]
                data = ctypes.string_at(self._addresses[value.name], int(np.prod(shape)) * kind.itemsize)
                arrays[value.name] = np.frombuffer(data, kind).reshape(shape)
            for name, array in _run(self._engine._model, arrays).items():
                array = np.ascontiguousarray(array)
                ctypes.memmove(self._addresses[name], array.ctypes.data, array.nbytes)
        finally:
            _gpu.release()

    def _fail(self, text: str) -> bool:
        self._logger.log(ILogger.Severity.ERROR, text)
        return False


_gpu = threading.Lock()
_sessions: dict[bytes, Any] = {}


def _run(model: onnx.ModelProto, arrays: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime

    data = model.SerializeToString()
    if data not in _sessions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        _sessions[data] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    session = _sessions[data]
    return dict(zip((one.name for one in session.get_outputs()), session.run(None, arrays), strict=True))


class Graph:
    """In the place of `torch.cuda.CUDAGraph`: launches, replayed as they were captured."""

    def __init__(self) -> None:
        self._launches: list[tuple[IExecutionContext, int]] = []

    def replay(self) -> None:
        assert self._launches
        for context, changes in self._launches:
            assert context._changes == changes, "a captured context has changed since"
            context._launch()


@contextmanager
def graph(cuda_graph: Graph, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
    """In the place of `torch.cuda.graph`: an error in the body invalidates the capture."""
    capturing.append(cuda_graph)
    try:
        yield
    finally:
        capturing.pop()


class Refitter:
    """Weights that one node reads are combined: the engine takes all of them or none."""

    @fallible(None)
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._logger = engine, logger
        self._weights: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(_floats(self._engine._model))

    def get_missing_weights(self) -> list[str]:
        known, needed = self.get_all_weights(), set(_floats(self._engine._model)) - self._engine._given
        for node in self._engine._model.graph.node:
            if any(name in self._weights for name in node.input):
                needed |= set(node.input) & set(known)
        return [name for name in known if name in needed and name not in self._weights]

    def get_weights_prototype(self, weights_name: str) -> Weights:
        tensor = _floats(self._engine._model).get(weights_name)
        return Weights(_TYPES[tensor.data_type], 0, _numbers(tensor)) if tensor else Weights(DataType.FLOAT, 0, -1)

    @fallible(False)
    def set_named_weights(self, name: str, weights: Weights) -> bool:
        prototype = self.get_weights_prototype(name)
        self._weights[name] = weights
        return (prototype.dtype, prototype.size) == (weights.dtype, weights.size)

    @fallible(False)
    def refit_cuda_engine(self) -> bool:
        assert not _gpu.locked(), "refitted while it runs"
        if self.get_missing_weights():
            self._logger.log(ILogger.Severity.ERROR, "missing weights")
            return False
        tensors = _floats(self._engine._model)
        for name, weights in self._weights.items():
            kind = helper.tensor_dtype_to_np_dtype(tensors[name].data_type)
            tensors[name].raw_data = ctypes.string_at(weights._pointer, weights.size * kind.itemsize)
            self._engine._given.add(name)
        return True


class OnnxParserRefitter:
    @fallible(None)
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._logger = refitter, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    @fallible(False)
    def refit_from_file(self, model: str) -> bool:
        try:
            tensors = _floats(onnx.load(model))
        except Exception:
            self._errors.append(ParserError("", "", f"cannot open {model}"))
            return False
        self._refitter._kept = kept = {
            name: np.ascontiguousarray(numpy_helper.to_array(one)) for name, one in tensors.items()
        }
        for name in self._refitter.get_all_weights():
            prototype = self._refitter.get_weights_prototype(name)
            if name not in kept or kept[name].size != prototype.size:
                self._errors.append(ParserError(name, "Initializer", "weights are missing or of another size"))
                return False
            weights = Weights(_TYPES[tensors[name].data_type], kept[name].ctypes.data, kept[name].size)
            self._refitter.set_named_weights(name, weights)
        return True


def get_nv_onnx_parser_version() -> int:
    return 110400


# What only TensorRT for RTX has.


class ComputeCapability(IntEnum):
    SM80, SM86, SM89 = 80, 86, 89


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class IRuntimeCache:
    def __init__(self, logger: ILogger) -> None:
        self._logger, self._kernels = logger, b"kernels"

    @fallible(False)
    def deserialize(self, blob: bytes) -> bool:
        self._kernels = blob
        return True

    @fallible(None)
    def serialize(self) -> IHostMemory:
        return IHostMemory(self._kernels)


class RtxRuntimeConfig(IRuntimeConfig):
    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    @fallible(None)
    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._logger)

    @fallible(False)
    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class RtxBuilderConfig(IBuilderConfig):
    num_compute_capabilities = 0

    @fallible(False)
    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        return index < self.num_compute_capabilities


_HELPERS = ("Graph", "RtxRuntimeConfig", "RtxBuilderConfig")
_RTX_ONLY = ("ComputeCapability", "CudaGraphStrategy", "IRuntimeCache")
_PUBLIC = {
    name: value
    for name, value in list(globals().items())
    if getattr(value, "__module__", "") == __name__
    and (isinstance(value, type) or name == "get_nv_onnx_parser_version")
    and name not in _HELPERS
}
ENTERPRISE = {name: value for name, value in _PUBLIC.items() if name not in _RTX_ONLY}
# A logger's base class tells which library made it.
RTX = {
    **_PUBLIC,
    "ILogger": type("ILogger", (ILogger,), {"__module__": "rtx"}),
    "IRuntimeConfig": RtxRuntimeConfig,
    "IBuilderConfig": RtxBuilderConfig,
}


def module(target: str) -> ModuleType:
    """The library of a target, to be put into `sys.modules`."""
    made = ModuleType(target)
    vars(made).update(RTX if target == "tensorrt-rtx" else ENTERPRISE)
    made.__version__ = "1.7.1.116" if target == "tensorrt-rtx" else "11.4.0.106"
    return made
