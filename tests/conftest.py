"""Tiny random checkpoints of all families in the real diffusers layout."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub; those about the hub bring their own
# Tiny models: a second thread costs more than it does, most of all where other work runs beside the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def write_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose vocabulary is the bytes, and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    return tokenizer


def write_t5_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer of 200 pieces."""
    from transformers import T5Tokenizer

    pieces = ["\u2581", "\u2581the", "\u2581red", "\u2581cat", "ing", "er", *map(chr, range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(len(pieces))) for piece in pieces)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=100, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def clip(tokenizer: Any, **options: Any) -> dict[str, Any]:
    """Configuration of a tiny CLIP."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.5,  # of a size with which prompts matter
        **options,
    }


def tiny_vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        **{"latent_channels": 4, **options},
    )


def stir(pipeline: Any) -> None:
    """Move every weight a little: none may hide as a zero or a one."""
    import torch

    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            for parameter in module.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)


def write_checkpoint(
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A whole Stable Diffusion checkpoint with random weights, as `diffusers` writes it (fp32, 0.3 MB)."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip(tokenizer))),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**{**UNET, **(unet or {})}),
        scheduler=DDIMScheduler(**{**BETAS, "clip_sample": False, "steps_offset": 1, **(scheduler or {})}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stir(pipeline)
    pipeline.save_pretrained(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()  # most Stable Diffusion checkpoints have only the older files
    return folder


def write_sdxl(
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    force_zeros: bool = True,
) -> Path:
    """A whole SDXL checkpoint with random weights, as `diffusers` writes it."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    first, second = write_tokenizer(folder / "tokenizer"), write_tokenizer(folder / "tokenizer_2")
    second.pad_token = "!"
    config = {
        **UNET,
        "cross_attention_dim": 24 + 16,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
        **(unet or {}),
    }
    big = clip(second, hidden_size=16, projection_dim=20, hidden_act="gelu", num_hidden_layers=4)
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip(first))),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**big)),
        tokenizer=first,
        tokenizer_2=second,
        unet=UNet2DConditionModel(**config),
        scheduler=EulerDiscreteScheduler(
            **{**BETAS, "timestep_spacing": "leading", "steps_offset": 1, **(scheduler or {})}
        ),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    stir(pipeline)
    pipeline.save_pretrained(folder)
    return folder


SD3 = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 12 + 20,
    "pos_embed_max_size": 12,
}


def write_sd3(
    folder: Path, *, transformer: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None, t5: bool = True
) -> Path:
    """A whole Stable Diffusion 3 checkpoint with random weights, as `diffusers` writes it."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(2)
    first, second = write_tokenizer(folder / "tokenizer"), write_tokenizer(folder / "tokenizer_2")
    second.pad_token = "!"
    third = write_t5_tokenizer(folder / "tokenizer_3") if t5 else None
    big = clip(second, hidden_size=8, projection_dim=20, hidden_act="gelu")
    small = clip(first, hidden_size=16, projection_dim=12)
    pipeline = StableDiffusion3Pipeline(
        vae=tiny_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**small)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**big)),
        text_encoder_3=T5EncoderModel(T5Config(**tiny_t5(third))) if third else None,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third,
        transformer=SD3Transformer2DModel(**{**SD3, **(transformer or {})}),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler or {})}),
    )
    stir(pipeline)
    pipeline.save_pretrained(folder)
    return folder


def tiny_t5(tokenizer: Any) -> dict[str, Any]:
    """Configuration of a tiny T5 encoder."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}


def write_flux(
    folder: Path, *, transformer: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None
) -> Path:
    """A whole Flux.1 checkpoint with random weights, as `diffusers` writes it."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(3)
    first, second = write_tokenizer(folder / "tokenizer"), write_t5_tokenizer(folder / "tokenizer_2")
    options = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    pipeline = FluxPipeline(
        vae=tiny_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip(first))),
        text_encoder_2=T5EncoderModel(T5Config(**tiny_t5(second))),
        tokenizer=first,
        tokenizer_2=second,
        transformer=FluxTransformer2DModel(**{**FLUX, **(transformer or {})}),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**options, **(scheduler or {})}),
    )
    stir(pipeline)
    pipeline.save_pretrained(folder)
    return folder


WRITERS = {"sd": write_checkpoint, "sdxl": write_sdxl, "sd3": write_sd3, "flux": write_flux}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny checkpoint; the same arguments give the same folder, so treat it as read-only."""
    made: dict[str, Path] = {}

    def make(family: str = "sd", **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = WRITERS[family](tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: Callable[..., Path]) -> Path:
    """The plain tiny checkpoint: epsilon prediction, DDIM."""
    return make_checkpoint()
