"""What a user may ask of the compiler, and what the compiler hands back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.fx as fx

from .errors import OptionError

ONLINE = "online"
TUNE_LEVELS = ("off", "quick", "full")


@runtime_checkable
class Bettable(Protocol):
    """What bets are made on: a `plait.Profile`."""

    def routes(self) -> Any:
        """The fitted and the held-out statistics of each router."""
        ...

    def check(self, model: Any) -> None:
        """Raises InputError unless it is of ``model``."""
        ...


@dataclass(frozen=True)
class Options:
    """Options of one compilation.

    ``pipeline`` is a pass pipeline as text (None: the default one). ``tune`` is "off" (first
    candidate), "quick" (a short race of a few candidates) or "full" (search). ``profile`` is a
    `plait.Profile` to bet on, or "online": routes are learned from the first calls.
    ``weight_budget`` is how much of the weights may be resident at once: bytes, or text
    such as "2GB" or, a share of all, "40%" (None: no limit).
    """

    pipeline: str | None = None
    tune: str = "quick"
    profile: Any = None
    weight_budget: int | str | None = None

    def __post_init__(self) -> None:
        if self.tune not in TUNE_LEVELS:
            levels = ", ".join(repr(t) for t in TUNE_LEVELS)
            raise OptionError(
                "PLT-OPT-001", f"tune={self.tune!r} is unknown", f"use one of {levels}"
            )
        if self.profile not in (None, ONLINE) and not isinstance(self.profile, Bettable):
            kind = repr(self.profile) if isinstance(self.profile, str) else type(self.profile)
            raise OptionError(
                "PLT-OPT-005",
                f"profile is {kind}",
                f"give what plait.profile returned, batches, or {ONLINE!r}",
            )
        if self.weight_budget is not None:
            _check_budget(self.weight_budget)
        if self.pipeline is not None and not isinstance(self.pipeline, str):
            kind = type(self.pipeline).__name__
            raise OptionError("PLT-OPT-002", f"pipeline is a {kind}", "give the pipeline as text")


def _check_budget(budget: int | str) -> None:
    from ..passes.prefetch_weights import bytes_of  # passes are imported when they are needed

    try:
        bytes_of(budget, 1 << 40)
    except ValueError as error:
        hint = "give bytes, a size such as '2GB', or a share of all weights such as '40%'"
        raise OptionError("PLT-OPT-006", f"weight_budget={budget!r}: {error}", hint) from None


class Executable(Protocol):
    """A compiled graph. Safe to call from several threads at once."""

    @property
    def plan(self) -> Any:
        """The plan: plain data that prints."""
        ...

    @property
    def remarks(self) -> Sequence[Any]:
        """What was done, or not done and why, in order."""
        ...

    @property
    def graph(self) -> fx.GraphModule:
        """The graph after all passes."""
        ...

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Results for ``tensors``, one per placeholder and of any strides, in order."""
        ...
