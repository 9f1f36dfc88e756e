"""Build, load, run, refit and strip, from end to end over the fake; the real thing needs a GPU."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from refusals import refusal
from torch import Tensor
from trt import fake
from trt.conftest import GPU

from fastsd.backends import tensorrt
from fastsd.bundle import Engine, TensorSpec
from fastsd.errors import InputError, MissingExtraError
from fastsd_export.tensorrt import Built, build, refit

RANGES = {"batch": (1, 2, 4), "height": (4, 8, 16), "width": (4, 8, 16)}
INPUTS = (
    TensorSpec("latents", "float32", ("batch", 4, "height", "width")),
    TensorSpec("modulation", "float16", ("batch", 8)),
)
OUTPUTS = (TensorSpec("prediction", "float32", ("batch", 4, "height", "width")),)


def random_weights(seed: int) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    shapes = {"conv.weight": (4, 4, 1, 1), "conv.bias": (4,), "modulate": (8, 4)}
    return {name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def write_graph(path: Path, seed: int = 0) -> Path:
    """A denoiser in small: convolution, modulation, attention, in float16 between float32 latents."""
    make = helper.make_node
    nodes = [
        make("Cast", ["latents"], ["x"], "cast_in", to=TensorProto.FLOAT16),
        make("Conv", ["x", "conv.weight", "conv.bias"], ["y"], "conv"),
        make("MatMul", ["modulation", "modulate"], ["m"], "matmul"),
        make("Unsqueeze", ["m", "axes"], ["shift"], "unsqueeze"),
        make("Add", ["y", "shift"], ["z"], "add"),
        make("Attention", ["z", "z", "z"], ["a"], "attention"),
        make("Cast", ["a"], ["prediction"], "cast_out", to=TensorProto.FLOAT),
    ]
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    ports = [
        [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape) for spec in specs]
        for specs in (INPUTS, OUTPUTS)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in random_weights(seed).items()]
    constants.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    graph = helper.make_graph(nodes, "denoiser", *ports, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "denoiser.onnx")


def entry(target: str = "tensorrt", **options: Any) -> Engine:
    return Engine("denoiser", target, "denoiser.plan", "float16", INPUTS, OUTPUTS, RANGES, options=options)


def make(graph: Path, **options: Any) -> tuple[Built, Engine]:
    built = build(graph, RANGES, graph.parent, precision="float16", **options)
    return built, entry("tensorrt-rtx" if options.get("rtx") else "tensorrt", **built.options)


def load(built: Built, engine: Engine, shared: dict[str, Any] | None = None) -> tensorrt.Loaded:
    return tensorrt.load(built.files[0], engine, device="cpu", shared={} if shared is None else shared)


def arguments(seed: int, batch: int = 2, height: int = 8, width: int = 12) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"latents": torch.randn(batch, 4, height, width), "modulation": torch.randn(batch, 8).half()}


def expected(graph: Path, inputs: Mapping[str, Tensor]) -> NDArray[Any]:
    """By onnxruntime, of the file itself."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    return result


def check(run: tensorrt.Loaded, graph: Path, *seeds: int, **size: int) -> None:
    for seed in seeds:
        inputs = arguments(seed, **size)
        (result,) = run(**inputs)
        np.testing.assert_array_equal(result.numpy(), expected(graph, inputs))  # the same library, the same graph


def test_from_graph_to_results(gpu: GPU, graph: Path) -> None:
    built, engine = make(graph)
    assert built.files == (graph.with_suffix(".plan"),)
    assert built.versions == {"tensorrt": "11.4.0.106", "onnx parser": "110400"}
    assert built.machine == {"gpu": "NVIDIA H200", "compute_capability": [9, 0]}
    run = load(built, engine)
    inputs = [arguments(seed) for seed in range(4)]
    results = [run(**one)[0] for one in inputs]
    for one, result in zip(inputs, results, strict=True):  # those of the first calls survived the later ones
        np.testing.assert_array_equal(result.numpy(), expected(graph, one))
    # The first call as it is, the second captures, and all the others replay.
    assert fake.calls.count("IExecutionContext.execute_async_v3") == 2
    assert fake.calls.count("ICudaEngine.create_execution_context") == 1


def test_streams_wait_for_each_other(gpu: GPU, graph: Path) -> None:
    run = load(*make(graph))
    fake.calls.clear()
    run(**arguments(0))
    order = [call for call in fake.calls if "waits" in call or "execute" in call]
    assert order == ["ours waits for caller", "IExecutionContext.execute_async_v3", "caller waits for ours"]


def test_arguments_need_not_be_contiguous(gpu: GPU, graph: Path) -> None:
    run = load(*make(graph))
    inputs = arguments(0)
    inputs["latents"] = inputs["latents"].to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(run(**inputs)[0].numpy(), expected(graph, inputs))


def test_many_shapes(gpu: GPU, graph: Path) -> None:
    run = load(*make(graph))
    for _ in range(2):
        for height in range(4, 14):  # more than are kept
            check(run, graph, 0, 1, height=height)
    assert len(run._bound) == 8
    assert len(run._arena.bound) == 8
    # Each round makes them anew: the oldest goes first, and is the next that is asked for.
    assert fake.calls.count("ICudaEngine.create_execution_context") == 20


def test_profiles_in_one_plan(gpu: GPU, graph: Path) -> None:
    small = dict.fromkeys(RANGES, (1, 2, 4))
    middle = {"batch": (2, 2, 2), "height": (8, 8, 8), "width": (8, 12, 12)}
    built = build(graph, [small, RANGES, middle], graph.parent, precision="float16")
    run = load(built, entry(**built.options))
    check(run, graph, 0, 1, height=8)
    check(run, graph, 0, 1, height=9)
    check(run, graph, 0, 1, height=4, width=4)
    contexts = {shapes[0][2:]: bound.context._profile for shapes, bound in run._bound.items()}
    assert contexts == {(8, 12): 2, (9, 12): 1, (4, 4): 0}  # the tightest
    with pytest.raises(InputError, match="batch"):
        run(**arguments(0, batch=5))
    gapped = build(graph, [small, middle], graph.parent, precision="float16")
    run = load(gapped, entry(**gapped.options))
    assert "no profile of the denoiser engine holds latents [2, 4, 9, 12]" in refusal(
        lambda: run(**arguments(0, height=9))
    )


def test_engines_share_an_arena(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {}
    first = load(*make(graph), shared)
    check(first, graph, 0, 1, 2)
    arena = shared["arena"]
    held = arena.memory
    assert held.numel() == first._plan.device_memory_size_v2
    # A larger one comes: the block grows, and what was captured with the old one is captured anew.
    model = onnx.load(graph)
    model.graph.node.extend(
        helper.make_node("Identity", [f"i{k - 1}" if k else "prediction"], [f"i{k}"]) for k in range(9)
    )
    model.graph.output[0].name = "i8"
    larger = tmp_path / "larger.onnx"
    onnx.save(model, larger)
    built = build(larger, RANGES, tmp_path, precision="float16")
    outputs = (TensorSpec("i8", "float32", OUTPUTS[0].shape),)
    second = load(built, Engine("vae_decoder", "tensorrt", "larger.plan", "float16", INPUTS, outputs, RANGES), shared)
    check(second, graph, 0, 1, 2)
    assert arena.memory.numel() == second._plan.device_memory_size_v2 > held.numel()
    check(first, graph, 3, 4, 5)
    check(second, graph, 3)


def test_two_threads(gpu: GPU, graph: Path) -> None:
    shared: dict[str, Any] = {}
    engines = [load(*make(graph), shared), load(*make(graph), shared)]
    inputs = [arguments(seed, batch=1 + seed % 2) for seed in range(6)]
    wanted = [expected(graph, one) for one in inputs]
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for i in range(40):
                k = (i + offset) % len(inputs)
                np.testing.assert_array_equal(engines[i % 2](**inputs[k])[0].numpy(), wanted[k])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_refit_with_other_weights(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    run = load(*make(graph, refit="refit"))
    check(run, graph, 0, 1, 2)
    other = write_graph(tmp_path / "other.onnx", seed=1)
    run.refit(random_weights(1))
    check(run, other, 0, 1, 2)
    run.refit({name: torch.from_numpy(array) for name, array in random_weights(0).items()})
    check(run, graph, 0)
    run.refit_from_onnx(other)
    check(run, other, 0)


def test_refit_of_a_few_weights(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    """As a LoRA does: what the engine has combined with them is looked up too, and nothing else."""
    run = load(*make(graph, refit="refit"))
    changed = {**random_weights(0), "conv.weight": random_weights(1)["conv.weight"]}
    read: list[str] = []

    class Recording(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            read.append(name)
            return super().__getitem__(name)

    run.refit(Recording(changed), ["conv.weight"])
    assert read == ["conv.weight", "conv.bias"]
    other = tmp_path / "other.onnx"
    model = onnx.load(graph)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed["conv.weight"], "conv.weight"))
    onnx.save(model, other)
    check(run, other, 0, 1, 2)


@pytest.mark.parametrize(
    ("change", "names", "sentence"),
    [
        ({}, ["conv.wait"], "the engine has no weights conv.wait that can be replaced"),
        ({"conv.weight": np.zeros((4, 4), np.float16)}, None, "are 4 numbers|16 of float16"),
        ({"conv.weight": np.zeros(3, np.float16)}, None, "'conv.weight' are 3 numbers of float16"),
        ({"conv.weight": np.zeros(16, np.float32)}, None, "16 numbers of float32, and the engine takes 16 of float16"),
        ({"conv.bias": None}, ["conv.weight"], "the weights conv.bias are needed too"),
        ({"conv.shape": np.zeros(4, np.float16)}, None, "the engine has no weights conv.shape that can be replaced"),
    ],
    ids=["no such name", "any shape of the size", "another size", "another dtype", "a half of a pair", "one too many"],
)
def test_wrong_weights_change_nothing(
    gpu: GPU, graph: Path, change: dict[str, Any], names: list[str] | None, sentence: str
) -> None:
    run = load(*make(graph, refit="refit"))
    weights = {name: array for name, array in {**random_weights(0), **change}.items() if array is not None}
    if "|" in sentence:
        run.refit(weights, names)
        return
    assert sentence in refusal(lambda: run.refit(weights, names))
    check(run, graph, 0, 1, 2)


def test_a_refit_that_fails_half_way(gpu: GPU, graph: Path) -> None:
    run = load(*make(graph, refit="refit"))
    check(run, graph, 0, 1)
    fake.faults["Refitter.refit_cuda_engine"] = "CUDA error"
    assert "could not be put into the engine (CUDA error)" in refusal(lambda: run.refit(random_weights(1)))
    assert "the denoiser engine was refitted only in part: load it again" in refusal(lambda: run(**arguments(0)))
    fake.faults.clear()
    run.refit(random_weights(0))
    check(run, graph, 0)


def test_an_engine_that_takes_no_weights(gpu: GPU, graph: Path) -> None:
    built, engine = make(graph)
    assert "takes no other weights" in refusal(lambda: load(built, engine).refit(random_weights(1)))
    assert "was not built to take other weights" in refusal(lambda: refit(built.files[0], graph))
    run = load(*make(graph, refit="identical"))
    assert "takes no other weights" in refusal(lambda: run.refit(random_weights(1)))
    check(run, graph, 0)


@pytest.mark.parametrize("kind", ["strip", "identical"])
def test_stripped_plans(gpu: GPU, graph: Path, tmp_path: Path, kind: str) -> None:
    full = make(graph)[0].files[0].read_bytes()
    folder = tmp_path / "built"
    folder.mkdir()
    built = build(graph, RANGES, folder, precision="float16", refit=kind)
    engine = entry(**built.options)
    plan = built.files[0]
    assert built.files == (folder / "denoiser.plan", folder / "denoiser.onnx")
    assert random_weights(0)["conv.weight"].tobytes() in full
    assert random_weights(0)["conv.weight"].tobytes() not in plan.read_bytes()
    check(load(built, engine), graph, 0, 1, 2)  # with the weights beside it
    alone = load(built, replace(engine, options={"refit": kind}))
    assert "the denoiser engine holds no weights: refit it first" in refusal(lambda: alone(**arguments(0)))
    alone.refit_from_onnx(graph)
    check(alone, graph, 0, 1, 2)
    # Or on the side of the export, into a plan that has them.
    plan.write_bytes(refit(plan, graph))
    run = load(built, replace(engine, options={"refit": "refit"}))
    check(run, graph, 0, 1)
    run.refit(random_weights(0))
    check(run, graph, 0)


def test_stripped_plans_with_weights_outside_the_graph(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    large = tmp_path / "large" / "denoiser.onnx"
    large.parent.mkdir()
    onnx.save(onnx.load(graph), large, save_as_external_data=True, location="denoiser.onnx.data", size_threshold=0)
    folder = tmp_path / "built"
    folder.mkdir()
    for _ in range(2):  # a second build replaces the first
        built = build(large, RANGES, folder, precision="float16", refit="strip")
    assert [path.name for path in built.files] == ["denoiser.plan", "denoiser.onnx", "denoiser.onnx.data"]
    check(load(built, entry(**built.options)), graph, 0)


def test_weights_of_another_graph(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    built, _ = make(graph, refit="strip")
    model = onnx.load(graph)
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.zeros((9, 4), np.float16), "modulate"))
    onnx.save(model, tmp_path / "other.onnx")
    assert "Initializer modulate: weights are missing or of another size" in refusal(
        lambda: refit(built.files[0], tmp_path / "other.onnx")
    )
    assert "cannot open" in refusal(lambda: refit(built.files[0], tmp_path / "none.onnx"))


def test_streamed_weights(gpu: GPU, graph: Path) -> None:
    built, engine = make(graph, weight_streaming=True)
    assert engine.options["weight_streaming"]
    run = load(built, engine)  # all fit
    assert run._plan.weight_streaming_budget_v2 == run._plan.streamable_weights_size == 4 * (16 + 4 + 32)
    gpu.free = 2**28 + run._plan.device_memory_size_v2 + 4 * (16 + 4 + 32) // 2 + 100
    run = load(built, engine)
    assert run._plan.weight_streaming_budget_v2 == 100
    assert run._arena.need == run._plan.device_memory_size_v2
    check(run, graph, 0, 1, 2)
    assert not any(bound.graph for bound in run._bound.values())
    gpu.free = 2**28
    assert f"{2**28} bytes of GPU memory are free" in refusal(lambda: load(built, engine))
    run = load(built, replace(engine, options={**engine.options, "weight_streaming_budget": 64}))
    assert run._plan.weight_streaming_budget_v2 == 64
    fake.faults["ICudaEngine.weight_streaming_budget_v2"] = ""
    run_again = replace(engine, options={**engine.options, "weight_streaming_budget": 64})
    assert "a budget of 64 bytes for weights was not taken" in refusal(lambda: load(built, run_again))


@pytest.mark.parametrize(
    ("free", "streamable", "activations", "budget"),
    [
        (80 * 2**30, 24 * 2**30, 2**30, 24 * 2**30),
        (24 * 2**30, 24 * 2**30, 2**30, 23 * 2**30 - 2**28),  # far beyond the 32 bits of the bindings
        (2**30 + 2**28, 24 * 2**30, 2**30, 0),
    ],
    ids=["all fit", "some fit", "none fit"],
)
def test_streaming_budget(free: int, streamable: int, activations: int, budget: int) -> None:
    assert tensorrt.streaming_budget(free, streamable, activations) == budget


def test_version_compatible_plans_bring_code(gpu: GPU, graph: Path) -> None:
    built, engine = make(graph, version_compatible=True)
    check(load(built, engine), graph, 0)
    plain = replace(engine, options={})
    assert "does not load in TensorRT 11.4.0.106 (Cannot deserialize engine with lean runtime.)" in refusal(
        lambda: load(built, plain)
    )


def test_a_capture_that_fails_costs_only_speed(gpu: GPU, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    run = load(*make(graph))
    check(run, graph, 0)
    with pytest.warns(UserWarning, match="runs without a CUDA graph, and slower: operation not permitted"):
        check(run, graph, 1)
    check(run, graph, 2, 3)
    assert not any(bound.graph for bound in run._bound.values())


def test_rtx(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    built, engine = make(graph, rtx=True, compute_capabilities=("SM86", "SM89"))
    assert built.versions["tensorrt-rtx"] == "1.7.1.116"
    assert built.machine == {}
    shared: dict[str, Any] = {"cache": tmp_path / "cache"}
    run = load(built, engine, shared)
    check(run, graph, 0, 1, 2)
    (bound,) = run._bound.values()
    assert bound.graph is None  # the library captures itself
    assert bound.context._config.cuda_graph_strategy == fake.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    file = tmp_path / "cache" / "NVIDIA-H200-1-7-1-116.rtx"
    assert file.read_bytes() == b"kernels"
    file.write_bytes(b"more kernels")
    again: dict[str, Any] = {"cache": tmp_path / "cache"}
    check(load(built, engine, again), graph, 0)
    assert again["runtime_cache"]._kernels == b"more kernels"
    fake.faults["IRuntimeCache.deserialize"] = "of another driver"
    check(load(built, engine, {"cache": tmp_path / "cache"}), graph, 0)
    fake.faults.clear()
    (tmp_path / "file").touch()
    run = load(built, engine, {"cache": tmp_path / "file" / "folder"})
    check(run, graph, 0)
    with pytest.warns(UserWarning, match="the kernel cache .* is not written"):
        check(run, graph, 1)


def test_timing_cache(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    folder = tmp_path / "timing"
    make(graph, timing_cache=folder)
    (file,) = folder.iterdir()
    assert file.name == "NVIDIA-H200-11-4-0-106.timing"
    assert b"Attention" in file.read_bytes()
    file.write_bytes(b'["Softmax"]')
    make(graph, timing_cache=folder)
    assert b"Softmax" in file.read_bytes()
    assert b"Attention" in file.read_bytes()
    for strange in (b'["another GPU"]', b"\0garbage"):  # no reason to fail
        file.write_bytes(strange)
        make(graph, timing_cache=folder)
        assert b"Attention" in file.read_bytes()
    gpu.name = "NVIDIA RTX 4090"
    make(graph, timing_cache=folder)
    assert len(list(folder.iterdir())) == 2
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="the timing cache .* is not written"):
        make(graph, timing_cache=tmp_path / "file")
    fake.faults["IBuilderConfig.set_timing_cache"] = "no"
    assert "takes no timing cache (no)" in refusal(lambda: make(graph, timing_cache=folder))


def test_progress(gpu: GPU, graph: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    make(graph, progress=lambda *step: steps.append(step))
    assert steps == [("Building engine", done, 3) for done in (1, 2, 3)]

    class Stopped(BaseException):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    graph.with_suffix(".plan").unlink()
    with pytest.raises(Stopped):
        make(graph, progress=stop)
    assert not graph.with_suffix(".plan").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "fp16"}, "the precision 'fp16' is unknown"),
        ({"precision": "bfloat16"}, "computes in float16, float32, not in bfloat16"),
        ({"level": 6}, "level 6 is out of range"),
        ({"refit": "some"}, "refit='some' is unknown: use None, 'refit', 'strip', 'identical'"),
        ({"hardware_compatibility": "ada"}, "hardware_compatibility='ada' is unknown"),
        ({"rtx": True, "version_compatible": True}, "has no version- or hardware-compatible plans"),
        ({"rtx": True, "compute_capabilities": ("SM42",)}, "'SM42' is unknown: use SM80, SM86, SM89"),
        ({"compute_capabilities": ("SM89",)}, "compute_capabilities are for TensorRT for RTX"),
        ({"ranges": []}, "there are no ranges"),
        ({"ranges": {"batch": (1, 1, 1)}}, "the graph leaves 'height' open, and ranges are given of batch"),
        ({"ranges": {**RANGES, "height": (4, 2, 8)}}, "the range of height is 4:2:8"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_options(gpu: GPU, graph: Path, options: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"precision": "float16", "ranges": RANGES, **options}
    assert sentence in refusal(lambda: build(graph, folder=graph.parent, **given).files)
    assert not graph.with_suffix(".plan").exists()


def test_graphs_that_cannot_be_read(gpu: GPU, graph: Path, tmp_path: Path) -> None:
    def parse(path: Path) -> str:
        return refusal(lambda: build(path, RANGES, tmp_path, precision="float16"))

    assert "is not a file" in parse(tmp_path / "none.onnx")
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\0garbage")
    assert "the file: Failed to parse ONNX model" in parse(garbage)
    model = onnx.load(graph)
    model.opset_import.append(helper.make_opsetid("ours", 1))
    for index in (1, 4):
        model.graph.node[index].domain = "ours"
    onnx.save(model, garbage)
    assert (
        "cannot be read: Conv conv: No importer registered for op: Conv, Add add: No importer registered for op: Add"
        in parse(garbage)
    )


# What is said when a method fails, of which only the log knows why.
FAILURES = {
    "Builder.__init__": "LIBRARY does not start (why)",
    "Builder.create_network": "LIBRARY gave no network or no configuration (why)",
    "Builder.create_builder_config": "LIBRARY gave no network or no configuration (why)",
    "Builder.build_serialized_network": "LIBRARY cannot build 'denoiser.onnx' (why)",
    "OnnxParser.__init__": "LIBRARY gave no parser (why)",
    "OnnxParser.parse_from_file": "'denoiser.onnx' cannot be read (why)",
    "IBuilderConfig.add_optimization_profile": "was not taken (why)",
    "Runtime.__init__": "LIBRARY does not start (why)",
    "Runtime.deserialize_cuda_engine": "does not load in LIBRARY (why)",
    "ICudaEngine.create_runtime_config": "gave no runtime configuration (why)",
    "ICudaEngine.create_execution_context": "the denoiser engine gave no execution context (why)",
    "ICudaEngine.get_tensor_location latents": "wants latents in host memory",
    "IExecutionContext.set_optimization_profile_async": "the denoiser engine did not take its profile 0 (why)",
    "IExecutionContext.set_input_shape": "did not take latents of shape [2, 4, 8, 12] (why)",
    "IExecutionContext.infer_shapes": "the denoiser engine cannot tell its shapes without latents, modulation",
    "IExecutionContext.get_tensor_shape": "the denoiser engine has outputs of shapes that depend on data",
    "IExecutionContext.set_tensor_address": "the denoiser engine did not take the address of latents (why)",
    "IExecutionContext.execute_async_v3": "the denoiser engine failed to run (why)",
    "Refitter.__init__": "LIBRARY gave no refitter (why)",
    "Refitter.set_named_weights": "the engine does not take the weights 'conv.weight' (why)",
    "Refitter.refit_cuda_engine": "the weights could not be put into the engine (why)",
    "OnnxParserRefitter.__init__": "LIBRARY gave no parser (why)",
    "OnnxParserRefitter.refit_from_file": "do not fit the engine (why)",
    "ISerializationConfig.set_flag": "the plan cannot be written with its weights (why)",
    "ISerializationConfig.clear_flag": "the plan cannot be written with its weights (why)",
    "ICudaEngine.serialize_with_config": "the plan with its new weights cannot be written (why)",
}
RTX_FAILURES = {
    "RtxRuntimeConfig.create_runtime_cache": "LIBRARY gave no kernel cache (why)",
    "RtxRuntimeConfig.set_runtime_cache": "the denoiser engine takes no kernel cache (why)",
    "RtxBuilderConfig.set_compute_capability": "LIBRARY does not build for SM89 (why)",
}


@pytest.mark.parametrize(
    ("rtx", "method", "sentence"),
    [
        *((False, *failure) for failure in FAILURES.items()),
        *((True, *failure) for failure in (FAILURES | RTX_FAILURES).items()),
    ],
    ids=lambda value: {False: "tensorrt", True: "rtx"}.get(value, str(value).partition(" ")[0]),
)
def test_every_failure_is_a_sentence(gpu: GPU, graph: Path, rtx: bool, method: str, sentence: str) -> None:
    options: dict[str, Any] = {"rtx": True, "compute_capabilities": ("SM89",)} if rtx else {}
    fake.faults[method] = "why"

    def everything() -> None:
        built, engine = make(graph, refit="refit", **options)
        run = load(built, engine)
        run(**arguments(0))
        run.refit(random_weights(1))
        refit(built.files[0], graph, rtx=rtx)

    name = "TensorRT for RTX 1.7.1.116" if rtx else "TensorRT 11.4.0.106"
    assert sentence.replace("LIBRARY", name) in refusal(everything)


def test_plans_that_are_none(gpu: GPU, graph: Path) -> None:
    built, engine = make(graph)
    for content in (b"", b"garbage", None):
        built.files[0].unlink() if content is None else built.files[0].write_bytes(content)
        message = refusal(lambda: load(built, engine))
        assert message.endswith("build it again on this machine")


@pytest.mark.parametrize(
    "change",
    [{"inputs": INPUTS[:1]}, {"outputs": (TensorSpec("prediction", "float16", ()),)}],
    ids=["an input less", "another dtype"],
)
def test_a_plan_of_another_component(gpu: GPU, graph: Path, change: dict[str, Any]) -> None:
    built, engine = make(graph)
    message = refusal(lambda: load(built, replace(engine, **change)))
    assert "where its manifest has" in message


def test_wrong_arguments(gpu: GPU, graph: Path) -> None:
    run = load(*make(graph))
    inputs = arguments(0)
    for wrong in ({"latents": inputs["latents"]}, {**inputs, "modulation": inputs["modulation"].float()}):
        with pytest.raises(InputError, match="modulation"):
            run(**wrong)
    assert "IExecutionContext.execute_async_v3" not in fake.calls


def test_too_little_gpu_memory(gpu: GPU, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(*make(graph))
    real = torch.empty

    def full(*shape: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    assert "bytes of GPU memory are needed for activations and not free" in refusal(lambda: run(**arguments(0)))
    monkeypatch.setattr(torch, "empty", real)
    check(run, graph, 0, 1)


def test_a_full_disk(gpu: GPU, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(lambda: make(graph))
    assert f"{graph.with_suffix('.plan').name}" in message
    assert "bytes are needed" in message
    assert os.listdir(graph.parent) == [graph.name]


def test_where_it_can_run(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for target in tensorrt.FLAVOURS:
        monkeypatch.setitem(sys.modules, target.replace("-", "_"), fake.module(target))
    available = tensorrt.available
    assert available("cpu") == "TensorRT runs on NVIDIA GPUs only, not on 'cpu': use device='cuda'"
    assert "sees no CUDA GPU: TensorRT for RTX needs one" in str(available("cuda:0", "tensorrt-rtx"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available("cuda") is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert available("cuda") == (
        "TensorRT shares torch's CUDA memory, and torch is not installed: pip install 'fastsd[torch]'"
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    assert "pip install 'fastsd[tensorrt]'" in str(available("cuda"))
    engine = entry()
    with pytest.raises(MissingExtraError, match="TensorRT is not installed or does not load"):
        tensorrt.load(Path("denoiser.plan"), engine, device="cuda", shared={})


def test_libraries_that_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt")
    old.__version__ = "10.16.1.11"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(InputError, match=r"TensorRT 10\.16\.1\.11 is too old: install 11 or later"):
        tensorrt.library("tensorrt")
    # The bindings without their libraries: the reason is said.
    missing = "libnvinfer.so.11: cannot open shared object file: No such file or directory"

    def import_module(name: str) -> ModuleType:
        if name == "tensorrt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        raise ImportError(missing)

    monkeypatch.setattr(tensorrt.importlib, "import_module", import_module)
    with pytest.raises(MissingExtraError, match=rf"does not load \({missing}\): pip install 'fastsd\[tensorrt\]'"):
        tensorrt.library("tensorrt")
