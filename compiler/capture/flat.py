"""From what `torch.export` made of a call to one flat graph of ATen operators."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind

from ...kernels.abi import Dim
from ...passes.base import module_of
from ..errors import CaptureError
from . import ops
from .arguments import argument_names, is_plain
from .captured import Captured, InputSpec, Mutation
from .traced import Traced
from .tree import Tree


class Flat:
    """Turns an exported program into a `Captured`."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        traced: Traced,
        tree: Tree,
        leaves: list[Any],
    ) -> None:
        self.program, self.traced, self.tree, self.leaves = program, traced, tree, leaves
        self.source = program.graph_module
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.env: dict[fx.Node, fx.Node] = {}

    def captured(self) -> Captured:
        signature = self.program.graph_signature
        nodes = {n.name: n for n in self.source.graph.nodes if n.op == "placeholder"}
        specs = [(s, nodes[s.arg.name]) for s in signature.input_specs]
        user = [n for s, n in specs if s.kind == InputKind.USER_INPUT]
        state = {
            str(s.target): n for s, n in specs if s.target in signature.buffers_to_mutate.values()
        }
        names = [
            name
            for name, leaf in zip(
                argument_names(self.tree, _parameters(self.traced.target)), self.leaves, strict=True
            )
            if isinstance(leaf, torch.Tensor)
        ]
        inputs = [self._placeholder(n, name) for n, name in zip(user, names, strict=True)]
        inputs += [self._placeholder(n, _own(t)) for t, n in state.items()]
        self._constants([(s, n) for s, n in specs if n not in self.env])
        self._body()
        mutations = self._outputs(user, state)
        symbols, ranges = self._symbols(inputs)
        root = nn.Module()
        for name, value in self.attributes.items():
            if isinstance(value, torch.Tensor):
                root.register_buffer(name, value)
            else:
                root.add_module(name, value)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = module_of(root, self.graph, "Captured")
        out_tree, out_leaves, updates, assigned = self.traced.result.value
        own = self.traced.result.given
        out_leaves = [own.get(x, x) if type(x) is int else x for x in out_leaves]
        guards = self._guards(symbols)
        for leaf in (*out_leaves, *(x for u in updates for x in u.leaves)):
            if isinstance(leaf, sympy.Basic) and not _covered(leaf, symbols):
                raise CaptureError("PLT-CAP-006", "a result is a number computed from tensors")
        return Captured(
            graph_module=module,
            inputs=inputs,
            states=[self._tensor(t) for t in state],
            mutations=mutations,
            symbols=symbols,
            ranges=ranges,
            guards=guards,
            in_tree=self.tree,
            in_leaves=[None if isinstance(x, torch.Tensor) else (x,) for x in self.leaves],
            out_tree=out_tree,
            out_leaves=out_leaves,
            updates=updates,
            assigned=assigned,
            names=self.names,
            aliases=self.aliases,
        )

    def _tensor(self, target: str) -> torch.Tensor:
        program = self.program
        value = program.state_dict.get(target)
        found: Any = program.constants[target] if value is None else value
        return found

    def _placeholder(self, node: fx.Node, name: str) -> InputSpec:
        value = node.meta["val"]
        new = self.graph.placeholder(_identifier(name))
        new.meta = {"val": value}
        self.env[node] = new
        return InputSpec(name, value.dtype, tuple(_dim(d) for d in value.shape), value.device)

    def _constants(self, specs: list[tuple[Any, fx.Node]]) -> None:
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        tied: dict[Any, str] = {}
        for spec, node in specs:
            if spec.kind not in kinds:
                raise CaptureError("PLT-CAP-010", f"the program uses a {spec.kind.name.lower()}")
            tensor = self._tensor(str(spec.target)).detach()
            if not is_plain(tensor):
                name = _own(str(spec.target))
                raise CaptureError(
                    "PLT-CAP-008", f"the weight {name!r} is not a plain dense tensor"
                )
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            name = tied.get(key) if tensor.numel() else None
            own = _own(str(spec.target))
            if name is not None:
                self.aliases[own] = name
            else:
                name = _unique(_identifier(own), self.attributes)
                tied[key] = name
                self.attributes[name] = tensor
                self.names[name] = own
            new = self.graph.create_node("get_attr", name)
            new.meta = {"val": node.meta["val"]}
            self.env[node] = new

    def _body(self) -> None:
        same = {ops.aten(n) for n in ops.IDENTITIES}
        checks = {ops.aten(n) for n in ops.CHECKS}
        for node in self.source.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                name = str(node.target)
                value = getattr(self.source, name)
                own = _unique(_identifier(name), self.attributes)
                self.attributes[own] = value
                new = self.graph.create_node("get_attr", own)
                new.meta = dict(node.meta)
                if isinstance(value, torch.Tensor):
                    new.meta.setdefault("val", value)
                self.env[node] = new
            elif node.op == "call_module":
                continue  # export's own guards, which `Captured.guards` holds as data
            elif node.target in same:
                self.env[node] = self.env[node.args[0]]
            elif getattr(node.meta.get("val"), "is_meta", False):
                raise CaptureError("PLT-CAP-008", f"the result of {node.name!r} is a meta tensor")
            elif node.target not in checks and not self._proven(node):
                new = self.graph.node_copy(node, lambda n: self.env[n])
                new.meta = {
                    k: v
                    for k, v in node.meta.items()
                    if k in ("val", "stack_trace", "nn_module_stack")
                }
                self.env[node] = new

    def _proven(self, node: fx.Node) -> bool:
        """Whether an assertion on sizes follows from the guards: it only has sizes of inputs."""
        name = str(node.target)
        if not name.startswith(("aten._assert_scalar", "aten.sym_constrain_range")):
            return False
        arg = node.args[0]
        value = arg.meta.get("val") if isinstance(arg, fx.Node) else arg
        expr = getattr(getattr(value, "node", None), "expr", None)
        return expr is None or not any(s.name.startswith(("u", "zuf")) for s in expr.free_symbols)

    def _outputs(self, user: list[fx.Node], state: dict[str, fx.Node]) -> list[Mutation]:
        output = next(n for n in self.source.graph.nodes if n.op == "output")
        position = {n.name: i for i, n in enumerate(user)}
        position_of = {t: len(user) + i for i, t in enumerate(state)}
        results: list[Any] = []
        changed: list[tuple[Any, int]] = []
        given: Any = output.args[0]
        for spec, node in zip(self.program.graph_signature.output_specs, given, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                results.append(self.env[node])
            elif spec.kind == OutputKind.USER_INPUT_MUTATION:
                changed.append((self.env[node], position[str(spec.target)]))
            elif spec.kind == OutputKind.BUFFER_MUTATION:
                changed.append((self.env[node], position_of[str(spec.target)]))
            else:
                raise CaptureError("PLT-CAP-010", f"the program has a {spec.kind.name.lower()}")
        flat = (*results, *[n for n, _ in changed])
        self.graph.output(flat).meta = {"val": tuple(n.meta["val"] for n in flat)}
        return [Mutation(len(results) + i, where) for i, (_, where) in enumerate(changed)]

    def _symbols(
        self, inputs: list[InputSpec]
    ) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int | None]]]:
        symbols: dict[str, tuple[int, int]] = {}
        for i, spec in enumerate(inputs):
            for d, dim in enumerate(spec.shape):
                if isinstance(dim, sympy.Symbol):
                    symbols.setdefault(dim.name, (i, d))
        for spec in inputs:
            for dim in spec.shape:
                if not isinstance(dim, int) and not _covered(dim, symbols):
                    reason = f"size {dim} of {spec.name!r} is not the size of any dimension"
                    raise CaptureError("PLT-CAP-011", reason, "declare the base dimension too")
        limits = {str(s): r for s, r in self.program.range_constraints.items()}
        ranges: dict[str, tuple[int, int | None]] = {}
        for name in symbols:
            low, high = 2, None
            if name in limits:
                low = max(2, int(limits[name].lower))
                upper = limits[name].upper
                high = int(upper) if upper.is_Integer else None
            ranges[name] = (low, high)
        return symbols, ranges

    def _guards(self, symbols: Mapping[str, Any]) -> list[sympy.Basic]:
        """Conditions that tracing relied on, besides ranges and equal sizes."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            mode = getattr(value, "fake_mode", None)
            if mode is not None and mode.shape_env is not None:
                found = [g.expr for g in mode.shape_env.guards]
                break
        else:
            return []
        guards: list[sympy.Basic] = []
        for expr in found:
            expr = mode.shape_env.simplify(expr)
            if expr.free_symbols and expr not in guards:
                if not _covered(expr, symbols):
                    raise CaptureError("PLT-CAP-012", f"the condition {expr} cannot be checked")
                guards.append(expr)
        return guards


def _covered(expr: Any, symbols: Mapping[str, Any]) -> bool:
    return all(s.name in symbols for s in expr.free_symbols)


def _dim(size: Any) -> Dim:
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def _own(target: str) -> str:
    """The model's name of a tensor: the wrapper calls the model "target"."""
    return target.removeprefix("target.")


def _identifier(name: str) -> str:
    text = "".join(c if c.isalnum() and c.isascii() else "_" for c in name).strip("_")
    return text if text and not text[0].isdigit() else f"v_{text}"


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _parameters(target: Any) -> list[str]:
    """Names of the positional parameters of ``target``."""
    function = target.forward if isinstance(target, nn.Module) else target
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]
