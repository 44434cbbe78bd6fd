"""Experts of many domains: a multi-gate mixture (Ma et al., KDD 2018) with sparse gates.

One model serves several domains. Every block has 8 experts, of which a sample takes two; which two
is the domain's, as gates that look at the domain learn it: branches that fire together. Weights of
the two also depend on the sample. Features ``[N, 256]`` and domains ``[N]``, 4 blocks with experts
of 512; the paper size has features of 1024 and experts of 2048.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .common import SEED, finish
from .loops import LoopRouter

EXPERTS, BLOCKS = 8, 4
PAIRS = ((0, 3), (1, 6), (2, 5), (4, 7))
"""The experts of each domain."""


class Gate(nn.Module):
    """Scores ``[N, experts]`` of cells ``[N, domains + hidden]``: one-hot domains, features."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.features = nn.Linear(hidden, EXPERTS, bias=False)
        table = torch.zeros(len(PAIRS), EXPERTS)
        for domain, pair in enumerate(PAIRS):
            table[domain, list(pair)] = 8.0
        self.register_buffer("table", table)

    def forward(self, cells: Tensor) -> Tensor:
        domains, features = cells.split([len(PAIRS), cells.shape[1] - len(PAIRS)], 1)
        return (domains @ self.table + self.features(features).tanh()).softmax(1)


class Expert(nn.Module):
    """Two layers on the features of a cell."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, cells: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(cells[:, len(PAIRS) :])))


class Tower(nn.Module):
    """Features ``[N, hidden]`` and domains ``[N]`` (int64) to features."""

    def __init__(
        self, hidden: int, router: Callable[[list[nn.Module], nn.Module], nn.Module]
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(BLOCKS))
        self.blocks = nn.ModuleList(
            router([Expert(hidden) for _ in range(EXPERTS)], Gate(hidden)) for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        known = nn.functional.one_hot(domain, len(PAIRS)).to(x.dtype)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(torch.cat([known, norm(x)], 1))
        return x


def build(
    size: str = "cpu", samples: int = 32, domains: int = len(PAIRS)
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """``samples`` features and their domains, drawn from the first ``domains``."""
    from ... import Router

    return _with(size, samples, domains, lambda e, gate: Router(e, gate, top_k=2))


def build_plain(
    size: str = "cpu", samples: int = 32, domains: int = len(PAIRS)
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with a Python loop over the experts."""
    return _with(size, samples, domains, lambda e, gate: LoopRouter(e, gate, top_k=2))


def _with(
    size: str,
    samples: int,
    domains: int,
    router: Callable[[list[nn.Module], nn.Module], nn.Module],
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    hidden = 1024 if size == "paper" else 256
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(samples, hidden, generator=generator)
    domain = torch.randint(domains, (samples,), generator=generator)
    return finish(Tower(hidden, router)), (x, domain)
