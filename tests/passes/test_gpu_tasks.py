"""The model of tasks on a GPU: order is kept, bounds are bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kernels.occupancy import Gpu
from plait.passes.gpu_tasks import GpuTask, bounds, seconds, simulate

GPU = Gpu(launch=1.0, issue=0.25, bandwidth=1.0)


@st.composite
def task_lists(draw: st.DrawFn) -> list[GpuTask]:
    found: list[GpuTask] = []
    for k in range(draw(st.integers(1, 12))):
        after = tuple(draw(st.lists(st.integers(0, k - 1), max_size=3))) if k else ()
        share = draw(st.sampled_from((0.05, 0.3, 0.5, 1.0)))
        took = draw(st.floats(0.0, 10.0))
        nbytes = took * share * draw(st.floats(0.0, 1.0))
        found.append(GpuTask(f"t{k}", took, share, nbytes, after))
    return found


@settings(max_examples=300, deadline=None)
@given(task_lists())
def test_a_simulation_keeps_the_order_and_stays_above_the_bounds(tasks: list[GpuTask]) -> None:
    spans = simulate(tasks, GPU)
    for (begin, end), task in zip(spans, tasks, strict=True):
        assert end >= begin + task.seconds - 1e-9 and begin >= GPU.launch
        assert all(begin >= spans[k][1] + GPU.launch - 1e-9 for k in task.after)
    begins = sorted(b for b, _ in spans)
    assert all(b - a >= GPU.issue - 1e-9 for a, b in zip(begins, begins[1:], strict=False))
    total = seconds(tasks, GPU)
    assert bounds(tasks, GPU).best <= total + 1e-6
    one_by_one = sum(t.seconds + GPU.launch + GPU.issue for t in tasks)
    assert total <= one_by_one + 1e-6


def test_small_tasks_run_side_by_side_and_large_ones_slow_each_other_down() -> None:
    gpu = Gpu(launch=0.0, issue=0.0)
    small = [GpuTask("a", 2.0, 0.5), GpuTask("b", 2.0, 0.5)]
    large = [GpuTask("a", 2.0, 1.0), GpuTask("b", 2.0, 1.0)]
    assert seconds(small, gpu) == pytest.approx(2.0)
    assert seconds(large, gpu) == pytest.approx(4.0)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="comes after one that is not before it"):
        simulate([GpuTask("a", 1.0, after=(0,))], GPU)
    with pytest.raises(ValueError, match="of 0 of the GPU"):
        simulate([GpuTask("a", 1.0, 0)], GPU)


def test_no_tasks_take_no_time() -> None:
    assert seconds([], GPU) == 0.0 == bounds([], GPU).best
