"""The transformer of Flux against its oracle, `diffusers.FluxTransformer2DModel` as `FluxPipeline` calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.denoisers.flux import FluxTransformer, rotary_table
from fastsd.denoisers.layers import ROWS
from fastsd.denoisers.transformer import Constants
from fastsd.errors import InputError

# The published transformer/config.json files, the numbers of parameters, and how many of them only `prepare` reads.

FLUX_SCHNELL = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
FLUX_DEV = {**FLUX_SCHNELL, "guidance_embeds": True}
PUBLISHED = {
    "flux-schnell": (FLUX_SCHNELL, 11_891_178_560, 3_282_066_432),  # 27.6 %
    "flux-dev": (FLUX_DEV, 11_901_408_320, 3_292_296_192),  # 27.7 %
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name: str) -> None:
    config, parameters, only_prepare = PUBLISHED[name]
    with torch.device("meta"):
        ours, oracle = FluxTransformer(config), FluxTransformer2DModel(**public(config))
    assert shapes(ours) == shapes(oracle)
    assert not list(ours.buffers())
    assert parameters == sum(parameter.numel() for parameter in ours.parameters())
    names = ours.prepare_only()
    assert only_prepare == sum(p.numel() for name in names for p in ours.get_submodule(name).parameters())


# Tiny models. "schnell" is the base of all.

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 10,
    "axes_dims_rope": [2, 4, 6],
}
DEV = {**TINY, "guidance_embeds": True}
CASES: dict[str, dict[str, Any]] = {
    "schnell": TINY,
    "dev": DEV,
    "one-layer-of-each": {**TINY, "num_layers": 1, "num_single_layers": 1},
    "one-head": {**DEV, "num_attention_heads": 1},
    "channels": {**TINY, "in_channels": 4, "out_channels": 12},
    "published-axes": {**DEV, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "num_attention_heads": 1},
}
SIZES = [(8, 8), (6, 10), (14, 8), (2, 26)]

# Norm of the difference over the norm of the output. The same network in float32, summed in other orders, deviates by
# up to 1e-6.
RELATIVE = 1e-5


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("batch, tokens", [(1, 1), (2, 7), (3, 33)], ids=lambda number: str(number))
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers_at_every_step(name: str, batch: int, tokens: int, size: tuple[int, int]) -> None:
    ours, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], steps=2, batch=batch, tokens=tokens, size=size)
    modulation, *rest = inputs.prepare(ours)
    for i, latents in enumerate(inputs.latents):
        assert_close(ours(latents, modulation[i], *rest), inputs.oracle(oracle, i))


@pytest.mark.parametrize("name", ["schnell", "dev", "published-axes"])
def test_one_prepare_serves_a_whole_run(name: str) -> None:
    """Prepare and eight forwards that feed on each other are eight calls of the oracle."""
    ours, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], steps=8, size=(6, 10))
    modulation, *rest = inputs.prepare(ours)
    latents = inputs.latents[0]
    for row in modulation:
        latents = latents - 0.1 * ours(latents, row, *rest)
    expected = inputs.latents[0]
    for i in range(8):
        inputs.latents[i] = expected
        expected = expected - 0.1 * inputs.oracle(oracle, i)
    assert_close(latents, expected)


def test_epsilons_of_the_norms() -> None:
    """Tokens, queries and keys so small that they count."""
    ours, oracle = pair(DEV)
    for model in (ours, oracle):
        for name, weight in model.named_parameters():
            if name.startswith(("x_embedder", "context_embedder")) or ".to_q." in name or ".add_k_proj." in name:
                weight.mul_(1e-3)
    inputs = Inputs(DEV)
    modulation, *rest = inputs.prepare(ours)
    assert_close(ours(inputs.latents[0], modulation[0], *rest), inputs.oracle(oracle, 0))


@pytest.mark.parametrize("double, single", [(1, 0), (0, 1), (2, 3), (3, 2), (4, 4), (5, 6)])
def test_controlnet_residuals(double: int, single: int) -> None:
    config = {**TINY, "num_layers": 5, "num_single_layers": 6}
    ours, oracle = pair(config)
    inputs = Inputs(config, size=(6, 10))
    modulation, *rest = inputs.prepare(ours)
    residuals = [[torch.randn(2, 15, 24) for _ in range(count)] for count in (double, single)]
    given = {
        key: samples or None
        for key, samples in zip(("controlnet_block_samples", "controlnet_single_block_samples"), residuals, strict=True)
    }
    prediction = ours(inputs.latents[0], modulation[0], *rest, *residuals)
    assert_close(prediction, inputs.oracle(oracle, 0, **given))
    plain = ours(inputs.latents[0], modulation[0], *rest)
    assert not torch.allclose(prediction, plain)
    zeros = [[0 * residual for residual in kind] for kind in residuals]
    assert torch.equal(ours(inputs.latents[0], modulation[0], *rest, *zeros), plain)


@pytest.mark.parametrize("name", ["schnell", "dev"])
def test_a_row_has_the_same_bits_in_every_schedule(name: str) -> None:
    ours, _ = pair(CASES[name])
    inputs = Inputs(CASES[name], steps=ROWS + 6)
    timesteps, rows = inputs.timesteps, inputs.prepare(ours).modulation
    for start, steps in ((0, 1), (3, 4), (ROWS, 6), (10, ROWS)):
        inputs.timesteps = timesteps[start : start + steps]
        assert torch.equal(inputs.prepare(ours).modulation, rows[start : start + steps])


def test_an_image_has_the_same_bits_whatever_else_is_in_the_batch() -> None:
    ours, _ = pair(DEV)
    one, other = Inputs(DEV, batch=3), Inputs(DEV, batch=3, seed=5)
    for name in ("latents", "timesteps"):
        getattr(other, name)[:, 1] = getattr(one, name)[:, 1]
    for name in ("text", "pooled", "guidance_scale"):
        getattr(other, name)[1] = getattr(one, name)[1]
    predictions = []
    for inputs in (one, other):
        modulation, *rest = inputs.prepare(ours)
        predictions.append(ours(inputs.latents[0], modulation[0], *rest))
    assert torch.equal(predictions[0][1], predictions[1][1])
    assert not torch.equal(predictions[0][0], predictions[1][0])


def test_constants_are_packed_in_the_dtype_of_the_weights() -> None:
    ours, _ = pair(DEV)
    constants = Inputs(DEV, steps=4, size=(6, 10)).prepare(ours.bfloat16())
    assert isinstance(constants, Constants)
    # Six vectors for each kind of tokens in two layers, three in each of three single ones, the output's.
    assert constants.modulation.shape == (4, 2, 24 * (2 * 12 + 3 * 3 + 2))
    assert constants.context.shape == (2, 7, 24)
    assert constants.position.shape == (2, 7 + 15, 6)
    assert [tensor.dtype for tensor in constants] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("kind", [torch.int64, torch.float64], ids=str)
def test_timesteps_of_any_dtype(kind: torch.dtype) -> None:
    ours, _ = pair(TINY)
    inputs = Inputs(TINY, steps=3)
    inputs.timesteps = inputs.timesteps.round()
    expected = inputs.prepare(ours).modulation
    inputs.timesteps = inputs.timesteps.to(kind)
    assert torch.equal(inputs.prepare(ours).modulation, expected)


@pytest.mark.parametrize("rows, columns, tokens", [(64, 64, 512), (3, 5, 1), (1, 128, 256)])
def test_rotary_table_is_that_of_diffusers(rows: int, columns: int, tokens: int) -> None:
    ids = torch.cat([torch.zeros(tokens, 3), image_ids(rows, columns)])
    expected = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(ids)
    table = rotary_table((16, 56, 56), tokens, rows, columns)
    for ours, theirs in zip(table, expected, strict=True):
        assert torch.equal(ours.repeat_interleave(2, dim=1), theirs)


def test_forward_reads_nothing_that_serves_only_prepare() -> None:
    ours, _ = pair(DEV)
    inputs = Inputs(DEV)
    modulation, *rest = inputs.prepare(ours)
    expected = ours(inputs.latents[0], modulation[0], *rest)
    for name in ours.prepare_only():
        ours.get_submodule(name).to_empty(device="meta")
    assert torch.equal(ours(inputs.latents[0], modulation[0], *rest), expected)


def test_forward_is_pure_and_waits_for_nothing() -> None:
    ours, _ = pair(DEV)
    inputs = Inputs(DEV, batch=1)
    modulation, *rest = inputs.prepare(ours)
    arguments = (inputs.latents[0], modulation[0], *rest)
    before = [argument.clone() for argument in arguments]
    with Operations() as operations:
        ours(*arguments)
    assert all(map(torch.equal, arguments, before))
    copying = ("aten::cat", "aten::clone", "aten::copy_", "aten::_to_copy", "aten::_local_scalar_dense")
    copies = [name for name in operations.names if name in copying]
    # Latents to patches, queries, keys and values of both kinds in each of two layers, text and image as one (attention
    # and perceptron of the single layers are not joined), patches to latents.
    assert copies == ["aten::clone", *["aten::cat"] * (6 + 1), "aten::clone"]


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_forward_exports_with_free_batch_size_and_text_length() -> None:
    ours, _ = pair(TINY)
    inputs = Inputs(TINY, size=(6, 10))
    modulation, *rest = inputs.prepare(ours)
    free = torch.export.Dim.AUTO
    shape = ({0: free, 2: free, 3: free}, {0: free}, {0: free, 1: free}, {1: free})
    program = torch.export.export(
        ours, (inputs.latents[0], modulation[0], *rest), dynamic_shapes=shape, strict=False
    ).module()
    for batch, tokens, size in ((2, 7, (6, 10)), (3, 4, (12, 8))):
        inputs = Inputs(TINY, batch=batch, tokens=tokens, size=size)
        modulation, *rest = inputs.prepare(ours)
        # The same operations in the same order.
        expected = ours(inputs.latents[0], modulation[0], *rest)
        assert torch.equal(program(inputs.latents[0], modulation[0], *rest), expected)


def test_forward_exports_with_controlnet() -> None:
    ours, _ = pair(TINY)
    inputs = Inputs(TINY)
    modulation, *rest = inputs.prepare(ours)
    residuals = [torch.randn(2, 16, 24)]
    arguments = (inputs.latents[0], modulation[0], *rest, residuals, residuals)
    program = torch.export.export(ours, arguments, strict=False)
    assert torch.equal(program.module()(*arguments), ours(*arguments))


def test_forward_compiles_as_one_graph() -> None:
    ours, _ = pair(TINY)
    inputs = Inputs(TINY)
    modulation, *rest = inputs.prepare(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    # aot_eager may decompose into other kernels of the same precision.
    assert_close(compiled(inputs.latents[0], modulation[0], *rest), ours(inputs.latents[0], modulation[0], *rest))


class _Prepare(torch.nn.Module):
    """`prepare` as the engine that a bundle would ship."""

    def __init__(self, transformer: FluxTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, timesteps: Tensor, text: Tensor, pooled: Tensor, guidance_scale: Tensor) -> Constants:
        return self.transformer.prepare(timesteps, text, pooled, height=6, width=10, guidance_scale=guidance_scale)


def test_prepare_exports() -> None:
    ours, _ = pair(DEV)
    inputs = Inputs(DEV, steps=3, size=(6, 10))
    arguments = (inputs.timesteps, inputs.text, inputs.pooled, inputs.guidance_scale)
    program = torch.export.export(_Prepare(ours), arguments, strict=False)
    for exported, eager in zip(program.module()(*arguments), inputs.prepare(ours), strict=True):
        assert torch.equal(exported, eager)


@pytest.mark.parametrize("name", ["schnell", "dev"])
def test_bfloat16(name: str) -> None:
    ours, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], batch=3, size=(12, 10))
    exact = inputs.oracle(oracle, 0)
    modulation, *rest = inputs.prepare(ours.bfloat16())
    prediction = ours(inputs.latents[0].bfloat16(), modulation[0], *rest)
    inputs.text, inputs.pooled = inputs.text.bfloat16(), inputs.pooled.bfloat16()
    inputs.latents = inputs.latents.bfloat16()
    theirs = inputs.oracle(oracle.bfloat16(), 0)
    assert prediction.dtype == torch.bfloat16
    # Rounding to 8 bits (2**-9) at each of about 50 operations in sequence, adding like a random walk: 1.4 %.
    # The sharper bound: diffusers, which also rounds the timestep to bfloat16, is no better, but for chance.
    error, theirs_error = relative(prediction.float(), exact), relative(theirs.float(), exact)
    assert error < 0.03
    assert error < 1.25 * theirs_error


def test_tokens_saturate_in_float16() -> None:
    """As in diffusers, where the largest tokens of Flux pass float16's range."""
    ours, oracle = pair(TINY)
    for model in (ours, oracle):
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            for name in ("ff_context.net.2", "proj_out"):
                if name.split(".")[0] in dict(block.named_children()):
                    block.get_submodule(name).weight.mul_(3e4)
    inputs = Inputs(TINY)
    modulation, *rest = inputs.prepare(ours.half())
    prediction = ours(inputs.latents[0].half(), modulation[0], *rest)
    inputs.text, inputs.pooled, inputs.latents = inputs.text.half(), inputs.pooled.half(), inputs.latents.half()
    theirs = inputs.oracle(oracle.half(), 0)
    assert prediction.isfinite().all() and theirs.isfinite().all()


REFUSED_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "attention_head_dim": {"attention_head_dim": "12"},
    "axes_dims_rope": {"axes_dims_rope": [2, 4, 8]},
    "axes_dims_rope odd": {"axes_dims_rope": [1, 5, 6]},
    "axes_dims_rope count": {"axes_dims_rope": [6, 6]},
    "axes_dims_rope kind": {"axes_dims_rope": 12},
    "axes_dims_rope of what": {"axes_dims_rope": ["2", 4, 6]},
    "axes_dims_rope none": {"axes_dims_rope": None},
    "guidance_embeds": {"guidance_embeds": "yes"},
    "in_channels": {"in_channels": 6},
    "in_channels kind": {"in_channels": None},
    "joint_attention_dim": {"joint_attention_dim": 0},
    "num_attention_heads": {"num_attention_heads": 1.5},
    "num_layers": {"num_layers": 0},
    "num_single_layers": {"num_single_layers": -1},
    "out_channels": {"out_channels": 3},
    "out_channels kind": {"out_channels": 8.0},
    "patch_size": {"patch_size": 2},
    "pooled_projection_dim": {"pooled_projection_dim": [768]},
    "some_future_key": {"some_future_key": 1},
}


@pytest.mark.parametrize("case", REFUSED_CONFIGURATIONS)
def test_configurations_that_are_refused_by_name(case: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(InputError, match=rf"^The Flux configuration has {case.split()[0]} = "),
    ):
        FluxTransformer({**TINY, **REFUSED_CONFIGURATIONS[case]})


def test_absent_keys_have_the_defaults_of_diffusers() -> None:
    private = {"_class_name": "FluxTransformer2DModel", "_name_or_path": "somewhere", "some_future_key": None}
    with torch.device("meta"):
        ours, oracle = FluxTransformer(private), FluxTransformer2DModel()
    assert shapes(ours) == shapes(oracle)


REFUSED_CONDITIONING: dict[str, tuple[dict[str, Any], str]] = {
    "timesteps without batch": ({"timesteps": torch.ones(2)}, r"timesteps is \[2\].*\[steps, 2\]"),
    "timesteps of another batch": ({"timesteps": torch.ones(4, 1)}, r"timesteps is \[4, 1\]"),
    "no timesteps": ({"timesteps": torch.ones(0, 2)}, r"timesteps is \[0, 2\]"),
    "text of another width": ({"context": torch.ones(2, 7, 21)}, r"\[batch, tokens, 20\]"),
    "text without batch": ({"context": torch.ones(7, 20)}, "context is"),
    "no text": ({"context": torch.ones(2, 0, 20)}, r"context is \[2, 0, 20\]"),
    "pooled text of another batch": ({"pooled": torch.ones(3, 10)}, r"pooled is \[3, 10\].*\[2, 10\]"),
    "pooled text of another width": ({"pooled": torch.ones(2, 13)}, r"pooled is \[2, 13\]"),
    "odd height": ({"height": 7}, "latents are 7 x 8; both must be positive multiples of 2"),
    "odd width": ({"width": 9}, "latents are 8 x 9"),
    "no width": ({"width": 0}, "latents are 8 x 0"),
    "negative height": ({"height": -2}, "latents are -2 x 8"),
    "fractional height": ({"height": 8.0}, r"latents are 8\.0 x 8"),
    "missing guidance": ({"guidance_scale": None}, r"guidance_scale is None.*must be \[2\]"),
    "guidance of another batch": ({"guidance_scale": torch.ones(3)}, r"guidance_scale is \[3\]"),
    "guidance as a scalar": ({"guidance_scale": torch.tensor(3.5)}, r"guidance_scale is \[\]"),
}


@pytest.mark.parametrize("case", REFUSED_CONDITIONING)
def test_conditioning_that_is_refused(case: str) -> None:
    change, message = REFUSED_CONDITIONING[case]
    inputs = Inputs(DEV)
    arguments = {
        "timesteps": inputs.timesteps,
        "context": inputs.text,
        "pooled": inputs.pooled,
        "height": 8,
        "width": 8,
        "guidance_scale": inputs.guidance_scale,
        **change,
    }
    with pytest.raises(InputError, match=message):
        FluxTransformer(DEV).prepare(**arguments)


def test_timesteps_and_guidance_are_rounded_as_in_diffusers() -> None:
    """Divided by 1000 in the pipeline and multiplied in the model, a timestep is not always what it was."""
    ours, oracle = pair(DEV)
    integers = torch.arange(1, 1001).float()
    changed = integers[integers / 1000 * 1000 != integers]
    inputs = Inputs(DEV, steps=len(changed), batch=1)
    inputs.timesteps = changed[:, None]
    seen: dict[Any, list[tuple[Tensor, ...]]] = {ours: [], oracle: []}
    for model, calls in seen.items():
        model.time_text_embed.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
    inputs.prepare(ours)
    for step in range(len(changed)):
        inputs.oracle(oracle, step)
    (rows, _, guidance), theirs = seen[ours][0], seen[oracle]
    assert len(changed) > 0
    assert torch.equal(rows[: len(changed)], torch.stack([timestep for timestep, *_ in theirs]))
    assert torch.equal(guidance, theirs[0][1])


def test_guidance_is_read_only_where_it_is_embedded() -> None:
    ours, _ = pair(TINY)
    inputs = Inputs(TINY)
    expected = inputs.prepare(ours).modulation
    inputs.guidance_scale = torch.tensor([3.5, 7.0])
    assert torch.equal(inputs.prepare(ours).modulation, expected)


def public(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def pair(config: dict[str, Any]) -> tuple[FluxTransformer, FluxTransformer2DModel]:
    """Ours and diffusers' with the same weights, none of them zero or one (norms and biases included)."""
    oracle = FluxTransformer2DModel(**config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in oracle.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        else:
            weight.copy_(weight.round().clamp(0, 1) + 0.2 * noise)
    ours = FluxTransformer(config).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return ours, oracle


def image_ids(rows: int, columns: int) -> Tensor:
    return FluxPipeline._prepare_latent_image_ids(1, rows, columns, torch.device("cpu"), torch.float32)


class Inputs:
    """Random inputs of both classes; every image has its own timesteps and guidance."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        steps: int = 1,
        batch: int = 2,
        tokens: int = 7,
        size: tuple[int, int] = (8, 8),
        seed: int = 2,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(steps, batch, config["in_channels"] // 4, *size, generator=generator)
        self.timesteps = torch.rand(steps, batch, generator=generator) * 1000
        self.text = torch.randn(batch, tokens, config["joint_attention_dim"], generator=generator)
        self.pooled = torch.randn(batch, config["pooled_projection_dim"], generator=generator)
        self.guidance_scale = None
        if config.get("guidance_embeds"):
            self.guidance_scale = 1 + 6 * torch.rand(batch, generator=generator)

    def prepare(self, transformer: FluxTransformer) -> Constants:
        height, width = self.latents.shape[-2:]
        return transformer.prepare(
            self.timesteps,
            self.text,
            self.pooled,
            height=height,
            width=width,
            guidance_scale=self.guidance_scale,
        )

    def oracle(self, oracle: FluxTransformer2DModel, step: int, **residuals: Any) -> Tensor:
        """The model between the packing and the unpacking of `FluxPipeline`, which divides timesteps by 1000."""
        latents = self.latents[step]
        batch, channels, height, width = latents.shape
        prediction = oracle(
            FluxPipeline._pack_latents(latents, batch, channels, height, width),
            self.text,
            self.pooled,
            self.timesteps[step].to(latents.dtype) / 1000,
            image_ids(height // 2, width // 2),
            torch.zeros(self.text.shape[1], 3),
            self.guidance_scale,
            **residuals,
        ).sample
        return FluxPipeline._unpack_latents(prediction, 8 * height, 8 * width, 8)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.isfinite().all() and expected.std() > 0.1  # an output that could not hide a difference
    assert relative(actual, expected) <= RELATIVE


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
