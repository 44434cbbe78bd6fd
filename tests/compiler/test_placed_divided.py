"""Experts of one layer on several devices: as asked, as placed, or as nothing else fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import plait
from plait.compiler.capture.export import capture
from plait.compiler.options import Options
from plait.compiler.placed.graph import flops_of
from plait.compiler.placed.options import devices_here
from plait.compiler.placed.part import segment_from_json, segment_to_json
from plait.compiler.placed.plan import plan_model
from plait.compiler.placed.units import Units
from plait.compiler.weights.absent import Checkpoint, ModuleSource, Rows, Source
from plait.kernels.routing import route, routed_linear
from plait.passes.annotations import annotation
from plait.passes.divide_experts import divide_experts
from plait.passes.manager import PassManager
from plait.passes.placement.experts import ExpertPlacement

EXPERTS, WIDTH, INNER = 8, 16, 32


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.gate.weight = nn.Parameter(torch.randn(WIDTH, EXPERTS).T)  # a file knows no strides
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 6)

    def forward(self, x: Tensor) -> Tensor:
        gates, index = self.gate(x).softmax(-1).topk(2, -1)
        offsets, order = route(index, EXPERTS)
        y = routed_linear(x, offsets, order, self.up, None, False, 2, False).relu()
        y = routed_linear(y, offsets, order, self.down, None, False, 0, True)
        return (y.view(-1, 2, WIDTH) * gates.unsqueeze(-1)).sum(1)


class Model(nn.Module):
    """Two layers of experts, each called once, and a third call of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Experts(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        return x + self.first(x)


LAYERS = ("first", "second", "first #2")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def options(**given: Any) -> plait.PlacementOptions:
    return plait.PlacementOptions(**{"budget": 0.3, "timeout": 600.0, **given})


def placed_on(*devices: tuple[str, ...] | str) -> ExpertPlacement:
    names = tuple(sorted({d for x in devices for d in ((x,) if isinstance(x, str) else x)}))
    return ExpertPlacement(names, dict.fromkeys(LAYERS, devices))


def check(placed: plait.Placed, model: nn.Module, tokens: int = 5) -> None:
    x = torch.randn(tokens, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(placed(x), model(x), rtol=1e-4, atol=1e-5)


def experts_on(placed: plait.Placed) -> dict[str, set[str]]:
    """Units that multiply with experts' weights, by device."""
    found: dict[str, set[str]] = {}
    for unit, device in placed.placement.assign.items():
        if unit.startswith("routed_linear"):
            found.setdefault(device, set()).add(unit)
    return found


def test_experts_are_where_they_were_placed(model: Model) -> None:
    where = placed_on("a", "b", "c", "a", "b", "c", "a", "a")
    how = options(experts=where)
    with plait.compile(model, devices=["cpu"] * 3, placement=how) as placed:
        check(placed, model)
        assert {d: len(u) for d, u in experts_on(placed).items()} == {
            "cpu:0": 6, "cpu:1": 6, "cpu:2": 6,
        }  # fmt: skip
        assert "the experts of 3 layers are divided among 3 devices" in placed.explain()
        sent = [w for p in placed.division.programs for s in p.steps for w in s.sends]
        assert sent and all(math.prod(w.shape) <= 5 * WIDTH for w in sent)  # cells, never slots
        held = {op.name: op.param_bytes for op in placed.division.problem.ops}
        sizes = {sum(held[u] for u in units) for units in experts_on(placed).values()}
        one = 2 * WIDTH * INNER * 4  # bytes of an expert; both calls of a layer share them
        assert sizes == {4 * 2 * one, 2 * 2 * one}


def test_copies_take_slots_in_turn(model: Model, tmp_path: Path) -> None:
    both = ("a", "b")
    where = placed_on(both, "b", both, "a", "b", both, "a", both)
    where.write(tmp_path / "experts.json")
    how = options(experts=tmp_path / "experts.json")
    with plait.compile(model, devices=["cpu"] * 2, placement=how) as placed:
        check(placed, model)
        assert experts_on(placed).keys() == {"cpu:0", "cpu:1"}


def test_a_layer_that_fits_no_device_is_divided(model: Model) -> None:
    """A layer has two products, each of 16 kB of weights."""
    small, large = ([plait.Device("cpu", memory=m)] * n for m, n in ((13e3, 8), (26e3, 4)))

    def divided(devices: list[plait.Device], experts: str | None) -> bool:
        given, how = (torch.randn(1, WIDTH),), options(experts=experts)
        found = plan_model(model, given, {}, devices_here(devices), how, Options()).division
        assert max(found.placement.report["peak_bytes"].values()) <= (devices[0].memory or 0)
        return "PLT-DST-014" in {r.id for r in found.remarks}

    with pytest.raises(plait.InfeasibleError):
        divided(small, "together")
    assert divided(small, None) and divided(large, "divided")
    assert not divided(large, None)  # where it is not needed
    with plait.compile(model, devices=small, placement=options()) as placed:
        check(placed, model, 1)


def test_what_is_too_large_divided_too_says_so(model: Model) -> None:
    small = [plait.Device("cpu", memory=3e3) for _ in range(2)]
    with pytest.raises(plait.InfeasibleError):
        plait.compile(model, devices=small, placement=options())(torch.randn(5, WIDTH))
    dense = nn.Linear(64, 64).eval()
    with pytest.raises(plait.InfeasibleError):
        plait.compile(dense, devices=small, placement=options())(torch.randn(5, 64))


def test_processes_get_the_rows_of_their_experts(model: Model, tmp_path: Path) -> None:
    where = placed_on("a", "b", "a", "b", "b", "b", "b", "b")
    how = options(experts=where, launch="processes")
    with plait.compile(model, devices="2xcpu", placement=how) as placed:
        check(placed, model)
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    how = options(experts=where, weights=tmp_path)
    with plait.compile(model, devices="2xcpu", placement=how) as placed:
        check(placed, model)


def test_rows_survive_text(model: Model) -> None:
    here = devices_here("2xcpu")
    how = options(experts="divided")
    found = plan_model(model, (torch.randn(5, WIDTH),), {}, here, how, Options())
    names = found.whole.names
    assert Rows("second.up", (4, 5, 6, 7)) in names.values()
    for captured in found.graphs.values():
        held = {t: names[t] for t in captured.constants() if t in names}
        assert segment_from_json(segment_to_json(captured, names))[1] == held
    shard = found.payload(found.segments[0].rank, shard=True)
    known = {h[0] for segment in shard.values() for h in segment["hollow"].values()}
    assert "second.up[4,5,6,7]" in known


class Noting:
    """A source that notes which rows it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source, self.rows = source, list[Any]()

    def get(self, name: str, row: int | slice | None = None) -> Tensor:
        self.rows += range(9)[row] if isinstance(row, slice) else [row]
        return self.source.get(name, row)


def test_rows_of_a_weight(tmp_path: Path) -> None:
    model = nn.Linear(3, 5, bias=False)
    save_file({"weight": model.weight.detach()}, tmp_path / "w.safetensors")
    for source in (Noting(ModuleSource(model)), Noting(Checkpoint(tmp_path))):
        for rows in ((1, 2, 3), (0, 4), (4, 1, 2), (2,)):
            part, wanted = Rows("weight", rows), model.weight[list(rows)]
            for row in (None, 0, slice(0, 1), slice(1, 9), slice(0, len(rows))):
                asked = rows if row is None else rows[row]
                if asked != ():
                    source.rows.clear()
                    given = wanted if row is None else wanted[row]
                    assert torch.equal(part.of(source, row), given)
                    assert source.rows == ([asked] if row == 0 else list(asked))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (placed_on(*"ab" * 4), "placed on 2 devices, there are 3"),
        (ExpertPlacement(("a", "b", "c"), {"first": ("a", "b")}), "has 8 experts, the placement"),
        (ExpertPlacement(("a", "b", "c"), {"third": ("a", "b")}), "no layer of experts 'third'"),
        (ExpertPlacement(tuple("abc"), {"first": ("a",) * 7 + ("d",)}), "expert 7 is on 'd'"),
        ("nowhere.json", "nowhere.json"),
    ],
)
def test_placements_of_something_else(model: Model, experts: Any, reason: str) -> None:
    placed = plait.compile(model, devices=["cpu"] * 3, placement=options(experts=experts))
    with pytest.raises(ValueError, match=reason):
        placed(torch.randn(5, WIDTH))


def test_a_word_that_is_none() -> None:
    with pytest.raises(plait.OptionError, match=r"experts='apart' is unknown.*together, divided"):
        options(experts="apart")


@pytest.mark.parametrize("kind", ["dense", "branches"])
def test_a_model_without_experts_is_not_changed(kind: str) -> None:
    halves = [nn.Linear(8, 8) for _ in range(2)]
    model = halves[0] if kind == "dense" else plait.Router(halves, lambda x: x[:, :2], top_k=1)
    model.eval()
    with plait.compile(model, devices=["cpu"] * 2, placement=options(experts="divided")) as placed:
        x = torch.randn(2, 8)
        with torch.no_grad():
            torch.testing.assert_close(placed(x), model(x))
        (remark,) = [r for r in placed.remarks if r.id in {"PLT-DST-014", "PLT-DST-015"}]
        assert "no layer of experts" in remark.reason and remark.hint


def test_the_price_of_a_share_is_its_part_of_the_slots(model: Model) -> None:
    graph = capture(model, (torch.randn(5, WIDTH),), {}).graph_module
    module = PassManager("normalize").run(graph).graph_module
    parts = divide_experts(module, lambda n: ("layer", {"a": range(6), "b": range(6, 8)}))
    products = [n for u in Units(parts.module).units for n in u.nodes if "routed_linear" in n.name]
    flops = {annotation(n).device: flops_of(n) for n in products}
    assert flops == {"a": 0.75 * 2 * 10 * WIDTH * INNER, "b": 0.25 * 2 * 10 * WIDTH * INNER}
