"""The machine: what an engine that was built for it depends on, found without torch."""

from __future__ import annotations

import copy
import ctypes
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from fastsd.errors import InputError

# Instruction sets by which the libraries choose their kernels, as Linux calls them on x86 and on ARM.
_ISA = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "svei8mm", "sme", "sme2"),
)
_CPUINFO = Path("/proc/cpuinfo")
_DRIVER = Path("/sys/module/nvidia/version")


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine key: what must be the same for an engine to run, and to run as well.

    Args:
        device: "cpu", "cuda" (the first GPU that CUDA shows) or "cuda:1".

    Returns:
        device ("cpu" or "cuda"), os and arch; for the CPU: cpu (its model) and isa (a list); for CUDA: gpu (its name),
        compute_capability ("9.0"), driver and cuda (major numbers of the driver and of the CUDA that it brings).

    Raises:
        InputError: the device is unknown, or there is none.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device)
    if match is None:
        raise InputError(f"the device {device!r} is unknown: use 'cpu', 'cuda' or 'cuda:1'")
    return copy.deepcopy(_cpu() if device == "cpu" else _gpu(int(match[1] or 0)))


def all_of(device: str) -> list[dict[str, Any]]:
    """The machine keys of all devices of a kind, "cpu" or "cuda"."""
    return [describe("cpu")] if device == "cpu" else [describe(f"cuda:{index}") for index in range(_count(_cuda()))]


def _system() -> dict[str, Any]:
    return {"os": platform.system(), "arch": platform.machine()}


@cache
def _cpu() -> dict[str, Any]:
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        text = ""
    first = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in first.items()}
    parts = [known.get(name, "") for name in ("CPU implementer", "CPU part", "CPU variant", "CPU revision")]
    model = known.get("model name") or " ".join(filter(None, parts)) or platform.processor() or platform.machine()
    flags = set((known.get("flags") or known.get("Features") or "").split())
    return {"device": "cpu", **_system(), "cpu": model, "isa": [name for name in _ISA if name in flags]}


@cache
def _gpu(index: int) -> dict[str, Any]:
    cuda = _cuda()
    count = _count(cuda)
    if index >= count:
        raise InputError(f"the device 'cuda:{index}' does not exist: CUDA shows {count} GPUs (CUDA_VISIBLE_DEVICES?)")
    name, version, gpu = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    _check(cuda.cuDeviceGet(ctypes.byref(gpu), index))
    _check(cuda.cuDeviceGetName(name, len(name), gpu))
    _check(cuda.cuDriverGetVersion(ctypes.byref(version)))
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        _check(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, gpu))
        capability.append(value.value)
    return {
        "device": "cuda",
        **_system(),
        "gpu": name.value.decode(errors="replace"),
        "compute_capability": f"{capability[0]}.{capability[1]}",
        "driver": int(_driver().partition(".")[0]),
        "cuda": version.value // 1000,
    }


@cache
def _cuda() -> Any:
    """CUDA's driver library, initialised.

    It comes with the driver, needs no package, counts the GPUs as every other library in the process does
    (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER), which NVML and nvidia-smi do not, and no context is made on the GPU.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        raise InputError(
            f"there is no CUDA GPU here ({name} of NVIDIA's driver is missing): use the device 'cpu'"
        ) from None
    _check(cuda.cuInit(0))
    return cuda


def _count(cuda: Any) -> int:
    count = ctypes.c_int()
    _check(cuda.cuDeviceGetCount(ctypes.byref(count)))
    return count.value


def _check(code: int) -> None:
    if code != 0:
        raise InputError(f"NVIDIA's driver answers with error {code} of CUDA: see nvidia-smi, or use the device 'cpu'")


def _driver() -> str:
    """The driver's version, such as "580.65.06"."""
    try:
        return _DRIVER.read_text().strip()
    except OSError:  # not Linux itself, but Windows or Linux under it
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        shown = []
    if not shown or not shown[0].partition(".")[0].isdigit():
        raise InputError(
            "the version of NVIDIA's driver cannot be found: make nvidia-smi work, or use the device 'cpu'"
        )
    return shown[0]
