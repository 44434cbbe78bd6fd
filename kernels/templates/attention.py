"""Scaled dot product attention on CPUs, in one pass over keys and values.

Covers torch's semantics of masks (bool or float, broadcast), ``is_causal``, ``scale``, grouped
heads
and queries that see no key (zeros). Scores and sums are float32 for every operand type. Strides are
free; operands whose heads are not contiguous float32 are copied block by block. See
`attention_block` for many queries and `attention_line` for few.
"""

from __future__ import annotations

from typing import Any

import torch
from tvm.script.ir_builder import tirx as T

from ..abi import Dim, Kernel, ceil_div, product
from ..emit import Emitter, Expr
from ..group import IO, Group, Unsupported, symbols_of
from ..ops import evaluate
from ..ops.common import convert_expr, dims_of, dtype_of
from ..target import Target
from ..value import Context, Value
from .attention_block import Block
from .attention_line import Line
from .attention_spec import AttentionSpec, Mask, Operand, parse, result_nodes

FEW = 6  # up to so many queries are handled one by one
# Time of a register tile with so many vectors of queries, relative to that of four.
_TILE_COST = {4: 1.0, 3: 1.02, 2: 1.06, 1: 1.25}
_TILE_KEYS = {4: 4, 3: 8, 2: 8, 1: 16}


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """Configurations, best guess first: ``kind`` "line" or "block" with its tile sizes.

    Raises `Unsupported` for a group that `lower` would decline.
    """
    spec = parse(group, io)
    lanes = max(1, target.vector_bytes // 4)
    if isinstance(spec.queries, int) and spec.queries <= FEW:
        return [{"kind": "line", "tb": 8 * lanes}]

    def cost(nv: int) -> float:
        if not isinstance(spec.queries, int):
            return abs(nv - 2)
        return -(-spec.queries // (nv * lanes)) * nv * _TILE_COST[nv]

    order = sorted(_TILE_COST, key=cost)
    wide = 64 if lanes >= 8 else 32
    return [
        {"kind": "block", "nv": nv, "rk": _TILE_KEYS[nv], "ri": 4, "tb": wide} for nv in order[:2]
    ]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers an attention operator and the pointwise operators that follow it on its shape.

    Raises `Unsupported` for operands that the template does not cover, ValueError for a
    configuration that is not of the form `candidates` gives.
    """
    if target.kind != "cpu":
        raise Unsupported("PLT-ATT-008", f"this template does not generate code for {target.kind}")
    spec = parse(group, io)
    lanes = max(1, target.vector_bytes // 4)
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbols_of(group, (*inputs, *outputs))
    em = Emitter(name, inputs, outputs, symbols)
    if config["kind"] == "line":
        blocks: Dim = spec.queries
    else:
        if config["tb"] % config["rk"] or (config["nv"] * lanes) % config["ri"]:
            raise ValueError(f"impossible tile sizes {config}")
        blocks = ceil_div(spec.queries, config["nv"] * lanes)
    tasks = product(spec.lead) * blocks
    with em.function() as task:
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        operands = {
            n: Operand(em, spec, refs[node])
            for n, node in (("q", spec.q), ("k", spec.k), ("v", spec.v))
        }
        mask = None if spec.mask is None else Mask(em, spec, refs[spec.mask])
        body = {"line": Line, "block": Block}[config["kind"]]
        epilogue = _Epilogue(em, spec, group)
        if tasks == 0:
            T.evaluate(0)
        else:
            body(em, spec, config, lanes, operands, mask, epilogue.store).task(task, blocks)
    return em.kernel(tasks, config, flops=spec.flops)


class _Epilogue:
    """Stores results after the pointwise operators of the group."""

    def __init__(self, em: Emitter, spec: AttentionSpec, group: Group) -> None:
        self.outputs = list(zip(group.outputs, em.outputs, strict=True))
        shape = dims_of(spec.tip)
        for node in group.outputs:
            if dims_of(node) != shape:
                raise Unsupported("PLT-ATT-009", f"{node} has another shape than {spec.tip}")
        self.env = {n: Value.of(r) for n, r in zip(group.inputs, em.inputs, strict=True)}
        dtype = dtype_of(spec.tip)
        self.current: Expr = None
        self.env[spec.tip] = Value(
            tuple(em.dim(d) for d in shape),
            dtype,
            lambda _: convert_expr(self.current, torch.float32, dtype),
        )
        try:
            evaluate(result_nodes(group, spec), Context(em, self.env))
        except NotImplementedError as error:
            raise Unsupported("PLT-ATT-010", str(error)) from error

    def store(self, index: list[Expr], value: Expr) -> None:
        """Stores all outputs for one element (or vector) of the attention's result."""
        self.current = value
        results = [self.env[n].load(index) for n, _ in self.outputs]
        for (_, ref), result in zip(self.outputs, results, strict=True):
            ref.store(result, index)
