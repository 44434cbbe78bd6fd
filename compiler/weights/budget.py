"""A compiled model's weights under a budget: what lies in files, and how much may be resident.

One `WeightStore` serves all programs of a model, so they share banks and budget. With it

* packed weights of routed products and of branches, which the sides of a `torch.cond` are, too, are
  written to files, those of routed products unit by unit, and become a `Bank`;
* the tensors they were made from, the model's own parameters, move into a file, too: they keep
  their values, their names and their place in the module, and come into memory when they are read.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch
import torch.fx as fx
from torch import nn

from ...kernels.abi import Pack
from ...kernels.ops import argument
from ...passes.ir import COND, attribute
from ...passes.outline_branches import between
from ...passes.prefetch_weights import LEAST, Tiered
from ...passes.remarks import Remark
from ...passes.sides import own_operands
from ...runtime.bank import Bank, BankError, Mapped, PrivateFile, raw_bytes, release
from ...runtime.tier import Tier
from ..capture.captured import Captured
from ..errors import BudgetError, FileError

if TYPE_CHECKING:
    from ...runtime.cuda_graph import GpuExecutor
    from ...runtime.executor import Executor
    from ..routing.profile import Profile


@dataclass
class _Filed:
    """A tensor that lies in a file: what keeps its memory, its version then, and hashes of it.

    ``fresh`` shares its memory and version while it is being compiled. Pages may be given back for
    as long as that is the version then: what was written to them goes with them.
    """

    space: weakref.ref[Any]
    version: int
    fresh: torch.Tensor | None
    digests: dict[Any, bytes] = field(default_factory=dict)

    def release(self, part: torch.Tensor | None = None) -> None:
        """Gives pages back, of all or of ``part``, that only hold what the file does."""
        if self.fresh is not None and self.fresh._version == self.version:
            release(self.fresh if part is None else part)


@dataclass(frozen=True)
class _Served:
    """What runs a program, the bytes that the tier may hold beside it, those of the largest unit
    that it fetches, and of all that it leaves in files.
    """

    engine: weakref.ref[Any]
    room: int
    largest: int
    filed: int


_FILES: dict[int, _Filed] = {}
"""By address, tensors of all models: where two share weights, they must not move them in turns."""


class WeightStore:
    """Banks, files and the tier of one compiled model. ``budget`` is what `plait.compile` takes."""

    where = "a file"
    place: torch.device | None = None
    """The GPU that it is for."""

    def __init__(self, budget: int | str) -> None:
        self.budget = budget
        self.tier: Tier | None = None
        self._cached = True
        self._banks: weakref.WeakValueDictionary[Any, Bank] = weakref.WeakValueDictionary()
        self._served: list[_Served] = []
        self.lenient = False
        """Whether a program that needs more than the budget may have it: there are others, and a
        call is under way. Else that is an error."""
        folder = os.environ.get("PLAIT_CACHE_DIR") or platformdirs.user_cache_dir("plait")
        self._folder = Path(folder)

    # -- the budget -------------------------------------------------------------------------------

    def open(self, tiered: Tiered) -> None:
        """Gets ready for a program's weights."""
        self._cached = tiered.cached
        if self.tier is None:
            self.tier = Tier(tiered.budget, tiered.ahead, tiered.evict)  # type: ignore[arg-type]

    def close(
        self, tiered: Tiered, largest: int, stayed: int, remarks: list[Remark] | None = None
    ) -> int:
        """The bytes that the tier may hold beside a plan: the budget less what is always resident.
        It holds no more from now on, until `settle`.

        ``largest`` are the bytes that must be resident at once at least, ``stayed`` those that were
        meant for the tier, but could not go there. Raises OptionError where there is no room. If
        `lenient`, a plan that leaves in files what others do goes beyond the budget instead, by
        what it makes of sizes, and ``remarks`` gets one.
        """
        always = tiered.total - tiered.tiered + stayed
        capacity = tiered.budget - always
        others = self._living()
        needed = max([largest, *(other.largest for other in others)])
        beyond = tiered.total > tiered.budget
        if capacity < needed or (beyond and not largest):
            detail = (
                f"{_mib(always)} outside of routed products and branches are always resident, the "
                f"largest expert's or branch's weights are {_mib(needed)}"
                if needed
                else "there are no routed products with kernels, and no branches with large "
                f"weights, that could lie in {self.where}"
            )
            least = (always + needed) if needed else tiered.total
            text = f"weight_budget={self.budget!r} is {_mib(tiered.budget)}: {detail}"
            hint = f"give at least {least} bytes"
            less = any(other.filed > tiered.tiered - stayed for other in others)
            if remarks is None or not self.lenient or (beyond and less):
                raise BudgetError("PLT-OPT-006", text, hint, least)
            over = f"{least - tiered.budget} bytes more than the budget are resident"
            remarks.append(Remark("PLT-PRE-009", "missed", "weights", (), f"{over}: {text}", hint))
        if self.tier is not None:
            self.tier.limit(max(min(self.tier.capacity, capacity), needed))
        return capacity

    def serve(self, engine: object, capacity: int, largest: int, filed: int) -> None:
        """The tier may hold ``capacity`` bytes as long as there is ``engine``, what runs a program;
        for the rest see `_Served`.
        """
        self._served.append(_Served(weakref.ref(engine), capacity, largest, filed))

    def _living(self) -> list[_Served]:
        return [served for served in self._served if served.engine() is not None]

    def trying(self) -> AbstractContextManager[None]:
        """What is fetched within it, to time plans, counts for nothing."""
        return contextlib.nullcontext() if self.tier is None else self.tier.trying()

    # -- files ------------------------------------------------------------------------------------

    def bank(self, source: torch.Tensor, pack: Pack | None, whole: bool = False) -> Bank:
        """``source`` ``[units, ...]``, or of any shape where it is one ``whole`` unit, packed, as a
        bank; the same one for the same contents. Without a ``pack`` it is as it is.

        Raises FileError where it cannot be written.
        """
        from ...kernels import packing

        filed = self._filed(source)
        digest = key = None
        if filed:
            key = source.data_ptr(), source.shape, source.stride(), source._version, pack, whole
            digest = filed.digests.get(key)
        if digest is None:
            digest = self._digest(source, pack, whole)
            if filed:
                filed.digests[key] = digest
        bank = self._banks.get(digest)
        if bank is None:

            def packed() -> Iterator[torch.Tensor]:
                for unit in self._units(source, whole):
                    made = unit if pack is None else packing.apply(pack, unit)
                    yield made if whole else made[0]
                    del made
                    _trim()  # what packing needed meanwhile

            with self.reported():
                bank = Bank(self._folder, packed(), self._cached, alone=whole)
            self._banks[digest] = bank
        return bank

    def _digest(self, source: torch.Tensor, pack: Pack | None, whole: bool) -> bytes:
        digest = hashlib.sha256(repr((source.dtype, source.shape, pack, whole)).encode())
        for unit in self._units(source, whole):
            digest.update(raw_bytes(unit.contiguous()))
        return digest.digest()

    def _units(self, source: torch.Tensor, whole: bool) -> Iterator[torch.Tensor]:
        """One after the other; what it brought of a file into memory is given back behind it."""
        filed = self._filed(source)
        for unit in (source,) if whole else source.split(1):
            yield unit
            if filed:
                filed.release(unit)

    def file(self) -> PrivateFile:
        """An empty file. Raises FileError."""
        with self.reported():
            return PrivateFile(self._folder)

    @staticmethod
    @contextlib.contextmanager
    def reported() -> Iterator[None]:
        """Within it, a file that cannot be written is a FileError."""
        try:
            yield
        except BankError as error:
            hint = "make room, or set PLAIT_CACHE_DIR to a folder of another disk"
            raise FileError("PLT-PRE-005", str(error), hint) from error

    def filed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor like ``tensor`` that lies in a file; itself if it already does, or cannot.

        Raises FileError where it cannot be written.
        """
        if self._filed(tensor) or not tensor.numel() or not _dense(tensor):
            return tensor
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        file = self.file()
        with self.reported():
            file.write(raw_bytes(flat))
            mapped = file.map()
        result = mapped.tensor(0, flat.shape, tensor.dtype)
        self.note(result, mapped)
        return result.as_strided(tensor.shape, tensor.stride())

    def keep(self, made: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """A large tensor ``made`` of ``source`` in a file; and nothing of ``source`` in memory that
        a file has. Raises FileError.
        """
        filed = self._filed(source)
        if filed:
            filed.release(source)
        if not _is_large(made):
            return made
        _trim()  # what making it needed: of large pieces the allocator may keep all
        return self.filed(made)

    def note(self, tensor: torch.Tensor, mapped: Mapped) -> None:
        """Remembers that ``tensor`` lies in a file."""
        space = weakref.ref(mapped.space)
        _FILES[tensor.data_ptr()] = _Filed(space, tensor._version, tensor)

    def _filed(self, tensor: torch.Tensor) -> _Filed | None:
        """What is known of the memory of ``tensor``, if it still is what it was in its file."""
        found = _FILES.get(tensor.untyped_storage().data_ptr())
        if found is None or found.space() is None or found.version != tensor._version:
            return None
        return found

    @contextlib.contextmanager
    def moved(self, captured: Captured, modules: Sequence[nn.Module]) -> Iterator[int]:
        """Moves the parameters that routed products and branches read into files, to be compiled
        within it; yields how many bytes of them cannot be moved.

        The parameters of ``modules`` stay the objects they are. Raises FileError.
        """
        stuck = 0
        try:
            module = captured.graph_module
            found_by = holders(modules)
            for name in sorted(_chosen_constants(module)):
                tensor = getattr(module, name)
                found = found_by.get(tensor.untyped_storage().data_ptr(), [])
                if any(t.is_inference() for t in (tensor, *found)):
                    stuck += tensor.nbytes  # torch would give it other memory, and then not know it
                elif all(same_memory(tensor, parameter) for parameter in found):
                    setattr(module, name, self._move(tensor, found))
            yield stuck
        finally:
            self.settle()

    def _move(self, tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        versions = [p._version for p in parameters]
        moved = self.filed(tensor)
        if moved is tensor or versions != [p._version for p in parameters]:
            return tensor  # it lies in a file, or another thread wrote to it meanwhile
        filed = _FILES[moved.data_ptr()]
        for parameter in parameters:
            parameter.data = moved
            filed.version, filed.fresh = parameter._version, parameter.detach()
        return moved if filed.fresh is None else filed.fresh

    def settle(self) -> None:
        """Call when a program is made or was not, before anybody else has its weights: gives back
        what making it has brought into memory, and the room that plans had which are no more.
        """
        for address, filed in list(_FILES.items()):  # others may be added meanwhile
            filed.release()
            filed.fresh = None
            if filed.space() is None and _FILES.get(address) is filed:
                del _FILES[address]
        gc.collect()  # graphs are cycles, and hold tensors
        self._served = self._living()
        if self.tier is not None and self._served:
            room = min(served.room for served in self._served)
            self.tier.limit(max([room, *(served.largest for served in self._served)]))
        _trim()

    def forget(self) -> None:
        """Weights may have changed unseen."""
        for filed in list(_FILES.values()):
            filed.digests.clear()

    # -- forecasts --------------------------------------------------------------------------------

    def learn(self, executor: Executor | GpuExecutor, profile: Profile) -> None:
        """Starts the forecasts of an executor's sites, and of its parts', from a profile."""
        if self.tier is None:
            return
        forecast, sites = self.tier.forecast, dict(_sites(executor))
        for router in profile.total:
            site = sites.get(f"{router.name}#{router.call}")
            if site is not None:
                forecast.prior(site, router.load)
        for pair, table in profile.total.pairs.items():
            before, after = (sites.get(f"{name}#{call}") for name, call in pair)
            if before is not None and after is not None:
                forecast.prior_pair(before, after, table)


def _sites(executor: Executor | GpuExecutor) -> Iterator[tuple[str, int]]:
    """Routers and the numbers of their sites, of an executor and its parts."""
    for step in executor.plan.steps:
        fetching = executor.fetching
        if fetching is not None and getattr(step, "router", "") and step.name in fetching.sites:
            yield step.router, fetching.sites[step.name].number
    for part in executor.parts.values():
        if hasattr(part, "parts"):  # else it is not compiled yet
            yield from _sites(part)  # type: ignore[arg-type]


def _trim() -> None:
    """Gives free memory of the allocator back to the system."""
    with contextlib.suppress(AttributeError):  # an allocator of another kind
        ctypes.CDLL(None).malloc_trim(0)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def reading(run: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    """``run`` of an executable, which raises FileError where weights cannot be read back."""

    def told(*args: Any) -> list[torch.Tensor]:
        try:
            return run(*args)
        except BankError as error:
            hint = "see to the disk, or set PLAIT_CACHE_DIR to another; the next call tries again"
            raise FileError("PLT-PRE-005", str(error), hint) from error

    return told


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a piece of memory without gaps, in whatever order."""
    reach = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda d: d[1]):
        if size != 1 and stride != reach:
            return False
        reach *= size
    return True


def holders(modules: Sequence[nn.Module]) -> dict[int, list[torch.Tensor]]:
    """The parameters and buffers of modules by the address of their storage, each once."""
    found: dict[int, dict[int, torch.Tensor]] = {}
    for module in (m for root in modules for m in root.modules()):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or type(tensor) not in (torch.Tensor, nn.Parameter):
                continue
            if tensor.layout == torch.strided:
                address = tensor.untyped_storage().data_ptr()
                found.setdefault(address, {})[id(tensor)] = tensor
    return {address: list(tensors.values()) for address, tensors in found.items()}


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are one, of all that their storage holds."""
    whole = a.untyped_storage().nbytes() == a.nbytes
    same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return whole and same and a.data_ptr() == b.data_ptr()


def _chosen_constants(module: fx.GraphModule) -> set[str]:
    """Attributes of a captured graph that matrices of routed products are made of, and large ones
    that only branches of routers and sides of a `torch.cond` read.
    """
    sources: dict[fx.Node, frozenset[str] | None] = {}  # None: depends on an input
    branches: set[fx.Node] = set()
    for node in module.graph.nodes:
        found = [sources[a] for a in node.all_input_nodes]
        known = node.op == "call_function" and None not in found
        sources[node] = frozenset().union(*found) if known else None  # type: ignore[arg-type]
        if node.op == "get_attr":
            sources[node] = frozenset([str(node.target)])
        elif str(node.target) == "plait.scatter.default":
            branches |= between(node)
    routed: set[str] = set()
    inside: set[str] = set()
    outside: set[str] = set()
    for node in module.graph.nodes:
        if str(node.target) == "plait.routed_linear.default":
            routed |= sources[argument(node, "weight")] or set()
        if sources[node] is None:
            own = own_operands(module, node) if node.target is COND else ()
            for source in node.all_input_nodes:
                taken = inside if node in branches or source in own else outside
                taken.update(sources[source] or ())
    return routed | {name for name in inside - outside if _is_large(attribute(module, name))}


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.nbytes >= LEAST
