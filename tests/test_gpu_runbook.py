"""The GPU runbook: every step runs (here without a GPU, at tiny size), and a call goes on where the last stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd_benchmarks import cells, gpu, kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def names(known: dict[str, Any]) -> list[str]:
    return [step.name for step in gpu.steps(CPU, torch.bfloat16, known, tiny=True)]


@pytest.mark.parametrize(
    "only", ["kernel", "model", *(pytest.param(one, marks=pytest.mark.full) for one in ("graph", "cell"))]
)
def test_every_step_runs_and_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str], only: str) -> None:
    path = tmp_path / "results.json"
    assert gpu.main(["--results", str(path), "--only", only]) == 0
    captured = capsys.readouterr()
    assert "dry run" in captured.err and "0 steps not right, 0 left" in captured.err
    document = json.loads(path.read_text())
    assert set(document["steps"]) == {"environment", "ceilings", *(name for name in names({}) if name.startswith(only))}
    for name, step in document["steps"].items():
        assert step["dry_run"], name
        assert not {"us", "denoiser_us", "seconds"} & step["result"].keys()  # nothing was measured


def test_a_second_call_replaces_what_it_runs_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for only in ("kernel/geglu", "kernel/modulate", "kernel/modulate"):
        assert gpu.main(["--results", str(path), "--only", only]) == 0
    kept = {name for name in names({}) if name.startswith(("kernel/geglu", "kernel/modulate"))}
    assert set(json.loads(path.read_text())["steps"]) == {"environment", "ceilings", *kept}


def test_what_was_never_measured_comes_first() -> None:
    all_ = names({})
    assert all_[:2] == ["environment", "ceilings"] and len(all_) == 2 + len(kernels.CASES) + 2 * len(gpu.MODELS) + len(
        cells.ways()
    )
    known = {name: {"at": f"2026-01-{2 + i:02}"} for i, name in enumerate(all_[2:5])}
    assert names(known) == [*all_[:2], *all_[5:], *all_[2:5]]
    known[all_[2]]["at"] = "2026-02-01"
    assert names(known) == [*all_[:2], *all_[5:], *all_[3:5], all_[2]]


def test_no_step_starts_after_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    assert gpu.main(["--results", str(path), "--minutes", "0"]) == 0
    assert f"{len(names({}))} left for the next call" in capsys.readouterr().err
    assert not path.exists()


def test_a_step_that_fails_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise RuntimeError("out of\nsomething")

    monkeypatch.setattr(kernels, "run", broken)
    path = tmp_path / "results.json"
    assert gpu.main(["--results", str(path), "--only", "kernel/geglu"]) == 1
    steps = json.loads(path.read_text())["steps"]
    failed = [step["result"] for name, step in steps.items() if name.startswith("kernel/geglu")]
    assert failed == [{"right": False, "failed": "RuntimeError: out of something"}] * 3
    assert "3 steps not right" in capsys.readouterr().err


def test_a_wrong_kernel_has_no_time() -> None:
    case = next(case for case in kernels.CASES if case.op == "geglu")

    def wrong(device: torch.device, dtype: torch.dtype, tiny: bool) -> kernels.Problem:
        problem = case.make(device, dtype, tiny)
        return problem._replace(check=lambda: problem.check() * 1.1)

    row = kernels.run(case._replace(make=wrong), CPU, torch.bfloat16, {"tflops": 1.0, "gb_s": 1.0}, tiny=False)
    assert row["right"] is False and "us" not in row
    right = kernels.run(
        case._replace(make=lambda *given: case.make(*given[:2], True)),
        CPU,
        torch.bfloat16,
        {"tflops": 1.0, "gb_s": 1.0},
        tiny=False,
    )
    assert right["right"] and right["us"] > 0 and right["peers"]["eager"]["ratio"] > 0
