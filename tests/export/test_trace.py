"""Wrapped components against the functions of the straight line that they stand for."""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastsd import text, vae
from fastsd.errors import InputError
from fastsd.families import Components
from fastsd.text import Conditioning
from fastsd_export import trace

LCM = {"unet": {"time_cond_proj_dim": 6}}
DUAL = {"transformer": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}
UNGUIDED = {"transformer": {"guidance_embeds": False}}
DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("sd", {}),
    "lcm": ("sd", LCM),
    "sdxl": ("sdxl", {}),
    "sd3": ("sd3", {}),
    "sd35": ("sd3", DUAL),
    "flux": ("flux", {}),
    "schnell": ("flux", UNGUIDED),
}
Loaded = Callable[..., tuple[ModuleType, Components]]
Make = Callable[..., trace.Traced]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
alone = {"tokenizers": (), "text_encoders": (), "vae": None, "scheduler": {}, "index": {}}


def run(traced: trace.Traced, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        outputs: tuple[torch.Tensor, ...] = traced.module(**(traced.inputs | inputs))
    assert len(outputs) == len(traced.outputs)
    return outputs


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_text_encoders_say_what_read_says_for_every_clip_skip(loaded: Loaded, traced: Make, family: str) -> None:
    module, components = loaded(family)
    for encoder, text_encoder, tokenizer in zip(
        module.ENCODERS, components.text_encoders, components.tokenizers, strict=True
    ):
        one = traced(family, encoder.name)
        length = one.inputs["ids"].shape[1]
        ids = text.windows(tokenizer, "a red cat on the hill", length, "cut")
        states, *pooled = run(one, ids=torch.tensor(ids))
        skips = "clip_skip" in module.ARGUMENTS and encoder.is_clip
        assert len(states) == (text_encoder.config.num_hidden_layers + encoder.layer + 1 if skips else 1)
        for skip in range(len(states)):
            want = text.read(encoder, text_encoder, ids, skip if encoder.is_clip else None)
            assert torch.equal(states[skip : skip + 1], want.states)
            assert [one.tolist() for one in pooled] == ([] if want.pooled is None else [want.pooled.tolist()])
        assert torch.equal(states[:1], text.read(encoder, text_encoder, ids).states)  # without clip_skip


@pytest.mark.parametrize("case", DENOISERS)
def test_prepare_and_step_are_the_denoisers_own_with_nothing_else_loaded(loaded: Loaded, case: str) -> None:
    family, options = DENOISERS[case]
    module, components = loaded(family, **options)
    only = replace(components, **alone)
    before, step = trace.prepare(module, only, 20), trace.denoiser(module, only, 20)
    given = SimpleNamespace(**{"pooled": None, "time_ids": None, "guidance_scale": None} | before.inputs)
    conditioning = Conditioning(given.hidden_states, given.pooled, given.guidance_scale, given.time_ids)
    size = tuple(before.inputs["latents"].shape[2:]) if "latents" in before.inputs else (17, 19)
    with torch.no_grad():
        want = module.prepare(components, given.timesteps, conditioning, size)
    got = run(before)
    assert len(want[0]) == 64
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))

    constants = dict(zip(before.outputs, got, strict=True)) | {"modulation": got[0][3]}
    assert {name: tensor.shape for name, tensor in constants.items()} == {
        name: tensor.shape for name, tensor in step.inputs.items() if name != "latents"
    }
    with torch.no_grad():
        prediction = components.denoiser(step.inputs["latents"], *constants.values())
    assert torch.equal(run(step, **constants)[0], prediction)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_vae_is_that_of_the_straight_line(loaded: Loaded, family: str) -> None:
    _, components = loaded(family)
    decoder, encoder = trace.vae_decoder(components.vae), trace.vae_encoder(components.vae)
    # The straight line runs it channels last, where convolutions sum in another order: 1e-6 was seen.
    torch.testing.assert_close(run(decoder)[0], vae.decode(components.vae, decoder.inputs["latents"]), **CLOSE)
    torch.testing.assert_close(run(encoder)[0], vae.encode(components.vae, encoder.inputs["pixels"]), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["sd", "sd3", "flux"])
def test_in_a_lower_dtype_inputs_and_prediction_stay_float32(loaded: Loaded, case: str, dtype: torch.dtype) -> None:
    module, components = loaded(case)
    step = trace.denoiser(module, components, 20)
    inputs = {name: tensor.to(dtype) if name in step.low else tensor for name, tensor in step.inputs.items()}
    lower = copy.deepcopy(step.module).to(dtype)
    with torch.no_grad():
        [prediction] = lower(**inputs)
        [exact] = step.module(**step.inputs)
    assert inputs["latents"].dtype == prediction.dtype == torch.float32
    assert {inputs[name].dtype for name in step.low} == {dtype} and {*step.inputs} - {*step.low} == (
        {"latents", "position"} if case == "flux" else {"latents"}
    )
    close = 0.1 if dtype == torch.bfloat16 else 0.01  # 8 and 11 bits, over a dozen layers
    assert ((prediction - exact).abs().max() / exact.abs().max()) < close


def test_skeleton_has_no_data_and_leaves_the_module_as_it_is(loaded: Loaded, traced: Make) -> None:
    step = traced("sd3", "denoiser")
    before = {name: tensor.clone() for name, tensor in step.module.state_dict().items()}
    bare = trace.skeleton(step.module, torch.float16)
    state = bare.state_dict()
    assert state.keys() == before.keys()
    assert all(isinstance(tensor, FakeTensor) and tensor.dtype == torch.float16 for tensor in state.values())
    after = step.module.state_dict()
    assert all(not isinstance(after[name], FakeTensor) and torch.equal(after[name], before[name]) for name in before)


def test_float16_keeps_in_float32_what_transformers_keeps(traced: Make) -> None:
    t5 = traced("flux", "text_encoder_2")
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        state = trace.skeleton(t5.module, dtype).state_dict()
        assert {name: one.dtype for name, one in state.items()} == {
            name: kept if name.endswith(".wo.weight") else dtype for name in state
        }


def test_flux_has_positions_for_8192_pixels(loaded: Loaded) -> None:
    _, components = loaded("flux")
    given = torch.ones(1, 2), torch.ones(2, 3, 32), torch.ones(2, 24)
    for height, width in ((1026, 2), (2, 1026), (3, 2)):
        with pytest.raises(InputError, match=f"{height} x {width}; both must be positive multiples of 2 up to 1024"):
            components.denoiser.prepare(*given, height=height, width=width, guidance_scale=torch.ones(2))
    table = components.denoiser.prepare(*given, height=1024, width=2, guidance_scale=torch.ones(2)).position
    assert table.shape == (2, 3 + 512, 8)


@pytest.mark.parametrize(
    ("dim", "size", "parts"),
    [
        ("batch", 2, {"batch"}),
        ("8*height", 48, {"height"}),
        ("height*width//4", 15, {"height", "width"}),
        ("tokens+height*width//4", 26, {"tokens", "height", "width"}),
    ],
)
def test_extent_of_an_axis(dim: str, size: int, parts: set[str]) -> None:
    assert trace.extent(dim, {"batch": 2, "height": 6, "width": 10, "tokens": 11}) == size
    assert trace.names(dim) == parts


@pytest.mark.parametrize("case", DENOISERS)
def test_examples_have_the_shapes_that_their_dims_say(loaded: Loaded, case: str) -> None:
    family, options = DENOISERS[case]
    module, components = loaded(family, **options)
    for make in (trace.prepare, trace.denoiser):
        one = make(module, components, 20)
        assert trace.shapes(one, one.sizes) == {name: list(tensor.shape) for name, tensor in one.inputs.items()}
        for name, output in zip(one.outputs, run(one), strict=True):
            for axis, dim in one.dims[name].items():
                assert output.shape[axis] == trace.extent(dim, one.sizes)
