"""The `fastsd` command: what it makes, and one sentence for everything that can be wrong with its input."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastsd
from fastsd.cli import main
from fastsd.image import read_recipe

FAST = ["--steps", "1", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_one_image(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "-m", str(tiny), "-o", "cat.png", "--seed", "7", "--cfg-scale", "3", *FAST]) == 0
    assert Image.open("cat.png").size == (64, 64)
    recipe = read_recipe("cat.png")
    assert (recipe["prompt"], recipe["seed"], recipe["guidance_scale"]) == ("a cat", 7, 3.0)
    assert (
        "Steps: 1, Sampler: DDIMScheduler, CFG scale: 3, Seed: 7, Size: 64x64"
        in Image.open("cat.png").text["parameters"]
    )
    captured = capsys.readouterr()
    last = captured.out.splitlines()[-1]
    assert last.startswith("cat.png: text ") and "denoise" in last and "decode" in last
    assert captured.err == ""


def test_several_prompts_and_images_as_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "a cat",
        "-p",
        "red",
        "-m",
        str(tiny),
        "--num-images",
        "2",
        "--seed",
        "1",
        "--scheduler",
        "euler_a",
    ]
    arguments += ["-W", "72", "-H", "80", "-n", "blue", "--json", *FAST]
    assert main(["generate", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    images = document["images"]
    assert [one["path"] for one in images] == [f"out_{i:04d}.png" for i in range(4)]
    assert [(one["prompt"], one["seed"]) for one in images] == [
        ("a cat", 1),
        ("a cat", 2),
        ("red", 3),
        ("red", 4),
    ]
    assert {(one["scheduler"], one["negative_prompt"]) for one in images} == {("euler_a", "blue")}
    assert {Image.open(one["path"]).size for one in images} == {(72, 80)}
    assert set(document["timings"]) == {
        "text",
        "prepare",
        "denoise",
        "decode",
        "steps",
        "reload",
        "text_cache_hits",
        "compilations",
    }


def test_a_folder_gets_numbers_that_go_on(tiny: Path) -> None:
    Path("images").mkdir()
    for _ in range(2):
        assert main(["generate", "a cat", "-m", str(tiny), "-o", "images", *FAST]) == 0
    assert sorted(path.name for path in Path("images").iterdir()) == ["0000.png", "0001.png"]


def test_overwrite_and_no_metadata(tiny: Path) -> None:
    Path("out.png").write_bytes(b"old")
    assert main(["generate", "a cat", "-m", str(tiny), "--overwrite", "--no-metadata", *FAST]) == 0
    image = Image.open("out.png")
    assert image.size == (64, 64) and not image.text


def test_a_recipe_makes_the_image_again(tiny: Path) -> None:
    assert main(["generate", "a cat", "-m", str(tiny), "-o", "1.png", *FAST]) == 0
    seed = str(read_recipe("1.png")["seed"])
    assert (
        main(
            [
                "generate",
                "a cat",
                "-m",
                str(tiny),
                "-o",
                "2.png",
                "--num-inference-steps",
                *FAST[1:],
                "-s",
                seed,
            ]
        )
        == 0
    )
    assert np.array_equal(np.asarray(Image.open("1.png")), np.asarray(Image.open("2.png")))


def test_a_long_prompt_warns_on_stderr(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "word " * 90 + "lost", "-m", str(tiny), *FAST]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("fastsd: warning: the prompt has") and "lost" in captured.err
    assert main(["generate", "word " * 90, "-m", str(tiny), "--long-prompt", "windows", "-o", "2.png", *FAST]) == 0
    assert capsys.readouterr().err == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastsd.__version__
    for arguments in ([], ["--help"], ["generate", "--help"]):
        assert main(arguments) == 0
        assert "generate" in capsys.readouterr().out


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "-m", "nonsense", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("line one\nline two")

    monkeypatch.setattr(fastsd.Pipeline, "from_pretrained", fail)
    assert main(["generate", "x"]) == 1
    assert capsys.readouterr().err == "fastsd: RuntimeError: line one line two (--debug shows where)\n"


def test_an_interrupt_is_1_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastsd.Pipeline, "_run", interrupt)
    assert main(["generate", "x", "-m", str(tiny)]) == 1
    assert not list(Path().glob("*.png"))


def test_nan_is_1_and_names_the_component(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"][:] = np.nan
    save_file(weights, file)
    assert main(["generate", "x", "-m", str(model), *FAST]) == 1
    assert "the VAE produced NaN or Inf" in capsys.readouterr().err
    assert not Path("out.png").exists()


def test_as_a_process(tiny: Path) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, fastsd.cli; sys.exit(fastsd.cli.main())",
            "generate",
            "x",
            "-m",
            "nope",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("fastsd: the model 'nope' is neither a preset") and run.stderr.count("\n") == 1


# What is wrong with the command line: arguments (with {model} for the tiny checkpoint) and what the sentence says.
REFUSALS: dict[str, tuple[list[str], str]] = {
    "no prompt": (["-m", "{model}"], "no prompt: give one"),
    "unknown verb option": (["x", "--stepz", "3"], "No such option: --stepz"),
    "steps is no number": (["x", "--steps", "many"], "Invalid value for '--steps'"),
    "seed is no number": (["x", "--seed", "1.5"], "Invalid value for '--seed'"),
    "width is no number": (["x", "-W", "wide"], "Invalid value for '--width'"),
    "option without value": (["x", "--scheduler"], "--scheduler"),
    "unknown preset": (["x", "-m", "sdx"], "did you mean sdxl"),
    "unknown model": (["x", "-m", "stable diffusion"], "neither a preset, an existing folder nor a hub id"),
    "empty model": (["x", "-m", ""], "neither a preset"),
    "missing folder": (["x", "-m", "./nowhere"], "there is no folder './nowhere'"),
    "address as model": (["x", "-m", "https://huggingface.co/org/name"], "pass the hub id 'org/name'"),
    "hub id while offline": (["x", "-m", "org/name"], "HF_HUB_OFFLINE is set and 'org/name' is not cached"),
    "two revisions": (["x", "-m", "org/name@v1", "--revision", "v2"], "already names a revision"),
    "revision of a folder": (["x", "-m", "{model}", "--revision", "main"], "has no revision 'main'"),
    "revision of the demo": (
        ["x", "--revision", "main"],
        "the demo checkpoint ships with fastsd and has no revisions",
    ),
    "variant is no name": (["x", "-m", "{model}", "--variant", "../fp16"], "is not a name"),
    "missing variant": (["x", "-m", "{model}", "--variant", "fp16"], "fp16"),
    "unknown backend": (["x", "--backend", "magic"], "the backend 'magic' is unknown: use one of auto, eager, compile"),
    "unknown dtype": (["x", "--dtype", "int3"], "the dtype 'int3' is unknown: use 'auto', 'float32'"),
    "unknown device": (["x", "--device", "abacus"], "the device 'abacus' is unknown: use 'auto', 'cpu'"),
    "unsupported device": (["x", "--device", "meta"], "the device 'meta' is not supported"),
    "no such GPU": (["x", "--device", "cuda:99"], "the device 'cuda:99'"),
    "height 65": (["x", "-m", "{model}", "-H", "65"], "height 65 is no multiple of 8: the nearest is 64"),
    "width 101": (["x", "-m", "{model}", "-W", "101"], "width 101 is no multiple of 8: the nearest is 104"),
    "width 1": (["x", "-m", "{model}", "-W", "1"], "width must be a whole number from 8 to 8192, not 1"),
    "width 0": (["x", "-m", "{model}", "-W", "0"], "width must be"),
    "height negative": (["x", "-m", "{model}", "-H", "-64"], "height must be"),
    "height vast": (["x", "-m", "{model}", "-H", "80000"], "height must be a whole number from 8 to 8192"),
    "steps 0": (
        ["x", "-m", "{model}", "--steps", "0"],
        "num_inference_steps must be a whole number from 1 to 1000",
    ),
    "steps negative": (["x", "-m", "{model}", "--steps", "-5"], "num_inference_steps must be"),
    "steps above training": (["x", "-m", "{model}", "--steps", "1001"], "from 1 to 1000, not 1001"),
    "lcm steps": (["x", "-m", "{model}", "--steps", "51", "--scheduler", "lcm"], "50"),
    "guidance negative": (
        ["x", "-m", "{model}", "--cfg-scale", "-1"],
        "guidance_scale must be finite and at least 0",
    ),
    "guidance nan": (["x", "-m", "{model}", "--guidance-scale", "nan"], "guidance_scale must be finite"),
    "guidance inf": (["x", "-m", "{model}", "--guidance-scale", "inf"], "guidance_scale must be finite"),
    "guidance rescale 2": (
        ["x", "-m", "{model}", "--guidance-rescale", "2"],
        "guidance_rescale must be from 0 to 1",
    ),
    "guidance rescale nan": (["x", "-m", "{model}", "--guidance-rescale", "nan"], "guidance_rescale must be"),
    "eta 3": (["x", "-m", "{model}", "--eta", "3"], "eta must be from 0 to 1"),
    "eta without use": (["x", "-m", "{model}", "--eta", "0.5", "--scheduler", "euler"], "has no eta"),
    "clip skip": (["x", "-m", "{model}", "--clip-skip", "9"], "clip_skip must be a whole number from 0 to 2"),
    "seed negative": (
        ["x", "-m", "{model}", "--seed", "-1"],
        "the seed must be a whole number from 0 to 2**63 - 1",
    ),
    "seed 2**63": (["x", "-m", "{model}", "--seed", str(2**63)], "the seed must be"),
    "seed without room": (
        ["x", "-m", "{model}", "-s", str(2**63 - 1), "--num-images", "2"],
        "leaves no room",
    ),
    "no images": (["x", "--num-images", "0"], "--num-images must be 1 or more"),
    "too many images": (["x", "-m", "{model}", "--num-images", "5000"], "num_images_per_prompt must be"),
    "too many in all": (
        ["x", "y", "-m", "{model}", "--num-images", "1000"],
        "2000 images are more than one call makes",
    ),
    "unknown scheduler": (["x", "-m", "{model}", "--scheduler", "dpmpp2m"], "dpmpp_2m"),
    "scheduler by another name": (
        ["x", "-m", "{model}", "--scheduler", "EulerScheduler"],
        "EulerDiscreteScheduler",
    ),
    "flow scheduler": (["x", "-m", "{model}", "--scheduler", "flow_euler"], "euler"),
    "long prompt mode": (["x", "-m", "{model}", "--long-prompt", "fold"], "use 'cut' or 'windows'"),
    "NUL in the prompt": (["a\0b", "-m", "{model}"], "prompt holds a NUL character at position 1"),
    "surrogate in the prompt": (["a\ud800", "-m", "{model}"], "prompt holds a lone surrogate at position 1"),
    "NUL in the negative": (["a", "-n", "\0", "-m", "{model}"], "negative_prompt holds a NUL character"),
    "surrogate in the negative": (
        ["a", "-n", "\udfff", "-m", "{model}"],
        "negative_prompt holds a lone surrogate",
    ),
    "weights by another name": (["x", "-m", "sd15", "--weights", "ones"], "use 'checkpoint' or 'random'"),
    "random weights of a folder": (["x", "-m", "{model}", "--weights", "random"], "weights='random' needs a preset"),
    "random weights of a file": (["x", "-m", "a.safetensors", "--weights", "random"], "'a.safetensors' is a file"),
    "variant of a file": (["x", "-m", "a.safetensors", "--variant", "fp16"], "'a.safetensors' is a file"),
    "missing file": (["x", "-m", "a.safetensors"], "'a.safetensors' does not exist"),
    "config of a folder": (["x", "-m", "{model}", "--config", "{model}"], "--config is for a .safetensors file"),
    "T5 tokens without T5": (["x", "-m", "{model}", "--max-sequence-length", "64"], "takes no max_sequence_length"),
    "true guidance without Flux": (["x", "-m", "{model}", "--true-cfg-scale", "2"], "takes no true_cfg_scale"),
    "missing lora": (["x", "-m", "{model}", "--lora", "none.safetensors"], "none.safetensors"),
    "lora weight": (["x", "-m", "{model}", "--lora", "none.safetensors:nan"], "nan"),
    "lora pickle": (["x", "-m", "{model}", "--lora", "style.bin"], "style.bin"),
    "output exists": (
        ["x", "-o", "taken.png"],
        "'taken.png' exists already: choose another name or allow --overwrite",
    ),
    "one of several exists": (["x", "y", "-o", "many.png"], "'many_0001.png' exists already"),
    "output folder missing": (["x", "-o", "no/where.png"], "the output folder 'no' does not exist"),
    "output parent is a file": (
        ["x", "-o", "taken.png/out.png"],
        "the output folder 'taken.png' is not a folder",
    ),
    "output suffix": (["x", "-o", "out.jpg"], "is not a .png"),
    "output without suffix": (["x", "-o", "out"], "is not a .png"),
    "output empty": (["x", "-o", ""], "the output '' is no file name"),
    "output with NUL": (["x", "-o", "a\0.png"], "is no file name"),
    "output folder to be": (["x", "-o", "new/"], "does not exist"),
    "output name too long": (["x", "-o", "n" * 300 + ".png"], "cannot write"),
}


def refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsd: ") and captured.err.count("\n") == 1
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments(case: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken.png").write_bytes(b"old")
    Path("many_0001.png").write_bytes(b"old")
    arguments, says = REFUSALS[case]
    refused([one.replace("{model}", str(tiny)) for one in arguments], says, capsys)
    assert Path("taken.png").read_bytes() == b"old"


def test_an_unwritable_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    refused(["x", "-o", "out.png"], "is not writable", capsys)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lie_about_the_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 10**9) + file.read_bytes()[8:])


def only_a_pickle(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def drop_a_weight(file: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(file)
    weights.pop("conv_in.weight")
    save_file(weights, file)


def widen_a_weight(file: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(file)
    weights["conv_in.weight"] = np.zeros((16, 9, 3, 3), np.float32)
    save_file(weights, file)


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


UNET = "unet/diffusion_pytorch_model.safetensors"
# What is wrong with the checkpoint: how to break it and what the sentence says.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda m: (m / "model_index.json").unlink(), "model_index.json"),
    "index is no JSON": (lambda m: (m / "model_index.json").write_text("{"), "model_index.json"),
    "index is a list": (lambda m: (m / "model_index.json").write_text("[]"), "model_index.json"),
    "index without class": (lambda m: (m / "model_index.json").write_text("{}"), "_class_name"),
    "another family": (lambda m: edit(m / "model_index.json", _class_name="WanPipeline"), "is a WanPipeline"),
    "no unet folder": (lambda m: shutil.rmtree(m / "unet"), "unet"),
    "no vae folder": (lambda m: shutil.rmtree(m / "vae"), "vae"),
    "no text encoder": (lambda m: shutil.rmtree(m / "text_encoder"), "text_encoder"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),
    "no merges": (lambda m: (m / "tokenizer/merges.txt").unlink(), "merges.txt"),
    "vocabulary is no JSON": (lambda m: (m / "tokenizer/vocab.json").write_text("{"), "is no CLIP tokenizer"),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "scheduler"),
    "unknown scheduler class": (
        lambda m: edit(m / "scheduler/scheduler_config.json", _class_name="MagicScheduler"),
        "MagicScheduler",
    ),
    "scheduler clips": (
        lambda m: edit(m / "scheduler/scheduler_config.json", clip_sample=True),
        "clip_sample",
    ),
    "scheduler thresholds": (
        lambda m: edit(m / "scheduler/scheduler_config.json", thresholding=True),
        "thresholding",
    ),
    "no unet config": (lambda m: (m / "unet/config.json").unlink(), "config.json"),
    "unet config is no JSON": (lambda m: (m / "unet/config.json").write_text("nope"), "config.json"),
    "unet of another kind": (lambda m: edit(m / "unet/config.json", act_fn="relu"), "act_fn = 'relu'"),
    "no weights": (lambda m: (m / UNET).unlink(), "unet"),
    "pickle weights": (lambda m: only_a_pickle(m / "unet"), "safetensors"),
    "truncated weights": (lambda m: truncate(m / UNET), "bytes"),
    "empty weights": (lambda m: (m / UNET).write_bytes(b""), "bytes"),
    "header lies": (lambda m: lie_about_the_header(m / UNET), UNET),
    "weights are text": (lambda m: (m / UNET).write_text("not weights at all"), UNET),
    "a weight is missing": (lambda m: drop_a_weight(m / UNET), "conv_in.weight"),
    "a weight has another shape": (lambda m: widen_a_weight(m / UNET), "conv_in.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breakage, says = BROKEN[case]
    breakage(model)
    refused(["x", "-m", "model", *FAST], says, capsys)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".safetensors"])
def test_a_single_file(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(f"model{suffix}").write_bytes(b"\0" * 100)
    says = "header of" if suffix == ".safetensors" else "save_pretrained"
    refused(["x", "-m", f"model{suffix}"], says, capsys)


def test_there_are_at_least_sixty() -> None:
    assert len(REFUSALS) + len(BROKEN) >= 60


def test_the_hub_out_of_reach() -> None:
    code = "import sys, fastsd.cli; sys.exit(fastsd.cli.main(['generate', 'x', '-m', 'org/name']))"
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": "cache",
        "PATH": "/usr/bin:/bin",
    }
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "'org/name' is not cached" in run.stderr and "HF_HUB_OFFLINE=1" in run.stderr
