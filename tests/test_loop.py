"""The loop over tables: guidance, mixed batches, and that an image does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from fastsd.errors import InputError
from fastsd.sampling.loop import denoise, initial_latents, stack_timesteps
from fastsd.sampling.noise import noise_source
from fastsd.sampling.schedulers import SAMPLERS, resolve_scheduler
from fastsd.sampling.table import StepTable

pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("FutureWarning", "DeprecationWarning")]

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

SHAPES = [(4, 8, 8), (4, 9, 13), (1, 3, 5), (7,)]  # multiples of 16 values, and not

BACKENDS: list[Callable[[Any], Any]] = [np.asarray, torch.from_numpy]
both = pytest.mark.parametrize("convert", BACKENDS, ids=["numpy", "torch"])


def table(name: str, steps: int = 6, guidance: float = 1.0, **arguments: Any) -> StepTable:
    scheduler = resolve_scheduler(name, SD3 if name.startswith("flow_") else SD)
    return StepTable.from_scheduler(scheduler, steps, **arguments).with_guidance(guidance)


def model(tables: Sequence[StepTable]) -> Callable[[Any, int], Any]:
    """A denoiser that treats every sample alike and alone: by its values, its timestep and its half."""
    timesteps = stack_timesteps(tables)

    def predict(x: Any, row: int) -> Any:
        array, result = np.asarray(x), np.empty(x.shape, np.float32)
        for i, sample in enumerate(array):
            image, unconditional = i % len(tables), len(array) > len(tables) and i < len(tables)
            t = np.float32(timesteps[row, image] / 1000)
            result[i] = np.tanh(0.7 * sample + t) + 0.3 * np.roll(sample, 1, -1) + (0.2 if unconditional else 0.0)
        return torch.from_numpy(result) if isinstance(x, torch.Tensor) else result

    return predict


def run(tables: Sequence[StepTable], seeds: Sequence[int], shape: tuple[int, ...], convert: Any, **options: Any) -> Any:
    noise = [noise_source(seed) for seed in seeds]
    latents = initial_latents(convert(np.stack([source(shape) for source in noise])), tables)
    *_, step = denoise(model(tables), latents, tables, noise=noise, **options)
    return np.asarray(step.latents)


MIXED = [
    table("euler_a", 4),
    table("dpmpp_2m_karras", 7, 7.5),
    table("dpmpp_2m_karras", 5, 2.0),
    table("pndm", 9),
    table("unipc", 6, 3.0),
    table("dpmpp_sde", 3, 1.5),
    table("flow_euler", 8),
    table("lms", 6, 4.0),
    table("lcm", 4, 8.0),
    table("heun", 3, 0.0),
]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_image_of_a_mixed_batch_is_bit_identical_to_itself_alone(shape: tuple[int, ...], convert: Any) -> None:
    seeds = range(100, 100 + len(MIXED))
    rescale = {"guidance_rescale": 0.7} if shape != (7,) else {}
    together = run(MIXED, seeds, shape, convert, **rescale)
    padding = table("ddim", 2, 2.0)  # keeps the batch doubled, as a request of its own would not
    for i, own in enumerate(MIXED):
        for slot in (0, i, len(MIXED) - 1):
            tables, alone = [padding] * len(MIXED), [1] * len(MIXED)
            tables[slot], alone[slot] = own, seeds[i]
            assert np.array_equal(run(tables, alone, shape, convert, **rescale)[slot], together[i]), (
                own.sampler,
                slot,
            )


@both
@pytest.mark.parametrize("name", SAMPLERS)
def test_images_of_one_table_are_bit_identical_to_each_alone(name: str, convert: Any) -> None:
    own = table(name, 5)
    together = run([own] * 4, range(4), (4, 9, 13), convert)
    other = table("euler", 3)
    for i in range(4):
        tables = [other] * 4
        tables[i] = own
        assert np.array_equal(run(tables, range(4), (4, 9, 13), convert)[i], together[i])


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpy_equals_torch(name: str) -> None:
    for guidance in (1.0, 6.0):
        tables = [table(name, 6, guidance)] * 2
        a, b = (run(tables, (1, 2), (4, 9, 13), convert, guidance_rescale=0.3) for convert in BACKENDS)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()  # two float32 orders of summation over 6 steps


def test_float64_latents_keep_their_precision() -> None:
    own = table("unipc", 12)
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    finals = []
    for convert in BACKENDS:
        steps = list(zip(denoise(lambda x, row: 0.1 * x, convert(noise), [own], noise=[noise_source(0)]), strict=True))
        finals.append(np.asarray(steps[-1][0].latents))
    assert finals[0].dtype == np.float64
    states, predictions = [noise], []
    for i in range(len(own)):  # the definition of a table, written out
        predictions.insert(0, 0.1 * states[0] * own.input_scale[i])
        states.insert(
            0,
            sum(w * s for w, s in zip(own.state[i], states, strict=False))
            + sum(w * p for w, p in zip(own.prediction[i], predictions, strict=False)),
        )
    for final in finals:
        assert np.abs(final - states[0]).max() <= 1e-13 * np.abs(final).max()


def guided_by_diffusers(scale: float, rescale: float, latents: Any, predict: Any) -> Any:
    scheduler = diffusers.DDIMScheduler(**{k: v for k, v in SD.items() if k[0] != "_"}, clip_sample=False)
    scheduler.set_timesteps(6)
    x = latents
    for row, t in enumerate(scheduler.timesteps):
        negative, positive = predict(torch.cat([x] * 2), row).chunk(2)
        prediction = negative + scale * (positive - negative)
        if rescale:
            prediction = rescale_noise_cfg(prediction, positive, guidance_rescale=rescale)
        x = scheduler.step(prediction, t, x).prev_sample
    return x


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [1.5, 7.5])
def test_guidance_is_that_of_diffusers(scale: float, rescale: float) -> None:
    tables = [table("ddim", 6, scale)] * 2
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = guided_by_diffusers(scale, rescale, latents, model(tables)).numpy()
    for convert in (np.asarray, torch.as_tensor):
        *_, step = denoise(
            model(tables), convert(latents), tables, noise=[noise_source(0)] * 2, guidance_rescale=rescale
        )
        got = np.asarray(step.latents)
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


@both
@pytest.mark.parametrize(
    ("guidance", "calls"), [((1, 1), 2), ((0, 0.5), 2), ((1, 2), 4), ((3, 3), 4)], ids=lambda v: str(v)
)
def test_the_batch_is_doubled_only_where_one_guides(guidance: tuple[float, ...], calls: int, convert: Any) -> None:
    tables = [table("euler", 3, scale) for scale in guidance]
    sizes = []

    def predict(x: Any, row: int) -> Any:
        sizes.append(len(x))
        return x

    latents = convert(np.ones((2, 4, 8, 8), np.float32))
    list(denoise(predict, latents, tables, noise=[noise_source(0)] * 2))
    assert sizes == [calls] * 3


@both
def test_guidance_up_to_one_takes_the_conditional_half(convert: Any) -> None:
    """Even beside a guided image, and whatever the other half holds."""
    tables = [table("euler", 3, 0.0), table("euler", 3, 5.0)]

    def predict(x: Any, row: int) -> Any:
        result = np.array(x) * np.float32(0.1)
        result[0] = np.nan  # the unconditional half of the first image
        return convert(result)

    latents = convert(np.ones((2, 4, 8, 8), np.float32))
    *_, step = denoise(predict, latents, tables, noise=[noise_source(0)] * 2)
    assert np.isfinite(np.asarray(step.latents)).all()


@both
def test_a_finished_image_is_selected_not_multiplied(convert: Any) -> None:
    tables = [table("unipc", 2), table("ddim", 6)]
    seen = []

    def predict(x: Any, row: int) -> Any:
        result = np.array(x) * np.float32(0.1)
        if row >= 2:
            result[0] = np.inf  # the first image has ended
        return convert(result)

    latents = convert(np.ones((2, 4, 8, 8), np.float32))
    for step in denoise(predict, latents, tables, noise=[noise_source(0)] * 2):
        seen.append(np.asarray(step.latents)[0])
        if step.index >= 2:
            assert np.array_equal(np.asarray(step.denoised())[0], seen[-1])
    assert all(np.array_equal(state, seen[1]) for state in seen[1:]) and np.isfinite(seen[1]).all()


@both
def test_noise_is_drawn_only_in_rows_that_draw(convert: Any) -> None:
    tables = [table("dpm2_a", 3), table("ddim", 5), table("euler_a", 2)]
    drawn: list[list[int]] = [[], [], []]
    now = 0

    def source(image: int) -> Any:
        def draw(shape: tuple[int, ...]) -> Any:
            assert shape == (4, 8, 8)
            drawn[image].append(now)
            return np.zeros(shape, np.float32)

        return draw

    def predict(x: Any, row: int) -> Any:
        nonlocal now
        now = row
        return x

    latents = convert(np.ones((3, 4, 8, 8), np.float32))
    list(denoise(predict, latents, tables, noise=[source(i) for i in range(3)]))
    assert drawn == [[1, 3], [], [0, 1]]


@both
def test_latents_handed_out_are_copies_and_only_the_current_ones(convert: Any) -> None:
    tables = [table("dpmpp_2m", 5)]
    latents = convert(np.ones((1, 4, 8, 8), np.float32))
    kept, steps = [], []
    for step in denoise(model(tables), latents, tables, noise=[noise_source(0)]):
        assert (step.index, step.total) == (len(steps), 5)
        mine = step.latents
        kept.append(np.array(mine))
        mine[...] = 7
        assert np.array_equal(np.asarray(step.latents), kept[-1])
        steps.append(step)
    assert np.array_equal(np.asarray(latents), np.ones((1, 4, 8, 8)))
    for past in steps[:-1]:
        for read in (lambda past=past: past.latents, past.denoised):
            with pytest.raises(RuntimeError, match="is past"):
                read()
    assert np.array_equal(np.asarray(steps[-1].latents), kept[-1])


@both
def test_denoised_of_a_perfect_model_is_the_image(convert: Any) -> None:
    image, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    for name in ("ddim", "euler", "unipc", "dpm2", "flow_euler", "flow_dpmpp_2m"):
        own = table(name, 6)
        velocity = noise - image if name.startswith("flow") else noise
        latents = own.signal[0] * image + own.noise_level[0] * noise
        latents = latents.astype(np.float32)
        for step in denoise(
            lambda x, row, v=velocity: convert(v.copy()), convert(latents), [own], noise=[noise_source(0)]
        ):
            assert np.abs(np.asarray(step.denoised()) - image).max() <= 2e-4  # eps at sigma 14.6 loses four bits
        if name != "unipc":
            assert np.abs(np.asarray(step.latents) - image).max() <= 0.25


def test_predictions_of_lower_precision_and_with_gradients() -> None:
    own = table("dpmpp_2m", 5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.tensor(0.5))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for guidance in (1.0, 3.0):
            steps = denoise(
                lambda x, row, dtype=dtype: weight * x.to(dtype),
                latents.requires_grad_(),
                [own.with_guidance(guidance)],
                noise=[noise_source(0)],
            )
            for step in steps:
                assert step.latents.dtype == torch.float32 and not step.latents.requires_grad


def test_a_run_may_cross_inference_mode() -> None:
    own = table("euler", 4, 2.0)
    with torch.inference_mode():
        steps = denoise(lambda x, row: 0.5 * x, torch.ones(1, 4, 8, 8), [own], noise=[noise_source(0)])
        next(steps)
    next(steps)
    with torch.inference_mode():
        assert next(steps).latents.isfinite().all()


@both
def test_a_denoiser_may_reuse_its_output_and_need_not_be_contiguous(convert: Any) -> None:
    own = table("lms", 6)
    latents = convert(np.random.default_rng(0).standard_normal((2, 4, 8, 6)).astype(np.float32))
    buffer = convert(np.zeros((2, 8, 6, 4), np.float32))

    def reusing(x: Any, row: int) -> Any:
        view = buffer.transpose(0, 3, 1, 2) if isinstance(buffer, np.ndarray) else buffer.permute(0, 3, 1, 2)
        view[...] = 0.1 * x
        return view

    finals = []
    for predict in (reusing, lambda x, row: 0.1 * x):
        *_, step = denoise(predict, latents, [own] * 2, noise=[noise_source(0)] * 2)
        finals.append(np.asarray(step.latents))
    assert np.array_equal(*finals)


def test_generators_of_the_caller_draw_as_in_diffusers() -> None:
    own = table("euler_a", 5)
    scheduler = resolve_scheduler("euler_a", SD)
    scheduler.set_timesteps(5)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    x = start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * own.initial_scale
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x, generator=generators).prev_sample
    again = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    *_, step = denoise(lambda x, row: 0.1 * x, start, [own] * 2, noise=[noise_source(g) for g in again])
    assert (step.latents - x).norm() <= 1e-5 * x.norm()
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(again, generators, strict=True))


@both
def test_initial_latents(convert: Any) -> None:
    tables = [table("euler", 3), table("ddim", 3)]
    noise = convert(np.ones((2, 4, 8, 8), np.float32))
    latents = np.asarray(initial_latents(noise, tables))
    assert latents[0] == pytest.approx(tables[0].initial_scale) and (latents[1] == 1).all()
    assert (np.asarray(noise) == 1).all()


def test_stack_timesteps() -> None:
    tables = [table("euler", 2), table("ddim", 4)]
    stacked = stack_timesteps(tables)
    assert stacked.shape == (4, 2) and stacked.dtype == np.float64
    assert stacked[:, 0].tolist() == [*tables[0].timestep, *[tables[0].timestep[-1]] * 2]
    assert stacked[:, 1].tolist() == tables[1].timestep.tolist()


@both
def test_stopping_cancels(convert: Any) -> None:
    calls = []
    steps = denoise(
        lambda x, row: calls.append(row) or x,
        convert(np.ones((1, 4, 8, 8), np.float32)),
        [table("ddim", 9)],
        noise=[noise_source(0)],
    )
    for step in steps:
        if step.index == 2:
            break
    assert calls == [0, 1, 2]


ONES = np.ones((2, 4, 8, 8), np.float32)
DDIM = table("ddim", 3)


@pytest.mark.parametrize(
    ("latents", "tables", "noises", "rescale", "message"),
    [
        pytest.param(ONES, [DDIM], 2, 0, "a table per image, not 1", id="few-tables"),
        pytest.param(ONES, [], 0, 0, "a table per image, not 0", id="no-tables"),
        pytest.param(ONES[0, 0, 0], [DDIM] * 8, 8, 0, "a table per image", id="one-axis"),
        pytest.param(ONES, [DDIM] * 2, 1, 0, "1 for 2 images", id="few-noises"),
        pytest.param(ONES, [DDIM] * 2, 2, 1.5, "from 0 to 1, not 1.5", id="rescale"),
        pytest.param(ONES, [DDIM] * 2, 2, float("nan"), "from 0 to 1", id="rescale-nan"),
    ],
)
def test_refusals_come_before_the_first_step(
    latents: Any, tables: Any, noises: int, rescale: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        denoise(lambda x, row: x, latents, tables, noise=[noise_source(0)] * noises, guidance_rescale=rescale)


@both
def test_wrong_shapes_from_denoiser_and_noise_are_errors(convert: Any) -> None:
    latents = convert(ONES)
    with pytest.raises(ValueError, match="denoiser gave shape"):
        next(denoise(lambda x, row: x[:1], latents, [DDIM] * 2, noise=[noise_source(0)] * 2))
    with pytest.raises(ValueError, match="noise source of image 0 gave shape"):
        next(denoise(lambda x, row: x, latents, [table("euler_a", 3)] * 2, noise=[lambda shape: ONES] * 2))
