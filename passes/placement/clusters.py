"""Structure of a graph that searches use: linear orders of its units, and nested clusters."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, splu

from .problem import Arrays, Floats, Ints


def depths(p: Arrays) -> tuple[Floats, Floats]:
    """Head and tail of each op: seconds of the longest path before it, and behind it.

    Each op takes its least time and transfers nothing, so both are lower bounds.
    """
    least = p.time.min(1).tolist()
    n = len(least)
    head, tail = [0.0] * n, [0.0] * n
    first = p.tensor_ptr[p.out_ptr].tolist()
    dst = p.pair_dst.tolist()
    for u in p.topo.tolist():
        x = head[u] + least[u]
        for v in dst[first[u] : first[u + 1]]:
            if x > head[v]:
                head[v] = x
    for u in reversed(p.topo.tolist()):
        tail[u] = max([tail[v] + least[v] for v in dst[first[u] : first[u + 1]]], default=0.0)
    return np.array(head), np.array(tail)


def _size(graph: sparse.csr_matrix) -> int:
    assert graph.shape is not None
    return graph.shape[0]


def unit_graph(p: Arrays) -> sparse.csr_matrix:
    """Bytes between units, symmetric, without a diagonal; a tiny amount where they are zero."""
    units = len(p.unit_ptr) - 1
    a = p.unit[p.tensor_src[p.pair_tensor]]
    b = p.unit[p.pair_dst]
    size = p.tensor_bytes[p.pair_tensor] + 1e-3
    other = a != b
    graph = sparse.coo_matrix((size[other], (a[other], b[other])), shape=(units, units)).tocsr()
    return (graph + graph.T).tocsr()


def linear_orders(p: Arrays) -> Ints:
    """Orders [R, units] in which near units are likely to belong together.

    By depth, which suits inference, and along the smoothest vectors of the unit graph's Laplacian
    (spectral ordering, Hall 1970), which also brings an op and its gradients together and finds
    the layers of a training graph. Bytes weigh the edges, damped in two degrees.
    """
    units = len(p.unit_ptr) - 1
    head, _ = depths(p)
    size = np.maximum(np.bincount(p.unit, minlength=units), 1)
    depth = np.bincount(p.unit, weights=head, minlength=units) / size
    orders = [np.argsort(depth, kind="stable")]
    graph = unit_graph(p)
    if units > 3 and graph.nnz:
        for damped in (graph.data, np.sqrt(graph.data), np.log1p(graph.data)):
            scaled = sparse.csr_matrix((damped, graph.indices, graph.indptr), graph.shape)
            orders += [np.argsort(v, kind="stable") for v in _smoothest(scaled, 2)]
    return np.ascontiguousarray(np.array(orders, np.int64))


def _smoothest(graph: sparse.csr_matrix, count: int) -> list[Floats]:
    """Eigenvectors of the smallest eigenvalues but the first, by inverse iteration.

    Components without edges between them are tied to one another by the shift alone, which orders
    them after one another.
    """
    n = _size(graph)
    degree = np.asarray(graph.sum(1)).ravel()
    shift = 1e-6 * degree.mean()
    laplacian = (sparse.diags(degree + shift) - graph).tocsc()
    solve = splu(laplacian).solve
    start = np.random.default_rng(0).random(n)
    inverse = LinearOperator((n, n), matvec=solve, dtype=float)  # pyright: ignore
    try:
        values, vectors = eigsh(inverse, k=min(count + 1, n - 1), v0=start, tol=1e-4, maxiter=300)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    return [vectors[:, k] for k in np.argsort(-values)[1:]]


def cluster_levels(p: Arrays, seed: int = 0) -> list[Ints]:
    """Nested clusterings of the units, finest first, by heavy-edge matching.

    Each level maps units to clusters and about halves their number: pairs that exchange the most
    bytes for what they weigh are joined, as in multilevel graph partitioning (Karypis and Kumar,
    1998).
    """
    units = len(p.unit_ptr) - 1
    graph = unit_graph(p)
    weight = np.bincount(p.unit, weights=p.time.min(1), minlength=units)
    weight = weight / max(weight.sum(), 1e-300) + 1.0 / max(units, 1)
    levels: list[Ints] = []
    total = np.arange(units, dtype=np.int64)
    rng = np.random.default_rng(seed)
    while _size(graph) > 2 and graph.nnz:
        label = _match(graph, weight, rng)
        count = int(label.max()) + 1
        if count > 0.95 * _size(graph):
            break
        weight = np.bincount(label, weights=weight, minlength=count)
        shape = (_size(graph), count)
        fold = sparse.csr_matrix((np.ones(shape[0]), (np.arange(shape[0]), label)), shape=shape)
        graph = (fold.T @ graph @ fold).tocsr()
        graph.setdiag(0)
        graph.eliminate_zeros()
        total = label[total]
        levels.append(total)
    return levels


def _match(graph: sparse.csr_matrix, weight: Floats, rng: np.random.Generator) -> Ints:
    """Joins each node with the neighbour it prefers, where the neighbour agrees or is left over."""
    count = _size(graph)
    source = np.repeat(np.arange(count), np.diff(graph.indptr))
    score = graph.data / (weight[source] * weight[graph.indices])
    order = np.lexsort((rng.random(len(score)), -score))
    partner = [-1] * count
    for u, v in zip(source[order].tolist(), graph.indices[order].tolist(), strict=True):
        if partner[u] < 0 and partner[v] < 0:
            partner[u], partner[v] = v, u
    ends = np.array([u if v < 0 else v for u, v in enumerate(partner)])
    joined = sparse.coo_matrix((np.ones(count), (np.arange(count), ends)), shape=(count, count))
    return connected_components(joined, directed=False)[1].astype(np.int64)


def regions(levels: list[Ints]) -> tuple[Ints, Ints]:
    """All clusters of all levels that have at least two units, as compressed rows of units."""
    members: list[np.ndarray] = []
    for level in levels:
        order = np.argsort(level, kind="stable")
        cuts = np.flatnonzero(np.diff(level[order])) + 1
        members += [part for part in np.split(order, cuts) if len(part) > 1]
    ptr = np.zeros(len(members) + 1, np.int64)
    np.cumsum([len(part) for part in members], out=ptr[1:])
    flat = np.concatenate(members) if members else np.zeros(0)
    return ptr, flat.astype(np.int64)
