"""Capture: a Python call of a module or function becomes one flat graph of ATen operators.

`torch.export` (non-strict) traces a thin wrapper that takes only tensors: everything else in the
arguments is baked in and reported in `Captured.in_leaves`, and results are flattened by
`capture.tree`. So export never sees containers, model outputs or Python scalars, and their
kinds need no registration.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.parameter import is_lazy

from ...kernels.abi import Dim
from ...passes.remarks import Remark
from ..errors import CaptureError, ChangeError
from ..guards.watch import Attributes, modules_of
from . import ops
from .arguments import SCALARS, argument_names, distinct, is_plain
from .as_eager import as_eager
from .captured import Captured, InputSpec, Mutation
from .decisions import Recording
from .experts import routed_experts
from .hooks import check_modules
from .limits import CheckedSizes, Untouched
from .quiet import quiet
from .recorded import unhooked
from .state import Given, Tracked, Update
from .tree import Tree, flatten, unflatten

EXCLUSIVE = threading.RLock()
"""Export swaps a module's weights for fakes while it traces, and patches torch."""

Dynamic = Mapping[int, Any]
"""Dimension number -> `torch.export.Dim` (or ``Dim.AUTO``) of one tensor."""


def capture(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: Sequence[Dynamic] | None = None,
    decide: bool = False,
) -> Captured:
    """The graph of ``target(*args, **kwargs)``.

    ``dynamic`` has one entry per tensor among the leaves of ``(args, kwargs)``; without it all
    sizes are constants. Open dimensions must have a size of at least 2 in the example, and a
    symbol's smallest size is never below 2, for sizes 0 and 1 change how torch broadcasts: such
    calls need a capture of their own.

    With ``decide``, what the program asks of tensors' values is answered as for the example, and is
    in `Captured.decisions`.

    Raises CaptureError with torch's reason in one line.
    """
    leaves, tree = flatten((tuple(args), dict(kwargs)))
    _check_inputs(leaves, tree)
    traced = _Traced(target, leaves, tree)
    roots = modules_of(target)
    weights = [t for m in roots for t in (*m.parameters(), *m.buffers())]
    if any(map(is_lazy, weights)):
        raise CaptureError("PLT-CAP-020", "weights get their shapes at the first call")
    check_modules(roots)
    tensors = distinct([x for x in leaves if isinstance(x, torch.Tensor)], weights)
    shapes = None
    if dynamic:
        tensors = list(map(_packed, tensors))
        shapes = (tuple(dict(d) or None for d in dynamic),)
    if decide:
        traced.recording = Recording(tensors, roots)
    try:
        with EXCLUSIVE, quiet():
            program, remarks = _export(target, traced, tuple(tensors), shapes, roots)
            # Autocast's conversions appear only when the program is traced through again.
            if torch._C._is_any_autocast_enabled() or ops.needs_decomposition(program):
                program = program.run_decompositions(ops.decompositions())
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many kinds, all of them mean the same here
        raise CaptureError("PLT-CAP-001", _first_line(error), _hint(error)) from error
    captured = _Flat(program, traced, tree, leaves).captured()
    captured.remarks += remarks
    if traced.recording is not None:
        captured.decisions = traced.recording.decisions()
    return captured


def _export(
    target: Any,
    traced: _Traced,
    tensors: tuple[torch.Tensor, ...],
    shapes: Any,
    roots: list[nn.Module],
) -> tuple[Any, list[Remark]]:
    """torch's exported program, with what `routed_experts` puts in place where that helps."""

    def export() -> Any:
        traced.attributes = attributes = Attributes(roots)
        try:
            return torch.export.export(traced, tensors, dynamic_shapes=shapes, strict=False)
        finally:
            attributes.restore()

    with routed_experts(target) as count:
        if not count:
            return export(), []
        try:
            return export(), []
        except CaptureError:
            raise  # the model's way is refused, too
        except Exception as error:
            reason = f"{count} modules keep the model's way: {_first_line(error)}"
    hint = "their experts_implementation then decides how they run"
    return export(), [Remark("PLT-CAP-021", "missed", "capture", (), reason, hint)]


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose strides follow from its sizes, those of dimensions of size 1 included: others
    would be symbols of their own, which no call's sizes tell.
    """
    for order in (torch.contiguous_format, torch.channels_last):
        if tensor.is_contiguous(memory_format=order):
            return tensor.clone(memory_format=order)
    return tensor.clone()


class _Traced(nn.Module):
    """Takes the tensor leaves of a call, returns the tensor leaves of its result."""

    def __init__(self, target: Callable[..., Any], leaves: list[Any], tree: Tree) -> None:
        super().__init__()
        self.target = target  # a module is registered by this: its weights become lifted
        self._call = (leaves, tree)
        self.result = _Holder()
        self.attributes: Attributes | None = None
        self.recording: Recording | None = None
        self.roots = modules_of(target)
        self.training = getattr(target, "training", False)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        supply = iter(tensors)
        leaves, tree = self._call
        given = [next(supply) if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = unflatten(tree, given)
        tracked = Tracked((args, kwargs))
        before, _ = flatten((args, kwargs), marks=tracked.given)
        if self.attributes is not None:
            self.attributes.begin()
        recording = contextlib.nullcontext() if self.recording is None else self.recording
        if self.recording is not None:
            self.recording.begin(tensors)
        untouched = Untouched(self.attributes.held() if self.attributes else ())
        with CheckedSizes(), unhooked(self.roots), as_eager(), recording, untouched:
            out = self.target(*args, **kwargs)
        after, tree_after = flatten((args, kwargs), marks=tracked.given)
        same = len(after) == len(before) and all(
            a is b or (not isinstance(a, torch.Tensor) and a == b)
            for a, b in zip(after, before, strict=True)
        )
        if not same or tree_after.count != len(before):
            raise CaptureError(
                "PLT-CAP-005", "the program changes a container it is given", "return it instead"
            )
        assigned = self._assigned(untouched)
        changed = self.attributes.changed() if self.attributes is not None else None
        if changed is not None:
            error = ChangeError(
                "PLT-CAP-019",
                f"the program changes the attribute {changed[0]!r} of a module",
                "make it a buffer that is written in place, or return it",
            )
            error.noticed = changed[1]
            raise error
        flat, out_tree = flatten(out, objects=True, marks=tracked.given)
        changes = list(tracked.changes())
        found: list[torch.Tensor] = []
        own = {id(t): Given(i, tensor=True) for i, t in enumerate(tensors)}
        # Not the tensors themselves: export objects to fake tensors that survive the trace.
        slots = [_slot(x, found, {}) for x in flat]
        updates = [Update(n, t, [_slot(x, found, own) for x in xs]) for n, xs, t in changes]
        kept = [(i, name, _slot(x, found, own)) for i, name, x in assigned]
        if not found:
            raise CaptureError("PLT-CAP-007", "no result is a tensor")
        self.result.value = out_tree, slots, updates, kept
        return tuple(found)

    def _assigned(self, untouched: Untouched) -> list[tuple[int, str, torch.Tensor]]:
        """Attributes that the program gives other tensors without a look at those they held. They
        are put back, and a run will assign them.
        """
        attributes = self.attributes
        found = [] if attributes is None else list(attributes.replaced())
        if attributes is None or untouched.touched:
            return []
        for number, name, _ in found:
            attributes.put_back(number, name)
        return found


class _Holder:
    """Keeps a value set while tracing: export puts plain attributes of a module back."""

    value: tuple[Tree, list[Any], list[Update], list[tuple[int, str, Any]]]


def _slot(leaf: Any, found: list[torch.Tensor], given: Mapping[int, Given]) -> Any:
    """What stands for a leaf in `Captured`; tensors that were not given are added to ``found``."""
    if isinstance(leaf, torch.Tensor):
        if id(leaf) in given:
            return given[id(leaf)]
        found.append(leaf)
        return len(found) - 1
    if isinstance(leaf, torch.SymFloat | torch.SymBool):
        raise CaptureError("PLT-CAP-006", "a result is a number computed from tensors")
    if isinstance(leaf, torch.SymInt):
        expr = leaf.node.expr
        return (int(expr),) if expr.is_Integer else expr
    return leaf if isinstance(leaf, Given) else (leaf,)


def _check_inputs(leaves: list[Any], tree: Tree) -> None:
    for name, leaf in zip(argument_names(tree), leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            if not is_plain(leaf):
                raise CaptureError("PLT-CAP-008", f"argument {name!r} is not a plain dense tensor")
        elif not isinstance(leaf, SCALARS):
            kind = type(leaf).__name__
            raise CaptureError(
                "PLT-CAP-009",
                f"argument {name!r} is a {kind}, whose contents cannot be checked at later calls",
                "pass tensors, numbers, texts and containers of them",
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300]


def _hint(error: BaseException) -> str:
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "make the choice a torch.cond or torch.where, or leave it outside"
    return ""


class _Flat:
    """Turns an exported program into a `Captured`."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        traced: _Traced,
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
        module = fx.GraphModule(root, self.graph, "Captured")
        out_tree, out_leaves, updates, assigned = self.traced.result.value
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
