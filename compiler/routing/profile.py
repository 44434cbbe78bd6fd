"""How a model routes: recorded by running it, kept as a file, compared with the model it is of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..capture.arguments import as_call
from ..errors import InputError, OptionError
from . import profile_file
from .collect import Collector, fingerprint, original
from .stats import RouterStats, Statistics, Tally

_HALF = 0.0005  # half of the last digit that is shown of a share


@dataclass(frozen=True)
class Profile:
    """The routes that a model took over some batches.

    ``model`` is the name of its class, ``fingerprint`` a hash of its structure. Decisions are made
    from ``fitted`` and judged by ``heldout``, statistics of batches that were kept apart for that.
    """

    model: str
    fingerprint: str
    fitted: Statistics
    heldout: Statistics

    @cached_property
    def total(self) -> Statistics:
        """Fitted and held-out batches together."""
        return self.fitted.plus(self.heldout)

    def routes(self) -> dict[tuple[str, int], tuple[RouterStats | None, RouterStats | None]]:
        """The fitted and the held-out statistics of each router."""
        fitted = {router.key: router for router in self.fitted}
        held = {router.key: router for router in self.heldout}
        keys = dict.fromkeys([*fitted, *held])
        return {key: (fitted.get(key), held.get(key)) for key in keys}

    def merge(self, other: Profile) -> Profile:
        """The profile of both runs' batches: fitted with fitted, held-out with held-out.

        Raises InputError where ``other`` is of a model of another structure.
        """
        if not isinstance(other, Profile):
            kind = type(other).__name__
            raise InputError("PLT-PRF-002", f"a {kind} is no profile", "plait.profile makes one")
        if self.fingerprint != other.fingerprint:
            raise InputError(
                "PLT-PRF-002",
                f"one profile is of a {self.model}, the other of a {other.model} of another "
                "structure",
                "merge profiles of one model",
            )
        try:
            fitted, held = self.fitted.plus(other.fitted), self.heldout.plus(other.heldout)
        except ValueError as error:
            raise InputError("PLT-PRF-002", str(error), "merge profiles of one model") from None
        return Profile(self.model, self.fingerprint, fitted, held)

    def check(self, model: Any) -> None:
        """Raises InputError unless ``model`` has the structure of the one that was profiled."""
        if fingerprint(model) != self.fingerprint:
            raise InputError(
                "PLT-PRF-002",
                f"the profile is of a {self.model} of another structure than this {_name(model)}",
                "profile this model",
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON. Raises FileError when it cannot; an existing file then stays."""
        profile_file.write(Path(path), self.model, self.fingerprint, self.fitted, self.heldout)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Profile:
        """A saved profile.

        Raises FileError when it is missing, cut short, damaged, of another version or no profile.
        """
        return Profile(*profile_file.read(Path(path)))

    def __str__(self) -> str:
        fitted, held = self.fitted.batches, self.heldout.batches
        lines = [f"routes of {self.model}: {fitted} batches fitted, {held} held out"]
        if not self.total.routers:
            return f"{lines[0]}; it has no routers"
        rows = [("router", "branches", "cells", "most load", "least load", "dead", "unrouted")]
        rows += [_row(router) for router in self.total]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            first, *rest = (x.rjust(w) for x, w in zip(row, widths, strict=True))
            lines.append("  ".join([first.strip().ljust(widths[0]), *rest]))
        return "\n".join(lines)


def profile(model: Any, batches: Iterable[Any], *, holdout: float = 0.25) -> Profile:
    """Runs ``model`` on each of ``batches`` and records how its routers route.

    A batch is a tuple or list of positional arguments, a dict of keyword arguments, or a single
    argument. The last ``holdout`` share of the batches (at least one of two) is kept apart as
    ``Profile.heldout``. The model runs as it is, without gradients: call ``eval()`` before where
    that matters. Routers are `plait.Router`, `plait.EarlyExit`, whatever else calls plait's routing
    operators, and the experts of transformers' models.

    A router is known by the qualified name of the module that was running and how often that one
    had routed before in the same run.

    Raises InputError where there is no batch or the model fails on one, OptionError for a
    ``holdout`` outside [0, 1) or a model that cannot be called.
    """
    if hasattr(type(model), "check_code"):
        model.check_code("profiled")
    model = original(model)
    if not callable(model):
        reason = f"a {type(model).__name__} cannot be profiled"
        raise OptionError("PLT-PRF-007", reason, "give a module or function")
    if isinstance(holdout, bool) or not isinstance(holdout, int | float) or not 0 <= holdout < 1:
        reason = f"holdout={holdout!r} is not a share"
        raise OptionError("PLT-PRF-007", reason, "0 <= holdout < 1")
    if isinstance(batches, torch.Tensor | Mapping | str) or not isinstance(batches, Iterable):
        reason = f"batches is a {type(batches).__name__}"
        raise InputError("PLT-PRF-001", reason, "give a list of batches, even for one")
    if not isinstance(batches, Sized):
        batches = list(batches)
    count = len(batches)  # type: ignore[arg-type]
    first_held = count - _held(count, float(holdout))
    tallies = Tally(), Tally()
    collector = Collector(model)
    number = -1
    with torch.no_grad(), collector.watching():
        for number, batch in enumerate(batches):
            args, kwargs = as_call(batch)
            try:
                model(*args, **kwargs)
            except Exception as error:
                reason = f"the model fails on batch {number}: {type(error).__name__}: {error}"
                mend = "a tuple is positional arguments, a dict keyword arguments"
                raise InputError("PLT-PRF-001", reason, mend) from error
            try:
                tallies[number >= first_held].add(collector.taken())
            except ValueError as error:
                reason = f"batch {number}: {error}"
                raise InputError("PLT-PRF-001", reason, "profile one model at a time") from None
    if number < 0:
        raise InputError("PLT-PRF-001", "there are no batches", "give at least one")
    fitted, held = (t.result() for t in tallies)
    return Profile(_name(model), fingerprint(model), fitted, held)


def _held(count: int, share: float) -> int:
    """How many of ``count`` batches are kept apart."""
    if not share or count < 2:
        return 0
    return max(1, math.floor(count * share + 1e-9))


def _name(model: Any) -> str:
    model = original(model)
    return type(model).__name__ if isinstance(model, torch.nn.Module) else _callable_name(model)


def _callable_name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _row(router: RouterStats) -> tuple[str, ...]:
    cells, load = sum(router.cells), router.load
    most, least = "-", "-"
    if cells and load:
        order = sorted(range(len(load)), key=lambda b: (-load[b], b))
        most, least = (f"{b}: {_percent(load[b] / cells)}" for b in (order[0], order[-1]))
    return (
        router.label,
        str(router.branches),
        str(cells),
        most,
        least,
        str(len(router.dead)),
        _percent(router.exit_rate),
    )


def _percent(share: float) -> str:
    """A share as text; only all of it is 100 %, and only nothing 0 %."""
    if 0.0 < share < _HALF:
        return "<0.1%"
    return ">99.9%" if 1.0 - _HALF < share < 1.0 else f"{share:.1%}"
