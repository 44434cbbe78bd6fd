"""Reorderings of convolution weights done once, before the first call. Pure torch."""

from __future__ import annotations

from collections.abc import Callable

import torch


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


def conv_winograd(weight: torch.Tensor, *, lanes: int, vectors: int) -> torch.Tensor:
    """[OC, C, 3, 3] -> [blocks, 16, C, vectors * lanes]: G w G' of F(2x2, 3x3), in float64."""
    g = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2
    changed = torch.einsum("ik,ockl,jl->ijco", g, weight.double(), g).to(weight.dtype)
    starts = torch.tensor(vector_starts(weight.shape[0], lanes, vectors))
    columns = (starts[:, None] + torch.arange(lanes)).flatten()
    packed = changed.reshape(16, weight.shape[1], -1).index_select(2, columns)
    return packed.view(16, weight.shape[1], -1, vectors * lanes).permute(2, 0, 1, 3).contiguous()


PACKERS: dict[str, Callable[..., torch.Tensor]] = {
    "conv_direct": conv_direct,
    "conv_winograd": conv_winograd,
}
