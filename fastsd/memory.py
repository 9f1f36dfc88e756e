"""What each phase of an image takes, what the weights take, and letting go of those that only `prepare` reads.

`phases` needs no weights and computes nothing: a phase goes over fake tensors, and every storage counts from the
operation that makes it until its last reference goes. What torch does not show (scratch memory of the libraries, gaps
of the allocator) is added as it was measured, by `measure`, which runs the same phases for real.

In Flux.1 28 %, in SD3 34 % and in SDXL 14 % of the denoiser's weights are read once per image, before the first step.
They can wait in host memory meanwhile; what bringing them back costs is in `Timings.reload`.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsd import families, text, vae
from fastsd.backends import MODULES
from fastsd.errors import InputError
from fastsd.text import Conditioning

PHASES = ("text", "prepare", "denoise", "decode")


class Bytes(NamedTuple):
    """What a phase takes on its device.

    Attributes:
        weights: of all components that are there meanwhile.
        activations: the most that is alive at once: what came of the phases before, what operations make, the result.
        overhead: what libraries and the allocator take beside, as measured.
    """

    weights: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@dataclass(frozen=True)
class Load:
    """What is asked for at once.

    Attributes:
        height: pixels.
        width: pixels.
        images: of the batch.
        guided: whether the denoiser sees every image twice.
        steps: None: as many as a call has by default.
        tokens: of T5; None: as many as a call has by default.
        tiled: whether the VAE goes over an image in strips.
    """

    height: int
    width: int
    images: int = 1
    guided: bool = True
    steps: int | None = None
    tokens: int | None = None
    tiled: bool = False


def phases(
    components: families.Components,
    load: Load,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    backend: str = "eager",
    release_prepare: bool = False,
) -> dict[str, Bytes]:
    """What each of `PHASES` takes.

    Args:
        components: of a checkpoint; those that `families.load(..., only=())` leaves on the meta device will do.
        load: sizes.
        dtype: of what is on the meta device, as `families.load` takes it; None: as it is.
        device: where it would run; it need not be here, but a torch that was built without CUDA counts plain operations
            in place of the kernels', which make more.
        backend: "eager", or "compile", whose fused operations make no more than is counted here.
        release_prepare: as `Pipeline.from_pretrained` takes it.

    Raises:
        InputError: the backend runs no modules.
    """
    if backend not in MODULES:
        raise InputError(f"the memory of {backend!r} cannot be counted, as it runs engines: use {' or '.join(MODULES)}")
    device = torch.device(device)
    traced = device if torch.version.cuda else torch.device("cpu")  # indexing even a fake tensor needs its library
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _faked(components, dtype, traced)
        resident = sum(size for size, _ in report(_modules(fake)).values())
        waiting = sum(map(_bytes, _prepare_only(fake.denoiser).values()))
        most: dict[str, int] = {}
        live = _Live(*_modules(fake).values())

        @contextmanager
        def count(phase: str) -> Iterator[None]:
            live.most = live.now
            yield
            most[phase] = live.most

        with live, _Attention():
            _straight_line(fake, load, traced, count)
    away = waiting if release_prepare and device.type != "cpu" else 0
    return {
        phase: Bytes(resident - (0 if phase == "prepare" else away), activations, _overhead(activations, device))
        for phase, activations in most.items()
    }


def measure(components: families.Components, load: Load) -> dict[str, int]:
    """Bytes beside the weights that each of `PHASES` really takes at its peak, where the components are.

    On CUDA by torch's own count. On the CPU (of Linux) it is the growth of the resident set: of a process that has done
    the same at a small size, so that the libraries are loaded, and little else.
    """
    device = next(components.denoiser.parameters()).device
    start, peaks = _in_use(device), {}

    @contextmanager
    def watch(phase: str) -> Iterator[None]:
        _forget_peak(device)
        yield
        peaks[phase] = _peak(device) - start

    _straight_line(components, load, device, watch)
    return peaks


def of_vae(module: Any, part: vae.Part, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes beside the weights that `diffusers.AutoencoderKL` takes for one image that is not cut into strips.

    Args:
        module: the VAE.
        part: which half.
        size: height and width of what goes in.
        dtype: in which it computes.
        device: where.
    """
    known = _VAES.setdefault(module, {})
    key = part, dtype, device.type
    if key not in known:
        # All maps grow with the image, and what does not (a norm's statistics) is small: one size tells of all.
        side = _SIDE if part == "decoder" else _SIDE * vae.scale_factor(module)
        known[key] = alive(module, part, (side, side), dtype, device) / side**2
    activations = int(known[key] * size[0] * size[1])
    return activations + _overhead(activations, device)


def alive(
    module: Any,
    part: vae.Part,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    striped: bool = False,
) -> int:
    """The most bytes of tensors that are alive at once in one half of the VAE; arguments as in `of_vae`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _fake(module, dtype, device)
        channels = module.config.latent_channels if part == "decoder" else module.config.in_channels
        maps = torch.empty(1, channels, *size, device=device)
        live = _Live(fake)
        with torch.inference_mode(), live, _Attention():
            vae.in_dtype(fake, part, maps, dtype, striped)
    return live.most


_SIDE = 64  # latents
_VAES: MutableMapping[Any, dict[Any, float]] = weakref.WeakKeyDictionary()  # bytes per element of a map that goes in


def free(device: torch.device) -> int:
    """Bytes that a device has left for this process; where the system does not say, more than there is."""
    if device.type == "cuda":
        # What the allocator holds and does not use can be used again.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    available = _field(_MEMINFO, "MemAvailable")
    room = [sys.maxsize if available is None else 1024 * available]
    for limit, used, cached in _CGROUPS:
        try:
            room.append(int(limit.read_text()) - int(used.read_text()) + (_field(*cached) or 0))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return max(min(room), 0)


_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUPS = (  # limit, use, and what of it are files that can go; version 2 and 1
    (_CGROUP / "memory.max", _CGROUP / "memory.current", (_CGROUP / "memory.stat", "inactive_file")),
    (
        _CGROUP / "memory/memory.limit_in_bytes",
        _CGROUP / "memory/memory.usage_in_bytes",
        (_CGROUP / "memory/memory.stat", "total_inactive_file"),
    ),
)


def _field(path: Path, name: str) -> int | None:
    """The number after a name in one of the kernel's tables."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(words[1]) for line in lines if (words := line.replace(":", " ").split())[:1] == [name]), None)


def _straight_line(
    components: families.Components,
    load: Load,
    device: torch.device,
    around: Callable[[str], AbstractContextManager[None]],
) -> None:
    """All that `Pipeline` runs for an image, with one step, each phase inside `around`."""
    kind = components.index["_class_name"]
    family, denoiser, factor = families.family(kind), components.denoiser, vae.scale_factor(components.vae)
    defaults = family.DEFAULTS[kind]
    tokens = load.tokens or defaults.get("max_sequence_length", 0)
    size = load.height // factor, load.width // factor
    halves = 2 if load.guided else 1
    batch = halves * load.images
    with torch.inference_mode():
        with around("text"):
            encodings = [
                module and text.read(encoder, module, [[0] * _length(encoder, module, tokens)])
                for encoder, module in zip(family.ENCODERS, components.text_encoders, strict=True)
            ]
            context, pooled = family.combine(components, encodings, tokens)
            conditioning = Conditioning(
                torch.cat([context] * batch),
                None if pooled is None else torch.cat([pooled] * batch),
                torch.ones(batch, dtype=torch.float64, device=device),
                torch.ones(batch, 6, device=device) if kind == "StableDiffusionXLPipeline" else None,
            )
        with around("prepare"):
            steps = load.steps or defaults["num_inference_steps"]
            timesteps = torch.ones(steps, batch, dtype=torch.float64, device=device)
            modulation, *others = family.prepare(components, timesteps, conditioning, size)
        with around("denoise"):
            latents = torch.zeros(load.images, components.vae.config.latent_channels, *size, device=device)
            given = torch.cat([latents] * halves)
            prediction = denoiser(given.to(next(denoiser.parameters()).dtype), modulation[0], *others)
            latents = latents + prediction[: load.images]
        del modulation, others, prediction, given
        with around("decode"):
            vae.in_dtype(components.vae, "decoder", latents, components.vae.dtype, striped=load.tiled)


def _length(encoder: text.Encoder, module: Any, tokens: int) -> int:
    return int(module.config.max_position_embeddings) if encoder.is_clip else tokens


class _Live(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, now and at most; views of weights are none of them."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        weights = [one for module in modules for one in (*module.parameters(), *module.buffers())]
        self._known = {one.untyped_storage()._cdata for one in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
            with self:  # the operations that this one is made of make tensors too
                result = func._op_dk(composite, *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if func is torch.ops.aten.convolution.default and args[1].device.type == "cpu":
            self.most = max(self.most, self.now + _bytes(args[1]))  # oneDNN brings the weights into its own order
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(TorchFunctionMode):
    """Attention makes its result and a sum per query, as every fused kernel does; no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        *outer, queries, _ = query.shape
        sums = query.new_empty((*outer, queries), dtype=torch.float32)
        if len(outer) != 2:
            return query.new_empty((*sums.shape, value.shape[-1]))
        # As the kernels leave it: the heads of a token side by side.
        return query.new_empty((outer[0], queries, outer[1], value.shape[-1])).transpose(1, 2)


def _modules(components: families.Components) -> dict[str, nn.Module]:
    parts = [components.denoiser, components.vae, *components.text_encoders]
    return {str(place): part for place, part in enumerate(parts) if part is not None}


def _faked(components: families.Components, dtype: torch.dtype | None, device: torch.device) -> families.Components:
    """Components of fake tensors; to be called in a `FakeTensorMode`."""
    family = families.family(components.index["_class_name"])
    of_vae = None if dtype is None else families._vae_dtype(family, dtype)
    return replace(
        components,
        denoiser=_fake(components.denoiser, dtype, device),
        vae=_fake(components.vae, of_vae, device),
        text_encoders=tuple(module and _fake(module, dtype, device) for module in components.text_encoders),
    )


def _fake(module: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A copy whose weights have no data; those on the meta device are in the dtype as `checkpoint.assign` has them."""
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    copies: dict[int, Any] = {}
    stored = module.state_dict(keep_vars=True)
    for name, tensor in (stored | dict(module.named_buffers())).items():
        kind = tensor.dtype
        if dtype is not None and tensor.is_meta and name in stored and tensor.is_floating_point():
            kind = torch.float32 if wide.intersection(name.split(".")) else dtype
        empty = torch.empty(tensor.shape, dtype=kind, device=device)
        copies[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, copies)


def _overhead(activations: int, device: torch.device) -> int:
    """What a run takes beyond the tensors.

    On the CPU: 5 % and 16 MB, for scratch memory and what glibc keeps. With Stable Diffusion 1.5 at 512 pixels and the
    demo at 384 and 512 it was 0 to 10 % with MALLOC_MMAP_THRESHOLD_=262144 set, and without, from run to run, up to
    30 % or 64 MB of maps that were freed. On CUDA: cuBLAS' workspace on Hopper, not measured yet.
    """
    return 32 * 2**20 if device.type == "cuda" else activations // 20 + 16 * 2**20


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 1024 * (_field(_STATUS, "VmRSS") or 0)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * (_field(_STATUS, "VmHWM") or 0)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


_STATUS = Path("/proc/self/status")


def report(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Bytes of weights by component, and how many of them only `prepare` reads."""
    sizes = {}
    for name, module in modules.items():
        weights = [*module.parameters(), *module.buffers()]
        waiting = _prepare_only(module) if hasattr(module, "prepare_only") else {}
        sizes[name] = (sum(map(_bytes, weights)), sum(map(_bytes, waiting.values())))
    return sizes


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _prepare_only(denoiser: Any) -> dict[str, nn.Parameter]:
    modules = {name: denoiser.get_submodule(name) for name in denoiser.prepare_only()}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.named_parameters()}


def _version(parameter: Tensor) -> int | None:
    """Grows with every write; tensors made in inference mode have none."""
    return None if parameter.is_inference() else parameter._version


class Waiting:
    """The weights that only `prepare` reads, in host memory while nobody is inside `resident`.

    On the CPU nothing is saved: host memory is where they are.
    """

    def __init__(self, denoiser: Any) -> None:
        self._parameters = _prepare_only(denoiser)
        self._host: dict[str, Tensor] = {}
        self._lock = threading.RLock()
        self._depth = 0

    @contextmanager
    def resident(self) -> Iterator[float]:
        """The weights are on their device inside; yields the seconds that this took. One thread at a time."""
        with self._lock:
            started = time.perf_counter()
            if self._depth == 0:
                self._bring_back()
            self._depth += 1
            versions = {name: _version(parameter) for name, parameter in self._parameters.items()}
            try:
                yield time.perf_counter() - started
            finally:
                self._depth -= 1
                for name, parameter in self._parameters.items():
                    if _version(parameter) != versions[name]:  # a LoRA wrote to it
                        self._host.pop(name, None)
                if self._depth == 0:
                    self._let_go()

    def _bring_back(self) -> None:
        for name, kept in self._host.items():
            parameter = self._parameters[name]
            parameter.data = kept.to(parameter.device, non_blocking=True)
        devices = {parameter.device for parameter in self._parameters.values() if parameter.is_cuda}
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def _let_go(self) -> None:
        for name, parameter in self._parameters.items():
            if name not in self._host:
                host = parameter.data.cpu()
                self._host[name] = host.pin_memory() if parameter.is_cuda else host
            # The shape stays; whoever reads a weight that is not there gets NaN, which the pipeline refuses.
            hole = torch.full((1,), float("nan"), dtype=parameter.dtype, device=parameter.device)
            parameter.data = hole.expand(parameter.shape)
