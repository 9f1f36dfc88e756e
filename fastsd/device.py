"""Which device and dtype "auto" means on this machine."""

from __future__ import annotations

import torch

from fastsd.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: it is no device, or not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"the device {device!r} is unknown: use 'auto', 'cpu', 'cuda' or 'cuda:1'") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"the device {str(picked)!r} is not to be had: torch {torch.__version__} sees no CUDA GPU")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise InputError(f"the device {str(picked)!r} does not exist: there are {torch.cuda.device_count()} GPUs")
    if picked.type not in ("cpu", "cuda"):
        raise InputError(f"the device {str(picked)!r} is not supported: use 'cpu' or 'cuda'")
    return picked


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations.

    "auto" is bfloat16 on a CPU that computes in it (AVX512-BF16 or AMX) and on a GPU from Ampere on, float16 on an
    older GPU, else float32.

    Raises:
        InputError: it is none of "auto", "float32", "float16", "bfloat16" and their torch dtypes.
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype in DTYPES.values() and isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        raise InputError(f"the dtype {str(dtype)!r} is unknown: use 'auto', {', '.join(map(repr, DTYPES))}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
