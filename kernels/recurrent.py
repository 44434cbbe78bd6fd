"""Recurrent layers as operators whose results tell their sizes without being unrolled over time.

torch's own recurrent operators are, to a trace, their steps: as many as there are at hand. Packed
sequences, which hold only what is no padding, have sizes that the lengths' values tell: unbacked
symbols while tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["KINDS", "pack", "recur", "recur_packed", "unpack"]

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""Names of torch's functions."""


@torch.library.custom_op("plait::recur", mutates_args=())
def recur(
    kind: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """What torch's function ``kind`` gives, without dropout: the output, then the last states.

    ``states`` are the first ones ``[layers * directions, batch, hidden]``: two for an LSTM, else
    one. Raises RuntimeError where arguments do not fit each other.
    """
    first: Any = tuple(states) if kind == "lstm" else states[0]
    options = (biases, layers, 0.0, False, bidirectional, batch_first)
    return list(getattr(torch, kind)(x, first, tuple(weights), *options))


@recur.register_fake
def _(
    kind: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    length, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    out = x.new_empty(length, batch, states[0].shape[-1] * (1 + bidirectional))
    return [out.transpose(0, 1) if batch_first else out, *map(_like, states)]


@torch.library.custom_op("plait::recur_packed", mutates_args=())
def recur_packed(
    kind: str,
    data: Tensor,
    batch_sizes: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
) -> list[Tensor]:
    """`recur` of a packed sequence: ``data`` ``[entries, features]``, step after step, of which
    each has as many as ``batch_sizes`` (int64, on the CPU) tells.
    """
    first: Any = tuple(states) if kind == "lstm" else states[0]
    options = (biases, layers, 0.0, False, bidirectional)
    return list(getattr(torch, kind)(data, batch_sizes, first, tuple(weights), *options))


@recur_packed.register_fake
def _(
    kind: str,
    data: Tensor,
    batch_sizes: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
) -> list[Tensor]:
    width = states[0].shape[-1] * (1 + bidirectional)
    return [data.new_empty(data.shape[0], width), *map(_like, states)]


def _like(state: Tensor) -> Tensor:
    return state.new_empty(state.shape)


@torch.library.custom_op("plait::pack", mutates_args=())
def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The data and the batch sizes of sequences packed; ``lengths`` descend. Raises RuntimeError
    where they do not, or do not fit ``x``.
    """
    return torch._VF._pack_padded_sequence(x, lengths, batch_first)  # type: ignore[attr-defined]


@pack.register_fake
def _(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    entries, steps = context.new_dynamic_size(min=1), context.new_dynamic_size(min=1)
    sizes = torch.empty(steps, dtype=torch.int64, device="cpu")
    return x.new_empty(entries, *x.shape[2:]), sizes


@torch.library.custom_op("plait::unpack", mutates_args=())
def unpack(
    data: Tensor, batch_sizes: Tensor, batch: int, steps: int, batch_first: bool, padding: float
) -> tuple[Tensor, Tensor]:
    """Sequences of a packed one, padded to ``steps``, and their lengths. ``batch`` of them, which
    ``batch_sizes`` begins with.
    """
    function: Any = torch._VF._pad_packed_sequence  # type: ignore[attr-defined]
    out, lengths = function(data, batch_sizes, batch_first, padding, steps)
    return out, lengths


@unpack.register_fake
def _(
    data: Tensor, batch_sizes: Tensor, batch: int, steps: int, batch_first: bool, padding: float
) -> tuple[Tensor, Tensor]:
    out = data.new_empty(steps, batch, *data.shape[1:])
    lengths = torch.empty(batch, dtype=torch.int64, device="cpu")
    return out.transpose(0, 1) if batch_first else out, lengths
