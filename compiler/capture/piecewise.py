"""Decomposes exported programs operator by operator, where tracing them anew would give the same.

`torch.export.ExportedProgram.run_decompositions` traces the whole program once more, which takes
longer than the export did, though most operators stay as they are. Here only operators that have
parts are traced, each alone, and writing in place becomes an ordinary operator. What is not certain
to come out the same is left to torch.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from ...passes.ir import COND, fake_mode_of, is_mutating, is_random
from ..errors import CaptureError
from . import ops
from .decompose import Tables, decomposed_anew, tables
from .spared import no_modules
from .written import PLAIN, chain, laid_out, put_back, writes_windows

_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "seq_nr")


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """``program``, which is changed, in the operators that a captured graph may hold. For one
    thread at a time.

    Raises CaptureError for operators that update what they do not say they write, and for those
    that write what torch would put back wrongly.
    """
    if any(map(ops.updates, program.graph.nodes)):
        raise CaptureError("PLT-CAP-016", "an instance norm updates its running statistics")
    if any(map(writes_windows, program.graph.nodes)):
        reason = "the program writes to windows of a tensor that overlap or leave gaps"
        raise CaptureError("PLT-CAP-010", reason, "write to the tensor itself")
    found = tables()
    # Autocast's conversions appear only when the program is traced through again.
    if found is not None and not torch._C._is_any_autocast_enabled():
        with contextlib.suppress(_Uncertain):
            with _Traces(found, fake_mode_of(program.graph)) as traces:
                program.graph_module.graph = _Pieces(program.graph_module, traces).graph()
            return program
    return decomposed_anew(program)


class _Uncertain(Exception):
    """Whether tracing anew would give the same is not known."""


class _Traces(contextlib.ExitStack):
    """What the traces of operators have around them: nothing until the first one."""

    def __init__(self, found: Tables, mode: FakeTensorMode) -> None:
        super().__init__()
        self.tables, self.mode, self.begun = found, mode, False

    def of(self, call: Callable[..., Any], *values: Any) -> fx.GraphModule:
        """The operators that ``call`` comes to."""
        if not self.begun:
            self.enter_context(self.tables.used())
            self.enter_context(no_modules())
            self.enter_context(enable_python_dispatcher())
            self.enter_context(self.mode)
            self.enter_context(torch.no_grad())
            self.begun = True
        return make_fx(call, decomposition_table=dict(self.tables.others))(*values)


class _Pieces:
    """Makes the new graph of a module. ``env`` has what stands for the old one's nodes: a node, or,
    for operators with several results, nodes in the containers that the results came in.
    """

    def __init__(self, root: fx.GraphModule, traces: _Traces) -> None:
        self.source, self.root, self.traces = root.graph, root, traces
        self.tables, self.mode = traces.tables, traces.mode
        self.new = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.order = {node: i for i, node in enumerate(self.source.nodes)}
        self.sharing: dict[int, list[fx.Node]] = {}
        for node in self.source.nodes:
            for storage in _storages(node):
                self.sharing.setdefault(storage, []).append(node)

    def graph(self) -> fx.Graph:
        for node in self.source.nodes:
            self.env[node] = self._made(node)
        return self.new

    def _made(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return self.new.node_copy(node, self.env.__getitem__)
        if "val" not in node.meta or is_random(node):
            raise _Uncertain
        if node.target is operator.getitem:
            made = self.env[node.args[0]]  # type: ignore[index]
            if not isinstance(made, fx.Node):
                return made[node.args[1]]
        elif node.target is COND:
            self._sides(node)
        elif not isinstance(node.target, OpOverload):
            if not isinstance(node.meta.get("val"), _NUMBERS):
                raise _Uncertain  # such as an operator on graphs
        elif ops.trains(node):
            raise _Uncertain
        elif node.target is torch.ops.aten.detach_.default:  # of constants that are made
            return self.env[node.args[0]]  # type: ignore[index]
        elif is_mutating(node):
            return self._functional(node)
        return self._called(node, node.target)

    def _sides(self, cond: fx.Node) -> None:
        """The sides of a `torch.cond` in parts, too: they write to nothing that is not theirs."""
        for side in cond.args[1:3]:
            module = getattr(self.root, str(side.target))  # type: ignore[union-attr]
            module.graph = _Pieces(module, self.traces).graph()

    def _called(self, node: fx.Node, target: Any) -> Any:
        """What becomes of a call of ``target`` in the place of ``node``."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.env.__getitem__)
        number = isinstance(node.meta["val"], _NUMBERS)
        parts = isinstance(target, OpOverload) and not number and self._has_parts(node, target)
        if node.meta.get("unbacked_bindings") and (number or parts):
            raise _Uncertain  # parts would bind symbols of their own
        if parts:
            return self._parts(node, target, args, kwargs)
        new = self.new.create_node("call_function", target, args, kwargs, node.name)
        new.meta = dict(node.meta)
        return new

    def _has_parts(self, node: fx.Node, target: OpOverload) -> bool:
        if str(target) in ops.WHOLE:
            return str(target) in ops.SIZED and _is_open(node.args[0])
        if target in self.tables.all:
            return True
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            target.name(), "CompositeImplicitAutograd"
        )
        return composite and target not in self.tables.composites

    def _parts(self, node: fx.Node, target: OpOverload, args: Any, kwargs: Any) -> Any:
        """What is traced of a call, in the new graph."""
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, fx.Node)]
        places = {x: i for i, x in enumerate(dict.fromkeys(leaves))}

        def call(*values: Any) -> Any:
            given = tree_map_only(fx.Node, lambda x: values[places[x]], (args, kwargs))
            return target(*given[0], **given[1])

        traced = self.traces.of(call, *(x.meta["val"] for x in places))
        inner: dict[fx.Node, Any] = {}
        given = iter(places)
        for part in traced.graph.nodes:
            if part.op == "placeholder":
                inner[part] = next(given)
            elif part.op == "output":
                return fx.map_arg(part.args[0], inner.__getitem__)
            elif part.op == "get_attr":
                inner[part] = self._constant(getattr(traced, str(part.target)))
            elif part.target is torch.ops.aten.detach_.default:  # of constants that are made
                inner[part] = inner[part.args[0]]  # type: ignore[index]
            elif part.op != "call_function" or is_mutating(part) or is_random(part):
                raise _Uncertain
            else:
                inner[part] = new = self.new.node_copy(part, inner.__getitem__)
                new.meta.update((k, node.meta[k]) for k in _ORIGIN if k in node.meta)
        raise _Uncertain

    def _constant(self, value: Any) -> fx.Node:
        """A tensor that parts of an operator are made with, in the new graph."""
        if not isinstance(value, torch.Tensor):
            raise _Uncertain
        name = f"_part_{len(self.new.nodes)}"
        setattr(self.root, name, value)
        new = self.new.create_node("get_attr", name)
        new.meta = {"val": self.mode.from_tensor(value)}
        return new

    def _functional(self, node: fx.Node) -> Any:
        """An ordinary call for one that writes to its first argument."""
        written, now = node.args[0], self.order[node]
        plain = _plain(node.target)
        if plain is None or not isinstance(written, fx.Node):
            raise _Uncertain
        related = {n for s in _storages(written) for n in self.sharing[s]}
        if any(other.op != "call_function" for other in related):
            raise _Uncertain
        before = sorted((n for n in related if self.order[n] < now), key=self.order.__getitem__)
        seen = [n for n in before if any(self.order[user] > now for user in n.users)]
        if seen:
            return self._renewed(node, written, plain, before, seen)
        made = self._called(node, plain)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            value = plain(*args, **kwargs)
        if not _same_layout(value, node.meta["val"]):
            raise _Uncertain  # promoted, broadcast or dense where writing in place is not
        return made

    def _renewed(
        self,
        node: fx.Node,
        written: fx.Node,
        plain: OpOverload,
        before: list[fx.Node],
        seen: list[fx.Node],
    ) -> Any:
        """What ``node`` writes, after all that shares memory with it, and was made ``before``, was
        made of that where it is ``seen`` later.
        """

        def call(target: OpOverload, *args: Any, **kwargs: Any) -> Any:
            if self._has_parts(node, target):
                return self._parts(node, target, args, kwargs)
            new = self.new.create_node("call_function", target, args, kwargs)
            given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode, torch.no_grad():
                value = target(*given, **named)
            new.meta = {**{k: node.meta[k] for k in _ORIGIN if k in node.meta}, "val": value}
            return new

        whole = before[0]
        links = chain(written, whole)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.env.__getitem__)
        made = call(plain, *args, **kwargs)
        shown, value = node.meta["val"], made.meta["val"]
        if links is None or value.dtype != shown.dtype or value.shape != shown.shape:
            raise _Uncertain
        found = put_back(links, self.env, made, call)
        if not _same_layout(found.meta["val"], whole.meta["val"]):
            found = laid_out(found, whole.meta["val"], call)
        if not _same_layout(found.meta["val"], whole.meta["val"]):
            raise _Uncertain
        self.env[whole] = found
        wanted = {*seen, written} if node.users else {*seen}
        for other in reversed(before):
            if other in wanted:
                wanted.update(other.all_input_nodes)
        for other in before[1:]:
            if other in wanted and is_mutating(other):
                self.env[other] = self.env[other.args[0]]  # type: ignore[index]
            elif other in wanted:
                self.env[other] = self._made(other)
        return self.env[written]


def _plain(target: Any) -> OpOverload | None:
    """The operator that computes what ``target`` writes to its first argument."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    plain = getattr(packet, target._overloadname, None)
    if not name.endswith("_") or plain is None or plain._schema.is_mutable:
        return None
    known = torch.Tag.pointwise in plain.tags or name.removesuffix("_") in PLAIN
    return plain if known else None


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def _is_open(node: Any) -> bool:
    return any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)


def _storages(node: fx.Node) -> set[int]:
    """The memory of a node's results: those of views of one tensor are the same."""
    found = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # within torch.vmap
    if any(x.layout != torch.strided or wrapped(x) for x in found):
        raise _Uncertain
    return {x.untyped_storage()._cdata for x in found}
