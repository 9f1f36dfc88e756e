"""The loop that runs step tables over numpy arrays or torch tensors: one update a step, no scheduler code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastsd.errors import InputError
from fastsd.sampling.table import Float64, StepTable

if TYPE_CHECKING:
    import torch

# numpy.ndarray or torch.Tensor: the loop is written once over what both can do.
Array = Any
Noise = Callable[[tuple[int, ...]], Array]
Denoiser = Callable[[Array, int], Array]
Reading = Literal["latents", "denoised", "finite"]


class Step:
    """What the loop yields after each row; it can be read until the next one is asked for.

    Attributes:
        index: row number, from 0.
        total: rows of the longest table.
    """

    def __init__(self, index: int, total: int, read: Callable[[int, Reading], Array]) -> None:
        self.index = index
        self.total = total
        self._read = read

    @property
    def latents(self) -> Array:
        """A copy of the latents after this row, [batch, ...]."""
        return self._read(self.index, "latents")

    def denoised(self) -> Array:
        """The row's estimate of the clean latents, [batch, ...]; for a finished image its latents."""
        return self._read(self.index, "denoised")

    def finite(self) -> list[bool]:
        """Whether each image's latents are finite, [batch]; waits for the device."""
        flags: list[bool] = self._read(self.index, "finite").tolist()
        return flags


def stack_timesteps(tables: Sequence[StepTable]) -> Float64:
    """Timesteps of all images, [steps of the longest, batch]; a finished image repeats its last one."""
    steps = max(map(len, tables))
    return np.stack([np.pad(table.timestep, (0, steps - len(table)), mode="edge") for table in tables], axis=1)


def initial_latents(noise: Array, tables: Sequence[StepTable]) -> Array:
    """Standard normal noise [batch, ...] scaled to where each image's table starts, as a new array."""
    _check_batch(noise, tables)
    latents = _backend(noise).copy(noise)
    for image, table in enumerate(tables):
        if table.initial_scale != 1:
            latents[image] *= table.initial_scale
    return latents


def denoise(
    denoiser: Denoiser,
    latents: Array,
    tables: Sequence[StepTable],
    *,
    noise: Sequence[Noise],
    guidance_rescale: float = 0.0,
) -> Iterator[Step]:
    """Run one table per image over a batch; stop iterating to cancel.

    Args:
        denoiser: `denoiser(model_input, row) -> prediction`, same shapes. When any table guides, the batch
            comes doubled, [2 * batch, ...] with the unconditional half first. It must neither change nor keep
            its input, which the next step reuses, and must not write again to what it gave, which is kept as
            history. Predictions of lower precision are taken up to the state's.
        latents: [batch, ...], already scaled (`initial_latents`); left unchanged. The state is float32, or
            float64 for float64 latents.
        tables: one per image. Class, length and guidance may differ; an image whose table has ended keeps its
            state. Neighbours with the same table object share most calls.
        noise: one callable per image, called with the shape of one image in each row that draws, as
            `diffusers` draws from one generator per image.
        guidance_rescale: share of the guided prediction that is rescaled to the conditional one's deviation
            (https://arxiv.org/abs/2305.08891, section 3.4; `rescale_noise_cfg` of `diffusers`).

    An image's result depends on its own table, noise and predictions alone, bit for bit, wherever it stands.

    Raises:
        InputError: the numbers of tables, noises and images differ, or `guidance_rescale` is not from 0 to 1.
    """
    check(latents, tables, noise, guidance_rescale)
    return _run(denoiser, latents, list(tables), list(noise), guidance_rescale)


def check(latents: Array, tables: Sequence[StepTable], noise: Sequence[Noise], guidance_rescale: float) -> None:
    """Refuse arguments of `denoise`; it says which."""
    _check_batch(latents, tables)
    if len(noise) != len(tables):
        raise InputError(f"one noise source per image is needed: {len(noise)} for {len(tables)} images")
    if not 0 <= guidance_rescale <= 1:
        raise InputError(f"guidance_rescale must be from 0 to 1, not {guidance_rescale}")


def row_by_row(denoiser: Callable[..., Array]) -> Callable[..., Iterator[Step]]:
    """`denoise` of (latents, constants, tables, ...), with a denoiser of (latents, a row of the first, the others)."""

    def sample(
        latents: Array, constants: Sequence[Array], tables: Sequence[StepTable], **arguments: Any
    ) -> Iterator[Step]:
        rows, *others = constants
        return denoise(lambda given, row: denoiser(given, rows[row], *others), latents, tables, **arguments)

    return sample


def _run(
    denoiser: Denoiser, latents: Array, tables: list[StepTable], noise: list[Noise], guidance_rescale: float
) -> Iterator[Step]:
    ops = _backend(latents)
    batch, shape, total = len(tables), tuple(latents.shape[1:]), max(map(len, tables))
    size = math.prod(shape)
    guided = any(table.guided for table in tables)
    groups, start = [], 0
    for _, same in groupby(tables, key=id):
        images = slice(start, start := start + len(members := list(same)))
        groups.append(_Group(ops, members[0], images, size))
    initial = ops.copy(latents).reshape(batch, size)
    for group in groups:
        ops.assign(group.state(0), initial[group.images])
    model_input = ops.zeros(((2 if guided else 1) * batch, *shape))
    flat_input = model_input.reshape(-1, size)
    # The states are the input as they are where they need no gathering, no doubling and no scale.
    as_it_is = len(groups) == 1 and not guided and bool((tables[0].input_scale == 1).all())
    row = 0

    def read(index: int, what: Reading) -> Array:
        if index != row:  # its buffers are in use again
            raise RuntimeError(f"step {index} is past: read it before asking for the next step")
        result = ops.zeros((batch, size))
        for group in groups:
            if what == "denoised" and row < group.rows:
                a, b = group.table.denoised[row].tolist()
                ops.assign(result[group.images], group.state(row) * a + group.prediction(row) * b)
            else:
                ops.assign(result[group.images], group.state(row + 1))
        return ops.finite(result) if what == "finite" else result.reshape(batch, *shape)

    for row in range(total):
        if as_it_is:
            given = groups[0].state(row).reshape(batch, *shape)
        else:
            given = model_input
            for group in groups:
                scale = group.table.input_scale[min(row, group.rows - 1)]
                ops.scale(group.state(row), float(scale), flat_input[group.images])
            if guided:
                ops.assign(flat_input[batch:], flat_input[:batch])
        output = ops.floats(denoiser(given, row), given).reshape(-1, size)
        for group in groups:
            if row >= group.rows:
                continue
            group.keep(
                row, _guide(ops, group, row, output, batch, guidance_rescale) if guided else output[group.images]
            )
            if group.table.draws[row]:
                _draw(ops, group, row, noise, shape)
            group.update(row)
        yield Step(row, total, read)


class _Group:
    """Neighbouring images of one table: their states, predictions and noises, each [images, size], newest last used.

    They lie in rings: what belongs to row i is in slot i modulo the ring's length. Of states there is one more than the
    table's history, so that a row's own state outlives its update; predictions are kept as the denoiser gave them.
    """

    def __init__(self, ops: _Numpy | _Torch, table: StepTable, images: slice, size: int) -> None:
        self.table = table
        self.images = images
        self.rows = len(table)
        self._ops = ops
        count = images.stop - images.start
        self._states = [ops.zeros((count, size)) for _ in range(1 + table.state.shape[1])]
        self._predictions: list[Array] = [None] * table.prediction.shape[1]
        self._noises: list[Array] = [None] * table.noise.shape[1]
        rings = (self._states, self._predictions, self._noises)
        # By row: ring, slot and weight of all that its next state is a sum of.
        self._terms = [
            [
                (ring, (row - age) % len(ring), float(weight))
                for ring, weights in zip(rings, (table.state, table.prediction, table.noise), strict=True)
                for age, weight in enumerate(weights[row])
                if weight
            ]
            for row in range(self.rows)
        ]

    def state(self, row: int) -> Array:
        """The state that the row starts from; after the table's end its last."""
        return self._states[min(row, self.rows) % len(self._states)]

    def prediction(self, row: int) -> Array:
        """The row's prediction."""
        return self._predictions[row % len(self._predictions)]

    def keep(self, row: int, prediction: Array) -> None:
        """Take the row's prediction into the history."""
        self._predictions[row % len(self._predictions)] = prediction

    def keep_noise(self, row: int, noise: Array) -> None:
        """Take the row's noise into the history."""
        self._noises[row % len(self._noises)] = noise

    def update(self, row: int) -> None:
        """Write the next state, the weighted sum of the row."""
        terms = [(ring[slot], weight) for ring, slot, weight in self._terms[row]]
        self._ops.weighted_sum(terms, self.state(row + 1))


def _guide(ops: _Numpy | _Torch, group: _Group, row: int, output: Array, batch: int, rescale: float) -> Array:
    """The halves of a group's predictions as one."""
    images, scale = group.images, float(group.table.guidance[row])
    negative, positive = output[images], output[batch + images.start : batch + images.stop]
    if scale <= 1:
        return positive
    guided = ops.guide(negative, positive, scale)
    if rescale:
        for image in range(len(guided)):
            ratio = ops.deviation(positive[image]) / ops.deviation(guided[image])
            guided[image] *= 1 + rescale * (ratio - 1)
    return guided


def _draw(ops: _Numpy | _Torch, group: _Group, row: int, noise: list[Noise], shape: tuple[int, ...]) -> None:
    """Draw a group's noises into its history."""
    drawn = [noise[image](shape) for image in range(group.images.start, group.images.stop)]
    for image, one in enumerate(drawn, group.images.start):
        if tuple(one.shape) != shape:
            raise ValueError(f"the noise source of image {image} gave shape {tuple(one.shape)}, not {shape}")
    # A last row's draw may have no weight: only the stream moves on.
    if group.table.noise.shape[1]:
        group.keep_noise(row, ops.stack([one.reshape(-1) for one in drawn]))


def _check_batch(latents: Array, tables: Sequence[StepTable]) -> None:
    if latents.ndim < 2 or len(tables) != latents.shape[0] or not tables:
        raise InputError(
            f"latents [batch, ...] of shape {tuple(latents.shape)} need a table per image, not {len(tables)}"
        )


def _backend(latents: Array) -> _Numpy | _Torch:
    return _Numpy(latents) if isinstance(latents, np.ndarray) else _Torch(latents)


class _Numpy:
    """What the loop needs of arrays. Sums are element by element, so no result depends on an element's place."""

    BLOCK = 2**14  # numbers that stay in a core's cache from one term to the next

    def __init__(self, latents: Array) -> None:
        self._dtype = np.dtype(np.float64 if latents.dtype == np.float64 else np.float32)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape, dtype=self._dtype)

    def copy(self, x: Array) -> Array:
        return x.astype(self._dtype)

    def assign(self, out: Array, x: Array) -> None:
        np.copyto(out, x, casting="same_kind")

    def stack(self, parts: list[Array]) -> Array:
        return np.stack(parts).astype(self._dtype, copy=False)

    def floats(self, x: Array, like: Array) -> Array:
        """The prediction in the state's precision, its shape checked."""
        x = np.asarray(x)
        if x.shape != like.shape:
            raise ValueError(f"the denoiser gave shape {x.shape} for an input of shape {like.shape}")
        return x.astype(self._dtype, copy=False)

    def scale(self, x: Array, factor: float, out: Array) -> None:
        np.multiply(x, factor, out=out)

    def weighted_sum(self, terms: list[tuple[Array, float]], out: Array) -> None:
        """Sum of arrays times their weights; of none, zero."""
        if not terms:
            out[...] = 0
            return
        flat, (first, *others) = out.reshape(-1), [(array.reshape(-1), weight) for array, weight in terms]
        product = np.empty(min(self.BLOCK, len(flat)), dtype=self._dtype)
        for start in range(0, len(flat), self.BLOCK):
            block = flat[start : start + self.BLOCK]
            np.multiply(first[0][start : start + self.BLOCK], first[1], out=block)
            for array, weight in others:
                scaled = product[: len(block)]
                np.multiply(array[start : start + self.BLOCK], weight, out=scaled)
                block += scaled

    def guide(self, negative: Array, positive: Array, scale: float) -> Array:
        guided = positive - negative
        guided *= scale
        guided += negative
        return guided

    def deviation(self, x: Array) -> Any:
        return x.std(ddof=1)

    def finite(self, x: Array) -> Array:
        return np.isfinite(x).all(1)


class _Torch:
    """The same for tensors on any device."""

    def __init__(self, latents: torch.Tensor) -> None:
        import torch

        self._torch = torch
        self._dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
        self._device = latents.device

    def zeros(self, shape: tuple[int, ...]) -> Array:
        # Never inference tensors: those could not be updated by a caller who iterates outside that mode.
        with self._torch.inference_mode(False):
            return self._torch.zeros(shape, dtype=self._dtype, device=self._device)

    def copy(self, x: Array) -> Array:
        return x.detach().to(self._dtype, copy=True)

    def assign(self, out: Array, x: Array) -> None:
        out.copy_(x)

    def stack(self, parts: list[Array]) -> Array:
        return self._torch.stack([self._torch.as_tensor(part) for part in parts]).to(self._device, self._dtype)

    def floats(self, x: Array, like: Array) -> Array:
        """The prediction in the state's precision, its shape checked."""
        if x.shape != like.shape:
            raise ValueError(f"the denoiser gave shape {tuple(x.shape)} for an input of shape {tuple(like.shape)}")
        return x.detach() if x.dtype == self._dtype else x.detach().to(self._dtype)

    def scale(self, x: Array, factor: float, out: Array) -> None:
        self._torch.mul(x, factor, out=out)

    def weighted_sum(self, terms: list[tuple[Array, float]], out: Array) -> None:
        """Sum of arrays times their weights; of none, zero."""
        if not terms:
            out.zero_()
            return
        (first, weight), *others = terms
        if weight == 1 and others:
            (second, alpha), *others = others
            self._torch.add(first, second, alpha=alpha, out=out)
        else:
            self._torch.mul(first, weight, out=out)
        for array, alpha in others:
            out.add_(array, alpha=alpha)

    def guide(self, negative: Array, positive: Array, scale: float) -> Array:
        return self._torch.lerp(negative, positive, scale)

    def deviation(self, x: Array) -> Any:
        return x.std()

    def finite(self, x: Array) -> Array:
        return x.isfinite().all(1)
