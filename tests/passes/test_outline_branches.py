"""outline-branches: regions become graphs, the function stays the same."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from torch import nn

import plait
from plait.compiler.capture.export import capture
from plait.kernels.routing import gather, scatter
from plait.passes.base import Counter, counting
from plait.passes.ir import branches_of
from plait.passes.manager import PassManager
from plait.passes.outline_branches import OutlineBranches
from plait.passes.verifier import verify


class Labelled(nn.Module):
    """Cells go where their label says."""

    def __init__(self, branches, **options) -> None:
        super().__init__()
        self.router = plait.Router(branches, lambda x: x[:, 0].long(), combine="sum", **options)

    def forward(self, x):
        return self.router(x) * 2


def outlined(model: nn.Module, x: torch.Tensor, pipeline: str = "outline-branches"):
    """(graph before, graph after, remarks)."""
    with torch.no_grad():
        before = PassManager("normalize").run(capture(model.eval(), (x,), {}).graph_module)
        after = PassManager(pipeline).run(before.graph_module)
    verify(after.graph_module)
    return before.graph_module, after.graph_module, after.remarks


def calls(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def linears(*sizes: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 3)) for n in sizes]


def test_a_region_becomes_a_graph_for_each_branch() -> None:
    x = torch.randn(9, 4) * 2
    before, after, remarks = outlined(Labelled(linears(2, 3, 5)), x)
    assert [len(calls(g)) for _, g in branches_of(after)] == [3, 3, 3]
    assert not {"plait.scatter.default", "plait.gather.default"} & set(calls(after))
    assert calls(after).count("plait_branches") == 1
    assert [r.id for r in remarks] == ["PLT-BRN-001"]
    assert "plait.scatter.default" in calls(before), "the input was touched"
    for batch in (x, torch.zeros(9, 4), torch.full((9, 4), 7.0), -torch.ones(9, 4)):
        assert torch.equal(after(batch)[0], before(batch)[0])


def test_routers_of_equal_routes_over_one_tensor_are_two() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (Labelled(linears(2, 5)) for _ in range(2))

        def forward(self, x):
            return self.a(x) + self.b(x)

    before, after, remarks = outlined(Two(), torch.randn(9, 4))
    assert [r.id for r in remarks] == ["PLT-BRN-001"] * 2
    for batch in (torch.zeros(9, 4), torch.rand(9, 4) * 2, torch.ones(9, 4)):
        assert torch.equal(after(batch)[0], before(batch)[0])


def test_weights_of_branches_are_not_read_outside_them() -> None:
    _, after, _ = outlined(Labelled(linears(2, 3)), torch.randn(5, 4))
    graphs = {name for name, _ in branches_of(after)}
    read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
    assert read <= graphs | {n for n in read if "branches" not in n}


def test_a_router_inside_a_branch_is_outlined_there() -> None:
    inner = plait.Router(linears(2, 3), lambda x: x[:, 1].long(), combine="sum")
    x = torch.randn(12, 4) * 2
    before, after, _ = outlined(Labelled([inner, *linears(4)]), x)
    ((first, _),) = [branches_of(g) or [None, None] for _, g in branches_of(after)][:1]
    assert first is not None
    assert torch.equal(after(x)[0], before(x)[0])


def test_what_a_branch_reads_from_outside_is_an_operand() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            whole = x.mean(0)
            index = (x[:, 0] > 0).long()
            first, second = scatter(x, index, 2)
            return gather([self.a(first) + whole, self.b(second)], index, None)

    x = torch.randn(7, 4)
    before, after, _ = outlined(Shares(), x)
    (node,) = [n for n in after.graph.nodes if str(n.target) == "plait_branches"]
    assert len(node.args[3]) == 1
    assert torch.equal(after(x)[0], before(x)[0])


def test_a_value_read_outside_keeps_its_region_as_it_is() -> None:
    class Leaks(nn.Module):
        def forward(self, x):
            index = (x[:, 0] > 0).long()
            first, second = scatter(x, index, 2)
            first = first.relu()
            return gather([first, second], index, None) + first.sum()

    x = torch.randn(6, 4)
    before, after, remarks = outlined(Leaks(), x)
    assert [r.id for r in remarks if r.kind == "missed"] == ["PLT-BRN-005"]
    assert calls(after) == calls(before)


def test_branches_that_read_each_other_are_left_alone() -> None:
    class Mixes(nn.Module):
        def forward(self, x):
            index = (x[:, 0] > 0).long()
            first, second = scatter(x, index, 2)
            return gather([first, second + first.sum()], index, None)

    x = torch.randn(6, 4)
    _, after, remarks = outlined(Mixes(), x)
    assert [r.id for r in remarks if r.kind == "missed"] == ["PLT-BRN-004"]
    assert "plait.scatter.default" in calls(after)


@pytest.mark.parametrize("rows", [lambda x: x[1:], lambda x: torch.cat([x, x]), lambda x: x[:1]])
def test_a_branch_that_does_not_return_a_row_for_each_cell_is_refused_by_the_gather(rows) -> None:
    class Other(nn.Module):
        def forward(self, x):
            index = (x[:, 0] > 0).long()
            first, second = scatter(x, index, 2)
            return gather([first * 2, rows(second)], index, None)

    x = torch.ones(5, 4)
    _, after, remarks = outlined(Other(), x)
    assert [r.id for r in remarks if r.kind == "missed"] == ["PLT-BRN-007"]
    with pytest.raises(ValueError, match="branch 1 returned .* rows for 5 cells"):
        after(x)
    with torch.no_grad(), pytest.raises(ValueError, match="branch 1 returned .* rows for 5 cells"):
        plait.compile(Other(), tune="off")(x)


def test_the_bisect_counter_reaches_each_region() -> None:
    x = torch.randn(6, 4)
    model = Labelled(linears(2, 3))
    before, _, _ = outlined(model, x)
    counter = Counter(limit=0)
    with counting(counter):
        after = OutlineBranches().run(before).graph_module
    assert "plait.scatter.default" in calls(after) and counter.asked == 1


def test_routers_one_after_another_may_share_an_index() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            index = (x[:, 0] > 0).long()
            for a, b in (self.layers[:2], self.layers[2:]):
                first, second = scatter(x, index, 2)
                x = gather([a(first), b(second)], index, None)
            return x

    x = torch.randn(6, 4)
    before, after, remarks = outlined(Twice(), x)
    assert [r.id for r in remarks] == ["PLT-BRN-001"] * 2
    assert calls(after).count("plait_branches") == 2
    assert torch.equal(after(x)[0], before(x)[0])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_slots_and_weights(slots: int) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = plait.Router(
                linears(2, 3, 4), nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), top_k=slots
            )

        def forward(self, x):
            return self.router(x)

    x = torch.randn(8, 4)
    before, after, _ = outlined(Weighted(), x)
    torch.testing.assert_close(after(x)[0], before(x)[0])
