"""Captured steps: on a CPU, with a recorder that replays a capture as a graph of a GPU does, on the same addresses.

The oracle is `loop.denoise`. Both compute in float32 and add the terms of a step in another order, so they differ by a
few roundings (6e-8 each) a row; 1e-5 of the latents' norm is room for 80 rows.
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsd import autoencoder, text
from fastsd.backends import eager
from fastsd.errors import InputError, NumericError
from fastsd.pipeline import Pipeline, Timings
from fastsd.request import check
from fastsd.sampling import graph
from fastsd.sampling.graph import Graphs, captured, sampler
from fastsd.sampling.loop import Step, initial_latents, row_by_row, stack_timesteps
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
TOLERANCE = 1e-5
SHAPE = (4, 3, 5)


# ------------------------------------------------------------------------------------------------------------
# A device


class Tape(TorchDispatchMode):
    """The operations of a capture. Reading a value back would wait for the device, which no capture can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITING, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """The same operations again, their results where the first ones lie; no Python between them runs."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


aten = torch.ops.aten
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}


class Recorder:
    """A device that captures on a CPU."""

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        with Tape() as tape:
            body()
        self.captures += 1
        return tape.replay

    def order(self) -> None:
        pass

    def upload(self, values: Tensor) -> Tensor:
        return values.clone()


# ------------------------------------------------------------------------------------------------------------
# The loop


def table(name: str, steps: int = 6, guidance: float = 1.0) -> StepTable:
    scheduler = resolve_scheduler(name, SD3 if name.startswith("flow_") else SD)
    return StepTable.from_scheduler(scheduler, steps).with_guidance(guidance)


def predict(x: Tensor, row: Tensor, context: Tensor) -> Tensor:
    """A denoiser that treats every sample alike and alone."""
    shift = (row[:, :1] + 0.3 * context.mean((1, 2))[:, None])[:, :, None, None]
    result: Tensor = torch.tanh(0.7 * x + shift) + 0.3 * x.roll(1, -1)
    return result


def constants(tables: Sequence[StepTable], rows: int | None = None) -> tuple[Tensor, Tensor]:
    """A modulation of 7 columns and a context of 2 tokens, by image and half."""
    batch = len(tables) * (1 + any(one.guided for one in tables))
    generator = torch.Generator().manual_seed(batch)
    rows = max(map(len, tables)) if rows is None else rows
    return torch.randn(rows, batch, 7, generator=generator), torch.randn(batch, 2, 3, generator=generator)


Sample = Callable[..., Iterator[Step]]


def start(sample: Sample, tables: Sequence[StepTable], seeds: Sequence[int], **options: Any) -> Iterator[Step]:
    noise = [noise_source(seed) for seed in seeds]
    latents = initial_latents(torch.stack([torch.as_tensor(source(SHAPE)) for source in noise]), tables)
    return sample(latents, constants(tables), tables, noise=noise, **options)


def run(sample: Sample, tables: Sequence[StepTable], seeds: Sequence[int], **options: Any) -> list[Tensor]:
    """After each row the latents and the estimate, stacked."""
    return [torch.stack([one.latents, one.denoised()]) for one in start(sample, tables, seeds, **options)]


def assert_close(result: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(result) == len(expected)
    for row, (one, other) in enumerate(zip(result, expected, strict=True)):
        assert (one - other).norm() <= TOLERANCE * other.norm(), row


def assert_same(result: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(result) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


def replayed(limit: int = graph.LIMIT) -> tuple[Sample, Recorder]:
    device = Recorder()
    return sampler(predict, Graphs(device, limit)), device


@pytest.mark.parametrize("rescale", [0.0, 0.6], ids=["plain", "rescaled"])
@pytest.mark.parametrize("guidance", [1.0, 6.0], ids=["unguided", "guided"])
def test_every_sampler_equals_the_loop_with_one_capture(guidance: float, rescale: float) -> None:
    sample, device = replayed()
    for steps, name in enumerate(SAMPLERS, 4):
        tables = [table(name, steps % 5 + 4, guidance)] * 2
        expected = run(row_by_row(predict), tables, (1, 2), guidance_rescale=rescale)
        assert_close(run(sample, tables, (1, 2), guidance_rescale=rescale), expected)
    assert device.captures == 1


MIXED = [
    table("euler_a", 4),
    table("dpmpp_2m_karras", 7, 7.5),
    table("pndm", 9, 2.0),
    table("unipc", 6, 3.0),
    table("dpmpp_2m_sde", 5, 1.5),
    table("flow_euler", 8),
    table("lms", 6, 4.0),
    table("dpm2_a", 3, 8.0),
]
LONG = [table("ddim", 70, 3.0), table("heun", 34, 2.0), table("euler_a", 64, 1.0), table("dpmpp_2m_sde", 65, 5.0)]


def all_of(history: int, rows: int = 12) -> StepTable:
    """A table that weighs as many states, predictions and noises as there are, up to `history`."""
    random = np.random.default_rng(0)
    weights = {name: random.uniform(-0.4, 0.4, (rows, history)) * np.tri(rows, history) for name in RINGS}
    own = replace(table("lms", rows, 2.0), **weights, draws=np.ones(rows))
    assert all(getattr(own, name)[-1].all() for name in RINGS)
    return own


RINGS = ("state", "prediction", "noise")
BATCHES = {
    "the longest history": [all_of(4), all_of(1)],
    "a longer one": [all_of(6)],
    "mixed": MIXED,
    "more rows than a graph holds": LONG,
    "just as many": [table("euler_a", 64, 3.0)],
}


@pytest.mark.parametrize("rescale", [0.0, 1.0], ids=["plain", "rescaled"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_equal_the_loop(name: str, rescale: float) -> None:
    tables = BATCHES[name]
    expected = run(row_by_row(predict), tables, range(len(tables)), guidance_rescale=rescale)
    sample, device = replayed()
    for _ in range(2):
        assert_close(run(sample, tables, range(len(tables)), guidance_rescale=rescale), expected)
    assert device.captures == 1


@pytest.mark.parametrize("rescale", [0.0, 0.5], ids=["plain", "rescaled"])
def test_an_image_of_a_mixed_batch_is_bit_identical_to_itself_alone(rescale: float) -> None:
    sample, _ = replayed()
    rows = constants(MIXED)[0][:, :1].expand(-1, 2 * len(MIXED), -1).contiguous()
    context = torch.ones(2 * len(MIXED), 2, 3)

    def final(tables: Sequence[StepTable], seeds: Sequence[int]) -> Tensor:
        noise = [noise_source(seed) for seed in seeds]
        latents = initial_latents(torch.stack([torch.as_tensor(source(SHAPE)) for source in noise]), tables)
        *_, last = sample(latents, (rows, context), tables, noise=noise, guidance_rescale=rescale)
        return last.latents

    together = final(MIXED, range(len(MIXED)))
    padding = table("ddim", 2, 2.0)
    for i, own in enumerate(MIXED):
        for slot in (0, i, len(MIXED) - 1):
            tables, seeds = [padding] * len(MIXED), [100] * len(MIXED)
            tables[slot], seeds[slot] = own, i
            assert torch.equal(final(tables, seeds)[slot], together[i]), (own.sampler, slot)


def test_history_of_another_run_is_never_read() -> None:
    sample, device = replayed()
    tables = [table("lms", 7, 4.0), table("dpmpp_2m_sde", 5, 2.0)]
    expected = run(sample, tables, (1, 2))
    poisoned = [table("euler", 3, 9.0)] * 2
    broken = [noise_source(0)] * 2
    *_, last = sample(torch.full((2, *SHAPE), float("nan")), constants(poisoned), poisoned, noise=broken)
    assert last.finite() == [False, False]
    assert_same(run(sample, tables, (1, 2)), expected)
    *_, last = start(sample, tables, (1, 2))
    assert last.finite() == [True, True]
    assert device.captures == 1


def test_a_finished_image_is_selected_not_multiplied() -> None:
    tables = [table("unipc", 2, 3.0), table("euler_a", 6, 3.0)]
    modulation, context = constants(tables)
    modulation[2:, [0, 2]] = float("nan")  # both halves of the first image after its end
    latents = torch.ones(2, *SHAPE)
    sample, _ = replayed()
    seen = []
    for one in sample(latents, (modulation, context), tables, noise=[noise_source(0)] * 2):
        seen.append(one.latents[0])
        assert one.finite() == [True, True]
        if one.index >= 2:
            assert torch.equal(one.denoised()[0], seen[1]) and torch.equal(seen[-1], seen[1])
    assert seen[1].isfinite().all()


MAKERS: dict[str, Callable[[], Sample]] = {
    "graph": lambda: sampler(predict, Graphs(Recorder())),
    "torch": lambda: row_by_row(predict),
    "numpy": lambda: row_by_row(lambda *given: predict(*map(torch.as_tensor, given)).numpy()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_image_that_overflowed_is_named(name: str) -> None:
    tables = [table("euler", 5, 3.0)] * 3
    modulation, context = constants(tables)
    modulation[2, 1] = float("nan")
    latents: Any = torch.ones(3, *SHAPE)
    latents = latents.numpy() if name == "numpy" else latents
    steps = MAKERS[name]()(latents, (modulation, context), tables, noise=[noise_source(0)] * 3)
    flags = [one.finite() for one in steps]
    assert flags == [[True, True, True]] * 2 + [[True, False, True]] * 3


def test_noise_is_drawn_only_in_rows_that_draw_and_by_generators_too() -> None:
    tables = [table("dpm2_a", 3), table("ddim", 5), table("euler_a", 2)]
    drawn: list[list[int]] = [[], [], []]
    now = 0

    def source(image: int) -> Any:
        def draw(shape: tuple[int, ...]) -> Tensor:
            assert shape == SHAPE
            drawn[image].append(now)
            return torch.zeros(shape, dtype=torch.float64)

        return draw

    sample, _ = replayed()
    for one in sample(torch.ones(3, *SHAPE), constants(tables), tables, noise=[source(i) for i in range(3)]):
        now = one.index + 1
    assert drawn == [[1, 3], [], [0, 1]]
    tables = [table("euler_a", 5)] * 2
    ends = []
    for function in (sample, row_by_row(predict)):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        noise = [noise_source(generator) for generator in generators]
        *_, last = function(torch.ones(2, *SHAPE), constants(tables), tables, noise=noise)
        ends.append((last.latents, [generator.get_state() for generator in generators]))
    assert (ends[0][0] - ends[1][0]).norm() <= TOLERANCE * ends[1][0].norm()
    assert all(torch.equal(*states) for states in zip(ends[0][1], ends[1][1], strict=True))


def test_latents_handed_out_are_copies_and_only_the_current_ones() -> None:
    sample, _ = replayed()
    tables = [table("dpmpp_2m", 5, 2.0)]
    latents = torch.ones(1, *SHAPE)
    kept, steps = [], []
    with torch.inference_mode():  # a run may cross it
        running = sample(latents, constants(tables), tables, noise=[noise_source(0)])
        steps.append(next(running))
        kept.append(steps[0].latents.clone())
    for one in running:
        assert (one.index, one.total) == (len(steps), 5)
        mine = one.latents
        kept.append(mine.clone())
        mine[...] = 7
        assert torch.equal(one.latents, kept[-1])
        steps.append(one)
    assert torch.equal(latents, torch.ones(1, *SHAPE))
    for past in steps[:-1]:
        for read in (lambda past=past: past.latents, past.denoised, past.finite):
            with pytest.raises(RuntimeError, match="is past"):
                read()
    run(sample, tables, (5,))
    assert torch.equal(steps[-1].latents, kept[-1])  # though the buffers are another's since


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_input_has_the_dtype_of_the_modulation(dtype: torch.dtype) -> None:
    seen = []

    def denoiser(x: Tensor, row: Tensor, context: Tensor) -> Tensor:
        seen.append(x.dtype)
        return predict(x, row.to(x.dtype), context.to(x.dtype)).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)

    tables = [table("dpmpp_2m", 6, 3.0)]
    modulation, context = constants(tables)
    given = modulation.to(dtype), context
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = list(row_by_row(predict)(latents, (given[0].float(), context), tables, noise=[noise_source(0)]))
    sample = sampler(denoiser, Graphs(Recorder()))
    *_, last = sample(latents, given, tables, noise=[noise_source(0)])
    assert set(seen) == {torch.float32 if dtype == torch.float64 else dtype}
    result, wanted = last.latents, expected[-1].latents
    assert result.dtype == torch.float32 and not result.requires_grad
    # Six predictions, each rounded to the dtype, with guidance 3.
    bound = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, TOLERANCE)
    assert (result - wanted).norm() <= bound * wanted.norm()


# ------------------------------------------------------------------------------------------------------------
# Who captures, and when


def test_what_is_captured_anew() -> None:
    weights = [torch.ones(2)]
    device = Recorder()
    sample = sampler(predict, Graphs(device), weights)
    guided, plain = [table("ddim", 4, 3.0)] * 2, [table("ddim", 4)] * 2
    run(sample, guided, (1, 2))
    weights[0] += 1  # a LoRA
    for tables in ([table("euler_a", 9, 7.0)] * 2, [table("lms", 5, 1.0), table("unipc", 3, 2.0)], guided):
        run(sample, tables, (3, 4))
    assert device.captures == 1
    cases = (
        lambda: run(sample, plain, (1, 2)),
        lambda: run(sample, guided, (1, 2), guidance_rescale=0.1),
        lambda: run(sample, guided[:1], (1,)),
        lambda: list(sample(torch.ones(2, 4, 3, 6), constants(guided), guided, noise=[noise_source(0)] * 2)),
    )
    for count, case in enumerate(cases, 2):
        case()
        case()
        assert device.captures == count
    weights[0].data = torch.zeros(2)  # moved, so the graph reads memory that is another's
    run(sample, guided, (1, 2))
    assert device.captures == 6


def test_the_least_recently_used_graph_is_dropped() -> None:
    sample, device = replayed(limit=2)
    kinds = {"a": [table("ddim", 3)], "b": [table("ddim", 3)] * 2, "c": [table("ddim", 3)] * 3}
    expected = {kind: run(row_by_row(predict), tables, range(len(tables))) for kind, tables in kinds.items()}
    for kind, captures in zip("abacab", (1, 2, 2, 3, 3, 4), strict=True):
        assert_close(run(sample, kinds[kind], range(len(kinds[kind]))), expected[kind])
        assert device.captures == captures


def test_a_stream_outlives_its_graphs_place() -> None:
    sample, device = replayed(limit=1)
    tables = [table("lms", 6, 3.0)]
    expected = run(sample, tables, (1,))
    running = start(sample, tables, (1,))
    for _ in range(3):
        next(running)
    run(sample, tables * 2, (1, 2))
    assert torch.equal([one.latents for one in running][-1], expected[-1][0])
    assert device.captures == 2


def test_a_capture_that_fails_leaves_no_trace() -> None:
    calls = 0

    def failing(x: Tensor, row: Tensor, context: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return predict(x, row, context)

    device = Recorder()
    sample = sampler(failing, Graphs(device))
    tables = [table("ddim", 3)]
    with pytest.raises(MemoryError):
        run(sample, tables, (1,))
    assert_close(run(sample, tables, (1,)), run(row_by_row(predict), tables, (1,)))
    assert device.captures == 1


# ------------------------------------------------------------------------------------------------------------
# Several at once


KINDS = [
    [table("lms", 6, 3.0), table("euler_a", 4, 2.0)],
    [table("dpmpp_2m_sde", 5, 3.0)] * 2,
    [table("ddim", 70, 3.0), table("unipc", 66, 2.0)],
    [table("heun", 3)],
]


@pytest.mark.parametrize("seed", range(6))
def test_streams_that_take_turns_are_those_that_run_alone(seed: int) -> None:
    """Four of three shapes of graph, two of them on one, in a random order; one is dropped, one closed halfway."""
    sample, device = replayed()
    shuffle = random.Random(seed)
    alone = [run(sample, tables, range(len(tables))) for tables in KINDS]
    streams = {i: start(sample, tables, range(len(tables))) for i, tables in enumerate(KINDS)}
    streams |= {-1: start(sample, KINDS[0], (7, 8)), -2: start(sample, KINDS[0], (9, 10))}
    seen: dict[int, list[Tensor]] = {i: [] for i in streams}
    while streams:
        i = shuffle.choice([*streams])
        one = next(streams[i], None)
        if one is None or (i == -1 and one.index == 2):
            streams.pop(i)
            continue
        if i == -2 and one.index == 1:
            streams.pop(i).close()
        # Some are read late, when the buffers may be another's.
        other = shuffle.choice([*streams, i])
        if other != i and shuffle.random() < 0.5 and (two := next(streams[other], None)) is not None:
            seen[other].append(torch.stack([two.latents, two.denoised()]))
        seen[i].append(torch.stack([one.latents, one.denoised()]))
    for i, expected in enumerate(alone):
        assert_same(seen[i], expected)
    assert device.captures == 2


def test_what_a_dropped_run_held_is_freed() -> None:
    sample, _ = replayed()
    tables = [table("lms", 6, 3.0)]
    rows, context = constants(tables)
    running = sample(torch.ones(1, *SHAPE), (rows, context), tables, noise=[noise_source(0)])
    kept = next(running)
    held = weakref.ref(context)
    del rows, context
    running.close()
    assert kept.latents.shape == (1, *SHAPE)
    del running, kept
    gc.disable()
    try:
        assert held() is None  # at once, not when the collector comes
    finally:
        gc.enable()


def test_a_noise_source_that_fails_ends_only_its_run() -> None:
    sample, device = replayed()
    tables = [table("euler_a", 4)]
    expected = run(sample, tables, (1,))

    def broken(shape: tuple[int, ...]) -> Any:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(sample(torch.ones(1, *SHAPE), constants(tables), tables, noise=[broken]))
    with pytest.raises(ValueError, match=r"image 0 gave shape \(2,\), not \(4, 3, 5\)"):
        list(sample(torch.ones(1, *SHAPE), constants(tables), tables, noise=[lambda shape: torch.ones(2)]))
    assert_same(run(sample, tables, (1,)), expected)
    assert device.captures == 1


def test_refusals() -> None:
    sample, _ = replayed()
    tables = [table("ddim", 3)]
    with pytest.raises(InputError, match="a table per image, not 1"):
        sample(torch.ones(2, *SHAPE), constants(tables), tables, noise=[noise_source(0)])
    with pytest.raises(InputError, match="guidance_rescale must be from 0 to 1, not 2"):
        start(sample, tables, (1,), guidance_rescale=2)
    with pytest.raises(ValueError, match="the constants have 2 rows for tables of 3"):
        sample(torch.ones(1, *SHAPE), constants(tables, rows=2), tables, noise=[noise_source(0)])
    wrong = sampler(lambda x, *others: x[:, :1], Graphs(Recorder()))
    with pytest.raises(
        ValueError, match=r"the denoiser gave shape \(1, 1, 3, 5\) for an input of shape \(1, 4, 3, 5\)"
    ):
        run(wrong, tables, (1,))


# ------------------------------------------------------------------------------------------------------------
# Functions of tensors


class Pair(NamedTuple):
    product: Tensor
    nothing: None
    double: Tensor


def test_a_captured_function_is_the_function() -> None:
    device, weight = Recorder(), torch.ones(3)

    def function(x: Tensor, y: Tensor, *, power: int = 1) -> Pair:
        return Pair((x @ y) ** power + weight.sum(), None, y * 2)

    run = captured(function, Graphs(device, 2), [weight])
    torch.manual_seed(0)

    def check(rows: int = 2, **options: Any) -> None:
        given = torch.randn(rows, 3), torch.randn(3, 4)
        result, expected = run(*given, **options), function(*given, **options)
        assert isinstance(result, Pair) and result.nothing is None
        run(torch.zeros(rows, 3), torch.zeros(3, 4), **options)  # what was given out is the caller's
        assert torch.equal(result.product, expected.product) and torch.equal(result.double, expected.double)

    check()
    weight += 1
    check()
    assert device.captures == 1
    check(power=2)
    check(rows=1)
    check(rows=1)
    assert device.captures == 3
    check()  # it was dropped for the third
    assert device.captures == 4
    weight.data = torch.zeros(3)
    check()
    assert device.captures == 5
    run(torch.ones(2, 3).double(), torch.ones(3, 4).double())
    run(torch.ones(3, 2).t(), torch.ones(3, 4))
    assert device.captures == 7
    single = captured(lambda x: x + 1, Graphs(device))
    assert torch.equal(single(torch.ones(2)), torch.full((2,), 2.0))


# ------------------------------------------------------------------------------------------------------------
# Waiting for the device


class Lists(TorchFunctionMode):
    """What a tensor is made of lies on the host; the dispatcher does not see the copy to meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.tensor, torch.as_tensor) or isinstance(args[0], Tensor) or not out.is_meta, args
        return out


class Unread(TorchDispatchMode):
    """Tensors on meta have no values to read: whoever tries fails. Beside that, no other way up than `upload` is used.

    A number of the host may take part as such: it travels with the kernel's arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0
        self.uploading = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor) and one.ndim]
        if len({one.device for one in tensors}) > 1:
            assert self.uploading, f"{func} copies {[(one.device, one.shape) for one in tensors]}"
            self.uploads += 1
        return out

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        return body

    def order(self) -> None:
        pass

    def upload(self, values: Tensor) -> Tensor:
        self.uploading = True
        try:
            return values.to("meta")
        finally:
            self.uploading = False


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "down": lambda x: x.cpu(),
    "up": lambda x: torch.ones(3).to(x.device),
    "list": lambda x: torch.tensor([1, 2], device=x.device),
    "into": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_watch_sees_what_waits(name: str) -> None:
    with Unread(), Lists(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        WAITS[name](torch.ones(3, device="meta"))


@pytest.mark.parametrize("rescale", [0.0, 0.5], ids=["plain", "rescaled"])
def test_nothing_is_read_back_and_only_noise_goes_up(rescale: float) -> None:
    tables = LONG
    modulation, context = (one.to("meta") for one in constants(tables))
    noise = [noise_source(seed) for seed in range(4)]
    latents = torch.ones(4, *SHAPE, device="meta")
    uploads = []
    with Unread() as device, Lists():
        sample = sampler(predict, Graphs(device))
        for one in sample(latents, (modulation, context), tables, noise=noise, guidance_rescale=rescale):
            assert one.latents.is_meta and one.denoised().is_meta
            uploads.append(device.uploads)
    drawn = [sum(float(own.draws[row]) for own in tables if row < len(own)) for row in range(max(map(len, tables)))]
    assert uploads[0] == 2 + drawn[0]  # the tables, and the scale of the first input
    assert [b - a for a, b in itertools.pairwise(uploads)] == drawn[1:]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_no_model_reads_its_values(family: str, make_checkpoint: Callable[..., Path]) -> None:
    """Text encoders, denoiser and VAE, as a capture needs it."""
    pipe = Pipeline.from_pretrained(make_checkpoint(family), dtype="float32", backend="eager")
    request = check(pipe, "the red cat", height=64, width=64, num_inference_steps=3, guidance_scale=4.0, seed=1)
    guided = any(one.guided for one in request.tables)
    conditioning = pipe._condition(request, guided, Timings())
    timesteps = np.tile(stack_timesteps(request.tables), (1, 1 + guided))
    values = pipe.functions.prepare(timesteps, conditioning, request.noise_shape[1:])
    latents = torch.ones(1, *request.noise_shape, device="meta")
    parts, half = pipe.components, torch.float16  # in which transformers look for overflows
    given = [one.to("meta", half) for one in values]
    for module in (parts.denoiser, parts.vae, *parts.text_encoders):
        module.to("meta", half)
    tokens = torch.ones(1, 77, dtype=torch.int64, device="meta")
    with Unread() as device, Lists(), torch.inference_mode():
        functions = eager.functions(pipe.family, parts, Graphs(device))
        *_, last = functions.sample(latents, given, request.tables, noise=request.noise)
        pixels = autoencoder.decoder(parts.vae, last.latents.to(half))
        autoencoder.encoder(parts.vae, pixels)
        for encoder, module in zip(pipe.family.ENCODERS, parts.text_encoders, strict=True):
            text.states(encoder, module, tokens, 1 if encoder.is_clip else None)
    assert device.uploads == 2  # of the sampler


# ------------------------------------------------------------------------------------------------------------
# Whole pipelines


def pipelines(folder: Path) -> tuple[Pipeline, Pipeline, Recorder]:
    """One that runs row by row, one that replays, over the same weights."""
    plain = Pipeline.from_pretrained(folder, dtype="float32", backend="eager")
    device = Recorder()
    engines = eager.engines(plain.family, plain.components)
    engines = replace(engines, functions=eager.functions(plain.family, plain.components, Graphs(device)))
    return plain, Pipeline(plain.components, name="replayed", engines=engines), device


def latents_of(pipe: Pipeline, prompt: str = "the red cat", **arguments: Any) -> Tensor:
    result: Tensor = pipe(prompt, height=64, width=64, output_type="latent", **arguments).images
    return result


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_contents_change_and_the_graph_stays(family: str, make_checkpoint: Callable[..., Path]) -> None:
    plain, pipe, device = pipelines(make_checkpoint(family))
    scheduler = {"sd3": "flow_heun", "flux": "flow_dpmpp_2m"}.get(family, "euler_a")
    guidance = "true_cfg_scale" if family == "flux" else "guidance_scale"
    arguments: Any = {"negative_prompt": "a", "num_inference_steps": 3, guidance: 4.0, "seed": 1}
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "the blue dog"},
        {"seed": 2},
        {"num_inference_steps": 5},
        {guidance: 6.0},
        {"scheduler": scheduler},
    ]
    captures = 1 + sum(module is not None for module in pipe.components.text_encoders)
    for change in changes:
        expected = latents_of(plain, **{**arguments, **change})
        result = latents_of(pipe, **{**arguments, **change})
        # Some hundred roundings: the denoiser's own are those of another order of sums, through random weights.
        assert (result - expected).norm() <= 1e-4 * expected.norm(), change
        assert device.captures == captures
    images = [
        one(**arguments, prompt="the red cat", height=64, width=64, output_type="np").images for one in (plain, pipe)
    ]
    assert abs(images[0] - images[1]).max() <= 1 / 255
    assert device.captures == captures + 1  # the VAE's
    pipe(**arguments, prompt="the red cat", height=64, width=64)
    assert device.captures == captures + 1


def test_a_lora_reaches_a_captured_step(tiny: Path, tmp_path: Path) -> None:
    plain, pipe, device = pipelines(tiny)
    name, layer = next(item for item in pipe.components.denoiser.named_modules() if item[0].endswith("attn1.to_q"))
    torch.manual_seed(0)
    low = {"A": torch.randn(2, layer.in_features), "B": torch.randn(layer.out_features, 2)}
    save_file({f"unet.{name}.lora_{key}.weight": one for key, one in low.items()}, tmp_path / "style.safetensors")
    before, captures = latents_of(pipe, seed=1, num_inference_steps=3), device.captures
    pipe.load_lora(tmp_path / "style.safetensors")
    merged = latents_of(pipe, seed=1, num_inference_steps=3)
    expected = latents_of(plain, seed=1, num_inference_steps=3)  # the weights are the same tensors
    assert (merged - expected).norm() <= 1e-4 * expected.norm() < (merged - before).norm()
    pipe.unload_lora()
    assert torch.equal(latents_of(pipe, seed=1, num_inference_steps=3), before)
    assert device.captures == captures


def test_threads_make_the_images_of_one_after_the_other(tiny: Path) -> None:
    _, pipe, device = pipelines(tiny)
    calls: list[dict[str, Any]] = [
        {"prompt": "the red cat", "seed": 1, "num_inference_steps": 6, "scheduler": "euler_a"},
        {"prompt": "the blue dog", "seed": 2, "num_inference_steps": 5, "scheduler": "lms"},
        {"prompt": "a", "seed": 3, "num_inference_steps": 4, "guidance_scale": 1.0},
        {"prompt": "b", "seed": 4, "num_inference_steps": 7, "num_images_per_prompt": 2},
    ]

    def image(call: dict[str, Any]) -> Any:
        return pipe(**call, height=64, width=64, output_type="np").images

    expected = [image(call) for call in calls]
    captures = device.captures
    results: dict[int, Any] = {}

    def work(first: int) -> None:
        for i in range(first, first + len(calls)):
            results[first, i % len(calls)] = image(calls[i % len(calls)])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    half = pipe.stream(**calls[0], height=64, width=64)  # of the same thread as the next call
    next(half)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 3 * len(calls) and device.captures == captures
    for (_, i), result in results.items():
        assert (result == expected[i]).all(), i
    *_, last = half
    assert (pipe.decode(last.latents).numpy() == expected[0]).all()


def test_an_overflow_is_refused_and_the_next_image_is_right(tiny: Path) -> None:
    _, pipe, _ = pipelines(tiny)
    expected = latents_of(pipe, seed=1, num_inference_steps=3)
    weight = pipe.components.denoiser.conv_out.bias
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(NumericError, match="the denoiser produced NaN or Inf"):
            latents_of(pipe, seed=1, num_inference_steps=3)
        weight.copy_(kept)
    assert torch.equal(latents_of(pipe, seed=1, num_inference_steps=3), expected)


# ------------------------------------------------------------------------------------------------------------
# CUDA, as far as it can be seen without


class FakeCuda:
    """`torch.cuda`'s streams and graphs, which write down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = FakeStream(self, "default")
        self.made = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextmanager
        def inside(stream: FakeStream) -> Iterator[None]:
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        @contextmanager
        def capturing(graph: FakeGraph, *, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
            graph.own = pool or graph.own
            with inside(stream):
                self.log.append(f"begin {graph.own} {capture_error_mode}")
                yield
                self.log.append("end")

        names = {
            "Stream": lambda device: FakeStream(self, "side"),
            "CUDAGraph": lambda: FakeGraph(self),
            "current_stream": lambda device: self.current,
            "device": lambda device: nullcontext(self.log.append(f"on {device}")),
            "stream": inside,
            "graph": capturing,
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def body(self) -> None:
        self.log.append(f"body on {self.current.name}")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        cuda.made += 1
        self.cuda, self.own = cuda, f"pool {cuda.made}"

    def pool(self) -> str:
        return self.own

    def replay(self) -> None:
        self.cuda.log.append(f"replay from {self.own}")


def test_a_capture_warms_up_beside_and_graphs_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    device = graph.Cuda(torch.device("cuda:1"))
    device.order()
    first = device.capture(cuda.body)
    assert cuda.log == [
        "on cuda:1",
        "side waits for default",
        *["body on side"] * graph.WARMUPS,
        "begin pool 1 thread_local",
        "body on side",
        "end",
        "default waits for side",
    ]
    second = device.capture(cuda.body)
    cuda.log.clear()
    first()
    second()
    assert cuda.log == ["replay from pool 1"] * 2
    del first
    third = device.capture(cuda.body)  # the pool lives as long as one of its graphs
    cuda.log.clear()
    third()
    assert cuda.log == ["replay from pool 1"]
    del second, third
    fresh = device.capture(cuda.body)
    cuda.log.clear()
    fresh()
    assert cuda.log == ["replay from pool 4"]

    def broken() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        device.capture(broken)
    assert cuda.current.name == "default"


def test_work_on_another_stream_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    device = graph.Cuda(torch.device("cuda"))
    device.order()
    device.order()
    assert not cuda.log
    cuda.current = FakeStream(cuda, "other")
    device.order()
    device.order()
    assert cuda.log == ["other waits for default"]


def test_a_checkpoint_on_a_gpu_replays(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_pretrained(tiny, dtype="float32", backend="eager")
    captured: list[torch.device] = []
    monkeypatch.setattr(graph, "Cuda", lambda device: captured.append(device))
    denoiser = pipe.components.denoiser
    monkeypatch.setattr(
        denoiser, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda:0"), dtype=None)])
    )
    functions = eager.functions(pipe.family, pipe.components)
    assert captured == [torch.device("cuda:0")]
    assert functions.sample.__qualname__.startswith(sampler.__name__)
    assert not pipe.functions.sample.__qualname__.startswith(sampler.__name__)


if torch.cuda.is_available():

    def test_nothing_waits_on_a_gpu() -> None:
        sample = sampler(predict, Graphs(graph.Cuda(torch.device("cuda"))))
        for tables in (MIXED, LONG):
            given = [one.cuda() for one in constants(tables)]
            latents = torch.ones(len(tables), *SHAPE, device="cuda")
            noise = [[noise_source(seed) for seed in range(len(tables))] for _ in range(2)]
            rows = sample(latents, given, tables, noise=noise[0])
            next(rows)  # captures
            torch.cuda.set_sync_debug_mode("error")
            try:
                *_, last = rows
            finally:
                torch.cuda.set_sync_debug_mode("default")
            *_, expected = row_by_row(predict)(latents, given, tables, noise=noise[1])
            assert_close([last.latents], [expected.latents])
