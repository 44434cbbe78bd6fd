"""`EarlyExit`: stages in sequence, which a sample leaves as soon as an answer is confident."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ...kernels import routing
from ..capture.unbacked import traceable
from .router import as_modules


class EarlyExit(nn.Module):
    """Runs stages in sequence; each sample leaves behind the first whose answer is confident.

    ``stages``: modules, each from what the one before returned (``[cells, ...]``) to the same kind
    of tensor. ``heads``: as many modules; head i maps what stage i returned to logits ``[cells,
    classes]``, of one size and dtype for all. Stages and heads keep their first dimension and must
    take 0 cells, for stage i + 1 runs on exactly the cells that stage i was not confident about.

    ``confident``: a function from logits to bool ``[cells]``, or a number: a cell then leaves where
    its largest softmax probability is greater (NaN never is). Who reaches the last stage takes its
    answer. `plait.compile` captures all of it as one graph.

    For a profile each exit is a router with one branch, "goes on": the share of its cells without a
    branch is the rate of leaving.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        heads: Iterable[nn.Module],
        confident: Callable[[Tensor], Tensor] | float,
    ) -> None:
        """Raises ValueError or TypeError, saying which argument is wrong and what it may be."""
        super().__init__()
        self.stages = nn.ModuleList(as_modules(stages, "stage"))
        self.heads = nn.ModuleList(as_modules(heads, "head"))
        if len(self.stages) != len(self.heads):
            raise ValueError(
                f"{len(self.stages)} stages need as many heads, not {len(self.heads)}: the last "
                "stage has one, too"
            )
        if isinstance(confident, bool) or not (
            isinstance(confident, int | float) or callable(confident)
        ):
            raise TypeError(f"confident must be a function or a number, not {confident!r}")
        if isinstance(confident, int | float) and not 0.0 <= confident <= 1.0:
            raise ValueError(f"confident is a probability, between 0 and 1, not {confident}")
        self.confident = confident

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[cells, classes]`` in the order of x ``[cells, ...]``.

        Raises ValueError or TypeError where ``confident`` or a head returned something that does
        not fit.
        """
        with traceable():
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        exits: list[tuple[Tensor, Tensor]] = []
        for stage, head in zip(self.stages[:-1], self.heads[:-1], strict=True):
            x = stage(x)
            logits = head(x)
            leaves = self._leaves(logits)
            exits.append((logits, leaves))
            # The one branch is 0, "goes on"; 1 is no branch.
            (x,) = routing.scatter(x, leaves.to(torch.int64), 1)
        result = self.heads[-1](self.stages[-1](x))
        for logits, leaves in reversed(exits):
            if logits.dtype != result.dtype or logits.shape[1:] != result.shape[1:]:
                raise ValueError(
                    f"a head returned {logits.dtype} of {tuple(logits.shape[1:])}, a later one "
                    f"{result.dtype} of {tuple(result.shape[1:])}; all must return the same"
                )
            later = routing.gather([result], leaves.to(torch.int64), None)
            result = torch.where(leaves.unsqueeze(1), logits, later)
        return result

    def _leaves(self, logits: Tensor) -> Tensor:
        if logits.dim() != 2:
            raise ValueError(f"a head returned shape {tuple(logits.shape)}, not [cells, classes]")
        if isinstance(self.confident, int | float):
            return logits.softmax(1).amax(1) > self.confident
        leaves = self.confident(logits)
        if not isinstance(leaves, Tensor) or leaves.dtype != torch.bool or leaves.dim() != 1:
            what = (
                f"{leaves.dtype} of shape {tuple(leaves.shape)}"
                if isinstance(leaves, Tensor)
                else f"a {type(leaves).__name__}"
            )
            raise TypeError(f"confident returned {what}, not bool [cells]")
        return leaves
