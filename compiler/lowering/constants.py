"""The constants of a plan: as they are or packed for kernels, in memory or on a slower tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from ...kernels.abi import Pack
from ...passes.ir import attribute, branches_of
from ...passes.prefetch_weights import BRANCH, EXPERTS, TIERED
from ...passes.remarks import Remark
from ...runtime.bank import Bank
from ...runtime.pages import Pool
from ..weights.budget import WeightStore
from .lowered import Absent, Kernels
from .select import missed
from .storage import Place, Root


class Constants:
    """What is made of the constants of ``graph_module``; weights marked for a slower tier go to
    ``store``, where there is one.

    ``tensors`` has them by buffer name. Of those on the slower tier ``banks`` have a unit for each
    expert, ``whole`` are one unit each. ``absent`` are on the meta device until they are filled.
    """

    def __init__(
        self, graph_module: fx.GraphModule, kernels: Kernels, store: WeightStore | None
    ) -> None:
        self._graph_module, self._kernels, self._store = graph_module, kernels, store
        self._pool = Pool()
        self.tensors: dict[str, torch.Tensor] = {}
        self.banks: dict[str, Bank] = {}
        self.whole: dict[str, Bank] = {}
        self.absent: dict[str, Absent] = {}

    def plain(self, root: Root) -> None:
        """Keeps a constant as it is. Raises FileError where it cannot go to a file."""
        node = _node(root)
        source = self._source(node)
        self.tensors[root.name] = source
        if self._store is not None and node.meta.get(TIERED) == BRANCH:
            reach = sum((d - 1) * s for d, s in zip(source.shape, source.stride(), strict=True))
            flat = source.as_strided((1 + reach,), (1,))
            self.whole[root.name] = bank = self._store.bank(flat, None, whole=True)
            tensor = bank.tensor[0].as_strided(source.shape, source.stride())
            self.tensors[root.name] = tensor
            self._file(node)
        if source.is_meta:
            geometry = tuple(source.shape), source.stride()
            self.absent[root.name] = Absent(str(node.target), *geometry, 0, None)

    def packed(self, root: Root, place: Place, pack: Pack) -> str:
        """The name of a constant reordered for one kernel; prepared once however many kernels want
        it. Raises FileError where it cannot go to a file.
        """
        params = ",".join(f"{k}={v}" for k, v in pack.params)
        view = f"{place.offset}:{place.shape}:{place.strides}"
        name = f"{place.root}|{pack.op}({params})|{view}"
        if name in self.tensors:
            return name
        node = _node(root)
        source = self._source(node)
        offset = source.storage_offset() + int(place.offset)
        tensor = source.as_strided(place.shape, place.strides, offset)
        kind = None if self._store is None else node.meta.get(TIERED)
        if self._store is not None and kind == EXPERTS:
            self.banks[name] = bank = self._store.bank(tensor, pack)
            self.tensors[name] = bank.tensor
        elif self._store is not None and kind == BRANCH:
            self.whole[name] = bank = self._store.bank(tensor, pack, whole=True)
            self.tensors[name] = bank.tensor[0]
        else:
            self.tensors[name] = self._pool.place(self._kernels.pack(tensor, pack))
        if kind is not None:
            self._file(node)
        if source.is_meta:
            shape, strides = tuple(tensor.shape), tensor.stride()
            self.absent[name] = Absent(str(node.target), shape, strides, int(place.offset), pack)
        return name

    def stayed(self, roots: Iterable[Root]) -> tuple[int, list[Remark]]:
        """Bytes of weights that were meant for a slower tier but have no kernel, and remarks."""
        size, remarks = 0, []
        for root in roots:
            node = root.node
            if node is None or root.name not in self.tensors or node.meta.get(TIERED) != EXPERTS:
                continue
            reason = "the product that reads these weights is no kernel, so they stay resident"
            remarks.append(missed("PLT-PRE-003", (node.name,), reason))
            size += self.tensors[root.name].nbytes
        return size, remarks

    def _source(self, node: fx.Node) -> torch.Tensor:
        source = attribute(self._graph_module, str(node.target)).detach()
        if not source.is_neg():
            return source
        # Kernels read memory, which such a view only promises to negate.
        return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype).copy_(source)

    def _file(self, node: fx.Node) -> None:
        assert self._store is not None
        _to_file(self._graph_module, node, self._store)


def to_files(module: fx.GraphModule, store: WeightStore) -> None:
    """Lets weights of a graph, and of those in it, that are marked for a slower tier lie in files
    until they are lowered. Raises FileError.
    """
    for node in module.graph.find_nodes(op="get_attr"):
        if TIERED in node.meta:
            _to_file(module, node, store)
    for _, inner in branches_of(module):
        to_files(inner, store)


def _to_file(module: fx.GraphModule, node: fx.Node, store: WeightStore) -> None:
    *path, last = str(node.target).split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, store.filed(getattr(owner, last).detach()))


def _node(root: Root) -> fx.Node:
    assert root.node is not None
    return root.node
