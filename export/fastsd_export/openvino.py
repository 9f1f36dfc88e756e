"""OpenVINO engines out of ONNX graphs: in OpenVINO's own format with weights in half the space, or quantised to int8.

    engine     file (bytes of a weight)          computes in
    float32    float32 (4)                       float32
    float16    float16 (2)                       float16, or float32 where the CPU has none
    bfloat16   float16 (2)                       bfloat16, or float32 where the CPU has none
    int8       int8 (1), float16 what is not     int8, bfloat16 what is not

Half of the space costs nothing in bfloat16, whose weights have 8 bits where float16 has 11; weights beyond the range of
float16 stay in float32.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsd.bundle import Range
from fastsd.errors import InputError, MissingExtraError
from fastsd.files import few, one_line

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov

PRECISIONS = ("float32", "float16", "bfloat16", "int8")


class Built(NamedTuple):
    """What a build made.

    Attributes:
        path: the main file, relative to the folder; its weights are beside it, with the suffix .bin.
        options: that `fastsd.backends.openvino` needs; none.
        versions: of the libraries that made it.
    """

    path: str
    options: dict[str, Any]
    versions: dict[str, str]


def build(
    onnx_path: Path,
    ranges: Mapping[str, Range],
    folder: Path,
    *,
    precision: str,
    calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]] = (),
) -> Built:
    """Write a component as `<component>.xml` and `<component>.bin` into `folder`.

    Args:
        onnx_path: the graph in float32; opset 20 or less makes the fastest engines, as OpenVINO fuses the decomposed
            attention better than the operator.
        ranges: min, opt and max of the dimensions that vary; sizes that do not become constants when the engine is
            loaded.
        folder: exists.
        precision: one of `PRECISIONS`, of the arithmetic; the graph's inputs and outputs stay as they are.
        calibration: for int8, inputs of the component as it meets them; 32 calls of a trajectory are enough.

    Raises:
        InputError: the precision is unknown, int8 has no calibration or its arrays are none that the graph takes, or
            OpenVINO cannot read the graph.
        MissingExtraError: openvino, or for int8 nncf, is not installed.
    """
    if precision not in PRECISIONS:
        raise InputError(f"OpenVINO has no precision {precision!r} here: use {', '.join(PRECISIONS)}")
    if (precision == "int8") != bool(calibration):
        wrong = "int8 needs calibration inputs" if precision == "int8" else f"{precision} takes no calibration inputs"
        raise InputError(f"{wrong}: pass them with precision 'int8' and only with that")
    ov = _openvino()
    versions = {"openvino": ov.__version__.partition("-")[0]}
    try:
        model = ov.Core().read_model(onnx_path)
    except RuntimeError as error:
        raise InputError(f"OpenVINO does not read {str(onnx_path)!r} ({one_line(error)}): export it again") from error
    if precision == "int8":
        model, versions["nncf"] = _quantise(model, onnx_path, calibration)
    path = folder / f"{onnx_path.stem}.xml"
    try:
        ov.save_model(model, path, compress_to_fp16=precision != "float32")
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot write {str(path)!r} ({one_line(error)}): make room for it") from error
    return Built(path.name, {}, versions)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("openvino is not installed: pip install 'fastsd[cpu]'") from None
    return openvino


def _quantise(
    model: ov.Model, onnx_path: Path, calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> tuple[ov.Model, str]:
    """The model with convolutions and matrix products in int8 but for the first and the last, and NNCF's version.

    The recipe is the best of 14 on the demo's UNet, calibrated on 4 prompts and compared on 4 others with float32:
    the worst cosine of 40 calls is 0.9986. With SmoothQuant, which fits the weights to the prompts that it has seen, it
    is 0.994, with the first and last layer in int8 0.998; bias correction changes nothing and takes as much time and
    memory again. None of them changes the speed.
    """
    taken = {name: port.partial_shape for port in model.inputs for name in port.get_names()}
    for arrays in calibration:
        fits = arrays.keys() == taken.keys() and all(
            taken[name].compatible(type(taken[name])(array.shape)) for name, array in arrays.items()
        )
        if not fits:
            given = few((f"{name} {list(array.shape)}" for name, array in arrays.items()), 9)
            needed = few((f"{name} {shape}" for name, shape in taken.items()), 9)
            raise InputError(f"calibration inputs are {given}: the graph takes {needed}")

    def calibrate(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        _release(onnx_path)  # the graph is compiled by now, with weights of its own
        return dict(arrays)

    with redirect_stdout(io.StringIO()):  # messages and progress bars; results go there
        nncf = _nncf()
        quantised = nncf.quantize(
            model,
            nncf.Dataset(list(calibration), calibrate),
            subset_size=len(calibration),
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=_ends(model)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
            ),
        )
    return quantised, nncf.__version__


def _ends(model: ov.Model) -> list[str]:
    """The layers next to the first input and to the output: they keep what all others work on."""

    def after(node: ov.Node) -> list[ov.Node]:
        return [taker.get_node() for port in node.outputs() for taker in port.get_target_inputs()]

    def before(node: ov.Node) -> list[ov.Node]:
        return [port.get_node() for port in node.input_values()]

    found = set()
    for start, neighbours in ((model.inputs[0], after), (model.outputs[0], before)):
        pending, seen = [start.get_node()], set()
        while pending:
            node = pending.pop()
            name = node.get_friendly_name()
            if node.get_type_name() in ("Convolution", "MatMul"):
                found.add(name)
            elif node.get_type_name() != "ShapeOf" and name not in seen:  # shapes lead everywhere
                seen.add(name)
                pending += neighbours(node)
    return sorted(found)


def _release(path: Path) -> None:
    """Give back the memory of mapped weights; whoever reads them again gets them from the file."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith(str(path.resolve())):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED


def _nncf() -> Any:
    # Else it reports every quantisation to Google Analytics.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf
    except ImportError:
        raise MissingExtraError("int8 needs nncf, which is not installed: pip install 'fastsd[quantize]'") from None
    return nncf
