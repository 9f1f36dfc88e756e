"""Presets with all their structure at a width and depth that any machine can run: for dry runs and tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastsd.presets import PRESETS, Preset

CLIP, PROJECTION, T5, VOCABULARY = 64, 40, 128, 1000
# Pipeline -> widths of context and pooled vector, which follow from those of the text encoders.
WIDTHS = {
    "StableDiffusionPipeline": (CLIP, 0),
    "StableDiffusionXLPipeline": (2 * CLIP, PROJECTION),
    "StableDiffusion3Pipeline": (T5, 2 * PROJECTION),
    "FluxPipeline": (T5, CLIP),
}
TEXT_MODEL = {
    "hidden_size": CLIP,
    "intermediate_size": 4 * CLIP,
    "num_attention_heads": 4,
    "projection_dim": PROJECTION,
    "vocab_size": VOCABULARY,
}
NARROW: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"attention_head_dim": 2, "norm_num_groups": 8},
    "AutoencoderKL": {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8},
    "CLIPTextModel": TEXT_MODEL,
    "CLIPTextModelWithProjection": TEXT_MODEL,
    "T5EncoderModel": {"d_model": T5, "d_ff": 320, "d_kv": 16, "num_heads": 4, "vocab_size": VOCABULARY},
    "SD3Transformer2DModel": {
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "caption_projection_dim": 64,
        "pos_embed_max_size": 32,
    },
    "FluxTransformer2DModel": {
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
        "num_attention_heads": 4,
    },
}
SHALLOW: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"layers_per_block": 1},
    "AutoencoderKL": {"layers_per_block": 1},
    "CLIPTextModel": {"num_hidden_layers": 3},
    "CLIPTextModelWithProjection": {"num_hidden_layers": 3},
    "T5EncoderModel": {"num_layers": 3},
    "SD3Transformer2DModel": {"num_layers": 3},
    "FluxTransformer2DModel": {"num_layers": 2, "num_single_layers": 2},
}


def narrow(name: str, *, full_depth: bool = False) -> Preset:
    """A preset at a small width and, if not `full_depth`, depth."""
    preset = PRESETS[name]
    context, pooled = WIDTHS[preset.index["_class_name"]]
    configs = {}
    for component, config in preset.configs.items():
        kind = preset.index[component][1]
        configs[component] = {**config, **NARROW.get(kind, {}), **({} if full_depth else SHALLOW.get(kind, {}))}
        if kind == "UNet2DConditionModel":
            configs[component]["block_out_channels"] = [32, 64, 128, 128][: len(config["block_out_channels"])]
            configs[component]["cross_attention_dim"] = context
            if "addition_embed_type" in config:
                configs[component]["addition_time_embed_dim"] = 16
                configs[component]["projection_class_embeddings_input_dim"] = pooled + 6 * 16
        if component == "transformer":
            configs[component] |= {"joint_attention_dim": context, "pooled_projection_dim": pooled}
        if "dual_attention_layers" in config and not full_depth:
            configs[component]["dual_attention_layers"] = [0, 1]
    tokenizers = {
        component: facts._replace(
            vocab_size=VOCABULARY,
            bos=None if facts.bos is None else VOCABULARY - 2,
            eos=min(facts.eos, VOCABULARY - 1),
            pad=min(facts.pad, VOCABULARY - 1),
        )
        for component, facts in preset.tokenizers.items()
    }
    return dataclasses.replace(preset, configs=configs, tokenizers=tokenizers)
