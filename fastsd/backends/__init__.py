"""Backends: one file each. All give the same functions, so the straight line cannot tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastsd.arrays import Array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastsd.sampling.loop import Step
    from fastsd.sampling.table import StepTable
    from fastsd.text import Conditioning, Encoding


ROWS = 64  # rows that `prepare` computes at a time: a row has the same bits in a run of 4 steps and in one of 50
MODULES = ("eager", "compile")  # those that run the modules of a checkpoint; all others run bundles
# What a caller may ask for by name, and its options; whole graphs are compiled for longer than their repeated blocks.
FORMS: dict[str, dict[str, Any]] = {"eager": {}, "compile": {}, "compile-whole": {"whole": True}}


@dataclass(frozen=True)
class Functions:
    """What the straight line calls; all are pure. Shapes: B batch of the denoiser, both halves of guidance.

    Attributes:
        read: (place of the text encoder, ids [windows][tokens], clip_skip) -> its encoding of one prompt.
        prepare: (timesteps [steps, B], conditioning, (h, w) of the latents) -> modulation [steps, B, M], and whatever
            else the denoiser takes.
        denoise: (latents [B, C, h, w], a row [B, M] of the modulation, the rest of `prepare`) -> prediction, float32.
        sample: (latents, what `prepare` gave, tables, noise=, guidance_rescale=) -> the rows' steps, as
            `sampling.loop.denoise` yields them.
        decode: latents [batch, C, h, w] -> pixels [batch, height, width, 3] in 0..1, float32.
        encode: pixels -> latents, the reverse.
        array: an array, numpy's or torch's, in float32 where the backend computes.
        cast: likewise, in the dtype in which the backend takes the text.
        admit: raises `InputError` if no engine runs (images, halves of guidance, (h, w)); called before all else.
        synchronize: waits for the device.
    """

    read: Callable[[int, list[list[int]], int | None], Encoding]
    prepare: Callable[[Array, Conditioning, tuple[int, int]], tuple[Array, ...]]
    denoise: Callable[..., Array]
    sample: Callable[..., Iterator[Step]]
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    array: Callable[[Any], Array]
    cast: Callable[[Any], Array]
    admit: Callable[[int, int, tuple[int, int]], None]
    synchronize: Callable[[], None]


@dataclass(frozen=True)
class Engines:
    """A checkpoint or a bundle, ready to run.

    Attributes:
        target: of `bundle.TARGETS`, or "eager".
        precision: torch's dtype, or a bundle's name of it.
        device: torch's, or its name.
        functions: what the straight line calls.
        table: see `families.compile_table`, without its first argument.
        modules: what a LoRA may change, by the name of its component; of a bundle those whose weights lie beside its
            engines (aoti).
        loras: those in the weights of a bundle.
        sizes: bytes of a bundle's files, by component.
        compilations: how many the calling thread has run so far.
        keep: keeps for the next process what a warm-up has compiled.
    """

    target: str
    precision: Any
    device: Any
    functions: Functions
    table: Callable[..., StepTable]
    modules: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    compilations: Callable[[], int] = int
    keep: Callable[[], None] = lambda: None


def load_backend(target: str) -> Any:
    """The module of a backend; "tensorrt-rtx" is TensorRT's, and so on."""
    return import_module(f"fastsd.backends.{target.partition('-')[0]}")
