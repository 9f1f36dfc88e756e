"""The real TensorRT for RTX: its parser and its builder run without a GPU, so all graphs go through them.

It shares TensorRT's Python surface and its parser; what it builds is for other GPUs, and nothing runs here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from refusals import refusal
from trt.conftest import GPU

from fastsd import checkpoint, families
from fastsd.backends import tensorrt
from fastsd.bundle import Engine
from fastsd.errors import InputError
from fastsd_export import trace
from fastsd_export.onnx import Graph, opset_of, rebuild, write
from fastsd_export.tensorrt import build

RANGES = {"batch": (1, 2, 4), "height": (4, 16, 24), "width": (4, 16, 24), "tokens": (7, 77, 154)}


def export(traced: trace.Traced, folder: Path, precision: str) -> Graph:
    ranges = {name: RANGES[name] for name in traced.sizes}
    opset = opset_of("tensorrt-rtx", traced.component, precision)
    return write(traced, ranges, folder, precision=precision, opset=opset)


def components(folder: Path) -> Iterator[trace.Traced]:
    """All of a checkpoint."""
    loaded = families.load(checkpoint.source(folder, None), torch.float32, torch.device("cpu"))
    family = families.family(loaded.index["_class_name"])
    for encoder, module in zip(family.ENCODERS, loaded.text_encoders, strict=True):
        length = 77 if encoder.is_clip else 12
        yield trace.text_encoder(encoder, module, length, 2 if encoder.is_clip else 1)
    yield trace.prepare(family, loaded, 7)
    yield trace.denoiser(family, loaded, 7)
    yield trace.vae_decoder(loaded.vae)
    yield trace.vae_encoder(loaded.vae)


@pytest.fixture(scope="module")
def encoder(make_checkpoint: Callable[..., Path]) -> trace.Traced:
    """The smallest component with an attention."""
    return next(components(make_checkpoint("sd")))


@pytest.fixture(scope="module")
def graph(encoder: trace.Traced, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return export(encoder, tmp_path_factory.mktemp("graph"), "float16")


def test_a_component(graph: Graph, tmp_path: Path) -> None:
    """As `fastsd export --to tensorrt-rtx` does, and what loading the plan says where there is no GPU."""
    steps: list[tuple[str, int, int]] = []
    made = build(graph.path, RANGES, tmp_path, precision="float16", rtx=True, progress=lambda *step: steps.append(step))
    assert made.files == (tmp_path / "text_encoder.plan",)
    assert made.files[0].stat().st_size > 2**18
    assert made.warnings == ()
    assert steps and all(0 < done <= total for _, done, total in steps)
    trt = tensorrt.library("tensorrt-rtx")
    assert made.versions["tensorrt-rtx"] == trt.__version__
    if not torch.cuda.is_available():
        log = tensorrt.Log(trt, "tensorrt-rtx")
        assert "cudaError" in refusal(lambda: tensorrt.deserialize(trt, log, made.files[0], host_code=False))
    engine = Engine("text_encoder", "tensorrt-rtx", made.files[0].name, "float16", graph.inputs, graph.outputs, {})
    with pytest.raises(InputError, match="TensorRT for RTX runs on NVIDIA GPUs only"):
        tensorrt.load(made.files[0], engine, device="cpu", shared={})


def test_a_component_over_the_fake(gpu: GPU, encoder: trace.Traced, graph: Graph, tmp_path: Path) -> None:
    """Not of RTX; here as it shares the export."""
    # As onnxruntime in float16 keeps to eager float32 on this model.
    run_and_refit(encoder, graph, tmp_path, "float16", tolerance=2e-2)


def run_and_refit(traced: trace.Traced, graph: Graph, folder: Path, precision: str, tolerance: float) -> None:
    """Results as torch's, with the weights it was built of and with others, given by the names of its initialisers."""
    made = build(graph.path, RANGES, folder, precision=precision, refit="strip")
    specs = {spec.name: getattr(torch, spec.dtype) for spec in graph.inputs}
    profile = {name: RANGES[name] for name in traced.sizes}
    engine = Engine(
        *(traced.component, "tensorrt", made.files[0].name, precision, graph.inputs, graph.outputs, profile),
        options=made.options,
    )
    run = tensorrt.load(made.files[0], engine, device="cpu", shared={})
    module: Any = traced.module
    original, inputs = module.component, {name: traced.inputs[name].to(kind) for name, kind in specs.items()}
    torch.manual_seed(0)
    other = copy.deepcopy(original)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for weights in (original, other):
        run.refit(rebuild(graph.weights, weights.state_dict()))
        module.component = weights
        with torch.no_grad():
            wanted = module(**{name: tensor.to(traced.inputs[name].dtype) for name, tensor in inputs.items()})
        for _ in range(3):
            results = run(**inputs)
        for result, expected in zip(results, wanted, strict=True):
            stray = (result.float() - expected).abs().max() / expected.abs().max()
            assert stray < tolerance, f"{traced.component}: {stray}"
    module.component = original


def test_what_it_refuses(tmp_path: Path) -> None:
    """With its own words, which only its log has."""
    path = tmp_path / "strange.onnx"
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 4])
    node = helper.make_node("Mystery", ["x"], ["y"], "the node", domain="ours")
    graph = helper.make_graph([node], "strange", [port], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("ours", 1)], ir_version=10), path)
    assert "Mystery the node: " in refusal(lambda: build(path, RANGES, tmp_path, precision="float16", rtx=True))
    path.write_bytes(b"\0garbage")
    assert "cannot be read" in refusal(lambda: build(path, RANGES, tmp_path, precision="float16", rtx=True))
    assert not list(tmp_path.glob("*.plan"))


OPTIONS: dict[str, dict[str, Any]] = {
    "level 0": {"level": 0},
    "level 5": {"level": 5},
    "streamed": {"weight_streaming": True},
    "named GPUs": {"compute_capabilities": ("SM86", "SM89")},
    "workspace": {"workspace": 2**28, "aux_streams": 0},
    "two profiles": {},
}


@pytest.mark.full
@pytest.mark.parametrize("name", OPTIONS)
def test_options(make_checkpoint: Callable[..., Path], tmp_path: Path, name: str) -> None:
    decoder = next(one for one in components(make_checkpoint("sd")) if one.component == "vae_decoder")
    graph = export(decoder, tmp_path, "float16")
    profiles = [RANGES, {**RANGES, "height": (16, 16, 16)}] if name == "two profiles" else RANGES
    build(graph.path, profiles, tmp_path, precision="float16", rtx=True, **OPTIONS[name])
    assert (tmp_path / "vae_decoder.plan").stat().st_size > 2**20


@pytest.mark.full
@pytest.mark.parametrize("refit", ["refit", "strip", "identical"])
def test_a_refit_needs_a_gpu_even_to_be_built(make_checkpoint: Callable[..., Path], tmp_path: Path, refit: str) -> None:
    """So that the fake has to do; were it built some day, this would say so."""
    decoder = next(one for one in components(make_checkpoint("sd")) if one.component == "vae_decoder")
    graph = export(decoder, tmp_path, "float16")
    assert "cannot build 'vae_decoder.onnx' (" in refusal(
        lambda: build(graph.path, RANGES, tmp_path, precision="float16", rtx=True, refit=refit)
    )


@pytest.mark.full
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_component(make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, precision: str) -> None:
    done = []
    for traced in components(make_checkpoint(family)):
        made = build(export(traced, tmp_path, precision).path, RANGES, tmp_path, precision=precision, rtx=True)
        assert made.files[0].stat().st_size > 2**17
        done.append(traced.component)
    assert {"text_encoder", "prepare", "denoiser", "vae_decoder", "vae_encoder"} <= set(done)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_component_over_the_fake(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    graphs = []
    for traced in components(make_checkpoint(family)):
        folder = tmp_path / traced.component
        folder.mkdir()
        graphs.append((traced, export(traced, folder, "float32")))
    request.getfixturevalue("gpu")  # only now: torch.export would believe in it too
    for traced, graph in graphs:
        run_and_refit(traced, graph, tmp_path, "float32", tolerance=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_decoder_of_stable_diffusion_at_its_width(tmp_path: Path, precision: str) -> None:
    """49 million parameters, and an attention with one head of 512, for which there is no fused kernel."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    graph = export(trace.vae_decoder(vae), tmp_path, precision)
    made = build(graph.path, RANGES, tmp_path, precision=precision, rtx=True)
    assert made.files[0].stat().st_size > 2 * 49_000_000
