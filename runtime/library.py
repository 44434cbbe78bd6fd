"""Library steps: torch operators called with arguments kept as JSON."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .plan import PlanError
from .sizes import evaluate


def resolve(target: str) -> Callable[..., Any]:
    """The operator named "namespace.name.overload", or a Python function on sizes
    ("python:operator.add").

    Raises PlanError when there is none such.
    """
    try:
        if target.startswith("python:"):
            module, name = target.removeprefix("python:").rsplit(".", 1)
            if module not in ("_operator", "math", "torch", "builtins"):
                raise AttributeError(module)
            return getattr(importlib.import_module(module), name)
        namespace, name, overload = target.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except (ValueError, AttributeError) as error:
        raise PlanError(f"this torch has no operator {target!r}: compile again") from error


def bind(template: Any, tensors: Sequence[Any], values: Mapping[str, int]) -> Any:
    """``template`` (see LibraryStep) with its references, sizes and constants filled in."""
    if isinstance(template, list):
        return [bind(t, tensors, values) for t in template]
    if not isinstance(template, dict):
        return template
    ((kind, value),) = template.items()
    if kind == "ref":
        return tensors[value]
    if kind == "size":
        return evaluate(value, values)
    if kind == "none":
        return None
    if kind == "float":  # inf and nan have no JSON form
        return float(value)
    if kind == "complex":
        return complex(*value)
    if kind in ("dtype", "layout", "memory_format"):
        return getattr(torch, value)
    if kind == "device":
        return torch.device(value)
    if kind == "tuple":
        return tuple(bind(t, tensors, values) for t in value)
    raise PlanError(f"library argument of unknown kind {kind!r}")


def encode(value: Any, refs: Mapping[Any, int]) -> Any:
    """The JSON template of an operator argument; nodes found in ``refs`` become references.

    Raises TypeError for a value that has no JSON form.
    """
    try:
        if value in refs:
            return {"ref": refs[value]}
    except TypeError:
        pass
    if value is None:
        return {"none": 1}
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        kind = type(value).__name__
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(v, refs) for v in value]}
    if isinstance(value, list):
        return [encode(v, refs) for v in value]
    raise TypeError(f"{type(value).__name__} {value!r} cannot be kept in a plan")
