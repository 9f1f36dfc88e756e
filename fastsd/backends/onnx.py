"""ONNX Runtime: on the CPU with numpy arrays, on CUDA with torch tensors, which never leave the device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.backends import base
from fastsd.bundle import Engine, TensorSpec
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import few, one_line

if TYPE_CHECKING:
    import onnxruntime as ort
    import torch
    from torch import Tensor

Run = Callable[..., tuple[Any, ...]]

# Options of the CUDA execution provider that a bundle may set: none that holds an address, a path or the device.
_PROVIDER = (
    "arena_extend_strategy",
    "cudnn_conv1d_pad_to_nc1d",
    "cudnn_conv_algo_search",
    "cudnn_conv_use_max_workspace",
    "enable_skip_layer_norm_strict_mode",
    "fuse_conv_bias",
    "gpu_mem_limit",
    "prefer_nhwc",
    "sdpa_kernel",
    "use_tf32",
)

_ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # onnx.TensorProto.DataType


def load(path: Path, engine: Engine, *, device: str, shared: dict[str, Any]) -> Run:
    """Load an engine.

    Args:
        path: the .onnx file.
        engine: what the manifest says of it. Of its options "provider" (some of those of the CUDA execution provider)
            is read.
        device: "cpu", "cuda" or "cuda:1".
        shared: what the engines of a pipeline share: "cache" (a folder for optimised graphs, or none), "threads" (on
            the CPU; by default the physical cores that the process may use), and on CUDA the stream.

    Returns:
        The engine as a function of arrays by name: numpy arrays on the CPU, torch tensors on CUDA. The results are the
        caller's own. Any thread may call it; on CUDA its work is ordered after that of the caller's current stream,
        and what the caller does next comes after it.

    Raises:
        InputError: the file is no such engine, or does not run here.
        MissingExtraError: ONNX Runtime is not installed.
    """
    if reason := available(device, engine.target):
        raise (InputError if _has_onnxruntime() else MissingExtraError)(reason)
    if device != "cpu":
        return _on_cuda(path, engine, device, shared)
    if engine.precision == "bfloat16":
        raise InputError(
            "ONNX Runtime computes bfloat16 only on CUDA: use an engine in float32, or the openvino target on the CPU"
        )
    return _on_cpu(path, engine, shared)


def available(device: str = "cpu", target: str = "onnx") -> str | None:
    """None if ONNX Runtime runs on a device here; else the sentence why not, and what would make it possible."""
    kind = "cuda" if device.startswith("cuda:") else device
    if kind not in ("cpu", "cuda"):
        return f"ONNX Runtime runs here on 'cpu' and 'cuda', not on {device!r}: use one of these"
    if not _has_onnxruntime():
        return f"onnxruntime is not installed: pip install 'fastsd[{'cpu' if kind == 'cpu' else 'gpu'}]'"
    if kind == "cpu":
        return None
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} was built without CUDA: pip uninstall it, then pip install 'fastsd[gpu]'"
    try:
        import torch
    except ImportError:
        return "on CUDA the arrays are torch's, and torch is not installed: pip install 'fastsd[gpu]'"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU: use device='cpu'"
    return None


def _has_onnxruntime() -> bool:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


def _on_cpu(path: Path, engine: Engine, shared: dict[str, Any]) -> Run:
    import onnxruntime as ort

    threads = shared.get("threads") or base.threads()

    def build(folder: Path | None) -> ort.InferenceSession:
        options = _options(engine, threads)
        if folder is not None:
            options.optimized_model_filepath = str(folder / "model.onnx")
        return _session(path, options, ["CPUExecutionProvider"])

    def read(folder: Path) -> ort.InferenceSession:
        options = _options(engine, threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return _session(folder / "model.onnx", options, ["CPUExecutionProvider"])

    session = base.cached(engine, shared, {"form": "optimised"}, build, read)
    _refuse_other(session, path, engine)
    names = [spec.name for spec in engine.outputs]

    def run(**arrays: Any) -> tuple[Any, ...]:
        base.check(engine, arrays)
        return tuple(session.run(names, arrays))

    return run


def _options(engine: Engine, threads: int) -> ort.SessionOptions:
    """Options of every session; dimensions that do not vary are made constants of the graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about the graph, which was verified when it was exported
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # How long a thread waits for work before it sleeps. Without a limit, where other programs use the cores too, a call
    # of the demo's UNet takes 86 ms instead of 38; without waiting at all 14 % longer where they do not. Memory
    # patterns, the arena and denormals make no difference.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    for name, (least, _, most) in engine.profile.items():
        if least == most:
            options.add_free_dimension_override_by_name(name, least)
    return options


def _session(path: Path, options: ort.SessionOptions, providers: Sequence[Any]) -> ort.InferenceSession:
    import onnxruntime as ort

    try:
        return ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its errors have no other base
        raise InputError(
            f"ONNX Runtime {ort.__version__} does not load {str(path)!r} ({one_line(error)}): export it again"
        ) from error


def _refuse_other(session: ort.InferenceSession, path: Path, engine: Engine) -> None:
    """Refuse a graph with other inputs or outputs than the manifest says."""
    for found, specs in ((session.get_inputs(), engine.inputs), (session.get_outputs(), engine.outputs)):
        if (names := {one.name for one in found}) != {spec.name for spec in specs}:
            expected = few((spec.name for spec in specs), 9)
            raise InputError(f"{str(path)!r} has {few(sorted(names), 9)} where {expected} belong: export it again")


def _on_cuda(path: Path, engine: Engine, device: str, shared: dict[str, Any]) -> Run:
    import torch

    chosen = engine.options.get("provider", {})
    if not isinstance(chosen, Mapping) or not chosen.keys() <= set(_PROVIDER):
        names = few(sorted(set(chosen) - set(_PROVIDER))) if isinstance(chosen, Mapping) else repr(chosen)
        raise InputError(f"the {engine.component} engine asks for the provider's {names}: use {few(_PROVIDER, 99)}")
    place = torch.device("cuda", torch.device(device).index or 0)
    # One stream, not the default one, which cannot be captured.
    stream, lock = shared.setdefault("onnx", (torch.cuda.Stream(place), threading.Lock()))

    def make(graph: bool) -> Run:
        provider = {
            "device_id": str(place.index),
            "user_compute_stream": str(stream.cuda_stream),
            "enable_cuda_graph": str(int(graph)),
            "use_tf32": "0",  # float32 means float32
            **{name: str(value) for name, value in chosen.items()},
        }
        session = _session(path, _options(engine, 1), [("CUDAExecutionProvider", provider), "CPUExecutionProvider"])
        if "CUDAExecutionProvider" not in session.get_providers():
            raise InputError(f"ONNX Runtime cannot use {device!r}: check that its CUDA and cuDNN libraries are there")
        _refuse_other(session, path, engine)
        return bind(session, engine, place, stream, lock, graph=graph)

    if any(least < most for least, _, most in engine.profile.values()):
        return make(graph=False)
    try:
        return make(graph=True)
    except InputError as error:
        if "graph capture" not in str(error):
            raise
        warnings.warn(f"{engine.component} runs without a CUDA graph: {one_line(error)}", stacklevel=2)
        return make(graph=False)


def bind(
    session: ort.InferenceSession,
    engine: Engine,
    place: torch.device,
    stream: torch.cuda.Stream,
    lock: AbstractContextManager[Any],
    *,
    graph: bool,
) -> Run:
    """A session as a function of tensors, which it reads and writes where they lie.

    Args:
        session: runs on `stream`.
        engine: what it is.
        place: where all tensors are.
        stream: of the session; the stream of the caller waits for it, and it for that one.
        lock: held while a call is launched.
        graph: the session captures its launches at the first run and repeats them afterwards, so that its inputs and
            outputs have fixed addresses and are copied.
    """
    import onnxruntime as ort
    import torch

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the streams wait, not the CPU
    binding = session.io_binding()

    def attach(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for specs, tensors, one in (
            (engine.inputs, inputs, binding.bind_input),
            (engine.outputs, outputs, binding.bind_output),
        ):
            for spec, tensor in zip(specs, tensors, strict=True):
                one(
                    name=spec.name,
                    device_type=place.type,
                    device_id=place.index or 0,
                    element_type=_ELEMENT_TYPES[spec.dtype],
                    shape=tuple(tensor.shape),
                    buffer_ptr=tensor.data_ptr(),
                )

    def empty(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> list[Tensor]:
        return [torch.empty(base.shape(spec, sizes), dtype=getattr(torch, spec.dtype), device=place) for spec in specs]

    fixed_inputs: list[Tensor] = []
    fixed_outputs: list[Tensor] = []
    if graph:
        sizes = {name: usual for name, (_, usual, _) in engine.profile.items()}
        with lock, torch.inference_mode(False):  # so that they can be written in any mode
            fixed_inputs, fixed_outputs = empty(engine.inputs, sizes), empty(engine.outputs, sizes)
            for tensor in fixed_inputs:
                tensor.zero_()
            attach(fixed_inputs, fixed_outputs)
            stream.wait_stream(torch.cuda.current_stream(place))
            session.run_with_iobinding(binding, options)  # captures

    @torch.no_grad()
    def run(**tensors: Tensor) -> tuple[Tensor, ...]:
        sizes = base.check(engine, tensors)
        for name, tensor in tensors.items():
            if tensor.device != place:
                raise InputError(f"{name} of the {engine.component} engine is on {tensor.device}: move it to {place}")
        caller = torch.cuda.current_stream(place)
        # Made on the caller's stream, on which their memory is given back too.
        inputs = [tensors[spec.name].contiguous() for spec in engine.inputs]
        outputs = empty(engine.outputs, sizes)
        with lock:
            stream.wait_stream(caller)
            if not graph:
                attach(inputs, outputs)
                session.run_with_iobinding(binding, options)
            else:
                with torch.cuda.stream(stream):
                    for fixed, given in zip(fixed_inputs, inputs, strict=True):
                        fixed.copy_(given)
                    session.run_with_iobinding(binding, options)
                    for given, fixed in zip(outputs, fixed_outputs, strict=True):
                        given.copy_(fixed)
            caller.wait_stream(stream)
        return tuple(outputs)

    return run
