from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd.sampling.loop import denoise
from fastsd.sampling.table import StepTable
from fastsd_kernels.step import launch, pack, reference, step

NAN = float("nan")
SIZE = 35  # numbers of an image


def table(name: str, steps: int = 5, guidance: float = 1.0, **options: Any) -> StepTable:
    import diffusers

    if name.startswith("FlowMatch"):
        scheduler = getattr(diffusers, name)(shift=3.0)
    else:
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = getattr(diffusers, name)(**betas, **options)
    return StepTable.from_scheduler(scheduler, steps).with_guidance(guidance)


def model(given: Tensor, row: int) -> Tensor:
    """A function that takes images, halves and rows differently, and flat, so that no run is chaotic."""
    image = torch.arange(1, len(given) + 1, dtype=given.dtype)[:, None]
    return torch.tanh(given / 4 + row / 7) * (1 + image / 10) / 4


class Buffers:
    """What a captured graph would own, full of NaN before the run: nothing may be read that was not written."""

    def __init__(
        self, latents: Tensor, tables: Sequence[StepTable], dtype: torch.dtype, rows: int | None = None
    ) -> None:
        batch, size = latents.shape
        halves = 1 + any(t.guided for t in tables)
        slots = [max(getattr(t, name).shape[1] for t in tables) for name in ("state", "prediction", "noise")]
        self.states, self.predictions, self.noises = (
            torch.full((n, batch, size), NAN, dtype=latents.dtype) for n in slots
        )
        self.states[0] = latents
        self.coefficients = pack(tables, *slots, rows=rows).to(latents.dtype)
        scales = torch.tensor([float(t.input_scale[0]) for t in tables], dtype=latents.dtype)
        self.model_input = (latents * scales[:, None]).repeat(halves, 1).to(dtype)
        self.index = torch.zeros(1, dtype=torch.int32)
        self.nonfinite = torch.zeros(batch, dtype=torch.bool)

    def arguments(self, prediction: Tensor) -> tuple[Tensor, ...]:
        history = (self.noises, self.states, self.predictions)
        return (prediction, self.coefficients, self.index, *history, self.model_input, self.nonfinite)


def sample(function: Any, latents: Tensor, tables: Sequence[StepTable], noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the tables with `function` for every step; `noise` is [rows, batch, size]."""
    buffers = Buffers(latents, tables, dtype)
    for row in range(max(map(len, tables))):
        for image, own in enumerate(tables):
            if row < len(own) and own.draws[row] and len(buffers.noises):
                buffers.noises[row % len(buffers.noises), image] = noise[row, image]
        function(*buffers.arguments(model(buffers.model_input, row)))
        buffers.index += 1
    assert not buffers.nonfinite.any()
    return buffers.states[row_slot(buffers)]


def row_slot(buffers: Buffers) -> int:
    return int(buffers.index) % len(buffers.states)


def loop(latents: Tensor, tables: Sequence[StepTable], noise: Tensor) -> Tensor:
    """The same by `fastsd.sampling`, whose own oracle are the schedulers themselves."""
    row = 0

    def draws(image: int) -> Any:
        return lambda shape: noise[row, image].to(latents.dtype).reshape(shape)

    steps = denoise(model, latents, tables, noise=[draws(image) for image in range(len(tables))])
    for state in steps:
        row = state.index + 1
    return state.latents


RUNS = {
    "euler": [table("EulerDiscreteScheduler", guidance=7.5)],
    "flow without guidance": [table("FlowMatchEulerDiscreteScheduler")] * 2,
    "ddim": [table("DDIMScheduler", guidance=3, clip_sample=False)],
    "four predictions": [table("PNDMScheduler", 7, 7.5, skip_prk_steps=True)],
    "four predictions, weights of all": [table("LMSDiscreteScheduler", 7, 2)],
    "two states a step": [table("HeunDiscreteScheduler", guidance=7.5)],
    "third order": [table("UniPCMultistepScheduler", 7, 7.5, solver_order=3)],
    "noise": [table("EulerAncestralDiscreteScheduler", guidance=5)],
    "noise and history": [table("DPMSolverMultistepScheduler", 7, 5, algorithm_type="sde-dpmsolver++")],
    "all kinds in one batch": [
        table("DPMSolverMultistepScheduler", 4, 7.5),
        table("EulerAncestralDiscreteScheduler", 6, 0.5),
        table("PNDMScheduler", 5, 7.5, skip_prk_steps=True),
        table("UniPCMultistepScheduler", 3, 1, solver_order=3),
    ],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["kernel", "reference"])
def test_runs_are_those_of_the_loop(interpret: Any, assert_exact: Any, name: str, kind: str) -> None:
    tables = RUNS[name]
    torch.manual_seed(0)
    latents = torch.randn(len(tables), SIZE) * tables[0].initial_scale
    noise = torch.randn(max(map(len, tables)), len(tables), SIZE)

    def kernel(*arguments: Tensor) -> None:
        interpret(launch, *arguments)

    out = sample(kernel if kind == "kernel" else reference, latents, tables, noise, torch.float32)
    assert_exact(out, loop(latents.double(), tables, noise), loop(latents, tables, noise))


def test_the_reference_in_float64_is_the_loop() -> None:
    tables = RUNS["all kinds in one batch"]
    latents, noise = torch.randn(4, SIZE, dtype=torch.float64), torch.randn(7, 4, SIZE, dtype=torch.float64)
    out = sample(reference, latents, tables, noise, torch.float64)
    # The weights are float32, as in any table on a device: 6e-8 each, over 6 rows.
    torch.testing.assert_close(out, loop(latents, tables, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_predictions_and_inputs(interpret: Any, dtype: torch.dtype) -> None:
    tables = [table("DPMSolverMultistepScheduler", 4, 7.5)] * 2
    latents = torch.randn(2, 1030)
    ours, theirs = (Buffers(latents, tables, dtype) for _ in range(2))
    for row in range(4):
        prediction = model(theirs.model_input.float(), row).to(dtype)
        interpret(launch, *ours.arguments(prediction))
        reference(*theirs.arguments(prediction))
        torch.testing.assert_close(ours.states, theirs.states, equal_nan=True)
        # The interpreter cuts off to bfloat16 where torch rounds.
        torch.testing.assert_close(ours.model_input, theirs.model_input, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        ours.index += 1
        theirs.index += 1


def test_a_finished_image_keeps_its_state_whatever_is_predicted(interpret: Any) -> None:
    tables = [table("EulerDiscreteScheduler", 1, 7.5), table("EulerDiscreteScheduler", 3, 7.5)]
    buffers = Buffers(torch.randn(2, SIZE), tables, torch.float32)
    interpret(launch, *buffers.arguments(torch.randn(4, SIZE)))
    buffers.index += 1
    state = buffers.states[0].clone()
    prediction = torch.randn(4, SIZE)
    prediction[0], prediction[2] = NAN, float("inf")  # both halves of the finished one
    interpret(launch, *buffers.arguments(prediction))
    assert torch.equal(buffers.states[0, 0], state[0]) and not torch.equal(buffers.states[0, 1], state[1])
    assert buffers.states.isfinite().all() and buffers.model_input.isfinite().all() and not buffers.nonfinite.any()


@pytest.mark.parametrize("function", ["kernel", "reference"])
def test_without_guidance_the_unconditional_prediction_is_not_read(interpret: Any, function: str) -> None:
    tables = [table("EulerDiscreteScheduler", guidance=1.0), table("EulerDiscreteScheduler", guidance=2.0)]
    buffers = Buffers(torch.randn(2, SIZE), tables, torch.float32)
    prediction = torch.randn(4, SIZE)
    prediction[0] = NAN
    arguments = buffers.arguments(prediction)
    interpret(launch, *arguments) if function == "kernel" else reference(*arguments)
    assert torch.equal(buffers.predictions[0, 0], prediction[2])
    torch.testing.assert_close(buffers.predictions[0, 1], prediction[1] + 2 * (prediction[3] - prediction[1]))
    assert buffers.states.isfinite().all() and not buffers.nonfinite.any()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("function", ["kernel", "reference"])
def test_what_is_not_finite_is_reported_for_its_image(interpret: Any, value: float, function: str) -> None:
    tables = [table("EulerDiscreteScheduler")] * 3
    buffers = Buffers(torch.randn(3, 1030), tables, torch.float32)
    buffers.nonfinite[0] = True  # from a step before: stays
    prediction = torch.randn(3, 1030)
    prediction[1, 1029] = value
    arguments = buffers.arguments(prediction)
    interpret(launch, *arguments) if function == "kernel" else reference(*arguments)
    assert buffers.nonfinite.tolist() == [True, True, False]
    assert buffers.states[:, 0].isfinite().all() and buffers.states[:, 2].isfinite().all()


def test_long_runs_refill_their_rows(interpret: Any) -> None:
    own = table("UniPCMultistepScheduler", 9, 3, solver_order=3)
    latents = torch.randn(1, SIZE)
    whole, parts = Buffers(latents, [own], torch.float32), Buffers(latents, [own], torch.float32)
    rows = parts.coefficients
    parts.coefficients = rows[:4].clone()
    for row in range(9):
        parts.coefficients[row % 4] = rows[row]
        for buffers in (whole, parts):
            interpret(launch, *buffers.arguments(model(buffers.model_input, row)))
            buffers.index += 1
    assert torch.equal(whole.states, parts.states)


def test_outputs_stay_within_their_memory(interpret: Any) -> None:
    buffers = Buffers(torch.randn(2, SIZE), [table("EulerDiscreteScheduler", guidance=7.5)] * 2, torch.float16)
    guarded = {}
    for name in ("states", "predictions", "model_input"):
        tensor = getattr(buffers, name)
        guarded[name] = torch.full((tensor.numel() + 32,), NAN, dtype=tensor.dtype)
        inner = guarded[name][16:-16].view(tensor.shape)
        setattr(buffers, name, inner.copy_(tensor))
    interpret(launch, *buffers.arguments(torch.randn(4, SIZE).half()))
    for memory in guarded.values():
        assert memory[:16].isnan().all() and memory[-16:].isnan().all() and memory[16:-16].isfinite().all()


def test_no_numbers(interpret: Any) -> None:
    buffers = Buffers(torch.randn(2, 0), [table("EulerDiscreteScheduler")] * 2, torch.float32)
    interpret(launch, *buffers.arguments(torch.randn(2, 0)))
    step(*buffers.arguments(torch.randn(2, 0)))
    assert not buffers.nonfinite.any()


def test_pack() -> None:
    heun, euler = table("HeunDiscreteScheduler", 3, 7.5), table("EulerDiscreteScheduler", 2, 2.0)
    packed = pack([heun, euler], 4, 3, 1, rows=7)
    assert packed.shape == (7, 2, 2 + 4 + 3 + 1) and packed.dtype == torch.float32
    assert (packed[: len(heun), 0, 0] == 7.5).all() and packed[:, 1, 0].tolist() == [2, 2, 1, 1, 1, 1, 1]
    torch.testing.assert_close(packed[0, 1, 1].item(), float(euler.input_scale[1]))
    assert (packed[1:, 1, 1] == torch.tensor(euler.input_scale[1]).float()).all()
    assert packed[5:].tolist() == [
        [[1, row[0, 1].item(), 1, *[0] * 7], [1, row[1, 1].item(), 1, *[0] * 7]] for row in packed[5:]
    ]
    columns = heun.prediction.shape[1]
    torch.testing.assert_close(packed[: len(heun), 0, 6 : 6 + columns], torch.tensor(heun.prediction).float())


def test_pack_refuses_what_does_not_fit() -> None:
    own = table("PNDMScheduler", 7, skip_prk_steps=True)
    with pytest.raises(ValueError, match="A table weighs 4 predictions; there are 2 slots"):
        pack([own], 2, 2, 0)
    with pytest.raises(ValueError, match="A table has 8 rows; there must be at most 5"):
        pack([own], 4, 4, 0, rows=5)


def test_op(check_op: Any) -> None:
    buffers = Buffers(torch.randn(2, SIZE), [table("DPMSolverMultistepScheduler", 4, 7.5)] * 2, torch.float32)
    buffers.states[1], buffers.predictions[:] = 1, 1  # opcheck compares, and NaN is not equal to NaN
    check_op(step, *buffers.arguments(torch.randn(4, SIZE)))


def test_launch_on_a_gpu(launches: Any) -> None:
    buffers = Buffers(torch.randn(2, 16384), [table("DPMSolverMultistepScheduler", 4, 7.5)] * 2, torch.bfloat16)
    (call,) = launches(step, *buffers.arguments(torch.randn(4, 16384).bfloat16()))
    assert (call.kernel, call.grid) == ("_step_kernel", (16, 2, 1))
    assert call.written == {"states", "predictions", "model_input", "nonfinite"}
    assert [call.arguments[name] for name in ("rows", "numel", "plane", "HALVES")] == [4, 16384, 32768, 2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("states", torch.randn(2, 3), r"states is \[2, 3\]; it must be \[slots, batch, numel\]"),
        ("predictions", torch.randn(1, 2, 9), r"predictions is \[1, 2, 9\]; it must be \[slots, 2, 35\]"),
        ("predictions", torch.randn(0, 2, 35), "predictions has no slots; it must have at least 1"),
        ("noises", torch.randn(1, 3, 35), r"noises is \[1, 3, 35\]; it must be \[slots, 2, 35\]"),
        ("coefficients", torch.randn(4, 2, 9), r"coefficients is \[4, 2, 9\]; it must be \[rows, 2, 4\]"),
        ("prediction", torch.randn(3, 35), r"prediction is \[3, 35\]; it must be \[2 or 4, 35\]"),
        ("model_input", torch.randn(2, 35), r"model_input is \[2, 35\]; it must be \[4, 35\]"),
        ("nonfinite", torch.zeros(1, dtype=torch.bool), r"nonfinite is \[1\]; it must be \[2\]"),
        ("nonfinite", torch.zeros(2), r"nonfinite is torch\.float32; it must be torch\.bool"),
        ("index", torch.zeros(2, dtype=torch.int64), r"index is \[2\]; it must be one number"),
        ("index", torch.zeros(1), r"index is torch\.float32; it must be torch\.int32 or torch\.int64"),
        ("states", torch.randn(1, 2, 35).double(), r"states is torch\.float64; it must be torch\.float32"),
        ("prediction", torch.randn(35, 4).t(), r"prediction has strides \(1, 4\); it must be contiguous"),
        ("prediction", torch.randn(4, 35, device="meta"), "prediction is on meta; it must be on cpu"),
    ],
)
def test_refusals(name: str, value: Tensor, message: str) -> None:
    buffers = Buffers(torch.randn(2, SIZE), [table("EulerDiscreteScheduler", guidance=7.5)] * 2, torch.float32)
    names = ("prediction", "coefficients", "index", "noises", "states", "predictions", "model_input", "nonfinite")
    arguments = dict(zip(names, buffers.arguments(torch.randn(4, SIZE)), strict=True))
    with pytest.raises(ValueError, match=message):
        step(**{**arguments, name: value})
