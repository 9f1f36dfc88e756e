"""The VAE: whole it is diffusers' own, in strips the same image, and what float16 cannot hold is decoded anyhow."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_vae
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastsd
from fastsd import autoencoder, device, memory, ops, vae
from fastsd.pipeline import Pipeline

VAES: dict[str, dict[str, Any]] = {
    "sd": {},
    "flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1},
    "two layers": {"layers_per_block": 2},
    "no attention": {"mid_block_add_attention": False},
    "attention in levels": {
        "down_block_types": (
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "AttnDownEncoderBlock2D",
        ),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "gelu": {"act_fn": "gelu"},
}
SIZES = [(9, 13), (16, 3), (1, 1)]  # latents; 9 x 8 rows are no multiple of a strip's
HALVES = [torch.bfloat16, torch.float16]


def make(case: str = "sd", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if "down_block_types" not in VAES[case]:
        module = tiny_vae(**VAES[case])
    else:
        from diffusers import AutoencoderKL

        module = AutoencoderKL(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4, **VAES[case])
    for parameter in module.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return module.eval().requires_grad_(False).to(dtype)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth(channels: int, height: int, width: int) -> Tensor:
    """Latents that change little from one to the next."""
    rows, columns = torch.linspace(-2, 2, height)[:, None], torch.linspace(-1, 3, width)
    return torch.stack([torch.sin(rows * (1 + i) + columns) for i in range(channels)])[None]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of as few rows as work, so that a tiny map has many."""
    monkeypatch.setattr(autoencoder, "STRIP", 0)
    monkeypatch.setattr(autoencoder, "ROWS", 4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("case", VAES)
def test_whole_is_diffusers_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    module = make(case, dtype)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    latents = noise(1, module.config.latent_channels, 9, 13).to(dtype)
    with torch.inference_mode():
        expected = module.decode(latents).sample
        assert torch.equal(autoencoder.decoder(module, latents), expected)
        pixels = expected.clamp(-1, 1)
        moments = module.encode(pixels).latent_dist.parameters
        assert torch.equal(autoencoder.encoder(module, pixels), moments)
        # Nothing of the module has changed, nor what diffusers computes with it.
        assert torch.equal(module.decode(latents).sample, expected)
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == dict.fromkeys(before, dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", VAES)
def test_strips_are_the_whole_map_up_to_rounding(case: str, size: tuple[int, int]) -> None:
    module = make(case)
    latents = noise(1, module.config.latent_channels, *size)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.inference_mode():
            given = latents.to(memory_format=layout)
            whole, strips = (autoencoder.decoder(module, given, striped=striped) for striped in (False, True))
            # Of pixels from -1 to 1: 50 roundings of 6e-8. A seam would be 1e-2.
            torch.testing.assert_close(strips, whole, atol=2e-5, rtol=0)
            assert torch.equal(given, latents)
            whole, strips = (autoencoder.encoder(module, whole.clamp(-1, 1), striped=one) for one in (False, True))
            torch.testing.assert_close(strips, whole, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("content", ["smooth", "noisy"])
def test_tiled_decode_has_no_seams(content: str, dtype: torch.dtype) -> None:
    module = make(dtype=dtype)
    latents = noise(1, 4, 24, 9) if content == "noisy" else smooth(4, 24, 9)
    latents = 3 * latents * module.config.scaling_factor
    whole, tiled = (vae.decode(module, latents, tiled=tiled) for tiled in (False, True))
    assert whole.std() > 0.05
    # What is promised of every dtype. In float32 and float16 roundings are far below; in bfloat16 each is 1/512.
    mean = (tiled - whole).abs().mean()
    assert mean <= {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1 / 255}[dtype]
    # Rows next to the edge of a strip are no worse than others.
    rows = (tiled - whole).abs().mean((0, 2, 3))
    assert rows.max() <= max(5 * float(rows.mean()), 1e-6)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("tiled", [False, True])
def test_an_image_of_a_batch_is_the_image_alone(tiled: bool) -> None:
    module = make(dtype=torch.bfloat16)
    latents = noise(3, 4, 5, 6) * module.config.scaling_factor
    pixels = vae.decode(module, latents, tiled=tiled)
    assert pixels.shape == (3, 40, 48, 3) and pixels.dtype == torch.float32
    back = vae.encode(module, pixels, tiled=tiled)
    assert back.shape == latents.shape and back.dtype == torch.float32
    for image in range(3):
        one = slice(image, image + 1)
        assert torch.equal(vae.decode(module, latents[one], tiled=tiled), pixels[one])
        assert torch.equal(vae.encode(module, pixels[one], tiled=tiled), back[one])


def whole_or_strips(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled with what calls of the network decided."""
    seen: list[bool] = []
    for name in ("decoder", "encoder"):
        original = getattr(autoencoder, name)

        def spy(*args: Any, striped: bool = False, original: Any = original) -> Tensor:
            seen.append(striped)
            result: Tensor = original(*args, striped=striped)
            return result

        monkeypatch.setattr(autoencoder, name, spy)
    return seen


def test_auto_looks_at_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    latents, pixels = noise(1, 4, 8, 8), torch.rand(1, 64, 64, 3)
    where = torch.float32, torch.device("cpu")
    needed, twice = (memory.of_vae(module, "decoder", size, *where) for size in ((8, 8), (16, 8)))
    assert needed < twice < 2 * needed  # a part of the overhead does not grow
    seen = whole_or_strips(monkeypatch)
    for free, striped in ((needed + 1, False), (needed - 1, True)):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        vae.decode(module, latents)
        assert seen.pop() is striped
    vae.encode(module, pixels, tiled="auto")
    monkeypatch.setattr(memory, "free", lambda device: 0)
    vae.encode(module, pixels)
    assert seen[-1] is True
    vae.encode(module, pixels, tiled=False)
    assert seen[-1] is False
    with pytest.raises(fastsd.InputError, match="tiled is 'yes'; it must be True, False or 'auto'"):
        vae.decode(module, latents, tiled="yes")  # type: ignore[arg-type]


def overflowing() -> tuple[Any, Any]:
    """A VAE whose numbers are beyond float16 in one layer of each half, and a float32 copy."""
    module = make()
    with torch.no_grad():
        for net in (module.decoder, module.encoder):
            weight = net.mid_block.resnets[0].conv1.weight
            weight *= 60000 / weight.abs().max()  # the norm that follows takes it back
    module = module.half()
    exact = make()
    exact.load_state_dict(module.state_dict())
    return module, exact


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("wider", ["bfloat16", "float32"])
def test_overflow_is_answered_by_a_wider_dtype(monkeypatch: pytest.MonkeyPatch, wider: str, tiled: bool) -> None:
    # On a GPU without bfloat16 the pick is float16, which is no answer.
    picked = {"bfloat16": torch.bfloat16, "float32": torch.float16}[wider]
    monkeypatch.setattr(device, "pick_dtype", lambda *_: picked)
    module, exact = overflowing()
    latents = noise(2, 4, 6, 5) * module.config.scaling_factor
    expected = vae.decode(exact, latents)
    with pytest.warns(UserWarning, match=f"overflows in float16, so it runs in {wider} from now on: load the") as seen:
        pixels = vae.decode(module, latents, tiled=tiled)
    assert len(seen) == 1
    # bfloat16 has 8 bits: 1/255 for an average rounding or two.
    assert (pixels - expected).abs().mean() <= (1 / 255 if wider == "bfloat16" else 1e-6)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}

    dtypes: list[torch.dtype] = []
    original = autoencoder.decoder
    monkeypatch.setattr(
        autoencoder, "decoder", lambda one, x, **given: dtypes.append(x.dtype) or original(one, x, **given)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = vae.decode(module, latents[:1], tiled=tiled)  # at once in the other dtype, without a warning
        assert dtypes == [getattr(torch, wider)]
        assert torch.equal(again, pixels[:1])
        latents_again = vae.encode(module, pixels, tiled=tiled)
        torch.testing.assert_close(latents_again, vae.encode(exact, pixels), atol=0.1, rtol=0.1)
        vae.decode(make(dtype=torch.float16), latents[:1])  # another VAE is still in float16
        assert dtypes[-1] == torch.float16


def test_encode_finds_an_overflow_too() -> None:
    module, exact = overflowing()
    pixels = torch.rand(1, 40, 48, 3)
    with pytest.warns(UserWarning, match="the VAE overflows in float16"):
        latents = vae.encode(module, pixels)
    torch.testing.assert_close(latents, vae.encode(exact, pixels), atol=0.1, rtol=0.1)  # bfloat16 on some machines


def test_latents_that_are_not_finite_are_no_overflow_of_the_vae() -> None:
    module = make(dtype=torch.float16)
    latents = noise(1, 4, 4, 4)
    latents[0, 0, 0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vae.decode(module, latents).isnan().any()
    assert module not in vae._WIDER


def test_pipelines_make_no_black_image_of_an_overflow(make_checkpoint: Callable[..., Any]) -> None:
    pipe = Pipeline.from_pretrained(make_checkpoint("sd"), dtype="float16")
    with torch.no_grad():
        pipe.components.vae.decoder.mid_block.resnets[0].conv1.weight.copy_(60000)
    with pytest.warns(UserWarning, match="the VAE overflows in float16"):
        result = pipe("the red cat", seed=1, num_inference_steps=1, output_type="np")
    assert result.images.std() > 0


def test_a_network_that_is_handed_over_runs_where_it_fits() -> None:
    module = make()
    latents = noise(2, 4, 4, 4)
    calls: list[torch.dtype] = []

    def network(z: Tensor) -> Tensor:
        calls.append(z.dtype)
        return autoencoder.decoder(module, z)

    expected = vae.decode(module, latents, tiled=False)
    assert torch.equal(vae.decode(module, latents, tiled=False, network=network), expected)
    assert calls == 2 * [torch.float32]
    vae.decode(module, latents, tiled=True, network=network)  # it knows of no strips
    assert len(calls) == 2


def test_on_a_gpu_norms_and_silu_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(dtype=torch.bfloat16)
    calls: list[torch.Size] = []
    original = ops.group_norm_silu

    def spy(x: Tensor, norm: Any) -> Tensor:
        calls.append(x.shape)
        assert x.is_contiguous(memory_format=torch.channels_last)
        return original(x, norm)

    monkeypatch.setattr(ops, "fused", lambda x: True)
    monkeypatch.setattr(ops, "group_norm_silu", spy)
    norms = sum(isinstance(one, torch.nn.GroupNorm) for one in module.decoder.modules())
    latents = noise(1, 4, 5, 6)
    fused = vae.decode(module, latents, tiled=False)  # by the op's reference
    assert len(calls) == norms - 1  # all but that of the attention
    monkeypatch.undo()
    assert (fused - vae.decode(module, latents, tiled=False)).abs().mean() <= 1 / 255  # bfloat16's roundings
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = memory._fake(module, None, torch.device("cuda"))
        pixels = vae.in_dtype(fake, "decoder", torch.empty(2, 4, 5, 6, device="cuda"), torch.bfloat16)
    assert pixels.shape == (2, 3, 40, 48) and pixels.device.type == "cuda" and pixels.dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "side", "whole", "strips"),
    [
        ("decoder", 1024, 5.0, 1.9),
        pytest.param("encoder", 1024, 3.0, 1.6, marks=pytest.mark.full),
        pytest.param("decoder", 2048, 5.0, 1.7, marks=pytest.mark.full),
        pytest.param("encoder", 2048, 3.0, 1.4, marks=pytest.mark.full),
    ],
)
def test_strips_take_half_of_the_memory_or_less(part: vae.Part, side: int, whole: float, strips: float) -> None:
    from diffusers import AutoencoderKL

    from fastsd.presets import PRESETS

    with torch.device("meta"):
        module = AutoencoderKL.from_config(PRESETS["sd15"].configs["vae"])
    size = (side, side) if part == "encoder" else (side // 8, side // 8)
    where = torch.bfloat16, torch.device("cpu")
    maps = [memory.alive(module, part, size, *where, striped=one) / (128 * side**2 * 2) for one in (False, True)]
    assert whole <= maps[0] <= whole + 0.2  # in maps of the narrowest level
    assert maps[1] <= strips
