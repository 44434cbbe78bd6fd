"""`speculate-routes`: bets on how a model routes, from its profile.

Results are the same whether bets are won or lost; what is lost is time. A bet is made from the
fitted batches of the profile and judged by the held-out ones, and what can be lost by one must be
worth it by measurement (`compiler.bets`) before it stays. The bets (after Brainstorm, Cui et al.,
OSDI 2023):

* *Operators that all branches begin with* run once before the scatter (`route_reorder`); that is
  proven to be no worse and needs no profile.
* *Constant routers* are folded: where an index depends on no input, each branch is cut out and runs
  without a router. This is proven, not bet on, and needs no profile.
* *Dead branches* are deferred: the graph stays in the plan, but is compiled, and its weights are
  packed, when a cell first goes there. Their guard is the count of the branch's cells.
* *Likely routes* are inlined in a second graph, the likely one: where all cells of a router take
  one branch (or none), or a `torch.cond` one side, that side is part of the graph, and runs without
  waiting for the route. The graph's last result tells whether the routes were so; where not, the
  general plan runs. Routers with one branch that most cells take run it on all cells there, and
  choose per cell after.
* *Groups*, branches that run together: where all cells of a router take the same several ones, all
  of these are part of the likely graph, side by side on the cells as they are. Where cells differ,
  but certain branches only run together, they become one branch there (`route_groups`).
* *Capacities* are tailored: a branch gets a second plan for the number of rows that it often has;
  further rows, and fewer, go through the general plan.

The profile of a graph lies in its ``meta["routes"]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx

from ..kernels.ops.bounds import index_checks
from . import route_odds
from .base import Pass, PassResult, allow, copy_graph
from .cellwise import mixing
from .cse import drop_dead
from .ir import COND, Rewriter, attribute, branches_of
from .likely import LIKELY, Likely, grouped_key
from .outline_branches import is_bookkeeping
from .remarks import Remark
from .resize import at_rows
from .route_groups import regroup
from .route_odds import MIXED, Grouping, Key, Loads, Routes, label_of
from .route_regions import (
    NONE,
    ROUTER,
    Group,
    Inliner,
    Region,
    constant_index,
    draws,
    is_region,
    may_fail,
    region_of,
    regions,
)
from .route_reorder import hoist

ROUTES = "routes"
"""Key of a graph module's ``meta``: a mapping from router to its (fitted, held-out) `Loads`."""
DEFERRED = "deferred"
"""Key of a node's ``meta``: the branches that are compiled when they are first needed."""
SIZED = "sized"
"""Key of a node's ``meta``: branches with a plan for so many rows, and its graph."""


@dataclass
class _State:
    routes: Routes
    remarks: list[Remark] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    assumed: dict[Key, Group] = field(default_factory=dict)
    shares: dict[Key, int] = field(default_factory=dict)  # slots of a cell
    dense: list[Key] = field(default_factory=list)
    grouped: dict[Key, Grouping] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeculateRoutes(Pass):
    """Bets on the routes of a profile.

    Attributes:
        min_cells: fitted cells below which a profile is too small to bet on.
        min_batches: fitted batches below which it is too small to bet on likely routes.
        hoist: run what all branches of a router begin with before its scatter.
        fold: fold routers whose index is constant.
        likely: share of the fitted batches in which a route must be taken by all; above 1: never.
        dense: share of the fitted cells that must take the only branch of a router for it to run
            on all of them; above 1: never.
        groups: bet on branches that run together, too.
        sized: give branches a plan for the number of rows that they often have.
    """

    name: ClassVar[str] = "speculate-routes"
    min_cells: int = 32
    min_batches: int = 4
    hoist: bool = True
    fold: bool = True
    likely: float = 0.9
    dense: float = 0.5
    groups: bool = True
    sized: bool = True

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        if not _has_regions(graph_module):
            return PassResult(graph_module)
        routes: Routes = graph_module.meta.get(ROUTES, {})
        state = _State(routes)
        result = copy_graph(graph_module)
        if self.hoist:
            self._hoist(result, state)
        self._walk(result, state)
        if self.fold:
            result = self._fold(result, state)
        if state.assumed or state.dense or state.grouped:
            self._make_likely(result, state)
        result.recompile()
        return PassResult(result, tuple(state.remarks))

    def _walk(self, module: fx.GraphModule, state: _State) -> None:
        """Marks the routers of a graph and of its branches, in the order in which they run."""
        pending = dict(branches_of(module))
        for node in list(module.graph.nodes):
            name = router_name(node)
            if name is not None:
                call = state.seen[name] = state.seen.get(name, -1) + 1
                if is_region(node):
                    node.meta[ROUTER] = (name, call)
                    region = region_of(node)
                    if state.routes and (region is None or constant_index(region) is None):
                        self._judge(node, (name, call), module, state)
            if node.op != "get_attr":
                for graph in node.all_input_nodes:  # a router runs before those in its branches
                    target = str(graph.target)
                    if graph.op == "get_attr" and target in pending:
                        inner = copy_graph(pending.pop(target))
                        self._walk(inner, state)
                        inner.recompile()
                        setattr(module, target, inner)

    # -- what the profile says --------------------------------------------------------------------

    def _judge(self, node: fx.Node, key: Key, module: fx.GraphModule, state: _State) -> None:
        """Decides which bets a router is good for."""
        is_cond = node.target is COND
        graphs: Any = node.args[1:3] if is_cond else node.args[0]
        fitted, held = state.routes.get(key, (None, None))
        if fitted is None or any(len(loads) != len(graphs) for loads in fitted.loads):
            self._say(state, "PLT-SPC-003", node, f"router {label_of(key)!r} is not in the profile")
            return
        few = sum(fitted.cells) < self.min_cells
        if len(fitted.cells) >= self.min_batches:
            self._guess(node, key, fitted, held, module, state)
        elif few:
            cells = f"{sum(fitted.cells)} cells of router {label_of(key)!r}"
            reason = f"{cells} in {len(fitted.cells)} batches, fewer than {self.min_cells}"
            self._say(state, "PLT-SPC-003", node, reason)
        if is_cond or few:
            return
        self._defer(node, key, fitted, held, module, state)
        if self.sized:
            self._tailor(node, key, fitted, held, module, state)

    def _guess(
        self,
        node: fx.Node,
        key: Key,
        fitted: Loads,
        held: Loads | None,
        module: fx.GraphModule,
        state: _State,
    ) -> None:
        """Whether a route is likely enough to be part of the likely graph."""
        graphs: Any = node.args[1:3] if node.target is COND else node.args[0]
        region = region_of(node)
        share = state.shares[key] = 1 if region is None else region.share
        outcome = route_odds.likely_outcome(fitted, self.likely, share)
        if len(outcome) > 1 and not self.groups:
            return
        one = len(graphs) == 1 and node.target is not COND
        dense = outcome == MIXED and one and route_odds.share(fitted, 0) >= self.dense
        grouping = None
        if outcome == MIXED and not dense:
            if self.groups and region is not None:
                grouping = route_odds.grouping(fitted, self.likely, share)
            if grouping is None:
                return
        if held is None or not held.cells:
            reason = f"no held-out batch judges the routes of {label_of(key)!r}"
            self._say(state, "PLT-SPC-006", node, reason)
            return
        members = outcome if grouping is None else grouping.members
        taken = graphs if dense else [graphs[b] for b in members]
        if any(may_fail(attribute(module, str(g.target))) for g in taken):
            reason = f"a branch of {label_of(key)!r} may fail on cells that are not meant for it"
            self._say(state, "PLT-SPC-007", node, reason)
        elif grouping is not None:
            state.grouped[key] = grouping
        elif dense and (mixed := mixing(attribute(module, str(graphs[0].target)))) is not None:
            reason = f"{mixed} in the branch of {label_of(key)!r} may look at more than one cell"
            self._say(state, "PLT-SPC-015", node, f"{reason}, so it runs on no others")
        elif dense:
            state.dense.append(key)
        else:
            state.assumed[key] = outcome

    def _defer(
        self,
        node: fx.Node,
        key: Key,
        fitted: Loads,
        held: Loads | None,
        module: fx.GraphModule,
        state: _State,
    ) -> None:
        graphs: Any = node.args[0]
        deferred = []
        for b, graph in enumerate(graphs):
            if any(loads[b] for loads in fitted.loads):
                continue
            taken = 0 if held is None else sum(bool(loads[b]) for loads in held.loads)
            if taken:
                batches = len(held.loads) if held else 0
                reason = f"branch {b} of {label_of(key)!r}, dead when fitted, ran in {taken}"
                self._say(state, "PLT-SPC-002", node, f"{reason} of {batches} held-out batches")
            elif allow("defer branch", [node]):
                deferred.append(b)
                size = _weight_bytes(attribute(module, str(graph.target)))
                reason = f"branch {b} of {label_of(key)!r} took none of {sum(fitted.cells)} cells"
                text = f"{reason}: {size / 2**20:.2f} MiB deferred"
                self._say(state, "PLT-SPC-001", node, text, "done")
        node.meta[DEFERRED] = tuple(deferred)

    def _tailor(
        self,
        node: fx.Node,
        key: Key,
        fitted: Loads,
        held: Loads | None,
        module: fx.GraphModule,
        state: _State,
    ) -> None:
        """Makes graphs for the numbers of rows that branches often have."""
        graphs: Any = node.args[0]
        sized: dict[int, tuple[int, fx.GraphModule]] = {}
        for b, graph in enumerate(graphs):
            source = attribute(module, str(graph.target))
            rows = route_odds.capacity([loads[b] for loads in fitted.loads])
            if not rows or held is None or not held.cells or _has_regions(source):
                continue
            first = source.graph.find_nodes(op="placeholder")[0]
            if not isinstance(first.meta["val"].shape[0], torch.SymInt):
                continue
            if (mixed := mixing(source)) is not None:
                reason = f"{mixed} in branch {b} of {label_of(key)!r} may look at more than one"
                self._say(state, "PLT-SPC-015", node, f"{reason} cell, so rows are not divided")
                continue
            if allow("tailor capacity", [node]):
                sized[b] = rows, at_rows(source, rows, is_bookkeeping)
        node.meta[SIZED] = sized

    # -- the likely graph -------------------------------------------------------------------------

    def _make_likely(self, module: fx.GraphModule, state: _State) -> None:
        """Puts the likely graph into ``module.meta``."""
        first = next(regions(module), None)
        if first is None:
            return
        if draws(module):
            self._say(state, "PLT-SPC-007", first.node, "the graph draws random numbers")
            return
        copy = copy_graph(module)
        inliner = Inliner(copy)
        done: set[Key] = set()
        guards: list[fx.Node] = []
        while (region := self._next(copy, state, done)) is not None:
            key: Key = region.node.meta[ROUTER]
            guard: fx.Node | None = None
            if key in state.dense:
                if inliner.dense(region):
                    done.add(key)
                else:
                    state.dense.remove(key)
                continue
            if key in state.assumed:
                guard = inliner.taken(region, state.assumed[key])
            else:
                guard = regroup(inliner, region, state.grouped[key], grouped_key(key))
            if guard is None:
                reason = "do not take cells as they are, may get none, or are too many for a guard"
                text = f"the branches of {label_of(key)!r} {reason}"
                self._say(state, "PLT-SPC-007", region.node, text)
                state.assumed.pop(key, None)
                state.grouped.pop(key, None)
            else:
                guards.append(guard)
                done.add(key)
        if done:
            self._finish(module, copy, inliner, done, guards, state)

    def _next(self, copy: fx.GraphModule, state: _State, done: set[Key]) -> Region | None:
        """The next region to replace; inlining one may bring up others."""
        for region in regions(copy):
            key = region.node.meta.get(ROUTER)
            bet = key in state.assumed or key in state.dense or key in state.grouped
            if bet and key not in done:
                return region
        return None

    def _finish(
        self,
        module: fx.GraphModule,
        copy: fx.GraphModule,
        inliner: Inliner,
        done: set[Key],
        guards: list[fx.Node],
        state: _State,
    ) -> None:
        (output,) = copy.graph.find_nodes(op="output")
        with copy.graph.inserting_before(output):
            won: Any = None
            for guard in guards:
                both = torch.ops.aten.logical_and.default
                won = guard if won is None else inliner.call(both, won, guard)
        results: Any = output.args[0]
        output.args = ((*results, *([] if won is None else [won])),)
        rewriter = Rewriter(copy, self.name)
        drop_dead(rewriter)
        graph = rewriter.finish()
        graph.meta.pop(ROUTES, None)
        for inner in regions(graph):
            inner.node.meta.pop(DEFERRED, None)
            inner.node.meta.pop(SIZED, None)
        if not set(index_checks(graph.graph)) <= set(index_checks(module.graph)):
            reason = "inputs would be read as indices that nobody checks"
            self._say(state, "PLT-SPC-007", next(r.node for r in regions(module)), reason)
            return
        judged = {key: pair[1] for key, pair in state.routes.items() if pair[1] is not None}
        assumed = {key: group for key, group in state.assumed.items() if key in done}
        grouped = {key: grouping for key, grouping in state.grouped.items() if key in done}
        held = route_odds.joint(judged, assumed, grouped, state.shares)
        node = next(r.node for r in regions(module))
        if guards and not held:
            self._say(state, "PLT-SPC-006", node, "routers did not run in every held-out batch")
            return
        if allow("bet on likely routes", [node]):
            shapes = {k: (len(judged[k].loads[0]), state.shares[k]) for k in (*assumed, *grouped)}
            dense = tuple(key for key in state.dense if key in done)
            bet = Likely(graph, assumed, dense, tuple(held), shapes, grouped)
            module.meta[LIKELY] = bet
            for text in bet.grounds(state.routes):
                self._say(state, "PLT-SPC-014", node, text, "done")

    # -- reordering ------------------------------------------------------------------------------

    def _hoist(self, module: fx.GraphModule, state: _State) -> None:
        """Moves what branches have in common before their scatter; in branches, too."""
        for region in regions(module):
            if not region.is_cond and allow("hoist", [region.node]):
                moved = hoist(module, region)
                if moved:
                    text = f"all {len(region.graphs)} branches begin with {', '.join(moved)}"
                    self._say(state, "PLT-SPC-010", region.node, text, "done")
        for name, branch in branches_of(module):
            inner = copy_graph(branch)
            self._hoist(inner, state)
            inner.recompile()
            setattr(module, name, inner)

    # -- constant routers -------------------------------------------------------------------------

    def _fold(self, module: fx.GraphModule, state: _State) -> fx.GraphModule:
        """Folds constant routers of a graph and of its branches."""
        for name, branch in branches_of(module):
            setattr(module, name, self._fold(branch, state))
        inliner = Inliner(module)
        folded = False
        for region in regions(module):
            index = constant_index(region)
            if index is None or not allow("fold router", [region.node]):
                continue
            name = label_of(region.node.meta.get(ROUTER, ("", 0)))
            count = len(region.graphs)
            if isinstance(index, torch.Tensor):
                done, what = inliner.fold(region, index), "a constant index"
            else:
                outcome = (index,) if 0 <= index < count else NONE
                alone = region.share == 1 or outcome == NONE  # not named by several slots of a cell
                done = alone and inliner.taken(region, outcome) is not None
                what = f"all cells go to branch {index}" if outcome else "no cell is routed"
            if done:
                folded = True
                self._say(state, "PLT-SPC-004", region.node, f"router {name!r}: {what}", "done")
        if not folded:
            return module
        rewriter = Rewriter(module, self.name)
        drop_dead(rewriter)
        return rewriter.finish()

    def _say(
        self, state: _State, remark: str, node: fx.Node, reason: str, kind: Any = "missed"
    ) -> None:
        state.remarks.append(Remark(remark, kind, self.name, (node.name,), reason))


def router_name(node: fx.Node) -> str | None:
    """The qualified name of the module that routes by ``node``; None for other operators."""
    routing = ("plait_branches", "plait.route.default", "plait.scatter.default")
    if str(node.target) not in routing and node.target is not COND:
        return None
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None  # what a pass made of a router, which is counted itself
    path = str(list(stack.values())[-1][0])
    return "" if path == "target" else path.removeprefix("target.")


def _has_regions(module: fx.GraphModule) -> bool:
    return any(map(is_region, module.graph.nodes)) or any(
        _has_regions(branch) for _, branch in branches_of(module)
    )


def _weight_bytes(module: fx.GraphModule) -> int:
    weights = {}
    for node in module.graph.nodes:
        value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor):
            weights[node.target] = value.nbytes
    return sum(weights.values())
