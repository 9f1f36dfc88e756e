"""The machine key: what is read of the system, of CUDA's driver, and what is said where there is none."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal

from fastsd import machine


@pytest.fixture(autouse=True)
def forgotten() -> None:
    for function in (machine._cpu, machine._gpu, machine._cuda):
        function.cache_clear()


X86 = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu sse2 avx2 fma avx512f avx512bw amx_tile amx_bf16 amx_int8 avx512_bf16 rdtscp

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimdhp asimddp sve bf16 i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1
"""


@pytest.mark.parametrize(
    ("text", "cpu", "isa"),
    [
        (
            X86,
            "Intel(R) Xeon(R) Platinum 8488C",
            "avx2 fma avx512f avx512bw avx512_bf16 amx_tile amx_bf16 amx_int8",
        ),
        (ARM, "0x41 0xd40 0x1 1", "asimd asimdhp asimddp bf16 i8mm sve"),
        ("", "arm64", ""),
        (None, "arm64", ""),
    ],
    ids=["x86", "arm", "nothing told", "no /proc"],
)
def test_the_cpu(text: str | None, cpu: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    for name, value in {"processor": "", "machine": "arm64", "system": "Darwin"}.items():
        monkeypatch.setattr(f"platform.{name}", lambda value=value: value)
    assert machine.describe("cpu") == {
        "device": "cpu",
        "os": "Darwin",
        "arch": "arm64",
        "cpu": cpu,
        "isa": sorted(isa.split(), key=machine._ISA.index),
    }


def test_this_cpu_is_what_torch_sees() -> None:
    import torch

    seen = torch.cpu.get_capabilities()
    told = machine.describe("cpu")
    renamed = {
        "avx512f": "avx512_f",
        "avx512bw": "avx512_bw",
        "avx512dq": "avx512_dq",
        "avx512vl": "avx512_vl",
        "fma": "fma3",
    }
    known = {name: seen[renamed.get(name, name)] for name in machine._ISA if renamed.get(name, name) in seen}
    assert {name: name in told["isa"] for name in known} == known
    assert len(known) >= 10 or told["arch"] != "x86_64"


def test_what_is_changed_by_a_caller_stays_his() -> None:
    before = json.dumps(machine.describe("cpu"))
    machine.describe("cpu")["isa"].append("x")
    machine.describe("cpu")["os"] = "x"
    assert json.dumps(machine.describe("cpu")) == before
    assert machine.all_of("cpu") == [machine.describe("cpu")]


class Driver:
    """CUDA's driver library with two GPUs, as ctypes sees it: results through pointers, codes returned."""

    gpus = (("NVIDIA H200", 9, 0), ("NVIDIA L4", 8, 9))

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: 999 if self.fails == name else getattr(self, f"_{name}")(*arguments)

    def _cuInit(self, flags: int) -> int:
        return 0

    def _cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def _cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index
        return 0

    def _cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:
        name.value = self.gpus[handle.value][0].encode()[: size - 1]
        return 0

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        value._obj.value = self.gpus[handle.value][attribute - 74]
        return 0

    def _cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "version").write_text("580.65.06\n")
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    return tmp_path / "version"


def test_the_gpu(driver: Path) -> None:
    facts = machine.describe("cuda")
    assert facts == machine.describe("cuda:0")
    assert {**facts, "os": "", "arch": ""} == {
        "device": "cuda",
        "os": "",
        "arch": "",
        "gpu": "NVIDIA H200",
        "compute_capability": "9.0",
        "driver": 580,
        "cuda": 13,
    }
    assert machine.all_of("cuda") == [facts, machine.describe("cuda:1")]
    assert machine.describe("cuda:1")["gpu"] == "NVIDIA L4"
    assert "CUDA shows 2 GPUs" in refusal(lambda: machine.describe("cuda:2"))


def test_the_driver_by_nvidia_smi(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "cannot be found" in refusal(lambda: machine.describe("cuda"))
    command = tmp_path / "nvidia-smi"
    for text, answer in (("echo 575.1.2; echo 575.1.2", 575), ("echo N/A", None), ("exit 9", None)):
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
        machine._gpu.cache_clear()
        if answer is None:
            assert "cannot be found" in refusal(lambda: machine.describe("cuda"))
        else:
            assert machine.describe("cuda")["driver"] == answer


FUNCTIONS = [
    "cuInit",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDriverGetVersion",
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_driver_that_fails(name: str, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(fails=name))
    assert "error 999 of CUDA" in refusal(lambda: machine.describe("cuda"))


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "there is no CUDA GPU here" in refusal(lambda: machine.describe("cuda"))
    assert "there is no CUDA GPU here" in refusal(lambda: machine.all_of("cuda"))


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0", "cuda:99999", "cuda:1\n"], ids=repr
)
def test_what_is_no_device(device: str) -> None:
    assert f"the device {device!r} is unknown" in refusal(lambda: machine.describe(device))


def test_nothing_but_the_standard_library_is_loaded() -> None:
    code = (
        "import sys; before = set(sys.modules); import fastsd.machine, fastsd.store; fastsd.machine.describe('cpu')\n"
    )
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["fastsd"]
