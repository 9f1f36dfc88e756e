"""What a family is: one module per family, found by the `_class_name` of a checkpoint's `model_index.json`."""

from __future__ import annotations

from types import ModuleType

from fastsd.errors import InputError

FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
}


def family(class_name: str) -> ModuleType:
    """The module of a pipeline class.

    Raises:
        InputError: the class is not among those that run here.
    """
    from importlib import import_module

    if class_name not in FAMILIES:
        raise InputError(
            f"this checkpoint is a {class_name}, which this version does not run: use one of {', '.join(FAMILIES)}"
        )
    return import_module(f"fastsd.families.{FAMILIES[class_name]}")
