"""Saved programs: one ``.plait`` file, a zip archive without pickle or code to run.

Members::

    manifest.json              format, versions, options, SHA-256 of every other member
    weights.safetensors        weights and states of all programs, each once
    program<i>/program.json    the captured graph and how a call maps onto it
    program<i>/plan.json       buffers, steps, and kernels by content hash, for readers

A loaded program is laid out again for the machine it is on; kernels that the database there knows
by their hash are not built again.

The file is written beside its place and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import nn

from ...passes.remarks import Remark
from ..capture import tree
from ..capture.arguments import is_plain
from ..capture.captured import Captured, InputSpec, Mutation
from ..capture.export import EXCLUSIVE
from ..capture.state import Given, Update
from ..dispatch import Dispatcher
from ..errors import FileError, PlaitError
from ..options import Options
from . import archive
from .graph import (
    Symbols,
    Unsavable,
    expression_to_json,
    graph_from_json,
    graph_to_json,
    value_from_json,
    value_to_json,
)

if TYPE_CHECKING:
    from ..weights.budget import WeightStore


def save(dispatcher: Dispatcher, path: Path) -> None:
    """Writes every program of ``dispatcher`` to ``path``.

    Raises FileError when there is none, when a program holds what no file can, or when writing
    fails; a file that was there before is then unchanged.
    """
    programs = dispatcher.current()
    if not programs:
        raise FileError(
            "PLT-SAV-001",
            "nothing is compiled yet, so there is nothing to save",
            "call the compiled model once or give example_inputs=",
        )
    weights = _Weights()
    members: dict[str, bytes] = {}
    try:
        for i, program in enumerate(programs):
            with EXCLUSIVE:  # else fake tensors may tell another device
                data = _program_to_json(program.captured, weights)
            members[f"program{i}/program.json"] = json.dumps(data).encode()
            if program.executable.plan is not None:
                members[f"program{i}/plan.json"] = program.executable.plan.to_json().encode()
    except Unsavable as error:
        raise FileError("PLT-SAV-002", str(error), "the compiled model itself still runs") from None
    state = _state_to_json(dispatcher, [p.captured for p in programs], weights)
    members[archive.WEIGHTS] = weights.dump()
    manifest = {
        "format": archive.FORMAT,
        "version": archive.VERSION,
        "torch": torch.__version__,
        "options": asdict(replace(dispatcher.options, profile=None)),  # bets are made anew
        "parameters": _signature_to_json(dispatcher.signature),
        "remarks": [r.to_json() for r in dispatcher.notes.remarks],
        "state": state,
        "programs": len(programs),
        "sha256": {n: hashlib.sha256(b).hexdigest() for n, b in members.items()},
    }
    try:
        archive.write(path, {"manifest.json": json.dumps(manifest, indent=1).encode(), **members})
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError("PLT-SAV-003", f"cannot write {path}: {reason}") from error


@dataclass
class Saved:
    """What a file holds: enough to make the compiled model anew."""

    options: Options
    signature: inspect.Signature | None
    remarks: list[Remark]
    programs: list[Captured]
    shell: nn.Module
    store: WeightStore | None


def read(path: Path, weight_budget: int | str | None = None) -> Saved:
    """The contents of ``path``. Under a budget, the given one or its own, weights lie in a file.

    Raises FileError when it is missing, truncated, altered or of another version.
    """
    manifest, members, tensors, store = archive.read(path, weight_budget)
    try:
        weights = _Weights(tensors, copied=store is None)
        programs = [
            _program_from_json(json.loads(members[f"program{i}/program.json"]), weights)
            for i in range(manifest["programs"])
        ]
        return Saved(
            Options(**{**manifest["options"], "weight_budget": store and store.budget}),
            _signature_from_json(manifest["parameters"]),
            [Remark.from_json(r) for r in manifest["remarks"]],
            programs,
            _shell(programs, manifest["state"], weights),
            store,
        )
    except PlaitError:
        raise
    except Exception as error:  # a file of other versions may hold anything
        raise unusable(path, error) from error


def unusable(path: Path, error: Exception) -> FileError:
    """The error for a file whose contents cannot be made into a model."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return FileError(
        "PLT-SAV-005",
        f"{path} cannot be used here: {text[0]}",
        "load it with the versions that saved it, or compile the model again",
    )


def _signature_to_json(signature: inspect.Signature | None) -> list[Any] | None:
    """Names and kinds of parameters, and which may be left out."""
    if signature is None:
        return None
    parameters = signature.parameters.values()
    return [[p.name, int(p.kind), p.default is not inspect.Parameter.empty] for p in parameters]


def _signature_from_json(data: list[Any] | None) -> inspect.Signature | None:
    if data is None:
        return None
    kinds = inspect._ParameterKind
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [inspect.Parameter(n, kinds(k), default=None if d else empty) for n, k, d in data]
    )


# -- weights ---------------------------------------------------------------------------------------


class _Weights:
    """Tensors by key, those that share memory once; ``copied`` tells that they are in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor] | None = None, copied: bool = True) -> None:
        self.tensors = dict(tensors or {})
        self.copied = copied
        self._keys: dict[Any, str] = {}
        self._loaded: dict[Any, torch.Tensor] = {}

    def add(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Keeps ``tensor``; returns what `get` needs."""
        tensor = tensor.detach()
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        key = self._keys.get(place) if tensor.numel() else None
        if key is None:
            key = f"t{len(self.tensors)}"
            self._keys[place] = key
            whole = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            self.tensors[key] = whole.contiguous().cpu()
        return {
            "key": key,
            "complex": tensor.is_complex(),
            "stride": list(tensor.stride()),
            "device": str(tensor.device),
        }

    def get(self, data: Mapping[str, Any]) -> torch.Tensor:
        """The tensor that `add` described; the same object for the same key."""
        place = (data["key"], data["device"])
        if place not in self._loaded:
            tensor = self.tensors[data["key"]]
            if data["complex"]:
                tensor = torch.view_as_complex(tensor)
            stride = data["stride"]
            if list(tensor.stride()) != stride and _dense(list(tensor.shape), stride):
                tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
            self._loaded[place] = tensor.to(data["device"])
        return self._loaded[place]

    def own(self, data: Mapping[str, Any]) -> torch.Tensor:
        """`get` for a tensor that programs write to."""
        tensor = self.get(data)
        return tensor if self.copied else tensor.clone()

    def dump(self) -> bytes:
        """All tensors in safetensors' format."""
        from safetensors.torch import save

        return save({k: t.clone() for k, t in self.tensors.items()})


def _dense(shape: list[int], stride: list[int]) -> bool:
    """Whether the strides are a permutation of contiguous ones."""
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n > 1):
        if step != expected:
            return False
        expected *= size
    return True


def _named(captured: Captured) -> dict[str, torch.Tensor]:
    """Weights and states of a program under the model's own names."""
    tensors = {captured.names.get(a, a): t for a, t in captured.constants().items()}
    tensors |= {n: getattr(captured.graph_module, a) for n, a in captured.aliases.items()}
    states = captured.inputs[captured.num_tensors :]
    return tensors | {s.name: t for s, t in zip(states, captured.states, strict=True)}


def _state_to_json(
    dispatcher: Dispatcher, programs: list[Captured], weights: _Weights
) -> dict[str, Any] | None:
    """The names in the model's ``state_dict``, with the tensors that no program reads.

    None for a function, which has none.
    """
    target = dispatcher.target
    if target is not None and not isinstance(target, nn.Module):
        return None
    read = {name for captured in programs for name in _named(captured)}
    found: dict[str, Any] = {}
    for root in dispatcher.specialiser.modules:
        for path, module in root.named_modules(remove_duplicate=False):
            own = {**module._parameters, **module._buffers}
            for last, tensor in own.items():
                name = f"{path}.{last}" if path else last
                if tensor is None or last in module._non_persistent_buffers_set:
                    continue
                if name in read:
                    found[name] = None
                elif type(tensor) in (torch.Tensor, nn.Parameter) and is_plain(tensor):
                    found[name] = weights.add(tensor)
    return found


def _shell(
    programs: list[Captured], state: Mapping[str, Any] | None, weights: _Weights
) -> nn.Module:
    """A module that holds the weights under the model's own names; its ``state_dict`` has those of
    ``state`` (all, where that is None).
    """
    root = nn.Module()
    unread = {n: weights.own(data) for n, data in (state or {}).items() if data is not None}
    for tensors in (*map(_named, programs), unread):
        for name, tensor in tensors.items():
            owner = root
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if last not in owner._buffers and not hasattr(owner, last):
                owner.register_buffer(last, tensor, persistent=state is None or name in state)
    return root.eval()


# -- one program -----------------------------------------------------------------------------------


def _program_to_json(captured: Captured, weights: _Weights) -> dict[str, Any]:
    if captured.decisions is not None:
        raise Unsavable("what runs depends on values of arguments, which a file cannot ask for")
    if captured.assigned:
        raise Unsavable(f"a run sets the attribute {captured.assigned[0][1]!r} of a module")
    hints = {}
    for node, spec in zip(captured.graph_module.graph.nodes, captured.inputs, strict=False):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(dim, sympy.Symbol):
                hints[dim.name] = int(size.node.hint)
    try:
        in_tree = tree.to_json(captured.in_tree)
        out_tree = tree.to_json(captured.out_tree)
        updates = [
            [u.number, tree.to_json(u.tree), [_leaf_to_json(x) for x in u.leaves]]
            for u in captured.updates
        ]
    except ValueError as error:
        raise Unsavable(str(error)) from None
    return {
        "graph": graph_to_json(captured.graph_module),
        "constants": {a: weights.add(t) for a, t in captured.constants().items()},
        "inputs": [_spec_to_json(s) for s in captured.inputs],
        "states": [weights.add(t) for t in captured.states],
        "mutations": [[m.output, m.input] for m in captured.mutations],
        "symbols": captured.symbols,
        "ranges": captured.ranges,
        "hints": hints,
        "guards": [expression_to_json(g) for g in captured.guards],
        "in_tree": in_tree,
        "in_leaves": [_leaf_to_json(x) for x in captured.in_leaves],
        "out_tree": out_tree,
        "out_leaves": [_leaf_to_json(x) for x in captured.out_leaves],
        "updates": updates,
        "names": captured.names,
        "aliases": captured.aliases,
        "remarks": [r.to_json() for r in captured.remarks],
    }


def _program_from_json(data: Mapping[str, Any], weights: _Weights) -> Captured:
    ranges = {k: (int(low), high) for k, (low, high) in data["ranges"].items()}
    symbols = Symbols(ranges, data["hints"])
    tensors = {a: weights.get(t) for a, t in data["constants"].items()}
    return Captured(
        graph_module=graph_from_json(data["graph"], tensors, symbols),
        inputs=[_spec_from_json(s, symbols) for s in data["inputs"]],
        states=[weights.own(t) for t in data["states"]],
        mutations=[Mutation(*m) for m in data["mutations"]],
        symbols={k: (int(i), int(d)) for k, (i, d) in data["symbols"].items()},
        ranges=ranges,
        guards=[symbols.expression(g) for g in data["guards"]],
        in_tree=tree.from_json(data["in_tree"]),
        in_leaves=[_leaf_from_json(x, symbols) for x in data["in_leaves"]],
        out_tree=tree.from_json(data["out_tree"]),
        out_leaves=[_leaf_from_json(x, symbols) for x in data["out_leaves"]],
        updates=[
            Update(n, tree.from_json(t), [_leaf_from_json(x, symbols) for x in leaves])
            for n, t, leaves in data["updates"]
        ],
        names=dict(data["names"]),
        aliases=dict(data["aliases"]),
        remarks=[Remark.from_json(r) for r in data["remarks"]],
    )


def _spec_to_json(spec: InputSpec) -> dict[str, Any]:
    shape = [expression_to_json(d) for d in spec.shape]
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": spec.name, "dtype": dtype, "shape": shape, "device": str(spec.device)}


def _spec_from_json(data: Mapping[str, Any], symbols: Symbols) -> InputSpec:
    shape = tuple(d if isinstance(d, int) else symbols.expression(d) for d in data["shape"])
    dtype = value_from_json({"torch": data["dtype"]})
    return InputSpec(data["name"], dtype, shape, torch.device(data["device"]))


def _leaf_to_json(leaf: Any) -> Any:
    """A position, or an object with one of the keys of `_leaf_from_json`, or None for an input."""
    if leaf is None or isinstance(leaf, int):
        return leaf
    if isinstance(leaf, Given):
        return {"tensor" if leaf.tensor else "object": leaf.number}
    if isinstance(leaf, tuple):
        return {"value": value_to_json(leaf[0])}
    return {"expr": expression_to_json(leaf)}


def _leaf_from_json(data: Any, symbols: Symbols) -> Any:
    if data is None or isinstance(data, int):
        return data
    if "value" in data:
        return (value_from_json(data["value"]),)
    if "tensor" in data or "object" in data:
        return Given(*data.values(), tensor="tensor" in data)
    return symbols.expression(data["expr"])
