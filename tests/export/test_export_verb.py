"""The command `fastsd export`: what it refuses, what it would build, and a bundle made and used by commands alone."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsd import cli

REFUSED: dict[str, tuple[str, str]] = {
    "no target": ("demo -o out", "--to"),
    "unknown target": ("demo --to abacus -o out", "the target 'abacus' is unknown: use"),
    "empty target": ("demo --to onnx, -o out", "has an empty entry"),
    "no folder": ("demo --to onnx", "say where the bundle goes with -o DIR"),
    "no parent": ("demo --to onnx -o nowhere/out", "does not exist: make it first"),
    "another folder": ("demo --to onnx -o taken", "is there and is no bundle"),
    "size": ("demo --to onnx -o out --height large", "is no size: use a number"),
    "size of two": ("demo --to onnx -o out --height 64:128", "is no size: use a number"),
    "size backwards": ("demo --to onnx -o out --height 128:64:256", "is no size: use a number"),
    "size unfit": ("demo --to onnx -o out --height 100", "height 100 is no multiple of 8"),
    "batch": ("demo --to onnx -o out --batch 0", "is no size"),
    "tokens": ("demo --to onnx -o out --tokens 50", "no multiples of"),
    "guidance": ("demo --to onnx -o out --guidance maybe", "guidance 'maybe' is unknown"),
    "precision": ("demo --to onnx -o out --dtype bfloat16", "there is no onnx in bfloat16"),
    "quantize": ("demo --to openvino -o out --quantize int4", "'int4' is unknown: use int8"),
    "quantize alone": ("demo --to onnx -o out --quantize int8", "is for the target openvino"),
    "component": ("demo --to onnx -o out --components unet", "no component 'unet': it has text_encoder"),
    "sampler": ("demo --to onnx -o out --components vae_encoder --samplers flow_euler", "flow"),
    "steps": ("demo --to onnx -o out --max-steps 0", "--max-steps must be at least 1"),
    "weights": ("demo --to onnx -o out --weights maybe", "weights 'maybe' is unknown"),
    "random": ("taken --to onnx -o out --weights random", "needs a preset"),
    "config": ("demo --to onnx -o out --config taken", "--config is for a .safetensors file"),
    "no model": ("nothing/here/at/all --to onnx -o out", "nothing/here/at/all"),
    "lora": ("demo --to onnx -o out --lora missing.safetensors", "missing.safetensors"),
    "level of nothing": ("demo --to onnx -o out --level 5", "--level is for TensorRT"),
    "refit of nothing": ("demo --to onnx,openvino -o out --refit strip", "--refit is for TensorRT"),
    "streaming of nothing": ("demo --to onnx -o out --weight-streaming", "--weight-streaming is for TensorRT"),
    "calibration of nothing": ("demo --to openvino -o out --calibration 8", "--calibration is for int8"),
    "dry run with a lost lora": ("demo --to onnx --dry-run --lora missing.safetensors", "missing.safetensors"),
    "repository of what it cannot serve": ("demo --to openvino,triton-repo -o out", "engines of tensorrt or onnx"),
    "repository taken": ("demo --to onnx,triton-repo -o taken", "taken-triton', where the repository goes"),
    "no gpu": ("demo --to tensorrt -o out", "does not run here"),
    "repository alone": ("demo --to triton-repo -o out", "name their target too"),
}


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_HOME", str(home))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("taken", "taken-triton"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[case]
    assert cli.main(["export", *arguments.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastsd: ")]
    assert message in lines[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "taken-triton"]


def test_a_dry_run_says_what_would_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "export sdxl --weights random --to onnx,openvino --quantize int8 --height 512:1024:1024 --dry-run"
    assert cli.main([*arguments.split(), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {(row["target"], row["precision"]) for row in plan["engines"]} == {
        ("onnx", "float32"),
        ("openvino", "bfloat16"),
        ("openvino", "int8"),
    }
    assert plan["profile"] == {"height": [64, 128, 128], "width": [128] * 3, "batch": [1, 2, 2], "tokens": [77] * 3}
    weights = {row["component"]: row["bytes"] for row in plan["engines"] if row["target"] == "onnx"}
    # The published sizes: 2.567 G parameters of the UNet, of which prepare and step each hold a part; the VAE 83.7 M.
    assert weights["prepare"] + weights["denoiser"] == pytest.approx(4 * 2.567e9, rel=1e-3)
    assert weights["vae_decoder"] + weights["vae_encoder"] == pytest.approx(4 * 83.7e6, rel=1e-2)
    assert plan["peak_bytes"] == pytest.approx(2.5 * 4 * 2.567e9, rel=1e-3)
    assert cli.main(arguments.split()) == 0
    assert "GB on the disk" in capsys.readouterr().out


def test_a_bundle_by_commands_alone(
    bundled: Callable[[str], Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled("sd")  # its engines are in the store, so this export is quick
    folder = str(tmp_path / "bundle")
    sizes = "--batch 1:1:2 --height 64:64:96 --width 64 --max-steps 6 --verify-steps 3 --samplers euler,dpmpp_2m"
    command = ["export", str(tiny), "--to", "onnx", "-o", folder, *sizes.split(), "--json"]
    assert cli.main(command) == 0
    [variant] = json.loads(capsys.readouterr().out)["variants"]
    assert variant["verification"]["worst"]["psnr"] > 60 and len(variant["engines"]) == 5
    image = str(tmp_path / "image.png")
    generate = f"generate cat -m {folder} --backend onnx --steps 3 --seed 1 --scheduler dpmpp_2m -o {image}"
    assert cli.main(generate.split()) == 0
    assert "3 steps" in capsys.readouterr().out
    assert np.asarray(Image.open(image)).shape == (64, 64, 3)
    assert cli.main(["generate", "cat", "-m", folder, "--steps", "9", "-o", str(tmp_path / "b.png")]) == 2
    assert "--max-steps 9" in capsys.readouterr().err
    assert cli.main(["engines", "verify", folder]) == 0
