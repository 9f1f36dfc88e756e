"""Every kernel at every real shape, right first, then how fast: `python -m fastsd_benchmarks.kernels`.

The gate: the largest error against the same computation in float64 is at most twice that of plain torch in the same
dtype, plus one rounding of the result. A row that fails it has no time. Peers run in the same process, in turns:
torch's SDPA (its backends by name), `fa3-fwd` and `sageattention` where installed, torch's eager operations and
inductor's fusion. Without CUDA everything runs once at tiny size on the CPU, where ops are their references: a dry run,
which measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fastsd_benchmarks.measure import Call, ceilings, deviation, environment, in_graph, medians


class Problem(NamedTuple):
    """One op on one set of inputs."""

    ours: Call  # the op
    check: Call  # the op on fresh inputs: its results, all or some of them
    exact: Call  # the same results in float64
    plain: Call  # the same in plain torch, in the op's dtype
    peers: Mapping[str, Call]
    flops: float
    nbytes: float  # that must be read and written


class Case(NamedTuple):
    """An op at a shape of a real model."""

    op: str
    name: str
    make: Callable[[torch.device, torch.dtype, bool], Problem]


def normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers: products of zeros would be faster."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


# ------------------------------------------------------------------------------------------------------------
# Attention


def sdpa(parts: list[Tensor]) -> Tensor:
    """Torch's attention of q, k and v [batch, heads, tokens, dim]."""
    q, k, v = parts
    return F.scaled_dot_product_attention(q, k, v)


def attention_case(name: str, batch: int, heads: int, queries: int, keys: int, dim: int, op: str = "attention") -> Case:
    """q, k and v as slices of one packed buffer where the tokens attend to themselves."""

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        module = importlib.import_module(f"fastsd_kernels.{op}")
        shape = (batch, heads, queries, keys)
        b, h, sq, sk = (1, 2, -(-queries // 16), keys if keys < 256 else -(-keys // 16)) if tiny else shape
        if queries == keys:
            q, k, v = normal(b, sq, 3, h, dim, device=device, dtype=dtype).unbind(2)
        else:
            q = normal(b, sq, h, dim, device=device, dtype=dtype)
            k, v = normal(b, sk, 2, h, dim, device=device, dtype=dtype, seed=1).unbind(2)
        call = getattr(module, op)

        def part(result: Tensor) -> Tensor:
            return result[:1, :, :2]  # float64 of all heads would not fit everywhere

        def by_torch(wide: torch.dtype) -> Tensor:
            parts = [part(one).to(wide).transpose(1, 2) for one in (q, k, v)]
            return sdpa(parts).transpose(1, 2)

        return Problem(
            ours=lambda: call(q, k, v),
            check=lambda: part(call(q, k, v)),
            exact=lambda: by_torch(torch.float64),
            plain=lambda: by_torch(dtype),
            peers=attention_peers(q, k, v),
            flops=4.0 * b * h * sq * sk * dim,
            nbytes=float(q.element_size() * b * h * dim * 2 * (sq + sk)),
        )

    return Case(op, name, make)


def eight_bit_case(op: str, name: str, batch: int, heads: int, tokens: int, dim: int, text: int = 0) -> Case:
    """Attention in eight bits behind norms (and rotation in Flux), all in the time; the peers only attend.

    With a text, it and the image have buffers and norms of their own. Plain torch attends to the same numbers, the
    weights of float8 rounded as the kernel's are.
    """

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        from fastsd_kernels import attention_8bit, quantize_qkv
        from fastsd_kernels.qk_norm_rope import reference as norm

        float8 = op == "attention_fp8"
        b, h = (1, 2) if tiny else (batch, heads)
        lengths = [-(-n // 16) if tiny else n for n in (text, tokens) if n]
        streams: list[tuple[Any, ...]] = []
        for seed, length in enumerate(lengths):
            qkv = normal(b, length, 3, h, dim, device=device, dtype=dtype, seed=seed)
            weights = [1 + 0.1 * normal(dim, device=device, dtype=dtype, seed=10 * seed + i) for i in (1, 2)]
            angles = normal(length, dim // 2, device=device, dtype=torch.float32, seed=10 * seed + 3)
            streams.append((qkv, *weights, torch.stack([angles.cos(), angles.sin()]) if dim == 128 else None))

        def arguments(heads_of: slice) -> list[Any]:
            """Of the image first, then of the text."""
            return [
                argument
                for qkv, *prologue in reversed(streams)
                for argument in (*(qkv[:, :, i, heads_of] for i in range(3 if float8 else 2)), *prologue)
            ]

        def values(heads_of: slice) -> list[Tensor]:
            return [qkv[:, :, 2, heads_of] for qkv, *_ in reversed(streams)]

        def call(inputs: list[Any], v: list[Tensor]) -> Tensor:
            if float8:
                quantised = quantize_qkv.quantize_qkv(*inputs)
                result: Tensor = attention_8bit.attention_fp8(*quantised, lengths[-1], sum(lengths[:-1]), dtype)
            else:
                result = attention_8bit.attention_int8(*quantize_qkv.quantize_qk(*inputs), *v)
            return result

        def normed(heads_of: slice, wide: torch.dtype) -> list[Tensor]:
            parts = [qkv[:, :, :, heads_of].to(wide, copy=True) for qkv, *_ in streams]
            for part, (_, *prologue) in zip(parts, streams, strict=True):
                q_weight, k_weight, rotary = (x if x is None else x.to(wide) for x in prologue)
                norm(part, q_weight, k_weight, rotary)
            return [one.transpose(1, 2) for one in torch.cat(parts, 1).unbind(2)]

        def by_numbers() -> Tensor:
            if not float8:
                quantised = quantize_qkv.quantize_qk(*arguments(few))
                return attention_8bit.reference_int8(*quantised, *values(few))
            quantised = quantize_qkv.quantize_qkv(*arguments(few))
            said = (*quantised, lengths[-1], sum(lengths[:-1]), torch.float32)
            exact = attention_8bit.reference_fp8(*said)
            q, k, v = normed(few, torch.float32)
            weights = (q @ k.transpose(2, 3) / math.sqrt(dim)).softmax(-1)
            largest = weights.amax(-1, keepdim=True) / 448
            rounded = (weights / largest).to(torch.float8_e4m3fn).float() * largest
            return (exact + ((rounded - weights) @ v).transpose(1, 2)).to(dtype)

        few, all_ = slice(0, 2), slice(None)
        inputs, v, total = arguments(all_), values(all_), sum(lengths)
        packed = normal(b, total, 3, h, dim, device=device, dtype=dtype)
        return Problem(
            ours=lambda: call(inputs, v),
            check=lambda: call(arguments(few), values(few)),
            exact=lambda: sdpa(normed(few, torch.float64)).transpose(1, 2),
            plain=by_numbers,
            peers=attention_peers(*packed.unbind(2)),
            flops=4.0 * b * h * total * total * dim,
            nbytes=float(packed.element_size() * b * h * dim * 4 * total),
        )

    return Case(op, name, make)


def attention_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Other implementations that run these inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    swapped = [one.transpose(1, 2) for one in (q, k, v)]
    peers: dict[str, Call] = {"sdpa": lambda: sdpa(swapped)}
    if q.device.type != "cuda":
        return peers
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel([backend]):
                return sdpa(swapped)

        peers[f"sdpa-{name}"] = call
    for module, function in (("fa3_fwd_interface", "flash_attn_func"), ("flash_attn_interface", "flash_attn_func")):
        try:
            fa3 = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError):
            continue
        peers["fa3"] = partial(fa3, q, k, v)
        break
    with contextlib.suppress(ImportError, AttributeError):
        peers["sage"] = partial(importlib.import_module("sageattention").sageattn, *swapped)
    return {name: call for name, call in peers.items() if _runs(call)}


def _runs(call: Call) -> bool:
    try:
        call()
        torch.cuda.synchronize()
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return False
    return True


def sdpa_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that torch's SDPA takes on its own for Flux's shape, by the name that the profiler sees."""
    if device.type != "cuda":
        return "cpu"
    from torch.profiler import ProfilerActivity, profile

    q = normal(1, 24, 4608, 128, device=device, dtype=dtype)
    F.scaled_dot_product_attention(q, q, q)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        F.scaled_dot_product_attention(q, q, q)
        torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages() if "attention" in event.key or "cudnn" in event.key]
    return ", ".join(sorted(names)) or "unknown"


def joint_case(name: str, batch: int, heads: int, text: int, image: int, dim: int) -> Case:
    """Text and image tokens in buffers of their own."""

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        from fastsd_kernels.joint_attention import joint_attention

        b, h, st, si = (1, 2, -(-text // 16), -(-image // 16)) if tiny else (batch, heads, text, image)
        inputs = [
            one
            for seed, tokens in enumerate((st, si))
            for one in normal(b, tokens, 3, h, dim, device=device, dtype=dtype, seed=seed).unbind(2)
        ]

        def joined(wide: torch.dtype, some: slice) -> tuple[Tensor, Tensor]:
            parts = [
                torch.cat([inputs[i][some, :, some], inputs[3 + i][some, :, some]], 1).to(wide).transpose(1, 2)
                for i in range(3)
            ]
            out = sdpa(parts).transpose(1, 2)
            return out[:, :st], out[:, st:]

        few, all_ = slice(0, 1), slice(None)
        total = st + si
        return Problem(
            ours=lambda: joint_attention(*inputs),
            check=lambda: tuple(one[few, :, few] for one in joint_attention(*inputs)),
            exact=lambda: joined(torch.float64, few),
            plain=lambda: joined(dtype, few),
            peers={"cat + sdpa": lambda: joined(dtype, all_)},
            flops=4.0 * b * h * total * total * dim,
            nbytes=float(inputs[0].element_size() * b * h * dim * 4 * total),
        )

    return Case("joint_attention", name, make)


# ------------------------------------------------------------------------------------------------------------
# What is bound by bytes


def with_inductor(eager: Callable[..., Any], *inputs: Any) -> dict[str, Call]:
    """Torch's operations one by one, and fused by inductor (on CUDA)."""
    peers: dict[str, Call] = {"eager": lambda: eager(*inputs)}
    if any(isinstance(one, Tensor) and one.is_cuda for one in inputs):
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        peers["inductor"] = lambda: compiled(*inputs)
    return {name: call for name, call in peers.items() if _runs_anywhere(call)}


def _runs_anywhere(call: Call) -> bool:
    return _runs(call) if torch.cuda.is_available() else True


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As a diffusers block does it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def tokens_case(op: str, name: str, batch: int, tokens: int, width: int) -> Case:
    """Ops on [batch, tokens, width] with rows of a packed modulation."""

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        b, length, dim = (1, 33, 64) if tiny else (batch, tokens, width)
        x = normal(b, length, dim, device=device, dtype=dtype)
        update = normal(b, length, dim, device=device, dtype=dtype, seed=1)
        shift, scale, gate = normal(b, 3 * dim, device=device, dtype=dtype, seed=2).chunk(3, dim=1)
        size = x.element_size() * x.numel()
        exact = [one.double() for one in (x, update, shift, scale, gate)]

        def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
            return x + gate.unsqueeze(1) * update

        if op == "modulate":
            from fastsd_kernels.modulate import modulate

            return Problem(
                ours=lambda: modulate(x, shift, scale),
                check=lambda: modulate(x, shift, scale),
                exact=lambda: modulated(exact[0], exact[2], exact[3]),
                plain=lambda: modulated(x, shift, scale),
                peers=with_inductor(modulated, x, shift, scale),
                flops=12.0 * x.numel(),
                nbytes=2.0 * size,
            )
        if op == "gate_residual":
            from fastsd_kernels.gate_residual import gate_residual

            return Problem(
                ours=lambda: gate_residual(x, gate, update),
                check=lambda: gate_residual(x, gate, update),
                exact=lambda: gated(exact[0], exact[4], exact[1]),
                plain=lambda: gated(x, gate, update),
                peers=with_inductor(gated, x, gate, update),
                flops=2.0 * x.numel(),
                nbytes=3.0 * size,
            )
        from fastsd_kernels import quantize

        def scaled(quantised: tuple[Tensor, Tensor]) -> Tensor:
            return quantised[0].float() * quantised[1]

        def rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
            scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
            return (x.float() / scale).to(torch.float8_e4m3fn), scale

        forms: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]] = {
            "quantize_rowwise": (quantize.quantize_rowwise, lambda x: x, (x,), (exact[0],)),
            "quantize_gelu": (
                quantize.quantize_gelu,
                lambda x: F.gelu(x, approximate="tanh"),
                (x,),
                (exact[0],),
            ),
            "quantize_modulate": (
                quantize.quantize_modulate,
                modulated,
                (x, shift, scale),
                (exact[0], exact[2], exact[3]),
            ),
        }
        call, before, inputs, wide = forms[op]
        return Problem(
            ours=lambda: call(*inputs),
            check=lambda: scaled(call(*inputs)),
            exact=lambda: before(*wide),
            plain=lambda: scaled(rowwise(before(*inputs))),
            peers=with_inductor(lambda *given: rowwise(before(*given)), *inputs),
            flops=12.0 * x.numel(),
            nbytes=1.5 * size,
        )

    return Case(op, name, make)


def qk_case(name: str, batch: int, tokens: int, heads: int, width: int, rope: bool) -> Case:
    """Norm and rotation of queries and keys, in place on a packed buffer."""

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        from fastsd_kernels.qk_norm_rope import qk_norm_rope

        b, length, h = (1, 33, 2) if tiny else (batch, tokens, heads)
        qkv = normal(b, length, 3, h, width, device=device, dtype=dtype)
        weights = [1 + 0.1 * normal(width, device=device, dtype=dtype, seed=seed) for seed in (1, 2)]
        angles = normal(length, width // 2, device=device, dtype=torch.float32, seed=3)
        rotary = torch.stack([angles.cos(), angles.sin()]) if rope else None

        def by_torch(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
            out = []
            for part, weight in ((0, q_weight), (1, k_weight)):
                one = F.rms_norm(qkv[:, :, part], (width,), weight, 1e-6)
                if rotary is not None:
                    cos, sin = (table.to(one.dtype)[None, :, None] for table in rotary)
                    even, odd = one[..., ::2], one[..., 1::2]
                    one = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3)
                out.append(one)
            return torch.stack(out, 2)

        def fresh() -> Tensor:
            copy = qkv.clone()
            qk_norm_rope(copy, *weights, rotary)
            return copy[:, :, :2]

        scratch = qkv.clone()
        return Problem(
            ours=lambda: qk_norm_rope(scratch, *weights, rotary),
            check=fresh,
            exact=lambda: by_torch(qkv.double(), *(weight.double() for weight in weights)),
            plain=lambda: by_torch(qkv, *weights),
            peers=with_inductor(by_torch, qkv, *weights),
            flops=10.0 * 2 / 3 * qkv.numel(),
            nbytes=2.0 * 2 / 3 * qkv.element_size() * qkv.numel(),
        )

    return Case("qk_norm_rope", name, make)


def group_norm_case(name: str, batch: int, channels: int, side: int, last: bool) -> Case:
    """Group norm of 32 groups and SiLU over a feature map."""

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        from fastsd_kernels.group_norm_silu import group_norm_silu

        b, c, n = (1, 64, 16) if tiny else (batch, channels, side)
        layout = torch.channels_last if last else torch.contiguous_format
        x = normal(b, c, n, n, device=device, dtype=dtype).to(memory_format=layout)
        weight, bias = (normal(c, device=device, dtype=dtype, seed=seed) for seed in (1, 2))

        def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))

        return Problem(
            ours=lambda: group_norm_silu(x, 32, weight, bias),
            check=lambda: group_norm_silu(x, 32, weight, bias),
            exact=lambda: by_torch(x.double(), weight.double(), bias.double()),
            plain=lambda: by_torch(x, weight, bias),
            peers=with_inductor(by_torch, x, weight, bias),
            flops=10.0 * x.numel(),
            nbytes=2.0 * x.element_size() * x.numel(),  # a map beyond the L2 cache must be read twice: 3.0
        )

    return Case("group_norm_silu", name, make)


def geglu_case(name: str, batch: int, tokens: int, inner: int) -> Case:
    """Values times GELU of the gates, from one packed buffer."""

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        from fastsd_kernels.geglu import geglu

        b, length, width = (1, 33, 64) if tiny else (batch, tokens, inner)
        x = normal(b, length, 2 * width, device=device, dtype=dtype)

        def by_torch(x: Tensor) -> Tensor:
            value, gate = x.chunk(2, dim=-1)
            return value * F.gelu(gate)

        return Problem(
            ours=lambda: geglu(x),
            check=lambda: geglu(x),
            exact=lambda: by_torch(x.double()),
            plain=lambda: by_torch(x),
            peers=with_inductor(by_torch, x),
            flops=20.0 * b * length * width,
            nbytes=1.5 * x.element_size() * x.numel(),
        )

    return Case("geglu", name, make)


def step_case(name: str, sampler: str, batch: int, channels: int, side: int, guidance: float) -> Case:
    """A step of a sampler: guidance, update, next input. The peer is what a diffusers pipeline does there."""

    def make(device: torch.device, dtype: torch.dtype, tiny: bool) -> Problem:
        from fastsd.sampling.schedulers import resolve_scheduler
        from fastsd.sampling.table import StepTable
        from fastsd_benchmarks.sampler import SD, SD3
        from fastsd_kernels import step

        b, n = (2, 8) if tiny else (batch, side)
        scheduler = resolve_scheduler(sampler, SD3 if sampler.startswith("flow_") else SD)
        table = StepTable.from_scheduler(scheduler, 10).with_guidance(guidance)
        slots = table.state.shape[1], table.prediction.shape[1], table.noise.shape[1]
        numel, halves = channels * n * n, 2 if guidance > 1 else 1
        coefficients = step.pack([table] * b, *slots).to(device)
        prediction = normal(halves * b, numel, device=device, dtype=dtype)
        history = [normal(max(1, count), b, numel, device=device, dtype=torch.float32, seed=3) for count in slots]
        noises = history[2][: slots[2]]
        index = torch.full((1,), 5, device=device, dtype=torch.int64)

        def run(states: Tensor, predictions: Tensor, model_input: Tensor, flags: Tensor) -> None:
            step.step(prediction, coefficients, index, noises, states, predictions, model_input, flags)

        def buffers(wide: torch.dtype) -> list[Tensor]:
            copies = [history[0].clone().to(wide), history[1].clone().to(wide)]
            return [*copies, prediction.clone().to(dtype), torch.zeros(b, dtype=torch.bool, device=device)]

        def results(states: Tensor) -> Tensor:
            return states[(5 + 1) % states.shape[0]]

        def fresh() -> Tensor:
            own = buffers(torch.float32)
            run(*own)
            return results(own[0])

        def by_reference(wide: torch.dtype) -> Tensor:
            own = buffers(wide)
            step.reference(prediction.to(wide), coefficients.to(wide), index, noises.to(wide), *own)
            return results(own[0])

        scheduler.set_timesteps(10)
        latents = normal(b, channels, n, n, device=device, dtype=torch.float32)
        shaped = prediction.view(halves * b, channels, n, n).float()

        def diffusers_step() -> Any:
            combined = shaped
            if halves == 2:
                negative, positive = shaped.chunk(2)
                combined = negative + guidance * (positive - negative)
            scheduler._step_index = 5
            return scheduler.step(combined, scheduler.timesteps[5], latents, return_dict=False)[0]

        for i in range(5):  # fill its history
            scheduler.step(shaped[:b], scheduler.timesteps[i], latents)
        scratch = buffers(torch.float32)
        read = sum(int((weights[5] != 0).sum()) for weights in (table.state, table.prediction, table.noise))
        return Problem(
            ours=lambda: run(*scratch),
            check=fresh,
            exact=lambda: by_reference(torch.float64),
            plain=lambda: by_reference(torch.float32),
            peers={"diffusers": diffusers_step},
            flops=2.0 * b * numel * (read + 4),
            nbytes=float(b * numel * (4 * (read + 1) + 2 * halves * prediction.element_size())),
        )

    return Case("step", name, make)


CASES: tuple[Case, ...] = (
    attention_case("Flux 4608", 1, 24, 4608, 4608, 128),
    attention_case("SD3 4429", 2, 24, 4429, 4429, 64),
    attention_case("SDXL 1024", 2, 20, 1024, 1024, 64),
    attention_case("SDXL 4096", 2, 10, 4096, 4096, 64),
    attention_case("SD1.5 4096", 2, 8, 4096, 4096, 40),
    attention_case("SD1.5 1024", 2, 8, 1024, 1024, 80),
    attention_case("SD1.5 256", 2, 8, 256, 256, 160),
    attention_case("SD3.5-L 4429", 2, 38, 4429, 4429, 64),
    attention_case("SDXL 1024 x 77", 2, 20, 1024, 77, 64, "cross_attention"),
    attention_case("SDXL 4096 x 77", 2, 10, 4096, 77, 64, "cross_attention"),
    attention_case("SD1.5 4096 x 77", 2, 8, 4096, 77, 40, "cross_attention"),
    attention_case("SDXL 1024 x 154", 2, 20, 1024, 154, 64, "cross_attention"),
    joint_case("SD3-M 333 + 4096", 2, 24, 333, 4096, 64),
    joint_case("Flux 512 + 4096", 1, 24, 512, 4096, 128),
    eight_bit_case("attention_fp8", "Flux 4608", 1, 24, 4608, 128),
    eight_bit_case("attention_fp8", "Flux 512 + 4096", 1, 24, 4096, 128, 512),
    eight_bit_case("attention_fp8", "SD3.5-M 333 + 4096", 2, 24, 4096, 64, 333),
    eight_bit_case("attention_int8", "Flux 4608", 1, 24, 4608, 128),
    eight_bit_case("attention_int8", "SD3.5-M 333 + 4096", 2, 24, 4096, 64, 333),
    qk_case("Flux 4608", 1, 4608, 24, 128, rope=True),
    qk_case("SD3.5-L 4429", 2, 4429, 38, 64, rope=False),
    tokens_case("modulate", "Flux 4608", 1, 4608, 3072),
    tokens_case("modulate", "SD3.5-L 4096", 2, 4096, 2432),
    tokens_case("gate_residual", "Flux 4608", 1, 4608, 3072),
    tokens_case("gate_residual", "SD3.5-L 4096", 2, 4096, 2432),
    group_norm_case("SDXL 320 x 128", 2, 320, 128, last=True),
    group_norm_case("SD1.5 320 x 64", 2, 320, 64, last=True),
    group_norm_case("VAE 128 x 1024", 1, 128, 1024, last=True),
    group_norm_case("VAE 512 x 128, channels first", 1, 512, 128, last=False),
    geglu_case("SDXL 4096", 2, 4096, 2560),
    geglu_case("SDXL 1024", 2, 1024, 5120),
    geglu_case("SD1.5 4096", 2, 4096, 1280),
    step_case("SDXL dpmpp_2m guided", "dpmpp_2m", 1, 4, 128, 5.0),
    step_case("SD1.5 unipc guided x 8", "unipc", 8, 4, 64, 7.5),
    step_case("Flux flow_euler", "flow_euler", 1, 16, 128, 1.0),
    tokens_case("quantize_modulate", "Flux 4608", 1, 4608, 3072),
    tokens_case("quantize_gelu", "Flux 4608", 1, 4608, 12288),
    tokens_case("quantize_rowwise", "Flux 4608", 1, 4608, 3072),
)


def run(
    case: Case, device: torch.device, dtype: torch.dtype, limits: Mapping[str, float], *, tiny: bool
) -> dict[str, Any]:
    """Check a case and, where it is right and the device is a GPU, time it."""
    problem = case.make(device, dtype, tiny)
    exact = problem.exact()
    error, plain = deviation(problem.check(), exact), deviation(problem.plain(), exact)
    stored = torch.float8_e4m3fn if case.op.startswith("quantize") else torch.float32 if case.op == "step" else dtype
    allowed = 2 * plain + torch.finfo(stored).eps / 2
    row: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "lane": "quantised" if case.op.startswith(("quantize", "attention_int8", "attention_fp8")) else "lossless",
        "error": error,
        "error_of_torch": plain,
        "right": math.isfinite(error) and error <= allowed,
    }
    if tiny:
        for call in (problem.ours, *problem.peers.values()):  # that they run is all that is asked of them
            call()
    if not row["right"] or tiny:
        return row
    times = medians({"fastsd": problem.ours, **problem.peers}, device)
    ours = times.pop("fastsd")
    compute, moved = problem.flops / ours / 1e6, problem.nbytes / ours / 1e3
    floor = max(problem.flops / limits["tflops"] / 1e6, problem.nbytes / limits["gb_s"] / 1e3)
    best = min(times, key=lambda name: times[name]) if times else None
    return row | {
        "us": ours,
        "us_in_graph": in_graph(problem.ours, device),
        "tflops": compute,
        "gb_s": moved,
        "share_of_floor": floor / ours,
        "peers": {name: {"us": us, "ratio": ours / us} for name, us in times.items()},
        "best_peer": best,
    }


def show(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table."""
    table = Table(title="kernels")
    for column in (
        "op",
        "case",
        "lane",
        "error",
        "of torch",
        "right",
        "us",
        "in graph",
        "TFLOP/s",
        "GB/s",
        "of floor",
        "best peer",
    ):
        table.add_column(column, justify="left" if column in ("op", "case", "lane", "best peer") else "right")
    for row in rows:
        cells = [
            row["op"],
            row["case"],
            row["lane"],
            f"{row['error']:.1e}",
            f"{row['error_of_torch']:.1e}",
            "yes" if row["right"] else "NO",
        ]
        if "us" in row:
            graph = "-" if row["us_in_graph"] is None else f"{row['us_in_graph']:.1f}"
            best = row["best_peer"]
            peer = "-" if best is None else f"{best} {row['peers'][best]['ratio']:.2f}"
            cells += [f"{row['us']:.1f}", graph, f"{row['tflops']:.0f}", f"{row['gb_s']:.0f}"]
            cells += [f"{100 * row['share_of_floor']:.0f} %", peer]
        else:
            cells += ["not measured"] + ["-"] * 5
        table.add_row(*cells)
    return table


def each(
    device: torch.device, dtype: torch.dtype, ops: list[str] | None = None, *, tiny: bool
) -> Iterator[dict[str, Any]]:
    """Rows of all cases, or those of some ops."""
    limits = ceilings(device, dtype, tiny=tiny)
    for case in CASES:
        if ops is None or case.op in ops:
            yield run(case, device, dtype, limits, tiny=tiny)


def main() -> None:
    """Run all cases and print a table, or one JSON document with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    parser.add_argument("--ops", help="names, comma-separated")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    tiny = device.type != "cuda"
    with torch.inference_mode():
        rows = list(each(device, dtype, options.ops.split(",") if options.ops else None, tiny=tiny))
    if options.json:
        print(json.dumps({"benchmark": "kernels", "dry_run": tiny, **environment(device), "rows": rows}))
        return
    Console(width=160).print(show(rows))


if __name__ == "__main__":
    main()
