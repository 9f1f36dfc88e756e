"""Image files: pixels as diffusers rounds them, recipes that survive, and files that are whole or absent."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from refusals import refusal

import fastsd
from fastsd.errors import InputError, NumericError
from fastsd.image import Recipe, check_output, output_paths, read_recipe, save_png, to_pil


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "prompt": "a red circle",
        "num_inference_steps": 20,
        "scheduler": "dpmpp_2m_karras",
        "guidance_scale": 7.0,
        "seed": 42,
        "width": 16,
        "height": 8,
        "model": "demo",
    }
    return Recipe(**(values | changes))


def picture(width: int = 16, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 9, 13, 3), (3, 8, 16, 3)], ids=str)
@pytest.mark.parametrize("kind", ["float32", "float64", "torch", "bfloat16", "float16", "numpy-float16"])
def test_to_pil_rounds_as_diffusers(shape: tuple[int, ...], kind: str) -> None:
    values = np.random.default_rng(1).random(shape)
    values.flat[:3] = 0, 1, 0.5 / 255  # the ends, and a tie
    tensor = torch.from_numpy(values)
    pixels: Any = {
        "float32": values.astype(np.float32),
        "float64": values,
        "torch": tensor.float().requires_grad_(),
        "bfloat16": tensor.bfloat16(),
        "float16": tensor.half(),
        "numpy-float16": values.astype(np.float16),
    }[kind]
    # Oracle: diffusers, which turns tensors into float32 before.
    plain = pixels.detach().float().numpy() if isinstance(pixels, torch.Tensor) else pixels
    plain = plain.astype(np.float32) if plain.dtype == np.float16 else plain
    expected = VaeImageProcessor.numpy_to_pil(plain)
    images = to_pil(pixels)
    assert len(images) == shape[0]
    for ours, theirs in zip(images, expected, strict=True):
        assert ours.mode == "RGB"
        assert ours.size == (shape[2], shape[1])
        assert ours.tobytes() == theirs.tobytes()


def test_to_pil_all_levels_and_clipping() -> None:
    levels = np.arange(256, dtype=np.float32) / 255
    image = to_pil(np.repeat(levels[None, None, :, None], 3, axis=3))[0]
    assert np.array_equal(np.asarray(image)[0, :, 0], np.arange(256))
    beyond = np.array([-1e-3, -9.0, 1.001, 9.0], np.float32)
    image = to_pil(np.repeat(beyond[None, None, :, None], 3, axis=3))[0]
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 3, 8, 8), np.float32),
        np.zeros((1, 8, 8, 4), np.float32),
        np.zeros((0, 8, 8, 3), np.float32),
        np.zeros((1, 0, 8, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.uint8),
    ],
    ids=["no-batch", "channels-first", "alpha", "no-image", "no-rows", "integers"],
)
def test_to_pil_refuses(pixels: np.ndarray[Any, Any]) -> None:
    assert f"shape {list(pixels.shape)}" in refusal(lambda: to_pil(pixels))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_to_pil_never_hides_a_broken_image(value: float) -> None:
    pixels = np.zeros((2, 4, 4, 3), np.float32)
    pixels[1, 2, 3, 0] = value
    with pytest.raises(NumericError, match="VAE"):
        to_pil(pixels)


# ------------------------------------------------------------------------------------------------------------
# Recipes


def parse_infotext(text: str) -> dict[str, str]:
    """The reading rule of AUTOMATIC1111's `parse_generation_parameters` (modules/infotext_utils.py)."""
    *lines, last = text.strip().split("\n")
    settings = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(settings) >= 3
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            target = negative
            line = line[16:].strip()
        target.append(line)
    found = {key: json.loads(value) if value.startswith('"') else value for key, value in settings}
    return found | {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}


INFOTEXTS: dict[str, tuple[Recipe, str]] = {
    "plain": (
        recipe(),
        "a red circle\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, "
        f"Size: 16x8, Model: demo, Version: fastsd {fastsd.__version__}",
    ),
    "negative prompt": (
        recipe(negative_prompt="blue", guidance_scale=7.25, scheduler="euler_a"),
        "a red circle\nNegative prompt: blue\nSteps: 20, Sampler: Euler a, Schedule type: Uniform, "
        f"CFG scale: 7.25, Seed: 42, Size: 16x8, Model: demo, Version: fastsd {fastsd.__version__}",
    ),
    "several lines": (
        recipe(prompt="a red circle\non a blue\nbackground", negative_prompt="a\nb"),
        "a red circle\non a blue\nbackground\nNegative prompt: a\nb\nSteps: 20, Sampler: DPM++ 2M, "
        "Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 16x8, Model: demo, "
        f"Version: fastsd {fastsd.__version__}",
    ),
    "scheduler class, no seed, odd model": (
        recipe(scheduler="EulerDiscreteScheduler", seed=None, model="C:\\sd, v1", version="9"),
        "a red circle\nSteps: 20, Sampler: EulerDiscreteScheduler, CFG scale: 7, Size: 16x8, "
        'Model: "C:\\\\sd, v1", Version: fastsd 9',
    ),
}


@pytest.mark.parametrize("case", INFOTEXTS)
def test_parameters_in_the_layout_that_other_tools_read(case: str, tmp_path: Path) -> None:
    made, expected = INFOTEXTS[case]
    save_png(picture(), tmp_path / "a.png", made)
    with Image.open(tmp_path / "a.png") as image:
        text = image.info["parameters"]
    assert text == expected
    parsed = parse_infotext(text)
    assert parsed["Prompt"] == made.prompt
    assert parsed["Negative prompt"] == (made.negative_prompt or "")
    assert parsed["Steps"] == str(made.num_inference_steps)
    assert parsed["Size"] == f"{made.width}x{made.height}"
    assert parsed["Model"] == made.model
    assert float(parsed["CFG scale"]) == made.guidance_scale


def test_every_scheduler_name_has_a_name_there() -> None:
    names = (
        "ddim ddpm pndm lms heun euler euler_a dpmpp_2m dpmpp_2m_karras dpmpp_2m_sde dpmpp_sde dpm2 dpm2_a "
        "deis unipc lcm tcd flow_euler flow_heun flow_dpmpp_2m flow_unipc"
    )
    for name in names.split():
        assert "Schedule type: " in recipe(scheduler=name).parameters()


def test_picture_and_texts_round_trip(tmp_path: Path) -> None:
    made = recipe(prompt="größe ☃ 😀", extra={"eta": 0.1, "sizes": [1, 2], "clip_skip": None})
    image = picture()
    save_png(image, tmp_path / "a.png", made)
    with Image.open(tmp_path / "a.png") as read:
        assert read.format == "PNG"
        assert read.tobytes() == image.tobytes()
        assert isinstance(read.info["parameters"], PngImagePlugin.iTXt)  # beyond Latin-1
        assert read.info["fastsd"].isascii()
    values = read_recipe(tmp_path / "a.png")
    assert values == json.loads(made.to_json())
    assert Recipe(**values) == made
    content = (tmp_path / "a.png").read_bytes()
    assert content.index(b"fastsd") < content.index(b"IDAT")  # readable without the pixels


def test_latin_1_stays_plain_text(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "a.png", recipe(prompt="größe"))
    assert b"tEXtparameters\0gr\xf6\xdfe\nSteps: 20" in (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(("metadata", "made"), [(False, recipe()), (True, None)], ids=["off", "no-recipe"])
def test_without_metadata(metadata: bool, made: Recipe | None, tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "a.png", made, metadata=metadata)
    with Image.open(tmp_path / "a.png") as image:
        assert not image.info
    assert "carries no fastsd recipe" in refusal(lambda: read_recipe(tmp_path / "a.png"))


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


@given(
    prompt=TEXT,
    negative=st.none() | TEXT,
    model=TEXT,
    seed=st.integers(0, 2**64 - 1),
    scale=st.floats(0, 1e6),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_round_trips(
    prompt: str, negative: str | None, model: str, seed: int, scale: float, tmp_path: Path
) -> None:
    made = recipe(prompt=prompt, negative_prompt=negative, model=model, seed=seed, guidance_scale=scale)
    path = tmp_path / "a.png"
    save_png(picture(2, 2), path, made, overwrite=True)
    assert Recipe(**read_recipe(path)) == made
    with Image.open(path) as image:
        assert image.info["parameters"] == made.parameters()
    assert made.parameters().startswith(prompt)


def test_a_long_prompt_and_a_large_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(prompt="a red circle, ☃ " * 100_000)
    # The limit against decompression bombs is for reading pixels: neither writing nor the recipe meet it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_png(picture(64, 64), tmp_path / "a.png", made)
    assert read_recipe(tmp_path / "a.png")["prompt"] == made.prompt


RECIPE_REFUSALS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda d: read_recipe(d / "none.png"), ["cannot read", "none.png", "No such file"]),
    "folder": (lambda d: read_recipe(d), ["cannot read", "Is a directory"]),
    "NUL": (lambda d: read_recipe("a\0.png"), ["is no file name"]),
    "no image": (lambda d: read_recipe(d / "text.png"), ["is no PNG file"]),
    "a JPEG": (lambda d: read_recipe(d / "photo.jpg"), ["is no PNG file"]),
    "empty": (lambda d: read_recipe(d / "empty.png"), ["is no PNG file"]),
    "cut in the header": (lambda d: read_recipe(d / "cut.png"), ["is no PNG file, or a broken one"]),
    "another program's": (lambda d: read_recipe(d / "other.png"), ["carries no fastsd recipe"]),
    "broken recipe": (lambda d: read_recipe(d / "broken.png"), ["carries no fastsd recipe"]),
    "recipe of a list": (lambda d: read_recipe(d / "list.png"), ["carries no fastsd recipe"]),
    "surrogates": (
        lambda d: save_png(picture(), d / "new.png", recipe(prompt="a\ud800")),
        ["lone surrogates", "valid Unicode"],
    ),
}


@pytest.mark.parametrize("case", RECIPE_REFUSALS)
def test_recipe_refusals(case: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("a red circle")
    (tmp_path / "empty.png").touch()
    picture().save(tmp_path / "photo.jpg")
    picture().save(tmp_path / "other.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "other.png").read_bytes()[:20])
    for name, text in (("broken", "{"), ("list", "[]")):
        info = PngImagePlugin.PngInfo()
        info.add_text("fastsd", text)
        picture().save(tmp_path / f"{name}.png", pnginfo=info)
    call, parts = RECIPE_REFUSALS[case]
    message = refusal(lambda: call(tmp_path))
    for part in parts:
        assert part in message
    assert not (tmp_path / "new.png").exists()


@given(cut=st.integers(0, 400), edits=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=3))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_images_never_escape_as_other_errors(cut: int, edits: list[tuple[int, int]], tmp_path: Path) -> None:
    save_png(picture(2, 2), tmp_path / "a.png", recipe(), overwrite=True)
    content = bytearray((tmp_path / "a.png").read_bytes())
    for place, value in edits:
        content[place] = value
    (tmp_path / "b.png").write_bytes(content[:cut])
    try:
        assert isinstance(read_recipe(tmp_path / "b.png"), dict)
    except InputError as error:
        assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------------------------
# Files


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith(".fastsd"))


OUTPUT_REFUSALS: dict[str, tuple[Callable[[Path], str | Path], list[str]]] = {
    "empty": (lambda d: "", ["''", "is no file name", "image.png"]),
    "NUL": (lambda d: f"{d}/a\0.png", ["is no file name"]),
    "newline in a wrong suffix": (lambda d: f"{d}/a\n.txt", [r"a\n.txt", "not a .png"]),
    "folder": (lambda d: d, ["is a folder", "image.png"]),
    "folder named as an image": (lambda d: d / "folder.png", ["is a folder", "folder.png/image.png"]),
    "slash at the end": (lambda d: f"{d}/new/", ["is a folder"]),
    "no suffix": (lambda d: d / "out", ["is not a .png", "out.png"]),
    "hidden file": (lambda d: d / ".png", ["is not a .png"]),
    "jpg": (lambda d: d / "out.jpg", ["is not a .png, the only format written", "out.png"]),
    "webp": (lambda d: d / "out.webp", ["is not a .png", "out.png"]),
    "two suffixes": (lambda d: d / "out.png.txt", ["is not a .png"]),
    "no parent": (lambda d: d / "none" / "a.png", ["folder", "none' does not exist"]),
    "parent is a file": (lambda d: d / "old.png" / "a.png", ["old.png' is not a folder"]),
    "parent is a broken link": (lambda d: d / "link" / "a.png", ["link' is not a folder"]),
    "exists": (lambda d: d / "old.png", ["old.png' exists already", "--overwrite"]),
    "exists, upper case": (lambda d: d / "OLD.PNG", ["exists already"]),
    "broken link": (lambda d: d / "link.png", ["exists already"]),
    "too long": (lambda d: d / ("a" * 300 + ".png"), ["cannot write", "File name too long"]),
    "link loop": (lambda d: d / "loop" / "a.png", ["loop' is not a folder"]),
}


def furnish(folder: Path) -> None:
    (folder / "old.png").write_bytes(b"old")
    (folder / "OLD.PNG").write_bytes(b"old")
    (folder / "folder.png").mkdir()
    (folder / "link").symlink_to("gone")
    (folder / "link.png").symlink_to("gone")
    (folder / "loop").symlink_to("loop")


@pytest.mark.parametrize("case", OUTPUT_REFUSALS)
def test_output_refusals(case: str, tmp_path: Path) -> None:
    """Refused before any work by check_output, and again by save_png; nothing is written."""
    furnish(tmp_path)
    before = sorted(os.listdir(tmp_path))
    name, parts = OUTPUT_REFUSALS[case]
    for call in (check_output, lambda path: save_png(picture(), path, recipe())):
        message = refusal(lambda call=call: call(name(tmp_path)))  # type: ignore[misc]
        for part in parts:
            assert part in message
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_special_files_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is no plain file" in refusal(lambda: check_output(tmp_path / "pipe.png", overwrite=True))


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so the answer of the system is given here.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in refusal(lambda: check_output(tmp_path / "a.png"))


def test_check_output_says_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert check_output("new.png") == Path("new.png")
    assert check_output(tmp_path / "new.PNG") == tmp_path / "new.PNG"
    assert check_output("old.png", overwrite=True) == Path("old.png")
    assert check_output("link.png", overwrite=True) == Path("link.png")
    assert sorted(tmp_path.glob("new*")) == []


def test_overwrite_replaces_the_file_whole(tmp_path: Path) -> None:
    furnish(tmp_path)
    for name in ("old.png", "link.png"):
        save_png(picture(), tmp_path / name, recipe(), overwrite=True)
        assert read_recipe(tmp_path / name)["seed"] == 42
    assert not (tmp_path / "gone").exists()  # a link is replaced, its target is not touched
    assert leftovers(tmp_path) == []


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_png(picture(), tmp_path / "a.png", recipe())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_file_that_appears_meanwhile_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    image = picture()
    save = image.save

    def late(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        path.write_bytes(b"mine")

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(image, "save", late)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    assert "exists already" in refusal(lambda: save_png(image, path, recipe()))
    assert path.read_bytes() == b"mine"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("code", NO_LINKS, ids=errno.errorcode.get)
def test_file_systems_without_hard_links(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_link)
    save_png(picture(), tmp_path / "a.png", recipe())
    assert read_recipe(tmp_path / "a.png")["seed"] == 42
    assert os.listdir(tmp_path) == ["a.png"]


FAILURES: dict[str, tuple[str, OSError]] = {
    "disk full": ("fsync", OSError(errno.ENOSPC, "No space left on device")),
    "read-only": ("open", OSError(errno.EROFS, "Read-only file system")),
    "link refused": ("link", OSError(errno.EIO, "Input/output error")),
    "rename refused": ("replace", OSError(errno.EIO, "Input/output error")),
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("case", FAILURES)
def test_failures_leave_nothing_behind(
    case: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, failure = FAILURES[case]
    if (name, overwrite) in (("link", True), ("replace", False)):
        name = "fsync"  # the call that both ways make

    def fail(*_: object, **__: object) -> None:
        raise failure

    path = tmp_path / "a.png"
    if overwrite:
        path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        message = refusal(lambda: save_png(picture(), path, recipe(), overwrite=overwrite))
    assert failure.strerror in message
    assert os.listdir(tmp_path) == (["a.png"] if overwrite else [])
    if overwrite:
        assert path.read_bytes() == b"old"


def test_a_failed_rename_frees_the_reserved_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    assert "Operation not permitted" in refusal(lambda: save_png(picture(), tmp_path / "a.png", recipe()))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_interruptions_leave_nothing_behind(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture()

    def interrupted(file: Any, **_: object) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(image, "save", interrupted)
    with pytest.raises(error):
        save_png(image, tmp_path / "a.png", recipe())
    assert os.listdir(tmp_path) == []


def test_the_file_is_flushed_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "link", lambda *paths: (events.append("link"), link(*paths))[1])
    save_png(picture(), tmp_path / "a.png", recipe())
    assert events == ["fsync", "link", "fsync"]  # the data, the name, the folder


PATTERNS: dict[str, tuple[str, int, list[str]]] = {
    "one": ("out.png", 1, ["out.png"]),
    "several": ("out.png", 3, ["out_0000.png", "out_0001.png", "out_0002.png"]),
    "in a folder": ("full/out.png", 2, ["full/out_0000.png", "full/out_0001.png"]),
    "dots": ("a.b.png", 2, ["a.b_0000.png", "a.b_0001.png"]),
    "no suffix": ("out", 2, ["out_0000", "out_0001"]),
    "empty folder": ("empty", 2, ["empty/0000.png", "empty/0001.png"]),
    "empty folder, slash": ("empty/", 1, ["empty/0000.png"]),
    "folder goes on": ("full", 2, ["full/0008.png", "full/0009.png"]),
    "folder beyond four digits": ("large", 2, ["large/9999.png", "large/10000.png"]),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_output_paths(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "empty",
        "full/0003.png",
        "full/0007.png",
        "full/99.png",
        "full/x_0009.png",
        "large/9998.png",
    ):
        Path(name).mkdir(parents=True)
    pattern, count, expected = PATTERNS[case]
    assert [str(path) for path in output_paths(pattern, count)] == expected
    assert output_paths(Path(pattern), count) == [Path(name) for name in expected]


def test_output_paths_beyond_ten_thousand() -> None:
    paths = output_paths("out.png", 10_001)
    assert len(set(paths)) == 10_001
    assert paths[-1] == Path("out_10000.png")


PATH_REFUSALS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "none": (lambda d: output_paths("out.png", 0), ["0 images", "1 or more"]),
    "negative": (lambda d: output_paths("out.png", -2), ["-2 images"]),
    "empty": (lambda d: output_paths("", 2), ["is no file name"]),
    "missing folder": (lambda d: output_paths(f"{d}/new/", 2), ["new' does not exist"]),
}


@pytest.mark.parametrize("case", PATH_REFUSALS)
def test_output_paths_refusals(case: str, tmp_path: Path) -> None:
    call, parts = PATH_REFUSALS[case]
    message = refusal(lambda: call(tmp_path))
    for part in parts:
        assert part in message
