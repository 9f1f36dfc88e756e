"""Random weights: reproducible, built in place, and such that every family's numbers stay of a trained model's size."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd import random_weights
from fastsd.checkpoint import Source
from fastsd.denoisers.unet import UNet
from fastsd.errors import InputError
from fastsd.presets import PRESETS, Preset
from fastsd_benchmarks.narrow import WIDTHS, narrow

CPU = torch.device("cpu")
PRECISIONS = [torch.bfloat16, torch.float32]


def build(preset: Preset, component: str) -> Any:
    """A component of the library's class on the meta device."""
    library, name = preset.index[component]
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    config = dict(preset.configs[component])
    with torch.device("meta"):
        return cls.from_config(config) if library == "diffusers" else cls(cls.config_class(**config))


def load(preset: Preset, component: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    module = build(preset, component)
    random_weights.source(preset, seed).load(module, component, dtype, CPU)
    return module


def window(source: Source, component: str, prompt: str) -> Tensor:
    tokenizer = source.tokenizer(component)
    ids = [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(prompt), tokenizer.eos]
    return torch.tensor([ids + [tokenizer.pad] * (min(tokenizer.length, 77) - len(ids))])


def difference(a: Tensor, b: Tensor) -> float:
    """Of `a` from `b`, relative to `b`."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def noise(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def predict(denoiser: Any, latents: Tensor, time: float, text: Tensor, pooled: Tensor) -> Tensor:
    """One call of a diffusers denoiser; `time` is in 0..1."""
    kind = type(denoiser).__name__
    with torch.inference_mode():
        if kind == "UNet2DConditionModel":
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
            added = added if denoiser.config.addition_embed_type else None
            return denoiser(latents, torch.tensor([1000 * time]), text, added_cond_kwargs=added).sample
        if kind == "SD3Transformer2DModel":
            return denoiser(latents, text, pooled, torch.tensor([1000 * time])).sample
        patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        height, width = patches.shape[1:3]
        ids = torch.stack(
            [torch.zeros(height, width), *torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")], -1
        )
        return denoiser(
            hidden_states=patches.flatten(3).flatten(1, 2),
            timestep=torch.tensor([time]),
            guidance=torch.tensor([3.5]) if denoiser.config.guidance_embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=ids.flatten(0, 1),
        ).sample


@pytest.fixture
def largest() -> Iterator[dict[str, float]]:
    """The largest activation by kind of module while the fixture lives; infinite where one is not finite."""
    seen: dict[str, float] = {}

    def record(module: nn.Module, _: object, output: object) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                top = float(tensor.abs().max()) if tensor.isfinite().all() else float("inf")
                kind = type(module).__name__
                seen[kind] = max(seen.get(kind, 0.0), top)

    hook = nn.modules.module.register_module_forward_hook(record)
    yield seen
    hook.remove()


def check_text_encoders(preset: Preset, dtype: torch.dtype) -> None:
    """Hidden states that are finite, of unit size, and another for each token and each prompt."""
    source = random_weights.source(preset)
    for component in (one for one in preset.weights if one.startswith("text_encoder")):
        encoder = load(preset, component, dtype)
        tokenizer = component.replace("text_encoder", "tokenizer")
        prompts = ["a red circle on a blue background", "a green circle on a blue background"]
        with torch.inference_mode():
            first, second = (
                encoder(window(source, tokenizer, prompt), output_hidden_states=True) for prompt in prompts
            )
        last = first.hidden_states[-2]
        assert last.isfinite().all() and 0.5 < last.float().std() < 8
        # Rounding in bfloat16 moves them by 0.01; one word of seven by 0.04 to 0.3.
        assert difference(first[0], second[0]) > 0.03
        states = first.last_hidden_state[0].float()
        assert torch.corrcoef(states[1:6]).triu(1).max() < 0.99
        for name in ("pooler_output", "text_embeds"):
            if getattr(first, name, None) is not None:
                assert difference(first[name], second[name]) > 0.03


def check_denoiser(preset: Preset, dtype: torch.dtype) -> None:
    """A prediction that is finite, of unit size, not constant, and depends on all that goes in."""
    component = "unet" if "unet" in preset.configs else "transformer"
    denoiser = load(preset, component, dtype)
    context_width, pooled_width = WIDTHS[preset.index["_class_name"]]
    channels = denoiser.config.in_channels // (4 if "Flux" in type(denoiser).__name__ else 1)

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        latents = noise(seed, 1, channels, 16, 16, dtype=dtype)
        text, pooled = noise(seed + 1, 1, 77, context_width, dtype=dtype), noise(seed + 2, 1, pooled_width, dtype=dtype)
        return latents, text, pooled

    (latents, text, pooled), others = inputs(0), inputs(10)
    prediction = predict(denoiser, latents, 0.8, text, pooled)
    assert prediction.isfinite().all() and 0.2 < prediction.float().std() < 4
    assert prediction.float().std(dim=(1, 2) if prediction.ndim == 3 else (2, 3)).min() > 0.1
    # Another text moves it by 0.03 (three layers) to 0.36 (SDXL), other latents by 0.8 to 1.3.
    assert difference(predict(denoiser, others[0], 0.8, text, pooled), prediction) > 0.5
    assert difference(predict(denoiser, latents, 0.1, text, pooled), prediction) > 0.08
    assert difference(predict(denoiser, latents, 0.8, others[1], pooled), prediction) > 0.025
    if preset.index["_class_name"] != "StableDiffusionPipeline":
        assert difference(predict(denoiser, latents, 0.8, text, others[2]), prediction) > 0.08


def check_vae(preset: Preset, dtype: torch.dtype) -> None:
    """Pixels that are finite and not constant, also from latents as large as an untrained model leaves them."""
    vae = load(preset, "vae", dtype)
    with torch.inference_mode():
        for scale in (1, 80):
            latents = scale * noise(0, 1, vae.config.latent_channels, 8, 8, dtype=dtype)
            pixels = vae.decode(latents).sample
            assert pixels.isfinite().all() and 0.2 < pixels.float().std(dim=(2, 3)).mean() < 2
        other = vae.decode(noise(1, 1, vae.config.latent_channels, 8, 8, dtype=dtype)).sample
        assert difference(other, pixels) > 0.3
        encoded = vae.encode(pixels.clamp(-1, 1)).latent_dist.mean
        assert encoded.isfinite().all() and 0.1 < encoded.float().std() < 4


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "name", ["sd15", "sd21", "sdxl", "sd3-medium", "sd35-medium", "sd35-large", "flux-schnell", "flux-dev"]
)
def test_denoisers(name: str, dtype: torch.dtype) -> None:
    check_denoiser(narrow(name), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["sd15", "sd21", "sd3-medium"])
def test_text_encoders(name: str, dtype: torch.dtype) -> None:
    check_text_encoders(narrow(name), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["sd15", "flux-dev"])
def test_vaes(name: str, dtype: torch.dtype) -> None:
    check_vae(narrow(name), dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_the_full_depth_stays_finite(name: str, dtype: torch.dtype, largest: dict[str, float]) -> None:
    preset = narrow(name, full_depth=True)
    check_text_encoders(preset, dtype)
    check_denoiser(preset, dtype)
    check_vae(preset, dtype)
    # The widest range is float16's 65504; the VAE passes latents of 80 standard deviations through.
    assert max(largest.values()) < 1000


def test_the_demo_with_random_weights_has_its_own_size() -> None:
    source = random_weights.source("demo")
    unet, text_encoder = build(PRESETS["demo"], "unet"), build(PRESETS["demo"], "text_encoder")
    source.load(unet, "unet", torch.float32, CPU)
    source.load(text_encoder, "text_encoder", torch.float32, CPU)
    with torch.inference_mode():
        states = [
            text_encoder(window(source, "tokenizer", prompt)).last_hidden_state
            for prompt in ("a red circle", "a blue square")
        ]
        latents = noise(0, 1, 4, 16, 16, dtype=torch.float32)
        first, second = (unet(latents, torch.tensor([500]), text).sample for text in states)
    assert first.isfinite().all() and difference(first, second) > 0.03


# ------------------------------------------------------------------------------------------------------------
# What the numbers depend on


@pytest.mark.parametrize(
    ("name", "component"), [("sdxl", "unet"), ("sd3-medium", "text_encoder_3"), ("flux-dev", "vae")]
)
def test_a_seed_is_a_model(name: str, component: str) -> None:
    preset = narrow(name)
    first, again = (load(preset, component, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = load(preset, component, seed=4).state_dict()
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_numbers_depend_on_component_and_name_not_on_order() -> None:
    """Our UNet registers its parameters in another order than diffusers' and gets the same numbers."""
    preset = narrow("sd15")
    oracle = load(preset, "unet")
    with torch.device("meta"):
        ours = UNet(preset.configs["unet"])
    random_weights.source(preset).load(ours, "unet", torch.float32, CPU)
    expected = oracle.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())

    latents, text = noise(0, 1, 4, 16, 16, dtype=torch.float32), noise(1, 1, 77, 64, dtype=torch.float32)
    with torch.inference_mode():
        constants = ours.prepare(torch.tensor([[500.0]]), text)
        prediction = ours(latents, constants.modulation[0], constants.context)
        # The same network in float32, summed in other orders.
        assert difference(prediction, oracle(latents, torch.tensor([500.0]), text).sample) < 1e-5

    sdxl = narrow("sdxl")
    same_shape = dataclasses.replace(sdxl, configs={**sdxl.configs, "text_encoder_2": sdxl.configs["text_encoder"]})
    first, second = (load(same_shape, component) for component in ("text_encoder", "text_encoder_2"))
    weights = [
        next(value for key, value in module.state_dict().items() if key.endswith("layers.0.mlp.fc1.weight"))
        for module in (first, second)
    ]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)], ids=["bfloat16", "float16"]
)
def test_every_dtype_has_the_same_numbers(dtype: torch.dtype, rounding: float) -> None:
    """So that float32 is the reference of a run in 16 bits."""
    exact = load(narrow("sd3-medium"), "transformer").state_dict()
    for key, value in load(narrow("sd3-medium"), "transformer", dtype).state_dict().items():
        # Rounded twice, before and after the scale, by half a unit in the last place each; below the smallest normal
        # number of float16, 6e-5, the unit is fixed.
        assert value.dtype == dtype
        torch.testing.assert_close(value.float(), exact[key], rtol=rounding, atol=1e-7, msg=key)


# ------------------------------------------------------------------------------------------------------------
# How they are put into a module


def test_a_filled_module_is_as_a_loaded_one() -> None:
    preset = narrow("sd3-medium")
    for component in preset.weights:
        module = load(preset, component, torch.bfloat16)
        assert not module.training
        assert not any(one.requires_grad or one.is_meta for one in module.parameters())
        assert not any(one.is_meta for one in module.buffers())
        assert all(one.dtype == torch.bfloat16 for one in module.state_dict().values())
    encoder = load(preset, "text_encoder_3")
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    positions = dict(load(preset, "text_encoder").named_buffers())
    assert [one.tolist() for key, one in positions.items() if key.endswith("position_ids")] == [[list(range(77))]]


def test_positions_of_sd3_are_diffusers() -> None:
    preset = narrow("sd3-medium")
    config = preset.configs["transformer"]
    table = load(preset, "transformer").pos_embed.pos_embed
    expected = get_2d_sincos_pos_embed(
        64, config["pos_embed_max_size"], base_size=config["sample_size"] // 2, output_type="pt"
    )
    assert torch.equal(table, expected.float()[None])  # both are float64 rounded once


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            self.storages[result.untyped_storage()._cdata] = (
                result.untyped_storage()
            )  # kept, so that no address returns
        return result

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes() for one in self.storages.values())


@pytest.mark.parametrize(
    ("name", "component"), [("sd15", "unet"), ("sd35-medium", "transformer"), ("flux-dev", "text_encoder_2")]
)
def test_nothing_is_held_twice(name: str, component: str) -> None:
    preset = narrow(name, full_depth=True)
    module = build(preset, component)
    with Allocations() as allocations:
        random_weights.source(preset).load(module, component, torch.bfloat16, CPU)
    needed = sum({one.data_ptr(): one.nbytes for one in module.state_dict().values()}.values())
    ring = (4 + 2) * random_weights.RING  # drawn in float32, cast once
    small = 1_000_000  # one row and column of positions in float64, the generator's state
    assert needed <= allocations.nbytes <= needed + ring + small


def test_a_matrix_larger_than_the_ring() -> None:
    """The largest of Flux, [18432, 3072]: Gaussian, of the right size, no two rows alike, and white."""
    with torch.device("meta"):
        module = nn.ModuleDict({"linear": nn.Linear(3072, 18432)})
    random_weights.source("flux-dev").load(module, "transformer", torch.bfloat16, CPU)
    weight = module["linear"].weight
    assert weight.numel() > 13 * random_weights.RING
    sample = weight[::7].float() * 3072**0.5
    # 4 million different numbers: the standard error of their mean is 5e-4, of their variance 7e-4.
    assert abs(sample.mean()) < 3e-3 and abs(sample.var() - 1) < 5e-3
    assert abs(sample.pow(4).mean() - 3) < 0.03
    assert len(torch.unique(weight[:, :4].float(), dim=0)) == 18432
    # A vector goes through with its variance, and its 18432 results are not related: 1 / sqrt(18432) = 0.007.
    x = noise(0, 3072, 2, dtype=torch.bfloat16)
    y = (weight @ x).float()
    assert y.var(dim=0).sub(1).abs().max() < 0.05
    assert torch.corrcoef(y.T)[0, 1].abs() < 0.06
    assert torch.corrcoef(torch.stack([y[:-1, 0], y[1:, 0]]))[0, 1].abs() < 0.04


@pytest.mark.full
def test_one_layer_of_t5_at_full_width() -> None:
    config = {**PRESETS["flux-dev"].configs["text_encoder_2"], "num_layers": 1, "vocab_size": 1000}
    preset = dataclasses.replace(PRESETS["flux-dev"], configs={"text_encoder_2": config})
    encoder = load(preset, "text_encoder_2", torch.bfloat16)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    with torch.inference_mode():
        x = noise(0, 1, 32, 4096, dtype=torch.bfloat16)
        queries, keys = (one(x).unflatten(-1, (64, 64)).transpose(1, 2).float() for one in (attention.q, attention.k))
        scores = queries @ keys.mT  # T5 has no scale
        states = encoder(torch.arange(32)[None]).last_hidden_state
    # Queries and keys of unit size give scores of unit size.
    assert scores.std() == pytest.approx(1, rel=0.05)
    assert states.isfinite().all() and states.float().std() == pytest.approx(1, rel=0.1)


# ------------------------------------------------------------------------------------------------------------
# The source


@pytest.mark.parametrize("name", PRESETS)
def test_a_source_has_all_of_the_preset(name: str) -> None:
    preset, source = PRESETS[name], random_weights.source(name)
    assert source.index == preset.index
    for component, config in preset.configs.items():
        copy = source.config(component)
        assert copy == config
        copy.clear()  # a copy: the table stays
        assert preset.configs[component] == source.config(component) != {}
    for component, facts in preset.tokenizers.items():
        tokenizer = source.tokenizer(component)
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.length) == facts[1:]
        ids = tokenizer.encode("a red circle, on a blue background")
        assert len(ids) == 8 and max(ids) < facts.vocab_size and not {facts.bos, facts.eos, facts.pad} & set(ids)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sd16",), "there are no random weights for 'sd16': name a preset (demo, sd15"),
        (("org/name",), "there are no random weights for 'org/name'"),
        (("sd15", -1), "the seed must be a whole number from 0"),
        (("sd15", 2**63), "the seed must be a whole number from 0"),
        (("sd15", 0.5), "the seed must be a whole number from 0"),
    ],
    ids=["preset", "hub id", "negative", "too large", "fraction"],
)
def test_refusals(arguments: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        random_weights.source(*arguments)
    assert says in str(error.value)


def test_the_largest_seed() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(2, 2, device="meta")})
    random_weights.source("sd15", 2**63 - 1).load(module, "unet", torch.float32, CPU)
    assert module["linear"].weight.isfinite().all()
