"""What batches in flight take of the devices that a model is divided among."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plait
from plait.compiler.placed.plan import _waiting
from plait.runtime.pipeline import RankProgram, SegmentStep, Wire


def test_what_batches_in_flight_hold_is_planned() -> None:
    sent = Wire("sent", 0, 1, 0, 0, "float32", (1,))
    back = Wire("back", 1, 0, 1, 1, "float32", (1,))
    steps = (
        SegmentStep("first", 0, ("x",), ("sent", "kept"), sends=(sent,), drops=("x", "sent")),
        SegmentStep("last", 2, ("kept", "back"), ("y",), receives=(back,), drops=("kept", "back")),
    )
    program = RankProgram(0, 2, 3, 2, steps, ("x",), ("y",))
    sizes = {"x": 1.0, "sent": 10.0, "kept": 100.0, "back": 1000.0, "y": 1e4}
    assert _waiting(program, sizes) == 100 + (100 + 1000)


def test_batches_in_flight_keep_to_the_memory_that_there_is() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]).eval()
    x = torch.randn(4096, 64)  # 1 MB, as all between the layers

    def divided(objective: str, memory: float) -> plait.Placed:
        devices = [plait.Device("cpu", memory=memory) for _ in range(3)]
        how = plait.PlacementOptions(
            budget=0.3, objective=objective, costs="roofline", link="1000GB/s,0us"
        )
        return plait.compile(model, devices=devices, placement=how).prepare((x,), {})

    free = divided("throughput", 1e9).division
    assert free.segments == 3 and any(free.flight_bytes)
    peak = max(free.placement.report["peak_bytes"].values())
    assert max(free.planned_bytes) > 1.2 * peak
    with pytest.raises(plait.InfeasibleError, match="with batches in flight .* MB short"):
        divided("throughput", peak * 1.001)
    fewer = divided("throughput", peak * 1.2).division  # segments: no batch waits between two
    assert fewer.segments < 3 and max(fewer.planned_bytes) <= peak * 1.2
    once = divided("latency", peak * 1.001)  # is one batch at a time, unless `map` runs it
    assert "PLT-DST-013" in {r.id for r in once.remarks}
    torch.testing.assert_close(once(x), model(x))
