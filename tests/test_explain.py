"""What can run here, why not, and what "auto" picks: `Pipeline.explain`, `fastsd doctor`, `fastsd.explain`."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from refusals import refusal

import fastsd
from fastsd import bundle, explain, machine, pipeline, store
from fastsd.cli import doctor, main
from fastsd.errors import InputError, MissingExtraError
from fastsd.explain import Explanation, Pick, Row

NO_CUDA = "there is no NVIDIA GPU in this machine: use one that has one"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the machine have a GPU or none, and backends run or not: {(backend, kind of device): why not, or None}."""

    def pretend(reasons: dict[tuple[str, str], str | None], *, gpu: bool = True, marked: bool = False) -> None:
        def describe(device: str) -> dict[str, Any]:
            if not gpu:
                raise InputError("there is no CUDA GPU here (libcuda.so.1 is missing): use the device 'cpu'")
            return {"device": "cuda"}

        def load_backend(name: str) -> Any:
            def available(device: str, target: str) -> str | None:
                return reasons.get((target, device.partition(":")[0]), "it is absent: pip install 'fastsd[cpu]'")

            return SimpleNamespace(available=available, is_marked=lambda *_: marked)

        monkeypatch.setattr(machine, "describe", describe)
        monkeypatch.setattr(explain, "_PCI", Path("/nonexistent"))
        for module in (explain, bundle):
            monkeypatch.setattr(module, "load_backend", load_backend)

    return pretend


# ---------------------------------------------------------------------------------------------------------------------
# "auto" of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------

NO_COMPILER = "there is no C++ compiler 'g++': apt install g++"
NO_TRITON = "Triton is missing: pip install triton"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)

# device, why compile does not run there, whether this model was warmed up -> what is picked, and why
PICKS: dict[str, tuple[torch.device, str | None, bool, str, str]] = {
    "cpu": (CPU, None, False, "eager", "nothing is compiled for this model yet"),
    "cpu, warmed up": (CPU, None, True, "compile", "has compiled this architecture here before"),
    "cpu, no compiler": (CPU, NO_COMPILER, False, "eager", "does not run here (there is no C++ compiler 'g++')"),
    "cpu, warmed up, the compiler gone": (CPU, NO_COMPILER, True, "eager", "there is no C++ compiler"),
    "cuda": (CUDA, None, False, "eager", "nothing is compiled for this model yet"),
    "cuda, warmed up": (CUDA, None, True, "compile", "has compiled"),
    "cuda, no triton": (CUDA, NO_TRITON, True, "eager", "does not run here (Triton is missing)"),
}


@pytest.mark.parametrize("case", PICKS)
def test_auto_of_a_checkpoint(case: str, here: Callable[..., None]) -> None:
    device, reason, marked, backend, why = PICKS[case]
    here({("eager", device.type): None, ("compile", device.type): reason}, marked=marked)
    components: Any = SimpleNamespace(denoiser=torch.nn.Linear(1, 1, device="meta"))
    picked = explain.pick(SimpleNamespace(), components, torch.float32, device)  # type: ignore[arg-type]
    assert picked.backend == backend
    assert why in picked.why


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_a_pipeline_takes_what_is_picked(backend: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load_backend(name: str) -> Any:
        loaded.append(name)
        from fastsd.backends import eager

        return eager

    monkeypatch.setattr(explain, "pick", lambda *_: Pick(backend, "so"))
    monkeypatch.setattr(pipeline, "load_backend", load_backend)
    fastsd.Pipeline.from_pretrained(tiny)
    assert loaded == [backend]


def test_what_cannot_run_is_refused_before_the_weights_are_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr("fastsd.families.load", load)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        message = refusal(lambda: fastsd.Pipeline.from_pretrained(tiny, backend="compile", device="cpu"))
    assert message.startswith("there is no C++ compiler 'no-such-compiler'") and "apt install" in message
    monkeypatch.setattr("fastsd.backends.eager.find_spec", lambda name: None)
    for backend in ("eager", "compile"):
        with pytest.raises(MissingExtraError, match=r"diffusers is not installed: pip install 'fastsd\[torch\]'"):
            fastsd.Pipeline.from_pretrained(tiny, backend=backend)


# ---------------------------------------------------------------------------------------------------------------------
# "auto" of a bundle
# ---------------------------------------------------------------------------------------------------------------------


def write_bundle(folder: Path, variants: list[tuple[str, str]], *, sign: bool = True, **options: Any) -> Path:
    """A bundle of empty engines for (target, precision)s, which can be loaded but not run."""
    made = []
    for target, precision in variants:
        engines = []
        for component in ("denoiser", "vae_decoder"):
            path = f"{target}/{precision}/{component}.{'onnx' if target in bundle.DATA else 'pt2'}"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(b"code")
            profile = {"batch": (1, 1, 2), "height": (8, 8, 8), "width": (8, 8, 8)}
            files = {path: (4, hashlib.sha256(b"code").hexdigest())}
            engines.append(bundle.Engine(component, target, path, precision, (), (), profile, files))
        made.append(bundle.Variant(target, precision, tuple(engines)))
    plain: dict[str, Any] = {name: {} for name in bundle.Manifest.__dataclass_fields__}
    plain |= {"name": "tiny", "exporter": "0", "index": {"_class_name": "StableDiffusionPipeline"}}
    plain |= {"configs": {"denoiser": {}, "vae": {"block_out_channels": [4, 8], "latent_channels": 4}}, **options}
    text = bundle.Manifest(**{**plain, "variants": tuple(made)}).to_json()
    (folder / bundle.MANIFEST).write_text(text)
    if sign:
        (folder / bundle.SIGNATURE).write_text(store.sign(text.encode()))
    return folder


FLOAT = ("float32", "bfloat16")
ALL = [(target, "float32") for target in ("onnx", "openvino", "aoti", "tensorrt", "tensorrt-rtx")]

# variants, devices here, what runs -> what is picked
CHOICES: dict[str, tuple[list[tuple[str, str]], tuple[str, ...], list[tuple[str, str]], str]] = {
    "one": ([("onnx", "float32")], ("cpu",), [("onnx", "cpu")], "onnx"),
    "cpu": (ALL, ("cpu",), [("onnx", "cpu"), ("openvino", "cpu"), ("aoti", "cpu")], "openvino"),
    "cpu, no openvino installed": (ALL, ("cpu",), [("onnx", "cpu"), ("aoti", "cpu")], "aoti"),
    "cpu, torch alone": (ALL, ("cpu",), [("aoti", "cpu")], "aoti"),
    "cpu, no openvino exported": (ALL[:1], ("cpu",), [("onnx", "cpu"), ("openvino", "cpu")], "onnx"),
    "cuda": (
        ALL,
        ("cuda", "cpu"),
        [("onnx", "cuda"), ("onnx", "cpu"), ("openvino", "cpu"), ("tensorrt", "cuda"), ("tensorrt-rtx", "cuda")],
        "tensorrt",
    ),
    "cuda, rtx alone": (ALL, ("cuda", "cpu"), [("openvino", "cpu"), ("tensorrt-rtx", "cuda")], "tensorrt-rtx"),
    "cuda, onnx": (ALL[:2], ("cuda", "cpu"), [("onnx", "cuda"), ("openvino", "cpu")], "onnx"),
    "cuda, nothing installed for it": (ALL, ("cuda", "cpu"), [("onnx", "cpu"), ("openvino", "cpu")], "openvino"),
    "two precisions": ([("openvino", one) for one in FLOAT], ("cpu",), [("openvino", "cpu")], "openvino"),
    "nothing": (ALL, ("cpu",), [], ""),
}


@pytest.mark.parametrize("case", CHOICES)
def test_auto_of_a_bundle(case: str, here: Callable[..., None], tmp_path: Path) -> None:
    variants, devices, able, target = CHOICES[case]
    here(dict.fromkeys(able), gpu="cuda" in devices)
    folder = write_bundle(tmp_path / "bundle", variants)
    found = explain.of_bundle(folder, devices)
    assert found.auto.backend == target
    assert {(row.backend, row.device) for row in found.rows if row.runs} == {
        one for one in able if one[0] in dict(variants)
    }
    if target:  # and it is what is loaded
        assert bundle.load(folder, "auto", "auto", "auto").engines.target == target
    else:
        assert "do not run here" in refusal(lambda: bundle.load(folder, "auto", "auto", "auto"))
        assert found.auto.why == "nothing of it runs here"


def rows(found: Explanation) -> dict[str, Row]:
    return {row.backend: row for row in found.rows}


def test_rows_of_a_bundle(here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here({("onnx", "cpu"): None, ("openvino", "cpu"): None, ("aoti", "cpu"): None}, gpu=False)
    arguments = {"model": "org/name", "revision": "v 1", "lora": ["a.safetensors:0.5"]}
    variants = [("onnx", "float32"), ("onnx", "bfloat16"), ("aoti", "float32")]
    folder = write_bundle(tmp_path / "b", variants, sign=False, arguments=arguments)
    found = rows(explain.of_bundle(folder, ("cpu",), loras=["b.safetensors:2.0"]))
    same = "--revision 'v 1' --lora a.safetensors:0.5 --lora b.safetensors:2.0"
    assert found["onnx"] == Row("onnx", "cpu", True, "in float32, bfloat16")
    assert found["openvino"].remedy == f"fastsd export org/name --to openvino {same} -o {folder}"
    assert found["openvino"].why == "the bundle has no engines for it"
    assert found["eager"].remedy == f"fastsd generate PROMPT -m org/name --backend eager {same}"
    assert not found["aoti"].runs and found["aoti"].why.endswith("native engines that were not built on this machine")
    assert "trust=True" in found["aoti"].remedy
    assert found["tensorrt"] == Row("tensorrt", "cuda", False, *NO_CUDA.split(": "))
    assert rows(explain.of_bundle(folder, ("cpu",), trust=True))["aoti"].runs
    (folder / "onnx/float32/denoiser.onnx").write_bytes(b"cod")
    assert "has 3 bytes where 4 belong" in rows(explain.of_bundle(folder, ("cpu",)))["onnx"].why
    (folder / bundle.MANIFEST).write_text("{}")
    assert "no manifest" in refusal(lambda: explain.of_bundle(folder, ("cpu",)))
    monkeypatch.setattr(explain, "find_spec", lambda name: None)  # no torch: then it is installed first
    folder = write_bundle(tmp_path / "c", variants)
    assert rows(explain.of_bundle(folder, ("cpu",)))["eager"].remedy == (
        "pip install 'fastsd[torch]' && fastsd generate PROMPT -m tiny --backend eager"
    )


def test_a_bundle_explains_itself(here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here({("onnx", "cpu"): None, ("aoti", "cpu"): None}, gpu=False)
    folder = write_bundle(tmp_path / "bundle", [("onnx", "float32"), ("aoti", "float32")], sign=False)
    monkeypatch.chdir(tmp_path)
    pipe = fastsd.Pipeline.from_pretrained("bundle", trust=True, backend="onnx")
    monkeypatch.chdir("/")
    found = pipe.explain()
    assert found.auto.backend == "aoti" and rows(found)["aoti"].runs
    assert rows(found)["onnx"] == Row("onnx", "cpu", True, "this pipeline")
    assert rows(found)["openvino"].remedy.endswith(f"fastsd export tiny --to openvino -o {folder}")
    for engines in ("onnx", "aoti"):  # a server has them elsewhere
        shutil.rmtree(folder / engines)
    served = fastsd.Pipeline(**bundle.load(folder, "onnx", "auto", "auto", serve=lambda engine: tuple)._asdict())
    assert rows(served.explain())["onnx"].why == "bundles"


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_explains_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.backends.compile.available", lambda *_: None)  # whatever this machine has
    pipe = fastsd.Pipeline.from_pretrained(tiny, device="cpu")
    found = pipe.explain()
    assert [row.backend for row in found.rows] == list(explain.BACKENDS)
    assert rows(found)["eager"] == Row("eager", "cpu", True, "this pipeline")
    assert rows(found)["compile"] == Row("compile", "cpu", True, "compiles at the first call")
    for target in ("onnx", "openvino", "aoti"):
        assert rows(found)[target].why == "the checkpoint is not exported for it"
        assert rows(found)[target].remedy == f"fastsd export {tiny} --to {target} -o DIR"
    assert found.auto == pipe.explain().auto and found.auto.backend == "eager"
    assert "warmup" in found.auto.why
    text = str(found).splitlines()
    assert text[0] == "eager         cpu   runs: this pipeline"
    assert text[-1].startswith('"auto" picks eager: nothing is compiled')
    assert all(len(line.rstrip()) == len(line) for line in text)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a preset": ({"model": "sdxl", "revision": None, "weights": None}, "sdxl --to onnx -o DIR"),
    "random": ({"model": "sd15", "weights": "random"}, "sd15 --to onnx --weights random -o DIR"),
    "a file": ({"model": "a b.safetensors", "config": "c"}, "'a b.safetensors' --to onnx --config c -o DIR"),
    "no name": ({"model": None}, "MODEL --to onnx -o DIR"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_the_command_names_the_model(case: str, here: Callable[..., None]) -> None:
    arguments, words = ARGUMENTS[case]
    here({("onnx", "cpu"): None}, gpu=False)
    found = explain.of_checkpoint(arguments, ("cpu",), Pick("eager", ""))
    assert rows(found)["onnx"].remedy == f"fastsd export {words}"
    missing = rows(found)["openvino"].remedy
    assert missing == f"pip install 'fastsd[cpu]' && fastsd export {words.replace('onnx', 'openvino')}"


def test_the_commands_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of the row's command passes its checks, and its image is made."""
    monkeypatch.chdir(tmp_path)
    pipe = fastsd.Pipeline.from_pretrained(tiny, device="cpu")
    program, *words = shlex.split(rows(pipe.explain())["onnx"].remedy)
    assert program == "fastsd" and main([*words, "--dry-run"]) == 0
    command = explain._generate({"model": str(tiny)}, "eager")[0]
    assert main([*shlex.split(command)[1:], "--steps", "1"]) == 0
    assert Path("out.png").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Why not
# ---------------------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Exception, str]] = {
    "absent": (ModuleNotFoundError("No module named 'x'", name="x"), "x is not installed: pip install 'fastsd[cpu]'"),
    "another version": (ImportError("cannot import name 'y'"), "(ImportError: cannot import name 'y')"),
    "a library lacks": (OSError("libx.so.1: cannot\nopen"), "(OSError: libx.so.1: cannot open)"),
    "built for another": (RuntimeError("compiled with\n\nNumPy 1.x"), "(RuntimeError: compiled with NumPy 1.x)"),
    "nothing said": (AttributeError(), "(AttributeError: )"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("backend", ["eager", "compile", "openvino"])
def test_a_broken_library_is_a_reason(backend: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, said = BROKEN[case]

    def load_backend(name: str) -> Any:
        raise error

    monkeypatch.setattr(explain, "load_backend", load_backend)
    reason = explain.problem(backend, "cpu")
    assert reason is not None and said in reason and "\n" not in reason and "pip install" in reason
    with pytest.raises(MissingExtraError):
        explain.require(backend, "cpu")


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers"])
def test_what_loads_late_is_tried_if_asked(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain.problem("eager", "cpu", thorough=True) is None
    monkeypatch.setitem(sys.modules, library, SimpleNamespace())  # without the part that is needed
    assert "do not load (AttributeError" in (explain.problem("eager", "cpu", thorough=True) or "")


@pytest.mark.parametrize(("vendor", "says"), [("0x8086", NO_CUDA), ("0x10de", "install NVIDIA's driver")])
def test_a_gpu_without_its_driver_is_another_reason(
    vendor: str, says: str, tmp_path: Path, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here({}, gpu=False)
    (tmp_path / "0000:00:01.0").mkdir()
    (tmp_path / "0000:00:01.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(explain, "_PCI", tmp_path)
    assert says in (explain.problem("tensorrt", "cuda") or "")
    (row,) = (row for row in explain.of_machine(["cuda"]).rows if row.backend == "tensorrt")
    assert "GPU" in row.why and "install" not in row.why and says.partition(": ")[2] in row.remedy
    assert "pip install" in (explain.problem("openvino", "cpu") or "")


@pytest.mark.parametrize(
    ("device", "says"), [("cuda", "sees no CUDA GPU: install"), ("tpu", "is unknown"), ("mps", "is not supported")]
)
def test_eager_where_torch_has_no_device(device: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in (explain.problem("eager", device) or "")
    assert says in (explain.problem("compile", device) or "")


# ---------------------------------------------------------------------------------------------------------------------
# fastsd doctor
# ---------------------------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["doctor", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_doctor(call: Call, tiny: Path, home: Path) -> None:
    code, out, err = call(str(tiny))
    assert (code, err) == (0, "")
    assert f"torch            {torch.__version__}" in out and "Libraries" in out and str(home) in out
    assert f"Backends for {tiny}" in out and f"fastsd export {tiny} --to onnx -o DIR" in out
    assert '"auto": the device ' in out and out.rstrip().splitlines()[-1].startswith('"auto" picks eager')
    code, out, err = call("--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert {row["backend"] for row in document["backends"]} == set(explain.BACKENDS)
    assert document["machine"]["cpu"] == machine.describe("cpu")["cpu"]
    assert (document["hub"]["endpoint"], document["hub"]["offline"]) == (constants.ENDPOINT, True)
    assert not home.exists()  # nothing is made


BLOCK = (
    "import sys; sys.modules.update(dict.fromkeys({names!r})); from fastsd.cli import main; sys.exit(main({words!r}))"
)
HEAVY = ("torch", "diffusers", "transformers", "triton", "tensorrt_bindings", "tensorrt_rtx_bindings")


def alone(words: list[str], names: tuple[str, ...], path: Path) -> subprocess.CompletedProcess[str]:
    """`fastsd` in a process of its own, in which some libraries are absent."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=names, words=words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))},
    )


def test_doctor_of_the_core_alone(tmp_path: Path) -> None:
    run = alone(["doctor", "demo"], (*HEAVY, "onnxruntime", "openvino"), tmp_path)
    assert (run.returncode, run.stderr) == (1, "")
    assert "pip install 'fastsd[cpu]' && fastsd export demo --to onnx -o DIR" in run.stdout
    assert "nothing that is here runs a checkpoint (torch is not installed)" in run.stdout


def test_doctor_among_broken_libraries(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('no such symbol\\nat all')")
    (tmp_path / "openvino.py").write_text("raise OSError('libtbb.so.12: cannot open')")
    run = alone(["doctor", "--json"], HEAVY, tmp_path)
    assert (run.returncode, run.stderr) == (1, "")
    document = json.loads(run.stdout)
    problems = {one["name"]: one["problem"] for one in document["libraries"]}
    assert problems["onnxruntime"] == "does not load (RuntimeError: no such symbol at all)"
    assert problems["openvino"] == "does not load (OSError: libtbb.so.12: cannot open)"
    reasons = {row["backend"]: row["why"] for row in document["backends"]}
    assert reasons["onnx"] == "its libraries do not load (RuntimeError: no such symbol at all)"
    assert document["auto"] == {"backend": "", "why": "nothing runs here"}


def test_doctor_where_engines_alone_run(tmp_path: Path) -> None:
    """The product's environment: exit 0 without torch, which stays unimported."""
    run = alone(["doctor"], (*HEAVY, "openvino"), tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "for a bundle the first that it has of onnx" in run.stdout.splitlines()[-1]


@pytest.mark.parametrize("model", ["nonsense", "a/b/c", "none.safetensors", "model.ckpt"])
def test_doctor_of_no_model(model: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(model)
    assert (code, out) == (2, "") and err.startswith("fastsd: ") and err.count("\n") == 1


@pytest.mark.parametrize("model", ["sdxl", "someone/something", "someone/something@main"])
def test_a_model_of_the_hub_is_not_asked_for(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def network(*_: object, **__: object) -> None:
        raise AssertionError("the network is asked")

    offline = rows(explain.of_model(model))["eager"]
    assert not offline.runs and "HF_HUB_OFFLINE is set" in offline.why and "unset it once" in offline.remedy
    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = rows(explain.of_model(model))["eager"]
    assert online.runs and "are downloaded at the first use" in online.why


def test_the_hub_is_asked_only_if_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def session() -> Any:
        return SimpleNamespace(head=lambda url, timeout: asked.append(url) or SimpleNamespace(status_code=200))

    monkeypatch.setattr("huggingface_hub.utils.get_session", session)
    assert doctor._hub(online=True)["answer"] is None  # offline
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert doctor._hub(online=False)["answer"] is None and not asked
    assert doctor._hub(online=True)["answer"] == "HTTP 200" and asked == [constants.ENDPOINT]

    def fail(url: str, timeout: int) -> None:
        raise ConnectionError("unreachable")

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=fail))
    assert doctor._hub(online=True)["answer"] == "no answer (ConnectionError)"


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bfloat16"), ((7, 5), "float16")], ids=["Hopper", "Turing"])
def test_doctor_on_a_gpu(
    capability: tuple[int, int], dtype: str, call: Call, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the driver and torch say of a GPU, by fakes of both."""
    here({("eager", "cuda"): None, ("onnx", "cuda"): None, ("onnx", "cpu"): None})
    facts = {"gpu": "NVIDIA X", "compute_capability": "9.0", "driver": 580, "cuda": 13}
    monkeypatch.setattr(machine, "describe", lambda device: {"os": "", "arch": "", "cpu": "C", "isa": [], **facts})
    monkeypatch.setattr(machine, "all_of", lambda device: [facts])
    fakes: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": capability,
        "get_device_name": "NVIDIA X",
        "get_device_properties": SimpleNamespace(total_memory=150 * 10**9),
    }
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    code, out, err = call()
    assert (code, err) == (0, "")
    assert "GPU: NVIDIA X, compute capability 9.0; driver 580, CUDA 13" in out
    assert "torch: built for CUDA 13.0, sees NVIDIA X with 150.0 GB" in out
    assert f'"auto": the device cuda, the dtype {dtype}: the GPU has compute capability {capability[0]}.' in out
    lines = [line.split() for line in out.partition("Backends")[2].splitlines()]
    assert ["onnx", "cuda", "runs:", "bundles"] in lines and ["onnx", "cpu", "runs:", "bundles"] in lines
    assert {"cuda", "cpu"} <= {line[1] for line in lines if line and line[0] == "eager"}


def test_folders(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "engines").mkdir(parents=True)
    (home / "engines" / "a").write_bytes(bytes(1000))
    (home / "b").write_bytes(bytes(24))
    (home / "link").symlink_to(home / "b")
    found = doctor._folder("engines", store.home)
    assert (found["path"], found["bytes"], found["writable"]) == (str(home), 1024 + len(str(home / "b")), True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    absent = doctor._folder("x", lambda: tmp_path / "no" / "such")
    assert (absent["bytes"], absent["writable"], absent["problem"]) == (0, False, "")
    monkeypatch.setenv("FASTSD_HOME", "relative")
    wrong = doctor._folder("engines", store.home)
    assert wrong["path"] is None and "relative path" in wrong["problem"]
    for find in doctor.FOLDERS.values():
        assert doctor._folder("x", find)["name"] == "x"


def test_two_onnx_runtimes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    found = doctor._library("onnxruntime")
    assert found["installed"] == {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    assert "overwrite each other" in found["problem"]
    assert doctor._library("torch")["problem"] == ""


def test_inductors_folder_is_the_one_that_torch_takes() -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert str(doctor._inductor_cache()) == os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
