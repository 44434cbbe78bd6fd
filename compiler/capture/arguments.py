"""What a call's arguments are called, and tensors that no compiled program may be given."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext

from ..errors import InputError
from .state import states_of
from .tree import Tree, flatten_call, leaf_names

SCALARS = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, type)
"""What besides tensors an argument may be: compared by value at every call."""

_levels = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_functions = torch._C._len_torch_function_stack
_tracer = torch._C._get_tracing_state


def as_call(example_inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Arguments and keyword arguments that ``example_inputs`` stands for.

    Raises InputError for an iterator, which could be read only once.
    """
    if isinstance(example_inputs, Iterator):
        kind = type(example_inputs).__name__
        raise InputError("PLT-INP-001", f"example_inputs is a {kind}", "give a tuple or a dict")
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def watched() -> bool:
    """Whether something needs to see every operator: vmap, forward-mode AD, a tracer, a mode
    other than for a default device.
    """
    return (
        forward_ad._current_level >= 0
        or _modes() > 0
        or _levels() is not None
        or _tracer() is not None
        or (_functions() > 0 and any(type(m) is not DeviceContext for m in _function_modes()))
    )


def defaults() -> tuple[torch.dtype, torch.device | None]:
    """Type and place of new tensors, as `torch.set_default_dtype` and `torch.set_default_device`
    say; the place is None where nothing does.
    """
    if not _functions():
        return torch.get_default_dtype(), None
    found = (m.device for m in reversed(_function_modes()) if type(m) is DeviceContext)
    return torch.get_default_dtype(), next(found, None)


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is dense memory: not sparse, quantised, nested, wrapped or meta."""
    return (
        tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def extent(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last address of the memory that ``tensor`` reaches."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def distinct(tensors: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Examples like ``tensors``, none of which has memory in common with another or ``others``.

    Export takes tensors that are the same for one input, however later calls give them.
    """
    seen = {t.untyped_storage().data_ptr() for t in others if is_plain(t) and t.numel()}
    out: list[Tensor] = []
    for tensor in tensors:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensor = tensor.clone()
        seen.add(place)
        out.append(tensor)
    return out


def shares_memory(tensors: Sequence[Tensor], written: Sequence[int]) -> bool:
    """Whether a tensor that is written, by position, may overlap another one or itself."""
    wanted = frozenset(written)
    reach = reach_written = 0  # the furthest that tensors lying before extend
    for (low, high), i in sorted((extent(t), i) for i, t in enumerate(tensors) if t.numel()):
        if low < (reach if i in wanted else reach_written):
            return True
        reach = max(reach, high)
        reach_written = max(reach_written, high) if i in wanted else reach_written
    for i in written:
        shape, stride = tensors[i].shape, tensors[i].stride()
        if any(n > 1 and s == 0 for n, s in zip(shape, stride, strict=True)):
            return True
    return False


def signature_of(target: Any) -> inspect.Signature | None:
    """The signature of a function or of a module's forward; None where it cannot be told."""
    function = target.forward if isinstance(target, nn.Module) else target
    try:
        return inspect.signature(function) if function is not None else None
    except (TypeError, ValueError):
        return None


def is_wrapped(target: Any) -> bool:
    """Whether what runs first is a decorator's code, which may look at how arguments are given."""
    return hasattr(target.forward if isinstance(target, nn.Module) else target, "__wrapped__")


def positional(signature: inspect.Signature | None) -> list[str]:
    """Names of parameters that may be given by position."""
    if signature is None:
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.kind in kinds]


def argument_names(tree: Tree, positional: Sequence[str] = ()) -> list[str]:
    """A readable name of every leaf of ``(args, kwargs)``; ``positional`` names ``args``."""
    args, kwargs = tree.children
    names: list[str] = []
    for i, child in enumerate(args.children):
        names += leaf_names(child, positional[i] if i < len(positional) else f"args[{i}]")
    for key, child in zip(kwargs.keys, kwargs.children, strict=True):
        names += leaf_names(child, str(key))
    return names


def tensor_names(names: Sequence[str], args: Any, kwargs: Any) -> list[str]:
    """Those of ``names``, one for each leaf of a call, that are tensors'."""
    leaves = flatten_call((args, kwargs))[0]
    return [n for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor)]


@dataclass(frozen=True)
class Order:
    """How tensors and state objects of a call move when its arguments are put in order."""

    tensors: list[int]
    objects: list[int]


def canonical(
    signature: inspect.Signature | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    as_given: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any], Order | None]:
    """The same call with arguments in the order of the signature, and how what they hold moved.

    Arguments given by name become positional where they can, unless they are to stay ``as_given``.
    Raises TypeError for arguments that do not fit the signature.
    """
    if signature is None:
        return args, kwargs, None
    values = (*args, *kwargs.values())
    tensors = _spans([[x for x in flatten_call(v)[0] if isinstance(x, Tensor)] for v in values])
    objects = _spans([states_of(v) for v in values])
    slots = [*zip(values, tensors, objects, strict=True)]
    count = len(args)
    named = dict(zip(kwargs, slots[count:], strict=True))
    bound = signature.bind(*slots[:count], **named)
    first, rest = bound.args, bound.kwargs
    if as_given:
        first = tuple(slots[:count])
        rest = {n: named[n] for n in (*signature.parameters, *named) if n in named}
    entries = (*first, *rest.values())
    order = Order([i for e in entries for i in e[1]], [i for e in entries for i in e[2]])
    same = order == Order(sorted(order.tensors), sorted(order.objects))
    whole = {name: entry[0] for name, entry in rest.items()}
    return tuple(e[0] for e in first), whole, None if same else order


def canonical_tree(signature: inspect.Signature | None, tree: Tree) -> Tree:
    """The structure of `canonical` arguments, from that of the same ones as they were given."""
    args, kwargs = tree.children
    named = dict(zip(kwargs.keys, kwargs.children, strict=True))
    first, rest, _ = canonical(signature, args.children, named)
    children = (replace(args, children=first), Tree("dict", tuple(rest), tuple(rest.values())))
    return replace(tree, children=children)


def _spans(parts: Sequence[Sequence[Any]]) -> list[range]:
    """Positions of the elements of each part in all parts joined."""
    ends = list(itertools.accumulate(map(len, parts), initial=0))
    return [range(a, b) for a, b in itertools.pairwise(ends)]
