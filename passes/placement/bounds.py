"""Certified lower bounds on the makespan and on the load of a pipeline.

Each holds for every feasible placement and every order: it relaxes the rules of the simulator and
never adds one. Their largest is the bound that a report's gap refers to.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from scipy import sparse
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components

from .clusters import depths
from .engine import heads
from .problem import Arrays, Floats, Ints


def lower_bounds(p: Arrays, throughput: bool = False, copies: bool = False) -> dict[str, float]:
    """Bounds by name, seconds; "best" is the largest.

    With ``copies`` they hold even if ops are recomputed or offloaded in any way (`alternatives`):
    a copy can spare a transfer, so bounds by transfers are left out; of each op, it or its copy has
    all its readers behind it, and both have all it reads before them, so the others hold.

    - ``work``: all work shared out perfectly, each op at its own speed on each device (an LP);
    - ``group``: a colocation group runs on one device;
    - ``path``: the longest path at least times;
    - ``communication``: the same where ops wait for data from other devices or share one device
      with what they read, whichever is sooner (in the manner of Fernandez and Bussell, 1973);
    - ``window``: ops that have much before and behind them must share the devices meanwhile
      (head-tail bound, as in Carlier's for one machine, 1982);
    - ``cut``: if no device holds the whole problem, some tensor between colocated parts crosses;
    - ``memory``: along a path each run on one device must fit it, so it is cut, and transfers.
    """
    n = len(p.topo)
    least = p.time.min(1)
    bounds = {"work": _work(p), "group": _group(p)}
    if not throughput and n:
        head, tail = depths(p)
        bounds["path"] = float((head + least + tail).max())
        late, early = head, tail
        if not copies:
            late, early = _with_transfers(p, least)
            bounds["communication"] = float((late + least + early).max())
            bounds["cut"] = _forced_cut(p, head, tail, least)
            biases = (0.0, 0.03, 0.1, 0.3, 1.0, 10.0)
            bounds["memory"] = max(_memory_path(p, least, x) for x in biases)
        bounds["window"] = _window(p, np.maximum(head, late), np.maximum(tail, early), least)
    bounds["best"] = max(bounds.values(), default=0.0)
    return bounds


def _work(p: Arrays) -> float:
    """min T with each op's work split over devices and no device above T.

    Solved by LP over classes of ops with proportional times, so scalar times need no solver.
    """
    n, m = p.time.shape
    if not n:
        return 0.0
    ratio = p.time / np.maximum(p.time.min(1, keepdims=True), 1e-300)
    ratio = np.where(p.time.min(1, keepdims=True) > 0, ratio, 0.0)
    classes, where = np.unique(np.round(ratio, 12), axis=0, return_inverse=True)
    work = np.bincount(where.ravel(), weights=p.time.min(1), minlength=len(classes))
    keep = work > 0
    classes, work = classes[keep], work[keep]
    if not len(work):
        return 0.0
    if len(classes) == 1 or len(classes) * m > 20000:  # the second: rates of the fastest, as bound
        return float(work.sum() / (1.0 / classes.min(0)).sum())
    # Variables: share of class c on device d, and T.
    c = len(classes)
    finite = np.where(np.isfinite(classes), classes, 0.0)
    a = sparse.lil_matrix((m, c * m + 1))
    for d in range(m):
        a[d, np.arange(c) * m + d] = finite[:, d] * work / work.sum()
        a[d, c * m] = -1.0
    equal = sparse.kron(sparse.eye(c), np.ones((1, m)))
    equal = sparse.hstack([equal, sparse.csr_matrix((c, 1))])
    upper = np.append(np.where(np.isfinite(classes), 1.0, 0.0).ravel(), np.inf)
    solved = linprog(
        np.append(np.zeros(c * m), 1.0), A_ub=a.tocsr(), b_ub=np.zeros(m), A_eq=equal.tocsr(),
        b_eq=np.ones(c), bounds=np.stack([np.zeros_like(upper), upper], 1), method="highs",
    )  # fmt: skip
    # The solver's tolerance must not make the bound too large.
    return float(solved.fun * work.sum() * (1 - 1e-6)) if solved.status == 0 else 0.0


def _group(p: Arrays) -> float:
    units, m = len(p.unit_ptr) - 1, len(p.cap)
    if not units:
        return 0.0
    finite = np.where(np.isfinite(p.time), p.time, 0.0)
    work = np.stack([np.bincount(p.unit, finite[:, d], units) for d in range(m)], 1)
    return float(np.where(p.allowed, work, np.inf).min(1).max())


def _speed_rate(p: Arrays) -> float:
    """How much least-time work all devices together can do in a second, at most."""
    least = p.time.min(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(least > 0, least / p.time, 0.0)
    return max(float(rate.max(0, initial=0.0).sum()), 1e-300)


def _window(p: Arrays, head: Floats, tail: Floats, least: Floats) -> float:
    rate = _speed_rate(p)
    by_tail = np.argsort(-tail, kind="stable")
    best = 0.0
    starts = np.unique(head)
    if len(starts) > 2000:  # any subset of the starts gives a valid bound
        starts = starts[np.linspace(0, len(starts) - 1, 2000).astype(int)]
    for x in starts:
        k = by_tail[head[by_tail] >= x]
        best = max(best, float((x + tail[k] + np.cumsum(least[k]) / rate).max()))
    return best


def _cheapest_transfer(p: Arrays) -> Floats:
    """Least seconds to send each tensor between two different devices."""
    m = len(p.cap)
    if m == 1:
        return np.zeros(len(p.tensor_bytes))
    other = ~np.eye(m, dtype=bool)
    links = np.unique(np.stack([p.lat[other], p.bw[other]], 1), axis=0)
    return (links[:, 0] + p.tensor_bytes[:, None] / links[:, 1]).min(1)


def _with_transfers(p: Arrays, least: Floats) -> tuple[Floats, Floats]:
    """Heads and tails of ops, with transfers; the tails are heads of the graph turned round."""
    cost = _cheapest_transfer(p)[p.pair_tensor]
    src = p.tensor_src[p.pair_tensor]
    late = heads(p.topo, p.in_ptr, src[p.in_pair], cost[p.in_pair], least, p.unit)
    first = p.tensor_ptr[p.out_ptr]
    return late, heads(p.topo[::-1], first, p.pair_dst, cost, least, p.unit)


def _forced_cut(p: Arrays, head: Floats, tail: Floats, least: Floats) -> float:
    """If not everything fits one device, some tensor between units crosses: the cheapest path."""
    always = p.param.sum() + ((p.out + p.temp).sum() if p.static else 0.0)
    whole = p.allowed.all(0) & (always <= p.cap)
    if whole.any() or not len(p.pair_dst):
        return 0.0
    units = len(p.unit_ptr) - 1
    src = p.tensor_src[p.pair_tensor]
    a, b = p.unit[src], p.unit[p.pair_dst]
    graph = sparse.coo_matrix((np.ones(len(a)), (a, b)), shape=(units, units))
    if connected_components(graph, directed=False)[0] != 1:
        return 0.0
    across = a != b
    seconds = _cheapest_transfer(p)[p.pair_tensor]
    dst = p.pair_dst
    path = head[src] + least[src] + seconds + least[dst] + tail[dst]
    return float(path[across].min(initial=np.inf)) if across.any() else 0.0


def _memory_path(p: Arrays, least: Floats, bias: float) -> float:
    """Work along one path plus its cheapest cuts such that each piece fits the largest device.

    ``bias`` only chooses the path: how much memory counts beside time.
    """
    need = p.param + p.out + p.temp if p.static else p.param
    units = len(p.unit_ptr) - 1
    memory = np.bincount(p.unit, need, units)
    count = np.bincount(p.unit, minlength=units)
    cap = float(p.cap.max())
    share = (memory / np.maximum(count, 1))[p.unit]
    weight = (least + bias * least.sum() * share / max(cap, 1.0)).tolist()
    first, dst = p.tensor_ptr[p.out_ptr].tolist(), p.pair_dst.tolist()
    longest, follow = [0.0] * len(weight), [-1] * len(weight)
    for u in reversed(p.topo.tolist()):
        for q in range(first[u], first[u + 1]):
            if follow[u] < 0 or longest[dst[q]] > longest[dst[follow[u]]]:
                follow[u] = q
        longest[u] = weight[u] + (longest[dst[follow[u]]] if follow[u] >= 0 else 0.0)
    path, pairs = [int(np.argmax(longest))], []
    while follow[path[-1]] >= 0:
        pairs.append(follow[path[-1]])
        path.append(dst[pairs[-1]])
    seconds = _cheapest_transfer(p)
    cut = np.concatenate([[0.0], seconds[p.pair_tensor[pairs]]]) if pairs else np.zeros(1)
    return float(least[path].sum()) + _cheapest_cuts(p.unit[path], cut, memory, cap)


def _cheapest_cuts(unit: Ints, cut: Floats, memory: Floats, cap: float) -> float:
    """Least total of ``cut[j]`` (before place j) such that each run's units fit ``cap`` together.

    Dynamic programming with a sliding minimum; a run that alone is too large counts as fitting.
    """
    best = [0.0]
    window: deque[tuple[float, int]] = deque()
    inside: dict[int, int] = {}
    used, low = 0.0, 0
    for j, u in enumerate(unit.tolist()):
        value = best[j] + float(cut[j])
        while window and window[-1][0] >= value:
            window.pop()
        window.append((value, j))
        inside[u] = inside.get(u, 0) + 1
        used += float(memory[u]) if inside[u] == 1 else 0.0
        while used > cap * (1 + 1e-9) and low < j:
            v = int(unit[low])
            inside[v] -= 1
            used -= float(memory[v]) if not inside[v] else 0.0
            low += 1
        while window[0][1] < low:
            window.popleft()
        best.append(window[0][0])
    return best[-1]
