"""Reorderings of convolution weights done once, before the first call. Pure torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .minimal_filtering import filter_of


def vector_starts(channels: int, lanes: int, vectors: int) -> list[int]:
    """First output channel of every vector of ``lanes`` channels, in blocks of ``vectors``.

    Vectors that would reach past the last channel are moved back so that they overlap others:
    every lane then holds a real channel and no store needs a mask.
    """
    count = -(-channels // lanes)
    count = -(-count // vectors) * vectors
    return [min(v * lanes, channels - lanes) for v in range(count)]


def conv_direct(
    weight: torch.Tensor, *, groups: int, lanes: int, vectors: int, pairs: bool = False,
    widened: bool = False,
) -> torch.Tensor:  # fmt: skip
    """[OC, C/groups, KH, KW] -> [groups * blocks, KH, KW, C/groups, vectors * lanes].

    With ``pairs``, two input channels (their number is even) of an output channel are neighbours:
    [groups * blocks, KH, KW, C/groups/2, vectors * lanes, 2]. ``widened`` makes it float32.
    """
    weight = weight if weight.dim() == 4 else weight.unsqueeze(2)
    oc, c, kh, kw = weight.shape
    og = oc // groups
    starts = torch.tensor(vector_starts(og, lanes, vectors))
    rows = (starts[:, None] + torch.arange(lanes)).flatten()
    index = (torch.arange(groups)[:, None] * og + rows).flatten()
    packed = weight.index_select(0, index).view(-1, vectors * lanes, c, kh, kw)
    packed = packed.permute(0, 3, 4, 2, 1)
    if pairs:
        packed = packed.unflatten(3, (c // 2, 2)).transpose(-1, -2)
    if widened:
        packed = packed.float()
    return packed.contiguous()


def conv_winograd(
    weight: torch.Tensor, *, groups: int, lanes: int, vectors: int,
    down: int, across: int, high: int, wide: int,
) -> torch.Tensor:  # fmt: skip
    """[OC, C/groups, KH, KW] -> [groups * blocks, points, C/groups, vectors * lanes].

    The points are those of the `minimal_filtering` of ``high`` x ``wide`` outputs at strides
    ``down`` and ``across``: G w G', computed in float64.
    """
    weight = weight if weight.dim() == 4 else weight.unsqueeze(2)
    oc, c, *taps = weight.shape
    rows, cols = (
        torch.tensor([[float(e) for e in row] for row in f.weights], dtype=torch.float64)
        for f in (filter_of(taps[0], down, high), filter_of(taps[1], across, wide))
    )
    changed = torch.einsum("ik,ockl,jl->ijco", rows, weight.double(), cols).to(weight.dtype)
    points, og = len(rows) * len(cols), oc // groups
    starts = torch.tensor(vector_starts(og, lanes, vectors))
    columns = (starts[:, None] + torch.arange(lanes)).flatten()
    index = (torch.arange(groups)[:, None] * og + columns).flatten()
    packed = changed.reshape(points, c, oc).index_select(2, index)
    return packed.view(points, c, -1, vectors * lanes).permute(2, 0, 1, 3).contiguous()


PACKERS: dict[str, Callable[..., torch.Tensor]] = {
    "conv_direct": conv_direct,
    "conv_winograd": conv_winograd,
}
