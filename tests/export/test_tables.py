"""The tables of a bundle: all samplers that fit, exact, small, and read one at a time."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsd.bundle import unpack
from fastsd.errors import InputError
from fastsd.families import flux, sd, sd3
from fastsd.sampling.flow import CLASS, flow_euler
from fastsd.sampling.schedulers import SAMPLERS, resolve_scheduler
from fastsd.sampling.table import StepTable
from fastsd_export.tables import fitting, pack, tables

# Of diffusers, about itself and about numpy 2.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("FutureWarning", "DeprecationWarning")]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
SD3 = {"_class_name": CLASS, "shift": 3.0}
FLUX = {**SD3, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
NOISE = [name for name in SAMPLERS if not name.startswith("flow_")]


def refused(made: dict[int, StepTable | str]) -> list[int]:
    return [steps for steps, table in made.items() if isinstance(table, str)]


def test_every_sampler_that_fits_is_compiled() -> None:
    made = tables(SD, sd, max_steps=4)
    assert fitting(SD) == ["PNDMScheduler", *NOISE] == list(made.tables)
    assert not made.formulas and not made.left_out
    for name, compiled in made.tables.items():
        assert list(compiled) == [1, 2, 3, 4]
        for steps, table in compiled.items():
            wanted = StepTable.from_scheduler(resolve_scheduler(None if name == "PNDMScheduler" else name, SD), steps)
            assert table == wanted, (name, steps)


def test_flow_euler_goes_by_its_formula() -> None:
    made = tables(SD3, sd3, max_steps=3)
    assert made.formulas == [CLASS, "flow_euler"] and not made.left_out
    assert list(made.tables) == ["flow_heun", "flow_dpmpp_2m", "flow_unipc"]
    # Another schedule of sigmas is no formula, and none that only stands in for the checkpoint's own scheduler is.
    made = tables({**SD3, "use_karras_sigmas": True}, sd3, [CLASS, "flow_euler"], 3)
    assert made.formulas == ["flow_euler"] and list(made.tables) == [CLASS]
    assert made.tables[CLASS][3] != flow_euler(SD3, 3)
    heun = {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}
    made = tables(heun, sd3, ["flow_euler"], 3)
    assert not made.formulas and made.tables["flow_euler"][3] == flow_euler(SD3, 3)


def test_samplers_that_shift_with_the_size_need_one() -> None:
    made = tables(FLUX, flux, max_steps=2)
    assert made.formulas == [CLASS, "flow_euler"] and not made.tables
    assert made.left_out.keys() == {"flow_heun", "flow_dpmpp_2m", "flow_unipc"}
    assert "shift with the image's size: export one size" in made.left_out["flow_unipc"]
    assert "no shift by the image's size" in made.left_out["flow_heun"]
    small, large = (
        tables(FLUX, flux, ["flow_unipc"], 3, tokens=tokens).tables["flow_unipc"][3] for tokens in (256, 4096)
    )
    assert isinstance(small, StepTable) and small != large
    scheduler = resolve_scheduler("flow_unipc", FLUX)
    steps, arguments = flux.schedule(None, scheduler, 3, 4096)  # type: ignore[arg-type]
    assert large == StepTable.from_scheduler(scheduler, steps, **arguments)
    # A dynamic shift with sigmas of its own: no formula, and given as an array.
    made = tables({**FLUX, "use_karras_sigmas": True}, flux, [CLASS], 3, tokens=256)
    assert isinstance(made.tables[CLASS][3], StepTable)


def test_counts_that_a_sampler_refuses_have_their_reason() -> None:
    made = tables({**SD, "original_inference_steps": 5}, sd, ["lcm", "ddim"], 7)
    assert refused(made.tables["lcm"]) == [6, 7] and not refused(made.tables["ddim"])
    data = pack(made.tables["lcm"])
    assert unpack(data, 5) == made.tables["lcm"][5]
    with pytest.raises(InputError, match=r"from 1 to 5 \(original_inference_steps\), not 6"):
        unpack(data, 6)


LEFT_OUT = [
    pytest.param({**SD, "skip_prk_steps": False}, ["PNDMScheduler"], "Runge-Kutta", id="not-linear"),
    pytest.param(SD, ["flow_euler"], "use 'euler'", id="flow"),
    pytest.param(SD3, ["ddim"], "use 'flow_euler'", id="noise"),
    pytest.param(SD, ["magic"], "unknown scheduler 'magic'", id="unknown"),
    pytest.param({"beta_start": 0.1}, None, "unknown scheduler 'None'", id="no-class"),
]


@pytest.mark.parametrize(("config", "samplers", "message"), LEFT_OUT)
def test_what_is_left_out_has_its_reason(config: dict[str, Any], samplers: list[str] | None, message: str) -> None:
    made = tables(config, sd, samplers, 2)
    name = samplers[0] if samplers else "None"
    assert message in made.left_out[name] and "\n" not in made.left_out[name]
    assert name not in made.tables


@pytest.mark.parametrize("count", [0, 1001, True, 2.0, -1], ids=str)
def test_counts_that_are_none(count: Any) -> None:
    with pytest.raises(InputError, match="1 to at most 1000 steps"):
        tables(SD, sd, ["ddim"], count)


@pytest.fixture(scope="module")
def compiled() -> dict[int, StepTable | str]:
    return tables(SD, sd, ["dpmpp_sde"], 6).tables["dpmpp_sde"]


def test_the_round_trip_is_exact(compiled: dict[int, StepTable | str]) -> None:
    data = pack(compiled)
    assert data == pack(dict(compiled)) == pack(tables(SD, sd, ["dpmpp_sde"], 6).tables["dpmpp_sde"])
    for steps, table in compiled.items():
        again = unpack(data, steps)
        assert isinstance(table, StepTable) and again == table
        assert all(
            getattr(again, name).tobytes() == getattr(table, name).tobytes() for name in ("state", "noise", "denoised")
        )


def test_one_table_is_read_without_the_others(compiled: dict[int, StepTable | str]) -> None:
    lines = gzip.decompress(pack(compiled)).split(b"\n")
    for steps in (1, 4, 6):
        others = [line if i + 1 == steps else b"[" for i, line in enumerate(lines)]
        assert unpack(gzip.compress(b"\n".join(others)), steps) == compiled[steps]


def test_damaged_files_and_other_counts_are_refused(compiled: dict[int, StepTable | str]) -> None:
    data = pack(compiled)
    cases = [
        (data, 0, "1 to 6 steps"),
        (data, 7, "--max-steps 7"),
        (data[: len(data) // 2], 1, "export the bundle"),
        (data[:-1], 1, "export the bundle"),
        (data[:40] + bytes([data[40] ^ 1]) + data[41:], 1, "export the bundle"),
        (b"", 1, "export the bundle"),
        (b"not gzip", 1, "export the bundle"),
        (gzip.compress(bytes(2**27)), 1, "too large"),
    ]
    for damaged, steps, message in cases:
        with pytest.raises(InputError, match=message) as error:
            unpack(damaged, steps)
        assert "\n" not in str(error.value)


def test_torch_is_not_needed_to_read(tmp_path: Path, compiled: dict[int, StepTable | str]) -> None:
    path = tmp_path / "tables"
    path.write_bytes(pack(compiled))
    code = f"import sys; from fastsd.bundle import unpack; t = unpack(open({str(path)!r}, 'rb').read(), 6); len(t)"
    check = "; assert not {'torch', 'diffusers', 'scipy', 'fastsd_export'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True)


@pytest.mark.full
@pytest.mark.parametrize("config", [SD, SD3], ids=["sd", "sd3"])
def test_fifty_steps_of_every_sampler_are_small(config: dict[str, Any]) -> None:
    made = tables(config, sd if config is SD else sd3)
    assert not made.left_out and set(made.tables) | set(made.formulas) == set(fitting(config))
    for name, each in made.tables.items():
        data = pack(each)
        assert len(each) == 50 and not refused(each), name
        # DPM-Solver++ SDE has two model calls a step and draws two noises that overlap.
        assert len(data) < (170_000 if name == "dpmpp_sde" else 120_000), name
        for steps in (1, 7, 50):
            assert unpack(data, steps) == each[steps], name
