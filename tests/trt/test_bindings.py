"""What we call, and what the fake offers, against the real Python bindings of both libraries.

The bindings are read where they are installed; nothing of theirs is kept here.
"""

from __future__ import annotations

import ast
import configparser
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trt import fake
from trt.conftest import BINDINGS
from trt.surface import Class, Surface

import fastsd.backends.tensorrt as runtime
import fastsd_export.tensorrt as export
from fastsd.backends.tensorrt import Log

SOURCES = [Path(str(module.__file__)) for module in (runtime, export)]
RTX_ONLY = {"ComputeCapability", "CudaGraphStrategy"}  # names that only the code for RTX reaches
TARGETS = list(BINDINGS)


def test_versions(surfaces: dict[str, Surface]) -> None:
    """The fake and the README speak of these; a new version is looked at first."""
    assert {target: surface["version"] for target, surface in surfaces.items()} == {
        target: fake.module(target).__version__ for target in TARGETS
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_names_exist(surfaces: dict[str, Surface], source: Path, target: str) -> None:
    surface = surfaces[target]
    chains = {chain for node in ast.walk(ast.parse(source.read_text())) if (chain := _chain(node))}
    assert len(chains) > 5
    for chain in chains:
        first, _, rest = chain.partition(".")
        if first in RTX_ONLY and target == "tensorrt":
            assert first not in surface["classes"]
            continue
        known = first in surface["functions"] or first in surface["classes"] or first == "__version__"
        assert known, f"trt.{chain}"
        if rest:
            nested, _, member = rest.rpartition(".")
            cls = surface["classes"][f"{first}.{nested}" if nested else first]
            assert member in cls["members"] or member in cls["methods"], f"trt.{chain}"


def _chain(node: ast.AST) -> str:
    """`A.B` of the expression `trt.A.B`."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "trt" else ""


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_calls_fit_a_signature(surfaces: dict[str, Surface], source: Path) -> None:
    """Of each method that a class of theirs has by that name; which class it is, `test_types` knows."""
    overloads: dict[str, list[list[str]]] = {}
    for surface in surfaces.values():
        for name, cls in surface["classes"].items():
            for method, found in cls["methods"].items():
                overloads.setdefault(name if method == "__init__" else method, []).extend(found)
    python = {name for cls in (dict, list, str, Log) for name in dir(cls)}
    checked = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, of = node.func.attr, ast.unparse(node.func.value)
            if overloads.get(name) and name not in python and of not in ("self", "store", "base"):
                keywords = {keyword.arg for keyword in node.keywords}
                fits = any(_fits(names, len(node.args), keywords) for names in overloads[name])
                assert fits, f"{source.name}:{node.lineno}: {ast.unparse(node)}"
                checked.add(name)
    assert len(checked) > 10


def _fits(parameters: list[str], positional: int, keywords: set[str | None]) -> bool:
    names = [name.rstrip("=") for name in parameters]
    given = {*names[:positional], *keywords}
    needed = {name for name in parameters if not name.endswith("=")}
    return positional <= len(names) and needed <= given <= set(names)


def test_tables(surfaces: dict[str, Surface]) -> None:
    """Names that are looked up by string."""
    for surface in surfaces.values():
        classes = surface["classes"]
        flags = {
            "TF32",
            "WEIGHT_STREAMING",
            "VERSION_COMPATIBLE",
            *(name for names in export.REFIT.values() for name in names),
        }
        assert flags <= classes["BuilderFlag"]["members"].keys()
        assert set(export.HARDWARE.values()) == classes["HardwareCompatibilityLevel"]["members"].keys()
        assert runtime.DTYPES.keys() <= classes["DataType"]["members"].keys()
    for name in runtime.DTYPES.values():
        assert isinstance(getattr(torch, name), torch.dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_the_fake_is_a_part_of_the_real_thing(surfaces: dict[str, Surface], target: str) -> None:
    classes = surfaces[target]["classes"]
    offered = {name: value for name, value in vars(fake.module(target)).items() if isinstance(value, type)}
    assert len(offered) > 30
    for name, cls in offered.items():
        assert name in classes, name
        if hasattr(cls, "__members__"):
            members = {member.name: int(member) for member in cls}  # type: ignore[attr-defined]
            assert members.items() <= classes[name]["members"].items(), name
            continue
        for where, value in _public(cls):
            _compare(f"{name}.{where}", where, value, classes[name])
    severity = {member.name: int(member) for member in fake.ILogger.Severity}
    assert severity == classes["ILogger.Severity"]["members"]
    assert surfaces[target]["functions"]["get_nv_onnx_parser_version"] == [[]]
    # The trick by which the layer becomes one with an attention.
    assert "ILayer" in classes["IAttentionInputLayer"]["bases"]
    assert "attention" not in classes["ILayer"]["properties"]


def _public(cls: type) -> Iterator[tuple[str, Any]]:
    """What a class of the fake adds to `object`, `tuple` and `bytes`."""
    for base in cls.__mro__:
        if base.__module__ in (fake.__name__, "rtx"):
            yield from ((name, value) for name, value in vars(base).items() if not name.startswith("_"))
            constructor = vars(base).get("__init__")
            if constructor is not None and base is cls:
                yield "__init__", constructor


# Made by the library, never by us: their constructors are the fake's own affair.
MADE_BY_THE_LIBRARY = (
    *("ITensor", "ILayer", "IAttentionInputLayer", "INetworkDefinition", "ParserError", "IOptimizationProfile"),
    *("ITimingCache", "IBuilderConfig", "ICudaEngine", "ISerializationConfig", "IRuntimeConfig"),
    *("IExecutionContext", "IRuntimeCache"),
)


def _compare(where: str, name: str, value: Any, real: Class) -> None:
    if name == "__init__":
        if where.partition(".")[0] in MADE_BY_THE_LIBRARY:
            assert real["methods"]["__init__"] == [], where
            return
    elif isinstance(value, property):
        assert name in real["properties"], where
        assert real["properties"][name] or value.fset is None, where
        return
    elif not callable(value):  # an attribute, which can be set
        assert real["properties"].get(name), where
        return
    elif isinstance(value, type):
        return
    assert name in real["methods"], where
    parameters = list(inspect.signature(value).parameters)[1:]
    overloads = [[one.rstrip("=") for one in names] for names in real["methods"][name]]
    assert parameters in overloads, f"{where}{tuple(parameters)} is none of {overloads}"


def test_the_seam_to_torch() -> None:
    """What the CPU plays in the tests has the signatures that torch has."""
    stream = object()
    inspect.signature(torch.cuda.graph).bind(object(), stream=stream, capture_error_mode="thread_local")
    inspect.signature(torch.cuda.Stream.wait_stream).bind(object(), stream)
    for name in ("get_device_name", "mem_get_info", "current_stream", "device", "stream", "Stream"):
        assert callable(getattr(torch.cuda, name))
    assert isinstance(inspect.getattr_static(torch.cuda.Stream, "synchronize"), object)
    assert torch.cuda.CUDAGraph


# Calls that `test_types` must find wrong, or it finds nothing.
WRONG = """
import LIBRARY

def wrong(config: LIBRARY.IBuilderConfig, context: LIBRARY.IExecutionContext) -> None:
    config.set_flag(LIBRARY.BuilderFlag.FP16)
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatches=True)
    context.execute_async(0)
    context.set_tensor_address("latents")
"""


STUB_REPAIRS = {
    # Parameters called `in`, and one that has no default behind some that have, are not Python.
    r"\bin: ": "in_: ",
    r"(channel_axis: typing\.SupportsInt)\)": r"\1 = ...)",
    # What Python sees and pybind11-stubgen does not: a sequence can be iterated over, a buffer be viewed.
    r"(class Dims:\n)": r"\1    def __iter__(self) -> typing.Iterator[int]: ...\n",
    r"(class IHostMemory:\n)": r"\1    def __buffer__(self, flags: int, /) -> memoryview: ...\n",
}
# The layer's class is changed just before; mypy does not follow that.
EXPECTED = '"ILayer" has no attribute "attention"'


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_types(run_python: Callable[..., str], tmp_path: Path, target: str) -> None:
    """mypy over our two files and the stubs that pybind11-stubgen writes of the bindings."""
    module = BINDINGS[target]
    stubs = tmp_path / "stubs"
    run_python("-m", "pybind11_stubgen", module, "--ignore-all-errors", "-o", stubs)
    for stub in (stubs / module).glob("*.pyi"):
        text = stub.read_text()
        for wrong, right in STUB_REPAIRS.items():
            text = re.sub(wrong, right, text)
        stub.write_text(text)
    for source in SOURCES:
        # `trt` is a parameter there, as two libraries come in question.
        text = re.sub(r"\btrt\.", f"{module}.", source.read_text()).replace(
            "    import tensorrt as trt", f"    import {module}"
        )
        text = re.sub(r"  # type: ignore\[misc, name-defined\]", "", text)
        (tmp_path / f"checked_{source.parent.name}.py").write_text(text)
    (tmp_path / "wrong.py").write_text(WRONG.replace("LIBRARY", module))
    configuration = configparser.ConfigParser()
    roots = [Path(str(module.__file__)).parents[2 - (module is export)] for module in (runtime, export)]
    configuration["mypy"] = {
        "strict": "True",
        "mypy_path": ":".join(map(str, [stubs, *roots])),
        "explicit_package_bases": "True",
        "follow_imports": "silent",
        "ignore_missing_imports": "True",
        "untyped_calls_exclude": "torch",
    }
    configuration[f"mypy-{module}.*"] = {"ignore_errors": "True"}  # `trt.bool` hides the builtin
    with open(tmp_path / "mypy.ini", "w") as file:
        configuration.write(file)
    mypy = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-incremental", "."]
    done = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line and "stubs/" not in line]
    wrong = [line for line in errors if line.startswith("wrong.py")]
    assert len(wrong) == 4, done.stdout
    rest = [line for line in errors if line not in wrong and not _of_rtx(line, target)]
    assert len(rest) == 1 and EXPECTED in rest[0], "\n".join(rest)


def _of_rtx(line: str, target: str) -> bool:
    """Whether an error is about what only TensorRT for RTX has."""
    names = RTX_ONLY | {"cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"}
    names |= {"num_compute_capabilities", "set_compute_capability"}
    return target == "tensorrt" and any(f'"{name}"' in line for name in names)
