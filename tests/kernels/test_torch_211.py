"""This folder's tests once more, under the oldest torch that is supported, 2.11, and its Triton, 3.6.

On PyPI torch 2.11 is built for CUDA. It is loaded here without a GPU and without 2 GB of CUDA's libraries: a stub takes
the place of those that it is linked to, and only the small run time, which says that there is no GPU, is real.
"""

import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

TORCH, TRITON = "2.11.0", "3.6.0"
PACKAGES = (
    f"torch=={TORCH}",
    f"triton=={TRITON}",
    "nvidia-cuda-runtime==13.0.96",
    "numpy==2.3.5",  # the last before 2.4, which refuses the `int(array of one element)` of interpreted loops
)
# What torch 2.11 has not, and the kernels not from it.
WITHOUT = (
    # Its attention on a CPU divides by the number of heads, and where there is none it ends the process.
    "test_attention.py::test_nothing_to_attend[(2, 5, 0, 64)-5]",
    "test_cross_attention.py::test_nothing_to_attend[(2, 5, 0, 64)-5]",
    "test_attention_8bit.py::test_nothing_to_attend[(2, 5, 0, 64)]",
    # Its product of float8 on a CPU has one scale for all rows.
    "test_quantize.py::test_product_in_float8",
)
FUNCTION = re.compile(r"\s(cu(?!da)\w+|nccl\w+|nvshmem\w+)(?:@(\S+))?$", re.MULTILINE)

# Wheels of another platform are linked to other libraries.
PLATFORMS = [pair for pair in [("linux", "x86_64")] if pair == (sys.platform, platform.machine())]


def output(*command: str | Path) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"{command[0]} failed:\n{run.stdout}{run.stderr}"
    return run.stdout


def replace_missing(folder: Path) -> None:
    """Put a stub in the place of libraries that those of torch need and the machine has not.

    It is one library under all the names. It has every function that torch may call in them, under the version that it
    asks for; all return 1, an error in each of them.
    """
    linked = "".join(output("ldd", folder / name) for name in ("libtorch_global_deps.so", "libtorch_python.so"))
    undefined = ("nm", "-D", "--undefined-only", "--with-symbol-versions")
    versions: dict[str, set[str]] = defaultdict(set)
    for library in folder.glob("lib*.so"):
        for name, version in FUNCTION.findall(output(*undefined, library)):
            versions[version].add(name)
    source, script, stub = folder / "stub.c", folder / "stub.map", folder / "stub.so"
    source.write_text(
        "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(set().union(*versions.values())))
    )
    script.write_text(
        "".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in versions.items() if version)
    )
    output("gcc", "-shared", "-fPIC", f"-Wl,--version-script={script}", "-o", stub, source)
    for missing in set(re.findall(r"(\S+) => not found", linked)):
        (folder / missing).symlink_to(stub)


@pytest.mark.full
@pytest.mark.parametrize("of_wheels", PLATFORMS, ids="-".join)
def test_kernels(install: Callable[..., Path], of_wheels: tuple[str, str]) -> None:
    target = install(*PACKAGES)
    replace_missing(target / "torch" / "lib")
    code = "import sys, pytest, torch, triton; print(torch.__version__, triton.__version__); sys.exit(pytest.main())"
    environment = {
        "PYTHONPATH": str(target),
        "PYTHONDONTWRITEBYTECODE": "",  # it starts several processes
        "TRITON_CACHE_DIR": str(target / "triton_cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(target / "inductor_cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    options = ["-q", "-x", "-p", "no:cacheprovider", *(f"--deselect=tests/kernels/{test}" for test in WITHOUT)]
    run = subprocess.run(
        [sys.executable, "-c", code, "tests/kernels", *options],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    versions, *_, summary = run.stdout.splitlines()
    assert re.fullmatch(rf"{TORCH}\S* {TRITON}", versions), versions
    assert "skipped" not in summary
