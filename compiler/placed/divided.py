"""Which layers' experts are divided among devices, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.fx as fx

from ...passes.annotations import annotate
from ...passes.divide_experts import Divided, Shares, divide_experts
from ...passes.manager import PassManager
from ...passes.placement.experts import ExpertPlacement, read_expert_placement
from ...passes.remarks import Remark
from ...passes.route_odds import label_of
from ...passes.speculate_routes import router_name
from ..errors import OptionError
from ..weights.absent import Rows
from .capture import Whole


def divided(
    whole: Whole,
    module: fx.GraphModule,
    devices: Sequence[str],
    experts: str | Path | ExpertPlacement,
) -> tuple[Whole, fx.GraphModule, list[Remark]]:
    """The model with its experts as ``experts`` says (see `PlacementOptions`), of ``devices``.

    Raises OptionError (PLT-DST-008) where a placement is not of this model and devices, and
    PlacementError for a file that holds none.
    """
    placed = None
    if experts != "divided":
        placed = experts
        if not isinstance(placed, ExpertPlacement):
            placed = read_expert_placement(placed)
        if len(placed.devices) != len(devices):
            raise OptionError(
                "PLT-DST-008",
                f"the experts are placed on {len(placed.devices)} devices, there are "
                f"{len(devices)}", "place them on as many: plait place-experts --devices N",
            )  # fmt: skip
    layers = _Layers(devices, placed)
    result = divide_experts(module, layers.shares)
    if placed is None:  # any device may run a share
        for node in result.module.graph.nodes:
            annotate(node, device=None)
    else:
        layers.check(placed)
    with torch.no_grad():
        normal = PassManager("normalize").run(result.module).graph_module
    remarks = _remarks(result, placed, len(devices))
    if not layers.labels:
        hint = "leave `experts` away; branches of a plait.Router stay on one device"
        reason = "the model has no layer of experts to divide"
        remarks.append(Remark("PLT-DST-015", "missed", "place", (), reason, hint))
    return _named(whole, result), normal, remarks


class _Layers:
    """The shares of layers as they come, and their names."""

    def __init__(self, devices: Sequence[str], placed: ExpertPlacement | None) -> None:
        self.devices, self.placed = devices, placed
        self.seen: Counter[str] = Counter()
        self.labels: list[str] = []

    def shares(self, route: fx.Node) -> tuple[str, Shares | None]:
        name, experts = router_name(route) or "", int(route.args[1])  # type: ignore[call-overload]
        label = label_of((name, self.seen[name]))
        self.seen[name] += 1
        self.labels.append(label)
        if self.placed is None:
            return label, _even(self.devices, experts)
        where = self.placed.experts.get(label)
        if where is None:
            return label, None
        if len(where) != experts:
            raise OptionError(
                "PLT-DST-008",
                f"layer {label!r} has {experts} experts, the placement places {len(where)}",
                "profile and place the experts of this model",
            )
        number = {name: k for k, name in enumerate(self.placed.devices)}
        held: list[list[int]] = [[] for _ in self.devices]
        for expert, names in enumerate(where):
            for name in (names,) if isinstance(names, str) else names:
                if name not in number:
                    known = ", ".join(number)
                    reason = f"layer {label!r}: expert {expert} is on {name!r}, there is no such"
                    raise OptionError("PLT-DST-008", reason, f"devices of the placement: {known}")
                held[number[name]].append(expert)
        return label, dict(zip(self.devices, held, strict=True))

    def check(self, placed: ExpertPlacement) -> None:
        unknown = sorted(placed.experts.keys() - set(self.labels))
        if unknown:
            known = ", ".join(self.labels) or "none"
            raise OptionError(
                "PLT-DST-008",
                f"the model has no layer of experts {unknown[0]!r}",
                f"it has {known}",
            )


def _even(devices: Sequence[str], experts: int) -> Shares | None:
    """As many neighbours on each device as can be; None where there is nothing to share out."""
    count = min(len(devices), experts)
    bounds = [k * experts // count for k in range(count + 1)]
    parts = {d: range(a, b) for d, a, b in zip(devices, bounds, bounds[1:], strict=False)}
    return parts if count > 1 else None


def _named(whole: Whole, result: Divided) -> Whole:
    """Where the values of the new graph's weights are."""
    names = dict(whole.names)
    for target, piece in result.pieces.items():
        source = whole.names[piece.target]
        assert isinstance(source, str), "a weight is divided once"
        names[target] = Rows(source, piece.rows)
    return replace(whole, names=names)


def _remarks(result: Divided, placed: ExpertPlacement | None, devices: int) -> list[Remark]:
    remarks = list(result.remarks)
    if result.routers:
        how = "evenly" if placed is None else "as they were placed"
        layers = f"{len(result.routers)} layers" if len(result.routers) > 1 else "a layer"
        reason = f"the experts of {layers} are divided among {devices} devices, {how}"
        remarks.append(Remark("PLT-DST-014", "done", "place", (), reason))
    return remarks
