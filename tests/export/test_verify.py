"""Gates against the measures' definitions, and the bisection on graphs with a fault planted in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fastsd import checkpoint, families
from fastsd.bundle import TensorSpec
from fastsd.errors import InputError, NumericError
from fastsd_export import reference, trace, verify
from fastsd_export.onnx import write
from fastsd_export.verify import Floor, Sample

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------------
# Measures


def test_compare_is_its_definition() -> None:
    a, b = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    measure = verify.compare(a, b)
    cosine = torch.nn.functional.cosine_similarity(*(torch.from_numpy(x).double().reshape(1, -1) for x in (a, b)))
    assert measure.cosine == pytest.approx(float(cosine), rel=1e-12)
    assert measure.max_abs == np.abs(a.astype(float) - b).max()
    assert measure.relative == measure.max_abs / np.abs(a.astype(float)).max()
    assert measure.finite
    assert verify.compare(a, a) == (pytest.approx(1, abs=1e-15), 0, 0, True)


ZERO, ONE = np.zeros(3, np.float32), np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("reference", "result", "wanted"),
    [
        pytest.param(ZERO, ZERO, (1.0, 0.0, 0.0), id="both-zero"),
        pytest.param(ZERO, ONE, (0.0, 1.0, math.inf), id="reference-zero"),
        pytest.param(ONE, ZERO, (0.0, 1.0, 1.0), id="result-zero"),
        pytest.param(ONE, -ONE, (-1.0, 2.0, 2.0), id="opposite"),
        pytest.param(ONE * 1e-30, ONE * 2e-30, (1.0, 1e-30, 1.0), id="small"),
        pytest.param(ONE * 3e38, ONE * 3e38, (1.0, 0.0, 0.0), id="large"),  # squares overflow float32
        pytest.param(ONE.astype(np.float16), torch.ones(3, dtype=torch.bfloat16), (1.0, 0.0, 0.0), id="dtypes"),
    ],
)
def test_compare_at_the_edges(reference: Any, result: Any, wanted: tuple[float, ...]) -> None:
    assert verify.compare(reference, result)[:3] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_no_number(bad: float, side: int) -> None:
    pair = [ONE.copy(), ONE.copy()]
    pair[side][1] = bad
    measure = verify.compare(*pair)
    assert not measure.finite and np.isnan(measure[:3]).all()


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((3,), (1, 3)), ((0,), (0,))], ids=str)
def test_shapes_that_cannot_be_compared(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        verify.compare(*map(np.zeros, shapes))
    with pytest.raises(InputError):
        verify.psnr(*map(np.zeros, shapes))


def picture(height: int, width: int, seed: int = 0) -> Any:
    """Something with edges, a gradient and noise, [height, width, 3] in 0..1."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([x / width, y / height, (x // 7 + y // 5) % 2], axis=-1)
    return np.clip(0.8 * base + 0.2 * np.random.default_rng(seed).random(base.shape), 0, 1)


def oracle_ssim(a: Any, b: Any) -> float:
    """Equations 6 and 12 to 16 of Wang et al. (2004), one convolution per moment."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[None, None]

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, window)

    x, y = (torch.from_numpy(z).permute(2, 0, 1)[:, None] for z in (a, b))
    mx, my = mean(x), mean(y)
    sxx, syy, sxy = mean((x - 0) ** 2) - mx**2, mean(y**2) - my**2, mean(x * y) - mx * my
    luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
    structure = (2 * sxy + 0.03**2) / (sxx + syy + 0.03**2)
    return float((luminance * structure).mean())


@pytest.mark.parametrize(("height", "width"), [(11, 11), (17, 40), (64, 48)])
@pytest.mark.parametrize("noise", [0.001, 0.05, 0.5])
def test_ssim_is_that_of_the_paper(height: int, width: int, noise: float) -> None:
    a = picture(height, width)
    b = np.clip(a + noise * np.random.default_rng(1).standard_normal(a.shape), 0, 1)
    assert verify.ssim(a, b) == pytest.approx(oracle_ssim(a, b), abs=1e-10)  # float64, products in another order
    assert verify.ssim(a[None], b[None]) == pytest.approx(verify.ssim(a, b), abs=1e-12)


def test_ssim_and_psnr_of_known_pairs() -> None:
    a = picture(32, 32)
    assert verify.ssim(a, a) == pytest.approx(1, abs=1e-12) and verify.psnr(a, a) == verify.SAME
    black, white = np.zeros((16, 16, 3)), np.ones((16, 16, 3))
    assert verify.ssim(black, white) == pytest.approx(0.01**2 / (1 + 0.01**2))  # flat: luminance alone
    assert verify.psnr(black, white) == 0
    assert verify.psnr(black, black + 1 / 255) == pytest.approx(20 * math.log10(255))
    assert verify.psnr(a.astype(np.float32), a) > 150
    with pytest.raises(InputError, match="at least 11"):
        verify.ssim(a[:10], a[:10])


# ------------------------------------------------------------------------------------------------------------
# Gates


def recorded(count: int = 4) -> list[Sample]:
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((count, 2, 50)).astype(np.float32)
    return [Sample({"x": x}, {"y": 3 * x, "z": x**2}, f"call {i}") for i, x in enumerate(inputs)]


def engine(y: Callable[[Any], Any] = lambda y: y, z: Callable[[Any], Any] = lambda z: z) -> Any:
    return lambda x: (y(3 * x), z(x**2))


def with_nan(values: Any) -> Any:
    values[0, 7] = np.nan
    return values


def off_by(share: float) -> Callable[[Any], Any]:
    def shift(values: Any) -> Any:
        values = values.copy()
        values[1, 3] += share * np.abs(values).max()
        return values

    return shift


PASS = [
    pytest.param("float32", engine(), id="same"),
    pytest.param("float32", engine(off_by(5e-5)), id="float32"),
    pytest.param("float16", engine(lambda y: y.astype(np.float16), lambda z: z.astype(np.float16)), id="float16"),
    pytest.param("bfloat16", engine(lambda y: torch.from_numpy(y).bfloat16()), id="bfloat16"),
    pytest.param("int8", engine(lambda y: (y * 4).round() / 4), id="int8"),
]


@pytest.mark.parametrize(("precision", "run"), PASS)
def test_what_passes_is_plain_json(precision: str, run: Any) -> None:
    report = verify.check_component("denoiser", run, recorded(), precision)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["samples"] == 4 and report["outputs"].keys() == {"y", "z"}
    measures = [verify.compare(s.outputs["y"], run(**s.inputs)[0]) for s in recorded()]
    assert report["outputs"]["y"]["cosine"] == min(m.cosine for m in measures)
    assert report["outputs"]["y"]["relative"] == max(m.relative for m in measures)


FAIL = [
    pytest.param("float32", engine(off_by(2e-4)), "y", "0.0002 of .* limit of 0.0001", id="float32"),
    pytest.param("float16", engine(lambda y: y, off_by(0.02)), "z", "0.02 of .* limit of 0.01", id="second-output"),
    pytest.param("bfloat16", engine(lambda y: y[:, ::-1]), "y", "cosine of .* floor of 0.998", id="cosine"),
    pytest.param("int8", engine(lambda y: np.sign(y)), "y", "cosine of 0.[78].* floor of 0.95", id="int8"),
    pytest.param("int8", engine(with_nan), "y", "NaN or Inf", id="nan"),
    pytest.param("float32", engine(lambda y: y * np.inf), "y", "NaN or Inf", id="inf"),
    pytest.param("float32", engine(lambda y: y[:1]), "y", r"shape \[1, 50\]", id="shape"),
    pytest.param("float32", engine(np.zeros_like), "y", "cosine of 0", id="zeros"),
]


@pytest.mark.parametrize(("precision", "run", "output", "message"), FAIL)
def test_what_strays_is_one_sentence(precision: str, run: Any, output: str, message: str) -> None:
    with pytest.raises(verify.Strayed, match=message) as error:
        verify.check_component("denoiser", run, recorded(), precision)
    text = str(error.value)
    assert text.startswith(f"denoiser in {precision}: its {output} (call ") and "\n" not in text
    assert (error.value.component, error.value.output) == ("denoiser", output)
    assert error.value.sample.label in text


def test_int8_is_held_to_a_floor_over_all_samples() -> None:
    def noisy(levels: list[float]) -> Any:
        calls, rng = iter(levels), np.random.default_rng(1)
        return engine(lambda y: y + next(calls) * np.abs(y).mean() * rng.standard_normal(y.shape))

    report = verify.check_component("denoiser", noisy([0.35, 0.02, 0.02, 0.02]), recorded(), "int8")
    assert report["outputs"]["y"]["cosine"] < 0.98 < 0.99 < report["outputs"]["y"]["together"]
    with pytest.raises(
        verify.Strayed, match=r"its y has a cosine of 0.98\d* .* over all 4 samples, .* floor of 0.99"
    ) as error:
        verify.check_component("denoiser", noisy([0.2, 0.3, 0.2, 0.2]), recorded(), "int8")
    assert error.value.sample.label == "call 1" and error.value.floor == Floor(0.99, None)


def test_one_bad_sample_of_many_fails() -> None:
    for place in range(5):
        calls = iter(range(5))
        with pytest.raises(verify.Strayed, match=f"call {place}"):
            run = engine(lambda y, calls=calls, place=place: with_nan(y) if next(calls) == place else y)
            verify.check_component("prepare", run, recorded(5), "bfloat16")


def test_what_cannot_be_verified() -> None:
    with pytest.raises(InputError, match="at least 4 inputs, not 3"):
        verify.check_component("denoiser", engine(), recorded(3), "float32")
    with pytest.raises(InputError, match="no floor: use float32, float16"):
        verify.check_component("denoiser", engine(), recorded(), "float8")
    with pytest.raises(NumericError, match="1 outputs, not y, z"):
        verify.check_component("denoiser", lambda x: (x,), recorded(), "float32")


@pytest.mark.parametrize("precision", verify.FLOORS)
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_3", "prepare", "denoiser", "vae_decoder"])
def test_floors_grow_with_precision(component: str, precision: str) -> None:
    order = list(verify.FLOORS)
    least = verify.floor(component, precision)
    if (place := order.index(precision)) > 0:
        better = verify.floor(component, order[place - 1])
        assert least.cosine < better.cosine
        assert least.relative is None or (better.relative is not None and least.relative > better.relative)
    assert precision in verify.IMAGE_FLOORS


def test_images_end_to_end() -> None:
    latents = RNG.standard_normal((2, 1, 4, 8, 8))
    images = [picture(64, 64, seed)[None] for seed in (0, 1)]
    same = verify.check_images(
        list(zip(latents, latents, strict=True)), list(zip(images, images, strict=True)), "float32"
    )
    assert json.loads(json.dumps(same, allow_nan=False)) == same and same["runs"] == 2
    for which in ("worst", "together"):
        assert same[which] == {"cosine": pytest.approx(1), "psnr": pytest.approx(verify.SAME), "ssim": pytest.approx(1)}

    def fails(latents_off: Any, image_off: Any, precision: str) -> str:
        pairs = [(latents[0], latents[0] + latents_off)]
        with pytest.raises(NumericError) as error:
            verify.check_images(pairs, [(images[0], images[0]), (images[1], images[1] + image_off)], precision)
        return str(error.value)

    assert "its worst image has a cosine of the latents of" in fails(
        RNG.standard_normal(latents[0].shape), 0, "bfloat16"
    )
    assert "its worst image has a PSNR of 20 to float32's, below the floor of 25" in fails(0, 0.1, "bfloat16")
    # The mean square of both images is half that of the worse one.
    assert "its images together have a PSNR of 23.01 to float32's, below the floor of 25" in fails(0, 0.1, "int8")
    stripes = 0.05 * (np.arange(64) % 2 * 2 - 1)[None, None, :, None]
    assert "an SSIM of" in fails(0, stripes, "bfloat16")
    assert "the images hold NaN" in fails(0, np.nan, "bfloat16")
    assert "the latents hold NaN" in fails(np.nan, 0, "bfloat16")
    with pytest.raises(InputError, match="at least one run"):
        verify.check_images([], [], "float32")
    with pytest.raises(InputError, match="no floor"):
        verify.check_images([(ONE, ONE)], [(ONE, ONE)], "float8")


def test_samples_are_fed_in_the_engines_dtypes() -> None:
    specs = [TensorSpec("ids", "int64", (1, 3)), TensorSpec("x", "float16", (3,))]
    taken: dict[str, Any] = {}
    run = verify.feed(lambda **inputs: taken.update(inputs) or (), specs)
    run(ids=np.array([[1, 2, 3]]), x=ONE)
    assert {name: value.dtype.name for name, value in taken.items()} == {"ids": "int64", "x": "float16"}


# ------------------------------------------------------------------------------------------------------------
# The first tensor that strays

WIDTH, FLOOR = 16, Floor(0.99999, 1e-4)


def network(
    folder: Path,
    *,
    depth: int = 12,
    weight: int | None = None,
    operator: tuple[int, str] | None = None,
    dtype: int = TensorProto.FLOAT,
    prefix: str = "",
    external: bool = False,
) -> Path:
    """Two branches of residual blocks, interleaved in the file, that meet at the end; with a fault in it.

    Args:
        folder: where the file goes.
        depth: blocks of each branch.
        weight: number of a block whose weight is wrong.
        operator: number of a block, and what takes the place of its Tanh.
        dtype: of its arithmetic.
        prefix: of the names of blocks, so that they have no name in common with another's.
        external: weights in a file beside it.
    """
    rng = np.random.default_rng(7)
    low = dtype != TensorProto.FLOAT
    nodes, weights = [], []
    if low:
        nodes += [helper.make_node("Cast", [name], [f"{name}_low"], f"cast_{name}", to=dtype) for name in "ab"]
    states = {name: f"{name}_low" if low else name for name in "ab"}
    for i in range(2 * depth):
        branch = "ab"[i % 2]
        name, state = f"{prefix}block{i}", states[branch]
        values = rng.standard_normal((WIDTH, WIDTH)) / 4
        if weight == i:
            values[3, 5] += 1
        weights.append(numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(dtype)), f"{name}_weight"))
        kind = operator[1] if operator and operator[0] == i else "Tanh"
        nodes += [
            helper.make_node("MatMul", [state, f"{name}_weight"], [f"{name}_linear"], f"{name}_matmul"),
            helper.make_node(kind, [f"{name}_linear"], [f"{name}_act"], f"{name}_act"),
            helper.make_node("Add", [state, f"{name}_act"], [name], f"{name}_add"),
        ]
        states[branch] = name
    # A shape is no number that can stray, and the constant depends on no input.
    weights.append(numpy_helper.from_array(np.array([0], np.int64), "first"))
    nodes += [
        helper.make_node("Mul", [states["a"], states["b"]], ["product"], "meet"),
        helper.make_node("Shape", ["product"], ["shape"], "shape"),
        helper.make_node("Reshape", ["product", "shape"], ["last" if low else "y"], "reshape"),
    ]
    if low:
        nodes.append(helper.make_node("Cast", ["last"], ["y"], "cast_y", to=TensorProto.FLOAT))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("a", "b", "y")]
    graph = helper.make_graph(nodes, "network", values[:2], values[2:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / f"{prefix}{weight}-{operator and operator[1]}-{dtype}.onnx"
    options = {"location": f"{path.name}.data", "size_threshold": 0} if external else {}
    onnx.save_model(model, path, save_as_external_data=external, **options)
    return path


INPUTS = {name: np.random.default_rng(i).standard_normal((3, WIDTH)).astype(np.float32) for i, name in enumerate("ab")}

TARGETS: dict[str, Callable[[Path], verify.Probe]] = {
    "onnxruntime": lambda path: verify.onnxruntime_probe(path, optimised=True),
    "openvino": lambda path: verify.openvino_probe(path, "float32"),
}

FAULTS = [
    *(pytest.param({"weight": i}, f"block{i}_linear", "MatMul", id=f"weight-{i}") for i in (0, 1, 10, 13, 23)),
    *(pytest.param({"operator": (i, "Sin")}, f"block{i}_act", "Sin", id=f"sin-{i}") for i in (4, 11)),
    pytest.param({"operator": (6, "Log")}, "block6_act", "Log", id="nan"),
]


# OpenVINO takes a second for each: three of them will do.
@pytest.mark.parametrize(
    ("target", "fault", "tensor", "operator"),
    [
        pytest.param(target, *case.values, id=f"{target}-{case.id}")
        for target in TARGETS
        for case in FAULTS
        if target == "onnxruntime" or case.id in ("weight-10", "sin-11", "nan")
    ],
)
def test_the_first_stray_is_the_planted_one(
    tmp_path: Path, target: str, fault: dict[str, Any], tensor: str, operator: str
) -> None:
    right, wrong = network(tmp_path), network(tmp_path, **fault)
    asked: list[str] = []
    probe = TARGETS[target](wrong)

    def run(names: Sequence[str], inputs: Any) -> Any:
        asked.extend(names)
        return probe.run(names, inputs)

    counted = replace(probe, run=run)
    found = verify.first_stray(right, verify.onnxruntime_probe(right), counted, INPUTS, FLOOR)
    # Both graphs have the same names, so what computes it is read from the right one.
    assert found.tensor == tensor and found.operator == (operator if operator == "MatMul" else "Tanh")
    assert found.compared == found.tensors and not verify._passes(found.measure, FLOOR)
    assert found.measure.finite != (operator == "Log")
    assert all(verify._passes(measure, FLOOR) for measure in found.inputs.values())
    assert len(asked) <= 3 * math.log2(found.tensors)  # once more for each branch that the search changed to
    assert tensor in str(found) and "\n" not in str(found)
    assert found.weights == ((f"{tensor.partition('_')[0]}_weight",) if operator == "MatMul" else ())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({right.name, wrong.name})  # nothing is left


@pytest.mark.parametrize("target", TARGETS)
def test_external_data_are_found(tmp_path: Path, target: str) -> None:
    right, wrong = network(tmp_path, external=True), network(tmp_path, weight=9, external=True)
    probe = TARGETS[target](wrong)
    found = verify.first_stray(right, verify.onnxruntime_probe(right), probe, INPUTS, FLOOR)
    assert found.tensor == "block9_linear"


def test_a_graph_in_another_precision_is_compared_by_names(tmp_path: Path) -> None:
    least = verify.floor("denoiser", "float16")
    right, low = network(tmp_path), network(tmp_path, dtype=TensorProto.FLOAT16)
    reference, target = verify.onnxruntime_probe(right), verify.onnxruntime_probe(low)
    (wanted,), (got,) = reference.run(["y"], INPUTS), target.run(["y"], INPUTS)
    assert verify._passes(verify.compare(wanted, got), least)
    with pytest.raises(InputError, match="'y' does not stray"):
        verify.first_stray(right, reference, target, INPUTS, least)
    wrong = verify.onnxruntime_probe(network(tmp_path, dtype=TensorProto.FLOAT16, weight=14))
    assert verify.first_stray(right, reference, wrong, INPUTS, least).tensor == "block14_linear"
    some = replace(wrong, names=frozenset(name for name in wrong.names if not name.endswith("_linear")))
    found = verify.first_stray(right, reference, some, INPUTS, least)
    assert found.tensor == "block14_act" and found.compared < found.tensors
    assert f"{found.compared} of {found.tensors} tensors have the same name" in str(found)


def test_graphs_without_a_name_in_common_are_refused(tmp_path: Path) -> None:
    right, other = network(tmp_path), network(tmp_path, prefix="other_", weight=2)
    target = verify.onnxruntime_probe(other)
    target = replace(target, names=target.names - {"product"})
    with pytest.raises(InputError, match="no tensor before 'y' of the same name"):
        verify.first_stray(right, verify.onnxruntime_probe(right), target, INPUTS, FLOOR)


def test_a_tensor_of_another_shape_strays(tmp_path: Path) -> None:
    right = network(tmp_path)
    probe = verify.onnxruntime_probe(right)
    cut = replace(probe, run=lambda names, inputs: [value[:1] for value in probe.run(names, inputs)])
    found = verify.first_stray(right, probe, cut, INPUTS, FLOOR)
    assert found.tensor == "block0_linear" and not found.measure.finite and not found.inputs


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_wrong_weight_of_a_real_denoiser_is_named(
    family: str, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    source = checkpoint.source(checkpoint.resolve(str(make_checkpoint(family))), None)
    components = families.load(source, torch.float32, torch.device("cpu"))
    module = families.family(components.index["_class_name"])
    traced = trace.denoiser(module, components, 77)
    ranges = dict.fromkeys(("batch", "height", "width"), (4, 8, 16)) | {"tokens": (77, 77, 600)}
    graph = write(traced, ranges, tmp_path, precision="float32", opset=20).path
    sample = reference.samples(traced, [{name: tensor.numpy() for name, tensor in traced.inputs.items()}])[0]
    right, least = verify.onnxruntime_probe(graph), verify.floor("denoiser", "float32")
    matrices = [i for i, w in enumerate(onnx.load(graph).graph.initializer) if len(w.dims) == 2 and min(w.dims) > 8]
    for place in (len(matrices) // 4, len(matrices) // 2, len(matrices) - 2):
        model = onnx.load(graph)
        weight = model.graph.initializer[matrices[place]]
        values = numpy_helper.to_array(weight).copy()
        values[2, 3] += 8 * values.std()
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        wrong = tmp_path / "wrong.onnx"
        onnx.save(model, wrong)
        for probe in (make(wrong) for make in TARGETS.values()):
            with pytest.raises(verify.Strayed):
                verify.check_component(
                    "denoiser", lambda probe=probe, **inputs: probe.run(["prediction"], inputs), 4 * [sample], "float32"
                )
            found = verify.first_stray(graph, right, probe, sample.inputs, least)
            assert found.weights == (weight.name,)
