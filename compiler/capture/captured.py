"""A captured program: a flat functional ATen graph, and how a Python call maps onto it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils._sympy.printers import PythonPrinter

from ...kernels.abi import Dim
from ...passes.remarks import Remark
from ..errors import InputError
from ..guards.settings import Read
from ..weights.absent import Source
from .decisions import Decisions
from .state import Update
from .tree import Tree


@dataclass(frozen=True)
class InputSpec:
    """One placeholder. ``shape`` entries are ints, or expressions over the symbols."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    device: torch.device

    def __str__(self) -> str:
        dims = ", ".join(str(d) for d in self.shape)
        return f"{str(self.dtype)[6:]}[{dims}] on {self.device}"


@dataclass(frozen=True)
class Mutation:
    """Output ``output`` must be copied into input ``input`` after the call."""

    output: int
    input: int


@dataclass
class Captured:
    """A program as data.

    Attributes:
        graph_module: functional ATen operators. Placeholders are tensors, in the order of
            ``inputs``; weights are ``get_attr`` nodes whose attributes are the model's own
            storages (tied ones share one attribute); every node has ``meta["val"]``; the output
            is one flat tuple of tensors.
        inputs: the user's tensors first, then ``states``.
        states: buffers that the program changes, passed in and copied back at every call.
        mutations: outputs that are new values of inputs. They come after the results.
        symbols: for every shape symbol the (input, dimension) that binds it.
        ranges: smallest and largest (None: no limit) value of every symbol.
        guards: conditions over symbols that must hold for the graph to be valid.
        in_tree: structure of ``(args, kwargs)``; ``in_leaves`` has None where a tensor goes and a
            1-tuple ``(value,)`` for everything else, which the graph was specialised on.
        out_tree: structure of the result; ``out_leaves`` has an output's position, an expression
            over the symbols, a 1-tuple ``(value,)``, or what the call was `Given`.
        updates: what becomes of the state objects among the arguments.
        assigned: results that become attributes: (module's number, name, leaf), modules numbered
            as by `Attributes`, leaves as in ``updates``, or a list of such. Each replaces a tensor,
            or a list of as many, not looked at.
        routes: how its calls were routed, once that was learned from them.
        names: for every ``get_attr`` target of the graph the model's own name of the tensor.
        aliases: further names of tied tensors, with the attribute that holds them.
        remarks: what happened during capture.
        reads: attributes that were read of modules and of objects in them.
        decisions: what the graph was made for besides sizes: answers to questions about values.
        occupied: whether it is for branches that get cells: those that get none must not run.
        weights: where the weights come from that are on the meta device, by ``get_attr`` target.
    """

    graph_module: fx.GraphModule
    inputs: list[InputSpec]
    states: list[torch.Tensor]
    mutations: list[Mutation]
    symbols: dict[str, tuple[int, int]]
    ranges: dict[str, tuple[int, int | None]]
    guards: list[Any]
    in_tree: Tree
    in_leaves: list[Any]
    out_tree: Tree
    out_leaves: list[Any]
    names: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    assigned: list[tuple[int, str, Any]] = field(default_factory=list)
    routes: Any = None
    reads: set[Read] = field(default_factory=set)
    decisions: Decisions | None = None
    occupied: bool = False
    weights: Source | None = None

    @property
    def num_tensors(self) -> int:
        """How many tensors the caller passes."""
        return len(self.inputs) - len(self.states)

    def signature(self) -> str:
        """The tensors the caller passes, as text."""
        return ", ".join(f"{s.name}: {s}" for s in self.inputs[: self.num_tensors])

    def constants(self) -> dict[str, torch.Tensor]:
        """The weights by the name of their attribute."""
        found = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "get_attr" and node.target not in found:
                value = getattr(self.graph_module, node.target)
                if isinstance(value, torch.Tensor):
                    found[node.target] = value
        return found

    def binder(self) -> Callable[[Sequence[Sequence[int]]], tuple[Any, ...]]:
        """A function from the shapes of the user's tensors to the symbolic results."""
        return self.evaluator([x for x in self.all_leaves() if isinstance(x, sympy.Basic)])

    def all_leaves(self) -> list[Any]:
        """Leaves of the result, then those of the updates."""
        return [*self.out_leaves, *(x for u in self.updates for x in u.leaves)]

    def evaluator(
        self, exprs: Sequence[Dim]
    ) -> Callable[[Sequence[Sequence[int]]], tuple[int, ...]]:
        """A function from the shapes of the user's tensors to the values of expressions."""
        return self._function(f"({''.join(_code(e) + ', ' for e in exprs)})")

    def matcher(self) -> Callable[[Sequence[Sequence[int]]], bool]:
        """A function that tells whether shapes (of right rank) satisfy every guard."""
        conditions: list[str] = []
        for i, spec in enumerate(self.inputs[: self.num_tensors]):
            for d, dim in enumerate(spec.shape):
                if not (isinstance(dim, sympy.Symbol) and self.symbols.get(dim.name) == (i, d)):
                    conditions.append(f"shapes[{i}][{d}] == {_code(dim)}")
        for name, (low, high) in self.ranges.items():
            conditions.append(
                f"{name} >= {low}" + ("" if high is None else f" and {name} <= {high}")
            )
        conditions += [f"({_code(g)})" for g in self.guards]
        return self._function(" and ".join(conditions) or "True")

    def _function(self, result: str) -> Callable[..., Any]:
        lines = ["def function(shapes):"]
        lines += [f"    {n} = shapes[{i}][{d}]" for n, (i, d) in self.symbols.items()]
        lines.append(f"    return {result}")
        namespace: dict[str, Any] = {"math": math, "torch": torch}  # which the printer names
        exec("\n".join(lines), namespace)  # the text is printed from expressions, never read
        return namespace["function"]


def _code(expr: Any) -> str:
    return str(expr) if isinstance(expr, int) else PythonPrinter().doprint(expr)


def describe(tensor: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(tensor, torch.Tensor):
        return f"{str(tensor.dtype)[6:]}{list(tensor.shape)} on {tensor.device}"
    return f"{type(tensor).__name__} {tensor!r}"[:80]


def check_tensors(captured: Captured, tensors: Sequence[Any]) -> Mapping[str, str]:
    """What is wrong with ``tensors``: for every misfit its input's name and a sentence."""
    wrong: dict[str, str] = {}
    values: dict[str, int] = {}
    for i, (spec, tensor) in enumerate(zip(captured.inputs, tensors, strict=False)):
        fits = isinstance(tensor, torch.Tensor) and tensor.dtype == spec.dtype
        if not fits or tensor.device != spec.device or tensor.dim() != len(spec.shape):
            wrong[spec.name] = f"expected {spec}, got {describe(tensor)}"
            continue
        for d, (dim, size) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
            if isinstance(dim, sympy.Symbol) and captured.symbols.get(dim.name) == (i, d):
                values[dim.name] = size
                low, high = captured.ranges.get(dim.name, (0, None))
                if size < low or (high is not None and size > high):
                    limits = f"at least {low}" if high is None else f"from {low} to {high}"
                    wrong[spec.name] = (
                        f"expected dimension {d} to be {limits}, got {size} in {describe(tensor)}"
                    )
    for spec, tensor in zip(captured.inputs, tensors, strict=False):
        if spec.name in wrong:
            continue
        for d, dim in enumerate(spec.shape):
            want = dim if isinstance(dim, int) else _value(dim, values)
            if want is not None and tensor.shape[d] != want:
                why = "" if isinstance(dim, int) else f" = {dim}"
                wrong[spec.name] = (
                    f"expected dimension {d} to be {want}{why}, got {describe(tensor)}"
                )
    if not wrong:
        for guard in captured.guards:
            if guard.subs({s: values.get(s.name, s) for s in guard.free_symbols}) == sympy.false:
                dims = {n: captured.inputs[i].name for n, (i, _) in captured.symbols.items()}
                names = sorted({dims[s.name] for s in guard.free_symbols if s.name in dims})
                wrong[", ".join(names)] = f"sizes must satisfy {guard} ({values})"
    return wrong


def _value(dim: Any, values: Mapping[str, int]) -> int | None:
    got = dim.subs({s: values[s.name] for s in dim.free_symbols if s.name in values})
    return int(got) if got.is_Integer else None


def misfit(
    known: Sequence[Captured],
    tensors: Sequence[torch.Tensor],
    given: Iterable[tuple[str, Any]],
) -> InputError:
    """What to tell someone who calls a loaded program with arguments it has no graph for.

    ``known`` are the graphs that come near, ``given`` the arguments' leaves with their names.
    """
    found = [check_tensors(c, tensors) for c in known if c.num_tensors == len(tensors)]
    wrong = min((w for w in reversed(found) if w), key=len, default=None)
    if wrong:
        text = "; ".join(f"argument {n!r}: {why}" for n, why in wrong.items())
        return InputError("PLT-INP-002", text)
    wants = " or ".join(
        "(" + ", ".join(f"{s.name}: {s}" for s in c.inputs[: c.num_tensors]) + ")" for c in known
    )
    got = ", ".join(f"{n}: {describe(x)}" for n, x in given)
    return InputError("PLT-INP-001", f"expected {wants}, got ({got})")
