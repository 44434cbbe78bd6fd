"""Vectors of neighbouring elements as TIR expressions."""

from __future__ import annotations

from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..emit import Expr, Ref
from ..ops.scope import named


def ramp(start: Expr, lanes: int) -> Expr:
    """The indices of a vector of neighbours."""
    return tir.Ramp(start, tir.IntImm("int64", 1), tir.IntImm("int32", lanes))


def bits_of(ref: Ref) -> Any:
    """A buffer over the bits of a bfloat16 tensor, else None.

    TVM lowers vectors of bfloat16 that a scalar is spread over to ill-typed code; integers it can.
    """
    if ref.arg.dtype != torch.bfloat16:
        return None
    return T.decl_buffer(ref.buffer.shape, "uint16", data=ref.buffer.data)


def transposed(rows: list[Any]) -> list[Expr]:
    """The transpose of a square of vectors: log2(lanes) perfect shuffles of pairs of rows.

    The rows should be `named`, as the results are: each depends on all rows.
    """
    lanes = len(rows)
    half, rounds = lanes // 2, lanes.bit_length() - 1
    for _ in range(rounds):
        mixed = []
        for row in range(lanes):
            pair = [rows[row // 2], rows[row // 2 + half]]
            order = [lanes * (i % 2) + i // 2 + half * (row % 2) for i in range(lanes)]
            mixed.append(named(tir.Shuffle(pair, [tir.IntImm("int32", i) for i in order])))
        rows = mixed
    return rows
