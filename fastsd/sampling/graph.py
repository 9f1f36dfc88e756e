"""Sampling on a GPU: a step is one captured graph, N steps are N replays, and nothing waits for the device in between.

The graph gathers its row of the constants by an index that lies on the device, runs the denoiser on both halves of
guidance, combines them, takes the sampler's step and moves the index on. It is captured once for the shapes that it
reads. Sampler, number of steps, scale of guidance, prompt, seed and LoRA are contents of its buffers, never a reason
to capture anew.

Nobody owns a graph for longer than a step: whoever finds the data of another run in the buffers copies them out, puts
its own in, and goes on. So threads take turns, half-read streams wait without blocking anybody, and a run that was
dropped costs nothing.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsd.backends import ROWS
from fastsd.sampling.loop import Noise, Reading, Step, check
from fastsd.sampling.table import MAX_HISTORY, StepTable
from fastsd_kernels.launch import FLOATS
from fastsd_kernels.step import LEADING, pack, step

LIMIT = 16  # graphs that are kept of one function, the last used ones: five sizes of three batches are 15
WARMUPS = 2  # runs before a capture: the first compiles kernels and loads libraries, which a capture cannot hold

Body = Callable[[], None]
Made = TypeVar("Made")
Result = TypeVar("Result")


class Device(Protocol):
    """Where graphs are captured; `Cuda` is the one that there is."""

    def capture(self, body: Body) -> Body:
        """What `body` enqueues as one function that enqueues it again, on the same addresses; it may run it before."""

    def order(self) -> None:
        """What this thread enqueues from here on comes after whatever was enqueued before an earlier `order`'s."""

    def upload(self, values: Tensor) -> Tensor:
        """Values in memory of the device; nothing waits."""


class Cuda:
    """Graphs of a GPU. They share memory for what lives within one of them, so only one may run at a time (`order`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # of all captures: memory is shared only within a stream
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._last: torch.cuda.Stream | None = None

    def capture(self, body: Body) -> Body:
        """See `Device`."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        sharing = next(iter(self._graphs), None)  # while a graph lives, so does its pool
        with _CAPTURING, torch.cuda.device(self._device):
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUPS):
                    body()
                pool = None if sharing is None else sharing.pool()
                # Other threads may go on meanwhile, but not wait for the whole device.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
                    body()
            current.wait_stream(self._stream)
        self._graphs.add(graph)
        replay: Body = graph.replay
        return replay

    def order(self) -> None:
        """See `Device`; a wait of one stream for another, not of the host."""
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def upload(self, values: Tensor) -> Tensor:
        """See `Device`; pinned memory is given to nobody else until the copy is through."""
        return (values if values.is_cuda else values.pin_memory()).to(self._device, non_blocking=True)


_CAPTURING = threading.Lock()  # one capture at a time in a process


class Graphs:
    """What the graphs of a pipeline have in common: their memory, of which only one may make use at a time.

    Args:
        device: captures them.
        limit: as many are kept of each function.
    """

    def __init__(self, device: Device, limit: int = LIMIT) -> None:
        self.device = device
        self._limit = limit
        self._lock = threading.Lock()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Only this thread enqueues work of these graphs inside; to be held for no longer than that takes."""
        with self._lock, torch.inference_mode():
            self.device.order()
            yield

    def recall(self, kept: OrderedDict[Hashable, Made], key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made under a key; made anew where it was not, or was dropped since. To be called inside."""
        if key not in kept:
            kept[key] = make()
            if len(kept) > self._limit:  # after the capture, which needs the others' pool and waits until they are idle
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def captured(function: Callable[..., Result], graphs: Graphs, weights: Sequence[Tensor] = ()) -> Callable[..., Result]:
    """A pure function of tensors, captured for each combination of their shapes, strides and dtypes.

    Args:
        function: `function(*tensors, **options)` gives a tensor, or a tuple of tensors and Nones; options are hashable,
            and part of the combination.
        graphs: whose memory and lock it shares.
        weights: what it reads besides. Their contents may change; where they were moved, it is captured anew.

    Returns:
        The same function; its results are new tensors.
    """
    kept: OrderedDict[Hashable, tuple[list[Tensor], list[Result], Body]] = OrderedDict()

    def call(*given: Tensor, **options: Hashable) -> Result:
        def make() -> tuple[list[Tensor], list[Result], Body]:
            inputs = [one.clone() for one in given]
            outputs: list[Result] = []

            def body() -> None:
                result = function(*inputs, **options)
                if not outputs:  # in the first warm-up, so outside the memory that graphs share
                    outputs.append(tree_map_only(Tensor, torch.empty_like, result))
                for output, one in zip(tree_leaves(outputs[0]), tree_leaves(result), strict=True):
                    if output is not None:
                        output.copy_(one)

            return inputs, outputs, graphs.device.capture(body)

        kinds = tuple((*_kind(one), one.stride()) for one in given)
        key = (kinds, tuple(sorted(options.items())), _addresses(weights))
        with graphs.exclusive():
            inputs, outputs, replay = graphs.recall(kept, key, make)
            for buffer, tensor in zip(inputs, given, strict=True):
                buffer.copy_(tensor)
            replay()
            result: Result = tree_map_only(Tensor, torch.clone, outputs[0])
            return result

    return call


def sampler(
    denoise: Callable[..., Tensor], graphs: Graphs, weights: Sequence[Tensor] = ()
) -> Callable[..., Iterator[Step]]:
    """What `row_by_row(denoise)` is, with a step as one graph.

    Results are those of `loop.denoise` up to the rounding of sums in another order; an image still depends on nothing
    but its own table, noise and predictions, for a batch of one size. The state is float32, the denoiser's input has
    the dtype of the modulation, and noise of the host is drawn while the device works on the row before.

    Args:
        denoise: (latents, a row of the modulation, the other constants) -> prediction; pure, without waiting for the
            device.
        graphs: whose memory and lock it shares.
        weights: what it reads besides. Their contents may change; where they were moved, it is captured anew.
    """
    kept: OrderedDict[Hashable, _Graph] = OrderedDict()

    def sample(
        latents: Tensor,
        constants: Sequence[Tensor],
        tables: Sequence[StepTable],
        *,
        noise: Sequence[Noise],
        guidance_rescale: float = 0.0,
    ) -> Iterator[Step]:
        check(latents, tables, noise, guidance_rescale)
        return steps(_Run(latents, constants, list(tables), list(noise), guidance_rescale))

    def steps(run: _Run) -> Iterator[Step]:
        with graphs.exclusive():
            key = (run.shapes, _addresses(weights))
            run.start(graphs.recall(kept, key, lambda: _Graph(denoise, run.shapes, run.latents, graphs)))
        for row in range(run.total):
            run.advance(row)
            yield Step(row, run.total, run.read)

    return sample


Kind = tuple[torch.Size, torch.dtype]


class _Shapes(NamedTuple):
    """All that a captured step depends on."""

    latents: torch.Size  # [batch, ...]
    guided: bool
    rescaled: bool
    slots: tuple[int, ...]  # of states, predictions and noises
    modulation: Kind  # of a row
    others: tuple[Kind, ...]


class _State(NamedTuple):
    """The buffers that a step changes."""

    model_input: Tensor  # [halves * batch, ...]
    row: Tensor  # [1], its index
    states: Tensor  # [slots, batch, size], rings as in `fastsd_kernels.step`, as are the next two
    predictions: Tensor
    noises: Tensor
    nonfinite: Tensor  # [batch]


class _Graph:
    """A captured step and its buffers, which lie outside the memory that graphs share."""

    def __init__(self, denoise: Callable[..., Tensor], shapes: _Shapes, like: Tensor, graphs: Graphs) -> None:
        batch, *rest = shapes.latents
        zeros = partial(torch.zeros, device=like.device)
        states, predictions, noises = (zeros(slots, batch, math.prod(rest)) for slots in shapes.slots)
        row, dtype = shapes.modulation
        self.modulation = zeros(ROWS, *row, dtype=dtype)
        self.coefficients = zeros(ROWS, batch, LEADING + sum(shapes.slots))
        self.others = [zeros(shape, dtype=dtype) for shape, dtype in shapes.others]
        self.rescale = zeros(())
        self.state = _State(
            zeros((1 + shapes.guided) * batch, *rest, dtype=dtype if dtype in FLOATS else torch.float32),
            zeros(1, dtype=torch.int64),
            states,
            predictions,
            noises,
            zeros(batch, dtype=torch.bool),
        )
        self.owner: Callable[[], _Run | None] = _nobody  # whose data are in the buffers
        self.graphs = graphs
        self.replay = graphs.device.capture(partial(self._step, denoise, shapes.rescaled))

    def _step(self, denoise: Callable[..., Tensor], rescaled: bool) -> None:
        """What is captured."""
        model_input, index, states, predictions, noises, nonfinite = self.state
        batch, row = states.shape[1], index % ROWS
        prediction = denoise(model_input, self.modulation.index_select(0, row)[0], *self.others)
        if prediction.shape != model_input.shape:
            given = tuple(model_input.shape)
            raise ValueError(f"the denoiser gave shape {tuple(prediction.shape)} for an input of shape {given}")
        flat, dtype = model_input.view(len(model_input), -1), prediction.dtype
        prediction = prediction.reshape(flat.shape).to(dtype if dtype in FLOATS else torch.float32)
        if rescaled:
            scale = self.coefficients.index_select(0, row)[0, :, :1]
            prediction, flat = _guide(prediction, scale, self.rescale), flat[:batch]
        history = noises, states, predictions
        step(prediction.contiguous(), self.coefficients, index, *history, flat, nonfinite)
        if rescaled:
            model_input[batch:].copy_(model_input[:batch])
        index.add_(1)


def _guide(prediction: Tensor, scale: Tensor, rescale: Tensor) -> Tensor:
    """The halves [2 * batch, size] as one, rescaled as in `loop.denoise`; `scale` is [batch, 1]."""
    negative, positive = prediction.float().chunk(2)
    guided = torch.lerp(negative, positive, scale)
    ratio = positive.std(1, keepdim=True) / guided.std(1, keepdim=True)
    return torch.where(scale > 1, guided * (1 + rescale * (ratio - 1)), positive)


def _nobody() -> None:
    return None


class _Run:
    """One call: what it brings to a graph's buffers, and its state while they hold another's."""

    graph: _Graph

    def __init__(
        self,
        latents: Tensor,
        constants: Sequence[Tensor],
        tables: list[StepTable],
        noise: list[Noise],
        guidance_rescale: float,
    ) -> None:
        self._modulation, *self._others = constants
        self.latents, self._tables, self._noise, self._rescale = latents, tables, noise, guidance_rescale
        self.total = max(map(len, tables))
        if len(self._modulation) < self.total:
            raise ValueError(f"the constants have {len(self._modulation)} rows for tables of {self.total}")
        guided = any(table.guided for table in tables)
        # Enough for every sampler: what a row does not weigh is not even read.
        slots = [
            max(MAX_HISTORY, *(getattr(table, ring).shape[1] for table in tables))
            for ring in ("state", "prediction", "noise")
        ]
        self.shapes = _Shapes(
            latents.shape,
            guided,
            guided and guidance_rescale > 0,
            tuple(slots),
            _kind(self._modulation[0]),
            tuple(map(_kind, self._others)),
        )
        scales = torch.tensor([[table.input_scale[0]] for table in tables], dtype=torch.float32)
        self._host = pack(tables, *self.shapes.slots), scales
        self._row = -1
        self._saved: _State | None = None

    def start(self, graph: _Graph) -> None:
        """Bring what lies in the host's memory to the device; inside `Graphs.exclusive`, as `_enter` and `_fill`."""
        self.graph = graph
        self._coefficients, self._scale = map(graph.graphs.device.upload, self._host)

    def advance(self, row: int) -> None:
        """Run the next row."""
        drawn = self._draw(row)
        graph = self.graph
        with graph.graphs.exclusive():
            if graph.owner() is not self:
                self._enter(row)
            elif row % ROWS == 0:
                self._fill(row)
            noises = graph.state.noises
            for image, values in drawn.items():
                noises[row % len(noises), image].copy_(graph.graphs.device.upload(values))
            graph.replay()
            self._row = row

    def _draw(self, row: int) -> dict[int, Tensor]:
        """Image -> the noise that it draws in this row, [size]. A draw without weight moves only the stream on."""
        shape, drawn = tuple(self.latents.shape[1:]), {}
        for image, table in enumerate(self._tables):
            if row < len(table) and table.draws[row]:
                values = torch.as_tensor(self._noise[image](shape))
                if tuple(values.shape) != shape:
                    raise ValueError(f"the noise source of image {image} gave shape {tuple(values.shape)}, not {shape}")
                if table.noise.shape[1]:
                    drawn[image] = values.reshape(-1).float()
        return drawn

    def _enter(self, row: int) -> None:
        """Put this run's data into the buffers; those of the run that they belong to are saved."""
        graph, state = self.graph, self.graph.state
        if (owner := graph.owner()) is not None:
            owner._saved = _State(*(buffer.clone() for buffer in state))
        graph.owner = _nobody  # as long as there is something of both
        for buffer, values in zip(graph.others, self._others, strict=True):
            buffer.copy_(values)
        graph.rescale.fill_(self._rescale)
        if self._saved is not None:
            for buffer, values in zip(state, map(_borrowed, self._saved), strict=True):
                buffer.copy_(values)
        else:
            flat = self.latents.reshape(len(self._tables), -1)
            state.states[0].copy_(flat)
            state.model_input.view(-1, *flat.shape).copy_(state.states[0] * self._scale)
            state.row.zero_()
            state.nonfinite.zero_()
        self._fill(row)
        graph.owner = weakref.ref(self)

    def _fill(self, row: int) -> None:
        """Put the rows around this one, `ROWS` of them, where the graph gathers them."""
        start = row - row % ROWS
        for buffer, rows in ((self.graph.modulation, self._modulation), (self.graph.coefficients, self._coefficients)):
            chunk = rows[start : min(start + ROWS, self.total)]
            buffer[: len(chunk)].copy_(chunk)

    def read(self, index: int, what: Reading) -> Tensor:
        """See `Step`."""
        graph = self.graph
        with graph.graphs.exclusive(), torch.inference_mode(False), torch.no_grad():  # the caller may write to it
            if index != (row := self._row):
                raise RuntimeError(f"step {index} is past: read it before asking for the next step")
            if graph.owner() is self:
                state = graph.state
            else:
                assert self._saved is not None  # by whoever took the buffers over
                state = _State(*map(_borrowed, self._saved))
            if what == "finite":
                return ~state.nonfinite
            result = state.states[(row + 1) % len(state.states)].clone()
            for image, table in enumerate(self._tables if what == "denoised" else ()):
                if row < len(table):
                    a, b = table.denoised[row].tolist()
                    result[image] = (
                        state.states[row % len(state.states), image] * a
                        + state.predictions[row % len(state.predictions), image] * b
                    )
            return result.reshape(self.latents.shape)


def _borrowed(tensor: Tensor) -> Tensor:
    """A tensor that may have been made on another stream: its memory is not reused before this one is through."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


def _kind(tensor: Tensor) -> Kind:
    return tensor.shape, tensor.dtype


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
