"""Programs that read values: traced for the values at hand, which later calls must have again.

A model may ask tensors for numbers (``grid.tolist()``, ``if mask.any():``, ``x[mask]``), and become
another program for other answers. `Recording` runs beside a trace. What follows from the arguments
alone it also computes for the example, so that a question has an answer, and writes down how that
came about. `Decisions` asks the same of a later call's arguments: where every answer is as it was,
the program is the right one. Answers are compared, not arguments: a mask may differ as long as what
was asked of it does not.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ...runtime.sizes import evaluate
from .. import sizes
from .losses import FUNCTIONS, ctc_arguments, ctc_loss_of_numbers

READS = frozenset(
    "item tolist numpy equal allclose is_nonzero __bool__ __int__ __float__ __index__ __complex__"
    " __contains__ __array__".split()
)
"""Functions of tensors whose result is no tensor, but depends on values."""
OPEN = frozenset(
    "nonzero argwhere unique unique_consecutive masked_select bincount one_hot repeat_interleave"
    " tensor_split".split()
)
"""Functions whose results have sizes that depend on values."""
SIZED = frozenset(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d expand"
    " interpolate narrow pad repeat reshape roll split tile topk unflatten view".split()
)
"""Functions whose further arguments are numbers, which tensors without dimensions may stand for."""
LIKENESSES = {
    "expand_as": lambda x, other: (Tensor.expand, (x, other.shape)),
    "reshape_as": lambda x, other: (Tensor.reshape, (x, other.shape)),
    "view_as": lambda x, other: (Tensor.view, (x, other.shape)),
    "type_as": lambda x, other: (Tensor.to, (x, other.dtype)),
}
"""Functions of a tensor and another one's size or type: the call that does not take the other."""
MAKERS = frozenset("arange zeros ones full tensor linspace eye".split())
"""Functions that make tensors of numbers."""
LIKES = {"zeros": 0, "ones": 1, "full": None}
"""Functions of tensors' sizes alone, as ``zeros_like`` or ``new_zeros``, and what fills results."""
LIMIT = 1 << 20
"""Tensors with more elements than this are not followed."""


ARGUMENTS, BUFFERS = -1, -2
"""In place of a step's number."""
Place = tuple[dict[str, Any], str, Tensor]
"""A buffer: the dictionary it is in, its key there, and what it is while it is traced."""


@dataclass(frozen=True)
class Ref:
    """Tensor ``leaf`` of what step ``step`` gave, or one of `ARGUMENTS` or `BUFFERS`."""

    step: int
    leaf: int


@dataclass(frozen=True)
class Size:
    """A number computed from sizes of arguments, as `runtime.sizes` takes it.

    ``places``: the names in it, each with the numbers of an argument and of its dimension.
    """

    text: int | str
    places: tuple[tuple[str, int, int], ...]

    def of(self, tensors: Sequence[Tensor]) -> int:
        """The number for these arguments."""
        return evaluate(self.text, {name: tensors[i].shape[d] for name, i, d in self.places})


@dataclass
class Step:
    """A call of a torch function. ``answer`` (in a tuple) is what it has to give, where asked."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    writes: bool = False
    answer: tuple[Any] | None = None


class Decisions:
    """What a program was traced for; `hold` tells whether it is so for a call's tensors."""

    def __init__(self, steps: Sequence[Step], places: Sequence[Place] = ()) -> None:
        self.steps = _needed(steps)
        self._writes = any(s.writes for _, s in self.steps)
        refs = {x for _, s in self.steps for x in _walk((s.args, s.kwargs)) if isinstance(x, Ref)}
        self._places = {r.leaf: places[r.leaf] for r in refs if r.step == BUFFERS}

    def __len__(self) -> int:
        return sum(step.answer is not None for _, step in self.steps)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every question has the answer it had. Nothing that is given is changed."""
        given = [t.clone() for t in tensors] if self._writes else tensors
        buffers = {i: table.get(name) for i, (table, name, _) in self._places.items()}
        known: dict[int, Any] = {ARGUMENTS: given, BUFFERS: buffers}

        def value(x: Any) -> Any:
            if isinstance(x, Size):
                return x.of(given)
            return known[x.step][x.leaf] if isinstance(x, Ref) else x

        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for number, step in self.steps:
                try:
                    result = step.func(*_map(value, step.args), **_map(value, step.kwargs))
                except Exception:  # earlier answers hold, but sizes do not fit: another program
                    return False
                if step.answer is not None and not _same(result, step.answer[0]):
                    return False
                known[number] = _leaves(result)
        return True


class Recording(TorchFunctionMode):
    """Within it, questions to tensors that follow from the arguments are answered.

    So are those that follow from buffers of the modules below ``roots``.
    """

    def __init__(self, examples: Sequence[Tensor], roots: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._examples = examples
        tables = [m._buffers for m in dict.fromkeys(m for root in roots for m in root.modules())]
        self._places = [(t, k, x) for t in tables for k, x in t.items() if x is not None]
        self.begin(())

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Starts anew, with what stands for the examples in the trace."""
        self.steps: list[Step] = []
        self._refs: dict[int, tuple[Ref, Tensor]] = {}  # what stands for a known tensor: kept alive
        self._values: dict[Ref, Tensor] = {}
        self._given: set[int] = set()
        self._places_of: dict[Any, tuple[int, int]] = {}  # symbols of sizes
        examples = self._examples[: len(tensors)]
        for i, (stand_in, example) in enumerate(zip(tensors, examples, strict=True)):
            self._give(stand_in, Ref(ARGUMENTS, i), example)
            for d, size in enumerate(stand_in.shape):
                if isinstance(size, SymInt):
                    self._places_of.setdefault(size.node.expr, (i, d))
        for i, (table, name, example) in enumerate(self._places):
            if isinstance(stand_in := table.get(name), Tensor):
                self._give(stand_in, Ref(BUFFERS, i), example)

    def _give(self, stand_in: Tensor, ref: Ref, example: Tensor) -> None:
        self._given.add(_storage(stand_in))
        if example.is_cpu and example.numel() <= LIMIT:
            self._know(stand_in, ref, example)

    def decisions(self) -> Decisions | None:
        """The questions that were asked, if any."""
        found = Decisions(self.steps, self._places)
        return found if len(found) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if isinstance(func, torch._ops.OpOverload):
            name = func._schema.name.split("::")[-1]
        if name in LIKENESSES and len(args) == 2 and args[0].device == args[1].device:
            func, args = LIKENESSES[name](*args)
            name = func.__name__
        if name == "__iter__":
            return iter(args[0].unbind(0)) if self._knows(args[0]) else func(*args, **kwargs)
        if name == "masked_select" and len(args) == 2 and self._knows(args[1]):
            if args[0].shape == args[1].shape:
                func, name = Tensor.__getitem__, "__getitem__"
        if name == "__getitem__":  # of masks it shall ask where they are set, not what is there
            args, kwargs = self._settled(name, args, kwargs)
        if func in FUNCTIONS and (given := self._loss(func, args, kwargs)):
            func, args, kwargs = ctc_loss_of_numbers, given, {}
        inputs = [x for x in _walk((args, kwargs)) if isinstance(x, Tensor)]
        writes = _written(func, name, inputs, kwargs)
        known = all(id(x) in self._refs for x in inputs) and bool(inputs or name in MAKERS)
        known = known and all(map(self._is_fixed, _walk((args, kwargs))))
        asks = name in READS or name in OPEN or (name == "where" and len(inputs) == 1)
        asks = asks or (name in MAKERS and bool(inputs))
        asks = asks or (name == "__getitem__" and any(map(_is_mask, inputs[1:])))
        if not (known and asks):
            args, kwargs = self._settled(name, args, kwargs)
        if not known:
            self._forget(writes)
            result = func(*args, **kwargs)
            self._fill(name, args, kwargs, result)
            return result
        if any(_storage(x) in self._given for x in writes):
            self._forget(writes)
            return func(*args, **kwargs)
        if asks:
            try:
                real = self._compute(func, args, kwargs)
            except Exception:
                real = None
            if real is not None:
                return self._answer(func, args, kwargs, real[0])
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if sum(map(_count, _leaves(result))) > LIMIT or not self._note(
            func, args, kwargs, bool(writes), result
        ):
            self._forget(writes)
        return result

    def _compute(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The result for the examples; None where it depends on chance."""
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            generator = torch.default_generator
            before = generator.get_state()
            result = func(*_map(self._real, args), **_map(self._real, kwargs))
            if torch.equal(generator.get_state(), before):
                return (result,)
            generator.set_state(before)
            return None

    def _answer(self, func: Any, args: Any, kwargs: Any, real: Any) -> Any:
        """Notes a question; gives the answer, in which tensors are constants of the trace."""
        number = len(self.steps)
        with _disable_current_modes():
            kept = copy.deepcopy(real)  # the example may be written to later
        step = Step(func, _map(self._ref, args), _map(self._ref, kwargs), answer=(kept,))
        self.steps.append(step)
        leaf = iter(range(len(_leaves(real))))

        def constant(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            made = torch.ops.aten.lift_fresh_copy.default(x.clone())
            self._know(made, Ref(number, next(leaf)), x)
            return made

        return _map(constant, real)

    def _note(self, func: Any, args: Any, kwargs: Any, writes: bool, result: Any) -> bool:
        """Notes a call and its result for the examples; False where that is not known."""
        try:
            real = self._compute(func, args, kwargs)
        except Exception:
            return False
        found, values = _leaves(result), [] if real is None else _leaves(real[0])
        if real is None or len(found) != len(values):
            return False
        if values or writes:
            step = Step(func, _map(self._ref, args), _map(self._ref, kwargs), writes)
            self.steps.append(step)
            for i, (x, value) in enumerate(zip(found, values, strict=True)):
                self._know(x, Ref(len(self.steps) - 1, i), value)
        return True

    def _fill(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Knows a tensor that was filled with a number in the sizes of others."""
        kind = name.removeprefix("new_").removesuffix("_like")
        if kind == name or kind not in LIKES or not all(map(self._is_fixed, result.shape)):
            return
        value = LIKES[kind]
        if value is None:
            value = kwargs.get("fill_value", args[-1])
        if isinstance(value, int | float) and result.device.type == "cpu":
            made = tuple(result.shape), value
            self._note(torch.full, made, {"dtype": result.dtype}, False, result)

    def _settled(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments in which what decides on sizes, and is known, is a number or an index."""
        if name in ("__getitem__", "__setitem__") and len(args) > 1:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return (args[0], tuple(self._index(args[0], index)), *args[2:]), kwargs
        if name == "repeat_interleave" and len(args) > 1 and self._knows(args[1]):
            times = self._ask(Tensor.tolist, args[1].view(-1))
            dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
            count = args[0].numel() if dim is None else args[0].shape[dim]
            total = times[0] * count if len(times) == 1 else sum(times)
            kwargs = {**kwargs, "output_size": total}
        if name in SIZED and args:
            args, kwargs = (args[0], *_map(self._number, args[1:])), _map(self._number, kwargs)
        return args, kwargs

    def _loss(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
        """Arguments of a loss whose lengths are numbers; None where these are not known."""
        given = ctc_arguments(func, args, kwargs)
        if given is None or torch._C._is_any_autocast_enabled():  # it does not reach the operator
            return None
        for i in (2, 3):
            if self._knows(given[i]):
                given[i] = self._ask(Tensor.tolist, given[i])
            elif any(isinstance(x, Tensor) or _symbolic(x) for x in _walk(given[i])):
                return None
        return tuple(given)

    def _index(self, tensor: Tensor, index: Sequence[Any]) -> Iterator[Any]:
        place: int | None = 0  # the dimension that the next part is for
        for part in index:
            mask = self._knows(part) and _is_mask(part) and part.dim() > 0
            wide = part.dim() if mask else 1
            if part is Ellipsis or isinstance(part, bool):
                place = None
            if mask and place is not None and tensor.shape[place : place + wide] == part.shape:
                yield from self._ask(functools.partial(torch.nonzero, as_tuple=True), part)
            elif isinstance(part, slice):
                ends = (part.start, part.stop, part.step)
                yield slice(*(self._ask(Tensor.item, x) if self._knows(x) else x for x in ends))
            elif isinstance(part, list | tuple) and any(isinstance(x, Tensor) for x in part):
                # torch would read the numbers
                yield self.__torch_function__(torch.stack, (), (list(map(torch.as_tensor, part)),))
            else:
                yield part
            if place is not None and part is not None:
                place += wide

    def _number(self, x: Any) -> Any:
        whole = self._knows(x) and x.dim() == 0 and not x.is_floating_point()
        return self._ask(Tensor.item, x) if whole else x

    def _ask(self, func: Any, tensor: Tensor) -> Any:
        real = self._compute(func, (tensor,), {})
        assert real is not None
        return self._answer(func, (tensor,), {}, real[0])

    # -- what is known --------------------------------------------------------------------------

    def _know(self, stand_in: Tensor, ref: Ref, value: Tensor) -> None:
        self._refs[id(stand_in)] = (ref, stand_in)
        self._values[ref] = value

    def _knows(self, x: Any) -> bool:
        return isinstance(x, Tensor) and id(x) in self._refs

    def _ref(self, x: Any) -> Any:
        if isinstance(x, SymInt):
            return self._size(x)
        return self._refs[id(x)][0] if isinstance(x, Tensor) else x

    def _size(self, number: SymInt) -> Size | None:
        """How a number follows from the arguments' sizes; None where that is not known."""
        symbols = number.node.expr.free_symbols
        if not all(s in self._places_of for s in symbols):
            return None
        try:
            found = sizes.text(number)
        except NotImplementedError:
            return None
        return Size(found, tuple((str(s), *self._places_of[s]) for s in symbols))

    def _is_fixed(self, x: Any) -> bool:
        """Whether it is known what will be given, besides tensors, in another call."""
        if isinstance(x, SymInt):
            return self._size(x) is not None
        return not _symbolic(x) and not isinstance(x, torch.Generator)

    def _value(self, x: Tensor) -> Tensor:
        return self._values[self._refs[id(x)][0]]

    def _real(self, x: Any) -> Any:
        if isinstance(x, SymInt):
            return x.node.hint
        return self._value(x) if isinstance(x, Tensor) else x

    def _forget(self, written: Sequence[Tensor]) -> None:
        """No longer knows what shares memory with these."""
        places = set(map(_storage, written))
        if places:
            gone = [key for key, (_, x) in self._refs.items() if _storage(x) in places]
            for key in gone:
                del self._refs[key]


def _needed(steps: Sequence[Step]) -> list[tuple[int, Step]]:
    """The steps, numbered, that lead to answers. All that write are kept: they may write views."""
    wanted: set[int] = set()
    kept: list[tuple[int, Step]] = []
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        if step.answer is not None or step.writes or number in wanted:
            kept.append((number, step))
            wanted |= {x.step for x in _walk((step.args, step.kwargs)) if isinstance(x, Ref)}
    return kept[::-1]


def _written(func: Any, name: str, inputs: list[Tensor], kwargs: dict[str, Any]) -> list[Tensor]:
    """Those of a call's tensors that it may write."""
    if isinstance(func, torch._ops.OpOverload):
        return inputs if func._schema.is_mutable else []
    if "out" in kwargs:
        return inputs
    if name.startswith("__"):
        plain = ("__index__", "__int__", "__invert__", "__iter__")
        writes = name in ("__setitem__", "__set__") or (name[2] == "i" and name not in plain)
    else:
        writes = name.endswith("_") or bool(kwargs.get("inplace"))
    return inputs[:1] if writes else []


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` of everything in its tuples, lists, dictionaries and slices."""
    if isinstance(value, tuple):
        found = [_map(function, x) for x in value]
        return type(value)(found) if hasattr(value, "n_fields") else tuple(found)
    if isinstance(value, list):
        return [_map(function, x) for x in value]
    if isinstance(value, dict):
        return {k: _map(function, x) for k, x in value.items()}
    if isinstance(value, slice):
        return slice(*(_map(function, x) for x in (value.start, value.stop, value.step)))
    return function(value)


def _walk(value: Any) -> list[Any]:
    found: list[Any] = []
    _map(found.append, value)
    return found


def _leaves(value: Any) -> list[Tensor]:
    return [x for x in _walk(value) if isinstance(x, Tensor)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, Tensor):
        return isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(b, float | complex):
        return repr(a) == repr(b)  # 0.0 and -0.0 differ, nan equals itself
    if hasattr(b, "tobytes"):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def _count(tensor: Tensor) -> int:
    """How many elements there are, for the example."""
    total = 1
    for size in tensor.shape:
        total *= size if isinstance(size, int) else (size.node.hint or 0)
    return total


def _symbolic(x: Any) -> bool:
    return isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
