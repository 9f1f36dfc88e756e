"""The table of presets against the classes it configures, the published sizes and the demo; `fastsd models`."""

import inspect
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from test_unet import SD15, SD21_768_V, SDXL_BASE

from fastsd import families
from fastsd.cli.models import COLUMNS, models
from fastsd.presets import PRESETS, Preset, TokenizerFacts, find

MODELS = [name for name in PRESETS if name != "demo"]
WITH_WEIGHTS = [(name, component) for name, preset in PRESETS.items() for component in preset.weights]


def library_class(preset: Preset, component: str) -> Any:
    library, name = preset.index[component]
    return getattr({"diffusers": diffusers, "transformers": transformers}[library], name)


def full_config(preset: Preset, component: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of its class, without what only says which library wrote it."""
    cls = library_class(preset, component)
    if preset.index[component][0] == "transformers":
        full = cls.config_class(**config).to_dict()
    else:
        with torch.device("cpu" if component == "scheduler" else "meta"):
            full = dict(cls.from_config(config).config)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in full.items()
        if key not in ("architectures", "dtype", "transformers_version") and not key.startswith("_")
    }


def test_the_presets_are_those_of_the_contract() -> None:
    names = "demo sd15 sd21 sdxl sdxl-turbo sd3-medium sd35-medium sd35-large flux-schnell flux-dev"
    assert list(PRESETS) == names.split()
    assert all(preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("sdxl", "sdxl"),
        ("sd15@fp16", "sd15"),
        ("stabilityai/sdxl-turbo", "sdxl-turbo"),
        ("black-forest-labs/FLUX.1-dev@main", "flux-dev"),
        ("SDXL", None),
        ("org/name", None),
        ("", None),
        (Path("sdxl"), None),  # a path is a folder, whatever its name
    ],
    ids=str,
)
def test_a_preset_is_found_by_name_or_hub_id(model: Any, name: str | None) -> None:
    assert find(model) is (None if name is None else PRESETS[name])


def test_defaults_are_those_of_the_model_cards() -> None:
    assert PRESETS["sd15"].defaults == {"num_inference_steps": 50, "guidance_scale": 7.5}
    assert PRESETS["flux-schnell"].defaults == {
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "max_sequence_length": 256,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_component_is_described(name: str) -> None:
    preset = PRESETS[name]
    components = {key: value[1] for key, value in preset.index.items() if isinstance(value, list)}
    tokenizers = {key for key in components if key.startswith("tokenizer")}
    assert tokenizers == set(preset.tokenizers)
    assert components.keys() - tokenizers == set(preset.configs)
    assert components.keys() - tokenizers - {"scheduler"} == set(preset.weights)
    for component, config in preset.configs.items():
        assert config.get("_class_name", components[component]) == components[component]
    if "unet" in preset.configs:
        levels = len(preset.configs["vae"]["block_out_channels"])
        assert preset.native == (preset.configs["unet"]["sample_size"] * 2 ** (levels - 1),) * 2
    else:
        assert preset.native == (1024, 1024)  # Flux's configuration has no size, SD3's says the same


@pytest.mark.parametrize(("name", "component"), WITH_WEIGHTS, ids=lambda value: str(value))
def test_configurations_name_only_what_the_class_knows(name: str, component: str) -> None:
    cls = library_class(PRESETS[name], component)
    config = PRESETS[name].configs[component]
    if PRESETS[name].index[component][0] == "transformers":
        known = {*cls.config_class().to_dict(), "feed_forward_proj", "num_decoder_layers"}
    else:
        known = {*inspect.signature(cls.__init__).parameters, "_class_name"}
    assert set(config) <= known


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, str], tuple[int, int]]:
    """Numbers in the files of every component (parameters, buffers), from the library's class on the meta device."""
    counts: dict[str, tuple[int, int]] = {}
    result = {}
    for name, component in WITH_WEIGHTS:
        preset = PRESETS[name]
        cls, config = library_class(preset, component), dict(preset.configs[component])
        key = f"{cls.__name__} {config}"
        if key not in counts:
            with torch.device("meta"):
                is_ours = preset.index[component][0] == "diffusers"
                module = cls.from_config(config) if is_ours else cls(cls.config_class(**config))
            parameters = sum(one.numel() for one in module.parameters())
            names = {one for one, _ in module.named_parameters(remove_duplicate=False)}
            buffers = sum(one.numel() for key, one in module.state_dict().items() if key not in names)
            counts[key] = parameters, buffers
        result[name, component] = counts[key]
    return result


def test_weights_are_those_of_the_libraries_classes(counted: dict[tuple[str, str], tuple[int, int]]) -> None:
    table = {(name, component): tuple(PRESETS[name].weights[component]) for name, component in WITH_WEIGHTS}
    assert table == counted


# Millions of parameters as papers and model cards give them, and sizes in GB (10^9 bytes) of the files on the hub with
# the bytes of a number in them.
PUBLISHED_MILLIONS = {
    ("sd15", "unet"): 859.5,
    ("sd15", "text_encoder"): 123.1,
    ("sd15", "vae"): 83.65,
    ("sd21", "unet"): 865.9,
    ("sd21", "text_encoder"): 340.4,
    ("sdxl", "unet"): 2567,
    ("sdxl", "text_encoder_2"): 694.7,
    ("sd3-medium", "transformer"): 2028,
    ("sd3-medium", "text_encoder_3"): 4762,
    ("sd35-medium", "transformer"): 2243,
    ("sd35-large", "transformer"): 8057,
    ("flux-schnell", "transformer"): 11891,
    ("flux-dev", "transformer"): 11901,
    ("flux-dev", "vae"): 83.82,
}
PUBLISHED_GB = {
    ("sd15", "unet"): (3.44, 4),
    ("sd15", "text_encoder"): (0.492, 4),
    ("sd15", "vae"): (0.335, 4),
    ("sd21", "unet"): (3.46, 4),
    ("sd21", "text_encoder"): (1.36, 4),
    ("sdxl", "unet"): (5.14, 2),
    ("sdxl", "text_encoder_2"): (1.39, 2),
    ("sd3-medium", "transformer"): (4.17, 2),
    ("sd3-medium", "text_encoder_3"): (9.52, 2),
    ("sd35-medium", "transformer"): (4.94, 2),
    ("sd35-large", "transformer"): (16.29, 2),
    ("flux-dev", "transformer"): (23.80, 2),
}


@pytest.mark.parametrize("name", PRESETS)
def test_our_denoisers_have_the_names_and_shapes_of_diffusers(name: str) -> None:
    """At full size, built from the published configuration: so a published checkpoint loads strictly."""
    preset = PRESETS[name]
    component, ours = families.family(preset.index["_class_name"]).DENOISER
    theirs = getattr(diffusers, preset.index[component][1])
    with torch.device("meta"):
        states = [ours(preset.configs[component]), theirs.from_config(dict(preset.configs[component]))]
    names, expected = ({key: value.shape for key, value in module.state_dict().items()} for module in states)
    assert names == expected


def test_sizes_are_the_published_ones() -> None:
    # The published numbers are rounded to three digits or so.
    for (name, component), millions in PUBLISHED_MILLIONS.items():
        assert PRESETS[name].weights[component].parameters / 1e6 == pytest.approx(millions, rel=1e-3)
    for (name, component), (gigabytes, itemsize) in PUBLISHED_GB.items():
        assert PRESETS[name].weights[component].nbytes(itemsize) / 1e9 == pytest.approx(gigabytes, rel=4e-3)
    assert PRESETS["sdxl"].nbytes(2) == 2 * PRESETS["sdxl"].parameters
    assert PRESETS["sd3-medium"].nbytes(4) == 4 * (PRESETS["sd3-medium"].parameters + 192 * 192 * 1536)


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", SD15), ("sd21", SD21_768_V), ("sdxl", SDXL_BASE)], ids=["sd15", "sd21", "sdxl"]
)
def test_unets_are_the_published_ones(name: str, published: dict[str, Any]) -> None:
    preset = PRESETS[name]
    ours = full_config(preset, "unet", dict(preset.configs["unet"]))
    # None and False, and an unused count of heads, are two ways to write the same.
    differences = {
        key for key, value in full_config(preset, "unet", published).items() if (ours[key] or None) != (value or None)
    }
    assert not differences


def test_the_demo_is_the_one_that_ships() -> None:
    preset = PRESETS["demo"]
    folder = Path(str(resources.files("fastsd").joinpath("demo", "checkpoint")))
    index = json.loads((folder / "model_index.json").read_text())
    assert preset.index.items() <= index.items()
    assert index["_fastsd"] == {"num_inference_steps": preset.steps, "guidance_scale": preset.guidance}
    for component, config in preset.configs.items():
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        shipped = json.loads((folder / component / file).read_text())
        assert full_config(preset, component, dict(config)) == full_config(preset, component, shipped), component
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert preset.tokenizers["tokenizer"] == facts(tokenizer)


def facts(tokenizer: Any) -> TokenizerFacts:
    return TokenizerFacts(
        len(tokenizer),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.model_max_length,
    )


# What the published scheduler gives at the default step count: its first and last timestep, rounded, and its rows.
TIMESTEPS = {
    "sd15": (981, 1, 51),  # PLMS repeats its second
    "sd21": (981, 1, 50),
    "sdxl": (981, 1, 50),
    "sdxl-turbo": (999, 999, 1),
    "sd3-medium": (1000, 9, 28),
    "sd35-medium": (1000, 9, 40),
    "sd35-large": (1000, 9, 28),
}


@pytest.mark.parametrize("name", TIMESTEPS)
def test_schedulers_start_where_the_published_ones_do(name: str) -> None:
    preset = PRESETS[name]
    scheduler = library_class(preset, "scheduler").from_config(dict(preset.configs["scheduler"]))
    scheduler.set_timesteps(preset.steps)
    rows = scheduler.timesteps.tolist()
    assert (round(rows[0]), round(rows[-1]), len(rows)) == TIMESTEPS[name]


def test_flux_schedulers_shift_by_size_only_in_dev() -> None:
    schnell, dev = (PRESETS[name].configs["scheduler"] for name in ("flux-schnell", "flux-dev"))
    build = diffusers.FlowMatchEulerDiscreteScheduler.from_config
    scheduler = build(dict(schnell))
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    scheduler = build(dict(dev))
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.15)  # of 1024x1024, the largest
    shifted = 1 / (1 + 2.718281828**-1.15)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, shifted, 0.0], abs=1e-6)  # float32


# ------------------------------------------------------------------------------------------------------------
# fastsd models


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    models(as_json=True)
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)["models"]}
    assert list(listed) == list(PRESETS)
    sdxl = listed["sdxl"]
    assert sdxl["parameters"] == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    }
    assert sdxl["bytes"]["float16"]["unet"] == 2 * 2_567_463_684 and sdxl["bytes"]["float32"]["vae"] == 4 * 83_653_863
    assert (sdxl["width"], sdxl["height"], sdxl["num_inference_steps"], sdxl["guidance_scale"]) == (1024, 1024, 50, 5.0)
    assert sdxl["hub"] == "stabilityai/stable-diffusion-xl-base-1.0" and sdxl["licence"] == "CreativeML Open RAIL++-M"
    assert listed["demo"]["cached"] is True and listed["demo"]["hub"] is None
    assert listed["flux-schnell"]["max_sequence_length"] == 256 and listed["flux-dev"]["max_sequence_length"] == 512


def test_models_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    models()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and len(lines) == 2 + len(PRESETS)  # a heading of two lines, and no row is broken
    headings = " ".join(lines[:2])
    assert all(part.strip("-") in headings for heading in COLUMNS for part in heading.split("\n"))
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[2:]}
    assert rows["sd15"].startswith("860 M 123 M 83.7 M 2.13 4.26 512² 50 7.5 CreativeML Open RAIL-M")
    assert rows["sd35-large"].startswith("8.06 B 124 M + 695 M + 4.76 B 83.8 M 27.6 55.2 1024² 28 3.5")
    assert "FLUX.1 [dev] Non-Commercial" in rows["flux-dev"]


def test_models_imports_no_torch() -> None:
    code = (
        "import sys; from fastsd.cli.models import models; models();"
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


INDEX, UNET, TEXT, VAE = (
    "model_index.json",
    "unet/diffusion_pytorch_model{}.safetensors",
    "text_encoder/model{}.safetensors",
    "vae/diffusion_pytorch_model{}.safetensors",
)
CACHES: dict[str, tuple[list[str], bool]] = {
    "nothing": ([], False),
    "only the index": ([INDEX], False),
    "plain weights": ([INDEX, *(one.format("") for one in (UNET, TEXT, VAE))], True),
    "weights of a variant": ([INDEX, *(one.format(".fp16") for one in (UNET, TEXT, VAE))], True),
    "a mixture": ([INDEX, UNET.format(".fp16"), TEXT.format(""), VAE.format(".fp16")], True),
    "no VAE": ([INDEX, UNET.format(""), TEXT.format("")], False),
    "pickles": ([INDEX, *(one.format("").replace("safetensors", "bin") for one in (UNET, TEXT, VAE))], False),
}


@pytest.mark.parametrize("case", CACHES)
def test_models_says_what_is_cached(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, cached = CACHES[case]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    commit = "0" * 40
    for name in files:
        file = repository / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    if files:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    models(as_json=True)
    listed = {one["name"]: one["cached"] for one in json.loads(capsys.readouterr().out)["models"]}
    assert listed == {name: (cached if name == "sd15" else name == "demo") for name in PRESETS}
