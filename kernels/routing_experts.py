"""`experts`: a mixture of experts of two products each, as one operator.

It has no kernel of its own: torch takes it apart into a `route`, two `routed_linear` and what lies
between them, in eager mode as in captured graphs, so it has the gradients and kernels of those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .routes import names_branch
from .routing import route, routed_linear

__all__ = ["ACTIVATIONS", "experts", "slots_of_experts", "weighted_sum"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
"""By name, what `experts` can have between its products."""


def experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    activation: str = "silu",
    transposed: bool = False,
) -> Tensor:
    """Rows ``[T, K]`` through the experts they name, weighted and added: ``[T, M]`` like ``x``.

    ``index`` (int64) and ``weight`` are ``[T, k]``, k > 0: slot s of a row goes to expert
    ``index[row, s]`` and counts ``weight[row, s]`` times. A number outside ``[0, E)`` names no
    expert: the slot adds nothing, whatever its weight. Expert e computes ``second[e] @
    act(first[e] @ row)``, where ``first`` is ``[E, N, K]`` and ``second`` ``[E, M, N]``; with
    ``first`` ``[E, 2 N, K]`` its halves are gate and up projection, ``act(gate) * up`` (the gated
    linear units of Shazeer, 2020). Biases are ``[E, N]`` (or ``[E, 2 N]``) and ``[E, M]``. Both
    weights have their last dimensions swapped where they are ``transposed``. ``activation`` is one
    of `ACTIVATIONS`.

    Raises ValueError where the arguments do not fit each other or the activation is unknown.
    """
    count, gated = _checked(x, index, weight, first, second, activation, transposed)
    act = ACTIVATIONS[activation]

    def between(inner: Tensor) -> Tensor:
        if not gated:
            return act(inner)
        gate, up = inner.chunk(2, -1)
        return act(gate) * up

    slots = slots_of_experts(
        x, index, count, (first, first_bias), between, (second, second_bias), transposed
    )
    weight = torch.where(names_branch(index, count), weight, 0)
    return weighted_sum(slots, weight).to(x.dtype)


def slots_of_experts(
    x: Tensor,
    index: Tensor,
    count: int,
    first: tuple[Tensor, Tensor | None],
    between: Callable[[Tensor], Tensor],
    second: tuple[Tensor, Tensor | None],
    transposed: bool,
) -> Tensor:
    """What the expert of each of ``index``'s ``T * k`` slots makes of the slot's row: ``[T k, M]``.

    ``first`` and ``second`` are weights and biases. Rows are cast to the weights' dtypes: autocast
    does not reach into operators of ours.
    """
    sorted_slots = route(index, count)
    inner = routed_linear(
        x.to(first[0].dtype), *sorted_slots, *first, transposed, index.shape[1], False
    )
    inner = between(inner).to(second[0].dtype)
    return routed_linear(inner, *sorted_slots, *second, transposed, 0, True)


def weighted_sum(slots: Tensor, weights: Tensor) -> Tensor:
    """``[T, M]``: the k slots of each row ``[T k, M]`` times their ``weights`` ``[T, k]``."""
    return (slots.view(*weights.shape, slots.shape[-1]) * weights.unsqueeze(-1)).sum(1)


def _checked(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    activation: str,
    transposed: bool,
) -> tuple[int, bool]:
    """How many experts there are, and whether they are gated."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or index.dim() != 2 or index.shape != weight.shape or not index.shape[1]:
        raise ValueError(
            "experts takes rows [T, K] and index and weight [T, k] with k > 0, not "
            f"{list(x.shape)}, {list(index.shape)} and {list(weight.shape)}"
        )
    if index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype}; numbers of experts are int64")
    if first.dim() != 3 or second.dim() != 3 or first.shape[0] != second.shape[0]:
        raise ValueError(
            "the experts' weights are [E, N, K] and [E, M, N], not "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    out, into = (2, 1) if transposed else (1, 2)
    if index.shape[0] != x.shape[0] or first.shape[into] != x.shape[1]:
        raise ValueError(
            f"rows {list(x.shape)} do not fit index {list(index.shape)} and first weights "
            f"{list(first.shape)}{' (transposed)' if transposed else ''}"
        )
    wide, narrow = first.shape[out], second.shape[into]
    if wide not in (narrow, 2 * narrow):
        raise ValueError(
            f"the first weights give {wide} values; the second take {narrow}, so the first must "
            f"give {narrow}, or {2 * narrow} with a gate"
        )
    return first.shape[0], wide != narrow


_library = torch.library.Library("plait", "FRAGMENT")
_library.define(
    "experts(Tensor x, Tensor index, Tensor weight, Tensor first, Tensor second, "
    "Tensor? first_bias=None, Tensor? second_bias=None, str activation='silu', "
    "bool transposed=False) -> Tensor"
)
_library.impl("experts", experts, "CompositeImplicitAutograd")
