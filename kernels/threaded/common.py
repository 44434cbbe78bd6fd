"""What the functions written thread by thread share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import TensorArg
from ..definition import THREADS, Definition, Physical, Writer
from ..emit import Expr
from ..group import IO, Group
from ..math import i32
from ..target import Target

LANES = 4
"""Elements of a vector that is read at once: 16 bytes of float32."""
WARP = 32


def wide(value: Expr) -> Expr:
    """An index of a tensor."""
    return value if str(value.ty.dtype) == "int64" else tir.Cast("int64", value)


def narrow(value: Expr) -> Expr:
    """A number that is known to fit."""
    return value if str(value.ty.dtype) == "int32" else tir.Cast("int32", value)


def div(a: Expr, b: int) -> Expr:
    """The quotient of a number that is not negative."""
    return tir.truncdiv(a, tir.IntImm(str(a.ty.dtype), b))


def mod(a: Expr, b: int) -> Expr:
    """The remainder of a number that is not negative."""
    return tir.truncmod(a, tir.IntImm(str(a.ty.dtype), b))


def shared(size: int, dtype: str = "float32") -> Any:
    """An array of the block."""
    return T.alloc_buffer((size,), dtype, scope="shared")


def local(size: int, dtype: str = "float32") -> Any:
    """An array of the thread, in registers where every index is a constant."""
    return T.alloc_buffer((size,), dtype, scope="local")


def barrier() -> None:
    """Waits for all threads of the block, whose stores to `shared` arrays are seen from here."""
    T.evaluate(T.tvm_storage_sync("shared"))


def unrolled(extent: int) -> Any:
    """A loop that is written out."""
    return T.unroll(i32(extent))


@contextlib.contextmanager
def launch(blocks: int) -> Iterator[tuple[Expr, Expr]]:
    """What ``blocks`` blocks of `THREADS` do; yields the numbers of block and thread (int32)."""
    with (
        T.launch_thread("blockIdx.x", i32(blocks)) as block,
        T.launch_thread("threadIdx.x", i32(THREADS)) as thread,
    ):
        yield block, thread


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    """What is done only where ``condition`` holds; no barrier may be inside."""
    with T.If(condition), T.Then():
        yield


@contextlib.contextmanager
def shared_out(count: int, thread: Expr) -> Iterator[Expr]:
    """Each number below ``count`` for one thread of the block."""
    with T.serial(i32(0), i32(-(-count // THREADS))) as turn:
        number = turn * THREADS + thread
        if count % THREADS:
            with when(number < count):
                yield number
        else:
            yield number


def has_vectors(physical: Physical, dim: int) -> bool:
    """Whether every `LANES` elements from a multiple on along a dimension are an aligned vector.

    That is, where the tensor begins at one.
    """
    size = physical.arg.shape[dim]
    return (
        physical.arg.dtype.itemsize == 4
        and physical.dims[-1] == dim
        and physical.shape[-1] % LANES == 0
        and isinstance(size, int)
        and size % LANES == 0
        and not any(physical.before)
    )


def write(
    group: Group,
    io: IO,
    target: Target,
    body: Callable[[Writer, bool], None],
    flops: int,
    nbytes: int | None = None,
) -> Definition:
    """The definition of two functions ``body(writer, vectors)``, with vectors and without."""
    made = [
        Writer(group, io, {}, target).write(lambda w, v=v: body(w, v), flops) for v in (True, False)
    ]
    bound = tuple(d.func for d in made)
    return replace(made[1], bound=bound, bytes=made[1].bytes if nbytes is None else nbytes)


def bytes_of(arg: TensorArg) -> int:
    """The bytes of a tensor's elements."""
    size = arg.dtype.itemsize
    for extent in arg.shape:
        assert isinstance(extent, int)
        size *= extent
    return size
