"""Parts of a model that no program may hold: code of torch.jit, hooks that keep or say something.

A program repeats what forward hooks made of tensors while it was captured. What they do besides,
such as keeping the output in a list or printing it, would be done once, to tensors without values.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import CaptureError
from .recorded import LIBRARY

_OF_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)
_HARMLESS = (Tensor, nn.Module, int, float, complex, str, type(None), torch.dtype, torch.device)
_STORES = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "DELETE_GLOBAL", "DELETE_ATTR")
_LIBRARIES = ("torch", "math")
_BUILTINS = frozenset("abs bool float int isinstance len max min range sum tuple zip".split())


def check_modules(roots: Sequence[nn.Module]) -> None:
    """Raises CaptureError where a module below ``roots`` has hooks that may do more than return a
    result, or code that is not Python's.
    """
    parts = list(dict.fromkeys(m for root in roots for m in root.modules()))
    for part in parts:
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                "PLT-CAP-025",
                f"{part.original_name} is a module of torch.jit, whose code cannot be traced",
                "compile the module that it was made from",
            )
    for hook in _hooks(parts):
        if not _only_computes(hook):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise CaptureError(
                "PLT-CAP-024",
                f"the forward hook {name} may do more than compute, once for all calls",
                "remove it, or let it do no more than return a result made of tensors",
            )


def _hooks(parts: Sequence[nn.Module]) -> Iterator[Callable[..., Any]]:
    yield from _module._global_forward_hooks.values()
    yield from _module._global_forward_pre_hooks.values()
    for part in parts:
        yield from part._forward_hooks.values()
        yield from part._forward_pre_hooks.values()


def _only_computes(hook: Callable[..., Any]) -> bool:
    if isinstance(hook, _OF_WEIGHTS) or getattr(hook, "__module__", None) == LIBRARY:
        return True
    if not inspect.isfunction(hook):
        return False
    code = hook.__code__
    if any(i.opname in _STORES for i in dis.get_instructions(code)):
        return False
    try:
        held = [cell.cell_contents for cell in hook.__closure__ or ()]
    except ValueError:  # a cell may still be empty
        return False
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    names = {i.argval for i in dis.get_instructions(code) if i.opname in loads}
    held += [*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values()]
    held += [hook.__globals__[n] for n in names & hook.__globals__.keys()]
    nested = any(isinstance(c, types.CodeType) for c in code.co_consts)
    known = names - hook.__globals__.keys() <= _BUILTINS
    return known and not nested and all(map(_is_harmless, held))


def _is_harmless(value: Any) -> bool:
    if isinstance(value, Mapping | list | set):
        return False
    where = value.__name__ if isinstance(value, types.ModuleType) else None
    if where is None and callable(value) and not isinstance(value, nn.Module):
        where = getattr(value, "__module__", None) or ""
    if where is not None:
        return where.partition(".")[0] in _LIBRARIES
    return isinstance(value, _HARMLESS)
