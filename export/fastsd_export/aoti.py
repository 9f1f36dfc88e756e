"""AOTInductor packages: a traced component, compiled once for its architecture, and the files of weights beside it.

What a package computes does not depend on the weights, not even on the smallest of them: a fine-tune and a LoRA run in
the package of their base. torch is asked for that by names that begin with an underscore, all of them in this module
and in `fastsd.backends.aoti`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram

from fastsd import machine, store
from fastsd.backends.aoti import MACHINE, MODEL, ROOT, TORCH, WEIGHTS
from fastsd.bundle import Range, TensorSpec
from fastsd.errors import InputError
from fastsd.files import few, one_line
from fastsd_export.trace import Traced, extent, names, shapes, skeleton
from fastsd_kernels import cpu_attention

# Options of Inductor, by the kind of device.
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {
        # Else parameters of up to 8 numbers become part of the code.
        "always_keep_tensor_constants": True,
        # As many threads as the process that runs it has, not as the one that compiles it.
        "cpp.dynamic_threads": True,
    },
    "cuda": {
        "always_keep_tensor_constants": True,
    },
}
CONSTANTS = f"constants{WEIGHTS}"  # beside a package: those of its constants that are no weights, if there are any
ALIGNMENT = 64  # bytes, of weights in their file
# Of the safetensors format.
_CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}


class Weights(NamedTuple):
    """A file of weights.

    Attributes:
        path: of the safetensors file.
        size: bytes.
        digest: sha256.
        options: of the engines that read it, as `fastsd.backends.aoti.load` takes them.
    """

    path: Path
    size: int
    digest: str
    options: Mapping[str, Any]


class Built(NamedTuple):
    """A package.

    Attributes:
        path: its file, relative to the folder.
        inputs: in the order in which it takes them.
        outputs: likewise.
    """

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def build(
    traced: Traced,
    ranges: Mapping[str, Range],
    folder: Path,
    *,
    precision: str,
    device: str,
    layout: torch.memory_format = torch.contiguous_format,
) -> Built:
    """Compile a component as `<component>.pt2` into `folder`, with what the package needs besides the weights.

    Beside it are its constants that are no weights (`CONSTANTS`), and on a CPU our attention, as far as there are any.

    Args:
        traced: from `fastsd_export.trace`; its weights are not read, and may lack data.
        ranges: min, opt and max of every name in `traced.sizes`; where min and max are equal the size is fixed.
        folder: exists.
        precision: of weights and arithmetic: "float32", "float16" or "bfloat16".
        device: "cpu" or "cuda", of this machine.
        layout: of the weights of convolutions, in which they are written too (`write_weights`).

    Raises:
        InputError: there is no C++ compiler, or the component cannot be compiled.
    """
    _require_compiler()
    static = {name: low for name, (low, _, high) in ranges.items() if low == high}
    program = export(traced, ranges, getattr(torch, precision), device, layout)
    values = _fill(program, device)
    path = folder / f"{traced.component}.pt2"
    described = {TORCH: str(torch.__version__), MACHINE: json.dumps(machine.describe(device))}
    try:
        if device == "cpu" and cpu_attention.reason() is None and cpu_attention.substitute(program.graph_module):
            kernel = cpu_attention.build(store.home() / "native")
            shutil.copyfile(kernel, folder / kernel.name)
        values |= _compile(program, path, {**OPTIONS[device], "aot_inductor.metadata": described})
    except Exception as error:  # of the compiler behind it, too
        raise InputError(
            f"{traced.component} in {precision} cannot be compiled ({type(error).__name__}: {one_line(error)[-500:]}): "
            "try another precision, or another version of torch or of the C++ compiler"
        ) from error
    package = torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL, device == "cuda", 1, -1)
    weights = {f"{ROOT}{name}" for name in traced.module.component.state_dict()}
    constants = set(package.get_constant_fqns()) - weights
    if unknown := constants - values.keys():
        raise InputError(
            f"{traced.component} in {precision} was compiled to constants that nothing gives ({few(sorted(unknown))}): "
            "use another version of torch"
        )
    if constants:
        stored = {name.removeprefix(ROOT): values[name] for name in sorted(constants)}
        _save(folder / CONSTANTS, stored, {name: value.dtype for name, value in stored.items()})
    return Built(path.name, *_specs(traced, program, static))


def _compile(program: ExportedProgram, path: Path, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Compile and package a program; what `aoti_compile_and_package` does, but the constants come back.

    Returns:
        The tensors that the package takes by other names than the program has for them.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    given = {
        **options,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }
    args, kwargs = program.example_inputs
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch deprecates is its own
        made: Any = aot_compile(program.module(check_guards=False), args, kwargs, options=given)
        package_aoti(str(path), [file for file in made if isinstance(file, str)])
    [constants] = (one for one in made if not isinstance(one, str))
    return {name: value for name, (value, _) in constants.items()}


def export(
    traced: Traced,
    ranges: Mapping[str, Range],
    dtype: torch.dtype,
    device: str,
    layout: torch.memory_format = torch.contiguous_format,
) -> ExportedProgram:
    """The component as `torch.export` sees it in a dtype on a device; its weights have no data.

    Raises:
        InputError: a range is missing.
    """
    inputs, dynamic = {}, {}
    for name, shape in shapes(traced, _examples(traced, ranges)).items():
        low = name in traced.low
        inputs[name] = torch.zeros(shape, dtype=dtype if low else traced.inputs[name].dtype, device=device)
        varying = {one for one, (least, _, most) in ranges.items() if least < most}
        axes = [axis for axis, dim in traced.dims.get(name, {}).items() if names(dim) & varying]
        dynamic[name] = dict.fromkeys(axes, Dim.DYNAMIC)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = skeleton(traced.module, dtype, device, layout=layout)
        return torch.export.export(module, (), inputs, dynamic_shapes=dynamic)


def _examples(traced: Traced, ranges: Mapping[str, Range]) -> dict[str, int]:
    """Sizes to trace with: fixed ones as they are, for others some near the usual one, as Inductor plans by them.

    As in `trace`, of those that vary none is 1, no two are the same and the latents of UNets are odd.
    """
    sizes: dict[str, int] = {}
    for name in traced.sizes:
        if name not in ranges:
            raise InputError(f"the {traced.component} has no range for {name!r}: give its min, opt and max")
        least, usual, most = ranges[name]
        if least == most:
            sizes[name] = usual
            continue
        multiple, limit = traced.limits.get(name, (1, 2**30))
        step = multiple * (2 if name in ("height", "width") else 1)
        size = max(usual - usual % step + multiple, 3 * multiple) if step > multiple else max(usual, 2)
        step = -step if size + 3 * step > limit else step
        while size > limit or size in sizes.values():
            size += step
        sizes[name] = size
    return sizes


def _fill(program: ExportedProgram, device: str) -> dict[str, Tensor]:
    """Give an exported program weights, as Inductor takes none without data; they are never read, so take no memory.

    Returns:
        Its constants that are no weights.
    """
    filled: dict[int, Tensor] = {}
    for name, tensor in program.state_dict.items():
        if isinstance(tensor, FakeTensor):
            if id(tensor) not in filled:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                is_parameter = isinstance(tensor, nn.Parameter)
                filled[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
            program.state_dict[name] = filled[id(tensor)]
    return {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}


def _specs(
    traced: Traced, program: ExportedProgram, static: Mapping[str, int]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs as the manifest has them."""
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature = program.graph_signature

    def spec(name: str, tensor: Tensor) -> TensorSpec:
        dims = traced.dims.get(name, {})
        shape = tuple(_dim(dims[axis], static) if axis in dims else int(size) for axis, size in enumerate(tensor.shape))
        return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), shape)

    made = zip(traced.outputs, signature.user_outputs, strict=True)
    return (
        tuple(spec(str(name), nodes[str(name)]) for name in signature.user_inputs),
        tuple(spec(name, nodes[str(node)]) for name, node in made),
    )


def _dim(dim: str, static: Mapping[str, int]) -> int | str:
    """A dimension's expression with numbers for the sizes that do not vary."""
    if not names(dim) - static.keys():
        return extent(dim, static)
    return "".join(str(static.get(part, part)) for part in re.split(r"([+*]|//)", dim))


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise InputError(
            f"AOTInductor compiles with a C++ compiler, and there is none ({one_line(error)}): install g++, or set CXX "
            "to one"
        ) from error


def write_weights(
    module: nn.Module, like: nn.Module, path: Path, layout: torch.memory_format = torch.contiguous_format
) -> Weights:
    """Write a component's parameters and buffers under their names, in the dtypes of another copy of it.

    One tensor is in memory at a time beside the module. Their addresses in the mapped file are multiples of
    `ALIGNMENT` as far as their sizes are.

    Args:
        module: the component, on the CPU.
        like: the same component, whose tensors may lack data.
        path: of the safetensors file.
        layout: channels last: tensors with four axes are stored as they lie in memory then, [out, height, width, in].

    Raises:
        InputError: the file cannot be written.
    """
    dtypes = {name: tensor.dtype for name, tensor in like.state_dict().items()}
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    state = module.state_dict()
    for name, tensor in state.items():
        same = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,), name)
        if same != name:
            tied[name] = same
    last = layout == torch.channels_last
    stored = {
        name: tensor.permute(0, 2, 3, 1) if last and tensor.ndim == 4 else tensor
        for name, tensor in state.items()
        if name not in tied
    }
    return Weights(path, *_save(path, stored, dtypes), {"tied": tied, "channels_last": last})


def _save(path: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> tuple[int, str]:
    """Write tensors in some dtypes as a safetensors file; its bytes, and their sha256."""
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}
    order = sorted(sizes, key=lambda name: sizes[name] % ALIGNMENT > 0)
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        offsets = [end, end := end + sizes[name]]
        header[name] = {"dtype": _CODES[dtypes[name]], "shape": list(tensors[name].shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    hashed = hashlib.sha256(start)
    try:
        with open(path, "wb") as file:
            file.write(start)
            for name in order:
                tensor = tensors[name].detach().to("cpu", dtypes[name]).contiguous()
                data = tensor.flatten().view(torch.uint8).numpy().data
                file.write(data)
                hashed.update(data)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r} ({error.strerror}): make room, or choose another disk") from error
    return len(start) + end, hashed.hexdigest()
