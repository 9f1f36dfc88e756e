"""What all ops share: Triton where it is installed, how a kernel is called, and what a compiled variant is.

This is the only place that knows whether Triton is there. Without it (CPU wheels of torch) kernels stay plain
functions that nothing calls, and every op runs its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

try:
    import triton  # type: ignore[import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
except ImportError:
    triton = tl = None

__all__ = [
    "ARCHES",
    "FLOATS",
    "INTERPRETED",
    "TYPES",
    "Variant",
    "check",
    "jit",
    "known",
    "next_power_of_2",
    "run",
    "tl",
    "triton",
    "use_kernel",
]

# TRITON_INTERPRET=1, read once since `jit` decides by it: kernels run on CPU tensors, for tests.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

ARCHES = (80, 89, 90)  # A100, Ada, Hopper

TYPES = {  # Triton's names
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # of tensors; kernels compute in float32


class Variant(NamedTuple):
    """One compiled form of a kernel as `launch` calls it, for checks without a GPU (`fastsd_kernels.aot`).

    Attributes:
        name: unique within the file for an architecture; the shape class and the dtype.
        kernel: the `@jit` function.
        signature: type of every argument that is no constexpr, in any order: "*bf16" (a pointer, aligned to 16
            bytes), "fp32", "i32", "i32:16" (known to be divisible by 16), "i32:1" (known to be 1), "tensordesc<...>".
        constexprs: the other arguments.
        num_warps: of a program.
        num_stages: of its pipelined loops.
        arches: compute capabilities it is meant for, times ten.
        mma: must use the tensor cores.
        max_stack: bytes of local memory that a thread may use; what does not fit in registers is spilled there.
        wide: must load 16 bytes a thread at a time.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    arches: tuple[int, ...] = ARCHES
    mma: bool = False
    max_stack: int = 0
    wide: bool = True


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is."""
    return kernel if triton is None else triton.jit(kernel)


def use_kernel(x: Tensor) -> bool:
    """Whether an op runs its kernel on this tensor (real or fake) and not its reference.

    Raises:
        ValueError: there is a kernel for the device, but not for the dtype.
    """
    if x.device.type != "cuda":
        return False
    check(x.dtype in FLOATS, f"x is {x.dtype}; on a GPU it must be bfloat16, float16 or float32.")
    return True


def run(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 1, **constexprs: Any
) -> None:
    """Launch a kernel, visibly to `torch.compile`; nothing for an empty grid."""
    if 0 in grid:
        return
    if not INTERPRETED:
        kernel = wrap_triton(kernel)
    kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constexprs)


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; one on symbols of a trace only where it holds for all of their values.

    So what depends on it is right for every size, and the trace is not tied to the sizes that it was made with.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def check(condition: bool, message: str) -> None:
    """Refuse arguments.

    Raises:
        ValueError: the condition is false.
    """
    if not condition:
        raise ValueError(message)


def next_power_of_2(n: int) -> int:
    """The least power of two of at least `n`, 1 for 0; to a compiler, `n` becomes a constant."""
    return 1 << max(int(n) - 1, 0).bit_length()
