"""What the Python bindings of a library offer, read from the module itself; run as a script it prints that as JSON.

A process of its own imports them: the bindings over stub libraries must not be taken for a TensorRT that works, and
those of the two libraries define the same C++ types.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from types import ModuleType
from typing import Any, TypedDict


class Class(TypedDict):
    bases: list[str]
    members: dict[str, int]  # of an enumeration
    properties: dict[str, bool]  # whether it can be set
    methods: dict[str, list[list[str]]]  # parameters of each overload; with "=" where they have a default


class Surface(TypedDict):
    version: str
    classes: dict[str, Class]
    functions: dict[str, list[list[str]]]


def surface(module: ModuleType) -> Surface:
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    for outer, cls in list(classes.items()):
        classes |= {f"{outer}.{name}": value for name, value in vars(cls).items() if isinstance(value, type)}
    functions = {name: value for name, value in vars(module).items() if callable(value) and name not in classes}
    return {
        "version": getattr(module, "__version__", ""),
        "classes": {name: _class(value) for name, value in classes.items()},
        "functions": {name: _overloads(name, value.__doc__) for name, value in functions.items()},
    }


def _class(cls: type) -> Class:
    values: dict[str, Any] = {name: getattr(cls, name) for name in dir(cls)}
    members = getattr(cls, "__members__", {})
    public = {name: value for name, value in values.items() if not name.startswith("_") and name not in members}
    methods = {name: _overloads(name, value.__doc__) for name, value in public.items() if callable(value)}
    return {
        "bases": [base.__name__ for base in cls.__mro__[1:]],
        "members": {name: int(value) for name, value in members.items()},
        "properties": {name: value.fset is not None for name, value in public.items() if isinstance(value, property)},
        "methods": methods | {"__init__": _overloads("__init__", cls.__init__.__doc__)},
    }


def _overloads(name: str, doc: str | None) -> list[list[str]]:
    """Parameters without self, of each signature that pybind11 wrote into a docstring."""
    lines = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> .*$", doc or "", re.MULTILINE)
    found = []
    for line in lines:
        parameters, depth = [""], 0
        for letter in line:
            depth += (letter in "[(<") - (letter in "])>")
            if letter == "," and depth == 0:
                parameters.append("")
            else:
                parameters[-1] += letter
        names = [f"{part.split(':')[0].strip()}{'=' * ('=' in part)}" for part in parameters if part.strip()]
        found.append([part for part in names if part.rstrip("=") != "self"])
    return found


if __name__ == "__main__":
    print(json.dumps(surface(importlib.import_module(sys.argv[1]))))
