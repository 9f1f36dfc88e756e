"""What an export is to build, checked before anything is loaded: targets, sizes, components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from fastsd import families, lora, vae
from fastsd.bundle import Range
from fastsd.checkpoint import Source
from fastsd.device import pick_device, pick_dtype
from fastsd.errors import InputError
from fastsd.files import few
from fastsd_export.trace import Traced, names

# Precisions of each target, its usual one first (`usual_precision`).
TARGETS: dict[str, tuple[str, ...]] = {
    "onnx": ("float32", "float16"),
    "openvino": ("bfloat16", "float32", "int8"),
    "aoti": ("bfloat16", "float32", "float16"),
    "tensorrt": ("bfloat16", "float16", "float32"),
    "tensorrt-rtx": ("bfloat16", "float16", "float32"),
}
HALVES = {"both": (1, 2), "on": (2, 2), "off": (1, 1)}  # rows of the denoiser's batch for an image, at least and most
MAX_SIZE = 2**14  # pixels


class Lane(NamedTuple):
    """A target and its precision: what one variant of a bundle is."""

    target: str
    precision: str

    def __str__(self) -> str:
        return f"{self.target} in {self.precision}"

    @property
    def device(self) -> str:
        """What it runs on, "cpu" or "cuda"; packages of AOTInductor on the GPU of this machine if there is one."""
        if self.target == "aoti":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return "cpu" if self.in_float32 else "cuda"

    @property
    def in_float32(self) -> bool:
        """Whether its graphs are written in float32, because it computes in that or lowers them itself (OpenVINO)."""
        return self.target == "openvino" or self == ("onnx", "float32")


def usual_precision(target: str) -> str:
    """What a target computes in if nothing is asked for: aoti in what this machine is fast in."""
    if target != "aoti":
        return TARGETS[target][0]
    return str(pick_dtype("auto", pick_device("auto"))).removeprefix("torch.")


@dataclass(frozen=True)
class Sizes:
    """What a bundle is to hold: min, opt and max.

    Attributes:
        batch: images.
        height: pixels; None: the checkpoint's own.
        width: likewise.
        tokens: of the text that the denoiser reads; None: the family's own.
        guidance: "both": with and without classifier-free guidance; "on" or "off": one of them.
    """

    batch: Range = (1, 1, 1)
    height: Range | None = None
    width: Range | None = None
    tokens: Range | None = None
    guidance: str = "both"


class Estimate(NamedTuple):
    """What a component will take, as far as its configuration tells."""

    component: str
    lane: Lane
    nbytes: int  # on the disk
    peak_bytes: int  # of host memory while it is exported


class Plan:
    """A checkpoint's configurations, the components to build and the dimensions of each.

    Raises:
        InputError: a target, precision, component or size is none that can be built.
    """

    def __init__(
        self,
        source: Source,
        lanes: Sequence[Lane],
        sizes: Sizes,
        components: Sequence[str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        for lane in lanes:
            if lane.precision not in TARGETS.get(lane.target, ()):
                known = "; ".join(f"{target} in {' or '.join(kinds)}" for target, kinds in TARGETS.items())
                raise InputError(f"there is no {lane}: build {known}")
            if lane == ("aoti", "float16") and lane.device == "cpu":
                raise InputError("float16 is for CUDA: build aoti in bfloat16 or float32, which a CPU computes in")
        if not lanes:
            raise InputError(f"no target is given: use {', '.join(TARGETS)}")
        self.source, self.lanes = source, tuple(dict.fromkeys(lanes))
        self.pipeline: str = source.index["_class_name"]
        self.family: ModuleType = families.family(self.pipeline)
        self.kind = self.family.__name__.rpartition(".")[2]
        self.meta = families.load(source, torch.float32, torch.device("cpu"), only=())
        # Of a call that leaves them out: the preset's, and before them the checkpoint's own.
        self.defaults: dict[str, Any] = {**(defaults or {}), **source.index.get("_fastsd", {})}
        self.factor = vae.scale_factor(self.meta.vae)
        # The configurations alone, for pipelines whose components run elsewhere.
        self.bare = replace(
            self.meta,
            text_encoders=tuple(one and SimpleNamespace(config=one.config) for one in self.meta.text_encoders),
            denoiser=SimpleNamespace(config=self.meta.denoiser.config),
            vae=SimpleNamespace(config=self.meta.vae.config),
        )
        self.encoders = [
            encoder
            for encoder, module in zip(self.family.ENCODERS, self.meta.text_encoders, strict=True)
            if module is not None
        ]
        parts = (*(encoder.name for encoder in self.encoders), "prepare", "denoiser", "vae_decoder", "vae_encoder")
        self.parts = parts
        self.components = parts if components is None else tuple(components)
        for one in self.components:
            if one not in parts:
                raise InputError(f"the model has no component {one!r}: it has {', '.join(parts)}")
        self.quantised = any(lane.precision == "int8" for lane in self.lanes)
        self.profile = self._profile(sizes)

    def _profile(self, sizes: Sizes) -> dict[str, Range]:
        """The denoiser's dimensions."""
        config = self.meta.denoiser.config
        unit = self.factor * self.family.PATCH
        most = min(MAX_SIZE, unit * getattr(config, "pos_embed_max_size", MAX_SIZE))
        own = getattr(config, "sample_size", None) or self.family.SAMPLE_SIZE
        sides = own if isinstance(own, list | tuple) else (own, own)
        ranges = {}
        for name, given, side in (("height", sizes.height, sides[0]), ("width", sizes.width, sides[1])):
            pixels = check_range(name, given or (side * self.factor,) * 3)
            for value in pixels:
                if value % unit or value > most:
                    near = min(most, max(unit, round(value / unit) * unit))
                    raise InputError(f"{name} {value} is no multiple of {unit} up to {most}: the nearest is {near}")
            ranges[name] = check_range(name, tuple(value // self.factor for value in pixels))
        if sizes.guidance not in HALVES:
            raise InputError(f"guidance {sizes.guidance!r} is unknown: use {', '.join(HALVES)}")
        least, twice = HALVES[sizes.guidance]
        if sizes.guidance == "both" and (self.kind == "flux" or self.family.guidance(self.meta, 7.0, 1.0, False) <= 1):
            twice = 1  # it embeds its guidance
        low, usual, high = check_range("batch", sizes.batch)
        ranges["batch"] = (low * least, usual * twice, high * twice)
        ranges["tokens"] = check_range("tokens", sizes.tokens or (self._tokens(),) * 3)
        clip = self.clip_tokens
        if self.kind in ("sd", "sdxl") and any(value % clip for value in ranges["tokens"]):
            raise InputError(f"tokens {list(ranges['tokens'])} are no multiples of {clip}, which CLIP reads at a time")
        if self.kind == "sd3" and ranges["tokens"][0] <= clip:
            raise InputError(f"tokens {list(ranges['tokens'])} are CLIP's {clip} and at least 1 of T5: use more")
        return ranges

    @property
    def clip_tokens(self) -> int:
        """That a CLIP reads at a time."""
        config = self.meta.text_encoders[0].config
        return min(int(self.meta.tokenizers[0].length), int(config.max_position_embeddings))

    def _tokens(self) -> int:
        """Of the text that the denoiser reads by default."""
        t5 = (self.family.DEFAULTS[self.pipeline] | self.defaults).get("max_sequence_length", 0)
        if not isinstance(t5, int):
            raise InputError(f"the checkpoint's max_sequence_length must be a whole number, not {t5!r}")
        return {"sd3": self.clip_tokens + t5, "flux": t5}.get(self.kind, self.clip_tokens)

    @property
    def text_default(self) -> dict[str, int]:
        """`max_sequence_length` that the engines are tuned for, where the family has it."""
        if self.kind not in ("sd3", "flux"):
            return {}
        return {"max_sequence_length": self.profile["tokens"][1] - (self.clip_tokens if self.kind == "sd3" else 0)}

    def ranges(self, traced: Traced) -> dict[str, Range]:
        """Of the dimensions that a component has."""
        found = {name for dims in traced.dims.values() for dim in dims.values() for name in names(dim)}
        ranges = {name: self.profile[name] for name in self.profile if name in found}
        if traced.component.startswith("text_encoder") and ranges and self.kind == "sd3":
            low, usual, high = ranges["tokens"]  # CLIP's lie beside T5's
            ranges["tokens"] = (low - self.clip_tokens, usual - self.clip_tokens, high - self.clip_tokens)
        return ranges

    def modules(self) -> dict[str, Any]:
        """The modules on the meta device, by the checkpoint's names."""
        named = zip((one.name for one in self.family.ENCODERS), self.meta.text_encoders, strict=True)
        present = {name: module for name, module in named if module is not None}
        return {**present, self.family.DENOISER[0]: self.meta.denoiser, "vae": self.meta.vae}

    def check_loras(self, adapters: Sequence[tuple[lora.Adapter, float]]) -> None:
        """Refuse an adapter for a component that the model has not."""
        for adapter, _ in adapters:
            if lacking := adapter.deltas.keys() - self.modules().keys():
                raise InputError(f"the LoRA {adapter.source!r} is for {few(sorted(lacking))}, which the model lacks")

    def estimates(self) -> list[Estimate]:
        """What each engine will take: its weights, which aoti has in files that engines share.

        Of int8 the denoiser's linear layers and convolutions count a byte a weight.
        """
        sizes = {name: sum(one.numel() for one in module.parameters()) for name, module in self.modules().items()}
        only = 0
        denoiser = self.meta.denoiser
        for name in denoiser.prepare_only():
            only += sum(one.numel() for one in denoiser.get_submodule(name).parameters())
        total = sizes.pop(self.family.DENOISER[0])
        vae = sizes.pop("vae")
        encoder = sum(one.numel() for one in self.meta.vae.encoder.parameters())
        counts = {**sizes, "prepare": only, "denoiser": total - only, "vae_decoder": vae - encoder}
        counts["vae_encoder"] = encoder
        itemsize = {"float32": 4, "int8": 1}
        return [
            Estimate(
                name,
                lane,
                counts[name] * (4 if lane.in_float32 and lane.precision != "int8" else itemsize.get(lane.precision, 2)),
                int(2.5 * 4 * (total if name in ("prepare", "denoiser") else counts[name])),
            )
            for name in self.components
            for lane in self.lanes
        ]


def check_range(name: str, values: Sequence[int]) -> Range:
    """Three numbers with 1 <= min <= opt <= max.

    Raises:
        InputError: they are not.
    """
    low, usual, high = values
    if not 1 <= low <= usual <= high:
        raise InputError(f"{name} {low}:{usual}:{high} is no range: use min:opt:max with 1 <= min <= opt <= max")
    return low, usual, high
