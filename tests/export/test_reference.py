"""What is recorded is what the eager pipeline computes, with one component loaded at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fastsd import Pipeline, checkpoint, families, text, vae
from fastsd.arrays import to_numpy
from fastsd.errors import InputError
from fastsd.families import Components
from fastsd_export import reference, trace, verify
from fastsd_export.reference import NEGATIVE, PROMPTS, Case, Denoised
from fastsd_export.verify import Sample

CPU = torch.device("cpu")
# The same float32 modules in another order of calls.
SAME = 1e-5

VARIABLE = {"batch": (2, 2, 4), "height": (4, 8, 12), "width": (4, 8, 12)}
SINGLE = {**VARIABLE, "batch": (1, 1, 2)}  # Flux has no halves of guidance


class Recorded(NamedTuple):
    folder: Path
    bare: Components
    todo: list[Case]
    samples: dict[str, list[Sample]]
    denoised: Denoised
    images: list[Any]


def load(folder: Path, *names: str) -> Components:
    source = checkpoint.source(checkpoint.resolve(str(folder)), None)
    return families.load(source, torch.float32, CPU, only=names)


def record(folder: Path, profile: dict[str, tuple[int, int, int]], **options: Any) -> Recorded:
    """The stages, each with its own component in memory and no other."""
    bare = load(folder)
    family = families.family(bare.index["_class_name"])
    todo = reference.cases(reference.pipeline(bare, {}), profile, **options)
    samples: dict[str, list[Sample]] = {}
    for place, (name, inputs) in enumerate(reference.text_inputs(bare, todo).items()):
        encoder = family.ENCODERS[place]
        module = load(folder, name).text_encoders[place]
        choices = module.config.num_hidden_layers + encoder.layer + 1 if encoder.is_clip else 1
        traced = trace.text_encoder(encoder, module, inputs[0]["ids"].shape[1], choices)
        samples[name] = reference.samples(traced, inputs)
    loaded = load(folder, family.DENOISER[0])
    prepare, step = trace.prepare(family, loaded, 77), trace.denoiser(family, loaded, 77)
    calibrate = bool(options.get("calibration"))
    denoised = reference.denoise(bare, todo, samples, prepare, step, calibrate=calibrate)
    samples |= {"prepare": denoised.prepare, "denoiser": denoised.denoiser}
    own = load(folder, "vae").vae
    decoded = reference.samples(trace.vae_decoder(own), reference.vae_inputs(denoised.latents))
    pixels = [{"pixels": sample.outputs["pixels"]} for sample in decoded]
    samples |= {"vae_decoder": decoded, "vae_encoder": reference.samples(trace.vae_encoder(own), pixels)}
    return Recorded(folder, bare, todo, samples, denoised, reference.decoded(decoded, denoised.latents))


@pytest.fixture(scope="module")
def recordings(make_checkpoint: Callable[..., Path]) -> Callable[[str], Recorded]:
    made: dict[str, Recorded] = {}

    def get(family: str) -> Recorded:
        if family not in made:
            made[family] = record(make_checkpoint(family), SINGLE if family == "flux" else VARIABLE, calibration=24)
        return made[family]

    return get


FAMILIES = ("sd", "sdxl", "sd3", "flux")


@pytest.mark.parametrize("family", FAMILIES)
def test_trajectories_are_those_of_the_eager_pipeline(family: str, recordings: Callable[[str], Recorded]) -> None:
    recorded = recordings(family)
    pipe = Pipeline.from_pretrained(recorded.folder, dtype="float32", device="cpu")
    ran = [case for case in recorded.todo if not case.only_prepare]
    assert len(ran) == len(recorded.denoised.latents) == len(recorded.images)
    for case, latents, images in zip(ran, recorded.denoised.latents, recorded.images, strict=True):
        wanted = reference.run(pipe, case)
        assert latents.dtype == np.float32 and latents.shape == wanted.shape
        assert verify.compare(wanted, latents).relative < SAME, str(case)
        assert verify.psnr(pipe.decode(torch.from_numpy(wanted)), images) > 100
    report = verify.check_images(
        [(latents, latents) for latents in recorded.denoised.latents],
        [(images, images) for images in recorded.images],
        "float32",
    )
    assert report["runs"] == len(ran)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_component_has_enough_samples_of_all_sizes(family: str, recordings: Callable[[str], Recorded]) -> None:
    recorded = recordings(family)
    for name, samples in recorded.samples.items():
        assert len(samples) >= verify.SAMPLES, name
        for sample in samples:
            arrays = [*sample.inputs.values(), *sample.outputs.values()]
            assert all(isinstance(array, np.ndarray) and np.isfinite(array).all() for array in arrays), name
            assert {str(array.dtype) for array in arrays} <= {"float32", "int64"}
    denoiser = recorded.samples["denoiser"]
    shapes = {sample.inputs["latents"].shape for sample in denoiser}
    profile = SINGLE if family == "flux" else VARIABLE
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        low, usual, high = profile[name]
        assert {low, usual, high} <= {shape[axis] for shape in shapes}
    odd = [s for s in shapes if s[2] != s[3]]
    assert len(odd) == 1 and odd[0][2] not in profile["height"] and odd[0][3] not in profile["width"]
    calls = [sample.label.rpartition(", call ")[2] for sample in denoiser[:6]]
    assert calls == ["1", "5", "8", "1", "3", "4"]  # first, middle and last of 8 and of 4 steps
    # Each prepare sees another set of timesteps; one has a single step, one all of the checkpoint's own number.
    counts = {len(np.unique(sample.inputs["timesteps"][:, 0])) for sample in recorded.samples["prepare"]}
    most = min(64, Pipeline.from_pretrained(recorded.folder).defaults["num_inference_steps"])
    assert {1, 2, 4, 8, most} <= counts


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_what_the_components_compute(family: str, recordings: Callable[[str], Recorded]) -> None:
    recorded = recordings(family)
    everything = Pipeline.from_pretrained(recorded.folder, dtype="float32", device="cpu")
    components, module = everything.components, everything.family
    for encoder, part in zip(module.ENCODERS, components.text_encoders, strict=True):
        for sample in recorded.samples[encoder.name]:
            states, ids = sample.outputs["states"], sample.inputs["ids"].tolist()
            for skip in range(len(states)):
                # Layers are skipped from the first that is read on; None and 0 are one.
                encoding = text.read(encoder, part, ids, skip if encoder.is_clip else None)
                assert verify.compare(to_numpy(encoding.states[0]), states[skip]).relative < SAME
            if encoder.is_clip:
                assert verify.compare(to_numpy(encoding.pooled), sample.outputs["pooled"]).relative < SAME
    for sample in recorded.samples["denoiser"]:
        given = {name: torch.from_numpy(value) for name, value in sample.inputs.items()}
        with torch.inference_mode():
            prediction = components.denoiser(*given.values())
        assert verify.compare(prediction, sample.outputs["prediction"]).relative < SAME
    for sample in recorded.samples["vae_decoder"]:
        pixels = vae.decode(components.vae, torch.from_numpy(sample.inputs["latents"]))
        assert verify.compare(pixels, sample.outputs["pixels"]).relative < SAME
    for sample in recorded.samples["vae_encoder"]:
        latents = vae.encode(components.vae, torch.from_numpy(sample.inputs["pixels"]))
        assert verify.compare(latents, sample.outputs["latents"]).relative < SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_the_float32_components_pass_their_own_gate(family: str, recordings: Callable[[str], Recorded]) -> None:
    recorded = recordings(family)
    engines = {name: reference.replay(samples) for name, samples in recorded.samples.items()}
    for name, samples in recorded.samples.items():
        report = verify.check_component(name, engines[name], samples, "float32")
        assert report["samples"] == len(samples)
        # A component that is a little off, in one place of one sample, is found.
        last = next(iter(samples[-1].outputs))

        def off(name: str = name, last: str = last, samples: list[Sample] = samples, **inputs: Any) -> Any:
            outputs = list(engines[name](**inputs))
            if all(np.array_equal(inputs[key], samples[-1].inputs[key]) for key in inputs):
                outputs[0] = outputs[0].copy()
                outputs[0].reshape(-1)[-1] += 2e-4 * np.abs(outputs[0]).max()
            return tuple(outputs)

        with pytest.raises(verify.Strayed, match=f"{name} in float32: its {last}"):
            verify.check_component(name, off, samples, "float32")


def test_calibration_inputs_are_spread_and_what_never_changes_is_kept_once(
    recordings: Callable[[str], Recorded],
) -> None:
    recorded = recordings("sd")
    inputs = recorded.denoised.inputs
    assert len(inputs) == sum(case.steps for case in recorded.todo if not case.only_prepare) >= 24
    assert len({id(one["context"]) for one in inputs}) < len({id(one["latents"]) for one in inputs}) == len(inputs)
    for chosen in (reference.spread(inputs, 8), reference.spread(inputs, 1000)):
        assert chosen[0] is inputs[0] and chosen[-1] is inputs[-1]
        assert len(chosen) == len({id(one) for one in chosen}) == min(8 if len(chosen) == 8 else 1000, len(inputs))
    assert reference.spread([], 8) == [] and len(reference.spread(inputs, 1)) == 1
    assert not record(
        recorded.folder, {name: (2, 2, 2) if name == "batch" else (8, 8, 8) for name in VARIABLE}
    ).denoised.inputs


def test_what_was_not_recorded_is_refused(recordings: Callable[[str], Recorded]) -> None:
    recorded = recordings("sd")
    run = reference.replay(recorded.samples["text_encoder"])
    with pytest.raises(InputError, match="not recorded"):
        run(ids=np.zeros((1, 77), np.int64))
    stranger = Case(("a prompt of no case",), None, 8, 8, 1, 1.0)
    engines = {"text_encoder": (run, ())}
    with pytest.raises(InputError, match="not recorded"):
        reference.run(reference.pipeline(recorded.bare, engines), stranger)


def fixed(**sizes: int) -> dict[str, tuple[int, int, int]]:
    return {name: (size, size, size) for name, size in sizes.items()}


CASES = [
    # family, options of the checkpoint, profile -> batch rows, steps and guidance of the cases that run
    ("sd", {}, fixed(batch=2, height=8, width=8), [(2, 8, 7.5), (2, 4, 4.5)]),
    ("sd", {}, fixed(batch=1, height=8, width=8), [(1, 8, 1.0), (1, 4, 1.0)]),
    ("sd", {}, {**fixed(height=8, width=8), "batch": (1, 2, 6)}, [(2, 8, 7.5), (2, 4, 4.5), (1, 2, 1.0), (6, 2, 7.5)]),
    ("flux", {}, fixed(batch=2, height=8, width=8), [(2, 8, 3.5), (2, 4, 2.1)]),
    ("sd", {"unet": {"time_cond_proj_dim": 8}}, fixed(batch=1, height=8, width=8), [(1, 8, 7.5), (1, 4, 4.5)]),
]


@pytest.mark.parametrize(("family", "options", "profile", "wanted"), CASES, ids=lambda value: str(value)[:40])
def test_cases_follow_the_profile(
    family: str,
    options: dict[str, Any],
    profile: dict[str, Any],
    wanted: list[Any],
    make_checkpoint: Callable[..., Path],
) -> None:
    bare = load(make_checkpoint(family, **options))
    line = reference.pipeline(bare, {})
    todo = reference.cases(line, profile)
    ran = [case for case in todo if not case.only_prepare]

    def rows(case: Case) -> int:
        guided = line.family.guidance(bare, case.guidance_scale, 1.0, False) > 1
        return len(case.prompts) * (2 if guided else 1)

    assert [(rows(case), case.steps, case.guidance_scale) for case in ran] == wanted
    assert [case.steps for case in todo if case.only_prepare] == [1, line.defaults["num_inference_steps"]]
    assert todo[0].prompts[0] == PROMPTS[0] and todo[1].prompts[0] == PROMPTS[1]
    assert {case.negative_prompt for case in todo} <= {None, NEGATIVE} and len({case.seed for case in todo}) == len(
        todo
    )
    assert all(case.scheduler is None for case in todo)


def test_few_step_checkpoints_are_run_for_as_many_prompts(make_checkpoint: Callable[..., Path]) -> None:
    bare = load(make_checkpoint("sdxl"))
    line = reference.pipeline(bare, {}, defaults={"num_inference_steps": 1, "guidance_scale": 0.0})
    ran = [case for case in reference.cases(line, fixed(batch=1, height=8, width=8)) if not case.only_prepare]
    assert [case.steps for case in ran] == [1] * verify.SAMPLES
    assert len({case.prompts for case in ran}) == verify.SAMPLES and {case.guidance_scale for case in ran} == {0.0}
    ran = [c for c in reference.cases(line, fixed(batch=1, height=8, width=8), calibration=9) if not c.only_prepare]
    assert sum(case.steps for case in ran) == 9


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # diffusers divides by zero: that is what makes no table
@pytest.mark.parametrize(("family", "stand_in"), [("sd", "euler"), ("sd3", "flow_euler")])
def test_a_scheduler_that_makes_no_table_has_a_stand_in(
    family: str, stand_in: str, make_checkpoint: Callable[..., Path]
) -> None:
    bare = load(make_checkpoint(family))
    name = bare.scheduler["_class_name"]
    odd = {"clip_sample": True} if family == "sd" else {"shift_terminal": 1.0}
    broken = Components(**{**vars(bare), "scheduler": {**bare.scheduler, "_class_name": name, **odd}})
    todo = reference.cases(reference.pipeline(broken, {}), fixed(batch=2, height=8, width=8))
    assert {case.scheduler for case in todo} == {stand_in}


TOKENS = [("sd", (77, 77, 154)), ("sdxl", (77, 154, 231)), ("sd3", (77 + 8, 77 + 16, 77 + 32)), ("flux", (8, 16, 40))]


@pytest.mark.parametrize(("family", "tokens"), TOKENS, ids=[family for family, _ in TOKENS])
def test_texts_of_other_lengths(
    family: str, tokens: tuple[int, int, int], make_checkpoint: Callable[..., Path]
) -> None:
    batch = 1 if family == "flux" else 2
    profile = {**fixed(batch=batch, height=8, width=8), "tokens": tokens}
    recorded = record(make_checkpoint(family), profile)
    read = {case.tokens for case in recorded.todo}
    assert read == set(tokens)
    seen = {sample.inputs["hidden_states"].shape[1] for sample in recorded.samples["prepare"]}
    assert seen == set(tokens)
    pipe = Pipeline.from_pretrained(recorded.folder, dtype="float32", device="cpu")
    ran = [case for case in recorded.todo if not case.only_prepare]
    for case, latents in zip(ran, recorded.denoised.latents, strict=True):
        assert verify.compare(reference.run(pipe, case), latents).relative < SAME


def test_a_checkpoint_without_its_t5(make_checkpoint: Callable[..., Path]) -> None:
    recorded = record(make_checkpoint("sd3", t5=False), fixed(batch=2, height=8, width=8))
    assert "text_encoder_3" not in recorded.samples and len(recorded.denoised.latents) == 2


def test_few_latents_are_joined_by_their_mirror_images() -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 3, 5)).astype(np.float32)
    inputs = [one["latents"] for one in reference.vae_inputs([latents])]
    assert len(inputs) == verify.SAMPLES
    flips = (latents, latents[..., ::-1], latents[..., ::-1, :], latents[..., ::-1, ::-1])
    for image, flipped in zip(inputs, flips, strict=True):
        assert np.array_equal(image, flipped) and image.flags.c_contiguous
    three = np.concatenate([latents, 2 * latents, 3 * latents])
    inputs = [one["latents"] for one in reference.vae_inputs([three])]
    assert len(inputs) == 4 and np.array_equal(inputs[3], latents[..., ::-1])
    assert len(reference.vae_inputs([three, three])) == 6
