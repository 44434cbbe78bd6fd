"""`schedule`: options, and which schedules it proposes; what becomes of them is tested where they
are run.
"""

from __future__ import annotations

import pytest
import torch
from torch import fx

from plait.passes.pipeline_text import PipelineError, parse_pipeline
from plait.passes.schedule import SCHEDULE, SchedulePass
from plait.passes.tasks import Task


def _diamond(width: int) -> list[Task]:
    middle = [Task(f"m{k}", 20e-6, 4, (0,)) for k in range(width)]
    return [Task("a", 5e-6), *middle, Task("z", 5e-6, 1, tuple(range(1, width + 1)))]


def test_the_pass_marks_the_graph_and_changes_nothing_else() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1

    graph = fx.symbolic_trace(f)
    how = SchedulePass(algorithm="ios")
    result = how.run(graph)
    assert result.graph_module.meta[SCHEDULE] == how
    assert SCHEDULE not in graph.meta
    assert str(result.graph_module.graph) == str(graph.graph)


def test_candidates_are_distinct_and_the_best_predicted_comes_first() -> None:
    tasks = _diamond(5)
    found, too_large = SchedulePass().candidates(tasks, 2)
    assert not too_large and 1 <= len(found) <= 3
    assert [s.seconds for s in found] == sorted(s.seconds for s in found)
    places = {(s.order, tuple(map(s.place, range(len(tasks))))) for s in found}
    assert len(places) == len(found)


def test_ios_gives_its_one_schedule_and_list_scheduling_steps_in_where_it_is_too_large() -> None:
    found, too_large = SchedulePass(algorithm="ios").candidates(_diamond(4), 2)
    assert len(found) == 1 and not too_large
    found, too_large = SchedulePass(algorithm="ios", max_stages=3).candidates(_diamond(9), 2)
    assert found and too_large


def test_options_come_from_text_and_unknown_algorithms_are_refused() -> None:
    (how,) = parse_pipeline("schedule{algorithm=ios,measured=1}")
    assert how == SchedulePass(algorithm="ios", measured=1)
    with pytest.raises(PipelineError, match="'fast', not list or ios"):
        parse_pipeline("schedule{algorithm=fast}")
    for wrong in ("measured=0", "rounds=-1", "exact=-1", "max_stages=-1", "least_gain=nan"):
        text = "must be at least 1|must not be negative|is a number, not nan"
        with pytest.raises(PipelineError, match=text):
            parse_pipeline(f"schedule{{{wrong}}}")
