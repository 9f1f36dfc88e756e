"""LoRA: diffusers with peft as oracle for every layout, exact restoring, every refusal."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import test_checkpoint
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fastsd import checkpoint
from fastsd.denoisers.unet import UNet
from fastsd.lora import Loras, check, find, parse, read

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*")

# Merged and unmerged differ by the order of float32 sums; measured: at most 2e-6 of the largest value.
RELATIVE = 1e-5

# ------------------------------------------------------------------------------------------------------------
# Tiny models of the four families, as diffusers pipelines


def text_encoder(projection: int | None = None) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=38,
        eos_token_id=39,
        projection_dim=projection or 12,
        initializer_range=0.3,
    )
    encoder: nn.Module = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return encoder


def sd_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def sdxl_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def build(family: str) -> Any:
    """A pipeline of random modules; what needs no LoRA is left out."""
    torch.manual_seed(0)
    rest: dict[str, Any] = {"vae": None, "scheduler": None, "tokenizer": None, "text_encoder": text_encoder()}
    pipeline: Any
    if family == "sd":
        pipeline = StableDiffusionPipeline(
            unet=sd_unet(), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **rest
        )
    elif family == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            unet=sdxl_unet(), text_encoder_2=text_encoder(8), tokenizer_2=None, add_watermarker=False, **rest
        )
    elif family == "sd3":
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        others = dict.fromkeys(("tokenizer_2", "tokenizer_3", "text_encoder_3"))
        rest["text_encoder"] = text_encoder(12)
        pipeline = StableDiffusion3Pipeline(transformer=transformer, text_encoder_2=text_encoder(8), **others, **rest)
    else:
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
        pipeline = FluxPipeline(transformer=transformer, tokenizer_2=None, text_encoder_2=None, **rest)
    for module in modules(pipeline).values():
        module.eval().requires_grad_(False)
    return pipeline


def modules(pipeline: Any) -> dict[str, nn.Module]:
    found = {name: getattr(pipeline, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    return {name: module for name, module in found.items() if module is not None}


_built: dict[str, Any] = {}


def pipeline(family: str) -> Any:
    """A fresh copy of the family's tiny pipeline."""
    if family not in _built:
        _built[family] = build(family)
    return copy.deepcopy(_built[family])


def tiny_models(family: str) -> dict[str, nn.Module]:
    return modules(pipeline(family))


@torch.no_grad()
def outputs(family: str, models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What the modules of a family make of fixed inputs; component -> tensor."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.tensor([[38, 3, 7, 11, 30, 39, 39, 39]])
    result = {name: model(ids)[0] for name, model in models.items() if name.startswith("text")}
    result |= {
        f"{name} states": model(ids, output_hidden_states=True).hidden_states[-2]
        for name, model in models.items()
        if name.startswith("text")
    }
    time = torch.tensor([500.0])
    if family in ("sd", "sdxl"):
        added = {"text_embeds": noise(1, 8), "time_ids": 64 * noise(1, 6)}
        text = noise(1, 5, 12 if family == "sd" else 24)
        result["unet"] = models["unet"](noise(1, 4, 8, 8), time, text, added_cond_kwargs=added)[0]
    elif family == "sd3":
        result["transformer"] = models["transformer"](noise(1, 4, 8, 8), noise(1, 5, 24), noise(1, 20), time)[0]
    else:
        result["transformer"] = models["transformer"](
            noise(1, 16, 16),
            noise(1, 5, 24),
            noise(1, 12),
            time / 1000,
            torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            torch.zeros(5, 3),
            torch.tensor([3.5]),
        )[0]
    return result


# ------------------------------------------------------------------------------------------------------------
# LoRA files of every layout, from random matrices


class Layer(NamedTuple):
    """A layer of a model and random matrices for it."""

    component: str
    path: str
    down: Tensor
    up: Tensor
    alpha: float


ATTENTION = r"to_[qkv]$|to_out\.0$|add_[qkv]_proj$|to_add_out$"
TEXT = r"_proj$|fc[12]$"


def layers(family: str, *patterns: str, seed: int = 0, every: int = 1) -> list[Layer]:
    """Layers whose path matches one of the patterns; ranks 2 and 4, alpha 3, and 1 for convolutions.

    With more alphas than that diffusers 0.42 and peft 0.21 are no oracle: of kohya's attention layers they take all
    alphas for the most frequent one, with a warning (see `test_alphas_of_each_layer`).
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for component, model in tiny_models(family).items():
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and any(re.search(pattern, path) for pattern in patterns):
                assert weight is not None
                number = len(found)
                rank = 2 if number % 3 else 4
                down = torch.randn(rank, *weight.shape[1:], generator=generator) / math.sqrt(weight[0].numel())
                up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) / 2
                found.append(Layer(component, path, down, up, 3.0 if weight.ndim == 2 else 1.0))
    return found[::every]


def peft(layer: Layer) -> dict[str, Tensor]:
    name = f"{layer.component}.{layer.path}"
    return {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}


def diffusers(layer: Layer) -> dict[str, Tensor]:
    """The names before peft."""
    middle = "lora_linear_layer" if layer.component.startswith("text") else "lora"
    name = f"{layer.component}.{layer.path}.{middle}"
    return {f"{name}.down.weight": layer.down, f"{name}.up.weight": layer.up}


def attention_processor(layer: Layer) -> dict[str, Tensor]:
    """The names of the first diffusers LoRAs."""
    block, _, last = layer.path.replace(".to_out.0", ".to_out").rpartition(".")
    if layer.component.startswith("text"):
        last = last.replace("out_proj", "to_out").replace("_proj", "")
        name = f"{layer.component}.{block}.{'' if last.startswith('to') else 'to_'}{last}_lora"
    else:
        name = f"{layer.component}.{block}.processor.{last}_lora"
    return {f"{name}.down.weight": layer.down, f"{name}.up.weight": layer.up}


def kohya(layer: Layer, prefix: dict[str, str] | None = None, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    prefix = prefix or {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    path = layer.path
    if layer.component.startswith("text") and not path.startswith(("text_model", "text_projection")):
        path = f"text_model.{path}"
    name = f"{prefix[layer.component]}_{rename(path).replace('.', '_')}"
    return {
        f"{name}.lora_down.weight": layer.down,
        f"{name}.lora_up.weight": layer.up,
        f"{name}.alpha": torch.tensor(layer.alpha),
    }


def kohya_sd(layer: Layer) -> dict[str, Tensor]:
    return kohya(layer, {"unet": "lora_unet", "text_encoder": "lora_te"})


def sgm(path: str) -> str:
    """The name of an SDXL layer in the original code, with 2 residual blocks a level."""
    parts = path.split(".")
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2}
    if parts[0] in ("down_blocks", "up_blocks"):
        kind, rest = parts[2], parts[4:]
        level, number = int(parts[1]), {"upsamplers": 2, "downsamplers": 2}.get(kind, int(parts[3]))
        if kind == "downsamplers":
            inner[kind], rest = 0, ["op"]
        side, first = ("input_blocks", 1) if parts[0] == "down_blocks" else ("output_blocks", 0)
        parts = [side, str(first + 3 * level + number), str(inner[kind]), *rest]
    elif parts[0] == "mid_block":
        number = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        parts = ["middle_block", str(number), *parts[3:]]
    name = ".".join(parts)
    table = {
        r"^conv_in$": "input_blocks.0.0",
        r"^conv_out$": "out.2",
        r"^time_embedding\.linear_1": "time_embed.0",
        r"^time_embedding\.linear_2": "time_embed.2",
        r"^add_embedding\.linear_1": "label_emb.0.0",
        r"^add_embedding\.linear_2": "label_emb.0.2",
        r"\bconv1$": "in_layers.2",
        r"\bconv2$": "out_layers.3",
        r"\btime_emb_proj$": "emb_layers.1",
        r"\bconv_shortcut$": "skip_connection",
    }
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def kohya_sgm(layer: Layer) -> dict[str, Tensor]:
    return kohya(layer, rename=sgm if layer.component == "unet" else str)


def join(found: list[Layer], layout: Callable[[Layer], dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in found:
        tensors |= layout(layer)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def flux_blocks(layout: str, seed: int = 0) -> dict[str, Tensor]:
    """The fused layers of the original Flux code: qkv in one matrix."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "double_blocks.{}.img_attn.qkv": (48, 16),
        "double_blocks.{}.txt_attn.qkv": (48, 16),
        "double_blocks.{}.img_attn.proj": (16, 16),
        "double_blocks.{}.txt_attn.proj": (16, 16),
        "double_blocks.{}.img_mlp.0": (64, 16),
        "double_blocks.{}.txt_mlp.2": (16, 64),
        "double_blocks.{}.img_mod.lin": (96, 16),
        "single_blocks.{}.linear2": (16, 80),
        "single_blocks.{}.modulation.lin": (48, 16),
    }
    xlabs = {
        "double_blocks.{}.processor.qkv_lora1": (48, 16),
        "double_blocks.{}.processor.qkv_lora2": (48, 16),
        "double_blocks.{}.processor.proj_lora1": (16, 16),
        "double_blocks.{}.processor.proj_lora2": (16, 16),
        "single_blocks.{}.processor.proj_lora": (16, 80),
        "single_blocks.{}.processor.qkv_lora": (48, 16),
    }
    tensors: dict[str, Tensor] = {}
    for i in range(2):
        for number, (name, (out, width)) in enumerate((xlabs if layout == "xlabs" else shapes).items()):
            name = name.format(i)
            rank = 3
            down, up = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
            if name.endswith("img_attn.qkv"):  # block-diagonal, which the converter finds out and splits
                up *= torch.block_diag(*[torch.ones(16, 1)] * 3)
            down /= math.sqrt(width)
            if layout == "xlabs":
                tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
                continue
            name = "lora_unet_" + name.replace(".", "_") if layout == "kohya" else f"diffusion_model.{name}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            if layout == "kohya":
                tensors[f"{name}.alpha"] = torch.tensor(1.0 + number % 3)
    return tensors


# Every linear layer and convolution of the UNet that kohya's trainers know, those of LoCon included.
CONVOLUTIONS = (
    r"conv\d?$|conv_(in|out|shortcut)$|time_emb_proj$|(time|add)_embedding\.linear_[12]$|proj_(in|out)$|ff\.net"
)

LAYOUTS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "sd: peft": ("sd", lambda: join(layers("sd", ATTENTION, TEXT, r"proj_in$", r"conv1$"), peft)),
    "sd: peft, text encoder alone": ("sd", lambda: join(layers("sd", TEXT), peft)),
    "sd: diffusers": ("sd", lambda: join(layers("sd", ATTENTION, TEXT), diffusers)),
    "sd: attention processors": (
        "sd",
        lambda: join(layers("sd", ATTENTION, r"[qkvt]_proj$"), attention_processor),
    ),
    "sd: kohya": ("sd", lambda: join(layers("sd", ATTENTION, TEXT), kohya_sd)),
    "sd: kohya with convolutions": ("sd", lambda: join(layers("sd", ATTENTION, CONVOLUTIONS), kohya_sd)),
    "sdxl: peft": ("sdxl", lambda: join(layers("sdxl", ATTENTION, TEXT, r"proj_(in|out)$"), peft)),
    "sdxl: diffusers": ("sdxl", lambda: join(layers("sdxl", ATTENTION, TEXT, every=2), diffusers)),
    "sdxl: kohya, diffusers' blocks": ("sdxl", lambda: join(layers("sdxl", ATTENTION, TEXT, r"ff\.net"), kohya)),
    "sdxl: kohya, original blocks": ("sdxl", lambda: join(layers("sdxl", ATTENTION, TEXT), kohya_sgm)),
    "sdxl: kohya, original blocks with convolutions": (
        "sdxl",
        lambda: join(layers("sdxl", ATTENTION, CONVOLUTIONS), kohya_sgm),
    ),
    "sd3: peft": ("sd3", lambda: join(layers("sd3", ATTENTION, TEXT, r"ff.*net", r"norm1.*linear$"), peft)),
    "sd3: peft, embedders": ("sd3", lambda: join(layers("sd3", r"embed", r"^proj_out$", r"^pos_embed"), peft)),
    "flux: peft": (
        "flux",
        lambda: join(layers("flux", ATTENTION, TEXT, r"proj_mlp$", r"proj_out$", r"embed"), peft),
    ),
    "flux: peft with alphas": (
        "flux",
        lambda: join(
            layers("flux", ATTENTION),
            lambda layer: {**peft(layer), f"{layer.component}.{layer.path}.alpha": torch.tensor(layer.alpha)},
        ),
    ),
    "flux: kohya": (
        "flux",
        lambda: {
            **flux_blocks("kohya"),
            **join([layer for layer in layers("flux", TEXT) if layer.component == "text_encoder"], kohya),
        },
    ),
    "flux: kohya, diffusers' names": (
        "flux",
        lambda: join(layers("flux", ATTENTION), lambda layer: kohya(layer, {"transformer": "lora_transformer"})),
    ),
    "flux: comfy": ("flux", lambda: flux_blocks("comfy")),
    "flux: xlabs": ("flux", lambda: flux_blocks("xlabs")),
}


def write(folder: Path, tensors: dict[str, Tensor], name: str = "lora", metadata: dict[str, str] | None = None) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def merged(family: str, *files: tuple[Path, float]) -> dict[str, nn.Module]:
    models = tiny_models(family)
    loras = Loras(models)
    for number, (path, weight) in enumerate(files):
        loras.load(read(path, family), weight, f"lora{number}")
    return models


def oracle(family: str, *files: tuple[Path, float]) -> dict[str, nn.Module]:
    """diffusers' own way: adapters beside the weights."""
    loaded = pipeline(family)
    for number, (path, _) in enumerate(files):
        loaded.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora{number}")
    loaded.set_adapters([f"lora{number}" for number in range(len(files))], [weight for _, weight in files])
    return modules(loaded)


def assert_same(family: str, *files: tuple[Path, float]) -> None:
    ours, theirs = outputs(family, merged(family, *files)), outputs(family, oracle(family, *files))
    before = outputs(family, tiny_models(family))
    changed = 0.0
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= RELATIVE * expected.abs().max(), name
        changed = max(changed, float((expected - before[name]).abs().max() / expected.abs().max()))
    assert changed > 0.05  # else nothing was tested


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_equal_diffusers(case: str, tmp_path: Path) -> None:
    family, make = LAYOUTS[case]
    assert_same(family, (write(tmp_path, make()), 0.8))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_several_at_once_equal_diffusers(family: str, tmp_path: Path) -> None:
    first = write(tmp_path, join(layers(family, ATTENTION, TEXT), peft), "first")
    second = write(tmp_path, join(layers(family, r"to_q|q_proj", seed=1), peft), "second")
    assert_same(family, (first, 0.7), (second, -0.4))


SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 6},
    "rank-stabilised": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "lora_alpha": 2,
        "rank_pattern": {"to_q": 2, "q_proj": 3},
        "alpha_pattern": {"attn2?.to_v": 1, r".*\.v_proj": 5},
    },
    "bias": {"lora_bias": True, "target_modules": r".*(to_out\.0|out_proj|fc1)"},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_files_that_diffusers_writes_with_settings(family: str, case: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    loaded = pipeline(family)
    torch.manual_seed(5)
    options: dict[str, Any] = {}
    targets = ["to_q", "to_v", "to_out.0", "q_proj", "v_proj"]
    for component, module in modules(loaded).items():
        config = LoraConfig(r=4, init_lora_weights=False, **{"target_modules": targets, **SETTINGS[case]})
        module.add_adapter(config)
        options[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
        options[f"{component}_lora_adapter_metadata"] = config.to_dict()
    loaded.save_lora_weights(tmp_path, **options)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert_same(family, (path, 1.0))
    assert read(tmp_path, family).digest == read(path, family).digest


# ------------------------------------------------------------------------------------------------------------
# What diffusers does not do, from first principles


def product(layer: Layer) -> Tensor:
    """scale * B @ A in float64, as kohya's trainer defines it."""
    down, up = layer.down.double(), layer.up.double()
    if down.ndim == 4 and down.shape[2:] != (1, 1):
        composed = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    else:
        composed = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return layer.alpha / layer.down.shape[0] * composed


@pytest.mark.parametrize("layout", [kohya, kohya_sgm])
def test_alphas_of_each_layer(layout: Callable[[Layer], dict[str, Tensor]], tmp_path: Path) -> None:
    # diffusers 0.42 gives both layers of add_embedding one name in kohya's spelling of its own blocks.
    patterns = (ATTENTION, CONVOLUTIONS if layout is kohya_sgm else CONVOLUTIONS.replace("|add", ""), TEXT)
    found = [layer._replace(alpha=0.5 + number % 7) for number, layer in enumerate(layers("sdxl", *patterns))]
    models, before = merged("sdxl", (write(tmp_path, join(found, layout)), 0.8)), tiny_models("sdxl")
    for layer in found:
        original = before[layer.component].get_parameter(f"{layer.path}.weight").double()
        weight = models[layer.component].get_parameter(f"{layer.path}.weight").double()
        # One float32 rounding of the sum and those of a product of rank 4.
        assert torch.allclose(weight, original + 0.8 * product(layer), rtol=1e-6, atol=1e-6), layer.path


def test_single_block_of_full_width_from_kohya(tmp_path: Path) -> None:
    # The converter knows the fused layer by its full size alone, so here are only the matrices, and no model.
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 3072, generator=generator), torch.randn(21504, 2, generator=generator)
    name = "lora_unet_single_blocks_7_linear1"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    adapter = read(write(tmp_path, tensors), "flux")
    ends = {"attn.to_q": 3072, "attn.to_k": 6144, "attn.to_v": 9216, "proj_mlp": 21504}
    start = 0
    assert len(adapter.deltas["transformer"]) == len(ends)
    for module, end in ends.items():
        delta = adapter.deltas["transformer"][f"single_transformer_blocks.7.{module}.weight"]
        assert delta.down is not None
        assert torch.equal(delta.down * delta.scale, down / 2)
        assert torch.equal(delta.up, up[start:end])
        start = end


def test_layers_outside_the_blocks_of_flux(tmp_path: Path) -> None:
    # diffusers 0.42 converts these without the prefix that it then looks for, so it leaves them out in silence.
    generator = torch.Generator().manual_seed(0)
    table = {"img_in": ("x_embedder", 16, 16), "final_layer_linear": ("proj_out", 16, 16)}
    tensors, expected = {}, {}
    for name, (module, out, width) in table.items():
        down, up = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
        tensors |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(0.5)
        expected[module] = up @ down / 4
    tensors |= join(
        layers("flux", r"norm1\.linear$"), lambda layer: kohya(layer, {"transformer": "lora_unet"}, original)
    )
    models, before = merged("flux", (write(tmp_path, tensors), 1.0)), tiny_models("flux")
    for module, delta in expected.items():
        weight, original_weight = (one["transformer"].get_parameter(f"{module}.weight") for one in (models, before))
        assert torch.allclose(weight, original_weight + delta, atol=1e-6)


def original(path: str) -> str:
    """`transformer_blocks.0.norm1.linear` in the original Flux code."""
    return path.replace("transformer_blocks", "double_blocks").replace("norm1.linear", "img_mod.lin")


def test_attention_processors_saved_without_their_component(tmp_path: Path) -> None:
    found = [layer for layer in layers("sd", ATTENTION) if layer.component == "unet"]
    named = join(found, attention_processor)
    bare = {name.removeprefix("unet."): tensor for name, tensor in named.items()}
    assert read(write(tmp_path, named), "sd").digest == read(write(tmp_path, bare), "sd").digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_dtypes_of_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    found = layers("sd", ATTENTION)
    rounded = [layer._replace(down=layer.down.to(dtype).float(), up=layer.up.to(dtype).float()) for layer in found]
    stored = {
        name: tensor if name.endswith("alpha") else tensor.to(dtype) for name, tensor in join(found, kohya).items()
    }
    ours = merged("sd", (write(tmp_path, stored, "stored"), 1.0))
    expected = merged("sd", (write(tmp_path, join(rounded, kohya), "rounded"), 1.0))
    for component, module in ours.items():
        for name, weight in module.named_parameters():
            assert torch.equal(weight, expected[component].get_parameter(name))


def test_linear_matrices_for_convolutions_of_one_pixel(tmp_path: Path) -> None:
    found = layers("sd", r"proj_(in|out)$")
    assert all(layer.down.ndim == 4 for layer in found)
    flat = [layer._replace(down=layer.down.flatten(1), up=layer.up.flatten(1)) for layer in found]
    paths = [write(tmp_path, join(some, peft), name) for some, name in ((found, "convolution"), (flat, "linear"))]
    first, second = (merged("sd", (path, 1.0)) for path in paths)
    assert all(torch.equal(a, b) for a, b in zip(first["unet"].parameters(), second["unet"].parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------
# Into the weights and out again


def bits(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{c}.{name}": weight.detach().clone() for c, m in models.items() for name, weight in m.named_parameters()}


def addresses(models: dict[str, nn.Module]) -> dict[str, int]:
    return {f"{c}.{name}": weight.data_ptr() for c, m in models.items() for name, weight in m.named_parameters()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(one.view(torch.uint8), second[name].view(torch.uint8)) for name, one in first.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs of SD that overlap."""
    folder = tmp_path_factory.mktemp("loras")
    patterns = [(ATTENTION, TEXT), (r"to_q", r"conv1$"), (r"fc1|v_proj",)]
    return [
        write(folder, join(layers("sd", *some, seed=number), peft), f"lora{number}")
        for number, some in enumerate(patterns)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swapping_and_unloading_are_exact(dtype: torch.dtype, files: list[Path]) -> None:
    models = {name: model.to(dtype) for name, model in tiny_models("sd").items()}
    with torch.no_grad():
        models["unet"].get_parameter("conv_in.weight").view(-1)[0] = -0.0
    before, places = bits(models), addresses(models)
    loras = Loras(models)
    first, second = (read(path, "sd") for path in files[:2])
    loras.load(first, 0.8)
    with_first = bits(models)
    assert not same_bits(with_first, before)
    loras.unload("lora0")
    assert same_bits(bits(models), before)
    loras.load(second, -1.3)
    loras.unload()
    loras.load(first, 0.8)
    assert same_bits(bits(models), with_first)
    loras.load(second, 0.5, "other")
    both, key = bits(models), loras.key()
    loras.unload()
    assert loras.active == {} and loras.key() == ()
    assert same_bits(bits(models), before)
    loras.load(second, 0.5)
    loras.load(first, 0.8)  # the order of loading is no part of the result
    assert same_bits(bits(models), both) and loras.key() == key
    assert loras.active == {"lora1": 0.5, "lora0": 0.8}
    assert addresses(models) == places


def test_rounding_happens_once(files: list[Path]) -> None:
    models = {name: model.bfloat16() for name, model in tiny_models("sd").items()}
    before = bits(models)
    wide = {name: model.float() for name, model in copy.deepcopy(models).items()}
    for some in (models, wide):
        loras = Loras(some)
        for path in files:
            loras.load(read(path, "sd"), 0.3)
    assert same_bits(bits(models), {name: weight.bfloat16() for name, weight in bits(wide).items()})
    assert not same_bits(bits(models), before)


def test_weight_zero_changes_nothing(files: list[Path]) -> None:
    models = tiny_models("sd")
    with torch.no_grad():
        for weight in models["unet"].parameters():
            weight.view(-1)[0] = -0.0
    before = bits(models)
    loras = Loras(models)
    loras.load(read(files[0], "sd"), 0.0)
    assert same_bits(bits(models), before) and loras.active == {"lora0": 0.0}


ACTIONS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.3, 0.8, 2.0, None])), max_size=6)


@given(actions=ACTIONS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=25)
def test_weights_depend_on_the_active_set_alone(
    actions: list[tuple[int, float | None]], dtype: torch.dtype, files: list[Path]
) -> None:
    adapters = [read(path, "sd") for path in files]
    models = {name: model.to(dtype) for name, model in tiny_models("sd").items()}
    before = bits(models)
    loras = Loras(models)
    active: dict[int, float] = {}
    for number, weight in actions:  # None unloads; loading what is loaded unloads it first
        if number in active:
            loras.unload(str(number))
            del active[number]
        if weight is not None:
            loras.load(adapters[number], weight, str(number))
            active[number] = weight
    assert loras.active == {str(number): weight for number, weight in active.items()}
    exact = {name: weight.double() for name, weight in before.items()}
    touched = set()
    for number, weight in active.items():
        for component, deltas in adapters[number].deltas.items():
            for name, delta in deltas.items():
                assert delta.down is not None
                touched.add(f"{component}.{name}")
                full = exact[f"{component}.{name}"]
                full += weight * (delta.up.double().flatten(1) @ delta.down.double().flatten(1)).reshape(full.shape)
    # Half a unit in the last place of the dtype, and some of float32 for the products.
    unit = torch.finfo(dtype).eps / 2 + 2e-6
    for name, weight in bits(models).items():
        if name not in touched:
            assert torch.equal(weight, before[name]), name
        assert ((weight.double() - exact[name]).abs() <= unit * (1 + exact[name].abs())).all(), name


def test_checkpoint_file_is_never_written(tiny: Path, files: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    stored = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    for path in stored:
        path.chmod(0o400)
    config = checkpoint.read_config(folder, "unet")
    with torch.device("meta"):
        unet = UNet(config)
    checkpoint.load_weights(unet, folder, "unet", torch.float32, "cpu")
    models: dict[str, nn.Module] = {"unet": unet}
    before, places = bits(models), addresses(models)
    found = [
        Layer("unet", name.removesuffix(".weight"), torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2), 2.0)
        for name, weight in unet.named_parameters()
        if name.endswith("to_q.weight")
    ]
    loras = Loras(models)
    loras.load(read(write(tmp_path, join(found, peft)), "sd"))
    assert not same_bits(bits(models), before)
    assert addresses(models) == places
    again = checkpoint.load_state_dict(folder, "unet")  # a second mapping of the same file
    assert all(torch.equal(again[name.removeprefix("unet.")], weight) for name, weight in before.items())
    loras.unload()
    assert same_bits(bits(models), before)
    assert {path: path.read_bytes() for path in stored} == stored


@pytest.mark.parametrize("case", ["sd: kohya with convolutions", "sdxl: kohya, original blocks"])
def test_our_unet_equals_diffusers_unet(case: str, tmp_path: Path) -> None:
    family, make = LAYOUTS[case]
    adapter = read(write(tmp_path, make()), family)
    theirs = tiny_models(family)
    ours = UNet(dict(theirs["unet"].config)).requires_grad_(False)
    ours.load_state_dict(theirs["unet"].state_dict())
    others = {name: module for name, module in tiny_models(family).items() if name != "unet"}
    Loras(theirs).load(adapter)
    Loras({"unet": ours, **others}).load(adapter)
    assert same_bits(bits({"unet": ours}), bits({"unet": theirs["unet"]}))


class Failure(Exception):
    pass


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "beside another"])
@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_failure_midway_leaves_the_weights(
    error: type[BaseException], earlier: bool, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny_models("sd")
    loras = Loras(models)
    if earlier:
        loras.load(read(files[0], "sd"), 0.5)
    before, active = bits(models), loras.active
    adapter, copy_ = read(files[1], "sd"), torch.Tensor.copy_
    for after in (0, 1, 3):
        calls = iter(range(100))

        def fail(self: Tensor, other: Tensor, calls: Iterator[int] = calls, after: int = after) -> Tensor:
            if next(calls) == after:
                self.mul_(0.5)  # half written
                raise error
            return copy_(self, other)

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(torch.Tensor, "copy_", fail)
            loras.load(adapter)
        assert same_bits(bits(models), before) and loras.active == active
    loras.load(adapter)
    loras.unload("lora1")
    assert same_bits(bits(models), before)


def test_weights_that_leave_their_range_are_refused(files: list[Path]) -> None:
    models = {name: model.half() for name, model in tiny_models("sd").items()}
    before = bits(models)
    loras = Loras(models)
    message = refusal(lambda: loras.load(read(files[0], "sd"), 1e6))
    assert "leaves the range of torch.float16" in message and "smaller weights" in message
    assert same_bits(bits(models), before) and loras.active == {}
    assert loras._originals == {}


def test_memory_of_the_originals(files: list[Path]) -> None:
    models = tiny_models("sd")
    loras = Loras(models)
    first, second = (read(path, "sd") for path in (files[0], files[2]))
    loras.load(first)
    loras.load(second)
    assert set(loras._originals) == {*check(first, models), *check(second, models)}
    loras.unload("lora0")
    assert set(loras._originals) == {*check(second, models)}
    loras.unload()
    assert loras._originals == {}


# ------------------------------------------------------------------------------------------------------------
# What is refused


UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(name: str = UNET, down: tuple[int, ...] = (2, 12), up: tuple[int, ...] = (16, 2)) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up)}


def kohya_pair(name: str, width: int = 12) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(16, 2)}


def peft_settings(**settings: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}


REFUSED_FILES: dict[str, tuple[str, dict[str, Tensor], dict[str, str], str]] = {
    "DoRA": ("sd", {**kohya_pair("lora_unet_x"), "lora_unet_x.dora_scale": torch.ones(16, 1)}, {}, "is a DoRA"),
    "DoRA of peft": ("sd", {**pair(), f"{UNET}.lora_magnitude_vector": torch.ones(16)}, {}, "is a DoRA"),
    "LoKr": ("sd", {"lora_unet_x.lokr_w1": torch.ones(2, 2)}, {}, "is a LoKr"),
    "LoHa": ("sd", {"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, {}, "is a LoHa"),
    "OFT": ("sd", {"lora_unet_x.oft_blocks": torch.ones(2, 2)}, {}, "is an OFT"),
    "Tucker": (
        "sd",
        {**kohya_pair("lora_unet_x"), "lora_unet_x.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        {},
        "Tucker",
    ),
    "Control LoRA of BFL": (
        "flux",
        {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(8)},
        {},
        "is a Control LoRA",
    ),
    "Control LoRA of SAI": ("sd", {"lora_controlnet": torch.ones(1)}, {}, "is a Control LoRA"),
    "differences": ("sd", {"lora_unet_conv_in.diff": torch.ones(2, 2)}, {}, r"differences of weights \(diff\)"),
    "differences of biases": ("flux", {"lora_unet_img_in.diff_b": torch.ones(2)}, {}, "differences of weights"),
    "a checkpoint": (
        "sd",
        {"conv_in.weight": torch.ones(2, 2)},
        {},
        "1 of 1 tensors are none of a LoRA: conv_in.weight",
    ),
    "no tensor": ("sd", {}, {}, "holds no LoRA matrices but nothing"),
    "alphas alone": ("sd", {f"{UNET}.alpha": torch.ones(())}, {}, "holds no LoRA matrices"),
    "one matrix": ("sd", {f"{UNET}.lora_A.weight": torch.ones(2, 12)}, {}, "to_k' of .* is not complete"),
    "an alpha without matrices": ("sd", {**pair(), "unet.x.alpha": torch.ones(())}, {}, "'unet.x' of .* not complete"),
    "a bias without matrices": (
        "sd",
        {**pair(), "unet.x.lora_B.bias": torch.ones(2)},
        {},
        "'unet.x' of .* not complete",
    ),
    "two alphas": ("sd", {**pair(), f"{UNET}.alpha": torch.ones(2)}, {}, r"is \[2\]: an alpha is one number"),
    "ranks": ("sd", pair(down=(3, 12)), {}, r"are \[3, 12\] and \[16, 2\]"),
    "vectors": ("sd", pair(down=(2,)), {}, r"are \[2\] and \[16, 2\]"),
    "empty matrices": ("sd", pair(down=(0, 12), up=(16, 0)), {}, r"are \[0, 12\]"),
    "kernels above": ("sd", pair(up=(16, 2, 3, 3)), {}, r"are \[2, 12\] and \[16, 2, 3, 3\]"),
    "integers": ("sd", {k: t.int() for k, t in pair().items()}, {}, "is torch.int32: a LoRA must hold floating"),
    "NaN": ("sd", {k: t * math.nan for k, t in pair().items()}, {}, "holds NaN or Inf"),
    "Inf": ("sd", {**pair(), f"{UNET}.alpha": torch.tensor(math.inf)}, {}, "alpha' in .* holds NaN or Inf"),
    "Flux for SD": ("sd", kohya_pair("lora_unet_double_blocks_0_img_attn_proj"), {}, "for Flux.1: use one .* 1.x or"),
    "Flux for SDXL": ("sdxl", pair("transformer.single_transformer_blocks.0.proj_mlp"), {}, "for Flux.1: use .* SDXL"),
    "SD3 for Flux": ("flux", pair("transformer.transformer_blocks.0.attn.to_q", down=(2, 1536)), {}, "a LoRA for SD3:"),
    "Flux for SD3": ("sd3", pair("transformer.transformer_blocks.0.attn.to_q", down=(2, 3072)), {}, "for Flux.1: "),
    "SDXL for SD": ("sd", pair(down=(2, 2048)), {}, "is a LoRA for SDXL: use one .* Stable Diffusion 1.x or"),
    "SDXL for SD by depth": ("sd", pair(UNET.replace("blocks.0.attn2", "blocks.9.attn1")), {}, "is a LoRA for SDXL"),
    "SD 1 for SDXL": ("sdxl", kohya_pair("lora_unet_mid_block_attn2_to_k", 768), {}, "LoRA for Stable Diffusion 1.x:"),
    "SD 2 for Flux": ("flux", pair(down=(2, 1024)), {}, "is a LoRA for Stable Diffusion 2.x: use one .* Flux.1"),
    "kohya for SD3": ("sd3", kohya_pair("lora_unet_joint_blocks_0_x_block_attn_proj"), {}, "no layout that diffusers"),
    "kohya and other names": ("sd", {**kohya_pair("lora_unet_mid_block_x"), **kohya_pair("other")}, {}, "no layout"),
    "T5 of Flux": (
        "flux",
        {
            **kohya_pair("diffusion_model.double_blocks.0.img_attn.proj"),
            **kohya_pair("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        },
        {},
        "1 matrices of .* in no layout .*t5xxl",
    ),
    "two namings at once": (
        "sdxl",
        {
            **kohya_pair("lora_unet_mid_block_attentions_0_proj_in"),
            **kohya_pair("lora_unet_middle_block_1_proj_out"),
            **kohya_pair("lora_te2_text_projection"),
        },
        {},
        "1 matrices of .*middle_block_1_proj_out",
    ),
    "two layers under one name": (
        "sdxl",
        {**kohya_pair("lora_unet_add_embedding_linear_1"), **kohya_pair("lora_unet_add_embedding_linear_2")},
        {},
        "1 matrices of .*add_embedding_linear_1",
    ),
    "what a converter stumbles over": (
        "flux",
        {**kohya_pair("lora_unet_double_blocks_0_img_attn_proj"), **kohya_pair("lora_unet_other")},
        {},
        "diffusers cannot convert .*ValueError",
    ),
    "settings that are no JSON": ("sd", pair(), {"lora_adapter_metadata": "{"}, "is no JSON object"),
    "settings that are no object": ("sd", pair(), {"lora_adapter_metadata": "[1]"}, "is no JSON object"),
    "scale twice": ("sd", {**pair(), f"{UNET}.alpha": torch.ones(())}, peft_settings(r=2), "gives its scale twice"),
    "settings of DoRA": ("sd", pair(), peft_settings(r=2, use_dora=True), "trained with unet.use_dora = True"),
    "settings of PiSSA": ("sd", pair(), peft_settings(r=2, init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "settings of another rank": (
        "sd",
        pair(),
        peft_settings(r=4),
        "has rank 2, (and|not that of) its lora_adapter_metadata",
    ),
    "settings: alpha": ("sd", pair(), peft_settings(r=2, lora_alpha="x"), "alpha of .* is 'x'"),
    "settings: NaN": ("sd", pair(), peft_settings(r=2, lora_alpha=math.nan), "alpha of .* is nan"),
    "settings: pattern": (
        "sd",
        pair(),
        peft_settings(r=2, alpha_pattern={"(": 1}),
        "alpha_pattern of .* cannot be read",
    ),
    "settings: endless pattern": ("sd", pair(), peft_settings(r=2, alpha_pattern={"(a*)*b": 1}), "cannot be read"),
    "settings: patterns": ("sd", pair(), peft_settings(r=2, rank_pattern=[1]), "rank_pattern of .* cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_files_that_are_refused(case: str, tmp_path: Path) -> None:
    family, tensors, metadata, expected = REFUSED_FILES[case]
    path = write(tmp_path, tensors, metadata=metadata)
    message = refusal(lambda: read(path, family))
    assert re.search(expected, message), message
    assert str(path) in message


def test_differences_of_zero_are_left_out(tmp_path: Path) -> None:
    tensors = flux_blocks("comfy")
    zeros = {"diffusion_model.double_blocks.0.img_attn.proj.diff_b": torch.zeros(16)}
    first, second = write(tmp_path, tensors, "plain"), write(tmp_path, {**tensors, **zeros}, "zeros")
    assert read(first, "flux").digest == read(second, "flux").digest


MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no such layer": (
        pair("unet.mid_block.attentions.7.proj_in"),
        r"\(1 layers that the model lacks: unet.mid_block.attentions.7.proj_in.weight\)",
    ),
    "no such layers": (
        {k: t for i in range(5) for k, t in pair(f"unet.mid_block.attentions.{i + 1}.proj_in").items()},
        "5 layers that the model lacks: .* and 2 more",
    ),
    "no such component": (pair("text_encoder_2.text_model.q_proj"), "lacks: unet.text_encoder_2.text_model.q_proj"),
    "text encoder that is not loaded": (
        pair("text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        "lacks: text_encoder",
    ),
    "another width": (
        pair(down=(2, 1024)),
        r"looks like one for Stable Diffusion 2.x, does not fit .*attn2.to_k.weight \(\[16, 1024\], the model has",
    ),
    "another kernel": (pair("unet.conv_in", (2, 4, 1, 1), (8, 2, 1, 1)), r"\(\[8, 4\], the model has \[8, 4, 3, 3\]\)"),
    "a bias of a layer without": ({**pair(), f"{UNET}.lora_B.bias": torch.ones(16)}, "lacks: .*to_k.bias"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_adapters_that_do_not_fit(case: str, tmp_path: Path) -> None:
    tensors, expected = MISFITS[case]
    models = tiny_models("sd")
    del models["text_encoder"]
    before = bits(models)
    loras = Loras(models)
    adapter = read(write(tmp_path, tensors), "sd")
    for call in (lambda: check(adapter, models), lambda: loras.load(adapter)):
        message = refusal(call)
        assert re.search(expected, message), message
    assert same_bits(bits(models), before) and loras.active == {}


def test_released_weights_are_refused(files: list[Path]) -> None:
    models = {name: model.to("meta") for name, model in tiny_models("sd").items()}
    assert "layers whose weights were released: " in refusal(lambda: check(read(files[0], "sd"), models))


def test_names_and_weights(files: list[Path], tmp_path: Path) -> None:
    adapter = read(files[1], "sd")
    loras = Loras(tiny_models("sd"))
    for weight in (math.nan, math.inf, "1", None, True):
        assert "must be a finite number" in refusal(lambda weight=weight: loras.load(adapter, weight))
    for name in ("", 7):
        assert "it must be text" in refusal(lambda name=name: loras.load(adapter, 1, name))
    assert loras.load(adapter) == "lora1"
    assert "a LoRA named 'lora1' is loaded: unload it first" in refusal(lambda: loras.load(adapter))
    assert "no LoRA is named 'x': loaded are lora1" in refusal(lambda: loras.unload("x"))
    assert loras.load(adapter, 2, "b") == "b"
    assert loras.active == {"lora1": 1.0, "b": 2.0}
    assert loras.key() == ((adapter.digest, 1.0), (adapter.digest, 2.0))
    folder = tmp_path / "style.v2"
    folder.mkdir()
    shutil.copy(files[0], folder / "some.safetensors")
    assert loras.load(read(folder, "sd")) == "style.v2"
    assert "'kandinsky' has no LoRA: the families are sd, sdxl" in refusal(lambda: read(files[0], "kandinsky"))


def test_an_adapter_outlives_its_file(files: list[Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(files[0], tmp_path / "style.safetensors"))
    adapter = read(path, "sd")
    with open(path, "r+b") as file:
        file.truncate(100)
    Loras(tiny_models("sd")).load(adapter)
    assert "truncated" in refusal(lambda: read(path, "sd"))


# ------------------------------------------------------------------------------------------------------------
# What the user typed


def test_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").touch()
    (tmp_path / "style.safetensors").touch()
    for text, expected in {
        "style.safetensors": ("style.safetensors", 1.0),
        "style.safetensors:0.8": ("style.safetensors", 0.8),
        "style.safetensors:-1": ("style.safetensors", -1.0),
        "style.safetensors:+1e-1": ("style.safetensors", 0.1),
        "style.safetensors:.5": ("style.safetensors", 0.5),
        "a:0.5": ("a:0.5", 1.0),
        "a:0.5:2": ("a:0.5", 2.0),
        "org/name": ("org/name", 1.0),
        "org/name@v1.0:0.25": ("org/name@v1.0", 0.25),
        "C:\\loras\\style.safetensors": ("C:\\loras\\style.safetensors", 1.0),
        "C:\\loras\\style.safetensors:0.5": ("C:\\loras\\style.safetensors", 0.5),
    }.items():
        assert parse(text) == expected, text
    for text in ("", ":0.5", " :1"):
        assert "names no file" in refusal(lambda text=text: parse(text))
    for text in ("style.safetensors:", "org/name:", "style.safetensors:half", "style.safetensors:0,5"):
        assert "has no number after its last colon" in refusal(lambda text=text: parse(text))
    for text in ("style.safetensors:nan", "style.safetensors:-inf", "x:1e999"):
        assert "must be a finite number" in refusal(lambda text=text: parse(text))


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "one/a.safetensors",
        "one/readme.md",
        "two/a.safetensors",
        "two/b.safetensors",
        "two/sub/c.safetensors",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find("~/one") == find(tmp_path / "one/a.safetensors") == tmp_path / "one/a.safetensors"
    assert find(tmp_path / "two", weight_name="b.safetensors") == tmp_path / "two/b.safetensors"
    assert find(tmp_path / "two", weight_name="sub/c.safetensors") == tmp_path / "two/sub/c.safetensors"
    assert "has 2 safetensors files (a.safetensors, b.safetensors): say which" in refusal(
        lambda: find(tmp_path / "two")
    )
    (tmp_path / "two/pytorch_lora_weights.safetensors").touch()
    assert find(tmp_path / "two") == tmp_path / "two/pytorch_lora_weights.safetensors"


def test_names_that_are_refused(tmp_path: Path) -> None:
    for folder, name in {
        "empty": None,
        "pickle": "a.bin",
        "checkpoint": "model_index.json",
        "one": "a.safetensors",
    }.items():
        (tmp_path / folder).mkdir()
        if name:
            (tmp_path / folder / name).touch()
    (tmp_path / "text.txt").touch()
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    cases: dict[str, tuple[Callable[[], object], str]] = {
        "no file": (lambda: find(tmp_path / "x.safetensors"), "does not exist: pass a .safetensors file"),
        "no path": (lambda: find(tmp_path / "x"), "there is no LoRA"),
        "nothing": (lambda: find(""), "there is no LoRA ''"),
        "a broken link": (lambda: find(tmp_path / "link.safetensors"), "is a broken link"),
        "another file": (lambda: find(tmp_path / "text.txt"), "is no .safetensors file"),
        "an empty folder": (lambda: find(tmp_path / "empty"), "has no safetensors file but nothing"),
        "a folder of pickles": (lambda: find(tmp_path / "pickle"), "'a.bin' is a pickle, .* convert it once with"),
        "a pickle": (lambda: find(tmp_path / "lora.ckpt"), "is a pickle, .*save_file"),
        "a checkpoint": (lambda: find(tmp_path / "checkpoint"), "is a whole checkpoint and no LoRA"),
        "a way out": (
            lambda: find(tmp_path / "one", weight_name="../one/a.safetensors"),
            "weight_name .* is not right",
        ),
        "a pickle in it": (lambda: find(tmp_path / "one", weight_name="a.bin"), "weight_name .* is not right"),
        "not in it": (lambda: find(tmp_path / "one", weight_name="b.safetensors"), "has no 'b.safetensors' but a.saf"),
        "not below it": (lambda: find(tmp_path / "one", weight_name="b/b.safetensors"), "has no 'b/b.safet"),
        "a file in a file": (
            lambda: find(tmp_path / "one/a.safetensors", weight_name="b.safetensors"),
            "is a file and holds no 'b.safetensors'",
        ),
        "a revision of a folder": (lambda: find(tmp_path / "one", revision="main"), "has no revision 'main'"),
        "two revisions": (lambda: find("org/name@v1", revision="v2"), "already names a revision"),
    }
    for case, (call, expected) in cases.items():
        message = refusal(call)
        assert re.search(expected, message), (case, message)


hub = test_checkpoint.hub  # a hub on this machine, spoken to by the real client


def test_hub(hub: test_checkpoint.Hub, monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> None:
    content = files[0].read_bytes()
    hub.repos = {
        "org/style": {"pytorch_lora_weights.safetensors": content, "other.safetensors": content, "preview.png": b""},
        "org/two": {"a.safetensors": content, "b.safetensors": content},
        "org/pickle": {"lora.pt": b""},
        "org/gone": {"a.safetensors": content},
    }
    loras = Loras(tiny_models("sd"))
    assert loras.load(read("org/style@v1", "sd"), name="pinned") == "pinned"
    assert loras.load(read("org/style", "sd")) == "style"
    assert set(hub.fetched) == {"pytorch_lora_weights.safetensors"}
    assert find("org/two", weight_name="b.safetensors").read_bytes() == content
    refused: dict[str, tuple[Callable[[], object], str]] = {
        "several": (lambda: find("org/two"), "the hub model 'org/two' has 2 safetensors files"),
        "not in it": (lambda: find("org/two", weight_name="c.safetensors"), "has no 'c.safetensors' but a.safetensors"),
        "not below it": (lambda: find("org/two", weight_name="x/c.safetensors"), "has no 'x/c.safetensors'"),
        "pickle": (lambda: find("org/pickle"), "'lora.pt' is a pickle"),
        "unknown": (lambda: find("org/none"), "the hub has no model 'org/none'"),
        "no revision": (lambda: find("org/style@v9"), "has no revision 'v9'"),
        "no id": (lambda: find("org/a--b"), "is no valid hub id"),
    }
    for case, (call, expected) in refused.items():
        message = refusal(call)
        assert re.search(expected, message), (case, message)
    test_checkpoint.unplug(hub, monkeypatch)
    assert find("org/style").read_bytes() == content
    assert find("org/two", weight_name="b.safetensors").read_bytes() == content
    assert "cannot be reached" in refusal(lambda: find("org/gone"))
    assert "has no 'a.safetensors'" in refusal(lambda: find("org/two", weight_name="a.safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find("org/style").read_bytes() == content
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: find("org/gone"))
