"""m-SCT: list scheduling that keeps devices for the favourite children of what they just ran.

Small Communication Times (Hanen and Munier, 1995) under memory limits, as in Baechi (Jeon et al.,
SoCC 2020). A linear program (HiGHS) decides which edges should stay on a device: each op has at
most one favourite child, each child at most one favourite parent. Where the largest communication
is at most the smallest computation, SCT without memory limits is within (2 + 2r) / (2 + r) of the
optimum with unlimited devices, r the ratio of the two; no real graph seen so far is of that kind.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from .list_scheduling import Ledger, Listed, earliest_first, upward_ranks
from .problem import Ints, Problem

_ROUND = 0.1  # edges of a smaller value are favourites; Baechi's threshold


def favourites(problem: Problem, seconds: float | None = None) -> Ints:
    """Favourite child of each op, -1 where there is none, from the LP relaxation.

    With ``seconds`` the solver stops after that time; ops then have no favourites, which makes
    m-SCT the same as m-ETF.
    """
    p = problem.arrays
    n, m = p.time.shape
    allowed = np.isfinite(p.time)
    mean = np.where(allowed, p.time, 0).sum(1) / np.maximum(allowed.sum(1), 1)
    child = np.full(n, -1, np.int64)
    src = p.tensor_src[p.pair_tensor]
    edges, where = np.unique(np.stack([src, p.pair_dst]), axis=1, return_inverse=True)
    count = edges.shape[1]
    if count == 0 or m == 1:
        return child
    other = ~np.eye(m, dtype=bool)
    lat, per_byte = p.lat[other].mean(), (1 / p.bw[other]).mean()
    cost = np.zeros(count)
    np.maximum.at(cost, where.ravel(), (lat + p.tensor_bytes * per_byte)[p.pair_tensor])
    # Variables: x per edge (1: communicates), start s per op, w. Scaled so that times are near 1.
    scale = 1.0 / max(float(mean.sum() / n + cost.mean()), 1e-300)
    k, one = np.arange(count), np.ones(count)
    u, v = edges
    precede = sparse.coo_matrix(
        (
            np.concatenate([cost * scale, one, -one]),
            (np.concatenate([k, k, k]), np.concatenate([k, count + u, count + v])),
        ),
        shape=(count, count + n + 1),
    )
    ops = np.arange(n)
    finish = sparse.coo_matrix(
        (
            np.concatenate([np.ones(n), -np.ones(n)]),
            (np.concatenate([ops, ops]), np.concatenate([count + ops, np.full(n, count + n)])),
        ),
        shape=(n, count + n + 1),
    )
    degrees = []
    for end in (u, v):  # all edges but one of an op communicate
        degrees.append(sparse.coo_matrix((-one, (end, k)), shape=(n, count + n + 1)))
    matrix = sparse.vstack([precede, finish, *degrees]).tocsr()
    bound = np.concatenate(
        [-mean[u] * scale, -mean * scale]
        + [-(np.bincount(end, minlength=n) - 1.0).clip(0) for end in (u, v)]
    )
    objective = np.zeros(count + n + 1)
    objective[-1] = 1.0
    upper = np.concatenate([one, np.full(n + 1, np.inf)])
    options = {} if seconds is None else {"time_limit": seconds}
    solved = linprog(
        objective,
        A_ub=matrix,
        b_ub=bound,
        bounds=np.stack([np.zeros_like(upper), upper], 1),
        method="highs",
        options=options,
    )
    if solved.status == 0:
        parent = np.full(n, -1, np.int64)
        for e in np.argsort(solved.x[:count], kind="stable"):
            if solved.x[e] < _ROUND and child[u[e]] < 0 and parent[v[e]] < 0:
                child[u[e]], parent[v[e]] = v[e], u[e]
    return child


def m_sct(
    problem: Problem,
    given: Ints | None = None,
    balanced: bool = False,
    patience: float = math.inf,
) -> Listed:
    """Places ops by m-SCT. Raises InfeasibleError where an op finds no device with room, or out of
    ``patience`` (`earliest_first`).

    ``given`` are what `favourites` answered, where it has been asked before.
    """
    child = (favourites(problem) if given is None else given).tolist()
    ledger = Ledger(problem, balanced=balanced)
    rank = (-upward_ranks(problem)).tolist()
    last = [-1] * ledger.m  # the op that a device ran last

    def start_of(op: int, d: int, again: bool) -> float:
        start = max(ledger.arrival(op, d), ledger.free[d])
        wanted = child[last[d]] if last[d] >= 0 else -1
        if wanted >= 0 and wanted != op and ledger.assign[wanted] < 0:
            # The device is awake for a favourite child: others may only use it once they are
            # urgent, which is when their data could have come from anywhere.
            far = max([max(ledger.sent(t, e) for e in range(ledger.m)) for t in ledger.inputs[op]],
                      default=0.0)  # fmt: skip
            start = max(start, far)
        return start

    def placed(op: int, d: int) -> None:
        last[d] = op

    return earliest_first(ledger, "m-SCT", rank, start_of, placed, patience)
