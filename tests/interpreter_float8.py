"""Float8 in Triton's interpreter as a GPU has it.

Its own conversion to float8 drops the carry of a rounding and loses NaN, and the one from float8 takes NaN for 480.
What replaces both is torch's, which rounds halves to even, after saturation, as `cvt.rn.satfinite.e4m3x2.f32` does.
Nothing of a kernel is replaced. Still different from a GPU: products of float8 are summed in float32 here, where
Hopper's tensor cores keep some 13 bits of fraction below the largest summand of a step.
"""

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """For this process, in which kernels are interpreted."""
    import triton.language as tl
    from triton.runtime import interpreter

    others = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        most = torch.finfo(torch.float8_e4m3fn).max
        if (source, target) == (tl.float32, tl.float8e4nv):
            values = torch.from_numpy(np.ascontiguousarray(data)).clamp(-most, most)
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(data.shape)
        if source == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn)
            return values.to({tl.float16: torch.float16, tl.float32: torch.float32}[target]).numpy().reshape(data.shape)
        return others(data, source, target, rounding)

    interpreter._convert_float = convert
