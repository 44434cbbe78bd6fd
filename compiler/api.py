"""`plait.compile`, as a function and as a decorator, and `plait.load`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn

from .build import build
from .capture.arguments import as_call
from .compiled import Compiled
from .errors import BudgetError, OptionError, PlaitError
from .modes import plain_modes
from .options import Options
from .program import Program
from .serialize import program_file

if TYPE_CHECKING:
    from .placed.device import Device
    from .placed.options import PlacementOptions
    from .placed.placed import Placed
    from .routing.profile import Profile


@overload
def compile(
    model: None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    profile: Profile | Iterable[Any] | Literal["online"] | None = None,
    weight_budget: int | str | None = None,
    devices: str | Sequence[Device | str] | None = None,
    placement: PlacementOptions | None = None,
    pipeline: str | None = None,
    tune: str = "quick",
) -> Callable[[Any], Any]: ...


@overload
def compile(
    model: Callable[..., Any],
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    profile: Profile | Iterable[Any] | Literal["online"] | None = None,
    weight_budget: int | str | None = None,
    devices: None = None,
    placement: None = None,
    pipeline: str | None = None,
    tune: str = "quick",
) -> Compiled: ...


@overload
def compile(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    devices: str | Sequence[Device | str],
    placement: PlacementOptions | None = None,
    pipeline: str | None = None,
    tune: str = "quick",
) -> Placed: ...


def compile(
    model: Callable[..., Any] | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    profile: Profile | Iterable[Any] | Literal["online"] | None = None,
    weight_budget: int | str | None = None,
    devices: str | Sequence[Device | str] | None = None,
    placement: PlacementOptions | None = None,
    pipeline: str | None = None,
    tune: str = "quick",
) -> Any:
    """Compiles ``model``: a module, a function, or a module class (whose instances are compiled).

    Compilation happens at the first call, or right away with ``example_inputs`` (a tuple of
    positional or a dict of keyword arguments). ``dynamic_shapes`` is what `torch.export.export`
    takes; without it a dimension becomes dynamic when a second size of it is seen. ``pipeline`` is
    a pass pipeline as text, ``tune`` "off", "quick" or "full". ``profile`` (`plait.profile`) tells
    how the model routes; results do not depend on it. Batches, as `plait.profile` takes them, are
    profiled first. ``profile="online"`` learns from the first calls, and compiles again in the
    background. ``weight_budget`` is how much of the weights may be in memory at once, in bytes,
    as text ("2GB") or as a share of all ("40%"): experts and branches of routers beyond that lie in
    files, and come when they are routed to; of a model on a GPU the experts lie in host memory.
    Without ``model`` it returns a decorator.

    ``devices`` (such as ``["cuda:0", "cuda:1"]`` or ``"4xcpu:2GB"``) divides a module among devices
    that none of them need hold it, as ``placement`` says, and returns a `Placed`.

    Raises OptionError for an option without meaning (for a budget that cannot be kept, once it is
    compiled), FileError where weights cannot be written and InputError for wrong
    ``example_inputs``, ``dynamic_shapes`` or a profile of another model.
    """
    batches = profile if _are_batches(profile) else None
    options = Options(pipeline, tune, None if batches is not None else profile, weight_budget)
    if pipeline is not None:
        _check_pipeline(pipeline)
    if model is None:
        return functools.partial(
            compile,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            profile=profile,
            weight_budget=weight_budget,
            devices=devices,
            placement=placement,
            pipeline=pipeline,
            tune=tune,
        )
    if isinstance(model, Compiled):
        model.check_code("compiled")
        model = model.original
    if devices is not None or placement is not None:
        if any(x is not None for x in (profile, dynamic_shapes, weight_budget)):
            raise OptionError(
                "PLT-DST-008",
                "a placed model has no profile, no dynamic shapes and no weight budget",
                "leave them out, or leave devices= out",
            )
        return _divided(model, devices, placement, options, example_inputs)
    if inspect.isclass(model):
        if not issubclass(model, nn.Module):
            raise OptionError(
                "PLT-OPT-003", f"{model.__name__} is not a module class", "compile an instance"
            )
        if example_inputs is not None:
            raise OptionError(
                "PLT-OPT-004",
                "example_inputs cannot be given for a class",
                "call prepare(example_inputs) on an instance",
            )
        if batches is not None:
            raise OptionError(
                "PLT-OPT-005", "batches cannot be given for a class", "compile an instance"
            )
        return _compile_class(model, options, dynamic_shapes)
    if not callable(model):
        kind = type(model).__name__
        raise OptionError(
            "PLT-OPT-003", f"a {kind} cannot be compiled", "give a module or function"
        )
    if batches is not None:
        from .routing.profile import profile as profiled

        options = dataclasses.replace(options, profile=profiled(model, batches))
    compiled = Compiled(model, options, dynamic_shapes)
    return compiled if example_inputs is None else compiled.prepare(example_inputs)


def _are_batches(profile: Any) -> bool:
    return isinstance(profile, Iterable) and not isinstance(profile, str | Mapping | torch.Tensor)


def _divided(
    model: Any,
    devices: str | Sequence[Device | str] | None,
    placement: PlacementOptions | None,
    options: Options,
    example_inputs: Any,
) -> Placed:
    """`compile` of a module for several devices."""
    from .placed.options import PlacementOptions
    from .placed.placed import Placed

    if devices is None:
        raise OptionError("PLT-DST-001", "there are no devices", 'such as devices=["cpu", "cpu"]')
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise OptionError("PLT-OPT-003", f"a {kind} cannot be divided", "give a module")
    placed = Placed(model, devices, placement or PlacementOptions(), options)
    return placed if example_inputs is None else placed.prepare(*as_call(example_inputs))


def _check_pipeline(text: str) -> None:
    """Raises OptionError when ``text`` is no pipeline of known passes."""
    from ..passes.pipeline_text import parse_pipeline

    try:
        parse_pipeline(text)
    except (ValueError, LookupError) as error:
        raise OptionError("PLT-OPT-002", str(error)) from None


class _CompiledClass(type):
    """Calling such a class makes an instance of ``_base`` and compiles it."""

    _base: type[nn.Module]
    _settings: tuple[Options, Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "_base" not in vars(cls):  # a subclass of the compiled class is an ordinary class
            return super().__call__(*args, **kwargs)
        return Compiled(cls._base(*args, **kwargs), *cls._settings)

    def __instancecheck__(cls, instance: Any) -> bool:
        if isinstance(instance, Compiled) and "_base" in vars(cls):
            return isinstance(instance.original, cls._base)
        return super().__instancecheck__(instance)


def _compile_class(model: type[nn.Module], options: Options, dynamic_shapes: Any) -> type:
    body = {
        "__doc__": model.__doc__,
        "__module__": model.__module__,
        "__qualname__": model.__qualname__,
        "_base": model,
        "_settings": (options, dynamic_shapes),
    }
    return _CompiledClass(model.__name__, (model,), body)


def load(path: str | Path, *, weight_budget: int | str | None = None) -> Compiled:
    """The compiled model in ``path``. Its Python code is not needed.

    ``weight_budget`` is as for `compile`; without one the model's own holds, if it was compiled
    with one. Under a budget the weights are never in memory as a whole: this is the way to run a
    model that does not fit. What becomes of ``path`` later does not matter.

    Results of classes that were not imported come back as `capture.tree.Record` (fields by name).
    Raises FileError when the file is missing, truncated, altered or of another version, or when
    there is no room for weights in the cache directory; OptionError for a budget that has no
    meaning or cannot be kept.
    """
    path = Path(path)
    Options(weight_budget=weight_budget)
    with plain_modes():
        return _loaded(path, weight_budget)


def _loaded(path: Path, weight_budget: int | str | None) -> Compiled:
    """See `load`."""
    saved = program_file.read(path, weight_budget)
    try:
        compiled = Compiled(None, saved.options, shell=saved.shell, signature=saved.signature)
        dispatcher = compiled._dispatcher
        dispatcher.notes.remarks += saved.remarks
        dispatcher.specialiser.store = saved.store
        refusals: list[BudgetError] = []
        for captured in saved.programs:
            try:
                executable = build(captured, saved.options, saved.store)
            except BudgetError as error:
                refusals.append(error)
                continue
            dispatcher.adopt(Program(captured, executable, [saved.shell]))
        if refusals:
            raise max(refusals, key=lambda error: error.least)
        if saved.store is not None:
            saved.store.settle()
    except PlaitError:
        raise
    except Exception as error:
        raise program_file.unusable(path, error) from error
    return compiled
