"""`fastsd engines`: what it shows of the store and of a bundle, what it finds damaged, what it removes."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fastsd import bundle, cli, integrity, store

COMPONENTS = ("denoiser", "prepare", "vae_decoder")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    verb = EntryPoint("engines", "fastsd_export.engines:engines", "fastsd.verbs")
    monkeypatch.setattr(cli, "entry_points", lambda group: [verb])
    return tmp_path / "home"


@pytest.fixture
def keys() -> dict[str, str]:
    """Three engines in the store, used 2, 1 and 0 days ago; keys by component."""
    found = {}
    for days, component in zip((2, 1, 0), COMPONENTS, strict=True):
        profile = {"batch": (1, 2, 4), "height": (64, 64, 64)}
        fields = store.fields_for(
            "onnx", component, precision="float32", profile=profile, graph="0a", weights="0b", options={"level": 99}
        )
        folder = store.get(fields, lambda folder: (folder / "model.onnx").write_bytes(bytes(1_500_000)) and None)
        then = time.time() - days * 86400
        os.utime(folder.parent / "entry.json", (then, then))
        found[component] = store.key(fields)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of two engines and a licence."""
    folder = tmp_path / "bundle"
    engines = []
    for component in ("denoiser", "vae_decoder"):
        (folder / component).mkdir(parents=True)
        (folder / component / "model.onnx").write_bytes(b"\x08\x0a")  # a model of nothing but its version
        (folder / component / "weights.bin").write_bytes(bytes(1000))
        files = {f"{component}/{name}": value for name, value in integrity.hash_files(folder / component).items()}
        spec = bundle.TensorSpec("latents", "float32", ("batch", 4, "height", "width"))
        profile = {"batch": (1, 1, 2)}
        path = f"{component}/model.onnx"
        engines.append(bundle.Engine(component, "onnx", path, "float32", (spec,), (spec,), profile, files))
    (folder / "LICENSE").write_text("free")
    plain: dict[str, Any] = {name: {} for name in bundle.Manifest.__dataclass_fields__}
    plain |= {"name": "demo", "exporter": "0", "files": {"LICENSE": integrity.hash_files(folder)["LICENSE"]}}
    manifest = bundle.Manifest(**{**plain, "variants": (bundle.Variant("onnx", "float32", tuple(engines)),)})
    (folder / bundle.MANIFEST).write_text(manifest.to_json())
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main(["engines", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def document(run: Run) -> Callable[..., dict[str, Any]]:
    def call(*arguments: Any, code: int = 0) -> dict[str, Any]:
        actual, out, err = run(*arguments, "--json")
        assert (actual, err) == (code, "")
        return dict(json.loads(out))

    return call


def test_list(keys: dict[str, str], run: Run, document: Any, home: Path) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    heading, *rows, last = out.splitlines()
    assert heading.split() == ["engine", "target", "component", "precision", "profile", "size", "last", "used"]
    assert [row.split()[0] for row in rows] == [keys[name][:12] for name in reversed(COMPONENTS)]
    today = time.strftime("%Y-%m-%d")
    assert "onnx" in rows[0] and "batch 1:2:4, height 64" in rows[0] and "1.5 MB" in rows[0] and today in rows[0]
    assert last == f"3 engines, 4.5 MB in {home / 'engines'}"
    assert [one["name"] for one in document("list")["engines"]] == [keys[name] for name in reversed(COMPONENTS)]
    [one] = document("list", keys["prepare"][:6])["engines"]
    assert one["component"] == "prepare" and one["nbytes"] == 1_500_000 and one["profile"]["batch"] == [1, 2, 4]


def test_an_empty_store(run: Run, document: Any, home: Path) -> None:
    assert run("list") == (0, f"no engines in {home / 'engines'}\n", "")
    assert document("list")["engines"] == []
    assert run("verify")[0] == 0
    assert run("prune") == (0, "removed 0 engines, 0 kB\n", "")
    assert not home.exists()


def test_show(keys: dict[str, str], run: Run, document: Any) -> None:
    code, out, _ = run("show", keys["denoiser"][:4])
    assert code == 0
    for text in (keys["denoiser"], "float32", "1:2:4", "fields machine os", "fields options level", "99", "model.onnx"):
        assert text in out
    [shown] = document("show", keys["denoiser"])["engines"]
    assert shown["fields"]["options"] == {"level": 99}
    assert store.key(shown["fields"]) == keys["denoiser"]
    assert shown["files"]["model.onnx"][0] == 1_500_000


def test_verify(keys: dict[str, str], run: Run, document: Any, home: Path) -> None:
    assert document("verify") | {"engines": []} == {
        "folder": str(home / "engines"),
        "ok": True,
        "problems": [],
        "engines": [],
    }
    entry = home / "engines" / keys["prepare"]
    with open(entry / "files" / "model.onnx", "r+b") as file:
        file.seek(700_000)
        file.write(b"x")
    code, out, err = run("verify")
    assert (code, err) == (1, "")
    assert "is damaged (its sha256" in out and out.endswith("1 damaged\n")
    found = document("verify", code=1)
    assert not found["ok"] and len(found["problems"]) == 1 and "model.onnx" in found["problems"][0]
    assert [bool(one["problem"]) for one in found["engines"]] == [False, True, False]
    assert document("verify", keys["denoiser"])["ok"]
    (entry / "entry.json").unlink()
    assert "entry.json' is missing" in document("verify", keys["prepare"], code=1)["problems"][0]
    assert "damaged" in run("list")[1]


def test_remove(keys: dict[str, str], run: Run, document: Any) -> None:
    assert "would remove 1 engines, 1.5 MB" in run("remove", keys["prepare"], "--dry-run")[1]
    assert len(store.entries()) == 3
    assert "removed 1 engines, 1.5 MB" in run("remove", keys["prepare"][:12])[1]
    removed = document("remove", keys["denoiser"], keys["vae_decoder"], keys["denoiser"][:8])
    assert {one["component"] for one in removed["removed"]} == {"denoiser", "vae_decoder"}
    assert store.entries() == []


@pytest.mark.parametrize(
    ("flags", "stays"),
    [
        ([], {"denoiser", "prepare", "vae_decoder"}),
        (["--max-gb", "0.0031"], {"prepare", "vae_decoder"}),
        (["--older-than", "0.5"], {"vae_decoder"}),
        (["--stale"], {"denoiser", "prepare", "vae_decoder"}),
        (["--max-gb", "0"], set()),
    ],
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value) or "none",
)
def test_prune(flags: list[str], stays: set[str], keys: dict[str, str], document: Any, home: Path) -> None:
    (home / "engines" / f"{keys['prepare']}.bad").mkdir()
    (home / "engines" / f"{keys['prepare']}.bad" / "plan").write_bytes(bytes(1234))
    told = document("prune", *flags, "--dry-run")
    assert told["dry_run"] and told["leftover_bytes"] == 1234
    assert {one["component"] for one in told["removed"]} == set(COMPONENTS) - stays
    assert document("prune", *flags) == {**told, "dry_run": False}
    assert {entry.fields["component"] for entry in store.entries()} == stays


def test_what_another_version_built_is_stale(
    keys: dict[str, str], run: Run, document: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_version", lambda name: "99.0")
    assert len(document("prune", "--stale")["removed"]) == 3


def test_a_bundle(folder: Path, run: Run, document: Any) -> None:
    code, out, _ = run("list", folder)
    assert code == 0 and out.count("model.onnx") == 2 and out.endswith(f"2 engines, 2 kB in {folder}\n")
    assert "vae_decoder" not in run("show", folder, "denoiser/model.onnx")[1]
    [shown] = document("show", folder, "denoiser/model.onnx")["engines"]
    assert shown["inputs"] == [{"name": "latents", "dtype": "float32", "shape": ["batch", 4, "height", "width"]}]
    assert document("verify", folder)["ok"]
    assert run("verify", folder.name)[0] == 0  # relative to where we are


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda folder: (folder / "denoiser/weights.bin").write_bytes(bytes(999) + b"x"), "weights.bin"),
    "missing": (lambda folder: (folder / "vae_decoder/weights.bin").unlink(), "vae_decoder/weights.bin"),
    "licence": (lambda folder: (folder / "LICENSE").write_text("FREE"), "LICENSE"),
    "more": (lambda folder: (folder / "more").write_text(""), "belongs to no engine"),
}


@pytest.mark.parametrize(("damage", "says"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_bundle(damage: Callable[[Path], object], says: str, folder: Path, document: Any) -> None:
    damage(folder)
    found = document("verify", folder, code=1)
    assert len(found["problems"]) == 1 and says in found["problems"][0]


def test_a_bundle_that_reads_files_elsewhere(folder: Path, document: Any) -> None:
    import onnx

    weights = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="../LICENSE")
    model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[weights])).SerializeToString()
    (folder / "denoiser/model.onnx").write_bytes(model)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = list(integrity.hash_files(folder)["denoiser/model.onnx"])
    manifest["variants"][0]["engines"][0]["files"]["denoiser/model.onnx"] = digest
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": bundle.digest(manifest)}))
    assert "'../LICENSE'" in document("verify", folder, code=1)["problems"][0]


def test_no_control_characters_reach_the_terminal(folder: Path, run: Run) -> None:
    manifest = bundle.read(folder)
    [variant] = manifest.variants
    engines = (variant.engines[0], replace(variant.engines[1], component="\x1b[31mred"))
    manifest = replace(manifest, variants=(replace(variant, engines=engines),))
    (folder / "manifest.json").write_text(manifest.to_json())
    for action in ("list", "show", "verify"):
        _, out, _ = run(action, folder)
        assert "\x1b" not in out and "31mred" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show"], "nothing is named"),
        (["remove"], "nothing is named"),
        (["show", "abc"], "too short"),
        (["show", "ghijkl"], "there is no engine 'ghijkl'"),
        (["list", "./nothing"], "is no bundle"),
        (["show", "bundle", "nothing.onnx"], "the bundle has no engine 'nothing.onnx'"),
        (["remove", "bundle"], "delete the folder itself"),
        (["prune", "abcd"], "takes no names"),
        (["list", "--stale"], "leave them out"),
        (["verify", "--dry-run"], "changes nothing"),
        (["prune", "--max-gb", "inf"], "no numbers"),
        (["prune", "--older-than", "nan"], ""),
        (["prune", "--max-gb", "-1"], "--max-gb"),
        (["burn"], "burn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_asked_for_wrongly(
    arguments: list[str], says: str, keys: dict[str, str], folder: Path, run: Run
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err and err.count("\n") == 1 and err.startswith("fastsd: ")


def test_two_keys_that_begin_alike(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(17):  # and there are 16 first characters
        store.get({"number": number}, lambda folder: None)
    first = [entry.key[0] for entry in store.entries()]
    monkeypatch.setattr("fastsd_export.engines.SHORTEST", 1)
    code, _, err = run("show", max(first, key=first.count))
    assert code == 2 and "give more characters" in err
