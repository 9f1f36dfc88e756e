"""Single-file checkpoints in the original layouts: the same tensors as diffusers' `from_single_file`, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import diffusers
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsd
from fastsd import checkpoint, single_file
from fastsd.errors import InputError
from fastsd.presets import PRESETS
from fastsd.tensors import open_file, read_header

State = dict[str, Tensor]

# ------------------------------------------------------------------------------------------------------------
# The original layouts, as renamings of diffusers' names. In a new name, #n is the part of a tensor that joins several,
# ~ exchanges the halves of a tensor, @ gives a matrix the shape of a 1x1 convolution, and ^ transposes it.

ATTENTION = [(r"to_([qkv])\.", r"\1."), (r"to_out\.0\.", "proj_out."), (r"group_norm\.", "norm.")]
RESNET = [
    (r"norm1\.", "in_layers.0."), (r"conv1\.", "in_layers.2."), (r"norm2\.", "out_layers.0."),
    (r"conv2\.", "out_layers.3."), (r"time_emb_proj\.", "emb_layers.1."), (r"conv_shortcut\.", "skip_connection."),
]  # fmt: skip


def replace_all(name: str, table: Iterable[tuple[str, Any]]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def ldm_unet(name: str, config: Mapping[str, Any]) -> str:
    n: int = config.get("layers_per_block", 2) + 1
    attends = ["CrossAttn" in block for block in config["up_block_types"]]

    def at(match: re.Match[str], offset: int) -> int:
        return n * int(match[1]) + int(match[2]) + offset

    if ".resnets." in name:
        name = replace_all(name, RESNET)
    return replace_all(
        name,
        [
            (r"^down_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"input_blocks.{at(m, 1)}.0"),
            (r"^down_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"input_blocks.{at(m, 1)}.1"),
            (r"^down_blocks\.(\d+)\.downsamplers\.(0)\.conv", lambda m: f"input_blocks.{at(m, n)}.0.op"),
            (r"^up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"output_blocks.{at(m, 0)}.0"),
            (r"^up_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"output_blocks.{at(m, 0)}.1"),
            (
                r"^up_blocks\.(\d+)\.upsamplers\.(0)",
                lambda m: f"output_blocks.{at(m, n - 1)}.{1 + attends[int(m[1])]}",
            ),
            (r"^mid_block\.resnets\.(\d+)", lambda m: f"middle_block.{2 * int(m[1])}"),
            (r"^mid_block\.attentions\.0", "middle_block.1"),
            (r"^(time|add)_embedding\.linear_(\d)", lambda m: f"{m[1]}_embed.{2 * int(m[2]) - 2}"),
            (r"^add_embed\.", "label_emb.0."),
            (r"^conv_in\.", "input_blocks.0.0."),
            (r"^conv_norm_out\.", "out.0."),
            (r"^conv_out\.", "out.2."),
        ],
    )


def ldm_vae(name: str, config: Mapping[str, Any]) -> str:
    last = len(config["block_out_channels"]) - 1
    if ".attentions." in name:
        name = replace_all(name, ATTENTION) + ("@" if name.endswith("weight") and "group_norm" not in name else "")
    return replace_all(
        name,
        [
            (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
            (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
            (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block"),
            (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
            (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
            (r"mid_block\.attentions\.0", "mid.attn_1"),
            (r"conv_shortcut", "nin_shortcut"),
            (r"conv_norm_out", "norm_out"),
        ],
    )


def clip(name: str, config: Mapping[str, Any]) -> str:
    return name if name.startswith("text_") else f"text_model.{name}"


def open_clip(name: str, config: Mapping[str, Any]) -> str:
    return replace_all(
        clip(name, config),
        [
            (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
            (r"^text_model\.embeddings\.", ""),
            (r"^text_model\.final_layer_norm", "ln_final"),
            (r"^text_model\.encoder\.layers", "transformer.resblocks"),
            (r"layer_norm(\d)", r"ln_\1"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
            (r"self_attn\.([qkv])_proj\.", lambda m: f"attn.in_proj_#{'qkv'.index(m[1])}"),
            (r"self_attn", "attn"),
            (r"^text_projection\.weight", "text_projection^"),
        ],
    )


def sd3(name: str, config: Mapping[str, Any]) -> str:
    last = config["num_layers"] - 1
    name = re.sub(
        rf"^transformer_blocks\.{last}\.norm1_context\.linear\.(\w+)",
        rf"transformer_blocks.{last}.norm1_context.linear.\1~",
        name,
    )
    return replace_all(
        name,
        [
            (r"^pos_embed\.pos_embed", "pos_embed"),
            (r"^pos_embed\.proj", "x_embedder.proj"),
            (r"^time_text_embed\.timestep_embedder\.linear_(\d)", lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}"),
            (r"^time_text_embed\.text_embedder\.linear_(\d)", lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1~"),
            (r"^transformer_blocks", "joint_blocks"),
            (r"(attn2?)\.to_([qkv])\.", lambda m: f"x_block.{m[1]}.qkv.#{'qkv'.index(m[2])}"),
            (r"attn\.add_([qkv])_proj\.", lambda m: f"context_block.attn.qkv.#{'qkv'.index(m[1])}"),
            (r"attn\.norm_added_([qk])", r"context_block.attn.ln_\1"),
            (r"(attn2?)\.norm_([qk])", r"x_block.\1.ln_\2"),
            (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
            (r"attn\.to_add_out", "context_block.attn.proj"),
            (r"norm1\.linear", "x_block.adaLN_modulation.1"),
            (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
            (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
            (r"ff\.net\.2", "x_block.mlp.fc2"),
            (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
            (r"ff_context\.net\.2", "context_block.mlp.fc2"),
        ],
    )  # fmt: skip


def flux(name: str, config: Mapping[str, Any]) -> str:
    layers = {"1": "in_layer", "2": "out_layer"}
    stem = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}
    norm = {"q": "query_norm.scale", "k": "key_norm.scale"}
    if name.startswith("single_transformer_blocks"):
        return replace_all(
            name,
            [
                (r"^single_transformer_blocks", "single_blocks"),
                (r"norm\.linear", "modulation.lin"),
                (r"attn\.to_([qkv])\.", lambda m: f"linear1.#{'qkv'.index(m[1])}"),
                (r"proj_mlp\.", "linear1.#3"),
                (r"attn\.norm_([qk])\.weight", lambda m: f"norm.{norm[m[1]]}"),
                (r"proj_out", "linear2"),
            ],
        )
    return replace_all(
        name,
        [
            (
                r"^time_text_embed\.(\w+)_embedder\.linear_(\d)",
                lambda m: f"{stem[m[1]]}.{layers[m[2]]}",
            ),
            (r"^context_embedder", "txt_in"),
            (r"^x_embedder", "img_in"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1~"),
            (r"^transformer_blocks", "double_blocks"),
            (r"norm1\.linear", "img_mod.lin"),
            (r"norm1_context\.linear", "txt_mod.lin"),
            (r"attn\.to_([qkv])\.", lambda m: f"img_attn.qkv.#{'qkv'.index(m[1])}"),
            (r"attn\.add_([qkv])_proj\.", lambda m: f"txt_attn.qkv.#{'qkv'.index(m[1])}"),
            (r"attn\.norm_added_([qk])\.weight", lambda m: f"txt_attn.norm.{norm[m[1]]}"),
            (r"attn\.norm_([qk])\.weight", lambda m: f"img_attn.norm.{norm[m[1]]}"),
            (r"attn\.to_out\.0", "img_attn.proj"),
            (r"attn\.to_add_out", "txt_attn.proj"),
            (r"ff\.net\.(0\.proj|2)", lambda m: f"img_mlp.{m[1][0]}"),
            (r"ff_context\.net\.(0\.proj|2)", lambda m: f"txt_mlp.{m[1][0]}"),
        ],
    )


def original(state: Mapping[str, Tensor], layout: Callable[..., str], prefix: str, config: Mapping[str, Any]) -> State:
    """A component's tensors as the original repository names and joins them."""
    joined: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        new = layout(name, config)
        if match := re.search(r"#(\d)", new):
            joined.setdefault(prefix + new.replace(match[0], ""), {})[int(match[1])] = tensor
            continue
        if new.endswith("~"):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        if new.endswith("@"):
            tensor = tensor[:, :, None, None]
        if new.endswith("^"):
            tensor = tensor.T
        joined[prefix + new.rstrip("~@^")] = {0: tensor}
    return {
        name: torch.cat([parts[i] for i in range(len(parts))]) if len(parts) > 1 else parts[0].contiguous()
        for name, parts in joined.items()
    }


LDM = "model.diffusion_model."
# Pipeline class -> component -> layout and prefix in a whole checkpoint.
PLACES: dict[str, dict[str, tuple[Callable[..., str], str]]] = {
    "sd1": {
        "unet": (ldm_unet, LDM),
        "vae": (ldm_vae, "first_stage_model."),
        "text_encoder": (clip, "cond_stage_model.transformer."),
    },
    "sd2": {
        "unet": (ldm_unet, LDM),
        "vae": (ldm_vae, "first_stage_model."),
        "text_encoder": (open_clip, "cond_stage_model.model."),
    },
    "sdxl": {
        "unet": (ldm_unet, LDM),
        "vae": (ldm_vae, "first_stage_model."),
        "text_encoder": (clip, "conditioner.embedders.0.transformer."),
        "text_encoder_2": (open_clip, "conditioner.embedders.1.model."),
    },
    "sd3": {
        "transformer": (sd3, LDM),
        "vae": (ldm_vae, "first_stage_model."),
        "text_encoder": (clip, "text_encoders.clip_l.transformer."),
        "text_encoder_2": (clip, "text_encoders.clip_g.transformer."),
        "text_encoder_3": (lambda name, config: name, "text_encoders.t5xxl.transformer."),
    },
    "flux": {
        "transformer": (flux, LDM),
        "vae": (ldm_vae, "vae."),
        "text_encoder": (clip, "text_encoders.clip_l.transformer."),
        "text_encoder_2": (lambda name, config: name, "text_encoders.t5xxl.transformer."),
    },
}
KIND = {
    "sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "sdxl-turbo": "sdxl", "sd3-medium": "sd3", "sd35-medium": "sd3",
    "sd35-large": "sd3", "flux-schnell": "flux", "flux-dev": "flux",
}  # fmt: skip


def build(entry: list[str], config: Mapping[str, Any]) -> Any:
    """A component of diffusers or transformers with random weights (or none, on the meta device)."""
    library, name = entry
    if library == "diffusers":
        return getattr(diffusers, name).from_config(dict(config))
    types = {"T5EncoderModel": transformers.T5Config}
    return getattr(transformers, name)(types.get(name, transformers.CLIPTextConfig)(**config))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def extras(kind: str, state: State) -> State:
    """What real files hold besides: marks of training, buffers, layers that are not used."""
    if kind == "sd1":
        return {
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "alphas_cumprod": torch.ones(1000),
            "model_ema.decay": torch.ones(()),
        }
    if kind == "sd2":
        width = state["cond_stage_model.model.ln_final.bias"].shape[0]
        return {
            "cond_stage_model.model.text_projection": torch.ones(width, width),
            "cond_stage_model.model.transformer.resblocks.23.ln_1.bias": torch.ones(width),
            "cond_stage_model.model.logit_scale": torch.ones(()),
        }
    if kind == "sdxl":
        return {"conditioner.embedders.1.model.logit_scale": torch.ones(()), "denoiser.sigmas": torch.ones(1000)}
    if kind == "flux":
        return {
            "text_encoders.clip_l.logit_scale": torch.ones(()),
            "text_encoders.clip_l.transformer.text_projection.weight": torch.ones(768, 768),
        }
    return {}


# ------------------------------------------------------------------------------------------------------------
# Full size: names and shapes


def write_header(path: Path, shapes: Mapping[str, Iterable[int]]) -> Path:
    """A safetensors file of float16 zeros that takes no room: its data is a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


@cache
def full_size(name: str) -> dict[str, Any]:
    preset = PRESETS[name]
    with torch.device("meta"):
        return {part: build(preset.index[part], preset.configs[part]) for part in PLACES[KIND[name]]}


@pytest.mark.parametrize("name", KIND)
def test_names_and_shapes_at_full_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of each published model is recognised and fits the components that the preset describes."""
    modules = full_size(name)
    state: State = {}
    for part, (layout, prefix) in PLACES[KIND[name]].items():
        state |= original(modules[part].state_dict(), layout, prefix, PRESETS[name].configs[part])
    path = write_header(
        tmp_path / "model.safetensors", {key: value.shape for key, value in (state | extras(KIND[name], state)).items()}
    )
    monkeypatch.setattr(checkpoint, "assign", lambda module, tensors, *rest: None)  # no values
    monkeypatch.setattr(single_file, "_cached", lambda repo: None)

    source = single_file.source(path, config="sdxl-turbo" if name == "sdxl-turbo" else None)
    assert source.index == {**PRESETS[name].index, "_fastsd": PRESETS[name].defaults}
    assert source.config("scheduler") == PRESETS[name].configs["scheduler"]
    for part, module in modules.items():
        assert source.config(part) == PRESETS[name].configs[part]
        source.load(module, part, torch.bfloat16, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------
# Tiny: every bit

CLIP = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
BIG_CLIP = {**CLIP, "hidden_size": 32}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
VAE_16 = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SD3 = {
    "sample_size": 8, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
    "joint_attention_dim": 32, "pooled_projection_dim": 56, "pos_embed_max_size": 12,
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "sd1": ("StableDiffusionPipeline", {"unet": UNET, "vae": VAE, "text_encoder": CLIP}),
    "sd2": (
        "StableDiffusionPipeline",
        {"unet": {**UNET, "layers_per_block": 2, "use_linear_projection": True}, "vae": VAE, "text_encoder": CLIP},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "unet": {
                **UNET,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 3],
                "cross_attention_dim": 56,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 56,
            },
            "vae": VAE,
            "text_encoder": CLIP,
            "text_encoder_2": {**BIG_CLIP, "projection_dim": 32},
        },
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        {
            "transformer": SD3,
            "vae": VAE_16,
            "text_encoder": {**CLIP, "projection_dim": 24},
            "text_encoder_2": {**BIG_CLIP, "projection_dim": 32},
            "text_encoder_3": T5,
        },
    ),
    "sd35": (
        "StableDiffusion3Pipeline",
        {
            "transformer": {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
            "vae": VAE_16,
            "text_encoder": {**CLIP, "projection_dim": 24},
            "text_encoder_2": {**BIG_CLIP, "projection_dim": 32},
            "text_encoder_3": T5,
        },
    ),
}  # fmt: skip
ENTRIES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl", "sd3": "sd3-medium", "sd35": "sd35-medium"}


def write_tiny(folder: Path, name: str, dtype: torch.dtype, leave_out: Iterable[str] = ()) -> tuple[Path, Path]:
    """A tiny model as an original file, and the folder of its configurations; the T5 is in both or in none."""
    class_name, configs = TINY[name]
    entries = {part: PRESETS[ENTRIES[name]].index[part] for part in configs}
    described = folder / "config"
    state: State = {}
    kind = name.removesuffix("5")
    torch.manual_seed(0)
    for part, config in configs.items():
        module = build(entries[part], config)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        if kind == "sd3" and part == "text_encoder":  # whose projection is the identity and not stored
            module.text_projection.weight.data = torch.eye(24)
        module.save_config(described / part) if hasattr(module, "save_config") else module.config.save_pretrained(
            described / part
        )
        tensors = {key: tensor.to(dtype, copy=True) for key, tensor in module.state_dict().items()}
        if kind == "sd3" and part == "text_encoder":
            del tensors["text_projection.weight"]
        if part not in leave_out:
            layout, prefix = PLACES[kind][part]
            state |= original(tensors, layout, prefix, config)
    scheduler = {"_class_name": "DDIMScheduler"} if "unet" in configs else PRESETS["sd3-medium"].configs["scheduler"]
    (described / "scheduler").mkdir()
    (described / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    entries["scheduler"] = ["diffusers", scheduler["_class_name"]]
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    (described / "tokenizer").mkdir()
    (described / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(letters)}))
    (described / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    entries["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (described / "model_index.json").write_text(json.dumps({"_class_name": class_name, **entries}))
    save_file(state | (extras(kind, state) if "text_encoder" not in leave_out else {}), folder / "model.safetensors")
    return folder / "model.safetensors", described


def load_all(source: checkpoint.Source, parts: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    modules = {}
    for part in parts:
        with torch.device("meta"):
            modules[part] = build(source.index[part], {k: v for k, v in source.config(part).items() if k != "dtype"})
        source.load(modules[part], part, dtype, torch.device("cpu"))
    return modules


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    loaded, expected = ours.state_dict(), theirs.state_dict()
    assert loaded.keys() == expected.keys()
    for name in expected:
        assert loaded[name].dtype == expected[name].dtype, name
        assert torch.equal(loaded[name], expected[name]), name


@pytest.mark.parametrize(
    ("stored", "target"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["fp32", "fp32 to bf16", "fp16 to fp32"],
)
@pytest.mark.parametrize("name", TINY)
def test_equals_diffusers(name: str, stored: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    """Oracle: the whole pipeline by diffusers' `from_single_file` with the same configurations."""
    path, described = write_tiny(tmp_path, name, stored)
    class_name, configs = TINY[name]
    cls = getattr(diffusers, class_name)
    none = dict.fromkeys(set(cls._get_signature_keys(cls)[0]) - {*configs, "scheduler"})
    theirs = cls.from_single_file(
        str(path), config=str(described), local_files_only=True, torch_dtype=target, **none
    )  # fmt: skip
    source = single_file.source(path, config=described)
    assert source.index["_class_name"] == class_name
    assert source.config("scheduler")["_class_name"] == type(theirs.scheduler).__name__
    for part, module in load_all(source, configs, target).items():
        assert_same(module, getattr(theirs, part))
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert source.tokenizer("tokenizer").encode("the cat")


def test_pipeline_gives_the_latents_of_the_folder(tiny: Path, tmp_path: Path) -> None:
    """Oracle: our own pipeline on the folder that the file was made from; the order of sums may differ by address."""
    state: State = {}
    for part, (layout, prefix) in PLACES["sd1"].items():
        config = checkpoint.read_config(tiny, part)
        state |= original(checkpoint.load_state_dict(tiny, part), layout, prefix, config)
    save_file(state, tmp_path / "model.safetensors")
    arguments: Any = {"seed": 1, "num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    theirs = fastsd.Pipeline.from_pretrained(tiny, dtype="float32", device="cpu")("the red cat", **arguments)
    pipeline = fastsd.Pipeline.from_single_file(
        tmp_path / "model.safetensors", config=tiny, dtype="float32", device="cpu"
    )
    assert pipeline.name == "model"
    torch.testing.assert_close(pipeline("the red cat", **arguments).images, theirs.images, rtol=1e-5, atol=1e-5)


def test_source_can_be_read_again_and_written_to(tmp_path: Path) -> None:
    """What is not cast stays a view of the file: a private one, so that merging a LoRA leaves the file as it is."""
    path, described = write_tiny(tmp_path, "sd1", torch.float32)
    before = path.read_bytes()
    source = single_file.source(path, config=described)
    once = load_all(source, ["unet"], torch.float32)["unet"]
    original_weight = once.conv_in.weight.clone()
    once.conv_in.weight.add_(1)
    assert path.read_bytes() == before
    again = load_all(single_file.source(path, config=described), ["unet"], torch.float32)["unet"]
    assert torch.equal(again.conv_in.weight, original_weight)
    assert torch.equal(once.conv_in.weight, original_weight + 1)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd35"])
def test_tensors_are_read_one_by_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that converters split or join are gone before the next but one is made."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    assign = checkpoint.assign

    def watched(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for key, tensor in tensors:
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            yield key, tensor
            del tensor

    monkeypatch.setattr(checkpoint, "assign", lambda module, tensors, *rest: assign(module, watched(tensors), *rest))
    path, described = write_tiny(tmp_path, name, torch.float32)
    load_all(single_file.source(path, config=described), TINY[name][1], torch.bfloat16)
    assert len(alive) > 100
    assert most <= 2


# ------------------------------------------------------------------------------------------------------------
# Flux: its converter knows one width only, so the tensors here have all rows and one column


class Bag(torch.nn.Module):
    """Parameters with the names and shapes of a state dict, on the meta device."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            module: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, torch.nn.Parameter(torch.empty(tensor.shape, device="meta")))


def narrow_flux(dtype: torch.dtype) -> State:
    """Flux-dev with one block of each kind and one column a matrix."""
    torch.manual_seed(0)
    later = re.compile(r"transformer_blocks\.[1-9]")
    full = full_size("flux-dev")["transformer"].state_dict()
    return {
        name: torch.randn(tensor.shape[:1] + (1,) * (tensor.ndim - 1)).to(dtype)
        for name, tensor in full.items()
        if not later.search(name)
    }


@pytest.mark.parametrize("prefix", [LDM, ""], ids=["whole", "bare"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_flux_equals_the_converter(stored: torch.dtype, prefix: str, tmp_path: Path) -> None:
    """Oracle: the weights that were written; float8 is cast."""
    expected = narrow_flux(stored)
    path = tmp_path / "flux.safetensors"
    save_file(original(expected, flux, prefix, {}), path)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (tmp_path / "config" / part).mkdir(parents=True)
        (tmp_path / "config" / part / "model.safetensors").touch()
    source = single_file.source(path, config=tmp_path / "config")
    # As a file without guidance is schnell, and one with it dev.
    assert source.index == {**PRESETS["flux-dev"].index, "_fastsd": PRESETS["flux-dev"].defaults}
    module = Bag(expected)
    source.load(module, "transformer", torch.bfloat16, torch.device("cpu"))
    loaded = module.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())


@pytest.mark.full
def test_flux_equals_diffusers_at_full_width(tmp_path: Path) -> None:
    """Oracle: `FluxTransformer2DModel.from_single_file`; 480 million parameters."""
    config = {**PRESETS["flux-dev"].configs["transformer"], "num_layers": 1, "num_single_layers": 1}
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel.from_config(config).to(torch.bfloat16)
    path, described = tmp_path / "flux.safetensors", tmp_path / "config"
    save_file(original(model.state_dict(), flux, "", {}), path)
    model.save_config(described / "transformer")
    del model
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (described / part).mkdir(parents=True)
        (described / part / "model.safetensors").touch()
    theirs = diffusers.FluxTransformer2DModel.from_single_file(
        str(path), config=str(described), subfolder="transformer", local_files_only=True, torch_dtype=torch.bfloat16
    )
    source = single_file.source(path, config=described)
    assert_same(load_all(source, ["transformer"], torch.bfloat16)["transformer"], theirs)


# ------------------------------------------------------------------------------------------------------------
# What a file lacks


def test_components_come_from_the_folder(tmp_path: Path) -> None:
    """A file with the denoiser alone, as most of Flux and SD3.5 are."""
    lacking = ["vae", "text_encoder", "text_encoder_2"]
    path, described = write_tiny(tmp_path, "sdxl", torch.float32, leave_out=lacking)
    with pytest.raises(InputError, match="no weights of vae, text_encoder, text_encoder_2, nor has"):
        single_file.source(path, config=described)
    configs = TINY["sdxl"][1]
    saved = {part: build(PRESETS["sdxl"].index[part], configs[part]) for part in lacking}
    for part, module in saved.items():
        module.save_pretrained(described / part)
    source = single_file.source(path, config=described)
    for part, module in load_all(source, lacking, torch.float32).items():
        assert_same(module, saved[part])


@pytest.mark.parametrize("where", ["file", "folder", "neither"])
def test_t5_is_optional(where: str, tmp_path: Path) -> None:
    lacking = [] if where == "file" else ["text_encoder_3"]
    path, described = write_tiny(tmp_path, "sd3", torch.float32, lacking)
    if where == "folder":
        transformers.T5EncoderModel(transformers.T5Config(**T5)).save_pretrained(described / "text_encoder_3")
    source = single_file.source(path, config=described)
    kept = ["transformers", "T5EncoderModel"]
    assert source.index["text_encoder_3"] == ([None, None] if where == "neither" else kept)
    if where != "neither":
        load_all(source, ["text_encoder_3"], torch.float32)


def cache_on_disk(root: Path, repo: str, folder: Path) -> None:
    """Put a folder into the hub's cache."""
    entry = root / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, entry / "snapshots" / ("a" * 40))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("a" * 40)


def test_tokenizer_of_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `config` only the preset's copy in the cache can serve, and its absence says what to do."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path, described = write_tiny(tmp_path, "sd1", torch.float32)
    source = single_file.source(path)
    message = refusal(lambda: source.tokenizer("tokenizer"))
    assert "is not in the hub's cache: pass config=" in message
    assert "such as stable-diffusion-v1-5/stable-diffusion-v1-5" in message
    with pytest.raises(InputError, match=r"do not fit its configuration \(\d+ missing"):  # a tiny file is no SD 1.5
        source.load(full_size("sd15")["unet"], "unet", torch.float32, torch.device("cpu"))
    cache_on_disk(tmp_path / "hub", "stable-diffusion-v1-5/stable-diffusion-v1-5", described)
    assert single_file.source(path).tokenizer("tokenizer").encode("the cat")
    assert single_file.source(path).config("unet") == PRESETS["sd15"].configs["unet"]  # the preset's, not the cache's

    cache_on_disk(tmp_path / "hub", "someone/finetune", described)  # a hub id is the folder that it names
    named = single_file.source(path, config="someone/finetune")
    assert named.config("unet")["block_out_channels"] == UNET["block_out_channels"]
    assert named.tokenizer("tokenizer").encode("the cat")
    shutil.rmtree(described / "tokenizer")
    with pytest.raises(InputError, match="'tokenizer'"):
        single_file.source(path, config=described).tokenizer("tokenizer")


def test_config_in_part_and_marks_in_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder with a scheduler alone changes only that; SDXL files say v-prediction by an empty tensor."""
    shapes = {f"{LDM}input_blocks.0.0.weight": [320, 4, 3, 3], f"{LDM}label_emb.0.0.weight": [1280, 2816]}
    shapes |= {f"{prefix}x": [1] for _, prefix in PLACES["sdxl"].values()}
    plain = single_file.source(write_header(tmp_path / "plain.safetensors", shapes))
    assert plain.index == {**PRESETS["sdxl"].index, "_fastsd": PRESETS["sdxl"].defaults}
    assert plain.config("scheduler")["prediction_type"] == "epsilon"
    path = write_header(tmp_path / "v.safetensors", {**shapes, "v_pred": [0], "ztsnr": [0]})
    assert single_file.source(path).config("scheduler").items() >= {
        ("prediction_type", "v_prediction"),
        ("rescale_betas_zero_snr", True),
    }
    (tmp_path / "config" / "scheduler").mkdir(parents=True)
    (tmp_path / "config" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "sample"}')
    source = single_file.source(path, config=tmp_path / "config")
    assert source.config("scheduler") == {"prediction_type": "sample"}
    assert source.config("vae") == PRESETS["sdxl"].configs["vae"]

    shapes = {f"{LDM}input_blocks.0.0.weight": [320, 4, 3, 3]}
    shapes[f"{LDM}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] = [320, 1024]
    shapes |= {f"{prefix}x": [1] for _, prefix in PLACES["sd2"].values()}
    path = write_header(tmp_path / "sd2.safetensors", shapes)
    assert single_file.source(path).config("scheduler")["prediction_type"] == "v_prediction"
    assert "taken as 768-v" in caplog.text


# ------------------------------------------------------------------------------------------------------------
# Refusals

UNET_IN = f"{LDM}input_blocks.0.0.weight"
REFUSALS: dict[str, tuple[dict[str, list[int]], list[str]]] = {
    "lora of kohya": ({"lora_unet_down_blocks_0.lora_down.weight": [4, 4]}, ["seems to be a LoRA", "load_lora"]),
    "lora of peft": ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": [4, 4]}, ["seems to be a LoRA"]),
    "vae": ({"first_stage_model.decoder.conv_in.weight": [4, 4]}, ["seems to be a VAE without a denoiser"]),
    "vae of its own": ({"encoder.down.0.block.0.conv1.weight": [4, 4], "decoder.conv_in.bias": [4]}, ["a VAE"]),
    "controlnet": ({"control_model.time_embed.0.weight": [4, 4]}, ["type 'controlnet'", "supported are sd15"]),
    "controlnet of flux": ({"controlnet_x_embedder.weight": [4, 4]}, ["a ControlNet without its base model"]),
    "ip-adapter": ({"image_proj.proj.weight": [4, 4]}, ["an IP-Adapter"]),
    "embedding": ({"emb_params": [4, 768]}, ["a textual inversion"]),
    "clip": ({"text_model.embeddings.token_embedding.weight": [4, 4]}, ["a text encoder without a denoiser"]),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": [4, 4]}, ["a text encoder"]),
    "diffusers unet": ({"down_blocks.0.resnets.0.conv1.weight": [4, 4]}, ["component in the diffusers layout"]),
    "something": ({"layer.weight": [4, 4]}, ["is no model known here (it holds layer.weight)", "sd35-large"]),
    "inpainting": ({UNET_IN: [320, 9, 3, 3]}, ["type 'inpainting'"]),
    "pix2pix": ({UNET_IN: [320, 8, 3, 3]}, ["type 'instruct-pix2pix'"]),
    "playground": ({UNET_IN: [320, 4, 3, 3], "edm_mean": [4]}, ["type 'playground-v2-5'"]),
    "refiner": (
        {UNET_IN: [384, 4, 3, 3], "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": [4]},
        ["type 'xl_refiner'", "sdxl"],
    ),
    "flux fill": (
        {
            "double_blocks.0.img_attn.norm.key_norm.scale": [128],
            "double_blocks.0.img_attn.qkv.weight": [9216, 3072],
            "guidance_in.in_layer.bias": [3072],
            "img_in.weight": [3072, 384],
        },
        ["type 'flux-fill'"],
    ),
    "unknown sd3": (
        {"joint_blocks.0.x_block.attn.qkv.weight": [48, 16], "pos_embed": [1, 4, 16]},
        ["a SD3Transformer2DModel of sizes that no preset has: pass config="],
    ),
    "sd3 with other positions": (
        {
            "joint_blocks.0.x_block.attn.qkv.weight": [4608, 1536],
            "joint_blocks.0.context_block.adaLN_modulation.1.bias": [9216],
            "pos_embed": [1, 4, 1536],
        },
        ["of sizes that no preset has"],
    ),
    "scaled fp8": (
        {"double_blocks.0.img_attn.qkv.weight": [9216, 3072], "double_blocks.0.img_attn.qkv.scale_weight": [1]},
        ["is quantised (double_blocks.0.img_attn.qkv.scale_weight)", "float8"],
    ),
    "nf4": (
        {f"{UNET_IN}.quant_state.bitsandbytes__nf4": [80], UNET_IN: [4, 1]},
        ["is quantised (", "quant_state.bitsandbytes__nf4"],
    ),
    "flux without the rest": (
        {"double_blocks.0.img_attn.qkv.weight": [9216, 3072], "double_blocks.0.img_attn.norm.key_norm.scale": [128]},
        ["no weights of text_encoder, text_encoder_2, vae", "hf download black-forest-labs/FLUX.1-schnell"],
    ),
    "sd1 without the rest": ({UNET_IN: [320, 4, 3, 3]}, ["no weights of text_encoder, vae", "pass config="]),
    "empty": ({}, ["holds no tensors"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_by_content(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shapes, parts = REFUSALS[case]
    path = write_header(tmp_path / "model.safetensors", shapes)
    message = refusal(lambda: single_file.source(path))
    assert all(part in message for part in (str(path), *parts)), message


FILES: dict[str, tuple[str, bytes | None, list[str]]] = {
    "ckpt": ("m.ckpt", b"PK", ["is a pickle", "from_single_file(...).save_pretrained"]),
    "bin": ("m.bin", None, ["is a pickle"]),
    "pickle in disguise": ("m.safetensors", b"PK\x03\x04" + b"\0\1\2\3" * 99, ["not a safetensors file"]),
    "gguf": ("m.gguf", b"GGUF", ["quantised (GGUF)"]),
    "truncated": ("m.safetensors", b"\x40\0\0\0\0\0\0\0{", ["is truncated", "found 9"]),
    "missing": ("m.safetensors", None, ["does not exist"]),
    "folder": ("", None, ["is a folder", "from_pretrained"]),
}


@pytest.mark.parametrize("case", FILES)
def test_refusals_by_file(case: str, tmp_path: Path) -> None:
    name, content, parts = FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(lambda: single_file.source(tmp_path / name))
    assert all(part in message for part in parts), message


def test_refusal_of_an_address() -> None:
    message = refusal(lambda: single_file.source("https://huggingface.co/org/name/blob/main/model.safetensors"))
    assert "download the file" in message


def test_refusals_of_integers(tmp_path: Path) -> None:
    save_file({UNET_IN: torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    assert f"is quantised ({UNET_IN} (U8))" in refusal(lambda: single_file.source(tmp_path / "m.safetensors"))


CONFIGS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (lambda folder: folder / "none", ["no existing folder, preset or hub id"]),
    "empty": (lambda folder: "", ["no existing folder, preset or hub id"]),
    "empty folder": (lambda folder: folder, ["holds no component but model.safetensors"]),
    "another preset": (lambda folder: "sd3-medium", ["UNet2DConditionModel", "is for a StableDiffusion3Pipeline"]),
    "unreachable hub": (lambda folder: "org/name", ["HF_HUB_OFFLINE", "'org/name' is not cached"]),
    "revision": (lambda folder: "org/name@", ["names no revision"]),
    "no valid id": (lambda folder: "org--x/name", ["no valid hub id"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refusals_of_config(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config, parts = CONFIGS[case]
    path = write_header(tmp_path / "model.safetensors", {UNET_IN: [320, 4, 3, 3]})
    message = refusal(lambda: single_file.source(path, config=config(tmp_path)))
    assert all(part in message for part in parts), message


MISFITS: dict[str, tuple[str, str, Callable[[State], State], list[str]]] = {
    "missing": (
        "sd1", "unet",
        lambda state: {key: value for key, value in state.items() if "time_embed.0.b" not in key},
        ["of 'unet' in", "1 missing: time_embedding.linear_1.bias", "config.json that belongs"],
    ),
    "unexpected": (
        "sd1", "unet",
        lambda state: state | {f"{LDM}adapter.weight": torch.ones(1)},
        [f"1 unexpected: {LDM}adapter.weight"],
    ),
    "unexpected in a transformer": (
        "sd3", "transformer",
        lambda state: state | {f"{LDM}joint_blocks.0.x_block.gate": torch.ones(1)},
        [f"1 unexpected: {LDM}joint_blocks.0.x_block.gate"],
    ),
    "shape": (
        "sd3", "vae",
        lambda state: state | {"first_stage_model.decoder.conv_in.bias": torch.ones(3)},
        ["1 of another shape: decoder.conv_in.bias (file [3], model [16])"],
    ),
    "not convertible": (
        "sd3", "transformer",
        lambda state: {key: value for key, value in state.items() if "y_embedder" not in key},
        ["are not those of a SD3Transformer2DModel (KeyError: 'y_embedder.mlp.0.weight'): pass the config="],
    ),
    "sdxl without sizes": (
        "sdxl", "unet",
        lambda state: {key: value for key, value in state.items() if "label_emb" not in key},
        ["KeyError: 'label_emb.0.0.weight'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_load_is_strict(case: str, tmp_path: Path) -> None:
    name, part, change, parts = MISFITS[case]
    path, described = write_tiny(tmp_path, name, torch.float32)
    save_file(change({key: tensor.clone() for key, tensor in load_file(path).items()}), path)
    source = single_file.source(path, config=described)
    message = refusal(lambda: load_all(source, [part], torch.float32))
    assert all(text in message for text in parts), message


# ------------------------------------------------------------------------------------------------------------
# Files and folders that `checkpoint` reads, too


def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path: Path) -> None:
    """So that a model which the host cannot hold is still read to a device tensor by tensor."""
    path = write_header(tmp_path / "large.safetensors", {"weight": [2**19, 2**20], "bias": [7]})  # 1 TiB, a hole
    stored = read_header(path)
    assert torch.equal(open_file(path)(stored["bias"]), torch.zeros(7, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_tensors_at_odd_places(dtype: torch.dtype, tmp_path: Path) -> None:
    """Old writers did not pad the header, so that data can begin at any byte."""
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    save_file({"weight": tensor}, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    text += b" " * (len(text) % 2 == 0)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    stored = read_header(path)["weight"]
    assert stored.begin % 2
    assert torch.equal(open_file(path)(stored), tensor)
    assert torch.equal(open_file(path)(stored) + 1, tensor + 1)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("part", ["text_encoder_3", "transformer"])
def test_shards_of_both_libraries(part: str, variant: str | None, tmp_path: Path) -> None:
    """Oracle: the model that was saved; the names are transformers' for the T5, diffusers' for the transformer."""
    config = {"text_encoder_3": T5, "transformer": SD3}[part]
    entry = PRESETS["sd3-medium"].index[part]
    saved = build(entry, config).half()
    saved.save_pretrained(tmp_path / part, max_shard_size="10KB", variant=variant)
    files = [path.name for path in checkpoint.weight_files(tmp_path, part, variant)]
    stem = "model" if part == "text_encoder_3" else "diffusion_pytorch_model"
    assert len(files) > 1
    assert all(re.fullmatch(rf"{stem}(\.fp16)?-0\d{{4}}-of-0\d{{4}}\.safetensors", name) for name in files)
    with torch.device("meta"):
        ours = build(entry, config)
    checkpoint.load_weights(ours, tmp_path, part, torch.float32, "cpu", variant)
    assert_same(ours, saved.float())
