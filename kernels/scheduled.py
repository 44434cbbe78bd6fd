"""From a scheduled definition to a kernel that follows `kernels.abi`.

A schedule ends as one loop nest whose outermost loop is parallel. That loop becomes the loop over
tasks: its variable stays and only its bounds change, so whatever the schedule made of the body
survives as it is. Schedules that need a barrier between two nests are declined.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
import tvm.tirx as tir
from tvm import s_tir
from tvm.script.ir_builder import tirx as T

from .abi import Kernel
from .definition import Definition, Physical
from .emit import ON_STACK, tvm_dtype
from .group import Unsupported
from .target import Target

_ON_STACK = {k: tir.IntImm("int32", v) for k, v in ON_STACK.items()}
_STACK_BYTES = 64 << 10  # a kernel runs on any thread's stack


def to_kernel(
    func: Any, definition: Definition, target: Target, name: str, config: dict[str, Any]
) -> Kernel:
    """The kernel of a scheduled ``definition.func``.

    Raises `Unsupported` when the schedule is not one nest, or needs more than stack memory.
    """
    loops = _lower_blocks(func.with_attr("global_symbol", name), target)
    outer, allocations = _outermost(loops.body)
    outer, used = _on_stack(outer)
    if used > _STACK_BYTES or allocations:
        raise Unsupported("PLT-SCH-003", f"{used} bytes of temporaries in a task")
    lo, hi = tir.Var("lo", "int64"), tir.Var("hi", "int64")
    body, tasks = _task_loop(outer, lo, hi)
    params, declared = [lo, hi], []
    for buffer, physical in zip(
        loops.params, (*definition.inputs, *definition.outputs), strict=True
    ):
        pointer = tir.Var(f"p{len(params)}", T.handle(tvm_dtype(physical.arg.dtype)).ty)
        params.append(pointer)
        declared.append(tir.DeclBuffer(buffer, data=_start(pointer, physical)))
    kernel = tir.PrimFunc(params, tir.SeqStmt([*declared, body]))
    attributes: dict[str, Any] = {"tirx.noalias": True, "calling_conv": 1, "s_tir": True}
    for key, value in {"global_symbol": name, **attributes}.items():
        kernel = kernel.with_attr(key, value)
    return Kernel(
        name=name,
        func=kernel,
        inputs=definition.input_args,
        outputs=tuple(p.arg for p in definition.outputs),
        symbols=(),
        tasks=tasks,
        packs=definition.packs,
        flops=definition.flops,
        bytes=definition.bytes,
        config=config,
    )


def _lower_blocks(func: Any, target: Target) -> Any:
    """Runs the passes that turn schedulable blocks into plain loops."""
    x = s_tir.transform
    passes = [
        tvm.tirx.transform.BindTarget(target.tvm()),
        x.CanonicalizeLoop(),
        x.LowerInitBlock(),
        x.PlanAndUpdateBufferAllocationLocation(),
        x.ConvertBlocksToOpaque(),
        x.CompactBufferAllocation(),
        x.LowerMatchBuffer(),
        x.LowerOpaqueBlock(),
    ]
    module = tvm.ir.transform.Sequential(passes)(tvm.IRModule({"main": func}))
    return module["main"]


def _start(pointer: Any, physical: Physical) -> Any:
    """The address of a physical buffer's first element; the ABI passes that of element 0."""
    if physical.offset == 0:
        return pointer
    return tir.handle_add_byte_offset(pointer, -physical.offset * physical.arg.dtype.itemsize)


def _outermost(body: Any) -> tuple[Any, list[Any]]:
    """The single top-level statement, and the allocations before it."""
    allocations: list[Any] = []
    while _is(body, tir.SeqStmt):
        rest = []
        for part in body.seq:
            (allocations if _is(part, tir.AllocBuffer) else rest).append(part)
        if len(rest) != 1:
            raise Unsupported("PLT-SCH-001", f"{len(rest)} loop nests need barriers")
        body = rest[0]
    return body, allocations


def _task_loop(outer: Any, lo: Any, hi: Any) -> tuple[Any, int]:
    """The outermost loop over ``[lo, hi)``; a nest that is not parallel is a single task."""
    serial = tir.ForKind.SERIAL
    if _is(outer, tir.For) and outer.kind == tir.ForKind.PARALLEL:
        if not _is(outer.extent, tir.IntImm) or int(outer.min) != 0:
            raise Unsupported("PLT-SCH-002", "the parallel loop has no constant range")
        var = outer.loop_var
        dtype = str(var.ty.dtype)
        first, count = (tir.Cast(dtype, e) if dtype != "int64" else e for e in (lo, hi - lo))
        loop = tir.For(var, first, count, serial, outer.body, None, outer.annotations)
        return loop, int(outer.extent)
    task = tir.Var("task", "int64")
    return tir.For(task, lo, hi - lo, serial, outer), 1


def _is(node: Any, kind: Any) -> bool:
    """`isinstance` for TVM's classes, of which type checkers know only a part."""
    return isinstance(node, kind)


def _on_stack(stmt: Any) -> tuple[Any, int]:
    """``stmt`` with its temporaries on the stack, and how many bytes they take at most."""
    if _is(stmt, tir.AllocBuffer):
        buffer = stmt.buffer
        sizes = [int(e) for e in buffer.shape]
        count = math.prod(sizes) * (tvm.DataType(str(buffer.dtype)).bits // 8)
        return tir.AllocBuffer(buffer, {**stmt.annotations, **_ON_STACK}), count
    if _is(stmt, tir.SeqStmt):
        parts = [_on_stack(s) for s in stmt.seq]
        return tir.SeqStmt([p for p, _ in parts]), sum(n for _, n in parts)
    if _is(stmt, tir.For):
        body, used = _on_stack(stmt.body)
        loop = tir.For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding,
            stmt.annotations,
        )  # fmt: skip
        return loop, used
    if _is(stmt, tir.IfThenElse):
        then, used = _on_stack(stmt.then_case)
        other, more = _on_stack(stmt.else_case) if stmt.else_case is not None else (None, 0)
        return tir.IfThenElse(stmt.condition, then, other), used + more
    if _is(stmt, tir.AttrStmt):
        body, used = _on_stack(stmt.body)
        return tir.AttrStmt(stmt.node, stmt.attr_key, stmt.value, body), used
    return stmt, 0
