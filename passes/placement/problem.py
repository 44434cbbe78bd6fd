"""A placement problem as arrays: operators, tensors, devices and links.

A *tensor* is one output of an operator under one name; all edges of that name carry it, and it is
as large as the largest of them. Tensors are numbered by source, and a *pair* is one tensor at one
of its consumers. Both are kept in compressed rows, for the simulator reads nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import InfeasibleError, PlacementError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
MOST = 1e60
"""Bytes, seconds and rates are below this, so that sums and products of them stay finite."""


@dataclass(frozen=True)
class Device:
    """A device: memory in bytes, and the factor by which it is faster than the costs assume."""

    name: str
    memory_bytes: float
    speed: float = 1.0


@dataclass(frozen=True)
class Op:
    """An operator.

    ``time_s`` is seconds on a device of speed 1, or seconds for each device (None: not allowed
    there). Ops of one ``group`` run on one device. ``keep``: the output stays until the end.
    ``recompute``: whether running it again gives the same and does nothing else.
    """

    name: str
    time_s: float | tuple[float | None, ...]
    param_bytes: float = 0
    temp_bytes: float = 0
    output_bytes: float = 0
    group: str | None = None
    keep: bool = False
    recompute: bool = True


@dataclass(frozen=True)
class Edge:
    """``dst`` reads output ``tensor`` of ``src``, of ``bytes`` bytes."""

    src: str
    dst: str
    bytes: float
    tensor: str = ""


@dataclass(frozen=True)
class Link:
    """What a directed connection costs: ``latency_s`` + bytes / ``bandwidth_Bps`` a transfer."""

    latency_s: float
    bandwidth_Bps: float


class Arrays(NamedTuple):
    """What compiled code reads of a problem; n ops, m devices, T tensors, K pairs."""

    time: Floats  # [n, m] seconds, inf where not allowed
    param: Floats  # [n] bytes
    temp: Floats  # [n] bytes
    out: Floats  # [n] bytes
    keep: npt.NDArray[np.bool_]  # [n]
    static: bool  # the memory model
    cap: Floats  # [m] bytes
    lat: Floats  # [m, m] seconds
    bw: Floats  # [m, m] bytes a second
    tensor_src: Ints  # [T]
    tensor_bytes: Floats  # [T]
    tensor_ptr: Ints  # [T + 1] rows of pairs
    pair_dst: Ints  # [K] consumers, by tensor
    pair_tensor: Ints  # [K]
    out_ptr: Ints  # [n + 1] rows of tensors
    in_ptr: Ints  # [n + 1] rows of in_pair
    in_pair: Ints  # [K] pairs, by consumer
    topo: Ints  # [n] ops, sources first
    unit: Ints  # [n] colocation unit of each op
    unit_ptr: Ints  # [units + 1] rows of unit_op
    unit_op: Ints  # [n] ops, by unit
    allowed: npt.NDArray[np.bool_]  # [units, m]


@dataclass(frozen=True)
class Problem:
    """A checked problem. Raises PlacementError at construction where something has no meaning."""

    name: str
    memory_model: str
    devices: tuple[Device, ...]
    default_link: Link
    links: dict[tuple[str, str], Link]
    ops: tuple[Op, ...]
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        if not self.devices:
            raise PlacementError("devices: the problem has none; name at least one")
        if self.memory_model not in ("dynamic", "static"):
            raise PlacementError(
                f"memory_model {self.memory_model!r} is unknown; write 'dynamic' or 'static'"
            )
        for kind, named in (("device", self.devices), ("op", self.ops)):
            seen: set[str] = set()
            for thing in named:
                if thing.name in seen:
                    raise PlacementError(f"{kind} {thing.name!r} is there twice; rename one")
                seen.add(thing.name)
        for src, dst in self.links:
            for end in (src, dst):
                if end not in self.device_index:
                    raise PlacementError(f"link {src!r} -> {dst!r}: there is no device {end!r}")
        for edge in self.edges:
            for end in (edge.src, edge.dst):
                if end not in self.op_index:
                    raise PlacementError(
                        f"edge {edge.src!r} -> {edge.dst!r}: there is no op {end!r}"
                    )
        self.arrays  # noqa: B018 - finds cycles and groups without a device now

    @cached_property
    def op_index(self) -> dict[str, int]:
        """Ops by name."""
        return {op.name: i for i, op in enumerate(self.ops)}

    @cached_property
    def device_index(self) -> dict[str, int]:
        """Devices by name."""
        return {device.name: i for i, device in enumerate(self.devices)}

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """The name of each tensor, in the order of `Arrays.tensor_src`."""
        first = dict.fromkeys((self.op_index[edge.src], edge.tensor) for edge in self.edges)
        return tuple(tensor for _, tensor in sorted(first, key=lambda key: key[0]))

    @cached_property
    def arrays(self) -> Arrays:
        """The problem as arrays."""
        n, m = len(self.ops), len(self.devices)
        speed = [device.speed for device in self.devices]
        time = np.empty((n, m))
        for i, op in enumerate(self.ops):
            if isinstance(op.time_s, tuple):
                time[i] = [np.inf if x is None else x for x in op.time_s]
            else:
                time[i] = [op.time_s / s for s in speed]
        tensors = _tensors(self.edges, self.op_index, n)
        topo = self._topological(tensors)
        unit, unit_ptr, unit_op = self._units()
        units = len(unit_ptr) - 1
        allowed = np.ones((units, m), np.bool_)
        for i, row in enumerate(np.isfinite(time)):
            allowed[unit[i]] &= row
        for u in np.flatnonzero(~allowed.any(1)):
            ops = [self.ops[i] for i in unit_op[unit_ptr[u] : unit_ptr[u + 1]]]
            what = f"op {ops[0].name!r}" if len(ops) == 1 else f"group {ops[0].group!r}"
            raise InfeasibleError(f"{what} is allowed on no device (time_s)", {}, True)
        column = lambda field: np.array([getattr(op, field) for op in self.ops], float)  # noqa: E731
        lat, bw = np.empty((m, m)), np.empty((m, m))
        for i, a in enumerate(self.devices):
            for j, b in enumerate(self.devices):
                link = self.links.get((a.name, b.name), self.default_link)
                lat[i, j], bw[i, j] = link.latency_s, link.bandwidth_Bps
        fields = (
            time, column("param_bytes"), column("temp_bytes"), column("output_bytes"),
            np.array([op.keep for op in self.ops], np.bool_), self.memory_model == "static",
            np.array([device.memory_bytes for device in self.devices], float), lat, bw,
            *tensors, topo, unit, unit_ptr, unit_op, allowed,
        )  # fmt: skip
        return Arrays._make(fields)

    def _units(self) -> tuple[Ints, Ints, Ints]:
        """Colocation units: a group each, and every op without one by itself."""
        number: dict[object, int] = {}
        keys: list[object] = [i if op.group is None else op.group for i, op in enumerate(self.ops)]
        unit = np.array([number.setdefault(key, len(number)) for key in keys], np.int64)
        return unit, *rows(unit, len(number))

    def _topological(self, tensors: Sequence[np.ndarray]) -> Ints:
        """Ops with sources first (Kahn's algorithm). Raises PlacementError naming a cycle."""
        _, _, tensor_ptr, pair_dst, _, out_ptr, in_ptr, _ = tensors
        n = len(self.ops)
        first = tensor_ptr[out_ptr]  # the pairs of an op's tensors lie in a row
        successors, bounds = pair_dst.tolist(), first.tolist()
        missing = np.diff(in_ptr).tolist()
        order = [i for i in range(n) if not missing[i]]
        for u in order:
            for v in successors[bounds[u] : bounds[u + 1]]:
                missing[v] -= 1
                if not missing[v]:
                    order.append(v)
        if len(order) < n:
            self._raise_cycle([i for i in range(n) if missing[i]], successors, bounds)
        return np.array(order, np.int64)

    def _raise_cycle(self, left: list[int], successors: list[int], bounds: list[int]) -> None:
        # Every op left has a predecessor that is left: walk backwards until one comes again.
        inside = set(left)
        before = {v: u for u in left for v in successors[bounds[u] : bounds[u + 1]] if v in inside}
        walk = [left[0]]
        while before[walk[-1]] not in walk:
            walk.append(before[walk[-1]])
        loop = walk[walk.index(before[walk[-1]]) :]
        names = [self.ops[i].name for i in [*reversed(loop), loop[-1]]]
        shown = names if len(names) < 9 else [*names[:4], "...", *names[-3:]]
        raise PlacementError(f"edges: cycle {' -> '.join(shown)}; operators must form a DAG")


def rows(key: Ints, count: int) -> tuple[Ints, Ints]:
    """Compressed rows of positions by key: ``index[ptr[k]:ptr[k + 1]]`` are those of key k."""
    ptr = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(key, minlength=count), out=ptr[1:])
    return ptr, np.argsort(key, kind="stable").astype(np.int64)


def _tensors(edges: Sequence[Edge], op_index: dict[str, int], n: int) -> tuple[np.ndarray, ...]:
    """Tensors and pairs; those of one source in the order in which the edges first name them."""
    number: dict[tuple[int, str], int] = {}
    sizes: list[float] = []
    consumers: list[dict[int, None]] = []
    for edge in edges:
        key = (op_index[edge.src], edge.tensor)
        t = number.setdefault(key, len(sizes))
        if t == len(sizes):
            sizes.append(0.0)
            consumers.append({})
        sizes[t] = max(sizes[t], float(edge.bytes))
        consumers[t][op_index[edge.dst]] = None
    src = np.array([u for u, _ in number], np.int64)
    out_ptr, by_source = rows(src, n)
    counts = np.array([len(consumers[t]) for t in by_source], np.int64)
    tensor_ptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=tensor_ptr[1:])
    pair_dst = np.array([v for t in by_source for v in consumers[t]], np.int64)
    pair_tensor = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    in_ptr, in_pair = rows(pair_dst, n)
    tensor_bytes = np.array([sizes[t] for t in by_source], float)
    return src[by_source], tensor_bytes, tensor_ptr, pair_dst, pair_tensor, out_ptr, in_ptr, in_pair
