"""Bundles: what `fastsd export` writes runs without torch and makes the images of the checkpoint."""

import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastsd
from fastsd import bundle, integrity, store
from fastsd.backends import base, tensorrt
from fastsd.backends import onnx as onnxruntime
from fastsd.errors import InputError, MissingExtraError, NumericError
from fastsd.pipeline import Pipeline
from fastsd_export import build
from fastsd_export.plan import Lane, Sizes

ONNX = Lane("onnx", "float32")
Make = Callable[..., Path]
Export = Callable[..., bundle.Manifest]


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_HOME", str(home))


# Calls of the pipeline that both must answer alike.
CALLS: dict[str, dict[str, Any]] = {
    "guided": {"prompt": "the red cat", "guidance_scale": 4.0},
    "negative": {"prompt": "the red cat", "negative_prompt": "a dog", "guidance_scale": 4.0},
    "unguided": {"prompt": "the red cat", "guidance_scale": 1.0},
    "batch": {
        "prompt": ["the cat", "red"],
        "seed": [5, 6],
        "num_inference_steps": [2, 4],
        "guidance_scale": [1.0, 3.0],
    },
    "tall": {"prompt": "the cat", "height": 96, "width": 64},
    "clip_skip": {"prompt": "the red cat", "clip_skip": 1},
    "rescaled": {"prompt": "the red cat", "guidance_scale": 7.0, "guidance_rescale": 0.7},
}

RUN = """
import json, sys
for name in ("torch", "diffusers", "transformers", "onnx"):
    sys.modules[name] = None
import numpy as np
import fastsd
folder, backend, out, *calls = sys.argv[1:]
pipe = fastsd.Pipeline.from_pretrained(folder, backend=backend, dtype="float32")
made = {}
for call in calls:
    given = json.loads(call)
    name, prompt = given.pop("name"), given.pop("prompt")
    result = pipe(prompt, output_type="np", **{"seed": 3, "num_inference_steps": 4, **given})
    made[name] = result.images
    given = {"seed": 3, "num_inference_steps": 4, **given}
    made["latents_" + name] = pipe(prompt, output_type="latent", **given).images
pixels = made[name]
made["encoded"] = pipe.encode(pixels)
np.savez(out, **made)
assert not {"torch", "diffusers", "transformers", "onnx"} & {k for k, v in sys.modules.items() if v is not None}
"""


def run_without_torch(folder: Path, backend: str, out: Path, calls: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    arguments = [json.dumps({"name": name, **call}) for name, call in calls.items()]
    command = [sys.executable, "-c", RUN, str(folder), backend, str(out), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    return dict(np.load(out))


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "family", ["sd", *(pytest.param(name, marks=pytest.mark.full) for name in ("sdxl", "sd3", "flux"))]
)
def test_without_torch_it_makes_the_images_of_the_checkpoint(
    family: str, backend: str, bundled: Callable[[str], Path], make_checkpoint: Make, tmp_path: Path
) -> None:
    # A bundle's own size is that of its engines, not the checkpoint's.
    calls = {name: {"height": 64, "width": 64, **call} for name, call in CALLS.items()}
    if family == "flux":
        calls = {name: calls[name] for name in ("guided", "batch", "tall")}
    made = run_without_torch(bundled(family), backend, tmp_path / "made.npz", calls)
    eager = Pipeline.from_pretrained(make_checkpoint(family), dtype="float32", device="cpu")
    for name, call in calls.items():
        given = {"seed": 3, "num_inference_steps": 4, **call}
        expected = eager(output_type="np", **given)
        # One level of 256: what 1e-4 of the latents, another order of the sums, may move a pixel by.
        assert np.abs(made[name] - expected.images).max() <= 1 / 255, name
        latents = eager(output_type="latent", **given).images.numpy()
        assert np.abs(made[f"latents_{name}"] - latents).max() <= 1e-3 * latents.std(), name
    encoded = eager.encode(made[name]).numpy()
    assert np.abs(made["encoded"] - encoded).max() <= 1e-3 * encoded.std()


def test_a_bundle_takes_the_call_of_any_model(bundled: Callable[[str], Path], tiny: Path) -> None:
    pipe = Pipeline.from_pretrained(bundled("sd"), backend="onnx")
    eager = Pipeline.from_pretrained(tiny, dtype="float32", device="cpu")
    assert (pipe.backend, pipe.device, pipe.dtype) == ("onnx", "cpu", "float32")
    result = pipe("the red cat", seed=1, num_inference_steps=3)
    assert isinstance(result.images[0], Image.Image) and result.seeds == [1]
    recipe = json.loads(result.recipes[0].to_json())
    assert recipe["extra"] == {"dtype": "float32", "device": "cpu", "backend": "onnx"}
    assert pipe("the red cat", seed=1, num_inference_steps=3, output_type="pt").images.shape == (1, 64, 64, 3)
    steps = list(pipe.stream("the red cat", seed=1, num_inference_steps=3))
    assert [step.index for step in steps] == [0, 1, 2] and steps[2].preview()[0].size == (64, 64)
    # Noise of the caller's, embeddings of the caller's, torch's or numpy's.
    import torch

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for latents in (noise, noise.numpy()):
        given = pipe("the red cat", latents=latents, num_inference_steps=3, output_type="np").images
        assert np.abs(given - pipe("the red cat", seed=1, num_inference_steps=3, output_type="np").images).max() < 1e-4
    context = eager.functions.read(0, [[1] * 77], None).states
    for embeds in (context, context.numpy()):
        ours = pipe(prompt_embeds=embeds, seed=1, num_inference_steps=2, guidance_scale=1.0, output_type="np").images
        theirs = eager(
            prompt_embeds=context, seed=1, num_inference_steps=2, guidance_scale=1.0, output_type="np"
        ).images
        assert np.abs(ours - theirs).max() <= 1 / 255
    # The caller's generator draws as in the eager pipeline.
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    pair = [
        one("the cat", generator=g, num_inference_steps=2, output_type="np").images
        for one, g in zip((pipe, eager), generators, strict=True)
    ]
    assert np.abs(pair[0] - pair[1]).max() <= 1 / 255


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"height": 128}, "no prepare|no denoiser|height 128"),
    "batch": ({"num_images_per_prompt": 4}, "batch 8"),
    "unguided": ({"num_images_per_prompt": 6, "guidance_scale": 1.0}, "batch 6"),
    "sampler": ({"scheduler": "heun"}, "has no sampler 'heun': use .*dpmpp_2m.*--samplers heun"),
    "steps": ({"num_inference_steps": 7, "scheduler": "euler"}, "tables of 1 to 6 steps, not of 7.*--max-steps 7"),
    "eta": ({"eta": 0.5}, "tables without eta"),
    "sigmas": ({"sigmas": [1.0, 0.5], "scheduler": "euler"}, "tables without sigmas"),
    "instance": ({"scheduler": object()}, "has its samplers as tables"),
    "windows": ({"prompt": "a " * 200, "long_prompt": "windows"}, "tokens 231"),
}


# Flags of the command that adds an engine, and that the call then finds.
HINTS = {
    "size": {"--height": "128", "--width": "64", "--batch": "1", "--guidance": "on"},
    "batch": {"--height": "64", "--width": "64", "--batch": "4", "--guidance": "on"},
    "unguided": {"--height": "64", "--width": "64", "--batch": "6"},
    "windows": {"--height": "64", "--width": "64", "--batch": "1", "--guidance": "on", "--tokens": "231"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_bundle_does_not_hold_is_refused_with_the_command_that_adds_it(
    case: str, bundled: Callable[[str], Path]
) -> None:
    pipe = Pipeline.from_pretrained(bundled("sd"), backend="onnx")
    given, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "the cat", "num_inference_steps": 2, **given})
    if case in HINTS:
        with pytest.raises(InputError, match="fastsd export tiny --to onnx --dtype float32") as refusal:
            pipe(**{"prompt": "the cat", "num_inference_steps": 2, **given})
        words = shlex.split(str(refusal.value).split("`")[1])
        flags = dict(zip(words[3::2], words[4::2], strict=True))
        assert flags["-o"] == str(bundled("sd"))
        assert {name: flags[name] for name in HINTS[case]} == HINTS[case]
        assert flags.get("--guidance") == HINTS[case].get("--guidance")


def test_loading_refuses_in_one_sentence(bundled: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bundled("sd")
    for arguments, message in [
        ({"backend": "tensorrt"}, "has onnx in float32 and openvino in float32, nothing for tensorrt"),
        ({"dtype": "bfloat16"}, "nothing for bfloat16"),
        ({"device": "cuda", "backend": "openvino"}, "nothing for openvino cuda"),
        ({"variant": "fp16"}, "is a bundle, which has no"),
    ]:
        with pytest.raises(InputError, match=message):
            Pipeline.from_pretrained(folder, **arguments)
    with pytest.raises(InputError, match="--lora"):
        Pipeline.from_pretrained(folder).load_lora("style.safetensors")
    with pytest.raises(InputError, match="runs bundles: make one with `fastsd export"):
        Pipeline.from_pretrained("demo", backend="onnx")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and renew its digest, so that something else has to find it."""
    document = json.loads((folder / bundle.MANIFEST).read_text())
    del document["digest"]
    change(document)
    document["digest"] = bundle.digest(document)
    (folder / bundle.MANIFEST).write_text(json.dumps(document))


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda m: m.update(format="other"), "no manifest of a bundle"),
    "version": (lambda m: m.update(version=2), "has version 2"),
    "missing field": (lambda m: m.pop("configs"), "is damaged"),
    "unknown field": (lambda m: m.update(more=1), "is damaged"),
    "variants": (lambda m: m.update(variants=3), "is damaged"),
    "target": (lambda m: m["variants"][0].update(target="abacus"), "is damaged"),
    "no engines": (lambda m: m["variants"][0].update(engines=[]), "is damaged"),
    "range": (lambda m: m["variants"][0]["engines"][1]["profile"].update(batch=[2, 1, 1]), "is damaged"),
    "path": (lambda m: m["variants"][0]["engines"][0].update(path="../x.onnx"), "is damaged"),
    "files outside": (lambda m: m["files"].update({"../../secret": [1, "00"]}), "secret"),
    "tokenizer outside": (lambda m: m["tokenizers"].update(tokenizer="/etc"), "is damaged"),
    "configuration": (lambda m: m["configs"].update(denoiser=3), "denoiser is no object"),
    "no configuration": (lambda m: m["configs"].pop("vae"), "is damaged .configs lacks vae"),
    "defaults": (lambda m: m["index"].update(_fastsd=3), "is damaged"),
    "tokenizer": (lambda m: m["tokenizers"].update(tokenizer={}), "is damaged"),
    "profile": (
        lambda m: [one["profile"].pop("height", 0) for one in m["variants"][0]["engines"]],
        "lacks a dimension",
    ),
    "sampler folder": (lambda m: m["samplers"].update(euler="samplers"), "is damaged"),
    "sampler tokens": (
        lambda m: m["samplers"].update(euler={"file": m["samplers"]["euler"], "tokens": "x"}),
        "damaged",
    ),
    "lora": (lambda m: m["loras"].update(style="x"), "is damaged"),
    "arguments": (lambda m: m.update(arguments=[]), "is damaged"),
    "no denoiser": (
        lambda m: [
            one.update(component="vae_encoder")
            for one in m["variants"][0]["engines"]
            if one["component"] != "text_encoder"
        ],
        "has only text_encoder, vae_encoder, which makes no images: add the rest with --components prepare,denoiser",
    ),
    "sampler outside": (lambda m: m["samplers"].update(euler="../../x"), "is damaged"),
    "family": (lambda m: m["index"].update(_class_name="KandinskyPipeline"), "does not run"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_manifest_is_one_sentence(case: str, bundled: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)
    change, message = DAMAGED[case]
    edit(folder, change)
    with pytest.raises(InputError, match=message) as refusal:
        Pipeline.from_pretrained(folder, backend="onnx")("the cat", num_inference_steps=1)
    assert "\n" not in str(refusal.value)


def test_no_file_of_a_bundle_may_change(bundled: Callable[[str], Path], tmp_path: Path) -> None:
    """A flipped bit in any file is found before anything of it is used."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)
    rng = np.random.default_rng(0)
    for name in sorted(integrity.hash_files(folder)):
        if name == bundle.SIGNATURE:
            continue
        path, backend = folder / name, "openvino" if "openvino" in name else "onnx"
        whole = path.read_bytes()
        # Many in the manifest, which has parts of all kinds and is read first; of others each costs a run.
        for place in rng.integers(len(whole), size=300 if name == bundle.MANIFEST else 2):
            data = bytearray(whole)
            data[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            with pytest.raises(InputError, match="is damaged") as refusal:
                pipe = Pipeline.from_pretrained(folder, backend=backend)
                pipe.encode(pipe("the cat", num_inference_steps=1, output_type="np").images)
            assert "\n" not in str(refusal.value)
        path.write_bytes(whole)
    # And one that changes after it was loaded.
    pipe = Pipeline.from_pretrained(folder, backend="onnx")
    path = folder / json.loads((folder / bundle.MANIFEST).read_text())["samplers"]["euler"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="is damaged"):
        pipe("the cat", num_inference_steps=1, scheduler="euler")
    path.write_bytes(whole)
    (folder / "planted.json").write_text("{}")
    with pytest.raises(InputError, match="planted"):
        Pipeline.from_pretrained(folder, backend="onnx")


def test_native_engines_need_the_signature_of_this_machine(bundled: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)
    (folder / "engines" / "native.so").write_bytes(b"code")

    def plant(document: dict[str, Any]) -> None:
        engine = next(one for one in document["variants"][0]["engines"] if one["component"] == "denoiser")
        engine["files"]["engines/native.so"] = [4, integrity.hash_files(folder)["engines/native.so"][1]]

    edit(folder, plant)
    with pytest.raises(InputError, match=r"not built on this machine.*--trust"):
        Pipeline.from_pretrained(folder, backend="onnx")
    Pipeline.from_pretrained(folder, backend="onnx", trust=True)
    (folder / bundle.SIGNATURE).write_text(store.sign((folder / bundle.MANIFEST).read_bytes()))
    Pipeline.from_pretrained(folder, backend="onnx")
    # Whatever its files are called, an engine of another target is a program.
    shutil.rmtree(folder)
    shutil.copytree(bundled("sd"), folder)
    edit(folder, lambda m: m["variants"][0]["engines"][0].update(target="tensorrt"))
    with pytest.raises(InputError, match=r"not built on this machine.*--trust"):
        Pipeline.from_pretrained(folder, backend="onnx")


def test_a_graph_under_any_name_takes_tensors_from_the_bundle_alone(
    bundled: Callable[[str], Path], tmp_path: Path
) -> None:
    import onnx

    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)
    outside = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../../secret")
    data = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(initializer=[outside])).SerializeToString()
    (folder / "engines" / "data.bin").write_bytes(data)

    def plant(document: dict[str, Any]) -> None:
        for engine in document["variants"][0]["engines"]:
            listed = {"engines/data.bin": [len(data), hashlib.sha256(data).hexdigest()]}
            engine.update(path="engines/data.bin", files={**engine["files"], **listed})

    edit(folder, plant)
    with pytest.raises(InputError, match="secret"):
        Pipeline.from_pretrained(folder, backend="onnx")("the cat", num_inference_steps=1)


def test_a_plan_takes_weights_from_its_own_files(tmp_path: Path) -> None:
    """Those that it lists or, before it is in a bundle, those beside it."""
    (tmp_path / "e").mkdir()
    for path in ("x.onnx", "e/x.onnx"):
        (tmp_path / path).write_bytes(b"\x08\x0a")  # a model of nothing but its version
    bare = bundle.Engine("denoiser", "tensorrt", "e/x.plan", "float16", (), (), {})
    listed = dataclasses.replace(bare, files={"e/x.plan": (1, ""), "e/x.onnx": (2, "")})
    plan = tmp_path / "e" / "x.plan"
    for engine in (bare, listed):
        assert tensorrt._beside(plan, engine, "x.onnx") == tmp_path / "e" / "x.onnx"
        for weights in ("../x.onnx", str(tmp_path / "x.onnx"), "y.onnx"):
            with pytest.raises(InputError, match="not among the files"):
                tensorrt._beside(plan, engine, weights)


def test_a_bundle_gives_the_cuda_provider_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "available", lambda device, target: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda place: None)
    for provider in ({"gpu_external_alloc": "1"}, {"user_compute_stream": "1"}, ["prefer_nhwc"]):
        options = {"provider": provider}
        engine = bundle.Engine("denoiser", "onnx", "x.onnx", "float16", (), (), {}, options=options)
        with pytest.raises(InputError, match="asks for the provider's"):
            onnxruntime.load(tmp_path / "x.onnx", engine, device="cuda", shared={})


def test_a_runtime_of_unknown_version_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MissingExtraError("the target 'onnx' needs onnxruntime")

    monkeypatch.setattr(store, "fields_for", refuse)
    engine = bundle.Engine("denoiser", "onnx", "x", "float32", (), (), {}, files={"x": (1, "00")})
    assert base.cached(engine, {"cache": tmp_path}, {}, lambda folder: folder is None, lambda folder: False)


def test_graphs_of_the_store_are_stale_with_other_libraries(bundled: Callable[[str], Path]) -> None:
    bundled("sd")
    graphs = [entry.fields for entry in store.entries() if entry.fields.get("target") == "graph"]
    assert graphs and not any(map(store.is_stale, graphs))
    for name in ("fastsd", "torch"):
        assert all(store.is_stale({**one, "versions": {**one["versions"], name: "0"}}) for one in graphs)


def test_what_a_bundle_says_of_itself(bundled: Callable[[str], Path], tmp_path: Path) -> None:
    """LoRAs in recipes, bytes by component, tables for one size, the tightest engine, the device's other name."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)

    def change(document: dict[str, Any]) -> None:
        tables = document["samplers"]["euler"]
        document["samplers"]["euler"] = {"file": tables, "tokens": 64}
        document["loras"] = {"style": 0.5}
        document["arguments"] = {"model": "a b", "lora": ["x:1", "y:2"], "weights": "random", "revision": None}

    edit(folder, change)
    pipe = Pipeline.from_pretrained(folder, backend="onnx", device="cpu:0")
    assert pipe.device == "cpu" and pipe.loras == {"style": 0.5}
    result = pipe("the cat", num_inference_steps=1, scheduler="euler", height=64)
    assert result.recipes[0].extra["loras"] == {"style": 0.5}
    with pytest.raises(InputError, match=r"tables of euler are for images of 64 tokens, not of 96: .*--height"):
        pipe("the cat", num_inference_steps=1, scheduler="euler", height=96)
    with pytest.raises(InputError, match=r"fastsd export 'a b' .*--lora x:1 --lora y:2 --weights random -o"):
        pipe("the cat", num_inference_steps=1, height=128)
    files = {path: size for one in bundle.read(folder).variants[0].engines for path, (size, _) in one.files.items()}
    assert sum(size for size, _ in pipe.memory().values()) == sum(files.values())

    manifest = bundle.read(folder)
    made = manifest.variants[0]
    denoiser = next(one for one in made.engines if one.component == "denoiser")
    sized = [(2, 2, 2), (1, 1, 2), (2, 2, 2), (1, 2, 2), (1, 2, 4)]
    engines = [
        dataclasses.replace(denoiser, path=str(i), profile={**denoiser.profile, "batch": batch})
        for i, batch in enumerate(sized)
    ]
    router = bundle.Router(folder, manifest, dataclasses.replace(made, engines=tuple(engines)), "cpu")
    dims = {"height": 8, "width": 8, "tokens": 77}
    for batch, expected in ((1, "3"), (2, "2"), (3, "4")):
        assert router._tightest("denoiser", {**dims, "batch": batch}).path == expected


@pytest.mark.full
def test_a_second_export_adds_to_the_bundle(
    bundled: Callable[[str], Path], export: Export, tiny: Path, make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)
    before = bundle.read(folder)
    larger = Sizes(height=(128, 128, 128), width=(64, 64, 64))
    manifest = export(tiny, folder, (ONNX,), sizes=larger, samplers=["heun"])
    assert set(manifest.samplers) == {*before.samplers, "heun"}
    assert len(manifest.variants) == 2 and bundle.read(folder).variants == manifest.variants
    pipe = Pipeline.from_pretrained(folder, backend="onnx")
    eager = Pipeline.from_pretrained(tiny, dtype="float32", device="cpu")
    for height, scheduler in ((64, "heun"), (128, "dpmpp_2m")):
        call: dict[str, Any] = {
            "height": height,
            "width": 64,
            "scheduler": scheduler,
            "seed": 2,
            "num_inference_steps": 3,
        }
        ours, theirs = (one("the cat", output_type="np", **call).images for one in (pipe, eager))
        assert np.abs(ours - theirs).max() <= 1 / 255  # as above
    other = make_checkpoint("sd", seed=1)
    with pytest.raises(InputError, match="of other weights"):
        export(other, folder, (ONNX,))
    assert bundle.read(folder).variants == manifest.variants


def test_what_strays_is_not_written(
    bundled: Callable[[str], Path], export: Export, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser with one wrong weight: the error names it, and neither bundle nor engine is left."""
    bundled("sd")  # its graphs are in the store
    fill = build.onnx.fill

    def wrong(path: Path, weights: Any, state: dict[str, Any]) -> None:
        if path.name == "denoiser.onnx":
            name = "mid_block.attentions.0.proj_in.weight"
            state = {**state, name: 5 * state[name]}
        fill(path, weights, state)

    monkeypatch.setattr(build.onnx, "fill", wrong)
    with pytest.raises(NumericError, match=r"denoiser in bfloat16: its prediction .*; the graph itself differs"):
        export(tiny, tmp_path / "bundle", (Lane("openvino", "bfloat16"),))
    assert not list(tmp_path.iterdir())
    built = {entry.fields["component"] for entry in store.entries() if entry.fields.get("precision") == "bfloat16"}
    assert "text_encoder" in built and "denoiser" not in built


def test_the_manifest_survives_its_json(bundled: Callable[[str], Path]) -> None:
    manifest = bundle.read(bundled("sd"))
    again = json.loads(manifest.to_json())
    assert again["format"] == bundle.FORMAT and again["version"] == bundle.VERSION
    for variant in manifest.variants:
        assert variant.record["verification"]["worst"]["psnr"] > 40
        for engine in variant.engines:
            assert engine.record["verification"]["samples"] >= 4
            assert {"versions", "machine", "weights", "build_seconds", "peak_bytes"} <= engine.record.keys()
    assert dataclasses.asdict(manifest) == dataclasses.asdict(bundle.read(bundled("sd")))


def test_a_missing_torch_names_the_extra_where_it_is_needed(bundled: Callable[[str], Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import fastsd; "
        f"fastsd.Pipeline.from_pretrained({str(bundled('sd'))!r}, backend='onnx')"
        "('the cat', num_inference_steps=1, output_type='pt')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "MissingExtraError" in run.stderr and "fastsd[cpu]" in run.stderr
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['torch'] = None; import fastsd; fastsd.Pipeline.from_pretrained()",
        ],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert "MissingExtraError" in run.stderr
    assert fastsd.Pipeline is Pipeline


@pytest.mark.full
def test_a_lora_is_merged(
    bundled: Callable[[str], Path], tiny: Path, export: Callable[..., Any], tmp_path: Path
) -> None:
    """Into the denoiser and the text encoder, each in memory alone; the recipe names it."""
    import torch
    from safetensors.torch import save_file

    bundled("sd")  # its graphs are in the store
    generator = torch.Generator().manual_seed(0)
    places = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 32,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 24,
    }
    state = {}
    for name, width in places.items():
        state[f"{name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
    path = tmp_path / "style.safetensors"
    save_file(state, path)
    export(tiny, tmp_path / "bundle", (ONNX,), loras=[(str(path), 0.7)])
    pipe = Pipeline.from_pretrained(tmp_path / "bundle")
    eager = Pipeline.from_pretrained(tiny, dtype="float32", device="cpu")
    call: dict[str, Any] = {"seed": 2, "num_inference_steps": 3, "output_type": "np"}
    without = eager("the red cat", **call).images
    eager.load_lora(path, 0.7)
    ours = pipe("the red cat", **call)
    assert np.abs(ours.images - eager("the red cat", **call).images).max() <= 1 / 255  # one level
    assert np.abs(ours.images - without).max() > 10 / 255
    assert list(json.loads(ours.recipes[0].to_json())["extra"]["loras"].values()) == [0.7]


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_with_one_size_and_no_guidance_nothing_varies(
    family: str, make_checkpoint: Make, export: Callable[..., Any], tmp_path: Path
) -> None:
    """Positions are constants then, and every shape of every engine is fixed."""
    model = make_checkpoint(family)
    sizes = Sizes(height=(64, 64, 64), width=(64, 64, 64), guidance="off")
    manifest = export(model, tmp_path / "bundle", (ONNX,), sizes=sizes)
    specs = [spec for engine in manifest.variants[0].engines for spec in (*engine.inputs, *engine.outputs)]
    assert all(isinstance(size, int) for spec in specs for size in spec.shape)
    call: dict[str, Any] = {"seed": 2, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
    pipe = Pipeline.from_pretrained(tmp_path / "bundle")
    eager = Pipeline.from_pretrained(model, dtype="float32", device="cpu")
    ours = pipe("the red cat", **call).images
    assert np.abs(ours - eager("the red cat", height=64, width=64, **call).images).max() <= 1 / 255  # one level


@pytest.mark.full
def test_a_venv_without_torch_makes_the_image(bundled: Callable[[str], Path], tiny: Path, tmp_path: Path) -> None:
    """Nothing but the core's dependencies and one runtime: what a product ships."""
    import venv

    root = Path(__file__).parent.parent.parent
    call = "('the red cat', seed=3, num_inference_steps=4, output_type='np').images"
    eager = Pipeline.from_pretrained(tiny, dtype="float32", device="cpu")
    expected = eager("the red cat", seed=3, num_inference_steps=4, output_type="np").images
    for library, backend in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        venv.create(tmp_path / backend, with_pip=True)
        python = str(tmp_path / backend / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", str(root), library], check=True, capture_output=True)
        code = (
            "import importlib.util, numpy, fastsd; "
            "assert not any(map(importlib.util.find_spec, ('torch', 'diffusers', 'transformers', 'onnx'))); "
            f"pipe = fastsd.Pipeline.from_pretrained({str(bundled('sd'))!r}, backend={backend!r}); "
            f"numpy.save({str(tmp_path / backend)!r} + '.npy', pipe{call})"
        )
        run = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
        assert run.returncode == 0, run.stderr
        assert np.abs(np.load(tmp_path / f"{backend}.npy") - expected).max() <= 1 / 255  # one level
