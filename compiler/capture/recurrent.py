"""Recurrent layers and packed sequences of `torch.nn`, in operators that are not unrolled.

torch's own become their steps in a trace, as many as the example has. Of packed sequences a trace
knows neither how many entries nor how many steps there are; of how many sequences there were it
does, and here remembers: torch asks the first of the batch sizes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...kernels import recurrent

_FUNCTIONS = {
    getattr(torch._C._VariableFunctions, name): name
    for name in (*recurrent.KINDS, "_pack_padded_sequence", "_pad_packed_sequence")
}
_ASKED = ("get_expected_hidden_size", "get_expected_cell_size")
"""Methods of torch's modules that take the number of packed sequences for a plain number."""


@contextlib.contextmanager
def recurrences(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, recurrent functions are operators of ours, and so are they in modules below
    ``roots``. Where autocast may choose their types they stay.
    """
    if torch._C._is_any_autocast_enabled():
        yield
        return
    below = {m for root in roots for m in root.modules() if isinstance(m, nn.RNNBase)}
    placed = []
    try:
        for module in below:
            for name in _ASKED:
                if hasattr(module, name) and name not in vars(module):
                    vars(module)[name] = functools.partial(_expected, module, name)
                    placed.append((module, name))
        with _Recurrences():
            yield
    finally:
        for module, name in placed:
            vars(module).pop(name, None)


def _expected(module: Any, name: str, input: Tensor, batch_sizes: Tensor | None) -> Any:
    """The method's answer, with the number of sequences as a size."""
    method = getattr(type(module), name)
    if batch_sizes is None:
        return method(module, input, None)
    batch = batch_sizes[0]
    layers, _, size = method(module, input, [1])
    return layers, batch.item() if isinstance(batch, Tensor) else batch, size


class _Recurrences(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._batches: dict[int, tuple[Tensor, Any]] = {}  # by batch sizes, which are kept alive

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, _FUNCTIONS.get(func, "")
        if name == "_pack_padded_sequence" and not kwargs:
            return self._packed(*args)
        if name == "_pad_packed_sequence" and not kwargs:
            return self._padded(*args)
        if name and not kwargs:
            found = _recurrent(name, *args)
            if found is not None:
                return found
        elif self._batches and func is Tensor.__getitem__ and _is_first(args[1]):
            known = self._batches.get(id(args[0]))
            if known is not None:
                return known[1]
        return func(*args, **kwargs)

    def _packed(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        data, sizes = recurrent.pack(x, lengths, batch_first)
        batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        torch._check(sizes.shape[0] <= steps)  # of which a total length is, or more
        self._batches[id(sizes)] = sizes, batch
        return data, sizes

    def _padded(
        self, data: Tensor, sizes: Tensor, batch_first: bool, padding: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        known = self._batches.get(id(sizes))
        batch = int(sizes[0]) if known is None else known[1]
        return recurrent.unpack(data, sizes, batch, steps, batch_first, padding)


def _recurrent(kind: str, *args: Any) -> tuple[Tensor, ...] | None:
    """What torch's function gives; None where it drops something."""
    packed = isinstance(args[1 if kind == "lstm" else 2], Tensor)
    data, args = args[: 1 + packed], args[1 + packed :]
    states, weights, biases, layers, dropout, train, bidirectional, *order = args
    if train and dropout:
        return None
    states = list(states) if kind == "lstm" else [states]
    options = (states, list(weights), biases, layers, bidirectional, *order)
    return tuple((recurrent.recur_packed if packed else recurrent.recur)(kind, *data, *options))


def _is_first(index: Any) -> bool:
    return type(index) is int and index == 0
