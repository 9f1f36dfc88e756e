"""What engines are verified with: calls of the float32 components in real trajectories, one component loaded at a time.

inputs    `todo = cases(pipeline(components, {}), profile)`: trajectories over prompts, sizes, steps and guidance
text      `texts[name] = samples(trace.text_encoder(...), text_inputs(components, todo)[name])`, each encoder alone
denoiser  `denoise(components, todo, texts, trace.prepare(...), trace.denoiser(...))`: samples of both, inputs to
          calibrate with, and the last latents
VAE       `samples(trace.vae_decoder(...), vae_inputs(latents))`; `decoded` gives the images that engines must make
the whole `run` of the same cases on the bundle's pipeline, for `verify.check_images`
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastsd import bundle, families, text
from fastsd.arrays import to_numpy
from fastsd.backends import Engines
from fastsd.errors import InputError
from fastsd.families import Components
from fastsd.pipeline import Pipeline, PipelineStep, Timings
from fastsd.request import check
from fastsd.sampling.schedulers import is_flow
from fastsd_export.trace import Traced
from fastsd_export.verify import SAMPLES, Numbers, Sample

Run = Callable[..., tuple[Any, ...]]

LONG = (
    "a wide photograph of an old harbour town at dawn, wooden fishing boats with red and white hulls, nets drying on "
    "the quay, gulls above the masts, mist over the water, warm light on wet cobblestones, a lighthouse far behind, "
    "a baker opening blue shutters, laundry between balconies, highly detailed, soft shadows, 35 mm film, muted colours"
)
PROMPTS = ("a red circle", LONG, "", "冬の夜、雪の中の小さな家 ❄️ café naïve", "two green squares on a grey background")
NEGATIVE = "blurry, low quality"


def as_engine(traced: Traced) -> Run:
    """A traced component as an engine: named numpy arrays in, numpy arrays out, in the precision of its weights."""
    import torch

    dtypes = {name: tensor.dtype for name, tensor in traced.inputs.items()}

    def run(**inputs: Any) -> tuple[Numbers, ...]:
        tensors = {name: torch.tensor(value).to(dtypes[name]) for name, value in inputs.items()}
        with torch.inference_mode():
            return tuple(to_numpy(output) for output in traced.module(**tensors))

    return run


def samples(traced: Traced, inputs: Iterable[Mapping[str, Numbers]]) -> list[Sample]:
    """Run a component on each of these inputs."""
    run = as_engine(traced)
    return [Sample(dict(one), dict(zip(traced.outputs, run(**one), strict=True))) for one in inputs]


def replay(recorded: Sequence[Sample]) -> Run:
    """An engine that gives again what a component gave, without it; `InputError` for what that was not asked."""
    known = {_key(sample.inputs): tuple(sample.outputs.values()) for sample in recorded}

    def run(**inputs: Any) -> tuple[Numbers, ...]:
        try:
            return known[_key(inputs)]
        except KeyError:
            raise InputError("a component was not recorded on this input: record it on those of all cases") from None

    return run


def _key(inputs: Mapping[str, Numbers]) -> tuple[Any, ...]:
    return tuple((name, array.shape, array.tobytes()) for name, array in sorted(inputs.items()))


class _Recorder:
    """A component as an engine that keeps some of its calls.

    Attributes:
        samples: calls at the wanted positions, counted from `begin`.
        inputs: those of every call, if `calibrate` is set.
        wanted: positions in the present run.
    """

    def __init__(self, traced: Traced, kept: dict[bytes, Numbers], *, calibrate: bool = False) -> None:
        self.samples: list[Sample] = []
        self.inputs: list[dict[str, Numbers]] = []
        self.wanted = {0}
        self._run, self._outputs, self._calibrate = as_engine(traced), traced.outputs, calibrate
        self._call, self._label, self._kept = 0, "", kept

    def begin(self, label: str) -> None:
        """A new run starts: its first call is kept, and those that are added to `wanted` while it goes on."""
        self._call, self._label, self.wanted = 0, label, {0}

    def on_step(self, step: PipelineStep) -> None:
        """Want the middle and the last call too, once a run knows its length."""
        self.wanted |= {step.total // 2, step.total - 1}

    def __call__(self, **inputs: Any) -> tuple[Numbers, ...]:
        outputs = self._run(**inputs)
        wanted = self._call in self.wanted
        if wanted or self._calibrate:
            given = {name: self._keep(value, copy=True) for name, value in inputs.items()}
            if self._calibrate:
                self.inputs.append(given)
            if wanted:
                results = {name: self._keep(value) for name, value in zip(self._outputs, outputs, strict=True)}
                self.samples.append(Sample(given, results, f"{self._label}, call {self._call + 1}"))
        self._call += 1
        return outputs

    def _keep(self, array: Numbers, *, copy: bool = False) -> Numbers:
        """One array for all that are equal, as most of them never change; a copy, where the loop writes it anew."""
        hashed = hashlib.blake2b(str((array.shape, array.dtype)).encode(), digest_size=16)
        hashed.update(np.ascontiguousarray(array).data)
        key = hashed.digest()
        if key not in self._kept:
            self._kept[key] = array.copy() if copy else array
        return self._kept[key]


@dataclass(frozen=True)
class Case:
    """A trajectory.

    Attributes:
        prompts: one per image.
        negative_prompt: None: the family's way without one.
        height: of the latents.
        width: of the latents.
        steps: of the sampler.
        guidance_scale: as a call takes it.
        tokens: of the text as the denoiser reads it; None: the family's.
        seed: of the first image; the others count on.
        scheduler: None: the checkpoint's.
        only_prepare: the denoiser does not run.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    height: int
    width: int
    steps: int
    guidance_scale: float
    tokens: int | None = None
    seed: int = 0
    scheduler: str | None = None
    only_prepare: bool = False

    def __str__(self) -> str:
        images = f"{len(self.prompts)} of {self.height}x{self.width} latents"
        return f"{images}, {self.steps} steps, guidance {self.guidance_scale:g}, {self.prompts[0][:20]!r}"


def pipeline(
    components: Components,
    engines: Mapping[str, tuple[Run, Iterable[str]]],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Pipeline:
    """A pipeline over engines that take numpy arrays; of the components only the configurations are read.

    Args:
        components: whose weights need not be loaded.
        engines: by component, with the names of its inputs (of `prepare` alone they are read).
        defaults: as of `Pipeline`.
    """
    module = families.family(components.index["_class_name"])

    def route(component: str, dims: Mapping[str, int]) -> tuple[Run, frozenset[str]]:
        run, names = engines[component]
        return run, frozenset(names)

    # Weights that are there, or on the meta device, are no business of the pipeline's: it would ask for their digest.
    components = replace(
        components,
        text_encoders=tuple(
            None if one is None else SimpleNamespace(config=one.config) for one in components.text_encoders
        ),
        denoiser=SimpleNamespace(config=components.denoiser.config),
        vae=SimpleNamespace(config=components.vae.config),
    )
    functions = bundle.compose(module, components, route)
    table = partial(families.compile_table, components)
    made = Engines("eager", "float32", "cpu", functions, table)
    return Pipeline(components, name="reference", defaults=defaults, engines=made)


def cases(line: Pipeline, profile: Mapping[str, bundle.Range], *, steps: int = 8, calibration: int = 0) -> list[Case]:
    """Trajectories that show an engine all it was built for.

    Two at the usual size, with other prompts, steps and guidance; where sizes may vary one at the smallest, the largest
    and an odd size, of two steps; more at the usual size until the denoiser has `SAMPLES` samples and `calibration`
    calls; and two for `prepare` alone, of one step and of the checkpoint's own number. A few-step checkpoint is not run
    for more steps than it was made for.

    Args:
        line: of the checkpoint (`pipeline(components, {})`), for its defaults.
        profile: min, opt and max of the denoiser's "batch", "height", "width" and "tokens", those that it has.
        steps: of the longest trajectory.
        calibration: calls whose inputs are wanted.
    """
    family, scale = line.family, float(line.defaults["guidance_scale"])
    usual_steps = int(line.defaults["num_inference_steps"])
    guided = family.guidance(line.components, scale, 1.0, False) > 1
    steps = min(steps, usual_steps)
    made: list[Case] = []

    def add(sizes: Mapping[str, int], steps: int, scale: float, **options: Any) -> None:
        rows = sizes.get("batch", 2 if guided else 1)
        both = guided and rows % 2 == 0  # halves of guidance
        first = len(made)
        case = Case(
            prompts=tuple(PROMPTS[(first + i) % len(PROMPTS)] for i in range(rows // 2 if both else rows)),
            negative_prompt=NEGATIVE if both and first % 2 == 0 else None,
            height=sizes["height"],
            width=sizes["width"],
            steps=steps,
            guidance_scale=1.0 if guided and not both else scale,
            tokens=sizes.get("tokens"),
            seed=100 * first,
            scheduler=_sampler(line, sizes),
            **options,
        )
        made.append(case)

    least, usual, most = ({name: bounds[i] for name, bounds in profile.items()} for i in range(3))
    odd = {**usual, **{side: _odd(profile[side], family.PATCH, i) for i, side in enumerate(("height", "width"))}}
    add(usual, steps, scale)
    add(usual, max(1, steps // 2), scale * 0.6 if scale > 2 else scale)
    for sizes in (least, most, odd):
        if sizes != usual:
            add(sizes, min(2, steps), scale)
    while sum(min(case.steps, 3) for case in made) < SAMPLES or sum(case.steps for case in made) < calibration:
        add(usual, steps, scale)
    add(usual, 1, scale, only_prepare=True)
    add(usual, usual_steps, scale, only_prepare=True)
    return made


def _odd(bounds: bundle.Range, patch: int, place: int) -> int:
    """A length within the bounds that is an odd number of tokens, near the usual one; the second side is another."""
    low, usual, high = bounds
    lengths = [length for length in range(low, high + 1) if length % (2 * patch) == patch and length != usual]
    lengths.sort(key=lambda length: abs(length - usual))
    return lengths[min(place, len(lengths) - 1)] if lengths else usual


def _sampler(line: Pipeline, sizes: Mapping[str, int]) -> str | None:
    """The checkpoint's own sampler, or Euler's method where that one makes no table."""
    try:
        line.compile_table(None, 1, sizes["height"] * sizes["width"] // line.family.PATCH**2, {})
    except InputError:
        return "flow_euler" if is_flow(line.components.scheduler) else "euler"
    return None


def text_inputs(components: Components, todo: Sequence[Case]) -> dict[str, list[dict[str, Numbers]]]:
    """All windows that the text encoders read in these cases, by component; `PROMPTS` join the texts of the first."""
    module = families.family(components.index["_class_name"])
    found: dict[str, list[dict[str, Numbers]]] = {}
    default = module.DEFAULTS[components.index["_class_name"]].get("max_sequence_length", 0)
    for encoder, tokenizer, part in zip(module.ENCODERS, components.tokenizers, components.text_encoders, strict=True):
        if part is None:
            continue
        ids: dict[tuple[int, ...], None] = {}
        for place, case in enumerate(todo):
            call = _text_arguments(module, components, case)
            length = call.get("max_sequence_length", default)
            if encoder.is_clip:
                length = min(tokenizer.length, part.config.max_position_embeddings)
            texts = (*call["prompt"], case.negative_prompt or "", *(PROMPTS if place == 0 else ()))
            for prompt in dict.fromkeys(texts):
                ids |= dict.fromkeys(map(tuple, _windows(tokenizer, prompt, length, call.get("long_prompt", "cut"))))
        found[encoder.name] = [{"ids": np.array([window], dtype=np.int64)} for window in ids]
    return found


def _windows(tokenizer: Any, prompt: str, length: int, long_prompt: text.LongPrompt) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prompts that are cut: they are meant to be
        return text.windows(tokenizer, prompt, length, long_prompt)


def _text_arguments(module: ModuleType, components: Components, case: Case) -> dict[str, Any]:
    """What of a call is text, so that the denoiser reads as many tokens as the case says."""
    prompts = list(case.prompts)
    arguments: dict[str, Any] = {"prompt": prompts}
    if case.tokens is None:
        return arguments
    tokenizer, part = components.tokenizers[0], components.text_encoders[0]
    clip = min(tokenizer.length, part.config.max_position_embeddings)
    if "max_sequence_length" in module.ARGUMENTS:  # T5's, beside CLIP's in SD3
        arguments["max_sequence_length"] = case.tokens - (clip if "clip_skip" in module.ARGUMENTS else 0)
    elif case.tokens > clip:
        arguments["prompt"] = [_fill(tokenizer, prompt, clip, case.tokens // clip) for prompt in prompts]
        arguments["long_prompt"] = "windows"
    return arguments


def _fill(tokenizer: Any, prompt: str, length: int, wanted: int) -> str:
    """The words of a prompt, over and over, until they fill so many windows."""
    words = prompt.split() or LONG.split()
    count = wanted
    while len(_windows(tokenizer, longer := " ".join(islice(cycle(words), count)), length, "windows")) < wanted:
        count += 1
    return longer


class Denoised(NamedTuple):
    """What the trajectories left.

    Attributes:
        prepare: samples of `prepare`, one for each case.
        denoiser: samples of the first, the middle and the last step.
        inputs: of every call of the denoiser, if asked for; spread over steps and prompts.
        latents: the last ones [images, C, h, w], of each case that the denoiser ran in.
    """

    prepare: list[Sample]
    denoiser: list[Sample]
    inputs: list[dict[str, Numbers]]
    latents: list[Numbers]


def denoise(
    components: Components,
    todo: Sequence[Case],
    texts: Mapping[str, Sequence[Sample]],
    prepare: Traced,
    denoiser: Traced,
    *,
    calibrate: bool = False,
) -> Denoised:
    """Run trajectories with the denoiser alone in memory.

    Args:
        components: of which only the configurations are read.
        todo: the cases.
        texts: samples of the text encoders on `text_inputs` of the cases.
        prepare: in float32.
        denoiser: likewise.
        calibrate: keep the inputs of all calls.
    """
    kept: dict[bytes, Numbers] = {}
    first, second = _Recorder(prepare, kept), _Recorder(denoiser, kept, calibrate=calibrate)
    engines: dict[str, tuple[Run, Iterable[str]]] = {name: (replay(known), ()) for name, known in texts.items()}
    engines |= {"prepare": (first, prepare.inputs), "denoiser": (second, denoiser.inputs)}
    still = {**engines, "denoiser": (lambda latents, **_: (np.zeros_like(latents),), ())}
    latents = []
    for case in todo:
        first.begin(str(case))
        second.begin(str(case))
        if case.only_prepare:
            run(pipeline(components, still), case)
        else:
            latents.append(run(pipeline(components, engines), case, second.on_step))
    return Denoised(first.samples, second.samples, second.inputs, latents)


def run(line: Pipeline, case: Case, on_step: Callable[[PipelineStep], object] | None = None) -> Numbers:
    """The last latents of a case, float32 [images, C, h, w]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of prompts that are cut: they are meant to be
        result = line(**_arguments(line, case), output_type="latent", on_step=on_step)
    return to_numpy(result.images)


def read(line: Pipeline, case: Case) -> None:
    """Let the pipeline encode the texts of a case, which it then remembers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        request = check(line, **_arguments(line, case))
        line._condition(request, any(table.guided for table in request.tables), Timings())


def _arguments(line: Pipeline, case: Case) -> dict[str, Any]:
    call = _text_arguments(line.family, line.components, case)
    if case.negative_prompt is not None:
        call["negative_prompt"] = case.negative_prompt
    return {
        **call,
        "height": case.height * line.factor,
        "width": case.width * line.factor,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance_scale,
        "seed": [case.seed + i for i in range(len(case.prompts))],
        "scheduler": case.scheduler,
    }


def spread(inputs: Sequence[dict[str, Numbers]], count: int) -> list[dict[str, Numbers]]:
    """`count` of these, evenly spaced from the first to the last."""
    chosen = np.linspace(0, len(inputs) - 1, min(count, len(inputs))).round().astype(int)
    return [inputs[i] for i in chosen]


def vae_inputs(latents: Sequence[Numbers]) -> list[dict[str, Numbers]]:
    """Inputs of the VAE's decoder, image by image; fewer than `SAMPLES` are joined by their mirror images."""
    single = [images[i : i + 1] for images in latents for i in range(len(images))]
    flips: list[Any] = [np.s_[..., ::-1], np.s_[..., ::-1, :], np.s_[..., ::-1, ::-1]]
    own = len(single)
    while len(single) < SAMPLES:
        flip = flips[(len(single) // own - 1) % len(flips)]
        single.append(np.ascontiguousarray(single[len(single) % own][flip]))
    return [{"latents": image} for image in single]


def decoded(decoder: Sequence[Sample], latents: Sequence[Numbers]) -> list[Numbers]:
    """The images of these latents, [images, height, width, 3], from the decoder's samples."""
    known = replay(decoder)
    return [np.concatenate([known(latents=images[i : i + 1])[0] for i in range(len(images))]) for images in latents]
