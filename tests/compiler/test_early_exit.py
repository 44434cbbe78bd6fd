"""EarlyExit: who leaves where, against running every sample alone; export, gradients, misuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim, export

import plait

WIDTH, CLASSES = 6, 3


def model(
    stages: int, confident: Callable[[torch.Tensor], torch.Tensor] | float = 0.45
) -> plait.EarlyExit:
    return plait.EarlyExit(
        [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(stages)],
        [nn.Linear(WIDTH, CLASSES) for _ in range(stages)],
        confident,
    ).eval()


def alone(exits: plait.EarlyExit, sample: torch.Tensor) -> tuple[torch.Tensor, int]:
    """One sample's logits, and the stage where it left."""
    x, last = sample[None], len(exits.stages) - 1
    for i in range(last + 1):
        x = exits.stages[i](x)
        logits = exits.heads[i](x)
        assert isinstance(exits.confident, float)
        if i == last or logits.softmax(-1).max() > exits.confident:
            return logits[0], i
    raise AssertionError


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([0, 1, 2, 9]),
    st.sampled_from([0.0, 0.4, 0.45, 0.5, 1.0]),
    st.integers(0, 999),
)
def test_each_sample_gets_the_answer_it_gets_alone(
    stages: int, count: int, limit: float, seed: int
) -> None:
    torch.manual_seed(seed)
    exits = model(stages, limit)
    x = torch.randn(count, WIDTH) * 3
    with torch.no_grad():
        have = exits(x)
        assert have.shape == (count, CLASSES)
        for row, sample in zip(have, x, strict=True):
            torch.testing.assert_close(row, alone(exits, sample)[0])


def test_a_stage_runs_on_those_who_go_on_only() -> None:
    class Counting(nn.Module):
        def forward(self, x):
            seen.append(x.shape[0])
            return x - 1

    seen: list[int] = []
    heads = [nn.Identity() for _ in range(3)]
    exits = plait.EarlyExit([Counting() for _ in range(3)], heads, lambda z: z[:, 0] <= 0)
    x = torch.tensor([[1.0], [3.0], [2.0], [1.0], [7.0]])
    assert exits(x).flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 4.0]
    assert seen == [5, 3, 2]


def test_nan_is_never_confident() -> None:
    class Finite(nn.Module):
        def forward(self, x):
            return x.nan_to_num(7.0)

    exits = plait.EarlyExit([nn.Identity(), nn.Identity()], [nn.Identity(), Finite()], 0.0)
    x = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    assert exits(x).tolist() == [[0.0, 1.0], [7.0, 1.0]]  # the second head answered for the second


def test_gradients_reach_what_a_sample_went_through() -> None:
    torch.manual_seed(0)
    exits = model(3)
    x = (torch.randn(40, WIDTH) * 3).requires_grad_()
    parameters = [x, *exits.parameters()]
    have = torch.autograd.grad(exits(x).sin().sum(), parameters, allow_unused=True)
    results = [alone(exits, sample) for sample in x]
    assert {stage for _, stage in results} == {0, 1, 2}
    loss = torch.stack([logits for logits, _ in results]).sin().sum()
    want = torch.autograd.grad(loss, parameters, allow_unused=True)
    for mine, plain in zip(have, want, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("confident", [0.45, lambda z: z[:, 0] > 0], ids=["number", "function"])
def test_it_exports_as_one_graph(confident) -> None:
    torch.manual_seed(0)
    exits = model(3, confident)
    with torch.no_grad():
        size = {0: Dim("n", min=1)}
        program = export(exits, (torch.randn(5, WIDTH),), dynamic_shapes=(size,), strict=False)
        run = program.module()
        for x in (torch.randn(1, WIDTH), torch.randn(8, WIDTH) * 3, torch.zeros(2, WIDTH)):
            torch.testing.assert_close(run(x), exits(x))


def test_images_leave_early_too() -> None:
    torch.manual_seed(0)
    last = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4))
    stages = [nn.Conv2d(3, 4, 3), last]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)) for _ in "ab"]
    exits = plait.EarlyExit(stages, heads, lambda z: z[:, 0] > z[:, 1]).eval()
    with torch.no_grad():
        first = torch.randn(4, 3, 12, 12)
        program = export(exits, (first,), dynamic_shapes=({0: Dim("n", min=1)},), strict=False)
        for x in (first, torch.randn(3, 3, 12, 12)):
            torch.testing.assert_close(program.module()(x), exits(x))


# -- misuse ----------------------------------------------------------------------------------------

ONE = [nn.Identity()]
MISUSES = {
    "at least one stage": lambda: plait.EarlyExit([], [], 0.5),
    "2 stages need as many heads, not 1": lambda: plait.EarlyExit(ONE * 2, ONE, 0.5),
    "head 0 is a str": lambda: plait.EarlyExit(ONE, ["linear"], 0.5),
    "confident is a probability": lambda: plait.EarlyExit(ONE, ONE, 1.5),
    "confident is a probability, between 0 and 1, not nan": (
        lambda: plait.EarlyExit(ONE, ONE, float("nan"))
    ),
    "confident must be a function or a number": lambda: plait.EarlyExit(ONE, ONE, "0.5"),
    "confident returned torch.float32": lambda: plait.EarlyExit(ONE * 2, ONE * 2, lambda z: z)(X),
    "confident returned a bool": lambda: plait.EarlyExit(ONE * 2, ONE * 2, lambda z: True)(X),
    r"a head returned shape \(2, 1, 3\)": (
        lambda: plait.EarlyExit(ONE * 2, ONE * 2, 0.5)(X[:, None])
    ),
    "all must return the same": (
        lambda: plait.EarlyExit(ONE * 2, [nn.Identity(), nn.Linear(3, 4)], 0.5)(X)
    ),
}
X = torch.zeros(2, 3)


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_is_told(message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MISUSES[message]()
