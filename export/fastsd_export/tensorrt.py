"""ONNX graphs to plans of TensorRT 11 and of TensorRT for RTX, and new weights into plans that take them.

Networks are strongly typed: the arithmetic is in the precision that the graph was exported in.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, SupportsInt

from fastsd import integrity, store
from fastsd.backends.base import extent
from fastsd.backends.tensorrt import (
    DTYPES,
    STRIPPED,
    Log,
    apply_weights,
    cache_name,
    deserialize,
    errors,
    library,
    refitter,
    set_weights_from_onnx,
)
from fastsd.bundle import Range
from fastsd.errors import InputError
from fastsd.files import few, one_line
from fastsd_export.trace import names

if TYPE_CHECKING:
    import tensorrt as trt

Ranges = Mapping[str, Range]  # min, opt and max of "batch", "height", "width", "tokens"
Progress = Callable[[str, int, int], object]  # phase, steps done, of how many

# The option `refit`: which weights the plan holds, and which it takes later.
REFIT: dict[str | None, tuple[str, ...]] = {  # -> builder flags
    None: (),  # all, for good
    "refit": ("REFIT",),  # all, and any others
    "strip": ("STRIP_PLAN", "REFIT"),  # none, and any
    "identical": ("STRIP_PLAN", "REFIT_IDENTICAL"),  # none, and only those it was built with: that costs no speed
}
HARDWARE = {None: "NONE", "ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Built:
    """What a build made.

    Attributes:
        files: in the folder; the first is the plan.
        options: what `fastsd.backends.tensorrt.load` needs.
        versions: of the libraries.
        machine: GPU it was built on; empty for RTX, which needs none.
        seconds: it took.
        warnings: what the builder said.
    """

    files: tuple[Path, ...]
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: float
    warnings: tuple[str, ...] = field(default=())


def build(
    onnx_path: Path,
    ranges: Ranges | Sequence[Ranges],
    folder: Path,
    *,
    precision: str,
    rtx: bool = False,
    level: int = 3,
    workspace: int | None = None,
    aux_streams: int | None = None,
    timing_cache: Path | None = None,
    refit: str | None = None,
    weight_streaming: bool = False,
    version_compatible: bool = False,
    hardware_compatibility: str | None = None,
    compute_capabilities: Sequence[str] = (),
    tf32: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Build the plan of a component on this machine: for TensorRT on its GPU, for RTX ahead of time on any machine.

    Args:
        onnx_path: the graph; data outside it lies beside it.
        ranges: of the dimensions that the graph leaves open, by their names; several of them give one plan with as many
            profiles, for each of which the kernels are chosen anew.
        folder: where `<name of the graph>.plan` goes.
        precision: of the graph, "float32", "float16" or "bfloat16"; checked, as nothing here could change it.
        rtx: TensorRT for RTX.
        level: how long the builder may search, 0 to 5.
        workspace: bytes of GPU memory that a layer may use; None: all.
        aux_streams: streams beside ours that the plan may use; None: as the builder thinks fit.
        timing_cache: folder with one file for each model of GPU and version, which makes the next build faster; not
            for RTX, which has no use for it.
        refit: a key of `REFIT`.
        weight_streaming: weights may stay in host memory where the GPU's is too small, at a price in speed.
        version_compatible: later versions of TensorRT run it; not for RTX.
        hardware_compatibility: which other GPUs run it, a key of `HARDWARE`; at some cost in speed.
        compute_capabilities: for RTX, which GPUs run it, such as "SM89"; none: those the library thinks fit.
        tf32: let float32 layers round their factors to 10 bits.
        progress: called from the builder's threads after each step; what it raises ends the build.

    Raises:
        InputError: an option, the graph or the machine does not allow it; the sentence has what the builder said.
        MissingExtraError: the library is not installed.
    """
    target = "tensorrt-rtx" if rtx else "tensorrt"
    profiles = [ranges] if isinstance(ranges, Mapping) else list(ranges)
    _check_options(
        profiles, precision, rtx, level, refit, version_compatible, hardware_compatibility, compute_capabilities
    )
    trt = library(target)
    log = Log(trt, target)
    machine = {} if rtx else _gpu()
    started = time.perf_counter()
    try:
        builder = trt.Builder(log.logger)
    except TypeError:  # the bindings' way to say that the library gave none
        log.refuse(f"{log.name} does not start", "it builds on the GPU that is to run the engine")
    network, config = builder.create_network(0), builder.create_builder_config()
    if network is None or config is None:
        log.refuse(f"{log.name} gave no network or no configuration", "see that the GPU and its driver work")
    _parse(trt, log, network, onnx_path, precision)
    flags = {
        **dict.fromkeys(REFIT[refit], True),
        "TF32": tf32,
        "WEIGHT_STREAMING": weight_streaming,
        "VERSION_COMPATIBLE": version_compatible,
    }
    for name, on in flags.items():
        flag = getattr(trt.BuilderFlag, name)
        (config.set_flag if on else config.clear_flag)(flag)
    config.builder_optimization_level = level
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[hardware_compatibility])
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if aux_streams is not None:
        config.max_aux_streams = aux_streams
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for index, name in enumerate(compute_capabilities):
            if not config.set_compute_capability(_member(trt.ComputeCapability, name), index):
                log.refuse(f"{log.name} does not build for {name}", "name another compute capability")
    _add_profiles(trt, log, builder, network, config, profiles)
    timing = timing_cache / cache_name(machine["gpu"], trt.__version__, "timing") if timing_cache and not rtx else None
    cache = _use_timing_cache(log, config, timing) if timing else None
    monitor = config.progress_monitor = _monitor(trt, progress)
    log.said()  # what it said until now is no reason for what may fail from here on
    plan = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        log.refuse(
            f"{log.name} cannot build {onnx_path.name!r}",
            "see the reason in brackets; a narrower profile, a lower level or more free GPU memory may help",
        )
    files = [folder / f"{onnx_path.stem}.plan"]
    store.write_atomically(files[0], memoryview(plan))
    if timing is not None and cache is not None:
        _keep_timing_cache(config, cache, timing)
    options: dict[str, Any] = {
        "refit": refit,
        "weight_streaming": weight_streaming,
        "version_compatible": version_compatible,
        "profiles": [dict(profile) for profile in profiles],
    }
    if refit in STRIPPED:
        for name in (onnx_path.name, *sorted(integrity.external_files(onnx_path))):
            files.append(folder / name)
            if folder.resolve() != onnx_path.parent.resolve():  # not a hard link: onnx refuses data that has two
                shutil.copyfile(onnx_path.parent / name, folder / name)
        options["weights"] = onnx_path.name
    return Built(
        files=tuple(files),
        options=options,
        versions={target: trt.__version__, "onnx parser": str(trt.get_nv_onnx_parser_version())},
        machine=machine,
        seconds=time.perf_counter() - started,
        warnings=tuple(log.take()[1]),
    )


def refit(plan: Path, onnx_path: Path, *, rtx: bool = False) -> memoryview:
    """A plan with the weights of an ONNX file, on the GPU it is for.

    Args:
        plan: built with `refit="refit"`, "strip" or "identical"; for the last the file must be the one it was built of.
        onnx_path: the same graph as the plan's, with other weights or with those that the plan lacks.
        rtx: as at its build.

    Returns:
        The plan with all its weights, which can be refitted again as before.

    Raises:
        InputError: the plan takes no weights, or not these.
    """
    target = "tensorrt-rtx" if rtx else "tensorrt"
    trt = library(target)
    log = Log(trt, target)
    engine, runtime = deserialize(trt, log, plan, host_code=True)
    worker = refitter(trt, log, engine)
    set_weights_from_onnx(trt, log, worker, onnx_path)
    apply_weights(log, worker)
    config, flags = engine.create_serialization_config(), trt.SerializationFlag
    if not (config.clear_flag(flags.EXCLUDE_WEIGHTS) and config.set_flag(flags.INCLUDE_REFIT)):
        log.refuse("the plan cannot be written with its weights", "build it again with them")
    data = engine.serialize_with_config(config)
    del worker, engine, runtime  # in this order: each needs the next
    if data is None:
        log.refuse("the plan with its new weights cannot be written", "build it again with them")
    return memoryview(data)


def _check_options(
    profiles: Sequence[Ranges],
    precision: str,
    rtx: bool,
    level: int,
    refit: str | None,
    version_compatible: bool,
    hardware_compatibility: str | None,
    compute_capabilities: Sequence[str],
) -> None:
    if precision not in ("float32", "float16", "bfloat16"):
        raise InputError(f"the precision {precision!r} is unknown: use 'float32', 'float16' or 'bfloat16'")
    if not 0 <= level <= 5:
        raise InputError(f"the builder's level {level} is out of range: use 0 to 5")
    if refit not in REFIT:
        raise InputError(f"refit={refit!r} is unknown: use {', '.join(map(repr, REFIT))}")
    if hardware_compatibility not in HARDWARE:
        raise InputError(
            f"hardware_compatibility={hardware_compatibility!r} is unknown: use {', '.join(map(repr, HARDWARE))}"
        )
    if rtx and (version_compatible or hardware_compatibility):
        raise InputError(
            "TensorRT for RTX has no version- or hardware-compatible plans: name the GPUs in compute_capabilities"
        )
    if compute_capabilities and not rtx:
        raise InputError("compute_capabilities are for TensorRT for RTX: TensorRT builds on the GPU that is to run it")
    if not profiles:
        raise InputError("there are no ranges: give at least one, which may be empty for a graph of fixed shapes")
    for profile in profiles:
        for name, (least, best, most) in profile.items():
            if not 1 <= least <= best <= most:
                raise InputError(
                    f"the range of {name} is {least}:{best}:{most}: give minimum, optimum and maximum in this order"
                )


def _parse(trt: ModuleType, log: Log, network: trt.INetworkDefinition, path: Path, precision: str) -> None:
    """Read the graph into the network; every attention may fall back to plain layers."""
    if not path.is_file():
        raise InputError(f"{str(path)!r} is not a file: export the graph first")
    try:
        parser = trt.OnnxParser(network, log.logger)
    except TypeError:
        log.refuse(f"{log.name} gave no parser", "install it anew")
    # Some files that are no graph it takes for an empty one.
    if not parser.parse_from_file(str(path)) or network.num_outputs == 0:
        log.refuse(f"{path.name!r} cannot be read{errors(parser)}", "export the graph with fastsd")
    found = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        found |= {DTYPES.get(layer.get_output_type(output).name) for output in range(layer.num_outputs)}
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Without this the build fails where no fused kernel has the head's size. The bindings hand out the base
            # class, which has no `attention`.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    if precision not in found:
        floats = sorted(name for name in found if name and "float" in name)
        raise InputError(
            f"{path.name!r} computes in {few(floats)}, not in {precision}: export the graph in {precision}, as "
            "TensorRT takes its precision from there"
        )


def _add_profiles(
    trt: ModuleType,
    log: Log,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    profiles: Sequence[Ranges],
) -> None:
    """Minimum, optimum and maximum of every input of the network."""
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            dims: list[Range] = []
            for axis, size in enumerate(tensor.shape):
                name = tensor.get_dimension_name(axis) or f"dimension {axis} of {tensor.name}"
                dims.append((size, size, size) if size >= 0 else _range(name, ranges))
            low, best, high = (trt.Dims([dim[limit] for dim in dims]) for limit in range(3))
            profile.set_shape(tensor.name, low, best, high)
        if not profile or config.add_optimization_profile(profile) < 0:
            log.refuse(f"the profile {dict(ranges)} was not taken", "give other ranges")


def _range(dim: str, ranges: Ranges) -> Range:
    """Of a dimension's name, or of an expression of names such as "8*height"."""
    if not names(dim) <= ranges.keys():
        raise InputError(f"the graph leaves {dim!r} open, and ranges are given of {few(ranges)}: give one of it too")
    low, best, high = (extent(dim, {name: ranges[name][index] for name in names(dim)}) for index in range(3))
    return low, best, high


def _member(enumeration: Any, name: str) -> Any:
    members = enumeration.__members__
    if name not in members:
        raise InputError(f"{name!r} is unknown: use {', '.join(members)}")
    return members[name]


def _gpu() -> dict[str, Any]:
    """The current GPU, by which the plan and the timing cache are valid."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "TensorRT builds on the GPU that is to run the engine, and torch sees none: use such a machine"
        )
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": list(torch.cuda.get_device_capability()),
    }


def _use_timing_cache(log: Log, config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Start from the file, or from nothing where there is none or it is not of this machine.

    The configuration does not keep the cache alive; whoever builds has to.
    """
    for data in (_read(path), b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    log.refuse("the builder takes no timing cache", "build without one")


def _keep_timing_cache(config: trt.IBuilderConfig, cache: trt.ITimingCache, path: Path) -> None:
    """Write what was timed, and what another build has written meanwhile; without it the next build takes longer."""
    other = config.create_timing_cache(_read(path))
    if other is not None:
        cache.combine(other, ignore_mismatch=False)  # False: it is of another machine, and is replaced
    data = cache.serialize()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomically(path, memoryview(data))
    except (OSError, InputError) as error:
        warnings.warn(f"the timing cache {str(path)!r} is not written: {one_line(error)}", stacklevel=3)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _monitor(trt: ModuleType, progress: Progress | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Counts steps, and ends the build on an exception, be it Ctrl-C.

        Its methods are called from several threads, and nothing may be raised into the library.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
            self.steps[phase_name] = int(num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            try:
                if progress is not None:
                    done = int(step) + 1
                    progress(phase_name, done, self.steps.get(phase_name, done))
            except BaseException as error:
                self.error = error
            return self.error is None

    return Monitor()
