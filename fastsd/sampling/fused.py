"""`loop.denoise` for tensors on a CPU with one call of native code a row (`fastsd_kernels.cpu_step`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from fastsd.sampling.loop import Noise, Reading, Step, check, row_by_row
from fastsd.sampling.table import StepTable
from fastsd_kernels.cpu_step import KINDS

GRAIN = 2**15  # elements that are worth a thread, as in torch's own operations


def sampler(denoiser: Callable[..., Tensor], kernel: Callable[..., None]) -> Callable[..., Iterator[Step]]:
    """`loop.row_by_row` of a denoiser; rescaled guidance, which looks at whole images, is left to that.

    Args:
        denoiser: of (latents, a row of the first of the constants, the others).
        kernel: `cpu_step.load`.
    """
    plain = row_by_row(denoiser)

    def sample(
        latents: Tensor,
        constants: Sequence[Tensor],
        tables: Sequence[StepTable],
        *,
        noise: Sequence[Noise],
        guidance_rescale: float = 0.0,
    ) -> Iterator[Step]:
        if guidance_rescale:
            return plain(latents, constants, tables, noise=noise, guidance_rescale=guidance_rescale)
        check(latents, tables, noise, guidance_rescale)
        rows, *others = constants

        def predict(given: Tensor, row: int) -> Tensor:
            return denoiser(given, rows[row], *others)

        return _run(predict, latents, list(tables), list(noise), kernel)

    return sample


def _run(
    denoiser: Callable[[Tensor, int], Tensor],
    latents: Tensor,
    tables: list[StepTable],
    noise: list[Noise],
    kernel: Callable[..., None],
) -> Iterator[Step]:
    batch, shape, total = len(tables), tuple(latents.shape[1:]), max(map(len, tables))
    size = math.prod(shape)
    wide = torch.float64 if latents.dtype == torch.float64 else torch.float32
    kinds = KINDS[wide]
    guided = any(table.guided for table in tables)
    # Never inference tensors: those could not be updated by a caller who iterates outside that mode.
    with torch.inference_mode(False):
        initial = latents.detach().to(wide, copy=True).reshape(batch, size)
        model_input = torch.zeros(((2 if guided else 1) * batch, *shape), dtype=wide)
        groups, start = [], 0
        for _, same in groupby(tables, key=id):
            images = slice(start, start := start + len(members := list(same)))
            groups.append(_Group(members[0], images, initial[images]))
    # The states are the input as they are where they need no gathering, no doubling and no scale.
    as_it_is = len(groups) == 1 and not guided and bool((tables[0].input_scale == 1).all())
    if not as_it_is:
        flat = model_input.reshape(-1, size)
        for group in groups:
            torch.mul(group.state(0), float(group.table.input_scale[0]), out=flat[group.images])
            if guided:
                flat[batch:][group.images] = flat[group.images]
    second = batch if guided else -1
    row = 0

    def read(index: int, what: Reading) -> Tensor:
        if index != row:  # its buffers are in use again
            raise RuntimeError(f"step {index} is past: read it before asking for the next step")
        result = torch.cat([group.read(row, what) for group in groups])
        return result.isfinite().all(1) if what == "finite" else result.reshape(batch, *shape)

    for row in range(total):
        given = groups[0].state(row).reshape(batch, *shape) if as_it_is else model_input
        output = denoiser(given, row)
        if output.shape != given.shape:
            raise ValueError(
                f"the denoiser gave shape {tuple(output.shape)} for an input of shape {tuple(given.shape)}"
            )
        output = output.contiguous()
        if output.dtype not in kinds:
            output = output.to(wide)
        kind = kinds[output.dtype]
        for group in groups:
            if row < group.rows:
                group.draw(row, noise, shape)
                group.step(row, output, kind, kernel, None if as_it_is else model_input, second, batch if guided else 0)
        yield Step(row, total, read)


class _Group:
    """Neighbouring images of one table: see `loop._Group`, whose rings lie here as addresses, too."""

    def __init__(self, table: StepTable, images: slice, initial: Tensor) -> None:
        self.table, self.images, self.rows = table, images, len(table)
        self._count, self._size = initial.shape
        dtype = initial.dtype
        lengths = (1 + table.state.shape[1], table.prediction.shape[1], table.noise.shape[1])
        self._first = (0, lengths[0], lengths[0] + lengths[1])  # slot of each ring
        self._states = [torch.empty_like(initial, memory_format=torch.contiguous_format) for _ in range(lengths[0])]
        self._states[0].copy_(initial)
        self._buffers = [torch.empty_like(self._states[0]) for _ in range(lengths[1])]  # of combined predictions
        # Each with the row at which the group's begin: what comes without a copy holds all images.
        self._predictions = [(buffer, 0) for buffer in self._buffers]
        self._noises: list[list[Tensor]] = [[] for _ in range(lengths[2])]
        self._bytes = self._size * dtype.itemsize
        self._slots = np.zeros((sum(lengths), self._count), dtype=np.int64)
        self._places = np.arange(self._count, dtype=np.int64) * self._bytes
        for slot, buffer in enumerate((*self._states, *self._buffers)):
            self._slots[slot] = buffer.data_ptr() + self._places
        self._threads = max(1, min(torch.get_num_threads(), initial.numel() // GRAIN))
        # By row: plan and weights as `cpu_step` reads them.
        self._plans, self._weights = np.zeros((self.rows, 15), dtype=np.int64), np.zeros((self.rows, 14))
        self._weights[:, 0] = table.guidance
        self._weights[:, 1] = [*table.input_scale[1:], table.input_scale[-1]]
        for row in range(self.rows):
            terms = [
                (first + (row - age) % length, weight)
                for first, length, weights in zip(
                    self._first, lengths, (table.state, table.prediction, table.noise), strict=True
                )
                for age, weight in enumerate(weights[row])
                if weight
            ]
            self._plans[row, :3] = len(terms), (row + 1) % lengths[0], lengths[0] + row % lengths[1]
            self._plans[row, 3 : 3 + len(terms)] = [slot for slot, _ in terms]
            self._weights[row, 2 : 2 + len(terms)] = [weight for _, weight in terms]
        self._plan_at, self._weights_at = self._plans.ctypes.data, self._weights.ctypes.data
        self._slots_at = self._slots.ctypes.data

    def state(self, row: int) -> Tensor:
        """The state that the row starts from; after the table's end its last."""
        return self._states[min(row, self.rows) % len(self._states)]

    def read(self, row: int, what: Reading) -> Tensor:
        """A copy of what a step shows after a row."""
        if what == "denoised" and row < self.rows:
            a, b = self.table.denoised[row].tolist()
            prediction, first = self._predictions[row % len(self._predictions)]
            estimate: Tensor = self.state(row) * a + prediction.reshape(-1, self._size)[first : first + self._count] * b
            return estimate
        return self.state(row + 1).clone()

    def draw(self, row: int, noise: list[Noise], shape: tuple[int, ...]) -> None:
        """Draw the row's noises; a last row's may have no weight: only the stream moves on."""
        if not self.table.draws[row]:
            return
        drawn = [torch.as_tensor(noise[image](shape)) for image in range(self.images.start, self.images.stop)]
        for image, one in enumerate(drawn, self.images.start):
            if tuple(one.shape) != shape:
                raise ValueError(f"the noise source of image {image} gave shape {tuple(one.shape)}, not {shape}")
        if self._noises:
            kept = [one.to("cpu", self._states[0].dtype).contiguous() for one in drawn]
            slot = row % len(self._noises)
            self._noises[slot] = kept
            self._slots[self._first[2] + slot] = [one.data_ptr() for one in kept]

    def step(
        self,
        row: int,
        output: Tensor,
        kind: int,
        kernel: Callable[..., None],
        model_input: Tensor | None,
        second: int,
        half: int,
    ) -> None:
        """Take the row's prediction into the history and write the next state and input."""
        start = self.images.start
        guided = half > 0 and self._weights[row, 0] > 1
        slot, address = row % len(self._predictions), output.data_ptr()
        if not guided and output.dtype == self._states[0].dtype:  # as it is, without a copy
            self._predictions[slot] = output, half + start
            self._slots[self._first[1] + slot] = self._places + (address + (half + start) * self._bytes)
        elif self._predictions[slot][0] is not self._buffers[slot]:
            self._predictions[slot] = self._buffers[slot], 0
            self._slots[self._first[1] + slot] = self._places + self._buffers[slot].data_ptr()
        kernel(
            address,
            kind,
            self._slots_at,
            self._plan_at + row * self._plans.strides[0],
            self._weights_at + row * self._weights.strides[0],
            self._count,
            self._size,
            start if guided else -1,
            half + start,
            None if model_input is None else model_input.data_ptr() + start * self._bytes,
            second,
            self._threads,
        )
