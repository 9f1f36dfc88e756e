"""The compile backend. Oracle: the eager backend on the same weights, and the numpy loop for the sampler.

Most cases trace with Dynamo and run the traced graphs as they are (`traced`): graph breaks, shared blocks, recompiles
and guards are Dynamo's, and the same operations give the same bits. TorchInductor itself takes seconds a graph: here it
compiles two of them, whole pipelines in `full`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file
from torch import Tensor

from fastsd import families, store
from fastsd.backends import compile as compiled
from fastsd.backends import eager
from fastsd.checkpoint import resolve, source
from fastsd.denoisers.flux import SingleBlock
from fastsd.errors import MissingExtraError
from fastsd.pipeline import Pipeline
from fastsd.sampling import fused, loop
from fastsd.sampling.graph import Graphs
from fastsd.sampling.schedulers import resolve_scheduler
from fastsd.sampling.table import StepTable
from fastsd.text import Conditioning
from fastsd_kernels import cpu_step

Make = Callable[..., Path]
FAMILIES = ("sd", "sdxl", "sd3", "flux")
SIZES = [(64, 64), (96, 64), (64, 96), (80, 112), (96, 96)]
BATCHES = [1, 2, 4]
RUN: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "FASTSD_HOME", str(tmp_path_factory.getbasetemp() / "home")
    )  # one for all: kernels are built once


def traced(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """A compiler that changes nothing."""
    call: Callable[..., Any] = graph.forward
    return call


def load(folder: Path, dtype: torch.dtype = torch.float32) -> families.Components:
    return families.load(source(folder), dtype, torch.device("cpu"))


def make_pipe(components: families.Components, **options: Any) -> Pipeline:
    family = families.family(components.index["_class_name"])
    return Pipeline(components, name="tiny", engines=compiled.engines(family, components, **options))


def denoise(pipe: Pipeline, batch: int = 1, side: int = 8) -> Tensor:
    """One step of a Flux pipeline: two graphs, without those of text and VAE."""
    generator = torch.Generator().manual_seed(batch)
    context, pooled = (torch.randn(batch, *shape, generator=generator) for shape in ((9, 32), (24,)))
    conditioning = Conditioning(context, pooled, np.full(batch, 3.5))
    timesteps = np.full((1, batch), 500.0)
    modulation, *others = eager.functions(pipe.family, pipe.components).prepare(timesteps, conditioning, (side, side))
    latents = torch.randn(batch, 16, side, side, generator=generator)
    prediction: Tensor = pipe.functions.denoise(latents, modulation[0], *others)
    return prediction


def run(pipe: Pipeline, batch: int = 1, size: tuple[int, int] = (64, 64), **options: Any) -> Any:
    prompts = ["a red cat", "the cat", "red", "a"][:batch]
    arguments = {"height": size[0], "width": size[1], "seed": list(range(batch)), **RUN, **options}
    return pipe(prompts, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Tracing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "whole"),
    [
        *((family, False) for family in FAMILIES),
        *(pytest.param(family, True, marks=pytest.mark.full) for family in FAMILIES),
    ],
)
def test_no_graph_breaks_and_no_recompiles(make_checkpoint: Make, family: str, whole: bool) -> None:
    components = load(make_checkpoint(family))
    pipe, reference = make_pipe(components, whole=whole, compiler=traced), Pipeline(components, name="eager")
    assert pipe.backend == "compile"
    assert pipe.warmup(SIZES[::4], BATCHES) > 0  # the smallest and the largest
    for size in SIZES:
        for batch in BATCHES:
            result = run(pipe, batch, size)
            assert result.timings.compilations == 0, (size, batch)
            if size == (80, 112) and batch < 4:
                # The sampler's sums are rounded one by one here, and fused in torch.
                expected = run(reference, batch, size).images
                np.testing.assert_allclose(result.images, expected, atol=2e-5, rtol=0)


def test_few_calls_warm_up(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 sizes and 3 batches the extremes, where nothing is compiled beyond the smallest size."""
    pipe = make_pipe(load(make_checkpoint("flux")), compiler=traced)
    called: list[tuple[int, Any]] = []
    numbers = iter([7, 0, 3, 0, 0, 0])

    def call(prompts: list[str], **options: Any) -> None:
        called.append((len(prompts), options["height"]))
        compiled._counts.value = compiled.compilations() + next(numbers)

    monkeypatch.setattr(Pipeline, "__call__", lambda self, prompts, **options: call(prompts, **options))
    assert pipe.warmup([(64, 64), (80, 80), (96, 96), (112, 112), (128, 128)], [4, 2, 1]) == 10
    assert called == [(1, 64), (1, 128), (2, 64), (2, 128), (4, 64), (4, 128)]
    numbers = iter([7, 1, *[0] * 13])  # what the largest needs, one between may need too
    called.clear()
    pipe.warmup([(64, 64), (80, 80), (96, 96), (112, 112), (128, 128)], [4, 2, 1])
    assert len(called) == 15


def test_a_warm_up_refuses_what_a_call_does(make_checkpoint: Make) -> None:
    pipe = Pipeline(load(make_checkpoint("flux")), name="eager")
    for sizes, batches in (([], [1]), (None, []), ([(65, 64)], [1]), ([(64, 64)], [0])):
        refusal(lambda sizes=sizes, batches=batches: pipe.warmup(sizes, batches))  # type: ignore[misc]
    assert pipe.warmup([(64, 64)], [1]) == 0  # nothing is compiled in this backend


def test_blocks_of_one_structure_share_their_code(make_checkpoint: Make) -> None:
    before = compiled.compilations()
    denoise(
        make_pipe(load(make_checkpoint("flux", transformer={"num_layers": 3, "num_single_layers": 4})), compiler=traced)
    )
    assert compiled.compilations() - before == 2


def test_what_a_lora_merges_reaches_compiled_code(make_checkpoint: Make, tmp_path: Path) -> None:
    components = load(make_checkpoint("flux"))
    pipe, reference = make_pipe(components, compiler=traced), Pipeline(components, name="eager")
    before, compilations = denoise(pipe), compiled.compilations()
    weights = {}
    for name, module in components.denoiser.named_modules():
        if name.endswith(("attn.to_q", "attn.to_v", "proj_mlp")):
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    save_file(weights, tmp_path / "style.safetensors")
    pipe.load_lora(tmp_path / "style.safetensors")
    after = denoise(pipe)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, denoise(reference), rtol=0, atol=0)  # on the same weights
    pipe.unload_lora()
    torch.testing.assert_close(denoise(pipe), before, rtol=0, atol=0)
    assert compiled.compilations() == compilations


def test_components_stay_as_they_are(make_checkpoint: Make) -> None:
    components = load(make_checkpoint("flux"))
    states = [set(vars(module)) for module in components.denoiser.modules()]
    denoise(make_pipe(components, compiler=traced))
    assert [set(vars(module)) for module in components.denoiser.modules()] == states
    assert not any("body" in state or "forward" in state for state in states)


def test_threads_compile_once_and_agree(make_checkpoint: Make) -> None:
    components = load(make_checkpoint("flux"))
    pipe, expected = make_pipe(components, compiler=traced), denoise(Pipeline(components, name="eager"))
    results, counts = [], []

    def work() -> None:
        results.append(denoise(pipe))
        counts.append(compiled.compilations())  # of this thread

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [0, 0, 2]
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


class Host:
    """A device of `sampling.graph` that runs what it captured."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        return body

    def order(self) -> None:
        pass

    def upload(self, values: Tensor) -> Tensor:
        return values


def test_compiled_code_runs_in_a_captured_step(make_checkpoint: Make) -> None:
    components = load(make_checkpoint("flux"))
    parts, network = compiled._compile(components, compiled._Compiler(traced), whole=False)
    family = families.family("FluxPipeline")
    functions = eager.functions(family, parts, Graphs(Host()), decoder=network)
    engines = replace(eager.engines(family, components), functions=functions)
    ours, theirs = Pipeline(components, name="tiny", engines=engines), Pipeline(components, name="eager")
    arguments: dict[str, Any] = {
        "num_inference_steps": 3,
        "output_type": "latent",
        "seed": 1,
        "height": 64,
        "width": 64,
    }
    images = [pipe("a red cat", **arguments).images for pipe in (ours, theirs)]
    # The step's sums are rounded in another order there.
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_the_limit_is_an_error_that_names_the_guard(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipe(load(make_checkpoint("flux")), compiler=traced)
    monkeypatch.setattr(compiled, "LIMIT", 1)
    denoise(pipe)
    message = refusal(lambda: denoise(pipe, 2))
    assert "size mismatch at index 0" in message and "warm the pipeline up" in message
    monkeypatch.undo()
    denoise(pipe, 2)  # nothing is left behind


def test_a_graph_break_is_an_error(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    body = SingleBlock.body

    def broken(self: Any, *given: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        ran.append(1)
        return body(self, *given)

    monkeypatch.setattr(SingleBlock, "body", broken)
    pipe = make_pipe(load(make_checkpoint("flux")), compiler=traced)
    assert "backend='eager'" in refusal(lambda: denoise(pipe))
    assert not ran


@pytest.mark.parametrize(
    ("variables", "include", "words"),
    [
        ({"CXX": "/nowhere/g++"}, None, ["C++ compiler", "apt install"]),
        ({}, "/nowhere", ["Python.h", "apt install"]),
    ],
    ids=["compiler", "headers"],
)
def test_what_a_cpu_needs(
    make_checkpoint: Make,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    include: str | None,
    words: list[str],
) -> None:
    components = load(make_checkpoint("flux"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if include is not None:
        monkeypatch.setattr(sysconfig, "get_path", lambda name: include)
    message = refusal(lambda: make_pipe(components))
    assert all(word in message for word in words)
    assert compiled.available() == message


def test_what_a_gpu_needs(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "available", lambda device, target="eager": None)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in (compiled.available("cuda:1") or "")
    monkeypatch.setattr(compiled, "available", lambda device: "Triton is missing: pip install triton")
    with pytest.raises(MissingExtraError, match="Triton"):
        make_pipe(load(make_checkpoint("flux")))


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keeping(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Components, and what torch is given of earlier processes."""
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    given: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"what was compiled", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", given.append)
    components = load(make_checkpoint("flux"))
    yield components, given


def test_a_warm_up_is_kept_and_found_again(keeping: Any) -> None:
    components, given = keeping
    family = families.family("FluxPipeline")
    assert not compiled.is_marked(family, components)
    make_pipe(components)._engines.keep()
    assert given == []
    assert compiled.is_marked(family, components)
    assert compiled.is_marked(family, components, device=torch.device("cpu"))
    assert not compiled.is_marked(family, components, dtype=torch.bfloat16)
    (entry,) = [entry for entry in store.entries() if entry.fields["target"] == "compile"]
    assert entry.folder.is_relative_to(compiled.folder())
    assert entry.fields["component"] == "flux" and not store.is_stale(entry.fields)
    again = make_pipe(components)
    assert given == [b"what was compiled"]
    again._engines.keep()  # renewed
    assert len([entry for entry in store.entries() if entry.fields["target"] == "compile"]) == 1


@pytest.mark.parametrize("damage", ["content", "signature", "secret"])
def test_only_what_was_signed_here_is_loaded(keeping: Any, tmp_path: Path, damage: str) -> None:
    components, given = keeping
    make_pipe(components)._engines.keep()
    (entry,) = [entry for entry in store.entries() if entry.fields["target"] == "compile"]
    if damage == "content":
        (entry.folder / "artifacts").write_bytes(b"what was compilee")
    elif damage == "signature":
        path = entry.folder.parent / "entry.json"
        path.write_text(path.read_text().replace('"signature": "', '"signature": "0', 1))
    else:
        (tmp_path / "secret").write_bytes(os.urandom(32))
    pipe = make_pipe(components)
    assert given == []
    pipe._engines.keep()  # written anew
    make_pipe(components)
    assert given == [b"what was compiled"]


def test_a_store_that_cannot_be_written(keeping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components, _ = keeping
    engines = make_pipe(components)._engines
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path / "file"))
    assert not compiled.is_marked(families.family("FluxPipeline"), components)
    with pytest.warns(UserWarning, match="not kept"):
        engines.keep()


def test_looking_for_a_mark_imports_no_compiler() -> None:
    code = """
import sys, torch, types
from fastsd import families
from fastsd.backends import compile
component = types.SimpleNamespace(config={}, parameters=lambda: iter([torch.zeros(1)]))
encoder = types.SimpleNamespace(config=types.SimpleNamespace(layers=2))
components = families.Components((), (encoder, None), component, component, {}, {})
before = set(sys.modules)
assert not compile.is_marked(families.family("FluxPipeline"), components)
print([name for name in set(sys.modules) - before if name.startswith("torch")])
print([name for name in before if name.startswith(("torch._inductor.codecache", "torch._dynamo.convert"))])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]", "[]"]


# ---------------------------------------------------------------------------------------------------------------------
# The sampler
# ---------------------------------------------------------------------------------------------------------------------

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SAMPLERS = ("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpmpp_2m_sde", "dpm2_a", "deis", "unipc", "flow_unipc")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cpu_step.load(cpu_step.build(tmp_path_factory.mktemp("kernel")))


def tables_of(name: str, guidance: float, steps: tuple[int, ...]) -> list[StepTable]:
    scheduler = resolve_scheduler(name, FLOW if name.startswith("flow_") else SD)
    made = {count: StepTable.from_scheduler(scheduler, count).with_guidance(guidance) for count in steps}
    return [made[count] for count in steps]


def draws(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[tuple[int, ...]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda wanted: torch.randn(wanted, generator=generator, dtype=dtype)


def sample_both(
    kernel: Any, tables: list[StepTable], shape: tuple[int, ...], state: torch.dtype, given: torch.dtype
) -> Iterator[tuple[Any, Any]]:
    """Steps of the kernel and of the numpy loop: same predictions, which depend on the input, and same noises."""
    latents = torch.randn((len(tables), *shape), generator=torch.Generator().manual_seed(0), dtype=state)
    halves = 2 if any(table.guided for table in tables) else 1
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn((halves * len(tables), *shape), generator=generator, dtype=state) for _ in range(40)]

    def predict(model_input: Tensor, row: Any) -> Tensor:
        return (parts[int(row)] + model_input / 8).to(given)

    def in_numpy(model_input: Any, row: int) -> Any:
        return predict(torch.from_numpy(model_input), row).to(state).numpy()

    places = range(len(tables))
    ours = fused.sampler(predict, kernel)(
        latents, [torch.arange(40)], tables, noise=[draws(i, shape, state) for i in places]
    )

    def noises(i: int) -> Callable[[tuple[int, ...]], Any]:
        draw = draws(i, shape, state)
        return lambda wanted: draw(wanted).numpy()

    theirs = loop.denoise(in_numpy, latents.numpy(), tables, noise=[noises(i) for i in places])
    return zip(ours, theirs, strict=True)


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_fused_sampler_has_the_bits_of_the_loop(kernel: Any, name: str, guidance: float) -> None:
    """Odd sizes, tables of two lengths, two images of one table side by side."""
    tables = tables_of(name, guidance, (5, 5, 3))
    for ours, theirs in sample_both(kernel, tables, (3, 7, 5), torch.float32, torch.float32):
        np.testing.assert_array_equal(ours.latents.numpy(), theirs.latents)
        np.testing.assert_array_equal(ours.denoised().numpy(), theirs.denoised())
        assert ours.finite() == theirs.finite() == [True] * 3


@pytest.mark.parametrize(
    ("state", "given"),
    [
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["unguided", "guided"])
def test_the_fused_sampler_in_other_dtypes(
    kernel: Any, guidance: float, state: torch.dtype, given: torch.dtype
) -> None:
    tables = tables_of("dpmpp_2m", guidance, (4, 6))
    for ours, theirs in sample_both(kernel, tables, (4, 6, 6), state, given):
        np.testing.assert_array_equal(ours.latents.numpy(), theirs.latents)
        assert ours.latents.dtype == state


def test_samplers_and_guidance_differ_in_a_batch(kernel: Any) -> None:
    tables = [*tables_of("dpmpp_2m", 5.0, (4,)), *tables_of("euler_a", 1.0, (6, 6)), *tables_of("unipc", 2.0, (3,))]
    for ours, theirs in sample_both(kernel, tables, (4, 5, 6), torch.float32, torch.float32):
        np.testing.assert_array_equal(ours.latents.numpy(), theirs.latents)
        np.testing.assert_array_equal(ours.denoised().numpy(), theirs.denoised())


def test_an_image_has_the_same_bits_among_others_and_on_threads(kernel: Any) -> None:
    tables = tables_of("unipc", 5.0, (4, 4, 4))
    shape = (4, 64, 96)  # enough for two threads, more than one block

    def last(places: list[int], threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            latents = torch.stack([draws(10 + i, shape, torch.float32)(shape) for i in places])
            sample = fused.sampler(lambda given, row: given / 3 + 0.1 * row, kernel)
            arguments = {"noise": [draws(i, shape, torch.float32) for i in places]}
            *_, step = sample(latents, [torch.arange(9)], [tables[i] for i in places], **arguments)
            return step.latents
        finally:
            torch.set_num_threads(before)

    together = last([0, 1, 2], 1)
    torch.testing.assert_close(last([0, 1, 2], 2), together, rtol=0, atol=0)
    torch.testing.assert_close(last([1], 1)[0], together[1], rtol=0, atol=0)


def test_a_finished_image_keeps_its_state(kernel: Any) -> None:
    """Even where the denoiser gives NaN for it afterwards."""
    tables = tables_of("euler", 5.0, (2, 4))

    def predict(given: Tensor, row: Tensor) -> Tensor:
        prediction = given / 2
        if row >= 2:
            prediction[0] = prediction[2] = float("nan")
        return prediction

    latents = torch.ones(2, 4, 8, 8)
    noise = [draws(0, (4, 8, 8), torch.float32)] * 2
    steps = [
        (step.latents, step.finite())
        for step in fused.sampler(predict, kernel)(latents, [torch.arange(9)], tables, noise=noise)
    ]
    torch.testing.assert_close(steps[3][0][0], steps[1][0][0], rtol=0, atol=0)
    assert steps[3][1] == [True, True]


def test_rescaled_guidance_is_left_to_the_loop(kernel: Any) -> None:
    tables = tables_of("ddim", 5.0, (3,))
    latents = draws(0, (), torch.float32)((1, 4, 8, 8))
    arguments: dict[str, Any] = {"noise": [draws(0, (), torch.float32)], "guidance_rescale": 0.7}
    (*_, ours), (*_, theirs) = (
        make(latents, [torch.arange(9)], tables, **arguments)
        for make in (
            fused.sampler(lambda given, row: given.sin(), kernel),
            loop.row_by_row(lambda given, row: given.sin()),
        )
    )
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=0)


def test_the_fused_sampler_refuses_what_the_loop_refuses(kernel: Any) -> None:
    sample = fused.sampler(lambda given, row: given[:, :1], kernel)
    tables = tables_of("ddim", 1.0, (3,))
    latents = torch.zeros(1, 4, 8, 8)
    refusal(lambda: sample(latents, [torch.arange(9)], tables, noise=[]))
    with pytest.raises(ValueError, match="shape"):
        list(sample(latents, [torch.arange(9)], tables, noise=[draws(0, (), torch.float32)]))


# ---------------------------------------------------------------------------------------------------------------------
# TorchInductor
# ---------------------------------------------------------------------------------------------------------------------


def test_compiled_blocks_equal_eager(make_checkpoint: Make) -> None:
    """Of a UNet of one level a residual block and a transformer are compiled, and serve every size."""
    one_level = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    components = load(make_checkpoint("sd", unet=one_level))
    family = families.family("StableDiffusionPipeline")
    unet = components.denoiser
    start = compiled.compilations()

    def first_two(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        return (compiled._inductor if compiled.compilations() <= start + 2 else traced)(graph, inputs)

    functions = compiled.engines(family, components, compiler=first_two).functions
    counts = []
    for batch, height, width in ((2, 8, 8), (4, 8, 12), (3, 13, 10), (2, 24, 16)):
        generator = torch.Generator().manual_seed(batch)
        latents = torch.randn(batch, 4, height, width, generator=generator)
        text = torch.randn(batch, 77, 24, generator=generator)
        with torch.inference_mode():
            constants = unet.prepare(torch.full((1, batch), 500.0), text)
            expected = unet(latents, constants.modulation[0], constants.context)
        before = compiled.compilations()
        predicted = functions.denoise(latents, constants.modulation[0], constants.context)
        counts.append(compiled.compilations() - before)
        # Sums in another order: a few float32 roundings of values around 1.
        torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
    assert counts == [3, 0, 0, 0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "dtype", "whole"),
    [
        ("sd", torch.bfloat16, False),
        ("sdxl", torch.float32, True),
        ("sd3", torch.float32, False),
        ("flux", torch.bfloat16, False),
    ],
    ids=["sd-bfloat16", "sdxl-whole", "sd3", "flux-bfloat16"],
)
def test_whole_pipelines_equal_eager(make_checkpoint: Make, family: str, dtype: torch.dtype, whole: bool) -> None:
    components = load(make_checkpoint(family), dtype)
    pipe, reference = make_pipe(components, whole=whole), Pipeline(components, name="eager")
    exact = Pipeline(load(make_checkpoint(family)), name="exact")
    assert pipe.warmup([(64, 64), (96, 96)], [2]) > 0
    images = [run(one, 2, (80, 64)) for one in (pipe, reference, exact)]
    assert images[0].timings.compilations == 0
    ours, theirs, right = (one.images.astype(np.float64) for one in images)
    if dtype == torch.float32:
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    else:  # neither is the other's oracle: both round to 8 bits, in different places
        assert np.sqrt(((ours - right) ** 2).mean()) <= 1.5 * np.sqrt(((theirs - right) ** 2).mean()) + 1 / 255


@pytest.mark.full
def test_the_demo_equals_eager() -> None:
    components = load(resolve("demo"))
    pipe, reference = make_pipe(components), Pipeline(components, name="eager")
    arguments: dict[str, Any] = {"num_inference_steps": 10, "seed": 3, "output_type": "np"}
    ours, theirs = (one("a red circle on a blue background", **arguments) for one in (pipe, reference))
    # Ten steps carry roundings on: still below what a pixel of 8 bits shows.
    np.testing.assert_allclose(ours.images, theirs.images, atol=1 / 255, rtol=0)
