"""Reorderings of constant tensors done once, before the first call. Pure torch, no TVM.

`PACKERS` maps the name in an `abi.Pack` to a function ``(tensor, **params) -> tensor`` whose result
is contiguous; its memory is what the kernel's pointer then addresses. The functions depend on
nothing but their arguments, so a saved plan can pack its weights when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import packing_conv
from .abi import Pack


def gemm_panels(
    weight: torch.Tensor, *, width: int, transposed: bool, pairs: bool = False
) -> torch.Tensor:
    """Cuts the right factor of a matrix product into panels of ``width`` columns.

    ``weight`` is ``[*batch, N, K]`` if ``transposed`` (as `torch.nn.Linear` keeps it), else
    ``[*batch, K, N]``; any dtype, any strides. The result is ``[*batch, P, K, width]`` with
    ``P = ceil(N / width)``; columns past ``N`` are zero. A kernel that holds ``width`` columns of
    the result in registers reads one panel from front to back (Goto and van de Geijn, "Anatomy of
    High-Performance Matrix Multiplication", TOMS 2008). With ``pairs``, two steps of a column are
    neighbours: ``[*batch, P, ceil(K / 2), width, 2]``, a step past the last being zero.
    """
    rows = weight if transposed else weight.transpose(-1, -2)
    *batch, n, k = rows.shape
    panels, together = -(-n // width), 2 if pairs else 1
    steps = -(-k // together)
    padded = weight.new_zeros(*batch, panels * width, steps * together)
    padded[..., :n, :k] = rows
    cut = padded.view(*batch, panels, width, steps, together)
    panel = cut.transpose(-2, -3).contiguous()
    return panel if pairs else panel.squeeze(-1)


def paired_panels(
    weight: torch.Tensor, *, width: int, transposed: bool, alternate: bool, pairs: bool = False
) -> torch.Tensor:
    """`gemm_panels` of which each holds ``width / 2`` columns of both halves of the matrix.

    The halves are its first and last columns, or its even and odd ones if they ``alternate``. A
    kernel that reads one panel can combine column j of one half with column j of the other.
    """
    rows = weight if transposed else weight.transpose(-1, -2)
    n = rows.shape[-2]
    halves = (rows[..., 0::2, :], rows[..., 1::2, :]) if alternate else rows.split(n // 2, -2)
    parts = [gemm_panels(h, width=width // 2, transposed=True, pairs=pairs) for h in halves]
    return torch.cat(parts, -2 if pairs else -1)


PACKERS: dict[str, Callable[..., torch.Tensor]] = {
    "gemm_panels": gemm_panels,
    "paired_panels": paired_panels,
    **packing_conv.PACKERS,
}


def apply(pack: Pack, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` reordered as ``pack`` says; raises KeyError for a pack that does not exist."""
    if pack.op not in PACKERS:
        raise KeyError(f"unknown pack {pack.op!r}; known: {', '.join(sorted(PACKERS))}")
    return PACKERS[pack.op](tensor, **dict(pack.params))
