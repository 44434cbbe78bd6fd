"""Chooses and builds the kernel of each group: from the database, or lowered, compiled, raced.

Everything before a `finish` is bookkeeping; all kernels that the database lacks are then compiled in
one batch. With ``tune="quick"`` the best few candidates of each heavy kernel are raced.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..kernels.abi import Kernel, Pack, TensorArg
from ..kernels.group import Group, Unsupported
from ..kernels.target import Target
from ..passes.remarks import Remark
from . import sizes
from .spec import Spec

TEMPLATES = ("pointwise", "rows", "reduce", "gemm", "conv", "pool", "attention")


@dataclass(frozen=True)
class Selected:
    """A kernel chosen for a group, in the symbols of the group's own graph."""

    name: str
    hash: str
    tasks: int | str
    flops: int | str
    bytes: int | str
    symbols: tuple[str, ...]
    packs: tuple[Pack | None, ...]
    config: dict[str, Any]


@functools.cache
def template(kind: str) -> Any:
    """The module of a kernel template."""
    return importlib.import_module(f"..kernels.templates.{kind}", __package__)


class Kernels:
    """The kernels of one compilation.

    ``functions`` maps content hashes to addresses once `finish` has run; ``libraries`` keeps the
    loaded code alive.
    """

    def __init__(self, target: Target, store: Any, tune: str = "quick") -> None:
        self.target, self.store, self.tune = target, store, tune
        self.functions: dict[str, int] = {}
        self.libraries: list[Any] = []
        self._context = (target.key(), store.version)
        self._known: dict[str, dict[str, Any]] = {}  # hash -> record
        self._declined: dict[str, Unsupported] = {}
        self._pending: dict[str, Kernel] = {}

    # -- questions of the layout ------------------------------------------------------------

    @staticmethod
    def halo_of(node: fx.Node) -> tuple[tuple[int, int], ...]:
        """The zero halo that a convolution or pooling node wants around its input."""
        if "pool" in str(node.target):
            return ()  # poolings clip their windows, which costs them nothing
        return template("conv").required_halo(node)

    # -- selection --------------------------------------------------------------------------

    def select(self, group: Group, io: Mapping[fx.Node, TensorArg]) -> Selected | Remark:
        """The kernel for ``group``, or why there is none."""
        if group.kind not in TEMPLATES:
            return self._remark(group, "PLT-KER-001", f"no template for {group.kind} groups", "")
        spec = Spec(group, io)
        key = spec.hash(*self._context)
        record = self._known.get(key) or self.store.lookup(key)
        if record is None:
            declined = self._declined.get(key)
            if declined is None:
                try:
                    record = self._lower(group, io, key, spec)
                except Unsupported as error:
                    declined = self._declined[key] = error
            if declined is not None:
                return self._remark(group, declined.remark, declined.reason, declined.hint)
        assert record is not None
        self._known[key] = record
        return _selected(key, record, {v: k for k, v in spec.rename.items()})

    def _lower(
        self, group: Group, io: Mapping[fx.Node, TensorArg], key: str, spec: Spec
    ) -> dict[str, Any]:
        module = template(group.kind)
        configs = module.candidates(group, io, self.target)
        if not configs:
            raise Unsupported("PLT-KER-002", f"the {group.kind} template has no candidate")
        kernel = module.lower(group, io, self.target, configs[0], name=f"plait_{key}")
        self._pending[key] = kernel
        return _record(_describe(group), kernel, spec.rename)

    def finish(self) -> None:
        """Compiles what is pending and loads everything that was selected."""
        if self._pending:
            records = {key: self._known[key] for key in self._pending}
            self.store.build(self._pending, records, self.target)
            self._pending = {}
        needed = {key: self._known[key] for key in self._known if key not in self.functions}
        functions, libraries = self.store.load(needed)
        self.functions.update(functions)
        self.libraries.extend(libraries)

    @staticmethod
    def pack(tensor: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Reorders a constant as a kernel wants it."""
        from ..kernels import packing

        return packing.apply(pack, tensor).contiguous()

    @staticmethod
    def _remark(group: Group, remark: str, reason: str, hint: str) -> Remark:
        return missed(remark, tuple(n.name for n in group.nodes), reason, hint)


def missed(remark: str, nodes: Sequence[str], reason: str, hint: str = "") -> Remark:
    """The remark of a group that runs as library operators."""
    return Remark(remark, "missed", "lower", tuple(nodes), reason, hint)


def _describe(group: Group) -> str:
    """A readable name: the operators of a group, the heavy one first."""
    names = [_operator(n) for n in group.nodes]
    if group.anchor is not None:
        anchor = _operator(group.anchor)
        names = [anchor, *[n for n in names if n != anchor]]
    shown = list(dict.fromkeys(names))[:4]
    return "_".join(shown) + ("_etc" if len(set(names)) > 4 else "")


def _operator(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _record(name: str, kernel: Kernel, rename: Mapping[str, str]) -> dict[str, Any]:
    """What the database keeps of a kernel, in canonical symbols."""

    def canonical(value: Any) -> int | str:
        return _substitute(sizes.text(value), rename)

    return {
        "name": name,
        "symbol": kernel.name,
        "tasks": canonical(kernel.tasks),
        "flops": canonical(kernel.flops),
        "bytes": canonical(kernel.bytes),
        "symbols": [rename[s] for s in kernel.symbols],
        "packs": [p and [p.op, [list(item) for item in p.params]] for p in kernel.packs]
        or [None] * len(kernel.inputs),
        "config": kernel.config,
    }


def _selected(key: str, record: Mapping[str, Any], rename: Mapping[str, str]) -> Selected:
    packs = tuple(
        p and Pack(p[0], tuple((name, value) for name, value in p[1])) for p in record["packs"]
    )
    return Selected(
        record["name"],
        key,
        _substitute(record["tasks"], rename),
        _substitute(record["flops"], rename),
        _substitute(record["bytes"], rename),
        tuple(rename[s] for s in record["symbols"]),
        packs,
        record["config"],
    )


def _substitute(value: int | str, rename: Mapping[str, str]) -> int | str:
    if isinstance(value, int) or not rename:
        return value
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda m: rename.get(m.group(), m.group()), value)
