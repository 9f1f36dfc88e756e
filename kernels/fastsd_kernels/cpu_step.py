"""One step of a sampler on a CPU in one pass, in C++ (`cpu_step.cpp`): guidance, weighted sum, the model's next input.

At the sizes of latents a torch operation costs more to call than to run, and a step has about ten of them. The sums are
element by element in the order of `fastsd.sampling.loop`, each product rounded, so that the bits are those of its numpy
loop, wherever an image stands and on however many threads.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastsd_kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp-simd", "-shared", "-fPIC")
THREADED = () if sys.platform == "darwin" else ("-fopenmp",)  # Apple's compiler has none
KINDS = {torch.float32: {torch.float32: 0, torch.bfloat16: 1}, torch.float64: {torch.float64: 2}}  # state, prediction

Step = Callable[..., None]


def build(folder: Path) -> Path:
    """Compile the kernel into a folder, unless it is there; see `native.build`."""
    return native.build(SOURCE, (*FLAGS, *THREADED), folder)


def load(path: Path) -> Step:
    """The function of a file that `build` made on such a machine.

    Its arguments: address of the predictions [halves * batch, size]; the kind of both dtypes (`KINDS`); addresses
    [slots, images] of the rows of all histories; the plan, int64: number of terms, slot of the next state, slot of the
    newest prediction, slots of the terms; weights, float64: guidance scale, scale of the next input, those of the
    terms; number of images; numbers in an image; row of the first image in the negative half of the predictions (-1
    without guidance) and in the positive half; address of the group's first row in the next input (None: there is
    none), and how many rows later its second half begins (-1: there is none); threads.

    Without guidance, predictions of the state's dtype are not copied: their own address is in the slot.
    """
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function: Any = ctypes.CDLL(str(path)).step
    function.argtypes = [pointer, number, pointer, pointer, pointer, *(number,) * 4, pointer, number, number]
    function.restype = None
    step: Step = function
    return step
