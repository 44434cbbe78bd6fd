"""Horizontal fusion for GPUs: independent kernels in one launch, side by side by block ranges.

The fused function's blocks are those of its parts, one part after the other: part ``i`` owns a
range of ``blockIdx.x`` and runs its own body there, with its block indices computed anew from the
place within the range (grids of two or three dimensions are flattened). Parts join as lowered
TIR, after TVM has placed the barriers and the reductions of each: nothing inside a part changes
but where its indices and its shared memory come from.

Why that is right:

- The condition of a branch depends on ``blockIdx.x`` alone, so all threads of a block take the
  same branch, and a barrier of the block (``__syncthreads``, a warp's shuffle) inside it is
  reached by just the threads that it counts.
- A block runs one part, so the parts' shared memory may lie in the same place: the function
  declares the largest need instead of the sum.
- Threads keep the number that CUDA gives them (x runs fastest), so warps are made of the same
  threads as before. For that all parts must have equally many.
- Blocks of one launch run in any order. That no part writes what another one touches is checked.

Blocks are started in the order of their index on the GPUs known today, though CUDA promises
nothing: parts with the longest blocks come first, so that none of them starts last.

Li et al., "Automatic Horizontal Fusion for GPU Kernels", CGO 2022; Ma et al., "Rammer: Enabling
Holistic Deep Learning Compiler Optimizations with rTasks", OSDI 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm.tirx as tir
import tvm_ffi
from tvm import s_tir

from .abi import TensorArg
from .cuda import DeviceKernel, Usage
from .cuda_loader import GpuKernel, Launch
from .definition import Definition
from .group import Unsupported
from .occupancy import SM90, Candidate, Gpu
from .regions import Place, disjoint, region_of
from .shared_memory import SharedMemory

_MAX_GRID = (1 << 31) - 1
_MAX_POINTERS = 32764 // 8  # parameters of a kernel, in bytes, since compute capability 7.0
_AXES = ("x", "y", "z")
_GRID_WIDE = ("cluster", "grid_sync", "global_barrier", "cooperative")


@dataclass(frozen=True)
class Part:
    """A kernel to be fused.

    ``inputs`` and ``outputs`` are its tensors and ``places`` where those lie, inputs first;
    ``seconds`` is what it takes alone, measured or estimated.
    """

    device: DeviceKernel
    inputs: tuple[TensorArg, ...]
    outputs: tuple[TensorArg, ...]
    places: tuple[Place, ...]
    seconds: float

    def __post_init__(self) -> None:
        tensors = len(self.inputs) + len(self.outputs)
        if not tensors == len(self.places) == len(self.device.kernel.offsets):
            raise ValueError(
                f"{self.device.kernel.name} has {len(self.device.kernel.offsets)} tensors, but"
                f" {tensors} descriptions and {len(self.places)} places were given"
            )

    @staticmethod
    def of(
        device: DeviceKernel,
        definition: Definition,
        places: Sequence[Place],
        seconds: float | None = None,
        gpu: Gpu = SM90,
    ) -> Part:
        """The part of a definition; where its time is not known, that of the roofline."""
        outputs = tuple(p.arg for p in definition.outputs)
        if seconds is None:
            seconds = gpu.seconds(definition.flops, definition.bytes)
        return Part(device, definition.input_args, outputs, tuple(places), seconds)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.device.kernel.name


def fuse(name: str, parts: Sequence[Part], gpu: Gpu = SM90) -> DeviceKernel:
    """One kernel that does what all ``parts`` do, none of which needs another's result.

    It takes the parts' tensors one part after the other, then their temporaries. Parts of several
    launches go in step: the first launches of all of them become one, then the second ones.

    Raises `Unsupported` with a PLT-HFU ID where the parts may not share a launch, ValueError for
    fewer than two parts.
    """
    if len(parts) < 2:
        raise ValueError(f"{name} needs at least two kernels to fuse, got {len(parts)}")
    _check_memory(parts)
    tensors = sum(len(p.places) for p in parts)
    launches: list[Launch] = []
    functions: dict[Any, Any] = {}
    for step in range(max(len(p.device.kernel.launches) for p in parts)):
        pieces: list[_Piece] = []
        first, temporary = 0, tensors
        for part in parts:
            kernel = part.device.kernel
            if step < len(kernel.launches):
                pieces.append(_piece(part, step, first, temporary))
            first += len(kernel.offsets)
            temporary += len(kernel.temporaries)
        label = f"{name}_kernel" + (f"_{step}" if step else "")
        launch, function = _merge(label, pieces, gpu)
        launches.append(launch)
        functions[tvm.ir.GlobalVar(label)] = function
    offsets = tuple(o for p in parts for o in p.device.kernel.offsets)
    temporaries = tuple(t for p in parts for t in p.device.kernel.temporaries)
    return DeviceKernel(GpuKernel(name, tuple(launches), offsets, temporaries), functions)


def candidate(device: DeviceKernel, usage: Mapping[str, Usage], seconds: float) -> Candidate:
    """A compiled kernel that takes ``seconds`` alone, as the occupancy model sees it: by its launch
    with the most threads. ``usage`` is by device function (`CudaBundle.usage`).
    """
    launch = max(device.kernel.launches, key=lambda k: math.prod((*k.grid, *k.block)))
    used = usage[launch.function]
    return Candidate(
        math.prod(launch.grid),
        math.prod(launch.block),
        used.registers,
        used.shared_bytes + launch.shared_bytes,
        seconds,
    )


# -- memory -----------------------------------------------------------------------------------


def _check_memory(parts: Sequence[Part]) -> None:
    regions = [
        [
            (region_of(arg, place), i >= len(part.inputs))
            for i, (arg, place) in enumerate(
                zip((*part.inputs, *part.outputs), part.places, strict=True)
            )
        ]
        for part in parts
    ]
    for i, mine in enumerate(regions):
        for j in range(i):
            for a, a_written in mine:
                for b, b_written in regions[j]:
                    if (a_written or b_written) and not disjoint(a, b):
                        raise Unsupported(
                            "PLT-HFU-002",
                            f"{parts[j].name} and {parts[i].name} share {a.storage!r}, which one"
                            " of them writes, and blocks of one launch run in any order",
                            "launch them one after the other, or give the results memory apart",
                        )


# -- one launch -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """One launch of a part.

    ``function`` shares no definition with any other; it takes the launch's pointers and then its
    own thread and block indices, whose axes are ``tags``. ``cost`` is what a block takes.
    """

    name: str
    function: Any
    tags: tuple[str, ...]
    launch: Launch
    cost: float

    @property
    def blocks(self) -> int:
        return math.prod(self.launch.grid)

    @property
    def threads(self) -> int:
        return math.prod(self.launch.block)

    @property
    def pointers(self) -> list[Any]:
        return list(self.function.params)[: len(self.function.params) - len(self.tags)]

    @property
    def indices(self) -> list[tuple[Any, str]]:
        """The variables of the thread and block indices, each with its axis."""
        variables = list(self.function.params)[len(self.function.params) - len(self.tags) :]
        return list(zip(variables, self.tags, strict=True))


def _piece(part: Part, step: int, first: int, temporary: int) -> _Piece:
    """A part's launch with its buffers numbered as in the fused kernel."""
    kernel = part.device.kernel
    launch = kernel.launches[step]
    function = part.device.function(launch)
    _check_decided(part.name, function, launch)
    _check_grid_wide(part.name, function)
    axes: list[tuple[Any, str]] = []
    for var, tag, _ in _thread_extents(function):
        if not any(var.same_as(known) for known, _ in axes):
            axes.append((var, tag))

    def unbound(stmt: Any, mutator: Any) -> Any:
        if stmt.attr_key == "thread_extent":
            return mutator.mutate(stmt.body)
        return mutator.default_mutate(stmt)

    # As parameters the indices are definitions, of which every piece has to have its own.
    body = tvm_ffi.structural_mutate(function.body, ((tir.AttrStmt, unbound),))
    opened = tir.PrimFunc([*function.params, *(v for v, _ in axes)], body)
    for key, value in function.attrs.items():
        opened = opened.with_attr(key, value)
    tensors = len(kernel.offsets)
    buffers = tuple(b + first if b < tensors else b - tensors + temporary for b in launch.buffers)
    # What a launch takes of its kernel's time is not known; its share of threads stands for it.
    everything = sum(math.prod((*k.grid, *k.block)) for k in kernel.launches)
    cost = part.seconds * math.prod(launch.block) / everything
    tags = tuple(tag for _, tag in axes)
    launch = replace(launch, buffers=buffers)
    return _Piece(part.name, s_tir.renew_defs(opened), tags, launch, cost)


def _merge(name: str, pieces: Sequence[_Piece], gpu: Gpu) -> tuple[Launch, Any]:
    _check_threads(pieces)
    pieces = sorted(pieces, key=lambda p: -p.cost)
    total, pointers = sum(p.blocks for p in pieces), sum(len(p.launch.buffers) for p in pieces)
    if total > _MAX_GRID or pointers > _MAX_POINTERS:
        raise Unsupported(
            "PLT-HFU-006",
            f"one launch would have {total} blocks and {pointers} tensors, of at most {_MAX_GRID}"
            f" and {_MAX_POINTERS}",
            "fuse fewer kernels at a time",
        )
    blocks = {p.launch.block for p in pieces}
    block = blocks.pop() if len(blocks) == 1 else (pieces[0].threads, 1, 1)
    index = _thread_index("blockIdx.x")
    threads = {f"threadIdx.{a}": _thread_index(f"threadIdx.{a}") for a in _AXES}
    used = [t for t, n in zip(threads, block, strict=True) if n > 1 or t == "threadIdx.x"]
    memory = SharedMemory([p.function for p in pieces])
    dynamic = max(p.launch.shared_bytes for p in pieces)
    memory.check(dynamic, gpu)
    branches, start = [], 0
    for piece in pieces:
        indices = _block_indices(piece, index.var - start)
        indices |= _thread_indices(piece, block, {t: v.var for t, v in threads.items()})
        branches.append((start + piece.blocks, _branch(piece, indices, memory)))
        start += piece.blocks
    body = branches.pop()[1]
    for stop, branch in reversed(branches):
        body = tir.IfThenElse(index.var < stop, branch, body)
    if allocations := memory.allocations():
        body = tir.SeqStmt([*allocations, body])
    for tag, extent in reversed(list(zip(threads, block, strict=True))):
        if tag in used:
            body = tir.AttrStmt(threads[tag], "thread_extent", _int(extent), body)
    body = tir.AttrStmt(index, "thread_extent", _int(total), body)
    parameters = [v for p in pieces for v in p.pointers]
    function = tir.PrimFunc(parameters, body)
    attributes: dict[str, Any] = dict(pieces[0].function.attrs.items())
    attributes["global_symbol"] = name
    extra = ["tirx.use_dyn_shared_memory"] if dynamic else []
    attributes["tirx.kernel_launch_params"] = ["blockIdx.x", *used, *extra]
    for key, value in attributes.items():
        function = function.with_attr(key, value)
    buffers = tuple(b for p in pieces for b in p.launch.buffers)
    return Launch(name, (total, 1, 1), block, dynamic, buffers), function


def _check_threads(pieces: Sequence[_Piece]) -> None:
    """An axis that a kernel does not mention has extent 1, which `Launch` says outright."""
    if len({p.threads for p in pieces}) > 1:
        counts = ", ".join(f"{p.name} {'x'.join(map(str, p.launch.block))}" for p in pieces)
        raise Unsupported(
            "PLT-HFU-001",
            f"blocks of one launch have one number of threads, but these differ: {counts}",
            "choose variants with equal thread counts (occupancy.choose), or launch them apart",
        )


def _check_decided(name: str, function: Any, launch: Launch) -> None:
    """Refuses launches whose extents are not constants, or that take more than pointers."""
    undecided = [t for _, t, value in _thread_extents(function) if not _is(value, tir.IntImm)]
    if undecided or len(function.params) != len(launch.buffers):
        raise Unsupported(
            "PLT-HFU-003",
            f"{name} has a size known only at run time" + "".join(f" ({t})" for t in undecided),
            "compile the kernels for the sizes at hand",
        )


def _check_grid_wide(name: str, function: Any) -> None:
    """Refuses what counts, groups or meets the blocks of a whole launch."""
    found: list[str] = []
    for parameter in function.attrs.get("tirx.kernel_launch_params", ()):
        if not str(parameter).startswith(("blockIdx.", "threadIdx.", "tirx.use_dyn_shared")):
            found.append(str(parameter))

    def call(value: Any) -> None:
        operator = str(getattr(value.op, "name", ""))
        texts = [str(a.value) for a in value.args if _is(a, tvm.ir.StringImm)]
        if any(word in text for word in _GRID_WIDE for text in (operator, *texts)):
            found.append(" ".join([operator, *texts]))
        elif operator == "tirx.tvm_storage_sync" and "global" in texts:
            found.append("a barrier of all blocks")

    tvm_ffi.structural_walk(function.body, (tvm.ir.Call, call))
    if found:
        raise Unsupported(
            "PLT-HFU-004",
            f"{name} makes its blocks work together ({found[0]}), and in a fused launch there are"
            " others among them",
            "launch it by itself",
        )


# -- one branch -------------------------------------------------------------------------------


def _thread_extents(function: Any) -> list[tuple[Any, str, Any]]:
    """Variable, tag and extent of every thread axis that a function binds."""
    found: list[tuple[Any, str, Any]] = []

    def visit(stmt: Any) -> None:
        if stmt.attr_key == "thread_extent":
            found.append((stmt.node.var, str(stmt.node.thread_tag), stmt.value))

    tvm_ffi.structural_walk(function.body, (tir.AttrStmt, visit), order="pre")
    return found


def _branch(piece: _Piece, indices: dict[str, Any], memory: SharedMemory) -> Any:
    """A part's body under its own indices, with its shared memory in the common place."""
    bound: list[Any] = []
    for var, tag in piece.indices:
        dtype = str(var.ty.dtype)
        value = indices[tag]
        bound.append(tir.Bind(var, value if dtype == "int32" else tir.Cast(dtype, value)))

    def allocation(stmt: Any, _: Any) -> Any:
        return memory.place(stmt)

    body = tvm_ffi.structural_mutate(piece.function.body, ((tir.AllocBuffer, allocation),))
    return tir.SeqStmt([*bound, body])


def _block_indices(piece: _Piece, place: Any) -> dict[str, Any]:
    """The block indices of a part from a block's place in its range."""
    return _unflatten("blockIdx", place, piece.launch.grid)


def _thread_indices(
    piece: _Piece, block: tuple[int, ...], threads: dict[str, Any]
) -> dict[str, Any]:
    """The thread indices of a part: the launch's own, or computed where blocks have other forms."""
    if piece.launch.block == block:
        return {
            t: v if n > 1 else _int(0) for (t, v), n in zip(threads.items(), block, strict=True)
        }
    return _unflatten("threadIdx", threads["threadIdx.x"], piece.launch.block)


def _unflatten(kind: str, place: Any, extents: Sequence[int]) -> dict[str, Any]:
    """The indices of a place among ``extents``, of which the first runs fastest."""
    indices: dict[str, Any] = {}
    wide = [a for a, n in zip(_AXES, extents, strict=True) if n > 1]
    for axis, extent in zip(_AXES, extents, strict=True):
        if extent == 1:
            indices[f"{kind}.{axis}"] = _int(0)
        elif axis == wide[-1]:
            indices[f"{kind}.{axis}"] = place
        else:
            indices[f"{kind}.{axis}"] = tir.truncmod(place, _int(extent))
            place = tir.truncdiv(place, _int(extent))
    return indices


def _thread_index(tag: str) -> Any:
    var = tir.Var(tag.replace(".", "_"), "int32")
    return tir.IterVar(None, var, tir.IterVar.ThreadIndex, tag)


def _int(value: int) -> Any:
    return tir.IntImm("int32", value)


def _is(node: Any, kind: Any) -> bool:
    """`isinstance` for TVM's classes, of which type checkers know only a part."""
    return isinstance(node, kind)
