"""How many tokens change devices: ``python -m plait.bench.expert_placement``.

Routes of the trained mixture of experts of `bench.trained_moe`, recorded on batches that it was
trained on; experts are placed from those, and judged on held-out text. "equal" are placements with
as many experts on each device, whatever their load; "even" ones also have no device handle more of
a layer than 1.2 times the mean, or than round robin lets it; "even+1" ones have room on each device
for one copy of another expert in each layer. What crosses is counted on the held-out routes token
by token, by the rule of `passes.placement.expert_copies`; "model" is what the flow model there,
which only knows counts, makes of the same text. "hindsight" is "best" placed from the held-out
batches themselves: what no forecast can beat where it is exact. Messages count what is sent if a
token's results are added where its first expert is, once to each device.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compiler.routing.collect import Collector
from ..passes.placement.expert_copies import Model, crossings, loads_of, replay
from ..passes.placement.expert_search import place_experts
from ..passes.placement.experts import ExpertPlacement, ExpertTraffic
from ..passes.placement.placement import write_text
from ..passes.placement.problem import Ints
from . import trained_moe
from .trained_moe import ROWS, WINDOW, Batches

RULES = ("equal", "even")
ALGORITHMS = ("round-robin", "quadratic-assignment", "best", "hindsight")
Routes = dict[str, Ints]


def record(model: torch.nn.Module, batches: Sequence[torch.Tensor]) -> Routes:
    """Experts of each layer over all batches, int64 ``[tokens, k]``, strongest first."""
    layers: dict[str, list[Ints]] = {}
    collector = Collector(model)
    with torch.no_grad(), collector.watching():
        for batch in batches:
            model(batch)
            for route in collector.taken():
                layers.setdefault(route.key[0], []).append(route.index.numpy())
    return {name: np.concatenate(parts) for name, parts in layers.items()}


def drawn(batches: Batches, count: int, seed: int) -> list[torch.Tensor]:
    """Some of the batches, int64 ``[ROWS, WINDOW]`` each."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(batches), generator=generator)[:count]
    return [batches[int(k)] for k in chosen]


def encoded(batches: Batches) -> list[torch.Tensor]:
    """The same text in base64: another language, to which routing drifts."""
    size = ROWS * WINDOW
    found = []
    for k in range(len(batches)):
        raw = base64.b64encode(bytes(batches[k].flatten().tolist()))[:size]
        found.append(torch.tensor(list(raw)).reshape(ROWS, WINDOW))
    return found


def messages(played: Sequence[Ints]) -> int:
    """Messages if results of a token are added where its first expert is, and sent on from there.

    ``played`` are devices, ``[tokens, k]`` for each layer. Each gets a token once, however many of
    its experts are there.
    """
    total = 0
    for before, after in zip(played, played[1:], strict=False):
        home = before[:, 0]
        for side in (before, after):
            for device in np.unique(side):
                total += int(((side == device).any(1) & (home != device)).sum())
    return total


@dataclass(frozen=True)
class Case:
    """Experts of each layer to so many devices; a seed and seconds for each placement."""

    experts: int
    devices: int
    seed: int
    budget: float

    def traffic(self, routes: Routes) -> ExpertTraffic:
        """What routes say of the experts."""
        return ExpertTraffic.from_routes(routes, self.experts)

    def place(self, traffic: ExpertTraffic, **how: Any) -> ExpertPlacement:
        """A placement of the experts; ``how`` is what `place_experts` takes."""
        names = [f"device:{k}" for k in range(self.devices)]
        return place_experts(traffic, names, budget=self.budget, seed=self.seed, **how)


def compare(
    case: Case, fitted: Routes, held: Routes, copies: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """A row for each rule and algorithm, counts on the held-out routes; also with ``copies``."""
    seen, judge = case.traffic(fitted), case.traffic(held)
    model = Model(judge)
    rules = dict.fromkeys(RULES, 0) | {f"even+{count}": count for count in copies}
    found = []
    for rule, count in rules.items():
        balance = float(case.devices) if rule == "equal" else None
        for algorithm in ALGORITHMS:
            if rule != "equal" and algorithm == "quadratic-assignment":
                continue  # it knows nothing of load
            if count and algorithm == "round-robin":
                continue  # it makes no copies
            source = judge if algorithm == "hindsight" else seen
            method = "best" if algorithm == "hindsight" else algorithm
            placed = case.place(source, balance=balance, algorithm=method, copies=count)
            where = placed.held(judge)
            played = replay(held, where)
            loads = loads_of(played, case.devices)
            found.append(
                {
                    "devices": case.devices,
                    "rule": rule,
                    "copies": sum(int(x.sum()) - len(x) for x in where),
                    "algorithm": algorithm,
                    "seed": case.seed,
                    "exact": placed.report["exact"],
                    "tokens": judge.total,
                    "cross_tokens": crossings(played),
                    "model_cross_tokens": round(model.flow(where).crossing),
                    "messages": messages(played),
                    "imbalance": max(float(x.max() * case.devices / x.sum()) for x in loads),
                    "experts": placed.to_dict()["experts"],
                }
            )
    return found


def drift(case: Case, fitted: Routes, drifted: Routes) -> list[dict[str, Any]]:
    """What placing anew gains after routing has drifted, for several costs of a move."""
    after, balance = case.traffic(drifted), float(case.devices)
    old = case.place(case.traffic(fitted), balance=balance)
    rows = []
    for share in (0.0, 0.01, 0.03, 1.0):
        cost = share * after.total
        placed = case.place(after, balance=balance, previous=old, move_cost=cost)
        rows.append(
            {
                "devices": case.devices,
                "seed": case.seed,
                "move_cost_share": share,
                "moved": placed.report["moved"],
                "tokens": after.total,
                "cross_tokens": placed.report["cross_tokens"],
                "previous_cross_tokens": placed.report["previous_cross_tokens"],
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, and the range of what is saved."""
    head = (
        f"{'devices':>7s} {'rule':>6s}  {'algorithm':21s} {'cross':>6s} {'below round robin':>24s}"
    )
    print(f"{head} {'model':>6s} {'messages':>9s} {'load':>5s} {'copies':>6s}")
    groups: dict[tuple[int, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = row["devices"], row["rule"], row["algorithm"]
        groups.setdefault(key, {})[row["seed"]] = row
    for (devices, rule, algorithm), mine in groups.items():
        base = groups[devices, rule.split("+")[0], "round-robin"]

        def saved(what: str, mine: Any = mine, base: Any = base) -> list[float]:
            return [1 - row[what] / base[seed][what] for seed, row in mine.items()]

        less = saved("cross_tokens")
        cross = np.mean([r["cross_tokens"] / r["tokens"] for r in mine.values()])
        load = max(r["imbalance"] for r in mine.values())
        name = algorithm + ("*" if all(r["exact"] for r in mine.values()) else "")
        span = f"{np.mean(less):.1%} ({min(less):.1%} to {max(less):.1%})"
        sent, model = np.mean(saved("messages")), np.mean(saved("model_cross_tokens"))
        made = np.mean([r["copies"] for r in mine.values()])
        print(
            f"{devices:7d} {rule:>6s}  {name:21s} {cross:6.1%} {span:>24s} {model:6.1%} "
            f"{sent:9.1%} {load:5.2f} {made:6.1f}"
        )


def show_drift(rows: list[dict[str, Any]]) -> None:
    """What moved, and what crosses, means over seeds."""
    print("\nafter a drift of the text to base64, experts move where that saves their cost:")
    print(
        f"{'devices':>7s} {'cost, of all tokens':>20s} {'moved':>6s} {'cross':>6s} {'before':>7s}"
    )
    for devices, share in dict.fromkeys((r["devices"], r["move_cost_share"]) for r in rows):
        mine = [r for r in rows if (r["devices"], r["move_cost_share"]) == (devices, share)]
        moved, cross, old = (
            np.mean([r[a] / (1 if a == "moved" else r["tokens"]) for r in mine])
            for a in ("moved", "cross_tokens", "previous_cross_tokens")
        )
        print(f"{devices:7d} {share:20.0%} {moved:6.1f} {cross:6.1%} {old:7.1%}")


def main() -> None:
    """Records, places and judges for each seed; prints two tables."""
    parser = argparse.ArgumentParser(prog="plait.bench.expert_placement", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4], help="how many")
    parser.add_argument("--copies", type=int, nargs="*", default=[1, 2],
                        help="slots for copies on each device and layer, also tried")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="of batches and searches")  # fmt: skip
    parser.add_argument("--batches", type=int, default=12, help="to place from")
    parser.add_argument("--held-out", type=int, default=12, help="batches to judge by")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each placement")
    parser.add_argument("--auxiliary", type=float, default=trained_moe.AUXILIARY,
                        help="weight of the router's balancing loss in training")  # fmt: skip
    parser.add_argument("--steps", type=int, help="to train (what trained_moe takes)")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    options = parser.parse_args()
    model, train, held_out = trained_moe.trained(options.steps, auxiliary=options.auxiliary)
    experts = trained_moe.SETTINGS["num_local_experts"]
    held = record(model, [held_out[k] for k in range(min(options.held_out, len(held_out)))])
    drifted = record(model, encoded(held_out)[: options.held_out])
    rows, drifts = [], []
    for seed in options.seeds:
        fitted = record(model, drawn(train, options.batches, seed))
        for devices in options.devices:
            case = Case(experts, devices, seed, options.budget)
            rows += compare(case, fitted, held, options.copies)
            drifts += drift(case, fitted, drifted)
        print(f"seed {seed} done", file=sys.stderr)
    tokens = len(next(iter(held.values())))
    print(f"{len(held)} layers of {experts} experts, {tokens} held-out tokens, seeds "
          f"{', '.join(map(str, options.seeds))}; * is proven to be the best possible")  # fmt: skip
    show(rows)
    show_drift(drifts)
    if options.json:
        write_text(options.json, json.dumps({"rows": rows, "drift": drifts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
