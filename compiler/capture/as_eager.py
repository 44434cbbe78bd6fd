"""Choices that are made otherwise while a model is exported, made as in eager mode.

torch takes a dropout that is switched off for a copy, though it returns the tensor it is given:
what is then written to one is written to the other. It does not know what ``.data`` gives, nor that
it was set.

To transformers, an exported program is one that runs with other sizes and by other engines. So
masks are made even where nothing is hidden, or where the sizes tell that a causal attention needs
none; some models make them for other sizes than their attention's and work only because eager mode
does not. Triangular systems of linear attention become a program for each row of a chunk. Here
sizes are guarded and every operator runs: what eager mode chooses is right, shorter, and what
results are compared with. Of what depends on a mask's values, see `masks`. Outputs that parts
record are kept in one place for all models, where a model within another one ends the other's. Of
padding in torch's own encoders, see `encoders`, of recurrent layers `recurrent`. Weights of an
absolute error get lost where torch's functions are watched, as they are while a model is exported.
A module that is moved to where it is, or given the type that it has, stays as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from .encoders import encoders
from .recurrent import recurrences

QUESTION = "is_torchdynamo_exporting"
"""The library's name of the question whether a model is being exported."""
RECORDS = "utils.output_capturing", "is_torchdynamo_compiling"
"""Where outputs are recorded, and the question that it asks."""
MASKED = "models.longt5.modeling_longt5", "is_torchdynamo_compiling"
"""What goes on without the mask that it needs where the answer is yes."""
WATCHED = "handle_torch_function"
"""torch's name of what a function calls where it is watched."""
DATA: Any = torch.Tensor.data  # what reads gives a tensor that the trace would take for a constant
HINT = "write to the tensor in place, or put another one in its place"
MODULES = (
    "masking_utils",
    *(
        f"models.{name}.modeling_{name}"
        for name in ("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp")
    ),
)
"""Modules of transformers in which the answer shall be no. Others would answer that by operators
that only run compiled, such as an associative scan."""


@contextlib.contextmanager
def as_eager(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, `MODULES` and encoders below ``roots`` choose as in eager mode. Modules that are
    not loaded stay so.
    """
    placed: list[tuple[dict[str, Any], str, Any]] = []
    convert: Any = nn.Module._apply
    try:
        nn.Module._apply = _converted(convert)
        for name, question in (*((name, QUESTION) for name in MODULES), RECORDS, MASKED):
            names = vars(sys.modules.get(f"transformers.{name}", object))
            if question in names:
                placed.append((names, question, names[question]))
                names[question] = lambda: False
        placed.append((F.__dict__, WATCHED, F.__dict__[WATCHED]))
        F.__dict__[WATCHED] = _weighted(F.__dict__[WATCHED])
        with _Traced(), encoders(roots), recurrences(roots):
            yield
    finally:
        nn.Module._apply = convert
        for names, question, original in placed:
            names[question] = original


def _converted(convert: Callable[..., Any]) -> Callable[..., Any]:
    """``nn.Module._apply``, which leaves a module alone whose tensors stay what they are: the trace
    has put its own in their places, which cannot be exchanged.
    """

    def apply(self: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], *args: Any) -> Any:
        def lies(x: torch.Tensor) -> tuple[Any, ...]:
            return x.dtype, x.device, x.stride()

        with torch.no_grad():
            tensors = [*self.parameters(), *self.buffers()]
            if all(lies(function(x)) == lies(x) for x in tensors):
                return self
        return convert(self, function, *args)

    return apply


def _weighted(watched: Callable[..., Any]) -> Callable[..., Any]:
    """``watched``, which is told of the weight of an absolute error, too."""

    def handle(func: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if func is F.l1_loss and len(tensors) == 3:
            kwargs.setdefault("weight", tensors[2])
        return watched(func, tensors, *args, **kwargs)

    return handle


class _Traced(TorchFunctionMode):
    """Within it, a dropout that drops nothing returns what it is given, and ``.data`` is a view."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout) and _kept(*args, **kwargs):
            return args[0] if args else kwargs["input"]
        if func == DATA.__get__:
            return args[0].detach()
        if func == DATA.__set__:
            raise CaptureError("PLT-CAP-001", "the program sets .data of a tensor", HINT)
        return func(*args, **kwargs)


def _kept(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
) -> bool:
    """Whether a dropout drops nothing; no where it is refused. Parameters are torch's."""
    return not isinstance(p, torch.Tensor) and (p == 0 or (0 < p <= 1 and not (training and train)))
