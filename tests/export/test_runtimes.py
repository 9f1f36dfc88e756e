"""ONNX Runtime and OpenVINO behind the functions of a bundle, against eager torch."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from refusals import refusal

from fastsd.backends import base, onnx, openvino
from fastsd.bundle import Engine, Range, TensorSpec
from fastsd.errors import MissingExtraError
from fastsd_export import onnx as graphs
from fastsd_export import openvino as builder
from fastsd_export.trace import Traced, shapes

DYNAMIC = {"batch": (1, 2, 4), "height": (2, 8, 24), "width": (2, 8, 24), "tokens": (1, 20, 64)}
BACKENDS = {"onnx": onnx, "openvino": openvino}
DUAL = {"transformer": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd-denoiser": ("sd", "denoiser", {}),
    "sd35-denoiser": ("sd3", "denoiser", DUAL),
    "flux-denoiser": ("flux", "denoiser", {}),
    "flux-t5": ("flux", "text_encoder_2", {}),
    "flux-vae-decoder": ("flux", "vae_decoder", {}),
}
SLOW_PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux-prepare": ("flux", "prepare", {}),
    "sdxl-clip": ("sdxl", "text_encoder_2", {}),
    "sdxl-prepare": ("sdxl", "prepare", {}),
    "sdxl-denoiser": ("sdxl", "denoiser", {}),
    "sd-vae-encoder": ("sd", "vae_encoder", {}),
    "sd3-t5": ("sd3", "text_encoder_3", {}),
}
# Largest error relative to the largest value: float32 sums in another order (seen up to 1e-5, in the time embedding of
# Flux), bfloat16 has 8 bits (seen up to 0.05, in a VAE).
TOLERANCES = {"float32": 5e-5, "bfloat16": 0.1}

Export = Callable[..., tuple[Traced, graphs.Graph]]
Arrays = dict[str, np.ndarray]


def engine_of(
    path: Path, graph: graphs.Graph, target: str, precision: str = "float32", sizes: Mapping[str, int] | None = None
) -> Engine:
    """An engine as a manifest describes it; with `sizes` of a profile of just these."""
    profile: dict[str, Range] = {
        name: DYNAMIC[name] if sizes is None else (sizes[name],) * 3
        for name in DYNAMIC
        if any(name in str(dim) for spec in graph.inputs for dim in spec.shape)
    }
    names = [one for one in path.parent.iterdir() if one.stem == path.stem]
    files = {one.name: (one.stat().st_size, hashlib.sha256(one.read_bytes()).hexdigest()) for one in names}
    component = graph.path.stem
    return Engine(component, target, path.name, precision, graph.inputs, graph.outputs, profile, files)


def arrays(traced: Traced, sizes: Mapping[str, int], seed: int = 0) -> Arrays:
    """Inputs of the given sizes: random, of the kind of the example's."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(traced, sizes).items():
        example = traced.inputs[name].flatten()
        made[name] = example[torch.randint(len(example), shape, generator=generator)].numpy()
    return made


def eager(traced: Traced, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        return [one.numpy() for one in traced.module(**{name: torch.tensor(one) for name, one in inputs.items()})]


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


def cosine(got: np.ndarray, want: np.ndarray) -> float:
    a, b = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def shared(cache: Path | None = None) -> dict[str, Any]:
    return {"cache": cache, "threads": 1}


@pytest.fixture(scope="module")
def unet(exported: Export) -> tuple[Traced, graphs.Graph]:
    return exported("sd", "denoiser")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path / "home"))


targets = pytest.mark.parametrize("target", BACKENDS)


# ------------------------------------------------------------------------------------------------------------
# Results


# Target, precision, and whether the sizes are fixed.
LANES = [("onnx", "float32", False), ("openvino", "float32", True), ("openvino", "bfloat16", True)]
SLOW_LANES = [("onnx", "float32", True), ("openvino", "float32", False), ("openvino", "bfloat16", False)]


def check_part(exported: Export, part: str, lanes: list[tuple[str, str, bool]]) -> None:
    family, component, options = {**PARTS, **SLOW_PARTS}[part]
    traced, graph = exported(family, component, **options)
    inputs = arrays(traced, traced.sizes)
    want = eager(traced, inputs)
    for target, precision, fixed in lanes:
        if precision == "bfloat16" and component == "prepare":
            continue  # a timestep times a frequency needs more bits: exported in float32
        engine = engine_of(graph.path, graph, target, precision, traced.sizes if fixed else None)
        run = BACKENDS[target].load(graph.path, engine, device="cpu", shared=shared())
        got = run(**inputs)
        assert isinstance(got, tuple)
        worst = max(error(ours, theirs) for ours, theirs in zip(got, want, strict=True))
        assert worst < TOLERANCES[precision], (target, precision, fixed, worst)


@pytest.mark.parametrize("part", PARTS)
def test_results_are_those_of_eager_torch(exported: Export, part: str) -> None:
    check_part(exported, part, LANES)


@pytest.mark.full
@pytest.mark.parametrize("part", [*PARTS, *SLOW_PARTS])
def test_results_of_all_parts_and_lanes_are_those_of_eager_torch(exported: Export, part: str) -> None:
    check_part(exported, part, [*(LANES if part in SLOW_PARTS else []), *SLOW_LANES])


def test_openvino_is_compiled_for_a_few_sizes_and_open_for_more(
    unet: tuple[Traced, graphs.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, graph = unet
    seen: list[dict[str, int]] = []
    model = openvino._model

    def logged(*given: Any) -> Any:
        seen.append(dict(given[3]))
        return model(*given)

    monkeypatch.setattr(openvino, "_model", logged)
    engine = engine_of(graph.path, graph, "openvino")
    run = openvino.load(graph.path, engine, device="cpu", shared=shared())
    assert seen == []  # nothing is known of the calls
    todo = [{**traced.sizes, "height": height} for height in (4, 6, 4, 8, 10, 12, 3, 4)]
    for i, sizes in enumerate(todo):
        inputs = arrays(traced, sizes, i)
        assert error(run(**inputs)[0], eager(traced, inputs)[0]) < TOLERANCES["float32"]
    assert [sizes.get("height") for sizes in seen] == [4, 6, 8, 10, None]


@targets
def test_fixed_sizes_may_be_numbers_in_the_manifest(unet: tuple[Traced, graphs.Graph], target: str) -> None:
    traced, graph = unet
    engine = engine_of(graph.path, graph, target, sizes=traced.sizes)
    sides = {
        side: tuple(TensorSpec(one.name, one.dtype, base.shape(one, traced.sizes)) for one in getattr(engine, side))
        for side in ("inputs", "outputs")
    }
    run = BACKENDS[target].load(graph.path, Engine(**{**vars(engine), **sides}), device="cpu", shared=shared())
    inputs = arrays(traced, traced.sizes)
    assert error(run(**inputs)[0], eager(traced, inputs)[0]) < TOLERANCES["float32"]
    assert "pass float32 [2, 4, 17, 19]" in refusal(lambda: run(**{**inputs, "latents": inputs["latents"][:1]}))


@targets
def test_results_are_the_callers_own(unet: tuple[Traced, graphs.Graph], target: str) -> None:
    traced, graph = unet
    engine = engine_of(graph.path, graph, target, sizes=traced.sizes)
    run = BACKENDS[target].load(graph.path, engine, device="cpu", shared=shared())
    first, second = (arrays(traced, traced.sizes, seed) for seed in (1, 2))
    [one] = run(**first)
    kept = one.copy()
    [two] = run(**second)
    assert np.array_equal(one, kept)
    assert not np.array_equal(one, two)
    one[:] = np.nan
    assert np.array_equal(run(**first)[0], kept)


@targets
def test_inputs_may_be_views_and_read_only(unet: tuple[Traced, graphs.Graph], target: str) -> None:
    traced, graph = unet
    engine = engine_of(graph.path, graph, target)
    run = BACKENDS[target].load(graph.path, engine, device="cpu", shared=shared())
    inputs = arrays(traced, traced.sizes)
    [want] = run(**inputs)
    views = {name: np.stack([one, one], axis=-1)[..., 0] for name, one in inputs.items()}
    for view in views.values():
        assert not view.flags.c_contiguous
        view.flags.writeable = False
    assert np.array_equal(run(**views)[0], want)


@targets
def test_threads_may_call_one_engine(unet: tuple[Traced, graphs.Graph], target: str) -> None:
    traced, graph = unet
    run = BACKENDS[target].load(graph.path, engine_of(graph.path, graph, target), device="cpu", shared=shared())
    todo = [arrays(traced, {**traced.sizes, "batch": 1 + seed % 2}, seed) for seed in range(4)]
    want = [run(**inputs)[0] for inputs in todo]
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in range(start, start + 12):
            if not np.array_equal(run(**todo[i % 4])[0], want[i % 4]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


# ------------------------------------------------------------------------------------------------------------
# The cache


def cached_files(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*/files/*") if path.is_file()]


@targets
@pytest.mark.parametrize("fixed", [True, False], ids=["static", "dynamic"])
def test_the_second_start_reads_the_cache_and_gives_the_same_bits(
    unet: tuple[Traced, graphs.Graph], tmp_path: Path, target: str, fixed: bool
) -> None:
    traced, graph = unet
    path = tmp_path / graph.path.name
    path.write_bytes(graph.path.read_bytes())
    precision = "float32" if target == "onnx" else "bfloat16"
    engine = engine_of(path, graph, target, precision, traced.sizes if fixed else None)
    inputs = arrays(traced, traced.sizes)

    def result() -> np.ndarray:
        run = BACKENDS[target].load(path, engine, device="cpu", shared=shared(tmp_path / "cache"))
        return run(**inputs)[0]

    want = result()
    [file] = cached_files(tmp_path / "cache")
    path.unlink()  # so that nothing else can be read
    assert np.array_equal(result(), want)
    path.write_bytes(graph.path.read_bytes())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert np.array_equal(result(), want)  # built again
    assert np.array_equal(result(), want)


@targets
def test_another_graph_precision_or_profile_finds_nothing_in_the_cache(
    unet: tuple[Traced, graphs.Graph], tmp_path: Path, target: str
) -> None:
    traced, graph = unet
    other = tmp_path / graph.path.name
    other.write_bytes(
        graph.path.read_bytes() + b"\x3a\x00"
    )  # an empty graph, to be merged: another file, equal meaning
    engines = [
        engine_of(graph.path, graph, target, sizes=traced.sizes),
        engine_of(other, graph, target, sizes=traced.sizes),
        engine_of(graph.path, graph, target, sizes={**traced.sizes, "batch": 1}),
        engine_of(graph.path, graph, target, "float16", sizes=traced.sizes),
    ]
    for i, engine in enumerate(engines):
        path = other if i == 1 else graph.path
        BACKENDS[target].load(path, engine, device="cpu", shared=shared(tmp_path / "cache"))
        assert len(cached_files(tmp_path / "cache")) == i + 1


@targets
def test_a_cache_that_cannot_be_written_is_done_without(
    unet: tuple[Traced, graphs.Graph], tmp_path: Path, target: str
) -> None:
    traced, graph = unet
    (tmp_path / "cache").write_text("a file")
    engine = engine_of(graph.path, graph, target, sizes=traced.sizes)
    inputs = arrays(traced, traced.sizes)
    run = BACKENDS[target].load(graph.path, engine, device="cpu", shared=shared(tmp_path / "cache"))
    assert error(run(**inputs)[0], eager(traced, inputs)[0]) < TOLERANCES["float32"]
    large = {**engine.files, "weights": (base.LARGEST, "0" * 64)}
    whole = Engine(**{**vars(engine), "files": large})
    BACKENDS[target].load(graph.path, whole, device="cpu", shared=shared(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------------------
# Refusals


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


FLUX = Engine(
    "denoiser",
    "onnx",
    "denoiser.onnx",
    "float32",
    (
        spec("position", "float32", 1, "tokens+height*width//4", 8),
        spec("latents", "float32", "batch", 16, "height", "width"),
        spec("context", "float32", "batch", "tokens", 32),
    ),
    (spec("prediction", "float32", "batch", 16, "height", "width"),),
    {"batch": (1, 1, 2), "height": (2, 8, 16), "width": (2, 8, 16), "tokens": (1, 5, 9)},
)
ENCODER = Engine(
    "vae_encoder",
    "onnx",
    "vae_encoder.onnx",
    "float32",
    (spec("pixels", "float32", 1, "8*height", "8*width", 3),),
    (spec("latents", "float32", 1, 4, "height", "width"),),
    {"height": (2, 8, 16), "width": (2, 8, 16)},
)


def flux_inputs(batch: int = 2, height: int = 4, width: int = 6, tokens: int = 5) -> Arrays:
    return {
        "latents": np.zeros((batch, 16, height, width), np.float32),
        "context": np.zeros((batch, tokens, 32), np.float32),
        "position": np.zeros((1, tokens + height * width // 4, 8), np.float32),
    }


def test_sizes_are_read_off_the_inputs() -> None:
    sizes = base.check(FLUX, flux_inputs())
    assert sizes == {"batch": 2, "height": 4, "width": 6, "tokens": 5}
    assert base.shape(FLUX.inputs[0], sizes) == (1, 11, 8)
    pixels = {"pixels": torch.zeros(1, 24, 32, 3)}
    assert base.shape(ENCODER.outputs[0], base.check(ENCODER, pixels)) == (1, 4, 3, 4)


CONTEXT = np.zeros((2, 5, 32), np.float32)
WRONG: dict[str, tuple[Engine, dict[str, Any], str]] = {
    "missing": (FLUX, {"latents": CONTEXT}, "takes position, latents, context, not latents"),
    "unknown": (FLUX, {**flux_inputs(), "text": CONTEXT}, "not latents, context, position, text"),
    "float64": (FLUX, {**flux_inputs(), "context": CONTEXT.astype(float)}, "context of the denoiser engine is float64"),
    "list": (FLUX, {**flux_inputs(), "context": [1.0]}, "is a list: pass float32 \\[batch, tokens, 32\\]"),
    "rank": (FLUX, {**flux_inputs(), "latents": CONTEXT}, "latents of the denoiser engine is float32 \\[2, 5, 32\\]"),
    "batches": (FLUX, {**flux_inputs(), "context": CONTEXT[:1]}, "with batch 2"),
    "channels": (FLUX, {**flux_inputs(), "context": CONTEXT[..., :31]}, "\\[2, 5, 31\\]: pass"),
    "positions": (FLUX, {**flux_inputs(), "position": np.zeros((1, 9, 8), np.float32)}, "height 4, width 6, tokens 5"),
    "too large": (FLUX, flux_inputs(height=18), "was built for height 2 to 16, not 18: export one for it"),
    "too many": (FLUX, flux_inputs(batch=3), "batch 1 to 2, not 3"),
    "pixels": (
        ENCODER,
        {"pixels": np.zeros((1, 30, 32, 3), np.float32)},
        "pass float32 \\[1, 8\\*height, 8\\*width, 3\\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case: str) -> None:
    engine, given, message = WRONG[case]
    said = refusal(lambda: base.check(engine, given))
    assert re.search(message, said), said


@targets
def test_wrong_arguments_never_reach_native_code(
    unet: tuple[Traced, graphs.Graph], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    traced, graph = unet
    run = BACKENDS[target].load(graph.path, engine_of(graph.path, graph, target), device="cpu", shared=shared())
    inputs = arrays(traced, traced.sizes)
    run(**inputs)
    monkeypatch.setattr(base, "check", lambda engine, given: refuse())

    def refuse() -> dict[str, int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(**inputs)


@targets
def test_wrong_files_and_places_are_refused(unet: tuple[Traced, graphs.Graph], tmp_path: Path, target: str) -> None:
    traced, graph = unet
    backend = BACKENDS[target]
    engine = engine_of(graph.path, graph, target, sizes=traced.sizes)

    def load(path: Path = graph.path, device: str = "cpu", **changed: Any) -> object:
        return backend.load(path, Engine(**{**vars(engine), **changed}), device=device, shared=shared())

    broken = tmp_path / "denoiser.onnx"
    broken.write_bytes(graph.path.read_bytes()[:5000])
    assert "export it again" in refusal(lambda: load(broken))
    assert "export it again" in refusal(lambda: load(tmp_path / "absent.onnx"))
    other = (spec("noise", "float32", 1), *engine.inputs[1:])
    assert "where noise" in refusal(lambda: load(inputs=other))
    assert "'tpu'" in refusal(lambda: load(device="tpu"))
    assert backend.available("cpu") is None
    assert "'tpu'" in (backend.available("tpu") or "")


def test_onnxruntime_has_no_bfloat16_on_the_cpu_and_this_one_no_cuda(unet: tuple[Traced, graphs.Graph]) -> None:
    traced, graph = unet
    engine = engine_of(graph.path, graph, "onnx", "bfloat16", traced.sizes)
    assert "openvino" in refusal(lambda: onnx.load(graph.path, engine, device="cpu", shared=shared()))
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "fastsd[gpu]" in refusal(lambda: onnx.load(graph.path, engine, device="cuda", shared=shared()))


def test_openvino_computes_in_float32_where_the_cpu_has_no_bfloat16(
    unet: tuple[Traced, graphs.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, graph = unet
    monkeypatch.setattr(openvino, "_capabilities", lambda core: ["FP32", "INT8"])
    engine = engine_of(graph.path, graph, "openvino", "bfloat16", traced.sizes)
    inputs = arrays(traced, traced.sizes)
    run = openvino.load(graph.path, engine, device="cpu", shared=shared())
    assert error(run(**inputs)[0], eager(traced, inputs)[0]) < TOLERANCES["float32"]


# ------------------------------------------------------------------------------------------------------------
# Processes without torch, or without the library

PROGRAM = """
import json, sys
for name in {blocked}:
    sys.modules[name] = None
from pathlib import Path
import numpy as np
from fastsd.bundle import Engine, TensorSpec
from fastsd.errors import MissingExtraError
from importlib import import_module
path, target, plain, given = sys.argv[1:]
plain = json.loads(plain)
for side in ("inputs", "outputs"):
    plain[side] = [TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in plain[side]]
backend = import_module("fastsd.backends." + target)
try:
    run = backend.load(Path(path), Engine(**plain), device="cpu", shared={{"threads": 1}})
except MissingExtraError as error:
    print(backend.available() == str(error), error)
    sys.exit()
inputs = dict(np.load(given))
np.save(given + ".npy", run(**inputs)[0])
print(sorted(name for name in ("torch", "onnx", "diffusers", "transformers") if sys.modules.get(name)))
"""


def run_program(blocked: list[str], path: Path, engine: Engine, given: Path) -> str:
    plain = json.dumps({**vars(engine), "inputs": [vars(one) for one in engine.inputs],
                        "outputs": [vars(one) for one in engine.outputs]})  # fmt: skip
    program = [sys.executable, "-c", PROGRAM.format(blocked=blocked), str(path), engine.target, plain, str(given)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=True, env={**os.environ})
    return done.stdout.strip()


@targets
def test_it_runs_without_torch(unet: tuple[Traced, graphs.Graph], tmp_path: Path, target: str) -> None:
    traced, graph = unet
    engine = engine_of(graph.path, graph, target, sizes=traced.sizes)
    inputs = arrays(traced, traced.sizes)
    np.savez(tmp_path / "given.npz", **inputs)
    blocked = ["torch", "onnx", "diffusers", "transformers", "onnxscript"]
    assert run_program(blocked, graph.path, engine, tmp_path / "given.npz") == "[]"
    got = np.load(tmp_path / "given.npz.npy")
    assert error(got, eager(traced, inputs)[0]) < TOLERANCES["float32"]


@pytest.mark.parametrize(("target", "library"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_library_names_the_extra(
    unet: tuple[Traced, graphs.Graph], tmp_path: Path, target: str, library: str
) -> None:
    traced, graph = unet
    engine = engine_of(graph.path, graph, target, sizes=traced.sizes)
    said = run_program([library], graph.path, engine, tmp_path)
    assert said == f"True {library} is not installed: pip install 'fastsd[cpu]'"


# ------------------------------------------------------------------------------------------------------------
# CUDA: the real sessions of ONNX Runtime on addresses of the CPU, streams that only remember


class Stream:
    """Remembers which stream it waited for; stands for torch.cuda.Stream."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.cuda_stream = name, log, 4660

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[Stream, list[str]]:
    """The engine's stream, and what streams did; the caller's is the current one."""
    log: list[str] = []
    engine, caller = Stream("engine", log), Stream("caller", log)
    current = [caller]

    @contextmanager
    def use(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: engine)
    return engine, log


def bound(graph: graphs.Graph, engine: Engine, stream: Any, log: list[str], *, captured: bool) -> Any:
    """`onnx.bind` on the CPU; the session's runs are logged."""
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    run = session.run_with_iobinding

    def logged(binding: Any, options: onnxruntime.RunOptions) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        log.append("run")
        run(binding, options)

    session.run_with_iobinding = logged
    return onnx.bind(session, engine, torch.device("cpu"), stream, threading.Lock(), graph=captured)


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
def test_tensors_are_read_and_written_where_they_lie(
    unet: tuple[Traced, graphs.Graph], streams: tuple[Stream, list[str]], captured: bool
) -> None:
    traced, graph = unet
    stream, log = streams
    engine = engine_of(graph.path, graph, "onnx", sizes=traced.sizes if captured else None)
    run = bound(graph, engine, stream, log, captured=captured)
    assert log == (["engine waits for caller", "run"] if captured else [])
    results = []
    for seed in range(3):
        log.clear()
        inputs = arrays(traced, traced.sizes if captured else {**traced.sizes, "height": 4 + seed}, seed)
        tensors = {name: torch.tensor(one) for name, one in inputs.items()}
        tensors["latents"] = tensors["latents"].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(seed == 1):
            [got] = run(**tensors)
        assert log == ["engine waits for caller", "run", "caller waits for engine"]
        assert not got.requires_grad
        results.append((got, eager(traced, inputs)[0]))
    for got, want in results:  # all of them still there
        assert error(got.numpy(), want) < TOLERANCES["float32"]
    assert "move it to cpu" in refusal(lambda: run(**{**tensors, "latents": tensors["latents"].to("meta")}))
    assert "pass just these" in refusal(lambda: run(latents=tensors["latents"]))


def test_every_dtype_of_a_bundle_has_the_number_that_onnx_gives_it() -> None:
    from onnx import TensorProto

    names = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64"}
    assert {name: TensorProto.DataType.Value(names[name]) for name in names} == onnx._ELEMENT_TYPES


@pytest.mark.parametrize(
    ("fixed", "refused", "modes"),
    [(False, False, ["0"]), (True, False, ["1"]), (True, True, ["1", "0"])],
    ids=["ranges", "static", "refused"],
)
def test_the_cuda_provider_is_told_what_it_must_know(
    unet: tuple[Traced, graphs.Graph],
    streams: tuple[Stream, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    fixed: bool,
    refused: bool,
    modes: list[str],
) -> None:
    traced, graph = unet
    seen: list[Any] = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: Path, options: onnxruntime.SessionOptions, providers: list[Any]) -> None:
            seen.append(providers)
            if refused and providers[0][1]["enable_cuda_graph"] == "1":
                raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    made: list[Any] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnx, "bind", lambda *given, graph: made.append((given[2], graph)))
    engine = engine_of(graph.path, graph, "onnx", sizes=traced.sizes if fixed else None)
    engine = Engine(**{**vars(engine), "options": {"provider": {"prefer_nhwc": "1"}}})
    pipeline = shared()

    def load() -> None:
        onnx.load(graph.path, engine, device="cuda:1", shared=pipeline)

    if refused:
        with pytest.warns(UserWarning, match="denoiser runs without a CUDA graph"):
            load()
    else:
        load()
    assert [providers[0][1]["enable_cuda_graph"] for providers in seen] == modes
    name, options = seen[-1][0]
    assert name == "CUDAExecutionProvider"
    assert options == {
        "device_id": "1",
        "user_compute_stream": "4660",
        "enable_cuda_graph": modes[-1],
        "use_tf32": "0",
        "prefer_nhwc": "1",
    }
    assert made == [(torch.device("cuda:1"), modes[-1] == "1")]
    assert pipeline["onnx"][0] is streams[0]


# ------------------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize(
    ("cpus", "siblings", "quota", "expected"),
    [
        ({0, 1, 2, 3}, "{cpu}", "", 4),
        ({0, 1, 2, 3}, "{pair}", "", 2),  # two threads of a core
        ({0, 2}, "{pair}", "", 2),
        ({0, 1, 2, 3}, "", "max 100000", 4),
        (set(range(64)), "{cpu}", "250000 100000", 2),
        (set(range(8)), "{cpu}", "50000 100000", 1),
    ],
)
def test_threads_are_the_cores_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, cpus: set[int], siblings: str, quota: str, expected: int
) -> None:
    def read(path: str) -> str:
        if path == "/sys/fs/cgroup/cpu.max":
            return quota
        cpu = int("".join(filter(str.isdigit, path)))
        return siblings.format(cpu=cpu, pair=f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}")

    monkeypatch.setattr(base, "_read", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    assert base.threads() == expected


# ------------------------------------------------------------------------------------------------------------
# Building for OpenVINO


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_an_engine_is_built_from_a_graph(
    unet: tuple[Traced, graphs.Graph], tmp_path: Path, precision: str, capfd: pytest.CaptureFixture[str]
) -> None:
    traced, graph = unet
    calibration = [arrays(traced, traced.sizes, seed) for seed in range(4)] if precision == "int8" else []
    built = builder.build(graph.path, DYNAMIC, tmp_path, precision=precision, calibration=calibration)
    assert capfd.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["denoiser.bin", "denoiser.xml"]
    assert built.path == "denoiser.xml"
    weights = sum(int(np.prod(one.shape)) for one in traced.module.component.state_dict().values())  # type: ignore[operator]
    # `prepare` has the rest of the parameters; of int8, norms and biases stay in float16.
    each = {"float32": (2.5, 4.1), "bfloat16": (1.2, 2.1), "int8": (0.6, 1.6)}[precision]
    assert each[0] < (tmp_path / "denoiser.bin").stat().st_size / weights < each[1]
    engine = engine_of(tmp_path / built.path, graph, "openvino", precision)
    run = openvino.load(tmp_path / built.path, engine, device="cpu", shared=shared())
    inputs = arrays(traced, {**traced.sizes, "height": 6, "tokens": 9}, 9)  # not the sizes of the calibration
    # Random weights: int8 does worse on them than on a trained model.
    floor = {"float32": 1 - 1e-9, "bfloat16": 0.9995, "int8": 0.98}[precision]
    assert cosine(run(**inputs)[0], eager(traced, inputs)[0]) > floor


def test_what_cannot_be_built_is_refused(unet: tuple[Traced, graphs.Graph], tmp_path: Path) -> None:
    traced, graph = unet
    inputs = arrays(traced, traced.sizes)

    def build(path: Path = graph.path, precision: str = "int8", calibration: Any = ()) -> object:
        return builder.build(path, DYNAMIC, tmp_path, precision=precision, calibration=calibration)

    assert "float32, float16, bfloat16, int8" in refusal(lambda: build(precision="int4"))
    assert "needs calibration inputs" in refusal(lambda: build())
    assert "takes no calibration inputs" in refusal(lambda: build(precision="float32", calibration=[inputs]))
    assert "export it again" in refusal(lambda: build(tmp_path / "absent.onnx", "float32"))
    assert "latents [?,4,?,?]" in refusal(lambda: build(calibration=[{"latents": inputs["latents"]}]))
    assert "modulation" in refusal(lambda: build(calibration=[{**inputs, "modulation": inputs["modulation"][:, 1:]}]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["openvino", "nncf"])
def test_a_library_that_builds_may_be_missing(
    unet: tuple[Traced, graphs.Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    traced, graph = unet
    monkeypatch.setitem(sys.modules, library, None)
    calibration = [arrays(traced, traced.sizes)]
    with pytest.raises(MissingExtraError, match=f"{library}.*not installed: pip install 'fastsd"):
        builder.build(graph.path, DYNAMIC, tmp_path, precision="int8", calibration=calibration)
