"""The few operations that the straight line needs of arrays, numpy's or torch's alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor


def is_array(value: object) -> bool:
    """Whether it is a numpy array or a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def is_floating(array: Array) -> bool:
    """Whether its elements are real numbers of floating point."""
    return bool(array.dtype.kind == "f" if isinstance(array, np.ndarray) else array.is_floating_point())


def all_finite(array: Array) -> bool:
    """Whether it holds neither NaN nor Inf."""
    return bool(_library(array).isfinite(array).all())


def concatenate(parts: Sequence[Array], axis: int = 0) -> Array:
    """`parts` one after the other."""
    first = parts[0]
    return np.concatenate(parts, axis) if isinstance(first, np.ndarray) else _library(first).cat(list(parts), axis)


def stack(parts: Sequence[Array]) -> Array:
    """`parts` along a new first axis."""
    return _library(parts[0]).stack(list(parts))


def zeros(shape: Sequence[int], like: Array) -> Array:
    """Zeros in the dtype, and on the device, of `like`."""
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """The same numbers for numpy; bfloat16, which it lacks, as float32."""
    if isinstance(array, np.ndarray):
        return array
    cpu = array.detach().cpu()
    numbers: np.ndarray[Any, Any] = (cpu.float() if str(cpu.dtype) == "torch.bfloat16" else cpu).numpy()
    return numbers


def _library(array: Array) -> Any:
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]
