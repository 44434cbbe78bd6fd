"""FX graphs with symbolic shapes as plain JSON values, and back. Nothing here runs saved text.

A graph is a list of nodes with operator names, arguments and the shape, stride, dtype and device of
every result. Sizes are trees of integer functions from a fixed list. Loading rebuilds fake tensors
from those, so it neither runs operators nor needs the model's Python code.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as torch_functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from ...passes.base import module_of

_PYTHON: dict[str, Any] = {
    **{
        f"operator.{n}": getattr(operator, n)
        for n in """getitem add sub mul floordiv mod neg pow truediv eq ne lt le gt ge and_ or_ not_
        abs pos""".split()
    },
    **{f"math.{n}": getattr(math, n) for n in ("ceil", "floor", "trunc")},
    **{
        f"torch.{n}": getattr(torch, n)
        for n in "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum".split()
        if hasattr(torch, n)
    },
}
_NAMES = {f: n for n, f in _PYTHON.items()}

_FUNCTIONS: dict[str, Any] = {
    f.__name__: f
    for f in (
        sympy.Add, sympy.Mul, sympy.Pow, sympy.And, sympy.Or, sympy.Not, sympy.Eq, sympy.Ne,
        sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Rational,
    )
}  # fmt: skip
_FUNCTIONS |= {
    n: getattr(torch_functions, n)
    for n in """CeilToInt CleanDiv FloatPow FloatTrueDiv FloorDiv FloorToInt Identity IntTrueDiv
    Max Min Mod ModularIndexing PowByNatural PythonMod RoundToInt ToFloat TruncToFloat TruncToInt
    Where""".split()
    if hasattr(torch_functions, n)
}


class Unsavable(ValueError):
    """Something in a program has no place in a file."""


def expression_to_json(expr: Any) -> Any:
    """A sympy expression as ints, symbol names and lists ``[function, argument, ...]``."""
    if isinstance(expr, bool | int):
        return expr
    if expr in (sympy.true, sympy.false):
        return bool(expr)
    if expr.is_Symbol:
        return expr.name
    if expr.is_Integer:
        return int(expr)
    if isinstance(expr, sympy.Rational):
        return ["Rational", int(expr.p), int(expr.q)]
    if isinstance(expr, sympy.Float):
        return ["Float", float(expr)]
    name = type(expr).__name__
    if name not in _FUNCTIONS:
        raise Unsavable(f"size {expr} uses {name}")
    return [name, *map(expression_to_json, expr.args)]


class Symbols:
    """One shape environment for everything loaded together: symbols and expressions by name."""

    def __init__(
        self, ranges: Mapping[str, tuple[int, int | None]], hints: Mapping[str, int]
    ) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.hints = dict(hints)
        self.ranges = dict(ranges)
        self._known: dict[str, sympy.Symbol] = {}

    def symbol(self, name: str) -> sympy.Symbol:
        """The symbol called ``name``; one without a range is unbacked (known only at run time)."""
        if name not in self._known:
            backed = name in self.ranges
            made = sympy.Symbol(name, integer=True, **({"positive": True} if backed else {}))
            low, high = self.ranges[name] if backed else (0, None)
            upper = int_oo if high is None else high
            # Also notes where the limits come from, without which torch cannot narrow them.
            self.env._update_var_to_range(made, ValueRanges(low, upper))  # type: ignore[arg-type]
            if backed:
                self.env.add_backed_var_to_val(made, self.hints[name])
            self._known[name] = made
        return self._known[name]

    def expression(self, data: Any) -> Any:
        """The inverse of `expression_to_json`."""
        if isinstance(data, bool):
            return sympy.true if data else sympy.false
        if isinstance(data, int):
            return sympy.Integer(data)
        if isinstance(data, str):
            return self.symbol(data)
        if data[0] == "Float":
            return sympy.Float(data[1])
        return _FUNCTIONS[data[0]](*map(self.expression, data[1:]))

    def size(self, data: Any) -> Any:
        """An int or SymInt."""
        if isinstance(data, int):
            return data
        expr = self.expression(data)
        if expr.is_Integer:
            return int(expr)
        hint: int | None = None
        if all(s.name in self.hints for s in expr.free_symbols):
            hint = int(expr.subs({s: self.hints[s.name] for s in expr.free_symbols}))
        return self.env.create_symintnode(expr, hint=hint)


# -- plain values ----------------------------------------------------------------------------------


def value_to_json(value: Any) -> Any:
    """A constant, a node or a container of such as JSON values. Raises Unsavable."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [value_to_json(value.real), value_to_json(value.imag)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [value_to_json(v) for v in value]}
    if isinstance(value, list):
        return [value_to_json(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[value_to_json(k), value_to_json(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [value_to_json(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, type):
        return {"class": f"{value.__module__}:{value.__qualname__}"}
    raise Unsavable(f"a {type(value).__name__} cannot be saved")


def value_from_json(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The inverse of `value_to_json`; a class comes back as its name."""
    if isinstance(data, list):
        return [value_from_json(v, nodes) for v in data]
    if not isinstance(data, dict):
        return data
    ((kind, body),) = data.items()
    if kind == "node":
        return (nodes or {})[body]
    if kind == "torch":
        found = getattr(torch, body)
        if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            raise ValueError(f"torch.{body} is no constant")
        return found
    if kind == "tuple":
        return tuple(value_from_json(v, nodes) for v in body)
    if kind == "slice":
        return slice(*(value_from_json(v, nodes) for v in body))
    if kind == "dict":
        return {value_from_json(k, nodes): value_from_json(v, nodes) for k, v in body}
    if kind == "complex":
        return complex(*(value_from_json(v) for v in body))
    readers: dict[str, Callable[[Any], Any]] = {
        "float": float,
        "bytes": bytes.fromhex,
        "device": torch.device,
        "class": str,
    }
    return readers[kind](body)


# -- graphs ----------------------------------------------------------------------------------------


def graph_to_json(module: fx.GraphModule) -> list[dict[str, Any]]:
    """Every node of ``module``; subgraphs are nested, tensors are left to the caller."""
    out: list[dict[str, Any]] = []
    for node in module.graph.nodes:
        entry: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "get_attr":
            entry["target"] = node.target
            held = getattr(module, node.target)
            if isinstance(held, fx.GraphModule):
                entry["graph"] = graph_to_json(held)
                out.append(entry)
                continue
        elif node.op == "call_function":
            entry["target"] = _target_name(node.target)
            entry["args"] = [value_to_json(a) for a in node.args]
            entry["kwargs"] = {k: value_to_json(v) for k, v in node.kwargs.items()}
        elif node.op == "output":
            entry["args"] = [value_to_json(a) for a in node.args]
        if "val" in node.meta:
            entry["val"] = _meta_to_json(node.meta["val"])
        out.append(entry)
    return out


def graph_from_json(
    data: list[dict[str, Any]],
    tensors: Mapping[str, torch.Tensor],
    symbols: Symbols,
    name: str = "Captured",
) -> fx.GraphModule:
    """The inverse of `graph_to_json`; ``tensors`` are the weights by ``get_attr`` target.

    Raises ValueError, KeyError or TypeError when the data is not what was written.
    """
    graph = fx.Graph()
    root = nn.Module()
    nodes: dict[str, fx.Node] = {}
    for entry in data:
        op = entry["op"]
        args = tuple(value_from_json(a, nodes) for a in entry.get("args", ()))
        kwargs = {k: value_from_json(v, nodes) for k, v in entry.get("kwargs", {}).items()}
        if op == "placeholder":
            node = graph.placeholder(entry["name"])
        elif op == "get_attr":
            target = entry["target"]
            if "graph" in entry:
                child = graph_from_json(entry["graph"], tensors, symbols, target)
                root.add_module(target, child)
            elif not hasattr(root, target):
                root.register_buffer(target, tensors[target])
            node = graph.create_node("get_attr", target, name=entry["name"])
        elif op == "call_function":
            target = _target(entry["target"])
            node = graph.create_node("call_function", target, args, kwargs, entry["name"])
        elif op == "output":
            node = graph.output(args[0])
        else:
            raise ValueError(f"unknown kind of node {op!r}")
        if "val" in entry:
            node.meta["val"] = _meta_from_json(entry["val"], symbols)
        nodes[entry["name"]] = node
    graph.lint()
    return module_of(root, graph, name)


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"op:{target._schema.name}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher:{target.name()}"
    if target in _NAMES:
        return f"python:{_NAMES[target]}"
    raise Unsavable(f"operator {target} cannot be saved")


def _target(text: str) -> Any:
    kind, _, name = text.partition(":")
    if kind == "python":
        return _PYTHON[name]
    if kind == "higher":
        return getattr(torch.ops.higher_order, name)
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    if space == "plait":
        importlib.import_module("...kernels.routing", __package__)  # defines them
    try:
        found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    except AttributeError:
        raise ValueError(
            f"operator {name} is not known here: import the library that defines it"
        ) from None
    return found


def _meta_to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [_size(d) for d in value.shape],
            "stride": [_size(d) for d in value.stride()],
            "device": str(value.device),
        }
    if isinstance(value, torch.SymInt):
        return {"int": _size(value)}
    if isinstance(value, torch.SymBool | torch.SymFloat):
        return {"number": type(value).__name__, "expr": expression_to_json(value.node.expr)}
    if isinstance(value, list | tuple):
        return [_meta_to_json(v) for v in value]
    return {"value": value_to_json(value)}


def _meta_from_json(data: Any, symbols: Symbols) -> Any:
    if isinstance(data, list):
        return tuple(_meta_from_json(v, symbols) for v in data)
    if "dtype" in data:
        shape = [symbols.size(d) for d in data["shape"]]
        stride = [symbols.size(d) for d in data["stride"]]
        dtype = value_from_json({"torch": data["dtype"]})
        with symbols.mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=data["device"])
    if "int" in data:
        return symbols.size(data["int"])
    if "number" in data:
        expr = symbols.expression(data["expr"])
        make = symbols.env.create_symboolnode if data["number"] == "SymBool" else None
        return make(expr) if make else symbols.env.create_symfloatnode(expr, hint=None)
    return value_from_json(data["value"])


def _size(value: Any) -> Any:
    return value if isinstance(value, int) else expression_to_json(value.node.expr)
