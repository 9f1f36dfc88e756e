"""TensorRT without TensorRT: stand-ins for its libraries, its Python surface as JSON, and a CPU that plays the GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trt import fake
from trt.surface import Surface

from fastsd.backends import tensorrt

# All that the bindings take from the three libraries; they import over functions that do nothing.
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
BINDINGS = {"tensorrt": "tensorrt_bindings", "tensorrt-rtx": "tensorrt_rtx_bindings"}


@pytest.fixture(scope="session")
def stub_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libraries of the names that the bindings look for."""
    folder = tmp_path_factory.mktemp("stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}() {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
        compiler = shutil.which("cc") or "gcc"
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)
    return folder


@pytest.fixture(scope="session")
def run_python(stub_libraries: Path) -> Callable[..., str]:
    """Run Python where the bindings import; gives what it printed."""

    def run(*arguments: str | Path) -> str:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(stub_libraries)}
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def surfaces(run_python: Callable[..., str]) -> dict[str, Surface]:
    """What the real bindings offer, by target."""
    for module in BINDINGS.values():
        assert importlib.util.find_spec(module), f"{module} is not installed: pip install 'fastsd[test]'"
    script = Path(__file__).with_name("surface.py")
    return {target: json.loads(run_python(script, module)) for target, module in BINDINGS.items()}


class Stream:
    """In the place of `torch.cuda.Stream`; work is done at once, so only the order of the waits is of interest."""

    def __init__(self, device: Any = None, *, name: str = "ours", cuda_stream: int = 0xABC0) -> None:
        self.name, self.cuda_stream = name, cuda_stream

    def wait_stream(self, stream: Any) -> None:
        fake.calls.append(f"{self.name} waits for {stream.name}")

    def synchronize(self) -> None:
        fake.calls.append(f"{self.name} is waited for")


class GPU:
    """What the tests may change about it."""

    free = 10 * 2**30  # bytes
    name = "NVIDIA H200"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[GPU]:
    """The fakes installed, and `torch.cuda` answered for by the CPU: `load` takes the device "cpu"."""
    made = GPU()
    for target in BINDINGS:
        monkeypatch.setitem(sys.modules, target.replace("-", "_"), fake.module(target))
    caller = Stream(name="caller", cuda_stream=0)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_name": lambda device=None: made.name,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (made.free, 141 * 2**30),
        "device": lambda device: contextlib.nullcontext(),
        "Stream": Stream,
        "current_stream": lambda device=None: caller,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": fake.Graph,
        "graph": fake.graph,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(tensorrt, "available", lambda device, target: None)
    fake.faults.clear()
    fake.calls.clear()
    yield made
    fake.faults.clear()
    assert not fake.capturing
