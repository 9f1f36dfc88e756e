"""Graphs against eager torch on ONNX Runtime, and what they are made of."""

import copy
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from fastsd.errors import InputError
from fastsd_export import onnx as graphs
from fastsd_export.trace import Traced, shapes

DYNAMIC = {"batch": (1, 2, 4), "height": (2, 8, 24), "width": (2, 8, 24), "tokens": (1, 20, 64)}

STATIC = {"batch": (1, 1, 1), "height": (8, 8, 8), "width": (6, 6, 6), "tokens": (9, 9, 9)}
DUAL = {"transformer": {"num_layers": 2, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}}  # SD3.5 medium
FLUX = {"transformer": {"num_layers": 1, "num_single_layers": 1}}
FEW = {"unet": {"up_block_types": ("UpBlock2D", "UpBlock2D")}}  # attention on the way down and in the middle
LCM = {"unet": {"time_cond_proj_dim": 6}}
SD2 = {"unet": {"use_linear_projection": True, "attention_head_dim": (2, 4)}}
UNGUIDED = {"transformer": {"guidance_embeds": False}}  # Flux.1 schnell

# Family, component and options, then sizes beside the example's: batch, height, width, tokens.
UNET = [(1, 9, 12, 7), (3, 2, 5, 1)]
TRANSFORMER = [(1, 8, 6, 7), (3, 2, 24, 1)]
VAE = [(1, 2, 5, 1), (1, 1, 1, 1)]
PARTS: dict[str, tuple[str, str, dict[str, Any], list[tuple[int, int, int, int]]]] = {
    "clip": ("sd", "text_encoder", {}, []),
    "clip-projected": ("sdxl", "text_encoder_2", {}, []),
    "t5": ("flux", "text_encoder_2", {}, [(1, 1, 1, 1), (1, 1, 1, 33)]),
    "sd-denoiser": ("sd", "denoiser", FEW, UNET),
    "lcm-prepare": ("sd", "prepare", LCM, UNET),
    "sdxl-prepare": ("sdxl", "prepare", {}, UNET),
    "sd3-prepare": ("sd3", "prepare", {}, TRANSFORMER),
    "sd35-denoiser": ("sd3", "denoiser", DUAL, TRANSFORMER),
    "flux-prepare": ("flux", "prepare", {}, TRANSFORMER),
    "flux-denoiser": ("flux", "denoiser", FLUX, TRANSFORMER),
    "vae-decoder": ("flux", "vae_decoder", {}, VAE),
    "vae-encoder": ("sd", "vae_encoder", {}, VAE),
}
SLOW_PARTS = {
    "clip-penultimate": ("sdxl", "text_encoder", {}, []),
    "schnell-prepare": ("flux", "prepare", UNGUIDED, TRANSFORMER),
    "sd-prepare": ("sd", "prepare", {}, UNET),
    "sd-whole-denoiser": ("sd", "denoiser", {}, UNET),
    "sd2-denoiser": ("sd", "denoiser", SD2, UNET),
    "sdxl-denoiser": ("sdxl", "denoiser", {}, UNET),
    "sd3-denoiser": ("sd3", "denoiser", {}, TRANSFORMER),
    "flux-2-denoiser": ("flux", "denoiser", {}, TRANSFORMER),
    "sd3-text-1": ("sd3", "text_encoder", {}, []),
    "sd3-text-2": ("sd3", "text_encoder_2", {}, []),
    "sd3-text-3": ("sd3", "text_encoder_3", {}, [(1, 1, 1, 33)]),
    "flux-clip": ("flux", "text_encoder", {}, []),
    "sd-vae-decoder": ("sd", "vae_decoder", {}, VAE),
    "sd3-vae-encoder": ("sd3", "vae_encoder", {}, VAE),
}
# Relative to the largest value: sums in another order; seen up to 4e-6.
TOLERANCE = 3e-5
Export = Callable[..., tuple[Traced, graphs.Graph]]


def parts(*tables: Mapping[str, Any]) -> Any:
    return pytest.mark.parametrize("part", [one for table in tables for one in table])


def export(exported: Export, part: str, *arguments: Any, **options: Any) -> tuple[Traced, graphs.Graph]:
    family, component, given, _ = {**PARTS, **SLOW_PARTS}[part]
    return exported(family, component, *arguments, **options, **given)


def arrays(traced: Traced, sizes: Mapping[str, int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of the given sizes: random, of the kind of the example's."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, shape in shapes(traced, sizes).items():
        example = traced.inputs[name].flatten()
        taken = torch.randint(len(example), shape, generator=generator)
        made[name] = example[taken].to(dtype if name in traced.low else example.dtype)
    return made


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def eager(traced: Traced, inputs: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        return [one.numpy() for one in traced.module(**inputs)]


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


def initialisers(path: Path) -> dict[str, np.ndarray]:
    proto = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


def check_outputs(exported: Export, part: str) -> None:
    traced, graph = export(exported, part)
    run = session(graph.path)
    for sizes in [None, *{**PARTS, **SLOW_PARTS}[part][3]]:
        given = dict(traced.sizes) if sizes is None else dict(zip(DYNAMIC, sizes, strict=True))
        inputs = arrays(traced, given)
        got = run.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for name, ours, theirs in zip(traced.outputs, got, eager(traced, inputs), strict=True):
            assert ours.dtype == np.float32
            if name == "position":  # constants, sliced
                assert np.array_equal(ours, theirs), given
            assert error(ours, theirs) < TOLERANCE, (name, given)


@parts(PARTS)
def test_outputs_are_those_of_eager_torch_at_all_sizes(exported: Export, part: str) -> None:
    check_outputs(exported, part)


@pytest.mark.full
@parts(SLOW_PARTS)
def test_outputs_of_the_other_parts_are_those_of_eager_torch(exported: Export, part: str) -> None:
    check_outputs(exported, part)


@parts(PARTS)
def test_every_initialiser_is_rebuilt_from_the_state_dict_bit_for_bit(exported: Export, part: str) -> None:
    traced, graph = export(exported, part)
    state = traced.module.component.state_dict()
    rebuilt = graphs.rebuild(graph.weights, state)
    stored = initialisers(graph.path)
    assert stored.keys() == graph.weights.keys()
    for name, array in stored.items():
        if graph.weights[name] is None:
            assert name not in rebuilt
        else:
            assert rebuilt[name].shape == array.shape, name
            assert bits(rebuilt[name]) == array.tobytes(), name
    # What a constant holds does not change with the weights: masks, frequencies, tables, sizes.
    constants = sum(array.nbytes for name, array in stored.items() if graph.weights[name] is None)
    parameters = {weight.parameter for weight in graph.weights.values() if weight is not None}
    read = sum(state[name].nbytes for name in parameters)
    assert sum(array.nbytes for array in stored.values()) - constants <= read  # none is stored twice
    assert constants < 200_000


@parts(PARTS)
def test_graph_is_simple(exported: Export, part: str) -> None:
    traced, graph = export(exported, part)
    model = onnx.load(graph.path)
    proto = model.graph
    assert [one.name for one in proto.input] == list(traced.inputs)
    assert [one.name for one in proto.output] == list(traced.outputs)
    assert not model.functions and [(one.domain, one.version) for one in model.opset_import] == [("", 20)]
    read = Counter(name for node in proto.node for name in node.input)
    read.update(one.name for one in proto.output)
    made = {name for node in proto.node for name in node.output if name}
    initialisers = {tensor.name for tensor in proto.initializer}
    assert initialisers <= read.keys() and not initialisers & made
    assert all(any(name in read for name in node.output) for node in proto.node)  # no dead node
    for node in proto.node:  # constants are folded
        sources = set(node.input) - {""}
        assert not sources <= initialisers or node.op_type in {"Gather"}, node.name
    assert not {"Einsum", "Identity", "Loop", "If", "SequenceAt", "CastLike", "Constant"} & graph.nodes.keys()
    assert graph.nodes == dict(Counter(node.op_type for node in proto.node))
    kinds = {one.type.tensor_type.elem_type for one in onnx.shape_inference.infer_shapes(model).graph.value_info}
    assert not kinds & {onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
    # The exporter's notes name the files of the machine; the layer of a node is kept.
    assert not re.search(rb"\.py\b|site-packages", graph.path.read_bytes())
    layers = {entry.value for node in proto.node for entry in node.metadata_props if entry.key == "layer"}
    assert layers and layers <= {name for name, _ in traced.module.component.named_modules()}


def test_flux_projection_of_two_inputs_is_two_initialisers(exported: Export) -> None:
    _, graph = export(exported, "flux-denoiser")
    name = "single_transformer_blocks.0.proj_out.weight"
    made = {key: weight for key, weight in graph.weights.items() if weight is not None and weight.parameter == name}
    assert made == {
        f"{name}/0": graphs.Weight(name, (32, 160), "float32", (("slice", (1, 0, 32)), ("transpose", (1, 0)))),
        f"{name}/1": graphs.Weight(name, (32, 160), "float32", (("slice", (1, 32, 160)), ("transpose", (1, 0)))),
    }


def test_attention_is_one_operator_from_opset_23_on_and_five_before(exported: Export) -> None:
    _, apart = export(exported, "sd35-denoiser")
    _, whole = export(exported, "sd35-denoiser", "float16", 23, STATIC)
    assert (apart.nodes["Softmax"], whole.nodes["Attention"]) == (3, 3)
    assert "Attention" not in apart.nodes and "Softmax" not in whole.nodes


def norms(path: Path) -> dict[str, set[int]]:
    """Dtypes of what the norms of a graph read, and of means over squares taken apart."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    graph = model.graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in [*graph.value_info, *graph.input, *graph.output]}
    kinds |= {one.name: one.data_type for one in graph.initializer}
    found: dict[str, set[int]] = {}
    for node in graph.node:
        if node.op_type in graphs.NORMS | {"ReduceMean"}:
            found.setdefault(node.op_type, set()).add(kinds[node.input[0]])
    return found


@pytest.mark.parametrize(
    ("part", "opset", "expected", "scales"),
    [
        ("sd35-denoiser", 23, {"LayerNormalization", "RMSNormalization"}, "float32"),
        # Taken apart the mean is in float32, and the scale, after it, is not.
        ("t5", 20, {"ReduceMean"}, "float16"),
        ("vae-encoder", 20, {"InstanceNormalization"}, "float16"),
        pytest.param("flux-denoiser", 20, {"LayerNormalization", "ReduceMean"}, "float32", marks=pytest.mark.full),
        pytest.param("vae-decoder", 22, {"GroupNormalization"}, "float32", marks=pytest.mark.full),
        pytest.param("clip", 23, {"LayerNormalization"}, "float32", marks=pytest.mark.full),
    ],
)
def test_float16_with_norms_in_float32(
    exported: Export, part: str, opset: int, expected: set[str], scales: str
) -> None:
    traced, graph = export(exported, part, "float16", opset, STATIC)
    assert norms(graph.path) == {name: {onnx.TensorProto.FLOAT} for name in expected}
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for weight in graph.weights.values():
        if weight is not None:
            kinds["norm" in weight.parameter].add(weight.dtype)
    # transformers keeps T5's wo in float32
    assert kinds == {True: {scales}, False: {"float16", "float32"} if part == "t5" else {"float16"}}
    sizes = {name: value[0] for name, value in STATIC.items()}
    inputs = arrays(traced, sizes, torch.float16)
    assert all(isinstance(size, int) for spec in (*graph.inputs, *graph.outputs) for size in spec.shape)
    assert {one.name: one.dtype for one in graph.inputs} == {
        name: str(tensor.dtype).removeprefix("torch.") for name, tensor in inputs.items()
    }
    got = session(graph.path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    want = eager(
        traced, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    )
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs) < 1e-2  # 11 bits, over a dozen layers; seen 1.2e-3


@pytest.mark.parametrize("part", [pytest.param("clip", marks=pytest.mark.full), "vae-encoder"])
def test_bfloat16_in_the_standards_own_evaluator(exported: Export, part: str) -> None:
    traced, graph = export(exported, part, "bfloat16", 22, STATIC)
    assert set(map(frozenset, norms(graph.path).values())) == {frozenset({onnx.TensorProto.FLOAT})}
    kinds = {weight.dtype for weight in graph.weights.values() if weight and "norm" not in weight.parameter}
    assert kinds == {"bfloat16"}
    inputs = arrays(traced, {name: value[0] for name, value in STATIC.items()})
    got = onnx.reference.ReferenceEvaluator(str(graph.path)).run(
        None, {name: one.numpy() for name, one in inputs.items()}
    )
    for ours, theirs in zip(got, eager(traced, inputs), strict=True):
        assert ours.dtype == np.float32 and error(ours, theirs) < 0.1  # 8 bits, over a dozen layers; seen 0.035


@pytest.mark.parametrize("part", ["sd-denoiser", "sd35-denoiser", "flux-denoiser"])
def test_a_fine_tune_in_the_stripped_graph_gives_its_outputs(exported: Export, part: str, tmp_path: Path) -> None:
    traced, graph = export(exported, part)
    bare = tmp_path / "bare.onnx"
    graphs.strip(graph.path, graph.weights, bare)
    kept = sum(array.nbytes for name, array in initialisers(graph.path).items() if graph.weights[name] is None)
    structure = onnx.load(graph.path)
    del structure.graph.initializer[:]
    assert bare.stat().st_size < kept + len(structure.SerializeToString()) + 250 * len(graph.weights)

    tuned = copy.deepcopy(traced.module)
    generator = torch.Generator().manual_seed(5)
    for tensor in tuned.component.state_dict().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    graphs.fill(bare, graph.weights, tuned.component.state_dict())
    inputs = arrays(traced, traced.sizes)
    [got] = session(bare).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        [want] = tuned(**inputs)
    assert error(got, want.numpy()) < TOLERANCE
    assert error(got, eager(traced, inputs)[0]) > 0.01

    before = bare.with_name("bare.onnx.data").read_bytes()
    state = tuned.component.state_dict()
    name = next(weight.parameter for weight in graph.weights.values() if weight and "norm" not in weight.parameter)
    lacking = {key: one for key, one in state.items() if key != name}
    turned = state | {name: state[name][None]}
    for refused, sentence in ((lacking, f"the weights lack {name}: give"), (turned, f"'{name}' is [1, ")):
        with pytest.raises(InputError, match=re.escape(sentence)):
            graphs.fill(bare, graph.weights, refused)
        with pytest.raises(InputError, match=re.escape(sentence)):
            graphs.rebuild(graph.weights, refused)
    assert bare.with_name("bare.onnx.data").read_bytes() == before  # a failed one leaves what was there
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bare.onnx", "bare.onnx.data"]


def test_weights_above_the_limit_have_a_file_of_their_own(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, whole = export(exported, "lcm-prepare")
    monkeypatch.setattr(graphs, "EXTERNAL", 10_000)
    (tmp_path / "prepare.onnx").write_bytes(b"an older one")
    graph = graphs.write(traced, DYNAMIC, tmp_path, precision="float32", opset=20)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["prepare.onnx", "prepare.onnx.data"]
    assert graph == replace(whole, path=graph.path)
    apart, together = initialisers(graph.path), initialisers(whole.path)
    assert all(np.array_equal(apart[name], together[name]) for name in graph.weights)
    proto, other = (onnx.load(one.path, load_external_data=False) for one in (graph, whole))
    places = [{one.key: one.value for one in tensor.external_data} for tensor in proto.graph.initializer]
    assert {place.get("location", "prepare.onnx.data") for place in places} == {"prepare.onnx.data"}
    assert all(int(place.get("offset", 0)) % 4096 == 0 for place in places)
    inputs = {name: tensor.numpy() for name, tensor in arrays(traced, traced.sizes).items()}
    for ours, theirs in zip(session(graph.path).run(None, inputs), session(whole.path).run(None, inputs), strict=True):
        assert np.array_equal(ours, theirs)
    for one in (proto, other):
        del one.graph.initializer[:]
    assert proto.SerializeToString() == other.SerializeToString()  # the same export is the same graph
    graphs.strip(whole.path, graph.weights, tmp_path / "bare.onnx")
    graphs.fill(tmp_path / "bare.onnx", graph.weights, traced.module.component.state_dict())
    assert (tmp_path / "bare.onnx.data").read_bytes() == (tmp_path / "prepare.onnx.data").read_bytes()


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "opset-26": ({"opset": 26}, "no float32 graph can be written in opset 26: use 18 to 25"),
    "opset-17": ({"opset": 17}, "no float32 graph can be written in opset 17: use 18 to 25"),
    "opset-text": ({"opset": "20"}, "no float32 graph can be written in opset '20': use 18 to 25"),
    "bfloat16-20": ({"precision": "bfloat16"}, "no bfloat16 graph can be written in opset 20: use 22 to 25"),
    "int8": ({"precision": "int8"}, "there is no precision 'int8': use float32, float16, bfloat16"),
    "order": (
        {"height": (8, 4, 16)},
        r"range of 'height' is \(8, 4, 16\); it must be whole numbers 1 <= min <= opt <= max",
    ),
    "zero": ({"batch": (0, 1, 2)}, "range of 'batch' .* whole numbers 1 <= min"),
    "float": ({"width": (2, 4.0, 8)}, "range of 'width' .* whole numbers"),
    "odd": ({"width": (2, 5, 8)}, "range of 'width' .* multiples of 2 up to 24"),
    "beyond-the-table": ({"height": (2, 8, 26)}, "range of 'height' .* multiples of 2 up to 24"),
    "missing": ({"tokens": None}, "the denoiser has no range for 'tokens': give its min, opt and max"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_written_is_refused(traced: Callable[..., Traced], tmp_path: Path, case: str) -> None:
    changes, sentence = REFUSALS[case]
    given = {"precision": "float32", "opset": 20} | {k: v for k, v in changes.items() if k in ("precision", "opset")}
    ranges = {k: v for k, v in (DYNAMIC | changes).items() if k in DYNAMIC and v is not None}
    with pytest.raises(InputError, match=sentence):
        graphs.write(traced("sd3", "denoiser"), ranges, tmp_path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "component", "precision", "opset"),
    [
        ("onnx", "denoiser", "float32", 20),
        ("onnx", "denoiser", "bfloat16", 22),
        ("openvino", "text_encoder", "float32", 20),
        ("tensorrt", "denoiser", "float16", 23),
        ("tensorrt-rtx", "vae_decoder", "bfloat16", 22),
    ],
)
def test_opset_by_target(target: str, component: str, precision: str, opset: int) -> None:
    assert graphs.opset_of(target, component, precision) == opset
    with pytest.raises(InputError, match="no ONNX graph for the target 'aoti'"):
        graphs.opset_of("aoti", component)


@pytest.mark.full
@pytest.mark.parametrize("opset", range(18, 26))
@parts({name: PARTS[name] for name in ("clip", "t5", "sd-denoiser", "sd35-denoiser", "vae-decoder")})
def test_every_opset_runs(exported: Export, part: str, opset: int) -> None:
    traced, graph = export(exported, part, opset=opset)
    inputs = arrays(traced, traced.sizes)
    got = session(graph.path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    for ours, theirs in zip(got, eager(traced, inputs), strict=True):
        assert error(ours, theirs) < TOLERANCE


FULL_SIZE = """
import resource, sys
from pathlib import Path
import torch
from fastsd import families, random_weights
from fastsd_export import onnx, trace

source = random_weights.source("sd15")
components = families.load(source, torch.float32, torch.device("cpu"), only={"unet"})
family = families.family(source.index["_class_name"])
weights = sum(one.nbytes for one in components.denoiser.parameters())
ranges = {"batch": (1, 2, 2), "height": (32, 64, 96), "width": (32, 64, 96), "tokens": (77, 77, 77)}
graph = onnx.write(trace.denoiser(family, components, 77), ranges, Path(sys.argv[1]), precision=sys.argv[2], opset=20)
print(weights, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, graph.path)
"""


@pytest.mark.full
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_full_size_unet_is_not_held_twice(tmp_path: Path, precision: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FULL_SIZE, str(tmp_path), precision]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    weights, peak, path = ran.stdout.split()[-3:]
    assert int(peak) <= 2.5 * int(weights)
    written = sum(one.stat().st_size for one in tmp_path.iterdir())
    # `prepare` has the keys and values of the text and the embeddings of the time: 5 % of the weights.
    assert written < int(weights) * (1.01 if precision == "float32" else 0.51)
    onnx.checker.check_model(path, full_check=True)
