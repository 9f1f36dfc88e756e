"""Backends beside `diffusers`, on the CPU: `python -m fastsd_benchmarks.engines demo --bundle DIR`.

    demo   128 x 128, 20 steps: a call and a cold process, the images' distance from float32,
           and what the images show of 400 captions
    sd15   512 x 512, 3 steps, random weights; with a bundle of `fastsd export sd15 --weights random --guidance on
           --to onnx,openvino,aoti --quantize int8 -o DIR` also its engines, and the same UNet exported whole

`--lanes` chooses some of them, as all together take 25 GB of memory for sd15. All run in turns in one process, so that
a busy machine slows all alike; ratios are medians of each round's ratio, with the interval that holds 95 % of the
medians of rounds drawn anew (bootstrap). The peer is the faster of `diffusers` in bfloat16 in its two memory layouts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastsd import bundle, machine
from fastsd.backends import base, load_backend
from fastsd.pipeline import Pipeline
from fastsd_benchmarks.measure import environment

MODELS: dict[str, dict[str, Any]] = {
    "demo": {"prompt": "a red circle on a blue background", "steps": 20, "scheduler": "dpmpp_2m", "size": 128},
    "sd15": {"prompt": "a photograph of a cat", "steps": 3, "scheduler": "dpmpp_2m", "size": 512},
}
PEERS = ("diffusers float32", "diffusers bfloat16", "diffusers bfloat16 NCHW", "diffusers bfloat16 compiled")
MODULES = ("eager bfloat16", "compile bfloat16")
ENGINES = ("aoti bfloat16", "onnx float32", "openvino float32", "openvino bfloat16", "openvino int8")
SEED = 7

Call = Callable[[], tuple[np.ndarray[Any, Any], float]]  # pixels, seconds of a step


def lanes(folder: Path | None) -> list[str]:
    """Those of `ENGINES` that the bundle has."""
    has = {f"{one.target} {one.precision}" for one in bundle.read(folder).variants} if folder else ()
    return [lane for lane in ENGINES if lane in has]


def opened(name: str, folder: Path | None, lane: str) -> Pipeline:
    """The pipeline of a lane of ours."""
    target, precision = lane.split()
    if lane in MODULES:
        weights = "checkpoint" if name == "demo" else "random"
        return Pipeline.from_pretrained(name, backend=target, dtype=precision, device="cpu", weights=weights)
    return Pipeline.from_pretrained(str(folder), backend=target, dtype=precision, device="cpu")


def _ours(pipe: Pipeline, model: Mapping[str, Any]) -> Call:
    def call() -> tuple[np.ndarray[Any, Any], float]:
        result = pipe(
            model["prompt"],
            seed=SEED,
            num_inference_steps=model["steps"],
            scheduler=model["scheduler"],
            height=model["size"],
            width=model["size"],
            output_type="np",
        )
        return result.images, statistics.median(result.timings.steps)

    return call


def peer(name: str, model: Mapping[str, Any], lane: str) -> Call:
    """`diffusers` on the same weights, seed and sampler: channels last unless the lane says NCHW."""
    import diffusers

    from fastsd import checkpoint, presets, random_weights
    from fastsd.families import sd
    from fastsd.text import windows

    dtype = torch.float32 if "float32" in lane else torch.bfloat16
    defaults = {**sd.DEFAULTS["StableDiffusionPipeline"], **presets.PRESETS[name].defaults}
    if name == "demo":
        folder = checkpoint.resolve(name)
        defaults |= checkpoint.source(folder).index.get("_fastsd", {})
        pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
        tokenizer = checkpoint.source(folder).tokenizer("tokenizer")
    else:
        pipeline = _random(name, dtype)
        tokenizer = random_weights.source(presets.PRESETS[name]).tokenizer("tokenizer")
    if not lane.endswith("NCHW"):
        pipeline.unet.to(memory_format=torch.channels_last)
    if lane.endswith("compiled"):
        pipeline.unet = torch.compile(pipeline.unet, fullgraph=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    ids = [windows(tokenizer, text, 77, "cut")[0] for text in (model["prompt"], "")]

    def call() -> tuple[np.ndarray[Any, Any], float]:
        ends: list[float] = [time.perf_counter()]

        def after(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            return values

        with torch.inference_mode():
            prompt, negative = (pipeline.text_encoder(torch.tensor([one]))[0] for one in ids)
        images = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            num_inference_steps=model["steps"],
            guidance_scale=defaults["guidance_scale"],
            generator=torch.Generator().manual_seed(SEED),
            height=model["size"],
            width=model["size"],
            output_type="np",
            callback_on_step_end=after,
        ).images
        return images, statistics.median(np.diff(ends).tolist()[1:])

    return call


def _random(name: str, dtype: torch.dtype) -> Any:
    """The preset's architecture in `diffusers`, with the random weights that ours has."""
    import diffusers
    import transformers

    from fastsd import presets, random_weights

    source = random_weights.source(presets.PRESETS[name])
    cpu = torch.device("cpu")

    def load(make: Callable[[dict[str, Any]], Any], component: str) -> Any:
        with torch.device("meta"):
            module = make(source.config(component))
        source.load(module, component, dtype, cpu)
        return module

    return diffusers.StableDiffusionPipeline(
        vae=load(diffusers.AutoencoderKL.from_config, "vae"),
        text_encoder=load(
            lambda config: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)), "text_encoder"
        ),
        tokenizer=None,
        unet=load(diffusers.UNet2DConditionModel.from_config, "unet"),
        scheduler=getattr(diffusers, source.index["scheduler"][1]).from_config(source.config("scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def whole_unet(name: str, folder: Path, size: int) -> Callable[[], Any]:
    """`diffusers`' UNet exported as it is, time embeddings and text keys and values in every step, by OpenVINO."""
    import diffusers
    import openvino as ov

    from fastsd import checkpoint, presets, random_weights

    source = (
        random_weights.source(presets.PRESETS[name]) if name != "demo" else checkpoint.source(checkpoint.resolve(name))
    )
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(source.config("unet"))
    source.load(unet, "unet", torch.float32, torch.device("cpu"))
    text = torch.randn(2, 77, unet.config.cross_attention_dim)
    inputs = (torch.randn(2, 4, size // 8, size // 8), torch.tensor(500.0), text)

    class Whole(torch.nn.Module):
        def __init__(self, unet: torch.nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, text: Any) -> Any:
            return self.unet(sample, timestep, text, return_dict=False)[0]

    path = folder / "whole.onnx"
    torch.onnx.export(
        Whole(unet).eval(), inputs, str(path), dynamo=True, opset_version=20, external_data=True, verbose=False
    )
    given = [tensor.numpy() for tensor in inputs]
    del unet, inputs
    gc.collect()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": base.threads(),
    }
    request = ov.Core().compile_model(str(path), "CPU", config).create_infer_request()
    return lambda: request.infer(dict(enumerate(given)), share_inputs=True)


def interval(ratios: list[float]) -> tuple[float, float]:
    """What holds 95 % of the medians of as many ratios, drawn with replacement."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def compare(name: str, folder: Path | None, rounds: int, chosen: Sequence[str]) -> dict[str, Any]:
    """All in turns: a call and a step of each, and the distance of its image from that of float32."""
    model = MODELS[name]
    reference = peer(name, model, "diffusers float32")()[0]
    gc.collect()
    calls = {lane: peer(name, model, lane) for lane in PEERS if lane in chosen}
    calls |= {lane: _ours(opened(name, folder, lane), model) for lane in chosen if lane not in PEERS}
    rows: list[dict[str, Any]] = []
    for lane, call in calls.items():  # the warm-up as well
        started = time.perf_counter()
        images = call()[0]
        rows.append({"name": lane, "first_seconds": time.perf_counter() - started, **_distance(reference, images)})
    seconds: dict[str, list[float]] = {lane: [] for lane in calls}
    steps: dict[str, list[float]] = {lane: [] for lane in calls}
    for _ in range(rounds):
        for lane, call in calls.items():
            started = time.perf_counter()
            steps[lane].append(call()[1])
            seconds[lane].append(time.perf_counter() - started)
    median = {lane: statistics.median(values) for lane, values in steps.items()}
    best = min((lane for lane in PEERS[1:3] if lane in calls), key=lambda lane: median[lane])

    def ratio(lane: str, other: str) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(steps[lane], steps[other], strict=True)]
        return {"median": statistics.median(ratios), "interval": interval(ratios)}

    for row in rows:
        lane = row["name"]
        compared = ratio(lane, best)
        row |= {"seconds": statistics.median(seconds[lane]), "step_ms": 1000 * median[lane]}
        row |= {"step_ratio": compared["median"], "step_ratio_interval": compared["interval"]}
    report: dict[str, Any] = {"rows": rows, "peer": best}
    if {"openvino int8", "openvino bfloat16"} <= calls.keys():
        report["int8 / bfloat16"] = ratio("openvino int8", "openvino bfloat16")
    return report


def _distance(reference: np.ndarray[Any, Any], images: np.ndarray[Any, Any]) -> dict[str, float]:
    from fastsd_export import verify

    return {"psnr": verify.psnr(reference, images), "ssim": verify.ssim(reference, images)}


def against_whole(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """A step of the engine in bfloat16 beside the UNet exported whole, on inputs of the same shapes."""
    model = MODELS[name]
    size = model["size"]
    manifest = bundle.read(folder)
    variant = next(one for one in manifest.variants if (one.target, one.precision) == ("openvino", "bfloat16"))
    spec = next(one for one in variant.engines if one.component == "denoiser")
    dims = {"batch": 2, "tokens": 77, "height": size // 8, "width": size // 8}
    arrays = {
        one.name: np.random.default_rng(0).standard_normal([dims.get(str(d), d) for d in one.shape], np.float32)
        for one in spec.inputs
    }
    run = load_backend("openvino").load(folder / spec.path, spec, device="cpu", shared={})
    with tempfile.TemporaryDirectory() as work:
        whole = whole_unet(name, Path(work), size)
        calls = {"denoiser": lambda: run(**arrays), "whole": whole}
        seconds: dict[str, list[float]] = {one: [] for one in calls}
        for turn in range(rounds + 1):
            for one, call in calls.items():
                started = time.perf_counter()
                call()
                if turn:  # the first warms up
                    seconds[one].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["denoiser"], seconds["whole"], strict=True)]
    return {
        "step_ms": 1000 * statistics.median(seconds["denoiser"]),
        "whole_ms": 1000 * statistics.median(seconds["whole"]),
        "ratio": statistics.median(ratios),
        "interval": interval(ratios),
    }


COLD = """
import sys
import fastsd
folder, backend, dtype, weights, out = sys.argv[1:]
pipe = fastsd.Pipeline.from_pretrained(folder, backend=backend, dtype=dtype, weights=weights)
result = pipe(
    {prompt!r}, seed=7, num_inference_steps={steps}, scheduler={scheduler!r}, height={size}, width={size}
)
result.save(out, overwrite=True)
"""


def cold_starts(name: str, folder: Path, repeats: int, chosen: Sequence[str]) -> dict[str, float]:
    """Median seconds of a process from its start to the saved image, by lane, with whatever caches it keeps warm."""
    model = MODELS[name]
    ways: dict[str, tuple[str, ...]] = {}
    for lane in [lane for lane in chosen if lane not in PEERS] + ["eager float32"]:
        random = "random" if name != "demo" and lane not in lanes(folder) else "checkpoint"
        ways[lane] = (str(folder) if lane in lanes(folder) else name, *lane.split(), random)
    seconds: dict[str, list[float]] = {lane: [] for lane in ways}
    with tempfile.TemporaryDirectory() as work:
        for turn in range(repeats + 1):
            for lane, arguments in ways.items():
                started = time.perf_counter()
                code = COLD.format(**model)
                subprocess.run([sys.executable, "-c", code, *arguments, f"{work}/image.png"], check=True)
                if turn:  # the first fills the caches, which a machine has after one run
                    seconds[lane].append(time.perf_counter() - started)
    return {lane: statistics.median(values) for lane, values in seconds.items()}


def shown(folder: Path, captions: int, chosen: Sequence[str]) -> dict[str, Any]:
    """What the demo's images show of as many captions, by lane: the same prompts and seeds for all.

    Beside the shares of what is right, the difference from float32 in percentage points of all that is judged, with the
    interval that holds 95 % of the differences of captions drawn anew.
    """
    from fastsd.demo import evaluate, world

    scenes = [
        scene
        for unseen in (False, True)
        for scene in evaluate.draw_scenes(captions // 2, unseen=unseen, rng=np.random.default_rng((SEED, unseen)))
    ]
    rng = np.random.default_rng(SEED)
    prompts = [world.caption(scene, rng) for scene in scenes]
    scores: dict[str, Any] = {}
    right: dict[str, Any] = {}
    for lane in ["eager float32", *(lane for lane in chosen if lane not in PEERS)]:
        target, precision = lane.split()
        where = str(folder) if lane in lanes(folder) else "demo"
        pipe = Pipeline.from_pretrained(where, backend=target, dtype=precision, device="cpu")
        images = []
        for i, prompt in enumerate(prompts):
            result = pipe(prompt, seed=i, num_inference_steps=20, scheduler="dpmpp_2m")
            images.append(np.asarray(result.images[0]))
        each = [evaluate.score([scene], [image]) for scene, image in zip(scenes, images, strict=True)]
        right[lane] = np.array([np.mean([value for value in one.values() if np.isfinite(value)]) for one in each])
        differences = 100 * (right[lane] - right["eager float32"])
        drawn = np.random.default_rng(0).choice(differences, (2000, len(differences))).mean(1)
        scores[lane] = {
            **evaluate.score(scenes, images),
            "points": float(differences.mean()),
            "points_interval": [float(value) for value in np.quantile(drawn, [0.025, 0.975])],
        }
    return scores


def main() -> None:
    """Measure, print a table, and with `--json FILE` write the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--bundle", type=Path, help="a folder that `fastsd export` made")
    parser.add_argument("--lanes", help=f"some of: {', '.join((*PEERS, *MODULES, *ENGINES))}; by default all there are")
    parser.add_argument("--size", type=int, help="pixels on a side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", type=int, default=0, help="processes of each lane that are timed from their start")
    parser.add_argument("--captions", type=int, default=400, help="of the demo, that its images are judged by")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    here = [*PEERS, *MODULES, *lanes(args.bundle)]
    chosen = [lane.strip() for lane in args.lanes.split(",")] if args.lanes else here
    if unknown := [lane for lane in chosen if lane not in here]:
        parser.error(f"there is no {', '.join(unknown)}: use {', '.join(here)}")
    if not set(PEERS[1:3]) & set(chosen):
        parser.error(f"--lanes needs one of {' and '.join(PEERS[1:3])}, beside which the others are measured")
    MODELS[args.model]["size"] = args.size or MODELS[args.model]["size"]
    report: dict[str, Any] = {
        "model": args.model,
        **MODELS[args.model],
        "environment": environment(torch.device("cpu")),
        "machine": machine.describe("cpu"),
        **compare(args.model, args.bundle, args.rounds, chosen),
    }
    gc.collect()
    if "openvino bfloat16" in chosen:
        report["denoiser / whole UNet"] = against_whole(args.model, args.bundle, args.rounds)
    if args.cold:
        report["cold_start_seconds"] = cold_starts(args.model, args.bundle, args.cold, chosen)
    if args.model == "demo" and args.captions:
        report["shown"] = shown(args.bundle, args.captions, chosen)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    console = Console()
    table = Table(title=f"{args.model}, {report['size']} x {report['size']}, {report['steps']} steps", box=None)
    for heading in ("", "first call s", "s a call", "ms a step", "of the peer's step", "interval", "PSNR dB", "SSIM"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        low, high = row["step_ratio_interval"]
        numbers = (
            f"{row['first_seconds']:.3g}",
            f"{row['seconds']:.3g}",
            f"{row['step_ms']:.4g}",
            f"{row['step_ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
        )
        table.add_row(row["name"], *numbers, f"{row['psnr']:.1f}", f"{row['ssim']:.4f}")
    console.print(table)
    for name in ("int8 / bfloat16", "denoiser / whole UNet", "cold_start_seconds", "shown"):
        if name in report:
            console.print(name, report[name])


if __name__ == "__main__":
    main()
