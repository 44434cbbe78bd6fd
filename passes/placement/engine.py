"""The compiled half of the planner: simulator.c and annealer.c behind numpy arrays.

The library is built once with the C compiler and kept in plait's cache under a hash of its source
and of the compiler's name; building takes about a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import numpy.typing as npt

from ...kernels.c_compiler import c_compiler
from ...kernels.files import replacing
from ...kernels.loader import cache_directory, shared_library
from .errors import PlacementError
from .problem import Arrays, Floats

DONE, STUCK, CUT = 0, 1, 2
PRIORITY, STRICT, GATED = 0, 1, 2
"""Modes of the simulator: GATED devices start only what they have room for."""

_SOURCES = ("simulator.c", "annealer.c")
_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
_SCALARS = ("n", "m", "units", "tensors", "pairs", "regions", "orders", "is_static", "uneven")
_SETTINGS = ("throughput", "mode")

Index = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]
Seed = npt.NDArray[np.uint64]


class View(NamedTuple):
    """A problem as the library reads it; lengths as in `problem.Arrays`, and R linear orders."""

    time: Floats
    param: Floats
    temp: Floats
    out: Floats
    keep: Mask
    cap: Floats
    lat: Floats
    bw: Floats
    tensor_src: Index
    tensor_bytes: Floats
    tensor_ptr: Index
    pair_dst: Index
    pair_tensor: Index
    pair_src: Index  # [K] producers, by tensor
    out_ptr: Index
    in_ptr: Index
    in_pair: Index
    topo: Index
    topo_place: Index  # [n] its inverse
    unit: Index
    unit_ptr: Index
    unit_op: Index
    allowed: Mask
    order: Index  # [R, units] linear orders of the units
    place: Index  # [R, units] their inverses
    region_ptr: Index  # [regions + 1] clusters of units
    region_unit: Index


class Work(NamedTuple):
    """State of one simulation. After it, ``start`` ... ``counts`` hold the schedule."""

    start: Floats  # [n] seconds
    end: Floats  # [n]
    top: Floats  # [m] peak bytes
    sequence: Index  # [n] ops in the order in which they started
    transfer_tensor: Index  # [K]
    transfer_link: Index  # [K] source * m + destination
    transfer_start: Floats  # [K]
    transfer_end: Floats  # [K]
    pair_transfer: Index  # [K] the transfer that feeds a pair, -1: none
    counts: Index  # [2] ops started, transfers made
    level: Floats  # [n] bottom levels: seconds to the end of the step at best
    missing: Index  # [n] tensors that have not arrived
    holds: Index  # [n] what still needs an op's output
    copy_holds: Index  # [K] what still needs a transfer's copy
    waits: Index  # [K] next transfer on the link, -1: none
    head: Index  # [m * m] transfer under way on a link, -1: none
    tail: Index  # [m * m] last transfer of a link
    free: Floats  # [m * m] when a link has sent all that it was given
    running: Index  # [m] op on a device, -1: none
    ran: Index  # [m] ops that a device has started
    current: Floats  # [m] bytes
    ready: Index  # [n] one heap a device
    ready_ptr: Index  # [m + 1]
    ready_len: Index  # [m]
    wake: Index  # [m] devices that may have something to start
    woken: Index  # [m] whether they are on that list
    grow: Index  # [m] devices that hold more since time moved on
    grown: Index  # [m] whether they are on that list
    left: Floats  # [m] work that a device has not started, seconds
    event_time: Floats  # [m + m * m] heap of what ends next
    event_id: Index  # op end on a device: the device; transfer end: m + link
    load: Floats  # [m + m * m] scratch


class State(NamedTuple):
    """What annealing changes: a device for each unit, and an offset on each op's bottom level."""

    assign: Index  # [n] current devices
    offset: Floats  # [n] priorities less bottom levels, seconds
    best_assign: Index  # [n]
    best_offset: Floats  # [n]
    best_mode: Index  # [1] the mode in which the best was found
    turn: Index  # [n] place of an op among those of its device, where lists are tried
    list: Floats  # [n] the same as priorities
    cost: Floats  # [2] current; best that fits in memory
    price: Floats  # [1] added to the cost for each transfer, seconds
    counts: Index  # [4] ops in critical; moves tried; moves taken; times the best got better
    priority: Floats  # [n]
    position: Index  # [n] place of an op in sequence
    sequence: Index  # [n] ops by device, in the order in which they started
    sequence_ptr: Index  # [m + 1]
    critical: Index  # [n] ops on the critical path, last first
    moved: Index  # [max(n, units)] units or ops that a move changes
    old_device: Index  # [units] their devices before
    old_offset: Floats  # [n] their offsets before
    ranked: Index  # [n] ops whose levels a move changes
    old_level: Floats  # [n] their levels before
    dirty: Seed  # [n / 64] by place in topo: ops whose levels may have changed, a bit each
    random: Seed  # [1] generator


class Engine:
    """One problem in the engine. Not for several threads at once."""

    def __init__(self, arrays: Arrays, orders: npt.NDArray[Any], regions: tuple[Any, Any]) -> None:
        p = arrays
        self.arrays = p
        self.n, self.m = n, m = p.time.shape
        units, pairs = len(p.unit_ptr) - 1, len(p.pair_dst)
        order = np.ascontiguousarray(orders, np.int32)
        place = np.argsort(order, axis=1)
        raw = {**p._asdict(), "order": order, "place": place}
        raw["pair_src"] = p.tensor_src[p.pair_tensor]
        raw["topo_place"] = np.argsort(p.topo)
        raw["region_ptr"], raw["region_unit"] = regions
        self.view = View(**{k: _plain(raw[k]) for k in View._fields})
        f, i = np.zeros, lambda size: np.zeros(size, np.int32)
        self.work = Work(
            f(n), f(n), f(m), i(n), i(pairs), i(pairs), f(pairs), f(pairs), i(pairs), i(2), f(n),
            i(n), i(n), i(pairs), i(pairs), i(m * m), i(m * m), f(m * m), i(m), i(m), f(m), i(n),
            i(m + 1), i(m), i(m), i(m), i(m), i(m), f(m), f(m + m * m + 1), i(m + m * m + 1),
            f(m + m * m),
        )  # fmt: skip
        self.state = State(
            i(n), f(n), i(n), f(n), i(1), i(n), f(n), np.full(2, np.inf), f(1), i(4), f(n), i(n),
            i(n), i(m + 1), i(n), i(max(n, units)), i(units), f(n), i(n), f(n),
            np.zeros(n // 64 + 1, np.uint64), np.zeros(1, np.uint64),
        )  # fmt: skip
        scalars = (
            n, m, units, len(p.tensor_src), pairs, len(self.view.region_ptr) - 1, len(order),
            int(p.static), int(_uneven(p.time)),
        )  # fmt: skip
        self._p = _pointer(_struct(View, _SCALARS), self.view, scalars)
        self._w = _pointer(_struct(Work, ()), self.work, ())
        self._s = _pointer(_struct(State, _SETTINGS), self.state, (0, PRIORITY))
        self._library = _library()

    def simulate(
        self,
        assign: Index,
        priority: Floats,
        position: Index | None = None,
        limit: float = np.inf,
    ) -> tuple[int, float]:
        """Plays one step: DONE or STUCK, and the makespan; the schedule is in ``work``. CUT where
        the makespan must exceed ``limit`` seconds.

        With ``position`` (the place of each op in its device's list, -1: in none) devices keep
        strictly to their lists; else they take their ready op of largest ``priority``.
        """
        self.work.level[:] = 0.0
        cost = ctypes.c_double()
        strict = position is not None
        place = position if strict else self.state.position
        code = self._library.plait_simulate(
            self._p, self._w, _address(assign), _address(priority), _address(place),
            STRICT if strict else PRIORITY, 0.0, limit, ctypes.byref(cost),
        )  # fmt: skip
        return code, cost.value

    def bottom_levels(self, assign: Index) -> Floats:
        """Longest path of compute and transfers from each op to the end, seconds."""
        level = np.zeros(self.n)
        self._library.plait_bottom_levels(self._p, _address(assign), _address(level))
        return level

    def pipeline_load(self, assign: Index) -> float:
        """Largest load of a device or link for one input, seconds."""
        load = self.work.load
        return self._library.plait_pipeline_load(self._p, _address(assign), _address(load))

    def overrun(self) -> float:
        """Peak bytes above capacity in ``work``, as shares of it, added over the devices."""
        cap = self.arrays.cap
        return float((np.maximum(self.work.top - cap, 0.0) / np.maximum(cap, 1.0)).sum())

    def settle(self, weight: float, limit: float = np.inf) -> float:
        """Cost of ``state.assign`` under ``state.offset``; infinite, and no state, above limit."""
        return self._library.plait_settle(self._p, self._w, self._s, weight, limit)

    def anneal(
        self, steps: int, hot: float, cold: float, weight: float, order_share: float
    ) -> None:
        """Tries ``steps`` moves while the temperature falls from ``hot`` to ``cold`` seconds.

        ``weight`` is what an overrun of memory by its whole capacity costs, in seconds.
        """
        self._library.plait_anneal(self._p, self._w, self._s, steps, hot, cold, weight, order_share)

    def set_throughput(self, on: bool) -> None:
        """Makes the largest load the cost, instead of the makespan."""
        self._s._obj.throughput = int(on)

    def set_mode(self, mode: int) -> None:
        """PRIORITY, or GATED: then the best is one whose order fits when kept to as lists."""
        self._s._obj.mode = mode

    def set_price(self, seconds: float) -> None:
        """Adds ``seconds`` to the cost for each transfer."""
        self.state.price[0] = seconds


def _uneven(time: Floats) -> bool:
    """Whether one op runs soonest on this device and another op on that, by more than rounding."""
    some = time[np.where(np.isfinite(time), time, 0.0).any(1)]
    soonest = some <= some.min(1, keepdims=True) * (1 + 1e-9)
    return not soonest.all(0).any()


def heads(
    order: npt.NDArray[Any],
    ptr: npt.NDArray[Any],
    near: npt.NDArray[Any],
    cost: Floats,
    least: Floats,
    unit: npt.NDArray[Any],
) -> Floats:
    """Least start of each op (seconds), given the ops in rows ``near`` that must end before it.

    Transfers of at least ``cost`` (by entry) are paid or avoided by sharing a device, whichever
    allows the earlier start.
    """
    n = len(order)
    arrays = [_plain(x) for x in (order, ptr, near, cost, least, unit)]
    head, behind = np.zeros(n), np.zeros(n)
    mark, room = np.full(n, -1, np.int32), np.zeros(n + 64, np.int32)
    _library().plait_heads(n, *[_address(x) for x in (*arrays, head, mark, room, behind)])
    return head


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kinds = {"f": np.float64, "i": np.int32, "u": np.int32, "b": np.uint8}
    return np.ascontiguousarray(array, kinds[np.asarray(array).dtype.kind])


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def _struct(kind: type, scalars: tuple[str, ...]) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(name, ctypes.c_int32) for name in scalars]
    fields += [(name, ctypes.c_void_p) for name in kind._fields]
    return type(kind.__name__, (ctypes.Structure,), {"_fields_": fields})


def _pointer(struct: type[ctypes.Structure], arrays: Any, scalars: tuple[int, ...]) -> Any:
    return ctypes.byref(struct(*scalars, *(a.ctypes.data for a in arrays)))


def _declarations() -> str:
    """The structs in C, field by field as `_struct` lays them out."""
    kinds = [(Floats, "double"), (Index, "int32_t"), (Mask, "uint8_t"), (Seed, "uint64_t")]
    text = ["#include <stdint.h>"]
    for kind, name, scalars in (
        (View, "Problem", _SCALARS), (Work, "Work", ()), (State, "State", _SETTINGS)
    ):  # fmt: skip
        text.append("typedef struct {")
        text += [f"    int32_t {field};" for field in scalars]
        for field, hint in get_type_hints(kind).items():
            (c_type,) = [c for array, c in kinds if array == hint]
            text.append(f"    {c_type} *{field};")
        text.append(f"}} {name};")
    return "\n".join(text)


@functools.cache
def _library() -> ctypes.CDLL:
    """Builds or loads the library. Raises PlacementError without a compiler that works."""
    compiler = c_compiler()
    if compiler is None:
        raise PlacementError("planning needs a C compiler; install gcc or clang, or set CC")
    parts = [Path(__file__).with_name(name).read_text("utf-8") for name in _SOURCES]
    source = "\n".join([_declarations(), *parts])
    digest = hashlib.sha256("\0".join([source, *compiler, *_FLAGS]).encode()).hexdigest()
    library = _loaded(
        cache_directory() / "placement" / f"engine-{digest[:32]}.so", compiler, source
    )
    double, pointer = ctypes.c_double, ctypes.c_void_p
    library.plait_simulate.argtypes = [
        pointer, pointer, pointer, pointer, pointer, ctypes.c_int, double, double, pointer,
    ]  # fmt: skip
    library.plait_bottom_levels.argtypes = [pointer] * 3
    library.plait_bottom_levels.restype = double
    library.plait_pipeline_load.argtypes = [pointer] * 3
    library.plait_pipeline_load.restype = double
    library.plait_settle.argtypes = [pointer, pointer, pointer, double, double]
    library.plait_settle.restype = double
    library.plait_anneal.argtypes = [pointer] * 3 + [ctypes.c_int] + [double] * 4
    library.plait_anneal.restype = None
    library.plait_heads.argtypes = [ctypes.c_int] + [pointer] * 10
    library.plait_heads.restype = None
    return library


def _loaded(path: Path, compiler: tuple[str, ...], source: str) -> ctypes.CDLL:
    """The library at ``path``, which is built first where there is none."""
    if os.path.exists(path):
        with contextlib.suppress(OSError):  # it is of another machine, say
            return shared_library(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _build(compiler, source, path)
        return shared_library(path)
    except OSError:  # a cache that cannot be written: build for this process alone
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="plait-") as folder:
            path = Path(folder) / path.name
            _build(compiler, source, path)
            return shared_library(path)  # the mapping outlives the name
    except OSError as error:
        raise PlacementError(
            f"there is no place to build the planner in ({error}); set TMPDIR to a folder that can"
            " be written"
        ) from error


def _build(compiler: tuple[str, ...], source: str, path: Path) -> None:
    """Compiles beside the place and renames, so that no other process loads half a library."""
    with replacing(path) as scratch:
        command = [*compiler, *_FLAGS, "-x", "c", "-", "-o", str(scratch), "-lm"]
        done = subprocess.run(
            command,
            input=source,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": str(path.parent)},
        )
        if done.returncode:
            tail = done.stderr.strip()[-500:]
            raise PlacementError(f"the C compiler failed ({shlex.join(command[:2])} ...): {tail}")
