"""Tiny random checkpoints in the real diffusers layout."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub; those about the hub bring their own

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


def write_checkpoint(
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A whole Stable Diffusion checkpoint with random weights, as `diffusers` writes it (fp32, 0.3 MB)."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,  # of a size with which prompts matter
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**{**UNET, **(unet or {})}),
        scheduler=DDIMScheduler(**{**BETAS, "clip_sample": False, "steps_offset": 1, **(scheduler or {})}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        for parameter in module.parameters():  # no weight may hide as a zero or a one
            parameter.data += 0.02 * torch.randn_like(parameter)
    pipeline.save_pretrained(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()  # most Stable Diffusion checkpoints have only the older files
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny checkpoint; the same arguments give the same folder, so treat it as read-only."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: Callable[..., Path]) -> Path:
    """The plain tiny checkpoint: epsilon prediction, DDIM."""
    return make_checkpoint()
