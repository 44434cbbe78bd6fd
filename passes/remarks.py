"""Remarks: what a pass did, or did not do and why, as data with stable IDs.

An ID such as ``PLT-FUS-004`` never changes its meaning, so that users may search for it, tests
may assert it and tools may count it. `CATALOGUE` explains every ID. TVM-free and torch-free.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Kind = Literal["done", "missed", "note"]

_ID = re.compile(r"PLT-[A-Z]{3}-\d{3}")
_MARK = {"done": "+", "missed": "-", "note": "."}


@dataclass(frozen=True, slots=True)
class Remark:
    """One event worth telling.

    Attributes:
        id: stable ID, ``PLT-<area>-<number>``.
        kind: "done" for a transformation that happened, "missed" for one that did not, "note".
        pass_name: the pass (or stage) that speaks.
        nodes: names of the FX nodes concerned.
        reason: what happened, or why it did not, in one sentence.
        hint: what the user can do about it; may be empty.
        predicted_gain: seconds per call that the transformation saves, or would have; None where
            nothing was predicted.

    Raises:
        ValueError: the ID or the kind is malformed.
    """

    id: str
    kind: Kind
    pass_name: str
    nodes: tuple[str, ...]
    reason: str
    hint: str = ""
    predicted_gain: float | None = None

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"remark ID {self.id!r} is not of the form PLT-ABC-123")
        if self.kind not in get_args(Kind):
            raise ValueError(f"remark kind {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if isinstance(self.nodes, str):
            raise ValueError(f"nodes must be a tuple of names, not the string {self.nodes!r}")
        object.__setattr__(self, "nodes", tuple(self.nodes))

    def to_json(self) -> dict[str, Any]:
        """The remark as plain JSON values."""
        return {**asdict(self), "nodes": list(self.nodes)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Remark:
        """The remark that `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or of a wrong type.
        """
        unknown = set(data) - set(Remark.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown field of a remark: {', '.join(sorted(unknown))}")
        gain = data.get("predicted_gain")
        texts = [data.get(name, "") for name in ("id", "kind", "pass_name", "reason", "hint")]
        nodes = data.get("nodes", ())
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("id, kind, pass_name, reason and hint of a remark must be strings")
        if not isinstance(nodes, list | tuple) or not all(isinstance(n, str) for n in nodes):
            raise ValueError("nodes of a remark must be a list of names")
        if gain is not None and (isinstance(gain, bool) or not isinstance(gain, int | float)):
            raise ValueError("predicted_gain of a remark must be a number or null")
        return Remark(texts[0], texts[1], texts[2], tuple(nodes), texts[3], texts[4], gain)

    def __str__(self) -> str:
        names = ", ".join(self.nodes[:3]) + (
            f" and {len(self.nodes) - 3} more" * (len(self.nodes) > 3)
        )
        where = f" [{names}]" if self.nodes else ""
        gain = f" (predicted {self.predicted_gain * 1e6:+.1f} us)" if self.predicted_gain else ""
        hint = f"\n    hint: {self.hint}" if self.hint else ""
        return f"{_MARK[self.kind]} {self.id} {self.pass_name}{where}: {self.reason}{gain}{hint}"


def render(remarks: Iterable[Remark], *, kinds: Iterable[str] = get_args(Kind)) -> str:
    """Remarks as text: one per line, equal IDs and reasons counted instead of repeated.

    ``kinds`` selects which kinds are shown; the last line counts all of them.
    """
    remarks = list(remarks)
    wanted = set(kinds)
    merged: dict[tuple[str, str, str, str, str], list[Remark]] = {}
    for remark in remarks:
        if remark.kind in wanted:
            key = (remark.id, remark.kind, remark.pass_name, remark.reason, remark.hint)
            merged.setdefault(key, []).append(remark)
    lines = []
    for same in merged.values():
        first = same[0]
        gains = [r.predicted_gain for r in same if r.predicted_gain is not None]
        nodes = tuple(name for r in same for name in r.nodes)
        gain = sum(gains) if gains else None
        total = Remark(first.id, first.kind, first.pass_name, nodes, first.reason, first.hint, gain)
        lines.append(str(total))
    count = Counter(r.kind for r in remarks)
    lines.append(", ".join(f"{count[kind]} {kind}" for kind in get_args(Kind)))
    return "\n".join(lines)


def explain(remark_id: str) -> str:
    """What an ID means.

    Raises:
        LookupError: the ID is not in the catalogue; the message proposes the nearest ones.
    """
    if remark_id not in CATALOGUE:
        near = difflib.get_close_matches(remark_id, CATALOGUE, 3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise LookupError(f"unknown remark ID {remark_id!r}{hint}")
    return CATALOGUE[remark_id]


CATALOGUE: dict[str, str] = {
    "PLT-ATT-001": "An attention group holds no attention operator.",
    "PLT-ATT-002": "Attention with dropout has no kernel.",
    "PLT-ATT-003": "An operand of an attention operator is not in memory.",
    "PLT-ATT-004": "The type or rank of an attention operand has no kernel.",
    "PLT-ATT-005": "The size of an attention head is zero or known only at run time.",
    "PLT-ATT-006": "The scale of an attention operator is known only at run time.",
    "PLT-ATT-007": "What an attention operator returns is used in a way that kernels do not offer.",
    "PLT-ATT-008": "The attention template generates no code for this target.",
    "PLT-ATT-009": "A node of an attention group has another shape than its result.",
    "PLT-ATT-010": "An operator of an attention group has no converter.",
    "PLT-CAC-001": "The kernel cache cannot be written; kernels of this process are not kept.",
    "PLT-CAC-002": "The index of the kernel cache was damaged; what is missing is made again.",
    "PLT-CAC-003": "A library in the kernel cache is unusable; its kernels are made again.",
    "PLT-CAC-004": "A kernel in the cache was damaged; it is made again.",
    "PLT-CAC-005": "The C compiler cannot link; kernels of this process are not kept.",
    "PLT-CAP-001": "The model could not be captured as one graph; the original runs instead.",
    "PLT-CAP-002": "An input dimension became dynamic because a second size was seen.",
    "PLT-CAP-003": "Gradients were asked for; the original model ran this call.",
    "PLT-CAP-004": "A dimension could not be left dynamic; each of its sizes is compiled.",
    "PLT-CAP-005": "The model changes a container that it is given; the original runs.",
    "PLT-CAP-006": "A result is a number computed from tensors; the original runs.",
    "PLT-CAP-007": "No result is a tensor; the original runs.",
    "PLT-CAP-008": "An argument is not a plain dense tensor; the original runs.",
    "PLT-CAP-009": "An argument cannot be compared between calls; the original runs.",
    "PLT-CAP-010": "The captured program has a kind of input or output that plait cannot pass.",
    "PLT-CAP-011": "A size is not that of any input dimension, so it cannot be recovered.",
    "PLT-CAP-012": "A condition that the captured program relies on cannot be checked.",
    "PLT-CAP-013": "Too many programs for sizes or values of one structure; the original runs.",
    "PLT-CAP-014": "Weights changed after compilation; they were prepared again.",
    "PLT-CAP-015": "Code generation failed; the original runs.",
    "PLT-CAP-016": "The model is in training mode; the original runs.",
    "PLT-CAP-017": "Weights change at almost every call; the original runs.",
    "PLT-CAP-018": "An argument that is written shares memory; the original ran this call.",
    "PLT-CAP-019": "The model changes a plain attribute of a module; the original runs.",
    "PLT-CAP-020": "Weights get their shapes at the first call, which the original ran.",
    "PLT-CAP-021": "Experts or other adapted modules could only be captured the model's way.",
    "PLT-CAP-022": "Guards ask each object for changes, for its memory cannot be read.",
    "PLT-CAP-023": "Values of arguments decide what runs; each decision has a program of its own.",
    "PLT-CAP-024": "A forward hook may do more than compute, which a program would not repeat.",
    "PLT-CAP-025": "A module of torch.jit cannot be traced.",
    "PLT-CAP-026": "Parts or attributes of a model change at almost every call.",
    "PLT-CAP-027": "The model reads an argument by strides, which differ from the captured ones.",
    "PLT-CAP-028": "Weights were made in inference mode: single elements may change unnoticed.",
    "PLT-CAP-029": "The model seeds or asks generators of random numbers; the original runs.",
    "PLT-CNV-001": "A convolution's stride, padding or dilation depends on symbols.",
    "PLT-CNV-002": "What follows a convolution in its group is not elementwise over it.",
    "PLT-CNV-003": "The weight of a convolution is computed; kernels pack constant weights.",
    "PLT-CNV-004": "Transposed convolutions have no kernel.",
    "PLT-CNV-005": "Only one- and two-dimensional convolutions have kernels.",
    "PLT-CNV-006": "What precedes a convolution in its group cannot be computed inside it.",
    "PLT-CNV-007": "A convolution without elements is left to the library.",
    "PLT-CNV-008": "The element type of a convolution has no kernel.",
    "PLT-DEF-001": "A kernel for search or a GPU needs sizes that are known at compile time.",
    "PLT-DEF-002": "A tensor without elements has no kernel to search or to run on a GPU.",
    "PLT-DEF-003": "Overlapping strides cannot be read as one dense buffer.",
    "PLT-DEF-004": "An output of a searched matrix product has another shape than the product.",
    "PLT-DEF-005": "A factor of a searched matrix product is read through a view.",
    "PLT-DEF-006": "The right factor of a searched matrix product is broadcast.",
    "PLT-DEF-007": "A weight does not divide into whole panels for a searched kernel.",
    "PLT-DEF-008": "A searched convolution needs an input with zeros around it.",
    "PLT-DEF-009": "Positions of extremes have no kernel to search or to run on a GPU.",
    "PLT-DEF-010": "A product in 16 bits has no kernel to search or to run on this target.",
    "PLT-DEF-011": "Running totals have no kernel to search or to run on a GPU.",
    "PLT-BRN-001": "The branches of a router became graphs with kernels of their own.",
    "PLT-BRN-002": "It is not clear which gather belongs to a scatter.",
    "PLT-BRN-003": "A branch does not depend on its cells.",
    "PLT-BRN-004": "Branches read each other's cells.",
    "PLT-BRN-005": "Something outside reads the values of one branch.",
    "PLT-BRN-006": "A branch needs a size from outside that it cannot be given.",
    "PLT-BRN-007": "A branch has sizes that none of its inputs has, or that only data tell.",
    "PLT-BRN-008": "A plan with branches or fetches is more than one launch.",
    "PLT-BRN-009": "A cell has no slots, so no branch has cells.",
    "PLT-DST-001": "What was named as a device is nothing that a model can run on here.",
    "PLT-DST-002": "The model cannot be divided among devices.",
    "PLT-DST-003": "There are not as many processes as devices.",
    "PLT-DST-004": "A process of a divided model was lost.",
    "PLT-DST-005": "A process of a divided model did not answer in time.",
    "PLT-DST-006": "Weights do not fit into the memory of a process.",
    "PLT-DST-007": "A weight of a divided model cannot be found or read.",
    "PLT-DST-008": "An option of a divided model has no meaning.",
    "PLT-DST-009": "Operators on a GPU run by torch.",
    "PLT-DST-010": "A process of a divided model failed.",
    "PLT-DST-011": "A divided model is not ready, or ended.",
    "PLT-DST-012": "A model was divided among devices.",
    "PLT-DST-013": "Several batches of a divided model do not fit into memory at a time.",
    "PLT-DST-014": "The experts of layers were divided among devices.",
    "PLT-DST-015": "The experts of a layer cannot be divided among devices.",
    "PLT-EXP-001": "The routed product template generates no code for this target.",
    "PLT-EXP-002": "Routed products have no kernel in this type.",
    "PLT-EXP-003": "The weights of a routed product are computed; kernels pack constant weights.",
    "PLT-EXP-004": "A routed product without weights is left to the library.",
    "PLT-EXP-005": "What follows a routed product is not elementwise over it.",
    "PLT-EXP-006": "A routed product has more rows than the kernel numbers.",
    "PLT-EXP-007": "A routed product whose matrices lie in slots has kernels on GPUs only.",
    "PLT-FUS-001": "Operators were fused into one kernel.",
    "PLT-FUS-002": "The operator has no kernel of ours and runs as a library call.",
    "PLT-FUS-004": "Fusing would make two kernels wait for each other.",
    "PLT-FUS-005": "The group reached max_nodes and was closed.",
    "PLT-FUS-006": "The group would read and write more tensors than a kernel takes.",
    "PLT-GEM-001": "An operand of a matrix product has a form that no kernel reads.",
    "PLT-GEM-002": "The matrix product template does not know this operator or target.",
    "PLT-GEM-003": "alpha or beta of a matrix product depends on symbols.",
    "PLT-GEM-004": "The element type of a matrix product has no kernel.",
    "PLT-GEM-005": "The group has no matrix product to build on.",
    "PLT-GPU-001": "Groups of this kind have no GPU kernel.",
    "PLT-GPU-002": "An operator of the group has no GPU kernel.",
    "PLT-GPU-003": "Products of so many FLOPs are left to the library.",
    "PLT-GPU-004": "What the library computes cannot be part of a CUDA graph.",
    "PLT-GPU-005": "The kernels of a plan run on several streams of a GPU.",
    "PLT-GPU-006": "Fused launches did not measure faster, so kernels are launched one by one.",
    "PLT-GPU-007": "A pass of the pipeline is for another kind of device and did nothing.",
    "PLT-GPU-008": "A branch that may take rows only of its own runs by its operators on a GPU.",
    "PLT-HFU-001": "Kernels with unequal numbers of threads in a block cannot share a launch.",
    "PLT-HFU-002": "Kernels cannot share a launch: one writes memory that another touches.",
    "PLT-HFU-003": "A kernel to be fused has a size known only at run time.",
    "PLT-HFU-004": "A kernel to be fused makes the blocks of its launch work together.",
    "PLT-HFU-005": "A fused launch would need more shared memory than a block may declare.",
    "PLT-HFU-006": "A fused launch would have more blocks or tensors than a launch can have.",
    "PLT-HFU-007": "Independent kernels share one launch.",
    "PLT-HFU-008": "One launch for independent kernels would not end sooner.",
    "PLT-HLF-001": "A product in bfloat16 of unknown size is left to the library's tiles (AMX).",
    "PLT-INP-001": "The arguments of a call do not match the compiled program.",
    "PLT-INP-002": "A size of an argument is outside what the compiled program takes.",
    "PLT-INP-003": "A loaded program met arguments that it was not saved for.",
    "PLT-INP-004": "dynamic_shapes does not fit the model's arguments.",
    "PLT-INP-005": "The model itself fails on example_inputs.",
    "PLT-INP-006": "An index among the arguments is out of range.",
    "PLT-INP-007": "A weight that a loaded program was given is unlike the one it had.",
    "PLT-KER-001": "There is no kernel template for this kind of group.",
    "PLT-KER-002": "The kernel template has no candidate for this group.",
    "PLT-KER-003": "The code generator rejected a kernel; the group runs as library operators.",
    "PLT-KER-004": "An operator or size of the group has no lowering.",
    "PLT-KER-005": "A kernel template failed unexpectedly; the group runs as library operators.",
    "PLT-KER-006": "Every candidate of a kernel gave a wrong result in its race.",
    "PLT-KER-007": "The library won the race against the kernels; the group runs there.",
    "PLT-KER-008": "A kernel would have more arguments than a launch passes on.",
    "PLT-LOW-001": "A value is not a single tensor in memory, so a library call computes it.",
    "PLT-LOW-002": "A size depends on data, so a library call computes the value.",
    "PLT-MEM-001": "Intermediate tensors share one arena of memory.",
    "PLT-NRM-001": "A batch normalisation was folded into the convolution or linear before it.",
    "PLT-NRM-002": "A batch normalisation became one scale and one shift by constants.",
    "PLT-NRM-003": "A batch normalisation was left alone: its statistics are not constants.",
    "PLT-NRM-004": "A subgraph of constants was evaluated once, ahead of time.",
    "PLT-NRM-005": "A computation of constants was not folded: the result would be too large.",
    "PLT-NRM-006": "Equal computations were merged into one.",
    "PLT-NRM-007": "Operators without effect on the result were removed.",
    "PLT-NRM-008": "Dead code was removed.",
    "PLT-NRM-009": "Operators were rewritten in a canonical form.",
    "PLT-NRM-010": "Constants that only one side of a torch.cond reads became that side's own.",
    "PLT-NRM-011": "A transposed convolution became a convolution, whose results are interleaved.",
    "PLT-OPT-001": "The tune option is unknown.",
    "PLT-OPT-002": "The pipeline option is not a pipeline.",
    "PLT-OPT-003": "What was given cannot be compiled.",
    "PLT-OPT-004": "An option cannot be given for a class.",
    "PLT-OPT-005": "What was given as a profile is none.",
    "PLT-OPT-006": "The weight budget has no meaning, or is less than what must be resident.",
    "PLT-MRG-001": "Operators on one input were merged, which measured faster than apart.",
    "PLT-MRG-002": "Merging operators on one input did not measure faster; they stay apart.",
    "PLT-MRG-003": "Operators on one input cannot be merged.",
    "PLT-MRG-004": "Merging operators on one input was not measured, so they stay apart.",
    "PLT-PAR-001": "Independent kernels run side by side, which measured faster than in order.",
    "PLT-PAR-002": "Running kernels side by side promises too little; they stay in order.",
    "PLT-PAR-003": "Running kernels side by side did not measure faster; they stay in order.",
    "PLT-PAR-004": "A plan cannot be scheduled; its kernels stay in order.",
    "PLT-PAR-005": "Schedules cannot be measured: the plan does not run on made-up inputs.",
    "PLT-PAR-006": "IOS's search was too large; list scheduling took its place.",
    "PLT-PLC-001": "An optimizer whose training step is to be placed is unknown.",
    "PLT-PLC-002": "A model cannot be exported, so its graph cannot be placed.",
    "PLT-PLC-003": "The devices to place on are missing or have no meaning.",
    "PLT-PLC-004": "A GPU that is to be looked at is not there, or of no known kind.",
    "PLT-PLC-005": "What was given to plait.place_experts has no meaning.",
    "PLT-PNT-001": "An operator of a pointwise group has no converter.",
    "PLT-PNT-002": "The outputs of a pointwise group share no loop.",
    "PLT-PNT-003": "A chain of joins would read its inputs too often for each element.",
    "PLT-POL-001": "A pooling window depends on symbols.",
    "PLT-POL-002": "What precedes a pooling in its group cannot be computed inside it.",
    "PLT-POL-003": "Positions of maxima are left to the library.",
    "PLT-POL-004": "The element type of a pooling has no kernel.",
    "PLT-PRE-001": "Weights of routed products or branches lie on a slower tier.",
    "PLT-PRE-002": "Routed weights stay resident, for another operator reads all of them.",
    "PLT-PRE-003": "Routed weights stay resident, for their product is no kernel.",
    "PLT-PRE-004": "The weight budget covers all weights.",
    "PLT-PRE-005": "Weights cannot be kept in a file, or cannot be read back.",
    "PLT-PRE-006": "Weights of a branch stay resident, for what is no branch reads them, too.",
    "PLT-PRE-007": "Weights that a torch.cond is given from outside of its sides stay resident.",
    "PLT-PRE-008": "The model's own weights were made in inference mode, so they stay in memory.",
    "PLT-PRE-009": "A program for another call needs more than the budget that was enough so far.",
    "PLT-PRE-010": "Weights of a model on a GPU are not kept to a budget, so the original runs.",
    "PLT-PRE-011": "Weights of a model on a GPU that slots cannot hold stay in its memory.",
    "PLT-PRE-012": "The model's own experts stay in a GPU's memory, beside those in host memory.",
    "PLT-PRF-001": "There are no batches to profile a model with, or it fails on one.",
    "PLT-PRF-002": "A profile is of another model.",
    "PLT-PRF-003": "The file to save a profile to cannot be written.",
    "PLT-PRF-004": "A profile cannot be read: missing, cut short or something else.",
    "PLT-PRF-005": "A profile was made by another version.",
    "PLT-PRF-006": "A profile holds what no run can give.",
    "PLT-PRF-007": "What was given to plait.profile has no meaning.",
    "PLT-ROW-001": "A rows group holds no reduction.",
    "PLT-ROW-002": "The reductions of a rows group fold different rows.",
    "PLT-ROW-003": "Instance norm with running statistics has no kernel.",
    "PLT-ROW-004": "A view lies inside a group with reductions.",
    "PLT-ROW-005": "A node of a rows group has neither the rows' shape nor the space's.",
    "PLT-ROW-006": "A node of a rows group reads other rows of its source.",
    "PLT-ROW-007": "The rows template generates no code for this target.",
    "PLT-ROW-008": "An operator of a rows group has no converter.",
    "PLT-RTE-001": "The routing template generates no code for this target.",
    "PLT-RTE-002": "Routes are read as a whole, not as offsets and order.",
    "PLT-RTE-003": "Branches are numbered in a type that has no kernel.",
    "PLT-RTE-004": "There are more branches or slots than the kernel counts.",
    "PLT-SAV-001": "Nothing is compiled yet, so there is nothing to save.",
    "PLT-SAV-002": "The compiled model cannot be saved.",
    "PLT-SAV-003": "The file to save to cannot be written.",
    "PLT-SAV-004": "A saved program cannot be read: damaged, truncated or something else.",
    "PLT-SAV-005": "A saved program was made by other versions.",
    "PLT-RUN-001": "A forked process has no team of threads; launches run on one.",
    "PLT-SCH-001": "A searched schedule has loop nests with barriers between them.",
    "PLT-SCH-002": "The parallel loop of a searched schedule has no constant range.",
    "PLT-SCH-003": "A searched schedule needs more temporary memory than a task's stack has.",
    "PLT-SPC-001": "A branch that the profile says is dead is compiled when it is first needed.",
    "PLT-SPC-002": "A branch was dead in the fitted batches, but not in the held-out ones.",
    "PLT-SPC-003": "The profile says too little about a router to bet on it.",
    "PLT-SPC-004": "A router whose index depends on no input was folded.",
    "PLT-SPC-005": "A plan for the likely routes runs first; the general plan behind it.",
    "PLT-SPC-006": "No held-out batch judges a bet, so it is not made.",
    "PLT-SPC-007": "A likely route cannot become part of the graph.",
    "PLT-SPC-008": "A branch has a second plan for the number of rows that it often has.",
    "PLT-SPC-009": "A bet was refused: by measurement it does not pay.",
    "PLT-SPC-010": "What all branches of a router begin with runs before the scatter.",
    "PLT-SPC-011": "Live routes left those that a plan bets on.",
    "PLT-SPC-012": "A plan was made anew from the routes of live calls.",
    "PLT-SPC-013": "Making a plan anew failed; the present one stays.",
    "PLT-SPC-014": "Branches that run together are one path of the plan for likely routes.",
    "PLT-SPC-015": "A branch may look at more than one cell at a time, so it gets exactly its own.",
    "PLT-SPC-016": "A dead branch was needed and could not be compiled; its operators run alone.",
    "PLT-TOP-001": "The top-k template generates no code for this target.",
    "PLT-TOP-002": "The results of a sort are read as a whole, not as values and places.",
    "PLT-TOP-003": "Truth values are sorted by the library.",
    "PLT-TOP-004": "Long lists are sorted by the library.",
    "PLT-TOP-005": "Which of equal elements comes first is left open, so the library says it.",
}
"""Every remark ID and its meaning. An ID is never reused with another meaning."""
