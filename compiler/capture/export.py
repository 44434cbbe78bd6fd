"""Capture: a Python call of a module or function becomes one flat graph of ATen operators.

`torch.export` (non-strict) traces a thin wrapper that takes only tensors: everything else in the
arguments is baked in and reported in `Captured.in_leaves`, and results are flattened by
`capture.tree`. So export never sees containers, model outputs or Python scalars, and their
kinds need no registration.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parameter import is_lazy

from ...kernels.routing_cells import Taken
from ...passes.remarks import Remark
from ...runtime import forked
from ..errors import CaptureError, interrupted
from ..guards.watch import Attributes, modules_of
from .arguments import SCALARS, argument_names, distinct, is_plain
from .captured import Captured
from .chance import DrawnError
from .decisions import Recording
from .experts import routed_experts
from .finite import chosen
from .flat import Flat
from .hooks import check_modules
from .masks import MaskError
from .padding import padded_sizes
from .piecewise import decomposed
from .quiet import functions_kept, quiet
from .spared import spared
from .substitution import substituted
from .traced import Traced
from .tree import Tree, flatten_call

EXCLUSIVE = threading.RLock()
"""Export swaps a module's weights for fakes while it traces, and patches torch; passes and lowering
ask fake tensors, which threads cannot share. Whoever forks waits for it: the child would have torch
patched for good. Nobody who holds it waits for a tier's turn: calls compile while they have one.
"""
forked.at_fork(EXCLUSIVE.acquire, EXCLUSIVE.release, EXCLUSIVE.release)

Dynamic = Mapping[int, Any]
"""Dimension number -> `torch.export.Dim` (or ``Dim.AUTO``) of one tensor."""


def capture(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: Sequence[Dynamic] | None = None,
    decide: bool = False,
) -> Captured:
    """The graph of ``target(*args, **kwargs)``.

    ``dynamic`` has one entry per tensor among the leaves of ``(args, kwargs)``; without it all
    sizes are constants. Open dimensions must have a size of at least 2 in the example, and a
    symbol's smallest size is never below 2, for sizes 0 and 1 change how torch broadcasts: such
    calls need a capture of their own.

    With ``decide``, what the program asks of tensors' values is answered as for the example, and is
    in `Captured.decisions`.

    Raises CaptureError with torch's reason in one line.
    """
    leaves, tree = flatten_call((tuple(args), dict(kwargs)))
    _check_inputs(leaves, tree)
    traced = Traced(target, leaves, tree)
    roots = modules_of(target)
    weights = [t for m in roots for t in (*m.parameters(), *m.buffers())]
    if any(map(is_lazy, weights)):
        raise CaptureError("PLT-CAP-020", "weights get their shapes at the first call")
    check_modules(roots)
    tensors = distinct([x for x in leaves if isinstance(x, torch.Tensor)], weights)
    shapes = None
    if dynamic:
        tensors = list(map(_packed, tensors))
        shapes = (tuple(dict(d) or None for d in dynamic),)
    if decide:
        traced.recording = Recording(tensors, roots)

    def program() -> tuple[Any, list[Remark]]:
        try:
            found, remarks = _export(target, traced, tuple(tensors), shapes, roots)
        except MaskError:
            if not decide:
                raise
            traced.reads_masks = True
            found, remarks = _export(target, traced, tuple(tensors), shapes, roots)
        return decomposed(found), remarks

    try:
        with EXCLUSIVE, quiet(), spared(), functions_kept(), padded_sizes(), _mode_of(weights):
            found, remarks, occupied = _with_cells(program)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many kinds, all of them mean the same here
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise CaptureError("PLT-CAP-001", _first_line(error), _hint(error)) from error
    captured = Flat(found, traced, tree, leaves).captured()
    captured.remarks += remarks
    captured.occupied = occupied
    captured.reads = traced.result.reads
    if traced.recording is not None:
        captured.decisions = traced.recording.decisions()
    return captured


def _mode_of(weights: Sequence[torch.Tensor]) -> Any:
    """The mode to export in: outside of inference mode, weights made in it cannot be stood for."""
    inference = not torch.is_grad_enabled() and any(t.is_inference() for t in weights)
    return torch.inference_mode() if inference else contextlib.nullcontext()


def _with_cells(program: Callable[[], tuple[Any, list[Remark]]]) -> tuple[Any, list[Remark], bool]:
    """What ``program`` gives, and whether that is for branches that get at least one cell.

    Operators such as a roll ask whether a tensor is empty, which has no answer for a branch's
    cells. Branches without cells do not run once they are outlined, so there it is no.
    """
    with Taken(cells=False).within() as taken:
        try:
            return *program(), False
        except GuardOnDataDependentSymNode:
            if not taken.scattered:
                raise
    with Taken(cells=True).within():
        return *program(), True


def _export(
    target: Any,
    traced: Traced,
    tensors: tuple[torch.Tensor, ...],
    shapes: Any,
    roots: list[nn.Module],
) -> tuple[Any, list[Remark]]:
    """torch's exported program, with what `routed_experts` puts in place where that helps."""

    def export() -> Any:
        traced.attributes = attributes = Attributes(roots)
        try:
            return torch.export.export(traced, tensors, dynamic_shapes=shapes, strict=False)
        finally:
            attributes.restore()

    def exported() -> Any:
        try:
            return export()
        except DrawnError:
            if threading.active_count() == 1:
                raise
            return export()  # another thread's draws are the exception

    with chosen(roots), substituted(roots), routed_experts(target) as count:
        if not count:
            return exported(), []
        try:
            return exported(), []
        except CaptureError:
            raise  # the model's way is refused, too
        except Exception as error:
            if interrupted(error):
                raise
            reason = f"{count} modules keep the model's way: {_first_line(error)}"
    hint = "their experts_implementation then decides how they run"
    return export(), [Remark("PLT-CAP-021", "missed", "capture", (), reason, hint)]


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose strides follow from its sizes, those of dimensions of size 1 included: others
    would be symbols of their own, which no call's sizes tell.
    """
    for order in (torch.contiguous_format, torch.channels_last):
        if tensor.is_contiguous(memory_format=order):
            return tensor.clone(memory_format=order)
    return tensor.clone()


def _check_inputs(leaves: list[Any], tree: Tree) -> None:
    for name, leaf in zip(argument_names(tree), leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            if not is_plain(leaf):
                raise CaptureError("PLT-CAP-008", f"argument {name!r} is not a plain dense tensor")
        elif not isinstance(leaf, SCALARS):
            kind = type(leaf).__name__
            raise CaptureError(
                "PLT-CAP-009",
                f"argument {name!r} is a {kind}, whose contents cannot be checked at later calls",
                "pass tensors, numbers, texts and containers of them",
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300]


def _hint(error: BaseException) -> str:
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "make the choice a torch.cond or torch.where, or leave it outside"
    return ""
