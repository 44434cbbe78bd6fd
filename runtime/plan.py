"""The Plan: what runs, on what memory, in what order. Pure data, saved as JSON.

Sizes may depend on *symbols* (dynamic dimensions). They are kept as text in Python's integer
syntax over the symbols (``"4*s0*(s0 + 1)"``) and evaluated when a call fixes the symbols.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .sizes import Size, evaluate

PLAN_VERSION = 1


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
class Guard:
    """A condition on sizes that must hold (``text`` evaluates to true), and what it protects."""

    text: str
    message: str


@dataclass
class Plan:
    """A compiled model without weights and code.

    ``symbols`` maps a symbol to (input number, dimension) where a call binds it. ``inputs`` and
    ``outputs`` describe the caller's tensors; an output may be an alias of an input or of a
    constant. ``arena_bytes`` is the workspace's peak.
    """

    name: str
    buffers: dict[str, Buffer]
    steps: list[KernelStep | LibraryStep]
    inputs: list[TensorRef]
    outputs: list[TensorRef]
    symbols: dict[str, tuple[int, int]] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    arena_bytes: Size = 0
    version: int = PLAN_VERSION

    def to_json(self) -> str:
        document = asdict(self)
        for step, data in zip(self.steps, document["steps"], strict=True):
            data["type"] = "kernel" if isinstance(step, KernelStep) else "library"
        return json.dumps(document, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads a plan back. Raises PlanError naming what is wrong."""
        try:
            document = json.loads(text)
            if document["version"] != PLAN_VERSION:
                raise PlanError(
                    f"plan version {document['version']} is not {PLAN_VERSION}: compile again"
                )
            steps = []
            for data in document["steps"]:
                kind = data.pop("type")
                if kind == "kernel":
                    data["args"] = tuple(_ref(a) for a in data["args"])
                    data["symbols"] = tuple(data["symbols"])
                    steps.append(KernelStep(**data))
                else:
                    data["refs"] = tuple(_ref(a) for a in data["refs"])
                    data["results"] = tuple(a and _ref(a) for a in data["results"])
                    steps.append(LibraryStep(**data))
            document["steps"] = steps
            document["buffers"] = {k: Buffer(**b) for k, b in document["buffers"].items()}
            document["inputs"] = [_ref(r) for r in document["inputs"]]
            document["outputs"] = [_ref(r) for r in document["outputs"]]
            document["symbols"] = {k: tuple(v) for k, v in document["symbols"].items()}
            document["guards"] = [Guard(**g) for g in document["guards"]]
            return Plan(**document)
        except PlanError:
            raise
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the plan cannot be read ({error}): compile again") from error

    def __str__(self) -> str:
        lines = [f"plan {self.name}: {len(self.steps)} steps, workspace {self.arena_bytes} bytes"]
        for i, step in enumerate(self.steps):
            if isinstance(step, KernelStep):
                reads = ", ".join(a.buffer for a in step.args[: step.reads])
                writes = ", ".join(a.buffer for a in step.args[step.reads :])
                lines.append(f"  {i:4d} {writes} = {step.name}({reads})  tasks={step.tasks}")
            else:
                reads = ", ".join(a.buffer for a in step.refs)
                writes = ", ".join(r.buffer if r else "_" for r in step.results)
                lines.append(f"  {i:4d} {writes} = library {step.target}({reads})")
        return "\n".join(lines)


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
