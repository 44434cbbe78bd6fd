"""``dynamic_shapes`` as the user writes it, matched to the tensors of a call.

The forms of `torch.export.export` are accepted: a dictionary by argument name or a sequence by
position; for a tensor a dictionary or sequence of `torch.export.Dim`, ``Dim.AUTO``,
``Dim.DYNAMIC``, ``Dim.STATIC``, ints or None; for a container the same shape of container.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from ..errors import InputError
from .tree import parts


@dataclass
class Declared:
    """What was declared of one tensor.

    ``dims`` are dimensions to leave open, ``small`` those among the declared ones whose size is 0
    or 1 now (such a call gets a program of its own), ``fixed`` those that must stay constants.
    """

    dims: dict[int, Any] = field(default_factory=dict)
    small: dict[int, Any] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.dims)


def declared_dims(
    spec: Any,
    signature: inspect.Signature | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
) -> list[Declared]:
    """One entry per tensor of ``(args, kwargs)``.

    Raises InputError for names and dimensions that do not exist
    and for sizes outside a declared range.
    """
    if spec is None:
        return [Declared() for _ in tensors]
    names = list(signature.parameters) if signature is not None else []
    given: list[tuple[str, Any]] = [
        (names[i] if i < len(names) else f"args[{i}]", a) for i, a in enumerate(args)
    ]
    given += kwargs.items()
    if isinstance(spec, Mapping):
        unknown = [k for k in spec if k not in names and k not in dict(given)]
        if unknown:
            known = ", ".join(names) or "none"
            raise InputError(
                "PLT-INP-004", f"dynamic_shapes names {unknown[0]!r}", f"arguments are: {known}"
            )
        specs = [spec.get(name) for name, _ in given]
    elif isinstance(spec, list | tuple):
        if len(spec) > max(len(given), len(names)):
            raise InputError(
                "PLT-INP-004", f"dynamic_shapes has {len(spec)} entries for {len(given)} arguments"
            )
        specs = [spec[i] if i < len(spec) else None for i in range(len(given))]
    else:
        raise InputError("PLT-INP-004", f"dynamic_shapes is a {type(spec).__name__}")
    out: list[Declared] = []
    for (name, value), entry in zip(given, specs, strict=True):
        _match(name, value, entry, out)
    return out


def _match(name: str, value: Any, spec: Any, out: list[Declared]) -> None:
    if isinstance(value, Tensor):
        out.append(_tensor(name, value, spec))
        return
    opened = parts(value)
    if opened is None:
        return
    _, keys, children, _ = opened
    for i, child in enumerate(children):
        key = keys[i] if keys else i
        inner = None
        if isinstance(spec, Mapping):
            inner = spec.get(key)
        elif isinstance(spec, list | tuple) and i < len(spec):
            inner = spec[i]
        _match(f"{name}[{key!r}]", child, inner, out)


def _tensor(name: str, tensor: Tensor, spec: Any) -> Declared:
    declared = Declared()
    if spec is None:
        return declared
    if isinstance(spec, Mapping):
        entries = dict(spec)
    elif isinstance(spec, list | tuple):
        entries = dict(enumerate(spec))
    else:
        kind = type(spec).__name__
        raise InputError("PLT-INP-004", f"dynamic_shapes of {name!r} is a {kind}")
    for d, dim in entries.items():
        if not isinstance(d, int) or not -tensor.dim() <= d < tensor.dim():
            raise InputError(
                "PLT-INP-004", f"{name!r} has no dimension {d!r}: its shape is {list(tensor.shape)}"
            )
        d %= tensor.dim()
        size = tensor.shape[d]
        if dim is None or isinstance(dim, int) or dim is Dim.STATIC:
            if isinstance(dim, int) and dim != size:
                raise InputError(
                    "PLT-INP-002",
                    f"argument {name!r}: expected dimension {d} to be {dim}, got {size}",
                )
            if dim is not None:
                declared.fixed.add(d)
            continue
        low, high = getattr(dim, "min", None), getattr(dim, "max", None)
        low = low if isinstance(low, int) else 0
        # A lower limit of 2 is what torch gives every Dim; smaller sizes get their own program.
        if (low > 2 and size < low) or (isinstance(high, int) and size > high):
            limits = f"at least {low}" if not isinstance(high, int) else f"from {low} to {high}"
            raise InputError(
                "PLT-INP-002",
                f"argument {name!r}: expected dimension {d} to be {limits}, got {size}",
            )
        (declared.dims if size > 1 else declared.small)[d] = Dim.AUTO if dim is Dim.DYNAMIC else dim
    return declared


def with_small_open(
    leaves: Sequence[Any], declared: Sequence[Declared]
) -> tuple[list[Any], list[Declared]]:
    """Leaves of a call with size 2 where a declared dimension is small, and these to be left open,
    too.
    """
    entries = iter(declared)
    larger = [_enlarged(x, next(entries).small) if isinstance(x, Tensor) else x for x in leaves]
    return larger, [Declared({**d.dims, **d.small}) for d in declared]


def _enlarged(tensor: Tensor, dims: Mapping[int, Any]) -> Tensor:
    """A tensor like ``tensor`` with size 2 where ``dims`` has an entry."""
    shape = [2 if d in dims else size for d, size in enumerate(tensor.shape)]
    return tensor.expand(shape).clone() if tensor.numel() else tensor.new_zeros(shape)


def varying(
    seen: Sequence[Sequence[torch.Size]], declared: Sequence[Declared]
) -> list[dict[int, Any]]:
    """Dimensions to leave open: more than one size was seen and the present one is above 1."""
    out: list[dict[int, Any]] = []
    for i, last in enumerate(seen[-1]):
        open_dims = {
            d: Dim.AUTO
            for d, size in enumerate(last)
            if size > 1
            and d not in declared[i].fixed
            and any(shapes[i][d] != size for shapes in seen)
        }
        out.append(open_dims)
    return out


def opening(
    declared: Sequence[Declared],
    automatic: Sequence[dict[int, Any]],
    closed: Sequence[list[dict[int, Any]]],
    stuck: Collection[tuple[int, int]] = (),
) -> list[dict[int, Any]]:
    """Dimensions to leave open: as declared, found by torch, or none at all, the first of these
    that is not in ``closed``, which could not be left open before.

    In ``stuck`` are those that were to blame, as numbers of a tensor and of a dimension.
    """
    able = [{d: v for d, v in x.items() if (i, d) not in stuck} for i, x in enumerate(automatic)]
    exact = [{**a, **d.dims} for a, d in zip(able, declared, strict=True)]
    loose = [{d: Dim.AUTO for d in x if (i, d) not in stuck} for i, x in enumerate(exact)]
    for dims in (exact, loose):
        if any(dims) and dims not in closed:
            return dims
    return []
