"""OpenVINO on the CPU, with numpy arrays."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastsd.backends import base
from fastsd.bundle import Engine
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import few, one_line

if TYPE_CHECKING:
    import openvino as ov

Run = Callable[..., tuple[Any, ...]]

# Precision of an engine -> in what OpenVINO computes, and the CPU's capability without which that is float32: without
# instructions for it bfloat16 is only imitated, slower and less exact.
_PRECISIONS = {
    "float32": ("f32", "FP32"),
    "float16": ("f16", "FP16"),
    "bfloat16": ("bf16", "BF16"),
    "int8": ("bf16", "BF16"),  # all but the quantised layers
}
# Combinations of sizes that an engine is compiled for. Each takes 0.5 s for the demo's UNet, 3.4 s and a copy of the
# weights for that of SD1.5; further ones share a graph that leaves them open, which is 1.4 times slower.
_STATIC = 4


class _Compiled(NamedTuple):
    """A graph that runs; a request of it runs one call at a time, so there are as many as there are calls at once."""

    blob: np.ndarray[Any, Any] | None  # where the graph's weights lie; first, as a tuple lets go of its last item first
    graph: ov.CompiledModel
    requests: deque[ov.InferRequest]


def load(path: Path, engine: Engine, *, device: str, shared: dict[str, Any]) -> Run:
    """Load an engine.

    It is compiled for the sizes of each call that it has not seen before, at once where its profile has but one. What
    was compiled is kept in the cache.

    Args:
        path: the .xml file of OpenVINO's own format, whose weights are beside it, or an .onnx file.
        engine: what the manifest says of it. Its precision is that of the arithmetic, where the CPU has it (int8: of
            all but the quantised layers), else float32 is; inputs and outputs are float32 at every precision.
        device: "cpu".
        shared: what the engines of a pipeline share: "cache" (a folder for what was compiled, or none), "threads" (by
            default the physical cores that the process may use), and OpenVINO's core.

    Returns:
        The engine as a function of numpy arrays by name. The results are the caller's own. Any thread may call it.

    Raises:
        InputError: the file is no such engine, or does not run here.
        MissingExtraError: OpenVINO is not installed.
    """
    if reason := available(device, engine.target):
        raise (MissingExtraError if device == "cpu" else InputError)(reason)
    import openvino as ov

    core: ov.Core = shared.setdefault("openvino", ov.Core())
    precision, capability = _PRECISIONS[engine.precision]
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision if capability in _capabilities(core) else "f32",
        "INFERENCE_NUM_THREADS": shared.get("threads") or base.threads(),
    }
    fixed = {name: least for name, (least, _, most) in engine.profile.items() if least == most}

    def compile_for(sizes: Mapping[str, int]) -> _Compiled:
        def build(folder: Path | None) -> _Compiled:
            graph = core.compile_model(_model(core, path, engine, sizes), "CPU", config)
            if folder is not None:
                (folder / "graph.blob").write_bytes(graph.export_model().getbuffer())
            return _Compiled(None, graph, deque())

        def read(folder: Path) -> _Compiled:
            # Mapped, so that weights are read from the disk once; writable, as OpenVINO demands, but privately.
            blob = np.memmap(folder / "graph.blob", np.uint8, mode="c")
            graph = core.import_model(ov.Tensor(blob, shared_memory=True), "CPU", config)
            return _Compiled(blob, graph, deque())

        try:
            return base.cached(engine, shared, {**config, "sizes": sizes}, build, read)
        except RuntimeError as error:
            raise InputError(
                f"OpenVINO {ov.__version__} does not load {str(path)!r} ({one_line(error)}): export it again"
            ) from error

    compiled: dict[tuple[int, ...], _Compiled] = {}  # by the sizes in the order of the profile; (): any
    lock = threading.Lock()

    def compiled_for(sizes: Mapping[str, int]) -> _Compiled:
        key = tuple(sizes[name] for name in engine.profile)
        if key not in compiled:
            with lock:
                if key not in compiled and len(compiled) >= _STATIC:
                    key = ()
                if key not in compiled:
                    compiled[key] = compile_for({name: sizes[name] for name in engine.profile} if key else fixed)
        return compiled[key]

    if fixed.keys() == engine.profile.keys():
        compiled_for(fixed)
    names = [spec.name for spec in engine.outputs]

    def run(**arrays: Any) -> tuple[Any, ...]:
        here = compiled_for({**fixed, **base.check(engine, arrays)})
        try:
            request = here.requests.pop()
        except IndexError:
            request = here.graph.create_infer_request()
        results = request.infer(arrays, share_inputs=True, share_outputs=False)
        here.requests.append(request)
        return tuple(results[name] for name in names)

    return run


def available(device: str = "cpu", target: str = "openvino") -> str | None:
    """None if OpenVINO runs on a device here; else the sentence why not, and what would make it possible."""
    if device != "cpu":
        return f"OpenVINO runs here on the CPU, not on {device!r}: use device='cpu'"
    try:
        import openvino  # noqa: F401
    except ImportError:
        return "openvino is not installed: pip install 'fastsd[cpu]'"
    return None


def _capabilities(core: ov.Core) -> list[str]:
    return list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _model(core: ov.Core, path: Path, engine: Engine, sizes: Mapping[str, int]) -> ov.Model:
    """The graph, with constants for those dimensions whose sizes are given."""
    model = core.read_model(path)
    for ports, specs in ((model.inputs, engine.inputs), (model.outputs, engine.outputs)):
        names = {name for port in ports for name in port.get_names()}
        if not names >= {spec.name for spec in specs} or len(ports) != len(specs):
            expected = few((spec.name for spec in specs), 9)
            raise InputError(f"{str(path)!r} has {few(sorted(names), 9)} where {expected} belong: export it again")

    def size(dim: int | str) -> int:
        try:
            return dim if isinstance(dim, int) else base.extent(dim, sizes)
        except KeyError:
            return -1

    model.reshape({spec.name: [size(dim) for dim in spec.shape] for spec in engine.inputs})
    return model
