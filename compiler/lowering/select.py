"""Chooses and builds the kernel of each group: from the database, or lowered, compiled, raced.

Everything before a `finish` is bookkeeping; all kernels that the database lacks are then compiled
in one batch. With ``tune="quick"`` the best few candidates of each heavy kernel are raced.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ...kernels import race
from ...kernels.abi import MOST_ARGUMENTS, Kernel, Pack, TensorArg
from ...kernels.database import Database, Entry, Measured
from ...kernels.group import Group, Unsupported
from ...kernels.target import Target
from ...kernels.templates.conv_spec import required_halo
from ...passes.remarks import Remark
from .. import sizes
from .spec import Spec
from .trial import Trial, numbers

TEMPLATES = (
    *("pointwise", "rows", "reduce", "gemm", "conv", "pool", "attention"),
    *("topk", "route", "experts"),
)
HEAVY = ("gemm", "conv", "pool", "attention")
CANDIDATES = {"off": 1, "quick": 2, "full": 6}
"""Of seven models' kernels the better of two was within 0.7 % of the best of three, the first
within 2.6 %, and what is raced must be compiled first."""
REPORT = "set PLAIT_DEBUG=1 to see where, and report it"
LIBRARY_MARGIN = 1.25
"""How much faster the library must be: a library step between kernels costs a launch more."""
RACE_FLOPS = 2_000_000  # below some 20 us candidates hardly differ


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
    return importlib.import_module(f"...kernels.templates.{kind}", __package__)


@dataclass(frozen=True)
class Choice:
    """A kernel still to be built: ``key`` in the database, and this graph's names of its
    symbols.
    """

    key: str
    symbols: Mapping[str, str]


@dataclass
class _Pending:
    """Candidates of one kernel that the database lacks."""

    group: Group
    io: Mapping[fx.Node, TensorArg]
    kernels: list[Kernel]
    entries: list[Entry]
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """A group that a kernel was asked for, and this graph's symbols by their canonical names."""

    group: Group
    io: Mapping[fx.Node, TensorArg]
    rename: Mapping[str, str]


@functools.cache
def database() -> Database:
    """The kernel database of this process."""
    return Database()


class Kernels:
    """The kernels of one compilation.

    ``functions`` maps content hashes to addresses once `finish` has run, ``requests`` to what they
    were made from; ``libraries`` keeps the loaded code alive; ``raced`` counts races.
    """

    def __init__(self, target: Target, store: Database, tune: str = "quick") -> None:
        self.target, self.store, self.tune = target, store, tune
        self.functions: dict[str, int] = {}
        self.requests: dict[str, Request] = {}
        self.libraries: list[Any] = []
        self.raced = 0
        self.built = 0
        self._context = (target.key(), store.version)
        self._known: dict[str, Entry] = {}
        self._declined: dict[str, Unsupported] = {}
        self._pending: dict[str, _Pending] = {}

    # -- questions of the layout ------------------------------------------------------------

    @staticmethod
    def halo_of(node: fx.Node) -> tuple[tuple[int, int], ...]:
        """The zero halo that a convolution node wants around its input."""
        return required_halo(node)

    # -- selection --------------------------------------------------------------------------

    @staticmethod
    def groups(module: fx.GraphModule) -> list[Group]:
        """The groups of a graph, as `fuse-vertical` made them."""
        from ...passes.fuse_vertical import groups_of

        return groups_of(module)

    def select(self, group: Group, io: Mapping[fx.Node, TensorArg]) -> Choice | Remark:
        """The kernel for ``group``, or why there is none."""
        if group.kind not in TEMPLATES:
            return self._remark(group, "PLT-KER-001", f"no template for {group.kind} groups", "")
        spec = Spec(group, io)
        key = spec.hash(*self._context)
        if key not in self._known and key not in self._pending and key not in self._declined:
            entry = self.store.lookup(key)
            if entry is not None:
                self._adopt(entry)
            else:
                try:
                    self._pending[key] = self._lower(group, io, key, spec)
                except Unsupported as error:
                    self._declined[key] = error
                except NotImplementedError as error:
                    self._declined[key] = Unsupported("PLT-KER-004", str(error))
                except Exception as error:  # a defect of a template must not cost the whole model
                    if os.environ.get("PLAIT_DEBUG"):
                        raise
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
                    self._declined[key] = Unsupported("PLT-KER-005", why, REPORT)
        if key in self._declined:
            why = self._declined[key]
            return self._remark(group, why.remark, why.reason, why.hint)
        self.requests.setdefault(key, Request(group, io, spec.rename))
        return Choice(key, {v: k for k, v in spec.rename.items()})

    def resolve(self, choice: Choice) -> Selected:
        """What was built for a choice; call after `finish`."""
        return selected(choice.key, self._known[choice.key].record, choice.symbols)

    def _lower(
        self, group: Group, io: Mapping[fx.Node, TensorArg], key: str, spec: Spec
    ) -> _Pending:
        module = template(group.kind)
        configs = module.candidates(group, io, self.target)
        if not configs:
            raise Unsupported("PLT-KER-002", f"the {group.kind} template has no candidate")
        wanted = CANDIDATES[self.tune] if group.kind in HEAVY else 1
        kernels, entries = [], []
        for number, config in enumerate(configs[:wanted]):
            name = f"plait_{key}_{number}"
            kernel = module.lower(group, io, self.target, config, name=name)
            arguments = len(kernel.inputs) + len(kernel.outputs) + len(kernel.symbols)
            if arguments > MOST_ARGUMENTS:
                reason = f"a kernel with {arguments} tensors and sizes, of at most {MOST_ARGUMENTS}"
                raise Unsupported("PLT-KER-008", reason)
            if number and not _worth_racing(kernel):
                break
            kernels.append(kernel)
            entries.append(Entry(key, name, record(group, kernel, spec.rename)))
        return _Pending(group, io, kernels, entries)

    def finish(self) -> bool:
        """Compiles, races and loads what was selected; False if some group must be chosen anew.

        A kernel that the code generator rejects is declined from then on.
        """
        pending, self._pending = self._pending, {}
        if pending:
            self._build(pending)
        if any(key in self._declined for key in pending):
            return False
        for key, entry in self._known.items():
            if key not in self.functions:
                self.functions[key] = self.store.address(entry)
        self.libraries = list(
            {e.object: self.store.library(e.object) for e in self._known.values()}.values()
        )
        return True

    def _build(self, pending: Mapping[str, _Pending]) -> None:
        from ...kernels.build import BuildError, build  # imports TVM

        kernels = [k for p in pending.values() for k in p.kernels]
        try:
            bundle = build(kernels, self.target)
        except BuildError as error:
            for key in pending:
                self._declined[key] = Unsupported("PLT-KER-003", f"code generation failed: {error}")
            return
        self.built += len(kernels)
        if bundle.unlinked:
            self.store.unlinked(bundle.unlinked)
        winners: list[Entry] = []
        measured: list[Measured] = []
        for key, item in pending.items():
            usable = [
                (k, e)
                for k, e in zip(item.kernels, item.entries, strict=True)
                if k.name not in bundle.failed
            ]
            if not usable:
                why = bundle.failed[item.kernels[0].name]
                self._declined[key] = Unsupported("PLT-KER-003", f"code generation failed: {why}")
                continue
            best: Entry | None = usable[0][1]
            if len(usable) > 1:
                best, results = self._race(item, usable, bundle)
                measured += results
            if best is not None:
                winners.append(best)
        for entry in self.store.store(winners, bundle.data, bundle.library, measured):
            self._adopt(entry)

    def _race(
        self, item: _Pending, usable: Sequence[tuple[Kernel, Entry]], bundle: Any
    ) -> tuple[Entry | None, list[Measured]]:
        """The fastest correct candidate on one thread, timed beside the library.

        None, and the kernel declined, where every candidate's result was wrong.
        """
        trial = Trial(item.group, item.io, {})
        candidates = [
            race.Candidate.kernel(
                k.name,
                bundle.address(k.name),
                numbers([k.tasks], {})[0],
                list(trial.words(k, list(k.packs))),
                config=k.config,
                keep=trial,
            )
            for k, _ in usable
        ]
        results = race.race(
            candidates,
            check=trial.error,
            tolerance=trial.tolerance,
            reset=trial.spoil,
            rounds=5,
            margin=1.1,
            budget=0.5,
            clock=time.thread_time,  # others' work on a busy machine does not count
        )
        self.raced += 1
        key = usable[0][1].key
        measured = [Measured(key, r.candidate.config, r.seconds, r.error, r.note) for r in results]
        best = race.fastest(results)
        if best is None:
            why = f"no candidate passed its test ({results[0].note})"
            self._declined[key] = Unsupported("PLT-KER-006", why, REPORT)
            return None, measured
        entry = usable[results.index(best)][1]
        library = trial.library_seconds() * torch.get_num_threads()
        kernel = min(best.samples)  # the library's is the best of its samples, too
        record = {**entry.record, "library_seconds": library, "kernel_seconds": kernel}
        entry = replace(entry, record=record, seconds=best.seconds, effort=len(results))
        return entry, measured

    def _adopt(self, entry: Entry) -> None:
        """Takes a kernel from the database, unless its race told that the library is faster."""
        library = entry.record.get("library_seconds", math.inf)
        kernel = entry.record.get("kernel_seconds", 0.0)
        if library < kernel / LIBRARY_MARGIN:
            self._declined[entry.key] = Unsupported(
                "PLT-KER-007",
                f"the library took {library * 1e6:.0f} us of a core's time in the race, "
                f"the best kernel {kernel * 1e6:.0f} us",
                "plait cache clear lets them race again",
            )
        else:
            self._known[entry.key] = entry

    @staticmethod
    def pack(tensor: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Reorders a constant as a kernel wants it."""
        from ...kernels import packing

        return packing.apply(pack, tensor).contiguous()

    @staticmethod
    def _remark(group: Group, remark: str, reason: str, hint: str = "") -> Remark:
        return missed(remark, tuple(n.name for n in group.nodes), reason, hint)


def _worth_racing(kernel: Kernel) -> bool:
    """Whether a race tells something: known sizes, and long enough to differ."""
    static = not kernel.symbols and isinstance(kernel.tasks, int) and kernel.tasks > 0
    return static and isinstance(kernel.flops, int) and kernel.flops > RACE_FLOPS


def missed(remark: str, nodes: Sequence[str], reason: str, hint: str = "") -> Remark:
    """The remark of a group that runs as library operators."""
    return Remark(remark, "missed", "lower", tuple(nodes), reason, hint)


def describe(group: Group) -> str:
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


def record(group: Group, kernel: Kernel, rename: Mapping[str, str]) -> dict[str, Any]:
    """What the database keeps of a group's kernel, in canonical symbols."""

    def canonical(value: Any) -> int | str:
        return _substitute(sizes.text(value), rename)

    return {
        "name": describe(group),
        "symbol": kernel.name,
        "tasks": canonical(kernel.tasks),
        "flops": canonical(kernel.flops),
        "bytes": canonical(kernel.bytes),
        "symbols": [rename[s] for s in kernel.symbols],
        "packs": [p and [p.op, [list(item) for item in p.params]] for p in kernel.packs]
        or [None] * len(kernel.inputs),
        "config": kernel.config,
    }


def selected(key: str, record: Mapping[str, Any], rename: Mapping[str, str]) -> Selected:
    """A kernel that the database has, in a graph's symbols."""
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
