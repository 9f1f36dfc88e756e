"""Components of the tiny checkpoints, traced and as ONNX files, and their bundles; each is made once in a session."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# A tracer makes millions of small objects; looking for cycles among them takes a quarter of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

TOKENS = 20  # of the examples
DYNAMIC = {"batch": (1, 2, 4), "height": (2, 8, 24), "width": (2, 8, 24), "tokens": (1, 20, 64)}


@pytest.fixture(scope="session")
def loaded(make_checkpoint: Callable[..., Path]) -> Callable[..., tuple[ModuleType, Any]]:
    """The family's module and the float32 components of a tiny checkpoint; treat them as read-only."""
    import torch

    from fastsd import checkpoint, families

    made: dict[str, tuple[ModuleType, Any]] = {}

    def load(family: str = "sd", **options: Any) -> tuple[ModuleType, Any]:
        key = repr((family, sorted(options.items())))
        if key not in made:
            source = checkpoint.source(make_checkpoint(family, **options))
            components = families.load(source, torch.float32, torch.device("cpu"))
            made[key] = families.family(source.index["_class_name"]), components
        return made[key]

    return load


@pytest.fixture(scope="session")
def traced(loaded: Callable[..., tuple[ModuleType, Any]]) -> Callable[..., Any]:
    """`fastsd_export.trace` of a component by its name."""
    from fastsd_export import trace

    def make(family: str, component: str, **options: Any) -> Any:
        module, components = loaded(family, **options)
        match component:
            case "prepare":
                return trace.prepare(module, components, TOKENS)
            case "denoiser":
                return trace.denoiser(module, components, TOKENS)
            case "vae_decoder":
                return trace.vae_decoder(components.vae)
            case "vae_encoder":
                return trace.vae_encoder(components.vae)
        [place] = [i for i, one in enumerate(module.ENCODERS) if one.name == component]
        encoder, text_encoder = module.ENCODERS[place], components.text_encoders[place]
        if not encoder.is_clip:
            return trace.text_encoder(encoder, text_encoder, TOKENS, 1)
        skips = "clip_skip" in module.ARGUMENTS
        choices = text_encoder.config.num_hidden_layers + encoder.layer + 1 if skips else 1
        return trace.text_encoder(encoder, text_encoder, components.tokenizers[place].length, choices)

    return make


@pytest.fixture(scope="session")
def exported(traced: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """A traced component and its ONNX file (`fastsd_export.onnx.Graph`); treat both as read-only."""
    from fastsd_export import onnx

    made: dict[str, tuple[Any, Any]] = {}

    def export(
        family: str,
        component: str,
        precision: str = "float32",
        opset: int = 20,
        ranges: Mapping[str, tuple[int, int, int]] = DYNAMIC,
        **options: Any,
    ) -> tuple[Any, Any]:
        key = repr((family, component, precision, opset, sorted(ranges.items()), sorted(options.items())))
        if key not in made:
            one, folder = traced(family, component, **options), tmp_path_factory.mktemp(f"{family}-{component}")
            made[key] = one, onnx.write(one, ranges, folder, precision=precision, opset=opset)
        return made[key]

    return export


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `FASTSD_HOME` of the tests, so that they share what they build and leave the user's alone."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def export() -> Callable[..., Any]:
    """`build.export` of a tiny checkpoint with few samplers; returns the manifest."""
    from fastsd import checkpoint
    from fastsd_export import build
    from fastsd_export.plan import Lane, Sizes

    both = Lane("onnx", "float32"), Lane("openvino", "float32")

    def run(model: Path, folder: Path, lanes: tuple[Lane, ...] = both, **options: Any) -> Any:
        flow = (model / "transformer").is_dir()
        given: dict[str, Any] = {
            "samplers": ["flow_euler"] if flow else ["euler", "dpmpp_2m"],
            "max_steps": 6,
            "steps": 3,
            "sizes": Sizes(batch=(1, 1, 2), height=(64, 64, 96), width=(64, 64, 64)),  # what varies and what does not
        }
        return build.export(checkpoint.source(model), "tiny", folder, lanes=lanes, **{**given, **options})

    return run


@pytest.fixture(scope="session")
def bundled(
    make_checkpoint: Callable[..., Path],
    export: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    home: Path,
) -> Callable[[str], Path]:
    """The bundle of a family's tiny checkpoint, for ONNX Runtime and OpenVINO in float32; read-only."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("bundles") / family
            before = os.environ.get("FASTSD_HOME")
            os.environ["FASTSD_HOME"] = str(home)
            try:
                export(make_checkpoint(family), made[family])
            finally:
                os.environ.pop("FASTSD_HOME") if before is None else os.environ.update(FASTSD_HOME=before)
        return made[family]

    return make
