"""Model repositories for the Triton Inference Server: their configurations are held against Triton's own schema and the
ONNX files, and the Python model is run by a stand-in for Triton's module, over those files.
"""

import ctypes
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format

from fastsd import bundle, integrity
from fastsd.bundle import Engine, TensorSpec, Variant
from fastsd.errors import InputError
from fastsd.pipeline import Pipeline
from fastsd_export import triton_repo

ELEMENTS = {  # ONNX's types, Triton's and numpy's
    onnx.TensorProto.FLOAT: ("TYPE_FP32", np.float32),
    onnx.TensorProto.INT64: ("TYPE_INT64", np.int64),
}
NUMPY = {**dict(ELEMENTS.values()), "TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_UINT8": np.uint8}


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_HOME", str(home))


@pytest.fixture(scope="session")
def repository(bundled: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny bundle, read-only."""
    out = tmp_path_factory.mktemp("triton") / "models"
    triton_repo.write(bundled("sd"), out)
    return out


def _schema() -> ModuleType:
    """Triton's model_config.proto, compiled, out of its client, whose other modules need grpc."""
    path = metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = _schema()


def config(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), SCHEMA.ModelConfig())


def tensors(specs: Any) -> dict[str, tuple[str, list[int]]]:
    return {one.name: (SCHEMA.DataType.Name(one.data_type), list(one.dims)) for one in specs}


# ------------------------------------------------------------------------------------------------------------
# The repository


def test_engines_are_configured_as_their_graphs_are(repository: Path) -> None:
    manifest = json.loads((repository / "manifest.json").read_text())
    assert sorted(manifest["models"]) == sorted(path.name for path in repository.iterdir() if path.is_dir())
    for name in manifest["models"][1:]:
        parsed = config(repository / name)
        graph = onnx.load(repository / name / "1" / "model.onnx").graph
        for ours, theirs in ((parsed.input, graph.input), (parsed.output, graph.output)):
            expected = {
                one.name: (
                    ELEMENTS[one.type.tensor_type.elem_type][0],
                    [dim.dim_value if dim.HasField("dim_value") else -1 for dim in one.type.tensor_type.shape.dim],
                )
                for one in theirs
            }
            assert tensors(ours) == expected, name
        assert (parsed.name, parsed.platform, parsed.max_batch_size) == (name, "onnxruntime_onnx", 0)
        [group] = parsed.instance_group
        assert (group.Kind.Name(group.kind), group.count) == ("KIND_AUTO", 1)
        assert not parsed.optimization.cuda.graphs  # which Triton knows for TensorRT alone
    dims = [
        -1 in dim for name in manifest["models"][1:] for _, dim in tensors(config(repository / name).input).values()
    ]
    assert True in dims and False in dims  # some vary, some do not


def test_weights_in_a_file_of_their_own_come_along(bundled: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)
    manifest = bundle.read(folder)
    variant = next(one for one in manifest.variants if one.target == "onnx")
    denoiser = next(one for one in variant.engines if one.component == "denoiser")
    path = folder / denoiser.path
    model = onnx.load(path)
    path.unlink()
    onnx.save(model, path, save_as_external_data=True, location="weights.data")
    names = (denoiser.path, f"{denoiser.path.rpartition('/')[0]}/weights.data")
    found = integrity.hash_files(folder)
    moved = dataclasses.replace(denoiser, files={name: found[name] for name in names})
    engines = tuple(moved if one is denoiser else one for one in variant.engines)
    variants = (dataclasses.replace(variant, engines=engines),)
    (folder / bundle.MANIFEST).write_text(dataclasses.replace(manifest, variants=variants).to_json())
    triton_repo.write(folder, tmp_path / "models")
    [where] = [one for one in _models(tmp_path / "models") if "denoiser" in one.name]
    assert sorted(one.name for one in (where / "1").iterdir()) == ["model.onnx", "weights.data"]
    session = onnxruntime.InferenceSession(where / "1" / "model.onnx")  # which reads the other
    assert {one.name for one in session.get_inputs()} == tensors(config(where).input).keys()


def test_the_model_that_makes_images(repository: Path, bundled: Callable[[str], Path]) -> None:
    parsed = config(repository / "fastsd")
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("fastsd", "python", 0)
    assert {one.name: one.optional for one in parsed.input} == {
        "prompt": False,
        **dict.fromkeys(("negative_prompt", "seed", "steps", "guidance_scale", "scheduler", "height", "width"), True),
    }
    assert tensors(parsed.output) == {"image": ("TYPE_UINT8", [-1, -1, -1, 3]), "seed": ("TYPE_INT64", [-1])}
    inside = repository / "fastsd" / "1" / "bundle"
    manifest, whole = bundle.read(inside), bundle.read(bundled("sd"))
    assert manifest.files == whole.files and manifest.samplers == whole.samplers
    integrity.check_files(inside, manifest.files, besides=[bundle.MANIFEST])
    [variant] = manifest.variants
    assert (variant.target, variant.precision) == ("onnx", "float32")
    for engine in variant.engines:  # their models hold the files of the bundle
        path = repository / engine.options["model"] / "1" / "model.onnx"
        assert integrity.hash_files(path.parent)["model.onnx"] == engine.files[engine.path]


def test_it_is_written_again_whole_or_not_at_all(
    repository: Path, bundled: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "models"
    first = triton_repo.write(bundled("sd"), out, name="cats")
    assert [path.name for path in first] == [path.name.replace("fastsd", "cats", 1) for path in _models(repository)]
    assert all((path / "config.pbtxt").is_file() for path in first)
    before = integrity.hash_files(out)

    def full(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(InputError, match="No space left on device"):
            triton_repo.write(bundled("sd"), out)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)  # a file system without links
        triton_repo.write(bundled("sd"), out, name="cats")
    assert integrity.hash_files(out) == before
    triton_repo.write(bundled("sd"), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in repository.iterdir())
    assert list(tmp_path.iterdir()) == [out]


def _models(out: Path) -> list[Path]:
    return [out / name for name in json.loads((out / "manifest.json").read_text())["models"]]


Edit = Callable[[dict[str, Any]], object]


def _first(manifest: dict[str, Any], component: str) -> Any:
    return next(one for one in manifest["variants"][0]["engines"] if one["component"] == component)


DAMAGED: dict[str, tuple[Edit, str]] = {
    "no version": (lambda m: m.pop("version"), "has version None"),
    "no file": (lambda m: _first(m, "denoiser")["files"].update({"engines/x": [1, "00"]}), "engines/x' is missing"),
    "outside": (lambda m: m["files"].update({"../secret": [1, "00"]}), "secret"),
    "another byte": (lambda m: m["files"].update({next(iter(m["files"])): [1, "00"]}), "bytes where 1 belong"),
    "dtype": (lambda m: _first(m, "denoiser")["inputs"][0].update(dtype="float8"), "tensors of .?float8"),
    "component": (lambda m: m["variants"][0]["engines"].remove(_first(m, "denoiser")), "lacks .?denoiser"),
    "target": (lambda m: m["variants"].pop(0), "has openvino in float32, nothing for tensorrt or onnx"),
    "plan without weights": (
        lambda m: _first(m, "prepare")["options"].update(weights="x.onnx", refit="strip"),
        "without its weights.*--refit strip",
    ),
    "names": (
        lambda m: [e.update(path="x.onnx", files={"x.onnx": [1, "00"]}) for e in m["variants"][0]["engines"]],
        "x.onnx' is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_bad_bundle_is_one_sentence(case: str, bundled: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder, copy_function=os.link)
    change, message = DAMAGED[case]
    document = json.loads((folder / bundle.MANIFEST).read_text())
    del document["digest"]
    change(document)
    (folder / bundle.MANIFEST).unlink()
    (folder / bundle.MANIFEST).write_text(json.dumps({**document, "digest": bundle.digest(document)}))
    with pytest.raises(InputError, match=message) as refusal:
        triton_repo.write(folder, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == [folder]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other things": ({"out": "taken"}, "holds other things"),
    "a file": ({"out": "taken/file"}, "is a file"),
    "no parent": ({"out": "absent/out"}, "absent' does not exist"),
    "in the bundle": ({"out": "bundle/out"}, "is in the bundle"),
    "the bundle": ({"out": "bundle"}, "is in the bundle"),
    "no bundle": ({"folder": "taken"}, "manifest.json"),
    "backend": ({"backend": "openvino"}, "not of 'openvino': use one of these"),
    "not built": ({"backend": "tensorrt"}, "has onnx in float32 and openvino in float32, nothing for tensorrt"),
    "precision": ({"precision": "float16"}, "nothing for tensorrt or onnx in float16"),
    "name": ({"name": "../cats"}, "is none of a model"),
    "no name": ({"name": ""}, "is none of a model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_one_sentence(case: str, bundled: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "bundle").symlink_to(bundled("sd"))
    given, message = REFUSED[case]
    folder, out = (tmp_path / given.get(key, default) for key, default in (("folder", "bundle"), ("out", "out")))
    options = {key: value for key, value in given.items() if key not in ("folder", "out")}
    with pytest.raises(InputError, match=message) as refusal:
        triton_repo.write(folder, out, **options)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "taken"]
    assert (tmp_path / "taken" / "file").read_text() == "mine"


@pytest.mark.parametrize("option", ["", "version_compatible", "weight_streaming"])
def test_plans_get_the_graph_of_the_denoiser(option: str, bundled: Callable[[str], Path], tmp_path: Path) -> None:
    """TensorRT is not here: plans are files that nobody reads, and Triton's schema judges what is said of them."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundled("sd"), folder)
    manifest = bundle.read(folder)

    def plan(engine: Engine) -> Engine:
        path = engine.path.replace(".onnx", ".plan")
        (folder / path).write_bytes(b"plan")
        low = [
            tuple(dataclasses.replace(one, dtype="bfloat16" if one.name in BFLOAT16 else one.dtype) for one in specs)
            for specs in (engine.inputs, engine.outputs)
        ]
        files = {path: integrity.hash_files(folder)[path]}
        options = {option: True} if option else {}
        return Engine(engine.component, "tensorrt", path, "bfloat16", *low, engine.profile, files, options)

    variant = next(one for one in manifest.variants if one.target == "onnx")
    plans = Variant("tensorrt", "bfloat16", tuple(plan(engine) for engine in variant.engines))
    whole = dataclasses.replace(manifest, variants=(*manifest.variants, plans))
    (folder / bundle.MANIFEST).write_text(whole.to_json())
    triton_repo.write(folder, tmp_path / "models")
    for model in _models(tmp_path / "models")[1:]:
        parsed, text = config(model), (model / "config.pbtxt").read_text()
        assert parsed.platform == "tensorrt_plan" and (model / "1" / "model.plan").read_bytes() == b"plan"
        assert [group.Kind.Name(group.kind) for group in parsed.instance_group] == ["KIND_GPU"]
        assert {kind for name, (kind, _) in tensors(parsed.input).items() if name in BFLOAT16} <= {"TYPE_BF16"}
        assert ("version-compatible=true" in text) == (option == "version_compatible")
        graphs = "denoiser" in model.name and option != "weight_streaming"
        assert parsed.optimization.cuda.graphs == graphs
        for spec in parsed.optimization.cuda.graph_spec:
            assert spec.batch_size == 0  # as max_batch_size
            dims = {name: list(shape.dim) for name, shape in spec.input.items()}
            assert dims.keys() == tensors(parsed.input).keys()
            for name, (_, configured) in tensors(parsed.input).items():
                assert [b if a == -1 else a for a, b in zip(configured, dims[name], strict=True)] == dims[name]


# ------------------------------------------------------------------------------------------------------------
# The Python model

BFLOAT16 = ("modulation", "context")


class Failed(NamedTuple):
    """`TritonError`."""

    text: str
    number: int

    INTERNAL, INVALID_ARG, CANCELLED = 1, 3, 7

    def message(self) -> str:
        return self.text


TAKEN = b"used_dlpack"


class Tensor:
    """`pb_utils.Tensor`: an array, or a torch tensor for bfloat16; on a GPU it cannot be read."""

    def __init__(self, name: str, array: Any, on_gpu: bool = False) -> None:
        self._name, self.array, self._on_gpu = name, array, on_gpu
        assert isinstance(array, torch.Tensor) or array.flags.c_contiguous

    taken: ClassVar[list[Any]] = []

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> "Tensor":
        tensor = torch.from_dlpack(capsule).clone()
        # As Triton does. That is not DLPack's name, and numpy's capsules corrupt the memory when they end with it.
        set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
        set_name(("PyCapsule_SetName", ctypes.pythonapi))(capsule, TAKEN)
        Tensor.taken.append(capsule)
        return Tensor(name, tensor)

    def to_dlpack(self) -> Any:
        assert not self._on_gpu
        return torch.utils.dlpack.to_dlpack(self.array)

    def as_numpy(self) -> Any:
        assert not self._on_gpu and isinstance(self.array, np.ndarray)
        return self.array

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return not self._on_gpu

    def shape(self) -> list[int]:
        return list(self.array.shape)


class Response:
    """`pb_utils.InferenceResponse`."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: Failed | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Failed | None:
        return self._error


class Server:
    """What stands in for Triton: it runs the repository's ONNX files, and checks every tensor against config.pbtxt."""

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.calls, self.on_gpu, self.broken = repository, [], False, ""
        self.cancelled_after = 10**9
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        server = self

        class Request:
            """`pb_utils.InferenceRequest`."""

            def __init__(self, *, model_name: str = "", requested_output_names: Any = (), inputs: Any, **options: Any):
                self.model, self.wanted, self._inputs, self.options = (
                    model_name,
                    requested_output_names,
                    inputs,
                    options,
                )

            def inputs(self) -> list[Tensor]:
                return list(self._inputs)

            def is_cancelled(self) -> bool:
                return len(server.calls) > server.cancelled_after

            def exec(self) -> Response:
                server.calls.append(self.model)
                try:
                    return server.infer(self)
                except Exception as error:
                    return Response(error=Failed(str(error), 1))

        self.request = Request
        utils = ModuleType("triton_python_backend_utils")
        by_name = lambda tensors, name: next((one for one in tensors if one.name() == name), None)  # noqa: E731
        vars(utils).update(
            Tensor=Tensor,
            InferenceRequest=Request,
            InferenceResponse=Response,
            TritonError=Failed,
            TritonModelException=RuntimeError,
            PreferredMemory=lambda kind, device=0: kind,
            TRITONSERVER_MEMORY_CPU="cpu",
            get_input_tensor_by_name=lambda request, name: by_name(request.inputs(), name),
            get_output_tensor_by_name=lambda response, name: by_name(response.output_tensors(), name),
        )
        monkeypatch.setitem(sys.modules, utils.__name__, utils)
        spec = importlib.util.spec_from_file_location("model", repository / "fastsd" / "1" / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "model", module)
        spec.loader.exec_module(module)
        self.model = module.TritonPythonModel()
        self.model.initialize({"model_repository": str(repository / "fastsd"), "model_version": "1"})

    def infer(self, request: Any) -> Response:
        if request.model.startswith(f"fastsd-{self.broken}") and self.broken:
            raise RuntimeError("out of\nmemory")
        folder = self.repository / request.model
        parsed = config(folder)
        _check(request.inputs(), parsed.input)
        if request.model not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.sessions[request.model] = onnxruntime.InferenceSession(folder / "1" / "model.onnx", options)
        session = self.sessions[request.model]
        inputs = {
            one.name(): one.array.float().numpy() if isinstance(one.array, torch.Tensor) else one.array
            for one in request.inputs()
        }
        outputs = []
        kinds = {name: kind for name, (kind, _) in tensors(parsed.output).items()}
        for name, array in zip(request.wanted, session.run(list(request.wanted), inputs), strict=True):
            low = kinds[name] == "TYPE_BF16"
            on_gpu = self.on_gpu and request.options.get("preferred_memory") != "cpu"
            outputs.append(Tensor(name, torch.from_numpy(array).bfloat16() if low else array, on_gpu))
        _check(outputs, [one for one in parsed.output if one.name in request.wanted])
        return Response(outputs)

    def __call__(self, **inputs: Any) -> Response:
        [response] = self.model.execute([self.ask(**inputs)])
        return response

    def ask(self, **inputs: Any) -> Any:
        """A request of a client."""
        kinds = tensors(config(self.repository / "fastsd").input)
        given = []
        for name, values in inputs.items():
            array = np.array([one.encode() if isinstance(one, str) else one for one in values], NUMPY[kinds[name][0]])
            given.append(Tensor(name, array))
        request = self.request(inputs=given)
        _check(given, [one for one in config(self.repository / "fastsd").input if one.name in inputs])
        return request


def _check(given: Sequence[Tensor], specs: Any) -> None:
    """Names, types and shapes as Triton checks them."""
    known = tensors(specs)
    assert {one.name() for one in given} == known.keys()
    for one in given:
        kind, dims = known[one.name()]
        if kind == "TYPE_BF16":
            assert one.array.dtype == torch.bfloat16
        else:
            assert one.array.dtype == NUMPY[kind], one.name()
        assert len(dims) == one.array.ndim, one.name()
        assert all(dim in (-1, size) for dim, size in zip(dims, one.array.shape, strict=True)), one.name()


@pytest.fixture
def server(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield Server(repository, monkeypatch)


def images(response: Response) -> dict[str, Any]:
    assert not response.has_error(), response.error()
    _check(response.output_tensors(), config_outputs())
    return {one.name(): one.as_numpy() for one in response.output_tensors()}


def config_outputs() -> Any:
    return [
        SCHEMA.ModelOutput(name=name, data_type=SCHEMA.DataType.Value(kind), dims=dims)
        for name, kind, dims in triton_repo.OUTPUTS
    ]


# What a client sends, and the same as a call of the bundle.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt alone": ({"seed": [3], "steps": [2]}, {"seed": 3, "num_inference_steps": 2}),
    "all inputs": (
        {
            "negative_prompt": ["a dög"],
            "seed": [2**40],
            "steps": [3],
            "guidance_scale": [4.0],
            "scheduler": ["euler"],
            "height": [96],
            "width": [64],
        },
        {
            "negative_prompt": "a dög",
            "seed": 2**40,
            "num_inference_steps": 3,
            "guidance_scale": 4.0,
            "scheduler": "euler",
            "height": 96,
            "width": 64,
        },
    ),
    "one each": (
        {"prompt": ["a cat", "a red dog"], "seed": [5, 6], "steps": [2, 4], "guidance_scale": [1.0, 3.0]},
        {
            "prompt": ["a cat", "a red dog"],
            "seed": [5, 6],
            "num_inference_steps": [2, 4],
            "guidance_scale": [1.0, 3.0],
        },
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_it_makes_the_images_of_the_bundle(case: str, server: Server, bundled: Callable[[str], Path]) -> None:
    sent, called = CALLS[case]
    made = images(server(**{"prompt": ["the red cat"], **sent}))
    pipe = Pipeline.from_pretrained(bundled("sd"), backend="onnx")
    expected = pipe(**{"prompt": "the red cat", **called})
    # The engines and the arithmetic between them are the same.
    np.testing.assert_array_equal(made["image"], np.stack([np.asarray(image) for image in expected.images]))
    assert made["seed"].tolist() == expected.seeds
    called_models = [
        json.loads((server.repository / "manifest.json").read_text())["models"].index(name) for name in server.calls
    ]
    assert called_models == sorted(called_models)  # text, prepare, steps, VAE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_on_the_gpu_stays_there(
    dtype: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text that `prepare` hands to the denoiser is never read here, and numbers that numpy lacks pass unchanged."""
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    if dtype == "bfloat16":
        inside = copy / "fastsd" / "1" / "bundle"
        manifest = bundle.read(inside)
        [variant] = manifest.variants

        def lower(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(dataclasses.replace(one, dtype=dtype) if one.name in BFLOAT16 else one for one in specs)

        engines = tuple(
            dataclasses.replace(engine, inputs=lower(engine.inputs), outputs=lower(engine.outputs))
            for engine in variant.engines
        )
        lowered = dataclasses.replace(manifest, variants=(dataclasses.replace(variant, engines=engines),))
        (inside / bundle.MANIFEST).write_text(lowered.to_json())
        for engine in engines:
            path = copy / engine.options["model"] / "config.pbtxt"
            lines = [
                line.replace("TYPE_FP32", "TYPE_BF16") if any(f'name: "{one}"' in line for one in BFLOAT16) else line
                for line in path.read_text().splitlines()
            ]
            path.write_text("\n".join(lines))
    call: dict[str, Any] = {"prompt": ["the red cat"], "seed": [3], "steps": [3], "guidance_scale": [4.0]}
    monkeypatch.setattr(Tensor, "taken", [])
    server = Server(copy, monkeypatch)
    here = images(server(**call))["image"]
    names = {repr(capsule).split('"')[1] for capsule in Tensor.taken}  # '<capsule object "used_dltensor" at 0x...>'
    assert names == ({"used_dltensor"} if dtype == "bfloat16" else set())
    prepares = sum("prepare" in name for name in server.calls)
    server.on_gpu, server.calls = True, []
    np.testing.assert_array_equal(images(server(**call))["image"], here)
    assert (prepares, sum("prepare" in name for name in server.calls)) == (1, 2)  # once more for what is read
    full = images(Server(repository, monkeypatch)(**call))["image"]
    # bfloat16 has 8 bits: an image of other, not of broken, numbers.
    assert np.abs(full.astype(int) - here).max() <= (8 if dtype == "bfloat16" else 0)


ERRORS: dict[str, tuple[dict[str, Any], int, str]] = {
    "size": ({"height": [128]}, 3, "height 128.*-o DIR --height 128"),
    "sampler": ({"scheduler": ["heun"]}, 3, "has no sampler 'heun'"),
    "steps": ({"steps": [0]}, 3, "num_inference_steps"),
    "guidance": ({"guidance_scale": [float("nan")]}, 3, "guidance_scale"),
    "no text": ({"prompt": [b"\xff\xfe"]}, 3, "prompt is no UTF-8"),
    "no prompts": ({"prompt": []}, 3, "empty"),
    "two seeds for one image": ({"seed": [1, 2]}, 3, "seed"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_request_is_one_sentence(case: str, server: Server) -> None:
    given, code, message = ERRORS[case]
    error = server(**{"prompt": ["the cat"], "steps": [1], **given}).error()
    assert error is not None and error.number == code
    assert "\n" not in error.message()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error.message())


def test_every_request_has_its_response(server: Server) -> None:
    good = {"prompt": ["the cat"], "steps": [1], "seed": [1]}
    bad, none = {**good, "height": [8]}, {"steps": [1]}
    responses = server.model.execute([server.ask(**one) for one in (good, bad, none, good)])
    assert [one.has_error() for one in responses] == [False, True, True, False]
    assert "prompt is missing" in responses[2].error().message()
    first, last = (images(responses[i])["image"] for i in (0, 3))
    np.testing.assert_array_equal(first, last)


def test_a_failing_engine_and_a_client_that_left(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    call: dict[str, Any] = {"prompt": ["the cat"], "steps": [4], "seed": [1]}
    server.broken = "denoiser"
    error = server(**call).error()
    assert error is not None and error.number == Failed.INTERNAL
    assert error.message().startswith("Triton could not run fastsd-denoiser") and error.message().endswith("of memory")
    server.broken, server.calls, server.cancelled_after = "", [], 3
    error = server(**call).error()
    assert error is not None and error.number == Failed.CANCELLED
    assert not any("vae" in name for name in server.calls)
    server.cancelled_after = 10**9
    monkeypatch.setattr(Pipeline, "decode", lambda *_: 1 / 0)
    error = server(**call).error()
    assert error is not None and error.message() == "ZeroDivisionError: division by zero"


def test_a_changed_file_is_refused_when_the_model_is_loaded(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    inside = copy / "fastsd" / "1" / "bundle"
    (inside / "planted.json").write_text("{}")
    with pytest.raises(RuntimeError, match="planted"):
        Server(copy, monkeypatch)
    (inside / "planted.json").unlink()
    path = next(inside.rglob("*.gz"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RuntimeError, match="is damaged"):
        Server(copy, monkeypatch)


def test_it_is_written_without_torch(bundled: Callable[[str], Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime', 'google.protobuf'):\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from fastsd_export import triton_repo\n"
        "triton_repo.write(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(bundled("sd")), str(tmp_path / "models")]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "models" / "fastsd" / "config.pbtxt").is_file()
