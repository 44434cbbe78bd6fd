"""Lowering: an FX graph cut into groups becomes a Plan with its constants and kernels.

Groups whose template declines run as library operators, each with a remark. What is library
changes where tensors live, so placement and lowering repeat until nothing changes; kernels lowered
once are kept between rounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from ...kernels.abi import TensorArg
from ...kernels.group import Group
from ...passes.ir import attribute
from ...passes.plan_memory import Lifetime, MemoryPlan, describe, plan_memory
from ...passes.remarks import Remark
from ...passes.route_regions import ROUTER
from ...passes.speculate_routes import DEFERRED, SIZED
from ...runtime import library
from ...runtime.plan import (
    BranchStep,
    Buffer,
    KernelStep,
    LibraryStep,
    Plan,
    Step,
    TensorRef,
    touched,
)
from .. import sizes
from ..weights.budget import WeightStore
from . import fetches
from .constants import Constants, to_files
from .least import marked_bytes
from .lowered import Kernels, Lowered
from .select import Choice, Selected, missed
from .storage import Place, Storage, buffer_bytes, is_tensor, runs_parts, split_concats
from .subgraphs import bound_symbols, subgraph_call

aten = torch.ops.aten


def lower(
    graph_module: fx.GraphModule,
    groups: Sequence[Group],
    kernels: Kernels,
    symbols: Mapping[str, tuple[int, int]],
    name: str = "model",
    store: WeightStore | None = None,
) -> Lowered:
    """Lowers ``graph_module`` (changed only by added copies) to a Plan.

    ``symbols`` tells which input dimension binds each symbol. Weights that are marked for a slower
    tier go to ``store``. Raises FileError where that cannot be, and NotImplementedError when a
    size cannot be written in a plan.
    """
    return _Lowering(graph_module, groups, kernels, symbols, name, store).run()


class _Lowering:
    def __init__(
        self,
        graph_module: fx.GraphModule,
        groups: Sequence[Group],
        kernels: Kernels,
        symbols: Mapping[str, tuple[int, int]],
        name: str,
        store: WeightStore | None,
    ) -> None:
        self.graph_module, self.kernels, self.store = graph_module, kernels, store
        self.symbols, self.name = dict(symbols), name
        self.forced: dict[fx.Node, Remark] = {}
        self.remarks: list[Remark] = []
        self.groups = split_concats(graph_module, groups, self.is_library)
        self.constants = Constants(graph_module, kernels, store)
        self.stayed = 0
        self.calls: dict[str, Callable[..., Any]] = {}
        self.buffers: dict[str, Buffer] = {}
        self.parts: dict[str, Lowered] = {}
        self.deferred: dict[str, fx.GraphModule] = {}

    def is_library(self, group: Group) -> bool:
        return group.kind == "library" or group.nodes[0] in self.forced

    def run(self) -> Lowered:
        chosen = self._settle()
        while not self.kernels.finish():
            chosen = self._settle()
        selected = {k: self.kernels.resolve(c) for k, c in chosen.items()}
        steps = self._steps(selected)
        memory = self._buffers(steps)
        plan = Plan(
            name=self.name,
            buffers=self.buffers,
            steps=steps,
            inputs=[self._ref(self.storage.places[n]) for n in self.storage.inputs],
            outputs=[self._output(a) for a in self.storage.output.args[0]],  # type: ignore[union-attr]
            symbols=self.symbols,
            arena_bytes=memory.total,
            parts={name: part.plan for name, part in self.parts.items()},
            deferred=tuple(self.deferred),
            fetched=tuple(self.constants.whole),
        )
        used = sorted({s.kernel for s in steps if isinstance(s, KernelStep)})
        stayed, told = self.constants.stayed(self.storage.roots.values())
        stayed += self.stayed + sum(part.stayed for part in self.parts.values())
        remarks = [*self.forced.values(), *self.remarks, *told]
        return Lowered(
            plan,
            self.constants.tensors,
            self.calls,
            used,
            remarks,
            memory,
            self.groups,
            selected,
            self.storage,
            self.parts,
            self.deferred,
            {**self.constants.banks, **self.constants.whole},
            stayed,
            self.constants.absent,
        )

    # -- which groups are kernels -----------------------------------------------------------

    def _settle(self) -> dict[int, Choice]:
        while True:
            self.storage = Storage(
                self.graph_module, self.groups, self.is_library, self.kernels.halo_of
            )
            if self.storage.copies or self.storage.strided:
                self._add_copies(self.storage.copies)
                self._add_images(self.storage.strided)
                continue
            selected: dict[int, Choice] = {}
            declined = False
            for k, group in enumerate(self.groups):
                if self.is_library(group) or not self._has_step(group):
                    continue
                group = self._as_kernel_group(group)
                chosen = self._select(group)
                if isinstance(chosen, Remark):
                    self.forced[self.groups[k].nodes[0]] = chosen
                    declined = True
                else:
                    selected[k] = chosen
            if not declined:
                return selected

    def _has_step(self, group: Group) -> bool:
        if group.kind == "view":
            return any(n in self.storage.materialised for n in group.outputs)
        return group.kind != "concat"

    @staticmethod
    def _as_kernel_group(group: Group) -> Group:
        return replace(group, kind="pointwise") if group.kind == "view" else group

    def _select(self, group: Group) -> Choice | Remark:
        nodes = tuple(n.name for n in group.nodes)
        io: dict[fx.Node, TensorArg] = {}
        for node in (*group.inputs, *group.outputs):
            place = self.storage.places.get(node)
            if not isinstance(place, Place):
                return missed("PLT-LOW-001", nodes, f"{node.name} is not a single tensor in memory")
            if not all(sizes.is_backed(d) for d in (*place.shape, *place.strides)):
                return missed("PLT-LOW-002", nodes, f"the size of {node.name} depends on data")
            const = self.storage.roots[place.root].kind == "const"
            io[node] = place.arg(const)
        return self.kernels.select(group, io)

    def _add_copies(self, nodes: Sequence[fx.Node]) -> None:
        output = self.storage.output
        for node in nodes:
            output.replace_input_with(node, self._copy(node, output))

    def _add_images(self, groups: Sequence[Group]) -> None:
        """Gives convolutions copies of what they read, which the storage lays as they like it."""
        order = {node: k for k, node in enumerate(self.graph_module.graph.nodes)}
        readers: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
        for group in groups:
            anchor: Any = group.anchor
            readers.setdefault(anchor.args[0], []).append((self.groups.index(group), anchor))
        for x, found in readers.items():
            copy = self._copy(x, min((anchor for _, anchor in found), key=lambda n: order[n]))
            for k, anchor in found:
                anchor.args = (copy, *anchor.args[1:])
                group = self.groups[k]
                kept = [n for n in group.inputs if any(n in m.all_input_nodes for m in group.nodes)]
                self.groups[k] = replace(group, inputs=(copy, *kept))

    def _copy(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """A copy of a value, a group of its own."""
        with self.graph_module.graph.inserting_before(before):
            copy = self.graph_module.graph.call_function(aten.clone.default, (node,))
        copy.meta = dict(node.meta)
        self.groups.append(Group("pointwise", (copy,), (node,), (copy,)))
        return copy

    # -- steps --------------------------------------------------------------------------------

    def _steps(self, selected: Mapping[int, Selected]) -> list[Step]:
        steps: list[Step] = []
        grouped = {n for g in self.groups for n in g.nodes}
        pending = {g.nodes[-1]: k for k, g in enumerate(self.groups)}
        for node in self.graph_module.graph.nodes:
            if node in pending:
                k = pending[node]
                group = self.groups[k]
                if k in selected:
                    step = self._kernel_step(self._as_kernel_group(group), selected[k], k)
                    reads = (a.buffer for a in step.args[: step.reads])
                    banks = tuple(name for name in reads if name in self.constants.banks)
                    if banks:
                        offsets = fetches.offsets_of(group)
                        fetches.add(steps, step, banks, offsets, self._operand(offsets))
                    steps.append(step)
                elif self.is_library(group):
                    steps.extend(self._other_step(n, k) for n in group.nodes if self._runs(n))
            elif node.op == "call_function" and node not in grouped and self._runs(node):
                steps.append(self._other_step(node, -1))
        return steps

    def _runs(self, node: fx.Node) -> bool:
        """Whether a library node needs a step: not for known sizes and picked results."""
        value = node.meta.get("val")
        source: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(self.storage.places.get(source), tuple):
            return False
        if isinstance(value, (torch.SymInt, int, bool)):
            return not sizes.is_backed(value)
        return value is not None or str(node.target).startswith("aten._assert_async")

    def _kernel_step(self, group: Group, chosen: Selected, number: int) -> KernelStep:
        args = []
        for node, pack in zip(group.inputs, chosen.packs, strict=True):
            place = self.storage.places[node]
            assert isinstance(place, Place)
            if pack is None:
                args.append(self._ref(place))
                continue
            name = self.constants.packed(self.storage.roots[place.root], place, pack)
            made = self.constants.tensors[name]
            dtype = str(made.dtype)[6:]
            args.append(TensorRef(name, dtype, tuple(made.shape), tuple(made.stride())))
        args += [self._ref(self.storage.places[n]) for n in group.outputs]
        return KernelStep(
            name=chosen.name,
            kernel=chosen.hash,
            args=tuple(args),
            reads=len(group.inputs),
            symbols=chosen.symbols,
            tasks=chosen.tasks,
            flops=chosen.flops,
            bytes=chosen.bytes,
            group=number,
        )

    def _other_step(self, node: fx.Node, number: int) -> LibraryStep | BranchStep:
        if runs_parts(node):
            try:
                return self._branch_step(node, number)
            except NotImplementedError as error:
                hint = "pass what the branch needs as a tensor that has this size"
                self.remarks.append(missed("PLT-BRN-007", (node.name,), str(error), hint))
        graphs = (a for a in node.all_input_nodes if a.op == "get_attr")
        inner = (attribute(self.graph_module, str(a.target)) for a in graphs)
        self.stayed += sum(marked_bytes(m) for m in inner if isinstance(m, fx.GraphModule))
        return self._library_step(node, number)

    def _branch_step(self, node: fx.Node, number: int) -> BranchStep:
        """Lowers the graphs that a node runs; each becomes a part of the plan."""
        args: Any = node.args
        if node.target is torch.ops.higher_order.cond:
            kind, selector, graphs, refs = "cond", args[0], args[1:3], args[3]
        else:
            kind, selector, graphs, refs = "rows", args[2], args[0], (args[1], *args[3])
        results: Any = self._results(node)
        if not all(ref.dtype for ref in results):
            raise NotImplementedError("how many rows it has, only the data tell")
        names = []
        for b, graph in enumerate(graphs):
            name = str(graph.target)
            names.append(name)
            module = getattr(self.graph_module, name)
            bound = bound_symbols(module)
            if b in node.meta.get(DEFERRED, ()):
                self.deferred[name] = module
                if self.store is not None:
                    to_files(module, self.store)
                continue
            part = lower(module, self.kernels.groups(module), self.kernels, bound, name, self.store)
            self.parts[name] = part
            self.remarks += part.remarks
        router = node.meta.get(ROUTER)
        return BranchStep(
            name=node.name,
            kind=kind,
            plans=tuple(names),
            selector=self._operand(selector),
            refs=tuple(map(self._operand, refs)),
            results=results,
            group=number,
            router="" if router is None else f"{router[0]}#{router[1]}",
            sized=self._sized_plans(node, names),
        )

    def _sized_plans(self, node: fx.Node, names: Sequence[str]) -> tuple[tuple[int, str], ...]:
        """Lowers the graphs that branches of a node have for a number of rows."""
        sized = node.meta.get(SIZED)
        if not sized:
            return ()
        found = []
        for b, name in enumerate(names):
            rows, module = sized.get(b, (0, None))
            if module is not None and name in self.parts:
                name = f"{name}_rows{rows}"
                bound = bound_symbols(module)
                groups = self.kernels.groups(module)
                self.parts[name] = lower(module, groups, self.kernels, bound, name, self.store)
                found.append((rows, name))
            else:
                found.append((0, ""))
        return tuple(found)

    def _library_step(self, node: fx.Node, number: int) -> LibraryStep:
        tensors = [a for a in node.all_input_nodes if self._is_operand(a)]
        refs = {a: k for k, a in enumerate(tensors)}

        def encode(value: Any) -> Any:
            if isinstance(value, fx.Node) and value not in refs:
                v = value.meta["val"]
                return {"size": sizes.text(v)} if isinstance(v, torch.SymInt) else v
            if isinstance(value, (list, tuple)):
                items = [encode(v) for v in value]
                return items if isinstance(value, list) else {"tuple": items}
            if isinstance(value, torch.SymInt):
                return {"size": sizes.text(value)}
            return library.encode(value, refs)

        target = self._target(node)
        if target in self.calls:
            template: Any = [library.encode(a, refs) for a in tensors]
            kwargs: dict[str, Any] = {}
        else:
            template = [encode(a) for a in node.args]
            kwargs = {k: encode(v) for k, v in node.kwargs.items()}
        return LibraryStep(
            name=node.name,
            target=target,
            refs=tuple(self._operand(a) for a in tensors),
            args=template,
            kwargs=kwargs,
            results=self._results(node),
            group=number,
        )

    def _is_operand(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int, bool)):
            return not sizes.is_backed(value)
        return not (node.op == "get_attr" and not is_tensor(node))

    def _target(self, node: fx.Node) -> str:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
        if isinstance(target, torch._ops.HigherOrderOperator):
            name = f"subgraph.{node.name}"
            self.calls[name] = subgraph_call(self.graph_module, node, self._is_operand)
            return name
        return f"python:{target.__module__}.{target.__name__}"  # type: ignore[union-attr]

    def _operand(self, node: fx.Node) -> TensorRef:
        place = self.storage.places.get(node)
        return self._ref(place) if isinstance(place, Place) else self._opaque(node.name)

    def _results(self, node: fx.Node) -> tuple[TensorRef | None, ...]:
        place = self.storage.places.get(node)
        if isinstance(place, Place):
            return (self._ref(place),)
        if isinstance(place, tuple):
            return tuple(None if p is None else self._ref(p) for p in place)
        return (self._opaque(node.name),)

    def _opaque(self, name: str) -> TensorRef:
        """A library value whose geometry no plan needs to know: a scalar, or a data-dependent
        size.
        """
        self.buffers.setdefault(name, Buffer(name, "library"))
        return TensorRef(name, "", (), ())

    def _ref(self, place: Any) -> TensorRef:
        assert isinstance(place, Place), place
        if not all(sizes.is_backed(d) for d in (*place.shape, *place.strides)):
            return self._opaque(place.root)
        return TensorRef(
            place.root,
            str(place.dtype)[6:],
            tuple(sizes.text(d) for d in place.shape),
            tuple(sizes.text(s) for s in place.strides),
            sizes.text(place.offset),
        )

    def _output(self, node: fx.Node) -> TensorRef:
        return self._operand(node)

    # -- buffers ------------------------------------------------------------------------------

    def _buffers(self, steps: Sequence[Step]) -> MemoryPlan:
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for k, step in enumerate(steps):
            for ref in touched(step):
                if ref is not None:
                    first.setdefault(ref.buffer, k)
                    last[ref.buffer] = k
        lifetimes = []
        numbers = {n.name: k for k, n in enumerate(self.storage.inputs)}
        outputs = 0
        for name, root in self.storage.roots.items():
            if name not in first and root.kind in ("arena", "static", "const"):
                if not self._is_returned(name):
                    continue
            if name in self.buffers:
                continue  # opaque
            unbacked = not sizes.is_backed(root.elements)
            nbytes = 0 if unbacked else buffer_bytes(root)
            index = numbers.get(name, 0)
            if root.kind == "output":
                index, outputs = outputs, outputs + 1
            self.buffers[name] = Buffer(name, root.kind, nbytes, index)
            if root.kind == "const":
                self.constants.plain(root)
            if root.kind == "arena":
                lifetimes.append(Lifetime(name, nbytes, first[name], last[name]))
        for name, tensor in self.constants.tensors.items():
            if name not in self.buffers:
                self.buffers[name] = Buffer(name, "const", tensor.nbytes)
        memory = plan_memory(lifetimes)
        if lifetimes:
            self.remarks.append(describe(lifetimes, memory))
        for name, offset in memory.offsets.items():
            self.buffers[name] = replace(self.buffers[name], offset=offset)
        return memory

    def _is_returned(self, name: str) -> bool:
        places = (self.storage.places.get(a) for a in self.storage.output.all_input_nodes)
        return any(isinstance(p, Place) and p.root == name for p in places)
