"""Routed models drawn by chance: routers and conds within each other, of branches of all kinds.

The first `CODES` columns of a cell say where it goes, in whole numbers, and no branch changes them:
so a route never hangs on how a sum was rounded, however deep the router lies.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import plait
from plait.kernels.routing import route, routed_linear

CODES, WIDTH = 2, 6
LARGEST = 4


class Does(nn.Module):
    """What a function does to all columns but the codes."""

    def __init__(self, name: str, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.make = name, make

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :CODES], self.make(x[:, CODES:])], 1)

    def extra_repr(self) -> str:
        return self.name


class Adds(nn.Module):
    """A residual around a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :CODES], x[:, CODES:] + self.module(x)[:, CODES:]], 1)


class Holds(nn.Module):
    """Layers, and a buffer that may be replaced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.scale


class Experts(nn.Module):
    """Two of three experts for each cell, by its first code."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(3, WIDTH, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1].long()
        offsets, order = route(torch.cat([first % 3, (first + 1) % 4], 1), 3)
        y = routed_linear(x[:, CODES:], offsets, order, self.up, None, False, 2, False)
        y = routed_linear(y.relu(), offsets, order, self.down, None, False, 0, True)
        return torch.cat([x[:, :CODES], y.view(x.shape[0], 2, WIDTH).sum(1)], 1)


def as_python(taken: Tensor, first: Any, second: Any, operands: tuple[Tensor, ...]) -> Any:
    """What `torch.cond` does, which compiles its sides for each size in eager mode, too."""
    return (first if taken else second)(*operands)


class Chooses(nn.Module):
    """One of two sides, by the sum of a code."""

    def __init__(self, sides: list[nn.Module], column: int, kind: str) -> None:
        super().__init__()
        self.sides, self.column, self.kind = nn.ModuleList(sides), column, kind

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.sides
        taken = x[:, self.column].sum() > x.shape[0]
        cond: Any = torch.cond if torch.compiler.is_compiling() else as_python
        if self.kind == "transposed":
            sides = [lambda t, side=s: side(t.t()).clone() for s in (first, second)]
            return cond(taken, *sides, (x.t(),))
        if self.kind == "several":
            y, z = cond(
                taken,
                lambda x: (first(x).clone(), x[:, CODES:].sum(0)),
                lambda x: (second(x).clone(), x[:, CODES:].mul(2).sum(0)),
                (x,),
            )
            return torch.cat([y[:, :CODES], y[:, CODES:] + z.tanh()], 1)
        return cond(taken, lambda x: first(x).clone(), lambda x: x.clone(), (x,))


class Scores(nn.Module):
    """Where cells go, by their codes."""

    def __init__(self, kind: str, branches: int, column: int) -> None:
        super().__init__()
        self.kind, self.branches, self.column = kind, branches, column

    def forward(self, x: Tensor) -> Tensor:
        code = x[:, self.column : self.column + 1]
        if self.kind == "labels":  # some of them name no branch
            return torch.cat([code.long(), code.long() + 2], 1)
        if self.kind == "label":
            return code[:, 0].long() % self.branches
        numbers = torch.arange(self.branches, dtype=x.dtype)
        distance = (code % (self.branches + 1) - numbers - 0.25).abs()
        return (1 - distance) if self.kind == "gates" else (-distance).softmax(1)


class Draw:
    """What chance makes of a seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        torch.manual_seed(seed)

    def model(self) -> nn.Module:
        """A model on cells ``[n, CODES + WIDTH]``."""
        parts = [self.router(1), *(self._any(1) for _ in range(self.chance.randint(0, 2)))]
        self.chance.shuffle(parts)
        return nn.Sequential(*parts).eval()

    def router(self, depth: int) -> nn.Module:
        pick = self.chance.choice
        branches = [self._layers(depth) for _ in range(pick([1, 2, 2, 3]))]
        if self.chance.random() < 0.15:
            branches.append(branches[0])
        n, column = len(branches), self.chance.randrange(CODES)
        kind = pick(["label", "labels", "gates", "softmax", "softmax"])
        scores, combine = Scores(kind, n, column), pick(["weighted", "sum"])
        if kind == "label":
            routed = plait.Router(branches, scores, combine=pick(["sum", "select"]))
        elif kind == "labels":
            routed = plait.Router(branches, scores, combine="sum")
        elif kind == "gates":
            routed = plait.Router(branches, scores, combine=combine, threshold=0.0)
        else:
            top = self.chance.randint(1, n)
            routed = plait.Router(branches, scores, combine=combine, top_k=top)
        return Codes(routed)

    def _any(self, depth: int) -> nn.Module:
        return self.chance.choice([self.router, self._cond, self._layers])(depth)

    def _cond(self, depth: int) -> nn.Module:
        sides = [self._layers(depth - 1) for _ in range(2)]
        kind = self.chance.choice(["transposed", "several", "passes on"])
        return Chooses(sides, self.chance.randrange(CODES), kind)

    def _layers(self, depth: int) -> nn.Module:
        return nn.Sequential(*(self._layer(depth) for _ in range(self.chance.randint(0, 3))))

    def _layer(self, depth: int) -> nn.Module:
        if depth > 0 and self.chance.random() < 0.3:
            within = self.chance.choice([self.router, self._cond, self._layers])
            return within(depth - 1) if self.chance.random() < 0.7 else Adds(within(depth - 1))
        name = self.chance.choice([*_PLAIN, *_WEIGHTS, "experts"])
        if name == "experts":
            return Experts()
        return Does(name, _PLAIN[name] if name in _PLAIN else Holds(_WEIGHTS[name]()))


class Codes(nn.Module):
    """A router whose cells keep their codes, however many branches they are summed over."""

    def __init__(self, router: plait.Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :CODES], self.router(x)[:, CODES:].tanh()], 1)


_WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "RMS norm": lambda: nn.RMSNorm(WIDTH),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten()
    ),
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": lambda x: x.relu(),
    "softmax": lambda x: x.softmax(1),
    "sort": lambda x: x.sort(1).values,
    "views": lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, WIDTH),
    "halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "gather": lambda x: x.gather(1, x.argsort(1)),
    "library": lambda x: torch.logcumsumexp(x, 1),
    # What comes of a cell depends on the others in these.
    "sum of cells": lambda x: x - x.sum(0).tanh(),
    "softmax of cells": lambda x: x.softmax(0),
    "running sum": lambda x: x.cumsum(0).tanh(),
    "turned round": lambda x: x.flip(0),
    "counted": lambda x: x / (1 + x.shape[0]),
    "numbered": lambda x: x + torch.arange(x.shape[0]).unsqueeze(1).tanh(),
}


def cells(count: int, seed: int, codes: tuple[int, ...] | None = None) -> Tensor:
    """Cells that go anywhere, or all where ``codes`` say."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CODES + WIDTH, generator=chance)
    x[:, :CODES] = torch.randint(0, LARGEST, (count, CODES), generator=chance).float()
    if codes is not None:
        x[:, :CODES] = torch.tensor(codes, dtype=x.dtype)
    return x


def forms(x: Tensor) -> dict[str, Tensor]:
    """Tensors of other strides, and with values that are not finite."""
    strange = x.clone()
    strange[::3, CODES] = torch.inf
    strange[1::4, -1] = torch.nan
    return {
        "strided": torch.stack([x, x], -1)[..., 0],
        "transposed": x.t().contiguous().t(),
        "expanded": x[:1].expand(x.shape),
        "strange": strange,
    }
