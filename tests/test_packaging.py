"""What pip gets: the wheel, the sdist, and a clean environment with only the core's dependencies."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return folder


def test_the_wheel_holds_four_packages_and_the_demo(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "fastsd",
        "fastsd_kernels",
        "fastsd_export",
        "fastsd_benchmarks",
    }
    for package in ("fastsd", "fastsd_kernels", "fastsd_export", "fastsd_benchmarks"):
        assert f"{package}/py.typed" in names
    for part in ("vae", "unet", "text_encoder"):
        assert any(
            name.startswith(f"fastsd/demo/checkpoint/{part}/") and name.endswith(".safetensors") for name in names
        )
    assert "fastsd/demo/checkpoint/model_index.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "tests/test_packaging.py" in names and "pyproject.toml" in names and "LICENSE" in names
    assert not [name for name in names if name.startswith("runs/")]


def test_the_wheel_runs_in_a_clean_environment(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    (wheel,) = built.glob("*.whl")
    subprocess.run([binaries / "pip", "install", "-q", str(wheel)], check=True, capture_output=True)

    def fastsd(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([binaries / "fastsd", *arguments], capture_output=True, text=True, cwd=tmp_path)

    version = fastsd("--version")
    assert (version.returncode, version.stdout.strip()) == (0, "0.1.0")
    without_torch = fastsd("generate", "a red circle")
    assert without_torch.returncode == 1
    assert without_torch.stderr.startswith("fastsd: checkpoints and tensors need torch: pip install 'fastsd[cpu]'")
    exported = fastsd("export", "demo", "--to", "onnx", "-o", "bundle")
    assert exported.returncode == 1 and "fastsd: an export needs" in exported.stderr
