"""AOTInductor packages: bundles against their checkpoints, weights that change without compiling, and what is refused.

Compiling is what takes long here, so all but the tests of whole families share the packages of one least checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fastsd import bundle, integrity, machine, tensors
from fastsd.backends import aoti as backend
from fastsd.bundle import Engine, Manifest
from fastsd.pipeline import Pipeline
from fastsd_export import aoti, plan, trace
from fastsd_export.plan import Lane, Sizes
from fastsd_kernels import configs

BFLOAT16 = Lane("aoti", "bfloat16")
UNET = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SIZES = Sizes(height=(32, 32, 32), width=(32, 32, 32), guidance="on")
PARTS = ("text_encoder", "prepare", "denoiser", "vae_decoder")
RUN: dict[str, Any] = {"num_inference_steps": 3, "seed": 7, "output_type": "np"}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = {f"{BLOCK}.attn1.to_q": (16, 16), f"{BLOCK}.attn2.to_k": (24, 16)}  # in and out, of the LoRA


@pytest.fixture(scope="module", autouse=True)
def _quick(home: Path) -> Iterator[None]:
    """The home of the tests, and a compiler that does not optimise the code around the kernels: half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSD_HOME", str(home))
        patch.setitem(aoti.OPTIONS, "cpu", {**aoti.OPTIONS["cpu"], "aot_inductor.compile_wrapper_opt_level": "O0"})
        yield


@pytest.fixture(scope="module")
def make_least(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Checkpoints of one architecture, as small as one can be, by the seed of their weights."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    def make(seed: int) -> Path:
        folder = tmp_path_factory.mktemp("least") / "model"
        shutil.copytree(make_checkpoint("sd", unet=UNET, seed=seed), folder)
        torch.manual_seed(seed)
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
        config.num_hidden_layers = 2
        for name, module in {
            "text_encoder": CLIPTextModel(config),
            "vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        }.items():
            shutil.rmtree(folder / name)
            module.save_pretrained(folder / name)
        return folder

    return make


@pytest.fixture(scope="module")
def least(make_least: Callable[[int], Path]) -> Path:
    return make_least(0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The components that are compiled while the test runs."""
    found: list[str] = []
    original = aoti.build

    def counted(traced: Any, *args: Any, **options: Any) -> Any:
        found.append(traced.component)
        return original(traced, *args, **options)

    monkeypatch.setattr(aoti, "build", counted)
    return found


@pytest.fixture(scope="module")
def folder(least: Path, export: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the least checkpoint in bfloat16; read-only."""
    path = tmp_path_factory.mktemp("aoti") / "bundle"
    export(least, path, (BFLOAT16,), sizes=SIZES, components=PARTS)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, backend="aoti")


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that is strong enough to see."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, (width, out) in LAYERS.items():
        state[f"unet.{name}.lora_A.weight"] = 4 * torch.randn(2, width, generator=generator)
        state[f"unet.{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    save_file(state, path)
    return path


def engine_of(folder: Path, component: str) -> Engine:
    [variant] = bundle.read(folder).variants
    return next(engine for engine in variant.engines if engine.component == component)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the UNet as they are stored, in the checkpoint's shapes."""
    stored = load_file(folder / engine_of(folder, "denoiser").options["weights"])
    return {name: tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor for name, tensor in stored.items()}


def load(folder: Path, engine: Engine, **shared: Any) -> Any:
    return backend.load(folder / engine.path, engine, device="cpu", shared=shared)


def examples(engine: Engine) -> dict[str, torch.Tensor]:
    """Inputs of an engine of one size."""
    sizes = {name: usual for name, (_, usual, _) in engine.profile.items()}
    generator = torch.Generator().manual_seed(3)
    return {
        spec.name: torch.randn(
            [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape], generator=generator
        ).to(getattr(torch, spec.dtype))
        for spec in engine.inputs
    }


def test_images_are_those_of_the_checkpoint(folder: Path, least: Path, pipe: Pipeline) -> None:
    """The gates have held each engine against float32; here the bundle is held against eager in its own dtype."""
    [variant] = bundle.read(folder).variants
    assert [engine.component for engine in variant.engines] == [*PARTS]
    assert variant.record["verification"]["worst"]["psnr"] > 35  # eager in bfloat16: 40 and more
    assert pipe.backend == "aoti" and pipe.dtype == "bfloat16" and bundle.is_native(variant.engines[0])
    ours = pipe("a red cat", **RUN)
    eager = Pipeline.from_pretrained(least, backend="eager", dtype="bfloat16")("a red cat", height=32, width=32, **RUN)
    assert ours.images.shape == (1, 32, 32, 3) and ours.images.dtype == np.float32
    assert np.abs(ours.images - eager.images).mean() < 0.01  # rounding to 8 bits, at other places


def test_engines_of_a_component_share_its_weights(folder: Path, least: Path) -> None:
    engines = {name: engine_of(folder, name) for name in PARTS}
    files = {name: engine.options["weights"] for name, engine in engines.items()}
    where = "engines/aoti-bfloat16"
    assert files == {
        "text_encoder": f"{where}/text_encoder.safetensors",
        **dict.fromkeys(("prepare", "denoiser"), f"{where}/unet.safetensors"),
        "vae_decoder": f"{where}/vae.safetensors",
    }
    shared: dict[str, Any] = {}
    denoiser, prepare = (
        backend.load(folder / engines[name].path, engines[name], device="cpu", shared=shared)
        for name in ("denoiser", "prepare")
    )
    held, _ = shared["aoti"]
    [weights] = held.values()
    assert denoiser is not prepare
    assert weights is backend.weights(folder / files["denoiser"], engines["denoiser"], "cpu", shared)
    assert weights.get_parameter("conv_in.weight").is_contiguous(memory_format=torch.channels_last)
    # The names and shapes of the checkpoint's own file; the values are rounded.
    theirs = load_file(least / "unet/diffusion_pytorch_model.safetensors")
    assert {name: tensor.shape for name, tensor in weights.named_parameters()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert all(torch.equal(tensor, theirs[name].bfloat16()) for name, tensor in weights.named_parameters())
    sizes = bundle.load(folder, "aoti", "auto", "auto").engines.sizes
    total = sum(path.stat().st_size for path in (folder / where).rglob("*") if path.is_file())
    assert sum(sizes.values()) == total  # a file that is shared counts once


def test_a_fine_tune_and_a_merged_lora_compile_nothing(
    folder: Path,
    least: Path,
    style: Path,
    make_least: Callable[[int], Path],
    export: Callable[..., Manifest],
    compiled: list[str],
    pipe: Pipeline,
    tmp_path: Path,
) -> None:
    other = make_least(1)
    config = json.loads((other / "unet/config.json").read_text())
    (other / "unet/config.json").write_text(json.dumps({**config, "_name_or_path": "somebody/fine-tune"}))
    export(other, tmp_path / "other", (BFLOAT16,), sizes=SIZES, components=PARTS)  # verified against its own weights
    export(least, tmp_path / "merged", (BFLOAT16,), sizes=SIZES, components=PARTS, loras=[(str(style), 1.0)])
    assert compiled == []
    before = engine_of(folder, "denoiser")
    for name in ("other", "merged"):
        engine = engine_of(tmp_path / name, "denoiser")
        assert engine.record["weights"] != before.record["weights"]
        same = {path for path in before.files if path.endswith(".pt2") and before.files[path] == engine.files[path]}
        assert same == {before.path}

    # Merged at run time: the weights of the merged export but for one more rounding, into the same file's tensors.
    plain = pipe("a red cat", **RUN).images
    pipe.load_lora(style)
    try:
        assert pipe.loras == {"style": 1.0}
        merged, unmerged = (weights_of(one) for one in (tmp_path / "merged", folder))
        for name, weight in pipe._engines.modules["unet"].named_parameters():
            torch.testing.assert_close(weight.detach(), merged[name], rtol=2**-7, atol=2**-8)
            assert torch.equal(weight, unmerged[name]) == (name.removesuffix(".weight") not in LAYERS)
        loaded = pipe("a red cat", **RUN).images
    finally:
        pipe.unload_lora()
    there = Pipeline.from_pretrained(tmp_path / "merged")("a red cat", **RUN).images
    assert np.abs(loaded - there).mean() < 0.5 * np.abs(loaded - plain).mean()  # rounding is a quarter
    assert np.array_equal(pipe("a red cat", **RUN).images, plain)
    integrity.check_files(folder, bundle.read(folder).everything(), besides=None)


def test_runs_without_diffusers_and_without_a_compiler(folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    code = """
        import sys, numpy
        from fastsd.pipeline import Pipeline
        pipe = Pipeline.from_pretrained(sys.argv[1])
        numpy.save(sys.argv[2], pipe("a red cat", num_inference_steps=3, seed=7, output_type="np").images)
        heavy = ("diffusers", "transformers", "torch._inductor", "torch._dynamo", "onnx", "onnxruntime", "openvino")
        print(*(name for name in heavy if name in sys.modules))
    """
    path = tmp_path / "image.npy"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path), "CXX": "none"},
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
    assert np.array_equal(np.load(path), pipe("a red cat", **RUN).images)


def test_threads_get_what_they_would_get_alone(pipe: Pipeline) -> None:
    alone = [pipe("a cat", **{**RUN, "seed": seed}).images for seed in range(2)]
    together: dict[int, Any] = {}

    def make(seed: int) -> None:
        together[seed] = pipe("a cat", **{**RUN, "seed": seed}).images

    threads = [threading.Thread(target=make, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(together[seed], alone[seed]) for seed in range(2))


def test_any_layout_of_the_inputs_gives_the_same(folder: Path) -> None:
    """A package reads its inputs as if they were contiguous."""
    engine = engine_of(folder, "denoiser")
    run, inputs = load(folder, engine), examples(engine)
    expected = run(**inputs)[0]
    inputs["latents"] = inputs["latents"].to(memory_format=torch.channels_last)
    inputs["context"] = inputs["context"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not inputs["context"].is_contiguous()
    assert torch.equal(run(**inputs)[0], expected)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a name": (lambda given: {**given, "more": given["latents"]}, "takes latents, modulation, context"),
    "a dtype": (lambda given: {**given, "modulation": given["modulation"].float()}, "pass bfloat16"),
    "a shape": (lambda given: {**given, "latents": given["latents"][:, :3]}, "pass float32"),
    "no tensor": (lambda given: {**given, "latents": [1.0]}, "a list"),
    "a device": (lambda given: {**given, "latents": given["latents"].to("meta")}, "is on meta: move it to cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused(folder: Path, case: str) -> None:
    engine = engine_of(folder, "denoiser")
    run, (change, says) = load(folder, engine), WRONG[case]
    assert says in refusal(lambda: run(**change(examples(engine))))


def metadata(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Another machine, in some facts."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        found = {**machine.describe("cpu"), **changes}
        patch.setattr(machine, "describe", lambda device: found)

    return apply


FOREIGN: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str]] = {
    "another torch": (lambda patch: patch.setattr(torch, "__version__", "2.99.0"), "and this is torch 2.99.0: export"),
    "another device": (metadata(device="cuda", compute_capability="9.0"), "was compiled for 'cpu', not for"),
    "another system": (metadata(os="Plan 9"), "and this is Plan 9: export it"),
    "a lesser cpu": (metadata(isa=["avx2"]), "which this one has not: export it on this machine"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_package_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    engine, (change, says) = engine_of(folder, "denoiser"), FOREIGN[case]
    change(monkeypatch)
    assert says in refusal(lambda: load(folder, engine))


def test_a_damaged_package_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, "denoiser")
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    files = {path: value for path, value in engine.files.items() if path != engine.options["weights"]}
    assert "which its weights lack: export it again" in refusal(lambda: load(copy, replace(engine, files=files)))
    package = copy / engine.path
    package.write_bytes(package.read_bytes()[:1000])
    assert "is no package of fastsd's" in refusal(lambda: load(copy, engine))
    # Neither a package nor weights that are not what the manifest lists come as far as that.
    pipe = Pipeline.from_pretrained(folder)
    weights = copy / engine.options["weights"]
    os.chmod(weights, 0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    shutil.copyfile(folder / engine.path, package)
    pipe = Pipeline.from_pretrained(copy)
    assert "is damaged" in refusal(lambda: pipe("a cat", **RUN))


def test_no_compiler_is_an_error_of_the_export(
    loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    _, components = loaded("sd")
    traced, ranges = trace.vae_encoder(components.vae), {"height": (8, 8, 8), "width": (8, 8, 8)}
    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    says = refusal(lambda: aoti.build(traced, ranges, tmp_path, precision="float32", device="cpu"))
    assert "install g++" in says and not any(tmp_path.iterdir())


def test_weights_are_written_once_and_aligned(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"odd": torch.nn.Linear(3, 5), "even": torch.nn.Linear(32, 32)})
    module["tied"] = torch.nn.Linear(3, 5)
    module["tied"].weight = module["odd"].weight
    module.register_buffer("steps", torch.arange(6))
    like = trace.skeleton(trace.Wrapper(module), torch.bfloat16).component
    written = aoti.write_weights(module, like, tmp_path / "some.safetensors")
    assert written.options == {"tied": {"tied.weight": "odd.weight"}, "channels_last": False}
    stored = load_file(written.path)
    expected = {name: tensor for name, tensor in module.state_dict().items() if name != "tied.weight"}
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        dtype = torch.bfloat16 if expected[name].is_floating_point() else torch.int64
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype))
    for name, place in tensors.read_header(written.path).items():
        assert place.begin % aoti.ALIGNMENT == 0 or stored[name].nbytes % aoti.ALIGNMENT
    assert written.size == written.path.stat().st_size


def test_plans_of_aoti(least: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd import checkpoint

    source = checkpoint.source(least)
    assert "bfloat16 or float32" in refusal(lambda: plan.Plan(source, [Lane("aoti", "float16")], SIZES))
    in_bfloat16, in_float32 = (
        {one.component: one.nbytes for one in plan.Plan(source, [Lane("aoti", kind)], SIZES).estimates()}
        for kind in ("bfloat16", "float32")
    )
    assert all(2 * in_bfloat16[name] == in_float32[name] > 0 for name in PARTS)
    assert Lane("aoti", "bfloat16").device == "cpu" and plan.usual_precision("openvino") == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Lane("aoti", "bfloat16").device == "cuda"


EXAMPLES: dict[str, tuple[str, dict[str, tuple[int, int, int]], dict[str, int]]] = {
    "fixed": (
        "sd",
        {"batch": (2, 2, 2), "height": (8, 8, 8), "width": (8, 8, 8)},
        {"batch": 2, "height": 8, "width": 8},
    ),
    "ranges": (
        "sd",
        {"batch": (1, 2, 4), "height": (8, 64, 128), "width": (8, 64, 128)},
        {"batch": 2, "height": 65, "width": 67},
    ),
    "from one": (
        "sd",
        {"batch": (1, 1, 4), "height": (8, 8, 8), "width": (1, 1, 3)},
        {"batch": 2, "height": 8, "width": 3},
    ),
    "up to the limit": (  # of the table of positions: 24 latents, 2 a token
        "sd3",
        {"batch": (1, 2, 4), "height": (8, 24, 24), "width": (8, 24, 24)},
        {"batch": 2, "height": 22, "width": 18},
    ),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_examples_are_told_apart(loaded: Callable[..., Any], case: str) -> None:
    name, ranges, expected = EXAMPLES[case]
    family, components = loaded(name)
    traced = trace.denoiser(family, components, 20)
    assert aoti._examples(traced, {**ranges, "tokens": (77, 77, 77)}) == {**expected, "tokens": 77}


class Slicing(TorchFunctionMode):
    """Slices by an op: in a torch without CUDA the subscript itself looks for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        if index[0] is ...:
            index = (slice(None),) * (x.dim() - 1) + index[1:]
        for dim, part in enumerate(index):
            x = x.unsqueeze(dim) if part is None else torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop)
        return x


def on_cuda(component: str) -> Any:
    """A traced component whose attention is our kernel."""
    from diffusers import AutoencoderKL

    from fastsd.families import Components, sd

    if component == "denoiser":
        config = {**UNET, "block_out_channels": (40,), "attention_head_dim": 1, "norm_num_groups": 4}
        unet = sd.build({**config, "layers_per_block": 1, "cross_attention_dim": 24, "sample_size": 8})
        return trace.denoiser(sd, Components((), (), unet, None, {}, {}), 20)
    return trace.vae_decoder(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False))


@pytest.mark.parametrize(
    ("component", "kernels"),
    [
        ("denoiser", {"group_norm_silu": 10, "attention": 3, "cross_attention": 3, "geglu": 3}),
        ("vae_decoder", {"group_norm_silu": 9}),
    ],
)
def test_graphs_for_cuda_hold_our_kernels(
    component: str, kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: tensors on CUDA are fakes, and what is looked at is the graph that would be compiled."""
    monkeypatch.setattr(configs, "arch", lambda device: 80)
    monkeypatch.setattr(torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.channels_last)
    traced = on_cuda(component)
    ranges = {"batch": (1, 2, 4), "height": (8, 16, 32), "width": (8, 16, 16), "tokens": (20, 20, 20)}
    with FakeTensorMode(allow_non_fake_inputs=True), Slicing():
        program = aoti.export(traced, {name: ranges[name] for name in traced.sizes}, torch.bfloat16, "cuda")
    called = Counter(str(node.target) for node in program.graph.nodes if "fastsd" in str(node.target))
    assert {name.split(".")[1]: count for name, count in called.items()} == kernels
    tensors_in = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert {str(tensor.device) for tensor in tensors_in} == {"cuda:0"}


FAMILIES: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "sd": ("float32", None),
    "sdxl": ("bfloat16", ("text_encoder_2", "prepare", "denoiser")),
    "sd3": ("float32", ("text_encoder_3", "prepare", "denoiser")),
    "flux": ("bfloat16", ("text_encoder_2", "prepare", "denoiser")),  # its T5 has a tied weight
}


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_families_at_all_sizes(
    family: str, make_checkpoint: Callable[..., Path], export: Callable[..., Manifest], tmp_path: Path
) -> None:
    """The gates hold every engine against float32 at the least, the usual, the largest and an odd size."""
    precision, components = FAMILIES[family]
    sizes = Sizes(batch=(1, 1, 2), height=(64, 64, 96), width=(64, 80, 96))
    folder = tmp_path / "bundle"
    manifest = export(make_checkpoint(family), folder, (Lane("aoti", precision),), sizes=sizes, components=components)
    [variant] = manifest.variants
    by_name = {engine.component: engine for engine in variant.engines}
    assert by_name["denoiser"].profile["height"] == (8, 8, 12)
    assert by_name["denoiser"].profile["batch"] == ((1, 1, 2) if family == "flux" else (1, 2, 4))
    worst = {name: min(one["cosine"] for one in report(engine).values()) for name, engine in by_name.items()}
    assert min(worst.values()) > (0.9999999 if precision == "float32" else 0.9998), worst
    if components is None:
        assert variant.record["verification"]["worst"]["psnr"] > 90
        pipe = Pipeline.from_pretrained(folder)
        images = pipe(["a cat", "a dog"], height=96, width=72, **{**RUN, "seed": [1, 2]}).images
        latents = pipe.encode(images)
        assert images.shape == (2, 96, 72, 3) and tuple(latents.shape) == (2, 4, 12, 9)
        assert "--height 128" in refusal(lambda: pipe("a cat", height=128, width=72, **RUN))
        # Another size beside it reads the same weights.
        more = {"sizes": Sizes(height=(128, 128, 128), width=(64, 64, 64)), "components": ["vae_decoder"]}
        [joined] = export(make_checkpoint(family), folder, (Lane("aoti", precision),), **more).variants
        decoders = [engine for engine in joined.engines if engine.component == "vae_decoder"]
        assert len(decoders) == 2 and len({engine.options["weights"] for engine in decoders}) == 1
        assert Pipeline.from_pretrained(folder).decode(torch.randn(1, 4, 16, 8)).shape == (1, 128, 64, 3)


def report(engine: Engine) -> dict[str, Any]:
    """Measures of its outputs."""
    found: dict[str, Any] = engine.record["verification"]["outputs"]
    return found
