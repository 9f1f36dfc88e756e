"""Gates: an engine's results against those of the float32 component, and where a graph first strays from them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsd.arrays import to_numpy
from fastsd.bundle import TensorSpec
from fastsd.errors import InputError, MissingExtraError, NumericError

Numbers = NDArray[Any]
Run = Callable[..., Sequence[Any]]
Report = dict[str, Any]  # plain JSON

SAMPLES = 4  # the least that a component is run on
SAME = 200.0  # PSNR in dB of equal images: finite, so that JSON can hold it


class Sample(NamedTuple):
    """One call of a component in float32.

    Attributes:
        inputs: by name.
        outputs: by name, in the component's order.
        label: where in which trajectory it was taken.
    """

    inputs: dict[str, Numbers]
    outputs: dict[str, Numbers]
    label: str = ""


class Measure(NamedTuple):
    """How a result differs from its reference; NaN where either is not finite.

    Attributes:
        cosine: of the angle between them.
        max_abs: largest difference.
        relative: the same over the reference's largest magnitude.
        finite: neither holds NaN or Inf.
    """

    cosine: float
    max_abs: float
    relative: float
    finite: bool


class Floor(NamedTuple):
    """What a component must reach.

    Attributes:
        cosine: the least of any sample.
        relative: the largest relative difference of any sample; None: not asked.
        together: the least cosine of all samples as one vector; None: not asked.
    """

    cosine: float
    relative: float | None
    together: float | None = None


class ImageFloor(NamedTuple):
    """What whole images from the same noise must reach: cosine of the last latents, PSNR in dB, and SSIM."""

    cosine: float
    psnr: float
    ssim: float


# By precision and kind of component. What torch eager itself loses against float32, worst of the demo, tiny networks of
# all families, a CLIP of 12 and a T5 of 24 layers (1 - cosine; share of the largest value):
#             text encoders       prepare             denoiser            VAE, both ways
#   float16   3.8e-6   2.9e-3     1.2e-7   7.1e-4     2.0e-6   3.1e-3     3.3e-6   6.4e-3
#   bfloat16  2.4e-4   3.2e-2     7.6e-6   5.5e-3     1.4e-4   1.9e-2     2.8e-4   5.0e-2
# The limits of relative difference are at least twice that and 1 - cosine may be 8 times that, since published networks
# are wider and deeper than these: a layer in the wrong precision, a lost bias or a wrong epsilon shows all the same. In
# float32 sums in another order leave 3e-6. Quantisation to int8 moves single values far, and the ends of a trajectory
# most: on the demo single calls fall to 0.987, all together to 0.997.
FLOORS: dict[str, dict[str, Floor]] = {
    "float32": {
        "text_encoder": Floor(0.99999, 1e-4),
        "prepare": Floor(0.99999, 1e-4),
        "denoiser": Floor(0.99999, 1e-4),
        "vae_decoder": Floor(0.99999, 1e-4),
        "vae_encoder": Floor(0.99999, 1e-4),
    },
    "float16": {
        "text_encoder": Floor(0.9999, 0.01),
        "prepare": Floor(0.9999, 0.005),
        "denoiser": Floor(0.9999, 0.01),
        "vae_decoder": Floor(0.9999, 0.02),
        "vae_encoder": Floor(0.9999, 0.02),
    },
    "bfloat16": {
        "text_encoder": Floor(0.998, 0.08),
        "prepare": Floor(0.999, 0.02),
        "denoiser": Floor(0.998, 0.05),
        "vae_decoder": Floor(0.998, 0.1),
        "vae_encoder": Floor(0.998, 0.1),
    },
    "int8": {
        kind: Floor(0.95, None, 0.99) for kind in ("text_encoder", "prepare", "denoiser", "vae_decoder", "vae_encoder")
    },
}
# Of the worst image, and of all together. Trajectories amplify rounding: eager's worst on the demo at 20 steps is 67 dB
# and an SSIM of 1.0000 in float16, 33 dB and 0.961 in bfloat16. In float32 an image may be off by 1/255, which is 48 dB
# if it is everywhere. In int8 a run may turn to another image (16 dB, 0.88), and most must not.
IMAGE_FLOORS: dict[str, tuple[ImageFloor, ImageFloor]] = {
    "float32": (ImageFloor(0.9999, 48, 0.999), ImageFloor(0.9999, 48, 0.999)),
    "float16": (ImageFloor(0.99, 30, 0.95), ImageFloor(0.99, 30, 0.95)),
    "bfloat16": (ImageFloor(0.98, 25, 0.9), ImageFloor(0.98, 25, 0.9)),
    "int8": (ImageFloor(0.7, 12, 0.6), ImageFloor(0.95, 25, 0.85)),
}


class Strayed(NumericError):
    """A component below its floor.

    Attributes:
        component: its name.
        output: name of the output.
        sample: one on which it is.
        floor: what it does not reach there.
    """

    def __init__(self, message: str, component: str, output: str, sample: Sample, floor: Floor) -> None:
        super().__init__(message)
        self.component, self.output, self.sample, self.floor = component, output, sample, floor


def compare(reference: Any, result: Any) -> Measure:
    """Measure a result, of any real dtype, against its reference of the same shape, in float64.

    Raises:
        InputError: the shapes differ, or are empty.
    """
    a, b = (np.asarray(to_numpy(x), dtype=np.float64) for x in (reference, result))
    if a.shape != b.shape or not a.size:
        raise InputError(
            f"a result of shape {list(b.shape)} cannot be compared with one of {list(a.shape)}: run both on one input"
        )
    a, b = a.reshape(-1), b.reshape(-1)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Measure(np.nan, np.nan, np.nan, False)
    off, largest = float(np.abs(a - b).max()), float(np.abs(a).max())
    return Measure(_cosine(_products(a, b)), off, off / largest if largest else (0.0 if off == 0 else np.inf), True)


def _products(reference: Any, result: Any) -> Numbers:
    """The scalar products of both with each other and with themselves, [3]."""
    a, b = (np.asarray(to_numpy(x), dtype=np.float64).reshape(-1) for x in (reference, result))
    return np.array([a @ b, a @ a, b @ b])


def _cosine(products: Numbers) -> float:
    """Of the angle; 1 between zeros, 0 between a zero and another vector."""
    both, own, other = products.tolist()
    return both / math.sqrt(own) / math.sqrt(other) if own and other else float(own == other)


def psnr(reference: Any, result: Any) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1 of one shape; `SAME` where they are equal."""
    a, b = _images(reference, result)
    return float(-10 * np.log10(max(((a - b) ** 2).mean(), 10 ** (-SAME / 10))))


def ssim(reference: Any, result: Any) -> float:
    """Structural similarity of images [..., height, width, channels] in 0..1: mean over windows, channels and images.

    With the Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01 and K2 = 0.03, over windows that lie inside the
    image (Wang, Bovik, Sheikh and Simoncelli 2004, https://doi.org/10.1109/TIP.2003.819861).

    Raises:
        InputError: a side is shorter than the window.
    """
    a, b = _images(reference, result)
    if a.ndim < 3 or min(a.shape[-3:-1]) < 11:
        raise InputError(f"SSIM needs images of at least 11 pixels a side, not {list(a.shape)}")
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(x: Numbers) -> Numbers:
        for axis in (-3, -2):
            length = x.shape[axis] - 10
            parts = (weight * np.take(x, range(i, i + length), axis) for i, weight in enumerate(window))
            x = np.asarray(sum(parts))
        return x

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float(similarity.mean())


def _images(reference: Any, result: Any) -> tuple[Numbers, Numbers]:
    a, b = (np.asarray(to_numpy(x), dtype=np.float64) for x in (reference, result))
    if a.shape != b.shape or not a.size:
        raise InputError(
            f"images of shape {list(b.shape)} cannot be compared with {list(a.shape)}: make them of one size"
        )
    return a, b


def floor(component: str, precision: str) -> Floor:
    """What a component must reach in a precision.

    Raises:
        InputError: there is no floor for the precision.
    """
    if precision not in FLOORS:
        raise InputError(f"precision {precision!r} has no floor: use {', '.join(FLOORS)}")
    kind = "text_encoder" if component.startswith("text_encoder") else component
    return FLOORS[precision][kind]


def check_component(component: str, run: Run, samples: Sequence[Sample], precision: str) -> Report:
    """Run an engine on recorded inputs and hold what it gives against what the float32 component gave.

    Args:
        component: its name.
        run: called with the sample's named inputs; gives the outputs in order.
        samples: at least `SAMPLES`, from real trajectories.
        precision: of the engine.

    Returns:
        JSON data for the manifest: by output the worst of each measure over all samples and the cosine of all together,
        and the floor.

    Raises:
        Strayed: an output is not finite, of another shape, or below its floor; names component, output, measure,
            value and floor.
        NumericError: the engine gives another number of outputs.
        InputError: there are fewer samples.
    """
    if len(samples) < SAMPLES:
        raise InputError(f"{component} is verified on at least {SAMPLES} inputs, not {len(samples)}: record more")
    least = floor(component, precision)
    pairs: dict[str, list[tuple[Sample, Measure]]] = {}
    products: dict[str, Numbers] = {}
    for sample in samples:
        results = run(**sample.inputs)
        if len(results) != len(sample.outputs):
            raise NumericError(f"{component} gives {len(results)} outputs, not {', '.join(sample.outputs)}")
        for (name, reference), result in zip(sample.outputs.items(), results, strict=True):
            measure = _gate(component, name, sample, reference, result, least, precision)
            pairs.setdefault(name, []).append((sample, measure))
            products[name] = products.get(name, 0) + _products(reference, result)
    outputs: dict[str, Report] = {}
    for name, measured in pairs.items():
        together = _cosine(products[name])
        worst, measure = min(measured, key=lambda pair: pair[1].cosine)
        if least.together is not None and together < least.together:
            raise Strayed(
                f"{component} in {precision}: its {name} has a cosine of {together:.6f} to the float32 component's "
                f"over all {len(samples)} samples, below the floor of {least.together}",
                component,
                name,
                worst,
                Floor(least.together, None),
            )
        outputs[name] = {
            "cosine": measure.cosine,
            "together": together,
            "max_abs": max(one.max_abs for _, one in measured),
            "relative": max(one.relative for _, one in measured),
        }
    return {
        "component": component,
        "precision": precision,
        "samples": len(samples),
        "outputs": outputs,
        "floor": least._asdict(),
    }


def _gate(
    component: str, name: str, sample: Sample, reference: Numbers, result: Any, least: Floor, precision: str
) -> Measure:
    where = f"{component} in {precision}: its {name}" + (f" ({sample.label})" if sample.label else "")

    def stray(what: str) -> Strayed:
        return Strayed(f"{where} {what}", component, name, sample, least)

    if tuple(result.shape) != reference.shape:
        raise stray(f"has the shape {list(result.shape)}, where the float32 component gives {list(reference.shape)}")
    measure = compare(reference, result)
    if not measure.finite:
        raise stray("holds NaN or Inf, where every number must be finite")
    if measure.cosine < least.cosine:
        raise stray(
            f"has a cosine of {measure.cosine:.6f} to the float32 component's, below the floor of {least.cosine}"
        )
    if least.relative is not None and measure.relative > least.relative:
        raise stray(
            f"is off by {measure.relative:.3g} of the float32 component's largest value, above the limit of "
            f"{least.relative}"
        )
    return measure


def feed(run: Run, specs: Iterable[TensorSpec], device: str = "cpu", *, tensors: bool = False) -> Run:
    """An engine as a function of samples' arrays, which go to the device in the dtypes that its inputs have.

    `tensors`: it takes torch tensors on the CPU, too.
    """
    dtypes = {spec.name: spec.dtype for spec in specs}

    def fed(**inputs: Any) -> Sequence[Any]:
        if device == "cpu" and not tensors:
            return run(**{name: array.astype(dtypes[name], copy=False) for name, array in inputs.items()})
        import torch

        return run(**{name: torch.from_numpy(x).to(device, getattr(torch, dtypes[name])) for name, x in inputs.items()})

    return fed


def check_images(
    latents: Sequence[tuple[Any, Any]], images: Sequence[tuple[Any, Any]], precision: str, *, name: str = "the bundle"
) -> Report:
    """Hold whole runs, from the same initial latents, against the float32 ones.

    Args:
        latents: pairs of last latents [batch, C, h, w], float32's first.
        images: likewise of pixels [batch, height, width, 3] in 0..1.
        precision: of the denoiser.
        name: of what was run, for the message.

    Returns:
        JSON data for the manifest: each measure of the worst image and of all together, and the floors.

    Raises:
        NumericError: a result is not finite or below its floor; names what, measure, value and floor.
        InputError: there is nothing to compare, or shapes differ.
    """
    if precision not in IMAGE_FLOORS:
        raise InputError(f"precision {precision!r} has no floor: use {', '.join(IMAGE_FLOORS)}")
    if not latents or not images:
        raise InputError("end to end there is at least one run to compare")
    measures = [compare(*pair) for pair in latents]
    for what, finite in (
        ("latents hold", all(one.finite for one in measures)),
        ("images hold", all(compare(*pair).finite for pair in images)),
    ):
        if not finite:
            raise NumericError(f"{name} in {precision}: the {what} NaN or Inf, where every number must be finite")
    decibels, similarities = [psnr(*pair) for pair in images], [ssim(*pair) for pair in images]
    errors = [10 ** (-one / 10) for one in decibels]  # mean squares
    found = {
        "worst": {"cosine": min(one.cosine for one in measures), "psnr": min(decibels), "ssim": min(similarities)},
        "together": {
            "cosine": _cosine(np.sum([_products(*pair) for pair in latents], axis=0)),
            "psnr": -10 * math.log10(sum(errors) / len(errors)),
            "ssim": sum(similarities) / len(similarities),
        },
    }
    floors = {key: least._asdict() for key, least in zip(found, IMAGE_FLOORS[precision], strict=True)}
    words = {"cosine": "a cosine of the latents", "psnr": "a PSNR", "ssim": "an SSIM"}
    for key, whose in (("worst", "its worst image has"), ("together", "its images together have")):
        for what, value in found[key].items():
            if value < floors[key][what]:
                raise NumericError(
                    f"{name} in {precision}: {whose} {words[what]} of {value:.5g} to float32's, below the floor of "
                    f"{floors[key][what]}"
                )
    return {"precision": precision, "runs": len(images), **found, "floors": floors}


# ------------------------------------------------------------------------------------------------------------
# Where a graph first strays


@dataclass(frozen=True)
class Probe:
    """A graph that can be asked for any tensor in it.

    Attributes:
        names: of its tensors.
        run: (names, inputs) -> these tensors.
    """

    names: frozenset[str]
    run: Callable[[Sequence[str], Mapping[str, Numbers]], Sequence[Any]]


@dataclass(frozen=True)
class Stray:
    """The first tensor of a graph that strays.

    Attributes:
        tensor: its name.
        operator: what computes it.
        weights: names of the initialisers that go into it.
        measure: its own.
        inputs: by name, the measures of the tensors it was computed of, all of which pass.
        compared: how many tensors both graphs have.
        tensors: how many the reference's has.
    """

    tensor: str
    operator: str
    weights: tuple[str, ...]
    measure: Measure
    inputs: dict[str, Measure]
    compared: int
    tensors: int

    def __str__(self) -> str:
        what = f"{self.operator} of {' and '.join(self.weights)}" if self.weights else self.operator
        off = f"cosine {self.measure.cosine:.6f}, off by {self.measure.relative:.3g} of its largest value"
        shared = f"; {self.compared} of {self.tensors} tensors have the same name"
        return (
            f"the first tensor that strays is {self.tensor!r} ({what}): "
            f"{off if self.measure.finite else 'it holds NaN or Inf'}"
            f"{shared if self.compared < self.tensors else ''}"
        )


def first_stray(
    graph: Path,
    reference: Probe,
    target: Probe,
    inputs: Mapping[str, Numbers],
    least: Floor,
    *,
    output: str | None = None,
) -> Stray:
    """Find the tensor at which a target's arithmetic leaves the reference's, by bisection over the graph's tensors.

    Of the tensors that the output depends on, in topological order, the search halves the range between the last
    that passes and the first that does not, as if the error only grew. Where branches make that untrue, what is found
    has an input that strays too, and the search goes on from there, so that in the end all its inputs pass. It runs
    about log2(tensors) graphs on both sides, each with one tensor for its output. Tensors are compared by their names:
    a graph in another precision, or one that a runtime has read and simplified, keeps most of them.

    Args:
        graph: the reference's ONNX file.
        reference: of float32, such as `onnxruntime_probe(graph)`.
        target: what strays.
        inputs: of the sample on which it does.
        least: the floor that a tensor must reach.
        output: of the graph; None: the first.

    Raises:
        InputError: the output does not stray, or the graphs have no tensor in common.
    """
    parents, makers, outputs = _tensors(graph)
    output = outputs[0] if output is None else output
    known = parents.keys() & target.names
    upstream = [name for name in _ancestors(output, parents) if name in known]
    if output not in known or len(upstream) < 2 < len(parents):
        raise InputError(f"the graphs have no tensor before {output!r} of the same name: export both in one way")
    measures: dict[str, Measure] = {}

    def strays(name: str) -> bool:
        if name not in measures:
            (wanted,), (got,) = reference.run([name], inputs), target.run([name], inputs)
            if to_numpy(wanted).size == 0:
                measures[name] = Measure(1.0, 0.0, 0.0, True)
            elif wanted.shape != got.shape:
                measures[name] = Measure(np.nan, np.nan, np.nan, False)
            else:
                measures[name] = compare(wanted, got)
        return not _passes(measures[name], least)

    if not strays(output):
        raise InputError(f"{output!r} does not stray on this input: give the one on which it did")
    while True:
        low, high = -1, len(upstream) - 1  # all up to `low` pass, `high` strays
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if strays(upstream[middle]) else (middle, high)
        found = upstream[high]
        direct = _nearest(found, parents, known)
        worse = [name for name in direct if strays(name)]
        if not worse:
            break
        upstream = [name for name in _ancestors(worse[0], parents) if name in known]
    given = {name: measures[name] for name in direct}
    return Stray(found, *makers[found], measures[found], given, len(known), len(parents))


def _passes(measure: Measure, least: Floor) -> bool:
    close = least.relative is None or measure.relative <= least.relative
    return measure.finite and measure.cosine >= least.cosine and close


def _tensors(graph: Path) -> tuple[dict[str, list[str]], dict[str, tuple[str, tuple[str, ...]]], list[str]]:
    """Of the float tensors that depend on an input, in topological order: what they are computed of, by what; outputs.

    Tensors of other types (shapes, masks, indices) are passed over: what depends on one depends on what it is made of.
    """
    onnx = _onnx()
    model = onnx.load(graph, load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model)
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    infos = [*model.graph.value_info, *model.graph.output]
    floats = {info.name for info in infos if info.type.tensor_type.elem_type in kinds}
    weights = {weight.name for weight in model.graph.initializer}
    sources: dict[str, list[str]] = {info.name: [] for info in model.graph.input if info.name not in weights}
    parents: dict[str, list[str]] = {}
    makers: dict[str, tuple[str, tuple[str, ...]]] = {}
    for node in model.graph.node:
        given = [name for name in node.input if name in sources]
        if not given:
            continue
        direct = list(
            dict.fromkeys(known for name in given for known in ([name] if name in parents else sources[name]))
        )
        for name in node.output:
            sources[name] = direct
            if name in floats:
                parents[name] = direct
                makers[name] = node.op_type, tuple(given for given in node.input if given in weights)
    return parents, makers, [info.name for info in model.graph.output]


def _ancestors(name: str, parents: Mapping[str, Sequence[str]]) -> list[str]:
    """All that a tensor depends on, and itself, in topological order."""
    seen, waiting = {name}, [name]
    while waiting:
        for parent in parents.get(waiting.pop(), ()):
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return [one for one in parents if one in seen]


def _nearest(name: str, parents: Mapping[str, Sequence[str]], known: Collection[str]) -> list[str]:
    """The nearest ancestors that can be compared."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    waiting = list(parents[name])
    while waiting:
        one = waiting.pop(0)
        if one in seen:
            continue
        seen.add(one)
        if one in known:
            found[one] = None
        else:
            waiting += parents[one]
    return list(found)


def onnxruntime_probe(graph: Path, *, optimised: bool = False) -> Probe:
    """A probe of an ONNX file by ONNX Runtime on the CPU.

    Args:
        graph: the file; each call writes another beside it for its time, since external data are found by their folder.
        optimised: fuse and simplify as an engine does, as far as the tensor that is asked for lets it; else the graph
            runs as it is.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime is not installed: pip install 'fastsd[cpu]'") from error

    def run(names: Sequence[str], inputs: Mapping[str, Numbers]) -> Sequence[Any]:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        if not optimised:
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with _exposed(graph, names) as path:
            session = onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])
        wanted = {one.name: one.type for one in session.get_inputs()}
        fed = {name: _as(inputs[name], kind) for name, kind in wanted.items()}
        results: Sequence[Any] = session.run(list(names), fed)
        return results

    return Probe(frozenset(_tensors(graph)[0]), run)


def openvino_probe(model: Path, precision: str) -> Probe:
    """A probe of an ONNX file or an OpenVINO model (.xml) by OpenVINO on the CPU.

    Args:
        model: the file.
        precision: of its arithmetic; what int8 leaves is bfloat16.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino is not installed: pip install 'fastsd[cpu]'") from error
    hint = {"float32": "f32", "float16": "f16"}.get(precision, "bf16")

    core = openvino.Core()

    def run(names: Sequence[str], inputs: Mapping[str, Numbers]) -> Sequence[Any]:
        graph = core.read_model(str(model))
        own = {name for port in graph.outputs for name in port.get_names()}
        graph.add_outputs([name for name in names if name not in own])
        compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        results = compiled({port: inputs[port.get_any_name()] for port in compiled.inputs})
        return [results[name] for name in names]

    operators = core.read_model(str(model)).get_ops()
    return Probe(frozenset(name for one in operators for port in one.outputs() for name in port.get_names()), run)


@contextmanager
def _exposed(graph: Path, names: Sequence[str]) -> Iterator[str]:
    """The path of a copy of the graph, without its external data, that gives only these tensors."""
    onnx = _onnx()
    model = onnx.load(graph, load_external_data=False)
    infos = {info.name: info for info in [*model.graph.value_info, *model.graph.output]}
    del model.graph.output[:]
    model.graph.output.extend(infos.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    handle, path = tempfile.mkstemp(suffix=".onnx", prefix=f".{graph.stem}-", dir=graph.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(model.SerializeToString())
        yield path
    finally:
        os.unlink(path)


def _as(array: Numbers, kind: str) -> Numbers:
    """An input in the type that a session asks for."""
    return array.astype(np.float16) if kind == "tensor(float16)" else array


def _onnx() -> Any:
    try:
        import onnx
        import onnx.shape_inference
    except ImportError as error:
        raise MissingExtraError("onnx is not installed: pip install 'fastsd[cpu]'") from error
    return onnx
