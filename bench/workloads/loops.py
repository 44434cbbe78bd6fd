"""Routing as it is written without plait: Python loops over branches, masks and index operations.

The same constructors and parameter names as `plait.Router` and `plait.EarlyExit`, so that one
definition of a network serves for both and weights can be carried over. Also here: what gives a
random network the routing of a trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LoopRouter(nn.Module):
    """`plait.Router` for samples as cells, without its checks.

    Returns None where no cell takes any branch: the shape of the result is not known then.
    """

    def __init__(
        self,
        branches: Iterable[nn.Module],
        scorer: Callable[[Tensor], Tensor],
        *,
        top_k: int = 1,
        combine: str = "weighted",
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.scorer = scorer
        self.top_k, self.combine, self.threshold = top_k, combine, threshold

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor | None:
        """``[cells, *out]`` for x ``[cells, *cell]``; ``keys`` go to the scorer in place of x."""
        scores = self.scorer(x if keys is None else keys)
        taken = self._taken(scores)
        result = None
        for number, branch in enumerate(self.branches):
            mask = taken == number if self.combine == "select" else taken[:, number]
            if not mask.any():
                continue
            rows = mask.nonzero().squeeze(1)
            out = branch(x.index_select(0, rows))
            if self.combine == "weighted":
                out = out * scores[rows, number].view(-1, *[1] * (out.dim() - 1))
            if result is None:
                result = out.new_zeros(x.shape[0], *out.shape[1:])
            result.index_add_(0, rows, out)
        return result

    def _taken(self, scores: Tensor) -> Tensor:
        """Labels ``[cells]`` for "select", else bool ``[cells, branches]``."""
        if scores.dtype == torch.int64:
            return scores
        if self.combine == "select":
            return scores.argmax(1)
        if self.threshold is not None:
            return scores > self.threshold
        best = scores.topk(self.top_k, dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


class LoopEarlyExit(nn.Module):
    """`plait.EarlyExit`: each stage gets the samples that are not done, until none is left."""

    def __init__(
        self, stages: Iterable[nn.Module], heads: Iterable[nn.Module], confident: float
    ) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        self.confident = confident

    def forward(self, x: Any) -> Tensor:
        """Logits ``[cells, classes]``. Between stages there may be a list of tensors."""
        result = rows = torch.empty(0)
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            logits = head(x)
            if stage is self.stages[0]:
                result = torch.empty_like(logits)
                rows = torch.arange(len(logits), device=logits.device)
            if stage is self.stages[-1]:
                result[rows] = logits
                break
            leaves = logits.softmax(1).amax(1) > self.confident
            result[rows[leaves]] = logits[leaves]
            if leaves.all():
                break
            stays = ~leaves
            rows = rows[stays]
            x = [part[stays] for part in x] if isinstance(x, list) else x[stays]
        return result


@torch.no_grad()
def balance_labels(logits: Tensor, bias: Tensor, counts: Sequence[int], seed: int) -> None:
    """Shifts ``bias`` ``[n]``, which ``logits`` ``[cells, n]`` contain, so that the i-th logit is
    the largest for about ``counts[i]`` cells, for none of them by a hair's breadth."""
    generator = torch.Generator().manual_seed(seed)
    want = torch.tensor(counts, dtype=logits.dtype)

    def judge(shift: Tensor) -> tuple[float, float, Tensor]:
        """How many cells are misplaced, the closest decision (negative), what is missing where."""
        first, second = (logits + shift).topk(2, dim=1).values.unbind(1)
        have = torch.bincount((logits + shift).argmax(1), minlength=len(want))
        return float((want - have).abs().sum()), -float((first - second).min()), want - have

    shift, rate, steps = torch.zeros_like(bias), logits.std() / want.sum(), 500
    best = (*judge(shift), shift)
    for step in range(2 * steps):
        if step < steps:
            shift = shift + rate * judge(shift)[2] * (1 - step / steps)
        else:  # from the best on: random steps towards clearer decisions
            size = rate * 0.01 ** torch.rand(1, generator=generator)
            shift = best[3] + size * torch.randn(len(want), generator=generator)
        best = min(best, (*judge(shift), shift), key=lambda found: found[:2])
    bias += best[3]


@torch.no_grad()
def balance_exits(
    stages: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    last: Callable[[nn.Module], nn.Linear],
    x: Tensor,
    confident: float,
) -> list[int]:
    """Makes equal shares of the samples ``x`` leave at each exit; returns how many do.

    ``last(head)`` is the head's last linear layer, whose weights are scaled (a temperature, found
    by bisection): the sharper the logits, the more samples are confident.
    """
    left: list[int] = []
    for number, (stage, head) in enumerate(zip(stages, heads, strict=True)):
        x = stage(x)
        exits = len(stages) - number
        if exits == 1:
            left.append(len(x))
            break
        logits, count = head(x), round(len(x) / exits)
        low, high = _scale(logits, count, confident), _scale(logits, count + 1, confident)
        layer, scale = last(head), (low * high) ** 0.5
        layer.weight *= scale
        layer.bias *= scale
        leaves = (logits * scale).softmax(1).amax(1) > confident
        left.append(int(leaves.sum()))
        x = x[~leaves]
    return left


def _scale(logits: Tensor, count: int, confident: float) -> float:
    """The least factor with which ``count`` of the cells are confident."""
    if count == 0:
        return 1e-3
    low, high = 1e-3, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        enough = int(((logits * middle).softmax(1).amax(1) > confident).sum()) >= count
        low, high = (low, middle) if enough else (middle, high)
    return high


@torch.no_grad()
def exits_taken(model: Any, x: Tensor) -> Tensor:
    """The exit, from 0, at which each sample of ``x`` leaves the early-exit ``model``."""
    taken = torch.full((len(x),), len(model.stages) - 1)
    rows = torch.arange(len(x))
    for number, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        x = stage(x)
        leaves = head(x).softmax(1).amax(1) > model.confident
        taken[rows[leaves]] = number
        x, rows = x[~leaves], rows[~leaves]
    return taken


def balance_gates(model: nn.Module, gates: Iterable[nn.Linear], *inputs: Tensor, seed: int) -> None:
    """Sets the biases of ``gates``, linear layers of one output, so that each is open (greater than
    zero) for a random number of the samples, none and all included.

    Gates are set in the order in which one run of ``model`` comes to them. One that cannot tell the
    samples apart is closed.
    """
    generator = torch.Generator().manual_seed(seed)

    def settle(gate: nn.Linear, args: tuple[Tensor]) -> None:
        score = (args[0] @ gate.weight[0]).sort(descending=True).values
        count = int(torch.randint(0, len(score) + 1, (), generator=generator))
        edges = torch.cat([score[:1] + 1, score, score[-1:] - 1])
        high, low = edges[count], edges[count + 1]
        distinct = float(high - low) > 1e-3 * float(score.abs().max())
        gate.bias.fill_(-(high + low) / 2 if distinct else -score[0] - 1)

    hooks = [gate.register_forward_pre_hook(settle) for gate in gates]  # type: ignore[arg-type]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
