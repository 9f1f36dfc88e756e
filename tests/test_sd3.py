"""The transformer of SD3 against its oracle, `diffusers.SD3Transformer2DModel`: same names, weights and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.denoisers.layers import ROWS
from fastsd.denoisers.sd3 import SD3Transformer
from fastsd.denoisers.transformer import Constants
from fastsd.errors import InputError

# The published transformer/config.json files, the numbers of parameters, and how many of them only `prepare` reads.

SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "_diffusers_version": "0.31.0.dev0",
    "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    **SD3_MEDIUM,
    "_diffusers_version": "0.31.0.dev0",
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
PUBLISHED = {
    "sd3-medium": (SD3_MEDIUM, 2_028_328_000, 689_754_624),  # 34.0 %
    "sd35-medium": (SD35_MEDIUM, 2_243_171_520, 781_827_072),  # 34.9 %
    "sd35-large": (SD35_LARGE, 8_056_627_520, 2_713_749_632),  # 33.7 %
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name: str) -> None:
    config, parameters, only_prepare = PUBLISHED[name]
    with torch.device("meta"):
        ours, oracle = SD3Transformer(config), SD3Transformer2DModel(**public(config))
    assert shapes(ours) == shapes(oracle)
    assert len(list(ours.buffers())) == len(list(oracle.buffers())) == 1  # the positions, in the checkpoint
    assert parameters == sum(parameter.numel() for parameter in ours.parameters())
    names = ours.prepare_only()
    assert only_prepare == sum(p.numel() for name in names for p in ours.get_submodule(name).parameters())


# Tiny models. "plain" is the base of all: odd groups of features are switched on in the others.

TINY = {
    "sample_size": 12,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}
NORM = {**TINY, "qk_norm": "rms_norm"}
CASES: dict[str, dict[str, Any]] = {
    "plain": TINY,
    "qk-norm": NORM,
    "dual": {**NORM, "dual_attention_layers": [0, 1]},
    "dual-without-norm": {**TINY, "dual_attention_layers": (1,)},
    "dual-in-the-last-layer": {**NORM, "dual_attention_layers": [0, 2]},
    "one-layer": {**NORM, "num_layers": 1},
    "one-head": {**NORM, "num_attention_heads": 1, "caption_projection_dim": 8},
    "channels": {**TINY, "in_channels": 5, "out_channels": 3},
    "patches-of-one": {**TINY, "patch_size": 1, "pos_embed_max_size": 17},
    "table-of-odd-size": {**TINY, "pos_embed_max_size": 9, "sample_size": 7},
}
SIZES = [(8, 8), (6, 10), (14, 8), (2, 16)]

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


@pytest.mark.parametrize("name", ["plain", "qk-norm", "dual"])
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
    ours, oracle = pair(CASES["dual"])
    for model in (ours, oracle):
        for name, weight in model.named_parameters():
            if name.startswith(("pos_embed.proj", "context_embedder")) or ".to_q." in name or ".add_k_proj." in name:
                weight.mul_(1e-3)
        model.pos_embed.pos_embed.mul_(1e-3)
    inputs = Inputs(CASES["dual"])
    modulation, *rest = inputs.prepare(ours)
    assert_close(ours(inputs.latents[0], modulation[0], *rest), inputs.oracle(oracle, 0))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("name", ["plain", "dual"])
def test_controlnet_residuals(name: str, count: int) -> None:
    config = {**CASES[name], "num_layers": 6}
    ours, oracle = pair(config)
    inputs = Inputs(config, size=(6, 10))
    modulation, *rest = inputs.prepare(ours)
    residuals = [torch.randn(2, 15, 24) for _ in range(count)]
    prediction = ours(inputs.latents[0], modulation[0], *rest, residuals)
    assert_close(prediction, inputs.oracle(oracle, 0, block_controlnet_hidden_states=residuals))
    plain = ours(inputs.latents[0], modulation[0], *rest)
    assert not torch.allclose(prediction, plain)
    assert torch.equal(ours(inputs.latents[0], modulation[0], *rest, [0 * residual for residual in residuals]), plain)
    assert torch.equal(ours(inputs.latents[0], modulation[0], *rest, []), plain)


def test_a_row_has_the_same_bits_in_every_schedule() -> None:
    ours, _ = pair(CASES["dual"])
    inputs = Inputs(CASES["dual"], steps=ROWS + 6)
    rows = inputs.prepare(ours).modulation
    for start, steps in ((0, 1), (3, 4), (ROWS, 6), (10, ROWS)):
        inputs.timesteps = Inputs(CASES["dual"], steps=ROWS + 6).timesteps[start : start + steps]
        assert torch.equal(inputs.prepare(ours).modulation, rows[start : start + steps])


def test_an_image_has_the_same_bits_whatever_else_is_in_the_batch() -> None:
    ours, _ = pair(CASES["dual"])
    one, other = Inputs(CASES["dual"], batch=3), Inputs(CASES["dual"], batch=3, seed=5)
    for tensor, strange in ((one.timesteps, other.timesteps), (one.latents, other.latents)):
        strange[:, 1] = tensor[:, 1]
    other.text[1], other.pooled[1] = one.text[1], one.pooled[1]
    predictions = []
    for inputs in (one, other):
        modulation, *rest = inputs.prepare(ours)
        predictions.append(ours(inputs.latents[0], modulation[0], *rest))
    assert torch.equal(predictions[0][1], predictions[1][1])
    assert not torch.equal(predictions[0][0], predictions[1][0])


def test_constants_are_packed_in_the_dtype_of_the_weights() -> None:
    ours, _ = pair(CASES["dual"])
    constants = Inputs(CASES["dual"], steps=4, size=(6, 10)).prepare(ours.bfloat16())
    assert isinstance(constants, Constants)
    # The image's vectors in two dual layers and a plain one, the text's (few in the last one), the output's.
    assert constants.modulation.shape == (4, 2, 24 * (9 + 9 + 6 + 6 + 6 + 2 + 2))
    assert constants.context.shape == (2, 7, 24)
    assert constants.position.shape == (1, 15, 24)
    assert {tensor.dtype for tensor in constants} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [torch.int64, torch.float64], ids=str)
def test_timesteps_of_any_dtype(kind: torch.dtype) -> None:
    ours, _ = pair(TINY)
    inputs = Inputs(TINY, steps=3)
    inputs.timesteps = inputs.timesteps.round()
    expected = inputs.prepare(ours).modulation
    inputs.timesteps = inputs.timesteps.to(kind)
    assert torch.equal(inputs.prepare(ours).modulation, expected)


@pytest.mark.parametrize("size, sample_size, patch", [(8, 12, 2), (9, 7, 1), (192, 128, 2)])
def test_table_of_positions_is_that_of_diffusers(size: int, sample_size: int, patch: int) -> None:
    config = {**TINY, "pos_embed_max_size": size, "sample_size": sample_size, "patch_size": patch}
    ours, oracle = SD3Transformer(config).pos_embed, SD3Transformer2DModel(**config).pos_embed
    assert torch.equal(ours.pos_embed, oracle.pos_embed)
    for rows, columns in ((1, size), (size, 3), (size - 1, 4), (size, size)):
        assert torch.equal(ours.crop(rows, columns), oracle.cropped_pos_embed(patch * rows, patch * columns))


def test_forward_reads_nothing_that_serves_only_prepare() -> None:
    ours, _ = pair(CASES["dual"])
    inputs = Inputs(CASES["dual"])
    modulation, *rest = inputs.prepare(ours)
    expected = ours(inputs.latents[0], modulation[0], *rest)
    for name in ours.prepare_only():
        ours.get_submodule(name).to_empty(device="meta")
    ours.pos_embed.pos_embed.fill_(float("nan"))
    assert torch.equal(ours(inputs.latents[0], modulation[0], *rest), expected)


def test_forward_is_pure_and_waits_for_nothing() -> None:
    ours, _ = pair(CASES["dual"])
    inputs = Inputs(CASES["dual"], batch=1)
    modulation, *rest = inputs.prepare(ours)
    arguments = (inputs.latents[0], modulation[0], *rest)
    before = [argument.clone() for argument in arguments]
    with Operations() as operations:
        ours(*arguments)
    assert all(map(torch.equal, arguments, before))
    copying = ("aten::cat", "aten::clone", "aten::copy_", "aten::_to_copy", "aten::_local_scalar_dense")
    copies = [name for name in operations.names if name in copying]
    # Latents to patches, queries, keys and values of both kinds in each of three layers, patches to latents.
    assert copies == ["aten::clone", *["aten::cat"] * 9, "aten::clone"]


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_forward_exports_with_free_batch_size_and_text_length() -> None:
    ours, _ = pair(CASES["dual"])
    inputs = Inputs(CASES["dual"], size=(6, 10))
    modulation, *rest = inputs.prepare(ours)
    free = torch.export.Dim.AUTO
    shape = ({0: free, 2: free, 3: free}, {0: free}, {0: free, 1: free}, {1: free})
    program = torch.export.export(
        ours, (inputs.latents[0], modulation[0], *rest), dynamic_shapes=shape, strict=False
    ).module()
    for batch, tokens, size in ((2, 7, (6, 10)), (3, 4, (12, 8))):
        inputs = Inputs(CASES["dual"], batch=batch, tokens=tokens, size=size)
        modulation, *rest = inputs.prepare(ours)
        # The same operations in the same order.
        expected = ours(inputs.latents[0], modulation[0], *rest)
        assert torch.equal(program(inputs.latents[0], modulation[0], *rest), expected)


def test_forward_exports_with_controlnet() -> None:
    ours, _ = pair(TINY)
    inputs = Inputs(TINY)
    modulation, *rest = inputs.prepare(ours)
    arguments = (inputs.latents[0], modulation[0], *rest, [torch.randn(2, 16, 24)])
    program = torch.export.export(ours, arguments, strict=False)
    assert torch.equal(program.module()(*arguments), ours(*arguments))


@pytest.mark.parametrize("name", ["plain", "dual"])
def test_forward_compiles_as_one_graph(name: str) -> None:
    ours, _ = pair(CASES[name])
    inputs = Inputs(CASES[name])
    modulation, *rest = inputs.prepare(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    # aot_eager may decompose into other kernels of the same precision.
    assert_close(compiled(inputs.latents[0], modulation[0], *rest), ours(inputs.latents[0], modulation[0], *rest))


class _Prepare(torch.nn.Module):
    """`prepare` as the engine that a bundle would ship."""

    def __init__(self, transformer: SD3Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, timesteps: Tensor, text: Tensor, pooled: Tensor) -> Constants:
        return self.transformer.prepare(timesteps, text, pooled, height=6, width=10)


def test_prepare_exports() -> None:
    ours, _ = pair(CASES["dual"])
    inputs = Inputs(CASES["dual"], steps=3, size=(6, 10))
    arguments = (inputs.timesteps, inputs.text, inputs.pooled)
    program = torch.export.export(_Prepare(ours), arguments, strict=False)
    for exported, eager in zip(program.module()(*arguments), inputs.prepare(ours), strict=True):
        assert torch.equal(exported, eager)


@pytest.mark.parametrize("name", ["plain", "qk-norm", "dual"])
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
    # The sharper bound: the same arithmetic in diffusers is no better, but for chance.
    error, theirs_error = relative(prediction.float(), exact), relative(theirs.float(), exact)
    assert error < 0.03
    assert error < 1.25 * theirs_error


REFUSED_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "attention_head_dim": {"attention_head_dim": 8.0},
    "attention_head_dim width": {"attention_head_dim": 7, "num_attention_heads": 2, "caption_projection_dim": 14},
    "caption_projection_dim": {"caption_projection_dim": 32},
    "dual_attention_layers": {"dual_attention_layers": 2},
    "dual_attention_layers range": {"dual_attention_layers": [0, 3]},
    "dual_attention_layers kind": {"dual_attention_layers": ["0"]},
    "in_channels": {"in_channels": 0},
    "joint_attention_dim": {"joint_attention_dim": None},
    "num_attention_heads": {"num_attention_heads": -1},
    "num_layers": {"num_layers": True},
    "out_channels": {"out_channels": "16"},
    "out_channels kind": {"out_channels": None},
    "patch_size": {"patch_size": [2, 2]},
    "pooled_projection_dim": {"pooled_projection_dim": 0},
    "pos_embed_max_size": {"pos_embed_max_size": None},
    "qk_norm": {"qk_norm": "layer_norm"},
    "sample_size": {"sample_size": 1},
    "some_future_key": {"some_future_key": 1},
}


@pytest.mark.parametrize("case", REFUSED_CONFIGURATIONS)
def test_configurations_that_are_refused_by_name(case: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(InputError, match=rf"^The SD3 configuration has {case.split()[0]} = "),
    ):
        SD3Transformer({**TINY, **REFUSED_CONFIGURATIONS[case]})


def test_absent_keys_have_the_defaults_of_diffusers() -> None:
    private = {"_class_name": "SD3Transformer2DModel", "_name_or_path": "somewhere", "some_future_key": None}
    with torch.device("meta"):
        ours, oracle = SD3Transformer(private), SD3Transformer2DModel()
    assert shapes(ours) == shapes(oracle)


REFUSED_CONDITIONING: dict[str, tuple[dict[str, Any], str]] = {
    "timesteps without batch": ({"timesteps": torch.ones(2)}, r"timesteps is \[2\].*\[steps, 2\]"),
    "timesteps of another batch": ({"timesteps": torch.ones(4, 1)}, r"timesteps is \[4, 1\]"),
    "no timesteps": ({"timesteps": torch.ones(0, 2)}, r"timesteps is \[0, 2\]"),
    "text of another width": ({"context": torch.ones(2, 7, 21)}, r"\[batch, tokens, 20\]"),
    "text without batch": ({"context": torch.ones(7, 20)}, "context is"),
    "no text": ({"context": torch.ones(2, 0, 20)}, r"context is \[2, 0, 20\]"),
    "pooled text of another batch": ({"pooled": torch.ones(3, 12)}, r"pooled is \[3, 12\].*\[2, 12\]"),
    "pooled text of another width": ({"pooled": torch.ones(2, 13)}, r"pooled is \[2, 13\]"),
    "odd height": ({"height": 7}, "latents are 7 x 8; both must be positive multiples of 2 up to 16"),
    "no width": ({"width": 0}, "latents are 8 x 0"),
    "beyond the table": ({"width": 18}, "latents are 8 x 18; .* up to 16"),
    "negative height": ({"height": -2}, "latents are -2 x 8"),
    "fractional height": ({"height": 8.0}, r"latents are 8\.0 x 8"),
}


@pytest.mark.parametrize("case", REFUSED_CONDITIONING)
def test_conditioning_that_is_refused(case: str) -> None:
    change, message = REFUSED_CONDITIONING[case]
    inputs = Inputs(TINY)
    arguments = {
        "timesteps": inputs.timesteps,
        "context": inputs.text,
        "pooled": inputs.pooled,
        "height": 8,
        "width": 8,
        **change,
    }
    with pytest.raises(InputError, match=message):
        SD3Transformer(TINY).prepare(**arguments)


def public(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def pair(config: dict[str, Any]) -> tuple[SD3Transformer, SD3Transformer2DModel]:
    """Ours and diffusers' with the same weights, none of them zero or one (norms and biases included)."""
    oracle = SD3Transformer2DModel(**config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in oracle.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        else:
            weight.copy_(weight.round().clamp(0, 1) + 0.2 * noise)
    ours = SD3Transformer(config).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return ours, oracle


class Inputs:
    """Random inputs of both classes; every image has its own timesteps."""

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
        self.latents = torch.randn(steps, batch, config["in_channels"], *size, generator=generator)
        self.timesteps = torch.rand(steps, batch, generator=generator) * 1000
        self.text = torch.randn(batch, tokens, config["joint_attention_dim"], generator=generator)
        self.pooled = torch.randn(batch, config["pooled_projection_dim"], generator=generator)

    def prepare(self, transformer: SD3Transformer) -> Constants:
        height, width = self.latents.shape[-2:]
        return transformer.prepare(self.timesteps, self.text, self.pooled, height=height, width=width)

    def oracle(self, oracle: SD3Transformer2DModel, step: int, **residuals: Any) -> Tensor:
        return oracle(self.latents[step], self.text, self.pooled, self.timesteps[step], **residuals).sample


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.isfinite().all() and expected.std() > 0.1  # an output that could not hide a difference
    assert relative(actual, expected) <= RELATIVE


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
