"""The shape of the project: which way imports run, what importing costs, what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastsd

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "fastsd_kernels": ROOT / "kernels" / "fastsd_kernels",
    "fastsd": ROOT / "fastsd",
    "fastsd_export": ROOT / "export" / "fastsd_export",
    "fastsd_benchmarks": ROOT / "benchmarks" / "fastsd_benchmarks",
}
ORDER = list(PACKAGES)  # a package imports only itself and those before it
HEAVY = {"torch", "diffusers", "transformers", "scipy", "peft", "matplotlib"}


def imported(file: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    later = set(ORDER[ORDER.index(package) + 1 :])
    wrong = {str(file.relative_to(ROOT)): sorted(imported(file) & later) for file in files if imported(file) & later}
    assert not wrong


@pytest.mark.parametrize("folder", ["kernels", "export", "benchmarks"])
def test_no_module_lies_where_it_would_shadow_another_package(folder: str) -> None:
    assert not list((ROOT / folder).glob("*.py"))


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import fastsd",
        "import fastsd.cli",
        "import fastsd.cli.generate",
        "import fastsd.cli.models",
        "import fastsd.sampling.loop",
        "import fastsd.tokenizer",
        "import fastsd.random_weights, fastsd.lora, fastsd.text",
        "import fastsd.pipeline, fastsd.bundle, fastsd.store, fastsd.machine",
        "import fastsd.backends.onnx, fastsd.backends.openvino, fastsd.backends.tensorrt, fastsd.backends.aoti",
        "import fastsd.explain, fastsd.cli.doctor, fastsd.integrity, fastsd.protobuf",
        "import fastsd_export.export, fastsd_export.engines, fastsd_export.triton_repo",
        "import fastsd.families.sd, fastsd.families.sdxl, fastsd.families.sd3, fastsd.families.flux",
        "fastsd_kernels",
    ],
)
def test_import_is_light(statement: str) -> None:
    loaded = modules_after(statement if " " in statement else f"import {statement}")
    assert not loaded & HEAVY


def test_import_fastsd_loads_nothing_that_numpy_and_pillow_do_not() -> None:
    extra = modules_after("import fastsd") - modules_after("import numpy, PIL") - {"fastsd", "typing"}
    assert not {name for name in extra if not name.startswith("_") and name not in sys.stdlib_module_names}


def test_all_is_what_is_importable() -> None:
    assert list(fastsd.__all__) == sorted(fastsd.__all__)
    assert set(fastsd._HOMES) == set(fastsd.__all__)
    for name in fastsd.__all__:
        assert getattr(fastsd, name).__name__ == name
    assert set(fastsd.__all__) <= set(dir(fastsd))
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = fastsd.Pipelin


def test_a_missing_torch_names_the_extra() -> None:
    code = "import sys; sys.modules['torch'] = None; import fastsd; fastsd.Pipeline.from_pretrained('demo')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "MissingExtraError: " in run.stderr and "need torch" in run.stderr and "fastsd[cpu]" in run.stderr


@pytest.mark.parametrize("package", ORDER)
def test_types_are_shipped(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").exists()
