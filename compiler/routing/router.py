"""`Router`: a layer that sends each cell of its input through the branches that a scorer names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import routing
from ..capture.unbacked import traceable

COMBINES = ("weighted", "sum", "select")
_STRIDE = -7046029254386353131  # 2**64 over the golden ratio, as a signed number
_MIX = (-4658895280553007687, -7723592293110705685)


class HashScorer:
    """Labels from integer keys: ``hash(key) % branches``, the same on every machine and for ever.

    The hash is SplitMix64's output for the key as its state (Steele, Lea, Flood: Fast splittable
    pseudorandom number generators, 2014), without its top bit. In unsigned 64-bit arithmetic::

        z = key + 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        hash = (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF
    """

    def __init__(self, branches: int) -> None:
        """Raises ValueError if ``branches`` is not a positive integer."""
        if not isinstance(branches, int) or isinstance(branches, bool) or branches < 1:
            raise ValueError(f"branches must be a positive integer, not {branches!r}")
        self.branches = branches

    def __call__(self, keys: Tensor) -> Tensor:
        """Labels in ``[0, branches)`` (int64, the shape of ``keys``) for int64 ``keys``.

        Raises TypeError for keys of another dtype.
        """
        if keys.dtype != torch.int64:
            raise TypeError(f"keys are {keys.dtype}; they must be int64")
        z = keys + _STRIDE
        z = (z ^ _shifted(z, 30)) * _MIX[0]
        z = (z ^ _shifted(z, 27)) * _MIX[1]
        return ((z ^ _shifted(z, 31)) & 0x7FFFFFFFFFFFFFFF) % self.branches

    def __repr__(self) -> str:
        return f"HashScorer({self.branches})"


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; that of torch copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class Router(nn.Module):
    """Sends each cell of ``x`` through the branches that a scorer names, and adds up what returns.

    A cell is what the first ``cell_dims`` dimensions of ``x`` number: a sample (1), a token or a
    patch of a sample (2). Each branch runs once, on exactly the cells that are sent to it, be it
    none of them. `plait.compile` captures a model with routers as one graph.

    ``branches``: modules, of any kinds; each maps ``[u, *cell]`` to ``[u, *out]`` for any u, 0
    included, and all to one ``out`` and dtype. Routers are branches, too.

    ``scorer`` is one of

    - a module or function from the cells ``[cells, *cell]`` to floating scores ``[cells, n]``: a
      cell takes its ``top_k`` best branches (as `torch.topk` orders them: NaN is the largest), or
      all with score > ``threshold`` where one is given (NaN passes none; a cell may take none);
    - the same giving int64 labels ``[cells]`` or ``[cells, k]``, the numbers of branches; ``top_k``
      and ``threshold`` have no meaning then;
    - ``"hash"``, or a `HashScorer`: the label is a hash of the cell's key, see ``keys`` below.

    ``combine``: ``"weighted"`` adds up score times output over the branches taken (put a softmax
    into the scorer for weights that sum to one), ``"sum"`` adds up the outputs, ``"select"`` is for
    exactly one branch per cell. Scores get gradients with ``"weighted"`` only; labels have no
    scores, so they need one of the others.

    A label outside ``[0, n)`` names no branch. A cell without a branch gives zeros.
    """

    def __init__(
        self,
        branches: Iterable[nn.Module],
        scorer: Callable[[Tensor], Tensor] | str,
        *,
        top_k: int = 1,
        combine: str = "weighted",
        threshold: float | None = None,
        cell_dims: int = 1,
    ) -> None:
        """Raises ValueError or TypeError, saying which argument is wrong and what it may be."""
        super().__init__()
        self.branches = nn.ModuleList(as_modules(branches, "branch"))
        n = len(self.branches)
        self.top_k = _whole("top_k", top_k, 1, n)
        self.cell_dims = _whole("cell_dims", cell_dims, 1, None)
        if combine not in COMBINES:
            raise ValueError(f"combine must be one of {', '.join(COMBINES)}, not {combine!r}")
        if threshold is not None and (
            isinstance(threshold, bool) or not isinstance(threshold, int | float)
        ):
            raise TypeError(f"threshold must be a number, not {threshold!r}")
        if combine == "select" and (top_k != 1 or threshold is not None):
            raise ValueError(
                "combine='select' takes exactly one branch per cell: leave top_k at 1 and "
                "threshold at None, or use combine='sum'"
            )
        self.combine, self.threshold = combine, threshold
        if isinstance(scorer, str):
            if scorer != "hash":
                raise ValueError(f"scorer must be callable or 'hash', not {scorer!r}")
            scorer = HashScorer(n)
        if not callable(scorer):
            raise TypeError(f"scorer must be callable or 'hash', not a {type(scorer).__name__}")
        if isinstance(scorer, HashScorer):
            if scorer.branches != n:
                raise ValueError(f"{scorer} does not fit {n} branches: use HashScorer({n})")
            if combine == "weighted":
                raise ValueError("a hash has no scores: use combine='select' or 'sum'")
        self.scorer = scorer

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """``[*lead, *out]`` for x ``[*lead, *cell]``, where ``lead`` has ``cell_dims`` sizes.

        ``keys`` (int64, of shape ``lead``) is for hash scorers and needed there. Raises ValueError
        or TypeError where x, the keys or what the scorer returned do not fit.
        """
        lead = x.shape[: self.cell_dims]
        if len(lead) < self.cell_dims:
            raise ValueError(f"x has {x.dim()} dimensions, but cell_dims is {self.cell_dims}")
        cells = x.flatten(0, self.cell_dims - 1)
        index, weight = self.routes(cells, self._keys(keys, lead))
        parts = routing.scatter(cells, index, len(self.branches))
        with traceable():
            outs = [self._run(b, part) for b, part in enumerate(parts)]
        out = routing.gather(outs, index, weight)
        return out.reshape(*lead, *out.shape[1:])

    def routes(self, cells: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Where each of ``cells`` ``[cells, *cell]`` goes: index ``[cells, k]`` and its weights.

        The index is int64 and has the number of branches where a slot has none; weights are None
        unless outputs are weighted. Errors as in `forward`.
        """
        scores = self.scorer(cells) if keys is None else self.scorer(keys)
        if not isinstance(scores, Tensor):
            raise TypeError(f"the scorer returned a {type(scores).__name__}, not a tensor")
        n, shape = len(self.branches), tuple(scores.shape)
        if scores.dim() not in (1, 2) or not _equal(shape[0], cells.shape[0]):
            raise ValueError(
                f"the scorer returned shape {shape} for {cells.shape[0]} cells; scores are "
                f"[cells, {n}], labels [cells] or [cells, k]"
            )
        if scores.dtype == torch.int64:
            return self._labels(scores), None
        if not scores.dtype.is_floating_point:
            raise TypeError(f"the scorer returned {scores.dtype}; scores float, labels are int64")
        if scores.dim() == 1 or shape[1] != n:
            raise ValueError(
                f"the scorer returned {scores.dtype} of shape {shape}; scores are [cells, {n}], "
                "and labels are int64"
            )
        if self.threshold is None:
            chosen, index = torch.topk(scores, self.top_k, dim=1)
        else:
            numbers = torch.arange(n, device=scores.device)
            chosen, index = scores, torch.where(scores > self.threshold, numbers, n)
        return index, chosen if self.combine == "weighted" else None

    def extra_repr(self) -> str:
        taken = f"top_k={self.top_k}" if self.threshold is None else f"threshold={self.threshold}"
        return f"{taken}, combine={self.combine!r}, cell_dims={self.cell_dims}"

    def _labels(self, labels: Tensor) -> Tensor:
        if self.combine == "weighted":
            raise ValueError(
                "the scorer returned int64 labels, which have no scores to weight by: use "
                "combine='select' or 'sum'"
            )
        if self.combine == "select" and labels.dim() == 2 and labels.shape[1] != 1:
            raise ValueError(
                f"combine='select' takes one label per cell, the scorer returned "
                f"{labels.shape[1]}: use combine='sum'"
            )
        return labels.unsqueeze(1) if labels.dim() == 1 else labels

    def _keys(self, keys: Tensor | None, lead: torch.Size) -> Tensor | None:
        hashed = isinstance(self.scorer, HashScorer)
        if keys is None:
            if hashed:
                raise ValueError("a router by hash needs keys=: an int64 tensor, a key per cell")
            return None
        if not hashed:
            raise ValueError("keys= is for routers whose scorer is 'hash'")
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys must be an int64 tensor, not a {type(keys).__name__}")
        if keys.dim() != len(lead) or not all(map(_equal, keys.shape, lead)):
            raise ValueError(
                f"keys have shape {tuple(keys.shape)}; x has cells of shape {tuple(lead)}"
            )
        return keys.flatten()

    def _run(self, branch: int, part: Tensor) -> Tensor:
        out = self.branches[branch](part)
        if not isinstance(out, Tensor):
            raise TypeError(f"branch {branch} returned a {type(out).__name__}, not a tensor")
        return out


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; sizes that tracing does not know are taken to be so."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    torch._check(a == b)
    return True


def as_modules(given: Iterable[nn.Module], what: str) -> list[nn.Module]:
    """The modules ``given``. Raises ValueError for none, TypeError for what is no module."""
    if not isinstance(given, Iterable):
        raise TypeError(f"several modules are needed, a {what} each, not a {type(given).__name__}")
    modules = list(given)
    if not modules:
        raise ValueError(f"at least one {what} is needed")
    for number, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{what} {number} is a {type(module).__name__}, not a module")
    return modules


def _whole(name: str, value: Any, least: int, most: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < least or (most is not None and value > most):
        limit = f"{least} or more"
        if most is not None:
            limit = f"between {least} and {most}, the number of branches"
        raise ValueError(f"{name} must be {limit}, not {value}")
    return value
