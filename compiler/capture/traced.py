"""What `torch.export` traces: a call from its tensors to the tensors of its result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError, ChangeError
from ..guards.settings import Read, reads_of
from ..guards.watch import Attributes, modules_of
from .as_eager import as_eager
from .chance import chance
from .checked import CheckedValues
from .counts import Counts
from .decisions import Recording
from .limits import CheckedSizes, Untouched
from .masks import masks
from .recorded import unhooked
from .state import Given, Tracked, Update
from .tree import Tree, flatten, unflatten


class Traced(nn.Module):
    """Takes the tensor leaves of a call, returns the tensor leaves of its result."""

    def __init__(self, target: Callable[..., Any], leaves: list[Any], tree: Tree) -> None:
        super().__init__()
        self.target = target  # a module is registered by this: its weights become lifted
        self._call = (leaves, tree)
        self.result = _Holder()
        self.attributes: Attributes | None = None
        self.recording: Recording | None = None
        self.reads_masks = False  # whether values decide which masks are left out
        self.roots = modules_of(target)
        self.training = getattr(target, "training", False)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        supply = iter(tensors)
        leaves, tree = self._call
        given = [next(supply) if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = unflatten(tree, given)
        tracked = Tracked((args, kwargs))
        before, _ = flatten((args, kwargs), marks=tracked.given)
        if self.attributes is not None:
            self.attributes.begin()
        recording = contextlib.nullcontext() if self.recording is None else self.recording
        if self.recording is not None:
            self.recording.begin(tensors)
        untouched = Untouched(self.attributes.held() if self.attributes else ())
        below = dict.fromkeys(m for root in self.roots for m in root.modules())
        roots = self.roots
        with CheckedSizes(tensors), unhooked(roots), as_eager(roots), recording, untouched:
            with CheckedValues(), Counts(), reads_of(below) as reads, masks(self.reads_masks):
                with chance():
                    out = self.target(*args, **kwargs)
        self.result.reads |= reads
        after, tree_after = flatten((args, kwargs), marks=tracked.given)
        same = len(after) == len(before) and all(
            a is b or (not isinstance(a, torch.Tensor) and a == b)
            for a, b in zip(after, before, strict=True)
        )
        if not same or tree_after.count != len(before):
            raise CaptureError(
                "PLT-CAP-005", "the program changes a container it is given", "return it instead"
            )
        flat, out_tree = flatten(out, objects=True, marks=tracked.given)
        assigned = self._assigned(untouched, flat)
        changed = self.attributes.changed() if self.attributes is not None else None
        if changed is not None:
            error = ChangeError(
                "PLT-CAP-019",
                f"the program changes the attribute {changed[0]!r} of a module",
                "make it a buffer that is written in place, or return it",
            )
            error.noticed = changed[1]
            raise error
        changes = list(tracked.changes())
        found: list[torch.Tensor] = []
        own = {id(t): Given(i, tensor=True) for i, t in enumerate(tensors)}
        # Not the tensors themselves: export objects to fake tensors that survive the trace.
        slots = [_slot(x, found, {}) for x in flat]
        updates = [Update(n, t, [_slot(x, found, own) for x in xs]) for n, xs, t in changes]
        kept = [(i, name, _slots(x, found, own)) for i, name, x in assigned]
        if not found:
            raise CaptureError("PLT-CAP-007", "no result is a tensor")
        self.result.given = {n: own[id(t)] for n, t in enumerate(found) if id(t) in own}
        self.result.value = out_tree, slots, updates, kept
        return tuple(found)

    def _assigned(self, untouched: Untouched, result: list[Any]) -> list[tuple[int, str, Any]]:
        """Attributes that the program gives other tensors, or lists of them, without a look at what
        they held. They are put back, and a run will assign them.
        """
        attributes = self.attributes
        found = [] if attributes is None else list(attributes.replaced())
        untouched.look([result, [x for _, _, x in found]])
        if attributes is None or untouched.touched:
            return []
        for number, name, _ in found:
            attributes.put_back(number, name)
        return found


class _Holder:
    """Keeps a value set while tracing: export puts plain attributes of a module back."""

    value: tuple[Tree, list[Any], list[Update], list[tuple[int, str, Any]]]
    given: dict[int, Given]  # results that are arguments themselves

    def __init__(self) -> None:
        self.reads: set[Read] = set()


def _slots(value: Any, found: list[torch.Tensor], given: Mapping[int, Given]) -> Any:
    """`_slot` of a tensor, or of each in a list."""
    if isinstance(value, list):
        return [_slot(x, found, given) for x in value]
    return _slot(value, found, given)


def _slot(leaf: Any, found: list[torch.Tensor], given: Mapping[int, Given]) -> Any:
    """What stands for a leaf in `Captured`; tensors that were not given are added to ``found``."""
    if isinstance(leaf, torch.Tensor):
        if id(leaf) in given:
            return given[id(leaf)]
        found.append(leaf)
        return len(found) - 1
    if isinstance(leaf, torch.SymFloat | torch.SymBool):
        raise CaptureError("PLT-CAP-006", "a result is a number computed from tensors")
    if isinstance(leaf, torch.SymInt):
        expr = leaf.node.expr
        return (int(expr),) if expr.is_Integer else expr
    return leaf if isinstance(leaf, Given) else (leaf,)
