"""fastsd: an inference runtime for latent diffusion."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.errors import InputError, MissingExtraError, NumericError
    from fastsd.pipeline import Pipeline, Result, Timings
    from fastsd.sampling.table import StepTable

__version__ = "0.1.0"

# Public name -> the module that holds it, imported when the name is first used: `import fastsd` loads no torch.
_HOMES = {
    "InputError": "fastsd.errors",
    "MissingExtraError": "fastsd.errors",
    "NumericError": "fastsd.errors",
    "Pipeline": "fastsd.pipeline",
    "Result": "fastsd.pipeline",
    "StepTable": "fastsd.sampling.table",
    "Timings": "fastsd.pipeline",
}

__all__ = ["InputError", "MissingExtraError", "NumericError", "Pipeline", "Result", "StepTable", "Timings"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'fastsd' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "diffusers", "transformers"):
            raise
        from fastsd.errors import MissingExtraError

        raise MissingExtraError(
            f"fastsd.{name} needs {error.name}, which is not installed: pip install 'fastsd[cpu]' (or [gpu])"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
