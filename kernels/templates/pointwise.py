"""Pointwise and view operators, any number of them, as one pass over memory.

Tasks cut the iteration space into pieces of a bounded number of bytes; inside, rows of the
innermost axis run as vector code. A row that is no multiple of the vector length ends in a vector
moved back to overlap its neighbour (both write the same bits), or in single elements where the
length is known only at run time. A join that is the group's only output is written part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Dim, Kernel, TensorArg, ceil_div, product
from ..emit import Emitter, Expr, Ref, plain
from ..group import IO, Group, Unsupported, symbols_of
from ..ops import category, evaluate
from ..ops.common import cast, dims_of, i64, linear, unravel
from ..ops.scope import rehearsal, sharing
from ..target import Target
from ..value import Context, Value
from .pointwise_axes import Accesses, Axis, Probe, initial_axes, output_index
from .vectors import bits_of

_GRAIN = 32768
_ABREAST = 4
_SHORT = 64  # elements of a row that is walked together with the axis around it
_TILE = 16  # neighbours in one cache line, of which each is in a row of its own
_TILED = 256  # elements of such a row that are walked before the next one is
MOST_LOADS = 512  # joins of joins double their code each time


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """Configurations worth trying: ``grain`` is the number of bytes a task touches, ``abreast`` how
    many vectors go through the operators together.

    A chain of operators waits for each result; other vectors fill that time, as long as there are
    registers for them.
    """
    del target
    choices = [(_GRAIN, _ABREAST), (_GRAIN, 1), (8192, _ABREAST), (131072, _ABREAST)]
    if _all_wide([io[n].dtype for n in (*group.inputs, *group.outputs)]):
        # In float64 most functions are calls, one for each element, and keep nothing in registers.
        choices.sort(key=lambda choice: choice[1])
    return [{"grain": grain, "abreast": abreast} for grain, abreast in choices]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """The kernel of a group of pointwise and view nodes.

    Inputs and outputs may have any strides; only the interior of an output with a halo is written.
    Raises Unsupported for other operators, and for outputs whose element counts differ.
    """
    _check(group)
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbols_of(group, [*inputs, *outputs])
    emitter = Emitter(name, inputs, outputs, symbols)
    grain, abreast = int(config.get("grain", _GRAIN)), int(config.get("abreast", 1))
    builder = _Builder(group, outputs, target, grain, abreast)
    try:
        with emitter.function() as task:
            tasks = builder.emit(emitter, task)
    except NotImplementedError as error:
        raise Unsupported("PLT-PNT-001", str(error)) from error
    return emitter.kernel(
        tasks,
        dict(config),
        flops=product([*outputs[0].shape, _operations(group)]),
        func=builder.placed(emitter.finish()),
    )


def _check(group: Group) -> None:
    for node in group.nodes:
        if category(node) not in ("pointwise", "view", "symbolic"):
            raise Unsupported("PLT-PNT-001", f"{node.target} is not pointwise")
    if not group.outputs:
        raise Unsupported("PLT-PNT-002", "the group has no output")
    counts = [product(dims_of(n)) for n in group.outputs]
    if any(sympy.expand(c - counts[0]) != 0 for c in counts[1:]):
        raise Unsupported(
            "PLT-PNT-002",
            "outputs of different sizes in one group",
            "give each size a group of its own",
        )


def _operations(group: Group) -> int:
    return sum(category(n) == "pointwise" for n in group.nodes)


class _Output:
    """Where an output is stored."""

    def __init__(self, ref: Ref, simplify: Callable[[Expr], Expr]) -> None:
        self.ref, self._bits, self._simplify = ref, bits_of(ref), simplify

    def store(self, value: Expr, index: Sequence[Expr]) -> None:
        offset = self._simplify(self.ref.offset(index))
        if self._bits is None:
            self.ref.store_flat(value, offset)
        else:
            T.buffer_store(self._bits, tir.reinterpret("uint16", value), [offset])


@dataclass(frozen=True)
class _Region:
    """Elements computed alike: where they go, and what they are.

    ``arg`` describes the memory of the first output's part; ``stores`` pairs each output with the
    function that gives its value and the index to store it at.
    """

    arg: TensorArg
    stores: tuple[tuple[_Output, Callable[[Sequence[Expr]], tuple[Expr, list[Expr]]]], ...]


@dataclass
class _Builder:
    """Emits the body of one kernel.

    Elements are written for variables that stand for a region's axes: with these, and their ranges,
    TVM can tell that an offset such as ``i // 7 * 7 + i % 7`` is ``i``. What they stand for is put
    in their places at last.
    """

    group: Group
    outputs: tuple[TensorArg, ...]
    target: Target
    grain: int
    abreast: int
    places: dict[Expr, Expr] = field(default_factory=dict)
    loads: list[Expr] = field(default_factory=list)  # offsets, of the element looked at last
    simplify: Callable[[Expr], Expr] = lambda offset: offset

    def placed(self, func: Any) -> Any:
        """The function with loop indices in place of the axes' variables."""
        if not self.places:
            return func
        # As parameters that are then given, which is TVM's way to replace variables in a function.
        params = [*self.places, *func.params]
        open_func = tir.PrimFunc(params, func.body, func.ret_type, attrs=func.attrs)
        return open_func.specialize(self.places)

    def _simplified(self, offset: Expr) -> Expr:
        return self.simplify(offset)

    def emit(self, emitter: Emitter, task: Expr) -> Dim:
        """Emits the body of a task and returns the number of tasks."""
        refs = zip(self.group.inputs, emitter.inputs, strict=True)
        env: dict[fx.Node, Value] = {
            n: _recording(r, self.loads, self._simplified) for n, r in refs
        }
        evaluate(self.group.nodes, Context(emitter, env))
        first: Dim = 0
        regions = self._regions(emitter, env)
        for region in regions:
            if 0 in region.arg.shape:
                count, body = 0, _nothing
            else:
                probe, axes = self._plan(emitter, region)
                count, body = self._loops(emitter, region, probe, axes)
            if len(regions) == 1:
                body(task)
                return count
            low, high = emitter.dim(first), emitter.dim(first + count)
            with T.If(tir.And(task >= low, task < high)), T.Then():
                body(task - low)
            first = first + count
        return first

    def _regions(self, emitter: Emitter, env: dict[fx.Node, Value]) -> list[_Region]:
        node = self.group.outputs[0]
        if len(self.group.outputs) == 1 and str(node.target) in (
            "aten.cat.default",
            "aten.concat.default",
        ):
            return self._parts(emitter, env, node)
        shape = emitter.outputs[0].shape
        stores = []
        for other, ref in zip(self.group.outputs, emitter.outputs, strict=True):
            value, same = env[other], dims_of(other) == dims_of(node)

            def store(index: Sequence[Expr], value=value, ref=ref, same=same):
                own = list(index) if same else unravel(linear(index, shape), ref.shape)
                return value.load(own), own

            stores.append((_Output(ref, self._simplified), store))
        return [_Region(self.outputs[0], tuple(stores))]

    def _parts(self, emitter: Emitter, env: dict[fx.Node, Value], node: fx.Node) -> list[_Region]:
        """One region for each tensor that an output joins."""
        out, output = self.outputs[0], _Output(emitter.outputs[0], self._simplified)
        tensors: Any = node.args[0]
        rank = len(out.shape)
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = dim % rank
        regions, start = [], 0
        for tensor in tensors:
            dims = dims_of(tensor)
            if len(dims) != rank:
                continue  # torch lets an empty 1-d tensor join with any shape
            value = cast(env[tensor], out.dtype)
            arg = TensorArg(out.dtype, dims, out.strides)

            at = emitter.dim(start)

            def store(index: Sequence[Expr], value=value, at=at):
                own = list(index)
                own[dim] = own[dim] + at
                return value.load(index), own

            regions.append(_Region(arg, ((output, store),)))
            start = start + dims[dim]
        return regions

    def _plan(self, emitter: Emitter, region: _Region) -> tuple[Probe, list[Axis]]:
        """The axes of a region and what is known of accesses along them."""
        rank = len(region.arg.shape)

        def accesses(index: Sequence[Expr]) -> Accesses:
            full = [*index, *[i64(0)] * (rank - len(index))]
            self.loads.clear()
            with rehearsal() as (conditions, bound):
                for output, store in region.stores:
                    _, own = store(full)
                    self.loads.append(output.ref.offset(own))
            return Accesses(list(self.loads), conditions, [value for _, value in bound])

        probe = Probe(emitter, accesses)
        axes = probe.merged(initial_axes(self.group, region.arg))
        return probe, axes or [Axis(1, ())]

    def _loops(
        self, emitter: Emitter, region: _Region, probe: Probe, axes: list[Axis]
    ) -> tuple[Dim, Callable[[Expr], None]]:
        """The number of tasks of a region and the function that emits one."""
        tiled = probe.tiled(axes, _TILE) if len(axes) > 1 else None
        *outer, inner = axes = tiled or axes
        short = inner.extent if outer and _is_short(inner.extent) else 0
        if short:  # finding a row's place would take longer than the row
            *outer, inner = outer
        elif tiled:
            outer.pop()
        rows, length = product([a.extent for a in outer]), inner.extent
        lanes = 1 if probe.lanes_differ(axes) else self._lanes()
        touched = sum(a.dtype.itemsize for a in self.outputs) + sum(
            n.meta["val"].dtype.itemsize for n in self.group.inputs
        )
        chunk = max(lanes, self.grain // touched // lanes * lanes)
        if short:
            chunk = max(1, chunk // short)
        elif tiled:
            chunk = min(chunk, _TILED)
        multiple = 1 if short else lanes
        rank = len(region.arg.shape)

        def element(row: Sequence[Expr], column: Expr) -> None:
            variables = probe.variables(axes)
            self.places |= zip(variables, [*row, column], strict=True)
            self.simplify = probe.simplify
            index = output_index(axes, variables, emitter)
            full = [*index, *[i64(0)] * (rank - len(index))]
            self.loads.clear()
            with sharing(same=variables[:-1]):
                for output, store in region.stores:
                    value, own = store(full)
                    output.store(plain(value), own)

        def run(row: Expr, start: Expr, size: Any) -> None:
            place = [T.bind(i) for i in unravel(row, [emitter.dim(a.extent) for a in outer])]
            if short:
                with _serial(start, size) as middle:
                    for column in _columns(i64(0), short, lanes, self.abreast):
                        with column as c:
                            element([*place, middle], c)
                return
            with _serial(i64(0), _TILE) if tiled else nullcontext() as middle:
                around = [middle] if tiled else []
                for column in _columns(start, size, lanes, self.abreast):
                    with column as c:
                        element([*place, *around], c)

        if isinstance(length, int) and length <= chunk:
            block = max(1, chunk // length)
            if isinstance(rows, int):
                block = _even(rows, block, 1)

            def rows_body(task: Expr) -> None:
                first = task * i64(block)
                last = tir.min(first + i64(block), emitter.dim(rows))
                if rows == 1:
                    run(i64(0), i64(0), length)
                else:
                    with T.serial(first, last) as row:
                        run(row, i64(0), length)

            return ceil_div(rows, block), rows_body
        if isinstance(length, int):
            chunk = _even(length, chunk, multiple)
        pieces = ceil_div(length, chunk)

        def piece_body(task: Expr) -> None:
            count = emitter.dim(pieces)
            row = tir.floordiv(task, count) if outer else i64(0)
            start = T.bind((tir.floormod(task, count) if outer else task) * i64(chunk))
            if isinstance(length, int):
                run(row, tir.min(start, i64(length - chunk)), chunk)
            else:
                run(row, start, T.bind(tir.min(i64(chunk), emitter.dim(length) - start)))

        return product([rows, pieces]), piece_body

    def _lanes(self) -> int:
        """Vector length: as wide as the widest element type that is common here."""
        dtypes = [a.dtype for a in self.outputs] + [n.meta["val"].dtype for n in self.group.inputs]
        return max(1, self.target.vector_bytes // (8 if _all_wide(dtypes) else 4))


def _is_short(length: Dim) -> bool:
    return isinstance(length, int) and length <= _SHORT


def _nothing(task: Expr) -> None:
    T.evaluate(0)


def _all_wide(dtypes: Sequence[torch.dtype]) -> bool:
    return all(d.itemsize == 8 for d in dtypes)


def _recording(ref: Ref, offsets: list[Expr], simplify: Callable[[Expr], Expr]) -> Value:
    """The value of an input that also notes the offset of each load."""
    bits = bits_of(ref)

    def load(index: Sequence[Expr]) -> Expr:
        offset = simplify(ref.offset(index))
        offsets.append(offset)
        if len(offsets) > MOST_LOADS:
            raise Unsupported(
                "PLT-PNT-003",
                f"a chain of joins reads its inputs more than {MOST_LOADS} times per element",
                "write the tensor between two joins to memory, for example by returning it",
            )
        if bits is not None:
            return tir.reinterpret("bfloat16", bits[offset])
        return plain(ref.load_flat(offset))

    return Value(tuple(ref.shape), ref.arg.dtype, load, ref.arg.strides)


def _even(total: int, chunk: int, multiple: int) -> int:
    """A chunk no larger than ``chunk`` that cuts ``total`` into nearly equal pieces."""
    pieces = -(-total // chunk)
    each = -(-total // pieces)
    return min(-(-each // multiple) * multiple, total)


def _columns(start: Expr, size: Any, lanes: int, abreast: int) -> Iterator[Any]:
    """Loops that together visit ``size`` columns from ``start``; each yields the column."""
    wide = lanes * abreast
    if isinstance(size, int):
        done = size // wide * wide if lanes > 1 and abreast > 1 else 0
        if done:
            yield _vectors(start, done, wide)
        rest = size - done
        if rest and lanes == 1:
            yield _constant(start) if size == 1 else _serial(start, size)
        elif rest and size < lanes:
            yield _constant(start) if size == 1 else _vector(start, size)
        elif rest:
            yield _vectors(start, size, lanes, done)
        return
    done: Any = i64(0)
    for width in dict.fromkeys((wide, lanes)) if lanes > 1 else ():
        yield _vectors(start + done, size - done, width)
        done = tir.floordiv(size, i64(width)) * i64(width)
    yield _serial(start + done, size - done)


@contextmanager
def _constant(start: Expr) -> Iterator[Expr]:
    yield start


@contextmanager
def _serial(start: Expr, size: Any) -> Iterator[Expr]:
    with T.serial(i64(0), i64(size) if isinstance(size, int) else size) as i:
        yield start + i


@contextmanager
def _vector(start: Expr, lanes: int) -> Iterator[Expr]:
    with T.vectorized(i64(0), i64(lanes)) as j:
        yield start + j


@contextmanager
def _vectors(start: Expr, size: Any, lanes: int, done: int = 0) -> Iterator[Expr]:
    """Whole vectors of what is not ``done``; for a known size that is no multiple, the last one
    overlaps.
    """
    known = isinstance(size, int)
    count = i64(-(-(size - done) // lanes)) if known else tir.floordiv(size, i64(lanes))
    with T.serial(i64(0), count) as v:
        first = v * i64(lanes) + i64(done)
        if known and (size - done) % lanes:
            first = tir.min(first, i64(size - lanes))
        with T.vectorized(i64(0), i64(lanes)) as j:
            yield start + first + j
