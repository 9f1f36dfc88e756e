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

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
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
        model, versions["nncf"] = _quantise(model, ranges, calibration)
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
    model: ov.Model, ranges: Mapping[str, Range], calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> tuple[ov.Model, str]:
    """The model with its convolutions and matrix products in int8, and the version of NNCF."""
    taken = {name: port.partial_shape for port in model.inputs for name in port.get_names()}
    for arrays in calibration:
        fits = arrays.keys() == taken.keys() and all(
            taken[name].compatible(type(taken[name])(array.shape)) for name, array in arrays.items()
        )
        if not fits:
            given = few((f"{name} {list(array.shape)}" for name, array in arrays.items()), 9)
            needed = few((f"{name} {shape}" for name, shape in taken.items()), 9)
            raise InputError(f"calibration inputs are {given}: the graph takes {needed}")
    with _quiet():
        nncf = _nncf()
        # As a transformer: attention stays in bfloat16 and activations are scaled into the weights where these have
        # room. On the demo's UNet that is both faster (0.87 instead of 0.94 of bfloat16's time) and closer to float32
        # (cosine 0.9992 instead of 0.9956).
        quantised = nncf.quantize(
            model,
            nncf.Dataset([dict(arrays) for arrays in calibration]),
            subset_size=len(calibration),
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER,
        )
    return quantised, nncf.__version__


def _nncf() -> Any:
    # Else it reports every quantisation to Google Analytics.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf
    except ImportError:
        raise MissingExtraError("int8 needs nncf, which is not installed: pip install 'fastsd[quantize]'") from None
    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's messages and progress bars off stdout, where results go."""
    with redirect_stdout(io.StringIO()):
        yield
