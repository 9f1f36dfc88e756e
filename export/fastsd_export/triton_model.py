"""Images from prompts, as a model of the Triton Inference Server's Python backend (`triton_repo` copies this file).

Here runs the loop, with numpy alone; the engines are models of the same server, which places them, loads them natively
and measures each. They are called one after another (business logic scripting), over shared memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton brings it

from fastsd import bundle
from fastsd.errors import InputError, MissingExtraError, NumericError
from fastsd.files import one_line
from fastsd.pipeline import Pipeline

# Inputs of this model -> arguments of a call. One value is for all images, several are one per image.
INPUTS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "scheduler": "scheduler",
    "height": "height",
    "width": "width",
}
# What one engine makes and another takes unchanged: it stays where it is, on the GPU if it was made there.
HANDED = ("context", "position")


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the bundle beside this file; its engines are called by the first request."""
        folder = Path(args["model_repository"], args["model_version"], "bundle")
        try:
            loaded = bundle.load(folder, "auto", "auto", "cpu", serve=serve)
            self._pipeline = Pipeline(**loaded._asdict())
        except (InputError, MissingExtraError) as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request: its images and their seeds, or its error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        codes = pb_utils.TritonError
        try:
            return self._images(request)
        except InputError as error:
            message, code = str(error), codes.INVALID_ARG
        except Cancelled:
            message, code = "the request was cancelled", codes.CANCELLED
        except (NumericError, EngineError) as error:
            message, code = str(error), codes.INTERNAL
        except Exception as error:  # the other requests, and the next ones, are still to be answered
            message, code = f"{type(error).__name__}: {one_line(error)}", codes.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))

    def _images(self, request: Any) -> Any:
        def stop_if_cancelled(_: object) -> None:
            if request.is_cancelled():
                raise Cancelled

        given = {argument: _read(request, name) for name, argument in INPUTS.items()}
        if given["prompt"] is None:
            raise InputError("the input prompt is missing: give a text for each image")
        result = self._pipeline(on_step=stop_if_cancelled, **given)
        pixels = np.stack([np.asarray(image) for image in result.images])
        outputs = [pb_utils.Tensor("image", pixels), pb_utils.Tensor("seed", np.array(result.seeds, np.int64))]
        return pb_utils.InferenceResponse(output_tensors=outputs)


class Cancelled(Exception):
    """The client no longer waits."""


class EngineError(Exception):
    """Triton could not run an engine."""


def _read(request: Any, name: str) -> Any:
    """The value of an input, a list if there are several; None if it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().ravel().tolist()
    try:
        values = [one.decode() if isinstance(one, bytes) else one for one in values]
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no UTF-8 ({one_line(error)}): encode it so") from None
    return values[0] if len(values) == 1 else values


# ------------------------------------------------------------------------------------------------------------
# Engines


@dataclass(frozen=True)
class Handle:
    """A tensor of Triton's that is not read here."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return tuple(self.tensor.shape())


def serve(engine: bundle.Engine) -> Callable[..., tuple[Any, ...]]:
    """An engine as a function of numpy arrays by name, run by the model of the server that holds it."""
    model, names = engine.options["model"], [spec.name for spec in engine.outputs]
    read = [name for name in names if name not in HANDED]
    host = {"preferred_memory": pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)}

    def ask(inputs: Sequence[Any], outputs: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
        response = pb_utils.InferenceRequest(
            model_name=model, inputs=inputs, requested_output_names=outputs, **options
        ).exec()
        if response.has_error():
            raise EngineError(f"Triton could not run {model}: {one_line(Exception(response.error().message()))}")
        return {name: pb_utils.get_output_tensor_by_name(response, name) for name in outputs}

    def run(**arrays: Any) -> tuple[Any, ...]:
        inputs = [_to_triton(spec, arrays[spec.name]) for spec in engine.inputs]
        found = ask(inputs, names, host if read == names else {})
        # The wish holds for all outputs of a request, so what stays on the GPU has another than what is read here.
        if not all(found[name].is_cpu() for name in read):
            found |= ask(inputs, read, host)
        return tuple(
            Handle(found[spec.name]) if spec.name in HANDED else _to_numpy(spec, found[spec.name])
            for spec in engine.outputs
        )

    return run


# numpy has no bfloat16. Such numbers pass through it as uint16, which is enough to pick rows.
UNSIGNED, BFLOAT = 1, 4  # DLDataTypeCode
NEW, USED = b"dltensor", b"used_dltensor"  # names of a capsule, before and after somebody took what is in it


def _to_triton(spec: bundle.TensorSpec, value: Any) -> Any:
    if isinstance(value, Handle):
        return value.tensor
    if spec.dtype == "bfloat16":
        capsule = _relabel(np.array(value).__dlpack__(), BFLOAT)
        tensor = pb_utils.Tensor.from_dlpack(spec.name, capsule)
        # Triton gives a capsule that it took another name than DLPack does; numpy would not know it as taken.
        _python_api("PyCapsule_SetName", ctypes.c_int)(capsule, USED)
        return tensor
    return pb_utils.Tensor(spec.name, np.ascontiguousarray(value))


def _to_numpy(spec: bundle.TensorSpec, tensor: Any) -> Any:
    """A copy, so that Triton has its shared memory back."""
    if spec.dtype == "bfloat16":
        return np.array(np.from_dlpack(_Exporter(_relabel(tensor.to_dlpack(), UNSIGNED))))
    return np.array(tensor.as_numpy())


@dataclass(frozen=True)
class _Exporter:
    """What `numpy.from_dlpack` takes."""

    capsule: Any

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def _relabel(capsule: Any, code: int) -> Any:
    """A DLPack capsule of 16-bit numbers as one of another kind of them."""
    address = _python_api("PyCapsule_GetPointer", ctypes.c_void_p)(capsule, NEW)
    # struct DLTensor {void* data; DLDevice device; int32_t ndim; DLDataType dtype; ...}, with the code at byte 20.
    ctypes.c_uint8.from_address(address + 20).value = code
    return capsule


def _python_api(name: str, result: Any) -> Callable[[Any, bytes], Any]:
    return ctypes.PYFUNCTYPE(result, ctypes.py_object, ctypes.c_char_p)((name, ctypes.pythonapi))
