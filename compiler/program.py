"""One specialisation, ready to run: a captured graph, its executable and what surrounds a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from ..kernels.ops.bounds import IndexCheck, index_checks
from ..passes.strided import memory_order, seen_inputs
from .capture.arguments import shares_memory
from .capture.captured import Captured
from .capture.state import Given, apply
from .capture.tree import unflatten
from .guards.watch import Stamps, Watch, is_list, locate
from .options import Executable

COUNTER = "num_batches_tracked"

_inference = torch.is_inference_mode_enabled
_autocast = torch._C._is_any_autocast_enabled
_is_neg, _is_conj = Tensor.is_neg, Tensor.is_conj


class Unfit(Exception):
    """Arguments that a program must not be given though their sizes fit; nothing was run."""

    def __init__(self, remark: str, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.remark, self.reason, self.hint = remark, reason, hint


class Program:
    """`run` it on the user's tensors; it returns the user's result.

    ``modules`` are where weights are watched for changes, ``stamps`` their weights' before any was
    read.
    """

    def __init__(
        self,
        captured: Captured,
        executable: Executable,
        modules: Sequence[nn.Module] = (),
        stamps: Stamps | None = None,
    ) -> None:
        self.captured, self.executable, self.modules = captured, executable, tuple(modules)
        self._stamps = stamps
        self.matches = captured.matcher()
        self._sizes = captured.binder()
        self._symbolic = any(isinstance(x, sympy.Basic) for x in captured.all_leaves())
        self._single = captured.out_tree.kind == "leaf" and captured.out_leaves == [0]
        below = list(dict.fromkeys(m for root in modules for m in root.modules()))
        self._assigned = [(below[i], name, slot) for i, name, slot in captured.assigned]
        self.choosy = captured.decisions is not None or bool(captured.assigned)
        """Whether sizes do not suffice to tell that a call is this program's: ask `holds`."""
        self.calls = 0
        """Calls since the weights were prepared."""
        self._history: list[int] = []
        self.watch: Watch | None = None
        self.ready()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether values of the call's tensors decide as they did when this was captured."""
        decisions = self.captured.decisions
        if not all(_alike(vars(m).get(name), slot) for m, name, slot in self._assigned):
            return False
        return decisions is None or decisions.hold(tensors)

    # -- running --------------------------------------------------------------------------------

    def ready(self) -> None:
        """Call after `executable` was replaced."""
        self._run: Callable[[Sequence[Tensor]], list[Tensor]] = self.executable.run
        self._written = [m.input for m in self.captured.mutations]
        self._checks = self._index_checks()
        self._orders = self._seen_orders()
        conjugable = any(i.dtype.is_complex for i in self.captured.inputs)
        changes = self._written or self.captured.updates or self.captured.assigned
        self._simple = self._single and not (conjugable or changes or self._checks or self._orders)
        where = self._places()
        self.watch = Watch(where) if where else None
        if self.watch is not None and self._stamps is not None:
            # Another thread may have written to them while they were being prepared.
            if any(map(self._stamps.outdated, self.watch.now().values())):
                self.watch.expire()
        self._stamps = None

    def run(self, tensors: list[Tensor], objects: Sequence[Any] = ()) -> Any:
        """The result for ``tensors``, whose sizes satisfy `matches`, and the state ``objects`` of
        the call. Raises Unfit.
        """
        self.calls += 1
        if self._simple and not (_inference() or _autocast()):
            if not (_is_neg(tensors[0]) if len(tensors) == 1 else any(map(_is_neg, tensors))):
                return self._run(tensors)[0]
        given = tensors
        if any(map(_is_neg, tensors)) or any(map(_is_conj, tensors)):
            tensors = [t.resolve_conj().resolve_neg() for t in tensors]
        if self._checks or self._written or self._orders:
            self._check(tensors)
        if _inference() or _autocast():
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                results = self._run([*tensors, *self.captured.states])
        else:
            results = self._run([*tensors, *self.captured.states])
        return self._result(given, results, objects)

    def _check(self, tensors: list[Tensor]) -> None:
        """Raises Unfit for indices out of range, for memory that is written and shared, and for
        memory in another order where that is seen.
        """
        whole = [*tensors, *self.captured.states]
        if self._checks:
            limits = iter(self._limits([t.shape for t in tensors]))
            for check in self._checks:
                low, end = next(limits), next(limits)
                tensor = check.of(whole[check.input])
                if not tensor.numel():
                    continue
                least, most = torch.aminmax(tensor)
                if int(least) < low or int(most) >= end:
                    name = self.captured.inputs[check.input].name
                    found = f"{int(least)} to {int(most)}"
                    reason = f"{name!r} holds indices from {found}, allowed are {low} to {end - 1}"
                    raise Unfit("PLT-INP-006", reason)
        if self._written and shares_memory(whole, self._written):
            raise Unfit(
                "PLT-CAP-018",
                "an argument that is written shares memory with another or itself",
                "pass clones",
            )
        for k, (order, bare) in self._orders.items():
            if memory_order(whole[k]) != order or (bare and whole[k].storage_offset()):
                name = self.captured.inputs[k].name
                reason = f"{name!r} has other strides than at capture, and the model reads by them"
                raise Unfit("PLT-CAP-027", reason, "pass it contiguous")

    def _seen_orders(self) -> dict[int, tuple[list[int] | None, bool]]:
        """How inputs lie in memory whose elements the model finds by strides, and whether it finds
        those of the input itself: a plan has that contiguous, with nothing around it.
        """
        graph = self.captured.graph_module.graph
        values = [n.meta["val"] for n in graph.find_nodes(op="placeholder")]
        return {
            k: (list(range(values[k].dim())) if bare else memory_order(values[k]), bare)
            for k, bare in seen_inputs(graph).items()
        }

    def _index_checks(self) -> list[IndexCheck]:
        checks = index_checks(self.executable.graph.graph)
        exprs = [e for c in checks for e in (c.low, c.end)]
        self._limits = self.captured.evaluator(exprs)
        return checks

    def _result(self, tensors: list[Tensor], results: list[Tensor], objects: Sequence[Any]) -> Any:
        captured = self.captured
        if captured.mutations:
            results = self._write_back([*tensors, *captured.states], results)
        sizes = iter(self._sizes([t.shape for t in tensors])) if self._symbolic else iter(())

        def leaf(x: Any) -> Any:
            if type(x) is int:
                return results[x]
            if type(x) is tuple:
                return x[0]
            if type(x) is Given:
                return tensors[x.number] if x.tensor else objects[x.number]
            return next(sizes)

        leaves = [leaf(x) for x in captured.out_leaves]
        for update in captured.updates:
            apply(update, objects[update.number], leaf)
        for module, name, slot in self._assigned:
            value = [leaf(x) for x in slot] if isinstance(slot, list) else leaf(slot)
            setattr(module, name, value)
        return unflatten(captured.out_tree, leaves)

    def _write_back(self, inputs: list[Tensor], results: list[Tensor]) -> list[Tensor]:
        """Copies the new values of changed inputs into them, after saving what shares memory."""
        mutations = self.captured.mutations
        places = {_storage(inputs[m.input]) for m in mutations}
        results = [r.clone() if _storage(r) in places else r for r in results]
        with torch.no_grad():
            for mutation in mutations:
                inputs[mutation.input].copy_(results[mutation.output])
        return results

    # -- weights --------------------------------------------------------------------------------

    def _places(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Where the weights live that the graph holds as constants, by the model's name."""
        self._attribute: dict[str, str] = {}
        where: dict[str, tuple[dict[str, Any], str]] = {}
        if not self.modules:
            return where
        used = self.captured.constants()
        by_memory: dict[Any, tuple[dict[str, Any], str]] | None = None
        names = [(own, a) for a, own in self.captured.names.items()]
        for name, attribute in [*names, *self.captured.aliases.items()]:
            if attribute not in used:
                continue
            tensor = used[attribute]
            found = next((p for p in (locate(m, name) for m in self.modules) if p), None)
            if found is None or not _same_memory(found[0][found[1]], tensor):
                if by_memory is None:
                    by_memory = _index(self.modules)
                # Made during capture or met outside any module: watch the tensor itself.
                found = by_memory.get(_memory(tensor), ({"": tensor}, ""))
            where[name] = found
            self._attribute[name] = attribute
        # Batch normalization in training mode writes running statistics uncounted, all but this.
        for name, (owner, key) in list(where.items()):
            counter = owner.get(COUNTER) if key in ("running_mean", "running_var") else None
            if isinstance(counter, Tensor):
                where[f"{name} {COUNTER}"] = owner, COUNTER
        return where

    def restless(self) -> bool:
        """Whether the last eight preparations, this one included, served hardly a call each."""
        self._history = [*self._history[-7:], self.calls]
        self.calls = 0
        return len(self._history) == 8 and sum(self._history) <= 16

    def adopt_weights(self) -> bool:
        """Takes the weights of now into the graph.

        False if that cannot be: one changed its shape, strides, dtype or device, is gone, or tied
        weights no longer are.
        """
        assert self.watch is not None
        module = self.captured.graph_module
        adopted: dict[str, Tensor] = {}
        weights = self.watch.now()
        self._stamps = Stamps(t for t in weights.values() if isinstance(t, Tensor))
        for name, new in weights.items():
            attribute = self._attribute.get(name)
            if attribute is None:
                continue
            old = getattr(module, attribute)
            if not isinstance(new, Tensor):
                return False
            if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                return False
            if new.stride() != old.stride():  # kernels read constants by their strides
                return False
            if _memory(adopted.setdefault(attribute, new.detach())) != _memory(new):
                return False
        for attribute, tensor in adopted.items():
            setattr(module, attribute, tensor)
        return True


def _index(modules: Sequence[nn.Module]) -> dict[Any, tuple[dict[str, Any], str]]:
    """Parameters and buffers by where they lie in memory."""
    found: dict[Any, tuple[dict[str, Any], str]] = {}
    for module in (m for root in modules for m in root.modules()):
        for place in (module._parameters, module._buffers):
            for key, tensor in place.items():
                if tensor is not None:
                    found.setdefault(_memory(tensor), (place, key))
    return found


def _alike(value: Any, slot: Any) -> bool:
    """Whether an attribute is a tensor, or a list of as many, as that which a run puts there."""
    if isinstance(slot, list):
        return is_list(value) and len(value) == len(slot)
    return isinstance(value, Tensor)


def _memory(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return _memory(a) == _memory(b)
