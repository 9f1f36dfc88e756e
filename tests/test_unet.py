"""The UNet against its oracle, `diffusers.UNet2DConditionModel`: same names, same weights, same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.denoisers.layers import guidance_embedding
from fastsd.denoisers.unet import Constants, UNet
from fastsd.errors import InputError

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"

# The published unet/config.json files, and the number of parameters that their model cards or papers give.

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
SD21_BASE = {
    **SD15,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
SD21_768_V = {**SD21_BASE, "sample_size": 96, "upcast_attention": True}
LCM_DREAMSHAPER = {
    **SD15,
    "_diffusers_version": "0.22.0.dev0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": 256,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
    "use_linear_projection": False,
}
SDXL_BASE = {
    **LCM_DREAMSHAPER,
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "use_linear_projection": True,
}
SDXL_REFINER = {
    **SDXL_BASE,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
}
PUBLISHED = {
    "sd15": (SD15, 859_520_964),
    "sd21-base": (SD21_BASE, 865_910_724),
    "sd21-768-v": (SD21_768_V, 865_910_724),
    "lcm-dreamshaper": (LCM_DREAMSHAPER, 859_520_964 + 256 * 320),
    "sdxl-base": (SDXL_BASE, 2_567_463_684),
    "sdxl-refiner": (SDXL_REFINER, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name: str) -> None:
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        ours, oracle = UNet(config), UNet2DConditionModel(**public(config))
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in oracle.state_dict().items()}
    assert parameters in (None, sum(shape.numel() for shape in shapes.values()))


# Tiny models. "tiny" is the base of all: odd groups of features are switched on in the others.

TINY = {
    "block_out_channels": [16, 32],
    "down_block_types": [CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
}
TINY_XL = {
    **TINY,
    "block_out_channels": [16, 32, 48],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "attention_head_dim": [2, 4, 6],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}
TINY_LCM = {**TINY, "time_cond_proj_dim": 20}
CASES: dict[str, dict[str, Any]] = {
    "conv-projection": TINY,
    "linear-projection": {**TINY, "use_linear_projection": True},
    "sd15-four-levels": {
        **SD15,
        "block_out_channels": [8, 16, 24, 24],
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
    },
    "sd21-heads-per-level": {
        **SD21_768_V,
        "block_out_channels": [8, 16, 24, 24],
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": [1, 2, 3, 6],
    },
    "two-layers": {**TINY, "layers_per_block": 2},
    "three-layers": {**TINY, "layers_per_block": 3},
    "layers-per-level": {**TINY, "layers_per_block": [1, 3]},
    "only-cross-attention": {**TINY, "only_cross_attention": True},
    "only-cross-attention-per-level": {
        **TINY,
        "down_block_types": [CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP],
        "only_cross_attention": [False, True],
    },
    "no-mid-block": {**TINY, "mid_block_type": None},
    "no-transformer-layers": {**TINY, "transformer_layers_per_block": [0, 1]},
    "one-level": {
        **TINY,
        "block_out_channels": [16],
        "down_block_types": [CROSS_DOWN],
        "up_block_types": [CROSS_UP],
    },
    "sin-first-shifted": {**TINY, "flip_sin_to_cos": False, "freq_shift": 1},
    "odd-embedding-width": {
        **TINY,
        "block_out_channels": [15, 30],
        "norm_num_groups": 5,
        "attention_head_dim": 3,
    },
    "kernels-channels-eps": {
        **TINY,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "in_channels": 9,
        "out_channels": 3,
        "norm_eps": 1e-3,
        "time_embedding_dim": 40,
    },
    "guidance-embedding": TINY_LCM,
    "guidance-embedding-odd": {**TINY, "time_cond_proj_dim": 21},
    "sdxl-ten-layers": TINY_XL,
    "sdxl-refiner": {
        **TINY_XL,
        "block_out_channels": [8, 16, 24, 24],
        "attention_head_dim": [2, 4, 6, 6],
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
        "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 10 + 5 * 8,
    },
    "sdxl-guidance-embedding": {**TINY_XL, "time_cond_proj_dim": 20},
}

# Relative to the largest output. The same network in float32, summed in other orders, deviates by up to 2e-6.
RELATIVE = 1e-5


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 6)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("batch", [1, 2, 3], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers_at_every_step(name: str, batch: int, size: tuple[int, int]) -> None:
    unet, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], steps=2, batch=batch, size=size)
    constants = inputs.prepare(unet)
    for i, latents in enumerate(inputs.latents):
        prediction = unet(latents, constants.modulation[i], constants.context)
        assert_close(prediction, inputs.oracle(oracle, i))


@pytest.mark.parametrize("name", ["conv-projection", "linear-projection", "sdxl-ten-layers"])
def test_channels_last_equals_diffusers(name: str) -> None:
    unet, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], size=(9, 13))
    constants = inputs.prepare(unet)
    latents = inputs.latents[0].to(memory_format=torch.channels_last)
    prediction = unet.to(memory_format=torch.channels_last)(latents, constants.modulation[0], constants.context)
    assert_close(prediction, inputs.oracle(oracle, 0))


@pytest.mark.parametrize("name", ["sd15-four-levels", "sdxl-ten-layers", "no-mid-block"])
@pytest.mark.parametrize("size", [(8, 8), (9, 13)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_controlnet_residuals(name: str, size: tuple[int, int]) -> None:
    unet, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], size=size)
    constants = inputs.prepare(unet)
    row = (constants.modulation[0], constants.context)
    skips = skip_tensors(unet, inputs.latents[0], *row)
    down = tuple(torch.randn_like(skip) for skip in skips)
    mid = torch.randn_like(skips[-1])

    prediction = unet(inputs.latents[0], *row, down, mid)
    expected = inputs.oracle(oracle, 0, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    assert_close(prediction, expected)
    # Zero residuals are no residuals; each argument works by itself.
    plain = unet(inputs.latents[0], *row)
    assert torch.equal(unet(inputs.latents[0], *row, [torch.zeros_like(skip) for skip in skips]), plain)
    assert torch.equal(unet(inputs.latents[0], *row, None, torch.zeros_like(mid)), plain)


@pytest.mark.parametrize("name", ["sd15-four-levels", "guidance-embedding", "sdxl-ten-layers"])
def test_one_prepare_serves_a_whole_run(name: str) -> None:
    """Prepare and eight forwards that feed on each other are eight calls of the oracle."""
    unet, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], steps=8, batch=2, size=(9, 13))
    constants = inputs.prepare(unet)
    latents = inputs.latents[0]
    for modulation in constants.modulation:
        latents = latents - 0.1 * unet(latents, modulation, constants.context)
    expected = inputs.latents[0]
    for i in range(8):
        inputs.latents[i] = expected
        expected = expected - 0.1 * inputs.oracle(oracle, i)
    assert_close(latents, expected)


def test_guidance_embedding_is_the_pipelines() -> None:
    """Scales in float64, as the Python numbers that diffusers subtracts 1 from, give its very embedding."""
    scales = [1.0, 1.5, 7.3, 8.5, 0.0, 14.0]
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1 for scale in scales]), embedding_dim=256
    )
    assert torch.equal(guidance_embedding(torch.tensor(scales, dtype=torch.float64), 256), expected)


@pytest.mark.parametrize("name", ["conv-projection", "guidance-embedding", "sdxl-ten-layers"])
def test_constants_are_packed_in_the_dtype_of_the_weights(name: str) -> None:
    unet, _ = pair(CASES[name])
    inputs = Inputs(CASES[name], steps=4, batch=2)
    constants = inputs.prepare(unet.bfloat16())
    projections = [value for key, value in unet.state_dict().items() if key.endswith("time_emb_proj.bias")]
    keys = [value for key, value in unet.state_dict().items() if key.endswith("attn2.to_k.weight")]
    assert constants.modulation.shape == (4, 2, sum(len(bias) for bias in projections))
    assert constants.context.shape == (2, 7, sum(2 * len(weight) for weight in keys))
    assert constants.modulation.dtype == constants.context.dtype == torch.bfloat16


def test_images_of_a_batch_are_independent() -> None:
    """Other images in the batch do not leak: float32 sums may be blocked otherwise, hence no bit equality."""
    unet, _ = pair(TINY_XL)
    inputs = Inputs(TINY_XL, batch=3)
    constants = inputs.prepare(unet)
    together = unet(inputs.latents[0], constants.modulation[0], constants.context)
    for i in range(3):
        alone = unet(
            inputs.latents[0][i : i + 1],
            constants.modulation[0][i : i + 1],
            constants.context[i : i + 1],
        )
        assert_close(alone, together[i : i + 1])


@pytest.mark.parametrize("residuals", [False, True], ids=["plain", "residuals"])
@pytest.mark.parametrize("name", ["conv-projection", "sdxl-ten-layers"])
def test_forward_exports(name: str, residuals: bool) -> None:
    unet, _ = pair(CASES[name])
    inputs = Inputs(CASES[name], size=(9, 13))
    constants = inputs.prepare(unet)
    arguments: tuple[Any, ...] = (inputs.latents[0], constants.modulation[0], constants.context)
    if residuals:
        skips = skip_tensors(unet, *arguments)
        arguments = (*arguments, tuple(torch.randn_like(skip) for skip in skips), torch.randn_like(skips[-1]))
    program = torch.export.export(unet, arguments, strict=False)
    # The same operations in the same order.
    assert torch.equal(program.module()(*arguments), unet(*arguments))


def test_forward_compiles_as_one_graph() -> None:
    unet, _ = pair(TINY)
    inputs = Inputs(TINY, size=(9, 13))
    constants = inputs.prepare(unet)
    arguments = (inputs.latents[0], constants.modulation[0], constants.context)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    # aot_eager may decompose into other kernels of the same precision.
    assert_close(compiled(*arguments), unet(*arguments))


class _Prepare(torch.nn.Module):
    """`prepare` as the engine that a bundle would ship."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, timesteps: Tensor, text: Tensor, text_embeds: Tensor, time_ids: Tensor) -> Constants:
        return self.unet.prepare(timesteps, text, text_embeds=text_embeds, time_ids=time_ids)


def test_prepare_exports() -> None:
    unet, _ = pair(TINY_XL)
    inputs = Inputs(TINY_XL, steps=3, batch=2)
    arguments = (inputs.timesteps, inputs.text, *inputs.conditioning.values())
    program = torch.export.export(_Prepare(unet), arguments, strict=False)
    for exported, eager in zip(program.module()(*arguments), inputs.prepare(unet), strict=True):
        assert torch.equal(exported, eager)


@pytest.mark.parametrize("name", ["sd21-heads-per-level", "sdxl-ten-layers", "guidance-embedding"])
def test_bfloat16(name: str) -> None:
    unet, oracle = pair(CASES[name])
    inputs = Inputs(CASES[name], batch=2, size=(9, 13))
    exact = inputs.oracle(oracle, 0)

    constants = inputs.prepare(unet.bfloat16())
    ours = unet(inputs.latents[0].bfloat16(), constants.modulation[0], constants.context)
    theirs = inputs.to(torch.bfloat16).oracle(oracle.bfloat16(), 0)
    assert ours.dtype == torch.bfloat16
    # Rounding to 8 bits (2**-9) at each of up to 400 operations in sequence, adding like a random walk: 4 %.
    # The sharper bound: the same arithmetic in diffusers is no better, but for chance.
    error, theirs_error = relative_rms(ours.float(), exact), relative_rms(theirs.float(), exact)
    assert error < 0.06
    assert error < 1.25 * theirs_error


def test_large_attention_scores_stay_finite_in_float16() -> None:
    """SD 2.1's scores overflow float16 (hence its `upcast_attention`); here they accumulate in float32."""
    unet, _ = pair(CASES["sd21-heads-per-level"])
    inputs = Inputs(CASES["sd21-heads-per-level"])
    for name, weight in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            weight.mul_(400)
    queries: list[Tensor] = []
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    for projection in (attention.to_q, attention.to_k):
        projection.register_forward_hook(lambda module, args, output: queries.append(output.float()))
    constants = inputs.prepare(unet.half())
    prediction = unet(inputs.latents[0].half(), constants.modulation[0], constants.context)
    q, k = (tokens.unflatten(-1, (attention.heads, -1)) for tokens in queries)
    assert torch.einsum("blhd,bshd->bhls", q, k).abs().max() > torch.finfo(torch.float16).max
    assert prediction.isfinite().all()


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["sd15-four-levels", "sdxl-ten-layers"])
def test_forward_copies_nothing_but_the_skip_connections(name: str, layout: torch.memory_format) -> None:
    unet, _ = pair(CASES[name])
    inputs = Inputs(CASES[name])
    constants = inputs.prepare(unet.to(memory_format=layout))
    latents = inputs.latents[0].to(memory_format=layout)
    with Operations() as operations:
        prediction = unet(latents, constants.modulation[0], constants.context)
    copying = ("aten::cat", "aten::clone", "aten::copy_", "aten::_to_copy")
    copies = [name for name in operations.names if name in copying]
    assert copies == ["aten::cat"] * sum(len(block.resnets) for block in unet.up_blocks)
    assert prediction.is_contiguous(memory_format=layout)


REFUSED_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "act_fn": {"act_fn": "gelu"},
    "addition_embed_type": {"addition_embed_type": "image"},
    "addition_time_embed_dim": {"addition_embed_type": "text_time"},
    "attention_head_dim": {"attention_head_dim": 5},
    "attention_head_dim list": {"attention_head_dim": [4, 4, 4]},
    "attention_head_dim kind": {"attention_head_dim": None},
    "attention_type": {"attention_type": "gated"},
    "block_out_channels": {"block_out_channels": []},
    "block_out_channels number": {"block_out_channels": 32},
    "block_out_channels sign": {"block_out_channels": [16, -32]},
    "center_input_sample": {"center_input_sample": True},
    "class_embed_type": {"class_embed_type": "timestep"},
    "class_embeddings_concat": {"class_embeddings_concat": True},
    "conv_in_kernel": {"conv_in_kernel": 4},
    "conv_out_kernel": {"conv_out_kernel": 0},
    "cross_attention_dim": {"cross_attention_dim": [12, 12]},
    "cross_attention_norm": {"cross_attention_norm": "layer_norm"},
    "down_block_types": {"down_block_types": [CROSS_DOWN, "SimpleCrossAttnDownBlock2D"]},
    "down_block_types length": {"down_block_types": [CROSS_DOWN]},
    "downsample_padding": {"downsample_padding": 0},
    "dual_cross_attention": {"dual_cross_attention": True},
    "encoder_hid_dim": {"encoder_hid_dim": 1024},
    "encoder_hid_dim_type": {"encoder_hid_dim_type": "ip_image_proj"},
    "flip_sin_to_cos": {"flip_sin_to_cos": "yes"},
    "freq_shift": {"freq_shift": 8},
    "in_channels": {"in_channels": "4"},
    "layers_per_block": {"layers_per_block": 0},
    "layers_per_block bool": {"layers_per_block": True},
    "mid_block_only_cross_attention": {"mid_block_only_cross_attention": True},
    "mid_block_scale_factor": {"mid_block_scale_factor": 2},
    "mid_block_type": {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    "mid_block_type and no attention": {
        "mid_block_type": None,
        "down_block_types": [DOWN, DOWN],
        "up_block_types": [UP, UP],
    },
    "norm_eps": {"norm_eps": 0.0},
    "norm_num_groups": {"norm_num_groups": 3},
    "norm_num_groups kind": {"norm_num_groups": None},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_class_embeds": {"num_class_embeds": 1000},
    "only_cross_attention": {"only_cross_attention": "down"},
    "out_channels": {"out_channels": 4.0},
    "projection_class_embeddings_input_dim": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
    },
    "resnet_out_scale_factor": {"resnet_out_scale_factor": 1.5},
    "resnet_skip_time_act": {"resnet_skip_time_act": True},
    "resnet_time_scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "reverse_transformer_layers_per_block": {"reverse_transformer_layers_per_block": [[1, 1], 1]},
    "time_cond_proj_dim": {"time_cond_proj_dim": 2},
    "time_embedding_act_fn": {"time_embedding_act_fn": "silu"},
    "time_embedding_dim": {"time_embedding_dim": -1},
    "time_embedding_type": {"time_embedding_type": "fourier"},
    "timestep_post_act": {"timestep_post_act": "silu"},
    "transformer_layers_per_block": {"transformer_layers_per_block": [[1, 2], 1]},
    "up_block_types": {"up_block_types": [UP, "AttnUpBlock2D"]},
    "up_block_types kind": {"up_block_types": UP[:-1]},
    "use_linear_projection": {"use_linear_projection": "auto"},
    "some_future_key": {"some_future_key": 1},
}


@pytest.mark.parametrize("case", REFUSED_CONFIGURATIONS)
def test_configurations_that_are_refused_by_name(case: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(InputError, match=rf"^The UNet configuration has {case.split()[0]} = "),
    ):
        UNet({**TINY, **REFUSED_CONFIGURATIONS[case]})


def test_keys_that_mean_nothing_are_accepted() -> None:
    private = {"_class_name": "UNet2DConditionModel", "_name_or_path": "somewhere", "_use_default_values": []}
    with torch.device("meta"):
        UNet({**TINY, **private, "some_future_key": None, "dropout": 0.1, "upcast_attention": True})


REFUSED_CONDITIONING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "timesteps without batch": (TINY, {"timesteps": torch.ones(2)}, r"timesteps is \[2\].*\[steps, 2\]"),
    "timesteps of another batch": (TINY, {"timesteps": torch.ones(4, 1)}, r"timesteps is \[4, 1\]"),
    "no timesteps": (TINY, {"timesteps": torch.ones(0, 2)}, r"timesteps is \[0, 2\]"),
    "text of another width": (
        TINY,
        {"encoder_hidden_states": torch.ones(2, 7, 13)},
        r"\[batch, tokens, 12\]",
    ),
    "text without batch": (TINY, {"encoder_hidden_states": torch.ones(7, 12)}, "encoder_hidden_states is"),
    "unexpected pooled text": (TINY, {"text_embeds": torch.ones(2, 10)}, "takes no text_embeds"),
    "unexpected sizes": (TINY, {"time_ids": torch.ones(2, 6)}, "takes no text_embeds and time_ids"),
    "unexpected guidance": (TINY, {"guidance_scale": torch.ones(2)}, "takes no guidance_scale"),
    "missing guidance": (TINY_LCM, {"guidance_scale": None}, "needs guidance_scale"),
    "guidance of another batch": (TINY_LCM, {"guidance_scale": torch.ones(3)}, r"guidance_scale is \[3\]"),
    "missing pooled text": (TINY_XL, {"text_embeds": None}, "needs text_embeds and time_ids"),
    "missing sizes": (TINY_XL, {"time_ids": None}, "needs text_embeds and time_ids"),
    "sizes of the refiner": (TINY_XL, {"time_ids": torch.ones(2, 5)}, r"time_ids \[2, 5\].*p \+ 8 n = 58"),
    "pooled text of another batch": (
        TINY_XL,
        {"text_embeds": torch.ones(3, 10)},
        r"text_embeds is \[3, 10\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED_CONDITIONING)
def test_conditioning_that_is_refused(case: str) -> None:
    config, change, message = REFUSED_CONDITIONING[case]
    inputs = Inputs(config, batch=2)
    arguments = {
        "timesteps": inputs.timesteps,
        "encoder_hidden_states": inputs.text,
        **inputs.conditioning,
        **change,
    }
    with pytest.raises(InputError, match=message):
        UNet(config).prepare(**arguments)


def public(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def pair(config: dict[str, Any]) -> tuple[UNet, UNet2DConditionModel]:
    """Our UNet and diffusers' with the same weights, none of them zero or one (norms and biases included)."""
    oracle = UNet2DConditionModel(**public(config)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in oracle.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        else:
            weight.copy_(weight.round().clamp(0, 1) + 0.2 * noise)
    unet = UNet(config).eval().requires_grad_(False)
    unet.load_state_dict(oracle.state_dict(), strict=True)
    return unet, oracle


class Inputs:
    """Random inputs of both classes; every image has its own timesteps."""

    def __init__(
        self, config: dict[str, Any], *, steps: int = 1, batch: int = 2, size: tuple[int, int] = (8, 8)
    ) -> None:
        generator = torch.Generator().manual_seed(2)
        self.dim = config.get("time_cond_proj_dim")
        self.latents = torch.randn(steps, batch, config.get("in_channels", 4), *size, generator=generator)
        self.timesteps = torch.rand(steps, batch, generator=generator) * 999
        self.text = torch.randn(batch, 7, config["cross_attention_dim"], generator=generator)
        self.conditioning: dict[str, Tensor] = {}
        if config.get("addition_embed_type") is not None:
            ids = (config["projection_class_embeddings_input_dim"] - 10) // config["addition_time_embed_dim"]
            self.conditioning["text_embeds"] = torch.randn(batch, 10, generator=generator)
            self.conditioning["time_ids"] = torch.randint(0, 1025, (batch, ids), generator=generator).float()
        if self.dim is not None:
            self.conditioning["guidance_scale"] = 1 + 10 * torch.rand(batch, generator=generator).double()

    def to(self, dtype: torch.dtype) -> Inputs:
        self.latents, self.text = self.latents.to(dtype), self.text.to(dtype)
        return self

    def prepare(self, unet: UNet) -> Constants:
        return unet.prepare(self.timesteps, self.text, **self.conditioning)

    def oracle(self, oracle: UNet2DConditionModel, step: int, **residuals: Any) -> Tensor:
        added = {key: self.conditioning.get(key) for key in ("text_embeds", "time_ids")}
        guidance = None
        if self.dim is not None:
            guidance = StableDiffusionPipeline.get_guidance_scale_embedding(
                None, (self.conditioning["guidance_scale"] - 1).float(), embedding_dim=self.dim
            ).to(self.latents.dtype)
        return oracle(
            self.latents[step],
            self.timesteps[step],
            self.text,
            timestep_cond=guidance,
            added_cond_kwargs=added,
            **residuals,
        ).sample


def skip_tensors(unet: UNet, latents: Tensor, modulation: Tensor, context: Tensor) -> list[Tensor]:
    """The skip connections, for their shapes."""
    skips = [unet.conv_in(latents)]
    for block in unet.down_blocks:
        block(skips[-1], modulation, context, skips)
    return skips


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.isfinite().all() and expected.std() > 0.1  # an output that could not hide a difference
    assert (actual - expected).abs().max() <= RELATIVE * expected.abs().max()


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
