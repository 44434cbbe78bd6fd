"""Calls as groups for the rows, reduce and attention templates, and their comparison with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.testing._internal.common_methods_invocations import op_db

from plait.kernels.abi import Kernel, TensorArg, contiguous_strides
from plait.kernels.group import IO, Group
from plait.kernels.ops import category
from plait.kernels.ops.common import dim_of
from plait.kernels.target import host

from .harness import Batch
from .traced import group_for, outputs_of, tensor_arg, trace

Function = Callable[..., Any]


@dataclass
class Case:
    """A lowered call: how to run it, and what torch says (None: only that it compiles)."""

    kernel: Kernel
    tensors: list[torch.Tensor]
    expected: list[torch.Tensor]
    symbols: dict[str, int]


def results_of(function: Function, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors a call returns."""
    result = function(*tensors)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def exported(
    function: Function, tensors: Sequence[torch.Tensor], dynamic: Sequence[Any]
) -> tuple[Group, IO]:
    """The group of a whole call with symbolic sizes; ``dynamic`` is as in torch.export."""

    class Module(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    program = torch.export.export(
        Module(), tuple(tensors), dynamic_shapes=(tuple(dynamic),), strict=False
    )
    graph = program.graph
    (output,) = graph.find_nodes(op="output")
    outputs = [a for a in output.args[0] if isinstance(a, fx.Node)]
    inputs = tuple(graph.find_nodes(op="placeholder"))
    nodes = tuple(n for n in graph.nodes if n.op == "call_function" and category(n) != "symbolic")
    io: dict[fx.Node, TensorArg] = {}
    for node in (*inputs, *outputs):
        value = node.meta["val"]
        shape = tuple(dim_of(s) for s in value.shape)
        strides = tuple(dim_of(s) for s in value.stride())
        io[node] = TensorArg(
            value.dtype, shape, strides if node in inputs else contiguous_strides(shape)
        )
    return Group("rows", nodes, inputs, tuple(outputs)), io


def traced(function: Function, tensors: Sequence[torch.Tensor]) -> tuple[Group, IO]:
    """The group of a whole call with static sizes; outputs are contiguous."""
    module = trace(function, tensors)
    outputs = outputs_of(module)
    group = group_for(outputs)
    given = dict(zip(module.graph.find_nodes(op="placeholder"), tensors, strict=True))
    io = {n: tensor_arg(given[n]) for n in group.inputs}
    for node in outputs:
        value = node.meta["val"]
        shape = tuple(value.shape)
        io[node] = TensorArg(value.dtype, shape, contiguous_strides(shape))
    return group, io


def case(
    template: Any,
    name: str,
    function: Function,
    *tensors: torch.Tensor,
    config: dict[str, Any] | None = None,
    dynamic: Sequence[Any] | None = None,
    run: Sequence[torch.Tensor] | None = None,
) -> Case:
    """Lowers a call of ``function``; it will be run on ``run`` (the same tensors by default)."""
    group, io = exported(function, tensors, dynamic) if dynamic else traced(function, tensors)
    config = {**template.candidates(group, io, host())[0], **(config or {})}
    kernel = template.lower(group, io, host(), config, name)
    given = list(run if run is not None else tensors)
    symbols: dict[str, int] = {}
    for node, tensor in zip(group.inputs, given, strict=False):
        for size, actual in zip(io[node].shape, tensor.shape, strict=True):
            if not isinstance(size, int) and size.is_Symbol:
                symbols[size.name] = actual
    used = set(group.inputs)
    held = given if len(group.inputs) == len(given) else _held(function, tensors, given, used)
    expected = results_of(function, [t.clone() for t in given])
    return Case(kernel, held, expected, symbols)


def _held(function: Function, tensors: Any, given: list[torch.Tensor], used: Any) -> Any:
    module = trace(function, tensors)
    names = {n.name for n in used}
    placeholders = module.graph.find_nodes(op="placeholder")
    return [t for n, t in zip(placeholders, given, strict=True) if n.name in names]


def check(cases: Sequence[Case], **tolerances: Any) -> None:
    """Compiles kernels together, runs each in three ranges of tasks, and compares with torch."""
    assert cases
    batch = Batch([c.kernel for c in cases])
    for c in cases:
        got = batch.run(c.kernel.name, c.tensors, c.symbols)
        for have, want in zip(got, c.expected, strict=True):
            torch.testing.assert_close(
                have,
                want,
                equal_nan=True,
                check_stride=False,
                msg=lambda m, c=c: f"{c.kernel.name}: {m}",
                **tolerances,
            )


def errors(c: Case, function: Function) -> tuple[float, float]:
    """(largest error of the kernel, largest error of torch) against float64."""
    batch = Batch([c.kernel])
    (got,) = batch.run(c.kernel.name, c.tensors, c.symbols)
    wide = [t.double() if t.is_floating_point() else t for t in c.tensors]
    (exact,) = results_of(function, wide)
    mine, theirs = (r.double() - exact for r in (got, c.expected[0]))
    return mine.abs().max().item(), theirs.abs().max().item()


def opinfos(*names: str) -> list[Any]:
    """torch's descriptions of operators, with sample inputs."""
    found = [op for op in op_db if op.name in names]
    assert {op.name for op in found} == set(names)
    return found
