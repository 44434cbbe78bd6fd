"""What all routing operators share: slots sorted by branch, and who watches the routes taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

Observer = Callable[[Tensor, int], None]

_observers: ContextVar[tuple[Observer, ...]] = ContextVar("plait_route_observers", default=())


def by_branch(index: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """Slots sorted by branch: see `routing.route`. The host waits for no other device."""
    flat = index.reshape(-1)
    branch = torch.where(names_branch(flat, branches), flat, branches)
    ordered, order = torch.sort(branch, stable=True)
    numbers = torch.arange(branches + 1, dtype=branch.dtype, device=index.device)
    return torch.searchsorted(ordered, numbers), order


def names_branch(index: Tensor, branches: int) -> Tensor:
    """Which elements of ``index`` name a branch (bool, the same shape)."""
    return (index >= 0) & (index < branches)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within it, ``observer(index, branches)`` is called for every `route` and `scatter` that runs.

    Only the present thread (or task) is watched; tracing runs nothing and shows nothing. The tensor
    is the operator's own argument: an observer keeps a copy.
    """
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def is_observed() -> bool:
    """Whether anybody watches the routes of this thread."""
    return bool(_observers.get())


def show(index: Tensor, branches: int) -> None:
    """Tells the observers of this thread that ``index`` was routed to ``branches``."""
    for observer in _observers.get():
        observer(index, branches)
