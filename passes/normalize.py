"""`normalize`: the graph in its simplest equal form, which every later pass relies on.

=====================================  ===========================================================
step                                   before → after
=====================================  ===========================================================
`passes.strided`                       ``as_strided(x, ...)`` → elements of x by number
`passes.canonical`                     many spellings of an operation → one
`passes.identities`                    ``dropout(x)`` in inference, ``x * 1``, copies → ``x``
`passes.constants`                     operators on constants → constants; all-True masks → none
`passes.batch_norm`                    ``batch_norm(conv(x))`` → ``conv(x)``, or scale and shift
`passes.transposed`                    transposed convolutions → convolutions
`passes.cse`                           equal computations → one; unread ones → none
`passes.sides`                         operands of a `torch.cond` → constants of one side
=====================================  ===========================================================

All but the first repeat until none of them changes anything. Every rewrite is exact for every
input, NaN, infinities and -0 included, except that folding a batch normalisation rounds differently
(and no worse: factors are combined in float64), and that sums of convolutions have another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from .base import Pass, PassResult, copy_graph
from .batch_norm import KEEP, Keep, fold_batch_norm
from .canonical import canonicalise
from .constants import drop_masks, fold_constants
from .cse import drop_dead, merge_equal
from .identities import drop_identities
from .ir import Rewriter, attribute
from .remarks import Remark
from .sides import own_constants
from .strided import number_elements
from .transposed import convolve_transposed

_MAX_ROUNDS = 8
_SUMMARIES = {
    "PLT-NRM-009": "rewritten in canonical form",
    "PLT-NRM-007": "operators without effect removed",
    "PLT-NRM-004": "constants folded",
    "PLT-NRM-006": "merged with equal computations",
    "PLT-NRM-008": "unread operators removed",
    "PLT-NRM-010": "given to the one side of a torch.cond that reads them",
    "PLT-NRM-011": "transposed convolutions became convolutions",
}


@dataclass(frozen=True)
class Normalize(Pass):
    """Simplify without changing the function.

    Attributes:
        fold_batch_norm: fold inference batch normalisations into what precedes them.
        fold_constants: evaluate what depends on constants alone.
        merge_equal: common subexpression elimination.
        max_constant: largest folded constant, in elements, that may exceed its ingredients.
    """

    name: ClassVar[str] = "normalize"
    fold_batch_norm: bool = True
    fold_constants: bool = True
    merge_equal: bool = True
    max_constant: int = 1 << 16

    def __post_init__(self) -> None:
        if self.max_constant < 0:
            raise ValueError(f"max_constant must not be negative, is {self.max_constant}")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        return self._run(graph_module, graph_module.meta.get(KEEP))

    def _run(self, graph_module: fx.GraphModule, keep: Keep | None) -> PassResult:
        rewriter = Rewriter(copy_graph(graph_module), self.name)
        done: dict[str, list[str]] = {remark_id: [] for remark_id in _SUMMARIES}
        remarks: dict[Remark, None] = {}
        done["PLT-NRM-009"] += number_elements(rewriter)
        changed = any(done.values())
        for _ in range(_MAX_ROUNDS):
            if not self._round(rewriter, done, remarks, keep):
                break
            changed = True
        nested = self._branches(rewriter.graph_module, keep)
        remarks.update(dict.fromkeys(nested))
        for remark_id, nodes in done.items():
            if nodes:
                reason = _SUMMARIES[remark_id]
                remarks[Remark(remark_id, "done", self.name, tuple(nodes), reason)] = None
        if not changed and not any(remark.kind == "done" for remark in nested):
            return PassResult(graph_module, tuple(remarks))
        return PassResult(rewriter.finish(), tuple(remarks))

    def _round(
        self,
        rewriter: Rewriter,
        done: dict[str, list[str]],
        remarks: dict[Remark, None],
        keep: Keep | None,
    ) -> bool:
        """Every step once; whether one of them changed the graph."""
        before = sum(map(len, done.values()))
        found: list[Remark] = []
        done["PLT-NRM-009"] += canonicalise(rewriter)
        done["PLT-NRM-007"] += drop_identities(rewriter)
        done["PLT-NRM-008"] += drop_dead(rewriter)
        if self.fold_constants:
            names, notes = fold_constants(rewriter, self.max_constant)
            done["PLT-NRM-004"] += names
            done["PLT-NRM-007"] += drop_masks(rewriter)
            found += notes
        if self.fold_batch_norm:
            found += fold_batch_norm(rewriter, keep)
        done["PLT-NRM-011"] += convolve_transposed(rewriter, keep)
        if self.merge_equal:
            done["PLT-NRM-006"] += merge_equal(rewriter)
        done["PLT-NRM-010"] += own_constants(rewriter)
        done["PLT-NRM-008"] += drop_dead(rewriter)
        remarks.update(dict.fromkeys(found))
        folded = any(remark.kind == "done" for remark in found)
        return folded or sum(map(len, done.values())) > before

    def _branches(self, graph_module: fx.GraphModule, keep: Keep | None) -> list[Remark]:
        """Normalize the subgraphs that control flow operators take as arguments."""
        remarks: list[Remark] = []
        targets = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
        for target in sorted(targets):
            branch = attribute(graph_module, target)
            if isinstance(branch, fx.GraphModule):
                result = self._run(branch, keep)
                remarks += result.remarks
                owner, _, last = target.rpartition(".")
                setattr(attribute(graph_module, owner) if owner else graph_module, last, result[0])
        return remarks
