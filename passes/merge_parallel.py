"""`merge-parallel-ops`: products and convolutions that read the same tensor become one.

before: q = linear(x, wq);  k = linear(x, wk);  v = linear(x, wv)
after:  y = linear(x, [wq; wk; wv]);  q, k, v = y[..., :a], y[..., a:b], y[..., b:]

One product over all rows of the weights reads ``x`` once and has more work to share out. The parts
are slices of it, that is, only addresses; pointwise operators that all parts go through alike
happen before the cut. A smaller convolution kernel may be enlarged with zeros to the size of the
others (``enlarge``).

Whether it gains depends on sizes, caches and on what else could have been fused: a gate that was
fused into one of the products no longer is. So each merger is taken only where the parts, together
with the pointwise operators that follow them, measured slower apart than as one. Who measures is
told by the graph (`JUDGE`); without, all mergers are reported and none is done.

After Jia et al., "TASO", SOSP 2019, and "operator merge" in Ding et al., "IOS", MLSys 2021, which
chose between merging and concurrency by a measured cost as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from ..kernels import ops
from .base import Pass, PassResult, allow, copy_graph, with_graph
from .ir import Aliases, Rewriter, argument, aten, branches_of, is_call, is_pure, same_shape
from .remarks import Remark

JUDGE = "merge-judge"
"""Key of a graph module's ``meta``: a `Judge`."""

Verdict = tuple[float, float]
"""Seconds a call of the separate operators, and of the merged ones."""
Judge = Callable[[fx.GraphModule, fx.GraphModule, bool], "Verdict | str"]
"""Measures two graphs that compute the same from one input (the second may return larger tensors,
of which the results are slices), for a place where other operators could run beside them, or could
not; a text tells why they cannot be measured.
"""

_PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    # operator -> positions of the input, the weight and the bias
    aten.linear.default: (0, 1, 2),
    aten.mm.default: (0, 1, None),
    aten.matmul.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
}
_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
)


@dataclass(frozen=True)
class _Part:
    """One operator that may join others: how it reads its operands, and how its result is cut."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rows: int  # dimension of the weight along which parts are joined
    cut: int  # dimension of the result along which they are cut apart
    kernel: tuple[int, ...]  # spatial size of a convolution's kernel
    key: Hashable  # equal for operators that may join

    @property
    def width(self) -> int:
        """The length of the part in the joined result."""
        return int(self.weight.meta["val"].shape[self.rows])


@dataclass(frozen=True)
class MergeParallelOps(Pass):
    """Merges operators on one input where that measures faster.

    Attributes:
        products: consider matrix products.
        convolutions: consider convolutions.
        enlarge: let a smaller convolution kernel grow, with zeros around it, to join larger ones.
            Infinities and NaN then reach results that they would not have reached, so the function
            stays the same only for finite inputs.
        most_growth: multiplications of a merger, as a multiple of those before, at most.
        least_gain: share of the time that a merger must save.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "merge-parallel-ops"
    products: bool = True
    convolutions: bool = True
    enlarge: bool = False
    most_growth: float = 1.5
    least_gain: float = 0.03

    def __post_init__(self) -> None:
        if not self.most_growth >= 1.0:
            raise ValueError(f"most_growth must be at least 1, is {self.most_growth}")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        return self._run(graph_module, graph_module.meta.get(JUDGE))

    def _run(self, graph_module: fx.GraphModule, judge: Judge | None) -> PassResult:
        rewriter = Rewriter(copy_graph(graph_module), self.name)
        remarks: list[Remark] = []
        changed = False
        for parts in self._candidates(rewriter, remarks):
            changed |= self._try(rewriter, parts, judge, remarks)
        for name, branch in branches_of(rewriter.graph_module):
            inner = self._run(branch, judge)
            setattr(rewriter.graph_module, name, inner.graph_module)
            remarks += inner.remarks
            changed |= inner.graph_module is not branch
        if not changed:
            return PassResult(graph_module, tuple(remarks))
        return PassResult(rewriter.finish(), tuple(remarks))

    def _candidates(self, rewriter: Rewriter, remarks: list[Remark]) -> list[list[_Part]]:
        aliases = Aliases(rewriter.graph)
        groups: dict[Hashable, list[_Part]] = {}
        grouped: dict[Hashable, list[str]] = {}
        for node in rewriter.graph.nodes:
            part = self._part(rewriter, node)
            if part is None:
                if self.convolutions and is_call(node, *_CONVOLUTIONS) and _groups(node) != 1:
                    grouped.setdefault(_reading(node), []).append(node.name)
                continue
            touched = (node, part.source, part.weight, *filter(None, [part.bias]))
            if any(map(aliases.is_mutated, touched)):
                continue
            groups.setdefault(part.key, []).append(part)
        for names in grouped.values():
            if len(names) > 1:
                reason = "of one grouped convolution their channels would lie interleaved"
                remarks.append(self._missed("PLT-MRG-003", names, reason))
        found = []
        for parts in groups.values():
            escaping = [p.node.name for p in parts if p.node in aliases.escaping]
            inner = [p for p in parts if p.node not in aliases.escaping]
            if len(parts) > 1 and escaping:
                reason = "results of the model must not share memory"
                remarks.append(self._missed("PLT-MRG-003", escaping, reason))
            for run in self._by_growth(inner):
                if len(run) > 1:
                    found.append(run)
        return found

    def _part(self, rewriter: Rewriter, node: fx.Node) -> _Part | None:
        if self.products and is_call(node, *_PRODUCTS):
            part = _product(node)
        elif self.convolutions and is_call(node, *_CONVOLUTIONS):
            part = _convolution(node, self.enlarge)
        else:
            return None
        if part is None:
            return None
        operands = [part.weight, *([] if part.bias is None else [part.bias])]
        values = [rewriter.value(n) for n in operands]
        if any(v is None or v.is_meta or isinstance(v, FakeTensor) for v in values):
            return None
        return part

    def _by_growth(self, parts: list[_Part]) -> Iterator[list[_Part]]:
        """Parts to be merged with each other: those whose kernels differ too much stay apart."""
        parts = sorted(parts, key=lambda p: -_area(p.kernel))
        while parts:
            largest = tuple(map(max, zip(*(p.kernel for p in parts), strict=True)))
            work = sum(p.width * _area(p.kernel) for p in parts)
            if sum(p.width for p in parts) * _area(largest) <= self.most_growth * work:
                yield parts
                return
            alike = [p for p in parts if p.kernel == parts[0].kernel]
            yield alike
            parts = [p for p in parts if p.kernel != parts[0].kernel]

    def _try(
        self,
        rewriter: Rewriter,
        parts: list[_Part],
        judge: Judge | None,
        remarks: list[Remark],
    ) -> bool:
        names = [p.node.name for p in parts]
        parts = self._parts(rewriter, names)  # what they read may have become a slice since
        if judge is None:
            reason = "nobody measures whether it gains"
            hint = "compile the model with this pass in the pipeline"
            remarks.append(self._missed("PLT-MRG-004", names, reason, hint))
            return False
        apart = _extract(rewriter, parts)
        verdict = judge(
            apart, self._joined(apart, names), _has_others(apart, rewriter.graph, parts)
        )
        if isinstance(verdict, str):
            remarks.append(self._missed("PLT-MRG-004", names, verdict))
            return False
        before, after = verdict
        figures = f"{after * 1e6:.1f} us merged, {before * 1e6:.1f} us apart"
        if after > (1 - self.least_gain) * before:
            remarks.append(self._missed("PLT-MRG-002", names, figures))
            return False
        if not allow("merge parallel", [p.node for p in parts]):
            return False
        merge(rewriter, parts)
        done = Remark("PLT-MRG-001", "done", self.name, tuple(names), figures, "", before - after)
        remarks.append(done)
        return True

    def _parts(self, rewriter: Rewriter, names: Sequence[str]) -> list[_Part]:
        nodes = {n.name: n for n in rewriter.graph.nodes}
        found = [self._part(rewriter, nodes[name]) for name in names]
        return [p for p in found if p is not None]

    def _joined(self, apart: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
        """The graph that `_extract` made, merged; results that are slices return what they lie
        in.
        """
        rewriter = Rewriter(copy_graph(apart), self.name)
        new = merge(rewriter, self._parts(rewriter, names))
        output = next(iter(rewriter.graph.find_nodes(op="output")))
        pieces = list(output.args[0])  # type: ignore[arg-type]
        whole = [new if is_call(a, aten.slice.Tensor) else a for a in pieces]
        output.args = (list(dict.fromkeys(whole)),)
        _erase_unread([a for a in pieces if is_call(a, aten.slice.Tensor)])
        return rewriter.finish()

    def _missed(self, remark: str, names: Sequence[str], reason: str, hint: str = "") -> Remark:
        return Remark(remark, "missed", self.name, tuple(names), reason, hint)


def _product(node: fx.Node) -> _Part | None:
    x, w, b = _PRODUCTS[node.target]
    source, weight = node.args[x], node.args[w]
    bias = None if b is None or b >= len(node.args) else node.args[b]
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if node.kwargs or weight.meta["val"].dim() != 2:
        return None
    rows = 0 if node.target is aten.linear.default else 1
    width = weight.meta["val"].shape[rows]
    if bias is not None:
        if not isinstance(bias, fx.Node) or not same_shape(bias.meta["val"].shape, (width,)):
            return None
    key = (node.target, source)
    return _Part(node, source, weight, bias, rows, node.meta["val"].dim() - 1, (), key)


def _convolution(node: fx.Node, enlarge: bool) -> _Part | None:
    source, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    general = node.target is aten.convolution.default
    transposed = general and argument(node, 6, "transposed", False)
    dims = weight.meta["val"].dim() - 2
    if _groups(node) != 1 or transposed or node.meta["val"].dim() != dims + 2:
        return None
    stride, padding, dilation = (_each(node, dims, k) for k in (3, 4, 5))
    kernel = tuple(map(int, weight.meta["val"].shape[2:]))
    grows = enlarge and all(
        k % 2 == 1 and p == d * (k // 2) for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    shape: Hashable = "same" if grows else (kernel, padding)
    key = (node.target, source, stride, dilation, shape)
    return _Part(node, source, weight, bias, 0, 1, kernel, key)


def _groups(node: fx.Node) -> int:
    position = 8 if node.target is aten.convolution.default else 6
    return argument(node, position, "groups", 1)


def _reading(node: fx.Node) -> Hashable:
    """Equal for convolutions that read the same pixels of the same tensor, each for its groups."""
    source, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    kernel = tuple(weight.meta["val"].shape[2:])
    how = (_each(node, len(kernel), k) for k in (3, 4, 5))
    return (node.target, source, kernel, _groups(node), *how)


def _each(node: fx.Node, dims: int, position: int) -> tuple[int, ...]:
    """A convolution's stride (3), padding (4) or dilation (5) for each spatial dimension."""
    name = ("stride", "padding", "dilation")[position - 3]
    value = argument(node, position, name, 0 if position == 4 else 1)
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)


def _area(kernel: Sequence[int]) -> int:
    product = 1
    for size in kernel:
        product *= size
    return product


def merge(rewriter: Rewriter, parts: Sequence[_Part]) -> fx.Node:
    """Makes one operator of ``parts`` in the rewriter's graph; the node that parts are cut from."""
    first = min((p.node for p in parts), key=_positions(rewriter.graph).__getitem__)
    kernel = tuple(map(max, zip(*(p.kernel for p in parts), strict=True)))
    weights, biases = [], []
    with torch.no_grad():
        for part in parts:
            weights.append(_enlarged(_value(rewriter, part.weight), kernel))
            biases.append(
                weights[-1].new_zeros(part.width)
                if part.bias is None
                else _value(rewriter, part.bias)
            )
        weight = torch.cat(weights, parts[0].rows)
        bias = torch.cat(biases) if any(p.bias is not None for p in parts) else None
    joined = rewriter.constant(weight, f"{first.name}_weight", first)
    offset = None if bias is None else rewriter.constant(bias, f"{first.name}_bias", first)
    target, args = _joined_call(parts, joined, offset, kernel)
    new = rewriter.call(target, args, like=first)
    ends = [p.node for p in parts]
    unread = [[p.weight, *([] if p.bias is None else [p.bias]), p.node] for p in parts]
    aliases = Aliases(rewriter.graph)
    while (step := _common_step(ends, aliases)) is not None:
        new = rewriter.call(
            step.target,  # type: ignore[arg-type]
            tuple(new if a is ends[0] else a for a in step.args),
            dict(step.kwargs),
            like=first,
        )
        ends = [next(iter(end.users)) for end in ends]
        for chain, end in zip(unread, ends, strict=True):
            chain.append(end)
    begin = 0
    for part, end in zip(parts, ends, strict=True):
        stop = begin + part.width
        piece = rewriter.call(aten.slice.Tensor, (new, part.cut, begin, stop), like=end)
        end.replace_all_uses_with(piece)
        begin = stop
    _erase_unread([node for chain in unread for node in chain])
    return new


def _erase_unread(nodes: Sequence[fx.Node]) -> None:
    """Removes those of ``nodes``, writers before readers, that nobody reads any more."""
    for node in reversed(dict.fromkeys(nodes)):
        if not node.users:
            node.graph.erase_node(node)


def _joined_call(
    parts: Sequence[_Part], weight: fx.Node, bias: fx.Node | None, kernel: tuple[int, ...]
) -> tuple[Any, tuple[Any, ...]]:
    node, source = parts[0].node, parts[0].source
    if node.target in (aten.mm.default, aten.matmul.default):
        return node.target, (source, weight)
    if node.target is aten.addmm.default:
        return node.target, (bias, source, weight)
    if node.target is aten.linear.default:
        return node.target, (source, weight, bias)
    dims = len(kernel)
    stride, padding, dilation = (list(_each(node, dims, k)) for k in (3, 4, 5))
    if parts[0].kernel != kernel or any(p.kernel != kernel for p in parts):
        padding = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
    if node.target is aten.convolution.default:
        none = [0] * dims
        return node.target, (source, weight, bias, stride, padding, dilation, False, none, 1)
    return node.target, (source, weight, bias, stride, padding, dilation, 1)


def _common_step(ends: Sequence[fx.Node], aliases: Aliases) -> fx.Node | None:
    """The pointwise call that alone follows each of ``ends``, if it is the same everywhere and its
    results may share memory.
    """
    steps = []
    for end in ends:
        if len(end.users) != 1:
            return None
        (step,) = end.users
        if not is_call(step) or ops.category(step) != "pointwise" or not is_pure(step):
            return None
        if step in aliases.escaping or aliases.is_mutated(step):
            return None
        if step.all_input_nodes != [end] or step.meta["val"].shape != end.meta["val"].shape:
            return None
        if any(isinstance(a, Sequence) for a in step.args):
            return None  # sizes, which are those of a part
        steps.append(step)
    if len(set(steps)) != len(steps):
        return None
    shown = {
        repr((s.target, ["@" if a is e else a for a in s.args], dict(s.kwargs)))
        for s, e in zip(steps, ends, strict=True)
    }
    return steps[0] if len(shown) == 1 else None


def _enlarged(weight: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """A convolution's weight with zeros around its kernel, which stays in the middle."""
    border: list[int] = []
    for size, wanted in zip(reversed(weight.shape[2:]), reversed(kernel), strict=True):
        border += [(wanted - size) // 2] * 2
    return torch.nn.functional.pad(weight, border) if any(border) else weight


def _value(rewriter: Rewriter, node: fx.Node) -> torch.Tensor:
    value = rewriter.value(node)
    assert value is not None, node
    return value


def _positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: k for k, node in enumerate(graph.nodes)}


def _has_others(apart: fx.GraphModule, graph: fx.Graph, parts: Sequence[_Part]) -> bool:
    """Whether an operator outside of ``apart`` comes neither before the ``parts`` nor after all of
    them, so that it can run beside one of them.
    """
    own = {n.name for n in apart.graph.nodes}
    before: set[fx.Node] = set()
    pending = [p.source for p in parts]
    while pending:
        node = pending.pop()
        if node not in before:
            before.add(node)
            pending += node.all_input_nodes
    after = {p.node: 1 << k for k, p in enumerate(parts)}  # bits of the parts before each node
    everything = (1 << len(parts)) - 1
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            after[node] = after.get(node, 0) | after.get(operand, 0)
        apart_from_one = node not in before and after.get(node, 0) != everything
        if apart_from_one and is_call(node) and node.name not in own:
            if ops.category(node) != "view":
                return True
    return False


def _extract(rewriter: Rewriter, parts: Sequence[_Part]) -> fx.GraphModule:
    """The parts, and the pointwise operators that follow them and read nothing else, as a graph of
    one input; nodes keep their names.
    """
    region = dict.fromkeys(p.node for p in parts)
    for node in rewriter.graph.nodes:
        reads = [a for a in node.all_input_nodes if a.op != "get_attr"]
        follows = bool(reads) and all(a in region for a in reads)
        if follows and is_call(node) and ops.category(node) == "pointwise" and is_pure(node):
            region[node] = None
    graph = fx.Graph()
    source = parts[0].source
    mapping = {source: graph.placeholder("x")}
    mapping[source].meta = {"val": source.meta["val"]}
    inside = [n for n in rewriter.graph.nodes if n in region]
    for node in inside:
        for operand in node.all_input_nodes:
            if operand not in mapping and operand not in region:
                mapping[operand] = graph.node_copy(operand)
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output([mapping[n] for n in inside if any(u not in region for u in n.users)])
    return with_graph(rewriter.graph_module, graph)
