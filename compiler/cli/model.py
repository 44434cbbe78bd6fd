"""Models named on the command line: found, given arguments, compiled."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...runtime.executor import Executor
from ...runtime.plan import BranchStep, FetchStep, KernelStep, LibraryStep
from ..api import compile
from ..api import load as load_saved
from ..capture.arguments import as_call
from ..capture.captured import Captured
from ..capture.tree import flatten_call, unflatten
from ..compiled import Compiled
from ..errors import CaptureError
from ..modes import plain_modes
from ..program import Program
from ..specialise import Refused, captured_call
from .console import Console
from .error import CliError

_INPUT = re.compile(r"(\w+)\[\s*((?:\d+\s*,\s*)*\d+)?\s*\]")
_FREE_SIZE = 8  # what a dimension without a fixed size becomes in made-up inputs


@dataclass
class Loaded:
    """A model from the command line with example arguments; ``saved`` where it came compiled."""

    name: str
    model: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    saved: bool = False


def load(
    name: str,
    inputs: Sequence[str],
    need_inputs: bool = True,
    weight_budget: int | str | None = None,
) -> Loaded:
    """The model that ``name`` stands for; a saved one under ``weight_budget``.

    Raises CliError saying what is wrong with it.

    A model without example inputs is wrong, too, unless ``need_inputs`` is False.
    """
    given = tuple(_make_input(text) for text in inputs)
    path = Path(name)
    if ":" not in name or path.is_file():
        if not path.is_file():
            raise CliError(
                f"{name!r} is neither a file nor module:function",
                "write it as package.module:function, file.py:function or a saved file's path",
            )
        if path.suffix == ".py":
            raise CliError(f"{name!r} names no function", f"write {name}:function")
        compiled = load_saved(path, weight_budget=weight_budget)
        args, kwargs = example_arguments(newest(compiled).captured)
        return Loaded(name, compiled, given or args, {} if given else kwargs, saved=True)
    target = resolve(name)
    if not isinstance(target, nn.Module) and callable(target):
        try:
            target = target()
        except (Exception, SystemExit) as error:
            raise CliError(
                f"{name} raised {type(error).__name__}: {first_line(error)}",
                "it is called without arguments and returns a model, or (model, example_inputs)",
            ) from error
    example: Any = ()
    if isinstance(target, tuple | list) and len(target) == 2:
        target, example = target
    if not callable(target):
        raise CliError(
            f"{name} gave a {type(target).__name__}, not a model",
            "return a model, or (model, example_inputs)",
        )
    args, kwargs = (given, {}) if given else as_call(example)
    if need_inputs and not args and not kwargs:
        raise CliError(
            f"{name} comes without example inputs",
            "return (model, example_inputs), or give --input 'float32[1,3,224,224]'",
        )
    return Loaded(name, target, args, kwargs)


def resolve(name: str) -> Any:
    """What ``module:name`` or ``file.py:name`` stands for. Raises CliError where it is nothing."""
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise CliError(f"{name!r} names no function", "write it as package.module:function")
    return _attribute(_module(where), where, attribute)


def newest(compiled: Compiled) -> Program:
    """The program that compiling made. Raises CliError with the reason where there is none."""
    programs = compiled.programs
    if not programs:
        why = next((r.reason for r in reversed(compiled.remarks) if r.kind == "missed"), "unknown")
        raise CliError(f"the model was not compiled ({why})", "plait check MODEL shows more")
    return programs[-1]


def on_cpu(loaded: Loaded, compiled: Compiled) -> tuple[Executor, list[torch.Tensor]]:
    """What runs the newest program, and its flat inputs. Raises CliError for one on a GPU."""
    program = newest(compiled)
    executor = getattr(program.executable, "executor", None)
    if not isinstance(executor, Executor):
        raise CliError("steps of a program for a GPU are not timed", "try plait kernels MODEL")
    leaves, _ = flatten_call((tuple(loaded.args), dict(loaded.kwargs)))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    return executor, [*tensors, *program.captured.states]


def example_arguments(captured: Captured) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Made-up arguments that a captured program accepts; free dimensions get a small size."""
    sizes: dict[str, int] = {}
    for name, (low, high) in captured.ranges.items():
        sizes[name] = min(max(_FREE_SIZE, low), high if high is not None else _FREE_SIZE + low)
    specs = iter(captured.inputs)
    leaves = []
    for leaf in captured.in_leaves:
        if leaf is not None:
            leaves.append(leaf[0])
            continue
        spec = next(specs)
        shape = [
            d if isinstance(d, int) else int(d.subs({s: sizes[s.name] for s in d.free_symbols}))  # type: ignore[union-attr]
            for d in spec.shape
        ]
        leaves.append(_random(shape, spec.dtype).to(spec.device))
    return unflatten(captured.in_tree, leaves)


_STEPS: dict[type, str] = {
    KernelStep: "kernels", LibraryStep: "library calls", BranchStep: "choices of branches",
    FetchStep: "fetches of weights",
}  # fmt: skip


def captured_of(loaded: Loaded) -> Captured:
    """The graph of the call with the example arguments, as compiling it captures it.

    Raises CaptureError where there is none, and CliError where the model itself fails.
    """
    call = loaded.model, loaded.args, loaded.kwargs
    with plain_modes():
        try:
            return captured_call(*call)
        except CaptureError as error:
            refused = Refused(error)
        try:
            loaded.model(*loaded.args, **loaded.kwargs)
        except Exception as error:
            raise CliError(
                f"{loaded.name} fails on its example inputs: {type(error).__name__}: "
                f"{first_line(error)}",
                "give it inputs that it takes",
            ) from error
        if not refused.settles:
            raise refused.error
        return captured_call(*call)


def compile_loaded(
    loaded: Loaded,
    pipeline: str | None,
    tune: str,
    console: Console,
    weight_budget: int | str | None = None,
) -> Compiled:
    """Compiles (unless it came compiled) and says how long it took."""
    if loaded.saved:
        if pipeline is not None or tune != "quick":
            raise CliError(f"{loaded.name} is compiled already", "leave --pipeline and --tune out")
        return loaded.model
    start = time.perf_counter()
    inputs = loaded.kwargs if loaded.kwargs and not loaded.args else tuple(loaded.args)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model that is not compiled is told of below
        model = cast("Callable[..., Any]", loaded.model)
        compiled = compile(
            model,
            example_inputs=inputs,
            weight_budget=weight_budget,
            pipeline=pipeline,
            tune=tune,
        )
    seconds = time.perf_counter() - start
    plan = newest(compiled).executable.plan
    steps = Counter(_STEPS[type(s)] for s in plan.every_step())
    parts = ", ".join(f"{count} {kind}" for kind, count in steps.items())
    console.print(f"compiled in {seconds:.1f} s: {parts or 'no steps'}")
    return compiled


def _make_input(text: str) -> torch.Tensor:
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise CliError(f"--input {text!r} is not understood", "write it as float32[1,3,224,224]")
    dtype = getattr(torch, match[1], None)
    if not isinstance(dtype, torch.dtype):
        raise CliError(f"--input: torch has no dtype {match[1]!r}", "use float32, int64, ...")
    shape = [int(d) for d in (match[2] or "").split(",") if d]
    try:
        return _random(shape, dtype)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = re.sub(r"^\[enforce fail.*?\] \S+ == \d+\. ", "", first_line(error))
        raise CliError(f"--input {text!r} cannot be made: {reason}", "use another") from error


def _random(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Normal noise; for integers zeros and ones, which index any table of two rows."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)


def _module(where: str) -> Any:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where).resolve()
        if not path.is_file():
            raise CliError(f"there is no file {where}", "check the path")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    except CliError:
        raise
    except (Exception, SystemExit) as error:
        raise CliError(
            f"importing {where!r} raised {type(error).__name__}: {first_line(error)}",
            "check the name, and that it imports from this folder",
        ) from error


def _attribute(module: Any, where: str, name: str) -> Any:
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
            near = difflib.get_close_matches(part, public, 1)
            known = ", ".join(public[:8]) or "no functions"
            mend = f"did you mean {near[0]!r}?" if near else f"it has {known}"
            raise CliError(f"{where} has no {name!r}", mend)
        value = getattr(value, part)
    return value


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0]
