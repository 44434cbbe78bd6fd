"""Recognises a matrix product whose columns are two operands that lie side by side or alternate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from .table import argument


def column_halves(
    node: fx.Node, readers: Sequence[fx.Node]
) -> tuple[tuple[fx.Node, fx.Node], bool] | None:
    """The slices ``readers`` as (first half, second half) of the columns of ``node``.

    And whether they alternate (even columns, odd columns) instead of lying side by side. None
    unless there are two and together they are all columns, each once.
    """
    value = node.meta.get("val")
    if len(readers) != 2 or not isinstance(value, torch.Tensor) or value.dim() != 2:
        return None
    count = value.shape[1]
    if not isinstance(count, int) or count % 2:
        return None
    spans: dict[tuple[int, int, int], fx.Node] = {}
    for reader in readers:
        if str(reader.target) != "aten.slice.Tensor" or argument(reader, "dim") not in (1, -1):
            return None
        start, end, step = (argument(reader, name) for name in ("start", "end", "step"))
        if not all(isinstance(x, int | None) for x in (start, end, step)):
            return None
        spans[slice(start, end, step).indices(count)] = reader
    half = count // 2
    for alternate, first, second in (
        (False, (0, half, 1), (half, count, 1)),
        (True, (0, count, 2), (1, count, 2)),
    ):
        if spans.keys() == {first, second}:
            return (spans[first], spans[second]), alternate
    return None
