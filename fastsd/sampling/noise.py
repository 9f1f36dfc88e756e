"""Standard normal noise without torch, in the numbers of torch's CPU generator: a seed is the same image."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import InputError

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1

TWO_PI = np.float32(2 * math.pi)


class NoiseStream:
    """A stream of standard normal numbers, those of `torch.Generator("cpu").manual_seed(seed)` in float32.

    Successive draws continue the stream as successive `torch.randn` calls with one generator do. Equal to
    torch within 1e-6: torch's vectorised logarithm and sine differ from numpy's in the last bits. Like torch,
    it uses the low 32 bits of the seed. Source: `normal_fill` in `ATen/native/cpu/DistributionTemplates.h`,
    `normal_distribution` in `ATen/core/DistributionsHelper.h`.

    Raises:
        InputError: the seed is no whole number from 0 to 2**63 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)
        self._spare: float | None = None  # the second value of the last pair below 16 values

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next `prod(shape)` numbers, float32."""
        size = math.prod(shape)
        if size < 16:
            return np.array([self._one() for _ in range(size)], dtype=np.float32).reshape(shape)
        values = self._uniform(size)
        blocks = values[: size // 16 * 16].reshape(-1, 2, 8)
        _box_muller(blocks)
        if size % 16:
            tail = self._uniform(16).reshape(1, 2, 8)
            _box_muller(tail)
            values[-16:] = tail.reshape(16)
        return values.reshape(shape)

    def _uniform(self, size: int) -> NDArray[np.float32]:
        """`size` numbers of 24 bits in [0, 1)."""
        words = self._bits.randint(0, 2**32, size=size, dtype=np.uint32)
        words &= np.uint32(0xFFFFFF)
        return words.astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high, low, high2, low2 = (int(word) for word in self._bits.randint(0, 2**32, size=4, dtype=np.uint32))
        angle = 2 * math.pi * (((high << 32 | low) & (2**53 - 1)) * 2.0**-53)
        radius = math.sqrt(-2 * math.log1p(-((high2 << 32 | low2) & (2**53 - 1)) * 2.0**-53))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(blocks: NDArray[np.float32]) -> None:
    """In place on [blocks, 2, 8] uniforms: 8 radii and 8 angles make 16 normal values."""
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = TWO_PI * blocks[:, 1]
    np.multiply(radius, np.cos(angle), out=blocks[:, 0])
    np.multiply(radius, np.sin(angle), out=blocks[:, 1])


def check_seed(seed: Any) -> int:
    """The seed as an int.

    Raises:
        InputError: it is no whole number from 0 to 2**63 - 1.
    """
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if isinstance(seed, bool) or not 0 <= value <= MAX_SEED:
        raise InputError(f"the seed must be a whole number from 0 to 2**63 - 1, not {seed!r}")
    return value


def noise_source(generator: int | torch.Generator) -> Callable[[tuple[int, ...]], Any]:
    """A callable that draws standard normal float32 noise of a given shape.

    Args:
        generator: a seed (numpy arrays come out, and torch is not imported), or a caller's `torch.Generator`
            (tensors on its own device come out, and its state moves on as in `diffusers`).

    Raises:
        InputError: it is neither.
    """
    if isinstance(generator, int | np.integer) or not hasattr(generator, "manual_seed"):
        return NoiseStream(check_seed(generator)).normal
    import torch

    return partial(torch.randn, generator=generator, device=generator.device, dtype=torch.float32)
