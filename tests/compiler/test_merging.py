"""Mergers in whole models: right when forced, measured once, kept for the next compilation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import plait
from plait.compiler.lowering import select
from plait.compiler.measure import merging, scheduling
from plait.compiler.measure.scheduling import Proposal
from plait.passes.manager import PassManager
from plait.passes.schedule import SchedulePass

FORCED = "normalize,merge-parallel-ops{least_gain=-1e9},fuse-vertical"


class Attention(nn.Module):
    """Self-attention whose projections read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Branches of convolutions over one tensor, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 4, 1)
        self.c, self.pool = nn.Conv2d(4, 8, 3, padding=1), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        return torch.cat([a, self.c(b), self.pool(x)], 1)


CASES = [(Attention, (2, 5, 32)), (Block, (1, 8, 9, 9))]


def _ids(compiled: Any) -> list[str]:
    return [r.id for r in compiled.remarks if r.id.startswith("PLT-MRG")]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_merged_models_compute_what_eager_does(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), pipeline=FORCED)
        assert _ids(compiled) == ["PLT-MRG-001"]
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_merger_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(3, 7, 32)
    with torch.no_grad():
        first = plait.compile(model, example_inputs=(x,), pipeline=FORCED)
        monkeypatch.setattr(merging, "timed", None)  # calling it would fail
        other = Attention().eval()
        second = plait.compile(other, example_inputs=(x,), pipeline=FORCED)
        torch.testing.assert_close(second(x), other(x), rtol=1e-4, atol=1e-5)
    reasons = [[r.reason for r in c.remarks if r.id == "PLT-MRG-001"] for c in (first, second)]
    assert len(reasons[0]) == 1 and reasons[0] == reasons[1]


def test_sizes_that_calls_choose_are_not_measured() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 32)
    shapes = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), pipeline=FORCED, dynamic_shapes=shapes)
        assert _ids(compiled) == ["PLT-MRG-004"]
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_measured_where_nothing_is_tuned() -> None:
    model, x = Attention().eval(), torch.randn(4, 3, 32)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), pipeline=FORCED, tune="off")
    assert _ids(compiled) == ["PLT-MRG-004"]


class Kept(dict[str, Any]):
    """What a kernel database keeps of a search."""

    progress = dict.get
    set_progress = dict.__setitem__


def _judged(passes: str, kept: Kept, beside: bool = False) -> Any:
    graph = fx.symbolic_trace(lambda x: torch.relu(x))
    for node in graph.graph.nodes:
        node.meta["val"] = torch.empty(2)

    def build(_: fx.GraphModule) -> Any:
        return SimpleNamespace(plan=SimpleNamespace(inputs=[]), run=str)

    return merging.judge(PassManager(passes, verify="off"), build, kept, True)(graph, graph, beside)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("passes", "beside", "apart", "merged", "expected"),
    [  # predicted, and at work; run in order they take 10 s apart, 6 s scheduled, and 8 s merged
        ("normalize", True, (7.9, 5.0), (8.0, 8.0), (10.0, 8.0)),
        ("schedule", False, (7.9, 5.0), (8.0, 8.0), (6.0, 8.0)),
        ("schedule", False, (10.0, 5.0), (8.0, 8.0), (10.0, 8.0)),
        ("schedule", True, (10.0, 5.0), (8.0, 8.0), (5.0, 8.0)),
        ("schedule", True, (10.0, 9.0), (8.0, 3.0), (10.0, 8.0)),
        ("schedule", False, (7.9, 5.0), (9.0, 1.0), (7.9, 9.0)),
    ],
    ids=["no schedule", "scheduled", "alone", "beside others", "less work", "predicted slower"],
)
def test_a_merger_is_chosen_together_with_the_schedule(
    passes: str, beside: bool, apart: Any, merged: Any, expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    forms = [apart, merged]

    def propose(executor: Any, *_: Any) -> Proposal:
        predicted, work = forms.pop(0)
        return Proposal(predicted, work, executor if predicted == 7.9 else None)

    def timed(calls: Any) -> list[float]:
        assert merged[0] != 9.0, "runs what is predicted to be slower"
        return [10.0, 6.0, 8.0] if len(calls) == 3 else [10.0, 8.0]

    monkeypatch.setattr(merging, "propose", propose)
    monkeypatch.setattr(merging, "timed", timed)
    kept = Kept()
    for _ in range(2):
        assert _judged(passes, kept, beside) == expected


def test_a_merger_measured_on_a_busy_machine_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results, kept = [[3.0, 2.0], [1.0, 1.0], *([[3.0, 2.0]] * 4)], Kept()
    monkeypatch.setattr(merging, "timed", lambda _: results.pop(0))
    proposals = [Proposal(3.0, 2.0, None, disturbed) for disturbed in (0, 0, 0, 1, 0, 0)]
    monkeypatch.setattr(merging, "propose", lambda *_: proposals.pop(0))
    for left in (4, 2, 0, 0):
        _judged("schedule", kept)
        assert len(results) == left


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_proposed_computes_what_the_plan_does(threads: int) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(1, 8, 13, 13)
    before = torch.get_num_threads()
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), pipeline="normalize,fuse-vertical")
        executor = compiled.programs[-1].executable.executor  # type: ignore[attr-defined]
        try:
            torch.set_num_threads(threads)
            found = scheduling.propose(executor, SchedulePass(), select.database())
            if threads == 1:
                assert found is None
                return
            assert found is not None and 0 < found.work <= 1.001 * found.predicted
            if found.executor is not None:
                assert torch.equal(found.executor.run([x])[0], compiled(x))
        finally:
            torch.set_num_threads(before)
