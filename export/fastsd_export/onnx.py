"""Components as ONNX graphs, and how their weights are made of a checkpoint's parameters.

The weights are never traced: `torch.export` sees tensors without data, and what each initialiser needs of a parameter
(a cast, a transposition) is noted instead of done. So an export holds the component and one more tensor at a time, a
graph can be written without its weights, and another checkpoint of the same architecture can be put into it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import logging
import math
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsd.bundle import Range, TensorSpec
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import few
from fastsd_export.trace import Traced, extent, names, shapes, skeleton

if TYPE_CHECKING:
    import onnx
    import onnx_ir

# By target and component, "" for all others. ONNX Runtime and OpenVINO on a CPU run attention taken apart as fast as
# the operator or faster (measured on 2 cores: the operator takes 1.07 and 1.12 times as long), since they fuse it
# themselves; below 21 group normalisation is an instance normalisation, which both have a kernel for. TensorRT fuses
# the operators; but it has no kernel for the VAE's attention (one head, 512 wide), which must be taken apart.
OPSETS: dict[str, dict[str, int]] = {
    "onnx": {"": 20},
    "openvino": {"": 20},
    "tensorrt": {"": 23, "vae_decoder": 22, "vae_encoder": 22},
    "tensorrt-rtx": {"": 23, "vae_decoder": 22, "vae_encoder": 22},
}
PRECISIONS = ("float32", "float16", "bfloat16")
# Below 18 torch converts down and fails at it, 26 it writes broken; a convolution takes bfloat16 from 22 on.
OLDEST, OLDEST_OF_BFLOAT16, NEWEST = 18, 22, 25
EXTERNAL = 2**30  # bytes of weights above which they have a file of their own
ALIGNMENT = 4096  # of weights in that file, so that they can be mapped
ATTENTION = 23  # the first opset with an operator for it
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
NORMS = {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"}
_CODES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}  # of onnx.TensorProto
_NAMES = {code: name for name, code in _CODES.items()}
_ROOT = "component."  # `Traced.module` holds the component under this name


class Weight(NamedTuple):
    """How an initialiser is made of a parameter: cast to `dtype`, then each step in turn.

    A step is ("transpose", permutation), ("reshape", shape) or ("slice", (axis, start, end)).
    """

    parameter: str  # in the component's state dict
    shape: tuple[int, ...]  # of the parameter
    dtype: str
    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def then(self, step: str, *numbers: int) -> Weight:
        """The same with one more step."""
        return self._replace(steps=(*self.steps, (step, numbers)))


@dataclass(frozen=True)
class Graph:
    """A component's ONNX file.

    Attributes:
        path: `<component>.onnx`; weights above 1 GiB are beside it in `<component>.onnx.data`.
        inputs: in the order of the graph.
        outputs: likewise.
        weights: of every initialiser how it is made; None for a constant that no parameter goes into.
        opset: of the standard domain.
        nodes: how many of each operator.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: dict[str, Weight | None]
    opset: int
    nodes: dict[str, int]


def opset_of(target: str, component: str, precision: str = "float32") -> int:
    """The opset that a component is written in for a target.

    Raises:
        InputError: the target takes no ONNX graph.
    """
    if target not in OPSETS:
        raise InputError(f"there is no ONNX graph for the target {target!r}: use {', '.join(OPSETS)}")
    least = OLDEST_OF_BFLOAT16 if precision == "bfloat16" else OLDEST
    return max(least, OPSETS[target].get(component, OPSETS[target][""]))


def write(traced: Traced, ranges: Mapping[str, Range], folder: Path, *, precision: str, opset: int) -> Graph:
    """Write a component as `<component>.onnx` into `folder`.

    Args:
        traced: from `fastsd_export.trace`, on the CPU, its weights in any floating dtype.
        ranges: min, opt and max of every name in `traced.sizes`; where min and max are equal the size is fixed.
        folder: exists.
        precision: of weights and arithmetic: "float32", "float16" or "bfloat16". Normalisations are in float32, and so
            are the inputs and outputs but those that `prepare` hands to the denoiser.
        opset: 18 to 25, for bfloat16 from 22 on; see `opset_of`.

    Raises:
        InputError: precision, opset or ranges are none that can be written.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    ir = _library("onnx_ir")
    if precision not in PRECISIONS:
        raise InputError(f"there is no precision {precision!r}: use {', '.join(PRECISIONS)}")
    oldest = OLDEST_OF_BFLOAT16 if precision == "bfloat16" else OLDEST
    if type(opset) is not int or not oldest <= opset <= NEWEST:
        raise InputError(f"no {precision} graph can be written in opset {opset!r}: use {oldest} to {NEWEST}")
    static = _static(traced, ranges)
    model = _translate(traced, static, precision, opset)
    graph = model.graph
    state: dict[str, Tensor] = traced.module.component.state_dict()

    # The optimiser would compute with weights; what is an input it leaves alone.
    parameters = {}
    for key, value in list(graph.initializers.items()):
        name = key.removeprefix(_ROOT)
        if key.startswith(_ROOT) and name in state:
            parameters[name] = value
            del graph.initializers[key]
            value.const_value = None
            graph.inputs.append(value)
    _simplify(model)
    del graph.inputs[len(traced.inputs) :]
    made = _fold(graph, parameters)
    _compute_outputs(graph)
    path = folder / f"{traced.component}.onnx"
    _register(graph, made)
    _declare(graph, traced, static)
    weights = {key: made.get(value) for key, value in graph.initializers.items()}
    proto = ir.to_proto(model)
    size = sum(math.prod(_shape(value)) * getattr(torch, weight.dtype).itemsize for value, weight in made.items())
    if size > EXTERNAL:
        _refer(proto, weights, f"{path.name}.data")
        _fill(proto, folder, weights, state)
    else:
        for tensor in proto.graph.initializer:
            weight = weights[tensor.name]
            if weight is not None:
                del tensor.external_data[:]
                tensor.data_location = 0  # in this file
                tensor.raw_data = _bytes(make(weight, state[weight.parameter])).tobytes()
    _save(path, proto)
    del proto
    _library("onnx.checker").check_model(path, full_check=True)
    return Graph(
        path=path,
        inputs=tuple(_spec(value) for value in graph.inputs),
        outputs=tuple(_spec(value) for value in graph.outputs),
        weights=weights,
        opset=opset,
        nodes=dict(Counter(node.op_type for node in graph)),
    )


def make(weight: Weight, parameter: Tensor) -> Tensor:
    """An initialiser of its parameter, contiguous.

    Raises:
        InputError: the parameter has another shape than the graph's.
    """
    if tuple(parameter.shape) != tuple(weight.shape):
        raise InputError(
            f"{weight.parameter!r} is {list(parameter.shape)}, and {list(weight.shape)} in the graph: give weights of "
            "the graph's architecture"
        )
    tensor = parameter.to(getattr(torch, weight.dtype))
    for step, numbers in weight.steps:
        if step == "transpose":
            tensor = tensor.permute(*numbers)
        elif step == "reshape":
            tensor = tensor.reshape(*numbers)
        else:
            axis, start, end = numbers
            tensor = tensor.narrow(axis, start, end - start)
    return tensor.contiguous()


def rebuild(weights: Mapping[str, Weight | None], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All initialisers that are made of parameters, of a component's state dict.

    Raises:
        InputError: a parameter is missing or has another shape than the graph's.
    """
    _require(weights, state)
    return {name: make(weight, state[weight.parameter]) for name, weight in weights.items() if weight is not None}


def strip(path: Path, weights: Mapping[str, Weight | None], out: Path) -> None:
    """Write a graph without its weights: it refers to a file `<out>.data` that `fill` makes; constants stay.

    Args:
        path: from `write`.
        weights: `Graph.weights`.
        out: the new file.
    """
    proto = _library("onnx").load(path, load_external_data=False)
    _refer(proto, weights, f"{out.name}.data")
    _save(out, proto)


def fill(path: Path, weights: Mapping[str, Weight | None], state: Mapping[str, Tensor]) -> None:
    """Write the weights that a stripped graph refers to, one at a time, of a component's state dict.

    Raises:
        InputError: a parameter is missing or has another shape than the graph's.
    """
    _require(weights, state)
    _fill(_library("onnx").load(path, load_external_data=False), path.parent, weights, state)


def _fill(
    proto: onnx.ModelProto, folder: Path, weights: Mapping[str, Weight | None], state: Mapping[str, Tensor]
) -> None:
    tensors = [tensor for tensor in proto.graph.initializer if weights[tensor.name] is not None]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    [location] = {place["location"] for place in places}
    with _replacing(folder / location) as file:
        for tensor, place in zip(tensors, places, strict=True):
            weight = weights[tensor.name]
            assert weight is not None
            file.seek(int(place["offset"]))
            file.write(_bytes(make(weight, state[weight.parameter])))


def _require(weights: Mapping[str, Weight | None], state: Mapping[str, Tensor]) -> None:
    missing = {weight.parameter for weight in weights.values() if weight is not None} - state.keys()
    if missing:
        raise InputError(f"the weights lack {few(sorted(missing))}: give those of the graph's architecture")


def _static(traced: Traced, ranges: Mapping[str, Range]) -> dict[str, int]:
    """The sizes that are fixed, of ranges that are checked."""
    static = {}
    for name in traced.sizes:
        if name not in ranges:
            raise InputError(f"the {traced.component} has no range for {name!r}: give its min, opt and max")
        given = f"the range of {name!r} is {ranges[name]!r}"
        least, best, most = ranges[name]
        if not all(type(size) is int for size in ranges[name]) or not 1 <= least <= best <= most:
            raise InputError(f"{given}; it must be whole numbers 1 <= min <= opt <= max")
        multiple, limit = traced.limits.get(name, (1, most))
        if any(size % multiple for size in ranges[name]) or most > limit:
            raise InputError(f"{given}; this model takes multiples of {multiple} up to {limit}")
        if least == most:
            static[name] = least
    return static


def _translate(traced: Traced, static: Mapping[str, int], precision: str, opset: int) -> onnx_ir.Model:
    """The component as torch translates it, not optimised; its weights have no data."""
    dtype = getattr(torch, precision)
    inputs, dynamic = {}, {}
    for name, shape in shapes(traced, {**traced.sizes, **static}).items():
        inputs[name] = torch.zeros(shape, dtype=dtype if name in traced.low else traced.inputs[name].dtype)
        vary = {axis for axis, dim in traced.dims.get(name, {}).items() if names(dim) - static.keys()}
        dynamic[name] = dict.fromkeys(vary, torch.export.Dim.DYNAMIC)
    with torch.no_grad(), warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # what torch deprecates is its own
        program = torch.export.export(skeleton(traced.module, dtype), (), inputs, dynamic_shapes=dynamic)
        converted = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=list(traced.outputs),
            opset_version=opset,
            custom_translation_table={} if opset >= ATTENTION else {_SDPA: _attention},
            optimize=False,
            verbose=False,
        )
    assert converted is not None
    return converted.model


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    # Attention in the five operators that runtimes know how to fuse. torch's own translation turns the keys by way of
    # three reshapes with computed shapes, and guards rows without a key, which there are none of here.
    import onnx_ir as ir
    from onnxscript import opset18 as op

    assert not (dropout_p or is_causal or enable_gqa)

    def constant(number: float) -> Any:
        return op.Constant(value=ir.tensor(number, dtype=query.dtype))  # type: ignore[arg-type]  # it takes both

    scores = op.MatMul(
        op.Mul(query, constant(query.shape[-1] ** -0.5 if scale is None else scale)),
        op.Transpose(key, perm=[0, 1, 3, 2]),
    )
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            attn_mask = op.Where(attn_mask, constant(0.0), constant(query.dtype.min))
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's warnings to itself: that torchvision is absent, for one."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants, merge what is equal, drop what is dead, and norm in float32."""
    import onnxscript.optimizer

    with np.errstate(all="ignore"):  # T5 takes logarithms of distances of 0, and does not use them
        onnxscript.optimizer.optimize(model)  # infers all dtypes, too
    if _norm_in_float32(model.graph):
        onnxscript.optimizer.optimize(model)
    _merge_constants(model.graph)
    for node in model.graph:
        # Which layer a node is of helps to find the first that strays; the rest of torch's notes names its source.
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))[:-1]
        layers = [scope.removeprefix(_ROOT) for scope in scopes if scope.startswith(_ROOT)]
        node.metadata_props.clear()
        node.doc_string = None
        if layers:
            node.metadata_props["layer"] = layers[-1]
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _merge_constants(graph: onnx_ir.Graph) -> None:
    """Keep one of equal constants: the masks of a text encoder are one per layer."""
    first: dict[Any, onnx_ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        numbers = value.const_value.numpy()
        same = first.setdefault((value.dtype, numbers.shape, numbers.tobytes()), value)
        if same is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[name]


def _norm_in_float32(graph: onnx_ir.Graph) -> bool:
    """Cast around every normalisation that is in a lower precision; gives whether there was one.

    The standard has mean and variance computed in float32, but runtimes have kernels that sum in float16.
    """
    import onnx_ir as ir

    def cast(value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Node:
        node = ir.node("Cast", [value], attributes={"to": dtype})
        node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
        return node

    low = []
    for node in [node for node in graph if node.op_type in NORMS]:
        assert node.inputs[0] is not None and node.inputs[0].dtype is not None, node.name
        if node.inputs[0].dtype != ir.DataType.FLOAT:
            low.append((node, node.inputs[0].dtype))
    for node, dtype in low:
        for i, value in enumerate(node.inputs):
            if value is not None:
                upward = cast(value, ir.DataType.FLOAT)
                graph.insert_before(node, upward)
                node.replace_input_with(i, upward.outputs[0])
        out = node.outputs[0]
        users = list(out.uses())
        out.dtype = ir.DataType.FLOAT
        downward = cast(out, dtype)
        graph.insert_after(node, downward)
        for user, i in users:
            user.replace_input_with(i, downward.outputs[0])
    return bool(low)


def _fold(graph: onnx_ir.Graph, parameters: Mapping[str, onnx_ir.Value]) -> dict[onnx_ir.Value, Weight]:
    """Note what is done to a parameter alone, instead of doing it in the graph.

    Only where a parameter is used once: else the graph would hold it twice.
    """
    import onnx_ir as ir

    used = {name: value for name, value in parameters.items() if value.uses()}
    made = {value: Weight(name, _shape(value), _dtype(value)) for name, value in used.items()}
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or source not in made or len(source.uses()) != 1:
            continue
        noted = _noted(node, made[source])
        if noted is None:
            continue
        del made[source]
        for output, weight in zip(node.outputs, noted, strict=True):
            dtype, shape = ir.DataType(_CODES[weight.dtype]), ir.Shape(_sketch(weight).shape)
            value = ir.Value(type=ir.TensorType(dtype), shape=shape)
            output.replace_all_uses_with(value)
            made[value] = weight
        graph.remove(node, safe=True)
    return made


def _sketch(weight: Weight) -> Tensor:
    """An initialiser without its data."""
    return make(weight, torch.empty(weight.shape, device="meta"))


def _noted(node: onnx_ir.Node, weight: Weight) -> list[Weight] | None:
    """What the outputs of a node are whose first input is made of a parameter; None if that cannot be noted."""
    tensor = _sketch(weight)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    match node.op_type:
        case "Cast":
            return [weight._replace(dtype=_NAMES[attributes["to"]])]
        case "Transpose":
            return [weight.then("transpose", *attributes.get("perm", range(tensor.ndim)[::-1]))]
    if len(node.inputs) != 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    numbers = [int(n) for n in node.inputs[1].const_value.numpy().reshape(-1)]
    match node.op_type:
        case "Reshape":
            shape = [n or tensor.shape[i] for i, n in enumerate(numbers)]
            return [weight.then("reshape", *tensor.reshape(shape).shape)]
        case "Unsqueeze":
            ndim, sizes = tensor.ndim + len(numbers), iter(tensor.shape)
            axes = {axis % ndim for axis in numbers}
            return [weight.then("reshape", *(1 if i in axes else next(sizes) for i in range(ndim)))]
        case "Split":
            axis = attributes.get("axis", 0) % tensor.ndim
            ends = itertools.accumulate(numbers)
            return [weight.then("slice", axis, end - size, end) for size, end in zip(numbers, ends, strict=True)]
    return None


def _register(graph: onnx_ir.Graph, made: Mapping[onnx_ir.Value, Weight]) -> None:
    """Make the values that `made` describes initialisers, named after their parameters, in the order of their use."""
    import onnx_ir as ir

    taken = Counter(weight.parameter for weight in made.values())
    count: Counter[str] = Counter()
    for value in dict.fromkeys(value for node in graph for value in node.inputs):
        if value is None or value not in made:
            continue
        parameter = made[value].parameter
        value.name = parameter if taken[parameter] == 1 else f"{parameter}/{count[parameter]}"
        count[parameter] += 1
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=value.name)
        graph.register_initializer(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses():  # what only a folded node read
            del graph.initializers[name]


def _compute_outputs(graph: onnx_ir.Graph) -> None:
    """Let a node make each output: one that depends on no input, as positions of a fixed size, was folded away."""
    import onnx_ir as ir

    for place, value in enumerate(graph.outputs):
        if value.name is None or graph.initializers.get(value.name) is not value:
            continue
        name = value.name
        assert value.dtype is not None
        del graph.initializers[name]
        value.name = f"{name}_constant"
        graph.register_initializer(value)
        node = ir.node("Identity", [value])
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, value.dtype, value.shape
        graph.append(node)
        graph.outputs[place] = node.outputs[0]


def _declare(graph: onnx_ir.Graph, traced: Traced, static: Mapping[str, int]) -> None:
    """Give inputs and outputs the names of what varies, and forget what the exporter thought of all between them."""
    import onnx_ir as ir

    for value in [*graph.inputs, *graph.outputs]:
        assert value.shape is not None and value.name is not None
        shape: list[Any] = list(value.shape)
        for axis, dim in traced.dims.get(value.name, {}).items():
            left = re.sub(r"[a-z]+", lambda name: str(static.get(name[0], name[0])), dim)
            shape[axis] = left if names(left) else extent(left, {})
        value.shape = ir.Shape(shape)
    kept = {*graph.inputs, *graph.outputs}
    for node in graph:
        for output in node.outputs:
            if output not in kept:
                output.shape = output.type = None


def _refer(proto: onnx.ModelProto, weights: Mapping[str, Weight | None], location: str) -> None:
    """Let the initialisers that are made of parameters refer to a file, each at its place."""
    helper = _library("onnx.external_data_helper")
    offset = 0
    for tensor in proto.graph.initializer:
        weight = weights[tensor.name]
        if weight is not None:
            length = math.prod(tensor.dims) * getattr(torch, weight.dtype).itemsize
            tensor.raw_data = b""  # it must be there, and goes
            helper.set_external_data(tensor, location, offset, length)
            tensor.ClearField("raw_data")
            offset += -(-length // ALIGNMENT) * ALIGNMENT


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy 1's stubs


def _spec(value: onnx_ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(value.name, _dtype(value), shape)


def _shape(value: onnx_ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def _dtype(value: onnx_ir.Value) -> str:
    """As torch names it."""
    assert value.dtype is not None
    return _NAMES[value.dtype]


def _save(path: Path, proto: onnx.ModelProto) -> None:
    with _replacing(path) as file:
        file.write(proto.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is written."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name} is not installed, without which nothing is exported: pip install 'fastsd[cpu]' (or 'fastsd[gpu]')"
        ) from error
