"""The loop that runs step tables over numpy arrays or torch tensors: one update a step, no scheduler code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsd.errors import InputError
from fastsd.sampling.table import Float64, StepTable

if TYPE_CHECKING:
    import torch

# numpy.ndarray or torch.Tensor: the loop is written once over what both can do.
Array = Any
Noise = Callable[[tuple[int, ...]], Array]
Denoiser = Callable[[Array, int], Array]


class Step:
    """What the loop yields after each row; it can be read until the next one is asked for.

    Attributes:
        index: row number, from 0.
        total: rows of the longest table.
    """

    def __init__(self, index: int, total: int, read: Callable[[int, bool], Array]) -> None:
        self.index = index
        self.total = total
        self._read = read

    @property
    def latents(self) -> Array:
        """A copy of the latents after this row, [batch, ...]."""
        return self._read(self.index, False)

    def denoised(self) -> Array:
        """The row's estimate of the clean latents, [batch, ...]; for a finished image its latents."""
        return self._read(self.index, True)


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
            its input, which the next step reuses. Predictions of lower precision are taken up to the state's.
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
    _check_batch(latents, tables)
    if len(noise) != len(tables):
        raise InputError(f"one noise source per image is needed: {len(noise)} for {len(tables)} images")
    if not 0 <= guidance_rescale <= 1:
        raise InputError(f"guidance_rescale must be from 0 to 1, not {guidance_rescale}")
    return _run(denoiser, latents, list(tables), list(noise), guidance_rescale)


def _run(
    denoiser: Denoiser, latents: Array, tables: list[StepTable], noise: list[Noise], guidance_rescale: float
) -> Iterator[Step]:
    ops = _backend(latents)
    batch, shape, total = len(tables), tuple(latents.shape[1:]), max(map(len, tables))
    size = math.prod(shape)
    guided = any(table.guided for table in tables)
    # Lines start at multiples of 64 bytes: every image's product is the same call, down to the alignment.
    lines = ops.zeros((max(map(_line_count, tables)), batch, -(-size // 16) * 16))[:, :, :size]
    groups, start = [], 0
    for _, same in groupby(tables, key=id):
        images = slice(start, start := start + len(members := list(same)))
        groups.append(_Group(ops, members[0], images, lines[:, images]))
    initial = ops.copy(latents).reshape(batch, size)
    for group in groups:
        ops.assign(group.state(0), initial[group.images])
    model_input = ops.zeros(((2 if guided else 1) * batch, *shape))
    flat_input = model_input.reshape(-1, size)
    # The states are the input as they are where they need no gathering, no doubling and no scale.
    as_it_is = len(groups) == 1 and not guided and bool((tables[0].input_scale == 1).all())
    as_it_is = as_it_is and (batch == 1 or size % 16 == 0)
    row = 0

    def read(index: int, estimate: bool) -> Array:
        if index != row:  # its buffers are in use again
            raise RuntimeError(f"step {index} is past: read it before asking for the next step")
        result = ops.zeros((batch, size))
        for group in groups:
            if estimate and row < group.rows:
                a, b = group.table.denoised[row].tolist()
                ops.assign(result[group.images], group.state(row) * a + group.prediction(row) * b)
            else:
                ops.assign(result[group.images], group.state(row + 1))
        return result.reshape(batch, *shape)

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
            if guided:
                _guide(ops, group, row, output, batch, guidance_rescale)
            else:
                ops.assign(group.prediction(row), output[group.images])
            if group.table.draws[row]:
                _draw(ops, group, row, noise, shape)
            group.update(row)
        yield Step(row, total, read)


def _line_count(table: StepTable) -> int:
    return int(1 + table.state.shape[1] + table.prediction.shape[1] + table.noise.shape[1])


class _Group:
    """Neighbouring images of one table. Their history is lines of a matrix, so that an update is a product.

    The lines are rings of states (one more than the table's history, so that a row's own state outlives its
    update), predictions and noises. One state's line comes first and the others last: for a history of one
    state, the line to be written is at an end and the others are one matrix.
    """

    def __init__(self, ops: _Numpy | _Torch, table: StepTable, images: slice, lines: Array) -> None:
        self.table = table
        self.images = images
        self.rows = len(table)
        self._ops = ops
        self._lines = list(lines)  # each [images, size]

        states, predictions, noises = (m.shape[1] for m in (table.state, table.prediction, table.noise))
        first_noise = 1 + predictions
        self._states = [0, *range(first_noise + noises, first_noise + noises + states)]
        self._predictions = list(range(1, first_noise))
        self._noises = list(range(first_noise, first_noise + noises))
        weights = np.zeros((self.rows, _line_count(table)))
        for matrix, ring in (
            (table.state, self._states),
            (table.prediction, self._predictions),
            (table.noise, self._noises),
        ):
            for age in range(matrix.shape[1]):
                for row in range(age, self.rows):
                    weights[row, ring[(row - age) % len(ring)]] = matrix[row, age]
        constants = ops.constants(weights)
        # By row: every image's line to write with the runs of lines before and after it, and the runs'
        # weights. Rows share views where they can, as a view costs as much as a small product.
        self._products: list[tuple[list[tuple[Array, list[Array]]], list[Array]]] = []
        views: dict[tuple[int, ...], list[tuple[Array, list[Array]]]] = {}
        for row in range(self.rows):
            target, used = self._states[(row + 1) % len(self._states)], np.flatnonzero(weights[row])
            parts = [part for part in (used[used < target], used[used > target]) if len(part)]
            runs = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
            key = (target, *(bound for run in runs for bound in (run.start, run.stop)))
            if key not in views:
                views[key] = [(lines[target, i], [lines[run, i].T for run in runs]) for i in range(lines.shape[1])]
            self._products.append((views[key], [constants[row, run] for run in runs]))

    def state(self, row: int) -> Array:
        """The state that the row starts from, [images, size]; after the table's end its last."""
        return self._lines[self._states[min(row, self.rows) % len(self._states)]]

    def prediction(self, row: int) -> Array:
        """The row's prediction, [images, size]."""
        return self._lines[self._predictions[row % len(self._predictions)]]

    def noise(self, row: int) -> Array:
        """The row's noise, [images, size]."""
        return self._lines[self._noises[row % len(self._noises)]]

    def update(self, row: int) -> None:
        """Write the next state: the row's weights times the history, image by image.

        It is one call an image, of one shape and alignment: the result does not depend on the image's place.
        """
        images, weights = self._products[row]
        for out, matrices in images:
            self._ops.product(matrices, weights, out)


def _guide(ops: _Numpy | _Torch, group: _Group, row: int, output: Array, batch: int, rescale: float) -> None:
    """Combine the halves of a group's predictions into its history."""
    images, scale, out = group.images, float(group.table.guidance[row]), group.prediction(row)
    negative, positive = output[images], output[batch + images.start : batch + images.stop]
    if scale <= 1:
        ops.assign(out, positive)
        return
    ops.guide(negative, positive, scale, out)
    if rescale:
        for image in range(len(out)):
            ratio = ops.deviation(positive[image]) / ops.deviation(out[image])
            out[image] *= 1 + rescale * (ratio - 1)


def _draw(ops: _Numpy | _Torch, group: _Group, row: int, noise: list[Noise], shape: tuple[int, ...]) -> None:
    """Draw a group's noises into its history."""
    for i, image in enumerate(range(group.images.start, group.images.stop)):
        drawn = noise[image](shape)
        if tuple(drawn.shape) != shape:
            raise ValueError(f"the noise source of image {image} gave shape {tuple(drawn.shape)}, not {shape}")
        # A last row's draw may have no weight: only the stream moves on.
        if group.table.noise.shape[1]:
            ops.assign(group.noise(row)[i], drawn.reshape(-1))


def _check_batch(latents: Array, tables: Sequence[StepTable]) -> None:
    if latents.ndim < 2 or len(tables) != latents.shape[0] or not tables:
        raise InputError(
            f"latents [batch, ...] of shape {tuple(latents.shape)} need a table per image, not {len(tables)}"
        )


def _backend(latents: Array) -> _Numpy | _Torch:
    return _Numpy(latents) if isinstance(latents, np.ndarray) else _Torch(latents)


class _Numpy:
    """What the loop needs of arrays."""

    def __init__(self, latents: Array) -> None:
        self._dtype = np.dtype(np.float64 if latents.dtype == np.float64 else np.float32)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        size = math.prod(shape) * self._dtype.itemsize
        memory = np.zeros(size + 64, dtype=np.uint8)
        start = -memory.ctypes.data % 64
        return memory[start : start + size].view(self._dtype).reshape(shape)

    def constants(self, values: Float64) -> Array:
        return values.astype(self._dtype)

    def copy(self, x: Array) -> Array:
        return x.astype(self._dtype)

    def assign(self, out: Array, x: Array) -> None:
        np.copyto(out, x, casting="same_kind")

    def floats(self, x: Array, like: Array) -> Array:
        """The prediction in the state's precision, its shape checked."""
        x = np.asarray(x)
        if x.shape != like.shape:
            raise ValueError(f"the denoiser gave shape {x.shape} for an input of shape {like.shape}")
        return x.astype(self._dtype, copy=False)

    def scale(self, x: Array, factor: float, out: Array) -> None:
        np.multiply(x, factor, out=out)

    def product(self, matrices: list[Array], vectors: list[Array], out: Array) -> None:
        """Sum of one or two matrix-vector products; of none, zero."""
        if not matrices:
            out[...] = 0
            return
        np.matmul(matrices[0], vectors[0], out=out)
        if len(matrices) > 1:
            out += np.matmul(matrices[1], vectors[1])

    def guide(self, negative: Array, positive: Array, scale: float, out: Array) -> None:
        np.subtract(positive, negative, out=out)
        np.multiply(out, scale, out=out)
        np.add(negative, out, out=out)

    def deviation(self, x: Array) -> Any:
        return x.std(ddof=1)


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

    def constants(self, values: Float64) -> Array:
        return self._torch.from_numpy(values).to(self._device, self._dtype)

    def copy(self, x: Array) -> Array:
        return x.detach().to(self._dtype, copy=True)

    def assign(self, out: Array, x: Array) -> None:
        out.copy_(x if isinstance(x, self._torch.Tensor) else self._torch.as_tensor(x))

    def floats(self, x: Array, like: Array) -> Array:
        """The prediction in the state's precision, its shape checked."""
        if x.shape != like.shape:
            raise ValueError(f"the denoiser gave shape {tuple(x.shape)} for an input of shape {tuple(like.shape)}")
        return x.detach() if x.dtype == self._dtype else x.detach().to(self._dtype)

    def scale(self, x: Array, factor: float, out: Array) -> None:
        self._torch.mul(x, factor, out=out)

    def product(self, matrices: list[Array], vectors: list[Array], out: Array) -> None:
        """Sum of one or two matrix-vector products; of none, zero."""
        if not matrices:
            out.zero_()
            return
        self._torch.mv(matrices[0], vectors[0], out=out)
        if len(matrices) > 1:
            out.addmv_(matrices[1], vectors[1])

    def guide(self, negative: Array, positive: Array, scale: float, out: Array) -> None:
        self._torch.lerp(negative, positive, scale, out=out)

    def deviation(self, x: Array) -> Any:
        return x.std()
