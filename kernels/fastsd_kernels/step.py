# mypy: disable-error-code="no-untyped-def"
"""One sampler step of a whole batch: guidance, the next state, the model's next input.

Any linear sampler's step is a weighted sum of the current and earlier states, predictions and noises. The weights come
from a table on the device, and so does the row's index: a captured graph is replayed for every row, with any sampler
an image, and nothing is read back. A weight of zero selects, it never multiplies: where 0 * NaN would be NaN, a
finished image keeps its state, and history that was never written is not read.

Pointwise: in SDXL 0.5 MB a buffer, so the time is that of a launch. Rescaled guidance (a deviation over the whole
image) is not in this kernel: combine it before, and pass a prediction without halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from fastsd_kernels.launch import FLOATS, TYPES, Variant, check, jit, run, tl, use_kernel

BLOCK = 1024
WARPS = 4
LEADING = 2  # columns before the weights: guidance scale, scale of the next input


def pack(tables: Sequence[Any], states: int, predictions: int, noises: int, rows: int | None = None) -> Tensor:
    """The coefficients of a batch, [rows, batch, 2 + states + predictions + noises] in float32.

    Columns: guidance scale, factor of the next state in the model's next input, weights of states, predictions and
    noises, each newest first and zero where a table's history is shorter. After its table's end an image keeps its
    state.

    Args:
        tables: one per image, with the attributes of `fastsd.sampling.StepTable`.
        states: slots of the history of states.
        predictions: slots of the history of predictions.
        noises: slots of the history of noises.
        rows: as many rows, None for those of the longest table.

    Raises:
        ValueError: a table needs more history, or more rows.
    """
    longest = max(map(len, tables))
    rows = longest if rows is None else rows
    check(longest <= rows, f"A table has {longest} rows; there must be at most {rows}.")
    packed = torch.zeros(rows, len(tables), LEADING + states + predictions + noises)
    packed[..., 0] = 1
    packed[..., LEADING] = 1
    for image, table in enumerate(tables):
        own = packed[: len(table), image]
        own[:, 0] = torch.as_tensor(table.guidance.copy())
        inputs = torch.as_tensor(table.input_scale.copy())
        own[:, 1] = torch.cat([inputs[1:], inputs[-1:]])
        packed[len(table) :, image, 1] = float(table.input_scale[-1])
        start = LEADING
        for name, slots in (("state", states), ("prediction", predictions), ("noise", noises)):
            weights = getattr(table, name)
            check(weights.shape[1] <= slots, f"A table weighs {weights.shape[1]} {name}s; there are {slots} slots.")
            own[:, start : start + slots] = 0
            own[:, start : start + weights.shape[1]] = torch.as_tensor(weights.copy())
            start += slots
    return packed


def reference(
    prediction: Tensor,
    coefficients: Tensor,
    index: Tensor,
    noises: Tensor,
    states: Tensor,
    predictions: Tensor,
    model_input: Tensor,
    nonfinite: Tensor,
) -> None:
    """The same in plain torch, in the dtype of the states."""
    batch, wide = states.shape[1], states.dtype
    halves = prediction.shape[0] // max(batch, 1)
    index = index.reshape(1).long()
    row = coefficients.index_select(0, index % coefficients.shape[0])[0].to(wide)
    guidance, input_scale, *weights = row.unsqueeze(-1).unbind(1)  # [batch, 1] each
    value = prediction[(halves - 1) * batch :].to(wide)
    if halves == 2:
        negative = prediction[:batch].to(wide)
        value = torch.where(guidance > 1, negative + guidance * (value - negative), value)
    predictions.index_copy_(0, index % predictions.shape[0], value.unsqueeze(0))
    state = torch.zeros_like(states[0])
    for history in (states, predictions, noises):
        for age in range(history.shape[0]):
            weight, values = weights.pop(0), history.index_select(0, (index - age) % history.shape[0])[0]
            state = torch.where(weight != 0, state + weight * values, state)
    states.index_copy_(0, (index + 1) % states.shape[0], state.unsqueeze(0))
    model_input.copy_((state * input_scale).repeat(halves, 1))
    nonfinite.logical_or_(~state.isfinite().all(1))


@jit
def _weighted(total, history, weights, now, plane, place, mask, FIRST: tl.constexpr, SLOTS: tl.constexpr):
    """Add the weighted slots of a ring, newest first; one without weight is not even read."""
    for age in tl.static_range(FIRST, SLOTS):
        weight = tl.broadcast_to(tl.load(weights + age), mask.shape)
        values = history + ((now + SLOTS - age) % SLOTS).to(tl.int64) * plane + place
        total += weight * tl.load(values, mask & (weight != 0), 0.0)
    return total


@jit
def _step_kernel(
    prediction,
    coefficients,
    index,
    noises,
    rows,
    batch,
    columns,
    numel,
    plane,
    states,
    predictions,
    model_input,
    nonfinite,
    HALVES: tl.constexpr,
    STATES: tl.constexpr,
    PREDICTIONS: tl.constexpr,
    NOISES: tl.constexpr,
    LEADING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = number < numel
    place = image * numel + number  # within a plane, the numbers of all images
    now = tl.load(index).to(tl.int32)  # 64 bits would be divided by a subroutine
    row = coefficients + (now % rows * batch + image) * columns
    guidance = tl.broadcast_to(tl.load(row), mask.shape)

    value = tl.load(prediction + (HALVES - 1) * plane + place, mask, 0.0).to(tl.float32)
    if HALVES == 2:
        negative = tl.load(prediction + place, mask & (guidance > 1), 0.0).to(tl.float32)
        value = tl.where(guidance > 1, negative + guidance * (value - negative), value)
    tl.store(predictions + (now % PREDICTIONS).to(tl.int64) * plane + place, value, mask)

    state = tl.zeros([BLOCK], tl.float32)
    weights = row + LEADING
    state = _weighted(state, states, weights, now, plane, place, mask, 0, STATES)
    weights += STATES
    newest = tl.broadcast_to(tl.load(weights), mask.shape)
    state += tl.where(newest != 0, newest * value, 0.0)
    state = _weighted(state, predictions, weights, now, plane, place, mask, 1, PREDICTIONS)
    weights += PREDICTIONS
    state = _weighted(state, noises, weights, now, plane, place, mask, 0, NOISES)

    tl.store(states + ((now + 1) % STATES).to(tl.int64) * plane + place, state, mask)
    scaled = (state * tl.load(row + 1)).to(model_input.dtype.element_ty)
    tl.store(model_input + place, scaled, mask)
    if HALVES == 2:
        tl.store(model_input + plane + place, scaled, mask)
    wrong = tl.max(tl.where(tl.abs(state) < float("inf"), 0, 1), 0) > 0
    tl.store(nonfinite + image, wrong, wrong)  # every program that finds something writes the same


def launch(
    prediction: Tensor,
    coefficients: Tensor,
    index: Tensor,
    noises: Tensor,
    states: Tensor,
    predictions: Tensor,
    model_input: Tensor,
    nonfinite: Tensor,
) -> None:
    """Arguments as in `step`."""
    batch, numel = states.shape[1:]
    rows, _, columns = coefficients.shape
    run(
        _step_kernel,
        (-(-numel // BLOCK), batch),
        *(prediction, coefficients, index, noises, rows, batch, columns, numel, batch * numel),
        *(states, predictions, model_input, nonfinite),
        num_warps=WARPS,
        HALVES=prediction.shape[0] // max(batch, 1),
        STATES=states.shape[0],
        PREDICTIONS=predictions.shape[0],
        NOISES=noises.shape[0],
        LEADING=LEADING,
        BLOCK=BLOCK,
    )


@triton_op("fastsd::step", mutates_args={"states", "predictions", "model_input", "nonfinite"})
def step(
    prediction: Tensor,
    coefficients: Tensor,
    index: Tensor,
    noises: Tensor,
    states: Tensor,
    predictions: Tensor,
    model_input: Tensor,
    nonfinite: Tensor,
) -> None:
    """Advance all images by the row `index` of their tables.

    History lies in rings: what belongs to row i is in slot `i % slots`. The state that row i starts from is
    `states[i % slots]`, its noise, written by the caller before, `noises[i % slots]`. The caller increments `index`
    after. All tensors are contiguous; the numbers of an image may be in any order that they share.

    Args:
        prediction: [batch, numel], or [2 * batch, numel] with the unconditional half first; any float dtype. A
            guidance scale of at most 1 means the conditional prediction alone.
        coefficients: from `pack`, float32; row i is `coefficients[i % rows]`, so longer runs can refill it.
        index: the row as one integer, int32 or int64, at least 0.
        noises: [slots, batch, numel] float32, no slots for samplers without noise.
        states: [slots, batch, numel] float32; receives the next state in slot `(index + 1) % slots`.
        predictions: [slots, batch, numel] float32; receives the combined prediction in slot `index % slots`.
        model_input: shaped as `prediction`; receives the next state, scaled for the next row.
        nonfinite: [batch] bool; becomes True for an image whose next state is not finite, else stays.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    check(
        states.ndim == 3 and states.shape[0] > 0, f"states is {list(states.shape)}; it must be [slots, batch, numel]."
    )
    slots, batch, numel = states.shape
    for name, ring in (("predictions", predictions), ("noises", noises)):
        fits = ring.ndim == 3 and list(ring.shape[1:]) == [batch, numel]
        check(fits, f"{name} is {list(ring.shape)}; it must be [slots, {batch}, {numel}].")
    check(predictions.shape[0] > 0, "predictions has no slots; it must have at least 1.")
    columns = LEADING + slots + predictions.shape[0] + noises.shape[0]
    fits = coefficients.ndim == 3 and list(coefficients.shape[1:]) == [batch, columns] and coefficients.shape[0] > 0
    check(fits, f"coefficients is {list(coefficients.shape)}; it must be [rows, {batch}, {columns}].")
    fits = prediction.ndim == 2 and prediction.shape[0] in (batch, 2 * batch) and prediction.shape[1] == numel
    check(fits, f"prediction is {list(prediction.shape)}; it must be [{batch} or {2 * batch}, {numel}].")
    right = list(prediction.shape)
    check(list(model_input.shape) == right, f"model_input is {list(model_input.shape)}; it must be {right}.")
    check(list(nonfinite.shape) == [batch], f"nonfinite is {list(nonfinite.shape)}; it must be [{batch}].")
    check(index.numel() == 1, f"index is {list(index.shape)}; it must be one number.")
    float32, whole = (torch.float32,), (torch.int32, torch.int64)
    for name, tensor, dtypes in (
        ("states", states, float32),
        ("coefficients", coefficients, float32),
        ("predictions", predictions, float32),
        ("noises", noises, float32),
        ("index", index, whole),
        ("nonfinite", nonfinite, (torch.bool,)),
        ("prediction", prediction, FLOATS),
        ("model_input", model_input, FLOATS),
    ):
        listed = " or ".join(map(str, dtypes))
        check(tensor.dtype in dtypes, f"{name} is {tensor.dtype}; it must be {listed}.")
        check(tensor.is_contiguous(), f"{name} has strides {tensor.stride()}; it must be contiguous.")
        check(tensor.device == states.device, f"{name} is on {tensor.device}; it must be on {states.device}.")
    function = launch if use_kernel(states) else reference
    function(prediction, coefficients, index, noises, states, predictions, model_input, nonfinite)


def _variant(name: str, halves: int, slots: tuple[int, int, int], dtype: torch.dtype) -> Variant:
    kind, known = TYPES[dtype], "i32:16"
    signature = {
        **dict.fromkeys(("prediction", "model_input"), f"*{kind}"),
        **dict.fromkeys(("coefficients", "noises", "states", "predictions"), "*fp32"),
        **{"index": "*i64", "nonfinite": "*i1", "rows": known, "batch": "i32", "columns": "i32"},
        **{"numel": known, "plane": known},
    }
    constexprs = {"HALVES": halves, **dict(zip(("STATES", "PREDICTIONS", "NOISES"), slots, strict=True))}
    constexprs |= {"LEADING": LEADING, "BLOCK": BLOCK}
    return Variant(f"{name}-{kind}", _step_kernel, signature, constexprs, num_warps=WARPS)


# Slots as in a captured step: the longest history that diffusers has, so that one graph serves every sampler.
VARIANTS = tuple(
    _variant(name, halves, (4, 4, 4), dtype)
    for name, halves in (("plain", 1), ("guided", 2))
    for dtype in (torch.bfloat16, torch.float16)
)
