"""The Plan: what runs, on what memory, in what order. Pure data, saved as JSON.

Sizes may depend on *symbols* (dynamic dimensions). They are kept as text in Python's integer
syntax over the symbols (``"4*s0*(s0 + 1)"``) and evaluated when a call fixes the symbols.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .sizes import Size, evaluate

PLAN_VERSION = 7


class PlanError(ValueError):
    """A plan that is malformed, cut short, or of another version."""


@dataclass(frozen=True)
class Buffer:
    """One piece of memory.

    ``kind``: "input" (the caller's, number ``index``), "output" (fresh for each call, number
    ``index``), "const" (constant ``name``), "arena" (at ``offset`` bytes of the workspace),
    "static" (own memory of the workspace, zero at first and kept between calls: haloes), or
    "library" (a tensor that a library step returns). ``nbytes`` is its size.
    """

    name: str
    kind: str
    nbytes: Size = 0
    index: int = 0
    offset: Size = 0
    device: str = "cpu"


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a buffer: offset, shape and strides in elements of ``dtype``."""

    buffer: str
    dtype: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = 0


@dataclass(frozen=True)
class KernelStep:
    """Runs tasks [0, ``tasks``) of kernel ``kernel`` (a content hash).

    ``args`` are tensor arguments in the kernel's order and ``symbols`` the values that follow
    them; the first ``reads`` arguments are only read. ``flops`` and ``bytes`` are the work.
    ``place`` tells where a scheduled step runs: pairs (worker, end) in order; the worker takes the
    tasks from the end before to its own. Without, the tasks are shared out evenly.
    """

    name: str
    kernel: str
    args: tuple[TensorRef, ...]
    reads: int
    symbols: tuple[str, ...] = ()
    tasks: Size = 1
    flops: Size = 0
    bytes: Size = 0
    group: int = -1
    place: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LibraryStep:
    """Calls a library operator through torch.

    ``target`` is "aten.relu.default" or the name of a subgraph of the plan's library; ``args`` and
    ``kwargs`` are JSON values in which ``{"ref": i}`` is ``refs[i]``, ``{"size": text}`` a size,
    ``{"dtype"|"layout"|"device"|"memory_format": name}`` torch constants and ``{"none": 1}`` None.
    Result k becomes ``results[k]`` (None: dropped).
    """

    name: str
    target: str
    refs: tuple[TensorRef, ...]
    args: Any
    kwargs: Any
    results: tuple[TensorRef | None, ...]
    group: int = -1


@dataclass(frozen=True)
class BranchStep:
    """Runs plans of its own, which of them and on what the data tells.

    ``kind`` "rows": plan b gets rows ``selector[b]`` to ``selector[b + 1]`` of ``refs[0]`` and the
    other ``refs``, and writes as many rows of ``results[0]``; without rows it does not run.
    ``kind`` "cond": the first plan runs where the truth value ``selector`` holds, else the second;
    each gets all ``refs`` and gives all ``results``. ``plans`` are names in `Plan.parts`.

    ``router`` tells which router of a profile it is, ``name#call``. Where ``sized[b]`` is a number
    of rows and the name of another plan, and not (0, ""), that plan runs the first so many rows of
    plan b, if there are as many; plan b runs the others.
    """

    name: str
    kind: str
    plans: tuple[str, ...]
    selector: TensorRef
    refs: tuple[TensorRef, ...]
    results: tuple[TensorRef, ...]
    group: int = -1
    router: str = ""
    sized: tuple[tuple[int, str], ...] = ()

    @property
    def every_plan(self) -> tuple[str, ...]:
        """All plans that it may run."""
        return (*self.plans, *(name for _, name in self.sized if name))

    @property
    def units(self) -> tuple[tuple[str, ...], ...]:
        """The plans that each branch may run."""
        sized = [name for _, name in self.sized] or [""] * len(self.plans)
        return tuple((n, *([s] if s else [])) for n, s in zip(self.plans, sized, strict=True))


@dataclass(frozen=True)
class FetchStep:
    """Makes weights of routed products resident, for the steps up to the next `FetchStep`.

    ``banks`` are constants that lie on a slower tier, with a unit for each branch; wanted are the
    units b for which ``selector[b] < selector[b + 1]`` (the offsets of a route). Where they do not
    fit together, the steps that follow run in parts. ``router`` names what routes, "" if unknown.
    On a GPU ``table`` is a constant that kernels read, with the slot of each unit.
    """

    name: str
    banks: tuple[str, ...]
    selector: TensorRef
    router: str = ""
    group: int = -1
    table: str = ""


Step = KernelStep | LibraryStep | BranchStep | FetchStep


def touched(step: Step) -> tuple[TensorRef | None, ...]:
    """Everything that a step reads or writes."""
    if isinstance(step, KernelStep):
        return step.args
    if isinstance(step, LibraryStep):
        return (*step.refs, *step.results)
    if isinstance(step, FetchStep):
        return (step.selector,)
    return (step.selector, *step.refs, *step.results)


def cuts(steps: Sequence[Step]) -> frozenset[int]:
    """Numbers of the steps of a GPU's plan that the host issues by itself: those that choose among
    plans, those that fetch weights, and kernels that find weights by a table.
    """
    tables = {step.table for step in steps if isinstance(step, FetchStep)}
    return frozenset(
        number
        for number, step in enumerate(steps)
        if isinstance(step, BranchStep | FetchStep)
        or (isinstance(step, KernelStep) and any(a.buffer in tables for a in step.args))
    )


@dataclass(frozen=True)
class Lane:
    """Where a step of a GPU's plan runs: its stream, and the steps of other streams that it has to
    wait for. Steps of one stream run in the plan's order.
    """

    stream: int
    waits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that must hold (``text`` evaluates to true), and what it protects."""

    text: str
    message: str


@dataclass
class Plan:
    """A compiled model without weights and code.

    ``symbols`` maps a symbol to (input number, dimension) where a call binds it. ``inputs`` and
    ``outputs`` describe the caller's tensors; an output may be an alias of an input or of a
    constant. ``arena_bytes`` is the workspace's peak. ``parts`` are the plans that `BranchStep`
    names; a name without a plan is ``deferred``: it is compiled when it is first needed.
    ``fetched`` are constants on a slower tier that whoever runs the plan as a part of another makes
    resident first. ``workers`` is the number of threads for which its steps are placed, 0 if they
    are not.

    A plan for a GPU has a `Lane` for every step in ``lanes``, and in ``urgent`` the streams that
    come first where the GPU has to choose.
    """

    name: str
    buffers: dict[str, Buffer]
    steps: list[Step]
    inputs: list[TensorRef]
    outputs: list[TensorRef]
    symbols: dict[str, tuple[int, int]] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    arena_bytes: Size = 0
    parts: dict[str, Plan] = field(default_factory=dict)
    deferred: tuple[str, ...] = ()
    fetched: tuple[str, ...] = ()
    workers: int = 0
    lanes: list[Lane] = field(default_factory=list)
    urgent: tuple[int, ...] = ()
    version: int = PLAN_VERSION

    def every_step(self) -> Iterator[Step]:
        """The steps of this plan and, after each `BranchStep`, those of its parts."""
        for step in self.steps:
            yield step
            if isinstance(step, BranchStep):
                for name in step.every_plan:
                    if name in self.parts:
                        yield from self.parts[name].every_step()

    def to_json(self) -> str:
        return json.dumps(self._document(), indent=1)

    def _document(self) -> dict[str, Any]:
        document = asdict(replace(self, parts={}))
        for step, data in zip(self.steps, document["steps"], strict=True):
            data["type"] = _TYPES[type(step)]
        document["parts"] = {name: part._document() for name, part in self.parts.items()}
        return document

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads a plan back. Raises PlanError naming what is wrong."""
        try:
            return Plan._read(json.loads(text))
        except PlanError:
            raise
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the plan cannot be read ({error}): compile again") from error

    @staticmethod
    def _read(document: dict[str, Any]) -> Plan:
        if document["version"] != PLAN_VERSION:
            raise PlanError(
                f"plan version {document['version']} is not {PLAN_VERSION}: compile again"
            )
        document["steps"] = [_step(data) for data in document["steps"]]
        document["buffers"] = {k: Buffer(**b) for k, b in document["buffers"].items()}
        document["inputs"] = [_ref(r) for r in document["inputs"]]
        document["outputs"] = [_ref(r) for r in document["outputs"]]
        document["symbols"] = {k: tuple(v) for k, v in document["symbols"].items()}
        document["guards"] = [Guard(**g) for g in document["guards"]]
        document["parts"] = {k: Plan._read(part) for k, part in document["parts"].items()}
        document["deferred"] = tuple(document["deferred"])
        document["fetched"] = tuple(document["fetched"])
        document["lanes"] = [Lane(k["stream"], tuple(k["waits"])) for k in document["lanes"]]
        document["urgent"] = tuple(document["urgent"])
        return Plan(**document)

    def __str__(self) -> str:
        lines = [f"plan {self.name}: {len(self.steps)} steps, workspace {self.arena_bytes} bytes"]
        if self.fetched:
            lines.append(f"       fetched where it runs: {', '.join(self.fetched)}")
        for i, step in enumerate(self.steps):
            if isinstance(step, KernelStep):
                reads = ", ".join(a.buffer for a in step.args[: step.reads])
                writes = ", ".join(a.buffer for a in step.args[step.reads :])
                tasks = "" if self.lanes else f"  tasks={step.tasks}"
                lines.append(f"  {i:4d} {writes} = {step.name}({reads}){tasks}")
            elif isinstance(step, BranchStep):
                reads = ", ".join(r.buffer for r in step.refs)
                writes = ", ".join(r.buffer for r in step.results)
                lines.append(
                    f"  {i:4d} {writes} = {step.kind} {step.selector.buffer} of "
                    f"{len(step.plans)} plans({reads})"
                )
                for name in step.every_plan:
                    part = str(self.parts[name]) if name in self.parts else f"plan {name}: deferred"
                    lines += [f"       {line}" for line in part.splitlines()]
            elif isinstance(step, FetchStep):
                lines.append(f"  {i:4d} fetch {', '.join(step.banks)} by {step.selector.buffer}")
            else:
                reads = ", ".join(a.buffer for a in step.refs)
                writes = ", ".join(r.buffer if r else "_" for r in step.results)
                lines.append(f"  {i:4d} {writes} = library {step.target}({reads})")
            if self.lanes:
                after = "".join(f" after {k}" for k in self.lanes[i].waits)
                lines[-1] += f"  stream {self.lanes[i].stream}{after}"
        return "\n".join(lines)


_TYPES: dict[type, str] = {
    KernelStep: "kernel", LibraryStep: "library", BranchStep: "branch", FetchStep: "fetch",
}  # fmt: skip


def _step(data: dict[str, Any]) -> Step:
    kind = data.pop("type")
    if kind == "kernel":
        data["args"] = tuple(_ref(a) for a in data["args"])
        data["symbols"] = tuple(data["symbols"])
        data["place"] = tuple((worker, end) for worker, end in data["place"])
        return KernelStep(**data)
    if kind == "fetch":
        data["selector"], data["banks"] = _ref(data["selector"]), tuple(data["banks"])
        return FetchStep(**data)
    data["refs"] = tuple(_ref(a) for a in data["refs"])
    data["results"] = tuple(a and _ref(a) for a in data["results"])
    if kind == "library":
        return LibraryStep(**data)
    data["selector"] = _ref(data["selector"])
    data["plans"] = tuple(data["plans"])
    data["sized"] = tuple((rows, name) for rows, name in data["sized"])
    return BranchStep(**data)


def _ref(data: Mapping[str, Any]) -> TensorRef:
    return TensorRef(
        data["buffer"],
        data["dtype"],
        tuple(data["shape"]),
        tuple(data["strides"]),
        data["offset"],
    )


def check_guards(plan: Plan, values: Mapping[str, int]) -> str | None:
    """The message of the first guard that does not hold for these symbol values, if any."""
    for guard in plan.guards:
        if not evaluate(guard.text, values):
            return guard.message
    return None
