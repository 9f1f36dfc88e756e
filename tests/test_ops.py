"""The fused operations: on a CPU they are plain torch, on CUDA the denoisers call the registered ops and nothing else.

No GPU is needed: a denoiser runs on fake CUDA tensors (real shapes, dtypes and strides, no numbers), so what it would
call there is seen.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd import memory, ops, presets
from fastsd.denoisers import layout
from fastsd.denoisers.flux import PATCH, FluxTransformer, SingleBlock
from fastsd.denoisers.layers import Packing, ResnetBlock, TransformerBlock
from fastsd.denoisers.sd3 import SD3Transformer
from fastsd.denoisers.transformer import JointAttention, JointBlock
from fastsd.denoisers.unet import UNet
from fastsd_export.trace import Wrapper, skeleton
from fastsd_kernels import configs
from fastsd_kernels.attention import attention
from fastsd_kernels.cross_attention import cross_attention
from fastsd_kernels.gate_residual import gate_residual, gate_residual_modulate
from fastsd_kernels.geglu import geglu
from fastsd_kernels.group_norm_silu import group_norm_silu
from fastsd_kernels.joint_attention import joint_attention
from fastsd_kernels.modulate import modulate
from fastsd_kernels.qk_norm_rope import qk_norm_rope

LOW = [torch.bfloat16, torch.float16, torch.float32]


def some(cases: Iterable[str], *usual: str) -> list[Any]:
    """Cases, those that are not `usual` only with `-m full`."""
    return [case if case in usual else pytest.param(case, marks=pytest.mark.full) for case in cases]


# What they compute


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def tokens(length: int, heads: int = 3, dim: int = 8) -> tuple[Tensor, ...]:
    """q, k and v as slices of one packed buffer."""
    return normal(2, length, 3, heads, dim).unbind(2)


def norm(layer: nn.Module) -> Any:
    for i, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, mean=1, generator=torch.Generator().manual_seed(i))
    return layer.double().requires_grad_(False)


def rotary(length: int, dim: int = 8) -> Tensor:
    angles = normal(length, dim // 2).float()
    return torch.stack([angles.cos(), angles.sin()])


def rotated(op: Callable[..., Any], qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    qkv = qkv.clone()
    op(qkv, *rest)
    return qkv.unbind(2)


RMS = norm(nn.RMSNorm(8, eps=ops.EPS)), norm(nn.RMSNorm(8, eps=ops.EPS))
GROUPS = norm(nn.GroupNorm(4, 8, eps=1e-5))
ROWS = [normal(2, 1, 24 + i)[..., :24] for i in range(5)]

# The function of `ops` as the denoisers call it, and the op of `fastsd_kernels` that takes its place on CUDA.
PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "attention": (
        lambda to: ops.attention(*map(to, tokens(9))),
        lambda to: attention(*map(to, tokens(9))).flatten(2),
    ),
    "cross_attention": (
        lambda to: ops.cross_attention(to(normal(2, 9, 3, 8)), *map(to, tokens(5)[1:])),
        lambda to: cross_attention(to(normal(2, 9, 3, 8)), *map(to, tokens(5)[1:])).flatten(2),
    ),
    "joint_attention": (
        lambda to: ops.joint_attention(tuple(map(to, tokens(9))), tuple(map(to, tokens(5)))),
        lambda to: [x.flatten(2) for x in joint_attention(*map(to, tokens(5) + tokens(9)))][::-1],
    ),
    "qk_norm_rope": (
        lambda to: ops.qk_norm_rope(to(normal(2, 9, 3, 3, 8)), *map(to, RMS), rotary(9)),
        lambda to: rotated(qk_norm_rope, to(normal(2, 9, 3, 3, 8)), *(to(x).weight for x in RMS), rotary(9)),
    ),
    "qk_norm_rope of three": (
        lambda to: ops.qk_norm_rope(to(normal(2, 9, 3, 3, 8)).unbind(2), *map(to, RMS), None),
        lambda to: rotated(qk_norm_rope, to(normal(2, 9, 3, 3, 8)), *(to(x).weight for x in RMS), None),
    ),
    "modulate": (
        lambda to: ops.modulate(to(normal(2, 9, 24)), tuple(map(to, ROWS[:2])), tuple(map(to, ROWS[2:4]))),
        lambda to: [
            modulate(to(normal(2, 9, 24)), *(to(row).squeeze(1) for row in pair), ops.EPS, 0.0)
            for pair in (ROWS[:2], ROWS[2:4])
        ],
    ),
    "gate_residual": (
        lambda to: ops.gate_residual(to(normal(2, 9, 24)), to(ROWS[0]), to(normal(2, 9, 24) * 3)),
        lambda to: gate_residual(to(normal(2, 9, 24)), to(ROWS[0]).squeeze(1), to(normal(2, 9, 24) * 3)),
    ),
    "gate_residual_modulate": (
        lambda to: ops.gate_residual_modulate(
            to(normal(2, 9, 24)), to(ROWS[0]), to(normal(2, 9, 24) * 3), *map(to, ROWS[1:3])
        ),
        lambda to: gate_residual_modulate(
            to(normal(2, 9, 24)),
            to(ROWS[0]).squeeze(1),
            to(normal(2, 9, 24) * 3),
            *(to(row).squeeze(1) for row in ROWS[1:3]),
            ops.EPS,
            0.0,
        ),
    ),
    "geglu": (lambda to: ops.geglu(to(normal(2, 9, 24))), lambda to: geglu(to(normal(2, 9, 24)))),
    "group_norm_silu": (
        lambda to: ops.group_norm_silu(to(normal(2, 8, 5, 7)), to(GROUPS), to(normal(2, 8))),
        lambda to: group_norm_silu(
            to(normal(2, 8, 5, 7)), 4, to(GROUPS).weight, to(GROUPS).bias, to(normal(2, 8)), 1e-5
        ),
    ),
    "group_norm": (
        lambda to: ops.group_norm_silu(to(normal(2, 8, 5, 7)), to(GROUPS), silu=False),
        lambda to: group_norm_silu(
            to(normal(2, 8, 5, 7)), 4, to(GROUPS).weight, to(GROUPS).bias, None, 1e-5, False
        ),
    ),
}  # fmt: skip


def cast(dtype: torch.dtype) -> Callable[[Any], Any]:
    """A tensor, or a copy of a layer, in a dtype, and after a rounding to it exact in float64."""
    return lambda x: copy.deepcopy(x).to(dtype)


def results(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


@pytest.mark.parametrize("name", PAIRS)
def test_the_plain_expression_is_what_the_op_computes(name: str) -> None:
    """In float64 to rounding: they sum in other orders."""
    ours, of_kernels = PAIRS[name]
    to = cast(torch.float64)
    torch.testing.assert_close(results(ours(to)), results(of_kernels(to)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_the_op_is_as_exact_as_the_plain_expression(name: str, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs: at most twice its error, and a rounding of the result."""
    ours, of_kernels = PAIRS[name]
    low = cast(dtype)
    exact = of_kernels(lambda x: low(x).double())
    for plain, op, right in zip(results(ours(low)), results(of_kernels(low)), results(exact), strict=True):
        assert plain.dtype == op.dtype == dtype and plain.shape == op.shape
        error, of_plain = ((x.double() - right).abs().max().item() for x in (op, plain))
        assert error <= 2 * of_plain + torch.finfo(dtype).eps * right.abs().max().item()


def test_float16_sums_saturate() -> None:
    x, gate = torch.full((1, 1, 4), 6e4).half(), torch.ones(1, 1, 4).half()
    assert (ops.gate_residual(x, gate, x) == 65504).all()


# What is called on CUDA


class Slicing(TorchFunctionMode):
    """Slices by an op: in a torch without CUDA the subscript itself looks for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        if index[0] is ...:
            index = (slice(None),) * (x.dim() - len(index) + 1) + index[1:]
        for dim, of_dim in enumerate(index):
            new = of_dim is None
            x = x.unsqueeze(dim) if new else torch.ops.aten.slice.Tensor(x, dim, of_dim.start, of_dim.stop)
        return x


class Record(TorchDispatchMode):
    """Counts what runs, by name; ops of `fastsd` whole, views not at all."""

    VIEWS = (
        *("view", "_unsafe_view", "t", "permute", "transpose", "slice", "select", "squeeze", "unsqueeze", "expand"),
        *("split", "split_with_sizes", "unbind", "detach", "alias"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.maps: list[Tensor] = []  # that a group norm reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "fastsd" or (namespace == "aten" and name not in self.VIEWS):
            self.calls["linear" if name in ("mm", "addmm") else name] += 1
        if name == "group_norm_silu":
            self.maps.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Inside, tensors on CUDA are fakes; the GPU is one whose attention is our kernel in all head dimensions."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's attention was called")

    monkeypatch.setattr(configs, "arch", lambda device: 80)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    # In a torch without CUDA no backend is cuDNN, which is channels last where the weights or the map are.
    monkeypatch.setattr(torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.channels_last)
    return FakeTensorMode(allow_non_fake_inputs=True)


def kind(config: Any) -> Any:
    """The denoiser's class."""
    if "down_block_types" in config:
        return UNet
    return SD3Transformer if "pos_embed_max_size" in config else FluxTransformer


def build(mode: FakeTensorMode, config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A denoiser of fakes on CUDA, laid out."""
    with torch.device("meta"):
        denoiser = kind(config)(config)
    denoiser.to(dtype).requires_grad_(False)
    with mode:
        denoiser.to_empty(device="cuda")
        layout(denoiser)
    return denoiser


def fakes(denoiser: Any, batch: int, height: int, width: int, tokens: int = 77) -> tuple[Tensor, ...]:
    """Arguments of a denoiser's `forward`."""
    c, dtype = denoiser.config, next(denoiser.parameters()).dtype

    def fake(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    latents = fake(batch, c.in_channels // (4 if isinstance(denoiser, FluxTransformer) else 1), height, width)
    if isinstance(denoiser, UNet):
        packed = [parts[-1].columns.stop for parts in (denoiser._resnets, denoiser._text_attentions)]
        return latents, fake(batch, packed[0]), fake(batch, tokens, packed[1])
    row, text = fake(batch, denoiser._modulations[-1].columns.stop), fake(batch, tokens, c.inner_dim)
    if isinstance(denoiser, SD3Transformer):
        return latents, row, text, fake(1, height * width // c.patch_size**2, c.inner_dim)
    length = tokens + height * width // PATCH**2
    return latents, row, text, fake(2, length, c.attention_head_dim // 2, dtype=torch.float32)


# All that one step of a preset calls, besides views. `clone`: patches taken apart and put together. `cat`: skip
# connections, or text and image before the single blocks. No copies of feature maps: all are channels last.
STEPS: dict[str, dict[str, int]] = {
    "sd15": {
        **{"group_norm_silu": 22 * 2 + 16 + 1, "convolution": 2 + 22 * 2 + 14 + 6, "upsample_nearest2d": 3},
        **{"attention": 16, "cross_attention": 16, "geglu": 16, "native_layer_norm": 48, "linear": 16 * (6 + 2)},
        **{"add": 22 + 16 * 4, "cat": 12},
    },
    "sdxl": {
        **{"group_norm_silu": 17 * 2 + 11 + 1, "convolution": 2 + 17 * 2 + 11 + 4, "upsample_nearest2d": 2},
        **{"attention": 70, "cross_attention": 70, "geglu": 70, "native_layer_norm": 210, "linear": 70 * 6 + 11 * 2},
        **{"add": 17 + 11 + 70 * 3, "cat": 9},
    },
    "sd3-medium": {
        **{"modulate": 24 * 2 + 1, "joint_attention": 24, "gate_residual": 47, "gate_residual_modulate": 47},
        **{"linear": 23 * 8 + 5 + 2, "gelu": 47, "add": 1, "clone": 2},
    },
    "sd35-medium": {
        **{"modulate": 24 * 2 + 13 + 1, "joint_attention": 24, "attention": 13, "qk_norm_rope": 24 * 2 + 13},
        **{"gate_residual": 47 + 13, "gate_residual_modulate": 47},
        **{"linear": 23 * 8 + 5 + 13 * 2 + 2, "gelu": 47, "add": 1, "clone": 2},
    },
    "flux-dev": {
        **{"modulate": 19 * 2 + 38 + 1, "joint_attention": 19, "attention": 38, "qk_norm_rope": 19 * 2 + 38},
        **{"gate_residual": 19 * 2 + 38, "gate_residual_modulate": 19 * 2},
        **{"linear": 19 * 8 + 38 * 4 + 2, "gelu": 19 * 2 + 38, "cat": 1, "clone": 2},
    },
}


def body_of(denoiser: Any, of_kind: type[nn.Module], mode: FakeTensorMode) -> tuple[Any, tuple[Any, ...]]:
    """The first block of a kind, and what its body is called with."""
    block: Any = next(module for module in denoiser.modules() if isinstance(module, of_kind))
    calls: list[tuple[Any, ...]] = []
    body = block.body
    block.body = lambda *given: calls.append(given) or body(*given)
    with torch.no_grad(), mode, Slicing():
        denoiser(*fakes(denoiser, 2, 18, 30))
    del block.body
    return block, calls[0]


@pytest.mark.parametrize("name", some(STEPS, "sd15", "flux-dev"))
def test_a_step_on_cuda(name: str, cuda: FakeTensorMode) -> None:
    preset = presets.PRESETS[name]
    denoiser = build(cuda, next(preset.configs[part] for part in ("unet", "transformer") if part in preset.configs))
    with torch.no_grad(), cuda, Slicing(), Record() as record:
        latents, *rest = fakes(denoiser, 2, preset.native[0] // 8, preset.native[1] // 8)
        record.calls.clear()
        prediction = denoiser(latents, *rest)
    assert prediction.shape == latents.shape and prediction.dtype == torch.bfloat16
    assert dict(record.calls) == STEPS[name]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in record.maps)


@pytest.mark.parametrize(
    ("tensor", "right"),
    [
        pytest.param(("cuda", torch.bfloat16), True, id="bfloat16"),
        pytest.param(("cuda", torch.float32), True, id="float32"),
        pytest.param(("cuda", torch.float64), False, id="float64"),
        pytest.param(("cpu", torch.bfloat16), False, id="cpu"),
    ],
)
def test_what_goes_to_the_kernels(
    tensor: tuple[str, torch.dtype], right: bool, cuda: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cuda:
        x = torch.empty(2, device=tensor[0], dtype=tensor[1])
    assert ops.fused(x) is right
    monkeypatch.setattr(ops, "TRITON", False)
    assert not ops.fused(x)


SMALL_UNET = {
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 1,
    "norm_num_groups": 8,
}
SMALL_SD3 = {
    "sample_size": 16,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
SMALL_FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (16, 24, 24),
}


class Hopper:
    """A GPU for the tracer of kernels, which compiles them to the point where it sees what they write."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


# Block -> a model that has it, the kernels that it launches (a group norm: 3), and its products.
BODIES: dict[str, tuple[Any, type[nn.Module], int, int]] = {
    "ResnetBlock": (SMALL_UNET, ResnetBlock, 6, 0),
    "TransformerBlock": (SMALL_UNET, TransformerBlock, 3, 6),
    "JointBlock of SD3.5": (SMALL_SD3, JointBlock, 13, 10),
    "JointBlock of Flux": (SMALL_FLUX, JointBlock, 9, 8),
    "SingleBlock": (SMALL_FLUX, SingleBlock, 4, 4),
}


@pytest.mark.parametrize("name", some(BODIES, "TransformerBlock", "JointBlock of Flux", "SingleBlock"))
def test_a_body_compiles_whole_on_cuda(name: str, cuda: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph break, and nothing is copied: not for kernels that write in place, not for an argument."""
    triton = pytest.importorskip("triton")
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    config, of_kind, launches, products = BODIES[name]
    block, arguments = body_of(build(cuda, config), of_kind, cuda)
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad(), cuda:
        expected = block.body(*arguments)
        out = torch.compile(block.body, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(*arguments)
        (graph,) = graphs
        reinplace_inplaceable_ops(FakeTensorUpdater(graph), graph.graph)
    for ours, right in zip(results(out), results(expected), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (right.shape, right.dtype, right.stride())
    nodes = [(str(node.target), node) for node in graph.graph.nodes]
    kernels = [node for target, node in nodes if "triton_kernel_wrapper" in target]
    assert len(kernels) == launches and not any(node.kwargs.get("tensors_to_clone") for node in kernels)
    names = Counter(target.split(".")[1] for target, _ in nodes if target.startswith("aten."))
    assert names["mm"] + names["addmm"] == products
    assert names.keys() <= {"mm", "addmm", "gelu", "add", "native_layer_norm", "convolution", "empty", *Record.VIEWS}


# Layout, and packed queries, keys and values


def small(config: Any) -> Any:
    """A denoiser on the CPU."""
    torch.manual_seed(0)
    denoiser = kind(config)(config).eval().requires_grad_(False)
    for parameter in denoiser.parameters():  # none may hide as a zero or a one
        parameter.add_(0.05 * torch.randn_like(parameter))
    return denoiser


def packed(config: Any) -> tuple[Any, Any]:
    """A denoiser, and the same with packed weights."""
    plain = small(config)
    denoiser = copy.deepcopy(plain)
    for module in denoiser.modules():
        if isinstance(module, Packing):
            module.pack()
    return plain, denoiser


def step(denoiser: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    timesteps, context, latents = torch.full((1, 2), 500.0), random(2, 7, 32), random(2, 4, 8, 8)
    if isinstance(denoiser, UNet):
        constants = denoiser.prepare(timesteps, context)
    else:
        constants = denoiser.prepare(timesteps, context, random(2, 16), height=8, width=8)
    prediction: Tensor = denoiser(latents, constants[0][0], *constants[1:])
    return prediction


CONFIGS = {"unet": SMALL_UNET, "sd3": SMALL_SD3, "flux": SMALL_FLUX}


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_is_the_same_model(family: str) -> None:
    plain, denoiser = packed(CONFIGS[family])
    # One product in place of three may sum in another order.
    torch.testing.assert_close(step(denoiser), step(plain), rtol=1e-5, atol=1e-5)
    ours, theirs = denoiser.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert memory.report({"": denoiser}) == memory.report({"": plain})


@pytest.mark.parametrize("form", ["packed", "separate"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_branch_of_cuda_is_the_same_model(family: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but on a CPU, where the ops compute their references."""
    plain, denoiser = packed(CONFIGS[family])
    expected = step(plain)
    monkeypatch.setattr(ops, "fused", lambda x: True)
    with Record() as record:
        ours = step(denoiser if form == "packed" else plain)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert record.calls["attention"]


@pytest.mark.parametrize("family", CONFIGS)
def test_what_changes_the_weights_reaches_the_packed_ones(family: str) -> None:
    plain, denoiser = packed(CONFIGS[family])
    for model in (plain, denoiser):
        for name, parameter in model.named_parameters():
            if name.endswith(("to_k.weight", "to_v.weight", "add_q_proj.bias")):
                parameter.add_(0.1 * parameter.flip(0))
    torch.testing.assert_close(step(denoiser), step(plain), rtol=1e-5, atol=1e-5)


REPLACED: dict[str, Callable[[Any], Any]] = {
    "another dtype": lambda model: model.double().float(),
    "loaded": lambda model: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}) and model,
    "assigned": lambda model: (
        model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}, assign=True) and model
    ),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", REPLACED)
def test_replaced_weights_are_those_that_are_used(how: str) -> None:
    plain, denoiser = packed(SMALL_FLUX)

    def replaced(model: Any) -> Any:
        model = REPLACED[how](model).requires_grad_(False)
        model.single_transformer_blocks[0].attn.to_v.weight.mul_(3)
        return model

    ours, theirs = replaced(denoiser), replaced(copy.deepcopy(plain))
    torch.testing.assert_close(step(ours), step(theirs), rtol=1e-5, atol=1e-5)
    if ours is not denoiser:  # a copy has weights of its own
        torch.testing.assert_close(step(denoiser), step(plain), rtol=1e-5, atol=1e-5)


def test_nothing_is_held_twice() -> None:
    _, denoiser = packed(SMALL_FLUX)
    attention = denoiser.transformer_blocks[0].attn
    assert isinstance(attention, JointAttention)
    for names in attention.PACKS:
        layers = [attention.get_submodule(name) for name in names]
        for i, kind in enumerate(("weight", "bias")):
            storages = {getattr(layer, kind).untyped_storage().data_ptr() for layer in layers}
            assert storages == {attention.packed[names[0]][i].untyped_storage().data_ptr()}


def test_a_skeleton_of_packed_weights_takes_no_memory() -> None:
    _, denoiser = packed(SMALL_FLUX)
    bare = skeleton(Wrapper(denoiser), torch.bfloat16).component
    assert all(isinstance(tensor, FakeTensor) for tensor in bare.state_dict().values())
    assert not any(module.packed for module in bare.modules() if isinstance(module, Packing))
    assert denoiser.transformer_blocks[0].attn.packed


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_of_prepare_come_and_go_beside_packed_ones(family: str) -> None:
    plain, denoiser = packed(CONFIGS[family])
    waiting = memory.Waiting(denoiser)
    for _ in range(2):
        with waiting.resident():
            expected, ours = step(plain), step(denoiser)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layout_on_a_cpu(family: str) -> None:
    plain = small(CONFIGS[family])
    denoiser = copy.deepcopy(plain)
    layout(denoiser)
    # Convolutions of another layout sum in another order.
    torch.testing.assert_close(step(denoiser), step(plain), rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(denoiser.named_parameters(), plain.parameters(), strict=True):
        turned = family == "unet" and ours.dim() == 4
        assert ours.is_contiguous(memory_format=torch.channels_last) if turned else ours.is_contiguous(), name
        assert torch.equal(ours, theirs)
    assert not any(module.packed for module in denoiser.modules() if isinstance(module, Packing))


def test_without_triton_the_denoisers_run() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from fastsd.denoisers.layers import TransformerBlock
print(TransformerBlock(16, 2, 8, False).body(torch.ones(1, 4, 16), None, torch.ones(1, 3, 32)).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "torch.Size([1, 4, 16])\n", run.stderr


def test_kernels_for_symbols_are_right_for_every_length() -> None:
    """Interpreted: where a length is a symbol, the last tile of keys is masked even if it is full, or empty."""
    code = """
import torch
from fastsd_kernels import attention, joint_attention
from fastsd_kernels.configs import Config
torch.manual_seed(0)
attention.known = joint_attention.known = lambda condition: False
config = Config("kernel", 64, 32, 4, 2)
for text, image in ((32, 64), (5, 32)):
    of_text, of_image = (torch.randn(3, 1, n, 1, 40) for n in (text, image))
    outs = [torch.full_like(q, float("nan")) for q in (of_image[0], of_text[0], of_image[0])]
    attention.launch(*of_image, outs[0], config)
    joint_attention.launch(*of_text, *of_image, *outs[1:], config)
    expected = attention.reference(*of_image), *joint_attention.reference(*of_text, *of_image)
    torch.testing.assert_close(outs, list(expected), rtol=1e-5, atol=1e-5)
print("right")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout == "right\n", run.stderr


class Body(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    def forward(self, *arguments: Any) -> Any:
        return self.block.body(*arguments)


BATCH, LENGTH, TEXT = Dim("batch", min=1, max=64), Dim("length", min=16, max=16384), Dim("text", min=1, max=512)
HEIGHT, WIDTH = Dim("height", min=4, max=512), Dim("width", min=4, max=512)
RANGES: dict[str, tuple[Any, ...]] = {
    "ResnetBlock": ({0: BATCH, 2: HEIGHT, 3: WIDTH}, {0: BATCH}),
    "TransformerBlock": ({0: BATCH, 1: LENGTH}, None, {0: BATCH, 1: TEXT}),
    "JointBlock of SD3.5": ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: TEXT}, {0: BATCH}, {0: BATCH}, None),
    "JointBlock of Flux": (
        *({0: BATCH, 1: LENGTH}, {0: BATCH, 1: TEXT}),
        *({0: BATCH}, {0: BATCH}, {1: Dim.AUTO}),
    ),
    "SingleBlock": ({0: BATCH, 1: LENGTH}, {0: BATCH}, {1: LENGTH}),
}


@pytest.mark.parametrize("name", some(RANGES, "TransformerBlock", "JointBlock of Flux"))
def test_sizes_stay_symbols_on_cuda(name: str, cuda: FakeTensorMode) -> None:
    """One trace is right for all sizes: no kernel's tiles depend on those of the example."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    config, of_kind, *_ = BODIES[name]
    block, arguments = body_of(build(mode, config), of_kind, mode)
    with torch.no_grad():
        program = torch.export.export(Body(block), arguments, dynamic_shapes=(RANGES[name],), strict=False)
    kept = {(span.lower, span.upper) for span in program.range_constraints.values()}
    dims = [dim for of_argument in RANGES[name] for dim in (of_argument or {}).values() if isinstance(dim, Dim)]
    assert kept >= {(dim.min, dim.max) for dim in dims}
