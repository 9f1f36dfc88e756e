"""What phases take, counted without weights and measured; and the weights that only `prepare` reads."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastsd
from fastsd import checkpoint, families, memory, random_weights
from fastsd.memory import Load
from fastsd.pipeline import Pipeline
from fastsd.presets import PRESETS

Make = Callable[..., Path]
FAMILIES = ["sd", "sdxl", "sd3", "flux"]


@pytest.mark.parametrize("family", FAMILIES)
def test_releasing_changes_no_image(make_checkpoint: Make, family: str) -> None:
    folder = make_checkpoint(family)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"}
    kept = Pipeline.from_pretrained(folder, dtype="float32")
    released = Pipeline.from_pretrained(folder, dtype="float32", release_prepare=True)
    expected = kept("the red cat", **arguments)
    assert expected.timings.reload == 0
    for _ in range(2):  # the second run has to bring them back
        result = released("the red cat", **arguments)
        assert torch.equal(result.images, expected.images)
    assert 0 < result.timings.reload <= result.timings.prepare
    assert released.memory() == kept.memory()
    # They are not on the device: one value stands for each whole tensor.
    for name in released.components.denoiser.prepare_only():
        for parameter in released.components.denoiser.get_submodule(name).parameters():
            assert parameter.untyped_storage().nbytes() == parameter.element_size()


@pytest.mark.parametrize("family", FAMILIES)
def test_prepare_only_is_what_the_steps_never_read(make_checkpoint: Make, family: str) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint(family), dtype="float32")
    denoiser = pipe.components.denoiser
    listed = set(memory._prepare_only(denoiser))
    read: set[str] = set()

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            flat, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
            read.update(names[id(one)] for one in flat if id(one) in names)
            return func(*args, **(kwargs or {}))

    names = {id(parameter): name for name, parameter in denoiser.named_parameters()}
    constants: list[Any] = []
    denoiser.register_forward_pre_hook(lambda _, inputs: constants.append(inputs))
    pipe("the red cat", seed=1, num_inference_steps=1, output_type="latent")
    with torch.inference_mode(), Spy():
        denoiser(*constants[0])
    assert read.isdisjoint(listed)
    assert read | listed == set(names.values())


# Shares of the denoiser's parameters, as kernels and memory plans count on them.
SHARES = {"sdxl": 0.14, "sd3-medium": 0.333, "sd35-large": 0.333, "flux-schnell": 0.28, "flux-dev": 0.28}


@pytest.mark.parametrize("preset", SHARES)
def test_shares_at_full_size(preset: str) -> None:
    name, denoiser_class = families.family(PRESETS[preset].index["_class_name"]).DENOISER
    with torch.device("meta"):
        denoiser = denoiser_class(PRESETS[preset].configs[name])
    total, waiting = memory.report({name: denoiser})[name]
    assert waiting / total == pytest.approx(SHARES[preset], abs=0.005)


def test_what_is_not_there_is_nan(make_checkpoint: Make) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint("flux"), dtype="float32", release_prepare=True)
    pipe("the red cat", seed=1, num_inference_steps=1, output_type="latent")
    pipe._waiting = None  # whoever forgets to bring them back
    with pytest.raises(fastsd.NumericError, match="the denoiser produced NaN"):
        pipe("the red cat", seed=1, num_inference_steps=1, output_type="latent")


MB = 2**20
CPU = torch.device("cpu")
LINUX = pytest.mark.xfail(not sys.platform.startswith("linux"), reason="/proc is Linux's", run=False)


def count(function: Callable[..., Any], *given: torch.Tensor) -> tuple[int, int]:
    """Bytes alive at most and at the end, of which what is given is no part."""
    live = memory._Live()
    live._known = {tensor.untyped_storage()._cdata for tensor in given}
    with live, memory._Attention():
        kept = function(*given)
        end = live.now
    del kept
    return live.most, end


COUNTED: dict[str, tuple[Callable[..., Any], int, int]] = {  # in units of what is given
    "result": (lambda x: x + 1, 1, 1),
    "chain": (lambda x: ((x + 1) * 2).exp(), 2, 1),
    "views are free": (lambda x: x[:512].view(-1, 512).transpose(0, 1), 0, 0),
    "in place": (lambda x: (x + 1).mul_(2).relu_(), 1, 1),
    "a view keeps all": (lambda x: (x + 1)[0], 1, 1),
    "inside of an operation": (lambda x: torch.linalg.multi_dot([x, x, x]), 2, 1),
    "no scores": (lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 4, -1, 64)] * 3), 1, 1),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("case", COUNTED)
def test_counts_what_is_alive(case: str, fake: bool) -> None:
    function, most, end = COUNTED[case]
    with FakeTensorMode() if fake else torch.no_grad(), torch.inference_mode():
        x = torch.ones(1024, 1024)
        counted = count(function, x)
    # The attention has a sum per query besides.
    assert counted == pytest.approx((most * 4 * MB, end * 4 * MB), abs=MB // 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_phases(make_checkpoint: Make, family: str) -> None:
    folder = make_checkpoint(family)
    pipe = Pipeline.from_pretrained(folder, dtype="bfloat16", device="cpu")
    load = Load(64, 96, images=2, tokens=20)
    counted = memory.phases(pipe.components, load)
    assert tuple(counted) == memory.PHASES
    encoders = [one for one in pipe.components.text_encoders if one is not None]
    modules = [pipe.components.denoiser, pipe.components.vae, *encoders]
    assert {phase.weights for phase in counted.values()} == {
        sum(size for size, _ in memory.report({str(place): one for place, one in enumerate(modules)}).values())
    }
    # Without weights the same.
    bare = families.load(checkpoint.source(folder), torch.bfloat16, CPU, only=())
    assert memory.phases(bare, load, dtype=torch.bfloat16) == counted
    # Both halves of guidance are as much as two images; only a device with memory of its own lets go of weights.
    other = Load(128, 96, images=4, tokens=20, guided=False)
    twice = memory.phases(bare, other, dtype=torch.bfloat16, device="cuda", release_prepare=True)
    _, waiting = memory.report({"denoiser": pipe.components.denoiser})["denoiser"]
    for phase in memory.PHASES:
        assert counted[phase].weights - twice[phase].weights == (0 if phase == "prepare" else waiting)
    assert 1.1 < twice["denoise"].activations / counted["denoise"].activations < 4.2  # attention: up to the square
    assert counted["decode"].activations < twice["decode"].activations < 4 * counted["decode"].activations
    assert counted["decode"].total == sum(counted["decode"])
    with pytest.raises(fastsd.InputError, match="'onnx' cannot be counted, as it runs engines: use eager or compile"):
        memory.phases(bare, load, backend="onnx")


# Parameters of the published checkpoints, all components together, in millions.
PARAMETERS = {"sd15": 1066, "sdxl": 3469, "sd3-medium": 7689, "flux-dev": 16870}


@pytest.mark.full
@pytest.mark.parametrize("preset", PARAMETERS)
def test_phases_at_full_size(preset: str) -> None:
    bare = families.load(random_weights.source(preset), torch.bfloat16, CPU, only=())
    counted = memory.phases(bare, Load(1024, 1024), dtype=torch.bfloat16, device="cuda")
    assert counted["denoise"].weights / 2e6 == pytest.approx(PARAMETERS[preset], rel=0.01)
    # Five maps of 128 channels at full size.
    assert counted["decode"].activations == pytest.approx(5 * 128 * 1024**2 * 2, rel=0.05)
    assert counted["text"].activations < counted["denoise"].activations


MEASURE = """
import json, sys, torch
from fastsd import checkpoint, families, memory, random_weights
model, dtype, side = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
source = random_weights.source(model) if model != "demo" else checkpoint.source(checkpoint.resolve(model))
components = families.load(source, dtype, torch.device("cpu"))
memory.measure(components, memory.Load(64, 64))
load = memory.Load(side, side)
print(json.dumps([memory.measure(components, load), memory.phases(components, load)]))
"""


@LINUX
@pytest.mark.parametrize(
    ("model", "dtype", "side"),
    [("demo", "float32", 384), pytest.param("sd15", "bfloat16", 512, marks=pytest.mark.full)],
)
def test_counted_is_measured(model: str, dtype: str, side: int) -> None:
    # glibc gives maps of 256 kB and more back at once: else it keeps up to 64 MB of them, now more, now less.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", MEASURE, model, dtype, str(side)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured, counted = json.loads(run.stdout.splitlines()[-1])
    for phase in ("denoise", "decode"):  # the others take next to nothing
        _, activations, overhead = counted[phase]
        assert activations > 16 * MB
        # Not less than is alive, by more than the 5 % that a run at a small size had touched before; not more than
        # is counted in all.
        assert 0.9 * activations <= measured[phase] <= 1.05 * (activations + overhead), phase


def test_free_memory_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    limit, used, stat = tmp_path / "max", tmp_path / "current", tmp_path / "stat"
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, used, (stat, "inactive_file")),))
    assert memory.free(CPU) == sys.maxsize  # nothing says
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:    4096 kB\n")
    assert memory.free(CPU) == 4 * MB
    limit.write_text("max\n")
    used.write_text(f"{3 * MB}\n")
    assert memory.free(CPU) == 4 * MB
    limit.write_text(f"{5 * MB}\n")
    assert memory.free(CPU) == 2 * MB
    stat.write_text(f"anon 1\ninactive_file {MB}\n")
    assert memory.free(CPU) == 3 * MB  # files go when memory is needed
    used.write_text(f"{8 * MB}\n")
    assert memory.free(CPU) == 0


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory.free(torch.device("cuda")) == 130  # the allocator's own reserve too
