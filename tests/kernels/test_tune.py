"""The tuning script, as far as it goes without a GPU: its choices, with a clock of our own."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd_kernels import configs, tune
from fastsd_kernels.configs import Config, Row
from fastsd_kernels.tune import Shape

SDPA = Config("sdpa", 128, 64, 4, 3)
PORTABLE = Config("kernel", 128, 64, 4, 3)
SMALL = Config("kernel", 64, 64, 4, 3)
HOPPER = Config("hopper", 128, 128, 4, 2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({SDPA: 10, PORTABLE: 9, SMALL: 12}, PORTABLE),
        ({SDPA: 10, PORTABLE: 10.4, SMALL: 12}, PORTABLE),
        ({SDPA: 10, PORTABLE: 14, HOPPER: 9}, HOPPER),
        ({SDPA: 10, PORTABLE: 14, HOPPER: 13, SMALL: 15}, PORTABLE._replace(route="sdpa")),
        ({SDPA: 10}, SDPA),
    ],
    ids=["ours", "ours within noise", "specialised", "torch, with the tiles of the best portable one", "only torch"],
)
def test_choice(seconds: dict[Config, float], expected: Config) -> None:
    assert tune.best(seconds) == expected


@pytest.mark.parametrize("row", configs.table().values(), ids=lambda row: "-".join(map(str, row[:4])))
def test_candidates_hold_the_table(row: Row) -> None:
    found = list(tune.candidates(row))
    assert len(found) == len(set(found))
    assert row.config in found
    assert any(config.route == "hopper" for config in found) == (
        row.op == "attention" and row.arch == 90 and row.head_dim in (64, 128)
    )


def test_shapes_are_of_rows_of_the_table() -> None:
    served = [shape for row in configs.table().values() if row.arch == 90 for shape in tune.shapes_of(row)]
    assert sorted(served) == sorted(tune.SHAPES)


@pytest.mark.parametrize(
    "shape",
    [
        Shape("attention", 1, 2, 70, 70, 64),
        Shape("joint_attention", 1, 2, 70, 70, 64, 13),
        Shape("cross_attention", 1, 2, 70, 77, 64),
    ],
    ids=lambda shape: shape.op,
)
def test_a_row_is_measured_and_what_is_wrong_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: Shape
) -> None:
    """With torch in place of the kernels, of which one forgets a head."""

    def launch(*arguments: Any) -> None:
        *tensors, config = arguments
        outs = tensors[-1:] if len(tensors) == 4 else tensors[-2:]
        results = tune.compute(shape.op, tensors[: -len(outs)], config._replace(route="sdpa"))
        for out, result in zip(outs, results, strict=True):
            out.copy_(result)
            if config == wrong:
                out[:, :, 1] = 0

    right, wrong = Config("kernel", 64, 64, 4, 3), Config("kernel", 64, 32, 4, 3)
    monkeypatch.setattr(f"fastsd_kernels.{shape.op}.launch", launch)
    monkeypatch.setattr(tune, "SHAPES", (shape,))
    monkeypatch.setattr(tune, "candidates", lambda row: [SDPA, right, wrong])
    row = Row(shape.op, 90, 64, configs.length_class(shape.op, shape.keys), SDPA, None)
    runs = []
    seconds = tune.measure(row, torch.device("cpu"), lambda function: float(len(runs.append(function()) or runs)))
    assert seconds == {SDPA: 1.0, right: 2.0}
    assert f"{wrong} is not exact, and left out" in capsys.readouterr().err


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU that is not there, and a table of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(configs, "TABLE", tmp_path / "configs.json")
    shutil.copy(Path(configs.__file__).with_name("configs.json"), tmp_path)
    configs.table.cache_clear()
    yield
    configs.table.cache_clear()


def test_rows_are_written_one_by_one_and_kept(
    hopper_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def measure(row: Row, device: torch.device, clock: Any) -> dict[Config, float]:
        measured.append(row[:4])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {row.config._replace(route="sdpa"): 2e-6, row.config._replace(route="kernel", num_stages=2): 1e-6}

    monkeypatch.setattr(tune, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--op", "attention"])
    configs.table.cache_clear()  # as in a new process
    first = configs.table()[measured[0]]
    assert first.config.route == "kernel" and first.config.num_stages == 2
    assert first.measured == {
        "gpu": "H200",
        "torch": torch.__version__,
        "triton": tune.triton.__version__,
        "microseconds": {"kernel": 1.0, "sdpa": 2.0},
    }
    assert tune.main(["--op", "attention"]) == 0
    assert len(measured) == len(set(measured)) + 1 and measured[3] == measured[2]
    assert all(row.measured for row in configs.table().values() if row[:4] in measured)
    assert {key[1] for key in measured} == {90}
    assert tune.main(["--op", "attention"]) == 0
    assert tune.main(["--op", "cross_attention", "--minutes", "0"]) == 0
    assert "Time is up" in capsys.readouterr().out


def test_other_chips_have_no_rows_to_tune(
    hopper_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "The table has rows for sm_80, sm_89, sm_90, none for this sm_86.\n"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    before = configs.TABLE.read_text()
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "Tuning needs a CUDA GPU and Triton; the table stays as it is.\n"
    assert configs.TABLE.read_text() == before
