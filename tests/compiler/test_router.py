"""Router: every way to choose and combine, against a loop over cells; gradients, export, misuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim, export

import plait
from plait.compiler.routing.router import HashScorer

WIDTH, OUT = 6, 4


def branch(kind: int) -> nn.Module:
    """Branches of unlike kinds, all from 6 to 4 features."""
    return [
        lambda: nn.Linear(WIDTH, OUT),
        lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, OUT)),
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUT), nn.Tanh()),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 3), nn.Flatten()),
    ][kind % 4]()


def branches(n: int) -> list[nn.Module]:
    return [branch(b) for b in range(n)]


class Given(nn.Module):
    """Returns the scores or labels it was given, whatever the cells."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.scores


def by_loop(
    router: plait.Router, cells: torch.Tensor, taken: list[list[tuple[int, float]]]
) -> torch.Tensor:
    """Each cell alone through each of its (branch, weight)."""
    rows = []
    for cell, routes in zip(cells, taken, strict=True):
        total = torch.zeros(OUT)
        for number, weight in routes:
            if 0 <= number < len(router.branches):
                total = total + weight * router.branches[number](cell[None])[0]
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros(0, OUT)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_routes_give_what_a_loop_over_cells_gives(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 20)))
    n, lead = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([(0,), (1,), (7,), (2, 3)]))
    mode = data.draw(st.sampled_from(["top", "threshold", "labels", "label", "hash"]))
    combine = data.draw(st.sampled_from(["weighted", "sum", "select"]))
    x = torch.randn(*lead, WIDTH)
    cells = x.flatten(0, -2)
    count, keys, options = cells.shape[0], None, {}
    if mode in ("top", "threshold"):
        # Distinct scores within a cell, so that the best are well defined.
        scores = torch.stack([torch.randperm(n) for _ in range(count)]) if count else torch.zeros(0)
        scores = scores.view(count, n).float() - n / 2 + 0.25
        if mode == "top":
            options["top_k"] = 1 if combine == "select" else data.draw(st.integers(1, n))
            best = scores.argsort(1, descending=True)[:, : options["top_k"]]
            taken = [[(b, scores[c, b].item()) for b in row.tolist()] for c, row in enumerate(best)]
        else:
            combine = "sum" if combine == "select" else combine
            options["threshold"] = limit = data.draw(st.sampled_from([-9.0, -0.25, 0.25, 9.0]))
            scores[torch.rand(count, n) < 0.1] = float("nan")
            taken = [[(b, s) for b, s in enumerate(row) if s > limit] for row in scores.tolist()]
        scorer: Any = Given(scores)
    else:
        combine = "select" if combine == "weighted" else combine
        if mode == "hash":
            scorer = "hash"
            keys = torch.randint(-(1 << 62), 1 << 62, lead)
            labels = HashScorer(n)(keys.flatten())[:, None]
        else:
            k = data.draw(st.integers(1, 3)) if mode == "labels" and combine == "sum" else 1
            labels = torch.randint(-1, n + 2, (count, k))
            scorer = Given(labels if mode == "labels" else labels[:, 0])
        taken = [[(b, 1.0) for b in row] for row in labels.tolist()]
    router = plait.Router(branches(n), scorer, combine=combine, cell_dims=len(lead), **options)
    if combine != "weighted":
        taken = [[(b, 1.0) for b, _ in routes] for routes in taken]
    with torch.no_grad():
        have = router(x) if keys is None else router(x, keys=keys)
        want = by_loop(router, cells, taken).view(*lead, OUT)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_scorer_branches_and_input() -> None:
    torch.manual_seed(0)
    scorer = nn.Sequential(nn.Linear(WIDTH, 3), nn.Softmax(-1))
    router = plait.Router([*branches(2), branch(0)], scorer, top_k=2)
    x = torch.randn(5, WIDTH, requires_grad=True)
    parameters = [x, *router.parameters()]
    have = torch.autograd.grad(router(x).sin().sum(), parameters)
    best = scorer(x).topk(2, 1)
    rows = torch.stack([b(x) for b in router.branches], 1)
    chosen = rows.gather(1, best.indices[..., None].expand(-1, -1, OUT))
    plain = (chosen * best.values[..., None]).sum(1)
    want = torch.autograd.grad(plain.sin().sum(), parameters)
    for mine, reference in zip(have, want, strict=True):
        torch.testing.assert_close(mine, reference)
        assert mine.any()


def test_a_branch_runs_on_exactly_its_cells() -> None:
    class Counting(nn.Module):
        def forward(self, x):
            seen.append(x.shape[0])
            return x

    seen: list[int] = []
    labels = Given(torch.tensor([2, 0, 2, 2, 7]))
    plait.Router([Counting() for _ in range(3)], labels, combine="select")(torch.randn(5, 2))
    assert seen == [1, 0, 3]


def test_nan_is_the_best_score_and_passes_no_threshold() -> None:
    scores = torch.tensor([[0.5, float("nan"), 0.9]])
    x, same = torch.ones(1, 2), [nn.Identity() for _ in range(3)]
    assert plait.Router(same, Given(scores))(x).isnan().all()
    torch.testing.assert_close(plait.Router(same, Given(scores), threshold=0.0)(x), x * 1.4)


def test_the_hash_is_splitmix64_for_ever() -> None:
    def reference(key: int) -> int:
        z = (key + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF

    keys = [0, 1, 2, -1, 12345678901234, -(2**63), 2**63 - 1]
    assert reference(0) == 0xE220A8397B1DCDAF & 0x7FFFFFFFFFFFFFFF  # published: first of seed 0
    for n in (1, 7, 1000):
        assert HashScorer(n)(torch.tensor(keys)).tolist() == [reference(k) % n for k in keys]
    loads = torch.bincount(HashScorer(8)(torch.arange(8000)), minlength=8)
    assert loads.min() > 850  # consecutive keys spread


# -- export ----------------------------------------------------------------------------------------


def softmax(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, n), nn.Softmax(-1))


def routers() -> dict[str, plait.Router]:
    inner = plait.Router(branches(2), softmax(2), combine="select")
    return {
        "top": plait.Router(branches(3), softmax(3), top_k=2),
        "threshold": plait.Router(branches(3), softmax(3), threshold=0.35, combine="sum"),
        "nested": plait.Router([inner, *branches(2)], softmax(3), top_k=2),
        "labels": plait.Router(branches(3), lambda x: (x[:, 0] * 3).long(), combine="select"),
        "hash": plait.Router(branches(3), "hash", combine="select"),
        "tokens": plait.Router(branches(3), softmax(3), top_k=2, cell_dims=2),
    }


@pytest.mark.parametrize("name", routers())
def test_routers_export_as_one_graph(name: str) -> None:
    torch.manual_seed(0)
    router = routers()[name].eval()
    n, t = Dim("n", min=1), Dim("t", min=1)

    def arguments(*lead: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(*lead, WIDTH)
        return (x, torch.randint(0, 99, lead)) if name == "hash" else (x,)

    tokens = (3,) if name == "tokens" else ()
    sizes = ({0: n, 1: t} if tokens else {0: n}, *([{0: n}] if name == "hash" else []))
    with torch.no_grad():
        program = export(router, arguments(5, *tokens), dynamic_shapes=sizes, strict=False)
        run = program.module()
        for count in (1, 2, 9):
            given_ = arguments(count, *tokens)
            torch.testing.assert_close(run(*given_), router(*given_))
        if name == "tokens":
            given_ = arguments(3, 1)
            torch.testing.assert_close(run(*given_), router(*given_))


def test_branches_with_batch_norm_export_too() -> None:
    torch.manual_seed(0)

    def images(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))

    inner = plait.Router([images(4), nn.Conv2d(3, 4, 1)], lambda x: x.mean((2, 3))[:, :2])
    router = plait.Router([inner, images(4)], lambda x: x.amax((2, 3))[:, :2]).train()
    with torch.no_grad():
        for _ in range(3):
            router(torch.randn(8, 3, 6, 6) + 1)
        router.eval()
        size = {0: Dim("n", min=1)}
        program = export(router, (torch.randn(4, 3, 6, 6),), dynamic_shapes=(size,), strict=False)
        for count in (1, 3):
            x = torch.randn(count, 3, 6, 6)
            torch.testing.assert_close(program.module()(x), router(x))


# -- misuse ----------------------------------------------------------------------------------------

TWO = lambda: [nn.Identity(), nn.Identity()]  # noqa: E731 - a fresh pair each time
MISUSES = {
    "at least one branch": lambda: plait.Router([], softmax(1)),
    "branch 1 is a int": lambda: plait.Router([nn.Identity(), 3], softmax(2)),
    "several modules are needed, a branch each": lambda: plait.Router(nn.Identity(), softmax(1)),
    "top_k must be between 1 and 2": lambda: plait.Router(TWO(), softmax(2), top_k=3),
    "top_k must be between 1 and 2, the number": lambda: plait.Router(TWO(), softmax(2), top_k=0),
    "top_k must be an integer": lambda: plait.Router(TWO(), softmax(2), top_k=1.0),
    "combine must be one of": lambda: plait.Router(TWO(), softmax(2), combine="mean"),
    "takes exactly one branch": lambda: plait.Router(TWO(), softmax(2), top_k=2, combine="select"),
    "leave top_k at 1": lambda: plait.Router(TWO(), softmax(2), threshold=0.1, combine="select"),
    "threshold must be a number": lambda: plait.Router(TWO(), softmax(2), threshold="0"),
    "cell_dims must be 1 or more": lambda: plait.Router(TWO(), softmax(2), cell_dims=0),
    "scorer must be callable or 'hash', not 'sum'": lambda: plait.Router(TWO(), "sum"),
    "scorer must be callable or 'hash', not a int": lambda: plait.Router(TWO(), 3),
    "a hash has no scores": lambda: plait.Router(TWO(), "hash"),
    "does not fit 2 branches": lambda: plait.Router(TWO(), HashScorer(3), combine="sum"),
    "branches must be a positive integer": lambda: HashScorer(0),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_is_told_when_a_router_is_made(message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MISUSES[message]()


def returns(scores: Any, combine: str = "weighted") -> plait.Router:
    return plait.Router(TWO(), lambda cells: scores, combine=combine)


HASHED = plait.Router(TWO(), "hash", combine="select")
CALLS = {
    r"returned shape \(3, 1, 2\) for 3 cells": lambda x: returns(torch.rand(3, 1, 2))(x),
    r"returned shape \(4, 2\) for 3 cells": lambda x: returns(torch.rand(4, 2))(x),
    r"float32 of shape \(3, 5\); scores are \[cells, 2\]": lambda x: returns(torch.rand(3, 5))(x),
    r"float32 of shape \(3,\).* labels are int64": lambda x: returns(torch.zeros(3))(x),
    "returned torch.int32; scores float": lambda x: returns(torch.zeros(3, 2).int())(x),
    "a list, not a tensor": lambda x: returns([0, 1, 0])(x),
    "labels, which have no scores": lambda x: returns(torch.zeros(3).long())(x),
    "one label per cell, the scorer returned 2": (
        lambda x: returns(torch.zeros(3, 2).long(), "select")(x)
    ),
    "needs keys=": lambda x: HASHED(x),
    r"keys have shape \(2,\); x has cells of shape \(3,\)": lambda x: HASHED(x, torch.zeros(2)),
    "keys are torch.float32": lambda x: HASHED(x, torch.zeros(3)),
    "keys must be an int64 tensor": lambda x: HASHED(x, [1, 2, 3]),
    "keys= is for routers": lambda x: returns(torch.rand(3, 2))(x, torch.zeros(3)),
    "cell_dims is 3": lambda x: plait.Router(TWO(), softmax(2), cell_dims=3)(x),
    "branch 1 returned a tuple": (
        lambda x: plait.Router([nn.Identity(), Pair()],
                               lambda c: torch.rand(len(c), 2))(x)
    ),
    "branch 1 returned cells of shape": (
        lambda x: plait.Router([nn.Identity(), nn.Linear(6, 5)],
                               lambda c: torch.rand(len(c), 2))(x)
    ),
}  # fmt: skip


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("message", CALLS)
def test_misuse_is_told_when_a_router_is_called(message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        CALLS[message](torch.randn(3, WIDTH))
